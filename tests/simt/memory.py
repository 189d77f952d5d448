"""Memory of one thread block: regions of bytes, bounds, poison, asynchronous copies.

Addresses are byte offsets into a region (one buffer).
"""

import dataclasses

import numpy as np

from .races import History, SimtError

POISON = 0xFF  # NaN in every float format, -1 in every integer


class Region:
    """The bytes of one global or shared buffer."""

    def __init__(self, name, data, base=0):
        self.name, self.data, self.base = name, data, base
        self.rows = {}

    def by(self, size):
        """The bytes as rows of `size`, for aligned accesses."""
        if size not in self.rows:
            self.rows[size] = self.data[: len(self.data) // size * size].reshape(-1, size)
        return self.rows[size]

    def describe(self, offset):
        return f"byte {offset} of {self.name} ({len(self.data)} bytes)"

    def read(self, block, offset, size):
        """uint8 [threads, size] at byte offsets [threads]; inactive threads read anything."""
        _, at = block.checked(self, offset, size)
        self.note(block, offset, size, "read")
        return self.by(size)[at // size] if not (at % size).any() else self.data[span(at, size)]

    def write(self, block, offset, values):
        """uint8 [threads, size] to byte offsets [threads]."""
        size = values.shape[1]
        active, at = block.checked(self, offset, size)
        at, values = at[active], values[active]
        self.note(block, offset, size, "write", values)
        where = span(at, size)
        self.data[where] = values
        if not np.array_equal(self.data[where], values):
            lane = (self.data[where] != values).any(1).argmax()
            raise SimtError(
                f"threads write different values to {self.describe(at[lane])} in one statement,"
                f" {block.place(np.flatnonzero(active)[lane])}"
            )

    def note(self, block, offset, size, kind, values=None):
        """Nothing to remember for global memory."""


class Shared(Region):
    """A shared buffer: poison at first, and who touched each byte."""

    def __init__(self, name, size, base):
        super().__init__(name, np.full(size, POISON, np.uint8), base)
        self.history = History(self, size)

    def note(self, *args, **kwargs):
        self.history.note(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class Pointer:
    """Byte offsets (int, or int64 [threads]) into a region; adding moves it by bytes."""

    region: Region
    offset: object
    __array_ufunc__ = None  # NumPy leaves array + pointer to __radd__

    def __add__(self, step):
        return Pointer(self.region, self.offset + wide(step))

    __radd__ = __add__

    def __sub__(self, step):
        return Pointer(self.region, self.offset - wide(step))

    def number(self):
        """The shared-memory address, as cvta.to.shared gives it."""
        return self.offset + self.region.base

    def __xor__(self, bits):
        return self.number() ^ wide(bits)

    def __and__(self, bits):
        return self.number() & wide(bits)

    def __rshift__(self, bits):
        return self.number() >> wide(bits)

    __rxor__ = __xor__

    def read(self, block, size, aligned=True):
        if aligned:
            self.require_aligned(block, size)
        return self.region.read(block, block.lanes_of(self.offset), size)

    def write(self, block, values, aligned=True):
        if aligned:
            self.require_aligned(block, values.shape[1])
        self.region.write(block, block.lanes_of(self.offset), values)

    def require_aligned(self, block, size):
        bad = (block.lanes_of(self.number()) % size != 0) & block.active()
        if bad.any():
            thread = int(bad.argmax())
            raise SimtError(
                f"{size}-byte access to {self.region.describe(block.lanes_of(self.offset)[thread])}"
                f" is not aligned, {block.place(thread)}"
            )


def wide(value):
    return value.astype(np.int64) if isinstance(value, np.ndarray) else int(value)


def span(at, size):
    """Byte indices [n, size] from starts [n]."""
    return at[:, None] + np.arange(size)


class AsyncCopies:
    """cp.async: data is taken at the issue and lands when a wait covers its group."""

    def __init__(self, threads):
        self.committed = np.zeros(threads, np.int64)  # groups, by thread
        self.pending = []  # (region, threads [n], offsets [n], bytes [n, size], group [n])

    def issue(self, block, target, data):
        target.require_aligned(block, data.shape[1])
        region, size = target.region, data.shape[1]
        active, at = block.checked(region, block.lanes_of(target.offset), size)
        region.note(block, at, size, "write", in_flight=True)
        threads = np.flatnonzero(active)
        region.data[span(at[threads], size)] = POISON
        copy = (region, threads, at[threads], data[threads], self.committed[threads])
        self.pending.append(copy)

    def commit(self, block):
        self.committed += block.active()

    def wait(self, block, groups):
        """Land the copies of all groups but the last `groups` of each active thread; None: all."""
        active, rest = block.active(), []
        for region, threads, at, data, group in self.pending:
            landed = active[threads]
            if groups is not None:
                landed = landed & (group < self.committed[threads] - groups)
            if landed.any():
                region.data[span(at[landed], data.shape[1])] = data[landed]
                region.history.landed(block, threads[landed], at[landed], data.shape[1])
            if not landed.all():
                left = ~landed
                rest.append((region, threads[left], at[left], data[left], group[left]))
        self.pending = rest
