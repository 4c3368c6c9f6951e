"Profile: every query against pandas, foreign Parquet, bounded memory, the script in a fresh DuckDB, S3, the command line."
import datetime, subprocess, sys
import duckdb, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from yunmin_efficientdata.core.figures import figure_png, korean_style
from yunmin_efficientdata.core.settings import FormatSettings, UserError
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.format.parquet import FileWriter
from yunmin_efficientdata.format import profile as P

WORDS = "서울 부산 날씨 정책 국회 오늘 내일 그리고 하지만 경제 문화 科學 AI 2024년 12.5% ㅋㅋㅋ".split()

def documents(n=240, seed=0):
    "Documents of two domains, with copies, repeated lines, odd ones."
    rng = np.random.default_rng(seed); docs = []
    for i in range(n):
        text = " ".join(rng.choice(WORDS, int(rng.integers(5, 60))))
        if i % 6 == 0: text += "\n저작권자 무단 전재 및 재배포를 금지합니다\n" + text[:30]
        docs.append({"id": f"d{i:03}", "text": text, "source": f"s{i % 5}", "lang": "ko" if i % 9 else "", "domain": "web" if i % 3 else "law", "date": f"{2010 + i % 7}-03-01" if i % 4 else ""})
    if n < 100: return docs
    docs[50]["text"] = docs[51]["text"] = docs[10]["text"]; docs[52]["text"] = docs[11]["text"].replace(" ", "")
    docs[60]["text"] = "!?#@" * 200; docs[61]["text"] = "가" * 3000; docs[62]["text"] = ""
    return docs

def tokens_of(doc): return np.append(3 + np.frombuffer(doc["text"].encode(), np.uint8)[:400].astype(np.int32), 0).astype(np.int32)

def write(path, docs):
    with FileWriter(path, FormatSettings(), {"yunmin.eos_id": "0"}) as w:
        for d in docs: w.add(d, tokens_of(d))

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder, docs = tmp_path_factory.mktemp("profile"), documents()
    docs[199]["text"] = docs[10]["text"]  # a leak into the test part
    groups = {"training": docs[:180], "validation": docs[180:190], "test": docs[190:]}
    for split, group in groups.items(): write(folder/f"{split}.parquet", group)
    files = {s: [folder/f"{s}.parquet"] for s in groups}
    frame = pd.DataFrame([{**d, "split": s, "tokens": len(tokens_of(d)), "chars": len(d["text"])} for s, g in groups.items() for d in g])
    return files, frame, P.profile(files)

# -- numbers ---------------------------------------------------------------------

def test_counts_equal_pandas(parts):
    _, frame, tables = parts
    assert list(tables) == list(P.QUERIES)
    overview = tables["overview"].set_index(["domain", "split"])
    for key, g in frame.groupby(["domain", "split"]):
        row = overview.loc[key]
        assert (row.documents, row.tokens, row.characters, row.bytes) == (len(g), g.tokens.sum(), g.chars.sum(), sum(len(t.encode()) for t in g.text))
    lengths = tables["lengths"].set_index("domain")
    for d, g in frame.groupby("domain"):
        assert lengths.loc[d, "median"] == np.quantile(g.tokens, .5, method="inverted_cdf") and (lengths.loc[d, "min"], lengths.loc[d, "max"]) == (g.tokens.min(), g.tokens.max())
    assert tables["histogram"].documents.sum() == len(frame) and tables["histogram"].tokens.sum() == frame.tokens.sum()
    for r in tables["windows"].itertuples():
        g = frame[frame.domain == r.domain]; assert r.longer_documents == (g.tokens > r.seq_len).sum()

