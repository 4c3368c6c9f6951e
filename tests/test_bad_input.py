"""Bad lines among good ones: each in quarantine with its reason, the good ones processed, the counts add up."""
import json, subprocess, sys
from collections import Counter
from pathlib import Path
import orjson
from yunmin_efficientdata.core.sample import bad_lines, generate
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.dedup.phase import run

LIMIT = 20_000

def quarantined(store): return [orjson.loads(l) for k in store.list("dedup_ready/quarantine/") for l in store.read(k).splitlines()]

def test_200_bad_lines_of_10_kinds(tmp_path):
    bad = list(bad_lines(200, seed=1, limit=LIMIT))
    assert len(bad) == 200 and len({kind for _, kind in bad}) == 10
    good = [orjson.dumps(r) for r, _ in zip(generate(300, seed=3, duplicate_rate=0), range(300))]
    lines = []
    for i in range(300): lines += [good[i]] + ([bad[i][0]] if i < 200 else [])
    (tmp_path/"ws/raw").mkdir(parents=True)
    (tmp_path/"ws/raw/web.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run(str(tmp_path/"ws"), overrides=[f"clean.max_line_bytes={LIMIT}"], workers=1)
    store = open_store(str(tmp_path/"ws"))
    total = json.loads(store.read("dedup_ready/manifest.json"))["total"]
    assert total["read"] == 500 == total["kept"] + sum(total["filtered"].values()) + sum(total["quarantined"].values())
    assert sum(total["quarantined"].values()) == 200
    found = {q["line"]: q["reason"] for q in quarantined(store)}
    wanted = {2 * i + 2: bad[i][1] for i in range(200)}
    assert found.keys() == wanted.keys()
    assert Counter(found.values()) == Counter(wanted.values()) == Counter(total["quarantined"])
    assert found == wanted

def test_a_user_sees_no_traceback(tmp_path):
    (tmp_path/"raw").mkdir()
    (tmp_path/"raw/web.jsonl").write_bytes(b"\n".join(b for b, _ in bad_lines(50, seed=2, limit=LIMIT)))
    done = subprocess.run([Path(sys.executable).with_name("yunmin"), "dedup", tmp_path/"ws", "--raw", tmp_path/"raw"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr
