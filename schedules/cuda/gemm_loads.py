"""Tiles of an operand of the int8 matrix product from global to shared memory, by all threads of a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda as ptx
from ..intrin.cuda import CHUNK_BYTES as CHUNK
from .arch import Arch
from .attention_place import named
from .gemm_config import GemmConfig
from .guard import guard

Dim = int | Expr


@dataclass(frozen=True)
class Rows:
    """An operand as the copies see it: ``rows`` rows of ``k`` bytes."""

    entry: Callable[[Expr, Expr], Expr]
    """``entry(row, k)``: the element, for both inside."""
    rows: Dim
    k: int
    run: int
    """Bytes of a row that lie one after the other and aligned, from every multiple of it on: a
    power of two, at most 16.
    """
    row_run: int = 1
    """The same of rows, at every k."""


class TileLoads:
    """Emits the statements; one object for each launch."""

    def __init__(self, config: GemmConfig, arch: Arch, shared: tirx.Buffer, thread: Expr):
        self.c, self.arch, self.shared, self.thread = config, arch, shared, thread

    def load(self, source: Rows, first: Expr, rows: int, base: Expr, step: Expr) -> None:
        """A tile of ``rows`` rows from ``first`` on, to ``base``: each thread some pieces of it."""
        c = self.c
        if source.run < 4 and source.row_run % 4 == 0:
            self._columns(source, first, rows, base, step)
            return
        size = max(source.run, 4)
        per_row = c.block_k // size
        count = rows * per_row
        for i in range(-(-count // c.threads)):
            index = self.thread + i * c.threads
            with guard(index < count, (i + 1) * c.threads > count):
                row, byte = index // per_row, index % per_row * size
                chunk = ptx.swizzle(row, byte // CHUNK, c.block_k // CHUNK)
                target = base + row * c.block_k + chunk * CHUNK + byte % CHUNK
                target = T.address_of(self.shared[target])
                self._copy(target, source, first + row, step * c.block_k + byte, size)

    def _columns(self, source: Rows, first: Expr, rows: int, base: Expr, step: Expr) -> None:
        """The same of columns that are consecutive bytes: squares of 4 x 4 bytes, transposed in
        registers. Up to eight neighbouring squares of a column are a sector of global memory.
        """
        c = self.c
        words = T.alloc_buffer((4,), "uint32", scope="local")
        halves = T.alloc_buffer((4,), "uint32", scope="local")
        count, along, across = rows * c.block_k // 16, c.block_k // 4, gcd(8, rows // 4)
        for i in range(-(-count // c.threads)):
            index = self.thread + i * c.threads
            with guard(index < count, (i + 1) * c.threads > count):
                row = named((index // (across * along) * across + index % across) * 4)
                byte = named(index // across % along * 4)
                m, k = named(first + row), named(step * c.block_k + byte)
                for d in range(4):
                    T.buffer_store(words, tirx.const(0, "uint32"), [d])
                    with T.If(tirx.all(m < source.rows, k + d < source.k)), T.Then():
                        address = T.address_of(source.entry(m, k + d))
                        T.evaluate(T.ptx["ld.global.b32"](words[d], address))
                ptx.transpose_bytes(words, halves)
                for r in range(4):
                    chunk = ptx.swizzle(row + r, byte // CHUNK, c.block_k // CHUNK)
                    target = base + (row + r) * c.block_k + chunk * CHUNK + byte % CHUNK
                    T.evaluate(T.ptx["st.shared.b32"](T.address_of(self.shared[target]), words[r]))

    def _copy(self, target: Expr, source: Rows, row: Expr, k: Expr, size: int) -> None:
        """``size`` bytes of a row, zeros beyond its end."""
        inside = tirx.all(row < source.rows, k < source.k)
        row = tirx.min(row, source.rows - 1)
        if source.run < 4:
            word = tirx.const(0, "uint32")
            for i in range(4):
                byte = source.entry(row, tirx.min(k + i, source.k - 1))
                byte = byte.astype("uint8").astype("uint32") << tirx.const(8 * i, "uint32")
                valid = tirx.all(inside, k + i < source.k)
                word = word | tirx.if_then_else(valid, byte, tirx.const(0, "uint32"))
            T.evaluate(T.ptx["st.shared.b32"](target, word))
            return
        address = T.address_of(source.entry(row, tirx.min(k, source.k - size)))
        if self.arch.cp_async:
            ptx.copy_async(target, address, size, inside)
            return
        words = size // 4
        held = T.alloc_buffer((words,), "uint32", scope="local")
        registers = [held[i] for i in range(words)]
        for i in range(words):
            T.buffer_store(held, tirx.const(0, "uint32"), [i])
        vector = f".v{words}" if words > 1 else ""
        with T.If(inside), T.Then():
            T.evaluate(T.ptx[f"ld.global{vector}.b32"](*registers, address))
        T.evaluate(T.ptx[f"st.shared{vector}.b32"](target, *registers))
