"Shingles and signatures: equal to datasketch for every text, kind, width and seed; hash quality; exact Jaccard."
from __future__ import annotations
import itertools, json, random, subprocess, sys, time, unicodedata
import numpy as np, orjson, pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings as hyp, strategies as st
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.dedup import minhash
from yunmin_efficientdata.dedup.minhash import (canonical, jaccard, jaccard_pairs, permutations, shingle_hash, shingle_hash64, shingle_hashes,
                                                shingle_set, shingle_sets, signatures, to_minhash, token_ngrams)

SPACES = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace()]

def plain_shingles(text: str, kind: str) -> list[bytes]:
    "Shingles in a few lines that share nothing with the module."
    units = text.split() if kind == "word5" else list("".join(unicodedata.normalize("NFKC", "".join(text.split())).split()))
    glue = " " if kind == "word5" else ""
    return [glue.join(units[i:i + 5]).encode("utf-8", "surrogatepass") for i in range(max(1, len(units) - 4))] if units else []

def oracle(shingles: list[bytes], num_perm=128, seed=1) -> np.ndarray:
    m = MinHash(num_perm=num_perm, seed=seed, hashfunc=shingle_hash, scheme="affine32")
    m.update_batch(shingles)
    return m.hashvalues

SCRIPTS = {
    "hangul": lambda r: chr(r.randrange(0xAC00, 0xD7A4)), "jamo": lambda r: chr(r.randrange(0x1100, 0x1200)), "latin": lambda r: chr(r.randrange(33, 127)),
    "han": lambda r: chr(r.randrange(0x4E00, 0xA000)), "emoji": lambda r: chr(r.randrange(0x1F300, 0x1FA00)), "accents": lambda r: chr(r.randrange(0xA0, 0x370)),
    "surrogates": lambda r: chr(r.randrange(0xD800, 0xE000)), "unassigned": lambda r: chr(r.choice([0x378, 0xFFFE, 0x10FFFF, 0xE0080, 0x2FFFF])),
    "controls": lambda r: chr(r.choice([c for c in range(32) if not chr(c).isspace()])), "full width": lambda r: chr(r.randrange(0xFF01, 0xFFEF))}

def random_text(r: random.Random, units: int, kind: str) -> str:
    "So many words (word5) or letters (char5) of one script or of all, any white space between, before and after."
    script = r.choice([*SCRIPTS, "mixed"])
    letter = (lambda: SCRIPTS[r.choice(list(SCRIPTS))](r)) if script == "mixed" else lambda: SCRIPTS[script](r)
    space = lambda: r.choice(SPACES) if r.random() < 0.3 else " " * r.choice([1, 1, 1, 2])
    size = lambda: 1 if kind == "char5" else r.choice([1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 40])
    vocabulary = ["".join(letter() for _ in range(size())) for _ in range(r.choice([3, 40]))]
    glue = space if kind == "word5" else lambda: space() if r.random() < 0.2 else ""
    return "".join([space() if r.random() < 0.3 else "", *(r.choice(vocabulary) + glue() for _ in range(units))])

@pytest.mark.parametrize("kind", ["word5", "char5"])
def test_thousands_of_documents_equal_datasketch(kind, monkeypatch):
    r = random.Random(kind)
    for num_perm in (16, 33, 100, 128, 256, 1000, 1024):
        lengths = [*range(8), *(r.randrange(8, 60) for _ in range(180)), *(r.randrange(0, 7) for _ in range(120))]
        texts, seed = [random_text(r, n, kind) for n in lengths], r.randrange(1, 1 << 31)
        got = signatures(texts, num_perm, kind, seed)
        assert got.shape == (len(texts), num_perm) and got.dtype == np.uint32
        for text, row in zip(texts, got): assert (row == oracle(plain_shingles(text, kind), num_perm, seed)).all(), (num_perm, seed, text)
        with monkeypatch.context() as m:
            m.setattr(minhash, "njit", None)
            assert (signatures(texts, num_perm, kind, seed) == got).all()

@pytest.mark.parametrize("kind", ["word5", "char5"])
def test_long_documents_equal_datasketch(kind, monkeypatch):
    r = random.Random(4)
    texts = [random_text(r, n, kind) for n in (500, 4095, 4096, 4097, 20_000)]
    got = signatures(texts, 64, kind)
    for text, row in zip(texts, got): assert (row == oracle(list(set(plain_shingles(text, kind))), 64)).all()
    monkeypatch.setattr(minhash, "njit", None)
    assert (signatures(texts, 64, kind) == got).all()

