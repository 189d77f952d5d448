"""The two products of a task of the NSA kernel, and the softmax between them.

A task has M = ``height`` rows of the products: query rows of one sequence, each with the G heads of
a key/value head, head fastest. Scores are computed transposed, rows of the products across the
lanes, so that maxima and sums need no reduction across lanes and a task stops at the last key that
it may see, not at a whole vector of keys. The second product has channels across the lanes: what it
leaves in the registers is what lies in memory.

Buffers of a task: queries Q [channel][M]; scores, then weights S float32 [vector of rows][key][L];
with bfloat16 factors the weights again as pairs of keys, E uint32 [vector of rows][pair][L].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.script import tirx as T
from tvm.target import Target

from ...relay_ops.attention import LOG2E, times
from ..intrin import x86_bf16
from .nsa_stream import OutputStream
from .transpose import transpose_square
from .vector import exp2_weight, from_float32, load_lanes, to_float32, vector_unit

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

FLT_MAX = 3.4028234663852886e38
_LINE_BYTES = 64
_FOR_READING, _FOR_WRITING = (0, 2, 1), (1, 3, 1)
"""Operands of ``llvm.prefetch``: read, into the second-level cache; write, into all; data."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes for a vector unit."""

    lanes: int
    height: int
    """M: rows of the products per task, heads included: bounds S, and spreads the loads of K and
    V."""
    keys: int
    """Keys of a register tile of scores, even."""
    strip: int
    """Vectors of rows of a register tile of scores."""
    rows: int
    """Rows of a register tile of outputs."""
    vectors: int
    """Vectors of channels of a register tile of outputs: a channel panel."""
    group: int
    """Keys that are skipped, or masked, together."""
    chunk: int
    """Keys, or pairs of keys, of which V (one channel panel) stays in L1."""

    repeats: int
    """Steps of a product's reduction in the body of its loop, so that its exit is foretold."""
    ahead: int
    """How many register tiles of outputs ahead of its own the lines of one are asked for."""

    def __post_init__(self) -> None:
        if self.height % 64 or self.height % (self.strip * self.lanes) or self.lanes % self.rows:
            raise ValueError(
                f"Tiles: height {self.height}, strip {self.strip}, rows {self.rows}: allowed a "
                f"height that 64 and the strip divide, and rows that divide {self.lanes} lanes"
            )
        if self.keys % 2 or self.group % self.keys or self.chunk % self.group:
            raise ValueError(
                f"Tiles: keys {self.keys}, group {self.group}, chunk {self.chunk}: allowed even "
                "keys, each a multiple of the one before"
            )

    @property
    def panel(self) -> int:
        """Channels of a channel panel."""
        return self.vectors * self.lanes


def tiles(target: Target) -> Tiles:
    """24 accumulators of scores with 32 registers, 12 with 16."""
    unit = vector_unit(target)
    wide = unit.registers == 32
    return Tiles(
        lanes=unit.lanes,
        height=64,
        keys=6,
        strip=4 if wide else 2,
        rows=8 if wide else 4,
        vectors=2,
        group=24,
        chunk=240,
        repeats=4,
        ahead=2,
    )


