"Token windows and text rows: gather, orders, mixing, skipping, resume with other ranks and workers, S3, torchrun, Trainer."
import json, os, subprocess, sys, textwrap, warnings
from itertools import islice
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from torch.utils.data import DataLoader
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.format.cache import PageCache
from yunmin_efficientdata.format import loader as module
from yunmin_efficientdata.format.loader import (Deal, TextRows, TokenLoader, TokenPages, WindowOrder, _boundaries_numpy, _permute_numpy, _take_numpy,
    boundaries, cu_seqlens, domain_of, local_order, mix_for, order_perplexity, permute, process_place, round_keys)

warnings.filterwarnings("ignore", message="This DataLoader will create")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork.*:DeprecationWarning")
FAST = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ELEMENT = pa.field("element", pa.int32(), nullable=False)
SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False), pa.field("tokens", pa.list_(ELEMENT), nullable=False)])

def write(path, lengths, seed=0, eos=0, group=64, **options):
    "A file of documents with these token counts in the layout of format.parquet; returns the flat stream."
    rng = np.random.default_rng(seed)
    rows = [np.append(rng.integers(1, 5000, n - 1), eos).astype(np.int32) for n in lengths]
    table = pa.table([pa.array([f"{Path(path).stem}-{i}" for i in range(len(rows))]), pa.array([f"문서 {i}" for i in range(len(rows))]), pa.array(rows, pa.list_(ELEMENT))], schema=SCHEMA)
    opts = dict(data_page_version="2.0", write_page_index=True, write_page_checksum=True, use_dictionary=False, compression={"id": "zstd", "text": "zstd", "tokens.list.element": "none"},
                column_encoding={"tokens.list.element": "PLAIN"}, data_page_size=4096, write_batch_size=64, store_schema=False)
    with pq.ParquetWriter(path, SCHEMA, **{**opts, **options}) as w:
        for i in range(0, len(rows), group): w.write_table(table.slice(i, group))
        w.add_key_value_metadata({"yunmin.eos_id": str(eos)})
    return np.concatenate(rows)

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("loader"); rng = np.random.default_rng(1)
    names = ("main.parquet", "social.parquet", "web-00000-of-00002.parquet", "web-00001-of-00002.parquet")
    flat = [write(d/name, rng.integers(1, 400, n), seed=i, **({"compression": "zstd"} if i == 2 else {})) for i, (name, n) in enumerate(zip(names, (300, 5, 150, 60)))]
    return [d/n for n in names], np.concatenate(flat)

def take(loader, n=None): return [b["input_ids"] for b in islice(loader, n)]
def make(files, **k): return TokenLoader(files[0], **{"seq_len": 64, "batch_size": 16, "seed": 3, "group": 4, **k})
PART = 8192 # so that the small files have several units of page order
@pytest.fixture(scope="module")
def parted(files): return TokenPages(files[0], part_bytes=PART), files[1]

# -- gather ------------------------------------------------------------------

@given(st.lists(st.integers(0, 90000), max_size=20), st.integers(0, 3000))
@hypothesis_settings(max_examples=60, **FAST)
def test_take_equals_slices(files, starts, length):
    paths, flat = files; pages = TokenPages(paths)
    starts = [s for s in starts if s + length <= len(flat)]
    expected = np.array([flat[s:s + length] for s in starts], dtype=np.int32).reshape(len(starts), length)
    assert np.array_equal(pages.take(starts, length), expected) and np.array_equal(_take_numpy(pages, np.array(starts, np.int64), length), expected)

def test_stream_equals_pyarrow_and_windows_stay_inside(files):
    paths, flat = files; pages = TokenPages(paths)
    arrow = np.concatenate([pq.read_table(p, columns=["tokens"])["tokens"].combine_chunks().flatten().to_numpy() for p in paths])
    assert np.array_equal(pages.take([0], len(pages))[0], arrow) and np.array_equal(arrow, flat)
    for starts, length in (([-1], 4), ([0, len(flat) - 3], 4), ([0], len(flat) + 1), ([len(flat) + 1], 0), ([0], -1), ([2**62], 8)):
        with pytest.raises(IndexError): pages.take(starts, length)
    assert pages.take([len(flat)], 0).shape == (1, 0)

