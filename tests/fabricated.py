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
        else: {"dedup": dedup, "format": format_, "dem": dem, "ledger": ledger}[part](store, domains)
    return store
