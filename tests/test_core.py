"""Settings, ledger, executor and locks: the edge cases."""
import os, signal, subprocess, sys, textwrap
import pytest
from yunmin_efficientdata.core.settings import UserError, describe, load_settings
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.core.ledger import Ledger, digest, fingerprint
from yunmin_efficientdata.core.executor import LocalExecutor, make_executor
from yunmin_efficientdata.core.context import open_phase, workspace_lock

MISTAKES = [("dataset_config.yaml", "dedup:\n  bandz: 3", "dedup.bandz: unknown key; did you mean 'bands'?"),
            ("dataset_config.yaml", "dedupe:\n  bands: 3", "dedupe: unknown key; did you mean 'dedup'?"),
            ("dem_config.yaml", "lora:\n  r: none", "lora.r: "),
            ("dem_config.yaml", "lora: 3", "lora: "),
            ("evaluation_config.yaml", "- 1\n- 2", "expected keys and values"),
            ("dataset_config.yaml", "a: b: c", "not readable as YAML"),
            ("dataset_config.yaml", b"\xff\xfe\x00", "not readable as YAML")]

@pytest.mark.parametrize("name,text,expected", MISTAKES)
def test_config_mistakes_are_one_line(tmp_path, name, text, expected):
    (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e: load_settings(str(tmp_path))
    assert expected in str(e.value) and name in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("text", ["dedup", "=3", "a..b=1", "dedup.threshold=2", "dedup.threshold.x=1", "nothing=1", "dedup=["])
def test_bad_overrides(text):
    with pytest.raises(UserError) as e: load_settings("configs/demo", [text])
    assert "--set" in str(e.value)

@pytest.mark.parametrize("config", ["configs/demo", "configs/yunmin-3b"])
def test_shipped_configs_load(config): assert load_settings(config).config_dir.endswith(config)

def test_missing_config_folder():
    with pytest.raises(UserError, match="configs/demo"): load_settings("configs/nothing")

def test_every_setting_is_documented_or_obvious():
    rows = describe()
    assert len({k for k, _, _ in rows}) == len(rows) > 50

def test_fingerprint_covers_inputs_settings_code_and_upstream(tmp_path):
    store = open_store(str(tmp_path)); store.write("in.txt", "a")
    one = fingerprint(store, "s", {"a": 1}, ["in.txt"])
    assert one == fingerprint(store, "s", {"a": 1}, ["in.txt"])
    assert one != fingerprint(store, "s", {"a": 2}, ["in.txt"])
    assert one != fingerprint(store, "s", {"a": 1}, ["in.txt"], code=["core.store"])
    up = fingerprint(store, "s", {"a": 1}, ["in.txt"], after=["up"])
    Ledger(store).run("up", lambda s: {}, settings=1)
    assert up != fingerprint(store, "s", {"a": 1}, ["in.txt"], after=["up"])
    store.write("in.txt", "bb")
    assert one != fingerprint(store, "s", {"a": 1}, ["in.txt"])

def test_stage_without_its_output_fails(tmp_path):
    ledger = Ledger(open_store(str(tmp_path)))
    with pytest.raises(RuntimeError, match="without one of its outputs"): ledger.run("s", lambda s: {}, outputs=["x.txt"])
    assert ledger.read("s")["status"] == "failed"

def test_parts_of_another_fingerprint_are_dropped(tmp_path):
    ledger = Ledger(open_store(str(tmp_path)))
    def work(stage):
        stage.mark_part("a", 1)
        raise RuntimeError("killed")
    with pytest.raises(RuntimeError): ledger.run("s", work, settings=1)
    seen = []
    ledger.run("s", lambda s: seen.append(dict(s.parts)) or {}, settings=2)
    assert seen == [{}]

def test_damaged_ledger_entry_is_not_trusted(tmp_path):
    store = open_store(str(tmp_path)); ledger = Ledger(store); did = []
    ledger.run("s", lambda s: did.append(1) or {})
    store.write("ledger/s.json", "{")
    ledger.run("s", lambda s: did.append(1) or {})
    assert did == [1, 1]

def test_executor_keeps_order_and_raises():
    with LocalExecutor(2) as ex:
        assert list(ex.map(digest, range(20))) == [digest(i) for i in range(20)]
        with pytest.raises(ZeroDivisionError): list(ex.map(divmod_zero, [1, 2, 3]))
        assert list(ex.map(digest, [])) == []

def divmod_zero(n): return 1 // (n - n)

def die_once(path):
    if not os.path.exists(path):
        open(path, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
    return path

def test_killed_worker_is_retried(tmp_path):
    with LocalExecutor(2) as ex: assert list(ex.map(die_once, [str(tmp_path/"a"), str(tmp_path/"b")])) == [str(tmp_path/"a"), str(tmp_path/"b")]

def test_worker_costs_are_counted():
    from yunmin_efficientdata.core.ledger import Meter
    with LocalExecutor(2) as ex, Meter() as m:
        ex.meter = m
        list(ex.map(burn, [300_000] * 4))
    assert m.extra_cpu > 0.01 and m.worker_peak > 10

def burn(n): return sum(i * i for i in range(n))

def test_executor_choice():
    with pytest.raises(UserError, match="spark"): make_executor("spark")
    with pytest.raises(UserError, match="--workers"): make_executor("local", -1)

HOLD = textwrap.dedent("""
    import sys, time
    from yunmin_efficientdata.core.context import workspace_lock
    from yunmin_efficientdata.core.store import open_store
    with workspace_lock(open_store(sys.argv[1])):
        print("held", flush=True); time.sleep(60)
""")

def hold(uri):
    p = subprocess.Popen([sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n"
    return p

def test_second_run_is_refused_and_a_dead_one_frees_the_lock(tmp_path):
    p = hold(str(tmp_path))
    try:
        with pytest.raises(UserError, match=f"in use by process {p.pid}"):
            with workspace_lock(open_store(str(tmp_path))): pass
    finally: p.kill(); p.wait()
    with workspace_lock(open_store(str(tmp_path))): pass

def test_s3_lease(s3):
    uri = f"{s3.uri}/ws"
    p = hold(uri)
    try:
        with pytest.raises(UserError, match=f"in use by process {p.pid}"):
            with workspace_lock(open_store(uri)): pass
    finally: p.kill(); p.wait()
    with workspace_lock(open_store(uri)) as holder: assert holder["pid"] == os.getpid()
    assert not open_store(uri).exists(".lock")

def test_phase_inside_a_run_shares_its_lock(tmp_path, monkeypatch):
    with workspace_lock(open_store(str(tmp_path))) as holder:
        with pytest.raises(UserError, match="in use"):
            with open_phase("demo", str(tmp_path)): pass
        monkeypatch.setenv("YUNMIN_LOCK_TOKEN", holder["token"])
        with open_phase("demo", str(tmp_path)) as ctx: ctx.log("inside")
    assert "inside" in (tmp_path/"pipeline_run.log").read_text()

def test_errors_of_a_phase_are_logged(tmp_path):
    with pytest.raises(ValueError):
        with open_phase("demo", str(tmp_path)): raise ValueError("broken page 7")
    text = (tmp_path/"pipeline_errors.log").read_text()
    assert "broken page 7" in text and "Traceback" in text
