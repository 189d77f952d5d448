"""NVIDIA GPUs as a target, on a machine without one: targets, whole models to CUDA C++ and to
machine code, saved modules, and the errors where a compiler or a device is missing.
"""

import functools
import re
import struct

import numpy as np
import pytest
import tvm_ffi
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from simt import graph
from tvm.target import Target

import opferry
from opferry.driver import build, cli, device_code
from opferry.driver import target as targets
from opferry.frontend.importer import import_model
from opferry.frontend.model import prepare
from opferry.runtime import gpu
from opferry.runtime.errors import (
    ArtifactError,
    InvalidInputError,
    OpferryError,
    UnsupportedError,
)
from opferry.runtime.manifest import Manifest
from opferry.schedules import TIR_BUILDERS, tir_builder
from opferry.schedules.cuda import arch

needs_compiler = pytest.mark.skipif(
    device_code.nvcc() is None and not device_code.has_nvrtc(),
    reason="needs nvcc or NVRTC to make machine code",
)
needs_nvcc = pytest.mark.skipif(device_code.nvcc() is None, reason="needs nvcc")
no_gpu = pytest.mark.skipif(gpu.capability() is not None, reason="a GPU is there")

HIDDEN, INNER = 64, 96
QUICK = ("sm_75", "sm_90")
ALLOWED = "sm_75, sm_80, sm_86, sm_89, sm_90, sm_90a"


def mixed_model(symbolic=True):
    """Embedding, two int8 products of ours, softmax over a batched product, normalisation."""
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.standard_normal((50, HIDDEN)).astype(np.float32),
        "ones": np.ones(HIDDEN, np.float32),
        "step": np.float32(0.03),
        "zero": np.int8(0),
        "fc.weight": rng.integers(-128, 128, (INNER, HIDDEN)).astype(np.int8),
        "fc.scale": rng.random(INNER).astype(np.float32),
        "fc.bias": rng.integers(-99, 99, INNER).astype(np.int32),
        "B": rng.integers(-128, 128, (INNER, HIDDEN)).astype(np.int8),
        "scale_A": np.float32(0.02),
        "heads": np.array([0, 0, 4, HIDDEN // 4], np.int64),
        "rows": np.array([0, 0, HIDDEN], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "tokens"], ["x"]),
        node("LayerNormalization", ["x", "ones"], ["n"]),
        node("QuantizeLinear", ["n", "step", "zero"], ["n8"]),
        opferry.linear_a8w8_quant(
            HIDDEN, INNER, output_dtype="float16", name="fc", input="n8", output="h16"
        ),
        node("Cast", ["h16"], ["h"], to=TensorProto.FLOAT),
        node("QuantizeLinear", ["h", "step", "zero"], ["h8"]),
        node(
            "QOrderedMatMul",
            ["h8", "scale_A", "B", "scale_A", "step"],
            ["q8"],
            domain="com.microsoft",
            order_A=1,
            order_B=0,
            order_Y=1,
        ),
        node("DequantizeLinear", ["q8", "step", "zero"], ["q"]),
        node("Add", ["q", "x"], ["r"]),
        node("Reshape", ["r", "heads"], ["split"]),
        node("Transpose", ["split"], ["p"], perm=[0, 2, 1, 3]),
        node("Transpose", ["split"], ["pt"], perm=[0, 2, 3, 1]),
        node("MatMul", ["p", "pt"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "p"], ["mixed"]),
        node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "rows"], ["y"]),
    ]
    batch, length = ("B", "S") if symbolic else (2, 7)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "mixed",
        [info("tokens", TensorProto.INT64, [batch, length])],
        [info("y", TensorProto.FLOAT, [batch, length, HIDDEN])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid(*i) for i in {"": 17, "npu": 1, "com.microsoft": 1}.items()]
    return helper.make_model(graph, opset_imports=imports)


@functools.cache
def generated(name, symbolic=True):
    """Lowered for a target, without machine code: needs no compiler."""
    target = targets.resolve(name)
    return build.generate(import_model(prepare(mixed_model(symbolic)), target), target)


@functools.cache
def compiled(name="cuda-sm_80"):
    return opferry.compile(mixed_model(), name)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "module"
    compiled().save(folder)
    return folder


# Targets


@pytest.mark.parametrize("name", arch.ARCHS)
def test_short_names(name):
    target = targets.resolve(f"cuda-{name}")
    assert target.kind.name == "cuda"
    assert arch.of(target).name == name
    assert target.host.kind.name == "llvm"


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "cuda", "arch": "sm_86"},
        '{"kind": "cuda", "arch": "sm_86"}',
        Target({"kind": "cuda", "arch": "sm_86"}),
        Target({"kind": "cuda", "arch": "sm_86"}, host="llvm"),
    ],
    ids=["dict", "json", "Target", "Target with host"],
)
def test_records_of_tvm(target):
    resolved = targets.resolve(target)
    assert arch.of(resolved).name == "sm_86"
    assert resolved.host.kind.name == "llvm"
    assert int(resolved.attrs["max_threads_per_block"]) == 1024


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "sm_80"), ((7, 5), "sm_75"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((12, 0), "sm_90")],
)
def test_the_gpu_of_this_machine(monkeypatch, capability, expected):
    monkeypatch.setattr(gpu, "capability", lambda: capability)
    assert arch.of(targets.resolve("cuda")).name == expected
    assert arch.of(targets.resolve({"kind": "cuda"})).name == expected


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda: (6, 1))
    with pytest.raises(UnsupportedError, match=f"architecture 'sm_61', allowed {ALLOWED}"):
        targets.resolve("cuda")


