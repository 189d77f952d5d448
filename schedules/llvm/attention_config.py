"""Tile sizes of the fused attention kernel on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import matrix_tiles
from .attention_operands import BLOCK, HALF_BYTES
from .attention_row_amx import MOST_HEADS, TILE_KEYS, TILE_STRIPES
from .attention_split import TERMS
from .vector import VectorUnit

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem


@dataclass(frozen=True)
class AttentionConfig:
    """Tile sizes. The register tile holds ``unroll x vectors`` accumulators."""

    lanes: int
    vectors: int
    """Registers of query rows: a group is W = lanes * vectors rows."""
    unroll: int
    """Keys of a score tile, elements of D of an output tile."""
    groups: int
    """Groups per task: they share one conversion of the keys and values."""
    keys: int
    """C, a multiple of ``unroll`` and ``lanes``."""
    repeats: int
    """Steps of a product's reduction in the body of its loop."""
    few: int
    """Up to this many rows a task goes row by row."""
    staged_tiles: int = 1
    """Tiles of C keys that are made ready together where matrix tiles multiply them."""
    heads: int = 1
    """H, heads that a task takes when it goes row by row: a divisor of N1 / N2."""
    row_sums: int = 8
    """Accumulators of a task that goes row by row; at least ``heads``."""
    stripes: int = 1
    """Places of the keys from which a task that goes row by row takes them in turn: a divisor of
    ``keys``.
    """
    parts: int = 1
    """P, tasks that share out the keys of a row when all tasks go row by row."""

    def __post_init__(self) -> None:
        if self.keys % self.unroll or self.keys % self.lanes:
            raise ValueError(
                f"AttentionConfig: keys: found {self.keys}, "
                f"allowed multiples of {self.unroll} and {self.lanes}"
            )
        if self.keys % self.stripes:
            raise ValueError(
                f"AttentionConfig: stripes: found {self.stripes}, allowed divisors of {self.keys}"
            )
        if self.heads > self.row_sums:
            raise ValueError(
                f"AttentionConfig: heads: found {self.heads}, allowed 1 to {self.row_sums}"
            )

    @property
    def width(self) -> int:
        return self.lanes * self.vectors

    @property
    def keys_together(self) -> int:
        """Keys of a step of a task that goes row by row: a power of two, few enough for the
        hardware to follow.
        """
        return 1 << (min(8, self.row_sums // self.heads).bit_length() - 1)

    @property
    def rows(self) -> int:
        return self.width * self.groups


def configure(problem: AttentionProblem, unit: VectorUnit) -> AttentionConfig:
    """16 or 12 accumulators, which hide the latency of two multiply-add units; 24 for long heads,
    whose keys and values leave the first-level cache and are then read less often; tiles of a size
    that leaves keys, values and queries in the second-level cache.
    """
    wide = unit.registers == 32
    large = problem.D > 256
    long = (
        wide
        and 96 < problem.D <= 256
        and not (isinstance(problem.S1, int) and problem.S1 < LONG_ROWS)
    )
    keys = {True: 64, False: 48}[wide] if large else {True: 128, False: 96}[wide]
    heads = parts = 1
    if goes_by_rows(problem, unit):
        keys = ROW_KEYS[wide]
        heads = group_heads(problem, 8 if wide else 4)
        parts = _parts(problem, problem.N1 // heads)
    return AttentionConfig(
        lanes=unit.lanes,
        vectors=3 if long else 2,
        repeats=4,
        unroll=8 if wide else 6,
        groups=(1 if large else 2) * 16 // unit.lanes,
        keys=keys,
        few=_few(unit),
        heads=heads,
        row_sums=16 if wide else 8,
        stripes=_stripes(problem, ROW_STRIPES),
        parts=parts,
    )


def _few(unit: VectorUnit) -> int:
    return unit.lanes // 2


def goes_by_rows(problem: AttentionProblem, unit: VectorUnit) -> bool:
    """All tasks have few rows."""
    S1 = problem.S1
    return problem.layout != "TND" and isinstance(S1, int) and _few(unit) >= S1


def group_heads(problem: AttentionProblem, most: int) -> int:
    """H, up to ``most``."""
    group = problem.N1 // problem.N2
    return max(h for h in range(1, min(group, most) + 1) if group % h == 0)


def _stripes(problem: AttentionProblem, stripes: int) -> int:
    """``stripes``, but 1 where pairs have a bias or may be dropped: those of a row are read in the
    order of its keys.
    """
    plain = problem.pse is None and not problem.mask and problem.keep_prob == 1
    return stripes if plain else 1


ROW_TASKS = 32
"""Tasks that occupy the cores of any machine well enough; row by row."""
ROW_KEYS = {True: 32, False: 24}
"""C where tasks go row by row, with 32 registers and with fewer. Nothing is asked of the memory
while weights are computed: the fewer at a time, the shorter it waits.
"""
ROW_STRIPES = 8
"""Prefetchers stop where a page ends and follow many pages at once: a sixth to a quarter less time
than from one place, measured on Sapphire Rapids.
"""
PART_KEYS = 256
"""Least number of keys that are worth a task."""


def _parts(problem: AttentionProblem, shares: int) -> int:
    """P for this many tasks a batch entry. An unknown batch may be 1, unknown keys many."""
    tasks = shares * (problem.B if isinstance(problem.B, int) else 1)
    parts = -(-ROW_TASKS // max(tasks, 1))
    if isinstance(problem.S2, int):
        parts = min(parts, problem.S2 // PART_KEYS)
    return max(parts, 1)


LONG_ROWS = 512
"""From so many query rows on, what the higher tile of the last task computes in vain is little."""
WIDE_TASKS = 64
"""Tasks that leave the cores of most machines a share of equal size; of matrix tiles."""
SPLIT_TASKS = 24
"""The same where elements are split into terms: fewer, for each splits the keys and values."""


STAGED_BYTES = 3 << 17
"""Of keys and values that are made ready together, at most: a part of a second-level cache."""


def tile_config(problem: AttentionProblem, config: AttentionConfig) -> AttentionConfig:
    """Where matrix tiles multiply, what makes keys and values ready is a larger part: a task has
    more groups. The first-level cache holds what a tile of keys works on.

    A row of a bias or a mask is then read in short pieces. If all groups of a task came between two
    of them, so would lines of as many pages as the task has rows, which fall into few sets of the
    second-level cache: with many tiles made ready together a group reads on in its rows.
    """
    split = problem.dtype != "bfloat16"
    small = split or problem.D <= 64
    keys = min(config.keys, 64 if small else 128)
    config = replace(config, vectors=2, unroll=4, keys=keys)
    groups = (16 if split else 8) // (1 if problem.D <= 256 else 2)
    tasks = SPLIT_TASKS if split else WIDE_TASKS
    sequences = 1 if problem.layout == "TND" else problem.B
    if isinstance(sequences, int) and isinstance(problem.S1, int):
        if not split and problem.D <= 128:
            groups = 32
        rows = sequences * problem.N1 * problem.S1
        groups = matrix_tiles.groups(groups, config.width, rows, tasks)
    by_pair = problem.pse == "rows" or problem.mask
    tiles = 1
    if groups > 2 and (by_pair or (not split and small)):
        depth = -(-problem.D // BLOCK) * BLOCK
        key_bytes = 2 * depth * (TERMS[problem.dtype] if split else 1) * HALF_BYTES
        tiles = 1 << max((STAGED_BYTES // (key_bytes * keys)).bit_length() - 1, 0)
    return replace(config, groups=groups, staged_tiles=tiles)


def heads_config(problem: AttentionProblem, config: AttentionConfig) -> AttentionConfig:
    heads = group_heads(problem, MOST_HEADS)
    return replace(
        config,
        keys=TILE_KEYS,
        heads=heads,
        stripes=_stripes(problem, TILE_STRIPES),
        parts=_parts(problem, problem.N1 // heads),
    )
