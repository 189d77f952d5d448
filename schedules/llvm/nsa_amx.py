"""Tasks of the NSA kernel on matrix tiles of bfloat16 (AMX).

Both products have query rows as rows and take them as they lie: scores are queries times keys,
the output is weights times values. Keys lie across the lanes, so the G heads of a query row share
its mask, their probabilities are added lane by lane, and the windows of selection go over one row
instead of G. Keys and values are packed once per call, 32 keys at a time.

        mask of the query rows copied       which groups of 32 keys does a row see?
        Q copied, if not taken in place     [M][E], E = D rounded up to 32
        for key group that a row sees, 32 rows:  S = Q . K, minus infinity where masked
        for row:                            M, S = exp(S - M), L, weights as bfloat16
        for 32 rows, 32 channels:           O = S . V over all groups, / L, stored
        for query row:                      sum over heads, windows, the k best

Buffers: K uint32 [h2][slot][half][E / 2][16], pairs of channels of 16 keys; V uint32
[h2][slot][Dv / 16][16][16], key i and key i + 16 as a pair; so a register of weights of 16 keys
and one of the next 16 give a row of pairs without a permutation.

Products are of AMX: subnormal factors and results count as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script import tirx as TS
from tvm.target import Target, codegen
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_amx, x86_bf16
from .attention_amx import (
    BLOCK,
    LEFT,
    RIGHT,
    SIDE,
    load_tile,
    multiply_tiles,
    store_tile,
)
from .attention_task import opaque
from .nsa_amx_mask import find_live, hide, stage_mask, uncover
from .nsa_amx_weights import find_tops, score_blocks, weigh
from .nsa_lengths import slots
from .nsa_records import record_writing
from .nsa_select import WIDTH, selection
from .nsa_stream import OutputStream
from .nsa_tile import FLT_MAX
from .transpose import transpose_square
from .vector import (
    LOG2E,
    from_float32,
    load_lanes,
    ramp,
    vector_unit,
)

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_WORD, _HALF = 4, 2
"""Bytes."""
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes."""

    height: int = 64
    """M, rows of the products per task, unless G is larger."""
    heads: int = 16
    """Heads whose probabilities are added in registers."""

    def __post_init__(self) -> None:
        if self.height % BLOCK:
            raise ValueError(
                f"TileConfig: height: found {self.height}, allowed multiples of {BLOCK}"
            )
        if self.heads.bit_count() != 1:
            raise ValueError(f"TileConfig: heads: found {self.heads}, allowed powers of two")


def available(problem: Problem, target: Target) -> bool:
    """bfloat16 on a target with matrix tiles beside vectors as wide as their rows. Scores stay the
    bare products: their order must be that of the scaled ones, so a scale of 0 is left out.
    """
    factor = abs(problem.scale) * LOG2E
    return (
        problem.dtype == "bfloat16"
        and vector_unit(target).lanes == x86_amx.LANES
        and x86_amx.available_bf16(target)
        and _SMALLEST <= factor <= FLT_MAX
    )


