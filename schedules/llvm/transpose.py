"""Transposition of a square block in registers: log2(L) rounds of two-register shuffles."""

from __future__ import annotations

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .vector import ramp


def transpose_square(block: tir.Buffer, lanes: int) -> None:
    """Emit block[i][j] <-> block[j][i] for a local buffer [lanes][lanes], in place.

    Round with distance h exchanges, in each pair of rows h apart, the upper right and lower left
    h x h squares.
    """
    distance = lanes // 2
    while distance:
        picks = [k for k in range(lanes) if not k & distance]
        low = [k if not k & distance else lanes + (k ^ distance) for k in range(lanes)]
        high = [(k | distance) if not k & distance else lanes + k for k in range(lanes)]
        for r in picks:
            a = T.Bind(tir.BufferLoad(block, [r, ramp(0, lanes)]))
            b = T.Bind(tir.BufferLoad(block, [r + distance, ramp(0, lanes)]))
            T.buffer_store(block, tir.Shuffle([a, b], low), [r, ramp(0, lanes)])
            T.buffer_store(block, tir.Shuffle([a, b], high), [r + distance, ramp(0, lanes)])
        distance //= 2
