"""What scaled dot product attention computes, as expressions over TIR integers and floats.

Nothing here knows a target: the kernels of every target take index views, masks, biases, dropout
and the rule of empty rows from this file. Letters: B batch, or sequences of TND; S1 S2 query and
key length of one sequence; N1 N2 query and key/value heads, G = N1 / N2; D head size; b n g i j d
their indices, i and j counted inside their own sequence.

Source: the specification of SpeedFusionAttention, after the Ascend kernels that it cites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tvm.tirx as tir
from tvm.ir import Expr

Index = int | Expr
Words = tuple[Expr, ...]
Bind = Callable[[Expr], Expr]
"""Names a value that is used more than once, so that the expression stays a tree of small size."""

LAYOUTS = {"BSH": 3, "SBH": 3, "BNSD": 4, "BSND": 4, "TND": 3}
"""Layout -> rank of query, key, value."""

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
FLT_MAX = 3.4028234663852886e38
EMPTY_ROW_MAX, EMPTY_ROW_SUM = -FLT_MAX, FLT_MAX
"""softmax_max and softmax_sum of a row without any allowed key; its attention_out is 0."""

SOFTMAX_REPEATS = 8
"""Each softmax_max and softmax_sum is stored this often along the last axis."""

PHILOX_ROUNDS = 10

PACKED_ROWS = 1024
"""Rows of the packed bias: the last ones of a bias that depends on i - j only."""

# Lengths end at 2**19: tokens beyond this act alike, and i + s + tokens stays in int32.
_FAR = 1 << 28


class Sequence(NamedTuple):
    """One (batch entry or packed sequence)'s place: int32 lengths, int64 starts."""

    b: Index
    S1: Index
    S2: Index
    query_start: Index
    """Row of the packed query where it starts; 0 unless TND."""
    key_start: Index
    pairs_before: Index
    """sum over earlier sequences of S1 * S2; int64, TND only (the others count from b)."""


class Interval(NamedTuple):
    """Keys first..last, both included; empty when last < first."""

    first: Index
    last: Index


def head_group(n: Index, N1: int, N2: int) -> Index:
    """Key/value head of query head n."""
    return n // (N1 // N2) if N1 != N2 else n


def element(layout: str, D: int, b: Index, n: Index, row: Index, d: Index) -> list[Index]:
    """Indices of (b, n, row, d) in a query, key, value or output tensor of ``layout``.

    ``row`` counts inside the sequence, in TND from the start of the packed tensor. Along d the
    elements are neighbours in every layout.
    """
    return {
        "BSH": [b, row, n * D + d],
        "SBH": [row, b, n * D + d],
        "BNSD": [b, n, row, d],
        "BSND": [b, row, n, d],
        "TND": [row, n, d],
    }[layout]


def record(head_major: bool, N1: int, at: Sequence, n: Index, i: Index) -> Index:
    """TND: number of the record (b, n, i) among the T1 * N1 records of the softmax outputs.

    ``head_major`` is softmax_layout "": per sequence, heads outside of rows; otherwise "TND".
    """
    if head_major:
        return at.query_start * N1 + n * at.S1 + i
    return (at.query_start + i) * N1 + n


@dataclass(frozen=True)
class Band:
    """The part of a mask that is computed from i and j: an interval of keys for every row."""

    sparse_mode: int
    pre_tokens: int = _FAR
    next_tokens: int = _FAR

    @property
    def causal(self) -> bool:
        """Later rows may see more keys: work grows with i."""
        return self.sparse_mode in (2, 3, 5) or self.next_tokens < _FAR

    def keys(self, at: Sequence, i: Index, prefix: Index | None) -> Interval:
        """Keys that row i may see before any mask tensor is read, within 0..S2-1. Both ends grow
        with i.

        Mode 0 counts tokens from the upper left corner, 4 from the lower right one. In mode 5
        the first ``prefix`` keys are seen by every row.
        """
        last_key = at.S2 - 1
        shift = at.S2 - at.S1
        pre, next_ = (min(max(t, -_FAR), _FAR) for t in (self.pre_tokens, self.next_tokens))
        first, last = 0, last_key
        if self.sparse_mode == 0:
            first, last = i - pre if pre < _FAR else 0, i + next_ if next_ < _FAR else last_key
        elif self.sparse_mode == 2:
            last = i
        elif self.sparse_mode == 3:
            last = i + shift
        elif self.sparse_mode == 4:
            first, last = i + shift - pre, i + shift + next_
        elif self.sparse_mode == 5:
            last = tir.max(i + shift, prefix - 1)
        first = 0 if isinstance(first, int) else tir.max(first, 0)
        return Interval(first, last_key if last is last_key else tir.min(last, last_key))


def visible_keys(
    band: Band | None, at: Sequence, i: Index, prefixes: tir.Buffer | None
) -> Interval:
    """Keys that row i may see before any mask tensor is read; ``prefixes`` holds one a sequence."""
    if band is None:
        return Interval(0, at.S2 - 1)
    return band.keys(at, i, None if prefixes is None else prefixes[at.b].astype("int32"))


def broadcast_index(rank: int, one_batch: bool, one_head: bool, b: Index, n: Index) -> list[Index]:
    """Leading indices of a mask or bias plane: [] for (S1, S2), else [b or 0, n or 0]."""
    return [] if rank == 2 else [0 if one_batch else b, 0 if one_head else n]


class PackedElement(NamedTuple):
    """Where a packed bias holds the pair (i, j); its value is 0 when ``inside`` is false."""

    row: Expr
    column: Expr
    inside: Expr


