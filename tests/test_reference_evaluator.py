"""Models with the operators evaluated in NumPy, and what the references import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import opferry.reference
from opferry.reference.linear_a8w8_quant import linear_a8w8_quant
from opferry.reference.nsa_compress_attention import nsa_compress_attention
from opferry.reference.qordered_longformer_attention import qordered_longformer_attention
from opferry.reference.qordered_matmul import qordered_matmul
from opferry.reference.speed_fusion_attention import speed_fusion_attention
from opferry.reference.whole_model import REFERENCES, evaluator
from opferry.runtime.errors import UnsupportedError

BF16 = ml_dtypes.bfloat16
f32 = np.float32
TYPES = {"": 17, "com.microsoft": 1, "mindspore": 1, "npu": 1}


def model_of(nodes, inputs, outputs, initializers=(), functions=()):
    """Inputs and outputs are names: shapes and types do not matter to the evaluator."""
    info = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
        for names in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *info, initializer=initializers)
    imports = [helper.make_opsetid(d, v) for d, v in (TYPES | {"local": 1}).items()]
    return helper.make_model(graph, opset_imports=imports, functions=functions)


def run_node(op_type, domain, inputs, outputs=1, **attrs):
    """One node; None is an input left out by an empty name."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, results, domain=domain, **attrs)
    feeds = {n: x for n, x in zip(names, inputs) if n}
    return evaluator(model_of([node], list(feeds), results)).run(None, feeds)


def attention_inputs(dtype=f32):
    g = np.random.default_rng(0)
    return [g.normal(size=(1, 2, 3, 4)).astype(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [f32, np.float16, BF16])
@pytest.mark.parametrize("outputs", [1, 2, 7])
def test_speed_fusion_node(dtype, outputs):
    qkv = attention_inputs(dtype)
    mask = np.eye(3, dtype=bool)
    seed = np.array([5], np.int64)
    inputs = [*qkv, None, None, mask, None, None, None, None, None, seed]
    attrs = {"head_num": 2, "input_layout": "BNSD", "keep_prob": 0.5, "sparse_mode": 1}
    got = run_node("SpeedFusionAttention", "mindspore", inputs, outputs, **attrs, offset=9)
    want = speed_fusion_attention(*qkv, atten_mask=mask, seed=5, offset=9, **attrs)
    assert len(got) == outputs
    for a, b in zip(got, want):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b)


def test_same_name_as_input_and_attribute():
    inputs = [*attention_inputs(), *[None] * 8, np.array(1, np.int64)]
    attrs = {"head_num": 2, "input_layout": "BNSD", "seed": 1}
    with pytest.raises(ValueError, match="seed: found as input and as attribute"):
        run_node("SpeedFusionAttention", "mindspore", inputs, **attrs)


def test_unknown_attributes():
    attrs = {"head_num": 2, "input_layout": "BNSD", "sparse_mod": 1}
    with pytest.raises(ValueError, match="unknown attributes sparse_mod"):
        run_node("SpeedFusionAttention", "mindspore", attention_inputs(), **attrs)


def longformer_inputs():
    g = np.random.default_rng(1)
    scale = f32(0.1)
    weight, bias = g.integers(-128, 128, (4, 12), dtype=np.int8), np.zeros(12, f32)
    mask, flags = np.zeros((1, 2), np.float16), np.ones((1, 2), np.int32)
    x = g.integers(-128, 128, (1, 2, 4), dtype=np.int8)
    return [
        x, scale, weight, scale, bias, scale, scale, mask, weight, scale, bias, scale, flags, scale
    ]  # fmt: skip


def test_longformer_node_ignores_unknown_attributes():
    attrs = {"num_heads": 2, "window": 1, "order_input": 1, "order_output": 1}
    with pytest.warns(UserWarning, match="specified_outputs_name"):
        (got,) = run_node(
            "QOrderedLongformerAttention",
            "com.microsoft",
            [np.asarray(x) for x in longformer_inputs()],
            **attrs,
            specified_outputs_name="y",
        )
    assert np.array_equal(got, qordered_longformer_attention(*longformer_inputs(), **attrs)[0])


def linear_inputs():
    g = np.random.default_rng(2)
    x1, x2 = (g.integers(-128, 128, s, dtype=np.int8) for s in ((2, 6), (6, 3)))
    pertoken, bias = (g.uniform(0.5, 2, n).astype(f32) for n in (2, 3))
    return x1, x2, np.full(3, 0.01, f32), pertoken, bias


def test_both_spellings_of_the_int8_linear():
    x1, x2, scale, pertoken, bias = linear_inputs()
    (want,) = linear_a8w8_quant(x1, x2, scale, None, pertoken, bias, output_dtype=16)
    inputs = [x1, x2, scale, None, pertoken, bias]
    (npu,) = run_node("NPUQuantMatmul", "npu", inputs, output_dtype=16)
    inputs = [x1, x2, scale, None, bias, pertoken]
    (plain,) = run_node("QuantBatchMatMul", "", inputs, dtype=27)
    assert npu.dtype == plain.dtype == BF16
    assert np.array_equal(npu, want)
    assert np.array_equal(plain, want)


