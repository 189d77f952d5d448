"""Vector expressions of TIR taken apart: the scalar expression of one lane."""

import tvm
from tvm import tirx
from tvm.ir import Call

from . import values


def lanes(expr):
    """Number of lanes of an expression's dtype, 1 for scalars."""
    name = str(expr.ty.dtype) if hasattr(expr.ty, "dtype") else ""
    kind, _, count = name.rpartition("x")
    return int(count) if kind and count.isdigit() else 1


def scalar_dtype(expr):
    """The dtype of a lane."""
    name = str(expr.ty.dtype)
    return name.rpartition("x")[0] if lanes(expr) > 1 else name


def lane(expr, i):
    """Lane i of a vector expression as a scalar expression; scalars are their only lane."""
    kind = type(expr).__name__
    if lanes(expr) == 1:
        return expr
    if kind == "Ramp":
        return expr.base + expr.stride * tirx.IntImm(str(expr.stride.ty.dtype), i)
    if kind == "Broadcast":
        return expr.value
    if kind == "TensorLoad":
        return tirx.BufferLoad(expr.source, [lane(index, i) for index in expr.indices])
    if kind == "Cast":
        return tirx.Cast(scalar_dtype(expr), lane(expr.value, i))
    if kind == "Select":
        return tirx.Select(
            *(lane(x, i) for x in (expr.condition, expr.true_value, expr.false_value))
        )
    if kind in values.BINARY or kind in ("And", "Or"):
        return type(expr)(lane(expr.a, i), lane(expr.b, i))
    if kind in ("Not", "BitwiseNot"):
        return type(expr)(lane(expr.a, i))
    if isinstance(expr, Call) and values.operator_name(expr) != "tirx.reinterpret":
        args = [lane(arg, i) for arg in expr.args]
        return Call(expr.op, args, ret_ty=tvm.ir.PrimType(scalar_dtype(expr)))
    raise NotImplementedError(f"vector expression {kind}: {expr}")
