"Semantic duplicates: any embedding folder, exact arithmetic, predicted recall, keepers within the threshold."
from __future__ import annotations
import json, random
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings as hyp, strategies as st
from stages import Ctx, Stage
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import semantic as m
from yunmin_efficientdata.dedup.lsh import keeper_order
from yunmin_efficientdata.dedup.prepare import Corpus, list_raw, load_array, prepare, write_fate
from yunmin_efficientdata.dedup.semantic import find_semantic, join_ids, list_embeddings, project, read_ids, read_vectors, trigram_embedding, unit_rows

WORDS = [a + b for a in "가나다라마바사아자차카타파하" for b in "물불산강꽃별달해밤낮길집"]

def clustered(n=400, d=96, seed=0, cone=0.5):
    "Vectors in a cone; two thirds are noisy copies of earlier ones, some near the threshold."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + cone * d**0.5 * np.eye(d)[0]
    x /= np.linalg.norm(x, axis=1)[:, None]
    for i in range(n // 3, n):
        e = rng.normal(size=d); e /= np.linalg.norm(e)
        x[i] = x[rng.integers(0, i)] + rng.choice([0.0, 0.05, 0.2, 0.35]) * e
    return (x * rng.uniform(0.1, 10, size=(n, 1))).astype(np.float32)

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A prepared workspace of 400 documents in several parts, to be copied."
    ws, rng = open_store(tmp_path_factory.mktemp("prepared")), random.Random(1)
    rows = [{"id": f"d{i:03}", "text": " ".join(rng.choices(WORDS, k=rng.randint(30, 60))), "source": f"s{i % 3}", "date": f"2024-01-{1 + i % 28:02}", "domain": "web" if i % 3 else "뉴스"} for i in range(400)]
    ws.write("raw/web.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    prepare(Ctx(ws, "dedup.part_bytes=65536"), Stage(), *list_raw(ws, "raw/"), ["raw/"])
    return ws

@pytest.fixture
def ws(prepared, tmp_path):
    out = open_store(tmp_path)
    for prefix in ("dedup_ready/", "minhash_lsh/index/"):
        for k in prepared.list(prefix): out.write(k, prepared.read(k))
    return out

def ids_of(corpus): return [i for p in range(len(corpus.parts)) for i in corpus.table(p, ["id"])["id"]]

def put_parquet(ws, key, ids, x, type=None):
    t = pa.table({"id": pa.array(list(ids)), "embedding": pa.array(list(x), type or pa.list_(pa.float32()))})
    with ws.output(key) as path: pq.write_table(t, path)

def put_npy(ws, key, ids, x):
    with ws.writer(key + ".npy") as f: np.save(f, x)
    ws.write(key + ".ids.txt", "".join(f"{i}\n" for i in ids))

def results(ws): return {k: ws.read(k) for k in ws.list("minhash_lsh/semantic/")}

def context(ws, *more, workers=1): return Ctx(ws, f"dedup.semantic.embeddings={ws.uri}/e", "dedup.semantic.threshold=0.95", *more, workers=workers)

# ---- reading

def refused(ws, run=None):
    with pytest.raises(UserError, match="dedup.semantic.embeddings") as e:
        for f in list_embeddings(f"{ws.uri}/e"):
            for _ in read_ids(f): pass
            for _ in read_vectors(f): pass
        if run: find_semantic(context(ws), Stage())
    assert "\n" not in str(e.value)
    return str(e.value)

def test_bad_folders_and_files_are_one_line(ws):
    assert "no such folder" in refused(ws)
    ws.write("e/readme.txt", "-"); assert "holds no .parquet and no .npy" in refused(ws)
    def only(make):
        ws.delete_prefix("e"); make(); return refused(ws)
    x = np.ones((3, 4), np.float32)
    assert "a.parquet: is no Parquet file" in only(lambda: ws.write("e/a.parquet", b"PAR1 but no"))
    assert "a.parquet: has the columns id, vector" in only(lambda: pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), ws.root/"e/a.parquet") if (ws.write("e/x", b""), ws.delete("e/x")) else None)
    assert "embedding is list<" in only(lambda: put_parquet(ws, "e/a.parquet", "abc", [[1, 2]] * 3, pa.list_(pa.int64())))
    assert "row 1 has no embedding" in only(lambda: put_parquet(ws, "e/a.parquet", "abc", [[1.0, 2], None, [1.0, 2]]))
    assert "row 2 has 3 dimensions, those before 2" in only(lambda: put_parquet(ws, "e/a.parquet", "abc", [[1.0, 2], [1.0, 2], [1.0, 2, 3]]))
    assert "row 1 holds NaN" in only(lambda: put_parquet(ws, "e/a.parquet", "abc", [[1.0, 2], [float("nan"), 2], [1.0, 2]]))
    assert "b.npy: row 2 holds NaN or infinity" in only(lambda: put_npy(ws, "e/b", "abc", np.array([[1, 2], [1, 2], [1, np.inf]])))
    assert "b.npy: holds int64" in only(lambda: put_npy(ws, "e/b", "abc", np.ones((3, 4), int)))
    assert "b.ids.txt: 2 ids for 3 rows" in only(lambda: put_npy(ws, "e/b", "ab", x))
    assert "b.npy: is no array that numpy reads" in only(lambda: (put_npy(ws, "e/b", "abc", x), ws.write("e/b.npy", b"junk")))
    assert "b.npy: b.ids.txt is missing" in only(lambda: (put_npy(ws, "e/b", "abc", x), ws.delete("e/b.ids.txt")))
    def pickled():
        with ws.writer("e/b.npy") as f: np.save(f, np.array([[1, None]], object), allow_pickle=True)
        ws.write("e/b.ids.txt", "a")
    assert "without unpickling" in only(pickled)

