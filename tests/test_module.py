"""Module.run: arrays in and out, several threads of Python."""

import threading

import ml_dtypes
import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from small_model import X, model

import opferry
from opferry.runtime.errors import InvalidInputError, InvalidInputTypeError


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


# Several threads of Python


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
