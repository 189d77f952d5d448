"""A task of the fused attention kernel on matrix tiles of bfloat16 (AMX), for float32 and float16.

An element is a sum of bfloat16 terms, each what the ones before leave: three terms hold every
float32 exactly, two every float16. A product of two elements is the sum of the products of their
terms, of which those are left out that are below what the result resolves: of three terms six
products are taken, of two all four for the scores and three for the output. Products of bfloat16
are exact and are summed in float32, so the result is as good as that of float32 multiply-adds.

The tiles take terms and products below 2**-126 for zero. In float16 these do not matter. Nor do
they in float32 while no element reaches `LIMIT`: what a score misses is then far below 1, and
values, multiplied by `VALUE_SCALE`, are far above. A task that meets a larger element says so
(`refused`), and is done again by multiply-adds.

Buffers as in ``attention_operands``, once for each term, one term behind the other: queries uint32
[terms * groups * E/2][W]; weights uint32 [terms * C/2][W]; values uint32 [terms * K/32 * E][16];
keys uint16 [terms * K][E].
"""

from __future__ import annotations

import math

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import x86_amx
from .attention_amx import TileTask
from .attention_operands import BLOCK, SIDE
from .transpose import transpose_square
from .vector import (
    constant,
    float32,
    lanes_of,
    load_lanes,
    max_lanes,
    ramp,
    reinterpret,
    to_float32,
)

TERMS = {"float16": 2, "float32": 3}
"""bfloat16 numbers that an element is the sum of."""
LIMIT = 2.0**72
"""Magnitude of float32 queries, keys and scaled values from which on multiply-adds take over."""
VALUE_SCALE = 2.0**32
"""Of float32 values: products of their terms with weights that matter are above 2**-126."""
LARGEST_SCALE = 2.0**16
"""Of the scores: with terms below 2**-126, elements of `LIMIT` and D = 512 that is an error of
2**-29.
"""


def splits(dtype: str, scale: float) -> bool:
    """Whether scores and outputs of ``dtype`` go by terms: not where a scale makes terms matter
    that count as zero.
    """
    return dtype in TERMS and abs(scale) <= LARGEST_SCALE


def may_refuse(dtype: str) -> bool:
    """Whether a task by terms may meet elements that it leaves to multiply-adds."""
    return dtype == "float32"


def bfloat16_terms(x: Expr, count: int) -> list[Expr]:
    """The bits (uint32) of float32 numbers whose upper halves are bfloat16 numbers with the sum
    ``x``, a float32 or a vector of them.

    Each is cut, so that no finite number becomes infinite; three hold all 24 bits. The last of two
    is rounded, half up: together they are within 2**-16 of ``x``, and float16 is held exactly.
    """
    terms: list[Expr] = []
    rest = x
    for left in reversed(range(count)):
        bits = reinterpret("uint32", rest)
        if left:
            bits = T.Bind(bits & constant(0xFFFF0000, "uint32", x))
            rest = T.Bind(rest - reinterpret("float32", bits))
        elif count == 2:
            bits = bits + constant(0x8000, "uint32", x)
        terms.append(bits)
    return terms


def _pairs(low: Expr, high: Expr, terms: int) -> list[Expr]:
    """Pairs of the terms of two elements, or of two vectors of them."""
    pairs = zip(bfloat16_terms(low, terms), bfloat16_terms(high, terms))
    if lanes_of(low) > 1:
        return [x86_amx.upper_halves(a, b) for a, b in pairs]
    half, upper = (tir.const(x, "uint32") for x in (16, 0xFFFF0000))
    return [(a >> half) | (b & upper) for a, b in pairs]


