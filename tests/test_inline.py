"""The replaced search of TVMScript for the parser at work."""

import inspect

import pytest
from tvm.script import tirx as T
from tvm.script.parser.core import parser
from tvm.tirx.script.parser import entry

from opferry.schedules.llvm import inline


def test_tvm_still_has_the_method_that_is_replaced():
    """A TVM release that looks elsewhere would not notice ours, or miss what it expects."""
    theirs = inspect.getsource(parser.ScriptMacro)
    assert f"def {inline.REPLACED}(self):" in theirs
    assert "finfo.frame.f_globals.get(ScriptMacro.parser_object_name)" in theirs
    assert f"self.{inline.REPLACED}()" in inspect.getsource(entry.TIRInline.__call__)


def test_it_is_replaced_and_finds_the_parser():
    assert getattr(parser.ScriptMacro, inline.REPLACED) is inline._find_parser

    @T.inline
    def double(to, i):
        to[i] = to[i] * 2

    @T.prim_func(s_tir=True)
    def func(y: T.Buffer((4,), "int32")):
        for i in range(4):
            double(y, i)

    assert "y[i] * 2" in func.script()


def test_no_parser_at_work():
    @T.inline
    def nothing(x):
        T.evaluate(x)

    with pytest.raises(RuntimeError, match="__current_script_parser__ not available"):
        nothing(1)
