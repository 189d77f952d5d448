"""Fused attention on NVIDIA GPUs: one kernel, online softmax, no S1 x S2 matrix in memory.

    for tile in blocks(query tiles of all sequences and heads):         warps x 16-row fragments
        queries to shared memory                                        once
        for key tile in the interval that the tile's rows may see:      a ring in shared memory
            scores = queries @ keys, bias, mask                         registers
            maximum, weights, sum, dropout                              registers, quads of lanes
            output = output * correction + weights @ values             registers
        output / sum; maximum and sum

A warp holds whole query rows, so the softmax stays within four lanes, and the accumulators of the
first product are the left operand of the second without leaving the registers. Keys and values
pass through one ring of shared memory tiles, in parts of D when D is large. float16 and bfloat16
multiply on tensor cores, float32 (and bfloat16 where they have none) on the ordinary units;
nothing is rounded below float32 there. On sm_90a, four warps together multiply 64 rows straight
from shared memory (``wgmma``) where D is 64 or 128; two blocks share a multiprocessor, and one
computes weights while the other one multiplies.

Few query rows: the query heads that share keys become rows of one tile, and the keys are divided
among blocks, whose results a second kernel combines in fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import Sequence
from . import arch as architectures
from .attention_block import Block
from .attention_combine import combine
from .attention_config import AttentionConfig, configure
from .attention_packed import find_tile
from .attention_place import Place, named
from .override import overridden

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem


def build_attention(problem: AttentionProblem, target: Target) -> tir.PrimFunc:
    """The kernel ``speed_fusion_attention.fused``: inputs, then outputs, as ``problem`` lists
    them.
    """
    arch = architectures.of(target)
    config = overridden(configure(problem, arch))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("speed_fusion_attention")
        T.func_attr({"tirx.noalias": True})
        dims: dict[str, Expr] = {}
        buffers = {
            name: T.arg(name, T.buffer(_shape(tensor.shape, dims), tensor.dtype))
            for name, tensor in (problem.tensors | problem.outputs).items()
        }
        B, S1, S2 = _shape((problem.B, problem.S1, problem.S2), dims)
        splits = _splits(problem, config, B, S2)
        parts = _partial_results(problem, splits, B, S1)
        with (
            T.thread_binding(_grid(problem, config, B, S1, splits), "blockIdx.x") as block,
            T.thread_binding(config.threads, "threadIdx.x") as thread,
            T.sblock("attend"),
        ):
            T.reads()
            T.writes()
            emitter = Block(problem, config, arch, buffers | parts, thread)
            divide = _packed_tile if problem.layout == "TND" else _batch_tile
            with divide(problem, config, buffers, (B, S1, S2), block, thread, splits) as place:
                emitter.emit(place)
        if parts:
            combine(problem, buffers | parts, splits)
    return builder.get()


def _shape(shape: tuple, dims: dict[str, Expr]) -> tuple[Expr, ...]:
    """int64 dimensions; each symbolic one becomes the PrimFunc's own variable, bound by a buffer's
    shape.
    """

    def dim(size: int | Expr) -> Expr:
        if isinstance(size, int):
            return tir.const(size, "int64")
        return dims.setdefault(str(size), T.int64())

    return tuple(dim(size) for size in shape)


def _splits(problem: AttentionProblem, config: AttentionConfig, B: Expr, S2: Expr) -> Expr | None:
    """Among how many blocks the keys of one tile are divided; None where they never are."""
    if not config.split_blocks:
        return None
    known = isinstance(problem.B, int) and isinstance(problem.S2, int)
    tiles = B * (problem.N1 // config.heads * config.slices)
    wanted = (tiles + (config.split_blocks - 1)) // tiles
    room = S2 // config.split_keys
    splits = tir.max(tir.min(wanted, room), tir.const(1, "int64"))
    if not known:
        return T.Bind(splits.astype("int32"))
    tiles = problem.B * (problem.N1 // config.heads) * config.slices
    count = max(1, min(-(-config.split_blocks // tiles), problem.S2 // config.split_keys))
    return None if count == 1 else tir.const(count, "int32")


def _partial_results(
    problem: AttentionProblem, splits: Expr | None, B: Expr, S1: Expr
) -> dict[str, tir.Buffer]:
    """Maxima, sums and unnormalised rows of output of every split, float32, in global memory."""
    if splits is None:
        return {}
    records = (splits.astype("int64"), B * problem.N1 * S1)
    parts = {name: T.alloc_buffer(records) for name in ("part_max", "part_sum")}
    if "attention_out" in problem.outputs:
        parts["part_out"] = T.alloc_buffer((*records, problem.D))
    return parts


def _grid(
    problem: AttentionProblem, config: AttentionConfig, B: Expr, S1: Expr, splits: Expr | None
) -> Expr:
    blocks = config.slices * (problem.N1 // config.heads)
    if problem.layout == "TND":
        return ((S1 // config.rows + B) * blocks).astype("int32")
    tiles = _query_tiles(problem, config, S1)
    total = B * blocks * tiles
    return (total if splits is None else total * splits.astype("int64")).astype("int32")


def _query_tiles(problem: AttentionProblem, config: AttentionConfig, S1: Expr) -> Expr:
    """Query tiles of a head; where heads share a tile, all their rows fit into one."""
    if config.heads > 1:
        return tir.const(1, "int64")
    return (S1 + (config.rows - 1)) // config.rows


@contextmanager
def _batch_tile(
    problem: AttentionProblem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    sizes: tuple[Expr, Expr, Expr],
    block: Expr,
    thread: Expr,
    splits: Expr | None,
) -> Iterator[Place]:
    """Place of a block: tiles of a head follow one another, so that blocks which run together read
    the same keys. Under a causal mask the costly last tiles start first.
    """
    _, S1, S2 = sizes
    tiles = _query_tiles(problem, config, S1).astype("int32")
    shares = problem.N1 // config.heads
    position, rest = named(block % tiles), block // tiles
    if problem.band is not None and problem.band.causal:
        position = tiles - 1 - position
    part, rest = rest % config.slices, rest // config.slices
    split = tir.const(0, "int32")
    if splits is not None:
        split, rest = rest % splits, rest // splits
    zero = tir.const(0, "int64")
    at = Sequence(
        named((rest // shares).astype("int64")), _length(S1), _length(S2), zero, zero, zero
    )
    n = named(rest % shares * config.heads)
    yield Place(at, n, named(position * config.rows), named(part), named(split), splits)


@contextmanager
def _packed_tile(
    problem: AttentionProblem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    sizes: tuple[Expr, Expr, Expr],
    block: Expr,
    thread: Expr,
    splits: Expr | None,
) -> Iterator[Place]:
    """TND: there are at least as many blocks as tiles; those beyond the last do nothing."""
    B, S1, S2 = sizes
    bound = (S1 // config.rows + B).astype("int32")
    slot, rest = named(block % bound), block // bound
    part, n = named(rest % config.slices), named(rest // config.slices)
    at, i0, live = find_tile(problem, config, buffers, (B, S1, S2), slot, thread)
    with T.If(live), T.Then():
        yield Place(at, n, i0, part, tir.const(0, "int32"), None)


def _length(size: Expr) -> Expr:
    return (
        tir.const(int(size.value), "int32")
        if isinstance(size, tir.IntImm)
        else size.astype("int32")
    )
