"""Faults made on purpose; `scripts/run_faults.sh` runs all of them and writes reports/faults.md."""
import json, os, subprocess, sys
from pathlib import Path
import pytest
import faults
from yunmin_efficientdata.core import context, store as store_module
from yunmin_efficientdata.core.ledger import Ledger
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.core.store import MissingKey, open_store


def trials(tmp_path, *args, timeout=3600) -> dict:
    "What `python tests/faults.py` found, in a process of its own: it forks, which this one must not."
    out = tmp_path/"found.json"
    done = subprocess.run([sys.executable, Path(__file__).with_name("faults.py"), *args, "--out", out], capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


# ---------------------------------------------------------------- the ledger and the files disagree
def parts(store, upto=None, did=None):
    def work(stage):
        for p in "abc":
            if stage.done_part(p): continue
            if p == upto: raise KeyboardInterrupt
            store.write(f"out/{p}", p); stage.mark_part(p)
            if did is not None: did.append(p)
        return {"bytes": sum(store.size(f"out/{p}") for p in "abc")}
    return work


def half_done(tmp_path):
    store = open_store(tmp_path); ledger = Ledger(store)
    with pytest.raises(KeyboardInterrupt): ledger.run("s", parts(store, "c"), outputs=["out/"])
    return store, ledger


def test_ledger_ahead_of_the_files_makes_them_again(tmp_path):
    store, ledger = half_done(tmp_path)
    store.delete("out/a"); did = []
    assert ledger.run("s", parts(store, did=did), outputs=["out/"])[0]["counts"] == {"bytes": 3} and did == ["c", "a", "b", "c"]


def test_an_output_that_only_finished_parts_made_is_made_again(tmp_path):
    store = open_store(tmp_path); ledger, did = Ledger(store), []
    def work(stage, upto=None):
        for p in "abc":
            if stage.done_part(p): continue
            if p == upto: raise KeyboardInterrupt
            store.write(f"{p}/x", p); stage.mark_part(p); did.append(p)
        return {}
    with pytest.raises(KeyboardInterrupt): ledger.run("s", lambda stage: work(stage, "c"), outputs=["a/", "c/"])
    store.delete("a/x")
    assert ledger.run("s", work, outputs=["a/", "c/"])[0]["status"] == "done" and did == list("ab" + "c" + "abc")
    with pytest.raises(RuntimeError, match="ended without"): ledger.run("t", lambda stage: {}, outputs=["none"])


def test_a_missing_input_is_not_tried_twice(tmp_path):
    store, tries = open_store(tmp_path), []
    def work(stage): tries.append(1); return store.read("raw/none")
    with pytest.raises(MissingKey): Ledger(store).run("s", work)
    assert len(tries) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"fingerprint": 1}', "\udcff"])
def test_damaged_records_are_no_records(tmp_path, text):
    store, ledger = half_done(tmp_path)
    for key in store.list("ledger/"): (tmp_path/key).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ledger.entries() == [] and ledger.read("s") is None
    did = []
    assert ledger.run("s", parts(store, did=did), outputs=["out/"])[0]["counts"] == {"bytes": 3} and did == list("abc")
    assert store.list("ledger/parts/") == []


def test_spilled_files_stay_until_the_stage_is_recorded(tmp_path, monkeypatch):
    store = open_store(tmp_path); ledger = Ledger(store)
    def work(stage): store.write("spill/1", "x"); stage.discard("spill"); return {}
    def killed(self, name, entry): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Ledger, "_finish", killed)
        with pytest.raises(KeyboardInterrupt): ledger.run("s", work)
    assert store.exists("spill/1") and ledger.read("s")["status"] == "done"
    assert ledger.run("s", work)[1] and not store.exists("spill/1") and ledger.read("s")["discard"] == []


