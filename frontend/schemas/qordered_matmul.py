"""com.microsoft::QOrderedMatMul: int8 matrix product on matrices in cublasLt memory orders."""

from onnx import TensorProto
from onnx.shape_inference import InferenceContext

from . import infer
from .define import define, optional, parameter, required_attribute, tensors

_ORDERS = "0 COL, 1 ROW, 2 COL32, 3 COL4_4R2_8C, 4 COL32_2R_4R4"


def _infer(ctx: InferenceContext) -> None:
    """Y: int8, shape A.shape[:-1] + (N,), N = last dimension of the declared (.., K, N) of B."""
    a, b = infer.shape(ctx, 0), infer.shape(ctx, 2)
    dims = None if not a else [*a[:-1], b[-1] if b else None]
    infer.set_output(ctx, 0, TensorProto.INT8, dims)


SCHEMA = define(
    "com.microsoft",
    "QOrderedMatMul",
    "Y = clip(rint(alpha * (A @ B) + bias / scale_Y + beta * C), -128, 127) with "
    "alpha = scale_A * scale_B / scale_Y and beta = scale_C / scale_Y; ties round to even. "
    "(order_A, order_B, order_Y) is (1, 0, 1), or (2, 3 or 4, 2) without bias.",
    inputs=[
        parameter("A", "Q", "(M, K) or (b, M, K), stored in order_A"),
        parameter("scale_A", "S", "one element"),
        parameter("B", "Q", "declared (K, N), (1, K, N) or (b, K, N), bytes in order_B"),
        parameter("scale_B", "S", "one element, or (N,): one per column of Y"),
        parameter("scale_Y", "S", "one element"),
        optional("bias", "S", "(N,), in real units: the operator divides it by scale_Y"),
        optional("C", "Q", "(M, N), (1, M, N) or (b, M, N), stored in order_Y"),
        optional("scale_C", "S", "one element; required with C"),
    ],
    outputs=[parameter("Y", "Q", "A.shape[:-1] + (N,), stored in order_Y")],
    types={"Q": tensors("int8"), "S": tensors("float")},
    attributes=[
        required_attribute("order_A", f"Memory order of A: {_ORDERS}."),
        required_attribute("order_B", f"Memory order of B: {_ORDERS}."),
        required_attribute("order_Y", f"Memory order of Y and C: {_ORDERS}."),
    ],
    infer=_infer,
)
