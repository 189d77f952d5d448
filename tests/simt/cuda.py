"""CUDA C and TIR device functions that TVM names as calls (`tirx.cuda.*`, warp shuffles, atomics).

A function takes the block, the dtype of its result (None for statements) and the argument values:
ints and NumPy scalars where uniform, arrays [threads] otherwise, strings, pointers.
"""

import numpy as np

from . import lane_calls, memory_calls
from .races import WARP

ALL_LANES = 0xFFFFFFFF


def cta_sync(block, dtype):
    block.barrier()


def syncthreads(combine):
    """A barrier that tells all threads what combine says of all their conditions."""

    def call(block, dtype, condition):
        block.barrier("syncthreads")
        return int(combine(block.lanes_of(condition) != 0))

    return call


def storage_sync(block, dtype, scope):
    if scope in ("shared", "shared.dyn"):
        block.barrier("tvm_storage_sync")
    else:
        block.warp_barrier(f"sync of {scope}")


def warp_sync(block, dtype):
    block.warp_barrier()


def to_shared(block, dtype, pointer):
    return block.pointer(pointer)


def shuffle(mode):
    """__shfl_*_sync(mask, value, lane or delta, width)."""

    def call(block, dtype, mask, value, by, width, _warp_size=WARP):
        clamp = (WARP - width) << 8 | (0 if mode == "up" else 31)
        return lane_calls.shuffle(block, block.array(value, dtype), mode, by, clamp, mask)[0]

    return call


def reduce_lanes(values, operation, width):
    """Butterflies over groups of lanes, widest first, as TVM's helper adds them up."""
    step = width // 2
    while step:
        other = values.reshape(-1, WARP)[:, np.arange(WARP) ^ step].reshape(-1)
        values = operation(values, other).astype(values.dtype)
        step //= 2
    return values


def warp_reduce(block, dtype, value, operation, width):
    block.active_warps("warp_reduce")
    return reduce_lanes(block.array(value, dtype), OPERATIONS[operation], width)


def cta_reduce(block, dtype, value, operation, warps, scratch):
    """By warp, then over the warps; `warps` is the number of warps of the block."""
    block.barrier("cta_reduce")
    function = OPERATIONS[operation]
    values = reduce_lanes(block.array(value, dtype), function, WARP)[::WARP]
    if len(values) != warps:
        raise ValueError(f"cta_reduce over {warps} of {len(values)} warps")
    block.barrier("cta_reduce")
    return np.full(block.threads, function.reduce(values, dtype=dtype))


OPERATIONS = {"sum": np.add, "max": np.fmax, "min": np.fmin}


def atomic_add(block, dtype, address, value):
    values = block.array(value, dtype)
    add = lambda cell, thread: cell + values[thread]  # noqa: E731
    return memory_calls.atomic(block, block.pointer(address), dtype, add)


def atomic_cas(block, dtype, address, old, new):
    old, new = block.array(old, dtype), block.array(new, dtype)
    swap = lambda cell, t: new[t] if cell[0] == old[t] else cell  # noqa: E731
    return memory_calls.atomic(block, block.pointer(address), dtype, swap)


def reduce_sync(operation):
    def call(block, dtype, mask, value):
        mods = {"op": operation, "type": "u32"}
        value = block.array(value, np.dtype(np.uint32))
        return lane_calls.redux_sync(block, mods, [value], [mask])[0]

    return call


def ballot(block, dtype, mask, predicate):
    return lane_calls.vote(block, "ballot", block.lanes_of(predicate), mask)


def any_sync(block, dtype, mask, predicate):
    return lane_calls.vote(block, "any", block.lanes_of(predicate), mask).astype(np.int32)


def same_bits(block, dtype, value):
    """The bits of a 32-bit value in the dtype of the result."""
    source = np.dtype(np.float32 if dtype.kind in "iu" else np.uint32)
    return block.array(value, source).view(dtype)


def elect_one(block, dtype):
    """The lowest active lane of each warp."""
    active = block.active().reshape(-1, WARP)
    first = active & (np.cumsum(active, axis=1) == 1)
    return first.reshape(-1).astype(dtype)


def ldg(block, dtype, address, _name):
    data = block.pointer(address).read(block, dtype.itemsize)
    return np.ascontiguousarray(data).view(dtype).reshape(-1)


def find_first_set(block, dtype, value):
    value = block.array(value, np.dtype(np.uint32)).astype(np.int64)
    return np.array([(int(v) & -int(v)).bit_length() for v in value], np.int32)


def nothing(block, dtype, *args):
    """Fences and prints: lock step orders all memory accesses anyway."""


def pure_extern(block, dtype, name, *args):
    """A function of the CUDA math library."""
    return EXTERNS[name](*args)


EXTERNS = {"__fmul_rn": np.multiply}

CALLS = {
    "call_pure_extern": pure_extern,
    "cuda.cta_sync": cta_sync,
    "cuda.syncthreads_and": syncthreads(np.all),
    "cuda.syncthreads_or": syncthreads(np.any),
    "tvm_storage_sync": storage_sync,
    "cuda.warp_sync": warp_sync,
    "cuda.thread_fence": nothing,
    "cuda.printf": nothing,
    "cuda.cvta_generic_to_shared": to_shared,
    "cuda.thread_rank": lambda block, dtype: block.lane.astype(dtype),
    "cuda.__activemask": lambda block, dtype: lane_calls.activemask(block, {})[0],
    "tvm_warp_activemask": lambda block, dtype: lane_calls.activemask(block, {})[0],
    "cuda.__shfl_sync": shuffle("idx"),
    "cuda.__shfl_up_sync": shuffle("up"),
    "cuda.__shfl_down_sync": shuffle("down"),
    "cuda.__shfl_xor_sync": shuffle("bfly"),
    "tvm_warp_shuffle": shuffle("idx"),
    "tvm_warp_shuffle_up": shuffle("up"),
    "tvm_warp_shuffle_down": shuffle("down"),
    "tvm_warp_shuffle_xor": shuffle("bfly"),
    "cuda.warp_reduce": warp_reduce,
    "cuda.cta_reduce": cta_reduce,
    "cuda.reduce_add_sync_u32": reduce_sync("add"),
    "cuda.reduce_min_sync_u32": reduce_sync("min"),
    "cuda.ballot_sync": ballot,
    "cuda.any_sync": any_sync,
    "cuda.elect_sync": elect_one,
    "cuda.atomic_add": atomic_add,
    "cuda.atomic_cas": atomic_cas,
    "cuda.ldg": ldg,
    "cuda.ffs_u32": find_first_set,
    "cuda.uint_as_float": same_bits,
    "cuda.float_as_uint": same_bits,
    "cuda.fdividef": lambda block, dtype, x, y: x / y,
}
