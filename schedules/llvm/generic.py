"""Schedules for the standard operators around ours, as TVM's legalisation writes them.

No rule knows an operator: they look at loops, in this order, and each leaves one nest.

Columns      MatMul, ReduceSum over a leading axis: what is reduced is contiguous along the output
             parallel(outer) { unroll(rows) x reduction x vectorised columns, in registers }
Rows         LayerNormalization, Softmax, ReduceMax, and what `driver.fuse_rows` joins to them: what
             is reduced is contiguous itself
             parallel(rows) { each block for one row; lane-wise partial reductions, vectorised, and
             folded by `row_lanes` }
Elementwise  parallel(outer) { vectorised inner }

A function that fits none is left as it is: serial, and correct.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, Schedule, ScheduleError
from tvm.s_tir.dlight.analysis import SBlockInfo, normalize_prim_func
from tvm.s_tir.dlight.base import get_extent
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.sym import Analyzer
from tvm.target import Target
from tvm.target.codegen import llvm_get_vector_width
from tvm_ffi import structural_walk

from . import division, elementary, row_lanes

_GRAIN = 8192
"""Elements of work below which a parallel region costs more than it saves."""
_ROWS = 4
"""Rows of a product that share one load of the columns."""


def lanes(target: Target, bits: int = 32) -> int:
    """Elements of ``bits`` in a vector register of ``target``."""
    return max(4, llvm_get_vector_width(target) // bits)


class _Rule:
    """``schedule`` returns None where the rule does not apply; so does TVM's refusal of one of its
    steps.
    """

    def apply(self, func: tirx.PrimFunc, target: Target) -> Schedule | None:
        sch = Schedule(func)
        try:
            blocks = normalize_prim_func(sch)
            return self.schedule(sch, blocks, target) if blocks else None
        except ScheduleError:
            return None

    def schedule(self, sch: Schedule, blocks: list[SBlockInfo], target: Target) -> Schedule | None:
        raise NotImplementedError


class Rows(_Rule):
    """Reductions over trailing axes and elementwise blocks over the same leading axes: all of it
    for one row, then the next.
    """

    def schedule(self, sch, blocks, target):
        kinds = [info.dom_kind() for info in blocks]
        if all(info.is_injective() for info in blocks):
            return None
        leading = min(len(kind) - len(kind.lstrip("S")) for kind in kinds)
        trailing = {kind[leading:] for kind in kinds}
        if not leading or not trailing <= {"", "S", "R", "SS", "RR", "SSS", "RRR"}:
            return None
        parameters = set(sch.mod["main"].params)
        rows: list[LoopRV] = []
        partial: list[SBlockRV] = []
        for info in _without_temporaries(sch, blocks):
            block = info.block_rv
            lane = None if info.is_injective() else _lane_partials(sch, block, leading, target)
            if lane is not None:
                rows.append(sch.fuse(*sch.get_loops(lane)[:leading]))
                partial.append(lane)
                sch.annotate(sch.get_loops(block)[-1], row_lanes.FOLD, True)
            rows.append(sch.fuse(*sch.get_loops(block)[:leading]))
            if info.is_injective() and info.dom_kind()[leading:]:
                _vectorize_last(sch, block, target)
            if sch.get(block).writes[0].source not in parameters:
                sch.set_scope(block, 0, "local")  # a row on the stack, not from the pool
        sch.parallel(sch.merge(*rows) if len(rows) > 1 else rows[0])
        _vectorize_lanes(sch, partial)
        return sch


def _without_temporaries(sch: Schedule, blocks: list[SBlockInfo]) -> list[SBlockInfo]:
    """Inline what is read by one block of the same shape, or only converts its input; the rest is
    computed once a row. From the end, so that what branches and joins again is read by one block.
    """
    kept = []
    parameters = set(sch.mod["main"].params)
    for info in reversed(blocks):
        block = sch.get(info.block_rv)
        consumers = sch.get_consumers(info.block_rv)
        shape = len(info.iters)
        if (
            info.is_injective()
            and consumers
            and block.writes[0].source not in parameters
            and (_read_by_one(sch, block, consumers) or _converts(sch, info.block_rv))
            and all(len(sch.get(block).iter_vars) <= shape for block in consumers)
        ):
            sch.compute_inline(info.block_rv)
        else:
            kept.append(info)
    return kept[::-1]


_LARGEST_COPY = 64
"""Nodes of an expression that may be repeated; LLVM computes it once."""


def _read_by_one(sch: Schedule, block: SBlock, consumers: list[SBlockRV]) -> bool:
    """One block reads it, once or what is small more often."""
    if len(consumers) > 1:
        return False
    loads, nodes = [], []
    structural_walk(sch.get(consumers[0]).body, (TensorLoad, loads.append))
    reads = sum(load.source.same_as(block.writes[0].source) for load in loads)
    structural_walk(block.body, (tirx.Expr, nodes.append))
    return reads == 1 or len(nodes) <= _LARGEST_COPY


def _converts(sch: Schedule, block: SBlockRV) -> bool:
    """The block copies or casts one element."""
    value = sch.get(block).body.value
    while isinstance(value, tirx.Cast):
        value = value.value
    return isinstance(value, TensorLoad)


def _lane_partials(sch: Schedule, block: SBlockRV, leading: int, target: Target) -> SBlockRV | None:
    """Split a row's reduction over the lanes of several vectors, which hide each other's latency;
    each lane has its own partial result.

    None for rows that are short or leave a tail: rfactor loses the predicate of a tail.
    """
    inner = sch.get_loops(block)[leading:]
    reduction = sch.fuse(*inner) if len(inner) > 1 else inner[0]
    extent, width = get_extent(sch, reduction), lanes(target)
    steps = tuple(
        step
        for step in (4 * width, 2 * width, width)
        if isinstance(extent, tirx.Expr) or extent >= 2 * step
    )
    step = _divisor(extent, target, steps) if steps else None
    if step is None:
        return None
    _, lane = sch.split(reduction, [None, step])
    return sch.rfactor(lane, factor_axis=-1)


def _vectorize_lanes(sch: Schedule, blocks: list[SBlockRV]) -> None:
    """Of each partial reduction's loops (row, chunk, lane) vectorise the lanes; its zeros come
    before the chunks.

    Decomposed blocks are no longer what TVM calls a reduction, and nothing around them can be
    scheduled: last step.
    """
    chunks = []
    for block in blocks:
        *_, chunk, lane = sch.get_loops(block)
        sch.vectorize(lane)
        chunks.append(chunk)
    for block, chunk in zip(blocks, chunks):
        sch.decompose_reduction(block, chunk)


class Columns(_Rule):
    """One block that reduces whole columns at a time, elementwise blocks after it."""

    def schedule(self, sch, blocks, target):
        reductions = [info for info in blocks if info.is_reduction()]
        if len(reductions) != 1 or blocks[0] is not reductions[0]:
            return None
        block = reductions[0].block_rv
        loops, iters = sch.get_loops(block), reductions[0].iters
        kinds = [it.kind for it in iters]
        if (
            len(loops) != len(iters)  # an axis of size 1 has no loop
            or kinds.count("S") < 2
            or "R" not in kinds
            or not _column_contiguous(sch, reductions[0])
        ):
            return None
        for info in blocks[1:-1]:
            sch.compute_inline(info.block_rv)
        spatial = [loop for loop, it in zip(loops, iters) if it.kind == "S"]
        reduce = [loop for loop, it in zip(loops, iters) if it.kind == "R"]
        sch.reorder(*spatial, *reduce)
        *outer, row, column = spatial
        width = _divisor(get_extent(sch, column), target) or lanes(target)
        row_outer, row = sch.split(row, [None, _ROWS])
        column_outer, column = sch.split(column, [None, width])
        sch.reorder(*outer, row_outer, column_outer, *reduce, row, column)
        tile = sch.fuse(*outer, row_outer, column_outer)
        if len(blocks) > 1:
            sch.reverse_compute_at(blocks[-1].block_rv, tile)
            _vectorize_last(sch, blocks[-1].block_rv, target)
        else:
            written = sch.cache_write(block, 0, "local")
            sch.reverse_compute_at(written, tile)
            _vectorize_last(sch, written, target)
        sch.parallel(tile)
        sch.unroll(row)
        sch.vectorize(column)
        sch.decompose_reduction(block, reduce[0])
        return sch


class Elementwise(_Rule):
    """Blocks without reductions: all but those that write outputs are inlined."""

    def schedule(self, sch, blocks, target):
        if not all(info.is_injective() for info in blocks):
            return None
        for info in blocks[:-1]:
            sch.compute_inline(info.block_rv)
        block = blocks[-1].block_rv
        loops = sch.get_loops(block)
        if not loops:
            return None
        extents = [get_extent(sch, loop) for loop in loops]
        if _contiguous(sch, block) and all(isinstance(extent, int) for extent in extents):
            loops = [sch.fuse(*loops)]
        inner = loops[-1]
        if step := _divisor(get_extent(sch, inner), target):
            *loops[-1:], inner = sch.split(inner, [None, step])
            sch.vectorize(inner)
        elif len(loops) > 1:
            loops = loops[
                :-1
            ]  # a tail would be predicated lane by lane; LLVM's own vectoriser peels it
        outer = sch.fuse(*loops)
        if not all(isinstance(extent, int) for extent in extents) or _product(extents) > _GRAIN:
            sch.parallel(outer)
        return sch


RULES = (Columns(), Rows(), Elementwise())


def schedule(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """``func`` by the first rule that applies, its elementary functions as arithmetic."""
    for rule in RULES:
        if (sch := rule.apply(func, target)) is not None:
            func = division.by_reciprocals(row_lanes.fold(sch.mod["main"]), target)
            break
    return elementary.expand(func)


def _column_contiguous(sch: Schedule, info: SBlockInfo) -> bool:
    """The block's last spatial index is the last index of something that it reads."""
    column = [it.var for it in info.iters if it.kind == "S"][-1]
    reads = sch.get(info.block_rv).reads
    return any(len(r.region) and r.region[-1].min.same_as(column) for r in reads)


