"""Phase 5: the executive table, report.md in whole and in partial runs, and the site, on a fabricated workspace."""
import csv, json, math, re
from pathlib import Path

import fabricated, nbformat, pytest
from yunmin_efficientdata.core.settings import UserError, load_settings, project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report import facts as F, phase, site as S
from yunmin_efficientdata.report.figures import PLOTS, drawable
from yunmin_efficientdata.report.write import compose, escape

NBS = project_root()/"nbs"


@pytest.fixture
def store(tmp_path): return fabricated.workspace(open_store(str(tmp_path/"ws")))


def report(store, language="ko"): return compose(F.Facts(store), language, load_settings("configs/demo"))


# --- the executive table

def test_executive_table_recomputed_from_the_files(store):
    "Every number of the table, computed again here with csv and json only."
    table = F.executive(F.Facts(store)).set_index("id")
    log = [r for r in csv.DictReader(store.read_text("dedup_log.csv").splitlines()) if r["scope"] == "total"]
    summary = {(r["model"], r["domain"], r["metric"]): float(r["value"]) for r in csv.DictReader(store.read_text("results/metric_summary.csv").splitlines())}
    costs = json.loads(store.read_text("results/dem_costs.json"))
    dem = sum(c["seconds"] for c in costs["domains"].values()) + costs["search"]["seconds"] + costs["merge"]["seconds"]
    ratios = [math.log(summary["merged", d, "perplexity"]/summary["base", d, "perplexity"]) for d in fabricated.DOMAINS]
    expected = {
        "data": 100*(1 - int(log[-1]["bytes_out"])/int(log[0]["bytes_in"])), "cost_one": 100*(1 - dem/66), "cost_search": 100*(1 - dem/(12*66)),
        "loading": .91/.16, "windows": 3.01/.21, "memory": 85.0, "window_memory": 90.0, "choices": 10.0, "train": 16/3600, "five": sum(c["seconds"] for c in costs["domains"].values())/3600,
        "ppl": -100*(math.exp(sum(ratios)/len(ratios)) - 1), "bleu": 3.0, "prompts": 7.0, "errors": 100*2/202}
    assert {k: pytest.approx(table.value[k], rel=1e-4) for k in expected} == expected
    assert table.met.to_dict() == {"data": "no", "cost_one": "no", "cost_search": "yes", "loading": "yes", "windows": "yes", "memory": "yes", "window_memory": "yes", "choices": "no", "train": "yes", "vectors": "yes",
                                   "merge": "yes", "five": "yes", "ppl": "yes", "bleu": "yes", "prompts": "yes", "errors": "yes"}
    assert all(store.exists(s) for s in table.source)


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
    with pytest.raises(ValueError, match="results/gains.json: damaged"): F.executive(F.Facts(store))


# --- report.md

def test_report_of_a_whole_run(tmp_path):
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    counts = phase.run(ws, overrides=["report.site=false"])
    assert counts == {"no": 3, "yes": 13}
    text = store.read_text("reports/report.md")
    assert text.startswith("# YunMin-EfficientData 실행 보고서") and "시연 규모" in text and "1,234,567" in text
    figures = re.findall(r"!\[[^\]]+\]\((figures/[^)]+\.png)\)", text)
    assert len(figures) == 8 and all(store.exists(f"reports/{f}") for f in figures)
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


def test_no_prompts_and_one_domain_missing(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), domains=fabricated.DOMAINS[:4], prompts=False)
    table = F.executive(F.Facts(store)).set_index("id")
    assert table.met["prompts"] == "not measured" and "4개 도메인" in table.remark_ko["ppl"]
    assert "`results/gains.json` 파일이 없어" in report(store)


def test_a_merge_worse_than_the_base_is_said_plainly(tmp_path):
    store = fabricated.workspace(open_store(str(tmp_path)), merged=1.2)
    assert F.executive(F.Facts(store)).set_index("id").met["ppl"] == "no"
    assert "병합이 base보다 나쁩니다" in report(store) and "merging made it worse" in report(store, "en")
    assert "PPL 감소" in report(store).split("### 한계")[1].split("### 제안")[0] + report(store).split("## 1.")[1].split("## 2.")[0]


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
    assert drawable(F.Facts(store)) == list(PLOTS)
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
    for page in ("index", "report", "architecture", "tasks", "guide", "phases/01_dedup", "phases/05_report", "library/05c_site"): assert (site/f"{page}.html").is_file(), page
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
    phase.publish(open_store(str(ws)), load_settings("configs/demo", ["report.renderer=smalldocs"]))
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
    for t in tasks:
        for n in t["notebook"].split(): assert (NBS/f"{n}.ipynb").is_file(), (t["number"], n)
        for n in t["test"].split():
            file, _, name = n.partition("::"); path = project_root()/file
            assert path.is_file(), (t["number"], file)
            assert not name or f"def {name}(" in path.read_text(encoding="utf-8"), (t["number"], n)


def test_settings_name_the_section():
    assert load_settings("configs/demo").report.language == "ko"
    with pytest.raises(UserError, match="report.language"): load_settings("configs/demo", ["report.language=fr"])
