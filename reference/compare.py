"""Judges outputs against the references under the operators' tolerances.

Integers must be equal, except next to a rounding tie that a float32 evaluation may take either way;
floats are measured against the float64 value before its last rounding; block indices by the score
of what they choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .linear_a8w8_quant import (
    GRAPH_ENGINE_CODES,
    OUTPUT_DTYPES,
    linear_a8w8_quant,
    npu_trans_quant_param,
)
from .nsa_compress_attention import nsa_compress_attention
from .numerics import BFLOAT16, FLT_MAX
from .qordered_longformer_attention import qordered_longformer_attention
from .qordered_matmul import qordered_matmul
from .speed_fusion_attention import speed_fusion_attention


class Tolerance(NamedTuple):
    """|got - want| <= atol + rtol * |want|."""

    atol: float
    rtol: float


FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)

# For scores |x| <= 30 and values around 1.
SPEED_FUSION_OUT = {
    FLOAT32: Tolerance(2e-5, 2e-5),
    FLOAT16: Tolerance(2e-3, 2e-3),
    BFLOAT16: Tolerance(1.6e-2, 1.6e-2),
}
SPEED_FUSION_MAX = Tolerance(2e-5, 2e-5)
SPEED_FUSION_SUM = Tolerance(1e-4, 1e-4)
SPEED_FUSION_SCORES = 30.0

# For scores up to about 60; atol of attention_out counts in units of the largest |value|.
NSA_OUT = {
    FLOAT32: Tolerance(3e-5, 3e-5),
    FLOAT16: Tolerance(1e-3, 1e-3),
    BFLOAT16: Tolerance(8e-3, 8e-3),
}
NSA_MAX = Tolerance(1e-4, 1e-5)
NSA_SUM = Tolerance(1e-5, 2e-4)
NSA_SCORE = Tolerance(1e-6, 1e-4)  # atol per head of the group
NSA_SCORES = 60.0
# Probabilities this small may be flushed to zero in float32, and then rank by index.
NSA_FLUSHED = 2.0**-100

# One unit in the last place of the output, relative.
LINEAR_RTOL = {FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7}


@dataclass(frozen=True)
class Comparison:
    """Verdict on one output.

    `mismatches` counts elements outside the tolerance (for integers: unequal and not excused),
    `allowed_mismatches` unequal integers that a tie excuses. Errors are infinite where a value
    should be finite and is not; `note` says why an output of the wrong shape or element type was
    not compared.
    """

    name: str
    ok: bool
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    mismatches: int = 0
    allowed_mismatches: int = 0
    note: str = ""


def _judge(name, got, want, bad, excused=None, note="") -> Comparison:
    """Comparison of arrays of one shape from the elements that are bad and those excused."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(got == want, 0.0, np.abs(got - want))
        error = np.where(np.isnan(error), np.inf, error)
        relative = error / np.where(want == 0, 1.0, np.abs(want))
    relative = np.where((want == 0) & (error > 0), np.inf, relative)
    mismatches = int(np.count_nonzero(bad))
    return Comparison(
        name=name,
        ok=mismatches == 0,
        max_abs_error=float(error.max(initial=0.0)),
        max_rel_error=float(relative.max(initial=0.0)),
        mismatches=mismatches,
        allowed_mismatches=0 if excused is None else int(np.count_nonzero(excused)),
        note=note,
    )


def _misfit(name, got, shape, dtype) -> Comparison | None:
    """A failed Comparison if shape or element type is wrong."""
    if got.shape == tuple(shape) and got.dtype == dtype:
        return None
    note = f"found {got.dtype}{list(got.shape)}, expected {np.dtype(dtype)}{list(shape)}"
    return Comparison(name, False, np.inf, np.inf, int(np.prod(shape)), note=note)


def _equal(name, got, want) -> Comparison:
    if misfit := _misfit(name, got, want.shape, want.dtype):
        return misfit
    same = (got == want) | ((got != got) & (want != want))
    return _judge(name, got, want, ~same)


