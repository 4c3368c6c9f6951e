"""RegMean and SeqMean: the closed form by hand, every family of models, and what must be refused."""
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from yunmin_efficientdata.core.settings import BaseSettings, UserError
from yunmin_efficientdata.dem.base import demo_config, load_model, quiet, save_model
from yunmin_efficientdata.dem.calibrated import Walk, calibrated_tensors, fill, linear_groups, writes_residual
from yunmin_efficientdata.dem.vectors import difference

quiet()
VOCAB = 60


def configs():
    from transformers import GPT2Config, LlamaConfig, MambaConfig
    return {"mamba2": demo_config(BaseSettings(hidden_size=16, layers=2, head_dim=8, state_size=4, chunk_size=8), VOCAB),
            "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4),
            "llama": LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
            "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)}


LINEAR = ("proj.weight", "c_attn.weight", "c_fc.weight")


def make(folder, family, domains=("a", "b", "c"), same=False):
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0); save_model(AutoModelForCausalLM.from_config(configs()[family]), folder/"base"); rng = np.random.default_rng(0); vectors, windows = {}, {}
    for n, d in enumerate(domains):
        (folder/d).mkdir(); state = load_file(folder/"base"/"model.safetensors"); g = torch.Generator().manual_seed(0 if same else n)
        for k in sorted(state):
            if k.endswith(LINEAR): state[k] = state[k] + .2*torch.randn(len(state[k]), 2, generator=g) @ torch.randn(2, state[k].shape[1], generator=g)
        save_file(state, folder/d/"model.safetensors"); (folder/d/"config.json").write_text((folder/"base"/"config.json").read_text())
        vectors[folder/f"diff_{d}.npy"] = 1.; difference(folder/"base", folder/d, folder/f"diff_{d}.npy"); windows[d] = rng.integers(n*15, n*15 + 25, (6, 24))
    return folder/"base", vectors, windows


@pytest.mark.parametrize("family", ["mamba2", "mamba", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["regmean", "seqmean"])
def test_one_domain_and_equal_domains_are_themselves(tmp_path, family, method):
    base, vectors, windows = make(tmp_path, family, same=True); truth = load_file(tmp_path/"a"/"model.safetensors")
    for used in (dict(list(vectors.items())[:1]), vectors):
        found = dict(calibrated_tensors(base, used, windows, method))
        assert {k for k in truth if k.endswith(LINEAR)} <= set(found)
        for k, x in found.items(): np.testing.assert_allclose(x, truth[k].numpy(), atol=3e-4, err_msg=k)


def naive(base, folders, windows, order, ridge, residual):
    "Front to back with whole models in memory, inputs by hooks on whole forward passes."
    own = {d: load_model(f) for d, f in folders.items()}; merged = load_model(base); state = dict(merged.named_parameters())
    for k, p in state.items(): p.data.copy_(sum(dict(m.named_parameters())[k] for m in own.values())/len(own))
    def look(model, layer, name, ids):
        seen = {}
        hooks = [layer(model).get_submodule(name).register_forward_hook(lambda _, a, o: seen.update(x=a[0].flatten(0, -2), y=o.flatten(0, -2))), layer(model).register_forward_hook(lambda _, a, o: seen.update(out=(o[0] if isinstance(o, tuple) else o).flatten(0, -2)))]
        with torch.no_grad(): model(torch.from_numpy(ids))
        [h.remove() for h in hooks]
        return seen
    for i, name in order:
        layer = lambda m: m.backbone.layers[i]; A = B = 0
        for d, m in own.items():
            a, b = look(m, layer, name, windows[d]), look(merged, layer, name, windows[d]); y = a["y"]
            if residual and name.endswith("out_proj"): y = y + (a["out"] - a["y"]) - (b["out"] - b["y"])
            A, B = A + (b["x"].T @ b["x"]).double()/len(y)/len(own), B + (b["x"].T @ y).double()/len(y)/len(own)
        module = layer(merged).get_submodule(name); r = ridge*A.diagonal().mean()
        module.weight.data.copy_(torch.linalg.solve(A + r*torch.eye(len(A)), B + r*module.weight.data.double().T).T.float())
    return state


@pytest.mark.parametrize("residual", [False, True])
def test_seqmean_is_the_naive_walk(tmp_path, residual):
    base, vectors, windows = make(tmp_path, "mamba2"); order = [(i, f"mixer.{n}") for i in range(2) for n in ("in_proj", "out_proj")]
    found, expected = dict(calibrated_tensors(base, vectors, windows, "seqmean", residual=residual)), naive(base, {d: tmp_path/d for d in windows}, windows, order, .05, residual)
    for i, n in order: np.testing.assert_allclose(found[f"backbone.layers.{i}.{n}.weight"], expected[f"backbone.layers.{i}.{n}.weight"].detach().numpy(), atol=2e-3)


def test_regmean_is_the_papers_formula(tmp_path):
    base, vectors, windows = make(tmp_path, "mamba2"); key = "backbone.layers.0.mixer.in_proj.weight"; A = B = 0
    for d in windows:
        model, seen = load_model(tmp_path/d), []
        model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda _, a, o: seen.append(a[0].flatten(0, -2)))
        with torch.no_grad(): model(torch.from_numpy(windows[d]))
        G = (seen[0].T @ seen[0]).double(); G = .9*G + .1*torch.diag(G.diagonal()); A, B = A + G, B + G @ model.backbone.layers[0].mixer.in_proj.weight.detach().double().T
    np.testing.assert_allclose(dict(calibrated_tensors(base, vectors, windows, "regmean"))[key], torch.linalg.solve(A, B).T.numpy(), atol=1e-3)


