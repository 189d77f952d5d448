"""What products of warpgroups (wgmma) ask of registers: fences, and that nobody else writes them.

PTX ISA, "wgmma.fence": one has to lie between a thread's access to a register and a product that
uses it, and between products of different shapes that use the same accumulators. Of the accesses
only writes are watched here.
"""

import numpy as np

from .races import SimtError

WORD = 4  # bytes of a register
WRITTEN, FENCED = 0, 1  # states of a register; others are the shape of the product that had it last


class Watch:
    """The registers of one local buffer and of its views, [words, threads]; empty before the first
    fence.
    """

    def __init__(self):
        self.on = False

    def fence(self, shape, active):
        """What the active threads hold is what products may use."""
        if not self.on:
            self.on = True
            self.state = np.full(shape, WRITTEN, np.int32)
            self.result = np.zeros(shape, bool)  # products under way write it
            self.operands = np.zeros(shape, np.int16)  # products under way that read it
        self.state[:, active] = FENCED

    def usable(self, index, threads, shape=FENCED):
        """bool [n]: whether a product may use a register of these threads [n], as an operand, or as
        an accumulator of the products of a shape."""
        state = self.state[index][threads]
        return (state == FENCED) | (state == shape)

    def written(self, block, view, at):
        """The active threads write elements `at` (an int, or [threads]) of a view."""
        active, size = block.active(), view.dtype.itemsize
        first = at * size // WORD
        threads = block.lane[active]
        for step in range(max(1, size // WORD)):
            words = (first[active] if isinstance(first, np.ndarray) else first) + step
            for busy, does in ((self.result, "writes"), (self.operands, "reads")):
                used = busy[words, threads] != 0
                if used.any():
                    at = np.broadcast_to(words, threads.shape)[used.argmax()]
                    raise SimtError(
                        f"register {at} of {view.name} written while wgmma {does} it,"
                        f" {block.place(int(threads[used.argmax()]))}"
                    )
            self.state[words, threads] = WRITTEN
