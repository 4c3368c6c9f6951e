"Phase 1: properties, faults, determinism, quality."
from __future__ import annotations
import json, os, random, time
from collections import defaultdict
from pathlib import Path
import numpy as np, pyarrow.parquet as pq, pytest
from yunmin_efficientdata.core.sample import write_sample
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import cluster, phase
from yunmin_efficientdata.dedup.minhash import token_ngrams
from yunmin_efficientdata.dedup.phase import run

DATA = ("dedup_ready/", "deduped/", "minhash_lsh/")

def files(ws: Path, skip=("manifest.json", "statistics.json", "sources.json", "audit.md")) -> dict[str, bytes]:
    store = open_store(ws)
    return {k: store.read(k) for p in DATA for k in store.list(p) if not k.endswith(skip)}

def write_raw(folder: Path, lines: list[str], cuts: list[int], name="web"):
    folder.mkdir(parents=True)
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(lines)])): (folder/f"{name}-{i}.jsonl").write_text("\n".join(lines[a:b]), encoding="utf-8")

def clusters_of(ws) -> dict[str, dict]:
    store = open_store(ws)
    return {r["id"]: r for k in store.list("minhash_lsh/clusters/") for r in pq.read_table(store.fetch(k)).to_pylist()}

def pairs_of(ws) -> list[dict]:
    store = open_store(ws)
    return [r for k in store.list("minhash_lsh/pairs/") for r in pq.read_table(store.fetch(k)).to_pylist()]

def texts_of(ws, prefix="dedup_ready/") -> dict[str, str]:
    store = open_store(ws)
    return {r["id"]: r["text"] for k in store.list(prefix) if "/part-" in k for r in map(json.loads, store.read_text(k).splitlines())}

WORDS = [a + b for a in "가나다라마바사아자차카타파하" for b in "물불산강꽃별달해밤낮길집"]

@pytest.fixture(autouse=True)
def quick_audit(request, monkeypatch):
    "Statistics and figures take longer than deduplicating these corpora; a few tests look at them."
    if request.node.name in ("test_sample_recall", "test_skips_reruns_and_leftovers"): return
    def audit(ctx, prepared, near):
        for key in phase.AUDIT_OUTPUTS: ctx.store.write(key, b"x")
        return {"docs_in": prepared["read"], "docs_out": sum(k["docs"] for k in near["kept"].values())}
    monkeypatch.setattr(phase, "audit", audit)

def corpus_lines(n=240, seed=0, ids=True) -> list[str]:
    "Documents with exact copies, edited copies, and repeats of given ids."
    rng, out = random.Random(seed), []
    for i in range(n):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 90)))
        if i % 5 == 4: text = out[rng.randrange(len(out))]["text"]
        if i % 7 == 6: text = " ".join([*(w := out[rng.randrange(len(out))]["text"].split())[:-1], rng.choice(WORDS)])
        record = {"text": text, "source": f"s{i % 3}", "date": f"2024-01-{i % 28 + 1:02}", "domain": "web" if i % 4 else "뉴스"}
        if ids and i % 3: record["id"] = i if i % 11 else "같은 번호"
        out.append(record)
    return [json.dumps(r, ensure_ascii=False) for r in out]

def test_components_without_numba(monkeypatch):
    edges = np.random.default_rng(0).integers(0, 200, (90, 2))
    labels = cluster.components(edges, 200)
    monkeypatch.setattr(cluster, "njit", None)
    again = cluster.components(edges, 200)
    assert ((labels[:, None] == labels) == (again[:, None] == again)).all()

# ---- the driver

SMALL = ["dedup.part_bytes=65536", "dedup.partitions=3"]

