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
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

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

define internal <16 x i32> @opferry_round_pairs_bf16(<16 x float> %low, <16 x float> %high)
    alwaysinline {
  %x = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(
      <16 x float> %high, <16 x float> %low)
  %y = shufflevector <32 x bfloat> %x, <32 x bfloat> poison, <32 x i32> <
      i32 0, i32 16, i32 1, i32 17, i32 2, i32 18, i32 3, i32 19,
      i32 4, i32 20, i32 5, i32 21, i32 6, i32 22, i32 7, i32 23,
      i32 8, i32 24, i32 9, i32 25, i32 10, i32 26, i32 11, i32 27,
      i32 12, i32 28, i32 13, i32 29, i32 14, i32 30, i32 15, i32 31>
  %r = bitcast <32 x bfloat> %y to <16 x i32>
  ret <16 x i32> %r
}
"""


def available(target: Target) -> bool:
    """Whether ``target`` has these instructions and gains from them.

    CPUs with AMX have them at half the rate of float32 multiply-adds, measured on Sapphire Rapids:
    236 against 460 GFLOPS on two cores.
    """
    return target_has_features("avx512bf16", target) and not target_has_features("amx-bf16", target)


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


def round_pairs(low: Expr, high: Expr) -> Expr:
    """float32x16 twice, rounded as in `round_bits`, to the pairs (uint32x16) that `dot` takes."""
    return tir.call_pure_extern("uint32x16", "opferry_round_pairs_bf16", low, high)
