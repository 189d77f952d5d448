"""Products of warpgroups (wgmma): matrix descriptors, accumulators, what is under way.

Signatures as ptx.CALLS wants them, registers that stay in use as places, (storage.Local, index). A
product reads its operands at the issue, and its result reaches the registers when a
wait covers its group; until then they hold poison, and shared memory that it reads must not be
written. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions",
"Matrix Descriptor", "Register Fragments".
"""

import dataclasses

import ml_dtypes
import numpy as np

from . import warp_matrix
from .barriers import uniform
from .memory import POISON
from .races import WARP, SimtError
from .registers import FENCED, WORD, WRITTEN
from .storage import Local

GROUP = 4 * WARP
ROWS = 64
ROW_BYTES = 32  # of k in one instruction
TYPES = {"s8": np.int8, "u8": np.uint8, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
WIDTHS = (16, 128, 64, 32)  # bytes of a row that the swizzle mode permutes; the first: none
RESERVED = ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)


@dataclasses.dataclass
class Result:
    """A register in flight: by thread its value, and its group, -1 for none."""

    view: Local
    index: int
    value: np.ndarray
    group: np.ndarray


class Products:
    """What the warpgroups of a block have under way."""

    def __init__(self, threads):
        self.committed = np.zeros(threads, np.int64)  # groups, by thread
        self.results = {}  # (watch of the registers, index) -> Result
        self.reads = []  # (history, offsets, thread, group): shared memory, by first thread
        self.operands = []  # (watch, index, threads, group): registers of A

    def in_flight(self):
        return bool(self.reads) or any((r.group >= 0).any() for r in self.results.values())

    def fence(self, block):
        """What registers hold now is what products may read."""
        for view in block.env:
            if isinstance(view, Local) and view.dtype.itemsize == WORD:
                view.watch.fence(view.data.shape, block.active())

    def require_usable(self, block, view, index, threads, shape=FENCED):
        """Raise for a register that a thread or a product of another shape had since the fence."""
        watch = view.watch
        usable = watch.usable(index, threads, shape) if watch.on else np.zeros(len(threads), bool)
        if usable.all():
            return
        written = not watch.on or watch.state[index][threads[usable.argmin()]] == WRITTEN
        had = "written" if written else "used by wgmma of another shape"
        raise SimtError(
            f"wgmma with register {index} of {view.name} {had} since the last wgmma.fence,"
            f" {block.place(int(threads[0]))}"
        )

    def accumulators(self, block, places, threads, shape):
        """uint32 [registers, threads], those in flight as they will be."""
        found = []
        for view, index in places:
            self.require_usable(block, view, index, threads, shape)
            result = self.results.get((view.watch, index))
            if result is not None and (result.group[threads] >= 0).all():
                found.append(result.value[threads])
            else:
                found.append(bits(view.data[index][threads]))
        return np.stack(found)

    def issue(self, places, threads, values, shape):
        for (view, index), value in zip(places, values):
            key = view.watch, index
            if key not in self.results:
                size = len(self.committed)
                group = np.full(size, -1, np.int64)
                self.results[key] = Result(view, index, np.zeros(size, np.uint32), group)
            result = self.results[key]
            result.value[threads] = value
            result.group[threads] = self.committed[threads]
            bits(view.data[index])[threads] = poison()
            view.watch.state[index, threads] = shape
            view.watch.result[index, threads] = True

    def read(self, block, region, offsets, threads):
        region.history.read_by_products(block, offsets, threads)
        self.reads.append((region.history, offsets, threads[0], self.committed[threads[0]]))

    def commit(self, block):
        self.committed += block.active()

    def wait(self, block, groups):
        """Land all but the last `groups` groups of the active threads."""
        done = np.where(block.active(), self.committed - groups, -1)
        for watch, index, threads, group in self.operands:
            if group < done[threads[0]]:
                watch.operands[index, threads] -= 1
        self.operands = [entry for entry in self.operands if entry[3] >= done[entry[2][0]]]
        for (watch, index), result in self.results.items():
            landed = (result.group >= 0) & (result.group < done)
            bits(result.view.data[index])[landed] = result.value[landed]
            watch.result[index, landed] = False
            result.group[landed] = -1
        self.results = {key: r for key, r in self.results.items() if (r.group >= 0).any()}
        for history, offsets, thread, group in self.reads:
            if group < done[thread]:
                history.read_by_products_done(block, offsets)
        self.reads = [entry for entry in self.reads if entry[3] >= done[entry[2]]]


def bits(values):
    return values.view(np.uint32)


def poison():
    return np.full(4, POISON, np.uint8).view(np.uint32)[0]


def fence(block, mods):
    warpgroups(block, "wgmma.fence")
    block.products.fence(block)


def commit_group(block, mods):
    warpgroups(block, "wgmma.commit_group")
    block.products.commit(block)


def wait_group(block, mods, group):
    warpgroups(block, "wgmma.wait_group")
    block.products.wait(block, group)


