"""What is timed: problems of realistic size, as nodes, and the configurations that compete.

Weights of a matrix product are inputs here, so that they come from memory and not from the
second-level cache, as those of a model with many layers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..inputs import DTYPES, inputs
from ..shapes import Attention, Longformer, Matmul, Nsa

Problem = Matmul | Attention | Longformer | Nsa

_CAUSAL = np.triu(np.ones((2048, 2048), np.bool_), 1)
_OUT = {"int8": 3, "int32": 6, "fp16": 10, "bf16": 16}


@dataclass(frozen=True)
class Candidate:
    """One way to compile a problem: the schedule's own choice, or with other fields of one
    configuration.
    """

    problem: Problem
    kind: str = ""
    """Class of the configuration whose ``fields`` are others."""
    fields: Mapping[str, int] = field(default_factory=dict)
    arch: str = ""
    """Of the code, where it is not the one that is asked for: another of the same GPU."""
    stored: tuple[str, ...] = ()
    """Inputs of `Node.given` that are part of the model."""

    @property
    def config(self) -> str:
        parts = [self.arch] if self.arch else []
        parts += [f"{name} stored" for name in self.stored]
        parts += [f"{name}={value}" for name, value in self.fields.items()]
        return " ".join(parts) or "default"

    @property
    def name(self) -> str:
        return f"{self.problem.label}, {self.config}"


@dataclass(frozen=True)
class Node:
    """A problem as one node: arrays, or (dtype, shape) of what comes with the call."""

    feeds: dict[str, Any]
    given: dict[str, str]
    """Input of the graph -> array of `inputs`."""
    outputs: tuple[str, ...]
    attrs: dict[str, Any]

    @property
    def constant(self) -> list[str]:
        return [name for name in self.feeds if name not in self.given]


GROUPS: dict[str, tuple[Problem, ...]] = {
    "gemm": tuple(
        Matmul(*size, out, per_token=out == "bf16")
        for size in ((4096, 4096, 4096), (8192, 4096, 4096), (16, 4096, 4096), (16, 768, 3072))
        for out in ("int32", "bf16", "int8")
    ),
    # 16384 tokens in all, hidden size 2048, as in the published figures.
    "attention": tuple(
        Attention(16384 // S, 2048 // D, 2048 // D, S, S, D, dtype, mask)
        for D in (64, 128)
        for dtype in ("fp16", "bf16")
        for S in (2048, 4096, 8192, 16384)
        for mask in ("full", "causal")
    ),
    "decode": tuple(
        Attention(B, 64, 8, 1, S2, 128, "bf16") for S2 in (2048, 8192) for B in (1, 8, 32)
    ),
    "nsa": tuple(
        Nsa(S, 128, "bf16", select=select) for S in (4096, 16384, 65536) for select in (True, False)
    ),
    "longformer": tuple(Longformer(S, 16) for S in (1024, 2048, 4096)),
}
"""Group -> problems."""

QUICK = {
    "gemm": (Matmul(4096, 4096, 4096, "int32"), Matmul(16, 4096, 4096, "bf16", per_token=True)),
    "attention": (Attention(4, 16, 16, 4096, 4096, 128, "bf16", "causal"),),
    "decode": (Attention(8, 64, 8, 1, 2048, 128, "bf16"),),
    "nsa": (Nsa(4096, 128, "bf16"),),
    "longformer": (Longformer(1024, 16),),
}
"""One or two of each group."""

_GEMM = (
    {"stages": 3},
    {"block_m": 256, "warps_m": 4, "warps_n": 2},
    {"block_n": 256},
    {"block_k": 128, "stages": 3},
    {"block_m": 64, "block_n": 256},
)
_GEMM_FEW_ROWS = (
    {"stages": 4},
    {"block_n": 64, "stages": 4},
    {"block_k": 512, "stages": 3},
    {"block_k": 128, "warps_k": 4},
)
_GEMM_HOPPER = (
    {"stages": 3},
    {"block_n": 128, "stages": 6},
    {"block_n": 128, "stages": 3},
    {"block_m": 256, "block_n": 128, "warps_m": 16},
)
_ATTENTION_HOPPER = (
    {"slots": 6},
    {"row_tiles": 1, "keys": 96},
    {"row_tiles": 1, "keys": 96, "warps": 8},
)
_SPLIT = ({"parts": 1}, {"parts": 2}, {"parts": 4})
_ATTENTION = ({"keys": 32}, {"keys": 64}, {"slots": 2}, {"slots": 4})
_NSA = ({"keys": 32}, {"slots": 2}, {"slots": 4}, {"row_tiles": 1, "keys": 64})
_LONGFORMER = ({"keys": 32}, {"row_tiles": 1}, {"row_tiles": 1, "keys": 64})
_DECODE = ({"split_blocks": 264}, {"split_blocks": 1056}, {"split_keys": 128})


def candidates(group: str, quick: bool = False) -> list[Candidate]:
    """The schedules' own choices; without ``quick``, others beside some of them."""
    found = []
    for problem in (QUICK if quick else GROUPS)[group]:
        found.append(Candidate(problem))
        if not quick:
            for kind, others in _others(group, problem).items():
                found += [Candidate(problem, kind, fields) for fields in others]
            found += _hopper(group, problem)
    return found


