"""The int8 matrix product that the quantised operators share.

    dot[z, m, n] = sum_k int32(a[z, m, k]) * int32(b[z, k, n])          exact, modulo 2^32
    y[z, m, n]   = epilogue(dot[z, m, n], at, *operands)                fused, any dtype

b is packed once, at compile time where it is a constant, into panels [zb, N/NB, K/G, NB, G] of NB
columns and groups of G consecutive k, both zero-padded; a is packed by rows with K padded alike.
NB, G and the packing of a are the target's (`schedules.INT8_TILES`). Where the target's dot product
takes a shifted a, the surplus is a vector per column of b, subtracted before the epilogue.

Targets without a row there have a kernel of their own instead (`schedules.TIR_BUILDERS`), which is
given a `Problem`; b is then stored [zb, N, K], rows zero-padded to whole `ROW_BYTES`, or, where the
target has them and b must be packed anyway, in the panels of `schedules.INT8_PANELS`.

`Weight` and `int8_matmul` take batched matrices; N and K that are only known at the call lead to a
plain kernel without packing. M and the batch may be symbolic in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr
from tvm.target import Target

from .. import schedules
from ..schedules.cuda.panels import Panels
from ..schedules.tile import ROWS, Tile
from .dims import int64, is_one
from .op import Dim, te_kernel, tir_kernel
from .orders import COLS, Order

ROW_BYTES = 16
"""What the rows of an unpanelled weight are padded to: one vector access."""


@dataclass(frozen=True)
class At:
    """Where an entry of the product stands, for an epilogue that reads operands."""

    z: Expr
    row: Expr
    """In [0, M): rows of padding repeat the last one."""
    col: Expr
    """Into vectors of `Weight.columns`, which are padded like the weight."""
    n: Expr
    """In [0, N): columns of padding repeat the last one."""


Entry = Callable[..., Expr]
"""``entry(tensor, z, i, j)``: element (i, j) of matrix z of a tensor, wherever it is stored."""

Epilogue = Callable[..., Expr]
"""``epilogue(acc, at, *operands)``: the output element for the int32 ``acc`` standing ``at``."""


BatchMap = Callable[[Expr], Expr]
"""Matrix of an operand for entry z of the result's batch."""


def row_major(t, z, i, j):
    """Entry of matrices [z, i, j]."""
    return t[z, i, j]


def transposed(t, z, i, j):
    """Entry of matrices stored [z, j, i]."""
    return t[z, j, i]


