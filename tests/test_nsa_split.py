"""NPUNsaCompressAttention of float32 and float16 on matrix tiles of int8: digits of integers."""

import numpy as np
import pytest
from compile_once import compile_once
from hosts import on

import opferry
from opferry.frontend.builders import node_model
from opferry.reference.compare import compare
from opferry.reference.nsa_compress_attention import nsa_compress_attention

OP = "NPUNsaCompressAttention"
OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
TARGET = "x86-amx"


def make(queries, keys, n1, n2, d, dv, dtype=F32, mask=True, seed=0, **attrs):
    """Feeds and attributes of a node over sequences of these lengths, half of the keys masked."""
    rng = np.random.default_rng(seed)
    blocks = [-(-count // 4) for count in keys]

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    feeds = {
        "query": normal(sum(queries), n1, d),
        "key": normal(sum(keys), n2, d),
        "value": normal(sum(keys), n2, dv),
    }
    if mask:
        feeds["atten_mask"] = rng.random((max(queries), max(keys))) < 0.5
    lists = {
        "actual_seq_qlen": queries,
        "actual_cmp_seq_kvlen": keys,
        "actual_sel_seq_kvlen": blocks,
    }
    feeds |= {name: np.cumsum(counts).astype(np.int64) for name, counts in lists.items()}
    required = {
        "head_num": n1,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 5,
        "scale_value": float(d) ** -0.5,
    }
    return feeds, required | attrs


def run(feeds, attrs, target=TARGET):
    module = compile_once(node_model(OP, feeds, **attrs), on(target))
    return module.run({spec.name: feeds[spec.name] for spec in module.inputs})


def assert_matches(feeds, attrs, outputs):
    verdicts = compare(OP, feeds, attrs, [outputs[name] for name in OUTPUTS])
    assert all(verdict.ok for verdict in verdicts), verdicts


CASES = {
    "odd sizes": make((19, 4), (70, 33), 8, 2, 23, 19),
    "whole tiles": make((40,), (128,), 16, 1, 64, 32),
    "one row, one key": make((1,), (1,), 1, 1, 1, 1, mask=False),
    "no mask": make((21, 2), (75, 0), 4, 2, 65, 33, mask=False),
    "G 64": make((3, 2), (65, 18), 128, 2, 80, 48),
    "empty sequences": make((0, 3, 0, 4, 2, 0), (5, 7, 0, 0, 19, 3), 4, 2, 16, 16),
    "float16": make((19, 4), (70, 33), 8, 2, 24, 19, F16),
    "float16, whole tiles": make((40,), (128,), 16, 1, 64, 64, F16),
    "rows of zeros": make((9,), (70,), 4, 1, 64, 32, masked_rows="zero"),
    "scale 0": make((6,), (37,), 4, 2, 8, 7, scale_value=0.0),
    "scale negative": make((6,), (37,), 4, 2, 8, 7, scale_value=-1.5),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name):
    feeds, attrs = CASES[name]
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_half_of_a_tile_of_keys_is_hidden(masked_rows):
    """Of 64 keys whose weights go through a tile together no row sees the first 32, or the last."""
    feeds, attrs = make((40,), (301,), 4, 2, 64, 64, masked_rows=masked_rows)
    mask = np.ones((40, 301), bool)
    mask[:, 40:50] = mask[:, 70:80] = mask[1:, 200:231] = False
    mask[35] = True
    feeds["atten_mask"] = mask
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("exponent", [-120, -60, 60])
def test_powers_of_two_change_nothing(exponent):
    """Rows of queries, keys and channels of values have an exponent of their own."""
    feeds, attrs = make((9,), (70,), 4, 1, 64, 64)
    plain = run(feeds, attrs)
    scaled = feeds | {
        "query": np.ldexp(feeds["query"], exponent),
        "key": np.ldexp(feeds["key"], -exponent),
        "value": np.ldexp(feeds["value"], exponent),
    }
    got = run(scaled, attrs)
    for name in ("softmax_max", "softmax_sum", "topk_indices_out"):
        np.testing.assert_array_equal(got[name], plain[name])
    expected = np.ldexp(plain["attention_out"], exponent)
    np.testing.assert_allclose(got["attention_out"], expected, rtol=1e-6, atol=2.0**-149)


def test_error_is_near_that_of_multiply_adds():
    """Within four times theirs, against float64; the tolerance is forty times theirs."""
    feeds, attrs = make((64,), (255,), 16, 1, 128, 128)
    expected = reference_output(feeds, attrs)

    def error(target):
        return np.abs(run(feeds, attrs, target)["attention_out"] - expected).max()

    assert error(TARGET) <= 4 * error("x86-avx512vnni")


def reference_output(feeds, attrs):
    return nsa_compress_attention(**feeds, **attrs, unrounded=True)[2]


def test_channels_far_larger_than_others():
    """Of queries, keys and values, as outliers of a model are."""
    feeds, attrs = make((40,), (130,), 16, 1, 128, 64)
    feeds["query"][..., 3] *= 20
    feeds["key"][..., 77] *= 20
    feeds["value"][..., 5] *= 100
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("row", [0, 15, 39])
def test_a_row_of_nan_is_alone(row):
    feeds, attrs = make((40,), (70,), 4, 1, 64, 64)
    expected = run(feeds, attrs)
    query = feeds["query"].copy()
    query[row, 1] = np.nan
    got = run(feeds | {"query": query}, attrs)
    others = np.arange(40) != row
    for name in ("attention_out", "topk_indices_out"):
        np.testing.assert_array_equal(got[name][others], expected[name][others])


def test_a_value_of_nan_stays_in_its_channel():
    feeds, attrs = make((9,), (70,), 4, 1, 64, 64, mask=False)
    expected = run(feeds, attrs)["attention_out"]
    value = feeds["value"].copy()
    value[7, 0, 5] = np.nan
    got = run(feeds | {"value": value}, attrs)["attention_out"]
    assert np.isnan(got[..., 5]).all()
    others = np.arange(64) != 5
    np.testing.assert_array_equal(got[..., others], expected[..., others])


def test_six_products_of_digits():
    """Of two tiles of rows, in both products; LLVM may repeat the loop."""
    feeds, attrs = make((40,), (128,), 16, 1, 64, 64)
    module = opferry.compile(node_model(OP, feeds, **attrs), TARGET)
    listings = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    text = "\n".join(listings)
    for name in ("tdpbssd", "tdpbusd"):
        assert text.count(f"\t{name}\t") >= 12
        assert text.count(f"\t{name}\t") % 12 == 0
    assert "tdpbf16ps" not in text
