"The audit: its numbers agree with each other and with a plain recount; its texts are escaped, and absent where they must be; nothing it shows depends on luck."
import csv, json, random, re, time
from html.parser import HTMLParser
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings as hyp, strategies as st
from yunmin_efficientdata.core.sample import write_sample
from yunmin_efficientdata.core.settings import DedupSettings
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import audit, phase
from yunmin_efficientdata.dedup.lsh import keeper_order
from yunmin_efficientdata.dedup.prepare import Corpus

OVERRIDES = ["dedup.audit.planted=20", "dedup.part_bytes=200000"]

@pytest.fixture(scope="module")
def ws(tmp_path_factory):
    "A finished phase 1 over the sample corpus, several parts a domain."
    folder = str(tmp_path_factory.mktemp("audit")/"ws")
    write_sample(open_store(folder), 900, seed=5)
    summary = phase.run(folder, overrides=OVERRIDES, workers=1)
    return open_store(folder), summary

@pytest.fixture(scope="module")
def stats(ws): return json.loads(ws[0].read("dedup_ready/statistics.json"))

@pytest.fixture(scope="module")
def log(ws): return list(csv.DictReader(ws[0].read_text("dedup_log.csv").splitlines()))

def clusters(store): return [r for k in store.list("minhash_lsh/clusters/") for r in pq.read_table(store.fetch(k)).to_pylist()]

def test_everything_promised_is_written(ws):
    assert [k for k in audit.AUDIT_OUTPUTS if not ws[0].exists(k)] == []
    page = ws[0].read_text("dedup_ready/audit.md")
    for link in re.findall(r"\]\(\.\./([^)]+)\)", page): assert ws[0].exists(link), link
    assert ws[0].uri not in page

def test_numbers_agree(ws, stats, log):
    "Log, rates, matrix, clusters and the phase's summary count the same documents."
    store, summary = ws
    rows, removed = clusters(store), summary["removed_exact"] + summary["removed_near"]
    assert sum(not r["keep"] for r in rows) == removed == sum(map(sum, stats["matrix"]["docs"])) == sum(map(sum, stats["source_matrix"]["docs"]))
    for table in ("domains", "sources"):
        assert sum(r["removed"] for r in stats[table]) == removed and sum(r["docs"] for r in stats[table]) == stats["documents"]
        assert all(sum(r["fates"].values()) == r["removed"] and sum(r["fate_bytes"].values()) == r["bytes_removed"] for r in stats[table])
    assert sum(c["size"] * c["clusters"] for c in stats["cluster_sizes"]) == len(rows) and sum(c["clusters"] for c in stats["cluster_sizes"]) == summary["clusters"]
    total = {r["step"]: r for r in log if r["scope"] == "total"}
    by_domain = {r["name"]: r for r in stats["domains"]}
    assert int(total["near"]["docs_out"]) == summary["docs_out"] == stats["documents"] - removed
    for r in log:
        if r["step"] == "near" and r["scope"] != "total": assert by_domain[r["scope"]]["bytes_removed"] == int(by_domain[r["scope"]]["bytes"]) - int(r["bytes_out"])
    assert sum(stats["edge_histogram"]) == stats["edges"] == stats["sensitivity"][0]["pairs"]

def test_matrix_recounted(ws, stats):
    "Who went for whom, counted again from clusters/ and index/ in plain Python."
    domain = {}
    corpus = Corpus(ws[0])
    for i, part in enumerate(corpus.parts): domain |= dict.fromkeys(corpus.table(i, ["id"])["id"], part["domain"])
    names, count = stats["matrix"]["names"], {}
    for r in clusters(ws[0]):
        if not r["keep"]: count[domain[r["id"]], domain[r["keeper"]]] = count.get((domain[r["id"]], domain[r["keeper"]]), 0) + 1
    assert {(a, b): n for a, row in zip(names, stats["matrix"]["docs"]) for b, n in zip(names, row) if n} == count
    assert stats["matrix"]["across"] == sum(n for (a, b), n in count.items() if a != b)

def test_sensitivity_begins_with_what_was_removed(ws, stats):
    curve = stats["sensitivity"]
    assert curve[0]["docs"] == ws[1]["removed_near"] and curve[0]["threshold"] == stats["threshold"] and curve[-1]["threshold"] == 1
    assert all(a["pairs"] >= b["pairs"] for a, b in zip(curve, curve[1:]))

