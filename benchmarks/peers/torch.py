"""PyTorch on the CPU: oneDNN for int8, its own kernels for attention."""

from __future__ import annotations

import math
from functools import partial

import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

from .. import THREADS
from ..candidate import Candidate
from ..inputs import inputs, kept, output_bias
from ..shapes import Attention, Longformer, Matmul, Nsa, Problem

torch.set_num_threads(THREADS)

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
}
_ZERO = 128  # zero point of unsigned activations


def candidates(problem: Problem, seed: int = 0) -> dict:
    if isinstance(problem, Matmul):
        builders = _matmul(problem, seed)
    elif isinstance(problem, Attention):
        builders = {"scaled_dot_product_attention": partial(_attention, problem, seed)}
    elif isinstance(problem, Longformer):
        builders = {
            f"dense band {dtype}": partial(_dense_band, problem, dtype)
            for dtype in ("fp32", "bf16")
        }
    elif isinstance(problem, Nsa):
        builders = {
            f"{problem.dtype}, {rows} rows a step": partial(_nsa, problem, rows)
            for rows in ((64, 1024) if problem.S <= 4096 else (64,))
        }
    else:
        builders = {}
    return {f"torch {name}": partial(_candidate, name, b) for name, b in builders.items()}


def _candidate(name: str, builder) -> Candidate:
    """`builder` returns the function to time and what makes NumPy of its result."""
    with torch.no_grad():
        work, finish = builder()

    def call():
        with torch.inference_mode():
            return work()

    return Candidate(f"torch {name}", call, lambda: finish(call()))


def tensor(x: np.ndarray) -> torch.Tensor:
    """A tensor of the same memory; NumPy's bfloat16 is none that torch knows."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _matmul(p: Matmul, seed: int) -> dict:
    if p.residual:
        return {}
    if p.out == "int32":
        return {"_int_mm": partial(_int_mm, p, seed)}
    if p.out == "int8":
        found = {
            f"quantized.linear[{engine}]": partial(_quantized_linear, p, seed, engine)
            for engine in ("onednn", "x86", "fbgemm")
        }
        return found | {"onednn.qlinear": partial(_onednn_linear, p, seed)}
    return {
        "_int_mm + epilogue": partial(_int_mm, p, seed),
        "onednn.qlinear + epilogue": partial(_onednn_linear, p, seed),
    }


def _int_mm(p: Matmul, seed: int):
    """The only one that takes signed activations."""
    a = inputs(p, seed)
    x, weight = tensor(a.A), tensor(a.W).t()
    if p.out == "int32":
        out = torch.empty((p.M, p.N), dtype=torch.int32)
        return lambda: torch._int_mm(x, weight, out=out), array
    scale, token, bias = tensor(a.scale), tensor(a.token[:, None]), tensor(a.float_bias)
    dtype = _DTYPES[p.out]
    return lambda: (torch._int_mm(x, weight) * scale * token + bias).to(dtype), array


def _unsigned(a: np.ndarray) -> torch.Tensor:
    return tensor((a.astype(np.int16) + _ZERO).astype(np.uint8))


def _onednn_linear(p: Matmul, seed: int):
    """int8 in one operator; for floats the scale per column inside, the rest as torch operators."""
    a = inputs(p, seed)
    x, scale = _unsigned(a.A), tensor(a.scale)
    weight = torch.ops.onednn.qlinear_prepack(tensor(a.W), [p.M, p.K])
    zeros = torch.zeros(p.N, dtype=torch.int32)
    linear = partial(torch.ops.onednn.qlinear_pointwise, x, 1.0, _ZERO, weight, scale, zeros)
    if p.out == "int8":
        bias = tensor(output_bias(p, seed))
        return (
            lambda: linear(bias, 1.0, _ZERO, torch.uint8, "none", [], ""),
            lambda y: y.numpy().astype(np.int16) - _ZERO,
        )
    token, bias, dtype = tensor(a.token[:, None]), tensor(a.float_bias), _DTYPES[p.out]

    def work():
        y = linear(None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(token).add_(bias).to(dtype)

    return work, array


def _quantized_linear(p: Matmul, seed: int, engine: str):
    a = inputs(p, seed)
    x = torch._make_per_tensor_quantized_tensor(_unsigned(a.A), 1.0, _ZERO)
    weight = torch._make_per_channel_quantized_tensor(
        tensor(a.W), tensor(a.scale.astype(np.float64)), torch.zeros(p.N, dtype=torch.long), 0
    )
    chosen = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        packed = torch.ops.quantized.linear_prepack(weight, tensor(output_bias(p, seed)))
    finally:
        torch.backends.quantized.engine = chosen
    return (
        lambda: torch.ops.quantized.linear(x, packed, 1.0, _ZERO),
        lambda y: y.int_repr().numpy().astype(np.int16) - _ZERO,
    )


def _attention(p: Attention, seed: int):
    a = inputs(p, seed)
    q, k, v = tensor(a.q), tensor(a.k), tensor(a.v)
    mask = None
    if p.mask == "pse":
        mask = tensor(a.pse)
    elif p.mask in ("bool", "band", "prefix"):
        mask = tensor(kept(p, np.arange(p.S1))[None, None])
    attention = partial(
        functional.scaled_dot_product_attention,
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=p.mask == "causal",
        enable_gqa=p.N1 != p.N2,
    )
    return attention, array


def float_layer(p: Longformer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The quantised layer in floats: x [1, S, H], weights (H, H) and biases (H,) by role."""
    a = inputs(p)
    tensors = {"x": tensor(a.x).float() * float(a.scale_x)}
    for suffix, weight, bias in (
        ("", a.weight, a.bias),
        ("_global", a.global_weight, a.global_bias),
    ):
        weights = (tensor(weight).float() * float(a.scale_w)).chunk(3)
        biases = (tensor(bias) * float(a.scale_projection)).chunk(3)
        for role, w, b in zip(("query", "key", "value"), weights, biases):
            tensors[f"{role}{suffix}.weight"], tensors[f"{role}{suffix}.bias"] = w, b
    return {name: t.to(dtype).contiguous() for name, t in tensors.items()}


