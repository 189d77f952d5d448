"""npu NPUNsaCompressAttention in NumPy: attention over compressed keys and its top-k blocks.

Per sequence: softmax attention over compressed keys, then block scores as an (r+n-1)-tap stride-r
window over the same probabilities, summed over the heads of a group, then a stable descending
top-k. Letters: T packed query rows, T2 packed compressed rows, N1 N2 heads, G = N1 / N2, r = l'/d,
n = l // d.
"""

from __future__ import annotations

import numpy as np

from .numerics import FLT_MAX, cast, masked_softmax, row_blocks


def _block_scores(p, blocks, r, n, score_shift):
    """Window sums of p [..., C] for the blocks j = 0..blocks-1: [..., blocks].

    score[j] = sum over m < r, n' < n of p[r*(j+1) - m - n' - score_shift], indices outside p
    dropped; the double sum is one over c = m + n' with weight (number of ways to write c).
    """
    scores = np.zeros((*p.shape[:-1], blocks))
    for c, ways in enumerate(np.convolve(np.ones(r), np.ones(n))):
        index = r * (np.arange(blocks) + 1) - c - score_shift
        inside = (index >= 0) & (index < p.shape[-1])
        scores[..., inside] += ways * p[..., index[inside]]
    return scores


def _top_k(scores, k):
    """The k largest of [R, blocks], ties to the lower index, padded with -1: int32 [R, k]."""
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    picked = np.full((scores.shape[0], k), -1, np.int32)
    picked[:, : best.shape[1]] = best
    return picked


def _ends(lengths):
    """Prefix sums as (start, stop) pairs."""
    stops = np.asarray(lengths).tolist()
    return list(zip([0, *stops[:-1]], stops))


def nsa_compress_attention(
    query,
    key,
    value,
    atten_mask=None,
    topk_mask=None,
    actual_seq_qlen=None,
    actual_cmp_seq_kvlen=None,
    actual_sel_seq_kvlen=None,
    *,
    scale_value=1.0,
    head_num,
    input_layout="TND",
    sparse_mode=0,
    compress_block_size,
    compress_stride,
    select_block_size,
    select_block_count,
    softmax_out_layout="",
    score_shift=0,
    masked_rows="mean",
    unrounded=False,
):
    """Compressed attention and block selection, version 1 of the node; valid arguments are assumed.

    query (T, N1, Dqk), key (T2, N2, Dqk), value (T2, N2, Dv) float16, bfloat16 or float32; masks
    bool or uint8 indexed by position inside the sequence; the three length lists are prefix sums,
    tensors or attributes.

    Returns (softmax_max, softmax_sum float32 (T, N1, 8), attention_out (T, N1, Dv) as query,
    topk_indices_out int32 (T, N2, k)). With `unrounded` the first three stay float64 and the last
    is what is selected from: the scores, float64 (T, N2, largest number of blocks), forced blocks
    FLT_MAX, blocks that do not exist -inf.
    """
    if input_layout != "TND" or masked_rows not in ("mean", "zero"):
        raise ValueError(
            f"NPUNsaCompressAttention: input_layout {input_layout!r}, masked_rows {masked_rows!r}"
        )
    tokens, n1, _ = query.shape
    n2, dv = value.shape[1:]
    group = n1 // n2
    r, n = select_block_size // compress_stride, compress_block_size // compress_stride
    scale = np.float64(np.float32(scale_value))
    widest = max(np.diff([0, *np.asarray(actual_sel_seq_kvlen).tolist()]))

    attention_out = np.zeros((tokens, n1, dv))
    indices = np.full((tokens, n2, select_block_count), -1, np.int32)
    all_scores = np.full((tokens, n2, widest), -np.inf)
    maxima, sums = np.zeros((2, tokens * n1))  # records in memory order
    spans = zip(_ends(actual_seq_qlen), _ends(actual_cmp_seq_kvlen), _ends(actual_sel_seq_kvlen))
    for (q0, q1), (k0, k1), (j0, j1) in spans:
        m_seq, l_seq = np.zeros((2, n1, q1 - q0))
        for h2 in range(n2):
            heads = slice(h2 * group, (h2 + 1) * group)
            k, v = key[k0:k1, h2].astype(np.float64), value[k0:k1, h2].astype(np.float64)
            for rows in row_blocks(q1 - q0, max(1, 256 // group)):
                packed = slice(q0 + rows.start, q0 + rows.stop)
                q = query[packed, heads].astype(np.float64).swapaxes(0, 1)  # [G, R, Dqk]
                s = scale * (q @ k.T)  # [G, R, C]
                visible = np.True_
                if atten_mask is not None:
                    visible = atten_mask[rows, : k1 - k0] == 0
                if masked_rows == "mean":
                    # Replaced, not removed: a row without a visible key becomes uniform.
                    s, visible = np.where(visible, s, -FLT_MAX), np.True_
                m, w, l = masked_softmax(s, visible)
                p = w / np.where(l > 0, l, 1.0)
                attention_out[packed, heads] = (p @ v).swapaxes(0, 1)
                m_seq[heads, rows] = np.maximum(m[..., 0], -FLT_MAX)
                l_seq[heads, rows] = l[..., 0]
                scores = _block_scores(p.sum(axis=0), j1 - j0, r, n, score_shift)  # [R, blocks]
                if topk_mask is not None:
                    scores[topk_mask[rows, : j1 - j0] != 0] = FLT_MAX
                indices[packed, h2] = _top_k(scores, select_block_count)
                all_scores[packed, h2, : j1 - j0] = scores
        records = slice(q0 * n1, q1 * n1)
        token_major = softmax_out_layout == "same_as_input"
        maxima[records] = (m_seq.T if token_major else m_seq).reshape(-1)
        sums[records] = (l_seq.T if token_major else l_seq).reshape(-1)

    softmax_max, softmax_sum = (
        np.repeat(part.reshape(tokens, n1, 1), 8, axis=-1) for part in (maxima, sums)
    )
    if unrounded:
        return softmax_max, softmax_sum, attention_out, all_scores
    return (
        softmax_max.astype(np.float32),
        softmax_sum.astype(np.float32),
        cast(attention_out, query.dtype),
        indices,
    )
