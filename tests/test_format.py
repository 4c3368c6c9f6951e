"Phase 2: page reader, loader, writer, held-out split, tokenizer, driver: edge cases, faults and properties."
import json, os, shutil
from pathlib import Path
import duckdb, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from torch.utils.data import DataLoader
from yunmin_efficientdata.core.settings import FormatSettings, HeldoutSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.format.loader import TextRows, TokenLoader, TokenPages, _take_numpy, permute, round_keys
from yunmin_efficientdata.format.pages import DamagedFile, TokenFile, check_pages
from yunmin_efficientdata.format.parquet import FileWriter, Heldout, choose_heldout, cluster_hash, verify_file
from yunmin_efficientdata.format.tokenizer import Encoder, as_pretrained, load_tokenizer, save_tokenizer, train_bpe

SENTENCES = ["대한민국의 수도는 서울이다.", "오늘 날씨가 맑고 기온은 20도이다.", "법원은 피고인의 항소를 기각하였다.", "영화가 정말 재미있었다 ㅋㅋ", "함수는 값을 돌려준다: return x"]

def write(path, lengths, seed=0, eos=0, **settings):
    "A file of documents with these token counts; returns the flat stream."
    rng = np.random.default_rng(seed)
    with FileWriter(path, FormatSettings(**{"page_bytes": 4096, "row_group_rows": 64, **settings}), {"yunmin.eos_id": str(eos)}) as w:
        rows = [np.append(rng.integers(1, 5000, n - 1), eos).astype(np.int32) for n in lengths]
        for i, r in enumerate(rows): w.add({"id": f"{seed}-{i}", "text": f"문서 {i} " * (i % 9), "domain": "web"}, r)
    verify_file(path, w)
    return np.concatenate(rows)

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("pages"); rng = np.random.default_rng(1)
    flat = [write(d/f"{i}.parquet", rng.integers(1, 400, n), seed=i) for i, n in enumerate((300, 5, 150))]
    return [d/f"{i}.parquet" for i in range(3)], np.concatenate(flat)

# -- pages ---------------------------------------------------------------

def test_stream_equals_pyarrow_and_duckdb(files):
    paths, flat = files
    assert np.array_equal(TokenPages(paths).take([0], len(flat))[0], flat)
    arrow = np.concatenate([pq.read_table(p, columns=["tokens"])["tokens"].combine_chunks().flatten().to_numpy() for p in paths])
    assert np.array_equal(arrow, flat)
    sql = duckdb.sql(f"SELECT unnest(tokens) AS t FROM read_parquet({[str(p) for p in paths]}, file_row_number=true)").df().t.to_numpy()
    assert np.array_equal(sql, flat)

def test_other_readers_see_the_same_rows(files, tmp_path):
    import datasets
    frame = pd.read_parquet(files[0][0])
    assert list(frame.columns) == ["id", "text", "source", "tokens", "lang", "domain", "date"] and not frame.isna().any().any()
    ds = datasets.load_dataset("parquet", data_files=str(files[0][0]), split="train", cache_dir=str(tmp_path))
    assert ds[7]["tokens"] == frame.tokens[7].tolist()

def test_corruption_is_never_a_silent_wrong_token(files, tmp_path):
    path, whole = tmp_path/"x.parquet", files[0][0].read_bytes()
    original, rng = TokenFile(files[0][0]), np.random.default_rng(0)
    expected = TokenPages(files[0][0]).take([0], len(original))
    seen = {"refused": 0, "harmless": 0}
    footer = int.from_bytes(whole[-8:-4], "little")
    spots = np.concatenate([rng.integers(0, len(whole), 120), rng.integers(len(whole) - 8 - footer, len(whole), 60), rng.choice(original.pages.offset, 40) + rng.integers(0, 30, 40)])
    for at in spots:
        data = bytearray(whole); data[at] ^= int(rng.integers(1, 256)); path.write_bytes(data)
        try:
            pages = TokenPages(path, check=True)
            same = len(pages) == len(original) and np.array_equal(pages.take([0], len(pages)), expected)
        except (UserError, DamagedFile): seen["refused"] += 1; continue
        assert same, f"byte {at}: other tokens without a word"
        seen["harmless"] += 1
    assert seen["refused"] > 60

