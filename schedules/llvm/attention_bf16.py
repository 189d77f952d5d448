"""A task of the fused attention kernel on bfloat16 dot product instructions.

Both products take pairs along what they sum over. Queries are transposed as pairs along D, and the
pairs of a key are its own neighbouring elements: nothing is converted. Weights are rounded to
bfloat16 as pairs of keys, and values are interleaved alike, once per tile of keys.

Buffers: queries uint32 [groups * D/2][W]; weights uint32 [C/2][W]; values uint32 [C/2][D]; with odd
D also keys uint32 [C][D/2], and 0 fills the last pair. Sums and scores stay float32.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import x86_bf16
from .attention_tile import Tile
from .transpose import transpose_square
from .vector import load_lanes, ramp


class PairTile(Tile):
    @property
    def pairs(self) -> int:
        """Pairs along D."""
        return (self.problem.D + 1) // 2

    @property
    def query_rows(self) -> int:
        """Rows of the queries of a group."""
        return self.pairs

    def _allocate_operands(self) -> None:
        p, c = self.problem, self.config
        self.queries = T.alloc_buffer((c.groups * self.pairs, c.width), "uint32")
        if p.D % 2:
            self.key_tile = T.alloc_buffer((c.keys, self.pairs), "uint32")
        if self.wants_output:
            self.weights = T.alloc_buffer((c.keys // 2, c.width), "uint32")
            self.value_tile = T.alloc_buffer((c.keys // 2, p.D), "uint32")

    def _load_queries(self) -> None:
        """queries[group * D/2 + d][r] = elements 2d, 2d + 1 of query row i0 + group * W + r."""
        c, at = self.config, self.at
        L = c.lanes

        def row(r: Expr) -> Expr:
            return at.query_start + tir.min(self.i0 + r, at.S1 - 1)

        def element_wise(group: Expr) -> None:
            with T.serial(self.pairs) as d, T.serial(c.width) as r:
                pair = self._pair("query", self.n, row(group * c.width + r), d)
                T.buffer_store(self.queries, pair, [group * self.query_rows + d, r])

        def in_blocks(group: Expr) -> None:
            with T.serial(-(-self.pairs // L)) as strip, T.serial(c.vectors) as u:
                first = T.Bind(tir.min(strip * L, self.pairs - L))
                block = T.alloc_buffer((L, L), "uint32", scope="local")
                for r in range(L):
                    pairs = self._pairs("query", self.n, row(group * c.width + u * L + r), first, L)
                    T.buffer_store(block, pairs, [r, ramp(0, L)])
                transpose_square(block, L)
                for k in range(L):
                    index = [group * self.query_rows + first + k, ramp(u * L, L)]
                    T.buffer_store(self.queries, load_lanes(block, [k, 0], L), index)

        with T.serial(self.groups) as group:
            if self.problem.D % 2 or self.pairs < L:
                element_wise(group)
            else:
                in_blocks(group)

    def _pairs(self, name: str, n: Expr, row: Expr, first: Expr, lanes: int) -> Expr:
        """Pairs first, first + 1, ... of a row, as uint32."""
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, n, row, 2 * first)
        elements = load_lanes(self.buffers[name], index, 2 * lanes)
        words = tir.reinterpret(f"uint16x{2 * lanes}", elements)
        return tir.reinterpret("uint32" if lanes == 1 else f"uint32x{lanes}", words)

    def _pair(self, name: str, n: Expr, row: Expr, d: Expr) -> Expr:
        """Pair d of a row, element by element; 0 where D ends."""
        p = self.problem
        low = self._bits(name, n, row, 2 * d)
        if p.D % 2 == 0:
            return low | self._bits(name, n, row, 2 * d + 1) << tir.const(16, "uint32")
        high = self._bits(name, n, row, tir.min(2 * d + 1, p.D - 1)) << tir.const(16, "uint32")
        return low | tir.Select(2 * d + 1 < p.D, high, tir.const(0, "uint32"))

    def _bits(self, name: str, n: Expr, row: Expr, d: Expr) -> Expr:
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, n, row, d)
        return tir.reinterpret("uint16", self.buffers[name][tuple(index)]).astype("uint32")

    def _stage(self, j0: Expr, count: Expr) -> None:
        p, at = self.problem, self.at
        if p.D % 2:
            with T.serial(count) as j, T.serial(self.pairs) as d:
                pair = self._pair("key", self.g, at.key_start + j0 + j, d)
                T.buffer_store(self.key_tile, pair, [j, d])
        if self.wants_output:
            with T.serial(count // 2) as pair:
                self._interleave(j0, pair, last=False)
            with T.If(count % 2 != 0), T.Then():
                self._interleave(j0, count // 2, last=True)

    def _interleave(self, j0: Expr, pair: Expr, last: bool) -> None:
        """value_tile[pair][d] = value rows 2 * pair, 2 * pair + 1; ``last``: 0 for the second."""
        p, at, L = self.problem, self.at, self.config.lanes
        row = at.key_start + j0 + 2 * pair

        def store(d: Expr) -> None:
            value = self._bits("value", self.g, row, d)
            if not last:
                second = self._bits("value", self.g, row + 1, d)
                value = value | second << tir.const(16, "uint32")
            T.buffer_store(self.value_tile, value, [pair, d])

        with T.serial(p.D // L) as strip, T.vectorized(L) as v:
            store(strip * L + v)
        if p.D % L:
            with T.serial(p.D % L) as tail:
                store(p.D // L * L + tail)

    def _key_source(self, j0: Expr, key: Expr, last: Expr | None) -> Callable[[Expr], Expr]:
        """d -> pair of the key row; beyond the tile's last key that one is read again."""
        if last is not None:
            key = T.Bind(tir.min(key, last))
        if self.problem.D % 2:
            return lambda d: self.key_tile[key, d]
        j = T.Bind(self.at.key_start + j0 + key)
        return lambda d: self._pairs("key", self.g, j, d, 1)

    def _multiply_keys(
        self, acc: tir.Buffer, group: Expr, j0: Expr, keys: list[Expr], last: Expr | None
    ) -> None:
        sources = [self._key_source(j0, key, last) for key in keys]
        with T.serial(self.pairs) as d:
            self._dots(acc, self.queries, group * self.pairs + d, [s(d) for s in sources])

    def _dots(self, acc: tir.Buffer, rows: tir.Buffer, row: Expr, scalars: list[Expr]) -> None:
        """acc[k][r] += scalar k . rows[row][r]"""
        c = self.config
        L = c.lanes
        vectors = [T.Bind(load_lanes(rows, [row, u * L], L)) for u in range(c.vectors)]
        for k, scalar in enumerate(scalars):
            broadcast = T.Bind(tir.Broadcast(scalar, L))
            for u, vector in enumerate(vectors):
                total = x86_bf16.dot(load_lanes(acc, [k, u * L], L), vector, broadcast)
                T.buffer_store(acc, total, [k, ramp(u * L, L)])

    def _each_weight(self, count: Expr, weight: Callable[[Expr, int], Expr]) -> None:
        """Pairs of keys; the scores beyond an odd ``count`` are minus infinity."""
        with T.serial((count + 1) // 2) as pair:
            self._before_pair(pair)
            for u in range(self.config.vectors):
                first, second = weight(2 * pair, u), weight(2 * pair + 1, u)
                if self.wants_output:
                    self._store_weights(pair, u, first, second)

    def _before_pair(self, pair: Expr) -> None:
        """What goes on beside the weights of a pair of keys."""

    def _store_weights(self, pair: Expr, u: int, first: Expr, second: Expr) -> None:
        L = self.config.lanes
        T.buffer_store(self.weights, self._rounded(first, second), [pair, ramp(u * L, L)])

    def _rounded(self, first: Expr, second: Expr) -> Expr:
        """A register of pairs from two of float32."""
        return x86_bf16.round_pairs(first, second)

    def _multiply_values(
        self, acc: tir.Buffer, j0: Expr, count: Expr, first: Expr, width: int
    ) -> None:
        with T.serial((count + 1) // 2) as pair:
            scalars = [self.value_tile[pair, first + k] for k in range(width)]
            self._dots(acc, self.weights, pair, scalars)
