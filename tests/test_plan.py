"""The estimates of `yunmin dem WS --plan`, against what really happens on a small scale."""
import json, subprocess, sys, textwrap
import pytest
import torch
from transformers import LlamaConfig, Mamba2Config, MambaConfig

from yunmin_efficientdata.core.settings import LoraSettings, load_settings
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dem.base import forward_flops, meta_model, parameter_count, published_config, quiet
from yunmin_efficientdata.dem.lora import adapt, adapter_parameters, adapter_size
from yunmin_efficientdata.dem.plan import LiveBytes, measured_share, plan, step_bytes, training_bytes

quiet()
SHAPE = dict(vocab_size=512, hidden_size=64, num_hidden_layers=4)
SMALL = {"mamba": (MambaConfig(**SHAPE, state_size=16), ["in_proj", "dt_proj", "out_proj"]), "mamba2": (Mamba2Config(**SHAPE, num_heads=8, head_dim=16, state_size=16, chunk_size=16, n_groups=1), ["in_proj", "out_proj"]),
         "llama": (LlamaConfig(**SHAPE, intermediate_size=128, num_attention_heads=4), ["q_proj", "down_proj"])}


def rows(config="configs/yunmin-3b", *overrides, store=None): return {r["what"]: r for r in plan(load_settings(config, list(overrides)), store)}


@pytest.fixture(scope="module")
def big(): return rows()


def test_the_3b_config_stays_within_the_limits(big):
    s = load_settings("configs/yunmin-3b").dem.lora
    assert (s.learning_rate, s.batch_size, s.epochs, s.precision, s.gradient_checkpointing) == (5e-5, 8, 1, "fp16", True) and 0 < s.max_hours <= 2
    assert big["parameters"]["estimate"] == "2,768,345,600" and all(r["within"] != "NO" for r in big.values())
    limits = {r["limit"] for r in big.values()}; assert {"2 h", "10 h", "5 min", "20 min", "22.1 GB", "73.6 GB"} <= limits
    assert any("A10G" in k for k in big) and any("A100" in k for k in big) and sum(k.startswith("assumed") for k in big) == 3


def test_3b_is_counted_without_being_allocated():
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert parameter_count(published_config()) == 2_768_345_600 and forward_flops(published_config(), 1024) == pytest.approx(2*2.77e9, rel=.02)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; the weights alone would be 11 GB


def test_adapters_are_counted_as_they_are_attached():
    for config, names in SMALL.values():
        s = LoraSettings(r=8, target_modules=names); model = adapt(meta_model(config), s)
        assert adapter_size(meta_model(config), s)[0] == sum(p.numel() for pair in adapter_parameters(model).values() for p in pair)
    s = LoraSettings(r=8, target_modules=["conv1d"]); assert adapter_size(meta_model(SMALL["mamba"][0]), s)[0] == 4*4*(128 + 4)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_memory_is_what_a_real_step_takes(kind, checkpointing):
    config, names = SMALL[kind]; s = LoraSettings(r=8, target_modules=names, seq_len=16 if kind == "mamba" else 48, batch_size=4, precision="fp32", gradient_checkpointing=checkpointing)
    predicted = training_bytes(config, s, kernels=False)["activations"]
    assert predicted == pytest.approx(step_bytes(config, s, 4, 4, torch.float32, False, device="cpu"), rel=.2)


def test_predicted_memory_against_the_process():
    "The operating system's own figure: peak resident memory of a step, against the plan's, within a factor of 1.4."
    config = Mamba2Config(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_heads=16, head_dim=32, state_size=16, chunk_size=32, n_groups=1); s = LoraSettings(r=8, target_modules=["in_proj", "out_proj"], seq_len=256, batch_size=8, precision="fp32")
    code = textwrap.dedent("""
        import torch; torch.set_num_threads(1)
        from transformers import AutoModelForCausalLM, Mamba2Config
        from yunmin_efficientdata.core.settings import LoraSettings
        from yunmin_efficientdata.dem.lora import adapt, token_loss
        config = Mamba2Config(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_heads=16, head_dim=32, state_size=16, chunk_size=32, n_groups=1)
        model = adapt(AutoModelForCausalLM.from_config(config), LoraSettings(r=8, target_modules=["in_proj", "out_proj"])).train()
        def step(n): token_loss(model(input_ids=torch.zeros(n, 256, dtype=torch.long), use_cache=False).logits, torch.zeros(n, 256, dtype=torch.long)).backward()
        def kb(key): return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
        step(1); before = kb("VmRSS"); step(8); print(kb("VmHWM") - before)""")  # ru_maxrss would begin with the parent's
    measured = 1024*int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert 1/1.4 < training_bytes(config, s, kernels=False)["activations"]/measured < 1.4


def test_kernels_checkpointing_and_accumulation_save_memory():
    for kind in ("mamba", "mamba2"):
        config, names = SMALL[kind]; s = LoraSettings(r=8, target_modules=names, seq_len=32, precision="fp16")
        def need(kernels=True, **more): return training_bytes(config, s.model_copy(update=more), kernels)["total"]
        assert need() < need(kernels=False) and need(gradient_checkpointing=True) < need() and need(accumulation=4) < need() and need(batch_size=16) > need()


def test_live_bytes_counts_storages_once():
    with LiveBytes() as live:
        a = torch.zeros(1000); b = a.view(10, 100)[2:]; c = a + 1; assert live.live == 8000
        del a, b; assert live.live == 4000
        del c
    assert live.live == 0 and live.peak == 8000


def test_the_workspace_gives_tokens_and_speed(tmp_path):
    store = open_store(str(tmp_path)); store.write("parquet_ready/manifest.json", json.dumps({"domains": {"web": {"tokens": 4_000_000}, "assembly": {"tokens": 1_000_000}}}))
    found = rows("configs/demo", "dem.lora.max_steps=-1", store=store); assert found["tokens a domain"]["estimate"] == "1,000,000 - 4,000,000" and measured_share(store) is None
    store.write("summary/train_web.csv", "step,mfu\n1,0.2\n2,0.4\n3,\n"); assert measured_share(store) == pytest.approx(.3)
    assert "measured in this workspace" in rows("configs/demo", store=store)["assumed: speed"]["estimate"]


def test_what_does_not_fit_is_said():
    found = rows("configs/yunmin-3b", "dem.lora.accumulation=1", "dem.lora.gradient_checkpointing=false", "dem.lora.max_hours=0", "dem.lora.epochs=3")
    assert [r["within"] for k, r in found.items() if k.startswith("training memory, A10G")] == ["NO"] and [r["within"] for k, r in found.items() if k.startswith("longest") and "A10G" in k] == ["NO"]


def test_command_prints_the_plan_and_runs_nothing(tmp_path, capsys, monkeypatch):
    from yunmin_efficientdata.cli import console, main
    monkeypatch.setattr(console, "_width", 200)
    try: main(["dem", str(tmp_path/"ws"), "--plan"])
    except SystemExit as e: assert not e.code
    out = capsys.readouterr().out; assert "phase 3, arithmetic" in out and "20 min" in out and "assumed: speed" in out and not (tmp_path/"ws/models").exists()