class SplitTask(TileTask):
    @property
    def terms(self) -> int:
        return TERMS[self.problem.dtype]

    @property
    def may_refuse(self) -> bool:
        return may_refuse(self.problem.dtype)

    @property
    def keys_in_place(self) -> bool:
        return False

    def _allocate(self) -> None:
        super()._allocate()
        if self.may_refuse:
            self.largest = T.alloc_buffer((BLOCK,), "uint16", scope="local")
            none = tir.Broadcast(tir.const(0, "uint16"), BLOCK)
            T.buffer_store(self.largest, none, [ramp(0, BLOCK)])

    def _watched(self, bits: Expr, finite: bool = False) -> Expr:
        """``bits`` of bfloat16 numbers, uint16 or pairs of them as uint32, up to 32 in all, whose
        magnitudes enter ``largest``, or those of ``finite`` ones only.
        """
        if not self.may_refuse:
            return bits
        bits = T.Bind(bits)
        count = lanes_of(bits) * (2 if str(bits.ty).startswith("uint32") else 1)
        halves = tir.reinterpret("uint16" if count == 1 else f"uint16x{count}", bits)
        index = ramp(0, count) if count > 1 else 0
        magnitudes = T.Bind(halves & constant(0x7FFF, "uint16", halves))
        if finite:
            infinity, none = (constant(x, "uint16", halves) for x in (0x7F80, 0))
            magnitudes = tir.Select(magnitudes < infinity, magnitudes, none)
        before = tir.BufferLoad(self.largest, [index])
        T.buffer_store(self.largest, tir.max(before, magnitudes), [index])
        return bits

    def refused(self) -> Expr:
        """Whether some element was `LIMIT` or more. NaN in a query stays in its row."""
        largest = max_lanes(tir.BufferLoad(self.largest, [ramp(0, BLOCK)]))
        return largest >= tir.const(int(math.log2(LIMIT) + 127) << 7, "uint16")

    def inverse(self, total: Expr) -> Expr:
        inverse = super().inverse(total)
        return inverse * float32(1 / VALUE_SCALE) if self.may_refuse else inverse

    # -- operands -----------------------------------------------------------------------------

    def _load_queries(self) -> None:
        """queries[term][group * E/2 + d][r] = term of elements 2d, 2d + 1 of query row
        i0 + group * W + r.
        """
        p, c = self.problem, self.config
        with T.serial(self.groups) as group:
            if p.D % 2 or c.lanes > p.D:
                self._load_query_elements(group)
            else:
                self._load_query_blocks(group)
            rest = self.query_rows - self.pairs
            if rest:
                zero = tir.Broadcast(tir.const(0, "uint32"), c.lanes)
                with T.serial(rest) as d:
                    for term in range(self.terms):
                        for u in range(c.vectors):
                            index = [self._query_row(term, group) + self.pairs + d]
                            T.buffer_store(self.queries, zero, [*index, ramp(u * c.lanes, c.lanes)])

    def _query(self, r: Expr, d: Expr, lanes: int = 1) -> Expr:
        """Elements d, d + 1, ... of query row i0 + r; rows beyond S1 repeat the last."""
        row = self.at.query_start + tir.min(self.i0 + r, self.at.S1 - 1)
        return self._elements("query", self.n, row, d, lanes)

    def _elements(self, name: str, n: Expr, row: Expr, d: Expr, lanes: int = 1) -> Expr:
        p = self.problem
        index = attention.element(p.layout, p.D, self.at.b, n, row, d)
        buffer = self.buffers[name]
        found = buffer[tuple(index)] if lanes == 1 else load_lanes(buffer, index, lanes)
        element = to_float32(found, self.unit)
        if name == "value" and self.may_refuse:
            element = element * float32(VALUE_SCALE, element)
        return T.Bind(element)

    def _element_words(self, low: Expr, high: Expr, finite: bool = False) -> list[Expr]:
        """Pairs of the terms of elements."""
        first, *rest = _pairs(low, high, self.terms)
        return [self._watched(first, finite), *rest]

    def _element_pair(self, name: str, n: Expr, row: Expr, d: Expr) -> list[Expr]:
        """Terms of elements 2d, 2d + 1; 0 where D ends."""
        low = self._elements(name, n, row, 2 * d)
        high = self._elements(name, n, row, tir.min(2 * d + 1, self.problem.D - 1))
        if self.problem.D % 2:
            high = T.Bind(tir.Select(2 * d + 1 < self.problem.D, high, tir.const(0, "float32")))
        return self._element_words(low, high, finite=name == "query")

    def _load_query_elements(self, group: Expr) -> None:
        c, at = self.config, self.at
        with T.serial(self.pairs) as d, T.serial(c.width) as r:
            row = at.query_start + tir.min(self.i0 + group * c.width + r, at.S1 - 1)
            for term, pair in enumerate(self._element_pair("query", self.n, row, d)):
                T.buffer_store(self.queries, pair, [self._query_row(term, group) + d, r])

    def _load_query_blocks(self, group: Expr) -> None:
        p, c = self.problem, self.config
        L = c.lanes
        with T.serial(-(-p.D // L)) as strip, T.serial(c.vectors) as u:
            first = T.Bind(tir.min(strip * L, p.D - L))
            block = T.alloc_buffer((L, L), scope="local")
            for r in range(L):
                elements = self._query(group * c.width + u * L + r, first, L)
                T.buffer_store(block, elements, [r, ramp(0, L)])
            transpose_square(block, L)
            with T.serial(L // 2) as k:
                low, high = (load_lanes(block, [2 * k + odd, 0], L) for odd in range(2))
                for term, pair in enumerate(self._element_words(low, high, finite=True)):
                    row = self._query_row(term, group) + first // 2 + k
                    T.buffer_store(self.queries, pair, [row, ramp(u * L, L)])

    def _stage_keys(self, block: Expr, first: Expr) -> None:
        """key_tile[term][block * 32 + k] = term of key first + k, continued by 0."""
        p, L = self.problem, self.config.lanes
        upper = list(range(1, 4 * L, 2))
        with T.serial(BLOCK) as k:
            row = T.Bind(self._key_row(first + k))

            with T.serial(p.D // BLOCK) as strip:
                halves = [
                    bfloat16_terms(
                        self._elements("key", self.g, row, strip * BLOCK + half * L, L), self.terms
                    )
                    for half in range(2)
                ]
                for term, registers in enumerate(zip(*halves)):
                    words = [tir.reinterpret(f"uint16x{2 * L}", bits) for bits in registers]
                    elements = tir.Shuffle(words, upper)
                    index = [self._key_tile_row(term, block) + k, ramp(strip * BLOCK, BLOCK)]
                    elements = elements if term else self._watched(elements)
                    T.buffer_store(self.key_tile, elements, index)
            with T.serial(p.D % BLOCK) as tail:
                d = p.D // BLOCK * BLOCK + tail
                terms = bfloat16_terms(self._elements("key", self.g, row, d), self.terms)
                for term, bits in enumerate(terms):
                    word = (bits >> constant(16, "uint32", bits)).astype("uint16")
                    word = word if term else self._watched(word)
                    T.buffer_store(self.key_tile, word, [self._key_tile_row(term, block) + k, d])
            with T.serial(self.depth - p.D) as d:
                for term in range(self.terms):
                    index = [self._key_tile_row(term, block) + k, p.D + d]
                    T.buffer_store(self.key_tile, tir.const(0, "uint16"), index)

    def _stage_value_elements(self, block: Expr, rows: tir.Buffer) -> None:
        with T.serial(self.problem.D) as d, T.serial(SIDE) as pair:
            low, high = (
                self._elements("value", self.g, rows[2 * pair + odd], d) for odd in range(2)
            )
            for term, word in enumerate(self._element_words(low, high)):
                T.buffer_store(self.value_tile, word, [self._value_row(term, block) + d, pair])

    def _stage_value_strips(self, block: Expr, rows: tir.Buffer) -> None:
        """value_tile[term][block * E + d][k] = term of element d of value rows 2k and 2k + 1.

        16 elements at a time, of even and of odd rows, which are transposed in registers. A last
        partial strip is moved back over the one before it.
        """
        p, L = self.problem, self.config.lanes
        with T.serial(-(-p.D // L)) as strip:
            first = T.Bind(tir.min(strip * L, p.D - L))
            squares = [T.alloc_buffer((L, L), scope="local") for _ in range(2)]
            for odd, square in enumerate(squares):
                for k in range(L):
                    elements = self._elements("value", self.g, rows[2 * k + odd], first, L)
                    T.buffer_store(square, elements, [k, ramp(0, L)])
                transpose_square(square, L)
            with T.serial(L) as d:
                low, high = (load_lanes(square, [d, 0], L) for square in squares)
                for term, word in enumerate(self._element_words(low, high)):
                    index = [self._value_row(term, block) + first + d, ramp(0, L)]
                    T.buffer_store(self.value_tile, word, index)

    def _store_weights(self, pair: Expr, u: int, first: Expr, second: Expr) -> None:
        L = self.config.lanes
        for term, word in enumerate(_pairs(first, second, self.terms)):
            row = self._weight_row(term, 0) + pair
            T.buffer_store(self.weights, word, [row, ramp(u * L, L)])
