"""Division of a row by one number, as quantisation does it, without the divider.

A division of 16 floats occupies the divider of an x86 core for 16 cycles, a multiply-add one of its
two units for one. With the reciprocal y of b, rounded to nearest, Markstein's correction makes of
q = x * y the quotient itself: q - (q * b - x) * y, the residual being exact in a fused
multiply-add. Of x below 2**-100 it is not, and the quotient may be off in its last bit; one within
an ulp of the largest float may be infinite.

P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.ir.expr import TensorLoad
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
    """``func`` with multiply-adds for such divisions of float32, where the target fuses them; the
    operands are elements of buffers, so that they can be repeated.
    """
    if not target_has_features(["fma"], target):
        return func

    def replace(loop: For) -> Stmt:
        realize = loop.body
        if loop.kind != ForKind.VECTORIZED or not isinstance(realize, SBlockRealize):
            return loop
        axes = zip(realize.block.iter_vars, realize.iter_values)
        varying = [axis.var for axis, value in axes if _uses(value, [loop.loop_var])]

        def divide(division: tirx.Div) -> Expr:
            loads = isinstance(division.a, TensorLoad) and isinstance(division.b, TensorLoad)
            uniform = loads and str(division.ty) == "float32" and not _uses(division.b, varying)
            return _quotient(division.a, division.b) if uniform else division

        return structural_map(loop, (tirx.Div, divide))

    return func.with_body(structural_map(func.body, (For, replace)))


def _quotient(x: Expr, b: Expr) -> Expr:
    """x / b. Infinities have no residual: there x * y is the answer. Divisors that are extreme, or
    negative, divide.
    """
    y = float32(1) / b
    q = x * y
    corrected = q - (q * b - x) * y  # in this order -0 stays -0
    quotient = tirx.Select(is_nan(corrected), q, corrected)
    usual = tirx.all(b >= float32(_SMALLEST), b <= float32(_LARGEST))
    return tirx.if_then_else(usual, quotient, x / b)


def _uses(expr: Expr, variables: list[Var]) -> bool:
    found: list[Var] = []
    structural_walk(expr, (Var, found.append))
    return any(var.same_as(variable) for var in found for variable in variables)
