"The rating panel without a browser: blind, shuffled, saved at every click, resumed, several raters; agreement against published values and brute force."
from __future__ import annotations
import itertools, json, math, random
import numpy as np, pandas as pd, pytest
from yunmin_efficientdata.core.settings import UserError, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import rating
from yunmin_efficientdata.evaluation.prompts import CRITERIA, read_rubric

MODELS = ("base", "web", "merged", "mixed")
SLIPPERY = '<script>alert("x")</script>\n| a & b'

def rows(n=3, same=()): # prompts whose base and merged answers are the same text
    return [{"id": f"web-{i}", "domain": "web", "task": "요약", "prompt": f"글 {i} <b>", "reference": f" 답 {i}", "answers": {m: f"{'같은 글' if i in same and m in ('base', 'merged') else m[::-1] + '의 글'} {i}" for m in MODELS},
             "log_likelihood": {m: -3. + k + .01*i for k, m in enumerate(MODELS)}} for i in range(n)]

@pytest.fixture
def ws(tmp_path):
    store = open_store(str(tmp_path))
    write(store, rows()); return store

def write(store, items): store.write(rating.ANSWERS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in items))

@pytest.fixture(scope="module")
def rubric(): return read_rubric(open_store(str(project_root()/"configs")), "scoring_rules.yaml")

def panel(store, rater=None): return rating.RatingPanel(store.uri, rater)

def model_of(p, number): return p.items[p.at]["answers"][number]["models"]

def rate(p, points, prompts=1):
    "Click all buttons of some prompts; `points(models, criterion)`."
    for _ in range(prompts):
        for number in range(len(p.items[p.at]["answers"])):
            for c in CRITERIA: p.buttons[number][c].value = points(model_of(p, number), c)
        p.open.click()

def state(widget): return [str(widget.get_state())] + [s for child in getattr(widget, "children", ()) for s in state(child)]

# ---- order and blindness

def test_the_order_is_the_raters_own_and_the_same_every_time():
    items = rows(30)
    a, b = rating.blind_items(items, "지민"), rating.blind_items(items, "하나")
    assert a == rating.blind_items(items, "지민") and [i["id"] for i in a] != [i["id"] for i in b]
    assert sorted(i["id"] for i in a) == sorted(r["id"] for r in items)
    firsts = [i["answers"][0]["models"][0] for i in a + b]
    assert all(firsts.count(m) >= 5 for m in MODELS)                                     # no model has a place of its own

def test_the_order_of_answers_is_even_over_raters():
    first = [rating.blind_items(rows(1), f"r{i}")[0]["answers"][0]["models"][0] for i in range(400)]
    assert all(70 < first.count(m) < 130 for m in MODELS)

def test_no_model_shows_anywhere(ws):
    p = panel(ws, "지민")
    for _ in range(3):
        seen = " ".join(state(p.box))
        assert not any(m in seen.replace("border", "") for m in ("base", "merged", "mixed", "models")) and seen.count("web") == 1     # the domain of the prompt
        p.next.click()

def test_texts_are_escaped(ws):
    items = rows(1); items[0]["answers"]["base"] = SLIPPERY; write(ws, items)
    seen = " ".join(state(panel(ws, "지민").box))
    assert "<script>" not in seen and "&lt;script&gt;" in seen and "글 0 &lt;b&gt;" in seen

def test_anchors_are_at_every_button(ws, rubric):
    p = panel(ws, "지민")
    for c in CRITERIA: assert list(p.buttons[0][c].tooltips) == [f"{i}점: {rubric['criteria'][c]['anchors'][i]}" for i in range(1, 6)] and p.buttons[0][c].value is None

# ---- saving and resuming

def test_every_click_is_on_disk_at_once(ws):
    p = panel(ws, "지민")
    p.buttons[1]["tone"].value = 4
    saved = pd.read_csv(f"{ws.uri}/{rating.RATINGS}")
    assert list(saved.columns) == rating.RATING_COLUMNS and saved.tone.tolist() == [4] and saved.model.tolist() == model_of(p, 1) and saved.information.isna().all()
    p.buttons[1]["tone"].value = 2; p.buttons[1]["note"].value = "쉼표, 따옴표 \" 와\n줄바꿈"
    again = panel(ws, "지민")
    again.show([i["id"] for i in again.items].index(p.items[p.at]["id"]))
    assert (again.buttons[1]["tone"].value, again.buttons[1]["logic"].value) == (2, None) and "따옴표" in again.buttons[1]["note"].value
    assert "저장됨" in p.status.value

