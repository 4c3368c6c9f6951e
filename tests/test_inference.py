"Inference figures: what a request costs, percentiles, goodput, peaks, memory."
from __future__ import annotations
import math, mmap
import numpy as np, pandas as pd, pytest, torch
from yunmin_efficientdata.core.settings import InferenceSettings
from yunmin_efficientdata.evaluation import inference, inputs

def llama(vocab):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()

def test_bytes_and_flops_of_an_untied_attention_model():
    model = llama(300)
    total = sum(p.numel() for p in model.parameters())
    assert inference.token_flops(model) == 2*(total - 300*32)
    assert inference.state_bytes(model, 32) == 2*inference.state_bytes(model, 16) > 0    # a key-value cache grows

def toy(): return inputs.toy(["봄이 오면 꽃이 핀다."])[0]

def test_flops_of_a_request_use_the_output_matrix_once_for_the_prompt():
    model = toy(); head, whole = 2*model.get_output_embeddings().weight.numel(), inference.token_flops(model)
    prefill, total = inference.request_flops(model, 10, 5)
    assert prefill == (whole - head)*10 + head and total == prefill + 4*whole      # Mamba2 knows logits_to_keep

def test_flops_where_a_model_computes_all_logits():
    class Old(type(toy())):
        def forward(self, input_ids=None): raise NotImplementedError
    model = toy(); model.__class__ = Old
    assert inference.request_flops(model, 10, 1) == (10*inference.token_flops(model),)*2

