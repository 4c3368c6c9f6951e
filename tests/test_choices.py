"Multiple choice: likelihoods, shapes of files, shuffling, intervals, and agreement with lm-evaluation-harness on the same items; toy models made on the spot."
from __future__ import annotations
import json, math, random, socket
import numpy as np, pandas as pd, pytest, torch, yaml
from yunmin_efficientdata.core.settings import HarnessSettings, UserError, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import choices, harness, inputs

TEXTS = ["봄이 오면 들에 꽃이 핀다.", "여름에는 비가 많이 내리고 날이 덥다.", "가을 하늘은 높고 푸르며 바람이 시원하다.", "겨울이 오면 눈이 내린다."]
WORDS = "봄 여름 가을 겨울 꽃 비 하늘 눈 바람 산 강 바다 높다 푸르다 내린다 온다 시원하다 덥다".split()

@pytest.fixture(scope="module")
def toys():
    "A Mamba2 and a Llama with one tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    mamba, tokenizer = inputs.toy(TEXTS, steps=40)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)).eval()
    return {"mamba2": mamba, "llama": llama}, tokenizer

def questions(n, seed=0):
    "Questions with two to five choices of unlike length."
    rng, out = random.Random(seed), []
    for i in range(n):
        size = rng.randint(2, 5)
        options = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + f" {j}" for j in range(size)]
        out.append({"id": f"q{i}", "question": " ".join(rng.choices(WORDS, k=5)) + "?", "choices": options, "answer": rng.randrange(size), "subject": rng.choice(["가", "나", "다"])})
    return out

def write(path, rows): path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"); return path

# ---- likelihood

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
@pytest.mark.parametrize("context", ["봄이 오면", "봄이 오면  ", ""])
def test_log_likelihood_is_the_sum_of_the_tokens(toys, kind, context):
    model, tokenizer = toys[0][kind], toys[1]
    rest = " 들에 꽃이" if context == context.rstrip() else "들에 꽃이"
    whole = tokenizer(context + rest)["input_ids"]
    start = len(tokenizer(context.rstrip())["input_ids"])
    if not start: start, whole = 1, [tokenizer.eos_token_id, *whole]
    with torch.no_grad(): logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logs[i - 1, whole[i]].item() for i in range(start, len(whole)))
    assert math.isclose(choices.log_likelihoods(model, tokenizer, [(context, rest)])[0], expected, rel_tol=1e-4)

def test_a_long_context_loses_its_beginning(toys):
    model, tokenizer = toys[0]["mamba2"], toys[1]
    long = choices.log_likelihoods(model, tokenizer, [("봄이 오면"*50, " 꽃이")], max_length=16)[0]
    whole = tokenizer("봄이 오면"*50 + " 꽃이")["input_ids"][-16:]
    with torch.no_grad(): logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    n = len(tokenizer("봄이 오면"*50 + " 꽃이")["input_ids"]) - len(tokenizer("봄이 오면"*50)["input_ids"])
    assert math.isclose(long, sum(logs[i - 1, whole[i]].item() for i in range(16 - n, 16)), rel_tol=1e-4)

def test_a_choice_is_not_punished_for_its_length(toys):
    "Two copies of one ending, one of them twice as long: per character the model prefers what it was trained on, whatever the length."
    model, tokenizer = toys[0]["mamba2"], toys[1]
    q = [{"index": 0, "id": "1", "subject": "-", "question": "봄", "choices": ["눈", "꽃이 핀다. 여름에는 비가 많이 내리고 날이 덥다."], "answer": 1}]
    order, ll = np.array([0, 1]), np.array([-9., -30.])
    row = choices.judge_question(q[0], order, ll)
    assert row["correct"] and not row["raw"] and row["predicted"] == 1 and math.isclose(row["margin"], -30/len(q[0]["choices"][1]) + 9, rel_tol=1e-5)
    assert list(choices.answer_questions(model, tokenizer, q).columns) == ["index", "id", "subject", "choices", "answer", "right", "predicted", "correct", "raw", "margin"]

# ---- shuffling

def test_the_shuffle_is_the_same_for_every_model_and_depends_on_the_seed():
    q = {"choices": list("가나다라마바사")}
    assert list(choices.shuffled(q, 3, 0)) == list(choices.shuffled(q, 3, 0)) != list(choices.shuffled(q, 3, 1))