def test_a_closed_session_goes_on_where_it_stopped(ws):
    p = panel(ws, "지민"); rate(p, lambda m, c: 3, 2); done = [p.items[0]["id"], p.items[1]["id"]]
    p.buttons[0]["logic"].value = 5                                                      # a prompt begun and not finished
    again = panel(ws, "지민")
    assert again.items[again.at]["id"] == p.items[2]["id"] not in done and again.buttons[0]["logic"].value == 5 and again.bar.value == 2
    rate(again, lambda m, c: 3, 1)
    assert again.bar.value == 3 and "3 / 3" in again.status.value

def test_points_are_the_same_however_often_the_session_breaks(tmp_path):
    answers = lambda models, c: 1 + (len(models[0]) + len(c)) % 5
    files = []
    for every in (100, 1):
        store = open_store(str(tmp_path/str(every))); write(store, rows())
        for _ in range(3):
            p = panel(store, "지민"); rate(p, answers, min(every, 3))
            if p.bar.value == 3: break
        files.append(store.read(rating.RATINGS))
    assert files[0] == files[1]

def test_moving_does_not_save_and_stops_at_the_ends(ws):
    p = panel(ws, "지민"); p.before.click(); assert p.at == 0
    for _ in range(9): p.next.click()
    assert p.at == 2 and not ws.exists(rating.RATINGS)

def test_several_raters_do_not_touch_each_other(ws):
    a, b = panel(ws, "지민"), panel(ws, "하나")                                           # at the same time, in turns
    for _ in range(2): rate(a, lambda m, c: 2); rate(b, lambda m, c: 4)
    table = rating.read_ratings(ws)
    assert table.groupby("rater").size().to_dict() == {"지민": 8, "하나": 8} and set(table[table.rater == "하나"].tone) == {4}
    assert len(ws.list(rating.FOLDER)) == 2

def test_the_same_text_of_two_models_is_shown_once_and_counts_for_both(tmp_path):
    store = open_store(str(tmp_path)); write(store, rows(2, same=(0, 1)))
    p = panel(store, "지민")
    assert all(len(i["answers"]) == 3 for i in p.items)
    rate(p, lambda m, c: 5 if "base" in m else 1, 2)
    table = rating.read_ratings(store)
    assert len(table) == 8 and (table[table.model.isin(["base", "merged"])].logic == 5).all() and (table[table.model == "mixed"].logic == 1).all()

def test_a_disk_that_does_not_take_the_points_is_said(ws, monkeypatch):
    p = panel(ws, "지민")
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(p.store.__class__, "write", full)
    p.buttons[0]["tone"].value = 3
    assert "저장하지 못했습니다" in p.status.value and "No space left" in p.status.value

def test_the_panel_asks_for_a_name_when_it_has_none(ws):
    p = panel(ws); p.name.value = "   "; p.go.click()
    assert "give a name" in p.box.children[2].value
    p.name.value = " 지민 "; p.go.click()
    assert p.file.rater == "지민" and len(p.items) == 3

