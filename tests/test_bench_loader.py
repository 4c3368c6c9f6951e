"""The loader benchmark: everybody gets the same windows, wrong tokens are found, what cannot run is a row, one whole run."""
import json, mmap, sys
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from yunmin_efficientdata.bench import loader_peers
from yunmin_efficientdata.bench.loader import ENVIRONMENT, OWN, Task, bench_loader, field_of, find_corpus, goals, prepare, write_input, wrong_windows
from yunmin_efficientdata.bench.loader_peers import Entry, Reader, batches_of, measure, sums
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.format.loader import TokenPages


def write_jsonl(path, n=300):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": str(i), "text": f"{i}번째 글은 날씨가 {i % 7}도라고 말한다. " * (i % 9 + 1)}, ensure_ascii=False) + "\n" for i in range(n)) + "깨진 줄\n" + '{"id": "x"}\n', encoding="utf-8")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    write_jsonl(folder/"raw/web.jsonl")
    return write_input(*find_corpus(str(folder/"raw"), folder, 10**6), folder/"in", batch=4, seq_len=64)


def job_of(task, tmp_path, order, name="x", **more): return task.job | dict(task=order, contestant=name, copy=str(tmp_path/"copy"), out=str(tmp_path), seconds=0.01, check=5) | more


@pytest.mark.parametrize("name", OWN)
def test_own_contestants_give_the_tokens_of_the_source_in_both_orders(task, tmp_path, name):
    entry = OWN[name]
    if entry.prepare: assert measure(job_of(task, tmp_path, "prepare"), entry)["copy_mb"] > 0
    for order in ("random", "sequential") if name != "JSONL + tokenise" else ("sequential",):
        answer = measure(job_of(task, tmp_path, order), entry)
        assert len(answer["proof"]) == 20 and wrong_windows(answer["proof"], task, order, entry.local) == 0
        assert answer["measured"] >= 1 and answer["cpu"] >= 0 and answer["tokens"] == task.job["epoch"] * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize("peer", ENVIRONMENT)
def test_peers_that_are_installed_give_the_tokens_of_the_source(task, tmp_path, peer):
    contestant, = field_of(task, tmp_path, [peer], 0.02, 5)
    (contestant,), copies = prepare([contestant], tmp_path, say=lambda line: None)
    if not contestant.missing.startswith("not installed"):
        from yunmin_efficientdata.bench.harness import take_turns
        for order in ("random", "sequential"):
            rows = take_turns([contestant._replace(job=contestant.job | {"task": order})], tmp_path/order, 1, say=lambda line: None)
            assert wrong_windows(rows[0]["proof"], task, order, False) == 0
    else: assert copies.not_run[0] == contestant.missing


def test_truth_is_the_stream_of_the_pages(task):
    pages = TokenPages(task.job["parquet"])
    assert np.array_equal(task.truth.reshape(-1), pages.take([0], task.truth.size)[0])
    assert sorted(task.windows.reshape(-1).tolist()) == sorted(set(task.windows.reshape(-1).tolist())) and task.windows.max() < len(task.truth)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_swapped_or_missing_window_is_counted(data):
    truth = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 50, (12, 8), dtype=np.int32)
    windows = np.random.default_rng(1).permutation(12).reshape(3, 4)
    task = Task({}, truth, windows)
    for order, local, rows in (("random", False, windows.reshape(-1)), ("sequential", False, np.arange(12)), ("random", True, np.random.default_rng(2).permutation(12))):
        proof = sums(truth[rows])
        assert wrong_windows(proof, task, order, local) == 0
        i = data.draw(st.integers(0, 11))
        changed = truth[rows].copy(); changed[i, data.draw(st.integers(0, 7))] += 100
        assert wrong_windows(sums(changed), task, order, local) == 1
        if local: assert wrong_windows(proof[:1] * 2 + proof[1:-1], task, order, local) == 1


def test_order_of_batches_begins_again_and_drops_short_ones(tmp_path):
    np.save(tmp_path/"w.npy", np.array([[0, 1], [2, 3]]))
    reader = Reader(lambda w: w * 10, lambda: iter([[1, 2], [3, 4], [5]]))
    job = {"task": "sequential", "batch": 2, "windows": str(tmp_path/"w.npy")}
    it = batches_of(reader, job); assert [next(it) for _ in range(3)] == [[1, 2], [3, 4], [1, 2]]
    it = batches_of(reader, job | {"task": "random"}); assert [next(it).tolist() for _ in range(3)] == [[0, 10], [20, 30], [0, 10]]
    with pytest.raises(RuntimeError, match="no full batch"): next(batches_of(Reader(None, lambda: iter([[1]])), job))


