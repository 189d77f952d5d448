"""Tasks of the NSA kernel on matrix tiles of bfloat16 (AMX), for float32 and float16.

Queries, keys, values and weights are sums of bfloat16 terms, as in ``attention_split``: three terms
hold each float32 exactly, two each float16. Terms are rounded to nearest, so each is at most 2**-8
of the one before, and what is left out has either sign.

        Q . K, float32      6 products of 9 of three terms: 2**-24 of |Q| . |K| is left out
        Q . K, float16      4 products of two terms: exact
        P . V               3 products of 4 of two terms: at most 2**-15 of P . |V| is left out

so scores, what is selected by them, and softmax records are as good as those of multiply-adds. Of
the output at most 2**-17 each is the rounding of float32 weights and values to two terms, the rest
the product of their second ones; of either sign, and divided among as many keys as matter.

Values are multiplied by `VALUE_SCALE`. Finite elements of `LIMIT` and more, after that, are left to
multiply-adds of what lies in the inputs: scores of a group of 32 keys where one of its keys or a
query of the task is such, the output of a task where a value of a group that it sees is. What is
not finite stays in its row of queries or keys.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_amx
from . import nsa_amx
from .attention_operands import BLOCK, SIDE
from .attention_split import LARGEST_SCALE, LIMIT, TERMS, VALUE_SCALE
from .attention_task import opaque
from .nsa_amx import TileTask
from .nsa_amx_weights import weigh_block
from .nsa_lengths import slots
from .vector import (
    constant,
    float32,
    from_float32,
    lanes_of,
    load_lanes,
    max_lanes,
    ramp,
    reinterpret,
    sum_lanes,
    to_float32,
)

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

VALUE_TERMS = 2
"""Of values and weights."""
_INFINITY_BITS = 0x7F800000
_KEYS, _VALUES = 0, 1
"""Which elements of a slot are large."""


def available(problem: Problem, target: Target) -> bool:
    """float32 and float16 where ``nsa_amx`` has its tiles, and no scale makes terms matter that
    count as zero.
    """
    return (
        problem.dtype in TERMS
        and nsa_amx.has_tiles(problem, target)
        and abs(problem.scale) <= LARGEST_SCALE
    )


def nearest_terms(x: Expr, count: int) -> list[Expr]:
    """The bits (uint32) of float32 numbers whose upper halves are bfloat16 numbers with the sum
    ``x``, or next to it. Each is what the ones before leave, rounded to nearest, halves up.
    """
    terms: list[Expr] = []
    rest = x
    for left in reversed(range(count)):
        bits = reinterpret("uint32", rest) + constant(0x8000, "uint32", x)
        if left:
            bits = T.Bind(bits & constant(0xFFFF0000, "uint32", x))
            rest = T.Bind(rest - reinterpret("float32", bits))
        terms.append(bits)
    return terms


class SplitTask(TileTask):
    """What ``nsa`` asks of a kind of task."""

    def __init__(self, problem: Problem, target: Target):
        super().__init__(problem, target)
        self.watches = problem.dtype == "float32"
        """Whether elements may be large."""

    @property
    def terms(self) -> int:
        return TERMS[self.problem.dtype]

    @property
    def value_terms(self) -> int:
        return VALUE_TERMS

    @property
    def degree(self) -> int:
        return 5 if self.problem.dtype == "float32" else 4

    def element_words(self, x: Expr) -> list[Expr]:
        x = T.Bind(to_float32(x, self.unit))
        self._watch(x)
        return [self._upper_halves(bits) for bits in nearest_terms(x, self.terms)]

    def _upper_halves(self, bits: Expr) -> Expr:
        lanes = lanes_of(bits)
        if lanes == 1:
            return (bits >> tir.const(16, "uint32")).astype("uint16")
        halves = tir.reinterpret(f"uint16x{2 * lanes}", bits)
        return tir.Shuffle([halves], list(range(1, 2 * lanes, 2)))

    def value_words(self, x: Expr) -> list[Expr]:
        x = T.Bind(to_float32(x, self.unit))
        self._watch(x)
        if self.watches:
            x = T.Bind(x * float32(VALUE_SCALE, x))
        return [bits >> constant(16, "uint32", x) for bits in nearest_terms(x, self.value_terms)]

    def weight_pairs(self, low: Expr, high: Expr) -> list[Expr]:
        halves = (nearest_terms(x, self.value_terms) for x in (low, high))
        return [x86_amx.upper_halves(a, b) for a, b in zip(*halves)]

    def output_factor(self, inverse: Expr) -> Expr:
        return inverse * float32(1 / VALUE_SCALE) if self.watches else inverse

    # -- large elements -----------------------------------------------------------------------

    def _begin_watch(self) -> None:
        """From here on magnitudes of finite elements enter ``largest``."""
        self.largest = T.alloc_buffer((BLOCK,), "uint32", scope="local")
        none = tir.Broadcast(tir.const(0, "uint32"), BLOCK)
        T.buffer_store(self.largest, none, [ramp(0, BLOCK)])

    def _watch(self, x: Expr) -> None:
        if not self.watches:
            return
        lanes = lanes_of(x)
        index = ramp(0, lanes) if lanes > 1 else 0
        magnitude = T.Bind(reinterpret("uint32", x) & constant(0x7FFFFFFF, "uint32", x))
        infinity, none = (constant(bits, "uint32", x) for bits in (_INFINITY_BITS, 0))
        magnitude = tir.Select(magnitude < infinity, magnitude, none)
        before = tir.BufferLoad(self.largest, [index])
        T.buffer_store(self.largest, tir.max(before, magnitude), [index])

    def _met(self, limit: float) -> Expr:
        """1 where an element since ``_begin_watch`` was ``limit``, a power of two, or more."""
        largest = max_lanes(T.Bind(tir.BufferLoad(self.largest, [ramp(0, BLOCK)])))
        bits = int(math.log2(limit) + 127) << 23
        return (largest >= tir.const(bits, "uint32")).astype("int32")

    # -- keys, values and queries -------------------------------------------------------------

    def allocate_packed(self, Keys: Buffer, Values: Buffer, sequences: Expr) -> SimpleNamespace:
        packed = super().allocate_packed(Keys, Values, sequences)
        if self.watches:
            count = slots(Keys.shape[0], sequences, BLOCK)
            packed.Keys, packed.Values = Keys, Values
            packed.large = T.alloc_buffer((self.problem.key_heads, count, 2), "int32")
        return packed

    def pack_keys(self, packed, Keys, h2, slot, row, count) -> None:
        if not self.watches:
            return super().pack_keys(packed, Keys, h2, slot, row, count)
        self._begin_watch()
        super().pack_keys(packed, Keys, h2, slot, row, count)
        T.buffer_store(packed.large, self._met(LIMIT), [h2, slot, _KEYS])

    def pack_values(self, packed, Values, h2, slot, row, count) -> None:
        if not self.watches:
            return super().pack_values(packed, Values, h2, slot, row, count)
        self._begin_watch()
        super().pack_values(packed, Values, h2, slot, row, count)
        large = self._met(LIMIT / VALUE_SCALE)
        T.buffer_store(packed.large, large, [h2, slot, _VALUES])

    def allocate(self, key_tokens: Expr) -> SimpleNamespace:
        w = super().allocate(key_tokens)
        if self.watches:
            w.large_value = T.alloc_buffer((1,), "int32", scope="local")
        return w

    def score_groups(self, w, X, Out, packed, at) -> None:
        if self.watches:
            self._begin_watch()
        super().score_groups(w, X, Out, packed, at)

    # -- products -----------------------------------------------------------------------------

    def multiply_keys(self, w, X, packed, at, group, block, beside) -> None:
        if not self.watches:
            return super().multiply_keys(w, X, packed, at, group, block, beside)
        with T.If((self._met(LIMIT) | packed.large[at.h2, at.slot + group, _KEYS]) != 0):
            with T.Then():
                self._multiply_add_keys(w, X, packed, at, group, block)
                with T.serial(self.depth // BLOCK) as strip:
                    beside(strip)
            with T.Else():
                super().multiply_keys(w, X, packed, at, group, block, beside)

    def _multiply_add_keys(self, w, X, packed, at, group, block) -> None:
        """S of 32 rows and 32 keys by multiply-adds."""
        p = self.problem
        D = p.head_size
        whole = D // SIDE * SIDE
        sums = T.alloc_buffer((SIDE,), "float32", scope="local")
        tail = T.alloc_buffer((1,), "float32", scope="local")
        with T.serial(BLOCK) as r, T.serial(BLOCK) as k:
            m = block * BLOCK + r
            key = group * BLOCK + k
            query, source = self._query(at, m), (at.k0 + tir.min(key, at.keys - 1), at.h2)
            T.buffer_store(sums, tir.Broadcast(float32(0), SIDE), [ramp(0, SIDE)])
            T.buffer_store(tail, float32(0), [0])
            with T.serial(D // SIDE) as part:
                a, b = (
                    load_lanes(buffer, [*index, part * SIDE], SIDE)
                    for buffer, index in ((X, query), (packed.Keys, source))
                )
                T.buffer_store(sums, load_lanes(sums, [0], SIDE) + a * b, [ramp(0, SIDE)])
            with T.serial(D - whole) as c:
                product = X[(*query, whole + c)] * packed.Keys[(*source, whole + c)]
                T.buffer_store(tail, tail[0] + product, [0])
            total = sum_lanes(T.Bind(load_lanes(sums, [0], SIDE))) + tail[0]
            T.buffer_store(w.S, -total if p.scale < 0 else total, [m, key])

    def multiply_values(self, w, packed, Out, at) -> None:
        if not self.watches:
            return super().multiply_values(w, packed, Out, at)
        T.buffer_store(w.large_value, tir.const(0, "int32"), [0])
        with T.serial(w.count[0]) as i:
            large = packed.large[at.h2, at.slot + w.live[i], _VALUES]
            T.buffer_store(w.large_value, w.large_value[0] | large, [0])
        with T.If(w.large_value[0] != 0):
            with T.Then():
                with T.If(self.weighs_late(w, at)), T.Then():
                    weigh_block(self, w, at.blocks - 1)
                self._multiply_add_values(w, packed, Out, at)
            with T.Else():
                super().multiply_values(w, packed, Out, at)

    def _multiply_add_values(self, w, packed, Out, at) -> None:
        """Out of a task by multiply-adds."""
        p = self.problem
        G, DV = p.group, p.value_size

        def columns(m: Expr, first: Expr, lanes: int) -> None:
            index = ramp(first, lanes) if lanes > 1 else first
            own = ramp(0, lanes) if lanes > 1 else 0
            sums = T.alloc_buffer((lanes,), "float32", scope="local")
            T.buffer_store(sums, constant(0, "float32", index), [own])
            with T.serial(w.count[0]) as i, T.serial(BLOCK) as k:
                (key,) = opaque("int64", [w.live[i] * BLOCK + k])
                weight = w.S[m, key]
                if lanes > 1:
                    weight = tir.Broadcast(weight, lanes)
                value = tir.BufferLoad(
                    packed.Values, [at.k0 + tir.min(key, at.keys - 1), at.h2, index]
                )
                T.buffer_store(sums, tir.BufferLoad(sums, [own]) + weight * value, [own])
            inverse = w.inverse[m]
            total = tir.BufferLoad(sums, [own])
            total = total * (tir.Broadcast(inverse, lanes) if lanes > 1 else inverse)
            total = from_float32(total, p.dtype, self.unit)
            T.buffer_store(Out, total, [at.token + m // G, at.h2 * G + m % G, index])

        with T.serial(at.rows * G) as m:
            with T.serial(DV // SIDE) as part:
                columns(m, part * SIDE, SIDE)
            with T.serial(DV % SIDE) as tail:
                columns(m, DV // SIDE * SIDE + tail, 1)