def test_same_bytes_for_workers_and_cuts(tmp_path):
    lines = corpus_lines()
    rng = random.Random(2); shuffled = rng.sample(lines, len(lines))
    write_raw(tmp_path/"a", lines, []); write_raw(tmp_path/"b", shuffled, [10, 11, 100]); write_raw(tmp_path/"c/d", lines, [120], "part")
    (tmp_path/"c/d").rename(tmp_path/"c/web")
    run(tmp_path/"1", raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
    run(tmp_path/"2", raw=str(tmp_path/"b"), workers=2, overrides=SMALL)
    run(tmp_path/"3", raw=str(tmp_path/"c"), workers=1, overrides=SMALL)
    one, two, three = (files(tmp_path/n) for n in "123")
    assert one == two == three and any(k.startswith("deduped/뉴스/") for k in one)

def test_decisions_hold(tmp_path):
    write_raw(tmp_path/"a", corpus_lines(300), [50]); run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1)
    texts, kept, rows, pairs = texts_of(tmp_path/"w"), texts_of(tmp_path/"w", "deduped/"), clusters_of(tmp_path/"w"), pairs_of(tmp_path/"w")
    sets = {i: set(token_ngrams(t)) for i, t in texts.items()}
    def true(a, b): return len(sets[a] & sets[b]) / len(sets[a] | sets[b])
    assert len(texts) > len(kept) > 0 and set(kept) == set(texts) - {i for i, r in rows.items() if not r["keep"]}
    assert all(abs(true(p["a"], p["b"]) - p["jaccard"]) < 1e-12 and p["jaccard"] >= 0.8 for p in pairs)
    assert not any(p["a"] in kept and p["b"] in kept for p in pairs)
    for i, r in rows.items():
        assert r["keep"] == (r["keeper"] == i) and r["keeper"] in kept and true(i, r["keeper"]) >= 0.8 and rows[r["keeper"]]["cluster"] == r["cluster"]
    exact = {i for i, r in rows.items() if r["reason"] == "exact" and not r["keep"]}
    ones = defaultdict(int)
    for p in pairs: ones[p["a"]] += p["jaccard"] == 1
    assert all(ones[i] == 1 for i in exact)
    ids = list(texts); missed = [(a, b) for n, a in enumerate(ids) for b in ids[:n] if sets[a] & sets[b] and true(a, b) >= 0.8 and rows.get(a, {}).get("cluster") != rows.get(b, {}).get("cluster", 0)]
    assert len(missed) <= 2

def test_keep_date_and_priority(tmp_path):
    text = " ".join(WORDS[:40])
    records = [{"id": "old", "text": text + " 더 긴 글", "date": "2020-01-01", "source": "x"}, {"id": "new", "text": text, "date": "2024-05-05", "source": "y"}]
    write_raw(tmp_path/"a", [json.dumps(r, ensure_ascii=False) for r in records], [])
    for n, (override, winner) in enumerate((([], "old"), (["dedup.keep=date"], "new"), (["dedup.source_priority=[y]"], "new"))):
        run(tmp_path/f"w{n}", raw=str(tmp_path/"a"), workers=1, overrides=override)
        assert set(texts_of(tmp_path/f"w{n}", "deduped/")) == {winner}

