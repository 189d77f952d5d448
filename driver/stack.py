"""TVM's lowering of kernels for a CPU: tiles of registers keep out of the heap, and passes that
change nothing are left out.

TVM takes local buffers of 1 KiB and more from a pool, at every turn of the loop around them. LLVM
cannot see through that: such a tile is still loaded into registers before the innermost loop and
stored after it, and cleared by a call. On the stack it is nothing but registers.
"""

from __future__ import annotations

from math import prod

from tvm import DataType, tirx
from tvm.ir import BaseFunc, GlobalVar, IRModule, register_op_attr
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.s_tir import SBlock
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.target import Target
from tvm.tirx.compilation_pipeline import register_tir_pipeline
from tvm_ffi import structural_map, structural_walk

MAX_BYTES = 8 * 1024
"""Of a buffer on the stack: twice what 64 of the widest registers hold."""
_PIPELINE = "opferry"
_LEFT_OUT = ["s_tir.HoistIfThenElse"]
"""LLVM takes conditions out of loops, too."""
_OF_BLOCKS = ["s_tir.CompactBufferAllocation"]
"""For buffers that schedules move into loops. In a kernel written with loops alone they have their
size, and the analysis would take half of the lowering.
"""


def code_generation(target: Target) -> str:
    """Name of the pipeline from TIR to machine code."""
    return _PIPELINE if target.kind.name == "llvm" else "default"


def _keep_on_stack(allocation: tirx.AllocBuffer) -> tirx.AllocBuffer:
    buffer = allocation.buffer
    shape = buffer.ty.shape
    if buffer.scope() != "local" or not all(isinstance(dim, tirx.IntImm) for dim in shape):
        return allocation
    dtype = DataType(buffer.ty.dtype)
    if prod(map(int, shape)) * dtype.bits * dtype.lanes > MAX_BYTES * 8:
        return allocation
    kept = {**allocation.annotations, "disable_lower_builtin": tirx.const(True, "bool")}
    return tirx.AllocBuffer(buffer, kept)


@module_pass(opt_level=0, name="KeepOnStack")
class KeepOnStack:
    """Mark local buffers of up to `MAX_BYTES` to stay on the stack."""

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        for var, func in module.functions.items():
            if isinstance(func, tirx.PrimFunc):
                body = structural_map(func.body, (tirx.AllocBuffer, _keep_on_stack))
                module[var] = func.with_body(body)
        return module


def _has_blocks(function: BaseFunc) -> bool:
    found = []
    if isinstance(function, tirx.PrimFunc):
        structural_walk(function.body, (SBlock, found.append))
    return bool(found)


def _lower(lower: Pass) -> Pass:
    """``lower`` without the passes that a function does not need."""

    @module_pass(opt_level=0, name="Lower")
    def transform(module: IRModule, context: PassContext) -> IRModule:
        parts: dict[bool, dict[GlobalVar, BaseFunc]] = {True: {}, False: {}}
        for var, function in module.functions.items():
            parts[_has_blocks(function)][var] = function
        lowered = IRModule({}, attrs=module.attrs)
        for blocks, functions in parts.items():
            disabled = _LEFT_OUT + ([] if blocks else _OF_BLOCKS)
            with PassContext(context.opt_level, disabled_pass=disabled, config=context.config):
                lowered.update(lower(IRModule(functions, attrs=module.attrs)))
        return lowered

    return transform


def _pipeline():
    lower, finish_host, finish_device = default_s_tir_pipeline()
    return Sequential([_lower(lower), KeepOnStack()]), finish_host, finish_device


register_tir_pipeline(_PIPELINE, _pipeline)

# TVM vectorises calls of marked operators only; nearbyint, rounding to even, comes unmarked.
register_op_attr("tirx.nearbyint", "TVectorizable", True)
