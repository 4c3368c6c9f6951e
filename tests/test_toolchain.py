"""The house rules, checked on the files themselves: notebooks, floors of the package, unsafe loading, secrets.

Each rule is a function that returns what it found wrong. It is run on the project, where it must find nothing,
and on a made-up offender, where it must find something: a rule that cannot fail proves nothing."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PHASES = ["01_dedup", "02_format", "03_dem", "04_evaluation", "05_report"]
PARAMETERS = ["workspace", "config", "raw", "overrides", "executor", "workers"]
FLOORS = {"core": set(), "dedup": {"core"}, "format": {"core"}, "dem": {"core", "format"}, "evaluation": {"core", "format"}, "report": {"core"}}
FORMAT_FOR_OTHERS = {"format.tokenizer", "format.loader", "format.pages"}  # what dem and evaluation may use of it
TOP = {"capacity", "pipeline", "cli", "bench"}                                         # stand on everything
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "yunmin_efficientdata").rglob("*.py") if "__pycache__" not in p.parts)
TEXT = {".py", ".sh", ".md", ".yaml", ".yml", ".ini", ".txt", ".csv", ".jsonl", ".json", ".ipynb", ".css", ".html", ".svg", ".example", ".toml", ""}


def project_files():
    "Every text file that is or could be committed, without what tools leave behind."
    for top in ["nbs", "yunmin_efficientdata", "tests", "scripts", "configs", "reports", ".ci"]:
        for p in sorted((ROOT / top).rglob("*")):
            if p.is_file() and p.suffix in TEXT and not {"__pycache__", ".ipynb_checkpoints", ".quarto"} & set(p.parts):
                yield p
    yield from (p for p in sorted(ROOT.iterdir()) if p.is_file() and p.suffix in TEXT and p.name not in (".env", ".git"))


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def notebook(*cells):
    "A made-up notebook of (type, source[, tags]) cells."
    return {"metadata": {}, "nbformat": 4, "nbformat_minor": 5, "cells": [
        {"cell_type": kind, "source": text, "metadata": {"tags": tags[0]} if tags else {}, "id": f"c{i}", **({"outputs": [], "execution_count": None} if kind == "code" else {})}
        for i, (kind, text, *tags) in enumerate(cells)]}


def code_cells(nb):
    return [c for c in nb["cells"] if c["cell_type"] == "code"]


def has_directive(text, name):
    return re.search(rf"^#\|\s*{name}\b", text, re.M) is not None


def parsed(cell):
    "Syntax tree of a code cell; shell and magic lines are blanked."
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M))


# --- notebooks -------------------------------------------------------------------------------------------------

def wrong_parameters(nb):
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells tagged parameters"]
    names = [t.id for node in parsed(tagged[0]).body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)]
    return [] if names == PARAMETERS else [f"parameters are {names}"]


def long_exports(nb, limit=60):
    return [f"{source(c).count(chr(10)) + 1} lines: {source(c)[:60]!r}" for c in code_cells(nb) if has_directive(source(c), "exporti?") and source(c).count("\n") + 1 > limit]


def forbidden_cells(nb):
    found = []
    for c in code_cells(nb):
        for node in ast.walk(parsed(c)):
            if isinstance(node, ast.Name) and node.id == "nbdev_export" or isinstance(node, ast.ImportFrom) and any(a.name == "nbdev_export" for a in node.names):
                found.append("nbdev_export")
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                found.append(f"import * from {node.module}")
        if re.search(r"^\s*!.*nbdev_export", source(c), re.M):
            found.append("nbdev_export in a shell line")
    return found


def prose_share(nb):
    "Prose cells for each code cell that a reader sees."
    shown = [c for c in code_cells(nb) if not has_directive(source(c), "hide") and not has_directive(source(c), "default_exp")]
    return sum(c["cell_type"] == "markdown" for c in nb["cells"]) / max(1, len(shown))


def head_wrong(nb):
    first = source(nb["cells"][0]) if nb["cells"] and nb["cells"][0]["cell_type"] == "markdown" else ""
    first = re.sub(r"\A---\n.*?\n---\n", "", first, flags=re.S)
    return [] if re.match(r"# \S.*\n+> \S", first) else ["does not begin with a title and a one-line quote"]


MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:home|root|tmp|work|Users|private|var/folders|usr/local/lib)/[\w.]+")


def machine_paths(nb):
    texts = [json.dumps(c["outputs"], ensure_ascii=False) for c in code_cells(nb)] + [source(c) for c in nb["cells"]]
    texts = [re.sub(r'"image/(png|jpeg)": "[^"]*"', "", t) for t in texts]
    return [m for t in texts for m in MACHINE_PATH.findall(t.replace("\\n", "\n"))]


def failed_cells(nb):
    return [source(c)[:60] for c in code_cells(nb) for o in c["outputs"] if o["output_type"] == "error"]


def not_clean(nb):
    "What nbdev_clean would take away: metadata, execution counts, widget state."
    found = [f"notebook metadata {k}" for k in nb["metadata"] if k != "kernelspec"]
    for i, c in enumerate(nb["cells"]):
        found += [f"cell {i} metadata {k}" for k in c["metadata"] if k != "tags"]
        if c["cell_type"] == "code":
            found += [f"cell {i} execution count"] if c["execution_count"] is not None else []
            found += [f"cell {i} output metadata {k}" for o in c["outputs"] for k in o.get("metadata", {})]
            found += [f"cell {i} output execution count" for o in c["outputs"] if o.get("execution_count") is not None]
    return found


def test_the_phase_notebooks_exist():
    assert [p for p in PHASES if not (ROOT / "nbs" / f"{p}.ipynb").exists()] == []
    assert len(NOTEBOOKS) > 25


@pytest.mark.parametrize("name", PHASES)
def test_one_parameters_cell(name):
    assert wrong_parameters(load(ROOT / "nbs" / f"{name}.ipynb")) == []


def test_only_phase_notebooks_have_parameters():
    assert [p.name for p in NOTEBOOKS if p.stem not in PHASES and any("parameters" in c["metadata"].get("tags", []) for c in load(p)["cells"])] == []


@pytest.mark.parametrize("rule", [long_exports, forbidden_cells, machine_paths, failed_cells, not_clean, head_wrong], ids=lambda r: r.__name__)
def test_notebooks_keep_the_rule(rule):
    assert {p.name: rule(load(p)) for p in NOTEBOOKS if rule(load(p))} == {}


def test_prose_is_at_least_a_third():
    assert {p.name: round(prose_share(load(p)), 2) for p in NOTEBOOKS if prose_share(load(p)) < 1 / 3} == {}


def test_nbdev_finds_nothing_to_clean():
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    allowed = set(get_config(path=ROOT).get("allowed_cell_metadata_keys", "").split())
    assert "tags" in allowed  # otherwise papermill loses its parameters cell
    for p in NOTEBOOKS:
        from execnb.nbio import dict2nb
        nb = dict2nb(load(p))
        before = [dict(c.metadata) for c in nb.cells]
        clean_nb(nb, allowed_cell_metadata_keys=allowed)
        assert [dict(c.metadata) for c in nb.cells] == before, p.name


LONG = "#| export\n" + "x = 1\n" * 60
OFFENDERS = [
    (wrong_parameters, notebook(("code", "workspace = 1", ["parameters"]), ("code", "config = 2", ["parameters"]))),
    (wrong_parameters, notebook(("code", "workspace = 'w'", ["parameters"]))),
    (wrong_parameters, notebook(("code", "workspace = 'w'"))),
    (long_exports, notebook(("code", LONG))),
    (forbidden_cells, notebook(("code", "from nbdev.export import nbdev_export"))),
    (forbidden_cells, notebook(("code", "import nbdev; nbdev_export()"))),
    (forbidden_cells, notebook(("code", "!nbdev_export"))),
    (forbidden_cells, notebook(("code", "from os.path import *"))),
    (machine_paths, notebook(("code", "open('/home/someone/x')"))),
    (head_wrong, notebook(("markdown", "Text without a title"))),
]


@pytest.mark.parametrize("rule,nb", OFFENDERS, ids=[f"{r.__name__}-{i}" for i, (r, _) in enumerate(OFFENDERS)])
def test_notebook_rules_can_fail(rule, nb):
    assert rule(nb)


def test_output_rules_can_fail():
    nb = notebook(("code", "x"), ("markdown", "p"))
    nb["cells"][0].update(execution_count=3, metadata={"papermill": {}}, outputs=[{"output_type": "error", "metadata": {"a": 1}, "traceback": ["File /tmp/abc/x.py"]}])
    nb["metadata"]["widgets"] = {}
    assert len(not_clean(nb)) == 4 and machine_paths(nb) == ["/tmp/abc"] and failed_cells(nb)
    assert not machine_paths(notebook(("markdown", "https://host/tmp/abc and ../tmp/abc and s3://bucket/work/x")))
    assert prose_share(notebook(("markdown", "p"), *[("code", "x")] * 4)) < 1 / 3 < prose_share(notebook(("markdown", "p"), ("code", "x"), ("code", "#| hide\ny")))


# --- floors ----------------------------------------------------------------------------------------------------

def our_imports(tree, module):
    "Dotted names below the package that a module imports anywhere, lazily too."
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = ([*base, node.module] if node.module else base) if node.level else [node.module]
            names = [".".join([*base, a.name]) for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            names = [str(node.args[0].value)]
        else:
            continue
        yield from (n.removeprefix("yunmin_efficientdata.") for n in names if n.startswith("yunmin_efficientdata."))


def upward_imports(text, module):
    floor = module.split(".")[1]
    if floor in TOP:
        return []
    found = []
    for name in our_imports(ast.parse(text), module):
        below = name.split(".")[0]
        if below in ("__version__", "_modidx", floor):
            continue
        if below not in FLOORS[floor]:
            found.append(name)
        elif below == "format" and ".".join(name.split(".")[:2]) not in FORMAT_FOR_OTHERS:
            found.append(name)
    return found


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_no_import_runs_upward():
    checked = [p for p in MODULES if p.name not in ("__init__.py", "_modidx.py")]
    assert len(checked) > 20 and {module_name(p).split(".")[1] for p in checked} == set(FLOORS) | TOP
    assert {module_name(p): u for p in checked if (u := upward_imports(p.read_text(encoding="utf-8"), module_name(p)))} == {}


@pytest.mark.parametrize("text,module", [
    ("from ..dedup.clean import x", "core.store"), ("from ..format.loader import x", "core.records"), ("from yunmin_efficientdata.dem.merge import merge", "format.pages"),
    ("def f():\n    import yunmin_efficientdata.report.phase", "evaluation.phase"), ("from ..format.parquet import write", "dem.phase"), ("from .. import cli", "report.site"),
    ("import importlib\nimportlib.import_module('yunmin_efficientdata.dem.base')", "dedup.phase")])
def test_floors_can_fail(text, module):
    assert upward_imports(text, f"yunmin_efficientdata.{module}")


def test_floors_allow_what_is_agreed():
    assert upward_imports("from ..core.store import x\nfrom ..format.loader import TokenLoader\nfrom .base import y", "yunmin_efficientdata.dem.lora") == []


# --- loading that could run code -------------------------------------------------------------------------------

def unsafe_loading(tree):
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: import {n}" for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")]
        if not isinstance(node, ast.Call):
            continue
        call, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        def says(key, value):
            return key in keywords and isinstance(keywords[key], ast.Constant) and keywords[key].value is value
        if call == "torch.load" and not says("weights_only", True):
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if "allow_pickle" in keywords and not says("allow_pickle", False):
            found.append(f"line {node.lineno}: {call} with allow_pickle")
        if call in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all") and "SafeLoader" not in ast.unparse(node):
            found.append(f"line {node.lineno}: {call}")
        if call in ("eval", "exec", "pd.read_pickle", "pandas.read_pickle", "torch.save"):
            found.append(f"line {node.lineno}: {call}")
        if "trust_remote_code" in keywords and not says("trust_remote_code", False):
            found.append(f"line {node.lineno}: {call} with trust_remote_code")
        if "shell" in keywords and not says("shell", False):
            found.append(f"line {node.lineno}: {call} with shell")
    return found


def python_files():
    "What ships and what runs; a test may pickle its own objects to see that workers can get them."
    return MODULES + sorted((ROOT / "scripts").glob("*.py")) + [ROOT / "setup.py"]


def test_nothing_loads_code():
    found = {str(p.relative_to(ROOT)): u for p in python_files() if (u := unsafe_loading(ast.parse(p.read_text(encoding="utf-8"))))}
    found.update({p.name: u for p in NOTEBOOKS if (u := [x for c in code_cells(load(p)) for x in unsafe_loading(parsed(c))])})
    assert found == {}


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "torch.load('x')", "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)", "np.load('x', allow_pickle=flag)", "yaml.load(f)",
    "yaml.load(f, Loader=yaml.Loader)", "import joblib", "eval('1')", "AutoModel.from_pretrained(p, trust_remote_code=True)", "subprocess.run(c, shell=True)"])
def test_unsafe_loading_can_fail(text):
    assert unsafe_loading(ast.parse(text))


def test_safe_loading_passes():
    assert unsafe_loading(ast.parse("torch.load('x', weights_only=True); np.load('x', allow_pickle=False); yaml.safe_load(f); yaml.load(f, Loader=yaml.SafeLoader); model.eval(); subprocess.run([c])")) == []


# --- secrets and machines --------------------------------------------------------------------------------------

SECRETS = re.compile("|".join([
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", r"-----BEGIN [A-Z ]*PRIVATE KEY-----", r"\bgh[pousr]_[A-Za-z0-9]{30,}", r"\bgithub_pat_\w{40,}", r"\bhf_[A-Za-z0-9]{30,}", r"\bsk-(?:proj-)?[A-Za-z0-9_-]{32,}",
    r"\bxox[abprs]-[A-Za-z0-9-]{20,}", r"\bAIza[0-9A-Za-z_-]{35}", r"(?i:aws_secret_access_key)\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b", r"\beyJ[\w-]{20,}\.eyJ[\w-]{20,}\.", r"://[^/\s:@'\"{}]+:[^/\s:@'\"{}<$]{6,}@"]))


def secrets(text):
    return [m[0][:12] + "…" for m in SECRETS.finditer(text)]


def test_no_secrets_in_files():
    files = list(project_files())
    assert len(files) > 80 and ROOT / "settings.ini" in files
    assert {str(p.relative_to(ROOT)): s for p in files if (s := secrets(p.read_text(encoding="utf-8", errors="replace")))} == {}


@pytest.mark.parametrize("text", [
    "AKIA" + "A1" * 8, "-----BEGIN RSA " + "PRIVATE KEY-----", "ghp_" + "a" * 36, "hf_" + "b" * 34, "sk-" + "c" * 40, "aws_secret_access_key = " + "d" * 40, "https://someone:" + "longsecret@host/x"])
def test_secrets_can_fail(text):
    assert secrets(text)


def test_env_file_is_ignored_and_example_is_empty_of_values():
    assert re.search(r"^\.env$", (ROOT / ".gitignore").read_text(), re.M)
    for line in (ROOT / ".env.example").read_text().splitlines():
        key, _, value = line.lstrip("# ").partition("=")
        if re.fullmatch(r"[A-Z_]*(SECRET|TOKEN|PASSWORD|KEY)[A-Z_]*", key):
            assert len(value.strip()) < 20, line.split("=")[0]


def test_configs_and_scripts_name_no_machine():
    files = [p for p in project_files() if p.relative_to(ROOT).parts[0] in ("configs", "scripts", "yunmin_efficientdata", ".ci") or p.suffix in (".ini", ".md")]
    found = {str(p.relative_to(ROOT)): MACHINE_PATH.findall(p.read_text(encoding="utf-8", errors="replace")) for p in files}
    assert {k: v for k, v in found.items() if v} == {}
