"Page reader: the same tokens whichever way, every damage found, cheap to open."
import json, subprocess, sys, threading, time
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.format.pages import DamagedFile, MappedFile, PageSet, TokenFile, as_python, check_pages, page_parts, page_table, read_footer, read_struct

ELEMENT = pa.field("element", pa.int32(), nullable=False)
SCHEMA = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("tokens", pa.list_(ELEMENT), nullable=False), pa.field("lang", pa.string(), nullable=False)])
LAYOUT = dict(data_page_version="2.0", write_page_index=True, write_page_checksum=True, use_dictionary=["lang"], column_encoding={"tokens.list.element": "PLAIN"},
              compression={"text": "zstd", "lang": "zstd", "tokens.list.element": "none"}, data_page_size=4096, write_batch_size=64, store_schema=False)

def write(path, lengths, seed=0, group=64, schema=SCHEMA, **options):
    "A file of documents with these token counts; returns the flat stream."
    rng = np.random.default_rng(seed)
    rows = [np.append(rng.integers(1, 5000, n - 1), 0).astype(np.int32) if n else np.zeros(0, np.int32) for n in lengths]
    columns = {"text": pa.array([f"문서 {i}" for i in range(len(rows))]), "tokens": pa.array(rows, schema.field("tokens").type), "lang": pa.array(["ko"] * len(rows))}
    table = pa.Table.from_arrays([columns[f.name].cast(f.type) for f in schema], schema=schema)
    with pq.ParquetWriter(path, schema, **{**LAYOUT, **options}) as w:
        for i in range(0, len(rows), group): w.write_table(table.slice(i, group))
        w.add_key_value_metadata({"yunmin.eos_id": "0"})
    return np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32)

def tokens(pages, **options):
    "The whole stream, gathered from where `need` says the values stand."
    pages = pages if isinstance(pages, PageSet) else PageSet(pages, **options)
    table = pages.need(np.arange(len(pages.counts)))
    import ctypes
    return np.frombuffer(b"".join(ctypes.string_at(int(a), 4 * int(n)) for a, n in zip(table.address, pages.counts)), "<i4")

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(1)
    flat = [write(d/f"{i}.parquet", rng.integers(1, 400, n), seed=i) for i, n in enumerate((300, 5, 150))]
    return [d/f"{i}.parquet" for i in range(3)], flat

# -- the same stream ---------------------------------------------------------

def by_arrow(path): return pq.read_table(path, columns=["tokens"])["tokens"].combine_chunks().flatten().to_numpy()
def by_duckdb(path): return duckdb.sql(f"SELECT unnest(tokens) AS t FROM read_parquet('{path}', file_row_number=true) ORDER BY file_row_number").fetchnumpy()["t"]

def test_stream_equals_pyarrow_and_duckdb(files):
    for path, flat in zip(*files):
        assert all(np.array_equal(read(path), flat) for read in (tokens, by_arrow, by_duckdb))
    assert np.array_equal(tokens(files[0]), np.concatenate(files[1]))

@given(lengths=st.lists(st.integers(0, 300), max_size=60), group=st.integers(1, 40), page=st.sampled_from([64, 1000, 4096]), index=st.booleans(), crc=st.booleans(), version=st.sampled_from(["1.0", "2.0"]),
       codec=st.sampled_from(["none", "zstd", "snappy"]), dictionary=st.booleans())
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_gives_the_same_tokens(tmp_path, lengths, group, page, index, crc, version, codec, dictionary):
    flat = write(tmp_path/"a.parquet", lengths, group=group, data_page_size=page, write_page_index=index, write_page_checksum=crc, data_page_version=version, compression=codec,
                 **(dict(use_dictionary=True, column_encoding=None) if dictionary else {}))
    file = TokenFile(tmp_path/"a.parquet")
    plain = index and version == "2.0" and codec == "none" and not dictionary
    assert file.way == ("pages" if plain or not lengths and "pages" == file.way else "pyarrow") and np.array_equal(tokens(tmp_path/"a.parquet", check="always"), flat)

