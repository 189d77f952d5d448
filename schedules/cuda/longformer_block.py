"""One thread block of the Longformer attention: its rows against their band and the global keys, or
against a share of all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import LOG2E
from ..intrin import cuda
from .arch import WARP, Arch
from .attention_config import AttentionConfig
from .attention_place import float32, int32, named
from .attention_products import TensorCores, chunk_offset
from .guard import guard
from .shared_memory import shared_memory

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

LOWEST = -1.0e38
"""A running maximum before the first key: finite, so that it can be subtracted."""
_EVERYWHERE = 2**31 - 1
"""The reach of a global key."""
_EXCHANGED = 4
"""Accumulators of 8 x 8 that the lanes of a quad exchange: one for each."""
_RECORD_BYTES = 8
"""Of a key of the tile: its additive mask (float32), its reach (int32)."""


class LongformerPlace(NamedTuple):
    """What a block computes."""

    b: Expr
    h: Expr
    first: Expr
    """The first position of the tile, or the first global token of the entry."""
    is_global: Expr
    first_key: Expr
    """Of its share of the keys, for a tile of global tokens."""
    end_key: Expr
    first_record: Expr
    """Where the rows of a tile of global tokens go in the parts that the second kernel adds up."""


def shared_bytes(config: AttentionConfig) -> int:
    """Of the queries, one tile of keys and values, and the records of its keys."""
    elements = config.query_elements + 2 * config.steps * config.slot_elements
    return elements * config.item_bytes + config.keys * _RECORD_BYTES


def quantised(value: Expr, inverse_scale: Expr) -> Expr:
    """The output, int8, for a float32 sum of weighted values."""
    o = value.astype("float16").astype("float32")
    clipped = tir.max(tir.min(o * inverse_scale, float32(127)), float32(-128))
    return tir.nearbyint(clipped).astype("int32").astype("int8")


class Block:
    """Emits the statements of a block; one object per PrimFunc under construction."""

    def __init__(
        self,
        problem: Problem,
        config: AttentionConfig,
        arch: Arch,
        buffers: dict[str, tir.Buffer],
        S: Expr,
        thread: Expr,
    ):
        self.p, self.c, self.arch, self.S = problem, config, arch, S
        self.buffers = buffers
        self.thread = thread
        self.lane = named(thread % WARP)
        self.warp_row = named(thread // WARP * config.warp_rows)
        self.first_column = named(self.lane % 4 * 2)
        self.fragments = [(m, h) for m in range(config.row_tiles) for h in range(2)]

    def emit(self, place: LongformerPlace) -> None:
        c = self.c
        self.place = place
        self.b, self.h, self.first, self.is_global = place[:4]
        self.records = c.query_elements + 2 * c.steps * c.slot_elements
        size = shared_bytes(c) // c.item_bytes
        self.shared = shared_memory(size, "float16")
        self.products = TensorCores(c, self.arch, "float16", self.shared, self.thread)
        self._allocate()
        scales = [self.buffers[f"scale_{kind}_gemm"][0] for kind in ("global", "qkv")]
        self.scale = named(tir.if_then_else(self.is_global, *scales))
        self._find_rows()
        live = T.cuda.syncthreads_or(self._any_live().astype("int32")) != 0
        self._find_keys()
        with T.If(live), T.Then():
            self._load_queries()
            self._fetch(tir.const(0, "int32"))
            self._put()
            T.evaluate(T.cuda.cta_sync())
            if c.queries_in_registers:
                self.products.load_queries()
            with T.serial(self.tiles) as tile:
                self.products.begin_tile(tile)
                with T.If(tile + 1 < self.tiles), T.Then():
                    self._fetch(tile + 1)
                self._attend(tile)
                T.evaluate(T.cuda.cta_sync())
                with T.If(tile + 1 < self.tiles), T.Then():
                    self._put()
                T.evaluate(T.cuda.cta_sync())
        self._store()

    def _allocate(self) -> None:
        c, rows = self.c, len(self.fragments)

        def local(count: int, dtype: str = "float32") -> tir.Buffer:
            return T.alloc_buffer((count,), dtype, scope="local")

        self.top, self.sum, self.correction = local(rows), local(rows), local(rows)
        self.best = local(rows + 1)
        self.position, self.kind = local(rows, "int32"), local(rows, "int32")
        self.pieces = -(-c.keys * c.steps * c.depth // (8 * c.threads))
        self.words = local(2 * 2 * self.pieces, "uint32")
        self.record = local(2, "uint32")
        self.packed, self.float_bits = local(4, "uint32"), local(2, "uint32")
        self.seen = local(4, "uint32")
        for k in range(rows):
            T.buffer_store(self.top, float32(LOWEST), [k])
            T.buffer_store(self.sum, float32(0), [k])
        self.products.clear_output()

    # -- rows and keys ------------------------------------------------------------------------

    def _find_rows(self) -> None:
        """position[k] of each of the thread's rows, kind[k]: -1 another block's or none, 0 padding,
        1 to be computed.
        """
        rank, mask = self.buffers["rank"], self.buffers["mask"]
        all_rows = tir.Select(self.is_global, rank[self.b, self.S].astype("int64"), self.S)
        self.rows = named(tir.min(all_rows - self.first, self.c.rows).astype("int32"))
        for k, (m, h) in enumerate(self.fragments):
            row = self.warp_row + self.lane // 4 + (16 * m + 8 * h)
            T.buffer_store(self.position, int32(0), [k])
            T.buffer_store(self.kind, int32(-1), [k])
            with T.If(row < self.rows), T.Then():
                T.buffer_store(self.position, self._position(self.first + row), [k])
                s = named(self.position[k].astype("int64"))
                flagged = rank[self.b, s + 1] != rank[self.b, s]
                with T.If(tir.any(self.is_global, tir.Not(flagged))), T.Then():
                    padding = mask[self.b, s].astype("float32") < float32(0)
                    T.buffer_store(self.kind, tir.Select(padding, int32(0), int32(1)), [k])

    def _position(self, number: Expr) -> Expr:
        """Of row ``number`` of the entry's rows or of its global tokens."""
        token = tir.min(number, self.S - 1)
        found = self.buffers["positions"][self.b, token]
        return tir.if_then_else(self.is_global, found, number.astype("int32"))

    def _any_live(self) -> Expr:
        live = self.kind[0] > 0
        for k in range(1, len(self.fragments)):
            live = tir.any(live, self.kind[k] > 0)
        return live

    def _find_keys(self) -> None:
        """Positions low .. low + near - 1, then `outside` global ones before and after them."""
        rank, W = self.buffers["rank"], self.p.window
        here = self.place
        low = tir.Select(self.is_global, here.first_key, tir.max(self.first - W, 0))
        last = tir.min(self.first + self.rows.astype("int64") + W, self.S)
        self.low = named(low)
        high = named(tir.Select(self.is_global, here.end_key, tir.max(last, self.low)))
        self.near = named((high - self.low).astype("int32"))
        self.before = named(rank[self.b, self.low])
        self.within = named(rank[self.b, high] - self.before)
        outside = tir.Select(self.is_global, int32(0), rank[self.b, self.S] - self.within)
        self.outside = named(outside)
        keys = self.c.keys
        self.near_tiles = named((self.near + (keys - 1)) // keys)
        self.tiles = named(self.near_tiles + (self.outside + (keys - 1)) // keys)

    def _key(self, tile: Expr, n: Expr) -> tuple[Expr, Expr]:
        """Position of key n of the tile, and whether there is one; beyond the last, that one."""
        gathered = tile >= self.near_tiles
        number = tir.Select(gathered, tile - self.near_tiles, tile) * self.c.keys + n
        count = tir.Select(gathered, self.outside, self.near)
        inside = number < count
        number = named(tir.min(number, count - 1))
        token = tir.Select(number < self.before, number, number + self.within)
        token = tir.max(tir.min(token.astype("int64"), self.S - 1), 0)
        found = self.buffers["positions"][self.b, token].astype("int64")
        return tir.if_then_else(gathered, found, self.low + number), inside

    # -- copies -------------------------------------------------------------------------------

    def _load_queries(self) -> None:
        """The tile's queries to shared memory; rows beyond the last repeat it."""
        c, D = self.c, self.p.head_size
        per_row = c.steps * c.depth // 8
        with T.serial(-(-c.rows * per_row // c.threads)) as turn:
            index = turn * c.threads + self.thread
            row, chunk = named(index // per_row), named(index % per_row)
            with T.If(row < c.rows), T.Then():
                number = named(self.first + tir.min(row, self.rows - 1).astype("int64"))
                with T.If(self.is_global):
                    with T.Then():
                        token = self.buffers["offsets"][self.b].astype("int64") + number
                        self._fetch_eight("gq", token, self.h * D, chunk, 0)
                    with T.Else():
                        token = self.b * self.S + number
                        self._fetch_eight("qkv", token, self.h * D, chunk, 0)
                self._put_eight(0, chunk_offset(row, chunk, per_row, 8))

    def _fetch(self, tile: Expr) -> None:
        """The thread's part of the keys and values of a tile, int8, to registers."""
        c, H, D = self.c, self.p.hidden, self.p.head_size
        per_row = c.steps * c.depth // 8
        for i in range(self.pieces):
            index = self.thread + i * c.threads
            n, chunk = named(index // per_row), named(index % per_row)
            s, _ = self._key(tile, tir.min(n, c.keys - 1))
            row = named(self.b * self.S + s)
            column = named(self.h * D)
            with T.If(self.is_global):
                with T.Then():
                    self._fetch_eight("gkv", row, column, chunk, 4 * i)
                    self._fetch_eight("gkv", row, column + H, chunk, 4 * i + 2)
                with T.Else():
                    self._fetch_eight("qkv", row, column + H, chunk, 4 * i)
                    self._fetch_eight("qkv", row, column + 2 * H, chunk, 4 * i + 2)
        self._fetch_record(tile)

    def _fetch_record(self, tile: Expr) -> None:
        """Mask and reach of the key with the thread's number."""
        rank, mask = self.buffers["rank"], self.buffers["mask"]
        with T.If(self.thread < self.c.keys), T.Then():
            s, inside = self._key(tile, self.thread)
            s = named(s)
            shift = mask[self.b, s].astype("float32") * float32(LOG2E)
            shift = tir.Select(inside, shift, float32(float("-inf")))
            flagged = tir.any(self.is_global, rank[self.b, s + 1] != rank[self.b, s])
            reach = tir.Select(flagged, int32(_EVERYWHERE), int32(self.p.window))
            T.buffer_store(self.record, tir.reinterpret("uint32", shift), [0])
            T.buffer_store(self.record, tir.reinterpret("uint32", reach), [1])

    def _fetch_eight(self, name: str, row: Expr, column: Expr, chunk: Expr, at: int) -> None:
        """words[at], words[at + 1] = channels 8 chunk .. 8 chunk + 7 of a head; zeros beyond D."""
        D, source = self.p.head_size, self.buffers[name]
        padded = self.c.steps * self.c.depth != D
        zero = tir.const(0, "int64")
        d = chunk * 8

        def address(d: Expr) -> Expr:
            return T.address_of(source[zero, row, column + d])

        registers = [self.words[at], self.words[at + 1]]
        for k in range(2):
            T.buffer_store(self.words, tir.const(0, "uint32"), [at + k])
        if D % 8 == 0:
            with guard(d < D, padded):
                T.evaluate(T.ptx["ld.global.v2.b32"](*registers, address(d)))
        elif D % 4 == 0:
            for k in range(2):
                with guard(d + 4 * k < D, padded):
                    T.evaluate(T.ptx["ld.global.b32"](registers[k], address(d + 4 * k)))
        else:
            for e in range(8):
                with T.If(d + e < D), T.Then():
                    byte = source[zero, row, column + d + e].astype("uint8").astype("uint32")
                    placed = byte << tir.const(8 * (e % 4), "uint32")
                    T.buffer_store(self.words, self.words[at + e // 4] | placed, [at + e // 4])

    def _put(self) -> None:
        """What ``_fetch`` got, to shared memory."""
        c = self.c
        per_row, slot = c.depth // 8, c.slot_elements
        chunks = c.steps * per_row
        for i in range(self.pieces):
            index = self.thread + i * c.threads
            n, chunk = named(index // chunks), named(index % chunks)
            with guard(n < c.keys, c.keys * chunks % c.threads != 0):
                offset = chunk_offset(n, chunk % per_row, per_row, 8)
                offset = named(c.query_elements + chunk // per_row * slot + offset)
                self._put_eight(4 * i, offset)
                self._put_eight(4 * i + 2, offset + c.steps * slot)
        with T.If(self.thread < c.keys), T.Then():
            address = T.address_of(self.shared[self._record(self.thread)])
            T.evaluate(T.ptx["st.shared.v2.b32"](address, self.record[0], self.record[1]))

    def _record(self, n: Expr) -> Expr:
        return self.records + n * (_RECORD_BYTES // self.c.item_bytes)

    def _put_eight(self, at: int, offset: Expr) -> None:
        """shared[offset ..] = float16(scale * int8) of the eight bytes from words[at] on.

        A byte with its sign turned, in the last place of 2^23, is a float32 without conversion.
        """
        exponent, bias = tir.const(0x4B000000, "uint32"), float32(2**23 + 128)
        for pair in range(4):
            word = self.words[at + pair // 2] ^ tir.const(0x80808080, "uint32")
            for e in range(2):
                select = tir.const(0x7440 + pair % 2 * 2 + e, "uint32")
                T.evaluate(T.ptx["prmt.b32"](self.float_bits[e], word, exponent, select))
            low, high = (
                (tir.reinterpret("float32", self.float_bits[e]) - bias) * self.scale
                for e in range(2)
            )
            cuda.pack_pair(self.packed, pair, low, high, "float16", self.arch.cp_async)
        registers = [self.packed[r] for r in range(4)]
        address = T.address_of(self.shared[offset])
        T.evaluate(T.ptx["st.shared.v4.b32"](address, *registers))

    # -- one tile of keys ---------------------------------------------------------------------

    def _attend(self, tile: Expr) -> None:
        """Scores, weights and output of one tile, in the warps that see any of its keys."""
        c, W = self.c, self.p.window
        anywhere = tir.any(self.is_global, tile >= self.near_tiles)
        start = named(self.low.astype("int32") + tile * c.keys)
        end = named(tir.min(start + c.keys, self.low.astype("int32") + self.near))
        row = named(self.first.astype("int32") + self.warp_row)
        last_row = row + (c.warp_rows - 1)
        rank = self.buffers["rank"]
        globals_inside = tir.if_then_else(
            anywhere,
            int32(0),
            rank[self.b, tir.max(end, start).astype("int64")] - rank[self.b, start.astype("int64")],
        )
        near = tir.all(start <= last_row + W, end > row - W)
        seen = named(tir.any(anywhere, near, globals_inside > 0))
        whole = named(tir.any(anywhere, tir.all(start >= last_row - W, end - 1 <= row + W)))
        with T.If(seen), T.Then():
            self.products.clear_scores()
            for step in range(c.steps):
                self.products.add_scores(c.query_elements + step * c.slot_elements, step)
            self._mask(start, whole)
            for k, (m, h) in enumerate(self.fragments):
                self._weigh(k, m, h)
            self.products.take_weights()
            for step in range(c.steps):
                slot = c.query_elements + (c.steps + step) * c.slot_elements
                self.products.add_values(slot, step)

    def _mask(self, start: Expr, whole: Expr) -> None:
        """scores in units of ln 2, the mask added; minus infinity out of reach."""
        scores = self.products.scores
        scale = float32(LOG2E / math.sqrt(self.p.head_size))
        for n, e in self._each_key():
            shift = tir.reinterpret("float32", self.seen[2 * e])
            for m, h in self.fragments:
                at = self.products.score_slot(m, n, h, e)
                T.buffer_store(scores, scores[at] * scale + shift, [at])
        with T.If(tir.Not(whole)), T.Then():
            for n, e in self._each_key():
                key = start + self.first_column + (8 * n + e)
                reach = tir.reinterpret("int32", self.seen[2 * e + 1])
                for k, (m, h) in enumerate(self.fragments):
                    at = self.products.score_slot(m, n, h, e)
                    distance = tir.max(key - self.position[k], self.position[k] - key)
                    cut = tir.Select(distance <= reach, scores[at], float32(float("-inf")))
                    T.buffer_store(scores, cut, [at])

    def _each_key(self) -> Iterator[tuple[int, int]]:
        """(n, e) of the thread's keys 8 n + e, from lane 0 on; ``seen`` holds the records of the
        pair.
        """
        for n in range(self.c.keys // 8):
            first = self._record(self.first_column + 8 * n)
            registers = [self.seen[r] for r in range(4)]
            T.evaluate(T.ptx["ld.shared.v4.b32"](*registers, T.address_of(self.shared[first])))
            yield n, 0
            yield n, 1

    def _weigh(self, k: int, m: int, h: int) -> None:
        """Scores of a row become weights; its maximum, sum and output follow."""
        c, scores, spare = self.c, self.products.scores, len(self.fragments)
        slots = [self.products.score_slot(m, n, h, e) for n in range(c.keys // 8) for e in range(2)]
        T.buffer_store(self.best, self.top[k], [k])
        for at in slots:
            T.buffer_store(self.best, tir.max(self.best[k], scores[at]), [k])
        for lanes in (1, 2):
            T.buffer_store(self.best, cuda.shuffle_xor(self.best[k], lanes), [spare])
            T.buffer_store(self.best, tir.max(self.best[k], self.best[spare]), [k])
        cuda.exp2(self.correction[k], self.top[k] - self.best[k])
        T.buffer_store(self.top, self.best[k], [k])
        T.buffer_store(self.sum, self.sum[k] * self.correction[k], [k])
        for at in slots:
            cuda.exp2(scores[at], scores[at] - self.top[k])
            T.buffer_store(self.sum, self.sum[k] + scores[at], [k])
        output = self.products.output
        for n in range(c.width // 8):
            for e in range(2):
                at = self.products.output_slot(m, n, h, e)
                T.buffer_store(output, output[at] * self.correction[k], [at])

    # -- results ------------------------------------------------------------------------------

    def _store(self) -> None:
        """Rows of this block: zeros where the row is padding; parts of those of global tokens."""
        spare = len(self.fragments)
        for k in range(len(self.fragments)):
            for lanes in (1, 2):
                T.buffer_store(self.best, cuda.shuffle_xor(self.sum[k], lanes), [spare])
                T.buffer_store(self.sum, self.sum[k] + self.best[spare], [k])
        inverse_scale = named(float32(1) / self.buffers["scale_output"][0])
        with T.If(self.is_global):
            with T.Then():
                for k, (m, h) in enumerate(self.fragments):
                    with T.If(self.kind[k] > 0), T.Then():
                        self._store_part(k, m, h)
            with T.Else():
                for k, (m, h) in enumerate(self.fragments):
                    if self.p.head_size % (8 * _EXCHANGED) == 0:
                        self._store_wide_row(k, m, h, inverse_scale)
                        continue
                    with T.If(self.kind[k] >= 0), T.Then():
                        self._store_row(k, m, h, inverse_scale)

    def _each_pair(self, m: int, h: int) -> Iterator[tuple[Expr, int]]:
        """(channel, place in ``output``) of the thread's pairs, whose first is inside D."""
        D = self.p.head_size
        for n in range(self.c.width // 8):
            d = self.first_column + 8 * n
            with guard(d < D, 8 * n + 8 > D):
                yield d, self.products.output_slot(m, n, h, 0)

    def _store_part(self, k: int, m: int, h: int) -> None:
        """What the second kernel adds up."""
        D, out = self.p.head_size, self.buffers["part_out"]
        row = (self.warp_row + self.lane // 4 + (16 * m + 8 * h)).astype("int64")
        record = [self.b, named(self.place.first_record + row), self.h]
        for d, at in self._each_pair(m, h):
            for e in range(2):
                with guard(d + e < D, D % 2 != 0):
                    T.buffer_store(out, self.products.output[at + e], [*record, d + e])
        with T.If(self.first_column == 0), T.Then():
            T.buffer_store(self.buffers["part_max"], self.top[k], record)
            T.buffer_store(self.buffers["part_sum"], self.sum[k], record)

    def _store_row(self, k: int, m: int, h: int, inverse_scale: Expr) -> None:
        """The thread's channels of a row, two or one at a time."""
        D = self.p.head_size
        s = named(self.position[k].astype("int64"))
        scales = named(float32(1) / self.sum[k]), inverse_scale
        for d, at in self._each_pair(m, h):
            pair = self._quantised_pair(k, at, scales)
            if D % 2 == 0:
                address = self._address(s, d)
                T.evaluate(T.ptx["st.global.b16"](address, _joined(pair, "uint16")))
                continue
            for e in range(2):
                with guard(d + e < D, True):
                    index = self._index(s, self.h * D + d + e)
                    T.buffer_store(self.buffers["output"], pair[e], index)

    def _store_wide_row(self, k: int, m: int, h: int, inverse_scale: Expr) -> None:
        """The same of heads of whole 32 channels, 8 at a time: each lane of a quad takes the row of
        one of four accumulators. All lanes of the warp are here.
        """
        s = named(self.position[k].astype("int64"))
        scales = named(float32(1) / self.sum[k]), inverse_scale
        odd, upper = (named(self.lane // i % 2 > 0) for i in (1, 2))
        for first in range(0, self.c.width // 8, _EXCHANGED):
            pairs = [
                _joined(self._quantised_pair(k, self.products.output_slot(m, n, h, 0), scales))
                for n in range(first, first + _EXCHANGED)
            ]
            words = []
            for n in (0, 2):
                low, high = _exchanged(pairs[n], pairs[n + 1], odd, 1)
                words.append(named(low | high << tir.const(16, "uint32")))
            words = _exchanged(*words, upper, 2)
            address = self._address(s, named((first + self.lane % 4) * 8))
            with T.If(self.kind[k] >= 0), T.Then():
                T.evaluate(T.ptx["st.global.v2.b32"](address, *words))

    def _quantised_pair(self, k: int, at: int, scales: tuple[Expr, Expr]) -> list[Expr]:
        """The channels of ``output`` at ``at`` and behind it, int8; zeros of padding."""
        inverse, inverse_scale = scales
        pair = []
        for e in range(2):
            value = quantised(self.products.output[at + e] * inverse, inverse_scale)
            pair.append(tir.Select(self.kind[k] > 0, value, tir.const(0, "int8")))
        return pair

    def _address(self, s: Expr, d: Expr) -> Expr:
        index = self._index(s, named(self.h * self.p.head_size + d))
        return T.address_of(self.buffers["output"][tuple(index)])

    def _index(self, s: Expr, column: Expr) -> list[Expr]:
        if self.p.col32:
            return [self.b, column // 32, s, column % 32]
        return [self.b, s, column]


def _joined(pair: list[Expr], dtype: str = "uint32") -> Expr:
    """Two bytes as one word."""
    low, high = (named(value.astype("uint8").astype(dtype)) for value in pair)
    return named(low | (high << tir.const(8, dtype)))


def _exchanged(first: Expr, second: Expr, takes_second: Expr, distance: int) -> tuple[Expr, Expr]:
    """Lanes whose numbers differ by ``distance``: the lower one gets ``first`` of both, the upper
    one, which ``takes_second``, ``second`` of both; in the order of the lanes.
    """
    kept = named(tir.Select(takes_second, second, first))
    got = named(cuda.shuffle_xor(tir.Select(takes_second, first, second), distance))
    return named(tir.Select(takes_second, got, kept)), named(tir.Select(takes_second, kept, got))
