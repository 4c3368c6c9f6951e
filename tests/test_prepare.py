"Prepare: the same bytes however files are cut, nothing lost, flat memory, numbered documents."
from __future__ import annotations
import gzip, hashlib, json, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, orjson, pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st
from yunmin_efficientdata.core.executor import make_executor
from yunmin_efficientdata.core.ledger import Meter, Stage
from yunmin_efficientdata.core.records import BadLine, Document, Span, dump_line, make_id, parse_line, read_jsonl, validate
from yunmin_efficientdata.core.sample import bad_lines
from yunmin_efficientdata.core.settings import CleanSettings, UserError, load_settings
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import prepare as P
from yunmin_efficientdata.dedup.clean import Cleaner
from yunmin_efficientdata.dedup.prepare import Corpus, FATES, load_fate, number_ids, write_fate

SMALL = ("dedup.part_bytes=65536",)

class Ctx:
    "What prepare needs of a phase."
    def __init__(self, store, workers=1, overrides=SMALL): self.store, self.settings, self.executor, self.lines = store, load_settings("configs/demo", list(overrides)), make_executor(workers=workers), []
    def log(self, text): self.lines.append(text)

def prep(ws, raw, workers=1, overrides=SMALL) -> dict:
    "Prepare with a stage that is recorded on disk, as in a phase."
    store = open_store(ws); ctx = Ctx(store, workers, overrides)
    source = P.normal_source(store, str(raw))
    files, ignored = P.list_raw(store, source)
    with Meter() as meter, ctx.executor: return P.prepare(ctx, Stage(store, "dedup.prepare", "0", meter), files, ignored, [source])

def output(ws, quarantine=True) -> dict[str, bytes]:
    store = open_store(ws)
    skip = ("manifest.json",) if quarantine else ("manifest.json", "quarantine/")
    return {k: store.read(k) for p in ("dedup_ready/", "minhash_lsh/") for k in store.list(p) if not any(s in k for s in skip)}

def manifest(ws) -> dict: return json.loads(open_store(ws).read("dedup_ready/manifest.json"))

def records(ws) -> list[dict]:
    store = open_store(ws)
    return [json.loads(line) for k in store.list("dedup_ready/") if "/part-" in k for line in store.read(k).splitlines()]

def write_raw(folder: Path, lines: list[bytes], cuts=(), name="web", end=b"\n"):
    folder.mkdir(parents=True)
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(lines)])): (folder/f"{name}-{i}.jsonl").write_bytes(b"".join(line + end for line in lines[a:b]))

WORDS = [a + b for a in "가나다라마바사아자차카타파하" for b in "물불산강꽃별달해밤낮길집"]

def corpus_lines(n=240, seed=0) -> list[bytes]:
    "Documents with exact copies, ids of all kinds and repeats of them, two domains, some bad lines."
    rng, out = random.Random(seed), []
    for i in range(n):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 90)))
        if i % 5 == 4: text = out[rng.randrange(len(out))]["text"]
        record = {"text": text, "source": f"s{i % 3}", "date": f"2024-01-{i % 28 + 1:02}", "domain": "web" if i % 4 else "뉴스", "제목": [i]}
        if i % 3: record["id"] = (i, "같은 번호", "같은 번호#2", i % 7, 10**25 + i % 3, None, " ", {"a": 1}, 0.5, "x#1")[i % 10]
        out.append(record)
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in out]
    for i, bad in enumerate((b"{", b'{"text": ""}', b"[1]", b'{"text": 5}', b"", b'{"text": "\\ud800"}', b"\xff")): lines.insert(i * 17, bad)
    return lines

# ---- reading in chunks

@given(st.lists(st.one_of(st.sampled_from([b"", b" ", b"{}", b'{"text":"a"}', b"x", b"\r", b"\xef\xbb\xbf{}", b'{"t":"' + b"z" * 50 + b'"}']), st.binary(max_size=12)), max_size=12),
       st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.lists(st.integers(0, 300), max_size=5))
