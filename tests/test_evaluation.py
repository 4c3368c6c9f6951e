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


# ---- whole ways: planted items, the data curve, a judge that is a real model

QUIZ = [(f"{place} 사는 사람들은 해마다 {season} 되면 무엇을 하러 마을 앞 들판으로 나가는가?", ["꽃을 보러", "눈을 치우러"], i % 2)
        for i, (place, season) in enumerate((p, s) for p in ("바닷가에", "산골에", "강가에", "섬에") for s in ("봄이", "가을이"))]

def test_items_planted_in_the_crawl_are_found_and_said_beside_every_score(own, tmp_path):
    "Phase 1 on a crawl with evaluation items in it, then phases 4 and 5: the clean score is the mean of the other items, and the report opens with it."
    from yunmin_efficientdata.dedup.phase import run as dedup
    from yunmin_efficientdata.report.phase import run as report
    quiz, raw = tmp_path/"quiz.jsonl", tmp_path/"raw"; raw.mkdir()
    quiz.write_text("".join(json.dumps({"question": q, "choices": c, "answer": a, "subject": "마을"}, ensure_ascii=False) + "\n" for q, c, a in QUIZ), encoding="utf-8")
    asks = [f"evaluation.multiple_choice=[{quiz}]"]
    stages(own, *asks)
    items = pd.read_csv(own/"results/choices_items.csv"); right = set(items[(items.model == "base") & (items.correct == 1)]["index"])
    assert 0 < len(right) < len(QUIZ)
    prompts = [json.loads(l) for l in (Path(__file__).parents[1]/"configs/eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    planted = [f"어제 모임에서 들은 이야기를 적어 둔다. {QUIZ[i][0]} {' '.join(QUIZ[i][1])} 여기까지가 그 이야기이고 나머지는 다음에 적기로 한다." for i in sorted(right)] + [f"읽은 글을 옮겨 적는다. {prompts[0]['prompt']}{prompts[0]['reference']} 다 읽고 나니 저녁이 되어 불을 켜고 창문을 닫았다."]
    others = [f"{n}번째 날에는 {w} 이야기를 오래 나누었고 집에 돌아와서 {w} 그림을 그린 다음 일찍 잠자리에 들었다." for n in range(40) for w in ("고래", "기차")]
    (raw/"web.jsonl").write_text("".join(json.dumps({"text": t, "source": "모임"}, ensure_ascii=False) + "\n" for t in planted + others), encoding="utf-8")
    dedup(str(own), raw=str(raw), overrides=[f"dedup.contamination.sets=[{quiz},configs/eval_prompts.jsonl]"], workers=1)
    assert {"contamination", "summary"} >= stages(own, *asks) >= {"contamination"}
    table = pd.read_csv(own/"results/contamination.csv").set_index(["set", "model"])
    assert table.checked.all() and (table.contaminated["quiz"] == len(right)).all() and (table.contaminated["eval_prompts"] == 1).all()
    assert table.score_clean["quiz", "base"] == 0 < table.score_all["quiz", "base"] == pytest.approx(len(right)/len(QUIZ))
    for model in set(items.model):
        part = items[(items.model == model) & ~items["index"].isin(right)]
        assert table.score_clean["quiz", model] == pytest.approx(part.correct.mean(), rel=1e-5)
    assert (table.score_clean["eval_prompts"] != table.score_all["eval_prompts"]).all()
    report(str(own), overrides=["report.site=false"])
    text = (own/"reports/report.md").read_text(encoding="utf-8")
    assert f"학습 본문에 나타난 평가 문항은 {len(right) + 1}개" in text and f"| quiz | base | accuracy | {len(QUIZ)} | {len(right)} | {len(right)/len(QUIZ):.4g} | 0 |" in text
    assert "학습 본문에 문항이 섞인 평가:" in text.split("\n## ")[1] and "`quiz`" in text.split("\n## ")[1]

def test_the_data_curve_runs_where_the_config_asks_for_it(own):
    "Small models on shares of the training tokens, the table, the figure, the sentence in the report; off again, nothing is trained."
    from transformers import AutoTokenizer
    from yunmin_efficientdata.report.phase import run as report
    tokenizer = AutoTokenizer.from_pretrained(own/"tokenizer")
    for d, texts in TEXTS.items():
        ids = [tokenizer(texts[i % 2])["input_ids"] + [tokenizer.eos_token_id] for i in range(150)]
        pq.write_table(pa.table({"tokens": pa.array(ids, pa.list_(pa.int32()))}), own/f"parquet_ready/{d}.parquet")
    asks = ["evaluation.data_curve.on=true", "evaluation.data_curve.seq_len=16", "evaluation.data_curve.batch_size=4", "evaluation.data_curve.hidden_size=32", "evaluation.data_curve.layers=1", "evaluation.data_curve.max_tokens=4096", "evaluation.data_curve.seeds=1"]
    assert stages(own, *asks) == {"data_curve"} and stages(own, *asks) == set() and stages(own) == set()
    table = pd.read_csv(own/"results/data_curve.csv"); mean = table[table.domain == "mean"]
    assert {"run", "measured", "predicted", "cautious"} <= set(mean.kind) and set(table.domain) == {"mean", *TEXTS}
    assert (own/"reports/figures/evaluation_data_curve.png").exists() and (own/"reports/figures/en/evaluation_data_curve.png").exists()
    report(str(own), overrides=["report.site=false"])
    text = (own/"reports/report.md").read_text(encoding="utf-8")
    change = mean[mean.kind == "predicted"].change.iloc[0]
    assert "### 데이터 양" in text and f"데이터가 2배가 되면(거듭제곱 법칙) PPL이 {abs(change):.1f} %" in text and "figures/evaluation_data_curve.png" in text

def test_a_judge_that_is_a_real_model_and_writes_anything(own, monkeypatch):
    "A toy model behind an OpenAI-compatible address: what it writes is no judgement; some replies hold its words inside good JSON. Counted, never fatal."
    pytest.importorskip("httpx")
    from test_judge import Server, points, reply
    import threading
    from yunmin_efficientdata.report.phase import run as report
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name, raising=False)
    model, tokenizer = inputs.toy(ALL, steps=15)
    def write(body, n):
        torch.manual_seed(n)
        ids = tokenizer(body["messages"][-1]["content"][-120:], return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=True, temperature=1.5, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1]:])
    written = []
    def wild(body, n): written.append(write(body, n)); return reply(written[-1])
    def framed(body, n): return reply(json.dumps({"reason": write(body, n), "a": points(2), "b": points(4), "better": "b"}, ensure_ascii=False))
    server = Server(); threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    asks = [f"evaluation.judge.endpoint={server.url}", "evaluation.judge.model=toy", "evaluation.judge.attempts=2", "evaluation.judge.wait_seconds=0", "evaluation.judge.parallel=1", "evaluation.judge.rivals=[merged]", "evaluation.judge.timeout_seconds=60"]
    try:
        server.script = wild; stages(own, *asks)
        table, record = pd.read_csv(own/"results/judge.csv"), json.loads((own/"results/judge.json").read_bytes())
        assert len(written) == 12 and any(written) and len(table) == 3 and table.failed.notna().all() and (record["failed"], record["questions"], record["rivals"]) == (6, 6, {})
        report(str(own), overrides=["report.site=false"])
        assert "실패한 것은 3쌍" in (own/"reports/report.md").read_text(encoding="utf-8")
        server.script = lambda body, n: (framed if n % 3 else wild)(body, n); stages(own, *asks)
    finally: server.shutdown(); server.server_close()
    record = json.loads((own/"results/judge.json").read_bytes())
    assert record["failed"] == 0 and record["rivals"]["merged"]["pairs"] == 3 and record["first_position"] == 0, "it always preferred the second: all ties"
    assert record["rivals"]["merged"]["tie"] == 3 and (own/"reports/figures/evaluation_judge.png").exists()
    report(str(own), overrides=["report.site=false"])
    assert "실패한 것은 0쌍" in (own/"reports/report.md").read_text(encoding="utf-8")
