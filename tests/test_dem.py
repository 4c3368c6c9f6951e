"""Phase 3: bases that cannot be had, adapters, vectors and merges that must be refused, and a whole small run: killed, repeated, one domain again."""
import csv, json, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from yunmin_efficientdata.core.settings import BaseSettings, LoraSettings, UserError
from yunmin_efficientdata.dem.base import demo_config, find_base, load_model, quiet, save_model
from yunmin_efficientdata.dem.lora import adapt, adapter_parameters, domain_model, precision
from yunmin_efficientdata.dem.phase import run
from yunmin_efficientdata.dem.vectors import Vector

quiet()
DOMAINS = ("main_data", "web", "social")
SMALL = ["dem.base.hidden_size=16", "dem.base.layers=1", "dem.base.head_dim=8", "dem.base.state_size=4", "dem.base.chunk_size=8", "dem.base.seq_len=32", "dem.base.steps=12",
         "dem.lora.r=2", "dem.lora.seq_len=32", "dem.lora.max_steps=6", "dem.lora.eval_steps=3", "dem.lora.learning_rate=0.02", "dem.merge.search_steps=3", "dem.merge.search_windows=4", "dem.threads=1",
         "evaluation.max_new_tokens=4", "dem.merge.calibration_windows=4", "dem.merge.curve_points=2", "dem.test_windows=4", "dem.seed_steps=4", "dem.polish_steps=3", "dem.mix_share=0.5", "dem.merge.method=seqmean",
         "dem.merge.compare=[searched, regmean]", "dem.controls=[0.5]"]
DATA = ("models", "checkpoints", "diff_vectors", "diff_stats", "merged_model", "results/merge_weights.json", "results/merge_check.json", "results/mixture_advice.md")


def one_line(error): return "\n" not in str(error.value)


def token_file(path, tokens):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [tokens[i:i + 40].tolist() for i in range(0, len(tokens), 40)]
    kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"tokens": pa.array(rows, kind)}), path, compression={"tokens.list.element": "NONE"}, use_dictionary=False,
                   column_encoding={"tokens.list.element": "PLAIN"}, data_page_version="2.0", write_page_index=True)
    return {"files": [f"parquet_ready/{path.name}"], "rows": len(rows), "tokens": len(tokens), "bytes": path.stat().st_size}


def make_workspace(folder, domains=DOMAINS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder/"tokenizer")
    manifest = {"domains": {}, "heldout": {"validation": {}, "test": {}}}
    for n, d in enumerate(domains):
        step = 2*n + 3
        manifest["domains"][d] = token_file(folder/f"parquet_ready/{d}.parquet", (np.arange(1500)*step % 250).astype(np.int32))
        for split, size in (("validation", 200), ("test", 150)): token_file(folder/f"parquet_ready/heldout/{split}/{d}.parquet", (np.arange(size)*step % 250).astype(np.int32))
    (folder/"parquet_ready/manifest.json").write_text(json.dumps(manifest))
    return folder


def content(folder, parts=DATA):
    out = {}
    for part in parts:
        root = Path(folder)/part
        for f in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if f.is_file(): out[f.relative_to(folder).as_posix()] = f.read_bytes()
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("dem")/"ws")
    run(str(folder), overrides=SMALL)
    return folder


# -- base --

def test_missing_folder_is_never_asked_of_the_hub(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("./no/such", "/no/such/base", "a/b/c", "tests/no-such-base"):
        with pytest.raises(UserError, match="does not exist") as e: find_base(name)
        assert one_line(e)


def test_hub_out_of_reach_is_one_line_within_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False); monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match="hub did not give it|HF_HUB_OFFLINE") as e: find_base("nobody/no-such-model-here")
    assert one_line(e) and time.monotonic() - start < 25
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"): find_base("nobody/no-such-model-here")


@pytest.mark.parametrize("files,match", [({}, "no config.json"), ({"config.json": "{"}, "not readable"), ({"config.json": '{"model_type": "bert"}'}, "safetensors|causal"), ({"config.json": '{"model_type": "mamba2"}'}, "no model.safetensors")])
def test_folders_that_are_no_base(tmp_path, files, match):
    for name, text in files.items(): (tmp_path/name).write_text(text)
    with pytest.raises(UserError, match=match) as e: find_base(str(tmp_path))
    assert one_line(e)


def test_half_precision_without_gpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"): precision(LoraSettings(precision="fp16"), cuda=False)
    assert precision(LoraSettings(), cuda=False) == "fp32" and precision(LoraSettings(), cuda=True) == "fp16"


# -- the whole phase --

