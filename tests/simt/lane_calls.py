"""PTX instructions on registers: shuffles and votes of a warp, conversions, arithmetic.

Signatures as ptx.CALLS wants them.
"""

import ml_dtypes
import numpy as np

from .memory_calls import TYPES, low_bits
from .races import WARP, SimtError

PAIRS = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16, "u16x2": np.uint16, "s16x2": np.int16}
BITS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def members(block, membermask, what):
    """bool [warps, 32] of the active lanes, which must be those that the mask names."""
    if block.threads % WARP:
        raise SimtError(f"{what} in a block of {block.threads} threads: the last warp is partial")
    active = block.active().reshape(-1, WARP)
    named = (block.lanes_of(membermask).astype(np.uint32).reshape(-1, WARP)[:, :, None] & BITS) != 0
    bad = active & (named != active[:, None, :]).any(2)
    if bad.any():
        thread = int(bad.reshape(-1).argmax())
        raise SimtError(
            f"{what}: the member mask names other lanes than those that arrive,"
            f" {block.place(thread)}"
        )
    return active


def warp_sync(block, mods, membermask):
    active = members(block, membermask[0], "bar.warp.sync")
    block.order.warp_barrier(np.flatnonzero(active.all(1)))


def shuffle(block, value, mode, b, c, membermask):
    """(values, predicate) [threads] of shfl.sync; b, c and membermask as in PTX."""
    active = members(block, membermask, "shfl.sync")
    lane = np.arange(WARP)
    b = block.lanes_of(b).astype(np.int64).reshape(-1, WARP) & 31
    c = block.lanes_of(c).astype(np.int64).reshape(-1, WARP)
    clamp, segment = c & 31, c >> 8 & 31
    lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
    source = {
        "up": lambda: lane - b,
        "down": lambda: lane + b,
        "bfly": lambda: lane ^ b,
        "idx": lambda: lowest | (b & ~segment),
    }[mode]()
    found = source >= highest if mode == "up" else source <= highest
    source = np.where(found, source, lane)
    lost = active & ~np.take_along_axis(active, source, 1)
    if lost.any():
        raise SimtError(f"shfl.sync from an inactive lane, {block.place(int(lost.argmax()))}")
    return np.take_along_axis(value.reshape(-1, WARP), source, 1).reshape(-1), found.reshape(-1)


def shfl_sync(block, mods, a, b, c, membermask):
    return [shuffle(block, a[0], mods["mode"], b[0], c[0], membermask[0])[0]]


def shfl_sync_p(block, mods, a, b, c, membermask):
    value, found = shuffle(block, a[0], mods["mode"], b[0], c[0], membermask[0])
    return [value, found.astype(np.uint32)]


def vote(block, mode, predicate, membermask):
    """uint32 [threads]."""
    active = members(block, membermask, "vote.sync")
    votes = (predicate != 0).reshape(-1, WARP)
    if mode == "ballot":
        result = np.where(votes & active, BITS, 0).sum(1)
    else:
        every, some = (votes | ~active).all(1), (votes & active).any(1)
        result = {"all": every, "any": some, "uni": every | ~some}[mode]
    return np.repeat(result, WARP).astype(np.uint32)


def vote_sync(block, mods, a, membermask):
    return [vote(block, mods["mode"], a[0], membermask[0])]


def activemask(block, mods):
    active = block.active().reshape(-1, WARP)
    return [np.repeat(np.where(active, BITS, 0).sum(1), WARP).astype(np.uint32)]


