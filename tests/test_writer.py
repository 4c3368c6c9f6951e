"Phase 2, writer and driver: schema, nulls, layout, readers, held-out split, any cut of the work, kills, bounded memory."
import importlib.util, json, os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path
import duckdb, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, xxhash
from hypothesis import HealthCheck, example, given, settings as hypothesis_settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from yunmin_efficientdata.core.context import open_phase
from yunmin_efficientdata.core.records import read_jsonl
from yunmin_efficientdata.core.settings import FormatSettings, HeldoutSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.format import parquet as P
from yunmin_efficientdata.format.pages import TokenFile, metadata_hash
from yunmin_efficientdata.format.tokenizer import Encoder, as_pretrained, load_tokenizer, train_bpe

SENTENCES = ["대한민국의 수도는 서울이다.", "오늘 날씨가 맑고 기온은 20도이다.", "법원은 피고인의 항소를 기각하였다.", "영화가 정말 재미있었다 ㅋㅋ", "함수는 값을 돌려준다: return x"]
SMALL_FILES = FormatSettings(page_bytes=4096, row_group_rows=64)
quick = hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def write(path, records, rows, settings=SMALL_FILES, metadata=None):
    with P.FileWriter(path, settings, metadata or {}) as w:
        for record, tokens in zip(records, rows): w.add(record, tokens)
    P.verify_file(path, w)
    return w

@pytest.fixture(scope="module")
def encode(): return Encoder(as_pretrained(train_bpe(SENTENCES * 9, 400)))

@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "One file, the records and the tokens that went into it."
    rng = np.random.default_rng(0)
    records = [{"id": f"d{i}", "text": f"문서 {i} 😀\n" * (i % 9), "source": ["위키", None, "news"][i % 3], "lang": "ko", "domain": "web", "date": 20200101 + i if i % 2 else None} for i in range(300)]
    rows = [np.append(rng.integers(1, 5000, n), 0).astype(np.int32) for n in rng.integers(0, 400, 300)]
    path = tmp_path_factory.mktemp("file")/"web.parquet"
    write(path, records, rows, metadata={"yunmin.tokenizer": "abc", "yunmin.vocab_size": "5000", "yunmin.eos_id": "0"})
    return path, records, rows

# -- what every reader sees ---------------------------------------------------

def by_pyarrow(path, tmp): return pq.read_table(path).to_pylist()
def by_duckdb(path, tmp):
    with duckdb.connect() as con: return con.sql(f"SELECT * FROM '{path}'").arrow().read_all().to_pylist()
def by_pandas(path, tmp): return [{**r, "tokens": r["tokens"].tolist()} for r in pd.read_parquet(path).to_dict("records")]
def by_datasets(path, tmp):
    import datasets
    return list(datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp)))
def by_datasets_stream(path, tmp):
    import datasets
    return list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp)))
def by_polars(path, tmp):
    import polars
    return polars.read_parquet(path).to_dicts()
READERS = [by_pyarrow, by_duckdb, by_pandas, by_datasets, by_datasets_stream] + ([by_polars] if importlib.util.find_spec("polars") else [])

@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_rows(file, reader, tmp_path):
    path, records, rows = file
    got = reader(path, tmp_path)
    assert list(got[0]) == list(P.COLUMNS)
    for g, record, tokens in zip(got, records, rows, strict=True):
        assert list(g["tokens"]) == tokens.tolist() and all(g[c] == P.as_text(record.get(c)) for c in P.TEXT_COLUMNS)

def test_layout_is_the_promised_one(file):
    path, records, rows = file
    meta = pq.read_metadata(path)
    assert all(not f.nullable for f in pq.read_schema(path)) and not pq.read_schema(path).field("tokens").type.value_field.nullable
    for g in range(meta.num_row_groups):
        assert meta.row_group(g).num_rows <= 64
        for c in (meta.row_group(g).column(i) for i in range(meta.num_columns)):
            assert c.has_offset_index and c.has_column_index and not (c.statistics and c.statistics.null_count)
            if c.path_in_schema.startswith("tokens"): assert c.compression == "UNCOMPRESSED" and set(c.encodings) <= {"PLAIN", "RLE"} and c.dictionary_page_offset is None
            else: assert c.compression == "ZSTD"
    known = {k.decode(): v.decode() for k, v in meta.metadata.items()}
    assert known.pop("yunmin.metadata_hash") == metadata_hash(known) and known.pop("yunmin.token_hash") == xxhash.xxh3_64_hexdigest(np.concatenate(rows).astype("<i4").tobytes())
    assert known == {"yunmin.tokenizer": "abc", "yunmin.vocab_size": "5000", "yunmin.eos_id": "0", "yunmin.rows": "300", "yunmin.tokens": str(sum(map(len, rows)))}
    pages = TokenFile(path)
    assert pages.way == "pages" and np.array_equal(pages.pages.rows.sum(), 300) and (np.asarray(pages.pages.crc) >= 0).all() and 4 * pages.pages.count.max() < 3 * 4096

