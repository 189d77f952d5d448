"""mindspore::SpeedFusionAttention: scaled dot product attention with bias, mask and dropout."""

from onnx import AttributeProto, TensorProto
from onnx.shape_inference import InferenceContext

from . import infer
from .define import (
    attribute,
    define,
    list_attribute,
    optional,
    parameter,
    required_attribute,
    tensors,
)

_BATCH_SEQUENCE_AXES = {"BSH": (0, 1), "SBH": (1, 0), "BNSD": (0, 2), "BSND": (0, 1)}
_RANK = {"BSH": 3, "SBH": 3, "BNSD": 4, "BSND": 4, "TND": 3}
_INT64_LIST = "also an attribute of the same name; giving both is an error"


def _infer(ctx: InferenceContext) -> None:
    """All outputs from query's shape, head_num and input_layout; unknown dimensions pass through.

    attention_out is query's shape; softmax_max and softmax_sum are (B, head_num, S1, 8) whatever
    the layout, (T1, head_num, 8) for TND; softmax_out is (0,); seed, offset, numels are scalars.
    """
    dtype = infer.elem_type(ctx, 0)
    query = infer.shape(ctx, 0)
    layout = infer.string_attribute(ctx, "input_layout")
    heads = infer.as_dim(infer.int_attribute(ctx, "head_num"))
    softmax = None
    if query is not None and _RANK.get(layout) == len(query):
        if layout == "TND":
            softmax = [query[0], heads, 8]
        else:
            batch, sequence = _BATCH_SEQUENCE_AXES[layout]
            softmax = [query[batch], heads, query[sequence], 8]
    infer.set_output(ctx, 0, dtype, query)
    infer.set_output(ctx, 1, TensorProto.FLOAT, softmax)
    infer.set_output(ctx, 2, TensorProto.FLOAT, softmax)
    infer.set_output(ctx, 3, dtype, [0])
    for scalar in (4, 5, 6):
        infer.set_output(ctx, scalar, TensorProto.INT64, [])


SCHEMA = define(
    "mindspore",
    "SpeedFusionAttention",
    "Dropout(Softmax(Mask(score), atten_mask), keep_prob) * value with position bias, "
    "grouped-query heads, five layouts and packed sequences of different lengths; forward only.",
    inputs=[
        parameter("query", "T", "(B,S1,H1), (S1,B,H1), (B,N1,S1,D), (B,S1,N1,D) or (T1,N1,D)"),
        parameter("key", "T", "by input_layout, N2 heads, S2 keys"),
        parameter("value", "T", "as key"),
        optional("pse", "P", "position bias in query's type, or float32 slopes for pse_type 2, 3"),
        optional("padding_mask", "A", "reserved: must be absent"),
        optional("atten_mask", "M", "non-zero drops the pair; shape by sparse_mode"),
        optional("prefix", "I0", f"(B,), sparse_mode 5; {_INT64_LIST}"),
        optional("actual_seq_qlen", "I1", f"cumulative query lengths, TND; {_INT64_LIST}"),
        optional("actual_seq_kvlen", "I2", f"cumulative key lengths, TND; {_INT64_LIST}"),
        optional("q_start_idx", "I3", f"(1,); {_INT64_LIST}"),
        optional("kv_start_idx", "I4", f"(1,); {_INT64_LIST}"),
        optional("seed", "I5", f"() or (1,), key of the dropout generator; {_INT64_LIST}"),
        optional("offset", "I6", f"() or (1,), offset of the dropout generator; {_INT64_LIST}"),
    ],
    outputs=[
        optional("attention_out", "T", "query's shape"),
        optional("softmax_max", "L", "(B, N1, S1, 8), TND (T1, N1, 8); row maximum, 8 times"),
        optional("softmax_sum", "L", "as softmax_max; row sum before dropout, 8 times"),
        optional("softmax_out", "T", "(0,): reserved, always empty"),
        optional("seed", "J", "(): the seed that was used"),
        optional("offset", "J", "(): the offset that was used"),
        optional("numels", "J", "(): number of dropout decisions"),
    ],
    types={
        "T": tensors("float16", "bfloat16", "float"),
        "P": tensors("float16", "bfloat16", "float"),
        "A": tensors("float16", "bfloat16", "float", "bool", "uint8", "int8", "int32", "int64"),
        "M": tensors("bool", "uint8"),
        # Each integer input may be of either width, whatever the others are.
        **{f"I{k}": tensors("int64", "int32") for k in range(7)},
        "L": tensors("float"),
        "J": tensors("int64"),
    },
    attributes=[
        required_attribute("head_num", "Number of query heads N1, 1..256."),
        required_attribute("input_layout", "BSH, SBH, BNSD, BSND or TND.", AttributeProto.STRING),
        attribute("scale", 1.0, "Finite factor of the score."),
        attribute("keep_prob", 1.0, "Probability of keeping a weight, in (0, 1]."),
        attribute("pre_tokens", 2147483647, "Keys before the diagonal, modes 0 and 4."),
        attribute("next_tokens", 2147483647, "Keys after the diagonal, modes 0 and 4."),
        attribute("inner_precise", 0, "Reserved, no effect."),
        attribute("sparse_mode", 0, "Mask mode 0..5."),
        attribute("pse_type", 1, "0, 1: bias tensor; 2, 3: slopes of a generated bias."),
        attribute("gen_mask_parallel", 1, "No effect."),
        attribute("sync", 0, "No effect."),
        list_attribute("prefix", "Constant form of the input."),
        list_attribute("actual_seq_qlen", "Constant form of the input."),
        list_attribute("actual_seq_kvlen", "Constant form of the input."),
        list_attribute("q_start_idx", "Constant form of the input; one value, absent = [0]."),
        list_attribute("kv_start_idx", "Constant form of the input; one value, absent = [0]."),
        attribute("seed", 0, "Constant form of the input."),
        attribute("offset", 0, "Constant form of the input."),
        attribute("softmax_layout", "", 'Order of the softmax outputs in TND: "" or "TND".'),
    ],
    infer=_infer,
)
