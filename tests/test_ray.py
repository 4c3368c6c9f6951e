"""Ray on one node, on two nodes that share nothing but S3, with workers and a node killed: the same bytes as with local processes.

Minutes, and the environment that `scripts/setup_bench.sh ray` makes on top of .venv: `scripts/run_tests.sh -m slow -s tests/test_ray.py`;
with YUNMIN_CORPUS=FOLDER also what Ray costs on the development corpus, beside local processes."""
from __future__ import annotations
import contextlib, hashlib, json, os, secrets, shutil, socket, subprocess, sys, threading, time
from pathlib import Path
import pandas as pd, psutil, pytest
from conftest import KEY, SECRET
from yunmin_efficientdata.bench.harness import bench_folder
from yunmin_efficientdata.core.sample import write_sample
from yunmin_efficientdata.core.store import open_store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SETTINGS = ("dedup.part_bytes=131072", "dedup.contamination.sets=[]", "dedup.audit.planted=0", "logging.progress=false")
DATA = ("dedup_ready/", "minhash_lsh/", "deduped/")  # phase 2 gives small corpora to no worker: see SMALL in format.phase
PATIENT = {"RAY_raylet_start_wait_time_s": "60", "RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300", "OMP_NUM_THREADS": "1"}  # for a busy machine
KEYS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}  # each node has its own; they do not travel with tasks
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
    for n in range(4): write_sample(store, 150, seed=n//2, prefix=f"raw/{n}")
    return folder/"raw"

def yunmin(python, ws: str, raw: Path, *more: str, check=True, **env):
    "Phase 1 by the command line."
    command = [str(python), "-c", "from yunmin_efficientdata.cli import main; main()", "dedup", ws, "--raw", str(raw), *more, *(x for s in SETTINGS for x in ("--set", s))]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if check: assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
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
    "Nodes of one CPU each, started as on different machines: `ray start --head`, then `ray start --address`. Every process of it is known by the folder in its command line."
    def __init__(self, python: Path, folder: Path):
        self.ray, self.folder = python.parent/"ray", folder
        port, self.client = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.start("--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", "--include-log-monitor=false", f"--ray-client-server-port={self.client}", f"--temp-dir={folder}")
    def second(self) -> "Cluster":
        if len(self.raylets()) < 2: self.start(f"--address={self.address}")
        return self
    def start(self, *arguments, tries: int = 5) -> None:
        "A node; its own processes have some 15 s to answer, which a busy machine may not give them, so it is tried again."
        agents = [f"--{n}={p}" for n, p in zip(("metrics-export-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port"), free_ports(4))]
        known = {p.pid for p in self.processes()}
        done = subprocess.run([self.ray, "start", *arguments, *agents, "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"], capture_output=True, text=True, env=os.environ | PATIENT | KEYS | {"RAY_TMPDIR": str(self.folder)})
        if not done.returncode: return
        for p in self.processes():
            if p.pid not in known: end(p)
        assert tries > 1, done.stdout[-3000:] + done.stderr[-3000:]
        self.start(*arguments, tries=tries - 1)
    def processes(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if any(str(self.folder) in x for x in p.info["cmdline"] or ()) and p.pid != os.getpid()]
    def raylets(self) -> list[psutil.Process]:
        return sorted((p for p in self.processes() if p.info["cmdline"][0].endswith("/raylet")), key=lambda p: p.create_time())
    def workers(self) -> list[psutil.Process]:
        "Processes that run a task of ours just now."
        found = []
        for raylet in self.raylets():
            try: found += [p for p in raylet.children() if (p.cmdline() or [""])[0].startswith("ray::measured")]
            except psutil.Error: pass
        return found
    def stop(self) -> None:
        for p in [c for r in self.raylets() for c in r.children(recursive=True)] + self.processes(): end(p)

def end(process: psutil.Process) -> None:
    try: process.kill()
    except psutil.NoSuchProcess: pass

def free_ports(n: int) -> list[int]:
    taken = [socket.socket() for _ in range(n)]
    for s in taken: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in taken]
    for s in taken: s.close()
    return ports

@pytest.fixture(scope="module")
def cluster(python, tmp_path_factory):
    "A node for all tests; those that need a second one start it, and the last kills it."
    folder = Path("/tmp")/f"r{secrets.token_hex(3)}"  # a socket's path must be short
    made = Cluster(python, folder)
    yield made
    made.stop(); shutil.rmtree(folder, ignore_errors=True)

def patient(c: Cluster) -> dict: return {"RAY_ADDRESS": c.address, **PATIENT}

