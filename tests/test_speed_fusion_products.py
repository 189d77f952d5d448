"""SpeedFusionAttention's two products on each instruction set: registers, matrix tiles, terms of
float32 and float16, values at the ends of their types.
"""

import re

import numpy as np
import pytest
from hosts import on
from numpy.testing import assert_allclose, assert_array_equal
from speed_fusion_cases import BF16, CAUSAL, F16, F32, build, check, qkv, random_mask, run


@pytest.mark.parametrize(
    ("dtype", "product"), [(F32, "vfmadd231ps"), (BF16, "vdpbf16ps")], ids=["float32", "bfloat16"]
)
def test_products_keep_their_sums_in_registers(dtype, product):
    """Loops of at least 16 multiply-adds of 512 bits, on the bfloat16 CPU; none touches the stack
    with a vector.
    """
    target = {"kind": "llvm", "mcpu": "znver5"}
    feeds = qkv(S1=128, S2=256, D=64, dtype=dtype)
    module = build(feeds, target=target, head_num=2, input_layout="BNSD", scale=0.125)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    blocks = re.split(r"\n(?=\.\w+:)", "\n".join(texts))
    loops = [b for b in blocks if len(re.findall(rf"\t{product}\t.*%zmm", b)) >= 16]
    assert len(loops) >= 2  # scores, values
    for loop in loops:
        jump = re.search(rf"\n\tj\w+\t{re.escape(loop.split(':')[0])}\n", loop)
        if jump:
            assert not re.search(r"%rsp.*mm|mm.*%rsp", loop[: jump.start()])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_large_scores(dtype):
    """Scores of 2e10, where half a unit in the last place is a thousand."""
    feeds = qkv(S1=40, S2=70, D=33, dtype=F32)
    for name in ("query", "key"):
        feeds[name] = np.clip(feeds[name] * F32.type(3e4), -65504, 65504)
    feeds = {name: value.astype(dtype) for name, value in feeds.items()}
    check(feeds, head_num=2, input_layout="BNSD", scale=1.0)


def test_large_values():
    """Weights above 1 would make the sum of a later tile of keys infinite."""
    feeds = qkv(N1=1, N2=1, S1=40, S2=97, D=33)
    feeds["query"][:] = 1
    feeds["key"][:], feeds["key"][:, :, 96] = 0, 0.16
    feeds["value"][:], feeds["value"][:, :, 96] = 0, 2e36
    check(feeds, head_num=1, input_layout="BNSD", scale=1.0)


def test_bfloat16_multiplies_matrix_tiles():
    """Four sums, two tiles from either side: each is loaded once for two products."""
    feeds = qkv(S1=128, S2=256, D=64, dtype=BF16)
    module = build(feeds, target="x86-amx", head_num=2, input_layout="BNSD", scale=0.125)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    blocks = re.split(r"\n(?=\.\w+:)", "\n".join(texts))
    products = [b for b in blocks if "\ttdpbf16ps\t" in b]
    assert len(products) >= 2  # scores, values
    for block in products:
        dots, loads = (block.count(f"\t{name}\t") for name in ("tdpbf16ps", "tileloadd"))
        assert dots % 4 == 0
        assert 4 * loads <= 6 * dots  # sums of the output besides, once for 64 keys
    text = "\n".join(texts)
    assert "\tldtilecfg\t" in text
    assert "\ttilerelease" in text
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize(
    ("dtype", "scores", "output"), [(F32, 24, 24), (F16, 16, 12)], ids=["float32", "float16"]
)
def test_matrix_tiles_multiply_terms(dtype, scores, output):
    """Products of terms, four tiles each: six of float32, four and three of float16."""
    feeds = qkv(S1=128, S2=256, D=32, dtype=dtype)
    attrs = {"head_num": 2, "input_layout": "BNSD"}
    blocks = re.split(r"\n(?=\.\w+:)", listing(feeds, scale=0.125, **attrs))
    dots = {b.count("\ttdpbf16ps\t") for b in blocks} - {0}
    assert dots
    assert all(n % scores == 0 or n % output == 0 for n in dots)
    assert all(any(n % step == 0 for n in dots) for step in (scores, output))
    assert "tdpbf16ps" not in listing(feeds, scale=1e20, **attrs)


def listing(feeds, **attrs):
    module = build(feeds, target="x86-amx", **attrs)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    return "\n".join(texts)


@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("layout", "S1", "S2", "D"),
    [
        ("BSH", 33, 31, 64),
        ("SBH", 17, 97, 33),
        ("BNSD", 300, 290, 80),
        ("BSND", 64, 160, 128),
        ("BNSD", 40, 70, 5),
        ("BSND", 50, 33, 48),
    ],
)
@pytest.mark.parametrize("mode", [0, 3])
def test_terms_on_matrix_tiles(layout, S1, S2, D, mode, dtype):
    """Whole and partial blocks of 32 keys, rows and elements, odd D, D below a register."""
    feeds = qkv(B=2, N1=4, N2=2, S1=S1, S2=S2, D=D, dtype=dtype, layout=layout)
    feeds["query"] *= 3  # the maximum moves
    if mode:
        feeds["atten_mask"] = CAUSAL
    check(
        feeds,
        target=on("x86-amx"),
        head_num=4,
        input_layout=layout,
        scale=D**-0.5,
        sparse_mode=mode,
    )


