"Prompts side by side: the shipped prompts and rubric, the rule, the page, points of people and judge."
from __future__ import annotations
import json, math, re
import pandas as pd, pytest
from yunmin_efficientdata.core.settings import UserError, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.evaluation import inputs, prompts

TEXTS = {"web": ["지난 주말에 가족과 함께 바다에 다녀왔는데 날씨가 맑아서 아이들이 즐겁게 놀았습니다.", "노트북을 고를 때는 먼저 어디에 쓸 것인지 생각해 보는 것이 좋습니다."],
         "social": ["이 영화는 배우들의 연기도 좋고 음악도 좋아서 정말 재미있게 봤어요.", "배송은 빠른데 제품의 색이 사진과 조금 달라서 아쉬웠습니다."]}
ALL = [t for ts in TEXTS.values() for t in ts]

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

def test_an_answer_cannot_break_the_table():
    assert prompts.one_line("a|b\n# c <script>[x](y)") == r"a\|b \# c \<script\>\[x\](y)"
    rows = prompts.assemble([{"id": "1", "domain": "web", "prompt": "p|", "reference": "r\n"}], {m: {"1": {"answer": "x | y\n\nz", "log_likelihood": v}} for m, v in (("base", -2.), ("merged", -1.))})
    table = [l for l in prompts.prompt_block(1, rows[0]) if l.startswith("| base") or l.startswith("| merged")]
    assert len(table) == 2 and all(l.replace(r"\|", "").count("|") == 6 for l in table)

@pytest.mark.parametrize("n,needed", [(10, 6), (5, 3), (1, 1), (40, 24), (0, 0)])
def test_the_rule_is_a_share(n, needed):
    assert prompts.improved_rule([{"improved": True}]*n, {"improved": {"at_least": 6, "of": 10}})["needed"] == needed

def test_sentences_are_halved_without_loss():
    docs = [inputs.TestDocument(str(i), t) for i, t in enumerate(ALL)]
    for item in prompts.sentence_items("web", docs):
        assert any(item["prompt"] + item["reference"] in t for t in ALL) and item["reference"].startswith(" ")
    assert prompts.sentence_items("web", [inputs.TestDocument("c", "title: _isctype, iswctype, _isctype_l, _iswctype_l")]) == []

RUBRIC = {"criteria": {n: {"name": n, "question": "", "weight": w, "anchors": {i: f"{n} {i}" for i in range(1, 6)}} for n, w in zip(prompts.CRITERIA, (35, 30, 15, 20))}, "improved": {"at_least": 6, "of": 10}}

def made(gains, models=("base", "web", "merged", "mixed")):
    "Rows as the phase writes them, with these changes from base to merged."
    items = [{"id": f"p{i}", "domain": ("web", "social")[i % 2], "task": "요약", "index": i, "prompt": f"글 {i}", "reference": "답"} for i in range(len(gains))]
    return prompts.assemble(items, {m: {f"p{i}": {"answer": f"{m} {i}", "log_likelihood": -3. + g*(m == "merged")} for i, g in enumerate(gains)} for m in models})

def test_the_shipped_prompts_have_varied_tasks_and_the_first_ten_are_a_mix():
    rows = prompts.read_prompts(open_store(str(project_root()/"configs")), "eval_prompts.jsonl")
    assert len({r["task"] for r in rows}) >= 8 and sum(r["task"] != "이어쓰기" for r in rows) >= 15
    ten = prompts.spread(rows, 10)
    assert pd.Series([r["domain"] for r in ten]).value_counts().tolist() == [2]*5 and 3 <= sum(r["task"] == "이어쓰기" for r in ten) <= 7
    for r in rows:                                       # a reference continues the prompt: it starts with one space and is Korean prose
        assert re.fullmatch(r" \S(.*\S)?", r["reference"]) and prompts.is_korean(r["reference"]) and r["id"].rsplit("-", 1)[0] == r["domain"]
        assert not r["prompt"].endswith(" ") and len(r["prompt"]) < 400 and r["reference"].strip() not in r["prompt"]