any_text = st.text(st.one_of(st.sampled_from(SPACES), st.sampled_from("가나다ㅋé𝒳a1.😀\0\ud83d\ude00ﬁ½"), st.characters(exclude_categories=[])), max_size=120)

@given(st.lists(any_text, max_size=5), st.sampled_from(["word5", "char5"]), st.integers(1, 140), st.integers(1, 2**32 - 1))
@hyp(max_examples=150, deadline=None)
def test_any_text_equals_datasketch(texts, kind, num_perm, seed):
    got = signatures(iter(texts), num_perm, kind, seed)
    assert got.shape == (len(texts), num_perm)
    for text, row in zip(texts, got):
        shingles = plain_shingles(text, kind)
        assert (row == oracle(shingles, num_perm, seed)).all()
        assert [s.encode("utf-8", "surrogatepass") for s in token_ngrams(text, kind)] == shingles
        assert shingle_hashes(text, kind).tolist() == [shingle_hash64(s) for s in shingles]

def test_morphemes_equal_datasketch(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("kiwipiepy")
    texts = ["나는 오늘 학교에 갔다가 친구를 만났습니다.", "", "짧다", "ㅋㅋㅋ 진짜 웃겨😀 ㅠㅠ", "반쪽 \ud83d 문자와 \udfff 끝", "The quick brown fox jumps.", "가\0나", "a" * 5000] * 2
    for text, row in zip(texts, signatures(texts, 48, "morph5", 5)):
        assert (row == oracle([s.encode() for s in token_ngrams(text, "morph5")], 48, 5)).all()
    assert token_ngrams("나는 학교에 갔다", "morph5")[0].split()[:2] == ["나", "는"]

def test_morphemes_need_kiwipiepy(monkeypatch):
    minhash._kiwi.cache_clear()
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(UserError, match="pip install kiwipiepy"): signatures(["가"], shingle="morph5")
    minhash._kiwi.cache_clear()

def test_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3"); assert minhash.core_share() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "no"); assert minhash.core_share() >= 1
    monkeypatch.setattr(minhash.multiprocessing, "parent_process", lambda: object()); assert minhash.core_share() == 1

def test_unknown_kind():
    for f in (signatures, shingle_sets):
        with pytest.raises(UserError, match="word5, char5, morph5"): f(["가"], shingle="word7")
    for f in (canonical, token_ngrams, shingle_hashes, shingle_set):
        with pytest.raises(UserError, match="word7"): f("가", "word7")

def test_without_numba_installed():
    "Where numba cannot be imported, the module works and gives the same numbers."
    code = "import sys; sys.modules['numba'] = None\nfrom yunmin_efficientdata.dedup.minhash import *\nimport json\n" \
           "t = ['가 나 다 라 마 바', '', '짧은 글']\nprint(json.dumps([signatures(t, 16).tolist(), shingle_sets(t)[0].tolist(), jaccard_pairs(*shingle_sets(t), [[0, 1], [1, 1]]).tolist()]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    texts = ["가 나 다 라 마 바", "", "짧은 글"]
    assert json.loads(done.stdout) == [signatures(texts, 16).tolist(), shingle_sets(texts)[0].tolist(), [0.0, 1.0]]

# ---- batches

def test_batches_change_nothing():
    r = random.Random(8)
    texts = [random_text(r, n, "word5") for n in (3, 0, 900, 1, 7, 30_000, 0, 0, 20_000, 5, 4)]
    for kind in ("word5", "char5"):
        alone = np.concatenate([signatures([t], 32, kind) for t in texts])
        assert (signatures(texts, 32, kind) == alone).all() and (signatures(tuple(texts), 32, kind) == alone).all()
        hashes, offsets = shingle_sets(iter(texts), kind)
        assert all((hashes[offsets[d]:offsets[d + 1]] == shingle_set(t, kind)).all() for d, t in enumerate(texts))
    assert signatures([], 32).shape == (0, 32) and signatures(iter([]), 32).shape == (0, 32)

@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 40))
@hyp(max_examples=100, deadline=None)
def test_batches_cover_the_list(lengths, size):
    texts = ["x" * n for n in lengths]
    ranges = list(minhash._batches(texts, size))
    assert [i for a, b in ranges for i in range(a, b)] == list(range(len(texts)))
    assert all(sum(lengths[a + 1:b]) < size for a, b in ranges)

def test_streams_are_not_hoarded():
    seen = []
    def stream():
        for i in range(60): seen.append(i); yield "가나다라 " * 20_000
    ahead = [len(x) for x in minhash._lists(stream())]
    assert sum(ahead) == 60 and max(ahead) <= 3