def test_without_numba_everything_is_the_same(files, monkeypatch):
    want = [take(make(files, shuffle=s, mix={"web": .5}), 5) for s in ("window", "page")]
    monkeypatch.setattr(module, "njit", None); monkeypatch.setattr(module, "_copy", module._gather_numpy)
    got = [take(make(files, shuffle=s, mix={"web": .5}), 5) for s in ("window", "page")]
    assert all(torch.equal(a, b) for x, y in zip(want, got) for a, b in zip(x, y))

def test_anonymous_memory_stays_small(tmp_path):
    def anonymous(): return next(int(line.split()[1]) << 10 for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))
    n = 8_000_000; write(tmp_path/"big.parquet", [4000] * (n // 4000), group=500, data_page_size=1 << 20)
    before = anonymous()
    loader = TokenLoader(tmp_path/"big.parquet", 1024, 16)
    assert sum(len(b["input_ids"]) for b in loader) == n // 1024 // 16 * 16
    assert anonymous() - before < n  # a quarter of the table's 4 n bytes

def test_damage_is_noticed_at_the_first_read(tmp_path):
    write(tmp_path/"d.parquet", [300] * 100)
    pages = TokenPages(tmp_path/"d.parquet"); at = int(pages.files[0].pages.at[2]) + 40
    with open(tmp_path/"d.parquet", "r+b") as f: f.seek(at); b = f.read(1); f.seek(at); f.write(bytes([b[0] ^ 1]))
    with pytest.raises(UserError, match="page 2 .*checksum"): list(TokenLoader(tmp_path/"d.parquet", 64, 8))

# -- permutation and orders --------------------------------------------------

@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 100))
@hypothesis_settings(max_examples=60, deadline=None)
def test_permutation(n, seed, epoch):
    keys, slow = round_keys(seed, epoch), np.arange(n, dtype=np.uint64)
    fast = permute(np.arange(n), n, keys); assert np.array_equal(np.sort(fast), np.arange(n))
    _permute_numpy(slow, n, max(1, (max(n - 1, 1).bit_length() + 1) // 2), keys); assert np.array_equal(slow.astype(np.int64), fast)

def test_permutation_looks_random():
    n = 4096; a, b = (permute(np.arange(n), n, round_keys(0, e)) for e in (0, 1))
    for x in (a, b, a[np.argsort(b)]): assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < .06 and (np.abs(np.diff(x)) < 8).mean() < .01

@pytest.mark.parametrize("shuffle", ["window", "page", "none"])
@pytest.mark.parametrize("mix", [None, {"web": 1.5, "main": .4}])
def test_same_order_for_every_world_size_and_resume(parted, shuffle, mix):
    build = lambda **k: TokenLoader(parted[0], 64, 16, seed=3, shuffle=shuffle, group=3, mix=mix, **k)
    first = build(); whole, order = take(first), first.order(0)
    starts = first.dataset.grid.starts(order)
    assert np.array_equal(torch.cat(whole).numpy(), np.stack([parted[1][s:s + 64] for s in starts[:16 * len(whole)]]))
    for world in (2, 4, 8):
        assert torch.equal(torch.stack([torch.cat(r) for r in zip(*(take(build(rank=r, world_size=world)) for r in range(world)))]), torch.stack(whole))
    rng, two = np.random.default_rng(0), whole + take(first)
    for _ in range(20):
        stop, before, after = int(rng.integers(1, len(two))), build(world_size=int(rng.choice([1, 2, 4, 8]))), int(rng.choice([1, 2, 4, 8]))
        for _ in range(2): take(before, stop - before.epoch * len(whole) - before.step)  # an iterator ends with its epoch
        state = json.loads(json.dumps(before.state_dict()))
        assert state["epoch"] * len(whole) + state["step"] == stop
        rank = int(rng.integers(after)); loader = build(rank=rank, world_size=after); loader.load_state_dict(state)
        share = slice(rank * 16 // after, (rank + 1) * 16 // after)
        rest = take(loader) + (take(loader) if loader.epoch == 1 else [])
        assert len(rest) == len(two) - stop and all(torch.equal(a, b[share]) for a, b in zip(rest, two[stop:]))

@pytest.mark.parametrize("shuffle", ["window", "page"])
def test_workers_change_nothing_nor_torch_random_state(files, shuffle):
    build = lambda **k: make(files, shuffle=shuffle, seq_len=256, **k)
    want = list(build())
    for workers in range(1, 5):
        loader, random = build(num_workers=workers), torch.get_rng_state()
        got = list(loader)
        assert torch.equal(torch.get_rng_state(), random)
        assert len(got) == len(want) and all(torch.equal(a[k], b[k]) for a, b in zip(got, want) for k in a)
    assert take(loader, 3) and loader.state_dict()["step"] == 3 and loader.epoch == 1

@given(st.dictionaries(st.sampled_from(["main", "social", "web", "web-00000-of-00002"]), st.floats(0, 3.2).map(lambda v: round(v, 2)), min_size=1), st.sampled_from(["window", "page"]), st.integers(0, 99), st.integers(1, 9))
@hypothesis_settings(max_examples=60, **FAST)
def test_mixing_is_exact(parted, mix, shuffle, seed, group):
    if not any(mix.get(d, 1) for d in ("main", "social", "web")): mix["main"] = 1.
    order, epochs = WindowOrder(parted[0], 64, seed, shuffle, group, mix), 3
    grid = order.grid; turns = [order.at(np.arange(len(order)), e) for e in range(epochs)]
    for k, (d, n) in enumerate(zip(grid.domains, grid.counts)):
        members = grid.nth(k, np.arange(n)); times = [np.bincount(t, minlength=len(grid))[members] for t in turns]
        assert all(t.sum() == round(mix.get(d, 1) * n) for t in times)             # exact in every epoch
        total = sum(times); assert not n or total.max() - total.min() <= 1         # and none returns before all have come
    some = np.random.default_rng(seed).integers(0, len(order), 9) if len(order) else []
    assert np.array_equal(order.at(some, 1), turns[1][some])                       # each position by itself

def test_mix_of_one_is_balanced_and_windows_keep_to_their_domain(parted):
    loader = TokenLoader(parted[0], 64, 8, mix={"web": 2., "social": 1.})
    ends = np.cumsum([0, *map(len, parted[0].files)]); starts = loader.dataset.grid.starts(np.arange(len(loader.dataset)))
    domain = [domain_of(p) for p in parted[0].paths]
    which = lambda t: domain[int(np.searchsorted(ends, t, side="right")) - 1]
    assert all(which(s) == which(s + 63) for s in starts.tolist())
    rows = {r["domain"]: r for r in loader.mixture()}
    assert rows["web"]["drawn"] == 2 * rows["web"]["windows"] and rows["main"]["weight"] == 1 and abs(sum(r["share"] for r in rows.values()) - 1) < 1e-9
    mix = mix_for({"web": .5, "main": .5}, {d: r["windows"] for d, r in rows.items()}, size=600)
    rows = {r["domain"]: r for r in TokenLoader(parted[0], 64, 8, mix=mix).mixture()}
    assert (rows["web"]["drawn"], rows["main"]["drawn"], rows["social"]["drawn"]) == (300, 300, 0)
    for shares in ({"web": 0}, {"gone": 1}, {"web": -1, "main": 2}):
        with pytest.raises(UserError, match="share"): mix_for(shares, {"web": 5, "main": 5})

@pytest.mark.parametrize("mix", [None, {"web": 1.7}])
def test_page_order_touches_few_units_at_a_time(parted, mix):
    pages = parted[0]; loader = TokenLoader(pages, 64, 16, shuffle="page", group=3, mix=mix)
    parts = np.append(0, np.cumsum([len(f.parts) for f in pages.files])); unit_of = np.concatenate([f.part_of + n for f, n in zip(pages.files, parts)])
    units = unit_of[np.searchsorted(pages.first, loader.dataset.grid.starts(loader.order(0)), side="right") - 1]
    assert parts[-1] > 20
    changes = [len(set(units[i:i + 48].tolist())) for i in range(0, len(units), 48)]
    assert max(changes) <= 3 * 4 and len(set(units.tolist())) > 20
    last = {u: i for i, u in enumerate(units.tolist())}; begin = {u: i for i, u in reversed(list(enumerate(units.tolist())))}
    if mix is None: assert np.median([last[u] - begin[u] for u in last]) < 3 * len(units) / parts[-1] * 2  # a unit is done with soon after it began

# -- end of an epoch, skipping, state ---------------------------------------------

def test_end_of_epoch_rules(files):
    windows = len(files[1]) // 64
    drop, fill = take(make(files)), take(make(files, last="fill"))
    assert windows % 16 and len(drop) == windows // 16 and len(fill) == len(drop) + 1
    assert all(torch.equal(a, b) for a, b in zip(drop, fill))
    assert torch.equal(fill[-1][windows % 16:], drop[0][:16 - windows % 16])  # filled up from the beginning of the order
    for world in (2, 16): assert len({len(take(make(files, last="fill", rank=r, world_size=world))) for r in range(world)}) == 1

def test_skipped_batches_and_nothing_else(files):
    whole = take(make(files)); loader = make(files, num_workers=2)
    out = []
    for i, b in enumerate(loader):
        out.append(b["input_ids"])
        if i == 4: loader.skip(2); state = json.loads(json.dumps(loader.state_dict())) # workers have prepared these already
        if i == 9: loader.skip(steps=[20, 3], epoch=0); loader.skip(steps=[0], epoch=1)
    left = [i for i in range(len(whole)) if i not in (5, 6, 20)]
    assert torch.equal(torch.stack(out), torch.stack([whole[i] for i in left]))
    assert len(make(files)) - 1 == len(loader) and not torch.equal(take(loader, 1)[0], whole[0])
    resumed = make(files, rank=1, world_size=2); resumed.load_state_dict(state)
    assert torch.equal(torch.stack(take(resumed)), torch.stack([whole[i][8:] for i in range(len(whole)) if i > 6]))
    assert torch.equal(take(loader, 1)[0], take(make(files, seed=3), None)[0]) is False
    other = make(files); other.load_state_dict(loader.state_dict()); assert other.skipped == loader.skipped
    rest = make(files); rest.skip(steps=range(1, len(whole))); take(rest)
    rest = make(files); take(rest, 3); rest.skip(10**6); assert rest.skipped == {(0, s) for s in range(3, len(whole))}
    again = make(files); again.load_state_dict(rest.state_dict()); assert (again.epoch, again.step) == (1, 0)
    with pytest.raises(UserError, match="skip: step"): rest.skip(steps=[len(whole)])

def test_epochs_differ_and_state_at_the_end(files):
    loader = make(files)
    first, state = take(loader), loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0) and not torch.equal(first[0], take(loader, 1)[0])
    last = make(files); take(last, len(first)); assert (last.epoch, last.step) == (0, len(first))  # stopped exactly behind the last batch
    third = make(files); third.load_state_dict(last.state_dict()); assert (third.epoch, third.step) == (1, 0)

def test_a_state_of_other_data_or_settings_is_refused_by_name(files, tmp_path):
    loader = make(files); take(loader, 2); state = loader.state_dict()
    for change, word in ((dict(seed=4), "seed was 3, is 4"), (dict(seq_len=32), "seq_len was 64, is 32"), (dict(batch_size=8), "batch_size was 16"), (dict(shuffle="page"), "shuffle was window, is page"),
                         (dict(mix={"web": 2}), "mix was None"), (dict(last="fill"), "last was drop")):
        with pytest.raises(UserError, match=word): make(files, **change).load_state_dict(state)
    for paths in (files[0][::-1], files[0][:-1]):
        with pytest.raises(UserError, match="files was"): TokenLoader(paths, 64, 16, seed=3).load_state_dict(state)
    for bad in ({}, {"fingerprint": 1}, {**state, "step": "x"}, {**state, "skipped": [1]}):
        with pytest.raises(UserError, match="not a state"): make(files).load_state_dict(bad)
    copies = [tmp_path/p.name for p in files[0]]
    for a, b in zip(files[0], copies): b.write_bytes(a.read_bytes())
    make((copies, None)).load_state_dict(state)  # the same files elsewhere
    for options in ({}, {"compression": "zstd"}, {"write_page_checksum": False}):  # one token differs, the sizes do not
        states = []
        for seed in (1, 2):
            write(tmp_path/"x.parquet", [100] * 60, seed=seed, **options); states.append(TokenLoader(tmp_path/"x.parquet", 64, 4).state_dict())
        with pytest.raises(UserError, match="files was"): TokenLoader(tmp_path/"x.parquet", 64, 4).load_state_dict(states[0])

def test_bad_arguments_are_one_line(files, tmp_path):
    write(tmp_path/"s.parquet", [50, 30])
    assert take(TokenLoader(tmp_path/"s.parquet", 32, 8))[0].shape == (8, 32)  # repeated until it fills a batch
    cases = [(dict(seq_len=100), "not one window"), (dict(seq_len=0), "seq_len"), (dict(batch_size=6, world_size=4), "divisible by world_size=4; 4 and 8 are"), (dict(batch_size=0), "batch_size"), (dict(shuffle="row"), "shuffle"),
             (dict(rank=2, world_size=2), "rank=2"), (dict(rank=-1), "rank=-1"), (dict(world_size=0), "world_size"), (dict(last="keep"), "last"), (dict(mix={"web": 1}), "no domain or file"),
             (dict(mix={"s": float("nan")}), "from 0 up"), (dict(mix={"s": 0}), "not one window"), (dict(rank=1, world_size=None), "both, or neither")]
    for bad, word in cases:
        with pytest.raises(UserError, match=word) as e: TokenLoader(tmp_path/"s.parquet", **{"seq_len": 32, "batch_size": 8, **bad})
        assert "\n" not in str(e.value)
    write(tmp_path/"t.parquet", [20])
    with pytest.raises(UserError, match="'t' has not one window"): TokenLoader([tmp_path/"s.parquet", tmp_path/"t.parquet"], 32, 8, mix={"s": 2})
    write(tmp_path/"e.parquet", [90], eos=7)
    with pytest.raises(UserError, match="different eos"): TokenLoader([tmp_path/"s.parquet", tmp_path/"e.parquet"], 32, 8)

def test_place_from_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_place() == (1, 4) and process_place(0, 2) == (0, 2)
    with pytest.warns(UserWarning, match="4 processes run"): assert process_place(0, 1) == (0, 1)

# -- boundaries --------------------------------------------------------------------

@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
@hypothesis_settings(max_examples=60, deadline=None)
def test_boundaries_come_from_eos(rows):
    ids = np.array(rows, np.int32); pos, seq = boundaries(ids, 0)
    slow = np.empty_like(pos), np.empty_like(seq); _boundaries_numpy(ids, 0, *slow)
    assert np.array_equal(slow[0], pos) and np.array_equal(slow[1], seq) and seq.dtype == np.int32
    for row, ps, ss in zip(ids, pos, seq):
        p = s = 0
        for t in range(7):
            if t and row[t - 1] == 0: p, s = 0, s + 1
            assert (ps[t], ss[t]) == (p, s); p += 1
    lengths = np.diff(cu_seqlens(torch.from_numpy(pos)))
    assert lengths.sum() == ids.size and len(lengths) == sum(r.max() + 1 for r in seq)

# -- S3 ------------------------------------------------------------------------------

def upload(s3, paths): 
    for p in paths: s3.client.upload_file(str(p), s3.bucket, f"parquet_ready/{Path(p).name}")
    return [f"{s3.uri}/parquet_ready/{Path(p).name}" for p in paths]

def test_s3_gives_the_same_batches_and_states(s3, files, tmp_path):
    uris = upload(s3, files[0])
    for shuffle, limit in (("page", 60_000), ("window", 1 << 30)):
        cache = PageCache(tmp_path/shuffle, limit_bytes=limit)
        local = TokenLoader(TokenPages(files[0], part_bytes=PART), 64, 16, seed=3, shuffle=shuffle, group=2, mix={"main": .5})
        remote = TokenLoader(TokenPages(uris, cache=cache, part_bytes=PART), 64, 16, seed=3, shuffle=shuffle, group=2, mix={"main": .5}, ahead=4)
        a, b = take(local, 9), take(remote, 9)
        assert remote.state_dict() == local.state_dict() and not remote.pages.local
        resumed = TokenLoader(TokenPages(uris, cache=cache, part_bytes=PART), 64, 16, seed=3, shuffle=shuffle, group=2, mix={"main": .5}, num_workers=2)
        resumed.load_state_dict(local.state_dict())
        assert all(torch.equal(x, y) for x, y in zip([*a, *take(local)], [*b, *take(resumed)], strict=True))
        assert cache.used_bytes() <= max(limit, 120_000)

def test_a_cache_too_small_for_the_order_gets_a_warning(s3, files, tmp_path):
    uris = upload(s3, files[0]); assert TokenLoader(files[0], 64, 16, shuffle="page").batch_sampler.order.group == 4
    build = lambda shuffle, limit: TokenLoader(TokenPages(uris, cache=PageCache(tmp_path/"c", limit_bytes=limit), part_bytes=PART), 64, 16, shuffle=shuffle)
    with pytest.warns(UserWarning, match="take shuffle='page', or raise YUNMIN_CACHE_BYTES"): build("window", 50_000)
    with pytest.warns(UserWarning, match="lower group, or raise YUNMIN_CACHE_BYTES"): build("page", 20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error"); build("page", 90_000), build("window", 1 << 30), build("none", 10)

def test_text_rows_from_s3(s3, files):
    uris = upload(s3, files[0])
    rows = lambda paths, **k: [i for b in TextRows(paths, ["id"], **k).batches(2) for i in b["id"]]
    assert rows(uris) == rows(files[0]) and sorted(rows(uris, rank=0, world_size=2) + rows(uris, rank=1, world_size=2)) == sorted(rows(files[0]))
    with pytest.raises(UserError, match="no such file"): list(TextRows(f"{s3.uri}/gone.parquet"))

# -- text rows ------------------------------------------------------------------------

@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 7), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9)), max_size=4))
@hypothesis_settings(max_examples=150, deadline=None)
def test_deals_lose_and_repeat_nothing(groups, batch_size, phases):
    left, seen = [(i, 0, n) for i, n in enumerate(groups)], []
    for world, workers, n in phases:
        deal = Deal(left, batch_size, world, workers)
        for rank in range(world):
            streams = []
            for w in range(workers):
                streams.append([(number, r) for i in deal.mine(rank * workers + w) for number, done, rows in [left[i]] for b in range(done, rows, batch_size) for r in [range(b, min(b + batch_size, rows))]])
            merged = [s[k] for k in range(max(map(len, streams))) for s in streams if k < len(s)]  # as DataLoader takes them
            counts = deal.taken(rank, n)
            assert counts == [sum(x in s for x in merged[:n]) for s in streams]
            seen += [(number, i) for number, r in merged[:n] for i in r]
        left = deal.after(n)
    seen += [(number, i) for number, done, rows in left for i in range(done, rows)]
    assert sorted(seen) == [(i, r) for i, n in enumerate(groups) for r in range(n)]

