"""Builders: single-node models, packed scales, nodes under the names they have at home."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from opferry.frontend import schemas
from opferry.frontend.builders import (
    linear_a8w8_quant,
    node_model,
    speed_fusion_attention,
)
from opferry.frontend.quant_param import npu_trans_quant_param
from opferry.frontend.schemas.check import decode_attributes
from opferry.runtime.errors import InvalidNodeError, InvalidTypeError

BF16 = ml_dtypes.bfloat16
ONE = (np.float32, (1,))


def f32(*shape):
    return np.ones(shape, np.float32)


def test_node_model_keeps_arrays_and_symbols():
    weight = np.arange(15, dtype=np.int8).reshape(5, 3)
    bias = np.array([1.5, -2.0, 0.25, 3.0, -0.5], BF16)
    model = node_model(
        "NPUQuantMatmul",
        {
            "x1": np.zeros((2, 4, 3), np.int8),
            "x2": weight,
            "scale": ONE,
            "offset": None,
            "bias": bias,
        },
        initializers=["x2", "bias"],
        symbolic={"x1": ["B", None, None]},
        transpose_x2=1,
        output_dtype=TensorProto.BFLOAT16,
        opset=18,
    )
    assert [i.name for i in model.graph.input] == ["x1", "scale"]
    assert list(model.graph.node[0].input) == ["x1", "x2", "scale", "", "", "bias"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(stored["x2"], weight)
    np.testing.assert_array_equal(stored["bias"], bias)
    assert stored["bias"].dtype == BF16
    assert model.graph.output[0] == helper.make_tensor_value_info(
        "y", TensorProto.BFLOAT16, ["B", 4, 5]
    )
    assert {i.domain: i.version for i in model.opset_import} == {"": 18, "npu": 1}


def test_node_model_leaves_shapes_to_the_operator():
    """No softmax shape can be inferred; the refusal is the compiler's, in its own words."""
    feeds = dict.fromkeys(("query", "key", "value"), (np.float16, (2, 8)))
    model = node_model("SpeedFusionAttention", feeds, head_num=2, input_layout="BSH")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.output[1] == helper.make_tensor_value_info(
        "softmax_max", TensorProto.FLOAT, [None]
    )


def test_packing_matches_the_worked_example():
    scale = np.array([0.3, 0.0101, 0.05], np.float32)
    packed = npu_trans_quant_param(scale, np.array([2.5, -7, -200], np.float32))
    assert packed.dtype == np.int64
    assert packed.tolist() == [70644672331776, 139776424763392, 113250726100992]


@pytest.mark.parametrize(
    ("offset", "field"),
    [(400.7, 255), (-300.2, -256), (2.5, 2), (3.5, 4), (-2.5, -2), (0.0, 0), (-1.0, -1)],
)
def test_packed_offset(offset, field):
    packed = npu_trans_quant_param(np.ones(1, np.float32), np.array([offset], np.float32))
    # 1.0 is 0x3F800000; bit 46 is always set
    assert packed.tolist() == [0x3F800000 | (field % 512) << 37 | 1 << 46]


@pytest.mark.parametrize(
    ("bits", "truncated", "rounded"),
    [
        (0x3F800FFF, 0x3F800000, 0x3F800000),  # below half
        (0x3F801000, 0x3F800000, 0x3F800000),  # tie, even below
        (0x3F803000, 0x3F802000, 0x3F804000),  # tie, odd below
        (0x3F801001, 0x3F800000, 0x3F802000),  # above half
        (0x3FFFFFFF, 0x3FFFE000, 0x40000000),  # carry into the exponent
        (0xBF803000, 0xBF802000, 0xBF804000),  # the sign stays
        (0x7F7FFFFF, 0x7F7FE000, 0x7F800000),  # carry to infinity
        (0x807FFFFF, 0x807FE000, 0x80000000),  # subnormal: signed zero
        (0x00002000, 0x00002000, 0x00000000),
        (0x7FC03000, 0x7FC02000, 0x7FC02000),  # exponent 255: truncated
    ],
)
def test_packed_scale(bits, truncated, rounded):
    scale = np.array([bits], np.uint32).view(np.float32)
    assert npu_trans_quant_param(scale).tolist() == [truncated | 1 << 46]
    assert npu_trans_quant_param(scale, round_mode=1).tolist() == [rounded | 1 << 46]


