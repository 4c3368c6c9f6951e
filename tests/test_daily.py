"Daily crawls: days one after another are one batch; what is removed is gone, with its consequences; killed runs end the same."
from __future__ import annotations
import gzip, json, os, random, shutil, signal, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st
from test_dedup import WORDS, clusters_of, corpus_lines, files, pairs_of, texts_of, write_raw
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import daily, lsh, phase
from yunmin_efficientdata.dedup.daily import find_documents

QUICK = ["dedup.contamination.sets=[]", "dedup.part_bytes=65536"]
UNEQUAL = ("manifest.json", "statistics.json", "sources.json", "audit.md", "crawls.json", "keepers_changed.csv", "removed.json")  # say how the workspace came to be

@pytest.fixture(autouse=True)
def quick_audit(monkeypatch):
    "Statistics and figures have tests of their own."
    def audit(ctx, prepared, near):
        for key in phase.AUDIT_OUTPUTS: ctx.store.write(key, b"x")
        return {"docs_in": prepared["read"], "docs_out": sum(k["docs"] for k in near["kept"].values())}
    monkeypatch.setattr(phase, "audit", audit)

@pytest.fixture
def small_hot(monkeypatch):
    "Buckets are hot from four members on, so that small corpora have some; a part holds a few documents."
    for module in (lsh, daily): monkeypatch.setattr(module, "HOT", 3)
    monkeypatch.setattr(lsh, "LEADERS", 3)

def dedup(ws, raw=None, *sets, **options): return phase.run(str(ws), raw=raw and str(raw), workers=1, overrides=[*QUICK, *sets], **options)

def result(ws) -> dict:
    "What one batch and many days must agree on."
    near, exact = {}, set()
    for p in pairs_of(ws):
        if p["jaccard"] == 1 and clusters_of_cached(ws).get(p["a"], {}).get("reason") == "exact" and not clusters_of_cached(ws)[p["a"]]["keep"]: exact.add((p["a"], p["b"]))
        else: near[frozenset((p["a"], p["b"]))] = p["jaccard"]
    store = open_store(ws)
    def lines(prefix): return sorted(l for k in store.list(prefix) if "/part-" in k for l in store.read(k).splitlines())
    manifest = json.loads(store.read("dedup_ready/manifest.json"))
    return {"prepared": lines("dedup_ready/"), "survivors": lines("deduped/"), "clusters": sorted(map(str, clusters_of_cached(ws).values())), "near": near, "exact": exact,
            "total": manifest["total"], "repeated": manifest["repeated_ids"], "review": store.read("dedup_ready/review_samples.md")}

_cache: dict = {}
def clusters_of_cached(ws):
    key = (str(ws), tuple((k, open_store(ws).stat(k).version) for k in open_store(ws).list("minhash_lsh/clusters/")))
    if key not in _cache: _cache.clear(); _cache[key] = clusters_of(ws)
    return _cache[key]

def same(a: dict, b: dict):
    for k in a: assert a[k] == b[k], k

def days_of(folder: Path, lines: list[str], days: list[int], n: int) -> list[Path]:
    "Lines by day as folders; the whole as one more."
    out = []
    for d in range(n):
        mine = [l for l, day in zip(lines, days) if day == d]
        if mine: write_raw(folder/f"day{d}", mine, []); out.append(folder/f"day{d}")
    write_raw(folder/"all", lines, [])
    return out

def make_lines(seed: int, n: int) -> list[str]:
    "Small corpora full of copies, edits, floods of one template, and ids given twice."
    rng, out = random.Random(seed), []
    base = rng.choices(WORDS, k=30)
    for i in range(n):
        kind = rng.random()
        if kind < .35 or not out: text = rng.choices(WORDS, k=rng.randint(3, 40))
        elif kind < .55: text = list(base); text[rng.randrange(30)] = rng.choice(WORDS)
        elif kind < .8: text = out[rng.randrange(len(out))]["text"].split()
        else: text = out[rng.randrange(len(out))]["text"].split(); text[rng.randrange(len(text))] = rng.choice(WORDS)
        r = {"text": rng.choice([" ", " ", "\n"]).join(text), "source": f"s{rng.randrange(3)}", "date": f"2024-01-{rng.randint(1, 28):02}", "domain": rng.choice(["web", "web", "뉴스"])}
        if rng.random() < .7: r["id"] = rng.choice([f"d{i}", f"d{i}", f"d{rng.randrange(n)}", f"d{rng.randrange(5)}#2"])
        out.append(r)
    return [json.dumps(r, ensure_ascii=False) for r in out]

