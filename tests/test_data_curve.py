"The curve of loss against data: recovers planted power laws, treats shares alike, resumes by part, trains with dem's functions too."
from __future__ import annotations
import json, math
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from yunmin_efficientdata.core.settings import DataCurveSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import data_curve as dc, inputs

TEXTS = ["봄이 오면 들에 꽃이 피고 새가 운다.", "여름에는 비가 많이 내리고 날이 덥다.", "가을 하늘은 높고 푸르며 바람이 시원하다.", "겨울이 오면 눈이 내리고 강이 언다."]
TINY = DataCurveSettings(seq_len=16, batch_size=4, hidden_size=32, layers=1, seeds=1, max_tokens=48*64, learning_rate=1e-2)

def runs(law, shares=(.25, .5, 1), seeds=2, noise=0., domains=("web", "social"), seed=0, whole=4e6):
    "Runs whose losses follow a law of the tokens."
    rng = np.random.default_rng(seed)
    return {f"{s:g}/seed {k}": {"share": s, "seed": k, "steps": int(s*whole/1024), "tokens": int(s*whole), "cpu_seconds": 1., "domains": {d: {"nats": 1000*law(s*whole)*math.exp(noise*rng.normal()), "tokens": 1000} for d in domains}}
            for s in shares for k in range(seeds)}

@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "Training tokens of four sentences, and a base."
    root = tmp_path_factory.mktemp("ws"); store = open_store(str(root))
    base, tokenizer = inputs.toy(TEXTS)
    base.save_pretrained(root/"models/base")
    rng = np.random.default_rng(0)
    for d in ("web", "social"):
        ids = [tokenizer(TEXTS[rng.integers(4)])["input_ids"] + [0] for _ in range(500)]
        with store.output(f"parquet_ready/{d}.parquet") as path: pq.write_table(pa.table({"tokens": pa.array(ids, pa.list_(pa.int32()))}), path)
    return store, tokenizer, ["parquet_ready/social.parquet", "parquet_ready/web.parquet"]

# ---- the line

@pytest.mark.parametrize("a,b", [(9, .07), (40, .3), (3, .01)])
def test_a_planted_law_is_found_and_continued(a, b):
    rows = pd.DataFrame(dc.curve_rows(runs(lambda n: a*n**-b)), columns=dc.CURVE_COLUMNS)
    for d in ("mean", "web", "social"):
        part = rows[rows.domain == d].set_index("kind")
        for kind in ("predicted", "cautious"): assert math.isclose(part.loc[kind, "nats"], a*8e6**-b, rel_tol=1e-4) and part.loc[kind, "tokens"] == 8e6 and part.loc[kind, "share"] == 2
        assert math.isclose(part.loc["check", "nats"], a*4e6**-b, rel_tol=1e-4)
        assert math.isclose(part.loc["predicted", "change"], 100*math.expm1(a*8e6**-b - a*4e6**-b), rel_tol=1e-3, abs_tol=1e-3)

def test_the_interval_holds_what_it_promises():
    inside = 0
    for seed in range(200):
        r = runs(lambda n: 9*n**-.07, noise=.01, seed=seed, domains=("web",))
        x, y = (np.array([f(v) for v in r.values()]) for f in (lambda v: v["tokens"], lambda v: v["domains"]["web"]["nats"]/1000))
        _, low, high = dc.predict(x, y, 8e6)
        inside += low < 9*8e6**-.07 < high
    assert 180 <= inside <= 199

def test_the_interval_equals_the_textbook_formula():
    "The interval of a regression line's mean, through the covariance of its coefficients."
    from scipy.stats import t
    x, y = np.array([1e6, 1e6, 2e6, 4e6, 4e6]), np.array([3.5, 3.4, 3.2, 3.1, 3.0])
    X = np.stack([np.ones(5), np.log(x)], axis=1)
    beta, rest, *_ = np.linalg.lstsq(X, np.log(y), rcond=None)
    at = np.array([1, math.log(8e6)])
    half = t.ppf(.975, 3)*math.sqrt(rest[0]/3*at @ np.linalg.inv(X.T @ X) @ at)
    np.testing.assert_allclose(dc.predict(x, y, 8e6), np.exp([at @ beta, at @ beta - half, at @ beta + half]), rtol=1e-8)

