"""Difference vectors: both forms hold the same numbers, conversions lose what they say, damaged or wrong files never pass, a full disk leaves nothing."""
import json, subprocess, sys, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.dem.vectors import BLOCK, Adapter, ModelVector, Vector, Weights, checksums, cosines, difference, domain_of, manifest_file, open_vector, read_header, to_dense, to_lowrank, truncated, vector_stats


def one_line(error): return "\n" not in str(error.value)


def write_model(folder, tensors, **config):
    Path(folder).mkdir(parents=True); save_file(tensors, Path(folder)/"model.safetensors"); (Path(folder)/"config.json").write_text(json.dumps(config))
    return Path(folder)


def write_adapter(folder, base, keys, r=2, alpha=4, seed=0, dtype="f4"):
    "A LoRA folder in peft's layout, and the differences it stands for."
    rng, tensors, full = np.random.default_rng(seed), {}, {}
    for k in keys:
        rows, columns = base[k].shape; m = k.removesuffix(".weight")
        A, B = rng.normal(0, .1, (r, columns)).astype(dtype), rng.normal(0, .1, (rows, r)).astype(dtype)
        tensors |= {f"base_model.model.{m}.lora_A.weight": A, f"base_model.model.{m}.lora_B.weight": B}; full[k] = (alpha/r*(B.astype("f8") @ A.astype("f8"))).astype("f4")
    folder.mkdir(); save_file(tensors, folder/"adapter_model.safetensors"); (folder/"adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": alpha}))
    return full


@pytest.fixture
def lora(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"model.layers.{i}.{n}.weight": rng.normal(size=s).astype("f4") for i in range(2) for n, s in (("q", (30, 40)), ("up", (50, 20)), ("skip", (9, 9)))} | {"model.norm.weight": np.ones(40, "f4"), "step": np.array([3])}
    write_model(tmp_path/"base", base)
    keys = [k for k in base if "q." in k or "up." in k]
    return tmp_path, base, {d: write_adapter(tmp_path/f"lora_{d}", base, keys, seed=n) for n, d in enumerate(("web", "asm", "main"))}


# -- forms --

def test_low_rank_from_an_adapter_is_exact_and_never_makes_the_dense_one(lora):
    d, base, diffs = lora
    difference(d/"base", d/"lora_web", d/"diff_web.npy"); m = difference(d/"base", d/"lora_web", d/"diff_web.lowrank.npz", form="lowrank")
    a, b = Vector(d/"diff_web.npy"), Vector(d/"diff_web.lowrank.npz")
    assert a.keys() == b.keys() and [a.shape(k) for k in a.keys()] == [b.shape(k) for k in b.keys()] and m["relative_error"] == 0 and m["norm"] == pytest.approx(a.manifest["norm"], rel=1e-9)
    for k in a.keys():
        assert a.changed(k) == b.changed(k) == (k in diffs["web"]) and a.offset(k) == b.offset(k)
        for i, j in ((0, a.size(k)), (3, 50), (40, 41)): np.testing.assert_allclose(a.read(k, i, min(j, a.size(k))), b.read(k, i, min(j, a.size(k))), rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(b.read(k, 0, b.size(k)), diffs["web"].get(k, np.zeros(b.shape(k), "f4")).ravel(), atol=1e-7)
    assert not [f for f in d.iterdir() if f.name.startswith(".")]


def test_conversions(lora):
    d, base, diffs = lora
    difference(d/"base", d/"lora_web", d/"diff_a.lowrank.npz"); to_dense(d/"diff_a.lowrank.npz", d/"diff_b.npy"); back = to_lowrank(d/"diff_b.npy", d/"diff_c.lowrank.npz", rank=2)
    difference(d/"base", d/"lora_web", d/"diff_d.npy")
    assert (d/"diff_b.npy").read_bytes() == (d/"diff_d.npy").read_bytes() and back["relative_error"] < 1e-6 and back["base"] == Vector(d/"diff_a.lowrank.npz").manifest["base"]
    lost = to_lowrank(d/"diff_b.npy", d/"diff_e.lowrank.npz", rank=1)["relative_error"]
    v = Vector(d/"diff_e.lowrank.npz"); x, y = np.load(d/"diff_b.npy"), np.concatenate([v.read(k, 0, v.size(k)) for k in v.keys()])
    assert .1 < lost < 1 and lost == pytest.approx(np.linalg.norm(x - y)/np.linalg.norm(x), rel=1e-5)
    for bad in (lambda: to_dense(d/"diff_b.npy", d/"diff_x.npy"), lambda: to_lowrank(d/"diff_b.npy", d/"diff_x.npy"), lambda: difference(d/"base", d/"lora_web", d/"diff_x.npy", form="lowrank"), lambda: difference(d/"base", d/"lora_web", d/"diff.bin")):
        with pytest.raises(UserError, match="ends in") as e: bad()
        assert one_line(e)


def test_same_bytes_every_time(lora):
    d, *_ = lora
    for name in ("diff_a.npy", "diff_a.lowrank.npz"):
        one = difference(d/"base", d/"lora_web", d/name) and (d/name).read_bytes(), manifest_file(d/name).read_bytes()
        two = difference(d/"base", d/"lora_web", d/name) and (d/name).read_bytes(), manifest_file(d/name).read_bytes()
        assert one == two
    with zipfile.ZipFile(d/"diff_a.lowrank.npz") as z: assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)} and z.testzip() is None
    np.load(d/"diff_a.lowrank.npz", allow_pickle=False)["model.layers.0.q.weight.left"]


