"""Sums to int8 on every tier of x86: rounding, both bounds, and what int32 cannot hold."""

import numpy as np
import pytest
from compile_once import compile_once
from hosts import on

from opferry.driver.target import TARGETS
from opferry.frontend.builders import node_model

HOST = [*(name for name in TARGETS if name.startswith("x86")), "llvm"]
CASES = [
    # sum, scale, y
    (1, 0.5, 0),
    (3, 0.5, 2),
    (-3, 0.5, -2),
    (255, 0.5, 127),
    (-257, 0.5, -128),
    (127, 1, 127),
    (-128, 1, -128),
    (128, 1, 127),
    (-129, 1, -128),
    (2**31 - 1, 1, 127),
    (-(2**31), 1, -128),
    (2**30, 2**30, 127),
    (-(2**30), 2**30, -128),
    (1, np.inf, 127),
    (-1, np.inf, -128),
    (2, -(2.0**127), -128),
    (-3, -(2.0**127), 127),
]


def _outputs(op, target, **feeds):
    """Columns of one row, whose sums are the bias alone: int8 [N]."""
    sums, scales = (np.array(column) for column in list(zip(*CASES))[:2])
    N = len(CASES)
    feeds = {
        "x1": np.zeros((1, 4), np.int8),
        "x2": np.zeros((4, N), np.int8),
        "scale": scales.astype(np.float32),
        "bias": sums.astype(np.int32),
    } | feeds
    model = node_model(op, feeds, initializers=["x2"], output_dtype=3)
    (y,) = compile_once(model, target).run({k: v for k, v in feeds.items() if k != "x2"}).values()
    return y[0]


@pytest.mark.parametrize("target", HOST)
def test_bounds(target):
    on(target)
    y = _outputs("NPUQuantMatmul", target)
    assert y.tolist() == [want for *_, want in CASES]


@pytest.mark.parametrize("target", HOST)
def test_bounds_before_an_offset(target):
    """Nine bits before the offset: what is beyond int8 comes back into it."""
    on(target)
    y = _outputs("NPUQuantMatmul", target, offset=np.full(len(CASES), -100, np.float32))
    t = np.clip(np.rint([float(s) * float(scale) for s, scale, _ in CASES]), -256, 255)
    assert y.tolist() == np.clip(t - 100, -128, 127).tolist()
