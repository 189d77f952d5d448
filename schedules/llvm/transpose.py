"""Transposition of a square block in registers: log2(L) rounds of two-register shuffles."""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from .vector import ramp

_QUAD = 4
"""Lanes of 128 bits, within which shuffles are cheapest."""


def transpose_square(block: tir.Buffer, lanes: int) -> None:
    """Emit block[i][j] <-> block[j][i] for a local buffer [lanes][lanes], in place.

    Lanes change places within quads first, which transposes squares of 4 x 4; then quads do. No
    shuffle needs its pattern in a register.
    """
    rows = [T.Bind(tir.BufferLoad(block, [r, ramp(0, lanes)])) for r in range(lanes)]
    for first in range(0, lanes, _QUAD):
        a, b, c, d = rows[first : first + _QUAD]
        (p, q), (r, s) = (_interleave(x, y, 1, lanes) for x, y in ((a, b), (c, d)))
        columns = [*_interleave(p, r, 2, lanes), *_interleave(q, s, 2, lanes)]
        rows[first : first + _QUAD] = columns
    for k in range(_QUAD):  # rows that hold columns k, 4 + k, ...
        rows[k::_QUAD] = _transpose_quads(rows[k::_QUAD], lanes)
    for r, row in enumerate(rows):
        T.buffer_store(block, row, [r, ramp(0, lanes)])


def _interleave(a: Expr, b: Expr, step: int, lanes: int) -> list[Expr]:
    """The lower halves of each quad of a and b by turns of ``step`` lanes, and the upper ones."""
    half = _QUAD // 2
    return [
        _shuffle(
            a,
            b,
            [
                operand * lanes + quad + first + turn + k
                for quad in range(0, lanes, _QUAD)
                for turn in range(0, half, step)
                for operand in range(2)
                for k in range(step)
            ],
        )
        for first in (0, half)
    ]


def _transpose_quads(rows: list[Expr], lanes: int) -> list[Expr]:
    """Quad j of row i becomes quad i of row j."""
    if len(rows) == 1:
        return rows
    if len(rows) == 2:
        return [_quads(*rows, [(0, k), (1, k)], lanes) for k in range(2)]
    a, b, c, d = rows
    columns = []
    for first in (0, 2):
        pair = [(operand, first + k) for operand in range(2) for k in range(2)]
        left, right = _quads(a, b, pair, lanes), _quads(c, d, pair, lanes)
        for odd in range(2):
            pick = [(operand, 2 * k + odd) for operand in range(2) for k in range(2)]
            columns.append(_quads(left, right, pick, lanes))
    return columns


def _quads(a: Expr, b: Expr, picks: list[tuple[int, int]], lanes: int) -> Expr:
    """Those quads (operand, place) of a and b."""
    return _shuffle(a, b, [o * lanes + q * _QUAD + k for o, q in picks for k in range(_QUAD)])


def _shuffle(a: Expr, b: Expr, lanes: list[int]) -> Expr:
    return T.Bind(tir.Shuffle([a, b], lanes))
