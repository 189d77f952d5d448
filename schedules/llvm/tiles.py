"""The last step of a tiled kernel's schedule, which the schedule primitives cannot take: one
parallel loop over all tiles, and a body for each height that the last tile of rows may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import DataType, IRModule, s_tir, tirx
from tvm.ir import Expr, Var
from tvm.ir.transform import Sequential
from tvm.s_tir import MatchBufferRegion, SBlock
from tvm.tirx import For, ForKind, IfThenElse, IterVar, PrimFunc, SeqStmt, Stmt
from tvm_ffi import get_global_func, structural_map, structural_walk

NEST = "opferry.tile_nest"
"""Annotates three nested loops with 0, 1, 2: batch, panel of columns, tile of rows."""
ROW = "opferry.tile_row"
"""Annotates every loop over the rows inside a tile."""
STEP = "opferry.tile_step"
"""Annotates the loop over the reduction inside a tile."""


def parallel_tiles(
    func: PrimFunc,
    m: Expr,
    rows: int,
    heights: Sequence[int],
    block: int,
    before: Callable[[Expr, Expr, Expr], Stmt] | None = None,
    each_step: Callable[[Expr, Expr], Stmt] | None = None,
) -> PrimFunc:
    """Turn the loops marked `NEST` into

        parallel f in batch * blocks of ``block`` panels * row tiles * panels of the block:
            for one z, one no, one mo of f:
                before(z, no, mo)
                if at least ``rows`` of the ``m`` rows are left: the body
                else: the body with its `ROW` loops cut to the least of ``heights`` that suffices

    where each iteration of the `STEP` loop begins with each_step(no, its variable).

    A thread's run of f goes through the panels of a block for one tile of rows, then for the next:
    the block stays in the cache, and neighbouring tiles of the output are written in turn.

    The loops over one value keep the tile's position a plain variable, as TVM's analysis of the
    indices inside wants it.
    """
    func = _compact(func)

    def merge(loop: For) -> For:
        if NEST not in loop.annotations or int(loop.annotations[NEST]) != 0:
            return loop
        loops = [loop, loop.body, loop.body.body]
        z, no, mo = (axis.loop_var for axis in loops)
        body = loops[-1].body
        if each_step is not None:
            body = _at_each_step(body, lambda step: each_step(no, step))
        if before is not None:
            body = SeqStmt([before(z, no, mo), body])
        body = _by_height(body, m - mo * rows, rows, _reachable(m, rows, heights))
        f = tirx.Var("tile", "int64")
        zero, one = tirx.const(0, "int64"), tirx.const(1, "int64")
        batch, panels, tiles = (axis.extent for axis in loops)
        for axis, index in zip(reversed(loops), _position(f, batch, panels, tiles, block)):
            body = For(axis.loop_var, index, one, ForKind.SERIAL, body)
        return For(f, zero, batch * panels * tiles, ForKind.PARALLEL, body)

    return func.with_body(structural_map(func.body, (For, merge)))


def _compact(func: PrimFunc) -> PrimFunc:
    """``func`` with every buffer of a tile as small as a tile, allocated by the outermost block.

    TVM would do it later, but not see that the tiles of two bodies are equally small.
    """
    passes = s_tir.transform
    module = Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
        ]
    )(IRModule({"main": func}))
    tiles: list[Var] = []

    def lift(block: SBlock) -> SBlock:
        if block.name_hint == "root":
            return _with_buffers(block, [*block.alloc_buffers, *tiles])
        tiles.extend(block.alloc_buffers)
        return _with_buffers(block, [])

    func = module["main"]
    return func.with_body(structural_map(func.body, (SBlock, lift)))


def _with_buffers(block: SBlock, buffers: Sequence[Var]) -> SBlock:
    return SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        block.body,
        block.init,
        buffers,
        block.match_buffers,
        block.annotations,
    )


def _at_each_step(body: Stmt, first: Callable[[Expr], Stmt]) -> Stmt:
    """``body`` with first(its variable) at the beginning of the loop marked `STEP`."""

    def extend(loop: For) -> For:
        if STEP not in loop.annotations:
            return loop
        step = SeqStmt([first(loop.loop_var), loop.body])
        return For(loop.loop_var, loop.min, loop.extent, loop.kind, step)

    return structural_map(body, (For, extend))


def _position(f: Expr, batch: Expr, panels: Expr, tiles: Expr, block: int) -> list[Expr]:
    """(mo, no, z) of task f; the last block has the panels that are left."""
    z = tirx.const(0, "int64")
    if not _is(batch, 1):
        z, f = tirx.truncdiv(f, panels * tiles), tirx.truncmod(f, panels * tiles)
    if block == 1:
        return [tirx.truncmod(f, tiles), tirx.truncdiv(f, tiles), z]
    first = tirx.truncdiv(f, tiles * block) * block
    width = tirx.min(panels - first, tirx.const(block, "int64"))
    f = f - first * tiles
    return [tirx.truncdiv(f, width), first + tirx.truncmod(f, width), z]


def prefetch_rows(
    buffer: Expr, head: Sequence[Expr], row: Expr, rows: int, col: Expr, cols: int
) -> For:
    """Ask for ``buffer[*head, row : row + rows, col : col + cols]`` for writing.

    A store that misses waits for its line, stores retire in order, and rows of a tile that are a
    multiple of 4 KiB apart compete for the same sets: asked for ahead of the arithmetic, the lines
    are there when the tile is done. Rows beyond the end do no harm.
    """
    i = tirx.Var("row", "int64")
    zero = tirx.const(0, "int64")
    step = _LINE_BITS // DataType(buffer.ty.dtype).bits
    columns = range(0, cols, step)
    body = sequence([_ask(buffer, [*head, row + i, col + at], _FOR_WRITING) for at in columns])
    extent = tirx.const(rows, "int64")
    return For(i, zero, extent, ForKind.UNROLLED, body, annotations={ROW: tirx.const(1, "int32")})


def prefetch_groups(buffer: Expr, head: Sequence[Expr], group: Expr, groups: int) -> Stmt:
    """Ask for ``buffer[*head, group : group + groups]``, int8 [..., K/G, NB, G], for reading.

    The end of a panel leads into the next one; beyond the last it does no harm.
    """
    cols, depth = map(int, buffer.ty.shape[-2:])
    step = _LINE_BITS // DataType(buffer.ty.dtype).bits
    lines = []
    for at in range(0, groups * cols * depth, step):
        ahead, col = divmod(at // depth, cols)
        place = [*head, group + ahead, tirx.const(col, "int64"), tirx.const(0, "int64")]
        lines.append(_ask(buffer, place, _FOR_READING))
    return sequence(lines)


def prefetch_panel(
    buffer: Expr, head: Sequence[Expr], step: Expr, step_bytes: int, streams: int
) -> list[Stmt]:
    """Ask for panel ``buffer[*head]``, int8 [..., K/G, NB, G], into the second-level cache; a step
    for its share of ``step_bytes``, in up to ``streams`` parts of the panel side by side.

    Memory serves several streams faster than one, which prefetchers begin anew at every page. A
    panel beyond the last one does no harm.
    """
    groups, cols, depth = map(int, buffer.ty.shape[-3:])
    line_bytes = _LINE_BITS // 8
    lines = step_bytes // line_bytes
    streams = min(streams, lines)
    lines, part = lines // streams, groups * cols * depth // streams
    statements = []
    for stream in range(streams):
        for line in range(lines):
            at = step * (lines * line_bytes) + (stream * part + line * line_bytes)
            group = tirx.truncdiv(at, tirx.const(cols * depth, "int64"))
            col = tirx.truncdiv(at - group * (cols * depth), tirx.const(depth, "int64"))
            place = [*head, group, col, tirx.const(0, "int64")]
            statements.append(_ask(buffer, place, _TO_SECOND_LEVEL))
    return statements


def _ask(buffer: Expr, place: Sequence[Expr], how: tuple[int, int, int]) -> Stmt:
    address = tirx.address_of(tirx.BufferLoad(buffer, place))
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *how))


def sequence(statements: Sequence[Stmt]) -> Stmt:
    return SeqStmt(statements) if len(statements) > 1 else statements[0]


_LINE_BITS = 512
_FOR_READING = (0, 3, 1)
_FOR_WRITING = (1, 3, 1)
_TO_SECOND_LEVEL = (0, 2, 1)
"""Operands of ``llvm.prefetch``: read or write; into all caches, or not the first; data."""


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
