"""CUDA C and TIR device functions that TVM names as calls (`tirx.cuda.*`, warp shuffles, atomics).

A function takes the block, the dtype of its result (None for statements) and the argument values.
"""

import numpy as np

from .block import WARP
from .memory import Pointer


def cta_sync(block, dtype):
    block.barrier()


def storage_sync(block, dtype, scope):
    if scope in ("shared", "shared.dyn"):
        block.barrier()
    else:
        block.active_warps(f"sync of {scope}")


def warp_sync(block, dtype):
    block.active_warps("warp_sync")


def to_shared(block, dtype, pointer):
    return block.pointer(pointer)


CALLS = {
    "cuda.cta_sync": cta_sync,
    "tvm_storage_sync": storage_sync,
    "cuda.warp_sync": warp_sync,
    "cuda.cvta_generic_to_shared": to_shared,
}
__all__ = ["CALLS", "WARP", "Pointer", "np"]
