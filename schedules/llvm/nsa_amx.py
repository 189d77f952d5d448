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
    round_pairs_up,
    store_tile,
)
from .attention_task import opaque
from .nsa_lengths import slots
from .nsa_records import record_writing
from .nsa_select import FORCED, TAKEN, WIDTH, selection
from .nsa_stream import OutputStream
from .nsa_tile import FLT_MAX
from .transpose import transpose_square
from .vector import (
    LOG2E,
    exp2_weight,
    float32,
    from_float32,
    load_lanes,
    max_lanes,
    ramp,
    sum_lanes,
    vector_unit,
)

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_WORD, _HALF = 4, 2
"""Bytes."""
_FOR_READING, _FOR_WRITING = (0, 2, 1), (1, 2, 1)
"""Operands of ``llvm.prefetch``: read or write, into the second-level cache, data."""
_SMALLEST = 2.0**-126
_DEGREE = 4
"""Of the polynomial behind the weights: enough for results of half width."""


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

    def stage_mask(self, w, Mask, t0, rows, keys) -> None:
        """hidden [row][key], 1 beyond the last key up to a whole group."""
        with T.serial(rows) as row:
            whole = keys // BLOCK * BLOCK
            with T.serial(keys // BLOCK) as part:
                bits = _bytes(Mask, t0 + row, part * BLOCK)
                T.buffer_store(w.hidden, bits, [row, ramp(part * BLOCK, BLOCK)])
            T.buffer_store(
                w.hidden, tir.Broadcast(tir.const(1, "uint8"), BLOCK), [row, ramp(whole, BLOCK)]
            )
            with T.If(keys >= BLOCK):
                with T.Then():
                    # The last whole group of the row, over what is there already.
                    first = keys - BLOCK
                    bits = _bytes(Mask, t0 + row, first)
                    T.buffer_store(w.hidden, bits, [row, ramp(first, BLOCK)])
                with T.Else(), T.serial(keys) as key:
                    bit = Mask[t0 + row, key].astype("uint8")
                    T.buffer_store(w.hidden, bit, [row, key])

    def find_live(self, w, rows, keys) -> None:
        """live [i] = a group of keys that a row sees, partial [i] = not all rows see all; count [0]
        of them, count [1] = 1 + the last.
        """
        for slot in range(2):
            T.buffer_store(w.count, tir.const(0, "int32"), [slot])
        groups = (keys + (BLOCK - 1)) // BLOCK
        all_, any_ = (T.alloc_buffer((BLOCK,), "uint8", scope="local") for _ in range(2))
        lanes = ramp(0, BLOCK)

        def const(value: int) -> Expr:
            return tir.Broadcast(tir.const(value, "uint8"), BLOCK)

        def words(x: Buffer) -> list[Expr]:
            vector = tir.reinterpret("uint64x4", load_lanes(x, [0], BLOCK))
            vector = T.Bind(vector)
            return [tir.Shuffle([vector], [i]) for i in range(4)]

        with T.serial(groups) as group:
            first = group * BLOCK
            if self.problem.atten_mask is None:
                dead = None
                partial = (first + BLOCK > keys).astype("int32")
            else:
                T.buffer_store(all_, const(255), [lanes])
                T.buffer_store(any_, const(0), [lanes])
                with T.serial(rows) as row:
                    x = T.Bind(load_lanes(w.hidden, [row, first], BLOCK))
                    masked = tir.Select(x != const(0), const(255), const(0))
                    T.buffer_store(all_, load_lanes(all_, [0], BLOCK) & masked, [lanes])
                    T.buffer_store(any_, load_lanes(any_, [0], BLOCK) | x, [lanes])
                a, b, c, d = words(all_)
                dead = (a & b & c & d) == tir.const(2**64 - 1, "uint64")
                a, b, c, d = words(any_)
                partial = ((a | b | c | d) != tir.const(0, "uint64")).astype("int32")
            T.buffer_store(w.live, group.astype("int32"), [w.count[0]])
            T.buffer_store(w.partial, partial, [w.count[0]])
            if dead is None:
                T.buffer_store(w.count, w.count[0] + 1, [0])
                T.buffer_store(w.count, group.astype("int32") + 1, [1])
            else:
                T.buffer_store(w.count, w.count[0] + tir.Select(dead, 0, 1), [0])
                last = tir.Select(dead, w.count[1], group.astype("int32") + 1)
                T.buffer_store(w.count, last, [1])

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
                    self._hide(w, block, group, rows, keys)

    def _hide(self, w, block: Expr, group: Expr, rows: Expr, keys: Expr) -> None:
        """Minus infinity for the masked scores of 32 rows and 32 keys; a masked key may score
        NaN.
        """
        none = tir.Broadcast(float32(float("-inf")), SIDE)
        with T.serial(BLOCK) as r:
            m = block * BLOCK + r
            t = tir.min((m // self.problem.group).astype("int64"), rows - 1)
            for side in range(2):
                first = group * BLOCK + side * SIDE
                if self.problem.atten_mask is None:
                    lane = tir.Ramp(first.astype("int32"), tir.const(1, "int32"), SIDE)
                    gone = lane >= tir.Broadcast(keys.astype("int32"), SIDE)
                else:
                    bits = load_lanes(w.hidden, [t, first], SIDE)
                    gone = bits != tir.Broadcast(tir.const(0, "uint8"), SIDE)
                index = [m, ramp(first, SIDE)]
                T.buffer_store(w.S, tir.Select(gone, none, tir.BufferLoad(w.S, index)), index)

    def find_tops(self, w, blocks) -> None:
        """top [m] in units of ln 2, -FLT_MAX without a visible key."""
        low = float32(-FLT_MAX)
        best = T.alloc_buffer((2, SIDE), "float32", scope="local")
        with T.serial(blocks * BLOCK) as m:
            for side in range(2):
                none = tir.Broadcast(float32(float("-inf")), SIDE)
                T.buffer_store(best, none, [side, ramp(0, SIDE)])
            with T.serial(w.count[0]) as i:
                for side in range(2):
                    x = load_lanes(w.S, [m, w.live[i] * BLOCK + side * SIDE], SIDE)
                    top = tir.max(load_lanes(best, [side, 0], SIDE), x)
                    T.buffer_store(best, top, [side, ramp(0, SIDE)])
            both = T.Bind(tir.max(*(load_lanes(best, [side, 0], SIDE) for side in range(2))))
            top = T.Bind(max_lanes(both))
            none = top == float32(float("-inf"))
            T.buffer_store(w.top, tir.Select(none, low, top * float32(self.factor)), [m])

    def uncover(self, w, blocks, keys) -> None:
        """A row without a visible key takes the mean of all: its scores are alike, and no key is
        left out.
        """
        low = float32(-FLT_MAX)
        M = blocks * BLOCK
        some = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(some, tir.const(0, "int32"), [0])
        with T.serial(M) as m:  # a minimum would forget what it met before a NaN
            T.buffer_store(some, some[0] | (w.top[m] == low).astype("int32"), [0])
        with T.If(some[0] != 0), T.Then():
            groups = (keys + (BLOCK - 1)) // BLOCK
            none = float32(float("-inf"))
            covered = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(covered, tir.const(0, "int32"), [0])
            with T.serial(groups) as group:
                at = tir.min(covered[0], w.count[0] - 1)
                known = tir.all(covered[0] < w.count[0], w.live[tir.max(at, 0)] == group)
                with T.serial(M) as m, T.serial(BLOCK) as k:
                    key = group * BLOCK + k
                    alike = tir.Select(key < keys, float32(0), none)
                    left = tir.if_then_else(known, w.S[m, key], none)
                    T.buffer_store(w.S, tir.Select(w.top[m] == low, alike, left), [m, key])
                T.buffer_store(covered, covered[0] + known.astype("int32"), [0])
            with T.serial(groups) as group:
                T.buffer_store(w.live, group.astype("int32"), [group])
            for slot in range(2):
                T.buffer_store(w.count, groups.astype("int32"), [slot])

    def weigh(self, w, blocks, X, Out, token, h2, ahead) -> None:
        """S = exp(S - M), P the same as pairs of bfloat16, total and inverse.

        Asks for the row of the output, and for that of the queries of the next task.
        """
        G = self.problem.group
        low, zero = float32(-FLT_MAX), float32(0)
        sums = T.alloc_buffer((2, SIDE), "float32", scope="local")
        with T.serial(blocks * BLOCK) as m:
            index = [token + m // G, h2 * G + m % G]
            if self.wants_out:
                with T.If(tir.Not(self.stream.wanted(Out))), T.Then():
                    _prefetch(Out, index, self.problem.value_size, _FOR_WRITING)
            _prefetch(X, [index[0] + ahead, index[1]], self.problem.head_size, _FOR_READING)
            base = T.Bind(tir.Select(w.top[m] == low, zero, w.top[m]))
            for side in range(2):
                T.buffer_store(sums, tir.Broadcast(zero, SIDE), [side, ramp(0, SIDE)])
            with T.serial(w.count[0]) as i:
                (group,) = opaque("int32", [w.live[i]])
                halves = []
                for side in range(2):
                    index = [m, ramp(group * BLOCK + side * SIDE, SIDE)]
                    x = tir.BufferLoad(w.S, index) * tir.Broadcast(float32(self.factor), SIDE)
                    x = T.Bind(x - tir.Broadcast(base, SIDE))
                    weight = T.Bind(exp2_weight(x, self.unit, _DEGREE))
                    T.buffer_store(w.S, weight, index)
                    total = load_lanes(sums, [side, 0], SIDE) + weight
                    T.buffer_store(sums, total, [side, ramp(0, SIDE)])
                    halves.append(weight)
                if self.wants_out:
                    index = [m, ramp(group * SIDE, SIDE)]
                    T.buffer_store(w.P, round_pairs_up(*halves), index)
            both = T.Bind(load_lanes(sums, [0, 0], SIDE) + load_lanes(sums, [1, 0], SIDE))
            total = T.Bind(sum_lanes(both))
            T.buffer_store(w.total, total, [m])
            inverse = tir.Select(total > zero, float32(1) / total, zero)
            T.buffer_store(w.inverse, inverse, [m])

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

    # -- selection ----------------------------------------------------------------------------

    def score_blocks(self, w, Forced, row, t, keys) -> None:
        """score [0] of query row ``row`` of the task, ``t`` of its sequence."""
        p, L = self.problem, SIDE
        count = w.count[1].astype("int64")
        zero = tir.Broadcast(float32(0), L)
        front = self.front
        with T.serial(front) as i:
            T.buffer_store(w.sums, float32(0), [i])
        # Behind the last group that a row sees, as far as the windows reach.
        with T.serial(count * 2 + -(-p.taps // L) + 1) as part:
            T.buffer_store(w.sums, zero, [ramp(front + part * L, L)])
        self._add_heads(w, row)
        seen = tir.min(count * BLOCK, keys)
        blocks, some = p.blocks(keys), tir.min(p.blocks(keys), p.blocks_from(seen))
        blocks, some = opaque("int64", [blocks, tir.max(some, 0)])
        stride, origin = p.blocks_stride, p.newest_key(0)
        acc = T.alloc_buffer((L,), "float32", scope="local")
        # windows [i] ends at key i + origin.
        with T.serial(((some - 1) * stride + L) // L) as part:
            T.buffer_store(acc, zero, [ramp(0, L)])
            with T.serial(p.taps) as c:
                at = front + part * L + origin - c
                weight = p.weight(c).astype("float32")
                x = load_lanes(w.sums, [at], L) * tir.Broadcast(weight, L)
                T.buffer_store(acc, load_lanes(acc, [0], L) + x, [ramp(0, L)])
            T.buffer_store(w.windows, load_lanes(acc, [0], L), [ramp(part * L, L)])
        with T.serial(some) as j:
            T.buffer_store(w.score, w.windows[j * stride], [0, j])
        with T.serial(blocks - some) as j:
            T.buffer_store(w.score, float32(0), [0, some + j])
        if p.topk_mask is not None:
            with T.serial(blocks) as j:
                forced = Forced[t, j].astype("int32") != 0
                score = tir.Select(forced, float32(FORCED), w.score[0, j])
                T.buffer_store(w.score, score, [0, j])
        with T.serial((blocks + (WIDTH - 1)) // WIDTH * WIDTH - blocks) as j:
            T.buffer_store(w.score, float32(TAKEN), [0, blocks + j])

    def _add_heads(self, w, row) -> None:
        """sums [front + key] = sum over heads of P of a query row."""
        G = self.problem.group
        heads = min(G, self.config.heads)
        with T.serial(G // heads) as chunk:
            m = row * G + chunk * heads
            inverse = [T.Bind(tir.Broadcast(w.inverse[m + g], SIDE)) for g in range(heads)]
            with T.serial(w.count[0]) as i:
                (group,) = opaque("int32", [w.live[i]])
                for side in range(2):
                    first = group * BLOCK + side * SIDE
                    at = [ramp(self.front + first, SIDE)]
                    total = tir.BufferLoad(w.sums, at)
                    for g in range(heads):
                        total = total + load_lanes(w.S, [m + g, first], SIDE) * inverse[g]
                    T.buffer_store(w.sums, total, at)


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
            task.stage_mask(w, Mask, t0, rows, keys)
        task.find_live(w, rows, keys)
        task.load_queries(w, X, q0 + t0, rows, h2)
        task.score_groups(w, X, K, q0 + t0, h2, slot, rows, keys, blocks)
        task.find_tops(w, blocks)
        if has_mask and not p.zero_masked_rows:
            task.uncover(w, blocks, keys)
        if wants_weights:
            task.weigh(w, blocks, X, Out, q0 + t0, h2, ahead)
        if wants_out:
            task.multiply_values(w, V, Out, h2, slot, q0 + t0, rows, blocks)
        if wants_max or wants_sum:
            for m in range(rows * G):
                write_softmax(
                    Max, Sum, w.top, w.total, m, q0, length, t0 + m // G, h2 * G + m % G
                )  # fmt: skip
        if wants_blocks:
            for row in range(rows):
                task.score_blocks(w, Forced, row, t0 + row, keys)
                select_blocks(w.score, 0, Indices, q0 + t0 + row, h2, p.blocks(keys))

    return attend


def _prefetch(buffer: Buffer, index: list[Expr], size: int, how: tuple[int, ...]) -> None:
    """Ask for a row of bfloat16."""
    for first in range(0, size, x86_amx.ROW_BYTES // _HALF):
        address = tir.address_of(buffer[(*index, first)])
        T.evaluate(tir.call_intrin("void", "tirx.prefetch", address, *how))


def _bytes(Mask: Buffer, row: Expr, first: Expr) -> Expr:
    """32 elements of a mask row as uint8."""
    return load_lanes(Mask, [row, first], BLOCK).astype(f"uint8x{BLOCK}")
