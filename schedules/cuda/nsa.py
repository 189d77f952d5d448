"""NSA compressed attention with block selection on NVIDIA GPUs, one kernel (and one that reads the
mask).

    for row of atten_mask: first and last visible key, first masked one       int32 [R, 3]
    for tile in blocks(key heads x tiles of query positions):                 G heads a position
        queries to shared memory                                              once
        for key tile that some row sees: online softmax, O += P . V           registers
        O / L, M, L
        for key tile that some row sees:                                      shared memory
            scores of blocks += window of P / L summed over the heads
        k rounds of arg-max                                                   one warp a position

The G heads that share a key head are consecutive rows of the products, so that a tile of keys
serves all of them, and the sum over heads is one over rows of a fragment. Probabilities are
computed twice instead of kept: nothing of the size T x CmpSkv exists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from . import arch as architectures
from .attention_place import float32, named
from .nsa_block import Block, Place
from .nsa_config import NsaConfig, configure
from .nsa_mask import row_bounds
from .nsa_select import select
from .override import overridden

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_COPIES = 8
_LENGTHS = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
_OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")


def attend_select(problem: Problem, target: Target) -> tir.PrimFunc:
    """The kernel; its arguments are those of ``Problem``.

    Length lists that no one has checked may hold anything: results are then undefined, but nothing
    outside of a buffer is read or written.
    """
    arch = architectures.of(target)
    config = configure(problem, arch)
    config = overridden(replace(config, tiles=overridden(config.tiles)))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("nsa_compress_attention")
        T.func_attr({"tirx.noalias": True})
        buffers = _arguments(problem)
        query_ends, key_ends = (buffers[name] for name in _LENGTHS[:2])
        tokens, key_tokens = buffers["query"].shape[0], buffers["key"].shape[0]
        if "atten_mask" in buffers:
            buffers["bounds"] = row_bounds(buffers["atten_mask"])
        slots = tokens // config.positions + query_ends.shape[0]
        blocks = slots * (problem.key_heads * config.tiles.slices)
        with (
            T.thread_binding(blocks.astype("int32"), "blockIdx.x") as block,
            T.thread_binding(config.tiles.threads, "threadIdx.x") as thread,
            T.sblock("attend"),
        ):
            T.reads()
            T.writes()
            # Tiles of a key head follow one another, and read the same keys. Under a causal mask
            # the last see the most: they start first.
            turn, rest = named(block % slots.astype("int32")), block // slots.astype("int32")
            slot = named(slots.astype("int32") - 1 - turn)
            part, h2 = named(rest % config.tiles.slices), named(rest // config.tiles.slices)
            b = _find_sequence(query_ends, tokens, config, slot)
            query_start, S1 = _span(query_ends, b, tokens)
            key_start, S2 = _span(key_ends, b, key_tokens)
            S2 = named(tir.min(S2, problem.cmp_skv_limit))
            first_slot = (query_start // config.positions).astype("int32") + b
            t0 = named((slot - first_slot) * config.positions)
            with T.If(t0 < S1), T.Then():
                place = Place(h2, part, query_start, S1, t0, key_start, S2)
                tile = Block(problem, config, arch, buffers, thread, place)
                tile.attend()
                tile.store()
                if "topk_indices_out" in buffers:
                    with T.If(part == 0), T.Then():
                        select(tile)
            _clear_rest(problem, config, buffers, block, blocks, thread)
    return builder.get()


def _arguments(problem: Problem) -> dict[str, tir.Buffer]:
    p = problem
    tokens, key_tokens, sequences = T.int64(), T.int64(), T.int64()
    shapes = {
        "query": ((tokens, p.query_heads, p.head_size), p.dtype),
        "key": ((key_tokens, p.key_heads, p.head_size), p.dtype),
        "value": ((key_tokens, p.key_heads, p.value_size), p.dtype),
    }
    for name, dtype in (("atten_mask", p.atten_mask), ("topk_mask", p.topk_mask)):
        if dtype is not None:
            shapes[name] = ((T.int64(), T.int64()), dtype)
    shapes |= dict.fromkeys(_LENGTHS, ((sequences,), "int64"))
    outputs = {
        "softmax_max": ((tokens, p.query_heads, _COPIES), "float32"),
        "softmax_sum": ((tokens, p.query_heads, _COPIES), "float32"),
        "attention_out": ((tokens, p.query_heads, p.value_size), p.dtype),
        "topk_indices_out": ((tokens, p.key_heads, p.block_count), "int32"),
    }
    shapes |= {name: outputs[name] for name in _OUTPUTS if name in p.outputs}
    return {name: T.arg(name, T.buffer(shape, dtype)) for name, (shape, dtype) in shapes.items()}


def _inside(end: Expr, total: Expr) -> Expr:
    return tir.min(tir.max(end, tir.const(0, "int64")), total)


def _span(ends: tir.Buffer, b: Expr, total: Expr) -> tuple[Expr, Expr]:
    """Start (int64) and length (int32) of sequence b, inside 0..total whatever the list holds."""
    zero = tir.const(0, "int64")
    start = named(tir.Select(b > 0, _inside(ends[tir.max(b - 1, 0)], total), zero))
    length = tir.max(_inside(ends[b], total) - start, zero)
    return start, named(length.astype("int32"))


def _find_sequence(ends: tir.Buffer, total: Expr, config: NsaConfig, slot: Expr) -> Expr:
    """Sequence that owns tile number ``slot``: its tiles begin at slot ends[b-1] // positions + b.

    These beginnings increase and leave room for every tile, ceil(n / s) <= (p + n) // s - p // s +
    1, so that bisection finds it; at most one slot of a sequence stays empty.
    """
    found = T.alloc_buffer((2,), "int32", scope="local")
    T.buffer_store(found, tir.const(0, "int32"), [0])
    T.buffer_store(found, ends.shape[0].astype("int32"), [1])
    with T.While(found[1] - found[0] > 1):
        middle = named((found[0] + found[1]) // 2)
        before = _inside(ends[middle - 1], total) // config.positions
        with T.If(before.astype("int32") + middle <= slot):
            with T.Then():
                T.buffer_store(found, middle, [0])
            with T.Else():
                T.buffer_store(found, middle, [1])
    return found[0]


def _clear_rest(
    problem: Problem,
    config: NsaConfig,
    buffers: dict[str, tir.Buffer],
    block: Expr,
    blocks: Expr,
    thread: Expr,
) -> None:
    """Rows after the last sequence: zeros, and no block."""
    ends, tokens = buffers["actual_seq_qlen"], buffers["query"].shape[0]
    end = named(_inside(ends[ends.shape[0] - 1], tokens))
    mine = tir.max(tokens - end - block + (blocks - 1), tir.const(0, "int64")) // blocks
    with T.serial(mine) as turn:
        token = named(end + block + turn * blocks)
        for name in _OUTPUTS:
            if name not in buffers:
                continue
            out = buffers[name]
            heads, size = (int(extent) for extent in out.shape[1:])
            none = tir.const(-1, "int32") if name == "topk_indices_out" else float32(0)
            # In a register: TVM's code takes the address of what it casts to bfloat16.
            nothing = T.alloc_buffer((1,), none.ty.dtype, scope="local")
            T.buffer_store(nothing, none, [0])
            with T.serial(-(-heads * size // config.tiles.threads)) as strip:
                number = named(strip * config.tiles.threads + thread)
                with T.If(number < heads * size), T.Then():
                    index = [token, number // size, number % size]
                    T.buffer_store(out, nothing[0].astype(out.dtype), index)
