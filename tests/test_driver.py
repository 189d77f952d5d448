"""Module.run, targets, save and load, machines that lack something, threads."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper, parser

import opferry
from opferry.driver import target as targets
from opferry.runtime import cpu, manifest, quiet
from opferry.runtime import module as runtime_module
from opferry.runtime import threads as thread_pool
from opferry.runtime.errors import (
    ArtifactError,
    InvalidInputError,
    InvalidInputTypeError,
    OpferryError,
    UnsupportedError,
)

HEAD = '<ir_version: 9, opset_import: ["": 17]>'
X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def model(text):
    return parser.parse_model(HEAD + text)


@pytest.fixture(scope="module")
def module():
    return opferry.compile(
        model(
            """g (float[b,3] x, float[b,3] z) => (float[b,3] y, float[b,3] n) {
                y = Add(x, z) n = Neg(x) }"""
        )
    )


@pytest.fixture(scope="module")
def saved(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "module"
    module.save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A saved module that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# Arrays in and out


class OnlyDLPack:
    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class OnlyArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("wrap", [np.asarray, OnlyDLPack, OnlyArray, memoryview])
def test_run_takes_whatever_is_an_array(module, wrap):
    got = module.run({"x": wrap(X), "z": wrap(2 * X)})
    np.testing.assert_array_equal(got["y"], 3 * X)
    np.testing.assert_array_equal(got["n"], -X)


@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(X),
        np.repeat(X, 2, axis=1)[:, ::2],
        X[::-1][::-1],
        np.broadcast_to(X[0], (2, 3)),
        X.astype(">f4"),
    ],
    ids=["column-major", "strided", "reversed", "broadcast", "big-endian"],
)
def test_any_memory_layout(module, x):
    np.testing.assert_array_equal(module.run({"x": x, "z": x})["y"], 2 * x.astype(np.float32))


def aligned(x, offset=0):
    """A copy of ``x`` that begins ``offset`` bytes after a multiple of 64."""
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    y = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("dtype", ["int8", "bool", "bfloat16"])
def test_memory_that_compiled_code_can_read_is_not_copied(offset, dtype):
    module = opferry.compile(model(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Identity(x) }}"))
    x = aligned(np.array([0, 1, 1, 0]).astype(dtype), offset)
    tensor = module._on_device(x, share=True)
    before = x.copy()
    x[0] = 1
    is_copied = bool(offset) or dtype == "bfloat16"  # NumPy's DLPack has no bfloat16
    np.testing.assert_array_equal(tensor.numpy(), before if is_copied else x)
    for device_outputs in (False, True):
        got = module.run({"x": x}, device_outputs=device_outputs)["y"]
        x[1] = 0
        assert (got.numpy() if device_outputs else got)[1] == 1
        x[1] = 1


def test_a_read_only_array_stays_as_it_is(module):
    x = X.copy()
    x.flags.writeable = False
    module.run({"x": x, "z": x})
    np.testing.assert_array_equal(x, X)


def test_a_result_does_not_change_with_the_next_call(module):
    first = module.run({"x": X, "z": X})["y"]
    module.run({"x": 5 * X, "z": X})
    np.testing.assert_array_equal(first, 2 * X)


@pytest.mark.parametrize("outputs", ["y", "y, float[9] z, float[9] u"])
def test_reshaped_results_are_not_copied_in_the_graph(outputs, tmp_path):
    text = f"""g (float[3,3] x) => (float[9] {outputs}) <int64[1] s = {{9}}> {{
        a = MatMul(x, x) b = MatMul(a, x) c = MatMul(b, x)
        y = Reshape(a, s) z = Reshape(c, s) u = Reshape(x, s) }}"""
    module = opferry.compile(model(text), dump_ir=tmp_path)
    assert "T_reshape" not in (tmp_path / "lower.py").read_text()
    x = np.arange(9, dtype=np.float32).reshape(3, 3) - 4
    found = module.run({"x": x})
    assert not any(np.shares_memory(value, x) for value in found.values())
    expected = {"y": x @ x, "z": x @ x @ x @ x, "u": x}
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name].ravel())


@pytest.mark.parametrize(
    "name",
    [
        "bool",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    ],
)
def test_every_element_type_comes_back(name):
    code = {
        "bool": 9,
        "int8": 3,
        "uint8": 2,
        "int16": 5,
        "uint16": 4,
        "int32": 6,
        "uint32": 12,
        "int64": 7,
        "uint64": 13,
        "float16": 10,
        "bfloat16": 16,
        "float32": 1,
        "float64": 11,
    }[name]
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    graph = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        "g",
        [helper.make_tensor_value_info("x", code, ["n"])],
        [helper.make_tensor_value_info("y", code, ["m"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = np.array([1, 0, 1]).astype(dtype)
    y = opferry.compile(proto).run({"x": x})["y"]
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.concatenate([x, x]))


def test_bfloat16_through_dlpack():
    text = "g (bfloat16[n] x) => (bfloat16[n] y) { y = Neg(x) }"
    x = np.array([1, 2.5], ml_dtypes.bfloat16)
    y = opferry.compile(model(text)).run({"x": OnlyDLPack(tvm.runtime.tensor(x))})["y"]
    np.testing.assert_array_equal(y, -x)


def test_a_scalar_and_no_inputs_at_all():
    got = opferry.compile(model("g (float x) => (float y) { y = Neg(x) }")).run(
        {"x": np.float32(3)}
    )
    assert got["y"].shape == ()
    assert got["y"] == -3
    constant = "g () => (float[2] y) <float[2] k = {1, 2}> { y = Identity(k) }"
    np.testing.assert_array_equal(opferry.compile(model(constant)).run({})["y"], [1, 2])


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (
            {"x": X},
            InvalidInputError,
            r"inputs: found missing \['z'\], allowed exactly \['x', 'z'\]",
        ),
        ({"x": X, "z": X, "q": X}, InvalidInputError, r"found unknown \['q'\]"),
        ([X, X], InvalidInputTypeError, "inputs: found list, allowed a mapping"),
        (
            {"x": X, "z": X.astype("f8")},
            InvalidInputTypeError,
            '"z": found dtype float64, allowed float32',
        ),
        (
            {"x": X, "z": X[0]},
            InvalidInputError,
            r'"z": found shape \(3,\), allowed 2 dimensions \(b, 3\)',
        ),
        (
            {"x": X[:, :2], "z": X},
            InvalidInputError,
            r'"x": found shape \(2, 2\), allowed \(b, 3\)',
        ),
        (
            {"x": X, "z": X[:1]},
            InvalidInputError,
            '"z": found b = 1 on axis 0, allowed 2, as in input "x"',
        ),
        ({"x": X[:0], "z": X[:0]}, InvalidInputError, r'"x": found shape \(0, 3\).*no size 0'),
        ({"x": X, "z": "text"}, InvalidInputTypeError, '"z": found dtype str'),
        ({"x": X, "z": None}, InvalidInputTypeError, '"z": found dtype object'),
        ({"x": X, "z": [[1, 2], [3]]}, InvalidInputTypeError, '"z": found list, allowed an array'),
    ],
    ids=[
        "missing",
        "unknown",
        "list",
        "dtype",
        "rank",
        "fixed",
        "symbol",
        "empty",
        "str",
        "None",
        "ragged",
    ],
)
def test_wrong_inputs_are_refused(module, inputs, kind, message):
    with pytest.raises(kind, match=message):
        module.run(inputs)


def test_dtype_errors_are_type_errors(module):
    with pytest.raises(TypeError):
        module.run({"x": X, "z": X.astype(int)})


def test_an_object_that_breaks_its_own_protocol(module):
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise KeyError("inside")

    with pytest.raises(InvalidInputTypeError, match='"z": found Broken, allowed an array'):
        module.run({"x": X, "z": Broken()})


def test_values_computed_in_the_graph_are_checked_by_the_kernel():
    """Sequence ends one too large: no check before the call can see them."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["q"], ["t"], start=0, end=1),
        helper.make_node("Add", ["t", "extra"], ["ends"]),
        helper.make_node(
            "SpeedFusionAttention",
            ["q", "q", "q", "", "", "", "", "ends", "ends"],
            ["y"],
            name="attention",
            domain="mindspore",
            head_num=1,
            input_layout="TND",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("q", TensorProto.FLOAT, ["T", 1, 4]), value("extra", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, ["T", 1, 4])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mindspore", 1)]
    module = opferry.compile(helper.make_model(graph, opset_imports=imports, ir_version=9))
    q = np.ones((3, 1, 4), np.float32)
    np.testing.assert_allclose(module.run({"q": q, "extra": np.array([0])})["y"], q, rtol=1e-6)
    with pytest.raises(InvalidInputError, match="actual_seq"):
        module.run({"q": q, "extra": np.array([1])})
    np.testing.assert_allclose(module.run({"q": q, "extra": np.array([0])})["y"], q, rtol=1e-6)


def test_repr_shows_the_signature(module):
    assert repr(module) == (
        "<opferry.Module (x: float32[b, 3], z: float32[b, 3]) -> "
        "(y: float32[b, 3], n: float32[b, 3])>"
    )


# Targets


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_short_names_resolve(name):
    assert targets.resolve(name).kind.name == "llvm"
    assert targets.architecture(targets.resolve(name)) == "x86_64"


def test_a_target_in_tvms_own_forms():
    record = {"kind": "llvm", "mcpu": "haswell"}
    for given in (record, json.dumps(record), tvm.target.Target(record)):
        assert targets.resolve(given).attrs["mcpu"] == "haswell"


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("nope", OpferryError, "target: found 'nope', allowed 'llvm', .*x86-avx2"),
        ({"kind": "llvm", "mcpu": "zzz"}, OpferryError, "found mcpu 'zzz'"),
        ({"kind": "llvm", "mtriple": "bogus-x"}, OpferryError, "found mtriple 'bogus-x'"),
        ({"kind": "llvm", "mattr": ["+zzz"]}, OpferryError, r"found mattr '\+zzz'"),
        ({"kind": "llvm", "mattr": ["avx2"]}, OpferryError, "found mattr 'avx2'"),
        ({"kind": "llvm", "jit": "zzz"}, OpferryError, "target: found .*zzz"),
        ({"mcpu": "haswell"}, OpferryError, "target: found"),
        ("{broken", OpferryError, "target: found"),
        (7, OpferryError, "target: found 7"),
        ({"kind": "c"}, UnsupportedError, "found kind 'c', allowed llvm"),
    ],
    ids=str,
)
def test_wrong_targets_are_refused(target, kind, message):
    with pytest.raises(kind, match=message):
        targets.resolve(target)


