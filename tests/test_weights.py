"""The weight search: slopes, floor, retention, never worse than uniform, cheaper than Nelder-Mead, and two draws of validation text agree."""
import math
import numpy as np
import pytest
import torch

from yunmin_efficientdata.core.settings import BaseSettings
from yunmin_efficientdata.dem.base import demo_config, make_deterministic, pretrain, quiet, save_model
from yunmin_efficientdata.dem.vectors import difference
from yunmin_efficientdata.dem.weights import Goal, Mixture, advice_text, at_the_floor, best, mean, mixture_advice, mixture_loss, nelder_mead, search_weights, weight_curves

STEPS = {"a": 3, "b": 5, "c": 7}


def text(domain, n, seed):
    rng = np.random.default_rng([seed, STEPS[domain]])
    return (rng.integers(0, 64, (n, 1)) + np.arange(32)*STEPS[domain] + (rng.random((n, 32)) < .15)*rng.integers(0, 64, (n, 32))) % 64


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    from transformers import AutoModelForCausalLM
    quiet(); make_deterministic(0, 1); d = tmp_path_factory.mktemp("weights")
    model = pretrain(demo_config(BaseSettings(hidden_size=16, layers=1, head_dim=8, state_size=4, chunk_size=8), 64), [{"input_ids": torch.from_numpy(np.concatenate([text(x, 8, 0) for x in STEPS]))}], 30, 2e-2)
    save_model(model, d/"base")
    for x in STEPS:
        m = AutoModelForCausalLM.from_pretrained(d/"base"); o = torch.optim.Adam(m.parameters(), 3e-3)
        for i in range(25): ids = torch.from_numpy(text(x, 8, 1 + i)); o.zero_grad(); m(input_ids=ids, labels=ids).loss.backward(); o.step()
        save_model(m, d/x); difference(d/"base", d/x, d/f"diff_{x}.npy")
    return Mixture(d/"base", {x: d/f"diff_{x}.npy" for x in STEPS})


def windows(seed, n=24): return {d: text(d, n, 1000 + seed) for d in STEPS}


def test_slopes_of_every_set_are_those_of_the_loss(mix):
    w, found = np.array([.3, .5, .2]), windows(0); losses, slopes = mixture_loss(mix, w, found); assert slopes.shape == (3, 3)
    for i in range(3):
        up, down = (mixture_loss(mix, w + s*.01*np.eye(3)[i], found, gradient=False)[0] for s in (1, -1))
        for row, d in zip(slopes, found): assert row[i] == pytest.approx((up[d] - down[d])/.02, abs=3e-3)


def test_never_worse_than_uniform_and_as_good_as_nelder_mead_at_half_the_cost(mix):
    "Each until it ends by itself; an evaluation with slopes counts as three without."
    found = windows(0); path = search_weights(mix, found); chosen = best(path)
    assert path[0]["weights"] == dict.fromkeys(STEPS, 1/3) and chosen["loss"] <= path[0]["loss"]
    plain = nelder_mead(mix, found, path[0]["weights"], 60); print(f"gradients {len(path)} evaluations, {chosen['loss']:.4f}; Nelder-Mead {len(plain)}, {best(plain)['loss']:.4f}")
    assert chosen["loss"] <= best(plain)["loss"] + .01 and 3*len(path) <= len(plain)/2 and len(plain) < 60



def test_two_draws_of_validation_text_agree(mix):
    every = windows(9, 64); ends = []
    for seed in (1, 2): w = best(search_weights(mix, windows(seed), 10))["weights"]; ends.append(mean(mixture_loss(mix, [w[d] for d in mix.names], every, gradient=False)[0]))
    assert abs(ends[0] - ends[1]) <= .01


