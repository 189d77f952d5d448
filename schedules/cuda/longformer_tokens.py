"""Longformer attention on NVIDIA GPUs: which tokens are global, and their rows of the input.

Both follow the flags, which only the device knows: it leaves the number of global tokens in its own
memory, where the kernels that depend on it find it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda
from .arch import WARP
from .attention_place import named
from .shared_memory import shared_memory

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

_SCAN_THREADS = 1024
"""Of a block that numbers the global tokens of a batch entry; so many positions at a time."""
_GATHER_THREADS = 128
_GATHER_BLOCKS = 128
"""For the global tokens of a batch entry; block i takes tokens i, i + 128, ..."""
_LANE_STEPS = (1, 2, 4, 8, 16)


def global_tokens(problem: Problem, target: Target) -> tir.PrimFunc:
    """Where the global tokens are.

    flags int32 [B, S]
    -> positions int32 [B, S]: ascending in each row, of which the first rank[b, S] are written;
    rank int32 [B, S + 1]: global tokens before a position; offsets int32 [B]: global tokens of
    the batch entries before b; sizes int64 [2]: global tokens of all entries, and the rows of a
    matrix of the input (S of COL32, else B*S), or 0 where there are no global tokens.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("global_tokens")
        T.func_attr({"tirx.noalias": True})
        B, S = batch_and_sequence(problem)
        flags = T.arg("flags", T.buffer((B, S), "int32"))
        positions = T.arg("positions", T.buffer((B, S), "int32"))
        rank = T.arg("rank", T.buffer((B, S + 1), "int32"))
        offsets = T.arg("offsets", T.buffer((B,), "int32"))
        sizes = T.arg("sizes", T.buffer((2,), "int64"))
        with (
            T.thread_binding(B, "blockIdx.x") as b,
            T.thread_binding(_SCAN_THREADS, "threadIdx.x") as thread,
            T.sblock("number"),
        ):
            T.reads()
            T.writes()
            _number(flags, positions, rank, b, S, thread)
        with (
            T.thread_binding(1, "blockIdx.x"),
            T.thread_binding(WARP, "threadIdx.x") as lane,
            T.sblock("add"),
        ):
            T.reads()
            T.writes()
            rows = S if problem.col32 else B * S
            _add(rank, offsets, sizes, B, S, rows, lane)
    return builder.get()


