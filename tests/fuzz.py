"""A mutation fuzzer with a seed: what people and machines do to files, put before the command or function that reads them.

    python tests/fuzz.py                        10,000 mutated lines, and 1,000 mutated files over all targets
    python tests/fuzz.py --report               the same, written to reports/fuzz.md
    python tests/fuzz.py --targets npy,adapter --count 50 --seed 3
    python tests/fuzz.py --targets npy --only 17          one case again, with its traceback

Mutated lines stand among whole ones in .jsonl, .jsonl.gz and .jsonl.zst files, and phase 1's reader, filters and writer go over them. Python's own json module, by the rules that `document_of` writes down, says what each line is;
then every line must be where it belongs (a kept record, a filter's count, quarantine under its file and number), with its content, and every whole line must be as if it stood alone.

Every mutated file ends in one of four ways: `same` (the result of the whole file), `other` (still a valid file, with another content; only where a format has no checksum),
`counted` (less, and the loss is counted) or `refused` (a `UserError` of one line that names the file). Anything else is a fault:
`traceback`, `hang`, `crash`, `unnamed` (refused without a name), `silent` (something is missing and nobody says so).
The cases of a target run in a process of its own with little memory, so that a header that promises 2^60 bytes, or a fault in native code, is seen too.
"""
from __future__ import annotations
import argparse, contextlib, copy, gzip, hashlib, io, json, os, random, re, resource, shutil, signal, struct, subprocess, sys, tempfile, time, traceback, zipfile, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

SECONDS, MEMORY = 20, 3 << 30  # a case may take, and may add to the process's address space
GOOD, FAULTS = ("same", "other", "counted", "refused"), ("traceback", "hang", "crash", "unnamed", "silent")

# -- mutations of bytes --

SPECIAL = (b"\xef\xbb\xbf", b"\0", b"\0" * 300, b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"\r", b"\n\n", b"\x1b[31m", b"\xe2\x80\xa8", b"1e999", b"-1", b"9" * 400, b"NaN", b"Infinity",
           b"[" * 3000, b"{\"a\":" * 600, b"\"", b"\\", b"null", b"<script>", b"../../x", b"PAR1", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04\x95", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x7f" * 8, b"\xff" * 8)

def flip(r, b):
    b = bytearray(b)
    for _ in range(r.choice((1, 1, 2, 8)) if b else 0): b[r.randrange(len(b))] ^= 1 << r.randrange(8)
    return bytes(b)
def _span(r, b): i = r.randrange(len(b) + 1); return i, min(len(b), i + r.choice((1, 4, 16, 256)))
def cut_end(r, b): return b[:r.randrange(len(b) + 1)]
def cut_begin(r, b): return b[r.randrange(len(b) + 1):]
def remove(r, b): i, j = _span(r, b); return b[:i] + b[j:]
def zero(r, b): i, j = _span(r, b); return b[:i] + b"\0" * (j - i) + b[j:]
def double(r, b): i, j = _span(r, b); return b[:j] + b[i:j] + b[j:]
def noise(r, b): i, j = _span(r, b); return b[:i] + r.randbytes(r.choice((1, 8, 64))) + b[j:]
def special(r, b): i, j = _span(r, b); return b[:i] + r.choice(SPECIAL) + b[i if r.random() < .5 else j:]
def crlf(r, b): return b.replace(b"\n", b"\r\n")
def bom(r, b): return b"\xef\xbb\xbf" + b
def utf16(r, b): return b.decode("utf-8", "replace").encode("utf-16")
def twice(r, b): return b + b
def tail(r, b): return b + r.choice(SPECIAL)
def edge(r, b): # near the beginning or the end, where headers and footers are
    i = r.randrange(min(len(b), 64)) if r.random() < .4 else len(b) - 1 - r.randrange(min(len(b), 400))
    return b[:i] + bytes([r.choice((0, 1, 0x7f, 0x80, 0xff, r.randrange(256)))]) + b[i + 1:] if b else b
def empty(r, b): return b""
def blank(r, b): return b" \n\t\n"
def packed(r, b): return gzip.compress(b)

BYTES = (flip, flip, flip, cut_end, cut_end, cut_begin, remove, zero, double, noise, special, special, crlf, bom, utf16, twice, tail, edge, edge, empty, blank, packed)

# -- mutations of JSON --

class Raw(str):
    "JSON text that stands in the place of a value as it is."

WEIRD = (None, True, False, 0, -1, 1, 2**31, 2**60, 2**64, -2**63, 10**400, .5, -0.0, 1e308, "", " ", "text", "\ud800", "\0", "../../x", "/etc/passwd", "<script>alert(1)</script>", "x" * 100_000, [], {}, [[]], [None], {"": None},
         Raw("1e999"), Raw("NaN"), Raw("-Infinity"), Raw("[" * 2000 + "]" * 2000), Raw("[" * 200 + "]" * 200), Raw('{"a":1,"a":2}'), Raw("01"), Raw("tru"), Raw("'x'"), Raw(""), Raw("[1,]"), list(range(5000)))

def nodes(value, path=()):
    "Paths to all values in a JSON value."
    yield path
    if isinstance(value, dict):
        for k, v in value.items(): yield from nodes(v, path + (k,))
    elif isinstance(value, list):
        for i, v in enumerate(value[:50]): yield from nodes(v, path + (i,))

def change_json(r, value, weird=WEIRD):
    "A copy of a JSON value with one thing changed; may hold `Raw`."
    value, path = copy.deepcopy(value), r.choice(list(nodes(value)))
    if not path: return r.choice(weird)
    above = value
    for k in path[:-1]: above = above[k]
    k, what = path[-1], r.choice(("put", "put", "put", "put", "drop", "name", "swap", "near"))
    if what == "drop": del above[k]
    elif what == "name" and isinstance(above, dict): above[r.choice((k + "x", k.upper(), "", "__proto__", "../" + k, k + "\ud800"))] = above.pop(k)
    elif what == "swap" and len(above) > 1:
        other = r.choice(list(above) if isinstance(above, dict) else range(len(above))); above[k], above[other] = above[other], above[k]
    elif what == "near" and type(above[k]) in (int, float): above[k] = r.choice((above[k] + 1, -above[k], above[k] * 2, above[k] * 2**40, str(above[k]), float(above[k]), above[k] + .5))
    else: above[k] = r.choice(weird)
    return value