@pytest.mark.parametrize(
    ("triple", "name"),
    [("arm64-apple-macos", "aarch64"), ("aarch64-linux-gnu", "aarch64"), ("amd64-linux", "x86_64")],
)
def test_architectures_go_by_one_name(triple, name):
    target = targets.resolve({"kind": "llvm", "mtriple": triple})
    assert targets.architecture(target) == name


def test_required_features_grow_with_the_target():
    features = [
        set(targets.required_features(targets.resolve(name)))
        for name in ("x86-64", "x86-avx2", "x86-avx512", "x86-avx512vnni", "x86-avx512bf16")
    ]
    features.append(set(targets.required_features(targets.resolve("x86-amx"))))
    for smaller, larger in itertools.pairwise(features):
        assert smaller < larger
    assert "avx512vnni" in features[3] - features[2]
    assert {"amx-tile", "amx-int8"} <= features[5] - features[4]


def test_the_host_is_what_this_cpu_can_do():
    here = cpu.features()
    if here is None:
        pytest.skip("this system does not tell its CPU's features")
    assert set(targets.required_features(targets.host())) == here


def test_what_a_hypervisor_hides_is_not_used(monkeypatch):
    full = targets.required_features(targets.host())
    if not full:
        pytest.skip("no features known of this CPU")
    monkeypatch.setattr(cpu, "features", lambda: frozenset(full) - {full[-1]})
    assert full[-1] not in targets.required_features(targets.host())


