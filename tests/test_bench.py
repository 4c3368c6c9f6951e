"""Benchmarks: the exact join that judges all others, the harness, the judgement, one whole run."""
import sys, time
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from yunmin_efficientdata.bench import peers as peers_module
from yunmin_efficientdata.bench.dedup import ShingleSets, Truth, bench_dedup, exact_pairs, find_truth, quality, shingle_sets
from yunmin_efficientdata.bench.harness import Contestant, run_once, summarise, take_turns
from yunmin_efficientdata.bench.peers import components, word_ngrams
from yunmin_efficientdata.dedup.minhash import jaccard, shingle_set, token_ngrams


def brute_force(sets, threshold):
    "Pairs by definition."
    out = {}
    for i, x in enumerate(sets):
        for j, y in enumerate(sets[i + 1:], i + 1):
            if (x or y) and len(x & y) / len(x | y) >= threshold: out[i, j] = len(x & y) / len(x | y)
    return out


def as_dict(result): return {tuple(p): j for p, j in zip(result[0].tolist(), result[1].tolist())}


sets = st.lists(st.sets(st.integers(0, 25) | st.integers(0, 3), max_size=24), max_size=30)

@settings(max_examples=150, deadline=None)
@given(sets, st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0]))
def test_the_join_equals_brute_force_on_sets(made, threshold):
    assert as_dict(exact_pairs([np.array(sorted(s), np.uint64) for s in made], threshold)) == brute_force(made, threshold)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.sampled_from("가나다라마바"), max_size=30).map(" ".join), max_size=20), st.sampled_from([0.2, 0.5, 0.8]))
def test_the_join_equals_brute_force_on_texts(texts, threshold):
    assert as_dict(exact_pairs(texts, threshold)) == brute_force([set(token_ngrams(t)) for t in texts], threshold)


def test_near_copies_of_long_documents_are_all_found():
    rng = np.random.default_rng(1)
    base = [rng.integers(0, 5000, 300).astype(str).tolist() for _ in range(40)]
    texts = [" ".join(b) for b in base]
    for b in base:
        for edits in (1, 3, 6, 12):
            c = list(b)
            for i in rng.choice(300, edits, replace=False): c[i] = f"바뀜{i}"
            texts.append(" ".join(c))
    expected = brute_force([set(token_ngrams(t)) for t in texts], 0.8)
    assert as_dict(exact_pairs(texts, 0.8)) == expected and len(expected) > 100


def test_it_agrees_with_the_kernel_of_phase_1(corpus):
    import orjson
    texts = [orjson.loads(line)["text"] for line in (corpus/"small/web.jsonl").read_bytes().splitlines()[:400]]
    texts += [t.replace(" 있", " 없", 1) for t in texts[:200]]
    pairs, similarity = exact_pairs(iter(texts), 0.5)
    assert len(pairs) >= 100
    for (a, b), j in zip(pairs.tolist(), similarity): assert jaccard(shingle_set(texts[a]), shingle_set(texts[b])) == pytest.approx(j, abs=1e-12)


def test_degenerate_input():
    for empty in ([], [""], ["", " "], iter([])): assert len(exact_pairs(empty)[0]) == 0
    assert exact_pairs(["글"] * 5)[0].tolist() == [[i, j] for i in range(5) for j in range(i + 1, 5)]
    assert exact_pairs(["\ud800 깨진 글", "\ud800 깨진 글"])[0].tolist() == [[0, 1]]
    one = shingle_sets(["가 " * 3_000_000, "가 나"])
    assert isinstance(one, ShingleSets) and np.diff(one.starts).tolist() == [1, 1]
    for bad in (0, -1, 1.01):
        with pytest.raises(ValueError, match="threshold"): exact_pairs(["가"], bad)


# --- harness ---------------------------------------------------------------------------------------------------

CODE = "import json, sys; job = json.load(open(sys.argv[1])); print(json.dumps({'cpu': job['cpu'], 'wall': job['cpu'], 'rss_mb': 1.0, 'documents': 100}))"

def player(name, cpu=1.0, code=CODE, **more): return Contestant(name, [sys.executable, "-S", "-c", code], {"cpu": cpu}, **more)


def test_turns_rotate_and_failures_are_rows(tmp_path):
    said = []
    field = [player("ours", 1.0), player("peer", 5.0), player("dies", code="import sys; sys.exit('boom: no licence')"), player("mute", code="pass"),
             player("text", code="print('hello')"), Contestant("absent", [], {}, missing="not installed")]
    rows = take_turns(field, tmp_path, 3, say=said.append)
    order = [r["contestant"] for r in rows if not r.get("error")]
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    table = summarise(rows, "ours").set_index("contestant")
    assert table.ratio["peer"] == 5 and table.documents_per_cpu_s["peer"] == 20 and table.runs["ours"] == 3
    assert table.not_run[["absent", "dies"]].tolist() == ["not installed", "boom: no licence"]
    assert "exit code 0" in table.not_run["mute"] and table.not_run["text"]
    assert len(said) == 9 and sum("not run" in s for s in said) == 3


def test_a_ratio_is_taken_within_a_repetition():
    rows = [{"contestant": n, "repeat": r, "cpu": c, "wall": c, "process_cpu": c, "rss_mb": 1, "documents": 10} for r, slow in enumerate((1, 10, 2)) for n, c in (("ours", slow), ("peer", 3 * slow))]
    row = summarise(rows, "ours").iloc[1]
    assert (row.ratio, row.ratio_low, row.ratio_high) == (3, 3, 3)