def _close(name, got, want, dtype, atol, rtol) -> Comparison:
    """Float output `got` against the unrounded `want`; atol and rtol broadcast against it.

    Infinities must agree, except that a value within rtol of overflow may round either way; the
    sentinels +-FLT_MAX must be hit exactly.
    """
    if misfit := _misfit(name, got, want.shape, dtype):
        return misfit
    value = got.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = want.astype(dtype).astype(np.float64)
        within = np.abs(value - want) <= atol + rtol * np.abs(want)
        limit = float(np.finfo(np.float16).max) if dtype == FLOAT16 else FLT_MAX
        overflow = np.isinf(value) & (np.abs(want) >= limit * (1 - rtol))
        overflow &= np.sign(value) == np.sign(want)
    good = np.where(np.abs(want) == FLT_MAX, value == want, within | overflow | (value == rounded))
    return _judge(name, got, np.where(np.isinf(rounded), rounded, want), ~good)


def _excused(got, want, v, slack):
    """The other neighbour of a tie within slack of the exact v; never where slack is 0."""
    one_off = np.abs(got.astype(int) - want.astype(int)) == 1
    return (slack > 0) & one_off & (np.abs(got - v) <= 0.5 + slack)


def _qordered_matmul(inputs, attrs, got):
    (want,) = qordered_matmul(**inputs, **attrs)
    if misfit := _misfit("Y", got[0], want.shape, want.dtype):
        return [misfit]
    excused = _excused(got[0], want, *qordered_matmul(**inputs, **attrs, unrounded=True))
    return [_judge("Y", got[0], want, (got[0] != want) & ~excused, excused)]


def _qordered_longformer_attention(inputs, attrs, got):
    """Like QOrderedMatMul, after projections whose own ties may have gone the way of float32."""
    inputs = {"global_" if name == "global" else name: x for name, x in inputs.items()}
    (want,) = qordered_longformer_attention(**inputs, **attrs)
    if misfit := _misfit("output", got[0], want.shape, want.dtype):
        return [misfit]
    excused = np.zeros(want.shape, bool)
    note = ""
    for stage1 in ("float64", "float32", "fused"):
        if not np.any((got[0] != want) & ~excused):
            break
        (near,) = qordered_longformer_attention(**inputs, **attrs, stage1=stage1)
        v, slack = qordered_longformer_attention(**inputs, **attrs, stage1=stage1, unrounded=True)
        accepted = (got[0] == near) | _excused(got[0], near, v, slack)
        accepted &= got[0] != want
        if stage1 != "float64" and np.any(accepted & ~excused):
            note = f"projections round like {stage1}"
        excused |= accepted
    return [_judge("output", got[0], want, (got[0] != want) & ~excused, excused, note)]


def _growth(maximum, scores):
    """Factor on a tolerance stated for |x| <= scores: float32 rounding of x grows with |x|."""
    with np.errstate(over="ignore"):
        factor = np.maximum(np.abs(maximum) / scores, 1.0)
    return np.where(np.abs(maximum) == FLT_MAX, 1.0, factor)