def test_changed_metadata_are_refused(file, tmp_path):
    "Every byte of the yunmin.* entries, by both ways of reading; and tokens that are other ones with their checksums right."
    path, _, rows = file; whole = path.read_bytes()
    def said(f): return {k: f.metadata.get(k) for k in ("yunmin.eos_id", "yunmin.tokenizer", "yunmin.vocab_size", "yunmin.rows", "yunmin.tokens", "yunmin.token_hash")}
    low, high = (f(whole.index(k, whole.index(b"yunmin.tokenizer") - 1) for k in (b"yunmin.tokenizer", b"yunmin.vocab_size", b"yunmin.eos_id", b"yunmin.rows", b"yunmin.tokens", b"yunmin.token_hash", b"yunmin.metadata_hash")) for f in (min, max))
    for at in range(low, high + 40):
        data = bytearray(whole); data[at] ^= 1 << at % 8; (tmp_path/"m.parquet").write_bytes(data)
        try: changed = said(TokenFile(tmp_path/"m.parquet"))
        except UserError: continue
        assert changed == said(TokenFile(path)), at # only the name of the hash itself may change
    swapped = P.FileWriter(tmp_path/"s.parquet", FormatSettings(), {})
    swapped.hashes["tokens"].values.update(b"other")
    with swapped as w: w.add({"id": "1", "text": "가"}, np.array([5, 0], np.int32))
    assert len(TokenFile(tmp_path/"s.parquet")) == 2
    with pytest.raises(UserError, match="token_hash"): TokenFile(tmp_path/"s.parquet", check=True)

def test_page_size_is_honoured(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 5000, n).astype(np.int32) for n in rng.integers(1, 300, 2000)]
    write(tmp_path/"p.parquet", [{"id": str(i), "text": "가"} for i in range(2000)], rows, FormatSettings(page_bytes=16384))
    count = TokenFile(tmp_path/"p.parquet").pages.count
    assert len(count) > 50 and 4 * count.max() < 2 * 16384

def test_empty_file_and_one_token_documents(tmp_path):
    w = write(tmp_path/"none.parquet", [], [])
    assert (w.n_rows, w.n_tokens) == (0, 0) and pq.read_table(tmp_path/"none.parquet").schema.names == list(P.COLUMNS)
    w = write(tmp_path/"one.parquet", [{"id": str(i), "text": ""} for i in range(500)], [np.zeros(1, np.int32)] * 500)
    assert (w.n_rows, w.n_tokens) == (500, 500)

any_json = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
                        lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", max_size=2), v, max_size=3), max_leaves=5)

