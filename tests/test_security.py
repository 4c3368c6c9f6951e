"""What must not happen with secrets, with files of strangers and with texts of strangers. Static checks of loading are in test_toolchain.py, damaged files in test_fuzz.py."""
import ast, csv, io, json, os, re, shutil, subprocess, sys, threading, time
from html.parser import HTMLParser
from pathlib import Path
import nbformat, pytest
from conftest import KEY, SECRET
from yunmin_efficientdata.core import hub
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup.prepare import safe_domain
import fuzz
import test_prepare as T

ROOT = Path(__file__).resolve().parents[1]
YUNMIN = str(Path(sys.executable).with_name("yunmin"))
WRONG = "canary-wrong-secret"
CANARIES = {"YUNMIN_JUDGE_KEY": "canary-judge-8f1c2b", "HF_TOKEN": "hf_canary9d27aa", "MY_OTHER_SECRET": "canary-other-55ae"}
EVIL = '<script>alert("inj")</script> <img src=x onerror=alert(1)> [눌러](javascript:alert(1)) =HYPERLINK("http://x")'


# -- secrets and texts in a real run: phases by papermill, workspace in a bucket

def run_in_a_bucket(server, folder, phases: str, *more):
    "(all that a run left: name -> bytes, what it printed, how to run more, address); the corpus holds markup, .env holds secrets."
    (folder/"raw").mkdir(); name = f"leaks-{os.getpid()}-{len(phases)}"; client = server.client(); client.create_bucket(Bucket=name)
    docs = [fuzz.good_line(i, "d") | {"text": fuzz.sentence(i % 30, 60) + (f" {EVIL} {i % 3}" if i % 4 == 0 else ""), "domain": "web<b>" if i % 2 else "../뉴스"} for i in range(90)]
    (folder/"raw/web.jsonl").write_bytes(fuzz.lines(docs) + b'{"text": "broken <script>alert(2)</script>\n')
    (folder/".env").write_text("".join(f"{k}={v}\n" for k, v in CANARIES.items()) + f"AWS_SECRET_ACCESS_KEY={SECRET}\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") and k not in CANARIES} | dict(AWS_ENDPOINT_URL=server.endpoint, AWS_ACCESS_KEY_ID=KEY, AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=str(folder/"none"), AWS_SHARED_CREDENTIALS_FILE=str(folder/"none"), YUNMIN_SCRATCH=str(folder/"scratch"))
    def run(*args, **other): return subprocess.run([YUNMIN, *map(str, args)], cwd=folder, env=env | other, capture_output=True, text=True, timeout=900)
    done = run("run", f"s3://{name}/ws", "--raw", folder/"raw", "--phases", phases, *(x for m in more for x in ("--set", m)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    left = {o["Key"]: client.get_object(Bucket=name, Key=o["Key"])["Body"].read() for page in client.get_paginator("list_objects_v2").paginate(Bucket=name) for o in page.get("Contents", ())}
    left |= {f"local {p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".env"}
    return left, done.stdout + done.stderr, run, f"s3://{name}/ws"

@pytest.fixture(scope="module")
def bucket_run(s3_server, tmp_path_factory): return run_in_a_bucket(s3_server, tmp_path_factory.mktemp("run"), "dedup", "dedup.audit.planted=20")


def check_secrets(left, said, *wanted):
    assert set(wanted) <= left.keys() and any(k.endswith(".ipynb") for k in left)
    for secret in (SECRET, *CANARIES.values()):
        assert secret not in said
        assert [k for k, data in left.items() if secret.encode() in data] == []
    assert not [k for k, data in left.items() if KEY.encode() in data and not k.startswith("local raw/")] and KEY not in said  # the name of the key neither

def test_no_secret_is_left_anywhere(bucket_run):
    left, said, _, _ = bucket_run
    check_secrets(left, said, "ws/ledger/dedup.prepare.json", "ws/dedup_ready/audit.md", "ws/pipeline_run.log")


def test_errors_do_not_tell_secrets(bucket_run):
    "Wrong keys, an address with a password, a judge's address with one."
    _, _, run, uri = bucket_run
    for args, env in ((("status", uri), {"AWS_SECRET_ACCESS_KEY": WRONG}), (("status", uri), {"AWS_ENDPOINT_URL": f"http://user:{WRONG}@127.0.0.1:9"}),
                      (("evaluate", uri, "--set", f"evaluation.judge.endpoint=http://user:{WRONG}@127.0.0.1:9/v1", "--set", "evaluation.judge.model=x"), {})):
        done = run(*args, **env)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") <= 2, done.stderr
        assert not any(s in done.stdout + done.stderr for s in (SECRET, "canary"))


class Page(HTMLParser):
    "Collects what would run: scripts' text, handlers, javascript: addresses."
    def __init__(self): super().__init__(); self.found, self.script = [], False
    def handle_starttag(self, tag, attributes):
        self.script = tag == "script"
        self.found += [f"{tag} {k}={v}" for k, v in attributes if k.startswith("on") or (v or "").strip().lower().startswith("javascript:")]
    def handle_endtag(self, tag): self.script = False
    def handle_data(self, data):
        if self.script and re.search(r"alert\(", data): self.found.append(data[:200])

def runs(html: str) -> list[str]: p = Page(); p.feed(html); p.close(); return p.found

def test_what_would_run_is_seen():
    assert len(runs(EVIL)) == 2 and runs('<a href=" JavaScript:alert(1)">x</a>') and not runs("&lt;script&gt;alert(1)&lt;/script&gt; <b>x</b>")


def check_markup(left):
    "Pages, executed notebooks' HTML outputs, Markdown outside of code blocks; domains become plain folder names."
    pages = {k: data.decode() for k, data in left.items() if k.endswith(".html")}
    assert {k: found for k, x in pages.items() if (found := [f for f in runs(x) if "alert" in f])} == {}
    for k in [k for k in left if k.endswith(".ipynb")]:
        for cell in nbformat.reads(left[k].decode(), 4).cells:
            for out in cell.get("outputs", ()): assert not [f for f in runs("".join(out.get("data", {}).get("text/html", ""))) if "alert" in f], k
    texts = {k: data.decode() for k, data in left.items() if k.endswith(".md") and k.startswith("ws/")}
    assert texts and any("alert" in x for x in (texts | pages).values())  # it is quoted, so escaping is what is tested
    for k, x in texts.items():
        outside = "".join(re.split(r"^(`{3,}|~{3,}).*?^\1", x, flags=re.M | re.S)[::2])
        assert not [f for f in runs(re.sub(r"`[^`\n]*`|\\<", "", outside)) if "alert" in f], k
    assert {k.split("/")[2] for k in left if k.startswith("ws/deduped/") and k.count("/") > 2} == {"web_b", "뉴스"}

def test_markup_in_the_corpus_does_not_run(bucket_run): check_markup(bucket_run[0])


def check_formulas(left):
    "A spreadsheet runs what begins with = + - @; numbers may be negative."
    tables = {k: list(csv.reader(io.StringIO(data.decode()))) for k, data in left.items() if k.endswith(".csv")}
    assert tables
    plain = re.compile(r"[+-][\d.,e+-]+( %| x| points)?|-inf|-|-\d+ to -\d+ %")
    assert [(k, c) for k, rows in tables.items() for row in rows for c in row if c[:1] in ("=", "@", "+", "-", "\t") and not plain.fullmatch(c)] == []

def test_no_cell_of_a_table_is_a_formula(bucket_run): check_formulas(bucket_run[0])


@pytest.mark.slow
def test_a_run_of_several_phases_with_its_site(s3_server, tmp_path):
    "The same of format, report and the site of it all."
    left, said, _, _ = run_in_a_bucket(s3_server, tmp_path, "dedup,format,report", "tokenizer.vocab_size=512", "format.benchmark_rows=16", "format.benchmark_repeats=1", "report.renderer=smalldocs")
    check_secrets(left, said, "ws/ledger/format.parquet.json", "ws/reports/report.md", "ws/reports/site/index.html")
    check_markup(left); check_formulas(left)
    assert sum(k.endswith(".html") for k in left) > 5


# -- loading

def bare_loads(tree) -> list[str]:
    "Calls that could run code of a model's folder, or write where an archive says."
    calls = [(n, ast.unparse(n.func)) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    found = [f"{name} line {n.lineno}" for n, name in calls if name.endswith(".from_pretrained") and not name.startswith("PeftModel") and not any(k.arg is None and ast.unparse(k.value) == "SAFE" for k in n.keywords)]
    return found + [f"{name} line {n.lineno}" for n, name in calls if name.split(".")[-1] in ("extract", "extractall", "unpack_archive", "system", "popen", "execv", "execvp") and name.split(".")[0] in ("os", "shutil", "zip", "z", "tar", "t", "zipfile", "tarfile")
                    or name.split(".")[0] == "tarfile" or name == "read_pickle"]

def test_models_are_loaded_in_the_safe_way_only_and_no_archive_is_unpacked():
    "zipfile stands in dem.vectors, which writes and reads .npz members by name and unpacks none; no other archive is read anywhere."
    modules = sorted((ROOT/"yunmin_efficientdata").rglob("*.py"))
    assert {str(m): f for m in modules if (f := bare_loads(ast.parse(m.read_text(encoding="utf-8"))))} == {}
    assert [m.name for m in modules if re.search(r"\b(zipfile|tarfile)\b", m.read_text(encoding="utf-8"))] == ["vectors.py"]
    for bad in ("AutoConfig.from_pretrained(x)", "os.system('x')", "tarfile.open(f)", "z.extractall(d)"): assert bare_loads(ast.parse(bad)), bad


READERS = """
import json, os, sys, io, zipfile, shutil
from pathlib import Path
sys.path.insert(0, sys.argv[1]); root = Path(sys.argv[2]); marker = root/"it_ran"
import numpy as np, torch, fuzz
from yunmin_efficientdata.core.settings import UserError
fuzz.quiet(); os.environ.pop("HF_HUB_OFFLINE", None)
class Bomb:
    def __reduce__(self): return os.system, (f"touch {marker}",)
import pickle
raw = pickle.dumps(Bomb()); f = io.BytesIO(); np.save(f, np.array([Bomb()], object), allow_pickle=True); npy = f.getvalue()
f = io.BytesIO(); torch.save({"x": Bomb()}, f); pt = f.getvalue()
f = io.BytesIO()
with zipfile.ZipFile(f, "w") as z:
    for n in ("layers.0.weight.left.npy", "layers.0.weight.right.npy", "../../climbed.npy"): z.writestr(n, npy)
npz = f.getvalue()
yaml = f"a: !!python/object/apply:os.system ['touch {marker}']\\n".encode()
js = json.dumps({"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, "model_type": "evil", "tokenizer_class": "Evil", "trust_remote_code": True, "peft_type": "LORA", "base_model_name_or_path": "evil/model", "chat_template": "{{ ''.__class__.__mro__ }}"}).encode()
names = [n for n in ("raw", "config", "set", "rubric", "prompts", "choices", "general", "npy", "npz", "adapter", "model", "shards", "calibration", "hf_config", "tokenizer", "parquet", "text_rows", "heldout", "embeddings", "contamination", "ratings", "resume")]
ready = {n: fuzz.prepared(n)[:2] for n in names} # imports everything, and reads the whole files once
seen = []
def hook(event, args):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo", "shutil.unpack_archive"): seen.append(f"{now}: {event} {str(args)[:150]}")
now = ""; sys.addaudithook(hook); done = refused = 0
for n, (t, good) in ready.items():
    for at in range(len(set(t.files(good)))):
        for kind, data in {"pickle": raw, "npy": npy, "npz": npz, "pt": pt, "yaml": yaml, "json": js}.items():
            case = root/"case"; shutil.rmtree(case, ignore_errors=True); shutil.copytree(good, case); file = sorted(set(t.files(case)))[at]
            if n in ("hf_config", "tokenizer"): (case/"base/evil.py").write_text(f"import os; os.system('touch {marker}')\\nclass Evil: pass\\n"); (case/"base/pytorch_model.bin").write_bytes(pt)
            now = f"{n} {file.name} {kind}"; file.write_bytes(data); done += 1
            try: t.read(case)
            except UserError: refused += 1
now = ""
print(json.dumps({"seen": seen, "marker": marker.exists(), "climbed": [str(p) for p in root.rglob("*climbed*")], "done": done, "refused": refused}))
os.system("true"); assert seen[-1].startswith(": os.system")  # the hook works
"""

def test_readers_run_nothing_and_call_nobody(tmp_path):
    "An audit hook in a child: 22 readers are given pickles, object arrays, YAML with constructors and configs that name code, in the place of each of their files."
    done = subprocess.run([sys.executable, "-c", READERS, str(ROOT/"tests"), str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=900, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["seen"] == [] and not said["marker"] and not said["climbed"], said
    assert said["done"] > 180 and said["refused"] > said["done"]//2, said


# -- paths

NAMES = ["../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "", " ", "x\0y", "-rf", "=1+1", "@x", "CON", "\u202etxt", "가" * 300, "quarantine", "Manifest.json", "removed.json", "review_samples.md", "state", "parts.json", "base", "mixed", "total", "seed", "~", "$HOME", "%2e%2e", "web", "\n"]

@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_domain_names_stay_names(name):
    safe = safe_domain(name)
    assert re.fullmatch(r"[\w][\w.-]*", safe) and len(safe.encode()) <= 200 and safe == safe_domain(safe) and safe.lower() not in ("quarantine", "manifest.json", "removed.json", "state", "parts.json", "base", "mixed", "total", "seed")

def test_domains_and_file_names_write_nothing_outside(tmp_path):
    raw, ws = tmp_path/"raw", tmp_path/"deep/er/ws"; raw.mkdir()
    docs = [fuzz.good_line(i, "d") | {"domain": n, "source": n, "lang": n} for i, n in enumerate(NAMES)]
    for i, name in enumerate(["web.jsonl", "a b;rm -rf ~.jsonl", "x..jsonl.jsonl", "$(touch x).jsonl", "#%2e%2e%2f.jsonl"]): (raw/name).write_bytes(fuzz.lines(docs[i::5]) + b"broken\n")
    (raw/"link.jsonl").symlink_to("/etc/passwd")
    before = {p for p in tmp_path.rglob("*")}
    try: T.prep(ws, raw)
    except UserError as e: assert "link.jsonl" in str(e); (raw/"link.jsonl").unlink(); T.prep(ws, raw)
    new = {p for p in tmp_path.rglob("*")} - before
    assert all(ws in (p, *p.parents) or p in (ws.parent, ws.parent.parent) for p in new), sorted(new)[:5]
    total = T.manifest(ws)["total"]; assert total["kept"] == len(NAMES) == len(T.records(ws)) and sum(total["quarantined"].values()) >= 5
    assert "root:" not in "".join(p.read_text() for p in (ws/"dedup_ready").rglob("*.jsonl") if "part-" in p.name)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "a\0b", ""])
def test_keys_cannot_climb(tmp_path, key):
    store = open_store(tmp_path/"ws"); (tmp_path/"x").write_text("outside")
    for call in (store.read, store.exists, store.fetch, lambda k: store.write(k, "no"), store.delete, store.open):
        with pytest.raises(UserError): call(key)
    assert (tmp_path/"x").read_text() == "outside"


def test_links_out_of_the_workspace_are_not_followed_to_write_or_remove(tmp_path):
    outside = tmp_path/"outside"; outside.mkdir(); (outside/"keep.txt").write_text("mine"); store = open_store(tmp_path/"ws"); store.write("a/x.txt", "x")
    (tmp_path/"ws/a/out").symlink_to(outside); (tmp_path/"ws/a/file.txt").symlink_to(outside/"keep.txt")
    for call in (lambda: store.write("a/out/new.txt", "no"), lambda: store.read("a/out/keep.txt"), lambda: store.delete("a/out/keep.txt")):
        with pytest.raises(UserError, match="out"): call()
    try: store.write("a/file.txt", "new")
    except UserError: pass
    try: store.delete_prefix("a")
    except UserError: pass
    assert (outside/"keep.txt").read_text() == "mine" and os.listdir(outside) == ["keep.txt"]


def test_a_ledger_cannot_name_what_is_to_be_removed_elsewhere(tmp_path):
    from yunmin_efficientdata.core.ledger import Ledger
    store = open_store(tmp_path/"ws"); Ledger(store).run("x", lambda stage: (store.write("out.txt", "x"), {})[1], outputs=["out.txt"])
    entry = json.loads(store.read("ledger/x.json")); (tmp_path/"precious").mkdir()
    for discard in (["../precious"], [str(tmp_path/"precious")], [""], ["a/../../precious"], "out.txt", [3]):
        store.write("ledger/x.json", json.dumps(entry | {"discard": discard})); _, skipped = Ledger(store).run("x", lambda stage: (store.write("out.txt", "x"), {})[1], outputs=["out.txt"])
        assert not skipped and (tmp_path/"precious").is_dir() and store.exists("out.txt"), discard


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_of_shards_stays_in_its_folder(tmp_path, name):
    from yunmin_efficientdata.dem.vectors import Weights
    folder = fuzz.model_files(tmp_path, "base", 0, 4); shutil.copy(folder/"model-00001-of-00004.safetensors", tmp_path/"outside.safetensors")
    index = json.loads((folder/"model.safetensors.index.json").read_text()); index["weight_map"]["layers.0.weight"] = name; (folder/"model.safetensors.index.json").write_text(json.dumps(index))
    for load in (Weights, hub.load_weights):
        with pytest.raises(UserError, match="index.json.*folder"): load(folder)


def test_ids_of_prompts_and_names_of_raters_are_no_paths(tmp_path):
    from yunmin_efficientdata.evaluation.rating import rater_file
    for name in ("../../x", "a/b", "..", "/etc/passwd"): assert re.fullmatch(r"results/ratings/[0-9A-Za-z가-힣_]+-[0-9a-f]{6}\.csv", rater_file(name))
    store = open_store(tmp_path/"ws"); store.write("reports/history/x/run.json", json.dumps({"run": "../../../x", "time": "2024-01-01T00:00:00Z"}))
    with pytest.raises(UserError): store.exists("reports/history/../../../x/report.md")


def test_the_served_site_is_all_that_is_served(tmp_path, capsys):
    from yunmin_efficientdata import cli
    store = open_store(tmp_path/"ws"); store.write("reports/site/index.html", "<p>home</p>"); store.write("secret.txt", "canary"); (tmp_path/"other.txt").write_text("canary")
    (tmp_path/"ws/reports/site/link.txt").symlink_to(tmp_path/"other.txt"); (tmp_path/"ws/reports/site/up").symlink_to(tmp_path)
    made = []
    import http.server
    class Server(http.server.ThreadingHTTPServer):
        def __init__(self, *a): super().__init__(*a); made.append(self)
    original, http.server.ThreadingHTTPServer = http.server.ThreadingHTTPServer, Server
    try:
        thread = threading.Thread(target=cli.serve_site, args=(str(tmp_path/"ws"), 0)); thread.start()
        while not made: time.sleep(.01)
    finally: http.server.ThreadingHTTPServer = original
    def get(path): c = http.client.HTTPConnection("127.0.0.1", made[0].server_port, timeout=20); c.putrequest("GET", path, skip_host=True); c.putheader("Host", "localhost"); c.endheaders(); r = c.getresponse(); return r.status, r.read()
    try:
        assert made[0].server_address[0] == "127.0.0.1" and get("/index.html") == (200, b"<p>home</p>")
        for path in ("/../../secret.txt", "/..%2f..%2fsecret.txt", "/%2e%2e/%2e%2e/secret.txt", "//etc/passwd", "/etc/passwd", "/link.txt", "/up/other.txt", "/up/", "/....//....//secret.txt", "/..\\..\\secret.txt", "/index.html/../../../secret.txt"):
            status, body = get(path); assert status in (301, 400, 404) and b"canary" not in body and b"root:" not in body, (path, status, body[:100])
    finally: made[0].shutdown(); thread.join(30)


# -- packages

def test_dependencies_and_their_licences_are_the_recorded_ones():
    "The offline part of the audit: installed = constraints.txt, pip check, reports/licences.md up to date. It opens no connection and installs nothing."
    done = subprocess.run(["bash", ROOT/"scripts/audit_dependencies.sh", "--offline"], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0 and "not asked (--offline)" in done.stdout, done.stdout + done.stderr
    wrong = subprocess.run(["bash", ROOT/"scripts/audit_dependencies.sh", "--of"], capture_output=True, text=True); assert wrong.returncode == 2 and "unknown option" in wrong.stderr
