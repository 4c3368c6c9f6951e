"""Altered copies, planted recall, likeness of strangers, checks of synthetic text."""
import json, unicodedata
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from yunmin_efficientdata.core.settings import DedupSettings, UserError
from yunmin_efficientdata.dedup.augment import KINDS, PLANTED, augment, perturb, plant, sample_texts, wilson
from yunmin_efficientdata.dedup.clean import Cleaner

hangul = st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=6)
anything = st.one_of(st.lists(st.one_of(hangul, st.sampled_from(["학교에서", "사람이", "했다.", "The", "an", "apple", "3,000원", "…", "ㅋㅋㅋ", "\n"])), max_size=30).map(" ".join), st.text(max_size=80))
rates = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(anything, st.sampled_from(list(KINDS)), rates, st.integers(0, 3))
def test_any_text_any_kind(text, kind, rate, seed):
    "Never empty, the same again, untouched at rate 0."
    new = perturb(text, kind, rate, seed)
    assert new == perturb(text, kind, rate, seed)
    assert bool(new.strip()) == bool(text.strip())
    assert perturb(text, kind, 0, seed) == text


@settings(max_examples=100, deadline=None)
@given(anything, rates)
def test_forms_come_back(text, rate):
    "NFC undoes NFD, NFKC undoes full width, and no spacing kind touches a visible character."
    assert unicodedata.normalize("NFC", perturb(text, "nfd", rate)) == unicodedata.normalize("NFC", text)
    assert unicodedata.normalize("NFKC", perturb(text, "full_width", rate)) == unicodedata.normalize("NFKC", text)
    for kind in ("spaces_dropped", "spaces_all_dropped", "spaces_inserted"):
        assert "".join(perturb(text, kind, rate).split()) == "".join(text.split())
