"""Adapters that learn and merge on every kind of model; training that resumes, stops, accumulates and runs in several processes."""
import copy, csv, json, signal, subprocess, sys, textwrap
from pathlib import Path
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FalconMambaConfig, GPT2Config, JambaConfig, LlamaConfig, Mamba2Config, MambaConfig

from yunmin_efficientdata.core.settings import LoraSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dem.base import load_model, peak_flops, quiet
from yunmin_efficientdata.dem.lora import (Batches, Checkpoints, adapt, adapter_parameters, adapter_report, adapter_state, arguments, check_gradients, describe, domain_model, gradient_norms,
    heldout_windows, load_adapter, open_checkpoints, precision, save_adapter, token_loss, train_adapter, training_flops, undescribe, window_loss)
from yunmin_efficientdata.dem.vectors import Vector, difference
from yunmin_efficientdata.format.loader import TokenLoader

quiet(); torch.set_num_threads(1)
SHAPE = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2)
KINDS = {
    "mamba": (MambaConfig(**SHAPE, state_size=4), ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]),
    "mamba2": (Mamba2Config(**SHAPE, num_heads=4, head_dim=8, state_size=4, chunk_size=8, n_groups=1, tie_word_embeddings=True), ["in_proj", "conv1d", "out_proj"]),
    "llama": (LlamaConfig(**SHAPE, intermediate_size=32, num_attention_heads=2), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0), ["c_attn", "c_proj", "c_fc"]),
    "falcon_mamba": (FalconMambaConfig(**SHAPE, state_size=4), ["in_proj", "x_proj", "dt_proj", "out_proj"]),
    "jamba": (JambaConfig(**SHAPE, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False), ["in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "down_proj"]),
}
IDS = (torch.arange(4)[:, None]*9 + torch.arange(32)*5) % 64
SMALL = dict(r=4, learning_rate=3e-2, batch_size=4, seq_len=32, max_steps=12, eval_steps=4, checkpoint_steps=3, target_modules=["in_proj", "out_proj"])


def make(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind][0]), **more)


def token_file(path, tokens):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [tokens[i:i + 50].tolist() for i in range(0, len(tokens), 50)]
    pq.write_table(pa.table({"tokens": pa.array(rows, pa.list_(pa.field("element", pa.int32(), nullable=False)))}), path, compression={"tokens.list.element": "NONE"}, use_dictionary=False,
                   column_encoding={"tokens.list.element": "PLAIN"}, data_page_version="2.0", write_page_index=True)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Bases of all kinds, a Parquet file and validation windows."
    d = tmp_path_factory.mktemp("lora")
    for kind in KINDS: make(kind).save_pretrained(d/kind)
    token_file(d/"web.parquet", (np.random.default_rng(0).permutation(4000)*5 % 64).astype(np.int32))
    return d


def loader(data, batch=4): return TokenLoader([data/"web.parquet"], 32, batch)
def windows(data): return heldout_windows([data/"web.parquet"], 32, 8)
def content(folder): return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


def train(data, out, kind="mamba2", loader_=None, **more):
    keys = {k: more.pop(k) for k in ("start", "resume", "files", "log", "steps") if k in more}
    return train_adapter(data/kind, loader_ or loader(data), windows(data), LoraSettings(**SMALL | more), out, threads=1, **keys)


# -- adapters --

