"""The executive table once more, from the recorded files alone: csv, json and arithmetic, nothing of the package.

    python tests/recompute.py WS        compares a finished workspace's results/executive.csv with it

A number of the report is trusted when two programs that share no code get it from the same files."""
import csv, json, math, statistics, sys
from pathlib import Path

LIMITS = {"data": (50, ">="), "cost_one": (70, ">="), "cost_search": (70, ">="), "loading": (5, ">="), "windows": (5, ">="), "memory": (80, ">="), "window_memory": (80, ">="), "choices": (15, ">="),
          "train": (2, "<="), "vectors": (5, "<="), "merge": (20, "<="), "five": (10, "<="), "ppl": (3, ">="), "bleu": (2, ">="), "prompts": (6, ">="), "errors": (1, "<=")}


def table(ws, key):
    path = Path(ws)/key
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else None


def record(ws, key):
    path = Path(ws)/key
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def data(ws):
    rows = [r for r in table(ws, "dedup_log.csv") or [] if r["scope"] == "total"]
    if not rows: return None
    return 100*(1 - int(rows[-1]["bytes_out"])/int(rows[0]["bytes_in"]))


def errors(ws):
    total = (record(ws, "dedup_ready/manifest.json") or {}).get("total")
    return 100*sum(total["quarantined"].values())/total["read"] if total else None


def medians(ws, column):
    found = {}
    for r in table(ws, "benchmark/io_speed_comparison.csv") or []: found.setdefault(r["format"], []).append(float(r[column]))
    return {f: statistics.median(v) for f, v in found.items()}


def ratio(ws, column, a, b): # a/b
    m = medians(ws, column)
    return m[a]/m[b] if a in m and b in m else None


def costs(ws):
    "Seconds of making the merged model, of one mixed run, of a mixture search; None where unknown."
    ledger = {r["part"]: float(r["seconds"]) for r in table(ws, "results/cost_ledger.csv") or [] if r["seconds"]}
    old = record(ws, "results/dem_costs.json") or {}
    if ledger.get("mixed") and any(p.startswith("lora.") for p in ledger):
        dem = sum(s for p, s in ledger.items() if p not in ("base", "mixed", "mixture_search_estimate") and not p.startswith("control") and not p.startswith("measure"))
        mixed, search = ledger["mixed"], ledger.get("mixture_search_estimate")
    elif old.get("mixed") and old.get("domains"):
        dem = sum(c["seconds"] for c in old["domains"].values()) + sum(old.get(k, {}).get("seconds", 0) for k in ("seed", "polish", "vectors", "search", "calibration", "merge"))
        mixed, search = old["mixed"]["seconds"], None
    else: return None, None, None
    weights = record(ws, "results/merge_weights.json") or {}
    tried = weights.get("evaluations") or (weights.get("search") or {}).get("evaluations") or (weights.get("search") or {}).get("steps")
    tried = len(tried) if isinstance(tried, list) else tried
    return dem, mixed, search or (tried*mixed if tried else None)


def domains(ws):
    found = (record(ws, "results/dem_costs.json") or {}).get("domains") or {}
    return [c["seconds"] for c in found.values()]


def stage(ws, name):
    entry = record(ws, f"ledger/{name}.json")
    return entry["seconds"]/60 if entry and entry["status"] == "done" else None


def scores(ws, metric):
    "{domain: {model: value}} without missing values."
    found = {}
    for r in table(ws, "results/metric_summary.csv") or []:
        if r["metric"] == metric and r["value"] not in ("", "nan"): found.setdefault(r["domain"], {})[r["model"]] = float(r["value"])
    return found


def pairs(ws, metric):
    both = {d: (v["base"], v["merged"]) for d, v in scores(ws, metric).items() if "base" in v and "merged" in v}
    own = {d: v for d, v in both.items() if d != "general"}
    return list((own or both).values())


def ppl(ws):
    p = pairs(ws, "perplexity")
    return 100*(1 - math.exp(sum(math.log(m/b) for b, m in p)/len(p))) if p else None


def bleu(ws):
    p = pairs(ws, "bleu_char")
    return sum(m - b for b, m in p)/len(p) if p else None


def choices(ws):
    s = scores(ws, "accuracy").values()
    base, merged = ([v[m] for v in s if m in v] for m in ("base", "merged"))
    return 100*(statistics.mean(merged)/statistics.mean(base) - 1) if base and merged and any(base) else None


def prompts(ws):
    g = record(ws, "results/gains.json")
    return 10*g["improved"]/g["prompts"] if g and g.get("prompts") else None


def expected(ws): # {id: value or None}
    dem, mixed, search = costs(ws)
    d, memory = domains(ws), lambda a, b: None if (r := ratio(ws, "tracemalloc_mb", b, a)) is None else 100*(1 - r)
    return {"data": data(ws), "errors": errors(ws), "cost_one": 100*(1 - dem/mixed) if dem else None, "cost_search": 100*(1 - dem/search) if dem and search else None,
            "loading": ratio(ws, "seconds", "jsonl", "parquet"), "windows": ratio(ws, "seconds", "jsonl, tokenized", "parquet, windows"),
            "memory": memory("jsonl", "parquet"), "window_memory": memory("jsonl, tokenized", "parquet, windows"),
            "choices": choices(ws), "train": max(d)/3600 if d else None, "five": sum(d)/3600 if d else None, "vectors": stage(ws, "dem.vectors"), "merge": stage(ws, "dem.merge"),
            "ppl": ppl(ws), "bleu": bleu(ws), "prompts": prompts(ws)}


def verdict(name, value):
    limit, way = LIMITS[name]
    return "not measured" if value is None else "yes" if (value >= limit if way == ">=" else value <= limit) else "no"


def differences(ws, rows): # rows of executive.csv
    "What the table says otherwise than the files; empty when every number is right."
    want, out = expected(ws), []
    if {r["id"] for r in rows} != set(want): out.append(f"rows: {sorted({r['id'] for r in rows} ^ set(want))}")
    for r in rows:
        value, said = want[r["id"]], None if r["value"] in ("", "nan", None) else float(r["value"])
        if (value is None) != (said is None) or value is not None and not math.isclose(value, said, rel_tol=1e-6, abs_tol=1e-9): out.append(f"{r['id']}: {said} in the table, {value} from the files")
        if r["met"] != verdict(r["id"], value): out.append(f"{r['id']}: {r['met']} in the table, {verdict(r['id'], value)} from the files")
        if value is not None and not (Path(ws)/r["source"]).exists(): out.append(f"{r['id']}: {r['source']} does not exist")
    return out


if __name__ == "__main__":
    found = differences(sys.argv[1], table(sys.argv[1], "results/executive.csv"))
    print("\n".join(found) or f"{len(LIMITS)} of {len(LIMITS)} rows agree with the files")
    sys.exit(bool(found))