@pytest.mark.parametrize("cut", [0, 3, 11, 500, -1, -9])
def test_truncated_file_is_one_line(files, tmp_path, cut):
    (tmp_path/"t.parquet").write_bytes(files[0][0].read_bytes()[:cut])
    with pytest.raises(UserError) as e: TokenFile(tmp_path/"t.parquet")
    assert "\n" not in str(e.value) and "t.parquet" in str(e.value)

def test_null_tokens_and_wrong_types_are_refused(tmp_path):
    pq.write_table(pa.table({"tokens": pa.array([[1, None, 2]], pa.list_(pa.int32()))}), tmp_path/"n.parquet")
    pq.write_table(pa.table({"tokens": pa.array(["a"])}), tmp_path/"s.parquet")
    for name, word in (("n", "null"), ("s", "not a list")):
        with pytest.raises(UserError, match=word): TokenFile(tmp_path/f"{name}.parquet")

def test_empty_documents_and_foreign_types_read_through_pyarrow(tmp_path):
    pq.write_table(pa.table({"tokens": pa.array([[1, 2], [], [3]], pa.large_list(pa.uint16()))}), tmp_path/"f.parquet")
    pages = TokenPages(tmp_path/"f.parquet")
    assert pages.files[0].way == "pyarrow" and pages.take([0], 3).tolist() == [[1, 2, 3]]

def test_one_token_documents_and_empty_file(tmp_path):
    flat = write(tmp_path/"one.parquet", [1] * 500)
    assert np.array_equal(TokenPages(tmp_path/"one.parquet").take([0], 500)[0], flat)
    with FileWriter(tmp_path/"none.parquet", FormatSettings(), {}) as w: pass
    assert verify_file(tmp_path/"none.parquet", w)["rows"] == 0 and len(TokenPages([tmp_path/"one.parquet", tmp_path/"none.parquet"])) == 500

def test_page_size_is_honoured(tmp_path):
    write(tmp_path/"p.parquet", np.random.default_rng(0).integers(1, 300, 2000), page_bytes=16384, row_group_rows=8192)
    count = TokenFile(tmp_path/"p.parquet").pages.count
    assert len(count) > 50 and 4 * count.max() < 2 * 16384

# -- loader --------------------------------------------------------------

@given(st.lists(st.integers(0, 5000), max_size=20), st.integers(1, 3000))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_take_equals_slices(files, starts, length):
    paths, flat = files; pages = TokenPages(paths)
    starts = [s for s in starts if s + length <= len(flat)]
    expected = np.array([flat[s:s + length] for s in starts], dtype=np.int32) if starts else np.empty((0, length), np.int32)
    assert np.array_equal(pages.take(starts, length), expected) and np.array_equal(_take_numpy(pages, np.array(starts, np.int64), length), expected)

@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 100))
@hypothesis_settings(max_examples=60, deadline=None)
def test_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, round_keys(seed, epoch))), np.arange(n))

def batches(loader, n=None):
    out = []
    for k, b in enumerate(loader, 1):
        out.append(b["input_ids"])
        if k == n: break
    return out

@pytest.mark.parametrize("shuffle", ["window", "page", "none"])
def test_same_order_for_every_world_size_and_resume(files, shuffle):
    make = lambda **k: TokenLoader(files[0], 64, 16, seed=3, shuffle=shuffle, group=4, **k)
    whole = batches(make())
    assert np.array_equal(torch.cat(whole).numpy(), np.stack([files[1][w * 64:(w + 1) * 64] for w in make().order(0)[:16 * len(whole)]]))
    for world in (2, 4, 8):
        assert torch.equal(torch.stack([torch.cat(r) for r in zip(*(batches(make(rank=r, world_size=world)) for r in range(world)))]), torch.stack(whole))
    rng = np.random.default_rng(0)
    for _ in range(5):
        stop, before, after = int(rng.integers(1, len(whole))), make(rank=0, world_size=int(rng.choice([1, 2, 4]))), int(rng.choice([1, 2, 8]))
        batches(before, stop); state = json.loads(json.dumps(before.state_dict()))
        assert state["step"] == stop
        rest = []
        for r in range(after):
            loader = make(rank=r, world_size=after); loader.load_state_dict(state); rest.append(batches(loader))
        assert all(torch.equal(torch.cat(parts), w) for parts, w in zip(zip(*rest), whole[stop:], strict=True))

