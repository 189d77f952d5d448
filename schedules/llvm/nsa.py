"""NSA compressed attention with block selection for CPUs, one kernel.

    parallel(h2, key slot)                 keys and values packed (``nsa_pack``)
    parallel(h2, strip of tasks)
        for task of M product rows:        G heads of M / G query rows, head fastest
            columns of the mask            is a key visible to any row, to all rows
            Q transposed                   [channel][M]
            for key group that a row sees: S = scale * Q . K, running maximum    (``nsa_tile``)
            for chunk of keys:
                S = exp(S - M), L += S
                for channel panel, block of rows: O += S . V
            O / L, M, L
            scores of blocks, the k best of each row                             (``nsa_select``)
    parallel(row)                          rows after the last sequence

A key/value tile serves the whole group of heads. S of one task is all that is kept of the
probabilities: M x CmpSkv floats a thread, CmpSkv <= 14000; what selection needs is taken from there
and no product is computed twice. Groups of keys that the mask hides from all rows of a task are
skipped, and nothing is computed behind the last key that one of them sees.

Factors of the products are float32, or bfloat16 where storage and target have it: then neighbours
along the reduction (channels of Q and K, keys of P and V) lie in pairs, whose two products one
instruction adds to a float32 lane. M, L and the scores come from float32 weights either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..intrin import x86_bf16
from .nsa_lengths import find_sequence, first_slot, guard, slots, start
from .nsa_pack import packing
from .nsa_select import WIDTH, scoring, selection
from .nsa_tile import FLT_MAX, Task
from .vector import LN2, from_float32, load_lanes, max_lanes

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_COPIES = 8
"""How often softmax_max and softmax_sum repeat a row's value."""
_STRIPS = 256
"""Strips of tasks for a key/value head: enough to share among cores, few enough that a strip's
buffers are worth their allocation."""


