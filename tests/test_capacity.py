"""The plan for a large corpus: arithmetic, growth, prices, messages; and, slow, what a tenth of a corpus says of the whole.

The slow one: `YUNMIN_CORPUS=FOLDER scripts/run_tests.sh -m slow -s tests/test_capacity.py`."""
from __future__ import annotations
import json, pickle
import pytest
from yunmin_efficientdata import capacity as c
from yunmin_efficientdata.cli import main
from yunmin_efficientdata.core.executor import LocalExecutor
from yunmin_efficientdata.core.sample import write_sample
from yunmin_efficientdata.core.settings import UserError, load_settings
from yunmin_efficientdata.core.store import open_store

SETTINGS = load_settings()
STAGES = ("dedup.prepare", "dedup.exact", "dedup.near.sign", "dedup.near.build", "dedup.near.query", "dedup.near.decide", "dedup.write", "dedup.audit", "format.split", "format.tokenizer", "format.parquet", "format.profile")

def point(documents: float, size: float, store="local", **more) -> dict:
    "A made-up run whose costs follow a law that is known: 1 s + 2 s a million documents + 3 s a gigabyte."
    at = {"documents": documents, "bytes": size, "candidates": documents / 50}
    cost = {s: {"cpu": float(c.features(s, at, SETTINGS) @ [1, 2, 3]), "seconds": 9.0, "peak": 600.0, "requests": {}} for s in STAGES}
    disk = {"dedup_ready": size + 200 * documents, "minhash_lsh": 600 * documents, "deduped": .9 * size, "parquet_ready": .8 * size}
    return at | {"store": store, "kept": documents, "survivors": .9 * documents, "clustered": .2 * documents, "edges": documents / 60, "out": .9 * size, "line": 200.0, "parts": max(5, int(5 * size / (32 << 20))),
                 "domains": 5, "part_bytes": 32 << 20, "disk": disk, "stages": cost} | more

def calibration(*points) -> dict: return {"about": {"corpus": "made up"}, "points": list(points), "driver": [100.0, 80.0], "slice_seconds": 5e-5}

THREE = (point(100_000, 2e8), point(25_000, 5e7), point(12_500, 2e8, long=True))

def test_a_known_law_is_found_and_continued():
    plan = c.make_plan(1e6, 3e9, 1, SETTINGS, calibration(*THREE))
    rows = {r["stage"]: r for r in plan["stages"]}
    for stage in ("dedup.near.sign", "dedup.write", "format.parquet"): assert rows[stage]["cpu_hours"] * 3600 == pytest.approx(1 + 2 + 9, rel=.01)
    assert rows["format.tokenizer"]["cpu_hours"] * 3600 == pytest.approx(1 + 3 * SETTINGS.tokenizer.sample_bytes / 1e9, rel=.01)  # reads no more than that
    assert plan["disk"]["deduped"] == pytest.approx(.9 * 3e9, rel=.01)

def test_workers_share_what_is_cut_and_not_what_one_process_does():
    one, many = (c.make_plan(1e8, 1e12, w, SETTINGS, calibration(*THREE)) for w in (1, 64))
    of = lambda plan, stage: next(r for r in plan["stages"] if r["stage"] == stage)
    assert of(one, "dedup.near.sign")["wall_hours"] == pytest.approx(64 * of(many, "dedup.near.sign")["wall_hours"])
    assert of(one, "dedup.audit")["wall_hours"] == of(many, "dedup.audit")["wall_hours"]
    assert sum(r["cpu_hours"] for r in one["stages"]) == pytest.approx(sum(r["cpu_hours"] for r in many["stages"]))

def test_slices_grow_with_the_square_and_larger_parts_help():
    small, large = (c.cuts(n, 5000 * n, SETTINGS) for n in (1e7, 1e8))
    assert large["dedup.near.build"] == pytest.approx(100 * small["dedup.near.build"], rel=.1)
    plan = c.make_plan(1e9, 5e12, 64, SETTINGS, calibration(*THREE), "s3")
    advice = next(w for w in plan["warnings"] if "part_bytes" in w)
    bigger = load_settings(overrides=[advice.split("--set ")[1].split()[0]])
    assert sum(v for k, v in c.make_plan(1e9, 5e12, 64, bigger, calibration(*THREE), "s3")["cuts"].items() if k.startswith("dedup")) < .1 * sum(v for k, v in plan["cuts"].items() if k.startswith("dedup"))

