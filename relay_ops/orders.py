"""cublasLt memory orders of int8 matrices, as index maps for TE and for NumPy.

An R x C matrix in one of these orders is a flat run of R*C bytes; `offset` says where its logical
entry (r, c) lies. The map is plain integer arithmetic, so the same definition indexes a TE tensor
(``r``, ``c`` are TIR expressions) and a NumPy array (they are index arrays).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np


class Order(IntEnum):
    """Memory orders, numbered as ONNX Runtime's attributes number them."""

    COL = 0
    ROW = 1
    COL32 = 2
    COL4_4R2_8C = 3
    COL32_2R_4R4 = 4


Entry = Callable[..., Any]
"""``entry(tensor, z, i, j)``: element (i, j) of matrix z of a tensor, wherever it is stored."""

COLS = 32
"""Columns of a panel in the tiled orders: each panel is stored whole before the next."""

_TILES = {Order.COL32: (1, COLS), Order.COL4_4R2_8C: (8, COLS), Order.COL32_2R_4R4: (32, COLS)}


def tile(order: Order) -> tuple[int, int]:
    """(rows, columns) of which a matrix must hold whole multiples: ONNX has no room for padding."""
    return _TILES.get(order, (1, 1))


def offset(order: Order, r, c, rows, cols):
    """Flat offset of entry (r, c) of a ``rows`` x ``cols`` matrix that fills whole tiles."""
    if order is Order.COL:
        return c * rows + r
    if order is Order.ROW:
        return r * cols + c
    panel, i = c // COLS * (COLS * rows), c % COLS
    if order is Order.COL32:
        return panel + r * COLS + i
    if order is Order.COL4_4R2_8C:
        in_tile = r % 2 * 128 + i // 4 * 16 + r % 8 // 2 * 4 + i % 4
        return panel + r // 8 * 256 + in_tile
    q = r % 32
    return panel + r // 32 * 1024 + ((q % 8 // 2 * 4 + q // 8) * 2 + q % 2) * COLS + i


def unpack(stored: np.ndarray, order: Order, rows: int, cols: int) -> np.ndarray:
    """Logical matrices [..., rows, cols] of arrays [..., X, Y] that hold rows*cols entries."""
    flat = stored.reshape(*stored.shape[:-2], rows * cols)
    return flat[..., offset(order, np.arange(rows)[:, None], np.arange(cols), rows, cols)]


def row_major(t, z, i, j):
    """Entry of matrices [z, i, j]."""
    return t[z, i, j]


def transposed(t, z, i, j):
    """Entry of matrices stored [z, j, i]."""
    return t[z, j, i]


def col32(t, z, i, j):
    """Entry of COL32 matrices, stored [z, j/32, i, 32]."""
    return t[z, j // COLS, i, j % COLS]
