"""Schemas, the checks that need nothing but them, canonical spelling and builders."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper
from onnx.defs import OpSchema

import opferry
from opferry.frontend import schemas
from opferry.frontend.builders import (
    node_model,
)
from opferry.frontend.schemas.check import (
    check_arity,
    check_domain_versions,
    check_nodes,
    check_types,
    decode_attributes,
    dtype_name,
    input_names,
    node_label,
    output_names,
)
from opferry.runtime.errors import (
    InvalidNodeError,
    InvalidTypeError,
    OpferryError,
    UnsupportedError,
)

BF16 = ml_dtypes.bfloat16
ONE = (np.float32, (1,))


def linear(x1=("M", 3), x2=(5, 3), **attrs):
    feeds = {"x1": (np.int8, x1), "x2": (np.int8, x2), "scale": ONE}
    return node_model("NPUQuantMatmul", feeds, **{"transpose_x2": 1, **attrs})


def qordered(a=("B", "M", 3), b=(3, 5), **attrs):
    feeds = {"A": (np.int8, a), "scale_A": ONE, "B": (np.int8, b), "scale_B": ONE, "scale_Y": ONE}
    return node_model(
        "QOrderedMatMul", feeds, **{"order_A": 1, "order_B": 0, "order_Y": 1, **attrs}
    )


def longformer(shape=("B", "S", 6), check=True, **attrs):
    hidden = 6
    feeds = {p.name: ONE for p in schemas.schema(*LONGFORMER).inputs}
    feeds |= {
        "input": (np.int8, shape),
        "weight": (np.int8, (hidden, 3 * hidden)),
        "bias": (np.float32, (3 * hidden,)),
        "mask": (np.float16, shape[:2]),
        "global_weight": (np.int8, (hidden, 3 * hidden)),
        "global_bias": (np.float32, (3 * hidden,)),
        "global": (np.int32, shape[:2]),
    }
    return node_model(LONGFORMER[1], feeds, check=check, **attrs)


def speed(query, dtype=np.float16, outputs=None, **attrs):
    feeds = dict.fromkeys(("query", "key", "value"), (dtype, query))
    return node_model("SpeedFusionAttention", feeds, outputs, **attrs)


def nsa(dtype=BF16, outputs=None, **attrs):
    feeds = {
        "query": (dtype, ("T", 4, 7)),
        "key": (dtype, ("T2", 2, 7)),
        "value": (dtype, ("T2", 2, 5)),
        **dict.fromkeys(
            ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"), (np.int64, ("B",))
        ),
    }
    sizes = {
        "head_num": 4,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 3,
    }
    return node_model("NPUNsaCompressAttention", feeds, outputs, **{**sizes, **attrs})


LONGFORMER = ("com.microsoft", "QOrderedLongformerAttention")


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

INFERENCE = {
    "linear_symbolic_batch": (linear(("B", "M", 3)), {"y": ("int8", ["B", "M", 5])}),
    "linear_float16": (linear(output_dtype=10), {"y": ("float16", ["M", 5])}),
    "linear_bfloat16": (linear(output_dtype=16), {"y": ("bfloat16", ["M", 5])}),
    "linear_int32": (linear(output_dtype=6), {"y": ("int32", ["M", 5])}),
    "linear_transposes": (
        linear((3, 7), (3, 5), transpose_x1=1, transpose_x2=0),
        {"y": ("int8", [7, 5])},
    ),
    "linear_symbol_against_one": (linear(("B", 2, 3), (1, 5, 3)), {"y": ("int8", ["B", 2, 5])}),
    "linear_symbol_against_constant": (
        linear(("B", 2, 3), (4, 5, 3)),
        {"y": ("int8", [4, 2, 5])},
    ),
    "linear_two_symbols": (linear(("B", 2, 3), ("C", 5, 3)), {"y": ("int8", [None, 2, 5])}),
    "linear_rank_of_the_larger": (
        linear((2, 3), (4, 1, 5, 3)),
        {"y": ("int8", [4, 1, 2, 5])},
    ),
    "linear_unknown_dimension": (linear((None, 3)), {"y": ("int8", [None, 5])}),
    "qordered_3d": (qordered(), {"Y": ("int8", ["B", "M", 5])}),
    "qordered_2d_with_batch_of_one": (qordered((4, 3), (1, 3, 5)), {"Y": ("int8", [4, 5])}),
    "longformer": (
        longformer(num_heads=2, window=4, order_input=1, order_output=1),
        {"output": ("int8", ["B", "S", 6])},
    ),
    "speed_bsh": (
        speed(("B", "S", 64), head_num=4, input_layout="BSH"),
        {
            "attention_out": ("float16", ["B", "S", 64]),
            "softmax_max": ("float32", ["B", 4, "S", 8]),
            "softmax_sum": ("float32", ["B", 4, "S", 8]),
            "softmax_out": ("float16", [0]),
            "seed_out": ("int64", []),
            "offset_out": ("int64", []),
            "numels": ("int64", []),
        },
    ),
    "speed_sbh": (
        speed((7, 2, 64), outputs=["softmax_max"], head_num=4, input_layout="SBH"),
        {"softmax_max": ("float32", [2, 4, 7, 8])},
    ),
    "speed_bnsd": (
        speed((2, 4, 7, 3), outputs=["softmax_sum"], head_num=4, input_layout="BNSD"),
        {"softmax_sum": ("float32", [2, 4, 7, 8])},
    ),
    "speed_bsnd": (
        speed((2, 7, 4, 3), BF16, ["softmax_sum", "softmax_out"], head_num=4, input_layout="BSND"),
        {"softmax_sum": ("float32", [2, 4, 7, 8]), "softmax_out": ("bfloat16", [0])},
    ),
    "speed_tnd": (
        speed(("T", 4, 3), np.float32, ["softmax_max"], head_num=4, input_layout="TND"),
        {"softmax_max": ("float32", ["T", 4, 8])},
    ),
    "nsa": (
        nsa(),
        {
            "softmax_max": ("float32", ["T", 4, 8]),
            "softmax_sum": ("float32", ["T", 4, 8]),
            "attention_out": ("bfloat16", ["T", 4, 5]),
            "topk_indices_out": ("int32", ["T", 2, 3]),
        },
    ),
    "nsa_indices_only": (
        nsa(outputs=["topk_indices_out"]),
        {"topk_indices_out": ("int32", ["T", 2, 3])},
    ),
    "trans_quant_param_vector": (
        node_model("NPUTransQuantParam", {"scale": (np.float32, ("N",))}),
        {"y": ("int64", ["N"])},
    ),
    "trans_quant_param_longer_offset": (
        node_model("NPUTransQuantParam", {"scale": ONE, "offset": (np.float32, (9,))}),
        {"y": ("int64", [9])},
    ),
    "trans_quant_param_row": (
        node_model("NPUTransQuantParam", {"scale": (np.float32, (1, 9))}),
        {"y": ("int64", [9])},
    ),
}


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


# -------------------------------------------------------------------------------------- decoding


def node_of(model):
    node = model.graph.node[0]
    return node, schemas.schema(node.domain, node.op_type)


def test_defaults_are_filled_in():
    assert decode_attributes(*node_of(linear())) == {
        "output_dtype": 0,
        "transpose_x1": 0,
        "transpose_x2": 1,
    }
    assert decode_attributes(*node_of(longformer())) == dict.fromkeys(
        (
            "num_heads",
            "window",
            "order_input",
            "order_weight",
            "order_global_weight",
            "order_output",
        ),
        0,
    )


def test_speed_fusion_attention_decodes():
    decoded = decode_attributes(
        *node_of(speed((1, 2, 8), head_num=2, input_layout="BSH", scale=1, prefix=[], sync=True))
    )
    assert decoded == {
        "head_num": 2,
        "input_layout": "BSH",
        "scale": 1.0,
        "keep_prob": 1.0,
        "pre_tokens": 2147483647,
        "next_tokens": 2147483647,
        "inner_precise": 0,
        "sparse_mode": 0,
        "pse_type": 1,
        "gen_mask_parallel": 1,
        "sync": 1,
        "prefix": [],  # the other lists are absent
        "seed": 0,
        "offset": 0,
        "softmax_layout": "",
    }


def test_nsa_decodes():
    feeds = dict.fromkeys(("query", "key", "value"), (np.float16, (4, 2, 3)))
    lists = {"actual_seq_qlen": [4], "actual_cmp_seq_kvlen": (3, 4), "actual_sel_seq_kvlen": [1, 2]}
    sizes = {
        "head_num": 2,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 3,
    }
    model = node_model("NPUNsaCompressAttention", feeds, **sizes, **lists)
    assert decode_attributes(*node_of(model)) == {
        **sizes,
        "scale_value": 1.0,
        "input_layout": "TND",
        "sparse_mode": 0,
        "actual_seq_qlen": [4],
        "actual_cmp_seq_kvlen": [3, 4],
        "actual_sel_seq_kvlen": [1, 2],
        "softmax_out_layout": "",
        "score_shift": 0,
        "masked_rows": "mean",
    }


def reference_attribute():
    found = AttributeProto(name="order_A", type=AttributeProto.INT)
    found.ref_attr_name = "outer"
    return found


def twice():
    model = qordered(name="n7")
    model.graph.node[0].attribute.append(helper.make_attribute("order_B", 0))
    return decode_attributes(*node_of(model))


REFUSED = {
    "unknown": (
        lambda: linear(name="fc1", group_sizes=[1]),
        InvalidNodeError,
        'NPUQuantMatmul node "fc1": attribute "group_sizes": found an unknown attribute, allowed '
        "output_dtype, transpose_x1, transpose_x2 [E-ATTR]",
    ),
    "misspelt": (
        lambda: speed((1, 2, 8), head_num=2, input_layout="BSH", keep_probability=0.5),
        InvalidNodeError,
        'SpeedFusionAttention node "node": attribute "keep_probability": found an unknown',
    ),
    "missing_int": (
        lambda: qordered(order_B=None, name="n7"),
        InvalidNodeError,
        'QOrderedMatMul node "n7": attribute "order_B": found none, allowed one of type INT',
    ),
    "missing_string": (
        lambda: speed((1, 2, 8), head_num=2),
        InvalidNodeError,
        'attribute "input_layout": found none, allowed one of type STRING',
    ),
    "int_as_float": (
        lambda: qordered(order_A=1.0, name="n7"),
        InvalidTypeError,
        'QOrderedMatMul node "n7": attribute "order_A": found type FLOAT, allowed type INT',
    ),
    "float_as_int": (
        lambda: nsa(scale_value=helper.make_attribute("scale_value", 1)),
        InvalidTypeError,
        'NPUNsaCompressAttention node "node": attribute "scale_value": found type INT, allowed '
        "type FLOAT",
    ),
    "string_as_int": (
        lambda: linear(transpose_x1="yes"),
        InvalidTypeError,
        'attribute "transpose_x1": found type STRING, allowed type INT [E-ATTR]',
    ),
    "list_as_int": (
        lambda: speed((1, 2, 8), head_num=2, input_layout="BSH", prefix=3),
        InvalidTypeError,
        'attribute "prefix": found type INT, allowed type INTS',
    ),
    "reference": (
        lambda: qordered(order_A=reference_attribute()),
        InvalidNodeError,
        'attribute "order_A": found a reference to "outer", allowed a value',
    ),
    "twice": (twice, InvalidNodeError, 'attribute "order_B": found more than one, allowed one'),
    "uint8_operand": (
        lambda: node_model(
            "NPUQuantMatmul",
            {"x1": (np.uint8, (2, 3)), "x2": (np.int8, (3, 2)), "scale": ONE},
            name="fc1",
        ),
        InvalidTypeError,
        'NPUQuantMatmul node "fc1": input "x1": found uint8, allowed int8 [E-DTYPE]',
    ),
    "float64_scale": (
        lambda: node_model(
            "NPUQuantMatmul",
            {"x1": (np.int8, (2, 3)), "x2": (np.int8, (3, 2)), "scale": np.ones(1)},
        ),
        InvalidTypeError,
        'input "scale": found float64, allowed bfloat16 or float32 or int64 or uint64 [E-DTYPE]',
    ),
    "mask_float32": (
        lambda: check_types(*node_of(longformer()), {"mask": TensorProto.FLOAT}),
        InvalidTypeError,
        'QOrderedLongformerAttention node "node": input "mask": found float32, allowed float16',
    ),
    "not_a_tensor": (
        lambda: check_types(*node_of(longformer()), {"global": None}),
        InvalidTypeError,
        'input "global": found not a tensor, allowed int32',
    ),
    "two_types_for_one_letter": (
        lambda: node_model(
            "SpeedFusionAttention",
            {
                "query": (np.float16, (1, 2, 8)),
                "key": (BF16, (1, 2, 8)),
                "value": (np.float16, (1, 2, 8)),
            },
            head_num=2,
            input_layout="BSH",
        ),
        InvalidTypeError,
        'input "key": found bfloat16, allowed float16, the type of input "query"',
    ),
    "input_missing": (
        lambda: node_model("NPUQuantMatmul", {"x1": (np.int8, (2, 3)), "scale": ONE}, name="fc1"),
        InvalidNodeError,
        'NPUQuantMatmul node "fc1": input "x2": found none, allowed a tensor; the input is '
        "required [E-ARITY]",
    ),
    "reserved_input": (
        lambda: node_model(
            "SpeedFusionAttention",
            dict.fromkeys(("query", "key", "value", "padding_mask"), (np.float16, (1, 2, 8))),
            head_num=2,
            input_layout="BSH",
        ),
        InvalidNodeError,
        'input "padding_mask": found "padding_mask", allowed none; the input is reserved',
    ),
    "attribute_and_input": (
        lambda: nsa(actual_seq_qlen=[4]),
        InvalidNodeError,
        'input "actual_seq_qlen": found an input and an attribute of this name, allowed one of',
    ),
    "no_output": (
        lambda: nsa(outputs=[]),
        InvalidNodeError,
        'NPUNsaCompressAttention node "node": outputs: found none, allowed at least one',
    ),
}


@pytest.mark.parametrize(("build", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(build, error, text):
    with pytest.raises(error) as caught:
        build()
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError) == (error is InvalidTypeError)


def test_too_many_inputs_and_outputs():
    node, schema = node_of(linear(name="fc1"))
    node.input.extend(["", "", "", "extra"])
    with pytest.raises(InvalidNodeError, match=r"inputs: found 7, allowed at most 6 \[E-ARITY\]"):
        check_arity(node, schema)
    node, schema = node_of(linear(name="fc1"))
    node.output.append("extra")
    with pytest.raises(InvalidNodeError, match=r"outputs: found 2, allowed at most 1 \[E-ARITY\]"):
        check_arity(node, schema)


def test_a_required_output_must_have_a_name():
    node = helper.make_node("Foo", ["a"], ["", "b"], name="f")
    schema = OpSchema(
        "Foo",
        "npu",
        1,
        inputs=[OpSchema.FormalParameter("a", "tensor(float)")],
        outputs=[OpSchema.FormalParameter(n, "tensor(float)") for n in "cd"],
    )
    with pytest.raises(InvalidNodeError, match='Foo node "f": output "c": found none'):
        check_arity(node, schema)


def test_unknown_attributes_of_longformer_are_ignored_with_a_warning():
    model = longformer(check=False, lda_coeff=3, window=4)
    with pytest.warns(UserWarning, match='attribute "lda_coeff": found an unknown attribute'):
        decoded = decode_attributes(*node_of(model))
    assert decoded["window"] == 4
    assert "lda_coeff" not in decoded


NESTED = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21, "npu" : 1]>
    g (bool c, float[2,3] x, int8[3,4] w, float[1] s) => (int8[2,4] y)
    {
        q = Cast <to = 2> (x)
        y = If (c) <
            then_branch = t () => (int8[2,4] a) { [fc1] a = npu.NPUQuantMatmul (q, w, s) },
            else_branch = e () => (int8[2,4] b) { b = npu.NPUQuantMatmul (w, w, s) }
        >
    }""")


