"""Symmetric int8 quantisation: x is about q * scale, the largest magnitude lands on 127."""

import numpy as np


def quantise(x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of x's shape, float32 scales): one scale in all, or one for each index of `axis`."""
    others = None if axis is None else tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    largest = np.abs(x).max(axis=others, keepdims=True)
    scale = (largest / 127).astype(np.float32)
    q = np.rint(x / scale).astype(np.int8)
    return q, scale.reshape(() if axis is None else (-1,))
