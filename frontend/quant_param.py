"""Packed scales: what npu::NPUQuantMatmul takes as an int64 scale and NPUTransQuantParam makes."""

import numpy as np

from ..runtime.errors import InvalidNodeError, InvalidTypeError, message


def npu_trans_quant_param(
    scale: np.ndarray, offset: np.ndarray | None = None, round_mode: int = 0
) -> np.ndarray:
    """Pack float32 scales and offsets into 64-bit quantisation parameters.

    Bits 31..13 hold the upper 19 bits of the scale, bits 45..37 the offset, rounded to even and
    clipped to -256..255, in two's complement; bit 46 is set, all others are zero.

    Args:
        scale: float32, (t,) or (1, n), finite.
        offset: float32, (t,) or (1, n), finite; lengths 1 and n broadcast.
        round_mode: 0 truncates the scale's mantissa to 10 bits; 1 rounds it to nearest even, with
            a carry into the exponent, and turns subnormals into a signed zero.

    Returns:
        int64, (longer of the two,).

    Raises:
        InvalidTypeError: not float32 arrays, or round_mode not an int.
        InvalidNodeError: a shape, a pair of lengths or a round_mode that is not allowed.
    """
    label = "npu_trans_quant_param"
    if not isinstance(round_mode, int):
        raise InvalidTypeError(message(label, "round_mode", repr(round_mode), "an int"))
    if round_mode not in (0, 1):
        raise InvalidNodeError(message(label, "round_mode", round_mode, "0 or 1"))
    bits = _float32_vector(label, "scale", scale).view(np.uint32)
    if round_mode == 1:
        exponent = bits & np.uint32(0x7F800000)
        rounded = bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        rounded = np.where(exponent == 0x7F800000, bits, rounded)
        bits = np.where(exponent == 0, bits & np.uint32(0x80000000), rounded)
    packed = (bits & np.uint32(0xFFFFE000)).astype(np.int64) | np.int64(1 << 46)
    if offset is None:
        return packed
    offset = _float32_vector(label, "offset", offset)
    if len(packed) != len(offset) and 1 not in (len(packed), len(offset)):
        raise InvalidNodeError(
            message(label, "offset", f"length {len(offset)}", f"length 1 or {len(packed)}")
        )
    nine_bits = np.clip(np.rint(offset), -256, 255).astype(np.int64) & 0x1FF
    return packed | (nine_bits << 37)


def _float32_vector(label: str, subject: str, value: object) -> np.ndarray:
    """`value` (t,) or (1, n) as a contiguous float32 vector."""
    array = np.asarray(value)
    if array.dtype != np.float32:
        raise InvalidTypeError(message(label, subject, array.dtype, "float32"))
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] != 1) or array.size == 0:
        raise InvalidNodeError(message(label, subject, f"shape {array.shape}", "(t,) or (1, n)"))
    return np.ascontiguousarray(array.reshape(-1))
