"""Dimensions that are Python ints where static and TIR expressions where symbolic."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax, tirx
from tvm.ir import Expr
from tvm.sym import Analyzer

from .op import Dim


def is_one(dim: Dim) -> bool:
    """Known to be 1; a symbolic dimension is not, whatever its value at the call."""
    return isinstance(dim, int) and dim == 1


def int64(dim: Dim) -> Expr:
    """As an expression. Relax's shapes are int64; mixing widths would litter the IR with casts."""
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim


def int64s(*dims: Dim) -> list[Expr]:
    """A shape of such expressions."""
    return [int64(dim) for dim in dims]


def same(a: Dim, b: Dim) -> bool:
    """Known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return Analyzer().can_prove_equal(int64(a), int64(b))


def equal(a: Dim, b: Dim) -> bool | Expr:
    """``a == b``, decided where both are static."""
    return a == b if isinstance(a, int) and isinstance(b, int) else tirx.EQ(int64(a), int64(b))


def any_of(*conditions: bool | Expr) -> bool | Expr:
    """Their disjunction, decided as far as it can be."""
    if any(condition is True for condition in conditions):
        return True
    undecided = [condition for condition in conditions if condition is not False]
    return tirx.any(*undecided) if undecided else False


def divmod_(index: Expr, dim: Dim) -> tuple[Expr, Expr]:
    """Quotient and remainder of an index, which is never negative.

    A floor division by a symbolic size would be lowered with a correction for negative operands,
    and TVM's analyser rejects some nests of those.
    """
    return tirx.truncdiv(index, int64(dim)), tirx.truncmod(index, int64(dim))


def view(bb: relax.BlockBuilder, x: relax.Expr, shape: Sequence[Dim]) -> relax.Expr:
    """``x`` under another shape of as many elements; ``x`` itself where that is its shape."""
    have = [*x.ty.shape]
    if len(have) == len(shape) and all(same(a, b) for a, b in zip(have, shape)):
        return x
    return bb.emit(relax.op.reshape(x, [int64(dim) for dim in shape]))
