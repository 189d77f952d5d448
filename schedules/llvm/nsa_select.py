"""Block selection inside the NSA kernel: scores of a query row's blocks, and the k best of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.script import tirx as T

from .transpose import transpose_square
from .vector import load_lanes, max_lanes

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

WIDTH = 16
"""Scores of a row are filled up to whole vectors of so many; up to so many blocks are selected by
sorting."""
TAKEN = -1.0  # below any score: a block already chosen, or beyond the last one
FORCED = 3.4028234663852886e38
_NOWHERE = 2**31 - 1


def scoring(problem: Problem, lanes: int, height: int, front: int):
    """An inline ``block_scores(S, inverse, score, Forced, t0, rows, last, keys)``.

    S float32 [vector of rows][front + key][lanes] holds exp(S - M) of ``height`` product rows, head
    fastest, and 0 for as many keys before the first one and from ``last`` on as a window reaches.
    inverse [product row] is 1 / L. Writes score [row][j], filled up with ``TAKEN``.

    The window goes over vectors of product rows, L blocks of them are transposed, and sums over
    heads are then sums of vectors.
    """
    p, L, G = problem, lanes, problem.group
    vectors = math.ceil(G / L)  # of rows with the heads of a group
    shared = math.ceil(L / G)  # query rows in a vector
    heads = L // shared
    transpose = transpose_square

    def scored(total, Forced, t, j):
        if p.topk_mask is None:
            return total
        return T.Select(T.Cast("int32", Forced[t, j]) != 0, T.float32(FORCED), total)

    @T.inline
    def window(sums, S, u, newest):
        """sums = weighted sum of the keys of a window, by product rows."""
        for l in T.vectorized(L):
            sums[l] = T.float32(0)
        for c in range(p.taps):
            for l in T.vectorized(L):
                sums[l] = sums[l] + S[u, front + newest - c, l] * T.Cast(
                    "float32", T.Cast("int32", p.weight(c))
                )

    @T.inline
    def block_scores(S, inverse, score, Forced, t0, rows, last, keys):
        blocks: T.let[T.int64] = p.blocks(keys)
        some: T.let[T.int64] = T.min(blocks, p.blocks_from(last))
        for unit in range(T.ceildiv(rows, shared)):
            for chunk in range(T.ceildiv(blocks, L)):
                square = T.alloc_buffer((L, L), "float32", scope="local")
                sums = T.alloc_buffer((L,), "float32", scope="local")
                count: T.let[T.int64] = T.max(T.min(some - chunk * L, L), 0)
                if count > 0:
                    for i in range(count):
                        for l in T.vectorized(L):
                            square[i, l] = T.float32(0)
                        for v in range(vectors):
                            window(sums, S, unit * vectors + v, p.newest_key(chunk * L + i))
                            for l in T.vectorized(L):
                                square[i, l] = (
                                    square[i, l] + sums[l] * inverse[(unit * vectors + v) * L + l]
                                )
                    for i in range(L - count):
                        for l in T.vectorized(L):
                            square[count + i, l] = T.float32(0)
                    transpose(square, L)
                for q in T.unroll(shared):
                    for l in T.vectorized(L):
                        sums[l] = T.float32(0)
                    if count > 0:
                        for g in T.unroll(heads):
                            for l in T.vectorized(L):
                                sums[l] = sums[l] + square[q * heads + g, l]
                    row: T.let[T.int64] = unit * shared + q
                    if row < rows:
                        if chunk * L + L <= blocks:
                            for l in T.vectorized(L):
                                score[row, chunk * L + l] = scored(
                                    sums[l], Forced, t0 + row, chunk * L + l
                                )
                        else:
                            for l in T.vectorized(L):
                                score[row, chunk * L + l] = sums[l]
                            for l in range(blocks - chunk * L):
                                score[row, chunk * L + l] = scored(
                                    score[row, chunk * L + l], Forced, t0 + row, chunk * L + l
                                )
            for q in range(T.min(shared, rows - unit * shared)):
                for j in range(T.ceildiv(blocks, WIDTH) * WIDTH - blocks):
                    score[unit * shared + q, blocks + j] = T.float32(TAKEN)

    return block_scores


def selection(problem: Problem, lanes: int):
    """An inline ``select_blocks(score, row, Indices, token, h2, blocks)``: Indices[token, h2] = the
    k best of score[row], which is used up; among equals the lowest index, -1 where there are fewer.
    """
    return _by_sorting(problem) if problem.block_count <= WIDTH else _by_rounds(problem, lanes)


def _by_sorting(problem: Problem):
    """Each vector of scores is sorted and merged into the best so far.

    What is sorted are integers: the bits of a score, which order like the score as none is
    negative, above the complement of the index. They are all different, so nothing depends on the
    order of exchanges.
    """
    k = problem.block_count

    def exchange(x, distance, larger):
        """Lanes i of ``larger`` take the larger one of lanes i and i ^ distance, others the
        smaller.
        """
        mine = load_lanes(x, [0], WIDTH)
        other = tir.Shuffle([mine], [i ^ distance for i in range(WIDTH)])
        picks = [i if i in larger else WIDTH + i for i in range(WIDTH)]
        chosen = tir.Shuffle([tir.max(mine, other), tir.min(mine, other)], picks)
        T.buffer_store(x, chosen, [T.ramp(0, 1, WIDTH)])

    def distances(size):
        return [size >> n for n in range(1, size.bit_length())]

    def sort_ascending(x):
        for size in (2, 4, 8, 16):
            for distance in distances(size):
                larger = {i for i in range(WIDTH) if (not i & size) == bool(i & distance)}
                exchange(x, distance, larger)

    def merge_descending(x):
        """What rises and then falls, or so cyclically."""
        for distance in distances(WIDTH):
            exchange(x, distance, {i for i in range(WIDTH) if not i & distance})

    def vector(value):
        return tir.Broadcast(tir.const(value, "int64"), WIDTH)

    def bits(score, row, chunk):
        return T.reinterpret(load_lanes(score, [row, chunk * WIDTH], WIDTH), dtype="int32x16")

    def ordered(score, row, chunk):
        index = tir.Broadcast(T.Cast("int64", chunk * WIDTH), WIDTH) + tir.Ramp(
            tir.const(0, "int64"), tir.const(1, "int64"), WIDTH
        )
        high = bits(score, row, chunk).astype("int64x16")
        return high * vector(1 << 32) + (vector((1 << 32) - 1) - index)

    @T.inline
    def select_blocks(score, row, Indices, token, h2, blocks):
        best = T.alloc_buffer((WIDTH,), "int64", scope="local")
        next_ = T.alloc_buffer((WIDTH,), "int64", scope="local")
        found = T.alloc_buffer((WIDTH,), "int32", scope="local")
        for l in T.vectorized(WIDTH):
            best[l] = T.int64(-1)
        for chunk in range(T.ceildiv(blocks, WIDTH)):
            # Of equal scores the later one is not among the best.
            if max_lanes(bits(score, row, chunk)) > T.Cast("int32", best[WIDTH - 1] >> 32):
                next_[T.ramp(0, 1, WIDTH)] = ordered(score, row, chunk)
                sort_ascending(next_)
                for l in T.vectorized(WIDTH):  # the larger half of both
                    best[l] = T.max(best[l], next_[l])
                merge_descending(best)
        for l in T.vectorized(WIDTH):
            found[l] = T.Select(
                best[l] < T.int64(0), T.int32(-1), T.Cast("int32", T.int64(-1) - best[l])
            )
        for place in T.vectorized(k):
            Indices[token, h2, place] = found[place]

    return select_blocks


def _by_rounds(problem: Problem, lanes: int):
    """A round finds the maximum of each lane with its first chunk, then the lowest index among the
    lanes that hold the overall maximum.
    """
    L, k = lanes, problem.block_count

    @T.inline
    def select_blocks(score, row, Indices, token, h2, blocks):
        best = T.alloc_buffer((L,), "float32", scope="local")
        where = T.alloc_buffer((L,), "int32", scope="local")
        maximum = T.alloc_buffer((1,), "float32", scope="local")
        winner = T.alloc_buffer((1,), "int32", scope="local")
        for place in range(T.min(k, blocks)):
            for l in T.vectorized(L):
                best[l] = T.float32(TAKEN)
            for l in T.vectorized(L):
                where[l] = 0
            for chunk in range(T.ceildiv(blocks, L)):
                for l in T.vectorized(L):
                    where[l] = T.Select(
                        score[row, chunk * L + l] > best[l], T.Cast("int32", chunk), where[l]
                    )
                for l in T.vectorized(L):
                    best[l] = T.max(best[l], score[row, chunk * L + l])
            maximum[0] = max_lanes(load_lanes(best, [0], L))
            for l in T.vectorized(L):
                where[l] = T.Select(best[l] == maximum[0], -(where[l] * L + l), T.int32(-_NOWHERE))
            winner[0] = -max_lanes(load_lanes(where, [0], L))
            # Undefined input may score NaN, which no maximum equals: stay inside the row.
            winner[0] = T.min(winner[0], T.Cast("int32", blocks - 1))
            score[row, T.Cast("int64", winner[0])] = T.float32(TAKEN)
            Indices[token, h2, place] = winner[0]
        for place in range(k - T.min(k, blocks)):
            Indices[token, h2, blocks + place] = -1

    return select_blocks
