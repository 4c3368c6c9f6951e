"""The merge benchmark: every form means the same, a wrong merge is found, what cannot run is a row; mergekit and peft agree where they are installed."""
import math, shutil
from pathlib import Path
import numpy as np, pytest
from safetensors.torch import load_file, save_file
from yunmin_efficientdata.bench.harness import run_once
from yunmin_efficientdata.bench.merge import FIELD, MEMBERS, Anonymous, bench_merge, compare, field_of, goals, run_naive, run_ours, shape_of, table_of, tensors_of, write_models, write_reference
from yunmin_efficientdata.core.settings import UserError


@pytest.fixture(scope="module")
def job(tmp_path_factory): return write_models(tmp_path_factory.mktemp("bench")/"models", 3e6)


def test_the_models_have_the_size_asked_for_and_load(job):
    from transformers import AutoModelForCausalLM
    assert abs(job["size"]/3e6 - 1) < .15 and abs(sum(4*math.prod(s) for _, s in tensors_of(shape_of(2.2e9)))/2.2e9 - 1) < .05
    model, info = AutoModelForCausalLM.from_pretrained(f"{job['folder']}/full/web", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("method", MEMBERS)
def test_ours_and_naive_agree_with_the_reference(job, tmp_path, method):
    reference = write_reference(job, method, .2)
    for form in ("full", "adapter", "dense", "lowrank") if method == "linear" else ("full",):
        run_ours(job | {"form": form, "method": method, "density": .2, "threads": 1, "out": str(tmp_path)}); found = compare(tmp_path/"model", reference, Path(job["folder"])/"base")
        if method == "dare": assert abs(found["changed"] - (1 - .8**3)) < .01 and abs(found["slope"] - 1) < .05
        else: assert found["max_diff"] < 1e-7 and found["differ"] == 0 and abs(found["slope"] - 1) < 1e-3
    if method == "linear":
        shutil.rmtree(tmp_path/"model"); run_naive(job | {"form": "full", "method": method, "out": str(tmp_path)}); assert compare(tmp_path/"model", reference, Path(job["folder"])/"base")["max_diff"] < 1e-7


def test_a_wrong_merge_is_found(job, tmp_path):
    base = Path(job["folder"])/"base"; shutil.copytree(base, tmp_path/"m"); shard = next((tmp_path/"m").glob("*.safetensors")); x = load_file(shard)
    assert compare(tmp_path/"m", base, base)["max_diff"] == 0
    key = next(k for k in x if "up_proj" in k); x[key][3, 4] += 1e-4; save_file(x, shard); found = compare(tmp_path/"m", base, base)
    assert abs(found["max_diff"] - 1e-4) < 1e-7 and found["differ"] > 0
    del x[key]; save_file(x, shard); (tmp_path/"m"/"model.safetensors.index.json").unlink(); shard.rename(tmp_path/"m"/"model.safetensors")
    assert compare(tmp_path/"m", base, base)["max_diff"] == math.inf


def test_tables_and_goals_say_what_did_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("YUNMIN_BENCH", str(tmp_path)); (tmp_path/"mergekit.failed").write_text("no wheel for this Python")
    field = field_of({"folder": "x"}, "linear", FIELD); missing = next(c for c in field if c.name == "mergekit")
    assert missing.missing == "no wheel for this Python" and [c.name for c in field] == list(FIELD)
    good = {"wall": 2., "cpu": 1., "gigabytes": 1., "rss_mb": 9., "anonymous_mb": 5., "process_cpu": 1., "sync": 0., "max_diff": 1e-8, "differ": 0., "changed": .5, "slope": 1.}
    rows = [{"contestant": "mergekit", "repeat": 0, "error": "no wheel"}] + [{"contestant": n, "repeat": r, **good, "wall": w} for n, w in (("ours", 2.), ("naive torch", 8.)) for r in (0, 1)]
    t = table_of(rows, "linear"); assert t.set_index("contestant").wall_ratio["naive torch"] == 4 and t.not_run.iloc[-1] == "no wheel"
    g = goals({"linear": t}).set_index("goal"); assert g.result["linear: wall time of mergekit, times ours"] == "not measured" and (g.result[g.index.str.contains("memory")] == "met").all()


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown; choose from"): bench_merge(.003, ["nobody"])
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(UserError, match="are free; choose fewer --gigabytes") as e: bench_merge(.003, [], tmp_path/"o", scratch=str(tmp_path))
    assert "\n" not in str(e.value) and not (tmp_path/"o").exists() and not list(tmp_path.iterdir())


def test_anonymous_memory_is_seen_and_mapped_files_are_not(tmp_path):
    np.save(tmp_path/"x.npy", np.ones(5_000_000))
    with Anonymous() as g: np.load(tmp_path/"x.npy", mmap_mode="r").sum()
    with Anonymous() as h: x = np.ones(5_000_000); x.sum()
    assert g.peak - g.start < 15 < 38 < h.peak - h.start


@pytest.mark.slow
@pytest.mark.parametrize("method", MEMBERS)
def test_mergekit_and_peft_agree_on_a_llama(job, tmp_path, method):
    "The same models to everybody; what is not installed is left out."
    reference, out = write_reference(job | {"folder": job["folder"]}, method, .2) if not (Path(job["folder"])/f"reference-{method}").exists() else Path(job["folder"])/f"reference-{method}", {}
    for c in field_of(job, method, FIELD):
        if c.missing: assert c.missing.startswith("not installed"); continue
        answer = run_once(c, tmp_path/c.name.replace(" ", "_").replace(",", ""), 1); assert "error" not in answer, answer
        out[c.name] = compare(tmp_path/c.name.replace(" ", "_").replace(",", "")/"model", reference, Path(job["folder"])/"base")
    for name, found in out.items():
        if method == "dare": assert abs(found["changed"] - (1 - .8**3)) < .01 and abs(found["slope"] - 1) < .05, name
        elif (method, name) == ("ties", "mergekit"): assert found["differ"] < 1e-5  # elements of exactly the magnitude of the cut
        else: assert found["max_diff"] < 1e-6, name