def json_text(value) -> str:
    "JSON that may hold `Raw`, lone surrogates and NaN."
    marks = {}
    def hide(v):
        if isinstance(v, Raw): marks[f"@@raw{len(marks)}@@"] = str(v); return list(marks)[-1]
        if isinstance(v, dict): return {k: hide(x) for k, x in v.items()}
        return [hide(x) for x in v] if isinstance(v, list) else v
    text = _dump(hide(value))
    for mark, raw in marks.items(): text = text.replace(f'"{mark}"', raw)
    return text

def _dump(v):
    limit = sys.get_int_max_str_digits(); sys.set_int_max_str_digits(0)
    try: return json.dumps(v)
    finally: sys.set_int_max_str_digits(limit)

def encode(text: str) -> bytes: return text.encode("utf-8", "surrogatepass")

def mutate_json(r, b: bytes) -> bytes:
    try: value = json.loads(b)
    except ValueError: return flip(r, b)
    return encode(json_text(change_json(r, value)))

def mutate_lines(r, b: bytes) -> bytes:
    "Of JSON lines, one changed, doubled, moved or dropped."
    lines = b.split(b"\n"); i = r.randrange(len(lines))
    lines[i] = r.choice((lambda: mutate_json(r, lines[i]), lambda: mutate_json(r, lines[i]), lambda: r.choice(BYTES)(r, lines[i]), lambda: lines[i] + b"\n" + lines[i], lambda: b"[" + lines[i] + b"]"))()
    return b"\n".join(lines)

# -- mutations of YAML, CSV and binary formats --

YAML_WEIRD = tuple(w for w in WEIRD if not isinstance(w, Raw)) + (2.5e300, "~", "1e-5", "0x10", "12:30:45", "!!python/object:os.system", [["a", 1]], {"a": {"b": 1}})
YAML_RAW = (b"!!python/object/apply:os.system ['exit 1']\n", b"\n? [a, b]\n: 1\n", b"\n<<: [1]\n", b"\n- 1\n", b"\n\t- x\n", b"\n&a [*a]\n", b"\n!!binary '!'\n", b"\n!!timestamp 9999-99-99\n", b"\n%YAML 9.9\n---\n", b"\n---\na: 1\n", b"\nx: .inf\n", b"\n{a: {b: {c: " + b"[" * 500 + b"\n",
            b"\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n")

def mutate_yaml(r, b: bytes) -> bytes:
    import yaml
    way = r.random()
    if way < .25: i = b.find(b"\n", r.randrange(len(b) + 1)) + 1; return b[:i] + r.choice(YAML_RAW) + b[i:]
    if way < .4: lines = b.split(b"\n"); i = r.randrange(len(lines)); return b"\n".join(lines[:i + 1] + lines[i:])  # a key twice
    value = change_json(r, yaml.safe_load(b) or {}, YAML_WEIRD)
    try: return encode(yaml.safe_dump(value, allow_unicode=True))
    except (yaml.YAMLError, ValueError): return encode(json_text(value))

def mutate_csv(r, b: bytes) -> bytes:
    rows = [line.split(b",") for line in b.split(b"\n")]; row = r.choice(rows); i = r.randrange(len(row))
    row[i] = r.choice((b"", b"x", b"nan", b"inf", b"1e999", b"-1", b'"', b"=1+1", b"9" * 400, row[i] + b",1", b"\xff", b"a b"))
    return b"\n".join(b",".join(x) for x in rows)

def mutate_npy(r, b: bytes) -> bytes:
    "Another header before the same numbers."
    import numpy as np
    head = {"descr": "<f4", "fortran_order": False, "shape": (5,)}
    with contextlib.suppress(ValueError): version = np.lib.format.read_magic(f := io.BytesIO(b)); shape, order, kind = np.lib.format.read_array_header_1_0(f); head |= {"shape": shape, "descr": kind.str}
    body = b[128:]; n = head["shape"][0] if head["shape"] else 1
    head |= r.choice(({"shape": (2**60,)}, {"shape": (2**62, 2**62)}, {"shape": (n + 1,)}, {"shape": (max(0, n - 1),)}, {"shape": ()}, {"shape": (-1,)}, {"shape": (1, n)}, {"shape": (0,)}, {"shape": "x"}, {"shape": (1.5,)}, {"descr": "|O"}, {"descr": "<f8"}, {"descr": "<i4"}, {"descr": "<f2"},
                      {"descr": ">f4"}, {"descr": "|S4"}, {"descr": "<U1"}, {"descr": [("a", "<f4")]}, {"descr": "<M8[D]"}, {"descr": "V4"}, {"descr": 3}, {"descr": "<c8"}, {"fortran_order": True}, {"fortran_order": 7}, {"more": 1}))
    text = repr(head).encode(); text += b" " * (118 - len(text) - 1) + b"\n" if len(text) < 117 else b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + body

def mutate_npz(r, b: bytes) -> bytes:
    "One member of a zip file changed, dropped, renamed, doubled or packed."
    with zipfile.ZipFile(io.BytesIO(b)) as z: members = {n: z.read(n) for n in z.namelist()}
    name, out = r.choice(list(members)), io.BytesIO(); what = r.choice(("header", "header", "bytes", "bytes", "drop", "name", "pack", "climb", "twice"))
    with zipfile.ZipFile(out, "w") as z:
        for n, data in members.items():
            mine = n == name
            if mine and what == "drop": continue
            if mine and what in ("header", "bytes"): data = mutate_npy(r, data) if what == "header" else r.choice(BYTES)(r, data)
            z.writestr(_entry({"name": n + "x.npy", "climb": "../../" + n}.get(what, n) if mine else n), data, zipfile.ZIP_DEFLATED if mine and what == "pack" else zipfile.ZIP_STORED)
            if mine and what == "twice":
                import warnings
                with warnings.catch_warnings(): warnings.simplefilter("ignore"); z.writestr(_entry(n), flip(r, data))
    return out.getvalue()

def _entry(name: str): return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no clock in the bytes

def mutate_safetensors(r, b: bytes) -> bytes:
    "Another header before the same bytes, or another length of the header."
    n = int.from_bytes(b[:8], "little")
    if r.random() < .25: return struct.pack("<Q", r.choice((0, 1, n - 1, n + 1, n + 8, len(b), 2**31, 2**60, 2**64 - 1))) + b[8:]
    header = json.loads(b[8:8 + n]); text = encode(json_text(change_json(r, header)))
    return struct.pack("<Q", len(text)) + text + b[8 + n:]