def test_origins_equal_pandas(parts):
    _, frame, tables = parts
    assert tables["sources"].groupby("source").tokens.sum().to_dict() == frame.groupby("source").tokens.sum().to_dict()
    assert tables["languages"].groupby("lang").documents.sum().to_dict() == frame.lang.replace("", "unknown").value_counts().to_dict()
    assert tables["languages_by_source"].documents.sum() == tables["languages_by_year"].documents.sum() == len(frame)
    years = frame.date.str[:4].replace("", "unknown")
    assert tables["years"].groupby("year").tokens.sum().to_dict() == frame.tokens.groupby(years).sum().to_dict()
    unknown = tables["unknown"].sum(numeric_only=True)
    assert (unknown.no_lang, unknown.no_date, unknown.no_source) == ((frame.lang == "").sum(), (frame.date == "").sum(), 0)

def test_outliers_name_the_planted_ones(parts):
    _, frame, tables = parts
    found = {(r.domain, reason): g.id.tolist() for (_, reason), g in tables["outliers"].groupby(["domain", "reason"]) for r in g.itertuples()}
    domain = frame.set_index("id").domain
    assert found[domain["d060"], "most signs"][0] == "d060" and found[domain["d061"], "fewest tokens a character"][0] == "d061"
    for (d, reason), ids in found.items():
        if reason == "longest": assert ids[0] == frame[frame.domain == d].sort_values(["tokens", "id"], ascending=[False, True]).id.iloc[0]
    assert "d062" not in tables["outliers"].id.tolist()

def test_duplicates_leaks_and_lines(parts):
    _, frame, tables = parts
    left = tables["duplicates_left"].set_index("domain")
    for d, g in [*frame.groupby("domain"), ("total", frame)]:
        assert left.loc[d, "same_text"] == len(g) - g.text.nunique()
        assert left.loc[d, "same_without_space"] == len(g) - g.text.str.replace("[ \n]", "", regex=True).nunique()
    assert left.loc["total", "same_without_space"] > left.loc["total", "same_text"] >= 3
    leaks = tables["leaks"]; assert leaks.also_in_training.sum() == 1 and leaks.loc[leaks.also_in_training == 1, "split"].item() == "test"
    lines = tables["repeated_lines"]; top = lines.sort_values("documents").iloc[-1]
    assert lines[lines.line.str.startswith("저작권자")].documents.sum() == frame.text.str.contains("저작권자").sum() and top.line.startswith("저작권자")
    assert (tables["repeated_share"].share_of_characters > 0).all()

def test_endings_show_broken_documents(parts, tmp_path):
    assert parts[2]["endings"][["last_token", "also_inside"]].values.tolist() == [[0, 0]] * 2
    with FileWriter(tmp_path/"x.parquet", FormatSettings(), {}) as w:
        for i, t in enumerate([[5, 0], [5, 0, 6, 0], [5, 6]]): w.add({"id": str(i), "text": "가", "domain": "a"}, np.array(t, np.int32))
    assert P.profile(tmp_path/"x.parquet", names=["endings"])["endings"].values.tolist() == [["a", 0, 2, 1], ["a", 6, 1, 0]]

@pytest.mark.parametrize("n,name", [(1, "word"), (2, "bigram"), (3, "trigram")])
def test_ngrams_equal_python(parts, n, name):
    from collections import Counter
    _, frame, tables = parts
    table = tables[f"top_{name}s"]
    for domain, g in frame.groupby("domain"):
        count = Counter(" ".join(w[i:i + n]) for w in map(str.split, g.text) for i in range(len(w) - n + 1))
        best = sorted(count.items(), key=lambda kv: (-kv[1], kv[0].encode()))[:10]
        assert list(table[table.domain == domain][[name, "n"]].itertuples(index=False, name=None)) == best

def test_tokens_equal_numpy(parts):
    files, frame, tables = parts
    counts = P.token_counts([p for ps in files.values() for p in ps], block=777)
    assert counts.sum() == frame.tokens.sum()
    use = tables["token_use"]; assert use.tokens.sum() == counts.sum()
    assert tables["top_tokens"].groupby("token").n.sum().max() == counts.max()
    scripts = tables["scripts"].set_index("domain"); assert (abs(scripts.sum(axis=1) - 1) < .001).all() and (scripts.hangul > .5).any()