@pytest.mark.parametrize("found", ["sm_60", "sm_100", "nonsense", "sm_100a"])
def test_architectures_that_are_refused(found):
    for target in (f"cuda-{found}", {"kind": "cuda", "arch": found}):
        with pytest.raises(UnsupportedError) as error:
            targets.resolve(target)
        assert str(error.value) == f"target: found CUDA architecture '{found}', allowed {ALLOWED}"


def test_options_and_hosts_that_are_refused():
    with pytest.raises(OpferryError, match=r"not allowed by TVM.*'bogus'"):
        targets.resolve({"kind": "cuda", "arch": "sm_80", "bogus": 1})
    with pytest.raises(OpferryError, match="found mcpu 'nope'"):
        targets.resolve({"kind": "cuda", "arch": "sm_80", "host": {"kind": "llvm", "mcpu": "nope"}})
    with pytest.raises(OpferryError, match=r"allowed 'llvm', 'cuda', .*'cuda-sm_75'"):
        targets.resolve("cuda80x")


def test_facts_are_consistent():
    for record in arch.ARCHS.values():
        assert arch.STATIC_SHARED_BYTES < record.shared_per_block <= record.shared_per_sm
        suffix = "a" if record.specific else ""
        assert record.name == "sm_{}{}".format(*record.capability) + suffix
        assert record.cp_async == (record.capability >= (8, 0)) == (record.mma_bfloat16 is not None)


# Code


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "static"])
def test_whole_models_become_cuda(symbolic):
    """Every kernel runs on the GPU: each PrimFunc has one, no tensor is copied on the way, and the
    host waits for none.
    """
    module = generated("cuda-sm_80", symbolic)
    (source,) = device_code.sources(module.mod)
    kernels = set(re.findall(r"__global__ void .*?(\w+)_kernel", source))
    assert {"linear_a8w8_quant_gemm", "qordered_matmul_gemm", "softmax", "matmul"} <= kernels
    assert "to_vdevice" not in module.as_text()
    assert not graph.waits(module)


def test_kernels_keep_within_the_limits_of_a_block():
    (source,) = device_code.sources(generated("cuda-sm_80").mod)
    bounds = [int(threads) for threads in re.findall(r"__launch_bounds__\((\d+)", source)]
    assert bounds
    assert max(bounds) <= arch.BLOCK_THREADS


def test_no_fast_math():
    assert not any("fast" in option for option in device_code._DEFINES)
    (source,) = device_code.sources(generated("cuda-sm_80").mod)
    assert "__expf" not in source


def test_a_kernel_without_cuda_schedule_is_named():
    name = next((n for n, rows in TIR_BUILDERS.items() if "cuda" not in rows), None)
    if name is None:
        pytest.skip("every kernel has one")
    with pytest.raises(UnsupportedError, match=f"kernel {name}: found target 'cuda'"):
        tir_builder(name, targets.resolve("cuda-sm_80"))


@needs_compiler
def test_machine_code_and_manifest(saved):
    manifest = Manifest.from_json((saved / "manifest.json").read_text(), saved)
    assert manifest.on_gpu
    assert manifest.target["arch"] == "sm_80"
    assert manifest.device_code == device_code.form()
    assert manifest.operators == ("npu::NPUQuantMatmul", "com.microsoft::QOrderedMatMul")


@needs_compiler
def test_the_library_holds_machine_code_and_no_source(saved):
    library = (saved / "module.so").read_bytes()
    assert b"__global__" not in library
    assert (b"\x50\xed\x55\xba" if device_code.form() == "fatbin" else b"\x7fELF") in library[4:]


@needs_nvcc
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in arch.ARCHS],
)
def test_every_architecture(name):
    (source,) = device_code.sources(generated(f"cuda-{name}").mod)
    form, code = device_code.compile_source(source, name)
    assert form == "fatbin"
    assert len(code) > 1000


@needs_nvcc
@pytest.mark.parametrize(("name", "ptx"), [("sm_90", True), ("sm_90a", False)])
def test_later_gpus_are_given_ptx(name, ptx):
    """Unless nothing but this architecture has the instructions."""
    source = 'extern "C" __global__ void set(int* x) { *x = 1; }'
    assert (b".entry" in device_code._by_nvcc(source, name, "-no-compress")) == ptx


@needs_compiler
def test_code_that_does_not_compile():
    with pytest.raises(
        OpferryError, match=r"cannot compile the kernels for sm_80: (.|\n)*nonsense"
    ):
        device_code.compile_source("nonsense", "sm_80")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(device_code, "has_nvrtc", lambda: False)
    with pytest.raises(UnsupportedError, match="found neither nvcc nor NVRTC, allowed either"):
        opferry.compile(mixed_model(), "cuda-sm_80")


