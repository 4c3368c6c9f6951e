"Parts of objects on S3 through a bounded cache: the same tokens as local, whatever happens to server, disk or processes."
import ctypes, multiprocessing, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import MissingKey, TEMP
from yunmin_efficientdata.format import cache as cache_module
from yunmin_efficientdata.format.cache import ChangedObject, PageCache, map_part
from yunmin_efficientdata.format.pages import DamagedFile, PageSet, TokenFile

ELEMENT = pa.field("element", pa.int32(), nullable=False)
SCHEMA = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("tokens", pa.list_(ELEMENT), nullable=False)])

def write(path, n=1000, seed=0, **options):
    "About 1 MB of tokens in pages of 16 KB, beside as much text; returns the flat stream."
    rng = np.random.default_rng(seed)
    rows = [np.append(rng.integers(1, 5000, rng.integers(100, 400)), 0).astype(np.int32) for _ in range(n)]
    table = pa.Table.from_arrays([pa.array([rng.bytes(500).hex() for _ in rows]), pa.array(rows, pa.list_(ELEMENT))], schema=SCHEMA)
    pq.write_table(table, path, **{**dict(data_page_version="2.0", write_page_index=True, write_page_checksum=True, use_dictionary=False, compression="none", data_page_size=16384, write_batch_size=64, row_group_size=300), **options})
    return np.concatenate(rows)

