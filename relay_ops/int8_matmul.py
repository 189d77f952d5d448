"""The int8 matrix product that the quantised operators share.

    dot[z, m, n] = sum_k int32(a[z, m, k]) * int32(b[z, k, n])          exact, modulo 2^32
    y[z, m, n]   = epilogue(dot[z, m, n], at, *operands)                fused, any dtype

b is packed once (`int8_weight`); a is packed by rows, K padded as that of b. Where the target's dot
product takes a shifted a, the surplus is a vector per column of b, subtracted before the epilogue.
Targets whose tiles are not in `schedules.INT8_TILES`, or are matrix tiles, have a kernel of their
own instead (`schedules.TIR_BUILDERS`), which is given a `Problem`.

Matrices come in batches; N and K that are only known at the call lead to a plain kernel without
packing. M and the batch may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm import relax, te, tirx
from tvm.ir import Expr
from tvm.target import Target

from .. import schedules
from ..schedules.cuda.panels import Panels
from ..schedules.tile import ROWS, Tile
from .dims import int64, int64s, is_one
from .int8_weight import Weight
from .op import Dim, te_kernel, tir_kernel
from .orders import COLS, Entry, Order, col32, row_major, transposed


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


Epilogue = Callable[..., Expr]
"""``epilogue(acc, at, *operands)``: the output element for the int32 ``acc`` standing ``at``."""

BatchMap = Callable[[Expr], Expr]
"""Matrix of an operand for entry z of the result's batch."""


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
        shape = int64s(batch, left.m, weight.n)
        if order is Order.COL32:
            shape = int64s(batch, weight.n // COLS, left.m, COLS)
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
        return dot.pack(tirx.if_then_else(inside, left.entry(a, z, row, k), tirx.const(0, "int8")))

    packed = te.compute(
        [*int64s(left.batch), padded_m, *int64s(groups, dot.group)], value, name="pack_a"
    )
    ko = te.reduce_axis((int64(0), int64(groups)), "ko")
    ki = te.reduce_axis((int64(0), int64(dot.group)), "ki")
    return te.compute(
        [*int64s(batch), padded_m, *int64s(weight.padded_n // tile.cols, tile.cols)],
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
        int64s(batch, left.m, weight.n),
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
            [batch, *int64s(n // COLS, m, COLS)],
            lambda z, g, m, i: read(z, m, g * COLS + i),
            name="store",
        )
    return te.compute([batch, *int64s(m, n)], read, name="store")


def _batch_map(batch: Dim) -> BatchMap:
    return (lambda z: int64(0)) if is_one(batch) else lambda z: z
