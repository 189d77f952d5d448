"""The dynamic shared memory of a kernel."""

import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T


def shared_memory(count: int, dtype: str, align: int = -1) -> tir.Buffer:
    """``count`` elements, under a name of their type and their alignment in bytes (-1: TVM's).

    In CUDA C++ it is an external array, and the kernels of a module must not call two different
    ones the same.
    """
    buffer = T.alloc_buffer((count,), dtype, scope="shared.dyn", align=align)
    return IRBuilder.name(f"shared_{dtype}" + (f"_{align}" if align > 0 else ""), buffer)
