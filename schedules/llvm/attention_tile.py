"""One task of the fused attention kernel: R query rows of a head against all keys they may see.

Buffers of a task, float32: queries and output [groups * D][W], transposed; scores [C][W], which
become the weights; row maxima, sums and corrections [R]. W query rows lie across the lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from .attention_cells import CellTask
from .transpose import transpose_square
from .vector import exp2_weight, float32, load_lanes, ramp, to_float32


class Tile(CellTask):
    """Emits the statements of a task, across the lanes."""

    @property
    def depth(self) -> int:
        """Rows of the output of a group."""
        return self.problem.D

    def emit(self) -> None:
        c, i0 = self.config, self.i0
        self.groups = T.Bind((self.rows + (c.width - 1)) // c.width)
        self._allocate()
        self._load_queries()
        self._clear()
        seen = self.interval(i0, i0 + self.rows - 1)
        keys = tir.max(seen.last + 1 - seen.first, 0)
        tiles = (keys + (self.staged_keys - 1)) // self.staged_keys
        with T.serial(tiles) as tile:
            j0, count = self.tile_of_keys(seen, tile)
            self._key_tile(j0, count)
        self._store()

    # -- set-up and results -------------------------------------------------------------------

    def _allocate(self) -> None:
        c = self.config
        self.scores = T.alloc_buffer((c.keys, c.width))
        self.top = T.alloc_buffer((c.rows,))
        self.sum = T.alloc_buffer((c.rows,))
        self.tile_top = T.alloc_buffer((c.width,), scope="local")
        self.correction = T.alloc_buffer((c.width,), scope="local")
        if self.wants_output:
            self.output = T.alloc_buffer((c.groups * self.depth, c.width))
        self._allocate_operands()
        self._allocate_cells()

    def _allocate_operands(self) -> None:
        """What the two products read."""
        p, c = self.problem, self.config
        self.queries = T.alloc_buffer((c.groups * p.D, c.width))
        if p.dtype != "float32":
            self.key_tile = T.alloc_buffer((c.keys, p.D))
            if self.wants_output:
                self.value_tile = T.alloc_buffer((c.keys, p.D))

    def _load_queries(self) -> None:
        """queries[group * D + d][r] = query row i0 + group * W + r; rows beyond S1 repeat the
        last.
        """
        p, c, at = self.problem, self.config, self.at
        query = self.buffers["query"]

        def element(r: Expr, d: Expr) -> Expr:
            i = tir.min(self.i0 + r, at.S1 - 1)
            index = attention.element(p.layout, p.D, at.b, self.n, at.query_start + i, d)
            return to_float32(query[tuple(index)], self.unit)

        with T.serial(self.groups) as group:
            self._transposed(
                p.D,
                lambda r, d: element(group * c.width + r, d),
                lambda d, r, value: T.buffer_store(self.queries, value, [group * p.D + d, r]),
            )

    def _transposed(
        self,
        columns: int,
        source: Callable[[Expr, Expr], Expr],
        store: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """store(column, row, source(row, column)) for W rows, in square blocks in registers.

        A last partial block is moved back over the one before it; fewer columns than lanes go one
        by one.
        """
        c = self.config
        L = c.lanes
        if columns < L:
            with T.serial(columns) as column, T.serial(c.width) as row:
                store(column, row, source(row, column))
            return
        with T.serial(-(-columns // L)) as strip:
            first = T.Bind(tir.min(strip * L, columns - L))
            with T.serial(c.vectors) as u:
                block = T.alloc_buffer((L, L), scope="local")
                for r in range(L):
                    with T.vectorized(L) as v:
                        T.buffer_store(block, source(u * L + r, first + v), [r, v])
                transpose_square(block, L)
                for k in range(L):
                    with T.vectorized(L) as v:
                        store(first + k, u * L + v, block[k, v])

    def _clear(self) -> None:
        c = self.config
        with T.serial(self.groups) as group:
            for u in range(c.vectors):
                with T.vectorized(c.lanes) as v:
                    r = group * c.width + u * c.lanes + v
                    T.buffer_store(self.top, float32(attention.EMPTY_ROW_MAX), [r])
                    T.buffer_store(self.sum, float32(0), [r])
            if self.wants_output:
                with T.serial(self.depth) as d:
                    self._fill(self.output, group * self.depth + d, lambda r: float32(0))

    def _store(self) -> None:
        if self.wants_output:
            self._store_output()
        with T.serial(self.rows) as r:
            self.store_records(r, self.top[r], self.sum[r])

    def _store_output(self) -> None:
        """Divide by sum * keep_prob, round once, transpose back; a row without keys gives 0."""
        p, c = self.problem, self.config
        with T.serial(self.groups) as group:
            for u in range(c.vectors):
                with T.vectorized(c.lanes) as v:
                    total = T.Bind(self.sum[group * c.width + u * c.lanes + v])
                    T.buffer_store(self.correction, self.inverse(total), [u * c.lanes + v])
            if c.lanes > p.D:
                self._store_elements(group)
            else:
                self._store_blocks(group)

    def _store_elements(self, group: Expr) -> None:
        p, c = self.problem, self.config
        with T.serial(tir.min(c.width, self.rows - group * c.width)) as r, T.serial(p.D) as d:
            scaled = self.output[group * self.depth + d, r] * self.correction[r]
            self.put(group * c.width + r, d, T.Bind(scaled))

    def _store_blocks(self, group: Expr) -> None:
        p, c = self.problem, self.config
        L = c.lanes
        with T.serial(-(-p.D // L)) as strip, T.serial(c.vectors) as u:
            first = T.Bind(tir.min(strip * L, p.D - L))
            block = T.alloc_buffer((L, L), scope="local")
            for k in range(L):
                with T.vectorized(L) as v:
                    r = u * L + v
                    scaled = self.output[group * self.depth + first + k, r] * self.correction[r]
                    T.buffer_store(block, scaled, [k, v])
            transpose_square(block, L)
            for k in range(L):
                r = T.Bind(group * c.width + u * L + k)
                with T.If(r < self.rows), T.Then(), T.vectorized(L) as v:
                    self.put(r, first + v, T.Bind(block[k, v]))

    # -- one tile of keys ---------------------------------------------------------------------

    def _key_tile(self, j0: Expr, count: Expr) -> None:
        p, c = self.problem, self.config
        self._stage(j0, count)
        with T.serial(self.groups) as group:
            r0 = T.Bind(group * c.width)
            first_row = self.i0 + r0
            last_row = tir.min(first_row + (c.width - 1), self.at.S1 - 1)
            any_, all_ = self.interval(first_row, last_row), self.interval(last_row, first_row)
            with T.If(tir.all(any_.first < j0 + count, any_.last >= j0)), T.Then():
                plain = tir.all(count == c.keys, all_.first <= j0, all_.last >= j0 + count - 1)
                if not p.mask:
                    self._group(group, r0, j0, count, plain)
                else:
                    some_dropped, all_dropped = self._stage_mask(r0, j0, count)
                    plain = tir.all(plain, tir.Not(some_dropped))
                    with T.If(tir.Not(all_dropped)), T.Then():
                        self._group(group, r0, j0, count, plain)

    def _group(self, group: Expr, r0: Expr, j0: Expr, count: Expr, plain: Expr) -> None:
        """One tile for one group of rows; ``plain`` when every pair is allowed."""
        p, c = self.problem, self.config
        if p.pse in ("rows", "packed"):
            self._stage_bias(r0, j0, count)
        for u in range(c.vectors):
            with T.vectorized(c.lanes) as v:
                T.buffer_store(self.tile_top, float32(attention.EMPTY_ROW_MAX), [u * c.lanes + v])
        with T.If(plain):
            with T.Then():
                self._scores(group, r0, j0, count, masked=False)
            with T.Else():
                self._scores(group, r0, j0, count, masked=True)
        self._weights(r0, j0, count)
        if self.wants_output:
            self._accumulate(group, j0, count)

    def _stage(self, j0: Expr, count: Expr) -> None:
        """Keys and values of the tile, as the products want them."""
        if self.problem.dtype != "float32":
            self._convert("key", self.key_tile, j0, count)
            if self.wants_output:
                self._convert("value", self.value_tile, j0, count)

    def _convert(self, name: str, tile: tir.Buffer, j0: Expr, count: Expr) -> None:
        p, L = self.problem, self.config.lanes
        with T.serial(count) as j:
            with T.serial(p.D // L) as strip, T.vectorized(L) as v:
                d = strip * L + v
                T.buffer_store(tile, self.kv(name, j0 + j, d), [j, d])
            with T.serial(p.D % L) as tail:
                d = p.D // L * L + tail
                T.buffer_store(tile, self.kv(name, j0 + j, d), [j, d])

    def _scores(self, group: Expr, r0: Expr, j0: Expr, count: Expr, masked: bool) -> None:
        """scores[j][r] and the tile's row maxima, ``unroll`` keys at a time in a
        register tile.

        With ``masked`` the pairs that are not allowed, and what lies beyond ``count``, become minus
        infinity.
        """
        c = self.config
        L = c.lanes
        with T.serial((count + (c.unroll - 1)) // c.unroll) as step:
            keys = [T.Bind(step * c.unroll + k) for k in range(c.unroll)]
            last = count - 1 if masked else None
            self._ask_ahead(r0, j0 + c.keys, step, c.keys // c.unroll, range(c.width))
            acc = T.alloc_buffer((c.unroll, c.width), scope="local")
            for k in range(c.unroll):
                self._fill(acc, k, lambda r: float32(0))
            self._multiply_keys(acc, group, j0, keys, last)
            for k, key in enumerate(keys):
                j = T.Bind(j0 + key)
                common = self._common_bias(j, key)
                for u in range(c.vectors):
                    with T.vectorized(L) as v:
                        r = u * L + v
                        i = self.i0 + r0 + r
                        bias = self._bias(common, i, j, key, r)
                        x = T.Bind(self.score(acc[k, r], bias))
                        if masked:
                            x = T.Bind(self._masked(x, i, j, key, r))
                        T.buffer_store(self.scores, x, [key, r])
                        T.buffer_store(self.tile_top, tir.max(self.tile_top[r], x), [r])

    def _multiply_keys(
        self, acc: tir.Buffer, group: Expr, j0: Expr, keys: list[Expr], last: Expr | None
    ) -> None:
        """acc[k][r] += key k . query r"""
        p, c = self.problem, self.config
        sources = [self._key_source(j0, key, last) for key in keys]

        def step(d: Expr) -> None:
            for k, source in enumerate(sources):
                scalar = T.Bind(source(d))
                for u in range(c.vectors):
                    with T.vectorized(c.lanes) as v:
                        r = u * c.lanes + v
                        product = scalar * self.queries[group * p.D + d, r]
                        T.buffer_store(acc, acc[k, r] + product, [k, r])

        repeat(p.D, c.repeats, step)

    def _fill(self, buffer: tir.Buffer, row: Expr | int, value: Callable[[Expr], Expr]) -> None:
        c = self.config
        for u in range(c.vectors):
            with T.vectorized(c.lanes) as v:
                T.buffer_store(buffer, value(u * c.lanes + v), [row, u * c.lanes + v])

    def _key_source(self, j0: Expr, key: Expr, last: Expr | None) -> Callable[[Expr], Expr]:
        """d -> element of the key row; beyond the tile's last key that one is read again."""
        if last is not None:
            key = T.Bind(tir.min(key, last))
        if self.problem.dtype != "float32":
            return lambda d: self.key_tile[key, d]
        j = T.Bind(j0 + key)
        return lambda d: self.kv("key", j, d)

    def _common_bias(self, j: Expr, key: Expr) -> Expr | None:
        """What the bias of a key needs that is one value for all rows."""
        if self.problem.pse == "row":
            return T.Bind(self.bias_element(0, tir.min(j, self.at.S2 - 1)))
        return self.slope()

    def _bias(self, common: Expr | None, i: Expr, j: Expr, key: Expr, r: Expr) -> Expr | None:
        p = self.problem
        if p.pse in ("rows", "packed"):
            return self.bias_tile[key % self.bias_keys, r]
        return self.generated_bias(common, i, j) if p.pse == "slopes" else common

    def _masked(self, x: Expr, i: Expr, j: Expr, key: Expr, r: Expr) -> Expr:
        if self.problem.mask:
            x = tir.Select(self.dropped(key, r), float32(float("-inf")), x)
            if self.problem.band is None and self.words_end_steps:
                return x
        seen = self.keys_of(i)
        allowed = j <= seen.last
        if not isinstance(seen.first, int):
            allowed = tir.all(allowed, j >= seen.first)
        return tir.Select(allowed, x, float32(float("-inf")))

    def _weights(self, r0: Expr, j0: Expr, count: Expr) -> None:
        """scores become weights 2**(x - maximum); maximum, sum, correction follow."""
        c = self.config
        L = c.lanes
        tops = []
        total = T.alloc_buffer((c.vectors, L), scope="local")
        for u in range(c.vectors):
            strip = ramp(r0 + u * L, L)
            before = T.Bind(tir.BufferLoad(self.top, [strip]))
            top = T.Bind(tir.max(before, load_lanes(self.tile_top, [u * L], L)))
            step = T.Bind(self.in_ln2(before - top))
            T.buffer_store(self.top, top, [strip])
            correction = exp2_weight(step, self.unit, self.degree)
            T.buffer_store(self.correction, correction, [ramp(u * L, L)])
            T.buffer_store(total, tir.Broadcast(float32(0), L), [u, ramp(0, L)])
            tops.append(top)
        draws = self.draws()
        if draws is not None:
            self._stage_draws(draws, r0, j0, count)

        def weight(j: Expr, u: int) -> Expr:
            x = T.Bind(self.in_ln2(load_lanes(self.scores, [j, u * L], L) - tops[u]))
            w = T.Bind(exp2_weight(x, self.unit, self.weight_degree))
            sum_ = load_lanes(total, [u, 0], L) + w
            T.buffer_store(total, sum_, [u, ramp(0, L)])
            if draws is None:
                return w
            kept = load_lanes(self.kept, [j, u * L], L)
            return T.Bind(w * kept)

        self._each_weight(count, weight)
        for u in range(c.vectors):
            strip = ramp(r0 + u * L, L)
            correction = load_lanes(self.correction, [u * L], L)
            value = tir.BufferLoad(self.sum, [strip]) * correction
            T.buffer_store(self.sum, value + load_lanes(total, [u, 0], L), [strip])

    def _each_weight(self, count: Expr, weight: Callable[[Expr, int], Expr]) -> None:
        """Store weight(j, u) of every key j and register u of rows for the second product."""
        c = self.config
        with T.serial(count) as j:
            for u in range(c.vectors):
                value = weight(j, u)
                T.buffer_store(self.scores, value, [j, ramp(u * c.lanes, c.lanes)])

    def _accumulate(self, group: Expr, j0: Expr, count: Expr) -> None:
        """output = output * correction + weights @ values, ``unroll`` elements of D at a time."""
        p, c = self.problem, self.config
        whole = p.D // c.unroll
        with T.serial(whole) as step:
            self._accumulate_block(group, j0, count, step * c.unroll, c.unroll)
        if p.D % c.unroll:
            first = tir.const(whole * c.unroll, "int32")
            self._accumulate_block(group, j0, count, first, p.D % c.unroll)

    def _accumulate_block(
        self, group: Expr, j0: Expr, count: Expr, first: Expr, width: int
    ) -> None:
        c = self.config
        acc = T.alloc_buffer((width, c.width), scope="local")
        for k in range(width):
            row = group * self.depth + first + k
            self._fill(acc, k, lambda r, row=row: self.output[row, r] * self.correction[r])
        self._multiply_values(acc, j0, count, first, width)
        for k in range(width):
            self._fill(self.output, group * self.depth + first + k, lambda r, k=k: acc[k, r])

    def _multiply_values(
        self, acc: tir.Buffer, j0: Expr, count: Expr, first: Expr, width: int
    ) -> None:
        """acc[k][r] += sum over j of value[j][first + k] * weight[j][r]"""
        c = self.config

        def step(j: Expr) -> None:
            for k in range(width):
                if self.problem.dtype == "float32":
                    scalar = T.Bind(self.kv("value", j0 + j, first + k))
                else:
                    scalar = T.Bind(self.value_tile[j, first + k])
                for u in range(c.vectors):
                    with T.vectorized(c.lanes) as v:
                        r = u * c.lanes + v
                        T.buffer_store(acc, acc[k, r] + scalar * self.scores[j, r], [k, r])

        repeat(count, c.repeats, step)


def repeat(count: int | Expr, times: int, step: Callable[[Expr], None]) -> None:
    """step(0), ..., step(count - 1), with ``times`` of them in the body of the loop: the exit of a
    long loop is foretold wrongly, and a product has one for each register tile.
    """
    with T.serial(count // times) as body:
        for i in range(times):
            step(body * times + i)
    with T.serial(count % times) as rest:
        step(count // times * times + rest)
