"""A task of the fused attention kernel that has few query rows (decoding): row by row, so that no
lane idles.

Elements of D lie across the lanes in both products, keys in the softmax between them. A row reads
every key and value once: its time is that of memory. Where heads are too few to occupy the cores,
tasks share out the keys of a row.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm.tirx as tir
from tvm import DataType
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin.barrier import barrier
from .attention_task import Task, opaque
from .vector import (
    exp2_nonpositive,
    float32,
    load_lanes,
    max_lanes,
    ramp,
    sum_lanes,
    sums_lanes,
    to_float32,
)

_LINE_BITS = 512
_FOR_READING = (0, 2, 1)
"""Operands of ``llvm.prefetch``: read, into the second-level cache, data."""


@dataclass(frozen=True)
class KeyTile:
    """Keys that a row takes at a time: one after the other, or in turn from stripes of all its
    keys, for memory brings more from several places at once.
    """

    first: Expr
    count: Expr
    following: Expr
    """First key of the next tile."""
    apart: Expr | int = 0
    """Keys from one stripe to the next."""
    along: Expr | int = 1
    """Keys from one of a stripe to its next."""
    stripes: int = 1

    def key(self, k: Expr) -> Expr:
        """Number of the tile's k-th key."""
        if self.stripes == 1:
            return self.first + k
        return self.first + k % self.stripes * self.apart + k // self.stripes * self.along

    def next_key(self, j: Expr) -> Expr:
        """What key j of this tile is in the next."""
        return j + (self.following - self.first)