def col32(t, z, i, j):
    """Entry of COL32 matrices, stored [z, j/32, i, 32]."""
    return t[z, j // COLS, i, j % COLS]


@dataclass(frozen=True)
class Left:
    """The left operand: matrices a[z, m, k] = ``entry(data, z, m, k)``, int8."""

    data: relax.Expr
    m: Dim
    batch: Dim = 1
    entry: Entry = row_major


@dataclass(frozen=True)
class Problem:
    """What the builder of a TIR kernel is told: y = epilogue(a @ b), one matrix for each of
    ``batch``.

    The kernel's parameters are the buffers a, b, the operands and y, in this order, of the given
    types. Dimensions and index maps may use the graph's symbols; `op.tir_kernel` binds them.
    """

    batch: Dim
    m: Dim
    n: int
    k: int
    a: relax.TensorType
    """int8; entry (z, m, k) is ``a_entry(buffer, a_batch(z), m, k)``."""
    a_entry: Entry
    a_batch: BatchMap
    a_run: int
    """Consecutive k, from every multiple of it on, that are consecutive bytes of ``a``: 1 tells
    nothing.
    """
    b: relax.TensorType
    """int8, matrix z is ``b_batch(z)``: [zb, N, K padded to ROW_BYTES with zeros], or in the panels
    of the target.
    """
    b_batch: BatchMap
    operands: tuple[relax.TensorType, ...]
    y: relax.TensorType
    """[batch, M, N], or [batch, N/32, M, 32] in COL32."""
    order: Order
    epilogue: Epilogue
    """``epilogue(acc, at(z, row, n), *operand_buffers)`` for z, row and n inside y."""
    a_row_run: int = 1
    """Consecutive rows, from every multiple of it on, whose entries at one k are consecutive bytes
    of ``a``: 1 tells nothing.
    """
    live_rows: Callable[..., Expr] | None = None
    """``live_rows(*operand_buffers)``, int64: nobody reads y from this row on, so that nothing has
    to be computed there; None: all are read.
    """
    b_panels: Panels | None = None
    """Of b, where it is in those of a CUDA target."""

    @property
    def b_entry(self) -> Entry:
        """``b_entry(buffer, zb, n, k)``: element of b, for k up to ``b_k``, on a CUDA target."""
        return self.b_panels.entry if self.b_panels else row_major

    @property
    def b_k(self) -> int:
        """K with the zeros that b is stored with, on a CUDA target."""
        stored = int(self.b.shape[2])
        return stored * self.b_panels.row_bytes if self.b_panels else stored

    def at(self, z: Expr, row: Expr, n: Expr, col: Expr | None = None) -> At:
        """What the epilogue is told of entry (z, row, n), or of ``col`` in the padding of a panel,
        for which n stands.
        """
        return At(z, row, n if col is None else col, n)

    def y_index(self, z: Expr, row: Expr, n: Expr) -> list[Expr]:
        """Where entry (z, row, n) lies in y."""
        if self.order is Order.COL32:
            return [z, n // COLS, row, n % COLS]
        return [z, row, n]


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
        z, rows, ks = np.ogrid[:batch, :n, :k]
        b = np.zeros((batch, panels * cols, groups * dot.group), np.int8)
        b[:, :n, :k] = entry(source, z, rows, ks)
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
        return tirx.if_then_else(tirx.all(*inside), value, _i8(0)) if inside else value

    def pack(b: te.Tensor) -> te.Tensor:
        return te.compute(
            _dims(batch, panels, groups, cols, dot.group),
            lambda z, no, ko, ni, ki: at(b, z, no * cols + ni, ko * dot.group + ki),
            name="pack_weight",
        )

    def excess_of(packed: te.Tensor) -> te.Tensor:
        ko = te.reduce_axis((int64(0), int64(groups)), "ko")
        ki = te.reduce_axis((int64(0), int64(dot.group)), "ki")
        sums = te.compute(
            _dims(batch, panels * cols),
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
        z, rows, ks = np.ogrid[:batch, :n, :k]
        b = np.zeros((batch, n, padded_k), np.int8)
        b[:, :, :k] = entry(source, z, rows, ks)
        return relax.const(b)
    if _is_rows(source, k, entry):
        return source

    def rows(b: te.Tensor) -> te.Tensor:
        def value(z, row, depth):
            inside = entry(b, z, row, depth)
            return inside if padded_k == k else tirx.if_then_else(depth < k, inside, _i8(0))

        return te.compute(_dims(batch, n, padded_k), value, name="pack_weight")

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
        z, rows, ks = np.ogrid[:batch, :n, :k]
        b = np.zeros((batch, along_n * panels.rows, along_k * panels.row_bytes), np.int8)
        b[:, :n, :k] = entry(source, z, rows, ks)
        z, *place = np.ogrid[:batch, :along_n, :along_k, : panels.rows, : panels.row_bytes]
        return relax.const(b[(z, *panels.stored(*place))])

    def pack(b: te.Tensor) -> te.Tensor:
        def value(z, *place):
            row, depth = panels.stored(*place)
            return tirx.if_then_else(tirx.all(row < n, depth < k), entry(b, z, row, depth), _i8(0))

        shape = _dims(batch, along_n, along_k, panels.rows, panels.row_bytes)
        return te.compute(shape, value, name="pack_weight")

    return te_kernel(bb, "int8_matmul.pack_weight", pack, source)


def int8_matmul(
    bb: relax.BlockBuilder,
    target: Target,
    kernel: str,
    left: Left,
    weight: Weight,
    epilogue: Epilogue,
    *,
    operands: Sequence[relax.Expr] = (),
    order: Order = Order.ROW,
    batch: Dim | None = None,
    left_batch: BatchMap | None = None,
    weight_batch: BatchMap | None = None,
    live_rows: tuple[relax.Expr, int] | None = None,
) -> relax.Expr:
    """Emit ``left @ weight`` with its epilogue as the kernel ``kernel`` (``<kernel>_plain`` where N
    or K is only known at the call).

    Args:
        epilogue: see `Epilogue`; its dtype is the output's. ``operands`` reach it as TE tensors.
        order: of the result. ROW gives [batch, M, N], COL32 [batch, N/32, M, 32], for which the
            weight must have been packed in panels of 32.
        batch: of the result, that of ``left`` by default.
        left_batch, weight_batch: matrix of each operand for batch entry z; by default z itself,
            or 0 where the operand has batch 1.
        live_rows: an int64 vector and the place in it of a number of rows, known to the device:
            nobody reads the rest of the result. Targets without a kernel of their own compute it.
    """
    batch = left.batch if batch is None else batch
    left_batch = left_batch or _batch_map(left.batch)
    weight_batch = weight_batch or _batch_map(weight.batch)
    tile = None if weight.tile is None else weight.tile(left.m)
    if weight.is_fixed and (tile is None or tile.dot.in_tiles):
        live = None
        if live_rows is not None:
            counts, place = live_rows
            operands = [*operands, counts]
            live, epilogue = _last_operand(place), _without_last_operand(epilogue)
        types = tuple(operand.ty for operand in operands)
        shape = _dims(batch, left.m, weight.n)
        if order is Order.COL32:
            shape = _dims(batch, weight.n // COLS, left.m, COLS)
        y = relax.TensorType(shape, _epilogue_dtype(epilogue, types))
        problem = Problem(
            batch=batch,
            m=left.m,
            n=weight.n,
            k=weight.k,
            a=left.data.ty,
            a_entry=left.entry,
            a_batch=left_batch,
            a_run={row_major: weight.k, col32: COLS}.get(left.entry, 1),
            b=weight.data.ty,
            b_batch=weight_batch,
            operands=types,
            y=y,
            order=order,
            epilogue=epilogue,
            a_row_run=left.m if left.entry is transposed and isinstance(left.m, int) else 1,
            live_rows=live,
            b_panels=weight.panels,
        )
        func = schedules.tir_builder("int8_matmul", target)(problem, target)
        return tir_kernel(bb, kernel, func, [left.data, weight.data, *operands], y)

    left, given = _with_rows_of_its_own(bb, left), left.m

    def definition(a: te.Tensor, b: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        """Blocks ``pack_a`` (packed only), ``dot``, ``epilogue``, ``store``."""
        surplus, rest = (None, rest) if weight.excess is None else (rest[0], rest[1:])

        def finish(dot: te.Tensor, z: Expr, row: Expr, col: Expr, *panel: Expr) -> Expr:
            acc = dot[(z, row, *panel)]
            at = At(z, row, col, col)
            if tile is not None:
                if surplus is not None:
                    acc = acc - surplus[weight_batch(z), col]
                n = col if weight.padded_n == weight.n else tirx.min(col, int64(weight.n - 1))
                at = At(z, tirx.min(row, int64(left.m) - 1), col, n)
            return epilogue(acc, at, *rest)

        if tile is None:
            dot = _plain_dot(a, b, left, weight, batch, left_batch, weight_batch)
            value = te.compute(dot.shape, lambda z, m, n: finish(dot, z, m, n, n), name="epilogue")
            return _store(value, order, lambda z, m, n: value[z, m, n], left.m, weight.n)
        dot = _packed_dot(a, b, left, weight, tile, batch, left_batch, weight_batch)
        cols = tile.cols
        value = te.compute(
            dot.shape,
            lambda z, m, no, ni: finish(dot, z, m, no * cols + ni, no, ni),
            name="epilogue",
        )
        return _store(
            value, order, lambda z, m, n: value[z, m, n // cols, n % cols], left.m, weight.n
        )

    tensors = [left.data, weight.data]
    tensors += [] if weight.excess is None else [weight.excess]
    if tile is None:
        y = te_kernel(bb, f"{kernel}_plain", definition, *tensors, *operands)
    else:
        y = te_kernel(bb, kernel, definition, *tensors, *operands, **{ROWS: tile.rows})
    if left.m is given:
        return y
    shape = [given if dim is left.m or dim.same_as(left.m) else dim for dim in y.ty.shape]
    return bb.match_cast(y, relax.TensorType(shape, str(y.ty.dtype)))


def _with_rows_of_its_own(bb: relax.BlockBuilder, left: Left) -> Left:
    """``left`` with a symbol for a number of rows like 8 * B, about whose multiples schedules would
    have to prove something.
    """
    product = isinstance(left.m, tirx.Mul)
    if not product or not any(isinstance(x, tirx.IntImm) for x in (left.m.a, left.m.b)):
        return left
    m = tirx.Var("rows", "int64")
    bb.match_cast(bb.emit(relax.ShapeExpr([left.m])), relax.ShapeType([m]))
    data = left.data
    if left.entry is row_major:
        *lead, _, k = data.ty.shape
        data = bb.match_cast(data, relax.TensorType([*lead, m, k], "int8"))
    return replace(left, data=data, m=m)


def _last_operand(place: int) -> Callable[..., Expr]:
    return lambda *operands: operands[-1][place]


def _without_last_operand(epilogue: Epilogue) -> Epilogue:
    return lambda acc, at, *operands: epilogue(acc, at, *operands[:-1])


def _epilogue_dtype(epilogue: Epilogue, operands: Sequence[relax.TensorType]) -> str:
    buffers = [tirx.decl_buffer([*ty.shape], str(ty.dtype)) for ty in operands]
    zero = int64(0)
    acc = tirx.const(0, "int32")
    return str(epilogue(acc, At(zero, zero, zero, zero), *buffers).ty.dtype)


def _packed_dot(a, b, left: Left, weight: Weight, tile: Tile, batch, left_batch, weight_batch):
    """dot [batch, M padded to the tile, N/NB, NB], int32."""
    dot, rows = tile.dot, tile.rows
    groups = dot.groups(weight.k)
    m = int64(left.m)
    padded_m = tirx.floordiv(m + (rows - 1), rows) * rows

    def value(z, row, ko, ki):
        k = ko * dot.group + ki
        inside = row < m if groups * dot.group == weight.k else tirx.all(row < m, k < weight.k)
        return dot.pack(tirx.if_then_else(inside, left.entry(a, z, row, k), _i8(0)))

    packed = te.compute(
        [*_dims(left.batch), padded_m, *_dims(groups, dot.group)], value, name="pack_a"
    )
    ko = te.reduce_axis((int64(0), int64(groups)), "ko")
    ki = te.reduce_axis((int64(0), int64(dot.group)), "ki")
    return te.compute(
        [*_dims(batch), padded_m, *_dims(weight.padded_n // tile.cols, tile.cols)],
        lambda z, row, no, ni: te.sum(
            packed[left_batch(z), row, ko, ki].astype("int32")
            * b[weight_batch(z), no, ko, ni, ki].astype("int32"),
            [ko, ki],
        ),
        name="dot",
    )


def _plain_dot(a, b, left: Left, weight: Weight, batch, left_batch, weight_batch):
    """dot [batch, M, N], int32."""
    k = te.reduce_axis((int64(0), int64(weight.k)), "k")
    return te.compute(
        _dims(batch, left.m, weight.n),
        lambda z, m, n: te.sum(
            left.entry(a, left_batch(z), m, k).astype("int32")
            * weight.entry(b, weight_batch(z), n, k).astype("int32"),
            k,
        ),
        name="dot",
    )


def _store(value, order: Order, read: Callable[..., Expr], m: Dim, n: Dim) -> te.Tensor:
    """The result in its memory order, without the padding."""
    batch = value.shape[0]
    if order is Order.COL32:
        return te.compute(
            [batch, *_dims(n // COLS, m, COLS)],
            lambda z, g, m, i: read(z, m, g * COLS + i),
            name="store",
        )
    return te.compute([batch, *_dims(m, n)], read, name="store")


def _batch_map(batch: Dim) -> BatchMap:
    return (lambda z: int64(0)) if is_one(batch) else lambda z: z


def _dims(*dims: Dim) -> list[Expr]:
    return [int64(dim) for dim in dims]


def _i8(value: int) -> Expr:
    return tirx.const(value, "int8")
