"Contamination: planted leaks are found whatever they wear, unrelated text never, reports add up."
from __future__ import annotations
import gzip, json, random, unicodedata
from collections import defaultdict
import pytest, zstandard
from hypothesis import given, settings as hyp, strategies as st
from stages import Ctx, Stage
from yunmin_efficientdata.core.settings import ContaminationSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup import contamination as c
from yunmin_efficientdata.dedup.contamination import HITS, Item, build_table, contaminated_items, find_contamination, find_sets, item_fields, item_units, normal_form, read_set, scan_texts
from yunmin_efficientdata.dedup.prepare import Corpus, load_array, list_raw, prepare

WORDS = [a + b for a in "가나다라마바사아자차카타파하" for b in "물불산강꽃별달해밤낮길집"]

def sentence(rng, n): return " ".join(rng.choices(WORDS, k=n))

def workspace(folder, lines, sets, *overrides, cuts=1, workers=1):
    "A prepared workspace and its context. lines: records; sets: name -> records."
    ws = open_store(folder)
    for i in range(cuts): ws.write(f"raw/web-{i}.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in lines[i::cuts]))
    for name, rows in sets.items(): ws.write(f"sets/{name}.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    ctx = Ctx(ws, f"dedup.contamination.sets=[{ws.uri}/sets]", *overrides, workers=workers)
    prepare(ctx, Stage(), *list_raw(ws, "raw/"), ["raw/"])
    return ws, ctx

def rows_of(ws): return {p["name"]: load_array(ws, f"minhash_lsh/contaminated/{p['name']}.npy").tolist() for p in Corpus(ws).parts}

def ids_of(ws):
    corpus, out = Corpus(ws), set()
    for i, p in enumerate(corpus.parts):
        ids = corpus.table(i, ["id"])["id"]
        out |= {ids[r] for r in load_array(ws, f"minhash_lsh/contaminated/{p['name']}.npy")}
    return out

# ---- normal form

def test_letter_tables_are_nfkc_of_each_character():
    raw, plain, first, more = c.letter_tables()
    def said(table, point):
        v = int(table[point])
        if v >= 0: return chr(v)
        return {c.DROP: "", c.SPACE: " "}.get(v) if v > -4 else "".join(map(chr, more[first[-4 - v]:first[-3 - v]]))
    for point in range(0x110000):
        if 0xD800 <= point < 0xE000 or raw[point] == plain[point] == point and (0xE000 <= point < 0xF900 or 0x20000 <= point < 0x2F800 or 0x30000 <= point < 0xE0000 or point >= 0xF0000): continue
        char = chr(point)
        if raw[point] != c.ASK: assert said(raw, point).strip() == "".join(normal_form(char)) or said(raw, point) == " ", hex(point)
        if unicodedata.is_normalized("NFKC", char): assert said(plain, point) == c._letter(char), hex(point)

noisy = st.text(st.one_of(st.sampled_from("가나닭 \n\t\u3000aB.,!“”…㎞½ﬁＡ１ㅋㅠㄱㅏ\u0301\u1161\u11a8\u200b\u00a0ßİΣ😀𝒳"), st.characters(codec="utf-8")), max_size=60)

@given(st.lists(noisy, min_size=1, max_size=6), st.integers(0, 5))
@hyp(max_examples=150, deadline=None)
def test_kernel_agrees_with_plain_python(texts, pick):
    "Tables made of the documents' own words: what strings say, the kernel says."
    units = [normal_form(t) for t in texts[:pick + 1]]
    items = [Item(str(i), [u]) for i, u in enumerate(units) if u.count(" ") >= 1]
    table = build_table([items], 4)
    texts = texts + [unicodedata.normalize("NFD", t) for t in texts] + [t + " " + t for t in texts] + [t.upper() for t in texts]
    grams = {"".join(map(chr, table.text[a:b])): e for e, (a, b) in enumerate(zip(table.start, table.end))}
    want = set()
    for d, t in enumerate(texts):
        w = normal_form(t).split()
        want |= {(d, grams[g]) for n in table.lengths for k in range(len(w) - n + 1) if (g := " ".join(w[k:k + n])) in grams}
    assert {tuple(h) for h in scan_texts(texts, table).tolist()} == want
    assert {(d, e) for d, t in enumerate(texts) for e in c._scan_numpy(t, table)} == want

def test_numpy_fallback(monkeypatch):
    rng = random.Random(3)
    items = [Item(str(i), [sentence(rng, rng.choice((8, 10, 13, 25)))]) for i in range(20)]
    texts = [sentence(rng, 30) + " " + items[i % 20].units[0].upper() + "! ㅠㅠ" for i in range(30)]
    want = scan_texts(texts, build_table([items]))
    monkeypatch.setattr(c, "njit", None)
    assert len(want) >= 30 and (scan_texts(texts, build_table([items])) == want).all()

# ---- what counts as an item

def test_fields_of_any_shape():
    assert list(item_fields({"sentence1": "a", "sentence2": "b", "label": "c", "id": "x", "doc_id": "y", "n": 3, "ok": True, "none": None})) == ["a", "b"]
    assert list(item_fields({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source_url": "u"})) == ["q", "a", "u"]
    assert list(item_fields({"input": {"context": ["x", ["y"]]}, "reference": "z", "License": "no"})) == ["x", "y", "z"]
    assert item_units({"choices": ["가 나 다 라"] * 4}, 8) == []  # the same text again is not more text
    assert item_units({"question": "가 나 다 라", "choices": ["마 바", "사 아!"]}, 8) == ["가 나 다 라 마 바 사 아"]

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=9))
@hyp(max_examples=100, deadline=None)
def test_any_json_is_an_item(value):
    for unit in item_units({"x": value}, 2): assert unit == normal_form(unit) and unit.count(" ") >= 1

def test_sets_from_folders_files_and_archives(tmp_path, monkeypatch):
    row = json.dumps({"text": "하나 둘 셋 넷 다섯 여섯 일곱 여덟"}, ensure_ascii=False).encode()
    (tmp_path/"a").mkdir(); (tmp_path/"a/x.jsonl").write_bytes(row); (tmp_path/"a/notes.txt").write_text("-")
    (tmp_path/"a/y.jsonl.gz").write_bytes(gzip.compress(row)); (tmp_path/"x.jsonl.zst").write_bytes(zstandard.compress(row)); (tmp_path/"x.jsonl").write_bytes(row)
    monkeypatch.chdir(tmp_path)
    s = ContaminationSettings(sets=["a", "x.jsonl.zst", str(tmp_path/"x.jsonl"), "configs/eval_choices.jsonl"])
    assert [f.name for f in find_sets(s)] == ["x", "y", "x#2", "x#3", "eval_choices"]
    assert all(read_set(f, s)[0].units for f in find_sets(s)[:4])

@pytest.mark.parametrize("content, says", [(b'{"a": "b"}\n{"a":', "line 2: broken_json"), (b"", "no items"), ("[\"가\"]".encode(), "line 1: not_an_object"), ("{\"a\": \"가\"}".encode("cp949"), "invalid_utf8")])
def test_broken_set_is_one_line(tmp_path, content, says):
    (tmp_path/"e.jsonl").write_bytes(content)
    s = ContaminationSettings(sets=[str(tmp_path/"e.jsonl")])
    with pytest.raises(UserError, match="dedup.contamination.sets.*e.jsonl.*") as e: read_set(find_sets(s)[0], s)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_missing_set_is_one_line(tmp_path):
    (tmp_path/"empty").mkdir(); (tmp_path/"notes.txt").write_text("-")
    for name, says in (("nowhere.jsonl", "does not exist"), (str(tmp_path/"empty"), "holds no .jsonl"), (str(tmp_path/"notes.txt"), "holds no .jsonl")):
        with pytest.raises(UserError, match="dedup.contamination.sets") as e: find_sets(ContaminationSettings(sets=[name]))
        assert says in str(e.value) and "[]" in str(e.value)

def test_default_sets_may_be_absent(tmp_path, monkeypatch):
    def nothing(): raise UserError("no checkout")
    monkeypatch.setattr(c, "project_root", nothing); monkeypatch.chdir(tmp_path)
    assert find_sets(ContaminationSettings()) == []

def test_sets_on_s3(s3):
    store = open_store(s3.uri)
    store.write("eval/a.jsonl", json.dumps({"text": "x"})); store.write("eval/b.jsonl.gz", gzip.compress(b'{"text": "y"}'))
    assert [f.name for f in find_sets(ContaminationSettings(sets=[f"{s3.uri}/eval"]))] == ["a", "b"]
    assert [f.key for f in find_sets(ContaminationSettings(sets=[f"{s3.uri}/eval/b.jsonl.gz"]))] == ["b.jsonl.gz"]
    with pytest.raises(UserError, match="dedup.contamination.sets"): find_sets(ContaminationSettings(sets=[f"{s3.uri}/eval/c.jsonl"]))

# ---- finding

def wide(t): return "".join(chr(ord(x) + 0xFEE0) if "!" <= x <= "~" else x for x in t)
DRESSES = {"whole": lambda t: t, "punctuation": lambda t: "“" + t.replace(" ", ", ") + "”?!", "case": str.upper, "white space": lambda t: t.replace(" ", " \n\t\u3000"), "NFD": lambda t: unicodedata.normalize("NFD", t),
           "full width": wide, "invisible": lambda t: t.replace(" ", " \u200b"), "no-break": lambda t: t.replace(" ", "\u00a0")}

@pytest.mark.parametrize("dress", DRESSES)
def test_every_planted_leak_is_found(dress):
    rng = random.Random(7)
    items = [Item(str(i), [" ".join(rng.choices(WORDS + ["The", "model", "v2"], k=n)).lower()]) for i, n in enumerate(list(range(8, 40)) * 3)]
    table = build_table([items])
    texts = [sentence(rng, rng.randint(0, 60)) + " " + DRESSES[dress](i.units[0]) + rng.choice(["", ".", " " + sentence(rng, 20)]) for i in items]
    hits = scan_texts(texts, table)
    found = {(int(d), int(i)) for d, e in hits for i in table.items[table.owners[e]:table.owners[e + 1]]}
    assert found == {(i, i) for i in range(len(items))}
    counts = defaultdict(int)
    for d, _ in hits: counts[int(d)] += 1
    assert all(counts[i] == table.grams[i] for i in range(len(items)))

def test_twelve_words_are_not_enough():
    rng = random.Random(8)
    item = sentence(rng, 40).split()
    table = build_table([[Item("0", [" ".join(item)])]])
    assert len(scan_texts([" ".join(item[5:17])], table)) == 0 and len(scan_texts([" ".join(item[5:18])], table)) == 1
    short = build_table([[Item("0", [" ".join(item[:12])])]])
    assert len(scan_texts([" ".join(item[:11]), " ".join(item[1:12])], short)) == 0
    assert len(scan_texts(["앞" + " ".join(item[:12]), " ".join(item[:12]) + "은"], short)) == 0  # words are whole

def test_equal_hashes_are_not_findings(monkeypatch):
    "Were every hash equal, the text would still decide."
    rng = random.Random(9)
    items = [Item("0", [sentence(rng, 13)])]
    table = build_table([items])
    other = sentence(rng, 13)
    h = build_table([[Item("0", [other])]])
    forged = table._replace(hashes=h.hashes, bitmap=h.bitmap, directory=h.directory)
    assert len(scan_texts([other], forged)) == 0 and len(scan_texts([other], h)) == 1

def test_unrelated_text_is_clean_and_long_documents_pass():
    rng = random.Random(10)
    table = build_table([[Item(str(i), [sentence(rng, rng.randint(8, 30))]) for i in range(500)]])
    texts = [sentence(rng, 500) for _ in range(100)] + [" ".join(["가"] * 300_000), "가" * 1_000_000, "", " ", "!" * 1000, "\ud800 가"]
    assert len(scan_texts(texts, table)) == 0

# ---- the whole step

def planted(rng, n=150):
    items = [{"id": f"q{i}", "question": sentence(rng, rng.randint(8, 25)), "choices": [sentence(rng, 2)], "answer": 0} for i in range(30)] + [{"question": "너무 짧은 물음"}]
    docs = [{"id": f"d{i}", "text": sentence(rng, 40), "domain": "web" if i % 2 else "뉴스"} for i in range(n)]
    for i in range(12): docs[5 * i]["text"] += "\n" + list(DRESSES.values())[i % 6](items[i]["question"]) + "\n" + sentence(rng, 12)
    for i in range(30): docs[60 + i]["text"] += " " + items[20]["question"]          # common property
    docs += [{"id": f"copy{i}", "text": docs[5]["text"], "domain": "web"} for i in range(14)]  # one leak, fifteen pages
    return docs, {"questions": items}

def test_report_adds_up(tmp_path):
    docs, sets = planted(random.Random(11))
    ws, ctx = workspace(tmp_path, docs, sets)
    counts = find_contamination(ctx, Stage())
    report = json.loads(ws.read("dedup_ready/contamination.json"))
    q = report["sets"]["questions"]
    assert contaminated_items(ws) == {"questions": {i: 1 if i != 1 else 15 for i in range(12)}}
    assert contaminated_items(ws, frequent=True)["questions"][20] == 0 and q["frequent"] == [20]
    assert (q["items"], q["too_short"], q["items_found"], q["items_whole"], q["items_frequent"], q["documents"]) == (31, 1, 12, 12, 1, 26)
    assert ids_of(ws) == {f"d{5 * i}" for i in range(12)} | {f"copy{i}" for i in range(14)}
    assert report["documents"] == counts["documents"] == 26 == sum(report["by_domain"].values()) and report["by_domain"] == q["by_domain"]
    assert q["top"][0] == {"item": 1, "id": "q1", "documents": 15, "ngrams": q["found"][1][2], "of": q["found"][1][3]}
    assert len(report["examples"]) == 20 and all(e["items"][0]["set"] == "questions" for e in report["examples"])
    assert not ws.list("minhash_lsh/spill/")

def test_same_bytes_whatever_the_workers_and_files(tmp_path, monkeypatch):
    docs, sets = planted(random.Random(12), 400)
    seen = []
    for cuts, workers in ((1, 1), (5, 1), (3, 2)):
        ws, ctx = workspace(tmp_path/f"{cuts}{workers}", docs, sets, "dedup.part_bytes=65536", cuts=cuts, workers=workers)
        with ctx.executor: find_contamination(ctx, Stage())
        seen.append({k: ws.read(k) for k in ["dedup_ready/contamination.json", *ws.list("minhash_lsh/contaminated/")]})
    monkeypatch.setattr(c, "BATCH_BYTES", 999)
    find_contamination(Ctx(ws, f"dedup.contamination.sets=[{ws.uri}/sets]"), Stage())
    seen.append({k: ws.read(k) for k in seen[0]})
    assert len(Corpus(ws).parts) > 2 and all(x == seen[0] for x in seen)

def test_resumes_where_it_was_killed(tmp_path):
    docs, sets = planted(random.Random(13), 400)
    ws, ctx = workspace(tmp_path, docs, sets, "dedup.part_bytes=65536")
    class Killed(Exception): pass
    class Mortal(Stage):
        lives = 0
        def mark_part(self, p, info=None):
            super().mark_part(p, info); self.lives -= 1
            if not self.lives: raise Killed
    whole = Mortal(); find_contamination(ctx, whole); marks = -whole.lives
    assert marks > len(Corpus(ws).parts) > 2
    want = {k: ws.read(k) for k in ["dedup_ready/contamination.json", *ws.list("minhash_lsh/contaminated/")]}
    for lives in range(1, marks + 1):
        for k in want: ws.delete(k)
        ws.delete_prefix(HITS)   # else a part that was scanned once is not scanned again
        stage = Mortal(); stage.lives = lives
        with pytest.raises(Killed): find_contamination(ctx, stage)
        stage.lives = 0
        find_contamination(ctx, stage)
        assert {k: ws.read(k) for k in want} == want and find_contamination(ctx, stage) == stage.parts["contamination/report"]

def test_switched_off(tmp_path):
    docs, _ = planted(random.Random(14))
    ws, ctx = workspace(tmp_path, docs, {})
    ctx.settings.dedup.contamination.sets = []
    assert find_contamination(ctx, Stage()) == {"sets": {}, "documents": 0, "by_domain": {}}
    assert all(not rows for rows in rows_of(ws).values()) and contaminated_items(ws) == {}
    assert contaminated_items(open_store(tmp_path/"none")) == {}

def test_a_templates_words_belong_to_nobody(tmp_path):
    rng = random.Random(15)
    template = sentence(rng, 14)
    items = [{"question": sentence(rng, 14) + " " + template} for _ in range(40)] + [{"question": template}]
    ws, ctx = workspace(tmp_path, [{"id": "a", "text": template + "이다"}, {"id": "b", "text": sentence(rng, 9) + " " + template}, {"id": "c", "text": items[3]["question"]}], {"e": items})
    find_contamination(ctx, Stage())
    q = json.loads(ws.read("dedup_ready/contamination.json"))["sets"]["e"]
    assert (ids_of(ws), list(contaminated_items(ws)["e"]), q["template_only"]) == ({"c"}, [3], 1)

def test_real_evaluation_items_are_found_in_real_text(corpus, tmp_path):
    "Items planted in every 40th real document; nothing is claimed of the others but what plain Python also finds."
    s = ContaminationSettings(sets=[str(corpus/"eval")])
    sets = [read_set(f, s) for f in find_sets(s)]
    table = build_table(sets)
    items = [i for x in sets for i in x]
    texts = [json.loads(line)["text"] for d in ("web", "main_data", "textbook") for line in (corpus/f"small/{d}.jsonl").read_text(encoding="utf-8").splitlines()[:400]]
    rng = random.Random(16)
    chosen = rng.sample([i for i, x in enumerate(items) if x.units and table.grams[i]], len(texts) // 40)
    for k, i in enumerate(chosen): texts[40 * k] += "\n" + list(DRESSES.values())[k % 8](" ".join(items[i].units))
    hits = scan_texts(texts, table)
    found = {(int(d), int(i)) for d, e in hits for i in table.items[table.owners[e]:table.owners[e + 1]]}
    assert {(40 * k, i) for k, i in enumerate(chosen)} <= found
    for d, e in hits.tolist(): assert "".join(map(chr, table.text[table.start[e]:table.end[e]])) in normal_form(texts[d])