@given(st.lists(st.fixed_dictionaries({"id": st.text("abc", min_size=1), "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=40)}, optional={c: any_json for c in ("source", "lang", "domain", "date", "other")}), max_size=9), st.integers(1, 5))
@quick
def test_any_record_becomes_a_row_without_nulls(records, group):
    with tempfile.TemporaryDirectory() as d:
        write(Path(d, "x.parquet"), records, [np.array([1, 2, 0], np.int32)] * len(records), FormatSettings(row_group_rows=group))
        table = pq.read_table(Path(d, "x.parquet"))
        assert table.schema.remove_metadata() == P.SCHEMA and not any(c.null_count for c in table.columns)
        for record, row in zip(records, table.to_pylist(), strict=True):
            for c in P.TEXT_COLUMNS:
                value = record.get(c)
                assert row[c] == ("" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))

def test_reading_back_finds_every_difference(file, tmp_path):
    path, records, rows = file
    w = write(tmp_path/"good.parquet", records, rows)
    for change in (lambda r, t: (r[1:], t[1:]), lambda r, t: ([{**r[0], "text": "다른 글"}, *r[1:]], t), lambda r, t: ([{**x, "lang": "en"} for x in r], t), lambda r, t: (r, [t[0] + 1, *t[1:]]),
                   lambda r, t: (r, [np.concatenate(t[:2]), t[2][:0], *t[2:]]), lambda r, t: ([{**r[0], "id": r[0]["id"] + r[1]["id"]}, {**r[1], "id": ""}, *r[2:]], t), lambda r, t: (r[::-1], t)):
        write(tmp_path/"other.parquet", *change(records, rows))
        with pytest.raises(RuntimeError, match="reading back"): P.verify_file(tmp_path/"other.parquet", w)

def test_flipped_bytes_never_pass(file, tmp_path):
    path, records, rows = file
    w, rng = write(tmp_path/"good.parquet", records, rows), np.random.default_rng(0)
    whole, truth, passed = (tmp_path/"good.parquet").read_bytes(), pq.read_table(tmp_path/"good.parquet"), 0
    for at in rng.integers(0, len(whole), 150):
        data = bytearray(whole); data[at] ^= int(rng.integers(1, 256)); (tmp_path/"bad.parquet").write_bytes(data)
        try: P.verify_file(tmp_path/"bad.parquet", w)
        except Exception: continue
        passed += 1
        assert pq.read_table(tmp_path/"bad.parquet").equals(truth), f"byte {at} changed the data without a word"
    assert passed < 75

# -- tokens of long documents -------------------------------------------------

words = st.sampled_from(["가나다", "서울은", "abc", "x1", "2020", "ㅋㅋ", "😀", "—", "def f(x):", "é", "漢字", "\u1112\u1161\u11ab", "<|endoftext|>"])
blanks = st.sampled_from([" ", "\n", "  ", "\n\n", "\t", "\r\n", " \n ", ""])
texts = st.lists(st.tuples(words, blanks), max_size=150).map(lambda pairs: "".join(w + b for w, b in pairs))

@pytest.fixture
def short_pieces(monkeypatch):
    for name, value in dict(LONG=64, PIECE=20, AROUND=12).items(): monkeypatch.setattr(P, name, value)

@given(texts)
@quick
def test_pieces_give_the_tokens_of_the_whole(short_pieces, encode, text):
    assert np.array_equal(P.encode_rows(encode, ["앞", text, "뒤"])[1], encode([text])[0])

def test_long_documents_are_cut(short_pieces, encode):
    assert len(P.cut_points(encode, " ".join(SENTENCES * 20))) > 20
    assert P.cut_points(encode, "가" * 500) == [0] and P.cut_points(encode, "") == [0]

def test_a_tokenizer_that_marks_the_beginning_is_not_cut(short_pieces):
    t = Tokenizer(models.WordLevel({"<unk>": 0, "▁가": 1, "▁나": 2, "가": 3, "▁": 4}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    class Plain:
        def __call__(self, texts): return [np.array(e.ids + [9], np.int32) for e in t.encode_batch(texts)]
    text = "가 나 " * 60
    assert np.array_equal(P.encode_rows(Plain(), [text])[0], Plain()([text])[0])

# -- held-out rule ----------------------------------------------------------------

def test_minimum_and_clusters():
    names = [f"d{i}" for i in range(1494)]
    def splits(ids, **k):
        rule = P.choose_heldout({"x": np.array([P.cluster_hash(i) for i in ids], np.uint64)}, {}, HeldoutSettings(**k))
        return [rule.split("x", i) for i in ids]
    for n, low in ((1494, 20), (60, 20), (61, 20)):
        got = splits(names[:n]); assert got.count("validation") >= low and got.count("test") >= low and got.count("training") >= n - 2 * max(low, int(.04 * n))
    assert splits(names[:59]).count("training") > 50
    assert splits(["a"] * 80).count("training") in (0, 80)  # one cluster never straddles
    big = [f"x{i}" for i in range(30000)]; assert 500 < splits(big).count("test") < 700

@given(st.lists(st.integers(0, 400) | st.integers(0, 2**64 - 1), max_size=300), st.integers(1, 9), st.sampled_from([0, .02, .3]), st.sampled_from([0, .02, .4]), st.integers(0, 30), st.integers(1, 60))
@quick
def test_the_smallest_hashes_decide_as_all_do(values, parts, validation, test, minimum, least):
    settings = HeldoutSettings(validation=validation, test=test, minimum=minimum, minimum_from=least)
    hashes = np.array(values, np.uint64)
    few = np.zeros(0, np.uint64)
    for part in np.array_split(hashes, parts): few = P.smallest(np.concatenate([few, P.smallest(part, settings)]), settings)
    rules = P.choose_heldout({"x": hashes}, {}, settings), P.choose_heldout({"x": few}, {}, settings, {"x": len(hashes)})
    a, b = (r.codes("x", hashes).tolist() for r in rules)
    assert a == b

def test_straddling_clusters_move_to_the_held_out_side():
    met = {"a": np.array([5, 7, 9], np.uint64), "b": np.array([7, 8], np.uint64), "c": np.array([7, 9], np.uint64)}
    assert P.shared_clusters(met) == {7: {"a", "b", "c"}, 9: {"a", "c"}}
    same = P.choose_heldout({d: np.arange(100, dtype=np.uint64) for d in "ab"}, {h: {"a", "b"} for h in (5, 25, 90)}, HeldoutSettings(validation=1e-18, test=1e-18, minimum=20))
    assert same.moved == {} and same.codes("a", np.array([5, 25, 90], np.uint64)).tolist() == [1, 2, 0]
    moved = P.choose_heldout({"a": np.arange(100, dtype=np.uint64), "b": np.arange(0, 2000, 10, dtype=np.uint64)}, {395: {"a", "b"}, 25: {"a", "b"}}, HeldoutSettings(validation=1e-18, test=1e-18, minimum=20))
    assert moved.moved == {25: "validation"} and P.Heldout.from_json(moved.to_json()) == moved

# -- any cut of the work ----------------------------------------------------------

def documents_in(folder, n, seed=0, **more):
    rng = np.random.default_rng(seed)
    return [{"id": f"{seed}-{i}", "text": " ".join(SENTENCES[k] for k in rng.integers(0, 5, rng.integers(1, 12))) + f" {i}", "source": None, "date": 2020, "extra": [1], **more} for i in range(n)]

def put(folder, domain, records, part=0, ending=""):
    path = Path(folder)/"deduped"/domain/f"part-{part:05d}.jsonl"; path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) + ending, encoding="utf-8")
    return path

@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(20, 5000))
@quick
def test_pieces_of_any_size_give_the_same_documents(lengths, size):
    with tempfile.TemporaryDirectory() as d:
        put(d, "web", [{"id": str(i), "text": "가" * n} for i, n in enumerate(lengths)])
        store = open_store(d); keys = P.domain_keys(store)["web"]
        assert list(P.documents(store, P.pieces(store, keys, size), "web")) == list(P.documents(store, keys, "web"))

def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path):
    records = [{"id": str(i), "text": "가" * (i % 50)} for i in range(200)]
    path = put(tmp_path, "web", records); lines = path.read_text().splitlines(); lines[150] = '{"id": 3}'; path.write_text("\n".join(lines) + "\n")
    store = open_store(tmp_path)
    for size in (100, 999, 5000, 10**6):
        with pytest.raises(UserError, match="part-00000.jsonl, line 151: no text"): list(P.documents(store, P.pieces(store, ["deduped/web/part-00000.jsonl"], size), "web"))

@given(st.lists(st.lists(st.integers(0, 60), max_size=9), min_size=1, max_size=6), st.integers(1, 9))
@quick
@example([[0], [0, 0]], 3)
def test_every_document_goes_into_exactly_one_file(lengths, of):
    "Whatever the sizes, files cut the sequence of documents into consecutive ranges."
    counts = [sum(part) for part in lengths]
    plan = P.plan_files(counts, of)
    class Rule:
        def codes(self, domain, docs): return np.zeros(len(docs), int)
    splitter = Rule(); found = []
    with tempfile.TemporaryDirectory() as d:
        for i, part in enumerate(lengths): put(d, "web", [{"id": f"{i}-{k}", "text": "x" * n} for k, n in enumerate(part)], i)
        splitter.store = open_store(d); keys = P.domain_keys(splitter.store)["web"]; before = np.cumsum([0, *counts]).tolist()
        for k, wanted in enumerate(plan):
            task = P.FileTask(d, "web", k, of, tuple(((keys[i], 0, None), before[i]) for i in wanted), sum(counts), SMALL_FILES, {})
            found += [doc["id"] for _, doc in P.task_documents(task, splitter)]
    assert found == [f"{i}-{k}" for i, part in enumerate(lengths) for k in range(len(part))]

# -- the stages -----------------------------------------------------------------------

FAST = ["tokenizer.vocab_size=400", "format.file_bytes=131072", "format.row_group_rows=100"]

def stages(workspace, overrides=FAST, workers=1):
    "The stages up to the Parquet files, without benchmark and profile."
    from yunmin_efficientdata.format.phase import write_stages
    with open_phase("format", str(workspace), overrides=overrides, workers=workers) as ctx: return write_stages(ctx, P.domain_keys(ctx.store))

def data_files(ws):
    return {p.relative_to(ws).as_posix(): p.read_bytes() for f in ("parquet_ready", "tokenizer") for p in sorted((Path(ws)/f).rglob("*")) if p.is_file()}

@pytest.fixture(scope="module")
def corpus_of_three(tmp_path_factory):
    d = tmp_path_factory.mktemp("three")
    for part in range(3): put(d, "web", documents_in(d, 700, part), part)
    put(d, "social", documents_in(d, 90, 7)); put(d, "gone", [])
    return d

@pytest.fixture(scope="module")
def done(corpus_of_three, tmp_path_factory):
    ws = tmp_path_factory.mktemp("done"); shutil.copytree(corpus_of_three/"deduped", ws/"deduped")
    return ws, stages(ws)

def test_contract_of_the_files(done, corpus_of_three):
    ws, summary = done
    manifest = json.loads((ws/"parquet_ready/manifest.json").read_text())
    assert manifest["domains"]["gone"] == {"files": [], "rows": 0, "tokens": 0, "bytes": 0}
    web = manifest["domains"]["web"]
    assert len(web["files"]) > 3 and web["files"] == [f"parquet_ready/web-{k:05d}-of-{len(web['files']):05d}.parquet" for k in range(len(web["files"]))]
    sizes = [(ws/f).stat().st_size for f in web["files"]]
    assert web["bytes"] == sum(sizes) and .5 * 131072 < np.mean(sizes) < 1.5 * 131072 and max(sizes) < 1.6 * min(sizes)
    tokenizer, order = load_tokenizer(str(ws/"tokenizer")), []
    for f in web["files"]:
        table, meta = pq.read_table(ws/f), pq.read_metadata(ws/f).metadata
        assert int(meta[b"yunmin.rows"]) == table.num_rows and int(meta[b"yunmin.tokens"]) == sum(map(len, table["tokens"].to_pylist())) and meta[b"yunmin.split"] == b"training"
        assert meta[b"yunmin.tokenizer"].decode() == manifest["tokenizer"]["hash"] and int(meta[b"yunmin.vocab_size"]) == manifest["tokenizer"]["vocab_size"] == len(tokenizer)
        order += table["id"].to_pylist()
    every = [d["id"] for part in range(3) for d in documents_in(None, 700, part)]
    held = [i for s in ("validation", "test") for i in pq.read_table(ws/f"parquet_ready/heldout/{s}/web.parquet")["id"].to_pylist()]
    assert sorted(order + held) == sorted(every) and order == [i for i in every if i not in set(held)] and len(held) >= 40
    row = pq.read_table(ws/web["files"][0]).to_pylist()[0]
    assert tokenizer.decode(row["tokens"][:-1]) == row["text"] and row["tokens"][-1] == manifest["tokenizer"]["eos_id"] and (row["date"], row["source"], row["domain"]) == ("2020", "", "web")
    assert not list(ws.rglob("*spill*")) and not list(ws.rglob("*sample*")) and "No nulls" in (ws/"parquet_ready/schema.txt").read_text()

@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_change_no_byte(done, corpus_of_three, tmp_path, monkeypatch, workers):
    from yunmin_efficientdata.format import phase
    monkeypatch.setattr(phase, "SMALL", 0)
    shutil.copytree(corpus_of_three/"deduped", tmp_path/"deduped")
    stages(tmp_path, workers=workers)
    assert data_files(tmp_path) == data_files(done[0])

def test_cuts_change_no_byte(done, corpus_of_three, tmp_path, monkeypatch):
    from yunmin_efficientdata.format import phase
    shutil.copytree(corpus_of_three/"deduped", tmp_path/"deduped")
    monkeypatch.setattr(phase, "pieces", lambda store, keys: P.pieces(store, keys, 20_000))
    monkeypatch.setattr(P, "batches", lambda docs, size=0, rows=0, real=P.batches: real(docs, 3000, 17))
    stages(tmp_path)
    ours, before = data_files(tmp_path), data_files(done[0])
    assert ours == before

KILL = """
import os, signal, sys
from yunmin_efficientdata.core import ledger
from yunmin_efficientdata.format import parquet as P
sys.path.insert(0, sys.argv[1])
from test_writer import stages
count, where = 0, sys.argv[3]
def dying(f, at):
    def g(*a, **k):
        global count
        count += 1
        if count == at: os.kill(os.getpid(), signal.SIGKILL)
        return f(*a, **k)
    return g
if where == "mark": ledger.Stage.mark_part = dying(ledger.Stage.mark_part, 3)
else: P.verify_file = dying(P.verify_file, 4)
stages(sys.argv[2])
"""

@pytest.mark.parametrize("where", ["verify", pytest.param("mark", marks=pytest.mark.slow)])
def test_killed_run_goes_on_to_the_same_bytes(done, corpus_of_three, tmp_path, where):
    shutil.copytree(corpus_of_three/"deduped", tmp_path/"deduped")
    result = subprocess.run([sys.executable, "-c", KILL, str(Path(__file__).parent), str(tmp_path), where], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    parts = list((tmp_path/"ledger/parts/format.parquet").iterdir())
    assert len(parts) == (2 if where == "mark" else 3)
    kept = {p: p.stat().st_mtime_ns for p in sorted((tmp_path/"parquet_ready").glob("*.parquet"))[:len(parts)]}
    stages(tmp_path)
    assert data_files(tmp_path) == data_files(done[0]) and all(p.stat().st_mtime_ns == t for p, t in kept.items())

def test_other_settings_leave_no_stale_file(done, corpus_of_three, tmp_path):
    shutil.copytree(done[0], tmp_path/"ws")
    (tmp_path/"ws"/P.SPILLS/"web").mkdir(parents=True); (tmp_path/"ws"/P.SPILLS/"web/00009.jsonl").write_text('{"split": 1, "id": "stale", "text": "x"}\n')
    other = tmp_path/"ws/parquet_ready/instructions/a.parquet"; other.parent.mkdir(); other.write_bytes(b"another stage's")
    stages(tmp_path/"ws", [*FAST, "format.file_bytes=209715200"])
    assert other.exists()
    assert sorted(p.name for p in (tmp_path/"ws/parquet_ready").glob("*.parquet")) == ["social.parquet", "web.parquet"]
    files = [f for e in json.loads((done[0]/"parquet_ready/manifest.json").read_text())["domains"].values() for f in e["files"]]
    assert pa.concat_tables([pq.read_table(done[0]/f) for f in files]).sort_by("id").equals(pa.concat_tables([pq.read_table(tmp_path/f"ws/parquet_ready/{d}.parquet") for d in ("social", "web")]).sort_by("id"))
    assert "stale" not in pq.read_table(tmp_path/"ws/parquet_ready/heldout/validation/web.parquet")["id"].to_pylist()

def test_s3_workspace_gives_the_same_bytes(done, corpus_of_three, s3):
    store = open_store(s3.uri)
    for p in sorted((corpus_of_three/"deduped").rglob("*.jsonl")): store.write(p.relative_to(corpus_of_three).as_posix(), p.read_bytes())
    stages(s3.uri)
    assert {k: store.read(k) for k in store.list("parquet_ready/")} == {k: v for k, v in data_files(done[0]).items() if k.startswith("parquet_ready/")}

def test_near_duplicates_never_straddle(tmp_path):
    put(tmp_path, "web", documents_in(None, 120, 1)); put(tmp_path, "social", documents_in(None, 70, 2))
    rows = [(f"1-{i}", f"c{i // 4}", True, f"1-{i}", "near") for i in range(100)] + [(f"2-{i}", f"c{i}", True, f"2-{i}", "near") for i in range(25)] + [("gone", "c0", False, "1-0", "exact")]
    folder = tmp_path/"minhash_lsh/clusters"; folder.mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(("id", "cluster", "keep", "keeper", "reason"), map(list, zip(*rows))))), folder/"part-00000.parquet")
    summary = stages(tmp_path)
    split_of, cluster_of = {}, {r[0]: r[1] for r in rows}
    for p in sorted((tmp_path/"parquet_ready").rglob("*.parquet")):
        for i in pq.read_table(p, columns=["id"])["id"].to_pylist(): split_of.setdefault(cluster_of.get(i, i), set()).add(p.parent.name)
    assert all(len(s) == 1 for s in split_of.values()) and {"validation", "test", "parquet_ready"} == set().union(*split_of.values())
    assert summary["split"]["with_duplicates"] == 125

