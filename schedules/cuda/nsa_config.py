"""How a block of the NSA compression attention kernel is cut, by architecture and problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime.errors import UnsupportedError
from .arch import Arch
from .attention_config import AttentionConfig, elements, rings

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

_WIDTH = 256
"""The most columns of output in the registers of a warp with 16 rows; half with 32."""
_ENOUGH_BLOCKS = (1024, 512)
"""Selection blocks scored at once, where shared memory is to be shared by two thread blocks."""
_FEWER_BLOCKS = (1024, 512, 256, 128, 64, 32)
_CHOSEN = (1024, 512, 256, 128, 64, 32)
"""Indices that one of several passes finds."""
_BLOCK_RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that each block takes for itself."""
_FLOAT = 4


@dataclass(frozen=True)
class NsaConfig:
    """Tiles of a block, and the floats behind them in shared memory:

    sums   [units][keys]          probabilities of a key tile, summed over ``unit_rows`` heads
    scores [positions][cells]     ``listed`` best blocks so far, then ``blocks`` of the present turn
    places [positions][listed]    the indices of the former
    next   [positions][2][listed] scores and indices that take their place
    last   [positions][2]         score and index of the last one that a pass chose
    """

    tiles: AttentionConfig
    """Both products; query heads of a group are consecutive rows."""
    group: int
    """G: rows of a query position."""
    blocks: int
    """Selection blocks scored in one turn over the keys."""
    listed: int
    """Best blocks that are carried from turn to turn; 0 where one turn is always enough."""
    chosen: int
    """Best blocks that one pass over all turns finds; the next pass goes on behind the last."""
    passes: int
    """As many as there can be."""

    @property
    def positions(self) -> int:
        """Query positions of a tile."""
        return self.tiles.rows // self.group

    @property
    def unit_rows(self) -> int:
        """Heads that one warp adds up."""
        return min(self.group, self.tiles.warp_rows)

    @property
    def units(self) -> int:
        return self.tiles.rows // self.unit_rows

    @property
    def cells(self) -> int:
        """Candidates of a position, in vectors of four."""
        return -(-(self.listed + self.blocks) // 4) * 4

    @property
    def first_sum(self) -> int:
        """Float of shared memory where ``sums`` begins; ``scores``, ``places``, ``next`` follow."""
        return self.tiles.shared_bytes // _FLOAT

    @property
    def first_score(self) -> int:
        return self.first_sum + self.units * self.tiles.keys

    @property
    def first_place(self) -> int:
        return self.first_score + self.positions * self.cells

    @property
    def first_next(self) -> int:
        return self.first_place + self.positions * self.listed

    @property
    def first_last(self) -> int:
        return self.first_next + self.positions * 2 * self.listed

    @property
    def shared_bytes(self) -> int:
        return _FLOAT * (self.first_last + self.positions * 2 * (self.passes > 1))

    @property
    def shared_elements(self) -> int:
        return self.shared_bytes // self.tiles.item_bytes


def configure(problem: Problem, arch: Arch) -> NsaConfig:
    """128 rows where the output leaves room in the registers, since every block reads all keys; two
    blocks a multiprocessor where that leaves room for the scores. One pass, unless the indices of
    one position alone fill the shared memory.
    """
    wants_blocks = "topk_indices_out" in problem.outputs
    most = -(-problem.cmp_skv_limit // problem.blocks_stride)
    wanted = min(problem.block_count, most)
    half = arch.shared_per_sm // 2 - _BLOCK_RESERVED
    everything = _tilings(problem, arch)
    large = [tiles for tiles in everything if tiles.rows >= 64]
    searches = [
        (half, large, _ENOUGH_BLOCKS, wanted),
        (arch.shared_per_block, large, _ENOUGH_BLOCKS, wanted),
        (arch.shared_per_block, everything, _FEWER_BLOCKS, wanted),
    ]
    searches += [
        (arch.shared_per_block, everything, _FEWER_BLOCKS, chosen)
        for chosen in _CHOSEN
        if chosen < wanted
    ]
    for limit, tilings, sizes, chosen in searches:
        for tiles in tilings:
            for blocks in (*sizes, most) if wants_blocks else (0,):
                whole = blocks >= most or not wants_blocks
                config = NsaConfig(
                    tiles=tiles,
                    group=problem.group,
                    blocks=min(blocks, most),
                    listed=0 if whole else chosen,
                    chosen=chosen,
                    passes=-(-wanted // chosen),
                )
                if config.shared_bytes <= limit:
                    return config
    raise UnsupportedError(
        f"{problem.label}: found head sizes {problem.head_size} and {problem.value_size} in "
        f"{problem.dtype}, {problem.group} query heads to a key head and select_block_count "
        f"{problem.block_count}, allowed what {arch.shared_per_block} bytes of shared memory hold "
        f"on {arch.name}"
    )


def _tilings(problem: Problem, arch: Arch) -> list[AttentionConfig]:
    """Tiles of whole query positions, best first."""
    wants_out = "attention_out" in problem.outputs
    value_size = problem.value_size if wants_out else 0
    depth = _depth(problem.head_size, value_size)
    steps, value_steps = -(-problem.head_size // depth), -(-value_size // depth)
    slices = -(-value_steps // max(1, _WIDTH // depth)) if wants_out else 1
    value_steps = -(-value_steps // slices)
    cut = elements(problem.dtype, arch, problem.head_size, problem.value_size) | {
        "depth": depth,
        "steps": steps,
        "value_steps": value_steps,
        "slices": slices,
    }
    found = []
    for warps, row_tiles in ((4, 2), (4, 1), (2, 1), (1, 1)):
        rows = warps * row_tiles * 16
        wide = value_steps * depth * row_tiles
        if rows % problem.group or (row_tiles == 2 and (wide > _WIDTH or not cut["asynchronous"])):
            continue
        # Output and queries in registers leave fewer of them for scores.
        most = 32 if not cut["tensor_cores"] or wide > 128 else 48 if row_tiles == 2 else 64
        key_tiles = [keys for keys in (64, 48, 32, 16) if keys <= most]
        found += rings(key_tiles, warps=warps, row_tiles=row_tiles, **cut)
    return found


def _depth(head_size: int, value_size: int) -> int:
    """Columns of a tile of the ring: little padding, then few tiles."""

    def cost(depth: int) -> int:
        tiles = -(-head_size // depth) - (-value_size // depth)
        return tiles * (depth + 16)

    return min(range(16, 129, 16), key=cost)