# ---- days are a batch

SETTINGS = ([], ["dedup.keep=date"], ["dedup.source_priority=[s1]"], ["dedup.shingle=char5", "dedup.threshold=0.7"])

def days_against_batch(folder: Path, seed: int, n: int, count: int) -> None:
    rng, lines = random.Random(seed), make_lines(seed, n)
    sets = SETTINGS[seed % len(SETTINGS)]
    days = days_of(folder, lines, [rng.randrange(count) for _ in lines], count)
    rng.shuffle(days)
    for d in days: dedup(folder/"ws", d, *sets, append=True)
    dedup(folder/"batch", folder/"all", *sets)
    same(result(folder/"batch"), result(folder/"ws"))
    dedup(folder/"ws", None, *sets, compact=True)
    assert files(folder/"ws", UNEQUAL) == files(folder/"batch", UNEQUAL)

@given(st.integers(0, 10**6), st.integers(6, 60), st.integers(2, 4))
@hyp(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_days_are_a_batch(small_hot, tmp_path_factory, seed, n, count):
    "Random corpora cut into random days, in random order; then one order again, byte by byte."
    folder = tmp_path_factory.mktemp("days")
    try: days_against_batch(folder, seed, n, count)
    finally: shutil.rmtree(folder)

def test_a_day_by_itself(tmp_path, capsys):
    "What an append says and leaves, and what later runs make of it."
    lines = corpus_lines(120)
    days = days_of(tmp_path, lines, [min(2, i // 40) for i in range(120)], 3)
    dedup(tmp_path/"ws", days[0]); dedup(tmp_path/"ws", days[1], append=True)
    changed = [l.split(",") for l in (tmp_path/"ws/dedup_ready/keepers_changed.csv").read_text().splitlines()]
    rows = clusters_of(tmp_path/"ws")
    assert changed[0] == ["id", "was", "now"] and len(changed) > 1 and all(now == rows[i]["keeper"] for i, _, now in changed[1:] if i in rows)
    before = files(tmp_path/"ws"); capsys.readouterr()
    for options in ({"append": True}, {}):   # the same again, and a run without options: nothing to do
        dedup(tmp_path/"ws", days[1] if options else None, **options)
        assert capsys.readouterr().out.count("skipped") >= 4 and files(tmp_path/"ws") == before
    shutil.copytree(days[1], tmp_path/"again"); (tmp_path/"again/web-0.jsonl").rename(tmp_path/"again/other.jsonl")
    dedup(tmp_path/"ws", tmp_path/"again", append=True)
    assert "no new files" in capsys.readouterr().out and files(tmp_path/"ws") == before
    shutil.rmtree(days[0])   # yesterday's raw text may be gone
    shutil.copy(days[2]/"web-0.jsonl", tmp_path/"again/new.jsonl")
    dedup(tmp_path/"ws", tmp_path/"again", append=True); dedup(tmp_path/"batch", tmp_path/"all")
    same(result(tmp_path/"batch"), result(tmp_path/"ws"))
    before = files(tmp_path/"ws"); capsys.readouterr(); dedup(tmp_path/"ws")
    assert capsys.readouterr().out.count("skipped") >= 4 and files(tmp_path/"ws") == before
    (tmp_path/"again/new.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(UserError, match="changed since"): dedup(tmp_path/"ws", tmp_path/"again", append=True)
    (tmp_path/"bad").mkdir(); (tmp_path/"bad/web.jsonl").write_text("\n".join(json.dumps({"text": "충분히 긴 글입니다", "domain": f"d{i}"}) for i in range(51)))
    with pytest.raises(UserError, match="max_domains"): dedup(tmp_path/"ws", tmp_path/"bad", append=True)
    dedup(tmp_path/"ws"); assert files(tmp_path/"ws") == before

@pytest.mark.parametrize("text", ["", "[1]", '{"files": []}'])
def test_damaged_record_of_a_crawl(tmp_path, text):
    "One crawl is prepared anew from its raw files; of several, some may be gone: refused."
    days = days_of(tmp_path, corpus_lines(60), [i % 2 for i in range(60)], 2)
    dedup(tmp_path/"ws", days[0]); before = files(tmp_path/"ws")
    (tmp_path/"ws/ledger/crawls/0000.json").write_text(text)
    dedup(tmp_path/"ws"); assert files(tmp_path/"ws") == before
    dedup(tmp_path/"two", days[0]); dedup(tmp_path/"two", days[1], append=True); before = files(tmp_path/"two")
    (tmp_path/"two/ledger/crawls/0001.json").write_text(text)
    for append in (True, False):
        with pytest.raises(UserError, match="ledger/crawls/0001.json: damaged"): dedup(tmp_path/"two", days[1], append=append)
    assert files(tmp_path/"two") == before

def test_other_rules_mean_anew(tmp_path, capsys):
    "Text cleaned by other rules does not fit: everything is made again. Another threshold compares everything again, in the parts that are there."
    days = days_of(tmp_path, corpus_lines(60), [i % 2 for i in range(60)], 2)
    dedup(tmp_path/"ws", days[0], "clean.min_chars=30"); dedup(tmp_path/"ws", days[1], append=True)
    assert "prepared anew" in capsys.readouterr().out
    dedup(tmp_path/"batch", tmp_path/"all"); same({k: v for k, v in result(tmp_path/"batch").items()}, result(tmp_path/"ws"))
    for ws in ("w2", "ws"): dedup(tmp_path/ws, days[0]) if ws == "w2" else None
    dedup(tmp_path/"w2", days[1], append=True); dedup(tmp_path/"w2", None, "dedup.threshold=0.5"); dedup(tmp_path/"batch", None, "dedup.threshold=0.5")
    same(result(tmp_path/"batch"), result(tmp_path/"w2"))

def test_levels_that_need_one_order(tmp_path):
    "Sentences across documents: an append with them, and switching them on after one, are what a batch is."
    days = days_of(tmp_path, corpus_lines(60), [i % 2 for i in range(60)], 2); spans = "dedup.spans.levels=[sentence]"
    dedup(tmp_path/"batch", tmp_path/"all", spans)
    dedup(tmp_path/"a", days[0], spans); dedup(tmp_path/"a", days[1], spans, append=True)
    dedup(tmp_path/"b", days[0]); dedup(tmp_path/"b", days[1], append=True); dedup(tmp_path/"b", None, spans)
    for ws in "ab": same(result(tmp_path/"batch"), result(tmp_path/ws))

def test_contamination_follows(tmp_path):
    "Only new parts are scanned; a phrase that has become common property frees the documents that were thought contaminated."
    rng = random.Random(3); leak = " ".join(rng.choices(WORDS, k=16))
    def doc(i, more=""): return json.dumps({"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=40)) + more, "domain": "web"}, ensure_ascii=False)
    first = [doc(i, f" {leak}" if i < 2 else "") for i in range(20)]; second = [doc(i, f" {leak}" if i % 2 else "") for i in range(20, 60)]
    (tmp_path/"eval.jsonl").write_text(json.dumps({"question": leak}, ensure_ascii=False))
    sets = [f"dedup.contamination.sets=[{tmp_path/'eval.jsonl'}]", "dedup.contamination.remove=true"]
    days = days_of(tmp_path, first + second, [0] * 20 + [1] * 40, 2)
    dedup(tmp_path/"ws", days[0], *sets); one = set(texts_of(tmp_path/"ws", "deduped/"))
    dedup(tmp_path/"ws", days[1], *sets, append=True); dedup(tmp_path/"batch", tmp_path/"all", *sets)
    same(result(tmp_path/"batch"), result(tmp_path/"ws")); both = set(texts_of(tmp_path/"ws", "deduped/"))
    assert "d0" not in one and len(one) == 18 and (tmp_path/"ws/dedup_ready/contamination.json").exists() and len(both) in (39, 60) or "d0" in both

# ---- takedowns

KEYS = ("prepared", "survivors", "clusters", "near", "exact", "repeated")

def without(lines, ids, sources): return [l for l in lines if (r := json.loads(l))["source"] not in sources and str(r.get("id", "")).split("#")[0] not in ids]

def text_left(ws: Path, text: str) -> list[str]:
    "Files of phase 1 that hold a piece of a text."
    needle = " ".join(text.split()[:6])
    return [str(p.relative_to(ws)) for folder in ("dedup_ready", "deduped", "minhash_lsh", "ledger") for p in (ws/folder).rglob("*") if p.is_file() and needle.encode() in p.read_bytes().replace(b"\\n", b" ")]

def takedown(folder: Path, seed: int, n: int) -> None:
    rng, lines = random.Random(seed), make_lines(seed, n) + [json.dumps({"text": "지킬 글이 하나는 남아야 합니다", "source": "s0", "id": "stays"}, ensure_ascii=False)]
    days = days_of(folder, lines, [rng.randrange(2) for _ in lines], 2)
    ids = {str(json.loads(l)["id"]).split("#")[0] for l in rng.sample(lines[:-1], 3) if "id" in json.loads(l)}
    sources = set(rng.sample(["s1", "s2"], rng.randrange(2)))
    left = without(lines, ids, sources)
    for d in days: dedup(folder/"ws", d, append=True)
    if find_documents(open_store(folder/"ws"), ids, sources):
        found = phase.remove(str(folder/"ws"), ids, sources, overrides=QUICK, workers=1)
        assert len(found) == len(lines) - len(left)
    write_raw(folder/"left", left, []); dedup(folder/"batch", folder/"left")
    want = {k: result(folder/"batch")[k] for k in KEYS}
    if not (folder/"ws/dedup_ready/removed.json").exists(): return
    same(want, result(folder/"ws"))
    shutil.copytree(folder/"all", folder/"once more"); (folder/"once more/web-0.jsonl").write_text("\n".join([*lines, lines[-1].replace("stays", "new").replace("지킬", "새로운")]))
    dedup(folder/"ws", folder/"once more", append=True)
    back = {r["id"].split("#")[0] for l in result(folder/"ws")["prepared"] for r in [json.loads(l)]}
    assert not back & ids and "new" in back and not any(json.loads(l)["source"] in sources for l in result(folder/"ws")["prepared"])

@given(st.integers(0, 10**6), st.integers(6, 40))
@hyp(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_takedowns_are_a_batch_without(small_hot, tmp_path_factory, seed, n):
    folder = tmp_path_factory.mktemp("takedown")
    try: takedown(folder, seed, n)
    finally: shutil.rmtree(folder)

def test_nothing_of_a_text_stays(tmp_path, capsys):
    "A removed keeper: its copies get another one, and no file of the phase holds a piece of its text. The raw file does, and is left alone."
    rng = random.Random(1); words = rng.choices(WORDS, k=40)
    def doc(i, text, source="s", **more): return json.dumps({"id": i, "text": text, "source": source, **more}, ensure_ascii=False)
    secret = "비밀스러운 " + " ".join(rng.choices(WORDS, k=40)) + "ㅋㅋㅋㅋㅋ &amp; !!!!!!"
    lines = [doc("best", " ".join([*words, "더", "길다"]) ), doc("copy", " ".join(words)), doc("third", " ".join([*words[1:], "셋째"])), doc("secret", secret), "{" + secret + ' "id": "secret"', *(doc(i, " ".join(rng.choices(WORDS, k=30))) for i in range(20))]
    days = days_of(tmp_path, lines, [0] * len(lines), 1)
    dedup(tmp_path/"ws", days[0])
    assert clusters_of(tmp_path/"ws")["copy"]["keeper"] == "best" and text_left(tmp_path/"ws", secret)
    listed = phase.remove(str(tmp_path/"ws"), ["secret", "best"], dry_run=True)
    assert [(r["id"], r["now"], r["keeper_of"]) for r in sorted(listed, key=lambda r: r["id"])] == [("best", "kept", 2), ("secret", "kept", 0)] and not (tmp_path/"ws/dedup_ready/removed.json").exists()
    with pytest.raises(UserError, match="no document has id nobody"): phase.remove(str(tmp_path/"ws"), ["nobody"], overrides=QUICK)
    phase.remove(str(tmp_path/"ws"), ["secret", "best"], overrides=QUICK, workers=1)
    assert text_left(tmp_path/"ws", secret) == [] and secret.split()[1] in (days[0]/"web-0.jsonl").read_text()
    rows, manifest = clusters_of(tmp_path/"ws"), json.loads((tmp_path/"ws/dedup_ready/manifest.json").read_text())
    assert rows["third"]["keeper"] == "copy" or rows["copy"]["keeper"] == "third"
    assert "best" in (tmp_path/"ws/dedup_ready/keepers_changed.csv").read_text() and "raw files are yours" in capsys.readouterr().out
    assert manifest["total"]["filtered"] == {"removed": 2} and manifest["total"]["read"] == 25 and manifest["total"]["kept"] == 22
    before = files(tmp_path/"ws"); dedup(tmp_path/"ws"); assert files(tmp_path/"ws") == before
    shutil.rmtree(tmp_path/"ws/minhash_lsh"); dedup(tmp_path/"ws")   # made anew from raw: still without
    assert text_left(tmp_path/"ws", secret) == [] and "best" not in texts_of(tmp_path/"ws")

# ---- killed in the middle

def killed_at(step: int, go) -> bool:
    "Run in a child that kills itself, as kill -9 would, when it publishes its `step`-th file. Was it killed?"
    pid = os.fork()
    if pid == 0:
        replace, count = os.replace, iter(range(10**9))
        def counted(*a, **k):
            if next(count) >= step: os.kill(os.getpid(), signal.SIGKILL)
            return replace(*a, **k)
        os.replace = counted
        try: go(); os._exit(0)
        except BaseException: os._exit(3)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

@pytest.mark.parametrize("what", ["append", "compact", "remove"])
def test_killed_anywhere(tmp_path, small_hot, what):
    "Killed while a file is published: the same command, or a plain run, ends with the bytes of a run that was not killed."
    days = days_of(tmp_path, make_lines(7, 40), [i % 3 for i in range(40)], 3)
    dedup(tmp_path/"start", days[0]); dedup(tmp_path/"start", days[1], append=True)
    def go(ws):
        if what == "append": dedup(ws, days[2], append=True)
        elif what == "compact": dedup(ws, compact=True)
        else: phase.remove(str(ws), ["d1", "d2", "d3"], ["s1"], overrides=QUICK, workers=1)
    ws = tmp_path/"ws"   # one path for all: the ledger's fingerprints name it
    shutil.copytree(tmp_path/"start", ws); go(ws); whole = files(ws)
    step, points = 0, 0
    while True:
        shutil.rmtree(ws); shutil.copytree(tmp_path/"start", ws)
        if not killed_at(step, lambda: go(ws)): break
        points += 1
        dedup(ws) if step % 2 and what != "append" else go(ws)
        if what == "append" and step % 2: dedup(ws)
        assert files(ws) == whole, (what, step, [k for k in {*whole, *files(ws)} if whole.get(k) != files(ws).get(k)][:5])
        step += 9
    assert points >= 8

# ---- what phase 2 makes of it

FORMAT = ["tokenizer.vocab_size=400", "heldout.minimum_from=20", "heldout.minimum=4"]

def parquet(ws, *sets) -> dict[str, dict]:
    "The stages of phase 2 that write text; what each counted."
    from yunmin_efficientdata.format.phase import domain_keys, open_phase, write_stages
    with open_phase("format", str(ws), overrides=[*FORMAT, *sets], workers=1) as ctx: return write_stages(ctx, domain_keys(ctx.store))

def written(ws) -> dict[str, bytes]: return {k: open_store(ws).read(k) for p in ("parquet_ready/", "tokenizer/") for k in open_store(ws).list(p)}

def texts_in_parquet(ws) -> set[str]:
    import pyarrow.parquet as pq
    return {t for p in (Path(ws)/"parquet_ready").rglob("*.parquet") for t in pq.read_table(p)["text"].to_pylist()}

def fresh_lines(domain: str, n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [json.dumps({"id": f"{domain}{seed}-{i}", "text": " ".join(rng.choices(WORDS, k=40)), "domain": domain}, ensure_ascii=False) for i in range(n)]

@pytest.fixture
def two_days(tmp_path):
    "A workspace after phases 1 and 2 of a first day, and phase 1 of a second one, which brought text to one of its domains and a new one."
    days = days_of(tmp_path, [*fresh_lines("web", 40, 1), *fresh_lines("뉴스", 40, 2), *fresh_lines("web", 20, 3), *fresh_lines("책", 30, 4)], [0] * 80 + [1] * 50, 2)
    dedup(tmp_path/"ws", days[0]); parquet(tmp_path/"ws"); dedup(tmp_path/"ws", days[1], append=True)
    return tmp_path/"ws"

def test_format_writes_only_domains_that_changed(two_days, tmp_path, capsys):
    "The others stay, with their times; all of it is what a format from nothing makes with this tokenizer."
    ws = two_days; before, times = written(ws), {p: p.stat().st_mtime_ns for p in (ws/"parquet_ready").rglob("*.parquet")}
    capsys.readouterr(); parquet(ws); said = capsys.readouterr().out; after = written(ws)
    assert "parquet: web, 책 to write; 뉴스 as before" in said and "tokenizer: kept as the first crawl made it" in said
    assert {k for k in after if k.startswith("tokenizer/") and after[k] != before[k]} == set()
    for p, t in times.items(): assert (p.stat().st_mtime_ns == t) == ("뉴스" in p.name), p
    assert len(texts_in_parquet(ws)) == 130
    for folder in ("deduped", "dedup_ready", "minhash_lsh"): shutil.copytree(ws/folder, tmp_path/"fresh"/folder)
    parquet(tmp_path/"fresh", f"tokenizer.path={ws/'tokenizer'}")
    assert written(tmp_path/"fresh") == after
    parquet(ws); assert written(ws) == after
    parquet(ws, "format.zstd_level=5"); assert all(p.stat().st_mtime_ns != t for p, t in times.items())   # another layout: everything
    hashes = {s: parquet(ws, *s)["tokenizer"]["hash"] for s in ((), ("tokenizer.keep=false",))}
    assert len(set(hashes.values())) == 2   # the one of the first crawl, and one of today

def test_compaction_moves_no_parquet_file(two_days):
    "One order again is no change of the documents."
    parquet(two_days); before, times = written(two_days), {p: p.stat().st_mtime_ns for p in (two_days/"parquet_ready").rglob("*.parquet")}
    dedup(two_days, compact=True); parquet(two_days)
    assert written(two_days) == before and all(p.stat().st_mtime_ns == t for p, t in times.items())

def test_taken_down_text_leaves_parquet(two_days):
    ws = two_days; parquet(ws); gone = {json.loads(l)["text"] for l in fresh_lines("web", 40, 1)[:9]}
    assert gone <= texts_in_parquet(ws); before = written(ws)
    phase.remove(str(ws), [f"web1-{i}" for i in range(9)], overrides=QUICK, workers=1); parquet(ws)
    left = texts_in_parquet(ws)
    assert not gone & left and len(left) == 121 and not [p for p in (ws/"parquet_ready").rglob("*") if p.is_file() and any(t[:30].encode() in p.read_bytes() for t in gone)]
    assert {k for k, v in written(ws).items() if before.get(k) != v and k.endswith(".parquet")} == {f"parquet_ready/{s}web.parquet" for s in ("", "heldout/validation/", "heldout/test/")}

def test_format_killed_after_an_append(two_days, tmp_path, monkeypatch):
    "Stopped before any file of it is published: the next run ends with the same bytes; a size that happens to be right hides nothing."
    start, ws = tmp_path/"start", two_days
    shutil.copytree(ws, start); parquet(ws); whole = written(ws); replace = os.replace
    class Killed(BaseException): pass
    for step in range(10**6):
        shutil.rmtree(ws); shutil.copytree(start, ws)
        count = iter(range(10**9))
        def counted(*a, **k):
            if next(count) >= step: raise Killed
            return replace(*a, **k)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", counted)
            try: parquet(ws); break
            except Killed: pass
        parquet(ws)
        assert written(ws) == whole, step
    assert step >= 15

# ---- the development corpus

CHILD = """
import json, resource, sys
from yunmin_efficientdata.cli import main
try: main()
finally:
    u = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024  # ru_maxrss begins with that of the process that started this one
    print(json.dumps({"cpu": u.ru_utime + u.ru_stime, "peak": peak, "read": int(open("/proc/self/io").read().split()[1]) / 1e6}), file=sys.stderr)
"""

def measured(*arguments) -> dict: # CPU seconds, peak MB, MB read by read() (pages of memory maps are not counted)
    "One command in a process of its own."
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments), "--workers", "1"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return json.loads(done.stderr.splitlines()[-1])

def stages(ws: Path) -> dict: return {s: json.loads((ws/f"ledger/dedup.{s}.json").read_text())["cpu_seconds"] for s in ("prepare", "contamination", "exact", "near", "write", "audit")}

def cut_into_days(dev: Path, out: Path, n: int) -> None:
    "Every document to a random day; plain files, a domain each."
    rng = random.Random(0)
    for p in sorted(dev.glob("*.jsonl.gz")):
        name = p.name.removesuffix(".gz")
        for d in range(n): (out/f"day{d}").mkdir(parents=True, exist_ok=True)
        (out/"all").mkdir(exist_ok=True)
        with gzip.open(p, "rb") as f, open(out/"all"/name, "wb") as whole:
            days = [open(out/f"day{d}"/name, "wb") for d in range(n)]
            for line in f: whole.write(line); days[rng.randrange(n)].write(line)
            for d in days: d.close()

@pytest.mark.slow
def test_ten_days_of_dev(corpus, tmp_path):
    "Ten slices one after another against one batch: the same result, and what each day costs. Then one order again: the same bytes."
    cut_into_days(corpus/"dev", tmp_path/"raw", 10)
    batch = measured("dedup", tmp_path/"batch", "--raw", tmp_path/"raw/all")
    print(f"\n{'':14}{'CPU s':>8}{'MB read':>9}{'peak MB':>9}   CPU s by stage\n{'one batch':14}{batch['cpu']:8.1f}{batch['read']:9.0f}{batch['peak']:9.0f}   {stages(tmp_path/'batch')}", flush=True)
    days = []
    for d in range(10):
        days.append(measured("dedup", tmp_path/"ws", "--raw", tmp_path/f"raw/day{d}", *["--append"] * (d > 0)))
        print(f"{f'day {d + 1}':14}{days[-1]['cpu']:8.1f}{days[-1]['read']:9.0f}{days[-1]['peak']:9.0f}   {stages(tmp_path/'ws')}", flush=True)
    batch_work, daily_work = (cost["cpu"] - stages(ws)["audit"] for cost, ws in ((batch, tmp_path/"batch"), (days[-1], tmp_path/"ws")))
    same(result(tmp_path/"batch"), result(tmp_path/"ws"))
    compact = measured("compact", tmp_path/"ws")
    print(f"{'compact':14}{compact['cpu']:8.1f}{compact['read']:9.0f}{compact['peak']:9.0f}   {stages(tmp_path/'ws')}")
    skip = (*UNEQUAL, ".png", "state/written.json")
    assert files(tmp_path/"ws", skip) == files(tmp_path/"batch", skip)
    last = days[-1]
    print(f"day 10 of 10 against the batch: {last['cpu'] / batch['cpu']:.2f} of its CPU seconds, {last['read'] / batch['read']:.2f} of its bytes")
    print(f"without the audit, which draws its figures anew however little is new: {daily_work / batch_work:.2f} of its CPU seconds")
    assert daily_work < 0.5 * batch_work
