"Phase 4: agreement with the libraries and a plain loop, edge cases, faults, resume; all on toy models made on the spot."
from __future__ import annotations
import json, math, random, shutil
from pathlib import Path
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from yunmin_efficientdata.core.settings import EvaluationConfig, UserError, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import choices, inference, inputs, overlap, perplexity as ppl, phase, prompts

TEXTS = {"web": ["지난 주말에 가족과 함께 바다에 다녀왔는데 날씨가 맑아서 아이들이 즐겁게 놀았습니다.", "노트북을 고를 때는 먼저 어디에 쓸 것인지 생각해 보는 것이 좋습니다."],
         "social": ["이 영화는 배우들의 연기도 좋고 음악도 좋아서 정말 재미있게 봤어요.", "배송은 빠른데 제품의 색이 사진과 조금 달라서 아쉬웠습니다."]}
ALL = [t for ts in TEXTS.values() for t in ts]

@pytest.fixture(scope="module")
def model_and_tokenizer(): return inputs.toy(ALL, steps=5)

# ---- perplexity

def plain_loop(model, tokenizer, texts, seq_len, stride):
    "The loop of the transformers guide: labels masked with -100, one window at a time."
    total = count = 0
    for text in texts:
        x, previous = tokenizer(text, return_tensors="pt")["input_ids"], 0
        if x.shape[1] < 2: continue
        for begin in range(0, x.shape[1], stride):
            end = min(begin + seq_len, x.shape[1])
            part = x[:, begin:end]; labels = part.clone(); labels[:, :max(previous - begin, 0)] = -100
            scored = int((labels[:, 1:] != -100).sum())
            with torch.no_grad(): total += model(part, labels=labels).loss.item()*scored
            count += scored; previous = end
            if end == x.shape[1]: break
    return math.exp(total/count), count

def llama(vocab):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
@pytest.mark.parametrize("seq_len,stride", [(16, 8), (32, 31), (64, 1), (512, 256)])
def test_perplexity_equals_a_plain_loop(model_and_tokenizer, kind, seq_len, stride):
    model, tokenizer = model_and_tokenizer
    if kind == "llama": model = llama(len(tokenizer))
    texts = ALL + ["긴 글 " * 20, "a"] if stride > 1 else ALL[:2]
    ours, (theirs, count) = ppl.perplexity(model, tokenizer, texts, seq_len, stride), plain_loop(model, tokenizer, texts, seq_len, stride)
    assert ours.tokens == count and abs(ours.perplexity/theirs - 1) < 1e-4
    scored = sum(len(t.encode()) for t in texts if len(tokenizer(t)["input_ids"]) > 1)
    assert math.isclose(ours.bits_per_byte, math.log(ours.perplexity)*count/math.log(2)/scored, rel_tol=1e-9)

def test_every_token_is_scored_once():
    rng = random.Random(0)
    for _ in range(300):
        length, seq_len, stride = rng.randint(0, 400), rng.randint(2, 130), rng.randint(1, 200)
        found = ppl.windows(length, seq_len, stride)
        assert [t for _, e, f in found for t in range(f, e)] == list(range(1, length))
        assert all(b < f and e - b <= seq_len for b, e, f in found)

@pytest.mark.parametrize("seq_len,stride", [(1, 1), (8, 0)])
def test_a_window_that_cannot_score_is_refused(seq_len, stride):
    with pytest.raises(UserError, match="evaluation.seq_len"): ppl.windows(10, seq_len, stride)

