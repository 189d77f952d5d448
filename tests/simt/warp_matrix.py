"""Matrix instructions of a warp: ldmatrix, stmatrix, mma; which lane holds which element.

Signatures as ptx.CALLS wants them. Source: PTX ISA, "Matrix Fragments for mma", "ldmatrix".
"""

import ml_dtypes
import numpy as np

from .races import WARP

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
    rows = CollectiveRows(block, p, count, some)
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
    CollectiveRows(block, p, count, some).write(block, data.reshape(-1, 16))


def movmatrix(block, mods, a):
    """The transpose of an 8 x 8 matrix, row l / 4 and columns 2 (l % 4) + {0, 1} in a lane."""
    block.active_warps("movmatrix")
    matrix = np.ascontiguousarray(a[0]).view(np.uint16).reshape(-1, 8, 8)
    return [np.ascontiguousarray(matrix.swapaxes(1, 2)).view(U32).reshape(-1)]


class CollectiveRows:
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
    """[warps, 8 or 16, 8]: registers 2i + {0, 1} hold row l / 4 + 8i, columns 2(l % 4) + {0, 1}."""
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