def mutate_footer(r, b: bytes) -> bytes:
    "A byte of a Parquet footer."
    n = int.from_bytes(b[-8:-4], "little"); i = len(b) - 8 - r.randrange(n + 4) if n < len(b) else r.randrange(len(b))
    i = min(i, len(b) - 1)
    return b[:i] + bytes([r.choice((0, 1, 0x0f, 0x7f, 0x80, 0xff, b[i] ^ 1 << r.randrange(8), r.randrange(256)))]) + b[i + 1:]

BY_SUFFIX = {".json": mutate_json, ".jsonl": mutate_lines, ".yaml": mutate_yaml, ".csv": mutate_csv, ".npy": mutate_npy, ".npz": mutate_npz, ".safetensors": mutate_safetensors, ".parquet": mutate_footer, ".ipynb": mutate_json}

def mutated(r, name: str, b: bytes) -> bytes:
    "A file changed as its kind suggests, or in its bytes; sometimes both."
    kind = BY_SUFFIX.get(Path(name).suffix)
    if kind and r.random() < .6:
        with contextlib.suppress(Exception): b = kind(r, b)
        if r.random() < .85: return b
    return r.choice(BYTES)(r, b)

# -- lines: what each is, said by another parser than ours --

LIMIT = 20_000  # bytes of a line

class Lost(Exception): "Something is missing, or is not what it was, and nobody says so."

def _numbers(value):
    "Integers that 64 bits do not hold are floats to most readers of JSON, but those no float holds are refused."
    if isinstance(value, dict): return {_numbers(k): _numbers(v) for k, v in value.items()}
    if isinstance(value, list): return [_numbers(v) for v in value]
    if isinstance(value, str): value.encode()  # no lone surrogates
    if type(value) is float and value in (float("inf"), float("-inf")): raise ValueError("no number")
    return float(value) if type(value) is int and not -2**63 <= value < 2**64 else value

def _depth(value) -> int: return 1 + max((_depth(v) for v in (value.values() if isinstance(value, dict) else value)), default=0) if isinstance(value, (dict, list)) else 0

def document_of(line: bytes, first: bool = False):
    "A line as the record that it is; None when it is no document; False when nothing stands there."
    if first and line.startswith(b"\xef\xbb\xbf"): line = line[3:]
    if len(line.rstrip(b"\r")) > LIMIT: return None
    if not (line := line.strip(b" \t\r\n")): return False
    def pairs(found):
        if sum(k == "text" for k, _ in found) > 1: twice.append(dict(found))
        return dict(found)
    def no(name): raise ValueError(name)
    twice = []
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=pairs, parse_constant=no)
        if type(record) is not dict or record in twice or _depth(record) > 128: return None
        own, record = record.get("id"), _numbers(record)
        if type(own) is int: record["id"] = own
    except (ValueError, RecursionError, OverflowError): return None
    text = record.get("text")
    return record if type(text) is str and text.strip() and "\0" not in text else None

def unpacked(name: str, b: bytes) -> bytes | None: # None: damaged
    "What a file holds. Nothing at all is no gzip and no zstd file, and zeros behind the end are padding."
    import zstandard
    if not name.endswith((".gz", ".zst")): return b
    out, rest = b"", b.lstrip(b"\0")
    try:
        if name.endswith(".gz"): return gzip.decompress(b) if b else None
        while rest:
            frame = zstandard.ZstdDecompressor().decompressobj(); out += frame.decompress(rest)
            if not frame.eof: return None
            rest = frame.unused_data.lstrip(b"\0")
        return out if b else None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError): return None

def prepared_docs(folder, raw):
    "Phase 1's first stage over a folder of raw files: records kept, manifest, quarantine."
    from yunmin_efficientdata.core.executor import make_executor
    from yunmin_efficientdata.core.ledger import Meter, Stage
    from yunmin_efficientdata.core.settings import load_settings
    from yunmin_efficientdata.core.store import open_store
    from yunmin_efficientdata.dedup import prepare as P
    from types import SimpleNamespace
    store = open_store(folder)
    with make_executor(workers=1) as executor, Meter() as meter:
        ctx = SimpleNamespace(store=store, settings=load_settings("configs/demo", [f"clean.max_line_bytes={LIMIT}", "clean.max_domains=100000", "clean.review_samples=0"]), executor=executor)
        files, ignored = P.list_raw(store, source := P.normal_source(store, str(raw)))
        P.prepare(ctx, Stage(store, "dedup.prepare", "0", meter), files, ignored, [source])
    records = [json.loads(x) for k in store.list("dedup_ready/") if "/part-" in k for x in store.read(k).splitlines()]
    return records, json.loads(store.read("dedup_ready/manifest.json"))["total"], [json.loads(x) for k in store.list("dedup_ready/quarantine/") for x in store.read(k).splitlines()]

def account(folder, raw):
    "Prepare raw files and hold what came out against `document_of`. Raises `Lost`. Returns (records, number of lines that were dropped and counted, fate of each physical line by file)."
    from yunmin_efficientdata.core.settings import CleanSettings
    from yunmin_efficientdata.dedup.clean import Cleaner
    from yunmin_efficientdata.dedup.prepare import base_id, document, file_domain, safe_domain
    cleaner, wanted, filtered, bad, fates = Cleaner(CleanSettings()), Counter(), Counter(), {}, {}
    damaged = [p.name for p in sorted(Path(raw).iterdir()) if unpacked(p.name, p.read_bytes()) is None]
    def key(record): return json.dumps(record | {"id": base_id(record["id"])}, sort_keys=True)
    for p in sorted(Path(raw).iterdir()):
        if p.name in damaged: continue
        fates[p.name] = []
        for i, line in enumerate(unpacked(p.name, p.read_bytes()).split(b"\n"), 1):
            record = document_of(line, i == 1); fate = "blank" if record is False else "quarantined"
            if record:
                text, _, dropped, *_ = cleaner.process(record["text"])
                fate = "filtered" if dropped else "kept"
                if dropped: filtered[dropped] += 1
                else: wanted[key(json.loads(json.dumps(document(record, text, safe_domain(_text(record.get("domain")) or file_domain(p.name)))[0])))] += 1
            elif record is None: bad[p.name, i] = line
            fates[p.name].append(fate)
    records, total, quarantine = prepared_docs(folder, raw)
    if total["read"] != total["kept"] + sum(total["filtered"].values()) + sum(total["quarantined"].values()): raise Lost(f"the counts do not add up: {total}")
    if total["kept"] != len(records) or len(quarantine) != sum(total["quarantined"].values()): raise Lost(f"{len(records)} records and {len(quarantine)} lines in quarantine, but counted {total}")
    found = {(q["file"], q["line"]): q["reason"] for q in quarantine}
    if sorted(f for (f, _), reason in found.items() if reason == "corrupt_compression") != damaged: raise Lost(f"damaged files {damaged}, in quarantine {found}")
    ours = {place for place in found if place[0] not in damaged}
    if ours != bad.keys(): raise Lost(f"in quarantine by mistake: {[(x, found[x]) for x in sorted(ours - bad.keys())][:3]}; missing there: {[(x, bad[x][:200]) for x in sorted(bad.keys() - ours)][:3]}")
    if not damaged:
        got = Counter(map(key, records))
        if got != wanted: raise Lost(f"{sum((wanted - got).values())} records are missing or other, the first is {next(iter(wanted - got), '-')[:300]}; {sum((got - wanted).values())} nobody wrote: {next(iter(got - wanted), '-')[:300]}")
        if Counter(total["filtered"]) != filtered: raise Lost(f"filtered {total['filtered']}, expected {dict(filtered)}")
        if total["read"] != sum(f != "blank" for x in fates.values() for f in x): raise Lost(f"{total['read']} lines read of {fates}")
    return records, sum(total["filtered"].values()) + sum(total["quarantined"].values()), fates

