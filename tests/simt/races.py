"""Who touched which shared byte, and which barriers came between.

Every shared byte remembers the thread that wrote it last and the threads that have read it, each
with the interval between barriers (epoch) in which they did. An access of another thread's byte is
a race unless a barrier lies between: one of the block, or of the warp within a warp. Lock step
would hide such a race; on a GPU warps run apart, and so may the lanes of a warp.

A proxy fence counts where the writer executes it before the barrier that the reader waits for. That
is our rule; the memory model of PTX also knows fences on the reader's side.
"""

import numpy as np

WARP = 32
ID_BITS = 11  # a tag is an epoch and who: a thread, a whole warp, or one of these two
WARP_ID = 1024  # + w: several threads of warp w
ASYNC = 2045  # a copy in flight
MANY = 2046  # threads of several warps
WHO = (1 << ID_BITS) - 1
IN_FLIGHT = 1 << 30 | ASYNC

# Id to column of `Order.seen`: a warp, or one of the last two.
MANY_COLUMN, ASYNC_COLUMN = 32, 33
COLUMN = np.zeros(1 << ID_BITS, np.int64)
COLUMN[:WARP_ID] = np.arange(WARP_ID) // WARP
COLUMN[WARP_ID : WARP_ID + WARP] = np.arange(WARP)
COLUMN[[MANY, ASYNC]] = MANY_COLUMN, ASYNC_COLUMN


class SimtError(AssertionError):
    """The kernel does what no GPU promises to do, or what is undefined."""


