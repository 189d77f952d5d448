"""Fused attention on the CPU: one PrimFunc, online softmax, no S1 x S2 matrix in memory.

    for task in parallel(query tiles of all sequences and heads):       R query rows
        queries transposed to float32                                   [D][R]
        for key tile in the interval that the tile's rows may see:      C keys
            keys and values to float32 (float16, bfloat16 only)         [C][D]
            for group in register-wide groups of rows:                  W = R / groups
                scores, bias, mask, maximum                             [C][W]
                weights, sum, dropout                                   [C][W]
                output = output * correction + weights @ values         [D][W]
        output / sum, transposed back; maximum and sum

Query rows lie across vector lanes. So keys and values are read where they are, one element
broadcast per multiply-add of W rows, whatever their layout and whatever D is; maxima and sums need
no reduction across lanes; a bias tile is transposed in registers as it is read, and of a mask 32
keys of a row become the bits of a word.

The memory of a thread is O(C * D + R * D), whatever S1 and S2 are.

Where the target multiplies matrix tiles (AMX) or pairs (AVX512-BF16) of bfloat16, bfloat16 tasks
take these instructions in both products (``attention_amx``, ``attention_bf16``), and float32 and
float16 tasks take matrix tiles by bfloat16 terms (``attention_split``); few query rows go row by
row (``attention_row``), those of large groups of heads in bfloat16 by matrix tiles
(``attention_row_amx``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import Sequence
from ..dimensions import own_dimensions
from ..intrin import barrier, bits, x86_amx, x86_bf16
from . import matrix_tiles
from .attention_amx import TileTask
from .attention_bf16 import PairTile
from .attention_config import (
    AttentionConfig,
    configure,
    goes_by_rows,
    group_heads,
    heads_config,
    tile_config,
)
from .attention_row import RowTile
from .attention_row_amx import MOST_HEADS, HeadsTile, takes_heads
from .attention_split import SplitTask, may_refuse, splits
from .attention_task import opaque
from .attention_tile import Tile
from .vector import vector_unit

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem

OPERATOR = "SpeedFusionAttention"
"""What a message about the machine names, instead of the node: layers that differ in their names
alone share one kernel.
"""
Task = tuple[Sequence, Expr, Expr, Expr]
"""Sequence, head, first query row, part of the keys."""


def build_attention(problem: AttentionProblem, target: Target) -> tir.PrimFunc:
    """The kernel ``speed_fusion_attention.fused``: inputs, then outputs, as ``problem`` lists
    them.
    """
    unit = vector_unit(target)
    config = configure(problem, unit)
    whole = problem.dtype == "bfloat16"
    tiles = matrix_tiles.available(target) and (whole or splits(problem.dtype, problem.scale))
    row_kind = RowTile
    if tiles and not goes_by_rows(problem, unit):
        config = tile_config(problem, config)
    elif tiles and takes_heads(problem, group_heads(problem, MOST_HEADS)):
        row_kind, config = HeadsTile, heads_config(problem, config)
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("speed_fusion_attention")
            T.func_attr({"tirx.noalias": True})
            dims: dict[str, Expr] = {}
            buffers = {
                name: T.arg(name, T.buffer(own_dimensions(tensor.shape, dims), tensor.dtype))
                for name, tensor in (problem.tensors | problem.outputs).items()
            }
            B, S1, S2 = own_dimensions((problem.B, problem.S1, problem.S2), dims)
            parts = (problem, config, unit, buffers, _scalars(problem, buffers))
            divide = _packed_tasks if problem.layout == "TND" else _batch_tasks
            kind, sources = _products(problem, config, target, tiles)
            if row_kind is HeadsTile:
                sources.append(x86_amx.SOURCE)
            tile, row_tile = kind(*parts), row_kind(*parts)
            with T.attr(0, x86_bf16.IMPORT, "".join(sources)) if sources else nullcontext():
                if issubclass(kind, TileTask) or row_kind is HeadsTile:
                    _assert(x86_amx.permitted(), f"{OPERATOR}: {x86_amx.REFUSED}", "RuntimeError")
                if config.parts > 1:
                    row_tile.allocate_parts(B)
                with divide(problem, config, buffers, B, S1, S2) as task:
                    _emit(tile, row_tile, task)
                if config.parts > 1:
                    _join(row_tile, B, S1, S2)
        return builder.get()


def _products(
    problem: AttentionProblem, config: AttentionConfig, target: Target, tiles: bool
) -> tuple[type[Tile], list[str]]:
    """What multiplies where rows lie across the lanes, and the LLVM text that it needs."""
    sources = [bits.SOURCE] * problem.mask
    if min(_task_rows(problem, config)) <= config.few or (tiles and may_refuse(problem.dtype)):
        sources.append(barrier.SOURCE)
    if max(_task_rows(problem, config)) <= config.few:
        return Tile, sources
    if tiles:
        kind = TileTask if problem.dtype == "bfloat16" else SplitTask
        return kind, [x86_amx.SOURCE, *sources]
    if problem.dtype == "bfloat16" and x86_bf16.available(target):
        return PairTile, [x86_bf16.SOURCE, *sources]
    return Tile, sources


def _emit(tile: Tile, row_tile: RowTile, task: Task) -> None:
    """Few rows go one by one, more across the lanes; only what the sizes leave possible. So do
    those whose elements matrix tiles refuse.
    """
    *place, part = task
    tile.place(*place)
    row_tile.stand_at(tile)
    row_tile.part = part
    few = tile.config.few
    possible = _task_rows(tile.problem, tile.config)
    if max(possible) <= few:
        row_tile.emit()
    elif isinstance(tile, SplitTask) and tile.may_refuse:
        by_rows = T.alloc_buffer((1,), "bool", scope="local")
        T.buffer_store(by_rows, tile.rows <= few, [0])
        with T.If(tir.Not(by_rows[0])), T.Then():
            tile.emit()
            T.buffer_store(by_rows, tile.refused(), [0])
        with T.If(by_rows[0]), T.Then():
            row_tile.emit()
    elif min(possible) > few:
        tile.emit()
    else:
        with T.If(tile.rows <= few):
            with T.Then():
                row_tile.emit()
            with T.Else():
                tile.emit()


def _join(row_tile: RowTile, B: Expr, S1: Expr, S2: Expr) -> None:
    """Few operations, for which the other threads need not be woken unless the batch is unknown."""
    problem = row_tile.problem
    loop = T.serial if isinstance(problem.B, int) else T.parallel
    with loop(B * problem.N1) as head:
        at = _batch_entry(T.Bind(head // problem.N1), S1, S2)
        row_tile.place(at, (head % problem.N1).astype("int32"), tir.const(0, "int32"))
        row_tile.join()


def _batch_entry(b: Expr, S1: Expr, S2: Expr) -> Sequence:
    zero = tir.const(0, "int64")
    return Sequence(b, *opaque("int32", [S1, S2]), zero, zero, zero)


def _task_rows(problem: AttentionProblem, config: AttentionConfig) -> set[int]:
    """How many rows a task may have."""
    if problem.layout == "TND" or not isinstance(problem.S1, int):
        return {1, config.rows}
    whole, rest = divmod(problem.S1, config.rows)
    return {config.rows} if not rest else {rest, config.rows} if whole else {rest}


def _scalars(problem: AttentionProblem, buffers: dict[str, tir.Buffer]) -> dict[str, Expr]:
    """seed, offset and the start indices, from the attribute or from the tensor of one element."""
    values = {name: tir.const(value, "int64") for name, value in problem.constants.items()}
    for name in ("seed", "offset", "q_start_idx", "kv_start_idx"):
        if name in buffers:
            index = [0] * len(buffers[name].shape)
            values[name] = T.Bind(buffers[name][tuple(index)].astype("int64"))
    return values


@contextmanager
def _batch_tasks(
    problem: AttentionProblem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    B: Expr,
    S1: Expr,
    S2: Expr,
) -> Iterator[Task]:
    """Parallel over batch, head and query tile.

    The pool gives each thread one contiguous range of tasks. Under a causal mask tiles alternate
    between both ends of the sequence, so that every range has cheap and costly ones.
    """
    if "prefix" in buffers:  # perhaps computed in the graph
        with T.serial(B) as b:
            prefix = T.Bind(buffers["prefix"][b].astype("int64"))
            _assert(
                tir.all(prefix >= 0, prefix >= S2 - S1, prefix <= S2),
                f'{problem.label}: "prefix": found a value outside the range, '
                "allowed max(0, S2 - S1) to S2",
            )
    tiles = T.Bind((S1 + (config.rows - 1)) // config.rows)
    shares = problem.N1 // config.heads
    per_head = T.Bind(tiles * config.parts)
    with T.parallel(B * shares * per_head) as task:
        part = T.Bind((task % config.parts).astype("int32"))
        position = T.Bind((task % per_head // config.parts).astype("int32"))
        n = T.Bind((task // per_head % shares * config.heads).astype("int32"))
        b = T.Bind(task // (per_head * shares))
        if problem.band is not None and problem.band.causal:
            last = tiles.astype("int32") - 1
            position = T.Bind(tir.Select(position % 2 == 0, position // 2, last - position // 2))
        yield _batch_entry(b, S1, S2), n, position * config.rows, part


@contextmanager
def _packed_tasks(
    problem: AttentionProblem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    B: Expr,
    S1: Expr,
    S2: Expr,
) -> Iterator[Task]:
    """TND: parallel over head and query tile of every sequence, from a table of tiles.

    The lists are data, perhaps computed in the graph: they are asserted before they index
    anything. The table has T1 / R + B entries at most, two integers each.
    """
    ends_q, ends_kv = buffers["actual_seq_qlen"], buffers["actual_seq_kvlen"]
    bound = S1 // config.rows + B
    tile_sequence = T.alloc_buffer((bound,), "int32")
    tile_row = T.alloc_buffer((bound,), "int32")
    pairs = T.alloc_buffer((B,), "int64")
    state = T.alloc_buffer((2,), "int64")  # tiles so far, pairs so far
    for slot in range(2):
        T.buffer_store(state, tir.const(0, "int64"), [slot])
    with T.serial(B) as b:
        start_q, length_q = _span(ends_q, b)
        start_kv, length_kv = _span(ends_kv, b)
        _assert_list(problem, "actual_seq_qlen", start_q, length_q, S1)
        _assert_list(problem, "actual_seq_kvlen", start_kv, length_kv, S2)
        for condition, text in problem.sequence_rules(length_q, length_kv):
            _assert(condition, f"{problem.label}: {text}")
        T.buffer_store(pairs, state[1], [b])
        first = T.Bind(state[0])
        count = T.Bind((length_q + (config.rows - 1)) // config.rows)
        with T.serial(count) as t:
            T.buffer_store(tile_sequence, b.astype("int32"), [first + t])
            T.buffer_store(tile_row, (t * config.rows).astype("int32"), [first + t])
        T.buffer_store(state, first + count, [0])
        T.buffer_store(state, state[1] + length_q * length_kv, [1])
    for name, ends, total in (("actual_seq_qlen", ends_q, S1), ("actual_seq_kvlen", ends_kv, S2)):
        last = ends[B - 1].astype("int64")
        _assert(
            last == total,
            f'{problem.label}: "{name}": found a last value other than '
            f"the number of packed tokens, allowed that number",
        )
    tiles = T.Bind(state[0])
    with T.parallel(tiles * problem.N1) as task:
        n = T.Bind((task // tiles).astype("int32"))
        slot = T.Bind(task % tiles)
        b = T.Bind(tile_sequence[slot].astype("int64"))
        at = _packed_sequence(b, ends_q, ends_kv, pairs)
        yield at, n, tile_row[slot], tir.const(0, "int32")


def _packed_sequence(
    b: Expr, ends_q: tir.Buffer, ends_kv: tir.Buffer, pairs: tir.Buffer
) -> Sequence:
    """Place of sequence b."""
    (start_q, length_q), (start_kv, length_kv) = _span(ends_q, b), _span(ends_kv, b)
    lengths = opaque("int32", [length_q, length_kv])
    return Sequence(b, *lengths, *opaque("int64", [start_q, start_kv, pairs[b]]))


def _span(ends: tir.Buffer, b: Expr) -> tuple[Expr, Expr]:
    """Start and length (int64) of sequence b from a list of cumulative ends."""
    before = tir.if_then_else(b > 0, ends[tir.max(b - 1, 0)].astype("int64"), tir.const(0, "int64"))
    start = T.Bind(before)
    return start, T.Bind(ends[b].astype("int64") - start)


def _assert_list(
    problem: AttentionProblem, name: str, start: Expr, length: Expr, total: Expr
) -> None:
    _assert(
        tir.all(length >= 0, start + length <= total),
        f'{problem.label}: "{name}": found a value that decreases or exceeds the number of packed '
        "tokens, allowed non-decreasing cumulative lengths",
    )


def _assert(condition: Expr, text: str, kind: str = "ValueError") -> None:
    with T.Assert(condition, text, kind):
        T.evaluate(0)
