"""A small workspace with made-up numbers, in the formats that phases 1 to 4 write: a fixture for the report's tests, never a result."""
import json

import nbformat
from yunmin_efficientdata.core.figures import save_figure

DOMAINS = ("assembly", "main_data", "social", "textbook", "web")
MODELS = ("base", *DOMAINS, "uniform", "merged", "mixed")


def dedup(store, domains=DOMAINS):
    rows = ["scope,step,docs_in,docs_out,bytes_in,bytes_out,words_in,words_out,duplicate_rate,seconds"]
    for scope, k in [(d, 1) for d in domains] + [("total", len(domains))]:
        for step, a, z in (("prepare", 200, 190), ("exact", 190, 170), ("near", 170, 120)):
            rows.append(f"{scope},{step},{a*k},{z*k},{a*k*1000},{z*k*1000},{a*k*100},{z*k*100},{1 - z/a:.6f},{1.5*k}")
    store.write("dedup_log.csv", "\n".join(rows) + "\n")
    one = {"read": 202, "kept": 190, "filtered": {"too_short": 7, "symbols": 3}, "quarantined": {"not JSON": 2}}
    total = {"read": 202*len(domains), "kept": 190*len(domains), "filtered": {"too_short": 7*len(domains), "symbols": 3*len(domains)}, "quarantined": {"not JSON": 2*len(domains)}}
    store.write("dedup_ready/statistics.json", json.dumps({"threshold": .8, "bands": 16, "rows": 8, "docs_per_second": {"sign": 4000.5, "build": 9e4, "query": None}, "candidates_per_document": .01,
        "candidate_precision": .7, "predicted_recall_at_threshold": .947, "sampled_pairs": [{"a": "x", "b": "y", "jaccard": .9, "true": .9}, {"a": "x", "b": "z", "jaccard": .8, "true": .79}]}))
    store.write("dedup_ready/manifest.json", json.dumps({"total": total, "domains": {d: one for d in domains}}))


def format_(store, domains=DOMAINS):
    held = {s: {d: {"files": [f"parquet_ready/heldout/{s}/{d}.parquet"], "rows": 20, "tokens": 4000, "bytes": 20000} for d in domains} for s in ("validation", "test")}
    store.write("parquet_ready/manifest.json", json.dumps({"domains": {d: {"files": [f"parquet_ready/{d}.parquet"], "rows": 80, "tokens": 16000, "bytes": 90000} for d in domains},
                                                           "heldout": held, "tokenizer": {"hash": "0123456789abcdef00", "vocab_size": 4096, "eos_id": 0}}))
    store.write("benchmark/io_speed_comparison.csv", BENCHMARK)


BENCHMARK = "format,repeat,seconds,tracemalloc_mb,rss_mb\n" + "".join(f"{f},{i},{s + i/100},{m},{r}\n" for f, s, m, r in (("jsonl", .9, 40, 80), ("parquet", .15, 6, 30), ("jsonl; tokenized", 3, 50, 90), ("parquet; windows", .2, 5, 20)) for i in range(3)).replace("jsonl; tokenized", '"jsonl, tokenized"').replace("parquet; windows", '"parquet, windows"')


def dem(store, domains=DOMAINS):
    cost = lambda s, t=0, n=0: {"seconds": s, "cpu_seconds": s*1.9, "tokens": t, "steps": n}
    store.write("results/dem_costs.json", json.dumps({"base": cost(40, 400000, 400), "domains": {d: cost(12 + i, 30000, 60) for i, d in enumerate(domains)},
                                                      "mixed": cost(66, 150000, 300), "search": cost(9), "merge": cost(.4)}))
    store.write("results/merge_weights.json", json.dumps({"weights": {d: round(1/len(domains), 6) for d in domains}, "evaluations": 12}))
    changed = {"mean": 1e-5, "variance": 1e-4, "share_beyond_3sigma": .004, "norm": 1.4}
    for d in domains:
        store.write(f"diff_stats/diff_{d}_summary.json", json.dumps({"norm": 1.4, "relative_norm": .08, "changed": changed, "sanity": {"norm": {"value": 1.4, "limit": 1.0, "ok": False}, "relative_norm": {"value": .08, "limit": .2, "ok": True}}}))


