"""Rounding, saturation, cublasLt memory orders, masked softmax and Philox for all references.

Written apart from the compiled path on purpose: the two must agree without sharing code.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLT_MAX = float(np.finfo(np.float32).max)

# Rows of a score matrix held at once, so that references of long sequences fit in memory.
ROW_BLOCK = 256


class Order(IntEnum):
    """Memory orders of an R x C matrix, numbered as ONNX Runtime numbers them."""

    COL = 0
    ROW = 1
    COL32 = 2
    COL4_4R2_8C = 3
    COL32_2R_4R4 = 4


# (row tile, column tile) that R x C must fill: an ONNX tensor has no room for cublasLt's padding.
_TILES = {
    Order.COL: (1, 1),
    Order.ROW: (1, 1),
    Order.COL32: (1, 32),
    Order.COL4_4R2_8C: (8, 32),
    Order.COL32_2R_4R4: (32, 32),
}


def order_offsets(order: int, rows: int, cols: int) -> np.ndarray:
    """Flat offset of every logical entry (r, c): int64 [rows, cols].

    Raises ValueError for an unknown order or a matrix that does not fill whole tiles.
    """
    order = Order(order)
    row_tile, col_tile = _TILES[order]
    if rows % row_tile or cols % col_tile:
        raise ValueError(
            f"{order.name}: a {rows} x {cols} matrix does not fill {row_tile} x {col_tile} tiles"
        )
    r, c = np.arange(rows, dtype=np.int64)[:, None], np.arange(cols, dtype=np.int64)[None, :]
    if order == Order.COL:
        return c * rows + r
    if order == Order.ROW:
        return r * cols + c
    panel = (c // 32) * (32 * rows)
    if order == Order.COL32:
        return panel + r * 32 + c % 32
    if order == Order.COL4_4R2_8C:
        return (
            panel
            + (r // 8) * 256
            + (r % 2) * 128
            + ((c % 32) // 4) * 16
            + ((r % 8) // 2) * 4
            + c % 4
        )
    q = r % 32
    return panel + (r // 32) * 1024 + (((q % 8) // 2 * 4 + q // 8) * 2 + q % 2) * 32 + c % 32


def unpack(stored: np.ndarray, order: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Logical matrices [..., R, C] of a tensor whose last two axes hold R*C entries in `order`.

    `shape` is (R, C) where it differs from the declared last two axes (tiled weights are declared
    (K, N) and hold an N x K matrix); leading axes are a dense batch.
    """
    rows, cols = stored.shape[-2:] if shape is None else shape
    flat = stored.reshape(*stored.shape[:-2], rows * cols)
    return flat[..., order_offsets(order, rows, cols)]


def pack(logical: np.ndarray, order: int, declared: tuple[int, int] | None = None) -> np.ndarray:
    """Inverse of `unpack`: [..., R, C] in `order`, declared [..., *declared] (default R, C)."""
    rows, cols = logical.shape[-2:]
    flat = np.empty((*logical.shape[:-2], rows * cols), logical.dtype)
    flat[..., order_offsets(order, rows, cols)] = logical
    return flat.reshape(*logical.shape[:-2], *(declared or (rows, cols)))


def round_half_even(x: np.ndarray) -> np.ndarray:
    """Nearest integer, ties to even, in the type of `x`."""
    return np.rint(x)


def saturate(x: np.ndarray, dtype: np.dtype | type = np.int8) -> np.ndarray:
    """Round half to even, clip to the range of `dtype` while still a float, then convert."""
    info = np.iinfo(dtype)
    return np.clip(round_half_even(x), info.min, info.max).astype(dtype)


def cast(x: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """float64 to a float type in one rounding, nearest even; overflow gives infinity.

    ml_dtypes goes to bfloat16 through float32, which rounds twice; forcing the float32 to odd where
    it is inexact (truncate, set the last bit) makes the second rounding see on which side the value
    lies.
    """
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore"):
        if dtype != BFLOAT16:
            return x.astype(dtype)
        single = x.astype(np.float32)
        away = np.abs(single.astype(np.float64)) > np.abs(x)
        truncated = np.where(away, np.nextafter(single, np.float32(0)), single)
        inexact = truncated.astype(np.float64) != x
        odd = (truncated.view(np.uint32) | np.uint32(1)).view(np.float32)
        return np.where(inexact & ~np.isnan(x), odd, truncated).astype(BFLOAT16)


def int_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact int64 product of int8 matrices, batches broadcast as in np.matmul.

    float64 carries it: every partial sum is an integer below K * 2^14, exact up to K = 2^39.
    """
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)


def row_blocks(rows: int, block: int = ROW_BLOCK) -> Iterator[slice]:
    """Consecutive slices of at most `block` rows that cover 0..rows-1."""
    return (slice(start, min(start + block, rows)) for start in range(0, rows, block))


def masked_softmax(
    x: np.ndarray, allowed: np.ndarray | bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax over the last axis restricted to `allowed`, in parts: maximum, weights, their sum.

    Entries that are not allowed are selected away before the maximum, so what they hold does not
    matter. A row without any allowed finite entry has maximum -inf, weights 0 and sum 0, never NaN.
    """
    x = np.where(allowed, x, -np.inf)
    m = x.max(axis=-1, keepdims=True, initial=-np.inf)
    w = np.exp(x - np.where(np.isneginf(m), 0.0, m))
    return m, w, w.sum(axis=-1, keepdims=True)


def scalar(x: np.ndarray | float) -> np.float32:
    """The one element of a () or (1,) float32 tensor."""
    return np.float32(np.asarray(x).reshape(-1)[0])


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Random123): uint32 counters [..., 4] and key (k0, k1) to words [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(index: np.ndarray, seed: int, offset: int) -> np.ndarray:
    """Word number `index` (int64, any shape) of the stream of (seed, offset): uint32 of that shape.

    Four consecutive indices share one Philox counter; seed and offset are taken modulo 2^64.
    """
    e = index.astype(np.uint64)
    group = e >> np.uint64(2)
    counter = np.empty((*e.shape, 4), np.uint32)
    counter[..., 0] = group & np.uint64(0xFFFFFFFF)
    counter[..., 1] = group >> np.uint64(32)
    counter[..., 2] = offset & 0xFFFFFFFF
    counter[..., 3] = (offset >> 32) & 0xFFFFFFFF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return np.take_along_axis(words, (e & np.uint64(3))[..., None].astype(np.int64), -1)[..., 0]
