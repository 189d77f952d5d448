"""PTX instructions on memory: copies, loads, stores, atomics, barriers.

Signatures as ptx.CALLS wants them.
"""

import operator

import ml_dtypes
import numpy as np

from .memory import Shared
from .races import SimtError

TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64,
}  # fmt: skip


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


def in_space(pointer, mods):
    """The pointer, if it points where the instruction says."""
    space = mods.get("space")
    if space and space.startswith("shared") != isinstance(pointer.region, Shared):
        raise SimtError(f"{space} access through a pointer into {pointer.region.name}")
    return pointer


def ld(block, mods, addr, **hints):
    """One to eight neighbouring elements, aligned to all of them."""
    dtype, count = np.dtype(TYPES[mods["type"]]), int((mods.get("vec") or "v1")[1:])
    data = in_space(addr, mods).read(block, dtype.itemsize * count)
    return list(np.ascontiguousarray(data).view(dtype).T)


def st(block, mods, addr, value, **hints):
    dtype = np.dtype(TYPES[mods["type"]])
    parts = [low_bits(v, dtype).view(np.uint8).reshape(-1, dtype.itemsize) for v in value]
    in_space(addr, mods).write(block, np.concatenate(parts, axis=1))


def low_bits(register, dtype):
    """The low bits of a register."""
    raw = np.ascontiguousarray(register).view(np.uint8).reshape(len(register), -1)
    return np.ascontiguousarray(raw[:, : dtype.itemsize]).view(dtype).reshape(-1)


OPERATIONS = {
    "add": operator.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
    "inc": lambda old, new: np.where(old >= new, 0, old + 1).astype(old.dtype),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype),
}


def atomic(block, pointer, dtype, update):
    """Threads one after another, lowest first: old = [p]; [p] = update(old, thread)."""
    dtype = np.dtype(dtype)
    pointer.require_aligned(block, dtype.itemsize)
    active, at = block.checked(pointer.region, block.lanes_of(pointer.offset), dtype.itemsize)
    pointer.region.note(block, at, dtype.itemsize, "atomic")
    cells, old = pointer.region.by(dtype.itemsize), np.zeros(block.threads, dtype)
    for thread in np.flatnonzero(active):
        cell = cells[at[thread] // dtype.itemsize].view(dtype)
        old[thread] = cell[0]
        cell[:] = update(cell, thread)
    return old


def atom(block, mods, addr, value, **unused):
    dtype, operation = TYPES[mods["type"]], OPERATIONS[mods["op"]]
    operand = value[0].view(dtype)
    old = atomic(block, in_space(addr, mods), dtype, lambda cell, t: operation(cell, operand[t]))
    return [old]


def red(block, mods, addr, value, **unused):
    atom(block, mods, addr, value)


def atom_cas(block, mods, addr, compare, value):
    dtype = TYPES[mods["type"]]
    compare, value = compare[0].view(dtype), value[0].view(dtype)
    swap = lambda cell, t: value[t] if cell[0] == compare[t] else cell  # noqa: E731
    return [atomic(block, in_space(addr, mods), dtype, swap)]


def bar_sync(block, mods, a, b=None):
    if b is None:
        block.barrier("bar.sync")
    else:
        block.named_barrier("bar.sync", int(b[0][block.active().argmax()]))


def barrier_wide(combine):
    """bar.red over all threads: the votes of all, to all."""

    def call(block, mods, a, c):
        block.barrier("bar.red")
        result = combine(c[0] != 0)
        return [np.full(block.threads, result, np.uint32)]

    return call


def nothing(block, mods, **operands):
    """Fences and hints: lock step orders all memory accesses anyway."""