def test_truncated_svd_of_a_full_model_with_vectors_and_convolutions(tmp_path):
    rng = np.random.default_rng(0); shapes = {"conv.w": (24, 1, 4), "mix.w": (16, 8, 6), "norm.w": (33,), "big.w": (90, 70), "scalar": ()}
    base = {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}; write_model(tmp_path/"b", base)
    write_model(tmp_path/"x", {k: np.asarray(v + rng.normal(0, .1, v.shape), "f4") for k, v in base.items()})
    difference(tmp_path/"b", tmp_path/"x", tmp_path/"diff_f.npy"); m = difference(tmp_path/"b", tmp_path/"x", tmp_path/"diff_f.lowrank.npz", rank=5)
    a, b = Vector(tmp_path/"diff_f.npy"), Vector(tmp_path/"diff_f.lowrank.npz")
    assert {k for k, t in m["tensors"].items() if "rank" in t} == {"big.w", "mix.w"} and 0 < m["relative_error"] < 1
    for k in ("conv.w", "norm.w", "scalar"): np.testing.assert_array_equal(a.read(k, 0, a.size(k)), b.read(k, 0, b.size(k)))
    x = a.read("big.w", 0, 6300).reshape(90, 70); u, s, v = np.linalg.svd(x); best = (u[:, :5]*s[:5]) @ v[:5]
    np.testing.assert_allclose(b.read("big.w", 0, 6300).reshape(90, 70), best, atol=1e-5)
    left, right = truncated(a, "big.w", 5, chunk=500)
    assert np.linalg.norm(x - left @ right) < 1.02*np.linalg.norm(x - best)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_differences_of_every_type(tmp_path, dtype):
    from safetensors.torch import save_file as save
    torch.manual_seed(0); w = torch.randn(40, 30).to(dtype); y = (w.double() + 1e-3*torch.randn(40, 30).double()).to(dtype)
    for n, x in (("b", w), ("x", y)): (tmp_path/n).mkdir(); save({"w": x}, tmp_path/n/"model.safetensors")
    difference(tmp_path/"b", tmp_path/"x", tmp_path/"diff_x.npy", chunk=77)
    want = (y.double() - w.double()).float().numpy().ravel()
    np.testing.assert_array_equal(np.load(tmp_path/"diff_x.npy"), want)
    m = ModelVector(tmp_path/"x", Weights(tmp_path/"b")); np.testing.assert_array_equal(m.read("w", 5, 900), want[5:900])