def test_a_floor_is_seen_by_check_and_the_last_slope():
    "A loss that cannot fall below 3: the power law promises too much, the two other rows say so."
    rows = pd.DataFrame(dc.curve_rows(runs(lambda n: 3 + 400*n**-.5)), columns=dc.CURVE_COLUMNS)
    mean = rows[rows.domain == "mean"].set_index("kind")
    truth = 3 + 400*8e6**-.5
    assert mean.loc["predicted", "nats"] < mean.loc["cautious", "nats"] < truth and mean.loc["check", "nats"] < mean.loc["measured", "nats"].iloc[-1]

def test_one_seed_and_two_shares_have_no_interval():
    rows = pd.DataFrame(dc.curve_rows(runs(lambda n: 9*n**-.07, shares=(.5, 1), seeds=1)), columns=dc.CURVE_COLUMNS)
    assert "check" not in set(rows.kind) and rows[rows.kind == "predicted"].low.isna().all() and rows[rows.kind == "predicted"].nats.notna().all()

def test_rows_are_complete_and_rounded():
    rows = dc.curve_rows(runs(lambda n: 9*n**-.07, noise=.01), 4)
    assert all(list(r) == dc.CURVE_COLUMNS for r in rows) and [r["kind"] for r in rows].count("run") == 6
    assert {r["share"] for r in rows if r["kind"] == "predicted"} == {4} and [r["domain"] for r in rows if r["kind"] == "predicted"] == ["mean", "web", "social"]
    assert str(rows) == str(dc.curve_rows(json.loads(json.dumps(runs(lambda n: 9*n**-.07, noise=.01))), 4))

# ---- the runs

def test_shares_get_steps_in_proportion():
    s = DataCurveSettings(batch_size=8, seq_len=128, max_tokens=1_000_000)
    steps = [dc.share_steps(x, 100_000, s) for x in (.25, .5, 1)]
    assert steps[2] == 976 and abs(steps[0]*4 - steps[2]) <= 2 and abs(steps[1]*2 - steps[2]) <= 1
    assert dc.share_steps(1, 800, s) == 100                                      # an epoch of 800 windows, each once

@pytest.mark.parametrize("shares", [[.5, .5], [0, 1], [.5, 2], [-1, 1]])
def test_shares_that_make_no_curve(shares):
    with pytest.raises(UserError, match="evaluation.data_curve.shares"): dc.parts(DataCurveSettings(shares=shares))

def test_a_small_share_is_the_beginning_of_a_large_one(workspace):
    store, _, files = workspace
    def read(steps): return [b["input_ids"] for b in dc.FirstSteps(dc.TokenLoader([store.fetch(k) for k in files], 16, 4, seed=3), steps)]
    small, large = read(10), read(25)
    assert len(small) == 10 and all(torch.equal(a, b) for a, b in zip(small, large))
    seen = [tuple(w.tolist()) for b in large for w in b]
    loader = dc.TokenLoader([store.fetch(k) for k in files], 16, 4, seed=3)
    assert len(seen) == 100 and list(loader.order(0)[:100]) == list(dict.fromkeys(loader.order(0)[:100]))       # no window twice

def test_runs_are_repeatable_and_more_data_helps(workspace):
    store, tokenizer, files = workspace
    texts = {"web": TEXTS[:2], "social": TEXTS[2:]}
    found = {p: dc.curve_run(store, files, tokenizer, TINY, p, texts, 16, 8) for p in dc.parts(TINY)}
    losses = dc.domain_losses(found)
    assert losses["mean"][0] > losses["mean"][1] > losses["mean"][2] and [r["steps"] for r in found.values()] == [12, 24, 48]
    again = dc.curve_run(store, files, tokenizer, TINY, "0.25/seed 0", texts, 16, 8)
    assert again["domains"] == found["0.25/seed 0"]["domains"] and json.loads(json.dumps(again)) == again
    other = dc.curve_run(store, files, tokenizer, TINY, "0.25/seed 1", texts, 16, 8)
    assert other["domains"] != again["domains"]
    assert {r["kind"] for r in dc.curve_rows(found)} == {"run", "measured", "predicted", "cautious", "check"}

