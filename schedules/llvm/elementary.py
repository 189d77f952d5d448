"""Elementary functions of float32 as polynomials, so that LLVM keeps vectors whole.

LLVM turns exp, erf and tanh of a vector into one libm call for each lane. Here they become
arithmetic: ``exp`` from ``vector``, and odd functions as x * P(x*x) / Q(x*x), fitted by least
squares on the relative error over the interval outside of which the function is 1 to float32.
Relative error below 4e-7; NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm.tirx as tir
from tvm.ir import Call, Expr
from tvm_ffi import structural_map

from . import vector

_ERF = (
    3.925,
    (1.1283791065, 0.19059011340, 0.052768800408, 0.0037723868153, 2.8483875e-4, 2.0460432e-6),
    (1.0, 0.50223881006, 0.11418119818, 0.014982875437, 0.0011638158467, 3.8047681e-5),
)
_TANH = (
    9.02,
    (1.0, 0.13785368204, 0.0040085148066, 3.1589188e-5, 5.0762640e-8),
    (1.0, 0.47118702531, 0.027737533674, 4.2074180e-4, 1.6174949e-6, 7.3745160e-10),
)


def erf(x: Expr) -> Expr:
    """Error function of float32 ``x``."""
    return _odd(x, *_ERF)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent of float32 ``x``."""
    return _odd(x, *_TANH)


def exp(x: Expr) -> Expr:
    """Exponential of float32 ``x``."""
    return _keep_nan(x, vector.exp(x))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x)) of float32 ``x``."""
    one = vector.float32(1, x)
    return one / (one + exp(vector.float32(0, x) - x))


FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    "tirx.exp": exp,
    "tirx.erf": erf,
    "tirx.tanh": tanh,
    "tirx.sigmoid": sigmoid,
}
"""TIR intrinsic -> its arithmetic."""


def expand(func: tir.PrimFunc) -> tir.PrimFunc:
    """``func`` with these intrinsics of float32 replaced by arithmetic."""

    def replace(call: Call) -> Expr:
        function = FUNCTIONS.get(getattr(call.op, "name", ""))
        single = function is not None and str(call.ty).startswith("float32")
        return function(call.args[0]) if single else call

    return structural_map(func, (Call, replace))


def _odd(x: Expr, bound: float, p: tuple[float, ...], q: tuple[float, ...]) -> Expr:
    clamped = tir.max(tir.min(x, vector.float32(bound, x)), vector.float32(-bound, x))
    square = clamped * clamped
    value = clamped * _polynomial(p, square) / _polynomial(q, square)
    one = vector.float32(1, x)
    return _keep_nan(x, tir.max(tir.min(value, one), vector.float32(-1, x)))


def _polynomial(coefficients: tuple[float, ...], t: Expr) -> Expr:
    value = vector.float32(coefficients[-1], t)
    for coefficient in reversed(coefficients[:-1]):
        value = value * t + vector.float32(coefficient, t)
    return value


def _keep_nan(x: Expr, value: Expr) -> Expr:
    return tir.Select(vector.is_nan(x), x, value)