def test_killed_runs_end_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "VERIFY_CANDIDATES", 5)
    write_raw(tmp_path/"a", corpus_lines(), [60, 120]); run(tmp_path/"whole", raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
    for name, after in (("prepare_file", 1), ("prepare_range", 1), ("exact_part", 1), ("exact_partition", 1), ("sign_part", 1), ("join_partition", 1), ("verify_range", 2), ("fate_part", 1), ("write_part", 1)):
        import yunmin_efficientdata.dedup.prepare as prepare
        module = prepare if name.startswith("prepare") else cluster if name.startswith("exact") else phase
        original, calls = getattr(module, name), []
        def dies(task):
            if len(calls) >= after: raise KeyboardInterrupt
            calls.append(1); return original(task)
        with monkeypatch.context() as m:
            m.setattr(module, name, dies)
            with pytest.raises(KeyboardInterrupt): run(tmp_path/name, raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
        run(tmp_path/name, workers=1, overrides=SMALL)
        assert files(tmp_path/name) == files(tmp_path/"whole"), name

def test_skips_reruns_and_leftovers(tmp_path, capsys):
    write_raw(tmp_path/"a", corpus_lines(), [])
    run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
    before = files(tmp_path/"w"); capsys.readouterr()
    run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
    assert capsys.readouterr().out.count("skipped") >= 5 and files(tmp_path/"w") == before
    run(tmp_path/"w", workers=1, overrides=["dedup.partitions=2"])
    run(tmp_path/"fresh", raw=str(tmp_path/"a"), workers=1, overrides=["dedup.partitions=2"])
    assert files(tmp_path/"w") == files(tmp_path/"fresh")

def test_sources(tmp_path):
    lines = corpus_lines()
    write_raw(tmp_path/"a", lines[:100], []); write_raw(tmp_path/"b", lines[100:], []); write_raw(tmp_path/"ab", lines, [])
    run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1)
    write_raw(tmp_path/"empty", ['{"text": ""}'], [])
    with pytest.raises(UserError, match="no document"): run(tmp_path/"w2", raw=str(tmp_path/"empty"), workers=1)
    run(tmp_path/"w2", raw=str(tmp_path/"a"), workers=1)
    with pytest.raises(UserError, match="--append"): run(tmp_path/"w", raw=str(tmp_path/"b"), workers=1)
    run(tmp_path/"w", raw=str(tmp_path/"b"), workers=1, append=True)
    run(tmp_path/"w", workers=1)
    run(tmp_path/"one", raw=str(tmp_path/"ab"), workers=1)
    assert sorted(map(str, clusters_of(tmp_path/"w").values())) == sorted(map(str, clusters_of(tmp_path/"one").values())) and texts_of(tmp_path/"w", "deduped/") == texts_of(tmp_path/"one", "deduped/")
    run(tmp_path/"w", workers=1, compact=True)   # one order over both crawls
    assert {k: v for k, v in files(tmp_path/"w").items() if "keepers_changed" not in k} == files(tmp_path/"one")

@pytest.mark.parametrize("make, message", [
    (lambda d: None, "no such folder"), (lambda d: (d.mkdir(), (d/"a.txt").write_text("x")), "only those names"),
    (lambda d: write_raw(d, ['{"text": ""}', "x"], []), "no document is left"), (lambda d: write_raw(d, [""], []), "no document is left"),
    (lambda d: write_raw(d, [json.dumps({"text": "충분히 긴 글입니다", "domain": f"d{i}"}) for i in range(51)], []), "clean.max_domains"),
])
def test_one_clear_line(tmp_path, make, message):
    make(tmp_path/"raw_x")
    with pytest.raises(UserError, match=message) as e: run(tmp_path/"w", raw=str(tmp_path/"raw_x"), workers=1)
    assert "\n" not in str(e.value)

def test_no_raw_and_wrong_settings(tmp_path):
    with pytest.raises(UserError, match="yunmin sample"): run(tmp_path/"w", workers=1)
    with pytest.raises(UserError, match="num_perm"): run(tmp_path/"w", workers=1, overrides=["dedup.bands=99", "dedup.rows=2"])
    with pytest.raises(UserError, match="no rule"): write_raw(tmp_path/"a", corpus_lines(20), []); run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1, overrides=["clean.rules={nosuch: true}"])

