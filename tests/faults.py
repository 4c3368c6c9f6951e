"""Faults made on purpose: children that are killed at a chosen point, and a corpus so small that all five phases take seconds.

A parent imports everything once; each trial is a fork of it, so that it costs only its own work.
"""
import contextlib, errno, gzip, hashlib, importlib, io, json, os, re, shutil, signal, sys, tempfile, time, zlib
from pathlib import Path
from typing import Callable, NamedTuple

PHASES = {"dedup": "dedup", "format": "format", "dem": "dem", "evaluate": "evaluation", "report": "report"}  # command: its folder
MICRO = ["dedup.part_bytes=65536", "heldout.minimum_from=10", "heldout.minimum=4", "format.benchmark_repeats=1", "format.benchmark_rows=16", "tokenizer.vocab_size=512",
         "dem.domains=[main_data,web]", "dem.base.domains=[web]", "dem.base.steps=2", "dem.base.batch_size=2", "dem.base.hidden_size=32", "dem.base.layers=1", "dem.base.seq_len=32",
         "dem.lora.max_steps=2", "dem.lora.eval_steps=1", "dem.lora.checkpoint_steps=1", "dem.lora.batch_size=2", "dem.lora.seq_len=32", "dem.lora.r=2", "dem.seed_steps=1", "dem.polish_steps=1",
         "dem.merge.search_steps=1", "dem.merge.search_windows=2", "dem.merge.calibration_windows=2", "dem.merge.curve_points=0", "dem.merge.compare=[searched]", "dem.test_windows=2", "dem.threads=1",
         "evaluation.general_domains=[web]", "evaluation.max_documents=2", "evaluation.continuation_documents=1", "evaluation.max_prompts=1", "evaluation.max_new_tokens=2", "evaluation.max_questions=1",
         "evaluation.seq_len=32", "evaluation.stride=16", "evaluation.max_document_chars=200", "evaluation.inference.batches=[1]", "evaluation.inference.new_tokens=2", "evaluation.inference.repeats=1", "evaluation.inference.warmup=0",
         "evaluation.inference.peak_tflops=1", "evaluation.inference.peak_gb_per_s=1", "report.site=false"]
DATA = ("dedup_ready/", "minhash_lsh/", "deduped/", "parquet_ready/", "tokenizer/", "models/", "checkpoints/", "diff_vectors/", "diff_stats/", "merged_model/")
TABLES = ("results/metric_summary.csv", "results/perplexity.csv", "results/merge_weights.json", "results/eval_prompt_comparison.md", "results/eval_prompts.jsonl", "results/overlap.csv")
TIMED = ("dedup_ready/statistics.json", "dedup_ready/audit.md")  # hold speeds


# ---------------------------------------------------------------- a small world
def make_raw(folder, documents: int = 70) -> dict[str, int]:
    "raw/ with two domains, copies among them, and lines that are no documents: what should become of them, by name."
    from yunmin_efficientdata.core.sample import planned
    folder = Path(folder); (folder/"raw").mkdir(parents=True)
    lines = {"main_data": [], "web": []}
    for record, _ in planned(6 * documents, 0, .3):
        if record["domain"] in lines and len(lines[record["domain"]]) < documents: lines[record["domain"]].append(json.dumps(record, ensure_ascii=False))
    for some in lines.values(): some[5:5] = ['{"text": 7}', '{"text": "열린 줄', '{"text": "짧다"}']
    (folder/"raw/main_data.jsonl").write_text("\n".join(lines["main_data"]) + "\n", encoding="utf-8")
    with gzip.GzipFile(folder/"raw/web.jsonl.gz", "wb", mtime=0) as f: f.write(("\n".join(lines["web"]) + "\n").encode())
    return {"read": 2 * documents + 6}


def store_of(ws):
    from yunmin_efficientdata.core.store import open_store
    return open_store(str(ws))


def digests(ws) -> dict[str, str]:
    "SHA-256 of every data file, by key."
    store = store_of(ws)
    keys = [k for k in store.list("") if (k.startswith(DATA) and k not in TIMED) or k in TABLES]
    return {k: hashlib.sha256(store.read(k)).hexdigest() for k in keys}


def unlike(found: dict, wanted: dict) -> list[str]: # keys whose digests differ
    return sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))


def account(ws) -> str:
    "`read = kept + filtered + quarantined`, and `kept = exact + near + survivors`, as text; raises AssertionError when a sum is wrong."
    store = store_of(ws)
    t = json.loads(store.read("dedup_ready/manifest.json"))["total"]
    filtered, bad = sum(t["filtered"].values()), sum(t["quarantined"].values())
    assert t["read"] == t["kept"] + filtered + bad, t
    quarantined = sum(store.read(k).count(b"\n") for k in store.list("dedup_ready/quarantine/"))
    assert quarantined == bad, (quarantined, bad)
    text = f"{t['read']} read = {t['kept']} kept + {filtered} filtered + {bad} quarantined"
    if not store.exists("dedup_log.csv"): return text
    survivors = sum(store.read(k).count(b"\n") for k in store.list("deduped/"))
    ids = [json.loads(l)["id"] for k in store.list("deduped/") for l in store.read(k).splitlines()]
    assert len(ids) == len(set(ids)), "a document twice"
    import pyarrow.parquet as pq
    gone = sum(not keep for k in store.list("minhash_lsh/clusters/") for keep in pq.read_table(io.BytesIO(store.read(k)))["keep"].to_pylist())
    assert t["kept"] == gone + survivors, (t["kept"], gone, survivors)
    return text + f"; {t['kept']} = {gone} duplicates + {survivors} survivors"