# -- same tables, bounded memory ------------------------------------------------------

def test_threads_memory_and_file_order_change_nothing(parts):
    files, _, tables = parts
    for kw in ({"threads": 1}, {"threads": 4, "memory": "150MB"}):
        again = P.profile(dict(reversed(files.items())), **kw)
        for name, table in tables.items(): pd.testing.assert_frame_equal(table, again[name], obj=name)

def test_sample_is_chosen_by_id(parts):
    files, frame, _ = parts
    assert P.sample_limit(10, 10) == "g" and P.sample_limit(1000, 10) < P.sample_limit(1000, 20)
    few = P.profile(files, sample=60, names=["token_use"])["token_use"].tokens.sum()
    assert 0 < few < frame.tokens.sum() * .6

def test_memory_stays_within_the_limit(tmp_path):
    rng = np.random.default_rng(0); letters = np.array([chr(c) for c in range(0xAC00, 0xAC00 + 4000)])
    with FileWriter(tmp_path/"big.parquet", FormatSettings(), {}) as w:
        for i in range(1500):
            text = "\n".join(map("".join, rng.choice(letters, (160, 40))))
            w.add({"id": str(i), "text": text, "domain": "a", "date": ""}, np.zeros(1500, np.int32))
    code = ("import sys; from yunmin_efficientdata.core.ledger import peak_rss_mb; from yunmin_efficientdata.format.profile import profile; before = peak_rss_mb(); "
            "t = profile(sys.argv[1], names=['repeated_lines', 'repeated_share', 'duplicates_left', 'outliers'], memory='256MB', threads=2); "
            "print(len(t), int(peak_rss_mb() - before))")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path/"big.parquet")], capture_output=True, text=True)
    tables, grown = map(int, out.stdout.split()) if out.returncode == 0 else pytest.fail(out.stderr)
    assert tables == 4 and grown < 400  # a limit that holds: DuckDB's 256 MB and what its allocator keeps

# -- any Parquet --------------------------------------------------------------------

def test_foreign_columns(tmp_path):
    table = pa.table({"text": pa.array(["가 나", None, "가 나"], pa.large_string()), "date": [datetime.date(2024, 5, 1), None, None], "id": [7, 8, 9], "lang": pa.array(["ko", "ko", None]).dictionary_encode()})
    pq.write_table(table, tmp_path/"o'clock.parquet")
    tables = P.profile(tmp_path/"o'clock.parquet")
    assert "lengths" not in tables and "languages" not in tables  # they count tokens
    assert tables["duplicates_left"].same_text.iloc[-1] == 1 and tables["unknown"].values.tolist() == [["", 3, 3, 1, 2]] and tables["top_bigrams"].n.tolist() == [2]
    pq.write_table(pa.table({"tokens": pa.array([[1, 2, 0], [], None], pa.large_list(pa.int64()))}), tmp_path/"tokens.parquet")
    tables = P.profile(tmp_path/"tokens.parquet")
    assert tables["token_use"].tokens_used.item() == 3 and "top_words" not in tables and tables["histogram"].documents.sum() == 3

def test_users_mistakes_are_one_line(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path/"x.parquet"); (tmp_path/"bad.parquet").write_bytes(b"PAR1 no"); (tmp_path/"ws").mkdir()
    for target, word in ((tmp_path/"x.parquet", "neither"), (tmp_path/"bad.parquet", "cannot be profiled"), (tmp_path/"none.parquet", "no such file"), (tmp_path/"nothing", "no such workspace"), (tmp_path/"ws", "yunmin format")):
        with pytest.raises(UserError, match=word) as e: P.profile_tables(str(target))
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no query 'x'"): P.profile_tables(str(tmp_path/"none.parquet"), names=["x"])
    write(tmp_path/"ok.parquet", documents(5))
    with pytest.raises(UserError): P.profile(tmp_path/"ok.parquet", memory="much")
    with pytest.raises(UserError, match="--memory"): P.profile(tmp_path/"ok.parquet", memory="100KB")

