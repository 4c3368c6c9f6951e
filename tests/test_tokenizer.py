"Tokenizer: exact round trips, no special token out of any text, the same vocabulary whatever the threads, samples by a stated rule, the audit's numbers."
import json, os, subprocess, sys, unicodedata
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings as hypothesis_settings, strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.format.tokenizer import (SPECIAL_TOKENS, Encoder, as_pretrained, domain_budgets, fertility, injected, load_tokenizer, sample_plan, sample_stream, sampled,
    save_tokenizer, sequence_cost, shortened, special_tokens, token_bytes, token_kind, tokenizer_hash, train_bpe, train_unigram, valid_text, vocabulary, vocabulary_extremes, vocabulary_findings)

SENTENCES = ["대한민국의 수도는 서울이다.", "서울의 인구는 약 940만 명이다.\n", "수도권에는 서울과 경기도가 있다. ㅋㅋㅋㅋ", "제12조 ① 모든 국민은 신체의 자유를 가진다.", "The capital is Seoul (서울), 2024년 3월."]
NASTY = ["", " ", "\n", "\r\n\t ", "\x00\x01\x7f\x85\u2028", "\ufeff가", unicodedata.normalize("NFD", "한글 띄어쓰기"), "ㅎㅏㄴㄱㅡㄹ", "ᄀᆞᆯ ꥠힰ", "👨‍👩‍👧‍👦🇰🇷👍🏽", "a\u0301\u0327", "\u200b\u200d\ufe0f",
         "１２３　ＡＢＣ", "漢字カナ हिन्दी عربي", "１,２３４.５６", "  두  칸   ", "가\u3000나", "￦￦", "<|endoftext|>", "<|user|>\n<|end|>", "▁▁가", "ĠìĦ", "<0xEA>", "\U0010ffff\ufffe\uffff"]
quick = hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(scope="module")
def tokenizer(): return as_pretrained(train_bpe(SENTENCES * 9, 400))

@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    save_tokenizer(tokenizer, folder := tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)

@pytest.fixture(scope="module")
def encode(tokenizer): return Encoder(tokenizer)

@pytest.fixture(scope="module")
def pieces(tokenizer): return token_bytes(tokenizer)

@pytest.fixture(scope="module")
def encode_loaded(loaded): return Encoder(loaded)

def word_level(normalizer=None):
    "A WordLevel vocabulary without unknown token whose words are special tokens, too."
    t = Tokenizer(models.WordLevel({"<eos>": 0, "가": 1, "나": 2, "<": 3, "eos>": 4, "[UNK]": 5}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer: t.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<eos>", unk_token="[UNK]")

# -- round trip ----------------------------------------------------------------

text_of_all_kinds = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("가각갂힣ㄱㅏ각 　\n\t\r0123<|>endoftext▁ĠÂ\u0301\u200d😀")), max_size=80)

@given(text_of_all_kinds)
@quick
def test_round_trip_is_exact(tokenizer, loaded, encode, encode_loaded, pieces, text):
    rows = encode([text])[0]
    assert tokenizer.decode(rows[:-1]) == loaded.decode(rows[:-1]) == text
    assert rows.dtype == np.int32 and np.array_equal(rows, encode_loaded([text])[0]) and (rows < 6).sum() == 1 and rows[-1] == 0
    assert b"".join(pieces[i] for i in rows[:-1]) == text.encode()

@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_round_trip_of_nasty_text(loaded, encode_loaded, text):
    row = encode_loaded([text])[0]
    assert loaded.decode(row[:-1]) == text and (row == 0).sum() == 1

@given(st.text(st.one_of(st.characters(categories=["Cs"]), st.sampled_from("가a😀 ")), max_size=30))
@example("\ud83d\ude00")
@quick
def test_surrogates_by_the_stated_rule(tokenizer, encode, text):
    expected, i = "", 0
    while i < len(text):  # pairs join, halves become U+FFFD
        high, low = ord(text[i]), ord(text[i + 1]) if i + 1 < len(text) else 0
        if 0xD800 <= high < 0xDC00 and 0xDC00 <= low < 0xE000: expected += chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00); i += 2
        else: expected += "\ufffd" if 0xD800 <= high < 0xE000 else text[i]; i += 1
    assert valid_text(text) == expected
    assert tokenizer.decode(encode(["가", text])[1][:-1]) == expected

def test_long_texts_stay_linear(tokenizer):
    encode = Encoder(tokenizer)
    for text in ("가" * 200_000, " " * 200_000, "ㅋ" * 200_000, "!" * 200_000, "1" * 200_000, (" " * 999 + "x") * 200):
        assert tokenizer.decode(encode([text])[0][:-1]) == text

