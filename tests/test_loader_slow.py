"""What takes longer: the order of real tokens through every world size and worker count, speed of the gather against raw files, bytes fetched from S3, what an order is worth.
`YUNMIN_CORPUS=FOLDER scripts/run_tests.sh -m slow -s tests/test_loader_slow.py`; figures are printed."""
import hashlib, json, time
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.core.records import read_jsonl
from yunmin_efficientdata.format.cache import PageCache
from yunmin_efficientdata.format.loader import TokenLoader, TokenPages, local_order, order_perplexity
from yunmin_efficientdata.format.tokenizer import Encoder, as_pretrained, train_bpe
from test_loader import SCHEMA, upload, write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This DataLoader will create")]
DOMAINS, VOCAB = ("assembly", "main_data", "social", "textbook", "web"), 1024

def write_rows(path, rows, page_bytes=1 << 16, group=200):
    table = pa.table([pa.array([str(i) for i in range(len(rows))]), pa.array([""] * len(rows)), pa.array(rows, pa.list_(SCHEMA.field("tokens").type.value_field))], schema=SCHEMA)
    with pq.ParquetWriter(path, SCHEMA, data_page_version="2.0", write_page_index=True, write_page_checksum=True, use_dictionary=False, compression={"id": "zstd", "text": "zstd", "tokens.list.element": "none"},
                          column_encoding={"tokens.list.element": "PLAIN"}, data_page_size=page_bytes, write_batch_size=64, store_schema=False) as w:
        for i in range(0, len(rows), group): w.write_table(table.slice(i, group))
        w.add_key_value_metadata({"yunmin.eos_id": "0"})

@pytest.fixture(scope="module")
def real(corpus, tmp_path_factory):
    "Real text by domain: training files, sorted by domain, and held-out tokens; a small byte-level BPE trained on them."
    d, store = tmp_path_factory.mktemp("real"), open_store(str(corpus))
    texts = {k: [r["text"] for r in (item[1] for item in read_jsonl(store, f"small/{k}.jsonl")) if isinstance(r, dict)] for k in DOMAINS}
    encode = Encoder(as_pretrained(train_bpe((t for k in DOMAINS for t in texts[k]), VOCAB)))
    rows = {k: [np.asarray(r, np.int32) for i in range(0, len(texts[k]), 500) for r in encode(texts[k][i:i + 500])] for k in DOMAINS}
    for k in DOMAINS: write_rows(d/f"{k}.parquet", [r for i, r in enumerate(rows[k]) if i % 20])
    return [d/f"{k}.parquet" for k in DOMAINS], {k: np.concatenate(rows[k][::20]) for k in DOMAINS}

def digest(batches): return [hashlib.blake2b(b["input_ids"].numpy().tobytes(), digest_size=8).digest() for b in batches]

