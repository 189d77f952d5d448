"""Where a thread of the fused attention kernel stands, and what a pair (i, j) means there: its
bias, mask and dropout decision, as statements over the thread's registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ...relay_ops.attention import LOG2E, Sequence
from .arch import WARP, Arch
from .attention_config import AttentionConfig, draws_alone

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem


class Place(NamedTuple):
    """What a block computes."""

    at: Sequence
    n: Expr
    """Its (first) query head."""
    i0: Expr
    """Its first query row."""
    part: Expr
    """Its slice of the output's columns."""
    split: Expr
    """Its share of the keys, of ``splits``."""
    splits: Expr | None


def named(value: Expr) -> Expr:
    """The value in a register; constants as they are.

    TVM's simplifier would substitute a bound value into every use, and reason about it there: that
    multiplies the compile time.
    """
    if isinstance(value, tir.IntImm | tir.FloatImm):
        return value
    slot = T.alloc_buffer((1,), value.ty.dtype, scope="local")
    T.buffer_store(slot, value, [0])
    return slot[0]


def float32(value: float) -> Expr:
    return tir.const(value, "float32")


def int32(value: int | Expr) -> Expr:
    return tir.const(value, "int32") if isinstance(value, int) else value.astype("int32")


@dataclass
class Standing:
    """A thread of a block: 16-row fragment m and half h of it give query row ``row(m, h)``."""

    problem: AttentionProblem
    config: AttentionConfig
    arch: Arch
    buffers: dict[str, tir.Buffer]
    thread: Expr

    def place(self, place: Place) -> None:
        p, c = self.problem, self.config
        self.at, self.n, self.i0 = place.at, place.n, place.i0
        self.part, self.split, self.splits = place.part, place.split, place.splits
        self.lane = named(self.thread % WARP)
        self.warp = self.thread // WARP
        self.rows = named(self.at.S1 * c.heads - self.i0)
        """Query rows from the first on, perhaps more than the tile holds."""
        self.g = named(attention.head_group(self.n, p.N1, p.N2))
        self.first_row = named(self.warp * c.warp_rows + self.lane // 4)
        self.first_column = named(self.lane % 4 * 2)
        self.scalars = self._scalars()
        self.wants_output = "attention_out" in p.outputs
        self.slope_of = {}
        if p.pse == "slopes":
            self.slope_of = {mh: named(self._slope(*mh)) for mh in self.fragments}

    @property
    def fragments(self) -> list[tuple[int, int]]:
        """(m, h) of every row of the thread."""
        return [(m, h) for m in range(self.config.row_tiles) for h in range(2)]

    def _scalars(self) -> dict[str, Expr]:
        """seed, offset and the start indices as int64: attribute, or tensor of one element."""
        values = {n: tir.const(v, "int64") for n, v in self.problem.constants.items()}
        for name in ("seed", "offset", "q_start_idx", "kv_start_idx"):
            if name in self.buffers:
                index = (0,) * len(self.buffers[name].shape)
                values[name] = named(self.buffers[name][index].astype("int64"))
        return values

    # -- rows and keys ------------------------------------------------------------------------

    def row(self, m: int, h: int) -> Expr:
        """Row of the tile."""
        return self.first_row + (16 * m + 8 * h)

    def head_and_row(self, r: Expr) -> tuple[Expr, Expr]:
        """Query head and row i of row r of the tile; beyond the last row, that one."""
        r = tir.min(r, self.rows - 1)
        if self.config.heads == 1:
            return self.n, self.i0 + r
        return self.n + r // self.at.S1, r % self.at.S1

    def tile_rows(self) -> tuple[Expr, Expr]:
        """Least and greatest i of the tile."""
        if self.config.heads > 1:
            return tir.const(0, "int32"), self.at.S1 - 1
        return self.i0, tir.min(self.i0 + self.config.rows, self.at.S1) - 1

    def keys_of(self, i: Expr) -> attention.Interval:
        prefixes = self.buffers.get("prefix")
        return attention.visible_keys(self.problem.band, self.at, i, prefixes)

    # -- bias and mask ------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """What is left to multiply scores with when the weights 2**x are computed."""
        return self.problem.scale * LOG2E if self.folds_scale else 1.0

    @property
    def folds_scale(self) -> bool:
        """Without bias the order of the products is that of the scores."""
        p = self.problem
        return p.pse is None and p.scale > 0 and attention.fits_float32(p.scale * LOG2E)

    def score(self, qk: Expr, bias: Expr | None) -> Expr:
        """x of the softmax in ``unit_of_scores``."""
        p = self.problem
        factor = LOG2E / attention.unit_of_scores(p.pse)
        return attention.score(p.pse_type, qk, bias, p.scale * factor)

    def bias_pair(self, m: int, h: int, j: Expr) -> list[Expr | None]:
        """Bias of key j, which is even, and of the next."""
        p, at = self.problem, self.at
        if p.pse is None:
            return [None, None]
        n, i = self.head_and_row(self.row(m, h))
        if p.pse == "slopes":
            start = self.scalars["kv_start_idx"] - self.scalars["q_start_idx"]
            start = start.astype("int32") if p.starts_fit_int32 else start
            slope = self.slope_of[m, h]
            return [attention.generated_bias(p.pse_type, slope, i, j + e, start) for e in range(2)]
        lead = attention.broadcast_index(4, p.one_batch("pse"), False, at.b, n)
        if p.pse == "packed":
            return [self._packed_bias(lead, i, tir.min(j + e, at.S2 - 1)) for e in range(2)]
        row = i if p.pse == "rows" else 0
        pair = self._pair(self.buffers["pse"], [*lead, row], j)
        return [value.astype("float32") for value in pair]

    def _packed_bias(self, lead: list, i: Expr, j: Expr) -> Expr:
        p, pse = self.problem, self.buffers["pse"]
        where = attention.packed_bias(p.layout == "TND", self.at, i, j, int32(pse.shape[3]))
        value = pse[(*lead, where.row, where.column)].astype("float32")
        return tir.Select(where.inside, value, float32(0))

    def _pair(self, buffer: tir.Buffer, lead: list, j: Expr) -> list[Expr]:
        """Elements j, which is even, and j + 1 of a row of S2; beyond the last, others of it. One
        access where rows begin at even elements.
        """
        S2 = self.problem.S2
        if not isinstance(S2, int) or S2 % 2:
            return [buffer[(*lead, tir.min(j + e, self.at.S2 - 1))] for e in range(2)]
        found = T.alloc_buffer((2,), buffer.dtype, scope="local")
        even = tir.min(j >> 1, S2 // 2 - 1) * 2  # TVM sees that it is even
        both = tir.Ramp(even, 1, 2)
        T.buffer_store(found, tir.BufferLoad(buffer, [*lead, both]), [tir.Ramp(0, 1, 2)])
        return [found[0], found[1]]

    def _slope(self, m: int, h: int) -> Expr:
        pse = self.buffers["pse"]
        n, _ = self.head_and_row(self.row(m, h))
        return pse[(n,) if len(pse.shape) == 1 else (self.at.b, n)]

    def dropped_pair(self, m: int, h: int, j: Expr) -> list[Expr]:
        """Whether atten_mask drops key j, which is even, and the next."""
        p, mask = self.problem, self.buffers["atten_mask"]
        n, i = self.head_and_row(self.row(m, h))
        lead = attention.broadcast_index(
            len(mask.shape), p.one_batch("atten_mask"), p.one_head("atten_mask"), self.at.b, n
        )
        return [x.astype("int32") != 0 for x in self._pair(mask, [*lead, i], j)]

    # -- dropout ------------------------------------------------------------------------------

    @property
    def drops(self) -> bool:
        """Dropout matters."""
        return self.problem.keep_prob < 1 and self.wants_output

    def kept_pair(self, m: int, h: int, j: Expr, draws: tir.Buffer) -> tuple[Expr, Expr]:
        """Dropout decisions of an even key j and the next."""
        p, at = self.problem, self.at
        n, i = self.head_and_row(self.row(m, h))
        e = attention.pair_number(p.layout == "TND", p.N1, at, n, i) + j.astype("int64")
        threshold = attention.keep_threshold(p.keep_prob)
        seed, offset = self.scalars["seed"], self.scalars["offset"]
        if draws_alone(p):
            one = tir.const(1, "int64")
            first = named(attention.keep(e, seed, offset, threshold, _slots(draws)))
            return first, attention.keep(e + one, seed, offset, threshold, _slots(draws))
        block = (e >> tir.const(2, "int64")).astype("uint64")
        words = attention.draw(block, seed, offset, _slots(draws))
        late = (e & tir.const(2, "int64")) != 0
        pair = [tir.Select(late, words[2 + k], words[k]).astype("uint64") for k in range(2)]
        return tuple(word < tir.const(threshold, "uint64") for word in pair)

    def inverse(self, total: Expr) -> Expr:
        """1 / (sum * keep_prob); 0 for a row without keys."""
        return inverse_sum(self.problem, total)


def inverse_sum(problem: AttentionProblem, total: Expr) -> Expr:
    """1 / (sum * keep_prob); 0 for a row without keys.

    A keep_prob that keeps nothing stays out: it may be denormal, and 0 / 0 is no answer.
    """
    keep_prob = problem.keep_prob if attention.keep_threshold(problem.keep_prob) else 1
    inverse = float32(1) / (total * float32(keep_prob))
    return tir.Select(total > float32(0), inverse, float32(0))


def store_records(
    problem: AttentionProblem,
    buffers: dict[str, tir.Buffer],
    index: list[Expr],
    top: Expr,
    total: Expr,
    first: Expr,
    count: int,
) -> None:
    """``count`` of the repeats of softmax_max and softmax_sum from repeat ``first`` on, from a
    row's maximum in ``unit_of_scores`` and its sum, 0 for a row without keys.
    """
    top = attention.in_nats(top, attention.unit_of_scores(problem.pse))
    values = {
        "softmax_max": (top, attention.EMPTY_ROW_MAX),
        "softmax_sum": (total, attention.EMPTY_ROW_SUM),
    }
    for name, (value, empty) in values.items():
        if name in problem.outputs:
            record = named(tir.Select(total > float32(0), value, float32(empty)))
            with T.vectorized(count) as v:
                T.buffer_store(buffers[name], record, [*index, first + v])


def _slots(draws: tir.Buffer) -> attention.Bind:
    """Names the generator's products by the elements of ``draws``, one after the other."""
    slots = iter(range(2 * attention.PHILOX_ROUNDS))

    def bind(product: Expr) -> Expr:
        slot = next(slots)
        T.buffer_store(draws, product, [slot])
        return draws[slot]

    return bind