# ---------------------------------------------------------------- children
class Outcome(NamedTuple):
    "How a child ended."
    code: int  # exit code; negative: the signal that killed it
    out: str
    err: str
    cpu: float = 0.  # seconds
    def said(self) -> str:  # what the user saw last
        return (self.err.strip() or self.out.strip()).rpartition("\n")[2]
    def row(self, fault: str, **more) -> dict:  # of the table
        broken = "Traceback" in self.out + self.err
        return {"fault": fault, "code": self.code, "said": (self.out + self.err)[-1200:] if broken else self.said() if self.code else "", "refused": self.refused(), "traceback": broken, "cpu": self.cpu} | more
    def refused(self) -> bool:  # one clear line, exit 2
        return self.code == 2 and self.err.startswith("error: ") and self.err.strip().count("\n") == 0 and "Traceback" not in self.out + self.err


def preload(phases=PHASES) -> None:
    "Import phases and what they import late; one thread each, so that a fork is safe."
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(name, "1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", YUNMIN_BATCH="1", COLUMNS="200")
    late = ["yunmin_efficientdata.cli", "encodings.utf_8_sig", "boto3", "botocore.session", "matplotlib.pyplot"] + [f"yunmin_efficientdata.{PHASES[p]}.phase" for p in phases]
    if "dem" in phases: late += ["accelerate", "peft", "safetensors.torch", "sacrebleu", "rouge_score.rouge_scorer", "torch._dynamo", "transformers.models.mamba2.modeling_mamba2", "transformers.models.auto.modeling_auto",
                                 "transformers.models.auto.tokenization_auto", "transformers.generation.utils"]
    for name in late: importlib.import_module(name)
    if "torch" in sys.modules: sys.modules["torch"].set_num_threads(1)
    import pyarrow as pa
    pa.set_cpu_count(1); pa.set_io_thread_count(1)


def in_child(work: Callable, timeout: float = 3000) -> Outcome:
    "Run `work` in a fork of this process, its output caught."
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(); sys.stderr.flush()
        pid = os.fork()
        if not pid: _live(work, out.fileno(), err.fileno())
        while not (done := os.wait4(pid, os.WNOHANG))[0]:
            if time.monotonic() > end: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); raise TimeoutError(f"a child still ran after {timeout} s: {_text(out)[-2000:]} {_text(err)[-2000:]}")
            time.sleep(.01)
        return Outcome(os.waitstatus_to_exitcode(done[1]), _text(out), _text(err), done[2].ru_utime + done[2].ru_stime)


def _text(file) -> str: file.seek(0); return file.read().decode(errors="replace")


def _live(work, out, err):
    "The child's life: never returns."
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(out, 1); os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False), open(2, "w", buffering=1, encoding="utf-8", closefd=False)
        try: work(); code = 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(); sys.stderr.flush()
    finally: os._exit(code)


def command(phase: str, ws, *more, workers: int = 1) -> None:
    "What `yunmin PHASE WS` does, with the micro settings; ends with SystemExit."
    from yunmin_efficientdata.cli import main
    sets = [x for m in MICRO for x in ("--set", m)]
    main([phase, str(ws), "--workers", str(workers), *sets, *more])


def run(phase: str, ws, *patches, timeout: float = 3000, workers: int = 1, more=()) -> Outcome:
    "A phase in a child; `patches` are called in the child first."
    def work():
        for patch in patches: patch()
        command(phase, ws, *more, workers=workers)
    return in_child(work, timeout)


# ---------------------------------------------------------------- points: every change that a run makes to a workspace
class Points:
    """Every change below a folder: a temporary file begun, a file or folder about to be published, a key about to be deleted.
    Between two points the disk holds one state (apart from how much of a temporary file is there), so that killing before each visits every state.
    """
    def __init__(self, ws, at: Callable[[str, str], None]): # at(stage, what) is called at each point
        self.root, self.at, self.stage, self.counts = os.path.realpath(ws), at, "before", {}
    def install(self):
        from yunmin_efficientdata.core import ledger, store
        self._wrap(os, "replace", lambda a, b: ("publish", b)); self._wrap(os, "rename", lambda a, b: ("publish", b) if ".ym-tmp-" not in str(b) else ("move away", a))
        self._wrap(os, "unlink", lambda a, dir_fd=None: ("delete", a if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), a))); self._wrap(os, "link", lambda a, b: ("publish", b))
        temporary, points = store._temporary, self
        @contextlib.contextmanager
        def begun(store, key, folder, is_folder):
            with temporary(store, key, folder, is_folder) as path:
                points.point("begin", os.path.join(points.root, key)); yield path
        store._temporary = begun
        run = ledger.Ledger.run
        def staged(self, name, *args, **kwargs):
            points.stage = name
            try: return run(self, name, *args, **kwargs)
            finally: points.stage = f"after {name}"
        ledger.Ledger.run = staged
    def _wrap(self, module, name, what):
        real = getattr(module, name)
        def wrapped(*args, **kwargs):
            self.point(*what(*args, **kwargs))
            return real(*args, **kwargs)
        setattr(module, name, wrapped)
    def point(self, kind, path):
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self.root + "/") or kind == "delete" and ".ym-tmp-" in path: return
        what = re.sub(r"\.ym-tmp-[0-9a-f]+", ".ym-tmp-#", f"{kind} {os.path.relpath(path, self.root)}")  # a temporary folder has another name each time
        n = self.counts[self.stage, what] = self.counts.get((self.stage, what), 0) + 1
        self.at(self.stage, what if n == 1 else f"{what} ({n})")


def die(): os.kill(os.getpid(), signal.SIGKILL)


def note_points(file):
    "For `Points`: write them down."
    def at(stage, what):
        with open(file, "ab", buffering=0) as f: f.write((json.dumps([stage, what], ensure_ascii=False) + "\n").encode())
    return at


def die_at_new(file, spared=frozenset()):
    "For `Points`: die at the first point that is neither in the file nor spared, after adding it."
    seen, add = {tuple(p) for p in noted(file)}, note_points(file)
    def at(stage, what):
        if (stage, what) not in seen and (stage, what) not in spared: add(stage, what); die()
    return at