@pytest.mark.parametrize("shuffle,mix", [("window", None), ("page", {"web": 2., "assembly": .5})])
def test_one_order_for_all_ranks_and_workers_and_twenty_resumes(real, shuffle, mix):
    build = lambda **k: TokenLoader(TokenPages(real[0], part_bytes=1 << 16), 256, 16, seed=5, shuffle=shuffle, group=8, mix=mix, **k)
    first = build(); whole = [torch.stack([b["input_ids"] for b in first]) for _ in range(2)]
    two, differences, rng = torch.cat(whole), 0, np.random.default_rng(0)
    for world in (1, 2, 4, 8):
        for r in range(world):
            got = torch.stack([b["input_ids"] for b in build(rank=r, world_size=world, num_workers=(r + world) % 5)])
            differences += int((got != whole[0][:, r * 16 // world:(r + 1) * 16 // world]).sum())
    for i in range(20):
        stop = int(rng.integers(1, len(whole[0]))); a, b = rng.choice([1, 2, 4, 8], 2, replace=False).tolist()
        before = build(world_size=a, num_workers=i % 5)
        for k, _ in enumerate(before, 1):
            if k == stop: break
        r = int(rng.integers(b)); after = build(rank=r, world_size=b, num_workers=(i + 2) % 5); after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        got = torch.stack([x["input_ids"] for _ in range(2) for x in after])
        differences += int((got != two[stop:, r * 16 // b:(r + 1) * 16 // b]).sum())
    print(f"\n{shuffle}, {len(whole[0])} steps an epoch, world sizes 1, 2, 4, 8, workers 0 to 4, 20 resumes: {differences} tokens differ")
    assert differences == 0

def test_gather_against_raw_files(tmp_path):
    from numba import njit
    n = 40_000_000; rng = np.random.default_rng(0)
    write(tmp_path/"t.parquet", rng.integers(50, 1500, n // 775), group=4000, data_page_size=1 << 20)
    pages = TokenPages(tmp_path/"t.parquet"); n = len(pages)
    with open(tmp_path/"raw", "wb") as f:
        for i in range(0, n, 1 << 20): f.write(pages.take([i], min(1 << 20, n - i)).tobytes())
    raw = np.memmap(tmp_path/"raw", np.int32, "r"); flat = np.asarray(raw)
    @njit(nogil=True)
    def kernel(starts, length, data, out):
        for i in range(len(starts)): out[i] = data[starts[i]:starts[i] + length]
    def numba_raw(s):
        out = np.empty((len(s), 1024), np.int32); kernel(s, 1024, flat, out); return out
    ways = {"numpy memmap stack": lambda s: np.stack([raw[a:a + 1024] for a in s]), "numba on a raw file": numba_raw, "raw read": lambda s: np.array(raw[s[0]:s[0] + 16384]).reshape(16, 1024), "pages": lambda s: pages.take(s, 1024)}
    def ratios(batches, names):
        seconds = {k: [] for k in names}
        for s in batches[:50]: assert all(np.array_equal(ways[k](s), pages.take(s, 1024)) for k in names)
        for _ in range(9):
            for k in names:
                t = time.process_time()
                for s in batches: ways[k](s)
                seconds[k].append(time.process_time() - t)
        return {k: float(np.median(np.array(seconds[k]) / seconds["pages"])) for k in names}
    random = ratios([rng.integers(0, n - 1024, 16) for _ in range(2000)], ["numpy memmap stack", "numba on a raw file", "pages"])
    sequential = ratios([np.arange(16) * 1024 + i * 16384 for i in range(n // 16384)], ["raw read", "pages"])
    print("\nspeed of page windows over", {"random": {k: round(v, 2) for k, v in random.items()}, "sequential": {k: round(v, 2) for k, v in sequential.items()}})
    assert random["numpy memmap stack"] >= 1.8 and random["numba on a raw file"] >= .8 and sequential["raw read"] >= .8

@pytest.mark.parametrize("shuffle,share,limit", [("page", 2., 1.2), ("window", 2., 1.2), ("page", .05, 2.), ("window", .05, np.inf)])  # window order is not made for small caches: told, not limited
def test_bytes_from_s3(s3, tmp_path, shuffle, share, limit):
    rng = np.random.default_rng(0); paths = [tmp_path/f"{k}.parquet" for k in "ab"]
    for k, p in enumerate(paths): write(p, rng.integers(50, 1500, 8000), seed=k, group=1000, data_page_size=1 << 16, write_batch_size=256)
    column = 4 * len(TokenPages(paths)); cache = PageCache(tmp_path/"cache", limit_bytes=int(column * share), block_bytes=1 << 14)
    loader = TokenLoader(TokenPages(upload(s3, paths), cache=cache, part_bytes=1 << 16), 512, 16, shuffle=shuffle, group=8)
    local = TokenLoader(TokenPages(paths, part_bytes=1 << 16), 512, 16, shuffle=shuffle, group=8)
    assert digest(loader) == digest(local)
    cold = cache.counters["bytes_fetched"]; assert digest(loader) == digest(local)
    print(f"\n{shuffle}, cache {share:.0%} of {column} bytes: fetched {cold / column:.3f} of the column in the first epoch, {(cache.counters['bytes_fetched'] - cold) / column:.3f} in the second")
    assert cold <= limit * column and cache.used_bytes() <= share * column * 1.1

def test_what_an_order_is_worth(real, tmp_path):
    "One pass over real text sorted by domain, in three orders and with three seeds."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        some = []
        for path in real[0]: # 80,000 tokens of each domain
            rows = [np.asarray(r, np.int32) for r in pq.read_table(path)["tokens"].to_pylist()[:4000]]
            write_rows(tmp_path/path.name, rows[:int(np.searchsorted(np.cumsum([len(r) for r in rows]), 80_000))], 1 << 13); some.append(tmp_path/path.name)
        pages, table = TokenPages(some, part_bytes=1 << 13), {}
        heldout = np.concatenate([t[:len(t) // 64 * 64].reshape(-1, 64)[:60] for t in real[1].values()])
        for seed in range(3):
            for name in ("window", "page", "row group"):
                loader = TokenLoader(pages, 64, 16, seed=seed, shuffle="page" if name == "page" else "window", group=16)
                order = local_order(len(loader.dataset), len(loader.dataset) // 40, seed) if name == "row group" else loader.order(0)
                table.setdefault(name, []).append(order_perplexity(loader.dataset.take(order), heldout, VOCAB, seed))
        print("\nPPL after one pass, three seeds:", {k: [round(x, 2) for x in v] for k, v in table.items()}, len(loader.dataset), "windows of 64")
    finally: torch.set_num_threads(threads)
    window, page, group = (float(np.mean(np.log(table[k]))) for k in ("window", "page", "row group"))
    print(f"page order keeps {(group - page) / (group - window):.0%} of what window order gains over the row group's")
    assert max(table["page"]) < min(table["row group"]) and (group - page) > .5 * (group - window)
