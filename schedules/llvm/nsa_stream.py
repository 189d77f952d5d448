"""Outputs of the NSA kernel that are too large for the caches go past them.

Then no line of the output is read before it is written, and none takes the place of keys and
values. A smaller output stays where the next kernel finds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.target import Target
from tvm.tirx import Buffer
from tvm.tirx.script.builder import ir as T

from ..intrin import x86_stream
from .vector import vector_unit

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem

STREAM_BYTES = 32 << 20
"""From so many bytes on an output is streamed: what the last-level cache of a few cores keeps."""
_WIDE = "float32"


class OutputStream:
    """How a kind of task stores attention_out past the caches."""

    def __init__(self, problem: Problem, target: Target):
        item = 4 if problem.dtype == _WIDE else 2
        row = problem.value_size * item
        self.available = (
            "attention_out" in problem.outputs
            and vector_unit(target).lanes == x86_stream.LANES
            and row % x86_stream.LINE_BYTES == 0
        )
        """Rows are whole lines, and one instruction stores 16 elements."""
        self._tokens = -(-STREAM_BYTES // (problem.query_heads * row))

    @property
    def sources(self) -> list[str]:
        """LLVM text that the kernel needs."""
        return [x86_stream.SOURCE] if self.available else []

    def wanted(self, Out: Buffer) -> Expr:
        """Whether Out is streamed."""
        if not self.available:
            return tir.const(False, "bool")
        return Out.shape[0] >= self._tokens

    def store(self, Out: Buffer, index: list[Expr], value: Expr) -> Expr:
        """What streams 16 elements, rounded to the storage type, to ``index``."""
        bits = value if str(value.ty) == f"{_WIDE}x16" else tir.reinterpret("uint16x16", value)
        return x86_stream.store(tir.address_of(Out[tuple(index)]), bits)

    def end(self) -> None:
        """After the last store of a thread."""
        if self.available:
            T.evaluate(x86_stream.fence())
