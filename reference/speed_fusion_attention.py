"""mindspore SpeedFusionAttention in NumPy: attention with position bias, masks and dropout.

    attention_out = dropout(softmax(mask(scale * q @ k^T with pse)), keep_prob) @ v

Scores, softmax and value sum in float64, one rounding per output. Letters: B batch or sequences, S1
S2 query and key length, T1 T2 packed tokens, N1 N2 query and key/value heads, G = N1 / N2, D head
size; i j rows and columns inside their own sequence.
"""

from __future__ import annotations

import numpy as np

from .numerics import FLT_MAX, cast, masked_softmax, random_words, row_blocks

# Tokens beyond this act alike (lengths end at 2^19); clipping keeps i - pre_tokens in int64.
_FAR = 1 << 40


def _to_bnsd(x, layout, head_size):
    """BSH, SBH, BNSD, BSND to [B, N, S, D]; a view."""
    if layout in ("BSH", "SBH"):
        x = x.reshape(*x.shape[:2], -1, head_size)
    axes = {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BNSD": (0, 1, 2, 3)}
    return x.transpose(axes[layout])


def _from_bnsd(x, layout):
    """[B, N, S, D] to the layout of query."""
    b, n, s, d = x.shape
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return x.transpose(2, 0, 1, 3).reshape(s, b, n * d)
    x = x.transpose(0, 2, 1, 3)
    return x.reshape(b, s, n * d) if layout == "BSH" else x


def _sequences(query, key, value, layout, head_num, qlen, kvlen):
    """Per batch entry or packed sequence: q [N1, S1, D], k and v [N2, S2, D], float64."""
    if layout == "TND":
        triples = []
        q0 = k0 = 0
        for q1, k1 in zip(np.asarray(qlen).tolist(), np.asarray(kvlen).tolist()):
            triples.append((query[q0:q1], key[k0:k1], value[k0:k1]))
            q0, k0 = q1, k1
        triples = [[x.transpose(1, 0, 2) for x in triple] for triple in triples]
    else:
        d = query.shape[-1] // head_num if layout in ("BSH", "SBH") else query.shape[-1]
        triples = zip(*(_to_bnsd(x, layout, d) for x in (query, key, value)))
    return [tuple(x.astype(np.float64) for x in triple) for triple in triples]


def _allowed(mask, mode, b, n, i, s1, s2, pre, next_, prefix):
    """Pairs that are kept, bool broadcastable to [R, S2], for the query rows i [R, 1]."""
    if mask is None:
        return np.True_
    j = np.arange(s2)[None, :]
    shift = s2 - s1
    if mode == 2:
        return j <= i
    if mode == 3:
        return j <= i + shift
    if mode == 4:
        return (j >= i + shift - pre) & (j <= i + shift + next_)
    if mask.ndim == 4:
        mask = mask[b if mask.shape[0] > 1 else 0, n if mask.shape[1] > 1 else 0]
    kept = mask[i[:, 0]] == 0
    if mode == 0:
        return kept & (j >= i - pre) & (j <= i + next_)
    if mode == 1:
        return kept
    return kept & ((j <= i + shift) | (j < prefix[b]))


def _packed_pse(plane, packed_tokens, i, s1, s2):
    """Bias [R, S2] from a [1024, W] plane: the last 1024 rows of a bias of i - j; 0 outside."""
    j = np.arange(s2)[None, :]
    width = plane.shape[-1]
    if packed_tokens:
        t = (i - j) - (width - 1024)
        row, column = np.maximum(t, 0), np.maximum(-t, 0)
    else:
        tail = i >= s1 - 1024
        row = np.where(tail, i - (s1 - 1024), i % 1024)
        column = np.where(tail, j, s2 - (i - j) - (1024 - i % 1024))
    row, column = np.broadcast_arrays(row, column)
    inside = (row < 1024) & (column >= 0) & (column < width)
    return np.where(inside, plane[np.where(inside, row, 0), np.where(inside, column, 0)], 0.0)


def _biased(qk, scale, pse, pse_type, layout, b, n, i, s1, s2, start):
    """Scores x [R, S2] of the query rows i [R, 1] from the raw products qk."""
    if pse is None:
        return qk * scale
    if pse_type in (2, 3):
        slope = np.float64(pse[b, n] if pse.ndim == 2 else pse[n])
        distance = np.abs(np.arange(s2)[None, :] - i + start).astype(np.float64)
        return qk * scale - slope * (np.sqrt(distance) if pse_type == 3 else distance)
    plane = pse[b if pse.shape[0] > 1 else 0, n].astype(np.float64)
    if layout == "TND":
        plane = _packed_pse(plane, True, i, s1, s2)
    elif plane.shape[0] == s1:
        plane = plane[i[:, 0]]
    elif plane.shape[0] != 1:
        plane = _packed_pse(plane, False, i, s1, s2)
    return (qk + plane) * scale if pse_type == 1 else qk * scale + plane


def _kept_by_dropout(first, i, s2, keep_prob, seed, offset):
    """Decisions [R, S2] of rows i [R, 1] of the head whose pair (0, 0) has index `first`."""
    e = first + i.astype(np.int64) * s2 + np.arange(s2)[None, :]
    threshold = int(float(keep_prob) * 2.0**32)
    return random_words(e, seed, offset).astype(np.uint64) < np.uint64(threshold)


def _integer(x):
    """A seed, an offset or a one-element start, attribute or tensor; absent is 0."""
    return 0 if x is None else int(np.asarray(x).reshape(-1)[0])


def speed_fusion_attention(
    query,
    key,
    value,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    q_start_idx=None,
    kv_start_idx=None,
    seed=None,
    offset=None,
    *,
    head_num,
    input_layout,
    scale=1.0,
    keep_prob=1.0,
    pre_tokens=2147483647,
    next_tokens=2147483647,
    inner_precise=0,
    sparse_mode=0,
    pse_type=1,
    gen_mask_parallel=1,
    sync=0,
    softmax_layout="",
    unrounded=False,
):
    """Fused attention, version 1 of the node; valid arguments are assumed.

    query, key, value float16, bfloat16 or float32 in input_layout (BSH, SBH, BNSD, BSND, TND);
    prefix to offset are integer tensors, or the node's attributes of the same names; atten_mask
    non-zero drops a pair.

    Returns (attention_out as query, softmax_max, softmax_sum float32 (B, N1, S1, 8) or (T1, N1, 8),
    softmax_out (0,), seed, offset, numels int64 ()). With `unrounded` the first three stay float64.
    """
    if input_layout not in ("BSH", "SBH", "BNSD", "BSND", "TND"):
        raise ValueError(f"SpeedFusionAttention: input_layout: found {input_layout!r}")
    if sparse_mode not in range(6):
        raise NotImplementedError(f"SpeedFusionAttention: sparse_mode {sparse_mode}: not enabled")
    scale, keep_prob = np.float64(np.float32(scale)), np.float64(np.float32(keep_prob))
    pre, next_ = (min(max(int(t), -_FAR), _FAR) for t in (pre_tokens, next_tokens))
    start = _integer(kv_start_idx) - _integer(q_start_idx)
    seed, offset = _integer(seed), _integer(offset)
    sequences = _sequences(
        query, key, value, input_layout, head_num, actual_seq_qlen, actual_seq_kvlen
    )

    outs, maxima, sums = [], [], []
    numels = 0  # pairs before this sequence: where its dropout decisions begin
    for b, (q, k, v) in enumerate(sequences):
        n1, s1, d = q.shape
        s2 = k.shape[1]
        out = np.zeros((n1, s1, d))
        top, total = np.full((n1, s1), -FLT_MAX), np.full((n1, s1), FLT_MAX)
        for n in range(n1):
            g = n // (n1 // k.shape[0])
            for rows in row_blocks(s1):
                i = np.arange(rows.start, rows.stop)[:, None]
                x = _biased(
                    q[n, rows] @ k[g].T, scale, pse, pse_type, input_layout, b, n, i, s1, s2, start
                )
                allowed = _allowed(atten_mask, sparse_mode, b, n, i, s1, s2, pre, next_, prefix)
                m, w, l = masked_softmax(x, allowed)
                live = l[:, 0] > 0
                top[n, rows] = np.where(live, m[:, 0], -FLT_MAX)
                total[n, rows] = np.where(live, l[:, 0], FLT_MAX)
                if keep_prob < 1:
                    first = numels + n * s1 * s2
                    w = w * _kept_by_dropout(first, i, s2, keep_prob, seed, offset) / keep_prob
                out[n, rows] = w @ v[g] / np.where(l > 0, l, 1.0)
        numels += n1 * s1 * s2
        outs.append(out)
        maxima.append(top)
        sums.append(total)

    if input_layout == "TND":
        attention_out = np.concatenate([out.transpose(1, 0, 2) for out in outs])
        records = [_token_records(part, softmax_layout) for part in (maxima, sums)]
    else:
        attention_out = _from_bnsd(np.stack(outs), input_layout)
        records = [np.stack(part) for part in (maxima, sums)]
    softmax_max, softmax_sum = (np.repeat(r[..., None], 8, axis=-1) for r in records)
    if not unrounded:
        attention_out = cast(attention_out, query.dtype)
        softmax_max, softmax_sum = softmax_max.astype(np.float32), softmax_sum.astype(np.float32)
    return (
        attention_out,
        softmax_max,
        softmax_sum,
        np.zeros(0, query.dtype),
        np.array(seed, np.int64),
        np.array(offset, np.int64),
        np.array(numels, np.int64),
    )


def _token_records(parts, softmax_layout):
    """[N1, S1_b] per sequence to [T1, N1]: head-major in each sequence; "TND" token-major."""
    heads = parts[0].shape[0]
    if softmax_layout == "TND":
        return np.concatenate([part.T for part in parts])
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(-1, heads)
