"Phase 1, paragraphs and sentences: segmentation, exact join, Bloom filter, cutting."
from __future__ import annotations
import json, random, subprocess, sys, time
import numpy as np, pytest
from hypothesis import given, settings as hyp, strategies as st
from yunmin_efficientdata.core.executor import make_executor
from yunmin_efficientdata.core.settings import SpanSettings, UserError, load_settings
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup.prepare import FATES, Corpus, list_raw, load_array, normal_source, prepare, write_fate
from yunmin_efficientdata.dedup.spans import Bloom, cut, find_all, find_spans, group_spans, least_left, losers, paragraphs, sentence_rows, sentences

ON = "dedup.spans.levels=[paragraph,sentence]"


class Stage:
    "What the ledger gives a stage; dies after `die_at` marks."
    def __init__(self, parts=None, die_at=None): self.parts, self.die_at = parts or {}, die_at
    def done_part(self, name): return name in self.parts
    def mark_part(self, name, info=None):
        self.parts[name] = json.loads(json.dumps(info))
        if self.die_at is not None and len(self.parts) >= self.die_at: raise KeyboardInterrupt

class Ctx:
    def __init__(self, workspace, *overrides, workers=1):
        self.store, self.settings, self.executor = open_store(workspace), load_settings("configs/demo", list(overrides)), make_executor(workers=workers)

