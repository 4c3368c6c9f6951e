"""Figures in two languages: every label of phases 1 to 4 has its English, and an English report shows it."""
import ast, re

import fabricated, matplotlib.pyplot as plt, pytest
from matplotlib.text import Text
from yunmin_efficientdata.core import figures as G
from yunmin_efficientdata.core.settings import project_root
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report import phase, site as S

PACKAGE = project_root()/"yunmin_efficientdata"
HELPERS = ("_planted_points", "recall_notes", "_bars", "draw_figures", "axis_of_sizes", "REASONS", "STEPS")   # words that plots take from elsewhere


def labels(path):
    "Texts with Hangul in the plotting functions of a module; `{}` where an f-string has a value."
    def text(node):
        if isinstance(node, ast.JoinedStr): return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    def walk(node):
        if found := text(node): yield found
        elif not isinstance(node, ast.JoinedStr):
            for child in ast.iter_child_nodes(node): yield from walk(child)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else getattr(node, "name", "")
        if name.startswith("plot_") or name in HELPERS or (path.stem, name) == ("profile", "KINDS"): yield from (t for t in walk(node) if G.HANGUL.search(t))


@pytest.mark.parametrize("part", ["dedup", "format", "dem", "evaluation"])
def test_every_label_has_its_english(part):
    found = {(p.stem, t) for p in sorted((PACKAGE/part).glob("*.py")) for t in labels(p)}
    assert len(found) > 10
    left = [(m, t) for m, t in sorted(found) if G.HANGUL.search(G.in_english(t.replace("{}", "7")))]
    assert left == [], "add these to ENGLISH in nbs/00h_figures.ipynb"


def drawn(monkeypatch):
    "Collect the texts of every figure as it is written: [(key, texts)]."
    seen, real = [], G._png
    def spy(fig, dpi):
        png = real(fig, dpi)
        seen.append({t.get_text().strip() for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()})
        return png
    monkeypatch.setattr(G, "_png", spy)
    return seen


@pytest.fixture(autouse=True)
def style(): G.korean_style()


def test_a_figure_is_written_twice_and_the_korean_one_keeps_its_words(tmp_path, monkeypatch):
    store, seen = open_store(str(tmp_path)), drawn(monkeypatch); plt.close("all")
    fig, (ax, low) = plt.subplots(2, 1)
    ax.barh(["전체", "표본일보"], [1, 2], label="본문"); ax.set(title="사람이 매긴 점수 (세로선: 95 % 구간)", xlabel="기준 아래:\n쌍을 기록하지 않음"); ax.legend(title="모델"); fig.suptitle("병합 가중치")
    low.plot([1, 100], [1, 2]); low.set_xscale("log"); low.set_xticks([1, 100], ["1만", "100만"])
    G.save_figure(store, fig, "reports/figures/dem_x.png")
    korean, english = seen
    assert {"전체", "표본일보", "본문", "모델", "병합 가중치", "100만"} <= korean
    assert {t for t in english if G.HANGUL.search(t)} == {"표본일보"} and {"all", "text", "model", "Merge weights", "1000k"} <= english
    assert store.read("reports/figures/dem_x.png") != store.read("reports/figures/en/dem_x.png") and not plt.get_fignums()


def test_phase_4_draws_no_hangul_in_english(tmp_path, monkeypatch):
    "The figures of the tables that phase 4 writes, through matplotlib's own text objects."
    import pandas as pd
    from yunmin_efficientdata.evaluation import choices, harness, perplexity
    store, seen = open_store(str(tmp_path)), drawn(monkeypatch); fabricated.extras(store)
    table = lambda n: pd.read_csv(tmp_path/f"results/{n}.csv")
    plots = {"choices": choices.plot_choices(table("choices").query("model != 'web'")), "harness": harness.plot_harness(table("harness")), "pairs": perplexity.plot_pairs(table("perplexity_pairs"))}
    for name, fig in plots.items(): G.save_figure(store, fig, f"reports/figures/evaluation_{name}.png")
    assert len(seen) == 2*len(plots)
    for korean, english in zip(seen[::2], seen[1::2]):
        assert any(map(G.HANGUL.search, korean)) and not any(map(G.HANGUL.search, english)), english


def test_an_english_report_shows_the_english_figures(tmp_path):
    "Where a figure has two forms, each language links its own; both are in the site."
    ws = str(tmp_path/"ws"); store = fabricated.workspace(open_store(ws))
    store.write("reports/figures/en/dedup_rates.png", store.read("reports/figures/dedup_rates.png"))
    phase.run(ws, overrides=["report.site=false"]); ko = store.read_text("reports/report.md")
    phase.run(ws, overrides=["report.site=false", "report.language=en"]); en = store.read_text("reports/report.md")
    assert "(figures/dedup_rates.png)" in ko and "figures/en/" not in ko
    assert "(figures/en/dedup_rates.png)" in en and "(figures/dedup_rates.png)" not in en and "(figures/format_sizes.png)" in en, "a figure without words has one form"
    (tmp_path/"stage").mkdir(); S.stage(store, tmp_path/"stage", "en")
    for link in set(re.findall(r"\((figures/[^)]+)\)", (tmp_path/"stage/report.md").read_text())): assert (tmp_path/"stage"/link).is_file(), link