# Save and load


def test_a_saved_module_computes_the_same(module, saved):
    loaded = opferry.load(saved)
    assert sorted(file.name for file in saved.iterdir()) == ["manifest.json", "module.so"]
    assert dataclasses.replace(loaded.manifest, files={}) == module.manifest
    feeds = {"x": X, "z": X + 1}
    for name, value in module.run(feeds).items():
        np.testing.assert_array_equal(loaded.run(feeds)[name], value)


def test_the_manifest_tells_what_a_caller_needs(saved):
    data = json.loads((saved / "manifest.json").read_text())
    assert data["inputs"] == [
        {"name": name, "dtype": "float32", "shape": ["b", 3]} for name in ("x", "z")
    ]
    assert [entry["name"] for entry in data["outputs"]] == ["y", "n"]
    assert data["target"]["kind"] == "llvm"
    assert data["versions"].keys() == {"opferry", "apache-tvm", "apache-tvm-ffi"}
    assert data["files"].keys() == {"module.so"}


def test_a_loaded_module_can_be_saved_again(saved, tmp_path):
    opferry.load(saved).save(tmp_path / "again")
    again = opferry.load(tmp_path / "again")
    np.testing.assert_array_equal(again.run({"x": X, "z": X})["y"], 2 * X)


def test_saving_and_loading_is_quiet(module, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.save(tmp_path / "quiet")
        opferry.load(tmp_path / "quiet").run({"x": X, "z": X})
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_save_replaces_an_older_module_and_fills_an_empty_folder(module, tmp_path):
    folder = tmp_path / "deep" / "module"
    module.save(folder)
    (folder / "stray").write_text("of the old one")
    module.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "module.so"]
    (tmp_path / "empty").mkdir()
    module.save(tmp_path / "empty")
    opferry.load(tmp_path / "empty")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["deep", "empty"]
    assert [file.name for file in folder.parent.iterdir()] == ["module"]


