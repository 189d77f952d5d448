"""PTX instructions by lane, after the PTX ISA.

A function takes the block, the modifiers (dict of slot to token) and the operands by the names of
TVM's instruction table: registers as lists of arrays [threads], addresses as pointers,
immediates as ints. It returns the destinations in order. CALLS lists them by table entry.
"""

import ml_dtypes
import numpy as np

from .block import WARP
from .memory import SimtError

U32 = np.uint32


def rows_of(registers, dtype):
    """Registers as elements [warps, 32 lanes, registers, elements of a register]."""
    stacked = np.stack([np.ascontiguousarray(r).view(U32) for r in registers], axis=1)
    return stacked.view(dtype).reshape(-1, WARP, len(registers), 4 // np.dtype(dtype).itemsize)


def ldmatrix(block, mods, p):
    """Lane 8i + r gives the row r of matrix i; lane l gets elements 2(l % 4) + {0, 1} of row l / 4
    (transposed: of column l / 4)."""
    some = block.active_warps("ldmatrix")
    count = {"x1": 1, "x2": 2, "x4": 4}[mods["num"]]
    rows = collective_rows(block, p, count, some)
    data = rows.read(block)  # uint8 [threads, 16]
    matrices = data.view(np.uint16).reshape(-1, WARP, 8)[:, : 8 * count]
    matrices = matrices.reshape(-1, count, 8, 8)  # [warps, matrices, rows, columns]
    if mods["trans"]:
        matrices = matrices.swapaxes(2, 3)
    words = np.ascontiguousarray(matrices).view(U32)  # [warps, matrices, 8, 4]
    return [words[:, i].reshape(-1) for i in range(count)]


def stmatrix(block, mods, p, r):
    """The opposite of ldmatrix."""
    some = block.active_warps("stmatrix")
    count = {"x1": 1, "x2": 2, "x4": 4}[mods["num"]]
    words = np.stack([x.view(U32).reshape(-1, 8, 4) for x in map(np.ascontiguousarray, r)], axis=1)
    matrices = words.view(np.uint16)  # [warps, matrices, 8, 8]
    if mods["trans"]:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    data = np.zeros((len(some), WARP, 16), np.uint8)
    data[:, : 8 * count] = matrices.view(np.uint8).reshape(-1, 8 * count, 16)
    collective_rows(block, p, count, some).write(block, data.reshape(-1, 16))


class collective_rows:
    """The 16-byte rows whose addresses the first 8 * count lanes of each active warp hold."""

    def __init__(self, block, pointer, count, some):
        self.pointer = pointer
        self.mask = np.repeat(some, WARP) & (block.lane % WARP < 8 * count)

    def read(self, block):
        return self.during(block, lambda: self.pointer.read(block, 16))

    def write(self, block, data):
        self.during(block, lambda: self.pointer.write(block, data))

    def during(self, block, access):
        saved, block.mask = block.mask, self.mask
        try:
            return access()
        finally:
            block.mask = saved


def fragment_a(registers, dtype):
    """[warps, 8 or 16, K]: register r holds rows l / 4 + 8 (r % 2), columns K / 2 or K (r / 2);
    with one or two registers of 8-row shapes, all rows are l / 4."""
    rows = rows_of(registers, dtype)
    warps, _, count, width = rows.shape
    lanes = rows.reshape(warps, 8, 4, count, width)  # [warps, row, column group, register, element]
    if count == 1:
        return lanes.reshape(warps, 8, 4 * width)
    lanes = lanes.reshape(warps, 8, 4, count // 2, 2, width)
    return lanes.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, count // 2 * 4 * width)


def fragment_b(registers, dtype):
    """[warps, K, 8]: register r holds rows of K / registers at r, column l / 4."""
    rows = rows_of(registers, dtype)
    warps, _, count, width = rows.shape
    lanes = rows.reshape(warps, 8, 4, count, width)
    return lanes.transpose(0, 3, 2, 4, 1).reshape(warps, count * 4 * width, 8)


def fragment_c(registers):
    """[warps, 8 or 16, 8]: registers 2i + {0, 1} hold row l / 4 + 8 i, columns 2 (l % 4) + {0, 1}."""
    stacked = np.stack(registers, axis=1).reshape(-1, 8, 4, len(registers) // 2, 2)
    return stacked.transpose(0, 3, 1, 2, 4).reshape(-1, len(registers) // 2 * 8, 8)


def registers_d(matrix):
    """The opposite of fragment_c."""
    warps, rows, _ = matrix.shape
    split = matrix.reshape(warps, rows // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(np.ascontiguousarray(split).reshape(rows // 4, -1))


MMA_INTEGERS = {"s8": np.int8, "u8": np.uint8}
MMA_FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def mma_int(block, mods, a, b, c):
    """8-bit products in 32-bit sums; float32 products of a K of 32 are exact (2^21 at most)."""
    block.active_warps("mma")
    if mods["atype"] not in MMA_INTEGERS or mods["btype"] not in MMA_INTEGERS:
        raise NotImplementedError(f"mma of {mods['atype']} and {mods['btype']}")
    left = fragment_a(a, MMA_INTEGERS[mods["atype"]]).astype(np.float32)
    right = fragment_b(b, MMA_INTEGERS[mods["btype"]]).astype(np.float32)
    total = np.matmul(left, right).astype(np.int64) + fragment_c([x.view(np.int32) for x in c])
    if mods["satfinite"]:
        total = np.clip(total, -(1 << 31), (1 << 31) - 1)
    return registers_d(total.astype(np.int32))


def mma_float(block, mods, a, b, c):
    """Half products, exact in float32, summed in float32."""
    block.active_warps("mma")
    if mods["atype"] not in MMA_FLOATS or mods["shape"] not in ("m16n8k8", "m16n8k16"):
        raise NotImplementedError(f"mma {mods['shape']} of {mods['atype']}")
    if (mods["alayout"], mods["blayout"]) != ("row", "col"):
        raise NotImplementedError(f"mma {mods['alayout']}.{mods['blayout']}")
    dtype = MMA_FLOATS[mods["atype"]]
    left, right = fragment_a(a, dtype), fragment_b(b, dtype)
    total = np.matmul(left.astype(np.float32), right.astype(np.float32))
    return registers_d(total + fragment_c([x.view(np.float32) for x in c]))


def cp_async(block, mods, dst_mem, src_mem, cp_size, src_size=None, ignore_src=None, **hints):
    """Copies cp_size bytes; those past src_size (or all, with ignore_src) are zeros."""
    if cp_size not in ((16,) if mods["cop"] == "cg" else (4, 8, 16)):
        raise SimtError(f"cp.async.{mods['cop']} of {cp_size} bytes")
    valid = np.full(block.threads, cp_size, np.int64)
    if src_size is not None:
        valid = block.array(src_size[0], np.dtype(np.int64))
        if ((valid > cp_size) & block.active()).any():
            raise SimtError(f"cp.async with a source of more than {cp_size} bytes, {block.place()}")
    if ignore_src is not None:
        valid = np.where(block.array(ignore_src[0], np.dtype(bool)), 0, valid)
    data = np.zeros((block.threads, cp_size), np.uint8)
    saved = block.mask
    src_mem.require_aligned(block, cp_size)
    for size in np.unique(valid[block.active()]):
        block.mask = block.active() & (valid == size)
        if size:
            data[:, :size] = np.where(
                block.mask[:, None], src_mem.read(block, int(size), aligned=False), data[:, :size]
            )
        block.mask = saved
    block.copies.issue(block, dst_mem, data)


def cp_async_commit_group(block, mods):
    block.copies.commit(block)


def cp_async_wait_group(block, mods, group):
    block.copies.wait(block, group)


def cp_async_wait_all(block, mods):
    block.copies.wait(block, None)


CALLS = {
    "ldmatrix": ldmatrix,
    "stmatrix": stmatrix,
    "mma_int": mma_int,
    "mma": mma_float,
    "cp_async_ca": cp_async,
    "cp_async_cg": cp_async,
    "cp_async_ca_src_size": cp_async,
    "cp_async_cg_src_size": cp_async,
    "cp_async_ca_ignore_src": cp_async,
    "cp_async_cg_ignore_src": cp_async,
    "cp_async_commit_group": cp_async_commit_group,
    "cp_async_wait_group": cp_async_wait_group,
    "cp_async_wait_all": cp_async_wait_all,
}
