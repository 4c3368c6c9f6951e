"""Altered copies, planted recall, likeness of strangers, checks of synthetic text."""
import itertools, json, os, random, subprocess, sys, time, unicodedata
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from yunmin_efficientdata.core.sample import generate
from yunmin_efficientdata.core.settings import DedupSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import augment as A
from yunmin_efficientdata.dedup.augment import (KINDS, PLANTED, SyntheticSettings, augment, check_synthetic, collisions, compare, copies_found, draw_documents,
    false_positive_rate, flagged_pairs, length_outliers, loop_length, perturb, plant, planted_recall, random_pairs, sample_texts, truncated, wilson)
from yunmin_efficientdata.dedup.clean import Cleaner
from yunmin_efficientdata.dedup.lsh import resolve_bands
from yunmin_efficientdata.dedup.minhash import canonical, token_ngrams
from yunmin_efficientdata.dedup.prepare import INDEX, Corpus, text_hash, write_table

hangul = st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=6)
words = st.one_of(hangul, st.sampled_from(["학교에서", "사람이", "했다.", "위해", "The", "an", "apple", "don't", "3,000원", "…", "ㅋㅋㅋ", "\n", "(가)"]))
anything = st.one_of(st.lists(words, max_size=30).map(" ".join), st.text(max_size=80))
rates = st.floats(0, 1)
kinds = st.sampled_from(list(KINDS))


def make_corpus(folder, texts, per_part=400):
    "A prepared corpus without the cleaning."
    store, parts = open_store(str(folder)), []
    for i in range(0, len(texts), per_part):
        name, columns, offset, lines = f"web/part-{i // per_part:05d}", {k: [] for k in INDEX}, 0, []
        for j, t in enumerate(texts[i:i + per_part]):
            line = json.dumps({"id": str(i + j), "text": t}, ensure_ascii=False).encode() + b"\n"
            for k, v in zip(INDEX, (str(i + j), offset, len(line), len(t.split()), len(t.encode()), "", "", text_hash(t))): columns[k].append(v)
            lines.append(line); offset += len(line)
        store.write(f"dedup_ready/{name}.jsonl", b"".join(lines))
        write_table(store, f"minhash_lsh/index/{name}.parquet", columns, INDEX)
        parts.append({"domain": "web", "name": name, "docs": len(lines), "bytes": offset})
    store.write("minhash_lsh/index/parts.json", json.dumps({"parts": parts}))
    return Corpus(store)


@pytest.fixture(scope="module")
def texts():
    "Cleaned documents of the sample corpus."
    cleaner = Cleaner()
    cleaned = (cleaner.clean(r["text"])[0] for r in generate(700, seed=11))
    return list({text_hash(t): t for t in cleaned if cleaner.reject(t) is None}.values())


# --- alterations

@settings(max_examples=150, deadline=None)
@given(anything, kinds, rates, st.integers(0, 3))
def test_any_text_any_kind(text, kind, rate, seed):
    "Never empty, the same again, untouched at rate 0."
    new = perturb(text, kind, rate, seed)
    assert new == perturb(text, kind, rate, seed)
    assert bool(new.strip()) == bool(text.strip())
    assert perturb(text, kind, 0, seed) == text


@settings(max_examples=80, deadline=None)
@given(anything, rates)
def test_forms_come_back(text, rate):
    "NFC undoes NFD, NFKC undoes full width, and no spacing kind touches a visible character."
    assert unicodedata.normalize("NFC", perturb(text, "nfd", rate)) == unicodedata.normalize("NFC", text)
    assert unicodedata.normalize("NFKC", perturb(text, "full_width", rate)) == unicodedata.normalize("NFKC", text)
    for kind in ("spaces_dropped", "spaces_all_dropped", "spaces_inserted"):
        assert "".join(perturb(text, kind, rate).split()) == "".join(text.split())


@settings(max_examples=80, deadline=None)
@given(anything, rates)
def test_what_each_kind_leaves_alone(text, rate):
    "Swapped words and moved sentences lose nothing, case is only case, numbers keep their number of figures, boilerplate stands below."
    assert sorted(perturb(text, "words_swapped", rate).split()) == sorted(text.split())
    assert sorted(perturb(text, "sentences_moved", rate)) == sorted(text)
    assert perturb(text, "case", rate).casefold() == text.casefold()
    assert perturb(text, "boilerplate_added", rate).startswith(text)
    assert len(perturb(text, "digits", rate)) == len(text)
    left, all_words = perturb(text, "words_dropped", rate).split(), iter(text.split())
    assert all(w in all_words for w in left)  # in the same order
    inserted = iter(perturb(text, "words_inserted", rate).split())
    assert all(w in inserted for w in text.split())


