"""Longformer attention for CPUs, after the list of global tokens (``longformer_tokens``).

Work and memory are linear in S. A task is a block of queries of one head: either ``block``
consecutive positions, which see their band and the global keys outside of it, or up to ``block``
global tokens, which see every position through the global projections. Keys come in tiles; what a
tile holds is described key by key (position, additive mask, reach), so that both kinds of task, and
both kinds of key, share one nest:

    parallel(b, h, block)
      Q panels [D][panel] in float32, times log2(e)/sqrt(D)
      for key tile:                                    # band, then gathered global keys
        K, V tile [keys][D] in float32
        for panel whose band meets the tile:
          scores  [keys][panel] = K . Q    register tile key_rows x query_vectors
          weights [keys][panel] = 2**(scores - running maximum)
          O       [panel][D]    = O * 2**(old maximum - new) + weights . V
                                           register tile value_rows x value_vectors
      float16, int8, output order

Lanes run over queries in the scores, so the softmax needs no reduction across lanes, and over
channels in the value product, so the output leaves in rows. Neither K nor V is transposed.

Where the target multiplies matrix tiles of bfloat16 (AMX), the attention takes those
(``longformer_amx``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

from ...relay_ops.attention import LOG2E
from . import longformer_amx, matrix_tiles
from .inline import parsers_by_frames
from .vector import exp2_nonpositive, from_float32, to_float32, vector_unit

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

_LOWEST = -1.0e38  # a running maximum before the first key: finite, so that it can be subtracted
_EVERYWHERE = 2**31 - 1  # the reach of a global key


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, for a vector unit and a head size."""

    lanes: int
    query_vectors: int
    """Vectors of queries in a panel and in the register tile of the scores."""
    key_rows: int
    """Keys in the register tile of the scores."""
    value_vectors: int
    """Vectors of channels in the register tile of the value product."""
    value_rows: int
    """Queries in the register tile of the value product; divides a panel."""
    keys: int
    """Keys of a tile, a multiple of ``key_rows``: K, V and the scores of a panel stay in L1."""
    panels: int
    """Panels of a block: Q and O of a block stay in L2."""

    def __post_init__(self) -> None:
        if self.keys % self.key_rows or self.panel % self.value_rows:
            raise ValueError(f"Tiles: found {self}, allowed whole register tiles")

    @property
    def panel(self) -> int:
        return self.query_vectors * self.lanes

    @property
    def block(self) -> int:
        return self.panels * self.panel


_L2_SHARE = 128 * 1024  # bytes of Q and O of a block
_BLOCK_QUERIES = 256  # longer blocks unpack K and V less often, but leave less to run in parallel


