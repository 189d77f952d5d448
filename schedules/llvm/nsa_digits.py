"""Tasks of the NSA kernel on matrix tiles of int8 (AMX), for float32 and float16.

A row of numbers is a power of two times integers of 24 bits, and these are three digits of 8 bits.
A product of two such numbers is a sum of products of digits by levels: high times high is level 0,
high times middle is level 1, and so on. Levels 0 to 2 are six products of int8 tiles, exact in
int32, which take the time of three of bfloat16; levels 3 and 4 are below what the result resolves.

What is fixed is the place of the last bit, for a row of queries, a key, and a channel of the values
of a sequence: 2**-24 of the largest number there, whatever its exponent is. So errors are relative
to the product of the largest factors: of scores about as large as those of float32 multiply-adds,
of outputs up to three times as large where numbers are of one order. Nothing counts as zero for
being small as such; a value far below the largest of its channel has an error of that one. Weights
are at most 1 and the largest of a row is 1, so their last place is fixed already. Digits of weights
are unsigned, others are balanced, -128 to 127, so that what is left out is 0 on the average.

A row that is not finite has the power NaN, which its scores take; so have the outputs of a channel
with such a value.

Sums over 64 numbers of a row go through a tile as 16 words of 4 digits: those of numbers i, 32 + i,
16 + i and 48 + i. Tiles lie in one piece, uint32 [16][16]:

Q [m / 16][channel / 64][digit]; K [h2][key / 16][channel / 64][digit], keys across;
P [m / 16][key / 64][digit]; V [h2][key / 64][channel / 16][digit], channels across.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_amx
from .attention_amx import BLOCK, SIDE, load_tile, store_tile
from .attention_task import opaque
from .nsa_amx import TileTask
from .nsa_lengths import slots
from .nsa_tile import FLT_MAX
from .transpose import transpose_square
from .vector import (
    LOG2E,
    cast,
    constant,
    exp2_weight,
    float32,
    from_float32,
    load_lanes,
    max_lanes,
    nearest_int32,
    ramp,
    reinterpret,
    scale_by_power,
    sum_lanes,
    to_float32,
    vector_unit,
)

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

DIGITS = 3
_BITS = 8 * DIGITS - 1
"""Of an integer, besides its sign."""
QUAD = 4 * SIDE
"""Numbers of a row of a tile."""
LEFT, RIGHT = 6, 7
"""Tiles of what is multiplied; tiles 0 to 5 hold the sums by level, of two tiles of rows each."""
# Each takes over one side of the one before, and four tiles of sums take turns, which is what hides
# the latency of a product.
_PRODUCTS = (
    *((0, 0, 2), (1, 0, 2), (1, 0, 0), (0, 0, 0), (0, 2, 0), (1, 2, 0)),
    *((1, 1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 1)),
)
"""(tile of rows, digit of the left, digit of the right), digit 0 the highest."""
WEIGHT = 2.0**24 - 2.0**4
"""The integer of a weight of 1: of 24 bits also where the exponential is a little off."""
_DEPTH_LIMIT = 2**14
"""Channels whose sums of digits stay inside int32, as those of CMP_SKV_LIMIT keys do."""
_SIGN_BITS = 0x808080


class DigitTask(TileTask):
    """What ``nsa`` asks of a kind of task."""

    measures = True

    @staticmethod
    def available(problem: Problem, target: Target) -> bool:
        """float32 and float16 on a target with int8 tiles beside vectors as wide as their rows."""
        return (
            problem.dtype in ("float32", "float16")
            and vector_unit(target).lanes == x86_amx.LANES
            and x86_amx.available(target)
            and problem.head_size <= _DEPTH_LIMIT
        )

    def __init__(self, problem: Problem, target: Target):
        super().__init__(problem, target)
        self.strips = -(-problem.head_size // QUAD)
        """Tiles of a row of queries."""
        self.depth = self.strips * QUAD
        self.panels = -(-problem.value_size // SIDE) if self.wants_out else 0
        self.key_slot = QUAD
        mantissa, exponent = math.frexp(problem.scale * LOG2E)
        self.mantissa = mantissa
        """Scores are products times this and a power of two, so in units of ln 2."""
        self.score_power = float(exponent - 2 * _BITS + 16)
        self.value_power = float(16 - _BITS)
        self.factor = 1.0

    @property
    def sources(self) -> list[str]:
        return [x86_amx.SOURCE, *self.stream.sources]

    # -- keys and values ----------------------------------------------------------------------

    def allocate_packed(self, key_tokens: Expr, sequences: Expr) -> SimpleNamespace:
        """K, V, and their powers of two: of a key, of a channel (at the first slot of a sequence),
        as scores and outputs need them.
        """
        N2, count = self.problem.key_heads, slots(key_tokens, sequences, QUAD)
        tile = (DIGITS, SIDE, SIDE)
        return SimpleNamespace(
            K=T.alloc_buffer((N2, count * (QUAD // SIDE), self.strips, *tile), "uint32"),
            V=T.alloc_buffer((N2, count, self.panels, *tile), "uint32"),
            key_power=T.alloc_buffer((N2, count * QUAD)),
            value_power=T.alloc_buffer((N2, count, self.panels * SIDE)),
        )

    def measure(self, packed, Values, h2, first, row, count) -> None:
        """Powers of two of the channels of ``count`` values from ``row`` on."""
        DV = self.problem.value_size
        if not self.wants_out:
            return
        h2, first, row, count = opaque("int64", [h2, first, row, count])
        top = T.alloc_buffer((self.panels * SIDE,), "int32")
        with T.serial(self.panels) as panel:
            zero = tir.Broadcast(tir.const(0, "int32"), SIDE)
            T.buffer_store(top, zero, [ramp(panel * SIDE, SIDE)])
        with T.serial(count) as i:
            with T.serial(DV // SIDE) as panel:
                at = [ramp(panel * SIDE, SIDE)]
                x = to_float32(load_lanes(Values, [row + i, h2, panel * SIDE], SIDE), self.unit)
                T.buffer_store(top, tir.max(tir.BufferLoad(top, at), _magnitude(x)), at)
            with T.serial(DV % SIDE) as tail:
                c = DV // SIDE * SIDE + tail
                x = to_float32(Values[row + i, h2, c], self.unit)
                T.buffer_store(top, tir.max(top[c], _magnitude(x)), [c])
        with T.serial(self.panels) as panel:
            at = ramp(panel * SIDE, SIDE)
            power = _power(tir.BufferLoad(top, [at])) + float32(self.value_power, at)
            T.buffer_store(packed.value_power, power, [h2, first, at])

    def pack(self):
        def pack(packed, Keys, Values, h2, first, slot, row, count) -> None:
            h2, first, slot, row, count = opaque("int64", [h2, first, slot, row, count])
            with T.serial(QUAD // SIDE) as side:
                self._pack_keys(packed, Keys, h2, slot, side, row, count)
            if self.wants_out:
                self._pack_values(packed, Values, h2, first, slot, row, count)

        return pack

    def _pack_keys(self, packed, Keys, h2, slot, side, row, count) -> None:
        """16 keys; those beyond ``count`` repeat the last one."""
        tiles = T.alloc_buffer((self.strips, DIGITS, SIDE, SIDE), "uint32")
        with T.serial(SIDE) as n:
            key = T.Bind(side.astype("int64") * SIDE + n)
            source = T.Bind(row + tir.min(key, count - 1))
            power = self._split_row(
                Keys, (source, h2), lambda strip, digit: (tiles, strip, digit, n)
            )
            T.buffer_store(
                packed.key_power, power + float32(self.score_power), [h2, slot * QUAD + key]
            )
        with T.serial(self.strips) as strip, T.serial(DIGITS) as digit:
            block = T.alloc_buffer((SIDE, SIDE), "uint32", scope="local")
            for n in range(SIDE):
                words = load_lanes(tiles, [strip, digit, n, 0], SIDE)
                T.buffer_store(block, words, [n, ramp(0, SIDE)])
            transpose_square(block, SIDE)
            for word in range(SIDE):
                at = [h2, slot * (QUAD // SIDE) + side, strip, digit, word, ramp(0, SIDE)]
                T.buffer_store(packed.K, load_lanes(block, [word, 0], SIDE), at)

    def _pack_values(self, packed, Values, h2, first, slot, row, count) -> None:
        """64 keys, 0 beyond ``count``."""
        DV = self.problem.value_size
        rows = T.alloc_buffer((QUAD, self.panels * SIDE), "float32")
        with T.serial(QUAD) as i:
            with T.serial(self.panels) as panel:
                T.buffer_store(rows, tir.Broadcast(float32(0), SIDE), [i, ramp(panel * SIDE, SIDE)])
            with T.If(i < count), T.Then(), T.serial(DV) as c:
                T.buffer_store(rows, to_float32(Values[row + i, h2, c], self.unit), [i, c])
        with T.serial(self.panels) as panel:
            power = load_lanes(packed.value_power, [h2, first, panel * SIDE], SIDE)
            power = T.Bind(float32(16, power) - power)
            with T.serial(SIDE) as word:
                numbers = [
                    _balanced(load_lanes(rows, [word + part * SIDE, panel * SIDE], SIDE), power)
                    for part in range(4)
                ]
                for digit, words in enumerate(_planes(numbers)):
                    T.buffer_store(packed.V, words, [h2, slot, panel, digit, word, ramp(0, SIDE)])

    def _split_row(
        self, source: Buffer, index: tuple[Expr, Expr], place: Callable[[Expr, int], tuple]
    ) -> Expr:
        """Digits of a row of queries or keys to ``place(strip, digit)``; its power of two."""
        size = self.problem.head_size
        if size % QUAD:
            row = T.alloc_buffer((self.depth,), "float32")
            with T.serial(size) as c:
                T.buffer_store(row, to_float32(source[(*index, c)], self.unit), [c])
            with T.serial(self.depth - size) as c:
                T.buffer_store(row, float32(0), [size + c])

        def numbers(first: Expr) -> Expr:
            if size % QUAD:
                return load_lanes(row, [first], SIDE)
            return T.Bind(to_float32(load_lanes(source, [*index, first], SIDE), self.unit))

        top = T.alloc_buffer((SIDE,), "int32", scope="local")
        T.buffer_store(top, tir.Broadcast(tir.const(0, "int32"), SIDE), [ramp(0, SIDE)])
        with T.serial(self.depth // SIDE) as part:
            largest = tir.max(load_lanes(top, [0], SIDE), _magnitude(numbers(part * SIDE)))
            T.buffer_store(top, largest, [ramp(0, SIDE)])
        power = T.Bind(_power(T.Bind(max_lanes(T.Bind(load_lanes(top, [0], SIDE))))))
        up = T.Bind(tir.Broadcast(float32(_BITS) - power, SIDE))
        with T.serial(self.strips) as strip:
            words = [_balanced(numbers(strip * QUAD + part * SIDE), up) for part in range(4)]
            for digit, plane in enumerate(_planes(words)):
                buffer, *at = place(strip, digit)
                T.buffer_store(buffer, plane, [*at, ramp(0, SIDE)])
        return power

    # -- buffers of a thread ------------------------------------------------------------------

    def _allocate_operands(self, groups: Expr) -> dict[str, Buffer]:
        quads = groups * BLOCK // QUAD
        tile = (DIGITS, SIDE, SIDE)
        return {
            "Q": T.alloc_buffer((self.height // SIDE, self.strips, *tile), "uint32"),
            "query_power": T.alloc_buffer((self.height,), "float32", scope="local"),
            "P": T.alloc_buffer((self.height // SIDE, quads, *tile), "uint32"),
            "quads": T.alloc_buffer((quads + 1,), "int32"),
            "quad_count": T.alloc_buffer((1,), "int32", scope="local"),
            "levels": T.alloc_buffer((DIGITS, BLOCK, SIDE), "int32", scope="local"),
        }

    # -- statements of a task -----------------------------------------------------------------

    def load_queries(self, w, X, token, rows, h2) -> None:
        """Q and powers of two; rows beyond ``rows`` repeat the last one."""
        G = self.problem.group
        with T.serial(self.height) as m:
            source = (T.Bind(token + tir.min((m // G).astype("int64"), rows - 1)), h2 * G + m % G)
            power = self._split_row(
                X, source, lambda strip, digit: (w.Q, m // SIDE, strip, digit, m % SIDE)
            )
            T.buffer_store(w.query_power, power, [m])

    def score_groups(self, w, X, packed, token, h2, slot, rows, keys, blocks) -> None:
        """S = Q . K of the live groups."""
        K = packed.K
        (slot,) = opaque("int64", [slot])
        with T.serial(w.count[0]) as i:
            (group,) = opaque("int64", [w.live[i]])
            with T.serial(blocks) as block:
                with T.serial(BLOCK // SIDE) as side:
                    (panel,) = opaque("int64", [slot * (QUAD // SIDE) + group * 2 + side])
                    _clear_levels()
                    with T.serial(self.strips) as strip:
                        _multiply(
                            x86_amx.multiply,
                            lambda tile, digit: w.Q[block * 2 + tile, strip, digit, 0, 0],
                            lambda digit: K[h2, panel, strip, digit, 0, 0],
                        )
                    _store_levels(w.levels)
                    self._settle(w, packed, h2, block, panel, group * BLOCK + side * SIDE)
                with T.If(w.partial[i] != 0), T.Then():
                    self._hide(w, block, group, rows, keys)

    def _settle(self, w, packed, h2, block, panel, key) -> None:
        """Scores of 32 rows and 16 keys from their levels."""
        key_power = T.Bind(load_lanes(packed.key_power, [h2, panel * SIDE], SIDE))
        with T.serial(BLOCK) as r:
            m = block * BLOCK + r
            power = key_power + tir.Broadcast(w.query_power[m], SIDE)
            x = scale_by_power(_joined(w.levels, r, self.mantissa), power)
            T.buffer_store(w.S, x, [m, ramp(key, SIDE)])

    def _find_quads(self, w, blocks) -> None:
        """quads: each 64 keys with a live group; minus infinity in one that is not live."""
        T.buffer_store(w.quad_count, tir.const(0, "int32"), [0])
        none = tir.Broadcast(float32(float("-inf")), SIDE)
        with T.serial(w.count[0]) as i:
            (group,) = opaque("int32", [w.live[i]])
            odd = group % 2 == 1
            before = tir.if_then_else(i > 0, w.live[tir.max(i - 1, 0)], -1)
            after = tir.if_then_else(i + 1 < w.count[0], w.live[tir.min(i + 1, w.count[0] - 1)], -1)
            second = T.Bind(tir.all(odd, before == group - 1))
            with T.If(tir.Not(second)), T.Then():
                T.buffer_store(w.quads, group // 2, [w.quad_count[0]])
                T.buffer_store(w.quad_count, w.quad_count[0] + 1, [0])
                with T.If(tir.any(odd, after != group + 1)), T.Then():
                    other = group + 1 - 2 * (group % 2)
                    with T.serial(blocks * BLOCK) as m:
                        for side in range(BLOCK // SIDE):
                            T.buffer_store(w.S, none, [m, ramp(other * BLOCK + side * SIDE, SIDE)])

    def weigh(self, w, blocks, X, Out, token, h2, ahead) -> None:
        """S = exp(S - M) in units of the last place, P its digits, total and inverse."""
        low, zero = float32(-FLT_MAX), float32(0)
        self._find_quads(w, blocks)
        sums = T.alloc_buffer((2, SIDE), "float32", scope="local")
        with T.serial(blocks * BLOCK) as m:
            self._ask_ahead(m, X, Out, token, h2, ahead)
            base = T.Bind(tir.Broadcast(tir.Select(w.top[m] == low, zero, w.top[m]), SIDE))
            for side in range(2):
                T.buffer_store(sums, tir.Broadcast(zero, SIDE), [side, ramp(0, SIDE)])
            with T.serial(w.quad_count[0]) as i:
                (quad,) = opaque("int32", [w.quads[i]])
                words = []
                for part in range(4):
                    index = [m, ramp(quad * QUAD + part * SIDE, SIDE)]
                    x = T.Bind(tir.BufferLoad(w.S, index) - base)
                    weight = T.Bind(exp2_weight(x, self.unit, peak=WEIGHT))
                    T.buffer_store(w.S, weight, index)
                    total = load_lanes(sums, [part % 2, 0], SIDE) + weight
                    T.buffer_store(sums, total, [part % 2, ramp(0, SIDE)])
                    words.append(T.Bind(reinterpret("uint32", nearest_int32(weight))))
                if self.wants_out:
                    for digit, plane in enumerate(_planes(words)):
                        index = [m // SIDE, quad, digit, m % SIDE, ramp(0, SIDE)]
                        T.buffer_store(w.P, plane, index)
            both = T.Bind(load_lanes(sums, [0, 0], SIDE) + load_lanes(sums, [1, 0], SIDE))
            total = T.Bind(sum_lanes(both))
            T.buffer_store(w.total, total / float32(WEIGHT), [m])
            inverse = tir.Select(total <= zero, zero, float32(1) / total)
            T.buffer_store(w.inverse, inverse, [m])

    def multiply_values(self, w, packed, Out, h2, slot, token, rows, blocks) -> None:
        """Out = P . V / L, 32 rows and 16 channels at a time."""
        slot, token, rows = opaque("int64", [slot, token, rows])
        with T.serial(blocks) as block, T.serial(self.panels) as panel:
            _clear_levels()
            with T.serial(w.quad_count[0]) as i:
                (quad,) = opaque("int64", [w.quads[i]])
                _multiply(
                    x86_amx.multiply_unsigned,
                    lambda tile, digit: w.P[block * 2 + tile, quad, digit, 0, 0],
                    lambda digit: packed.V[h2, slot + quad, panel, digit, 0, 0],
                )
            _store_levels(w.levels)
            self._store_panel(w, packed, Out, block, panel, h2, slot, token, rows)

    def _store_panel(self, w, packed, Out, block, panel, h2, slot, token, rows) -> None:
        p = self.problem
        G, DV = p.group, p.value_size
        first = panel * SIDE
        power = T.Bind(load_lanes(packed.value_power, [h2, slot, first], SIDE))
        with T.serial(tir.min(rows * G - block * BLOCK, BLOCK)) as r:
            m = T.Bind(block * BLOCK + r)
            index = [token + m // G, h2 * G + m % G]
            x = _joined(w.levels, r, 1.0) * tir.Broadcast(w.inverse[m], SIDE)
            x = T.Bind(from_float32(scale_by_power(x, power), p.dtype, self.unit))
            if DV % SIDE == 0:
                self._store_whole(Out, index, first, x)
            else:
                kept = T.alloc_buffer((SIDE,), p.dtype, scope="local")
                T.buffer_store(kept, x, [ramp(0, SIDE)])
                with T.serial(tir.min(DV - first, SIDE)) as c:
                    T.buffer_store(Out, kept[c], [*index, first + c])


def _clear_levels() -> None:
    for tile in range(2 * DIGITS):
        T.evaluate(x86_amx.zero(tile))


def _multiply(
    product: Callable[[int, int, int], Expr],
    left: Callable[[int, int], Expr],
    right: Callable[[int], Expr],
) -> None:
    """Levels += the products of 32 rows of digits and 16 columns."""
    held = None, None
    for tile, a, b in _PRODUCTS:
        if (tile, a) != held[0]:
            load_tile(LEFT, left(tile, a), x86_amx.ROW_BYTES)
        if b != held[1]:
            load_tile(RIGHT, right(b), x86_amx.ROW_BYTES)
        held = (tile, a), b
        T.evaluate(product(2 * (a + b) + tile, LEFT, RIGHT))


def _store_levels(levels: Buffer) -> None:
    for level in range(DIGITS):
        for tile in range(2):
            store_tile(2 * level + tile, levels[level, tile * SIDE, 0], x86_amx.ROW_BYTES)


def _joined(levels: Buffer, r: Expr, factor: float) -> Expr:
    """The sum of the levels of row r in units of 2**16 last places, times ``factor``."""
    high, middle, low = (
        load_lanes(levels, [level, r, 0], SIDE).astype(f"float32x{SIDE}") for level in range(DIGITS)
    )
    low = low if factor == 1 else low * float32(factor, low)
    middle = T.Bind(middle * float32(2**8 * factor, middle) + low)
    return T.Bind(high * float32(2**16 * factor, high) + middle)


def _magnitude(x: Expr) -> Expr:
    """The bits of \\|x\\| as int32, in the order of the numbers; NaN is above infinity."""
    bits = reinterpret("int32", x)
    return bits & constant(0x7FFFFFFF, "int32", bits)


def _power(top: Expr) -> Expr:
    """The least power of two, as float32, by which numbers up to that with the bits ``top`` are
    below 127/128; NaN where they are not all finite.
    """
    upper, place, bias, infinity = (
        constant(x, "int32", top) for x in (1 << 17, 23, 126, 0x7F800000)
    )
    exponent = cast("float32", ((top + upper) >> place) - bias)
    return tir.Select(top < infinity, exponent, float32(float("nan"), exponent))


def _balanced(x: Expr, power: Expr) -> Expr:
    """x * 2**power as integers whose bytes are digits from -128 to 127."""
    number = T.Bind(reinterpret("uint32", nearest_int32(scale_by_power(x, power))))
    sign = tir.Broadcast(tir.const(_SIGN_BITS, "uint32"), SIDE)
    return T.Bind((number + sign) ^ sign)


def _planes(numbers: list[Expr]) -> list[Expr]:
    """The highest, middle and lowest of three bytes of four registers of integers, words of which
    hold those of numbers 0, 2, 1 and 3.
    """
    a, b, c, d = numbers

    def const(value: int) -> Expr:
        return tir.Broadcast(tir.const(value, "uint32"), SIDE)

    low16, high16, even, odd = map(const, (0xFFFF, 0xFFFF0000, 0x00FF00FF, 0xFF00FF00))
    half, byte = const(16), const(8)
    low = [T.Bind((x & low16) | (y << half)) for x, y in ((a, b), (c, d))]
    high = [T.Bind((x >> half) | (y & high16)) for x, y in ((a, b), (c, d))]
    return [
        T.Bind((high[0] & even) | ((high[1] & even) << byte)),
        T.Bind(((low[0] >> byte) & even) | (low[1] & odd)),
        T.Bind((low[0] & even) | ((low[1] & even) << byte)),
    ]
