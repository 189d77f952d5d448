"""Arithmetic of TIR on values: a Python int, bool or NumPy scalar (uniform), or an array [threads].

Every expression has one dtype; uniform integers are Python ints kept inside its range.
"""

import math
import operator

import ml_dtypes
import numpy as np

from .memory import Pointer


def numpy_dtype(name):
    """The NumPy dtype of a TIR scalar dtype."""
    name = str(name)
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def operator_name(call):
    """The name of a call's operator; TVM has two name spaces for arithmetic."""
    return call.op.name.replace("prim.", "tirx.", 1)


def is_float(dtype):
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def wrap(value, dtype):
    """A Python int modulo the dtype's range; arrays wrap by themselves."""
    if dtype.kind not in "iu" or isinstance(value, (np.ndarray, Pointer)):
        return value
    bits = dtype.itemsize * 8
    value = int(value) & ((1 << bits) - 1)
    return value - (1 << bits) if dtype.kind == "i" and value >> (bits - 1) else value


def scalar(value, dtype):
    """One element as a uniform value."""
    if dtype == np.bool_:
        return bool(value)
    return int(value) if dtype.kind in "iu" else dtype.type(value)


def cast(value, source, target):
    """C's conversion as CUDA compiles it: truncation and saturation of floats, wrapping of ints."""
    if isinstance(value, Pointer):
        return value
    if not isinstance(value, np.ndarray):
        if source.kind in "iub" and target.kind in "iu":
            return wrap(int(value), target)
        return scalar(cast(np.array([value], source), source, target)[0], target)
    if target == np.bool_:
        return value != 0
    if not is_float(source) or is_float(target):
        if is_float(source) and target.itemsize == 2:
            value = value.astype(np.float32)
        return value.astype(target)
    wide = np.dtype("uint32" if target.kind == "u" else "int32")  # cvt.rzi has no narrower target
    wide = target if target.itemsize > 4 else wide
    limits = np.iinfo(wide)
    whole = np.trunc(value.astype(np.float64))
    whole = np.where(np.isnan(whole), 0, whole)
    exact = np.clip(whole, float(limits.min), float(limits.max))
    result = np.where(exact >= float(limits.max), limits.max, exact.astype(wide))
    return result.astype(target)


def reinterpret(value, source, target):
    """The same bits as another dtype of the same width."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).view(target)
    if isinstance(value, Pointer):
        return value
    return scalar(np.array([value], source).view(target)[0], target)


def floor_div(a, b):
    if isinstance(b, int) and not isinstance(a, int) and b > 0 and b & (b - 1) == 0:
        return a >> (b.bit_length() - 1)
    return a // b


def floor_mod(a, b):
    if isinstance(b, int) and not isinstance(a, int) and b > 0 and b & (b - 1) == 0:
        return a & (b - 1)
    return a % b


def trunc_div(a, b):
    """Integers rounded towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    quotient = a // b
    return quotient + ((quotient * b != a) & ((np.asarray(a) < 0) != (np.asarray(b) < 0)))


def trunc_mod(a, b):
    return a - b * trunc_div(a, b)


def _pick(compare, reduce):
    """Of a NaN and a number the number, as CUDA's min and max give."""

    def pick(a, b):
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return reduce(a, b)
        return a if compare(a, b) or b != b else b

    return pick


BINARY = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": trunc_div,
    "Mod": trunc_mod,
    "FloorDiv": floor_div,
    "FloorMod": floor_mod,
    "Min": _pick(operator.lt, np.fmin),
    "Max": _pick(operator.gt, np.fmax),
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "BitwiseXor": operator.xor,
    "LShift": operator.lshift,
    "RShift": operator.rshift,
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
OF_FLOATS = {"Div": operator.truediv, "Mod": np.fmod}  # where they differ from integers
COMPARISONS = ("EQ", "NE", "LT", "LE", "GT", "GE")


def _invert(a):
    return ~a


def _in_float32(function):
    """Half precision goes through float32, as CUDA's device functions do."""

    def apply(*args):
        args = [np.asarray(a) for a in args]
        dtype = args[0].dtype
        if dtype.itemsize == 2:
            return function(*(a.astype(np.float32) for a in args)).astype(dtype)
        return function(*args)

    return apply


def _count_leading_zeros(value):
    bits = value.dtype.itemsize * 8
    unsigned = value.view(f"u{value.dtype.itemsize}").astype(object)
    return np.array([bits - int(x).bit_length() for x in unsigned.ravel()], np.int32)


def _fma(a, b, c):
    """One rounding; exact for float32, whose products float64 holds."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


# Calls that mean an operator.
BINARY_CALLS = {
    "tirx.shift_left": BINARY["LShift"],
    "tirx.shift_right": BINARY["RShift"],
    "tirx.bitwise_and": BINARY["BitwiseAnd"],
    "tirx.bitwise_or": BINARY["BitwiseOr"],
    "tirx.bitwise_xor": BINARY["BitwiseXor"],
    "tirx.truncdiv": trunc_div,
    "tirx.truncmod": trunc_mod,
}
# TIR functions of whole arrays: arguments are arrays [threads] or [1] of their own dtype.
MATH_CALLS = {
    "tirx.bitwise_not": _invert,
    "tirx.exp": _in_float32(np.exp),
    "tirx.exp2": _in_float32(np.exp2),
    "tirx.exp10": _in_float32(lambda x: np.power(x.dtype.type(10), x)),
    "tirx.log": _in_float32(np.log),
    "tirx.log2": _in_float32(np.log2),
    "tirx.log10": _in_float32(np.log10),
    "tirx.log1p": _in_float32(np.log1p),
    "tirx.sqrt": _in_float32(np.sqrt),
    "tirx.rsqrt": _in_float32(lambda x: x.dtype.type(1) / np.sqrt(x)),
    "tirx.tanh": _in_float32(np.tanh),
    "tirx.sigmoid": _in_float32(lambda x: x.dtype.type(1) / (x.dtype.type(1) + np.exp(-x))),
    "tirx.sin": _in_float32(np.sin),
    "tirx.cos": _in_float32(np.cos),
    "tirx.erf": _in_float32(
        lambda x: np.array([math.erf(v) for v in x.astype(np.float64)]).astype(x.dtype)
    ),
    "tirx.pow": _in_float32(np.power),
    "tirx.fabs": np.abs,
    "tirx.abs": np.abs,
    "tirx.floor": _in_float32(np.floor),
    "tirx.ceil": _in_float32(np.ceil),
    "tirx.trunc": _in_float32(np.trunc),
    "tirx.nearbyint": _in_float32(np.rint),
    "tirx.rint": _in_float32(np.rint),
    "tirx.round": _in_float32(lambda x: np.trunc(x + np.copysign(x.dtype.type(0.5), x))),
    "tirx.fma": _fma,
    "tirx.fmod": _in_float32(np.fmod),
    "tirx.copysign": _in_float32(np.copysign),
    "tirx.ldexp": lambda x, e: np.ldexp(x, e).astype(x.dtype),
    "tirx.isnan": lambda x: x != x,
    "tirx.isinf": lambda x: np.isinf(x.astype(np.float32)),
    "tirx.isfinite": lambda x: np.isfinite(x.astype(np.float32)),
    "tirx.popcount": lambda x: np.bitwise_count(x.view(f"u{x.dtype.itemsize}")).astype(np.int32),
    "tirx.clz": _count_leading_zeros,
}
