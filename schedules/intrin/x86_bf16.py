"""bfloat16 arithmetic of x86 (AVX512-BF16): dot products and rounding of 512-bit vectors.

TVM turns bfloat16 values into float32 or uint16 before it generates code, so no call of LLVM's
intrinsics, whose operands are bfloat16 vectors, survives. Here they sit in functions of our own on
integer vectors, given as LLVM text (`SOURCE`) and always inlined. A kernel that uses them has
``T.attr(0, IMPORT, SOURCE)`` around its body.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target
from tvm.target.codegen import target_has_features

IMPORT = "pragma_import_llvm"
LANES = 16
"""float32 lanes of a vector."""

SOURCE = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)

define internal <16 x float> @opferry_dot_bf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define internal <16 x i16> @opferry_round_bf16(<16 x float> %x) alwaysinline {
  %y = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}
"""


def available(target: Target) -> bool:
    """Whether ``target`` has these instructions."""
    return target_has_features("avx512bf16", target)


def dot(acc: Expr, a: Expr, b: Expr) -> Expr:
    """float32x16 ``acc`` plus two products a lane: of the low and of the high halves of the bits in
    a and b (uint32x16), each half a bfloat16.

    Products are exact and each sum is rounded once to float32; subnormal operands and results count
    as zero.
    """
    return tir.call_pure_extern("float32x16", "opferry_dot_bf16", acc, a, b)


def round_bits(x: Expr) -> Expr:
    """float32x16 to the bits (uint16x16) of the nearest bfloat16, ties to even; subnormals to
    zero.
    """
    return tir.call_pure_extern("uint16x16", "opferry_round_bf16", x)
