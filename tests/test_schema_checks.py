"""The checks that need nothing but a schema: attributes, arity, types, domains, names."""

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper
from onnx.defs import OpSchema
from schema_cases import BF16, INFERENCE, ONE, linear, longformer, nsa, qordered, speed

from opferry.frontend import schemas
from opferry.frontend.builders import node_model
from opferry.frontend.schemas.check import (
    check_arity,
    check_domain_versions,
    check_nodes,
    check_types,
    decode_attributes,
    input_names,
    node_label,
    output_names,
)
from opferry.runtime.errors import InvalidNodeError, InvalidTypeError, UnsupportedError


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