def test_the_shape_is_the_base_s_unless_the_base_is_large(workspace, tmp_path):
    from transformers import AutoConfig, LlamaConfig
    store, tokenizer, files = workspace
    same = DataCurveSettings(seq_len=16, batch_size=4, seeds=1, shares=[.5, 1])
    assert dc.small_config(store.fetch("models/base"), len(tokenizer), same).to_dict()["hidden_size"] == AutoConfig.from_pretrained(store.fetch("models/base")).hidden_size
    LlamaConfig(vocab_size=32000, hidden_size=1024, num_hidden_layers=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="data_curve.hidden_size=256") as e: dc.small_config(tmp_path, 500, same)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="hidden_size: 50"): dc.small_config(tmp_path, 500, DataCurveSettings(hidden_size=50))
    with pytest.raises(UserError, match="too little"): dc.curve_run(store, files, tokenizer, DataCurveSettings(hidden_size=32), "0.25/seed 0", {"web": TEXTS}, 16, 8)

def test_dem_s_own_training_can_be_handed_in(workspace):
    "`dem.base.pretrain` has the same arguments; from the same start and batches both learn the same."
    from yunmin_efficientdata.dem.base import pretrain
    store, tokenizer, files = workspace
    mine, theirs = (dc.curve_run(store, files, tokenizer, TINY, "1/seed 0", {"web": TEXTS}, 16, 8, train=t)["domains"]["web"] for t in (dc.train_small, pretrain))
    assert mine["tokens"] == theirs["tokens"] and math.isclose(mine["nats"], theirs["nats"], rel_tol=1e-4)

def test_an_adapter_s_curve_through_dem(workspace, tmp_path):
    "The curve of an adapter: `train_adapter` and `domain_model` of phase 3 handed in as the training."
    from yunmin_efficientdata.core.settings import LoraSettings
    from yunmin_efficientdata.dem.lora import domain_model, train_adapter
    store, tokenizer, files = workspace
    base = store.fetch("models/base")
    def train(config, batches, steps, learning_rate, seed):
        s = LoraSettings(seq_len=16, batch_size=4, learning_rate=learning_rate, target_modules=["in_proj"], seed=seed, precision="fp32")
        train_adapter(base, batches, np.zeros((0, 16), np.int64), s, tmp_path/f"{steps}", steps, threads=1)
        return domain_model(base, tmp_path/f"{steps}")
    settings = TINY.model_copy(update={"shares": [.25, 1]})
    found = {p: dc.curve_run(store, files, tokenizer, settings, p, {"web": TEXTS}, 16, 8, train=train) for p in dc.parts(settings)}
    losses = dc.domain_losses(found)["web"]
    start = dc.document_scores(inputs.load_full(base), tokenizer, TEXTS, 16, 8)
    assert losses[1] < losses[0] < start.nats.sum()/start.tokens.sum()

# ---- figure

@pytest.mark.parametrize("shares,seeds", [((.25, .5, 1), 2), ((.5, 1), 1)])
def test_the_figure_says_what_doubling_brings(shares, seeds):
    from yunmin_efficientdata.core.figures import korean_style
    korean_style()
    table = pd.DataFrame(dc.curve_rows(runs(lambda n: 9*n**-.07, shares, seeds)), columns=dc.CURVE_COLUMNS)
    axes = dc.plot_curve(table).axes[0]
    assert any("2배" in t.get_text() for t in axes.get_legend().get_texts()) and [t.get_text() for t in axes.get_xticklabels()][-1] == "800만"