def test_files_of_two_models_are_refused(ws):
    ids = ids_of(Corpus(ws))
    put_npy(ws, "e/a", ids[:3], np.ones((3, 4))); put_npy(ws, "e/b", ids[3:5], np.ones((2, 5)))
    said = refused(ws, run=True)
    assert "a.npy" in said and "b.npy" in said and "4 and 5 dimensions" in said

def test_ids_of_another_corpus_are_refused(ws):
    put_npy(ws, "e/a", ["x", "y"], np.ones((2, 4)))
    assert "none of the 2 ids" in refused(ws, run=True) and "d" in refused(ws, run=True)

@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=25, unique_by=lambda x: x[0]), st.lists(st.integers(0, 40), max_size=40))
@hyp(max_examples=150, deadline=None)
def test_join_is_that_of_a_dictionary(docs, vectors):
    h = lambda ids: m._id_hashes([str(i) for i in ids]) if ids else np.empty((0, 2), np.uint64)
    rows, counts = join_ids(np.column_stack([h([d for d, _ in docs]), np.array([2 * d + k for d, k in docs], np.uint64)]), np.column_stack([h(vectors), np.arange(len(vectors), dtype=np.uint64)]))
    kept, first = dict(docs), {}
    for place, v in enumerate(vectors):
        if v in kept: first.setdefault(v, place)
    assert rows.tolist() == sorted([p, v] for v, p in first.items() if kept[v])
    assert counts == {"unknown": sum(v not in kept for v in vectors), "repeated": sum(v in kept for v in vectors) - len(first), "removed_before": sum(not kept[v] for v in first)}

# ---- arithmetic

@given(st.integers(2, 300), st.integers(1, 9), st.integers(0, 9))
@hyp(max_examples=40, deadline=None)
def test_projection_is_exact_and_blind_to_batches(d, step, seed):
    x, rows = unit_rows(np.random.default_rng(seed).normal(size=(20, d)) * 10.0 ** np.random.default_rng(seed).integers(-200, 200, size=(20, 1)))
    assert len(rows) == 20 and np.allclose((x.astype(float)**2).sum(axis=1), 1, atol=1e-5)
    y = project(x, 16)
    assert (y == np.vstack([project(x[i:i + step], 16) for i in range(0, 20, step)])).all()
    if d > 16: assert (y == np.rint(x * m.UNIT).astype(np.int64) @ m.random_signs(d, 16, 1).astype(np.int64)).all()

