"""The two products of the fused attention kernel on a block's tiles in shared memory.

Both ways give a thread the elements that the fragments of ``intrin.cuda`` give it: rows
``16 m + g + 8 h`` of its warp, columns ``8 n + 2 t`` and the next. ``scores`` and ``output`` hold
them as ``[m][n][h][2]``.

Tiles in shared memory are rows of 16-byte chunks, swizzled: queries ``[rows][steps * depth]``, for
warpgroups ``[steps][rows][depth]``, a slot of the ring ``[keys][depth]``.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda, hopper
from .arch import WARP, Arch
from .attention_config import AttentionConfig
from .attention_place import float32, named


class Fragments:
    """Where a lane's chunks for ``ldmatrix`` lie in a tile of 16-bit elements."""

    def __init__(self, shared: tir.Buffer, place: tuple[Expr, Expr], chunks: int):
        """``place``: (row, chunk) of the lane in the tile's first 16 x 16 corner."""
        row, chunk = place
        self.shared, self.chunks = shared, chunks
        self.row = named(row * chunks)
        self.settled_turn = named(cuda.swizzle(row, chunk, chunks))
        self.turns = T.alloc_buffer((1,), "int32", scope="local")
        self.turn = self.turns[0]

    def forget(self) -> None:
        """Addresses are computed anew from here on, instead of staying in registers all along."""
        cuda.copy_register(self.turn, self.settled_turn)

    def address(self, base: Expr | int, row: int, chunk: int) -> Expr:
        """Of the 16 x 16 corner at ``row``, a multiple of 16, and ``chunk``, which is even: the
        swizzle turns both the same way.
        """
        offset = self.row + (row * self.chunks) + (self.turn ^ chunk)
        return T.address_of(self.shared[base + offset * 8])


def chunk_offset(row: Expr, chunk: Expr | int, chunks: int, per_chunk: int) -> Expr:
    """Element where a chunk of a tile with ``chunks`` chunks a row begins."""
    return (row * chunks + cuda.swizzle(row, chunk, chunks)) * per_chunk


def shared_row(config: AttentionConfig, row: Expr) -> Expr:
    """Where row ``row`` of the tile lies among the queries in shared memory."""
    if not config.wgmma or config.row_tiles == 1:
        return row
    group = hopper.ROWS * config.row_tiles
    fragment, warp = row % config.warp_rows // 16, row // config.warp_rows % 4
    return row // group * group + fragment * hopper.ROWS + warp * 16 + row % 16


