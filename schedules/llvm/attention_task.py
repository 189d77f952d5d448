"""What every task of the fused attention kernel needs: its place, the elements of its inputs, the
interval of keys, bias, dropout, and where its results go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm import DataType
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ...relay_ops import attention
from ...relay_ops.attention import LOG2E, Sequence
from .vector import VectorUnit, float32, from_float32, load_lanes, to_float32

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem
    from .attention_config import AttentionConfig


def opaque(dtype: str, values: list[int | Expr]) -> list[Expr]:
    """The values by way of a local buffer, constants as they are.

    TVM's simplifier and its region analysis would substitute named values into every index and
    guard, and reason about them there: that multiplies the compile time.
    """
    slots = T.alloc_buffer((len(values),), dtype, scope="local")
    settled = []
    for k, value in enumerate(values):
        if isinstance(value, int | tir.IntImm):
            settled.append(tir.const(int(value), dtype))
        else:
            T.buffer_store(slots, value.astype(dtype), [k])
            settled.append(slots[k])
    return settled


@dataclass
class Task:
    """Emits statements and expressions inside the parallel loop."""

    problem: AttentionProblem
    config: AttentionConfig
    unit: VectorUnit
    buffers: dict[str, tir.Buffer]
    scalars: dict[str, Expr]
    """seed, offset, q_start_idx, kv_start_idx as int64."""

    def place(self, at: Sequence, n: Expr, i0: Expr) -> None:
        """Take query rows i0, i0 + 1, ... of head n."""
        self.at = at
        self.n, self.i0, self.rows = opaque("int32", [n, i0, tir.min(at.S1 - i0, self.config.rows)])
        self.g = attention.head_group(self.n, self.problem.N1, self.problem.N2)
        self.wants_output = "attention_out" in self.problem.outputs

    def stand_at(self, other: Task) -> None:
        """Take the rows of another task, as an alternative to it."""
        for name in ("at", "n", "i0", "rows", "g", "wants_output"):
            setattr(self, name, getattr(other, name))

    def interval(self, first_row: Expr, last_row: Expr) -> attention.Interval:
        """Keys that any of the rows may see: both ends of the band grow with the row."""
        ends = self.keys_of(first_row).first, self.keys_of(last_row).last
        return attention.Interval(*opaque("int32", [*ends]))

    @property
    def staged_keys(self) -> int:
        """Keys of a tile."""
        return self.config.keys

    def tile_of_keys(self, seen: attention.Interval, tile: Expr) -> tuple[Expr, Expr]:
        """First key and number of keys of a tile."""
        keys = self.staged_keys
        j0 = seen.first + tile * keys
        j0, count = opaque("int32", [j0, tir.min(keys, seen.last + 1 - j0)])
        return j0, count

    def keys_of(self, i: Expr) -> attention.Interval:
        prefixes = self.buffers.get("prefix")
        return attention.visible_keys(self.problem.band, self.at, i, prefixes)

    def kv(self, name: str, j: Expr, d: Expr) -> Expr:
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, self.g, at.key_start + j, d)
        return to_float32(self.buffers[name][tuple(index)], self.unit)

    def key_pitch(self) -> Expr:
        """Bytes from one key to the next."""
        p, key = self.problem, self.buffers["key"]
        heads = 1 if p.layout == "BNSD" else p.N2
        batch = key.shape[1] if p.layout == "SBH" else tir.const(1, "int64")
        row = heads * p.D * DataType(p.dtype).bits // 8
        return batch.astype("int64") * tir.const(row, "int64")

    def mask_bit(self, i: Expr, j: Expr) -> Expr:
        """int32, not 0 where atten_mask drops the pair."""
        return self.buffers["atten_mask"][(*self._mask_plane(), i, j)].astype("int32")

    def _mask_plane(self) -> list[attention.Index]:
        p, rank = self.problem, len(self.buffers["atten_mask"].shape)
        one_batch, one_head = p.one_batch("atten_mask"), p.one_head("atten_mask")
        return attention.broadcast_index(rank, one_batch, one_head, self.at.b, self.n)

    def mask_bytes(self, i: Expr, j: Expr, count: int) -> Expr:
        """atten_mask of row i and the keys j, j + 1, ... as a vector of uint8."""
        mask = self.buffers["atten_mask"]
        return load_lanes(mask, [*self._mask_plane(), i, j], count).astype(f"uint8x{count}")

    def bias_element(self, i: Expr, j: Expr) -> Expr:
        p, at, pse = self.problem, self.at, self.buffers["pse"]
        lead = self._bias_plane()
        if p.pse != "packed":
            return to_float32(pse[(*lead, i, j)], self.unit)
        where = attention.packed_bias(p.layout == "TND", at, i, j, _int32(pse.shape[3]))
        value = to_float32(pse[(*lead, where.row, where.column)], self.unit)
        return tir.Select(where.inside, value, float32(0))

    def _bias_plane(self) -> list[attention.Index]:
        return attention.broadcast_index(4, self.problem.one_batch("pse"), False, self.at.b, self.n)

    def slope(self) -> Expr | None:
        if self.problem.pse != "slopes":
            return None
        pse = self.buffers["pse"]
        return T.Bind(pse[(self.n,) if len(pse.shape) == 1 else (self.at.b, self.n)])

    def generated_bias(self, slope: Expr, i: Expr, j: Expr) -> Expr:
        start = self.scalars["kv_start_idx"] - self.scalars["q_start_idx"]
        if self.problem.starts_fit_int32:
            start = start.astype("int32")
        return attention.generated_bias(self.problem.pse_type, slope, i, j, start)

    @property
    def drops(self) -> bool:
        """Dropout matters."""
        return self.problem.keep_prob < 1 and self.wants_output

    @property
    def degree(self) -> int:
        """Of the polynomial behind corrections: four is enough for results of half width."""
        return 5 if self.problem.dtype == "float32" else 4

    @property
    def weight_degree(self) -> int:
        """Of the polynomial behind the weights: bfloat16 is a hundred times coarser than what three
        leave, but the sum of the weights, a result in float32, is not.
        """
        coarse = self.problem.dtype == "bfloat16" and "softmax_sum" not in self.buffers
        return 3 if coarse else self.degree

    @property
    def score_unit(self) -> float:
        """The 1 of the kernel's scores, in units of ln 2."""
        return attention.unit_of_scores(self.problem.pse)

    def score(self, qk: Expr, bias: Expr | None) -> Expr:
        p = self.problem
        return attention.score(p.pse_type, qk, bias, p.scale * (LOG2E / self.score_unit))

    def in_ln2(self, difference: Expr) -> Expr:
        """The difference of two scores in units of ln 2."""
        return attention.difference_in_ln2(difference, self.score_unit)

    def draws(self) -> tir.Buffer | None:
        """Room for the products of the generator's rounds, where dropout matters."""
        if not self.drops:
            return None
        shape = (2 * attention.PHILOX_ROUNDS, self.config.lanes)
        return T.alloc_buffer(shape, "uint64", scope="local")

    def keep(self, draws: tir.Buffer, v: Expr, r: Expr, j: Expr) -> Expr:
        """Dropout decision of lane v: row i0 + r, key j."""
        threshold = attention.keep_threshold(self.problem.keep_prob)
        seed, offset = self.scalars["seed"], self.scalars["offset"]
        return attention.keep(self.pair(r, j), seed, offset, threshold, _bound(draws, v))

    def keep_four(self, draws: tir.Buffer, v: Expr, block: Expr) -> list[Expr]:
        """Dropout decisions of lane v: pairs 4 * block .. 4 * block + 3."""
        threshold = tir.const(attention.keep_threshold(self.problem.keep_prob), "uint64")
        seed, offset = self.scalars["seed"], self.scalars["offset"]
        words = attention.draw(block.astype("uint64"), seed, offset, _bound(draws, v))
        return [T.Bind(word).astype("uint64") < threshold for word in words]

    def pair(self, r: Expr, j: Expr) -> Expr:
        """Number of the pair of row i0 + r and key j in the order of dropout; int64."""
        p = self.problem
        first = attention.pair_number(p.layout == "TND", p.N1, self.at, self.n, self.i0 + r)
        return first + j.astype("int64")

    def put(self, r: Expr, d: Expr, value: Expr) -> None:
        p, at = self.problem, self.at
        index = attention.element(p.layout, p.D, at.b, self.n, at.query_start + self.i0 + r, d)
        out = self.buffers["attention_out"]
        T.buffer_store(out, from_float32(value, p.dtype, self.unit), index)

    def inverse(self, total: Expr) -> Expr:
        """1 / (sum * keep_prob); 0 for a row without keys.

        A keep_prob that keeps nothing stays out: it may be denormal, and 0 / 0 is no answer.
        """
        keep_prob = self.problem.keep_prob
        scale = keep_prob if attention.keep_threshold(keep_prob) else 1
        inverse = float32(1) / (total * float32(scale))
        return tir.Select(total > float32(0), inverse, float32(0))

    def store_records(self, r: Expr, top: Expr, total: Expr) -> None:
        """softmax_max and softmax_sum of row i0 + r from the maximum of its scores and its sum; a
        row without keys has a sum of 0 so far.
        """
        top = attention.in_nats(top, self.score_unit)
        values = {
            "softmax_max": (top, attention.EMPTY_ROW_MAX),
            "softmax_sum": (total, attention.EMPTY_ROW_SUM),
        }
        for name, (value, empty) in values.items():
            if name in self.buffers:
                record = tir.Select(total > float32(0), value, float32(empty))
                self._store_record(self.buffers[name], r, T.Bind(record))

    def _store_record(self, buffer: tir.Buffer, r: Expr, value: Expr) -> None:
        p, at, i = self.problem, self.at, self.i0 + r
        index = [at.b, self.n, i]
        if p.layout == "TND":
            number = T.Bind(attention.record(p.head_major, p.N1, at, self.n, i))
            index = [number // p.N1, number % p.N1]
        with T.vectorized(attention.SOFTMAX_REPEATS) as v:
            T.buffer_store(buffer, value, [*index, v])


def _bound(draws: tir.Buffer, v: Expr) -> attention.Bind:
    """Names the generator's products by the slots of ``draws``, lane v, one after the other."""
    slots = iter(range(2 * attention.PHILOX_ROUNDS))

    def bind(product: Expr) -> Expr:
        slot = next(slots)
        T.buffer_store(draws, product, [slot, v])
        return draws[slot, v]

    return bind


def _int32(x: Expr) -> Expr:
    return x.astype("int32")
