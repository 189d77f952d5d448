"""The generic rules against ONNX's own reference, on awkward shapes, static and symbolic; and that
they fire.
"""

import math

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator
from tvm import relax, tirx

import opferry
from opferry.driver import target as targets
from opferry.schedules.apply import SCHEDULED

RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape).astype("float32")


# name: (declaration with {b} {s} for two leading dimensions, body, further inputs)
GRAPHS = {
    "layer_norm": (
        "float[{b},{s},H] x, float[H] g, float[H] h",
        "o = LayerNormalization<axis=-1>(x, g, h)",
    ),
    "softmax": ("float[{b},{s},H] x", "o = Softmax<axis=-1>(x)"),
    "softmax_middle": ("float[{b},{s},H] x", "o = Softmax<axis=1>(x)"),
    "log_softmax": ("float[{b},{s},H] x", "o = LogSoftmax<axis=-1>(x)"),
    "gelu": ("float[{b},{s},H] x", "o = Gelu(x)"),
    "erf": ("float[{b},{s},H] x", "o = Erf(x)"),
    "residual": ("float[{b},{s},H] x, float[{b},{s},H] y", "a = Add(x, y) o = Tanh(a)"),
    "broadcast": ("float[{b},{s},H] x, float[{b},1,H] y", "o = Mul(x, y)"),
    "constants": (  # one kernel with several values
        "float[{b},{s},H] x",
        "zero = Constant<value_float=0.0>() one = Constant<value_float=1.0>() "
        "far = Constant<value_float=-inf>() a = Clip(x, zero, one) c = Clip(x, far, zero) "
        "o = Sub(a, c)",
    ),
    "transpose": ("float[{b},{s},H] x", "o = Transpose<perm=[2,0,1]>(x)"),
    "absmax": (
        "float[{b},{s},H] x",
        "a = Abs(x) n = Constant<value_ints=[-1]>() o = ReduceMax(a, n)",
    ),
    "mean_tokens": (
        "float[{b},{s},H] x",
        "n = Constant<value_ints=[1]>() o = ReduceMean<keepdims=0>(x, n)",
    ),
    "mean_all": ("float[{b},{s},H] x", "o = ReduceMean<keepdims=0>(x)"),
    "l2": ("float[{b},{s},H] x", "n = Constant<value_ints=[-1]>() o = ReduceL2(x, n)"),
    "sum_squares": (
        "float[{b},{s},H] x",
        "n = Constant<value_ints=[1]>() p = Mul(x, x) o = ReduceSum<keepdims=0>(p, n)",
    ),
    "argmax": ("float[{b},{s},H] x", "o = ArgMax<axis=-1>(x)"),
    "cumsum": ("float[{b},{s},H] x", "n = Constant<value_int=1>() o = CumSum(x, n)"),
    "matmul": ("float[{b},{s},H] x, float[H,H] w", "o = MatMul(x, w)"),
    "matmul_bias_relu": (
        "float[{b},{s},H] x, float[H,H] w, float[H] g",
        "a = MatMul(x, w) c = Add(a, g) o = Relu(c)",
    ),
    "matmul_batched": (
        "float[{b},{s},H] x, float[{b},{s},H] y",
        "t = Transpose<perm=[0,2,1]>(y) o = MatMul(x, t)",
    ),
    "dynamic_quantize": (
        "float[{b},{s},H] x",
        "a = Abs(x) n = Constant<value_ints=[-1]>() m = ReduceMax(a, n) "
        "k = Constant<value_float=127.0>() d = Div(m, k) q = Div(x, d) r = Round(q) "
        "o = Cast<to=3>(r)",
    ),
    "split_concat": (
        "float[{b},{s},H] x",
        "p, q = Split<axis=-1, num_outputs=2>(x) o = Concat<axis=1>(q, p)",
    ),
    "where": ("float[{b},{s},H] x, float[{b},{s},H] y", "c = Greater(x, y) o = Where(c, x, y)"),
    "clip_half": ("float[{b},{s},H] x", "a = Cast<to=10>(x) o = Relu(a)"),
}
SHAPES = {
    "odd": (3, 5, 7, 7),
    "wide": (2, 33, 100, 100),
    "round": (2, 64, 128, 128),
    "one": (1, 1, 1, 1),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_standard_operators_match_onnx(graph, symbolic):
    inputs, body = GRAPHS[graph]
    for b, s, h, _ in SHAPES.values():
        if graph == "split_concat" and h % 2:
            continue
        model = _model(inputs, body, "b" if symbolic else b, "s" if symbolic else s, h)
        feeds = {value.name: f32(*_sizes(value, b=b, s=s)) for value in model.graph.input}
        (expected,) = ReferenceEvaluator(model).run(None, feeds)
        result = opferry.compile(model).run(feeds)["o"]
        assert result.dtype == expected.dtype
        if result.dtype.kind == "i" and graph == "dynamic_quantize":
            assert np.abs(result.astype(int) - expected).max() <= 1  # a division may land on a tie
        else:
            np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "graph", ["layer_norm", "softmax", "absmax", "matmul_bias_relu", "gelu", "residual"]
)
def test_rules_fire(graph):
    """Every kernel of these graphs is scheduled, and long loops of it run in parallel and
    vectorised.
    """
    inputs, body = GRAPHS[graph]
    module = _scheduled(_model(inputs, body, "b", "s", 384))
    kernels = [func for func in module.functions.values() if isinstance(func, tirx.PrimFunc)]
    assert kernels
    for func in kernels:
        assert func.attrs[SCHEDULED]
        script = func.script()
        assert "T.parallel" in script
        assert "T.vectorized" in script
    if graph in ("layer_norm", "softmax", "absmax"):
        assert "T.Shuffle" in "".join(func.script() for func in kernels)  # lanes folded by halves