@settings(max_examples=60, deadline=None)
@given(anything, rates, rates)
def test_a_higher_rate_changes_the_same_places_and_more(text, a, b):
    "Full-width characters of the lower rate are full-width at the higher one too."
    low, high = (perturb(text, "full_width", r) for r in sorted((a, b)))
    assert all(y != x or z == x for x, z, y in zip(text, low, high))


def test_the_same_copy_in_another_process():
    "No dependence on the hash seed of the process."
    code = "from yunmin_efficientdata.dedup.augment import *; print([perturb('학교에서 친구를 만나기로 했다. 2장 샀다, The end.', k, .4, 7) for k in KINDS])"
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True).stdout
    assert out == str([perturb("학교에서 친구를 만나기로 했다. 2장 샀다, The end.", k, .4, 7) for k in KINDS]) + "\n"


def test_particles_stay_right():
    "The new form follows the final consonant; what is no particle stays."
    pairs = {"사람이 온다": "사람은 온다", "학교는 멀다": "학교가 멀다", "친구를 만났다": "친구는 만났다", "책을 샀다": "책은 샀다", "서울로 간다": "서울로는 간다", "부산으로 간다": "부산으로는 간다",
             "지하철로 간다": "지하철로는 간다", "친구와 갔다": "친구하고 갔다", "Python은 쉽다": "Python이 쉽다", "API는 쉽다": "API가 쉽다", "It is the apple of a tree": "It is an apple of the tree"}
    for before, after in pairs.items(): assert perturb(before, "particles", 1) == after
    for same in ("국가 예술가", "많이 같이 없이 높이", "먹는 하는 가는 있는", "있을 없을 같은 좋은", "새로 바로 서로 따로", "나는 내가 누가", "학교에는 집에서는"): assert perturb(same, "particles", 1) == same


@settings(max_examples=60, deadline=None)
@given(st.lists(hangul, min_size=3, max_size=20))
def test_particles_agree_with_the_final_sound(stems):
    "Whatever the stem, a swapped particle never contradicts the final consonant before it."
    text = " ".join(s + ("은" if (ord(s[-1]) - 0xAC00) % 28 else "는") for s in stems)
    for s, w in zip(stems, perturb(text, "particles", 1).split()):
        assert w in (s + "은", s + "이") if (ord(s[-1]) - 0xAC00) % 28 else w in (s + "는", s + "가")


def test_endings_go_both_ways():
    for a, b in (("연구했다.", "연구하였다."), ("완료됐으며", "완료되었으며"), ("위해", "위하여"), ("이용한다.", "이용합니다."), ("it is", "it's"), ("do not", "don't")):
        assert (perturb(a, "endings", 1), perturb(b, "endings", 1)) == (b, a)
    assert perturb("이해 오해 통해진 대해적", "endings", 1) == "이해 오해 통해진 대해적"


def test_augment_is_a_stream():
    "An endless input is no trouble; a copy that equals its text is left out."
    first = list(itertools.islice(augment(("같은 글 하나." for _ in itertools.count()), ["case", "spaces_all_dropped"], 1), 3))
    assert [(a.number, a.kind, a.text) for a in first] == [(i, "spaces_all_dropped", "같은글하나.") for i in range(3)]


def test_mistakes_are_told():
    with pytest.raises(UserError, match="choose one of"): perturb("글", "typo")
    with pytest.raises(UserError, match="between 0 and 1"): perturb("글", "nfd", 1.5)


@pytest.mark.parametrize("text", ["\ud83d 짝 없는 글자", "\U000e0fff\ue000", "가" * 3000, "\x00\x1b", "e\u0301 ㅎ ㅠㅠ", "ﷺ ½ ㎏"])
def test_odd_characters(text):
    for kind in KINDS: assert perturb(text, kind, .5).strip()


# --- draws

