"""A task of the fused attention kernel on matrix tiles of bfloat16 (AMX).

Both products give their result with query rows as columns, as the vectors have them: scores are
keys times queries, the output is transposed values times weights (``attention_operands``).

The weights of a row are powers of two of its scores above a reference. It follows the maximum only
when that is `slack` above it, since everything so far must then be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ...relay_ops.attention import LOG2E
from ..intrin import x86_amx
from .attention_operands import BLOCK, HALF_BYTES, SIDE, OperandTask
from .attention_task import opaque
from .vector import constant, exp2_weight, float32, load_lanes, max_lanes, ramp

SLACK = 8.0
"""In units of ln 2: where weights of 2**8 do not matter."""
_WORD_BYTES = 4
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


class TileTask(OperandTask):
    @property
    def slack(self) -> float:
        """What a score may exceed the reference by, in units of ln 2."""
        return SLACK

    @property
    def unscaled(self) -> bool:
        """Scores stay the bare products: their order is that of x, which is a multiple of them."""
        p = self.problem
        return p.pse is None and p.scale > 0 and attention.fits_float32(p.scale * LOG2E)

    @property
    def score_unit(self) -> float:
        return self.problem.scale * LOG2E if self.unscaled else super().score_unit

    @property
    def only_dropped(self) -> bool:
        """What the mask allows is as the product leaves it."""
        p = self.problem
        return p.mask and p.band is None and self.unscaled

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
        """Group by group, ``keys`` of the staged keys at a time: their rows of a bias or a mask are
        read in one go.
        """
        p, c = self.problem, self.config
        self._stage(j0, count)
        with T.serial(self.groups) as group:
            r0 = T.Bind(group * c.width)
            first_row = self.i0 + r0
            last_row = tir.min(first_row + (c.width - 1), self.at.S1 - 1)
            any_, all_ = self.interval(first_row, last_row), self.interval(last_row, first_row)
            seen = T.Bind(tir.min(count, any_.last + 1 - j0))
            tiles = T.Bind((seen + (c.keys - 1)) // c.keys)
            with T.serial(tiles) as tile:
                first = T.Bind(j0 + tile * c.keys)
                reach = T.Bind(tir.min(seen - tile * c.keys, c.keys))
                self._look_ahead(group, j0, tile, tiles)
                with T.If(any_.first < first + reach), T.Then():
                    place = group, r0, first, T.Bind(tile * (c.keys // BLOCK)), reach
                    if not p.mask:
                        self._rows(*place, all_, none_dropped=None)
                    else:
                        some_dropped, all_dropped = self._stage_mask(r0, first, reach)
                        with T.If(tir.Not(all_dropped)), T.Then():
                            self._rows(*place, all_, tir.Not(some_dropped))

    def _look_ahead(self, group: Expr, j0: Expr, tile: Expr, tiles: Expr) -> None:
        """coming: first row and key of the tile after this one."""
        c = self.config
        same_rows, same_keys = tile + 1 < tiles, group + 1 < self.groups
        r = tir.Select(same_rows, group, tir.Select(same_keys, group + 1, 0)) * c.width
        keys = tir.Select(same_keys, 0, self.staged_keys)
        j = j0 + tir.Select(same_rows, (tile + 1) * c.keys, keys)
        self.coming = opaque("int32", [r, j])

    def _ask_for_part(self, part: int, turn: Expr, turns: int) -> None:
        """What a coming tile reads from memory is asked for while weights are taken, and where
        products are many, half of it while scores are multiplied.
        """
        width = self.config.width
        ends = 0, width // 2 if self.terms > 1 else 0, width
        rows = range(*ends[part : part + 2])
        if rows:
            self._ask_ahead(*self.coming, turn, turns, rows)

    def _rows(
        self,
        group: Expr,
        r0: Expr,
        j0: Expr,
        staged: Expr,
        reach: Expr,
        all_: attention.Interval,
        none_dropped: Expr | None,
    ) -> None:
        """``reach`` keys, from the block ``staged`` of the staged ones on, for one group of rows,
        all of which see ``all_``.
        """
        blocks = T.Bind((reach + (BLOCK - 1)) // BLOCK)
        tops = T.alloc_buffer((self.config.unroll, self.config.width), scope="local")
        for k in range(self.config.unroll):
            self._fill(tops, k, lambda r: float32(attention.EMPTY_ROW_MAX))
        with T.serial(blocks) as block:
            first = T.Bind(j0 + block * BLOCK)
            self._multiply_block(group, block, staged + block, first)
            settle = tops, r0, j0, block
            plain = tir.all(all_.first <= first, all_.last >= first + (BLOCK - 1))
            if none_dropped is not None:
                plain = tir.all(plain, none_dropped)
            with T.If(plain):
                with T.Then():
                    if self.problem.pse == "rows":
                        self._settle_biased(*settle)
                    else:
                        self._settle(*settle, masked=False)
                with T.Else():
                    if self.only_dropped:
                        self._settle_dropped(*settle)
                    else:
                        self._settle(*settle, masked=True)
        self._follow(tops, group, r0)
        self._weigh(r0, j0, blocks * BLOCK)
        if self.wants_output:
            self._add_values(group, blocks, staged)

    # -- scores -------------------------------------------------------------------------------

    def _multiply_block(self, group: Expr, block: Expr, slot: Expr, first: Expr) -> None:
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
            return self.key_tile[self._key_tile_row(term, slot) + row, d]

        def multiply(key: Callable[[int, int, Expr], Expr], stride: Expr | int) -> None:
            strips = self.depth // BLOCK
            with T.serial(strips) as strip:
                self._ask_for_part(0, block * strips + strip, c.keys // BLOCK * strips)

                def load_keys(term: int) -> None:
                    for i, tile in enumerate(LEFT):
                        load_tile(tile, key(term, side * i, strip * BLOCK), stride)

                def load_queries(term: int) -> None:
                    row = self._query_row(term, group) + strip * side
                    for j, tile in enumerate(RIGHT):
                        load_tile(tile, self.queries[row, side * j], c.width * _WORD_BYTES)

                multiply_terms(SCORE_PRODUCTS[self.terms], load_keys, load_queries)

        if self.keys_in_place:
            with T.If(first + BLOCK <= self.at.S2):
                with T.Then():
                    multiply(in_place, self.key_pitch())
                with T.Else():
                    multiply(staged, self.depth * HALF_BYTES)
        else:
            multiply(staged, self.depth * HALF_BYTES)
        for tile in range(4):
            score = self.scores[block * BLOCK + side * (tile // 2), side * (tile % 2)]
            store_tile(tile, score, c.width * _WORD_BYTES)

    def _settle(self, tops: tir.Buffer, r0: Expr, j0: Expr, block: Expr, masked: bool) -> None:
        """Scores of a block in their final form, and their maxima by ``unroll`` keys in flight."""
        c = self.config
        if self.problem.pse in ("rows", "packed"):
            first = T.Bind(j0 + block * BLOCK)
            self._stage_bias(r0, first, T.Bind(tir.min(self.at.S2 - first, BLOCK)))
        with T.serial(BLOCK // c.unroll) as step:
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

    def _settle_biased(self, tops: tir.Buffer, r0: Expr, j0: Expr, block: Expr) -> None:
        """As `_settle` of what no mask drops, with a bias that is added where it is transposed."""
        c, L = self.config, self.config.lanes
        turns = cycle(range(c.unroll))

        def take(key: int, u: int, bias: Expr) -> None:
            index, lanes = block * BLOCK + key, ramp(u * L, L)
            x = T.Bind(self.score(tir.BufferLoad(self.scores, [index, lanes]), bias))
            T.buffer_store(self.scores, x, [index, lanes])
            self._raise(tops, next(turns), lanes, x)

        for strip in range(0, BLOCK, self.bias_strip):
            for u in range(c.vectors):
                self._each_bias(r0, j0 + block * BLOCK, strip, u, take)

    def _settle_dropped(self, tops: tir.Buffer, r0: Expr, j0: Expr, block: Expr) -> None:
        """As `_settle` of what nothing but the mask drops."""
        c, L = self.config, self.config.lanes
        words = T.alloc_buffer((c.vectors, L), "uint32", scope="local")
        for u in range(c.vectors):
            found = load_lanes(self.dropped_bits, [block, u * L], L)
            T.buffer_store(words, found, [u, ramp(0, L)])
        with T.serial(BLOCK // c.unroll) as step:
            for k, u in product(range(c.unroll), range(c.vectors)):
                index, lanes = block * BLOCK + step * c.unroll + k, ramp(u * L, L)
                word = load_lanes(words, [u, 0], L)
                dropped = (word & constant(1 << k, "uint32", word)) != constant(0, "uint32", word)
                x = tir.BufferLoad(self.scores, [index, lanes])
                x = tir.Select(dropped, float32(float("-inf"), x), x)
                x = T.Bind(x86_amx.hidden(x))
                T.buffer_store(self.scores, x, [index, lanes])
                self._raise(tops, k, lanes, x)
            for u in range(c.vectors):
                word = load_lanes(words, [u, 0], L)
                left = word >> constant(c.unroll, "uint32", word)
                T.buffer_store(words, left, [u, ramp(0, L)])

    def _raise(self, tops: tir.Buffer, k: int, lanes: Expr, x: Expr) -> None:
        T.buffer_store(tops, tir.max(tir.BufferLoad(tops, [k, lanes]), x), [k, lanes])

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
            w = T.Bind(exp2_weight(x, self.unit, self.weight_degree))
            T.buffer_store(total, load_lanes(total, [u, 0], L) + w, [u, ramp(0, L)])
            return w if draws is None else T.Bind(w * load_lanes(self.kept, [j, u * L], L))

        self._each_weight(count, weight)
        for u in range(c.vectors):
            index = [ramp(r0 + u * L, L)]
            value = tir.BufferLoad(self.sum, index) + load_lanes(total, [u, 0], L)
            T.buffer_store(self.sum, value, index)

    def _before_pair(self, pair: Expr) -> None:
        self._ask_for_part(1, pair, self.config.keys // 2)

    def _rounded(self, first: Expr, second: Expr) -> Expr:
        return round_pairs_up(first, second)

    def _add_values(self, group: Expr, blocks: Expr, staged: Expr) -> None:
        """output += values * weights, 32 elements of D at a time."""
        c, side = self.config, SIDE
        stride = c.width * _WORD_BYTES
        with T.serial(self.depth // BLOCK) as strip:

            def sums(tile: int, strip: Expr = strip) -> Expr:
                row = group * self.depth + strip * BLOCK + side * (tile // 2)
                return self.output[row, side * (tile % 2)]

            for tile in range(4):
                load_tile(tile, sums(tile), stride)
            with T.serial(blocks) as block:

                def load_values(term: int, strip: Expr = strip, block: Expr = block) -> None:
                    row = self._value_row(term, staged + block) + strip * BLOCK
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
    half = tir.Broadcast(tir.const(0x8000, "uint32"), SIDE)
    return x86_amx.upper_halves(
        *(tir.reinterpret(f"uint32x{SIDE}", x) + half for x in (first, second))
    )


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
