"""One thread block in lock step: who is active, where it is in the grid, its barriers."""

import numpy as np

from .barriers import Barriers
from .memory import AsyncCopies, Pointer
from .races import WARP, Order, SimtError
from .warpgroup import Products

MOST_ALIGNED = 2048  # bytes; twice what any instruction wants


class Block:
    """State of a running block; `mask` is None while all threads are active."""

    def __init__(self, threads, index, env):
        self.threads, self.index, self.env = threads, index, env
        self.lane = np.arange(threads)
        self.everyone = np.ones(threads, bool)
        self.mask = None
        self.regions = []  # shared, in order of allocation
        self.copies = AsyncCopies(threads)
        self.barriers, self.products = Barriers(), Products(threads)
        self.order = Order(-(-threads // WARP))

    def active(self):
        return self.everyone if self.mask is None else self.mask

    def shared_address(self, alignment):
        """Where the next shared buffer begins: as declared and, lest a kernel rely on chance, no
        better, nor in the first bytes of what a matrix wants."""
        end = max((region.base + len(region.data) for region in self.regions), default=0)
        return -(-(end + alignment) // MOST_ALIGNED) * MOST_ALIGNED - alignment

    def lanes_of(self, value):
        """The value by thread: [threads]."""
        return value if isinstance(value, np.ndarray) else np.full(self.threads, value)

    def array(self, value, dtype):
        """The value by thread in a given dtype."""
        if isinstance(value, Pointer):
            value = value.number()
        if isinstance(value, np.ndarray):
            return value if value.dtype == dtype else value.astype(dtype)
        return np.full(self.threads, value, dtype)

    def place(self, thread=None):
        where = ", ".join(f"{tag} {at}" for tag, at in self.index.items())
        return f"at {where or 'the only block'}" + ("" if thread is None else f", thread {thread}")

    def checked(self, region, offset, size):
        """(active [threads], offsets in bounds [threads]); raises for an active one outside."""
        bad = (offset < 0) | (offset > len(region.data) - size)
        active = self.active()
        if bad.any():
            bad_active = bad & active
            if bad_active.any():
                thread = int(bad_active.argmax())
                raise SimtError(
                    f"{size}-byte access outside {region.describe(offset[thread])},"
                    f" {self.place(thread)}"
                )
            offset = np.where(bad, 0, offset)
        return active, offset

    def pointer(self, value):
        """A pointer from a pointer or a shared-memory address."""
        if isinstance(value, Pointer):
            return value
        lanes = self.lanes_of(value).astype(np.int64)
        first = int(lanes[self.active().argmax()])
        for region in self.regions:
            if region.base <= first < region.base + len(region.data):
                return Pointer(region, lanes - region.base)
        raise SimtError(f"address {first:#x} is in no shared buffer, {self.place()}")

    def active_warps(self, what):
        """bool [warps]; a warp-wide instruction needs all 32 threads of a warp, or none."""
        if self.threads % WARP:
            raise SimtError(
                f"{what} in a block of {self.threads} threads: the last warp is partial"
            )
        by_warp = self.active().reshape(-1, WARP)
        some = by_warp.any(1)
        if (some != by_warp.all(1)).any():
            warp = int((some != by_warp.all(1)).argmax())
            raise SimtError(f"{what} reached by a part of warp {warp}, {self.place()}")
        return some

    def barrier(self, what="cta_sync"):
        """All threads of the block."""
        if self.mask is not None and not self.mask.all():
            raise SimtError(
                f"{what} reached by {int(self.mask.sum())} of {self.threads} threads,"
                f" {self.place()}"
            )
        self.order.barrier()

    def warp_barrier(self, what="warp_sync"):
        self.order.warp_barrier(np.flatnonzero(self.active_warps(what)))

    def named_barrier(self, what, count):
        """`count` threads, of which all must be here now."""
        if count == self.threads:
            return self.barrier(what)
        warps = self.active_warps(what)
        if int(self.active().sum()) != count:
            raise SimtError(
                f"{what} of {count} threads reached by {int(self.active().sum())}, {self.place()}"
            )
        return self.order.join(np.flatnonzero(warps))
