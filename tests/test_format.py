"Phase 2's driver as a whole: the contract of its files, skipping, equal bytes."
import json, shutil
from pathlib import Path
import pandas as pd, pyarrow.parquet as pq, pytest
from yunmin_efficientdata.format.tokenizer import load_tokenizer

SENTENCES = ["대한민국의 수도는 서울이다.", "오늘 날씨가 맑고 기온은 20도이다.", "법원은 피고인의 항소를 기각하였다.", "영화가 정말 재미있었다 ㅋㅋ", "함수는 값을 돌려준다: return x"]

FAST = ["format.benchmark_repeats=1", "format.benchmark_rows=64", "tokenizer.vocab_size=400"]

def make(folder, **counts):
    "deduped/ by hand: domain -> number of documents."
    for domain, n in counts.items():
        path = Path(folder)/"deduped"/domain/"part-00000.jsonl"; path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"id": f"{domain}-{i}", "text": " ".join(SENTENCES[(i + k) % 5] for k in range(i % 7 + 1)) + f" {i}", "source": None, "date": 2020, "extra": [1]}, ensure_ascii=False) + "\n" for i in range(n)), encoding="utf-8")
    return str(folder)

def data_files(ws):
    return {p.relative_to(ws).as_posix(): p.read_bytes() for f in ("parquet_ready", "tokenizer", "results/profile") for p in sorted((Path(ws)/f).rglob("*")) if p.is_file()}

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from yunmin_efficientdata.format.phase import run
    ws = make(tmp_path_factory.mktemp("ws"), web=200, social=30, gone=0)
    return ws, run(ws, overrides=FAST)

def test_run_writes_the_contract(done):
    ws, summary = done; manifest = json.loads(Path(ws, "parquet_ready/manifest.json").read_text())
    assert manifest["domains"]["gone"] == {"files": [], "rows": 0, "tokens": 0, "bytes": 0}
    held = manifest["heldout"]
    assert held["validation"]["web"]["rows"] >= 20 and held["test"]["web"]["rows"] >= 20
    for domain, n in (("web", 200), ("social", 30)):
        parts = [manifest["domains"][domain], held["validation"][domain], held["test"][domain]]
        assert sum(p["rows"] for p in parts) == n
        ids = [i for p in parts for f in p["files"] for i in pq.read_table(Path(ws, f))["id"].to_pylist()]
        assert len(ids) == len(set(ids)) == n
    table = pq.read_table(Path(ws, "parquet_ready/web.parquet")).to_pylist()[0]
    assert table["date"] == "2020" and table["source"] == "" and table["tokens"][-1] == 0
    tokenizer = load_tokenizer(str(Path(ws, "tokenizer")))
    assert tokenizer.decode(table["tokens"][:-1]) == table["text"]
    speed = pd.read_csv(Path(ws, "benchmark/io_speed_comparison.csv"))
    assert {"jsonl", "parquet"} <= set(speed.format) and speed[speed.format == "jsonl"].rows.iloc[0] == speed[speed.format == "parquet"].rows.iloc[0]
    assert "parquet_ready" in Path(ws, "results/profile/queries.sql").read_text()

def test_second_run_skips_and_other_workspace_gives_the_same_bytes(done, tmp_path):
    from yunmin_efficientdata.format.phase import run
    ws, summary = done; before = data_files(ws)
    assert run(ws, overrides=FAST) == summary and data_files(ws) == before
    shutil.copytree(Path(ws, "deduped"), tmp_path/"deduped")
    run(str(tmp_path), overrides=FAST)
    assert data_files(tmp_path) == before