def test_batches_and_empty_input(tokenizer):
    encode = Encoder(tokenizer)
    assert encode([]) == [] and [r.tolist() for r in encode([""])] == [[0]]
    assert all(np.array_equal(a, encode([t])[0]) for t, a in zip(NASTY, encode(NASTY)))

# -- special tokens ------------------------------------------------------------

@given(st.lists(st.one_of(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "endoftext", " ", "가"]), st.text(max_size=5)), max_size=8).map("".join).filter(lambda t: t == valid_text(t)))
@quick
def test_no_special_token_out_of_text(tokenizer, encode, text):
    row = encode([text])[0]
    assert (row <= 5).sum() == 1 and row[-1] == 0 and tokenizer.decode(row[:-1]) == text and encode.replaced == 0

@pytest.mark.parametrize("make", [word_level, lambda: train_unigram(SENTENCES * 9, 120), lambda: word_level(normalizers.NFKC())], ids=["wordlevel", "unigram", "normalised"])
def test_guard_for_models_that_know_the_marker(make):
    tokenizer = make(); encode, eos = Encoder(tokenizer), tokenizer.eos_token
    texts = ["가 나", f"가 {eos} 나", eos, eos * 3, f"{eos[:-1]}{eos}", "＜eos＞ 가", f"\ud800{eos}"]
    rows = encode(texts)
    assert all((r == tokenizer.eos_token_id).sum() == 1 and r[-1] == tokenizer.eos_token_id for r in rows)
    assert injected(tokenizer) == []

def test_guard_counts_what_no_cut_can_undo():
    encode = Encoder(word_level(normalizers.NFKC()))
    assert encode(["가 ＜eos＞ 나"])[0].tolist() == [1, 5, 2, 0] and encode.replaced == 1

def test_special_tokens_without_a_name(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|endoftext|>")
    assert special_tokens(other).keys() >= set(SPECIAL_TOKENS)
    other.add_tokens(["서울특별시"])  # an added token that is not special stays one
    assert len(Encoder(other)(["서울특별시"])[0]) == 2

def test_slow_path_gives_the_same(tokenizer):
    encode = Encoder(tokenizer); slow = Encoder(tokenizer); slow.fast = None
    texts = [t for t in NASTY if t]
    assert all(np.array_equal(a, b) for a, b in zip(encode(texts), slow(texts)))

def test_truncation_and_padding_of_a_tokenizer_do_nothing(tokenizer):
    t = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()); t.enable_truncation(3); t.enable_padding(length=50)
    assert len(Encoder(as_pretrained(t))(["서울의 인구는 약 940만 명이다."])[0]) > 4

def test_tokenizer_without_eos_is_refused(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=train_bpe(SENTENCES, 300))
    with pytest.raises(UserError, match="eos"): Encoder(bare)
    bare.save_pretrained(tmp_path/"bare")
    with pytest.raises(UserError, match="eos"): load_tokenizer(str(tmp_path/"bare"))

def test_missing_tokenizers_are_one_line(tmp_path):
    (tmp_path/"empty").mkdir(); (tmp_path/"bad").mkdir(); (tmp_path/"bad/tokenizer.json").write_text("{")
    for path in ("/no/such/folder", str(tmp_path/"empty"), str(tmp_path/"bad")):
        with pytest.raises(UserError) as e: load_tokenizer(path)
        assert "\n" not in str(e.value) and "tokenizer" in str(e.value)
    with pytest.raises(UserError, match="vocab_size"): train_bpe(SENTENCES, 200)

# -- training ------------------------------------------------------------------

TRAIN = """
import sys; from yunmin_efficientdata.format.tokenizer import as_pretrained, save_tokenizer, train_bpe
texts = [f'{w} {w}에서 {i % 7}번 {w}의' for i in range(400) for w in ('서울', '부산', '대구', 'AI', '漢字')]
print(save_tokenizer(as_pretrained(train_bpe(texts[::-1] if sys.argv[2] == 'r' else texts, 380)), sys.argv[1]))
"""

def test_same_bytes_for_all_threads_orders_and_hash_seeds(tmp_path):
    runs = [("1", "0", "f"), ("2", "7", "f"), ("4", "99", "r")]
    started = [subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path/n), order], stdout=subprocess.PIPE, env=os.environ | {"RAYON_NUM_THREADS": n, "PYTHONHASHSEED": seed}) for n, seed, order in runs]
    digests = {p.communicate()[0].decode().split()[-1] for p in started}
    assert len(digests) == 1 and all(p.returncode == 0 for p in started)
    for f in sorted(os.listdir(tmp_path/"1")): assert len({(tmp_path/n/f).read_bytes() for n, _, _ in runs}) == 1, f