def test_everything_that_holds_a_difference_opens(lora):
    d, base, diffs = lora; weights = Weights(d/"base"); difference(d/"base", d/"lora_web", d/"diff_web.npy")
    write_model(d/"full", {k: x + diffs["web"].get(k, 0).astype(x.dtype) if k in diffs["web"] else x for k, x in base.items()})
    found = [open_vector(d/n, weights) for n in ("diff_web.npy", "lora_web", "full")]
    assert [type(v) for v in found] == [Vector, Adapter, ModelVector]
    for k in found[0].keys():
        for v in found[1:]: assert v.offset(k) == found[0].offset(k); np.testing.assert_allclose(v.read(k, 2, 9), found[0].read(k, 2, 9), atol=3e-7)
    assert [domain_of(n) for n in ("diff_web.npy", "a/diff_web.lowrank.npz", "checkpoints/lora_web", "/x/my.model")] == ["web", "web", "web", "my.model"]
    with pytest.raises(UserError, match="no such difference"): open_vector(d/"nothing.npy", weights)
    with pytest.raises(UserError, match=".npy or a .lowrank.npz"): open_vector(d/"base"/"config.json", weights)


# -- statistics --

def test_statistics_agree_with_numpy_on_both_forms(lora):
    d, base, diffs = lora
    for n in diffs: difference(d/"base", d/f"lora_{n}", d/f"diff_{n}.npy"); difference(d/"base", d/f"lora_{n}", d/f"diff_{n}.lowrank.npz")
    flat = np.load(d/"diff_web.npy").astype("f8"); part = np.concatenate([x.ravel() for x in diffs["web"].values()]).astype("f8")
    for name, chunk in (("diff_web.npy", 11), ("diff_web.npy", 1 << 20), ("diff_web.lowrank.npz", 77)):
        s = vector_stats(d/name, d/"base", chunk=chunk); p = s["changed"]
        for got, x in ((s, flat), (p, part)):
            z = (x - x.mean())/x.std()
            assert got["mean"] == pytest.approx(x.mean(), rel=1e-5) and got["variance"] == pytest.approx(x.var(), rel=1e-6) and got["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-6)
            assert got["share_beyond_3sigma"] == pytest.approx((abs(z) > 3).mean(), abs=1/len(x)) and got["excess_kurtosis"] == pytest.approx((z**4).mean() - 3, rel=1e-5)
        counts = np.histogram(np.clip((part - part.mean())/part.std(), -6, 6), np.linspace(-6, 6, 121))[0]
        assert sum(p["histogram"]) == len(part) and abs(np.array(p["histogram"]) - counts).sum() <= 4
        assert s["relative_norm"] == pytest.approx(np.linalg.norm(part)/np.sqrt(sum((base[k].astype("f8")**2).sum() for k in diffs["web"])), rel=1e-6)
        assert s["layer_norms"]["layer 1"] == pytest.approx(np.sqrt(sum((x.astype("f8")**2).sum() for k, x in diffs["web"].items() if ".1." in k)), rel=1e-6)
    all_ = np.stack([np.load(d/f"diff_{n}.npy").astype("f8") for n in diffs]); want = all_ @ all_.T/np.outer(*[np.linalg.norm(all_, axis=1)]*2)
    for ends in ([".npy"]*3, [".lowrank.npz"]*3, [".npy", ".lowrank.npz", ".npy"]): np.testing.assert_allclose(cosines({n: d/f"diff_{n}{e}" for n, e in zip(diffs, ends)}, chunk=19), want, atol=1e-6)


def test_norm_one_on_both_forms(lora):
    d, *_ = lora
    for name in ("diff_n.npy", "diff_n.lowrank.npz"):
        m = difference(d/"base", d/"lora_web", d/name, normalize=True); s = vector_stats(d/name)
        assert m["normalized"] and m["norm"] > 1.1 and s["norm"] == pytest.approx(1, abs=1e-6)
    assert to_dense(d/"diff_n.lowrank.npz", d/"diff_m.npy")["normalized"]
    with pytest.raises(UserError, match="zeros cannot be scaled"): difference(d/"base", d/"base", d/"diff_z.npy", normalize=True)
    assert not (d/"diff_z.npy").exists() and not (d/"diff_z.json").exists()


def test_thresholds_of_the_sanity_checks(lora):
    d, *_ = lora; difference(d/"base", d/"lora_web", d/"diff_a.npy")
    loose = vector_stats(d/"diff_a.npy", d/"base", 1e9, 1e9, max_tail=1., max_mean=1e9)["sanity"]; tight = vector_stats(d/"diff_a.npy", d/"base", 1e-9, 1e-9, max_tail=1e-9, max_mean=1e-9)["sanity"]
    assert all(r["ok"] for r in loose.values()) and {k for k, r in tight.items() if not r["ok"]} == {"norm", "relative_norm", "share_beyond_3sigma", "mean_over_sigma"}


# -- faults --

def test_a_flipped_byte_is_found_and_its_tensor_named(lora):
    d, *_ = lora
    for name in ("diff_a.npy", "diff_a.lowrank.npz"):
        difference(d/"base", d/"lora_web", d/name); whole, rng = (d/name).read_bytes(), np.random.default_rng(0); found = 0
        for at in rng.integers(0, len(whole), 60):
            (d/name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1:])
            try: v = Vector(d/name); got = {k: v.read(k, 0, v.size(k)) for k in v.keys()}
            except UserError as e: found += 1; assert name in str(e) and "\n" not in str(e); continue
            (d/name).write_bytes(whole); w = Vector(d/name); assert all(np.array_equal(got[k], w.read(k, 0, w.size(k))) for k in got)
        assert found >= 40
        (d/name).write_bytes(whole)


