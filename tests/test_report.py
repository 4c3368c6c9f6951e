"""Phase 5: the executive table, report.md in whole and in partial runs, and the site, on a fabricated workspace."""
import csv, json, os, re

import fabricated, nbformat, pytest, recompute
from yunmin_efficientdata.core.settings import UserError, load_settings, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report import facts as F, history as H, phase, site as S
from yunmin_efficientdata.report.api import module_page, package_modules
from yunmin_efficientdata.report.figures import PLOTS, drawable
from yunmin_efficientdata.report.page import escape
from yunmin_efficientdata.report.write import compose

NBS = project_root()/"nbs"
EVERY = ("dedup", "format", "dem", "evaluation", "ledger", "figures", "notebooks", "extras")


@pytest.fixture
def store(tmp_path): return fabricated.workspace(open_store(str(tmp_path/"ws")))


def report(store, language="ko"): return compose(F.Facts(store), language, load_settings("configs/demo"))


# --- the executive table

RUNS = {"whole": {}, "with the newer tables": {"parts": EVERY}, "a worse merge": {"merged": 1.2}, "no prompts, one domain less": {"domains": fabricated.DOMAINS[:4], "prompts": False},
        "only phase 1": {"parts": ("dedup", "ledger")}, "only evaluation": {"parts": ("evaluation",)}}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_executive_table_recomputed_from_the_files(tmp_path, options):
    "Every number and verdict of the table, computed again by a program that shares no code with the report (tests/recompute.py)."
    store = fabricated.workspace(open_store(str(tmp_path)), **options)
    text = F.executive(F.Facts(store)).to_csv(index=False)
    assert recompute.differences(tmp_path, list(csv.DictReader(text.splitlines()))) == []


def test_recomputing_would_find_a_wrong_number(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)))
    rows = list(csv.DictReader(F.executive(F.Facts(store)).to_csv(index=False).splitlines()))
    rows[0]["value"] = "12.5"; rows[1]["met"] = "yes"; rows[2]["source"] = "results/none.csv"
    assert [d.split(":")[0] for d in recompute.differences(tmp_path, rows)] == [r["id"] for r in rows[:3]]


@pytest.mark.skipif(not os.environ.get("YUNMIN_WORKSPACE"), reason="YUNMIN_WORKSPACE names no finished workspace")
def test_executive_table_of_a_real_run():
    ws = os.environ["YUNMIN_WORKSPACE"]
    assert recompute.differences(ws, recompute.table(ws, "results/executive.csv")) == []


def test_report_shows_the_numbers_of_the_table(store):
    "The executive table in report.md has a row for each row of executive.csv, with the same value, verdict and file."
    table = F.executive(F.Facts(store))
    for language in ("ko", "en"):
        lines = [l for l in report(store, language).splitlines() if l.startswith("| ")]
        rows = [[c.strip() for c in re.split(r"(?<!\\)\|", l)[1:-1]] for l in lines]
        for r, e in zip(table.itertuples(), F.EXPECTATIONS):
            row = next(x for x in rows if x[0] == (e.ko if language == "ko" else e.en) and len(x) == 5)
            assert row[2].replace("\u00a0", " ") == F.shown(r.value, r.unit, language), row
            assert row[3].replace("\u00a0", " ") == H.VERDICT[r.met][language == "en"].replace("\u00a0", " ") and f"`{r.source}`" in row[4]


def test_chance_is_named(store):
    "7 of 10 prompts may be luck: the verdict stands, the doubt beside it."
    table = F.executive(F.Facts(store)).set_index("id")
    assert table.met["prompts"] == "yes" and table.doubt["prompts"] == "yes" and table.doubt["ppl"] == "no"
    assert "우연과 구별되지 않음" in report(store) and "cannot be told from chance" in report(store, "en")
    assert "프롬프트" not in report(store).split("### 개선")[1].split("###")[0]


