"The folder for the Hub: loads offline with datasets, says what the records say, is never half made."
import json, re, socket, subprocess
from pathlib import Path
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, yaml
from hypothesis import given, settings as hypothesis_settings, strategies as st
from yunmin_efficientdata import cli
from yunmin_efficientdata.core.settings import ShareSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.format import share as H
from yunmin_efficientdata.format.instructions import FOLDER, InstructionWriter, row_of, Example
from yunmin_efficientdata.format.parquet import SCHEMA, schema_text
from yunmin_efficientdata.format.share import Census, escaped, hub_license, languages_of, license_verdict, md_table, planned, share, verify_share

LICENSES = {"web": ["CC BY 4.0"], "textbook": ["https://creativecommons.org/licenses/by/4.0/"], "social": ["CC BY 4.0", None]}

def build(folder, licenses=LICENSES, per=12, instructions=False):
    "A workspace as the phases leave it: deduped/, parquet_ready/, tokenizer/, what phase 1 recorded."
    store, entries = open_store(folder), {"training": {}, "validation": {}, "test": {}}
    for domain, names in licenses.items():
        docs = [{"id": f"{domain}-{i}", "text": f"{domain} 문서 {i}\n둘째 줄", "source": f"{domain}|{i % 3}", "lang": "ko" if i else "", "date": "2024-01-01", "license": names[i % len(names)]} for i in range(per)]
        store.write(f"deduped/{domain}/part-00000.jsonl", "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in docs))
        splits = {"training": [docs[:per // 2], docs[per // 2:per - 2]], "validation": [docs[per - 2:per - 1]], "test": [docs[per - 1:]]}
        for split, parts in splits.items():
            files = []
            for n, part in enumerate(parts):
                key = f"parquet_ready/{domain}-{n:05d}-of-00002.parquet" if split == "training" else f"parquet_ready/heldout/{split}/{domain}.parquet"
                rows = [{c: d.get(c, "") for c in SCHEMA.names} | {"tokens": [5, 6, 7, 0], "domain": domain} for d in part]
                with store.output(key) as path: pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
                files.append(key)
            n = sum(map(len, parts))
            entries[split][domain] = {"files": files, "rows": n, "tokens": 4 * n, "bytes": sum(map(store.size, files))}
    store.write("parquet_ready/manifest.json", json.dumps({"domains": entries.pop("training"), "heldout": entries, "tokenizer": {"hash": "ab" * 8, "vocab_size": 300, "eos_id": 0}}))
    store.write("parquet_ready/schema.txt", schema_text()); store.write("tokenizer/tokenizer.json", "{}"); store.write("tokenizer/_COMMIT", "")
    store.write("dedup_ready/manifest.json", json.dumps({"sources": ["/secret/place"], "total": {"read": 50, "kept": 40, "filtered": {"too_short": 9}, "quarantined": {"broken_json": 1}, "rules": {"mask_email": 3, "white_space": 8}}}))
    store.write("dedup_log.csv", "scope,step,docs_in,docs_out,bytes_in,bytes_out,words_in,words_out,duplicate_rate,seconds\ntotal,prepare,50,40,5000,4000,1,1,0.0,1.5\ntotal,near,40,36,4000,3600,1,1,0.1,2.5\n")
    store.write("ledger/dedup.near.json", json.dumps({"stage": "dedup.near", "status": "done", "settings": {"threshold": 0.8, "bands": 18, "rows": 7, "shingle": "word5"}}))
    store.write("ledger/dedup.exact.json", json.dumps({"after": ["dedup.contamination", "dedup.prepare"]}))
    store.write("dedup_ready/contamination.json", json.dumps({"ngram": 13, "documents": 4, "sets": {"/secret/place/kmmlu.jsonl": {"items": 30, "items_found": 2, "items_whole": 1, "documents": 4}}}))
    if instructions:
        key = f"{FOLDER}/sft/a.parquet"
        with store.output(key) as path:
            with InstructionWriter(path, {}) as w:
                for i in range(5): w.add(row_of({"id": str(i)}, Example("instruction", []), [f"글 {i}"], [(np.array([3, 4, 0], np.int32), np.array([-100, 4, 0], np.int32), False)], "a"))
        store.write(f"{FOLDER}/manifest.json", json.dumps({"sections": {"sft": {"files": [key], "rows": 5, "tokens": 15, "learned": 10, "bytes": store.size(key)}}, "left_out": 2, "read": 7, "reasons": {"too_long": 2}, "licenses": [["a", "", 4, 40], ["a", "CC0", 1, 10]]}))
        store.write(f"{FOLDER}/chat_template.jinja", "{{ messages }}")
    return store

@pytest.fixture
def store(tmp_path): return build(tmp_path/"ws")

@pytest.fixture
def offline(monkeypatch):
    "Any connection is an error: nothing is downloaded, nothing is uploaded."
    def refuse(*a, **k): raise AssertionError("a network connection was tried")
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse); monkeypatch.setattr(socket, "getaddrinfo", refuse)
    import huggingface_hub.constants, datasets
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True); monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

def meta(folder): return yaml.safe_load(Path(folder, "README.md").read_text(encoding="utf-8").split("---\n")[1])

# -- licences ------------------------------------------------------------

@pytest.mark.parametrize("text,name", [("cc-by-sa-4.0", "cc-by-sa-4.0"), ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"), ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "cc-by-nc-sa-4.0"), ("CC_BY_4.0", "cc-by-4.0"),
    ("http://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"), ("Apache 2.0", "apache-2.0"), ("Apache-2", "apache-2.0"), ("BSD-3-Clause", "bsd-3-clause"), ("The MIT License", ""), ("MIT", "mit"), ("GPL v2", "gpl-2.0"),
    ("all rights reserved", ""), ("KOGL Type 1", ""), ("CC-BY-2.0-KR", ""), ("MIT OR Apache-2.0", ""), ("proprietary", ""), ("unknown", "")])
def test_spellings(text, name): assert hub_license(text) == name

@pytest.mark.parametrize("found,chosen,license,said", [
    ({"MIT": 5}, None, "mit", []), ({"MIT": 5, None: 1}, None, "other", ["1 of 6 documents (16.7 %) name no licence"]), ({None: 3}, None, "other", ["3 of 3"]), ({"MIT": 5, "CC0": 5}, None, "other", ["2 licences are mixed"]),
    ({"house rules": 4}, None, "other", ["Hub knows no licence called 'house rules'"]), ({"cc-by-nc-4.0": 4}, None, "cc-by-nc-4.0", ["forbid commercial use"]), ({"MIT": 5, "mit": 5}, None, "mit", []),
    ({"MIT": 5}, "mit", "mit", []), ({"MIT": 5}, "cc0-1.0", "cc0-1.0", ["records do not all say so"]), ({None: 5}, "cc0-1.0", "cc0-1.0", ["name no licence", "records do not all say so"]), ({"house rules": 1}, "house rules", "other", ["Hub knows no"])])
def test_verdict_is_loud_when_it_must_be(found, chosen, license, said):
    c = Census()
    for name, n in found.items():
        for _ in range(n): c.add("web", {"text": "글", "license": name})
    got, _, warnings = license_verdict(c, chosen)
    assert got == license and len(warnings) == len(said) and all(s in w for s, w in zip(said, warnings))

@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=4), st.sampled_from(["MIT", "", None, "x", 3, ["MIT"], {"a": 1}])), max_size=40), st.integers(1, 30))
def test_census_loses_nothing_and_is_bounded(rows, limit):
    c = Census(limit=limit)
    for domain, source, license in rows: c.add(domain, {"text": "글" + source, "source": source, "license": license})
    assert sum(d for d, _ in c.rows.values()) == len(rows) and sum(b for _, b in c.rows.values()) == sum(3 + len(s.encode("utf-8", "surrogatepass")) for _, s, _ in rows)
    assert len(c.rows) <= limit + 8
    assert sum(d for d, _ in c.by(0).values()) == sum(d for d, _ in c.by(2).values()) == len(rows)

