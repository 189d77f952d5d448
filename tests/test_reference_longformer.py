"""The reference of QOrderedLongformerAttention against hand-worked numbers, loops and a recorded
result.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from longformer_cases import EXAMPLE, EXAMPLE_ATTRS, EXAMPLE_OUTPUT, RECORDED_ATTRS, recorded

from opferry.reference import numerics
from opferry.reference.qordered_longformer_attention import qordered_longformer_attention

f32 = np.float32


def rng(seed):
    return np.random.default_rng(seed)


def random_i8(generator, *shape):
    return generator.integers(-128, 128, shape, dtype=np.int8)


def keywords(inputs):
    """As Python spells them: ``global`` is a word of the language."""
    return {name if name != "global" else "global_": value for name, value in inputs.items()}


WORKED = keywords(EXAMPLE)


def test_longformer_worked_example():
    (y,) = qordered_longformer_attention(**WORKED, **EXAMPLE_ATTRS)
    assert y.dtype == np.int8
    assert y.tolist() == EXAMPLE_OUTPUT
    v, _ = qordered_longformer_attention(**WORKED, **EXAMPLE_ATTRS, unrounded=True)
    o = [[-0.11374, 0.08401], [0.42437, -0.10878], [0.20558, 0.09416], [0, 0]]
    np.testing.assert_allclose(v[0] * 0.03125, o, atol=5e-6)


def longformer_case(g, batch, seq, heads, d, per_column):
    h = heads * d
    mask = np.zeros((batch, seq), np.float16)
    mask[0, -2:] = [-10000, -np.inf]
    mask[-1, :3] = [0.5, -0.0, -0.25]
    flags = (g.random((batch, seq)) < 0.3).astype(np.int32) * -5
    flags[0, -1] = 1  # a padding token with a global flag
    case = {"input": random_i8(g, batch, seq, h), "mask": mask, "global_": flags}
    for weight, bias, scale, gemm in (
        ("weight", "bias", "scale_weight", "scale_qkv_gemm"),
        ("global_weight", "global_bias", "scale_global_weight", "scale_global_gemm"),
    ):
        case[weight] = random_i8(g, h, 3 * h)
        case[bias] = g.normal(size=3 * h).astype(f32)
        case[scale] = g.uniform(0.004, 0.02, per_column or 1).astype(f32)
        case[gemm] = np.array([0.05], f32)
    scales = {"scale_input": f32(0.03), "scale_bias": f32(0), "scale_output": f32(0.03)}
    return case | scales


def longformer_loops(c, heads, window):
    batch, seq, h = c["input"].shape
    d = h // heads

    def project(weight, scale_weight, bias, gemm):
        scales = np.broadcast_to(
            np.tile(scale_weight, 3) if scale_weight.size == h else scale_weight, 3 * h
        )
        logical = weight.reshape(3 * h, h)  # column-major (H, 3H)
        out = np.zeros((batch, seq, 3, heads, d))
        for b, s, n in itertools.product(range(batch), range(seq), range(3 * h)):
            acc = sum(int(x) * int(w) for x, w in zip(c["input"][b, s], logical[n]))
            alpha = f32(f32(c["scale_input"] * scales[n]) / gemm[0])
            i = min(max(round(float(alpha) * acc + float(bias[n])), -128), 127)
            out[b, s, n // h, n % h // d, n % d] = np.float16(f32(gemm[0] * f32(i)))
        return out

    local = project(c["weight"], c["scale_weight"], c["bias"], c["scale_qkv_gemm"])
    far = project(
        c["global_weight"], c["scale_global_weight"], c["global_bias"], c["scale_global_gemm"]
    )
    y = np.zeros((batch, seq, heads, d), np.int8)
    for b, i, n in itertools.product(range(batch), range(seq), range(heads)):
        if c["mask"][b, i] < 0:
            continue
        flags = c["global_"][b] != 0
        t = far if flags[i] else local
        keys = [j for j in range(seq) if flags[i] or flags[j] or abs(i - j) <= window]
        x = [
            float(t[b, i, 0, n] @ t[b, j, 1, n]) / math.sqrt(d) + float(c["mask"][b, j])
            for j in keys
        ]
        e = [math.exp(s - max(x)) for s in x]
        o = sum(w / sum(e) * t[b, j, 2, n] for w, j in zip(e, keys))
        v = o.astype(np.float16).astype(np.float64) * float(f32(1) / c["scale_output"])
        y[b, i, n] = np.clip(np.rint(v), -128, 127)
    return y.reshape(batch, seq, h)


@pytest.mark.parametrize("per_column", [0, 6, 18])
@pytest.mark.parametrize("window", [1, 4])
def test_longformer_loops(per_column, window):
    case = longformer_case(rng(window), 2, 8, 2, 3, per_column)
    attrs = {"num_heads": 2, "window": window, "order_input": 1, "order_output": 1}
    (y,) = qordered_longformer_attention(**case, **attrs)
    assert np.array_equal(y, longformer_loops(case, 2, window))


@pytest.mark.parametrize(("order", "global_order"), [(3, 4), (4, 3)])
def test_longformer_tiled_equals_row(order, global_order):
    case = longformer_case(rng(5), 2, 4, 2, 16, 0)
    attrs = {"num_heads": 2, "window": 2}
    (want,) = qordered_longformer_attention(**case, **attrs, order_input=1, order_output=1)
    tiled = dict(case, input=numerics.pack(case["input"], 2))
    for name, at in (("weight", order), ("global_weight", global_order)):
        tiled[name] = numerics.pack(case[name].reshape(96, 32), at, (32, 96))
    (y,) = qordered_longformer_attention(
        **tiled,
        **attrs,
        order_input=2,
        order_output=2,
        order_weight=order,
        order_global_weight=global_order,
    )
    assert np.array_equal(numerics.unpack(y, 2), want)


def test_longformer_row_blocks_agree():
    """More rows than a block of the reference: a window crossing the block border stays whole."""
    case = longformer_case(rng(6), 1, 600, 1, 2, 0)
    attrs = {"num_heads": 1, "window": 50, "order_input": 1, "order_output": 1}
    (y,) = qordered_longformer_attention(**case, **attrs)
    assert np.array_equal(y, longformer_loops(case, 1, 50))


def test_longformer_corner_cases():
    example = dict(WORKED, mask=np.full((1, 4), -1e-4, np.float16))
    assert not qordered_longformer_attention(**example, **EXAMPLE_ATTRS)[0].any()
    # Only itself attendable: the row copies its V, here 13 * 0.125 / 0.03125 = 52 and -10 * 4.
    alone = dict(
        WORKED,
        mask=np.array([[0, -np.inf, -np.inf, -np.inf]], np.float16),
        global_=np.zeros((1, 4), np.int32),
    )
    (y,) = qordered_longformer_attention(**alone, **EXAMPLE_ATTRS)
    assert y.tolist() == [[[52, -40], [0, 0], [0, 0], [0, 0]]]
    small = dict(alone, scale_output=f32(1e-6))
    (y,) = qordered_longformer_attention(**small, **EXAMPLE_ATTRS)
    assert y[0, 0].tolist() == [127, -128]


def test_recorded_longformer():
    inputs, expected = recorded()
    (y,) = qordered_longformer_attention(**keywords(inputs), **RECORDED_ATTRS)
    assert np.count_nonzero(y[0] == expected) >= 4000
