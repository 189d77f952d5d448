"""The right operand of the int8 matrix product, packed once: at compile time where it is a
constant.

Panels [zb, N/NB, K/G, NB, G] hold NB columns in groups of G consecutive k, both zero-padded; NB and
G are the target's (`schedules.INT8_TILES`). Targets without a row there read b as [zb, N, K], rows
zero-padded to whole `ROW_BYTES`, or, where the target has them and b must be packed anyway, in the
panels of `schedules.INT8_PANELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr
from tvm.target import Target

from .. import schedules
from ..schedules.cuda.panels import Panels
from ..schedules.tile import Tile
from .dims import int64, int64s
from .op import Dim, te_kernel
from .orders import Entry, row_major

ROW_BYTES = 16
"""What the rows of an unpanelled weight are padded to: one vector access."""


@dataclass(frozen=True)
class Weight:
    """The right operand, packed (``tile`` set) or as it came (``tile`` None).

    Build it with `pack_weight`.
    """

    data: relax.Expr
    """int8 [batch, N/NB, K/G, NB, G] packed; otherwise any shape that ``entry`` reads, which is
    [batch, N, K padded], or in ``panels``, for targets with a kernel of their own.
    """
    excess: relax.Expr | None
    """int32 [batch, N padded to NB]: the surplus of the target's dot product, if it has one."""
    batch: Dim
    n: Dim
    k: Dim
    entry: Entry
    tile: Callable[[Dim], Tile] | None
    """``tile(M)``: the register tile for M rows."""
    panels: Panels | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether N and K are known now."""
        return isinstance(self.n, int) and isinstance(self.k, int)

    @property
    def padded_n(self) -> Dim:
        if self.tile is None:
            return self.n
        cols = self.tile(1).cols
        return -(-self.n // cols) * cols

    def columns(self, bb: relax.BlockBuilder, values: np.ndarray | relax.Expr) -> relax.Expr:
        """Values per column [..., N], zero-padded to be read at ``At.col``."""
        if isinstance(values, np.ndarray):
            pad = self.padded_n - values.shape[-1]
            return relax.const(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)]))
        if self.tile is None or self.padded_n == self.n:
            return values

        def pad_columns(x: te.Tensor) -> te.Tensor:
            def value(*index):
                *head, n = index
                return tirx.if_then_else(n < self.n, x[(*head, n)], tirx.const(0, x.dtype))

            return te.compute((*x.shape[:-1], int64(self.padded_n)), value, name="pad_columns")

        return te_kernel(bb, "int8_matmul.pad_columns", pad_columns, values)


def pack_weight(
    bb: relax.BlockBuilder,
    target: Target,
    source: np.ndarray | relax.Expr,
    *,
    n: Dim,
    k: Dim,
    batch: Dim = 1,
    entry: Entry = row_major,
    panel: int | None = None,
) -> Weight:
    """Pack the matrices b[z, k, n] = ``entry(source, z, n, k)``, int8.

    ``entry`` is index arithmetic that holds for a NumPy array under index arrays and for a TE
    tensor under TIR expressions: an array is packed here and now, a tensor by a kernel. ``panel``
    fixes the panel's columns where the output's memory order asks for it (32 for COL32).
    """
    if not (isinstance(n, int) and isinstance(k, int)):
        data = relax.const(source) if isinstance(source, np.ndarray) else source
        return Weight(data, None, batch, n, k, entry, None)
    if target.kind.name not in schedules.INT8_TILES:
        panels = schedules.INT8_PANELS[target.kind.name](target)
        if panels is None or _is_rows(source, k, entry):
            return Weight(_rows(bb, source, n, k, batch, entry), None, batch, n, k, row_major, None)
        data = _in_panels(bb, panels, source, n, k, batch, entry)
        return Weight(data, None, batch, n, k, panels.entry, None, panels)

    def tile(m: Dim) -> Tile:
        return schedules.INT8_TILES[target.kind.name](target, m, n, panel)

    shape = tile(1)
    cols, dot = shape.cols, shape.dot
    panels, groups = -(-n // cols), dot.groups(k)
    if isinstance(source, np.ndarray):
        b = _padded(source, entry, (batch, n, k), panels * cols, groups * dot.group)
        sums = b.sum(axis=2, dtype=np.int64).astype(np.int32)
        packed = b.reshape(batch, panels, cols, groups, dot.group).transpose(0, 1, 3, 2, 4)
        data = relax.const(np.ascontiguousarray(packed))
        excess = relax.const(dot.excess(sums).astype(np.int32)) if dot.a_offset else None
        return Weight(data, excess, batch, n, k, entry, tile)

    def at(b, z, column, depth):
        inside = []
        if panels * cols != n:
            inside.append(column < n)
        if groups * dot.group != k:
            inside.append(depth < k)
        value = entry(b, z, column, depth)
        return _or_zero(value, tirx.all(*inside)) if inside else value

    def pack(b: te.Tensor) -> te.Tensor:
        return te.compute(
            int64s(batch, panels, groups, cols, dot.group),
            lambda z, no, ko, ni, ki: at(b, z, no * cols + ni, ko * dot.group + ki),
            name="pack_weight",
        )

    def excess_of(packed: te.Tensor) -> te.Tensor:
        ko = te.reduce_axis((int64(0), int64(groups)), "ko")
        ki = te.reduce_axis((int64(0), int64(dot.group)), "ki")
        sums = te.compute(
            int64s(batch, panels * cols),
            lambda z, n: te.sum(packed[z, n // cols, ko, n % cols, ki].astype("int32"), [ko, ki]),
            name="column_sum",
        )
        return te.compute(sums.shape, lambda z, n: dot.excess(sums[z, n]), name="excess")

    data = te_kernel(bb, "int8_matmul.pack_weight", pack, source)
    excess = te_kernel(bb, "int8_matmul.excess", excess_of, data) if dot.a_offset else None
    return Weight(data, excess, batch, n, k, entry, tile)


def _is_rows(source: np.ndarray | relax.Expr, k: int, entry: Entry) -> bool:
    """Whether what comes with the call has rows that need no packing."""
    return not isinstance(source, np.ndarray) and entry is row_major and k % ROW_BYTES == 0


def _rows(
    bb: relax.BlockBuilder,
    source: np.ndarray | relax.Expr,
    n: int,
    k: int,
    batch: Dim,
    entry: Entry,
) -> relax.Expr:
    """int8 [batch, N, K padded to ROW_BYTES]."""
    padded_k = -(-k // ROW_BYTES) * ROW_BYTES
    if isinstance(source, np.ndarray):
        return relax.const(_padded(source, entry, (batch, n, k), n, padded_k))
    if _is_rows(source, k, entry):
        return source

    def rows(b: te.Tensor) -> te.Tensor:
        def value(z, row, depth):
            inside = entry(b, z, row, depth)
            return inside if padded_k == k else _or_zero(inside, depth < k)

        return te.compute(int64s(batch, n, padded_k), value, name="pack_weight")

    return te_kernel(bb, "int8_matmul.pack_weight", rows, source)


def _in_panels(
    bb: relax.BlockBuilder,
    panels: Panels,
    source: np.ndarray | relax.Expr,
    n: int,
    k: int,
    batch: Dim,
    entry: Entry,
) -> relax.Expr:
    """int8, as `Panels` says."""
    along_n, along_k = panels.count(n, k)
    if isinstance(source, np.ndarray):
        rows, depth = along_n * panels.rows, along_k * panels.row_bytes
        b = _padded(source, entry, (batch, n, k), rows, depth)
        z, *place = np.ogrid[:batch, :along_n, :along_k, : panels.rows, : panels.row_bytes]
        return relax.const(b[(z, *panels.stored(*place))])

    def pack(b: te.Tensor) -> te.Tensor:
        def value(z, *place):
            row, depth = panels.stored(*place)
            return _or_zero(entry(b, z, row, depth), tirx.all(row < n, depth < k))

        shape = int64s(batch, along_n, along_k, panels.rows, panels.row_bytes)
        return te.compute(shape, value, name="pack_weight")

    return te_kernel(bb, "int8_matmul.pack_weight", pack, source)


def _padded(
    source: np.ndarray, entry: Entry, sizes: tuple[int, int, int], rows: int, depth: int
) -> np.ndarray:
    """int8 [batch, rows, depth]: the matrices of ``sizes`` (batch, N, K), then zeros."""
    batch, n, k = sizes
    b = np.zeros((batch, rows, depth), np.int8)
    b[:, :n, :k] = entry(source, *np.ogrid[:batch, :n, :k])
    return b


def _or_zero(value: Expr, inside: Expr) -> Expr:
    return tirx.if_then_else(inside, value, tirx.const(0, "int8"))
