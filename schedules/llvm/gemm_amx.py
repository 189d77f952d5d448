"""The int8 matmul on matrix tiles (AMX): one PrimFunc, the epilogue fused.

    parallel row:                                     only where rows of A are not whole tiles of k
        a packed, its rows padded with zeros
    parallel task:
        configure the tiles
        for (batch, block of panels, row tile, panel of the block) of the task:
            for step of 64 k:                         two tiles of A by two of B, four of sums
                four loads, four products
                some rows of the epilogue             of the turn before, read from `sums`
            `sums`, of the two that a task has
        the last epilogue, release the tiles

The products leave the vector units idle, and the epilogue has no use for the tiles: interleaved,
the core does both at a time. Rows of A stay in the first-level cache while the panels of a block
pass, the block in the second, and neighbouring tiles of the output are written in turn.

No row tile is short: the last one moves back over the one before it and computes its rows again, to
the same values. With fewer than 16 rows in all, tiles are that low. B has the panels of
``relay_ops.int8_matmul``, K padded to whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from ..intrin import x86
from ..intrin import x86_amx as amx
from ..parameters import parameters
from ..tile import Tile
from .attention_task import opaque

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

_CHUNK = 32
"""Values of k that packing copies at a time: what COL32 keeps together."""


@dataclass(frozen=True)
class AmxConfig:
    """Tunables."""

    block_bytes: int = 1 << 20
    """Of panels of B, that the row tiles meet in turn: in the second-level cache."""
    tasks: int = 256
    """At most: enough for many cores."""
    rows_unrolled: int = 3
    """Rows of the epilogue in a step of 64 k, up to which they are straight code."""
    task_steps: int = 256
    """At least, of a task: configuring the tiles and the last epilogue are to be little of it."""


CONFIG = AmxConfig()


def tile(n: int, panel: int | None) -> Tile:
    """How B is packed; A is not."""
    across = min(2, -(-n // amx.LANES))
    return Tile(2 * amx.ROWS, panel or across * amx.LANES, x86.AMX)


def build(problem: Problem, _: Target) -> PrimFunc:
    """The kernel ``int8_matmul``: buffers a, b (packed in panels), the operands and y."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("int8_gemm_amx")
        T.func_attr({"tirx.noalias": True})
        buffers = parameters(problem)
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            _Kernel(problem, CONFIG, buffers).emit()
    return builder.get()