@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(files, workers):
    a, b = (TokenLoader(files[0], 64, 16, seed=3, num_workers=n) for n in (0, workers))
    assert torch.equal(torch.stack(batches(a)), torch.stack(batches(b)))
    batches(b, 3); assert b.state_dict()["step"] == 3 and b.state_dict()["epoch"] == 1

def test_epochs_differ_and_state_at_the_end(files):
    loader = TokenLoader(files[0], 64, 16, seed=3)
    first, state = batches(loader), loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0) and not torch.equal(first[0], batches(loader, 1)[0])
    other = TokenLoader(files[0], 64, 16, seed=4)
    with pytest.raises(UserError, match="other data"): other.load_state_dict(state)

def test_boundaries_come_from_eos(files):
    batch = next(iter(TokenLoader(files[0], 256, 4)))
    for ids, pos, seq in zip(*(batch[k].numpy() for k in ("input_ids", "position_ids", "seq_idx"))):
        p = s = 0
        for t in range(256):
            if t and ids[t - 1] == 0: p, s = 0, s + 1
            assert (pos[t], seq[t]) == (p, s); p += 1

def test_small_data_and_bad_arguments(files, tmp_path):
    flat = write(tmp_path/"s.parquet", [50, 30])
    loader = TokenLoader(tmp_path/"s.parquet", 32, 8)
    assert len(loader) == 1 and next(iter(loader))["input_ids"].shape == (8, 32)
    for bad, word in ((dict(seq_len=100), "not one window"), (dict(batch_size=6, world_size=4), "divisible"), (dict(shuffle="row"), "shuffle"), (dict(rank=2, world_size=2), "rank")):
        with pytest.raises(UserError, match=word): TokenLoader(tmp_path/"s.parquet", **{"seq_len": 32, "batch_size": 8, **bad})

def test_text_rows_over_ranks_and_workers(files):
    paths, _ = files
    rows = lambda **k: [i for b in DataLoader(TextRows(paths, ["id", "text"], 16, **k), batch_size=None, num_workers=2) for i in b["id"]]
    assert sorted(rows()) == sorted(rows(rank=0, world_size=2) + rows(rank=1, world_size=2)) and len(rows()) == 455
    assert all(len(b["text"]) == 16 for b in list(TextRows(paths[0], batch_size=16))[:-1])

# -- held-out split, tokenizer ---------------------------------------------

def test_minimum_and_clusters():
    names = [f"d{i}" for i in range(1494)]
    def splits(ids, **k):
        rule = choose_heldout({"x": np.array([cluster_hash(i) for i in ids], np.uint64)}, {}, HeldoutSettings(**k))
        return [rule.split("x", i) for i in ids]
    for n, low in ((1494, 20), (60, 20), (61, 20)):
        got = splits(names[:n]); assert got.count("validation") >= low and got.count("test") >= low and got.count("training") >= n - 2 * max(low, int(.04 * n))
    assert splits(names[:59]).count("training") > 50
    assert splits(["a"] * 80).count("training") in (0, 80)  # one cluster never straddles
    big = [f"x{i}" for i in range(30000)]; assert 500 < splits(big).count("test") < 700

def test_document_cannot_smuggle_an_eos(tmp_path):
    tokenizer = as_pretrained(train_bpe(SENTENCES * 9, 400))
    rows = Encoder(tokenizer)(["가<|endoftext|>나<|user|>", ""])
    assert [(r == 0).sum() for r in rows] == [1, 1] and tokenizer.decode(rows[0][:-1]) == "가<|endoftext|>나<|user|>"

@given(st.text(max_size=60))
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(Encoder(tokenizer)([text])[0][:-1]) == text

@pytest.fixture(scope="module")
def tokenizer(): return as_pretrained(train_bpe(SENTENCES * 9, 400))

def test_missing_tokenizers_are_one_line(tmp_path):
    (tmp_path/"empty").mkdir(); (tmp_path/"bad").mkdir(); (tmp_path/"bad/tokenizer.json").write_text("{")
    for path in ("/no/such/folder", str(tmp_path/"empty"), str(tmp_path/"bad")):
        with pytest.raises(UserError) as e: load_tokenizer(path)
        assert "\n" not in str(e.value) and "tokenizer" in str(e.value)

