"Perplexity: agreement with a plain loop and with lm-evaluation-harness, padding, edge cases, intervals and pairs; toy models made on the spot."
from __future__ import annotations
import copy, json, math, random
import numpy as np, pandas as pd, pytest, torch
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.evaluation import inputs, perplexity as ppl

TEXTS = ["지난 주말에 가족과 함께 바다에 다녀왔는데 날씨가 맑아서 아이들이 즐겁게 놀았습니다.", "노트북을 고를 때는 먼저 어디에 쓸 것인지 생각해 보는 것이 좋습니다.",
         "이 영화는 배우들의 연기도 좋고 음악도 좋아서 정말 재미있게 봤어요.", "배송은 빠른데 제품의 색이 사진과 조금 달라서 아쉬웠습니다."]
LONG = TEXTS + ["긴 글을 씁니다. " * 30, "a", "눈"]

@pytest.fixture(scope="module")
def toys():
    "A Mamba2 and a Llama with one tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM
    mamba, tokenizer = inputs.toy(TEXTS, steps=5)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    return {"mamba2": mamba, "llama": llama}, tokenizer

def plain_loop(model, tokenizer, texts, seq_len, stride, start=None):
    "The loop of the transformers guide: labels masked with -100, one window at a time."
    total = count = 0
    for text in texts:
        x, previous = torch.tensor([([] if start is None else [start]) + tokenizer(text)["input_ids"]]), 0
        if x.shape[1] < 2: continue
        for begin in range(0, x.shape[1], stride):
            end = min(begin + seq_len, x.shape[1])
            part = x[:, begin:end]; labels = part.clone(); labels[:, :max(previous - begin, 0)] = -100
            scored = int((labels[:, 1:] != -100).sum())
            with torch.no_grad(): total += model(part, labels=labels).loss.item()*scored
            count += scored; previous = end
            if end == x.shape[1]: break
    return math.exp(total/count), count

# ---- agreement

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
@pytest.mark.parametrize("seq_len,stride", [(2, 1), (16, 8), (17, 5), (32, 31), (64, 1), (512, 256)])
@pytest.mark.parametrize("start", [None, 0])
def test_perplexity_equals_a_plain_loop(toys, kind, seq_len, stride, start):
    models, tokenizer = toys
    texts = LONG if stride > 1 else TEXTS[:2]
    ours, (theirs, count) = ppl.perplexity(models[kind], tokenizer, texts, seq_len, stride, start=start), plain_loop(models[kind], tokenizer, texts, seq_len, stride, start)
    assert ours.tokens == count and abs(ours.perplexity/theirs - 1) < 1e-4
    scored = sum(len(t.encode()) for t in texts if len(tokenizer(t)["input_ids"]) + (start is not None) > 1)
    assert math.isclose(ours.bits_per_byte, math.log(ours.perplexity)*count/math.log(2)/scored, rel_tol=1e-9)

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
def test_bits_per_byte_equals_lm_eval(toys, kind):
    "lm-evaluation-harness' rolling log-likelihood charges the first token after the token that begins a text; so does `start`."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    models, tokenizer = toys
    lm = HFLM(pretrained=copy.deepcopy(models[kind]), tokenizer=tokenizer, batch_size=2, max_length=256, device="cpu")
    theirs = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(TEXTS)], disable_tqdm=True)
    ours = ppl.document_scores(models[kind], tokenizer, TEXTS, 257, 256, start=tokenizer.eos_token_id)
    np.testing.assert_allclose(-ours.nats, [float(t) for t in theirs], rtol=1e-4)

def test_two_tokenizers_meet_in_bits_per_byte(toys):
    "A model that knows nothing needs log2(vocabulary) bits a token: with `start` every byte is paid for, whatever the tokenizer."
    class Uniform(torch.nn.Module):
        def __init__(self, size): super().__init__(); self.head = torch.nn.Linear(1, size); self.device, self.config = torch.device("cpu"), None
        def get_output_embeddings(self): return self.head
        def forward(self, input_ids, **_): return type("O", (), {"logits": torch.zeros(*input_ids.shape, self.head.out_features)})
    class Bytes:
        def __call__(self, text, **_): return {"input_ids": list(text.encode())}
    for start, tokens in ((None, -1), (0, 0)):
        found = ppl.perplexity(Uniform(256), Bytes(), TEXTS, 64, 32, start=start)
        size = sum(len(t.encode()) for t in TEXTS)
        assert math.isclose(found.bits_per_byte, 8*(size + tokens*len(TEXTS))/size, rel_tol=1e-6) and math.isclose(found.perplexity, 256, rel_tol=1e-6)

# ---- windows and padding

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

@pytest.mark.parametrize("kind", ["mamba2", "llama"])
def test_padding_and_batches_change_nothing(toys, kind):
    models, tokenizer = toys
    ids = [tokenizer(t)["input_ids"] for t in LONG] + [[], [1], [1, 2]]
    one, many = ppl.token_nll(models[kind], ids, batch_tokens=1), ppl.token_nll(models[kind], ids, batch_tokens=1 << 16)
    assert [len(n) for n in many] == [max(0, len(i) - 1) for i in ids]
    for a, b in zip(one, many): np.testing.assert_allclose(a, b, atol=1e-4)

