"""Tasks of the NSA kernel on matrix tiles of bfloat16 (AMX).

Both products have query rows as rows and take them as they lie: scores are queries times keys,
the output is weights times values. Keys lie across the lanes, so the G heads of a query row share
its mask, their probabilities are added lane by lane, and the windows of selection go over one row
instead of G. Keys and values are packed once per call, 32 keys at a time.

        mask of the query rows copied       which groups of 32 keys does a row see?
        Q copied, if not taken in place     [term][M][E], E = D rounded up to 32
        for 32 rows:
            for key group that a row sees:  S = Q . K, minus infinity where masked
            for row:                        M
            for row, key group:             S = exp(S - M), weights as terms of bfloat16; L
        for 32 rows, 32 channels:           O = S . V over all groups, / L, stored
        for query row:                      sum over heads, windows, the k best

Products of tiles leave the vector units idle, so Q of the next rows is copied, weights of the rows
before are computed and outputs of the step before are stored between the products of a group.

Buffers: K uint32 [h2][slot][term][half][E / 2][16], pairs of channels of 16 keys; V uint32
[h2][slot][term][Dv / 16][16][16], key i and key i + 16 as a pair; so a register of weights of 16
keys and one of the next 16 give a row of pairs without a permutation. bfloat16 is one term; for
other types see ``nsa_split``.

Products are of AMX: subnormal factors and results count as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script import tirx as TS
from tvm.target import Target, codegen
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import LOG2E
from ..intrin import x86_amx, x86_bf16
from . import matrix_tiles
from .attention_amx import (
    LEFT,
    OUTPUT_PRODUCTS,
    RIGHT,
    SCORE_PRODUCTS,
    load_tile,
    multiply_terms,
    round_pairs_up,
    store_tile,
)
from .attention_operands import BLOCK, SIDE
from .attention_task import opaque
from .nsa_amx_mask import find_blind, find_live, hide, stage_mask, uncover
from .nsa_amx_output import store_rows
from .nsa_amx_pack import copy_strip, pack_keys, pack_values
from .nsa_amx_weights import (
    add_weights,
    ask_ahead,
    find_tops,
    score_blocks,
    weigh_block,
    weigh_rows,
)
from .nsa_lengths import slots
from .nsa_records import record_writing
from .nsa_select import WIDTH, selection
from .nsa_stream import OutputStream
from .nsa_tile import FLT_MAX
from .vector import reinterpret, vector_unit

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_WORD, _HALF = 4, 2
"""Bytes."""
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes."""

    height: int = 64
    """M, rows of the products per task, unless G is larger."""
    heads: int = 16
    """Heads whose probabilities are added in registers."""

    def __post_init__(self) -> None:
        if self.height % BLOCK:
            raise ValueError(
                f"TileConfig: height: found {self.height}, allowed multiples of {BLOCK}"
            )
        if self.heads.bit_count() != 1:
            raise ValueError(f"TileConfig: heads: found {self.heads}, allowed powers of two")


def available(problem: Problem, target: Target) -> bool:
    """bfloat16 where `has_tiles`."""
    return problem.dtype == "bfloat16" and has_tiles(problem, target)


def has_tiles(problem: Problem, target: Target) -> bool:
    """Matrix tiles beside vectors as wide as their rows. Scores stay the bare products: their order
    must be that of the scaled ones, so a scale of 0 is left out.
    """
    factor = abs(problem.scale) * LOG2E
    return matrix_tiles.available(target) and _SMALLEST <= factor <= FLT_MAX