def _row_maximum(inputs, attrs, maximum, out):
    """softmax_max brought to the shape of attention_out, whatever the layouts."""
    layout = attrs["input_layout"]
    if layout == "TND":
        if attrs.get("softmax_layout", "") == "TND":
            return maximum[..., :1]
        lengths = inputs.get("actual_seq_qlen", attrs.get("actual_seq_qlen"))
        records, rows, start = maximum[..., 0].reshape(-1), [], 0
        heads = out.shape[1]
        for stop in np.asarray(lengths).tolist():
            rows.append(records[start * heads : stop * heads].reshape(heads, stop - start).T)
            start = stop
        return np.concatenate(rows)[..., None]
    maximum = maximum[..., :1]  # [B, N1, S1, 1]
    if layout == "BNSD":
        return maximum
    if layout == "BSND":
        return maximum.transpose(0, 2, 1, 3)
    spread = np.repeat(maximum, out.shape[-1] // attrs["head_num"], axis=-1)
    b, n, s, d = spread.shape
    if layout == "BSH":
        return spread.transpose(0, 2, 1, 3).reshape(b, s, n * d)
    return spread.transpose(2, 0, 1, 3).reshape(s, b, n * d)


def _speed_fusion_attention(inputs, attrs, got):
    out, maximum, total, *integers = speed_fusion_attention(**inputs, **attrs, unrounded=True)
    dtype = inputs["query"].dtype
    atol, rtol = SPEED_FUSION_OUT[dtype]
    value = inputs["value"].astype(np.float64)
    size = np.sqrt(np.mean(value * value))
    keep_prob = attrs.get("keep_prob", 1.0)
    if keep_prob < 0.5:
        size /= keep_prob
    atol = atol * size + float(np.finfo(np.float32).tiny if dtype != FLOAT16 else 2.0**-24)
    growth = _growth(_row_maximum(inputs, attrs, maximum, out), SPEED_FUSION_SCORES)
    sum_growth = _growth(maximum, SPEED_FUSION_SCORES)
    judges = [
        lambda x: _close("attention_out", x, out, dtype, atol * growth, rtol * growth),
        lambda x: _close("softmax_max", x, maximum, FLOAT32, *SPEED_FUSION_MAX),
        lambda x: _close(
            "softmax_sum", x, total, FLOAT32, *(t * sum_growth for t in SPEED_FUSION_SUM)
        ),
    ]
    for name, want in zip(("softmax_out", "seed", "offset", "numels"), integers):
        judges.append(lambda x, name=name, want=want: _equal(name, x, want))
    return [judge(x) for judge, x in zip(judges, got) if x is not None]


def _block_indices(got, want, scores, group):
    """topk_indices_out [T, N2, k] position by position, by the scores [T, N2, blocks] chosen."""
    if misfit := _misfit("topk_indices_out", got, want.shape, want.dtype):
        return misfit
    blocks = scores.shape[-1]
    padding = want == -1
    valid = (got >= 0) & (got < blocks)
    padded = np.concatenate([scores, np.full((*scores.shape[:-1], 1), -np.inf)], axis=-1)
    chosen = np.take_along_axis(padded, np.where(valid, got, blocks), -1)
    expected = np.take_along_axis(padded, np.where(padding, blocks, want), -1)
    with np.errstate(invalid="ignore"):
        near = np.abs(chosen - expected) <= NSA_SCORE.rtol * expected + NSA_SCORE.atol * group
    ordered = np.sort(np.where(valid, got, -1), axis=-1)
    repeats = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    flushed = ((scores > 0) & (scores < NSA_FLUSHED)).any(-1, keepdims=True)
    by_index = padding | (expected == FLT_MAX) | ((expected == 0) & ~flushed)
    good = np.where(by_index, got == want, valid & np.isfinite(chosen) & near)
    good &= ~repeats[..., None]
    return _judge("topk_indices_out", got, want, ~good, good & (got != want))


def _nsa_compress_attention(inputs, attrs, got):
    maximum, total, out, scores = nsa_compress_attention(**inputs, **attrs, unrounded=True)
    dtype = inputs["query"].dtype
    atol, rtol = NSA_OUT[dtype]
    value = inputs["value"].astype(np.float64)
    size = np.abs(value[np.isfinite(value)]).max(initial=0.0)
    atol = atol * size + float(np.finfo(np.float32).tiny if dtype != FLOAT16 else 2.0**-24)
    growth = _growth(maximum, NSA_SCORES)
    # Row maxima by token whatever the memory order of the softmax outputs.
    tokens = nsa_compress_attention(**inputs, **{**attrs, "softmax_out_layout": "same_as_input"})
    rows = _growth(tokens[0][..., :1].astype(np.float64), NSA_SCORES)
    indices = tokens[3]
    judges = [
        lambda x: _close("softmax_max", x, maximum, FLOAT32, *NSA_MAX),
        lambda x: _close("softmax_sum", x, total, FLOAT32, *(t * growth for t in NSA_SUM)),
        lambda x: _close("attention_out", x, out, dtype, atol * rows, rtol * rows),
        lambda x: _block_indices(x, indices, scores, out.shape[1] // indices.shape[1]),
    ]
    return [judge(x) for judge, x in zip(judges, got) if x is not None]


def _linear_a8w8_quant(inputs, attrs, got):
    (want,) = linear_a8w8_quant(**inputs, **attrs)
    dtype = OUTPUT_DTYPES[attrs.get("output_dtype", 0)]
    bias = inputs.get("bias")
    float_bias = bias is not None and bias.dtype != np.int32
    if dtype not in LINEAR_RTOL or ("pertoken_scale" not in inputs and not float_bias):
        return [_equal("y", got[0], want)]
    t, magnitude = linear_a8w8_quant(**inputs, **attrs, unrounded=True)
    rtol = LINEAR_RTOL[dtype]
    atol = 2.0**-21 * magnitude + (2.0**-24 if dtype == FLOAT16 else 0.0)
    if misfit := _misfit("y", got[0], want.shape, want.dtype):
        return [misfit]
    value, rounded = got[0].astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        within = np.abs(value - rounded) <= rtol * np.abs(rounded) + atol
    good = (value == rounded) | (within & np.isfinite(rounded))
    # Halfway between the largest finite number and the next: values round to infinity from here.
    edge = 65520.0 if dtype == FLOAT16 else 2.0**128 * (1 - 2.0**-9)
    at_edge = np.abs(np.abs(t.astype(np.float64)) - edge) <= rtol * edge
    limit = np.where(np.isinf(value), np.sign(value) * edge, value)
    good |= at_edge & (np.abs(limit - t) <= rtol * edge)
    return [_judge("y", got[0], want, ~good)]


def _quant_batch_mat_mul(inputs, attrs, got):
    attrs = dict(attrs)
    attrs["output_dtype"] = GRAPH_ENGINE_CODES[attrs.pop("dtype", 1)]
    return _linear_a8w8_quant(inputs, attrs, got)


def _npu_trans_quant_param(inputs, attrs, got):
    return [_equal("y", got[0], npu_trans_quant_param(**inputs, **attrs)[0])]


COMPARISONS: dict[str, Callable[..., list[Comparison]]] = {
    "QOrderedMatMul": _qordered_matmul,
    "QOrderedLongformerAttention": _qordered_longformer_attention,
    "SpeedFusionAttention": _speed_fusion_attention,
    "NPUNsaCompressAttention": _nsa_compress_attention,
    "NPUQuantMatmul": _linear_a8w8_quant,
    "QuantBatchMatMul": _quant_batch_mat_mul,
    "NPUTransQuantParam": _npu_trans_quant_param,
}


def compare(
    op_type: str,
    inputs: Mapping[str, np.ndarray | None],
    attrs: Mapping[str, object],
    got: Sequence[np.ndarray | None],
) -> list[Comparison]:
    """Compare what a node computed with its reference: one Comparison per output that is not None.

    `inputs` is keyed by the schema's input names, absent optional ones missing or None; `attrs` by
    attribute names, missing ones at their defaults; `got` in the order of the node's outputs,
    trailing ones may be missing. Raises KeyError, listing what is known, for an operator without a
    comparison.
    """
    if op_type not in COMPARISONS:
        raise KeyError(f"{op_type}: no comparison, only for {', '.join(COMPARISONS)}")
    given = {name: np.asarray(x) for name, x in inputs.items() if x is not None}
    got = [None if x is None else np.asarray(x) for x in got]
    if all(x is None for x in got):
        return []
    return COMPARISONS[op_type](given, dict(attrs), got)
