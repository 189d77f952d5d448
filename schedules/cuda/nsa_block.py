"""One thread block of the NSA compression attention kernel: its query rows against the compressed
keys of their sequence, first for the output, then for the importance of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import LN2, LOG2E, times
from ..intrin import cuda
from .arch import WARP, Arch
from .attention_place import float32, named
from .attention_products import OrdinaryUnits, TensorCores
from .nsa_config import NsaConfig
from .nsa_mask import Reach, reach
from .shared_memory import shared_memory
from .tile_copy import TileCopies

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_FLT_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Place:
    """What a block computes. Lengths and positions are int32, packed rows int64."""

    h2: Expr
    part: Expr
    """Its slice of the output's columns."""
    query_start: Expr
    """First packed row of the sequence's queries."""
    S1: Expr
    """Query rows of the sequence."""
    t0: Expr
    """The tile's first query position in the sequence."""
    key_start: Expr
    S2: Expr
    """Compressed keys of the sequence."""


class Block:
    """Emits the statements of a block.

    Row r of the tile is position r // G, head r % G. ``sweep`` passes the tiles of keys through a
    ring of slots in shared memory: before a slot's content is used, the copy that is ``slots - 1``
    ahead starts into the slot that was used last; one barrier per slot serves both.
    """

    def __init__(
        self,
        problem: Problem,
        config: NsaConfig,
        arch: Arch,
        buffers: dict[str, tir.Buffer],
        thread: Expr,
        place: Place,
    ):
        self.problem, self.config, self.buffers, self.at = problem, config, buffers, place
        self.c = config.tiles
        self.thread = thread
        self.lane = named(thread % WARP)
        self.warp = named(thread // WARP)
        self.count = named(tir.min(place.S1 - place.t0, config.positions))
        """Query positions of the tile that exist."""
        self.first_row = named(self.warp * self.c.warp_rows + self.lane // 4)
        self.first_column = named(self.lane % 4 * 2)
        dtype = problem.dtype if self.c.tensor_cores else "float32"
        self.shared = shared_memory(config.shared_elements, dtype)
        self.copies = TileCopies(self.c, self.shared, thread)
        products = TensorCores if self.c.tensor_cores else OrdinaryUnits
        self.products = products(self.c, arch, problem.dtype, self.shared, thread)
        self.wants_out = "attention_out" in problem.outputs
        rows = len(self.fragments)
        self.top = T.alloc_buffer((rows,), scope="local")  # in units of ln 2
        self.sum = T.alloc_buffer((rows,), scope="local")
        self.spare = T.alloc_buffer((3,), scope="local")

    @property
    def fragments(self) -> list[tuple[int, int]]:
        """(m, h) of every row of the thread."""
        return [(m, h) for m in range(self.c.row_tiles) for h in range(2)]

    def row(self, m: int, h: int) -> Expr:
        return self.first_row + (16 * m + 8 * h)

    def position(self, m: int, h: int) -> Expr:
        """Query position in the sequence; beyond the tile's last, that one."""
        return self.at.t0 + tir.min(self.row(m, h) // self.problem.group, self.count - 1)

    # -- first pass ---------------------------------------------------------------------------

    def attend(self) -> None:
        """Maxima, sums and output, and the queries in their place for a second pass."""
        self.reach = self._reach()
        for k in range(len(self.fragments)):
            T.buffer_store(self.top, float32(-_FLT_MAX), [k])
            T.buffer_store(self.sum, float32(0), [k])
        if self.wants_out:
            self.products.clear_output()
        self._copy_queries()
        keys = self.c.keys
        first = named(self.reach.first // keys)
        end = tir.Select(self.reach.last >= self.reach.first, self.reach.last // keys + 1, first)

        def use(tile: Expr, slot: Callable[[int], Expr | int]) -> None:
            self.scores(tile, slot)
            self._softmax()
            if self.wants_out:
                self.products.take_weights()
                for step in range(self.c.value_steps):
                    self.products.add_values(slot(self.c.steps + step), step)

        self.sweep(first, named(end), self.c.steps + self.c.value_steps, use, first_pass=True)
        for k in range(len(self.fragments)):
            for mask in (1, 2):
                T.buffer_store(self.spare, cuda.shuffle_xor(self.sum[k], mask), [0])
                T.buffer_store(self.sum, self.sum[k] + self.spare[0], [k])

    def _reach(self) -> Reach:
        at = self.at
        if "bounds" not in self.buffers:
            return Reach(tir.const(0, "int32"), at.S2 - 1, at.S2)
        every = not self.problem.zero_masked_rows
        positions = self.config.positions
        return reach(self.buffers["bounds"], at.t0, self.count, positions, at.S2, every, self.lane)

    def scores(self, tile: Expr, slot: Callable[[int], Expr | int]) -> None:
        """``products.scores`` = S in units of ln 2 of a tile of keys, masked."""
        for step in range(self.c.steps):
            begin = slot(step)
            if not step:
                self.products.clear_scores()
            self.products.add_scores(begin, step)
        scores = self.products.scores
        factor = self.problem.scale * LOG2E
        with T.unroll(scores.shape[0]) as k:
            T.buffer_store(scores, times(scores[k], factor), [k])
        j0 = named(tile * self.c.keys)
        with T.If(j0 + self.c.keys > self.reach.clear), T.Then():
            self._mask(j0)

    def _mask(self, j0: Expr) -> None:
        """Masked keys score -FLT_MAX, or nothing at all where masked rows are to be zero; those
        beyond the sequence nothing.
        """
        p, at, scores = self.problem, self.at, self.products.scores
        never = float32(-math.inf)
        low = never if p.zero_masked_rows else float32(-_FLT_MAX)
        shared = p.group % 16 == 0  # both halves are heads of one position
        mask = self.buffers.get("atten_mask")
        masked = T.alloc_buffer((1,), "bool", scope="local")
        for m, h in self.fragments:
            if mask is not None:
                t = named(tir.min(self.position(m, h), (mask.shape[0] - 1).astype("int32")))
            for n in range(self.c.keys // 8):
                for e in range(2):
                    if shared and h:
                        continue
                    j = j0 + self.first_column + (8 * n + e)
                    if mask is not None:
                        last = tir.min(at.S2, mask.shape[1].astype("int32")) - 1
                        T.buffer_store(masked, mask[t, tir.min(j, last)].astype("int32") != 0, [0])
                    for half in (0, 1) if shared else (h,):
                        slot = self.products.score_slot(m, n, half, e)
                        score = scores[slot]
                        if mask is not None:
                            score = tir.Select(masked[0], low, score)
                        T.buffer_store(scores, tir.Select(j < at.S2, score, never), [slot])

    def _softmax(self) -> None:
        """scores become weights; maxima and sums follow, and the output is scaled."""
        scores, spare = self.products.scores, self.spare
        best, other, correction = 0, 1, 2
        for k, (m, h) in enumerate(self.fragments):
            slots = self.key_slots(m, h)
            T.buffer_store(spare, scores[slots[0]], [best])
            for slot in slots[1:]:
                T.buffer_store(spare, tir.max(spare[best], scores[slot]), [best])
            for mask in (1, 2):
                T.buffer_store(spare, cuda.shuffle_xor(spare[best], mask), [other])
                T.buffer_store(spare, tir.max(spare[best], spare[other]), [best])
            T.buffer_store(spare, tir.max(self.top[k], spare[best]), [best])
            cuda.exp2(spare[correction], self.top[k] - spare[best])
            T.buffer_store(self.top, spare[best], [k])
            T.buffer_store(self.sum, self.sum[k] * spare[correction], [k])
            for slot in slots:
                cuda.exp2(scores[slot], scores[slot] - self.top[k])
                T.buffer_store(self.sum, self.sum[k] + scores[slot], [k])
            if self.wants_out:
                output = self.products.output
                for n in range(self.c.width // 8):
                    for e in range(2):
                        at = self.products.output_slot(m, n, h, e)
                        T.buffer_store(output, output[at] * spare[correction], [at])

    def key_slots(self, m: int, h: int) -> list[int]:
        """Places in ``scores`` of a row's keys, ascending."""
        return [
            self.products.score_slot(m, n, h, e) for n in range(self.c.keys // 8) for e in range(2)
        ]

    def inverse_sum(self, k: int) -> Expr:
        """1 / L; 0 for a row without keys."""
        return tir.Select(self.sum[k] > float32(0), float32(1) / self.sum[k], float32(0))

    # -- outputs ------------------------------------------------------------------------------

    def store(self) -> None:
        """attention_out, softmax_max and softmax_sum of the rows that exist."""
        p, at = self.problem, self.at
        records = {
            "softmax_max": lambda k: tir.Select(
                self.top[k] > float32(-_FLT_MAX), self.top[k] * float32(LN2), float32(-_FLT_MAX)
            ),
            "softmax_sum": lambda k: self.sum[k],
        }
        for k, (m, h) in enumerate(self.fragments):
            r = self.row(m, h)
            with T.If(r < self.count * p.group), T.Then():
                t = named((at.t0 + r // p.group).astype("int64"))
                n = named((at.h2 * p.group + r % p.group).astype("int64"))
                if self.wants_out:
                    self._store_out(k, m, h, at.query_start + t, n)
                rows = at.S1.astype("int64")
                index = [named(i) for i in p.softmax_record(at.query_start, rows, t, n)]
                for name, value in records.items():
                    if name in p.outputs:
                        with T.If(at.part == 0), T.Then():
                            record = named(value(k))
                            with T.vectorized(2) as v:  # each lane of the four two of the copies
                                place = [*index, self.first_column + v]
                                T.buffer_store(self.buffers[name], record, place)

    def _store_out(self, k: int, m: int, h: int, token: Expr, n: Expr) -> None:
        p, out, size = self.problem, self.buffers["attention_out"], self.problem.value_size
        inverse = named(self.inverse_sum(k))
        for column in range(self.c.width // 8):
            slot = self.products.output_slot(m, column, h, 0)
            d = self.at.part * self.c.width + self.first_column + 8 * column

            def element(e: Expr | int, d: Expr = d, slot: int = slot) -> None:
                value = (self.products.output[slot + e] * inverse).astype(p.dtype)
                T.buffer_store(out, value, [token, n, d + e])

            if size % 2 == 0:
                with T.If(d < size), T.Then(), T.vectorized(2) as e:
                    element(e)
            else:
                for e in range(2):
                    with T.If(d + e < size), T.Then():
                        element(e)

    # -- tiles of keys through shared memory --------------------------------------------------

    def sweep(
        self,
        first: Expr,
        end: Expr,
        per_tile: int,
        use: Callable[[Expr, Callable[[int], Expr | int]], None],
        first_pass: bool = False,
    ) -> None:
        """``use(tile, slot)`` for the tiles of keys first .. end - 1; ``slot(number)``, called in
        order, waits for slot ``number`` of the tile's ``per_tile`` and gives its first element.
        Nothing in shared memory is in use afterwards.
        """
        c = self.c

        def begin(turn: Expr, number: int) -> Expr | int:
            fixed = per_tile % c.slots == 0
            slot = number % c.slots if fixed else (turn * per_tile + number) % c.slots
            return c.query_elements + slot * c.slot_elements

        def copy_ahead(tile: Expr, turn: Expr, ahead: int) -> None:
            """The copy for the slot that is ``ahead`` slots after the first of ``tile``."""
            tile, step = tile + ahead // per_tile, ahead % per_tile
            with T.If(tile < end), T.Then():
                self._copy_keys(begin(turn, ahead), named(tile * c.keys), step)
            self.copies.commit()

        for ahead in range(c.slots - 1):
            copy_ahead(first, tir.const(0, "int32"), ahead)
        if first_pass and c.queries_in_registers:
            self.copies.arrive(c.slots - 1)
            self.products.load_queries()
        with T.serial(end - first) as turn:
            tile = named(first + turn)
            self.products.begin_tile(turn)

            def slot(number: int) -> Expr | int:
                self.copies.arrive(c.slots - 2)
                copy_ahead(tile, turn, number + c.slots - 1)
                found = begin(turn, number)
                return found if isinstance(found, int) else named(found)

            use(tile, slot)
        self.copies.arrive(0)

    def _copy_queries(self) -> None:
        c, p, at = self.c, self.problem, self.at

        def index(r: Expr, d: Expr) -> list[Expr]:
            position = at.t0 + tir.min(r // p.group, self.count - 1)
            return [at.query_start + position, at.h2 * p.group + r % p.group, d]

        query, rows = self.buffers["query"], self.count * p.group
        self.copies.copy(query, p.head_size, 0, c.rows, c.steps * c.depth, 0, rows, index)
        if c.queries_in_registers:
            self.copies.commit()

    def _copy_keys(self, base: Expr | int, j0: Expr, step: int) -> None:
        c, p, at = self.c, self.problem, self.at

        def index(r: Expr, d: Expr) -> list[Expr]:
            return [at.key_start + tir.min(j0 + r, at.S2 - 1), at.h2, d]

        source, size, column = self.buffers["key"], p.head_size, step * c.depth
        if step >= c.steps:
            source, size, column = self.buffers["value"], p.value_size, (step - c.steps) * c.depth
            if c.slices > 1:
                column = column + at.part * c.width
        self.copies.copy(source, size, base, c.keys, c.depth, column, at.S2 - j0, index)
