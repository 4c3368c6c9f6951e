"Overlap metrics: equal to sacrebleu, rouge-score and BERTScore's formula, readable for Korean, robust; all models made on the spot."
from __future__ import annotations
import json, math, random
import numpy as np, pandas as pd, pytest, torch
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import inputs, overlap

TEXTS = ["지난 주말에 가족과 함께 바다에 다녀왔는데 날씨가 맑아서 아이들이 즐겁게 놀았습니다.", "노트북을 고를 때는 먼저 어디에 쓸 것인지 생각해 보는 것이 좋습니다.",
         "이 영화는 배우들의 연기도 좋고 음악도 좋아서 정말 재미있게 봤어요.", "배송은 빠른데 제품의 색이 사진과 조금 달라서 아쉬웠습니다."]
WORDS = "the cat dog sat on mat runs fast very a blue sky over old river house slowly and then it was over, again! don't stop-gap 3.5 U.S. (yes)".split()

@pytest.fixture(scope="module")
def model_and_tokenizer(): return inputs.toy(TEXTS, steps=5)

def english(seed, n=25):
    "Sentences and distorted copies."
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(n)]
    return [" ".join(w if rng.random() < .7 else rng.choice(WORDS) for w in r.split()[:rng.randint(1, 30)]) for r in references], references

# ---- generation

@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_generation_in_a_batch_equals_one_by_one(model_and_tokenizer, batch_size):
    model, tokenizer = model_and_tokenizer
    ids = [tokenizer(t)["input_ids"][:n] for t, n in zip(TEXTS, (3, 9, 5, 14))]
    assert overlap.generate(model, tokenizer, ids, 10, batch_size) == [overlap.generate(model, tokenizer, [i], 10)[0] for i in ids]

