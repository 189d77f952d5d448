"""Keys and values of the NSA kernel as its products read them, packed once per call."""

from __future__ import annotations

from tvm.script import tirx as T

from .nsa_tile import Task


def packing(task: Task):
    """An inline ``pack_slot(packed, Keys, Values, h2, slot, row, count)``: key slot ``slot``, of L
    keys, from ``count`` packed rows at ``row``.

    K [h2][slot * L + key][channel] and V [h2][panel][pair of keys][channel of the panel] hold
    factors: float32, or pairs of bfloat16 along the channels of K and along the keys of V. Keys
    beyond ``count`` are left as they are in K, where their scores are replaced, and are zeros in V,
    where they meet weights of 0.
    """
    p, L, channels = task.problem, task.unit.lanes, task.channels
    STEP, PANELS, WIDTH = task.step, task.panels, task.tiles.panel
    DV = p.value_size
    pair, pairs = task.pair, task.pairs
    whole = channels if p.head_size % STEP == 0 else 0

    def value(Values, row, h2, column, last):
        """A factor of V: of one row, or of two where the second is not beyond ``last``."""
        if STEP == 1:
            return task.pair(Values, (row, h2), column)

        def bits(index):
            return T.Cast("uint32", T.reinterpret(Values[index, h2, column], dtype="uint16"))

        second = T.Select(row + 1 <= last, bits(T.min(row + 1, last)), T.uint32(0))
        return bits(row) | second << T.uint32(16)

    @T.inline
    def pack_slot(packed, Keys, Values, h2, slot, row, count):
        for i in range(count):
            for part in range(whole // L):
                packed.K[h2, slot * L + i, T.ramp(part * L, 1, L)] = pairs(
                    Keys, (row + i, h2), part * L, L
                )
            for c in range(whole // L * L, channels):
                packed.K[h2, slot * L + i, c] = pair(Keys, (row + i, h2), c)
        if PANELS > 0:
            for i in range(T.ceildiv(count, STEP)):
                for panel in range(PANELS):
                    if panel * WIDTH + WIDTH <= DV:
                        for c in T.vectorized(WIDTH):
                            packed.V[h2, panel, slot * (L // STEP) + i, c] = value(
                                Values, row + i * STEP, h2, panel * WIDTH + c, row + count - 1
                            )
                    else:
                        for c in range(WIDTH):
                            packed.V[h2, panel, slot * (L // STEP) + i, c] = T.if_then_else(
                                panel * WIDTH + c < DV,
                                value(
                                    Values, row + i * STEP, h2, panel * WIDTH + c, row + count - 1
                                ),
                                T.Cast(task.factor, 0),
                            )

    return pack_slot