class TileTask:
    """What ``nsa`` asks of a kind of task."""

    def __init__(self, problem: Problem, target: Target):
        self.problem, self.target, self.config = problem, target, TileConfig()
        p = problem
        self.unit = vector_unit(target)
        self.height = max(self.config.height, p.group)
        self.query_rows = self.height // p.group
        self.depth = -(-p.head_size // BLOCK) * BLOCK
        self.key_slot = BLOCK
        self.factor = abs(p.scale) * LOG2E
        self.wants_out = "attention_out" in p.outputs
        self.wants_weights = bool(p.outputs - {"softmax_max"})
        self.strips = -(-p.value_size // BLOCK) if self.wants_out else 0
        self.front = max(0, p.taps - 1 - p.newest_key(0))
        """Zeros before the first key in a row's sums over heads."""
        self.rounds = p.dtype == "bfloat16" and codegen.target_has_features("avx512bf16", target)
        self.stream = OutputStream(p, target)

    @property
    def sources(self) -> list[str]:
        return [x86_amx.SOURCE] + [x86_bf16.SOURCE] * self.rounds + self.stream.sources

    def begin(self) -> None:
        T.evaluate(x86_amx.configure(tir.const(x86_amx.ROWS, "int64")))

    def end(self) -> None:
        T.evaluate(x86_amx.release())
        self.stream.end()

    def attend(self):
        return _attending(self)

    # -- terms --------------------------------------------------------------------------------

    @property
    def terms(self) -> int:
        """Numbers of bfloat16 that an element of queries and keys is the sum of."""
        return 1

    @property
    def value_terms(self) -> int:
        """The same of values and weights."""
        return 1

    @property
    def degree(self) -> int:
        """Of the polynomial behind the weights: enough for results of half width."""
        return 4

    def element_words(self, x: Expr) -> list[Expr]:
        """Terms of 32 elements of a query or a key, as uint16 lanes, or of one."""
        return [reinterpret("uint16", x)]

    def value_words(self, x: Expr) -> list[Expr]:
        """Terms of a value, as uint32."""
        return [tir.reinterpret("uint16", x).astype("uint32")]

    def weight_pairs(self, low: Expr, high: Expr) -> list[Expr]:
        """Terms of two registers of weights, as pairs."""
        return [round_pairs_up(low, high)]

    def output_factor(self, inverse: Expr) -> Expr:
        """What sums of weighted values are multiplied by."""
        return inverse

    # -- keys and values ----------------------------------------------------------------------

    def allocate_packed(self, Keys: Buffer, Values: Buffer, sequences: Expr) -> SimpleNamespace:
        N2, count = self.problem.key_heads, slots(Keys.shape[0], sequences, BLOCK)
        pairs, panels = self.depth // 2, 2 * self.strips
        return SimpleNamespace(
            K=T.alloc_buffer((N2, count, self.terms, 2, pairs, SIDE), "uint32"),
            V=T.alloc_buffer((N2, count, self.value_terms, panels, SIDE, SIDE), "uint32"),
        )

    def pack(self):
        """``pack(packed, Keys, Values, h2, slot, row, count)``: ``count`` packed rows at ``row``;
        keys beyond them repeat the last one, values are 0.
        """

        def pack(packed, Keys, Values, h2, slot, row, count) -> None:
            h2, slot, row, count = opaque("int64", [h2, slot, row, count])
            self.pack_keys(packed, Keys, h2, slot, row, count)
            if self.wants_out:
                self.pack_values(packed, Values, h2, slot, row, count)

        return pack

    def pack_keys(self, packed, Keys, h2, slot, row, count) -> None:
        pack_keys(self, packed, Keys, h2, slot, row, count)

    def pack_values(self, packed, Values, h2, slot, row, count) -> None:
        pack_values(self, packed, Values, h2, slot, row, count)

    # -- buffers of a thread ------------------------------------------------------------------

    def allocate(self, key_tokens: Expr) -> SimpleNamespace:
        p, M = self.problem, self.height
        groups = T.Bind(TS.ceildiv(TS.min(key_tokens, p.cmp_skv_limit), BLOCK))
        keys = groups * BLOCK
        # Rows of S one cache line more than a power of two apart do not compete for its sets.
        return SimpleNamespace(
            Q=T.alloc_buffer((self.terms, M, self.depth), "uint16"),
            S=T.alloc_buffer((M, keys + SIDE), "float32"),
            P=T.alloc_buffer((self.value_terms, M, groups * SIDE + SIDE), "uint32"),
            hidden=T.alloc_buffer((self.query_rows, keys + BLOCK), "uint8"),
            live=T.alloc_buffer((groups,), "int32"),
            partial=T.alloc_buffer((groups,), "int32"),
            sums=T.alloc_buffer((self.front + keys + p.taps + 2 * SIDE,), "float32"),
            windows=T.alloc_buffer((keys + p.blocks_stride + SIDE,), "float32"),
            score=T.alloc_buffer((1, keys + WIDTH), "float32"),
            O=T.alloc_buffer((2, BLOCK, BLOCK), "float32", scope="local"),
            top=T.alloc_buffer((M,), "float32", scope="local"),
            base=T.alloc_buffer((M,), "float32", scope="local"),
            lanes=T.alloc_buffer((M, SIDE), "float32", scope="local"),
            total=T.alloc_buffer((M,), "float32", scope="local"),
            inverse=T.alloc_buffer((M,), "float32", scope="local"),
            count=T.alloc_buffer((2,), "int32", scope="local"),
            blind=T.alloc_buffer((1,), "int32", scope="local"),
        )

    @property
    def queries_in_place(self) -> bool:
        """Tiles of queries are heads of a token, loaded where they lie."""
        p = self.problem
        return p.dtype == "bfloat16" and p.group % SIDE == 0 and p.head_size % BLOCK == 0

    # -- statements of a task -----------------------------------------------------------------

    def place(self, h2, slot, k0, token, rows, keys, ahead) -> SimpleNamespace:
        """Where a task is: key head, first slot and first packed row of its keys, first packed row
        of its queries, how many of either, blocks of 32 rows of the products, and how many query
        rows further on the thread's next task is.
        """
        blocks = -(-(rows * self.problem.group) // BLOCK)
        names = ("h2", "slot", "k0", "token", "rows", "keys", "blocks", "ahead")
        values = opaque("int64", [h2, slot, k0, token, rows, keys, blocks, ahead])
        return SimpleNamespace(**dict(zip(names, values)))

    def _query(self, at, m: Expr) -> tuple[Expr, Expr]:
        """Token and head of row m of the products."""
        G = self.problem.group
        return at.token + tir.min((m // G).astype("int64"), at.rows - 1), at.h2 * G + m % G

    def _load_query_tile(self, tile, w, X, at, term, m, strip) -> None:
        """16 rows of the products from m on, 32 channels."""
        if self.queries_in_place:
            first = X[(*self._query(at, m), strip * BLOCK)]
            load_tile(tile, first, self.problem.head_size * _HALF)
        else:
            load_tile(tile, w.Q[term, m, strip * BLOCK], self.depth * _HALF)

    def score_groups(self, w, X, Out, packed, at) -> None:
        """S = Q . K of the live groups, block by block, and tops.

        The products of a block hide what goes on beside them: queries of the next block, weights of
        the one before, and asking for the queries of the next task.
        """
        if not self.queries_in_place:
            with T.serial(BLOCK) as m, T.serial(self.depth // BLOCK) as strip:
                copy_strip(self, w.Q, m, X, self._query(at, m), strip)
        with T.serial(at.blocks) as block:
            with T.serial(w.count[0]) as i:
                (group,) = opaque("int64", [w.live[i]])
                beside = self._beside_scores(w, X, Out, at, block, i, group)
                self.multiply_keys(w, X, packed, at, group, block, beside)
                with T.If(w.partial[i] != 0), T.Then():
                    hide(self, w, block, group, at.rows, at.keys)
            if self.wants_weights:
                with T.If(tir.all(block > 0, w.blind[0] == 0)), T.Then():
                    add_weights(self, w, block - 1)
            find_tops(self, w, block)

    def _beside_scores(self, w, X, Out, at, block, i, group) -> Callable[[Expr], None]:
        """What a strip of the products of a block and the i-th live group hides: a share of rows
        by groups, of their channels by strips; of weights, the other way round.
        """
        count = w.count[0]
        bounds = opaque("int32", [i * BLOCK // count, (i + 1) * BLOCK // count])
        first = T.Bind(block * BLOCK + bounds[0].astype("int64"))
        rows = T.Bind(bounds[1] - bounds[0])
        more = T.Bind(tir.Select(block + 1 < at.blocks, rows, 0))
        before = tir.all(block > 0, w.blind[0] == 0)

        def beside(strip: Expr) -> None:
            with T.serial(rows) as r:
                ask_ahead(self, X, Out, at, first + r, strip)
            if not self.queries_in_place:
                with T.serial(more) as r:
                    m = T.Bind(first + BLOCK + r)
                    copy_strip(self, w.Q, m, X, self._query(at, m), strip)
            if self.wants_weights:
                low, high = (n * BLOCK // (self.depth // BLOCK) for n in (strip, strip + 1))
                last = T.Bind((block - 1) * BLOCK)
                weigh_rows(self, w, group, last + low, tir.Select(before, high - low, 0))

        return beside

    def multiply_keys(self, w, X, packed, at, group, block, beside) -> None:
        """S of 32 rows and 32 keys."""
        for tile in range(4):
            T.evaluate(x86_amx.zero(tile))
        with T.serial(self.depth // BLOCK) as strip:
            beside(strip)

            def load_queries(term: int) -> None:
                for side, tile in enumerate(LEFT):
                    m = block * BLOCK + side * SIDE
                    self._load_query_tile(tile, w, X, at, term, m, strip)

            def load_keys(term: int) -> None:
                for side, tile in enumerate(RIGHT):
                    key = packed.K[at.h2, at.slot + group, term, side, strip * SIDE, 0]
                    load_tile(tile, key, x86_amx.ROW_BYTES)

            multiply_terms(SCORE_PRODUCTS[self.terms], load_queries, load_keys)
        for tile in range(4):
            row = block * BLOCK + SIDE * (tile // 2)
            column = group * BLOCK + SIDE * (tile % 2)
            store_tile(tile, w.S[row, column], w.S.shape[1] * _WORD)

    def weighs_late(self, w, at) -> Expr:
        """Whether the products of the first block with values hide the weights of the last one."""
        return tir.all(at.blocks > 1, w.blind[0] == 0)

    def weigh_rest(self, w, at) -> None:
        """Weights of the blocks that no products hide."""
        done = T.Bind(tir.Select(w.blind[0] == 0, at.blocks - 1, tir.const(0, "int64")))
        end = at.blocks
        if self.wants_out:
            end = T.Bind(tir.Select(self.weighs_late(w, at), at.blocks - 1, at.blocks))
        with T.serial(tir.max(end - done, 0)) as block:
            weigh_block(self, w, done + block)

    def multiply_values(self, w, packed, Out, at) -> None:
        """Out = P . V / L, 32 rows and 32 channels a step.

        Products hide that the outputs of the step before are stored, a share of their rows by
        groups, and the weights of the last block.
        """
        pitch = w.P.shape[2] * _WORD
        late, count, zero = self.weighs_late(w, at), w.count[0], tir.const(0, "int64")
        with T.serial(at.blocks * self.strips) as step:
            block, strip = T.Bind(step // self.strips), T.Bind(step % self.strips)
            for tile in range(4):
                T.evaluate(x86_amx.zero(tile))
            low, high = (n * BLOCK // self.strips for n in (strip, strip + 1))
            weighed = T.Bind(tir.Select(tir.all(block == 0, late), high - low, zero))
            with T.serial(count) as i:
                (group,) = opaque("int64", [w.live[i]])
                first, end = opaque("int64", [i * BLOCK // count, (i + 1) * BLOCK // count])
                stored = tir.Select(step > 0, end - first, zero)
                store_rows(self, w, Out, at, step - 1, first, stored)
                weigh_rows(self, w, group, (at.blocks - 1) * BLOCK + low, weighed)

                def load_weights(term: int, group: Expr = group) -> None:
                    for side, tile in enumerate(LEFT):
                        row = block * BLOCK + side * SIDE
                        load_tile(tile, w.P[term, row, group * SIDE], pitch)

                def load_values(term: int, group: Expr = group) -> None:
                    for side, tile in enumerate(RIGHT):
                        values = packed.V[at.h2, at.slot + group, term, strip * 2 + side, 0, 0]
                        load_tile(tile, values, x86_amx.ROW_BYTES)

                multiply_terms(OUTPUT_PRODUCTS[self.value_terms], load_weights, load_values)
            for tile in range(4):
                place = w.O[step % 2, SIDE * (tile // 2), SIDE * (tile % 2)]
                store_tile(tile, place, BLOCK * _WORD)
            with T.If(tir.any(count == 0, step == at.blocks * self.strips - 1)), T.Then():
                store_rows(self, w, Out, at, step, zero, tir.const(BLOCK, "int64"))
            with T.If(tir.all(step == self.strips - 1, late)), T.Then():
                add_weights(self, w, at.blocks - 1)


def _attending(task: TileTask):
    """An inline ``attend`` with the arguments of that in ``nsa_vector``."""
    p = task.problem
    G = p.group
    has_mask = p.atten_mask is not None
    wants_max, wants_sum = "softmax_max" in p.outputs, "softmax_sum" in p.outputs
    wants_out, wants_blocks = "attention_out" in p.outputs, "topk_indices_out" in p.outputs
    wants_weights = task.wants_weights
    select_blocks, write_softmax = selection(p, SIDE), record_writing(p)

    @TS.inline
    def attend(
        w,
        packed,
        X,
        Mask,
        Forced,
        Max,
        Sum,
        Out,
        Indices,
        h2,
        slot,
        k0,
        q0,
        length,
        t0,
        rows,
        keys,
        ahead,
    ):
        at = TS.meta_var(task.place(h2, slot, k0, q0 + t0, rows, keys, ahead))
        if has_mask:
            stage_mask(task, w, Mask, t0, rows, keys)
        find_live(task, w, rows, keys)
        find_blind(task, w, rows, keys)
        task.score_groups(w, X, Out, packed, at)
        if has_mask and not p.zero_masked_rows:
            uncover(task, w, at.blocks, keys)
        if wants_weights:
            task.weigh_rest(w, at)
        if wants_out:
            task.multiply_values(w, packed, Out, at)
        if wants_max or wants_sum:
            for m in range(rows * G):
                write_softmax(
                    Max, Sum, w.top, w.total, m, q0, length, t0 + m // G, h2 * G + m % G
                )  # fmt: skip
        if wants_blocks:
            for row in range(rows):
                score_blocks(task, w, Forced, row, t0 + row, keys)
                select_blocks(w.score, 0, Indices, q0 + t0 + row, h2, p.blocks(keys))

    return attend