def test_files_of_the_contract(done):
    for d in (*DOMAINS, "mixed", "seed", "polish", "mixed_50"):
        assert (done/f"checkpoints/lora_{d}/adapter_model.safetensors").is_file() and (done/f"checkpoints/lora_{d}/_COMMIT").is_file()
        header, *rows = (done/f"summary/train_{d}.csv").read_text().splitlines()
        assert header == "step,epoch,loss,eval_loss,learning_rate,tokens,seconds,tokens_per_s,mfu" and rows and (done/f"logs/train_{d}.log").is_file()
    for d in DOMAINS:
        flat = np.load(done/f"diff_vectors/diff_{d}.npy", allow_pickle=False); s = json.loads((done/f"diff_stats/diff_{d}_summary.json").read_text())
        assert flat.ndim == 1 and {"mean", "variance", "norm", "share_beyond_3sigma", "relative_norm", "layer_norms", "sanity"} <= set(s) and s["norm"] > 0
    costs = json.loads((done/"results/dem_costs.json").read_text())
    assert set(costs["domains"]) == set(DOMAINS) and costs["mixed"]["steps"] == sum(c["steps"] for c in costs["domains"].values()) + 4 + 3 and costs["controls"]["50"]["steps"] == 12
    weights = json.loads((done/"results/merge_weights.json").read_text()); v = weights["validation"]
    assert v["searched"]["loss"] <= min(v["uniform"]["loss"], v["configured"]["loss"]) and weights["weights"] == weights["configured"] and weights["delivered"] == "seqmean"
    methods = list(csv.DictReader(open(done/"results/merge_methods.csv"))); of = {(r["method"], r["domain"]): r for r in methods}
    assert {r["method"] for r in methods} == {"base", "own", "uniform", "searched", "regmean", "seqmean", "merged", "mixed", "mixed_50", "seed"} and {r["split"] for r in methods} == {"test"}
    assert float(of["mixed", "mean"]["share"]) == 1 and of["merged", "mean"]["steps"] == of["mixed", "mean"]["steps"] == "25" and of["own", "web"]["share"] == "" and ("base", "general") in of
    ledger = {r["part"]: r for r in csv.DictReader(open(done/"results/cost_ledger.csv"))}
    assert set(ledger) == {"base", "seed", *(f"lora.{d}" for d in DOMAINS), "vectors", "search", "calibration", "polish", "merge", "mixed", "control.50", "measure", "mixture_search_estimate"}
    assert ledger["mixture_search_estimate"]["kind"] == "arithmetic" and float(ledger["mixture_search_estimate"]["flops"]) == pytest.approx(20*float(ledger["mixed"]["flops"]), rel=1e-5)
    check = json.loads((done/"results/merge_check.json").read_text()); assert check["loads"] and check["prompts"] == 10
    assert len(list((done/"reports/figures").glob("dem_*.png"))) >= 5


def test_merged_model_is_the_sum_and_loads(done):
    base, weights = load_file(done/"models/base/model.safetensors"), json.loads((done/"results/merge_weights.json").read_text())
    vectors = {d: Vector(done/f"diff_vectors/diff_{d}.npy") for d in DOMAINS}; searched = load_file(done/"models/searched/model.safetensors")
    for k, x in base.items():
        np.testing.assert_allclose(searched[k], x + sum(weights["searched"][d]*v.read(k, 0, x.size).reshape(x.shape) for d, v in vectors.items()), atol=1e-5)
    polished, merged = domain_model(done/"models/unpolished", done/"checkpoints/lora_polish").state_dict(), load_file(done/"merged_model/model.safetensors")
    for k, x in merged.items(): np.testing.assert_allclose(x, polished[k].numpy(), atol=1e-5)
    seqmean = load_file(done/"models/unpolished/model.safetensors"); changed = {k for k in base if not np.array_equal(base[k], seqmean[k])}
    assert changed and all(k.endswith(("in_proj.weight", "out_proj.weight")) for k in changed)
    web = domain_model(done/"models/base", done/"checkpoints/lora_web").state_dict(); key = next(k for k in base if "in_proj" in k)
    np.testing.assert_allclose(web[key].numpy() - base[key], vectors["web"].read(key, 0, base[key].size).reshape(base[key].shape), atol=1e-6)
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(done/"merged_model").eos_token == "<|endoftext|>" and load_model(done/"merged_model") is not None