def warpgroups(block, what):
    """Threads [n, 128] of the active warpgroups, of which all must be here."""
    if block.threads % GROUP:
        raise SimtError(f"{what} in a block of {block.threads} threads: no whole warpgroups")
    by_group = block.active().reshape(-1, GROUP)
    if (by_group.any(1) != by_group.all(1)).any():
        raise SimtError(f"{what} reached by a part of a warpgroup, {block.place()}")
    return block.lane.reshape(-1, GROUP)[by_group.all(1)]


def mma(block, mods, d, b_desc, scale_d, a_desc=None, a=None, **immediates):
    """D = A B + D of 64 rows, or A B where scale_d is false; A from shared memory or registers."""
    if any(immediates.pop(f"scale_{x}", 1) != 1 for x in "ab") or mods.get("satfinite"):
        raise NotImplementedError("wgmma that negates or saturates")
    a_type, b_type = (np.dtype(TYPES[mods[x]]) for x in ("atype", "btype"))
    whole = a_type.itemsize == 1
    exact = np.float64 if whole else np.float32  # for the products
    n, k = map(int, mods["shape"].split("n")[1].split("k"))
    shape = n << 8 | k
    products = block.products
    for threads in warpgroups(block, "wgmma"):
        accumulators = products.accumulators(block, d, threads, shape)
        if a_desc is not None:
            left = operand(block, a_desc, ROWS, threads, a_type, immediates.get("trans_a", 0))
        else:
            left = registers(block, a, threads, a_type)
        right = operand(block, b_desc, n, threads, b_type, immediates.get("trans_b", 0))
        held = accumulators.view(np.int32 if whole else np.float32)
        total = np.matmul(left.astype(exact), right.T.astype(exact)).astype(held.dtype)
        if uniform(block, scale_d[0], "wgmma"):
            total = total + gathered(held)
        products.issue(d, threads, bits(scattered(total)), shape)


def gathered(values):
    """[64, N] from registers [N / 2, 128]: thread 32 w + 4 g + t holds in register 4 j + 2 h + e
    row 16 w + g + 8 h, column 8 j + 2 t + e."""
    split = values.reshape(-1, 2, 2, 4, 8, 4)
    return split.transpose(3, 1, 4, 0, 5, 2).reshape(ROWS, -1)


def scattered(matrix):
    """The opposite of gathered."""
    split = matrix.reshape(4, 2, 8, -1, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(split).reshape(-1, GROUP)


def registers(block, a, threads, dtype):
    """[64, K] from the A fragments of four warps."""
    values = []
    for view, index in a:
        block.products.require_usable(block, view, index, threads)
        if view.watch.result[index][threads].any():
            raise SimtError(
                f"register {index} of {view.name} read while wgmma writes it,"
                f" {block.place(int(threads[0]))}"
            )
        view.watch.operands[index, threads] += 1
        group = block.products.committed[threads[0]]
        block.products.operands.append((view.watch, index, threads, group))
        values.append(view.data[index][threads].copy())
    return warp_matrix.fragment_a(values, dtype).reshape(ROWS, -1)


def operand(block, descriptor, rows, threads, dtype, transposed):
    """[rows, K] of shared memory; transposed: stored by k, rows one after the other."""
    lanes = block.lanes_of(descriptor[0])[threads]
    if (lanes != lanes[0]).any():
        raise SimtError(f"wgmma with different descriptors, {block.place(int(threads[0]))}")
    places = addresses(int(lanes[0]), rows, dtype.itemsize, transposed)
    region = block.pointer(int(places.min())).region
    places = places - region.base
    if places.min() < 0 or places.max() >= len(region.data):
        raise SimtError(f"wgmma outside {region.describe(places.max())}, {block.place()}")
    block.products.read(block, region, places.reshape(-1), threads)
    data = np.ascontiguousarray(region.data[places]).view(dtype)  # [rows or K, ...]
    return data.T if transposed else data


def addresses(descriptor, rows, item, transposed):
    """Shared addresses of a matrix's bytes: [rows, 32], or transposed [32 / item, rows * item]."""
    if descriptor & RESERVED or descriptor >> 49 & 7:
        raise SimtError(f"matrix descriptor {descriptor:#018x} with reserved bits or base offset")
    start, leading, stride = ((descriptor >> first & 0x3FFF) << 4 for first in (0, 16, 32))
    width = WIDTHS[descriptor >> 62]
    if transposed:
        if width != 128 or item != 2:
            raise NotImplementedError("transposed wgmma operands other than 2 bytes in rows of 128")
        k, byte = np.ogrid[: ROW_BYTES // item, : rows * item]
        if start % (8 * width):
            raise SimtError(f"matrix at {start:#x}, not at a multiple of {8 * width}")
        place = start + byte // 128 * leading + byte % 128 + k % 8 * 128 + k // 8 * stride
    else:
        row, byte = np.ogrid[:rows, :ROW_BYTES]
        if width == 16:
            return start + row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
        if start % (8 * width) > width - ROW_BYTES:
            raise SimtError(f"matrix at {start:#x}, not in the first row of {8 * width} bytes")
        place = start + row // 8 * stride + row % 8 * width + byte
    return place ^ (place >> 7 & (width // 16 - 1)) << 4
