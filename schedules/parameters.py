"""What every kernel of the int8 matrix product begins with, on all targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.tirx.script.builder import ir as T

if TYPE_CHECKING:
    from ..relay_ops.int8_matmul import Problem


def parameters(problem: Problem) -> list[tirx.Buffer]:
    """Of the PrimFunc under construction: a, b, the operands and y."""
    types = {"a": problem.a, "b": problem.b}
    types |= {f"operand{i}": type_ for i, type_ in enumerate(problem.operands)}
    types["y"] = problem.y
    return [
        T.arg(name, T.buffer([*type_.shape], str(type_.dtype))) for name, type_ in types.items()
    ]
