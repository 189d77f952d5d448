"""com.microsoft QOrderedMatMul in NumPy.

    Y = saturate(alpha * (A @ B) + bias / scale_Y + beta * C)

alpha = scale_A * scale_B / scale_Y and beta = scale_C / scale_Y are float32 numbers by definition;
the sum is evaluated in float64 and rounded once, half to even. Layout letters: b batch, M K N.
"""

from __future__ import annotations

import numpy as np

from .numerics import Order, int_matmul, pack, saturate, scalar, unpack

# (order_A, order_B, order_Y): the row combination and the two tiled ones.
ORDERS = ((1, 0, 1), (2, 3, 2), (2, 4, 2))


def _matrices(x: np.ndarray) -> np.ndarray:
    """(R, C) or (b, R, C) as (b, R, C)."""
    return x.reshape(-1, *x.shape[-2:])


def _logical_weight(B: np.ndarray, order_B: int) -> np.ndarray:
    """Logical b[z, k, n] of the declared (K, N): column-major, or a tiled N x K matrix."""
    B = _matrices(B)
    if order_B == Order.COL:
        return unpack(B, Order.COL)
    return unpack(B, order_B, B.shape[:0:-1]).swapaxes(-1, -2)


def _is_float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64) == x


def qordered_matmul(
    A,
    scale_A,
    B,
    scale_B,
    scale_Y,
    bias=None,
    C=None,
    scale_C=None,
    *,
    order_A,
    order_B,
    order_Y,
    unrounded=False,
):
    """Quantised matrix product of matrices stored in cublasLt orders.

    A int8 (M,K) or (b,M,K) in order_A; B int8 declared (K,N), (1,K,N) or (b,K,N) in order_B; C int8
    (M,N), (1,M,N) or (b,M,N) in order_Y; scale_B float32 one element or (N,); bias float32 (N,) in
    real units. Orders are (1, 0, 1) or (2, 3 or 4, 2).

    Returns (Y,): int8, A.shape[:-1] + (N,), in order_Y. With `unrounded` returns (v, slack) in the
    same places instead: the float64 value before rounding, and how far a float32 evaluation may
    stray from it (0 where float32 is exact).
    """
    if (order_A, order_B, order_Y) not in ORDERS:
        raise ValueError(
            f"QOrderedMatMul: orders: found {(order_A, order_B, order_Y)}, allowed {ORDERS}"
        )
    acc = int_matmul(unpack(_matrices(A), order_A), _logical_weight(B, order_B))  # [b, M, N]

    scale_A, scale_Y = scalar(scale_A), scalar(scale_Y)
    scale_B = np.asarray(scale_B, np.float32)
    if scale_B.size == 1:
        alpha = scale_A * scalar(scale_B) / scale_Y
    else:
        alpha = scale_B * (scale_A / scale_Y)  # [N]
    product = np.asarray(alpha, np.float64) * acc
    added = np.zeros(1) if bias is None else (bias * (np.float32(1) / scale_Y)).astype(np.float64)
    residual = np.zeros(1)
    if C is not None:
        beta = scalar(scale_C) / scale_Y
        residual = np.float64(beta) * unpack(_matrices(C), order_Y).astype(np.float64)
    v = product + added + residual

    shape = (*A.shape[:-1], B.shape[-1])
    if not unrounded:
        return (pack(saturate(v), order_Y).reshape(shape),)
    exact = (np.abs(acc) <= 1 << 24) & _is_float32(product) & _is_float32(residual)
    for partial in (product + added, product + residual, added + residual, v):
        exact = exact & _is_float32(partial)
    # Four float32 roundings of relative 2^-24 each.
    slack = np.where(exact, 0.0, 2.0**-21 * (abs(product) + abs(added) + abs(residual)))
    return pack(v, order_Y).reshape(shape), pack(slack, order_Y).reshape(shape)
