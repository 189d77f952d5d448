"""int8 dot products of x86: scalar meaning, instruction, and what the operands must look like.

Every tier computes ``C[i] += sum_k A[k] * B[i, k]`` for one group of k, one int32 lane per column
i, exactly for all int8 values. AVX2 and AVX-512BW have no signed 8-bit product that is exact
(``vpmaddubsw`` saturates at 16 bits), so both operands are widened to 16 bits. VNNI multiplies
unsigned by signed: A is shifted to unsigned by adding 128, and `DotProduct.excess` is what that
adds to the sum. AMX multiplies signed by signed, whole tiles at a time (`x86_amx`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target, codegen
from tvm.tirx import Buffer, PrimFunc
from tvm.tirx.script.builder import ir as T

from . import x86_amx


@dataclass(frozen=True)
class DotProduct:
    """One instruction tier. ``A`` holds ``group`` values of k, ``B`` is [lanes, group] int8."""

    feature: str
    """LLVM's name of the instruction set it needs; empty for the portable form."""
    intrin: str
    """Name of the tensor intrinsic; empty for the portable form, which LLVM vectorises, and for
    `AMX`, whose kernel calls `x86_amx`.
    """
    mnemonic: str
    """The instruction that the generated code must contain."""
    lanes: int
    """int32 lanes of a register."""
    group: int
    """Values of k that one lane multiplies and sums."""
    a_dtype: str
    """How A is packed."""
    a_offset: int
    """What packing adds to each value of A."""
    registers: int
    """Vector registers of the register file, or tiles."""
    depth: int = 0
    """Values of k are padded to a multiple of this; 0: of ``group``."""
    in_tiles: bool = False
    """It multiplies whole tiles of registers: a kernel of its own is built around it."""

    def __post_init__(self):
        if self.a_offset and self.a_dtype != "uint8":
            raise ValueError(f"{self.intrin}: an offset of {self.a_offset} needs unsigned A")

    def pack(self, value):
        """An int8 expression of A as the instruction wants it."""
        if self.a_offset:  # +128 modulo 256 flips the sign bit
            return value.astype("uint8") ^ tir.const(self.a_offset, "uint8")
        return value.astype(self.a_dtype)

    def groups(self, k: int) -> int:
        """Groups of ``k`` values, padded."""
        depth = self.depth or self.group
        return -(-k // depth) * depth // self.group

    def excess(self, column_sum):
        """What the dot product holds too much, given the int32 sum over k of B's column."""
        return column_sum * self.a_offset


def _arguments(lanes: int, group: int, a_dtype: str) -> tuple[Buffer, Buffer, Buffer]:
    """A, B and C of an intrinsic: one group of k, the lanes' groups, the lanes' sums."""
    a = T.buffer((group,), a_dtype, offset_factor=1)
    b = T.buffer((lanes, group), "int8", offset_factor=1)
    c = T.buffer((lanes,), "int32", offset_factor=1, scope="local")
    return T.arg("A", a), T.arg("B", b), T.arg("C", c)


def _description(lanes: int, group: int, a_dtype: str) -> PrimFunc:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("description")
        A, B, C = _arguments(lanes, group, a_dtype)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:lanes, 0:group])
            T.writes(C[0:lanes])
            with T.serial(0, lanes) as i, T.serial(0, group) as k, T.sblock("update"):
                vi, vk = T.axis.remap("SR", [i, k])
                product = A[vk].astype("int32") * B[vi, vk].astype("int32")
                T.buffer_store(C, C[vi] + product, [vi])
    return builder.get()


def _implementation(
    lanes: int, group: int, a_dtype: str, update: Callable[[Expr, Expr, Expr], Expr]
) -> PrimFunc:
    """C = update(A, B, C) on whole registers."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("implementation")
        A, B, C = _arguments(lanes, group, a_dtype)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:lanes, 0:group])
            T.writes(C[0:lanes])
            registers = (
                A.vload([0], f"{a_dtype}x{group}"),
                B.vload([0, 0], f"int8x{lanes * group}"),
                C.vload([0], f"int32x{lanes}"),
            )
            T.buffer_store(C, update(*registers), [tir.Ramp(0, 1, lanes)])
    return builder.get()


def _broadcast(a: Expr, lanes: int, dtype: str) -> Expr:
    """The 32 bits of ``a`` in every lane, as a vector of ``dtype``."""
    bits = tir.Broadcast(tir.reinterpret("int32", a), lanes)
    return tir.reinterpret(dtype, bits)


def _vpdpbusd(lanes: int) -> PrimFunc:
    """Four u8 x s8 products a lane, summed into int32 without saturation."""
    intrinsic = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"

    def update(a: Expr, b: Expr, c: Expr) -> Expr:
        every = _broadcast(a, lanes, f"uint8x{lanes * 4}")
        return tir.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, c, every, b)

    return _implementation(lanes, 4, "uint8", update)


def _vpmaddwd(lanes: int, intrinsic: str) -> PrimFunc:
    """Two s16 x s16 products a lane; B is widened in the register. Exact: only four times -32768
    would overflow, and no int8 is that.
    """
    pairs = f"int16x{lanes * 2}"

    def update(a: Expr, b: Expr, c: Expr) -> Expr:
        every = _broadcast(a, lanes, pairs)
        wide = tir.Cast(pairs, b)
        return c + tir.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, every, wide)

    return _implementation(lanes, 2, "int16", update)


VNNI_512 = DotProduct(
    "avx512vnni", "opferry.dot_16x4_u8s8s32_vpdpbusd", "vpdpbusd", 16, 4, "uint8", 128, 32
)
VNNI_256 = DotProduct(
    "avxvnni", "opferry.dot_8x4_u8s8s32_vpdpbusd", "vpdpbusd", 8, 4, "uint8", 128, 16
)
AVX512BW = DotProduct(
    "avx512bw", "opferry.dot_16x2_s8s8s32_vpmaddwd", "vpmaddwd", 16, 2, "int16", 0, 32
)
AVX2 = DotProduct("avx2", "opferry.dot_8x2_s8s8s32_vpmaddwd", "vpmaddwd", 8, 2, "int16", 0, 16)
AMX = DotProduct(
    "amx-int8", "", "tdpbssd", x86_amx.LANES, 4, "int8", 0, 8, depth=x86_amx.DEPTH, in_tiles=True
)
PORTABLE = DotProduct("", "", "", 16, 1, "int8", 0, 16)

TIERS = (VNNI_512, VNNI_256, AVX512BW, AVX2)
"""Dot products of vectors, fastest first."""

for _dot, _instruction in (
    (VNNI_512, _vpdpbusd(16)),
    (VNNI_256, _vpdpbusd(8)),
    (AVX512BW, _vpmaddwd(16, "llvm.x86.avx512.pmaddw.d.512")),
    (AVX2, _vpmaddwd(8, "llvm.x86.avx2.pmadd.wd")),
):
    _meaning = _description(_dot.lanes, _dot.group, _dot.a_dtype)
    TensorIntrin.register(_dot.intrin, _meaning, _instruction)


def pick(target: Target) -> DotProduct:
    """The fastest tier that ``target`` has; `PORTABLE` on another architecture."""
    if x86_amx.available(target):
        return AMX
    for dot in TIERS:
        if codegen.target_has_features(dot.feature, target):
            return dot
    return PORTABLE