class Order:
    """seen[w, v]: the threads of warp w are behind a barrier for all that warp v did up to that
    epoch (v = w: for what the warp's other lanes did)."""

    def __init__(self, warps):
        self.seen = np.zeros((warps, 34), np.int64)
        self.seen[:, ASYNC_COLUMN] = -1  # nothing is behind a copy in flight
        self.epoch = 1
        # The epoch of each thread's last proxy fence, and the same as the threads of a warp know.
        self.fenced = np.zeros(warps * WARP, np.int64)
        self.released = np.zeros((warps, warps * WARP), np.int64)
        self.clean = self.epoch << ID_BITS  # tags below are behind a barrier of the block

    def barrier(self):
        self.seen[:, :ASYNC_COLUMN] = self.epoch
        self.released[:] = self.fenced
        self.epoch += 1
        self.clean = self.epoch << ID_BITS

    def warp_barrier(self, warps):
        """warps: their numbers."""
        self.seen[warps, warps] = self.epoch
        lanes = warps[:, None] * WARP + np.arange(WARP)
        self.released[warps[:, None], lanes] = self.fenced[lanes]
        self.epoch += 1

    def moment(self):
        """An epoch that only the barriers from here on are behind."""
        self.epoch += 1
        return self.epoch - 1

    def fence(self, active):
        """What these threads [threads] wrote so far is there for copies and products that are
        behind a barrier from here on, or their own."""
        self.fenced[: len(active)][active] = self.moment()

    def fences_known(self, threads):
        """[threads of the block]: the last proxy fence of each that all given threads know of."""
        known = self.released[np.unique(threads // WARP)].min(0)
        if len(threads) == 1:
            known[threads] = self.fenced[threads]
        return known

    def join(self, warps):
        """A barrier among some warps, by their numbers."""
        joined = self.seen[warps, :WARP].max(0)
        joined[warps] = self.epoch
        self.seen[warps[:, None], np.arange(WARP)] = joined
        released = self.released[warps].max(0)
        lanes = (warps[:, None] * WARP + np.arange(WARP)).reshape(-1)
        released[lanes] = self.fenced[lanes]
        self.released[warps] = released
        for warp in warps:
            others = np.delete(self.seen[warp, : len(self.seen)], warp)
            self.seen[warp, MANY_COLUMN] = others.min(initial=self.epoch)
        self.epoch += 1


class History:
    """Last writer and readers of the bytes of one shared buffer."""

    def __init__(self, region, size):
        padded = -(-size // 16) * 16
        self.region = region
        self.writer, self.reader = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
        self.reading = np.zeros(padded, np.uint8)  # products under way that read the byte
        self.products = 0

    def note(self, block, offset, size, kind, values=None, in_flight=False):
        """Judge a "read", "write" or "atomic" access of the active threads, and remember it.

        offset: [threads] or one for all; values: uint8 [active threads, size] that are written.
        """
        active, order = block.active(), block.order
        at, thread = np.broadcast_to(offset, active.shape)[active], block.lane[active]
        if at.size == 0:
            return
        if size in (1, 2, 4, 8, 16) and not (at % size).any():
            where, shape = at // size, (-1, size)
        else:
            where, shape = at[:, None] + np.arange(size), (-1,)
        writer, reader = self.writer.reshape(shape), self.reader.reshape(shape)
        if self.products and kind != "read" and self.reading.reshape(shape)[where].any():
            byte = self.region.describe(int(at[0]))
            raise SimtError(f"{kind} near {byte} while wgmma reads it, {block.place()}")
        by = Access(block, at, thread[:, None], kind, values)
        wrote = writer[where]
        if wrote.max() >= order.clean:
            if kind == "atomic":  # atomics do not race with one another
                wrote = np.where(wrote & WHO == MANY, 0, wrote)
            self.judge(by, wrote, "write")
        mine = order.epoch << ID_BITS | thread[:, None]
        read = reader[where]
        if kind == "read":
            tags = np.broadcast_to(mine, read.shape)
            if read.max() >= order.clean:
                tags = self.merged(by, read, tags)
            reader[where] = tags
            self.shared_reads(by, reader, where, tags)
            return
        if read.max() >= order.clean:
            self.judge(by, read, "read")
        if kind == "atomic" or in_flight:
            mine = IN_FLIGHT if in_flight else order.epoch << ID_BITS | MANY
        writer[where] = mine

    def landed(self, block, thread, at, size):
        """A copy of some threads [n] to byte offsets [n] is complete, as they know."""
        tags = block.order.epoch << ID_BITS | thread[:, None]
        self.writer[at[:, None] + np.arange(size)] = tags

    def landed_for_all(self, where):
        """Bulk copies to these bytes are complete, as all threads and products know."""
        self.writer[where] = 0

    def read_by_products(self, block, where, threads):
        """Judge a wgmma of the threads of some warps, and remember it until it is done."""
        tags = self.writer[where]
        who = tags & WHO
        seen = block.order.seen[np.unique(threads // WARP)].min(0)
        bad = (tags >> ID_BITS) > seen[COLUMN[who]]
        if bad.any():
            at = bad.argmax()
            whom = "a copy in flight" if who[at] == ASYNC else "threads with no cta_sync since"
            byte = self.region.describe(int(where[at]))
            raise SimtError(f"wgmma reads {byte}, written by {whom}, {block.place()}")
        self.require_fenced(block, where, threads, "wgmma")
        self.reading[where] += 1
        self.products += 1

    def read_by_products_done(self, block, where):
        self.reading[where] -= 1
        self.products -= 1
        self.reader[where] = block.order.epoch << ID_BITS | MANY

    def require_fenced(self, block, where, threads, what):
        """Raise for bytes whose writer has not executed a proxy fence since, or not before the last
        barrier between it and the given threads."""
        tags = self.writer[where]
        who = tags & WHO
        known = block.order.fences_known(threads)
        fenced = np.where(who < WARP_ID, known[np.where(who < WARP_ID, who, 0)], 0)
        late = (tags >> ID_BITS) > fenced
        if late.any():
            byte = self.region.describe(int(where[late.argmax()]))
            raise SimtError(
                f"{what} of {byte} with no fence.proxy.async since it was written, or no barrier"
                f" since that fence, {block.place()}"
            )

    def merged(self, by, read, tags):
        """Readers with no barrier between them become one tag of several."""
        warp = by.thread // WARP
        other = COLUMN[read & WHO]
        apart = (read >> ID_BITS > by.block.order.seen[warp, other]) & (read != tags)
        several = np.where(other == warp, WARP_ID + warp, MANY)
        return np.where(apart, by.block.order.epoch << ID_BITS | several, tags)

    def shared_reads(self, by, reader, where, tags):
        """The same where one statement reads a byte in several threads."""
        lost = (reader[where] != tags).any(1)
        if not lost.any():
            return
        where, warp = where[lost], by.thread[lost] // WARP
        winner = COLUMN[reader[where] & WHO]
        epoch = by.block.order.epoch << ID_BITS
        reader[where] = np.where(winner == warp, epoch | WARP_ID + warp, reader[where])
        foreign = (winner != warp).any(1)
        reader[where[foreign]] = epoch | MANY

    def judge(self, by, tags, earlier):
        """Raise for a tag of another thread with no barrier since."""
        who = tags & WHO
        warp = by.thread // WARP
        bad = (tags >> ID_BITS > by.block.order.seen[warp, COLUMN[who]]) & (who != by.thread)
        if by.values is not None and bad.any():  # writing what is there already harms nobody
            there = self.region.data[by.at[:, None] + np.arange(tags.shape[1])]
            bad &= (there != by.values) | (who == ASYNC) | (earlier == "read")
        if not bad.any():
            return
        row, column = np.unravel_index(bad.argmax(), bad.shape)
        thread, who = int(by.thread[row, 0]), int(who[row, column])
        byte = self.region.describe(int(by.at[row]) + column)
        if who == ASYNC:
            raise SimtError(
                f"{by.kind} of {byte} while cp.async into it is in flight: no wait covers it,"
                f" {by.block.place(thread)}"
            )
        group, whom = ("cta_sync", "threads of several warps")
        if who != MANY:
            other = COLUMN[who]
            group = "warp_sync" if other == thread // WARP else "cta_sync"
            whom = f"thread {who}" if who < WARP_ID else f"lanes of warp {other}"
        verb = {"read": "read", "write": "wrote"}[earlier]
        raise SimtError(
            f"{by.kind} of {byte} with no {group} since {whom} {verb} it, {by.block.place(thread)}"
        )


class Access:
    """One statement's access by active threads [n, 1] at byte offsets [n]."""

    def __init__(self, block, at, thread, kind, values):
        self.block, self.at, self.thread = block, at, thread
        self.kind, self.values = kind, values