def evaluation(store, domains=DOMAINS, merged=0.93, prompts=True):
    "`merged` is the ratio of the merged model's perplexity to the base's: above 1, merging made it worse."
    factor = {"base": 1, "uniform": merged + .01, "merged": merged, "mixed": .9}
    rows = ["model,domain,metric,value,low,high,n"]
    for i, d in enumerate((*domains, "general")):
        for m in ("base", *domains, "uniform", "merged", "mixed"):
            ppl = (80 + 10*i)*factor.get(m, .85 if m == d else 1.05)
            rows.append(f"{m},{d},perplexity,{ppl:.4f},{ppl*.9:.4f},{ppl*1.1:.4f},20")
            if d != "general" and m in factor: rows += [f"{m},{d},bleu_char,{10 + 3*(m == 'merged'):.4f},,,20", f"{m},{d},rougeL,{.2 + .01*(m == 'merged'):.4f},,,20"]
    for m in ("base", "merged"): rows.append(f"{m},general,accuracy,{.3 if m == 'base' else .33},,,50")
    store.write("results/metric_summary.csv", "\n".join(rows) + "\n")
    store.write("results/inference.csv", "model,batch,ttft_ms,tpot_ms,tokens_per_second,peak_memory_mb,mfu,mbu\nbase,1,5,2,400,,0.01,0.02\nmerged,1,5,2,410,,0.01,0.02\n")
    if prompts:
        item = lambda i, g: {"domain": "web", "prompt": f"질문 {i} | 표를 *깨는* 문장", "reference": "원문", "base": "답 하나\n둘째 줄\x00", "merged": "답 둘", "gain": g}
        store.write("results/gains.json", json.dumps({"prompts": 10, "improved": 7, "needed": 6, "met": True, "sentences": 40, "sentences_improved": 25, "gains": [item(i, .5 - i/10) for i in range(3)], "losses": [item(9, -.2)]}, ensure_ascii=False))


def extras(store, domains=DOMAINS):
    "What the newer parts of phases 3 and 4 write: ways to merge, cost ledger, pairs, contamination, subjects, harness, data curve, ratings, judge."
    w = lambda key, header, rows: store.write(key, header + "\n" + "".join(",".join("" if v is None else str(v) for v in r) + "\n" for r in rows))
    ways = {"base": (150, 0, 90, 0), "uniform": (130, .38, 93, 300), "seqmean": (112, .76, 94, 300), "mixed_20": (115, .62, 92, 60), "mixed": (100, 1, 96, 300)}
    w("results/merge_methods.csv", "method,domain,nats,perplexity,share,steps,cpu_seconds,split",
      [r for m, (p, s, g, n) in ways.items() for r in ((m, "mean", 4.8, p, s, n, n/10, "test"), (m, "general", 4.5, g, None, n, n/10, "test"))])
    w("results/cost_ledger.csv", "part,seconds,cpu_seconds,tokens,steps,flops,kind", [("base", 40, 76, 400000, 400, 1e12, "measured"), *((f"lora.{d}", 10, 19, 30000, 60, 1e11, "measured") for d in domains), ("seed", 6, 11, 9000, 30, 1e10, "measured"),
      ("calibration", 2, 4, 4000, None, None, "measured"), ("merge", 1, 1, None, None, None, "measured"), ("control.mixed_20", 12, 20, 30000, 60, 1e11, "measured"), ("mixed", 66, 120, 150000, 300, 5e11, "measured"), ("mixture_search_estimate", 1320, 2400, 3000000, 6000, 1e13, "arithmetic")])
    w("results/perplexity_pairs.csv", "model,against,domain,change,low,high,bits_change,bits_low,bits_high,better,documents",
      [("merged", "base", d, -7, -9, -5, -.1, -.12, -.08, .99, 20) for d in (*domains, "mean")] + [("merged", "base", "general", 1, -1, 3, .01, -.01, .03, .4, 20)])
    subjects = [(m, "quiz", s, a, .1, .6, .25, .3, False, a, .05, 10) for m, a in (("base", .3), ("merged", .4), ("web", .9)) for s in ("all", "과학", "역사")]
    header = "model,file,subject,accuracy,low,high,chance,constant,above_chance,raw,margin,n"
    w("results/choices.csv", header, [r for r in subjects if r[2] == "all"]); w("results/choices_by_subject.csv", header, [r for r in subjects if r[2] != "all"])
    w("results/contamination.csv", "set,model,metric,items,contaminated,score_all,score_clean,checked", [("quiz", m, "accuracy", 20, 3, .35, .3, True) for m in ("base", "merged")] + [("prompts", "base", "gain", 10, None, .1, None, False)])
    w("results/harness.csv", "model,task,subject,metric,value,low,high,chance,n,version", [(m, "kobest_copa", s, "acc", .5, .4, .6, .5, 100, "1.0") for m in ("base", "merged") for s in ("all", "-")])
    w("results/data_curve.csv", "kind,domain,share,seed,tokens,steps,nats,low,high,perplexity,change,cpu_seconds", [("measured", "mean", .5, None, 1000, None, 5, 4.9, 5.1, 148, 10, None), ("measured", "mean", 1, None, 2000, None, 4.9, 4.8, 5, 134, 0, None),
      ("predicted", "mean", 2, None, 4000, None, 4.8, 4.5, 5.1, 121, -9.5, None), ("run", "web", 1, 0, 2000, 9, 4.9, None, None, 134, 0, 1.5)])
    w("results/ratings.csv", "rater,id,domain,model,answer,information,logic,brevity,tone,note", [(r, f"web-{i}", "web", m, "abc", p, p, 3, 4, None) for r in ("지민", "하나") for i in range(3) for m, p in (("base", 2), ("merged", 4))])
    points = [f"{who}_{c}" for who in ("base", "rival") for c in ("information", "logic", "brevity", "tone", "overall")]
    w("results/judge.csv", ",".join(["id", "domain", "rival", "verdict", "consistent", *points, "difference", "answers", "failed"]), [(f"web-{i}", "web", "merged", "rival", True, *[2]*5, *[4]*5, 2, "abc", None) for i in range(3)])


