"""What the shape inference functions share: dimensions as int, symbol or unknown, and broadcasting.

None of these raises on a malformed node: an input, attribute or output that is not there, or is
of another kind, reads as unknown. The refusals belong to the checks, which say why.
"""

from collections.abc import Sequence

from onnx import AttributeProto, TensorProto, TypeProto, helper
from onnx.shape_inference import InferenceContext

Dim = int | str | None  # a size, the name of a symbolic size, or unknown


def shape(ctx: InferenceContext, index: int) -> list[Dim] | None:
    """Dimensions of input `index`; None when the input is absent or its rank is unknown."""
    tensor = _tensor_type(ctx, index)
    if tensor is None or not tensor.HasField("shape"):
        return None
    return [_dim(d) for d in tensor.shape.dim]


def ranked_shape(ctx: InferenceContext, index: int, rank: int) -> list[Dim]:
    """Dimensions of input `index`, all unknown where it does not have this rank."""
    dims = shape(ctx, index)
    return dims if dims is not None and len(dims) == rank else [None] * rank


def elem_type(ctx: InferenceContext, index: int) -> int:
    """TensorProto code of input `index`; UNDEFINED (0) when it is not known."""
    tensor = _tensor_type(ctx, index)
    return TensorProto.UNDEFINED if tensor is None else tensor.elem_type


def int_attribute(ctx: InferenceContext, name: str, default: int | None = None) -> int | None:
    """An INT attribute; its default when missing, None when it is of another type."""
    found = ctx.get_attribute(name)
    if found is None:
        return default
    return found.i if found.type == AttributeProto.INT else None


def string_attribute(ctx: InferenceContext, name: str, default: str = "") -> str:
    """A STRING attribute; its default when missing, "" when it is of another type."""
    found = ctx.get_attribute(name)
    if found is None:
        return default
    if found.type != AttributeProto.STRING:
        return ""
    return found.s.decode("utf-8", errors="replace")


def as_dim(value: int | None) -> Dim:
    """An attribute's value as a dimension; a size must be positive to be one."""
    return value if value is not None and value > 0 else None


def broadcast(first: Sequence[Dim], second: Sequence[Dim]) -> list[Dim]:
    """NumPy broadcasting of two lists of dimensions.

    A symbol against 1 is the symbol, against a larger constant the constant, against another
    symbol unknown. Constants that do not fit give unknown.
    """
    rank = max(len(first), len(second))
    pairs = zip([1] * (rank - len(first)) + list(first), [1] * (rank - len(second)) + list(second))
    return [_broadcast_dim(a, b) for a, b in pairs]


def set_output(
    ctx: InferenceContext, index: int, code: int, dims: Sequence[Dim] | None = None
) -> None:
    """Give output `index` its element type and, with `dims`, its shape.

    Nothing happens when the node does not ask for the output or the type is unknown.
    """
    if code == TensorProto.UNDEFINED or not ctx.has_output(index):
        return
    ctx.set_output_type(index, helper.make_tensor_type_proto(code, dims))


def _tensor_type(ctx: InferenceContext, index: int) -> TypeProto.Tensor | None:
    if index >= ctx.get_num_inputs() or not ctx.has_input(index):
        return None
    found = ctx.get_input_type(index)
    return found.tensor_type if found is not None and found.HasField("tensor_type") else None


def _dim(dim) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def _broadcast_dim(a: Dim, b: Dim) -> Dim:
    if a == b:
        return a
    if a == 1:
        return b
    if b == 1:
        return a
    sizes = [d for d in (a, b) if isinstance(d, int)]
    return sizes[0] if len(sizes) == 1 else None
