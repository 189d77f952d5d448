"""NPUNsaCompressAttention compiled for CPUs: hand-worked numbers, the float64 reference."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsa_cases import (
    BF16,
    CASES,
    EXAMPLE,
    EXAMPLE_ATTRS,
    F16,
    F32,
    OP,
    OUTPUTS,
    assert_matches,
    causal,
    ceil_div,
    make,
    run,
)

import opferry
from opferry.frontend.builders import node_model

FLT_MAX = np.float32(3.4028234663852886e38)


def test_worked_example():
    got = run(EXAMPLE, EXAMPLE_ATTRS)
    lanes = got["softmax_max"].reshape(6, 8)
    np.testing.assert_array_equal(lanes, np.repeat(lanes[:, :1], 8, axis=1))
    np.testing.assert_allclose(lanes[:, 0], [-FLT_MAX, 1, 1, -FLT_MAX, 1, 1], rtol=1e-5)
    sums = got["softmax_sum"].reshape(6, 8)[:, 0]
    np.testing.assert_allclose(sums, [6, 1.735759, 4.580941, 6, 1.735759, 2.700755], rtol=1e-5)
    out = got["attention_out"][..., 0]
    np.testing.assert_allclose(out, [[3.5, 3.5], [2.0, 2.364175], [4.016759, 3.992190]], rtol=3e-5)
    np.testing.assert_array_equal(
        got["topk_indices_out"][:, 0], [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    )


def test_worked_example_by_token():
    got = run(EXAMPLE, EXAMPLE_ATTRS | {"softmax_out_layout": "same_as_input"})
    np.testing.assert_allclose(
        got["softmax_max"][..., 0], [[-FLT_MAX, -FLT_MAX], [1, 1], [1, 1]], rtol=1e-5
    )
    np.testing.assert_allclose(
        got["softmax_sum"][..., 0], [[6, 6], [1.735759, 1.735759], [4.580941, 2.700755]], rtol=1e-5
    )


def test_worked_example_centred_window_and_zero_rows():
    attrs = EXAMPLE_ATTRS | {"score_shift": 1, "masked_rows": "zero"}
    got = run({k: v for k, v in EXAMPLE.items() if k != "topk_mask"}, attrs)
    np.testing.assert_array_equal(got["attention_out"][0], 0)
    np.testing.assert_array_equal(got["softmax_sum"].reshape(2, 3, 8)[:, 0], 0)
    np.testing.assert_array_equal(got["softmax_max"].reshape(2, 3, 8)[:, 0], -FLT_MAX)
    # Scores (0, 0), (4, 0), (1.931554, 2.068446).
    np.testing.assert_array_equal(
        got["topk_indices_out"][:, 0], [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    )


def test_the_last_block_scores_zero_when_block_window_and_stride_agree():
    """score[j] = P[j + 1]: with uniform P all tie but the last, whose window is empty."""
    feeds, attrs = make((1,), (5,), sizes=(16, 16, 16), k=5, scale_value=0.0)
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[0, 1, 2, 3, 4]] * 2)
    feeds["topk_mask"] = np.array([[0, 0, 0, 1, 1], [0] * 5], bool)
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[3, 4, 0, 1, 2]] * 2)


def test_more_forced_blocks_than_indices():
    feeds, attrs = make((1,), (40,), k=3)
    feeds["topk_mask"] = np.array([[0, 1, 0, 1, 1, 0, 0, 1, 1, 1]], np.uint8) * 200
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[1, 3, 4]] * 2)


SLOW = {"G 2", "G 32", "Dv of one", "l = d", "wide blocks", "shift 1", "shift r of an odd window"}
SLOW |= {"by token", "scale negative", "sparse mode", "large masks", "no keys at all"}
SLOW |= {"G 1", "G 16", "l = d = l'", "l % d != 0"}  # among VARIANTS, with more besides
SLOW |= {"l = l'", "unused rows"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_matches_the_reference(name):
    feeds, attrs = CASES[name]
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("case", ["short heads", "float16", "bfloat16", "G 64", "many sequences"])
@pytest.mark.parametrize("rows", [{}, {"masked_rows": "zero"}], ids=["mean", "zero"])
def test_rows_without_a_visible_key(case, rows):
    feeds, attrs = CASES[case]
    mask = feeds["atten_mask"].copy()
    mask[::3] = 1
    feeds, attrs = feeds | {"atten_mask": mask}, attrs | rows
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize(("dtype", "masked_rows"), [(F16, "zero"), (BF16, "mean"), (F32, "mean")])
def test_causal_prefill(dtype, masked_rows):
    """Whole tiles are masked: rows 0..30 see nothing, late keys are seen by the last rows only."""
    rows = 1500
    keys = (rows - 32) // 16 + 1
    feeds, attrs = make((rows,), (keys,), 4, 2, 16, 16, dtype, k=16, masked_rows=masked_rows)
    feeds["atten_mask"] = causal(rows, keys, 32, 16)
    t = np.arange(rows)[:, None] // 64
    j = np.arange(ceil_div(keys, 4))[None]
    feeds["topk_mask"] = (j == 0) | ((j >= t - 1) & (j <= t))
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_keys_hidden_from_all_rows(dtype):
    """Before the first, between and behind the visible keys, of whole tiles and of parts."""
    feeds, attrs = make((9, 4), (301, 301), 4, 2, 16, 16, dtype, k=16)
    mask = np.ones((9, 301), bool)
    mask[:, 30:50] = mask[:, 120:121] = mask[1:, 200:231] = False
    assert_matches(feeds | {"atten_mask": mask}, attrs, run(feeds | {"atten_mask": mask}, attrs))


@pytest.mark.parametrize("wanted", [[name] for name in OUTPUTS] + [list(OUTPUTS[1::2])], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_outputs_that_are_not_asked_for(wanted, dtype):
    feeds, attrs = make((21, 2), (75, 0), dtype=dtype, atten="bool", topk="bool", spare=(2, 0))
    got = run(feeds, attrs, outputs=wanted)
    assert sorted(got) == sorted(wanted)
    assert_matches(feeds, attrs, got)


def test_non_finite_rows_outside_of_the_sequences_do_not_leak():
    """Spare rows, and the keys of a sequence without queries."""
    feeds, attrs = make((5, 0, 3), (9, 20, 6), spare=(5, 7), atten="bool", topk="bool")
    for name in ("key", "value"):
        feeds[name][9:29] = np.inf
    got = run(feeds, attrs)
    assert_matches(feeds, attrs, got)
    assert not any(np.isnan(got[name]).any() for name in OUTPUTS)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_channels_far_larger_than_others(dtype):
    """As projections of transformers have them: what is small beside them still counts."""
    feeds, attrs = make((10,), (70,), 16, 1, 128, 32, dtype, k=4)
    feeds["query"][:, :, 0] *= dtype.type(30)
    feeds["key"][:, :, 1] *= dtype.type(30)
    assert_matches(feeds, attrs, run(feeds, attrs))
    for name, factor in (("query", 100), ("key", 1 / 100)):
        feeds[name][:, :, 0] *= dtype.type(factor)
    assert_matches(feeds, attrs, run(feeds, attrs))


def test_a_masked_value_may_be_large():
    """Its weight is 0, whatever it is."""
    feeds, attrs = make((19,), (70,), d=16, dv=16)
    feeds["atten_mask"] = np.zeros((19, 70), bool)
    feeds["atten_mask"][:, 69] = True
    feeds["value"][69] = 0
    clean = run(feeds, attrs)["attention_out"]
    feeds["value"][69] = 1e8
    np.testing.assert_array_equal(run(feeds, attrs)["attention_out"], clean)


def test_a_masked_key_may_be_nan():
    feeds, attrs = make((5,), (9,), atten="bool")
    feeds["atten_mask"][:, 4] = True
    clean = run(feeds, attrs)
    feeds["key"][4] = np.nan
    assert {k: v.tobytes() for k, v in run(feeds, attrs).items()} == {
        k: v.tobytes() for k, v in clean.items()
    }


def test_results_are_reproducible():
    feeds, attrs = make((200, 33), (90, 41), 8, 2, 16, 16, atten="bool")
    module = opferry.compile(node_model(OP, feeds, **attrs))
    first = module.run(feeds)
    for _ in range(5):
        again = module.run(feeds)
        assert all(again[name].tobytes() == first[name].tobytes() for name in first)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_attributes(data):
    check_any_attributes(data)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_attributes_at_length(data):
    check_any_attributes(data)


def check_any_attributes(data):
    draw = data.draw
    stride = 16 * draw(st.integers(1, 3))
    size = 16 * draw(st.integers(stride // 16, 8))
    block = stride * draw(st.integers(ceil_div(size, stride), ceil_div(size, stride) + 3))
    n2, group, d = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 4, 8])),
        draw(st.integers(1, 40)),
    )
    feeds, attrs = make(
        (draw(st.integers(1, 30)), draw(st.integers(0, 9))),
        (draw(st.integers(1, 90)), draw(st.integers(0, 9))),
        n2 * group,
        n2,
        d,
        draw(st.integers(1, d)),
        draw(st.sampled_from([F16, BF16, F32])),
        (size, stride, block),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([None, "bool", "uint8"])),
        draw(st.sampled_from([None, "bool", "uint8"])),
        score_shift=draw(st.integers(0, block // stride)),
        masked_rows=draw(st.sampled_from(["mean", "zero"])),
        softmax_out_layout=draw(st.sampled_from(["", "same_as_input"])),
    )
    assert_matches(feeds, attrs, run(feeds, attrs))