def test_sampled_pairs_are_true_and_spread(ws, stats):
    pairs = stats["sampled_pairs"]
    assert len(pairs) == 10 and all(p["true"] == pytest.approx(p["jaccard"], abs=1e-12) and p["true"] >= stats["threshold"] for p in pairs)
    assert len({int((p["true"] - .8) / .2 * 5) for p in pairs}) >= 4

def test_a_wrong_record_is_noticed(ws, stats):
    p = stats["sampled_pairs"][0]
    with pytest.raises(RuntimeError, match="recorded similarity"): audit.check_pairs(Corpus(ws[0]), [(p["a"], p["b"], p["jaccard"] + 1e-6)], "word5")

def test_same_again(ws, stats):
    "Everything but times is the same in a second audit of the same files."
    corpus, s = Corpus(ws[0]), DedupSettings(bands=stats["bands"], rows=stats["rows"])
    near = json.loads(ws[0].read("ledger/dedup.near.json"))["counts"] | {k: stats["domains"] for k in ()}
    again = json.loads(json.dumps(audit.statistics(corpus, s, near)))
    for key in ("sampled_pairs", "sources", "domains", "matrix", "source_matrix", "sensitivity", "cluster_sizes", "edge_histogram", "alternatives", "planted"): assert again[key] == stats[key], key

@pytest.mark.parametrize("change", [{}, {"keep": "date"}, {"source_priority": ["web", "sample-wiki", "it's", "sample-news"]}])
def test_ranks_follow_the_keeper_order(ws, change):
    "The SQL order of members is the order in which documents are kept."
    corpus, s = Corpus(ws[0]), DedupSettings(**change)
    with audit.audit_tables(corpus, s) as db: members = db.execute("SELECT cluster, doc FROM member ORDER BY rank").fetchall()
    groups = {}
    for c, d in members: groups.setdefault(c, []).append(d)
    assert len(members) == len(clusters(ws[0])) and len({c for i, (c, _) in enumerate(members) if i == 0 or members[i - 1][0] != c}) == len(groups)
    for docs in groups.values(): assert keeper_order(corpus, np.array(sorted(docs)), s).tolist() == docs

def test_largest_clusters(ws, stats):
    corpus, s = Corpus(ws[0]), DedupSettings()
    with audit.audit_tables(corpus, s) as db: big, bare = audit.largest_clusters(db, corpus, 5), audit.largest_clusters(db, corpus, 5, quotes=False)
    rows = {r["id"]: r for r in clusters(ws[0])}
    assert [c["size"] for c in big] == sorted((c["size"] for c in big), reverse=True) and big[0]["size"] == stats["cluster_sizes"][-1]["size"]
    for c, b in zip(big, bare):
        assert c["kept"] + c["exact"] + c["near"] == c["size"] and rows[c["keeper"]]["keep"] and c["text"] and 1 <= len(c["members"]) <= 3
        assert all(not rows[m["id"]]["keep"] and rows[m["id"]]["cluster"] == c["cluster"] and m["text"] for m in c["members"])
        measured = [m["jaccard"] for m in c["members"] if m["jaccard"] is not None]
        assert measured == [] or c["members"][0]["jaccard"] == min(measured)
        assert "text" not in b and all("text" not in m for m in b["members"])

def test_no_text_where_the_corpus_may_not_be_quoted(ws):
    store = ws[0]
    quoted = store.read_text("dedup_ready/audit.md")
    phase.run(str(store.uri), overrides=[*OVERRIDES, "report.quotes=false", "report.language=en"], workers=1)
    page, stats = store.read_text("dedup_ready/audit.md"), store.read_text("dedup_ready/statistics.json")
    heads = [json.loads(l)["text"].split("\n")[0][:12] for k in store.list("dedup_ready/") if "/part-" in k for l in store.read_text(k).splitlines()]
    assert sum(h in quoted for h in heads) > 5
    assert not [h for h in heads if len(h) == 12 and (h in page or h in stats)] and "text_a" not in stats
    assert not re.search("[가-힣]", page)

