"""Kernels without a row of their own, on a GPU: TVM's rules, in the order of how much they ask."""

from __future__ import annotations

from tvm.s_tir import SBlock
from tvm.s_tir.dlight import gpu
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm_ffi import structural_walk

from ...runtime.errors import UnsupportedError

RULES = (
    gpu.Matmul(),
    gpu.GEMV(),
    gpu.Reduction(),
    gpu.GeneralReduction(),
    gpu.Fallback(),
)


def schedule(func: PrimFunc, target: Target) -> PrimFunc:
    """``func`` by the first rule that takes it; ``UnsupportedError`` when none does."""
    with target:
        for rule in RULES:
            if isinstance(rule, gpu.Matmul) and _reads_int8(func):
                continue  # the annotations of its software pipeline do not compile
            if (found := rule.apply(func, target, False)) is not None:
                scheduled = found[0] if isinstance(found, list) else found
                return scheduled.mod["main"]
    name = func.attrs.get("global_symbol", "a kernel")
    raise UnsupportedError(f"{name}: found no schedule rule of TVM for CUDA that takes it")


def _reads_int8(func: PrimFunc) -> bool:
    blocks: list[SBlock] = []
    structural_walk(func.body, (SBlock, blocks.append))
    return any(str(region.source.ty.dtype) == "int8" for block in blocks for region in block.reads)
