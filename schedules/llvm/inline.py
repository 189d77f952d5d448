"""Calls of ``T.inline`` functions that find their parser by the frames of the stack alone.

TVM looks for the parser at work in the globals of every frame, but has ``inspect`` describe each of
them first, with its module and its line of source: a quarter of the time to compile a kernel that
calls thirty such functions.
"""

from __future__ import annotations

import sys

from tvm.script.parser.core.parser import Parser, ScriptMacro

REPLACED = "_find_parser_def"
"""The method of TVM's ``ScriptMacro`` that ``find_parsers_by_frames`` replaces."""


def find_parsers_by_frames() -> None:
    """The same search in all of the process."""
    setattr(ScriptMacro, REPLACED, _find_parser)


def _find_parser(macro: ScriptMacro) -> Parser:
    frame = sys._getframe()
    while frame is not None:
        parser = frame.f_globals.get(macro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{macro.parser_object_name} not available")