def test_second_run_skips_and_only_equals_a_full_run(done, capsys):
    before = content(done); start = time.monotonic(); run(str(done), overrides=SMALL)
    assert capsys.readouterr().out.count("already done") == 14 and time.monotonic() - start < 10
    stamp = {d: (done/f"checkpoints/lora_{d}/_COMMIT").stat().st_mtime_ns for d in (*DOMAINS, "mixed", "seed", "mixed_50")}
    run(str(done), overrides=SMALL, only="web")
    changed = [d for d, t in stamp.items() if (done/f"checkpoints/lora_{d}/_COMMIT").stat().st_mtime_ns != t]
    assert changed == ["web"] and content(done) == before
    with pytest.raises(UserError, match="no such domain; there are main_data, social, web"): run(str(done), overrides=SMALL, only="webb")
    kept = (done/"tokenizer/tokenizer.json").read_bytes(); (done/"tokenizer/tokenizer.json").write_bytes(kept + b" ")
    try:
        with pytest.raises(UserError, match="--only web: tokenizer/ is another one than models/base/ was trained with"): run(str(done), overrides=SMALL, only="web")
    finally: (done/"tokenizer/tokenizer.json").write_bytes(kept)


def test_killed_run_ends_with_the_same_bytes(done, tmp_path):
    folder = make_workspace(tmp_path/"ws")
    code = f"from yunmin_efficientdata.dem.phase import run; run({str(folder)!r}, overrides={SMALL!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if (folder/"checkpoints/lora_main_data/_COMMIT").exists() or child.poll() is not None: break
        time.sleep(.05)
    child.send_signal(signal.SIGKILL); child.wait()
    assert (folder/"models/base/_COMMIT").exists() and not (folder/"merged_model").exists()
    run(str(folder), overrides=SMALL)
    assert content(folder) == content(done)


def test_short_and_missing_domains_are_skipped_aloud(done, tmp_path, capsys):
    folder = make_workspace(tmp_path/"ws", ("main_data", "web")); manifest = json.loads((folder/"parquet_ready/manifest.json").read_text())
    manifest["domains"]["social"] = token_file(folder/"parquet_ready/social.parquet", np.arange(20, dtype=np.int32)); (folder/"parquet_ready/manifest.json").write_text(json.dumps(manifest))
    summary = run(str(folder), overrides=[*SMALL, "dem.domains=[main_data, web, social, textbook]", "dem.merge.search=false", "dem.merge.weights={web: 3, main_data: 1}", "dem.mixed_baseline=false", "dem.merge.method=linear"])
    assert summary["domains"] == ["main_data", "web"] and set(summary["skipped"]) == {"social", "textbook"}
    found = json.loads((folder/"results/merge_weights.json").read_text())
    assert found["delivered"] == "configured" and found["weights"] == {"main_data": .25, "web": .75} and set(found["skipped"]) == {"social", "textbook"}
    assert "social is skipped: 20 tokens" in capsys.readouterr().out and "textbook is skipped" in (folder/"pipeline_run.log").read_text()
    with pytest.raises(UserError, match="no domain can be trained"): run(str(folder), overrides=[*SMALL, "dem.domains=[social]"])
    with pytest.raises(UserError, match="'webb' has no difference vector"): run(str(folder), overrides=[*SMALL, "dem.merge.weights={webb: 1}"])


def test_given_base_with_another_vocabulary_is_refused(done, tmp_path):
    folder = make_workspace(tmp_path/"ws"); small = BaseSettings(hidden_size=16, layers=1, head_dim=8, state_size=4, chunk_size=8)
    from transformers import AutoModelForCausalLM
    for size, ok in ((100, False), (257, True)):
        save_model(AutoModelForCausalLM.from_config(demo_config(small, size)), tmp_path/f"base{size}", folder/"tokenizer" if ok else None)
        overrides = [*SMALL, f"dem.base.path={tmp_path/f'base{size}'}", "dem.domains=[web]", "dem.lora.target_modules=[in_proj]", "dem.mixed_baseline=false"]
        if ok: assert run(str(folder), overrides=overrides)["domains"] == ["web"]
        else:
            with pytest.raises(UserError, match="knows 100 token ids"): run(str(folder), overrides=overrides)
    with pytest.raises(UserError, match="does not exist"): run(str(folder), overrides=[*SMALL, "dem.base.path=./gone"])
    with pytest.raises(UserError, match="run phase 2 first"): run(str(tmp_path/"empty"), overrides=SMALL)


def test_draws_of_adapters_follow_the_models_order():
    "A set of names has another order in every process, and with it every run another adapter."
    import math
    from transformers import AutoModelForCausalLM
    quiet()
    model = AutoModelForCausalLM.from_config(demo_config(BaseSettings(hidden_size=32, layers=3, head_dim=16), 300))
    s = LoraSettings(r=4, target_modules=["out_proj"])
    torch.manual_seed(5); pairs = adapter_parameters(adapt(model, s))
    torch.manual_seed(5)
    for name, (a, _) in sorted(pairs.items()):
        expected = torch.empty_like(a); torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
        assert torch.equal(a, expected), name
