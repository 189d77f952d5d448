"""What is measured once, in a process that has done nothing else: memory and compile time."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

from .check import check
from .shapes import Problem


def memory_bytes(problem: Problem) -> float:
    """By how much the process grows at its peak during the first call, beyond the outputs.

    The inputs are there before. What the call leaves behind counts as well as what it frees: the
    thread pool's stacks, tiles, scores.
    """
    from . import ours

    candidate = ours.build(problem)[0]
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is allocated now
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _status("VmRSS")
    outputs = candidate.call()
    grown = _status("VmHWM") - before
    check(problem, candidate.result())
    return float(grown - sum(map(_bytes, outputs if _is_several(outputs) else [outputs])))


def compile_seconds(problem: Problem) -> float:
    from . import ours

    return ours.compile_seconds(problem)


MEASURES = {"memory": memory_bytes, "compile": compile_seconds}


def _status(field: str) -> int:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) << 10


def _is_several(outputs) -> bool:
    return not hasattr(outputs, "shape")


def _bytes(tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.bits // 8
