"""A task of the fused attention kernel on matrix tiles of bfloat16 (AMX).

Both products give their result with query rows as columns, as the vectors have them: scores are
keys times queries, the output is transposed values times weights. So a tile of keys is loaded where
it lies, 16 keys of 32 elements; queries and weights are pairs of what is summed over, one row of
them for 32 query rows; and only the values are transposed, once per tile of keys for all groups.

Buffers, with D rounded up to E, a multiple of 32: queries uint32 [groups * E/2][W]; weights uint32
[C/2][W]; values uint32 [C/32 * E][16], pairs of keys; where keys cannot be loaded in place, a copy
uint16 [C][E]. Blocks of 32 keys beyond the last repeat it, with weight 0.

The weights of a row are powers of two of its scores above a reference. It follows the maximum only
when that is `slack` above it, since everything so far must then be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import x86_amx
from .attention_bf16 import PairTile
from .transpose import transpose_square
from .vector import LOG2E, exp2_weight, float32, load_lanes, max_lanes, ramp

SIDE = x86_amx.ROWS
"""Rows and columns of a tile of float32, pairs of bfloat16 in a row."""
BLOCK = 2 * SIDE
"""Keys, query rows, elements of D of a product: two tiles each way."""
SLACK = 8.0
"""In units of ln 2: where weights of 2**8 do not matter."""
_WORD, _HALF = 4, 2
"""Bytes."""
LEFT, RIGHT = (4, 5), (6, 7)
"""Tiles of what is multiplied; tiles 0 to 3 hold the sums, row by row."""
Products = tuple[tuple[int, int], ...]
"""Terms of the left and the right that are multiplied; one side is new each time."""
OUTPUT_PRODUCTS: dict[int, Products] = {
    1: ((0, 0),),
    2: ((1, 0), (0, 0), (0, 1)),
    3: ((2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)),
}
"""By number of terms, those that the results resolve."""
SCORE_PRODUCTS: dict[int, Products] = OUTPUT_PRODUCTS | {2: ((1, 1), (1, 0), (0, 0), (0, 1))}
"""Scores are as exact as float32 whatever the type is."""


class TileTask(PairTile):
    @property
    def terms(self) -> int:
        """Numbers of bfloat16 that an element is the sum of."""
        return 1

    @property
    def slack(self) -> float:
        """What a score may exceed the reference by, in units of ln 2."""
        return SLACK

    @property
    def depth(self) -> int:
        """E"""
        return -(-self.problem.D // BLOCK) * BLOCK

    @property
    def query_rows(self) -> int:
        return self.depth // 2

    @property
    def unscaled(self) -> bool:
        """Scores stay the bare products: their order is that of x, which is a multiple of them."""
        p = self.problem
        return p.pse is None and p.scale > 0 and attention.fits_float32(p.scale * LOG2E)

    @property
    def score_unit(self) -> float:
        return self.problem.scale * LOG2E if self.unscaled else super().score_unit

    @property
    def keys_in_place(self) -> bool:
        return self.problem.D % BLOCK == 0

    @property
    def bias_keys(self) -> int:
        return BLOCK

    def emit(self) -> None:
        T.evaluate(x86_amx.configure(tir.const(x86_amx.ROWS, "int64")))
        super().emit()
        T.evaluate(x86_amx.release())

    # -- set-up and results -------------------------------------------------------------------

    def _allocate(self) -> None:
        super()._allocate()
        self.reference = T.alloc_buffer((self.config.rows,))

    def _allocate_operands(self) -> None:
        c, terms = self.config, self.terms
        query_rows, value_rows = c.groups * self.query_rows, c.keys // BLOCK * self.depth
        self.queries = T.alloc_buffer((terms * query_rows, c.width), "uint32")
        self.key_tile = T.alloc_buffer((terms * c.keys, self.depth), "uint16")
        if self.wants_output:
            self.weights = T.alloc_buffer((terms * c.keys // 2, c.width), "uint32")
            self.value_tile = T.alloc_buffer((terms * value_rows, SIDE), "uint32")

    def _query_row(self, term: int, group: Expr) -> Expr:
        """First row of a group's queries."""
        return (term * self.config.groups + group) * self.query_rows

    def _key_tile_row(self, term: int, block: Expr) -> Expr:
        """First row of a block's keys."""
        return term * self.config.keys + block * BLOCK

    def _value_row(self, term: int, block: Expr) -> Expr:
        """First row of a block's values."""
        return (term * (self.config.keys // BLOCK) + block) * self.depth

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

    def _clear(self) -> None:
        super()._clear()
        with T.serial(self.groups * self.config.width) as r:
            T.buffer_store(self.reference, float32(attention.EMPTY_ROW_MAX), [r])

    def _store(self) -> None:
        """Sums are of powers above the reference until the output is divided by them."""
        c, L = self.config, self.config.lanes
        if self.wants_output:
            self._store_output()
        with T.serial(self.groups * c.vectors) as strip:
            index = [ramp(strip * L, L)]
            total, reference, top = (
                tir.BufferLoad(buffer, index) for buffer in (self.sum, self.reference, self.top)
            )
            step = T.Bind(self.in_ln2(reference - top))
            T.buffer_store(self.sum, total * exp2_weight(step, self.unit, self.degree), index)
        with T.serial(self.rows) as r:
            self.store_records(r, self.top[r], self.sum[r])

    # -- one tile of keys ---------------------------------------------------------------------

    def _key_tile(self, j0: Expr, count: Expr) -> None:
        p, c = self.problem, self.config
        self._stage(j0, count)
        with T.serial(self.groups) as group:
            r0 = T.Bind(group * c.width)
            first_row = self.i0 + r0
            last_row = tir.min(first_row + (c.width - 1), self.at.S1 - 1)
            any_, all_ = self.interval(first_row, last_row), self.interval(last_row, first_row)
            reach = T.Bind(tir.min(count, any_.last + 1 - j0))
            with T.If(tir.all(any_.first < j0 + count, reach > 0)), T.Then():
                if not p.mask:
                    self._rows(group, r0, j0, reach, all_, none_dropped=None)
                else:
                    some_dropped, all_dropped = self._stage_mask(r0, j0, reach)
                    with T.If(tir.Not(all_dropped)), T.Then():
                        self._rows(group, r0, j0, reach, all_, tir.Not(some_dropped))

    def _rows(
        self,
        group: Expr,
        r0: Expr,
        j0: Expr,
        reach: Expr,
        all_: attention.Interval,
        none_dropped: Expr | None,
    ) -> None:
        """The first ``reach`` keys of a tile for one group of rows, all of which see ``all_``."""
        blocks = T.Bind((reach + (BLOCK - 1)) // BLOCK)
        tops = T.alloc_buffer((self.config.unroll, self.config.width), scope="local")
        for k in range(self.config.unroll):
            self._fill(tops, k, lambda r: float32(attention.EMPTY_ROW_MAX))
        with T.serial(blocks) as block:
            first = T.Bind(j0 + block * BLOCK)
            self._multiply_block(group, block, first)
            if self.problem.pse in ("rows", "packed"):
                self._stage_bias(r0, first, tir.min(reach - block * BLOCK, BLOCK))
            plain = tir.all(all_.first <= first, all_.last >= first + (BLOCK - 1))
            if none_dropped is not None:
                plain = tir.all(plain, none_dropped)
            with T.If(plain):
                with T.Then():
                    self._settle(tops, r0, j0, block, masked=False)
                with T.Else():
                    self._settle(tops, r0, j0, block, masked=True)
        self._follow(tops, group, r0)
        self._weigh(r0, j0, blocks * BLOCK)
        if self.wants_output:
            self._add_values(group, blocks)

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

    # -- scores -------------------------------------------------------------------------------

    def _multiply_block(self, group: Expr, block: Expr, first: Expr) -> None:
        """scores[j][r] = key j . query r for the keys of a block."""
        p, c = self.problem, self.config
        side = SIDE
        for tile in range(4):
            T.evaluate(x86_amx.zero(tile))

        def in_place(term: int, row: int, d: Expr) -> Expr:
            j = self.at.key_start + first + row
            index = attention.element(p.layout, p.D, self.at.b, self.g, j, d)
            return self.buffers["key"][tuple(index)]

        def staged(term: int, row: int, d: Expr) -> Expr:
            return self.key_tile[self._key_tile_row(term, block) + row, d]

        def multiply(key: Callable[[int, int, Expr], Expr], stride: Expr | int) -> None:
            with T.serial(self.depth // BLOCK) as strip:

                def load_keys(term: int) -> None:
                    for i, tile in enumerate(LEFT):
                        load_tile(tile, key(term, side * i, strip * BLOCK), stride)

                def load_queries(term: int) -> None:
                    row = self._query_row(term, group) + strip * side
                    for j, tile in enumerate(RIGHT):
                        load_tile(tile, self.queries[row, side * j], c.width * _WORD)

                multiply_terms(SCORE_PRODUCTS[self.terms], load_keys, load_queries)

        if self.keys_in_place:
            with T.If(first + BLOCK <= self.at.S2):
                with T.Then():
                    multiply(in_place, self.key_pitch())
                with T.Else():
                    multiply(staged, self.depth * _HALF)
        else:
            multiply(staged, self.depth * _HALF)
        for tile in range(4):
            score = self.scores[block * BLOCK + side * (tile // 2), side * (tile % 2)]
            store_tile(tile, score, c.width * _WORD)

    def _settle(self, tops: tir.Buffer, r0: Expr, j0: Expr, block: Expr, masked: bool) -> None:
        """Scores of a block in their final form, and their maxima by ``unroll`` keys in flight."""
        c = self.config
        steps = BLOCK // c.unroll
        with T.serial(steps) as step:
            self._ask_ahead(r0, j0, block * steps + step)
            for k in range(c.unroll):
                key = T.Bind(block * BLOCK + step * c.unroll + k)
                j = T.Bind(j0 + key)
                common = None if self.unscaled else self._common_bias(j, key)
                for u in range(c.vectors):
                    with T.vectorized(c.lanes) as v:
                        r = u * c.lanes + v
                        i = self.i0 + r0 + r
                        x = T.Bind(self.scores[key, r])
                        if not self.unscaled:
                            x = T.Bind(self.score(x, self._bias(common, i, j, key, r)))
                        if masked:
                            x = T.Bind(self._masked(x, i, j, key, r))
                        if masked or not self.unscaled:
                            T.buffer_store(self.scores, x, [key, r])
                        T.buffer_store(tops, tir.max(tops[k, r], x), [k, r])

    # -- weights and output -------------------------------------------------------------------

    def _follow(self, tops: tir.Buffer, group: Expr, r0: Expr) -> None:
        """The maxima of the tile; where one exceeds its reference, all of the group follow."""
        c, L = self.config, self.config.lanes
        highest, above = [], []
        for u in range(c.vectors):
            index = [ramp(r0 + u * L, L)]
            top = load_lanes(tops, [0, u * L], L)
            for k in range(1, c.unroll):
                top = tir.max(top, load_lanes(tops, [k, u * L], L))
            top = T.Bind(top)
            T.buffer_store(self.top, tir.max(tir.BufferLoad(self.top, index), top), index)
            highest.append(top)
            above.append(T.Bind(self.in_ln2(top - tir.BufferLoad(self.reference, index))))
        # Lane by lane: a maximum over NaN may be NaN, and then no row would follow.
        one, none = (tir.Broadcast(tir.const(x, "uint32"), L) for x in (1, 0))
        exceeds = [tir.Select(x > float32(self.slack, x), one, none) for x in above]
        exceeds_any = max_lanes(T.Bind(tir.max(*exceeds)))
        with T.If(exceeds_any != tir.const(0, "uint32")), T.Then():
            for u, top in enumerate(highest):
                index = [ramp(r0 + u * L, L)]
                before = T.Bind(tir.BufferLoad(self.reference, index))
                after = T.Bind(tir.max(before, top))
                step = T.Bind(self.in_ln2(before - after))
                correction = T.Bind(exp2_weight(step, self.unit, self.degree))
                T.buffer_store(self.reference, after, index)
                total = tir.BufferLoad(self.sum, index) * correction
                T.buffer_store(self.sum, total, index)
                T.buffer_store(self.correction, correction, [ramp(u * L, L)])
            if self.wants_output:
                with T.serial(self.depth) as d:
                    row = T.Bind(group * self.depth + d)
                    self._fill(self.output, row, lambda r: self.output[row, r] * self.correction[r])

    def _weigh(self, r0: Expr, j0: Expr, count: Expr) -> None:
        """Weights of the scores, as pairs of keys, and their sums."""
        c, L = self.config, self.config.lanes
        references = [
            T.Bind(tir.BufferLoad(self.reference, [ramp(r0 + u * L, L)])) for u in range(c.vectors)
        ]
        total = T.alloc_buffer((c.vectors, L), scope="local")
        for u in range(c.vectors):
            T.buffer_store(total, tir.Broadcast(float32(0), L), [u, ramp(0, L)])
        draws = self.draws()
        if draws is not None:
            self._stage_draws(draws, r0, j0, count)

        def weight(j: Expr, u: int) -> Expr:
            x = load_lanes(self.scores, [j, u * L], L)
            x = T.Bind(self.in_ln2(x - references[u]))
            w = T.Bind(exp2_weight(x, self.unit, self.degree))
            T.buffer_store(total, load_lanes(total, [u, 0], L) + w, [u, ramp(0, L)])
            return w if draws is None else T.Bind(w * load_lanes(self.kept, [j, u * L], L))

        self._each_weight(count, weight)
        for u in range(c.vectors):
            index = [ramp(r0 + u * L, L)]
            value = tir.BufferLoad(self.sum, index) + load_lanes(total, [u, 0], L)
            T.buffer_store(self.sum, value, index)

    def _rounded(self, first: Expr, second: Expr) -> Expr:
        return round_pairs_up(first, second)

    def _add_values(self, group: Expr, blocks: Expr) -> None:
        """output += values * weights, 32 elements of D at a time."""
        c, side = self.config, SIDE
        stride = c.width * _WORD
        with T.serial(self.depth // BLOCK) as strip:

            def sums(tile: int, strip: Expr = strip) -> Expr:
                row = group * self.depth + strip * BLOCK + side * (tile // 2)
                return self.output[row, side * (tile % 2)]

            for tile in range(4):
                load_tile(tile, sums(tile), stride)
            with T.serial(blocks) as block:

                def load_values(term: int, strip: Expr = strip, block: Expr = block) -> None:
                    row = self._value_row(term, block) + strip * BLOCK
                    for i, tile in enumerate(LEFT):
                        load_tile(tile, self.value_tile[row + side * i, 0], x86_amx.ROW_BYTES)

                def load_weights(term: int, block: Expr = block) -> None:
                    row = self._weight_row(term, block)
                    for j, tile in enumerate(RIGHT):
                        load_tile(tile, self.weights[row, side * j], stride)

                multiply_terms(OUTPUT_PRODUCTS[self.terms], load_values, load_weights)
            for tile in range(4):
                store_tile(tile, sums(tile), stride)


def round_pairs_up(first: Expr, second: Expr) -> Expr:
    """Pairs of bfloat16, uint32 x 16, from two registers of float32.

    Ties go up: four plain instructions take less than the one that rounds two registers, and the
    one that puts its result in order.
    """
    half, place, high = (
        tir.Broadcast(tir.const(x, "uint32"), SIDE) for x in (0x8000, 16, 0xFFFF0000)
    )
    low, up = (tir.reinterpret(f"uint32x{SIDE}", x) + half for x in (first, second))
    return (low >> place) | (up & high)


def load_tile(tile: int, element: Expr, pitch: Expr | int) -> None:
    T.evaluate(x86_amx.load(tile, tir.address_of(element), pitch))


def store_tile(tile: int, element: Expr, pitch: Expr | int) -> None:
    T.evaluate(x86_amx.store(tile, tir.address_of(element), pitch))


def multiply_tiles() -> None:
    """Tiles 0 to 3 += tiles of the left times tiles of the right."""
    for c, (left, right) in enumerate(product(LEFT, RIGHT)):
        T.evaluate(x86_amx.multiply_bf16(c, left, right))


def multiply_terms(
    products: Products, load_left: Callable[[int], None], load_right: Callable[[int], None]
) -> None:
    """Tiles 0 to 3 += these products of the terms of both sides."""
    held: tuple[int | None, int | None] = (None, None)
    for left, right in products:
        if left != held[0]:
            load_left(left)
        if right != held[1]:
            load_right(right)
        multiply_tiles()
        held = left, right