def test_a_draw_depends_on_the_texts_alone(tmp_path, texts):
    "The same documents from one part or many, in any order, with repeats, and from a stream."
    doubled = texts + texts[::3]
    shuffled = random.Random(5).sample(doubled, len(doubled))
    one, many = make_corpus(tmp_path/"one", doubled, 10_000), make_corpus(tmp_path/"many", shuffled, 97)
    drawn = sample_texts(one, 50, 20, seed=3)
    assert drawn == sample_texts(many, 50, 20, seed=3) == sample_texts(iter(shuffled), 50, 20, seed=3)
    assert len(set(drawn)) == 50 and all(len(t.split()) >= 20 for t in drawn)
    assert sample_texts(many, 20, 20, seed=3) == drawn[:20]
    assert sample_texts(many, 50, 20, seed=4) != drawn
    assert len(draw_documents(one, 10**6, 20)) == len({t for t in texts if len(t.split()) >= 20})
    assert sample_texts(one, 0) == sample_texts(iter([]), 5) == []


def test_long_documents_are_cut():
    text = sample_texts(["낱말 " * 100_000], 1)[0]
    assert A.CUT - 4 < len(text) <= A.CUT and text.endswith("낱말")


# --- planted recall

def test_similarity_is_the_true_one(texts):
    "Against Python sets of shingles."
    s, cleaner = resolve_bands(DedupSettings()), Cleaner()
    for rank, text in enumerate(texts[:24]):
        rows = plant(text, rank, s, cleaner)
        for r in rows:
            copy = cleaner.clean(perturb(text, *PLANTED[r.number]))[0]
            for pair, shingle in ((r.pair, "word5"), (r.char5, "char5")):
                a, b = set(token_ngrams(text, shingle)), set(token_ngrams(copy, shingle))
                assert pair.jaccard == pytest.approx(len(a & b) / len(a | b), abs=1e-12)
                assert pair.found == (pair.candidate and pair.jaccard >= .8)
                assert pair.candidate or pair.jaccard < 1


def test_planted_recall(tmp_path, texts):
    "The agreed shape; the same whatever the parts; predicted and measured agree; cheap."
    s = DedupSettings()
    corpus = make_corpus(tmp_path/"a", texts, 10_000)
    planted_recall(corpus, s, 5)
    start = time.process_time()
    r = planted_recall(corpus, s)
    assert time.process_time() - start < 5
    assert r == planted_recall(make_corpus(tmp_path/"b", texts[::-1], 50), s) == json.loads(json.dumps(r))
    assert list(r) == ["documents", "pairs", "bins", "kinds", "recall", "recall_interval", "predicted"]
    assert len(r["bins"]) == 20 and list(r["bins"][0]) == ["low", "high", "pairs", "candidate", "found"]
    assert r["documents"] == 300 and sum(b["pairs"] for b in r["bins"]) == r["pairs"] == sum(k["pairs"] for k in r["kinds"])
    assert sum(b["candidate"] for b in r["bins"]) == sum(k["candidate"] for k in r["kinds"])
    for row in r["kinds"]: assert row["found"] <= min(row["candidate"], row["above_threshold"]) <= row["pairs"] and list(row["char5"]) == ["mean_jaccard", "found"]
    low, high = r["recall_interval"]
    assert low <= r["recall"] <= high and abs(r["recall"] - r["predicted"]) < .02
    by = {k["kind"]: k for k in r["kinds"] if k["rate"] == 1}
    for kind in ("nfd", "full_width", "spaces_all_dropped"): assert by[kind]["char5"]["found"] == by[kind]["pairs"] > 0
    assert by["spaces_all_dropped"]["found"] == 0


def test_fewer_bands_find_less(tmp_path, texts):
    corpus = make_corpus(tmp_path, texts)
    rows = [planted_recall(corpus, DedupSettings(bands=b, rows=r), 100) for b, r in ((16, 8), (9, 13), (4, 32))]
    assert rows[0]["recall"] > rows[1]["recall"] > rows[2]["recall"]
    for r in rows: assert abs(r["recall"] - r["predicted"]) < .1


def test_other_settings(tmp_path, texts):
    "char5, bands by wanted recall, nothing to draw, morphemes."
    corpus = make_corpus(tmp_path, texts)
    r = planted_recall(corpus, DedupSettings(shingle="char5", bands=None, rows=None), 30)
    assert all(k["char5"] == {"mean_jaccard": k["mean_jaccard"], "found": k["found"]} for k in r["kinds"])
    r = planted_recall(make_corpus(tmp_path/"short", ["짧은 글 하나", "짧은 글 둘"]), DedupSettings())
    assert (r["documents"], r["pairs"], r["kinds"], r["recall"], r["recall_interval"], r["predicted"]) == (0, 0, [], None, None, None)
    assert planted_recall(corpus, DedupSettings(), 0)["pairs"] == 0
    pytest.importorskip("kiwipiepy")
    assert 0 < planted_recall(corpus, DedupSettings(shingle="morph5"), 3)["pairs"] <= 18