def test_terms_are_as_exact_as_float32():
    """A tenth of what the operator allows: eight significant bits would miss it by a thousand,
    sixteen by four.
    """
    feeds = qkv(N1=1, N2=1, S1=64, S2=96, D=64)
    attrs = {"head_num": 1, "input_layout": "BNSD", "scale": 0.5}
    module = build(feeds, target=on("x86-amx"), **attrs)
    q, k, v = (feeds[name][0, 0].astype(np.float64) for name in ("query", "key", "value"))
    scores = q @ k.T * 0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    assert_allclose(run(module, feeds)[0][0, 0], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (1, 1, 1e-34),
        (1, 1, 3e-38),
        (1e-36, 1e36, 1),
        (1e36, 1e-36, 1e30),
        (1e-20, 1e20, 1e-30),
        ([1e36, 1e-36], [1e-36, 1e36], [1e30, 1e-34]),
        ([1, 0], [0, 1], [1e12, 1e-36]),
        (1, 1, [0, 1e36]),
    ],
)
def test_elements_of_any_magnitude(query, key, value, mode):
    """By even and by odd elements of a head; each column of the output in its own magnitude."""
    feeds = qkv(N1=1, N2=1, S1=70, S2=97, D=34)
    for name, scale in zip(("query", "key", "value"), (query, key, value)):
        feeds[name] = (feeds[name] * np.resize(scale, 34)).astype(F32)
    if mode:
        feeds["atten_mask"] = CAUSAL
    attrs = {"head_num": 1, "input_layout": "BNSD", "scale": 0.25, "sparse_mode": mode}
    got = run(build(feeds, target=on("x86-amx"), **attrs), feeds)[0][0, 0]
    q, k, v = (feeds[name][0, 0].astype(np.float64) for name in ("query", "key", "value"))
    scores = q @ k.T * 0.25
    if mode:
        scores[np.arange(97) > np.arange(70)[:, None] + 27] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    atol = 2e-5 * np.abs(v).max(0)
    assert (np.abs(got - expected) <= atol + 2e-5 * np.abs(expected)).all()


def test_terms_of_the_largest_values_are_finite():
    """The nearest bfloat16 is infinite."""
    feeds = qkv(S1=40, S2=1, D=32)
    feeds["value"][:] = 3.4e38
    module = build(feeds, target=on("x86-amx"), head_num=2, input_layout="BNSD", scale=0.2)
    assert_allclose(run(module, feeds)[0], np.full((1, 2, 40, 32), 3.4e38), rtol=1e-6)


@pytest.mark.parametrize("target", ["llvm", "x86-amx"])
@pytest.mark.parametrize(
    ("layout", "S1", "S2", "D"),
    [("BSH", 33, 31, 64), ("SBH", 17, 97, 33), ("BNSD", 300, 290, 80), ("BSND", 64, 160, 128)],
)
@pytest.mark.parametrize("mode", [0, 3])
def test_bfloat16(layout, S1, S2, D, mode, target):
    """Keys in place and copied, whole and partial blocks of 32 keys, rows and elements."""
    feeds = qkv(B=2, N1=4, N2=2, S1=S1, S2=S2, D=D, dtype=BF16, layout=layout)
    feeds["query"] = (feeds["query"].astype(F32) * 3).astype(BF16)  # the maximum moves
    if mode:
        feeds["atten_mask"] = CAUSAL
    check(
        feeds,
        target=on(target),
        head_num=4,
        input_layout=layout,
        scale=D**-0.5,
        sparse_mode=mode,
    )


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_products_follow_a_rising_maximum(dtype):
    """Scores rise by more than the reference's slack, in every tile of keys and inside of one."""
    feeds = qkv(S1=40, S2=700, D=32, dtype=dtype)
    feeds["query"][:] = 1
    feeds["key"][:] = np.linspace(-0.9, 0.9, 700).astype(dtype)[:, None]
    check(feeds, head_num=2, input_layout="BNSD", scale=1.0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("row", [0, 15, 31])
def test_a_row_of_nan_is_alone(dtype, row):
    """Rows share registers and tiles, not results."""
    feeds = qkv(N1=1, N2=1, S1=40, S2=70, D=32, dtype=dtype)
    module = build(feeds, head_num=1, input_layout="BNSD", scale=0.2)
    expected = run(module, feeds)
    feeds["query"][0, 0, row] = np.nan
    got = run(module, feeds)
    others = np.arange(40) != row
    for before, after in zip(expected[:3], got[:3]):
        assert_array_equal(after[:, :, others], before[:, :, others])


def test_matrix_tiles_beside_narrow_vectors():
    """A virtual machine may show AMX and hide AVX-512: matrix tiles are left alone."""
    mattr = ["+amx-tile", "+amx-int8", "+amx-bf16"]
    target = {"kind": "llvm", "mcpu": "haswell", "mattr": mattr}
    feeds = qkv(S1=40, S2=70, D=32, dtype=BF16)
    build(feeds, target=target, head_num=2, input_layout="BNSD", scale=0.2)


def test_scores_beyond_float16():
    feeds = qkv(D=16, dtype=F16)
    feeds = {name: (x * 150 if name != "value" else x).astype(F16) for name, x in feeds.items()}
    got = check(feeds, head_num=2, input_layout="BNSD")
    assert np.abs(got[1]).max() > 65504


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_zero_and_negative_scale(scale):
    feeds = qkv(S1=9, S2=70) | {"atten_mask": random_mask(9, 70)}
    check(feeds, head_num=2, input_layout="BNSD", scale=scale)


@pytest.mark.parametrize(("dtype", "power"), [(F32, -61), (BF16, -50)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [3e38, -3e38])
def test_scales_at_the_end_of_float32(scale, dtype, power):
    """In units of ln 2 they are beyond it. No product of bfloat16 is subnormal."""
    feeds = qkv(S1=9, S2=70, dtype=dtype)
    for name in ("query", "key"):
        feeds[name] = (feeds[name].astype(np.float32) * 2.0**power).astype(dtype)
    check(feeds, head_num=2, input_layout="BNSD", scale=scale)
