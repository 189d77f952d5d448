"""Buffers as kernels see them: typed views of regions, and registers by thread."""

import numpy as np

from . import values
from .memory import Pointer, Region
from .races import SimtError
from .registers import Watch


class View:
    """A typed, shaped view of a global or shared region."""

    def __init__(self, name, region, dtype, shape, strides, elem_offset=0):
        self.name, self.region, self.dtype, self.shape = name, region, dtype, shape
        self.strides = strides or row_major(shape)
        self.elem_offset = elem_offset
        self.size = dtype.itemsize
        usable = len(region.data) // self.size * self.size
        self.typed = region.data[:usable].view(dtype)
        self.shared = type(region) is not Region

    def at(self, block, indices):
        """Element offset in the region, bounds checked by dimension for active threads."""
        flat = self.elem_offset
        for axis, (index, extent, stride) in enumerate(zip(indices, self.shape, self.strides)):
            if isinstance(index, np.ndarray):
                index = index.astype(np.int64)
                outside = index.view(np.uint64) >= extent
                if outside.any():
                    bad = outside & block.active()
                    if bad.any():
                        thread = int(bad.argmax())
                        self.outside(block, axis, int(index[thread]), extent, thread)
                    index = np.where(outside, 0, index)
            elif not 0 <= index < extent and block.active().any():
                self.outside(block, axis, index, extent, int(block.active().argmax()))
            flat = flat + index * stride
        return flat

    def outside(self, block, axis, index, extent, thread):
        raise SimtError(
            f"index {index} of axis {axis} is outside {self.name} {list(self.shape)}"
            f" (extent {extent}), {block.place(thread)}"
        )

    def load(self, block, indices):
        at = self.at(block, indices)
        if self.shared:
            self.region.note(block, at * self.size, self.size, "read")
        value = self.typed[at]
        return value if isinstance(at, np.ndarray) else values.scalar(value, self.dtype)

    def store(self, block, indices, value):
        if isinstance(value, Pointer):
            value = value.number()
        at = self.at(block, indices)
        if not isinstance(at, np.ndarray):
            at = np.full(block.threads, at)
        data = np.ascontiguousarray(np.broadcast_to(np.asarray(value, self.dtype), at.shape))
        self.region.write(block, at * self.size, data.view(np.uint8).reshape(-1, self.size))

    def address(self, block, indices):
        """A pointer to an element, which may be outside until something reads through it."""
        flat = self.elem_offset
        for index, stride in zip(indices, self.strides):
            index = index.astype(np.int64) if isinstance(index, np.ndarray) else index
            flat = flat + index * stride
        return Pointer(self.region, flat * self.size)

    def pointer(self, block, offset):
        return Pointer(self.region, self.elem_offset * self.size + offset)

    def alias(self, name, dtype, shape, strides, elem_offset):
        base = self.elem_offset * self.size // dtype.itemsize
        return View(name, self.region, dtype, shape, strides, base + elem_offset)


class Local:
    """Registers: an array [elements, threads]."""

    def __init__(self, name, dtype, shape, strides, data, watch=None):
        self.name, self.dtype, self.shape = name, dtype, shape
        self.watch = watch or Watch()
        self.strides = row_major(shape)
        if strides and strides != self.strides:
            raise NotImplementedError(f"local buffer {name} with strides {strides}")
        self.data = data

    def at(self, block, indices):
        if len(indices) == 1 and type(indices[0]) is int and 0 <= indices[0] < self.shape[0]:
            return indices[0] * self.strides[0]
        return View.at(self, block, indices)

    elem_offset = 0
    outside = View.outside

    def load(self, block, indices):
        at = self.at(block, indices)
        return self.data[at, block.lane] if isinstance(at, np.ndarray) else self.data[at]

    def store(self, block, indices, value):
        at = self.at(block, indices)
        if isinstance(value, Pointer):
            value = value.number()
        if self.watch.on:
            self.watch.written(block, self, at)
        if isinstance(at, np.ndarray):
            active = block.active()
            value = np.broadcast_to(np.asarray(value, self.dtype), at.shape)
            self.data[at[active], block.lane[active]] = value[active]
        elif block.mask is None:
            self.data[at] = value
        else:
            np.copyto(self.data[at], np.asarray(value, self.dtype), where=block.mask)

    def alias(self, name, dtype, shape, strides, elem_offset):
        if elem_offset:
            raise NotImplementedError(f"{name}: a view of local {self.name} at an offset")
        data = self.data if dtype == self.dtype else self.data.T.view(dtype).T
        return Local(name, dtype, shape, strides, data, self.watch)


def row_major(shape):
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return tuple(reversed(strides))
