"""Canonical spelling: QuantBatchMatMul becomes NPUQuantMatmul, stray attributes go."""

import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from opferry.frontend.builders import node_model
from opferry.frontend.schemas.canonical import canonicalize
from opferry.frontend.schemas.check import check_domain_versions
from opferry.frontend.schemas.qordered_longformer_attention import SCHEMA as LONGFORMER
from opferry.runtime.errors import InvalidNodeError, InvalidTypeError


def quant_batch_matmul(inputs=("x1", "x2", "scale"), name="q0", opset=13, **attrs):
    """A model with one QuantBatchMatMul node that nothing has judged."""
    node = helper.make_node("QuantBatchMatMul", inputs, ["y"], name=name, **attrs)
    types = {"x1": (TensorProto.INT8, ["M", 3]), "x2": (TensorProto.INT8, [3, 5])}
    floats = (TensorProto.FLOAT, [5])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(i, *types.get(i, floats)) for i in inputs if i],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["M", 5])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def longformer(**attrs):
    """A model with one QOrderedLongformerAttention node that nothing has judged."""
    feeds = {p.name: (np.float32, (1,)) for p in LONGFORMER.inputs}
    feeds |= dict.fromkeys(("input", "weight", "global_weight"), (np.int8, (1, 8, 6)))
    feeds |= {"mask": (np.float16, (1, 8)), "global": (np.int32, (1, 8))}
    return node_model("QOrderedLongformerAttention", feeds, check=False, **attrs)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["x1", "x2", "scale"], ["x1", "x2", "scale"]),
        (["x1", "x2", "scale", "o"], ["x1", "x2", "scale", "o"]),
        (["x1", "x2", "scale", "", "b"], ["x1", "x2", "scale", "", "", "b"]),
        (["x1", "x2", "scale", "", "", "p"], ["x1", "x2", "scale", "", "p"]),
        (["x1", "x2", "scale", "o", "b", "p"], ["x1", "x2", "scale", "o", "p", "b"]),
        (["x1", "x2", "scale", "", "", ""], ["x1", "x2", "scale"]),
    ],
)
def test_bias_and_pertoken_scale_trade_places(inputs, expected):
    model = quant_batch_matmul(inputs)
    node = canonicalize(model).graph.node[0]
    assert (node.domain, node.op_type, node.name) == ("npu", "NPUQuantMatmul", "q0")
    assert list(node.input) == expected
    assert model.graph.node[0].op_type == "QuantBatchMatMul"


@pytest.mark.parametrize(
    ("attrs", "code"),
    [({}, 10), ({"dtype": 1}, 10), ({"dtype": 2}, 3), ({"dtype": 3}, 6), ({"dtype": 27}, 16)],
)
def test_graph_engine_codes_become_onnx_codes(attrs, code):
    model = canonicalize(quant_batch_matmul(transpose_x2=1, **attrs))
    attributes = {a.name: helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert attributes == {"output_dtype": code, "transpose_x1": 0, "transpose_x2": 1}
    assert {i.domain: i.version for i in model.opset_import} == {"": 13, "npu": 1}


def test_canonical_model_passes_the_checker():
    model = canonicalize(quant_batch_matmul(["x1", "x2", "scale", "", "b", "p"]))
    onnx.checker.check_model(model, full_check=True)
    check_domain_versions(model)


def test_canonicalize_reaches_subgraphs_and_functions():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        g (bool c, int8[2,3] x, int8[3,4] w, float[1] s) => (float16[2,4] y)
        {
            y = If (c) <
                then_branch = t () => (float16[2,4] a) { a = QuantBatchMatMul (x, w, s) },
                else_branch = e () => (float16[2,4] b) { b = local.F (x, w, s) }
            >
        }
        <domain: "local", opset_import: ["" : 17]>
        F (x, w, s) => (y) { y = QuantBatchMatMul (x, w, s) }""")
    model = canonicalize(model)
    branch = model.graph.node[0].attribute[0].g.node[0]
    body = model.functions[0]
    assert (branch.op_type, body.node[0].op_type) == ("NPUQuantMatmul", "NPUQuantMatmul")
    assert {i.domain for i in model.opset_import} == {"", "local", "npu"}
    assert {i.domain for i in body.opset_import} == {"", "npu"}
    onnx.checker.check_model(model, full_check=True)


NOT_CANONICAL = {
    "code_zero": ({"dtype": 0}, InvalidNodeError, "found 0, allowed 1 (float16), 2 (int8)"),
    "onnx_code": ({"dtype": 10}, InvalidNodeError, "found 10, allowed 1 (float16), 2 (int8)"),
    "code_type": ({"dtype": "int8"}, InvalidTypeError, 'attribute "dtype": found type STRING'),
    "flag": ({"transpose_x1": 2}, InvalidNodeError, '"transpose_x1": found 2, allowed 0 or 1'),
    "unknown": ({"group": 1}, InvalidNodeError, 'attribute "group": found an unknown attribute'),
    "opset": ({"opset": 7}, InvalidNodeError, "found version 7, allowed version 8 or later"),
    "arity": ({"inputs": ["x1", "x2"]}, InvalidNodeError, 'input "scale": found none'),
}


@pytest.mark.parametrize(("kwargs", "error", "text"), NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_quant_batch_matmul_refused(kwargs, error, text):
    with pytest.raises(error) as caught:
        canonicalize(quant_batch_matmul(**kwargs))
    assert str(caught.value).startswith('QuantBatchMatMul node "q0": ')
    assert text in str(caught.value)
    assert text.startswith("found version") or "[E-" in str(caught.value)


def test_canonicalize_drops_unknown_attributes_of_longformer():
    model = longformer(name="l0", training=0, window=4)
    with pytest.warns(UserWarning, match='node "l0": attributes: found unknown training, ignored'):
        model = canonicalize(model)
    assert [a.name for a in model.graph.node[0].attribute] == ["window"]
    onnx.checker.check_model(model, full_check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canonicalize(model)
