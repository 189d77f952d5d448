"""Outputs of the NSA kernel on matrix tiles: divided by the sums of weights, rounded and stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_bf16
from .attention_operands import BLOCK, SIDE
from .vector import from_float32, load_lanes, ramp

if TYPE_CHECKING:
    from .nsa_amx import TileTask


def store_rows(task: TileTask, w, Out, at, step, first, rows) -> None:
    """Outputs of ``rows`` rows of a step."""
    p = task.problem
    G, DV = p.group, p.value_size
    block, strip = T.Bind(step // task.strips), T.Bind(step % task.strips)
    count = tir.min(at.rows * G - block * BLOCK - first, rows)
    with T.serial(tir.max(count, 0)) as n:
        r = T.Bind(first + n)
        m = T.Bind(block * BLOCK + r)
        index = [at.token + m // G, at.h2 * G + m % G]
        inverse = T.Bind(task.output_factor(w.inverse[m]))
        for side in range(2):
            column = strip * BLOCK + side * SIDE
            x = load_lanes(w.O, [step % 2, r, side * SIDE], SIDE)
            whole = _to_storage(task, T.Bind(x * tir.Broadcast(inverse, SIDE)))
            if DV % BLOCK == 0:
                _store_whole(task, Out, index, column, whole)
                continue
            with T.If(column + SIDE <= DV):
                with T.Then():
                    T.buffer_store(Out, whole, [*index, ramp(column, SIDE)])
                with T.Else(), T.serial(tir.max(DV - column, 0)) as c:
                    x = T.Bind(w.O[step % 2, r, side * SIDE + c] * inverse)
                    T.buffer_store(Out, from_float32(x, p.dtype, task.unit), [*index, column + c])


def _store_whole(task: TileTask, Out, index, first: Expr, x: Expr) -> None:
    with T.If(task.stream.wanted(Out)):
        with T.Then():
            T.evaluate(task.stream.store(Out, [*index, first], x))
        with T.Else():
            T.buffer_store(Out, x, [*index, ramp(first, SIDE)])


def _to_storage(task: TileTask, x: Expr) -> Expr:
    if task.rounds:
        return tir.reinterpret(f"bfloat16x{SIDE}", x86_bf16.round_bits(x))
    return from_float32(x, task.problem.dtype, task.unit)