def test_floor_and_retention(mix):
    found = windows(0); base, _ = mixture_loss(mix, [0, 0, 0], found, gradient=False)
    free = best(search_weights(mix, found, 10), Goal(base)); assert free["floor_met"]
    tight = Goal({**base, "a": free["losses"]["a"] - .03}, floor=.02)                                   # a must come down a little more than the mean wants
    kept = best(search_weights(mix, found, 16, goal=tight), tight)
    assert kept["losses"]["a"] < free["losses"]["a"] and max(tight.over(kept["losses"]).values()) <= max(tight.over(free["losses"]).values())
    hopeless = Goal({**base, "a": base["a"] - 9}); path = search_weights(mix, found, 6, goal=hopeless); worst = best(path, hopeless)
    assert not worst["floor_met"] and hopeless.score(worst["losses"]) <= hopeless.score(path[0]["losses"])
    general = {**found, "general": np.random.default_rng(3).integers(0, 64, (16, 32))}; base, _ = mixture_loss(mix, [0, 0, 0], general, gradient=False)
    lost = [best(search_weights(mix, general, 12, goal=g), g)["losses"]["general"] for g in (Goal(base), Goal(base, retention=5.))]
    assert lost[1] <= lost[0] + 1e-6


def test_a_short_search_that_went_too_far_comes_back_to_the_floor(mix):
    entry = lambda a, b, w: {"weights": {"x": w, "y": .5}, "loss": (a + b)/2, "losses": {"a": a, "b": b}}
    goal = Goal({"a": 1., "b": 1.}, floor=np.expm1(.05)); start = entry(1., 1., .2)
    np.testing.assert_allclose(at_the_floor([start, entry(.5, 1.1, .6), entry(.9, 1.06, .3)], goal), [.4, .5])    # half of the way to the better one
    assert at_the_floor([start, entry(.9, 1.04, .3)], goal) is None and at_the_floor([start, entry(1.2, 1.1, .3)], goal) is None
    found = windows(0); base, _ = mixture_loss(mix, [0, 0, 0], found, gradient=False); free = search_weights(mix, found, 8); equal, end = free[0]["losses"], best(free)["losses"]
    d = min(end, key=lambda d: end[d] - equal[d]); tight = Goal({**base, d: equal[d] + .3*(end[d] - equal[d])}, floor=0.).relaxed(equal)
    for n in (2, 3, 5):
        path = search_weights(mix, found, n, goal=tight); chosen = best(path, tight)
        assert max(tight.over(chosen["losses"]).values()) == 0 and len(path) <= n + 1 and tight.score(chosen["losses"]) <= tight.score(equal)


def test_goal_slopes():
    goal = Goal({"a": 1., "b": 1., "general": 1.}, floor=.02, retention=2.); losses = {"a": 1.2, "b": .9, "general": 1.5}; e = 1e-6
    value, slope = goal.value(losses, np.eye(3))
    for i, d in enumerate(losses): assert slope[i] == pytest.approx((goal.value({**losses, d: losses[d] + e}, np.eye(3))[0] - value)/e, rel=1e-3)
    assert goal.over(losses)["b"] == 0 and goal.over(losses)["a"] == pytest.approx(.2 - math.log1p(.02)) and goal.score(losses) == pytest.approx(1.05 + 1.)


def test_curves_pass_through_the_weights_found(mix):
    w = {"a": .4, "b": .3, "c": .6}; curves = weight_curves(mix, windows(0, 4), w, 3, 1.5)
    assert set(curves) == set(STEPS) and all(w[d] in [x for x, _ in points] and points == sorted(points) for d, points in curves.items())
    assert len({y for d, points in curves.items() for x, y in points if x == w[d]}) == 1


def test_advice():
    rows = mixture_advice({"a": .9, "b": .3, "c": 0.}, {"a": 10, "b": 10}); assert [r["advice"].split()[0] for r in rows] == ["more", "less", "less"] and rows[2]["share_of_tokens"] == 0
    assert sum(r["share_of_weights"] for r in rows) == pytest.approx(1) and advice_text(rows).count("\n") == 5
