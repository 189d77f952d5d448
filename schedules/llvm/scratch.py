"""Working memory of a kernel that is written statement by statement."""

from __future__ import annotations

import math

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T


def scratch(shape: tuple[int, ...], dtype: str = "float32", scope: str = "global") -> tir.Buffer:
    """A buffer of static shape, allocated here; ``scope="local"`` is the stack, where LLVM finds
    its registers, "global" the thread's workspace pool.

    It is a view of a flat allocation. TVM's region analysis, which would shrink buffers to what is
    touched and takes longer than all other passes together on kernels of this kind, leaves viewed
    memory alone.
    """
    flat = T.alloc_buffer((math.prod(shape),), dtype, scope=scope)
    return T.decl_buffer(shape, dtype, data=flat.data, scope=scope)
