"""int8 products whose sizes are none of the tiles', exact: few columns, rows of A in pieces."""

import numpy as np
import pytest
from compile_once import compile_once
from hosts import on

from opferry.frontend.builders import node_model

ROWS = (1, 15, 16, 17, 33, 50, 130)


def _check(target, n, k, m, batch=()):
    rng = np.random.default_rng(n * k)
    x2 = rng.integers(-128, 128, (k, n)).astype(np.int8)
    feeds = {"x2": x2, "scale": np.ones(1, np.float32)}
    feeds["x1"] = (np.int8, (*batch, m, k))
    fixed = ["x2", "scale"]
    module = compile_once(
        node_model("NPUQuantMatmul", feeds, initializers=fixed, output_dtype=6), target
    )
    for rows in ROWS if isinstance(m, str) else (m,):
        x1 = rng.integers(-128, 128, (*batch, rows, k)).astype(np.int8)
        (y,) = module.run({"x1": x1}).values()
        assert np.array_equal(y, x1.astype(np.int64) @ x2.astype(np.int64)), rows


@pytest.mark.parametrize("n", [16, 33, 40, 48, 49])
@pytest.mark.parametrize("k", [64, 100, 768])
@pytest.mark.parametrize("m", ["M", 9, 130])
def test_few_columns(m, k, n):
    _check(on("x86-amx"), n, k, m)


@pytest.mark.parametrize("k", [1, 17, 100, 500, 1024, 1100])
@pytest.mark.parametrize("m", ["M", 70])
def test_rows_in_pieces(m, k):
    """Copied by tiles up to 1024 bytes, packed beyond."""
    _check(on("x86-amx"), 70, k, m, (3,))
