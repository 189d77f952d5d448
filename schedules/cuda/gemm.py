"""The int8 matrix product on tensor cores: one PrimFunc, the epilogue fused.

    for tile in blocks(batch x column tiles x row tiles):       block_m x block_n
        for step of block_k bytes in K:                         `stages` deep, cp.async
            A, B from global to shared memory                   rows of block_k bytes, swizzled
            fragments by ldmatrix, products by mma              int32 accumulators in registers
        epilogue on the accumulators, in registers
        through shared memory to whole rows of the output       16 bytes a thread

Both operands are rows of consecutive k: A as M x K, wherever `Problem.a_entry` says that an element
lies, so that the tiled memory orders cost index arithmetic only; B as N x K. Rows and k beyond the
end are filled with zeros by the copy itself.

On sm_90a (``wgmma``) the products are those of warpgroups, which read shared memory themselves and
run on while the block fills another stage; weights in panels come as bulk copies.

With few rows the warps of a block split K instead of the tile (``warps_k``): the weights stream
through all of them, and integer partial sums meet in shared memory, in any order the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from math import gcd
from typing import TYPE_CHECKING

from tvm import DataType, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T
from tvm_ffi import structural_map

from ..intrin import cuda as ptx
from ..intrin import hopper
from ..intrin.cuda import CHUNK_BYTES as CHUNK
from ..parameters import parameters
from . import arch as archs
from .arch import WARP, Arch
from .attention_place import named
from .gemm_config import GemmConfig, configure
from .gemm_loads import Rows, TileLoads
from .guard import guard
from .override import overridden
from .panels import Panels
from .shared_memory import shared_memory

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

Dim = int | Expr

LOCALITY = 8
"""Row tiles that follow one another before the column tile advances: what they read is shared in
the second-level cache.
"""


def panels(target: Target) -> Panels | None:
    """What weights are packed to for ``target``, if not rows."""
    return Panels() if archs.of(target).wgmma else None


def build(problem: Problem, target: Target) -> PrimFunc:
    """The kernel ``int8_matmul``: buffers a, b, the operands and y."""
    arch = archs.of(target)
    return emit(problem, chosen(problem, arch), arch)


def chosen(problem: Problem, arch: Arch) -> dict[int | None, GemmConfig]:
    """What `configure` chooses, or a measurement instead."""
    return {rows: overridden(config) for rows, config in configure(problem, arch).items()}


def emit(problem: Problem, configs: dict[int | None, GemmConfig], arch: Arch) -> PrimFunc:
    """The same with ``configs`` by the number of rows, as ``configure`` has them."""
    p = problem
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("int8_gemm")
        T.func_attr({"tirx.noalias": True})
        buffers = parameters(p)
        with ExitStack() as otherwise:
            known = isinstance(p.m, int) and isinstance(p.batch, int)
            # An empty grid cannot be launched.
            otherwise.enter_context(guard(p.batch * p.m > 0, not known))
            for most, config in configs.items():
                if most is None:
                    _Kernel(p, config, arch, buffers).launch()
                    continue
                otherwise.enter_context(T.If(p.m <= most))
                with T.Then():
                    _Kernel(p, config, arch, buffers).launch()
                otherwise.enter_context(T.Else())
    return builder.get()


def launch(problem: Problem, config: GemmConfig, arch: Arch, buffers: list[tirx.Buffer]) -> None:
    """One launch of it, as a part of a PrimFunc under construction."""
    _Kernel(problem, config, arch, buffers).launch()


class _Kernel:
    """Emits one launch; one object for each."""

    def __init__(self, problem: Problem, config: GemmConfig, arch: Arch, buffers: list):
        config.require_fit(problem, arch)
        self.p, self.c, self.arch = problem, config, arch
        self.a, self.b, *self.operands, self.y = buffers
        self.item = DataType(problem.y.dtype).bits // 8

    def launch(self) -> None:
        p, c = self.p, self.c
        tiles_m, tiles_n = T.Bind(_tiles(p.m, c.block_m)), _tiles(p.n, c.block_n)
        blocks = T.Bind(p.batch * tiles_m * tiles_n)
        with (
            T.thread_binding(blocks, thread="blockIdx.x") as block,
            T.thread_binding(c.threads, thread="threadIdx.x") as thread,
            T.sblock("root"),
        ):
            T.reads([])
            T.writes([])
            self._body(block, thread, tiles_m, tiles_n)

    def _body(self, block: Expr, thread: Expr, tiles_m: Expr, tiles_n: Expr) -> None:
        p, c = self.p, self.c
        align = hopper.ATOM_BYTES if c.wgmma else -1
        self.shared = shared_memory(c.shared_bytes(self.item), "int8", align)
        fragments = c.warp_m // 16 * (c.warp_n // 8)
        self.acc = T.alloc_buffer((fragments * 4,), "uint32", scope="local")
        self.thread = thread
        self.tiles = TileLoads(c, self.arch, self.shared, thread)
        self.lane = T.Bind(thread % WARP)
        warp = T.Bind(thread // WARP)
        self.warp = warp
        self.warp_k = warp // (c.warps_m * c.warps_n)
        self.row = warp // c.warps_n % c.warps_m * c.warp_m
        self.col = warp % c.warps_n * c.warp_n

        z, tile_m, tile_n = _raster(block, tiles_m, tiles_n)
        self.z = named(z)
        self.rows_a = Rows(
            lambda row, k: p.a_entry(self.a, p.a_batch(self.z), row, k),
            *(p.m, p.k, gcd(p.a_run, CHUNK), p.a_row_run),
        )
        self.rows_b = Rows(
            lambda row, k: p.b_entry(self.b, p.b_batch(self.z), row, k),
            *(p.n, p.b_k, CHUNK),
        )
        self.first_row = named(tile_m * c.block_m)
        self.first_col = named(tile_n * c.block_n)
        live = None if p.live_rows is None else self.first_row < p.live_rows(*self.operands)
        with guard(live, p.live_rows is not None):
            self._compute()

    def _compute(self) -> None:
        p, c = self.p, self.c
        self.steps = _tiles(p.k, c.block_k)
        if c.wgmma:
            self._run_warpgroups()
        else:
            self._run_warps()
        self._sync()
        if c.warps_k > 1:
            self._reduce_and_store()
        elif int(p.y.shape[-1]) * self.item % CHUNK == 0:
            self._store_rows()
        else:
            self._store_elements()

    # Main loop.

    def _run_warps(self) -> None:
        c = self.c
        for i in range(int(self.acc.shape[0])):
            T.buffer_store(self.acc, tirx.const(0, "uint32"), [i])
        self.fa = T.alloc_buffer((c.warp_m // 16 * 4,), "uint32", scope="local")
        self.fb = T.alloc_buffer((c.warp_n // 8 * 2,), "uint32", scope="local")
        ahead = c.stages - 1
        for stage in range(ahead):
            self._load(stage, tirx.const(stage, "int64"))
        with T.serial(0, self.steps) as step:
            if self.arch.cp_async:
                ptx.wait_copies(ahead - 1)
            self._sync()
            self._load((step + ahead) % c.stages, step + ahead)
            self._multiply(step % c.stages)
        if self.arch.cp_async:
            ptx.wait_copies(0)

    def _run_warpgroups(self) -> None:
        """One group of products is always under way: a stage is filled again two steps after its
        own, behind a barrier of the block that everyone reaches with these products done.
        """
        c = self.c
        self.group = T.Bind(hopper.warpgroup(self.thread))
        self.matrix = T.Bind(hopper.descriptor(T.address_of(self.shared[0])))
        if self.p.b_panels:
            with T.If(self.thread == 0), T.Then():
                for stage in range(c.stages):
                    hopper.init_barrier(self._barrier(stage), 1)
                hopper.publish_barriers()
        ahead = c.stages - 2
        for stage in range(ahead):
            self._load_inside(stage, tirx.const(stage, "int64"))
        with T.serial(0, self.steps) as step:
            ptx.wait_copies(ahead - 1)
            hopper.fence_shared()
            self._sync()
            self._load_inside((step + ahead) % c.stages, step + ahead)
            stage = T.Bind(step % c.stages)
            if self.p.b_panels:
                hopper.wait_barrier(self._barrier(stage), step // c.stages)
            self._multiply_warpgroup(stage, step)
            hopper.wait_products(1)
        hopper.wait_products(0)
        ptx.wait_copies(0)

    def _barrier(self, stage: Expr | int) -> Expr:
        at = self.c.barriers_at + stage * hopper.BARRIER_BYTES
        return T.address_of(self.shared[at])

    def _load_inside(self, stage: Expr | int, step: Expr) -> None:
        """As `_load`, but nothing for steps beyond the last; packed weights by one thread."""
        c, p, base = self.c, self.p, stage * self.c.stage_bytes
        base_b = base + c.block_m * c.block_k
        with T.If(step < self.steps), T.Then():
            if p.b_panels:
                with T.If(self.thread == 0), T.Then():
                    self._load_panels(p.b_panels, base_b, self._barrier(stage), step)
            else:
                self.tiles.load(self.rows_b, self.first_col, c.block_n, base_b, step)
            self.tiles.load(self.rows_a, self.first_row, c.block_m, base, step)
        ptx.commit_copies()

    def _load_panels(self, panels: Panels, base: Expr, barrier: Expr, step: Expr) -> None:
        """A tile of B: what lies beyond the last panel stays undefined, as its products do."""
        along_n, _ = panels.count(self.p.n, self.p.k)
        first, most = T.Bind(self.first_col // panels.rows), self.c.block_n // panels.rows
        inside = T.Bind(tirx.min(along_n - first, most))
        hopper.arrive_expecting(barrier, inside * panels.bytes)
        for i in range(most):
            with guard(i < inside, i > 0):
                source = self.b[self.p.b_batch(self.z), first + i, step, 0, 0]
                target = self.shared[base + i * panels.bytes]
                hopper.copy_bulk(T.address_of(target), T.address_of(source), panels.bytes, barrier)

    def _multiply_warpgroup(self, stage: Expr, step: Expr) -> None:
        """The products of one stage, as one group. Those of step 0 do not add: accumulators that
        the threads had cleared would be written behind `hopper.begin_products` in short loops.
        """
        c = self.c
        base_a = stage * c.stage_bytes + self.group * (hopper.ROWS * c.block_k)
        base_b = stage * c.stage_bytes + c.block_m * c.block_k
        a = T.Bind(hopper.advanced(self.matrix, base_a))
        b = T.Bind(hopper.advanced(self.matrix, base_b))
        columns = min(c.block_n, hopper.COLUMNS)
        hopper.begin_products()
        for k in range(0, c.block_k, hopper.STEP_BYTES):
            for first in range(0, c.block_n, columns):
                registers = [self.acc[first // 2 + r] for r in range(columns // 2)]
                rows = hopper.advanced(b, first * c.block_k + k)
                sums = True if k else step > 0
                hopper.multiply_s8(registers, hopper.advanced(a, k), rows, sums)
        hopper.commit_products()

    def _load(self, stage: Expr | int, step: Expr) -> None:
        """Step ``step`` of A and B into ``stage``; zeros beyond the end of K."""
        c, base = self.c, stage * self.c.stage_bytes
        self.tiles.load(self.rows_a, self.first_row, c.block_m, base, step)
        base_b = base + c.block_m * c.block_k
        self.tiles.load(self.rows_b, self.first_col, c.block_n, base_b, step)
        if self.arch.cp_async:
            ptx.commit_copies()

    def _multiply(self, stage: Expr) -> None:
        """The products of one stage; warps that split K take every ``warps_k``-th 32 bytes."""
        c = self.c
        base_a = stage * c.stage_bytes
        base_b = base_a + c.block_m * c.block_k
        for k in range(c.block_k // 32 // c.warps_k):
            chunk = (k * c.warps_k + self.warp_k) * 2
            for i in range(c.warp_m // 16):
                row, part = ptx.a_chunk(self.lane)
                address = self._chunk(base_a, self.row + i * 16 + row, chunk + part)
                ptx.ldmatrix([self.fa[i * 4 + r] for r in range(4)], address)
            for j in range(c.warp_n // 16):
                row, part = ptx.b_chunk(self.lane)
                address = self._chunk(base_b, self.col + j * 16 + row, chunk + part)
                ptx.ldmatrix([self.fb[j * 4 + r] for r in range(4)], address)
            for i in range(c.warp_m // 16):
                for j in range(c.warp_n // 8):
                    a = [self.fa[i * 4 + r] for r in range(4)]
                    b = [self.fb[j * 2 + r] for r in range(2)]
                    ptx.mma_s8(self.arch.mma_int8[-1], self._fragment(i, j), a, b)

    def _chunk(self, base: Expr, row: Expr, chunk: Expr) -> Expr:
        """Address of 16 bytes of a tile in shared memory."""
        width = self.c.block_k
        return T.address_of(
            self.shared[base + row * width + ptx.swizzle(row, chunk, width // CHUNK) * CHUNK]
        )

    def _fragment(self, i: int, j: int) -> list[Expr]:
        start = (i * (self.c.warp_n // 8) + j) * 4
        return [self.acc[start + r] for r in range(4)]

    def _sync(self) -> None:
        T.evaluate(T.cuda.cta_sync())

    # Epilogue.

    def _value(self, acc: Expr, row: Expr, col: Expr) -> Expr:
        """The output element at (row, col), which may lie beyond the end."""
        p = self.p
        row, col = tirx.min(row, p.m - 1), tirx.min(col, p.n - 1)
        acc = tirx.reinterpret("int32", acc)
        return rounded_apart(p.epilogue(acc, p.at(self.z, row, col), *self.operands))

    def _store_rows(self) -> None:
        """Sixteen rows of a warp at a time: registers, shared memory, 16-byte stores."""
        p, c, item = self.p, self.c, self.item
        pitch = c.warp_n * item + CHUNK
        base = self.warp * (16 * pitch)
        per_row = c.warp_n * item // CHUNK
        held = T.alloc_buffer((4,), "uint32", scope="local")
        registers = [held[r] for r in range(4)]
        for i in range(c.warp_m // 16):
            first_row = self.first_row + self.row + i * 16
            first_col = self.first_col + self.col
            for j in range(c.warp_n // 8):
                fragment = self._fragment(i, j)
                for top in range(2):
                    row, col = self.lane // 4 + top * 8, j * 8 + self.lane % 4 * 2
                    pair = [
                        self._value(fragment[top * 2 + e], first_row + row, first_col + col + e)
                        for e in range(2)
                    ]
                    self._put_pair(base + row * pitch + col * item, pair)
            T.evaluate(T.cuda.warp_sync())
            count = 16 * per_row
            for v in range(-(-count // WARP)):
                index = self.lane + v * WARP
                row, piece = index // per_row, index % per_row
                m, n = first_row + row, first_col + piece * (CHUNK // item)
                with T.If(tirx.all(m < p.m, n < p.n, index < count)), T.Then():
                    source = self.shared[base + row * pitch + piece * CHUNK]
                    T.evaluate(T.ptx["ld.shared.v4.b32"](*registers, T.address_of(source)))
                    target = T.address_of(self.y[tuple(p.y_index(self.z, m, n))])
                    T.evaluate(T.ptx["st.global.v4.b32"](target, *registers))
            T.evaluate(T.cuda.warp_sync())

    def _put_pair(self, offset: Expr, pair: list[Expr]) -> None:
        item = self.item
        address = T.address_of(self.shared[offset])
        bits = [T.Bind(tirx.reinterpret(f"uint{8 * item}", value)) for value in pair]
        if item == 4:
            T.evaluate(T.ptx["st.shared.v2.b32"](address, *bits))
            return
        word = "uint16" if item == 1 else "uint32"
        low, high = (value.astype(word) for value in bits)
        both = low | (high << tirx.const(8 * item, word))
        T.evaluate(T.ptx[f"st.shared.b{16 * item}"](address, both))

    def _store_elements(self) -> None:
        """Where rows of the output are not aligned to 16 bytes."""
        for i in range(self.c.warp_m // 16):
            for j in range(self.c.warp_n // 8):
                for r, acc in enumerate(self._fragment(i, j)):
                    row = self.first_row + self.row + i * 16 + self.lane // 4 + r // 2 * 8
                    col = self.first_col + self.col + j * 8 + self.lane % 4 * 2 + r % 2
                    self._store(acc, row, col)

    def _store(self, acc: Expr, row: Expr, col: Expr) -> None:
        p = self.p
        with T.If(tirx.all(row < p.m, col < p.n)), T.Then():
            T.buffer_store(self.y, self._value(acc, row, col), p.y_index(self.z, row, col))

    def _reduce_and_store(self) -> None:
        """Partial sums of the warps that split K meet in shared memory, one tile a warp."""
        c = self.c
        tile = c.block_m * c.block_n
        base = self.warp_k * (tile * 4)
        for i in range(c.warp_m // 16):
            for j in range(c.warp_n // 8):
                fragment = self._fragment(i, j)
                for top in range(2):
                    row = self.row + i * 16 + self.lane // 4 + top * 8
                    col = self.col + j * 8 + self.lane % 4 * 2
                    address = T.address_of(self.shared[base + (row * c.block_n + col) * 4])
                    pair = fragment[top * 2 : top * 2 + 2]
                    T.evaluate(T.ptx["st.shared.v2.b32"](address, *pair))
        self._sync()
        part = T.alloc_buffer((1,), "uint32", scope="local")
        total = T.alloc_buffer((1,), "uint32", scope="local")
        for v in range(-(-tile // c.threads)):
            index = T.Bind(self.thread + v * c.threads)
            T.buffer_store(total, tirx.const(0, "uint32"), [0])
            for w in range(c.warps_k):
                inside = tirx.min(index, tile - 1)
                address = T.address_of(self.shared[(w * tile + inside) * 4])
                T.evaluate(T.ptx["ld.shared.b32"](part[0], address))
                T.buffer_store(total, total[0] + part[0], [0])
            with T.If(index < tile), T.Then():
                row, col = index // c.block_n, index % c.block_n
                self._store(total[0], self.first_row + row, self.first_col + col)


def rounded_apart(value: Expr) -> Expr:
    """``value`` with every float32 product rounded by itself: nvcc would contract a product and a
    sum to one fused operation, and a tie would fall elsewhere than on other targets.
    """

    def product(node: tirx.Mul) -> Expr:
        if str(node.ty.dtype) != "float32":
            return node
        return tirx.call_pure_extern("float32", "__fmul_rn", node.a, node.b)

    return structural_map(value, (tirx.Mul, product))


def _raster(block: Expr, tiles_m: Expr, tiles_n: Expr) -> tuple[Expr, Expr, Expr]:
    """(z, row tile, column tile): bands of `LOCALITY` row tiles, columns by columns inside."""
    per_matrix, per_band = tiles_m * tiles_n, LOCALITY * tiles_n
    z, rest = _divided(block, per_matrix)
    band, inside = _divided(rest, per_band)
    column, row = _divided(inside, named(tirx.min(tiles_m - band * LOCALITY, LOCALITY)))
    return z, band * LOCALITY + row, column


def _divided(number: Expr, by: Expr) -> tuple[Expr, Expr]:
    """Quotient and remainder of what is not negative, which TVM cannot prove here."""
    return named(tirx.truncdiv(number, by)), named(tirx.truncmod(number, by))


def _tiles(size: Dim, tile: int) -> Expr:
    return _int64((size + (tile - 1)) // tile)


def _int64(value: Dim) -> Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else value
