"""SpeedFusionAttention reference against hand-worked numbers and element-wise loops."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from opferry.reference.numerics import random_words
from opferry.reference.speed_fusion_attention import speed_fusion_attention

BF16 = ml_dtypes.bfloat16
FLT_MAX = np.float32(np.finfo(np.float32).max)
f32 = np.float32


def rng(seed=0):
    return np.random.default_rng(seed)


def triu():
    return np.triu(np.ones((2048, 2048), bool), 1)


LAYOUTS = {
    "BSH": lambda x: x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1),
    "SBH": lambda x: x.transpose(2, 0, 1, 3).reshape(x.shape[2], x.shape[0], -1),
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(0, 2, 1, 3),
}

WORKED = {
    "query": np.array([[1, 2], [0, 1], [2, -1], [1, 0], [1, 1], [-1, 2]], f32).reshape(1, 2, 3, 2),
    "key": np.array([[1, 0], [0, 2]], f32).reshape(1, 1, 2, 2),
    "value": np.array([[10, 1], [20, 3]], f32).reshape(1, 1, 2, 2),
    "pse": np.array([0.5, 0.25], f32),
    "atten_mask": triu(),
    "q_start_idx": [1],
    "head_num": 2,
    "input_layout": "BNSD",
    "scale": 0.5,
    "sparse_mode": 3,
    "pse_type": 2,
}


def test_fusion_worked_example():
    out, m, l, reserved, seed, offset, numels = speed_fusion_attention(**WORKED)
    want = [[0, 0], [10, 1], [11.824255, 1.364851], [0, 0], [10, 1], [19.399134, 2.879827]]
    np.testing.assert_allclose(out.reshape(6, 2), want, rtol=1e-6)
    assert m.shape == l.shape == (1, 2, 3, 8)
    assert (m == m[..., :1]).all()
    assert m[0, :, :, 0].tolist() == [[-FLT_MAX, -1, -0.5], [-FLT_MAX, 0, 1.5]]
    np.testing.assert_allclose(
        l[0, :, :, 7], [[FLT_MAX, 1, 1.2231301], [FLT_MAX, 1, 1.0639279]], rtol=1e-7
    )
    assert (reserved.shape, reserved.dtype) == ((0,), f32)
    assert (int(seed), int(offset), int(numels)) == (0, 0, 12)
    assert all(x.dtype == np.int64 and x.shape == () for x in (seed, offset, numels))
    assert (out.dtype, m.dtype, l.dtype) == (f32, f32, f32)


def test_fusion_worked_dropout():
    out, m, l, _, seed, _, numels = speed_fusion_attention(**WORKED, keep_prob=0.5, seed=3)
    want = [[0, 0], [0, 0], [16.351490, 1.635149], [0, 0], [0, 0], [37.596535, 5.639480]]
    np.testing.assert_allclose(out.reshape(6, 2), want, rtol=1e-6)
    assert np.array_equal(m, speed_fusion_attention(**WORKED)[1])
    assert np.array_equal(l, speed_fusion_attention(**WORKED)[2])
    assert (int(seed), int(numels)) == (3, 12)


def test_fusion_call_of_the_documentation():
    ones = np.ones((2, 4, 64), np.float16)
    out, m, l, *_, numels = speed_fusion_attention(ones, ones, ones, head_num=4, input_layout="BSH")
    assert out.dtype == np.float16
    assert np.array_equal(out, ones)
    assert m.shape == (2, 4, 4, 8)
    assert (m == 16).all()
    assert (l == 4).all()
    assert int(numels) == 128


def fusion_loops(q, k, v, bias, allowed, pse_type, scale, first=0, keep_prob=1.0, seed=0, offset=0):
    """One sequence, q [N1,S1,D], k v [N2,S2,D]; bias(n,i,j), allowed(n,i,j); out, max, sum."""
    (n1, s1, d), s2 = q.shape, k.shape[1]
    group = n1 // k.shape[0]
    out = np.zeros((n1, s1, d))
    top, total = np.full((n1, s1), -float(FLT_MAX)), np.full((n1, s1), float(FLT_MAX))
    threshold = math.floor(float(f32(keep_prob)) * 2**32)
    for n, i in itertools.product(range(n1), range(s1)):
        x = {}
        for j in range(s2):
            if not allowed(n, i, j):
                continue
            qk = float(q[n, i] @ k[n // group, j])
            b = bias(n, i, j)
            score = (qk + b) * scale if pse_type == 1 else qk * scale + b
            if score > -math.inf:
                x[j] = score
        if not x:
            continue
        top[n, i] = max(x.values())
        w = {j: math.exp(s - top[n, i]) for j, s in x.items()}
        total[n, i] = sum(w.values())
        for j in w:
            keep = True
            if keep_prob < 1:
                e = np.array(first + (n * s1 + i) * s2 + j)
                keep = int(random_words(e, seed, offset)) < threshold
            out[n, i] += keep * w[j] / total[n, i] / float(f32(keep_prob)) * v[n // group, j]
    return out, top, total


def random_qkv(g, b, n1, n2, s1, s2, d):
    return (
        g.normal(size=(b, n1, s1, d)),
        g.normal(size=(b, n2, s2, d)),
        g.normal(size=(b, n2, s2, d)),
    )


def check_fusion(qkv, bias, allowed, layout="BNSD", scale=0.6, **kwargs):
    """Every batch entry against the loops, float32, in the given layout."""
    q, k, v = (x.astype(f32).astype(np.float64) for x in qkv)
    out, m, l, *_, numels = speed_fusion_attention(
        *(LAYOUTS[layout](x).astype(f32) for x in (q, k, v)),
        head_num=q.shape[1],
        input_layout=layout,
        scale=scale,
        **kwargs,
    )
    dropout = {n: kwargs[n] for n in ("keep_prob", "seed", "offset") if n in kwargs}
    pairs = q.shape[1] * q.shape[2] * k.shape[2]
    wants = [
        fusion_loops(
            q[b],
            k[b],
            v[b],
            lambda *at, b=b: bias(b, *at),
            lambda *at, b=b: allowed(b, *at),
            kwargs.get("pse_type", 1),
            float(f32(scale)),
            b * pairs,
            **dropout,
        )
        for b in range(len(q))
    ]
    want_out, want_m, want_l = (np.stack(part) for part in zip(*wants))
    np.testing.assert_allclose(out, LAYOUTS[layout](want_out), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(m[..., 3], want_m.astype(f32), rtol=1e-6)
    np.testing.assert_allclose(l[..., 3], want_l.astype(f32), rtol=1e-6)
    assert int(numels) == len(q) * pairs


def no_bias(b, n, i, j):
    return 0.0


def everything(b, n, i, j):
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fusion_layouts(layout):
    check_fusion(random_qkv(rng(1), 2, 4, 2, 3, 5, 7), no_bias, everything, layout)


FULL_MASKS = [
    (0, 1, 1),
    (0, 2**63 - 1, 2**63 - 1),
    (0, -1, 3),
    (0, 2, -1),
    (1, 0, 0),
    (5, 0, 0),
]


@pytest.mark.parametrize(
    ("mode", "pre", "next_", "mask_shape"),
    [
        (*case, shape)
        for case in FULL_MASKS
        for shape in (("b1", "bn") if case[0] == 5 else ("b1", "bn", "11", "2d"))
    ],
)
def test_fusion_full_masks(mask_shape, mode, pre, next_):
    g, (b, n1, s1, s2) = rng(2), (2, 2, 4, 6)
    shape = {"b1": (b, 1, s1, s2), "bn": (b, n1, s1, s2), "11": (1, 1, s1, s2), "2d": (s1, s2)}
    mask = ((g.random(shape[mask_shape]) < 0.4) * 3).astype(np.uint8)
    prefix = np.array([2, 6])
    full = np.broadcast_to(mask, (b, n1, s1, s2))

    def allowed(b, n, i, j):
        if full[b, n, i, j]:
            return False
        if mode == 0:
            return i - pre <= j <= i + next_
        return mode == 1 or j <= i + 2 or j < prefix[b]

    check_fusion(
        random_qkv(g, b, n1, 1, s1, s2, 3),
        no_bias,
        allowed,
        atten_mask=mask,
        sparse_mode=mode,
        pre_tokens=pre,
        next_tokens=next_,
        prefix=prefix if mode == 5 else None,
    )


@pytest.mark.parametrize(("s1", "s2"), [(3, 5), (5, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize(("mode", "pre", "next_"), [(2, 0, 0), (3, 0, 0), (4, 1, 1), (4, 3, -1)])
def test_fusion_compressed_masks(s1, s2, mode, pre, next_):
    shift = s2 - s1
    rules = {
        2: lambda b, n, i, j: j <= i,
        3: lambda b, n, i, j: j <= i + shift,
        4: lambda b, n, i, j: i + shift - pre <= j <= i + shift + next_,
    }
    check_fusion(
        random_qkv(rng(3), 1, 2, 2, s1, s2, 4),
        no_bias,
        rules[mode],
        atten_mask=triu(),
        sparse_mode=mode,
        pre_tokens=pre,
        next_tokens=next_,
    )


@pytest.mark.parametrize("mode", range(5))
def test_fusion_modes_without_mask_see_everything(mode):
    qkv = random_qkv(rng(4), 1, 1, 1, 3, 2, 2)
    check_fusion(qkv, no_bias, everything, sparse_mode=mode, pre_tokens=0, next_tokens=0)


@pytest.mark.parametrize("mode", [6, 7, 8])
def test_fusion_modes_not_enabled(mode):
    x = np.ones((1, 1, 1, 1), f32)
    with pytest.raises(NotImplementedError, match="not enabled"):
        speed_fusion_attention(x, x, x, head_num=1, input_layout="BNSD", sparse_mode=mode)


@pytest.mark.parametrize("pse_type", [0, 1])
@pytest.mark.parametrize(("batch", "rows"), [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_fusion_additive_pse(pse_type, batch, rows):
    g = rng(5)
    pse = g.normal(size=(batch, 2, rows, 4)).astype(f32)
    pse[0, 0, :, 1] = -np.inf
    check_fusion(
        random_qkv(g, 2, 2, 1, 3, 4, 3),
        lambda b, n, i, j: float(pse[b % batch, n, i % rows, j]),
        everything,
        pse=pse,
        pse_type=pse_type,
    )


@pytest.mark.parametrize("pse_type", [2, 3])
@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize(("q_start", "kv_start"), [(None, None), ([2], None), ([1], [4])])
def test_fusion_alibi_pse(pse_type, per_batch, q_start, kv_start):
    slopes = np.linspace(0.1, 0.7, 4, dtype=f32).reshape(2, 2)
    start = (kv_start or [0])[0] - (q_start or [0])[0]

    def bias(b, n, i, j):
        distance = abs(j - i + start)
        slope = float(slopes[b if per_batch else 0, n])
        return -slope * (math.sqrt(distance) if pse_type == 3 else distance)

    check_fusion(
        random_qkv(rng(6), 2, 2, 2, 4, 5, 3),
        bias,
        everything,
        "BSH",
        pse=slopes if per_batch else slopes[0],
        pse_type=pse_type,
        q_start_idx=q_start,
        kv_start_idx=kv_start,
    )


def test_fusion_packed_pse():
    """The last 1024 rows of a bias of i - j give the same result as the whole bias."""
    g, s = rng(7), 1100
    by_distance = g.normal(size=s).astype(f32)
    i, j = np.arange(s)[:, None], np.arange(s)[None, :]
    whole = by_distance[np.abs(i - j)][None, None]
    q, k, v = (x.astype(f32) for x in random_qkv(g, 1, 1, 1, s, s, 2))
    args = {"head_num": 1, "input_layout": "BNSD", "sparse_mode": 2, "atten_mask": triu()}
    want = speed_fusion_attention(q, k, v, whole, **args)
    got = speed_fusion_attention(q, k, v, whole[:, :, -1024:], **args)
    for a, b in zip(got[:3], want[:3]):
        assert np.array_equal(a, b)
    packed = {
        **args,
        "input_layout": "TND",
        "actual_seq_qlen": [s, s + 40],
        "actual_seq_kvlen": np.array([s, s + 40]),
    }
    first, second = ([x[0].transpose(1, 0, 2)[:n] for x in (q, k, v)] for n in (s, 40))
    tnd = speed_fusion_attention(
        *(np.concatenate(pair) for pair in zip(first, second)),
        np.repeat(whole[:, :, -1024:], 2, axis=0),
        **packed,
    )
    assert np.array_equal(tnd[0][:s, 0], want[0][0, 0])
    # Causal rows do not depend on what follows, so the short sequence repeats the first rows.
    np.testing.assert_allclose(tnd[0][s:, 0], want[0][0, 0, :40], rtol=1e-6)


def test_fusion_packed_pse_formula_for_any_content():
    g, s = rng(8), 1030
    plane = g.normal(size=(1, 1, 1024, s)).astype(f32)
    zeros = np.zeros((1, 1, s, 1), f32)
    args = {"head_num": 1, "sparse_mode": 3, "atten_mask": triu(), "pse_type": 0}
    m = speed_fusion_attention(zeros, zeros, zeros, plane, input_layout="BNSD", **args)[1]
    for i in (0, 1, 5, 6, 7, 1029):
        if i >= s - 1024:
            row = [plane[0, 0, i - 6, j] for j in range(i + 1)]
        else:
            row = [plane[0, 0, i % 1024, s - (i - j) - (1024 - i % 1024)] for j in range(i + 1)]
        assert m[0, 0, i, 0] == max(row)
    flat = zeros[0].transpose(1, 0, 2)
    m = speed_fusion_attention(
        flat,
        flat,
        flat,
        plane,
        input_layout="TND",
        actual_seq_qlen=[s],
        actual_seq_kvlen=[s],
        **args,
    )[1]
    for i in (0, 1, 6, 7, 1029):
        ts = [(i - j) - (s - 1024) for j in range(i + 1)]
        assert m[i, 0, 0] == max(plane[0, 0, max(t, 0), max(-t, 0)] for t in ts)


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
@pytest.mark.parametrize("mode", [None, 2, 3])
def test_fusion_tnd(softmax_layout, mode):
    g, n1, n2, d = rng(9), 4, 2, 3
    q_ends, kv_ends = [0, 2, 2, 5], [0, 3, 4, 9]
    q, k, v = g.normal(size=(5, n1, d)), g.normal(size=(9, n2, d)), g.normal(size=(9, n2, d))
    q, k, v = (x.astype(f32) for x in (q, k, v))
    masked = {} if mode is None else {"atten_mask": triu(), "sparse_mode": mode}
    out, m, l, *_, numels = speed_fusion_attention(
        q, k, v, actual_seq_qlen=np.array(q_ends), actual_seq_kvlen=kv_ends, head_num=n1,
        input_layout="TND", softmax_layout=softmax_layout, keep_prob=0.7, seed=11, offset=5,
        **masked,
    )  # fmt: skip
    first = 0
    spans = zip([0, *q_ends], q_ends, [0, *kv_ends], kv_ends)
    for q0, q1, k0, k1 in spans:
        s1, s2 = q1 - q0, k1 - k0
        shift = {None: s2, 2: 0, 3: s2 - s1}[mode]
        want, top, total = fusion_loops(
            *(x.astype(np.float64).transpose(1, 0, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1])),
            lambda *at: 0.0,
            lambda n, i, j, shift=shift: j <= i + shift,
            1,
            1.0,
            first,
            0.7,
            11,
            5,
        )
        first += n1 * s1 * s2
        np.testing.assert_allclose(out[q0:q1], want.transpose(1, 0, 2), rtol=1e-5, atol=1e-6)
        for (n, i), x, y in zip(np.ndindex(n1, s1), top.reshape(-1), total.reshape(-1)):
            if softmax_layout:
                record = (m[q0 + i, n, 0], l[q0 + i, n, 0])
            else:
                at = q0 * n1 + n * s1 + i
                record = (m.reshape(-1, 8)[at, 0], l.reshape(-1, 8)[at, 0])
            np.testing.assert_allclose(record, (x, y), rtol=1e-6)
    assert int(numels) == first


@pytest.mark.parametrize("keep_prob", [0.9, 0.3])
def test_fusion_dropout(keep_prob):
    qkv = random_qkv(rng(10), 2, 2, 1, 3, 5, 2)
    options = {"keep_prob": keep_prob, "seed": -7, "offset": 1 << 40}
    check_fusion(qkv, no_bias, everything, "SBH", **options)


def test_fusion_dropout_that_drops_everything():
    x = rng().normal(size=(1, 1, 3, 4)).astype(f32)
    args = {"head_num": 1, "input_layout": "BNSD"}
    out, m, l, *_ = speed_fusion_attention(x, x, x, keep_prob=1e-11, **args)
    plain = speed_fusion_attention(x, x, x, **args)
    assert not out.any()
    assert np.array_equal(m, plain[1])
    assert np.array_equal(l, plain[2])


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_fusion_half_types_round_once(dtype):
    g = rng(12)
    q, k, v = (x.astype(dtype) for x in random_qkv(g, 1, 1, 1, 4, 5, 8))
    q[0, 0, 0] *= 600 if dtype is np.float16 else 1  # scores beyond float16
    args = {"head_num": 1, "input_layout": "BNSD"}
    half = speed_fusion_attention(q, k, v, **args)
    exact = speed_fusion_attention(q, k, v, **args, unrounded=True)
    assert [x.dtype for x in half[:4]] == [dtype, f32, f32, dtype]
    assert np.isfinite(half[1]).all()
    ulp = 2.0**-11 if dtype is np.float16 else 2.0**-8
    np.testing.assert_allclose(half[0].astype(np.float64), exact[0], rtol=ulp, atol=1e-7)


def test_fusion_corner_cases():
    x = rng().normal(size=(1, 1, 300, 4)).astype(f32)
    args = {"head_num": 1, "input_layout": "BNSD"}
    out, _, l, *_ = speed_fusion_attention(x, x, x, scale=0.0, **args)
    np.testing.assert_allclose(out[0, 0], np.tile(x[0, 0].mean(0), (300, 1)), atol=1e-6)
    assert (l == 300).all()
    # Masked everywhere, and NaN pse at masked pairs, never NaN.
    mask = np.ones((300, 300), np.uint8)
    pse = np.full((1, 1, 300, 300), np.nan, f32)
    out, m, l, *_ = speed_fusion_attention(x, x, x, pse, None, mask, sparse_mode=1, **args)
    assert not out.any()
    assert (m == -FLT_MAX).all()
    assert (l == FLT_MAX).all()
    # All scores minus infinity.
    out, m, *_ = speed_fusion_attention(x, x, x, np.full_like(pse, -np.inf), **args)
    assert not out.any()
    assert (m == -FLT_MAX).all()
