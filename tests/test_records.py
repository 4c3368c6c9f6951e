"""Every line of a file comes out: as a record, or as a `BadLine` with its reason. Kinds of damage, compression, fuzz."""
import gzip, json, os, subprocess, sys, time
import hypothesis.strategies as st
import orjson, pytest, zstandard
from hypothesis import HealthCheck, given, settings
from yunmin_efficientdata.core.records import MAX_DEPTH, RAW_BYTES, REASONS, BadLine, Document, JsonlWriter, dump_line, is_jsonl, make_id, parse_line, quarantine_record, read_jsonl, validate
from yunmin_efficientdata.core.store import MissingKey, open_store

LIMIT = 20_000
PACK = {".jsonl": lambda b: b, ".jsonl.gz": lambda b: gzip.compress(b, mtime=0), ".jsonl.zst": zstandard.ZstdCompressor().compress}


@pytest.fixture
def store(tmp_path): return open_store(tmp_path)


def read(store, data, suffix=".jsonl", limit=LIMIT):
    store.write("x" + suffix, data)
    return list(read_jsonl(store, "x" + suffix, limit))


def doc(i): return {"text": f"문서 {i}", "id": i}
def good(i): return dump_line(doc(i))


# the ten kinds of issue 2; the last element: does the reader find it (else `validate` does)
KINDS = {
    "broken JSON": (b'{"text": "\xea\xb0\x80', "broken_json", True),
    "not an object": ('["글"]'.encode(), "not_an_object", True),
    "no text": (b'{"id": 1}', "no_text", False),
    "empty": (b'{"text": " \\n\\t"}', "empty_text", False),
    "number as text": (b'{"text": 12}', "text_not_string", False),
    "invalid UTF-8": ('{"text": "한글"}'.encode("cp949"), "invalid_utf8", True),
    "NUL": (b'{"text": "a\x00b"}', "nul_character", True),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "nul_character", False),
    "lone surrogate": (b'{"text": "\\ud83d"}', "lone_surrogate", True),
    "over the limit": (b'{"text": "' + b"x"*LIMIT + b'"}', "line_too_long", True),
    "deep nesting": (b'{"text": "a", "x": ' + b"["*3000 + b"]"*3000 + b"}", "too_deep", True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_each_kind_gives_its_reason_and_disturbs_nobody(store, suffix):
    lines = [line for i, (raw, _, _) in enumerate(KINDS.values()) for line in (good(i), raw + b"\n")]
    got = read(store, PACK[suffix](b"".join(lines)), suffix)
    assert [x[0] for x in got] == list(range(1, len(lines) + 1))
    for i, (raw, reason, by_reader) in enumerate(KINDS.values()):
        assert got[2*i] == (2*i + 1, doc(i)) and validate(got[2*i][1]) is None
        bad = got[2*i + 1]
        if by_reader: assert bad == BadLine(2*i + 2, reason, raw[:RAW_BYTES])
        else: assert validate(bad[1], bad[0]) == reason
        assert reason in REASONS


BROKEN = {b"{": "broken_json", b"nothing": "broken_json", b'{"text": NaN}': "broken_json", b'{"text": Infinity}': "broken_json", b'{"text": 1e400}': "broken_json", b'{"a": 1} {"b": 2}': "broken_json", b'{"a": 1,}': "broken_json",
    b"{'text': 'a'}": "broken_json", b'{"text": "a\tb"}': "broken_json", b'{"text": "\\x41"}': "broken_json", b'{"text": "\\ud83d': "broken_json", b"1": "not_an_object", b'"text"': "not_an_object", b"null": "not_an_object", b"[]": "not_an_object",
    b"\xff\xfe": "invalid_utf8", b'{"text": "\xed\xa0\xbd"}': "invalid_utf8", b'{"text": "\xc0\x80"}': "invalid_utf8", b'{"text": "\xea\xb0"}': "invalid_utf8", b"\0"*50: "nul_character", b'{"\0": 1}': "nul_character",
    b'{"text": "\\udc00\\ud800"}': "lone_surrogate", b'{"text": "a", "more": {"\\ud800": 1}}': "lone_surrogate", b'["\\ud800"]': "lone_surrogate", b"["*100_000: "too_deep", b'{"a":'*5000: "too_deep", b"["*200 + b"]"*200: "not_an_object"}

@pytest.mark.parametrize("line", BROKEN, ids=lambda b: repr(b[:24]))
def test_reasons(line): assert parse_line(line) == (None, BROKEN[line])


def test_depth_limit_is_exact():
    nested = lambda n: b'{"text": "[[{{", "x": ' + b"["*(n - 1) + b"]"*(n - 1) + b"}"
    assert parse_line(nested(MAX_DEPTH))[1] == "" and parse_line(nested(MAX_DEPTH + 1))[1] == "too_deep"
    orjson.dumps(parse_line(nested(MAX_DEPTH))[0])  # can be written again
    assert parse_line(b'{"text": "' + b"["*500 + b'"}')[1] == ""
    assert parse_line(b'{"text": "a", "x": [' + b"[],"*500 + b"[]]}")[1] == ""  # wide is not deep
    assert parse_line(b'{"a": ' * 300 + b"1" + b"}" * 300)[1] == "too_deep"


def test_every_prefix_of_a_line_is_accounted_for(store):
    line = '{"text": "가\\ud83d\\ude00", "n": [1, {"a": null}]}'.encode()
    for n in range(1, len(line)): assert parse_line(line[:n])[1] in ("broken_json", "invalid_utf8"), line[:n]


def test_a_long_line_cut_in_a_text_full_of_quotes_is_diagnosed_quickly():
    begin = time.monotonic()
    assert parse_line(b'{"text": "' + b'\\"word '*300_000) == (None, "broken_json")
    assert time.monotonic() - begin < 3


def test_bom_crlf_blank_lines_and_no_last_newline(store):
    got = read(store, b'\xef\xbb\xbf' + good(1).strip() + b"\r\n\r\n  \t\n" + good(2).strip() + b"\r\n\n" + good(3).strip())
    assert got == [(1, doc(1)), (4, doc(2)), (6, doc(3))]
    assert read(store, b"") == [] and read(store, b"\xef\xbb\xbf") == [] and read(store, b"\n\n") == []
    assert read(store, good(1) + b"\xef\xbb\xbf" + good(2))[1].reason == "broken_json"  # only the first is a mark


def test_line_limit_is_exact(store):
    line = b'{"text": "' + b"x"*100 + b'"}'; n = len(line)
    for end in (b"\n", b"\r\n", b""):
        assert read(store, line + end, limit=n)[0][1]["text"] == "x"*100
        assert read(store, line + end, limit=n - 1) == [BadLine(1, "line_too_long", line)]
    assert read(store, b"\xef\xbb\xbf" + line + b"\n", limit=n)[0][0] == 1
    assert [x[0] for x in read(store, good(0) + line + b"\n" + good(2), limit=80)] == [1, 2, 3]
    assert read(store, b" "*30_000 + b"\n" + good(1), limit=LIMIT)[0].reason == "line_too_long"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_cut_and_corrupt_files_give_what_could_be_read(store, suffix):
    body = b"".join(good(i) + dump_line({"text": os.urandom(300).hex()}) for i in range(2000))
    packed, whole = PACK[suffix](body), [(i + 1, orjson.loads(line)) for i, line in enumerate(body.splitlines())]
    for cut in (1, 4, len(packed)//2, len(packed) - 9, len(packed) - 1):
        *lines, last = read(store, packed[:cut], suffix)
        assert lines == whole[:len(lines)] and last.reason == "corrupt_compression" and last.line_no == len(lines) + 1, cut
        if cut > len(packed)//3: assert len(lines) > 100
    for at in (0, 2, len(packed)//2, len(packed)//2 + 1, len(packed) - 3):
        damaged = bytearray(packed); damaged[at] ^= 0xff
        got = read(store, bytes(damaged), suffix)
        assert [x[0] for x in got] == list(range(1, len(got) + 1))
        if suffix == ".jsonl.gz": assert got[-1].reason == "corrupt_compression"  # gzip has a checksum, zstd only on request
    assert read(store, b"not packed at all\n", suffix)[-1].reason == "corrupt_compression"
    assert read(store, packed + b"garbage at the end", suffix)[:-1] == whole
    assert read(store, b"", suffix) == [BadLine(1, "corrupt_compression", b"")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_members_are_one_stream(store, suffix):
    a, b = good(1) + good(2)[:9], good(2)[9:] + good(3)
    assert read(store, PACK[suffix](a) + PACK[suffix](b"") + PACK[suffix](b), suffix) == [(i, doc(i)) for i in (1, 2, 3)]
    if suffix == ".jsonl.gz": assert read(store, PACK[suffix](a) + b"\0"*5000 + PACK[suffix](b) + b"\0"*512, suffix) == [(i, doc(i)) for i in (1, 2, 3)]
    many = b"".join(PACK[suffix](good(i)) for i in range(3000))
    assert read(store, many, suffix) == [(i + 1, doc(i)) for i in range(3000)]


@pytest.mark.parametrize("suffix", PACK)
def test_writer(store, suffix):
    records = [{"text": "글\n\u2028\x1f😀", "n": 2**64 - 1, "z": None}, {"big": 2**70}, {}]
    for key in ("a", "b"):
        with JsonlWriter(store, key + suffix) as w: [w.write(r) for r in records]
        assert w.count == 3
    assert store.read("a" + suffix) == store.read("b" + suffix)  # no time, no name inside
    assert [x[1] for x in read_jsonl(store, "a" + suffix)] == [records[0], {"big": float(2**70)}, {}]
    with pytest.raises(ZeroDivisionError):
        with JsonlWriter(store, "c" + suffix) as w: w.write({}); 1/0
    with pytest.raises(TypeError):
        with JsonlWriter(store, "c" + suffix) as w: w.write({"a": object()})
    assert not store.exists("c" + suffix)
    with JsonlWriter(store, "empty" + suffix): pass
    assert list(read_jsonl(store, "empty" + suffix)) == []


@pytest.mark.parametrize("suffix", PACK)
def test_on_s3(s3, suffix):
    store = open_store(s3.uri + "/ws")
    with JsonlWriter(store, "원본/웹" + suffix) as w: [w.write(doc(i)) for i in range(5000)]
    assert list(read_jsonl(store, "원본/웹" + suffix)) == [(i + 1, doc(i)) for i in range(5000)]


def test_missing_file(store):
    with pytest.raises(MissingKey): next(read_jsonl(store, "none.jsonl"))


def test_names():
    assert all(map(is_jsonl, ("a.jsonl", "x/웹.JSONL", "a.b.jsonl.gz", "A.Jsonl.Zst")))
    assert not any(map(is_jsonl, ("a.json", "jsonl", "a.jsonl.bz2", "a.jsonl~", "a.jsonl.gz.part", "x/.a.jsonl", "a.txt", "a.jsonl/b")))
    

def test_upper_case_suffix_is_unpacked(store): assert read(store, gzip.compress(good(1)), ".JSONL.GZ") == [(1, doc(1))]


def test_ids():
    assert parse_line(b'{"id": 123456789012345678901234567890}')[0]["id"] == 123456789012345678901234567890
    text = lambda value: Document.from_record({"id": value, "text": "a"}).id
    assert [text(v) for v in ("x", 7, 2**80, 1.5, True, None, "", ["a"])] == ["x", "7", str(2**80), "1.5", "true", "", "", '["a"]']
    assert make_id("web", "글") == make_id("web", "글", 0) and len({make_id("web", "글"), make_id("web", "글", 1), make_id("social", "글"), make_id("web", "글 ")}) == 4
    assert len(make_id("web", "글")) == 32 and make_id("", "\ud800")


def test_document_there_and_back():
    record = {"tags": ["a"], "text": "글", "date": 20240101, "license": "CC0", "id": 3}
    d = Document.from_record(record, domain="web", lang="ko", date="never")
    assert (d.id, d.date, d.domain, d.lang, d.source, d.extra) == ("3", "20240101", "web", "ko", "", {"tags": ["a"]})
    assert list(d.to_dict()) == ["id", "text", "source", "domain", "lang", "date", "license", "tags"]
    assert Document.from_record(d.to_dict()) == d and "extra" not in d.to_dict()


def test_quarantine_record_can_always_be_written(store):
    for raw in (b"\xff\0\xed\xa0\xbd", "가".encode()*3000, b"", b"\\ud800"):
        record = quarantine_record("raw/웹.jsonl", BadLine(3, "invalid_utf8", raw))
        assert list(record) == ["file", "line", "reason", "raw"] and orjson.loads(dump_line(record)) == record
    assert quarantine_record("f", BadLine(1, "x", b"a"*9000))["raw"] == "a"*RAW_BYTES


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=5), s, max_size=4), max_leaves=10)
LINES = st.one_of(st.binary(max_size=60), JSON.map(lambda v: json.dumps(v).encode()), JSON.map(lambda v: json.dumps({"text": v}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.tuples(JSON, st.integers(0, 80), st.binary(max_size=3)).map(lambda t: (b := json.dumps({"text": t[0]}).encode())[:t[1]] + t[2] + b[t[1]:]), st.binary(min_size=100, max_size=400)).map(lambda b: b.replace(b"\n", b" "))

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=12), suffix=st.sampled_from(sorted(PACK)), limit=st.sampled_from([64, 150, 10_000]), last=st.booleans())
def test_every_line_comes_out_exactly_once(store, lines, suffix, limit, last):
    data = b"\n".join(lines) + b"\n"*last
    got = read(store, PACK[suffix](data), suffix, limit)
    if data.startswith(b"\xef\xbb\xbf"): lines = [lines[0][3:], *lines[1:]]
    # a line over the limit is bad even where it is only white space
    expected = [i + 1 for i, line in enumerate(lines) if line.strip(b" \t\r") or len(line.rstrip(b"\r")) > limit]
    assert [x[0] for x in got] == expected
    for x in got:
        if isinstance(x, BadLine): assert x.reason in REASONS and x.reason != "corrupt_compression" and len(x.raw) <= RAW_BYTES; dump_line(quarantine_record("f", x))
        else: assert type(x[1]) is dict; dump_line(x[1]); validate(x[1]); Document.from_record(x[1]).to_dict()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".jsonl.gz", ".jsonl.zst"]), where=st.floats(0, 1), junk=st.binary(max_size=20), replace=st.booleans())
