"""A CUDA kernel in TIR, before lowering, run on the CPU: all threads of a block in lock step.

`run(func, *args)` executes a TVMScript PrimFunc bound to blockIdx and threadIdx, PTX instructions
included, in place on its NumPy arguments. Undefined or racy behaviour is a SimtError: accesses
out of bounds or misaligned, a barrier not reached by all threads, shared memory shared between
warps without a barrier, a copy in flight that is read.
"""

from .launch import run
from .races import SimtError

__all__ = ["SimtError", "run"]