def test_a_change_whose_paired_interval_holds_zero_is_doubtful(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), parts=EVERY)
    assert F.executive(F.Facts(store)).set_index("id").doubt["ppl"] == "no"
    store.write("results/perplexity_pairs.csv", "model,against,domain,change,low,high\nmerged,base,mean,-7,-15,2\n")
    assert F.executive(F.Facts(store)).set_index("id").doubt["ppl"] == "yes"


def test_not_measured_is_never_a_verdict(tmp_path):
    table = F.executive(F.Facts(open_store(str(tmp_path))))
    assert set(table.met) == {"not measured"} and set(table.measured) == {""} and table.value.isna().all()


def test_a_domain_with_zero_perplexity_or_nan_does_not_crash(store):
    text = store.read_text("results/metric_summary.csv").replace("base,web,perplexity,120.0000", "base,web,perplexity,nan")
    assert text != store.read_text("results/metric_summary.csv")
    store.write("results/metric_summary.csv", text)
    assert F.change(F.Facts(store), "perplexity")[1] == 4
    report(store)


def test_a_damaged_file_is_named(store):
    store.write("results/gains.json", "{broken")
    with pytest.raises(UserError, match="results/gains.json: damaged"): F.executive(F.Facts(store))
    store.write("ledger/report.figures.json", b"[1]")
    assert F.Facts(store).json("ledger/report.figures.json") is None  # of this phase itself: it is written anew
    store.write("ledger/dedup.near.json", b"[1]")
    with pytest.raises(UserError, match="ledger/dedup.near.json: damaged"): F.Facts(store).json("ledger/dedup.near.json")


# --- report.md

def test_report_of_a_whole_run(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    counts = phase.run(ws, overrides=["report.site=false"])
    assert counts == {"no": 3, "yes": 13}
    text = store.read_text("reports/report.md")
    assert text.startswith("# YunMin-EfficientData 실행 보고서") and "시연 규모" in text and "1,234,567" in text
    figures = re.findall(r"!\[[^\]]+\]\((figures/[^)]+\.png)\)", text)
    assert len(figures) == 9 and all(store.exists(f"reports/{f}") for f in figures)
    assert [int(n) for n in re.findall(r"!\[그림 (\d+)\.", text)] == list(range(1, len(figures) + 1))
    for heading, n in (("### 개선", 3), ("### 한계", 2), ("### 제안", 2)):
        part = text.split(heading + "\n")[1].split("\n#")[0]
        assert len(re.findall(r"^\d\. ", part, re.M)) == n
    assert len([line for line in text.splitlines() if "질문" in line]) == 4 and "nan" not in text.lower().replace("nanum", "")
    assert "점검에서 한도를 넘은 값" in text
    assert not re.search(r"/(home|tmp|root|work)/", text)
    assert len(list(csv.DictReader(store.read_text("results/executive.csv").splitlines()))) == len(F.EXPECTATIONS)


def test_tables_keep_their_columns(store):
    "A prompt with `|` or a line break must not add a cell."
    for language in ("ko", "en"):
        block = []
        for line in [*report(store, language).splitlines(), ""]:
            if line.startswith("|"): block.append(len(re.findall(r"(?<!\\)\|", line)))
            elif block: assert len(set(block)) == 1, line; block = []


def test_english_on_request(store):
    text = report(store, "en")
    assert text.startswith("# YunMin-EfficientData: report of a run") and text.count("\n## ") == report(store).count("\n## ")
    assert not re.search("[가-힣]", re.sub(r"\|.*질문.*", "", text))


def test_same_files_same_report(store): assert report(store) == report(store)


@pytest.mark.parametrize("parts", [("dedup",), ("ledger",), ("dedup", "format"), ("dedup", "format", "dem", "ledger"), ("evaluation",)])
def test_partial_runs_say_what_is_missing(tmp_path, parts):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws), parts=parts)
    phase.run(ws, overrides=["report.site=false"])
    assert "측정 안 함" in store.read_text("reports/report.md") and "측정하지 못했습니다" in store.read_text("reports/report.md")


