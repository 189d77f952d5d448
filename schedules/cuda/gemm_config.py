"""How a block of the int8 matrix product is cut, by architecture and problem."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf
from typing import TYPE_CHECKING

from ...runtime.errors import UnsupportedError
from ..intrin import hopper
from ..intrin.cuda import CHUNK_BYTES as CHUNK
from .arch import ARCHS, WARP, Arch

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a block, in rows, columns and bytes of K, and how its warps divide it."""

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    warps_k: int = 1
    stages: int = 4
    wgmma: bool = False
    """Whether warpgroups multiply from shared memory; they stand below one another."""

    def __post_init__(self) -> None:
        """``UnsupportedError``, a `ValueError`, for what no kernel computes."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "wgmma" and value < 1:
                raise UnsupportedError(f"{self}: {field.name}: found {value}, allowed 1 or more")
        if self.wgmma:
            self._require_warpgroups()
        else:
            self._require_warps()

    def _require_warps(self) -> None:
        fragments = self.block_m % (16 * self.warps_m) == self.block_n % (16 * self.warps_n) == 0
        if not fragments or self.block_k % (32 * self.warps_k) or self.stages < 2:
            raise UnsupportedError(
                f"{self}: allowed 16 rows and 16 columns a warp or multiples, block_k by 32 for "
                f"each of warps_k, 2 stages or more"
            )

    def _require_warpgroups(self) -> None:
        fits = (self.warps_n, self.warps_k, self.block_k) == (1, 1, hopper.ROW_BYTES)
        fits = fits and self.warps_m % 4 == 0 and self.block_m == 16 * self.warps_m
        if not fits or self.stages < 3:
            raise UnsupportedError(
                f"{self}: allowed for warpgroups 16 rows and all columns a warp, "
                f"block_k {hopper.ROW_BYTES}, 3 stages or more"
            )
        # Instructions of as many columns or of the most; the epilogue stores 16 bytes of int8.
        if self.block_n % (16 if self.block_n <= hopper.COLUMNS else hopper.COLUMNS):
            raise UnsupportedError(
                f"{self}: found block_n {self.block_n}, allowed for warpgroups multiples of 16 up "
                f"to {hopper.COLUMNS}, beyond it of {hopper.COLUMNS}"
            )

    def require_fit(self, problem: Problem, arch: Arch) -> None:
        """``UnsupportedError`` unless ``arch`` has the instructions and ``problem`` the panels; the
        size of shared memory is the caller's business.
        """
        if not self.wgmma:
            return
        if not arch.wgmma:
            names = ", ".join(other.name for other in ARCHS.values() if other.wgmma)
            raise UnsupportedError(f"{self}: wgmma: found {arch.name}, allowed {names}")
        panels = problem.b_panels
        if panels and (self.block_n % panels.rows or self.block_k != panels.row_bytes):
            raise UnsupportedError(
                f"{self}: weights in panels: found block_n {self.block_n}, block_k {self.block_k}, "
                f"allowed multiples of {panels.rows} and {panels.row_bytes}"
            )

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * self.warps_k * WARP

    @property
    def warp_m(self) -> int:
        return self.block_m // self.warps_m

    @property
    def warp_n(self) -> int:
        return self.block_n // self.warps_n

    @property
    def stage_bytes(self) -> int:
        return (self.block_m + self.block_n) * self.block_k

    def shared_bytes(self, item: int) -> int:
        """Of the stages, or of what the epilogue puts in their place."""
        if self.warps_k > 1:
            after = self.warps_k * self.block_m * self.block_n * 4
        else:
            after = self.warps_m * self.warps_n * 16 * (self.warp_n * item + CHUNK)
        return max(self.barriers_at + self.stages * hopper.BARRIER_BYTES * self.wgmma, after)

    @property
    def barriers_at(self) -> int:
        """Offset of the stages' barriers in shared memory: behind the stages."""
        return self.stages * self.stage_bytes


_STREAMING = (
    GemmConfig(16, 16, 256, 1, 1, warps_k=8, stages=6),
    GemmConfig(16, 32, 256, 1, 1, warps_k=8, stages=6),
    GemmConfig(32, 32, 256, 1, 1, warps_k=8),
    GemmConfig(64, 32, 256, 1, 1, warps_k=8),
)
"""For as many rows as a tile has, or fewer: one tile reads a weight once."""

_TILES = (
    GemmConfig(128, 256, 64, 2, 4),
    GemmConfig(128, 128, 64, 2, 4),
    GemmConfig(64, 128, 64, 2, 2),
    GemmConfig(64, 64, 128, 2, 2),
    GemmConfig(32, 32, 256, 1, 1, warps_k=8),
)
"""Largest first: each byte in shared memory serves more products, but fewer blocks run at once."""

_WARPGROUP_TILES = (
    GemmConfig(128, 256, 128, 8, 1, wgmma=True),
    GemmConfig(128, 128, 128, 8, 1, stages=6, wgmma=True),
    GemmConfig(64, 128, 128, 4, 1, wgmma=True),
    GemmConfig(64, 64, 128, 4, 1, stages=6, wgmma=True),
)
"""Largest first; the last two leave room for a second block."""

_BUSY = 0.95
"""Share of the multiprocessors that must have enough blocks: two, or one of few rows and of the
larger tiles of warpgroups.
"""


def configure(problem: Problem, arch: Arch) -> dict[int | None, GemmConfig]:
    """Most rows -> how to cut that many, ascending; None: any number.

    The largest tile that leaves enough blocks. Few rows: warps split K, so that narrow tiles still
    give every multiprocessor a block. Where only the call knows the rows, it chooses between both.
    """
    m = problem.m if isinstance(problem.m, int) else None
    few = _STREAMING[-1].block_m
    if m is None:
        found = {few: _STREAMING[-1], None: (_WARPGROUP_TILES if arch.wgmma else _TILES)[1]}
    elif m <= few:
        found = {None: _streaming(problem, m, arch)}
    else:
        found = {None: _tiled(problem, m, arch)}
    return found if arch.cp_async else {m: replace(c, stages=2) for m, c in found.items()}


def _streaming(problem: Problem, m: int, arch: Arch) -> GemmConfig:
    """The widest of the lowest that fit, as long as every multiprocessor has a block."""
    fitting = [config for config in _STREAMING if config.block_m >= m]
    lowest = [config for config in fitting if config.block_m == fitting[0].block_m]
    enough = [c for c in lowest if _blocks(problem, m, c) >= _BUSY * arch.multiprocessors]
    return enough[-1] if enough else lowest[0]


def _tiled(problem: Problem, m: int, arch: Arch) -> GemmConfig:
    if arch.wgmma:
        tiles, filled = _WARPGROUP_TILES, arch.multiprocessors
    else:
        # A thread of the widest tile has no register left for copies that pass through it.
        tiles, filled = _TILES if arch.cp_async else _TILES[1:], 2 * arch.multiprocessors
    enough = (c for c in tiles if _blocks(problem, m, c) >= _BUSY * filled)
    return next(enough, tiles[-1])


def _blocks(problem: Problem, m: int, config: GemmConfig) -> float:
    batch = problem.batch if isinstance(problem.batch, int) else inf
    return batch * -(-m // config.block_m) * -(-problem.n // config.block_n)