@hyp(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spans_share_the_lines(tmp_path, lines, end, last, cuts):
    data = end.join(lines) + (end if last else b"")
    store = open_store(tmp_path); store.write("a.jsonl", data)
    whole, got, before = list(read_jsonl(store, "a.jsonl", 40)), [], 0
    edges = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    for span in (Span(a, b) for a, b in zip(edges, edges[1:])):
        got += [BadLine(x.line_no + before, *x[1:]) if isinstance(x, BadLine) else (x[0] + before, x[1]) for x in read_jsonl(store, "a.jsonl", 40, span)]
        before += span.lines
    assert got == whole

def test_any_cut_gives_the_same_bytes(tmp_path, monkeypatch):
    "Files, chunks, spills, batches, windows, workers: none of them shows in the output."
    lines = corpus_lines(); rng = random.Random(2)
    shuffled = rng.sample(lines, len(lines))
    write_raw(tmp_path/"a", lines); write_raw(tmp_path/"b", shuffled, [10, 11, 100], end=b"\r\n"); write_raw(tmp_path/"c", lines, [120], "part"); (tmp_path/"c").rename(tmp_path/"web")
    (tmp_path/"z").mkdir(); (tmp_path/"z/web.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    prep(tmp_path/"1", tmp_path/"a")
    want, counts = output(tmp_path/"1"), manifest(tmp_path/"1")
    assert any(k.startswith("dedup_ready/뉴스/") for k in want) and counts["repeated_ids"] > 10 and counts["total"]["quarantined"]
    variants = [("b", 1, {}), ("web", 2, {}), ("z", 1, {}), ("a", 1, {"CHUNK_BYTES": 3000}), ("b", 1, {"SPILL_BYTES": 5000, "ROW_BYTES": 50}), ("a", 1, {"SPILL_BYTES": 4000, "WINDOW_BYTES": 3000, "BATCH_CHARS": 100, "CHUNK_BYTES": 20_000}), ("a", 1, {"njit": None})]
    for n, (raw, workers, changes) in enumerate(variants):
        with monkeypatch.context() as m:
            for k, v in changes.items(): m.setattr(P, k, v)
            prep(tmp_path/f"w{n}", tmp_path/raw, workers)
        got, same_files = output(tmp_path/f"w{n}"), raw == "a"
        if not same_files: got, expected = output(tmp_path/f"w{n}", False), {k: v for k, v in want.items() if "quarantine/" not in k}
        else: expected = want
        assert got == expected, (raw, changes)
        other = manifest(tmp_path/f"w{n}")
        assert {k: other[k] for k in ("total", "domains", "repeated_ids", "parts")} == {k: counts[k] for k in ("total", "domains", "repeated_ids", "parts")}

def test_chunks_keep_line_numbers(tmp_path, monkeypatch):
    lines = [x for b, _ in bad_lines(60, limit=20_000) for x in (b, b'{"text": "\xea\xb8\x80\xea\xb8\x80\xea\xb8\x80\xea\xb8\x80\xea\xb8\x80"}')]
    write_raw(tmp_path/"a", lines)
    want = None
    for size in (1 << 30, 30_000, 777):
        monkeypatch.setattr(P, "CHUNK_BYTES", size)
        prep(tmp_path/str(size), tmp_path/"a", overrides=["clean.max_line_bytes=20000"])
        got = {k: v for k, v in output(tmp_path/str(size)).items() if "quarantine" in k}
        want = want or got
        assert got == want and len(got) == 1
    rows = [json.loads(x) for v in want.values() for x in v.splitlines()]
    assert [r["line"] for r in rows] == list(range(1, 120, 2)) and len({r["reason"] for r in rows}) == 10
    total = manifest(tmp_path/"777")["total"]
    assert total["read"] == 120 == total["kept"] + sum(total["filtered"].values()) + sum(total["quarantined"].values())

def test_s3_in_chunks(tmp_path, monkeypatch):
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    for k, v in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1", "YUNMIN_SCRATCH": str(tmp_path/"scratch")}.items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    lines = corpus_lines(120); write_raw(tmp_path/"a", lines)
    prep(tmp_path/"local", tmp_path/"a")
    monkeypatch.setattr(P, "CHUNK_BYTES", 9000)
    with moto.mock_aws():
        client = boto3.client("s3"); client.create_bucket(Bucket="corpus-2")
        client.put_object(Bucket="corpus-2", Key="crawl/web-0.jsonl", Body=(tmp_path/"a/web-0.jsonl").read_bytes())
        prep("s3://corpus-2/ws", "s3://corpus-2/crawl")
        assert output("s3://corpus-2/ws") == output(tmp_path/"local")
        far, near = Corpus("s3://corpus-2/ws"), Corpus(tmp_path/"local")
        for docs in (np.array([0]), np.array([1, 5, len(near) - 1]), np.arange(len(near))): assert list(far.texts(docs)) == list(near.texts(docs))
        monkeypatch.setattr(P, "GAP_S3", 0)
        assert list(far.texts(np.arange(0, len(near), 2))) == list(near.texts(np.arange(0, len(near), 2)))
        write_fate(far, 0, np.full(far.parts[0]["docs"], 2, np.uint8)); assert load_fate(far, 0).sum() == 2 * far.parts[0]["docs"]

def plain_reading(lines: list[bytes], domain: str) -> dict[str, list[dict]]:
    "What prepare should write, by domain, the slow and obvious way."
    cleaner, docs = Cleaner(CleanSettings()), []
    for line in lines:
        record = parse_line(line.strip(b" \t\r\n"))[0] if line.strip() else None
        if record is None or validate(record): continue
        doc = Document.from_record(record, domain=domain)
        doc.text, doc.domain = cleaner.clean(record["text"])[0], P.safe_domain(doc.domain)
        doc.id = doc.id if doc.id.strip() else make_id(doc.domain, doc.text)
        if cleaner.reject(doc.text) is None: docs.append((P.id_hash(P.base_id(doc.id)), P.base_id(doc.id), doc.id, hashlib.blake2b(dump_line(doc.to_dict()), digest_size=16).digest(), doc.to_dict()))
    docs.sort(key=lambda d: d[:4])
    for d, new in zip(docs, _quadratic([d[2] for d in docs])): d[4]["id"] = new
    return {name: [d[4] for d in docs if d[4]["domain"] == name] for name in sorted({d[4]["domain"] for d in docs})}

def test_against_a_plain_reading(tmp_path):
    lines = corpus_lines(); write_raw(tmp_path/"a", lines, [50])
    prep(tmp_path/"w", tmp_path/"a")
    got = {d: [json.loads(x) for k in open_store(tmp_path/"w").list(f"dedup_ready/{d}/") for x in (tmp_path/"w"/k).read_bytes().splitlines()] for d in ("web", "뉴스")}
    assert got == plain_reading(lines, "web")

def test_real_text_against_a_plain_reading(tmp_path, corpus):
    lines = (corpus/"small/web.jsonl").read_bytes().split(b"\n")
    write_raw(tmp_path/"a", lines, [100]); prep(tmp_path/"w", tmp_path/"a")
    assert {d: [r for r in records(tmp_path/"w") if r["domain"] == d] for d in {r["domain"] for r in records(tmp_path/"w")}} == plain_reading(lines, "web")

# ---- killed runs

@pytest.mark.parametrize("name, after", [("prepare_file", 0), ("prepare_file", 2), ("join_quarantine", 0), ("prepare_range", 0), ("prepare_range", 1), ("publish", 0)])
def test_kill_and_resume(tmp_path, monkeypatch, name, after):
    "kill -9 between tasks; the next run does only what is left and ends with the same bytes."
    write_raw(tmp_path/"a", corpus_lines(300), [100]); monkeypatch.setattr(P, "CHUNK_BYTES", 20_000)
    prep(tmp_path/"whole", tmp_path/"a")
    original, calls = getattr(P, name), []
    def counted(*args):
        calls.append(1)
        return original(*args)
    def dies(*args):
        if len(calls) >= after: os.kill(os.getpid(), signal.SIGKILL)
        return counted(*args)
    child = os.fork()
    if not child:
        try: setattr(P, name, dies); prep(tmp_path/"w", tmp_path/"a")
        finally: os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    done = len(open_store(tmp_path/"w").list("ledger/parts/"))
    monkeypatch.setattr(P, name, counted)
    prep(tmp_path/"w", tmp_path/"a")
    assert output(tmp_path/"w") == output(tmp_path/"whole")
    total = len(open_store(tmp_path/"w").list("ledger/parts/"))
    assert total == len(open_store(tmp_path/"whole").list("ledger/parts/"))
    assert (done == after if name == "prepare_file" else done > after) and len(calls) == {"publish": 1}.get(name, sum(1 for k in ledger_names(tmp_path/"w") if k.startswith({"prepare_file": "file/", "join_quarantine": "quarantine/", "prepare_range": "range/"}.get(name, "-"))) - after)

def ledger_names(ws) -> list[str]:
    store = open_store(ws)
    return [orjson.loads(store.read(k))["part"] for k in store.list("ledger/parts/")]

# ---- worst cases

def test_records_of_all_kinds(tmp_path):
    good = "충분히 긴 글입니다 하나 둘 셋"
    odd = [{"id": 2**64 - 1}, {"id": -2**63}, {"id": 10**300}, {"id": True}, {"id": [1, [2]]}, {"id": {"x": None}}, {"id": 1.5e300}, {"id": "i" * 100_000}, {"id": "한글 #3"}, {"id": "a\u0000b"},
           {"n": 2**64}, {"n": -10**30}, {"n": 1e308}, {"domain": 5}, {"domain": "../../x"}, {"source": {"a": 1}}, {"date": 20240101}, {"url": None, "license": ""}, {"lang": ["ko"]}, {"\u200b": "\u2028"}, {"deep": "[" * 200}]
    lines = [json.dumps({"text": f"{good} {i}"} | r).encode() for i, r in enumerate(odd)]
    lines += [f'{{"text": "{good}", "d": {"[" * d}{"]" * d}}}'.encode() for d in (100, 127)]
    lines += [json.dumps({"text": f"{good} \U0002ebef \u0378 \U000e0fff \ue000 {c}"}, ensure_ascii=False).encode() for c in "\ufdd0\uffff\U0001fffe"]
    lines += [b'{"id": "d", "id": "e", "text": "' + good.encode() + b'"}']
    bad = [f'{{"text": "{good}", "d": {"[" * d}{"]" * d}}}'.encode() for d in (128, 1200, 100_000)]
    bad += [b'{"text": "' + good.encode() + b'", "text": "' + good.encode() + b' \xeb\x91\x98"}'] # which of the two is meant
    bad += [f'{{"text": "{good}", "x": {x}}}'.encode() for x in ("NaN", "Infinity", "-Infinity", "1e999x", "01", str(10**400), '"\\ud800"')] + [b'{"text": "\\udc00 \\ud800"}', b'{"text": "a\\u0000b"}', b'{"text": "' + good.encode() + b'", "x": "\xed\xa0\x80"}']
    write_raw(tmp_path/"a", [*lines, *bad])
    prep(tmp_path/"w", tmp_path/"a")
    total, rows = manifest(tmp_path/"w")["total"], records(tmp_path/"w")
    assert total["kept"] == len(lines) == len(rows) == len({r["id"] for r in rows}) and sum(total["quarantined"].values()) == len(bad)
    assert all(type(r[k]) is str for r in rows for k in ("id", "text", "source", "domain", "lang", "date")) and any(r["id"] == str(10**300) for r in rows)
    corpus = Corpus(tmp_path/"w")
    assert sorted(corpus.texts(np.arange(len(corpus)))) == sorted(r["text"] for r in rows)
    assert corpus.gather_table(np.arange(len(corpus)), ["id"])["id"].to_pylist() == [i for p in range(len(corpus.parts)) for i in corpus.table(p, ["id"])["id"]]

def test_everything_has_one_id(tmp_path, monkeypatch):
    "All at one place: linear time, windows, and parts of the usual size."
    lines = [json.dumps({"id": "None", "text": f"서로 다른 글 {i} 번입니다" if i % 2 else "같은 글이 여기 있습니다", "domain": "web" if i % 3 else "b"}, ensure_ascii=False).encode() for i in range(6000)]
    write_raw(tmp_path/"a", lines); write_raw(tmp_path/"b", lines[::-1], [100, 3000])
    monkeypatch.setattr(P, "SPILL_BYTES", 500_000); monkeypatch.setattr(P, "WINDOW_BYTES", 200_000)
    start = time.process_time(); prep(tmp_path/"1", tmp_path/"a"); assert time.process_time() - start < 8
    prep(tmp_path/"2", tmp_path/"b")
    assert output(tmp_path/"1") == output(tmp_path/"2")
    parts = Corpus(tmp_path/"1").parts
    assert len(parts) > 20 and max(p["bytes"] for p in parts) < 2 * 65536 and [p["name"] for p in parts] == sorted(p["name"] for p in parts)
    assert {r["id"] for r in records(tmp_path/"1")} == {"None"} | {f"None#{n}" for n in range(2, 6001)} and manifest(tmp_path/"1")["repeated_ids"] == 5999

def _quadratic(ids):
    reserved, used, out = set(ids), set(), []
    for own in ids:
        new, n = own, 1
        while new in used or n > 1 and new in reserved: n += 1; new = f"{P.base_id(own)}#{n}"
        used.add(new); out.append(new)
    return out

@given(st.lists(st.sampled_from(["a", "a#1", "a#2", "a#3", "a#2#2", "b", "b#10", "#1", ""]), max_size=12))
def test_numbering(ids):
    new, repeated = number_ids(ids, [True] * len(ids))
    assert len(set(new)) == len(new) and all(b == a or not b in ids for a, b in zip(ids, new)) and repeated == sum(a != b for a, b in zip(ids, new))
    if not any(P.base_id(i) != i and P.base_id(P.base_id(i)) != P.base_id(i) for i in ids): assert new == _quadratic(ids)

def test_one_huge_document(tmp_path):
    text = ("가나다 라마바사 아자차카 " * 6 + "\n") * 60_000
    write_raw(tmp_path/"a", [json.dumps({"text": t, "id": i}, ensure_ascii=False).encode() for i, t in enumerate([text, "짧은 글입니다 하나", "짧은 글입니다 둘"])])
    start = time.process_time(); prep(tmp_path/"w", tmp_path/"a", overrides=["clean.rules={duplicate_lines: false}", *SMALL]); assert time.process_time() - start < 15
    assert {len(r["text"]) > 10**6 for r in records(tmp_path/"w")} == {True, False} or manifest(tmp_path/"w")["total"]["filtered"]

def test_memory_is_flat(tmp_path):
    "Ten times the comments of three words: the same memory."
    code = """
import sys; sys.path.insert(0, sys.argv[2])
import test_prepare as T
from pathlib import Path
T.P.SPILL_BYTES, T.P.BATCH_CHARS, root = 2 << 20, 1 << 17, Path(sys.argv[1])
for n in (2000, 7000, 70_000):
    (root/f"r{n}").mkdir()
    with open(root/f"r{n}/web.jsonl", "w") as f:
        for i in range(n): f.write('{"text": "정말 좋은 글 %d", "id": %d}\\n' % (i, i))
    T.prep(root/f"w{n}", root/f"r{n}", overrides=["dedup.part_bytes=2000000"])
    print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10)"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent).stdout
    warm, once, ten = map(int, out.split())
    assert ten - once < 15 and ten - warm < 60, out

# ---- texts

@given(st.lists(st.text(st.one_of(st.sampled_from(" \n\t\x1c\x85\xa0\u1680\u2009\u200b\u2028\u202f\u205f\u3000\u3001가ㅋéa😀\U0010ffff"), st.characters(codec="utf-8", exclude_characters="\0")), max_size=40), max_size=5))
@hyp(max_examples=300, deadline=None)
def test_measure(texts):
    words, size, hashes = P.measure(texts)
    assert words.tolist() == [len(t.split()) for t in texts] and size.tolist() == [len(t.encode()) for t in texts] and hashes.tolist() == [P.text_hash(t) for t in texts]
    assert hashes.tolist() == P.measure([" ".join(t.split()) for t in texts])[2].tolist()
    assert len(set(hashes.tolist())) == len({" ".join(t.split()) for t in texts})

@given(st.text("가나 ", max_size=12), st.text("가나 ", max_size=12), st.integers(0, 9000))
@hyp(deadline=None)
def test_first_difference(x, y, n):
    a, b = "가" * n + x, "가" * n + y
    assert P.first_difference(a, b) == next((i for i, (p, q) in enumerate(zip(a, b)) if p != q), min(len(a), len(b)))

# ---- documents by number

@pytest.fixture(scope="module")
def ws(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_raw(folder/"a", corpus_lines(400)); prep(folder/"w", folder/"a")
    return folder/"w"

@given(st.data())
@hyp(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gather(ws, data):
    corpus = Corpus(ws); assert len(corpus.parts) > 3
    docs = data.draw(st.lists(st.integers(0, len(corpus) - 1), max_size=20))
    got = corpus.gather_table(np.array(docs, np.int64), ["source", "words", "id", "hash"])
    assert got.column_names == ["source", "words", "id", "hash"] and len(got) == len(docs)
    tables = [corpus.table(p, ["source", "words", "id", "hash"]) for p in range(len(corpus.parts))]
    where = [(p, r) for p, n in enumerate(np.diff(corpus.starts)) for r in range(n)]
    assert got.to_pylist() == [{c: tables[p][c][r] for c in got.column_names} for p, r in (where[d] for d in docs)]
    rows = [json.loads(line) for p in corpus.parts for line in (Path(ws)/f"dedup_ready/{p['name']}.jsonl").read_bytes().splitlines()]
    some = np.array(sorted(set(docs)), np.int64)
    assert list(corpus.texts(some)) == [rows[d]["text"] for d in some] and corpus.gather(some, ["id"])["id"] == [rows[d]["id"] for d in some]

def test_what_was_read_over_is_not_kept(ws, monkeypatch):
    "On S3 a read goes over the lines between two wanted ones; only the wanted ones stay in memory."
    corpus = Corpus(ws); docs = np.arange(0, sum(p["docs"] for p in corpus.parts), 7); near = corpus.gather_lines(docs)
    monkeypatch.setattr(P, "GAP_LOCAL", 1 << 30); far = Corpus(ws).gather_lines(docs)
    assert [far.data[i:j].tobytes() for i, j in zip(far.starts, far.ends)] == [near.data[i:j].tobytes() for i, j in zip(near.starts, near.ends)]
    assert len(far.data) == (far.ends - far.starts).sum()


def test_part_texts_and_cache(ws, monkeypatch):
    corpus = Corpus(ws)
    rows = [json.loads(line)["text"] for line in (Path(ws)/f"dedup_ready/{corpus.parts[1]['name']}.jsonl").read_bytes().splitlines()]
    for read, gap in ((4 << 20, 8192), (1, 0), (3000, 10)):
        monkeypatch.setattr(P, "READ_BYTES", read); monkeypatch.setattr(P, "GAP_LOCAL", gap)
        assert list(corpus.part_texts(1)) == list(enumerate(rows))
        assert list(corpus.part_texts(1, np.array([0, 3, 4, len(rows) - 1]))) == [(i, rows[i]) for i in (0, 3, 4, len(rows) - 1)]
    monkeypatch.setattr(P, "CACHE_BYTES", 3000)
    for p in range(len(corpus.parts)): corpus.table(p, ["words", "bytes", "hash"])
    assert corpus._cached == sum(v.nbytes for v in corpus._cache.values()) <= 3000 and not corpus.columns(0, ["words"])["words"].flags.writeable
    assert list(corpus.part_texts(0, np.zeros(0, np.int64))) == [] and list(corpus.texts(np.zeros(0, np.int64))) == [] and len(corpus.gather_table(np.zeros(0, np.int64), ["id"])) == 0

def test_index_agrees_with_lines(ws):
    corpus = Corpus(ws)
    for p, part in enumerate(corpus.parts):
        data, t = (Path(ws)/f"dedup_ready/{part['name']}.jsonl").read_bytes(), corpus.table(p, list(P.INDEX))
        assert part["docs"] == len(t["id"]) and part["bytes"] == len(data)
        for i in range(part["docs"]):
            r = json.loads(data[t["offset"][i]:t["offset"][i] + t["length"][i]])
            assert (r["id"], r["source"], r["date"], len(r["text"].split()), len(r["text"].encode()), P.text_hash(r["text"])) == tuple(t[c][i] for c in ("id", "source", "date", "words", "bytes", "hash"))

def test_fate(ws):
    corpus = Corpus(ws); n = corpus.parts[0]["docs"]
    assert load_fate(corpus, 0).tolist() == [0] * n and FATES[0] == "kept"
    fate = np.arange(n, dtype=np.uint8) % len(FATES)
    assert write_fate(corpus, 0, fate) == f"minhash_lsh/fate/{corpus.parts[0]['name']}.npy" and (load_fate(corpus, 0) == fate).all()
    for wrong in (fate[1:], fate + len(FATES)):
        with pytest.raises(ValueError): write_fate(corpus, 0, wrong)
    corpus.store.write(f"minhash_lsh/fate/{corpus.parts[0]['name']}.npy", corpus.store.read(f"minhash_lsh/fate/{corpus.parts[0]['name']}.npy")[:-1] + b"")
    with pytest.raises((RuntimeError, ValueError)): load_fate(corpus, 0)
    corpus.store.delete_prefix("minhash_lsh/fate")

# ---- the user's mistakes, and names

def test_domains_and_names(tmp_path):
    texts = [{"text": "충분히 긴 글입니다 하나", "domain": d} for d in ("../evil/x", "quarantine", 7)] + [{"text": "도메인 없는 글입니다"}]
    (tmp_path/"a/2024").mkdir(parents=True); (tmp_path/"a/notes.md").write_text("x")
    (tmp_path/"a/2024/법령-1.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(t).encode() for t in texts)))
    prep(tmp_path/"w", tmp_path/"a")
    assert {p["domain"] for p in Corpus(tmp_path/"w").parts} == {"evil_x", "quarantine_", "7", "법령"} and manifest(tmp_path/"w")["ignored"] == ["notes.md"]
    write_raw(tmp_path/"many", [json.dumps({"text": "충분히 긴 글입니다", "domain": f"d{i}"}).encode() for i in range(51)], [25])
    with pytest.raises(UserError, match="clean.max_domains"): prep(tmp_path/"w2", tmp_path/"many")

def test_progress_is_logged(tmp_path):
    write_raw(tmp_path/"a", corpus_lines(30)); store = open_store(tmp_path/"w"); ctx = Ctx(store)
    files, ignored = P.list_raw(store, str(tmp_path/"a"))
    with Meter() as meter: P.prepare(ctx, Stage(store, "dedup.prepare", "0", meter), files, ignored, ["x"])
    assert len(ctx.lines) >= 1 and "30 documents kept" in ctx.lines[0]
