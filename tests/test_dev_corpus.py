"""Phase 1 on the whole development corpus, 263,634 documents: quality against the exact truth, memory, determinism, Korean variants, hostile input.
Minutes each, so apart from the others: `YUNMIN_CORPUS=FOLDER scripts/run_tests.sh -m slow -s tests/test_dev_corpus.py`."""
from __future__ import annotations
import gzip, hashlib, json, random, re, subprocess, sys, unicodedata
from pathlib import Path
import numpy as np, pyarrow.parquet as pq, pytest
from yunmin_efficientdata.bench.dedup import exact_pairs
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup.minhash import jaccard_pairs, shingle_sets

pytestmark = pytest.mark.slow
STAGES = ("prepare", "contamination", "exact", "near", "write", "audit")

@pytest.fixture(scope="module")
def dev(corpus):
    if not (corpus/"dev").is_dir(): pytest.skip(f"{corpus}/dev does not exist")
    return corpus/"dev"

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("dev")

def dedup(ws: Path, raw: Path, *sets: str, workers: int = 1) -> dict[str, dict]: # ledger entries
    "Phase 1 in a process of its own, so that memory is that of the phase alone."
    command = [sys.executable, "-c", "from yunmin_efficientdata.cli import main; main()", "dedup", str(ws), "--raw", str(raw), "--workers", str(workers)]
    subprocess.run(command + [x for s in sets for x in ("--set", s)], check=True, stdout=subprocess.DEVNULL)
    return {s: json.loads((ws/f"ledger/dedup.{s}.json").read_text()) for s in STAGES if (ws/f"ledger/dedup.{s}.json").exists()}

def show(title: str, entries: dict[str, dict]) -> None:
    print(f"\n{title}")
    for name, e in entries.items(): print(f"  {name:14} {e['cpu_seconds']:8.1f} CPU s {e['seconds']:8.1f} s {e['peak_rss_mb']:7.0f} MB")
    print(f"  {'total':14} {sum(e['cpu_seconds'] for e in entries.values()):8.1f} CPU s {sum(e['seconds'] for e in entries.values()):8.1f} s {max(e['peak_rss_mb'] for e in entries.values()):7.0f} MB")

def rows(ws: Path, prefix: str) -> list[dict]:
    return [r for p in sorted((ws/prefix).rglob("*.parquet")) for r in pq.read_table(p).to_pylist()]

def texts(ws: Path) -> dict[str, str]:
    return {r["id"]: r["text"] for p in sorted((ws/"dedup_ready").glob("*/part-*.jsonl")) for r in map(json.loads, p.open(encoding="utf-8"))}

@pytest.fixture(scope="module")
def whole(dev, folder):
    entries = dedup(folder/"whole", dev)
    show("the whole corpus, one worker", entries)
    return folder/"whole", entries

def test_quality_against_the_exact_truth(whole):
    ws = whole[0]
    text, cluster = texts(ws), {r["id"]: r for r in rows(ws, "minhash_lsh/clusters")}
    copies = {i for i, r in cluster.items() if r["reason"] == "exact" and not r["keep"]}
    ids = [i for i, t in text.items() if i not in copies and len(t.split()) >= 5]
    truth, similarity = exact_pairs((text[i] for i in ids), 0.8)
    def label(i): return cluster[i]["cluster"] if i in cluster else None
    found = np.array([label(ids[a]) is not None and label(ids[a]) == label(ids[b]) for a, b in truth.tolist()])
    recorded = {tuple(sorted((r["a"], r["b"]))): r["jaccard"] for r in rows(ws, "minhash_lsh/pairs")}
    as_edge = np.array([tuple(sorted((ids[a], ids[b]))) in recorded for a, b in truth.tolist()])
    wanted = sorted(recorded) + [(i, r["keeper"]) for i, r in cluster.items() if not r["keep"]]
    names = sorted({i for p in wanted for i in p}); place = {i: n for n, i in enumerate(names)}
    true = jaccard_pairs(*shingle_sets(text[i] for i in names), np.array([[place[a], place[b]] for a, b in wanted]))
    print(f"\n{len(ids):,} documents of 5 words or more, {len(truth):,} true pairs at J >= .8: {found.mean():.5f} in one component, {as_edge.mean():.5f} as an edge; {len(recorded):,} recorded pairs, "
          f"{(true[:len(recorded)] >= 0.8).mean():.5f} of them true; smallest similarity of a removed document with its keeper {true[len(recorded):].min():.4f}")
    assert found.mean() >= 0.99 and (true >= 0.8).all()
    assert all(abs(recorded[p] - j) < 1e-9 for p, j in zip(sorted(recorded), true))
    kept = {i for i in text if i not in cluster or cluster[i]["keep"]}
    assert not any(a in kept and b in kept for a, b in recorded)
    written = {json.loads(line)["id"] for p in (ws/"deduped").glob("*/part-*.jsonl") for line in p.open(encoding="utf-8")}
    assert written == kept

