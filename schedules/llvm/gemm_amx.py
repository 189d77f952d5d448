"""The int8 matmul on matrix tiles (AMX): one PrimFunc, the epilogue fused.

    parallel row:                                     only where `a` cannot be read as below
        a packed
    parallel task:
        configure the tiles
        for (batch, block of panels, row tile, panel of the block) of the task:
            its rows of A aside, unless they are      only where they are not whole cache lines
            for step of 64 k:                         two tiles of A by two of B, four of sums;
                                                      by three of B where N has three and no more
                prefetch some lines of the next panel
                four loads, four products
                some rows of the epilogue             of the turn before, read from `sums`
            `sums`, of the two that a task has
        the last epilogue, release the tiles

The products leave the vector units idle, and the epilogue has no use for the tiles: interleaved,
the core does both at a time. Rows of A stay in the first-level cache while the panels of a block
pass, the block in the second, and neighbouring tiles of the output are written in turn.

All tiles are of one height, the one that divides M best; the last moves back over the one before
it where rows are too few, and computes some again, to the same values. B has the panels of
``relay_ops.int8_matmul``, K padded with zeros to whole steps; whatever stands beyond K in a row of
A meets these zeros.

Tiles read rows of A in place where these are whole cache lines. Rows of another length, and those
of COL32, a task copies to whole lines, two tiles of rows at a time, for all panels of the block.
Where such a copy would not stay in the first-level cache, or `a` is transposed, all of it is packed
first.
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
from .tiles import prefetch_panel

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

_CHUNK = 32
"""Values of A that are copied at a time, at most: what COL32 keeps together."""


@dataclass(frozen=True)
class AmxConfig:
    """Tunables."""

    block_bytes: int = 1 << 20
    """Of panels of B, that the row tiles meet in turn: in the second-level cache."""
    streamed_bytes: int = 4 << 20
    """A matrix of B of so many bytes or more is not in the caches of the cores: the first tile of
    rows to meet a panel asks for the next one, into the second-level cache.
    """
    streamed_rows: int = 128
    """Of A, up to which that is done: with more, products take longer than memory does."""
    streams: int = 8
    """Parts of that panel that are asked for at a time."""
    tasks: int = 256
    """At most: enough for many cores."""
    rows_unrolled: int = 3
    """Rows of the epilogue in a step of 64 k, up to which they are straight code."""
    task_steps: int = 256
    """At least, of each of four tasks or more: configuring the tiles and the last epilogue are to
    be little of it.
    """
    shared_steps: int = 128
    """At least, of a product that two tasks share: a second core takes no longer to join in."""
    aside_bytes: int = 32 << 10
    """Of a tile of rows of A that a task copies to whole steps before their products, at most: what
    the first-level cache has beside a panel of B.
    """
    epilogue_steps: int = 4
    """As many steps take the time of a tile's epilogue, where there are not more to hide it."""


CONFIG = AmxConfig()


