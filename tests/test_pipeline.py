"""End to end: `yunmin run` by papermill on the sample corpus with a micro training, in a folder and in a bucket; skipped, killed and resumed."""
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from yunmin_efficientdata import pipeline
from yunmin_efficientdata.core.settings import project_root
from yunmin_efficientdata.core.store import open_store

YUNMIN = [str(Path(sys.executable).with_name("yunmin"))]
MICRO = ["dem.base.steps=12", "dem.seed_steps=4", "dem.lora.max_steps=4", "dem.merge.search_steps=2", "dem.merge.search_windows=4", "dem.merge.calibration_windows=8", "dem.merge.fit_steps=2",
         "dem.merge.curve_points=2", "dem.test_windows=8", "tokenizer.vocab_size=1024",
         "format.benchmark_repeats=1", "format.benchmark_rows=64", "evaluation.max_documents=6", "evaluation.continuation_documents=2",
         "evaluation.max_prompts=5", "evaluation.max_new_tokens=8", "evaluation.max_questions=5"]
SETS = [x for m in MICRO for x in ("--set", m)]
DATA = ("dedup_ready/", "minhash_lsh/", "deduped/", "parquet_ready/", "tokenizer/", "models/", "checkpoints/", "diff_vectors/", "diff_stats/", "merged_model/")
TABLES = ("results/metric_summary.csv", "results/perplexity.csv", "results/merge_weights.json", "results/eval_prompt_comparison.md")
TIMED = ("dedup_ready/statistics.json", "dedup_ready/audit.md")  # hold speeds