def prepared(workspace, records: list[dict], *overrides, files=1) -> Ctx:
    "A workspace after the stage prepare."
    ctx = Ctx(workspace, ON, "clean.review_samples=0", *overrides)
    for i in range(files): ctx.store.write(f"raw/web-{i}.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records[i::files]))
    prepare(ctx, Stage(), *list_raw(ctx.store, "raw/"), ["raw/"])
    return ctx

def span_files(store) -> dict[str, bytes]: return {k: store.read(k) for k in store.list("minhash_lsh/spans/")}

def documents(store) -> list[tuple[str, str, str, list]]: # domain, source, text, spans; in the order of the corpus
    corpus, out = Corpus(store), []
    for part, p in enumerate(corpus.parts):
        found, source = load_array(store, f"minhash_lsh/spans/{p['name']}.npy"), corpus.table(part, ["source"])["source"]
        assert found.dtype == np.int64 and found.ndim == 2
        assert (np.lexsort((found[:, 1], found[:, 0])) == np.arange(len(found))).all()
        for row, text in corpus.part_texts(part): out.append((p["domain"], source[row], text, [tuple(x[1:]) for x in found[found[:, 0] == row].tolist()]))
    return out


# ---- the same in plain Python

def collapse(text): return " ".join(text.split())

def units(text, s: SpanSettings) -> list[tuple]: # (level, start, end, key) of spans that are long enough
    "Spans of a text, from its pieces."
    rows, out = sentence_rows(text).tolist(), []
    for number in sorted({r[2] for r in rows}):
        own = [r for r in rows if r[2] == number]
        keys = [collapse(text[a:b]) for a, b, *_ in own]
        if "paragraph" in s.levels and len(collapse(text[own[0][0]:own[-1][1]])) >= s.min_paragraph_chars: out.append(("paragraph", own[0][0], own[-1][1], tuple(keys)))
        if "sentence" in s.levels: out += [("sentence", a, b, k) for (a, b, _, plain), k in zip(own, keys) if plain and len(k) >= s.min_sentence_chars]
    return out

def expected(docs: list[tuple[str, str, str]], s: SpanSettings, priority: list[str]) -> list[list[tuple[int, int]]]:
    "Removed characters of each document (domain, source, text), merged: a plain reading of the rules."
    rank = lambda d: min([priority.index(x) for x in d[:2] if x in priority], default=len(priority))
    order, first, removed = sorted(range(len(docs)), key=lambda i: (rank(docs[i]), i)), {}, [[] for _ in docs]
    for i in order:
        for level, a, b, key in sorted(units(docs[i][2], s), key=lambda u: u[1]):
            place = first.setdefault((level, key) if s.scope != "within" else (level, key, i), (i, a))
            if place != (i, a) and not (s.scope == "across" and place[0] == i): removed[i].append((a, b))
    out = []
    for (_, _, text), cuts in zip(docs, removed):
        merged = []
        for a, b in sorted(cuts):
            if merged and not text[merged[-1][1]:a].strip(): merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else: merged.append((a, b))
        out.append(merged)
    return out


# ---- segmentation

PIECES = ["가", "나다. ", "했다.", "요", "다. ", "?", "!", "…", "。", ".", "..", " ", "\n", "\n\n", "  ", "\"", "”", "(", ")", "3", "1.", "제1조", "Dr.", "A", "abc ", "U.S. ", "# ", "- ", "|", "```", "\n```\n", "\\", "\ud800", "😀", "\u3000", "\x00", "[1]", "*", "그리고 이 문장은 제법 길게 이어진다"]

@given(st.lists(st.sampled_from(PIECES), max_size=60))
@hyp(max_examples=400, deadline=None)
def test_pieces_cover_the_text(parts):
    text = "".join(parts)
    assert "".join(sentences(text)) == text == "".join(paragraphs(text))
    rows = sentence_rows(text)
    assert (rows[:, 0] < rows[:, 1]).all() and (rows[1:, 0] >= rows[:-1, 1]).all() and (np.diff(rows[:, 2]) >= 0).all()
    for (a, b, *_), next_ in zip(rows.tolist(), [*rows[1:, 0].tolist(), len(text)]):
        assert text[a:b] == text[a:b].strip() and not text[b:next_].strip()

@given(st.text(max_size=300))
@hyp(max_examples=200, deadline=None)
def test_pieces_cover_any_text(text): assert "".join(sentences(text)) == text == "".join(paragraphs(text))

@pytest.mark.parametrize("text, want", [
    ("그는 학교에 갔다. 그리고 돌아왔다.", ["그는 학교에 갔다. ", "그리고 돌아왔다."]),
    ("정말 그런가요? 네 그렇습니다! 알겠어요.", ["정말 그런가요? ", "네 그렇습니다! ", "알겠어요."]),
    ("재미있게 봤어요.그런데 끝이 아쉽다.다시 볼까?아니다", ["재미있게 봤어요.", "그런데 끝이 아쉽다.", "다시 볼까?", "아니다"]),
    ("원주율은 3.14이다. 버전은 2.0.1 입니다.", ["원주율은 3.14이다. ", "버전은 2.0.1 입니다."]),
    ("대법원 2019. 2. 20. 선고 2018나52206 판결을 보면 그렇다.", ["대법원 2019. 2. 20. 선고 2018나52206 판결을 보면 그렇다."]),
    ("제1조. 목적은 이 법이 정한다. 제2조. 뜻은 다음과 같다.", ["제1조. 목적은 이 법이 정한다. ", "제2조. 뜻은 다음과 같다."]),
    ("1. 가. 하나의 채권이다. 2. 나머지도 같다.", ["1. 가. 하나의 채권이다. ", "2. 나머지도 같다."]),
    ("판결의 \"증거가 없다.\"를 \"증거가 있다.\"로 고친다. 그대로 둔다.", ["판결의 \"증거가 없다.\"를 \"증거가 있다.\"로 고친다. ", "그대로 둔다."]),
    ("그가 말했다. \"나는 간다.\" 그리고 갔다.", ["그가 말했다. ", "\"나는 간다.\" ", "그리고 갔다."]),
    ("사실이다(다툼 없음). 그러므로 기각한다.", ["사실이다(다툼 없음). ", "그러므로 기각한다."]),
    ("Dr. Kim met J. Smith of Acme Inc. in Seoul. They left in 2019. It rained, e.g. on Monday.", ["Dr. Kim met J. Smith of Acme Inc. in Seoul. ", "They left in 2019. ", "It rained, e.g. on Monday."]),
    ("他来了。我走了！真的？好", ["他来了。", "我走了！", "真的？", "好"]),
    ("글쎄... 잘 모르겠다.. 아마도…", ["글쎄... ", "잘 모르겠다.. ", "아마도…"]),
    ("감사합니다. [이 글은 관리자가 고쳤습니다]", ["감사합니다. ", "[이 글은 관리자가 고쳤습니다]"]),
    ("이 줄은 충분히 길어서 여기까지 오면 저절로 바뀌지만 문장은\n아직 끝나지 않았다. 다음 문장.", ["이 줄은 충분히 길어서 여기까지 오면 저절로 바뀌지만 문장은\n아직 끝나지 않았다. ", "다음 문장."]),
    ("## 제목은 끝나지 않는 긴 줄이어도 다음 줄과 이어지지 않는다\n본문이다.", ["## 제목은 끝나지 않는 긴 줄이어도 다음 줄과 이어지지 않는다\n", "본문이다."]),
    ("목록의 첫째 줄이 서른 글자를 넘기면 그 다음은 어떻게 되는지\n  2\\. 둘째 줄", ["목록의 첫째 줄이 서른 글자를 넘기면 그 다음은 어떻게 되는지\n  ", "2\\. 둘째 줄"]),
    ("http://a.kr/b?c=1 주소와 file.txt 는 그대로다.", ["http://a.kr/b?c=1 주소와 file.txt 는 그대로다."]),
])
def test_sentences(text, want): assert sentences(text) == want

def test_paragraphs():
    text = "첫 줄은 문장으로 끝난다.\n둘째 줄도 그렇다.\n\n목록:\n- 하나\n- 둘\n\n```py\nx = 1.\n\ny = 2.\n```\n|표|줄|\n|1|2.|"
    assert paragraphs(text) == ["첫 줄은 문장으로 끝난다.\n", "둘째 줄도 그렇다.\n\n", "목록:\n- 하나\n- 둘\n\n", "```py\nx = 1.\n\ny = 2.\n```\n", "|표|줄|\n|1|2.|"]
    plain = [text[a:b] for a, b, _, plain in sentence_rows(text).tolist() if plain]
    assert plain == ["첫 줄은 문장으로 끝난다.", "둘째 줄도 그렇다."]  # code, table, list: not by themselves

def test_wrapping_does_not_matter():
    "The same paragraph with other line ends and spaces is the same paragraph; another word makes another."
    words = "이 문단은 폭이 다른 화면에서 옮겨 왔기 때문에 줄이 바뀌는 곳이 서로 다르지만 낱말은 하나도 다르지 않아서 같은 문단으로 여겨져야 한다.".split()
    texts = [" ".join(words), " ".join(words[:12]) + "\n" + "  ".join(words[12:]), " ".join([*words[:-1], "않는다."])]
    hashes, where = find_all(texts, np.array([20, 1 << 30]))
    assert where[:, 0].tolist() == [0, 1, 2] and (hashes[0] == hashes[1]).all() and (hashes[0] != hashes[2]).all()

@given(st.lists(st.text(st.sampled_from("가나 .\n"), max_size=20), min_size=1, max_size=30))
@hyp(max_examples=200, deadline=None)
def test_hashes_are_of_collapsed_text(texts):
    hashes, where = find_all(texts, np.array([1 << 30, 1]))
    keys = [collapse(texts[d][a:b]) for d, a, b, _, _ in where.tolist()]
    for h, k in zip(hashes.tolist(), keys):
        for g, j in zip(hashes.tolist(), keys): assert (h == g) == (k == j)

def test_without_numba_the_same(tmp_path):
    "The kernels as plain Python give the same spans and the same decisions of the filter."
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=40)).replace("\ud800", "") for _ in range(20)]
    code = """import json, sys; sys.modules["numba"] = None
import numpy as np
from yunmin_efficientdata.dedup.spans import Bloom, find_all, njit
assert njit is None
hashes, where = find_all(json.load(sys.stdin), np.array([20, 10]))
bloom = Bloom(50, 0.01)
print(json.dumps([hashes.tolist(), where.tolist(), bloom.look(hashes, insert=True).tolist(), bloom.words.tolist()]))"""
    out = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    hashes, where = find_all(texts, np.array([20, 10])); bloom = Bloom(50, 0.01)
    assert json.loads(out.stdout) == [hashes.tolist(), where.tolist(), bloom.look(hashes, insert=True).tolist(), bloom.words.tolist()] and len(hashes) > 10

