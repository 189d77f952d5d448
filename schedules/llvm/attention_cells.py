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
from .vector import constant, float32, load_lanes, max_lanes, ramp, to_float32

_LINE_BITS = 512
_FOR_READING = (0, 2, 1)
"""Operands of ``llvm.prefetch``: read, into the second-level cache, data."""


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

    def _ask_ahead(self, r: Expr, j: Expr, turn: Expr, turns: int, part: range) -> None:
        """Prefetch the bias of query rows i0 + r, ... and keys j, ... of a coming tile: in each of
        ``turns`` turns a share of the lines of the rows ``part``.

        Its rows lie far apart, which hardware does not foresee. What lies beyond the tensor does no
        harm.
        """
        if self.problem.pse != "rows":
            return
        pse, plane = self.buffers["pse"], self._bias_plane()
        elements = _LINE_BITS // DataType(pse.dtype).bits
        lines = -(-self.config.keys // elements)
        share = -(-len(part) * lines // turns)
        for k in range(share):
            line = turn * share + k
            i = self.i0 + r + (part.start + line // lines)
            address = tir.address_of(pse[(*plane, i, j + line % lines * elements)])
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

    @property
    def _bias_in_words(self) -> bool:
        """bfloat16 biases of two keys are a word while they are transposed, so that half as many
        registers are, and a cache line is read once.
        """
        return self.problem.dtype == "bfloat16" and self.config.keys % (2 * self.config.lanes) == 0

    @property
    def bias_strip(self) -> int:
        """Keys of a row that are transposed together."""
        return (2 if self._bias_in_words else 1) * self.config.lanes

    def _stage_bias(self, r0: Expr, j0: Expr, count: Expr) -> None:
        """bias_tile[j][r] = pse of the pair as float32; rows beyond S1 repeat the last. A last
        partial strip of keys is moved back over the one before it.
        """
        c, at, L = self.config, self.at, self.config.lanes

        def one_by_one() -> None:
            with T.serial(c.width) as r:
                i = T.Bind(tir.min(self.i0 + r0 + r, at.S1 - 1))
                with T.serial(count) as j:
                    T.buffer_store(self.bias_tile, self.bias_element(i, j0 + j), [j, r])

        def store(key: Expr, u: Expr, bias: Expr) -> None:
            T.buffer_store(self.bias_tile, bias, [key, ramp(u * L, L)])

        if self.problem.pse != "rows":
            one_by_one()
            return
        strip = self.bias_strip
        with T.If(count < strip):
            with T.Then():
                one_by_one()
            with T.Else(), T.serial((count + (strip - 1)) // strip) as k, T.serial(c.vectors) as u:
                first = T.Bind(tir.min(k * strip, count - strip))
                self._each_bias(r0, j0, first, u, store)

    def _each_bias(
        self,
        r0: Expr,
        j0: Expr,
        first: Expr | int,
        u: Expr | int,
        take: Callable[[Expr, Expr | int, Expr], None],
    ) -> None:
        """take(key, u, its bias for register u of query rows) for the keys of a strip of j0 on."""
        L, words = self.config.lanes, self._bias_in_words
        pse, plane = self.buffers["pse"], self._bias_plane()
        block = T.alloc_buffer((L, L), "uint32" if words else "float32", scope="local")
        for r in range(L):
            i = tir.min(self.i0 + r0 + u * L + r, self.at.S1 - 1)
            found = load_lanes(pse, [*plane, i, j0 + first], self.bias_strip)
            row = tir.reinterpret(f"uint32x{L}", found) if words else to_float32(found, self.unit)
            T.buffer_store(block, row, [r, ramp(0, L)])
        transpose_square(block, L)
        for k in range(L):
            row = T.Bind(load_lanes(block, [k, 0], L))
            if not words:
                take(first + k, u, row)
                continue
            low = row << constant(16, "uint32", row)
            high = row & constant(0xFFFF0000, "uint32", row)
            for odd, word in enumerate((low, high)):
                take(first + (2 * k + odd), u, tir.reinterpret(f"float32x{L}", word))

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
