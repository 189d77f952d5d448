"""LinearA8W8Quant in NumPy: NPUQuantMatmul, its twin QuantBatchMatMul, and the packed scale.

Integers are exact (int32, wrapping); every float step is one float32 operation in the order
written, because the definition is bit for bit. Packed scale, 64 bits: 31..13 the upper bits of the
float32 scale, 45..37 a nine-bit offset, 46 set.
"""

from __future__ import annotations

import numpy as np

from .numerics import BFLOAT16, int_matmul, round_half_even

# ONNX TensorProto codes, 0 meaning int8.
OUTPUT_DTYPES = {
    0: np.dtype(np.int8),
    3: np.dtype(np.int8),
    6: np.dtype(np.int32),
    10: np.dtype(np.float16),
    16: BFLOAT16,
}
# Graph-engine codes of QuantBatchMatMul's `dtype` to output_dtype.
GRAPH_ENGINE_CODES = {1: 10, 2: 3, 3: 6, 27: 16}

_SCALE_BITS = np.uint32(0xFFFFE000)
_OFFSET_SHIFT = np.uint64(37)
_PACKED_FLAG = np.uint64(1 << 46)


def trans_quant_param(scale, offset=None, round_mode=0):
    """Pack a float32 scale, and optionally a float32 offset, into int64 quant parameters.

    scale and offset are (t,) or (1,n), lengths 1 and n broadcast. round_mode 0 truncates the
    mantissa to ten bits; 1 rounds it half to even (subnormals to signed zero, infinity and NaN
    truncated). Returns int64, 1-D, as long as the longer of the two.
    """
    bits = np.ascontiguousarray(scale, np.float32).reshape(-1).view(np.uint32)
    if round_mode == 1:
        rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        exponent = (bits >> np.uint32(23)) & np.uint32(0xFF)
        rounded = np.where(exponent == 0, bits & np.uint32(0x80000000), rounded)
        bits = np.where(exponent == 0xFF, bits, rounded)
    elif round_mode != 0:
        raise ValueError(f"trans_quant_param: round_mode: found {round_mode}, allowed 0, 1")
    packed = (bits & _SCALE_BITS).astype(np.uint64) | _PACKED_FLAG
    if offset is not None:
        nine = _integer(np.asarray(offset, np.float32).reshape(-1), -256, 255) & 0x1FF
        packed = packed | (nine.astype(np.uint64) << _OFFSET_SHIFT)
    return packed.view(np.int64)


def unpack_quant_param(packed):
    """int64 or uint64 quant parameters to (m1 float32, o9 int64 in -256..255)."""
    bits = np.ascontiguousarray(packed).view(np.uint64)
    m1 = (bits.astype(np.uint32) & _SCALE_BITS).view(np.float32)
    nine = ((bits >> _OFFSET_SHIFT) & np.uint64(0x1FF)).astype(np.int64)
    return m1, (nine ^ 0x100) - 0x100


def _integer(x, low, high):
    """Round half to even, clip, int64."""
    return np.clip(round_half_even(x), low, high).astype(np.int64)


def linear_a8w8_quant(
    x1,
    x2,
    scale,
    offset=None,
    pertoken_scale=None,
    bias=None,
    *,
    output_dtype=0,
    transpose_x1=0,
    transpose_x2=0,
    unrounded=False,
):
    """npu NPUQuantMatmul version 1.

    x1 int8 (*b1,m,k), x2 int8 (*b2,k,n), rank 2..6, either one with its last two axes swapped if
    its flag is 1; scale float32 or bfloat16, or packed int64 / uint64, (1,) or (n,); offset float32
    (1,) or (n,); pertoken_scale float32 (m,); bias int32 (into the accumulator) or float, (n,) or
    (batch,1,n).

    Returns (y,): (*broadcast(b1,b2),m,n), int8, int32, float16 or bfloat16. With `unrounded`
    returns (t, magnitude) for the float outputs: the float32 value before the cast, and the largest
    scaled product or bias, which is what float32 cancellation is measured against.
    """
    if output_dtype not in OUTPUT_DTYPES:
        raise ValueError(
            f"NPUQuantMatmul: output_dtype: found {output_dtype}, allowed {sorted(OUTPUT_DTYPES)}"
        )
    dtype = OUTPUT_DTYPES[output_dtype]
    x1 = x1.swapaxes(-1, -2) if transpose_x1 else x1
    x2 = x2.swapaxes(-1, -2) if transpose_x2 else x2
    acc = int_matmul(x1, x2)
    float_bias = None
    if bias is not None and bias.dtype == np.int32:
        acc = acc + bias
    elif bias is not None:
        float_bias = bias.astype(np.float32)
    acc = acc.astype(np.int32)  # wraps modulo 2^32
    if dtype == np.int32:
        return (acc,)

    f = acc.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != BFLOAT16 and pertoken_scale is None:
            packed = scale
            if scale.dtype.kind == "f":
                packed = trans_quant_param(scale, offset)
            m1, o9 = unpack_quant_param(packed)
            t = f * m1
            if dtype == np.int8:
                # Saturates to nine bits before the offset is added.
                y = _integer(t, -256, 255) + o9
                return (np.clip(y, -128, 127).astype(np.int8),)
        else:
            t = f * scale.astype(np.float32)
            if pertoken_scale is not None:
                t = t * pertoken_scale[:, None]
        magnitude = float(np.abs(t).max())
        if float_bias is not None:
            t = t + float_bias
            magnitude = max(magnitude, float(np.abs(float_bias).max()))
        return (t, magnitude) if unrounded else (t.astype(dtype),)


def quant_batch_mat_mul(
    x1,
    x2,
    scale,
    offset=None,
    bias=None,
    pertoken_scale=None,
    *,
    dtype=1,
    transpose_x1=0,
    transpose_x2=0,
    unrounded=False,
):
    """QuantBatchMatMul, default domain: bias before pertoken_scale, graph-engine dtype codes."""
    if dtype not in GRAPH_ENGINE_CODES:
        raise ValueError(
            f"QuantBatchMatMul: dtype: found {dtype}, allowed {sorted(GRAPH_ENGINE_CODES)}"
        )
    return linear_a8w8_quant(
        x1,
        x2,
        scale,
        offset,
        pertoken_scale,
        bias,
        output_dtype=GRAPH_ENGINE_CODES[dtype],
        transpose_x1=transpose_x1,
        transpose_x2=transpose_x2,
        unrounded=unrounded,
    )


def npu_trans_quant_param(scale, offset=None, *, round_mode=0):
    """npu NPUTransQuantParam version 1: `trans_quant_param` as a node, returns (int64,)."""
    return (trans_quant_param(scale, offset, round_mode),)
