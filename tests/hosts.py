"""Which targets this machine can run."""

import functools

import pytest

from opferry.driver.target import TARGETS, required_features, resolve
from opferry.runtime import cpu


@functools.cache
def _runs(mcpu):
    target = resolve({"kind": "llvm", "mcpu": mcpu})
    return set(required_features(target)) <= (cpu.features() or frozenset())


def available(target):
    """Whether this CPU can run code for a short name of TARGETS, or for an ``mcpu`` of LLVM."""
    return _runs(TARGETS[target]["mcpu"] if target in TARGETS else target)


def on(target):
    """``target``; the test is skipped on a CPU that cannot run it."""
    if not available(target):
        pytest.skip(f"needs a CPU like {TARGETS.get(target, {'mcpu': target})['mcpu']}")
    return target
