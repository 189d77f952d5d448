"""Barriers in shared memory (mbarrier) and the bulk copies that complete on them.

Signatures as ptx.CALLS wants them. A copy takes its data at the issue and lands when a wait sees
the phase end. Lock step has nobody else who could still arrive, so a wait that would not end at
once is an error. Source: PTX ISA, "mbarrier", "cp.async.bulk", "Async proxy".
"""

import dataclasses

import numpy as np

from .memory import POISON, Region, Shared
from .races import WARP, SimtError

ALIGNMENT = 16  # of bulk copies, and of their sizes


@dataclasses.dataclass
class Barrier:
    """`phase` is the number of the current phase; `missing`, `bytes` and `copies` what it lacks."""

    arrivals: int
    thread: int  # that made it
    missing: int
    bytes: int = 0
    phase: int = 0
    published: int | None = None  # epoch of its maker's fence
    copies: list = dataclasses.field(default_factory=list)  # (region, offset, bytes)
    awaited: int | None = None  # the phase that the block waited for last, and in which epoch
    epoch: int = 0
    heard: object = None  # bool [threads]: an arrival of the current phase is behind their wait

    def arrived(self, block):
        """Phases are known by their parity: one that ends while a thread may still wait for the
        phase before would keep that thread waiting for the next."""
        if self.heard is None:
            return
        threads = block.lane[block.active()]
        seen = block.order.seen[np.unique(threads // WARP)].max(0)
        self.heard |= seen[block.lane // WARP] >= self.epoch
        self.heard[threads] = True

    def waited(self, block, phase):
        self.awaited, self.epoch = phase, block.order.epoch
        self.heard = np.zeros(block.threads, bool)

    def advance(self, block):
        """To the next phase, if nothing is missing."""
        if self.missing or self.bytes or self.copies:
            return
        if self.awaited == self.phase - 1 and not self.heard.all():
            late = int(self.heard.argmin())
            raise SimtError(
                f"an mbarrier whose phase {self.phase} may end before phase {self.awaited} is seen:"
                f" no arrival is behind the wait, {block.place(late)}"
            )
        self.phase += 1
        self.missing = self.arrivals


class Barriers:
    """All barriers of a block, by region and offset."""

    def __init__(self):
        self.known = {}

    def at(self, block, pointer, what):
        """The one barrier that all active threads name; a fault unless they see it made."""
        offset = uniform(block, pointer.offset, what)
        found = self.known.get((pointer.region, offset))
        if found is None:
            where = pointer.region.describe(offset)
            raise SimtError(f"{what} on {where}, which is no mbarrier, {block.place()}")
        pointer.region.note(block, offset, 8, "read")
        return found

    def publish(self, block):
        """Barriers that active threads made are there for bulk copies behind this."""
        epoch = block.order.moment()
        for barrier in self.known.values():
            if barrier.published is None and block.active()[barrier.thread]:
                barrier.published = epoch

    def in_flight(self):
        return any(barrier.copies for barrier in self.known.values())


def uniform(block, value, what):
    """The value that all active threads hold."""
    lanes = block.lanes_of(value)[block.active()]
    if (lanes != lanes[0]).any():
        raise SimtError(f"{what} with different operands in one statement, {block.place()}")
    return int(lanes[0])


def single_thread(block, what):
    threads = np.flatnonzero(block.active())
    if len(threads) != 1:
        raise SimtError(f"{what} by {len(threads)} threads, {block.place()}")
    return int(threads[0])


def init(block, mods, addr, count):
    thread = single_thread(block, "mbarrier.init")
    addr.require_aligned(block, 8)
    offset = uniform(block, addr.offset, "mbarrier.init")
    block.checked(addr.region, block.lanes_of(addr.offset), 8)
    addr.region.note(block, offset, 8, "write")
    arrivals = int(count[0][thread])
    block.barriers.known[addr.region, offset] = Barrier(arrivals, thread, arrivals)


def publish(block, mods):
    block.barriers.publish(block)


def fence_proxy(block, mods):
    """Orders what the active threads did in shared memory before what copies and products do
    after."""
    if mods["proxykind"] == "async" and mods["space"] != "global":
        block.barriers.publish(block)
        block.order.fence(block.active())


def arrive(block, mods, addr, state=None, count=None, tx_count=None):
    barrier = block.barriers.at(block, addr, "mbarrier.arrive")
    active = block.active()
    arrived = int(active.sum()) if count is None else int(count[0][active].sum())
    barrier.missing -= arrived
    if barrier.missing < 0:
        raise SimtError(f"mbarrier.arrive more often than {barrier.arrivals}, {block.place()}")
    if tx_count is not None:
        barrier.bytes += int(tx_count[0][active].sum())
    barrier.arrived(block)
    barrier.advance(block)


def copy(block, mods, dst_mem, src_mem, size, mbar):
    """From global to shared memory."""
    thread = single_thread(block, "cp.async.bulk")
    count = int(size[0][thread])
    if count % ALIGNMENT or not count:
        raise SimtError(f"cp.async.bulk of {count} bytes, {block.place(thread)}")
    if type(src_mem.region) is not Region or type(dst_mem.region) is not Shared:
        raise SimtError(f"cp.async.bulk not from global to shared memory, {block.place(thread)}")
    for pointer in (dst_mem, src_mem):
        pointer.require_aligned(block, ALIGNMENT)
        block.checked(pointer.region, block.lanes_of(pointer.offset), count)
    barrier = block.barriers.at(block, mbar, "cp.async.bulk")
    seen = block.order.seen[thread // WARP, barrier.thread // WARP]
    if barrier.published is None or (thread != barrier.thread and barrier.published > seen):
        raise SimtError(f"cp.async.bulk on an mbarrier with no fence since, {block.place(thread)}")
    target, source = (int(block.lanes_of(p.offset)[thread]) for p in (dst_mem, src_mem))
    where = np.arange(target, target + count)
    region = dst_mem.region
    region.history.require_fenced(block, where, np.array([thread]), "cp.async.bulk")
    region.note(block, target, count, "write", in_flight=True)
    barrier.copies.append((region, where, src_mem.region.data[source : source + count].copy()))
    region.data[where] = POISON


def wait(block, mods, addr, phase, time_hint=None):
    """True: the phase of that parity is over, its copies landed."""
    barrier = block.barriers.at(block, addr, "mbarrier.try_wait")
    if not block.active().all():
        raise NotImplementedError("mbarrier.try_wait by a part of the block")
    if barrier.phase % 2 == uniform(block, phase[0], "mbarrier.try_wait"):
        copied = sum(len(data) for _, _, data in barrier.copies)
        if barrier.missing or barrier.bytes != copied:
            raise SimtError(
                f"mbarrier.try_wait for what never comes: {barrier.missing} arrivals and"
                f" {barrier.bytes - copied} bytes are missing, {block.place()}"
            )
        for region, where, data in barrier.copies:
            region.data[where] = data
            region.history.landed_for_all(where)
        barrier.bytes, barrier.copies = 0, []
        barrier.advance(block)
    barrier.waited(block, barrier.phase - 1)
    return [np.ones(block.threads, np.uint32)]