@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_learns_and_merges(kind):
    model, names = make(kind), KINDS[kind][1]; before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = adapter_report(model, LoraSettings(r=4, target_modules=names), IDS)
    assert {r["module"].rsplit(".", 1)[-1] for r in rows} == set(names)
    for r in rows: assert r["gradient_a"] > 0 and r["gradient_b"] > 0 and r["merge_error"] < 2e-6 + r["effect"]*1e-4, r
    inside = [r for r in rows if kind != "llama" and kind != "gpt2" and r["module"].rsplit(".", 1)[-1] in ("conv1d", "x_proj", "dt_proj", "out_proj")]
    assert all(r["way"] == "weight" for r in inside) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_saved_adapter_is_the_adapter_in_place(data, tmp_path):
    for kind in KINDS:
        names = [n for n in KINDS[kind][1] if n != "lm_head"]; s = LoraSettings(r=3, alpha=7, target_modules=names); tuned = adapt(load_model(data/kind), s)
        with torch.no_grad():
            for _, B in adapter_parameters(tuned).values(): B.normal_(0, .1)
        save_adapter(tuned, tmp_path/kind, s); merged = domain_model(data/kind, tmp_path/kind)
        with torch.no_grad(): a, b, c = tuned.eval()(input_ids=IDS).logits, merged(input_ids=IDS).logits, load_model(data/kind)(input_ids=IDS).logits
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0); assert (a - c).abs().max() > 1e-3, kind
        again = adapt(load_model(data/kind), s); load_adapter(again, tmp_path/kind)
        assert all(torch.equal(x, y) for x, y in zip(adapter_state(again).values(), adapter_state(tuned).values()))
        difference(data/kind, tmp_path/kind, tmp_path/f"diff_{kind}.npy"); v = Vector(tmp_path/f"diff_{kind}.npy"); base, full = load_model(data/kind).state_dict(), merged.state_dict()
        for key in v.keys(): np.testing.assert_allclose(v.read(key, 0, base[key].numel()).reshape(base[key].shape), (full[key] - base[key]).numpy(), atol=1e-6)


def test_what_cannot_become_a_vector_is_refused_before_training(data, tmp_path, monkeypatch):
    from yunmin_efficientdata.dem import vectors
    def refuse(self, key): raise UserError("no matrix")
    monkeypatch.setattr(vectors.Adapter, "factors", refuse)
    with pytest.raises(UserError, match="mixer.in_proj could be trained but not made into a difference vector; remove 'in_proj'"): train(data, tmp_path/"a", target_modules=["in_proj"])
    assert not (tmp_path/"a").exists()


