"""Operands of the NSA kernel on matrix tiles, as terms of bfloat16: keys and values, packed once
per call, and rows of queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from .attention_operands import BLOCK, SIDE
from .transpose import transpose_square
from .vector import load_lanes, ramp

if TYPE_CHECKING:
    from .nsa_amx import TileTask


def pack_keys(task: TileTask, packed, Keys, h2, slot, row, count) -> None:
    rows = T.alloc_buffer((task.terms, BLOCK, task.depth), "uint16")
    with T.serial(BLOCK) as k:
        source = T.Bind(row + tir.min(k.astype("int64"), count - 1))
        with T.serial(task.depth // BLOCK) as strip:
            copy_strip(task, rows, k, Keys, (source, h2), strip)
    with (
        T.serial(task.terms) as term,
        T.serial(2) as half,
        T.serial(task.depth // BLOCK) as strip,
    ):
        block = T.alloc_buffer((SIDE, SIDE), "uint32", scope="local")
        for k in range(SIDE):
            pairs = load_lanes(rows, [term, half * SIDE + k, strip * BLOCK], BLOCK)
            pairs = tir.reinterpret(f"uint32x{SIDE}", pairs)
            if task.problem.scale < 0:
                pairs = pairs ^ tir.Broadcast(tir.const(0x80008000, "uint32"), SIDE)
            T.buffer_store(block, pairs, [k, ramp(0, SIDE)])
        transpose_square(block, SIDE)
        for c in range(SIDE):
            index = [h2, slot, term, half, strip * SIDE + c, ramp(0, SIDE)]
            T.buffer_store(packed.K, load_lanes(block, [c, 0], SIDE), index)


def pack_values(task: TileTask, packed, Values, h2, slot, row, count) -> None:
    """V[h2][slot][term][column // 16][i][column % 16] = values i and i + 16."""
    DV = task.problem.value_size

    def words(i: Expr, column: Expr) -> list[Expr]:
        source = row + tir.min(i.astype("int64"), count - 1)
        found = task.value_words(Values[source, h2, tir.min(column, DV - 1)])
        inside = tir.all(i < count, column < DV)
        return [tir.Select(inside, word, tir.const(0, "uint32")) for word in found]

    with T.serial(SIDE) as i, T.serial(2 * task.strips) as panel, T.serial(SIDE) as c:
        halves = (words(i + more, panel * SIDE + c) for more in (0, SIDE))
        for term, (low, high) in enumerate(zip(*halves)):
            pair = low | high << tir.const(16, "uint32")
            T.buffer_store(packed.V, pair, [h2, slot, term, panel, i, c])


def copy_strip(task: TileTask, rows: Buffer, m: Expr, source: Buffer, index, strip: Expr) -> None:
    """rows[term][m] = terms of 32 elements of a row of queries or keys, continued by 0."""
    size, first = task.problem.head_size, strip * BLOCK

    def store(x: Expr, place: Expr) -> None:
        for term, bits in enumerate(task.element_words(x)):
            T.buffer_store(rows, bits, [term, m, place])

    def whole() -> None:
        store(load_lanes(source, [*index, first], BLOCK), ramp(first, BLOCK))

    if size % BLOCK == 0:
        whole()
        return
    with T.If(strip < size // BLOCK):
        with T.Then():
            whole()
        with T.Else():
            with T.serial(size % BLOCK) as c:
                store(source[(*index, first + c)], first + c)
            with T.serial(task.terms) as term, T.serial(task.depth - size) as c:
                T.buffer_store(rows, tir.const(0, "uint16"), [term, m, size + c])