def test_bytes_of_a_step():
    mamba, attention = toy(), llama(300)
    assert inference.step_bytes(mamba, 3, 8) == inputs.weight_bytes(mamba) + 3*2*inference.state_bytes(mamba, 8)
    cache = inference.state_bytes(attention, 16)
    assert inference.step_bytes(attention, 2, 16) == inputs.weight_bytes(attention) - 300*32*4 + 2*(cache + cache//16)

def test_times_count_every_token_and_the_answers_are_greedy():
    model = toy(); ids = torch.randint(1, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    times = inference.token_times(model, ids, 5)
    assert len(times) == 5 and (np.diff(times) > 0).all()
    clock = inference.TokenClock("cpu")
    done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, stopping_criteria=[clock])
    assert done.shape == (2, 11) and len(clock.times) == 5

def test_an_end_of_text_token_does_not_shorten_a_measurement():
    model = toy()
    model.generation_config.eos_token_id = int(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits[0, -1].argmax())      # the first token it would write
    assert len(inference.token_times(model, torch.ones(1, 4, dtype=torch.long), 6)) == 6

@pytest.mark.parametrize("ttft,tpot,kept", [(1000, 1000, 1.), (50, 1000, .5), (1000, 5, 0.), (100, 10, 1.)])
def test_goodput_counts_requests_that_keep_both_limits(ttft, tpot, kept):
    times = np.array([[.04, .05, .06], [.1, .11, .12]])
    found = inference.latencies(times, 4, InferenceSettings(max_ttft_ms=ttft, max_tpot_ms=tpot + 1e-6))
    assert math.isclose(found["within_limits"], kept) and math.isclose(found["goodput"], 4*2*kept/.18) and math.isclose(found["requests_per_s"], 8/.18)
    assert math.isclose(found["tpot_ms"], 10) and math.isclose(found["ttft_ms"], 70) and found["ttft_p95_ms"] <= 100

def test_a_pause_shows_in_the_gaps_and_not_in_the_median():
    times = np.tile(np.arange(1, 33)*.01, (5, 1)); times[:, 20:] += .3
    found = inference.latencies(times, 1, InferenceSettings())
    assert found["tpot_ms"] < 20 and np.quantile(np.diff(times[0]), 1) > .3 and found["itl_p95_ms"] <= 310

@pytest.mark.parametrize("named,source", [({"peak_tflops": 312, "peak_gb_per_s": 2039}, "settings: peak_tflops, peak_gb_per_s"), ({"peak_tflops": 312}, "; peak_tflops from settings"), ({"peak_gb_per_s": 2039}, "; peak_gb_per_s from settings"), ({}, "measured: matrix product 64x64, copy of 1 MiB")])
def test_the_peak_says_where_it_comes_from(named, source):
    peak = inference.device_peak(settings=InferenceSettings(**named), size=64, megabytes=1, repeats=1)
    assert source in peak.source and peak.flops > 0 and peak.bandwidth > 0 and "float32" in peak.device
    if "peak_tflops" in named: assert peak.flops == 312e12
    if "peak_gb_per_s" in named: assert peak.bandwidth == 2039e9

def test_rows_recompute_to_their_utilisation():
    model, peak = toy(), inference.Peak(1e12, 1e11, "a device", "settings")
    s = InferenceSettings(batches=[1, 3], new_tokens=4, repeats=2, warmup=0)
    rows = inference.inference_rows({"base": model, "merged": model}, peak, s, prompt_tokens=8)
    assert [(r["model"], r["batch"]) for r in rows] == [("base", 1), ("merged", 1), ("base", 3), ("merged", 3)]
    for r in rows:
        prefill, whole = inference.request_flops(model, 8, 4)
        assert math.isclose(r["mbu"], inference.step_bytes(model, r["batch"], 8)/(r["tpot_ms"]/1e3)/1e11, rel_tol=5e-3)
        assert math.isclose(r["mfu"], whole*r["tokens_per_s"]/4/1e12, rel_tol=5e-3) and math.isclose(r["mfu_prefill"], r["batch"]*prefill/(r["ttft_ms"]/1e3)/1e12, rel_tol=5e-3)
        assert r["peak_mb"] == r["rss_mb"] > 50 and r["added_mb"] >= 0 and math.isnan(r["gpu_mb"]) and r["repeats"] == 2
        assert r["limits"] == "TTFT <= 450 ms, TPOT <= 40 ms" and (r["device"], r["peak_source"]) == ("a device", "settings")
        assert r["goodput"] <= r["requests_per_s"]*1.001

def test_rounds_end_when_their_time_is_over():
    s = InferenceSettings(new_tokens=2, repeats=50, warmup=0, max_seconds=1e-6)
    times, _ = inference.timed_rounds({"base": toy()}, 1, 4, s)
    assert len(times["base"]) == 1

def test_memory_sees_a_tensor_that_lives_during_the_generation():
    model = toy(); plain = model.forward
    def heavy(*args, **kwargs):
        block = torch.frombuffer(mmap.mmap(-1, 48 << 20, mmap.MAP_PRIVATE), dtype=torch.uint8).fill_(1); result = plain(*args, **kwargs)  # new pages, not freed ones
        import time; time.sleep(.01)
        return result if block.sum() else None
    heavy.__signature__ = __import__("inspect").signature(plain)
    model.forward = heavy
    assert inference.peak_memory(model, torch.ones(1, 4, dtype=torch.long), 2)["added_mb"] > 30

def test_the_figure_has_six_panels_with_korean_titles():
    from yunmin_efficientdata.core.figures import korean_style
    import matplotlib.pyplot as plt
    korean_style(); row = {c: 1. for c in ("ttft_ms", "ttft_p95_ms", "tpot_ms", "tpot_p95_ms", "tokens_per_s", "goodput", "mfu", "mbu")}
    fig = inference.plot_inference(pd.DataFrame([{"model": m, "batch": b, **row, "limits": "TTFT <= 450 ms, TPOT <= 40 ms", "device": "CPU"} for m in ("base", "merged") for b in (1, 4)]))
    assert len(fig.axes) == 6 and all(re_korean(ax.get_title()) for ax in fig.axes); plt.close(fig)

def re_korean(text): return any("가" <= c <= "힣" for c in text)

@pytest.mark.gpu
def test_a_gpu_reports_its_own_memory():
    model = toy().to("cuda")
    peak = inference.device_peak("cuda", torch.float32, size=1024, megabytes=64)
    rows = inference.inference_rows({"base": model}, peak, InferenceSettings(new_tokens=4, repeats=2), prompt_tokens=8)
    assert all(r["peak_mb"] == r["gpu_mb"] > 0 for r in rows) and "float32" in rows[0]["device"]