def test_white_space_is_what_split_says():
    assert max(map(ord, SPACES)) == 0x3000
    text = "".join(f"a{chr(c)}" for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    assert len(shingle_hashes(text)) == len(text.split()) - 4

def test_hostile_documents():
    start = time.process_time()
    letters, period, blank = "가" * 2_000_000, "가 나 " * 500_000, " \n\u3000" * 500_000
    assert [len(s) for s in (shingle_set(letters), shingle_set(period), shingle_set(blank))] == [1, 2, 0]
    assert len(shingle_set(letters, "char5")) == 1
    assert (signatures([period]) == signatures(["가 나 가 나 가 나"])).all() and (signatures([blank]) == 0xFFFFFFFF).all()
    tiny = signatures([f"{i} 번째 댓글" for i in range(50_000)], 16)
    assert len(np.unique(tiny, axis=0)) == 50_000
    assert time.process_time() - start < 20

# ---- the hash

def test_the_definition_stays():
    "Signatures that were stored must stay valid."
    assert [hex(shingle_hash64(s.encode())) for s in ("", "나", "나는 오늘", "여덟글자보다긴낱말도 있다")] == GOLDEN
    assert shingle_hash(b"\xff\xfe") == shingle_hash("ÿþ".encode()) and 0 <= shingle_hash(b"x") < 1 << 32

GOLDEN = ["0x0", "0x1c474eb2d1e30e96", "0xacf8c244f505cc78", "0x3b08abee4df79d38"]

FAMILIES = {
    "numbers": lambda: (str(i) for i in range(200_000)),
    "pairs of small numbers": lambda: (f"{a} {b}" for a in range(400) for b in range(400)),
    "two syllables": lambda: (chr(0xAC00 + 28 * a) + chr(0xAC00 + 28 * b) for a in range(399) for b in range(399)),
    "one odd and one even letter changed": lambda: ("".join([chr(0xAC00 + a), "나다라", chr(0xAC00 + b), "바사아"]) for a in range(400) for b in range(400)),
    "two odd letters changed": lambda: ("".join(["가", chr(0xAC00 + a), "다", chr(0xAC00 + b), "마바사아"]) for a in range(400) for b in range(400)),
    "five words of a small vocabulary": lambda: (" ".join(w) for w in itertools.product("가나다라마바사아자차카", repeat=5)),
    "lengths": lambda: ("a" * n for n in range(1, 3000)),
    "a space that moves": lambda: (s[:i] + " " + s[i:] for s in ("가나다라마바사아자차" * 30, "ab" * 150) for i in range(1, len(s))),
    "change in a long word": lambda: ("가" * i + chr(0xAC01 + j) + "가" * (40 - i) for i in range(40) for j in range(2000)),
    "blocks swapped": lambda: ("".join(p) for p in itertools.permutations(["가나다라마바사아", "abcdefgh", "12345678", "자차카타파하거너", "ABCDEFGH", "ㄱㄴㄷㄹㅁㅂㅅㅇ", "!@#$%^&*"])),
}

@pytest.mark.parametrize("family", FAMILIES)
def test_collisions_as_chance_demands(family):
    "No collision in 64 bits, and in the upper 32, the lower 32 and any 20 bits as many as for random numbers."
    texts = list(dict.fromkeys(FAMILIES[family]())); n = len(texts)
    hashes, offsets = shingle_sets(texts)
    assert (np.diff(offsets) == 1).all() and len(np.unique(hashes)) == n
    for low in (0, 32):
        part = (hashes >> np.uint64(low)) & np.uint64(0xFFFFFFFF)
        expected = n * n / 2**33
        assert n - len(np.unique(part)) <= expected + 5 * expected**0.5 + 2
    for low in (0, 13, 26, 44):
        bins = np.bincount(((hashes >> np.uint64(low)) & np.uint64(0xFF)).astype(int), minlength=256)
        assert ((bins - n / 256)**2 / (n / 256)).sum() < 255 + 6 * (2 * 255)**0.5

def test_the_estimate_is_unbiased():
    "Mean of the signatures' estimate over many pairs is the true similarity, and its spread is that of MinHash."
    r = random.Random(3)
    for share in (10, 40, 80):
        errors = []
        for _ in range(60):
            words = [f"{r.randrange(10**6)}" for _ in range(300)]
            other = words[:3 * share] + [f"{r.randrange(10**6)}" for _ in range(300 - 3 * share)]
            a, b = " ".join(words), " ".join(other)
            true = jaccard(shingle_set(a), shingle_set(b))
            x, y = signatures([a, b], 256)
            errors.append(((x == y).mean() - true) / (true * (1 - true) / 256)**0.5)
        assert abs(np.mean(errors)) < 0.55 and 0.7 < np.std(errors) < 1.4

def test_real_text(corpus):
    "On real text: signatures equal datasketch's, and 64 bits keep all shingles apart."
    for file in sorted((corpus/"small").glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        some = [t[:3000] for t in texts[:25]]
        for text, row in zip(some, signatures(some)): assert (row == oracle(plain_shingles(text, "word5"))).all()
        distinct = {s for t in texts for s in plain_shingles(t, "word5")}
        assert len(np.unique(shingle_sets(texts)[0])) == len(distinct)

# ---- Korean variants

def test_char5_finds_variants():
    text = "서울특별시에서 열린 회의에서 새로운 계획을 발표했다고 한다 2024"
    full = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    a, *others = signatures([text, unicodedata.normalize("NFD", text), full, text.replace(" ", "")], shingle="char5")
    assert all((a == o).all() for o in others)

# ---- datasketch's own classes

def test_datasketch_takes_our_rows():
    r = random.Random(1)
    base = " ".join(str(r.randrange(1000)) for _ in range(200))
    texts = [base, base + " 끝에 덧붙인 말", " ".join(str(r.randrange(1000)) for _ in range(200))]
    for seed in (1, 9):
        rows = [to_minhash(row, seed) for row in signatures(texts, seed=seed)]
        theirs = [MinHash(num_perm=128, seed=seed, hashfunc=shingle_hash, scheme="affine32") for _ in texts]
        for m, t in zip(theirs, texts): m.update_batch(plain_shingles(t, "word5"))
        assert rows == theirs and rows[0].jaccard(theirs[1]) > 0.9
        lsh = MinHashLSH(params=(16, 8), num_perm=128)
        for i in (0, 2): lsh.insert(i, rows[i])
        assert lsh.query(rows[1]) == [0]
        rows[0].merge(rows[2]); both = oracle([*plain_shingles(texts[0], "word5"), *plain_shingles(texts[2], "word5")], seed=seed)
        assert (rows[0].hashvalues == both).all()
    assert (permutations(64, 3) == MinHash(num_perm=64, seed=3, scheme="affine32").permutations).all()

# ---- exact Jaccard

few_words = st.lists(st.sampled_from("가 나 다 라 마 바".split()), max_size=40).map(" ".join)

@given(st.lists(few_words, min_size=1, max_size=8), st.sampled_from(["word5", "char5"]))
@hyp(max_examples=100, deadline=None)
def test_jaccard_of_sets(texts, kind):
    sets = [set(plain_shingles(t, kind)) for t in texts]
    hashes, offsets = shingle_sets(texts, kind)
    pairs = np.array([(a, b) for a in range(len(texts)) for b in range(len(texts))])
    want = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) if sets[a] | sets[b] else 1.0 for a, b in pairs]
    assert np.diff(offsets).tolist() == [len(s) for s in sets] and hashes.dtype == np.uint64 and offsets.dtype == np.int64
    assert jaccard_pairs(hashes, offsets, pairs).tolist() == want
    assert [jaccard(shingle_set(texts[a], kind), shingle_set(texts[b], kind)) for a, b in pairs] == want

