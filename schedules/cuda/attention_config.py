"""How a block of the fused attention kernel is cut, by architecture and problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UnsupportedError
from ..intrin.cuda import CHUNK_BYTES
from .arch import WARP, Arch

if TYPE_CHECKING:
    from ...relay_ops.speed_fusion_attention import AttentionProblem

_DEPTH = 128
"""The most elements of D in a tile of the ring."""
_FEW_ROWS = 16
"""One fragment of rows: up to here a block is one warp and the keys may be divided."""
_SPLIT_BLOCKS = 528
"""Blocks that fill a large GPU: four on each of 132 multiprocessors."""
_SPLIT_KEYS = 256
"""Each block of a divided sequence has at least so many keys."""
_HELD_QUERIES = 128
"""The most columns of queries, of all row tiles, that a warp keeps in registers."""
_WARPGROUP_KEYS = {
    (64, None): 64,
    (64, "two"): 64,
    (64, "one"): 64,
    (128, None): 48,
    (128, "two"): 32,
}
"""D, how many keys a draw of dropout serves -> keys of a tile of a warpgroup with 128 rows, such
that its registers hold scores, weights, output and what else a mode needs. With D = 128 and a draw
for every key even 32 spill, and of 16 ptxas makes the products wait for each other.
"""
_WARPGROUP_SLOTS = 8
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of a block. D is cut into ``steps`` parts of ``depth``, the last one padded with zeros;
    a block computes ``value_steps`` of these parts of the output.
    """

    tensor_cores: bool
    warps: int
    row_tiles: int
    """16-row fragments of a warp."""
    keys: int
    depth: int
    steps: int
    value_steps: int
    slices: int
    """Blocks that share the rows of a tile and divide the columns of the output."""
    slots: int
    """Tiles of the ring, ``keys x depth`` each."""
    item_bytes: int
    """Of an element in shared memory."""
    piece: int
    """Elements that one copy moves."""
    asynchronous: bool
    """Copies to shared memory bypass the registers."""
    queries_in_registers: bool
    heads: int = 1
    """Query heads whose rows share a tile: a divisor of N1 / N2."""
    split_blocks: int = 0
    """Divide the keys until there are so many blocks; 0: never."""
    split_keys: int = _SPLIT_KEYS
    wgmma: bool = False
    """Warpgroups multiply from shared memory, in which rows are 64 elements wide."""

    def __post_init__(self) -> None:
        fits = self.depth == 64 and self.warps % 4 == 0 and self.keys % 16 == 0 and self.slots >= 3
        if self.wgmma and not fits:
            raise UnsupportedError(
                f"{self}: allowed for warpgroups depth 64, warps by 4, keys by 16, 3 slots or more"
            )

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def warp_rows(self) -> int:
        return 16 * self.row_tiles

    @property
    def rows(self) -> int:
        return self.warps * self.warp_rows

    @property
    def ahead(self) -> int:
        """Slots between the one that is used and the one that is filled meanwhile: products of
        warpgroups may still read the last one.
        """
        return self.slots - (2 if self.wgmma else 1)

    @property
    def width(self) -> int:
        """Columns of the output that a block computes."""
        return self.value_steps * self.depth

    @property
    def query_elements(self) -> int:
        return self.rows * self.steps * self.depth

    @property
    def slot_elements(self) -> int:
        return self.keys * self.depth

    @property
    def weight_elements(self) -> int:
        """Weights pass through shared memory where no fragment takes them."""
        return 0 if self.tensor_cores else self.rows * self.keys

    @property
    def shared_elements(self) -> int:
        return self.query_elements + self.slots * self.slot_elements + self.weight_elements

    @property
    def shared_bytes(self) -> int:
        return self.shared_elements * self.item_bytes


