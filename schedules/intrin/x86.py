"""int8 dot products of x86: scalar meaning, instruction, and what the operands must look like.

Every tier computes ``C[i] += sum_k A[k] * B[i, k]`` for one group of k, one int32 lane per column
i, exactly for all int8 values. AVX2 and AVX-512BW have no signed 8-bit product that is exact
(``vpmaddubsw`` saturates at 16 bits), so both operands are widened to 16 bits. VNNI multiplies
unsigned by signed: A is shifted to unsigned by adding 128, and `DotProduct.excess` is what that
adds to the sum. AMX multiplies signed by signed, whole tiles at a time (`x86_amx`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.target import Target, codegen

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
            return value.astype("uint8") ^ T.uint8(self.a_offset)
        return value.astype(self.a_dtype)

    def groups(self, k: int) -> int:
        """Groups of ``k`` values, padded."""
        depth = self.depth or self.group
        return -(-k // depth) * depth // self.group

    def excess(self, column_sum):
        """What the dot product holds too much, given the int32 sum over k of B's column."""
        return column_sum * self.a_offset


def _description(lanes: int, group: int, a_dtype: str):
    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((group,), a_dtype, offset_factor=1),
        B: T.Buffer((lanes, group), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:lanes, 0:group])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, group):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return description


def _vpdpbusd(lanes: int):
    """Four u8 x s8 products a lane, summed into int32 without saturation."""
    intrinsic = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    bytes_ = lanes * 4

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(intrinsic),
                C.vload([0], f"int32x{lanes}"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), lanes),
                    dtype=f"uint8x{bytes_}",
                ),
                B.vload([0, 0], f"int8x{bytes_}"),
                dtype=f"int32x{lanes}",
            )

    return implementation


def _vpmaddwd(lanes: int, intrinsic: str):
    """Two s16 x s16 products a lane; B is widened in the register. Exact: only four times -32768
    would overflow, and no int8 is that.
    """
    pairs = lanes * 2

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((2,), "int16", offset_factor=1),
        B: T.Buffer((lanes, 2), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload(
                [0], f"int32x{lanes}"
            ) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(intrinsic),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "int16x2"), dtype="int32"), lanes),
                    dtype=f"int16x{pairs}",
                ),
                T.Cast(f"int16x{pairs}", B.vload([0, 0], f"int8x{pairs}")),
                dtype=f"int32x{lanes}",
            )

    return implementation


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

for _dot, _implementation in (
    (VNNI_512, _vpdpbusd(16)),
    (VNNI_256, _vpdpbusd(8)),
    (AVX512BW, _vpmaddwd(16, "llvm.x86.avx512.pmaddw.d.512")),
    (AVX2, _vpmaddwd(8, "llvm.x86.avx2.pmadd.wd")),
):
    _meaning = _description(_dot.lanes, _dot.group, _dot.a_dtype)
    TensorIntrin.register(_dot.intrin, _meaning, _implementation)


def pick(target: Target) -> DotProduct:
    """The fastest tier that ``target`` has; `PORTABLE` on another architecture."""
    if x86_amx.available(target):
        return AMX
    for dot in TIERS:
        if codegen.target_has_features(dot.feature, target):
            return dot
    return PORTABLE