def yunmin(*args, cwd=None, env=None, timeout=900):
    return subprocess.run([*YUNMIN, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout)

def digests(store):
    "SHA-256 of every data file, by key."
    keys = [k for p in DATA for k in store.list(p) if k not in TIMED] + [k for k in TABLES if store.exists(k)]
    return {k: hashlib.sha256(store.read(k)).hexdigest() for k in keys}

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A workspace in which the whole pipeline ran once."
    ws = tmp_path_factory.mktemp("run")/"ws"
    assert yunmin("sample", ws, "--docs", 600).returncode == 0
    done = yunmin("run", ws, *SETS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return ws, done.stdout

CONTRACT = ["dedup_ready/manifest.json", "dedup_ready/review_samples.md", "dedup_log.csv", "minhash_lsh/signatures/", "minhash_lsh/pairs/", "minhash_lsh/clusters/",
            "parquet_ready/schema.txt", "parquet_ready/manifest.json", "parquet_ready/heldout/validation/", "parquet_ready/heldout/test/", "tokenizer/", "benchmark/io_speed_comparison.csv",
            "models/base/", "merged_model/", "results/metric_summary.csv", "results/perplexity.csv", "results/eval_prompt_comparison.md", "results/perf_summary.md", "results/merge_weights.json",
            "reports/report.md", "reports/figures/", "reports/site/index.html", "ledger/", "pipeline_run.log"]
DOMAINS = ("main_data", "textbook", "assembly", "web", "social")
CONTRACT += [name.format(d=d) for d in DOMAINS for name in ("dedup_ready/{d}/part-", "deduped/{d}/part-", "parquet_ready/{d}.parquet", "checkpoints/lora_{d}/", "logs/train_{d}.log",
             "summary/train_{d}.csv", "diff_vectors/diff_{d}.npy", "diff_vectors/diff_{d}.json", "diff_stats/diff_{d}_summary.json")]
CONTRACT += [f"reports/runs/{n}.ipynb" for n in pipeline.PHASES.values()]

def missing(store):
    every = store.list("")
    return [c for c in CONTRACT if not any(k == c or (k.startswith(c) and c[-1] in "/-") for k in every)]

def test_every_promised_file_is_there(finished):
    ws, out = finished
    assert missing(open_store(str(ws))) == []
    assert len([l for l in out.splitlines() if l.startswith("run: ✅ success")]) == 5, out

def test_executed_notebooks_carry_this_runs_parameters_and_no_paths(finished):
    ws, _ = finished
    for name in pipeline.PHASES.values():
        nb = nbformat.read(ws/f"reports/runs/{name}.ipynb", 4)
        injected = [c for c in nb.cells if "injected-parameters" in c.metadata.get("tags", [])]
        assert len(injected) == 1 and "dem.base.steps=12" in injected[0].source
        assert str(ws) not in json.dumps(nb, ensure_ascii=False), name
        assert not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]

def test_second_run_skips_in_seconds(finished):
    ws, _ = finished
    before, start = digests(open_store(str(ws))), time.time()
    done = yunmin("run", ws, *SETS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing changed, skipped") == 5 and time.time() - start < 40, done.stdout
    assert digests(open_store(str(ws))) == before

def test_direct_phases_skip_after_the_pipeline(finished):
    "The phase commands run the same code on the same ledger, so nothing is left to do for them."
    ws, _ = finished
    for phase in ("dedup", "format"):
        done = yunmin(phase, ws, *SETS)
        assert done.returncode == 0, done.stderr
        assert " done in " not in done.stdout and "skipped" in done.stdout, done.stdout

def test_status_lists_the_stages(finished):
    done = yunmin("status", finished[0], env={"COLUMNS": "250"})
    assert done.returncode == 0 and "dedup.prepare" in done.stdout and "dem.merge" in done.stdout and "failed" not in done.stdout

def test_second_run_at_once_is_refused(finished):
    ws, _ = finished
    from yunmin_efficientdata.core.context import workspace_lock
    with workspace_lock(open_store(str(ws))):
        done = yunmin("run", ws, *SETS)
    assert done.returncode == 2 and "in use by process" in done.stderr and done.stderr.count("\n") == 1

KILL_AT = {"dedup": "dedup.near", "format": "format.parquet", "dem": "dem.lora.web", "evaluate": "evaluation.overlap", "report": "report.write"}

def wait_for(path, process, limit=600):
    "Until a stage has begun; its ledger entry is written when it starts."
    end = time.time() + limit
    while time.time() < end and process.poll() is None:
        if path.exists(): return True
        time.sleep(0.02)
    return False

def test_killed_in_each_phase_and_resumed_ends_with_the_same_bytes(finished, tmp_path):
    "Each time with the phase that was killed before; at the end everything once more."
    ws, _ = finished
    other = tmp_path/"ws"; other.mkdir()
    shutil.copytree(ws/"raw", other/"raw"); shutil.copytree(ws/"truth", other/"truth")
    killed, sets = [], [*SETS, "--set", "report.site=false"]
    for i, stage in enumerate(KILL_AT.values()):
        phases = ",".join(list(KILL_AT)[max(0, i - 1):i + 1])
        p = subprocess.Popen([*YUNMIN, "run", str(other), "--phases", phases, *sets], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        if wait_for(other/f"ledger/{stage}.json", p):
            os.kill(p.pid, signal.SIGKILL); killed.append(stage)
        p.wait(); p.stdout.close()
    done = yunmin("run", other, *sets)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert killed == list(KILL_AT.values())
    a, b = digests(open_store(str(ws))), digests(open_store(str(other)))
    assert sorted(a) == sorted(b)
    assert [k for k in a if a[k] != b[k]] == []

def test_whole_pipeline_in_a_bucket(finished, s3):
    "The same files, with the same bytes, as in a folder."
    ws, _ = finished
    uri = f"{s3.uri}/ws"
    store = open_store(uri)
    for key in open_store(str(ws)).list("raw/") + open_store(str(ws)).list("truth/"): store.write(key, (ws/key).read_bytes())
    done = yunmin("run", uri, *SETS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert missing(store) == []
    a, b = digests(open_store(str(ws))), digests(store)
    assert [k for k in a if k.startswith(("deduped/", "minhash_lsh/", "parquet_ready/", "merged_model/")) and a[k] != b.get(k)] == []
    assert not [k for k in store.list("") if k == ".lock"]
    again = yunmin("run", uri, *SETS)
    assert again.stdout.count("nothing changed, skipped") == 5, again.stdout

def broken(tmp_path, source="02_format", text="raise ValueError('page 7 is broken')"):
    "A copy of the phase notebooks in which one fails."
    shutil.copytree(project_root()/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    nb = nbformat.read(tmp_path/f"nbs/{source}.ipynb", 4)
    at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell(text))
    nbformat.write(nb, tmp_path/f"nbs/{source}.ipynb")
    return tmp_path/"nbs"

def test_failing_phase_stops_the_run_and_the_next_one_resumes_there(finished, tmp_path, capsys):
    ws, _ = finished
    other = tmp_path/"ws"; shutil.copytree(ws/"raw", other/"raw")
    notebooks = broken(tmp_path)
    with pytest.raises(pipeline.PhaseError, match="phase format failed in cell .*ValueError: page 7 is broken"):
        pipeline.run_pipeline(str(other), phases="dedup,format", overrides=MICRO, notebooks=notebooks)
    assert "page 7 is broken" in (other/"pipeline_errors.log").read_text()
    assert "❌ format" in (other/"pipeline_errors.log").read_text()
    assert (other/"reports/runs/02_format.ipynb").exists() and not (other/"parquet_ready/manifest.json").exists()
    capsys.readouterr()
    shutil.rmtree(notebooks); shutil.copytree(project_root()/"nbs", notebooks)
    pipeline.run_pipeline(str(other), phases="dedup,format", overrides=MICRO, notebooks=notebooks)
    out = capsys.readouterr().out
    assert "✅ success dedup (nothing changed, skipped)" in out and "✅ success format" in out

def test_user_error_inside_a_phase_is_one_line_and_exit_2(tmp_path):
    ws = tmp_path/"ws"
    done = yunmin("run", ws, "--phases", "format")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0 and "yunmin dedup" in done.stderr

def test_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="does not assign speed"): pipeline.check_parameters(project_root()/"nbs/01_dedup.ipynb", {"speed": 1})

MISTAKES = [(["run", "{ws}", "--raw", "{ws}/nowhere"], "nowhere"), (["run", "{ws}"], "yunmin sample"), (["run", "{ws}", "--raw", "{empty}"], "no .jsonl"),
            (["run", "{ws}", "--config", "configs/nothing"], "configs/nothing"), (["run", "{ws}", "--set", "dedup.treshold=1"], "did you mean 'threshold'"),
            (["run", "{ws}", "--set", "dem.base.path={ws}/no_model", "--raw", "{raw}"], "no_model"), (["run", "{ws}", "--phases", "dedupe"], "dedupe"),
            (["merge", "{ws}/no_base", "{ws}/out", "--diff", "a.npy=1"], "no_base"), (["profile", "{ws}/none.parquet"], "none.parquet"),
            (["evaluate", "{ws}"], "yunmin "), (["report", "{ws}"], "yunmin "), (["dem", "{ws}"], "yunmin "), (["dem", "{ws}", "--only", "sports"], "yunmin "),
            (["plan", "--documents", "0", "--bytes", "1"], "positive"), (["dedup", "{ws}", "--executor", "spark"], "spark")]

@pytest.mark.parametrize("args,expected", MISTAKES, ids=[" ".join(a[:1] + a[2:3]) + e for a, e in MISTAKES])
def test_mistakes_are_one_clear_line(tmp_path, args, expected):
    (tmp_path/"empty").mkdir(); (tmp_path/"empty/notes.txt").write_text("x")
    (tmp_path/"raw").mkdir(); (tmp_path/"raw/web.jsonl").write_text('{"text": "한 줄"}\n')
    start = time.time()
    done = yunmin(*[a.format(ws=tmp_path/"ws", empty=tmp_path/"empty", raw=tmp_path/"raw") for a in args])
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert time.time() - start < 30

@pytest.mark.parametrize("uri,endpoint", [("s3://no-such-bucket/ws", None), ("s3://bucket/ws", "http://127.0.0.1:9")], ids=["no bucket", "no server"])
def test_bucket_out_of_reach_is_one_clear_line(s3, uri, endpoint):
    start = time.time()
    done = yunmin("run", uri, env={"AWS_ENDPOINT_URL": endpoint} if endpoint else None)
    assert done.returncode == 2 and "bucket" in done.stderr and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert time.time() - start < 30

def test_real_text_through_phases_1_and_2(corpus, tmp_path):
    ws = tmp_path/"ws"
    done = yunmin("run", ws, "--raw", corpus/"small", "--phases", "dedup,format", *SETS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    total = json.loads((ws/"dedup_ready/manifest.json").read_text())["total"]
    assert total["read"] == 12850 == total["kept"] + sum(total["filtered"].values()) + sum(total["quarantined"].values())
    manifest = json.loads((ws/"parquet_ready/manifest.json").read_text())
    assert sorted(manifest["domains"]) == sorted(DOMAINS)
