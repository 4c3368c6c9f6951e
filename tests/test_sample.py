"The sample corpus: its truth table is true, its Korean agrees, its bytes depend on the seed alone."
import csv
import io
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict

import pytest

from yunmin_efficientdata.core.records import BadLine, read_jsonl, validate
from yunmin_efficientdata.core.sample import (
    BAD_KINDS, DOMAINS, Grammar, NOISE, bad_lines, conjugate, final_sound, generate, grammar, jaccard, josa, planned, resident_number, shingles, write_sample)
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store

N = 2000


@pytest.fixture(scope="module")
def docs():
    return list(planned(N, seed=3, duplicate_rate=.2))


def test_counts_are_exact(docs):
    kinds = Counter(note.get("kind") for _, note in docs)
    assert len(docs) == N and kinds["exact"] == 160 and kinds["near"] == 240 and kinds["below"] == 40
    assert {r["domain"] for r, _ in docs} == set(DOMAINS)
    assert min(Counter(r["domain"] for r, _ in docs).values()) > N / 10


def test_truth_rows_are_true(docs):
    text = {r["id"]: r["text"] for r, _ in docs if "id" in r}
    dirty = {r.get("id") for r, note in docs if "noise" in note or "incomplete" in note}
    for record, row in docs:
        if "kind" not in row:
            continue
        assert record["id"] == row["id"] and row["duplicate_of"] in text and row["duplicate_of"] not in dirty
        j = jaccard(text[row["id"]], text[row["duplicate_of"]])
        assert j == pytest.approx(row["jaccard"], abs=1e-6)
        if row["kind"] == "exact":
            assert text[row["id"]].split() == text[row["duplicate_of"]].split() and j == 1
        else:
            assert .8 <= j < 1 if row["kind"] == "near" else .3 < j < .8


def test_no_accidental_duplicates(docs):
    "Exact join over shared shingles: pairs at J >= .8 that the truth table does not explain are next to none."
    family = {}
    sets, holders = {}, defaultdict(list)
    for i, (record, row) in enumerate(docs):
        key = record.get("id", f"none-{i}")
        family[key] = family.get(row.get("duplicate_of"), key)
        if len(record["text"].split()) >= 5 and row.get("noise") != "nfd":
            sets[key] = shingles(record["text"])
            for s in sets[key]:
                holders[s].append(key)
    shared = Counter()
    for keys in holders.values():
        for a in range(len(keys)):
            for b in range(a):
                if family[keys[a]] != family[keys[b]]:
                    shared[keys[b], keys[a]] += 1
    accidents = [(a, b) for (a, b), n in shared.items() if n >= .8 * len(sets[a] | sets[b])]
    assert len(accidents) <= 2, accidents


def test_ids_and_fields(docs):
    ids = [r["id"] for r, _ in docs if "id" in r]
    assert len(ids) == len(set(ids))
    missing = [r for r, note in docs if note.get("incomplete")]
    assert any("id" not in r for r in missing) and any("date" not in r for r in missing)
    full = {"id", "text", "source", "domain", "lang", "date", "url", "license"}
    assert all(set(r) == full for r, note in docs if "incomplete" not in note)
    assert {r["lang"] for r, _ in docs} == {"ko", "en"}
    assert {note["noise"] for _, note in docs if "noise" in note} == set(NOISE)


def test_same_bytes_whatever_the_hash_seed(tmp_path):
    code = ("import sys, hashlib; from yunmin_efficientdata.core.sample import write_sample; from yunmin_efficientdata.core.store import open_store; "
            "s = open_store(sys.argv[1]); write_sample(s, 200, seed=5); print([(k, hashlib.sha256(s.read(k)).hexdigest()) for k in s.list('')])")
    seen = {subprocess.run([sys.executable, "-c", code, str(tmp_path / h)], env={**os.environ, "PYTHONHASHSEED": h}, capture_output=True, text=True, check=True).stdout for h in "01"}
    assert len(seen) == 1
    assert list(generate(100, seed=1)) != list(generate(100, seed=2))


def test_written_files_read_back(tmp_path):
    store = open_store(str(tmp_path))
    counts = write_sample(store, 300, seed=1, duplicate_rate=.3)
    assert store.list("") == ["raw/assembly.jsonl", "raw/main_data.jsonl", "raw/social.jsonl.zst", "raw/textbook.jsonl", "raw/web.jsonl.gz", "truth/duplicates.csv"]
    ids = set()
    for key in store.list("raw/"):
        rows = list(read_jsonl(store, key))
        assert not any(isinstance(r, BadLine) for r in rows)
        assert len(rows) == counts["domains"][key[4:].split(".")[0]]
        ids |= {r[1]["id"] for r in rows if "id" in r[1]}
    truth = list(csv.DictReader(io.StringIO(store.read_text("truth/duplicates.csv"))))
    assert list(truth[0]) == ["id", "duplicate_of", "kind", "jaccard"]
    assert Counter(r["kind"] for r in truth) == {k: counts[k] for k in ("exact", "near", "below")} and counts["exact"] + counts["near"] == 90
    assert all(r["id"] in ids and r["duplicate_of"] in ids for r in truth)


@pytest.mark.parametrize("n,rate", [(20, 0), (20, .9), (50, .9), (33, .5)])
def test_small_and_extreme(n, rate):
    made = list(planned(n, seed=4, duplicate_rate=rate))
    assert len(made) == n and {r["domain"] for r, _ in made} == set(DOMAINS)