class Products:
    """Registers of a thread for both products, and what they read."""

    overwrites = False
    """Whether `add_values` does not add in the first tile of keys, so that nothing is to be cleared
    or scaled before it.
    """

    def __init__(
        self, config: AttentionConfig, arch: Arch, dtype: str, shared: tir.Buffer, thread: Expr
    ):
        self.config, self.arch, self.dtype = config, arch, dtype
        self.shared = shared
        self.lane = named(thread % WARP)
        self.warp_row = named(thread // WARP * config.warp_rows)
        self.per_chunk = cuda.CHUNK_BYTES // config.item_bytes
        self.query_chunks = config.steps * config.depth // self.per_chunk
        self.slot_chunks = config.depth // self.per_chunk
        self.key_tiles, self.value_tiles = config.keys // 8, config.width // 8
        self.scores = T.alloc_buffer((config.row_tiles * self.key_tiles * 4,), scope="local")
        if config.value_steps:
            size = config.row_tiles * self.value_tiles * 4
            self.output = T.alloc_buffer((size,), scope="local")

    def score_slot(self, m: int, n: int, h: int, e: int) -> int:
        return ((m * self.key_tiles + n) * 2 + h) * 2 + e

    def output_slot(self, m: int, n: int, h: int, e: int) -> int:
        return ((m * self.value_tiles + n) * 2 + h) * 2 + e

    def begin_tile(self, turn: Expr) -> None:
        """Before a tile of keys, of which the block saw ``turn`` others: give the registers back
        that hold addresses.
        """

    def clear_scores(self) -> None:
        _clear(self.scores)

    def clear_output(self) -> None:
        _clear(self.output)

    def load_queries(self) -> None:
        """Keep the queries in registers, where there is room."""

    def add_scores(self, slot: Expr | int, step: int) -> None:
        """scores += queries @ keys over part ``step`` of D; the slot of the ring begins at element
        ``slot``.
        """
        raise NotImplementedError

    def take_weights(self) -> None:
        """``scores`` are the weights now: make them the left operand."""
        raise NotImplementedError

    def wait(self, pending: int) -> None:
        """Until at most ``pending`` calls of `add_scores` and `add_values` are under way, where
        they go on by themselves.
        """

    def add_values(self, slot: Expr | int, step: int) -> None:
        """part ``step`` of output += weights @ values"""
        raise NotImplementedError


def _clear(buffer: tir.Buffer) -> None:
    with T.unroll(buffer.shape[0]) as k:
        T.buffer_store(buffer, float32(0), [k])


class HalfWeights(Products):
    """float16 or bfloat16 operands; the weights stay in registers, as left fragments."""

    def __init__(
        self, config: AttentionConfig, arch: Arch, dtype: str, shared: tir.Buffer, thread: Expr
    ):
        super().__init__(config, arch, dtype, shared, thread)
        if config.value_steps:
            size = config.row_tiles * config.keys // 16 * 4
            self.weights = T.alloc_buffer((size,), "uint32", scope="local")

    def take_weights(self) -> None:
        one = self.arch.cp_async  # both came with sm_80
        for m in range(self.config.row_tiles):
            for k in range(self.config.keys // 16):
                for r in range(4):
                    at = self.score_slot(m, 2 * k + r // 2, r % 2, 0)
                    place = (m * (self.config.keys // 16) + k) * 4 + r
                    pair = self.scores[at], self.scores[at + 1]
                    cuda.pack_pair(self.weights, place, *pair, self.dtype, one)

    def _left(self, m: int, k: int) -> list[Expr]:
        """Fragment of the weights of keys 16 k .. 16 k + 15."""
        first = (m * (self.config.keys // 16) + k) * 4
        return [self.weights[first + r] for r in range(4)]


class TensorCores(HalfWeights):
    """A warp's fragments come from shared memory by ldmatrix."""

    def __init__(
        self, config: AttentionConfig, arch: Arch, dtype: str, shared: tir.Buffer, thread: Expr
    ):
        super().__init__(config, arch, dtype, shared, thread)
        shape = arch.mma_float16 if dtype == "float16" else arch.mma_bfloat16
        self.mma_depth = shape[2]
        row, chunk = cuda.a_chunk(self.lane)
        self.query_place = Fragments(shared, (self.warp_row + row, chunk), self.query_chunks)
        self.key_place = Fragments(shared, cuda.b_chunk(self.lane), self.slot_chunks)
        self.value_place = Fragments(shared, cuda.b_chunk_transposed(self.lane), self.slot_chunks)
        self.query_place.forget()
        kept = config.steps * config.depth // 16 if config.queries_in_registers else 1
        self.queries = T.alloc_buffer((kept * config.row_tiles * 4,), "uint32", scope="local")
        self.right = T.alloc_buffer((4,), "uint32", scope="local")

    def begin_tile(self, turn: Expr) -> None:
        for place in (self.query_place, self.key_place, self.value_place):
            place.forget()

    def _load_query(self, k: int, first: int) -> None:
        """Fragments of columns 16 k .. 16 k + 15, to registers ``first``, .. of each m."""
        for m in range(self.config.row_tiles):
            registers = [self.queries[first + 4 * m + r] for r in range(4)]
            cuda.ldmatrix(registers, self.query_place.address(0, 16 * m, 2 * k))

    def load_queries(self) -> None:
        if self.config.queries_in_registers:
            for k in range(self.config.steps * self.config.depth // 16):
                self._load_query(k, 4 * self.config.row_tiles * k)

    def add_scores(self, slot: Expr | int, step: int) -> None:
        c = self.config
        for k in range(c.depth // 16):
            column = step * c.depth // 16 + k
            first = 4 * c.row_tiles * column if c.queries_in_registers else 0
            if not c.queries_in_registers:
                self._load_query(column, 0)
            for pair in range(c.keys // 16):
                registers = [self.right[r] for r in range(4)]
                cuda.ldmatrix(registers, self.key_place.address(slot, 16 * pair, 2 * k))
                for m in range(c.row_tiles):
                    left = [self.queries[first + 4 * m + r] for r in range(4)]
                    for half in range(2):
                        at = self.score_slot(m, 2 * pair + half, 0, 0)
                        self._multiply(self.scores, at, left, half)

    def add_values(self, slot: Expr | int, step: int) -> None:
        c = self.config
        for k in range(c.keys // 16):
            for pair in range(c.depth // 16):
                registers = [self.right[r] for r in range(4)]
                address = self.value_place.address(slot, 16 * k, 2 * pair)
                cuda.ldmatrix(registers, address, transpose=True)
                for m in range(c.row_tiles):
                    left = self._left(m, k)
                    for half in range(2):
                        n = step * c.depth // 8 + 2 * pair + half
                        self._multiply(self.output, self.output_slot(m, n, 0, 0), left, half)

    def _multiply(self, sums: tir.Buffer, at: int, left: list[Expr], half: int) -> None:
        cuda.mma(
            self.dtype,
            self.mma_depth,
            [sums[at + r] for r in range(4)],
            left,
            [self.right[2 * half + r] for r in range(2)],
        )


class Warpgroups(HalfWeights):
    """Four warps together multiply 64 rows, 16 of each, from shared memory: fragments m of theirs
    are the 64 rows m of their queries there, as `shared_row` says. Every call is one group of
    products.

    The first ones overwrite: accumulators that the threads had cleared would be written behind
    `hopper.begin_products` where there are so few tiles that the loop is straight code.
    """

    overwrites = True

    def __init__(
        self, config: AttentionConfig, arch: Arch, dtype: str, shared: tir.Buffer, thread: Expr
    ):
        super().__init__(config, arch, dtype, shared, thread)
        self.group = T.Bind(hopper.warpgroup(thread))
        self.matrix = T.Bind(hopper.descriptor(T.address_of(shared[0])))

    def _operand(self, element: Expr | int) -> Expr:
        """Descriptor of the rows that begin at an element of shared memory."""
        return T.Bind(hopper.advanced(self.matrix, element * self.config.item_bytes))

    def begin_tile(self, turn: Expr) -> None:
        self.adds = turn > 0

    def clear_scores(self) -> None:
        """The first products do not add."""

    def add_scores(self, slot: Expr | int, step: int) -> None:
        c = self.config
        registers = self.key_tiles * 4
        own = (step * c.rows + self.group * (hopper.ROWS * c.row_tiles)) * c.depth
        left, right = self._operand(own), self._operand(slot)
        hopper.begin_products()
        for m in range(c.row_tiles):
            scores = [self.scores[m * registers + r] for r in range(registers)]
            rows = m * hopper.ROWS * hopper.ROW_BYTES
            for k in range(0, hopper.ROW_BYTES, hopper.STEP_BYTES):
                a, b = hopper.advanced(left, rows + k), hopper.advanced(right, k)
                hopper.multiply(self.dtype, scores, a, b, accumulate=step + k > 0)
        hopper.commit_products()

    def add_values(self, slot: Expr | int, step: int) -> None:
        c = self.config
        registers = c.depth // 8 * 4
        right = self._operand(slot)
        hopper.begin_products()
        for m in range(c.row_tiles):
            first = self.output_slot(m, step * c.depth // 8, 0, 0)
            output = [self.output[first + r] for r in range(registers)]
            for k in range(c.keys // 16):
                b = hopper.advanced(right, 16 * k * hopper.ROW_BYTES)
                sums = True if k else self.adds
                hopper.multiply(self.dtype, output, self._left(m, k), b, sums, transposed=True)
        hopper.commit_products()

    def wait(self, pending: int) -> None:
        hopper.wait_products(pending)


class OrdinaryUnits(Products):
    """float32 in shared memory, multiply-adds of float32; the weights go through shared memory,
    each warp's rows by themselves.
    """

    def __init__(
        self, config: AttentionConfig, arch: Arch, dtype: str, shared: tir.Buffer, thread: Expr
    ):
        super().__init__(config, arch, dtype, shared, thread)
        self.left = T.alloc_buffer((2 * config.row_tiles, 4), scope="local")
        self.right = T.alloc_buffer((4,), scope="local")
        self.weights = config.shared_elements - config.weight_elements

    def _rows(self) -> list[tuple[int, int, Expr]]:
        c = self.config
        return [
            (m, h, self.warp_row + 16 * m + cuda.accumulator_row(self.lane, h))
            for m in range(c.row_tiles)
            for h in range(2)
        ]

    def _load(self, registers: list[Expr], offset: Expr) -> None:
        cuda.load_shared(registers, T.address_of(self.shared[offset]))

    def add_scores(self, slot: Expr | int, step: int) -> None:
        c = self.config
        with T.serial(self.slot_chunks) as chunk:
            for k, (_, _, row) in enumerate(self._rows()):
                at = chunk_offset(row, step * self.slot_chunks + chunk, self.query_chunks, 4)
                self._load([self.left[k, d] for d in range(4)], at)
            for n in range(c.keys // 8):
                for e in range(2):
                    key = 8 * n + cuda.accumulator_column(self.lane, e)
                    at = slot + chunk_offset(key, chunk, self.slot_chunks, 4)
                    self._load([self.right[d] for d in range(4)], at)
                    for k, (m, h, _) in enumerate(self._rows()):
                        place = self.score_slot(m, n, h, e)
                        for d in range(4):
                            product = self.left[k, d] * self.right[d]
                            T.buffer_store(self.scores, self.scores[place] + product, [place])

    def take_weights(self) -> None:
        c = self.config
        column = cuda.accumulator_column(self.lane, 0)
        for m, h, row in self._rows():
            for n in range(c.keys // 8):
                at = self.weights + chunk_offset(row, 2 * n + column // 4, c.keys // 4, 4)
                first = self.score_slot(m, n, h, 0)
                pair = [self.scores[first + e] for e in range(2)]
                cuda.store_shared(T.address_of(self.shared[at + column % 4]), pair)
        T.evaluate(T.cuda.warp_sync())

    def add_values(self, slot: Expr | int, step: int) -> None:
        c = self.config
        column = cuda.accumulator_column(self.lane, 0)
        with T.serial(c.keys // 4) as quad:
            for k, (_, _, row) in enumerate(self._rows()):
                at = self.weights + chunk_offset(row, quad, c.keys // 4, 4)
                self._load([self.left[k, d] for d in range(4)], at)
            for key in range(4):
                for n in range(c.depth // 8):
                    chunk = 2 * n + column // 4
                    at = slot + chunk_offset(quad * 4 + key, chunk, self.slot_chunks, 4)
                    self._load([self.right[e] for e in range(2)], at + column % 4)
                    for k, (m, h, _) in enumerate(self._rows()):
                        for e in range(2):
                            place = self.output_slot(m, step * c.depth // 8 + n, h, e)
                            product = self.left[k, key] * self.right[e]
                            T.buffer_store(self.output, self.output[place] + product, [place])
