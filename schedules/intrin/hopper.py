"""Instructions of sm_90a: barriers in shared memory, bulk copies, products of four warps (wgmma).

A warpgroup is four consecutive warps, the first a multiple of four. Its products read A (64 rows)
and B from shared memory, both as rows of consecutive k, and run on while the threads do something
else. Rows of `ROW_BYTES` lie one below the other, their 16-byte chunks where `cuda.swizzle` puts
them, from a multiple of `ATOM_BYTES` on; a step of `STEP_BYTES` along k is that far along the
address. Accumulators of 64 x N: warp w holds rows 16 w to 16 w + 15, every 8 columns as the C
fragment of `cuda`. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions",
"Shared Memory Matrix Layout", "mbarrier", "Async proxy".
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from .cuda import shuffle

WARPGROUP = 128
"""Threads of a warpgroup."""
ROWS = 64
"""Rows of A in one instruction."""
COLUMNS = 128
"""The most columns of B in one instruction that `multiply_s8` uses."""
ROW_BYTES = 128
"""Of a row in shared memory: what the widest swizzle permutes."""
ATOM_BYTES = 8 * ROW_BYTES
"""Eight rows, after which the swizzle repeats; matrices start at a multiple of it."""
STEP_BYTES = 32
"""Of k in one instruction."""
BARRIER_BYTES = 8
"""Of one barrier in shared memory."""

_ADDRESS_UNIT_BITS = 4
_ADDRESS_MASK = 0x3FFFF
_SWIZZLE_128 = 1


def _u32(value: int | Expr) -> Expr:
    return tir.const(value, "uint32") if isinstance(value, int) else value.astype("uint32")


def warpgroup(thread: Expr) -> Expr:
    """Number of the thread's warpgroup, which the compiler knows to be the same in a warp."""
    return shuffle(thread.astype("int32") // WARPGROUP, tir.const(0, "int32"), 32)


# Barriers: a phase ends when all arrivals and all announced bytes are there.


def init_barrier(barrier: Expr, arrivals: int) -> None:
    """``barrier``: address of `BARRIER_BYTES`; by one thread."""
    T.evaluate(T.ptx["mbarrier.init.shared::cta.b64"](barrier, _u32(arrivals)))


def publish_barriers() -> None:
    """Before a barrier of the block, by the thread that made them: copies may complete on them.

    The first fence orders their making, the second one before what copies do to them: the PTX ISA
    has these go by way of generic memory since 9.3 only, and leaves them open before.
    """
    T.evaluate(T.ptx["fence.mbarrier_init.release.cluster"]())
    fence_shared()


def arrive_expecting(barrier: Expr, count: int | Expr) -> None:
    """Arrive, and announce ``count`` bytes of bulk copies."""
    T.evaluate(T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](barrier, _u32(count)))


def wait_barrier(barrier: Expr, phase: Expr) -> None:
    """Until phase number ``phase`` is over; to be called at most one phase late."""
    parity = _u32(phase % 2)
    over = T.alloc_buffer((1,), "uint32", scope="local")
    T.buffer_store(over, _u32(0), [0])
    with T.While(over[0] == _u32(0)):
        T.evaluate(T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](over[0], barrier, parity))


def copy_bulk(target: Expr, source: Expr, count: int, barrier: Expr) -> None:
    """``count`` consecutive bytes from global to shared memory; both aligned to 16."""
    name = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    T.evaluate(T.ptx[name](target, source, _u32(count), barrier))


def fence_shared() -> None:
    """What this thread wrote to shared memory so far is there for bulk copies and products."""
    T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())


# Products.


def descriptor(address: Expr) -> Expr:
    """Of the swizzled matrix at an address in shared memory."""
    fields = _SWIZZLE_128 << 62 | (ATOM_BYTES >> _ADDRESS_UNIT_BITS) << 32
    place = T.cuda.cvta_generic_to_shared(address) & _u32(_ADDRESS_MASK)
    return tir.const(fields, "uint64") | (place >> _u32(_ADDRESS_UNIT_BITS)).astype("uint64")


def advanced(matrix: Expr, count: int | Expr) -> Expr:
    """The descriptor ``count`` bytes further, a multiple of 16."""
    step = count >> _ADDRESS_UNIT_BITS
    return matrix + (tir.const(step, "uint64") if isinstance(step, int) else step.astype("uint64"))


def begin_products() -> None:
    """Before the first of a row of products: the registers are as the threads left them."""
    T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())


def multiply_s8(c: Sequence[Expr], a: Expr, b: Expr, accumulate: bool | Expr = True) -> None:
    """c[64, N] += a[64, 32] @ b[32, N] of int8, by descriptors, or without the sum; N / 2 registers
    of c.
    """
    name = f"wgmma.mma_async.sync.aligned.m64n{2 * len(c)}k32.s32.s8.s8"
    T.evaluate(T.ptx[name](*c, a, b, _predicate(accumulate)))


def multiply(
    dtype: str,
    c: Sequence[Expr],
    a: Expr | Sequence[Expr],
    b: Expr,
    accumulate: bool | Expr = True,
    transposed: bool = False,
) -> None:
    """c[64, N] += a[64, 16] @ b[16, N] of float16 or bfloat16 in float32, or without the sum.

    ``a`` is a descriptor, or the registers of four fragments of `cuda`, one for each warp;
    ``transposed``: b lies as rows of N, 64 of them, one row for each k.
    """
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    name = f"wgmma.mma_async.sync.aligned.m64n{2 * len(c)}k16.f32.{kind}.{kind}"
    sums = _predicate(accumulate)
    if isinstance(a, Sequence):
        T.evaluate(T.ptx[name](*c, *a, b, sums, 1, 1, int(transposed)))
    else:
        T.evaluate(T.ptx[name](*c, a, b, sums, 1, 1, 0, int(transposed)))


def _predicate(value: bool | Expr) -> Expr:
    return T.ptx.pred(tir.const(value, "bool") if isinstance(value, bool) else value)


def commit_products() -> None:
    """All products since the last commit are one group."""
    T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())


def wait_products(pending: int) -> None:
    """Until at most ``pending`` groups of the warpgroup are under way."""
    T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](pending))