def spared(points: list, most: int) -> set:
    "Points that are left out when about `most` are wanted: each stage keeps one of every kind of change to every kind of file in every folder, and then whichever come first by a hash of their names."
    def kind(p): folder, _, name = re.sub(r"main_data|web|[0-9a-f]{16}|\d+", "#", p[1]).rpartition("/"); return p[0], folder, name.partition(".")[2]
    first = {kind(p): tuple(p) for p in reversed(points)}
    rest = sorted({tuple(p) for p in points} - set(first.values()), key=lambda p: zlib.crc32(" ".join(p).encode()))
    return set(rest[max(0, most - len(first)):]) if most else set()


def die_at(stage, what):
    "For `Points`: die at this one."
    def at(s, w):
        if (s, w) == (stage, what): die()
    return at


def noted(file) -> list[list[str]]: return [json.loads(l) for l in open(file, "rb")] if os.path.exists(file) else []


# ---------------------------------------------------------------- kill -9
class World:
    "A folder for trials, and a workspace in which nothing went wrong, with a copy from before each stage."
    def __init__(self, folder, phases=PHASES):
        self.folder, self.clean, self.phases = Path(folder), Path(folder)/"clean", list(phases)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines = make_raw(self.clean)["read"]
        self.points, self.end = {}, {}
    def advance(self, phase: str) -> None:
        "Run the phases up to this one without faults, each once."
        for name in self.phases[:self.phases.index(phase) + 1]:
            if name in self.end: continue
            file = self.folder/f"points.{name}"
            shutil.copytree(self.clean, self.folder/"before"/name)
            done = run(name, self.clean, Points(self.clean, note_points(file)).install)
            assert done.code == 0, done.out + done.err
            self.points[name], self.end[name], self.account = noted(file), digests(self.clean), account(self.clean)
            say(f"clean {name}: {len(self.points[name])} points, {done.cpu:.1f} CPU s")
    def copy(self, phase: str, name: str) -> Path:  # a workspace as it was before a phase
        self.advance(phase)
        ws = self.folder/name
        shutil.rmtree(ws, ignore_errors=True); shutil.copytree(self.folder/"before"/phase, ws)
        return ws
    def differs(self, phase: str, ws) -> list[str]:  # what is not as after the clean run of a phase
        bad = unlike(digests(ws), self.end[phase]) + [str(p.relative_to(ws)) for p in Path(ws).rglob(".ym-tmp-*")] + store_of(ws).list("ledger/parts/")
        with contextlib.suppress(AssertionError):
            if account(ws) == account(self.clean) or phase == "dedup" and account(ws): return bad
        return bad + ["the account"]


def say(text): print(text, flush=True)


class Rows(list):
    "Rows of the table, told and written down as they come."
    def __init__(self, save: Callable): self.save = save
    def append(self, row): super().append(row); say(json.dumps(row, ensure_ascii=False)[:600]); self.save()


def kill_everywhere(world: World, rows: list, phases=PHASES, most: int = 0) -> None: # a row for each phase
    "One workspace walks through all phases and is killed at every point (or about `most` of each) of these, also in the runs that resume it."
    phases = list(phases); ws = world.copy(phases[0], "chain")
    for phase in phases:
        world.advance(phase)
        file, cpu, last, leave = world.folder/f"killed.{phase}", 0., None, spared(world.points[phase], most)
        while True:
            last = run(phase, ws, lambda: Points(ws, die_at_new(file, leave)).install()); cpu += last.cpu
            if last.code != -signal.SIGKILL: break
        points = noted(file); stages = {}
        for stage, _ in points: stages[stage.removeprefix("after ")] = stages.get(stage.removeprefix("after "), 0) + 1
        rows.append({"phase": phase, "kills": len(points), "points": len(world.points[phase]), "stages": stages, "code": last.code, "said": last.said(), "differs": world.differs(phase, ws) if last.code == 0 else ["not finished"], "account": account(ws) if last.code == 0 else "", "cpu": cpu})
        if last.code: break


# ---------------------------------------------------------------- a bad network before a good server
ERRORS = {"500": (500, "InternalError"), "503": (503, "ServiceUnavailable"), "SlowDown": (503, "SlowDown"), "ExpiredToken": (400, "ExpiredToken"), "AccessDenied": (403, "AccessDenied"), "skew": (403, "RequestTimeTooSkewed")}
READS, WRITES = ("GET object", "GET range"), ("PUT object", "PUT part", "POST complete")


class Proxy:
    """An HTTP proxy in a process of its own that passes requests to an S3 server and does to some of them what its plan says.

    A plan: {"fault": name, "ops": [which requests; all], "key": part of the key, "each": True: the first try of every request, else "from" and "count" of the matching ones}.
    Faults: the names of ERRORS; drop (no answer, not passed on), lost (passed on, no answer), truncate, flip (a bit of the answer), flip up (of what is sent), stall, delay, twice.
    """
    def __init__(self, folder, backend: str): # http://host:port of the server
        import socket
        self.plan_file, self.log_file = Path(folder)/"plan.json", Path(folder)/"requests"
        self.plan(None)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.pid = os.fork()
        if not self.pid:
            try: _serve(self.socket, backend, self.plan_file, self.log_file)
            finally: os._exit(1)
    def plan(self, plan: dict | None) -> None:
        "From now on; the log begins anew."
        temp = self.plan_file.with_suffix(".new"); temp.write_text(json.dumps(plan or {}))
        with contextlib.suppress(FileNotFoundError): os.unlink(self.log_file)
        os.replace(temp, self.plan_file)
    def log(self) -> list[dict]: return noted(self.log_file)
    def hits(self) -> list[dict]: return [r for r in self.log() if r["fault"]]
    def stop(self): os.kill(self.pid, signal.SIGKILL); os.waitpid(self.pid, 0); self.socket.close()