def test_domain_with_only_heldout_documents(tmp_path):
    ids = [i for i in range(4000) if P.cluster_hash(f"tiny-{i}") < 2**64 * 0.02][:2]
    put(tmp_path, "web", documents_in(None, 100)); put(tmp_path, "tiny", [{"id": f"tiny-{i}", "text": "작은 도메인의 문서"} for i in ids])
    stages(tmp_path)
    manifest = json.loads((tmp_path/"parquet_ready/manifest.json").read_text())
    assert manifest["domains"]["tiny"]["files"] == [] and manifest["heldout"]["validation"]["tiny"]["rows"] == 2

def test_users_mistakes_are_one_line(tmp_path):
    def message(ws, *overrides):
        with pytest.raises(UserError) as e: stages(ws, [*FAST, *overrides])
        assert "\n" not in str(e.value); return str(e.value)
    assert "yunmin dedup" in message(tmp_path/"nothing")
    put(tmp_path/"empty", "web", []); assert "yunmin dedup" in message(tmp_path/"empty")
    put(tmp_path/"tok", "web", documents_in(None, 5)); assert "no such folder" in message(tmp_path/"tok", "tokenizer.path=/no/such")
    put(tmp_path/"bad", "web", documents_in(None, 5), ending="{oops\n"); assert "part-00000.jsonl, line 6" in message(tmp_path/"bad")

