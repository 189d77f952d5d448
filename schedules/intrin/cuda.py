"""Warp instructions of NVIDIA GPUs for half-width matrix products, and who holds which element.

A lane is 4 * g + t. Fragments of m16n8k16 (float16, bfloat16; float32 accumulators), each register
two neighbouring elements:

    A 16 x 16   four registers   rows g, g + 8      columns 2t, 2t + 1 (+ 8 in the last two)
    B 16 x 8    two registers    rows 2t, 2t + 1 (+ 8 in the second)    column g
    C 16 x 8    four floats      rows g, g, g + 8, g + 8    columns 2t, 2t + 1, 2t, 2t + 1

So the accumulators of two neighbouring C tiles, in pairs, are the A fragment of a product that
follows. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16", "ldmatrix".
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

CHUNK_BYTES = 16
"""One row of an 8 x 8 matrix of ``ldmatrix``; the widest copy."""

_ALL_LANES = 0xFFFFFFFF


def accumulator_row(lane: Expr, half: int) -> Expr:
    """Row of C in a lane: elements 0, 1 (``half`` 0) or 2, 3 (``half`` 1)."""
    return lane // 4 + 8 * half


def accumulator_column(lane: Expr, element: int) -> Expr:
    """Column of C in a lane, ``element`` 0 or 1 of a half."""
    return lane % 4 * 2 + element


def a_chunk(lane: Expr) -> tuple[Expr, Expr]:
    """(row, chunk) of the 16 x 16 tile that a lane names for ``ldmatrix`` to get an A fragment."""
    return lane % 16, lane // 16


def b_chunk(lane: Expr) -> tuple[Expr, Expr]:
    """The same in a 16 x 16 tile of [n][k]: B fragments of columns n 0-7, then of 8-15."""
    return lane % 8 + lane // 16 * 8, lane // 8 % 2


def b_chunk_transposed(lane: Expr) -> tuple[Expr, Expr]:
    """The same in a 16 x 16 tile of [k][n], for the transposing ``ldmatrix``."""
    return lane % 16, lane // 16


def swizzle(row: Expr, chunk: Expr | int, chunks: int) -> Expr | int:
    """Where in its row of ``chunks`` a chunk of shared memory lies: the same chunk of eight
    consecutive rows, and eight chunks of a row, lie in different banks.
    """
    bits = min(3, (chunks & -chunks).bit_length() - 1)
    if not bits:  # an odd row length moves through the banks by itself
        return chunk
    turn = (row >> (3 - bits)) if bits < 3 else row
    return chunk ^ (turn & ((1 << bits) - 1))


def ldmatrix(registers: Sequence[Expr], address: Expr, transpose: bool = False) -> None:
    """Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8."""
    form = "x4.trans" if transpose else "x4"
    T.evaluate(T.ptx[f"ldmatrix.sync.aligned.m8n8.{form}.shared.b16"](*registers, address))


def mma(dtype: str, k: int, c: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """c[16, 8] += a[16, 16] @ b[16, 8]; with instructions of half the depth where ``k`` is 8."""
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    name = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
    step = k // 8
    for first in range(0, 2, step):
        part = (*a[2 * first : 2 * (first + step)], *b[first : first + step])
        T.evaluate(T.ptx[name](*c, *part, *c))


def mma_s8(k: int, c: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """c[16, 8] += a[16, 32] @ b[32, 8] of int8; in four instructions where ``k`` is 16, not 32.

    The fragments are those of 16-bit products with four bytes in the place of two elements.
    """
    if k == 32:
        T.evaluate(T.ptx["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"](*c, *a, *b, *c))
        return
    for part in range(2):
        for top in range(2):
            d = c[2 * top : 2 * top + 2]
            T.evaluate(
                T.ptx["mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32"](
                    *d, a[2 * part + top], b[part], *d
                )
            )


def pack_pair(
    target: tir.Buffer, index: int, low: Expr, high: Expr, dtype: str, one_instruction: bool
) -> None:
    """Round two floats to ``dtype`` into a uint32 register; ``one_instruction`` from sm_80 on."""
    if one_instruction:
        kind = {"float16": "f16x2", "bfloat16": "bf16x2"}[dtype]
        T.evaluate(T.ptx[f"cvt.rn.{kind}.f32"](target[index], high, low))
        return
    bits = [T.reinterpret("uint16", x.astype(dtype)).astype("uint32") for x in (low, high)]
    T.buffer_store(target, bits[0] | bits[1] << tir.const(16, "uint32"), [index])


def transpose_bytes(words: tir.Buffer, spare: tir.Buffer) -> None:
    """Byte r of word d becomes byte d of word r, of four uint32 each; ``spare`` holds four, too."""

    def permute(target: Expr, low: Expr, high: Expr, select: int) -> None:
        T.evaluate(T.ptx["prmt.b32"](target, low, high, tir.const(select, "uint32")))

    for pair in range(2):
        low, high = words[2 * pair], words[2 * pair + 1]
        permute(spare[pair], low, high, 0x5140)  # bytes 0 and 1 of both, in turns
        permute(spare[2 + pair], low, high, 0x7362)  # bytes 2 and 3
    for half in range(2):
        low, high = spare[2 * half], spare[2 * half + 1]
        permute(words[2 * half], low, high, 0x5410)
        permute(words[2 * half + 1], low, high, 0x7632)


def exp2(target: Expr, x: Expr) -> None:
    """2**x to two units in the last place, minus infinity to 0."""
    T.evaluate(T.ptx["ex2.approx.ftz.f32"](target, x))


def load_shared(registers: Sequence[Expr], address: Expr) -> None:
    """1, 2 or 4 consecutive floats.

    As an instruction, since TVM puts a barrier between every store and load of shared memory that
    it sees, where the kernel's own are enough.
    """
    T.evaluate(T.ptx[f"ld.shared{_vector(registers)}.f32"](*registers, address))


def store_shared(address: Expr, values: Sequence[Expr]) -> None:
    """1, 2 or 4 consecutive floats."""
    T.evaluate(T.ptx[f"st.shared{_vector(values)}.f32"](address, *values))


def _vector(values: Sequence[Expr]) -> str:
    return f".v{len(values)}" if len(values) > 1 else ""


def copy_register(target: Expr, x: Expr) -> None:
    """``x``, which the compiler takes for a new value: nothing that depends on it leaves a loop."""
    T.evaluate(T.ptx["mov.b32"](target, x))


def copy_async(target: Expr, source: Expr, size: int, valid: Expr) -> None:
    """``size`` (4, 8 or 16) bytes from global to shared memory, zeros where ``valid`` is false."""
    kind = "cg" if size == CHUNK_BYTES else "ca"
    filled = tir.Select(valid, tir.const(size, "uint32"), tir.const(0, "uint32"))
    T.evaluate(T.ptx[f"cp.async.{kind}.shared.global"](target, source, size, filled))


def commit_copies() -> None:
    T.evaluate(T.ptx["cp.async.commit_group"]())


def wait_copies(pending: int) -> None:
    """Until at most ``pending`` of this thread's groups of copies are under way."""
    T.evaluate(T.ptx["cp.async.wait_group"](pending))


def shuffle_xor(x: Expr, mask: int) -> Expr:
    """``x`` of the lane whose number differs by ``mask``."""
    return T.cuda.__shfl_xor_sync(tir.const(_ALL_LANES, "uint32"), x, mask, 32)


def shuffle_up(x: Expr, delta: int) -> Expr:
    """``x`` of the lane ``delta`` below; the own one in the lowest lanes."""
    return T.cuda.__shfl_up_sync(tir.const(_ALL_LANES, "uint32"), x, delta, 32)


def shuffle(x: Expr, lane: Expr, width: int) -> Expr:
    """``x`` of lane ``lane`` of each group of ``width`` lanes."""
    return T.cuda.__shfl_sync(tir.const(_ALL_LANES, "uint32"), x, lane, width)