class RowTile(Task):
    """Buffers, float32: query and output rows [H][D], scores of a key tile [H][C], which become
    the weights. H heads that share their keys and values are taken together.

    With ``parts`` P > 1 a task sees one of P shares of the keys. Its maximum, sum and output go to
    a workspace [B * N1 * S1][P], which ``join`` adds up in the order of the keys, so that no result
    depends on the number of threads.
    """

    def allocate_parts(self, B: Expr) -> None:
        """The workspace, outside of the parallel loop."""
        p, P = self.problem, self.config.parts
        rows = B * (p.N1 * p.S1)
        self.part_state = T.alloc_buffer((rows * P, 2))  # maximum, sum
        if "attention_out" in p.outputs:
            self.part_output = T.alloc_buffer((rows * P, p.D))

    def emit(self) -> None:
        p, c = self.problem, self.config
        H = c.heads
        first_head = self.n
        self.query = T.alloc_buffer((H, p.D))
        self.scores = T.alloc_buffer((H, c.keys))
        self.state = T.alloc_buffer((H, 3), scope="local")  # maximum, sum, correction
        if self.wants_output:
            self.output = T.alloc_buffer((H, p.D))
        with T.serial(self.rows) as r:
            i = T.Bind(self.i0 + r)
            with T.serial(H) as h:
                self.n = first_head + h
                self._start_row(h, i)
            seen = self.interval(i, i)
            if c.parts > 1:
                seen = self._share(seen)
            total = T.Bind(tir.max(seen.last + 1 - seen.first, 0))
            with T.serial((total + (c.keys - 1)) // c.keys) as tile:
                keys = self._tile_of_stripes(seen.first, total, tile)
                self._products(keys)
                with T.serial(H) as h:
                    self.n = first_head + h
                    self._softmax(h, r, i, keys)
                if self.wants_output:
                    self._add_values(keys)
            with T.serial(H) as h:
                self.n = first_head + h
                self._finish_row(h, r)

    def _share(self, seen: attention.Interval) -> attention.Interval:
        """Of the keys that a row sees, those of this task's part: whole tiles."""
        c = self.config
        tiles = tir.max(seen.last + c.keys - seen.first, 0) // c.keys
        length = T.Bind((tiles + (c.parts - 1)) // c.parts * c.keys)
        first = seen.first + self.part * length
        return attention.Interval(*opaque("int32", [first, tir.min(seen.last, first + length - 1)]))

    def _tile_of_stripes(self, first: Expr, total: Expr, tile: Expr) -> KeyTile:
        """Of ``total`` keys from ``first`` on, those of a tile: some of each stripe, or, of the
        last keys, which do not fill a tile, all.
        """
        c, stripes = self.config, self.config.stripes
        if stripes == 1:
            j0 = first + tile * c.keys
            j0, count = opaque("int32", [j0, tir.min(c.keys, total - tile * c.keys)])
            return KeyTile(j0, count, j0 + c.keys)
        run = c.keys // stripes
        whole = T.Bind(total // c.keys)
        inside = T.Bind(tile < whole)
        j0 = first + tir.Select(inside, tile * run, whole * c.keys)
        following = first + tir.Select(tile + 1 < whole, (tile + 1) * run, total)
        values = [
            j0,
            tir.Select(inside, c.keys, total - whole * c.keys),
            following,
            tir.Select(inside, whole * run, 1),
            tir.Select(inside, 1, stripes),
        ]
        return KeyTile(*opaque("int32", values), stripes)

    def _each_d(self, statement) -> None:
        """statement(d) for the whole row: vectors, then the rest one by one."""
        p, L = self.problem, self.config.lanes
        with T.serial(p.D // L) as strip, T.vectorized(L) as v:
            statement(strip * L + v)
        if p.D % L:
            with T.serial(p.D % L) as tail:
                statement(p.D // L * L + tail)

    def _start_row(self, h: Expr, i: Expr) -> None:
        def load(d: Expr) -> None:
            T.buffer_store(self.query, self._query_element(i, d), [h, d])
            if self.wants_output:
                T.buffer_store(self.output, float32(0), [h, d])

        self._each_d(load)
        for slot, value in enumerate((attention.EMPTY_ROW_MAX, 0, 0)):
            T.buffer_store(self.state, float32(value), [h, slot])

    def _query_element(self, i: Expr, d: Expr) -> Expr:
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, self.n, at.query_start + i, d)
        return to_float32(self.buffers["query"][tuple(index)], self.unit)

    def _products(self, tile: KeyTile) -> None:
        """scores[h][j] = query h . key j, some keys at a time; the last key is read again for
        those beyond ``count``. The values of the same keys are asked for meanwhile.
        """
        p, c = self.problem, self.config
        H, L, strips, together = c.heads, c.lanes, p.D // c.lanes, c.keys_together
        last = tile.count - 1
        places = [(h, k) for h in range(H) for k in range(together)]
        with T.serial((tile.count + (together - 1)) // together) as step:
            keys = [T.Bind(tile.key(tir.min(step * together + k, last))) for k in range(together)]
            acc = T.alloc_buffer((len(places), L), scope="local")
            for slot in range(len(places)):
                with T.vectorized(L) as v:
                    T.buffer_store(acc, float32(0), [slot, v])
            with T.serial(strips) as strip:
                for slot, (h, k) in enumerate(places):
                    with T.vectorized(L) as v:
                        d = strip * L + v
                        product = self.query[h, d] * self.kv("key", keys[k], d)
                        T.buffer_store(acc, acc[slot, v] + product, [slot, v])
            if p.D % L:
                with T.serial(p.D % L) as tail:
                    d = strips * L + tail
                    for slot, (h, k) in enumerate(places):
                        product = self.query[h, d] * self.kv("key", keys[k], d)
                        T.buffer_store(acc, acc[slot, 0] + product, [slot, 0])
            if self.wants_output:
                for j in keys:
                    self._ask_for("value", j)
            self._store_scores(acc, places, step * together)

    def _store_scores(self, acc: tir.Buffer, places: list[tuple[int, int]], key: Expr) -> None:
        """Sums of the lanes of acc[slot] to scores[h][key + k], ``places`` being (h, k) by slot."""
        L = self.config.lanes
        for first in range(0, len(places), L):
            run = places[first : first + L]
            slots = [min(first + lane, len(places) - 1) for lane in range(L)]
            sums = T.Bind(sums_lanes([load_lanes(acc, [slot, 0], L) for slot in slots]))
            for h, heads_run in itertools.groupby(enumerate(run), lambda place: place[1][0]):
                lanes, ks = zip(*((lane, k) for lane, (_, k) in heads_run))
                index = [h, ramp(key + ks[0], len(ks)) if len(ks) > 1 else key + ks[0]]
                T.buffer_store(self.scores, tir.Shuffle([sums], list(lanes)), index)

    def _ask_for(self, name: str, j: Expr, share: Expr | int = 0, shares: int = 1) -> None:
        """Prefetch one of ``shares`` shares of a row of the keys or values: the memory works while
        the cores compute. A line beyond the tensor does no harm.
        """
        p, at = self.problem, self.at
        line = _LINE_BITS // DataType(p.dtype).bits
        lines = -(-p.D // (line * shares))
        for k in range(lines):
            d = (share * lines + k) * line
            index = attention.element(p.layout, p.D, at.b, self.g, at.key_start + j, d)
            self._prefetch(name, index)

    def _prefetch(self, name: str, index: Sequence[Expr]) -> None:
        address = tir.address_of(self.buffers[name][tuple(index)])
        T.evaluate(tir.call_intrin("void", "tirx.prefetch", address, *_FOR_READING))

    def _softmax(self, h: Expr, r: Expr, i: Expr, tile: KeyTile) -> None:
        p, c, at, count = self.problem, self.config, self.at, tile.count
        L = c.lanes
        strips = T.Bind((count + (L - 1)) // L)
        lanes = T.alloc_buffer((L,), scope="local")
        with T.vectorized(L) as v:
            T.buffer_store(lanes, float32(attention.EMPTY_ROW_MAX), [v])
        slope = self.slope()
        with T.serial(strips) as strip, T.vectorized(L) as v:
            key = strip * L + v
            j = tir.min(tile.key(key), at.S2 - 1)
            x = self.score(self.scores[h, key], self._row_bias(slope, i, j))
            allowed = key < count
            if p.mask:
                allowed = tir.all(allowed, self.mask_bit(i, j) == 0)
            x = T.Bind(tir.Select(allowed, x, float32(float("-inf"))))
            T.buffer_store(self.scores, x, [h, key])
            T.buffer_store(lanes, tir.max(lanes[v], x), [v])
        top = T.Bind(tir.max(self.state[h, 0], max_lanes(load_lanes(lanes, [0], L))))
        step = T.Bind(self.in_ln2(self.state[h, 0] - top))
        T.buffer_store(self.state, exp2_nonpositive(step), [h, 2])
        T.buffer_store(self.state, top, [h, 0])
        with T.vectorized(L) as v:
            T.buffer_store(lanes, float32(0), [v])
        draws = self.draws()
        with T.serial(strips) as strip, T.vectorized(L) as v:
            key = strip * L + v
            x = T.Bind(self.in_ln2(self.scores[h, key] - self.state[h, 0]))
            w = T.Bind(exp2_nonpositive(x))
            T.buffer_store(lanes, lanes[v] + w, [v])
            if draws is not None:
                w = tir.Select(self.keep(draws, v, r, tile.key(key)), w, float32(0))
            T.buffer_store(self.scores, w, [h, key])
        total = self.state[h, 1] * self.state[h, 2] + sum_lanes(load_lanes(lanes, [0], L))
        T.buffer_store(self.state, total, [h, 1])

    def _row_bias(self, slope: Expr | None, i: Expr, j: Expr) -> Expr | None:
        """Bias of the keys j, which lie across the lanes."""
        p = self.problem
        if p.pse in ("rows", "packed"):
            return self.bias_element(i, j)
        if p.pse == "row":
            return self.bias_element(0, j)
        return None if p.pse is None else self.generated_bias(slope, i, j)

    def _add_values(self, tile: KeyTile, first_key: Expr | int = 0) -> None:
        """output = output * correction + weights @ values, some strips of D at a time, from
        ``first_key`` of the tile on. The keys of the next tile are asked for meanwhile.
        """
        p, L, c = self.problem, self.config.lanes, self.config
        strips = p.D // L
        width = min(strips, c.row_sums // c.heads)
        if strips:
            whole = strips // width
            with T.serial(whole) as block:
                self._add_strips(tile, first_key, block * width, width, (block, whole))
            if strips % width:
                self._add_strips(tile, first_key, whole * width, strips % width)
        if p.D % L:
            acc = T.alloc_buffer((1,), scope="local")
            with T.serial(c.heads) as h, T.serial(p.D % L) as tail:
                d = strips * L + tail
                T.buffer_store(acc, self.output[h, d] * self.state[h, 2], [0])
                with T.serial(first_key, tile.count) as k:
                    product = self.scores[h, k] * self.kv("value", tile.key(k), d)
                    T.buffer_store(acc, acc[0] + product, [0])
                T.buffer_store(self.output, acc[0], [h, d])

    def _add_strips(
        self,
        tile: KeyTile,
        first_key: Expr | int,
        first: Expr | int,
        width: int,
        share: tuple[Expr, int] | None = None,
    ) -> None:
        """``share`` of the next keys is asked for.

        A barrier ends it: LLVM would keep the sums of all strips alive from one tile to the next.
        """
        H, L = self.config.heads, self.config.lanes
        acc = T.alloc_buffer((H * width, L), scope="local")
        places = list(enumerate(itertools.product(range(H), range(width))))
        for slot, (h, strip) in places:
            with T.vectorized(L) as v:
                value = self.output[h, (first + strip) * L + v] * self.state[h, 2]
                T.buffer_store(acc, value, [slot, v])
        with T.serial(first_key, tile.count) as k:
            j = T.Bind(tile.key(k))
            weights = [T.Bind(self.scores[h, k]) for h in range(H)]
            for slot, (h, strip) in places:
                with T.vectorized(L) as v:
                    product = weights[h] * self.kv("value", j, (first + strip) * L + v)
                    T.buffer_store(acc, acc[slot, v] + product, [slot, v])
            if share:
                self._ask_for("key", tile.next_key(j), *share)
        for slot, (h, strip) in places:
            with T.vectorized(L) as v:
                T.buffer_store(self.output, acc[slot, v], [h, (first + strip) * L + v])
        T.evaluate(barrier())

    def _finish_row(self, h: Expr, r: Expr) -> None:
        top, total = self.state[h, 0], T.Bind(self.state[h, 1])
        if self.config.parts > 1:
            slot = self._slot(r, self.part)
            T.buffer_store(self.part_state, top, [slot, 0])
            T.buffer_store(self.part_state, total, [slot, 1])
            if self.wants_output:
                self._each_d(
                    lambda d: T.buffer_store(self.part_output, self.output[h, d], [slot, d])
                )
            return
        if self.wants_output:
            inverse = T.Bind(self.inverse(total))
            self._each_d(lambda d: self.put(r, d, T.Bind(self.output[h, d] * inverse)))
        self.store_records(r, top, total)

    def _slot(self, r: Expr, part: Expr | int) -> Expr:
        """Row of the workspace."""
        p = self.problem
        row = (self.at.b * p.N1 + self.n) * p.S1 + r
        return T.Bind(row * self.config.parts + part)

    def join(self) -> None:
        """Results of the rows of head n from their parts; one without keys has a sum of 0."""
        P = self.config.parts
        weights = T.alloc_buffer((P,), scope="local")
        with T.serial(self.rows) as r:
            slots = [self._slot(r, part) for part in range(P)]
            tops = [self.part_state[slot, 0] for slot in slots]
            top = T.Bind(functools.reduce(tir.max, tops))
            for part in range(P):
                T.buffer_store(
                    weights, exp2_nonpositive(T.Bind(self.in_ln2(tops[part] - top))), [part]
                )

            def joined(element: Callable[[Expr], Expr]) -> Expr:
                terms = [weights[part] * element(slot) for part, slot in enumerate(slots)]
                return T.Bind(functools.reduce(operator.add, terms))

            total = joined(lambda slot: self.part_state[slot, 1])
            if self.wants_output:
                inverse = T.Bind(self.inverse(total))
                self._each_d(
                    lambda d: self.put(
                        r, d, T.Bind(joined(lambda slot: self.part_output[slot, d]) * inverse)
                    )
                )
            self.store_records(r, top, total)