def test_failure_is_the_first_one_when_the_disk_is_full(tmp_path, monkeypatch):
    store = open_store(tmp_path); ledger = Ledger(store)
    def work(stage):
        monkeypatch.setattr(store_module, "_make_temporary", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        store.write("out/a", "a")
    with pytest.raises(UserError, match="out/a: No space left on device; free some space"): ledger.run("s", work)


# ---------------------------------------------------------------- damage on the disk
def test_decayed_model_folder_is_refused_by_name(tmp_path):
    store = open_store(tmp_path)
    with store.output("models/base") as p: p.mkdir(); (p/"model.safetensors").write_bytes(os.urandom(5000)); (p/"config.json").write_text("{}")
    store.fetch("models/base/")
    faults.flip(tmp_path/"models/base/model.safetensors")
    store_module._compared.clear()  # as a new process would
    with pytest.raises(UserError, match=r"models/base/model.safetensors: damaged.*remove the folder models/base"): store.fetch("models/base/")
    (tmp_path/"models/base/model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"): store.fetch("models/base/")


# ---------------------------------------------------------------- the lock
def test_torn_lock_of_a_dead_process(tmp_path):
    store = open_store(tmp_path); (tmp_path/".lock").write_text('{"pid": 1, "ho')
    with context.workspace_lock(store) as held: assert held["pid"] == os.getpid()


def test_lease_trusts_no_clock_of_ours(s3, monkeypatch):
    "A living lease is respected, and a dead one taken, whatever this machine's clock says."
    monkeypatch.setattr(context, "LEASE_SECONDS", 4)
    store = open_store(s3.uri); real = context.time.time
    with context.workspace_lock(store):
        for shift in (86400, -86400):
            monkeypatch.setattr(context.time, "time", lambda: real() + shift)
            other = context._Lease(store); other.holder = other.holder | {"token": "other", "pid": 1}
            with pytest.raises(UserError, match="in use by process"): other.acquire()
    assert not store.exists(".lock")
    store.write(".lock", json.dumps({"pid": 1, "host": "elsewhere", "token": "t", "boot": "b", "beat": 1}))
    monkeypatch.setattr(context.time, "sleep", lambda s: None); monkeypatch.setattr(type(store), "age", lambda self, key: -80_000.)  # the server's clock jumped too
    with context.workspace_lock(store) as held: assert json.loads(store.read(".lock"))["token"] == held["token"]


def test_run_that_lost_its_lease_records_nothing_more(s3, monkeypatch):
    monkeypatch.setattr(context, "LEASE_SECONDS", 0)
    store = open_store(s3.uri)
    store.write(".lock", json.dumps({"pid": 7, "host": "elsewhere", "token": "theirs"}))
    ledger = Ledger(store, context._Guard(store, "ours"))
    with pytest.raises(UserError, match="taken over by process 7 on elsewhere"): ledger.run("s", lambda stage: {})
    assert not store.list("ledger/")


# ---------------------------------------------------------------- S3 through the proxy, a verb at a time
FAST = ("500", "drop", "lost", "truncate", "flip", "flip up", "ExpiredToken")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    "Every verb under every fault, in a process of its own."
    return {(r["verb"], r["fault"]): r for r in trials(tmp_path_factory.mktemp("verbs"), "verbs")["verbs"]}


@pytest.mark.parametrize("fault", faults.PROBES)
def test_no_verb_of_the_store_takes_a_fault_for_a_result(probed, fault):
    rows = [r for r in probed.values() if r["fault"] == fault]
    assert len(rows) == 12 and not [r for r in rows if r["end"] == "traceback"], rows
    if fault in ("ExpiredToken", "skew"): assert all(r["end"] == "refused" and ("credentials" in r["said"] or "access is denied" in r["said"]) for r in rows), rows
    elif fault == "twice": assert {r["verb"] for r in rows if r["end"] != "right"} <= {"put_if_absent", "replace_if"}, rows  # the second of two equal requests finds the first one's object
    else: assert [r for r in rows if r["end"] != "right"] == [], rows


# ---------------------------------------------------------------- whole phases
@pytest.mark.slow
def test_killed_everywhere(tmp_path):
    found = trials(tmp_path, "chain", "--most", "60", timeout=7200)["chain"]
    assert [r["phase"] for r in found] == list(faults.PHASES) and sum(r["kills"] for r in found) >= 250
    assert [r for r in found if r["code"] or r["differs"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ledgers", "machine", "s3"])
def test_phases_1_and_2_under_faults(tmp_path, what):
    found = trials(tmp_path, what, "--phases", "dedup,format")[what]
    assert [r for r in found if r["traceback"] or r["differs"] or not r.get("account", True) or r.get("code") and not r["refused"]] == []
