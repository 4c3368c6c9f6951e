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

# ---- what a stage depends on

def stages(root, *more):
    "Which stages of a run did work, by the ledger's start times."
    def starts(): return {p.stem.split(".", 1)[1]: json.loads(p.read_text())["started"] + str(p.stat().st_mtime_ns) for p in (root/"ledger").glob("evaluation.*.json")}
    before = starts(); phase.run(str(root), overrides=SETTINGS + list(more), workers=1); after = starts()
    return {n for n in after if before.get(n) != after[n]}

@pytest.fixture
def own(ran, tmp_path):
    "A finished workspace of the test's own (times of files kept, so that nothing runs again)."
    copy = tmp_path/"ws"; shutil.copytree(ran[0], copy, copy_function=shutil.copy2); return copy

def test_new_limits_of_goodput_ask_for_no_perplexity(own):
    assert stages(own) == set()
    assert stages(own, "evaluation.inference.max_tpot_ms=1.0e-3") == {"inference", "summary"}
    table = pd.read_csv(own/"results/inference.csv")
    assert (table.goodput == 0).all() and (table.within_limits == 0).all() and (table.requests_per_s > 0).all() and set(table["limits"]) == {"TTFT <= 450 ms, TPOT <= 0.001 ms"}

def test_inference_has_the_agreed_columns(ran):
    table = pd.read_csv(ran[0]/"results/inference.csv")
    assert {"model", "batch", "ttft_ms", "ttft_p95_ms", "tpot_ms", "tpot_p95_ms", "tokens_per_s", "goodput", "mfu", "mbu", "peak_mb", "limits", "device", "peak_source"} <= set(table)
    assert table[["model", "batch"]].values.tolist() == [["base", 1], ["base", 4], ["merged", 1], ["merged", 4]]

