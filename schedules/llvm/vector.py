"""Vector pieces that the attention kernels for the CPU share: exponentials, conversions between
storage types and float32, reductions across lanes.

Everything here maps expressions to expressions. The elementwise ones take a scalar expression and
stand inside a vectorised loop, or take a vector (``load_lanes``) outside of one; LLVM sees whole
vectors either way. No libm call appears, so nothing is scalarised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target
from tvm.target.codegen import target_has_features
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import LOG2E

# exp(r) = 1 + r + r*r*P(r) for |r| <= ln(2)/2, relative error 2e-7 (Cephes expf).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
# 2**r = 1 + r*P(r) for |r| <= 1/2, relative error 2e-7 (Cephes exp2f).
_EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
)
# ln(2) in two parts: n * _LN2_HIGH is exact for |n| < 2**15.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Adding 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer and leaves it in the low
# bits of the sum: no SSE4.1 rounding instruction needed. The integer is read from the bits, since
# subtracting the constant again would be simplified away.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000
# 2**r = 1 + r*P(r) for 0 <= r <= 1, by degree: relative error 2e-7, 3e-6, 9e-5.
_WEIGHT = {
    5: (
        1.8671301659196615e-3,
        9.017029777169228e-3,
        5.579991266131401e-2,
        2.4016444385051727e-1,
        6.931512951850891e-1,
    ),
    4: (
        1.3426685705780983e-2,
        5.2242472767829895e-2,
        2.412802129983902e-1,
        6.930448412895203e-1,
    ),
    3: (7.706705932265036e-2, 2.276449722672076e-1, 6.951167907078646e-1),
}
_EXP_UNDERFLOW, _EXP_OVERFLOW = -86.6, 88.72283  # of 2**(n-1), -126 <= n - 1 <= 127


@dataclass(frozen=True)
class VectorUnit:
    """What the register tiles of a target are built from."""

    lanes: int
    """float32 elements of a register."""
    registers: int
    half_to_float: bool
    """A vector instruction converts float16 to float32 (F16C)."""
    float_to_half: bool
    """LLVM vectorises the float32 to float16 cast; without AVX-512 it calls a function instead."""

    def __post_init__(self) -> None:
        if self.lanes not in (4, 8, 16):
            raise ValueError(f"VectorUnit: lanes: found {self.lanes}, allowed 4, 8 or 16")


AVX512 = VectorUnit(lanes=16, registers=32, half_to_float=True, float_to_half=True)
AVX2 = VectorUnit(lanes=8, registers=16, half_to_float=True, float_to_half=False)
PORTABLE = VectorUnit(lanes=4, registers=16, half_to_float=False, float_to_half=False)


def vector_unit(target: Target) -> VectorUnit:
    """The vector unit of an ``llvm`` target: AVX-512, AVX2 with F16C, or 128 bits of anything."""
    if target_has_features(["avx512f", "avx512bw", "avx512vl", "avx512dq"], target):
        return AVX512
    if target_has_features(["avx2", "fma", "f16c"], target):
        return AVX2
    return PORTABLE


def float32(value: float, like: Expr | None = None) -> Expr:
    """A float32 constant, with as many lanes as ``like``."""
    return constant(value, "float32", like)


def exp(x: Expr) -> Expr:
    """exp of float32: relative error below 3e-7, 0 below -86.6, infinity above 88.7. NaN is not
    kept.
    """
    clamped = tir.min(tir.max(x, float32(_EXP_UNDERFLOW, x)), float32(_EXP_OVERFLOW, x))
    power = _nearest(clamped * float32(LOG2E, x))
    n = cast("float32", power)
    r = clamped - n * float32(_LN2_HIGH, x) - n * float32(_LN2_LOW, x)
    value = (_horner(_EXP, r) * (r * r) + r + float32(1, x)) * float32(2, x)
    # n reaches 128: one factor 2 stands outside of the power's exponent field.
    result = value * _power_of_two(power, -1)
    result = tir.Select(x < float32(_EXP_UNDERFLOW, x), float32(0, x), result)
    return tir.Select(x > float32(_EXP_OVERFLOW, x), float32(float("inf"), x), result)


def exp2_nonpositive(x: Expr) -> Expr:
    """2**x of float32 x <= 0: relative error below 3e-7; exactly 0 below -126, minus infinity
    included.

    The weight of a softmax whose scores are multiplied by ``LOG2E`` beforehand.
    """
    clamped = tir.max(x, float32(-126, x))
    power = _nearest(clamped)
    r = clamped - cast("float32", power)
    value = (_horner(_EXP2, r) * r + float32(1, x)) * _power_of_two(power, 0)
    return tir.Select(x < float32(-126, x), float32(0, x), value)


def exp2_weight(x: Expr, unit: VectorUnit, degree: int = 5) -> Expr:
    """2**x of a float32 vector x <= 0 (with AVX-512 x <= 127), relative error below 3e-7 (degree 4:
    3e-6, 3: 9e-5); 0 for minus infinity.

    ``exp2_nonpositive`` in fewer instructions where the target has AVX-512: one leaves what
    exceeds the integer below, one multiplies by the power of that integer.
    """
    if unit.lanes != 16:
        return exp2_nonpositive(x)
    every, current = tir.const(-1, "int16"), tir.const(4, "int32")
    down_quiet = tir.const(9, "int32")
    r = T.Bind(_avx512("reduce", x, down_quiet, x, every, current))
    value = _horner(_WEIGHT[degree], r) * r + float32(1, x)
    return _avx512("scalef", value, x, x, every, current)


def _avx512(name: str, x: Expr, *rest: Expr) -> Expr:
    """A masked AVX-512 instruction on a register of float32."""
    function = f"llvm.x86.avx512.mask.{name}.ps.512"
    return tir.call_llvm_pure_intrin("float32x16", function, x, *rest)


def is_nan(x: Expr) -> Expr:
    """Whether float32 ``x`` is NaN, by its bits: TVM takes ``x != x`` for false."""
    return (reinterpret("uint32", x) & _u32(0x7FFFFFFF, x)) > _u32(0x7F800000, x)


def to_float32(x: Expr, unit: VectorUnit) -> Expr:
    """float16, bfloat16 or float32 to float32, exactly."""
    dtype = _element(x)
    if dtype == "bfloat16":
        return reinterpret("float32", cast("uint32", reinterpret("uint16", x)) << _u32(16, x))
    if dtype == "float16" and not unit.half_to_float:
        return _half_bits_to_float32(cast("uint32", reinterpret("uint16", x)))
    return x if dtype == "float32" else cast("float32", x)


def from_float32(x: Expr, dtype: str, unit: VectorUnit) -> Expr:
    """float32 to a storage type, rounding to nearest even; float16 overflow gives infinity."""
    if dtype == "bfloat16":
        bits = reinterpret("uint32", x)
        rounded = bits + _u32(0x7FFF, x) + ((bits >> _u32(16, x)) & _u32(1, x))
        kept = tir.Select(is_nan(x), _u32(0x7FC0, x), rounded >> _u32(16, x))
        return reinterpret("bfloat16", cast("uint16", kept))
    if dtype == "float16" and not unit.float_to_half:
        bits = _float32_to_half_bits(reinterpret("uint32", x))
        return reinterpret("float16", cast("uint16", bits))
    return x if dtype == "float32" else cast(dtype, x)


def load_lanes(buffer: tir.Buffer, indices: Sequence[Expr | int], lanes: int) -> Expr:
    """``lanes`` consecutive elements along the last axis, as one vector."""
    return tir.BufferLoad(buffer, [*indices[:-1], ramp(indices[-1], lanes)])


def ramp(start: Expr | int, lanes: int) -> Expr:
    """The index vector start, start + 1, ... for a vector load or store."""
    start = tir.const(start, "int32") if isinstance(start, int) else start
    return tir.Ramp(start, tir.const(1, str(start.ty)), lanes)


def sum_lanes(vector: Expr) -> Expr:
    """Sum of a vector's lanes (a power of two), by halves."""
    return _reduce(vector, lambda a, b: a + b)