def _text(value) -> str: return value if type(value) is str else "" if value is None else json.dumps(_numbers(value), ensure_ascii=False, separators=(",", ":"))

LINE_ENDS = ("same", "other", "filtered", "quarantined", "blank")

def good_line(i: int, mark: str) -> dict: return {"id": f"{mark}{i}", "text": sentence(i, 20), "source": f"s{i % 3}", "lang": "ko", "date": f"2024-01-{i % 28 + 1:02}", "meta": {"tags": ["a", i], "score": i / 7}}

def mutated_line(seed: int, i: int) -> tuple[bytes, bytes]: # as it was, as it is
    r, line = random.Random(f"{seed} line {i}"), json.dumps(good_line(i, "m"), ensure_ascii=bool(i % 2)).encode()
    return line, (mutate_json(r, line) if r.random() < .5 else r.choice(BYTES)(r, line))

def lines_case(folder: Path, first: int, count: int, seed: int) -> Counter:
    "So many mutated lines among as many whole ones, in three files: how each of them ended. Raises `Lost`."
    import zstandard
    raw = folder/"raw"; raw.mkdir(parents=True); ends, pack = Counter(), {"web.jsonl": bytes, "news.jsonl.gz": lambda b: gzip.compress(b, mtime=0), "social.jsonl.zst": zstandard.ZstdCompressor().compress}
    where, bodies = {}, {n: [] for n in pack}
    for i in range(first, first + count):
        name = list(pack)[i % 3]; was, now = mutated_line(seed, i); body = bodies[name]
        begin = len(body); body += now.split(b"\n"); where[i] = (name, begin, len(body), was, now)
        body.append(json.dumps(good_line(i, "g")).encode())
    for name, body in bodies.items(): (raw/name).write_bytes(pack[name](b"\n".join(body) + b"\n"))
    records, _, fates = account(folder/"ws", raw)
    whole = {r["id"]: r for r in records if r["id"].startswith("g")}
    for i, (name, begin, end, was, now) in where.items():
        if (r := whole.get(f"g{i}")) is None or {k: r[k] for k in ("id", "text", "source", "lang", "date", "meta")} != good_line(i, "g"): raise Lost(f"the whole line {i} is not as it was: {r}")
        fate = fates[name][begin:end]
        ends[next((f for f in ("quarantined", "filtered") if f in fate), "blank" if "kept" not in fate else "same" if document_of(now, begin == 0) == document_of(was) else "other")] += 1
    return ends

# -- targets: files, and the function or command that reads them --

@dataclass
class Target:
    "`make(folder)` writes good files; `read(folder)` goes through the real entry point and returns a value; `files(folder)` may be mutated."
    make: Callable
    read: Callable
    files: Callable
    strict: bool = False        # the format has checksums or counts: another result is a silent loss
    lost: Callable = lambda value: 0    # losses that the value counts
    names: tuple = ()           # besides the file's own name, what a message may name
    weight: int = 1             # share of the cases

TARGETS: dict[str, Target] = {}
def target(name, files, **options):
    "Decorates a pair (make, read)."
    def add(pair): make, read = pair(); TARGETS[name] = Target(make, read, files if callable(files) else (lambda folder: [folder/f for f in files]), **options); return pair
    return add

def digest(value) -> str: return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
def file_digests(folder) -> dict: return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
def project() -> Path: return Path(__file__).resolve().parents[1]

def command(*argv):
    "A command line in this process: what it printed. Exit code 2 with one line on stderr is a `UserError`; another ending is a fault."
    from yunmin_efficientdata.cli import main
    from yunmin_efficientdata.core.settings import UserError
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main([str(a) for a in argv])
        except SystemExit as e: code = e.code or 0
    if code == 2 and err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1: raise UserError(err.getvalue()[7:].strip())
    if code: raise RuntimeError(f"exit code {code}: {err.getvalue()[-500:]}")
    return out.getvalue()

def lines(rows) -> bytes: return b"".join(json.dumps(x, ensure_ascii=False).encode() + b"\n" for x in rows)
WORDS = "가을 하늘 학교 사람 물결 바다 나무 구름 이야기 시간 마음 생각 도시 기차 여름 겨울 봄날 노래 그림 언어".split()
def sentence(i, n=12): r = random.Random(i); return " ".join(r.choice(WORDS) for _ in range(n)) + f" {i}."


@target("config", ["dataset_config.yaml", "dem_config.yaml", "evaluation_config.yaml", "logging.yaml"], weight=4)
def config():
    def make(d):
        for f in (project()/"configs/demo").glob("*.yaml"): shutil.copy(f, d)
        shutil.copy(project()/"configs/logging.yaml", d)
    def read(d):
        from yunmin_efficientdata.core.settings import load_settings
        return load_settings(str(d)).model_dump(exclude={"config_dir"})
    return make, read


@target("set", ["set.txt"], names=("--set",), weight=3)
def overrides():
    def make(d): (d/"set.txt").write_text("dedup.threshold=0.85")
    def read(d):
        from yunmin_efficientdata.core.settings import load_settings
        raw = (d/"set.txt").read_bytes(); r = random.Random(raw)
        keys = ("dedup.threshold", "dedup.shingle", "dedup.spans.levels", "dedup.part_bytes", "clean.form", "dem.lora.r", "dem.base.path", "evaluation.prompts", "report.language", "nothing.here", "logging.format", "logging", "dedup", "")
        texts = [raw.decode("utf-8", "surrogateescape"), r.choice(keys) + "=" + r.choice([json_text(w)[:500] for w in YAML_WEIRD] + [y.decode() for y in YAML_RAW])]
        if texts[0] == "dedup.threshold=0.85": texts.pop()
        return [load_settings("configs/demo", [t]).model_dump(mode="json") for t in texts]
    return make, read


