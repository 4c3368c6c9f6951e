"""Benchmarks: the exact join that judges all others."""
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from yunmin_efficientdata.bench.dedup import ShingleSets, exact_pairs, shingle_sets
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

@settings(max_examples=300, deadline=None)
@given(sets, st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0]))
def test_the_join_equals_brute_force_on_sets(made, threshold):
    assert as_dict(exact_pairs([np.array(sorted(s), np.uint64) for s in made], threshold)) == brute_force(made, threshold)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from("가나다라 마바\n".replace(" ", "")), max_size=30).map(" ".join), max_size=20), st.sampled_from([0.2, 0.5, 0.8]))
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
