"""JupyterLab as `jupyter lab nbs` starts it: the right kernel, a notebook that runs, a page that a browser shows; phase notebooks run top to bottom."""
import json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import fabricated, nbformat, pytest
from browser import Browser, needed
from nbclient import NotebookClient
from yunmin_efficientdata.core.settings import project_root
from yunmin_efficientdata.core.store import open_store

NBS = project_root()/"nbs"
BIN = Path(sys.executable).parent
HOME = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")


class Lab:
    "A JupyterLab server on a free port, with a token and settings of its own."
    def __init__(self, folder):
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.token, env = secrets.token_hex(8), os.environ | {name: str(folder/name.lower()) for name in HOME}
        flags = [f"--port={self.port}", "--port-retries=0", "--ip=127.0.0.1", "--no-browser", "--allow-root", f"--IdentityProvider.token={self.token}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        self.log = open(folder/"log", "wb")
        self.process = subprocess.Popen([str(BIN/"jupyter"), "lab", str(NBS), *flags], stdout=self.log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    def get(self, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as r: return json.load(r)
    def wait(self, seconds=120):
        end = time.time() + seconds
        while time.time() < end:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-2000:]
            try: self.get("api/status"); return self
            except OSError: time.sleep(.3)
        raise AssertionError("JupyterLab did not start: " + Path(self.log.name).read_text()[-2000:])
    def stop(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    server = Lab(tmp_path_factory.mktemp("lab"))
    try: yield server.wait()
    finally: server.stop()


def test_the_kernel_is_the_projects_own(lab):
    specs = lab.get("api/kernelspecs")
    assert specs["default"] == "python3"
    command = specs["kernelspecs"]["python3"]["spec"]["argv"][0]
    assert Path(command).name.startswith("python") and (not Path(command).is_absolute() or Path(command).resolve() == Path(sys.executable).resolve()), command


def test_every_notebook_is_there_and_asks_for_that_kernel(lab):
    names = {c["name"] for c in lab.get("api/contents?content=1")["content"]}
    assert {p.name for p in NBS.glob("*.ipynb")} <= names
    for path in NBS.glob("*.ipynb"): assert nbformat.read(path, 4).metadata.kernelspec.name == "python3", path.name


def test_a_kernel_of_the_server_imports_the_package(lab):
    "A kernel started through the server's API runs in nbs/ with the package of this checkout."
    from jupyter_client import BlockingKernelClient
    request = urllib.request.Request(f"http://127.0.0.1:{lab.port}/api/kernels", data=json.dumps({"name": "python3", "path": "index.ipynb"}).encode(), headers={"Authorization": f"token {lab.token}", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as r: kernel = json.load(r)["id"]
    runtime = Path(lab.log.name).parent/"jupyter_runtime_dir"
    client = BlockingKernelClient(connection_file=str(runtime/f"kernel-{kernel}.json")); client.load_connection_file(); client.start_channels(hb=False)
    try:
        client.wait_for_ready(timeout=90)
        seen = []
        client.execute_interactive("import os, yunmin_efficientdata as y; print(os.path.basename(os.getcwd()), os.path.dirname(os.path.dirname(y.__file__)))", timeout=60, output_hook=lambda m: seen.append(m["content"].get("text", "")))
    finally: client.stop_channels()
    assert "".join(seen).split() == ["nbs", str(project_root())]


@needed
def test_the_page_opens_in_a_browser(lab, tmp_path):
    "The notebook is drawn, its kernel is the project's and gets ready."
    browser = Browser(tmp_path)
    try:
        browser.open(f"http://127.0.0.1:{lab.port}/lab/tree/05e_drawing.ipynb?token={lab.token}", 1400, 900, until="document.querySelectorAll('.jp-Notebook .jp-Cell').length > 3 && document.querySelector('.jp-Toolbar-kernelName')?.textContent.includes('Python 3')", seconds=120)
        assert "Python 3" in browser.run("document.querySelector('.jp-Toolbar-kernelName').textContent")
        assert "The drawing of the data's way" in browser.run("document.querySelector('.jp-Notebook').innerText")
        shot = browser.screenshot(tmp_path/"lab.png")
        if keep := os.environ.get("YUNMIN_SCREENSHOTS"): shutil.copy(shot, Path(keep)/"jupyterlab.png")
    finally: browser.close()


# --- phase notebooks, as a person runs them

def test_parameters_are_sensible_defaults():
    "The workspace beside nbs/, the demo settings, nothing else to fill in."
    for name in ("01_dedup", "02_format", "03_dem", "04_evaluation", "05_report"):
        cell = next(c for c in nbformat.read(NBS/f"{name}.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
        found = {}; exec(cell.source, found)
        assert {k: found[k] for k in ("workspace", "config", "raw", "overrides", "executor", "workers")} == {"workspace": "../workspace", "config": "configs/demo", "raw": None, "overrides": [], "executor": "local", "workers": 0}, name


def test_the_report_notebook_runs_top_to_bottom(tmp_path):
    "In a kernel with nbs/ as its folder, as JupyterLab would, on a workspace that somebody names in the parameters cell."
    fabricated.workspace(open_store(str(tmp_path/"ws")))
    nb = nbformat.read(NBS/"05_report.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('"../workspace"', repr(str(tmp_path/"ws"))).replace("overrides = []", 'overrides = ["report.site=false"]')
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NBS)}}).execute()
    shown = [o for c in nb.cells for o in c.get("outputs", [])]
    assert not [o for o in shown if o.output_type == "error"] and sum("image/png" in o.get("data", {}) for o in shown) >= 2
    assert any("YunMin-EfficientData" in str(o.get("data", {}).get("text/markdown", "")) for o in shown)


@pytest.mark.slow
def test_all_phase_notebooks_run_top_to_bottom(tmp_path):
    "The five, one after the other, with a micro training; progress bars and widgets are drawn as in JupyterLab."
    assert subprocess.run([str(BIN/"yunmin"), "sample", str(tmp_path/"ws"), "--docs", "600"], capture_output=True).returncode == 0
    from test_pipeline import MICRO
    for name in ("01_dedup", "02_format", "03_dem", "04_evaluation", "05_report"):
        nb = nbformat.read(NBS/f"{name}.ipynb", 4)
        cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = cell.source.replace('"../workspace"', repr(str(tmp_path/"ws"))).replace("overrides = []", f"overrides = {MICRO!r}")
        NotebookClient(nb, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(NBS)}}).execute()
        assert not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"], name
        assert re.search("image/png", json.dumps(nb)), name
