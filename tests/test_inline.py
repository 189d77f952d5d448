"""The replaced search of TVMScript for the parser at work."""

import inspect
import threading

import pytest
from tvm.script import tirx as T
from tvm.script.parser.core import parser
from tvm.tirx.script.parser import entry

from opferry.driver.target import resolve
from opferry.relay_ops.orders import Order
from opferry.relay_ops.qordered_longformer_attention import Problem
from opferry.schedules.llvm import inline, longformer

THEIRS = getattr(parser.ScriptMacro, inline.REPLACED)


def search():
    """What calls of inline functions find their parser by now."""
    return getattr(parser.ScriptMacro, inline.REPLACED)


@pytest.fixture(autouse=True)
def restored():
    yield
    assert search() is THEIRS


def test_tvm_still_has_the_method_that_is_replaced():
    """A TVM release that looks elsewhere would not notice ours, or miss what it expects."""
    theirs = inspect.getsource(parser.ScriptMacro)
    assert f"def {inline.REPLACED}(self):" in theirs
    assert "finfo.frame.f_globals.get(ScriptMacro.parser_object_name)" in theirs
    assert f"self.{inline.REPLACED}()" in inspect.getsource(entry.TIRInline.__call__)


def test_tvm_searches_its_own_way_otherwise():
    assert inspect.getsource(THEIRS) in inspect.getsource(parser.ScriptMacro)


def test_it_is_replaced_and_finds_the_parser():
    @T.inline
    def double(to, i):
        to[i] = to[i] * 2

    with inline.parsers_by_frames():
        assert search() is inline._find_parser

        @T.prim_func(s_tir=True)
        def func(y: T.Buffer((4,), "int32")):
            for i in range(4):
                double(y, i)

    assert "y[i] * 2" in func.script()


def test_kernels_of_inline_functions_are_parsed_by_it(monkeypatch):
    calls = []

    def spy(macro):
        calls.append(macro)
        return found(macro)

    found = inline._find_parser
    monkeypatch.setattr(inline, "_find_parser", spy)
    longformer.attention(Problem(1, 64, 1, 32, 16, Order.ROW), resolve("x86-avx2"))
    assert calls


def test_nested_uses():
    with inline.parsers_by_frames():
        with inline.parsers_by_frames():
            assert search() is inline._find_parser
        assert search() is inline._find_parser


def test_restored_after_an_exception():
    @inline.parsers_by_frames()
    def fail():
        assert search() is inline._find_parser
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"), inline.parsers_by_frames():
        fail()


def test_uses_of_two_threads_that_overlap():
    """The one that begins first ends first."""
    begun, ended = threading.Event(), threading.Event()

    def second():
        with inline.parsers_by_frames():
            begun.set()
            assert ended.wait(10)
            kept.append(search())

    kept = []
    thread = threading.Thread(target=second)
    with inline.parsers_by_frames():
        thread.start()
        assert begun.wait(10)
    ended.set()
    thread.join()
    assert kept == [inline._find_parser]


def test_no_parser_at_work():
    @T.inline
    def nothing(x):
        T.evaluate(x)

    with (
        inline.parsers_by_frames(),
        pytest.raises(RuntimeError, match="__current_script_parser__ not available"),
    ):
        nothing(1)