def test_one_node(python, raw, truth, tmp_path):
    "A Ray of this machine that the run starts and ends itself."
    yunmin(python, str(tmp_path/"ws"), raw, "--executor", "ray", "--workers", "2", **PATIENT)
    assert digests(str(tmp_path/"ws")) == truth

KILLER = """
import json, os, signal, sys
from pathlib import Path
import yunmin_efficientdata.core.executor as executor
once, stages = Path(sys.argv.pop(1)), json.loads(sys.argv.pop(1))
class Killed:
    "Runs a task in a worker, which dies by kill -9 in the middle of the stage's first task: once, or every time."
    def __init__(self, fn, mark): self.fn, self.mark, self.__name__ = fn, mark, executor.part_name(fn, 0).split(":")[0]
    def __call__(self, item):
        if self.mark and not os.path.exists(self.mark): open(self.mark, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
        if not self.mark and item["number"] == 3: os.kill(os.getpid(), signal.SIGKILL)
        return self.fn(item)
plain = executor.RayExecutor.map
def map(self, fn, items, desc=""):
    name = executor.part_name(fn, 0).split(":")[0]
    return plain(self, Killed(fn, stages[name] and str(once/name)) if name in stages else fn, items, desc)
executor.RayExecutor.map = map
import cloudpickle; cloudpickle.register_pickle_by_value(sys.modules["__main__"])
from yunmin_efficientdata.cli import main; main()
"""
STAGES = ("prepare_file", "prepare_range", "exact_part", "exact_partition", "sign_part", "join_partition", "verify_range", "fate_part", "write_part")

def killing(python, cluster, raw: Path, ws: Path, once: Path, stages: dict) -> subprocess.CompletedProcess:
    command = [str(python), "-c", KILLER, str(once), json.dumps(stages), "dedup", str(ws), "--raw", str(raw), "--executor", "ray", *(x for s in SETTINGS for x in ("--set", s))]
    return subprocess.run(command, env=os.environ | patient(cluster), capture_output=True, text=True)

def test_a_worker_dies_in_every_stage(python, raw, truth, tmp_path, cluster):
    "kill -9 of the worker in the middle of a task of prepare, sign, join, verify, write and the rest: run again elsewhere, same bytes."
    once = tmp_path/"once"; once.mkdir()
    done = killing(python, cluster, raw, tmp_path/"ws", once, dict.fromkeys(STAGES, True))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    died = sorted(p.name for p in once.iterdir())
    print(f"\nworkers killed in {', '.join(died)}")
    assert died == sorted(STAGES)
    assert digests(str(tmp_path/"ws")) == truth

def test_a_part_that_always_kills_its_worker_is_named(python, raw, tmp_path, cluster):
    "Bounded tries, one line that names the part; the same workspace goes on once the part is harmless."
    start = time.monotonic()
    done = killing(python, cluster, raw, tmp_path/"ws", tmp_path, {"sign_part": False})
    print(f"\n{done.stderr.strip().splitlines()[-1]}\n{time.monotonic() - start:.0f} s")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: sign_part: number 3: its worker died 4 times")

