"""Global tokens for CPUs: where they are, and the input's rows there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem


def global_tokens(problem: Problem, target: Target) -> PrimFunc:
    """Where the global tokens are.

    flags int32 [B, S]
    -> positions int32 [B, S]: ascending in each row, of which the first rank[b, S] are written;
    rank int32 [B, S + 1]: global tokens before a position; offsets int32 [B]: global tokens of
    the batch entries before b; sizes int64 [2]: global tokens of all entries, and the rows of a
    matrix of the input (S of COL32, else B*S), or 0 where there are no global tokens.
    """

    col32 = problem.col32

    @T.prim_func(s_tir=True, private=True)
    def global_tokens(
        flags: T.handle, positions: T.handle, rank: T.handle, offsets: T.handle, sizes: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        Flags = T.match_buffer(flags, (B, S), "int32")
        Positions = T.match_buffer(positions, (B, S), "int32")
        Rank = T.match_buffer(rank, (B, S + 1), "int32")
        Offsets = T.match_buffer(offsets, (B,), "int32")
        Sizes = T.match_buffer(sizes, (2,), "int64")
        with T.sblock("root"):
            for b in T.parallel(B):
                count = T.alloc_buffer((1,), "int32", scope="local")
                count[0] = 0
                for s in range(S):
                    Rank[b, s] = count[0]
                    if Flags[b, s] != 0:
                        Positions[b, T.Cast("int64", count[0])] = T.Cast("int32", s)
                        count[0] = count[0] + 1
                Rank[b, S] = count[0]
            Sizes[0] = T.int64(0)
            for b in range(B):
                Offsets[b] = T.Cast("int32", Sizes[0])
                Sizes[0] = Sizes[0] + T.Cast("int64", Rank[b, S])
            Sizes[1] = T.Select(Sizes[0] > T.int64(0), S if col32 else B * S, T.int64(0))

    return global_tokens


def gather_global_rows(problem: Problem, target: Target) -> PrimFunc:
    """The input's rows at global tokens, one after the other.

    x int8 [B, S, H], or its COL32 form [B, H/32, S, 32]; positions, rank, offsets from
    ``global_tokens`` -> int8 [1, sizes[0], H].
    """
    H, col32 = problem.num_heads * problem.head_size, problem.col32

    def at(b, s, c):
        return (b, c // 32, s, c % 32) if col32 else (b, s, c)

    @T.prim_func(s_tir=True, private=True)
    def gather_global_rows(
        x: T.handle, positions: T.handle, rank: T.handle, offsets: T.handle, gathered: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S, G = T.int64(), T.int64(), T.int64()
        X = T.match_buffer(x, (B, H // 32, S, 32) if col32 else (B, S, H), "int8")
        Positions = T.match_buffer(positions, (B, S), "int32")
        Rank = T.match_buffer(rank, (B, S + 1), "int32")
        Offsets = T.match_buffer(offsets, (B,), "int32")
        Gathered = T.match_buffer(gathered, (1, G, H), "int8")
        with T.sblock("root"):
            for task in T.parallel(B * S):
                b: T.int64 = task // S
                n: T.int64 = task % S
                if n < T.Cast("int64", Rank[b, S]):
                    for c in range(H):
                        Gathered[0, Offsets[b] + n, c] = X[
                            at(b, T.Cast("int64", Positions[b, n]), c)
                        ]

    return gather_global_rows