def test_files_that_are_no_vectors(lora):
    d, *_ = lora; a, low = d/"diff_a.npy", d/"diff_a.lowrank.npz"
    difference(d/"base", d/"lora_web", a); difference(d/"base", d/"lora_web", low)
    def case(file, match, data=None, **manifest):
        saved, m = file.read_bytes(), manifest_file(file).read_text()
        if data is not None: file.write_bytes(data)
        if manifest: manifest_file(file).write_text(manifest.get("text") or json.dumps({k: v for k, v in json.loads(m).items() if k != "check"} | manifest))
        with pytest.raises(UserError, match=match) as e: v = Vector(file); [v.read(k, 0, v.size(k)) for k in v.keys()]
        assert one_line(e); file.write_bytes(saved); manifest_file(file).write_text(m)
    import io
    pickled = io.BytesIO(); np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (b"", b"junk", a.read_bytes()[:50], pickled.getvalue()): case(a, "not readable", data)
    for data in (b"", b"junk", low.read_bytes()[:-30]): case(low, "not readable|not a .npz", data)
    case(low, "not a .npz", a.read_bytes()); case(a, "cut off", a.read_bytes()[:-4])
    for file in (a, low):
        case(file, "json: not readable", text="{"); case(file, "holds list", text="[]"); case(file, "its own checksum", check="0"*16); case(file, "not readable as a manifest", tensors={"w": {}})
        case(file, "outside", tensors={"w": {"shape": [9, 9], "offset": 10**6}}); case(file, "outside", tensors={"w": {"shape": [-1], "offset": 0}})
    case(a, "describes a lowrank", format="lowrank"); case(low, "holds no factors of other", tensors={"other": {"shape": [2, 2], "offset": 0}}); case(a, "its manifest says 7", elements=7, tensors={})
    t = json.loads(manifest_file(low).read_text())["tensors"]; t["model.layers.0.q.weight"]["shape"] = [40, 30]; case(low, r"which is not \[40, 30\]", tensors=t)
    manifest_file(a).unlink()
    with pytest.raises(UserError, match="manifest of diff_a.npy is missing"): Vector(a)


