"""Stores of x86 that go past the caches, for results too large to stay there.

An ordinary store first reads the line that it changes. One that replaces whole lines need not: on
Sapphire Rapids two cores write 43 GB/s so, 16 GB/s otherwise. Streamed data are not ordered with
other stores: a thread that streamed ends with `fence`.

The stores sit in functions of our own, given as LLVM text (`SOURCE`, AVX-512) and always inlined.
They are assembly: a store that is merely marked loses the mark when LLVM merges it with the
ordinary one of the other branch.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr

LINE_BYTES = 64
"""Bytes of a cache line."""
LANES = 16
"""Elements of a store."""

SOURCE = """
define internal i32 @opferry_stream_single(ptr %at, <16 x float> %x) alwaysinline {
  call void asm sideeffect "vmovntps $1, $0", "=*m,v"(ptr elementtype(<16 x float>) %at,
      <16 x float> %x)
  ret i32 0
}

define internal i32 @opferry_stream_half(ptr %at, <16 x i16> %x) alwaysinline {
  call void asm sideeffect "vmovntdq $1, $0", "=*m,v"(ptr elementtype(<16 x i16>) %at,
      <16 x i16> %x)
  ret i32 0
}
"""


def store(address: Expr, value: Expr) -> Expr:
    """Store float32x16, or the bits of values of half the width as uint16x16, at ``address``: a
    multiple of the value's bytes.
    """
    kind = "single" if str(value.ty) == "float32x16" else "half"
    return tir.call_extern("int32", f"opferry_stream_{kind}", address, value)


def fence() -> Expr:
    """All streamed stores of the thread before those that follow."""
    return tir.call_llvm_intrin("void", "llvm.x86.sse.sfence")