def test_wilson_covers():
    "In 95 of 100 draws the interval holds the true share."
    draw = np.random.RandomState(0).binomial(200, .97, 2000)
    inside = [low <= .97 <= high for low, high in (wilson(int(k), 200) for k in draw)]
    assert .93 < np.mean(inside) < .98


# --- strangers

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 500), st.integers(0, 5))
def test_random_pairs(n, pairs, seed):
    p = random_pairs(n, pairs, seed)
    assert len(p) == len(np.unique(p, axis=0)) == min(pairs, n * (n - 1) // 2)
    assert (p[:, 0] < p[:, 1]).all() and (not len(p) or 0 <= p.min() <= p.max() < n)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=30))
def test_collisions(rows):
    "Only pairs that share a band, and nobody who shares one is missed."
    keys = np.array(rows, np.uint64).reshape(-1, 3)
    found = {tuple(p) for p in collisions(keys).tolist()}
    true = {(a, b) for a, b in itertools.combinations(range(len(rows)), 2) if (keys[a] == keys[b]).any()}
    assert found <= true and {x for p in found for x in p} == {x for p in true for x in p}


def test_false_positive_rate(texts):
    "Copies are put aside; zero has a bound; few texts are no trouble."
    r = false_positive_rate(texts, "char5", pairs=3000, documents=200)
    assert r == false_positive_rate(iter(texts[::-1]), "char5", pairs=3000, documents=200)
    assert r["pairs"] + r["related"] == 3000 and sum(r["histogram"]) == r["pairs"]
    last = r["thresholds"][-1]
    assert last["above"] == 0 and last["upper"] == 3 / r["pairs"]
    copies = [f"{t} 끝{i}" for t in texts[:1] * 5 for i in range(3)]
    assert false_positive_rate(copies, "word5")["related"] == 3
    assert false_positive_rate([], "word5")["pairs"] == 0 == false_positive_rate(texts[:1], "char5")["pairs"]


def test_flagged_pairs_are_above_the_threshold(texts):
    copies = texts[:60] + [perturb(t, "spaces_all_dropped", 1) for t in texts[:60]]
    flagged = flagged_pairs(copies, "char5")
    assert all(f.jaccard >= .8 and f.a < f.b for f in flagged)
    assert {x for i in range(60) if copies[i] != copies[i + 60] for x in (i, i + 60)} <= {x for f in flagged for x in (f.a, f.b)}


# --- text that a model wrote

GOOD = ["인공지능은 사람의 판단을 돕는 기술이다. 병원에서는 사진을 읽고, 공장에서는 고장을 미리 알린다. 다만 잘못된 자료를 배우면 잘못된 답을 내놓는다.",
        "물의 끓는점은 압력에 따라 달라진다. 높은 산에서는 압력이 낮아 더 낮은 온도에서 끓는다. 그래서 밥이 설익기 쉽다.",
        "세 가지를 준비하면 됩니다.\n1. 여권과 사진\n2. 신청서 한 장\n3. 수수료"]


def faults(answer, prompt="주제를 설명하라.", others=GOOD, **kwargs):
    report = check_synthetic([{"instruction": "주제를 설명하라.", "output": t} for t in others] + [{"instruction": prompt, "output": answer}], **kwargs)
    return set(report.faults(len(others)))


def test_good_answers_pass():
    report = check_synthetic({"prompt": "설명하라", "response": t} for t in GOOD)
    assert report.good().tolist() == [0, 1, 2] and report.to_dict()["flagged"] == 0


@pytest.mark.parametrize("answer, prompt, fault", [
    ("", "주제를 설명하라.", "empty"), (GOOD[0] + " " + GOOD[0] + " " + GOOD[0], "", "repetition"), ("답은 이렇다. " + "아주 좋다. " * 20, "", "loop"), ("ㅋ" * 60, "", "loop"),
    (GOOD[0], "다음을 요약하라: " + GOOD[0], "copied_prompt"), ("I'm sorry, but as an AI language model I cannot help with that request.", "", "refusal"),
    ("죄송합니다만 해당 요청은 도와드릴 수 없습니다.", "", "refusal"), ("네, 알겠습니다! " + GOOD[1], "", "opening"), ("Sure! " + GOOD[1], "", "opening"),
    ("This answer is written in English for no reason whatsoever.", "수도를 설명하라", "language"), ("이 답은 아무 까닭 없이 한국어로 쓰여 있고 길이도 제법 된다.", "Explain the capital of France to me", "language"),
    ("人工知能는 人間의 判断을 돕는 技術로서 널리 쓰인다.", "기술을 설명하라", "language"), (GOOD[0] + " 그리고 마지막으로 살펴볼 것은 비용을", "", "truncated"),
    ("```python\nprint(1)\n", "", "truncated"), ("네", "", "too_short"), (GOOD[1] * 60, "", "too_long"), (GOOD[0].replace(" ", ""), "", None), (perturb(GOOD[1], "spaces_dropped", .2), "", "duplicate")])