def test_left_padding_is_the_trap_that_is_avoided(toys):
    "A tokenizer that pads on the left changes nothing here; padding on the left without a mask would change a Mamba2."
    models, tokenizer = toys
    left = copy.deepcopy(tokenizer); left.padding_side = "left"
    for model in models.values():
        assert ppl.perplexity(model, left, LONG, 32, 16) == ppl.perplexity(model, tokenizer, LONG, 32, 16)
    ids = tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad(): logits = models["mamba2"](torch.tensor([[0]*20 + ids])).logits[0, 20:]
    wrong = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").numpy()
    assert np.abs(wrong - ppl.token_nll(models["mamba2"], [ids])[0]).max() > .01

def test_a_window_longer_than_the_positions_is_refused(toys):
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = toys[1]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    assert ppl.perplexity(model, tokenizer, LONG, 32, 16).tokens > 0 and ppl.perplexity(model, tokenizer, ["눈"], 64, 32).tokens > 0
    with pytest.raises(UserError, match="evaluation.seq_len.*32 positions"): ppl.perplexity(model, tokenizer, LONG, 64, 32)

def test_nothing_to_score_is_nan_not_a_crash(toys):
    model, tokenizer = toys[0]["mamba2"], toys[1]
    for texts in ([], [""], ["", ""]):
        found = ppl.perplexity(model, tokenizer, texts, 16, 8)
        assert math.isnan(found.perplexity) and found.tokens == 0
    empty = ppl.document_scores(model, tokenizer, [""], 16, 8)
    assert math.isnan(ppl.perplexity_row("m", "d", empty)["low"])
    assert math.isnan(ppl.paired_rows({"a": {"d": empty}, "b": {"d": empty}}, "a")[0]["change"])

# ---- intervals and pairs

def scores(rng, d, mean=300., noise=40.): return ppl.DocumentScores(rng.normal(mean, noise, d), np.full(d, 100), np.full(d, 400))

def test_intervals_cover_and_narrow():
    rng = np.random.default_rng(0)
    few, many = ppl.intervals(scores(rng, 10))["perplexity"], ppl.intervals(scores(rng, 1000))["perplexity"]
    assert few[1] - few[0] > many[1] - many[0] and many[0] < math.exp(3) < many[1]

def test_intervals_hold_what_they_promise():
    "Over 200 samples of documents, 95 % intervals of both kinds hold the truth 90 to 99 times of 100."
    rng, inside = np.random.default_rng(1), np.zeros(2)
    for _ in range(200):
        hard = rng.normal(0, 40, 60)
        a, b = (ppl.DocumentScores(m + hard + rng.normal(0, 5, 60), np.full(60, 100), np.full(60, 400)) for m in (300, 290))
        low, high = ppl.intervals(a, 300)["perplexity"]; inside[0] += low < math.exp(3) < high
        row = ppl.paired_rows({"a": {"d": a}, "b": {"d": b}}, "a", draws=300)[0]; inside[1] += row["low"] < 100*math.expm1(-.1) < row["high"]
    assert (inside/200 > .90).all() and (inside/200 <= .99).all()

def test_a_pair_sees_what_two_intervals_hide():
    rng = np.random.default_rng(0)
    theirs = scores(rng, 80)
    ours = theirs._replace(nats=theirs.nats - 3 + rng.normal(0, 4, 80))
    (low_a, high_a), (low_b, high_b) = (ppl.intervals(s)["perplexity"] for s in (ours, theirs))
    assert low_b < high_a                                                       # the intervals overlap
    row = ppl.paired_rows({"base": {"d": theirs}, "m": {"d": ours}}, "base")[0]
    assert row["high"] < 0 and row["better"] > .99 and abs(row["change"] - 100*math.expm1(-.03)) < 1.5

def test_the_mean_of_pairs_is_geometric_and_leaves_general_out():
    one = ppl.DocumentScores(np.array([100., 100.]), np.array([50, 50]), np.array([200, 200]))
    half, double = one._replace(nats=one.nats - 50*math.log(2)), one._replace(nats=one.nats + 50*math.log(2))
    rows = {r["domain"]: r for r in ppl.paired_rows({"base": {"a": one, "b": one, "general": one}, "m": {"a": half, "b": double, "general": double}}, "base")}
    assert list(rows) == ["a", "b", "mean", "general"]
    assert [round(rows[d]["change"], 3) for d in rows] == [-50, 100, 0, 100] and list(rows["a"]) == ppl.PAIR_COLUMNS

def test_pairs_need_the_same_documents():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same documents"): ppl.log_ratios(scores(rng, 5), scores(rng, 6))

def test_scores_keep_every_bit_through_the_ledger():
    found = scores(np.random.default_rng(0), 50)
    for a, b in zip(ppl.unpack(json.loads(json.dumps(ppl.pack(found)))), found): assert np.array_equal(a, b) and a.dtype == b.dtype

def test_figures_can_be_drawn_with_one_model_only():
    from yunmin_efficientdata.core.figures import korean_style
    korean_style()
    rows = [{"model": "merged", "against": "base", "domain": d, "change": -1., "low": -2., "high": 1.} for d in ("web", "mean")]
    figure = ppl.plot_pairs(pd.DataFrame(rows))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["web", "영역 평균"]