def layer_result(p: Longformer, y: torch.Tensor) -> np.ndarray:
    return array(y) / np.float64(inputs(p).scale_output)


def _dense_band(p: Longformer, dtype: str):
    """All S x S scores with the band as a mask, then the global rows once more."""
    t = float_layer(p, _DTYPES[dtype])
    x, G = t["x"], p.G
    i = torch.arange(p.S)
    keep = ((i[:, None] - i).abs() <= p.W) | (i < G)
    bias = torch.zeros(p.S, p.S).masked_fill(~keep, -math.inf).to(x.dtype)[None, None]

    def heads(role: str, tokens: torch.Tensor) -> torch.Tensor:
        y = functional.linear(tokens, t[f"{role}.weight"], t[f"{role}.bias"])
        return y.view(1, -1, p.heads, p.hidden // p.heads).transpose(1, 2)

    def merge(y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).reshape(1, -1, p.hidden)

    def work():
        attention = functional.scaled_dot_product_attention
        y = merge(attention(heads("query", x), heads("key", x), heads("value", x), attn_mask=bias))
        q = heads("query_global", x[:, :G])
        y[:, :G] = merge(attention(q, heads("key_global", x), heads("value_global", x)))
        return y

    return work, partial(layer_result, p)


def _nsa(p: Nsa, step: int):
    """As it is written in torch: products, softmax, window sums, top-k, for `step` queries each."""
    a = inputs(p)
    dtype, group = _DTYPES[p.dtype], p.N1 // p.N2
    q = tensor(a.q).view(p.S, p.N2, group, p.D)
    keys = tensor(a.k).permute(1, 2, 0).contiguous()  # [N2, D, C]
    values = tensor(a.v).transpose(0, 1).contiguous()  # [N2, C, Dv]
    hidden, forced = tensor(a.hidden), tensor(a.forced)
    r, n = p.block // p.d, p.l // p.d
    # Score of block j: sum over m < r, n' < n of the probability of key r * (j + 1) - m - n'.
    weights = np.convolve(np.ones(r), np.ones(n))
    first = r - (len(weights) - 1)  # of block 0
    pad = (max(0, -first), max(0, r * p.blocks + 1 - p.compressed))
    window = torch.tensor(weights, dtype=torch.float32).view(1, 1, -1)

    def rows(start: int):
        stop = min(p.S, start + step)
        count = stop - start
        part = q[start:stop].permute(1, 2, 0, 3).reshape(p.N2, group * count, p.D)
        x = (part @ keys).view(p.N2, group, count, p.compressed) * p.D**-0.5
        x.masked_fill_(hidden[start:stop], torch.finfo(dtype).min)
        probabilities = torch.softmax(x, dim=-1, dtype=torch.float32)
        out = probabilities.to(dtype).view(p.N2, group * count, -1) @ values
        out = out.view(p.N2, group, count, p.Dv).permute(2, 0, 1, 3).reshape(count, p.N1, p.Dv)
        summed = functional.pad(probabilities.sum(dim=1).view(-1, 1, p.compressed), pad)
        start_of_0 = first + pad[0]
        scores = functional.conv1d(summed[..., start_of_0:], window, stride=r)
        scores = scores[..., : p.blocks].view(p.N2, count, p.blocks)
        scores = scores.masked_fill(forced[start:stop], torch.finfo(torch.float32).max)
        return out, torch.topk(scores, p.k, dim=-1).indices.to(torch.int32).transpose(0, 1)

    def work():
        parts = [rows(start) for start in range(0, p.S, step)]
        return torch.cat([out for out, _ in parts]), torch.cat([picked for _, picked in parts])

    return work, lambda result: tuple(map(array, result))
