"Phase 4 on a workspace: the agreed tables, faults, resume, fingerprints of the stages; on toy models made on the spot."
from __future__ import annotations
import json, shutil
from pathlib import Path
import pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from yunmin_efficientdata.core.settings import EvaluationConfig, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import inputs, phase

TEXTS = {"web": ["지난 주말에 가족과 함께 바다에 다녀왔는데 날씨가 맑아서 아이들이 즐겁게 놀았습니다.", "노트북을 고를 때는 먼저 어디에 쓸 것인지 생각해 보는 것이 좋습니다."],
         "social": ["이 영화는 배우들의 연기도 좋고 음악도 좋아서 정말 재미있게 봤어요.", "배송은 빠른데 제품의 색이 사진과 조금 달라서 아쉬웠습니다."]}
ALL = [t for ts in TEXTS.values() for t in ts]

SETTINGS = ["evaluation.seq_len=32", "evaluation.stride=16", "evaluation.max_new_tokens=6", "evaluation.max_prompts=3", "evaluation.continuation_documents=2", "evaluation.general_domains=[web]", "evaluation.inference.repeats=1", "evaluation.inference.new_tokens=3"]
DATA = ["metric_summary.csv", "perplexity.csv", "overlap.csv", "perplexity_pairs.csv", "choices.csv", "choices_by_subject.csv", "contamination.csv", "eval_prompts.jsonl", "eval_prompt_comparison.md", "gains.json", "perf_summary.md"]

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A workspace with base, merged model and one adapter; uniform, mixed and the adapter of social are missing."
    from peft import LoraConfig, get_peft_model
    import copy
    root = tmp_path_factory.mktemp("ws")
    store, (base, tokenizer), (merged, _) = open_store(str(root)), inputs.toy(ALL, steps=2), inputs.toy(ALL, steps=40)
    tokenizer.save_pretrained(root/"tokenizer")
    base.save_pretrained(root/"models/base"); merged.save_pretrained(root/"merged_model")
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False)).save_pretrained(root/"checkpoints/lora_web")
    for folder in ("models/base", "merged_model", "checkpoints/lora_web"): store.write(f"{folder}/_COMMIT", "{}")
    (root/inputs.TEST).mkdir(parents=True)
    for d, texts in TEXTS.items(): pq.write_table(pa.table({"id": [f"{d}{i}" for i in range(6)], "text": [texts[i % 2] for i in range(6)]}), root/inputs.TEST/f"{d}.parquet")
    return root

@pytest.fixture(scope="module")
def ran(made):
    summary = phase.run(str(made), overrides=SETTINGS, workers=1)
    return made, summary, {n: (made/"results"/n).read_bytes() for n in DATA}

def test_the_phase_writes_the_agreed_tables(ran):
    root, summary, _ = ran
    table = pd.read_csv(root/"results/metric_summary.csv")
    assert list(table.columns) == ["model", "domain", "metric", "value", "low", "high", "n"]
    assert set(table.model) == {"base", "web", "merged"} and set(table.domain) == {"web", "social", "general"}
    assert {"perplexity", "bits_per_byte", "bleu_char", "chrf", "rouge1", "rouge2", "rougeL", "accuracy"} <= set(table.metric)
    assert table.notna().all().all() and not table.duplicated(["model", "domain", "metric"]).any()
    assert summary["missing"] == ["social", "uniform", "mixed"]
    for name in ("perf_summary.md", "eval_prompt_comparison.md"): assert "uniform" in (root/"results"/name).read_text(encoding="utf-8")
    assert "아직 채점되지 않았습니다" in (root/"results/eval_prompt_comparison.md").read_text(encoding="utf-8")
    assert "missing" not in pd.read_csv(root/"results/inference.csv").columns and len(pd.read_csv(root/"results/inference.csv")) == 4
    assert {p.name for p in (root/"reports/figures").iterdir()} >= {"evaluation_perplexity.png", "evaluation_gains.png"}

def test_general_is_the_text_of_the_named_domains(ran):
    table = pd.read_csv(ran[0]/"results/perplexity.csv").set_index(["model", "domain"])
    assert table.loc[("base", "general"), "perplexity"] == table.loc[("base", "web"), "perplexity"]

