"""QOrderedLongformerAttention: the worked example, a recorded one, problems of any size."""

import itertools
import math
from pathlib import Path

import numpy as np

OP = "QOrderedLongformerAttention"
ROW, COL32, COL4_4R2_8C, COL32_2R_4R4 = 1, 2, 3, 4
AT_RUN_TIME = ("input", "mask", "global")
SCALES = (
    "scale_input",
    "scale_weight",
    "scale_qkv_gemm",
    "scale_global_weight",
    "scale_global_gemm",
    "scale_output",
)
WEIGHTS = ("weight", "bias", "global_weight", "global_bias", "scale_bias", *SCALES)


def f32(*values):
    return np.array(values, np.float32)


# The specification's worked example; weights as the bytes that it prints.
EXAMPLE = {
    "input": np.array([[[8, -4], [2, 6], [-6, 3], [5, 5]]], np.int8),
    "scale_input": f32(0.125),
    "weight": np.array([10, 5, -3, 8, 4, -6, 7, 2, 20, -9, -12, 16], np.int8).reshape(2, 6),
    "scale_weight": f32(0.0625),
    "bias": f32(0.5, 0, 0, -0.5, 1, 0),
    "scale_bias": f32(np.nan),
    "scale_qkv_gemm": f32(0.125),
    "mask": np.array([[0, 0, 0, -10000]], np.float16),
    "global_weight": np.array([-7, 3, 4, 9, 6, 5, -2, 12, 11, -14, 30, 8], np.int8).reshape(2, 6),
    "scale_global_weight": f32(0.0625),
    "global_bias": f32(0, 0, 1, 0, 0, -2),
    "scale_global_gemm": f32(0.125),
    "global": np.array([[1, 0, 0, 0]], np.int32),
    "scale_output": f32(0.03125),
}
EXAMPLE_ATTRS = {"num_heads": 1, "window": 1, "order_input": ROW, "order_output": ROW}
EXAMPLE_OUTPUT = [[[-4, 3], [14, -3], [7, 3], [0, 0]]]

RECORDED_ATTRS = {"num_heads": 2, "window": 32, "order_input": ROW, "order_output": ROW}


def recorded():
    """Inputs, and the int8 [128, 32] that ONNX Runtime's GPU kernel made of them. It keeps scores
    in float16: 4000 of its 4096 values agree.
    """
    stream = _minstd_rand0_int8(666)

    def take(*shape):
        return np.array(list(itertools.islice(stream, math.prod(shape))), np.int8).reshape(shape)

    x = take(1, 128, 32)
    inputs = {
        "input": x,
        "weight": take(32, 96),
        "bias": take(96) / f32(2048),
        "global_weight": take(32, 96),
        "global_bias": take(96) / f32(2048),
        "scale_input": f32(1 / 32),
        "scale_weight": f32(1 / 64),
        "scale_bias": f32(1 / 8),
        "scale_qkv_gemm": f32(1 / 4),
        "scale_global_weight": f32(1 / 64),
        "scale_global_gemm": f32(1 / 4),
        "scale_output": f32(1 / 8),
        "mask": np.ones((1, 128), np.float16),
        "global": (np.arange(128) < 16)[None].astype(np.int32),
    }
    x.reshape(-1)[120:128] = 0
    inputs["mask"][:, 120:] = 0
    file = Path(__file__).parent / "data" / "qordered_longformer_128x32.txt"
    return inputs, np.loadtxt(file, dtype=np.int64)


def _minstd_rand0_int8(seed):
    """Uniform int8 in -128..126 as libstdc++ draws them from std::minstd_rand0."""
    state, scaling = seed, 2147483645 // 255
    while True:
        state = state * 16807 % 2147483647
        if state - 1 < 255 * scaling:
            yield (state - 1) // scaling - 128


def weights(seed, hidden, per_column=None, scalar_shape=()):
    """Operands other than input, mask, global; ``per_column`` is the length of scale_weight."""
    rng = np.random.default_rng(seed)

    def matrix():
        return rng.integers(-128, 128, (hidden, 3 * hidden), np.int8)

    def column_scale(at):
        shape = scalar_shape if per_column is None else (per_column,)
        return (np.exp2(rng.uniform(-0.5, 0.5, shape)) * at).astype(np.float32)

    scale = np.float32(40 / (74 * 74 * math.sqrt(hidden)))  # int8 projections of deviation 40
    return {
        "weight": matrix(),
        "global_weight": matrix(),
        "bias": rng.normal(0, 3, 3 * hidden).astype(np.float32),
        "global_bias": rng.normal(0, 3, 3 * hidden).astype(np.float32),
        "scale_input": np.full(scalar_shape, 0.03, np.float32),
        "scale_weight": column_scale(scale),
        "scale_global_weight": column_scale(scale * 1.3),
        "scale_bias": np.full(scalar_shape, -1, np.float32),
        "scale_qkv_gemm": np.full(scalar_shape, 0.03, np.float32),
        "scale_global_gemm": np.full(scalar_shape, 0.04, np.float32),
        "scale_output": np.full(scalar_shape, 0.02, np.float32),
    }


def flags(rng, batch, seq, counts):
    """counts[b] global tokens in batch entry b, anywhere; any non-zero value is a flag."""
    found = np.zeros((batch, seq), np.int32)
    for b in range(batch):
        count = min(counts[b % len(counts)], seq)
        found[b, rng.permutation(seq)[:count]] = rng.choice([1, -1, 7], count)
    return found


def data(seed, batch, seq, hidden, counts, padding=0.2):
    rng = np.random.default_rng(seed)
    return {
        "input": rng.integers(-128, 128, (batch, seq, hidden), np.int8),
        "mask": np.where(rng.random((batch, seq)) < padding, -10000, 0).astype(np.float16),
        "global": flags(rng, batch, seq, counts),
    }


def attributes(num_heads, window, orders):
    return {
        "num_heads": num_heads,
        "window": window,
        "order_input": orders[0],
        "order_weight": orders[1],
        "order_global_weight": orders[2],
        "order_output": orders[0],
    }
