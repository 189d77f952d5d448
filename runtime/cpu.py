"""What this CPU can execute, in LLVM's names, and how many of its cores this process may use."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

LINUX_FLAGS = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "lzcnt": "abm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "avx": "avx",
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avx512f": "avx512f",
    "avx512dq": "avx512dq",
    "avx512cd": "avx512cd",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
"""LLVM feature -> flag in /proc/cpuinfo, for the instructions a compiler emits on its own."""


@functools.cache
def features() -> frozenset[str] | None:
    """The host's features among ``LINUX_FLAGS``; ``None`` where the system does not tell (not x86
    Linux).
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next(
        (set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), None
    )
    if flags is None:
        return None
    found = {name for name, flag in LINUX_FLAGS.items() if flag in flags}
    if "amx-tile" in found and not _tiles_permitted():
        found -= {"amx-tile", "amx-int8", "amx-bf16"}
    return frozenset(found)


_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
"""System call of x86-64 Linux, its request for a part of the processor's state, and that part."""


def _tiles_permitted() -> bool:
    """Whether Linux lets this process use the matrix tiles of AMX, which it wants to be asked."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def architecture() -> str:
    """Machine name, e.g. ``x86_64`` or ``aarch64``."""
    return canonical_architecture(platform.machine())


def canonical_architecture(name: str) -> str:
    """One name for what systems and compilers call differently."""
    return {"AMD64": "x86_64", "amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def available_cores() -> int:
    """Cores this process may use: its affinity, cut to the CPU quota of its control group."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)
