"""Damaged input at scale. The fast part is a sample of what `pytest -m slow tests/test_fuzz.py` and `python tests/fuzz.py --report` do with 10,000 lines and 1,000 files."""
import gzip, json
from pathlib import Path
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from yunmin_efficientdata.core.records import REASONS, BadLine, dump_line, read_jsonl, validate
from yunmin_efficientdata.core.store import open_store
import fuzz

FAST = ("raw", "config", "prompts", "npy", "npz", "adapter", "shards", "parquet", "profile", "embeddings", "ratings", "resume")  # what needs no Hugging Face model


def clean(rows): assert not fuzz.faults(rows), "\n".join(f"{r['target']} {r['case']} {r['file']}: {r['end']}: {r['text'][:400]}" for r in fuzz.faults(rows))


# -- lines

def test_mutated_lines_are_kept_counted_or_in_quarantine(tmp_path):
    ends = fuzz.lines_case(tmp_path, 0, 400, seed=1)
    assert sum(ends.values()) == 400 and all(ends[k] for k in ("same", "other", "quarantined", "blank"))


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(st.characters(), max_size=8), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "domain", "a", "\0", "한글", '"text"', "\ud800"]), s, max_size=3), max_leaves=8)
LINES = st.one_of(JSON.map(lambda v: json.dumps(v).encode()), st.fixed_dictionaries({"text": JSON, "id": JSON}).map(lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.tuples(st.integers(0, 2**32), st.integers(0, 200)).map(lambda t: fuzz.mutated_line(*t)[1]), st.binary(max_size=40)).map(lambda b: b.replace(b"\n", b" "))

@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=st.lists(LINES, min_size=1, max_size=6), packed=st.booleans())
@example([b'{"text": "a", "text": "b"}', b'{"text": "a", "n": 1e400}', b'\xef\xbb\xbf{"text": "a"}', b'{"text": "\\u0000"}', b'{"text": "a"}\x00', b'{"te\\u0078t": "a", "text": "b"}'], False)
def test_two_parsers_agree_about_every_line(tmp_path, lines, packed):
    store, key = open_store(tmp_path), "x.jsonl" + ".gz"*packed
    body = b"\n".join(lines); store.write(key, gzip.compress(body, mtime=0) if packed else body)
    got = {x[0]: x for x in read_jsonl(store, key, fuzz.LIMIT)}
    for i, line in enumerate(lines, 1):
        want, found = fuzz.document_of(line, i == 1), got.pop(i, None)
        if want is False: assert found is None; continue
        reason = found.reason if isinstance(found, BadLine) else validate(found[1])
        assert (reason is None) == (want is not None), (line, reason)
        if want is None: assert reason in REASONS
        else: assert json.loads(dump_line(found[1])) == json.loads(json.dumps(want))
    assert not got


def test_the_fuzzer_sees_what_is_lost(tmp_path, monkeypatch):
    "A checker that never fails checks nothing: four readers that lose something, each in its own way."
    from yunmin_efficientdata.dedup import prepare as P
    def with_reader(change):
        def read(*args): yield from change(iter(read_jsonl(*args)))
        monkeypatch.setattr(P, "read_jsonl", read)
    def drop(items): return (x for i, x in enumerate(items) if i != 50)
    def shout(items): return ((x[0], x[1] | {"meta": 1}) if type(x) is tuple and x[0] == 50 else x for x in items)
    def forgive(items): return ((x[0], {"text": "무엇이든", "id": "x"}) if isinstance(x, BadLine) else x for x in items)
    def accuse(items): return (BadLine(x[0], "broken_json", b"") if x[0] == 50 else x for x in items)
    for i, change in enumerate((drop, shout, forgive, accuse)):
        with_reader(change)
        with pytest.raises(fuzz.Lost): fuzz.lines_case(tmp_path/str(i), 0, 100, seed=1)


# -- files

@pytest.mark.parametrize("name", FAST)
def test_mutated_files_are_read_or_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    t, good, expected = fuzz.prepared(name)
    clean([fuzz.try_one(t, name, good, expected, case, seed=5) for case in range(12)])


def test_a_header_that_promises_too_much_and_a_dead_process_are_seen(monkeypatch, tmp_path):
    "The runner's own ends: a process that dies is a crash of that case, and the next cases still run."
    code = f"import sys; sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r}); import fuzz, os\n" \
           "fuzz.TARGETS['dies'] = fuzz.Target(lambda d: (d/'f.txt').write_text('x'*50), lambda d: os._exit(3) if len((d/'f.txt').read_bytes()) < 50 else None, lambda d: [d/'f.txt'])\n" \
           "sys.exit(fuzz.main(sys.argv[1:]))"
    (tmp_path/"fuzz_dies.py").write_text(code); monkeypatch.setattr(fuzz, "__file__", str(tmp_path/"fuzz_dies.py"))
    rows = fuzz.run_target("dies", 12, seed=0)
    assert [r["case"] for r in rows] == list(range(12)) and {"crash", "same"} <= {r["end"] for r in rows}


def test_the_written_table_is_clean_and_whole():
    "reports/fuzz.md, as the last campaign left it."
    text = (fuzz.project()/"reports/fuzz.md").read_text(encoding="utf-8")
    assert "Faults: 0." in text and "| 10000 |" in text
    rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| ")]
    files = {r[0]: list(map(int, r[1:])) for r in rows if r[0] in fuzz.TARGETS or r[0] == "all"}
    assert files.keys() == fuzz.TARGETS.keys() | {"all"} and files["all"][0] >= 1000 and not sum(files["all"][5:])
    assert "/tmp" not in text and "/work" not in text


@pytest.mark.slow
def test_10_000_lines_and_1_000_files():
    "Zero tracebacks, zero silent losses; the table is the one in reports/."
    written, found = fuzz.lines_campaign(10_000, 0), fuzz.campaign(None, 1000, 0)
    clean(found + written["faults"])
    assert fuzz.page(written, found, 0) == (fuzz.project()/"reports/fuzz.md").read_text(encoding="utf-8")