def figures(store):
    "A figure of each phase."
    import matplotlib.pyplot as plt
    for name in ("dedup_rates", "format_sizes", "dem_weights", "evaluation_gains"): save_figure(store, plt.figure(figsize=(1, 1)), f"reports/figures/{name}.png")


def ledger(store, domains=DOMAINS):
    names = ["dedup.prepare", "dedup.exact", "dedup.near", "dedup.audit", "format.tokenizer", "format.parquet", "format.profile", "format.benchmark", "dem.base",
             *(f"dem.lora.{d}" for d in domains), "dem.mixed", "dem.vectors", "dem.weights", "dem.merge", "evaluation.perplexity", "evaluation.overlap", "evaluation.prompts"]
    for i, n in enumerate(names):
        store.write(f"ledger/{n}.json", json.dumps({"stage": n, "status": "done", "started": f"2026-01-01T00:00:{i:02d}Z", "seconds": 1.0 + i, "cpu_seconds": 1.5 + i, "peak_rss_mb": 300 + i,
                                                    "fingerprint": f"{i:016x}", "counts": {"parameters": 1234567} if n == "dem.base" else {}}))


def notebooks(store, path="/home/jskim77/secret/ws"):
    "Executed phase notebooks as papermill leaves them: machine paths in the injected cell and in outputs, execution metadata."
    for name, title in (("01_dedup", "Dedup"), ("02_format", "Format"), ("03_dem", "DEM"), ("04_evaluation", "Evaluation"), ("05_report", "Report")):
        cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\n> Fabricated for a test."), nbformat.v4.new_code_cell("#| export\ndef run(): pass"),
                 nbformat.v4.new_code_cell('workspace = "../workspace"', metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(f'# Parameters\nworkspace = "{path}"\nraw = "{path}/raw"\n', metadata={"tags": ["injected-parameters"], "papermill": {"duration": 1}}),
                 nbformat.v4.new_code_cell("#| eval: false\nprint(run())", outputs=[nbformat.v4.new_output("stream", text=f"읽음 {path}/raw/web.jsonl\n"),
                                           nbformat.v4.new_output("stream", name="stderr", text=f"{path}: warning\n")], metadata={"execution": {"iopub.execute_input": "2026-01-01"}}),
                 nbformat.v4.new_markdown_cell("[정제](01a_clean.ipynb), [없는 쪽](none.ipynb), [라이선스](../LICENSE)")]
        store.write(f"reports/runs/{name}.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {"output_path": path}})))


def workspace(store, domains=DOMAINS, merged=0.93, prompts=True, parts=("dedup", "format", "dem", "evaluation", "ledger", "figures", "notebooks")):
    "Everything, or only the named parts."
    for part in parts:
        if part == "evaluation": evaluation(store, domains, merged, prompts)
        elif part == "notebooks": notebooks(store)
        elif part == "figures": figures(store)
        else: {"dedup": dedup, "format": format_, "dem": dem, "ledger": ledger, "extras": extras}[part](store, domains)
    return store
