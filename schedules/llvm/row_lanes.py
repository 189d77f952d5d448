"""The end of a row's reduction: the partial results of the vector lanes, folded by halves.

The schedule primitives leave a loop over the lanes, a chain of as many dependent operations.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import BufferLoad, BufferRegion, BufferStore, For, PrimFunc, Stmt
from tvm_ffi import structural_equal, structural_map

from .vector import max_lanes, ramp, sum_lanes

FOLD = "opferry.fold_lanes"
"""Annotates the loop over the lanes; its block reduces the last axis of a buffer."""
_FOLDS = {tirx.Add: sum_lanes, tirx.Max: max_lanes}


def fold(func: PrimFunc) -> PrimFunc:
    """``func`` with vectors in place of the loops annotated `FOLD`."""

    def replace(loop: For) -> Stmt:
        return _folded(loop) if FOLD in loop.annotations else loop

    return func.with_body(structural_map(func.body, (For, replace)))


def _folded(loop: For) -> Stmt:
    """The block in ``loop`` as one step; the loop itself where it reduces several values at once or
    by another operation.
    """
    realize, lanes = loop.body, int(loop.extent)
    block, store = realize.block, realize.block.body
    axes = list(zip(block.iter_vars, realize.iter_values))
    (lane,) = [axis.var for axis, value in axes if value.same_as(loop.loop_var)]
    if not isinstance(store, BufferStore) or type(store.value) not in _FOLDS:
        return loop
    result, partial = store.value.a, store.value.b
    if not (
        isinstance(partial, TensorLoad)
        and partial.indices[-1].same_as(lane)
        and structural_equal(result, BufferLoad(store.buffer, store.indices))
    ):
        return loop
    axes = [(axis, value) for axis, value in axes if not axis.var.same_as(lane)]
    zero = tirx.const(0, str(lane.ty))
    row = partial.indices[:-1]
    vector = BufferLoad(partial.source, [*row, ramp(zero, lanes)])
    read = [*(Range.from_min_extent(index, 1) for index in row), Range.from_min_extent(zero, lanes)]
    step = SBlock(
        [axis for axis, _ in axes],
        [BufferRegion(partial.source, read)],
        block.writes,
        block.name_hint,
        BufferStore(store.buffer, _FOLDS[type(store.value)](vector), store.indices),
    )
    return SBlockRealize([value for _, value in axes], realize.predicate, step)
