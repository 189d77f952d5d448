"""Quantisation arithmetic in TE: rounding, saturation, float16, and Ascend's packed scales.

All of it is elementwise and exact as documented; nothing depends on a library call or on fast-math.

A packed scale ("quant param") is a 64-bit integer: bits 31..13 the upper 19 bits of a float32
(sign, exponent, ten mantissa bits), bits 45..37 a nine-bit offset in two's complement, bit 46 set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.target import Target, codegen

_FP19 = 0xFFFFE000
_OFFSET_SHIFT = 37
_SIGNED_OUTPUT = 1 << 46
_NINE_BITS = (-256, 255)


def nearest(x: Expr) -> Expr:
    """float32 -> int32: ties to even, for what int32 can hold."""
    return tirx.nearbyint(x).astype("int32")


def nearest_cast(target: Target) -> Callable[[Expr], Expr]:
    """`nearest` as ``target`` does it best: x86 rounds and converts at once."""
    if not _converts_rounding(target):
        return nearest
    return lambda x: tirx.call_llvm_pure_intrin("int32", "llvm.lrint", x)


def round_clip(x: Expr, low: int, high: int, cast: Callable[[Expr], Expr] = nearest) -> Expr:
    """float32 -> int32: nearest integer, ties to even, saturated to [low, high].

    Clipping comes first: the bounds are integers, so the result is the same, and the conversion
    never sees a value that int32 cannot hold.
    """
    return cast(tirx.max(tirx.min(x, _f32(high)), _f32(low)))


def to_int8(x: Expr) -> Expr:
    """float32 -> int8, ties to even, saturated to [-128, 127]."""
    return round_clip(x, -128, 127).astype("int8")


def int8_cast(target: Target) -> Callable[[Expr], Expr]:
    """`to_int8` as ``target`` does it best.

    What int32 cannot hold x86 converts to -2^31, right for everything below -128: only the upper
    bound has to be clipped before. It makes 127 of NaN, as `to_int8` does.
    """
    if not _converts_rounding(target):
        return to_int8
    cast = nearest_cast(target)
    return lambda x: saturate_int8(cast(tirx.min(x, _f32(127))))


def saturate_int8(x: Expr) -> Expr:
    """int32 -> int8."""
    low, high = tirx.const(-128, "int32"), tirx.const(127, "int32")
    return tirx.max(tirx.min(x, high), low).astype("int8")


def to_float16(x: Expr) -> Expr:
    """float32 -> float16: nearest even, subnormals kept, overflow to infinity.

    Spelled in integer arithmetic, which vectorises on CPUs without a conversion instruction too.
    """
    bits = _bits(x)
    sign = (bits >> _u32(16)) & _u32(0x8000)
    magnitude = bits & _u32(0x7FFFFFFF)
    # Re-biasing the exponent by 112 and adding just under half of the last kept bit, plus that bit
    # itself, rounds ties to even; a carry runs into the exponent and from 65504 on to infinity.
    odd = (magnitude >> _u32(13)) & _u32(1)
    normal = (magnitude - _u32(112 << 23) + _u32(0xFFF) + odd) >> _u32(13)
    # Below 2^-14: one unit in the last place of 0.5 is 2^-24, float16's smallest subnormal.
    half = tirx.reinterpret("float32", magnitude) + _f32(0.5)
    subnormal = _bits(half) - _u32(0x3F000000)
    infinite = tirx.Select(magnitude > _u32(0x7F800000), _u32(0x7E00), _u32(0x7C00))
    rounded = tirx.Select(magnitude < _u32(0x38800000), subnormal, normal)
    rounded = tirx.Select(magnitude >= _u32(0x47800000), infinite, rounded)
    return tirx.reinterpret("float16", (rounded | sign).astype("uint16"))


def float16_cast(target: Target) -> Callable[[Expr], Expr]:
    """`to_float16` as ``target`` does it best: its own conversion where it has one."""
    if target.kind.name == "llvm" and not codegen.target_has_features("f16c", target):
        return to_float16
    return lambda x: x.astype("float16")


def from_float16(x: Expr) -> Expr:
    """float16 -> float32, exact."""
    half = tirx.reinterpret("uint16", x).astype("uint32")
    magnitude = (half & _u32(0x7FFF)) << _u32(13)
    # The exponent's bias differs by 112; the product also normalises subnormals.
    scaled = tirx.reinterpret("float32", magnitude) * _f32(2.0**112)
    infinite = magnitude >= _u32(0x1F << 23)
    bits = tirx.Select(infinite, magnitude | _u32(0xFF << 23), _bits(scaled))
    return tirx.reinterpret("float32", bits | ((half & _u32(0x8000)) << _u32(16)))


def to_float32(x: Expr) -> Expr:
    """float16, bfloat16 or float32 -> float32, exact."""
    return from_float16(x) if x.ty.dtype == "float16" else x.astype("float32")


def truncate_scale(scale: Expr) -> Expr:
    """float32 -> the float32 that a packed scale keeps of it: ten mantissa bits, toward zero."""
    return tirx.reinterpret("float32", _bits(scale) & _u32(_FP19))


def round_scale(scale: Expr) -> Expr:
    """float32 -> uint32 bits with ten mantissa bits, nearest even.

    A carry runs into the exponent; subnormals become signed zero; infinity and NaN are truncated.
    """
    bits = _bits(scale)
    exponent = bits & _u32(0x7F800000)
    rounded = bits + _u32(0xFFF) + ((bits >> _u32(13)) & _u32(1))
    rounded = tirx.Select(exponent == _u32(0), bits & _u32(0x80000000), rounded)
    return tirx.Select(exponent == _u32(0x7F800000), bits, rounded) & _u32(_FP19)


def nine_bit_offset(offset: Expr) -> Expr:
    """float32 -> int32 in [-256, 255], ties to even."""
    return round_clip(offset, *_NINE_BITS)


def pack_scale(scale: Expr, offset: Expr | None, round_mode: int) -> Expr:
    """float32 scale and offset -> int64 packed scale; ``round_mode`` 0 truncates, 1 rounds."""
    bits = round_scale(scale) if round_mode else _bits(scale) & _u32(_FP19)
    packed = bits.astype("int64") | _i64(_SIGNED_OUTPUT)
    if offset is None:
        return packed
    nine = nine_bit_offset(offset).astype("int64") & _i64(0x1FF)
    return packed | (nine << _i64(_OFFSET_SHIFT))


def unpack_scale(packed: Expr) -> Expr:
    """int64 or uint64 packed scale -> float32."""
    bits = packed.astype("int64") & _i64(_FP19)
    return tirx.reinterpret("float32", bits.astype("uint32"))


def unpack_offset(packed: Expr) -> Expr:
    """int64 or uint64 packed scale -> int32 offset in [-256, 255]."""
    nine = ((packed.astype("int64") >> _i64(_OFFSET_SHIFT)) & _i64(0x1FF)).astype("int32")
    sign = tirx.const(0x100, "int32")
    return (nine ^ sign) - sign


def truncate_scale_array(scale: np.ndarray) -> np.ndarray:
    """`truncate_scale` of a float32 array."""
    return (np.ascontiguousarray(scale).view(np.uint32) & np.uint32(_FP19)).view(np.float32)


def nine_bit_offset_array(offset: np.ndarray) -> np.ndarray:
    """`nine_bit_offset` of a float32 array; NaN gives 0."""
    return np.clip(np.rint(np.nan_to_num(offset)), *_NINE_BITS).astype(np.int32)


def unpack_scale_array(packed: np.ndarray) -> np.ndarray:
    """`unpack_scale` of an int64 or uint64 array."""
    bits = np.ascontiguousarray(packed).view(np.uint64) & np.uint64(_FP19)
    return bits.astype(np.uint32).view(np.float32)


def unpack_offset_array(packed: np.ndarray) -> np.ndarray:
    """`unpack_offset` of an int64 or uint64 array."""
    bits = np.ascontiguousarray(packed).view(np.uint64) >> np.uint64(_OFFSET_SHIFT)
    return ((bits & np.uint64(0x1FF)).astype(np.int32) ^ 0x100) - 0x100


def _converts_rounding(target: Target) -> bool:
    return target.kind.name == "llvm" and codegen.target_has_features("sse2", target)


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret("uint32", x)


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _u32(value: int) -> Expr:
    return tirx.const(value, "uint32")


def _i64(value: int) -> Expr:
    return tirx.const(value, "int64")