QUANTISED = (  # normalised rows and their quantisation: three results of one kernel
    "float[{b},{s},H] x, float[{b},{s},H] z, float[H] g, float[H] h",
    "a = Add(x, z) y = LayerNormalization<axis=-1>(a, g, h) e = Erf(y) t = Mul(y, e) m = Abs(t) "
    "n = Constant<value_ints=[-1]>() l = ReduceMax(m, n) c = Constant<value_float=127.0>() "
    "d = Div(l, c) q = Div(t, d) i = Constant<value_float=-100.0>() "
    "j = Constant<value_float=100.0>() p = Clip(q, i, j) r = Round(p) o = Cast<to=3>(r)",
)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("size", SHAPES)
def test_rows_are_one_kernel(size, symbolic, tmp_path):
    """A normalisation and what quantises it, whose results the graph uses all, against ONNX's own
    reference; one kernel.
    """
    b, s, h, _ = SHAPES[size]
    inputs, body = QUANTISED
    model = _model(inputs, body, "b" if symbolic else b, "s" if symbolic else s, h)
    for name in ("y", "d"):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
        model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    feeds = {value.name: f32(*_sizes(value, b=b, s=s)) for value in model.graph.input}
    o, y, d = ReferenceEvaluator(model).run(None, feeds)
    result = opferry.compile(model, dump_ir=tmp_path).run(feeds)
    np.testing.assert_allclose(result["y"], y, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(result["d"], d, rtol=2e-5, atol=1e-7)
    if h > 1:  # a row of one element is 0 and its scale too
        assert np.abs(result["o"].astype(int) - o).max() <= 1
        graph = (tmp_path / "graph.py").read_text()
        assert graph.count("R.call_tir(") == 1
        assert "T.Buffer(()" not in graph  # the Clip's bounds are immediates


def test_rows_take_no_memory_from_a_pool():
    """What a row needs between its blocks, 4 KiB a buffer here, lies on the stack."""
    module = opferry.compile(_model(*QUANTISED, 3, 5, 1024))
    modules = module._executable().imports
    assembly = "".join(m.inspect_source("asm") for m in modules if m.kind == "llvm")
    assert "ParallelLaunch" in assembly
    assert "AllocWorkspace" not in assembly


def test_rows_keep_the_order_of_dependencies():
    """A product between a row's kernels depends on one and feeds another: two kernels, not a
    cycle.
    """
    model = _model(
        "float[{b},{s},H] x, float[H,H] w",
        "n = Constant<value_ints=[-1]>() l = ReduceMax(x, n) y = Sub(x, l) p = MatMul(y, w) "
        "t = Add(p, y) m = ReduceMax(t, n) o = Sub(t, m)",
        "b",
        "s",
        7,
    )
    feeds = {value.name: f32(*_sizes(value, b=3, s=5)) for value in model.graph.input}
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_allclose(
        opferry.compile(model).run(feeds)["o"], expected, rtol=2e-5, atol=2e-5
    )


def _scheduled(model):
    from tvm.ir.transform import Sequential

    from opferry.driver.build import ApplySchedules
    from opferry.frontend.importer import import_model
    from opferry.frontend.model import prepare

    target = targets.resolve("x86-avx512vnni")
    module = import_model(prepare(model), target).module
    graph = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return Sequential([*graph, ApplySchedules(target)])(module)


def _sizes(value, **symbols):
    dims = value.type.tensor_type.shape.dim
    return [symbols.get(dim.dim_param, dim.dim_value) for dim in dims]


def _model(inputs, body, b, s, h):
    kind = next((kind for mark, kind in _OUTPUTS.items() if mark in body), "float")
    inputs = inputs.replace("{b}", str(b)).replace("{s}", str(s)).replace("H", str(h))
    text = f"g ({inputs}) => ({kind} o) {{ {body} }}"
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]>\n{text}')
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