def tiles(target: Target, head_size: int) -> Tiles:
    """The tiles for ``target``: 16 accumulators with 32 registers, 8 with 16, enough to cover the
    latency of the multiply-add.
    """
    unit = vector_unit(target)
    accumulators = unit.registers // 2
    query_vectors = 2
    vectors = math.ceil(head_size / unit.lanes)
    value_vectors = next(n for n in (4, 2, 1) if vectors % n == 0 and n * n <= accumulators)
    panel = query_vectors * unit.lanes
    fitting = max(1, _L2_SHARE // (panel * vectors * unit.lanes * 8))
    return Tiles(
        lanes=unit.lanes,
        query_vectors=query_vectors,
        key_rows=accumulators // query_vectors,
        value_vectors=value_vectors,
        value_rows=min(panel, accumulators // value_vectors),
        keys=64,
        panels=min(fitting, _BLOCK_QUERIES // panel),
    )


@parsers_by_frames()
def attention(problem: Problem, target: Target) -> PrimFunc:
    """The attention of all heads, from int8 projections to the int8 output.

    qkv int8 [1, B*S, 3H]; gq int8 [1, sizes[0], H], row offsets[b] + n for the n-th global token
    of entry b; gkv int8 [1, B*S or 0, 2H]; mask float16 [B, S]; positions, rank, offsets from
    ``longformer_tokens``; scale_qkv_gemm, scale_global_gemm, scale_output float32 [1]
    -> int8 [B, S, H], or its COL32 form [B, H/32, S, 32] with ``problem.col32``. gq and gkv are
    read only where a flag is set.
    """
    if matrix_tiles.available(target):
        return longformer_amx.build_attention(problem, target)
    unit, t = vector_unit(target), tiles(target, problem.head_size)
    D, N, W = problem.head_size, problem.num_heads, problem.window
    H, L, col32 = N * D, t.lanes, problem.col32
    KEYS, KR, QV, VV, VR = t.keys, t.key_rows, t.query_vectors, t.value_vectors, t.value_rows
    PANEL, PANELS, BLOCK = t.panel, t.panels, t.panel * t.panels
    DP = math.ceil(D / L) * L  # channels of V and O in whole vectors; the last lanes are not used
    whole = D // L
    # A vector of channels must lie in one panel of 32 columns.
    stored_whole = 0 if col32 and D % L else whole
    query_scale = LOG2E / math.sqrt(D)

    def projected(value, scale):
        """int8 to the float16 number that it stands for, as float32."""
        return to_float32(from_float32(T.Cast("float32", value) * scale, "float16", unit), unit)

    def quantised(value, inverse):
        rounded = to_float32(from_float32(value, "float16", unit), unit) * inverse
        return T.Cast("int8", T.min(T.max(T.nearbyint(rounded), T.float32(-128)), T.float32(127)))

    def distance(i, j):
        return T.max(i - j, j - i)

    def at(b, s, c, l):
        """Index of row s, channel c + l of the output."""
        return (b, c // 32, s, c % 32 + l) if col32 else (b, s, c + l)

    @T.inline
    def unpack(to, n, source, row, column, scale):
        """to[n, 0:D] = the projections source[row, column:column + D]."""
        for chunk in range(whole):
            for l in T.vectorized(L):
                to[n, chunk * L + l] = projected(source[0, row, column + chunk * L + l], scale)
        for d in range(whole * L, D):
            to[n, d] = projected(source[0, row, column + d], scale)

    @T.inline
    def store(y, b, s, column, values, n, inverse_weight, inverse_scale):
        """Output row s, channels column:column + D, from values[n, 0:D] over its total weight."""
        for chunk in range(stored_whole):
            for l in T.vectorized(L):
                y[at(b, s, column + chunk * L, l)] = quantised(
                    values[n, chunk * L + l] * inverse_weight, inverse_scale
                )
        for d in range(stored_whole * L, D):
            y[at(b, s, column + d, 0)] = quantised(values[n, d] * inverse_weight, inverse_scale)

    @T.inline
    def clear(y, b, s, column):
        for chunk in range(stored_whole):
            for l in T.vectorized(L):
                y[at(b, s, column + chunk * L, l)] = T.int8(0)
        for d in range(stored_whole * L, D):
            y[at(b, s, column + d, 0)] = T.int8(0)

    @T.inline
    def scores(x, top, k, q, p, group, shift, key, reach, query, inside):
        """x[group of key_rows keys, panel] = K . Q + shift, -inf out of reach; top = their maxima.

        ``query`` is the position of the panel's first query where the group is not ``inside``.
        """
        acc = T.alloc_buffer((KR, PANEL), "float32", scope="local")
        for r in T.unroll(KR):
            for v in T.unroll(QV):
                for l in T.vectorized(L):
                    acc[r, v * L + l] = T.float32(0)
        for d in range(D):
            for r in T.unroll(KR):
                for v in T.unroll(QV):
                    for l in T.vectorized(L):
                        acc[r, v * L + l] += k[group * KR + r, d] * q[p, d, v * L + l]
        for r in T.unroll(KR):
            for v in T.unroll(QV):
                for l in T.vectorized(L):
                    acc[r, v * L + l] += shift[group * KR + r]
        if not inside:
            for r in T.unroll(KR):
                for v in T.unroll(QV):
                    for l in T.vectorized(L):
                        acc[r, v * L + l] = T.Select(
                            distance(query + v * L + l, key[group * KR + r])
                            <= reach[group * KR + r],
                            acc[r, v * L + l],
                            -T.infinity("float32"),
                        )
        for v in T.unroll(QV):
            for r in T.unroll(KR):
                for l in T.vectorized(L):
                    x[group * KR + r, v * L + l] = acc[r, v * L + l]
                for l in T.vectorized(L):
                    top[v * L + l] = T.max(top[v * L + l], acc[r, v * L + l])

    @T.inline
    def weights(x, first_key, last_key, top, raised, p, weight, rescale):
        """x = 2**(x - raised); top, weight and rescale of the panel follow the new maximum."""
        for v in range(QV):
            added = T.alloc_buffer((L,), "float32", scope="local")
            for l in T.vectorized(L):
                added[l] = T.float32(0)
            for n in range(first_key, last_key):
                for l in T.vectorized(L):
                    x[n, v * L + l] = exp2_nonpositive(x[n, v * L + l] - raised[v * L + l])
                for l in T.vectorized(L):
                    added[l] += x[n, v * L + l]
            for l in T.vectorized(L):
                rescale[v * L + l] = exp2_nonpositive(
                    top[p * PANEL + v * L + l] - raised[v * L + l]
                )
            for l in T.vectorized(L):
                top[p * PANEL + v * L + l] = raised[v * L + l]
                weight[p * PANEL + v * L + l] = (
                    weight[p * PANEL + v * L + l] * rescale[v * L + l] + added[l]
                )

    @T.inline
    def values(o, x, v, first_key, last_key, p, rows, rescale):
        """o[rows of the panel] = o * rescale + x . V."""
        for block in range(T.ceildiv(rows, VR)):
            for strip in range(DP // (VV * L)):
                acc = T.alloc_buffer((VR, VV * L), "float32", scope="local")
                for r in T.unroll(VR):
                    for c in T.unroll(VV):
                        for l in T.vectorized(L):
                            acc[r, c * L + l] = (
                                o[p * PANEL + block * VR + r, (strip * VV + c) * L + l]
                                * rescale[block * VR + r]
                            )
                for n in range(first_key, last_key):
                    for r in T.unroll(VR):
                        for c in T.unroll(VV):
                            for l in T.vectorized(L):
                                acc[r, c * L + l] += (
                                    x[n, block * VR + r] * v[n, (strip * VV + c) * L + l]
                                )
                for r in T.unroll(VR):
                    for c in T.unroll(VV):
                        for l in T.vectorized(L):
                            o[p * PANEL + block * VR + r, (strip * VV + c) * L + l] = acc[
                                r, c * L + l
                            ]

    @T.prim_func(s_tir=True, private=True)
    def attention(
        qkv: T.handle,
        gq: T.handle,
        gkv: T.handle,
        mask: T.handle,
        positions: T.handle,
        rank: T.handle,
        offsets: T.handle,
        scale_qkv_gemm: T.handle,
        scale_global_gemm: T.handle,
        scale_output: T.handle,
        output: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        R, G, GR = T.int64(), T.int64(), T.int64()
        QKV = T.match_buffer(qkv, (1, R, 3 * H), "int8")
        GQ = T.match_buffer(gq, (1, G, H), "int8")
        GKV = T.match_buffer(gkv, (1, GR, 2 * H), "int8")
        Mask = T.match_buffer(mask, (B, S), "float16")
        Positions = T.match_buffer(positions, (B, S), "int32")
        Rank = T.match_buffer(rank, (B, S + 1), "int32")
        Offsets = T.match_buffer(offsets, (B,), "int32")
        ScaleQKV = T.match_buffer(scale_qkv_gemm, (1,), "float32")
        ScaleGlobal = T.match_buffer(scale_global_gemm, (1,), "float32")
        ScaleOutput = T.match_buffer(scale_output, (1,), "float32")
        Y = T.match_buffer(output, (B, H // 32, S, 32) if col32 else (B, S, H), "int8")
        with T.sblock("root"):
            for task in T.parallel(B * N * (2 * T.ceildiv(S, BLOCK))):
                blocks: T.int64 = T.ceildiv(S, BLOCK)
                b: T.int64 = task // (2 * blocks) // N
                h: T.int64 = task // (2 * blocks) % N
                # Blocks of positions first, then blocks of global tokens.
                block: T.int64 = task % (2 * blocks)
                is_global: T.bool = block >= blocks
                first: T.int64 = T.Select(is_global, block - blocks, block) * BLOCK
                queries: T.int64 = T.Select(is_global, T.Cast("int64", Rank[b, S]), S)
                rows: T.int64 = T.min(queries - first, BLOCK)

                Q = T.alloc_buffer((PANELS, D, PANEL), "float32", scope="local")
                K = T.alloc_buffer((KEYS, D), "float32", scope="local")
                V = T.alloc_buffer((KEYS, DP), "float32", scope="local")
                X = T.alloc_buffer((KEYS, PANEL), "float32", scope="local")
                O = T.alloc_buffer((BLOCK, DP), "float32", scope="local")
                one = T.alloc_buffer((1, DP), "float32", scope="local")
                top = T.alloc_buffer((BLOCK,), "float32", scope="local")
                weight = T.alloc_buffer((BLOCK,), "float32", scope="local")
                raised = T.alloc_buffer((PANEL,), "float32", scope="local")
                rescale = T.alloc_buffer((PANEL,), "float32", scope="local")
                position = T.alloc_buffer((BLOCK,), "int32", scope="local")
                live = T.alloc_buffer((PANELS,), "int32", scope="local")
                any_live = T.alloc_buffer((1,), "int32", scope="local")
                key = T.alloc_buffer((KEYS,), "int32", scope="local")
                shift = T.alloc_buffer((KEYS,), "float32", scope="local")
                reach = T.alloc_buffer((KEYS,), "int32", scope="local")
                far = T.alloc_buffer((1,), "int32", scope="local")

                # A panel is live if it has a row to compute here: not padding, and not a global
                # token among the local rows. Rows past the last repeat it.
                any_live[0] = 0
                for p in range(PANELS):
                    live[p] = 0
                if rows > 0:
                    for n in range(T.ceildiv(rows, PANEL) * PANEL):
                        token: T.int64 = first + T.min(n, rows - 1)
                        s: T.int64 = T.if_then_else(
                            is_global, T.Cast("int64", Positions[b, token]), token
                        )
                        position[n] = T.Cast("int32", s)
                        padding: T.bool = to_float32(Mask[b, s], unit) < T.float32(0)
                        if not padding and (is_global or Rank[b, s + 1] == Rank[b, s]):
                            live[n // PANEL] = 1
                            any_live[0] = 1

                if any_live[0] != 0:
                    for n in range(T.ceildiv(rows, PANEL) * PANEL):
                        token: T.int64 = first + T.min(n, rows - 1)
                        if is_global:
                            unpack(one, 0, GQ, Offsets[b] + token, h * D, ScaleGlobal[0])
                        else:
                            unpack(one, 0, QKV, b * S + token, h * D, ScaleQKV[0])
                        for d in range(D):
                            Q[n // PANEL, d, n % PANEL] = one[0, d] * T.float32(query_scale)
                        for chunk in range(DP // L):
                            for l in T.vectorized(L):
                                O[n, chunk * L + l] = T.float32(0)
                        top[n] = T.float32(_LOWEST)
                        weight[n] = T.float32(0)

                    # Keys: the positions low..high - 1, then the global ones before and after.
                    low: T.int64 = T.Select(is_global, T.int64(0), T.max(first - W, 0))
                    high: T.int64 = T.Select(is_global, S, T.min(first + rows + W, S))
                    before: T.int64 = T.Cast("int64", Rank[b, low])
                    within: T.int64 = T.Cast("int64", Rank[b, high] - Rank[b, low])
                    outside: T.int64 = T.Cast("int64", Rank[b, S]) - within
                    near_tiles: T.int64 = T.ceildiv(high - low, KEYS)
                    far_tiles: T.int64 = T.ceildiv(outside, KEYS)
                    for tile in range(near_tiles + far_tiles):
                        gathered: T.bool = tile >= near_tiles
                        first_key: T.int64 = KEYS * T.Select(gathered, tile - near_tiles, tile)
                        keys: T.int64 = T.min(
                            KEYS, T.Select(gathered, outside, high - low) - first_key
                        )
                        groups: T.int64 = T.ceildiv(keys, KR)
                        far[0] = 0
                        for n in range(groups * KR):
                            m: T.int64 = first_key + T.min(n, keys - 1)
                            s: T.int64 = T.if_then_else(
                                gathered,
                                T.Cast("int64", Positions[b, T.Select(m < before, m, m + within)]),
                                low + m,
                            )
                            # The last group is filled with repetitions that get no weight.
                            key[n] = T.Cast("int32", s)
                            shift[n] = T.if_then_else(
                                n < keys,
                                to_float32(Mask[b, s], unit) * T.float32(LOG2E),
                                -T.infinity("float32"),
                            )
                            if is_global or Rank[b, s + 1] != Rank[b, s]:
                                reach[n] = _EVERYWHERE
                                far[0] = 1
                            else:
                                reach[n] = W
                            if is_global:
                                unpack(K, n, GKV, b * S + s, h * D, ScaleGlobal[0])
                                unpack(V, n, GKV, b * S + s, H + h * D, ScaleGlobal[0])
                            else:
                                unpack(K, n, QKV, b * S + s, H + h * D, ScaleQKV[0])
                                unpack(V, n, QKV, b * S + s, 2 * H + h * D, ScaleQKV[0])

                        for p in range(T.ceildiv(rows, PANEL)):
                            query: T.int64 = first + p * PANEL - low - first_key
                            whole_tile: T.bool = is_global or gathered or far[0] != 0
                            begin: T.int64 = T.Select(
                                whole_tile, T.int64(0), T.max(query - W, 0) // KR
                            )
                            end: T.int64 = T.Select(
                                whole_tile,
                                groups,
                                T.min(T.ceildiv(T.max(query + PANEL + W, 0), KR), groups),
                            )
                            if live[p] != 0 and begin < end:
                                for l in T.vectorized(PANEL):
                                    raised[l] = top[p * PANEL + l]
                                for group in range(begin, end):
                                    scores(
                                        X,
                                        raised,
                                        K,
                                        Q,
                                        p,
                                        group,
                                        shift,
                                        key,
                                        reach,
                                        position[p * PANEL],
                                        is_global
                                        or gathered
                                        or (
                                            group * KR >= query + PANEL - 1 - W
                                            and group * KR + KR - 1 <= query + W
                                        ),
                                    )
                                weights(X, begin * KR, end * KR, top, raised, p, weight, rescale)
                                values(
                                    O,
                                    X,
                                    V,
                                    begin * KR,
                                    end * KR,
                                    p,
                                    T.min(rows - p * PANEL, PANEL),
                                    rescale,
                                )

                for n in range(T.max(rows, 0)):
                    s: T.int64 = T.Cast("int64", position[n])
                    if is_global or Rank[b, s + 1] == Rank[b, s]:
                        if to_float32(Mask[b, s], unit) < T.float32(0):
                            clear(Y, b, s, h * D)
                        else:
                            store(
                                Y,
                                b,
                                s,
                                h * D,
                                O,
                                n,
                                T.float32(1) / weight[n],
                                T.float32(1) / ScaleOutput[0],
                            )

    return attention
