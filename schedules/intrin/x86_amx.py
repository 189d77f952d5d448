"""Matrix tiles of x86 (AMX): registers of 16 rows by 64 bytes, and int8 and bfloat16 products of
whole tiles.

A thread sets the shape of its tiles with `configure` and gives them up with `release`. Linux lends
them to a process that asks: ``permitted`` does so, once. Both sit in functions given as LLVM text
(`SOURCE`): a kernel that uses them begins with a statement under ``T.attr(0, IMPORT, SOURCE)``.

So do two functions for vectors of AVX-512 beside tiles, `hidden` and `upper_halves`, which keep
LLVM from rewriting plain instructions as dearer ones.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target, codegen

from .x86_bf16 import IMPORT as IMPORT

ROWS = 16
"""Rows of a tile, at most; of B's tiles, always: groups of 4 consecutive k."""
TILES = 8
DEPTH = 64
"""Values of k of a row of A: its bytes."""
LANES = 16
"""Columns of a tile of B, and int32 of a row of sums."""
GROUP = 4
"""Consecutive k of a column that lie together in B."""
ROW_BYTES = 64

# System call 158 is arch_prctl, 0x1023 its request for a part of the processor's state, 18 the
# tiles' data. Two threads that ask at once are both told. The configuration: palette 1 at byte 0,
# bytes of a row from byte 16 on, rows from byte 48 on, a byte for each tile.
SOURCE = """
@opferry_amx_known = internal global i32 0

declare i64 @syscall(i64, ...)
declare void @llvm.x86.ldtilecfg(ptr)

define internal i32 @opferry_amx_permitted() noinline {
  %before = load atomic i32, ptr @opferry_amx_known monotonic, align 4
  %known = icmp ne i32 %before, 0
  br i1 %known, label %done, label %ask
ask:
  %status = call i64 (i64, ...) @syscall(i64 158, i64 4131, i64 18)
  %granted = icmp eq i64 %status, 0
  %after = zext i1 %granted to i32
  store atomic i32 %after, ptr @opferry_amx_known monotonic, align 4
  br label %done
done:
  %result = phi i32 [ %before, %0 ], [ %after, %ask ]
  ret i32 %result
}

define internal i32 @opferry_amx_configure(i64 %rows_of_tiles, i64 %first_bytes, i64 %more_bytes)
    alwaysinline {
  %block = alloca [8 x i64], align 64
  store [8 x i64] zeroinitializer, ptr %block
  store i64 1, ptr %block
  %bytes = getelementptr i64, ptr %block, i64 2
  store i64 %first_bytes, ptr %bytes
  %more = getelementptr i64, ptr %block, i64 3
  store i64 %more_bytes, ptr %more
  %heights = getelementptr i64, ptr %block, i64 6
  store i64 %rows_of_tiles, ptr %heights
  call void @llvm.x86.ldtilecfg(ptr %block)
  ret i32 0
}

define internal <16 x float> @opferry_hidden(<16 x float> %x) alwaysinline {
  %r = call <16 x float> asm "", "=v,0"(<16 x float> %x)
  ret <16 x float> %r
}

define internal <16 x i32> @opferry_upper_halves(<16 x i32> %a, <16 x i32> %b) alwaysinline {
  %shifted = lshr <16 x i32> %a, splat (i32 16)
  %low = call <16 x i32> asm "", "=v,0"(<16 x i32> %shifted)
  %high = and <16 x i32> %b, splat (i32 -65536)
  %r = or <16 x i32> %low, %high
  ret <16 x i32> %r
}
"""


REFUSED = (
    "the operating system does not permit AMX (matrix tiles) to this process, "
    "allowed: another system, or a library compiled for a target without AMX"
)


def available(target: Target) -> bool:
    """Whether ``target`` has int8 products of tiles; ``permitted`` knows Linux only."""
    triple = str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())
    return codegen.target_has_features(["amx-tile", "amx-int8"], target) and "linux" in triple


def available_bf16(target: Target) -> bool:
    """Whether ``target`` has bfloat16 products of tiles."""
    return available(target) and codegen.target_has_features("amx-bf16", target)


def permitted() -> Expr:
    """Whether the operating system lets this process use tiles."""
    return tir.call_extern("int32", "opferry_amx_permitted") != 0


def configure(rows: Expr, lower: int = 6) -> Expr:
    """The first ``lower`` tiles, of sums and A, have ``rows`` rows (int64, 1 to 16), the others,
    of B, 16.
    """
    ones = sum(1 << 8 * tile for tile in range(lower))
    others = sum(ROWS << 8 * tile for tile in range(lower, TILES))
    return _configure(rows * _int64(ones) + _int64(others), {})


def shape(shapes: dict[int, tuple[int, int]]) -> Expr:
    """Tiles have so many rows and bytes of a row; those that are not named have 16 and 64."""
    rows = dict.fromkeys(range(TILES), ROWS) | {tile: rows for tile, (rows, _) in shapes.items()}
    packed = sum(count << 8 * tile for tile, count in rows.items())
    return _configure(_int64(packed), {tile: width for tile, (_, width) in shapes.items()})


def _configure(rows: Expr, row_bytes: dict[int, int]) -> Expr:
    widths = dict.fromkeys(range(TILES), ROW_BYTES) | row_bytes
    half = TILES // 2
    first, more = (
        _int64(sum(widths[start + k] << 16 * k for k in range(half))) for start in (0, half)
    )
    return tir.call_extern("int32", "opferry_amx_configure", rows, first, more)


def release() -> Expr:
    return _tile("tilerelease")


def zero(tile: int) -> Expr:
    return _tile("tilezero", _number(tile))


def load(tile: int, address: Expr, pitch: int | Expr) -> Expr:
    """Rows from ``address`` on, ``pitch`` bytes apart."""
    return _tile("tileloadd64", _number(tile), address, _int64(pitch))


def store(tile: int, address: Expr, pitch: int | Expr) -> Expr:
    """Rows to ``address`` and on, ``pitch`` bytes apart."""
    return _tile("tilestored64", _number(tile), address, _int64(pitch))


def multiply(c: int, a: int, b: int) -> Expr:
    """int32 C[i, j] += sum over g, e of A[i, 4 g + e] * B[g, 4 j + e], int8, modulo 2^32."""
    return _tile("tdpbssd", _number(c), _number(a), _number(b))


def multiply_bf16(c: int, a: int, b: int) -> Expr:
    """float32 C[i, j] += sum over g, e of A[i, 2 g + e] * B[g, 2 j + e], bfloat16.

    Products are exact, each sum of two is rounded to float32, subnormal operands and results count
    as zero.
    """
    return _tile("tdpbf16ps", _number(c), _number(a), _number(b))


def hidden(x: Expr) -> Expr:
    """float32x16 ``x``, of which LLVM does not see where it comes from.

    It makes the store of what was selected of a load from the same place a masked store and a
    masked load, with a comparison for each.
    """
    return tir.call_pure_extern("float32x16", "opferry_hidden", x)


def upper_halves(a: Expr, b: Expr) -> Expr:
    """uint32x16: the upper halves of the lanes of ``a`` below those of ``b``.

    A shift and a bitwise choice; LLVM takes a permutation of three micro-operations.
    """
    return tir.call_pure_extern("uint32x16", "opferry_upper_halves", a, b)


def _tile(name: str, *operands: Expr) -> Expr:
    return tir.call_llvm_intrin("void", f"llvm.x86.{name}", *operands)


def _number(tile: int) -> Expr:
    return tir.const(tile, "int8")


def _int64(value: int | Expr) -> Expr:
    return tir.const(value, "int64") if isinstance(value, int) else value