def test_save_keeps_off_what_is_no_module(module, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target in (tmp_path, tmp_path / "precious.txt", tmp_path / "dangling"):
        with pytest.raises(ArtifactError, match="found something that is no saved module"):
            module.save(target)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_save_follows_a_link_to_an_older_module(module, tmp_path):
    module.save(tmp_path / "v1")
    (tmp_path / "v1" / "stray").write_text("of the old one")
    (tmp_path / "current").symlink_to("v1")
    module.save(tmp_path / "current")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["current", "v1"]
    assert (tmp_path / "current").is_symlink()
    assert sorted(file.name for file in (tmp_path / "v1").iterdir()) == [
        "manifest.json",
        "module.so",
    ]


def test_the_folders_mode_follows_the_umask(module, tmp_path):
    old = os.umask(0o027)
    try:
        module.save(tmp_path / "module")
    finally:
        os.umask(old)
    assert (tmp_path / "module").stat().st_mode & 0o777 == 0o750


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize(
    ("step", "error", "raised"),
    [
        ("export", OSError(28, "No space left on device"), ArtifactError),
        ("manifest", OSError(28, "No space left on device"), ArtifactError),
        ("rename", OSError(13, "Permission denied"), ArtifactError),
        ("export", Interrupt(), Interrupt),
        ("manifest", Interrupt(), Interrupt),
    ],
    ids=[
        "full disk, library",
        "full disk, manifest",
        "rename",
        "killed, library",
        "killed, manifest",
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
def test_a_failing_save_leaves_everything_as_it_was(
    module, saved, tmp_path, monkeypatch, step, error, raised, before
):
    target = tmp_path / "module"
    if before:
        opferry.load(saved).save(target)
    earlier = {f.name: f.read_bytes() for f in target.iterdir()} if before else None

    def fail(path, *_, **__):
        if isinstance(path, Path) and path.name == "module.so":
            path.write_bytes(b"half")
        raise error

    real = Path.rename
    if step == "export":
        monkeypatch.setattr(module, "_export", fail)
    elif step == "manifest":
        monkeypatch.setattr(runtime_module.Manifest, "to_json", fail)
    else:
        monkeypatch.setattr(
            Path,
            "rename",
            lambda a, b: fail(a) if b == target and ".old" not in a.name else real(a, b),
        )
    with pytest.raises(raised, match="cannot be written" if raised is ArtifactError else None):
        module.save(target)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == (["module"] if before else [])
    if before:
        assert {f.name: f.read_bytes() for f in target.iterdir()} == earlier


def test_a_library_for_another_architecture_needs_its_linker(tmp_path):
    proto = model("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"}
    if cpu.architecture() == "aarch64":
        target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}
    module = opferry.compile(proto, target=target)
    with pytest.raises(ArtifactError, match=r"module: built for .*, this machine is"):
        module.run({"x": X[0]})
    with pytest.raises(ArtifactError, match="module: the library cannot be linked for"):
        module.save(tmp_path / "module")
    assert list(tmp_path.iterdir()) == []


# What load refuses


def reseal(folder, **changes):
    path = folder / "manifest.json"
    found = manifest.Manifest.from_json(path.read_text(), path)
    path.write_text(dataclasses.replace(found, **changes).to_json())


def test_load_refuses_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match="found no saved module"):
        opferry.load(tmp_path / "nothing")


def test_load_refuses_a_missing_library(copy):
    (copy / "module.so").unlink()
    with pytest.raises(ArtifactError, match=r"module\.so: cannot be read"):
        opferry.load(copy)


def test_load_refuses_a_changed_library(copy):
    with (copy / "module.so").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match=r"module\.so: found other content than was saved"):
        opferry.load(copy)


