"""Tiles of tensors to shared memory, by all threads of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from ..intrin import cuda, hopper
from .attention_config import AttentionConfig
from .attention_products import chunk_offset
from .guard import guard

_UNROLLED = 16
"""Copies of a thread that become straight code."""


@dataclass(frozen=True)
class TileCopies:
    """Copies of ``config.piece`` elements into ``shared``, whose rows are swizzled."""

    config: AttentionConfig
    shared: tir.Buffer
    thread: Expr

    def copy(
        self,
        buffer: tir.Buffer,
        size: int,
        base: Expr | int,
        rows: int,
        columns: int,
        first_column: Expr | int,
        count: Expr,
        index: Callable[[Expr, Expr], list[Expr]],
        held: Callable[[Expr], Expr] = lambda row: row,
    ) -> None:
        """shared[base + ..] = [rows][columns] of ``buffer`` from column ``first_column`` on; zeros
        from row ``count`` and column ``size`` on. ``index(row, column)`` is asked for a column
        inside only, but for any row; neighbouring columns are neighbours in memory. ``held(row)``:
        where in shared memory a row lies.
        """
        c = self.config
        per_chunk = cuda.CHUNK_BYTES // c.item_bytes
        per_row = columns // c.piece
        total = rows * per_row
        rounds = -(-total // c.threads)
        padded = not isinstance(first_column, int) or first_column + columns > size
        loop = T.unroll if rounds <= _UNROLLED else T.serial
        with loop(rounds) as turn:
            number = self.thread + turn * c.threads
            row, column = number // per_row, number % per_row * c.piece
            target = chunk_offset(held(row), column // per_chunk, columns // per_chunk, per_chunk)
            target = base + target + column % per_chunk
            d, valid = first_column + column, row < count
            if padded:
                valid = tir.all(valid, d < size)
                d = tir.min(d, size - c.piece)
            source = (*index(row, d),)
            with guard(number < total, total % c.threads != 0):
                self._piece(buffer, target, source, valid)

    def _piece(self, buffer: tir.Buffer, target: Expr, source: tuple, valid: Expr) -> None:
        c, dtype = self.config, self.shared.dtype
        if c.asynchronous:
            addresses = T.address_of(self.shared[target]), T.address_of(buffer[source])
            cuda.copy_async(*addresses, c.piece * c.item_bytes, valid)
            return
        with T.If(valid):
            with T.Then(), T.vectorized(c.piece) as v:
                element = buffer[(*source[:-1], source[-1] + v)]
                T.buffer_store(self.shared, element.astype(dtype), [target + v])
            with T.Else(), T.vectorized(c.piece) as v:
                T.buffer_store(self.shared, tir.const(0, dtype), [target + v])

    def commit(self) -> None:
        """What has been copied since the last time is a group."""
        if self.config.asynchronous:
            cuda.commit_copies()

    def arrive(self, pending: int) -> None:
        """All but the last ``pending`` groups are there, of all threads; and all threads have used
        what came before.
        """
        if self.config.asynchronous:
            cuda.wait_copies(pending)
        if self.config.wgmma:
            hopper.fence_shared()
        T.evaluate(T.cuda.cta_sync())