def test_an_empty_workspace_is_a_mistake_not_a_report(tmp_path):
    with pytest.raises(UserError, match="nothing has run"): phase.run(str(tmp_path/"ws"), overrides=["report.site=false"])
    assert not (tmp_path/"ws/reports/report.md").exists()


def first(text): return text.split("\n## ")[1]   # the section that everybody reads


def test_no_prompts_and_one_domain_missing(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), domains=fabricated.DOMAINS[:4], prompts=False)
    table = F.executive(F.Facts(store)).set_index("id")
    assert table.met["prompts"] == "not measured" and "4개 도메인" in table.remark_ko["ppl"]
    ko, en = report(store), report(store, "en")
    assert "`results/gains.json` 파일이 없어" in ko and "평가 프롬프트의 결과가 없습니다" in first(ko) and "다섯 도메인 가운데 `web`의 본문이 없습니다" in first(ko)
    assert "There are no evaluation prompts" in first(en) and "The corpus has no text of `web`" in first(en)


def test_a_domain_lost_on_the_way_is_named(store):
    costs = json.loads(store.read("results/dem_costs.json")); del costs["domains"]["social"]
    store.write("results/dem_costs.json", json.dumps(costs))
    assert "`social`: 형식 변환 뒤, 학습에서 빠졌습니다" in first(report(store)) and "`social`: missing after formatting, from training" in first(report(store, "en"))


def test_a_merge_worse_than_the_base_is_said_plainly(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), merged=1.2)
    assert F.executive(F.Facts(store)).set_index("id").met["ppl"] == "no"
    ko, en = report(store), report(store, "en")
    assert "병합 모델이 base보다 나쁩니다" in first(ko) and "merged model is worse than its base" in first(en)
    assert "병합이 base보다 나쁩니다" in ko and "merging made it worse" in en
    assert "20.0 % 높습니다" in ko.split("### 한계")[1].split("### 제안")[0].splitlines()[2], "the first limitation"
    assert "도메인 학습을 다시" in ko.split("### 제안")[1].split("\n## ")[0]


def test_phases_that_did_not_run_are_named(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), parts=("dedup", "ledger"))
    for k in store.list("ledger/"):
        if not k.startswith("ledger/dedup."): store.delete(k)
    assert "실행하지 않은 단계: 2 형식, 3 DEM, 4 평가" in first(report(store))


# --- the newer tables

def test_the_newer_tables_are_shown(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws), parts=EVERY)
    phase.run(ws, overrides=["report.site=false"])
    ko, en = store.read_text("reports/report.md"), report(store, "en")
    for text in ("### 병합 방법의 비교", "| seqmean | 0.76 |", "가장 나은 병합은 `seqmean`로 비율 **0.76**", "| 혼합 비율 탐색 (계산값) | 계산값 |", "| 도메인 학습: web | 측정 |", "학습 본문에 나타난 평가 문항은 3개", "검사하지 않은 묶음: `prompts`",
                 "| 과학 | 0.3 | 0.4 | 0.25 | 10 |", "kobest_copa", "데이터가 2배가 되면(거듭제곱 법칙) PPL이 9.5 % 낮아집니다", "**사람의 평가**: 2명", "| merged | 3 | 0 | 0 |", "| 평균 | -7.0\u00a0% |", "구별 안 됨"):
        assert text in ko, text
    assert "figures/report_methods.png" in ko and "figures/report_costs.png" in ko and drawable(F.Facts(store)) == [p for p in PLOTS if p != "history"]
    assert "학습 본문에 문항이 섞인 평가: `quiz`" in first(ko) and "Evaluations whose items occur in the training text: `quiz`" in first(en)
    assert not re.search("[가-힣]", "\n".join(l for l in en.splitlines() if "질문" not in l and "과학" not in l and "역사" not in l)) and "nan" not in ko.lower().replace("nanum", "")