def test_continuations_keep_prompt_and_reference_apart(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    for c, t in zip(overlap.continuations(tokenizer, TEXTS, 8, 6, 10), TEXTS):
        assert len(c.prompt) == 8 and t.startswith(overlap.clean(tokenizer.decode(c.prompt))) and c.reference in t
    assert overlap.continuations(tokenizer, ["", "가"], 8, 6, 10) == [] and len(overlap.continuations(tokenizer, TEXTS, 8, 6, 2)) == 2

# ---- agreement with the libraries

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokenize", ["13a", "char", "none"])
def test_bleu_equals_sacrebleu(seed, tokenize):
    import sacrebleu
    written, references = english(seed)
    ours, theirs = overlap.bleu(written, references, tokenize, draws=10), sacrebleu.corpus_bleu(written, [references], tokenize=tokenize, force=True)
    assert math.isclose(ours.value, theirs.score, rel_tol=1e-5) and ours.metric == f"bleu_{tokenize}"
    assert f"tok:{tokenize}" in ours.signature and "version:" in ours.signature and ours.low <= ours.value <= ours.high

@pytest.mark.parametrize("seed", range(4))
def test_chrf_equals_sacrebleu(seed):
    import sacrebleu
    written, references = english(seed)
    assert math.isclose(overlap.chrf(written, references, draws=10).value, sacrebleu.corpus_chrf(written, [references]).score, rel_tol=1e-5)
    np.testing.assert_allclose(overlap.sentence_chrf(written, references), [sacrebleu.sentence_chrf(w, [r]).score for w, r in zip(written, references)], rtol=1e-5)

@pytest.mark.parametrize("seed", range(4))
def test_rouge_on_english_equals_rouge_score(seed):
    from rouge_score.rouge_scorer import RougeScorer
    written, references = english(seed)
    for score, name in zip(overlap.rouge(written, references, "word", draws=10), ("rouge1", "rouge2", "rougeL")):
        assert math.isclose(score.value, np.mean([RougeScorer([name]).score(r, w)[name].fmeasure for w, r in zip(written, references)]), rel_tol=1e-5) and score.metric == f"{name}_word"

def test_the_interval_of_bleu_is_the_library_s():
    "sacrebleu's own bootstrap, with another random generator, gives nearly the same interval."
    from sacrebleu.metrics import BLEU
    written, references = english(9, 80)
    ours = overlap.bleu(written, references, "13a", draws=2000)
    theirs = BLEU(tokenize="13a").corpus_score(written, [references], n_bootstrap=2000)
    assert abs((ours.high - ours.low)/2 - theirs._ci) < .15*theirs._ci

# ---- Korean

def test_identical_korean_sentences_are_perfect():
    found = {s.metric: s.value for s in overlap.overlap(TEXTS, TEXTS, ("char", "morph"), 10, 0, ("char", "morph"))}
    assert found == {"bleu_char": 100, "bleu_morph": 100, "chrf": 100, **{f"rouge{k}{u}": 1 for u in ("", "_morph") for k in ("1", "2", "L")}}

@pytest.mark.parametrize("unit", ["char", "morph"])
def test_rouge_reads_korean(unit):
    from rouge_score.rouge_scorer import RougeScorer
    assert RougeScorer(["rouge1"]).score(TEXTS[0], TEXTS[0])["rouge1"].fmeasure == 0         # the trap
    assert [s.value for s in overlap.rouge(["나는 밥을 먹었다"], ["나는 밥을 먹었다"], unit, draws=10)] == [1, 1, 1]
    assert overlap.rouge(["나는 밥을 먹었다"], ["비가"], unit, draws=10)[0].value == 0

def test_morphemes_part_a_noun_from_its_particle():
    words, morphs = (overlap.rouge(["나는 밥을 먹는다"], ["너는 밥도 먹었다"], u, draws=10)[0].value for u in ("char", "morph"))
    assert overlap.morphemes("밥을") == ["밥", "을"] and 0 < morphs < 1 and 0 < words < 1
    assert "kiwipiepy" in overlap.bleu(TEXTS, TEXTS, "morph", draws=10).signature

def test_unicode_forms_are_one():
    import unicodedata
    decomposed = [unicodedata.normalize("NFD", t) for t in TEXTS]
    for unit in ("char", "morph"): assert overlap.rouge(decomposed, TEXTS, unit, draws=10)[0].value == 1

# ---- edges

def test_empty_texts_score_zero():
    assert all(s.value == 0 for s in overlap.overlap(["", ""], ["가나다", "라마바"], ("char", "morph", "word"), 10, 0, ("char", "morph")))
    assert overlap.overlap([], []) == []

def test_chrf_survives_samples_without_a_common_character():
    scores = overlap.bleu_chrf(["가나다라마바", "xyzxyz"], ["가나다라마사", "한국어글"], draws=50)
    assert all(s.low <= s.value <= s.high for s in scores) and scores[1].low == 0

def test_the_same_seed_gives_the_same_interval():
    written, references = english(1)
    assert overlap.overlap(written, references, seed=3) == overlap.overlap(written, references, seed=3) != overlap.overlap(written, references, seed=4)

# ---- references that answer an input

def test_pairs_are_read_with_their_place_in_the_file(tmp_path):
    (tmp_path/"p.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "input": f"in {i}", "reference": f"ref {i}", "task": "translation en-ko"}) + "\n" for i in range(11)), encoding="utf-8")
    pairs = overlap.read_pairs(open_store(str(tmp_path)), "p.jsonl", 3)
    assert [p["index"] for p in pairs] == [0, 5, 10] and pairs[0]["size"] == 11 and pairs[1]["id"] == "p5"
    assert overlap.pair_prompt(pairs[0]).endswith("영어: in 0\n한국어:") and overlap.pair_prompt({"input": "x", "prompt": "y"}) == "y"

@pytest.mark.parametrize("line", ['{"input": "a"}', '{"input": "", "reference": "b"}', '{"input": 1, "reference": "b"}', "[1]", "{"])
def test_a_bad_pair_is_one_line_with_file_and_line(tmp_path, line):
    (tmp_path/"p.jsonl").write_text('{"input": "a", "reference": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl line 2.*evaluation\.reference_pairs") as e: overlap.read_pairs(open_store(str(tmp_path)), "p.jsonl", 10)
    assert "\n" not in str(e.value)

def test_the_local_pair_sets_can_be_read(corpus):
    folder = next(f for f in (corpus/"eval", corpus.parent/"eval") if f.is_dir())
    store = open_store(str(folder))
    for key in ("pairs_en_ko.jsonl", "pairs_klue_sts.jsonl", "pairs_sae4k.jsonl"):
        pairs = overlap.read_pairs(store, key, 20)
        assert len(pairs) == 20 and all(p["task"] in overlap.FRAMES and p["input"] in overlap.pair_prompt(p) for p in pairs)
    rows = overlap.human_correlation(overlap.read_pairs(store, "pairs_klue_sts.jsonl", 100))
    assert {r["metric"] for r in rows} >= {"chrf", "bleu_char", "rouge1_char", "rougeL_morph", "rouge1_word"} and all(-1 <= r["spearman"] <= 1 for r in rows)

# ---- BERTScore

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A tiny BERT with random weights, saved as a folder."
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder, letters = tmp_path_factory.mktemp("bert"), sorted({c for t in TEXTS for c in t if c.strip()})
    (folder/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder/"vocab.txt"), do_lower_case=False, strip_accents=False).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=5 + 2*len(letters), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=40, initializer_range=.3)).save_pretrained(folder)
    return folder