_OUTPUTS = {"ArgMax": "int64", "to=3": "int8", "to=10": "float16"}


def test_division_by_the_scale_of_a_row():
    """Every bit, whatever the scale: rows of zeros, infinities, NaN and denormals divide, too, and
    -0 stays -0.
    """
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]>\n'
        "g (float[600, 192] x) => (float[600, 192] o, float[600, 1] s) "
        "<int64[1] axis = {1}, float c = {127.0}> "
        "{ a = Abs(x)  m = ReduceMax(a, axis)  s = Div(m, c)  o = Div(x, s) }"
    )
    rng = np.random.default_rng(1)
    x = rng.uniform(0.01, 1, (600, 192)) * np.exp2(rng.uniform(-90, 120, (600, 1)))
    x = (x * rng.choice([-1, 1], x.shape)).astype("float32")
    x[0], x[9, ::3] = 0, -0.0
    x[1, 5], x[2, 6], x[3], x[4] = np.inf, np.nan, 1e-44, 3e38
    found = opferry.compile(model).run({"x": x})
    np.testing.assert_array_equal(
        found["s"][5:], np.abs(x[5:]).max(1, keepdims=True) / np.float32(127)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = x / found["s"]
    np.testing.assert_array_equal(found["o"], expected)
    np.testing.assert_array_equal(np.signbit(found["o"][5:]), np.signbit(x[5:]))


@pytest.mark.parametrize("name", ["Exp", "Erf", "Tanh", "Sigmoid"])
def test_elementary_functions(name):
    """Against float64 on the whole range: relative error, infinities, NaN; and without libm."""
    exact = {
        "Exp": np.exp,
        "Erf": np.vectorize(math.erf),
        "Tanh": np.tanh,
        "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }[name]
    x = np.concatenate(
        [np.linspace(-80, 80, 100_003), np.logspace(-30, 0, 1001), [-np.inf, np.inf]]
    )
    x = x.astype("float32")
    module = opferry.compile(_model("float[N] x".replace("N", "n"), f"o = {name}(x)", 0, 0, 0))
    with np.errstate(over="ignore"):
        expected = exact(x.astype("float64"))
    np.testing.assert_allclose(module.run({"x": x})["o"], expected, rtol=1e-6, atol=1e-37)
    assert np.isnan(module.run({"x": np.array([np.nan], "float32")})["o"]).all()
