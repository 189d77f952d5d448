"""The int8 matmul on a CPU. Expects the blocks of ``relay_ops.int8_matmul``: ``pack_a``, ``dot``,
``epilogue``, ``store``; leaves

    parallel row:                             all of A, packed once
        pack_a
    parallel (batch, block, row tile, panel): a block of panels of B stays in the second-level cache
        prefetch the tile of the output
        by the rows that are left:            whole tiles, and shorter ones for the last
            dot_init                          rows x NB int32, in registers
            for k group:
                prefetch groups of the panel to come
                unrolled rows x vectors:      one tensorized dot product each
            epilogue, store                   from registers to the output, vectorised

No int32 matrix reaches memory. Where NB does not divide N the last panel is computed whole, into a
thread-local tile, and only its valid columns are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm import DataType, s_tir, tirx
from tvm.ir import Expr
from tvm.target import Target
from tvm.tirx import IntImm, PrimFunc, Stmt

from ..intrin import x86
from ..tile import ROWS, Tile
from . import gemm_amx, tiles

_LINE_BYTES = 64


@dataclass(frozen=True)
class GemmConfig:
    """Tunables of one instruction tier."""

    rows: int
    """Rows of the register tile."""
    vectors: int
    """Registers of B across the register tile."""
    heights: tuple[int, ...] = (1, 2, 4, 6, 8)
    """Rows of the shorter tiles that may end a run of rows."""
    block_bytes: int = 256 * 1024
    """Panels of B that every tile of rows meets in turn: they, a tile of A and the lines of the
    output share the second-level cache.
    """
    unrolled: int = 1
    """Groups of k in an iteration, where they divide those of K; more if `streams` ask for it."""
    ahead: int = 16
    """Groups of k by which a panel of B is asked for, from the second-level cache to the first,
    before it is used; 0: left to the hardware.
    """
    streamed_bytes: int = 4 << 20
    """A matrix of B of so many bytes or more is not in the caches of the cores: with few rows of A,
    the whole next panel is asked for instead, from memory to the second-level cache.
    """
    streamed_rows: int = 32
    """Of A, up to which that is done: with more, products take longer than memory does."""
    streams: int = 8
    """Parts of that panel that are asked for at a time."""


CONFIGS = {
    # rows * vectors accumulators, vectors of B and one of A must fit the register file.
    x86.VNNI_512: GemmConfig(rows=12, vectors=2, unrolled=4),
    x86.VNNI_256: GemmConfig(rows=6, vectors=2),
    x86.AVX512BW: GemmConfig(rows=12, vectors=2),
    x86.AVX2: GemmConfig(rows=6, vectors=2),
    x86.PORTABLE: GemmConfig(rows=2, vectors=1, ahead=0),
}


def tile(target: Target, m: object, n: int, panel: int | None = None) -> Tile:
    """Register tile for an ``m`` x ``n`` product (``m`` may be symbolic); ``panel`` fixes the
    columns that consecutive memory of the output holds.
    """
    dot = x86.pick(target)
    if dot is x86.AMX:
        return gemm_amx.tile(n, panel)
    config = CONFIGS[dot]
    vectors = min(config.vectors, -(-n // dot.lanes))
    cols = panel or vectors * dot.lanes
    rows = config.rows * config.vectors * dot.lanes // cols
    if isinstance(m, int):  # equal tiles: 13 rows are 7 + 7, not 12 + 12
        rows = -(-m // -(-m // rows))
    return Tile(rows, cols, dot)


def schedule(func: PrimFunc, target: Target) -> PrimFunc:
    """Schedule of the packed int8 matmul."""
    dot = x86.pick(target)
    sch = s_tir.Schedule(func)
    pack, acc = sch.get_sblock("pack_a"), sch.get_sblock("dot")
    epilogue, store = sch.get_sblock("epilogue"), sch.get_sblock("store")

    z, m, no, ni, ko, ki = sch.get_loops(acc)
    rows, cols = int(func.attrs[ROWS]), _extent(sch, ni)
    mo, mi = sch.split(m, [None, rows])
    nv, nl = sch.split(ni, [None, dot.lanes])
    sch.reorder(z, no, mo, ko, mi, nv, nl, ki)
    sch.set_scope(acc, 0, "local")

    # Loops of these blocks inside a tile: one for each axis of what they compute.
    whole_panels = _extent(sch, sch.get_loops(store)[-1]) % cols == 0
    for block in (epilogue, store):
        if block is epilogue and whole_panels:
            sch.compute_inline(epilogue)
            continue
        axis = 1 if block is epilogue else len(sch.get_loops(store)) - 2
        sch.reverse_compute_at(block, mo, preserve_unit_loops=True)
        row, col = (sch.get_loops(block)[3:][i] for i in (axis, -1))
        sch.annotate(row, tiles.ROW, 1)
        if block is store and not whole_panels:
            continue
        col, lane = sch.split(col, [None, dot.lanes])
        sch.unroll(row)
        sch.unroll(col)
        sch.vectorize(lane)
    if not whole_panels:
        sch.set_scope(epilogue, 0, "local")

    config, b, y = CONFIGS[dot], func.params[1], func.params[-1]
    panels, *panel = map(int, b.ty.shape[1:])
    groups, panel_bytes, m = panel[0], prod(panel), y.ty.shape[-2]
    few = isinstance(m, IntImm) and int(m.value) <= config.streamed_rows
    asks = config.ahead > 0 and isinstance(b.ty.shape[0], IntImm) and int(b.ty.shape[0]) == 1
    streamed = asks and few and panels * panel_bytes >= config.streamed_bytes
    group_bytes = panel_bytes // groups
    unrolled = config.streams * _LINE_BYTES // group_bytes if streamed else config.unrolled
    if streamed and groups % unrolled:
        unrolled, streamed = config.unrolled, False
    if groups % unrolled:
        unrolled = 1
    if unrolled > 1:
        ko, part = sch.split(ko, [None, unrolled])
        sch.unroll(part)
    sch.annotate(ko, tiles.STEP, 1)
    sch.annotate(mi, tiles.ROW, 1)
    sch.unroll(mi)
    sch.unroll(nv)
    if dot.intrin:
        init = sch.decompose_reduction(acc, ko)
        sch.vectorize(sch.get_loops(init)[-1])
        sch.tensorize(nl, dot.intrin)
    else:
        sch.reorder(ki, nl)
        sch.vectorize(nl)
        init = sch.decompose_reduction(acc, ko)
    sch.parallel(sch.fuse(*sch.get_loops(pack)[:2]))

    # Rows of A an odd number of cache lines apart: rows of 4 KiB would share one set of the cache.
    line = _LINE_BYTES * 8 // DataType(dot.a_dtype).bits
    if groups * dot.group >= 8 * line:
        sch.storage_align(pack, 0, 1, 2 * line, line)

    for level, loop in enumerate((z, no, mo)):
        sch.annotate(loop, tiles.NEST, level)
    sch.annotate(sch.get_loops(init)[3], tiles.ROW, 1)

    def prefetch_tile(z: Expr, no: Expr, mo: Expr) -> Stmt:
        return tiles.prefetch_rows(y, [z], mo * rows, rows, no * cols, cols)

    zero = tirx.const(0, "int64")

    def prefetch_groups(no: Expr, step: Expr) -> Stmt:
        return tiles.prefetch_groups(b, [zero, no], step * unrolled + config.ahead, unrolled)

    def prefetch_panel(no: Expr, step: Expr) -> Stmt:
        step_bytes = group_bytes * unrolled
        lines = tiles.prefetch_panel(b, [zero, no + 1], step, step_bytes, config.streams)
        return tiles.sequence(lines)

    block = min(panels, max(1, config.block_bytes // panel_bytes))
    apart = len(y.ty.shape) == 3  # in COL32 the rows of a tile lie one after the other
    each_step = prefetch_panel if streamed else prefetch_groups
    return tiles.parallel_tiles(
        sch.mod["main"],
        m,
        rows,
        config.heights,
        block,
        before=prefetch_tile if apart else None,
        each_step=each_step if asks else None,
    )


def schedule_plain(func: PrimFunc, _: Target) -> PrimFunc:
    """Rows in parallel; for products whose N or K is only known at the call."""
    sch = s_tir.Schedule(func)
    acc, store = sch.get_sblock("dot"), sch.get_sblock("store")
    sch.parallel(sch.fuse(*sch.get_loops(store)[:2]))
    sch.parallel(sch.fuse(*sch.get_loops(acc)[:2]))
    return sch.mod["main"]


def schedule_pack_weight(func: PrimFunc, _: Target) -> PrimFunc:
    """Panels in parallel, each written front to back."""
    sch = s_tir.Schedule(func)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("pack_weight"))[:2]))
    return sch.mod["main"]


def _extent(sch: s_tir.Schedule, loop) -> int:
    extent = sch.get(loop).extent
    assert isinstance(extent, IntImm), f"found a loop of extent {extent}, expected a constant"
    return int(extent.value)