def test_a_contestant_that_hangs_is_stopped_with_its_children(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); open('child', 'w').write(str(p.pid)); time.sleep(60)"
    assert "stopped after" in run_once(player("hangs", code=code), tmp_path/"run", seconds=1.5)["error"]
    pid = int((tmp_path/"run/child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z": return
        time.sleep(0.1)
    pytest.fail("the child of a stopped contestant still runs")


def test_threads_and_hubs_are_fixed(tmp_path):
    code = "import json, os; print(json.dumps({'cpu': 1, 'wall': 1, 'rss_mb': 1, 'env': [os.environ[k] for k in ('OMP_NUM_THREADS', 'RAYON_NUM_THREADS', 'NUMBA_NUM_THREADS', 'HF_HUB_OFFLINE')]}))"
    assert run_once(player("env", code=code), tmp_path, threads=2)["env"] == ["2", "2", "2", "1"]


def test_memory_is_that_of_the_contestant(tmp_path):
    "A small process started by a large one is small; one that allocates says so."
    big = bytearray(200 << 20); big[::4096] = b"1" * len(big[::4096])
    source = Path(peers_module.__file__).read_text()
    code = source.split("def timed(")[0].split("# %% auto #0")[0] + source.split("#c006")[1].split("def timed(")[0] + "\nx = bytearray(json.load(open(sys.argv[1]))['cpu'] << 20)\nprint(json.dumps({'cpu': 1, 'wall': 1, 'rss_mb': peak_rss_mb()}))"
    small, large = (run_once(player("m", n, code), tmp_path/str(n))["rss_mb"] for n in (1, 120))
    assert small < 100 and 100 < large - small < 140 and len(big)


# --- judging ---------------------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_quality_follows_its_definitions(first, data):
    "Against plain loops, over random truths and random results."
    n = len(first)
    seen = {}
    first = [seen.setdefault(x, i) for i, x in enumerate(first)]
    texts = sorted(set(first))
    pairs = sorted({p for p in data.draw(st.sets(st.tuples(st.sampled_from(texts), st.sampled_from(texts)))) if p[0] < p[1]})
    removed = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    said = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8))
    row = quality({"removed": removed, "pairs": said, "clusters": components(said)}, Truth(np.array(first), np.array(pairs, np.int64).reshape(-1, 2), np.ones(len(pairs))))
    kept = [i for i in range(n) if i not in removed]
    alive = {first[i] for i in kept}
    assert row["removed"] == len(removed) and row["copies_left"] == len(kept) - len(alive)
    assert row["strangers_removed"] == sum(1 for i in removed if first[i] not in alive and not any(i0 in p and (set(p) - {i0}) & alive for p in pairs for i0 in [first[i]]))
    if pairs: assert row["pairs_resolved"] == pytest.approx(np.mean([not (a in alive and b in alive) for a, b in pairs]))
    different = {tuple(sorted((first[a], first[b]))) for a, b in said if first[a] != first[b]}
    assert row["pairs_reported"] == len(different)
    if different: assert row["precision"] == pytest.approx(np.mean([p in pairs for p in different]))


def test_nothing_found_is_no_crash():
    truth = find_truth(["가 나 다 라 마 바", "사 아 자 차 카 타"])
    row = quality({"removed": [], "pairs": [], "clusters": []}, truth)
    assert row["strangers_removed"] == 0 and np.isnan(row["precision"]) and np.isnan(row["pair_recall"])
    row = quality({"removed": [0], "pairs": None, "clusters": None}, truth)
    assert row["strangers_removed"] == 1 and np.isnan(row["pairs_reported"])


# --- the whole -------------------------------------------------------------------------------------------------

def test_shingles_of_the_peers_are_ours():
    for text in ("하나 둘 셋 넷 다섯 여섯", "한\u3000글 과\n\n줄 바꿈 그리고 탭\t끝", "짧은 글", "\ud800 깨진 글자 도 있는 글 이다"):
        assert [s.decode("utf-8", "surrogatepass") for s in word_ngrams(text)] == token_ngrams(text)


def test_the_whole_benchmark_with_a_real_peer(tmp_path, monkeypatch):
    "datasketch is installed here too: a folder that looks like its environment starts our Python."
    (tmp_path/"env/datasketch/bin").mkdir(parents=True)
    start = tmp_path/"env/datasketch/bin/python"
    start.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'); start.chmod(0o755)
    (tmp_path/"env/datasketch/.complete").write_text("x")
    (tmp_path/"env/rensa.failed").write_text("ERROR: no wheel for this machine\n")
    monkeypatch.setenv("YUNMIN_BENCH", str(tmp_path/"env"))
    tables = bench_dedup(documents=250, peers=["datasketch", "rensa"], out=tmp_path/"out", repeats=1, planted=0.2, say=lambda line: None)
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [*(f"dedup-{i}.csv" for i in range(1, 7)), "dedup-quality.png", "dedup-speed.png", "dedup.md"]
    text = (tmp_path/"out/dedup.md").read_text(encoding="utf-8")
    assert "no wheel for this machine" in text and "met" in text and str(tmp_path) not in text
    judged = tables["quality"].set_index("contestant")
    for name in ("ours", "datasketch"):
        assert judged.precision[name] == 1 and judged.strangers_removed[name] == 0 and judged.copies_left[name] == 0 and judged.pair_recall[name] > 0.9
    goals = tables["goals"].set_index("goal").result
    assert goals["signatures: bit-equal to datasketch (1: yes)"] == "met" and goals["end to end: times datatrove"] == "not measured"
    assert goals["signatures: times datasketch bulk, sha1"] != "not measured" and "prepare" in tables["stages"]