def test_signs_are_fair():
    s = m.random_signs(500, 200, 1)
    assert set(np.unique(s)) == {-1, 1} and abs(s.mean()) < 0.01 and abs((s.T @ s / 500 - np.eye(200)).std() - 500**-0.5) < 0.01
    assert (s[:100].ravel()[:100] != m.random_signs(500, 200, 2).ravel()[:100]).any()

@pytest.mark.parametrize("projected", [True, False])
def test_predicted_recall_is_measured(projected):
    rng, n, d, threshold = np.random.default_rng(3), 3000, 200 if projected else 48, 0.9
    x, e = rng.normal(size=(n, d)) + 0.7 * d**0.5 * np.eye(d)[0], rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1)[:, None]
    e -= (e * x).sum(axis=1)[:, None] * x; e /= np.linalg.norm(e, axis=1)[:, None]
    flat = [project(v.astype(np.float32), 48) for v in (x, threshold * x + (1 - threshold**2)**0.5 * e)]
    mean = np.rint(np.concatenate(flat).mean(axis=0)).astype(int).tolist()
    unit = m.UNIT**2 * (48 if projected else 1)
    spread = 1 - sum(k * k for k in mean) / unit
    for bits, bands in ((6, 6), (10, 20)):
        a, b = (m.band_codes(f, mean, bits, bands) for f in flat)
        near = ((flat[0].astype(float) - flat[1])**2).sum(axis=1) <= 2 * (1 - threshold) * unit * (1 + m._reach(48, projected)) + 99
        assert abs(m.predicted_recall(threshold, spread, bits, bands, 48, projected) - ((a == b).any(axis=0) & near).mean()) < 0.05

# ---- the whole step

def truth(corpus, have, threshold=0.95):
    x = np.array([have[i] for i in sorted(have)], float); x /= np.linalg.norm(x, axis=1)[:, None]
    names, c = sorted(have), x @ x.T
    return {(names[i], names[j]): c[i, j] for i, j in np.argwhere(np.triu(c >= threshold, 1))}

@pytest.mark.parametrize("dimensions", [24, 200])
def test_against_all_pairs(ws, dimensions):
    corpus = Corpus(ws); ids = ids_of(corpus)
    have = dict(zip(random.Random(0).sample(ids, len(ids)), clustered()))
    put_parquet(ws, "e/a.parquet", have, have.values())
    ctx = context(ws, f"dedup.semantic.dimensions={dimensions}", "dedup.source_priority=[s2,뉴스]")
    counts = find_semantic(ctx, Stage())
    want = truth(corpus, have)
    pairs = pq.read_table(ws.fetch("minhash_lsh/semantic/pairs.parquet")).to_pylist()
    gone, order = {p["b"] for p in pairs}, {d: k for k, d in enumerate(keeper_order(corpus, np.arange(len(ids)), ctx.settings.dedup).tolist())}
    number = {i: n for n, i in enumerate(ids)}
    assert len(want) > 100 and counts["edges"] >= 0.97 * len(want) and counts["removed"] == len(pairs) == len(gone)
    for p in pairs:
        assert p["a"] not in gone and order[number[p["a"]]] < order[number[p["b"]]]
        assert abs(want[tuple(sorted((p["a"], p["b"])))] - p["cosine"]) < 1e-5
    assert sum(a not in gone and b not in gone for a, b in want) <= 0.03 * len(want)
    rows = np.concatenate([corpus.starts[i] + load_array(ws, f"minhash_lsh/semantic/{p['name']}.npy") for i, p in enumerate(corpus.parts)])
    assert {ids[r] for r in rows} == gone and sum(counts["by_domain"].values()) == len(gone) and not ws.list("minhash_lsh/spill/")

