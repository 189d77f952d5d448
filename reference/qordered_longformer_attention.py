"""com.microsoft QOrderedLongformerAttention in NumPy.

Two int8 projections (local and global) rounded to int8 and taken as float16, attention of window W
plus global tokens, one float16 rounding, one int8 rounding. Letters: B batch, S sequence, H = N*D
hidden, N heads, D head size, W one-sided window.
"""

from __future__ import annotations

import numpy as np

from .numerics import Order, int_matmul, masked_softmax, pack, row_blocks, saturate, scalar, unpack


def _project(x, weight, order, scale_input, scale_weight, bias, scale_gemm, stage1):
    """Stage 1: logical x int8 [B, S, H] to float16-valued projections, float64 [B, S, 3H]."""
    hidden = x.shape[-1]
    if order == Order.COL:
        w = unpack(weight, Order.COL)
    else:
        w = unpack(weight, order, weight.shape[::-1]).T
    acc = int_matmul(x, w)
    scale_weight = np.asarray(scale_weight, np.float32).reshape(-1)
    if scale_weight.size == hidden:
        scale_weight = np.tile(scale_weight, 3)
    scale_gemm = scalar(scale_gemm)
    alpha = scalar(scale_input) * scale_weight / scale_gemm
    if stage1 == "float32":
        v = acc.astype(np.float32) * alpha + bias
    else:
        v = acc * alpha.astype(np.float64) + bias
    if stage1 == "fused":
        v = v.astype(np.float32)
    quantized = saturate(v)
    return (scale_gemm * quantized.astype(np.float32)).astype(np.float16).astype(np.float64)


def _heads(projection: np.ndarray, num_heads: int) -> np.ndarray:
    """[S, 3H] to Q, K, V stacked: [3, N, S, D]."""
    seq, width = projection.shape
    return projection.reshape(seq, 3, num_heads, width // (3 * num_heads)).transpose(1, 2, 0, 3)


def _attend(q, k, v, mask, allowed):
    """Rows q [R, D], k v [J, D], mask [J], allowed [R, J] to sum p*v and sum p*|v|, [R, D]."""
    x = q @ k.T / np.sqrt(q.shape[-1]) + mask
    _, w, total = masked_softmax(x, allowed)
    p = w / total
    return p @ v, p @ np.abs(v)


def _attention(local, globals_, mask, flags, num_heads, window):
    """Stage 2 of a batch entry: projections [S, 3H], mask, flags [S] to o, sum p*|v|, [S, H]."""
    seq, width = local.shape
    q, k, v = _heads(local, num_heads)
    kept = ~(mask < 0)
    o, size = np.zeros((2, num_heads, seq, width // (3 * num_heads)))
    for rows in row_blocks(seq):
        i = np.arange(rows.start, rows.stop)
        i = i[kept[i] & ~flags[i]]
        if not i.size:
            continue
        near = np.zeros(seq, bool)
        near[max(rows.start - window, 0) : rows.stop + window] = True
        keys = np.flatnonzero(near | flags)
        allowed = (np.abs(i[:, None] - keys) <= window) | flags[keys]
        for h in range(num_heads):
            o[h, i], size[h, i] = _attend(q[h, i], k[h, keys], v[h, keys], mask[keys], allowed)
    i = np.flatnonzero(kept & flags)
    if i.size:
        q, k, v = _heads(globals_, num_heads)
        for h in range(num_heads):
            o[h, i], size[h, i] = _attend(q[h, i], k[h], v[h], mask, True)
    return (part.transpose(1, 0, 2).reshape(seq, -1) for part in (o, size))


def qordered_longformer_attention(
    input,
    scale_input,
    weight,
    scale_weight,
    bias,
    scale_bias,
    scale_qkv_gemm,
    mask,
    global_weight,
    scale_global_weight,
    global_bias,
    scale_global_gemm,
    global_,
    scale_output,
    *,
    num_heads,
    window,
    order_input,
    order_output,
    order_weight=0,
    order_global_weight=0,
    unrounded=False,
    stage1="float64",
):
    """Quantised Longformer self-attention with global tokens at any position.

    input int8 (B,S,H) in order_input; weight, global_weight int8 declared (H,3H); bias, global_bias
    float32 (3H,), already divided by their gemm scale; mask float16 (B,S), added to the scores, a
    negative entry zeroes its row; `global_` (the schema's `global`, a Python keyword) int32 (B,S);
    scale_weight, scale_global_weight float32 one element, (3H,) or (H,); the other scales one
    element; scale_bias is not looked at.

    Returns (output,): int8 (B,S,H) in order_output. With `unrounded` returns (v, slack) in the same
    places: exact o / scale_output, and how far float16 probabilities and output may move it.
    `stage1` chooses how the projections are evaluated before their int8 rounding: "float64" (the
    definition), "float32" or "fused" (float32 with and without rounding of the product).
    """
    scale_output = scalar(scale_output)
    x = unpack(input, order_input)
    flags = global_ != 0
    local = _project(
        x, weight, order_weight, scale_input, scale_weight, bias, scale_qkv_gemm, stage1
    )
    globals_ = local
    if flags.any():
        globals_ = _project(
            x,
            global_weight,
            order_global_weight,
            scale_input,
            scale_global_weight,
            global_bias,
            scale_global_gemm,
            stage1,
        )
    o, size = np.empty((2, *x.shape))
    for b in range(x.shape[0]):
        o[b], size[b] = _attention(
            local[b], globals_[b], mask[b].astype(np.float64), flags[b], num_heads, window
        )
    if unrounded:
        slack = 0.01 + 2.0**-11 * (np.abs(o) + size) / np.float64(scale_output)
        return pack(o / np.float64(scale_output), order_output), pack(slack, order_output)
    inverse = np.float32(1) / scale_output
    y = saturate(o.astype(np.float16).astype(np.float64) * np.float64(inverse))
    return (pack(y, order_output),)