@target("raw", ["raw/web.jsonl", "raw/news.jsonl.gz", "raw/social.jsonl.zst"], lost=lambda v: v[1], names=("dedup_ready/quarantine",), weight=6)
def raw():
    def make(d):
        import zstandard
        (d/"raw").mkdir()
        for k, (name, pack) in enumerate({"web.jsonl": bytes, "news.jsonl.gz": lambda b: gzip.compress(b, mtime=0), "social.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress}.items()):
            (d/"raw"/name).write_bytes(pack(lines(good_line(100*k + i, "d") for i in range(30))))
    def read(d): records, dropped, _ = account(d/"ws", d/"raw"); return sorted(json.dumps(r, sort_keys=True) for r in records), dropped
    return make, read


@target("rubric", ["rules.yaml"])
def rubric():
    def make(d): shutil.copy(project()/"configs/scoring_rules.yaml", d/"rules.yaml")
    def read(d):
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.prompts import improved_rule, overall, read_rubric
        rules = read_rubric(open_store(d), "rules.yaml")
        rows = [{"improved": i % 2 == 0} for i in range(10)]
        return improved_rule(rows, rules), overall({c: 3 for c in rules["criteria"]}, rules), [sorted(c["anchors"].items()) for c in rules["criteria"].values()]
    return make, read


@target("prompts", ["prompts.jsonl"], weight=2)
def prompts():
    def make(d): (d/"prompts.jsonl").write_bytes(b"".join((project()/"configs/eval_prompts.jsonl").read_bytes().splitlines(True)[:12]))
    def read(d):
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.prompts import read_prompts, spread
        return spread(read_prompts(open_store(d), "prompts.jsonl"), 10)
    return make, read


@target("choices", ["choices.jsonl"], weight=2)
def choices():
    def make(d): (d/"choices.jsonl").write_bytes(b"".join((project()/"configs/eval_choices.jsonl").read_bytes().splitlines(True)[:12]))
    def read(d):
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.choices import question_prompt, read_questions
        found = read_questions(open_store(d), "choices.jsonl", 100)
        return found, [question_prompt(q["question"], q["choices"]) for q in found]
    return make, read


@target("general", ["general.jsonl"], names=("evaluation.general",))
def general():
    def make(d): (d/"general.jsonl").write_bytes(lines({"id": i, "text": sentence(i)} for i in range(12)))
    def read(d):
        from yunmin_efficientdata.core.settings import EvaluationConfig
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.inputs import general_documents
        return general_documents(open_store(d), EvaluationConfig(general=str(d/"general.jsonl")))
    return make, read


# -- vectors, adapters, models --

def model_files(d, name, seed, cut=1):
    import numpy as np
    from safetensors.numpy import save_file
    folder = d/name; folder.mkdir(); rng = np.random.default_rng(0); base = {f"layers.{i}.weight": rng.normal(size=(13, 8 + i)).astype("f4") for i in range(4)}
    more = np.random.default_rng(seed); tensors = {k: x + more.normal(0, .1, x.shape).astype("f4") * bool(seed) for k, x in base.items()}
    (folder/"config.json").write_text('{"tie_word_embeddings": false, "vocab_size": 5}')
    if cut == 1: save_file(tensors, folder/"model.safetensors"); return folder
    names = {k: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors" for i, k in enumerate(tensors)}
    for k, f in names.items(): save_file({k: tensors[k]}, folder/f, metadata={"format": "pt"})
    (folder/"model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder

def merged(d, option, name):
    "`yunmin merge` with one difference: bytes of the merged weights."
    out = d/"out"; shutil.rmtree(out, ignore_errors=True)
    command("merge", d/"base", out, option, f"{d/name}=0.5", "--free", "--threads", "1")
    return file_digests(out)

@target("npy", ["diff_web.npy", "diff_web.json"], strict=True, weight=4)
def npy():
    def make(d):
        from yunmin_efficientdata.dem.vectors import difference
        difference(model_files(d, "base", 0), model_files(d, "web", 1), d/"diff_web.npy")
    return make, lambda d: weights_only(merged(d, "--diff", "diff_web.npy"))

@target("npz", ["diff_web.lowrank.npz", "diff_web.lowrank.json"], strict=True, weight=4)
def npz():
    def make(d):
        from yunmin_efficientdata.dem.vectors import difference
        difference(model_files(d, "base", 0), model_files(d, "web", 1), d/"diff_web.lowrank.npz", rank=2)
    return make, lambda d: weights_only(merged(d, "--diff", "diff_web.lowrank.npz"))

def weights_only(files): return {k: v for k, v in files.items() if k.endswith(".safetensors")}

@target("adapter", ["lora_web/adapter_config.json", "lora_web/adapter_model.safetensors"], weight=3)
def adapter():
    def make(d):
        import numpy as np
        from safetensors.numpy import save_file
        model_files(d, "base", 0); (d/"lora_web").mkdir(); rng = np.random.default_rng(1)
        save_file({f"base_model.model.layers.{i}.lora_{k}.weight": rng.normal(size=(2, 8 + i) if k == "A" else (13, 2)).astype("f4") for i in range(4) for k in "AB"}, d/"lora_web/adapter_model.safetensors", metadata={"format": "pt"})
        (d/"lora_web/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": False, "alpha_pattern": {"layers.1": 8}, "rank_pattern": {}, "fan_in_fan_out": False, "base_model_name_or_path": "base", "target_modules": ["0", "1"]}))
    return make, lambda d: weights_only(merged(d, "--model", "lora_web"))

@target("model", ["web/model.safetensors", "web/config.json", "base/model.safetensors", "base/config.json"], weight=3)
def model():
    def make(d): model_files(d, "base", 0); model_files(d, "web", 1)
    return make, lambda d: weights_only(merged(d, "--model", "web"))

@target("shards", lambda d: [*(d/"web").glob("*.safetensors"), d/"web/model.safetensors.index.json", d/"web/model.safetensors.index.json"], weight=3)
def sharded():
    def make(d): model_files(d, "base", 0, 4); model_files(d, "web", 1, 4)
    return make, lambda d: weights_only(merged(d, "--model", "web"))

@target("calibration", ["ids.jsonl"], names=("--calibration",))
def calibration():
    def make(d): (d/"ids.jsonl").write_bytes(lines([i, i + 1, 3] if i % 2 else {"input_ids": [i, 2]} for i in range(20)))
    def read(d):
        from yunmin_efficientdata.cli import read_calibration
        return {k: x.tolist() for k, x in read_calibration([f"web={d/'ids.jsonl'}"], 4, 6).items()}
    return make, read


# -- Hugging Face folders --

def hf_model(d):
    from yunmin_efficientdata.evaluation.inputs import toy
    net, tokenizer = toy([sentence(i) for i in range(20)]); net.save_pretrained(d/"base"); tokenizer.save_pretrained(d/"base")

@target("hf_config", ["base/config.json", "base/generation_config.json"], names=("base",), weight=2)
def hf_config():
    def read(d):
        import torch
        from yunmin_efficientdata.dem.base import load_model
        with torch.no_grad(): return load_model(d/"base")(input_ids=torch.tensor([[1, 5, 9]])).logits.double().sum().item()
    return hf_model, read

@target("hf_weights", ["base/model.safetensors"], names=("base",), weight=2)
def hf_weights():
    return hf_model, hf_config()[1]

@target("tokenizer", ["base/tokenizer.json", "base/tokenizer.json", "base/tokenizer_config.json"], names=("base",), weight=3)
def tokenizer():
    def read(d):
        from yunmin_efficientdata.format.tokenizer import load_tokenizer, token_bytes
        t = load_tokenizer(str(d/"base")); return t("가을 하늘 abc")["input_ids"], t.eos_token_id, len(token_bytes(t))
    return hf_model, read


# -- Parquet --

def documents(n=60):
    for i in range(n): yield {"id": f"d{i}", "text": sentence(i), "source": "s", "lang": "ko", "domain": "web", "date": "2024-01-01"}

def our_parquet(d):
    import numpy as np
    from yunmin_efficientdata.core.settings import FormatSettings
    from yunmin_efficientdata.format.parquet import FileWriter
    with FileWriter(d/"web.parquet", FormatSettings(page_bytes=4096, row_group_rows=25), {}) as w:
        for i, doc in enumerate(documents()): w.add(doc, np.arange(i, i + 140, dtype=np.int32))

def all_tokens(d):
    from yunmin_efficientdata.format.loader import TokenPages
    pages = TokenPages([d/"web.parquet"], check=True)
    return len(pages), pages.take([0], len(pages)).tolist()

@target("parquet", ["web.parquet"], strict=True, weight=4)
def parquet(): return our_parquet, all_tokens

@target("foreign_parquet", ["web.parquet"], weight=2)
def foreign():
    def make(d):
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.table({"text": [sentence(i) for i in range(60)], "id": [str(i) for i in range(60)], "tokens": [list(range(i, i + 40)) for i in range(60)]}, schema=pa.schema([("text", pa.string()), ("id", pa.string()), ("tokens", pa.list_(pa.int32()))])), d/"web.parquet", row_group_size=25)
    return make, all_tokens

@target("text_rows", ["web.parquet"], weight=2)
def text_rows():
    def read(d):
        from yunmin_efficientdata.format.loader import TextRows
        return [b["text"] for b in TextRows([d/"web.parquet"], batch_size=7)]
    return our_parquet, read

@target("heldout", ["parquet_ready/heldout/test/web.parquet"], weight=2)
def heldout():
    def make(d): our_parquet(d); (d/"parquet_ready/heldout/test").mkdir(parents=True); (d/"web.parquet").rename(d/"parquet_ready/heldout/test/web.parquet")
    def read(d):
        from yunmin_efficientdata.core.settings import EvaluationConfig
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.inputs import sample_documents, test_domains
        store = open_store(d); return [sample_documents(store, keys, EvaluationConfig(max_documents=20)) for keys in test_domains(store).values()]
    return make, read

@target("profile", ["web.parquet"], weight=2)
def profile():
    def read(d): return command("profile", d/"web.parquet", "--only", "totals" if "totals" in _queries() else _queries()[0])
    return our_parquet, read

def _queries():
    from yunmin_efficientdata.format.profile import QUERIES
    return list(QUERIES)

@target("embeddings", ["v/a.npy", "v/a.ids.txt", "v/b.parquet"], weight=3)
def embeddings():
    def make(d):
        import numpy as np, pyarrow as pa, pyarrow.parquet as pq
        (d/"v").mkdir(); x = np.random.default_rng(0).normal(size=(20, 8)).astype("f4"); np.save(d/"v/a.npy", x); (d/"v/a.ids.txt").write_text("".join(f"d{i}\n" for i in range(20)))
        pq.write_table(pa.table({"id": [f"e{i}" for i in range(20)], "embedding": pa.array(x.tolist(), pa.list_(pa.float32()))}), d/"v/b.parquet")
    def read(d):
        from yunmin_efficientdata.dedup.semantic import list_embeddings, read_ids, read_vectors
        return [([i for ids in read_ids(f) for i in ids], [x.tolist() for x in read_vectors(f)]) for f in list_embeddings(str(d/"v"))]
    return make, read

@target("contamination", ["sets/quiz.jsonl"])
def contamination():
    def make(d): (d/"sets").mkdir(); (d/"sets/quiz.jsonl").write_bytes(lines({"id": i, "question": sentence(i), "choices": ["가", "나"], "answer": 0} for i in range(12)))
    def read(d):
        from yunmin_efficientdata.core.settings import ContaminationSettings
        from yunmin_efficientdata.dedup.contamination import find_sets, read_set
        s = ContaminationSettings(sets=[str(d/"sets")]); return [read_set(f, s) for f in find_sets(s)]
    return make, read

@target("ratings", ["results/ratings/a.csv"])
def ratings():
    def make(d):
        (d/"results/ratings").mkdir(parents=True)
        (d/"results/ratings/a.csv").write_text("rater,id,domain,model,answer,information,logic,brevity,tone,note\n" + "".join(f"a,web-{i},web,{m},key,3,4,5,2,ok\n" for i in range(6) for m in ("base", "merged")))
    def read(d):
        from yunmin_efficientdata.core.store import open_store
        from yunmin_efficientdata.evaluation.rating import read_ratings
        return read_ratings(open_store(d), "results/ratings/a.csv").to_csv()
    return make, read


# -- a workspace's own records --

def recorded(d):
    "A workspace as phases 1 to 4 leave it, with made-up numbers."
    sys.path.insert(0, str(Path(__file__).parent))
    import fabricated
    from yunmin_efficientdata.core.store import open_store
    fabricated.workspace(open_store(d), parts=("dedup", "format", "dem", "evaluation", "ledger", "extras", "notebooks"))

def records_of(*patterns): return lambda d: [f for p in patterns for f in d.glob(p) if f.is_file()]

@target("status", records_of("ledger/*.json"), weight=2)
def status(): return recorded, lambda d: command("status", d)

@target("report", records_of("ledger/*.json", "results/*.json", "results/*.csv", "*.csv", "dedup_ready/*.json", "parquet_ready/*.json", "diff_stats/*.json", "benchmark/*.csv"))
def report():
    def read(d): command("report", d, "--set", "report.site=false"); return re.sub(r"\d{4}-\d\d-\d\d[ T0-9:.ZUTC]*", "", (d/"reports/report.md").read_text())
    return recorded, read

@target("resume", ["ledger/x.json", "ledger/parts/x/p.json"], weight=2)
def resume():
    def make(d):
        from yunmin_efficientdata.core.ledger import Ledger
        from yunmin_efficientdata.core.store import open_store
        store = open_store(d)
        def work(stage): stage.mark_part("a", {"n": 1}); store.write("out.txt", "x"); return {"n": 1}
        Ledger(store).run("x", work, outputs=["out.txt"]); entry = json.loads(store.read("ledger/x.json"))
        store.write("ledger/parts/x/p.json", json.dumps({"fingerprint": entry["fingerprint"], "part": "a", "info": {"n": 1}}))
    def read(d):
        from yunmin_efficientdata.core.ledger import Ledger
        from yunmin_efficientdata.core.store import open_store
        store = open_store(d)
        def work(stage):
            n = stage.parts["a"]["n"] if stage.done_part("a") and isinstance(stage.parts["a"], dict) and "n" in stage.parts["a"] else 1
            store.write("out.txt", "x"); return {"n": n}
        Ledger(store).run("x", work, outputs=["out.txt"]); return store.read("out.txt")
    return make, read


def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument("--targets"); p.add_argument("--count", type=int, default=1000); p.add_argument("--lines", type=int, default=None); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--jobs", type=int, default=2); p.add_argument("--only", type=int); p.add_argument("--report", action="store_true"); p.add_argument("--worker"); p.add_argument("--first", type=int, default=0)
    a = p.parse_args(argv)
    if a.worker == "lines": return work_lines(a.first, a.count, a.seed)
    if a.worker: return work(a.worker, a.first, a.count, a.seed)
    if a.only is not None: return show(a.targets, a.only, a.seed)
    written = lines_campaign((0 if a.targets else 10_000) if a.lines is None else a.lines, a.seed)
    found = campaign(a.targets.split(",") if a.targets else None, a.count, a.seed, a.jobs)
    if a.report: (project()/"reports/fuzz.md").write_text(page(written, found, a.seed), encoding="utf-8")
    print(lines_table(written)); print(table(found)); print(f"slowest: {max(r['seconds'] for r in found)} s")
    for f in faults(found) + written["faults"]: print(f"{f['target']} {f['case']} {f['file']}: {f['end']}: {f['text'][:400]}")
    return 1 if faults(found) + written["faults"] else 0

# -- running --

@contextlib.contextmanager
def limits(seconds: float):
    "TimeoutError after so many seconds of work, or thirty times as many of waiting."
    def ring(*_): raise TimeoutError("fuzz: the time is over")
    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 30*seconds)); old = [signal.signal(s, ring) for s, _, _ in clocks]
    for _, clock, after in clocks: signal.setitimer(clock, after)
    try: yield
    finally:
        for (s, clock, _), handler in zip(clocks, old): signal.setitimer(clock, 0); signal.signal(s, handler)

