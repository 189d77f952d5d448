"""validate: verdicts, the first diverging node, outputs without a reference, random inputs."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from onnx import parser
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

import opferry
from opferry.driver import validate as validation
from opferry.driver.inputs import _spread, random_inputs
from opferry.driver.report import Report
from opferry.frontend.model import prepare
from opferry.runtime.checks import Check
from opferry.runtime.errors import InvalidInputError, OpferryError
from opferry.runtime.manifest import Tensor

HEAD = '<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>'
I64 = np.dtype(np.int64)
RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-128, 128, (33, 7), np.int8)


def model(text):
    return parser.parse_model(HEAD + text)


def f(*shape):
    return RNG.standard_normal(shape, np.float32)


# Verdicts

MIXED = """g (float[b,4] x, int64[b] ids) => (float[b,4] y, int64[2] s, bool[b,4] p, float[2] k)
    <float[3,4] t = {0,1,2,3,4,5,6,7,8,9,10,11}, float[2] k = {1, 2}> {
    e = Gather(t, ids) a = Add(x, e) y = Softmax(a) s = Shape(x) p = Greater(x, e) }"""


@pytest.fixture(scope="module")
def mixed():
    proto = model(MIXED)
    return proto, opferry.compile(proto)


def test_a_right_module_is_ok(mixed):
    report = opferry.validate(*mixed)
    assert report.ok
    assert [(o.name, o.verdict) for o in report.outputs] == [
        (n, "ok") for n in ("y", "s", "p", "k")
    ]
    assert report.outputs[0].judged_by.startswith("float32: atol 0.0001")
    assert report.outputs[1].judged_by == "equality"
    assert report.first_divergence is None
    assert str(report).splitlines()[-1] == "ok"


def test_the_report_as_json(mixed):
    data = json.loads(opferry.validate(*mixed).to_json())
    assert data["ok"] is True
    assert data["outputs"][1] | {"shape": None} == {
        "name": "s",
        "dtype": "int64",
        "shape": None,
        "verdict": "ok",
        "max_abs_error": 0.0,
        "max_rel_error": 0.0,
        "mismatches": 0,
        "excused": 0,
        "judged_by": "equality",
        "note": "",
    }


def test_inputs_may_be_given(mixed):
    feeds = {"x": np.float32([[1, 2, 3, 4]]), "ids": np.array([2])}
    report = opferry.validate(*mixed, inputs=feeds)
    assert report.ok
    assert report.outputs[0].shape == (1, 4)
    with pytest.raises(InvalidInputError, match="index 3, allowed -3 to 2"):
        opferry.validate(*mixed, inputs=feeds | {"ids": np.array([3])})


def test_the_model_must_be_the_modules(mixed):
    other = model("g (float[b,4] q) => (float[b,4] y) { y = Relu(q) }")
    with pytest.raises(OpferryError, match="validate: found a model with inputs"):
        opferry.validate(other, mixed[1])


def test_bound_dimensions_are_those_of_the_module():
    proto = model(MIXED)
    report = opferry.validate(proto, opferry.compile(proto, shapes={"b": 5}))
    assert report.ok
    assert report.outputs[0].shape == (5, 4)


def test_what_onnx_cannot_evaluate_has_no_reference():
    proto = model("""g (float[b,4] x) => (float[b,4] y, float[b,4] z) {
        g = com.microsoft.FastGelu(x) y = Neg(g) z = Neg(x) }""")
    report = opferry.validate(proto, opferry.compile(proto))
    assert report.ok
    assert [o.verdict for o in report.outputs] == ["no reference", "ok"]
    assert "no reference for: com.microsoft::FastGelu" in str(report)


def test_a_module_of_another_model_fails(mixed):
    """Same signature, other function: every node of the model is right, the module is not."""
    text = MIXED.replace("Softmax(a)", "Tanh(a)")
    report = opferry.validate(model(text), mixed[1])
    assert not report.ok
    assert [o.verdict for o in report.outputs] == ["failed", "ok", "ok", "ok"]
    assert report.outputs[0].mismatches > 0
    assert report.outputs[0].max_abs_error > 0.1
    assert "the module is not the one that this model compiles to" in str(report)
    assert str(report).splitlines()[-1] == "FAILED"


def test_the_first_diverging_node_is_named(monkeypatch):
    monkeypatch.setattr(
        onnx_frontend.Relu,
        "_impl_v13",
        classmethod(lambda cls, bb, inputs, *_: relax.op.abs(inputs[0])),
    )
    monkeypatch.setattr(onnx_frontend.Relu, "_impl_v1", onnx_frontend.Relu._impl_v13, raising=False)
    proto = model(
        """g (float[b,4] x) => (float[b,4] y, float[b,4] z) {
        a = Tanh(x) [wrong] r = Relu(a) c = Exp(r) y = Relu(c) z = Neg(a) }""".replace(
            "[wrong]", ""
        )
    )
    proto.graph.node[1].name = "wrong"
    report = opferry.validate(proto, opferry.compile(proto))
    assert not report.ok
    assert report.first_divergence.node == 'Relu node "wrong"'
    assert report.first_divergence.output == "r"
    assert report.first_divergence.mismatches > 0
    assert "first diverging node: Relu node \"wrong\", output 'r'" in str(report)
    assert json.loads(report.to_json())["first_divergence"]["output"] == "r"


def test_accumulated_rounding_is_told_from_a_wrong_node():
    """A millionfold tanh rounds to other integers, yet tanh and rounding are both right."""
    proto = model("""g (float[b,64] x) => (int32[b,64] y) <float m = {100000000}> {
        a = Tanh(x) b = Mul(a, m) c = Round(b) y = Cast<to = 6>(c) }""")
    report = opferry.validate(proto, opferry.compile(proto))
    assert report.ok
    assert report.outputs[0].verdict == "ok by node"
    assert report.outputs[0].mismatches > 0
    assert "the difference is accumulated rounding" in str(report)


@pytest.mark.parametrize(
    ("got", "want", "ok"),
    [
        ([1.0, np.inf, -np.inf, np.nan], [1.0, np.inf, -np.inf, np.nan], True),
        ([1.0, np.inf], [1.0, -np.inf], False),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, 3e38], [1.0, np.inf], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 1e-30], [0.0, 0.0], False),
        ([1000.0, 0.05], [1000.0, 0.0], True),  # atol counts in units of the largest
        ([1000.0, 0.2], [1000.0, 0.0], False),
    ],
    ids=str,
)
def test_floats_agree_within_the_table(got, want, ok):
    comparison = validation._close("y", np.float32(got), np.float32(want))
    assert comparison.ok is ok


def test_integers_agree_exactly():
    comparison = validation._close("y", np.int8([-128, 5, 7]), np.int8([127, 5, 8]))
    assert (comparison.ok, comparison.mismatches, comparison.max_abs_error) == (False, 2, 255.0)
    wrong_type = validation._close("y", np.int32([1]), np.int64([1]))
    assert not wrong_type.ok
    assert wrong_type.note == "found int32[1], expected int64[1]"
    assert math.isinf(wrong_type.max_abs_error)


def test_an_infinite_error_is_json(mixed):
    report = opferry.validate(*mixed)
    output = report.outputs[0].__class__("y", "float32", (1,), "failed", math.inf, math.inf, 1)
    data = json.loads(Report((output,)).to_json())
    assert data["outputs"][0]["max_abs_error"] == "inf"
    assert data["ok"] is False


# Random inputs of our operators

TND = {"query": {0: "T"}, "key": {0: "U"}, "value": {0: "U"}}
LISTS = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")

MODELS = {
    "matmul": lambda: opferry.node_model(
        "QOrderedMatMul",
        {
            "A": (np.int8, (2, 5, 33)),
            "scale_A": f(),
            "B": WEIGHT,
            "scale_B": f(7),
            "scale_Y": f(1),
            "bias": f(7),
            "C": (np.int8, (2, 5, 7)),
            "scale_C": f(1),
        },
        initializers=["B"],
        symbolic={"A": {0: "b", 1: "M"}, "C": {0: "b", 1: "M"}},
        order_A=1,
        order_B=0,
        order_Y=1,
    ),
    "packed scale": lambda: opferry.node_model(
        "NPUQuantMatmul",
        {"x1": (np.int8, (5, 33)), "x2": WEIGHT, "scale": (I64, (7,)), "bias": (np.int32, (7,))},
        initializers=["x2"],
        symbolic={"x1": {0: "M"}},
    ),
    "per token": lambda: opferry.node_model(
        "NPUQuantMatmul",
        {
            "x1": (np.int8, (5, 33)),
            "x2": WEIGHT,
            "scale": f(7),
            "pertoken_scale": f(5),
            "bias": (ml_dtypes.bfloat16, (7,)),
        },
        initializers=["x2"],
        symbolic={"x1": {0: "M"}, "pertoken_scale": {0: "M"}},
        output_dtype=16,
    ),
    "quant param": lambda: opferry.node_model(
        "NPUTransQuantParam", {"scale": f(7), "offset": f(1)}
    ),
    "longformer": lambda: opferry.node_model(
        "QOrderedLongformerAttention",
        {
            "input": (np.int8, (2, 16, 8)),
            "scale_input": f(),
            "weight": (np.int8, (8, 24)),
            "scale_weight": f(),
            "bias": f(24),
            "scale_bias": f(),
            "scale_qkv_gemm": f(1),
            "mask": (np.float16, (2, 16)),
            "global_weight": (np.int8, (8, 24)),
            "scale_global_weight": f(1),
            "global_bias": f(24),
            "scale_global_gemm": f(),
            "global": (np.int32, (2, 16)),
            "scale_output": f(),
        },
        symbolic={name: {0: "B", 1: "S"} for name in ("input", "mask", "global")},
        num_heads=2,
        window=3,
        order_input=1,
        order_output=1,
    ),
    "nsa": lambda: opferry.node_model(
        "NPUNsaCompressAttention",
        {
            "query": f(10, 4, 8),
            "key": f(12, 2, 8),
            "value": f(12, 2, 6),
            "atten_mask": (np.bool_, (20, 20)),
            "topk_mask": (np.uint8, (20, 3)),
            **dict.fromkeys(LISTS, (I64, (3,))),
        },
        symbolic=TND | {name: {0: "B"} for name in LISTS},
        head_num=4,
        compress_block_size=32,
        compress_stride=16,
        select_block_size=64,
        select_block_count=3,
    ),
    "packed attention": lambda: opferry.node_model(
        "SpeedFusionAttention",
        {
            "query": f(20, 2, 8),
            "key": f(20, 2, 8),
            "value": f(20, 2, 8),
            "atten_mask": (np.bool_, (2048, 2048)),
            "actual_seq_qlen": (I64, (3,)),
            "actual_seq_kvlen": (np.int32, (3,)),
        },
        symbolic=TND | {"actual_seq_qlen": {0: "B"}, "actual_seq_kvlen": {0: "B"}},
        check=False,
        head_num=2,
        input_layout="TND",
        sparse_mode=3,
    ),
    "prefix attention": lambda: opferry.node_model(
        "SpeedFusionAttention",
        {
            "query": f(2, 5, 16),
            "key": f(2, 7, 8),
            "value": f(2, 7, 8),
            "atten_mask": (np.bool_, (2, 1, 5, 7)),
            "prefix": (I64, (2,)),
            "seed": (I64, ()),
        },
        head_num=2,
        input_layout="BSH",
        sparse_mode=5,
        keep_prob=0.7,
    ),
}


def _packed_lists_of_one_type(proto):
    """Both lists int64: inputs that share a type letter must agree."""
    for value in proto.graph.input:
        if value.name == "actual_seq_kvlen":
            value.type.tensor_type.elem_type = 7
    return proto


@pytest.mark.parametrize("name", MODELS)
def test_random_inputs_are_valid_and_validate(name):
    proto = _packed_lists_of_one_type(MODELS[name]())
    module = opferry.compile(proto)
    for seed in range(3):
        report = opferry.validate(proto, module, seed=seed)
        assert report.ok, str(report)
        assert all(o.verdict == "ok" for o in report.outputs)
        assert all("specification" in o.judged_by for o in report.outputs)


def test_random_inputs_repeat_by_seed(mixed):
    proto, module = mixed
    prepared = prepare(proto)
    first, again, other = (
        random_inputs(prepared, module.inputs, module.manifest.checks, seed) for seed in (1, 1, 2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["x"].shape != other["x"].shape or not np.array_equal(first["x"], other["x"])
    assert np.all((first["ids"] >= 0) & (first["ids"] < 3))


def test_sizes_obey_the_checks():
    inputs = (Tensor("x", "float32", ("S", "b")), Tensor("z", "float32", ("S2",)))
    checks = [
        Check.condition("n", "S", ["EQ", ["FloorMod", ["dim", "S"], 22], 0], [["dim", "S"]], "22"),
        Check.condition("n", "S2", ["EQ", ["dim", "S"], ["dim", "S2"]], [["dim", "S"]], "S"),
    ]
    proto = prepare(model("g (float[S,b] x, float[S2] z) => (float[S,b] y) { y = Neg(x) }"))
    arrays = random_inputs(proto, inputs, checks, 0)
    assert arrays["x"].shape[0] % 22 == 0
    assert arrays["x"].shape[0] == arrays["z"].shape[0]
    impossible = [Check.condition("n", "S", ["LT", ["dim", "S"], 0], [["dim", "S"]], "less than 0")]
    with pytest.raises(
        InvalidInputError, match=r"no sizes found for dimensions \['S', 'b', 'S2'\]"
    ):
        random_inputs(proto, inputs, impossible, 0)


@pytest.mark.parametrize("seed", range(20))
def test_dimensions_that_must_agree_are_drawn_once(seed):
    names = ("S", "B", "S2", "B2", "S3", "B3")
    inputs = tuple(Tensor(f"x{i}", "float32", names[2 * i : 2 * i + 2]) for i in range(3))
    equal = [("S", "S2"), ("S3", "S2"), ("B2", "B"), ("B", "B3")]
    checks = [
        Check.condition("n", "shape", ["EQ", ["dim", a], ["dim", b]], [["dim", a]], b)
        for a, b in equal
    ]
    checks.append(
        Check.condition("n", "S", ["EQ", ["FloorMod", ["dim", "S"], 14], 0], [["dim", "S"]], "14")
    )
    proto = prepare(
        model("g (float[S,B] x0, float[S2,B2] x1, float[S3,B3] x2) => (float[S,B] y) {y = Neg(x0)}")
    )
    arrays = random_inputs(proto, inputs, checks, seed)
    assert arrays["x0"].shape == arrays["x1"].shape == arrays["x2"].shape
    assert arrays["x0"].shape[0] % 14 == 0


@pytest.mark.parametrize("seed", range(5))
def test_counts_spread_between_their_bounds(seed):
    rng = np.random.default_rng(seed)
    low, high = np.array([0, 2, 1, 0]), np.array([3, 9, 1, 20])
    counts = _spread(rng, 17, low, high)
    assert counts.sum() == 17
    assert np.all((low <= counts) & (counts <= high))
    assert _spread(rng, 100, low, high).tolist() == high.tolist()


def test_a_list_that_is_cast_and_reshaped_is_still_a_list():
    text = """g (float[T,1,4] q, int32[1,B] ends) => (float[T,1,4] y) {
        shape = Constant<value: tensor = int64[1] {-1}>()
        wide = Cast<to = 7>(ends) list = Reshape(wide, shape)
        y = mindspore.SpeedFusionAttention<head_num = 1, input_layout = "TND">(
            q, q, q, , , , , list, list) }"""
    proto = parser.parse_model('<ir_version: 9, opset_import: ["": 17, "mindspore": 1]>' + text)
    module = opferry.compile(proto)
    report = opferry.validate(proto, module)
    assert report.ok, str(report)
