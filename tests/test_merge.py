"""Merging: equal to naive sums for every method, type, form and thread count; killed and resumed; full disks, missing or cut shards, NaN; what is there stays until the new model is whole."""
import errno, json, os, shutil, signal, subprocess, sys, threading
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch, save_file as save_torch

from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.dem import merge as module
from yunmin_efficientdata.dem.merge import merge, merge_tensors, merge_with, threshold
from yunmin_efficientdata.dem.vectors import Vector, difference, manifest_file


def one_line(error): return "\n" not in str(error.value)
def content(folder): return {f.name: f.read_bytes() for f in Path(folder).iterdir()}
def hidden(folder): return [f.name for f in Path(folder).iterdir() if f.name.startswith(".")]


def write_model(folder, tensors, shards=1, **config):
    "A model folder; with several shards, an index."
    folder = Path(folder); folder.mkdir(parents=True); (folder/"config.json").write_text(json.dumps(config)); keys = list(tensors)
    if shards == 1: save_file(tensors, folder/"model.safetensors"); return folder
    names = {k: f"model-{n*shards//len(keys) + 1:05}-of-{shards:05}.safetensors" for n, k in enumerate(keys)}
    for name in sorted(set(names.values())): save_file({k: tensors[k] for k in keys if names[k] == name}, folder/name, metadata={"format": "pt"})
    (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.fixture
def pair(tmp_path):
    "A base in three shards, two full domain models, their dense vectors."
    rng = np.random.default_rng(0); base = {f"layers.{i}.w": rng.normal(size=(13, 7 + i)).astype("f4") for i in range(6)} | {"step": np.array([3, 4])}
    diffs = {d: {k: rng.normal(0, .1, x.shape).astype("f4") for k, x in base.items() if k != "step"} for d in "ab"}
    write_model(tmp_path/"base", base, 3, tie_word_embeddings=True)
    for d, x in diffs.items(): write_model(tmp_path/d, {k: base[k] + x[k] for k in x}); difference(tmp_path/"base", tmp_path/d, tmp_path/f"diff_{d}.npy", chunk=10)
    return tmp_path, base, diffs


def tensors_of(folder): return {k: x for f in sorted(Path(folder).glob("*.safetensors")) for k, x in load_file(f).items()}


# -- equal to what it should be --

def naive(method, base, diffs, weights, density, normalize):
    "The published formulas on whole tensors (DARE apart)."
    x = np.stack([diffs[d] for d in weights]).astype("f8"); w = np.array(list(weights.values()), "f8").reshape(-1, *[1]*base.ndim)
    if method == "linear": return base + (w*x).sum(0)
    keep = max(1, int(density*base.size))
    for t in x: t[abs(t) < np.sort(abs(t).ravel())[::-1][keep - 1]] = 0
    y = w*x; sign = np.where(y.sum(0) >= 0, 1, -1); agree = np.sign(y) == sign
    return base + (y*agree).sum(0)/(np.maximum((w*agree).sum(0), 1e-300) if normalize else 1)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_to_the_naive_reference(pair, method, normalize):
    d, base, diffs = pair
    for chunk, threads in ((1, 1), (17, 3), (1 << 20, 2)):
        recipe = merge(d/"base", d/"out", {d/"diff_a.npy": .3, d/"diff_b.npy": .9}, method, normalize, density=.4, chunk=chunk, threads=threads)
        w = {"a": .25, "b": .75} if normalize else {"a": .3, "b": .9}; got = tensors_of(d/"out")
        for k in diffs["a"]: np.testing.assert_allclose(got[k], naive(method, base[k], {n: x[k] for n, x in diffs.items()}, w, .4, normalize), atol=1e-6)
        np.testing.assert_array_equal(got["step"], base["step"])
        assert recipe["weights"] == pytest.approx({f"diff_{n}": x for n, x in w.items()}) and recipe["tied"] == ["lm_head.weight"] and "step" in recipe["left_out"] + ["step"]
    assert {"README.md", "_COMMIT", "config.json", "merge_recipe.json"} <= set(content(d/"out")) and not hidden(d)


def test_ties_and_dare_at_full_density(pair):
    d, base, diffs = pair
    for method, w in (("dare", {"a": .5, "b": .5}), ("ties", {"a": 1.})):
        merge(d/"base", d/"out", {d/f"diff_{n}.npy": x for n, x in w.items()}, method, density=1.); got = tensors_of(d/"out")
        for k in diffs["a"]: np.testing.assert_allclose(got[k], naive("linear", base[k], {n: x[k] for n, x in diffs.items()}, w, 1, True), atol=1e-6)


def test_dare_keeps_a_share_and_the_mean_and_every_form_drops_the_same(tmp_path):
    rng = np.random.default_rng(0); base = {"a.weight": np.zeros((300, 400), "f4"), "b.weight": np.zeros((200, 300), "f4")}; write_model(tmp_path/"base", base, 2)
    A, B = rng.normal(1, .1, (2, 400)).astype("f4"), rng.normal(1, .1, (300, 2)).astype("f4")
    (tmp_path/"lora_x").mkdir(); save_file({"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": B}, tmp_path/"lora_x"/"adapter_model.safetensors"); (tmp_path/"lora_x"/"adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    difference(tmp_path/"base", tmp_path/"lora_x", tmp_path/"diff_x.npy"); difference(tmp_path/"base", tmp_path/"lora_x", tmp_path/"diff_x.lowrank.npz")
    write_model(tmp_path/"full", {"a.weight": B @ A, "b.weight": base["b.weight"]}); full = B.astype("f8") @ A; outs = []
    for n in ("diff_x.npy", "diff_x.lowrank.npz", "lora_x", "full"):
        merge(tmp_path/"base", tmp_path/"out", {tmp_path/n: 1}, "dare", density=.3, seed=5, chunk=9999); outs.append(tensors_of(tmp_path/"out")["a.weight"])
    kept = outs[0] != 0; assert abs(kept.mean() - .3) < .005 and abs(outs[0].mean()/full.mean() - 1) < .02
    np.testing.assert_allclose(outs[0][kept], (full/.3)[kept], rtol=1e-5)
    for x in outs[1:]: assert ((x != 0) == kept).all(); np.testing.assert_allclose(x, outs[0], rtol=1e-5)
    merge(tmp_path/"base", tmp_path/"out", {tmp_path/"diff_x.npy": 1}, "dare", density=.3, seed=6); other = tensors_of(tmp_path/"out")["a.weight"] != 0
    assert abs((other & kept).mean() - .09) < .005


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_types_are_kept_and_rounded_once(tmp_path, dtype):
    torch.manual_seed(0); w, x = torch.randn(40, 30).to(dtype), .1*torch.randn(40, 30)
    (tmp_path/"base").mkdir(); save_torch({"w": w, "ids": torch.arange(5), "mask": torch.tensor([True, False])}, tmp_path/"base"/"model.safetensors")
    np.save(tmp_path/"diff_x.npy", x.numpy().ravel()); (tmp_path/"diff_x.json").write_text(json.dumps({"elements": 1200, "tensors": {"w": {"shape": [40, 30], "offset": 0}}}))
    merge(tmp_path/"base", tmp_path/"out", {tmp_path/"diff_x.npy": .7}, normalize=False, chunk=100)
    got = load_torch(tmp_path/"out"/"model.safetensors"); wide = w.double() if dtype == torch.float64 else w.float()
    assert got["w"].dtype == dtype and torch.equal(got["w"], (wide + torch.tensor(.7)*x).to(dtype)) and got["ids"].tolist() == [0, 1, 2, 3, 4] and got["mask"].tolist() == [True, False]


def test_all_forms_mixed_in_one_merge(tmp_path):
    rng = np.random.default_rng(0); base = {f"m.{i}.weight": rng.normal(size=(20, 30)).astype("f4") for i in range(4)} | {"norm.weight": np.ones(30, "f4")}
    write_model(tmp_path/"base", base, 2); want = {k: x.astype("f8") for k, x in base.items()}; weights = {}
    for n, (kind, w) in enumerate((("npy", .5), ("npz", .25), ("adapter", .125), ("model", .125), ("npz", .5))):
        A, B = rng.normal(0, .3, (2, 2, 30)).astype("f4"), rng.normal(0, .3, (2, 20, 2)).astype("f4"); folder = tmp_path/f"lora_{n}"; folder.mkdir(); keys = [f"m.{n % 4}", f"m.{(n + 1) % 4}"]
        save_file({f"base_model.model.{k}.lora_{c}.weight": x[i] for i, k in enumerate(keys) for c, x in (("A", A), ("B", B))}, folder/"adapter_model.safetensors"); (folder/"adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        full = {k: x.copy() for k, x in base.items()}
        for i, k in enumerate(keys): full[f"{k}.weight"] += B[i] @ A[i]; want[f"{k}.weight"] += w*(B[i].astype("f8") @ A[i])
        path = {"npy": tmp_path/f"diff_{n}.npy", "npz": tmp_path/f"diff_{n}.lowrank.npz", "adapter": folder, "model": tmp_path/f"model_{n}"}[kind]
        difference(tmp_path/"base", folder, path) if kind in ("npy", "npz") else write_model(path, full) if kind == "model" else None
        weights[path] = w
    recipe = merge(tmp_path/"base", tmp_path/"out", weights, normalize=False, chunk=77); got = tensors_of(tmp_path/"out")
    for k, x in want.items(): np.testing.assert_allclose(got[k], x, atol=1e-6)
    assert list(recipe["weights"]) == ["diff_0", "diff_1", "lora_2", "model_3", "diff_4"] and recipe["changed"] == 5


def test_a_merged_llama_loads_and_is_the_sum(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0); model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2))
    model.save_pretrained(tmp_path/"base", max_shard_size="10KB"); (tmp_path/"base"/"chat_template.jinja").write_text("hi"); (tmp_path/"base"/"modeling_x.py").write_text("#")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False), adapter_name="a"); tuned.add_adapter("b", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path); merge(tmp_path/"base", tmp_path/"out", {tmp_path/"a": .75, tmp_path/"b": .25})
    tuned.add_weighted_adapter(["a", "b"], [.75, .25], "both", combination_type="cat"); tuned.set_adapter("both")
    ids = torch.arange(10)[None]; want = tuned(input_ids=ids).logits; merged = AutoModelForCausalLM.from_pretrained(tmp_path/"out")
    torch.testing.assert_close(merged(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    assert (tmp_path/"out"/"chat_template.jinja").exists() and (tmp_path/"out"/"modeling_x.py").exists() and len(list((tmp_path/"out").glob("*.safetensors"))) > 2


def test_threshold_is_the_kth_largest(pair):
    d, base, diffs = pair; v = Vector(d/"diff_a.npy")
    for k in diffs["a"]:
        for density in (1e-6, .13, .5, 1): assert threshold(v, k, density, 11) == pytest.approx(np.sort(abs(v.read(k, 0, v.size(k))))[::-1][max(1, int(density*v.size(k))) - 1], abs=0)


def test_merge_with_any_function_and_merge_tensors(pair):
    d, base, _ = pair; calls = []
    def plus_one(key, i, j): calls.append(threading.current_thread().name); return np.ones(j - i, "f4") if key == "layers.2.w" else None
    merge_with(d/"base", d/"one", plus_one, {"method": "mine", "changed": 1}, chunk=5, threads=3); assert len(set(calls)) == 1
    merge_tensors(d/"base", d/"two", ((k, base[k] + 1) for k in ["layers.2.w"]), {"method": "mine"})
    one, two = tensors_of(d/"one"), tensors_of(d/"two")
    for k, x in base.items(): np.testing.assert_array_equal(one[k], two[k]); np.testing.assert_array_equal(one[k], x + (k == "layers.2.w"))
    for bad, match in ((("layers.2.w", np.ones(3)), "3 elements is no tensor"), (("gone", np.ones(3)), "gone of 3"), (("layers.2.w", np.full(13*9, np.nan)), "holds NaN"), (("step", np.ones(2)), "no tensor")):
        with pytest.raises(UserError, match=match) as e: merge_tensors(d/"base", d/"three", iter([bad]), {"method": "mine"})
        assert one_line(e) and not (d/"three").exists() and not hidden(d)


def test_calibrated_methods_get_their_windows(pair, monkeypatch):
    import types
    d, base, diffs = pair; seen = {}
    def calibrated_tensors(base_dir, vectors, calibration, method, ridge, **more): seen.update(vectors=vectors, calibration=calibration, method=method, ridge=ridge); yield "layers.0.w", base["layers.0.w"] + 2
    monkeypatch.setitem(sys.modules, "yunmin_efficientdata.dem.calibrated", types.SimpleNamespace(calibrated_tensors=calibrated_tensors))
    windows = {n: np.zeros((4, 8), np.int64) for n in "ab"}
    recipe = merge(d/"base", d/"out", {d/"diff_a.npy": 1, d/"diff_b.npy": 1}, "seqmean", calibration=windows, ridge=.1)
    assert seen["method"] == "seqmean" and seen["ridge"] == .1 and set(seen["calibration"]) == {"a", "b"} and recipe["windows"] == {"a": 4, "b": 4} and recipe["changed"] == 1
    np.testing.assert_array_equal(tensors_of(d/"out")["layers.0.w"], base["layers.0.w"] + 2); assert "seqmean" in (d/"out"/"README.md").read_text()
    for calibration, match in ((None, "needs calibration windows"), ({"a": windows["a"]}, "no calibration windows for 'b'")):
        with pytest.raises(UserError, match=match): merge(d/"base", d/"out", {d/"diff_a.npy": 1, d/"diff_b.npy": 1}, "regmean", calibration=calibration)


# -- killed and resumed --

KILLED = """
import os, signal, sys
from pathlib import Path
from yunmin_efficientdata.dem import merge as m
left, write, rename = int(sys.argv[2]), m._write_at, os.rename
def counting(*a):
    global left; left -= 1
    if left < 0: os.kill(os.getpid(), signal.SIGKILL)
    write(*a)
def renaming(a, b):
    if sys.argv[3] == "swap" and str(a).endswith(".partial"): os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
m._write_at, os.rename = counting, renaming
d = Path(sys.argv[1]); m.merge(d/"base", d/"out", {d/"diff_a.npy": 1, d/"diff_b.npy": 3}, "ties", chunk=50, threads=int(sys.argv[4]))
"""

def killed(d, writes, where="write", threads=1):
    p = subprocess.run([sys.executable, "-c", KILLED, str(d), str(writes), where, str(threads)], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr


def test_killed_half_way_and_resumed(pair):
    d, *_ = pair; vectors, lines = {d/"diff_a.npy": 1, d/"diff_b.npy": 3}, []
    merge(d/"base", d/"whole", vectors, "ties", chunk=50)
    killed(d, 11, threads=2); part = d/".out.partial"
    assert not (d/"out").exists() and len(json.loads((part/"merge_state.json").read_text())["shards"]) >= 1
    merge(d/"base", d/"out", vectors, "ties", chunk=50, threads=2, log=lines.append)
    assert content(d/"out") == content(d/"whole") and not hidden(d) and 1 <= sum("taken over" in x for x in lines) < 3


def test_what_a_killed_merge_left_is_checked(pair):
    d, *_ = pair; vectors = {d/"diff_a.npy": 1, d/"diff_b.npy": 3}; part = d/".out.partial"
    killed(d, 11); shutil.copytree(part, d/"kept")
    def again(spoil, taken, **other):
        lines = []; shutil.rmtree(d/"out", ignore_errors=True); shutil.copytree(d/"kept", part, dirs_exist_ok=True); spoil(); merge(d/"base", d/"out", vectors, **{"method": "ties", "chunk": 50, "log": lines.append} | other)
        merge(d/"base", d/"whole", vectors, **{"method": "ties", "chunk": 50} | other)
        assert content(d/"out") == content(d/"whole") and sum("taken over" in x for x in lines) == taken
    first = part/"model-00001-of-00003.safetensors"
    def flip(): data = bytearray(first.read_bytes()); data[-3] ^= 1; first.write_bytes(data)
    def cut(): first.write_bytes(first.read_bytes()[:-3])
    def new_vector(): difference(d/"base", d/"b", d/"diff_a.npy")
    again(lambda: None, 1); again(flip, 0); again(cut, 0); again(first.unlink, 0); again(lambda: (part/"merge_state.json").write_text("{"), 0)
    again(lambda: None, 0, density=.3); again(lambda: None, 0, method="linear"); again(new_vector, 0)


def test_killed_between_the_two_renames(pair):
    d, *_ = pair; merge(d/"base", d/"out", {d/"diff_a.npy": 1}); before = content(d/"out")
    killed(d, 10**6, "swap"); assert not (d/"out").exists() and (d/".out.old").exists()
    with pytest.raises(UserError, match="seed|holds|disk|nothing|NaN|unknown|no such") : merge(d/"base", d/"out", {d/"none.npy": 1})
    (d/"diff_n.json").write_text((d/"diff_a.json").read_text().replace('"sums"', '"old"').replace('"check"', '"was"')); x = np.load(d/"diff_a.npy"); x[5] = np.nan; np.save(d/"diff_n.npy", x)
    with pytest.raises(UserError, match="holds NaN"): merge(d/"base", d/"out", {d/"diff_n.npy": 1})
    assert content(d/"out") == before and not hidden(d)


def test_an_interrupted_merge_is_kept_and_a_running_one_is_not_disturbed(pair, monkeypatch):
    d, *_ = pair; merge(d/"base", d/"out", {d/"diff_a.npy": 1}); before, lines = content(d/"out"), []
    write, shard = module.write_shard, []
    def interrupted(*a, **k):
        shard.append(1)
        if len(shard) == 2: raise KeyboardInterrupt
        with pytest.raises(UserError, match="another merge is writing"): merge(d/"base", d/"out", {d/"diff_b.npy": 1})
        return write(*a, **k)
    monkeypatch.setattr(module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt): merge(d/"base", d/"out", {d/"diff_b.npy": 1})
    assert content(d/"out") == before; monkeypatch.undo()
    merge(d/"base", d/"out", {d/"diff_b.npy": 1}, log=lines.append); assert sum("taken over" in x for x in lines) == 1 and content(d/"out") != before and not hidden(d)


# -- faults --

def test_refused_merges_leave_nothing(pair):
    d, base, _ = pair; a = d/"diff_a.npy"; m = json.loads(manifest_file(a).read_text()); m.pop('check'); flat = np.load(a)
    def vector(name, x=flat, **changes): np.save(d/f"{name}.npy", x); (d/f"{name}.json").write_text(json.dumps(m | {"tensors": {k: {"shape": t["shape"], "offset": t["offset"]} for k, t in m["tensors"].items()}} | changes)); return d/f"{name}.npy"
    def spoil(v): x = flat.copy(); x[5] = v; return x
    turned = {k: {"shape": t["shape"][::-1], "offset": t["offset"]} for k, t in m["tensors"].items()}
    for file, match in [(vector("n", spoil(np.nan)), "n.npy: layers.0.w holds NaN"), (vector("i", spoil(-np.inf)), "i.npy: layers.0.w holds NaN or inf"), (vector("o", spoil(3e38)*10), "holds NaN or inf"), (vector("s", tensors=turned), r"s.npy: layers.0.w is \[7, 13\]"),
            (vector("k", tensors={f"x.{k}": t for k, t in m["tensors"].items()}), "shares no tensor"), (vector("c", flat[:-1]), "make the vector again"), (d/"gone.npy", "no such"), (d/"config.txt", "no such")]:
        with pytest.raises(UserError, match=match) as e: merge(d/"base", d/"bad", {file: 1})
        assert one_line(e) and not (d/"bad").exists() and not hidden(d)
    with pytest.raises(UserError, match="leaves the range of float32"): merge(d/"base", d/"bad", {vector("h", np.full_like(flat, 3e38)): 1e9}, normalize=False)
    for weights, options, match in [({a: 0}, {}, "sum to zero"), ({}, {}, "no difference vectors"), ({a: float("inf")}, {}, "finite"), ({a: 1}, {"method": "magic"}, "unknown method"), ({a: 1}, {"method": "ties", "density": 0}, "density")]:
        with pytest.raises(UserError, match=match): merge(d/"base", d/"bad", weights, **options)
    with pytest.raises(UserError, match="base itself"): merge(d/"base", d/"base", {a: 1})
    with pytest.raises(UserError, match="models to be merged"): merge(d/"base", d/"b", {a: 1, d/"b": 1})
    (d/"mine").mkdir(); (d/"mine"/"thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no model"): merge(d/"base", d/"mine", {a: 1})
    assert (d/"mine"/"thesis.txt").exists() and not hidden(d)


@pytest.mark.parametrize("key,value,changed", [("w", np.nan, True), ("w", np.inf, True), ("rest", np.nan, False)])
def test_nan_in_the_base(tmp_path, key, value, changed):
    base = {"w": np.ones((4, 5), "f4"), "rest": np.ones((4, 5), "f4")}; write_model(tmp_path/"base", base)
    write_model(tmp_path/"x", {"w": base["w"]*2}); difference(tmp_path/"base", tmp_path/"x", tmp_path/"diff_x.npy")
    base[key][1, 2] = value; save_file(base, tmp_path/"base"/"model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: {key} of the base holds NaN") as e: merge(tmp_path/"base", tmp_path/"out", {tmp_path/"diff_x.npy": 1})
    assert one_line(e) and not (tmp_path/"out").exists() and not hidden(tmp_path)


def test_half_precision_overflow_is_said(tmp_path):
    write_model(tmp_path/"base", {"w": np.full((4, 5), 6e4, np.float16)}); write_model(tmp_path/"x", {"w": np.full((4, 5), 6.4e4, np.float16)}); difference(tmp_path/"base", tmp_path/"x", tmp_path/"diff_x.npy")
    with pytest.raises(UserError, match="w leaves the range of float16"): merge(tmp_path/"base", tmp_path/"out", {tmp_path/"diff_x.npy": 3}, normalize=False)


def test_missing_and_cut_shards(pair):
    d, *_ = pair; shard = d/"base"/"model-00002-of-00003.safetensors"; whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: .* cut off") as e: merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    shard.unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: this shard") as f: merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    shard.write_bytes(b"\0"*len(whole))
    with pytest.raises(UserError, match="not a safetensors file"): merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    assert one_line(e) and one_line(f) and not (d/"out").exists() and not hidden(d)


def test_a_source_that_shrinks_while_it_is_read(pair, monkeypatch):
    d, *_ = pair; shard, write = d/"base"/"model-00003-of-00003.safetensors", module.write_shard
    def shrinking(source, *a, **k):
        if source == shard: os.truncate(shard, shard.stat().st_size - 40)
        return write(source, *a, **k)
    monkeypatch.setattr(module, "write_shard", shrinking)
    with pytest.raises(UserError, match="cut off"): merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    assert not (d/"out").exists() and not hidden(d)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.dem import merge as m
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),)*2); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[3] == "late": m._claim = lambda *a: None
d = Path(sys.argv[1])
try: m.merge(d/"base", d/"out", {d/"diff_a.npy": 1})
except UserError as e: print(e); sys.exit(2)
"""

@pytest.mark.parametrize("when", ["claim", "late"])
def test_a_limit_on_file_size(pair, when):
    d, *_ = pair; merge(d/"base", d/"out", {d/"diff_b.npy": 1}); before = content(d/"out")
    p = subprocess.run([sys.executable, "-c", LIMITED, str(d), "900", when], capture_output=True, text=True)
    assert p.returncode == 2 and "larger than files may be" in p.stdout and p.stdout.count("\n") == 1 and content(d/"out") == before and not hidden(d), p.stderr


def _tmpfs(folder, size):
    "A file system of this size; False where one may not mount."
    folder.mkdir(); return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode == 0


@pytest.mark.parametrize("when", ["before", "claim", "late"])
def test_a_full_disk(pair, monkeypatch, when):
    "On a file system of 64 KB; where none can be mounted, the system's answer is played."
    rng = np.random.default_rng(0); d, *_ = pair; small = d/"small"
    write_model(d/"big", {f"w{i}": rng.normal(size=(100, 90)).astype("f4") for i in range(3)}, 3); write_model(d/"bigger", {f"w{i}": np.ones((100, 90), "f4") for i in range(3)}); difference(d/"big", d/"bigger", d/"diff_big.npy")
    mounted = _tmpfs(small, "64k")
    try:
        if when != "before": monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**12, 0, 10**12))
        if when == "late": monkeypatch.setattr(module, "_claim", lambda *a: None)
        if not mounted:
            def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
            if when == "before": monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(65536, 0, 65536))
            else: monkeypatch.setattr(module, "_claim" if when == "claim" else "_write_at", full)
        with pytest.raises(UserError, match="the disk has 0.00 GB left" if when == "before" else "the disk is full; nothing was written") as e: merge(d/"big", small/"out", {d/"diff_big.npy": 1})
        assert one_line(e) and not list(small.iterdir())
    finally:
        if mounted: subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written(pair, monkeypatch):
    d, *_ = pair
    def broken(*a): raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(module, "_write_at", broken)
    with pytest.raises(UserError, match="Input/output error; nothing was written") as e: merge(d/"base", d/"out", {d/"diff_a.npy": 1})
    assert one_line(e) and not (d/"out").exists() and not hidden(d)


def test_vectors_of_another_base_are_said_and_left_out_tensors_listed(pair):
    d, base, _ = pair; write_model(d/"other", {k: x + 1 for k, x in base.items() if k not in ("step", "layers.0.w")}); write_model(d/"o2", {k: x + 2 for k, x in base.items() if k not in ("step", "layers.0.w")})
    difference(d/"other", d/"o2", d/"diff_o.npy"); recipe = merge(d/"base", d/"out", {d/"diff_o.npy": 1})
    assert recipe["left_out"] == ["layers.0.w"] and "another base" in recipe["warnings"][0] and "another base" in (d/"out"/"README.md").read_text()
    np.testing.assert_array_equal(tensors_of(d/"out")["layers.0.w"], base["layers.0.w"])


def test_same_names_are_told_apart_and_paths_stay_out_of_the_card(pair):
    d, *_ = pair; (d/"x").mkdir()
    for end in (".npy", ".json"): shutil.copy(d/f"diff_a{end}", d/"x"/f"diff_a{end}")
    recipe = merge(d/"base", d/"out", {d/"diff_a.npy": 1, d/"x"/"diff_a.npy": 1})
    assert list(recipe["weights"])[1] == "x/diff_a.npy" and len(recipe["weights"]) == 2 and str(d) not in (d/"out"/"README.md").read_text() + (d/"out"/"merge_recipe.json").read_text()


# -- the command --

def test_command_line(pair, capsys):
    from yunmin_efficientdata.cli import main
    d, base, diffs = pair; difference(d/"base", d/"b", d/"diff_b.lowrank.npz", rank=13)
    with pytest.raises(SystemExit) as e: main(["merge", str(d/"base"), str(d/"out"), "--diff", f"{d}/diff_a.npy=1", "--diff", f"{d}/diff_b.lowrank.npz=1", "--model", f"{d}/a=2", "--free"])
    assert not e.value.code and "6 of 7 tensors changed" in capsys.readouterr().out; got = tensors_of(d/"out")
    for k in diffs["a"]: np.testing.assert_allclose(got[k], base[k] + 3*diffs["a"][k] + diffs["b"][k], atol=2e-6)
    for args, words in (([], "at least one"), (["--diff", f"{d}/diff_a.npy"], "expected FILE.npy=WEIGHT"), (["--model", "x=y"], "expected DIR=WEIGHT"), (["--model", f"{d}/none=1"], "no such folder"), (["--diff", f"{d}/diff_a.npy=1", "--diff", f"{d}/diff_a.npy=2"], "given twice"), (["--diff", f"{d}/diff_a.npy=1", "--method", "ties", "--density", "2"], "density is 2"),
            (["--diff", f"{d}/diff_a.npy=1", "--method", "seqmean"], "needs calibration windows"), (["--diff", f"{d}/diff_a.npy=1", "--method", "seqmean", "--calibration", "a=none.parquet"], "expected NAME=FILE")):
        with pytest.raises(SystemExit) as e: main(["merge", str(d/"base"), str(d/"bad"), *args])
        err = capsys.readouterr().err; assert e.value.code == 2 and err.count("\n") == 1 and words in err and not (d/"bad").exists()


def test_calibration_files(tmp_path):
    from yunmin_efficientdata.cli import read_calibration
    (tmp_path/"a.jsonl").write_text("[1, 2, 3, 4, 5]\n{\"input_ids\": [6, 7]}\n{\"tokens\": [8, 9, 10, 11]}\n"); (tmp_path/"b.jsonl").write_text("[1, 2]\n{}\n"); (tmp_path/"c.jsonl").write_text("[1]\n")
    assert read_calibration([f"web={tmp_path}/a.jsonl"], 4, 9)["web"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]] and len(read_calibration([f"web={tmp_path}/a.jsonl"], 4, 1)["web"]) == 1
    for name, words in (("b.jsonl", "b.jsonl, line 2"), ("c.jsonl", "fewer tokens than one window")):
        with pytest.raises(UserError, match=words): read_calibration([f"web={tmp_path}/{name}"], 4, 9)


# -- size --

@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    "Anonymous memory that a merge of 64 MB and one of 512 MB add."
    rng = np.random.default_rng(0); peaks = {}
    for size in (1, 8):
        base = {f"w{i}": rng.normal(size=(2048, 4096)).astype("f4") for i in range(2*size)}; write_model(tmp_path/f"b{size}", base, size)
        write_model(tmp_path/f"x{size}", {k: x + 1 for k, x in base.items()}); del base
        code = f"""
from pathlib import Path; from yunmin_efficientdata.dem.merge import merge; from yunmin_efficientdata.bench.loader_peers import Gauge
d = Path({str(tmp_path)!r}); merge(d/'b1', d/'warm', {{d/'x1': 1}}); g = Gauge()
g.watch(lambda: merge(d/'b{size}', d/'out', {{d/'x{size}': 1, d/'b{size}': 1}})); print(g.growth[1])"""
        peaks[size] = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peaks[8] < 100 and peaks[8] < peaks[1] + 30, peaks