def texts(it, n=None): return [i for b in islice(it, n) for i in b["id"]]

def test_text_rows_over_ranks_and_workers(files):
    every = texts(TextRows(files[0], ["id"]))
    assert len(set(every)) == len(every) == 515 and every == [i for p in files[0] for i in pq.read_table(p)["id"].to_pylist()]
    for world, workers in ((1, 2), (2, 2), (3, 0), (9, 2)):
        shards = [texts(DataLoader(TextRows(files[0], ["id"], rank=r, world_size=world), batch_size=None, num_workers=workers)) for r in range(world)]
        assert sorted(sum(shards, [])) == sorted(every)
    even = [list(TextRows(files[0], rank=r, world_size=3, batch_size=8, even=True).batches(w)) for r, w in ((0, 0), (1, 0), (2, 0))]
    assert len({len(e) for e in even}) == 1 and len(even[0]) > 5

def test_text_rows_resume(files):
    make = lambda **k: TextRows(files[0], ["id", "text"], 8, **k)
    whole = texts(make().batches(2))
    for stop, again in ((1, 2), (13, 2), (30, 2), (13, 0), (40, 1)):
        rows = make(); before = texts(rows.batches(2), stop); state = json.loads(json.dumps(rows.state_dict()))
        rest = make(); rest.load_state_dict(state); after = texts(rest.batches(again), None)
        assert sorted(before + after) == sorted(whole)
        if again == 2: assert before + after == whole  # the very same stream
        assert texts(rest.batches(2)) == whole  # and the next epoch is a whole one
    ranks = [make(rank=r, world_size=2) for r in range(2)]; got = [texts(r.batches(0), 9) for r in ranks]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    third = [make(rank=r, world_size=3) for r in range(3)]
    for t in third: t.load_state_dict(ranks[0].state_dict())
    got += [texts(t.batches(2), 3) for t in third]; fourth = make(); fourth.load_state_dict(third[1].state_dict()); got.append(texts(fourth))
    assert sorted(sum(got, [])) == sorted(whole)
    with pytest.raises(UserError, match="other files or another batch_size"): TextRows(files[0], batch_size=9).load_state_dict(state)
    with pytest.raises(UserError, match="rank=2"): TextRows(files[0], rank=2, world_size=2)