class _Kernel:
    """Emits the statements; one object for each."""

    def __init__(self, problem: Problem, config: AmxConfig, buffers: list):
        p = self.p = problem
        self.c = config
        self.a, self.b, *self.operands, self.y = buffers
        _, self.panels, groups, self.cols, _ = map(_known, p.b.shape)
        self.steps = groups * amx.GROUP // amx.DEPTH
        self.across = self.cols // amx.LANES
        self.m = _int64(p.m)
        self.a_entry: Callable[..., Expr] = lambda z, row, k: p.a_entry(self.a, z, row, k)
        self.rows_a_step = -(-2 * amx.ROWS // self.steps)

    def emit(self) -> None:
        p, c = self.p, self.c
        self._ask()
        if p.a_run != p.k or p.k % amx.DEPTH:
            self._pack()
        tiles = _bound(tirx.truncdiv(self.m + (2 * amx.ROWS - 1), _int64(2 * amx.ROWS)))
        block = max(1, min(self.panels, c.block_bytes // (self.cols * self.steps * amx.DEPTH)))
        per_matrix = _bound(tiles * self.panels)
        total = _bound(per_matrix * p.batch)
        self.height = _bound(tirx.min(self.m, _int64(amx.ROWS)))
        (tasks,) = opaque("int64", [self._tasks(total)])
        tasks = _bound(tasks)
        with T.parallel(tasks) as task:
            self._allocate()
            T.evaluate(amx.configure(self.height))
            start, end = opaque(
                "int64", [tirx.truncdiv(total * i, tasks) for i in (task, task + 1)]
            )
            with T.serial(end - start) as turn:
                z, rest = opaque("int64", [*_divided(start + turn, per_matrix)])
                (first,) = opaque("int64", [tirx.truncdiv(rest, tiles * block) * block])
                width = tirx.min(self.panels - first, _int64(block))
                tile, panel = _divided(rest - first * tiles, width)
                place = opaque("int64", [z, first + panel, tile * (2 * amx.ROWS)])
                self._tile(*place)
            with T.serial(self.pending[_ROWS]) as row:
                self._finish_row(row)
            T.evaluate(amx.release())

    def _tasks(self, total: Expr) -> Expr:
        """Into how many the output's tiles are divided: a power of two, as cores are, or none."""
        tasks = tirx.min(total, _int64(1))
        for i in range(1, self.c.tasks.bit_length()):
            enough = total * self.steps >= self.c.task_steps << i
            tasks = tirx.Select(tirx.all(enough, total >= 1 << i), _int64(1 << i), tasks)
        return tasks

    def _ask(self) -> None:
        text = f"int8 matmul: {amx.REFUSED}"
        with T.attr(0, amx.IMPORT, amx.SOURCE), T.Assert(amx.permitted(), text, "RuntimeError"):
            T.evaluate(0)

    def _pack(self) -> None:
        """``a`` becomes rows of whole steps."""
        p, source = self.p, self.a
        batch = _int64(source.shape[0])
        width = self.steps * amx.DEPTH
        packed = T.alloc_buffer((batch * self.m * width,), "int8")
        with T.parallel(batch * self.m) as index:
            z, row = _divided(index, self.m)
            with T.serial(width // _CHUNK) as chunk, T.vectorized(_CHUNK) as lane:
                k = chunk * _CHUNK + lane
                value = p.a_entry(source, z, row, k)
                if width != p.k:
                    value = tirx.if_then_else(k < p.k, value, tirx.const(0, "int8"))
                T.buffer_store(packed, value, [index * width + k])
        self.a_entry = lambda z, row, k: packed[(z * self.m + row) * width + k]

    def _allocate(self) -> None:
        """What a thread keeps: two scratches of sums, and which of them has no output yet."""
        self.sums = T.alloc_buffer((2, 2 * amx.ROWS, self.cols), "int32", scope="local")
        self.pending = T.alloc_buffer((_FIELDS,), "int64", scope="local")
        for field in range(_FIELDS):
            T.buffer_store(self.pending, _int64(0), [field])

    def _tile(self, z: Expr, panel: Expr, first: Expr) -> None:
        """Rows ``first`` to ``first + 32`` of a panel, or those that there are."""
        both = _both(self.p.m)
        if both is not None:
            self._sums(z, panel, first, 2 if both else 1)
            return
        with T.If(first + amx.ROWS < self.m):
            with T.Then():
                self._sums(z, panel, first, 2)
            with T.Else():
                self._sums(z, panel, first, 1)

    def _sums(self, z: Expr, panel: Expr, first: Expr, down: int) -> None:
        """``down`` tiles of rows: products, and the epilogue of the rows before."""
        p = self.p
        starts = [T.Bind(tirx.min(first + i * amx.ROWS, self.m - self.height)) for i in range(down)]
        slot = T.Bind(_int64(1) - self.pending[_SLOT])
        za, zb = T.Bind(_int64(p.a_batch(z))), T.Bind(_int64(p.b_batch(z)))
        pitch = self.steps * amx.DEPTH
        grid = [(i, j) for i in range(down) for j in range(self.across)]
        for i, j in grid:
            T.evaluate(amx.zero(_sum(i, j)))
        with T.serial(self.steps) as step:
            for j in range(self.across):
                group, column = step * (amx.DEPTH // amx.GROUP), j * amx.LANES
                address = T.address_of(self.b[zb, panel, group, column, 0])
                T.evaluate(amx.load(_b(j), address, self.cols * amx.GROUP))
            for i in range(down):
                address = T.address_of(self.a_entry(za, starts[i], step * amx.DEPTH))
                T.evaluate(amx.load(_a(i), address, pitch))
                for j in range(self.across):
                    T.evaluate(amx.multiply(_sum(i, j), _a(i), _b(j)))
            self._finish_rows(step)
        for i, j in grid:
            address = T.address_of(self.sums[slot, i * amx.ROWS, j * amx.LANES])
            T.evaluate(amx.store(_sum(i, j), address, self.cols * 4))
        fields = (down * amx.ROWS, slot, z, panel, starts[0], starts[-1])
        for field, value in enumerate(fields):
            T.buffer_store(self.pending, _int64(value), [field])

    # Epilogue.

    def _finish_rows(self, step: Expr) -> None:
        """The share of a step of 64 k; straight code where it is small."""

        def finish(part: Expr | int) -> None:
            row = T.Bind(_int64(step * self.rows_a_step + part))
            with T.If(row < self.pending[_ROWS]), T.Then():
                self._finish_row(row)

        if self.rows_a_step <= self.c.rows_unrolled:
            for part in range(self.rows_a_step):
                finish(part)
            return
        with T.serial(self.rows_a_step) as part:
            finish(part)

    def _finish_row(self, row: Expr) -> None:
        """Row ``row`` of the pending scratch to the output. Rows beyond the height of a low tile
        repeat its last one.
        """
        half, inside = _divided(row, _int64(amx.ROWS))
        inside = T.Bind(tirx.min(inside, self.height - 1))
        z, panel = T.Bind(self.pending[_Z]), T.Bind(self.pending[_PANEL])
        start = tirx.Select(half == 0, self.pending[_FIRST], self.pending[_SECOND])
        m = T.Bind(start + inside)
        place = [T.Bind(self.pending[_SLOT]), T.Bind(half * amx.ROWS + inside)]
        whole, rest = divmod(self.p.n, self.cols)
        if not rest:
            self._store_row(z, m, panel, place)
            return
        if not whole:
            self._store_columns(z, m, panel, place, rest)
            return
        with T.If(panel < whole):
            with T.Then():
                self._store_row(z, m, panel, place)
            with T.Else():
                self._store_columns(z, m, panel, place, rest)

    def _store_row(self, z: Expr, m: Expr, panel: Expr, place: list[Expr]) -> None:
        def store(column: Expr) -> None:
            n = panel * self.cols + column
            value = self._value(z, m, n, n, place, column)
            T.buffer_store(self.y, value, self.p.y_index(z, m, n))

        self._each_column(store)

    def _store_columns(self, z: Expr, m: Expr, panel: Expr, place: list[Expr], count: int) -> None:
        """The last panel, of which ``count`` columns are the output's."""
        held = T.alloc_buffer((self.cols,), str(self.y.dtype), scope="local")

        def store(column: Expr) -> None:
            col = panel * self.cols + column
            n = tirx.min(col, self.p.n - 1)
            T.buffer_store(held, self._value(z, m, col, n, place, column), [column])

        self._each_column(store)
        with T.serial(count) as column:
            n = panel * self.cols + column
            T.buffer_store(self.y, held[column], self.p.y_index(z, m, n))

    def _each_column(self, store: Callable[[Expr], None]) -> None:
        with T.unroll(self.across) as j, T.vectorized(amx.LANES) as lane:
            store(_int64(j * amx.LANES + lane))

    def _value(self, z: Expr, m: Expr, col: Expr, n: Expr, place: list[Expr], column: Expr) -> Expr:
        acc = self.sums[place[0], place[1], column]
        return self.p.epilogue(acc, self.p.at(z, m, n, col), *self.operands)


_ROWS, _SLOT, _Z, _PANEL, _FIRST, _SECOND, _FIELDS = range(7)
"""Of `_Kernel.pending`: rows of sums that wait, 0 for none; where; what they are."""


def _sum(i: int, j: int) -> int:
    return 2 * i + j


def _a(i: int) -> int:
    return 4 + i


def _b(j: int) -> int:
    return 6 + j


def _both(m: int | Expr) -> bool | None:
    """Whether every row tile has more than 16 rows, or none has; ``None`` where some may."""
    if not isinstance(m, int):
        return None
    if m <= amx.ROWS:
        return False
    return True if m % (2 * amx.ROWS) == 0 or m % (2 * amx.ROWS) > amx.ROWS else None


def _divided(number: Expr, by: Expr) -> tuple[Expr, Expr]:
    """Quotient and remainder of what is not negative, which TVM cannot prove here."""
    return T.Bind(tirx.truncdiv(number, by)), T.Bind(tirx.truncmod(number, by))


def _bound(value: Expr) -> Expr:
    """A variable of this value; constants as they are."""
    return value if isinstance(value, tirx.IntImm) else T.Bind(value)


def _known(dim: Expr) -> int | Expr:
    return int(dim.value) if isinstance(dim, tirx.IntImm) else dim


def _int64(value: int | Expr) -> Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else value.astype("int64")