def test_packing_broadcasts():
    one, many = np.array([1.0], np.float32), np.array([1, -2, 3], np.float32)
    assert npu_trans_quant_param(one, many).shape == (3,)
    assert npu_trans_quant_param(many[None], one).shape == (3,)
    assert npu_trans_quant_param(many[None, ::-1]).tolist()[0] == 0x40400000 | 1 << 46


BUILDERS = {
    "unknown_feed": (
        lambda: node_model("NPUTransQuantParam", {"scales": f32(1)}, name="t"),
        InvalidNodeError,
        "NPUTransQuantParam node \"t\": feeds: found ['scales'], allowed scale, offset",
    ),
    "unknown_output": (
        lambda: node_model("NPUNsaCompressAttention", {}, ["topk"]),
        InvalidNodeError,
        "outputs: found ['topk'], allowed softmax_max, softmax_sum, attention_out, topk_indices",
    ),
    "unknown_operator": (
        lambda: node_model("Relu", {}),
        InvalidNodeError,
        "node_model: op_type: found Relu, allowed QOrderedMatMul, QOrderedLongformerAttention",
    ),
    "symbolic_axis": (
        lambda: node_model("NPUTransQuantParam", {"scale": f32(1)}, symbolic={"scale": {1: "N"}}),
        InvalidNodeError,
        'node_model: symbolic "scale": found axes [1], allowed axes of rank 1',
    ),
    "initializer_without_data": (
        lambda: node_model("NPUTransQuantParam", {"scale": ONE}, initializers=["scale"]),
        InvalidNodeError,
        'node_model: initializer "scale": found a type without data, allowed an array',
    ),
    "packing_float64": (
        lambda: npu_trans_quant_param(np.ones(3)),
        InvalidTypeError,
        "npu_trans_quant_param: scale: found float64, allowed float32",
    ),
    "packing_scalar": (
        lambda: npu_trans_quant_param(f32()),
        InvalidNodeError,
        "scale: found shape (), allowed (t,) or (1, n)",
    ),
    "packing_matrix": (
        lambda: npu_trans_quant_param(f32(2, 3)),
        InvalidNodeError,
        "scale: found shape (2, 3), allowed (t,) or (1, n)",
    ),
    "packing_lengths": (
        lambda: npu_trans_quant_param(f32(3), f32(2)),
        InvalidNodeError,
        "offset: found length 2, allowed length 1 or 3",
    ),
    "packing_round_mode": (
        lambda: npu_trans_quant_param(f32(3), round_mode=2),
        InvalidNodeError,
        "round_mode: found 2, allowed 0 or 1",
    ),
    "packing_round_mode_type": (
        lambda: npu_trans_quant_param(f32(3), round_mode="up"),
        InvalidTypeError,
        "round_mode: found 'up', allowed an int",
    ),
    "linear_int32": (
        lambda: linear_a8w8_quant(4, 5, output_dtype=np.int32),
        InvalidNodeError,
        'LinearA8W8Quant node "linear": output_dtype: found int32, allowed None or int8, float16, '
        "bfloat16 [E-ATTR]",
    ),
    "linear_no_dtype": (
        lambda: linear_a8w8_quant(4, 5, output_dtype="half a byte"),
        InvalidTypeError,
        "output_dtype: found 'half a byte', allowed None or a dtype [E-ATTR]",
    ),
    "linear_offset": (
        lambda: linear_a8w8_quant(4, 5, offset=True, output_dtype=np.float16),
        InvalidNodeError,
        "offset: found with float16 output, allowed int8 output only [E-COMBO]",
    ),
    "linear_pertoken": (
        lambda: linear_a8w8_quant(4, 5, pertoken_scale=True),
        InvalidNodeError,
        "pertoken_scale: found with int8 output, allowed float16 or bfloat16 output only [E-COMBO]",
    ),
    "linear_size": (
        lambda: linear_a8w8_quant(4, 0),
        InvalidNodeError,
        "out_features: found 0, allowed at least 1",
    ),
    "linear_limit": (
        lambda: linear_a8w8_quant(65536, 1),
        InvalidNodeError,
        "in_features: found 65536, allowed at most 65535 [E-LIMIT]",
    ),
    "linear_size_type": (
        lambda: linear_a8w8_quant(True, 5),
        InvalidTypeError,
        "in_features: found True of type bool, allowed an int",
    ),
    "linear_flag_type": (
        lambda: linear_a8w8_quant(4, 5, bias=1),
        InvalidTypeError,
        "bias: found 1 of type int, allowed a bool",
    ),
    "speed_tensor": (
        lambda: speed_fusion_attention("q", "k", f32(1), 2, "BSH"),
        InvalidTypeError,
        'SpeedFusionAttention node "attention_out": input "value": found array([1.]',
    ),
    "speed_required": (
        lambda: speed_fusion_attention("q", "k", "", 2, "BSH", name="a0"),
        InvalidNodeError,
        'SpeedFusionAttention node "a0": input "value": found none',
    ),
    "speed_padding_mask": (
        lambda: speed_fusion_attention("q", "k", "v", 2, "BSH", padding_mask="p"),
        InvalidNodeError,
        'input "padding_mask": found "p", allowed none; the input is reserved',
    ),
    "speed_scale": (
        lambda: speed_fusion_attention("q", "k", "v", 2, "BSH", scale="big"),
        InvalidTypeError,
        'attribute "scale": found type STRING, allowed type FLOAT',
    ),
    "speed_flag": (
        lambda: speed_fusion_attention("q", "k", "v", 2, "BSH", sync="yes"),
        InvalidTypeError,
        'attribute "sync": found type STRING, allowed type INT',
    ),
    "speed_start": (
        lambda: speed_fusion_attention("q", "k", "v", 2, "BSH", q_start_idx=3),
        InvalidTypeError,
        'attribute "q_start_idx": found type INT, allowed type INTS',
    ),
}


