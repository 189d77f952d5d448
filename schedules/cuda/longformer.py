"""Longformer attention on NVIDIA GPUs: int8 projections in, int8 out; work linear in S.

    for tile in blocks(tiles of global tokens and shares of their keys, then tiles of positions):
        queries to shared memory, as float16                    once
        for key tile: the band of the tile's rows, then the global keys outside of it:
            the next tile's int8 from global memory             registers, under way meanwhile
            scores = queries @ keys, mask, band                 registers
            maximum, weights, sum                               registers, quads of lanes
            output = output * correction + weights @ values     registers
            the next tile to shared memory, as float16
        float16, int8, output order; of global tokens float32 for each share
    for row of a global token in blocks:
        the shares, in their order; float16, int8, output order

Projections are float16 numbers by definition, float16(scale * int8), so that both products are
those of the tensor cores; scores, softmax and sums are float32. A tile of positions sees its band
from the local projections, and the global keys there: those in the band with it, the others
gathered afterwards. A tile of global tokens sees every position from the global projections, which
takes longer: blocks divide them. Tiles of keys that no row of a warp may see are not multiplied by
that warp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from ...runtime.errors import UnsupportedError
from ..intrin import cuda
from . import arch as architectures
from .arch import Arch
from .attention_config import AttentionConfig
from .attention_place import float32, named
from .longformer_block import LOWEST as _LOWEST
from .longformer_block import Block, LongformerPlace, quantised
from .longformer_tokens import batch_and_sequence, gather_global_rows, global_tokens
from .override import overridden

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

__all__ = ["attention", "gather_global_rows", "global_tokens"]

_MOST_CHANNELS = 256
"""Of a head: its output stays in the registers of a warp."""
_SHARE = 512
"""Keys of a global token that one block computes, or a multiple where there are many global tokens:
about as many as a tile of positions sees.
"""
_COMBINE_THREADS = 256
_COMBINE_BLOCKS = 128
"""For the global tokens of a batch entry; block i takes tokens i, i + 128, ..."""


def attention(problem: Problem, target: Target) -> PrimFunc:
    """The attention of all heads, from int8 projections to the int8 output.

    qkv int8 [1, B*S, 3H]; gq int8 [1, B*S, H], row offsets[b] + n for the n-th global token of
    entry b; gkv int8 [1, B*S, 2H]; mask float16 [B, S]; positions, rank, offsets from
    ``global_tokens``; scale_qkv_gemm, scale_global_gemm, scale_output float32 [1]
    -> int8 [B, S, H], or its COL32 form [B, H/32, S, 32] with ``problem.col32``. Only rows of
    global tokens are read of gq, and gkv only where a flag is set.

    The host does not know how many global tokens there are: blocks are launched for as many as
    there may be, and those without any leave at once.

    Raises:
        UnsupportedError: a head has more than 256 channels.
    """
    arch = architectures.of(target)
    H, N, config = problem.hidden, problem.num_heads, overridden(configure(problem, arch))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("longformer_attention")
        T.func_attr({"tirx.noalias": True})
        B, S = batch_and_sequence(problem)
        R, one = T.int64(), tir.const(1, "int64")
        shapes = {
            "qkv": ((one, R, 3 * H), "int8"),
            "gq": ((one, R, H), "int8"),
            "gkv": ((one, R, 2 * H), "int8"),
            "mask": ((B, S), "float16"),
            "positions": ((B, S), "int32"),
            "rank": ((B, S + 1), "int32"),
            "offsets": ((B,), "int32"),
            "scale_qkv_gemm": ((one,), "float32"),
            "scale_global_gemm": ((one,), "float32"),
            "scale_output": ((one,), "float32"),
            "output": ((B, H // 32, S, 32) if problem.col32 else (B, S, H), "int8"),
        }
        buffers = {
            name: T.arg(name, T.buffer(shape, dtype)) for name, (shape, dtype) in shapes.items()
        }
        tiles = T.Bind(_tiles(S, config.rows))
        records = (B, tiles * config.rows, N)
        buffers |= {name: T.alloc_buffer(records) for name in ("part_max", "part_sum")}
        buffers["part_out"] = T.alloc_buffer((*records, problem.head_size))
        early = T.Bind(B * N * tiles)
        with (
            T.thread_binding(2 * early, "blockIdx.x") as block,
            T.thread_binding(config.threads, "threadIdx.x") as thread,
            T.sblock("attend"),
        ):
            T.reads()
            T.writes()
            # Global tokens first: what their blocks leave is read by the second kernel.
            is_global = named(block < early)
            number = named(tir.Select(is_global, block, block - early))
            head, tile = named(number // tiles), named(number % tiles)
            b = named(head // N)
            count = named(buffers["rank"][b, S].astype("int64"))
            shares, share_keys = _division(S, count, config.rows)
            first = named(tir.Select(is_global, tile // shares, tile) * config.rows)
            first_key = named(tile % shares * share_keys)
            place = LongformerPlace(
                b=b,
                h=named(head % N),
                first=first,
                is_global=is_global,
                first_key=first_key,
                end_key=named(tir.min(first_key + share_keys, S)),
                first_record=named(tile * config.rows),
            )
            with T.If(tir.any(tir.Not(is_global), first < count)), T.Then():
                Block(problem, config, arch, buffers, S, thread).emit(place)
        _combine(problem, config, buffers, B, S)
    return builder.get()


def _division(S: Expr, count: Expr, rows: int) -> tuple[Expr, Expr]:
    """Among how many blocks the keys of a tile of an entry's ``count`` global tokens are divided,
    and the keys of each but the last: so that there are no more blocks than tiles of positions.
    """
    room = named(_tiles(S, rows) // tir.max(_tiles(count, rows), 1))
    whole = _tiles(S, _SHARE)
    share = named(_tiles(whole, room))
    return named(_tiles(whole, share)), named(share * _SHARE)


def _combine(
    problem: Problem,
    config: AttentionConfig,
    buffers: dict[str, tir.Buffer],
    B: Expr,
    S: Expr,
) -> None:
    """Output rows of global tokens: those of an entry are divided among some blocks."""
    D = problem.head_size
    blocks = T.Bind(tir.min(S, _COMBINE_BLOCKS))
    with (
        T.thread_binding(B * blocks, "blockIdx.x") as block,
        T.thread_binding(_COMBINE_THREADS, "threadIdx.x") as thread,
        T.sblock("combine"),
    ):
        T.reads()
        T.writes()
        top, scale, total, value = (T.alloc_buffer((1,), scope="local") for _ in range(4))
        inverse_scale = named(float32(1) / buffers["scale_output"][0])
        b, first = named(block // blocks), named(block % blocks)
        count = named(buffers["rank"][b, S].astype("int64"))
        shares, _ = _division(S, count, config.rows)
        with T.serial(_tiles(tir.max(count - first, 0), blocks)) as turn:
            n = named(first + turn * blocks)
            s = named(buffers["positions"][b, n].astype("int64"))
            live = named(buffers["mask"][b, s].astype("float32") >= float32(0))
            first_record = named(n // config.rows * shares * config.rows + n % config.rows)
            with T.serial(_tiles(problem.hidden, _COMBINE_THREADS)) as strip:
                column = named((strip * _COMBINE_THREADS + thread).astype("int64"))
                with T.If(column < problem.hidden), T.Then():
                    h, d = named(column // D), named(column % D)

                    def part(name: str, share: Expr, *d: Expr, h: Expr = h) -> Expr:
                        return buffers[name][(b, first_record + share * config.rows, h, *d)]

                    T.buffer_store(top, float32(_LOWEST), [0])
                    T.buffer_store(total, float32(0), [0])
                    T.buffer_store(value, float32(0), [0])
                    with T.If(live), T.Then():
                        with T.serial(shares) as share:
                            T.buffer_store(top, tir.max(top[0], part("part_max", share)), [0])
                        with T.serial(shares) as share:
                            cuda.exp2(scale[0], part("part_max", share) - top[0])
                            added = scale[0] * part("part_sum", share)
                            T.buffer_store(total, total[0] + added, [0])
                            added = scale[0] * part("part_out", share, d)
                            T.buffer_store(value, value[0] + added, [0])
                    y = quantised(value[0] * (float32(1) / total[0]), inverse_scale)
                    y = tir.Select(live, y, tir.const(0, "int8"))
                    index = [b, column // 32, s, column % 32] if problem.col32 else [b, s, column]
                    T.buffer_store(buffers["output"], y, index)


def configure(problem: Problem, arch: Arch) -> AttentionConfig:
    """128 rows in four warps where output and queries leave registers for the next tile of keys."""
    D = problem.head_size
    if D > _MOST_CHANNELS:
        raise UnsupportedError(
            f"qordered_longformer_attention.attention: found head size {D}, allowed at most "
            f"{_MOST_CHANNELS} on {arch.name}"
        )
    steps = -(-D // 128)
    depth = -(-D // (16 * steps)) * 16
    narrow = steps * depth <= 64
    return AttentionConfig(
        tensor_cores=True,
        warps=4,
        row_tiles=2 if narrow else 1,
        keys=48 if narrow else 32 // steps,
        depth=depth,
        steps=steps,
        value_steps=steps,
        slices=1,
        slots=2,
        item_bytes=2,
        piece=8,
        asynchronous=False,
        queries_in_registers=narrow,
    )


def _tiles(size: Expr | int, tile: int) -> Expr | int:
    return (size + (tile - 1)) // tile
