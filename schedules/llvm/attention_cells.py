"""What a mask, a bias or dropout says about each pair of a tile: W query rows and C keys.

Keys lie along the rows of these tensors, query rows across our lanes. Biases are transposed in
registers, masks become bits and stay as they lie, dropout is drawn where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm.tirx as tir
from tvm import DataType
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import bits
from .attention_task import Task
from .transpose import transpose_square
from .vector import float32, load_lanes, max_lanes, ramp

_LINE_BITS = 512
_FOR_READING = (0, 3, 1)
"""Operands of ``llvm.prefetch``: read, into all caches, data."""


class CellTask(Task):
    """Buffers: bias float32 [`bias_keys`][W]; dropped uint32 [C / 32][W]; kept float32
    [C + 6][W].
    """

    @property
    def bias_keys(self) -> int:
        """Keys whose bias is staged at a time, C or a divisor of it."""
        return self.config.keys

    def _allocate_cells(self) -> None:
        p, c = self.problem, self.config
        if p.pse in ("rows", "packed"):
            self.bias_tile = T.alloc_buffer((self.bias_keys, c.width))
        if p.mask:
            self.dropped_bits = T.alloc_buffer((-(-c.keys // bits.WIDTH), c.width), "uint32")
        if self.drops:
            self.kept = T.alloc_buffer((c.keys + 6, c.width))

    def _ask_ahead(self, r0: Expr, j0: Expr, step: Expr) -> None:
        """Prefetch the bias of the next tile of keys: some rows in each step of ``unroll`` keys.

        Its W rows of C elements lie far apart, which hardware does not foresee. A line beyond the
        tensor does no harm.
        """
        p, c = self.problem, self.config
        if p.pse != "rows":
            return
        pse, line = self.buffers["pse"], _LINE_BITS // DataType(p.dtype).bits
        rows = -(-c.width * c.unroll // c.keys)
        with T.serial(rows) as row:
            i = T.Bind(tir.min(self.i0 + r0 + step * rows + row, self.at.S1 - 1))
            for first in range(0, c.keys, line):
                element = pse[(*self._bias_plane(), i, j0 + (c.keys + first))]
                address = tir.address_of(element)
                T.evaluate(tir.call_intrin("void", "tirx.prefetch", address, *_FOR_READING))

    @property
    def words_end_steps(self) -> bool:
        """Steps of ``unroll`` keys never reach beyond the last word of a tile's keys."""
        return bits.WIDTH % self.config.unroll == 0

    def dropped(self, key: Expr, r: Expr) -> Expr:
        """Whether the mask drops the pair, or the key lies beyond the tile's last (where
        `words_end_steps`; else a step's last keys may lie in a word that nobody wrote).
        """
        bit = tir.const(1, "uint32") << (key % bits.WIDTH).astype("uint32")
        return (self.dropped_bits[key // bits.WIDTH, r] & bit) != tir.const(0, "uint32")

    def _stage_mask(self, r0: Expr, j0: Expr, count: Expr) -> tuple[Expr, Expr]:
        """dropped_bits[s][r]: bit k for key 32 * s + k; rows beyond S1 repeat the last.

        Returns whether any pair of the tile is dropped, and whether all are.
        """
        c, L, at = self.config, self.config.lanes, self.at
        strips = T.Bind((count + (bits.WIDTH - 1)) // bits.WIDTH)
        with T.serial(c.width) as r:
            i = T.Bind(tir.min(self.i0 + r0 + r, at.S1 - 1))
            with T.serial(strips) as strip:
                word = self._dropped_word(i, j0, strip * bits.WIDTH, count)
                T.buffer_store(self.dropped_bits, word, [strip, r])
        found = T.alloc_buffer((2, L), "uint32", scope="local")  # bits of dropped, kept pairs
        none, every = (tir.Broadcast(tir.const(x, "uint32"), L) for x in (0, 0xFFFFFFFF))
        for k in range(2):
            T.buffer_store(found, none, [k, ramp(0, L)])
        with T.serial(strips) as strip:
            inside = T.Bind(tir.Broadcast(_inside(strip * bits.WIDTH, count), L))
            for u in range(c.vectors):
                words = T.Bind(load_lanes(self.dropped_bits, [strip, u * L], L))
                for k, seen in enumerate((words & inside, words ^ every)):
                    T.buffer_store(found, load_lanes(found, [k, 0], L) | seen, [k, ramp(0, L)])
        some_dropped, some_kept = (
            T.Bind(max_lanes(load_lanes(found, [k, 0], L)) != tir.const(0, "uint32"))
            for k in range(2)
        )
        return some_dropped, tir.Not(some_kept)

    def _dropped_word(self, i: Expr, j0: Expr, first: Expr, count: Expr) -> Expr:
        """Bits of the keys j0 + first, ...; set from ``count`` on. Nothing is read beyond the
        row.
        """
        S2, every = self.at.S2, tir.const(0xFFFFFFFF, "uint32")
        word = T.alloc_buffer((1,), "uint32", scope="local")

        def at_once() -> None:
            j = T.Bind(tir.min(j0 + first, S2 - bits.WIDTH))
            found = bits.nonzero(self.mask_bytes(i, j, bits.WIDTH))
            T.buffer_store(word, found >> (j0 + first - j).astype("uint32"), [0])

        def one_by_one() -> None:
            T.buffer_store(word, tir.const(0, "uint32"), [0])
            with T.serial(tir.min(count - first, bits.WIDTH)) as k:
                bit = tir.Select(self.mask_bit(i, j0 + first + k) != 0, 1, 0).astype("uint32")
                T.buffer_store(word, word[0] | bit << k.astype("uint32"), [0])

        if isinstance(S2, tir.IntImm):
            at_once() if int(S2) >= bits.WIDTH else one_by_one()
        else:
            with T.If(S2 >= bits.WIDTH):
                with T.Then():
                    at_once()
                with T.Else():
                    one_by_one()
        return word[0] | (every ^ _inside(first, count))

    def _stage_bias(self, r0: Expr, j0: Expr, count: Expr) -> None:
        """bias_tile[j][r] = pse of the pair as float32."""
        c, at = self.config, self.at
        if self.problem.pse == "rows":
            if self.problem.dtype == "bfloat16" and c.keys % (2 * c.lanes) == 0:
                self._stage_words(r0, j0, count)
            else:
                self._stage_pairs(self.bias_tile, r0, j0, count, self.bias_element)
            return
        with T.serial(c.width) as r:
            i = T.Bind(tir.min(self.i0 + r0 + r, at.S1 - 1))
            with T.serial(count) as j:
                T.buffer_store(self.bias_tile, self.bias_element(i, j0 + j), [j, r])

    def _stage_words(self, r0: Expr, j0: Expr, count: Expr) -> None:
        """As `_stage_pairs`, for bfloat16: two keys are a word while they are transposed, so that
        half as many registers are, and a cache line is read once.
        """
        c, L = self.config, self.config.lanes
        pse, lead = self.buffers["pse"], self._bias_plane()
        high = tir.Broadcast(tir.const(0xFFFF0000, "uint32"), L)
        half = tir.Broadcast(tir.const(16, "uint32"), L)
        with T.If(count < 2 * L):
            with T.Then():
                self._stage_pairs(self.bias_tile, r0, j0, count, self.bias_element)
            with T.Else(), T.serial((count + (2 * L - 1)) // (2 * L)) as strip:
                first = T.Bind(tir.min(strip * (2 * L), count - 2 * L))
                with T.serial(c.vectors) as u:
                    block = T.alloc_buffer((L, L), "uint32", scope="local")
                    for r in range(L):
                        i = tir.min(self.i0 + r0 + u * L + r, self.at.S1 - 1)
                        found = load_lanes(pse, [*lead, i, j0 + first], 2 * L)
                        words = tir.reinterpret(f"uint32x{L}", found)
                        T.buffer_store(block, words, [r, ramp(0, L)])
                    transpose_square(block, L)
                    for k in range(L):
                        words = T.Bind(load_lanes(block, [k, 0], L))
                        for odd, bits in enumerate((words << half, words & high)):
                            index = [first + (2 * k + odd), ramp(u * L, L)]
                            value = tir.reinterpret(f"float32x{L}", bits)
                            T.buffer_store(self.bias_tile, value, index)

    def _stage_pairs(
        self,
        tile: tir.Buffer,
        r0: Expr,
        j0: Expr,
        count: Expr,
        source: Callable[[Expr, Expr], Expr],
    ) -> None:
        """tile[j][r] = source(i, j) of W rows, in square blocks in registers; rows beyond S1 repeat
        the last.

        A last partial block is moved back over the one before it; fewer keys than lanes are
        repeated.
        """
        c, at = self.config, self.at
        L = c.lanes
        last = count - 1
        with T.serial((count + (L - 1)) // L) as strip, T.serial(c.vectors) as u:
            first = T.Bind(tir.max(tir.min(strip * L, count - L), 0))
            block = T.alloc_buffer((L, L), scope="local")
            rows = [T.Bind(tir.min(self.i0 + r0 + u * L + r, at.S1 - 1)) for r in range(L)]
            with T.If(count >= L):
                with T.Then():
                    for r, i in enumerate(rows):
                        with T.vectorized(L) as v:
                            T.buffer_store(block, source(i, j0 + first + v), [r, v])
                with T.Else(), T.serial(L) as v:
                    for r, i in enumerate(rows):
                        T.buffer_store(block, source(i, j0 + tir.min(v, last)), [r, v])
            transpose_square(block, L)
            for k in range(L):
                T.buffer_store(tile, load_lanes(block, [k, 0], L), [first + k, ramp(u * L, L)])

    def _stage_draws(self, draws: tir.Buffer, r0: Expr, j0: Expr, count: Expr) -> None:
        """kept[j][r] = 1 where dropout keeps the pair, else 0.

        A draw decides four pairs, from a multiple of four on: first all draws that a row needs go
        one after the other, then each row moves up by its own phase.
        """
        L, kept = self.config.lanes, self.kept

        def each_lane(statement: Callable[[Expr, Expr], None]) -> None:
            for u in range(self.config.vectors):
                with T.vectorized(L) as v:
                    statement(v, u * L + v)

        def draw(v: Expr, r: Expr) -> None:
            first = self.pair(r0 + r, j0) >> tir.const(2, "int64")
            for k, keep in enumerate(self.keep_four(draws, v, first + block.astype("int64"))):
                T.buffer_store(kept, tir.Select(keep, float32(1), float32(0)), [4 * block + k, r])

        def move(v: Expr, r: Expr) -> None:
            phase = T.Bind((self.pair(r0 + r, j0) & tir.const(3, "int64")).astype("int32"))
            low = tir.Select(phase == 0, kept[j, r], kept[j + 1, r])
            high = tir.Select(phase == 2, kept[j + 2, r], kept[j + 3, r])
            T.buffer_store(kept, tir.Select(phase < 2, low, high), [j, r])

        even = (count + 1) // 2 * 2  # what takes weights in pairs reads one more
        with T.serial((even + 6) // 4) as block:
            each_lane(draw)
        with T.serial(even) as j:
            each_lane(move)


def _inside(first: Expr, count: Expr) -> Expr:
    """uint32 whose bit k says whether key first + k lies before ``count``, as ``first`` does."""
    beyond = tir.max(first + bits.WIDTH - count, 0).astype("uint32")
    return tir.const(0xFFFFFFFF, "uint32") >> beyond