def test_shuffling_removes_a_bias_of_position():
    qs = [{"choices": ["a", "b", "c", "d"], "answer": 3} for _ in range(400)]
    right = np.mean([choices.shuffled(q, i, 0)[-1] == q["answer"] for i, q in enumerate(qs)])
    assert .18 < right < .32

def test_a_prediction_is_put_back_into_the_order_of_the_file():
    "Whatever the order in which the choices are shown, the one with the highest likelihood is named by its place in the file."
    q = {"index": 0, "id": "1", "subject": "-", "question": "?", "choices": ["aa", "bb", "cc", "dd"], "answer": 2}
    value = {"aa": -4., "bb": -3., "cc": -1., "dd": -2.}
    for seed in range(20):
        order = choices.shuffled(q, 0, seed)
        row = choices.judge_question(q, order, np.array([value[q["choices"][j]] for j in order]))
        assert row["predicted"] == 2 and row["correct"] and row["raw"] and row["margin"] == .5

def test_the_order_of_a_question_does_not_depend_on_the_limit(tmp_path):
    write(tmp_path/"q.jsonl", questions(30))
    store = open_store(str(tmp_path))
    all_, some = (choices.read_questions(store, "q.jsonl", n) for n in (30, 7))
    pairs = {q["id"]: p for q, p in zip(all_, np.split(np.array(choices.question_pairs(all_, 5)[0], dtype=object), np.cumsum([len(q["choices"]) for q in all_])[:-1]))}
    for q, p in zip(some, np.split(np.array(choices.question_pairs(some, 5)[0], dtype=object), np.cumsum([len(q["choices"]) for q in some])[:-1])): assert (p == pairs[q["id"]]).all()

# ---- files

@pytest.mark.parametrize("line", ['{"question": "q", "choices": ["a"], "answer": 0}', '{"question": "q", "choices": ["a", "b"], "answer": 2}', '{"question": "q", "choices": ["a", ""], "answer": 0}',
                                  '{"question": "q", "choices": ["a", "b"], "answer": true}', '{"question": "", "choices": ["a", "b"], "answer": 0}', '[1]', '{"question"',
                                  '{"question": "q", "choices": ["a", "b"], "answer": "D"}', '{"question": "q", "A": "a", "B": "b", "answer": 0}', '{"question": "q", "choices": ["a", "b"]}'])
