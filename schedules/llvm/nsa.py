"""NSA compressed attention with block selection for CPUs, one kernel.

    parallel(h2, key slot)                 keys and values packed
    parallel(h2, strip of tasks)
        for task of M product rows:        G heads of M / G query rows, head fastest
            attention, scores of blocks, the k best of each row
    parallel(row)                          rows after the last sequence

A key/value tile serves the whole group of heads. S of one task is all that is kept of the
probabilities: M x CmpSkv floats a thread, CmpSkv <= 14000; what selection needs is taken from there
and no product is computed twice. Groups of keys that the mask hides from all rows of a task are
skipped, and nothing is computed behind the last group that one of them sees.

Tasks are of one of two kinds: on matrix tiles of bfloat16 (``nsa_amx``, and ``nsa_split`` for other
types), or on vectors (``nsa_vector``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..intrin import x86_amx, x86_bf16
from . import nsa_amx, nsa_split
from .inline import parsers_by_frames
from .nsa_amx import TileTask
from .nsa_lengths import find_sequence, first_slot, guard, slots, start
from .nsa_records import COPIES, row_clearing
from .nsa_split import SplitTask
from .nsa_vector import VectorTask
from .vector import vector_unit

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_STRIPS = 256
"""Strips of tasks for a key/value head: enough to share among cores, few enough that a strip's
buffers are worth their allocation."""


@parsers_by_frames()
def attend_select(problem: Problem, target: Target) -> PrimFunc:
    """The kernel; its arguments are those of ``Problem``."""
    kind = _task_kind(problem, target)
    tiled = issubclass(kind, TileTask)
    task = kind(problem, target)
    p, SLOT, ROWS = problem, task.key_slot, task.query_rows
    N1, N2, D, DV = p.query_heads, p.key_heads, p.head_size, p.value_size
    mask_dtype, forced_dtype = p.atten_mask or "bool", p.topk_mask or "bool"
    check, pack_slot, attend = guard(p), task.pack(), task.attend()
    clear_row = row_clearing(p, vector_unit(target))
    sources = "".join(task.sources)
    imports = bool(sources)
    refused = ("RuntimeError", [f"{p.label}: {x86_amx.REFUSED}"])

    def position(turn, strip, strips):
        return turn * strips + T.if_then_else(turn % 2 == 0, strip, strips - 1 - strip)

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
            if imports:
                T.attr(0, x86_bf16.IMPORT, sources)
            if tiled:
                assert x86_amx.permitted(), refused
            assert B >= 1, ("ValueError", [f"{p.label}: length lists: found none, allowed B >= 1"])
            check(QL, KL, SL, B, Tq, Tk, R, C, RF, CF)

            packed = T.meta_var(task.allocate_packed(Keys, Values, B))
            for part in T.parallel(N2 * slots(Tk, B, SLOT)):
                h2: T.int64 = part // slots(Tk, B, SLOT)
                slot: T.int64 = part % slots(Tk, B, SLOT)
                found = T.alloc_buffer((2,), "int64", scope="local")
                find_sequence(found, KL, B, SLOT, slot)
                b: T.int64 = found[0]
                row: T.int64 = start(KL, b) + (slot - first_slot(KL, b, SLOT)) * SLOT
                # Keys of a sequence without queries may hold anything: nobody looks at them.
                if row < KL[b] and start(QL, b) < QL[b]:
                    pack_slot(packed, Keys, Values, h2, slot, row, T.min(KL[b] - row, SLOT))

            for part in T.parallel(N2 * T.min(slots(Tq, B, ROWS), _STRIPS)):
                tasks: T.int64 = slots(Tq, B, ROWS)
                strips: T.int64 = T.min(tasks, _STRIPS)
                h2: T.int64 = part // strips
                strip: T.int64 = part % strips
                buffers = T.meta_var(task.allocate(Tk))
                found = T.alloc_buffer((2,), "int64", scope="local")
                task.begin()
                for turn in range(T.ceildiv(tasks, strips)):
                    # Rows far back see more keys under a causal mask: to and fro.
                    place: T.int64 = position(turn, strip, strips)
                    ahead: T.int64 = position(turn + 1, strip, strips) - place
                    find_sequence(found, QL, B, ROWS, T.min(place, tasks - 1))
                    b: T.int64 = found[0]
                    q0: T.int64 = start(QL, b)
                    t0: T.int64 = (place - first_slot(QL, b, ROWS)) * ROWS
                    rows: T.int64 = T.min(QL[b] - q0 - t0, ROWS)
                    if rows > 0 and place < tasks:
                        attend(
                            buffers, packed, X, Mask, Forced, Max, Sum, Out, Indices,
                            h2, first_slot(KL, b, SLOT), start(KL, b), q0, QL[b] - q0, t0,
                            rows, KL[b] - start(KL, b), ahead * ROWS,
                        )  # fmt: skip
                task.end()

            for rest in T.parallel(Tq - QL[B - 1]):
                clear_row(Max, Sum, Out, Indices, QL[B - 1] + rest)

    used = {
        "Mask": p.atten_mask is not None,
        "Forced": p.topk_mask is not None,
        "Max": "softmax_max" in p.outputs,
        "Sum": "softmax_sum" in p.outputs,
        "Out": "attention_out" in p.outputs,
        "Indices": "topk_indices_out" in p.outputs,
    }
    return _without(attend_select, [name for name, kept in used.items() if not kept])


def _task_kind(problem: Problem, target: Target) -> type[TileTask] | type[VectorTask]:
    if nsa_amx.available(problem, target):
        return TileTask
    return SplitTask if nsa_split.available(problem, target) else VectorTask


def _without(func: PrimFunc, names: list[str]) -> PrimFunc:
    """``func`` without the parameters ``names``, which its body does not touch."""
    kept = [param for param in func.params if param.name not in names]
    return PrimFunc(kept, func.body, func.ret_type, func.attrs)
