"""Masks of a task of the NSA kernel on matrix tiles: which groups of 32 keys a row sees, and minus
infinity for the scores of the keys that it does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from .attention_operands import BLOCK, SIDE
from .nsa_tile import FLT_MAX
from .vector import float32, load_lanes, ramp

if TYPE_CHECKING:
    from .nsa_amx import TileTask


def stage_mask(task: TileTask, w, Mask, t0, rows, keys) -> None:
    """hidden [row][key], 1 beyond the last key up to a whole group."""
    with T.serial(rows) as row:
        whole = keys // BLOCK * BLOCK
        with T.serial(keys // BLOCK) as part:
            bits = _bytes(Mask, t0 + row, part * BLOCK)
            T.buffer_store(w.hidden, bits, [row, ramp(part * BLOCK, BLOCK)])
        T.buffer_store(
            w.hidden, tir.Broadcast(tir.const(1, "uint8"), BLOCK), [row, ramp(whole, BLOCK)]
        )
        with T.If(keys >= BLOCK):
            with T.Then():
                # The last whole group of the row, over what is there already.
                first = keys - BLOCK
                bits = _bytes(Mask, t0 + row, first)
                T.buffer_store(w.hidden, bits, [row, ramp(first, BLOCK)])
            with T.Else(), T.serial(keys) as key:
                bit = Mask[t0 + row, key].astype("uint8")
                T.buffer_store(w.hidden, bit, [row, key])


def find_live(task: TileTask, w, rows, keys) -> None:
    """live [i] = a group of keys that a row sees, partial [i] = not all rows see all; count [0]
    of them, count [1] = 1 + the last.
    """
    for slot in range(2):
        T.buffer_store(w.count, tir.const(0, "int32"), [slot])
    groups = (keys + (BLOCK - 1)) // BLOCK
    all_, any_ = (T.alloc_buffer((BLOCK,), "uint8", scope="local") for _ in range(2))
    lanes = ramp(0, BLOCK)

    with T.serial(groups) as group:
        first = group * BLOCK
        if task.problem.atten_mask is None:
            dead = None
            partial = (first + BLOCK > keys).astype("int32")
        else:
            T.buffer_store(all_, _every(255), [lanes])
            T.buffer_store(any_, _every(0), [lanes])
            with T.serial(rows) as row:
                x = T.Bind(load_lanes(w.hidden, [row, first], BLOCK))
                masked = tir.Select(x != _every(0), _every(255), _every(0))
                T.buffer_store(all_, load_lanes(all_, [0], BLOCK) & masked, [lanes])
                T.buffer_store(any_, load_lanes(any_, [0], BLOCK) | x, [lanes])
            a, b, c, d = _words(all_)
            dead = (a & b & c & d) == tir.const(2**64 - 1, "uint64")
            a, b, c, d = _words(any_)
            partial = ((a | b | c | d) != tir.const(0, "uint64")).astype("int32")
        T.buffer_store(w.live, group.astype("int32"), [w.count[0]])
        T.buffer_store(w.partial, partial, [w.count[0]])
        if dead is None:
            T.buffer_store(w.count, w.count[0] + 1, [0])
            T.buffer_store(w.count, group.astype("int32") + 1, [1])
        else:
            T.buffer_store(w.count, w.count[0] + tir.Select(dead, 0, 1), [0])
            last = tir.Select(dead, w.count[1], group.astype("int32") + 1)
            T.buffer_store(w.count, last, [1])


def hide(task: TileTask, w, block: Expr, group: Expr, rows: Expr, keys: Expr) -> None:
    """Minus infinity for the masked scores of 32 rows and 32 keys; a masked key may score
    NaN.
    """
    none = tir.Broadcast(float32(float("-inf")), SIDE)
    with T.serial(BLOCK) as r:
        m = block * BLOCK + r
        t = tir.min((m // task.problem.group).astype("int64"), rows - 1)
        for side in range(2):
            first = group * BLOCK + side * SIDE
            if task.problem.atten_mask is None:
                lane = tir.Ramp(first.astype("int32"), tir.const(1, "int32"), SIDE)
                gone = lane >= tir.Broadcast(keys.astype("int32"), SIDE)
            else:
                bits = load_lanes(w.hidden, [t, first], SIDE)
                gone = bits != tir.Broadcast(tir.const(0, "uint8"), SIDE)
            index = [m, ramp(first, SIDE)]
            T.buffer_store(w.S, tir.Select(gone, none, tir.BufferLoad(w.S, index)), index)


def find_blind(task: TileTask, w, rows, keys) -> None:
    """blind [0] = whether some row sees no key, and takes the mean of all."""
    T.buffer_store(w.blind, tir.const(0, "int32"), [0])
    if task.problem.atten_mask is None or task.problem.zero_masked_rows:
        return
    covered = T.alloc_buffer((BLOCK,), "uint8", scope="local")
    with T.serial(rows) as row:
        T.buffer_store(covered, _every(1), [ramp(0, BLOCK)])
        with T.serial((keys + (BLOCK - 1)) // BLOCK) as group:
            hidden = load_lanes(w.hidden, [row, group * BLOCK], BLOCK)
            left = tir.Select(hidden != _every(0), load_lanes(covered, [0], BLOCK), _every(0))
            T.buffer_store(covered, left, [ramp(0, BLOCK)])
        a, b, c, d = _words(covered)
        none = ((a & b & c & d) == tir.const(0x0101010101010101, "uint64")).astype("int32")
        T.buffer_store(w.blind, w.blind[0] | none, [0])


def uncover(task: TileTask, w, blocks, keys) -> None:
    """A row without a visible key takes the mean of all: its scores are alike, and no key is
    left out.
    """
    low = float32(-FLT_MAX)
    M = blocks * BLOCK
    with T.If(w.blind[0] != 0), T.Then():
        groups = (keys + (BLOCK - 1)) // BLOCK
        none = float32(float("-inf"))
        covered = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(covered, tir.const(0, "int32"), [0])
        with T.serial(groups) as group:
            at = tir.min(covered[0], w.count[0] - 1)
            known = tir.all(covered[0] < w.count[0], w.live[tir.max(at, 0)] == group)
            with T.serial(M) as m, T.serial(BLOCK) as k:
                key = group * BLOCK + k
                alike = tir.Select(key < keys, float32(0), none)
                left = tir.if_then_else(known, w.S[m, key], none)
                T.buffer_store(w.S, tir.Select(w.top[m] == low, alike, left), [m, key])
            T.buffer_store(covered, covered[0] + known.astype("int32"), [0])
        with T.serial(groups) as group:
            T.buffer_store(w.live, group.astype("int32"), [group])
        for slot in range(2):
            T.buffer_store(w.count, groups.astype("int32"), [slot])


def _bytes(Mask: Buffer, row: Expr, first: Expr) -> Expr:
    """32 elements of a mask row as uint8."""
    return load_lanes(Mask, [row, first], BLOCK).astype(f"uint8x{BLOCK}")


def _every(value: int) -> Expr:
    return tir.Broadcast(tir.const(value, "uint8"), BLOCK)


def _words(x: Buffer) -> list[Expr]:
    """32 bytes as four uint64."""
    vector = T.Bind(tir.reinterpret("uint64x4", load_lanes(x, [0], BLOCK)))
    return [tir.Shuffle([vector], [i]) for i in range(4)]