def gather(pages, starts, length):
    "Windows by the addresses that `ready` gives."
    table = pages.ready(np.asarray(starts, np.int64), length)
    out = []
    for s in starts:
        s = int(s); p, window = int(np.searchsorted(pages.first, s, side="right")) - 1, b""
        while len(window) < 4 * length:
            at = s + len(window) // 4
            n = min(length - len(window) // 4, int(pages.first[p + 1]) - at)
            window += ctypes.string_at(int(table.address[p]) + 4 * (at - int(pages.first[p])), 4 * n); p += 1
        out.append(np.frombuffer(window, "<i4"))
    return np.stack(out)

def tokens(pages, **options):
    pages = PageSet(pages, **options) if not isinstance(pages, PageSet) else pages
    return gather(pages, [0], len(pages))[0]

@pytest.fixture(scope="module")
def local(tmp_path_factory):
    d = tmp_path_factory.mktemp("local")
    return d/"a.parquet", write(d/"a.parquet")

@pytest.fixture
def remote(local, s3):
    s3.client.upload_file(str(local[0]), s3.bucket, "p/a.parquet")
    return f"{s3.uri}/p/a.parquet", local[1]

def parts_are_whole(folder):
    "Every part in the folder has its length and hash."
    count = 0
    for path in Path(folder).glob("*/*"):
        if path.name.startswith(TEMP): continue
        offset, length = (int(x, 16) for x in path.name.split("-")); count += 1
        with open(path, "rb") as f: assert map_part(f.fileno(), length, path.parent.name, offset) is not None, path
    return count

def test_same_tokens_and_little_more_than_the_column(remote, tmp_path):
    uri, flat = remote
    cache = PageCache(tmp_path/"c", 50 << 20)
    pages = PageSet(uri, cache=cache, part_bytes=65536)
    opened = cache.counters["bytes_fetched"]
    assert cache.counters["requests"] <= 4 and np.array_equal(tokens(pages), flat)
    column = sum(int((f.pages.end - f.pages.offset).sum()) for f in pages.files)
    assert cache.counters["bytes_fetched"] - opened <= column and column < 1.02 * 4 * len(flat) # exactly the column, and the footer once
    before = cache.counters["requests"]
    again = PageSet(uri, cache=PageCache(tmp_path/"c", 50 << 20), part_bytes=65536)
    assert np.array_equal(tokens(again), flat) and cache.counters["requests"] == before and again.cache.counters["requests"] == 0
    assert parts_are_whole(tmp_path/"c") > 15

def test_same_windows_with_a_cache_of_a_twentieth(remote, local, tmp_path):
    uri, flat = remote; limit = 4 * len(flat) // 20 + 65536
    cache = PageCache(tmp_path/"c", limit)
    pages, here, rng = PageSet(uri, cache=cache, part_bytes=16384), PageSet(local[0]), np.random.default_rng(0)
    for _ in range(60):
        starts = rng.integers(0, len(flat) - 600, 3)
        assert np.array_equal(gather(pages, starts, 600), gather(here, starts, 600))
        assert cache.used_bytes() <= limit
    assert cache.counters["evicted"] > 50 and len(pages._now.maps) < 20

def test_a_cache_smaller_than_one_batch_still_works(remote, tmp_path):
    pages = PageSet(remote[0], cache=PageCache(tmp_path/"c", 1000), part_bytes=16384)
    assert np.array_equal(tokens(pages), remote[1])

def test_sequential_reading_fetches_each_part_once(remote, tmp_path):
    uri, flat = remote; cache = PageCache(tmp_path/"c", 200_000); pages = PageSet(uri, cache=cache, part_bytes=16384)
    opened = cache.counters["bytes_fetched"]
    for s in range(0, len(flat) - 512, 512): gather(pages, [s], 512)
    assert cache.counters["bytes_fetched"] - opened <= 1.01 * int((pages.files[0].pages.end - pages.files[0].pages.offset).sum())

def test_what_is_used_stays(remote, tmp_path):
    uri, flat = remote; cache = PageCache(tmp_path/"c", 400_000); pages = PageSet(uri, cache=cache, part_bytes=16384)
    rng = np.random.default_rng(1)
    for s in rng.integers(0, len(flat) - 10, 200): gather(pages, [7, int(s)], 4)
    hot = pages.files[0].source.path(*pages.files[0].parts[0].tolist())
    assert hot.exists() and cache.counters["evicted"] > 50

def test_addresses_outlive_eviction(remote, tmp_path):
    uri, flat = remote; cache = PageCache(tmp_path/"c", 150_000); pages = PageSet(uri, cache=cache, part_bytes=16384)
    table = pages.ready(np.array([0]), 100); address = int(table.address[0])
    for s in range(0, len(flat) - 512, 4096): gather(pages, [s], 512)
    assert pages._now.address[0] == 0 and not pages.files[0].source.path(*pages.files[0].parts[0].tolist()).exists()
    assert np.array_equal(np.frombuffer(ctypes.string_at(address, 400), "<i4"), flat[:100])

def test_damaged_parts_on_disk_are_fetched_again(remote, tmp_path):
    for harm in ("flip", "cut", "grow", "empty", "other place", "folder"): damage_on_disk(*remote, tmp_path/harm, harm)

def damage_on_disk(uri, flat, folder, harm):
    PageSet(uri, cache=PageCache(folder, 50 << 20), part_bytes=65536).need(np.arange(3))
    victims = sorted(p for p in folder.glob("*/*"))
    bodies = [p.read_bytes() for p in victims]
    for i, (p, body) in enumerate(zip(victims, bodies)):
        p.unlink()
        if harm == "folder": p.mkdir(); continue
        if harm == "flip": body = body[:100] + bytes([body[100] ^ 16]) + body[101:]
        if harm == "other place": body = bodies[i - 1]
        p.write_bytes({"cut": body[:-9], "grow": body + b"x", "empty": b""}.get(harm, body))
    cache = PageCache(folder, 50 << 20); pages = PageSet(uri, cache=cache, part_bytes=65536)
    assert np.array_equal(tokens(pages), flat)
    if harm != "folder": assert cache.counters["damaged"] >= 1 and parts_are_whole(folder)

def test_changed_object_is_one_line(remote, s3, tmp_path):
    uri, flat = remote; cache = PageCache(tmp_path/"c", 50 << 20); pages = PageSet(uri, cache=cache, part_bytes=65536)
    gather(pages, [0], 100)
    other = write(tmp_path/"other.parquet", seed=9)
    s3.client.upload_file(str(tmp_path/"other.parquet"), s3.bucket, "p/a.parquet")
    assert np.array_equal(gather(pages, [0], 100)[0], flat[:100]) # what is here is of one version
    with pytest.raises(ChangedObject) as e: gather(pages, [len(flat) - 100], 100)
    assert "\n" not in str(e.value) and "p/a.parquet" in str(e.value)
    assert np.array_equal(tokens(uri, cache=cache), other)
    s3.client.delete_object(Bucket=s3.bucket, Key="p/a.parquet")
    with pytest.raises(MissingKey): PageSet(uri, cache=cache)
    with pytest.raises(UserError, match="s3://bucket/key"): cache.reader("s3://bucket")

class Server:
    "Stands before the real client: harms the answers to range requests that `when` chooses."
    def __init__(self, client, harm, when): self.client, self.harm, self.when, self.n = client, harm, when, 0
    def __getattr__(self, name): return getattr(self.client, name)
    def get_object(self, **request):
        answer = self.client.get_object(**request); self.n += 1
        if "Range" in request and self.when(request["Range"]): self.harm(answer)
        return answer

def harmed(monkeypatch, harm, when):
    real = cache_module._client(); fake = Server(real, harm, when)
    monkeypatch.setattr(cache_module, "_client", lambda *a, **k: fake); monkeypatch.setattr(time, "sleep", lambda s: None)
    return fake

class Body:
    def __init__(self, data): self.data = data
    def read(self):
        if isinstance(self.data, Exception): raise self.data
        return self.data

def flip(answer): data = bytearray(answer["Body"].read()); data[len(data) // 2] ^= 1; answer["Body"] = Body(bytes(data))
def short(answer): answer["Body"] = Body(answer["Body"].read()[:-7])
def broken(answer):
    from botocore.exceptions import ReadTimeoutError
    answer["Body"] = Body(ReadTimeoutError(endpoint_url="x"))
def another(answer): answer["ETag"] = '"0"'

def test_transport_damage_is_asked_for_again(remote, tmp_path, monkeypatch):
    uri, flat = remote
    for harm in (flip, short, broken):
        pages, seen = PageSet(uri, cache=PageCache(tmp_path/harm.__name__, 50 << 20), part_bytes=65536), set()
        with monkeypatch.context() as m:
            fake = harmed(m, harm, lambda range: range not in seen and not seen.add(range))  # every range once
            assert np.array_equal(tokens(pages), flat) and fake.n > 30 and parts_are_whole(tmp_path/harm.__name__)

def test_lasting_damage_is_refused_and_not_stored(remote, tmp_path, monkeypatch):
    uri, flat = remote; pages = PageSet(uri, cache=PageCache(tmp_path/"c", 50 << 20), part_bytes=65536); before = parts_are_whole(tmp_path/"c")
    harmed(monkeypatch, flip, lambda range: True)
    with pytest.raises(DamagedFile, match=r"a.parquet: page \d+ at byte \d+"): pages.need([3])
    harmed(monkeypatch, short, lambda range: True)
    with pytest.raises(UserError, match="bytes came for"): pages.need([3])
    harmed(monkeypatch, another, lambda range: True)
    with pytest.raises(ChangedObject): pages.need([3])
    assert parts_are_whole(tmp_path/"c") == before

def test_server_that_is_gone_is_one_line(remote, tmp_path, monkeypatch):
    uri, flat = remote; pages = PageSet(uri, cache=PageCache(tmp_path/"c", 50 << 20), part_bytes=65536); gather(pages, [0], 100)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9"); monkeypatch.setattr(time, "sleep", lambda s: None)
    assert np.array_equal(gather(pages, [0], 100)[0], flat[:100]) # what is here needs no server
    with pytest.raises(UserError) as e: pages.need([40])
    assert "\n" not in str(e.value) and "cannot be reached" in str(e.value)

def test_a_disk_that_takes_nothing_does_not_stop_reading(remote, tmp_path, monkeypatch):
    (tmp_path/"file in the way").write_text("x"); read_without_disk(*remote, tmp_path/"file in the way")
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache_module, "_make_temporary", full); read_without_disk(*remote, tmp_path/"c")

def read_without_disk(uri, flat, folder):
    cache = PageCache(folder, 50 << 20); pages = PageSet(uri, cache=cache, part_bytes=16384)
    for s in range(0, len(flat) - 512, 8192): assert np.array_equal(gather(pages, [s], 512)[0], flat[s:s + 512])
    assert cache.counters["not_stored"] > 20 and len(pages._now.maps) < 8 # and memory stays bounded

def test_other_layouts_on_s3(s3, tmp_path):
    flat = write(tmp_path/"z.parquet", 50, compression="zstd"); s3.client.upload_file(str(tmp_path/"z.parquet"), s3.bucket, "한글/z.parquet")
    file = TokenFile(f"{s3.uri}/한글/z.parquet", cache=PageCache(tmp_path/"c", 50 << 20))
    assert file.way == "pyarrow" and np.array_equal(tokens(f"{s3.uri}/한글/z.parquet", cache=file.cache), flat)

def test_local_and_remote_files_in_one_stream(remote, local, tmp_path):
    pages = PageSet([local[0], remote[0], local[0]], cache=PageCache(tmp_path/"c", 300_000), part_bytes=16384)
    assert np.array_equal(tokens(pages), np.tile(local[1], 3))

def test_prefetch_then_no_waiting(remote, tmp_path):
    uri, flat = remote; cache = PageCache(tmp_path/"c", 50 << 20); pages = PageSet(uri, cache=cache, part_bytes=16384)
    pages.prefetch([0, 50_000], 2000); end = time.monotonic() + 20
    while len(list((tmp_path/"c").glob("*/[0-9a-f]*-*"))) < 4 and time.monotonic() < end: time.sleep(.02)
    time.sleep(.2); before = cache.counters["requests"]
    assert np.array_equal(gather(pages, [0, 50_000], 2000), np.stack([flat[:2000], flat[50_000:52_000]])) and cache.counters["requests"] == before

# -- processes -----------------------------------------------------------------

READER = """if 1:
    import sys, numpy as np; sys.path.insert(0, sys.argv[1])
    from test_cache import gather, PageSet, PageCache
    uri, folder, limit, seed, rounds = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    flat = np.load(sys.argv[7]); cache = PageCache(folder, limit); pages = PageSet(uri, cache=cache, part_bytes=16384); rng = np.random.default_rng(seed)
    print('open', flush=True)
    for i in range(rounds):
        starts = rng.integers(0, len(flat) - 300, 4)
        assert np.array_equal(gather(pages, starts, 300), np.stack([flat[s:s + 300] for s in starts])), i
        if i % 10 == 0: assert cache.used_bytes() <= limit + 20_000, (cache.used_bytes(), limit)  # the other has reserved a part and not yet made room
    print(cache.counters['requests'])"""

def reader(uri, flat, folder, limit, seed, rounds, tmp_path):
    if not (tmp_path/"flat.npy").exists(): np.save(tmp_path/"flat.npy", flat)
    return subprocess.Popen([sys.executable, "-c", READER, str(Path(__file__).parent), uri, str(folder), str(limit), str(seed), str(rounds), str(tmp_path/"flat.npy")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_processes_share_a_small_folder(remote, tmp_path):
    uri, flat = remote
    running = [reader(uri, flat, tmp_path/"c", 300_000, seed, 40, tmp_path) for seed in range(2)]
    for p in running:
        out, err = p.communicate(timeout=120)
        assert p.returncode == 0, err[-2000:]
    assert parts_are_whole(tmp_path/"c") and not list((tmp_path/"c").glob(f"*/{TEMP}*"))

def test_killed_processes_leave_nothing_half_written(remote, tmp_path):
    uri, flat = remote; rng = np.random.default_rng(0); folder = tmp_path/"c"
    for seed in range(2):
        p = reader(uri, flat, folder, 250_000, seed, 10**6, tmp_path)
        assert p.stdout.readline() == "open\n"
        time.sleep(float(rng.uniform(0, .6))); p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close(); p.stderr.close()
        assert parts_are_whole(folder) > 0
    cache = PageCache(folder, 250_000)
    assert np.array_equal(tokens(uri, cache=cache, part_bytes=16384), flat) and parts_are_whole(folder)
    cache_module._evict(cache, 250_000)
    assert not list(folder.glob(f"*/{TEMP}*")) and cache.used_bytes() <= 250_000

def test_several_want_the_same_part_once(remote, tmp_path):
    "Threads of six caches, as of six processes, read one cold object: about one request a part."
    uri, flat = remote
    caches = [PageCache(tmp_path/"c", 50 << 20, threads=2) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(lambda c: tokens(uri, cache=c, part_bytes=65536), caches))
    assert all(np.array_equal(g, flat) for g in got)
    assert sum(c.counters["requests"] for c in caches) <= 1.2 * len(list((tmp_path/"c").glob("*/[0-9a-f]*-*")))

def test_a_stopped_claimant_is_not_waited_for_ever(remote, tmp_path, monkeypatch):
    import fcntl
    uri, flat = remote; pages = PageSet(uri, cache=PageCache(tmp_path/"c", 50 << 20), part_bytes=65536); source = pages.files[0].source
    offset, length = pages.files[0].parts[2].tolist()
    fd = os.open(source.folder/f"{TEMP}{offset:x}-{length:x}", os.O_CREAT | os.O_RDWR); fcntl.flock(fd, fcntl.LOCK_EX)
    monkeypatch.setattr(cache_module, "PATIENCE", .3)
    start = time.monotonic(); source.get([(offset, length)]); os.close(fd)
    assert .2 < time.monotonic() - start < 10

def child(pages, starts, queue): queue.put(gather(pages, starts, 200))

def test_after_a_fork(remote, tmp_path):
    uri, flat = remote; pages = PageSet(uri, cache=PageCache(tmp_path/"c", 400_000), part_bytes=16384); gather(pages, [0], 5000)
    context = multiprocessing.get_context("fork"); queue = context.Queue()  # spawn is tested with the page reader; a set travels by its addresses
    p = context.Process(target=child, args=(pages, [5, 100_000, 200_000], queue)); p.start()
    assert np.array_equal(queue.get(timeout=60), np.stack([flat[s:s + 200] for s in (5, 100_000, 200_000)])); p.join()
    make, given = pages.__reduce__()  # what a spawned process is sent
    again = make(*given)
    assert again.cache.limit == 400_000 and np.array_equal(gather(again, [5], 200)[0], flat[5:205])

def test_limits_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("YUNMIN_CACHE", str(tmp_path/"x")); monkeypatch.setenv("YUNMIN_CACHE_BYTES", "5e6")
    assert (PageCache().folder, PageCache().limit) == (tmp_path/"x", 5_000_000)
    monkeypatch.setenv("YUNMIN_CACHE_BYTES", "much")
    with pytest.raises(UserError, match="YUNMIN_CACHE_BYTES='much'"): PageCache()