def test_padding_and_batches_change_nothing(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = [tokenizer(t)["input_ids"] for t in ALL] + [[], [1], [1, 2]]
    one, many = ppl.token_nll(model, ids, batch_tokens=1), ppl.token_nll(model, ids, batch_tokens=1 << 16)
    assert [len(n) for n in many] == [max(0, len(i) - 1) for i in ids]
    for a, b in zip(one, many): np.testing.assert_allclose(a, b, atol=1e-4)

def test_nothing_to_score_is_nan_not_a_crash(model_and_tokenizer):
    for texts in ([], [""], ["", ""]):
        found = ppl.perplexity(*model_and_tokenizer, texts, 16, 8)
        assert math.isnan(found.perplexity) and found.tokens == 0
    assert math.isnan(ppl.perplexity_row("m", "d", ppl.document_scores(*model_and_tokenizer, [""], 16, 8))["low"])

def test_intervals_cover_and_narrow():
    rng = np.random.default_rng(0)
    def scores(d): return ppl.DocumentScores(rng.normal(300, 40, d), np.full(d, 100), np.full(d, 400))
    few, many = ppl.intervals(scores(10))["perplexity"], ppl.intervals(scores(1000))["perplexity"]
    assert few[1] - few[0] > many[1] - many[0] and many[0] < math.exp(3) < many[1]

# ---- overlap

def test_generation_in_a_batch_equals_one_by_one(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = [tokenizer(t)["input_ids"][:n] for t, n in zip(ALL, (3, 9, 5, 14))]
    assert overlap.generate(model, tokenizer, ids, 10) == [overlap.generate(model, tokenizer, [i], 10)[0] for i in ids]

def test_scores_equal_the_libraries_on_english():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    written, references = ["the cat sat on the mat", "a dog runs fast"], ["the cat is on the mat", "the dog runs very fast"]
    bleu, chrf = overlap.bleu_chrf(written, references, draws=10)
    assert math.isclose(bleu.value, sacrebleu.corpus_bleu(written, [references], tokenize="char").score, rel_tol=1e-5)
    assert math.isclose(chrf.value, sacrebleu.corpus_chrf(written, [references]).score, rel_tol=1e-5)
    assert "tok:char" in bleu.signature and "version:" in bleu.signature
    class Words:
        def tokenize(self, text): return text.split()
    overlap.TOKENIZERS["words"] = Words
    try: ours = overlap.rouge(written, references, "words", draws=10)
    finally: del overlap.TOKENIZERS["words"]
    for score, name in zip(ours, ("rouge1", "rouge2", "rougeL")):
        assert math.isclose(score.value, np.mean([RougeScorer([name]).score(r, w)[name].fmeasure for w, r in zip(written, references)]), rel_tol=1e-5)

@pytest.mark.parametrize("tok", ["char", "morph"])
def test_rouge_reads_korean(tok):
    assert [s.value for s in overlap.rouge(["나는 밥을 먹었다"], ["나는 밥을 먹었다"], tok, draws=10)] == [1, 1, 1]
    assert overlap.rouge(["나는 밥을 먹었다"], ["비가"], tok, draws=10)[0].value == 0

def test_empty_continuations_score_zero():
    assert all(s.value == 0 for s in overlap.overlap(["", ""], ["가나다", "라마바"], draws=10))
    assert overlap.overlap([], []) == []

def test_chrf_survives_samples_without_a_common_character():
    scores = overlap.bleu_chrf(["가나다라마바", "xyzxyz"], ["가나다라마사", "한국어글"], draws=50)
    assert all(s.low <= s.value <= s.high for s in scores) and scores[1].low == 0

# ---- multiple choice

def test_log_likelihood_is_the_sum_of_the_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    context, rest = "이 영화는", " 배우들의 연기도 좋고"
    a, whole = tokenizer(context)["input_ids"], tokenizer(context + rest)["input_ids"]
    with torch.no_grad(): logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logs[i - 1, whole[i]].item() for i in range(len(a), len(whole)))
    assert math.isclose(choices.log_likelihoods(model, tokenizer, [(context, rest)])[0], expected, rel_tol=1e-4)
    assert choices.log_likelihoods(model, tokenizer, [(context*50, rest)], max_length=16)[0] < 0

def test_the_shuffle_is_the_same_for_every_model_and_depends_on_the_seed():
    q = {"choices": list("가나다라마바사")}
    assert list(choices.shuffled(q, 3, 0)) == list(choices.shuffled(q, 3, 0)) != list(choices.shuffled(q, 3, 1))

def test_shuffling_removes_a_bias_of_position():
    questions = [{"choices": ["a", "b", "c", "d"], "answer": 3} for _ in range(400)]
    right = np.mean([choices.shuffled(q, i, 0)[-1] == q["answer"] for i, q in enumerate(questions)])
    assert .18 < right < .32

@pytest.mark.parametrize("line", ['{"question": "q", "choices": ["a"], "answer": 0}', '{"question": "q", "choices": ["a", "b"], "answer": 2}', '{"question": "q", "choices": ["a", ""], "answer": 0}',
                                  '{"question": "q", "choices": ["a", "b"], "answer": true}', '{"question": "", "choices": ["a", "b"], "answer": 0}', '[1]', '{"question"'])
def test_a_bad_question_is_one_line_with_file_and_line(tmp_path, line):
    (tmp_path/"q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"q\.jsonl (line|item) 2") as e: choices.read_questions(open_store(str(tmp_path)), "q.jsonl", 10)
    assert "\n" not in str(e.value)

def test_accuracy_of_a_guesser_is_near_chance():
    table = pd.DataFrame({"choices": 4, "correct": np.random.default_rng(0).random(400) < .25, "subject": "s"})
    found = choices.accuracy(table)
    assert found["low"] < found["chance"] < found["high"] and found["n"] == 400

# ---- the project's own prompts, rubric and questions

def test_the_shipped_prompts_are_enough_and_correct():
    rows = [json.loads(l) for l in (project_root()/"configs/eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 30 and len({r["id"] for r in rows}) == len(rows) == len({r["prompt"] for r in rows})
    count = pd.Series([r["domain"] for r in rows]).value_counts()
    assert set(count.index) == {"main_data", "textbook", "assembly", "web", "social"} and count.min() >= 6
    assert all(r["prompt"].strip() and len(r["reference"]) >= 10 for r in rows)

def test_the_shipped_rubric_has_five_anchors_each():
    rubric = prompts.read_rubric(open_store(str(project_root()/"configs")), "scoring_rules.yaml")
    assert list(rubric["criteria"]) == ["information", "logic", "brevity", "tone"]
    assert all(len(set(c["anchors"].values())) == 5 for c in rubric["criteria"].values())

def test_a_rubric_without_an_anchor_is_refused(tmp_path):
    text = (project_root()/"configs/scoring_rules.yaml").read_text(encoding="utf-8")
    (tmp_path/"r.yaml").write_text(text.replace("      3: 내용은 전달되지만", "      7: 내용은 전달되지만"), encoding="utf-8")
    with pytest.raises(UserError, match="criteria.brevity"): prompts.read_rubric(open_store(str(tmp_path)), "r.yaml")

def test_the_shipped_questions_do_not_favour_a_place():
    rows = choices.read_questions(open_store(str(project_root()/"configs")), "eval_choices.jsonl", 100)
    assert len(rows) == 20 and pd.Series([r["answer"] for r in rows]).value_counts().max() <= 8

# ---- prompts

def test_an_answer_cannot_break_the_table():
    assert prompts.one_line("a|b\n# c <script>[x](y)") == r"a\|b \# c \<script\>\[x\](y)"
    rows = prompts.assemble([{"id": "1", "domain": "web", "prompt": "p|", "reference": "r\n"}], {m: {"1": {"answer": "x | y\n\nz", "log_likelihood": v}} for m, v in (("base", -2.), ("merged", -1.))})
    table = [l for l in prompts.prompt_block(1, rows[0]) if l.startswith("| base") or l.startswith("| merged")]
    assert len(table) == 2 and all(l.replace(r"\|", "").count("|") == 5 for l in table)

@pytest.mark.parametrize("n,needed", [(10, 6), (5, 3), (1, 1), (40, 24), (0, 0)])
def test_the_rule_is_a_share(n, needed):
    assert prompts.improved_rule([{"improved": True}]*n, {"improved": {"at_least": 6, "of": 10}})["needed"] == needed

def test_sentences_are_halved_without_loss():
    docs = [inputs.TestDocument(str(i), t) for i, t in enumerate(ALL)]
    for item in prompts.sentence_items("web", docs):
        assert any(item["prompt"] + item["reference"] in t for t in ALL) and item["reference"].startswith(" ")
    assert prompts.sentence_items("web", [inputs.TestDocument("c", "title: _isctype, iswctype, _isctype_l, _iswctype_l")]) == []

# ---- inference

def test_bytes_and_flops_of_an_untied_attention_model():
    model = llama(300)
    total = sum(p.numel() for p in model.parameters())
    assert inference.token_flops(model) == 2*(total - 300*32)
    assert inference.state_bytes(model, 32) == 2*inference.state_bytes(model, 16) > 0    # a key-value cache grows

# ---- the phase on a workspace

SETTINGS = ["evaluation.seq_len=32", "evaluation.stride=16", "evaluation.max_new_tokens=6", "evaluation.max_prompts=3", "evaluation.continuation_documents=2", "evaluation.general_domains=[web]"]
DATA = ["metric_summary.csv", "perplexity.csv", "overlap.csv", "choices.csv", "eval_prompts.jsonl", "eval_prompt_comparison.md", "gains.json", "perf_summary.md"]

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