def test_peft_reads_what_it_can_reach(data, tmp_path):
    from peft import PeftModel
    for kind, names in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]), ("mamba", ["in_proj"])):
        s = LoraSettings(r=3, target_modules=names); tuned = adapt(load_model(data/kind), s)
        with torch.no_grad():
            for _, B in adapter_parameters(tuned).values(): B.normal_(0, .1)
        save_adapter(tuned, tmp_path/kind, s); theirs = PeftModel.from_pretrained(load_model(data/kind), tmp_path/kind)
        with torch.no_grad(): torch.testing.assert_close(theirs(input_ids=IDS).logits, tuned.eval()(input_ids=IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind,names,match", [("mamba2", ["lm_head"], "tied to an embedding"), ("mamba", ["embeddings"], "embedding"), ("gpt2", ["lm_head"], "tied"), ("mamba2", ["norm"], "no matrix"), ("llama", ["q_prj"], "matches no module"), ("gpt2", ["c_attn", "wte"], "embedding")])
def test_what_cannot_be_adapted_is_named(kind, names, match):
    with pytest.raises(UserError, match=match) as e: adapt(make(kind), LoraSettings(target_modules=names))
    assert "\n" not in str(e.value) and "target_modules" in str(e.value)


def backward(model): model.zero_grad(); token_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()


def test_a_silent_adapter_is_refused_by_name():
    from peft import LoraConfig, get_peft_model
    silent = get_peft_model(make("mamba"), LoraConfig(r=4, target_modules=["in_proj", "dt_proj"])); backward(silent)
    with pytest.raises(UserError, match=r"layers\.0\.mixer\.dt_proj gets no gradient \(B\).*remove 'dt_proj'"): check_gradients(silent)


def test_a_must_learn_as_soon_as_b_has_moved():
    tuned = adapt(make("mamba2"), LoraSettings(**SMALL)); backward(tuned)
    assert check_gradients(tuned) is False and all(a == 0 and b > 0 for a, b in gradient_norms(tuned).values())
    with torch.no_grad():
        for A, B in adapter_parameters(tuned).values(): B.sub_(B.grad)
    backward(tuned); assert check_gradients(tuned) is True
    name, (A, B) = list(adapter_parameters(tuned).items())[1]; A.grad = None
    with pytest.raises(UserError, match=r"no gradient \(A\)") as e: check_gradients(tuned)
    assert name in str(e.value)


def fused(x_is_read: bool):
    "A training shortcut as on a GPU: one function that gets the weights of the whole block."
    def kernel(xz, conv, conv_bias, x_proj, dt_proj, out_proj, *rest, **more):
        x, z = xz.chunk(2, 1); x = torch.nn.functional.silu(torch.nn.functional.conv1d(x, conv, conv_bias, padding=3, groups=len(conv))[..., :x.shape[-1]]).transpose(1, 2)
        dt = (x @ (x_proj if x_is_read else x_proj.detach()).T)[..., :dt_proj.shape[1]] @ dt_proj.T
        return (x*dt.sigmoid()*z.transpose(1, 2)) @ out_proj.T
    return kernel


def test_a_fused_kernel_gets_the_adapted_weights(monkeypatch):
    import transformers.models.mamba.modeling_mamba as m
    monkeypatch.setattr(m, "mamba_inner_fn", fused(True))
    tuned = adapt(make("mamba"), LoraSettings(r=4, target_modules=KINDS["mamba"][1])).train(); backward(tuned); assert check_gradients(tuned) is False
    monkeypatch.setattr(m, "mamba_inner_fn", fused(False))
    with pytest.raises(UserError, match=r"mixer\.x_proj gets no gradient"): backward(tuned); check_gradients(tuned)


def test_training_stops_at_the_first_step_when_a_kernel_bypasses_an_adapter(data, tmp_path, monkeypatch):
    import transformers.models.mamba.modeling_mamba as m
    monkeypatch.setattr(m, "mamba_inner_fn", fused(False))
    with pytest.raises(UserError, match=r"mixer\.x_proj gets no gradient"): train(data, tmp_path/"out", "mamba", target_modules=["in_proj", "x_proj"])
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("kind", ["mamba2", "llama"])
def test_flops_are_those_that_torch_counts(kind):
    from torch.utils.flop_counter import FlopCounterMode
    for more in ({}, {"gradient_checkpointing": True}):
        s = LoraSettings(r=4, seq_len=32, target_modules=["in_proj", "out_proj"] if kind == "mamba2" else ["q_proj", "down_proj"], **more); model = adapt(make(kind, attn_implementation="eager"), s).train()
        if more: model.gradient_checkpointing_enable({"use_reentrant": False})
        with FlopCounterMode(display=False) as count: backward(model)
        assert training_flops(KINDS[kind][0], s)[1] == pytest.approx(count.get_total_flops()/IDS.numel(), rel=.1)


# -- training --

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole"); rows = train(data, out/"a", dropout=.1, patience=9)
    return out, rows


def test_rows_and_files(data, tmp_path):
    store = open_store(str(tmp_path/"ws")); seen = []
    rows = train(data, tmp_path/"a", files=(store, "web"), log=seen.append, peak_flops=1e12)
    assert rows[-1]["step"] == 12 and [r["step"] for r in seen] == [4, 8, 12] and all(r["tokens_per_s"] > 0 and 0 < r["mfu"] < 1 for r in rows) and any("gradients of A at step" in n for n in rows[-1]["notes"])
    table = list(csv.DictReader(store.read_text("summary/train_web.csv").splitlines())); assert [int(r["step"]) for r in table] == list(range(1, 13)) and float(table[-1]["mfu"]) > 0
    log = store.read_text("logs/train_web.log"); assert "peak 1 TFLOP/s a device (lora.peak_flops)" in log and "gradients of B at step 1: 4 adapters" in log and "tokens_per_s" in log
    assert window_loss(domain_model(data/"mamba2", tmp_path/"a"), windows(data)) == pytest.approx(rows[-1]["eval_loss"], abs=1e-5)


def test_files_are_written_while_training_goes_on(data, tmp_path, monkeypatch):
    import yunmin_efficientdata.dem.lora as m
    store, sizes = open_store(str(tmp_path/"ws")), []; monkeypatch.setattr(m.time, "monotonic", iter(range(0, 10**6, 10)).__next__)
    train(data, tmp_path/"a", files=(store, "web"), log=lambda row: sizes.append(store.size("summary/train_web.csv")))
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_killed_run_ends_with_the_same_bytes(data, whole, tmp_path):
    "Dropout, early stopping and the loader's place: all of it survives SIGKILL."
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import os, signal
        from pathlib import Path
        from test_lora import train
        def log(row):
            if row["step"] == 8: os.kill(os.getpid(), signal.SIGKILL)
        train(Path({str(data)!r}), Path({str(tmp_path/'a')!r}), dropout=.1, patience=9, resume=Path({str(tmp_path/'state')!r}), log=log)""")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL and not (tmp_path/"a").exists()
    assert Checkpoints(open_store(str(tmp_path)), "state").steps() == [6, 3]
    rows = train(data, tmp_path/"a", dropout=.1, patience=9, resume=tmp_path/"state"); out, expected = whole
    assert content(tmp_path/"a") == content(out/"a") and [(r["step"], r.get("loss"), r.get("eval_loss"), r["tokens"]) for r in rows] == [(r["step"], r.get("loss"), r.get("eval_loss"), r["tokens"]) for r in expected]
    assert any("continued at step 6 of 12" in n for n in rows[-1]["notes"]) and Checkpoints(open_store(str(tmp_path)), "state").steps() == [9, 6]


class Foreign:
    "A loader that knows nothing of states: other windows in every epoch."
    def __init__(self): self.epoch, self.dataset = 0, type("D", (), {"seq_len": 32})
    def set_epoch(self, epoch): self.epoch = epoch
    def __len__(self): return 5
    def __iter__(self):
        rng = np.random.default_rng(self.epoch)
        for _ in range(5): yield {"input_ids": torch.from_numpy(rng.integers(0, 64, (4, 32)))}


class Killed(BaseException): pass


def test_any_loader_resumes(data, tmp_path):
    def log(row):
        if row["step"] == 8: raise Killed
    train(data, tmp_path/"a", loader_=Foreign())
    with pytest.raises(Killed): train(data, tmp_path/"b", loader_=Foreign(), resume=tmp_path/"state", log=log)
    train(data, tmp_path/"b", loader_=Foreign(), resume=tmp_path/"state"); assert content(tmp_path/"a") == content(tmp_path/"b")


def test_state_of_another_training_is_not_continued(data, tmp_path):
    train(data, tmp_path/"a", resume=tmp_path/"state"); rows = train(data, tmp_path/"b", resume=tmp_path/"state", learning_rate=1e-2)
    assert not any("continued" in n for n in rows[-1]["notes"]) and content(tmp_path/"a") != content(tmp_path/"b")
    half = tmp_path/"state"/"step-00000011"; half.mkdir(); (half/"state.json").write_text("{")
    assert any("continued at step 9" in n for n in train(data, tmp_path/"c", resume=tmp_path/"state", learning_rate=1e-2)[-1]["notes"]) and content(tmp_path/"b") == content(tmp_path/"c")
    open_checkpoints(tmp_path/"state").clear(); assert open_checkpoints(tmp_path/"state").steps() == []


@pytest.mark.slow
def test_states_are_kept_on_s3(data, tmp_path, s3):
    def log(row):
        if row["step"] == 8: raise Killed
    train(data, tmp_path/"a"); store = open_store(s3.uri)
    with pytest.raises(Killed): train(data, tmp_path/"b", resume=(store, "checkpoints/lora_web.partial"), files=(store, "web"), log=log)
    assert Checkpoints(store, "checkpoints/lora_web.partial").steps() == [6, 3]
    train(data, tmp_path/"b", resume=(store, "checkpoints/lora_web.partial"), files=(store, "web")); assert content(tmp_path/"a") == content(tmp_path/"b") and store.exists("summary/train_web.csv")


def close(a, b, tolerance):
    from safetensors.torch import load_file
    x, y = (load_file(f/"adapter_model.safetensors") for f in (a, b))
    for k in x: torch.testing.assert_close(x[k], y[k], atol=tolerance, rtol=0)


def test_accumulation_and_checkpointing_do_not_change_the_result(data, tmp_path):
    train(data, tmp_path/"a", max_steps=5); train(data, tmp_path/"b", max_steps=5, accumulation=4); train(data, tmp_path/"c", max_steps=5, gradient_checkpointing=True)
    close(tmp_path/"a", tmp_path/"b", 2e-3); close(tmp_path/"a", tmp_path/"c", 2e-3)
    with pytest.raises(UserError, match="lora.batch_size: 4 windows cannot be divided by 1 processes x lora.accumulation 3"): train(data, tmp_path/"d", accumulation=3)
    for kind, names in (("mamba", ["in_proj", "dt_proj"]), ("llama", ["q_proj"])): train(data, tmp_path/kind, kind, max_steps=3, gradient_checkpointing=True, target_modules=names)


def test_time_limit_stops_cleanly(data, tmp_path):
    rows = train(data, tmp_path/"a", max_hours=1e-9)
    assert rows[-1]["stopped"] == "max_hours" and rows[-1]["step"] == 1 and "stopped after 0.00 h at step 1 of 12 (lora.max_hours)" in rows[-1]["notes"] and (tmp_path/"a/adapter_model.safetensors").is_file()


def test_early_stopping_keeps_the_best(data, tmp_path):
    rows = train(data, tmp_path/"a", learning_rate=1., eval_steps=1, patience=2, warmup_ratio=0, max_steps=40); losses = [r["eval_loss"] for r in rows]
    assert rows[-1]["stopped"] == "patience" and len(losses) - 1 - int(np.argmin(losses)) == 2
    assert window_loss(domain_model(data/"mamba2", tmp_path/"a"), windows(data)) == pytest.approx(min(losses), abs=1e-4)


def test_start_from_an_adapter(data, whole, tmp_path):
    "The first step of a warm-up has rate zero: what began comes out."
    out, _ = whole; train(data, tmp_path/"a", start=out/"a", max_steps=1); assert content(tmp_path/"a")["adapter_model.safetensors"] == content(out/"a")["adapter_model.safetensors"]
    from safetensors.torch import load_file
    tensors = load_file(out/"a"/"adapter_model.safetensors"); train(data, tmp_path/"b", start=out/"a"); train(data, tmp_path/"c", start=tensors); train(data, tmp_path/"d")
    assert content(tmp_path/"b") == content(tmp_path/"c") != content(tmp_path/"d")
    with pytest.raises(UserError, match="use the same lora"): train(data, tmp_path/"e", start=out/"a", r=2)
    with pytest.raises(UserError, match="use the same lora"): train(data, tmp_path/"e", start=out/"a", target_modules=["in_proj"])
    with pytest.raises(UserError, match="no such file"): train(data, tmp_path/"e", start=tmp_path/"gone")


def test_trouble_is_one_line(data, tmp_path):
    with pytest.raises(UserError, match="not finite after step"): train(data, tmp_path/"a", learning_rate=1e20, warmup_ratio=0)
    with pytest.raises(UserError, match="fp16 needs a GPU"): train(data, tmp_path/"a", precision="fp16")
    assert not (tmp_path/"a").exists() and precision(LoraSettings(), True) == "fp16" and peak_flops()[0] is None


def test_bf16_follows_fp32(data, tmp_path):
    a, b = train(data, tmp_path/"a", precision="bf16"), train(data, tmp_path/"b"); assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], abs=.05) and a[-1]["loss"] != b[-1]["loss"]


def test_several_gpus_without_launcher_are_one(tmp_path, monkeypatch):
    "Trainer would wrap the model in DataParallel and cut the batches."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert arguments(LoraSettings(**SMALL), tmp_path, 5).n_gpu <= 1


# -- several processes --

def test_two_processes_follow_the_curve_of_one(data, tmp_path):
    one = train(data, tmp_path/"one"); store = open_store(str(tmp_path/"ws"))
    two = train(data, tmp_path/"two", processes=2, files=(store, "web"), resume=tmp_path/"state")
    for a, b in zip(one, two, strict=True): assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=2e-5) and a.get("eval_loss", 0) == pytest.approx(b.get("eval_loss", 0), abs=2e-5)
    close(tmp_path/"one", tmp_path/"two", 2e-3)
    assert len(store.read_text("summary/train_web.csv").splitlines()) == 13 and sorted(content(tmp_path/"two")) == ["adapter_config.json", "adapter_model.safetensors"] and open_checkpoints(tmp_path/"state").steps() == [9, 6]


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line(data, tmp_path):
    with pytest.raises(UserError, match="target_modules: 'in_prj' matches no module") as e: train(data, tmp_path/"a", processes=2, target_modules=["in_prj"])
    assert "\n" not in str(e.value) and not (tmp_path/"a").exists()


@pytest.mark.slow
def test_two_processes_resume_and_take_any_loader(data, tmp_path):
    train(data, tmp_path/"one", loader_=Foreign()); train(data, tmp_path/"two", loader_=Foreign(), processes=2); close(tmp_path/"one", tmp_path/"two", 2e-3)
    def log(row):
        if row["step"] == 8: raise Killed
    train(data, tmp_path/"a", processes=2)
    with pytest.raises(Killed): train(data, tmp_path/"b", processes=2, resume=tmp_path/"state", log=log)
    rows = train(data, tmp_path/"b", processes=2, resume=tmp_path/"state"); assert any("continued at step" in n for n in rows[-1]["notes"]) and content(tmp_path/"a") == content(tmp_path/"b")


def test_ranks_and_parts_share_each_batch(data):
    import itertools
    whole = [b["input_ids"] for b in itertools.islice(loader(data), 3)]
    for make_ in (lambda: loader(data), Foreign):
        expected = [b["input_ids"] for b in itertools.islice(iter(Batches(make_(), 3)), 3)]
        got = [[b["input_ids"] for b in itertools.islice(iter(Batches(make_(), 3, 2, r, 2)), 6)] for r in range(2)]
        for i in range(3): assert torch.equal(torch.cat([torch.cat(g[2*i:2*i + 2]) for g in got]), expected[i])
    assert torch.equal(whole[0], [b["input_ids"] for b in itertools.islice(iter(Batches(loader(data), 3)), 1)][0])


def test_a_loader_is_described_and_opened_again(data, tmp_path):
    import itertools
    one = TokenLoader([data/"web.parquet"], 32, 4, seed=3, shuffle="page", mix={"web": .5}); next(iter(one))
    for source, steps in ((one, 4), (Foreign(), 7)):
        found = undescribe(json.loads(json.dumps(describe(source, steps, tmp_path))))
        again = Foreign() if isinstance(source, Foreign) else source
        for a, b in itertools.islice(zip(iter(Batches(found, steps)), iter(Batches(again, steps))), 4): assert torch.equal(a["input_ids"], b["input_ids"])
