"""Tasks of the NSA kernel on vector registers: the statements between their products.

        columns of the mask            is a key visible to any row, to all rows
        Q transposed                   [channel][M]
        for key group that a row sees: S = scale * Q . K, running maximum        (``nsa_tile``)
        for chunk of keys:
            S = exp(S - M), L += S
            for channel panel, block of rows: O += S . V
        O / L, M, L
        scores of blocks, the k best of each row                                 (``nsa_select``)

Factors of the products are float32, or bfloat16 where storage and target have it: then neighbours
along the reduction (channels of Q and K, keys of P and V) lie in pairs, whose two products one
instruction adds to a float32 lane. M, L and the scores come from float32 weights either way.
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir

from ..intrin import x86_bf16
from .nsa_lengths import slots
from .nsa_pack import packing
from .nsa_records import record_writing
from .nsa_select import WIDTH, scoring, selection
from .nsa_tile import FLT_MAX, Task
from .vector import load_lanes, max_lanes


class VectorTask(Task):
    """What ``nsa`` asks of a kind of task."""

    @property
    def sources(self) -> list[str]:
        """LLVM text that the kernel needs."""
        return [x86_bf16.SOURCE] * self.paired + self.stream.sources

    @property
    def key_slot(self) -> int:
        """Keys that are packed together."""
        return self.tiles.lanes

    def begin(self) -> None:
        """Before the tasks of a thread."""

    def end(self) -> None:
        """After them."""
        self.stream.end()

    def allocate_packed(self, Keys: Buffer, Values: Buffer, sequences: Expr) -> SimpleNamespace:
        """K and V of ``pack``."""
        t, N2 = self.tiles, self.problem.key_heads
        rows = slots(Keys.shape[0], sequences, t.lanes) * t.lanes
        # Tiles of scores read up to a whole group of keys, and do not use the rest.
        return SimpleNamespace(
            K=ir.alloc_buffer((N2, rows + t.group, self.channels), self.factor),
            V=ir.alloc_buffer((N2, self.panels, rows // self.step, t.panel), self.factor),
        )

    def pack(self):
        return packing(self)

    def allocate(self, key_tokens: Expr) -> SimpleNamespace:
        """The buffers of a thread."""
        t, L, M = self.tiles, self.tiles.lanes, self.tiles.height
        keys = most_groups(self, key_tokens) * t.group
        margin = t.group + self.problem.taps
        S = ir.alloc_buffer((M // L, self.front + keys + margin, L), "float32")

        def local(shape, dtype="float32"):
            return ir.alloc_buffer(shape, dtype, scope="local")

        return SimpleNamespace(
            S=S,
            E=ir.alloc_buffer((M // L, self.chunk // 2, L), "uint32") if self.paired else S,
            score=ir.alloc_buffer((self.query_rows, keys + WIDTH), "float32"),
            hide=ir.alloc_buffer((keys,), "uint8"),
            some=ir.alloc_buffer((keys,), "uint8"),
            live=ir.alloc_buffer((most_groups(self, key_tokens),), "int32"),
            Q=local((self.channels, M), self.factor),
            O=local((M // t.rows, self.panels, t.rows, t.panel)),
            caps=local((t.group, M)),
            top=local((M,)),
            base=local((M,)),
            total=local((M,)),
            inverse=local((M,)),
            runs=local((self.chunk // t.group, 2), "int64"),
            count=local((1,), "int64"),
            last=local((1,), "int64"),
        )

    def attend(self):
        return _attending(self)


def most_groups(task: Task, key_tokens: Expr) -> Expr:
    """Groups of the longest sequence that there may be."""
    return T.ceildiv(T.min(key_tokens, task.problem.cmp_skv_limit), task.tiles.group)


def _attending(task: Task):
    """An inline ``attend(w, packed, X, Mask, Forced, Max, Sum, Out, Indices, h2, slot, k0, q0,
    length, t0, rows, keys, ahead)``: ``rows`` query rows from t0 on of the sequence that has
    ``length`` of them from packed row q0 on, and ``keys`` keys from ``slot`` on, from packed row k0
    on where they come from; all heads of key head h2.

    w holds the buffers of ``allocate``, packed those of ``allocate_packed``. The thread's next task
    is ``ahead`` query rows further on, unless a sequence ends.
    """
    p, t = task.problem, task.tiles
    G, L, M, GROUP, KEYS = p.group, t.lanes, t.height, t.group, t.keys
    VECTORS, STRIP, ROWS = M // L, t.strip, task.query_rows
    STEP, CHUNK, FRONT = task.step, task.chunk // GROUP, task.front
    PANELS = task.panels
    has_mask = p.atten_mask is not None
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs
    wants_weights = wants_sum or wants_out or wants_blocks
    load_queries, score_tile = task.load_queries(), task.scores()
    weigh, value_tile, fetch_queries = task.weights(), task.outputs(), task.fetch_queries()
    block_scores, select_blocks = scoring(p, L, M, FRONT), selection(p, L)
    write_softmax = record_writing(p)
    low, zero, one = T.float32(-FLT_MAX), T.float32(0), T.float32(1)
    inf = T.float32(float("inf"))

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
    def attend(
        w,
        packed,
        X,
        Mask,
        Forced,
        Max,
        Sum,
        Out,
        Indices,
        h2,
        slot,
        k0,
        q0,
        length,
        t0,
        rows,
        keys,
        ahead,
    ):
        if has_mask:
            scan_mask(w.hide, w.some, Mask, t0, rows, keys)
        find_live(w.live, w.last, w.hide, w.some, keys)
        load_queries(w.Q, X, q0 + t0, rows, h2)
        score_groups(
            w.Q, packed.K, w.S, w.top, w.caps, w.live, Mask, h2, slot * L, t0, rows, w.last[0], keys
        )
        if has_mask and not p.zero_masked_rows:
            uncover(w.S, w.top, w.live, w.last, keys)
        set_base(w.base, w.top)
        for m in T.vectorized(M):
            w.total[m] = zero

        if wants_weights:
            groups: T.int64 = T.ceildiv(w.last[0], GROUP)
            # Without keys one empty chunk still clears O.
            for chunk in range(T.max(T.ceildiv(groups, CHUNK), 1)):
                first: T.int64 = chunk * CHUNK
                end: T.int64 = T.min(groups, first + CHUNK)
                find_runs(w.runs, w.count, w.live, w.S, first, end, w.last[0])
                weigh(w.S, w.E, w.runs, w.count[0], w.base, w.total, first * GROUP)
                for m in T.vectorized(M):
                    w.inverse[m] = T.Select(w.total[m] > zero, one / w.total[m], zero)
                if wants_out:
                    for panel in range(PANELS):
                        for block in range(T.ceildiv(rows * G, t.rows)):
                            if chunk == 0:
                                fetch_queries(X, q0 + t0 + ahead, h2, block, panel)
                            value_tile(
                                w.E, packed.V, w.O, Out, w.inverse, w.runs, w.count[0], h2,
                                slot * (L // STEP), panel, block, first * GROUP,
                                end == groups, q0 + t0, rows,
                            )  # fmt: skip

        if wants_max or wants_sum:
            for m in range(rows * G):
                write_softmax(Max, Sum, w.top, w.total, m, q0, length, t0 + m // G, h2 * G + m % G)
        if wants_blocks:
            for u in range(VECTORS):
                for i in range(p.taps - 1):
                    for l in T.vectorized(L):
                        w.S[u, FRONT + w.last[0] + i, l] = zero
                for i in range(FRONT):
                    for l in T.vectorized(L):
                        w.S[u, i, l] = zero
            block_scores(w.S, w.inverse, w.score, Forced, t0, rows, w.last[0], keys)
            for row in range(rows):
                select_blocks(w.score, row, Indices, q0 + t0 + row, h2, p.blocks(keys))

    return attend