def little_memory():
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

def try_one(t: Target, name: str, good: Path, expected, case: int, seed: int, raise_=False) -> dict:
    "One mutated file through the entry point."
    from yunmin_efficientdata.core.settings import UserError
    r = random.Random(f"{seed} {name} {case}")
    folder = good.parent/"case"; shutil.rmtree(folder, ignore_errors=True); shutil.copytree(good, folder)
    file = r.choice(sorted(t.files(folder))); before = file.read_bytes(); after = mutated(r, file.name, before); file.write_bytes(after)
    row, begin = {"target": name, "case": case, "file": file.relative_to(folder).as_posix(), "text": ""}, time.process_time()
    try:
        with limits(SECONDS): value = t.read(folder)
        row["end"] = "same" if before == after or digest(value) == expected else "counted" if t.lost(value) else "silent" if t.strict else "other"
    except Lost as e: row |= {"end": "silent", "text": str(e)}
    except UserError as e:
        text = str(e); row["text"] = text
        row["end"] = "refused" if "\n" not in text and len(text) < 1500 and any(n in text for n in (file.name, *t.names)) else "unnamed"
    except TimeoutError: row |= {"end": "hang", "text": traceback.format_exc()[-1500:]}
    except Exception as e: row |= {"end": "traceback", "text": f"{type(e).__name__}: {e}"[:300] + " @ " + where(e)}
    except SystemExit as e: row |= {"end": "traceback", "text": f"SystemExit {e}"}
    if raise_ and row["end"] in FAULTS: print(row); t.read(folder)
    return row | {"seconds": round(time.process_time() - begin, 2)}