def test_two_prompts_of_one_id_are_one_line_with_both_places(tmp_path):
    line = '{"id": "a", "domain": "web", "prompt": "p", "reference": "r"}\n'
    (tmp_path/"p.jsonl").write_text(line + line, encoding="utf-8")
    with pytest.raises(UserError, match="p.jsonl line 2: id 'a' was used in line 1"): prompts.read_prompts(open_store(str(tmp_path)), "p.jsonl")

def test_the_rule_has_an_interval_that_covers_the_share():
    found = prompts.improved_rule(made([.1]*6 + [-.1]*4), RUBRIC)
    assert found["met"] and found["low"] < .6 < found["high"] and .25 < found["low"] and found["high"] < .85
    none = prompts.improved_rule([], RUBRIC)
    assert (none["improved"], none["needed"], none["low"], none["high"]) == (0, 0, 0, 1)

def test_the_rule_by_points_counts_only_prompts_that_both_models_have():
    rows = made([.1, -.1, .1, .1])
    points = {("p0", "base"): 2., ("p0", "merged"): 3., ("p1", "base"): 3., ("p1", "merged"): 3., ("p2", "merged"): 5., ("p3", "base"): 1., ("p3", "merged"): float("nan")}
    rule = prompts.points_rule(rows, points, RUBRIC)
    assert (rule["prompts"], rule["improved"], rule["needed"], rule["met"]) == (2, 1, 2, False)
    assert prompts.points_rule(rows, {}, RUBRIC) is None

def test_the_overall_score_is_weighted_and_needs_every_criterion():
    assert math.isclose(prompts.overall(dict(zip(prompts.CRITERIA, (5, 1, 1, 1))), RUBRIC), 1 + 4*.35)
    for missing in (None, float("nan")): assert math.isnan(prompts.overall({**dict(zip(prompts.CRITERIA, (5, 5, 5))), "tone": missing}, RUBRIC))

def test_the_page_shows_rule_domains_changes_and_every_answer():
    rows = made([.5, -.4, .3, .2, -.1, 0.])
    gains = {"gains": [{"domain": "web", "prompt": "문장", "reference": "나머지", "base": "가", "merged": "나", "gain": .7}], "losses": []}
    points = {"people": {(r["id"], m): 2. + (m == "merged") for r in rows for m in ("base", "merged")}}
    page = prompts.comparison_page(rows, RUBRIC, ["uniform"], points, gains, ["메모 한 줄"])
    assert "프롬프트 6개 가운데 **3개 개선** (필요 4개, **미충족**" in page and "점수가 있는 프롬프트 6개 가운데 **6개 개선**" in page
    assert "심사 모델의 점수**: 이 실행에서는 아직 채점되지 않았습니다" in page and "메모 한 줄" in page and "빠진 모델: uniform" in page
    best, worst = page[page.index("### 프롬프트: 가장 뚜렷한"):page.index("### 프롬프트: 가장 나빠진")], page[page.index("### 프롬프트: 가장 나빠진"):page.index("### 시험 문서의 문장: 가장 뚜렷한")]
    assert [l.split("|")[2].strip() for l in best.splitlines() if l.startswith("| web") or l.startswith("| social")] == ["글 0", "글 2", "글 3"]
    assert [l.split("|")[2].strip() for l in worst.splitlines() if l.startswith("| web") or l.startswith("| social")] == ["글 1", "글 4"]
    assert "나머지" in page and page.count("| mixed |") == 6 and page.count("### p") == 0 and page.count("\n### ") == 4 + 6
    assert "나머지" not in prompts.comparison_page(rows, RUBRIC, [], points, None)          # no quotes of the corpus without gains

def test_every_table_of_the_page_has_as_many_cells_as_its_head():
    rows = made([.5, -.4])
    rows[0]["prompt"], rows[0]["answers"]["base"] = "a | b\n# c", "|x|\n|y|"
    for points in ({}, {"people": {("p0", "base"): 1., ("p0", "merged"): 2.}, "judge": {("p1", "base"): 1., ("p1", "merged"): 2.}}):
        lines, width = prompts.comparison_page(rows, RUBRIC, [], points).replace(r"\|", "").splitlines(), 0
        for before, line in zip([""] + lines, lines):
            if line.startswith("|"):
                if not before.startswith("|"): width = line.count("|")
                assert line.count("|") == width and line.endswith("|")
