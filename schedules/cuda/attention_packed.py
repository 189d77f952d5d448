"""Packed sequences (TND): which tile of which sequence a block computes, found by each warp for
itself from the device's own lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import Sequence
from ..intrin import cuda
from .arch import WARP
from .attention_place import named

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem
    from .attention_config import AttentionConfig

_LANE_STEPS = (1, 2, 4, 8, 16)


def find_tile(
    problem: AttentionProblem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    sizes: tuple[Expr, Expr, Expr],
    slot: Expr,
    thread: Expr,
) -> tuple[Sequence, Expr, Expr]:
    """Sequence and first query row of tile number ``slot``, and whether there is such a tile.

    Each lane takes a contiguous share of the sequences and counts their tiles; a scan over the
    lanes tells in whose share the slot lies, and that lane finds it.
    """
    B, T1, T2 = sizes
    lane = named(thread % WARP)
    share = named(((B + (WARP - 1)) // WARP).astype("int32"))

    def lengths(b: Expr) -> tuple[Expr, Expr]:
        return _span(buffers["actual_seq_qlen"], b, T1)[1], _span(
            buffers["actual_seq_kvlen"], b, T2
        )[1]

    def tiles(b: Expr) -> Expr:
        return ((lengths(b)[0] + (config.rows - 1)) // config.rows).astype("int32")

    def each_sequence(statement: Callable[[Expr], None]) -> None:
        with T.serial(share) as k:
            b = named(lane * share + k)
            with T.If(b < B.astype("int32")), T.Then():
                statement(b)

    # upto[0]: tiles of the lanes up to this one; upto[1]: a shuffled value; upto[2]: a count.
    upto = T.alloc_buffer((3,), "int32", scope="local")
    found = T.alloc_buffer((2,), "int32", scope="local")  # sequence, tile of it; -1: in no share

    def store(buffer: tir.Buffer, k: int, value: Expr | int) -> None:
        T.buffer_store(buffer, value, [k])

    for k in range(2):
        store(found, k, tir.const(-1, "int32"))
    store(upto, 0, tir.const(0, "int32"))
    each_sequence(lambda b: store(upto, 0, upto[0] + tiles(b)))
    store(upto, 2, upto[0])
    for step in _LANE_STEPS:
        store(upto, 1, cuda.shuffle_up(upto[0], step))
        store(upto, 0, upto[0] + tir.Select(lane >= step, upto[1], tir.const(0, "int32")))
    store(upto, 2, upto[0] - upto[2])

    def look(b: Expr) -> None:
        count = named(tiles(b))
        with T.If(tir.all(upto[2] <= slot, slot < upto[2] + count)), T.Then():
            store(found, 0, b)
            store(found, 1, slot - upto[2])
        store(upto, 2, upto[2] + count)

    each_sequence(look)
    for k in range(2):
        for step in _LANE_STEPS:
            store(upto, 1, cuda.shuffle_xor(found[k], step))
            store(found, k, tir.max(found[k], upto[1]))
    pairs = tir.const(0, "int64")
    if problem.keep_prob < 1:
        pairs = _pairs_before(found[0], lengths, each_sequence)
    b = named(tir.max(found[0], 0).astype("int64"))
    starts, spans = zip(
        _span(buffers["actual_seq_qlen"], b, T1), _span(buffers["actual_seq_kvlen"], b, T2)
    )
    counts = [named(length.astype("int32")) for length in spans]
    at = Sequence(b, *counts, *(named(start) for start in starts), pairs)
    return at, named(found[1] * config.rows), found[0] >= 0


def _pairs_before(
    last: Expr, lengths: Callable[[Expr], tuple[Expr, Expr]], each_sequence: Callable
) -> Expr:
    """Sum of S1 * S2 over the sequences before ``last``; the shares of the lanes are added."""
    total = T.alloc_buffer((2,), "int64", scope="local")
    T.buffer_store(total, tir.const(0, "int64"), [0])

    def add(b: Expr) -> None:
        S1, S2 = lengths(b)
        T.buffer_store(total, total[0] + tir.Select(b < last, S1 * S2, tir.const(0, "int64")), [0])

    each_sequence(add)
    for step in _LANE_STEPS:
        T.buffer_store(total, cuda.shuffle_xor(total[0], step), [1])
        T.buffer_store(total, total[0] + total[1], [0])
    return total[0]


def _span(ends: tir.Buffer, b: Expr, total: Expr) -> tuple[Expr, Expr]:
    """Start and length (int64) of sequence b, inside 0..total whatever the list holds."""

    def inside(x: Expr) -> Expr:
        return tir.min(tir.max(x.astype("int64"), tir.const(0, "int64")), total)

    start = named(tir.Select(b > 0, inside(ends[tir.max(b - 1, 0)]), tir.const(0, "int64")))
    return start, named(tir.max(inside(ends[b]) - start, tir.const(0, "int64")))
