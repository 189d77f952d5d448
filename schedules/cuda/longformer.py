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
from .guard import guard
from .longformer_block import Block, LongformerPlace, quantised
from .longformer_tokens import batch_and_sequence, gather_global_rows, global_tokens

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

__all__ = ["attention", "gather_global_rows", "global_tokens"]

_MOST_CHANNELS = 256
"""Of a head: its output stays in the registers of a warp."""
_SHARE = 512
"""Keys of a global token that one block computes: about as many as a tile of positions sees."""
_COMBINE_THREADS = 256


def attention(problem: Problem, target: Target) -> PrimFunc:
    """The attention of all heads, from int8 projections to the int8 output.

    qkv int8 [1, B*S, 3H]; gq int8 [1, sizes[0], H], row offsets[b] + n for the n-th global token
    of entry b; gkv int8 [1, B*S or 0, 2H]; mask float16 [B, S]; positions, rank, offsets from
    ``global_tokens``; scale_qkv_gemm, scale_global_gemm, scale_output float32 [1]
    -> int8 [B, S, H], or its COL32 form [B, H/32, S, 32] with ``problem.col32``. gq and gkv are
    read only where a flag is set.

    Raises:
        UnsupportedError: a head has more than 256 channels.
    """
    arch = architectures.of(target)
    H, N, config = problem.hidden, problem.num_heads, configure(problem, arch)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("longformer_attention")
        T.func_attr({"tirx.noalias": True})
        B, S = batch_and_sequence(problem)
        R, G, GR = T.int64(), T.int64(), T.int64()
        one = tir.const(1, "int64")
        shapes = {
            "qkv": ((one, R, 3 * H), "int8"),
            "gq": ((one, G, H), "int8"),
            "gkv": ((one, GR, 2 * H), "int8"),
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
        shares = _tiles(S, _SHARE)
        records = (shares, tir.max(G, 1) * N)
        buffers |= {name: T.alloc_buffer(records) for name in ("part_max", "part_sum")}
        buffers["part_out"] = T.alloc_buffer((*records, problem.head_size))
        tiles, global_tiles = _tiles(S, config.rows), _tiles(G, config.rows) * shares
        blocks = T.Bind(B * N * (tiles + global_tiles))
        with (
            T.thread_binding(blocks, "blockIdx.x") as block,
            T.thread_binding(config.threads, "threadIdx.x") as thread,
            T.sblock("attend"),
        ):
            T.reads()
            T.writes()
            # Global tokens first: what their blocks leave is read by the second kernel.
            early = named(B * N * global_tiles)
            is_global = named(block.astype("int64") < early)
            number = named(tir.Select(is_global, block.astype("int64"), block - early))
            per_head = named(tir.max(tir.Select(is_global, global_tiles, tiles), 1))
            head, tile = named(number // per_head), named(number % per_head)
            share = named(tir.Select(is_global, tile % shares, tir.const(0, "int64")))
            tile = named(tir.Select(is_global, tile // shares, tile))
            place = LongformerPlace(
                b=named(head // N),
                h=named(head % N),
                first=named(tile * config.rows),
                is_global=is_global,
                share=share,
                first_key=named(share * _SHARE),
                most_keys=_SHARE,
            )
            Block(problem, config, arch, buffers, S, thread).emit(place)
        _combine(problem, buffers, B, S, G, shares)
    return builder.get()


def _combine(
    problem: Problem,
    buffers: dict[str, tir.Buffer],
    B: Expr,
    S: Expr,
    G: Expr,
    shares: Expr,
) -> None:
    """Output rows of global tokens, a block each."""
    N, D = problem.num_heads, problem.head_size
    with (
        guard(G > 0, True),  # an empty grid cannot be launched
        T.thread_binding(G, "blockIdx.x") as row,
        T.thread_binding(_COMBINE_THREADS, "threadIdx.x") as thread,
        T.sblock("combine"),
    ):
        T.reads()
        T.writes()
        top, scale, total, value = (T.alloc_buffer((1,), scope="local") for _ in range(4))
        inverse_scale = named(float32(1) / buffers["scale_output"][0])
        with T.serial(B) as b:
            n = named(row - buffers["offsets"][b].astype("int64"))
            mine = tir.all(n >= 0, n < buffers["rank"][b, S].astype("int64"))
            with T.If(mine), T.Then():
                s = named(buffers["positions"][b, n].astype("int64"))
                live = named(buffers["mask"][b, s].astype("float32") >= float32(0))
                with T.serial(_tiles(problem.hidden, _COMBINE_THREADS)) as turn:
                    column = named((turn * _COMBINE_THREADS + thread).astype("int64"))
                    with T.If(column < problem.hidden), T.Then():
                        record, d = named(row * N + column // D), named(column % D)
                        for buffer, start in ((top, None), (total, 0.0), (value, 0.0)):
                            first = buffers["part_max"][0, record] if start is None else start
                            T.buffer_store(buffer, first, [0])
                        with T.If(live), T.Then():
                            with T.serial(shares) as share:
                                part = buffers["part_max"][share, record]
                                T.buffer_store(top, tir.max(top[0], part), [0])
                            with T.serial(shares) as share:
                                part = buffers["part_max"][share, record]
                                cuda.exp2(scale[0], part - top[0])
                                part = scale[0] * buffers["part_sum"][share, record]
                                T.buffer_store(total, total[0] + part, [0])
                                part = scale[0] * buffers["part_out"][share, record, d]
                                T.buffer_store(value, value[0] + part, [0])
                        y = quantised(value[0] * (float32(1) / total[0]), inverse_scale)
                        y = tir.Select(live, y, tir.const(0, "int8"))
                        index = (
                            [b, column // 32, s, column % 32] if problem.col32 else [b, s, column]
                        )
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