def test_nothing_duplicated(tmp_path):
    store = open_store(tmp_path)
    store.write("raw/web.jsonl", "\n".join(json.dumps({"text": f"서로 아주 다른 글 {i} " + " ".join(f"{i}{w}" for w in "가나다라마바사")}, ensure_ascii=False) for i in range(30)))
    phase.run(str(tmp_path), overrides=["dedup.audit.planted=0"], workers=1)
    stats = json.loads(store.read("dedup_ready/statistics.json"))
    assert stats["sampled_pairs"] == [] and stats["cluster_sizes"] == [] and stats["matrix"] == {"names": [], "docs": [], "bytes": [], "across": 0}
    assert all(store.exists(k) for k in audit.AUDIT_OUTPUTS) and not store.exists("reports/figures/dedup_matrix.png")

# --- parts on their own

words = st.lists(st.sampled_from(["서울", "부산", "<b>", "&amp;", "~~~~", "|", "a", "b", "c"]), max_size=60)

@given(words, words, st.integers(0, 4))
@hyp(max_examples=200, deadline=None)
def test_a_diff_loses_no_word(x, y, context):
    ops = audit.word_diff(" ".join(x), " \n".join(y), context)
    assert [w for _, a, _ in ops for w in a] == x and [w for _, _, b in ops for w in b] == y
    assert all(a == b for kind, a, b in ops if kind in ("equal", "skip"))

class Plain(HTMLParser):
    "Tags and text of a piece of HTML."
    def __init__(self): super().__init__(); self.tags, self.text, self.open = set(), [], []
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.open.append(tag); assert [a for a, _ in attrs] in ([], ["style"])
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)

@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=10))
@hyp(max_examples=150, deadline=None)
def test_html_holds_no_markup_of_the_corpus(x, y, name):
    p = Plain(); p.feed(audit.diff_html(x, y, "J = 0.9", (name, "<script>alert(1)</script>"))); p.close()
    assert p.tags <= {"div", "b", "del", "ins"} and p.open == []

@given(st.text(max_size=60), st.text(max_size=60))
@hyp(max_examples=150, deadline=None)
def test_a_fence_holds_whatever_is_in_it(x, y):
    lines = audit.diff_markdown(x + " ~~~~~ ", y).split("\n")
    mark = re.match("~+", lines[0])[0]
    assert len(mark) > 5 and lines[-1] == mark and not any(l.startswith(mark) for l in lines[1:-1])

@given(st.integers(0, 50), st.integers(0, 50))
def test_wilson_is_an_interval(k, more):
    n = k + more
    low, high = audit.wilson(k, n)
    assert 0 <= low <= (k / n if n else .5) + 1e-12 and (k / n if n else .5) - 1e-12 <= high <= 1

def greedy(n, edges, t):
    kept = [True] * n
    for i in range(n): kept[i] = not any(kept[e] for l, e, j in edges if l == i and j >= t)
    return kept

@given(st.integers(0, 2**32), st.integers(1, 40))
@hyp(max_examples=25, deadline=None)
def test_the_curve_is_the_greedy_choice_at_every_threshold(seed, batch):
    "Random clusters with gaps between their ranks, read in batches of any size, against the plain loop."
    rng, edges, first, rank = random.Random(seed), [], [], 0
    for _ in range(rng.randrange(1, 6)):
        n = rng.randrange(2, 9)
        for l in range(1, n):
            for e in rng.sample(range(l), rng.randrange(0, min(l, 3) + 1)): edges.append((rank + l, rank + e, round(rng.uniform(.8, 1), 3))); first.append(rank)
        rank += n + rng.randrange(3)
    with duckdb.connect() as db:
        t = pa.table({"later": pa.array([e[0] for e in edges], pa.int64()), "earlier": pa.array([e[1] for e in edges], pa.int64()), "jaccard": pa.array([e[2] for e in edges], pa.float64()),
                      "first": pa.array(first, pa.int64()), "bytes": pa.array([e[0] + 7 for e in edges], pa.int64())})
        db.register("t", t); db.execute("CREATE TABLE edge AS SELECT * FROM t")
        curve = audit.sensitivity(db, .8, batch)
    for c in curve:
        kept = greedy(rank + 1, edges, c["threshold"] - 1e-12)
        assert (c["docs"], c["bytes"], c["pairs"]) == (kept.count(False), sum(i + 7 for i, k in enumerate(kept) if not k), sum(j >= c["threshold"] - 1e-12 for *_, j in edges))

