"""Block selection inside the NSA kernel: scores of a query row's blocks, and the k best of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T

from .vector import load_lanes, max_lanes

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_TAKEN = -1.0  # below any score: a block already chosen, or beyond the last one
_FORCED = 3.4028234663852886e38
_NOWHERE = 2**31 - 1


def scoring(problem: Problem, lanes: int, rows: int, vectors: int):
    """An inline ``block_scores(S, live, inverse, P, score, Forced, t0, row, keys, groups)``.

    S float32 [block, slot, rows, lanes] holds exp(S - M) of a tile's product rows, head fastest;
    groups of ``vectors`` slots that are not live count as 0. inverse [product row] is 1 / L. Writes
    P [key], the probabilities of query row ``row`` summed over its heads, and score [j], filled up
    with ``_TAKEN`` to whole vectors.
    """
    p, L = problem, lanes

    def scored(total, Forced, t, j):
        if p.topk_mask is None:
            return total
        return T.Select(T.Cast("int32", Forced[t, j]) != 0, T.float32(_FORCED), total)

    @T.inline
    def block_scores(S, live, inverse, P, score, Forced, t0, row, keys, groups):
        total = T.alloc_buffer((L,), "float32", scope="local")
        for group in range(groups):
            for v in range(vectors):
                for l in T.vectorized(L):
                    total[l] = T.float32(0)
                if live[group] != 0:
                    for g in range(p.group):
                        m: T.int64 = row * p.group + g
                        for l in T.vectorized(L):
                            total[l] = total[l] + (
                                S[m // rows, group * vectors + v, m % rows, l] * inverse[m]
                            )
                for l in T.vectorized(L):
                    P[(group * vectors + v) * L + l] = total[l]
        blocks: T.int64 = p.blocks(keys)
        for j in range(blocks):
            newest: T.int64 = p.newest_key(j)
            oldest: T.int64 = T.max(newest - (p.taps - 1), 0)
            total[0] = T.float32(0)
            for i in range(T.max(T.min(newest, keys - 1) + 1 - oldest, 0)):
                total[0] = total[0] + P[oldest + i] * T.Cast(
                    "float32", T.Cast("int32", p.weight(newest - (oldest + i)))
                )
            score[j] = scored(total[0], Forced, t0 + row, j)
        for j in range(T.ceildiv(blocks, L) * L - blocks):
            score[blocks + j] = T.float32(_TAKEN)

    return block_scores


def selection(problem: Problem, lanes: int):
    """An inline ``select_blocks(score, Indices, token, h2, blocks)``: Indices[token, h2] = the k
    best of ``score``, which is used up; among equals the lowest index, -1 where there are fewer.

    A round finds the maximum of each lane with its first chunk, then the lowest index among the
    lanes that hold the overall maximum.
    """
    L, k = lanes, problem.block_count

    @T.inline
    def select_blocks(score, Indices, token, h2, blocks):
        best = T.alloc_buffer((L,), "float32", scope="local")
        where = T.alloc_buffer((L,), "int32", scope="local")
        maximum = T.alloc_buffer((1,), "float32", scope="local")
        winner = T.alloc_buffer((1,), "int32", scope="local")
        for place in range(T.min(k, blocks)):
            for l in T.vectorized(L):
                best[l] = T.float32(_TAKEN)
            for l in T.vectorized(L):
                where[l] = 0
            for chunk in range(T.ceildiv(blocks, L)):
                for l in T.vectorized(L):
                    where[l] = T.Select(
                        score[chunk * L + l] > best[l], T.Cast("int32", chunk), where[l]
                    )
                for l in T.vectorized(L):
                    best[l] = T.max(best[l], score[chunk * L + l])
            maximum[0] = max_lanes(load_lanes(best, [0], L))
            for l in T.vectorized(L):
                where[l] = T.Select(best[l] == maximum[0], -(where[l] * L + l), T.int32(-_NOWHERE))
            winner[0] = -max_lanes(load_lanes(where, [0], L))
            # Undefined input may score NaN, which no maximum equals: stay inside the row.
            winner[0] = T.min(winner[0], T.Cast("int32", blocks - 1))
            score[T.Cast("int64", winner[0])] = T.float32(_TAKEN)
            Indices[token, h2, place] = winner[0]
        for place in range(k - T.min(k, blocks)):
            Indices[token, h2, blocks + place] = -1

    return select_blocks
