"""NPUNsaCompressAttention of float32 and float16 on matrix tiles, as sums of bfloat16 terms."""

import numpy as np
import pytest
from compile_once import compile_once
from hosts import on
from nsa_cases import F16, F32, OP, assert_matches, causal, make, run

import opferry
from opferry.frontend.builders import node_model
from opferry.reference.nsa_compress_attention import nsa_compress_attention
from opferry.schedules.llvm import nsa_split

AMX = "x86-amx"
CASES = {
    "odd sizes": make((19, 4), (70, 33), 8, 2, 33, 19, F32, spare=(2, 1), atten="bool", k=7),
    "D 100": make((9, 30), (70, 33), 4, 1, 100, 100, F32, atten="uint8", topk="bool", k=5),
    "D 192, Dv 128": make((21,), (75,), 16, 1, 192, 128, F32, atten="bool", topk="bool", k=16),
    "one row, one key": make((1,), (1,), dtype=F32),
    "no mask": make((21, 2), (75, 0), 4, 2, 33, 33, F32, topk="uint8", spare=(2, 3)),
    "G 64": make((3, 2), (65, 18), 128, 2, 33, 32, F32, atten="bool", topk="bool"),
    "scale negative": make((6,), (37,), dtype=F32, scale_value=-1.5, atten="bool"),
    "many sequences": make([1, 2, 0, 3] * 9, [4, 0, 17, 33] * 9, dtype=F32, atten="bool"),
    "large scores": make((9,), (137,), d=64, dv=64, scale_value=1.2, k=8),
    "half": make((19, 4), (70, 33), 8, 2, 100, 33, F16, spare=(2, 1), atten="bool", k=7),
    "half, G 16": make((40,), (128,), 16, 1, 64, 32, F16, atten="bool", topk="bool", k=16),
    "half, scale negative": make((6,), (37,), dtype=F16, scale_value=-1.5, atten="bool"),
}
SLOW = {"one row, one key", "no mask", "many sequences", "half, scale negative"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_matches_the_reference(name):
    feeds, attrs = CASES[name]
    assert_matches(feeds, attrs, run(feeds, attrs, on(AMX)))


@pytest.mark.parametrize("name", ["odd sizes", "D 192, Dv 128", "scale negative"])
def test_all_by_multiply_adds(name, monkeypatch):
    """As where every element is beyond the limit."""
    monkeypatch.setattr(nsa_split, "LIMIT", 2.0**-90)
    feeds, attrs = CASES[name]
    module = opferry.compile(node_model(OP, feeds, **attrs), on(AMX))
    given = {spec.name: feeds[spec.name] for spec in module.inputs}
    assert_matches(feeds, attrs, module.run(given))


def listing(feeds, attrs, target=AMX):
    module = opferry.compile(node_model(OP, feeds, **attrs), target)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    return "\n".join(texts)


@pytest.mark.parametrize(("dtype", "products"), [(F32, 6 + 3), (F16, 4 + 3)], ids=str)
def test_products_of_terms(dtype, products):
    """Of four tiles each."""
    feeds, attrs = make((40,), (128,), 16, 1, 64, 64, dtype, atten="bool")
    text = listing(feeds, attrs)
    assert text.count("\ttdpbf16ps\t") >= 4 * products


@pytest.mark.parametrize("scale", [0.0, 2.0**17])
def test_scales_that_go_by_multiply_adds(scale):
    feeds, attrs = make((5,), (9,), dtype=F32)
    assert "tdpbf16ps" not in listing(feeds, attrs | {"scale_value": scale})


LARGEST = np.finfo(np.float32).max
"""The first term of it is infinite."""


def wide():
    return make((30,), (90,), 8, 2, 40, 40, atten="bool", k=4)


@pytest.mark.parametrize("where", ["query", "key"])
def test_large_queries_and_keys(where):
    """Products of order 1: in the tail of D, in one task, in one group of keys."""
    feeds, attrs = wide()
    other = {"query": "key", "key": "query"}[where]
    large, small = feeds[where], feeds[other]
    for channel, row in ((3, 5), (38, 20)):
        large[:, :, channel] = 0
        large[row, :, channel] = LARGEST
        small[:, :, channel] *= np.float32(2.0**-127)
    assert_matches(feeds, attrs, run(feeds, attrs, on(AMX)))


def test_large_values():
    """Of one channel, and behind the mask."""
    feeds, attrs = wide()
    feeds["value"][70:, :, 39] = 2.0**120
    assert_matches(feeds, attrs, run(feeds, attrs, on(AMX)))
    feeds["atten_mask"][:, 70:] = True
    got = run(feeds, attrs, on(AMX))
    feeds["value"][70:] = 0
    assert_matches(feeds, attrs, got)


def test_small_values_keep_their_digits():
    """Products with weights are far below 2**-126."""
    feeds, attrs = wide()
    clean = run(feeds, attrs, on(AMX))["attention_out"]
    feeds["value"] *= np.float32(2.0**-110)
    small = run(feeds, attrs, on(AMX))["attention_out"]
    np.testing.assert_allclose(small * 2.0**110, clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_key_may_be_anything(dtype, bad):
    feeds, attrs = make((30,), (70,), 8, 2, 40, 40, dtype, atten="bool", k=4)
    feeds["atten_mask"][:, 33] = True
    clean = run(feeds, attrs, on(AMX))
    feeds["key"][33] = bad
    got = run(feeds, attrs, on(AMX))
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in clean.items()}


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_equal_keys_tie(dtype):
    """Blocks of equal keys score alike to the last bit, so the lower index goes first."""
    feeds, attrs = make((20,), (256,), 4, 1, 64, 16, dtype, k=16)
    feeds["key"] = np.tile(feeds["key"][:32], (8, 1, 1))
    got = run(feeds, attrs, on(AMX))
    assert_matches(feeds, attrs, got)
    # Blocks 1 to 8 come again every 8 blocks.
    best = got["topk_indices_out"][:, 0]
    for row in best:
        for residue in range(8):
            alike = [j for j in row if j % 8 == residue and 0 < j < 63]
            assert alike == sorted(alike)
            assert alike == list(range(residue or 8, 63, 8))[: len(alike)]


def test_scores_of_integers_are_exact():
    """Products of 12 bits and their sums fit 24: like those of float64."""
    rng = np.random.default_rng(1)
    feeds, attrs = make((33,), (130,), 4, 2, 48, 48, k=8, scale_value=2.0**-17)
    for name in ("query", "key"):
        feeds[name] = rng.integers(-591, 592, feeds[name].shape).astype(np.float32)
    got = run(feeds, attrs, on(AMX))
    assert_matches(feeds, attrs, got)
    expected = nsa_compress_attention(**feeds, **attrs)
    np.testing.assert_allclose(got["softmax_max"], expected[0], rtol=2.0**-22)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_causal_prefill_on_matrix_tiles(dtype):
    rows = 700
    keys = (rows - 32) // 16 + 1
    feeds, attrs = make((rows,), (keys,), 16, 1, 64, 64, dtype, k=16)
    feeds["atten_mask"] = causal(rows, keys, 32, 16)
    assert_matches(feeds, attrs, run(feeds, attrs, on(AMX)))


def test_terms_are_near_multiply_adds():
    """The output by terms is within half its tolerance of that by multiply-adds."""
    feeds, attrs = make((64,), (300,), 16, 1, 128, 128, atten="bool", k=16)
    targets = (on(AMX), "x86-avx512vnni")
    terms, whole = (
        compile_once(node_model(OP, feeds, **attrs), target).run(feeds) for target in targets
    )
    scale = np.abs(feeds["value"]).max()
    assert np.abs(terms["attention_out"] - whole["attention_out"]).max() < 1.5e-5 * scale
    np.testing.assert_allclose(terms["softmax_max"], whole["softmax_max"], rtol=2e-6, atol=2e-6)
