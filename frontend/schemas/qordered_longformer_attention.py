"""com.microsoft::QOrderedLongformerAttention: a quantised Longformer self-attention layer."""

from onnx import TensorProto
from onnx.shape_inference import InferenceContext

from . import infer
from .define import attribute, define, parameter, tensors


def _infer(ctx: InferenceContext) -> None:
    """output: int8, (B, S, H) as input."""
    infer.set_output(ctx, 0, TensorProto.INT8, infer.shape(ctx, 0))


SCHEMA = define(
    "com.microsoft",
    "QOrderedLongformerAttention",
    "Fused int8 QKV projection, a second projection for global queries, sliding-window attention "
    "(|i - j| <= window) with global tokens in float32, result quantised to int8.",
    inputs=[
        parameter("input", "Q", "(B, S, H), stored in order_input"),
        parameter("scale_input", "S", "one element"),
        parameter("weight", "Q", "(H, 3H) = [Wq | Wk | Wv], in x out, stored in order_weight"),
        parameter("scale_weight", "S", "one element, (3H,) or (H,)"),
        parameter("bias", "S", "(3H,), already divided by scale_qkv_gemm"),
        parameter("scale_bias", "S", "reserved, ignored"),
        parameter("scale_qkv_gemm", "S", "one element"),
        parameter("mask", "F", "(B, S), additive: 0 token, negative padding"),
        parameter("global_weight", "Q", "(H, 3H), stored in order_global_weight"),
        parameter("scale_global_weight", "S", "one element, (3H,) or (H,)"),
        parameter("global_bias", "S", "(3H,), already divided by scale_global_gemm"),
        parameter("scale_global_gemm", "S", "one element"),
        parameter("global", "G", "(B, S), non-zero marks a global token"),
        parameter("scale_output", "S", "one element"),
    ],
    outputs=[parameter("output", "Q", "(B, S, H), stored in order_output")],
    types={
        "Q": tensors("int8"),
        "S": tensors("float"),
        "F": tensors("float16"),
        "G": tensors("int32"),
    },
    # Required in ONNX Runtime's schema; a missing one is read as 0 and then judged like a given 0.
    attributes=[
        attribute("num_heads", 0, "Number of heads N >= 1; divides H."),
        attribute("window", 0, "One-sided window W >= 1; 2W divides S."),
        attribute("order_input", 0, "Memory order of input: 1 ROW or 2 COL32."),
        attribute("order_weight", 0, "0 COL with ROW input, 3 or 4 with COL32 input."),
        attribute("order_global_weight", 0, "As order_weight, chosen independently."),
        attribute("order_output", 0, "Equal to order_input."),
    ],
    infer=_infer,
)
