"""Export the notebooks into a copy of the checkout and compare: the package must be what the notebooks say."""
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
package = "yunmin_efficientdata"

def differences(a: Path, b: Path):
    "Relative names of Python files that differ or exist on one side only."
    names = {p.relative_to(side).as_posix() for side in (a, b) for p in side.rglob("*.py")}
    return sorted(n for n in names if not ((a/n).is_file() and (b/n).is_file() and filecmp.cmp(a/n, b/n, shallow=False)))

with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder)
    for name in ("settings.ini", "setup.py"): shutil.copy(root/name, copy)
    shutil.copytree(root/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy/package).mkdir()
    done = subprocess.run([sys.executable, "-c", "from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=copy, capture_output=True, text=True)
    if done.returncode: sys.exit(f"the notebooks do not export:\n{done.stdout}{done.stderr}")
    if drift := differences(root/package, copy/package):
        sys.exit("the package differs from the notebooks; run nbdev_export and commit:\n  " + "\n  ".join(drift))
print("the package equals the notebooks")
