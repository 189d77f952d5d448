"""SpeedFusionAttention with a bias that drops keys by the lowest number of its type, as exported
models do: a row that has no other keys averages all values, and its maximum is that number.
"""

import ml_dtypes
import numpy as np
import pytest
from compile_once import compile_once
from hosts import on
from numpy.testing import assert_allclose

from opferry.frontend.builders import node_model
from opferry.reference.compare import compare

OP = "SpeedFusionAttention"
F32, BF16 = np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ["attention_out", "softmax_max", "softmax_sum"]


def padded(S1, S2, D, dtype):
    """Inputs of one head; row 0 sees no key, row 1 the fourth, the others about half of them."""
    rng = np.random.default_rng([S1, S2, D])
    shapes = {"query": S1, "key": S2, "value": S2}
    feeds = {name: rng.standard_normal((1, 1, n, D)).astype(dtype) for name, n in shapes.items()}
    dropped = rng.random((1, 1, S1, S2)) < 0.5
    dropped[0, 0, :2] = True
    dropped[0, 0, 1:2, 3] = False
    lowest = ml_dtypes.finfo(dtype).min
    return feeds | {"pse": np.where(dropped, lowest, 0).astype(dtype)}


ACROSS, FEW, PAIRS, PARTS = (
    (40, 70, 33, F32),
    (3, 70, 64, F32),
    (40, 70, 64, BF16),
    (1, 1500, 32, BF16),
)


@pytest.mark.parametrize(
    ("case", "target", "pse_type"),
    [
        *((case, "llvm", 0) for case in (ACROSS, FEW, PAIRS, PARTS)),
        (ACROSS, "llvm", 1),
        (ACROSS, "x86-avx512", 0),
        (PAIRS, "x86-avx512", 0),
        (ACROSS, "x86-64", 0),
    ],
)
def test_bias_of_the_lowest_number(case, target, pse_type):
    S1, S2, D, dtype = case
    feeds = padded(S1, S2, D, dtype)
    attrs = {"head_num": 1, "input_layout": "BNSD", "pse_type": pse_type, "scale": 0.125}
    module = compile_once(node_model(OP, feeds, OUTPUTS, **attrs), on(target))
    got = [module.run(feeds)[name] for name in OUTPUTS]
    for verdict in compare(OP, feeds, attrs, got):
        assert verdict.ok, verdict
    lowest = float(feeds["pse"][0, 0, 0, 0]) * (1 if pse_type == 0 else attrs["scale"])
    assert_allclose(got[1][0, 0, 0], lowest, rtol=1e-6)
    assert_allclose(got[2][0, 0, 0], S2, rtol=1e-6)
    mean = feeds["value"].astype(F32).mean(axis=2)[0, 0]
    rounding = {F32: 1e-6, BF16: 2.0**-8}[dtype]
    assert_allclose(got[0][0, 0, 0].astype(F32), mean, rtol=rounding, atol=rounding)