def attend_select(problem: Problem, target: Target) -> PrimFunc:
    """The kernel; its arguments are those of ``Problem``."""
    task_ = Task(problem, target)
    p, unit, t = problem, task_.unit, task_.tiles
    N1, N2, G, D, DV = p.query_heads, p.key_heads, p.group, p.head_size, p.value_size
    L, M, GROUP, KEYS = t.lanes, t.height, t.group, t.keys
    VECTORS, STRIP, BLOCKS, ROWS = M // L, t.strip, M // t.rows, task_.query_rows
    STEP, FACTOR, CHUNK, FRONT = task_.step, task_.factor, task_.chunk // GROUP, task_.front
    PANELS, MARGIN = task_.panels, GROUP + p.taps
    paired = task_.paired
    has_mask, has_forced = p.atten_mask is not None, p.topk_mask is not None
    mask_dtype, forced_dtype = p.atten_mask or "bool", p.topk_mask or "bool"
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs
    wants_weights = wants_sum or wants_out or wants_blocks
    check, pack_slot = guard(p), packing(task_)
    load_queries, score_tile = task_.load_queries(), task_.scores()
    weigh, value_tile = task_.weights(), task_.outputs()
    block_scores, select_blocks = scoring(p, L, M, FRONT), selection(p, L)
    low, zero, one = T.float32(-FLT_MAX), T.float32(0), T.float32(1)
    inf = T.float32(float("inf"))

    def most_groups(key_tokens):
        return T.ceildiv(T.min(key_tokens, p.cmp_skv_limit), GROUP)

    def masked(value):
        return T.Select(T.Cast("int32", value) != 0, T.uint8(1), T.uint8(0))

    @T.inline
    def scan_mask(hide, some, Mask, t0, rows, keys):
        """hide [key] = is it masked for all rows, some [key] = for any; 1 up to a whole group."""
        for part in range(keys // L):
            for l in T.vectorized(L):
                hide[part * L + l] = T.uint8(1)
                some[part * L + l] = T.uint8(0)
            for row in range(rows):
                for l in T.vectorized(L):
                    hide[part * L + l] = hide[part * L + l] & masked(Mask[t0 + row, part * L + l])
                for l in T.vectorized(L):
                    some[part * L + l] = some[part * L + l] | masked(Mask[t0 + row, part * L + l])
        for key in range(keys // L * L, keys):
            hide[key] = T.uint8(1)
            some[key] = T.uint8(0)
            for row in range(rows):
                hide[key] = hide[key] & masked(Mask[t0 + row, key])
                some[key] = some[key] | masked(Mask[t0 + row, key])
        for key in range(keys, T.ceildiv(keys, GROUP) * GROUP):
            hide[key] = T.uint8(1)
            some[key] = T.uint8(1)

    @T.inline
    def find_live(live, last, hide, some, keys):
        """live [group] = 0 when no row sees one of its keys, 2 when all rows see all, else 1;
        last[0] = 1 + the last key that a row sees.
        """
        last[0] = T.int64(0)
        if has_mask:
            found = T.alloc_buffer((2,), "uint8", scope="local")
            for group in range(T.ceildiv(keys, GROUP)):
                found[0] = T.uint8(1)
                found[1] = T.uint8(0)
                for i in range(GROUP):
                    found[0] = found[0] & hide[group * GROUP + i]
                    found[1] = found[1] | some[group * GROUP + i]
                live[group] = 2 - T.Cast("int32", found[0]) - T.Cast("int32", found[1])
                if found[0] == T.uint8(0):
                    last[0] = T.min(group * GROUP + GROUP, keys)
            while (last[0] > 0) and (hide[T.max(last[0] - 1, 0)] != T.uint8(0)):
                last[0] = last[0] - 1
        else:
            for group in range(T.ceildiv(keys, GROUP)):
                live[group] = T.if_then_else(group * GROUP + GROUP <= keys, 2, 1)
            last[0] = keys

    @T.inline
    def set_caps(caps, Mask, t0, rows, first, keys):
        """caps [key of the group][m]: what a score may be at most: inf, -FLT_MAX, -inf."""
        for i in range(GROUP):
            for row in range(ROWS):
                cap: T.float32 = -inf
                if first + i < keys:
                    if has_mask:
                        cap = T.if_then_else(
                            T.Cast("int32", Mask[t0 + T.min(row, rows - 1), first + i]) != 0,
                            low,
                            inf,
                        )
                    else:
                        cap = inf
                for g in T.vectorized(G):
                    caps[i, row * G + g] = cap

    @T.inline
    def score_groups(Q, K, S, top, caps, live, Mask, h2, slot, t0, rows, last, keys):
        for m in T.vectorized(M):
            top[m] = low
        for group in range(T.ceildiv(last, GROUP)):
            first: T.int64 = group * GROUP
            count: T.int64 = T.ceildiv(T.min(GROUP, last - first), KEYS)
            if live[group] == 2:
                for strip in range(VECTORS // STRIP):
                    for i in range(count):
                        score_tile(
                            Q, K, S, top, caps, h2, slot, first + i * KEYS, i * KEYS, strip, False
                        )
            if live[group] == 1:
                set_caps(caps, Mask, t0, rows, first, keys)
                for strip in range(VECTORS // STRIP):
                    for i in range(count):
                        score_tile(
                            Q, K, S, top, caps, h2, slot, first + i * KEYS, i * KEYS, strip, True
                        )

    @T.inline
    def uncover(S, top, live, last, keys):
        """A row without a visible key takes the mean of all: then no key may be left out."""
        lowest = T.alloc_buffer((L,), "float32", scope="local")
        for l in T.vectorized(L):
            lowest[l] = inf
        for u in T.unroll(VECTORS):
            for l in T.vectorized(L):
                lowest[l] = T.min(lowest[l], top[u * L + l])
        if -max_lanes(-load_lanes(lowest, [0], L)) == low:
            for group in range(T.ceildiv(keys, GROUP)):
                # Of the last live group only tiles up to ``last`` have scores.
                done: T.int64 = T.if_then_else(
                    live[group] == 0,
                    0,
                    T.max(T.min(T.ceildiv(last[0] - group * GROUP, KEYS) * KEYS, GROUP), 0),
                )
                for u in range(VECTORS):
                    for i in range(done, GROUP):
                        for l in T.vectorized(L):
                            S[u, FRONT + group * GROUP + i, l] = T.if_then_else(
                                group * GROUP + i < keys, low, -inf
                            )
                live[group] = 1
            last[0] = keys

    @T.inline
    def find_runs(runs, count, live, S, first, end, last):
        """runs [i] = (first key, one beyond the last) of live groups from ``first`` to ``end``."""
        count[0] = T.int64(0)
        for group in range(first, end):
            if live[group] != 0:
                if group > first and live[T.max(group - 1, 0)] != 0:
                    runs[count[0] - 1, 1] = T.min(group * GROUP + GROUP, last)
                else:
                    runs[count[0], 0] = group * GROUP
                    runs[count[0], 1] = T.min(group * GROUP + GROUP, last)
                    count[0] = count[0] + 1
            else:
                if wants_blocks:
                    for u in range(VECTORS):
                        for i in range(GROUP):
                            for l in T.vectorized(L):
                                S[u, FRONT + group * GROUP + i, l] = zero

    @T.inline
    def set_base(base, top):
        """base = what 2**x subtracts."""
        for m in T.vectorized(M):
            base[m] = top[m]
        if p.zero_masked_rows:
            for m in T.vectorized(M):  # exp(-FLT_MAX - 0) = 0
                base[m] = T.Select(top[m] == low, zero, top[m])

    @T.inline
    def write_softmax(Max, Sum, top, total, m, q0, length, t, h):
        """The softmax records of product row m: row t, head h of the sequence at q0."""
        if wants_max:
            for l in T.vectorized(_COPIES):
                Max[(*p.softmax_record(q0, length, t, h), l)] = T.if_then_else(
                    top[m] == low, low, top[m] * T.float32(LN2)
                )
        if wants_sum:
            for l in T.vectorized(_COPIES):
                Sum[(*p.softmax_record(q0, length, t, h), l)] = total[m]

    @T.inline
    def clear_row(Max, Sum, Out, Indices, token):
        """The outputs of a row that no sequence owns."""
        for h in range(N1):
            if wants_max:
                for l in T.vectorized(_COPIES):
                    Max[token, h, l] = zero
            if wants_sum:
                for l in T.vectorized(_COPIES):
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
        Max = T.match_buffer(softmax_max, (Tq, N1, _COPIES), "float32")
        Sum = T.match_buffer(softmax_sum, (Tq, N1, _COPIES), "float32")
        Out = T.match_buffer(attention_out, (Tq, N1, DV), p.dtype)
        Indices = T.match_buffer(topk_indices_out, (Tq, N2, p.block_count), "int32")
        with T.sblock("root"):
            if paired:
                T.attr(0, x86_bf16.IMPORT, x86_bf16.SOURCE)
            assert B >= 1, ("ValueError", [f"{p.label}: length lists: found none, allowed B >= 1"])
            check(QL, KL, SL, B, Tq, Tk, R, C, RF, CF)

            # Tiles of scores read up to a whole group of keys, and do not use the rest.
            K = T.alloc_buffer((N2, slots(Tk, B, L) * L + GROUP, task_.channels), FACTOR)
            V = T.alloc_buffer((N2, PANELS, slots(Tk, B, L) * L // STEP, t.panel), FACTOR)
            for part in T.parallel(N2 * slots(Tk, B, L)):
                h2: T.int64 = part // slots(Tk, B, L)
                slot: T.int64 = part % slots(Tk, B, L)
                found = T.alloc_buffer((2,), "int64", scope="local")
                find_sequence(found, KL, B, L, slot)
                b: T.int64 = found[0]
                row: T.int64 = start(KL, b) + (slot - first_slot(KL, b, L)) * L
                # Keys of a sequence without queries may hold anything: nobody looks at them.
                if row < KL[b] and start(QL, b) < QL[b]:
                    pack_slot(K, V, Keys, Values, h2, slot, row, T.min(KL[b] - row, L))

            for part in T.parallel(N2 * T.min(slots(Tq, B, ROWS), _STRIPS)):
                tasks: T.int64 = slots(Tq, B, ROWS)
                strips: T.int64 = T.min(tasks, _STRIPS)
                h2: T.int64 = part // strips
                strip: T.int64 = part % strips
                S = T.alloc_buffer(
                    (VECTORS, FRONT + most_groups(Tk) * GROUP + MARGIN, L), "float32"
                )
                E = T.alloc_buffer((VECTORS, task_.chunk // 2, L), "uint32") if paired else S
                score = T.alloc_buffer((ROWS, most_groups(Tk) * GROUP + WIDTH), "float32")
                hide = T.alloc_buffer((most_groups(Tk) * GROUP,), "uint8")
                some = T.alloc_buffer((most_groups(Tk) * GROUP,), "uint8")
                live = T.alloc_buffer((most_groups(Tk),), "int32")
                Q = T.alloc_buffer((task_.channels, M), FACTOR, scope="local")
                O = T.alloc_buffer((BLOCKS, PANELS, t.rows, t.panel), "float32", scope="local")
                caps = T.alloc_buffer((GROUP, M), "float32", scope="local")
                top = T.alloc_buffer((M,), "float32", scope="local")
                base = T.alloc_buffer((M,), "float32", scope="local")
                total = T.alloc_buffer((M,), "float32", scope="local")
                inverse = T.alloc_buffer((M,), "float32", scope="local")
                runs = T.alloc_buffer((CHUNK, 2), "int64", scope="local")
                count = T.alloc_buffer((1,), "int64", scope="local")
                last = T.alloc_buffer((1,), "int64", scope="local")
                found = T.alloc_buffer((2,), "int64", scope="local")
                for turn in range(T.ceildiv(tasks, strips)):
                    # Rows far back see more keys under a causal mask: to and fro.
                    place: T.int64 = turn * strips + T.if_then_else(
                        turn % 2 == 0, strip, strips - 1 - strip
                    )
                    find_sequence(found, QL, B, ROWS, T.min(place, tasks - 1))
                    b: T.int64 = found[0]
                    q0: T.int64 = start(QL, b)
                    t0: T.int64 = (place - first_slot(QL, b, ROWS)) * ROWS
                    rows: T.int64 = T.min(QL[b] - q0 - t0, ROWS)
                    if rows > 0 and place < tasks:
                        keys: T.int64 = KL[b] - start(KL, b)
                        slot: T.int64 = first_slot(KL, b, L)
                        if has_mask:
                            scan_mask(hide, some, Mask, t0, rows, keys)
                        find_live(live, last, hide, some, keys)
                        load_queries(Q, X, q0 + t0, rows, h2)
                        score_groups(
                            Q, K, S, top, caps, live, Mask, h2, slot * L, t0, rows, last[0], keys
                        )
                        if has_mask and not p.zero_masked_rows:
                            uncover(S, top, live, last, keys)
                        set_base(base, top)
                        for m in T.vectorized(M):
                            total[m] = zero

                        if wants_weights:
                            groups: T.int64 = T.ceildiv(last[0], GROUP)
                            # Without keys one empty chunk still clears O.
                            for chunk in range(T.max(T.ceildiv(groups, CHUNK), 1)):
                                first: T.int64 = chunk * CHUNK
                                end: T.int64 = T.min(groups, first + CHUNK)
                                find_runs(runs, count, live, S, first, end, last[0])
                                weigh(S, E, runs, count[0], base, total, first * GROUP)
                                for m in T.vectorized(M):
                                    inverse[m] = T.Select(total[m] > zero, one / total[m], zero)
                                if wants_out:
                                    for panel in range(PANELS):
                                        for block in range(T.ceildiv(rows * G, t.rows)):
                                            value_tile(
                                                E, V, O, Out, inverse, runs, count[0], h2,
                                                slot * (L // STEP), panel, block, first * GROUP,
                                                end == groups, q0 + t0, rows,
                                            )  # fmt: skip

                        if wants_max or wants_sum:
                            for m in range(rows * G):
                                write_softmax(
                                    Max, Sum, top, total, m,
                                    q0, QL[b] - q0, t0 + m // G, h2 * G + m % G,
                                )  # fmt: skip
                        if wants_blocks:
                            for u in range(VECTORS):
                                for i in range(p.taps - 1):
                                    for l in T.vectorized(L):
                                        S[u, FRONT + last[0] + i, l] = zero
                                for i in range(FRONT):
                                    for l in T.vectorized(L):
                                        S[u, i, l] = zero
                            block_scores(S, inverse, score, Forced, t0, rows, last[0], keys)
                            for row in range(rows):
                                select_blocks(
                                    score, row, Indices, q0 + t0 + row, h2, p.blocks(keys)
                                )

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