def test_empty_file(tmp_path):
    write(tmp_path/"none.parquet", [])
    tables = P.profile(tmp_path/"none.parquet")
    assert all(len(t) == 0 for n, t in tables.items() if n != "duplicates_left")
    assert P.profile_page(tables).startswith("# 말뭉치 프로필") and P.token_counts(tmp_path/"none.parquet").sum() == 0

# -- what a person takes away -----------------------------------------------------------

def test_script_runs_in_the_workspace_folder(parts, tmp_path, monkeypatch):
    files, _, tables = parts
    for split, (path,) in files.items():
        to = tmp_path/"parquet_ready"/("" if split == "training" else f"heldout/{split}")/"web.parquet"
        to.parent.mkdir(parents=True, exist_ok=True); to.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as db:
        for name, statement in zip(["view", *P.QUERIES], db.extract_statements(P.queries_sql())):
            result = db.execute(statement)
            if name != "view": assert result.df().equals(tables[name]) or name == "top_tokens", name
    assert all(sql.startswith("-- ") and ";" not in sql and len(P.explain(sql)) > 15 for sql in P.QUERIES.values())

def test_page_and_tables(parts, tmp_path):
    tables = parts[2]; store = open_store(str(tmp_path))
    P.write_tables(store, tables, quotes=False)
    page = store.read_text("results/profile/profile.md")
    assert "저작권자" not in page and "## 남은 중복 (`duplicates_left`)" in page and "저작권자" in P.profile_page(tables)
    assert pd.read_csv(tmp_path/"results/profile/lengths.csv").equals(tables["lengths"].convert_dtypes().astype(pd.read_csv(tmp_path/"results/profile/lengths.csv").dtypes))
    odd = pd.DataFrame([{"a": "x|y\nz", "b": 1.23456789, "c": "\u202e`<b>"}])
    assert P.markdown_table(odd).count("\n") == 2 and "\u202e" not in P.markdown_table(odd)

def test_figures_are_drawn_with_korean_and_without_warnings(parts, recwarn):
    korean_style(); tables = parts[2]
    kinds = pd.DataFrame([{"kind": k, "entries": 3, "entry_share": .1, "uses": 5, "use_share": .1, "unused": 0} for k in P.KINDS])
    table = pd.DataFrame([{"tokenizer": t, "domain": d, "tokens_per_char": .6} for t in ("ours", "other", "bytes") for d in ("web", "law", "total")])
    figures = [P.plot_lengths(tables["histogram"]), P.plot_origins(tables["sources"], tables["years"]), P.plot_scripts(tables["scripts"]), P.plot_vocabulary(kinds, np.arange(50)), P.plot_fertility(table)]
    assert all(len(figure_png(f)) > 10_000 for f in figures)
    assert not [w for w in recwarn if "Glyph" in str(w.message) or "Deprecat" in str(w.category)], [str(w.message) for w in recwarn]