def test_nsa_node_takes_bfloat16_initializers():
    g = np.random.default_rng(3)
    q, k = g.normal(size=(2, 2, 4)).astype(BF16), g.normal(size=(5, 1, 4)).astype(BF16)
    attrs = {
        "head_num": 2,
        "compress_block_size": 16,
        "compress_stride": 16,
        "select_block_size": 16,
        "select_block_count": 2,
        "actual_seq_qlen": [2],
        "actual_cmp_seq_kvlen": [5],
    }
    names = ["q", "k", "k", "", "", "", "", "sel"]
    node = helper.make_node(
        "NPUNsaCompressAttention", names, ["", "", "y", "i"], domain="npu", **attrs
    )
    model = model_of([node], ["q", "sel"], ["y", "i"], [numpy_helper.from_array(k, "k")])
    y, i = evaluator(model).run(None, {"q": q, "sel": np.array([5])})
    want = nsa_compress_attention(q, k, k, actual_sel_seq_kvlen=[5], **attrs)
    assert y.dtype == BF16
    assert np.array_equal(y, want[2])
    assert np.array_equal(i, want[3])


def test_qordered_matmul_node_without_bias():
    g = np.random.default_rng(4)
    a, b, c = (g.integers(-128, 128, s, dtype=np.int8) for s in ((2, 3), (3, 5), (2, 5)))
    scale = np.array(0.1, f32)
    attrs = {"order_A": 1, "order_B": 0, "order_Y": 1}
    inputs = [a, scale, b, scale, scale, None, c, scale]
    (y,) = run_node("QOrderedMatMul", "com.microsoft", inputs, **attrs)
    assert np.array_equal(y, qordered_matmul(*inputs, **attrs)[0])


def mixed_nodes():
    """relu(packed int8 linear as float32), the scale packed by a node of the graph."""
    return [
        helper.make_node("NPUTransQuantParam", ["scale"], ["packed"], domain="npu"),
        helper.make_node(
            "NPUQuantMatmul", ["x", "w", "packed"], ["h"], domain="npu", output_dtype=10
        ),
        helper.make_node("Cast", ["h"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["y"]),
    ]


def mixed_want(x1, x2, scale):
    return np.maximum(linear_a8w8_quant(x1, x2, scale, output_dtype=10)[0], 0).astype(f32)


def test_mixed_model():
    x1, x2, scale, *_ = linear_inputs()
    constants = [numpy_helper.from_array(x2, "w"), numpy_helper.from_array(scale, "scale")]
    (y,) = evaluator(model_of(mixed_nodes(), ["x"], ["y"], constants)).run(None, {"x": x1})
    assert np.array_equal(y, mixed_want(x1, x2, scale))


def test_inside_functions_and_subgraphs():
    x1, x2, scale, *_ = linear_inputs()
    imports = [helper.make_opsetid(d, v) for d, v in TYPES.items()]
    body = helper.make_function("local", "Body", ["x", "w", "scale"], ["y"], mixed_nodes(), imports)
    branches = [
        helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        )
        for name, nodes in (
            ("then", mixed_nodes()),
            ("else", [helper.make_node("Body", ["x", "w", "scale"], ["y"], domain="local")]),
        )
    ]
    node = helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1])
    model = model_of([node], ["c", "x", "w", "scale"], ["z"], functions=[body])
    for condition in (True, False):
        feeds = {"c": np.array(condition), "x": x1, "w": x2, "scale": scale}
        (y,) = evaluator(model).run(None, feeds)
        assert np.array_equal(y, mixed_want(x1, x2, scale))


def test_operators_without_reference_are_named():
    nodes = [
        helper.make_node("FastGelu", ["x"], ["a"], domain="com.microsoft"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("NoSuchThing", ["b"], ["y"]),
    ]
    message = "no reference for ai.onnx::NoSuchThing, com.microsoft::FastGelu"
    with pytest.raises(UnsupportedError, match=message):
        evaluator(model_of(nodes, ["x"], ["y"]))


def test_functions_of_the_standard_are_evaluated():
    """HardSwish has no implementation of its own in ONNX, only a body."""
    model = model_of([helper.make_node("HardSwish", ["x"], ["y"])], ["x"], ["y"])
    (y,) = evaluator(model).run(None, {"x": np.array([3.0], f32)})
    assert y.item() == 3.0


def test_every_reference_is_wrapped():
    assert sorted(op for _, op in REFERENCES) == [
        "NPUNsaCompressAttention",
        "NPUQuantMatmul",
        "NPUTransQuantParam",
        "QOrderedLongformerAttention",
        "QOrderedMatMul",
        "QuantBatchMatMul",
        "SpeedFusionAttention",
    ]


REFERENCE_FILES = sorted(Path(opferry.reference.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", REFERENCE_FILES, ids=lambda path: path.stem)
def test_references_are_numpy_only(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            assert (path.stem, node.module) == ("whole_model", "runtime.errors")
    allowed = {"numpy", "ml_dtypes"} | ({"onnx"} if path.stem == "whole_model" else set())
    assert roots - set(sys.stdlib_module_names) <= allowed


def test_references_do_not_import_tvm():
    code = (
        "import importlib, sys\n"
        f"for name in {[path.stem for path in REFERENCE_FILES if path.stem != '__init__']}:\n"
        "    importlib.import_module('opferry.reference.' + name)\n"
        "print('tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
