"""What the NSA kernel writes besides attention: softmax records, and rows that no sequence owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T

from ...relay_ops.attention import LN2
from .nsa_tile import FLT_MAX
from .vector import VectorUnit, from_float32

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

COPIES = 8
"""How often softmax_max and softmax_sum repeat a row's value."""


def record_writing(problem: Problem):
    """An inline ``write_softmax(Max, Sum, top, total, m, q0, length, t, h)``: the records of
    product row m, which is row t, head h of the sequence of ``length`` rows at q0. top [m] is its
    maximum in units of ln 2, -FLT_MAX without a visible key.
    """
    p = problem
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    low = T.float32(-FLT_MAX)

    @T.inline
    def write_softmax(Max, Sum, top, total, m, q0, length, t, h):
        if wants_max:
            for l in T.vectorized(COPIES):
                Max[(*p.softmax_record(q0, length, t, h), l)] = T.if_then_else(
                    top[m] == low, low, top[m] * T.float32(LN2)
                )
        if wants_sum:
            for l in T.vectorized(COPIES):
                Sum[(*p.softmax_record(q0, length, t, h), l)] = total[m]

    return write_softmax


def row_clearing(problem: Problem, unit: VectorUnit):
    """An inline ``clear_row(Max, Sum, Out, Indices, token)``: the outputs of a row that no sequence
    owns.
    """
    p, zero = problem, T.float32(0)
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs

    @T.inline
    def clear_row(Max, Sum, Out, Indices, token):
        for h in range(p.query_heads):
            if wants_max:
                for l in T.vectorized(COPIES):
                    Max[token, h, l] = zero
            if wants_sum:
                for l in T.vectorized(COPIES):
                    Sum[token, h, l] = zero
            if wants_out:
                for c in range(p.value_size):
                    Out[token, h, c] = from_float32(zero, p.dtype, unit)
        if wants_blocks:
            for h2 in range(p.key_heads):
                for place in range(p.block_count):
                    Indices[token, h2, place] = -1

    return clear_row