def test_modules_that_read_one_input_are_solved_together(tmp_path):
    base, vectors, windows = make(tmp_path, "llama"); walk = Walk(base, vectors, "seqmean", .05, .9, True); walk.enter("a", 1., windows["a"], 6)
    layer = walk.layers[0]; fill(layer, "model.layers.0.", walk.tensors.read); s = walk.streams[0]; names = [n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]
    groups = linear_groups(layer, names, s.own[0], s.calls[0])
    assert [sorted(x.split(".")[-1] for x in g) for g in groups] == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [writes_residual(layer, n, s.own[0], s.calls[0]) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")] == [False, False, True]


def test_batches_do_not_matter_and_a_base_teacher_pulls_back(tmp_path):
    base, vectors, windows = make(tmp_path, "mamba2"); whole = dict(calibrated_tensors(base, vectors, windows, "seqmean"))
    for k, x in calibrated_tensors(base, vectors, windows, "seqmean", batch_tokens=24): np.testing.assert_allclose(x, whole[k], atol=1e-3)
    untouched = load_file(base/"model.safetensors"); general = np.random.default_rng(5).integers(0, VOCAB, (6, 24)); key = "backbone.layers.0.mixer.in_proj.weight"
    near = [np.linalg.norm(dict(calibrated_tensors(base, vectors, {**windows, "base": general}, "seqmean", base_weight=w))[key] - untouched[key].numpy()) for w in (0., 1., 100.)]
    assert near[0] > near[1] > near[2]


def test_weights_count_and_zero_leaves_out(tmp_path):
    base, vectors, windows = make(tmp_path, "mamba2"); a, b, c = vectors; truth = load_file(tmp_path/"a"/"model.safetensors")
    for k, x in calibrated_tensors(base, {a: 2., b: 0., c: 0.}, {"a": windows["a"]}, "seqmean"): np.testing.assert_allclose(x, truth[k].numpy(), atol=3e-4)


def test_what_is_refused(tmp_path):
    base, vectors, windows = make(tmp_path, "mamba2"); a = next(iter(vectors))
    for v, w, method, match in [(vectors, {"a": windows["a"]}, "seqmean", "no calibration windows of 'b'"), (vectors, windows, "magic", "unknown method"), ({a: -1.}, windows, "seqmean", "none may be negative"),
                                ({a: 1.}, {"a": windows["a"] + VOCAB}, "regmean", "another tokenizer")]:
        with pytest.raises(UserError, match=match) as e: dict(calibrated_tensors(base, v, w, method))
        assert "\n" not in str(e.value)


def test_through_merge_the_model_loads_and_answers_better(tmp_path):
    from yunmin_efficientdata.dem.merge import merge
    base, vectors, windows = make(tmp_path, "llama")
    @torch.no_grad()
    def distance(folder): return np.mean([(load_model(folder)(torch.from_numpy(w)).logits - load_model(tmp_path/d)(torch.from_numpy(w)).logits).pow(2).mean().item() for d, w in windows.items()])
    merge(base, tmp_path/"linear", vectors); merge(base, tmp_path/"seqmean", vectors, method="seqmean", calibration=windows)
    assert distance(tmp_path/"seqmean") < .8*distance(tmp_path/"linear") and json.loads((tmp_path/"seqmean"/"merge_recipe.json").read_text())["method"] == "seqmean"


# -- the fit of a layer --

@pytest.mark.parametrize("family", ["mamba2", "llama"])
def test_a_fit_brings_every_layer_nearer_and_is_the_same_every_time(tmp_path, family):
    "What a fitted layer answers on the merged stream is nearer to the domains' own answers; no step more than asked for is taken."
    base, vectors, windows = make(tmp_path, family)
    def gap(values):
        "Mean squared distance of the hidden states to each domain's own."
        model = load_model(base); named = dict(model.named_parameters()); total = 0.
        with torch.no_grad():
            for k, x in values.items(): named[k].copy_(torch.from_numpy(x))
            for d, w in windows.items():
                ids = torch.from_numpy(w); total += (model.base_model(ids).last_hidden_state - load_model(tmp_path/d).base_model(ids).last_hidden_state).pow(2).mean().item()
        return total
    plain, fitted = (dict(calibrated_tensors(base, vectors, windows, fit_steps=n)) for n in (0, 30)); twice = dict(calibrated_tensors(base, vectors, windows, fit_steps=30))
    assert gap(fitted) < .95*gap(plain) and all(np.array_equal(x, twice[k]) for k, x in fitted.items())


def test_one_domain_stays_itself_under_a_fit(tmp_path):
    base, vectors, windows = make(tmp_path, "mamba2", same=True); truth = load_file(tmp_path/"a"/"model.safetensors")
    for k, x in calibrated_tensors(base, vectors, windows, fit_steps=5, fit_rate=1e-4): np.testing.assert_allclose(x, truth[k].numpy(), atol=2e-3)


# -- killed, resumed, types, devices --

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from yunmin_efficientdata.dem import calibrated, merge as m
d, left, put = Path(sys.argv[1]), int(sys.argv[2]), m._put
def counting(*a):
    global left; left -= 1
    if left < 0: os.kill(os.getpid(), signal.SIGKILL)
    put(*a)
m._put = counting; w = np.load(d/"windows.npz")
m.merge(d/"base", d/"out", {d/f"diff_{x}.npy": 1. for x in w}, "seqmean", calibration=dict(w), fit_steps=3)
"""


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "Base, vectors, windows, the undisturbed merge, and what a merge left that was killed behind the first layer and one tensor."
    import shutil
    from yunmin_efficientdata.dem.merge import merge
    d = tmp_path_factory.mktemp("walked"); base, vectors, windows = make(d, "mamba2"); np.savez(d/"windows.npz", **windows)
    keys = [k for k, _ in calibrated_tensors(base, vectors, windows, fit_steps=3)]; behind = 1 + max(i for i, k in enumerate(keys) if ".layers.0." in k)
    merge(base, d/"whole", vectors, "seqmean", calibration=windows, fit_steps=3)
    def kill(writes): p = subprocess.run([sys.executable, "-c", KILLED, str(d), str(writes)], capture_output=True, text=True); assert p.returncode == -signal.SIGKILL, p.stderr
    kill(behind + 1); assert not (d/"out").exists(); shutil.move(d/".out.partial", d/"kept")
    return d, base, vectors, windows, keys, behind


def again(walked, spoil, windows=None, taken=None, **more):
    "The merge is started again on what the killed one had left; the lines that it said."
    import shutil
    from yunmin_efficientdata.dem.merge import merge
    d, base, vectors, seen, *_ = walked; part, lines = d/".out.partial", []; shutil.rmtree(d/"out", ignore_errors=True); shutil.copytree(d/"kept", part); spoil(part)
    merge(base, d/"out", vectors, "seqmean", calibration=windows or seen, **{"fit_steps": 3} | more, log=lines.append)
    assert not part.exists() and lines == ([f"{taken} tensors taken over from a killed merge"] if taken else []), lines
    return {f.name: f.read_bytes() for f in (d/"out").iterdir()}


def test_a_killed_walk_goes_on_behind_its_last_layer(walked, monkeypatch):
    from yunmin_efficientdata.dem import calibrated
    d, *_, behind = walked; whole = {f.name: f.read_bytes() for f in (d/"whole").iterdir()}
    solved, solve = [], calibrated._solve_group; monkeypatch.setattr(calibrated, "_solve_group", lambda w, i, *a: (solved.append(i), solve(w, i, *a))[1])
    assert again(walked, lambda part: None, taken=behind + 1) == whole and set(solved) == {1}


def test_what_a_killed_walk_left_is_checked(walked):
    from yunmin_efficientdata.dem.vectors import Weights
    d, base, _, windows, keys, behind = walked; whole = {f.name: f.read_bytes() for f in (d/"whole").iterdir()}
    def change(work):
        def spoil(part): f = part/"model.safetensors"; x = bytearray(f.read_bytes()); work(x); f.write_bytes(x)
        return spoil
    def flip(x): x[Weights(base).tensors[keys[0]].start] ^= 1
    def between(x): x[Weights(base).tensors[keys[-1]].start] ^= 1 # in a tensor that had not been written
    assert again(walked, change(flip), taken=behind) == whole and again(walked, change(between), taken=behind + 1) == whole
    assert again(walked, change(lambda x: x.__delitem__(slice(-5, None)))) == whole and again(walked, lambda part: (part/"merge_state.json").write_text("{")) == whole
    for other in ({"windows": {k: w[::-1].copy() for k, w in windows.items()}}, {"ridge": .2}, {"fit_steps": 4}): assert again(walked, lambda part: None, **other) != whole


def test_the_walk_sees_what_a_half_precision_model_will_hold(tmp_path):
    "Merged tensors are rounded before the windows go on: written and read again they are the same numbers."
    base, vectors, windows = make(tmp_path, "mamba2")
    for f in (base, *(tmp_path/d for d in windows)): state = {k: x.bfloat16() for k, x in load_file(f/"model.safetensors").items()}; save_file(state, f/"model.safetensors")
    for v in vectors: difference(base, tmp_path/v.stem.removeprefix("diff_"), v)
    for k, x in calibrated_tensors(base, vectors, windows, fit_steps=2): np.testing.assert_array_equal(x, torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["regmean", "seqmean"])
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, method):
    base, vectors, windows = make(tmp_path, "mamba2"); cpu, gpu = (dict(calibrated_tensors(base, vectors, windows, method, device=d)) for d in ("cpu", "cuda"))
    for k, x in cpu.items(): np.testing.assert_allclose(gpu[k], x, atol=2e-3)


@pytest.mark.parametrize("fit_steps", [0, 3])
def test_operations_are_what_the_plan_says(tmp_path, fit_steps):
    from torch.utils.flop_counter import FlopCounterMode
    from yunmin_efficientdata.dem.plan import walk_operations
    base, vectors, windows = make(tmp_path, "mamba2", domains=("a", "b")); config = load_model(base).config
    with FlopCounterMode(display=False) as count: found = dict(calibrated_tensors(base, vectors, windows, fit_steps=fit_steps, fit_windows=2))
    tokens = sum(w.size for w in windows.values())
    said = walk_operations(config, {k: x.shape for k, x in found.items() if x.ndim == 2}, 2, tokens, fit_steps*2*24*len(windows))
    assert .6 < said/count.get_total_flops() < 1.7, (said, count.get_total_flops())


def test_too_little_memory_of_a_device_is_one_line(tmp_path, monkeypatch):
    from yunmin_efficientdata.dem import calibrated
    from yunmin_efficientdata.dem.merge import merge
    base, vectors, windows = make(tmp_path, "llama", domains=("a", "b"))
    def full(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(calibrated, "fit_layer", full)
    with pytest.raises(UserError, match="too little memory for seqmean; take fewer calibration windows"): merge(base, tmp_path/"out", vectors, "seqmean", calibration=windows, fit_steps=1)
    assert not (tmp_path/"out").exists()
