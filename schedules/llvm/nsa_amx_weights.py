"""Weights of a task of the NSA kernel on matrix tiles, and the scores of blocks that come of
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_amx
from .attention_operands import BLOCK, SIDE
from .attention_task import opaque
from .nsa_select import FORCED, TAKEN, WIDTH
from .nsa_tile import FLT_MAX
from .vector import exp2_weight, float32, load_lanes, max_lanes, ramp, sum_lanes

if TYPE_CHECKING:
    from .nsa_amx import TileTask

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FOR_READING, _FOR_WRITING = (0, 2, 1), (1, 2, 1)
"""Operands of ``llvm.prefetch``: read or write, into the second-level cache, data."""


def ask_ahead(task: TileTask, X, Out, at, m, strip) -> None:
    """Ask for 32 channels of row m, of queries of the next task and of the output."""
    G = task.problem.group
    token, head, first = at.token + m // G, at.h2 * G + m % G, strip * BLOCK
    _prefetch(X, [token + at.ahead, head, first], _FOR_READING)
    if task.wants_out:
        wanted = tir.Not(task.stream.wanted(Out))
        if task.strips * BLOCK < task.depth:
            wanted = tir.all(wanted, strip < task.strips)
        with T.If(wanted), T.Then():
            _prefetch(Out, [token, head, first], _FOR_WRITING)


def find_tops(task: TileTask, w, block) -> None:
    """top [m] in units of ln 2, -FLT_MAX without a visible key; base [m], what weights are powers
    above. lanes [m] = 0.
    """
    low, zero = float32(-FLT_MAX), float32(0)
    best = T.alloc_buffer((2, SIDE), "float32", scope="local")
    with T.serial(BLOCK) as r:
        m = T.Bind(block * BLOCK + r)
        for side in range(2):
            none = tir.Broadcast(float32(float("-inf")), SIDE)
            T.buffer_store(best, none, [side, ramp(0, SIDE)])
        with T.serial(w.count[0]) as i:
            for side in range(2):
                x = load_lanes(w.S, [m, w.live[i] * BLOCK + side * SIDE], SIDE)
                top = tir.max(load_lanes(best, [side, 0], SIDE), x)
                T.buffer_store(best, top, [side, ramp(0, SIDE)])
        both = T.Bind(tir.max(*(load_lanes(best, [side, 0], SIDE) for side in range(2))))
        top = T.Bind(max_lanes(both))
        none = T.Bind(top == float32(float("-inf")))
        top = T.Bind(top * float32(task.factor))
        T.buffer_store(w.top, tir.Select(none, low, top), [m])
        T.buffer_store(w.base, tir.Select(none, zero, top), [m])
        T.buffer_store(w.lanes, tir.Broadcast(zero, SIDE), [m, ramp(0, SIDE)])


def weigh_rows(task: TileTask, w, group, first, rows) -> None:
    """S = exp(S - M) of ``rows`` rows from ``first`` on and a group of keys, P the same as pairs of
    terms; lanes [m] += sums.
    """
    with T.serial(rows) as r:
        m = T.Bind(first + r)
        base = w.base[m]
        halves = []
        for side in range(2):
            index = [m, ramp(group * BLOCK + side * SIDE, SIDE)]
            x = tir.BufferLoad(w.S, index) * tir.Broadcast(float32(task.factor), SIDE)
            x = T.Bind(x - tir.Broadcast(base, SIDE))
            weight = T.Bind(exp2_weight(x, task.unit, task.degree))
            T.buffer_store(w.S, weight, index)
            halves.append(weight)
        total = load_lanes(w.lanes, [m, 0], SIDE) + (halves[0] + halves[1])
        T.buffer_store(w.lanes, total, [m, ramp(0, SIDE)])
        if task.wants_out:
            for term, pairs in enumerate(task.weight_pairs(*halves)):
                T.buffer_store(w.P, pairs, [term, m, ramp(group * SIDE, SIDE)])


def add_weights(task: TileTask, w, block) -> None:
    """total and inverse of a block of rows."""
    zero = float32(0)
    with T.serial(BLOCK) as r:
        m = T.Bind(block * BLOCK + r)
        total = T.Bind(sum_lanes(T.Bind(load_lanes(w.lanes, [m, 0], SIDE))))
        T.buffer_store(w.total, total, [m])
        T.buffer_store(w.inverse, tir.Select(total > zero, float32(1) / total, zero), [m])


def weigh_block(task: TileTask, w, block) -> None:
    """Weights of a block of rows, all at once."""
    with T.serial(w.count[0]) as i:
        (group,) = opaque("int64", [w.live[i]])
        weigh_rows(task, w, group, block * BLOCK, BLOCK)
    add_weights(task, w, block)


def score_blocks(task: TileTask, w, Forced, row, t, keys) -> None:
    """score [0] of query row ``row`` of the task, ``t`` of its sequence."""
    p, L = task.problem, SIDE
    count = w.count[1].astype("int64")
    zero = tir.Broadcast(float32(0), L)
    front = task.front
    with T.serial(front) as i:
        T.buffer_store(w.sums, float32(0), [i])
    # Behind the last group that a row sees, as far as the windows reach.
    with T.serial(count * 2 + -(-p.taps // L) + 1) as part:
        T.buffer_store(w.sums, zero, [ramp(front + part * L, L)])
    _add_heads(task, w, row)
    seen = tir.min(count * BLOCK, keys)
    blocks, some = p.blocks(keys), tir.min(p.blocks(keys), p.blocks_from(seen))
    blocks, some = opaque("int64", [blocks, tir.max(some, 0)])
    stride, origin = p.blocks_stride, p.newest_key(0)
    acc = T.alloc_buffer((L,), "float32", scope="local")
    # windows [i] ends at key i + origin.
    with T.serial(((some - 1) * stride + L) // L) as part:
        T.buffer_store(acc, zero, [ramp(0, L)])
        with T.serial(p.taps) as c:
            at = front + part * L + origin - c
            weight = p.weight(c).astype("float32")
            x = load_lanes(w.sums, [at], L) * tir.Broadcast(weight, L)
            T.buffer_store(acc, load_lanes(acc, [0], L) + x, [ramp(0, L)])
        T.buffer_store(w.windows, load_lanes(acc, [0], L), [ramp(part * L, L)])
    with T.serial(some) as j:
        T.buffer_store(w.score, w.windows[j * stride], [0, j])
    with T.serial(blocks - some) as j:
        T.buffer_store(w.score, float32(0), [0, some + j])
    if p.topk_mask is not None:
        with T.serial(blocks) as j:
            forced = Forced[t, j].astype("int32") != 0
            score = tir.Select(forced, float32(FORCED), w.score[0, j])
            T.buffer_store(w.score, score, [0, j])
    with T.serial((blocks + (WIDTH - 1)) // WIDTH * WIDTH - blocks) as j:
        T.buffer_store(w.score, float32(TAKEN), [0, blocks + j])


def _add_heads(task: TileTask, w, row) -> None:
    """sums [front + key] = sum over heads of P of a query row."""
    G = task.problem.group
    heads = min(G, task.config.heads)
    with T.serial(G // heads) as chunk:
        m = row * G + chunk * heads
        inverse = [T.Bind(tir.Broadcast(w.inverse[m + g], SIDE)) for g in range(heads)]
        with T.serial(w.count[0]) as i:
            (group,) = opaque("int32", [w.live[i]])
            for side in range(2):
                first = group * BLOCK + side * SIDE
                at = [ramp(task.front + first, SIDE)]
                total = tir.BufferLoad(w.sums, at)
                for g in range(heads):
                    total = total + load_lanes(w.S, [m + g, first], SIDE) * inverse[g]
                T.buffer_store(w.sums, total, at)


def _prefetch(buffer: Buffer, index: list[Expr], how: tuple[int, ...]) -> None:
    """Ask for 32 elements."""
    *row, first = index
    for more in range(0, BLOCK, x86_amx.ROW_BYTES // _BYTES[str(buffer.dtype)]):
        address = tir.address_of(buffer[(*row, first + more)])
        T.evaluate(tir.call_intrin("void", "tirx.prefetch", address, *how))