class Task:
    """Statements of one task, as inline functions over its buffers."""

    def __init__(self, problem: Problem, target: Target):
        self.problem, self.target = problem, target
        self.unit, self.tiles = vector_unit(target), tiles(target)
        p = problem
        self.paired = p.dtype == "bfloat16" and x86_bf16.available(target)
        """Whether factors are pairs of bfloat16 along the reduction, in place of float32."""
        self.step = 2 if self.paired else 1
        self.factor = "uint32" if self.paired else "float32"
        self.front = max(0, p.taps - 1 - p.newest_key(0))
        """Zeros before the first key in S: what windows reach of keys that do not exist."""
        self.channels = math.ceil(p.head_size / self.step)
        """Factors along the channels of Q and K."""
        self.chunk = self.tiles.chunk * self.step
        """Keys of a chunk."""
        self.query_rows = self.tiles.height // p.group
        self.stream = OutputStream(p, target)
        self.wants_out = "attention_out" in p.outputs
        self.panels = math.ceil(p.value_size / self.tiles.panel) if self.wants_out else 0

    def multiply_add(self, acc, a, b):
        """acc + a * b, by lanes, of a scalar factor a."""
        a = tir.Broadcast(a, self.unit.lanes)
        return x86_bf16.dot(acc, a, b) if self.paired else acc + a * b

    def pair(self, buffer, index, channel):
        """Factor ``channel`` of the row at ``index``, element by element; 0 ends an odd pair."""
        p = self.problem
        if not self.paired:
            return to_float32(buffer[(*index, channel)], self.unit)

        def bits(c):
            return T.Cast("uint32", T.reinterpret(buffer[(*index, c)], dtype="uint16"))

        low, high = bits(2 * channel), bits(T.min(2 * channel + 1, p.head_size - 1))
        if p.head_size % 2:
            high = T.Select(2 * channel + 1 < p.head_size, high, T.uint32(0))
        return low | high << T.uint32(16)

    def pairs(self, buffer, index, channel, lanes):
        """Factors ``channel`` to ``channel + lanes`` of the row at ``index``, as one vector."""
        vector = load_lanes(buffer, [*index, channel * self.step], lanes * self.step)
        if not self.paired:
            return to_float32(vector, self.unit)
        words = T.reinterpret(vector, dtype=f"uint16x{2 * lanes}")
        return T.reinterpret(words, dtype=f"uint32x{lanes}")

    @property
    def line(self) -> int:
        """Stored elements of a cache line."""
        return _LINE_BYTES // (4 if self.problem.dtype == "float32" else 2)

    def fetch_queries(self):
        """``fetch(X, token, h2, block, panel)``: ask for the share of the queries from ``token`` on
        that falls to this register tile of outputs.
        """
        t, G, line, D = self.tiles, self.problem.group, self.line, self.problem.head_size
        SHARE = math.ceil(t.rows / max(self.panels, 1))

        def ask(X, token, h, channel):
            address = tir.address_of(X[token, h, channel])
            return tir.call_intrin("void", "tirx.prefetch", address, *_FOR_READING)

        @T.inline
        def fetch(X, token, h2, block, panel):
            if panel * SHARE < t.rows:
                for r in T.unroll(SHARE):
                    m: T.let[T.int64] = block * t.rows + panel * SHARE + r
                    for part in T.unroll(math.ceil(D / line)):
                        T.evaluate(ask(X, token + m // G, h2 * G + m % G, part * line))

        return fetch

    def load_queries(self):
        """``load(Q, X, token, rows, h2)``: Q [channel][m] of ``rows`` query rows from ``token``;
        rows of the products beyond them repeat those of the last one.
        """
        p, L, channels = self.problem, self.unit.lanes, self.channels
        G, M = p.group, self.tiles.height
        whole = channels >= L and (p.head_size % 2 == 0 or not self.paired)
        pair, pairs, transpose = self.pair, self.pairs, transpose_square

        def source(token, rows, h2, m):
            return token + T.min(m // G, rows - 1), h2 * G + m % G

        @T.inline
        def load(Q, X, token, rows, h2):
            if whole:
                for u in range(M // L):
                    for part in range(math.ceil(channels / L)):
                        # The last block moves back over the one before.
                        first: T.let[T.int64] = T.Cast("int64", T.min(part * L, channels - L))
                        block = T.alloc_buffer((L, L), self.factor, scope="local")
                        for r in T.unroll(L):
                            block[r, T.ramp(0, 1, L)] = pairs(
                                X, source(token, rows, h2, u * L + r), first, L
                            )
                        transpose(block, L)
                        for c in T.unroll(L):
                            for l in T.vectorized(L):
                                Q[first + c, u * L + l] = block[c, l]
            else:
                for m in range(M):
                    for c in range(channels):
                        Q[c, m] = pair(X, source(token, rows, h2, m), c)

        return load

    def scores(self):
        """``tile(Q, K, S, top, caps, h2, slot, key, within, strip, masked)``: S = scale * log2(e) *
        Q . K of a register tile of keys, not above ``caps`` [key of the group][m] where ``masked``;
        top [m] = running maximum.

        K [h2][slot][channel] has the key at ``slot + key``, S at ``key``, caps at ``within``.
        """
        t, L, channels = self.tiles, self.unit.lanes, self.channels
        KEYS, STRIP, FRONT = t.keys, t.strip, self.front
        scale = self.problem.scale * LOG2E
        multiply_add, REPEATS = self.multiply_add, t.repeats

        @T.inline
        def step(acc, Q, K, h2, key, strip, channel):
            for k in T.unroll(KEYS):
                for u in T.unroll(STRIP):
                    acc[k, u, T.ramp(0, 1, L)] = multiply_add(
                        load_lanes(acc, [k, u, 0], L),
                        K[h2, key + k, channel],
                        load_lanes(Q, [channel, (strip * STRIP + u) * L], L),
                    )

        @T.inline
        def tile(Q, K, S, top, caps, h2, slot, key, within, strip, masked):
            acc = T.alloc_buffer((KEYS, STRIP, L), "float32", scope="local")
            for k in T.unroll(KEYS):
                for u in T.unroll(STRIP):
                    for l in T.vectorized(L):
                        acc[k, u, l] = T.float32(0)
            for body in range(channels // REPEATS):
                for i in T.unroll(REPEATS):
                    step(acc, Q, K, h2, slot + key, strip, body * REPEATS + i)
            for rest in T.unroll(channels % REPEATS):
                step(acc, Q, K, h2, slot + key, strip, channels // REPEATS * REPEATS + rest)
            for u in T.unroll(STRIP):
                for k in T.unroll(KEYS):
                    for l in T.vectorized(L):
                        acc[k, u, l] = times(acc[k, u, l], scale)
                    if masked:
                        # The comparison, not a minimum: a masked key may score NaN.
                        for l in T.vectorized(L):
                            acc[k, u, l] = T.Select(
                                acc[k, u, l] < caps[within + k, (strip * STRIP + u) * L + l],
                                acc[k, u, l],
                                caps[within + k, (strip * STRIP + u) * L + l],
                            )
                    for l in T.vectorized(L):
                        S[strip * STRIP + u, FRONT + key + k, l] = acc[k, u, l]
                    for l in T.vectorized(L):
                        top[(strip * STRIP + u) * L + l] = T.max(
                            top[(strip * STRIP + u) * L + l], acc[k, u, l]
                        )

        return tile

    def weights(self):
        """``weigh(S, E, runs, count, base, total, origin)``: S = 2**(S - base) in the ``count``
        runs of keys, E the same as pairs, that of key ``origin`` at 0; total [m] += sums.

        runs [i] = (first key, one beyond the last).
        """
        unit, L = self.unit, self.unit.lanes
        VECTORS, FRONT = self.tiles.height // L, self.front
        rounded = self.paired and self.wants_out
        degree = 5 if self.problem.dtype == "float32" else 4

        def weight(S, base, u, at):
            x = load_lanes(S, [u, at, 0], L) - load_lanes(base, [u * L], L)
            return exp2_weight(x, unit, degree)

        @T.inline
        def weigh(S, E, runs, count, base, total, origin):
            for u in range(VECTORS):
                sums = T.alloc_buffer((L,), "float32", scope="local")
                for l in T.vectorized(L):
                    sums[l] = total[u * L + l]
                for run in range(count):
                    first: T.let[T.int64] = runs[run, 0]
                    for i in range((runs[run, 1] - first + 1) // 2):
                        at: T.let[T.int64] = FRONT + first + i * 2
                        for s in T.unroll(2):
                            S[u, at + s, T.ramp(0, 1, L)] = weight(S, base, u, at + s)
                            for l in T.vectorized(L):
                                sums[l] = sums[l] + S[u, at + s, l]
                        if rounded:
                            E[u, (first - origin) // 2 + i, T.ramp(0, 1, L)] = x86_bf16.round_pairs(
                                load_lanes(S, [u, at, 0], L), load_lanes(S, [u, at + 1, 0], L)
                            )
                for l in T.vectorized(L):
                    total[u * L + l] = sums[l]

        return weigh

    def outputs(self):
        """``tile(P, V, O, Out, inverse, runs, count, h2, slot, panel, block, origin, final, token,
        rows)``: O += P . V of a register tile over the ``count`` runs of keys; where ``final``,
        Out = O * inverse [m] for the ``rows`` query rows from ``token`` on.

        P is E, which has key ``origin`` at 0, or S without pairs; V [h2][panel][pair][channel] has
        the first pair at ``slot``.
        """
        t, L, STEP, G = self.tiles, self.unit.lanes, self.step, self.problem.group
        MR, NV = t.rows, t.vectors
        FRONT, paired, store_lanes = self.front, self.paired, self.store_lanes
        multiply_add, WIDTH, REPEATS = self.multiply_add, t.panel, t.repeats
        LINES, AHEAD, line = math.ceil(WIDTH / self.line), t.ahead, self.line
        stream = self.stream

        def fetch(Out, token, h, channel, part):
            address = tir.address_of(Out[token, h, channel + part * line])
            return tir.call_intrin("void", "tirx.prefetch", address, *_FOR_WRITING)

        @T.inline
        def step(acc, P, V, h2, panel, u, lane, at, key):
            for r in T.unroll(MR):
                for v in T.unroll(NV):
                    acc[r, v, T.ramp(0, 1, L)] = multiply_add(
                        load_lanes(acc, [r, v, 0], L),
                        P[u, at, lane + r],
                        load_lanes(V, [h2, panel, key, v * L], L),
                    )

        @T.inline
        def tile(
            P, V, O, Out, inverse, runs, count, h2, slot, panel, block, origin, final, token, rows
        ):
            u: T.let[T.int64] = block * MR // L
            lane: T.let[T.int64] = block * MR % L
            acc = T.alloc_buffer((MR, NV, L), "float32", scope="local")
            for r in T.unroll(MR):
                for v in T.unroll(NV):
                    for l in T.vectorized(L):
                        acc[r, v, l] = T.if_then_else(
                            origin > 0, O[block, panel, r, v * L + l], T.float32(0)
                        )
            if final and not stream.wanted(Out):
                # A store that misses waits for its line, which is asked for some tiles ahead.
                blocks: T.let[T.int64] = T.ceildiv(rows * G, MR)
                ahead: T.let[T.int64] = panel * blocks + block + AHEAD
                for r in T.unroll(MR):
                    for part in T.unroll(LINES):
                        row: T.let[T.int64] = ahead % blocks * MR + r
                        T.evaluate(
                            fetch(
                                Out,
                                token + row // G,
                                h2 * G + row % G,
                                ahead // blocks * WIDTH,
                                part,
                            )
                        )
            for run in range(count):
                first: T.let[T.int64] = runs[run, 0] // STEP
                at: T.let[T.int64] = first - origin // STEP if paired else FRONT + first
                steps: T.let[T.int64] = T.ceildiv(runs[run, 1], STEP) - first
                for body in range(steps // REPEATS):
                    for i in T.unroll(REPEATS):
                        done: T.let[T.int64] = body * REPEATS + i
                        step(acc, P, V, h2, panel, u, lane, at + done, slot + first + done)
                for rest in range(steps % REPEATS):
                    done: T.let[T.int64] = steps // REPEATS * REPEATS + rest
                    step(acc, P, V, h2, panel, u, lane, at + done, slot + first + done)
            if final:
                for r in T.unroll(MR):
                    m: T.let[T.int64] = block * MR + r
                    if m < rows * G:
                        for v in T.unroll(NV):
                            for l in T.vectorized(L):
                                acc[r, v, l] = acc[r, v, l] * inverse[m]
                            store_lanes(
                                Out,
                                token + m // G,
                                h2 * G + m % G,
                                (panel * NV + v) * L,
                                load_lanes(acc, [r, v, 0], L),
                            )
            else:
                for r in T.unroll(MR):
                    for v in T.unroll(NV):
                        for l in T.vectorized(L):
                            O[block, panel, r, v * L + l] = acc[r, v, l]

        return tile

    @property
    def store_lanes(self):
        """``store(Out, token, h, channel, vector)``: a vector of outputs, rounded to the storage
        type, those from DV on left out.
        """
        L, DV, rounded = self.unit.lanes, self.problem.value_size, self.rounded
        stream = self.stream

        @T.inline
        def streamed(Out, token, h, channel, vector):
            if channel < DV:
                if stream.wanted(Out):
                    T.evaluate(stream.store(Out, [token, h, channel], rounded(vector)))
                else:
                    Out[token, h, T.ramp(channel, 1, L)] = rounded(vector)

        @T.inline
        def store(Out, token, h, channel, vector):
            if DV % L == 0:
                if channel < DV:
                    Out[token, h, T.ramp(channel, 1, L)] = rounded(vector)
            else:
                kept = T.alloc_buffer((L,), "float32", scope="local")
                kept[T.ramp(0, 1, L)] = vector
                for l in range(T.min(L, DV - channel)):
                    Out[token, h, channel + l] = rounded(kept[l])

        return streamed if stream.available else store

    def rounded(self, x):
        """float32 to the storage type of the output."""
        if self.paired and str(x.ty) == "float32x16":
            return T.reinterpret(x86_bf16.round_bits(x), dtype="bfloat16x16")
        return from_float32(x, self.problem.dtype, self.unit)