def digest(ws: Path) -> str:
    "Of all data files of phase 1, names included."
    store, h = open_store(ws), hashlib.sha256()
    for prefix in ("dedup_ready/", "deduped/", "minhash_lsh/"):
        for key in store.list(prefix):
            if key.endswith(("sources.json", "statistics.json", "audit.md")) or "/quarantine/" in key or key.endswith("manifest.json"): continue
            h.update(key.encode()); h.update(store.read(key))
    return h.hexdigest()

def test_same_bytes_for_workers_and_files(whole, dev, folder):
    rng, lines = random.Random(1), []
    for p in sorted(dev.glob("*.jsonl.gz")): lines += [(p.name.split(".")[0], line) for line in gzip.open(p)]
    rng.shuffle(lines)
    cut = folder/"cut"; cut.mkdir()
    for i in range(23):
        with open(cut/f"{i:02}.jsonl", "wb") as f: f.writelines(line for _, line in lines[i::23])
    del lines
    digests = {"1 worker": digest(whole[0])}
    for name, raw, workers in (("2 workers", dev, 2), ("4 workers", dev, 4), ("2 workers, 23 shuffled files", cut, 2)):
        show(name, dedup(folder/"again", raw, "dedup.audit.planted=0", workers=workers))
        digests[name] = digest(folder/"again")
        subprocess.run(["rm", "-rf", str(folder/"again")])
    print("\n" + "\n".join(f"  {d[:16]} {n}" for n, d in digests.items()))
    assert len(set(digests.values())) == 1

def multiply(dev: Path, out: Path, times: int) -> None:
    "The corpus several times: in each further copy every fifth word is another, so that no copy resembles another one."
    out.mkdir()
    for p in sorted(dev.glob("*.jsonl.gz")):
        with gzip.open(p, "rt", encoding="utf-8") as f, open(out/p.name.removesuffix(".gz"), "w", encoding="utf-8") as g:
            for line in f:
                r = json.loads(line); text, own = r["text"], r["id"]
                g.write(line)
                if not isinstance(text, str): continue
                for k in range(1, times):
                    count = iter(range(len(text)))
                    r["id"] = f"{own}-{k}"
                    r["text"] = re.sub(r"\S+", lambda m: m[0] if next(count) % 5 else m[0] + "가나다라마바사아자차"[k], text)
                    g.write(json.dumps(r, ensure_ascii=False) + "\n")

def test_memory_does_not_follow_the_corpus(whole, dev, folder):
    multiply(dev, folder/"ten", 10)
    entries = dedup(folder/"ten_ws", folder/"ten")
    show("the corpus ten times, one worker", entries)
    one, ten = (max(e["peak_rss_mb"] for e in x.values()) for x in (whole[1], entries))
    ratios = {n: round(entries[n]["peak_rss_mb"] / whole[1][n]["peak_rss_mb"], 2) for n in entries}
    print(f"  peak {one:.0f} MB -> {ten:.0f} MB: {ten / one:.2f} times, by stage {ratios}; kept {entries['prepare']['counts']['kept']:,} of {entries['prepare']['counts']['read']:,}")
    subprocess.run(["rm", "-rf", str(folder/"ten"), str(folder/"ten_ws")])
    assert ten < 1.5 * one