def test_gains_have_sentences_with_answers(ran):
    gains = json.loads((ran[0]/"results/gains.json").read_bytes())
    assert gains["prompts"] == 3 and len(gains["gains"]) >= 3
    assert all({"prompt", "reference", "base", "merged", "gain"} <= set(g) and g["gain"] > 0 for g in gains["gains"])
    assert [g["gain"] for g in gains["gains"]] == sorted([g["gain"] for g in gains["gains"]], reverse=True)

def test_a_second_run_skips_everything(ran):
    before = {p: p.stat().st_mtime_ns for p in (ran[0]/"results").iterdir()}
    assert phase.run(str(ran[0]), overrides=SETTINGS, workers=1) == ran[1]
    assert before == {p: p.stat().st_mtime_ns for p in (ran[0]/"results").iterdir()}

def test_killed_in_the_middle_it_ends_with_the_same_bytes(ran, tmp_path, monkeypatch):
    root, _, expected = ran
    copy = tmp_path/"ws"; shutil.copytree(root, copy)
    for name in ("results", "ledger", "reports"): shutil.rmtree(copy/name)
    def once(name, at):
        real, calls = getattr(phase, name), []
        def stop(*args):
            calls.append(args)
            if len(calls) == at: raise KeyboardInterrupt
            return real(*args)
        return real, calls, stop
    for name in ("perplexity_rows", "overlap_rows", "answer_rows"):
        real, calls, stop = once(name, 2)
        monkeypatch.setattr(phase, name, stop)
        with pytest.raises(KeyboardInterrupt): phase.run(str(copy), overrides=SETTINGS, workers=1)
        monkeypatch.setattr(phase, name, real)
    asked = []
    real = phase.answer_rows
    monkeypatch.setattr(phase, "answer_rows", lambda run, name, *a: asked.append(name) or real(run, name, *a))
    phase.run(str(copy), overrides=SETTINGS, workers=1)
    assert asked == ["web", "merged"]                  # base was done before the kill
    assert {n: (copy/"results"/n).read_bytes() for n in DATA} == expected

@pytest.mark.parametrize("gone,named", [("models/base/_COMMIT", "yunmin dem"), ("merged_model/_COMMIT", "yunmin dem"), ("tokenizer", "yunmin format"), ("parquet_ready", "yunmin format")])
def test_what_is_missing_is_one_line_that_names_the_command(made, tmp_path, gone, named):
    copy = tmp_path/"ws"; shutil.copytree(made, copy)
    shutil.rmtree(copy/gone) if (copy/gone).is_dir() else (copy/gone).unlink()
    with pytest.raises(UserError, match=named) as e: phase.run(str(copy), overrides=SETTINGS, workers=1)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("setting", ["evaluation.prompts=nowhere.jsonl", "evaluation.general=nowhere.jsonl", "evaluation.multiple_choice=[nowhere.jsonl]", "evaluation.scoring_rules=nowhere.yaml"])
def test_a_file_that_the_config_names_and_is_not_there(made, setting):
    with pytest.raises(UserError, match=setting.split("=")[0] + ".*nowhere"): phase.run(str(made), overrides=SETTINGS + [setting], workers=1)

def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    from safetensors.torch import save_file
    copy = tmp_path/"lora_x"; shutil.copytree(made/"checkpoints/lora_web", copy)
    save_file({"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 4), "base_model.model.nowhere.lora_B.weight": torch.zeros(4, 2)}, copy/"adapter_model.safetensors")
    with pytest.raises(UserError, match="lora_x.*yunmin dem"): inputs.load_adapted(made/"models/base", copy)

def test_samples_of_documents_respect_the_limits(made):
    store = open_store(str(made)); files = inputs.test_domains(store)
    docs = inputs.sample_documents(store, files["web"], EvaluationConfig(max_documents=4, max_document_chars=10))
    assert len(docs) == 4 and all(len(d.text) == 10 for d in docs) and [d.id for d in docs] == sorted(d.id for d in docs)
    assert len(inputs.sample_documents(store, files["web"], EvaluationConfig(max_chars=1))) == 1
