"""Ray on one node, on two nodes that share nothing but S3, with workers and a node killed: the same bytes as with local processes.

Minutes, and the environment that `scripts/setup_bench.sh ray` makes on top of .venv: `scripts/run_tests.sh -m slow -s tests/test_ray.py`."""
from __future__ import annotations
import hashlib, os, secrets, signal, subprocess, sys, threading, time
from pathlib import Path
import psutil, pytest
from yunmin_efficientdata.bench.harness import bench_folder
from yunmin_efficientdata.core.sample import write_sample
from yunmin_efficientdata.core.store import open_store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PHASES = ("dedup", "format")
SETTINGS = ("dedup.part_bytes=65536", "tokenizer.vocab_size=600", "logging.progress=false")
DATA = ("dedup_ready/", "minhash_lsh/", "deduped/", "parquet_ready/", "tokenizer/")
TIMED = ("dedup_ready/audit.md", "dedup_ready/statistics.json")  # hold seconds

@pytest.fixture(scope="module")
def python():
    "Python of an environment that has Ray beside all of ours."
    made = subprocess.run([ROOT/"scripts"/"setup_bench.sh", "ray"], capture_output=True, text=True)
    found = bench_folder()/"ray"/"bin"/"python"
    assert found.exists() and not (bench_folder()/"ray.failed").exists(), made.stdout + made.stderr
    with pytest.MonkeyPatch.context() as patch:  # only these tests' drivers may join these tests' clusters
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0"); patch.setenv("RAY_AUTH_MODE", "token"); patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield found

@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    "A sample corpus of 20 files, each half of it twice."
    folder = tmp_path_factory.mktemp("ray")
    store = open_store(str(folder))
    for n in range(4): write_sample(store, 500, seed=n//2, prefix=f"raw/{n}")
    return folder/"raw"

def yunmin(python, ws: str, raw: Path, *more: str, check=True, **env):
    "Phases 1 and 2 by the command line, one process each."
    for phase in PHASES:
        command = [str(python), "-c", "from yunmin_efficientdata.cli import main; main()", phase, ws, *more]
        command += [x for s in SETTINGS for x in ("--set", s)] + (["--raw", str(raw)] if phase == "dedup" else [])
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        if check: assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        if done.returncode: break
    return done

def digests(ws: str) -> dict[str, str]:
    store = open_store(ws)
    return {k: hashlib.sha256(store.read(k)).hexdigest() for prefix in DATA for k in store.list(prefix) if k not in TIMED}

@pytest.fixture(scope="module")
def truth(raw, tmp_path_factory) -> dict[str, str]:
    "What local processes make of it."
    ws = str(tmp_path_factory.mktemp("local"))
    yunmin(sys.executable, ws, raw, "--workers", "2")
    found = digests(ws)
    assert len(found) > 20
    return found

class Cluster:
    "Nodes of one CPU each, started as on different machines: `ray start --head`, then `ray start --address`."
    def __init__(self, python: Path, nodes: int, folder: Path):
        self.ray, self.address, self.folder = python.parent/"ray", "127.0.0.1:26379", folder
        self.start("--head", "--port=26379", "--include-dashboard=false", "--ray-client-server-port=21001")
        for _ in range(nodes - 1): self.start(f"--address={self.address}")
    def start(self, *arguments) -> None:
        done = subprocess.run([self.ray, "start", *arguments, "--num-cpus=1", "--object-store-memory=100000000", f"--temp-dir={self.folder}" if "--head" in arguments else "--disable-usage-stats"],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(self.folder)})
        assert done.returncode == 0, done.stdout + done.stderr
    def raylets(self) -> list[psutil.Process]:
        return sorted((p for p in psutil.process_iter(["name"]) if p.info["name"] == "raylet"), key=lambda p: p.create_time())
    def workers(self) -> list[psutil.Process]:
        "Processes that run a task of ours just now."
        return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::measured")]
    def stop(self) -> None: subprocess.run([self.ray, "stop", "--force"], capture_output=True)

@pytest.fixture
def cluster(python, tmp_path_factory):
    made = []
    def make(nodes: int) -> Cluster:
        made.append(Cluster(python, nodes, Path("/tmp")/f"r{os.getpid()}-{len(made)}"))  # a socket's path must be short
        return made[-1]
    yield make
    for c in made: c.stop()

def test_one_node(python, raw, truth, tmp_path):
    yunmin(python, str(tmp_path/"ws"), raw, "--executor", "ray", "--workers", "2")
    assert digests(str(tmp_path/"ws")) == truth

def test_two_nodes_share_nothing_but_s3(python, raw, truth, s3, cluster):
    c = cluster(2)
    done = yunmin(python, s3.uri, raw, "--executor", "ray", RAY_ADDRESS=c.address)
    assert digests(s3.uri) == truth and "shared disk" not in done.stdout + done.stderr

def test_a_client_outside_the_cluster(python, raw, truth, s3, cluster):
    cluster(1)
    yunmin(python, s3.uri, raw, "--executor", "ray", RAY_ADDRESS="ray://127.0.0.1:21001")
    assert digests(s3.uri) == truth

def test_killed_workers(python, raw, truth, tmp_path, cluster):
    "One busy worker dies in every stage that has one, by kill -9."
    c, ws, killed, over = cluster(2), tmp_path/"ws", {}, threading.Event()
    def hunt():
        while not over.wait(0.01):
            for p in c.workers():
                log = ws/"pipeline_run.log"
                stage = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0  # a line a stage
                if stage in killed: continue
                try: p.send_signal(signal.SIGKILL); killed[stage] = p.pid
                except psutil.NoSuchProcess: pass
    hunter = threading.Thread(target=hunt); hunter.start()
    try: done = yunmin(python, str(ws), raw, "--executor", "ray", RAY_ADDRESS=c.address)
    finally: over.set(); hunter.join()
    print(f"\n{len(killed)} workers killed")
    assert len(killed) >= 4 and digests(str(ws)) == truth

def test_a_node_dies(python, raw, truth, tmp_path, cluster):
    "The second raylet is killed while its tasks run; they run again on the first."
    c, ws, over = cluster(2), tmp_path/"ws", threading.Event()
    def strike():
        while not over.wait(0.01):
            if c.workers(): c.raylets()[-1].kill(); return
    thread = threading.Thread(target=strike); thread.start()
    try: yunmin(python, str(ws), raw, "--executor", "ray", RAY_ADDRESS=c.address)
    finally: over.set(); thread.join()
    assert len(c.raylets()) == 1 and digests(str(ws)) == truth

def test_errors_are_one_line(python, raw, tmp_path):
    done = yunmin(python, str(tmp_path/"a"), raw, "--executor", "ray", check=False, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2 and "RAY_ADDRESS=127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
    (tmp_path/"raw").mkdir(); (tmp_path/"raw"/"web.jsonl.gz").write_bytes(b"no gzip at all")
    done = yunmin(python, str(tmp_path/"b"), tmp_path/"raw", "--executor", "ray", "--workers", "1", check=False)
    local = yunmin(sys.executable, str(tmp_path/"c"), tmp_path/"raw", check=False)
    assert done.returncode == local.returncode == 2 and done.stderr.strip().splitlines()[-1] == local.stderr.strip().splitlines()[-1]