def test_any_damage_to_a_compressed_file_ends_in_words(store, suffix, where, junk, replace):
    packed = PACK[suffix](b"".join(good(i) for i in range(300)))
    at = int(where*len(packed))
    got = read(store, packed[:at] + junk + packed[at + (len(junk) if replace else 0):], suffix)
    assert all(isinstance(x, tuple) for x in got) and sum(isinstance(x, BadLine) and x.reason == "corrupt_compression" for x in got) <= 1


def test_memory_is_bounded(tmp_path):
    "A line of 300 MB and a zstd bomb of 1 GB of blank space in one line."
    code = """
import sys, zstandard
from yunmin_efficientdata.core.ledger import peak_rss_mb
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.core.records import read_jsonl
s = open_store(sys.argv[1])
with s.writer("long.jsonl") as f:
    for _ in range(300): f.write(b"x"*(1 << 20))
    f.write(b'\\n{"text": "a"}\\n')
with s.writer("bomb.jsonl.zst") as f, zstandard.ZstdCompressor().stream_writer(f, closefd=False) as z:
    for _ in range(1000): z.write(bytes(1 << 20))
    z.write(b'\\n{"text": "a"}\\n')
before = peak_rss_mb()
for key in ("long.jsonl", "bomb.jsonl.zst"):
    a, b = read_jsonl(s, key, 4 << 20)
    assert a.reason == "line_too_long" and len(a.raw) == 4096 and b == (2, {"text": "a"})
print(int(peak_rss_mb() - before))"""
    grown = int(subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True).stdout)
    assert grown < 200, f"{grown} MB"


def test_real_corpus(corpus):
    store = open_store(corpus/"small" if (corpus/"small").is_dir() else corpus)
    keys = [k for k in store.list() if is_jsonl(k)]
    assert keys
    for key in keys:
        lines = sum(1 for line in store.open(key) if line.strip())
        got = list(read_jsonl(store, key))
        assert len(got) == lines and all(isinstance(x[1], dict) and validate(x[1]) is None for x in got)