def test_contamination_stands_beside_every_score(ran):
    table = pd.read_csv(ran[0]/"results/contamination.csv")
    assert set(table["set"]) == {"eval_choices", "eval_prompts"} and set(table.metric) == {"accuracy", "log_likelihood"} and not table.checked.any() and table.score_clean.isna().all()
    rows = [json.loads(l) for l in (ran[0]/"results/eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    mean = sum(r["log_likelihood"]["merged"] for r in rows)/len(rows)
    assert table[(table["set"] == "eval_prompts") & (table.model == "merged")].score_all.iloc[0] == pytest.approx(mean, rel=1e-5)

# ---- points of people and of a judge

def click(store, rater, worth):
    from yunmin_efficientdata.evaluation.rating import CRITERIA, RatingPanel
    panel = RatingPanel(store, rater)
    for _ in panel.items:
        for n, answer in enumerate(panel.items[panel.at]["answers"]):
            for c in CRITERIA: panel.buttons[n][c].value = worth(answer["models"])
        panel.open.click()

def test_points_of_people_reach_page_tables_and_figure(own):
    click(str(own), "지민", lambda models: 4 if "merged" in models else 2); click(str(own), "하나", lambda models: 5 if "merged" in models else 2)
    assert stages(own) == {"summary"}
    page = (own/"results/eval_prompt_comparison.md").read_text(encoding="utf-8")
    assert "사람의 점수**: 점수가 있는 프롬프트 3개 가운데" in page and "채점자 2명의 일치도" in page and "사람 대 자동 지표 (base와의 차이" in page and "nan" not in page
    summary = pd.read_csv(own/"results/rating_summary.csv")
    assert set(summary.scorer) == {"people"} and summary[(summary.model == "merged") & (summary.criterion == "overall")]["mean"].iloc[0] == 4.5
    assert len(pd.read_csv(own/"results/rating_agreement.csv")) == 5 and (own/"reports/figures/evaluation_ratings.png").exists()
    assert stages(own) == set()

def test_a_judge_is_asked_once_and_a_failed_question_again(own, monkeypatch):
    pytest.importorskip("httpx")
    from test_judge import Server, good, reply
    import threading
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("YUNMIN_JUDGE_KEY", "sk-secret-of-the-test")
    server = Server(); threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    server.script = lambda body, n: reply("아니요") if n <= 2 else good(body, n)
    asks = [f"evaluation.judge.endpoint={server.url}", "evaluation.judge.model=m", "evaluation.judge.attempts=2", "evaluation.judge.wait_seconds=0", "evaluation.judge.parallel=1", "evaluation.judge.rivals=[merged,mixed]", "evaluation.judge.price_input=1"]
    try:
        stages(own, *asks)
        first = pd.read_csv(own/"results/judge.csv"); sent = len(server.seen)
        assert len(first) == 3 and first.failed.notna().sum() == 1 and sent == 2 + 5 and not (own/"ledger/evaluation.judge.json").exists()
        assert "judge" in stages(own, *asks) and len(server.seen) == sent + 1
        table, record = pd.read_csv(own/"results/judge.csv"), json.loads((own/"results/judge.json").read_bytes())
        assert table.failed.isna().all() and record["failed"] == 0 and record["rivals"]["merged"]["pairs"] == 3 and record["cost"] == pytest.approx(6*100/1e6)
        assert stages(own, *asks) == set() and len(server.seen) == sent + 1
        assert stages(own, *asks, "evaluation.judge.timeout_seconds=9") == set()             # how it is asked changes nothing
    finally: server.shutdown(); server.server_close()
    page = (own/"results/eval_prompt_comparison.md").read_text(encoding="utf-8")
    assert "심사 모델의 점수**: 점수가 있는 프롬프트 3개 가운데" in page and set(pd.read_csv(own/"results/rating_summary.csv").scorer) == {"judge"}
    everything = b"".join(p.read_bytes() for p in own.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".csv", ".md", ".log"))
    assert b"sk-secret-of-the-test" not in everything and b"evaluation.judge" not in (own/"pipeline_errors.log").read_bytes() if (own/"pipeline_errors.log").exists() else True
    stages(own)                                                                              # without the address: nothing is asked, what was said stays
    assert set(pd.read_csv(own/"results/rating_summary.csv").scorer) == {"judge"}

def test_a_judge_that_cannot_work_is_refused_before_the_first_stage(made):
    with pytest.raises(UserError, match="evaluation.judge.model"): phase.run(str(made), overrides=SETTINGS + ["evaluation.judge.endpoint=http://127.0.0.1:9/v1"], workers=1)

def test_pairs_of_input_and_reference_are_compared_where_the_config_names_them(own, tmp_path):
    (tmp_path/"pairs.jsonl").write_text("".join(json.dumps({"input": f"문장 {i}", "reference": "바다에 갔다."}, ensure_ascii=False) + "\n" for i in range(4)), encoding="utf-8")
    did = stages(own, f"evaluation.reference_pairs=[{tmp_path}/pairs.jsonl]")
    assert did == {"pairs", "contamination"}
    table = pd.read_csv(own/"results/pairs.csv")
    assert set(table.model) == {"base", "web", "merged"} and {"bleu_char", "chrf"} <= set(table.metric) and (table.n == 4).all()
    assert "written" not in pd.read_csv(own/"results/pairs_items.csv") and "pairs" in set(pd.read_csv(own/"results/contamination.csv")["set"])

def test_no_sentence_of_the_corpus_stands_on_the_page_when_quotes_are_off(own):
    assert any(t[:12] in (own/"results/eval_prompt_comparison.md").read_text(encoding="utf-8") for t in ALL)
    assert stages(own, "report.quotes=false") == {"summary"}
    assert not any(t[:12] in (own/"results/eval_prompt_comparison.md").read_text(encoding="utf-8") for t in ALL)

def test_two_prompts_of_one_id_stop_the_phase(own, tmp_path):
    (tmp_path/"p.jsonl").write_text('{"id": "a", "domain": "web", "prompt": "p", "reference": "r"}\n'*2, encoding="utf-8")
    with pytest.raises(UserError, match="p.jsonl line 2"): phase.run(str(own), overrides=SETTINGS + [f"evaluation.prompts={tmp_path}/p.jsonl"], workers=1)

def test_a_file_of_questions_goes_through_lm_eval_and_its_edit_is_noticed(own, tmp_path):
    pytest.importorskip("lm_eval")
    def questions(answer): (tmp_path/"q.jsonl").write_text("".join(json.dumps({"question": f"{i}번은?", "choices": ["바다", "산"], "answer": answer}, ensure_ascii=False) + "\n" for i in range(4)), encoding="utf-8")
    questions(0); asks = f"evaluation.harness.tasks=[{tmp_path}/q.jsonl]"
    assert stages(own, asks) == {"harness"}
    table = pd.read_csv(own/"results/harness.csv")
    assert set(table.model) == {"base", "web", "merged"} and {"acc", "acc_norm"} <= set(table.metric) and (table.n == 4).all() and (own/"reports/figures/evaluation_harness.png").exists()
    assert stages(own, asks) == set()
    questions(1); assert stages(own, asks) == {"harness"}
    with pytest.raises(UserError, match="evaluation.harness.tasks.*nowhere.jsonl"): phase.run(str(own), overrides=SETTINGS + ["evaluation.harness.tasks=[nowhere.jsonl]"], workers=1)

