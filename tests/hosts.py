"""Which targets this machine can run."""

import functools

import pytest

from opferry.driver.target import TARGETS, required_features, resolve
from opferry.runtime import cpu


@functools.cache
def available(target):
    """Whether this CPU can run code for "llvm", a short name of TARGETS, or an ``mcpu`` of LLVM."""
    short = target in TARGETS or target == "llvm"
    resolved = resolve(target if short else {"kind": "llvm", "mcpu": target})
    return set(required_features(resolved)) <= (cpu.features() or frozenset())


def on(target):
    """``target``; the test is skipped on a CPU that cannot run it."""
    if not available(target):
        pytest.skip(f"needs a CPU for {target}")
    return target