def test_duplicates_grow_as_they_were_seen_to_and_no_further():
    flat, growing = (point(100_000, 2e8), point(25_000, 5e7)), (point(100_000, 2e8, clustered=20_000), point(25_000, 5e7, clustered=2500))
    assert c.growth(flat, "clustered") == (pytest.approx(.2), 0)
    share, power = c.growth(growing, "clustered"); assert share == pytest.approx(.2) and power == pytest.approx(.5)
    ten, far = (c.corpus(growing, n, 2000 * n)["clustered"] / n for n in (1e6, 1e9))
    assert ten == far == pytest.approx(.2 * 10**.5)
    known = c.make_plan(1e8, 1e12, 8, SETTINGS, calibration(*THREE), duplicates=.6)
    assert known["corpus"]["clustered"] == .6e8 and known["memory"]["components"] > c.make_plan(1e8, 1e12, 8, SETTINGS, calibration(*THREE), duplicates=.1)["memory"]["components"]

def test_memory_is_flat_for_workers_but_for_the_list_of_parts():
    low, high = (c.make_plan(n, 2000 * n, 8, SETTINGS, calibration(*THREE))["memory"] for n in (1e6, 1e8))
    assert low["worker"] < 1.01 * 600 * 2**20 and high["worker"] < 1.2 * low["worker"] and high["driver"] > 2 * low["driver"]

def test_larger_parts_take_more_of_a_worker_and_a_tokenizer_more_of_the_driver():
    at = lambda *sets: c.make_plan(1e8, 1e12, 8, load_settings(overrides=list(sets)), calibration(*THREE))["memory"]
    assert at("dedup.part_bytes=1073741824")["worker"] > at()["worker"] + 300e6  # fewer parts make their list shorter
    learning = [point(n, 2000 * n) for n in (1e4, 1e5)]
    for p, peak in zip(learning, (600.0, 1600.0)): p["stages"]["format.tokenizer"]["peak"] = peak
    plan = c.make_plan(1e6, 2e9, 8, SETTINGS, calibration(*learning))["memory"]
    assert plan["worker"] < 700 * 2**20 and plan["driver"] < c.make_plan(1e6, 2e9, 8, load_settings(overrides=["tokenizer.sample_bytes=1000000000"]), calibration(*learning))["memory"]["driver"]

def test_a_plan_says_how_far_it_goes_beyond_what_was_measured():
    near, far = (c.make_plan(n, 2000 * n, 8, SETTINGS, calibration(*THREE))["warnings"] for n in (5e5, 1e9))
    assert not any("order of magnitude" in w for w in near) and "10,000 times" in far[0] and "order of magnitude" in far[0]
    flat = [point(100_000, 2e8), point(25_000, 5e7), point(12_500, 2e8, long=True)]
    for p in flat: p["stages"]["dedup.write"]["cpu"] = 1.0
    assert any("dedup.write" in w and "start-up" in w for w in c.make_plan(1e8, 2e11, 8, SETTINGS, calibration(*flat))["warnings"])

def test_requests_are_rates_a_part_and_slices():
    def on_s3(parts, n): 
        p = point(n, 2000 * n, "s3", parts=parts); cut = c.slices_of(p, "dedup.near.build", SETTINGS)
        p["stages"]["dedup.near.build"]["requests"] = {"GET": 3 * parts + 2 * cut + 10, "PUT": 2 * parts}
        return p
    plan = c.make_plan(1e8, 1e12, 8, SETTINGS, calibration(*THREE, on_s3(40, 1e5), on_s3(400, 1e5), on_s3(400, 1e6)), "s3")
    row = next(r for r in plan["stages"] if r["stage"] == "dedup.near.build")
    assert row["GET"] == pytest.approx(3 * plan["cuts"]["parts"] + 2 * plan["cuts"]["dedup.near.build"] + 10, rel=.01) and row["PUT"] == pytest.approx(2 * plan["cuts"]["parts"], rel=.01)
    assert not any(r["GET"] for r in c.make_plan(1e8, 1e12, 8, SETTINGS, calibration(*THREE))["stages"])