def test_errors_are_one_line(python, raw, tmp_path, cluster):
    done = yunmin(python, str(tmp_path/"a"), raw, "--executor", "ray", check=False, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2 and "RAY_ADDRESS=127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
    (tmp_path/"raw").mkdir(); (tmp_path/"raw"/"web.jsonl.gz").write_bytes(b"no gzip at all")
    done = yunmin(python, str(tmp_path/"b"), tmp_path/"raw", "--executor", "ray", check=False, **patient(cluster))
    local = yunmin(sys.executable, str(tmp_path/"c"), tmp_path/"raw", check=False)
    assert "Traceback" not in done.stderr and "ray::" not in done.stderr, done.stderr
    assert done.returncode == local.returncode == 2 and done.stderr.strip().splitlines()[-1] == local.stderr.strip().splitlines()[-1]

def test_a_client_outside_the_cluster(python, raw, truth, s3, cluster):
    yunmin(python, s3.uri, raw, "--executor", "ray", **PATIENT | {"RAY_ADDRESS": f"ray://127.0.0.1:{cluster.client}"})
    assert digests(s3.uri) == truth

def test_two_nodes_share_nothing_but_s3(python, raw, truth, s3, cluster):
    done = yunmin(python, s3.uri, raw, "--executor", "ray", **patient(cluster.second()))
    assert digests(s3.uri) == truth and "shared disk" not in done.stdout + done.stderr

class Watch(threading.Thread):
    "CPU seconds and peak resident memory of each process of a run, looked at from outside five times a second."
    def __init__(self, run: subprocess.Popen, cluster: Cluster | None):
        super().__init__(daemon=True)
        self.run_, self.cluster, self.seen, self.over = run, cluster, {}, threading.Event()
        self.look(); self.before = dict(self.seen)
    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            roots = [psutil.Process(self.run_.pid)] + (self.cluster.processes() if self.cluster else [])
            for p in [q for r in roots for q in (r, *r.children(recursive=True))]:
                with contextlib.suppress(psutil.Error, OSError):
                    command, times = " ".join(p.cmdline()), p.cpu_times()
                    role = "driver" if p.pid == self.run_.pid else "workers" if command.startswith(("ray::measured", "ray::IDLE")) or "spawn_main" in command else "rest"
                    peak = next((int(x.split()[1]) / 1024 for x in Path(f"/proc/{p.pid}/status").read_text().splitlines() if x.startswith("VmHWM")), None)
                    if peak: self.seen[p.pid] = role, times.user + times.system, peak  # a zombie has no memory left
    def run(self):
        while not self.over.wait(0.2): self.look()
    def of(self, role: str) -> tuple[float, float]: # CPU seconds since the start, peak MB of one process
        mine = {pid: x for pid, x in self.seen.items() if x[0] == role}
        return sum(x[1] - self.before.get(pid, (role, 0))[1] for pid, x in mine.items()), max((x[2] for x in mine.values()), default=0)

def timed(python, ws: str, raw: Path, cluster: Cluster | None, *more: str, **env) -> dict:
    "Phase 1 with its default settings: seconds, CPU seconds and peak memory by kind of process."
    start = time.monotonic()
    run = subprocess.Popen([str(python), "-c", "from yunmin_efficientdata.cli import main; main()", "dedup", ws, "--raw", str(raw), *more, "--set", "logging.progress=false"], env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(run, cluster); watch.start()
    said = run.communicate()[0]
    seconds = time.monotonic() - start
    watch.over.set(); watch.join()
    assert run.returncode == 0, said[-4000:]
    (driver, top), (workers, worker), (rest, _) = map(watch.of, ("driver", "workers", "rest"))
    return {"wall s": seconds, "CPU s": driver + workers + rest, "driver": driver, "workers": workers, "Ray itself": rest, "peak MB driver": top, "peak MB worker": worker}

def test_dev(python, corpus, tmp_path, cluster, s3):
    "What Ray costs on the development corpus beside local processes, in turns; the same bytes in all of them."
    if not (corpus/"dev").is_dir(): pytest.skip(f"{corpus}/dev does not exist")
    ray = ("--executor", "ray")
    ways = {"2 local processes": (None, ("--workers", "2"), {}), "Ray, 1 node of 2 CPUs": (None, (*ray, "--workers", "2"), PATIENT), "Ray, 2 nodes of 1 CPU": (cluster.second(), ray, patient(cluster)),
            "2 local processes, S3": (None, ("--workers", "2"), {}), "Ray, 2 nodes, S3 only": (cluster, ray, patient(cluster))}
    rows, found = [], {}
    for turn in range(int(os.environ.get("YUNMIN_REPEATS", "2"))):
        for name, (nodes, more, env) in ways.items():
            home, folder = s3.uri if "S3" in name else str(tmp_path), f"run{len(rows)}"; ws = f"{home}/{folder}"
            rows.append({"run": name} | timed(python, ws, corpus/"dev", nodes, *more, **env))
            found[name, turn] = digests(ws)
            print("\n" + ", ".join(f"{k} {v:,.1f}" if k != "run" else v for k, v in rows[-1].items()), flush=True)
            open_store(home).delete_prefix(folder)
    print("\nmedians of", 1 + turn, "\n" + pd.DataFrame(rows).groupby("run", sort=False).median().round(1).to_string())
    one = next(iter(found.values()))
    print(f"{len(one):,} files, SHA-256 of all: {hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:16]}, the same in {sum(x == one for x in found.values())} of {len(found)} runs")
    assert all(x == one for x in found.values())

def test_a_node_dies(python, raw, truth, tmp_path, cluster):
    "The second raylet is killed while its tasks run; they run again on the first. Last, for the cluster is not whole afterwards."
    c, ws, over = cluster.second(), tmp_path/"ws", threading.Event()
    def strike():
        while not over.wait(0.01):
            if c.workers(): c.raylets()[-1].kill(); return
    thread = threading.Thread(target=strike); thread.start()
    try: yunmin(python, str(ws), raw, "--executor", "ray", **patient(c))
    finally: over.set(); thread.join()
    assert len(c.raylets()) == 1 and digests(str(ws)) == truth
