"""Hugging Face transformers: the Longformer layer in floats."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from ..candidate import Candidate
from ..shapes import Longformer, Problem
from .torch import float_layer, layer_result

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def candidates(problem: Problem, seed: int = 0) -> dict:
    if not isinstance(problem, Longformer):
        return {}
    return {f"transformers {dtype}": partial(_layer, problem, dtype) for dtype in ("fp32", "bf16")}


def _layer(p: Longformer, dtype: str) -> Candidate:
    config = LongformerConfig(
        hidden_size=p.hidden,
        num_attention_heads=p.heads,
        attention_window=[2 * p.W],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval().to(_DTYPES[dtype])
    tensors = float_layer(p, _DTYPES[dtype])
    x = tensors.pop("x")
    layer.load_state_dict(tensors)
    mask = torch.zeros(1, p.S, dtype=x.dtype)
    mask[:, : p.G] = 10000.0  # its spelling of a global token

    def call():
        with torch.inference_mode():
            return layer(
                x,
                attention_mask=mask,
                is_index_masked=mask < 0,
                is_index_global_attn=mask > 0,
                is_global_attn=True,
            )[0]

    return Candidate(f"transformers {dtype}", call, lambda: layer_result(p, call()))