def test_jaccard_without_numba(monkeypatch):
    r = random.Random(6)
    texts = [random_text(r, n, "word5") for n in [0, 0, 1, 4, 5, 6, *(r.randrange(200) for _ in range(60))]]
    texts += [t + " 하나 더" for t in texts]
    pairs = np.array([(r.randrange(len(texts)), r.randrange(len(texts))) for _ in range(400)] + [(i, i + 66) for i in range(66)])
    for kind in ("word5", "char5"):
        hashes, offsets = shingle_sets(texts, kind); similar = jaccard_pairs(hashes, offsets, pairs)
        with monkeypatch.context() as m:
            m.setattr(minhash, "njit", None)
            again, bounds = shingle_sets(texts, kind)
            assert (again == hashes).all() and (bounds == offsets).all() and (jaccard_pairs(again, bounds, pairs) == similar).all()
            assert jaccard(again[:5], again[:5]) == 1.0

def test_pairs_must_be_there():
    hashes, offsets = shingle_sets(["가 나", "다 라"])
    assert jaccard_pairs(hashes, offsets, np.empty((0, 2), np.int64)).shape == (0,)
    assert jaccard_pairs(hashes, offsets, np.array([[0, 1]], np.uint32)).tolist() == [0.0]
    for wrong in ([[0, 2]], [[-1, 0]]):
        with pytest.raises(IndexError): jaccard_pairs(hashes, offsets, np.array(wrong))
    assert [x.tolist() for x in shingle_sets([])] == [[], [0]]