def test_prices_are_assumptions_that_can_be_given():
    free = c.make_plan(1e8, 1e12, 8, SETTINGS, calibration(*THREE), "s3", c.parse_prices([f"{k}=0" for k in ("vcpu_hour", "gb_month", "put_1000", "get_1000")]))
    assert free["dollars"]["total"] == 0
    for bad in ("vcpu=1", "vcpu_hour", "vcpu_hour=-1", "gb_month=x"):
        with pytest.raises(UserError, match="--price"): c.parse_prices([bad])

def test_one_point_takes_its_shape_from_another_calibration(monkeypatch):
    twice = point(50_000, 1e8)
    for cost in twice["stages"].values(): cost["cpu"] *= 2
    monkeypatch.setattr(c, "bundled", lambda: calibration(*THREE))
    rows = {r["stage"]: r for r in c.make_plan(1e6, 3e9, 1, SETTINGS, calibration(twice))["stages"]}
    assert rows["dedup.near.sign"]["cpu_hours"] * 3600 == pytest.approx(2 * 12, rel=.01)
    monkeypatch.setattr(c, "bundled", lambda: {"points": [], "about": {}})
    assert c.make_plan(50_000, 1e8, 1, SETTINGS, calibration(twice))["stages"]

@pytest.mark.parametrize("arguments, word", [(["--documents", "0", "--bytes", "1"], "positive"), (["--documents", "1e9"], "positive"), (["--documents", "1e10", "--bytes", "5e13"], "by domain"),
    (["--documents", "1e3", "--bytes", "1e6", "--duplicates", "2"], "--duplicates"), (["--documents", "1e3", "--bytes", "1e6", "--price", "gold=1"], "--price"), (["--documents", "1e3", "--bytes", "1e6", "--store", "tape"], "--store"),
    (["--documents", "1e3", "--bytes", "1e6", "--calibration", "nowhere.json"], "nowhere.json"), (["--calibrate", "nowhere"], "nowhere"), (["--calibrate", "sample", "--at", "here"], "--at")])
def test_mistakes_are_one_line(arguments, word, tmp_path, capsys, monkeypatch):
    file = tmp_path/"rates.json"; c.save_calibration(calibration(*THREE), str(file))
    with pytest.raises(SystemExit) as end: main(["plan", *arguments, *(["--calibration", str(file)] if not {"--calibration", "--calibrate"} & set(arguments) else [])])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.strip().splitlines()) == 1 and word in err

@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": {}, "points": []}', '{"about": {}, "points": [{"stages": {}}]}', '{"about": {}, "points": [3]}'])
def test_a_file_that_is_no_calibration_is_refused(text, tmp_path):
    (tmp_path/"x.json").write_text(text)
    with pytest.raises(UserError, match="x.json"): c.load_calibration(str(tmp_path/"x.json"))

def test_the_command_prints_tables_and_json(tmp_path, capsys):
    file = tmp_path/"rates.json"; c.save_calibration(calibration(*THREE), str(file))
    ask = ["plan", "--documents", "1e9", "--bytes", "5e12", "--store", "s3", "--calibration", str(file)]
    def run(*arguments):
        with pytest.raises(SystemExit) as end: main(list(arguments))
        assert end.value.code == 0; return capsys.readouterr().out
    plan = json.loads(run(*ask, "--json"))
    assert plan["asked"]["workers"] == 64 and plan["dollars"]["total"] > 0
    out = run(*ask)
    for word in ("assumed", "made up", "dedup.near.build", "part_bytes"): assert word in out

def test_the_bundled_calibration_says_on_what_it_was_measured():
    found = c.bundled()
    assert found["points"] and {"processor", "corpus", "measured"} <= set(found["about"]) and {"local", "s3"} == {p["store"] for p in found["points"]}

