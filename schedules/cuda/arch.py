"""What NVIDIA GPUs have and can do, by architecture. The numbers are those of the CUDA C++
Programming Guide, "Compute Capabilities", the instructions those of the PTX ISA, the counts of
multiprocessors those of NVIDIA's product briefs and architecture papers of the GPU they name.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.target import Target

WARP = 32
"""Threads of a warp."""
BLOCK_THREADS = 1024
"""The most threads of a block."""
THREAD_REGISTERS = 255
"""The most 32-bit registers of a thread."""
STATIC_SHARED_BYTES = 48 * 1024
"""Shared memory that a block has without asking for more."""
GRID_YZ = 65535
"""The most blocks of a grid along y or z; along x there are 2^31 - 1."""

Shape = tuple[int, int, int]
"""(m, n, k) of one matrix instruction of a warp."""


@dataclass(frozen=True)
class Arch:
    """One architecture. Sizes of shared memory are bytes, registers have 32 bits."""

    name: str
    capability: tuple[int, int]
    shared_per_block: int
    """Dynamic shared memory that a block can ask for."""
    shared_per_sm: int
    """For all blocks of a multiprocessor; each takes 1 KiB of it for itself from sm_80 on."""
    threads_per_sm: int
    blocks_per_sm: int
    multiprocessors: int
    """Of one GPU of the architecture; others have more or fewer."""
    mma_int8: Shape
    """The largest ``mma.sync`` of s8 operands; s32 accumulators."""
    mma_float16: Shape
    """The largest ``mma.sync`` of f16 operands with f32 accumulators."""
    mma_bfloat16: Shape | None
    """The same of bf16 operands."""
    cp_async: bool
    """Copies from global to shared memory that bypass registers, in groups."""
    bulk_copy: bool = False
    """Copies of whole runs by the copy engine, completing on barriers in shared memory."""
    wgmma: bool = False
    """Matrix instructions of four warps that read shared memory themselves."""
    specific: bool = False
    """Code for it runs on its own compute capability alone (names that end in ``a``)."""
    registers_per_sm: int = 64 * 1024


def _kib(count: int) -> int:
    return count * 1024


_TURING = {
    "mma_int8": (8, 8, 16),
    "mma_float16": (16, 8, 8),
    "mma_bfloat16": None,
    "cp_async": False,
}
_AMPERE = {
    "mma_int8": (16, 8, 32),
    "mma_float16": (16, 8, 16),
    "mma_bfloat16": (16, 8, 16),
    "cp_async": True,
}

_HOPPER = ((9, 0), _kib(227), _kib(228), 2048, 32, 132)  # H100 SXM and H200

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_75", (7, 5), _kib(64), _kib(64), 1024, 16, 40, **_TURING),  # T4
        Arch("sm_80", (8, 0), _kib(163), _kib(164), 2048, 32, 108, **_AMPERE),  # A100
        Arch("sm_86", (8, 6), _kib(99), _kib(100), 1536, 16, 72, **_AMPERE),  # A10
        Arch("sm_89", (8, 9), _kib(99), _kib(100), 1536, 24, 58, **_AMPERE),  # L4
        Arch("sm_90", *_HOPPER, **_AMPERE, bulk_copy=True),
        Arch("sm_90a", *_HOPPER, **_AMPERE, bulk_copy=True, wgmma=True, specific=True),
    )
}
"""Architecture -> its record, oldest first: what opferry compiles for."""

DEFAULT = "sm_80"
"""What ``"cuda"`` means on a machine without a GPU."""


def of(target: Target) -> Arch:
    """The record of a resolved CUDA target."""
    return ARCHS[str(target.attrs["arch"])]