# -- the driver --------------------------------------------------------------

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

def test_killed_between_domains_resumes_to_the_same_bytes(done, tmp_path, monkeypatch):
    from yunmin_efficientdata.format import phase
    shutil.copytree(Path(done[0], "deduped"), tmp_path/"deduped")
    original, calls = phase.write_domain, []
    def failing(ctx, splitter, domain, *a):
        calls.append(domain)
        if domain == "web" and calls.count("web") == 1: raise KeyboardInterrupt
        return original(ctx, splitter, domain, *a)
    monkeypatch.setattr(phase, "write_domain", failing)
    with pytest.raises(KeyboardInterrupt): phase.run(str(tmp_path), overrides=FAST)
    phase.run(str(tmp_path), overrides=FAST)
    assert calls.count("social") == 1 and data_files(tmp_path) == data_files(done[0])

def test_split_files_and_stale_ones(done, tmp_path):
    from yunmin_efficientdata.format.phase import run
    make(tmp_path, web=3000)
    run(str(tmp_path), overrides=FAST + ["format.file_bytes=100000"])
    entry = json.loads((tmp_path/"parquet_ready/manifest.json").read_text())["domains"]["web"]
    assert len(entry["files"]) > 2 and entry["files"][1] == f"parquet_ready/web-00001-of-{len(entry['files']):05d}.parquet" and entry["rows"] > 2800
    run(str(tmp_path), overrides=FAST)
    assert sorted(p.name for p in (tmp_path/"parquet_ready").glob("*.parquet")) == ["web.parquet"]

def test_users_mistakes_are_one_line(tmp_path):
    from yunmin_efficientdata.format.phase import run
    def message(ws, *overrides):
        with pytest.raises(UserError) as e: run(str(ws), overrides=[*FAST, *overrides])
        assert "\n" not in str(e.value); return str(e.value)
    assert "yunmin dedup" in message(tmp_path/"nothing")
    assert "yunmin dedup" in message(make(tmp_path/"empty", web=0))
    assert "no such folder" in message(make(tmp_path/"tok", web=5), "tokenizer.path=/no/such")
    broken = Path(make(tmp_path/"bad", web=5))/"deduped/web/part-00000.jsonl"; broken.write_text(broken.read_text() + "{oops\n")
    assert "part-00000.jsonl, line 6" in message(tmp_path/"bad")

def test_domain_with_only_heldout_documents(tmp_path):
    from yunmin_efficientdata.format.phase import run
    ids = [i for i in range(4000) if cluster_hash(f"tiny-{i}") < 2**64 * 0.02][:2]
    make(tmp_path, web=100)
    path = tmp_path/"deduped/tiny/part-00000.jsonl"; path.parent.mkdir()
    path.write_text("".join(json.dumps({"id": f"tiny-{i}", "text": "작은 도메인의 문서"}, ensure_ascii=False) + "\n" for i in ids))
    run(str(tmp_path), overrides=FAST)
    manifest = json.loads((tmp_path/"parquet_ready/manifest.json").read_text())
    assert manifest["domains"]["tiny"]["files"] == [] and manifest["heldout"]["validation"]["tiny"]["rows"] == 2

def test_near_duplicates_never_straddle(tmp_path):
    from yunmin_efficientdata.format.phase import run
    make(tmp_path, web=120, social=70)
    rows = [(f"web-{i}", f"c{i // 4}", True, f"web-{i}", "near") for i in range(100)] + [(f"social-{i}", f"c{i}", True, f"social-{i}", "near") for i in range(25)]
    folder = tmp_path/"minhash_lsh/clusters"; folder.mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(("id", "cluster", "keep", "keeper", "reason"), map(list, zip(*rows))))), folder/"part-00000.parquet")
    run(str(tmp_path), overrides=FAST)
    split_of, cluster_of = {}, {r[0]: r[1] for r in rows}
    for p in sorted((tmp_path/"parquet_ready").rglob("*.parquet")):
        for i in pq.read_table(p, columns=["id"])["id"].to_pylist(): split_of.setdefault(cluster_of.get(i, i), set()).add(p.parent.name)
    assert all(len(s) == 1 for s in split_of.values()) and {"validation", "test", "parquet_ready"} == set().union(*split_of.values())