def test_same_bytes_whatever_the_files_types_and_workers(ws, monkeypatch):
    corpus = Corpus(ws); ids = ids_of(corpus)
    x = clustered(seed=1).astype(np.float16).astype(np.float32)
    shuffled = random.Random(2).sample(range(400), 400)
    seen = []
    def go(workers=1):
        with (ctx := context(ws, "dedup.semantic.dimensions=32", workers=workers)).executor: counts = find_semantic(ctx, Stage())
        seen.append((results(ws), counts)); ws.delete_prefix("e"); ws.delete_prefix("minhash_lsh/semantic")
    put_parquet(ws, "e/a.parquet", ids, x); go()
    put_parquet(ws, "e/a.parquet", ids[:150], x[:150], pa.large_list(pa.float64())); put_npy(ws, "e/sub/b", ids[150:], x[150:].astype(np.float64)); go(2)
    put_npy(ws, "e/z", [ids[i] for i in shuffled[:200]], x[shuffled[:200]].astype(np.float16)); put_parquet(ws, "e/a.parquet", [ids[i] for i in shuffled[200:]], x[shuffled[200:]], pa.list_(pa.float32(), 96)); put_npy(ws, "e/empty", [], x[:0]); put_parquet(ws, "e/none.parquet", pa.array([], pa.string()), [])
    monkeypatch.setattr(m, "READ_ROWS", 37); monkeypatch.setattr(m, "CHUNK", 50); monkeypatch.setattr(m, "COMPARE_ROWS", 20); monkeypatch.setattr(m, "SHARE_ROWS", 100); monkeypatch.setattr(m, "MATCH_ROWS", 30); monkeypatch.setattr(m, "BLOCK", 500)
    go()
    assert seen[0] == seen[1] == seen[2] and seen[0][1]["removed"] > 50

def test_counts(ws):
    corpus = Corpus(ws); ids = ids_of(corpus)
    x = clustered(seed=2); x[5] = 0
    fate = np.zeros(corpus.parts[0]["docs"], np.uint8); fate[:3] = 2
    write_fate(corpus, 0, fate)
    put_npy(ws, "e/a", ids[:300] + ids[:4] + ["stranger"], np.vstack([x[:300], x[:4] * 2, x[:1]]))
    c = find_semantic(context(ws), Stage())
    assert (c["documents"], c["vectors"], c["embedded"], c["zero"], c["unknown"], c["repeated"], c["removed_before"], c["without_embedding"]) == (397, 305, 296, 1, 1, 4, 3, 101)
    assert not set(load_array(ws, f"minhash_lsh/semantic/{corpus.parts[0]['name']}.npy").tolist()) & {0, 1, 2}

def test_no_pair_and_all_alike(ws):
    ids = ids_of(Corpus(ws))
    put_npy(ws, "e/a", ids, np.eye(400, dtype=np.float32)); c = find_semantic(context(ws), Stage())
    assert (c["removed"], pq.read_table(ws.fetch("minhash_lsh/semantic/pairs.parquet")).num_rows) == (0, 0)
    put_npy(ws, "e/a", ids, np.ones((400, 8), np.float32)); c = find_semantic(context(ws, "dedup.semantic.threshold=1.0"), Stage())
    assert (c["removed"], c["hot_buckets"] > 0, c["unreached"], c["edges"]) == (399, True, 0, 399)
    put_npy(ws, "e/a", ids[:1], np.ones((1, 8), np.float32)); assert find_semantic(context(ws), Stage())["removed"] == 0

