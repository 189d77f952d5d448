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
    refusal = None
    with target:
        for rule in RULES:
            if isinstance(rule, gpu.Matmul) and _reads_int8(func):
                continue  # the annotations of its software pipeline do not compile
            try:
                found = rule.apply(func, target, False)
            except Exception as error:  # a rule trips over what it was not written for
                refusal = error
                continue
            if found is not None:
                scheduled = found[0] if isinstance(found, list) else found
                return scheduled.mod["main"]
    raise UnsupportedError(
        f"found a kernel that none of TVM's rules for GPUs takes: {refusal}"
    ) from refusal


def _reads_int8(func: PrimFunc) -> bool:
    blocks: list[SBlock] = []
    structural_walk(func.body, (SBlock, blocks.append))
    return any(str(region.source.ty.dtype) == "int8" for block in blocks for region in block.reads)
