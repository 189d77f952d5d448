"""NPUTransQuantParam, compiled, against specification and reference."""

import numpy as np
import pytest
from linear_cases import check, f32

import opferry
from opferry.frontend.builders import node_model
from opferry.runtime.errors import InvalidNodeError

PACK_CASES = [
    # scale bits, offset, round_mode, packed
    (0x3E99999A, 2.5, 0, 0x40403E998000),
    (0x3C257A78, -7.0, 0, 0x7F203C256000),
    (0x3D4CCCCD, -200.0, 0, 0x67003D4CC000),
    (0x3F801000, 0.0, 1, 0x40003F800000),
    (0x3F803000, 0.0, 1, 0x40003F804000),
    (0x3FFFF000, 0.0, 1, 0x400040000000),
    (0x80000001, 400.7, 1, 0x5FE080000000),
    (0x3F800000, -300.2, 0, 0x60003F800000),
]


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
def test_trans_quant_param(round_mode, constant):
    cases = [case for case in PACK_CASES if case[2] == round_mode]
    feeds = {
        "scale": np.array([case[0] for case in cases], np.uint32).view(np.float32),
        "offset": f32(*(case[1] for case in cases)),
    }
    attrs = {"round_mode": round_mode}
    y = check(feeds, attrs, ["scale"] if constant else [], op="NPUTransQuantParam")
    assert [hex(q) for q in y] == [hex(case[3]) for case in cases]


@pytest.mark.parametrize(
    ("scale", "offset", "symbolic"),
    [
        ((3,), None, {}),
        ((1, 3), (3,), {}),
        ((1,), (4,), {}),
        ((4,), (1,), {"scale": {0: "t"}}),
        ((3,), (3,), {"scale": {0: "t"}, "offset": {0: "u"}}),
    ],
)
def test_trans_quant_param_shapes(scale, offset, symbolic):
    rng = np.random.default_rng(0)
    feeds = {"scale": rng.standard_normal(scale).astype(np.float32)}
    if offset:
        feeds["offset"] = (rng.standard_normal(offset) * 100).astype(np.float32)
    check(feeds, {}, (), symbolic, op="NPUTransQuantParam")


@pytest.mark.parametrize(
    ("message", "feeds", "attrs"),
    [
        ('attribute "round_mode": found 2', {"scale": (np.float32, (3,))}, {"round_mode": 2}),
        ('input "scale" shape: found (2, 3)', {"scale": (np.float32, (2, 3))}, {}),
        (
            'input "offset" length: found 2',
            {"scale": (np.float32, (3,)), "offset": (np.float32, (2,))},
            {},
        ),
        (
            'input "offset" rank: found 2',
            {"scale": (np.float32, (3,)), "offset": (np.float32, (1, 3))},
            {},
        ),
    ],
)
def test_refusals_of_trans_quant_param(message, feeds, attrs):
    model = node_model("NPUTransQuantParam", feeds, check=False, **attrs)
    with pytest.raises(InvalidNodeError) as caught:
        opferry.compile(model)
    assert message in str(caught.value)
