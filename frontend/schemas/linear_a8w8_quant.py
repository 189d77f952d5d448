"""npu::NPUQuantMatmul, its older spelling QuantBatchMatMul, and npu::NPUTransQuantParam.

The two spellings have the same arithmetic and differ in the order of the last two inputs and in
the codes of the output type; `canonical.canonicalize` rewrites the second into the first.
"""

from onnx import TensorProto
from onnx.shape_inference import InferenceContext

from . import infer
from .define import attribute, define, optional, parameter, tensors

OUTPUT_DTYPES = {
    0: TensorProto.INT8,  # "None" of the Python function
    TensorProto.INT8: TensorProto.INT8,
    TensorProto.INT32: TensorProto.INT32,
    TensorProto.FLOAT16: TensorProto.FLOAT16,
    TensorProto.BFLOAT16: TensorProto.BFLOAT16,
}
"""`output_dtype` of NPUQuantMatmul -> element type of y."""

GRAPH_ENGINE_DTYPES = {
    1: TensorProto.FLOAT16,
    2: TensorProto.INT8,
    3: TensorProto.INT32,
    27: TensorProto.BFLOAT16,
}
"""`dtype` of QuantBatchMatMul (CANN graph-engine codes) -> element type of y."""

_TYPES = {
    "Q": tensors("int8"),
    "S": tensors("float", "bfloat16", "int64", "uint64"),
    "F": tensors("float"),
    "B": tensors("int32", "float16", "bfloat16", "float"),
    "Y": tensors("int8", "int32", "float16", "bfloat16"),
}
_X1 = parameter("x1", "Q", "(*b1, m, k), rank 2..6; (*b1, k, m) with transpose_x1")
_X2 = parameter("x2", "Q", "(*b2, k, n), rank 2..6; (*b2, n, k) with transpose_x2")
_SCALE = parameter("scale", "S", "(1,) or (n,); 64-bit integers hold a packed scale and offset")
_OFFSET = optional("offset", "F", "(1,) or (n,), int8 output only")
_PERTOKEN = optional("pertoken_scale", "F", "(m,), shared by all batches")
_BIAS = optional("bias", "B", "(n,), or (batch, 1, n) when the output is 3-D")
_Y = parameter("y", "Y", "(*broadcast(b1, b2), m, n)")
_FLAGS = [
    attribute("transpose_x1", 0, "0 or 1: swap the last two dimensions of x1 before use."),
    attribute("transpose_x2", 0, "0 or 1: swap the last two dimensions of x2 before use."),
]


def _infer_matmul(ctx: InferenceContext, output_type: int) -> None:
    """y: (*broadcast(b1, b2), m, n), m and n read through the transpose flags."""
    x1, x2 = infer.shape(ctx, 0), infer.shape(ctx, 1)
    dims = None
    if x1 is not None and x2 is not None and min(len(x1), len(x2)) >= 2:
        m = x1[-1 if infer.int_attribute(ctx, "transpose_x1", 0) else -2]
        n = x2[-2 if infer.int_attribute(ctx, "transpose_x2", 0) else -1]
        dims = [*infer.broadcast(x1[:-2], x2[:-2]), m, n]
    infer.set_output(ctx, 0, output_type, dims)


def _infer_npu_quant_matmul(ctx: InferenceContext) -> None:
    code = infer.int_attribute(ctx, "output_dtype", 0)
    _infer_matmul(ctx, OUTPUT_DTYPES.get(code, TensorProto.UNDEFINED))


def _infer_quant_batch_matmul(ctx: InferenceContext) -> None:
    code = infer.int_attribute(ctx, "dtype", 1)
    _infer_matmul(ctx, GRAPH_ENGINE_DTYPES.get(code, TensorProto.UNDEFINED))


def _infer_trans_quant_param(ctx: InferenceContext) -> None:
    """y: int64, one entry per element of the longer of scale and offset."""
    scale, offset = infer.shape(ctx, 0), infer.shape(ctx, 1)
    if not ctx.has_input(1):
        offset = [1]
    dims = infer.broadcast(scale[-1:], offset[-1:]) if scale and offset else [None]
    infer.set_output(ctx, 0, TensorProto.INT64, dims)


QUANT_BATCH_MATMUL = define(
    "",
    "QuantBatchMatMul",
    "The spelling of CANN's ONNX plugin: npu::NPUQuantMatmul with bias before pertoken_scale and "
    "graph-engine codes for the output type.",
    inputs=[_X1, _X2, _SCALE, _OFFSET, _BIAS, _PERTOKEN],
    outputs=[_Y],
    types=_TYPES,
    attributes=[
        attribute("dtype", 1, "Graph-engine code: 1 float16, 2 int8, 3 int32, 27 bfloat16."),
        *_FLAGS,
    ],
    infer=_infer_quant_batch_matmul,
    since_version=8,
)

TRANS_QUANT_PARAM = define(
    "npu",
    "NPUTransQuantParam",
    "Packs a float32 scale (upper 19 bits) and an optional offset (9 bits) into 64-bit integers.",
    inputs=[
        parameter("scale", "F", "(t,) or (1, n)"),
        optional("offset", "F", "length 1 or that of scale, or any length when scale has one"),
    ],
    outputs=[parameter("y", "I", "(longer of scale and offset,)")],
    types={"F": tensors("float"), "I": tensors("int64")},
    attributes=[
        attribute("round_mode", 0, "0 truncates the mantissa to 10 bits, 1 rounds it to even.")
    ],
    infer=_infer_trans_quant_param,
)

SCHEMA = define(
    "npu",
    "NPUQuantMatmul",
    "int8 x int8 matrix product, accumulated in int32, with requantisation or dequantisation by "
    "per-tensor or per-channel scale and optional per-token scale.",
    inputs=[_X1, _X2, _SCALE, _OFFSET, _PERTOKEN, _BIAS],
    outputs=[_Y],
    types=_TYPES,
    attributes=[
        attribute(
            "output_dtype", 0, "TensorProto code: 0 = 3 int8, 6 int32, 10 float16, 16 bfloat16."
        ),
        *_FLAGS,
    ],
    infer=_infer_npu_quant_matmul,
)