@pytest.mark.parametrize("n,rate", [(19, .2), (100, .95), (100, -.1)])
def test_impossible_numbers(tmp_path, n, rate):
    with pytest.raises(UserError):
        write_sample(open_store(str(tmp_path)), n, duplicate_rate=rate)
    assert not open_store(str(tmp_path)).list("")


def test_size_of_ten_thousand():
    size = sum(len(r["text"].encode()) for r in generate(1000))
    assert 7e5 < size < 12e5


def clean(docs, domain=None):
    return [r["text"] for r, note in docs if not note and r["lang"] == "ko" and domain in (None, r["domain"])]


def test_particles_agree_everywhere(docs):
    "Nouns of the tables with a particle in running text: no 를 after a consonant, no 을 after a vowel."
    nouns = {n for d in DOMAINS for s in ("city", "nation", "facility", "comp", "thing", "goods", "dish", "veg", "people", "product", "stat")
             for n in [g for p in grammar(d).rules.get(s, []) if len(p) == 1 and isinstance(p[0], str) for g in p]}
    seen = 0
    text = "\n".join(t for d in DOMAINS[:4] for t in clean(docs, d))
    for noun, particle in re.findall(r"(?<!\S)([가-힣]+)(을|를|과|와)(?=[\s,.])", text):
        if noun in nouns:
            seen += 1
            assert (final_sound(noun) > 0) == (particle in "을과"), noun + particle
    assert seen > 500


def test_registers_differ(docs):
    "The share of sentence endings tells the domains apart."
    def share(domain, pattern):
        text = "\n".join(clean(docs, domain))
        return len(re.findall(pattern + r"(?=[.!?])", text)) / max(1, len(re.findall(r"[가-힣](?=[.!?])", text)))
    assert share("main_data", "[가-힣]다") > .9 and share("main_data", "니다") < .05
    assert share("textbook", "(니다|세요|시다)") > .8
    assert share("web", "[요죠]") > .8 and max(share(d, "요") for d in ("main_data", "assembly")) < .05
    social = "\n".join(clean(docs, "social"))
    assert len(re.findall("[ㅋㅎㅠㅜ]+", social)) > 300 and not re.search("[ㅋㅠ]", "\n".join(clean(docs, "assembly")))
    assert "하였다" in "\n".join(clean(docs, "assembly")) and "하여야 한다" in "\n".join(clean(docs, "assembly"))


def test_vocabularies_differ(docs):
    words = {d: {w for w, n in Counter(" ".join(clean(docs, d)).split()).items() if n > 2} for d in DOMAINS}
    for a in DOMAINS:
        for b in DOMAINS:
            if a < b:
                assert len(words[a] & words[b]) / len(words[a] | words[b]) < .2
    assert words["main_data"] & words["web"]


def test_no_markup_left_and_normal_form(docs):
    for t in clean(docs):
        assert not re.search(r"\{@?[a-z_#]+[^\n{}\"]*[:~]?[^\n{}]*\}", t) or "```" in t
        assert "\\n" not in t and unicodedata.is_normalized("NFC", t) and t == t.strip()


@pytest.mark.parametrize("stem,ending,want", [
    ("돕", "아요", "도와요"), ("줍", "았다", "주웠다"), ("잡", "았다", "잡았다"), ("입", "으면", "입으면"), ("짓", "을", "지을"), ("웃", "으니", "웃으니"), ("걷", "으면", "걸으면"), ("받", "으면", "받으면"),
    ("모르", "았어", "몰랐어"), ("치르", "았다", "치렀다"), ("잠그", "아", "잠가"), ("크", "았다", "컸다"), ("울", "ㅂ니다", "웁니다"), ("늘", "은", "는"), ("알", "네", "아네"), ("열", "으며", "열며"),
    ("되", "여야", "되어야"), ("되", "아요", "돼요"), ("이기", "았다", "이겼다"), ("오", "았어요", "왔어요"), ("있", "ㄴ다", "있다"), ("먹", "ㄴ다", "먹는다"), ("살", "ㄴ다", "산다"), ("없", "은", "없는")])
def test_conjugation(stem, ending, want):
    assert conjugate(stem, ending) == want


@pytest.mark.parametrize("word,particle,want", [("물", "으로", "물로"), ("길", "이", "길이"), ("커피", "이랑", "커피랑"), ("“문서”", "을", "“문서”를"), ("10", "을", "10을"), ("2", "은", "2는"), ("SQL", "으로", "SQL로"), ("Git", "은", "Git은")])
def test_particles(word, particle, want):
    assert josa(word, particle) == want


def test_misspelt_tables_are_refused():
    for table in ("a : {b} 없음", "a : {c:를} 틀림\nc = 말"):
        with pytest.raises(KeyError):
            Grammar(table)


def test_resident_numbers_are_valid_and_impossible():
    import random
    for i in range(200):
        n = resident_number(random.Random(i)).replace("-", "")
        assert (11 - sum(int(d) * w for d, w in zip(n[:12], (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5))) % 11) % 10 == int(n[12])
        assert n[0] in "89" and n[6] in "34"


def test_bad_lines_end_in_quarantine(tmp_path):
    store, lines = open_store(str(tmp_path)), bad_lines(200, seed=2, limit=1 << 16)
    assert Counter(k for _, k in lines) == dict.fromkeys(BAD_KINDS, 20) and not any(b"\n" in line for line, _ in lines)
    store.write("raw/bad.jsonl", b"\n".join(line for line, _ in lines) + b"\n")
    read = list(read_jsonl(store, "raw/bad.jsonl", max_line_bytes=1 << 16))
    assert len(read) == 200
    for (line, kind), item in zip(lines, read):
        assert isinstance(item, BadLine) or validate(item[1]), kind