def _contiguous(sch: Schedule, block: SBlockRV) -> bool:
    """Every access of the block is to its own position, so that the loops can be fused without
    index arithmetic.
    """
    stmt = sch.get(block)
    own = [it.var for it in stmt.iter_vars]

    def identical(region: tirx.BufferRegion) -> bool:
        return len(region.region) == len(own) and all(
            dim.min.same_as(var) for dim, var in zip(region.region, own)
        )

    return all(identical(region) for region in [*stmt.reads, *stmt.writes])


def _vectorize_last(sch: Schedule, block: SBlockRV, target: Target) -> None:
    loop: LoopRV = sch.get_loops(block)[-1]
    if step := _divisor(get_extent(sch, loop), target):
        sch.vectorize(sch.split(loop, [None, step])[1])


def _divisor(
    extent: int | tirx.Expr, target: Target, steps: tuple[int, ...] | None = None
) -> int | None:
    """How many elements of a loop to vectorise: the widest step that leaves no tail, else None."""
    width = lanes(target)
    analyzer = Analyzer()
    for step in steps or (4 * width, 2 * width, width, width // 2):
        if analyzer.can_prove(tirx.EQ(tirx.floormod(_int64(extent), _int64(step)), _int64(0))):
            return step
    return None


def _int64(value: int | tirx.Expr) -> tirx.Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _product(extents: list[int]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result
