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
from math import lcm
from typing import TYPE_CHECKING

from tvm import relax, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from ...relay_ops.orders import Order
from ...runtime.errors import UnsupportedError
from ..parameters import parameters
from . import arch as archs
from . import gemm
from .arch import Arch
from .attention_place import named
from .gemm_config import GemmConfig
from .override import overridden

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

_PARTS = (8, 4, 2)
_THREADS = 256
_SUM_BYTES = 8
"""A sum of a part is written and read, int32."""


@dataclass(frozen=True)
class SplitConfig:
    """Among how many blocks the K of a tile is divided; 1: not at all."""

    parts: int = 1

    def __post_init__(self) -> None:
        """``UnsupportedError``, a `ValueError`, for fewer than one."""
        if self.parts < 1:
            raise UnsupportedError(f"{self}: found parts {self.parts}, allowed 1 or more")

    def require_fit(self, problem: Problem, config: GemmConfig) -> None:
        """``UnsupportedError`` unless the K of ``problem`` can be divided so."""
        if reason := _undivided(problem):
            raise UnsupportedError(f"{self}: {reason}")
        unit = self.parts * _unit(problem, config)
        if problem.k % unit:
            raise UnsupportedError(
                f"{self}: found K = {problem.k}, allowed multiples of {unit}: parts of whole steps "
                f"of block_k {config.block_k}" + ", in whole panels" * bool(problem.b_panels)
            )


def build(problem: Problem, target: Target) -> PrimFunc:
    """The kernel ``int8_matmul``: buffers a, b, the operands and y."""
    arch = archs.of(target)
    configs = gemm.chosen(problem, arch)
    (config, *others) = configs.values()
    split = overridden(SplitConfig() if others else choose(problem, config, arch))
    if split.parts == 1:
        return gemm.emit(problem, configs, arch)
    return emit(problem, config, split, arch)


def choose(problem: Problem, config: GemmConfig, arch: Arch) -> SplitConfig:
    """The most parts that two blocks a multiprocessor have room for, where one part leaves half of
    them idle; and the sums must not cost more than the weights.
    """
    p = problem
    if _undivided(p):
        return SplitConfig()
    blocks = p.batch * -(-p.m // config.block_m) * -(-p.n // config.block_n)
    if 2 * blocks > arch.multiprocessors:
        return SplitConfig()
    fitting = (
        parts
        for parts in _PARTS
        if p.k % (parts * _unit(p, config)) == 0
        and parts * blocks <= 2 * arch.multiprocessors
        and parts * p.m * _SUM_BYTES <= p.k
    )
    return SplitConfig(next(fitting, 1))


def _undivided(problem: Problem) -> str:
    """Why the K of a problem stays whole, whatever its size; empty: it need not."""
    p = problem
    if not (isinstance(p.m, int) and isinstance(p.batch, int)):
        return f"found rows {p.m} of batch {p.batch}, allowed sizes known at compile time"
    if p.live_rows is not None:
        return "found rows that only the device counts, allowed all rows"
    matrices, *_ = p.b.shape
    matrices = int(matrices) if isinstance(matrices, tirx.IntImm) else str(matrices)
    if matrices != 1:
        return f"found {matrices} matrices b, allowed one"
    return ""


def _unit(problem: Problem, config: GemmConfig) -> int:
    """What the K of a part is a multiple of: whole steps, and whole panels of b."""
    return lcm(config.block_k, problem.b_panels.row_bytes if problem.b_panels else 1)


def emit(problem: Problem, config: GemmConfig, split: SplitConfig, arch: Arch) -> PrimFunc:
    """The same with the given configurations."""
    p, parts = problem, split.parts
    split.require_fit(p, config)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("int8_gemm_split")
        T.func_attr({"tirx.noalias": True})
        a, b, *operands, y = parameters(p)
        sums = T.alloc_buffer((p.batch * parts, p.m, p.n), "int32")
        part = _of_a_part(p, parts)
        gemm.launch(part, config, arch, [a, _PartsOfK(b, int(part.b.shape[2])), sums])
        _add(p, parts, sums, operands, y)
    return builder.get()


def _of_a_part(p: Problem, parts: int) -> Problem:
    """Entry z of its batch is part z % parts of entry z // parts, without the epilogue."""
    k = p.k // parts
    _, along_n, along_k, *panel = map(int, p.b.shape)

    def a_entry(a: tirx.Buffer, z: Expr, row: Expr, depth: Expr) -> Expr:
        return p.a_entry(a, p.a_batch(z // parts), row, z % parts * k + depth)

    return replace(
        p,
        batch=p.batch * parts,
        k=k,
        a_entry=a_entry,
        a_batch=lambda z: z,
        b=relax.TensorType((parts, along_n, along_k // parts, *panel), "int8"),
        b_batch=lambda z: z % parts,
        operands=(),
        y=relax.TensorType((p.batch * parts, p.m, p.n), "int32"),
        order=Order.ROW,
        epilogue=lambda acc, at: acc,
    )


@dataclass(frozen=True)
class _PartsOfK:
    """Parts of the one matrix in ``buffer``, as [part, n, k], or in panels [part, n, k, ..]."""

    buffer: tirx.Buffer
    size: int
    """Of a part along the axis of K."""

    def __getitem__(self, index: tuple[Expr, ...]) -> Expr:
        part, n, k, *inside = index
        return self.buffer[(0, n, part * self.size + k, *inside)]


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