def test_adversarial_text():
    "Long runs of anything take linear time, and no span is lost."
    n = 1_000_000
    for text in ("?" * n + "a", "…" * n, "." * n + "가", "```\n" + "\n" * n, "```\n```\n" * (n // 8), ". " * n, ".\"" * n + "a", "1" * n + ".", "a" * n + ". b", "\n" * n, "가" * n, "다.다." * (n // 4), "- \n" * (n // 3)):
        start = time.process_time()
        find_all([text], np.array([1, 1]))
        assert time.process_time() - start < 2, text[:9]
    assert find_all(["", " ", "\n"], np.array([1, 1]))[1].tolist() == []
    assert len(find_all(["나는 갔다. " * 10] * 1000, np.array([1, 1]))[0]) == 1000 * (10 + 1)


# ---- cutting

@given(st.lists(st.sampled_from(["가", "나다.", " ", "\n", "\n\n", "\n    ", "  ", "x", "\u3000"]), max_size=30), st.lists(st.integers(0, 60), max_size=8))
@hyp(max_examples=500, deadline=None)
def test_cut_keeps_everything_else(parts, points):
    text = "".join(parts)
    points = sorted({min(p, len(text)) for p in points}); points = points[:len(points) // 2 * 2]
    spans = np.array(points, np.int64).reshape(-1, 2)
    rest = cut(text, spans)
    pieces = [text[a:b] for a, b in zip([0, *points[1::2]], [*points[::2], len(text)])]
    assert rest.split() == [w for p in pieces for w in p.split()]  # nothing lost, nothing joined
    if len(spans):
        assert rest == rest.strip()
        assert "\n\n\n" not in rest or any("\n\n\n" in p for p in pieces)
    else: assert rest == text

def test_cut_white_space():
    def without(text, *words): return cut(text, np.array([(text.index(w), text.index(w) + len(w)) for w in words]))
    assert without("제목\n\n문단.\n\n- 하나\n    code", "문단.") == "제목\n\n- 하나\n    code"
    assert without("가.\n    나.\n    다.", "나.") == "가.\n    다."
    assert without("가.\n\n나.\n다.", "나.") == "가.\n\n다." and without("가.\n나.\n\n다.", "나.") == "가.\n\n다."
    assert without("가.\n\n나.\n\n다.\n\n라.", "나.", "다.") == "가.\n\n라."
    assert without("가.", "가.") == ""


# ---- groups and losers

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)), max_size=40), st.sampled_from(["both", "across", "within"]))
@hyp(max_examples=300, deadline=None)
def test_group_spans(items, scope):
    items = sorted(items, key=lambda x: x[1])  # (hash, document, -), in the order of the text
    ranks = {d: r for _, d, r in items}
    h = np.array([[x[0], 7] for x in items], np.uint64).reshape(-1, 2); row = np.array([x[1] for x in items], np.int64)
    leaders, group, goes = group_spans(h, np.array([ranks[x[1]] for x in items], np.uint64), row, scope)
    assert len(leaders) == len({x[0] for x in items})
    for i, (key, d, _) in enumerate(items):
        assert items[leaders[group[i]]][0] == key
        best = min(range(len(items)), key=lambda j: (items[j][0] != key, ranks[items[j][1]], items[j][1], j))
        assert leaders[group[i]] == best or scope == "within"
        want = {"both": i != best, "across": d != items[best][1], "within": any(items[j][0] == key and items[j][1] == d for j in range(i))}[scope]
        assert goes[i] == want

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 9)), max_size=40, unique_by=lambda x: (x[2], x[3])))
@hyp(max_examples=300, deadline=None)
def test_losers(items):
    rows = np.array([[a, b, r << 52 | p << 32 | a * 10 + b] for a, b, p, r in items], np.uint64).reshape(-1, 3)
    best = {}
    for row in rows.tolist(): best[tuple(row[:2])] = min(best.get(tuple(row[:2]), 1 << 64), row[2])
    want = sorted(row[2] & (1 << 52) - 1 for row in rows.tolist() if row[2] != best[tuple(row[:2])])
    assert losers(rows).tolist() == want