# -- in company ---------------------------------------------------------------------------

def test_stateful_dataloader_or_its_way_of_resuming(files):
    "torchdata's loader remembers how many batches the sampler gave and asks an iterable data set for its state; both resume exactly."
    loader = make(files); whole = take(make(files))
    sampler = loader.batch_sampler; one = iter(sampler); [next(one) for _ in range(5)]
    assert list(islice(iter(make(files).batch_sampler), 5, None)) == list(one)
    try: from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        rows = TextRows(files[0], ["id"], 8); it = iter(rows); before = texts(it, 7)
        rest = TextRows(files[0], ["id"], 8); rest.load_state_dict(json.loads(json.dumps(rows.state_dict())))
        assert before + texts(rest) == texts(TextRows(files[0], ["id"], 8))
        return
    for workers in (0, 2):
        build = lambda: StatefulDataLoader(make(files).dataset, batch_sampler=make(files).batch_sampler, num_workers=workers)
        a, b = build(), build(); first = take(a, 7); b.load_state_dict(a.state_dict())
        assert torch.equal(torch.stack(first + take(b)), torch.stack(whole))
        build = lambda: StatefulDataLoader(TextRows(files[0], ["id"], 8), batch_size=None, num_workers=workers)
        a, b = build(), build(); before = texts(a, 7); b.load_state_dict(a.state_dict())
        assert before + texts(b) == texts(build())