def test_load_refuses_a_library_that_is_none(copy):
    (copy / "module.so").write_bytes(b"no library")
    reseal(copy, files={"module.so": manifest.sha256(copy / "module.so")})
    with pytest.raises(ArtifactError, match=r"module\.so: cannot be loaded"):
        opferry.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"b"', '"c"'),
            "manifest.json: found other content than was saved",
        ),
        (lambda text: text.replace('"float32"', '"float64"', 1), "found other content"),
        (lambda text: text[: len(text) // 2], "found no manifest"),
        (lambda text: "[]", "found no manifest"),
        (lambda text: "[" * 100_000, "found no manifest"),
        (lambda text: "", "found no manifest"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "found format 99, allowed 1"),
        (lambda text: json.dumps({"format": 1}), "found other content"),
    ],
    ids=["name", "dtype", "cut", "list", "deep", "empty", "format", "gutted"],
)
def test_load_refuses_a_changed_manifest(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ArtifactError, match=message):
        opferry.load(copy)


def test_a_manifest_may_be_formatted_anew(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(dict(sorted(json.loads(path.read_text()).items()))))
    opferry.load(copy)


def test_load_reads_no_file_but_its_own(copy):
    reseal(copy, files={"module.so": "", "../../etc/passwd": ""})
    with pytest.raises(ArtifactError, match=r"found files \[.*passwd.*\], allowed module\.so"):
        opferry.load(copy)


def test_load_refuses_a_module_of_another_tvm(copy):
    reseal(copy, versions={"apache-tvm": "0.26.0", "apache-tvm-ffi": "unknown", "opferry": "1"})
    with pytest.raises(ArtifactError, match=r"built with apache-tvm 0\.26\.0, installed is 0"):
        opferry.load(copy)


def test_load_refuses_another_architecture(copy, monkeypatch):
    monkeypatch.setattr(cpu, "architecture", lambda: "riscv64")
    with pytest.raises(ArtifactError, match=r"built for .*, this machine is riscv64"):
        opferry.load(copy)


def test_load_refuses_instructions_that_this_cpu_lacks(copy, monkeypatch):
    reseal(copy, cpu_features=("avx2", "avx512vnni"), target={"kind": "llvm", "mcpu": "big"})
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(
        ArtifactError, match="built for big, this CPU lacks avx512vnni; compile for"
    ):
        opferry.load(copy)


def test_an_unsaved_module_for_a_bigger_cpu_does_not_run(monkeypatch):
    module = opferry.compile(
        model("g (float[n] x) => (float[n] y) { y = Neg(x) }"), target="x86-avx512bf16"
    )
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match=r"this CPU lacks .*avx512bf16"):
        module.run({"x": X[0]})


# A machine with the runtime only

DEPLOYED = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition(".")[0] == "onnx" else find(name, path, target)
)
import numpy as np, opferry
module = opferry.load(sys.argv[1])
x = np.arange(6, dtype=np.float32).reshape(2, 3)
np.testing.assert_array_equal(module.run({"x": x, "z": x})["y"], 2 * x)
try:
    module.run({"x": x, "z": x[:1]})
except opferry.OpferryError as error:
    print(error)