@pytest.mark.parametrize("name", ["", " ", "a\nb", "x"*41, " 지민"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="name of 1 to 40"): rating.rater_file(name)

@pytest.mark.parametrize("name", ["../../etc", "a/b", "A B", "A_B", "NA", "=1+1", "김하나"])
def test_any_printable_name_stays_in_its_folder_and_comes_back(ws, name):
    key = rating.rater_file(name)
    assert key.startswith(rating.FOLDER) and key.count("/") == 2 and ".." not in key
    rate(panel(ws, name), lambda m, c: 3)
    assert set(rating.read_ratings(ws).rater) == {name}

def test_names_that_look_alike_have_files_of_their_own(): assert len({rating.rater_file(n) for n in ("A B", "A_B", "A/B", "a b")}) == 4

def test_a_workspace_without_answers_is_one_line(tmp_path):
    with pytest.raises(UserError, match="yunmin evaluate"): rating.RatingPanel(str(tmp_path), "지민")

@pytest.mark.parametrize("text,word", [("rater,id\nx,y\n", "column 'answer' is missing"), (",".join(rating.RATING_COLUMNS) + "\nx,a,web,base,0,7,1,1,1,\n", "points must be")])
def test_a_damaged_file_is_one_line(ws, text, word):
    ws.write(rating.rater_file("지민"), text)
    with pytest.raises(UserError, match=word) as e: rating.RaterFile(ws, "지민")
    assert "\n" not in str(e.value)

def test_the_panel_works_on_s3(s3):
    store = open_store(s3.uri); write(store, rows(2))
    rate(rating.RatingPanel(s3.uri, "지민"), lambda m, c: 4, 1)
    assert rating.RatingPanel(s3.uri, "지민").bar.value == 1 and len(rating.read_ratings(open_store(s3.uri))) == 4

# ---- what the points say

def test_points_of_answers_that_changed_do_not_count(ws, rubric):
    rate(panel(ws, "지민"), lambda m, c: 4, 3)
    items = rows(); items[0]["answers"]["merged"] = "새 글"; items[1]["answers"].pop("mixed")
    table, old = rating.current_ratings(rating.read_ratings(ws), items, rubric)
    assert old == 2 and len(table) == 10 and (table.overall == 4).all()
    assert rating.current_ratings(rating.read_ratings(ws), [], rubric)[1] == 12

def test_means_by_model_and_paired_changes(ws, rubric):
    worth = {"base": 2, "web": 3, "merged": 4, "mixed": 5}
    rate(panel(ws, "지민"), lambda m, c: worth[m[0]], 3); rate(panel(ws, "하나"), lambda m, c: worth[m[0]] - (m[0] == "mixed"), 2)
    table, _ = rating.current_ratings(rating.read_ratings(ws), rows(), rubric)
    s = rating.rating_summary(table); s = s[s.criterion == "overall"].set_index("model")
    assert s.loc["base", "mean"] == 2 and s.loc["merged", "change"] == 2 == s.loc["merged", "change_low"] and pd.isna(s.loc["base", "change"])
    assert s.loc["mixed", "mean"] == pytest.approx((2*4.5 + 5)/3, rel=1e-5) and s.loc["mixed", "low"] <= s.loc["mixed", "mean"] <= s.loc["mixed", "high"] and (s.raters == 2).all() and (s.prompts == 3).all()
    assert rating.mean_points(table)[("web-0", "merged")] == 4

def test_an_unfinished_answer_has_no_overall_score_but_its_criteria_count(ws, rubric):
    p = panel(ws, "지민"); p.buttons[0]["logic"].value = 5
    table, _ = rating.current_ratings(rating.read_ratings(ws), rows(), rubric)
    assert rating.mean_points(table) == {} and list(rating.rating_summary(table).criterion) == ["logic"]

# ---- agreement

def brute(points, delta):
    "Alpha by its definition: mean disagreement within units over mean disagreement of all pairable values."
    units = [[v for v in u if not np.isnan(v)] for u in points.T]; units = [u for u in units if len(u) >= 2]
    values = [v for u in units for v in u]; n = len(values)
    seen = sum(sum(delta(a, b, values) for a, b in itertools.permutations(u, 2))/(len(u) - 1) for u in units)/n
    chance = sum(delta(a, b, values) for a, b in itertools.permutations(values, 2))/(n*(n - 1))
    return 1 - seen/chance

def ordinal(a, b, values):
    low, high = min(a, b), max(a, b)
    return (sum(low <= v <= high for v in values) - (values.count(a) + values.count(b))/2)**2 if a != b else 0

def test_alpha_equals_its_definition():
    rng = np.random.default_rng(0)
    for trial in range(40):
        points = rng.integers(1, 6, (rng.integers(2, 5), rng.integers(2, 12))).astype(float)
        points[rng.random(points.shape) < .25] = np.nan
        if ((~np.isnan(points)).sum(0) >= 2).sum() < 1 or len(np.unique(points[:, (~np.isnan(points)).sum(0) >= 2][~np.isnan(points[:, (~np.isnan(points)).sum(0) >= 2])])) < 2: continue
        assert rating.krippendorff_alpha(points, draws=0)[0] == pytest.approx(brute(points, ordinal), abs=1e-9)
        assert rating.krippendorff_alpha(points, "interval", draws=0)[0] == pytest.approx(brute(points, lambda a, b, _: (a - b)**2), abs=1e-9)

def test_alpha_of_the_published_example():
    x = np.nan
    paper = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3], [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x]], float)
    alpha, low, high, units = rating.krippendorff_alpha(paper)
    assert round(alpha, 3) == .815 and units == 11 and low < alpha <= high <= 1 and round(rating.krippendorff_alpha(paper, "interval", draws=0)[0], 3) == .849