def test_odd_domains_and_gz(tmp_path):
    import gzip
    (tmp_path/"raw/2024").mkdir(parents=True)
    records = [{"text": "하나의 충분한 글입니다", "domain": "../evil/x"}, {"text": "둘째 충분한 글입니다", "domain": "quarantine"}, {"text": "셋째 충분한 글입니다", "domain": 7}, {"text": "넷째 충분한 글입니다"}]
    (tmp_path/"raw/2024/법령-1.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(r) for r in records).encode()))
    (tmp_path/"raw/notes.md").write_text("ignored")
    run(tmp_path/"w", raw=str(tmp_path/"raw"), workers=1)
    assert {p.name for p in (tmp_path/"w/deduped").iterdir()} == {"evil_x", "quarantine_", "7", "법령"} or {p.name for p in (tmp_path/"w/deduped").iterdir()} == {"_evil_x", "quarantine_", "7", "법령"}
    assert json.loads((tmp_path/"w/dedup_ready/manifest.json").read_text())["ignored"] == ["notes.md"]

def test_levels_can_be_switched_on_and_off(tmp_path):
    "Contamination, meaning, spans: each takes what it should, counts add up, and switching all off again gives what there was before."
    rng = random.Random(5)
    notice = " ".join(rng.choices(WORDS, k=30)) + "입니다."
    records = [{"id": f"d{i}", "text": f"{' '.join(rng.choices(WORDS, k=40))}.\n\n{notice}", "domain": "web"} for i in range(60)]
    records[7]["text"] = notice  # nothing of its own
    leak = " ".join(rng.choices(WORDS, k=20)); records[3]["text"] += f"\n\n{leak}"
    (tmp_path/"eval.jsonl").write_text(json.dumps({"question": leak}, ensure_ascii=False))
    write_raw(tmp_path/"a", [json.dumps(r, ensure_ascii=False) for r in records], [])
    vectors = np.eye(60, 64, dtype=np.float32); vectors[20] = vectors[21]
    (tmp_path/"vectors").mkdir(); np.save(tmp_path/"vectors/a.npy", vectors); (tmp_path/"vectors/a.ids.txt").write_text("\n".join(r["id"] for r in records))
    def go(ws, *more): return run(tmp_path/ws, raw=str(tmp_path/"a"), workers=1, overrides=[*SMALL, "dedup.contamination.sets=[]", *more])
    go("plain"); before = files(tmp_path/"plain")
    levels = [f"dedup.contamination.sets=[{tmp_path/'eval.jsonl'}]", "dedup.contamination.remove=true", f"dedup.semantic.embeddings={tmp_path/'vectors'}", "dedup.spans.levels=[paragraph,sentence]"]
    summary = go("plain", *levels)
    kept, counts = texts_of(tmp_path/"plain", "deduped/"), json.loads((tmp_path/"plain/ledger/dedup.write.json").read_text())["counts"]
    assert summary["contaminated"] == 1 and {f: c["docs"] for f, c in counts["fates"]["web"].items() if f != "cut"} == {"contaminated": 1, "semantic": 1, "emptied": 1}
    assert len(kept) == 57 and not {"d3"} & set(kept) and len({"d20", "d21"} & set(kept)) == 1
    assert sum(notice in t for t in kept.values()) == 1 and counts["fates"]["web"]["cut"]["docs"] == 57 - ("d7" not in kept)
    assert counts["kept"]["web"]["bytes"] == sum(len(t.encode()) for t in kept.values())
    go("fresh", *levels)
    assert files(tmp_path/"fresh") == files(tmp_path/"plain")
    go("plain"); assert files(tmp_path/"plain") == before

def test_representatives_of_hot_buckets_are_compared(tmp_path):
    "A chain of templates: whatever leads a bucket, few near-duplicates stay, and all are one component."
    rng, base = random.Random(0), rng_words(80)
    def changed(i): k = rng.randrange(80); return " ".join([*base[:k], f"번호{i}", *base[k + 1:]])
    write_raw(tmp_path/"a", [json.dumps({"text": changed(i)}, ensure_ascii=False) for i in range(4000)], [])
    summary = run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1)
    rows = clusters_of(tmp_path/"w")
    assert len(rows) == 4000 and len({r["cluster"] for r in rows.values()}) == 1 and summary["docs_out"] < 150

def rng_words(n): return random.Random(9).sample(WORDS, n)

def test_template_floods_stay_linear(tmp_path):
    "Thousands of nearly identical documents: one component, one survivor, no quadratic time."
    rng, base = random.Random(0), WORDS[:60]
    lines = [json.dumps({"text": " ".join([*base[:(k := rng.randrange(60))], f"{i}", *base[k + 1:]]), "domain": "web"}, ensure_ascii=False) for i in range(3000)]
    lines += [json.dumps({"text": " ".join(base)}, ensure_ascii=False)] * 3000
    write_raw(tmp_path/"a", lines, [])
    start = time.process_time()
    summary = run(tmp_path/"w", raw=str(tmp_path/"a"), workers=1)
    assert summary["candidates"] < 500_000 and time.process_time() - start < 25
    rows = clusters_of(tmp_path/"w")
    assert len({r["cluster"] for r in rows.values()}) == 1 and len(rows) == 6000
    assert summary["docs_out"] < 200