REDUCTIONS = {
    "add": np.add, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def redux_sync(block, mods, a, membermask):
    active = members(block, membermask[0], "redux.sync")
    values = a[0].view(TYPES[mods["type"]])
    result = values.copy()
    for warp in np.flatnonzero(active.any(1)):
        lanes = warp * WARP + np.flatnonzero(active[warp])
        result[lanes] = REDUCTIONS[mods["op"]].reduce(values[lanes], dtype=values.dtype)
    return [result]


def toward_zero(exact, rounded):
    """Undo a rounding away from zero."""
    over = np.abs(rounded.astype(np.float32)) > np.abs(exact)
    bits = rounded.view(np.uint16)
    return np.where(over, bits - np.uint16(1), bits).view(rounded.dtype)


def narrowed(value, dtype, mods):
    """float32 to a 16-bit float with the rounding, relu and saturation of the modifiers."""
    value = value.view(np.float32)
    if mods.get("relu"):
        value = np.where(value > 0, value, np.float32(0))
    result = value.astype(dtype)
    if mods["rnd"] == "rz":
        result = toward_zero(value, result)
    elif mods["rnd"] != "rn":
        raise NotImplementedError(f"cvt.{mods['rnd']} to {np.dtype(dtype)}")
    if mods.get("satfinite"):
        limit = ml_dtypes.finfo(dtype).max
        result = np.clip(result, -limit, limit)
    return result


def cvt_pair(block, mods, a, b):
    """b in the low half, a in the high half."""
    dtype = PAIRS[mods["dtype"]]
    pair = np.stack([narrowed(b[0], dtype, mods), narrowed(a[0], dtype, mods)], axis=1)
    return [pair.view(np.uint32).reshape(-1)]


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(block, mods, a):
    """Floats to integers saturate, NaN becomes 0; integers wrap, or saturate with .sat."""
    source, target = np.dtype(TYPES[mods["atype"]]), np.dtype(TYPES[mods["dtype"]])
    value = a[0] if a[0].dtype == source else low_bits(a[0], source)
    if target.kind in "iu":
        limits = np.iinfo(target)
        if source.kind in "iu":
            if mods["sat"]:
                value = np.clip(value.astype(object), limits.min, limits.max).astype(target)
            return [value.astype(target)]
        whole = ROUNDINGS[mods["rnd"]](value.astype(np.float64))
        whole = np.where(np.isnan(whole), 0.0, whole)
        inside = np.clip(whole, float(limits.min), float(limits.max))
        top = inside >= float(limits.max)
        return [np.where(top, limits.max, np.where(top, 0, inside).astype(target)).astype(target)]
    if mods["rnd"] in ROUNDINGS:
        value = ROUNDINGS[mods["rnd"]](value.astype(np.float64))
    if target.itemsize == 2 and source.kind not in "iu":
        result = narrowed(value.astype(np.float32), target, {**mods, "rnd": mods["rnd"] or "rn"})
    else:
        result = value.astype(target)
    if mods["sat"]:
        result = np.where(result > 0, np.fmin(result, result.dtype.type(1)), result.dtype.type(0))
    return [result]


def prmt(block, mods, a, b, c):
    """Byte i of the result: byte c[4i+2:4i] of {b, a}, or its sign with bit 4i + 3."""
    if mods["mode"]:
        raise NotImplementedError(f"prmt.{mods['mode']}")
    table = np.stack([a[0].view(np.uint32), b[0].view(np.uint32)], axis=1).view(np.uint8)
    selector = c[0].astype(np.int64)[:, None] >> np.arange(0, 16, 4) & 15
    found = np.take_along_axis(table, selector & 7, 1)
    sign = np.where(found & 0x80, 0xFF, 0).astype(np.uint8)
    result = np.where(selector & 8, sign, found)
    return [np.ascontiguousarray(result).view(np.uint32).reshape(-1)]


def lop3(block, mods, a, b, c, immLut):
    """Bit 4a + 2b + c of the table."""
    a, b, c = (x[0].view(np.uint32) for x in (a, b, c))
    result = np.zeros_like(a)
    for row in range(8):
        if immLut >> row & 1:
            chosen = [x if row >> bit & 1 else ~x for bit, x in ((2, a), (1, b), (0, c))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return [result]


def dp4a(block, mods, a, b, c):
    """c plus the four byte products."""
    left = a[0].view(np.uint32).reshape(-1, 1).view(np.int8 if mods["atype"] == "s32" else np.uint8)
    right = b[0].view(np.uint32).reshape(-1, 1)
    right = right.view(np.int8 if mods["btype"] == "s32" else np.uint8)
    total = (left.astype(np.int64) * right.astype(np.int64)).sum(1) + c[0]
    return [total.astype(c[0].dtype)]


def shf(block, mods, a, b, c):
    """Funnel shift of {b, a}: left gives the high word, right the low word."""
    wide = b[0].view(np.uint32).astype(np.uint64) << np.uint64(32) | a[0].view(np.uint32)
    amount = c[0].view(np.uint32)
    amount = np.minimum(amount, 32) if mods["mode"] == "clamp" else amount & 31
    if mods["dir"] == "l":
        return [(wide << amount.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)]
    return [(wide >> amount.astype(np.uint64)).astype(np.uint32)]


def bfe(block, mods, a, b, c):
    """c bits of a from bit b, sign-extended for signed types (32-bit types)."""
    dtype = np.dtype(TYPES[mods["type"]])
    if dtype.itemsize != 4:
        raise NotImplementedError(f"bfe.{mods['type']}")
    value, first = a[0].view(dtype).astype(np.int64), b[0].view(np.uint32) & 0xFF
    count = np.minimum(c[0].view(np.uint32) & 0xFF, 32).astype(np.int64)
    field = value >> np.minimum(first, 63).astype(np.int64) & ((1 << count) - 1)
    if dtype.kind == "i":
        top = np.where(count > 0, 1 << np.maximum(count - 1, 0), 0)
        field = (field ^ top) - top
    return [field.astype(dtype)]


def by_type(function):
    """An instruction whose operands all have its type; halves are computed in float32."""

    def call(block, mods, **operands):
        kind = mods["type"]
        if mods.get("sat") or mods.get("relu") or mods.get("nan"):
            raise NotImplementedError(f"saturating, relu or NaN form of an instruction of {kind}")
        dtype = np.dtype(PAIRS.get(kind) or TYPES[kind])
        half = dtype.itemsize == 2 and dtype.kind not in "iu"
        parts = [np.ascontiguousarray(value[0]).view(dtype) for value in operands.values()]
        result = function(*(p.astype(np.float32) if half else p for p in parts)).astype(dtype)
        return [result.view(np.uint32) if kind in PAIRS else result]

    return call


def fused(a, b, c):
    """One rounding, the caller's: float64 holds the product of two float32."""
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def selp(block, mods, a, b, c):
    return [np.where(c[0] != 0, a[0], b[0])]


def mov(block, mods, a):
    return a


def pack(block, mods, a):
    """Registers side by side, the first lowest."""
    raw = np.stack([np.ascontiguousarray(x) for x in a], axis=1)
    return [raw.view(f"u{raw.itemsize * len(a)}").reshape(-1)]


def unpack(block, mods, a):
    """The halves of a register, the low one first."""
    raw = np.ascontiguousarray(a[0])
    return list(raw.view(f"u{raw.itemsize // 2}").reshape(-1, 2).T)
