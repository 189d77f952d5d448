"""Numerics and the reference of QOrderedMatMul against hand-worked numbers, loops and a recorded
result.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from order_cases import OFFSETS

from opferry.reference import numerics
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


@pytest.mark.parametrize(("order", "shape", "entries"), OFFSETS.values(), ids=OFFSETS)
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