# -- real text, memory ---------------------------------------------------------------

def test_real_text_comes_back(corpus, encode, tmp_path):
    keys = [p.name for p in sorted((corpus/"small").glob("*.jsonl"))]
    counts = P.convert(corpus/"small", keys, tmp_path/"small.parquet", encode, SMALL_FILES), P.convert(corpus/"small", keys, tmp_path/"plain.parquet")
    texts = [json.loads(line)["text"] for k in keys for line in open(corpus/"small"/k, encoding="utf-8")]
    table = pq.read_table(tmp_path/"small.parquet")
    assert counts[0]["rows"] == counts[1]["rows"] == len(texts) and table["text"].to_pylist() == texts
    assert table.drop_columns("tokens").equals(pq.read_table(tmp_path/"plain.parquet"))
    for i in range(0, len(texts), 97): assert np.array_equal(table["tokens"][i].as_py(), encode([texts[i]])[0])

MEMORY = """
import json, sys, numpy as np, resource
from pathlib import Path
from yunmin_efficientdata.core.ledger import peak_rss_mb
from yunmin_efficientdata.core.settings import FormatSettings
from yunmin_efficientdata.format import parquet as P
folder, n, length, tokenize = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
words = "대한민국의 수도는 서울이다 오늘 날씨가 맑고 기온은 영상이다 법원은 피고인의 항소를 기각하였다 영화가 정말 재미있었다".split()
rng = np.random.default_rng(0)
with open(f"{folder}/x.jsonl", "w") as f:
    for i in range(n):
        text = " ".join([words[k] for k in rng.integers(0, len(words), max(1, length // 11))])
        f.write(json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\\n")
del text
class Fake:
    def __call__(self, texts): return [np.frombuffer(t.encode("utf-16-le"), "<u2").astype(np.int32) for t in texts]
encode = Fake()
if tokenize == "real":
    from yunmin_efficientdata.format.tokenizer import Encoder, load_tokenizer
    encode = Encoder(load_tokenizer(sys.argv[5]))
Path("/proc/self/clear_refs").write_text("5")
info = P.convert(folder, ["x.jsonl"], f"{folder}/x.parquet", encode, FormatSettings(row_group_bytes=int(sys.argv[6])))
print(json.dumps({**info, "peak": peak_rss_mb(), "mb": Path(folder, "x.jsonl").stat().st_size / 1e6}))
"""