def test_words_are_cut_as_stated():
    cut = lambda text: [text[a:b] for _, (a, b) in train_bpe([], 300).pre_tokenizer.pre_tokenize_str(text)]
    assert cut("2024년 12345원") == ["202", "4", "년", " ", "123", "45", "원"]
    assert cut("가 나  다\n\n라(마)") == ["가", " 나", " ", " 다", "\n\n", "라", "(마", ")"]
    nfd = unicodedata.normalize("NFD", "한글")
    assert cut(nfd) == [nfd] and cut("हिन्दी") == ["हिन्दी"] and cut("é e\u0301") == ["é", " e\u0301"]

def test_long_tokens_and_surrogates_in_training():
    t = train_bpe(["-" * 500, "\ud800가"] * 50, 400)
    assert max(len(w) for w in t.get_vocab() if w not in SPECIAL_TOKENS) <= 48
    assert train_bpe([], 4096).get_vocab_size() == 262  # nothing to merge

def test_saving_twice_gives_the_same_bytes(tokenizer, tmp_path):
    assert save_tokenizer(tokenizer, tmp_path/"a") == save_tokenizer(load_tokenizer(str(tmp_path/"a")), tmp_path/"b") == tokenizer_hash(tokenizer)
    for f in sorted(os.listdir(tmp_path/"a")): assert (tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() and str(tmp_path) not in (tmp_path/"a"/f).read_text()

def test_chat_template_masks_answers_only(loaded):
    chat = [{"role": "system", "content": "친절"}, {"role": "user", "content": "수도는?"}, {"role": "assistant", "content": "서울"}, {"role": "user", "content": "인구?"}, {"role": "assistant", "content": "940만"}]
    found = loaded.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert loaded.decode([i for i, m in zip(found["input_ids"], found["assistant_masks"]) if m]) == "서울<|end|>940만<|end|>"
    with pytest.raises(Exception, match="unknown role"): loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)

# -- sample --------------------------------------------------------------------

@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 10**12), max_size=8), st.integers(1, 10**12))
@quick
def test_budgets_fill_up(sizes, budget):
    parts, total = domain_budgets(sizes, budget), sum(sizes.values())
    assert all(0 < parts[d] <= sizes[d] * (1 + 1e-9) for d in parts) and parts.keys() == {d for d, s in sizes.items() if s}
    assert sum(parts.values()) == pytest.approx(min(budget, total), rel=1e-6)
    order = sorted(parts, key=lambda d: sizes[d])
    assert all(parts[a] <= parts[b] * (1 + 1e-9) for a, b in zip(order, order[1:]))
    assert all(parts[a] / sizes[a] >= parts[b] / sizes[b] * (1 - 1e-9) for a, b in zip(order, order[1:]))  # the small are heard better

def test_sample_is_spread_and_bounded():
    sizes = {"big": {f"part-{i:04}": 5 << 20 for i in range(2000)}, "small": {"part-0": 1 << 16}}
    plan = sample_plan(sizes, 100 << 20)
    files, share = plan["big"]
    assert 16 <= len(files) < 200 and share == pytest.approx(.25, abs=.02) and files == sorted(files)
    assert sample_plan({d: dict(reversed(f.items())) for d, f in reversed(sizes.items())}, 100 << 20) == plan  # not the order of a listing
    assert max(int(f[-4:]) for f in files) > 1500  # not only the first files
    assert sample_plan(sizes, 1 << 60) == {d: (sorted(f), 1.0) for d, f in sizes.items()} and sample_plan({}, 5) == {}

def test_sample_takes_documents_by_their_id():
    read = lambda domain, files: ({"id": f"{f}/{i}", "text": f"{f} {i}"} for f in files for i in range(500))
    taken = list(sample_stream({"a": (["x", "y"], .2), "b": (["z"], 1.0)}, read))
    assert len([t for t in taken if t[0] == "z"]) == 500 and all(60 < sum(t[0] == f for t in taken) < 140 for f in "xy")
    assert set(sample_stream({"a": (["x"], .1)}, read)) <= set(sample_stream({"a": (["x"], .2)}, read))
    assert sampled("\ud800", .5) in (True, False)

@example("\x80𐀀𐀀", 9)  # characters of four bytes
@given(st.text(max_size=60), st.integers(4, 40))
@quick
def test_shortened(text, limit):
    text = valid_text(text); short = shortened(text, limit)
    assert text.startswith(short) and len(short.encode()) <= limit and (short == text or len(text.encode()) > limit) and (short or not text)