@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.8, 0.85, 0.999, 1.0])
def test_thresholds(t):
    grid = audit.thresholds_from(t)
    assert grid[0] == t and grid[-1] == 1 and len(grid) <= 60 and (np.diff(grid) > 0).all()

def test_log_with_every_level():
    c = lambda n: {"docs": n, "bytes": n * 10, "words": n * 2}
    prepared = {d: {"read": 20, "kept": 16, "bytes_in": 400, "bytes_out": 160, "words_in": 80, "words_out": 32} for d in ("a", "b")}
    fates = {"a": {"contaminated": c(2), "exact": c(1), "semantic": c(3)}, "b": {"emptied": c(1), "cut": {"docs": 4, "bytes": 25, "words": 5}}}
    rows = audit.log_rows(prepared, {"a": [c(14), c(13), c(13)], "b": [c(16)] * 3}, {"near": 2.0, "spans": 1.0}, fates)
    steps = ["prepare", "contamination", "exact", "near", "semantic", "spans"]
    assert [(r["scope"], r["step"]) for r in rows] == [(d, s) for d in ("a", "b", "total") for s in steps]
    for d in range(3):
        for a, b in zip(rows[6 * d:6 * d + 6], rows[6 * d + 1:6 * d + 6]): assert (a["docs_out"], a["bytes_out"], a["words_out"]) == (b["docs_in"], b["bytes_in"], b["words_in"])
    assert [(r["docs_out"], r["bytes_out"]) for r in rows[5::6]] == [(10, 100), (15, 125), (25, 225)]

def test_tables_escape_what_they_hold():
    table = audit.markdown_table(["source"], [["a|b\n<img src=x>*_`"]])
    assert len(table.split("\n")) == 3 and table.split("\n")[2] == "| a\\|b \\<img src=x\\>\\*\\_\\` |"

def test_a_huge_pair_is_shown_in_bounded_time():
    rng = random.Random(0)
    x = [f"낱말{rng.randrange(5000)}" for _ in range(300_000)]
    y = [w if i % 5 else "다름" for i, w in enumerate(x)]
    start = time.process_time()
    out = audit.diff_html(" ".join(x), " ".join(y))
    assert time.process_time() - start < 5 and "단어 생략" in out and len(out) < 1_000_000
    assert audit.true_jaccard("가 " * 3_000_000, "가 " * 3_000_000 + "나", "word5") == 0.5

def test_more_sources_than_are_named(tmp_path):
    with duckdb.connect() as db:
        db.execute("CREATE TABLE fate AS SELECT 'web' AS domain, 's' || (range % 300) AS source, (range % 3)::UTINYINT AS fate, 2 AS docs, 10 AS bytes FROM range(9000)")
        rows = audit.removal_rates(db, "source", top=20)
    assert len(rows) == 21 and rows[-1]["name"] == "(other)" and sum(r["docs"] for r in rows) == 18000 and sum(r["fate_bytes"].get("near", 0) for r in rows) == 30000

def test_the_same_from_a_bucket(ws, stats, s3):
    "On S3 files come a few at a time through scratch; the answers are those of the folder."
    bucket = open_store(s3.uri)
    for prefix in ("minhash_lsh/", "dedup_ready/"):
        for k in ws[0].list(prefix):
            if "/signatures/" not in k and "/quarantine/" not in k: bucket.write(k, ws[0].read(k))
    corpus, s = Corpus(bucket), DedupSettings()
    with audit.audit_tables(corpus, s) as db:
        assert audit.removal_matrix(db) == stats["matrix"] and audit.removal_rates(db, "domain") == stats["domains"] and audit.sensitivity(db, s.threshold) == stats["sensitivity"]
        assert [(p[0], p[1]) for p in audit.sample_pairs(db, 10, s.threshold)] == [(p["a"], p["b"]) for p in stats["sampled_pairs"]]
        with audit.audit_tables(Corpus(ws[0]), s) as local: assert audit.largest_clusters(db, corpus, 3) == audit.largest_clusters(local, Corpus(ws[0]), 3)
