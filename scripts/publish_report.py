"""Copy the report of a workspace into reports/, as it is published with the project.

    python scripts/publish_report.py WS

report.md, its figures, the executive table as CSV and the executed phase notebooks, without paths of this machine. Where the corpus must not be quoted,
run the pipeline with `--set report.quotes=false` first.
"""
import re
import shutil
import sys
from pathlib import Path

import nbformat

from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report.site import PHASE_NOTEBOOKS, clean_notebook, machine_roots

ROOT = Path(__file__).resolve().parents[1]


def publish(workspace, target=ROOT/"reports"):
    "Replace the report in `target` by that of `workspace`; what other programs keep there stays."
    store = open_store(workspace)
    report = store.read_text("reports/report.md")
    for part in ("figures", "runs"): shutil.rmtree(target/part, ignore_errors=True); (target/part).mkdir(parents=True)
    (target/"report.md").write_text(report, encoding="utf-8")
    (target/"executive.csv").write_text(store.read_text("results/executive.csv"), encoding="utf-8")
    for name in sorted(set(re.findall(r"\]\(figures/((?:en/)?[\w.-]+)\)", report))):
        (target/"figures"/name).parent.mkdir(exist_ok=True); (target/"figures"/name).write_bytes(store.read(f"reports/figures/{name}"))
    for name in PHASE_NOTEBOOKS:
        notebook = nbformat.reads(store.read_text(f"reports/runs/{name}.ipynb"), 4)
        nbformat.write(clean_notebook(notebook, name, machine_roots(store)), target/"runs"/f"{name}.ipynb")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    publish(sys.argv[1])