def test_mismatches_and_nan_leave_no_file(tmp_path):
    write_model(tmp_path/"base", {"w": np.ones((2, 3), "f4"), "only_base": np.ones(2, "f4")})
    write_model(tmp_path/"x", {"w": np.full((2, 3), 2, "f4"), "only_x": np.ones(2, "f4")}); write_model(tmp_path/"y", {"w": np.ones((3, 2), "f4")}); write_model(tmp_path/"z", {"v": np.ones((3, 2), "f4")})
    write_model(tmp_path/"n", {"w": np.array([[1, np.nan, 1], [1, 1, 1]], "f4")}); write_model(tmp_path/"i", {"w": np.array([[1, np.inf, 1], [1, 1, 1]], "f4")})
    assert difference(tmp_path/"base", tmp_path/"x", tmp_path/"diff_x.npy")["left_out"] == ["only_base", "only_x"]
    for name, match in (("y", r"y/model.safetensors: w is \[3, 2\]"), ("z", "shares no tensor"), ("n", "w holds NaN"), ("i", "w holds NaN or infinity"), ("gone", "no such folder")):
        for end in (".npy", ".lowrank.npz"):
            with pytest.raises(UserError, match=match) as e: difference(tmp_path/"base", tmp_path/name, tmp_path/f"diff_{name}{end}")
            assert one_line(e) and not [f for f in tmp_path.iterdir() if f"diff_{name}" in f.name]


def test_index_that_names_a_tensor_its_shard_does_not_hold(tmp_path):
    write_model(tmp_path/"m", {"w": np.ones(2, "f4")}); (tmp_path/"m"/"model.safetensors").rename(tmp_path/"m"/"model-1.safetensors")
    (tmp_path/"m"/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors", "lost": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="model-1.safetensors: lost is not in this shard") as e: Weights(tmp_path/"m")
    (tmp_path/"p").mkdir(); (tmp_path/"p"/"pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="convert pytorch_model.bin"): Weights(tmp_path/"p")
    assert one_line(e)


@pytest.mark.parametrize("header", [b"", b"\x05", b"\xff"*8, (10).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"[1,2", (2).to_bytes(8, "little") + b"[]"])
def test_headers_of_any_kind(tmp_path, header):
    (tmp_path/"model.safetensors").write_bytes(header)
    with pytest.raises(UserError, match="model.safetensors") as e: read_header(tmp_path/"model.safetensors")
    assert one_line(e)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from yunmin_efficientdata.core.settings import UserError
from yunmin_efficientdata.dem.vectors import difference
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),)*2); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try: difference(*map(Path, sys.argv[1:4]))
except UserError as e: print(e); sys.exit(2)
"""

def test_a_disk_that_ends_is_one_line_and_leaves_nothing(lora):
    "RLIMIT_FSIZE ends a write as a full disk does."
    d, *_ = lora
    for name in ("diff_a.npy", "diff_a.lowrank.npz"):
        p = subprocess.run([sys.executable, "-c", LIMITED, str(d/"base"), str(d/"lora_web"), str(d/name), "3000"], capture_output=True, text=True)
        assert p.returncode == 2 and "larger than files may be" in p.stdout and p.stdout.count("\n") == 1 and not [f for f in d.iterdir() if "diff_a" in f.name], p.stderr


def test_checksums_are_by_block():
    x = np.arange(2*BLOCK + 5, dtype="f4"); s = checksums(x)
    assert len(s) == 48 and s[16:32] == checksums(x[BLOCK:2*BLOCK])
