"""Second pass of the NSA compression attention kernel: scores of the selection blocks, and the k
best of them for every query position.

    for pass of ``chosen`` indices, turn of ``blocks`` selection blocks:  one each, as a rule
        scores = 0                                                        shared memory
        for key tile that their windows reach:
            P = exp(S - M) / L                                            registers
            sums = P summed over the heads of a group                     shuffles, shared memory
            scores += window of sums
        k rounds of arg-max over (the best so far, scores)                one warp a position

Several passes compute the same scores again, to the bit: each takes those out that are at least as
good as the last index of the one before.

Everything is added in one order: the same inputs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda
from .arch import WARP
from .attention_place import float32, named
from .nsa_block import Block

_TAKEN = -1.0  # below any score: a block already chosen, or none
_FORCED = 3.4028234663852886e38
_LANE_STEPS = (1, 2, 4, 8, 16)
_VECTOR = 4
"""Neighbouring candidates that one lane looks after."""
_UNROLLED_TAPS = 8


def select(block: Block) -> None:
    """topk_indices_out of a block's query positions, after its first pass."""
    _Selection(block).emit()


class _Selection:
    def __init__(self, block: Block):
        self.block = block
        self.problem, self.config, self.at = block.problem, block.config, block.at
        self.lane, self.warp = block.lane, block.warp
        self.factor = 4 // self.config.tiles.item_bytes
        self.blocks = named(self.problem.blocks(self.at.S2))
        rows = len(block.fragments)
        self.inverse = T.alloc_buffer((rows,), scope="local")
        self.partial = T.alloc_buffer((self.config.tiles.keys // 4,), scope="local")
        self.best = T.alloc_buffer((2,), scope="local")
        self.where = T.alloc_buffer((2,), "int32", scope="local")
        self.total = T.alloc_buffer((2,), scope="local")

    def emit(self) -> None:
        config, block = self.config, self.block
        for k in range(len(block.fragments)):
            T.buffer_store(self.inverse, block.inverse_sum(k), [k])
        self.wanted = named(tir.min(self.blocks, self.problem.block_count))
        self._each_position(self._begin)
        if config.passes == 1:
            self._pass(tir.const(0, "int32"))
        else:
            with T.serial((self.wanted + (config.chosen - 1)) // config.chosen) as number:
                self._pass(named(number * config.chosen))
        self._each_position(self._pad)

    def _pass(self, done: Expr) -> None:
        """Indices ``done`` .. of every position."""
        config = self.config
        self._each_position(self._forget)
        turns = named((self.blocks + (config.blocks - 1)) // config.blocks)
        with T.serial(turns) as turn:
            first = named(turn * config.blocks)
            count = named(tir.min(self.blocks - first, config.blocks))
            self._each_position(lambda p: self._clear(p, count))
            self._score(first, count)
            self._each_position(lambda p: self._choose(p, first, count, done))

    # -- floats of shared memory --------------------------------------------------------------

    def _address(self, cell: Expr) -> Expr:
        return T.address_of(self.block.shared[cell * self.factor])

    def _get(self, cell: Expr) -> Expr:
        found = T.alloc_buffer((1,), scope="local")
        cuda.load_shared([found[0]], self._address(cell))
        return found[0]

    def _put(self, cell: Expr, value: Expr) -> None:
        cuda.store_shared(self._address(cell), [value])

    def _cell(self, position: Expr, v: Expr | int) -> Expr:
        """Candidate v: the listed ones, then the blocks of the turn."""
        return self.config.first_score + position * self.config.cells + v

    def _place(self, position: Expr, v: Expr) -> Expr:
        return self.config.first_place + position * self.config.listed + v

    def _next(self, position: Expr, which: int, v: Expr) -> Expr:
        listed = self.config.listed
        return self.config.first_next + (position * 2 + which) * listed + v

    def _last(self, position: Expr, which: int) -> Expr:
        return self.config.first_last + position * 2 + which

    # -- scores -------------------------------------------------------------------------------

    def _score(self, first: Expr, count: Expr) -> None:
        """scores of the blocks first .. first + count - 1."""
        p, block, keys = self.problem, self.block, self.config.tiles.keys
        oldest = tir.max(p.newest_key(first) - (p.taps - 1), block.reach.first)
        newest = tir.min(p.newest_key(first + count - 1), block.reach.last)
        begin = named(tir.max(oldest, 0) // keys)
        end = named(tir.Select(newest >= oldest, newest // keys + 1, begin))

        def use(tile: Expr, slot: Callable[[int], Expr | int]) -> None:
            block.scores(tile, slot)
            self._sum_heads()
            T.evaluate(T.cuda.cta_sync())
            self._add_windows(named(tile * keys), first, count)

        block.sweep(begin, end, self.config.tiles.steps, use)

    def _sum_heads(self) -> None:
        """sums [units][keys] = probabilities of the tile, added over the heads of every unit."""
        block, scores = self.block, self.block.products.scores
        unit_rows = self.config.unit_rows
        for k, (m, h) in enumerate(block.fragments):
            for slot in block.key_slots(m, h):
                cuda.exp2(scores[slot], scores[slot] - block.top[k])
                T.buffer_store(scores, scores[slot] * self.inverse[k], [slot])
        together = max(1, unit_rows // 8)  # halves of a fragment, then fragments
        for start in range(0, len(block.fragments), together):
            rows = [block.key_slots(*mh) for mh in block.fragments[start : start + together]]
            for i, slots in enumerate(zip(*rows)):
                total = scores[slots[0]]
                for slot in slots[1:]:
                    total = total + scores[slot]
                T.buffer_store(self.partial, total, [i])
            unit = block.row(*block.fragments[start]) // unit_rows
            self._sum_lanes(unit, min(unit_rows, 8))

    def _sum_lanes(self, unit: Expr, rows: int) -> None:
        """Adds ``partial`` over the lanes of ``rows`` rows; where there are enough keys each lane
        ends with some of them, in place of all lanes with all.
        """
        partial, count = self.partial, self.config.tiles.keys // 4
        first, writes = tir.const(0, "int32"), None
        step = 4
        while step < 4 * rows:
            upper = (self.lane & step) != 0
            if count % 2 == 0:
                count //= 2
                for i in range(count):
                    away = tir.Select(upper, partial[i], partial[count + i])
                    T.buffer_store(self.total, cuda.shuffle_xor(away, step), [0])
                    mine = tir.Select(upper, partial[count + i], partial[i])
                    T.buffer_store(partial, mine + self.total[0], [i])
                zero = tir.const(0, "int32")
                first = first + tir.Select(upper, tir.const(count, "int32"), zero)
            else:
                for i in range(count):
                    T.buffer_store(self.total, cuda.shuffle_xor(partial[i], step), [0])
                    T.buffer_store(partial, partial[i] + self.total[0], [i])
                writes = tir.Not(upper) if writes is None else tir.all(writes, tir.Not(upper))
            step *= 2
        first = named(first)

        def write() -> None:
            for i in range(count):
                number = first + i  # of the pair's element among the lane's keys of a row
                key = number // 2 * 8 + self.block.first_column + number % 2
                cell = self.config.first_sum + unit * self.config.tiles.keys + key
                self._put(cell, partial[i])

        if writes is None:
            write()
        else:
            with T.If(writes), T.Then():
                write()

    def _add_windows(self, j0: Expr, first: Expr, count: Expr) -> None:
        """scores += the part of each window that lies in the tile of keys from ``j0`` on; a thread
        takes (position, block) pairs.
        """
        p, config = self.problem, self.config
        keys, threads = config.tiles.keys, config.tiles.threads
        units = config.group // config.unit_rows
        span = (keys + p.taps - 2) // p.blocks_stride + 1  # blocks whose windows meet the tile
        lowest = (j0 + p.score_shift + p.blocks_stride - 1) // p.blocks_stride - 1
        lowest = named(tir.max(lowest, first))
        total, pairs = self.total, config.positions * span
        with T.serial(-(-pairs // threads)) as turn:
            number = named(self.block.thread + turn * threads)
            position, j = named(number // span), named(lowest + number % span)
            inside = tir.all(position < self.block.count, j < first + count)
            with T.If(inside), T.Then():
                newest = named(p.newest_key(j) - j0)
                T.buffer_store(total, float32(0), [0])

                def add(c: Expr | int) -> None:
                    """Tap c, if its key is in the tile."""
                    key = named(newest - c)
                    within = named(tir.all(key >= 0, key < keys))
                    weight = p.weight(tir.const(c, "int32") if isinstance(c, int) else c)
                    weight = named(tir.Select(within, weight.astype("float32"), float32(0)))
                    key = named(tir.min(tir.max(key, 0), keys - 1))
                    for u in range(units):
                        cell = config.first_sum + (position * units + u) * keys + key
                        T.buffer_store(total, total[0] + weight * self._get(cell), [0])

                if p.taps <= _UNROLLED_TAPS:
                    for c in range(p.taps):
                        add(c)
                else:
                    with T.serial(p.taps) as c:
                        add(c)
                cell = named(self._cell(position, config.listed + j - first))
                self._put(cell, self._get(cell) + total[0])

    # -- choice -------------------------------------------------------------------------------

    def _each_position(self, statement: Callable[[Expr], None]) -> None:
        """``statement`` for the positions of the warp."""
        warps = self.config.tiles.warps
        with T.serial(-(-self.config.positions // warps)) as turn:
            position = named(turn * warps + self.warp)
            with T.If(position < self.block.count), T.Then():
                statement(position)

    def _each(self, count: Expr | int, statement: Callable[[Expr], None]) -> None:
        """``statement`` for 0 .. count - 1, divided among the lanes."""
        with T.serial((count + (WARP - 1)) // WARP) as strip:
            v = named(strip * WARP + self.lane)
            with T.If(v < count), T.Then():
                statement(v)

    def _begin(self, position: Expr) -> None:
        """No index has been chosen yet."""
        if self.config.passes > 1:
            with T.If(self.lane == 0), T.Then():
                for which, value in enumerate((math.inf, -1.0)):
                    self._put(self._last(position, which), float32(value))

    def _forget(self, position: Expr) -> None:
        if self.config.listed:
            self._each(
                self.config.listed, lambda v: self._put(self._cell(position, v), float32(_TAKEN))
            )

    def _clear(self, position: Expr, count: Expr) -> None:
        listed = self.config.listed
        self._each(count, lambda v: self._put(self._cell(position, listed + v), float32(0)))

    def _force(self, position: Expr, first: Expr, count: Expr) -> None:
        forced = self.buffer("topk_mask")
        rows, columns = ((size - 1).astype("int32") for size in forced.shape)
        t = named(tir.min(self.at.t0 + position, rows))

        def one(v: Expr) -> None:
            with T.If(forced[t, tir.min(first + v, columns)].astype("int32") != 0), T.Then():
                self._put(self._cell(position, self.config.listed + v), float32(_FORCED))

        self._each(count, one)
        T.evaluate(T.cuda.warp_sync())

    def _take_out(self, position: Expr, first: Expr, count: Expr) -> None:
        """What earlier passes chose of the blocks of the turn."""
        score, index = (named(self._get(self._last(position, which))) for which in range(2))

        def one(v: Expr) -> None:
            cell = named(self._cell(position, self.config.listed + v))
            found = named(self._get(cell))
            chosen = tir.all(found == score, first + v <= index.astype("int32"))
            with T.If(tir.any(found > score, chosen)), T.Then():
                self._put(cell, float32(_TAKEN))

        self._each(count, one)
        T.evaluate(T.cuda.warp_sync())

    def buffer(self, name: str) -> tir.Buffer:
        return self.block.buffers[name]

    def _find_best(self, position: Expr, candidates: Expr) -> None:
        """best[0], where[0] = the lane's greatest candidate, the first of equals."""
        T.buffer_store(self.best, float32(_TAKEN), [0])
        T.buffer_store(self.where, self.lane * _VECTOR, [0])
        found = T.alloc_buffer((_VECTOR,), scope="local")
        step = WARP * _VECTOR
        with T.serial((candidates + (step - 1)) // step) as strip:
            v = named(strip * step + self.lane * _VECTOR)
            with T.If(v < candidates), T.Then():
                scores = [found[e] for e in range(_VECTOR)]
                cuda.load_shared(scores, self._address(self._cell(position, v)))
                for e, score in enumerate(scores):
                    with T.If(tir.all(v + e < candidates, score > self.best[0])), T.Then():
                        T.buffer_store(self.best, score, [0])
                        T.buffer_store(self.where, v + e, [0])

    def _choose(self, position: Expr, first: Expr, count: Expr, done: Expr) -> None:
        """The best of the listed blocks and of those of the turn, as many as the pass wants: listed
        anew, or stored.
        """
        p, config, best, where = self.problem, self.config, self.best, self.where
        if p.topk_mask is not None:
            self._force(position, first, count)
        if config.passes > 1:
            self._take_out(position, first, count)
        candidates = named(config.listed + count)
        last = first + count == self.blocks
        rounds = named(tir.min(first + count, tir.min(self.wanted - done, config.chosen)))
        self._find_best(position, candidates)
        winner = T.alloc_buffer((2,), scope="local")  # score, and the lane's own while it searches
        at = T.alloc_buffer((2,), "int32", scope="local")
        with T.serial(rounds) as place:
            T.buffer_store(winner, best[0], [0])
            T.buffer_store(at, where[0], [0])
            for step in _LANE_STEPS:
                T.buffer_store(winner, cuda.shuffle_xor(winner[0], step), [1])
                T.buffer_store(at, cuda.shuffle_xor(at[0], step), [1])
                equal = tir.all(winner[1] == winner[0], at[1] < at[0])
                better = named(tir.any(winner[1] > winner[0], equal))
                T.buffer_store(winner, tir.Select(better, winner[1], winner[0]), [0])
                T.buffer_store(at, tir.Select(better, at[1], at[0]), [0])
            # Undefined input may score NaN, which nothing exceeds: stay among the candidates.
            T.buffer_store(at, tir.min(at[0], candidates - 1), [0])
            with T.If(at[0] // _VECTOR % WARP == self.lane), T.Then():
                index = self._index(position, first, at)
                with T.If(last):
                    with T.Then():
                        self._store(position, done + place, index)
                        if config.passes > 1:
                            with T.If(place + 1 == rounds), T.Then():
                                self._put(self._last(position, 0), winner[0])
                                self._put(self._last(position, 1), index.astype("float32"))
                    if config.listed:
                        with T.Else():
                            self._put(self._next(position, 0, place), winner[0])
                            self._put(self._next(position, 1, place), index.astype("float32"))
                self._put(self._cell(position, at[0]), float32(_TAKEN))
                self._find_best(position, candidates)
        if config.listed:
            T.evaluate(T.cuda.warp_sync())
            with T.If(tir.Not(last)), T.Then():
                self._each(rounds, lambda v: self._list(position, v))
            T.evaluate(T.cuda.warp_sync())

    def _index(self, position: Expr, first: Expr, at: tir.Buffer) -> Expr:
        """Selection block of candidate at[0]."""
        listed = self.config.listed
        if not listed:
            return named(first + at[0])
        T.buffer_store(at, first + at[0] - listed, [1])
        with T.If(at[0] < listed), T.Then():
            T.buffer_store(at, self._get(self._place(position, at[0])).astype("int32"), [1])
        return at[1]

    def _list(self, position: Expr, v: Expr) -> None:
        self._put(self._cell(position, v), self._get(self._next(position, 0, v)))
        self._put(self._place(position, v), self._get(self._next(position, 1, v)))

    def _store(self, position: Expr, place: Expr, index: Expr) -> None:
        token = self.at.query_start + (self.at.t0 + position)
        T.buffer_store(self.buffer("topk_indices_out"), index, [token, self.at.h2, place])

    def _pad(self, position: Expr) -> None:
        """-1 where there are fewer blocks than places."""
        rest = tir.max(self.problem.block_count - self.blocks, 0)
        none = tir.const(-1, "int32")
        self._each(named(rest), lambda v: self._store(position, self.blocks + v, none))