# ---- the whole stage

SENTENCES = [f"{a} {b} 그래서 {n}번째 문장은 여러 글에 나온다." for n, (a, b) in enumerate((a, b) for a in ("가을에는", "겨울에는", "봄날에는", "한여름에") for b in ("바람이 분다고", "사람이 온다고", "꽃이 핀다고", "비가 내린다고"))]

def random_records(seed: int, n=40) -> list[dict]:
    "Documents made of few sentences, in paragraphs, wrapped and joined in different ways."
    rng, out = random.Random(seed), []
    for i in range(n):
        blocks = [rng.choice([" ", " ", "\n", ""]).join(rng.sample(SENTENCES[:4 + i % 13], k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3: blocks.insert(rng.randrange(len(blocks) + 1), f"## 제목 {rng.randrange(3)}")
        out.append({"id": f"d{i}", "text": f"머리말 {i}입니다.\n\n" + rng.choice(["\n\n", "\n"]).join(blocks), "source": f"s{i % 4}", "domain": ("web", "news", "법령")[i % 3]})
    return out

def what_stands(docs, s) -> tuple[set, set, list]: # all pieces of text, those that are kept somewhere, spans that are kept
    "What is left of some documents (domain, source, text, spans)."
    every, kept, standing = set(), set(), []
    for _, _, text, cuts in docs:
        stays = lambda start, end: not any(a <= start and end <= b for a, b in cuts)
        for a, b, *_ in sentence_rows(text).tolist():
            every.add(piece := collapse(text[a:b]))
            if stays(a, b): kept.add(piece)
        standing += [u[0::3] for u in units(text, s) if stays(u[1], u[2])]
    return every, kept, standing

@pytest.mark.parametrize("seed, scope, levels, priority", [(0, "both", "paragraph,sentence", ""), (1, "both", "paragraph,sentence", "s2,news"), (2, "across", "paragraph,sentence", "법령"),
    (3, "within", "paragraph,sentence", ""), (4, "both", "sentence", "s3"), (5, "across", "paragraph", ""), (6, "within", "sentence", "s1"), (7, "both", "paragraph", "web")])
def test_equals_plain_reading(tmp_path, seed, scope, levels, priority):
    "Spans of all parts equal those of a few lines of Python; what is removed stands somewhere else, and what is kept stands once."
    ctx = prepared(tmp_path, random_records(seed), f"dedup.spans.levels=[{levels}]", f"dedup.spans.scope={scope}", f"dedup.source_priority=[{priority}]",
                   "dedup.spans.min_paragraph_chars=45", "dedup.spans.min_sentence_chars=25", "dedup.partitions=5")
    counts, s = find_spans(ctx, Stage()), ctx.settings.dedup.spans
    docs = documents(ctx.store)
    assert [d[3] for d in docs] == expected([d[:3] for d in docs], s, ctx.settings.dedup.source_priority)
    assert counts["documents"] == sum(bool(d[3]) for d in docs) > 0 and counts["characters"] == sum(b - a for d in docs for a, b in d[3])
    assert counts["seen"] == {"documents": 40, "characters": sum(len(d[2]) for d in docs)}
    assert counts["emptied"] == sum(len(cut(d[2], np.array(d[3]))) < 5 for d in docs if d[3])
    for level in ("paragraph", "sentence"): assert counts[level]["spans"] == sum(u[0] == level for d in docs for u in units(d[2], s))
    assert sum(c["characters"] for c in counts["domains"].values()) == counts["characters"]
    every, kept, standing = what_stands(docs, s)
    assert kept == every                                                           # no piece of text is lost
    if scope == "both": assert len(standing) == len(set(standing))                 # no span stays twice
    if levels != "paragraph,sentence": assert set(standing) == {u[0::3] for d in docs for u in units(d[2], s)}

def test_nothing_to_find(tmp_path):
    ctx = prepared(tmp_path, [{"id": "a", "text": "짧은 글 하나."}, {"id": "b", "text": "다른 글 하나."}])
    for method in ("exact", "bloom"):
        counts = find_spans(Ctx(tmp_path, ON, f"dedup.spans.method={method}"), Stage())
        assert counts["documents"] == counts["characters"] == counts["emptied"] == 0 and documents(ctx.store)[0][3] == []
    assert ctx.store.list("minhash_lsh/spill/") == []

def test_fates(tmp_path):
    "Documents that are gone neither lose spans nor keep them for others; those that an earlier run emptied take part again."
    texts = {i: f"글 {i} 의 머리말입니다.\n\n{SENTENCES[0]} {SENTENCES[1]}" for i in "abc"}
    ctx = prepared(tmp_path, [{"id": i, "text": t} for i, t in texts.items()])
    corpus = Corpus(ctx.store)
    for fate, lose in ((None, [1, 2]), ("near", [2]), ("emptied", [1, 2])):
        mask = np.zeros(3, np.uint8)
        if fate: mask[0] = FATES.index(fate)
        write_fate(corpus, 0, mask)
        find_spans(ctx, Stage())
        assert np.unique(load_array(ctx.store, "minhash_lsh/spans/web/part-00000.npy")[:, 0]).tolist() == lose

def test_least_left():
    "A document that may hold the first place of a span is never emptied."
    s = load_settings("configs/demo", [ON, "clean.min_chars=200"])
    assert least_left(s) == 40 and least_left(load_settings("configs/demo", ["clean.min_chars=200", "dedup.spans.levels=[paragraph]"])) == 60
    assert least_left(load_settings("configs/demo", [ON, "clean.min_chars=0"])) == 1

def test_same_bytes_whatever_runs_it(tmp_path):
    "1, 2 and 4 workers, other cuts of the input, another number of partitions: the same files and counts."
    records, results = random_records(9, 60), []
    for name, files, workers, partitions in (("a", 1, 1, 16), ("a", 1, 2, 16), ("a", 1, 4, 16), ("b", 5, 1, 1)):
        ctx = prepared(tmp_path/name, records, f"dedup.partitions={partitions}", "dedup.spans.min_sentence_chars=25", files=files) if workers == 1 else Ctx(tmp_path/name, ON, "dedup.spans.min_sentence_chars=25", f"dedup.partitions={partitions}", workers=workers)
        with ctx.executor: counts = find_spans(ctx, Stage())
        results.append((counts, span_files(ctx.store)))
    assert all(r == results[0] for r in results[1:]) and results[0][0]["documents"] > 10

@pytest.mark.parametrize("method", ["exact", "bloom"])
def test_killed_and_resumed(tmp_path, method):
    "Killed after any part, the next run goes on and ends with the same bytes."
    overrides = (f"dedup.spans.method={method}", "dedup.spans.min_sentence_chars=25", "dedup.partitions=2")
    ctx = prepared(tmp_path, random_records(3, 24), *overrides)
    whole = Stage(); counts = find_spans(ctx, whole); want = span_files(ctx.store)
    for die_at in range(1, len(whole.parts)):
        ctx.store.delete_prefix("minhash_lsh/spans")
        stage = Stage(die_at=die_at)
        with pytest.raises(KeyboardInterrupt): find_spans(ctx, stage)
        assert find_spans(ctx, Stage(stage.parts)) == counts and span_files(ctx.store) == want

def test_bloom_misses_nothing(tmp_path):
    "The filter takes every repeat for one, and some new spans too: at the rate that is stated."
    rng = random.Random(1)
    words = [a + b for a in "가나다라마바사아자차" for b in "물불산강꽃별달해밤낮"]
    records = [{"id": f"d{i}", "text": "\n".join(" ".join(rng.choices(words, k=12)) + "다." for _ in range(15)), "domain": f"p{i % 7}"} for i in range(1400)]
    for r in records[::10]: r["text"] = records[0]["text"].split("\n")[1] + "\n" + r["text"]
    ctx = prepared(tmp_path, records, "dedup.spans.levels=[sentence]", "dedup.spans.min_sentence_chars=20", "dedup.source_priority=[p3,p1]")
    exact = find_spans(ctx, Stage()); true = [set(d[3]) for d in documents(ctx.store)]
    assert "bloom" not in exact and exact["sentence"]["removed"] == 140
    loose = Ctx(tmp_path, "dedup.spans.levels=[sentence]", "dedup.spans.min_sentence_chars=20", "dedup.source_priority=[p3,p1]", "dedup.spans.method=bloom", "dedup.spans.false_positive_rate=0.05")
    counts = find_spans(loose, Stage()); b = counts["bloom"]
    covered = lambda s, cuts: any(a <= s[0] and s[1] <= e for a, e in cuts)
    assert all(covered(s, d[3]) for d, spans in zip(documents(ctx.store), true) for s in spans)
    false = counts["sentence"]["removed"] - 140
    assert b["false"] == false and b["new"] == 1400 * 15  # the sample is everything here
    assert abs(b["measured"] - b["predicted"]) < 5 * (b["predicted"] / b["new"])**0.5 and false > 0
    assert abs(b["measured_full"] - b["predicted_full"]) < 0.1 * b["predicted_full"] and 0.04 < b["predicted_full"] <= 0.051
    strict = Ctx(tmp_path, "dedup.spans.levels=[sentence]", "dedup.spans.min_sentence_chars=20", "dedup.source_priority=[p3,p1]", "dedup.spans.method=bloom")
    assert find_spans(strict, Stage())["sentence"] == exact["sentence"]

def test_footer_of_all_documents(tmp_path):
    "A footer in 20,000 documents costs the join one row a part."
    footer = "이 글의 저작권은 누리집에 있으며 허락 없이 옮기거나 고쳐 쓸 수 없음을 알려 드립니다."
    ctx = prepared(tmp_path, [{"id": f"d{i}", "text": f"글 {i} 번입니다.\n\n{footer}", "domain": f"p{i % 3}"} for i in range(20_000)])
    stage = Stage(); counts = find_spans(ctx, stage)
    assert counts["documents"] == 19_999 and sum(p["distinct"] for k, p in stage.parts.items() if k.startswith("spans-find")) == 3
    assert sum(p["lost"] for k, p in stage.parts.items() if k.startswith("spans-join")) == 2

def test_too_many_sources(tmp_path):
    ctx = prepared(tmp_path, [{"id": "a", "text": SENTENCES[0]}], f"dedup.source_priority=[{','.join(f's{i}' for i in range(4001))}]")
    with pytest.raises(UserError, match="at most 4,000"): find_spans(ctx, Stage())

def test_on_s3(s3, tmp_path):
    "The same files on S3, where hashes are read by range."
    records = random_records(5, 24)
    local, remote = (prepared(w, records, "dedup.spans.min_sentence_chars=25", "dedup.partitions=3") for w in (tmp_path, s3.uri))
    assert find_spans(local, Stage()) == find_spans(remote, Stage()) and span_files(local.store) == span_files(remote.store)

def test_real_text(corpus, tmp_path):
    "On real text: no span is lost, none stays twice, the pieces cover every text."
    ctx = Ctx(tmp_path, ON, "clean.review_samples=0")
    source = normal_source(ctx.store, str(corpus/"small"))
    prepare(ctx, Stage(), *list_raw(ctx.store, source), [source])
    counts, docs, s = find_spans(ctx, Stage()), documents(ctx.store), ctx.settings.dedup.spans
    for d in docs: assert "".join(sentences(d[2])) == d[2]
    every, kept, standing = what_stands(docs, s)
    assert kept == every and len(standing) == len(set(standing)) and counts["documents"] > 10