def test_languages():
    c = Census()
    for lang, n in (("ko", 97), ("KO", 1), ("en", 1), ("", 1)):
        for _ in range(n): c.add("a", {"text": "x", "lang": lang})
    c.add("a", {"text": "x", "lang": "ja"}); c.add("a", {"text": "x", "lang": "한국어"})
    assert languages_of(c, []) == ["ko"] and languages_of(c, ["en"]) == ["en"]

# -- the folder ----------------------------------------------------------

def test_datasets_loads_it_offline(store, tmp_path, offline):
    import datasets
    share(store, tmp_path/"out", ShareSettings())
    for name, rows in (("web", (10, 1, 1)), ("default", (30, 3, 3)), (None, (30, 3, 3))):
        data = datasets.load_dataset(str(tmp_path/"out"), name, cache_dir=str(tmp_path/"cache"))
        assert tuple(data[s].num_rows for s in ("train", "validation", "test")) == rows
    web = datasets.load_dataset(str(tmp_path/"out"), "web", split="train", cache_dir=str(tmp_path/"cache"))
    assert web[9]["text"] == "web 문서 9\n둘째 줄" and web[9]["tokens"] == [5, 6, 7, 0] and set(web["domain"]) == {"web"} and web.column_names == SCHEMA.names
    stream = datasets.load_dataset(str(tmp_path/"out"), "social", split="validation", streaming=True)
    assert [r["id"] for r in stream] == ["social-10"]
    assert datasets.get_dataset_config_names(str(tmp_path/"out")) == ["default", "social", "textbook", "web"]