TORCHRUN = '''
import json, sys, torch, torch.distributed as dist
from yunmin_efficientdata.format.loader import TextRows, TokenLoader
torch.set_num_threads(1); dist.init_process_group("gloo"); rank = dist.get_rank()
paths, out = json.loads(sys.argv[1]), sys.argv[2]
loader = TokenLoader(paths, 64, 16, seed=3, rank=None, world_size=None, num_workers=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 1)); seen = []
for epoch in range(2):
    for b in loader:
        model(b["input_ids"].float() / 5000).sum().backward(); seen += b["input_ids"].tolist()
text = [i for b in TextRows(paths, ["id"], 8, rank, 2).batches(1) for i in b["id"]]  # ends at other times in each process; nobody waits
even = 0
for b in TextRows(paths, ["id"], 8, rank, 2, even=True).batches(0): dist.all_reduce(torch.ones(1)); even += 1
json.dump({"seen": seen, "text": text, "even": even, "state": loader.state_dict()}, open(f"{out}/{rank}.json", "w"))
dist.destroy_process_group()
'''

def test_torchrun_with_two_gloo_processes(files, tmp_path):
    (tmp_path/"train.py").write_text(textwrap.dedent(TORCHRUN))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path/"train.py"), json.dumps([str(p) for p in files[0]]), str(tmp_path)],
                         env=env, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = (json.loads((tmp_path/f"{r}.json").read_text()) for r in range(2))
    one = make(files); whole = [x.tolist() for _ in range(2) for x in take(one)]
    assert [row for i in range(0, len(a["seen"]), 8) for row in a["seen"][i:i + 8] + b["seen"][i:i + 8]] == [row for x in whole for row in x]
    assert a["state"] == b["state"] == one.state_dict()
    assert not set(a["text"]) & set(b["text"]) and len(a["text"]) != len(b["text"]) and sorted(a["text"] + b["text"]) == sorted(texts(TextRows(files[0], ["id"])))
    assert a["even"] == b["even"] > 10