def peak(folder, n, length, tokenize="fake", tokenizer="", group=64 << 20):
    "Peak resident MB of converting n documents of about so many bytes."
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run([sys.executable, "-c", MEMORY, str(folder), str(n), str(length), tokenize, str(tokenizer), str(group)], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert not result.returncode, result.stderr[-2000:]
    return json.loads(result.stdout)

def test_memory_does_not_grow_with_documents(tmp_path):
    one, ten = peak(tmp_path, 2000, 2000, group=4 << 20), peak(tmp_path, 20000, 2000, group=4 << 20)
    assert ten["rows"] == 20000 and ten["mb"] > 38 and ten["peak"] < 1.15 * one["peak"] + 10

@pytest.mark.slow
def test_memory_of_tokenizing_is_flat(tmp_path, encode):
    encode.tokenizer.save_pretrained(str(tmp_path/"tok"))
    def of(n, length): return peak(tmp_path, n, length, "real", tmp_path/"tok", group=4 << 20)  # the smallest corpus fills a row group too
    one, ten, million, book = of(3000, 3000), of(30000, 3000), of(1_000_000, 20), of(1, 50_000_000)
    print({k: round(v["peak"]) for k, v in dict(one=one, ten=ten, million=million, book=book).items()})
    assert ten["peak"] < 1.15 * one["peak"] + 10 and million["peak"] < 1.15 * one["peak"] + 60
    assert book["mb"] > 45 and book["peak"] < one["peak"] + 12 * book["mb"]  # line, text, tokens, columns and pages of the one row

# -- JSONL straight into columns ----------------------------------------------------

record_lines = st.lists(st.fixed_dictionaries({"id": st.text("abc", min_size=1), "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=20)}, optional={c: any_json for c in ("source", "date", "other")}), max_size=12)

@given(record_lines, st.sampled_from(["\n", "\n\n", " \n", "\r\n"]), st.booleans(), st.integers(1, 300), st.booleans())
@quick
def test_columns_and_records_give_the_same_file(records, end, ascii, block, bom):
    with tempfile.TemporaryDirectory() as d:
        text = end.join([json.dumps(r, ensure_ascii=ascii) for r in records])
        Path(d, "x.jsonl").write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
        settings = FormatSettings(row_group_rows=5)
        read = [r for _, r in read_jsonl(open_store(d), "x.jsonl")]  # whole numbers beyond 64 bits come back as floats, here and there
        with P.FileWriter(Path(d, "a.parquet"), settings, {}, P.TEXT_COLUMNS) as w: P.write_rows(w, read)
        with P.FileWriter(Path(d, "b.parquet"), settings, {}, P.TEXT_COLUMNS) as w:
            for table in P.text_tables(open_store(d), "x.jsonl", block): w.add_table(table)
        assert Path(d, "a.parquet").read_bytes() == Path(d, "b.parquet").read_bytes()

@pytest.mark.parametrize("line", ['{"id": "1", "text": "a"}{"id": "2", "text": "b"}', '{"id": "1",', '"text": "a"}', '{"id": "1", "text": null}', '{"id": "1"}', '[1]', '{"id": "1", "text": "\\ud800"}', '{"id": "1", "text": 7}', '{"id": "1", "text": "a\tb"}'])
def test_a_line_that_is_no_document_is_named(tmp_path, line):
    good = ['{"id": "1", "text": "가"}'] * 5
    (tmp_path/"x.jsonl").write_text("\n".join([*good, line, *good]) + "\n")
    for encode in (None, lambda texts: [np.zeros(1, np.int32)] * len(texts)):
        with pytest.raises(UserError, match="x.jsonl, line 6"): P.convert(tmp_path, ["x.jsonl"], tmp_path/"x.parquet", encode)

def test_nesting_and_invalid_bytes(tmp_path):
    (tmp_path/"deep.jsonl").write_text('{"id": "1", "text": "a", "x": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
    assert P.convert(tmp_path, ["deep.jsonl"], tmp_path/"x.parquet")["rows"] == 1
    (tmp_path/"bytes.jsonl").write_bytes(b'{"id": "1", "text": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: invalid_utf8"): P.convert(tmp_path, ["bytes.jsonl"], tmp_path/"x.parquet")
