"""README.md from nbs/index.ipynb: Markdown cells as they are, code cells with their text output, pictures by their path from the project's root.

    python scripts/make_readme.py           write README.md
    python scripts/make_readme.py --check   exit 1 when README.md differs

`nbdev_readme` does the same through Quarto, which is not needed here.
"""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def code(cell):
    "A code cell as a fenced block, followed by its plain text output."
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    texts = [o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    output = "".join(texts).rstrip()
    return f"```python\n{source}\n```" + (f"\n\n```\n{output}\n```" if output else "")


def readme(notebook=ROOT/"nbs"/"index.ipynb"):
    "The text of README.md."
    cells = [c for c in nbformat.read(notebook, 4).cells if not re.search(r"^#\|\s*(hide|default_exp)", c.source, re.M)]
    text = "\n\n".join(c.source.strip() if c.cell_type == "markdown" else code(c) for c in cells)
    text = re.sub(r"(!\[[^\]]*\]\()(images/)", r"\1nbs/\2", text)
    text = re.sub(r"(\]\()(\d\d[a-z]?_\w+\.ipynb)", r"\1nbs/\2", text)
    return "<!-- generated from nbs/index.ipynb by scripts/make_readme.py: edit the notebook -->\n\n" + text + "\n"


if __name__ == "__main__":
    target, text = ROOT/"README.md", readme()
    if "--check" in sys.argv:
        sys.exit(0 if target.exists() and target.read_text(encoding="utf-8") == text else "README.md differs from nbs/index.ipynb: run python scripts/make_readme.py")
    target.write_text(text, encoding="utf-8")
