"""One thread block of the fused attention kernel: its query rows against all keys they may see."""

from __future__ import annotations

from collections.abc import Callable

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import cuda, hopper
from .attention_place import Place, Standing, float32, named, store_records
from .attention_products import OrdinaryUnits, Products, TensorCores, Warpgroups, shared_row
from .guard import guard
from .shared_memory import shared_memory
from .tile_copy import TileCopies


class Block(Standing):
    """Emits the statements of a block.

    The ring: tile t of keys goes through ``steps`` slots, its values through ``value_steps``, one
    after the other. Before a slot's content is used, the copy that is ``ahead`` slots ahead starts
    into the slot that was used last, or before that; one barrier per slot serves both.
    """

    def emit(self, place: Place) -> None:
        c = self.config
        self.place(place)
        align = hopper.ATOM_BYTES if c.wgmma else -1
        self.shared = shared_memory(c.shared_elements, self._shared_dtype, align)
        self.copies = TileCopies(c, self.shared, self.thread)
        make = TensorCores if c.tensor_cores else OrdinaryUnits
        if c.wgmma:
            make = Warpgroups
        self.products: Products = make(c, self.arch, self.problem.dtype, self.shared, self.thread)
        self._allocate()
        first, end = self._key_tiles()
        self._copy_queries()
        for ahead in range(c.ahead):
            self._copy_ahead(first, end, tir.const(0, "int32"), ahead)
        if c.queries_in_registers:
            self.copies.arrive(c.ahead)
            self.products.load_queries()
        with T.serial(end - first) as turn:
            tile = named(first + turn)
            self.products.begin_tile(turn)
            self._scores(tile, end, turn)
            self.products.wait(0)
            self._softmax(named(tile * c.keys), turn)
            if self.wants_output:
                self._values(tile, end, turn)
        self.products.wait(0)
        if c.asynchronous:
            cuda.wait_copies(0)
        if self.wants_output and self.products.overwrites:
            with T.If(first >= end), T.Then():
                self.products.clear_output()
        self._store()

    @property
    def _shared_dtype(self) -> str:
        return self.problem.dtype if self.config.tensor_cores else "float32"

    def _allocate(self) -> None:
        rows = 2 * self.config.row_tiles
        self.top = T.alloc_buffer((rows,), scope="local")  # in units of ln 2
        self.sum = T.alloc_buffer((rows,), scope="local")
        self.best = T.alloc_buffer((rows + 1,), scope="local")
        self.correction = T.alloc_buffer((rows,), scope="local")
        for k in range(rows):
            T.buffer_store(self.top, float32(attention.EMPTY_ROW_MAX), [k])
            T.buffer_store(self.sum, float32(0), [k])
        if self.wants_output and not self.products.overwrites:
            self.products.clear_output()
        if self.drops:
            self.kept = T.alloc_buffer((rows,), "uint32", scope="local")
            self.draws = T.alloc_buffer((2 * attention.PHILOX_ROUNDS,), "uint64", scope="local")

    def _key_tiles(self) -> tuple[Expr, Expr]:
        """First key tile and the one after the last that any row of the tile may see."""
        keys = self.config.keys
        least, most = self.tile_rows()
        first, last = self.keys_of(least).first, self.keys_of(most).last
        first = named(first // keys) if not isinstance(first, int) else tir.const(0, "int32")
        end = named(tir.Select(last // keys >= first, last // keys + 1, first))
        if self.splits is None:
            return first, end
        share = named((end - first + self.splits - 1) // self.splits)
        first = named(tir.min(first + self.split * share, end))
        return first, named(tir.min(first + share, end))

    # -- copies -------------------------------------------------------------------------------

    def _copy_queries(self) -> None:
        c, p = self.config, self.problem

        def index(r: Expr, d: Expr) -> list[Expr]:
            n, i = self.head_and_row(r)
            return attention.element(p.layout, p.D, self.at.b, n, self.at.query_start + i, d)

        query, parts = self.buffers["query"], c.steps if c.wgmma else 1
        width = c.steps * c.depth // parts
        for part in range(parts):
            self.copies.copy(
                query,
                p.D,
                part * c.rows * width,
                c.rows,
                width,
                part * width,
                self.rows,
                index,
                lambda row: shared_row(c, row),
            )
        if c.queries_in_registers:
            self.copies.commit()

    def _copy_ahead(self, tile: Expr, end: Expr, turn: Expr, ahead: int) -> None:
        """Start the copy for the slot that is ``ahead`` slots after the first of ``tile``."""
        c = self.config
        per_tile = c.steps + c.value_steps
        tile, step = tile + ahead // per_tile, ahead % per_tile
        slot = self._slot(turn, ahead)
        with T.If(tile < end), T.Then():
            j0 = named(tile * c.keys)
            if step < c.steps:
                self._copy_keys("key", slot, j0, step * c.depth)
            else:
                column = (self.part * c.value_steps if c.slices > 1 else 0) + (step - c.steps)
                self._copy_keys("value", slot, j0, column * c.depth)
        self.copies.commit()

    def _copy_keys(self, name: str, slot: Expr | int, j0: Expr, column: Expr | int) -> None:
        c, p = self.config, self.problem

        def index(r: Expr, d: Expr) -> list[Expr]:
            row = self.at.key_start + tir.min(j0 + r, self.at.S2 - 1)
            return attention.element(p.layout, p.D, self.at.b, self.g, row, d)

        rows = self.at.S2 - j0
        self.copies.copy(self.buffers[name], p.D, slot, c.keys, c.depth, column, rows, index)

    def _slot(self, turn: Expr, number: int) -> Expr | int:
        """Element where the slot begins that is ``number`` slots after the first of tile
        ``turn``.
        """
        c = self.config
        per_tile = c.steps + c.value_steps
        slot = number % c.slots if per_tile % c.slots == 0 else (turn * per_tile + number) % c.slots
        return c.query_elements + slot * c.slot_elements

    def _next_slot(self, tile: Expr, end: Expr, turn: Expr, number: int) -> Expr | int:
        # ptxas gives up on products of several steps of D that are under way around the loop.
        self.products.wait(0 if not number and self.config.steps > 1 else 1)
        self.copies.arrive(self.config.ahead - 1)
        self._copy_ahead(tile, end, turn, number + self.config.ahead)
        return named(self._slot(turn, number)) if self._moves else self._slot(turn, number)

    @property
    def _moves(self) -> bool:
        """Slots of a tile differ from turn to turn."""
        return (self.config.steps + self.config.value_steps) % self.config.slots != 0

    # -- one tile of keys ---------------------------------------------------------------------

    def _scores(self, tile: Expr, end: Expr, turn: Expr) -> None:
        for step in range(self.config.steps):
            slot = self._next_slot(tile, end, turn, step)
            if not step:
                self.products.clear_scores()
            self.products.add_scores(slot, step)

    def _values(self, tile: Expr, end: Expr, turn: Expr) -> None:
        self.products.take_weights()
        for step in range(self.config.value_steps):
            slot = self._next_slot(tile, end, turn, self.config.steps + step)
            self.products.add_values(slot, step)

    def _each_key(self, m: int, h: int, statement: Callable[[int, int], None]) -> None:
        """statement(key of the tile in lane 0, place in ``scores``) for the thread's keys."""
        for n in range(self.config.keys // 8):
            for e in range(2):
                statement(8 * n + e, self.products.score_slot(m, n, h, e))

    def _softmax(self, j0: Expr, turn: Expr) -> None:
        """scores become weights; maximum, sum and correction follow, and the output is scaled."""
        if self.problem.pse is not None or not self.folds_scale:
            self._add_bias(j0)
        self._mask(j0)
        for k, (m, h) in enumerate(self.fragments):
            self._row_maximum(k, m, h)
        if self.drops:
            self._draw(j0)
        for k, (m, h) in enumerate(self.fragments):
            self._row_weights(k, m, h)
            if self.wants_output:
                with guard(turn > 0, self.products.overwrites):
                    self._scale_row(k, m, h)

    def _scale_row(self, k: int, m: int, h: int) -> None:
        output = self.products.output
        for n in range(self.config.width // 8):
            for e in range(2):
                at = self.products.output_slot(m, n, h, e)
                T.buffer_store(output, output[at] * self.correction[k], [at])

    def _add_bias(self, j0: Expr) -> None:
        scores = self.products.scores
        for m, h in self.fragments:
            for n in range(self.config.keys // 8):
                pair = self.bias_pair(m, h, j0 + self.first_column + 8 * n)
                for e, bias in enumerate(pair):
                    at = self.products.score_slot(m, n, h, e)
                    T.buffer_store(scores, self.score(scores[at], bias), [at])

    def _mask(self, j0: Expr) -> None:
        """Scores of pairs that are not allowed become minus infinity; where the band holds the
        whole tile and no mask is read, nothing is computed.
        """
        c, scores = self.config, self.products.scores
        never = float32(float("-inf"))
        if self.problem.mask:
            for m, h in self.fragments:
                for n in range(c.keys // 8):
                    pair = self.dropped_pair(m, h, j0 + self.first_column + 8 * n)
                    for e, dropped in enumerate(pair):
                        at = self.products.score_slot(m, n, h, e)
                        T.buffer_store(scores, tir.Select(dropped, never, scores[at]), [at])
        least, most = self.tile_rows()
        first, last = self.keys_of(most).first, self.keys_of(least).last
        whole = j0 + (c.keys - 1) <= last
        if not isinstance(first, int):
            whole = tir.all(whole, j0 >= first)
        with T.If(tir.Not(whole)), T.Then():
            for m, h in self.fragments:
                _, i = self.head_and_row(self.row(m, h))
                seen = self.keys_of(i)
                origin = j0 + self.first_column
                first = seen.first if isinstance(seen.first, int) else named(seen.first - origin)
                last = named(seen.last - origin)

                def cut(key: int, at: int, first: Expr | int = first, last: Expr = last) -> None:
                    inside = last >= key
                    if not isinstance(first, int):
                        inside = tir.all(inside, first <= key)
                    T.buffer_store(scores, tir.Select(inside, scores[at], never), [at])

                self._each_key(m, h, cut)

    def _row_maximum(self, k: int, m: int, h: int) -> None:
        """top[k] and correction[k] after this tile."""
        scores, best, spare = self.products.scores, self.best, 2 * self.config.row_tiles

        def take(key: int, at: int) -> None:
            T.buffer_store(best, scores[at] if not key else tir.max(best[k], scores[at]), [k])

        self._each_key(m, h, take)
        for mask in (1, 2):
            T.buffer_store(best, cuda.shuffle_xor(best[k], mask), [spare])
            T.buffer_store(best, tir.max(best[k], best[spare]), [k])
        top = tir.max(self.top[k], best[k] * float32(self.scale))
        T.buffer_store(best, top, [k])
        cuda.exp2(self.correction[k], self._in_ln2(self.top[k] - best[k]))
        T.buffer_store(self.top, best[k], [k])

    def _in_ln2(self, difference: Expr) -> Expr:
        unit = attention.unit_of_scores(self.problem.pse)
        return attention.difference_in_ln2(difference, unit)

    def _row_weights(self, k: int, m: int, h: int) -> None:
        scores = self.products.scores
        T.buffer_store(self.sum, self.sum[k] * self.correction[k], [k])

        def weigh(key: int, at: int) -> None:
            x = scores[at] * float32(self.scale) - self.top[k]
            cuda.exp2(scores[at], self._in_ln2(x))
            T.buffer_store(self.sum, self.sum[k] + scores[at], [k])
            if self.drops:
                bit = self.kept[k] >> tir.const(key // 8 * 2 + key % 2, "uint32")
                kept = (bit & tir.const(1, "uint32")) != tir.const(0, "uint32")
                T.buffer_store(scores, tir.Select(kept, scores[at], float32(0)), [at])

        self._each_key(m, h, weigh)

    def _draw(self, j0: Expr) -> None:
        """Bit 2 n + e of kept[k]: dropout keeps key 8 n + e of the thread's."""
        for k in range(len(self.fragments)):
            T.buffer_store(self.kept, tir.const(0, "uint32"), [k])
        with T.serial(self.config.keys // 8) as n:
            for k, (m, h) in enumerate(self.fragments):
                j = j0 + self.first_column + 8 * n
                for e, keep in enumerate(self.kept_pair(m, h, j, self.draws)):
                    place = (2 * n + e).astype("uint32")
                    bits = self.kept[k] | (keep.astype("uint32") << place)
                    T.buffer_store(self.kept, bits, [k])

    # -- results ------------------------------------------------------------------------------

    def _store(self) -> None:
        for k in range(len(self.fragments)):
            for mask in (1, 2):
                T.buffer_store(self.best, cuda.shuffle_xor(self.sum[k], mask), [0])
                T.buffer_store(self.sum, self.sum[k] + self.best[0], [k])
        for k, (m, h) in enumerate(self.fragments):
            r = self.row(m, h)
            with T.If(r < self.rows), T.Then():
                n, i = self.head_and_row(r)
                n, i = named(n), named(i)
                if self.splits is not None:
                    self._store_part(k, m, h, n, i)
                else:
                    self._store_row(k, m, h, n, i)

    def _columns(self, m: int, h: int, store: Callable[[Expr, int], None]) -> None:
        """store(column, place in ``output``) for each pair of columns; its first is inside D."""
        c, D = self.config, self.problem.D
        base = self.part * c.width if c.slices > 1 else 0
        for n in range(c.width // 8):
            d = base + self.first_column + 8 * n
            at = self.products.output_slot(m, n, h, 0)
            if c.slices == 1 and 8 * n + 8 <= D:
                store(d, at)
            else:
                with T.If(d < D), T.Then():
                    store(d, at)

    def _store_row(self, k: int, m: int, h: int, n: Expr, i: Expr) -> None:
        p, at = self.problem, self.at
        if self.wants_output:
            inverse = named(self.inverse(self.sum[k]))
            out = self.buffers["attention_out"]

            def store(d: Expr, slot: int) -> None:
                def element(e: Expr | int) -> None:
                    index = attention.element(p.layout, p.D, at.b, n, at.query_start + i, d + e)
                    value = (self.products.output[slot + e] * inverse).astype(p.dtype)
                    T.buffer_store(out, value, index)

                self._both(d, element)

            self._columns(m, h, store)
        if {"softmax_max", "softmax_sum"} & set(p.outputs):
            index = [at.b, n, i]
            if p.layout == "TND":
                number = named(attention.record(p.head_major, p.N1, at, n, i))
                index = [number // p.N1, number % p.N1]
            with T.If(self.part == 0), T.Then():
                store_records(
                    p, self.buffers, index, self.top[k], self.sum[k], self.first_column, 2
                )

    def _both(self, d: Expr, element: Callable[[Expr | int], None]) -> None:
        """Both elements of a pair at once where rows begin at even ones; never beyond D."""
        if self.problem.D % 2 == 0:
            with T.vectorized(2) as e:
                element(e)
            return
        element(0)
        with T.If(d + 1 < self.problem.D), T.Then():
            element(1)

    def _store_part(self, k: int, m: int, h: int, n: Expr, i: Expr) -> None:
        """What ``attention_combine`` adds up."""
        p, at = self.problem, self.at
        record = named((at.b * p.N1 + n) * p.S1 + i)
        if self.wants_output:

            def store(d: Expr, slot: int) -> None:
                def element(e: Expr | int) -> None:
                    value = self.products.output[slot + e]
                    T.buffer_store(self.buffers["part_out"], value, [self.split, record, d + e])

                self._both(d, element)

            self._columns(m, h, store)
        with T.If(tir.all(self.first_column == 0, self.part == 0)), T.Then():
            T.buffer_store(self.buffers["part_max"], self.top[k], [self.split, record])
            T.buffer_store(self.buffers["part_sum"], self.sum[k], [self.split, record])