def where(e) -> str:
    "The innermost line of ours, then the innermost of all."
    frames = traceback.extract_tb(e.__traceback__); ours = [f for f in frames if "yunmin_efficientdata" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*frames[-1:], *ours[-1:]])

def prepared(name: str):
    "Good files of a target and the digest of what they give."
    root = Path(tempfile.mkdtemp(prefix="fuzz-")); good = root/"good"; good.mkdir(); t = TARGETS[name]; t.make(good)
    values = []
    for i in range(2): shutil.rmtree(root/"case", ignore_errors=True); shutil.copytree(good, root/"case"); values.append(digest(t.read(root/"case")))
    assert values[0] == values[1], f"{name}: not deterministic"
    return t, good, values[0]

def work(name: str, first: int, count: int, seed: int):
    "In a process of its own: a line before each case and one after."
    quiet(); out = os.fdopen(os.dup(1), "w", buffering=1); os.dup2(2, 1)
    t, good, expected = prepared(name); little_memory()
    try:
        for case in range(first, first + count): out.write(f"begin {case}\n"); out.write(json.dumps(try_one(t, name, good, expected, case, seed)) + "\n")
    finally: shutil.rmtree(good.parent, ignore_errors=True)

def quiet():
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "YUNMIN_BATCH": "1"}
    import warnings, logging
    os.fsync = lambda fd: None  # whether bytes outlive a power cut is another test's matter, and thousands of small files wait for nothing else
    warnings.filterwarnings("ignore"); logging.getLogger("transformers").setLevel(logging.CRITICAL)