def _hopper(group: str, p: Problem) -> list[Candidate]:
    """The kernels that only sm_90a has, beside those for sm_90."""
    arch = "sm_90a"
    if group == "gemm" and p.M > 64:
        found = [Candidate(p, arch=arch)]
        if p.M == 4096:
            found += [Candidate(p, "GemmConfig", fields, arch) for fields in _GEMM_HOPPER]
        if p.M == 4096 and p.out == "int8":
            found.append(Candidate(p, arch=arch, stored=("x2",)))
        return found
    if group == "gemm" and p.out == "int8":
        packed = Candidate(p, arch=arch, stored=("x2",))
        return [packed] + [replace(packed, kind="SplitConfig", fields=parts) for parts in _SPLIT]
    if group == "attention":
        found = [Candidate(p, arch=arch)]
        if p.S1 == 8192:
            found += [Candidate(p, "AttentionConfig", fields, arch) for fields in _ATTENTION_HOPPER]
        return found
    return []


def _others(group: str, p: Problem) -> dict[str, tuple[Mapping[str, int], ...]]:
    """Class of a configuration -> its other fields."""
    if group == "gemm" and p.M == 4096:
        return {"GemmConfig": _GEMM}
    if group == "gemm" and p.M == 16:
        few = {"GemmConfig": _GEMM_FEW_ROWS} if p.N == 4096 else {}
        return few | {"SplitConfig": _SPLIT}
    if group == "attention" and p.S1 == 8192:
        return {"AttentionConfig": _ATTENTION}
    if group == "decode":
        return {"AttentionConfig": _DECODE}
    if group == "nsa" and p.S == 16384:
        return {"AttentionConfig": _NSA}
    if group == "longformer" and p.S == 4096:
        return {"AttentionConfig": _LONGFORMER}
    return {}


def node(problem: Problem) -> Node:
    """The node of a problem; only what is stored in the model is computed."""
    return _NODES[type(problem)](problem)


def _matmul(p: Matmul) -> Node:
    a = inputs(p)
    feeds = {"x1": (np.int8, (p.M, p.K)), "x2": (np.int8, (p.N, p.K)), "scale": a.scale}
    given = {"x1": "A", "x2": "W"}
    if p.per_token:
        feeds["pertoken_scale"] = (np.float32, (p.M,))
        given["pertoken_scale"] = "token"
    bias = a.float_bias if a.int_bias is None else a.int_bias
    if bias is not None:
        feeds["bias"] = bias
    return Node(feeds, given, ("y",), {"output_dtype": _OUT[p.out], "transpose_x2": 1})


def _attention(p: Attention) -> Node:
    dtype = DTYPES[p.dtype]
    feeds = {
        "query": (dtype, (p.B, p.N1, p.S1, p.D)),
        "key": (dtype, (p.B, p.N2, p.S2, p.D)),
        "value": (dtype, (p.B, p.N2, p.S2, p.D)),
    }
    attrs = {"head_num": p.N1, "input_layout": "BNSD", "scale": p.D**-0.5}
    if p.mask == "causal":
        feeds["atten_mask"] = _CAUSAL
        attrs["sparse_mode"] = 2
    given = {"query": "q", "key": "k", "value": "v"}
    return Node(feeds, given, ("attention_out",), attrs)


def _longformer(p: Longformer) -> Node:
    a, H = inputs(p), p.hidden
    feeds = {
        "input": (np.int8, a.x.shape),
        "scale_input": a.scale_x,
        "weight": a.weight.reshape(H, 3 * H),  # column order: the bytes of (3H, H) by rows
        "scale_weight": a.scale_w,
        "bias": a.bias,
        "scale_bias": np.float32(1),
        "scale_qkv_gemm": a.scale_projection,
        "mask": (np.float16, a.mask.shape),
        "global_weight": a.global_weight.reshape(H, 3 * H),
        "scale_global_weight": a.scale_w,
        "global_bias": a.global_bias,
        "scale_global_gemm": a.scale_projection,
        "global": (np.int32, a.flags.shape),
        "scale_output": a.scale_output,
    }
    orders = {"order_input": 1, "order_weight": 0, "order_global_weight": 0, "order_output": 1}
    given = {"input": "x", "mask": "mask", "global": "flags"}
    return Node(feeds, given, ("output",), {"num_heads": p.heads, "window": p.W} | orders)


def _nsa(p: Nsa) -> Node:
    dtype = DTYPES[p.dtype]
    feeds = {
        "query": (dtype, (p.S, p.N1, p.D)),
        "key": (dtype, (p.compressed, p.N2, p.D)),
        "value": (dtype, (p.compressed, p.N2, p.Dv)),
        "atten_mask": (np.bool_, (p.S, p.compressed)),
        "topk_mask": (np.bool_, (p.S, p.blocks)),
    }
    given = dict(zip(feeds, ("q", "k", "v", "hidden", "forced")))
    attrs = {
        "head_num": p.N1,
        "scale_value": p.D**-0.5,
        "compress_block_size": p.l,
        "compress_stride": p.d,
        "select_block_size": p.block,
        "select_block_count": p.k,
        "actual_seq_qlen": [p.S],
        "actual_cmp_seq_kvlen": [p.compressed],
        "actual_sel_seq_kvlen": [p.blocks],
    }
    chosen = ("topk_indices_out",) if p.select else ()
    return Node(feeds, given, ("attention_out", *chosen), attrs)


_NODES = {Matmul: _matmul, Attention: _attention, Longformer: _longformer, Nsa: _nsa}


def result(problem: Problem, outputs: Mapping[str, np.ndarray]) -> Any:
    """Outputs of the node as ``benchmarks.check`` takes them."""
    if isinstance(problem, Nsa):
        return outputs["attention_out"], outputs.get("topk_indices_out")
    (y,) = outputs.values()
    return y
