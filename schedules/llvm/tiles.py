"""The last step of a tiled kernel's schedule, which the schedule primitives cannot take: one
parallel loop over all tiles, and a body for each height that the last tile of rows may have.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.s_tir import MatchBufferRegion
from tvm.tirx import For, ForKind, IfThenElse, IterVar, PrimFunc, Stmt
from tvm_ffi import get_global_func, structural_map, structural_walk

NEST = "opferry.tile_nest"
"""Annotates the outermost of three nested loops: batch, panel of columns, tile of rows."""
ROW = "opferry.tile_row"
"""Annotates every loop over the rows inside a tile."""


def parallel_tiles(func: PrimFunc, m: Expr, rows: int, heights: Sequence[int]) -> PrimFunc:
    """Turn the loops marked `NEST` into

        parallel f in batch * panels * row tiles:
            for one z, one no, one mo of f:
                if at least ``rows`` of the ``m`` rows are left: the body
                else: the body with its `ROW` loops cut to the least of ``heights`` that suffices

    The loops over one value keep the tile's position a plain variable: with the quotients and
    remainders of f in its place, TVM does not see that a tile's buffers are indexed by constants,
    and they would live in memory instead of registers.
    """

    def merge(loop: For) -> For:
        if NEST not in loop.annotations:
            return loop
        loops = [loop, loop.body, loop.body.body]
        tile = loops[-1].loop_var
        body = _by_height(loops[-1].body, m - tile * rows, rows, _reachable(m, rows, heights))
        f = tirx.Var("tile", "int64")
        zero, one = tirx.const(0, "int64"), tirx.const(1, "int64")
        index, count = f, one
        for axis in reversed(loops):
            value = zero if _is(axis.extent, 1) else tirx.truncmod(index, axis.extent)
            body = For(axis.loop_var, value, one, ForKind.SERIAL, body)
            index, count = tirx.truncdiv(index, axis.extent), count * axis.extent
        return For(f, zero, count, ForKind.PARALLEL, body)

    return func.with_body(structural_map(func.body, (For, merge)))


def _is(extent: Expr, value: int) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent.value) == value


def _reachable(m: Expr, rows: int, heights: Sequence[int]) -> list[int]:
    """The heights that some tile may need, ascending."""
    if not isinstance(m, tirx.IntImm):
        return sorted(height for height in heights if height < rows)
    rest = int(m.value) % rows
    return [min(height for height in (*heights, rows) if height >= rest)] if rest else []


def _by_height(body: Stmt, left: Expr, rows: int, heights: Sequence[int]) -> Stmt:
    """``body`` where ``left`` >= rows, its shortest sufficient form elsewhere."""
    short = body
    for height in reversed(heights):
        short = IfThenElse(left <= height, _cut(body, height), short)
    return IfThenElse(left >= rows, body, short) if heights else body


def _cut(body: Stmt, height: int) -> Stmt:
    """A copy of ``body``, its `ROW` loops cut to ``height``, with variables of its own: TVM's
    analyser holds one range for each variable.
    """

    def cut(loop: For) -> For:
        if ROW not in loop.annotations:
            return loop
        extent = tirx.const(height, "int64")
        return For(loop.loop_var, loop.min, extent, loop.kind, loop.body)

    inner = set()

    def matched(region: MatchBufferRegion) -> None:
        inner.add(region.buffer)
        structural_walk(region.buffer.ty, (Var, inner.add))

    structural_walk(
        body, ((IterVar, lambda axis: inner.add(axis.var)), (MatchBufferRegion, matched))
    )
    outer = [var for var in tirx.analysis.undefined_vars(body) if var not in inner]
    copy = get_global_func("s_tir.RenewDefs")(PrimFunc(outer, structural_map(body, (For, cut))))
    original = dict(zip(copy.params, outer))
    return structural_map(copy.body, (Var, lambda var: original.get(var, var)))
