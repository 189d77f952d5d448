"""Schemas: shape inference, registration, public names."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.defs import OpSchema
from schema_cases import INFERENCE, ONE

import opferry
from opferry.frontend import schemas
from opferry.frontend.builders import node_model
from opferry.frontend.schemas.check import dtype_name
from opferry.runtime.errors import OpferryError, UnsupportedError


def outputs_of(model):
    """Graph output name -> (dtype, dimensions; None where unknown)."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)
    found = {}
    for value in inferred.graph.output:
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
        dims = [None if str(d).startswith("unk__") else d for d in dims]
        found[value.name] = (dtype_name(tensor.elem_type), dims)
    return found


# ------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(("model", "expected"), INFERENCE.values(), ids=INFERENCE)
def test_checker_accepts_and_inference_infers(model, expected):
    assert outputs_of(model) == expected


@pytest.mark.parametrize("opset", range(8, onnx.defs.onnx_opset_version() + 1))
@pytest.mark.parametrize(("attrs", "dtype"), [({}, "float16"), ({"dtype": 2}, "int8")])
def test_quant_batch_matmul_is_known_from_opset_8_on(opset, attrs, dtype):
    feeds = {"x1": (np.int8, ("M", 3)), "x2": (np.int8, (3, 5)), "scale": ONE}
    model = node_model("QuantBatchMatMul", feeds, opset=opset, **attrs)
    assert outputs_of(model) == {"y": (dtype, ["M", 5])}


@pytest.mark.parametrize(("code", "dtype"), [(1, "float16"), (3, "int32"), (27, "bfloat16")])
def test_quant_batch_matmul_reads_graph_engine_codes(code, dtype):
    feeds = {"x1": (np.int8, ("M", 3)), "x2": (np.int8, (3, 5)), "scale": ONE}
    assert outputs_of(node_model("QuantBatchMatMul", feeds, dtype=code)) == {"y": (dtype, ["M", 5])}


def test_inference_reaches_through_a_mixed_model():
    """Shapes of standard nodes behind ours, and a query that a standard node makes."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "mindspore" : 1, "npu" : 1]>
        mixed (float16[B,S,32] x, int8[M,4] a, int8[9,4] w, float[9] s)
            => (float[B,S,32] y, int8[M,9] z)
        {
            q = Add (x, x)
            o, , sum = mindspore.SpeedFusionAttention <head_num = 2, input_layout = "BSH"> (q, q, q)
            y = Cast <to = 1> (o)
            l = Log (sum)
            z = npu.NPUQuantMatmul <transpose_x2 = 1> (a, w, s)
        }""")
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in inferred.graph.value_info
    }
    assert shapes["o"] == ["B", "S", 32]
    assert shapes["l"] == ["B", 2, "S", 8]


MALFORMED = {
    "no_inputs": lambda node: node.ClearField("input"),
    "empty_inputs": lambda node: node.input.__setitem__(slice(None), [""] * len(node.input)),
    "no_attributes": lambda node: node.ClearField("attribute"),
    "attributes_of_another_type": lambda node: [
        a.CopyFrom(helper.make_attribute(a.name, 0.5)) for a in node.attribute
    ],
    "negative_attributes": lambda node: [
        a.CopyFrom(helper.make_attribute(a.name, -3)) for a in node.attribute
    ],
    "scalar_inputs": lambda node: None,
    "too_many_outputs": lambda node: node.output.extend(f"extra{i}" for i in range(9)),
}


@pytest.mark.parametrize("spoil", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("schema", schemas.SCHEMAS, ids=lambda s: s.name)
def test_inference_survives_malformed_nodes(schema, spoil):
    """What is wrong is for the checks to say; an exception in here would escape every mode."""
    feeds = {p.name: (np.int8, ()) for p in schema.inputs}
    required = {
        name: "BSH" if a.type == OpSchema.AttrType.STRING else 1
        for name, a in schema.attributes.items()
        if a.required
    }
    model = node_model(schema.name, feeds, check=False, **required)
    spoil(model.graph.node[0])
    for value in model.graph.output:
        value.ClearField("type")
    onnx.shape_inference.infer_shapes(model)


# ---------------------------------------------------------------------------------- registration


def test_registering_again_does_nothing():
    schemas.register()
    schemas.register()
    for ours in schemas.SCHEMAS:
        assert onnx.defs.has(ours.name, ours.domain)
        assert schemas.schema(ours.domain, ours.name) is ours
    assert schemas.schema("ai.onnx", "QuantBatchMatMul").since_version == 8
    assert schemas.schema("npu", "Relu") is None


def test_a_foreign_registration_that_differs_is_refused_by_name():
    ours = schemas.schema("npu", "NPUTransQuantParam")
    foreign = OpSchema(
        ours.name, ours.domain, 1, inputs=[OpSchema.FormalParameter("scale", "tensor(double)")]
    )
    onnx.defs.deregister_schema(ours.name, 1, ours.domain)
    onnx.defs.register_schema(foreign)
    try:
        with pytest.raises(UnsupportedError, match=r'"npu::NPUTransQuantParam" is already') as e:
            schemas.register()
        assert "found other inputs, outputs, attributes than ours" in str(e.value)
    finally:
        onnx.defs.deregister_schema(ours.name, 1, ours.domain)
        schemas.register()


def run_python(script):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_importing_opferry_registers_and_leaves_tvm_alone():
    script = """
import onnx, sys
import opferry, opferry.frontend.builders, opferry.frontend.schemas.canonical
assert "tvm" not in sys.modules
print(onnx.defs.has("QOrderedMatMul", "com.microsoft"), onnx.defs.has("QuantBatchMatMul"))
"""
    assert run_python(script) == "True True"


def test_importing_opferry_without_onnx():
    script = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "onnx" else find(name)
import opferry, sys
print("onnx" in sys.modules, opferry.OpferryError.__mro__[1].__name__)
"""
    assert run_python(script) == "False ValueError"


def test_importing_opferry_beside_a_foreign_registration_warns():
    script = """
import onnx.defs, warnings
onnx.defs.register_schema(onnx.defs.OpSchema("QOrderedMatMul", "com.microsoft", 1))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import opferry
print([str(w.message)[:53] for w in caught])
"""
    assert run_python(script) == """['operator "com.microsoft::QOrderedMatMul" is already r']"""


def test_public_names():
    assert set(opferry.__all__) <= set(dir(opferry))
    assert opferry.OpferryError is OpferryError
    assert opferry.node_model is node_model
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = opferry.no_such_name