VARIANTS = {"NFD": lambda t, rng: unicodedata.normalize("NFD", t), "full width": lambda t, rng: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
            "5 % of spaces dropped": lambda t, rng: re.sub(" ", lambda m: "" if rng.random() < 0.05 else " ", t), "no spaces": lambda t, rng: t.replace(" ", "")}

def test_char5_finds_korean_variants(dev, folder):
    rng, raw = random.Random(2), folder/"variants"; raw.mkdir()
    planted = {}
    for p in sorted(dev.glob("*.jsonl.gz")):
        records = [r for r in map(json.loads, gzip.open(p)) if isinstance(r.get("text"), str) and len(r["text"].split()) >= 20]
        with open(raw/p.name.removesuffix(".gz"), "w", encoding="utf-8") as f:
            for i, r in enumerate(rng.sample(records, 100)):
                own = f"{p.name.split('.')[0]}-{i}"
                f.write(json.dumps({"id": own, "text": r["text"]}, ensure_ascii=False) + "\n")
                for name, change in VARIANTS.items():
                    planted[f"{own}/{name}"] = own
                    f.write(json.dumps({"id": f"{own}/{name}", "text": change(r["text"], rng)}, ensure_ascii=False) + "\n")
    found = {}
    for shingle in ("char5", "word5"):
        dedup(folder/shingle, raw, f"dedup.shingle={shingle}", "dedup.audit.planted=0")
        text, cluster = texts(folder/shingle), {r["id"]: r["cluster"] for r in rows(folder/shingle, "minhash_lsh/clusters")}
        for v, own in planted.items():
            if v in text and own in text: found.setdefault((v.split("/")[1], shingle), []).append(v in cluster and cluster[v] == cluster.get(own))
    for (name, shingle), hits in sorted(found.items()): print(f"  {name:22} {shingle}: {sum(hits)} of {len(hits)}")
    assert all(all(hits) for (_, shingle), hits in found.items() if shingle == "char5")

def hostile() -> dict[str, list[str]]:
    rng = random.Random(0)
    words = [a + b + c for a in "가나다라마바사아자차카타파하" for b in "물불산강꽃별달해밤낮길집" for c in "을를이가은는"]
    base = rng.choices(words, k=80)
    def changed(i): k = rng.randrange(80); return " ".join([*base[:k], f"번호{i}", *base[k + 1:]])
    def odd(): return "".join(rng.choice("  가") if rng.random() < 0.4 else chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0xAC00, 0xD7FF), rng.randrange(0x40000, 0x10FFFF), 0x378, 0x10FFFF])) for _ in range(80))
    return {"100,000 identical": [" ".join(base)] * 100_000, "100,000 nearly identical": [changed(i) for i in range(100_000)], "one of 50 MB": [" ".join(rng.choices(words, k=5_000_000)), *(" ".join(rng.choices(words, k=50)) for _ in range(100))],
            "200,000 of one word": [rng.choice(words) * 3 for _ in range(200_000)], "a million of three words": [" ".join(rng.choices(words, k=3)) for _ in range(1_000_000)],
            "20,000 of unassigned code points": [odd() for _ in range(20_000)]}

def test_hostile_input(folder):
    for i, (name, documents) in enumerate(hostile().items()):
        raw = folder/f"hostile{i}"; raw.mkdir()
        with open(raw/"web.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents)
            if "unassigned" in name: f.writelines('{"text": "짝 없는 \\ud800 대리 문자와 \\udfff 또 하나 %d"}\n' % n for n in range(1000))
        entries = dedup(folder/f"hostile_ws{i}", raw, "dedup.audit.planted=0")
        show(name, entries)
        counts = entries["prepare"]["counts"]
        assert counts["read"] == counts["kept"] + counts["filtered"] + counts["quarantined"]
        assert sum(e["cpu_seconds"] for e in entries.values()) < 300 and max(e["peak_rss_mb"] for e in entries.values()) < 2000
        subprocess.run(["rm", "-rf", str(raw), str(folder/f"hostile_ws{i}")])