def sums_lanes(vectors: Sequence[Expr]) -> Expr:
    """Lane i: the sum of the lanes of vector i, of as many vectors as each has lanes.

    Two vectors become one that holds half sums of both, and so on: two shuffles and an addition a
    vector, where ``sum_lanes`` takes log2(lanes) of each.
    """
    lanes, merged = lanes_of(vectors[0]), 1
    while merged < lanes:
        low, high = _half_groups(lanes, merged)
        vectors = [
            tir.Shuffle([a, b], low) + tir.Shuffle([a, b], high)
            for a, b in zip(vectors[::2], vectors[1::2])
        ]
        vectors, merged = [T.Bind(vector) for vector in vectors], 2 * merged
    return vectors[0]


def _half_groups(lanes: int, merged: int) -> tuple[list[int], list[int]]:
    """Which lanes of two vectors are added up to one, where each has sums of ``merged``.

    Groups of lanes belong to one sum; their first and their second halves are added. Up to four
    sums stay inside 128 bits, where shuffles are cheapest; then those blocks change places.
    """
    block, group = (4, 4 // merged) if merged < 4 else (lanes, 4 * lanes // merged)
    half = group // 2
    low = [
        operand * lanes + start + first + k
        for start in range(0, lanes, block)
        for operand in range(2)
        for first in range(0, block, group)
        for k in range(half)
    ]
    return low, [k + half for k in low]


def max_lanes(vector: Expr) -> Expr:
    """Maximum of a vector's lanes (a power of two), by halves."""
    return _reduce(vector, tir.max)


def _reduce(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    lanes = lanes_of(vector)
    while lanes > 1:
        lanes //= 2
        low = tir.Shuffle([vector], list(range(lanes)))
        vector = combine(low, tir.Shuffle([vector], list(range(lanes, 2 * lanes))))
    return vector


def _horner(coefficients: Sequence[float], r: Expr) -> Expr:
    value = float32(coefficients[0], r)
    for coefficient in coefficients[1:]:
        value = value * r + float32(coefficient, r)
    return value


def _nearest(x: Expr) -> Expr:
    """float32 to the nearest int32, |x| < 2**22."""
    return reinterpret("int32", x + float32(_ROUND, x)) - constant(_ROUND_BITS, "int32", x)


def _power_of_two(n: Expr, plus: int) -> Expr:
    """2**(n + plus) of int32."""
    return reinterpret(
        "float32", (n + constant(127 + plus, "int32", n)) << constant(23, "int32", n)
    )


def _half_bits_to_float32(bits: Expr) -> Expr:
    """Exact; a subnormal half becomes normal in the multiplication by 2**112."""
    magnitude = (bits & _u32(0x7FFF, bits)) << _u32(13, bits)
    value = reinterpret("float32", magnitude) * float32(2.0**112, bits)
    special = reinterpret("float32", magnitude | _u32(0x7F800000, bits))
    value = tir.Select(magnitude >= _u32(0x0F800000, bits), special, value)
    sign = (bits & _u32(0x8000, bits)) << _u32(16, bits)
    return reinterpret("float32", reinterpret("uint32", value) | sign)


def _float32_to_half_bits(bits: Expr) -> Expr:
    """To nearest even. Adding 0.5 shifts a subnormal result into the low bits, rounded by the
    adder.
    """
    magnitude = bits & _u32(0x7FFFFFFF, bits)
    odd = (magnitude >> _u32(13, bits)) & _u32(1, bits)
    normal = (magnitude - _u32(0x38000000 - 0xFFF, bits) + odd) >> _u32(13, bits)
    sum_ = reinterpret("float32", magnitude) + float32(0.5, bits)
    subnormal = reinterpret("uint32", sum_) - _u32(0x3F000000, bits)
    special = tir.Select(magnitude > _u32(0x7F800000, bits), _u32(0x7E00, bits), _u32(0x7C00, bits))
    half = tir.Select(magnitude < _u32(0x38800000, bits), subnormal, normal)
    half = tir.Select(magnitude >= _u32(0x47800000, bits), special, half)
    return half | ((bits >> _u32(16, bits)) & _u32(0x8000, bits))


def _u32(value: int, like: Expr) -> Expr:
    return constant(value, "uint32", like)


def constant(value: float, dtype: str, like: Expr | None) -> Expr:
    """With as many lanes as ``like``."""
    scalar = tir.const(value, dtype)
    lanes = 1 if like is None else lanes_of(like)
    return scalar if lanes == 1 else tir.Broadcast(scalar, lanes)


def cast(dtype: str, x: Expr) -> Expr:
    """As many lanes of ``dtype`` as x has."""
    return x.astype(_with_lanes(dtype, x))


def reinterpret(dtype: str, x: Expr) -> Expr:
    """The bits of x as so many lanes of ``dtype``."""
    return tir.reinterpret(_with_lanes(dtype, x), x)


def _with_lanes(dtype: str, x: Expr) -> str:
    return dtype if lanes_of(x) == 1 else f"{dtype}x{lanes_of(x)}"


def _element(x: Expr) -> str:
    return str(x.ty).split("x")[0]


def lanes_of(x: Expr) -> int:
    return int((str(x.ty).split("x") + ["1"])[1])