def test_each_fault(answer, prompt, fault):
    found = faults(answer, prompt)
    assert fault in found if fault else not found & {"empty", "refusal", "language"}


def test_sources():
    "Copied from one, or the whole of one."
    source = " ".join(GOOD[:2])
    assert "source_duplicate" in faults(source, sources=[source], others=GOOD[2:]) and "copied_source" in faults(GOOD[0] + " 그 밖의 말.", sources=iter([source]), others=GOOD[2:])
    assert not faults(GOOD[2], sources=[source], others=GOOD[:0])


def test_asked_for_another_language():
    assert "language" not in faults("This is the English translation that was asked for.", "영어로 번역하라: 이것은 번역이다")
    assert "language" not in faults("def f(x):\n    return x + 1  # adds one to the value", "한 값을 더하는 파이썬 함수를 써라")


def test_fields_and_streams():
    "Own field names; a generator is read once; ids come back, numbers where there are none; odd values are no crash."
    s = SyntheticSettings(prompt=["q"], answer=["a"], examples=2)
    report = check_synthetic(({"q": "물어본다", "a": a, **extra} for a, extra in [("", {"id": "x"}), (None, {}), (7, {"id": 5}), (GOOD[0], {}), ("\ud83d", {})]), s=s)
    assert report.records == 5 and report.checks["empty"] | {"rule": ""} == {"count": 3, "share": .6, "rule": "", "examples": ["x", "1"]}
    assert json.loads(json.dumps(report.to_dict()))["records"] == 5
    assert check_synthetic([]).to_dict()["flagged"] == 0


def test_short_answers_may_coincide():
    report = check_synthetic([{"instruction": f"{i}번 문장의 감정은?", "output": "긍정" if i % 2 else "부정"} for i in range(50)])
    assert report.checks["duplicate"]["count"] == 0


def test_many_equal_answers_stay_linear():
    start = time.process_time()
    report = check_synthetic({"output": GOOD[0]} for _ in range(1500))
    assert report.checks["duplicate"]["count"] == 1499 and time.process_time() - start < 8


@settings(max_examples=40, deadline=None)
@given(st.lists(anything, max_size=4), anything)
def test_no_text_breaks_a_check(answers, prompt):
    report = check_synthetic([{"instruction": prompt, "output": a} for a in answers], sources=[prompt])
    assert report.records == len(answers)


def test_loops_and_lengths():
    assert loop_length("가나다라 " * 10) == 49 and loop_length("가나다라마바사") == 0 and loop_length("") == 0
    assert loop_length("다른 말. " + "끝 " * 30) == 60
    assert length_outliers(np.array([], int)).tolist() == [] and length_outliers(np.array([10, 10, 10, 19])).tolist() == [0] * 4


# --- real text

def test_char5_finds_every_variant_of_real_text(corpus):
    "NFD, full width and spacing, in all five domains."
    cleaner = Cleaner()
    for path in sorted((corpus/"small").glob("*.jsonl")):
        lines = (json.loads(line) for line in itertools.islice(path.open(encoding="utf-8"), 400))
        cleaned = [t[:4000] for t in (cleaner.clean(r["text"])[0] for r in lines) if cleaner.reject(t) is None]
        rows = copies_found(sample_texts(cleaned, 60), [("nfd", 1), ("full_width", 1), ("spaces_dropped", .1), ("spaces_all_dropped", 1), ("spaces_inserted", 1)], ["char5"])
        for r in rows: assert r["pairs"] > 20 and r["char5"]["found"] == r["pairs"], (path.name, r["kind"], r["char5"]["missed"][:1])


def test_jamo_with_and_without_spaces():
    "ㅎ and ㅠ are joined by NFKC when no space is between them, so spaces must go first."
    assert canonical("슬펐지만..ㅎ ㅠㅠ", "char5") == canonical("슬펐지만..ㅎㅠㅠ", "char5")
