"""README.md is what nbs/index.ipynb gives, its pictures exist, and the commands that it names are real."""
import importlib.util, re

from yunmin_efficientdata.core.settings import project_root
from yunmin_efficientdata.report.drawing import flow_svg

ROOT = project_root()
spec = importlib.util.spec_from_file_location("make_readme", ROOT/"scripts/make_readme.py")
make_readme = importlib.util.module_from_spec(spec); spec.loader.exec_module(make_readme)
TEXT = (ROOT/"README.md").read_text(encoding="utf-8")


def test_readme_is_in_step_with_its_notebook(): assert TEXT == make_readme.readme(), "run python scripts/make_readme.py"


def test_picture_is_in_step_with_its_drawing(): assert (ROOT/"nbs/images/flow.svg").read_text(encoding="utf-8") == flow_svg("en")


def test_pictures_and_scripts_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(pictures) == 4
    for name in {*pictures, *re.findall(r"\bscripts/\w+\.sh", TEXT), *re.findall(r"\bconfigs/[\w-]+", TEXT)}: assert (ROOT/name).exists(), name
    assert sum((ROOT/p).stat().st_size for p in pictures) < 300_000


def test_every_yunmin_command_exists():
    from typer.main import get_command
    from yunmin_efficientdata.cli import app
    known = get_command(app).commands
    for command, rest in re.findall(r"yunmin (\w+)([^\n`]*)", TEXT):
        assert command in known, command
        entry = known[command]
        if hasattr(entry, "commands"): entry = entry.commands[rest.split()[0]]  # yunmin bench dedup
        options = {o for p in entry.params for o in p.opts}
        for option in re.findall(r"(?<=\s)--[a-z]+(?:-[a-z]+)*", rest.split("#")[0]): assert option in options, (command, option)


def test_both_languages(): assert "## 한국어 빠른 시작" in TEXT and "## Two commands" in TEXT