def test_write_profile_is_deterministic_and_whole(parts, tmp_path):
    import json
    from types import SimpleNamespace
    from yunmin_efficientdata.format.tokenizer import Encoder, as_pretrained, fertility, save_tokenizer, train_bpe
    docs = documents(); tokenizer = as_pretrained(train_bpe([d["text"] for d in docs], 320)); encode = Encoder(tokenizer)
    def make(folder):
        store = open_store(str(folder)); save_tokenizer(tokenizer, folder/"tokenizer"); manifest = {"domains": {}, "heldout": {"validation": {}, "test": {}}, "tokenizer": {"hash": "", "vocab_size": len(tokenizer), "eos_id": 0}}
        for split, group, at in (("training", docs[:200], "web.parquet"), ("validation", docs[200:220], "heldout/validation/web.parquet"), ("test", docs[220:], "heldout/test/web.parquet")):
            path = folder/"parquet_ready"/at; path.parent.mkdir(parents=True, exist_ok=True); tokens = encode([d["text"] for d in group])
            with FileWriter(path, FormatSettings(), {}) as w:
                for d, t in zip(group, tokens): w.add(d, t)
            entry = {"files": [f"parquet_ready/{at}"], "rows": len(group), "tokens": sum(map(len, tokens)), "bytes": path.stat().st_size}
            (manifest["domains"] if split == "training" else manifest["heldout"][split])["web"] = entry
        store.write("parquet_ready/manifest.json", json.dumps(manifest)); store.write("deduped/web/part-00000.jsonl", "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in docs))
        ctx = SimpleNamespace(store=store, settings=SimpleNamespace(report=SimpleNamespace(quotes=True)))
        summary = P.write_profile(ctx, ["deduped/web/part-00000.jsonl"], fertility({"ours": tokenizer}, {"web": [d["text"] for d in docs]}))
        return summary, {str(p.relative_to(folder)): p.read_bytes() for f in ("results", "reports") for p in sorted((folder/f).rglob("*")) if p.is_file()}
    (summary, files), again = make(tmp_path/"a"), make(tmp_path/"b")
    assert (summary, files) == again and summary["tables"] == len([f for f in files if f.endswith(".csv")])
    assert {f"reports/figures/format_{n}.png" for n in ("lengths", "fertility", "formats", "origins", "scripts", "vocabulary")} <= files.keys()
    assert pd.read_csv(tmp_path/"a/results/profile/endings.csv").values.tolist() == [["law", 0, 80, 0], ["web", 0, 160, 0]]
    assert "text" in pd.read_csv(tmp_path/"a/results/profile/top_tokens.csv").columns and P.profile_tables(str(tmp_path/"a"), names=["top_tokens"])["top_tokens"].columns.tolist() == ["domain", "token", "text", "n"]

# -- S3 and the command line ---------------------------------------------------------------

def test_file_and_workspace_on_s3(parts, s3):
    files, _, tables = parts
    s3.client.upload_file(str(files["training"][0]), s3.bucket, "a/b.parquet")
    found = P.profile_tables(f"{s3.uri}/a/b.parquet", names=["overview"])["overview"]
    assert found.documents.sum() == 180
    with pytest.raises(UserError, match="no such file"): P.profile_tables(f"{s3.uri}/a/c.parquet")

def test_command(parts, tmp_path, capsys):
    from yunmin_efficientdata.cli import main
    path = str(parts[0]["training"][0])
    def yunmin(*args):
        try: main(list(args)); code = 0
        except SystemExit as e: code = e.code or 0
        return code, *capsys.readouterr()
    code, out, _ = yunmin("profile", "--sql", "overview"); assert code == 0 and "read_parquet(['parquet_ready/*.parquet'])" in out and out.rstrip().endswith("ORDER BY domain, split;")
    code, out, _ = yunmin("profile", path, "--sql", "overview")
    with duckdb.connect() as db: assert db.execute(out).df().documents.sum() == 180
    code, out, _ = yunmin("profile", "--sql", "list"); assert all(n in out for n in P.QUERIES)
    code, out, _ = yunmin("profile", path, "--only", "overview,lengths", "--out", str(tmp_path/"o")); assert code == 0 and "overview" in out
    assert sorted(p.name for p in (tmp_path/"o").iterdir() if not p.name.startswith(".")) == ["lengths.csv", "overview.csv", "profile.md", "queries.sql"]
    write(tmp_path/"odd.parquet", [{"id": "1", "text": "[/b] [red]가\x1b[31m 나\n", "domain": "[/x]", "source": "[bold]", "lang": "ko", "date": ""}] * 40)
    code, out, _ = yunmin("profile", str(tmp_path/"odd.parquet")); assert code == 0 and "[/b] [red]가" in out and "\x1b[31m" not in out
    for args in (["profile"], ["profile", "--sql", "x"], ["profile", path, "--only", "x"], ["profile", str(tmp_path/"no.parquet")]):
        code, _, err = yunmin(*args); assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