def test_check_nodes_finds_types_through_standard_nodes_and_subgraphs():
    with pytest.raises(
        InvalidTypeError, match='NPUQuantMatmul node "fc1": input "x1": found uint8, allowed int8'
    ):
        check_nodes(NESTED)


def test_check_nodes_refuses_what_is_no_tensor():
    model = linear(name="fc1")
    model.graph.input[0].type.CopyFrom(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.INT8, [2, 3]))
    )
    with pytest.raises(InvalidTypeError, match='input "x1": found not a tensor, allowed int8'):
        check_nodes(model)


@pytest.mark.parametrize(("model", "expected"), INFERENCE.values(), ids=INFERENCE)
def test_check_nodes_accepts(model, expected):
    check_nodes(model)


def test_labels_and_names():
    node = helper.make_node("SpeedFusionAttention", ["q", "k", "v", "", "", "m"], ["", "max"])
    schema = schemas.schema("mindspore", "SpeedFusionAttention")
    assert node_label(node) == 'SpeedFusionAttention node "max"'
    assert input_names(node, schema) == {"query": "q", "key": "k", "value": "v", "atten_mask": "m"}
    assert output_names(node, schema) == {"softmax_max": "max"}


# ---------------------------------------------------------------------------- domains and spelling


def with_import(model, domain, version):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kept = [i for i in model.opset_import if i.domain != domain]
    del changed.opset_import[:]
    changed.opset_import.extend(kept)
    if version is not None:
        changed.opset_import.append(helper.make_opsetid(domain, version))
    return changed


