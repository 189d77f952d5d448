"""What atten_mask leaves to compute: bounds of every row of it, found once for all heads."""

from __future__ import annotations

from typing import NamedTuple

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda
from .arch import WARP
from .attention_place import named

_THREADS = 128
_LANE_STEPS = (1, 2, 4, 8, 16)
_NONE = 2**31 - 1
_FIRST_VISIBLE, _LAST_VISIBLE, _FIRST_MASKED = range(3)


class Reach(NamedTuple):
    """Keys that a tile of query rows has to look at."""

    first: Expr
    """No visible key before this one; int32."""
    last: Expr
    """None after this one; less than ``first`` when there are none at all."""
    clear: Expr
    """Keys before this one are visible to every row."""


def row_bounds(mask: tir.Buffer) -> tir.Buffer:
    """A kernel: int32 [R, 3] of a mask [R, C], the first and last visible key and the first masked
    one; ``_NONE``, -1 and ``_NONE`` where there is none. One warp a row.
    """
    rows, columns = mask.shape
    bounds = T.alloc_buffer((rows, 3), "int32")
    warps = _THREADS // WARP
    with (
        T.thread_binding(((rows + (warps - 1)) // warps).astype("int32"), "blockIdx.x") as block,
        T.thread_binding(_THREADS, "threadIdx.x") as thread,
        T.sblock("bounds"),
    ):
        T.reads()
        T.writes()
        lane = named(thread % WARP)
        row = named(block * warps + thread // WARP)
        found = T.alloc_buffer((3,), "int32", scope="local")
        other = T.alloc_buffer((1,), "int32", scope="local")
        for k, start in enumerate((_NONE, -1, _NONE)):
            T.buffer_store(found, tir.const(start, "int32"), [k])
        with T.serial(((columns + (WARP - 1)) // WARP).astype("int32")) as strip:
            key = named(strip * WARP + lane)
            with (
                T.If(tir.all(key < columns, row < rows)),
                T.Then(),
                T.If(mask[row, key].astype("int32") != 0),
            ):
                with T.Then():
                    T.buffer_store(found, tir.min(found[2], key), [_FIRST_MASKED])
                with T.Else():
                    T.buffer_store(found, tir.min(found[0], key), [_FIRST_VISIBLE])
                    T.buffer_store(found, key, [_LAST_VISIBLE])
        for k, best in enumerate((tir.min, tir.max, tir.min)):
            for step in _LANE_STEPS:
                T.buffer_store(other, cuda.shuffle_xor(found[k], step), [0])
                T.buffer_store(found, best(found[k], other[0]), [k])
        with T.If(tir.all(lane == 0, row < rows)), T.Then():
            for k in range(3):
                T.buffer_store(bounds, found[k], [row, k])
    return bounds


def reach(
    bounds: tir.Buffer, t0: Expr, count: Expr, positions: int, S2: Expr, every: bool, lane: Expr
) -> Reach:
    """Of the rows t0 .. t0 + count - 1, at most ``positions``, among S2 keys; every lane of a warp
    gets it. With ``every``, all keys where a row sees none.
    """
    found = T.alloc_buffer((4,), "int32", scope="local")  # the greatest first, too
    other = T.alloc_buffer((1,), "int32", scope="local")
    for k, start in enumerate((_NONE, -1, _NONE, -1)):
        T.buffer_store(found, tir.const(start, "int32"), [k])
    with T.serial(-(-positions // WARP)) as strip:
        position = named(strip * WARP + lane)
        with T.If(position < count), T.Then():
            row = named(tir.min(t0 + position, (bounds.shape[0] - 1).astype("int32")))
            first = named(bounds[row, _FIRST_VISIBLE])
            T.buffer_store(found, tir.min(found[0], first), [0])
            T.buffer_store(found, tir.max(found[1], bounds[row, _LAST_VISIBLE]), [1])
            T.buffer_store(found, tir.min(found[2], bounds[row, _FIRST_MASKED]), [2])
            T.buffer_store(found, tir.max(found[3], first), [3])
    for k, best in enumerate((tir.min, tir.max, tir.min, tir.max)):
        for step in _LANE_STEPS:
            T.buffer_store(other, cuda.shuffle_xor(found[k], step), [0])
            T.buffer_store(found, best(found[k], other[0]), [k])
    first, last = found[0], tir.min(found[1], S2 - 1)
    if every:
        hidden = found[3] >= S2
        first = tir.Select(hidden, tir.const(0, "int32"), first)
        last = tir.Select(hidden, S2 - 1, last)
    return Reach(named(first), named(last), named(tir.min(found[2], S2)))
