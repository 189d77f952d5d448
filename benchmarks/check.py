"""Judges a result before its time is taken, on some rows, against NumPy in float64.

Ours has to meet the operators' tolerances; a peer, whose result rounds elsewhere, a multiple.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .inputs import inputs, kept
from .shapes import Attention, Encoder, Longformer, Matmul, Nsa, Problem

PEER_SLACK = 3.0
"""Factor on the tolerances for peers; their integers may differ by one."""

_ATTENTION = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}  # absolute and relative
_NSA = {"fp32": 3e-5, "fp16": 1e-3, "bf16": 8e-3}
_FLOAT_OUT = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # of the larger of 1 and the value
_COSINE, _PEER_COSINE = 0.98, 0.80  # peers: static quantisation without smoothing is rougher
_FEW = 6


class Mismatch(AssertionError):
    """A result that is not what the problem asks for."""


def check(problem: Problem, got, slack: float = 1.0) -> None:
    """Raise `Mismatch` unless the result is right.

    got: Matmul [M, N]; Attention [B, N1, S1, D]; Longformer [1, S, H] in units of the output, not
    yet rounded to int8 where the library has none; Nsa (attention [S, N1, Dv], blocks
    [S, N2, k] or None); Encoder [B, H].
    """
    _CHECKS[type(problem)](problem, got, slack)


def _rows(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, _FEW).astype(int))


def _close(got, want: np.ndarray, absolute: float, relative: float) -> None:
    got = np.asarray(got, np.float64)
    if got.shape != want.shape:
        raise Mismatch(f"found shape {got.shape}, expected {want.shape}")
    excess = np.abs(got - want) - (absolute + relative * np.abs(want))
    worst = float(np.max(np.where(np.isnan(excess), np.inf, excess)))
    if worst > 0:
        raise Mismatch(f"off by {worst:.3g} more than allowed ({absolute:.3g})")


def _matmul(p: Matmul, got, slack: float) -> None:
    a, rows = inputs(p), _rows(p.M)
    total = a.A[rows].astype(np.float64) @ a.W.T.astype(np.float64)
    if a.int_bias is not None:
        total += a.int_bias
    if p.out == "int32":
        _close(got[rows], total, 0, 0)
        return
    want = total * a.scale
    if p.per_token:
        want *= a.token[rows, None]
    if a.float_bias is not None:
        want += a.float_bias
    if p.residual:
        want += np.float64(a.beta) * a.C[rows]
    if p.out == "int8":
        # Half a step for the rounding; a peer rounds where it likes and may be off by one.
        _close(got[rows], np.clip(want, -128, 127), 0.5 + (1e-3 if slack == 1 else 1.0), 0)
    else:
        relative = _FLOAT_OUT[p.out] * slack
        _close(got[rows], want, relative, relative)


def _attention(p: Attention, got, slack: float) -> None:
    a, rows = inputs(p), _rows(p.S1)
    keep = kept(p, rows)
    want = []
    for b, n in {(0, 0), (p.B - 1, p.N1 - 1)}:
        g = n // (p.N1 // p.N2)
        k, v = a.k[b, g].astype(np.float64), a.v[b, g].astype(np.float64)
        x = a.q[b, n, rows].astype(np.float64) @ k.T / math.sqrt(p.D)
        if p.mask == "pse":
            x += a.pse[0, n, rows].astype(np.float64)
        x = np.where(keep, x, -np.inf)
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        want.append(((b, n), e / e.sum(axis=-1, keepdims=True) @ v))
    tolerance = _ATTENTION[p.dtype] * slack
    for (b, n), rows_of_head in want:
        _close(np.asarray(got)[b, n, rows], rows_of_head, tolerance, tolerance)


def _longformer(p: Longformer, got, slack: float) -> None:
    """int8 against the operator's reference, floats against the layer without quantisation."""
    got = np.asarray(got)
    want = _quantised_layer(p) if got.dtype == np.int8 else _float_layer(p)
    # int8 results differ next to a tie; bfloat16 carries 8 bits through two products.
    _close(got[0, _rows(p.S)], want, 1.0 if got.dtype == np.int8 else 2.0 * slack, 0.02 * slack)