# The packed modules of a library


def packed(*modules):
    def counted(data):
        return struct.pack("<Q", len(data)) + data

    rest = struct.pack("<3Q", 2, 0, 1) + struct.pack("<2Q", 1, 1)
    for kind, content in modules:
        rest += counted(kind) + (b"" if content is None else counted(content))
    return struct.pack("<Q", len(rest)) + rest


def cuda_content(form, functions, code):
    return struct.pack("<Q", len(form)) + form + functions + struct.pack("<Q", len(code)) + code


def test_embedding_replaces_source_alone(monkeypatch):
    monkeypatch.setattr(device_code, "compile_source", lambda source, name: ("fatbin", b"CODE"))
    others = [(b"relax.VMExecutable", b"program"), (b"_lib", None)]
    blob = packed(*others, (b"cuda", cuda_content(b"cuda", b"table", b"SOURCE")))
    expected = packed(*others, (b"cuda", cuda_content(b"fatbin", b"table", b"CODE")))
    assert device_code.embed(blob, ["another", "SOURCE"], "sm_80") == expected
    assert device_code.embed(expected, [], "sm_80") == expected  # compiled by TVM already


def test_embedding_refuses_what_it_does_not_know():
    blob = packed((b"cuda", cuda_content(b"cuda", b"table", b"SOURCE")))
    for damaged in (blob + b"x", blob):
        with pytest.raises(OpferryError, match="packs CUDA modules in another layout"):
            device_code.embed(damaged, ["another"], "sm_80")


# Without a device


@needs_compiler
@no_gpu
def test_no_device(saved):
    with pytest.raises(ArtifactError) as error:
        opferry.load(saved)
    assert str(error.value).startswith(f"{saved}: built for sm_80, found no CUDA device")
    assert str(error.value).endswith("allowed one of compute capability 8.0 or higher")
    with pytest.raises(ArtifactError, match="module: built for sm_80, found no CUDA device"):
        compiled().run({"tokens": np.zeros((1, 3), np.int64)})


@needs_compiler
@no_gpu
def test_no_device_on_the_command_line(saved, tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((1, 3), np.int64))
    given = f"tokens={tmp_path / 'tokens.npy'}"
    done = CliRunner().invoke(
        cli.main, ["run", str(saved), "--input", given, "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert done.output.startswith(f"Error: {saved}: built for sm_80, found no CUDA device")


@pytest.mark.parametrize(
    ("here", "code", "needed"),
    [
        ((7, 5), "fatbin", "8.6 or higher"),
        ((8, 0), "fatbin", "8.6 or higher"),
        ((9, 0), "cubin", "8.6 to 8.9"),
        (None, "fatbin", "8.6 or higher"),
    ],
)
def test_devices_that_will_not_do(monkeypatch, here, code, needed):
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda *_, **__: object())
    monkeypatch.setattr(gpu, "capability", lambda: here)
    found = "no CUDA device" if here is None else "a CUDA device of compute capability"
    with pytest.raises(ArtifactError, match=rf"it: built for sm_86, found {found}.*{needed}"):
        gpu.require({"arch": "sm_86"}, code, "it")


def test_code_for_one_capability_runs_on_no_other(monkeypatch):
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda *_, **__: object())
    for code in ("cubin", "fatbin"):
        monkeypatch.setattr(gpu, "capability", lambda: (9, 0))
        gpu.require({"arch": "sm_90a"}, code, "it")
        for here in (None, (8, 9), (10, 0), (12, 0)):
            monkeypatch.setattr(gpu, "capability", lambda here=here: here)
            with pytest.raises(ArtifactError, match=r"for sm_90a, .* compute capability 9\.0$"):
                gpu.require({"arch": "sm_90a"}, code, "it")


def test_devices_that_do(monkeypatch):
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda *_, **__: object())
    for here, code in (((8, 0), "cubin"), ((8, 9), "cubin"), ((9, 0), "fatbin")):
        monkeypatch.setattr(gpu, "capability", lambda here=here: here)
        gpu.require({"arch": "sm_80"}, code, "it")


def test_tensors_of_a_gpu(monkeypatch):
    class There:
        def __init__(self, index):
            self.index = index

        def __dlpack_device__(self):
            return gpu.CUDA, self.index

    assert gpu.as_tensor(np.zeros(3)) is None
    assert gpu.as_tensor([1, 2]) is None
    with pytest.raises(InvalidInputError, match="found it on CUDA device 1, allowed device 0"):
        gpu.as_tensor(There(1))


def test_device_outputs_share_memory():
    """On a CPU too, outputs can be had as they lie in memory."""
    node = helper.make_node("Relu", ["x"], ["y"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "relu", info[:1], info[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    x = np.array([[-1, 0, 2], [3, -4, 5]], np.float32)
    (y,) = opferry.compile(model).run({"x": x}, device_outputs=True).values()
    np.testing.assert_array_equal(np.from_dlpack(y), np.maximum(x, 0))