def test_card_is_what_the_hub_reads(store, tmp_path):
    from huggingface_hub import DatasetCard
    made = share(store, tmp_path/"out", ShareSettings(title="말뭉치: \"예\" # 1", max_sources=2))
    card = DatasetCard.load(tmp_path/"out/README.md")
    assert card.data.pretty_name == "말뭉치: \"예\" # 1" and card.data.license == "other" == made["license"] and card.data.language == ["ko"] and card.data.size_categories == ["n<1K"]
    assert card.data.to_dict()["license_link"] == "LICENSE.md" and card.data.to_dict()["license_name"] == "mixed-or-unknown"
    text = card.text
    for part in ("[!WARNING]", "6 of 36 documents (16.7 %) name no licence", "| `default` (all) | 30 | 3 | 3 | 120 |", "cc-by-4.0 | 30 | 83.3 %", "Read 50 records, kept 40", "too_short 9", "broken_json 1", "`threshold` 0.8", "`bands` 18",
                 "| near | 40 | 36 |", "kmmlu.jsonl | 30 | 2 | 1 | 4 |", "**removed**", "email in 3 documents", "ab" * 8, "more rows in `licenses.csv`", "3 of 36 documents do not say their language", "load_dataset("): assert part in text, part
    assert "/secret" not in text and str(tmp_path) not in text
    assert text.index("[!WARNING]") < text.index("## Contents")
    rows = list(__import__("csv").DictReader(open(tmp_path/"out/licenses.csv", encoding="utf-8")))
    assert sum(int(r["documents"]) for r in rows) == 36 and {r["license"] for r in rows} == {"cc-by-4.0", ""}
    assert "name no licence" in (tmp_path/"out/LICENSE.md").read_text(encoding="utf-8")

def test_one_licence_needs_no_warning(tmp_path):
    store = build(tmp_path/"ws", {"web": ["MIT"]})
    made = share(store, tmp_path/"out", ShareSettings())
    assert made["warnings"] == [] and meta(tmp_path/"out")["license"] == "mit" and "license_name" not in meta(tmp_path/"out") and "WARNING" not in (tmp_path/"out/README.md").read_text()

def test_a_workspace_without_records_of_phase_1(store, tmp_path):
    for key in ("dedup_ready/manifest.json", "dedup_log.csv", "dedup_ready/contamination.json", "ledger/dedup.near.json"): store.delete(key)
    share(store, tmp_path/"out", ShareSettings())
    text = (tmp_path/"out/README.md").read_text()
    assert "no record of cleaning" in text and "**not** compared" in text