def test_sample_recall(tmp_path):
    store = open_store(tmp_path/"w"); write_sample(store, documents=1500, seed=3, duplicate_rate=0.3)
    run(tmp_path/"w", workers=1)
    stats = json.loads(store.read("dedup_ready/statistics.json"))
    assert stats["planted"]["exact"]["recall"] == 1 and stats["planted"]["near"]["recall"] >= 0.98
    assert len(stats["sampled_pairs"]) == 10 and all(p["true"] >= 0.8 for p in stats["sampled_pairs"])
    review = store.read_text("dedup_ready/review_samples.md")
    assert review.count("### ") == 25 and review.count("unchanged") == 0
    assert all(store.exists(f"reports/figures/dedup_{n}.png") for n in ("rates", "clusters", "recall"))

def test_real_text_against_all_pairs(tmp_path):
    folder = os.environ.get("YUNMIN_CORPUS")
    if not folder or not (Path(folder)/"small").is_dir(): pytest.skip("YUNMIN_CORPUS does not name the real corpus")
    (tmp_path/"raw").mkdir()
    for d in ("main_data", "web"): (tmp_path/f"raw/{d}.jsonl").write_bytes((Path(folder)/f"small/{d}.jsonl").read_bytes())
    run(tmp_path/"w", raw=str(tmp_path/"raw"), workers=1)
    sets = {i: set(token_ngrams(t)) for i, t in texts_of(tmp_path/"w").items() if len(t.split()) >= 5}
    where = defaultdict(list)
    for i, s in sets.items():
        for x in s: where[x].append(i)
    near = {(a, b) for w in where.values() if len(w) < 500 for n, a in enumerate(w) for b in w[:n]}
    truth = [(a, b) for a, b in near if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= 0.8]
    rows = clusters_of(tmp_path/"w")
    found = sum(a in rows and b in rows and rows[a]["cluster"] == rows[b]["cluster"] for a, b in truth)
    assert len(truth) > 20 and found / len(truth) >= 0.99

def test_s3_gives_the_same_files(tmp_path, monkeypatch):
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    for k, v in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}.items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    lines = corpus_lines(); write_raw(tmp_path/"a", lines, [])
    run(tmp_path/"local", raw=str(tmp_path/"a"), workers=1, overrides=SMALL)
    with moto.mock_aws():
        client = boto3.client("s3"); client.create_bucket(Bucket="corpus-1")
        for i, part in enumerate((lines[:70], lines[70:])): client.put_object(Bucket="corpus-1", Key=f"crawl/web-{i}.jsonl", Body="\n".join(part).encode())
        run("s3://corpus-1/ws", raw="s3://corpus-1/crawl", workers=1, overrides=SMALL)
        assert files("s3://corpus-1/ws") == files(tmp_path/"local")

def test_a_collision_removes_nothing(tmp_path, monkeypatch):
    "Hashes that meet by chance (here: nearly all do) are told apart by the words themselves."
    from yunmin_efficientdata.dedup import prepare
    write_raw(tmp_path/"a", corpus_lines(), [100])
    run(str(tmp_path/"1"), raw=str(tmp_path/"a"), workers=1)
    real = prepare.measure
    monkeypatch.setattr(prepare, "measure", lambda texts: (*(m := real(texts))[:2], m[2] & np.uint64(3)))
    run(str(tmp_path/"2"), raw=str(tmp_path/"a"), workers=1)
    a, b = ({k: v for k, v in files(tmp_path/n).items() if "/index/" not in k} for n in "12")
    assert a == b and any(r["reason"] == "exact" for r in clusters_of(tmp_path/"2").values())
