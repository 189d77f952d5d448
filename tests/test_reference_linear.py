"""LinearA8W8Quant reference and the packed scale against hand-worked numbers and loops."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from opferry.reference.linear_a8w8_quant import (
    linear_a8w8_quant,
    npu_trans_quant_param,
    quant_batch_mat_mul,
    trans_quant_param,
    unpack_quant_param,
)

BF16 = ml_dtypes.bfloat16
f32 = np.float32

X1 = np.array([[10, -20, 30], [127, -128, 5]], np.int8)
WEIGHT = np.array([[1, 2, 3], [-4, 5, 6], [100, -100, 50]], np.int8)
SCALE = np.array([0.3, 0.0101, 0.05], f32)
OFFSET = np.array([2.5, -7, -200], f32)
BIAS = np.array([5, -10, 1000], np.int32)
PERTOKEN = np.array([0.5, -2], f32)
FLOAT_BIAS = np.array([0.25, -1.5, 100], f32)
WORKED_INT8 = [[21, -7, 55], [-31, -18, 55]]


def linear(scale=SCALE, offset=None, pertoken=None, bias=None, **attrs):
    return linear_a8w8_quant(X1, WEIGHT, scale, offset, pertoken, bias, transpose_x2=1, **attrs)[0]


def test_worked_packed_scale():
    packed = trans_quant_param(SCALE, OFFSET)
    assert packed.dtype == np.int64
    assert packed.tolist() == [70644672331776, 139776424763392, 113250726100992]
    assert [hex(q) for q in packed] == ["0x40403e998000", "0x7f203c256000", "0x67003d4cc000"]
    m1, o9 = unpack_quant_param(packed)
    assert m1.tolist() == [0.2998046875, 0.01009368896484375, 0.04998779296875]
    assert o9.tolist() == [2, -7, -200]


@pytest.mark.parametrize("carrier", ["float32", "int64", "uint64"])
def test_worked_int8(carrier):
    if carrier == "float32":
        y = linear(SCALE, OFFSET, bias=BIAS)
    else:
        y = linear(trans_quant_param(SCALE, OFFSET).view(carrier), bias=BIAS)
    assert y.dtype == np.int8
    assert y.tolist() == WORKED_INT8


def test_worked_float16():
    y = linear(bias=BIAS, output_dtype=10)
    assert y.dtype == np.float16
    assert y.tolist() == [[19.484375, 0.302734375, 275], [-32.6875, -11.3828125, 1337]]
    # Offset bits of a packed scale are not looked at.
    same = linear(trans_quant_param(SCALE, OFFSET), bias=BIAS, output_dtype=10)
    assert np.array_equal(same, y)


@pytest.mark.parametrize(
    ("code", "dtype", "want"),
    [
        (10, np.float16, [[9.25, -1.2978515625, 212.5], [68.625, 21.078125, -2476]]),
        (16, BF16, [[9.25, -1.296875, 212], [68.5, 21.125, -2480]]),
    ],
)
def test_worked_per_token(code, dtype, want):
    y = linear(pertoken=PERTOKEN, bias=FLOAT_BIAS, output_dtype=code)
    assert y.dtype == dtype
    assert y.astype(f32).tolist() == want


def test_int32_output_ignores_scale():
    y = linear(np.array([np.nan], f32), bias=BIAS, output_dtype=6)
    assert y.dtype == np.int32
    assert y.tolist() == [[65, 30, 5500], [-109, -1128, 26750]]


def test_quant_batch_mat_mul_positions_and_codes():
    args = (X1, WEIGHT, SCALE)
    (y,) = quant_batch_mat_mul(*args, None, FLOAT_BIAS, PERTOKEN, transpose_x2=1)
    assert y.tolist() == linear(pertoken=PERTOKEN, bias=FLOAT_BIAS, output_dtype=10).tolist()
    codes = {1: np.float16, 2: np.int8, 3: np.int32, 27: BF16}
    for code, dtype in codes.items():
        assert quant_batch_mat_mul(*args, dtype=code, transpose_x2=1)[0].dtype == dtype
    with pytest.raises(ValueError, match="dtype: found 0"):
        quant_batch_mat_mul(*args, dtype=0)
    with pytest.raises(ValueError, match="output_dtype: found 27"):
        linear(output_dtype=27)


@pytest.mark.parametrize("code", [0, 3, 6, 10, 16])
@pytest.mark.parametrize("flags", list(itertools.product((0, 1), repeat=2)))
def test_loops(code, flags):
    g = np.random.default_rng(code)
    m, k, n = 2, 5, 3
    x1 = g.integers(-128, 128, (2, 1, m, k), dtype=np.int8)
    x2 = g.integers(-128, 128, (3, k, n), dtype=np.int8)
    scale = g.uniform(-0.02, 0.02, n).astype(f32)
    offset = np.array([-3.5], f32) if code in (0, 3) else None
    bias = g.integers(-500, 500, n, dtype=np.int32)
    pertoken = g.uniform(-2, 2, m).astype(f32) if code == 16 else None
    (y,) = linear_a8w8_quant(
        x1.swapaxes(-1, -2) if flags[0] else x1,
        x2.swapaxes(-1, -2) if flags[1] else x2,
        scale,
        offset,
        pertoken,
        bias,
        output_dtype=code,
        transpose_x1=flags[0],
        transpose_x2=flags[1],
    )
    assert y.shape == (2, 3, m, n)
    for a, b, i, j in np.ndindex(y.shape):
        acc = sum(int(x1[a, 0, i, l]) * int(x2[b, l, j]) for l in range(k)) + int(bias[j])
        truncated = (scale[j : j + 1].view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)[0]
        if code == 6:
            want = acc
        elif code == 16:
            want = BF16(f32(f32(f32(acc) * scale[j]) * pertoken[i]))
        elif code == 10:
            want = np.float16(f32(acc) * truncated)
        else:
            s9 = min(max(round(float(f32(acc) * truncated)), -256), 255)
            want = min(max(s9 - 4, -128), 127)
        assert y[a, b, i, j] == want


def test_batches_and_three_axis_bias():
    g = np.random.default_rng(1)
    x1, x2 = (g.integers(-9, 9, s, dtype=np.int8) for s in ((2, 4), (3, 4, 5)))
    bias = g.integers(-9, 9, (3, 1, 5), dtype=np.int32)
    (y,) = linear_a8w8_quant(x1, x2, np.ones(1, f32), bias=bias, output_dtype=6)
    assert np.array_equal(y, x1.astype(int) @ x2.astype(int) + bias)
    half_bias = bias.astype(np.float16)
    pertoken = np.array([1, 2], f32)
    (y,) = linear_a8w8_quant(x1, x2, np.ones(1, f32), None, pertoken, half_bias, output_dtype=10)
    assert np.array_equal(y, (x1.astype(int) @ x2.astype(int)) * pertoken[:, None] + bias)


def test_offsets_round_and_saturate():
    values = np.array([400.7, -300.2, 2.5, 3.5, -2.5], f32)
    _, o9 = unpack_quant_param(trans_quant_param(np.ones(1, f32), values))
    assert o9.tolist() == [255, -256, 2, 4, -2]


def test_rounding_of_ties_and_signs_of_scale():
    one = np.ones((1, 1), np.int8)
    for scale, want in ((0.5, 0), (1.5, 2), (-0.5, 0), (-2.5, -2), (0.0, 0), (400.0, 127)):
        assert linear_a8w8_quant(one, one, np.array([scale], f32))[0].item() == want
    # Nine bits before the offset: 400 saturates to 255.
    y = linear_a8w8_quant(one, one, np.array([400], f32), np.array([-200], f32))[0]
    assert y.item() == 55


def test_extreme_accumulators():
    k = 65535
    a = np.full((1, k), -128, np.int8)
    one = np.ones(1, f32)
    assert linear_a8w8_quant(a, a, one, transpose_x2=1, output_dtype=6)[0].item() == 1073725440
    bias = np.array([2**31 - 1], np.int32)
    (y,) = linear_a8w8_quant(a, a, one, bias=bias, transpose_x2=1, output_dtype=6)
    assert y.item() == 1073725440 - 2**31 - 1
    long = np.full((200_000, 1), -128, np.int8)
    (y,) = linear_a8w8_quant(long, long, one, transpose_x1=1, output_dtype=6)
    assert y.item() == 200_000 * 2**14 - 2**32
    (y,) = linear_a8w8_quant(a, a, one, transpose_x2=1, output_dtype=10)
    assert y.item() == np.inf


def test_bfloat16_scale_and_untruncated_float32():
    scale = np.array([0.3, 0.0101, 0.05], BF16)
    y = linear(scale, output_dtype=16)
    want = np.array([[60, 40, 4500], [-114, -1118, 25750]], f32) * scale.astype(f32)
    assert np.array_equal(y, want.astype(BF16))
    fine = np.array([1 + 2.0**-8 + 2.0**-12], f32)
    one = np.ones((1, 1), np.int8)
    y = linear_a8w8_quant(one, one, fine, output_dtype=16)[0]
    assert y.item() == 1 + 2.0**-7


def test_round_modes():
    bits = [0x3F800FFF, 0x3F801000, 0x3F803000, 0x3FFFF000, 0x80000FFF, 0x007FFFFF, 0x7F801000]
    scale = np.array(bits, np.uint32).view(f32)
    low = (trans_quant_param(scale) & 0xFFFFFFFF).tolist()
    assert low == [b & 0xFFFFE000 for b in bits]
    low = (trans_quant_param(scale, round_mode=1) & 0xFFFFFFFF).tolist()
    assert low == [0x3F800000, 0x3F800000, 0x3F804000, 0x40000000, 0x80000000, 0, 0x7F800000]
    with pytest.raises(ValueError, match="round_mode: found 2"):
        trans_quant_param(scale, round_mode=2)


def test_packing_broadcasts():
    (packed,) = npu_trans_quant_param(np.ones(1, f32), np.arange(4, dtype=f32))
    assert packed.tolist() == [0x40003F800000 | o << 37 for o in range(4)]
    assert npu_trans_quant_param(np.ones(4, f32), np.ones(1, f32))[0].shape == (4,)
    assert npu_trans_quant_param(np.ones((1, 4), f32), np.ones((1, 4), f32))[0].shape == (4,)


def test_scale_outside_the_contract_does_not_raise():
    for value in (np.nan, np.inf):
        for code in (0, 10, 16):
            assert linear(np.array([value], f32), output_dtype=code).shape == (2, 3)
