"""A task of the fused attention kernel that has few query rows (decoding): row by row, so that no
lane idles.

Elements of D lie across the lanes in both products, keys in the softmax between them. A row reads
every key and value once: its time is that of memory.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from .attention_task import Task
from .vector import exp2_nonpositive, float32, load_lanes, max_lanes, sum_lanes, to_float32


class RowTile(Task):
    """Buffers, float32: query and output row [D], scores of a key tile [C], which become the
    weights.
    """

    def emit(self) -> None:
        p, c = self.problem, self.config
        self.query = T.alloc_buffer((p.D,))
        self.scores = T.alloc_buffer((c.keys,))
        self.state = T.alloc_buffer((3,), scope="local")  # maximum, sum, correction
        if self.wants_output:
            self.output = T.alloc_buffer((p.D,))
        with T.serial(self.rows) as r:
            i = T.Bind(self.i0 + r)
            self._start_row(i)
            seen = self.interval(i, i)
            tiles = (tir.max(seen.last + 1 - seen.first, 0) + (c.keys - 1)) // c.keys
            with T.serial(tiles) as tile:
                j0, count = self.tile_of_keys(seen, tile)
                self._products(j0, count)
                self._softmax(r, i, j0, count)
                if self.wants_output:
                    self._add_values(j0, count)
            self._finish_row(r)

    def _each_d(self, statement) -> None:
        """statement(d) for the whole row: vectors, then the rest one by one."""
        p, L = self.problem, self.config.lanes
        with T.serial(p.D // L) as strip, T.vectorized(L) as v:
            statement(strip * L + v)
        if p.D % L:
            with T.serial(p.D % L) as tail:
                statement(p.D // L * L + tail)

    def _start_row(self, i: Expr) -> None:
        p, at = self.problem, self.at

        def load(d: Expr) -> None:
            index = attention.element(p.layout, p.D, at.b, self.n, at.query_start + i, d)
            element = to_float32(self.buffers["query"][tuple(index)], self.unit)
            T.buffer_store(self.query, element, [d])
            if self.wants_output:
                T.buffer_store(self.output, float32(0), [d])

        self._each_d(load)
        for slot, value in enumerate((attention.EMPTY_ROW_MAX, 0, 0)):
            T.buffer_store(self.state, float32(value), [slot])

    def _products(self, j0: Expr, count: Expr) -> None:
        """scores[j] = query . key j, ``unroll`` keys at a time; the last key is read again for
        those beyond ``count``.
        """
        p, c = self.problem, self.config
        L, strips = c.lanes, p.D // c.lanes
        with T.serial((count + (c.unroll - 1)) // c.unroll) as step:
            keys = [T.Bind(j0 + tir.min(step * c.unroll + k, count - 1)) for k in range(c.unroll)]
            acc = T.alloc_buffer((c.unroll, L), scope="local")
            for k in range(c.unroll):
                with T.vectorized(L) as v:
                    T.buffer_store(acc, float32(0), [k, v])
            with T.serial(strips) as strip:
                for k, j in enumerate(keys):
                    with T.vectorized(L) as v:
                        d = strip * L + v
                        product = self.query[d] * self.kv("key", j, d)
                        T.buffer_store(acc, acc[k, v] + product, [k, v])
            if p.D % L:
                with T.serial(p.D % L) as tail:
                    d = strips * L + tail
                    for k, j in enumerate(keys):
                        product = self.query[d] * self.kv("key", j, d)
                        T.buffer_store(acc, acc[k, 0] + product, [k, 0])
            for k in range(c.unroll):
                total = sum_lanes(load_lanes(acc, [k, 0], L))
                T.buffer_store(self.scores, total, [step * c.unroll + k])

    def _softmax(self, r: Expr, i: Expr, j0: Expr, count: Expr) -> None:
        p, c, at = self.problem, self.config, self.at
        L = c.lanes
        strips = T.Bind((count + (L - 1)) // L)
        lanes = T.alloc_buffer((L,), scope="local")
        with T.vectorized(L) as v:
            T.buffer_store(lanes, float32(attention.EMPTY_ROW_MAX), [v])
        slope = self.slope()
        with T.serial(strips) as strip, T.vectorized(L) as v:
            key = strip * L + v
            j = tir.min(j0 + key, at.S2 - 1)
            x = self.score(self.scores[key], self._row_bias(slope, i, j))
            allowed = key < count
            if p.mask:
                allowed = tir.all(allowed, self.mask_bit(i, j) == 0)
            x = T.Bind(tir.Select(allowed, x, float32(float("-inf"))))
            T.buffer_store(self.scores, x, [key])
            T.buffer_store(lanes, tir.max(lanes[v], x), [v])
        top = T.Bind(tir.max(self.state[0], max_lanes(load_lanes(lanes, [0], L))))
        step = T.Bind(self.state[0] - top)
        T.buffer_store(self.state, exp2_nonpositive(step), [2])
        T.buffer_store(self.state, top, [0])
        with T.vectorized(L) as v:
            T.buffer_store(lanes, float32(0), [v])
        draws = self.draws()
        with T.serial(strips) as strip, T.vectorized(L) as v:
            key = strip * L + v
            x = T.Bind(self.scores[key] - self.state[0])
            w = T.Bind(exp2_nonpositive(x))
            T.buffer_store(lanes, lanes[v] + w, [v])
            if draws is not None:
                w = tir.Select(self.keep(draws, v, r, j0 + key), w, float32(0))
            T.buffer_store(self.scores, w, [key])
        total = self.state[1] * self.state[2] + sum_lanes(load_lanes(lanes, [0], L))
        T.buffer_store(self.state, total, [1])

    def _row_bias(self, slope: Expr | None, i: Expr, j: Expr) -> Expr | None:
        """Bias of the keys j, which lie across the lanes."""
        p = self.problem
        if p.pse in ("rows", "packed"):
            return self.bias_element(i, j)
        if p.pse == "row":
            return self.bias_element(0, j)
        return None if p.pse is None else self.generated_bias(slope, i, j)

    def _add_values(self, j0: Expr, count: Expr) -> None:
        """output = output * correction + weights @ values, eight registers of D at a time."""
        p, L = self.problem, self.config.lanes
        correction = T.Bind(self.state[2])
        registers = min(8, p.D // L)
        first = 0
        while first < p.D // L:
            width = min(registers, p.D // L - first)
            self._add_strips(j0, count, correction, first, width)
            first += width
        if p.D % L:
            acc = T.alloc_buffer((1,), scope="local")
            with T.serial(p.D % L) as tail:
                d = p.D // L * L + tail
                T.buffer_store(acc, self.output[d] * correction, [0])
                with T.serial(count) as j:
                    product = self.scores[j] * self.kv("value", j0 + j, d)
                    T.buffer_store(acc, acc[0] + product, [0])
                T.buffer_store(self.output, acc[0], [d])

    def _add_strips(self, j0: Expr, count: Expr, correction: Expr, first: int, width: int) -> None:
        L = self.config.lanes
        acc = T.alloc_buffer((width, L), scope="local")
        for s in range(width):
            with T.vectorized(L) as v:
                T.buffer_store(acc, self.output[(first + s) * L + v] * correction, [s, v])
        with T.serial(count) as j:
            w = T.Bind(self.scores[j])
            for s in range(width):
                with T.vectorized(L) as v:
                    product = w * self.kv("value", j0 + j, (first + s) * L + v)
                    T.buffer_store(acc, acc[s, v] + product, [s, v])
        for s in range(width):
            with T.vectorized(L) as v:
                T.buffer_store(self.output, acc[s, v], [(first + s) * L + v])

    def _finish_row(self, r: Expr) -> None:
        total = T.Bind(self.state[1])
        if self.wants_output:
            inverse = T.Bind(self.inverse(total))
            self._each_d(lambda d: self.put(r, d, T.Bind(self.output[d] * inverse)))
        self.store_records(r, self.state[0], total)