def tile(n: int, panel: int | None) -> Tile:
    """How B is packed; A is not."""
    tiles = -(-n // amx.LANES)
    across = tiles if tiles <= 3 else 2
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
        self.panel_bytes = self.cols * self.steps * amx.DEPTH
        self.streamed = self.panels * self.panel_bytes >= config.streamed_bytes and (
            not isinstance(problem.m, int) or problem.m <= config.streamed_rows
        )
        self.rows_a_step = -(-2 * amx.ROWS // self.steps)
        self.pitch = self.steps * amx.DEPTH
        in_place = p.a_run == p.k == self.pitch
        small = 2 * amx.ROWS * self.pitch <= config.aside_bytes
        self.aside = not in_place and small and p.a_run >= min(_CHUNK, p.k)
        self.packed = not in_place and not self.aside

    def emit(self) -> None:
        p, c = self.p, self.c
        self._ask()
        if self.packed:
            self._pack()
        halves = tirx.truncdiv(self.m + (amx.ROWS - 1), _int64(amx.ROWS))
        halves = _bound(tirx.max(halves, _int64(1)))
        self.height = _bound(tirx.truncdiv(self.m + (halves - 1), halves))
        tiles = _bound(tirx.min(tirx.truncdiv(halves + 1, _int64(2)), self.m))
        block = max(1, min(self.panels, c.block_bytes // self.panel_bytes))
        per_matrix = _bound(tiles * self.panels)
        total = _bound(per_matrix * p.batch)
        (tasks,) = opaque("int64", [self._tasks(total)])
        tasks = _bound(tasks)
        with T.parallel(tasks) as task:
            self._allocate()
            T.evaluate(amx.configure(self.height, self._a(1) + 1))
            start, end = opaque(
                "int64", [tirx.truncdiv(total * i, tasks) for i in (task, task + 1)]
            )
            with T.serial(end - start) as turn:
                z, rest = opaque("int64", [*_divided(start + turn, per_matrix)])
                (first,) = opaque("int64", [tirx.truncdiv(rest, tiles * block) * block])
                width = tirx.min(self.panels - first, _int64(block))
                tile, panel = _divided(rest - first * tiles, width)
                place = opaque("int64", [z, first + panel, tile * (self.height * 2)])
                self._tile(*place)
            with T.serial(self.pending[_ROWS]) as row:
                self._finish_row(row)
            T.evaluate(amx.release())

    def _tasks(self, total: Expr) -> Expr:
        """Into how many the output's tiles are divided: a power of two, as cores are, or none."""
        steps = max(self.steps, self.c.epilogue_steps)
        tasks = tirx.min(total, _int64(1))
        for i in range(1, self.c.tasks.bit_length()):
            least = self.c.task_steps << i if i > 1 else self.c.shared_steps
            enough = total * steps >= least
            tasks = tirx.Select(tirx.all(enough, total >= 1 << i), _int64(1 << i), tasks)
        return tasks

    def _ask(self) -> None:
        text = f"int8 matmul: {amx.REFUSED}"
        with T.attr(0, amx.IMPORT, amx.SOURCE), T.Assert(amx.permitted(), text, "RuntimeError"):
            T.evaluate(0)

    def _pack(self) -> None:
        """``a`` becomes rows of whole steps; what pads them is left as it is."""
        p, source, width = self.p, self.a, self.pitch
        batch = _int64(source.shape[0])
        packed = T.alloc_buffer((batch * self.m * width,), "int8")
        with T.parallel(batch * self.m) as index:
            z, row = _divided(index, self.m)

            def copy(k: Expr) -> None:
                T.buffer_store(packed, p.a_entry(source, z, row, k), [index * width + k])

            _each_k(p.k, copy)
        self.a_entry = lambda z, row, k: packed[(z * self.m + row) * width + k]

    def _allocate(self) -> None:
        """What a thread keeps: two scratches of sums, and which of them has no output yet; and a
        copy of a tile of rows of A, and of which.
        """
        self.sums = T.alloc_buffer((2, 2 * amx.ROWS, self.cols), "int32", scope="local")
        self.pending = T.alloc_buffer((_FIELDS,), "int64", scope="local")
        for field in range(_FIELDS):
            T.buffer_store(self.pending, _int64(0), [field])
        if self.aside:
            self.rows = T.alloc_buffer((2 * amx.ROWS, self.pitch), "int8", scope="local")
            last = [2 * amx.ROWS - 1, self.pitch - 1]
            T.buffer_store(self.rows, tirx.const(0, "int8"), last)  # or TVM cuts it short
            self.rows_of = T.alloc_buffer((1,), "int64", scope="local")
            T.buffer_store(self.rows_of, _int64(-1), [0])

    def _tile(self, z: Expr, panel: Expr, first: Expr) -> None:
        """Two tiles of rows of a panel from ``first`` on, or the one that is left."""
        narrow = 0 < self.p.n % self.cols <= self.cols - amx.LANES
        if not narrow:
            self._tile_across(z, panel, first, self.across)
            return
        across = -(-(self.p.n % self.cols) // amx.LANES)
        with T.If(panel < self.panels - 1):
            with T.Then():
                self._tile_across(z, panel, first, self.across)
            with T.Else():
                self._tile_across(z, panel, first, across)

    def _tile_across(self, z: Expr, panel: Expr, first: Expr, across: int) -> None:
        both = _both(self.p.m)
        if both is not None:
            self._sums(z, panel, first, 2 if both else 1, across)
            return
        with T.If(first + self.height < self.m):
            with T.Then():
                self._sums(z, panel, first, 2, across)
            with T.Else():
                self._sums(z, panel, first, 1, across)

    def _sums(self, z: Expr, panel: Expr, first: Expr, down: int, across: int) -> None:
        """``down`` tiles of rows: products, and the epilogue of the rows before."""
        p = self.p
        starts = [
            T.Bind(tirx.min(first + i * self.height, self.m - self.height)) for i in range(down)
        ]
        slot = T.Bind(_int64(1) - self.pending[_SLOT])
        za, zb = T.Bind(_int64(p.a_batch(z))), T.Bind(_int64(p.b_batch(z)))
        grid = [(i, j) for i in range(down) for j in range(across)]
        for i, j in grid:
            T.evaluate(amx.zero(self._sum(i, j)))
        if self.aside:
            self._set_aside(za, starts, za * self.m + first)

        def load(i: int, step: Expr | int) -> None:
            k = step * amx.DEPTH
            entry = self.rows[i * amx.ROWS, k] if self.aside else self.a_entry(za, starts[i], k)
            T.evaluate(amx.load(self._a(i), T.address_of(entry), self.pitch))

        def load_b(j: int, step: Expr) -> None:
            group, column = step * (amx.DEPTH // amx.GROUP), j * amx.LANES
            address = T.address_of(self.b[zb, panel, group, column, 0])
            T.evaluate(amx.load(self._b(j), address, self.cols * amx.GROUP))

        with T.serial(self.steps) as step:
            if self.streamed:
                with T.If(tirx.all(first == 0, self.m <= self.c.streamed_rows)), T.Then():
                    self._ask_ahead(zb, panel, step)
            held: dict[int, int] = {}
            if self.across < 3:
                for j in range(across):
                    load_b(j, step)
                    held[self._b(j)] = j
            for i in range(down):
                load(i, step)
                columns = [*range(across)]
                for j in columns if i == 0 or self.across < 3 else reversed(columns):
                    if held.get(self._b(j)) != j:
                        load_b(j, step)
                        held[self._b(j)] = j
                    T.evaluate(amx.multiply(self._sum(i, j), self._a(i), self._b(j)))
            self._finish_rows(step)

        for i, j in grid:
            address = T.address_of(self.sums[slot, i * amx.ROWS, j * amx.LANES])
            T.evaluate(amx.store(self._sum(i, j), address, self.cols * 4))
        fields = (down * self.height, slot, z, panel, starts[0], starts[-1])
        for field, value in enumerate(fields):
            T.buffer_store(self.pending, _int64(value), [field])

    # Tiles: three of B across leave one for A and one for B beside their sums.

    def _sum(self, i: int, j: int) -> int:
        return max(2, self.across) * i + j

    def _a(self, i: int) -> int:
        return 6 if self.across == 3 else 4 + i

    def _b(self, j: int) -> int:
        return 7 if self.across == 3 else 6 + j

    def _ask_ahead(self, zb: Expr, panel: Expr, step: Expr | int) -> None:
        """The share of a step in asking for the panel after ``panel``."""
        step_bytes = self.panel_bytes // self.steps
        head, step = [zb, panel + 1], _int64(step)
        for line in prefetch_panel(self.b, head, step, step_bytes, self.c.streams):
            T.evaluate(line.value)

    def _set_aside(self, za: Expr, starts: list[Expr], key: Expr) -> None:
        """The tiles of rows of matrix ``za`` from ``starts`` on, unless they are there."""
        with T.If(self.rows_of[0] != key), T.Then():
            for i, start in enumerate(starts):
                with T.serial(self.height) as row:

                    def copy(k: Expr, i: int = i, start: Expr = start, row: Expr = row) -> None:
                        value = self.a_entry(za, start + row, k)
                        T.buffer_store(self.rows, value, [i * amx.ROWS + row, k])

                    _each_k(self.p.k, copy)
            T.buffer_store(self.rows_of, key, [0])

    # Epilogue.

    def _finish_rows(self, step: Expr) -> None:
        """The share of a step of 64 k; straight code where it is small."""

        first, pending = step * self.rows_a_step, self.pending[_ROWS]
        if self.rows_a_step <= self.c.rows_unrolled:
            for part in range(self.rows_a_step):
                row = T.Bind(_int64(first + part))
                with T.If(row < pending), T.Then():
                    self._finish_row(row)
            return
        left = tirx.max(pending - first, _int64(0))
        with T.serial(T.Bind(tirx.min(left, _int64(self.rows_a_step)))) as part:
            self._finish_row(T.Bind(first + part))

    def _finish_row(self, row: Expr) -> None:
        """Row ``row`` of the pending scratch to the output."""
        upper = row < self.height
        inside = T.Bind(tirx.Select(upper, row, row - self.height))
        z, panel = T.Bind(self.pending[_Z]), T.Bind(self.pending[_PANEL])
        m = T.Bind(tirx.Select(upper, self.pending[_FIRST], self.pending[_SECOND]) + inside)
        held = T.Bind(tirx.Select(upper, inside, inside + amx.ROWS))
        place = [T.Bind(self.pending[_SLOT]), held]
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

        self._each_column(store, self.across)

    def _store_columns(self, z: Expr, m: Expr, panel: Expr, place: list[Expr], count: int) -> None:
        """The last panel, of which ``count`` columns are the output's."""
        held = T.alloc_buffer((self.cols,), str(self.y.dtype), scope="local")

        def store(column: Expr) -> None:
            col = panel * self.cols + column
            n = tirx.min(col, self.p.n - 1)
            T.buffer_store(held, self._value(z, m, col, n, place, column), [column])

        def copy(column: Expr) -> None:
            place = self.p.y_index(z, m, panel * self.cols + column)
            T.buffer_store(self.y, held[column], place)

        self._each_column(store, -(-count // amx.LANES))
        _in_pieces(count, copy)

    def _each_column(self, store: Callable[[Expr], None], across: int) -> None:
        with T.unroll(across) as j, T.vectorized(amx.LANES) as lane:
            store(_int64(j * amx.LANES + lane))

    def _value(self, z: Expr, m: Expr, col: Expr, n: Expr, place: list[Expr], column: Expr) -> Expr:
        acc = self.sums[place[0], place[1], column]
        return self.p.epilogue(acc, self.p.at(z, m, n, col), *self.operands)


_ROWS, _SLOT, _Z, _PANEL, _FIRST, _SECOND, _FIELDS = range(7)
"""Of `_Kernel.pending`: rows of sums that wait, 0 for none; where; what they are."""


def _both(m: int | Expr) -> bool | None:
    """Whether every turn has two tiles of rows, or every turn one; ``None`` where the last of
    several may have one.
    """
    if not isinstance(m, int):
        return None
    halves = -(-m // amx.ROWS)
    if halves == 1:
        return False
    return True if halves % 2 == 0 else None


def _each_k(k: int, copy: Callable[[Expr], None]) -> None:
    """``copy(index)`` for ``k`` indices, in vectors."""
    whole, rest = divmod(k, _CHUNK)
    with T.serial(whole) as chunk, T.vectorized(_CHUNK) as lane:
        copy(chunk * _CHUNK + lane)
    _in_pieces(rest, lambda index: copy(whole * _CHUNK + index))


def _in_pieces(count: int, copy: Callable[[Expr], None]) -> None:
    """``copy(index)`` for ``count`` indices, as few vectors of powers of two."""
    start = 0
    while start < count:
        size = min(_CHUNK, 1 << (count - start).bit_length() - 1)
        with T.vectorized(size) as lane:
            copy(_int64(start) + lane)
        start += size


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
