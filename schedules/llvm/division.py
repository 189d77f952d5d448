"""Division of a vector by what is the same in all its lanes, without the divider.

A division of 16 floats occupies the divider of an x86 core for 16 cycles, a multiply-add one of its
two units for one. With the reciprocal y of b, rounded to nearest, Markstein's correction makes of
q = x * y the quotient itself: q + (x - q * b) * y, the residual being exact in a fused
multiply-add. Of x below 2**-100 it is not, and the quotient may be off in its last bit.

P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import SBlockRealize
from tvm.target import Target
from tvm.target.codegen import target_has_features
from tvm.tirx import For, ForKind, PrimFunc, Stmt, Var
from tvm_ffi import structural_map, structural_walk

from .vector import float32, is_nan

_SMALLEST, _LARGEST = 2.0**-96, 2.0**126
"""Of divisors: their reciprocals are normal, and what is not exact is less than a sixteenth, which
quantisation rounds to 0.
"""


def by_reciprocals(func: PrimFunc, target: Target) -> PrimFunc:
    """``func`` with multiplications for such divisions of float32, where the target fuses them."""
    if not target_has_features(["fma"], target):
        return func

    def replace(loop: For) -> Stmt:
        realize = loop.body
        if loop.kind != ForKind.VECTORIZED or not isinstance(realize, SBlockRealize):
            return loop
        axes = zip(realize.block.iter_vars, realize.iter_values)
        varying = [axis.var for axis, value in axes if _uses(value, [loop.loop_var])]

        def divide(division: tirx.Div) -> Expr:
            uniform = str(division.ty) == "float32" and not _uses(division.b, varying)
            return _quotient(division.a, division.b) if uniform else division

        return structural_map(loop, (tirx.Div, divide))

    return func.with_body(structural_map(func.body, (For, replace)))


def _quotient(x: Expr, b: Expr) -> Expr:
    """x / b. Infinities, and what overflows, have no residual: there x * y is the answer. Divisors
    that are extreme divide.
    """
    q, corrected = tirx.Var("q", "float32"), tirx.Var("corrected", "float32")
    y = float32(1) / b
    nearest = tirx.Let(
        q,
        x * y,
        tirx.Let(corrected, q + (x - q * b) * y, tirx.Select(is_nan(corrected), q, corrected)),
    )
    if isinstance(b, tirx.FloatImm):
        return nearest if _SMALLEST <= abs(b.value) <= _LARGEST else x / b
    size = tirx.max(b, float32(0) - b)
    usual = tirx.all(size >= float32(_SMALLEST), size <= float32(_LARGEST))
    return tirx.if_then_else(usual, nearest, x / b)


def _uses(expr: Expr, variables: list[Var]) -> bool:
    found: list[Var] = []
    structural_walk(expr, (Var, found.append))
    return any(var.same_as(variable) for var in found for variable in variables)