DOMAINS = {
    "other_version": (
        with_import(linear(name="fc1"), "npu", 2),
        InvalidNodeError,
        'NPUQuantMatmul node "fc1": opset_import of domain "npu": found version 2, allowed version '
        "1",
    ),
    "not_imported": (
        with_import(speed((1, 2, 8), head_num=2, input_layout="BSH", name="a"), "mindspore", None),
        InvalidNodeError,
        'SpeedFusionAttention node "a": opset_import of domain "mindspore": found none, allowed',
    ),
    "other_version_unused": (
        with_import(linear(), "com.microsoft", 3),
        InvalidNodeError,
        'model: opset_import of domain "com.microsoft": found version 3, allowed version 1',
    ),
    "unknown_operator_in_a_subgraph": (
        onnx.parser.parse_model("""
            <ir_version: 10, opset_import: ["" : 21, "npu" : 1]>
            g (bool c, float[2] x) => (float[2] y)
            {
                y = If (c) <
                    then_branch = t () => (float[2] a) { [odd] a = npu.NPUOther (x) },
                    else_branch = e () => (float[2] b) { b = Identity (x) }
                >
            }"""),
        UnsupportedError,
        'NPUOther node "odd": domain "npu": found operator NPUOther, allowed '
        "NPUNsaCompressAttention, NPUQuantMatmul, NPUTransQuantParam",
    ),
}


@pytest.mark.parametrize(("model", "error", "text"), DOMAINS.values(), ids=DOMAINS)
def test_domains_refused(model, error, text):
    with pytest.raises(error) as caught:
        check_domain_versions(model)
    assert text in str(caught.value)


def test_other_operators_of_com_microsoft_pass():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.FastGelu (x) }""")
    check_domain_versions(model)