# -- audit and fertility --------------------------------------------------------

def test_audit_numbers(tokenizer):
    rows, pieces = np.concatenate(Encoder(tokenizer)(SENTENCES)), token_bytes(tokenizer); counts = np.bincount(rows, minlength=len(tokenizer))
    table = vocabulary(tokenizer, counts).set_index("id")
    assert len(table) == len(tokenizer) and table["count"].sum() == len(rows)
    assert table.loc[0, "kind"] == "special" and (table.kind == "special").sum() == 6 and table.reachable.all()
    for i in table.index: assert table.bytes[i] == len(pieces[i])
    found = vocabulary_findings(table.reset_index())
    assert found["entries"] == len(tokenizer) and json.loads(json.dumps(found)) == found and found["unused"] == int((counts[6:] == 0).sum())
    ends = vocabulary_extremes(table.reset_index(), 3)
    assert ends.which.tolist() == ["longest"] * 3 + ["rarest"] * 3 and ends.bytes[:3].is_monotonic_decreasing

def test_audit_finds_entries_that_text_never_reaches():
    t = train_bpe(SENTENCES * 9, 300); state = json.loads(t.to_str())
    state["model"]["vocab"]["íķľê¸Ģ"] = len(state["model"]["vocab"])  # 한글, without a merge that makes it
    table = vocabulary(as_pretrained(Tokenizer.from_str(json.dumps(state))))
    assert table[~table.reachable].text.tolist() == ["한글"]

def test_token_bytes_of_other_families():
    unigram = train_unigram(SENTENCES * 9, 120)
    assert " 서울" in [b.decode() for b in token_bytes(unigram)]
    t = Tokenizer(models.BPE({"<unk>": 0, "<0xEA>": 1, "▁가": 2, "</s>": 3}, [], byte_fallback=True, unk_token="<unk>"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", unk_token="<unk>")) == [b"<unk>", b"\xea", " 가".encode(), b"</s>"]

@given(st.binary(min_size=1, max_size=8))
@quick
def test_token_kind_is_total(data):
    try: data.decode(); whole = True
    except UnicodeDecodeError: whole = False
    assert (token_kind(data) != "fragment") == whole

def test_fertility_against_other_tokenizers(tokenizer):
    texts = {"web": SENTENCES, "odd": ["ㅋㅋ  서울<|endoftext|>", "뷁\ud800"], "empty": []}
    table = fertility({"ours": tokenizer, "unigram": train_unigram(SENTENCES * 9, 120), "words": word_level()}, texts).set_index(["tokenizer", "domain"])
    ours, words, plain = table.loc[("ours", "total")], table.loc[("words", "total")], table.loc[("bytes", "total")]
    assert ours.exact_share == 1 and ours.unknown == 0 and plain.tokens == plain.bytes and words.unknown_share > .5 and words.exact_share == 0
    assert ours.tokens == sum(len(r) - 1 for t in texts.values() for r in Encoder(tokenizer)(t)) and ours.characters == sum(len(x) for t in texts.values() for x in t)
    assert table.loc[("ours", "odd")].fragments > 0 and "empty" not in table.index.get_level_values(1)
    cost = sequence_cost(table.reset_index(), 2048).set_index(["tokenizer", "domain"])
    assert (cost.loc["ours"].cost == 1).all() and cost.loc[("bytes", "web")].cost == pytest.approx(table.loc[("bytes", "web")].tokens / table.loc[("ours", "web")].tokens, abs=.001)
    assert cost.loc[("ours", "web")].characters == round(2048 / table.loc[("ours", "web")].tokens_per_char)
    with pytest.raises(UserError, match="no tokenizer"): sequence_cost(table.reset_index(), reference="theirs")

def test_real_text_round_trip_and_fertility(corpus):
    texts = {}
    for path in sorted((corpus if (corpus/"small").is_dir() is False else corpus/"small").glob("*.jsonl")):
        with open(path, encoding="utf-8") as f: texts[path.stem] = [json.loads(line)["text"] for _, line in zip(range(150), f)]
    train = {d: t[::2] for d, t in texts.items()}; held = {d: t[1::2] for d, t in texts.items()}
    tokenizer = as_pretrained(train_bpe((x for t in train.values() for x in t), 3000))
    table = fertility({"ours": tokenizer}, held)
    assert (table[table.tokenizer == "ours"].exact_share == 1).all() and (table[table.tokenizer == "ours"].tokens_per_char < 1).all()
    assert injected(tokenizer) == []
