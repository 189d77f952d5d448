"""A task of few query rows (decoding) of bfloat16 on matrix tiles (AMX): the heads of a group are
the rows of one tile, so many of them take what one does.

    for tile of the keys that the row sees:                             C keys
        scores = keys * queries, 32 keys at a time, transposed          [H][C]
        weights, sums, as row by row                                    [H][C]
        for strip of 32 elements of D:
            sums = weights * pairs of values, 32 keys at a time         [H][32]
            output += sums                                              [H][D]

Keys are loaded where they lie, a row of a tile from each of 16 stripes. Of the values two rows are
interleaved in registers, which parts 8 neighbours into twice 4: sums lie in that order. What
follows the last 32 keys of a tile is left to multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import x86_amx
from .attention_amx import load_tile, store_tile
from .attention_operands import BLOCK, SIDE
from .attention_row import KeyTile, RowTile
from .vector import load_lanes, ramp

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem

TILE_KEYS = 128
"""C"""
TILE_STRIPES = SIDE
"""Places of the keys from which the rows of a tile of keys come."""
LEAST_HEADS = 5
"""Multiply-adds of fewer are done before memory brings the next keys, and need no pairs of values:
four heads take 0.96 times the time by them, measured on Sapphire Rapids.
"""
MOST_HEADS = SIDE
SCORES, QUERIES, OPERANDS, WEIGHTS, SUMS = (0, 1), 2, (3, 4), 5, (6, 7)
"""Tiles; operands are keys, then pairs of values."""
_WORD, _HALF = 4, 2
"""Bytes."""
_QUAD = 4
"""Neighbours that interleaving leaves together."""


def takes_heads(problem: AttentionProblem, heads: int) -> bool:
    """Whether tasks of so many heads gain from matrix tiles."""
    return problem.dtype == "bfloat16" and problem.D % BLOCK == 0 and heads >= LEAST_HEADS


class HeadsTile(RowTile):
    """Further buffers, H' being H rounded up to a power of two: queries uint32 [D/2][H'], pairs of
    elements; products float32 [C * H'], scores by keys; weights uint16 [H][C]; pairs uint16
    [32][32], two rows of values to each; sums float32 [2][H][16].
    """

    @property
    def columns(self) -> int:
        """H'"""
        return 1 << (self.config.heads - 1).bit_length()

    def emit(self) -> None:
        p, c = self.problem, self.config
        self.queries = T.alloc_buffer((p.D // 2, self.columns), "uint32")
        self.products = T.alloc_buffer((c.keys * self.columns,))
        if self.wants_output:
            self.weights = T.alloc_buffer((c.heads, c.keys), "uint16")
            self.pairs = T.alloc_buffer((BLOCK, BLOCK), "uint16")
            self.sums = T.alloc_buffer((2, c.heads, SIDE))
        shapes = dict.fromkeys((*SCORES, QUERIES), (SIDE, self.columns * _WORD))
        shapes |= dict.fromkeys((WEIGHTS, *SUMS), (c.heads, x86_amx.ROW_BYTES))
        T.evaluate(x86_amx.shape(shapes))
        super().emit()
        T.evaluate(x86_amx.release())

    def _start_row(self, h: Expr, i: Expr) -> None:
        super()._start_row(h, i)
        with T.serial(self.problem.D // 2) as pair:
            low, high = (self._query_bits(i, 2 * pair + k) for k in range(2))
            T.buffer_store(self.queries, low | high << tir.const(16, "uint32"), [pair, h])
            for column in range(self.config.heads, self.columns):
                T.buffer_store(self.queries, tir.const(0, "uint32"), [pair, column])

    def _query_bits(self, i: Expr, d: Expr) -> Expr:
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, self.n, at.query_start + i, d)
        return tir.reinterpret("uint16", self.buffers["query"][tuple(index)]).astype("uint32")

    def _products(self, tile: KeyTile) -> None:
        """Blocks of 32 keys; the last one is moved back over the one before it."""
        count = tile.count
        with T.If(count < BLOCK):
            with T.Then():
                super()._products(tile)
            with T.Else():
                with T.serial((count + (BLOCK - 1)) // BLOCK) as block:
                    self._multiply_keys(tile, T.Bind(tir.min(block * BLOCK, count - BLOCK)))
                with T.serial((count + (SIDE - 1)) // SIDE) as strip:
                    self._part_heads(strip * SIDE)

    def _multiply_keys(self, tile: KeyTile, first: Expr) -> None:
        """products[k][h] = key k . query h of 32 keys, ``first`` and on. The values of the same
        keys are asked for meanwhile.
        """
        pitch = self.columns * _WORD
        step = tir.const(1, "int64") if tile.stripes == 1 else tile.apart.astype("int64")
        for scores in SCORES:
            T.evaluate(x86_amx.zero(scores))
        with T.serial(self.problem.D // BLOCK) as strip:
            load_tile(QUERIES, self.queries[strip * SIDE, 0], pitch)
            for half, (keys, scores) in enumerate(zip(OPERANDS, SCORES)):
                row = self._row(tile.key(first + half * SIDE), strip * BLOCK)
                load_tile(keys, self.buffers["key"][row], self.key_pitch() * step)
                T.evaluate(x86_amx.multiply_bf16(scores, keys, QUERIES))
            if self.wants_output:
                for line in range(BLOCK):
                    self._ask_for_line("value", lambda k: tile.key(first + k), strip * BLOCK + line)
        for half, scores in enumerate(SCORES):
            start = (first + half * SIDE) * self.columns
            store_tile(scores, self.products[start], pitch)

    def _part_heads(self, first: Expr) -> None:
        """scores[h][k] = products[k][h] of 16 keys, ``first`` and on; after all products, for what
        a tile has just stored is loaded late.
        """
        starts = [first * self.columns + k * SIDE for k in range(self.columns)]
        rows = [T.Bind(load_lanes(self.products, [start], SIDE)) for start in starts]
        for h, column in enumerate(_columns(rows)[: self.config.heads]):
            T.buffer_store(self.scores, column, [h, ramp(first, SIDE)])

    def _row(self, j: Expr, d: Expr) -> tuple[Expr, ...]:
        """Place of element d of key or value j."""
        p, at = self.problem, self.at
        return tuple(attention.element(p.layout, p.D, at.b, self.g, at.key_start + j, d))

    def _ask_for_line(self, name: str, key: Callable[[Expr], Expr], line: Expr) -> None:
        """Prefetch 32 elements, counted through the rows key(0), key(1), ..."""
        lines = self.problem.D // BLOCK
        self._prefetch(name, self._row(key(line // lines), line % lines * BLOCK))

    def _add_values(self, tile: KeyTile, first_key: Expr | int = 0) -> None:
        """What follows the last block goes first, and applies the correction."""
        blocks = T.Bind(tile.count // BLOCK)
        super()._add_values(tile, blocks * BLOCK)
        with T.If(blocks > 0), T.Then():
            self._round_weights(blocks * BLOCK)
            with T.serial(self.problem.D // BLOCK) as strip:
                for sums in SUMS:
                    T.evaluate(x86_amx.zero(sums))
                with T.serial(blocks) as block:
                    self._interleave(tile, block, strip)
                    weights = self.weights[0, block * BLOCK]
                    load_tile(WEIGHTS, weights, self.config.keys * _HALF)
                    for half, (values, sums) in enumerate(zip(OPERANDS, SUMS)):
                        load_tile(values, self.pairs[half * SIDE, 0], x86_amx.ROW_BYTES)
                        T.evaluate(x86_amx.multiply_bf16(sums, WEIGHTS, values))
                self._add_sums(strip)

    def _round_weights(self, count: Expr) -> None:
        """To bfloat16; ties go up."""
        half, place = tir.const(0x8000, "uint32"), tir.const(16, "uint32")
        with (
            T.serial(self.config.heads) as h,
            T.serial(count // SIDE) as strip,
            T.vectorized(SIDE) as v,
        ):
            k = strip * SIDE + v
            bits = tir.reinterpret("uint32", self.scores[h, k])
            T.buffer_store(self.weights, ((bits + half) >> place).astype("uint16"), [h, k])

    def _interleave(self, tile: KeyTile, block: Expr, strip: Expr) -> None:
        """pairs[k] and pairs[16 + k] = value rows 2k and 2k + 1 of a block, of each 8 elements the
        first and the last 4. The keys of the next tile are asked for meanwhile.
        """
        halves = [
            [
                row * BLOCK + group + half * _QUAD + k
                for group, k, row in product(range(0, BLOCK, 2 * _QUAD), range(_QUAD), range(2))
            ]
            for half in range(2)
        ]
        for pair in range(SIDE):
            rows = []
            for k in range(2):
                row = self._row(tile.key(block * BLOCK + (2 * pair + k)), strip * BLOCK)
                elements = load_lanes(self.buffers["value"], row, BLOCK)
                rows.append(T.Bind(tir.reinterpret(f"uint16x{BLOCK}", elements)))
                line = strip * self.config.keys + block * BLOCK + (2 * pair + k)
                self._ask_for_line("key", lambda k: tile.next_key(tile.key(k)), line)
            for half, lanes in enumerate(halves):
                index = [half * SIDE + pair, ramp(0, BLOCK)]
                T.buffer_store(self.pairs, tir.Shuffle(rows, lanes), index)

    def _add_sums(self, strip: Expr) -> None:
        """output += the sums of 32 elements, in the order of D again."""
        for half, sums in enumerate(SUMS):
            store_tile(sums, self.sums[half, 0, 0], x86_amx.ROW_BYTES)
        with T.serial(self.config.heads) as h:
            halves = [T.Bind(load_lanes(self.sums, [half, h, 0], SIDE)) for half in range(2)]
            for start in range(0, SIDE, SIDE // 2):
                lanes = [
                    half * SIDE + start + group + k
                    for group, half, k in product((0, _QUAD), range(2), range(_QUAD))
                ]
                d = strip * BLOCK + 2 * start
                total = load_lanes(self.output, [h, d], SIDE) + tir.Shuffle(halves, lanes)
                T.buffer_store(self.output, total, [h, ramp(d, SIDE)])


def _columns(rows: list[Expr]) -> list[Expr]:
    """The columns, a vector each, of a matrix of as many columns as there are vectors; these hold
    it row by row.
    """
    if len(rows) == 1:
        return rows
    even, odd = (
        _columns(
            [
                T.Bind(tir.Shuffle([a, b], list(range(first, 2 * SIDE, 2))))
                for a, b in zip(rows[::2], rows[1::2])
            ]
        )
        for first in range(2)
    )
    return [column for pair in zip(even, odd) for column in pair]