def _number(
    flags: tir.Buffer, positions: tir.Buffer, rank: tir.Buffer, b: Expr, S: Expr, thread: Expr
) -> None:
    """positions[b] and rank[b]: lanes add up within a warp, then every warp adds the warps."""
    warps = _SCAN_THREADS // WARP
    shared = shared_memory(2 * warps * 4, "uint8")
    before = T.alloc_buffer((1,), "int32", scope="local")
    own = T.alloc_buffer((1,), "int32", scope="local")
    upto = T.alloc_buffer((1,), "int32", scope="local")
    total = T.alloc_buffer((1,), "uint32", scope="local")
    part = T.alloc_buffer((1,), "int32", scope="local")
    sums = T.alloc_buffer((2,), "int32", scope="local")
    lane, warp = named(thread % WARP), named(thread // WARP)
    T.buffer_store(before, _int32(0), [0])
    with T.serial(_tiles(S, _SCAN_THREADS)) as turn:
        s = named(turn * _SCAN_THREADS + thread)
        T.buffer_store(own, _int32(0), [0])
        with T.If(s < S), T.Then():
            T.buffer_store(own, (flags[b, s] != 0).astype("int32"), [0])
        T.buffer_store(upto, own[0], [0])
        for step in _LANE_STEPS:
            T.buffer_store(part, cuda.shuffle_up(upto[0], step), [0])
            T.buffer_store(upto, upto[0] + tir.Select(lane >= step, part[0], _int32(0)), [0])
        # The totals of even and of odd turns lie apart: one barrier is enough.
        base = named((turn % 2).astype("int32") * warps)
        with T.If(lane == WARP - 1), T.Then():
            address = T.address_of(shared[(base + warp) * 4])
            T.evaluate(T.ptx["st.shared.b32"](address, tir.reinterpret("uint32", upto[0])))
        T.evaluate(T.cuda.cta_sync())
        T.evaluate(T.ptx["ld.shared.b32"](total[0], T.address_of(shared[(base + lane) * 4])))
        count = tir.reinterpret("int32", total[0])
        T.buffer_store(sums, tir.Select(lane < warp, count, _int32(0)), [0])
        T.buffer_store(sums, count, [1])
        for k in range(2):
            for step in _LANE_STEPS:
                T.buffer_store(part, cuda.shuffle_xor(sums[k], step), [0])
                T.buffer_store(sums, sums[k] + part[0], [k])
        number = named(before[0] + sums[0] + upto[0] - own[0])
        with T.If(s < S), T.Then():
            T.buffer_store(rank, number, [b, s])
            with T.If(own[0] != 0), T.Then():
                T.buffer_store(positions, s.astype("int32"), [b, number.astype("int64")])
        T.buffer_store(before, before[0] + sums[1], [0])
    with T.If(thread == 0), T.Then():
        T.buffer_store(rank, before[0], [b, S])


def _add(
    rank: tir.Buffer,
    offsets: tir.Buffer,
    sizes: tir.Buffer,
    B: Expr,
    S: Expr,
    rows: Expr,
    lane: Expr,
) -> None:
    """offsets and sizes, by one warp."""
    before = T.alloc_buffer((1,), "int32", scope="local")
    own = T.alloc_buffer((1,), "int32", scope="local")
    upto = T.alloc_buffer((1,), "int32", scope="local")
    part = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(before, _int32(0), [0])
    with T.serial(_tiles(B, WARP)) as turn:
        b = named(turn * WARP + lane)
        T.buffer_store(own, _int32(0), [0])
        with T.If(b < B), T.Then():
            T.buffer_store(own, rank[b, S], [0])
        T.buffer_store(upto, own[0], [0])
        for step in _LANE_STEPS:
            T.buffer_store(part, cuda.shuffle_up(upto[0], step), [0])
            T.buffer_store(upto, upto[0] + tir.Select(lane >= step, part[0], _int32(0)), [0])
        with T.If(b < B), T.Then():
            T.buffer_store(offsets, before[0] + upto[0] - own[0], [b])
        T.buffer_store(part, cuda.shuffle(upto[0], _int32(WARP - 1), WARP), [0])
        T.buffer_store(before, before[0] + part[0], [0])
    with T.If(lane == 0), T.Then():
        T.buffer_store(sizes, before[0].astype("int64"), [0])
        found = tir.Select(before[0] > 0, rows, tir.const(0, "int64"))
        T.buffer_store(sizes, found, [1])


def gather_global_rows(problem: Problem, target: Target) -> tir.PrimFunc:
    """The input's rows at global tokens, one after the other.

    x int8 [B, S, H], or its COL32 form [B, H/32, S, 32]; positions, rank, offsets from
    ``global_tokens`` -> int8 [1, B*S, H], of which the first sizes[0] rows are written.
    """
    H, col32 = problem.hidden, problem.col32
    piece = next(size for size in (16, 8, 4, 1) if H % size == 0)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather_global_rows")
        T.func_attr({"tirx.noalias": True})
        B, S = batch_and_sequence(problem)
        R = T.int64()
        x = T.arg("x", T.buffer((B, H // 32, S, 32) if col32 else (B, S, H), "int8"))
        positions = T.arg("positions", T.buffer((B, S), "int32"))
        rank = T.arg("rank", T.buffer((B, S + 1), "int32"))
        offsets = T.arg("offsets", T.buffer((B,), "int32"))
        gathered = T.arg("gathered", T.buffer((tir.const(1, "int64"), R, H), "int8"))
        blocks = T.Bind(tir.min(S, _GATHER_BLOCKS))
        with (
            T.thread_binding(B * blocks, "blockIdx.x") as block,
            T.thread_binding(_GATHER_THREADS, "threadIdx.x") as thread,
            T.sblock("gather"),
        ):
            T.reads()
            T.writes()
            b, first = named(block // blocks), named(block % blocks)
            count, offset = (named(x.astype("int64")) for x in (rank[b, S], offsets[b]))
            with T.serial(_tiles(tir.max(count - first, 0), blocks)) as turn:
                n = named(first + turn * blocks)
                s = named(positions[b, n].astype("int64"))
                with T.serial(_tiles(H // piece, _GATHER_THREADS)) as strip:
                    c = named((strip * _GATHER_THREADS + thread) * piece)
                    with T.If(c < H), T.Then():
                        source = (b, c // 32, s, c % 32) if col32 else (b, s, c)
                        target = (tir.const(0, "int64"), offset + n, c)
                        _copy(gathered, target, x, source, piece)
    return builder.get()


def batch_and_sequence(problem: Problem) -> tuple[Expr, Expr]:
    """B and S as int64; variables of the kernel's own where only the call knows them."""
    return tuple(
        tir.const(size, "int64") if isinstance(size, int) else T.int64()
        for size in (problem.batch, problem.seq)
    )


def _copy(
    target: tir.Buffer, index: tuple[Expr, ...], source: tir.Buffer, at: tuple[Expr, ...], size: int
) -> None:
    """``size`` bytes, 1 or an aligned 4, 8 or 16."""
    if size == 1:
        T.buffer_store(target, source[at], [*index])
        return
    words = T.alloc_buffer((size // 4,), "uint32", scope="local")
    registers = [words[k] for k in range(size // 4)]
    vector = "" if size == 4 else f".v{size // 4}"
    T.evaluate(T.ptx[f"ld.global{vector}.b32"](*registers, T.address_of(source[at])))
    T.evaluate(T.ptx[f"st.global{vector}.b32"](T.address_of(target[index]), *registers))


def _tiles(size: Expr | int, tile: int) -> Expr | int:
    return (size + (tile - 1)) // tile


def _int32(value: int) -> Expr:
    return tir.const(value, "int32")