@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3) | st.integers(2**63, 2**63 + 9), max_size=200))
@hyp(max_examples=150, deadline=None)
def test_sorting(values):
    "Any 64-bit values, also ones that fill one bucket."
    values = np.array(values, np.uint64)
    got, sizes = minhash._sets(values, np.array([0]), np.array([len(values)]))
    assert got.tolist() == sorted(set(values.tolist())) and sizes.tolist() == [len(got)]

# ---- straight from lines of JSON

def as_lines(lines: list[bytes], between: bytes = b"") -> minhash.Lines:
    data, size = between.join([b"", *lines]), np.array([len(x) for x in lines], np.int64)
    ends = np.cumsum(size + len(between))
    return minhash.Lines(np.frombuffer(data, np.uint8), ends - size, ends)

def as_texts(lines, kind, **options):
    "Both ways agree with the texts themselves."
    texts = [json.loads(x)["text"] for x in lines]
    for given_, between in ((as_lines(lines), b""), (as_lines(lines, b'{"id":"0","text":"'), b"gap")):
        assert np.array_equal(signatures(given_, shingle=kind), signatures(texts, shingle=kind))
        assert all(np.array_equal(a, b) for a, b in zip(shingle_sets(given_, kind), shingle_sets(texts, kind)))

ANY = st.text(st.one_of(st.sampled_from(' \n\t\r\b\f\x0b\x1c\x1f\x85\xa0\u1680\u2028\u3000\u3001"\\/{}:,가ㅋé😀\x7f\uffff\U0010ffff'), st.characters(codec="utf-8")), max_size=60)

@given(st.lists(st.tuples(ANY, ANY, st.booleans()), max_size=6), st.sampled_from(["word5", "char5"]))
@hyp(max_examples=200, deadline=None)
def test_lines_are_their_texts(rows, kind):
    records = [{"id": i, "text": t} | ({"source": i, "x": {"text": t}} if more else {}) for i, t, more in rows]
    as_texts([orjson.dumps(r, option=orjson.OPT_APPEND_NEWLINE) for r in records], kind)
    as_texts([json.dumps(r, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for r in records], kind)

def test_lines_of_another_layout():
    "Other order, spaces, escapes of every letter, no newline, capital digits: the parser reads what the kernel does not."
    text = "가나다 라마 바사아 자차 카타파하 abc \"따옴표\" \\ 😀 끝"
    good = orjson.dumps({"id": "1", "text": text, "n": 1}) + b"\n"
    odd = [json.dumps({"text": text, "id": "1"}).encode(), json.dumps({"id": "1", "text": text}).encode(), json.dumps({"id": 1, "text": text}, separators=(",", ":")).encode(), b'{"id":"1","text":"' + json.dumps(text).encode()[1:-1].upper().replace(b"\\U", b"\\u").replace(b"\\N", b"\\n") + b'"}',
           orjson.dumps({"id": "1", "text": ""}), b'{"id":"a\\\\","text":"x y z"}', b'{"id":"a\\"","text":"\\u0020x\\u3000y\\/"}\n', b'{"id":"","text":"a"}']
    for line in odd:
        for kind in ("word5", "char5"): as_texts([line], kind); as_texts([good, line, good], kind)

def test_damaged_lines_are_not_read_beyond(monkeypatch):
    "Cut anywhere, a line is refused by the kernel or by the parser; the kernel never looks behind its end."
    line = orjson.dumps({"id": "1", "text": "가나다 라마바 \\ \n 😀 글"}) + b"\n"
    for n in range(len(line) - 2):
        lines = as_lines([line[:n]])
        assert minhash._hash_lines(lines, np.empty(2, np.int64)) is None
        with pytest.raises(ValueError): signatures(lines)

def test_lines_without_numba(monkeypatch):
    lines = [orjson.dumps({"id": str(i), "text": random_text(random.Random(i), 20, "word5").encode("utf-8", "replace").decode()}) + b"\n" for i in range(30)]
    want = signatures(as_lines(lines))
    monkeypatch.setattr(minhash, "njit", None)
    assert np.array_equal(signatures(as_lines(lines)), want)
