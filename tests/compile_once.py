"""Compiled modules that the tests of a process share.

What compiling says or does besides (warnings, patched schedules) happens the first time only: tests
of that call `opferry.compile`.
"""

import functools
import json

import onnx

import opferry


def compile_once(model, target="llvm"):
    """``opferry.compile``, but the same model is compiled for a target the first time only."""
    return _compiled(model.SerializeToString(deterministic=True), json.dumps(target))


@functools.lru_cache(maxsize=64)
def _compiled(model, target):
    return opferry.compile(onnx.load_model_from_string(model), json.loads(target))