def show(name: str, case: int, seed: int):
    quiet(); t, good, expected = prepared(name); print(try_one(t, name, good, expected, case, seed, raise_=True))

def run_target(name: str, count: int, seed: int, begin: int = 0, step: int = 1) -> list[dict]:
    "All cases of a target; a process that dies is replaced, and its case is a crash."
    rows, first = [], begin
    while first < begin + count:
        env = {**os.environ, "PYTHONPATH": str(project()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile() as err, subprocess.Popen([sys.executable, __file__, "--worker", name, "--first", str(first), "--count", str(begin + count - first), "--seed", str(seed)], stdout=subprocess.PIPE, stderr=err, text=True, cwd=project(), env=env) as p:
            now = None
            for line in p.stdout:
                if line.startswith("begin "): now = int(line[6:])
                elif line.startswith("{"): rows.append(json.loads(line)); first, now = rows[-1]["case"] + step, None
            p.wait(); err.seek(0); said = err.read().decode("utf-8", "replace")[-1500:]
        if now is not None: rows.append({"target": name, "case": now, "file": "?", "end": "crash", "text": f"exit code {p.returncode}: {said}", "seconds": 0}); first = now + step
        elif p.returncode: raise RuntimeError(f"{name}: the fuzzer itself ended with {p.returncode}: {said}")
    return rows

CHUNK = 500 # mutated lines of one go

def work_lines(first: int, count: int, seed: int):
    "In a process of its own: what became of each 500 lines."
    quiet(); out = os.fdopen(os.dup(1), "w", buffering=1); os.dup2(2, 1)
    for at in range(first, first + count, CHUNK):
        out.write(f"begin {at}\n"); row = {"target": "lines", "case": at, "file": "raw", "end": "lines", "text": "", "seconds": 0}
        with tempfile.TemporaryDirectory(prefix="fuzz-") as d:
            try:
                with limits(10*SECONDS): row["ends"] = lines_case(Path(d), at, min(CHUNK, first + count - at), seed)
            except Lost as e: row |= {"end": "silent", "text": str(e)}
            except TimeoutError: row |= {"end": "hang", "text": traceback.format_exc()[-1500:]}
            except Exception as e: row |= {"end": "traceback", "text": f"{type(e).__name__}: {e}"[:300] + " @ " + where(e)}
        out.write(json.dumps(row) + "\n")

def lines_campaign(count: int, seed: int = 0) -> dict:
    "`count` mutated lines: how many ended in which way, and the faults."
    rows = run_target("lines", count, seed, step=CHUNK); ends = Counter()
    for r in rows: ends.update(r.get("ends", {}))
    return {"count": count, "ends": ends, "faults": faults(rows)}

def lines_table(found: dict) -> str:
    names = [*LINE_ENDS, "faults"]; lost = found["count"] - sum(found["ends"].values())  # all lines of a go that held a fault
    return "| mutated lines | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + f"|\n| {found['count']} | " + " | ".join(str(found["ends"].get(n, lost if n == "faults" else 0)) for n in names) + " |"

def campaign(targets=None, count: int = 1000, seed: int = 0, jobs: int = 2) -> list[dict]:
    "`count` mutated files over the targets, by their weights; so many targets at a time."
    chosen = targets or list(TARGETS); total = sum(TARGETS[n].weight for n in chosen)
    def one(n): rows = run_target(n, max(1, -(-count * TARGETS[n].weight // total)), seed); print(n, len(rows), file=sys.stderr, flush=True); return rows
    with ThreadPoolExecutor(jobs) as pool: return [r for rows in pool.map(one, chosen) for r in rows]

def faults(rows): return [r for r in rows if r["end"] in FAULTS]

def table(rows) -> str:
    "Ends by target, as Markdown."
    ends = [e for e in (*GOOD, *FAULTS)]; names = list(dict.fromkeys(r["target"] for r in rows)); count = Counter((r["target"], r["end"]) for r in rows)
    out = ["| target | files | " + " | ".join(ends) + " |", "|---" * (len(ends) + 2) + "|"]
    for n in [*names, "all"]: out.append(f"| {n} | {sum(r['target'] == n or n == 'all' for r in rows)} | " + " | ".join(str(sum(v for (t, e), v in count.items() if e == end and n in (t, "all"))) for end in ends) + " |")
    return "\n".join(out)

def page(written: dict, found: list[dict], seed: int) -> str:
    "Both tables with what their columns mean."
    bad = faults(found) + written["faults"]
    return f"""# Damaged input

Written by `python tests/fuzz.py --report` (seed {seed}). The mutations are made from the seed, so a second run gives the same cases: bits, bytes and spans changed, removed, doubled and zeroed, files cut, packed, re-encoded and emptied, values, keys and nesting of JSON and YAML,
headers and footers of .npy, .npz, safetensors and Parquet.

## Lines

Each mutated line stands beside a whole one, in .jsonl, .jsonl.gz and .jsonl.zst files. Python's own JSON parser says what every line is; then each must be where it belongs, with its content: among the records, counted by a filter, in quarantine under its file and line number, or blank.
Read = kept + filtered + quarantined in every go, and every whole line gave the record that it gives alone.

{lines_table(written)}

*same*: the change does not matter to JSON; *other*: still a document, kept with its new content; *filtered*, *quarantined*: counted there; *blank*: the change left nothing on the line; *faults*: anything else.

## Files

One file of a good folder is changed, and the command or function that reads it runs in a process with {MEMORY >> 30} GiB of memory to spare and {SECONDS} seconds of work.

{table(found)}

*same*: the result of the whole file; *other*: still a valid file, with another content, in formats without checksums; *counted*: less, and the loss is counted; *refused*: one line that names the file (or the setting) and what to do.
The rest are faults: *traceback*, *hang*, *crash* of the process, *unnamed* (refused without the file's name), *silent* (something is missing and nobody says so).

Faults: {len(bad)}.
""" + "".join(f"- {f['target']} {f['case']} {f['file']}: {f['end']}\n" for f in bad)

if __name__ == "__main__": sys.exit(main())