def test_links_and_copies(store, tmp_path):
    made = share(store, tmp_path/"out", ShareSettings())
    source, target = Path(store.fetch("parquet_ready/web-00001-of-00002.parquet")), tmp_path/"out/data/web/train-00001-of-00002.parquet"
    assert made["linked"] == 12 and source.stat().st_ino == target.stat().st_ino
    share(store, tmp_path/"out", ShareSettings(), link=False)
    assert source.stat().st_ino != target.stat().st_ino and source.read_bytes() == target.read_bytes()
    with store.output("parquet_ready/web-00001-of-00002.parquet") as path: path.write_bytes(b"new")  # phase 2 replaces files, so what was shared stays
    assert pq.read_table(target).num_rows == 4

def test_same_workspace_same_bytes(store, tmp_path):
    share(store, tmp_path/"a", ShareSettings()); share(store, tmp_path/"b", ShareSettings())
    files = lambda d: {p.relative_to(d).as_posix(): p.read_bytes() for p in sorted(d.rglob("*")) if p.is_file()}
    assert files(tmp_path/"a") == files(tmp_path/"b") and "tokenizer/_COMMIT" not in files(tmp_path/"a") and "tokenizer/tokenizer.json" in files(tmp_path/"a")

def test_checksums(store, tmp_path):
    out = tmp_path/"out"
    n = share(store, out, ShareSettings())["files"]
    assert verify_share(out) == n - 1 and subprocess.run(["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=out).returncode == 0
    target = out/"data/web/test-00000-of-00001.parquet"
    data = bytearray(target.read_bytes()); data[40] ^= 1
    target.unlink(); target.write_bytes(data)
    with pytest.raises(UserError, match="web/test-00000-of-00001.parquet differs"): verify_share(out)
    target.unlink()
    with pytest.raises(UserError, match="is missing"): verify_share(out)
    with pytest.raises(UserError, match="no checksums"): verify_share(tmp_path)

def test_nothing_of_others_is_overwritten(store, tmp_path):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine/thesis.txt").write_text("x"); (tmp_path/"file").write_text("x"); (tmp_path/"link").symlink_to(tmp_path/"mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(UserError): share(store, tmp_path/name, ShareSettings())
    assert (tmp_path/"mine/thesis.txt").read_text() == "x"
    (tmp_path/"empty").mkdir()
    share(store, tmp_path/"empty", ShareSettings())

def test_a_killed_run_leaves_the_old_folder_and_the_next_one_heals(store, tmp_path, monkeypatch):
    share(store, tmp_path/"out", ShareSettings(title="old"))
    def killed(folder): raise KeyboardInterrupt
    monkeypatch.setattr(H, "write_checksums", killed)
    with pytest.raises(KeyboardInterrupt): share(store, tmp_path/"out", ShareSettings(title="new"))
    assert verify_share(tmp_path/"out") and meta(tmp_path/"out")["pretty_name"] == "old"
    monkeypatch.undo()
    share(store, tmp_path/"out", ShareSettings(title="new"))
    assert meta(tmp_path/"out")["pretty_name"] == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["out", "ws"]

def test_stale_parquet_is_refused(store, tmp_path):
    text = store.read_text("deduped/web/part-00000.jsonl")
    store.write("deduped/web/part-00000.jsonl", text + text.splitlines()[0] + "\n")
    with pytest.raises(UserError, match="web: deduped/ holds 13 documents, parquet_ready/ 12.*yunmin format"): share(store, tmp_path/"out", ShareSettings())
    with pytest.raises(UserError, match="run `yunmin format` first"): share(open_store(tmp_path/"nothing"), tmp_path/"out", ShareSettings())
    assert not (tmp_path/"out").exists()

def test_odd_names(tmp_path, offline):
    import datasets
    store = build(tmp_path/"ws", {"한국 뉴스[1]": ["MIT"], "default": ["MIT"], "a'b": ["MIT"]})
    share(store, tmp_path/"out", ShareSettings())
    names = datasets.get_dataset_config_names(str(tmp_path/"out"))
    assert names == ["default", "a-b", "domain-default", "한국-뉴스-1"]
    for n in names[1:]: assert datasets.load_dataset(str(tmp_path/"out"), n, split="train", cache_dir=str(tmp_path/"cache")).num_rows == 10
    with pytest.raises(UserError, match="same name"): planned({"domains": {"a b": {"files": ["x"]}, "a/b": {"files": ["y"]}}, "heldout": {}})

def test_texts_of_records_cannot_write_the_card(tmp_path):
    store = build(tmp_path/"ws", {"web": ["x\n---\n# Owned <script>|[a](b)"]})
    share(store, tmp_path/"out", ShareSettings())
    text = (tmp_path/"out/README.md").read_text()
    assert "<script>" not in text and "\n# Owned" not in text and text.count("\n---\n") == 1 and "[a](b)" not in text
    assert escaped("a|b\n[c]<d>&") == "a\\|b \\[c\\]&lt;d>&amp;" and "| `a\\|b` |" in md_table(["x"], [["`a|b`"]])

def test_instructions_come_along(tmp_path, offline):
    import datasets
    store = build(tmp_path/"ws", instructions=True)
    share(store, tmp_path/"out", ShareSettings())
    data = datasets.load_dataset(str(tmp_path/"out"), "instructions-sft", split="train", cache_dir=str(tmp_path/"cache"))
    assert data.num_rows == 5 and data[0]["labels"] == [-100, 4, 0]
    assert datasets.load_dataset(str(tmp_path/"out"), split="train", cache_dir=str(tmp_path/"cache")).num_rows == 30  # not mixed into the corpus
    text = (tmp_path/"out/README.md").read_text()
    assert "10 of 41 documents (24.4 %) name no licence" in text and "| a | **not stated** | 4 |" in text and "cc0-1.0" in text
    assert "| `instructions-sft` | 5 | 15 | 10 |" in text and "2 of 7 records were left out (too_long 2)" in text and (tmp_path/"out/chat_template.jinja").read_text() == "{{ messages }}"

def test_the_cards_examples_work(store, tmp_path, monkeypatch, offline):
    share(store, tmp_path/"out", ShareSettings(repo=str(tmp_path/"out")))
    monkeypatch.chdir(tmp_path/"out"); monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    text = (tmp_path/"out/README.md").read_text()
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S): exec(code.replace("seq_len=1024, batch_size=16", "seq_len=4, batch_size=2"), names)
    assert names["data"].column_names == ["text", "source"] and next(iter(names["stream"]))["text"] and next(iter(names["loader"]))["input_ids"].shape == (2, 4)
    assert duckdb.sql(re.search(r"```sql\n(.*?)```", text, re.S)[1]).df().tokens.sum() == 40

def test_from_s3(s3, tmp_path):
    store = build(s3.uri + "/ws", {"web": ["MIT"]})
    made = share(store, tmp_path/"out", ShareSettings())
    assert verify_share(tmp_path/"out") == made["files"] - 1 and pq.read_table(tmp_path/"out/data/web/train-00000-of-00002.parquet").num_rows == 6

# -- the command ---------------------------------------------------------

def test_command(store, tmp_path, capsys, offline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def call(*args):
        try: cli.main(["share", *map(str, args)]); code = 0
        except SystemExit as e: code = e.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err
    code, out, _ = call(tmp_path/"ws", "--set", "share.repo=me/corpus")
    assert code == 0 and verify_share(tmp_path/"ws/share") and "licence: 6 of 36 documents (16.7 %) name no licence" in out and f"hf upload me/corpus {tmp_path/'ws/share'} . --repo-type dataset" in out
    code, out, _ = call(tmp_path/"ws", tmp_path/"elsewhere", "--copy", "--set", "share.license=cc-by-4.0")
    assert code == 0 and meta(tmp_path/"elsewhere")["license"] == "cc-by-4.0" and "records do not all say so" in out
    code, _, err = call(tmp_path/"none")
    assert code == 2 and err.startswith("error:") and "yunmin format" in err and err.count("\n") == 1
    code, out, _ = call("--help")
    assert code == 0 and "Nothing is uploaded" in out