class TileTask:
    """What ``nsa`` asks of a kind of task."""

    def __init__(self, problem: Problem, target: Target):
        self.problem, self.target, self.config = problem, target, TileConfig()
        p = problem
        self.unit = vector_unit(target)
        self.height = max(self.config.height, p.group)
        self.query_rows = self.height // p.group
        self.depth = -(-p.head_size // BLOCK) * BLOCK
        self.key_slot = BLOCK
        self.factor = abs(p.scale) * LOG2E
        self.wants_out = "attention_out" in p.outputs
        self.strips = -(-p.value_size // BLOCK) if self.wants_out else 0
        self.front = max(0, p.taps - 1 - p.newest_key(0))
        """Zeros before the first key in a row's sums over heads."""
        self.rounds = codegen.target_has_features("avx512bf16", target)
        self.stream = OutputStream(p, target)

    @property
    def sources(self) -> list[str]:
        return [x86_amx.SOURCE] + [x86_bf16.SOURCE] * self.rounds + self.stream.sources

    def begin(self) -> None:
        T.evaluate(x86_amx.configure(tir.const(x86_amx.ROWS, "int64")))

    def end(self) -> None:
        T.evaluate(x86_amx.release())
        self.stream.end()

    def attend(self):
        return _attending(self)

    # -- keys and values ----------------------------------------------------------------------

    def allocate_packed(self, key_tokens: Expr, sequences: Expr) -> tuple[Buffer, Buffer]:
        N2, count = self.problem.key_heads, slots(key_tokens, sequences, BLOCK)
        K = T.alloc_buffer((N2, count, 2, self.depth // 2, SIDE), "uint32")
        V = T.alloc_buffer((N2, count, 2 * self.strips, SIDE, SIDE), "uint32")
        return K, V

    def pack(self):
        """``pack(K, V, Keys, Values, h2, slot, row, count)``: ``count`` packed rows at ``row``;
        keys beyond them repeat the last one, values are 0.
        """

        def pack(K, V, Keys, Values, h2, slot, row, count) -> None:
            h2, slot, row, count = opaque("int64", [h2, slot, row, count])
            rows = T.alloc_buffer((BLOCK, self.depth), "uint16")
            with T.serial(BLOCK) as k:
                source = T.Bind(row + tir.min(k.astype("int64"), count - 1))
                self._copy_row(rows, k, Keys, (source, h2), self.problem.head_size)
            with T.serial(2) as half, T.serial(self.depth // BLOCK) as strip:
                block = T.alloc_buffer((SIDE, SIDE), "uint32", scope="local")
                for k in range(SIDE):
                    pairs = load_lanes(rows, [half * SIDE + k, strip * BLOCK], BLOCK)
                    pairs = tir.reinterpret(f"uint32x{SIDE}", pairs)
                    T.buffer_store(block, pairs, [k, ramp(0, SIDE)])
                transpose_square(block, SIDE)
                for c in range(SIDE):
                    index = [h2, slot, half, strip * SIDE + c, ramp(0, SIDE)]
                    T.buffer_store(K, load_lanes(block, [c, 0], SIDE), index)
            if self.wants_out:
                self._pack_values(V, Values, h2, slot, row, count)

        return pack

    def _pack_values(self, V, Values, h2, slot, row, count) -> None:
        """V[h2][slot][column // 16][i][column % 16] = values i and i + 16."""
        DV = self.problem.value_size

        def bits(i: Expr, column: Expr) -> Expr:
            source = row + tir.min(i.astype("int64"), count - 1)
            value = Values[source, h2, tir.min(column, DV - 1)]
            word = tir.reinterpret("uint16", value).astype("uint32")
            inside = tir.all(i < count, column < DV)
            return tir.Select(inside, word, tir.const(0, "uint32"))

        with T.serial(SIDE) as i, T.serial(2 * self.strips) as panel, T.serial(SIDE) as c:
            low, high = (bits(i + more, panel * SIDE + c) for more in (0, SIDE))
            word = low | high << tir.const(16, "uint32")
            T.buffer_store(V, word, [h2, slot, panel, i, c])

    def _copy_row(self, rows: Buffer, at: Expr, source: Buffer, index, size: int) -> None:
        """rows[at] = a row of bfloat16 as bits, continued by 0."""
        whole = size // BLOCK * BLOCK

        with T.serial(size // BLOCK) as strip:
            elements = load_lanes(source, [*index, strip * BLOCK], BLOCK)
            bits = tir.reinterpret(f"uint16x{BLOCK}", elements)
            T.buffer_store(rows, bits, [at, ramp(strip * BLOCK, BLOCK)])
        with T.serial(size - whole) as c:
            bits = tir.reinterpret("uint16", source[(*index, whole + c)])
            T.buffer_store(rows, bits, [at, whole + c])
        with T.serial(self.depth - size) as c:
            T.buffer_store(rows, tir.const(0, "uint16"), [at, size + c])

    # -- buffers of a thread ------------------------------------------------------------------

    def allocate(self, key_tokens: Expr) -> SimpleNamespace:
        p, M = self.problem, self.height
        groups = T.Bind(TS.ceildiv(TS.min(key_tokens, p.cmp_skv_limit), BLOCK))
        keys = groups * BLOCK
        # Rows of S one cache line more than a power of two apart do not compete for its sets.
        return SimpleNamespace(
            Q=T.alloc_buffer((M, self.depth), "uint16"),
            S=T.alloc_buffer((M, keys + SIDE), "float32"),
            P=T.alloc_buffer((M, groups * SIDE + SIDE), "uint32"),
            hidden=T.alloc_buffer((self.query_rows, keys + BLOCK), "uint8"),
            live=T.alloc_buffer((groups,), "int32"),
            partial=T.alloc_buffer((groups,), "int32"),
            sums=T.alloc_buffer((self.front + keys + p.taps + 2 * SIDE,), "float32"),
            windows=T.alloc_buffer((keys + p.blocks_stride + SIDE,), "float32"),
            score=T.alloc_buffer((1, keys + WIDTH), "float32"),
            O=T.alloc_buffer((BLOCK, BLOCK), "float32", scope="local"),
            top=T.alloc_buffer((M,), "float32", scope="local"),
            base=T.alloc_buffer((M,), "float32", scope="local"),
            total=T.alloc_buffer((M,), "float32", scope="local"),
            inverse=T.alloc_buffer((M,), "float32", scope="local"),
            count=T.alloc_buffer((2,), "int32", scope="local"),
        )

    @property
    def queries_in_place(self) -> bool:
        """Tiles of queries are heads of a token, loaded where they lie."""
        p = self.problem
        return p.group % SIDE == 0 and p.head_size % BLOCK == 0 and p.scale > 0

    # -- statements of a task -----------------------------------------------------------------

    def load_queries(self, w, X, token, rows, h2) -> None:
        """Q [m], negated where the scale is; rows beyond ``rows`` repeat the last one."""
        if self.queries_in_place:
            return
        G = self.problem.group
        with T.serial(self.height) as m:
            source = (token + tir.min((m // G).astype("int64"), rows - 1), h2 * G + m % G)
            self._copy_row(w.Q, m, X, source, self.problem.head_size)
            if self.problem.scale < 0:
                sign = tir.Broadcast(tir.const(0x8000, "uint16"), BLOCK)
                with T.serial(self.depth // BLOCK) as strip:
                    index = [m, ramp(strip * BLOCK, BLOCK)]
                    T.buffer_store(w.Q, tir.BufferLoad(w.Q, index) ^ sign, index)

    def _load_query_tile(self, tile, w, X, token, rows, h2, m, strip) -> None:
        """16 rows of the products from m on, 32 channels."""
        G = self.problem.group
        if self.queries_in_place:
            source = token + tir.min((m // G).astype("int64"), rows - 1)
            first = X[source, h2 * G + m % G, strip * BLOCK]
            load_tile(tile, first, self.problem.head_size * _HALF)
        else:
            load_tile(tile, w.Q[m, strip * BLOCK], self.depth * _HALF)

    def score_groups(self, w, X, K, token, h2, slot, rows, keys, blocks) -> None:
        """S = Q . K of the live groups."""
        with T.serial(w.count[0]) as i:
            (group,) = opaque("int64", [w.live[i]])
            with T.serial(blocks) as block:
                for tile in range(4):
                    T.evaluate(x86_amx.zero(tile))
                with T.serial(self.depth // BLOCK) as strip:
                    for side, tile in enumerate(LEFT):
                        m = block * BLOCK + side * SIDE
                        self._load_query_tile(tile, w, X, token, rows, h2, m, strip)
                    for side, tile in enumerate(RIGHT):
                        key = K[h2, slot + group, side, strip * SIDE, 0]
                        load_tile(tile, key, x86_amx.ROW_BYTES)
                    multiply_tiles()
                pitch = w.S.shape[1] * _WORD
                for tile in range(4):
                    row = block * BLOCK + SIDE * (tile // 2)
                    column = group * BLOCK + SIDE * (tile % 2)
                    store_tile(tile, w.S[row, column], pitch)
                with T.If(w.partial[i] != 0), T.Then():
                    hide(self, w, block, group, rows, keys)

    def multiply_values(self, w, V, Out, h2, slot, token, rows, blocks) -> None:
        """Out = P . V / L, 32 rows and 32 channels at a time."""
        pitch = w.P.shape[1] * _WORD
        with T.serial(blocks) as block, T.serial(self.strips) as strip:
            for tile in range(4):
                T.evaluate(x86_amx.zero(tile))
            with T.serial(w.count[0]) as i:
                (group,) = opaque("int64", [w.live[i]])
                for side, tile in enumerate(LEFT):
                    row = block * BLOCK + side * SIDE
                    load_tile(tile, w.P[row, group * SIDE], pitch)
                for side, tile in enumerate(RIGHT):
                    values = V[h2, slot + group, strip * 2 + side, 0, 0]
                    load_tile(tile, values, x86_amx.ROW_BYTES)
                multiply_tiles()
            for tile in range(4):
                place = w.O[SIDE * (tile // 2), SIDE * (tile % 2)]
                store_tile(tile, place, BLOCK * _WORD)
            self._store_output(w, Out, block, strip, h2, token, rows)

    def _store_output(self, w, Out, block, strip, h2, token, rows) -> None:
        p = self.problem
        G, DV = p.group, p.value_size
        count = tir.min(rows * G - block * BLOCK, BLOCK)
        with T.serial(count) as r:
            m = block * BLOCK + r
            index = [token + m // G, h2 * G + m % G]
            inverse = w.inverse[m]
            for side in range(2):
                first = strip * BLOCK + side * SIDE
                x = load_lanes(w.O, [r, side * SIDE], SIDE) * tir.Broadcast(inverse, SIDE)
                whole = self._to_bfloat16(T.Bind(x))
                if DV % BLOCK == 0:
                    self._store_whole(Out, index, first, whole)
                    continue
                with T.If(first + SIDE <= DV):
                    with T.Then():
                        T.buffer_store(Out, whole, [*index, ramp(first, SIDE)])
                    with T.Else(), T.serial(tir.max(DV - first, 0)) as c:
                        x = T.Bind(w.O[r, side * SIDE + c] * inverse)
                        T.buffer_store(
                            Out, from_float32(x, p.dtype, self.unit), [*index, first + c]
                        )

    def _store_whole(self, Out, index, first: Expr, x: Expr) -> None:
        with T.If(self.stream.wanted(Out)):
            with T.Then():
                T.evaluate(self.stream.store(Out, [*index, first], x))
            with T.Else():
                T.buffer_store(Out, x, [*index, ramp(first, SIDE)])

    def _to_bfloat16(self, x: Expr) -> Expr:
        if self.rounds:
            return tir.reinterpret(f"bfloat16x{SIDE}", x86_bf16.round_bits(x))
        return from_float32(x, "bfloat16", self.unit)


def _attending(task: TileTask):
    """An inline ``attend`` with the arguments of that in ``nsa_vector``."""
    p = task.problem
    G = p.group
    has_mask = p.atten_mask is not None
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs
    wants_weights = wants_sum or wants_out or wants_blocks
    select_blocks, write_softmax = selection(p, SIDE), record_writing(p)

    @TS.inline
    def attend(
        w,
        K,
        V,
        X,
        Mask,
        Forced,
        Max,
        Sum,
        Out,
        Indices,
        h2,
        slot,
        q0,
        length,
        t0,
        rows,
        keys,
        ahead,
    ):
        blocks: TS.int64 = TS.ceildiv(rows * G, BLOCK)
        if has_mask:
            stage_mask(task, w, Mask, t0, rows, keys)
        find_live(task, w, rows, keys)
        task.load_queries(w, X, q0 + t0, rows, h2)
        task.score_groups(w, X, K, q0 + t0, h2, slot, rows, keys, blocks)
        find_tops(task, w, blocks)
        if has_mask and not p.zero_masked_rows:
            uncover(task, w, blocks, keys)
        if wants_weights:
            weigh(task, w, blocks, X, Out, q0 + t0, h2, ahead)
        if wants_out:
            task.multiply_values(w, V, Out, h2, slot, q0 + t0, rows, blocks)
        if wants_max or wants_sum:
            for m in range(rows * G):
                write_softmax(
                    Max, Sum, w.top, w.total, m, q0, length, t0 + m // G, h2 * G + m % G
                )  # fmt: skip
        if wants_blocks:
            for row in range(rows):
                score_blocks(task, w, Forced, row, t0 + row, keys)
                select_blocks(w.score, 0, Indices, q0 + t0 + row, h2, p.blocks(keys))

    return attend