def test_trainer_sees_the_loaders_batches_and_resumes(files, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    class Recorder(Trainer):
        def __init__(self, loader, **k): super().__init__(train_dataset=loader.dataset, **k); self.loader, self.seen = loader, []
        def get_train_dataloader(self): return DataLoader(self.loader.dataset, batch_sampler=self.loader.batch_sampler) if self.rows else self.loader
        def compute_loss(self, model, inputs, **k): self.seen.append(inputs["input_ids"].clone()); return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss
    def train(loader, steps, rows):
        Recorder.rows = rows; torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=5000, n_positions=64, n_embd=8, n_layer=1, n_head=1))
        trainer = Recorder(loader, model=model, args=TrainingArguments(str(tmp_path), max_steps=steps, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no"))
        trainer.train(); return trainer.seen
    whole = take(make(files))
    loader = make(files); assert torch.equal(torch.stack(train(loader, 3, False)), torch.stack(whole[:3]))
    rest = make(files); rest.load_state_dict({**loader.state_dict(), "step": 3}); assert torch.equal(torch.stack(train(rest, 2, False)), torch.stack(whole[3:5]))
    assert torch.equal(torch.stack(train(make(files), 2, True)), torch.stack(whole[:2]))

def test_the_order_matters_on_a_sorted_file():
    torch.set_num_threads(1); rng = np.random.default_rng(0)
    follow = rng.integers(0, 60, (4, 60, 2)); rows = np.zeros((4 * 240, 33), np.int64)
    for i in range(len(rows)):
        for t in range(1, 33): rows[i, t] = follow[i // 240, rows[i, t - 1], rng.integers(2)]
    train, held = rows[np.arange(960) % 12 > 0], rows[::12]
    local, everywhere = (order_perplexity(train[o], held, 60, batch_size=4, rate=1e-2) for o in (local_order(len(train), 110), rng.permutation(len(train))))
    assert everywhere < .9 * local