def foreign(path, flat, lengths):
    "The same documents as other programs write them."
    lists = [flat[a - n:a].tolist() for n, a in zip(lengths, np.cumsum(lengths))]
    table = pa.table({"tokens": pa.array(lists, pa.list_(pa.int32()))})
    yield "pyarrow", lambda: pq.write_table(table, path)
    yield "pandas", lambda: table.to_pandas().to_parquet(path)
    yield "spark", lambda: pq.write_table(table, path, compression="snappy", version="1.0", data_page_version="1.0", use_compliant_nested_type=False, flavor="spark", write_page_index=False)
    yield "duckdb", lambda: duckdb.from_arrow(table).write_parquet(str(path))
    yield "duckdb plain", lambda: duckdb.from_arrow(table).write_parquet(str(path), compression="uncompressed")
    yield "large list", lambda: pq.write_table(table.cast(pa.schema([("tokens", pa.large_list(pa.int64()))])), path, compression="gzip")
    yield "unsigned", lambda: pq.write_table(table.cast(pa.schema([("tokens", pa.list_(pa.uint16()))])), path, compression="none", use_dictionary=False, data_page_version="2.0", write_page_index=True)
    yield "delta", lambda: pq.write_table(table, path, use_dictionary=False, column_encoding={"tokens.list.element": "DELTA_BINARY_PACKED"}, compression="none", data_page_version="2.0", write_page_index=True)
    yield "split", lambda: pq.write_table(table, path, use_dictionary=False, column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"}, compression="none", data_page_version="2.0", write_page_index=True)

def test_files_of_other_programs(tmp_path):
    rng = np.random.default_rng(5); lengths = rng.integers(1, 300, 200); flat = rng.integers(0, 30000, lengths.sum()).astype(np.int32)
    for name, make in foreign(tmp_path/"f.parquet", flat, lengths):
        make()
        file = TokenFile(tmp_path/"f.parquet")
        assert np.array_equal(tokens(tmp_path/"f.parquet"), flat), name
        assert file.way == "pyarrow" and file.reason, name

@pytest.mark.parametrize("reason,options", [("compressed", dict(compression="zstd")), ("dictionary", dict(use_dictionary=True, column_encoding=None)), ("version 2", dict(data_page_version="1.0")),
    ("no page index", dict(write_page_index=False)), ("PLAIN", dict(column_encoding={"tokens.list.element": "DELTA_BINARY_PACKED"})), ("PLAIN", dict(column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"}))])
def test_the_reason_is_stated(tmp_path, reason, options):
    flat = write(tmp_path/"o.parquet", [30] * 100, **options)
    file = TokenFile(tmp_path/"o.parquet")
    assert file.way == "pyarrow" and reason in file.reason and reason in repr(file) and np.array_equal(tokens(tmp_path/"o.parquet"), flat)

def test_no_histograms_means_headers_at_opening(files, monkeypatch):
    "Older writers have no level histograms in the ColumnIndex: counts come from the headers, the result is the same."
    import yunmin_efficientdata.format.pages as pages
    original = pages._index_pages
    monkeypatch.setattr(pages, "_index_pages", lambda offsets, levels: original(offsets, levels[:0]))
    table, _ = page_table(MappedFile(files[0][0]), "x"); monkeypatch.undo()
    expected, _ = page_table(MappedFile(files[0][0]), "x")
    assert all(np.array_equal(getattr(table, f), getattr(expected, f)) for f in ("at", "count", "row", "rows", "offset", "end"))

def test_empty_documents_empty_file_and_one_token(tmp_path):
    for lengths in ([], [0], [0, 0, 5, 0], [1] * 500, [5000]):
        flat = write(tmp_path/"e.parquet", lengths)
        assert TokenFile(tmp_path/"e.parquet").way == "pages" and np.array_equal(tokens(tmp_path/"e.parquet", check=True), flat)

def test_file_without_checksums_is_read_in_place(tmp_path):
    flat = write(tmp_path/"n.parquet", [50] * 90, write_page_checksum=False)
    file = TokenFile(tmp_path/"n.parquet")
    assert file.way == "pages" and not file.pages.checksums and check_pages(file.data, file.pages, "n") == 0 and np.array_equal(tokens(tmp_path/"n.parquet"), flat)

# -- damage ------------------------------------------------------------------

def damaged(whole, path, at, value):
    "Read a file with one byte changed: 'refused' or 'harmless', else the test fails."
    data = bytearray(whole); data[at] = value; path.write_bytes(data)
    try: return tokens(path)
    except UserError as e:
        assert "\n" not in str(e) and path.name in str(e), str(e)
        return None

def regions(path):
    "(page data, headers and levels, footer and indexes): offsets of bytes."
    whole, t = path.read_bytes(), TokenFile(path).pages
    _, footer = read_footer(MappedFile(path), "x")
    rows, data = read_footer(MappedFile(path), "x")
    groups = as_python(rows, data)[4]
    column = [c for g in groups for c in g[1] if c[3][3][0] == b"tokens"]
    first = min(min(c[4], c[6]) for g in groups for c in g[1] if 6 in c)
    values = np.concatenate([np.arange(a, a + 4 * n) for a, n in zip(t.at, t.count)])
    heads = np.concatenate([np.arange(o, a) for o, a in zip(t.offset, t.at)])
    return whole, values, heads, np.arange(first, len(whole)), column

def run_corruptions(path, flat, spots, rng, tmp_path):
    whole, seen = path.read_bytes(), {"refused": 0, "harmless": 0}
    for at in spots.tolist():
        value = int(rng.choice([whole[at] ^ 1 << int(rng.integers(8)), rng.integers(256)]))
        if value == whole[at]: value ^= 255
        got = damaged(whole, tmp_path/"x.parquet", at, value)
        assert got is None or np.array_equal(got, flat), f"byte {at} {whole[at]} -> {value}: other tokens without a word"
        seen["refused" if got is None else "harmless"] += 1
    return seen

def test_single_bytes_changed_are_never_other_tokens(files, tmp_path):
    path, flat, rng = files[0][0], files[1][0], np.random.default_rng(0)
    whole, values, heads, foot, _ = regions(path)
    assert run_corruptions(path, flat, rng.choice(values, 120), rng, tmp_path) == {"refused": 120, "harmless": 0}
    assert run_corruptions(path, flat, rng.choice(heads, 150), rng, tmp_path)["refused"] > 120
    assert run_corruptions(path, flat, rng.choice(foot, 300), rng, tmp_path)["refused"] > 60
    others = np.setdiff1d(np.arange(len(whole)), np.concatenate([values, heads, foot]))
    assert run_corruptions(path, flat, rng.choice(others, 30), rng, tmp_path)["harmless"] == 30  # text pages: not read

@pytest.mark.slow
def test_every_byte_of_headers_index_and_footer(tmp_path):
    "All of them, with many values each; and thousands in the page data."
    rng = np.random.default_rng(3)
    flat = write(tmp_path/"s.parquet", rng.integers(1, 200, 60), group=30, data_page_size=2048)
    whole, values, heads, foot, _ = regions(tmp_path/"s.parquet")
    seen = [run_corruptions(tmp_path/"s.parquet", flat, np.repeat(where, times), rng, tmp_path) for where, times in ((heads, 20), (foot, 20), (rng.choice(values, 4000), 1))]
    print(seen)
    assert seen[2]["harmless"] == 0 and seen[0]["refused"] > .9 * 20 * len(heads)

def test_message_names_file_page_and_offset(files, tmp_path):
    path = files[0][0]; t = TokenFile(path).pages
    data = bytearray(path.read_bytes()); data[t.at[3] + 5] ^= 4; (tmp_path/"bad.parquet").write_bytes(data)
    for check in ("first read", "always", True):
        with pytest.raises(DamagedFile, match=rf"bad.parquet: page 3 at byte {t.offset[3]}: checksum differs"): tokens(tmp_path/"bad.parquet", check=check)
    assert len(tokens(tmp_path/"bad.parquet", check="never")) == len(files[1][0])
    pages = PageSet(tmp_path/"bad.parquet"); pages.need([0, 1, 2])  # pages that are sound may be read
    with pytest.raises(DamagedFile): pages.need([2, 3])
    with pytest.raises(DamagedFile): pages.ready(np.array([int(pages.first[3])]), 1)

def test_always_sees_damage_that_comes_later(files, tmp_path):
    (tmp_path/"l.parquet").write_bytes(files[0][0].read_bytes())
    sets = {c: PageSet(tmp_path/"l.parquet", check=c) for c in ("first read", "always")}
    for s in sets.values(): tokens(s)
    t = sets["always"].files[0].pages
    with open(tmp_path/"l.parquet", "r+b") as f: f.seek(int(t.at[1])); f.write(b"\xff")
    tokens(sets["first read"])
    with pytest.raises(DamagedFile): sets["always"].ready(np.array([int(sets["always"].first[1])]), 8)

@pytest.mark.parametrize("cut", [0, 3, 11, 500, -1, -9])
def test_truncated_file_is_one_line(files, tmp_path, cut):
    (tmp_path/"t.parquet").write_bytes(files[0][0].read_bytes()[:cut])
    with pytest.raises(UserError) as e: TokenFile(tmp_path/"t.parquet")
    assert "\n" not in str(e.value) and "t.parquet" in str(e.value)

def test_missing_bytes_inside_and_appended_bytes(files, tmp_path):
    whole = files[0][0].read_bytes()
    for name, data in (("cut", whole[:5000] + whole[5001:]), ("more", whole[:5000] + b"x" + whole[5000:]), ("swap", whole[:4] + whole[8000:12000] + whole[4004:8000] + whole[4:4004] + whole[12000:])):
        (tmp_path/f"{name}.parquet").write_bytes(data)
        with pytest.raises(UserError): tokens(tmp_path/f"{name}.parquet")

def test_null_tokens_and_wrong_types_are_refused(tmp_path):
    pq.write_table(pa.table({"tokens": pa.array([[1, None, 2]], pa.list_(pa.int32()))}), tmp_path/"n.parquet")
    pq.write_table(pa.table({"tokens": pa.array(["a"])}), tmp_path/"s.parquet")
    pq.write_table(pa.table({"tokens": pa.array([[2**40]], pa.list_(pa.int64()))}), tmp_path/"b.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path/"x.parquet")
    for name, word in (("n", "null"), ("s", "not a list"), ("b", "b.parquet"), ("x", "no column 'tokens'"), ("none", "no such file")):
        with pytest.raises(UserError, match=word): TokenFile(tmp_path/f"{name}.parquet")

@given(st.binary(max_size=300))
@hypothesis_settings(max_examples=300, deadline=None)
def test_nonsense_is_a_value_error(data):
    try: struct, n = read_struct(data)
    except ValueError: return
    assert isinstance(struct, dict) and n <= len(data)

@given(st.recursive(st.one_of(st.integers(-2**31, 2**31), st.binary(max_size=20), st.booleans()), lambda inner: st.dictionaries(st.integers(1, 200), inner, max_size=5), max_leaves=20).filter(lambda x: isinstance(x, dict)))
@hypothesis_settings(max_examples=100, deadline=None)
def test_structs_round_trip(value):
    assert read_struct(encode(value)) == (value, len(encode(value)))

def encode(struct):
    "The other direction, written from the specification."
    def varint(n): return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])
    def zigzag(n): return varint(n * 2 if n >= 0 else -n * 2 - 1)
    out, last = b"", 0
    for field, v in sorted(struct.items()):
        kind = 1 if v is True else 2 if v is False else 6 if isinstance(v, int) else 8 if isinstance(v, bytes) else 12
        out += bytes([(field - last) << 4 | kind]) if 0 < field - last < 16 else bytes([kind]) + zigzag(field)
        out += b"" if isinstance(v, bool) else zigzag(v) if isinstance(v, int) else varint(len(v)) + v if isinstance(v, bytes) else encode(v)
        last = field
    return out + b"\0"

# -- opening, memory, sets ---------------------------------------------------

def test_opening_touches_no_page_and_is_cheap(files, tmp_path):
    class Counting(MappedFile):
        seen = []
        def read(self, offset, length): self.seen.append((offset, length)); return MappedFile.read(self, offset, length)
    source = Counting(files[0][0]); t, _ = page_table(source, "x")
    inside = [(o, n) for o, n in source.seen if o < t.end[-1] and o + n > t.offset[0]]
    assert len(inside) == 1 and inside[0][0] == t.offset[0] and inside[0][1] <= 4096  # is the first page of version 2?
    many = [str(files[0][0])] * 200
    start = time.process_time(); pages = PageSet(many); spent = time.process_time() - start
    assert spent < 1.5 and len(pages) == 200 * len(files[1][0])

def test_memory_is_mapped_not_held(tmp_path):
    "Opening and reading a file of 40 MB adds next to no anonymous memory."
    code = """if 1:
        import sys, numpy as np
        from yunmin_efficientdata.format.pages import PageSet
        def anonymous(): return sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith('Anonymous')) * 1024
        PageSet(sys.argv[2]).need([0]); before = anonymous()
        pages = PageSet(sys.argv[1]); pages.need(np.arange(len(pages.counts)))
        print(anonymous() - before, 4 * len(pages))"""
    write(tmp_path/"big.parquet", [50_000] * 200, data_page_size=1 << 20, write_batch_size=8192); write(tmp_path/"small.parquet", [50] * 20)
    added, size = map(int, subprocess.run([sys.executable, "-c", code, str(tmp_path/"big.parquet"), str(tmp_path/"small.parquet")], check=True, capture_output=True, text=True).stdout.split())
    assert size == 40_000_000 and added < 6 << 20

@given(st.lists(st.integers(-50, 100_000), max_size=20), st.integers(0, 5000))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ready_covers_the_pages_of_windows(files, starts, length):
    pages = PageSet(files[0])
    table = pages.ready(np.array(starts, np.int64), length)
    wanted = {p for s in starts if s >= 0 and length > 0 and s + length <= len(pages) for p in range(len(pages.counts)) if pages.first[p] < s + length and pages.first[p + 1] > s}
    assert set(pages.pages_of(starts, length).tolist()) == wanted and all(table.address[p] for p in wanted)

def test_threads_share_a_set(files):
    pages, wrong = PageSet(files[0], check="always"), []
    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            start = rng.integers(0, len(pages) - 500, 4); table = pages.ready(start, 500)
            if not all(table.address[pages.pages_of(start, 500)]): wrong.append(seed)
    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong

def test_sets_travel_to_other_processes(files):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    pages = PageSet(files[0], check="never")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: assert np.array_equal(pool.submit(tokens, pages).result(), np.concatenate(files[1]))

def test_parts_hold_whole_pages(files):
    t = TokenFile(files[0][0]).pages
    for size in (1, 4096, 20_000, 1 << 30):
        parts, of = page_parts(t, size)
        assert len(of) == len(t) and (np.diff(of) >= 0).all() and of[-1] == len(parts) - 1
        for p, (offset, length) in enumerate(parts.tolist()):
            mine = np.flatnonzero(of == p)
            assert t.offset[mine[0]] == offset and t.end[mine[-1]] == offset + length and (t.offset[mine[1:]] == t.end[mine[:-1]]).all()
            assert length <= size + int((t.end - t.offset).max())

# -- the real corpus -----------------------------------------------------------

def test_real_text_whichever_way(corpus, tmp_path):
    from yunmin_efficientdata.core.settings import FormatSettings
    from yunmin_efficientdata.format.parquet import FileWriter
    lines = [json.loads(l) for p in sorted((corpus/"small").glob("*.jsonl")) for l in p.read_text(encoding="utf-8").splitlines()[:60]]
    with FileWriter(tmp_path/"r.parquet", FormatSettings(page_bytes=16384), {}) as w:
        rows = [np.append(np.frombuffer(l["text"].encode("utf-16-le"), "<u2").astype(np.int32) + 1, 0).astype(np.int32) for l in lines]
        for l, r in zip(lines, rows): w.add(l, r)
    flat = np.concatenate(rows)
    assert TokenFile(tmp_path/"r.parquet").way == "pages" and all(np.array_equal(read(tmp_path/"r.parquet"), flat) for read in (tokens, by_arrow, by_duckdb))