def test_a_bad_question_is_one_line_with_file_and_line(tmp_path, line):
    (tmp_path/"q.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"q\.jsonl (line|item) 2") as e: choices.read_questions(open_store(str(tmp_path)), "q.jsonl", 10)
    assert "\n" not in str(e.value)

def test_the_columns_of_kmmlu_and_letters_are_understood(tmp_path):
    write(tmp_path/"q.jsonl", [{"question": "q", "A": "가", "B": "나", "C": "다", "D": "라", "answer": 4, "Category": "Law"}, {"question": "q", "choices": ["가", "나"], "answer": "b"}])
    rows = choices.read_questions(open_store(str(tmp_path)), "q.jsonl", 10)
    assert [(r["choices"][r["answer"]], r["subject"]) for r in rows] == [("라", "Law"), ("나", "-")]

def test_the_shipped_questions_do_not_favour_a_place():
    rows = choices.read_questions(open_store(str(project_root()/"configs")), "eval_choices.jsonl", 100)
    assert len(rows) == 20 and pd.Series([r["answer"] for r in rows]).value_counts().max() <= 8

def test_the_local_sets_can_be_read_and_answered(corpus, toys):
    store = open_store(str(next(f for f in (corpus/"eval", corpus.parent/"eval") if f.is_dir())))
    for key, size in (("mc_klue_nli.jsonl", 3000), ("mc_kobbq.jsonl", 2280)):
        rows = choices.read_questions(store, key, 12)
        assert len(rows) == 12 and rows[0]["size"] == size and all(len(r["choices"]) == 3 for r in rows)
        assert math.isclose(choices.accuracy(choices.answer_questions(toys[0]["mamba2"], toys[1], rows))["chance"], 1/3, rel_tol=1e-5)

# ---- accuracy

def table(n, p, seed=0):
    right = np.random.default_rng(seed).random(n) < p
    return pd.DataFrame({"index": range(n), "choices": 4, "correct": right, "raw": right, "margin": 0., "subject": "s"})

def test_accuracy_of_a_guesser_is_near_chance():
    found = choices.accuracy(table(400, .25))
    assert found["low"] < found["chance"] < found["high"] and found["n"] == 400 and not found["above_chance"]
    assert choices.accuracy(table(400, .5))["above_chance"]

def test_one_answer_for_all_is_no_knowledge():
    "A model that always says the same scores well above chance where that is often right, and is not called better than chance."
    answers = table(400, .55).assign(right=["u"]*220 + [f"{i}" for i in range(180)])
    found = choices.accuracy(answers)
    assert found["constant"] == .55 and found["low"] > found["chance"] and not found["above_chance"]
    assert choices.accuracy(answers.assign(right=[f"{i}" for i in range(400)]))["above_chance"] and choices.accuracy(table(400, .5))["constant"] is None
    same = [{"index": i, "id": str(i), "subject": "-", "question": "?", "choices": c, "answer": c.index("모름")} for i, c in enumerate((["가", "모름"], ["모름", "나"], ["다", "모름", "라"]))]
    assert len({choices.judge_question(q, np.arange(len(q["choices"])), -np.ones(len(q["choices"])))["right"] for q in same}) == 1

@pytest.mark.parametrize("k,n", [(0, 1), (0, 10), (1, 10), (5, 20), (20, 20), (333, 1000)])
def test_the_interval_is_wilson_s(k, n):
    from scipy.stats import binomtest
    ci = binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(choices.wilson(k, n), (ci.low, ci.high), atol=1e-9)

def test_subjects_add_up_to_the_whole():
    answers = pd.DataFrame({"index": range(30), "choices": [2, 3, 4]*10, "correct": [True, False]*15, "raw": False, "margin": .1, "subject": ["a", "b", "c"]*10})
    rows = choices.accuracy_rows("m", "f", answers)
    assert [r["subject"] for r in rows] == ["all", "a", "b", "c"] and list(rows[0]) == choices.CHOICE_COLUMNS
    assert sum(r["n"] for r in rows[1:]) == rows[0]["n"] and choices.pooled(rows[1:])["accuracy"] == rows[0]["accuracy"]
    assert math.isclose(rows[0]["chance"], (1/2 + 1/3 + 1/4)/3, rel_tol=1e-5)

def test_paired_accuracies_see_small_changes():
    theirs = table(600, .4)
    ours = theirs.assign(correct=theirs["correct"] | (np.arange(600) % 20 == 0))
    change = choices.accuracy_change(ours, theirs)
    assert change["low"] > 0 and change["lost"] == 0 and change["gained"] == int((ours["correct"] & ~theirs["correct"]).sum())
    a, b = (choices.accuracy(t) for t in (ours, theirs))
    assert b["high"] > a["low"]                                                  # each interval alone would not have told
    with pytest.raises(ValueError, match="same questions"): choices.accuracy_change(ours, theirs.iloc[1:])

# ---- contamination beside the scores

def test_contaminated_items_are_scored_apart(tmp_path):
    from yunmin_efficientdata.dedup.contamination import contaminated_items
    store = open_store(str(tmp_path))
    report = {"sets": {"quiz": {"items": 5, "found": [[0, 3, 2, 2], [4, 1, 1, 2]], "frequent": [2]}, "all": {"items": 2, "found": [[0, 1, 1, 1], [1, 1, 1, 1]], "frequent": []}}}
    store.write("dedup_ready/contamination.json", json.dumps(report))
    assert inputs.contaminated(store, "quiz", 5) == set(contaminated_items(store)["quiz"]) == {0, 4}
    scores = pd.DataFrame({"model": ["m"]*3, "index": [0, 1, 4], "value": [True, False, True]})
    row, = inputs.contamination_rows(store, "quiz", 5, scores, "accuracy")
    assert (row["items"], row["contaminated"], row["score_all"], row["score_clean"], row["checked"]) == (3, 2, .666667, 0, True)
    row, = inputs.contamination_rows(store, "all", 2, scores.iloc[:2], "accuracy")
    assert row["contaminated"] == 2 and row["score_clean"] is None               # nothing clean is left

@pytest.mark.parametrize("name,size", [("quiz", 4), ("unknown", 5)])
def test_a_set_that_was_not_looked_up_is_unknown_not_clean(tmp_path, name, size):
    store = open_store(str(tmp_path))
    scores = pd.DataFrame({"model": ["m"], "index": [0], "value": [1.]})
    assert inputs.contamination_rows(store, name, size, scores, "accuracy")[0]["contaminated"] is None      # no report at all
    store.write("dedup_ready/contamination.json", json.dumps({"sets": {"quiz": {"items": 5, "found": []}}}))
    row, = inputs.contamination_rows(store, name, size, scores, "accuracy")
    assert row["contaminated"] is None and row["score_clean"] is None and row["checked"] is False and list(row) == inputs.CONTAMINATION_COLUMNS

# ---- lm-evaluation-harness

@pytest.fixture
def no_network(monkeypatch):
    "A socket that anybody opens to another machine is an error."
    real = socket.socket.connect
    def refuse(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"): raise AssertionError(f"network asked for: {address}")
        return real(self, address)
    monkeypatch.setattr(socket.socket, "connect", refuse)

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
@pytest.mark.parametrize("seed", [0, 7])
def test_accuracy_equals_lm_eval_question_by_question(toys, kind, seed, tmp_path, no_network):
    model, tokenizer = toys[0][kind], toys[1]
    write(tmp_path/"quiz.jsonl", questions(60, seed))
    asked = choices.read_questions(open_store(str(tmp_path)), "quiz.jsonl", 1000)
    limit = getattr(model.config, "max_position_embeddings", None)
    ours = choices.answer_questions(model, tokenizer, asked, seed, limit)
    config = yaml.safe_load(harness.write_task(tmp_path/"task", "quiz", asked, seed).read_text(encoding="utf-8"))
    config["dataset_kwargs"]["cache_dir"] = str(tmp_path/"cache")
    task = harness.build_task(harness.task_index(("haerae",)), config, HarnessSettings())
    result = harness.evaluate_tasks(harness.wrapped(model, tokenizer, 7), [task], HarnessSettings())
    theirs = pd.DataFrame(harness.item_rows("quiz", result))
    assert list(theirs["id"]) == list(ours["id"]) and list(theirs["acc"] == 1) == list(ours["raw"]) and list(theirs["acc_norm"] == 1) == list(ours["correct"])
    rows = {r["metric"]: r for r in harness.task_rows("quiz", result)}
    whole = choices.accuracy(ours)
    assert [rows["acc_norm"][k] for k in ("value", "low", "high", "chance", "n")] == [whole[k] for k in ("accuracy", "low", "high", "chance", "n")] and rows["acc"]["value"] == whole["raw"]
    assert len(set(theirs["acc_norm"])) == 2                                     # neither all right nor all wrong
    pairs, _ = choices.question_pairs(asked, seed)
    samples = sorted(result["samples"]["quiz"], key=lambda s: s["doc_id"])
    np.testing.assert_allclose(choices.log_likelihoods(model, tokenizer, pairs, limit), [r[0] for s in samples for r in s["filtered_resps"]], rtol=1e-4, atol=1e-3)

def test_the_whole_call_gives_the_same(toys, tmp_path, no_network):
    model, tokenizer = toys[0]["mamba2"], toys[1]
    write(tmp_path/"my quiz-1.jsonl", questions(20))
    rows = harness.harness(model, tokenizer, HarnessSettings(tasks=[str(tmp_path/"my quiz-1.jsonl")]), seed=3)
    ours = choices.accuracy(choices.answer_questions(model, tokenizer, choices.read_questions(open_store(str(tmp_path)), "my quiz-1.jsonl", 99), 3))
    assert [(r["task"], r["metric"], r["value"]) for r in rows] == [("yunmin_my_quiz_1", "acc", ours["raw"]), ("yunmin_my_quiz_1", "acc_norm", ours["accuracy"])]
    assert all(["model", *r] == harness.HARNESS_COLUMNS for r in rows)

def kmmlu(folder, name, rows, splits=("test", "dev")):
    (folder/"HAERAE-HUB/KMMLU"/name).mkdir(parents=True)
    for s in splits: write(folder/"HAERAE-HUB/KMMLU"/name/f"{s}.jsonl", rows)

def test_public_benchmarks_from_a_folder(toys, tmp_path, no_network):
    "KMMLU, HAERAE and KoBEST by their names, with prompts of the harness and data of this folder."
    model, tokenizer = toys[0]["mamba2"], toys[1]
    kmmlu(tmp_path, "Accounting", [{"question": f"{i}?", "A": "봄", "B": "여름", "C": "가을", "D": "겨울", "answer": i % 4 + 1} for i in range(8)])
    for config, rows in (("history", [{"query": f"역사 {i}", "answer": f"({'ABCDE'[i % 5]})", "options": []} for i in range(10)]),):
        (tmp_path/"HAERAE-HUB/HAE_RAE_BENCH"/config).mkdir(parents=True); write(tmp_path/"HAERAE-HUB/HAE_RAE_BENCH"/config/"test.jsonl", rows)
    for config, rows in (("copa", [{"premise": "비가 온다.", "question": "결과", "alternative_1": "땅이 젖는다.", "alternative_2": "눈이 내린다.", "label": i % 2} for i in range(6)]),
                         ("boolq", [{"paragraph": "봄이다.", "question": "봄인가?", "label": 1}, {"paragraph": "봄이다.", "question": "겨울인가?", "label": 0}]),
                         ("hellaswag", [{"context": "봄이 오면", **{f"ending_{k}": e for k, e in enumerate(TEXTS, 1)}, "label": 0}]*3)):
        (tmp_path/"skt/kobest_v1"/config).mkdir(parents=True); write(tmp_path/"skt/kobest_v1"/config/"test.jsonl", rows)
    settings = HarnessSettings(tasks=["kmmlu_accounting", "haerae_history", "kobest_copa", "kobest_boolq", "kobest_hellaswag"], data=str(tmp_path))
    rows = pd.DataFrame(harness.harness(model, tokenizer, settings)).set_index(["task", "metric"])
    assert dict(rows["n"].xs("acc", level=1)) == {"kmmlu_accounting": 8, "haerae_history": 10, "kobest_copa": 6, "kobest_boolq": 2, "kobest_hellaswag": 3}
    np.testing.assert_allclose(rows["chance"].xs("acc", level=1), [1/4, 1/5, 1/2, 1/2, 1/4], rtol=1e-5)
    assert rows.loc[("kobest_copa", "acc"), "value"] == .5                       # one answer for six equal premises, half of them right

@pytest.mark.parametrize("name,source,config", [("kmmlu_accounting", "HAERAE-HUB/KMMLU", "Accounting"), ("haerae_history", "HAERAE-HUB/HAE_RAE_BENCH", "history"), ("kobest_copa", "skt/kobest_v1", "copa")])
def test_the_hub_is_asked_for_the_right_data_and_only_when_allowed(toys, monkeypatch, no_network, name, source, config):
    "`datasets.load_dataset` as the hub would answer it, with what it was asked."
    import datasets, huggingface_hub.constants as hub
    rows = {"kmmlu_accounting": {"question": "1?", "A": "봄", "B": "여름", "C": "가을", "D": "겨울", "answer": 2}, "haerae_history": {"query": "역사", "answer": "(B)", "options": []},
            "kobest_copa": {"premise": "비가 온다.", "question": "결과", "alternative_1": "땅이 젖는다.", "alternative_2": "눈이 내린다.", "label": 1}}[name]
    asked = []
    def load(path=None, name=None, **more):
        asked.append((path, name, hub.HF_HUB_OFFLINE))
        if hub.HF_HUB_OFFLINE: raise ConnectionError(f"Couldn't reach {path!r} on the Hub (OfflineModeIsEnabled)")
        return datasets.DatasetDict({s: datasets.Dataset.from_list([rows]*3) for s in ("train", "dev", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", load); monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    found = {r["metric"]: r for r in harness.harness(toys[0]["mamba2"], toys[1], HarnessSettings(tasks=[name], hub=True))}
    assert asked == [(source, config, False)] and found["acc"]["n"] == 3 and found["acc"]["task"] == name
    with pytest.raises(UserError, match=f"{name} needs the data set {source}/{config}.*harness.hub=true") as e: harness.harness(toys[0]["mamba2"], toys[1], HarnessSettings(tasks=[name]))
    assert asked[1:] == [(source, config, True)] and "\n" not in str(e.value) and hub.HF_HUB_OFFLINE is False

def test_a_hub_that_does_not_answer_is_one_line(toys, monkeypatch, no_network):
    import datasets
    def load(*args, **more): raise ConnectionError("Couldn't reach 'HAERAE-HUB/KMMLU' on the Hub\n(LocalEntryNotFoundError)")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="the hub did not give it.*Couldn't reach") as e: harness.harness(toys[0]["mamba2"], toys[1], HarnessSettings(tasks=["kmmlu_law"], hub=True))
    assert "\n" not in str(e.value)

def test_examples_come_from_the_local_split_and_a_limit_holds(toys, tmp_path, no_network):
    model, tokenizer = toys[0]["mamba2"], toys[1]
    kmmlu(tmp_path, "Law", [{"question": f"{i}?", "A": "봄", "B": "여름", "C": "가을", "D": "겨울", "answer": 1} for i in range(9)])
    rows = harness.harness(model, tokenizer, HarnessSettings(tasks=["kmmlu_law"], data=str(tmp_path), shots=2, limit=4))
    assert {r["n"] for r in rows} == {4}
    assert rows == harness.harness(model, tokenizer, HarnessSettings(tasks=["kmmlu_law"], data=str(tmp_path), shots=2, limit=4))

def test_a_group_counts_every_question_once():
    part = [{"task": t, "subject": "all", "metric": m, "value": v, "low": 0, "high": 1, "chance": .25, "n": n, "version": "2.0"} for t, v, n in (("kmmlu_law", .5, 30), ("kmmlu_math", .2, 10)) for m in ("acc", "acc_norm")]
    rows = harness.grouped_rows("kmmlu", part)
    assert [(r["task"], r["subject"]) for r in rows[:3]] == [("kmmlu", "all"), ("kmmlu", "all"), ("kmmlu", "kmmlu_law")] and rows[0]["n"] == 40 and rows[0]["value"] == .425
    assert harness.grouped_rows("kmmlu_law", part[:2]) == part[:2]

def test_families_are_known_by_name():
    manager = harness.find_tasks(["kmmlu", "haerae", "kobest", "click"])
    assert len(harness.leaf_tasks(manager, "kmmlu")) == 45 and len(harness.leaf_tasks(manager, "haerae")) == 5 and len(harness.leaf_tasks(manager, "kobest")) == 5

@pytest.mark.parametrize("tasks,data,message", [(["kmmlu_accounting"], None, "kmmlu_accounting needs the data set HAERAE-HUB/KMMLU/Accounting.*test.jsonl.*harness.hub=true"),
    (["kmmlu_no_such"], None, "knows no 'kmmlu_no_such'"), (["nowhere.jsonl"], None, "harness.tasks.*nowhere"), (["kmmlu_accounting"], "nowhere", "harness.data.*nowhere"), (["kmmlu_law"], "bad", "local data of kmmlu_law")])
def test_what_is_missing_is_one_line(toys, tmp_path, monkeypatch, no_network, tasks, data, message):
    monkeypatch.setattr(harness, "task_index", lambda families=(), real=harness.task_index: real(families or ("kmmlu",)))       # not all ten thousand files
    if data == "bad": kmmlu(tmp_path, "Law", [{"frage": "?"}])
    with pytest.raises(UserError, match=message) as e:
        harness.harness(toys[0]["mamba2"], toys[1], HarnessSettings(tasks=tasks, data=str(tmp_path/("" if data == "bad" else data)) if data else None))
    assert "\n" not in str(e.value)

def test_a_written_task_is_the_same_in_bytes(tmp_path):
    for folder in ("a", "a"): path = harness.write_task(tmp_path/folder, "quiz", questions(5), 1); bytes_ = [p.read_bytes() for p in sorted(path.parent.iterdir())]
    assert bytes_ == [p.read_bytes() for p in sorted((tmp_path/"a").iterdir())] and yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_choice"] == "{{choices}}"
