"""Numerics and int8 references against hand-worked numbers, loops and recorded results."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from opferry.reference import numerics
from opferry.reference.qordered_longformer_attention import qordered_longformer_attention
from opferry.reference.qordered_matmul import qordered_matmul

BF16 = ml_dtypes.bfloat16
DATA = Path(__file__).parent / "data"
f32 = np.float32


def i8(values):
    return np.array(values, np.int8)


def rng(seed=0):
    return np.random.default_rng(seed)


def random_i8(generator, *shape):
    return generator.integers(-128, 128, shape, dtype=np.int8)


# numerics


@pytest.mark.parametrize(
    ("order", "shape", "entries"),
    [
        (0, (3, 5), {(2, 0): 2, (0, 1): 3, (2, 4): 14}),
        (1, (3, 5), {(2, 0): 10, (0, 1): 1, (2, 4): 14}),
        (2, (4, 64), {(0, 32): 128, (1, 0): 32, (3, 5): 101, (3, 63): 255}),
        (
            3,
            (16, 64),
            {
                (0, 4): 16,
                (1, 0): 128,
                (2, 0): 4,
                (3, 5): 149,
                (0, 31): 115,
                (0, 32): 512,
                (8, 0): 256,
                (9, 33): 897,
            },
        ),
        (
            4,
            (64, 64),
            {
                (1, 0): 32,
                (2, 0): 256,
                (8, 0): 64,
                (3, 5): 293,
                (0, 32): 2048,
                (32, 0): 1024,
                (33, 33): 3105,
                (31, 31): 1023,
            },
        ),
    ],
)
def test_order_check_values(order, shape, entries):
    offsets = numerics.order_offsets(order, *shape)
    assert {at: offsets[at] for at in entries} == entries
    assert sorted(offsets.reshape(-1)) == list(range(shape[0] * shape[1]))


# The same orders as a split into axes and a transposition: axes of r, axes of c, storage order.
SPLITS = {
    2: ((-1,), (-1, 32), (1, 0, 2)),
    3: ((-1, 4, 2), (-1, 8, 4), (3, 0, 2, 4, 1, 5)),
    4: ((-1, 4, 4, 2), (-1, 32), (4, 0, 2, 1, 3, 5)),
}


@pytest.mark.parametrize("order", SPLITS)
def test_orders_as_split_axes(order):
    rows, cols = 64, 96
    matrix = np.arange(rows * cols).reshape(rows, cols)
    row_axes, col_axes, storage = SPLITS[order]
    row_axes = [rows // abs(math.prod(row_axes)) if a == -1 else a for a in row_axes]
    col_axes = [cols // abs(math.prod(col_axes)) if a == -1 else a for a in col_axes]
    stored = matrix.reshape(*row_axes, *col_axes).transpose(storage)
    assert np.array_equal(numerics.pack(matrix, order).reshape(-1), stored.reshape(-1))


@pytest.mark.parametrize("order", range(5))
def test_pack_unpack_batches(order):
    logical = random_i8(rng(), 3, 32, 64)
    stored = numerics.pack(logical, order, (64, 32))
    assert stored.shape == (3, 64, 32)
    assert np.array_equal(numerics.unpack(stored, order, (32, 64)), logical)
    for b in range(3):
        offsets = numerics.order_offsets(order, 32, 64)
        assert np.array_equal(stored[b].reshape(-1)[offsets], logical[b])


@pytest.mark.parametrize(("order", "shape"), [(2, (4, 33)), (3, (4, 32)), (4, (16, 32))])
def test_tiles_must_be_whole(order, shape):
    with pytest.raises(ValueError, match="does not fill"):
        numerics.order_offsets(order, *shape)


def test_rounding_and_saturation():
    v = np.array([0.5, 1.5, -0.5, -2.5, 127.5, -128.5, 1e30, -np.inf])
    assert numerics.saturate(v).tolist() == [0, 2, 0, -2, 127, -128, 127, -128]


def test_cast_rounds_once():
    # A hair above halfway between 1 and 1 + 2^-7: float32 first would lose the hair and round down.
    v = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, -(1 + 3 * 2.0**-8), 1e39, 3e-41, np.nan])
    got = numerics.cast(v, BF16).astype(np.float64)
    assert got[:4].tolist() == [1 + 2.0**-7, 1.0, -(1 + 2.0**-6), np.inf]
    assert got[4] == float(np.array(3e-41, BF16))
    assert np.isnan(got[5])
    halves = np.array([1 + 2.0**-11 + 2.0**-50, 1e6])
    assert numerics.cast(halves, np.float16).tolist() == [1 + 2.0**-10, np.inf]


def test_philox_check_values():
    counters = np.array([[0, 0, 0, 0], [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], np.uint32)
    zero = numerics.philox4x32(counters[0], (0, 0))
    pi = numerics.philox4x32(counters[1], (0xA4093822, 0x299F31D0))
    assert [f"{w:08x}" for w in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{w:08x}" for w in pi] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    words = numerics.random_words(np.arange(12), 3, 0)
    assert " ".join(f"{w:08x}" for w in words) == (
        "d1104d77 1de847ce a7f2ec5a c3e627f9 44aa54a1 8d31473d 39713e09 9b939f1f "
        "c4b04e6e c90cad3f d27230ee 5c63fa10"
    )


def test_philox_counter_uses_all_64_bits():
    counter = np.array([5, 1, 0xFFFFFFFE, 0xFFFFFFFF], np.uint32)
    words = numerics.philox4x32(counter, (0xFFFFFFFF, 0xFFFFFFFF))
    index = np.array([((1 << 32) + 5) * 4 + w for w in range(4)])
    assert np.array_equal(numerics.random_words(index, -1, -2), words)


# QOrderedMatMul

WORKED_MATMUL = {
    "A": i8([[1, -2, 3], [100, 50, -128]]),
    "scale_A": f32(0.5),
    "B": i8([4, 6, -8, -5, 7, 9]).reshape(3, 2),
    "scale_B": f32(0.25),
    "scale_Y": f32(0.5),
    "bias": np.array([1.0, -0.25], f32),
    "C": i8([[10, -10], [3, 4]]),
    "scale_C": f32(0.125),
}
ROW = {"order_A": 1, "order_B": 0, "order_Y": 1}


def test_matmul_worked_example():
    (y,) = qordered_matmul(**WORKED_MATMUL, **ROW)
    assert y.dtype == np.int8
    assert y.tolist() == [[-4, -1], [127, -128]]
    v, slack = qordered_matmul(**WORKED_MATMUL, **ROW, unrounded=True)
    assert v.tolist() == [[-3.5, -1.0], [433.75, -325.0]]
    assert not slack.any()


def test_matmul_without_bias_and_residual():
    names = ("A", "scale_A", "B", "scale_B", "scale_Y")
    (y,) = qordered_matmul(**{n: WORKED_MATMUL[n] for n in names}, **ROW)
    assert y.tolist() == [[-8, 2], [127, -128]]
    (same,) = qordered_matmul(**{n: WORKED_MATMUL[n] for n in names}, scale_C=f32(3), **ROW)
    assert np.array_equal(same, y)


def matmul_loops(a, b, c, alpha, bias, beta):
    """a [z,M,K], b [z',K,N], c [z'',M,N] logical; alpha and bias [N], bias in units of Y."""
    z, m, k = a.shape
    n = b.shape[-1]
    y = np.zeros((z, m, n), np.int8)
    for i, r, j in itertools.product(range(z), range(m), range(n)):
        acc = sum(int(a[i, r, t]) * int(b[i % len(b), t, j]) for t in range(k))
        v = float(alpha[j]) * acc + float(bias[j]) + float(beta) * int(c[i % len(c), r, j])
        y[i, r, j] = min(max(round(v), -128), 127)  # Python rounds half to even
    return y


@pytest.mark.parametrize("order_b", [0, 3, 4])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(("batch_b", "batch_c"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_matmul_loops(order_b, per_column, batch_b, batch_c):
    g = rng(order_b)
    tiled = order_b != 0
    m, k, n = (3, 32, 32) if tiled else (3, 5, 7)
    a, b = random_i8(g, 2, m, k), random_i8(g, batch_b, k, n)
    c = random_i8(g, batch_c, m, n)
    scale_a, scale_y, scale_c = f32(0.02), f32(0.7), f32(0.3)
    scale_b = np.linspace(-0.1, 0.4, n).astype(f32) if per_column else np.array([0.11], f32)
    bias = None if tiled else g.normal(size=n).astype(f32)
    if per_column:
        alpha = scale_b * f32(scale_a / scale_y)
    else:
        alpha = np.full(n, f32(f32(scale_a * scale_b[0]) / scale_y))
    bias_y = np.zeros(n) if bias is None else bias * f32(f32(1) / scale_y)
    want = matmul_loops(a, b, c, alpha, bias_y, f32(scale_c / scale_y))
    order_a = 2 if tiled else 1
    stored_b = numerics.pack(b.swapaxes(1, 2), order_b if tiled else 1).reshape(batch_b, k, n)
    (y,) = qordered_matmul(
        numerics.pack(a, order_a),
        scale_a,
        stored_b,
        scale_b,
        scale_y,
        bias,
        numerics.pack(c, order_a),
        scale_c,
        order_A=order_a,
        order_B=order_b,
        order_Y=order_a,
    )
    assert np.array_equal(numerics.unpack(y, order_a), want)


def test_matmul_rank_of_a_decides():
    args = dict(WORKED_MATMUL, B=WORKED_MATMUL["B"][None], C=WORKED_MATMUL["C"][None])
    assert qordered_matmul(**args, **ROW)[0].shape == (2, 2)
    args["A"] = args["A"][None]
    assert qordered_matmul(**args, **ROW)[0].shape == (1, 2, 2)


def test_matmul_corner_cases():
    one = i8([[1]])
    ties = [0.5, 1.5, -2.5, 127.5, -128.5]
    got = [
        qordered_matmul(one, f32(1), one, f32(1), f32(1), np.array([t - 1], f32), **ROW)[0].item()
        for t in ties
    ]
    assert got == [0, 2, -2, 127, -128]
    (y,) = qordered_matmul(
        i8([[3, 4]]), f32(1), i8([1, 2, 3, 4]).reshape(2, 2), np.array([0, 1], f32), f32(1),
        None, i8([[5, 6]]), f32(0), **ROW,
    )  # fmt: skip
    assert y.tolist() == [[0, 25]]
    with pytest.raises(ValueError, match="orders"):
        qordered_matmul(one, f32(1), one, f32(1), f32(1), order_A=1, order_B=1, order_Y=1)


def test_recorded_int8_attention():
    """Head 0 of ONNX Runtime's QOrderedAttention test, every product of it a QOrderedMatMul."""
    data = json.loads((DATA / "qordered_attention_head0.json").read_text())
    a = {
        name: np.array(x, data["dtypes"].get(name, "float32")) for name, x in data["arrays"].items()
    }
    (q, k, v) = (
        qordered_matmul(
            a["INPUT"],
            a["SCALE_INPUT"],
            a[f"W{t}"].T.reshape(32, 16),
            a[f"{t}W_SCALE"],
            a[f"SCALE_{t}"],
            a[f"{t}B"],
            **ROW,
        )[0]
        for t in "QKV"
    )
    # B column-major of k^T is k itself.
    (s,) = qordered_matmul(q, a["SCALE_Q"], k, a["SCALE_K"], a["SCALE_QK"], **ROW)
    kept = a["MASK"].reshape(1, -1) != 0
    x = s * np.float64(a["SCALE_QK"]) / math.sqrt(16)
    _, w, total = numerics.masked_softmax(x, kept)
    p = numerics.saturate(w / total / np.float64(a["SCALE_P"]))
    columns = np.ascontiguousarray(v.T).reshape(16, 16)
    (out,) = qordered_matmul(p, a["SCALE_P"], columns, a["SCALE_V"], a["SCALE_OUT"], **ROW)
    assert np.array_equal(out, a["OUT"])


# QOrderedLongformerAttention

LONGFORMER_EXAMPLE = {
    "input": i8([[[8, -4], [2, 6], [-6, 3], [5, 5]]]),
    "scale_input": f32(0.125),
    "weight": i8([10, 5, -3, 8, 4, -6, 7, 2, 20, -9, -12, 16]).reshape(2, 6),
    "scale_weight": f32(0.0625),
    "bias": np.array([0.5, 0, 0, -0.5, 1, 0], f32),
    "scale_bias": f32(np.nan),
    "scale_qkv_gemm": f32(0.125),
    "mask": np.array([[0, 0, 0, -10000]], np.float16),
    "global_weight": i8([-7, 3, 4, 9, 6, 5, -2, 12, 11, -14, 30, 8]).reshape(2, 6),
    "scale_global_weight": f32(0.0625),
    "global_bias": np.array([0, 0, 1, 0, 0, -2], f32),
    "scale_global_gemm": f32(0.125),
    "global_": np.array([[1, 0, 0, 0]], np.int32),
    "scale_output": f32(0.03125),
}
LONGFORMER_ATTRS = {"num_heads": 1, "window": 1, "order_input": 1, "order_output": 1}


def test_longformer_worked_example():
    (y,) = qordered_longformer_attention(**LONGFORMER_EXAMPLE, **LONGFORMER_ATTRS)
    assert y.dtype == np.int8
    assert y.tolist() == [[[-4, 3], [14, -3], [7, 3], [0, 0]]]
    v, _ = qordered_longformer_attention(**LONGFORMER_EXAMPLE, **LONGFORMER_ATTRS, unrounded=True)
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
    example = dict(LONGFORMER_EXAMPLE, mask=np.full((1, 4), -1e-4, np.float16))
    assert not qordered_longformer_attention(**example, **LONGFORMER_ATTRS)[0].any()
    # Only itself attendable: the row copies its V, here 13 * 0.125 / 0.03125 = 52 and -10 * 4.
    alone = dict(
        LONGFORMER_EXAMPLE,
        mask=np.array([[0, -np.inf, -np.inf, -np.inf]], np.float16),
        global_=np.zeros((1, 4), np.int32),
    )
    (y,) = qordered_longformer_attention(**alone, **LONGFORMER_ATTRS)
    assert y.tolist() == [[[52, -40], [0, 0], [0, 0], [0, 0]]]
    small = dict(alone, scale_output=f32(1e-6))
    (y,) = qordered_longformer_attention(**small, **LONGFORMER_ATTRS)
    assert y[0, 0].tolist() == [127, -128]


def minstd_rand0_i8(seed):
    """Uniform int8 in -128..126 as libstdc++ draws them from std::minstd_rand0."""
    state, scaling = seed, 2147483645 // 255
    while True:
        state = state * 16807 % 2147483647
        if state - 1 < 255 * scaling:
            yield (state - 1) // scaling - 128


def test_recorded_longformer():
    """ONNX Runtime's GPU kernel keeps scores in float16: 4000 of its 4096 values agree."""
    stream = minstd_rand0_i8(666)

    def take(*shape):
        return np.array(list(itertools.islice(stream, math.prod(shape))), np.int8).reshape(shape)

    x, weight, bias = take(1, 128, 32), take(32, 96), take(96).astype(f32) / f32(2048)
    global_weight, global_bias = take(32, 96), take(96).astype(f32) / f32(2048)
    x.reshape(-1)[120:128] = 0
    mask = np.ones((1, 128), np.float16)
    mask[:, 120:] = 0
    flags = np.zeros((1, 128), np.int32)
    flags[:, :16] = 1
    (y,) = qordered_longformer_attention(
        x, f32(1 / 32), weight, f32(1 / 64), bias, f32(1 / 8), f32(1 / 4), mask, global_weight,
        f32(1 / 64), global_bias, f32(1 / 4), flags, f32(1 / 8),
        num_heads=2, window=32, order_input=1, order_output=1,
    )  # fmt: skip
    recorded = np.loadtxt(DATA / "qordered_longformer_128x32.txt", dtype=np.int64)
    assert np.count_nonzero(y[0] == recorded) >= 4000
