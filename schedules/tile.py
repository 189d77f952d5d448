"""What the definition of the int8 matmul must know of its schedule, whatever the target."""

from __future__ import annotations

from dataclasses import dataclass

from .intrin.x86 import DotProduct

ROWS = "opferry.rows"
"""Attribute of the kernel: rows of its register tile."""


@dataclass(frozen=True)
class Tile:
    """How operands are packed, and which tile is full.

    A is padded to multiples of ``rows``, B packed [N/cols, K/group, cols, group].
    """

    rows: int
    cols: int
    dot: DotProduct
