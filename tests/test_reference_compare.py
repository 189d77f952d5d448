"""The tolerances: what a comparison accepts, and that one step further it does not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from opferry.reference.compare import Comparison, compare
from opferry.reference.linear_a8w8_quant import linear_a8w8_quant, npu_trans_quant_param
from opferry.reference.nsa_compress_attention import nsa_compress_attention
from opferry.reference.qordered_longformer_attention import qordered_longformer_attention
from opferry.reference.qordered_matmul import qordered_matmul
from opferry.reference.speed_fusion_attention import speed_fusion_attention

BF16 = ml_dtypes.bfloat16
FLT_MAX = np.float32(np.finfo(np.float32).max)
f32 = np.float32


def rng(seed=0):
    return np.random.default_rng(seed)


def only(results) -> Comparison:
    (result,) = results
    return result


ROW = {"order_A": 1, "order_B": 0, "order_Y": 1}


def matmul_inputs(bias):
    one = np.ones((1, 1), np.int8)
    scale = f32(1)
    inputs = {"A": one, "scale_A": scale, "B": one, "scale_B": scale, "scale_Y": scale}
    return inputs | {"bias": np.array([bias], f32), "C": None}


def test_matmul_exact_tie_is_not_excused():
    inputs = matmul_inputs(1.5)  # v = 2.5, exact in float32
    assert only(compare("QOrderedMatMul", inputs, ROW, [np.array([[2]], np.int8)])).ok
    wrong = only(compare("QOrderedMatMul", inputs, ROW, [np.array([[3]], np.int8)]))
    assert (wrong.ok, wrong.mismatches, wrong.max_abs_error) == (False, 1, 1.0)


def test_matmul_inexact_tie_is_excused_by_one():
    # v = 5 * float32(0.1), just above 0.5; a float32 product is 0.5 and rounds to 0.
    inputs = matmul_inputs(0) | {"A": np.array([[5]], np.int8), "scale_A": f32(0.1), "bias": None}
    v, slack = qordered_matmul(**inputs, **ROW, unrounded=True)
    assert 0 < v.item() - 0.5 < slack.item() < 1e-6
    assert qordered_matmul(**inputs, **ROW)[0].item() == 1
    results = [
        only(compare("QOrderedMatMul", inputs, ROW, [np.array([[y]], np.int8)]))
        for y in (-1, 0, 1, 2)
    ]
    assert [r.ok for r in results] == [False, True, True, False]
    assert [r.allowed_mismatches for r in results] == [0, 1, 0, 0]


def longformer_inputs(seed=0):
    g = rng(seed)
    scale = np.array([0.05], f32)
    inputs = {
        "input": g.integers(-128, 128, (1, 8, 8), dtype=np.int8),
        "mask": np.zeros((1, 8), np.float16),
        "global": (np.arange(8)[None] == 3).astype(np.int32),
        "scale_output": f32(0.02),
    }
    for prefix in ("", "global_"):
        inputs[f"{prefix}weight"] = g.integers(-128, 128, (8, 24), dtype=np.int8)
        inputs[f"{prefix}bias"] = g.normal(size=24).astype(f32)
    for name in "input", "weight", "bias", "qkv_gemm", "global_weight", "global_gemm":
        inputs[f"scale_{name}"] = scale
    return inputs


LONGFORMER = {"num_heads": 2, "window": 2, "order_input": 1, "order_output": 1}


def run_longformer(inputs, **options):
    inputs = {"global_" if n == "global" else n: x for n, x in inputs.items()}
    return qordered_longformer_attention(**inputs, **LONGFORMER, **options)


def test_longformer_ties_and_nothing_else():
    inputs = longformer_inputs()
    (y,) = run_longformer(inputs)
    assert only(compare("QOrderedLongformerAttention", inputs, LONGFORMER, [y])).ok
    v, slack = run_longformer(inputs, unrounded=True)
    distance = np.abs(v - np.floor(v) - 0.5)
    far = (distance > slack) & (np.abs(v) < 120)
    near = (distance < slack) & (np.abs(v) < 120)
    assert far.any()
    assert near.any()
    step = np.where(v > y, 1, -1).astype(np.int8)
    good = only(
        compare("QOrderedLongformerAttention", inputs, LONGFORMER, [np.where(near, y + step, y)])
    )
    assert (good.ok, good.allowed_mismatches) == (True, np.count_nonzero(near))
    bad = only(
        compare("QOrderedLongformerAttention", inputs, LONGFORMER, [np.where(far, y + step, y)])
    )
    assert (bad.ok, bad.mismatches) == (False, np.count_nonzero(far))


def test_longformer_projections_rounded_in_float32():
    """Ties of the projections fall either way in float32; both evaluations are accepted."""
    inputs = longformer_inputs(1)
    for name in ("scale_weight", "scale_global_weight"):
        inputs[name] = np.array([0.1], f32)
    for name in ("bias", "global_bias"):
        # alpha * acc = 0.1 * acc is next to a tie wherever acc is an odd multiple of 5.
        inputs[name] = np.zeros(24, f32)
    inputs["input"] //= 16
    inputs["weight"] //= 16
    for stage1 in ("float64", "float32", "fused"):
        (y,) = run_longformer(inputs, stage1=stage1)
        assert only(compare("QOrderedLongformerAttention", inputs, LONGFORMER, [y])).ok


def fusion_case(dtype, scale=0.5, value=1.0, s=6):
    g = rng(3)
    names = ("query", "key", "value")
    inputs = {n: g.normal(size=(1, 2, s, 8)).astype(dtype) for n in names}
    inputs["value"] = np.full((1, 2, s, 8), value).astype(dtype)
    return inputs, {"head_num": 2, "input_layout": "BNSD", "scale": scale}


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(f32, 4e-5), (np.float16, 4e-3), (BF16, 3.2e-2)],
    ids=["f32", "f16", "bf16"],
)
@pytest.mark.parametrize("value", [1.0, 64.0])
def test_fusion_out(dtype, limit, value):
    """All values alike, so the output is that value and the limit is atol + rtol in its units."""
    inputs, attrs = fusion_case(dtype, value=value)
    out = speed_fusion_attention(**inputs, **attrs)[0]
    for factor, ok in ((0.75, True), (1.25, False)):
        off = (out.astype(f32) * f32(1 + limit * factor)).astype(dtype)
        assert only(compare("SpeedFusionAttention", inputs, attrs, [off])).ok is ok


def test_fusion_softmax_and_integers():
    inputs, attrs = fusion_case(f32)
    want = speed_fusion_attention(**inputs, **attrs)
    results = compare("SpeedFusionAttention", inputs, attrs, want)
    assert all(r.ok for r in results)
    assert [r.name for r in results] == [
        "attention_out", "softmax_max", "softmax_sum", "softmax_out", "seed", "offset", "numels",
    ]  # fmt: skip
    off = [None, want[1] + f32(1e-4), want[2] * f32(1.001), None, want[4] + 1]
    results = compare("SpeedFusionAttention", inputs, attrs, off)
    assert [(r.name, r.ok) for r in results] == [
        ("softmax_max", False),
        ("softmax_sum", False),
        ("seed", False),
    ]


def test_fusion_empty_rows_are_exact():
    inputs, attrs = fusion_case(f32)
    inputs["atten_mask"] = np.ones((6, 6), bool)
    attrs |= {"sparse_mode": 1}
    want = speed_fusion_attention(**inputs, **attrs)
    assert all(r.ok for r in compare("SpeedFusionAttention", inputs, attrs, want))
    close = np.nextafter(want[1], f32(0))
    assert not only(compare("SpeedFusionAttention", inputs, attrs, [None, close])).ok
    nans = np.full_like(want[0], np.nan)
    result = only(compare("SpeedFusionAttention", inputs, attrs, [nans]))
    assert (result.ok, result.max_abs_error) == (False, np.inf)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD", "BSND", "TND"])
@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_fusion_every_layout(layout, softmax_layout):
    """Rows of scores far beyond 30, to which the tolerance adapts, in their right places."""
    g = rng(4)
    shapes = {"BSH": (2, 4, 6), "SBH": (4, 2, 6), "BNSD": (2, 2, 4, 3), "BSND": (2, 4, 2, 3)}
    shape = shapes.get(layout, (7, 2, 3))
    inputs = {n: g.normal(size=shape).astype(f32) for n in ("query", "key", "value")}
    inputs["query"].reshape(-1)[:3] *= 1e4
    attrs = {"head_num": 2, "input_layout": layout}
    if layout == "TND":
        attrs["softmax_layout"] = softmax_layout
        attrs["actual_seq_qlen"] = attrs["actual_seq_kvlen"] = [0, 3, 7]
    want = speed_fusion_attention(**inputs, **attrs)
    assert all(r.ok for r in compare("SpeedFusionAttention", inputs, attrs, want))
    off = want[0] * f32(1.001)
    result = only(compare("SpeedFusionAttention", inputs, attrs, [off]))
    assert not result.ok
    assert result.mismatches < off.size


def test_fusion_dropout_widens_the_tolerance():
    inputs, attrs = fusion_case(f32, s=64)
    attrs |= {"keep_prob": 0.01, "seed": 4}
    out = speed_fusion_attention(**inputs, **attrs)[0]
    off = out + f32(1e-3)
    assert only(compare("SpeedFusionAttention", inputs, attrs, [off])).ok
    attrs["keep_prob"] = 0.9
    out = speed_fusion_attention(**inputs, **attrs)[0]
    assert not only(compare("SpeedFusionAttention", inputs, attrs, [out + f32(1e-3)])).ok


def nsa_case(blocks=4, k=3):
    """Scores under control: one head, scale 0 or masks; P uniform over the visible keys."""
    inputs = {
        "query": np.ones((2, 1, 2), f32),
        "key": np.ones((blocks, 1, 2), f32),
        "value": np.ones((blocks, 1, 2), f32),
        "atten_mask": None,
        "topk_mask": None,
    }
    attrs = {
        "head_num": 1,
        "actual_seq_qlen": [2],
        "actual_cmp_seq_kvlen": [blocks],
        "actual_sel_seq_kvlen": [blocks],
        "compress_block_size": 16,
        "compress_stride": 16,
        "select_block_size": 16,
        "select_block_count": k,
        "score_shift": 1,
    }
    return inputs, attrs


def indices(*rows):
    return np.array(rows, np.int32)[:, None, :]


def judge_indices(inputs, attrs, *rows):
    return only(
        compare("NPUNsaCompressAttention", inputs, attrs, [None, None, None, indices(*rows)])
    )


def test_nsa_equal_scores_in_any_order():
    inputs, attrs = nsa_case()
    result = judge_indices(inputs, attrs, (0, 1, 2), (3, 1, 0))
    assert (result.ok, result.allowed_mismatches) == (True, 2)


@pytest.mark.parametrize("row", [(0, 1, 1), (0, 1, 4), (0, 1, -1), (0, 1, -2)])
def test_nsa_repeats_and_strangers(row):
    assert not judge_indices(*nsa_case(), (0, 1, 2), row).ok


def test_nsa_different_scores_must_match():
    inputs, attrs = nsa_case()
    inputs["key"][:, 0] = np.array([0.3, 0.1, 0.2, 0.4])[:, None]
    assert judge_indices(inputs, attrs, (3, 0, 2), (3, 0, 2)).ok
    result = judge_indices(inputs, attrs, (3, 0, 2), (0, 3, 2))
    assert (result.ok, result.mismatches) == (False, 2)
    inputs["key"][0] = inputs["key"][3] * f32(1 - 1e-6)
    assert judge_indices(inputs, attrs, (3, 0, 2), (0, 3, 2)).ok


def test_nsa_zero_forced_and_padding_match_by_index():
    inputs, attrs = nsa_case(k=5)
    inputs["atten_mask"] = np.array([[0, 1, 1, 1]] * 2, bool)  # only block 0 has a score
    assert judge_indices(inputs, attrs, (0, 1, 2, 3, -1), (0, 1, 2, 3, -1)).ok
    assert not judge_indices(inputs, attrs, (0, 1, 2, 3, -1), (0, 2, 1, 3, -1)).ok
    assert not judge_indices(inputs, attrs, (0, 1, 2, 3, -1), (0, 1, 2, -1, 3)).ok
    inputs["topk_mask"] = np.array([[0, 0, 1, 1]] * 2, bool)
    assert judge_indices(inputs, attrs, (2, 3, 0, 1, -1), (2, 3, 0, 1, -1)).ok
    assert not judge_indices(inputs, attrs, (2, 3, 0, 1, -1), (3, 2, 0, 1, -1)).ok


def test_nsa_flushed_probabilities_rank_by_index():
    inputs, attrs = nsa_case()
    inputs["key"][:, 0] = np.array([0, -100, -40, -100])[:, None]
    attrs["scale_value"] = 1.0  # P = 1, e^-200, e^-80, e^-200
    assert judge_indices(inputs, attrs, (0, 2, 1), (0, 2, 1)).ok
    assert judge_indices(inputs, attrs, (0, 2, 1), (0, 1, 2)).ok
    assert not judge_indices(inputs, attrs, (0, 2, 1), (1, 0, 2)).ok


@pytest.mark.parametrize("dtype", [f32, np.float16, BF16])
@pytest.mark.parametrize("layout", ["", "same_as_input"])
def test_nsa_floats(dtype, layout):
    g = rng(6)
    inputs, attrs = nsa_case()
    for name, shape in (("query", (2, 2, 2)), ("key", (4, 1, 2)), ("value", (4, 1, 2))):
        inputs[name] = g.normal(size=shape).astype(dtype)
    inputs["query"][0, 1] *= dtype(512)
    attrs |= {"head_num": 2, "softmax_out_layout": layout}
    want = nsa_compress_attention(**inputs, **attrs)
    assert all(r.ok for r in compare("NPUNsaCompressAttention", inputs, attrs, want))
    off = [want[0] + f32(1), want[1] * f32(1.1), want[2] * dtype(1.125)]
    results = compare("NPUNsaCompressAttention", inputs, attrs, off)
    assert [r.name for r in results] == ["softmax_max", "softmax_sum", "attention_out"]
    assert not any(r.ok for r in results)


def linear_case(**extra):
    g = rng(7)
    inputs = {
        "x1": g.integers(-128, 128, (3, 9), dtype=np.int8),
        "x2": g.integers(-128, 128, (9, 4), dtype=np.int8),
        "scale": g.uniform(0.001, 0.01, 4).astype(f32),
    }
    return inputs | extra


@pytest.mark.parametrize("code", [0, 6, 10, 16])
def test_linear_without_float_steps_is_exact(code):
    inputs, attrs = linear_case(bias=np.arange(4, dtype=np.int32)), {"output_dtype": code}
    (y,) = linear_a8w8_quant(**inputs, **attrs)
    assert only(compare("NPUQuantMatmul", inputs, attrs, [y])).ok
    off = y.copy()
    off[1, 1] = np.nextafter(off[1, 1], y.dtype.type(np.inf)) if code > 6 else off[1, 1] + 1
    result = only(compare("NPUQuantMatmul", inputs, attrs, [off]))
    assert (result.ok, result.mismatches) == (False, 1)


@pytest.mark.parametrize("code", [10, 16])
def test_linear_per_token_allows_one_ulp(code):
    inputs = linear_case(pertoken_scale=np.array([1, 3, 0.1], f32))
    attrs = {"output_dtype": code}
    (y,) = linear_a8w8_quant(**inputs, **attrs)
    up = np.nextafter(y, y.dtype.type(np.inf))
    far = np.nextafter(np.nextafter(up, y.dtype.type(np.inf)), y.dtype.type(np.inf))
    assert only(compare("NPUQuantMatmul", inputs, attrs, [up])).ok
    assert not only(compare("NPUQuantMatmul", inputs, attrs, [far])).ok


def test_linear_overflow():
    one = np.ones((1, 1), np.int8)
    attrs = {"output_dtype": 10}

    def verdicts(scale):
        inputs = {"x1": one, "x2": one, "scale": np.array([scale], f32)}
        inputs["pertoken_scale"] = np.ones(1, f32)
        return [
            only(compare("NPUQuantMatmul", inputs, attrs, [np.array([[y]], np.float16)])).ok
            for y in (65504, np.inf, -np.inf, np.nan)
        ]

    assert verdicts(65519.99) == [True, True, False, False]
    assert verdicts(60000) == [False, False, False, False]
    assert verdicts(1e6) == [False, True, False, False]


def test_quant_batch_mat_mul_and_packing():
    inputs = linear_case()
    (y,) = linear_a8w8_quant(**inputs, output_dtype=10)
    assert only(compare("QuantBatchMatMul", inputs, {}, [y])).ok
    assert only(compare("QuantBatchMatMul", inputs, {"dtype": 1}, [y])).ok
    (packed,) = npu_trans_quant_param(inputs["scale"])
    scale = {"scale": inputs["scale"], "offset": None}
    assert only(compare("NPUTransQuantParam", scale, {}, [packed])).ok
    assert only(compare("NPUTransQuantParam", scale, {}, [packed + 1])).mismatches == 4


def test_wrong_shape_or_type():
    inputs = linear_case()
    result = only(compare("NPUQuantMatmul", inputs, {}, [np.zeros((3, 4), np.int32)]))
    assert not result.ok
    assert result.note == "found int32[3, 4], expected int8[3, 4]"
    assert only(compare("NPUQuantMatmul", inputs, {}, [np.zeros((4, 3), np.int8)])).ok is False


def test_nothing_requested_and_unknown_operator():
    assert compare("NPUQuantMatmul", linear_case(), {}, [None]) == []
    with pytest.raises(KeyError, match="Gelu: no comparison"):
        compare("Gelu", {}, {}, [])
