"""The int8 matrix product with K divided among blocks, for results so small that the tiles of them
leave most of a GPU without work.

    for part of K, tile in blocks:              `gemm`, on a part of both operands
        int32 sums of the part                  global memory
    for entry in blocks of threads:
        the sums of all parts, epilogue, y

Integer sums: the result is that of one block for every tile, to the bit, in whatever order the
parts end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm import relax, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from . import arch as archs
from . import gemm
from .arch import Arch
from .attention_place import named
from .gemm_config import GemmConfig, configure
from .override import overridden

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

_MULTIPROCESSORS = 108
"""Of an A100."""
_PARTS = (8, 4, 2)
_THREADS = 256
_SUM_BYTES = 8
"""A sum of a part is written and read, int32."""


@dataclass(frozen=True)
class SplitConfig:
    """Among how many blocks the K of a tile is divided; 1: not at all."""

    parts: int = 1


def build(problem: Problem, target: Target) -> PrimFunc:
    """The kernel ``int8_matmul``: buffers a, b, the operands and y."""
    arch = archs.of(target)
    (config, *others) = configure(problem, arch).values()
    split = SplitConfig() if others else overridden(choose(problem, config))
    if split.parts == 1:
        return gemm.build(problem, target)
    return emit(problem, overridden(config), split, arch)


def choose(problem: Problem, config: GemmConfig) -> SplitConfig:
    """The most parts that two blocks a multiprocessor have room for, where one part leaves half of
    them idle; and the sums must not cost more than the weights.
    """
    p = problem
    if not _can_split(p) or config.warps_k == 1:
        return SplitConfig()
    blocks = p.batch * -(-p.m // config.block_m) * -(-p.n // config.block_n)
    if 2 * blocks > _MULTIPROCESSORS:
        return SplitConfig()
    fitting = (
        parts
        for parts in _PARTS
        if p.k % (parts * config.block_k) == 0
        and parts * blocks <= 2 * _MULTIPROCESSORS
        and parts * p.m * _SUM_BYTES <= p.k
    )
    return SplitConfig(next(fitting, 1))


def _can_split(problem: Problem) -> bool:
    """Whether sizes are known, all rows are read, and b is one matrix of unpadded rows."""
    p = problem
    if not (isinstance(p.m, int) and isinstance(p.batch, int)) or p.live_rows is not None:
        return False
    stored = [int(size) if isinstance(size, tirx.IntImm) else None for size in p.b.shape]
    return stored == [1, p.n, p.k]


def emit(problem: Problem, config: GemmConfig, split: SplitConfig, arch: Arch) -> PrimFunc:
    """The same with the given configurations; K must be whole steps of every part."""
    p, parts = problem, split.parts
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("int8_gemm_split")
        T.func_attr({"tirx.noalias": True})
        types = {"a": p.a, "b": p.b}
        types |= {f"operand{i}": type_ for i, type_ in enumerate(p.operands)}
        types["y"] = p.y
        a, b, *operands, y = (
            T.arg(name, T.buffer([*type_.shape], str(type_.dtype))) for name, type_ in types.items()
        )
        sums = T.alloc_buffer((p.batch * parts, p.m, p.n), "int32")
        gemm.launch(_of_a_part(p, parts), config, arch, [a, _PartsOfK(b, p.k // parts), sums])
        _add(p, parts, sums, operands, y)
    return builder.get()


def _of_a_part(p: Problem, parts: int) -> Problem:
    """Entry z of its batch is part z % parts of entry z // parts, without the epilogue."""
    k = p.k // parts

    def a_entry(a: tirx.Buffer, z: Expr, row: Expr, depth: Expr) -> Expr:
        return p.a_entry(a, p.a_batch(z // parts), row, z % parts * k + depth)

    return replace(
        p,
        batch=p.batch * parts,
        k=k,
        a_entry=a_entry,
        a_batch=lambda z: z,
        b=relax.TensorType((parts, p.n, k), "int8"),
        b_batch=lambda z: z % parts,
        operands=(),
        y=relax.TensorType((p.batch * parts, p.m, p.n), "int32"),
        order=type(p.order).ROW,
        epilogue=lambda acc, at: acc,
    )


@dataclass(frozen=True)
class _PartsOfK:
    """Parts of the one matrix in ``buffer``, as [part, n, k]."""

    buffer: tirx.Buffer
    size: int

    def __getitem__(self, index: tuple[Expr, Expr, Expr]) -> Expr:
        part, n, k = index
        return self.buffer[0, n, part * self.size + k]


def _add(p: Problem, parts: int, sums: tirx.Buffer, operands: list, y: tirx.Buffer) -> None:
    """y from the sums of all parts; a thread for each entry."""
    entries = p.batch * p.m * p.n
    with (
        T.thread_binding(-(-entries // _THREADS), thread="blockIdx.x") as block,
        T.thread_binding(_THREADS, thread="threadIdx.x") as thread,
        T.sblock("add"),
    ):
        T.reads()
        T.writes()
        entry = named((block * _THREADS + thread).astype("int64"))
        with T.If(entry < entries), T.Then():
            row, col = named(entry // p.n % p.m), named(entry % p.n)
            z = named(entry // (p.m * p.n))
            acc = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(acc, sums[z * parts, row, col], [0])
            for part in range(1, parts):
                T.buffer_store(acc, acc[0] + sums[z * parts + part, row, col], [0])
            value = gemm.rounded_apart(p.epilogue(acc[0], p.at(z, row, col), *operands))
            T.buffer_store(y, value, p.y_index(z, row, col))