def packed_bias(tnd: bool, at: Sequence, i: Expr, j: Expr, width: Index) -> PackedElement:
    """Element of a [1024, width] plane that stands for the pair (i, j); always a valid index."""
    if tnd:
        t = i - j - (width - PACKED_ROWS)
        row, column = tir.max(t, 0), tir.max(-t, 0)
    else:
        tail = at.S1 - PACKED_ROWS
        wrapped = i % PACKED_ROWS
        row = tir.Select(i >= tail, i - tail, wrapped)
        column = tir.Select(i >= tail, j, at.S2 - (i - j) - (PACKED_ROWS - wrapped))
    inside = tir.all(row >= 0, row < PACKED_ROWS, column >= 0, column < width)
    row = tir.min(tir.max(row, 0), PACKED_ROWS - 1)
    return PackedElement(row, tir.min(tir.max(column, 0), width - 1), inside)


def generated_bias(pse_type: int, slope: Expr, i: Expr, j: Expr, start: Index) -> Expr:
    """Bias of pse_type 2 (linear) and 3 (square root): minus slope times the distance from the
    diagonal.

    ``start`` is kv_start - q_start. The integer distance becomes float32 before its root.
    """
    distance = tir.abs(j - i + start).astype("float32")
    return -slope * (tir.sqrt(distance) if pse_type == 3 else distance)


def score(pse_type: int, qk: Expr, bias: Expr | None, scale: float) -> Expr:
    """x of the softmax, float32: only pse_type 1 scales the bias too."""
    if bias is None:
        return times(qk, scale)
    return times(qk + bias, scale) if pse_type == 1 else times(qk, scale) + bias


def unit_of_scores(pse: str | None) -> float:
    """The 1 of the scores that a kernel keeps, in units of ln 2: that is 1, so that a weight is a
    power of two, but with a bias they are x of the softmax, which the largest float32 may be.
    """
    return 1.0 if pse is None else LOG2E


def difference_in_ln2(difference: Expr, unit: float) -> Expr:
    """The difference of two scores of ``unit`` in units of ln 2. It is taken first: a product that
    both round each for itself, or not at all in a multiply-add, would be hundreds off where scores
    are large.
    """
    return difference if unit == 1 else times(difference, unit)


def in_nats(score: Expr, unit: float) -> Expr:
    """x of the softmax, as softmax_max records it, for a score of ``unit``."""
    return score if unit == LOG2E else times(score, unit * LN2)


def times(x: Expr, factor: float) -> Expr:
    """float32 x * factor, also where a factor in units of ln 2 is beyond float32."""
    if fits_float32(factor):
        return x * tir.const(factor, "float32")
    return x * tir.const(factor / 4, "float32") * tir.const(4.0, "float32")


def fits_float32(factor: float) -> bool:
    return abs(factor) <= FLT_MAX


def pair_number(tnd: bool, N1: int, at: Sequence, n: Index, i: Index) -> Expr:
    """Number of the pair (b, n, i, 0) in the linear order that dropout counts in; int64."""
    n, i, S1, S2 = (_int64(x) for x in (n, i, at.S1, at.S2))
    if tnd:
        return at.pairs_before * N1 + (n * S1 + i) * S2
    return ((_int64(at.b) * N1 + n) * S1 + i) * S2


def keep(e: Expr, seed: Expr, offset: Expr, threshold: int, bind: Bind) -> Expr:
    """Dropout decision of pair ``e``: a Philox4x32-10 word below ``threshold`` keeps it.

    e, seed, offset: int64. The key is the seed, the counter (e // 4, offset), the word e % 4.
    """
    e = _uint64(e)
    words = draw(e >> _uint(2, "uint64"), seed, offset, bind)
    which = _low(e) & _uint(3)
    even = tir.Select(which == _uint(0), words[0], words[2])
    odd = tir.Select(which == _uint(1), words[1], words[3])
    word = tir.Select((which & _uint(1)) == _uint(0), even, odd)
    return word.astype("uint64") < _uint(threshold, "uint64")


def draw(block: Expr, seed: Expr, offset: Expr, bind: Bind) -> Words:
    """The words of pairs 4 * block .. 4 * block + 3 (block: uint64)."""
    counter = (*_halves(block), *_halves(_uint64(offset)))
    return philox4x32(counter, _halves(_uint64(seed)), bind)


def philox4x32(counter: Words, key: Words, bind: Bind) -> Words:
    """Philox4x32-10 (Random123): four uint32 words from a counter of four and a key of two.

    ``bind`` names each round's products, which the next round uses twice.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0 = bind(c0.astype("uint64") * _uint(0xD2511F53, "uint64"))
        p1 = bind(c2.astype("uint64") * _uint(0xCD9E8D57, "uint64"))
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = k0 + _uint(0x9E3779B9), k1 + _uint(0xBB67AE85)
    return c0, c1, c2, c3


def keep_threshold(keep_prob: float) -> int:
    """floor(keep_prob * 2**32) of the float32 keep_prob."""
    return int(keep_prob * 2.0**32)


def _halves(x: Expr) -> tuple[Expr, Expr]:
    return _low(x), _high(x)


def _low(x: Expr) -> Expr:
    return x.astype("uint32")


def _high(x: Expr) -> Expr:
    return (x >> _uint(32, "uint64")).astype("uint32")


def _uint(value: int, dtype: str = "uint32") -> Expr:
    return tir.const(value, dtype)


def _uint64(x: Index) -> Expr:
    """Two's complement. A cast of a negative constant would be refused."""
    if isinstance(x, tir.IntImm):
        x = int(x.value)
    if not isinstance(x, int):
        return _int64(x).astype("uint64")
    high, low = (_uint(half, "uint64") for half in divmod(x % 2**64, 2**32))
    return high << _uint(32, "uint64") | low


def _int64(x: Index) -> Expr:
    return tir.const(x, "int64") if isinstance(x, int) else x.astype("int64")