def test_without_the_newer_tables_nothing_is_invented(store):
    text = report(store)
    assert "사람이나 심사 모델의 평가는 이 실행에 없습니다" in text
    for heading in ("병합 방법의 비교", "평가 문항의 오염", "lm-evaluation-harness\n", "데이터 양"): assert f"### {heading}" not in text


def test_fabricated_tables_have_the_columns_that_the_phases_write(tmp_path):
    "Else the tests above would prove nothing."
    from yunmin_efficientdata.dem.accounts import COST_COLUMNS, METHOD_COLUMNS
    from yunmin_efficientdata.evaluation import choices, data_curve, harness, inputs, judge, perplexity, rating
    store = open_store(str(tmp_path)); fabricated.extras(store)
    wanted = {"merge_methods": METHOD_COLUMNS, "cost_ledger": COST_COLUMNS, "perplexity_pairs": perplexity.PAIR_COLUMNS, "choices": choices.CHOICE_COLUMNS, "choices_by_subject": choices.CHOICE_COLUMNS, "contamination": inputs.CONTAMINATION_COLUMNS,
              "harness": harness.HARNESS_COLUMNS, "data_curve": data_curve.CURVE_COLUMNS, "ratings": rating.RATING_COLUMNS, "judge": judge.JUDGE_COLUMNS}
    assert {k: store.read_text(f"results/{k}.csv").splitlines()[0].split(",") for k in wanted} == {k: list(v) for k, v in wanted.items()}


# --- history

def rerun(ws, hour, **options):
    "Another run in the same workspace: a later ledger, other numbers, perhaps other settings."
    store = open_store(ws)
    fabricated.evaluation(store, merged=options.pop("merged", .93))
    for k in store.list("ledger/"):
        if k.count("/") == 1 and not k.startswith("ledger/report."):
            entry = json.loads(store.read(k)); store.write(k, json.dumps(entry | {"started": entry["started"].replace("T00:", f"T{hour:02d}:"), "fingerprint": f"{hour}{entry['fingerprint']}"[:16]}))
    return phase.run(ws, overrides=["report.site=false", *options.pop("overrides", [])])