def _operation(method: str, path: str, headers) -> str:
    query = path.partition("?")[2]
    if method == "GET": return "GET list" if "list-type" in query or "uploads" in query else "GET range" if headers.get("Range", "bytes=0-") != "bytes=0-" else "GET object"
    if method == "PUT": return "PUT part" if "partNumber" in query else "PUT object"
    if method == "POST": return "POST complete" if "uploadId" in query else "POST create" if "uploads" in query else "POST delete"
    return method


def _serve(listener, backend: str, plan_file: Path, log_file: Path):
    "The proxy's life."
    import ctypes, http.client, http.server, threading, random
    from urllib.parse import unquote, urlsplit
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the parent
    host, port = urlsplit(backend).hostname, urlsplit(backend).port
    state, lock = {"plan": {}, "stamp": None, "seen": set(), "n": 0}, threading.Lock()

    def choose(op, path, headers):
        "The fault for this request, if any; written down."
        with lock:
            if (stamp := os.stat(plan_file).st_ino) != state["stamp"]: state.update(plan=json.loads(plan_file.read_text()), stamp=stamp, seen=set(), n=0)
            plan, who, fault = state["plan"], (op, path, headers.get("Range")), None
            if plan and op in plan.get("ops", [op]) and plan.get("key", "") in unquote(path):
                if plan.get("each"): fault = None if who in state["seen"] else plan["fault"]
                elif plan.get("from", 0) <= state["n"] < plan.get("from", 0) + plan.get("count", 1): fault = plan["fault"]
                state["seen"].add(who); state["n"] += 1
            with open(log_file, "ab", buffering=0) as f: f.write((json.dumps({"op": op, "path": unquote(path), "range": headers.get("Range"), "fault": fault}, ensure_ascii=False) + "\n").encode())
            return fault

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def handle_one_request(self):
            try: super().handle_one_request()
            except OSError: self.close_connection = True
        def do(self):
            body = bytearray(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            op = _operation(self.command, self.path, self.headers)
            fault = choose(op, self.path, self.headers)
            if fault in ERRORS: return self.answer_error(*ERRORS[fault])
            if fault == "drop": self.close_connection = True; return
            if fault == "delay": time.sleep(random.random() / 5)
            if fault == "flip up" and body: body[len(body)//2] ^= 1
            for _ in range(2 if fault == "twice" else 1): got, data = self.forward(bytes(body))
            if fault == "lost": self.close_connection = True; return
            if fault == "flip" and data: data[len(data)//2] ^= 1
            self.send_response_only(got.status, got.reason)
            for k, v in got.getheaders():
                if k.lower() not in ("transfer-encoding", "connection", "content-length"): self.send_header(k, v)
            length = got.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length is not None and got.status != 204: self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD": return
            if fault in ("truncate", "stall"):
                self.wfile.write(data[:len(data)//2]); self.wfile.flush(); self.close_connection = True
                if fault == "stall": time.sleep(10)
                return
            self.wfile.write(data)
        def forward(self, body):
            connection = http.client.HTTPConnection(host, port, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for k, v in self.headers.items():
                    if k.lower() not in ("expect", "connection"): connection.putheader(k, v)
                connection.endheaders(body)
                got = connection.getresponse()
                return got, bytearray(got.read())
            except OSError: return self.gone()
            finally: connection.close()
        def gone(self): self.close_connection = True; raise ConnectionResetError("the server is gone")
        def answer_error(self, status, code):
            data = b"" if self.command == "HEAD" else f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>made by the proxy</Message></Error>'.encode()
            self.send_response_only(status, code); self.send_header("Content-Type", "application/xml"); self.send_header("Content-Length", str(len(data))); self.end_headers()
            self.wfile.write(data)
        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        def handle_error(self, request, address): pass
    server = Server(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close(); server.socket = listener
    server.serve_forever()
# ---------------------------------------------------------------- S3 through the proxy
class S3World:
    "A SeaweedFS server, the proxy before it, and a bucket with the raw files; a workspace in it is a prefix."
    def __init__(self, folder, server=None):
        from conftest import KEY, SECRET, S3Server
        self.folder = Path(folder); (self.folder/"s3").mkdir(parents=True)
        self.server = S3Server(self.folder/"s3").wait()
        self.proxy = Proxy(self.folder, self.server.endpoint)
        self.client = self.server.client(); self.client.create_bucket(Bucket="faults")
        for name in [n for n in os.environ if n.startswith("AWS_")]: del os.environ[name]
        os.environ.update(AWS_ENDPOINT_URL=self.proxy.endpoint, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
                          AWS_CONFIG_FILE=str(self.folder/"none"), AWS_SHARED_CREDENTIALS_FILE=str(self.folder/"none"), YUNMIN_SCRATCH=str(self.folder/"scratch"), YUNMIN_S3_TIMEOUT="2")
        self.local, self.number, self.end = self.folder/"clean", 0, {}
    def workspace(self) -> str:  # a fresh one with the raw files
        self.number += 1
        if not self.local.exists(): make_raw(self.local)
        for path in (self.local/"raw").iterdir(): self.client.put_object(Bucket="faults", Key=f"w{self.number}/raw/{path.name}", Body=path.read_bytes())
        return f"s3://faults/w{self.number}"
    def look(self, work):  # with the proxy's plan lifted, in a child: what `work` returns
        self.proxy.plan(None)
        done = in_child(lambda: print(json.dumps(work())))
        assert done.code == 0, done.err
        return json.loads(done.out.splitlines()[-1])
    def fresh_scratch(self): shutil.rmtree(self.folder/"scratch", ignore_errors=True)
    def finish(self, phases=("dedup", "format")):  # a run without faults
        self.ws = self.workspace()
        for phase in phases:
            done = run(phase, self.ws); assert done.code == 0, done.out + done.err
            self.end[phase] = self.look(lambda: digests(self.ws))
        self.account = self.look(lambda: account(self.ws))
        return self
    def differs(self, phase: str, ws: str) -> list[str]: return unlike(self.look(lambda: digests(ws)), self.end[phase])
    def accounted(self, ws: str) -> str: return self.account if self.look(lambda: account(ws)) == self.account else ""
    def stop(self): self.proxy.stop(); self.server.stop()


def through(world: S3World, plan: dict, phases=("dedup", "format"), name: str = "") -> list[dict]: # a row each phase
    "Phases through the proxy with a plan, one after another; a phase that is refused is run again without the plan."
    ws, rows = world.workspace(), []
    for phase in phases:
        world.fresh_scratch(); world.proxy.plan(plan)
        shown = done = run(phase, ws); hits, requests = len(world.proxy.hits()), len(world.proxy.log())
        world.proxy.plan(None)
        if done.code: done = run(phase, ws)
        rows.append(shown.row(name, phase=phase, hits=hits, requests=requests, cpu=shown.cpu, differs=[f"resumed: {done.said()}"] if done.code else world.differs(phase, ws), account="" if done.code else world.accounted(ws)))
        if done.code: break
    return rows



# ---------------------------------------------------------------- one verb of the store at a time
def verbs(store, folder) -> dict[str, tuple[Callable, Callable, Callable]]: # name: prepare, act, is the result right
    "What a store does, with ways to see whether it was done right; `prepare` and the last look see no faults."
    small, large = os.urandom(40_000), os.urandom(9 << 20)
    def write_all(key, data):
        with store.writer(key) as f:
            for i in range(0, len(data), 1 << 20): f.write(data[i:i + (1 << 20)])
    def output():
        with store.output("model") as p: p.mkdir(); (p/"a.bin").write_bytes(small); (p/"b.json").write_text("{}")
    def fetch(): return (store.fetch("model")/"a.bin").read_bytes()
    def stream():
        with store.open("k") as f: return b"".join(iter(lambda: f.read(7000), b""))
    ready = lambda: store.write("k", small)
    nothing = lambda: store.delete("k")
    return {"write": (nothing, lambda: store.write("k", small), lambda _: store.read("k") == small),
            "write in parts": (nothing, lambda: write_all("k", large), lambda _: store.read("k") == large),
            "output of a folder": (lambda: store.delete_prefix("model"), output, lambda _: store.read("model/a.bin") == small and store.exists("model/_COMMIT")),
            "read": (ready, lambda: store.read("k"), lambda got: got == small),
            "read_range": (ready, lambda: store.read_range("k", 1000, 5000), lambda got: got == small[1000:6000]),
            "open": (ready, stream, lambda got: got == small),
            "fetch": (output, fetch, lambda got: got == small),
            "list": (ready, lambda: store.list("k"), lambda got: got == ["k"]),
            "stat": (ready, lambda: store.size("k"), lambda got: got == len(small)),
            "delete": (ready, lambda: store.delete("k"), lambda _: not store.exists("k")),
            "put_if_absent": (nothing, lambda: store.put_if_absent("k", small), lambda got: got is True and store.read("k") == small),
            "replace_if": (ready, lambda: store.replace_if("k", small[::-1], store.stat("k").version), lambda got: got is True and store.read("k") == small[::-1])}


PROBES = ("500", "503", "SlowDown", "drop", "lost", "truncate", "stall", "flip", "flip up", "delay", "twice", "ExpiredToken", "skew")


def probe(proxy: Proxy, store, folder, faults=PROBES, only=None) -> list[dict]:
    "Every verb under every fault, which meets the first try of each request: `right`, `refused` with a line, `silent` (a wrong result), `traceback`; `-` where the fault met nothing."
    from yunmin_efficientdata.core.settings import UserError
    rows = []
    for name, (prepare, act, right) in verbs(store, folder).items():
        for fault in faults:
            if only and name not in only: continue
            proxy.plan(None); prepare(); shutil.rmtree(os.environ["YUNMIN_SCRATCH"], ignore_errors=True); forget_scratch()
            proxy.plan({"fault": fault, "each": True}); row = {"verb": name, "fault": fault, "said": ""}
            try: got = act(); row["end"] = None
            except UserError as e: row.update(end="refused", said=str(e))
            except Exception as e: row.update(end="traceback", said=f"{type(e).__name__}: {e}")
            row["hits"] = len(proxy.hits()); proxy.plan(None)
            if row["end"] is None: row["end"] = "right" if right(got) else "silent"
            rows.append(row)
    return rows


def forget_scratch():
    "Let go of what this process holds in scratch, as a new process would begin."
    from yunmin_efficientdata.core import store
    for entry in list(store._held): store._let_go(entry)


# ---------------------------------------------------------------- the machine itself: disk, clock, a second run, permissions
@contextlib.contextmanager
def small_disk(folder, size: str):
    "A file system of this size (root only)."
    import subprocess
    Path(folder).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try: yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(at: int):
    "A patch: from the `at`-th file that a run publishes or begins on, writing fails as on a full disk."
    def patch():
        from yunmin_efficientdata.core import store
        make, count = store._make_temporary, [0]
        def made(*args):
            count[0] += 1
            if count[0] >= at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return make(*args)
        store._make_temporary = made
    return patch


def small_files(limit: int):
    "A patch: no file may grow above this many bytes."
    def patch():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return patch


def jump(seconds: float, after: int = 0):
    "A patch: the clock (Python's, and the times of files that are written) jumps once it was asked `after` times."
    def patch():
        from yunmin_efficientdata.core import store
        real, real_ns, asked, replace = time.time, time.time_ns, [0], store._replace
        def shift():
            asked[0] += 1
            return seconds if asked[0] > after else 0
        time.time, time.time_ns = lambda: real() + shift(), lambda: real_ns() + int(shift() * 1e9)
        def replaced(temp, path):
            now = time.time_ns(); os.utime(temp, ns=(now, now))
            return replace(temp, path)
        store._replace = replaced
    return patch


def trial(world: World, fault: str, phase: str, *patches, name: str = "trial", heal: Callable | None = None, workspace=None) -> dict:
    "A phase under a fault, then (after `heal`) once more without: what was said, and whether the end is that of a clean run."
    ws = workspace or world.copy(phase, name)
    done = run(phase, ws, *patches)
    if heal and done.code: heal()
    again = run(phase, ws) if done.code else done
    well = again.code == 0
    return done.row(fault, phase=phase, end=again.code, differs=world.differs(phase, ws) if well else [again.said()], account=account(ws) if well else "")


def machine(world: World, rows: list, phases=("dedup", "format")) -> None:
    "Disk, clock, second run, permissions, on local workspaces."
    def add(*args, **kwargs): rows.append(trial(world, *args, **kwargs))
    for phase in phases:
        world.advance(phase)
        total = sum(w.startswith("begin") for _, w in world.points[phase])
        for share in (.02, .5, .95): add(f"disk full from {share:.0%} of the files on", phase, full_disk(max(1, int(total * share))))
        add("no file above 8 KB (RLIMIT_FSIZE)", phase, small_files(8192))
        for text, patch in (("a day ahead", jump(86400)), ("a day back", jump(-86400)), ("a day ahead in the middle", jump(86400, 20)), ("a day back in the middle", jump(-86400, 20))): add(f"clock {text}", phase, patch)
        ws = world.copy(phase, "jumped")
        stage, what = world.points[phase][len(world.points[phase])//2]
        run(phase, ws, jump(86400), Points(ws, die_at(stage, what)).install)
        add("killed with the clock a day ahead, resumed in the true time", phase, workspace=ws)
    if os.geteuid() == 0:
        for phase in phases:
            for size in ("300k", "900k"):
                with small_disk(world.folder/"disk", size) as change:
                    ws = world.folder/"disk"/"ws"
                    try: shutil.copytree(world.folder/"before"/phase, ws)
                    except (OSError, shutil.Error): continue
                    add(f"a file system of {size}", phase, workspace=ws, heal=lambda: change("size=200m"))
        with small_disk(world.folder/"disk", "200m") as change:
            ws = world.folder/"disk"/"ws"; shutil.copytree(world.folder/"before"/phases[0], ws)
            change("ro"); add("read-only file system", phases[0], workspace=ws, heal=lambda: change("rw"))
    ws = world.copy(phases[0], "foreign")
    def nobody(): os.chmod(ws, 0o755); os.setgroups([]); os.setgid(65534); os.setuid(65534)
    if os.geteuid() == 0: os.chmod(world.folder.parent, 0o755); add("a workspace of another user", phases[0], nobody, workspace=ws)
    two_at_once(world, rows, phases[0])


def two_at_once(world, rows, phase):
    "A second run while the first is at work; then a lock that a dead process left."
    from yunmin_efficientdata.core.context import workspace_lock
    ws = world.copy(phase, "two")
    with workspace_lock(store_of(ws)): second = run(phase, ws)
    rows.append(second.row("a second run at once", phase=phase, differs=[], untouched=True))
    (ws/".lock").write_text('{"pid": 1, "ho'); (ws/".lock.phase").write_text("")
    rows.append(trial(world, "torn lock of a dead process", phase, workspace=ws))


# ---------------------------------------------------------------- damaged files, and a ledger that is wrong
def flip(path, where: float = .5) -> None:
    "One bit of a file; its size and time stay, as when a disk decays."
    path, old = Path(path), os.stat(path)
    data = bytearray(path.read_bytes()); data[min(len(data) - 1, int(len(data) * where))] ^= 4
    with open(path, "r+b") as f: f.write(data)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def ledgers(world: World, rows: list, phases=("dedup",)) -> None:
    "A ledger that is ahead of the files, behind them, cut off, or not JSON. A phase that is refused because the earlier ones are not recorded is run after them."
    def each(folder, what):
        for p in sorted(folder.rglob("*")):
            if p.is_file(): what(p)
    def cut(p): os.truncate(p, p.stat().st_size // 2)
    ahead = {"ledger ahead: spilled files are gone": lambda ws: shutil.rmtree(ws/"minhash_lsh/spill", ignore_errors=True),
             "ledger ahead: signatures are gone": lambda ws: shutil.rmtree(ws/"minhash_lsh/signatures", ignore_errors=True)}
    wrong = {"ledger behind: its parts are gone": lambda ws: shutil.rmtree(ws/"ledger/parts", ignore_errors=True),
             "ledger gone altogether": lambda ws: shutil.rmtree(ws/"ledger"),
             "every record cut in half": lambda ws: each(ws/"ledger", cut),
             "every record empty": lambda ws: each(ws/"ledger", lambda p: os.truncate(p, 0)),
             "every record is JSON, but no record": lambda ws: each(ws/"ledger", lambda p: p.write_text("[1]"))}
    for phase in phases:
        world.advance(phase); points = [p for p in world.points[phase] if phase != "dedup" or p[0] == "dedup.near"]; at = points[len(points) * 2 // 3]
        for name, damage in (ahead | wrong if phase == "dedup" else wrong).items():
            ws = world.copy(phase, "ledger"); run(phase, ws, Points(ws, die_at(*at)).install); damage(ws)
            rows.append(trial(world, name, phase, workspace=ws, heal=lambda: [run(p, ws) for p in world.phases[:world.phases.index(phase)]]))


# ---------------------------------------------------------------- S3: whole phases under each fault, and a server that dies
PLANS = {"500 on the first try of every request": {"fault": "500", "each": True}, "503": {"fault": "503", "each": True}, "SlowDown": {"fault": "SlowDown", "each": True},
         "no answer, request not passed on": {"fault": "drop", "each": True}, "no answer, request carried out": {"fault": "lost", "each": True},
         "bodies cut in half": {"fault": "truncate", "each": True}, "a bit flipped in every answer's object": {"fault": "flip", "each": True, "ops": ["GET object", "GET range"]},
         "a bit flipped in everything sent": {"fault": "flip up", "each": True}, "answers in another order": {"fault": "delay", "each": True},
         "a stall in the middle of some bodies": {"fault": "stall", "from": 3, "count": 3, "ops": ["GET object", "GET range"]},
         "503 for good": {"fault": "503", "from": 40, "count": 10**9}, "credentials expire in the run": {"fault": "ExpiredToken", "from": 40, "count": 10**9}, "access is withdrawn in the run": {"fault": "AccessDenied", "from": 40, "count": 10**9},
         "every try of one object is flipped": {"fault": "flip", "from": 0, "count": 10**9, "ops": ["GET object", "GET range"], "key": "minhash_lsh/index/"}}


def s3_runs(folder, rows: list, phases=("dedup",), plans=PLANS) -> None:
    world = S3World(folder)
    try:
        world.finish(phases)
        if len(plans) == len(PLANS): s3_doors(world, rows, phases[0]); s3_deaths(world, rows, phases[0])
        for name, plan in plans.items():
            for row in through(world, plan, phases, name): rows.append(row)
    finally: world.stop()


def s3_deaths(world: S3World, rows: list, phase: str, times: int = 3) -> None:
    "kill -9 of the run at its n-th changing request, and of the server in the middle of a run."
    ws, kills = world.workspace(), 0
    for n in range(times):
        def die_in_request(n=n):
            from botocore.client import BaseClient
            real, count = BaseClient._make_api_call, [0]
            def call(self, name, params):
                if name in ("PutObject", "DeleteObject", "UploadPart", "CompleteMultipartUpload") and ".lock" not in params.get("Key", ""):
                    count[0] += 1
                    if count[0] == 12 * (n + 1): die()
                return real(self, name, params)
            BaseClient._make_api_call = call
        kills += run(phase, ws, die_in_request).code == -signal.SIGKILL
    rows.append(s3_end(world, phase, ws, run(phase, ws), f"kill -9 of the run at a request, {kills} times, then resumed"))
    import threading
    ws = world.workspace(); world.proxy.plan(None)
    def later():
        while len(world.proxy.log()) < 60: time.sleep(.2)
        world.server.process.kill(); world.server.process.wait()
    killer = threading.Thread(target=later, daemon=True)
    pid_before = world.server.process.pid
    done = in_child_while(lambda: command(phase, ws), killer)
    world.server.again()
    rows.append(s3_end(world, phase, ws, run(phase, ws) if done.code else done, "SeaweedFS killed in the run, started again", done))


def in_child_while(work, thread) -> Outcome:
    "The thread starts after the fork: a fork must not happen beside it."
    real = os.fork
    def fork():
        pid = real()
        if pid: thread.start()
        return pid
    os.fork = fork
    try: return in_child(work)
    finally: os.fork = real; thread.join(60)


def s3_end(world, phase, ws, done, name, first=None) -> dict:
    well = done.code == 0
    return (first or done).row(name, phase=phase, differs=world.differs(phase, ws) if well else [done.said()], account=world.accounted(ws) if well else "")


def s3_doors(world: S3World, rows: list, phase: str) -> None:
    "What cannot begin: wrong keys, no bucket, no such host, a second run, and a clock that S3 does not accept."
    ws = world.workspace(); world.proxy.plan(None)
    def env(**more):
        def patch(): os.environ.update(more)
        return patch
    def door(name, address, *patches):
        rows.append(run(phase, address, *patches).row(name, phase=phase, differs=[], untouched=True))
    door("wrong secret", ws, env(AWS_SECRET_ACCESS_KEY="wrong")); door("wrong key", ws, env(AWS_ACCESS_KEY_ID="wrong"))
    door("no such bucket", "s3://nothing-here/ws"); door("no such host", ws, env(AWS_ENDPOINT_URL="http://no-such-host.invalid:9")); door("nobody listens", ws, env(AWS_ENDPOINT_URL="http://127.0.0.1:9"))
    world.proxy.plan({"fault": "skew", "from": 0, "count": 10**9}); door("a clock that the server refuses", ws); world.proxy.plan({"fault": "ExpiredToken", "from": 0, "count": 10**9}); door("expired credentials from the start", ws); world.proxy.plan(None)
    world.client.put_object(Bucket="faults", Key=ws.split("/", 3)[3] + "/.lock", Body=json.dumps({"pid": 1, "host": "elsewhere", "token": "t", "boot": "other", "since": "now"}).encode())
    door("a second run at once, from another machine", ws)
    for days in (1, -1): door(f"the same with this machine's clock {days:+d} day", ws, jump(86400 * days))


# ---------------------------------------------------------------- the table
def anonymous(text) -> str: # no paths of the trial, no ports
    text = re.sub(r"\S*/faults-[^/ \"]*(?:/(?!(?:raw|dedup_ready|minhash_lsh|deduped|parquet_ready|tokenizer|models|checkpoints|results|reports|ledger)\b)[^/ :\"]+)*", "WS", re.sub(r"\x1b\[[0-9;]*m", "", str(text)))
    text = re.sub(r"/[^\s\"]*?/(?=(?:yunmin_efficientdata|configs|tests)/)", "", text)
    return re.sub(r"127\.0\.0\.1:\d{4,}", "127.0.0.1:PORT", text)


def cell(text) -> str: # of a Markdown table
    return " ".join(anonymous(text).replace("|", "\\|").split())[:260]


def ending(row: dict) -> str:
    if row["traceback"]: return "**traceback**"
    if row["code"] == 0: return "went on by itself"
    return "refused with one line, exit 2" if row["refused"] else f"**exit {row['code']}**"


def table(found: dict) -> str:
    "reports/faults.md from what the trials found."
    lines = ["# Faults injected", "", "Written by `scripts/run_faults.sh` from what its trials found; nothing here was typed by hand. Digests are SHA-256 of every data file, compared with a run in which nothing went wrong.", ""]
    if found.get("chain"):
        lines += ["## kill -9 at every checkpoint", "", "Before each file that is begun, published or deleted, the process is killed, also in the runs that resume; then one more run goes to the end.",
                  "Points are counted in a run in which nothing went wrong; resumed runs skip some of them. Where not all were tried: one of each kind of change, folder and kind of file in each stage, the rest chosen by a hash of their names.", "",
                  "| phase | killed at | of points | stages killed in | last run | data files after it | account |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {r['phase']} | {r['kills']} | {r['points']} | {len(r['stages'])} | {'exit 0' if not r['code'] else cell(r['said'])} | {'identical' if not r['differs'] else 'differ: ' + cell(', '.join(r['differs'][:5]))} | {cell(r.get('account', ''))} |" for r in found["chain"]]
        lines += [f"| all | {sum(r['kills'] for r in found['chain'])} | {sum(r['points'] for r in found['chain'])} | {sum(len(r['stages']) for r in found['chain'])} | | | |", ""]
    for key, title in (("ledgers", "A ledger that disagrees with the files"), ("machine", "Disk, clock, a second run, permissions"), ("s3", "S3 through a proxy before SeaweedFS")):
        if not found.get(key): continue
        lines += [f"## {title}", "", "| fault | what the user saw | how the run ended | data files, resumed where refused | account after it |", "|---|---|---|---|---|"]
        for r in found[key]:
            name = f"{r['fault']} ({r['phase']}" + (f"; {r['hits']:,} of {r['requests']:,} requests)" if "requests" in r else ")")
            same = "differ: " + cell(", ".join(r["differs"][:4])) if r["differs"] else "untouched" if r.get("untouched") else "identical"
            lines.append(f"| {cell(name)} | {cell(r['said']) if r['code'] else 'the usual lines'} | {ending(r)} | {same} | {'-' if r.get('untouched') else cell(r['account']) or '**no**'} |")
        lines.append("")
    if found.get("verbs"):
        verbs_, faults_ = list(dict.fromkeys(r["verb"] for r in found["verbs"])), list(dict.fromkeys(r["fault"] for r in found["verbs"]))
        ends = {(r["verb"], r["fault"]): ("-" if not r["hits"] else r["end"]) for r in found["verbs"]}
        lines += ["## Each verb of the store, when the first try of every request meets a fault", "", "`right`: the result is right, after another try; `refused`: one line; `silent`: a wrong result (`twice`: a proxy that sends a conditional write twice, so that the second finds the first one's object: told as `not mine`, which a lease recognises as its own).", "",
                  "| verb | " + " | ".join(faults_) + " |", "|---" * (len(faults_) + 1) + "|"] + [f"| {v} | " + " | ".join(ends.get((v, f), "") for f in faults_) + " |" for v in verbs_] + [""]
    return "\n".join(lines)


def write_table(found_file: str, new_file: str) -> None:
    "Join new trials to those of earlier runs, kept in a JSON file beside the table; a trial that was made again takes its old place."
    found = json.loads(Path(found_file).read_text(encoding="utf-8")) if Path(found_file).exists() else {}
    for group, rows in json.loads(Path(new_file).read_text(encoding="utf-8")).items():
        name = lambda r: tuple(r.get(k) for k in ("verb", "phase", "fault"))
        new = {name(r): r for r in rows}
        found[group] = [new.pop(name(r), r) for r in found.get(group, [])] + list(new.values())
    if "chain" in found: found["chain"].sort(key=lambda r: list(PHASES).index(r["phase"]))
    text = json.dumps(found, ensure_ascii=False, indent=1)
    Path(found_file).write_text("\n".join(map(anonymous, text.splitlines())) + "\n", encoding="utf-8")
    Path(found_file).with_suffix(".md").write_text(table(found), encoding="utf-8")


def main(argv=None):
    "Run trials and write what came of them as JSON."
    import argparse
    ap = argparse.ArgumentParser(description=main.__doc__)
    ap.add_argument("what", help="some of chain, machine, ledgers, verbs, s3; or table"); ap.add_argument("--phases", default=",".join(PHASES)); ap.add_argument("--most", type=int, default=0, help="about so many kills a phase; 0: at every point")
    ap.add_argument("--found", help="with `table`: JSON of all trials so far")
    ap.add_argument("--only", default="", help="names of S3 plans or verbs, between semicolons"); ap.add_argument("--out")
    a = ap.parse_args(argv)
    if a.what == "table": return write_table(a.found, a.out)
    wanted, phases = a.what.split(","), a.phases.split(",")
    def save():
        if a.out: Path(a.out).write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    found = {what: Rows(save) for what in wanted}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, prefix="faults-") as folder:
        if "verbs" in wanted:
            world = S3World(Path(folder)/"verbs")
            try: found["verbs"] += probe(world.proxy, store_of("s3://faults/p"), folder, only=a.only.split(";") if a.only else None)
            finally: world.stop(); save()
        if {*wanted} & {"chain", "machine", "ledgers"}:
            order = list(PHASES)[:max(map(list(PHASES).index, phases)) + 1]
            preload(order); world = World(Path(folder)/"w", order)
            if "chain" in wanted: kill_everywhere(world, found["chain"], phases, a.most)
            if "ledgers" in wanted: ledgers(world, found["ledgers"], phases)
            if "machine" in wanted: machine(world, found["machine"], phases)
        if "s3" in wanted:
            phases = list(PHASES)[:max(map(list(PHASES).index, phases)) + 1]
            preload(phases); s3_runs(Path(folder)/"s3", found["s3"], phases, {n: p for n, p in PLANS.items() if not a.only or n in a.only.split(";")})


if __name__ == "__main__": main()
