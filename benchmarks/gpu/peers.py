"""torch on the same device: cuBLASLt, its attention backends, transformers' Longformer layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from ..shapes import Attention, Longformer, Matmul
from .device import Work, array
from .problems import Problem

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peer:
    """A library's way to do the work of a problem."""

    name: str
    bind: Callable[[SimpleNamespace], Work]
    """Arrays of the problem on the device -> one call."""
    finish: Callable[[Any], Any] = array
    """What a call returns -> what ``benchmarks.check`` takes."""


def peers(problem: Problem, device: str) -> list[Peer]:
    """Those that have the operator; some will refuse when they are called."""
    if isinstance(problem, Matmul):
        return _matmul(problem, device)
    if isinstance(problem, Attention):
        return _attention(problem)
    if isinstance(problem, Longformer):
        return [_longformer(problem, device)]
    return []  # no library has NSA's compressed attention


def _matmul(p: Matmul, device: str) -> list[Peer]:
    """torch._int_mm wants more than 16 rows: 16 are padded, at no cost to it worth naming."""
    rows = max(p.M, 32)

    def product(a: SimpleNamespace) -> Work:
        x = functional.pad(a.A, (0, 0, 0, rows - p.M))
        weight = a.W.t()
        return lambda: torch._int_mm(x, weight)[: p.M]

    if p.out == "int32":
        return [Peer("_int_mm", product)]

    def epilogue(y: torch.Tensor, a: SimpleNamespace) -> torch.Tensor:
        y = y + a.int_bias if hasattr(a, "int_bias") else y
        y = y * a.scale
        if p.per_token:
            y = y * a.token[:, None]
        y = y + a.float_bias if hasattr(a, "float_bias") else y
        if p.out == "int8":
            return y.round().clamp(-128, 127).to(torch.int8)
        return y.to(_DTYPES[p.out])

    def fused_by(compiled: Callable) -> Callable[[SimpleNamespace], Work]:
        def bind(a: SimpleNamespace) -> Work:
            work = product(a)
            return lambda: compiled(work(), a)

        return bind

    found = [Peer("_int_mm + epilogue", fused_by(epilogue))]
    if device == "cuda":
        found.append(Peer("_int_mm + compiled epilogue", fused_by(torch.compile(epilogue))))
    return found


def _attention(p: Attention) -> list[Peer]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def bind_with(backend: SDPBackend, grouped: bool) -> Callable[[SimpleNamespace], Work]:
        def bind(a: SimpleNamespace) -> Work:
            q = a.q.reshape(p.B, p.N2, -1, p.D) if grouped else a.q

            def work() -> torch.Tensor:
                with sdpa_kernel(backend):
                    y = functional.scaled_dot_product_attention(
                        q,
                        a.k,
                        a.v,
                        is_causal=p.mask == "causal",
                        enable_gqa=p.N1 != p.N2 and not grouped,
                    )
                return y.view(p.B, p.N1, p.S1, p.D)

            return work

        return bind

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if not torch.cuda.is_available():
        backends = {"math": SDPBackend.MATH}
    found = [Peer(f"sdpa {name}", bind_with(b, False)) for name, b in backends.items()]
    if p.S1 == 1 and p.N1 != p.N2:  # heads of a group as rows of one query: keys are read once
        found += [Peer(f"sdpa {n}, grouped", bind_with(b, True)) for n, b in backends.items()]
    return found


def _longformer(p: Longformer, device: str) -> Peer:
    """In float16, on the same numbers; the int8 rounding is no part of it."""

    def bind(a: SimpleNamespace) -> Work:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        from ..inputs import inputs
        from .device import tensor

        config = LongformerConfig(
            hidden_size=p.hidden,
            num_attention_heads=p.heads,
            attention_window=[2 * p.W],
            num_hidden_layers=1,
            attention_probs_dropout_prob=0.0,
        )
        host, dtype = inputs(p), torch.float16 if device == "cuda" else torch.float32
        weights = {}
        for suffix, weight, bias in (
            ("", host.weight, host.bias),
            ("_global", host.global_weight, host.global_bias),
        ):
            matrices = (tensor(weight, device).float() * float(host.scale_w)).chunk(3)
            vectors = (tensor(bias, device) * float(host.scale_projection)).chunk(3)
            for role, matrix, vector in zip(("query", "key", "value"), matrices, vectors):
                weights |= {f"{role}{suffix}.weight": matrix, f"{role}{suffix}.bias": vector}
        layer = LongformerSelfAttention(config, layer_id=0).eval().to(device, dtype)
        layer.load_state_dict(weights)
        x = (a.x.float() * float(host.scale_x)).to(dtype)
        mask = torch.zeros(1, p.S, dtype=dtype, device=device)
        mask[:, : p.G] = 10000.0  # its spelling of a global token
        masked, everywhere = mask < 0, mask > 0

        def work() -> torch.Tensor:
            return layer(
                x,
                attention_mask=mask,
                is_index_masked=masked,
                is_index_global_attn=everywhere,
                is_global_attn=True,
            )[0]

        return work

    def finish(y: torch.Tensor):
        from ..inputs import inputs

        return array(y.float()) / float(inputs(p).scale_output)

    return Peer("transformers fp16", bind, finish)
