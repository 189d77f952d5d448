"""Conditions that vanish where they are known to hold."""

from contextlib import AbstractContextManager, ExitStack, nullcontext

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T


def guard(condition: Expr, needed: bool) -> AbstractContextManager:
    """``if condition`` around the statements of a ``with``; nothing unless ``needed``."""
    if not needed:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(T.If(condition))
    stack.enter_context(T.Then())
    return stack
