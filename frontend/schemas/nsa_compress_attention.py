"""npu::NPUNsaCompressAttention: attention over compressed keys, and the blocks it would select."""

from onnx import TensorProto
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

_BOTH = "this or the attribute of the same name"


def _infer(ctx: InferenceContext) -> None:
    """T and N1 from query, N2 from key, Dv from value, k from select_block_count."""
    tokens, query_heads, _ = infer.ranked_shape(ctx, 0, 3)
    _, key_heads, _ = infer.ranked_shape(ctx, 1, 3)
    _, _, value_size = infer.ranked_shape(ctx, 2, 3)
    count = infer.as_dim(infer.int_attribute(ctx, "select_block_count"))
    infer.set_output(ctx, 0, TensorProto.FLOAT, [tokens, query_heads, 8])
    infer.set_output(ctx, 1, TensorProto.FLOAT, [tokens, query_heads, 8])
    infer.set_output(ctx, 2, infer.elem_type(ctx, 0), [tokens, query_heads, value_size])
    infer.set_output(ctx, 3, TensorProto.INT32, [tokens, key_heads, count])


SCHEMA = define(
    "npu",
    "NPUNsaCompressAttention",
    "Dense attention of packed query rows over compressed keys and values, importance scores of "
    "selection blocks from the same probabilities, and per key/value head the indices of the "
    "select_block_count best blocks (Native Sparse Attention).",
    inputs=[
        parameter("query", "F", "(T, N1, Dqk)"),
        parameter("key", "F", "(T2, N2, Dqk)"),
        parameter("value", "F", "(T2, N2, Dv), Dv <= Dqk"),
        optional("atten_mask", "M", "(>= max Sq, >= max CmpSkv); non-zero = masked out"),
        optional("topk_mask", "S", "(>= max Sq, >= max SelSkv); non-zero = forced in"),
        optional("actual_seq_qlen", "I", f"(B,) prefix sums of the query lengths; {_BOTH}"),
        optional("actual_cmp_seq_kvlen", "I", f"(B,) prefix sums, compressed keys; {_BOTH}"),
        optional("actual_sel_seq_kvlen", "I", f"(B,) prefix sums, selection blocks; {_BOTH}"),
    ],
    outputs=[
        optional("softmax_max", "L", "(T, N1, 8): row maximum, 8 times"),
        optional("softmax_sum", "L", "(T, N1, 8): row sum, 8 times"),
        optional("attention_out", "F", "(T, N1, Dv)"),
        optional("topk_indices_out", "K", "(T, N2, k): block indices, -1 where there are fewer"),
    ],
    types={
        "F": tensors("float16", "bfloat16", "float"),
        "M": tensors("bool", "uint8"),
        "S": tensors("bool", "uint8"),
        "I": tensors("int64"),
        "L": tensors("float"),
        "K": tensors("int32"),
    },
    attributes=[
        attribute("scale_value", 1.0, "Finite factor of the score, usually Dqk ** -0.5."),
        required_attribute("head_num", "Number of query heads N1."),
        attribute("input_layout", "TND", "TND only."),
        attribute("sparse_mode", 0, "0 or 1, alike: masks apply when their inputs are present."),
        required_attribute("compress_block_size", "l: multiple of 16, >= 16."),
        required_attribute("compress_stride", "d: multiple of 16, 16..l."),
        required_attribute("select_block_size", "l': multiple of 16 and of d, >= l."),
        required_attribute("select_block_count", "k >= 1."),
        list_attribute("actual_seq_qlen", "Constant form of the input."),
        list_attribute("actual_cmp_seq_kvlen", "Constant form of the input."),
        list_attribute("actual_sel_seq_kvlen", "Constant form of the input."),
        attribute("softmax_out_layout", "", '"" (head-major per sequence) or "same_as_input".'),
        attribute("score_shift", 0, "Shift of the importance window, 0..l'/d."),
        attribute("masked_rows", "mean", 'Rows whose keys are all masked: "mean" or "zero".'),
    ],
    infer=_infer,
)
