"""The same promises from both kinds of store, against a folder and against a real S3 server; then what can go wrong."""
import io, os, pickle, random, signal, socket, subprocess, sys, time, unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from yunmin_efficientdata.core import store as store_module
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import COMMIT, TEMP, LocalStore, MissingKey, open_store, source_keys, split_source


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local": return open_store(tmp_path/"작업 공간")
    return open_store(request.getfixturevalue("s3").uri + "/작업/ws")


def one_line(error): return "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.fixture(scope="module", autouse=True)
def silent_server():
    "A server that accepts and never answers, opened in the background: its timeouts pass while the other tests run."
    code = """
import time; from yunmin_efficientdata.core.store import open_store
begin = time.monotonic()
try: open_store("s3://b/ws")
except Exception as e: print(time.monotonic() - begin, type(e).__name__, e)"""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0)); hole.listen(50)
        env = os.environ | dict(AWS_ENDPOINT_URL=f"http://127.0.0.1:{hole.getsockname()[1]}", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
        child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        def result():
            seconds, _, line = child.communicate(timeout=60)[0].partition(" ")
            return float(seconds), line
        yield result
        child.kill(); child.wait(); child.stdout.close()


# -- both kinds --

def test_write_read(store):
    for key, data in {"a": b"", "raw/웹 문서.jsonl": "한글\n".encode(), "b/c/d.bin": os.urandom(100_000)}.items():
        store.write(key, data)
        assert store.read(key) == data and store.size(key) == len(data) and store.exists(key)
        with store.open(key) as f: assert f.read() == data
    store.write("text", "글"); assert store.read_text("text") == "글"
    store.write("text", bytearray(b"\xff")); assert store.read("text") == b"\xff"
    with pytest.raises(UserError, match="not UTF-8"): store.read_text("text")


def test_keys_are_used_as_given(store):
    nfc, nfd = unicodedata.normalize("NFC", "한글.jsonl"), unicodedata.normalize("NFD", "한글.jsonl")
    store.write(nfc, "c"); store.write(nfd, "d")
    assert store.list() == sorted([nfc, nfd]) and store.read_text(nfc) == "c" and store.read_text(nfd) == "d"


def test_odd_names(store):
    names = sorted(["a b", "a+b", "a%20b", "a&b=c?d#e", "'\"", "~x", "é", "😀", ".hidden", "x..y", "a\nb"[:1] + "z", "[1]", "ㄱ"*60])
    for n in names: store.write(f"odd/{n}", n)
    assert store.list("odd/") == [f"odd/{n}" for n in names]
    for n in names: assert store.read_text(f"odd/{n}") == n


def test_list_order_and_prefix(store):
    keys = ["a/1", "a/b/2", "a-1", "a.txt", "ab/3", "Z", "가/나"]
    for k in keys: store.write(k, k)
    assert store.list() == sorted(keys)
    assert store.list("a/") == ["a/1", "a/b/2"] and store.list("a/b") == ["a/b/2"] and store.list("a") == sorted(k for k in keys if k[0] == "a")
    assert store.list("none/") == [] and store.list("none/x") == []
    assert [s.key for s in store.stats("a/")] == ["a/1", "a/b/2"] and store.stats("a/") == [store.stat("a/1"), store.stat("a/b/2")]
    assert store.exists("a/") and store.exists("a/b/") and not store.exists("a/1/") and not store.exists("none/") and store.exists("/")


def test_missing(store):
    for act in (store.read, store.read_text, store.open, store.stat, store.size, store.fetch, lambda k: store.read_range(k, 0, 1)):
        with pytest.raises(MissingKey, match="no/such.*does not exist") as e: act("no/such")
        assert isinstance(e.value, (UserError, FileNotFoundError)) and one_line(e)
    assert not store.exists("no/such")
    store.delete("no/such"); store.delete_prefix("no/such")


def test_keys_cannot_escape(store):
    for key in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a\\b", "a\0b", "./a", "a/.", ".ym-tmp-1", "x/\udcb0"):
        for act in (store.read, store.stat, store.delete, store.delete_prefix, store.fetch, lambda k: store.write(k, ""), lambda k: store.put_if_absent(k, "")):
            with pytest.raises(UserError) as e: act(key)
            assert one_line(e)
        with pytest.raises(UserError):
            with store.output(key): pass


def test_ranges_and_seek(store):
    data = os.urandom(300_000)
    store.write("x", data)
    for start, n in ((0, 10), (299_990, 10), (299_990, 100), (300_000, 5), (400_000, 5), (5, 0), (100, 100_000)):
        assert store.read_range("x", start, n) == data[start:start + n]
    rng = random.Random(0)
    with store.open("x") as f:
        assert f.seekable()
        for _ in range(20):
            at, n = rng.randrange(310_000), rng.randrange(20_000)
            f.seek(at); assert f.read(n) == data[at:at + n]
        f.seek(-4, 2); assert f.read() == data[-4:] and f.tell() == 300_000


def test_empty_range_of_an_empty_file(store):
    store.write("e", b""); assert store.read_range("e", 0, 10) == b""
    with store.open("e") as f: assert f.read() == b""


def test_pyarrow_reads_and_writes_through_it(store):
    import pyarrow as pa, pyarrow.parquet as pq
    table = pa.table({"text": ["가", "나"]*5000, "n": list(range(10_000))})
    with store.writer("t.parquet") as f: pq.write_table(table, f)
    with store.open("t.parquet") as f: assert pq.read_table(f, columns=["n"]).equals(table.select(["n"]))


def test_writer_is_all_or_nothing(store, monkeypatch):
    monkeypatch.setattr(store_module, "PART", 5 << 20)  # the least that S3 allows
    old = b"old"; store.write("k", old)
    for size in (0, 10, 11 << 20):
        with pytest.raises(RuntimeError):
            with store.writer("k") as f:
                f.write(b"x"*size); assert f.tell() == size
                assert store.read("k") == old
                raise RuntimeError
        assert store.read("k") == old and store.list() == ["k"]
    block = os.urandom(1 << 20)
    with store.writer("k") as f:
        for _ in range(11): f.write(block)
        f.write(b"end")
        assert store.read("k") == old
    assert store.read("k") == block*11 + b"end"
    with store.writer("exact") as f: f.write(block*5)
    assert store.size("exact") == 5 << 20


def test_exceptions_of_the_caller_pass_unchanged(store):
    for manager in (store.writer, store.output):
        with pytest.raises(FileNotFoundError) as e:
            with manager("k"): open("/no/such/file")
        assert not isinstance(e.value, MissingKey)
        with pytest.raises(KeyboardInterrupt):
            with manager("k"): raise KeyboardInterrupt
    assert store.list() == []


def test_version_changes_with_every_write(store):
    versions = []
    for i in range(5): store.write("k", f"{i}"); versions.append(store.stat("k").version)
    assert len(set(versions)) == 5 and store.stat("k").version == versions[-1]


def test_delete_prefix_takes_only_the_folder(store):
    for k in ("web/a", "web/b/c", "web2/a", "web.txt"): store.write(k, "")
    store.delete("web/a"); assert not store.exists("web/a")
    store.delete_prefix("web/"); assert store.list() == ["web.txt", "web2/a"]
    store.delete_prefix("web2"); assert store.list() == ["web.txt"]
    with pytest.raises(UserError): store.delete_prefix("")
    with pytest.raises(UserError): store.delete_prefix("/")


def test_output_of_a_file(store):
    with store.output("out/표.txt") as p: assert not p.exists() and p.parent.is_dir(); p.write_text("a")
    assert store.read_text("out/표.txt") == "a" and store.list() == ["out/표.txt"]
    with pytest.raises(ZeroDivisionError):
        with store.output("out/표.txt") as p: p.write_text("b"); 1/0
    assert store.read_text("out/표.txt") == "a"
    with pytest.raises(UserError):
        with store.output("out/none"): pass


def test_output_of_a_folder(store):
    with store.output("models/base/") as p: (p/"sub").mkdir(parents=True); (p/"가.json").write_text("1"); (p/"sub/x").write_text("22")
    assert [l.split(" ")[::2] for l in store.read_text(f"models/base/{COMMIT}").splitlines()] == [["2", "sub/x"], ["1", "가.json"]]  # between them a checksum
    assert store.list("models/") == [f"models/base/{COMMIT}", "models/base/sub/x", "models/base/가.json"]
    with pytest.raises(ZeroDivisionError):
        with store.output("models/base") as p: p.mkdir(); (p/"half").write_text("1"); 1/0
    assert store.read_text("models/base/sub/x") == "22"
    with store.output("models/base") as p: p.mkdir(); (p/"new").write_text("3")
    assert store.list() == [f"models/base/{COMMIT}", "models/base/new"]
    folder = store.fetch("models/base"); assert sorted(os.listdir(folder)) == [COMMIT, "new"]


def test_publish(store, tmp_path):
    src = tmp_path/"src"; (src/"sub").mkdir(parents=True)
    (src/"sub/가").write_text("1"); (src/COMMIT).write_text("done"); (src/"z").write_bytes(os.urandom(9 << 20))
    store.write("site/old", "kept")
    store.publish(src, "site")
    assert store.list() == [f"site/{COMMIT}", "site/old", "site/sub/가", "site/z"] and store.read("site/z") == (src/"z").read_bytes()
    store.publish(src/"z", "single"); assert store.size("single") == 9 << 20


def test_fetch(store):
    store.write("a/1.bin", b"1"*1000); store.write("a/b/2", b"2")
    path = store.fetch("a/1.bin"); assert path.name == "1.bin" and path.read_bytes() == b"1"*1000
    folder = store.fetch("a/"); assert folder.name == "a" and (folder/"b/2").read_bytes() == b"2" and (folder/"1.bin").exists()
    store.write("a/1.bin", b"3"*1000); assert store.fetch("a/1.bin").read_bytes() == b"3"*1000 and (store.fetch("a")/"1.bin").read_bytes() == b"3"*1000


def test_put_if_absent_race(store):
    with ThreadPoolExecutor(8) as pool: won = list(pool.map(lambda i: store.put_if_absent("lock/x", f"{i}"), range(8)))
    assert sum(won) == 1 and store.read_text("lock/x") == str(won.index(True)) and store.list() == ["lock/x"]


def test_replace_if_race(store):
    assert not store.replace_if("lock", "x", "none")
    store.write("lock", "0")
    for turn in range(3):
        seen = store.stat("lock").version
        with ThreadPoolExecutor(8) as pool: won = list(pool.map(lambda i: store.replace_if("lock", f"{turn}{i}", seen), range(8)))
        assert sum(won) == 1 and store.read_text("lock") == f"{turn}{won.index(True)}"


def test_travels_to_another_process(store):
    store.write("k", "글")
    twin = pickle.loads(pickle.dumps(store)); assert twin == store and twin.read_text("k") == "글"
    code = "import sys; from yunmin_efficientdata.core.store import open_store; s = open_store(sys.argv[1]); s.write('back', s.read('k'))"
    subprocess.run([sys.executable, "-c", code, store.uri], check=True)
    assert store.read_text("back") == "글"


def test_sources(store):
    for k in ("raw/web.jsonl", "raw/web.jsonl.gz", "raw/sub/a.jsonl"): store.write(k, "{}")
    base = store.uri
    assert source_keys(base + "/raw")[1] == source_keys(base + "/raw/")[1] == ["sub/a.jsonl", "web.jsonl", "web.jsonl.gz"]
    assert source_keys(base + "/raw/web.jsonl")[1] == ["web.jsonl"]
    source, prefix = split_source(base + "/raw/web.jsonl"); assert source.read_text(prefix) == "{}"
    with pytest.raises(UserError, match="no .*check") as e: split_source(base + "/nowhere")
    assert one_line(e)


# -- local only --

KILLED = """
import os, sys, signal
from yunmin_efficientdata.core.store import open_store
s = open_store(sys.argv[1])
with s.writer("d/file") as f, s.output("d/model") as p:
    f.write(b"half"); f.flush(); p.mkdir(); (p/"x").write_text("half")
    print("ready", flush=True); sys.stdin.read()
"""


def test_what_a_killed_process_leaves(tmp_path):
    s = open_store(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    left = lambda: [n for n in os.listdir(tmp_path/"d") if n.startswith(TEMP)]
    assert len(left()) == 2 and s.list() == []
    s.write("d/other", ""); assert s.clean() == 0 and len(left()) == 2  # the owner lives
    child.send_signal(signal.SIGKILL); child.wait()
    assert s.list() == ["d/other"] and len(left()) == 2
    store_module._swept.clear()  # as a new process would
    s.write("d/other", "1"); assert left() == [] and s.list() == ["d/other"]


def test_links(tmp_path):
    (tmp_path/"secret").write_text("s"); (tmp_path/"outside").mkdir(); (tmp_path/"outside/f").write_text("f")
    s = open_store(tmp_path/"ws"); s.write("in/a", "a")
    (tmp_path/"ws/same").symlink_to(tmp_path/"ws/in"); (tmp_path/"ws/in/alias").symlink_to("a")
    assert s.list() == ["in/a", "in/alias"] and s.read_text("in/alias") == "a" and s.read_text("same/a") == "a"
    (tmp_path/"ws/file").symlink_to(tmp_path/"secret"); (tmp_path/"ws/dir").symlink_to(tmp_path/"outside")
    for act in (lambda: s.read("file"), lambda: s.write("file", "x"), lambda: s.read("dir/f"), lambda: s.write("dir/g", ""), lambda: s.list(), lambda: s.list("dir/"), lambda: s.fetch("dir"), lambda: s.delete("dir/f"), lambda: s.delete_prefix("dir")):
        with pytest.raises(UserError, match="symbolic link") as e: act()
        assert one_line(e)
    assert s.list("in/") == ["in/a", "in/alias"]  # links elsewhere do not disturb
    assert (tmp_path/"secret").read_text() == "s" and (tmp_path/"outside/f").exists()


def test_local_errors_are_one_line(tmp_path):
    s = open_store(tmp_path/"ws"); s.write("a", "")
    for act in (lambda: s.write("a/b", ""), lambda: s.read("a/b"), lambda: s.write("x"*300, ""), lambda: open_store(tmp_path/"ws/a"), lambda: open_store("gs://b/c"), lambda: open_store(""), lambda: split_source("")):
        with pytest.raises(UserError) as e: act()
        assert one_line(e)
    assert open_store(tmp_path/"none").list() == [] and not (tmp_path/"none").exists()
    if os.getuid():  # root may read everything
        (tmp_path/"ws/closed").mkdir(mode=0)
        with pytest.raises(UserError, match="permission"): s.list()


def test_full_disk_is_one_line():
    if not os.path.exists("/dev/full"): pytest.skip("no /dev/full")
    with pytest.raises(UserError, match="No space left.*free some space"):
        with store_module._disk_errors(LocalStore("ws"), "k"):
            with io.open("/dev/full", "wb") as f: f.write(b"x"); f.flush()


def test_file_mode_follows_umask(tmp_path):
    old = os.umask(0o027)
    try: open_store(tmp_path).write("f", "")
    finally: os.umask(old)
    assert (tmp_path/"f").stat().st_mode & 0o777 == 0o640


# -- S3 only --

def expect_within(seconds, act, *words):
    begin = time.monotonic()
    with pytest.raises(UserError) as e: act()
    assert time.monotonic() - begin < seconds and one_line(e), e.value
    for w in words: assert w in str(e.value), e.value
    return str(e.value)


def test_more_than_a_page_of_keys(s3):
    keys = [f"k/{i:04}" for i in range(1003)]
    store_module._each(lambda k: s3.client.put_object(Bucket=s3.bucket, Key=k, Body=b""), keys)
    s = open_store(s3.uri); assert s.list("k/") == keys
    s.delete_prefix("k"); assert s.list() == []


def test_folder_objects_are_passed_over(s3):
    s3.client.put_object(Bucket=s3.bucket, Key="raw/", Body=b""); s3.client.put_object(Bucket=s3.bucket, Key="raw/a", Body=b"1")
    assert open_store(s3.uri).list() == ["raw/a"] and open_store(s3.uri + "/raw/").list() == ["a"]


def test_wrong_secret(s3, monkeypatch):
    open_store(s3.uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    expect_within(10, lambda: open_store(s3.uri), s3.bucket, "credentials are refused", "AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    expect_within(10, lambda: open_store(s3.uri), "credentials are refused")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY"); monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    expect_within(20, lambda: open_store(s3.uri), "no credentials")


def test_missing_bucket(s3):
    expect_within(10, lambda: open_store("s3://no-such-bucket-here/ws"), "no-such-bucket-here", "does not exist", "create it")
    expect_within(10, lambda: open_store("s3://Bad_Bucket!/ws"), "Bad_Bucket!")


def test_unreachable(s3, monkeypatch):
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        expect_within(30, lambda: open_store("s3://b/ws"), "s3://b/ws", "cannot be reached", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    expect_within(5, lambda: open_store("s3://b/ws"), "AWS_ENDPOINT_URL", "http://")


def test_server_that_never_answers(silent_server):
    seconds, line = silent_server()
    assert seconds < 30 and "UserError" in line and "s3://b/ws" in line and "cannot be reached" in line, line


def test_failed_uploads_are_aborted(s3, monkeypatch):
    monkeypatch.setattr(store_module, "PART", 5 << 20)
    s = open_store(s3.uri)
    with pytest.raises(ZeroDivisionError):
        with s.writer("big") as f: f.write(b"x"*(6 << 20)); assert f.upload; 1/0
    uploads = lambda: s3.client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])
    assert uploads() == []
    s3.client.create_multipart_upload(Bucket=s3.bucket, Key="left")  # what a killed process leaves
    assert s.clean() == 0 and len(uploads()) == 1
    assert s.clean(older_than=-5) == 1 and uploads() == []


def test_stream_survives_a_broken_connection(s3):
    data = os.urandom(9 << 20)  # more than a part: what is smaller is read at once
    s = open_store(s3.uri); s.write("x", data)
    with s.open("x") as f:
        got = f.read(1000)
        f.raw.body._raw_stream.close()  # the connection is gone
        got += f.read()
    assert got == data
    with s.open("x") as f:
        f.read(1000); s.write("x", b"y"*(9 << 20)); f.raw._drop()
        with pytest.raises(UserError, match="changed while it was read"): f.read()


def test_scratch_is_reused_bounded_and_least_recently_used_first(s3, monkeypatch, tmp_path):
    s = open_store(s3.uri)
    for i in range(6): s.write(f"f{i}", os.urandom(100_000))
    first = s.fetch("f0"); stamp = first.stat().st_mtime_ns
    assert s.fetch("f0") == first and first.stat().st_mtime_ns == stamp
    monkeypatch.setenv("YUNMIN_SCRATCH_BYTES", "350e3")
    paths = [s.fetch(f"f{i}") for i in range(3)]
    s.fetch("f0"); last = s.fetch("f3")
    assert first.exists() and last.exists() and not paths[1].exists()
    used = sum(p.stat().st_size for p in (tmp_path/"scratch").rglob("*") if p.is_file()); assert used <= 350_000
    s.write("big", b"x"*400_000)
    expect_within(5, lambda: s.fetch("big"), "YUNMIN_SCRATCH_BYTES", "do not fit")
    monkeypatch.setenv("YUNMIN_SCRATCH_BYTES", "many"); expect_within(5, lambda: s.fetch("f5"), "YUNMIN_SCRATCH_BYTES")


def test_scratch_of_another_process_is_not_pulled_away(s3, monkeypatch, tmp_path):
    monkeypatch.setenv("YUNMIN_SCRATCH_BYTES", "250e3")
    s = open_store(s3.uri)
    for i in range(3): s.write(f"f{i}", os.urandom(100_000))
    code = "import sys; from yunmin_efficientdata.core.store import open_store; s = open_store(sys.argv[1]); print(s.fetch('f0'), flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code, s3.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    theirs = Path(child.stdout.readline().strip())
    s.fetch("f1"); s.fetch("f2")
    assert theirs.exists()
    s.write("large", b"x"*200_000); expect_within(5, lambda: s.fetch("large"), "other processes")
    child.stdin.close(); child.wait()
    assert s.fetch("large").exists() and not theirs.exists()


def test_fetch_in_parallel(s3):
    s = open_store(s3.uri)
    for i in range(20): s.write(f"d/{i}", os.urandom(50_000))
    with ThreadPoolExecutor(6) as pool: folders = set(pool.map(lambda _: s.fetch("d"), range(6)))
    assert len(folders) == 1 and len(os.listdir(folders.pop())) == 20


def test_memory_of_a_large_upload_is_bounded(s3):
    code = """
import sys; from yunmin_efficientdata.core.ledger import peak_rss_mb; from yunmin_efficientdata.core.store import open_store
s = open_store(sys.argv[1]); s.write('warm', b'x')
before = peak_rss_mb(); block = b'x'*(1 << 20)
with s.writer('big') as f:
    for _ in range(150): f.write(block)
with s.open('big') as f:
    n = 0
    while piece := f.read(1 << 20): n += len(piece)
assert n == 150 << 20
print(int(peak_rss_mb() - before))"""
    grown = int(subprocess.run([sys.executable, "-c", code, s3.uri], check=True, capture_output=True, text=True).stdout)
    assert grown < 64, f"{grown} MB"
