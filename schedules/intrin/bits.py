"""Bytes to bits: 32 bytes become one word, in a vector instruction or two on CPUs that have them.

TVM cannot turn a vector of truth values into an integer. Here that sits in a function of our own,
given as LLVM text (`SOURCE`, for every target of little-endian bytes) and always inlined. A kernel
that uses it has ``T.attr(0, "pragma_import_llvm", SOURCE)`` around its body.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr

WIDTH = 32

SOURCE = """
define internal i32 @opferry_nonzero_bits(<32 x i8> %x) alwaysinline {
  %b = icmp ne <32 x i8> %x, zeroinitializer
  %r = bitcast <32 x i1> %b to i32
  ret i32 %r
}
"""


def nonzero(x: Expr) -> Expr:
    """uint32 whose bit k says whether element k of the uint8x32 is not 0."""
    return tir.call_pure_extern("uint32", "opferry_nonzero_bits", x)
