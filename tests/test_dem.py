"""Phase 3: bases that cannot be had, adapters, vectors and merges that must be refused, and a whole small run: killed, repeated, one domain again."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from yunmin_efficientdata.core.settings import BaseSettings, LoraSettings, UserError, load_settings
from yunmin_efficientdata.dem.base import check_tokenizer, demo_config, find_base, load_model, quiet, save_model
from yunmin_efficientdata.dem.lora import adapt, adapter_parameters, check_gradients, domain_model, precision, save_adapter
from yunmin_efficientdata.dem.merge import merge
from yunmin_efficientdata.dem.phase import plan, run
from yunmin_efficientdata.dem.vectors import Vector, cosines, difference, vector_stats

quiet()
DOMAINS = ("main_data", "web", "social")
SMALL = ["dem.base.hidden_size=16", "dem.base.layers=1", "dem.base.head_dim=8", "dem.base.state_size=4", "dem.base.chunk_size=8", "dem.base.seq_len=32", "dem.base.steps=12",
         "dem.lora.r=2", "dem.lora.seq_len=32", "dem.lora.max_steps=6", "dem.lora.eval_steps=3", "dem.lora.learning_rate=0.02", "dem.merge.search_steps=3", "dem.merge.search_windows=4", "dem.threads=1",
         "evaluation.max_new_tokens=4"]
DATA = ("models", "checkpoints", "diff_vectors", "diff_stats", "merged_model", "results/merge_weights.json", "results/merge_check.json")


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
        token_file(folder/f"parquet_ready/heldout/validation/{d}.parquet", (np.arange(200)*step % 250).astype(np.int32))
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


# -- vectors and merge --

def write_model(folder, tensors, **config):
    Path(folder).mkdir(parents=True); save_file(tensors, Path(folder)/"model.safetensors"); (Path(folder)/"config.json").write_text(json.dumps(config))
    return Path(folder)


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(0); base = {f"layers.{i}.w": rng.normal(size=(13, 7 + i)).astype("f4") for i in range(3)}
    diffs = {d: {k: rng.normal(0, .1, x.shape).astype("f4") for k, x in base.items()} for d in "ab"}
    write_model(tmp_path/"base", base, tie_word_embeddings=True)
    for d, x in diffs.items():
        write_model(tmp_path/d, {k: base[k] + x[k] for k in base}); difference(tmp_path/"base", tmp_path/d, tmp_path/f"diff_{d}.npy", chunk=10)
    return tmp_path, base, diffs


@pytest.mark.parametrize("chunk", [1, 17, 1 << 20])
def test_linear_merge_is_the_weighted_sum(pair, chunk):
    d, base, diffs = pair
    recipe = merge(d/"base", d/"out", {d/"diff_a.npy": 1, d/"diff_b.npy": 3}, chunk=chunk)
    for k, x in load_file(d/"out"/"model.safetensors").items(): np.testing.assert_allclose(x, base[k] + .25*diffs["a"][k] + .75*diffs["b"][k], atol=1e-6)
    assert recipe["weights"] == {"diff_a": .25, "diff_b": .75} and recipe["tied"] == ["lm_head.weight"]
    assert sorted(p.name for p in (d/"out").iterdir())[:2] == ["README.md", "_COMMIT"]


def test_ties_and_dare_at_full_density(pair):
    d, base, diffs = pair
    merge(d/"base", d/"dare", {d/"diff_a.npy": .5, d/"diff_b.npy": .5}, method="dare", density=1.)
    merge(d/"base", d/"lin", {d/"diff_a.npy": .5, d/"diff_b.npy": .5})
    merge(d/"base", d/"ties", {d/"diff_a.npy": 1}, method="ties", density=1.)
    for k, x in load_file(d/"lin"/"model.safetensors").items(): np.testing.assert_allclose(load_file(d/"dare"/"model.safetensors")[k], x, atol=1e-6)
    for k, x in load_file(d/"ties"/"model.safetensors").items(): np.testing.assert_allclose(x, base[k] + diffs["a"][k], atol=1e-6)


def test_half_precision_types_are_kept(tmp_path):
    from safetensors.torch import load_file as load, save_file as save
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        d = tmp_path/str(dtype); (d/"base").mkdir(parents=True); (d/"x").mkdir(); torch.manual_seed(0); w = torch.randn(9, 5).to(dtype)
        save({"w": w}, d/"base"/"model.safetensors"); save({"w": (w.float() + .5).to(dtype)}, d/"x"/"model.safetensors")
        difference(d/"base", d/"x", d/"diff_x.npy"); merge(d/"base", d/"out", {d/"diff_x.npy": 1})
        got = load(d/"out"/"model.safetensors")["w"]
        assert got.dtype == dtype and torch.allclose(got.float(), load(d/"x"/"model.safetensors")["w"].float(), atol=1e-6)


def test_refused_merges_leave_nothing(pair):
    d, base, _ = pair; a = d/"diff_a.npy"
    def nan(m):
        x = np.load(a); x[5] = np.nan; np.save(a, x)
    def shape(m): m["tensors"]["layers.0.w"]["shape"] = [7, 13]
    def other(m): m["tensors"] = {f"model.{k}": v for k, v in m["tensors"].items()}
    def short(m): np.save(a, np.load(a)[:-1])
    saved, manifest = a.read_bytes(), a.with_suffix(".json").read_text()
    for spoil, match in [(nan, "diff_a.npy: layers.0.w holds NaN"), (shape, r"diff_a.npy: layers.0.w is \[7, 13\]"), (other, "shares no tensor"), (short, "make the vector again")]:
        m = json.loads(manifest); spoil(m); a.with_suffix(".json").write_text(json.dumps(m))
        with pytest.raises(UserError, match=match) as e: merge(d/"base", d/"bad", {a: 1})
        assert one_line(e) and not [p for p in d.iterdir() if "bad" in p.name]
        a.write_bytes(saved); a.with_suffix(".json").write_text(manifest)
    for weights, options, match in [({a: 0}, {}, "sum to zero"), ({}, {}, "no difference vectors"), ({a: float("inf")}, {}, "finite"), ({a: 1}, {"method": "seqmean"}, "not available"), ({a: 1}, {"method": "magic"}, "unknown method"), ({d/"gone.npy": 1}, {}, "no such")]:
        with pytest.raises(UserError, match=match): merge(d/"base", d/"bad", weights, **options)
    with pytest.raises(UserError, match="base itself"): merge(d/"base", d/"base", {a: 1})
    (d/"mine").mkdir(); (d/"mine"/"thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no model"): merge(d/"base", d/"mine", {a: 1})
    assert (d/"mine"/"thesis.txt").exists()


def test_missing_and_cut_shards(pair):
    d, base, _ = pair
    (d/"base"/"model.safetensors").rename(d/"base"/"model-1.safetensors")
    (d/"base"/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layers.0.w": "model-1.safetensors", "layers.1.w": "model-2.safetensors"}}))
    with pytest.raises(UserError, match="model-2.safetensors: this shard"): merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    (d/"base"/"model-2.safetensors").write_bytes((d/"base"/"model-1.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match="cut off"): merge(d/"base", d/"out", {d/"diff_a.npy": 1})


def test_full_disk_is_one_line(pair, monkeypatch):
    import errno
    from yunmin_efficientdata.dem import merge as module
    d, *_ = pair
    def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(UserError, match="disk is full"): merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    assert not [p.name for p in d.iterdir() if "out" in p.name]


def test_left_out_and_mismatched_tensors(tmp_path):
    write_model(tmp_path/"base", {"w": np.ones((2, 3), "f4"), "only_base": np.ones(2, "f4")})
    write_model(tmp_path/"x", {"w": np.ones((2, 3), "f4")*2, "only_x": np.ones(2, "f4")}); write_model(tmp_path/"y", {"w": np.ones((3, 2), "f4")})
    assert difference(tmp_path/"base", tmp_path/"x", tmp_path/"diff_x.npy")["left_out"] == ["only_base", "only_x"]
    assert "only_base" in merge(tmp_path/"base", tmp_path/"out", {tmp_path/"diff_x.npy": 1})["left_out"]
    with pytest.raises(UserError, match=r"y: w is \[3, 2\]"): difference(tmp_path/"base", tmp_path/"y", tmp_path/"diff_y.npy")
    assert not (tmp_path/"diff_y.npy").exists()


def test_normalized_vector_and_statistics(pair):
    d, base, _ = pair
    difference(d/"base", d/"a", d/"diff_n.npy", normalize=True); flat = np.load(d/"diff_n.npy"); raw = np.load(d/"diff_a.npy")
    assert abs(np.linalg.norm(flat) - 1) < 1e-5
    s = vector_stats(d/"diff_a.npy", d/"base", chunk=11); z = (raw - raw.mean())/raw.std()
    assert s["norm"] == pytest.approx(np.linalg.norm(raw), rel=1e-6) and s["variance"] == pytest.approx(raw.var(), rel=1e-5) and s["share_beyond_3sigma"] == pytest.approx((abs(z) > 3).mean(), abs=1e-9)
    assert s["relative_norm"] == pytest.approx(np.linalg.norm(raw)/np.sqrt(sum((x**2).sum() for x in base.values())), rel=1e-5)
    c = cosines({"a": d/"diff_a.npy", "b": d/"diff_b.npy", "n": d/"diff_n.npy"}, chunk=19)
    assert c[0, 2] == pytest.approx(1, abs=1e-6) and c[0, 1] == pytest.approx(np.dot(raw, b := np.load(d/"diff_b.npy"))/np.linalg.norm(raw)/np.linalg.norm(b), abs=1e-6)


# -- the whole phase --

def test_files_of_the_contract(done):
    for d in (*DOMAINS, "mixed"):
        assert (done/f"checkpoints/lora_{d}/adapter_model.safetensors").is_file() and (done/f"checkpoints/lora_{d}/_COMMIT").is_file()
        header, *rows = (done/f"summary/train_{d}.csv").read_text().splitlines()
        assert header == "step,epoch,loss,eval_loss,learning_rate,tokens,seconds" and rows and (done/f"logs/train_{d}.log").is_file()
    for d in DOMAINS:
        flat = np.load(done/f"diff_vectors/diff_{d}.npy", allow_pickle=False); s = json.loads((done/f"diff_stats/diff_{d}_summary.json").read_text())
        assert flat.ndim == 1 and {"mean", "variance", "norm", "share_beyond_3sigma", "relative_norm", "layer_norms", "sanity"} <= set(s) and s["norm"] > 0
    costs = json.loads((done/"results/dem_costs.json").read_text())
    assert set(costs["domains"]) == set(DOMAINS) and costs["mixed"]["steps"] == sum(c["steps"] for c in costs["domains"].values())
    weights = json.loads((done/"results/merge_weights.json").read_text()); v = weights["validation"]
    assert v["searched"]["loss"] <= min(v["uniform"]["loss"], v["configured"]["loss"]) and weights["weights"] == weights["searched"]
    check = json.loads((done/"results/merge_check.json").read_text()); assert check["loads"] and check["prompts"] == 10
    assert len(list((done/"reports/figures").glob("dem_*.png"))) >= 5


def test_merged_model_is_the_sum_and_loads(done):
    base, merged, weights = load_file(done/"models/base/model.safetensors"), load_file(done/"merged_model/model.safetensors"), json.loads((done/"results/merge_weights.json").read_text())["weights"]
    vectors = {d: Vector(done/f"diff_vectors/diff_{d}.npy") for d in DOMAINS}
    for k, x in base.items():
        want = x + sum(weights[d]*v.read(k, 0, x.size).reshape(x.shape) for d, v in vectors.items())
        np.testing.assert_allclose(merged[k], want, atol=1e-5)
    web = domain_model(done/"models/base", done/"checkpoints/lora_web").state_dict(); key = next(k for k in base if "in_proj" in k)
    np.testing.assert_allclose(web[key].numpy() - base[key], vectors["web"].read(key, 0, base[key].size).reshape(base[key].shape), atol=1e-6)
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(done/"merged_model").eos_token == "<|endoftext|>" and load_model(done/"merged_model") is not None


def test_second_run_skips_and_only_equals_a_full_run(done, capsys):
    before = content(done); start = time.monotonic(); run(str(done), overrides=SMALL)
    assert capsys.readouterr().out.count("already done") == 9 and time.monotonic() - start < 10
    stamp = {d: (done/f"checkpoints/lora_{d}/_COMMIT").stat().st_mtime_ns for d in (*DOMAINS, "mixed")}
    run(str(done), overrides=SMALL, only="web")
    changed = [d for d, t in stamp.items() if (done/f"checkpoints/lora_{d}/_COMMIT").stat().st_mtime_ns != t]
    assert changed == ["web"] and content(done) == before
    with pytest.raises(UserError, match="no such domain; there are main_data, social, web"): run(str(done), overrides=SMALL, only="webb")


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
    summary = run(str(folder), overrides=[*SMALL, "dem.domains=[main_data, web, social, textbook]", "dem.merge.search=false", "dem.merge.weights={web: 3, main_data: 1}", "dem.mixed_baseline=false"])
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


def test_plan_names_the_limits():
    rows = {r["what"]: r for r in plan(load_settings("configs/yunmin-3b"))}
    assert rows["parameters"]["estimate"].startswith("2,768,") and any("10 h" == r["limit"] for r in rows.values()) and any("20 min" == r["limit"] for r in rows.values())
    assert float({r["what"]: r for r in plan(load_settings("configs/demo"))}["training memory, A100, 80 GB"]["estimate"].split()[0]) < 1


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
