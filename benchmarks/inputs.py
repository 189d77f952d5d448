"""Arrays of a problem, the same for us and for every peer."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from .shapes import Attention, Encoder, Longformer, Matmul, Nsa, Problem

DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
}


@functools.lru_cache(maxsize=8)
def inputs(problem: Problem, seed: int = 0) -> SimpleNamespace:
    """Arrays by name; `seed` gives other values of the same problem."""
    return _MAKERS[type(problem)](problem, np.random.default_rng(seed))


def _int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-127, 128, shape, dtype=np.int8)


def _matmul(p: Matmul, rng: np.random.Generator) -> SimpleNamespace:
    """Y = (A @ W.T + int_bias) * scale * token + float_bias + beta * C, rounded to `out`.

    A int8 [M, K]; W int8 [N, K]; scale float32 [N], its last 13 bits zero, as one output type
    keeps no more; token float32 [M]; int_bias int32 [N] or float_bias float32 [N].
    """
    # Products of two uniform int8 values have a deviation of about 5400; outputs spread by 40.
    scale = rng.uniform(0.5, 1.5, p.N) * 40 / (5400 * np.sqrt(p.K))
    scale = (scale.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    whole = p.op == "NPUQuantMatmul" and p.out == "int8"  # its bias goes into the sum
    bias = rng.normal(0, 5, p.N)
    return SimpleNamespace(
        A=_int8(rng, p.M, p.K),
        W=_int8(rng, p.N, p.K),
        scale=scale,
        token=rng.uniform(0.5, 1.5, p.M).astype(np.float32) if p.per_token else None,
        int_bias=np.rint(bias / scale).astype(np.int32) if whole else None,
        # Tiled orders have none.
        float_bias=None if whole or p.out == "int32" or p.tiled else bias.astype(np.float32),
        C=_int8(rng, p.M, p.N) if p.residual else None,
        beta=np.float32(0.25),
    )


def output_bias(p: Matmul, seed: int = 0) -> np.ndarray:
    """The bias float32 [N] in units of the output, wherever the operator adds it."""
    a = inputs(p, seed)
    if a.int_bias is not None:
        return (a.int_bias * a.scale).astype(np.float32)
    return np.zeros(p.N, np.float32) if a.float_bias is None else a.float_bias


def _attention(p: Attention, rng: np.random.Generator) -> SimpleNamespace:
    """q [B, N1, S1, D]; k, v [B, N2, S2, D]; dropped bool [1, 1, S1, S2]; pse [1, N1, S1, S2].

    dropped: of a dense mask at random, of a prefix what the prefix leaves.
    """
    dtype = DTYPES[p.dtype]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    dropped = None
    if p.mask == "bool":
        dropped = rng.random((1, 1, p.S1, p.S2), np.float32) < 0.1
    elif p.mask == "prefix":
        dropped = ~kept(p, np.arange(p.S1))[None, None]
    return SimpleNamespace(
        q=normal(p.B, p.N1, p.S1, p.D),
        k=normal(p.B, p.N2, p.S2, p.D),
        v=normal(p.B, p.N2, p.S2, p.D),
        dropped=dropped,
        pse=normal(1, p.N1, p.S1, p.S2) if p.mask == "pse" else None,
    )


def kept(p: Attention, rows: np.ndarray) -> np.ndarray:
    """Pairs of the query rows `rows` and all keys that the mask keeps, bool [len(rows), S2]."""
    before, after = p.window
    i, j = rows[:, None], np.arange(p.S2)[None, :]
    keep = np.ones((len(rows), p.S2), bool)
    if before is not None:
        keep &= j >= i - before
    if after is not None:
        keep &= j <= i + after
    keep |= j < p.prefix
    if p.lengths:
        ends = np.cumsum(p.lengths)
        keep &= np.searchsorted(ends, i, "right") == np.searchsorted(ends, j, "right")
    if p.mask == "bool":
        keep &= ~inputs(p).dropped[0, 0, rows]
    return keep


def _longformer(p: Longformer, rng: np.random.Generator) -> SimpleNamespace:
    """x int8 [1, S, H]; weight and global_weight int8 [3H, H] (out, in); biases float32 [3H].

    Scales are such that projections fill the int8 range and scores have a deviation of about 1.
    """
    H = p.hidden
    scale_x, scale_w, scale_projection = np.float32(0.02), np.float32(0.0005), np.float32(0.025)
    flags = np.zeros((1, p.S), np.int32)
    flags[:, : p.G] = 1
    return SimpleNamespace(
        x=_int8(rng, 1, p.S, H),
        weight=_int8(rng, 3 * H, H),
        global_weight=_int8(rng, 3 * H, H),
        bias=rng.normal(0, 0.1, 3 * H).astype(np.float32),
        global_bias=rng.normal(0, 0.1, 3 * H).astype(np.float32),
        mask=np.zeros((1, p.S), np.float16),
        flags=flags,
        scale_x=scale_x,
        scale_w=scale_w,
        scale_projection=scale_projection,
        scale_output=np.float32(0.01),
    )


def _nsa(p: Nsa, rng: np.random.Generator) -> SimpleNamespace:
    """q [S, N1, D], k [C, N2, D], v [C, N2, Dv]; hidden bool [S, C]; forced bool [S, blocks].

    Compressed key c ends at token c * d + l - 1 and is hidden from earlier queries. The first
    block, a query's own and the one before are always selected.
    """
    dtype = DTYPES[p.dtype]
    t = np.arange(p.S)[:, None]
    ends = np.arange(p.compressed) * p.d + p.l - 1
    blocks = np.arange(p.blocks)
    own = t // p.block

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    return SimpleNamespace(
        q=normal(p.S, p.N1, p.D),
        k=normal(p.compressed, p.N2, p.D),
        v=normal(p.compressed, p.N2, p.Dv),
        hidden=ends > t,
        forced=(blocks == 0) | (blocks == own) | (blocks == own - 1),
    )


def _encoder(p: Encoder, rng: np.random.Generator) -> SimpleNamespace:
    """int64 [B, S]: ids of ordinary words of the vocabulary, no padding."""
    return SimpleNamespace(
        input_ids=rng.integers(2000, 29000, (p.B, p.S), dtype=np.int64),
        attention_mask=np.ones((p.B, p.S), np.int64),
        token_type_ids=np.zeros((p.B, p.S), np.int64),
    )


_MAKERS = {
    Matmul: _matmul,
    Attention: _attention,
    Longformer: _longformer,
    Nsa: _nsa,
    Encoder: _encoder,
}