def test_anonymous_and_mapped_memory_are_told_apart(task, tmp_path):
    big = tmp_path/"big.bin"; np.zeros(32 << 20, np.uint8).tofile(big)
    def mapped(job):
        data = np.memmap(big, mode="r"); int(data[::4096].sum())
        return Reader(None, lambda: (np.zeros((4, 64), np.int32) + data[0] for _ in range(9)))
    def copied(job):  # into new pages: np.fromfile may find room in memory that earlier tests freed, and then nothing grows
        data = np.frombuffer(mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE), np.uint8); data[:] = np.memmap(big, mode="r")
        return Reader(None, lambda: (np.zeros((4, 64), np.int32) + data[0] for _ in range(9)))
    m, c = (measure(job_of(task, tmp_path, "sequential"), Entry(f)) for f in (mapped, copied))
    assert m["rss_growth_mb"] > 28 and m["anonymous_mb"] < 12 and c["anonymous_mb"] > 28


def test_a_torchvision_that_does_not_fit_is_stood_in_for(monkeypatch):
    kept = {m: sys.modules.pop(m) for m in list(sys.modules) if m.split(".")[0] == "torchvision"}
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision": raise RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    try:
        assert loader_peers.stand_in_for_torchvision()
        from torchvision.datasets import VisionDataset
        assert VisionDataset is object
    finally:
        for m in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[m]
        sys.modules.update(kept)


def test_goals_from_tables():
    random = pd.DataFrame({"contestant": ["ours", "numpy memmap stack", "numba gather from a raw file", "table in RAM", "Lance", "LitData"], "ratio": [1, 2.0, 0.7, 1, 50, float("nan")], "anonymous_mb": [1.0, 1, 1, 100, 9, float("nan")], "wrong": [0, 0, 0, 0, 2, None]})
    sequential = pd.DataFrame({"contestant": ["ours", "JSONL + tokenise"], "ratio": [1, 500.0], "anonymous_mb": [1.0, 2], "wrong": [0, 0]})
    g = goals(random, sequential).set_index("goal").result.to_dict()
    assert list(g.values()) == ["met", "missed", "met", "not measured", "met", "met", "missed"] and "random: times Lance" in g


def test_user_mistakes_are_one_line(tmp_path):
    (tmp_path/"none").mkdir()
    with pytest.raises(UserError, match="neither a workspace"): bench_loader(str(tmp_path/"none"), out=tmp_path/"o")
    with pytest.raises(UserError, match="unknown; choose from"): bench_loader(peers=["nobody"], out=tmp_path/"o")
    write_jsonl(tmp_path/"few/a.jsonl", 3)
    with pytest.raises(UserError, match="a batch needs 16"): bench_loader(str(tmp_path/"few"), out=tmp_path/"o", say=lambda line: None)


def test_the_whole_run_from_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from yunmin_efficientdata.cli import app
    monkeypatch.setenv("YUNMIN_BENCH", str(tmp_path/"no-peers"))
    write_jsonl(tmp_path/"raw/a.jsonl", 1000)
    result = CliRunner().invoke(app, ["bench", "loader", "--corpus", str(tmp_path/"raw"), "--quick", "--out", str(tmp_path/"out"), "--peers", "Lance", "--seq-len", "128"], catch_exceptions=False)
    assert result.exit_code == 0 and "goals" in result.output
    text = (tmp_path/"out/loader.md").read_text()
    assert "not installed: run scripts/setup_bench.sh" in text and "| ours |" in text
    assert {p.name for p in (tmp_path/"out").iterdir()} >= {"loader.md", "loader-speed.png", "loader-memory.png", "loader-1.csv"}


def test_lines_with_tokens_hold_the_tokens_of_parquet_and_other_texts_are_refused(task, tmp_path):
    import pyarrow.parquet as pq
    from yunmin_efficientdata.format.benchmark import READERS, carry_tokens
    table = pq.read_table(task.job["parquet"][0], columns=["text", "tokens"]).slice(0, 50)
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in table["text"].to_pylist()]
    (tmp_path/"a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = {"jsonl": [str(tmp_path/"a.jsonl")], "parquet": task.job["parquet"], "rows": [50], "batch": 16, "seq_len": 16, "eos_id": 0, "tokenizer": task.job["tokenizer"] + "/tokenizer.json"}
    job["jsonl_tokens"] = carry_tokens(job, tmp_path)
    assert [json.loads(line)["tokens"] for line in open(job["jsonl_tokens"][0], encoding="utf-8")] == table["tokens"].to_pylist()
    job["tokens"] = sum(map(len, table["tokens"].to_pylist()))
    sums_ = {name: np.sum(list(read(job)), axis=0).tolist() for name, read in READERS.items()}
    assert {sums_[n][0] for n in ("jsonl", "jsonl, orjson", "jsonl with tokens", "parquet")} == {50}
    assert sums_["jsonl, tokenized"] == sums_["jsonl with tokens, windows"] == sums_["parquet, windows"]
    (tmp_path/"a.jsonl").write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="are not the lines of"): carry_tokens(job, tmp_path)
