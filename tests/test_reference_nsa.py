"""NPUNsaCompressAttention reference against hand-worked numbers and element-wise loops."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from opferry.reference.nsa_compress_attention import nsa_compress_attention

BF16 = ml_dtypes.bfloat16
FLT_MAX = np.float32(np.finfo(np.float32).max)
f32 = np.float32


def rng(seed=0):
    return np.random.default_rng(seed)


NSA_BLOCKS = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "select_block_count": 3,
}


def nsa_worked():
    atten = np.zeros((3, 6), bool)
    atten[0] = True
    atten[1, 3:] = True
    topk = np.zeros((3, 2), np.uint8)
    topk[2, 1] = 7
    return {
        "query": np.array([1, 0, 0, 1, 2, 0, 0, 2, 1, 1, -1, 1], f32).reshape(3, 2, 2),
        "key": np.array([0, 0, 1, 0, 0, 1, 1, 1, 2, 0, 0, 2], f32).reshape(6, 1, 2),
        "value": np.arange(1, 7, dtype=f32).reshape(6, 1, 1),
        "atten_mask": atten,
        "topk_mask": topk,
        "actual_seq_qlen": [3],
        "actual_cmp_seq_kvlen": np.array([6]),
        "actual_sel_seq_kvlen": [2],
        "scale_value": 0.5,
        "head_num": 2,
        **NSA_BLOCKS,
    }


def test_nsa_worked_example():
    m, l, out, topk = nsa_compress_attention(**nsa_worked())
    assert (m.shape, l.shape, out.shape, topk.shape) == ((3, 2, 8), (3, 2, 8), (3, 2, 1), (3, 1, 3))
    assert [x.dtype for x in (m, l, out, topk)] == [f32, f32, f32, np.int32]
    assert m.reshape(-1, 8)[:, 0].tolist() == [-FLT_MAX, 1, 1] * 2
    np.testing.assert_allclose(
        l.reshape(-1, 8)[:, 5], [6, 1.735759, 4.580941, 6, 1.735759, 2.700755], rtol=1e-6
    )
    want = [[3.5, 3.5], [2.0, 2.364175], [4.016759, 3.992190]]
    np.testing.assert_allclose(out[..., 0], want, rtol=1e-6)
    assert topk[:, 0].tolist() == [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    scores = nsa_compress_attention(**nsa_worked() | {"topk_mask": None}, unrounded=True)[3]
    np.testing.assert_allclose(
        scores[:, 0], [[2.666667, 1.0], [3.576117, 0], [2.337949, 1.445531]], atol=1e-6
    )


def test_nsa_worked_example_extensions():
    m, *_ = nsa_compress_attention(**nsa_worked(), softmax_out_layout="same_as_input")
    assert m.reshape(-1, 8)[:, 0].tolist() == [-FLT_MAX, -FLT_MAX, 1, 1, 1, 1]
    case = nsa_worked() | {"topk_mask": None, "score_shift": 1, "masked_rows": "zero"}
    m, l, out, scores = nsa_compress_attention(**case, unrounded=True)
    assert m.reshape(-1, 8)[::3, 0].tolist() == [-float(FLT_MAX)] * 2
    assert l.reshape(-1, 8)[::3, 0].tolist() == [0, 0]
    assert not out[0].any()
    np.testing.assert_allclose(scores[:, 0], [[0, 0], [4, 0], [1.931554, 2.068446]], atol=1e-6)


def nsa_loops(c):
    """Sequence by sequence, head by head, straight from the formulas; softmax by (token, head)."""
    q, k, v = (c[n].astype(np.float64) for n in ("query", "key", "value"))
    tokens, n1, _ = q.shape
    n2 = k.shape[1]
    group = n1 // n2
    stride = c["compress_stride"]
    r, n = c["select_block_size"] // stride, c["compress_block_size"] // stride
    top, count = c["select_block_count"], c["head_num"]
    m, l = np.zeros((tokens, n1)), np.zeros((tokens, n1))
    out = np.zeros((tokens, n1, v.shape[2]))
    picked = np.full((tokens, n2, top), -1)
    assert count == n1
    ends = [list(c[f"actual_{n}_seq_{w}len"]) for n, w in (("cmp", "kv"), ("sel", "kv"))]
    q_ends = list(c["actual_seq_qlen"])
    starts = [[0, *e[:-1]] for e in (q_ends, *ends)]
    for b in range(len(q_ends)):
        k0, cmp_len = starts[1][b], ends[0][b] - starts[1][b]
        sel_len = ends[1][b] - starts[2][b]
        for t, h2 in itertools.product(range(q_ends[b] - starts[0][b]), range(n2)):
            row = starts[0][b] + t
            score = [0.0] * sel_len
            for h in range(h2 * group, (h2 + 1) * group):
                s, dead = [], True
                for i in range(cmp_len):
                    hidden = c.get("atten_mask") is not None and c["atten_mask"][t, i] != 0
                    dead &= hidden
                    x = float(f32(c["scale_value"])) * float(q[row, h] @ k[k0 + i, h2])
                    s.append(-float(FLT_MAX) if hidden else x)
                if not s or (dead and c.get("masked_rows") == "zero"):
                    m[row, h] = -FLT_MAX
                    continue
                m[row, h] = max(s)
                e = [math.exp(x - m[row, h]) for x in s]
                l[row, h] = sum(e)
                p = [x / l[row, h] for x in e]
                out[row, h] = sum(p[i] * v[k0 + i, h2] for i in range(cmp_len))
                for j, a, b2 in itertools.product(range(sel_len), range(r), range(n)):
                    at = r * (j + 1) - a - b2 - c.get("score_shift", 0)
                    if 0 <= at < cmp_len:
                        score[j] += p[at]
            for j in range(sel_len):
                if c.get("topk_mask") is not None and c["topk_mask"][t, j]:
                    score[j] = float(FLT_MAX)
            # Rounded so that sums in another order still tie.
            order = sorted(range(sel_len), key=lambda j: (-round(score[j], 12), j))[:top]
            picked[row, h2, : len(order)] = order
    return m, l, out, picked


@pytest.mark.parametrize("masks", ["none", "atten", "both"])
@pytest.mark.parametrize(
    ("l", "d", "sel", "k", "extra"),
    [
        (32, 16, 64, 3, {}),
        (16, 16, 16, 2, {"score_shift": 1}),
        (48, 32, 64, 5, {"masked_rows": "zero", "sparse_mode": 1}),
        (64, 16, 64, 1, {"score_shift": 4}),
    ],
)
def test_nsa_loops(masks, l, d, sel, k, extra):
    g = rng(l)
    r = sel // d
    cmp_lens, q_lens = [5, 0, 7, 3, 1], [3, 2, 4, 0, 1]
    case = {
        "query": g.normal(size=(12, 4, 3)).astype(f32),
        "key": g.normal(size=(18, 2, 3)).astype(f32),
        "value": g.normal(size=(18, 2, 2)).astype(f32),
        "actual_seq_qlen": np.cumsum(q_lens),
        "actual_cmp_seq_kvlen": np.cumsum(cmp_lens),
        "actual_sel_seq_kvlen": np.cumsum([-(-c // r) for c in cmp_lens]),
        "scale_value": 0.7,
        "head_num": 4,
        "compress_block_size": l,
        "compress_stride": d,
        "select_block_size": sel,
        "select_block_count": k,
        **extra,
    }
    if masks != "none":
        mask = g.random((6, 9)) < 0.5
        mask[1] = True
        case["atten_mask"] = mask
    if masks == "both":
        case["topk_mask"] = (g.random((5, 8)) < 0.3).astype(np.uint8) * 9
    # Rows and keys that no sequence describes must not matter.
    case["query"][10:] = np.nan
    case["key"][16:] = np.nan
    case["value"][16:] = np.nan
    case["key"][12:15] = np.nan  # keys of the sequence without query rows
    want = nsa_loops(case)
    m, total, out, topk = nsa_compress_attention(**case, softmax_out_layout="same_as_input")
    np.testing.assert_allclose(m[..., 2], want[0].astype(f32), rtol=1e-6)
    np.testing.assert_allclose(total[..., 2], want[1], rtol=1e-6)
    np.testing.assert_allclose(out, want[2], rtol=1e-5, atol=1e-6)
    assert np.array_equal(topk, want[3])
    m_flat, l_flat = (x.reshape(-1, 8) for x in nsa_compress_attention(**case)[:2])
    start = 0
    for stop in case["actual_seq_qlen"]:
        block = slice(4 * start, 4 * stop)
        assert np.array_equal(m_flat[block, 0], m[start:stop, :, 0].T.reshape(-1))
        assert np.array_equal(l_flat[block, 0], total[start:stop, :, 0].T.reshape(-1))
        start = stop
    assert not m_flat[4 * start :].any()
    assert not l_flat[4 * start :].any()
    assert not out[start:].any()
    assert (topk[start:] == -1).all()


def test_nsa_all_forced_and_zero_scale():
    case = nsa_worked() | {
        "atten_mask": None,
        "topk_mask": np.ones((3, 5), bool),
        "scale_value": 0.0,
        "select_block_count": 1,
    }
    _, l, out, topk = nsa_compress_attention(**case)
    assert (l == 6).all()
    np.testing.assert_allclose(out, 3.5)
    assert (topk == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_nsa_half_types(dtype):
    case = nsa_worked()
    for name in ("query", "key", "value"):
        case[name] = case[name].astype(dtype)
    m, l, out, topk = nsa_compress_attention(**case)
    exact = nsa_compress_attention(**case, unrounded=True)
    assert (m.dtype, l.dtype, out.dtype) == (f32, f32, dtype)
    np.testing.assert_allclose(out.astype(np.float64), exact[2], rtol=2.0**-8)
    assert topk[:, 0].tolist() == [[0, 1, -1], [0, 1, -1], [1, 0, -1]]


def test_nsa_long_rows_cross_blocks():
    """More rows than the reference holds at once."""
    g = rng(20)
    case = {
        "query": g.normal(size=(150, 4, 2)).astype(f32),
        "key": g.normal(size=(9, 2, 2)).astype(f32),
        "value": g.normal(size=(9, 2, 2)).astype(f32),
        "actual_seq_qlen": [150],
        "actual_cmp_seq_kvlen": [9],
        "actual_sel_seq_kvlen": [3],
        "scale_value": 1.0,
        "head_num": 4,
        "atten_mask": g.random((150, 9)) < 0.5,
        **NSA_BLOCKS,
    }
    want = nsa_loops(case)
    *_, out, topk = nsa_compress_attention(**case)
    np.testing.assert_allclose(out, want[2], rtol=1e-5, atol=1e-6)
    assert np.array_equal(topk, want[3])