@pytest.mark.parametrize(("build", "error", "text"), BUILDERS.values(), ids=BUILDERS)
def test_builders_refuse(build, error, text):
    with pytest.raises(error) as caught:
        build()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "inputs", "code"),
    [
        ({}, ["x", "fc.weight", "fc.scale", "", "", "fc.bias"], 3),
        ({"bias": False}, ["x", "fc.weight", "fc.scale"], 3),
        ({"bias": False, "offset": True}, ["x", "fc.weight", "fc.scale", "fc.offset"], 3),
        (
            {"pertoken_scale": True, "output_dtype": BF16},
            ["x", "fc.weight", "fc.scale", "", "fc.pertoken_scale", "fc.bias"],
            16,
        ),
        ({"output_dtype": "float16", "bias": False}, ["x", "fc.weight", "fc.scale"], 10),
    ],
)
def test_linear_module_node(arguments, inputs, code):
    node = linear_a8w8_quant(512, 128, name="fc", **arguments)
    assert (node.domain, node.op_type, list(node.output)) == ("npu", "NPUQuantMatmul", ["y"])
    assert list(node.input) == inputs
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"output_dtype": code, "transpose_x2": 1}


def test_speed_fusion_attention_node():
    node = speed_fusion_attention(
        "q",
        "k",
        "v",
        4,
        "TND",
        atten_mask="mask",
        scale=2,
        sparse_mode=3,
        sync=True,
        actual_seq_qlen="lengths",
        actual_seq_kvlen=[3, 7],
        seed="s",
        offset=12,
        outputs=["out", "", "sum"],
    )
    assert (node.domain, node.op_type) == ("mindspore", "SpeedFusionAttention")
    assert list(node.input) == ["q", "k", "v", "", "", "mask", "", "lengths", "", "", "", "s"]
    assert list(node.output) == ["out", "", "sum"]
    decoded = decode_attributes(node, schemas.schema("mindspore", "SpeedFusionAttention"))
    assert decoded["scale"] == 2.0
    assert decoded["actual_seq_kvlen"] == [3, 7]
    assert decoded["offset"] == 12
    assert decoded["sync"] == 1
    assert not {"seed", "actual_seq_qlen"} & {a.name for a in node.attribute}