@pytest.mark.parametrize("points,expected", [([[1, 2, 5], [1, 2, 5]], 1), ([[3, 3], [3, 3]], math.nan), ([[1, np.nan], [np.nan, 2]], math.nan), (np.zeros((0, 0)), math.nan), ([[1, 5], [5, 1]], -.5)])
def test_alpha_at_its_edges(points, expected): assert rating.krippendorff_alpha(np.array(points, float), "interval")[0] == pytest.approx(expected, nan_ok=True)

def test_raters_who_guess_have_no_agreement_and_those_who_see_the_same_have(rubric):
    rng = random.Random(0); truth = {(i, m): rng.randint(2, 4) for i in range(40) for m in MODELS}
    def table(noise):
        out = [{"rater": r, "id": f"web-{i}", "model": m, "answer": f"{i}{m}", **{c: min(5, max(1, truth[i, m] + noise())) for c in CRITERIA}} for r in ("a", "b", "c") for i in range(40) for m in MODELS]
        return pd.DataFrame(out).assign(overall=lambda t: t[list(CRITERIA)].mean(axis=1))
    close = rating.agreement_table(table(lambda: rng.choice((-1, 0, 0, 0, 0, 0)))).set_index("criterion")
    guess = rating.agreement_table(table(lambda: rng.randint(-4, 4))).set_index("criterion")
    assert (close.alpha > .6).all() and (guess.alpha < .35).all() and (close.within_one == 1).all() and close.units.iloc[0] == 160 and close.raters.iloc[0] == 3
    assert rating.reliability(.9) == "신뢰할 만함" and "부족" in rating.reliability(.5) and "잠정" in rating.reliability(.7) and "없음" in rating.reliability(math.nan)

def test_a_text_that_two_models_wrote_is_one_unit_of_agreement(tmp_path, rubric):
    store = open_store(str(tmp_path)); items = rows(2, same=(0, 1)); write(store, items)
    for r in ("a", "b"): rate(panel(store, r), lambda m, c: 2 + len(m), 2)
    table = rating.agreement_table(rating.current_ratings(rating.read_ratings(store), items, rubric)[0])
    assert (table.units == 6).all() and (table.same == 1).all()

def test_scorers_are_compared_by_what_they_say_about_a_change():
    people = {("p1", "base"): 2, ("p1", "merged"): 4, ("p2", "base"): 3, ("p2", "merged"): 2, ("p3", "base"): 3, ("p3", "merged"): 3, ("p4", "base"): 1, ("p4", "merged"): 5, ("p5", "merged"): 5}
    machine = {k: v*1. for k, v in people.items()} | {("p2", "merged"): 9.}
    t = rating.between_scorers({"people": people, "judge": people, "automatic": machine, "nobody": {}}).set_index(["first", "second"])
    assert t.loc[("people", "judge"), "spearman"] == 1 and t.loc[("people", "judge"), "same_sign"] == 1 and t.loc[("people", "judge"), "n"] == 4
    assert t.loc[("people", "automatic"), "same_sign"] == pytest.approx(2/3, rel=1e-5) and t.loc[("people", "automatic"), "signs"] == 3 and len(t) == 3

def test_the_figure_has_korean_names(rubric):
    import matplotlib.pyplot as plt
    from yunmin_efficientdata.core.figures import korean_style
    korean_style()
    s = pd.DataFrame([{"model": m, "criterion": c, "mean": 3, "low": 2.5, "high": 3.5} for m in MODELS for c in ("overall", *CRITERIA)])
    fig = rating.plot_ratings(s, rubric)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["종합", "정보성", "논리성", "간결성", "어조"]; plt.close(fig)