def test_two_seeds_in_the_history(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"])
    assert "첫 실행이므로" in store.read_text("reports/report.md")
    rerun(ws, 5, merged=.98, overrides=["dem.lora.seed=1"])
    runs = H.kept_runs(F.Facts(store))
    assert [r["seeds"]["dem.lora.seed"] for r in runs] == [0, 1] and len({r["settings_fingerprint"] for r in runs}) == 2 and len({r["corpus_fingerprint"] for r in runs}) == 1
    text = store.read_text("reports/report.md"); part = text.split("## 8. ")[1].split("\n## ")[0]
    assert "| `dem.lora.seed` | 0 | 1 |" in part and "달라진 것: 설정." in part and "7.0\u00a0% | 2.0\u00a0% | ✓\u00a0충족 → ✗\u00a0미충족 |" in part and part.count("| `2026") == 2
    assert "figures/report_history.png" in part and store.exists("reports/figures/report_history.png")
    assert "dem.lora 0" in part and "dem.lora 1" in part
    old = store.read_text(f"reports/history/{runs[0]['run']}/report.md")
    assert "첫 실행이므로" in old and "7.0\u00a0%" in old, "the first run's report is kept as it was"
    assert recompute.table(ws, f"reports/history/{runs[1]['run']}/executive.csv") == recompute.table(ws, "results/executive.csv")


def test_the_same_run_is_kept_once(tmp_path):
    "Written again, in another language, or after a changed report setting: still the same run."
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"]); phase.run(ws, overrides=["report.site=false", "report.language=en"])
    assert len(H.kept_runs(F.Facts(store))) == 1 and "report of a run" in store.read_text("reports/report.md")
    assert "there is nothing to compare it with" in store.read_text("reports/report.md")


def test_a_run_that_only_took_longer_says_so(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"]); rerun(ws, 3)
    part = store.read_text("reports/report.md").split("## 8. ")[1]
    assert "없음 (시간 측정의 흔들림뿐입니다)" in part and "하나도 달라지지 않았습니다" in part


def test_history_pages(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"]); rerun(ws, 5, merged=.98, overrides=["dem.lora.seed=1"])
    (tmp_path/"stage").mkdir(); S.stage(store, tmp_path/"stage", "ko")
    names = [r["run"] for r in H.kept_runs(F.Facts(store))]
    page = (tmp_path/"stage/history.md").read_text()
    assert all(f"history/{n}.md" in page and (tmp_path/f"stage/history/{n}.md").exists() for n in names) and "report_history.png" in page
    assert "](figures/" not in (tmp_path/f"stage/history/{names[0]}.md").read_text()


def test_a_failed_stage_is_named(store):
    entry = json.loads(store.read("ledger/dem.merge.json")) | {"status": "failed", "error": "x"}
    store.write("ledger/dem.merge.json", json.dumps(entry))
    assert "끝나지 않은 작업**: `dem.merge`" in report(store)


def test_escape(): assert escape("a|b\n<b>*[x]($1)") == r"a\|b \<b\>\*\[x\](\$1)"


# --- ledger

def test_second_start_skips_and_a_changed_measurement_does_not(tmp_path, capsys):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"]); before = store.read("reports/report.md"); capsys.readouterr()
    phase.run(ws, overrides=["report.site=false"])
    assert store.read("reports/report.md") == before
    assert [json.loads(store.read(f"ledger/report.{s}.json"))["status"] for s in ("figures", "write")] == ["done", "done"]
    store.write("results/gains.json", json.dumps({"prompts": 10, "improved": 2, "gains": [], "losses": []}))
    assert phase.run(ws, overrides=["report.site=false"])["yes"] == 12


def test_figures_without_their_file_go(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    phase.run(ws, overrides=["report.site=false"])
    assert drawable(F.Facts(store)) == ["expectations", "funnel", "time", "loading", "perplexity"]
    store.delete("benchmark/io_speed_comparison.csv"); phase.run(ws, overrides=["report.site=false"])
    assert not store.exists("reports/figures/report_loading.png") and store.exists("reports/figures/report_time.png")


# --- site

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    ws = tmp_path_factory.mktemp("site")/"ws"
    fabricated.workspace(open_store(str(ws)))
    return ws, phase.run(str(ws), overrides=["report.renderer=smalldocs"])


def test_site_pages_and_links(built):
    ws, counts = built
    site = ws/"reports/site"
    assert counts["dead_links"] == 0 and S.dead_links(site) == []
    for page in ("index", "report", "architecture", "tasks", "guide", "phases/01_dedup", "phases/05_report", "library/05c_site", "history", "api/index", "api/dedup.minhash"): assert (site/f"{page}.html").is_file(), page
    assert 'lang="ko"' in (site/"index.html").read_text(encoding="utf-8") and (site/"figures/report_time.png").is_file()
    assert (site/"fonts/NanumGothic.ttf").stat().st_size < 2_000_000


def test_no_machine_in_the_site(built):
    ws, _ = built
    for path in (ws/"reports/site").rglob("*"):
        if path.suffix in (".html", ".json", ".xml", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            assert str(ws) not in text and str(project_root()) not in text and "jskim77" not in text, path
    executed = (ws/"reports/site/phases/01_dedup.html").read_text(encoding="utf-8")
    assert "#|" not in executed and "papermill" not in executed and "warning" not in re.sub(r"(?s)<(script|style).*?</\1>", "", executed).replace("cell-output", "")


def test_site_is_deterministic_and_replaced_as_a_whole(built):
    ws, _ = built
    site = ws/"reports/site"; read = lambda: {p.relative_to(site).as_posix(): p.read_bytes() for p in site.rglob("*") if p.is_file()}
    before = read(); (site/"old.html").write_text("left over")
    S.build_site(open_store(str(ws)), renderer="smalldocs")
    assert read() == before


def test_quarto_is_used_when_it_is_there(store, tmp_path, monkeypatch):
    "A stand-in for quarto on PATH: it gets the staged tree."
    bin = tmp_path/"bin"; bin.mkdir()
    (bin/"quarto").write_text('#!/bin/sh\n[ "$1" = render ] || exit 3\n[ -f _quarto.yml ] && [ -f report.md ] || exit 4\nmkdir _site && echo "<html>by quarto</html>" > _site/index.html\n'); (bin/"quarto").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    assert S.build_site(store)["renderer"] == "quarto" and "by quarto" in store.read_text("reports/site/index.html")


def test_quarto_asked_for_and_missing_is_one_line(store, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="not on PATH"): S.build_site(store, renderer="quarto")


def test_links_and_outputs_are_cleaned(store):
    nb = nbformat.reads(store.read_text("reports/runs/01_dedup.ipynb"), 4)
    page = S.clean_notebook(nb, "01_dedup", {})
    text = nbformat.writes(page)
    assert "jskim77" not in text and "stderr" not in text and '\\"../workspace\\"' in text
    assert S.relink("[a](x.ipynb) ![b](y.png)", "phases", {}) == "a ![b](y.png)"


# --- tasks and phase notebook

def test_tasks_name_what_exists():
    tasks = S.read_tasks(NBS)
    assert [t["number"] for t in tasks] == [f"R{i}" for i in range(1, 45)]
    assert [t["number"] for t in tasks if not (t["file"] and t["test"] and t["asked"] and t["asked_ko"])] == []
    for t in tasks:
        assert t["notebook"] or t["number"] == "R33", t["number"]   # tests are no notebook
        for n in t["notebook"].split(): assert (NBS/f"{n}.ipynb").is_file(), (t["number"], n)
        for n in t["test"].split():
            file, _, name = n.partition("::"); path = project_root()/file
            assert path.is_file(), (t["number"], file)
            assert not name or f"def {name}(" in path.read_text(encoding="utf-8"), (t["number"], n)


def test_settings_name_the_section():
    assert load_settings("configs/demo").report.language == "ko"
    with pytest.raises(UserError, match="report.language"): load_settings("configs/demo", ["report.language=fr"])


# --- reference, frame and language of the site

def test_reference_covers_every_public_name():
    modules = package_modules()
    assert {"core.store", "dedup.minhash", "format.loader", "dem.merge", "evaluation.perplexity", "report.write", "cli"} <= set(modules)
    page = module_page("dedup.minhash", modules["dedup.minhash"])
    assert "## `signatures`" in page and "num_perm" in page and "```python" in page
    assert "## `Store.exists`" not in module_page("core.store", modules["core.store"]).split("### `Store.exists`")[0]


def test_english_site_has_an_english_frame(store, tmp_path):
    (tmp_path/"stage").mkdir(); S.stage(store, tmp_path/"stage", "en")
    for name in ("_quarto.yml", "index.md", "architecture.md", "history.md", "api/index.md", "api/core.store.md"):
        text = re.sub(r"(?m)^#.*$|font-family=\"[^\"]*\"", "", (tmp_path/"stage"/name).read_text(encoding="utf-8"))
        assert not re.search("[가-힣]", text), (name, re.search(".*[가-힣].*", text)[0])
    assert "lang: en" in (tmp_path/"stage/_quarto.yml").read_text()


def test_no_notebook_shows_a_machine():
    "Outputs of all notebooks, committed: no absolute path of a home, a temporary or a work folder, and none is huge."
    for path in sorted(NBS.glob("*.ipynb")):
        nb = nbformat.read(path, 4)
        for c in nb.cells:
            for o in c.get("outputs", []):
                texts = [o.get("text", ""), *o.get("traceback", []), *(str(v) for k, v in o.get("data", {}).items() if not k.startswith("image/png"))]
                found = [m for t in texts for m in re.findall(r"(?<![\w.:/<>…-])/(?:home|Users|root|tmp|var|work|mnt)/[^\s\"'<>\\]+", t)]
                assert not found, (path.name, found[:3])
        assert path.stat().st_size < 2_500_000, path.name
