"""The second kernel of divided keys: one block puts the parts of a query row together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ..intrin import cuda
from .attention_place import float32, inverse_sum, named, store_records

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem

_THREADS = 64


def combine(problem: AttentionProblem, buffers: dict[str, tir.Buffer], splits: Expr) -> None:
    """attention_out, softmax_max, softmax_sum from ``part_max``, ``part_sum`` [splits][records] and
    ``part_out`` [splits][records][D]; record number (b * N1 + n) * S1 + i. Parts are added in the
    order of their keys.
    """
    p = problem
    part_max, part_sum = buffers["part_max"], buffers["part_sum"]
    S1, unit = p.S1, attention.unit_of_scores(p.pse)
    with (
        T.thread_binding(part_max.shape[1].astype("int32"), "blockIdx.x") as record,
        T.thread_binding(_THREADS, "threadIdx.x") as thread,
        T.sblock("combine"),
    ):
        T.reads()
        T.writes()
        b, n, i = named(record // (p.N1 * S1)), named(record // S1 % p.N1), named(record % S1)
        state = T.alloc_buffer((4,), scope="local")  # maximum, sum, factor, element

        def below(s: Expr) -> Expr:
            """The maximum of part s less that of all parts."""
            return attention.difference_in_ln2(part_max[s, record] - state[0], unit)

        T.buffer_store(state, float32(attention.EMPTY_ROW_MAX), [0])
        T.buffer_store(state, float32(0), [1])
        with T.serial(splits) as s:
            T.buffer_store(state, tir.max(state[0], part_max[s, record]), [0])
        with T.serial(splits) as s:
            cuda.exp2(state[2], below(s))
            T.buffer_store(state, state[1] + part_sum[s, record] * state[2], [1])
        if "attention_out" in p.outputs:
            out = buffers["attention_out"]
            inverse = named(inverse_sum(p, state[1]))
            with T.serial(-(-p.D // _THREADS)) as strip:
                d = named(strip * _THREADS + thread)
                with T.If(d < p.D), T.Then():
                    T.buffer_store(state, float32(0), [3])
                    with T.serial(splits) as s:
                        cuda.exp2(state[2], below(s))
                        element = buffers["part_out"][s, record, d] * state[2]
                        T.buffer_store(state, state[3] + element, [3])
                    index = attention.element(p.layout, p.D, b, n, i, d)
                    T.buffer_store(out, (state[3] * inverse).astype(p.dtype), index)
        with T.If(thread < attention.SOFTMAX_REPEATS), T.Then():
            store_records(p, buffers, [b, n, i], state[0], state[1], thread, 1)