def test_resumes_where_it_was_killed(ws):
    ids = ids_of(Corpus(ws))
    x = clustered(seed=3)
    put_npy(ws, "e/a", ids[:200], x[:200]); put_npy(ws, "e/b", ids[200:], x[200:])
    whole = Stage()
    find_semantic(context(ws), whole); want = results(ws)
    class Killed(Exception): pass
    class Mortal(Stage):
        def mark_part(self, p, info=None):
            super().mark_part(p, info); self.lives -= 1
            if not self.lives: raise Killed
    for lives in range(1, len(whole.parts) + 1, 9):
        ws.delete_prefix("minhash_lsh/semantic")
        stage = Mortal(); stage.lives = lives
        with pytest.raises(Killed): find_semantic(context(ws), stage)
        find_semantic(context(ws), stage)
        assert results(ws) == want

def test_a_crowd_is_linear_work():
    "50,000 vectors in one bucket around three centres, and 5,000 strangers: the strangers' comparisons are bounded and counted."
    rng = np.random.default_rng(5)
    crowd = (rng.integers(0, 3, size=(50_000, 1)) * 4000 + rng.integers(-3, 4, size=(50_000, 16))).astype(np.int16)
    pairs, (missed,) = m._grow(m._led_pairs, crowd, 2000, 1800, m.COMPARISONS)
    assert missed == 0 and len(np.unique(pairs[:, 0])) == 3 and len(pairs) == 49_997
    strangers = rng.integers(-30000, 30000, size=(5000, 16)).astype(np.int16)
    pairs, (missed,) = m._grow(m._led_pairs, strangers, 2000, 1800, 1 << 20)
    assert len(pairs) == 0 and 4700 < missed < 5000

def test_embeddings_on_s3(s3, ws):
    ids = ids_of(Corpus(ws)); x = clustered(seed=4)
    far = open_store(s3.uri)
    put_parquet(far, "vectors/a.parquet", ids[:200], x[:200]); put_npy(far, "vectors/b", ids[200:], x[200:])
    put_npy(ws, "e/a", ids, x)
    here = find_semantic(context(ws), Stage()); want = results(ws)
    there = find_semantic(context(ws, f"dedup.semantic.embeddings={s3.uri}/vectors"), Stage())
    assert results(ws) == want and here == there
    with pytest.raises(UserError, match="no such folder"): list_embeddings(f"{s3.uri}/nothing")

def test_real_text_with_trigrams(corpus, tmp_path):
    "Real documents and copies with their sentences in another order: all copies are found, and what is removed is that close."
    ws, rng = open_store(tmp_path), random.Random(6)
    texts = [json.loads(line)["text"] for d in ("web", "main_data", "textbook") for line in (corpus/f"small/{d}.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [t for t in texts if len(t.split()) > 80][:240]
    def shuffle(t): parts = [" ".join(t.split()[i:i + 12]) for i in range(0, len(t.split()), 12)]; rng.shuffle(parts); return " ".join(parts)
    rows = [{"id": f"d{i}", "text": t} for i, t in enumerate(texts)] + [{"id": f"c{i}", "text": shuffle(t)} for i, t in enumerate(texts[:120])]
    ws.write("raw/web.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    ctx = context(ws, "clean.rules={}")
    prepare(ctx, Stage(), *list_raw(ws, "raw/"), ["raw/"])
    c = Corpus(ws); ids = ids_of(c)
    have = {i: trigram_embedding(t, 1024) for i, t in zip(ids, c.texts(np.arange(len(c))))}
    put_parquet(ws, "e/a.parquet", have, have.values())
    counts, want = find_semantic(ctx, Stage()), truth(c, have)
    removed = pq.read_table(ws.fetch("minhash_lsh/semantic/pairs.parquet")).to_pylist()
    both = {i[1:] for i in ids if i[0] == "d"} & {i[1:] for i in ids if i[0] == "c"}
    assert len(both) > 90 and len({p["b"][1:] for p in removed} & both) >= 0.98 * sum((f"c{i}", f"d{i}") in want for i in both)
    for p in removed: assert want[tuple(sorted((p["a"], p["b"])))] >= 0.95 - 1e-5