def configure(problem: AttentionProblem, arch: Arch) -> AttentionConfig:
    """The largest tile of rows that is needed and fits; then the most keys, then the deepest ring,
    with which two blocks share a multiprocessor, or else that one block can have.

    128 rows in four warps halve the traffic from shared memory against 64; with D above 128 their
    accumulators would exceed the registers, as they would with D above 64 where every pair has a
    random number of its own.
    """
    if (found := _warpgroups(problem, arch)) is not None:
        return found
    alone = draws_alone(problem)
    padded = _up(problem.D, 16)
    steps = -(-padded // _DEPTH)
    depth = _up(-(-padded // steps), 16)
    wants_output = "attention_out" in problem.outputs
    slices = -(-steps // 2) if wants_output else 1
    value_steps = -(-steps // slices) if wants_output else 0
    heads, rows = _rows(problem)
    cut = elements(problem.dtype, arch, problem.D) | {
        "depth": depth,
        "steps": steps,
        "value_steps": value_steps,
        "slices": slices,
    }
    for warps, row_tiles in ((4, 2), (4, 1), (2, 1), (1, 1)):
        held = warps * row_tiles * 16
        full = steps > 1 or (alone and depth > 64)
        if (row_tiles == 2 and full) or (held > _FEW_ROWS and held >= 2 * rows):
            continue
        columns = value_steps * depth * row_tiles
        options = rings(
            _key_tiles(cut["tensor_cores"], arch, columns, steps > 2 or alone),
            warps=warps,
            row_tiles=row_tiles,
            heads=heads,
            split_blocks=_SPLIT_BLOCKS if rows <= _FEW_ROWS else 0,
            **cut,
        )
        shared = [c for c in options if c.keys >= 32 and _two_share(c, arch)]
        single = [c for c in options if c.slots == 2 and c.shared_bytes <= arch.shared_per_block]
        if found := shared or single:
            return found[0]
    raise UnsupportedError(
        f"{problem.label}: found D = {problem.D} in {problem.dtype}, allowed what "
        f"{arch.shared_per_block} bytes of shared memory hold on {arch.name}"
    )


def _warpgroups(problem: AttentionProblem, arch: Arch) -> AttentionConfig | None:
    """One warpgroup of 128 rows, two blocks of which share a multiprocessor; None where others do
    better, or nobody knows how.
    """
    heads, rows = _rows(problem)
    draw = None if problem.keep_prob >= 1 else "one" if draws_alone(problem) else "two"
    keys = _WARPGROUP_KEYS.get((problem.D, draw))
    if not arch.wgmma or problem.dtype == "float32" or keys is None or rows <= 64:
        return None
    steps = problem.D // 64
    return AttentionConfig(
        tensor_cores=True,
        warps=4,
        row_tiles=2,
        keys=keys,
        depth=64,
        steps=steps,
        value_steps=steps if "attention_out" in problem.outputs else 0,
        slices=1,
        slots=_WARPGROUP_SLOTS,
        item_bytes=2,
        piece=8,
        asynchronous=True,
        queries_in_registers=False,
        heads=heads,
        wgmma=True,
    )


def on_tensor_cores(dtype: str, arch: Arch) -> bool:
    """Whether products of ``dtype`` run there, with nothing rounded below float32."""
    shapes = {"float16": arch.mma_float16, "bfloat16": arch.mma_bfloat16, "float32": None}
    return shapes[dtype] is not None


def elements(dtype: str, arch: Arch, *sizes: int) -> dict[str, Any]:
    """The fields of a configuration that depend on the elements and on how they are copied:
    ``tensor_cores``, ``item_bytes``, ``piece``, ``asynchronous``. Rows of the tensors begin at
    multiples of ``sizes``.
    """
    tensor_cores = on_tensor_cores(dtype, arch)
    source, item = _ITEM_BYTES[dtype], 2 if tensor_cores else 4
    piece = max(
        p for p in (1, 2, 4, 8) if not any(size % p for size in sizes) and p * item <= CHUNK_BYTES
    )
    return {
        "tensor_cores": tensor_cores,
        "item_bytes": item,
        "piece": piece,
        "asynchronous": arch.cp_async and source == item and piece * item >= 4,
    }


def rings(key_tiles: Iterable[int], **fields: Any) -> list[AttentionConfig]:
    """Configurations of the given fields, best first: the most keys, then the deepest ring."""
    queries = fields["steps"] * fields["depth"] * fields["row_tiles"]
    return [
        AttentionConfig(
            keys=keys,
            slots=slots,
            queries_in_registers=fields["tensor_cores"] and queries <= _HELD_QUERIES,
            **fields,
        )
        for keys in key_tiles
        for slots in ((4, 2) if fields["asynchronous"] else (2,))
    ]


def draws_alone(problem: AttentionProblem) -> bool:
    """Whether dropout draws a random number for every key; where the pairs of every row begin at an
    even number, one draw serves two keys.
    """
    even = problem.layout != "TND" and isinstance(problem.S2, int) and problem.S2 % 2 == 0
    return problem.keep_prob < 1 and not even


def _key_tiles(tensor_cores: bool, arch: Arch, columns: int, crowded: bool) -> tuple[int, ...]:
    """Keys of a tile, best first. More than 128 ``columns`` of output in the fragments of a warp
    leave fewer registers for scores, and ``crowded`` ones fewer still; copies by way of registers
    need some, too.
    """
    if not tensor_cores:
        return (32, 16, 8)
    old = not arch.cp_async
    if columns <= 128:
        return (64, 32, 16)[crowded and old :]
    return (48, 32, 16)[crowded + old :]


def _two_share(config: AttentionConfig, arch: Arch) -> bool:
    """Two blocks fit into a multiprocessor: one multiplies while the other one takes weights."""
    own = 1024 if arch.cp_async else 0  # what a block takes for itself came with sm_80, too
    return 2 * (config.shared_bytes + own) <= arch.shared_per_sm


def _rows(problem: AttentionProblem) -> tuple[int, int]:
    """Heads that share a tile, and the rows it would need to hold all of them."""
    if problem.layout == "TND" or not isinstance(problem.S1, int):
        return 1, 1 << 20
    group = problem.N1 // problem.N2
    heads = [h for h in range(1, group + 1) if group % h == 0 and h * problem.S1 <= _FEW_ROWS]
    shared = max(heads, default=1)
    return shared, shared * problem.S1


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
