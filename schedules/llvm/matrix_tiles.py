"""Whether attention tasks take matrix tiles of bfloat16 (AMX), and how many rows each."""

from __future__ import annotations

from tvm.target import Target

from ..intrin import x86_amx
from .vector import vector_unit


def available(target: Target) -> bool:
    """Whether ``target`` has such tiles, beside vectors that are as wide as their rows."""
    return vector_unit(target).lanes == x86_amx.LANES and x86_amx.available_bf16(target)


def groups(most: int, width: int, rows: int, tasks: int) -> int:
    """Groups of ``width`` rows for each task: ``most``, halved down to 2 until ``rows`` rows are so
    many ``tasks``.
    """
    found = most
    while found > 2 and rows < tasks * found * width:
        found //= 2
    return found
