"""What the products of matrix tiles of bfloat16 (AMX) read in a task of attention.

Queries are pairs of what is summed over, one row of them for 32 query rows; a tile of keys is
loaded where it lies, 16 keys of 32 elements; values are transposed, once for all groups of rows.

Buffers, with D rounded up to E, a multiple of 32, and K keys that are made ready together: queries
uint32 [groups * E/2][W]; weights uint32 [C/2][W]; values uint32 [K/32 * E][16], pairs of keys;
where keys cannot be loaded in place, a copy uint16 [K][E]. Blocks of 32 keys beyond the last repeat
it, with weight 0.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import x86_amx
from .attention_bf16 import PairTile
from .transpose import transpose_square
from .vector import load_lanes, ramp

SIDE = x86_amx.ROWS
"""Rows and columns of a tile of float32, pairs of bfloat16 in a row."""
BLOCK = 2 * SIDE
"""Keys, query rows, elements of D of a product: two tiles each way."""
HALF_BYTES = 2
"""Of bfloat16."""


class OperandTask(PairTile):
    @property
    def terms(self) -> int:
        """Numbers of bfloat16 that an element is the sum of."""
        return 1

    @property
    def depth(self) -> int:
        """E"""
        return -(-self.problem.D // BLOCK) * BLOCK

    @property
    def query_rows(self) -> int:
        return self.depth // 2

    @property
    def keys_in_place(self) -> bool:
        return self.problem.D % BLOCK == 0

    @property
    def staged_keys(self) -> int:
        return self.config.keys * self.config.staged_tiles

    def _allocate_operands(self) -> None:
        c, terms = self.config, self.terms
        query_rows = c.groups * self.query_rows
        value_rows = self.staged_keys // BLOCK * self.depth
        self.queries = T.alloc_buffer((terms * query_rows, c.width), "uint32")
        self.key_tile = T.alloc_buffer((terms * self.staged_keys, self.depth), "uint16")
        if self.wants_output:
            self.weights = T.alloc_buffer((terms * c.keys // 2, c.width), "uint32")
            self.value_tile = T.alloc_buffer((terms * value_rows, SIDE), "uint32")

    def _query_row(self, term: int, group: Expr) -> Expr:
        """First row of a group's queries."""
        return (term * self.config.groups + group) * self.query_rows

    def _key_tile_row(self, term: int, block: Expr) -> Expr:
        """First row of a block's keys."""
        return term * self.staged_keys + block * BLOCK

    def _value_row(self, term: int, block: Expr) -> Expr:
        """First row of a block's values."""
        return (term * (self.staged_keys // BLOCK) + block) * self.depth

    def _weight_row(self, term: int, block: Expr | int) -> Expr | int:
        """First row of a block's weights."""
        return term * self.config.keys // 2 + block * SIDE

    def _load_queries(self) -> None:
        super()._load_queries()
        c, rest = self.config, self.query_rows - self.pairs
        if rest:
            with T.serial(self.groups) as group, T.serial(rest) as d, T.vectorized(c.width) as r:
                index = [group * self.query_rows + self.pairs + d, r]
                T.buffer_store(self.queries, tir.const(0, "uint32"), index)

    def _stage(self, j0: Expr, count: Expr) -> None:
        blocks = (count + (BLOCK - 1)) // BLOCK
        with T.serial(blocks) as block:
            first = T.Bind(j0 + block * BLOCK)
            if not self.keys_in_place:
                self._stage_keys(block, first)
            else:
                with T.If(first + BLOCK > self.at.S2), T.Then():
                    self._stage_keys(block, first)
            if self.wants_output:
                rows = T.alloc_buffer((BLOCK,), "int64", scope="local")
                with T.serial(BLOCK) as k:
                    T.buffer_store(rows, self._key_row(first + k), [k])
                if self.problem.D < BLOCK:
                    self._stage_value_elements(block, rows)
                else:
                    self._stage_value_strips(block, rows)

    def _key_row(self, j: Expr) -> Expr:
        """Row of key j, the last one's beyond it."""
        return (self.at.key_start + tir.min(j, self.at.S2 - 1)).astype("int64")

    def _stage_keys(self, block: Expr, first: Expr) -> None:
        """key_tile[block * 32 + k] = key first + k, continued by 0."""
        p, L = self.problem, self.config.lanes
        with T.serial(BLOCK) as k:
            row = T.Bind(self._key_row(first + k))

            def store(d: Expr, row: Expr = row, k: Expr = k) -> None:
                index = attention.element(p.layout, p.D, self.at.b, self.g, row, d)
                bits = tir.reinterpret("uint16", self.buffers["key"][tuple(index)])
                T.buffer_store(self.key_tile, bits, [block * BLOCK + k, d])

            with T.serial(p.D // L) as strip, T.vectorized(L) as v:
                store(strip * L + v)
            with T.serial(p.D % L) as tail:
                store(p.D // L * L + tail)
            with T.serial(self.depth - p.D) as d:
                index = [block * BLOCK + k, p.D + d]
                T.buffer_store(self.key_tile, tir.const(0, "uint16"), index)

    def _stage_value_elements(self, block: Expr, rows: tir.Buffer) -> None:
        with T.serial(self.problem.D) as d, T.serial(SIDE) as pair:
            low, high = (self._bits("value", self.g, rows[2 * pair + k], d) for k in range(2))
            word = low | high << tir.const(16, "uint32")
            T.buffer_store(self.value_tile, word, [block * self.depth + d, pair])

    def _stage_value_strips(self, block: Expr, rows: tir.Buffer) -> None:
        """value_tile[block * E + d][k] = element d of value rows 2k and 2k + 1.

        32 elements at a time: those of even and of odd d are two square blocks of pairs, which are
        transposed in registers. A last partial strip is moved back over the one before it.
        """
        p, at, L = self.problem, self.at, self.config.lanes
        low, high = (tir.Broadcast(tir.const(x, "uint32"), L) for x in (0xFFFF, 0xFFFF0000))
        half = tir.Broadcast(tir.const(16, "uint32"), L)
        with T.serial(-(-p.D // BLOCK)) as strip:
            first = T.Bind(tir.min(strip * BLOCK, p.D - BLOCK))

            def words(row: Expr, first: Expr = first) -> Expr:
                index = attention.element(p.layout, p.D, at.b, self.g, row, first)
                elements = load_lanes(self.buffers["value"], index, BLOCK)
                return tir.reinterpret(f"uint32x{L}", tir.reinterpret(f"uint16x{BLOCK}", elements))

            for odd in range(2):
                square = T.alloc_buffer((L, L), "uint32", scope="local")
                for k in range(L):
                    a, b = (T.Bind(words(rows[2 * k + second])) for second in range(2))
                    pair = (a >> half) | (b & high) if odd else (a & low) | (b << half)
                    T.buffer_store(square, pair, [k, ramp(0, L)])
                transpose_square(square, L)
                for k in range(L):
                    index = [block * self.depth + first + (2 * k + odd), ramp(0, L)]
                    T.buffer_store(self.value_tile, load_lanes(square, [k, 0], L), index)
