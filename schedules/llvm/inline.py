"""Calls of ``T.inline`` functions that find their parser by the frames of the stack alone.

TVM looks for the parser at work in the globals of every frame, but has ``inspect`` describe each of
them first, with its module and its line of source: a quarter of the time to compile a kernel that
calls thirty such functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from tvm.script.parser.core.parser import Parser, ScriptMacro

REPLACED = "_find_parser_def"
"""The method of TVM's ``ScriptMacro`` that ``parsers_by_frames`` replaces."""

_lock = Lock()
_replaced: list[Callable[[ScriptMacro], Parser]] = []
"""What each use under way found: TVM's method, then ours. So the last to end, in whichever thread,
restores TVM's.
"""


@contextmanager
def parsers_by_frames() -> Iterator[None]:
    """The same search, meanwhile. Also a decorator of what parses a kernel."""
    with _lock:
        _replaced.append(getattr(ScriptMacro, REPLACED))
        setattr(ScriptMacro, REPLACED, _find_parser)
    try:
        yield
    finally:
        with _lock:
            setattr(ScriptMacro, REPLACED, _replaced.pop())


def _find_parser(macro: ScriptMacro) -> Parser:
    frame = sys._getframe()
    while frame is not None:
        parser = frame.f_globals.get(macro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{macro.parser_object_name} not available")