def _projected(p: Longformer, rounded: bool, weight: np.ndarray, bias: np.ndarray) -> list:
    """Query, key, value [S, heads, D] of one projection in real units."""
    a = inputs(p)
    alpha = np.float64(a.scale_x) * np.float64(a.scale_w) / np.float64(a.scale_projection)
    y = alpha * (a.x[0].astype(np.float64) @ weight.T.astype(np.float64)) + bias
    if rounded:
        y = np.clip(np.rint(y), -128, 127)
    y *= np.float64(a.scale_projection)
    return [part.reshape(p.S, p.heads, -1) for part in np.split(y, 3, axis=-1)]


def _layer(p: Longformer, rounded: bool) -> np.ndarray:
    """Rows `_rows(S)` of the output [few, H], divided by its scale."""
    a = inputs(p)
    q, k, v = _projected(p, rounded, a.weight, a.bias)
    gq, gk, gv = _projected(p, rounded, a.global_weight, a.global_bias)
    j = np.arange(p.S)
    out = []
    for i in _rows(p.S):
        everywhere = i < p.G
        query, keys, values = (gq, gk, gv) if everywhere else (q, k, v)
        J = j if everywhere else j[(np.abs(j - i) <= p.W) | (j < p.G)]
        x = np.einsum("nd,jnd->nj", query[i], keys[J]) / math.sqrt(p.hidden // p.heads)
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        out.append(np.einsum("nj,jnd->nd", e / e.sum(axis=-1, keepdims=True), values[J]).ravel())
    return np.stack(out) / np.float64(a.scale_output)


@functools.lru_cache(maxsize=2)
def _float_layer(p: Longformer) -> np.ndarray:
    return _layer(p, rounded=False)


@functools.lru_cache(maxsize=2)
def _quantised_layer(p: Longformer) -> np.ndarray:
    return np.clip(np.rint(_layer(p, rounded=True)), -128, 127)


def _nsa(p: Nsa, got, slack: float) -> None:
    out, picked = got
    # Early rows have fewer visible blocks than k, and select the rest among equal scores.
    rows = p.block * (p.k + 1) + _rows(p.S - p.block * (p.k + 1))
    want, scores = _nsa_rows(p, tuple(rows))
    tolerance = _NSA[p.dtype] * slack
    _close(
        np.asarray(out)[rows],
        want,
        tolerance * float(np.abs(inputs(p).v.astype(np.float32)).max()),
        tolerance,
    )
    if picked is None:
        return
    least = np.sort(scores, axis=-1)[..., -p.k]
    of_picked = np.take_along_axis(scores, picked[rows].astype(np.int64), axis=-1)
    if slack == 1:
        near = of_picked >= least[..., None] * (1 - 1e-3)
        if not near.all() or any(len(set(row)) < p.k for row in picked[rows].reshape(-1, p.k)):
            raise Mismatch(f"{int((~near).sum())} selected blocks have too small a score")
    elif (of_picked >= least[..., None]).mean() < 0.95:
        raise Mismatch("more than 5 % of the selected blocks are others")


@functools.lru_cache(maxsize=2)
def _nsa_rows(p: Nsa, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    from opferry.reference.nsa_compress_attention import nsa_compress_attention

    a, rows = inputs(p), list(rows)
    _, _, out, scores = nsa_compress_attention(
        a.q[rows],
        a.k,
        a.v,
        a.hidden[rows],
        a.forced[rows],
        [len(rows)],
        [p.compressed],
        [p.blocks],
        scale_value=p.D**-0.5,
        head_num=p.N1,
        compress_block_size=p.l,
        compress_stride=p.d,
        select_block_size=p.block,
        select_block_count=p.k,
        unrounded=True,
    )
    return out, scores


def _encoder(p: Encoder, got, slack: float) -> None:
    from .encoder import embeddings

    want, got = embeddings(p), np.asarray(got, np.float64)
    if got.shape != want.shape:
        raise Mismatch(f"found shape {got.shape}, expected {want.shape}")
    cosine = (got * want).sum(axis=-1) / np.linalg.norm(got, axis=-1)
    if not cosine.min() >= (_COSINE if slack == 1 else _PEER_COSINE):
        raise Mismatch(f"cosine to the float32 model is {cosine.min():.4f}")


_CHECKS = {
    Matmul: _matmul,
    Attention: _attention,
    Longformer: _longformer,
    Nsa: _nsa,
    Encoder: _encoder,
}