@pytest.mark.parametrize("layer", [0, 2, 3, None])
def test_bertscore_equals_the_paper_s_formula(bert, layer):
    encoder = overlap.load_encoder(bert, layer)
    written, references = [TEXTS[0], TEXTS[1], "영화", TEXTS[3]], [TEXTS[2], TEXTS[1], TEXTS[0], "배송"]
    def vectors(text):
        x = encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=38)
        with torch.no_grad(): hidden = encoder.model(**x, output_hidden_states=True).hidden_states[3 if layer is None else layer][0]
        return [v for v, t in zip(hidden.double().numpy(), x["input_ids"][0].tolist()) if t not in encoder.tokenizer.all_special_ids or t == encoder.tokenizer.unk_token_id]
    cosine = lambda a, b: float(a @ b/np.linalg.norm(a)/np.linalg.norm(b))
    expected = []
    for w, r in zip(map(vectors, written), map(vectors, references)):
        p, q = np.mean([max(cosine(a, b) for b in r) for a in w]), np.mean([max(cosine(a, b) for a in w) for b in r])
        expected.append((p, q, 2*p*q/(p + q)))
    found = overlap.bertscore(encoder, written, references, draws=10)
    np.testing.assert_allclose([s.value for s in found], np.mean(expected, axis=0), rtol=1e-4)
    assert [s.metric for s in found] == ["bertscore_precision", "bertscore_recall", "bertscore_f1"] and f"layer:{3 if layer is None else layer}|" in found[0].signature and str(bert.parent) not in found[0].signature

def test_bertscore_of_identical_texts_and_batches(bert):
    encoder = overlap.load_encoder(bert)
    assert all(abs(s.value - 1) < 1e-5 for s in overlap.bertscore(encoder, TEXTS, TEXTS, draws=10))
    assert [s.value for s in overlap.bertscore(encoder, [""], [TEXTS[0]], draws=10)] == [0, 0, 0]
    for a, b in zip(overlap.embed(encoder, TEXTS + [""], 1), overlap.embed(encoder, TEXTS + [""], 8)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert {s.metric for s in overlap.overlap(TEXTS, TEXTS[::-1], draws=10, encoder=encoder)} >= {"bertscore_f1", "bleu_char"}

@pytest.mark.parametrize("what,message", [("nothing", "no config.json"), ("layer", "bertscore_layer: 9.*layers 0 to 3"), ("broken", "bertscore_model")])
def test_a_folder_without_an_encoder_is_one_line(bert, tmp_path, what, message):
    folder, layer = bert, 9 if what == "layer" else None
    if what == "nothing": folder = tmp_path
    if what == "broken": folder = tmp_path; (tmp_path/"config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=message) as e: overlap.load_encoder(folder, layer)
    assert "\n" not in str(e.value)

def test_the_figure_shows_the_models_that_are_there():
    from yunmin_efficientdata.core.figures import korean_style
    korean_style()
    rows = [{"model": m, "domain": d, "metric": "chrf", "value": 5., "low": 4., "high": 6.} for m in ("base", "web", "merged") for d in ("web", "social")]
    assert [t.get_text() for t in overlap.plot_overlap(pd.DataFrame(rows), "chrf").axes[0].get_legend().get_texts()] == ["base", "merged"]