assert not any(name.partition(".")[0] == "onnx" for name in sys.modules)
"""


def deployed(saved, **environment):
    return subprocess.run(
        [sys.executable, "-c", DEPLOYED, str(saved)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_module_runs_with_tvms_runtime_library(saved):
    done = deployed(saved, TVM_USE_RUNTIME_LIB="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert 'input "z": found b = 1' in done.stdout


def test_a_module_runs_where_there_is_no_compiler_library(saved, tmp_path):
    """TVM's package without libtvm_compiler.so, and no onnx."""
    source = Path(tvm.__file__).parent
    package = tmp_path / "tvm"
    (package / "lib").mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name not in ("lib", "lib64"):
            (package / entry.name).symlink_to(entry)
    runtime = [lib for lib in (source / "lib").iterdir() if "compiler" not in lib.name]
    assert len(runtime) < len(list((source / "lib").iterdir()))
    for library in runtime:
        (package / "lib" / library.name).symlink_to(library)
    done = deployed(saved, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'input "z": found b = 1' in done.stdout


# Threads


COUNT = """
import sys, numpy as np, opferry
from tvm_ffi import get_global_func
module = opferry.load(sys.argv[1], **({"threads": int(sys.argv[2])} if len(sys.argv) > 2 else {}))
x = np.ones((2, 3), np.float32)
module.run({"x": x, "z": x})
print(get_global_func("runtime.NumThreads")())
"""


def threads_used(saved, *arguments, **environment):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("OPFERRY_NUM_THREADS", "TVM_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(saved), *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_all_cores_are_used_by_default(saved):
    assert threads_used(saved) == cpu.available_cores()


def test_threads_by_argument_and_by_environment(saved):
    assert threads_used(saved, "1") == 1
    assert threads_used(saved, OPFERRY_NUM_THREADS="1") == 1
    assert threads_used(saved, str(cpu.available_cores()), OPFERRY_NUM_THREADS="1") == (
        cpu.available_cores()
    )


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "²"])
def test_a_wrong_number_of_threads_in_the_environment(monkeypatch, value):
    monkeypatch.setenv(thread_pool.VARIABLE, value)
    with pytest.raises(
        OpferryError, match=r"OPFERRY_NUM_THREADS: found .*, allowed a whole number"
    ):
        thread_pool.default_threads()


@pytest.mark.parametrize("threads", [0, -1, 2.0, "2"])
def test_a_wrong_number_of_threads(saved, threads):
    with pytest.raises(
        OpferryError, match=r"threads: found .*, allowed a whole number of at least 1"
    ):
        opferry.load(saved, threads=threads)


def test_a_cpu_quota_counts(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *a, **k: (
            (tmp_path / "cpu.max").open().read()
            if str(path) == "/sys/fs/cgroup/cpu.max"
            else real(path, *a, **k)
        ),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert cpu.available_cores() == 2


def test_calls_from_several_python_threads(module):
    failures = []

    def work(seed):
        x = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
        for _ in range(50):
            got = module.run({"x": x, "z": x})
            if not np.array_equal(got["y"], 2 * x):
                failures.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_compiling_in_several_python_threads():
    results = {}

    def work(scale):
        weight = numpy_helper.from_array(np.full(3, scale, np.float32), "w")
        proto = model("g (float[b,3] x, float[3] w) => (float[b,3] y) { y = Mul(x, w) }")
        del proto.graph.input[1]
        proto.graph.initializer.append(weight)
        results[scale] = opferry.compile(proto).run({"x": X})["y"]

    workers = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 2.0, 3.0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for scale in (1.0, 2.0, 3.0):
        np.testing.assert_array_equal(results[scale], scale * X)


# Noise


def test_only_known_noise_is_dropped(capfd):
    with quiet.without_noise():
        os.write(2, b"[t] x.cc:1: Warning: Scope Saving something\nTrouble: read this\n")
        with quiet.without_noise():
            os.write(2, b"And this\n")
    os.write(2, b"At once\n")
    assert capfd.readouterr().err == "Trouble: read this\nAnd this\nAt once\n"


def test_noise_can_be_asked_for(capfd, monkeypatch):
    monkeypatch.setenv(quiet.VARIABLE, "1")
    with quiet.without_noise():
        os.write(2, b"Scope Saving something\n")
    assert capfd.readouterr().err == "Scope Saving something\n"


def test_importing_opferry_is_fast():
    """Without onnx, which takes longer than everything else and is not ours."""
    code = (
        "import onnx, ml_dtypes, numpy, time; t = time.process_time(); import opferry; "
        "print(time.process_time() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.05
