"""NSA compressed attention with block selection for CPUs, one kernel.

parallel(h2, key slot)                 pack K to [slot][Dqk][lanes], V to [channels][key][panel]
parallel(h2, tile of query rows)
Q [rows][Dqk]
for key group:                       products, groups that the mask hides altogether left out
limits [rows][group]               what a score may be at most: inf, -FLT_MAX, -inf
for block: S = scale * Q . K       register tile MR x NV vectors, lanes run over keys
for chunk of keys:
for block: P = exp(S - M), L += P
for channel panel, block: O += P . V    register tile MR x NV vectors, lanes over channels
O / L, M, L
for row: scores from P / L summed over the group's heads, then k rounds of arg-max
parallel(row)                          rows after the last sequence

A tile holds ``height`` rows of the products: G heads of ``height // G`` query rows, head fastest,
so that a key/value tile serves the whole group. S, later P, of one tile is all that is kept of the
probabilities: height x CmpSkv floats a thread, CmpSkv <= 14000. It lies as
[block][slot][MR][lanes]: what a register tile writes or reads is contiguous, whatever the number of
keys.

Factors of the products are float32, or bfloat16 where storage and target have it: then neighbours
along the reduction (channels of Q and K, keys of P and V) lie in pairs, whose two products one
instruction adds to a float32 lane. M, L and the scores come from float32 P either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..intrin import x86_bf16
from .nsa_lengths import find_sequence, first_slot, guard, slots, start
from .nsa_select import scoring, selection
from .vector import (
    LOG2E,
    exp2_nonpositive,
    from_float32,
    load_lanes,
    max_lanes,
    sum_lanes,
    to_float32,
    vector_unit,
)

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_FLT_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Tiles:
    """Tile sizes for a vector unit."""

    lanes: int
    rows: int
    """MR: rows of a register tile."""
    vectors: int
    """NV: vectors of a register tile; a key group and a channel panel have NV * lanes columns."""
    height: int
    """Rows of the products per task, heads included: bounds P, and spreads the loads of K and V."""
    chunk: int
    """Key groups of which V (one channel panel) stays in L1."""

    def __post_init__(self) -> None:
        if self.height % 64 or self.height % self.rows:
            raise ValueError(f"Tiles: height: found {self.height}, allowed a multiple of 64 and MR")

    @property
    def group(self) -> int:
        """Keys of a key group, channels of a channel panel."""
        return self.vectors * self.lanes


def tiles(target: Target) -> Tiles:
    """16 accumulators with 32 registers, 8 with 16: enough to cover the multiply-add's latency."""
    unit = vector_unit(target)
    rows = 8 if unit.registers == 32 else 4
    return Tiles(lanes=unit.lanes, rows=rows, vectors=2, height=64, chunk=256 // (2 * unit.lanes))


def attend_select(problem: Problem, target: Target) -> PrimFunc:
    """The kernel; its arguments are those of ``Problem``."""
    p, unit, t = problem, vector_unit(target), tiles(target)
    N1, N2, G, D, DV = p.query_heads, p.key_heads, p.group, p.head_size, p.value_size
    L, MR, NV, KG = t.lanes, t.rows, t.vectors, t.group
    ROWS, BLOCKS, M = t.height // G, t.height // t.rows, t.height
    CHUNK = t.chunk
    # Factors of the products: float32, or pairs of bfloat16 along the reduction.
    paired = p.dtype == "bfloat16" and x86_bf16.available(target)
    STEP, FACTOR = (2, "uint16") if paired else (1, "float32")
    DP = math.ceil(D / STEP) * STEP
    has_mask, has_forced = p.atten_mask is not None, p.topk_mask is not None
    mask_dtype, forced_dtype = p.atten_mask or "bool", p.topk_mask or "bool"
    LIMITS = ROWS if has_mask else 1  # without a mask one row of limits serves all
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs
    wants_probabilities = wants_sum or wants_out or wants_blocks
    PANELS = math.ceil(DV / KG) if wants_out else 0
    COPIES = 8
    check = guard(p)
    block_scores, select_blocks = scoring(p, L, MR, NV), selection(p, L)
    inf, low, zero = T.float32(math.inf), T.float32(-_FLT_MAX), T.float32(0)

    def most_groups(key_tokens):
        return T.ceildiv(T.min(key_tokens, p.cmp_skv_limit), KG)

    def factor(value):
        """A stored element as it is multiplied."""
        return T.reinterpret(value, dtype="uint16") if paired else to_float32(value, unit)

    def multiply_add(acc, a, b):
        """The vector acc + a * b; a is an index of one factor or pair, b of a vector of them."""
        (left, *at), (right, *start_) = a, b
        if not paired:
            return acc + T.broadcast(left[tuple(at)], L) * load_lanes(right, start_, L)
        pair = T.reinterpret(load_lanes(left, at, 2), dtype="uint32")
        pairs = T.reinterpret(load_lanes(right, start_, 2 * L), dtype=f"uint32x{L}")
        return x86_bf16.dot(acc, T.broadcast(pair, L), pairs)

    def limit(masked):
        return T.Select(T.Cast("int32", masked) != 0, low, inf)

    @T.inline
    def set_limits(limits, seen, Mask, t0, rows, first, keys):
        """limits [rows, KG] of the keys from ``first``; seen[0] = is any of them visible."""
        if has_mask:
            top = T.alloc_buffer((L,), "float32", scope="local")
            for l in T.vectorized(L):
                top[l] = low
            for row in range(rows):
                if first + KG <= keys:
                    for v in range(NV):
                        for l in T.vectorized(L):
                            limits[row, v * L + l] = limit(Mask[t0 + row, first + v * L + l])
                else:
                    for c in range(KG):
                        limits[row, c] = T.if_then_else(
                            first + c < keys, limit(Mask[t0 + row, first + c]), -inf
                        )
                for v in range(NV):
                    for l in T.vectorized(L):
                        top[l] = T.max(top[l], limits[row, v * L + l])
            seen[0] = T.Cast("int32", max_lanes(load_lanes(top, [0], L)) > zero)
        else:
            for l in T.vectorized(KG):
                limits[0, l] = T.Select(first + l < keys, inf, -inf)
            seen[0] = 1

    @T.inline
    def score_tile(Q, K, S, top, limits, h2, slot, group, block, rows):
        """S of a block in a key group = min(scale * Q . K, limits); top = running maximum."""
        acc = T.alloc_buffer((MR, NV, L), "float32", scope="local")
        for r in T.unroll(MR):
            for v in T.unroll(NV):
                for l in T.vectorized(L):
                    acc[r, v, l] = zero
        for c in range(DP // STEP):
            for r in T.unroll(MR):
                for v in T.unroll(NV):
                    acc[r, v, T.ramp(0, 1, L)] = multiply_add(
                        load_lanes(acc, [r, v, 0], L),
                        (Q, block * MR + r, c * STEP),
                        (K, h2, slot + group * NV + v, c, 0),
                    )
        for r in T.unroll(MR):
            # Rows that pad the last block take the limits of the last row.
            row: T.int64 = T.min((block * MR + r) // G, rows - 1) if has_mask else T.int64(0)
            for v in T.unroll(NV):
                for l in T.vectorized(L):
                    acc[r, v, l] = acc[r, v, l] * T.float32(p.scale)
                # The comparison, not a minimum: a masked key may score NaN.
                for l in T.vectorized(L):
                    acc[r, v, l] = T.Select(
                        acc[r, v, l] < limits[row, v * L + l], acc[r, v, l], limits[row, v * L + l]
                    )
                for l in T.vectorized(L):
                    S[block, group * NV + v, r, l] = acc[r, v, l]
                for l in T.vectorized(L):
                    top[block, r, l] = T.max(top[block, r, l], acc[r, v, l])

    @T.inline
    def exponentials(S, P, live, base, total, block, first, last):
        """S = exp(S - base) in the key groups first to last, P the same as factors; total += their
        sum.
        """
        for group in range(first, last):
            if live[group] != 0:
                for v in T.unroll(NV):
                    for r in T.unroll(MR):
                        for l in T.vectorized(L):
                            S[block, group * NV + v, r, l] = exp2_nonpositive(
                                (S[block, group * NV + v, r, l] - base[block * MR + r])
                                * T.float32(LOG2E)
                            )
                        for l in T.vectorized(L):
                            total[block, r, l] = total[block, r, l] + S[block, group * NV + v, r, l]
                        if paired and wants_out:
                            P[block, (group - first) * NV + v, r, T.ramp(0, 1, L)] = (
                                x86_bf16.round_bits(load_lanes(S, [block, group * NV + v, r, 0], L))
                            )

    @T.inline
    def value_tile(P, V, O, live, h2, slot, panel, block, first, last, keys):
        """O[block, panel] += P . V over the key groups first to last."""
        origin: T.int64 = first if paired else T.int64(0)
        acc = T.alloc_buffer((MR, NV, L), "float32", scope="local")
        for r in T.unroll(MR):
            for v in T.unroll(NV):
                for l in T.vectorized(L):
                    acc[r, v, l] = T.if_then_else(first > 0, O[block, panel, r, v * L + l], zero)
        for group in range(first, last):
            if live[group] != 0:
                for s in range(T.min(NV, T.ceildiv(keys, L) - group * NV)):
                    key: T.int64 = (slot + group * NV + s) * (L // STEP)
                    for i in range(L // STEP):
                        for r in T.unroll(MR):
                            for v in T.unroll(NV):
                                acc[r, v, T.ramp(0, 1, L)] = multiply_add(
                                    load_lanes(acc, [r, v, 0], L),
                                    (P, block, (group - origin) * NV + s, r, i * STEP),
                                    (V, h2, panel, key + i, v * L * STEP),
                                )
        for r in T.unroll(MR):
            for v in T.unroll(NV):
                for l in T.vectorized(L):
                    O[block, panel, r, v * L + l] = acc[r, v, l]

    def at(slot, l):
        """Row of V of key l of a slot."""
        return slot * (L // STEP) + l // STEP

    @T.inline
    def pack_slot(K, V, Keys, Values, h2, slot, row, count):
        """Key slot ``slot`` from ``count`` packed rows at ``row``. Lanes of K beyond them are only
        multiplied into scores that -inf replaces; rows of V beyond them meet P = 0: zeros.
        """
        for l in range(count):
            for c in range(D):
                K[h2, slot, c // STEP, l * STEP + c % STEP] = factor(Keys[row + l, h2, c])
            for c in range(D, DP):
                K[h2, slot, c // STEP, l * STEP + c % STEP] = T.Cast(FACTOR, 0)
        if wants_out:
            for l in range(count):
                for panel in range(PANELS):
                    for c in range(KG):
                        V[h2, panel, at(slot, l), c * STEP + l % STEP] = T.if_then_else(
                            panel * KG + c < DV,
                            factor(Values[row + l, h2, panel * KG + c]),
                            T.Cast(FACTOR, 0),
                        )
            for l in range(L - count):
                for panel in range(PANELS):
                    for c in range(KG):
                        V[h2, panel, at(slot, count + l), c * STEP + (count + l) % STEP] = T.Cast(
                            FACTOR, 0
                        )

    @T.inline
    def pack_query(Q, X, first, rows, blocks, h2):
        """Q [m, c] from the packed query rows at ``first``; zeros fill the last block."""
        for m in range(rows * G):
            for chunk in range(D // L):
                for l in T.vectorized(L):
                    Q[m, chunk * L + l] = factor(X[first + m // G, h2 * G + m % G, chunk * L + l])
            for c in range(D // L * L, D):
                Q[m, c] = factor(X[first + m // G, h2 * G + m % G, c])
            for c in range(D, DP):
                Q[m, c] = T.Cast(FACTOR, 0)
        for m in range(rows * G, blocks * MR):
            for c in range(DP):
                Q[m, c] = T.Cast(FACTOR, 0)

    @T.inline
    def row_maxima(top, maximum, base, hidden, blocks):
        """maximum = M, base = what exp subtracts, hidden[0] = has any row no visible key."""
        hidden[0] = 0
        for m in range(blocks * MR):
            maximum[m] = max_lanes(load_lanes(top, [m // MR, m % MR, 0], L))
            base[m] = maximum[m]
            if maximum[m] == low:
                hidden[0] = 1
                if p.zero_masked_rows:
                    base[m] = zero  # exp(-FLT_MAX - 0) = 0

    @T.inline
    def uncover(S, live, hidden, keys, groups, blocks):
        """A row without a visible key takes the mean of all: then no group may be left out."""
        if hidden[0] != 0:
            for group in range(groups):
                if live[group] == 0:
                    live[group] = 1
                    for block in range(blocks):
                        for v in range(NV):
                            for r in range(MR):
                                for l in T.vectorized(L):
                                    S[block, group * NV + v, r, l] = T.Select(
                                        (group * NV + v) * L + l < keys, low, -inf
                                    )

    def quotient(O, inverse, m, c, l):
        """Channel c + l of product row m, c a multiple of the lanes."""
        return from_float32(O[m // MR, c // KG, m % MR, c % KG + l] * inverse[m], p.dtype, unit)

    @T.inline
    def write_row(Max, Sum, Out, O, maximum, sums, inverse, m, q0, length, t, h):
        """The outputs of product row m: row t, head h of the sequence at q0, but for indices."""
        if wants_max:
            for l in T.vectorized(COPIES):
                Max[(*p.softmax_record(q0, length, t, h), l)] = maximum[m]
        if wants_sum:
            for l in T.vectorized(COPIES):
                Sum[(*p.softmax_record(q0, length, t, h), l)] = sums[m]
        if wants_out:
            for c in range(DV // L):
                for l in T.vectorized(L):
                    Out[q0 + t, h, c * L + l] = quotient(O, inverse, m, c * L, l)
            for l in range(DV % L):
                Out[q0 + t, h, DV // L * L + l] = quotient(O, inverse, m, DV // L * L, l)

    @T.inline
    def clear_row(Max, Sum, Out, Indices, token):
        """The outputs of a row that no sequence owns."""
        for h in range(N1):
            if wants_max:
                for l in T.vectorized(COPIES):
                    Max[token, h, l] = zero
            if wants_sum:
                for l in T.vectorized(COPIES):
                    Sum[token, h, l] = zero
            if wants_out:
                for c in range(DV):
                    Out[token, h, c] = from_float32(zero, p.dtype, unit)
        if wants_blocks:
            for h2 in range(N2):
                for place in range(p.block_count):
                    Indices[token, h2, place] = -1

    @T.prim_func(s_tir=True, private=True)
    def attend_select(
        query: T.handle,
        key: T.handle,
        value: T.handle,
        atten_mask: T.handle,
        topk_mask: T.handle,
        actual_seq_qlen: T.handle,
        actual_cmp_seq_kvlen: T.handle,
        actual_sel_seq_kvlen: T.handle,
        softmax_max: T.handle,
        softmax_sum: T.handle,
        attention_out: T.handle,
        topk_indices_out: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        Tq, Tk, B = T.int64(), T.int64(), T.int64()
        R, C, RF, CF = T.int64(), T.int64(), T.int64(), T.int64()
        X = T.match_buffer(query, (Tq, N1, D), p.dtype)
        Keys = T.match_buffer(key, (Tk, N2, D), p.dtype)
        Values = T.match_buffer(value, (Tk, N2, DV), p.dtype)
        Mask = T.match_buffer(atten_mask, (R, C), mask_dtype)
        Forced = T.match_buffer(topk_mask, (RF, CF), forced_dtype)
        QL = T.match_buffer(actual_seq_qlen, (B,), "int64")
        KL = T.match_buffer(actual_cmp_seq_kvlen, (B,), "int64")
        SL = T.match_buffer(actual_sel_seq_kvlen, (B,), "int64")
        Max = T.match_buffer(softmax_max, (Tq, N1, COPIES), "float32")
        Sum = T.match_buffer(softmax_sum, (Tq, N1, COPIES), "float32")
        Out = T.match_buffer(attention_out, (Tq, N1, DV), p.dtype)
        Indices = T.match_buffer(topk_indices_out, (Tq, N2, p.block_count), "int32")
        with T.sblock("root"):
            if paired:
                T.attr(0, x86_bf16.IMPORT, x86_bf16.SOURCE)
            assert B >= 1, ("ValueError", [f"{p.label}: length lists: found none, allowed B >= 1"])
            check(QL, KL, SL, B, Tq, Tk, R, C, RF, CF)

            # A group may start at the last slot: the next NV - 1 are read, and not used.
            K = T.alloc_buffer((N2, slots(Tk, B, L) + NV - 1, DP // STEP, L * STEP), FACTOR)
            V = T.alloc_buffer((N2, PANELS, slots(Tk, B, L) * L // STEP, KG * STEP), FACTOR)
            for task in T.parallel(N2 * slots(Tk, B, L)):
                h2: T.int64 = task // slots(Tk, B, L)
                slot: T.int64 = task % slots(Tk, B, L)
                found = T.alloc_buffer((2,), "int64", scope="local")
                find_sequence(found, KL, B, L, slot)
                b: T.int64 = found[0]
                row: T.int64 = start(KL, b) + (slot - first_slot(KL, b, L)) * L
                # Keys of a sequence without queries may hold anything: nobody looks at them.
                if row < KL[b] and start(QL, b) < QL[b]:
                    pack_slot(K, V, Keys, Values, h2, slot, row, T.min(KL[b] - row, L))

            for task in T.parallel(N2 * slots(Tq, B, ROWS)):
                tasks: T.int64 = slots(Tq, B, ROWS)
                h2: T.int64 = task // tasks
                # Rows far back see more keys under a causal mask: one from either end in turn.
                turn: T.int64 = task % tasks
                place: T.int64 = T.if_then_else(turn % 2 == 0, turn // 2, tasks - 1 - turn // 2)
                found = T.alloc_buffer((2,), "int64", scope="local")
                find_sequence(found, QL, B, ROWS, place)
                b: T.int64 = found[0]
                q0: T.int64 = start(QL, b)
                t0: T.int64 = (place - first_slot(QL, b, ROWS)) * ROWS
                rows: T.int64 = T.min(QL[b] - q0 - t0, ROWS)
                if rows > 0:
                    keys: T.int64 = KL[b] - start(KL, b)
                    slot: T.int64 = first_slot(KL, b, L)
                    groups: T.int64 = T.ceildiv(keys, KG)
                    blocks: T.int64 = T.ceildiv(rows * G, MR)
                    Q = T.alloc_buffer((M, DP), FACTOR, scope="local")
                    S = T.alloc_buffer((BLOCKS, most_groups(Tk) * NV, MR, L), "float32")
                    O = T.alloc_buffer((BLOCKS, PANELS, MR, KG), "float32", scope="local")
                    E = T.alloc_buffer((BLOCKS, CHUNK * NV, MR, L), "uint16") if paired else S
                    live = T.alloc_buffer((most_groups(Tk),), "int32")
                    P = T.alloc_buffer((most_groups(Tk) * KG,), "float32")
                    score = T.alloc_buffer((most_groups(Tk) * KG + L,), "float32")
                    limits = T.alloc_buffer((LIMITS, KG), "float32", scope="local")
                    top = T.alloc_buffer((BLOCKS, MR, L), "float32", scope="local")
                    total = T.alloc_buffer((BLOCKS, MR, L), "float32", scope="local")
                    maximum = T.alloc_buffer((M,), "float32", scope="local")
                    base = T.alloc_buffer((M,), "float32", scope="local")
                    sums = T.alloc_buffer((M,), "float32", scope="local")
                    inverse = T.alloc_buffer((M,), "float32", scope="local")
                    seen = T.alloc_buffer((1,), "int32", scope="local")
                    hidden = T.alloc_buffer((1,), "int32", scope="local")

                    pack_query(Q, X, q0 + t0, rows, blocks, h2)
                    for block in range(blocks):
                        for r in range(MR):
                            for l in T.vectorized(L):
                                top[block, r, l] = low
                            for l in T.vectorized(L):
                                total[block, r, l] = zero

                    for group in range(groups):
                        set_limits(limits, seen, Mask, t0, rows, group * KG, keys)
                        live[group] = seen[0]
                        if seen[0] != 0:
                            for block in range(blocks):
                                score_tile(Q, K, S, top, limits, h2, slot, group, block, rows)
                    row_maxima(top, maximum, base, hidden, blocks)
                    if has_mask and not p.zero_masked_rows:
                        uncover(S, live, hidden, keys, groups, blocks)

                    if wants_probabilities:
                        # Without keys one empty chunk still clears O.
                        for chunk in range(T.max(T.ceildiv(groups, CHUNK), 1)):
                            first: T.int64 = chunk * CHUNK
                            last: T.int64 = T.min(groups, first + CHUNK)
                            for block in range(blocks):
                                exponentials(S, E, live, base, total, block, first, last)
                            if wants_out:
                                for panel in range(PANELS):
                                    for block in range(blocks):
                                        value_tile(
                                            E, V, O, live, h2, slot, panel, block, first, last, keys
                                        )
                        for m in range(blocks * MR):
                            sums[m] = sum_lanes(load_lanes(total, [m // MR, m % MR, 0], L))
                            inverse[m] = T.Select(sums[m] > zero, T.float32(1) / sums[m], zero)

                    for row in range(rows):
                        for g in range(G):
                            write_row(
                                Max, Sum, Out, O, maximum, sums, inverse, row * G + g,
                                q0, QL[b] - q0, t0 + row, h2 * G + g,
                            )  # fmt: skip
                        if wants_blocks:
                            block_scores(S, live, inverse, P, score, Forced, t0, row, keys, groups)
                            select_blocks(score, Indices, q0 + t0 + row, h2, p.blocks(keys))

            for rest in T.parallel(Tq - QL[B - 1]):
                clear_row(Max, Sum, Out, Indices, QL[B - 1] + rest)

    used = {
        "Mask": has_mask,
        "Forced": has_forced,
        "Max": wants_max,
        "Sum": wants_sum,
        "Out": wants_out,
        "Indices": wants_blocks,
    }
    return _without(attend_select, [name for name, kept in used.items() if not kept])


def _without(func: PrimFunc, names: list[str]) -> PrimFunc:
    """``func`` without the parameters ``names``, which its body does not touch."""
    kept = [param for param in func.params if param.name not in names]
    return PrimFunc(kept, func.body, func.ret_type, func.attrs)