def test_what_travels_to_a_worker_and_back_is_small(tmp_path):
    "Parts lie in the store; names and counts travel. Ray keeps what is below 100 KB out of its object store."
    from yunmin_efficientdata.dedup import phase
    sizes = {}
    class Weighing(LocalExecutor):
        def map(self, fn, items, desc=""):
            for item in items:
                result = fn(item); name = getattr(fn, "__name__", str(fn))
                sizes[name] = max(sizes.get(name, 0), len(pickle.dumps(item)), len(pickle.dumps(result)))
                yield result
    write_sample(open_store(str(tmp_path)), documents=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yunmin_efficientdata.core.context.make_executor", lambda kind, workers: Weighing(1))
        phase.run(str(tmp_path), overrides=["dedup.part_bytes=65536", "dedup.audit.planted=0", "dedup.contamination.sets=[]"])
    assert {"prepare_file", "prepare_range", "sign_part", "join_partition", "verify_range", "write_part"} <= set(sizes) and max(sizes.values()) < 100_000, sizes

FAST = ("format.benchmark_rows=100",)

def compare(folder, source: str, limit: float, s3) -> None:
    "Calibrate on a tenth, predict the whole, run the whole; on S3 phase 1, for its requests."
    rates = c.calibrate(source, limit, overrides=FAST, at=f"{s3.uri}/rates", say=lambda text: print(text, flush=True))
    real, far = c.run_point(str(folder/"whole"), source, 1, 1, FAST), c.run_point(f"{s3.uri}/whole", source, 1, 1, FAST, phases=("dedup",))
    plan, there = (c.make_plan(real["documents"], real["bytes"], 1, load_settings(overrides=[*FAST, "format.benchmark_repeats=1"]), rates, store) for store in ("local", "s3"))
    ratios = report(plan, real)
    got, said = (sum(r[k] for r in rows for k in c.KINDS if k in r) for rows in ([s["requests"] for s in far["stages"].values()], [r for r in there["stages"] if r["stage"] in far["stages"]]))
    ratios["requests of dedup"] = said / got; print(f"  requests of dedup predicted {said:,.0f} measured {got:,.0f}  {said / got:.2f}")
    small = max(p["documents"] for p in rates["points"])
    print(f"from {small:,} documents to {real['documents']:,}: {real['documents'] / small:.1f} times")
    assert all(.75 <= r <= 1.25 for r in ratios.values()), ratios

def report(plan: dict, real: dict) -> dict[str, float]: # what -> predicted / measured
    "Both phases together are held to the limit; a phase and a stage alone are printed, for seconds of start-up vary with the load of the machine."
    ratios = {}
    for phase in ("", "dedup", "format"):
        got = sum(s["cpu"] for n, s in real["stages"].items() if n.startswith(phase)); said = 3600 * sum(r["cpu_hours"] for r in plan["stages"] if r["stage"].startswith(phase))
        if not phase: ratios["CPU s"] = said / got
        print(f"  CPU s of {phase or 'both':8} predicted {said:8.1f} measured {got:8.1f}  {said / got:.2f}")
    for r in plan["stages"]:
        if r["stage"] in real["stages"]: print(f"    {r['stage']:20} {3600 * r['cpu_hours']:8.2f} {real['stages'][r['stage']]['cpu']:8.2f}")
    peak = max(s["peak"] for s in real["stages"].values()); ratios["peak memory"] = max(plan["memory"]["worker"], plan["memory"]["driver"]) / 2**20 / peak
    disk = sum(real["disk"].values()); ratios["disk"] = sum(v for k, v in plan["disk"].items() if not k.startswith("while")) / disk
    for name in ("peak memory", "disk"): print(f"  {name} {ratios[name]:.2f}")
    for f, v in real["disk"].items(): print(f"    {f:14} {plan['disk'].get(f, 0) / 1e6:8.1f} {v / 1e6:8.1f} MB")
    return ratios

@pytest.mark.slow
def test_a_tenth_of_dev_predicts_the_whole(corpus, tmp_path, s3):
    "Every tenth document of dev (22 MB) against all of it. With less, nearly all that is measured is start-up: 2.5 MB of the sample corpus missed its tenfold by a third."
    if not (corpus/"dev").is_dir(): pytest.skip(f"{corpus}/dev does not exist")
    compare(tmp_path, str(corpus/"dev"), 23e6, s3)
