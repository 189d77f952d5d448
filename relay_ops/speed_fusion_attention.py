"""mindspore SpeedFusionAttention: checks, description of the problem, lowering.

    attention_out = dropout(softmax(mask(scale * q @ k^T with pse)), keep_prob) @ v

Layouts BSH (B, S1, N1 * D), SBH, BNSD, BSND, and TND (T1, N1, D) of packed sequences; key and value
have N2 heads, S2 (T2) keys. One fused kernel computes attention_out, softmax_max and softmax_sum,
those of them that the graph uses.

Source: MindSpore's ops.speed_fusion_attention; docs/operators/speed_fusion_attention.md has the
details.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm.tirx as tir
from tvm import relax, te
from tvm.ir import Expr

from .. import schedules
from ..frontend.schemas.speed_fusion_attention import SCHEMA
from ..reference.speed_fusion_attention import speed_fusion_attention as reference
from .attention import SOFTMAX_REPEATS, Band
from .dims import int64
from .op import Dim, Node, Op, te_kernel, tir_kernel
from .speed_fusion_checks import LISTS, Checked, Sizes, check

_OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")


@dataclass(frozen=True)
class Tensor:
    """A parameter of the kernel."""

    shape: tuple[Dim, ...]
    dtype: str


@dataclass(frozen=True)
class AttentionProblem:
    """What the fused kernel of any target is built from."""

    label: str
    layout: str
    dtype: str
    """Of query, key, value, attention_out; arithmetic is float32."""
    B: Dim
    N1: int
    N2: int
    S1: Dim
    S2: Dim
    D: int
    tensors: dict[str, Tensor]
    """The kernel's inputs in order, by their names in the node."""
    outputs: dict[str, Tensor]
    constants: dict[str, int]
    """seed, offset, q_start_idx, kv_start_idx, those that are no tensors."""
    scale: float
    keep_prob: float
    pse: str | None
    """"rows": [b, n, i, j]; "row": [b, n, 0, j]; "packed"; "slopes": pse_type 2 and 3."""
    pse_type: int
    band: Band | None
    """None when nothing is computed from i and j: no atten_mask, or mode 1."""
    mask: bool
    """atten_mask is read (modes 0, 1, 5)."""
    sequence_rules_of: frozenset[str]
    """"equal", "grows": what a pair of packed lengths must obey beside the general rules."""
    head_major: bool
    """TND records of the softmax outputs are head-major in each sequence (softmax_layout "")."""

    @property
    def starts_fit_int32(self) -> bool:
        starts = [self.constants.get(name) for name in ("q_start_idx", "kv_start_idx")]
        return all(start is not None and abs(start) < 1 << 29 for start in starts)

    def one_batch(self, name: str) -> bool:
        """``pse`` or ``atten_mask`` is one plane for the whole batch."""
        return self.tensors[name].shape[0] == 1

    def one_head(self, name: str) -> bool:
        return self.tensors[name].shape[1] == 1

    def sequence_rules(self, queries: Expr, keys: Expr) -> list[tuple[Expr, str]]:
        """Conditions on S1_b and S2_b of every packed sequence, and what to say when one fails."""
        subject = '"actual_seq_qlen" and "actual_seq_kvlen": found'
        rules = [
            (
                tir.any(queries <= 0, keys > 0),
                f"{subject} a sequence of queries without keys, allowed S2 > 0 where S1 > 0",
            )
        ]
        if "equal" in self.sequence_rules_of:
            rules.append((tir.EQ(queries, keys), f"{subject} S1 != S2, allowed S1 = S2 with pse"))
        if "grows" in self.sequence_rules_of:
            rules.append((queries <= keys, f"{subject} S1 > S2, allowed S1 <= S2 in sparse_mode 3"))
        return rules


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr | None]:
    checked = check(bb, node)
    found = {}
    if wanted := [name for name in _OUTPUTS if name in node.outputs]:
        problem = _describe(node, checked, wanted)
        build = schedules.tir_builder("speed_fusion_attention.fused", node.target)
        inputs = [_tensor(node, name) for name in problem.tensors]
        types = [relax.TensorType([*t.shape], t.dtype) for t in problem.outputs.values()]
        kernel = build(problem, node.target)
        results = tir_kernel(bb, "speed_fusion_attention.fused", kernel, inputs, types)
        if len(wanted) == 1:
            found[wanted[0]] = results  # TVM returns a single output bare
        else:
            found |= {name: relax.TupleGetItem(results, k) for k, name in enumerate(wanted)}
    if "softmax_out" in node.outputs:
        found["softmax_out"] = relax.const(np.zeros(0, "float32")).astype(node.dtype("query"))
    for name in ("seed", "offset"):
        if name in node.outputs:
            found[name] = _scalar_output(bb, node, name)
    if "numels" in node.outputs:
        found["numels"] = _numels(bb, node, checked.sizes)
    return [bb.emit(found[p.name]) if p.name in found else None for p in SCHEMA.outputs]


def _describe(node: Node, checked: Checked, wanted: list[str]) -> AttentionProblem:
    a, layout = node.attrs, node.attrs["input_layout"]
    sizes, masked, pse, rules = checked
    B, N1, S1 = sizes.B, sizes.N1, sizes.S1
    tensors = {name: Tensor(node.shape(name), node.dtype(name)) for name in ("query", "key")}
    if "attention_out" in wanted:
        tensors["value"] = Tensor(node.shape("value"), node.dtype("value"))
    if pse:
        tensors["pse"] = Tensor(node.shape("pse"), node.dtype("pse"))
    if masked:
        tensors["atten_mask"] = Tensor(node.shape("atten_mask"), node.dtype("atten_mask"))
    if a["sparse_mode"] == 5:
        tensors["prefix"] = Tensor((B,), _integer_dtype(node, "prefix"))
    if layout == "TND":
        tensors |= {name: Tensor((B,), _integer_dtype(node, name)) for name in LISTS}
    used = ["q_start_idx", "kv_start_idx"] if pse == "slopes" else []
    used += ["seed", "offset"] if a["keep_prob"] < 1 else []
    constants = {name: value for name in used if (value := _known(node, name)) is not None}
    late = [name for name in used if name not in constants]
    tensors |= {name: Tensor(node.shape(name), node.dtype(name)) for name in late}
    softmax = (S1, N1) if layout == "TND" else (B, N1, S1)
    outputs = {name: Tensor((*softmax, SOFTMAX_REPEATS), "float32") for name in wanted}
    if "attention_out" in wanted:
        outputs["attention_out"] = Tensor(node.shape("query"), node.dtype("query"))
    band = None
    if "atten_mask" in node and a["sparse_mode"] != 1:
        tokens = (a["pre_tokens"], a["next_tokens"]) if a["sparse_mode"] in (0, 4) else ()
        band = Band(a["sparse_mode"], *tokens)
    return AttentionProblem(
        label=node.label,
        layout=layout,
        dtype=node.dtype("query"),
        B=B,
        N1=N1,
        N2=sizes.N2,
        S1=S1,
        S2=sizes.S2,
        D=sizes.D,
        tensors=tensors,
        outputs=outputs,
        constants=constants,
        scale=a["scale"],
        keep_prob=a["keep_prob"],
        pse=pse,
        pse_type=a["pse_type"],
        band=band,
        mask=masked,
        sequence_rules_of=rules,
        head_major=not a["softmax_layout"],
    )


def _tensor(node: Node, name: str) -> relax.Expr:
    """An input, or its attribute form as a constant."""
    if name in node:
        return node.inputs[name]
    return relax.const(np.array(node.attrs[name], "int64"), "int64")


def _integer_dtype(node: Node, name: str) -> str:
    return node.dtype(name) if name in node else "int64"


def _known(node: Node, name: str) -> int | None:
    """seed, offset or a start index, where it is known now; absent is 0."""
    if name in node.constants:
        return int(node.constants[name].reshape(-1)[0])
    if name in node:
        return None
    value = node.attrs.get(name, 0)
    return value[0] if isinstance(value, list) else value


def _scalar_output(bb: relax.BlockBuilder, node: Node, name: str) -> relax.Expr:
    value = _known(node, name)
    if value is not None:
        return relax.const(value, "int64")
    index = [0] * node.rank(name)
    return te_kernel(
        bb,
        f"speed_fusion_attention.{name}",
        lambda x: te.compute((), lambda: x[tuple(index)].astype("int64"), name=name),
        node.inputs[name],
    )


def _numels(bb: relax.BlockBuilder, node: Node, sizes: Sizes) -> relax.Expr:
    """Number of dropout decisions: N1 times the sum of S1_b * S2_b."""
    N1 = sizes.N1
    if node.attrs["input_layout"] == "TND":
        lists = [node.constants.get(name, node.attrs.get(name)) for name in LISTS]
        if all(x is not None for x in lists):
            spans = [np.diff(np.asarray(x, "int64"), prepend=0) for x in lists]
            return relax.const(N1 * np.sum(spans[0] * spans[1]), "int64")
        args = [_tensor(node, name) for name in LISTS]
        return te_kernel(bb, "speed_fusion_attention.numels", lambda q, k: _pairs(N1, q, k), *args)
    total = sizes.B * N1 * sizes.S1 * sizes.S2
    if isinstance(total, int):
        return relax.const(total, "int64")
    layout = node.attrs["input_layout"]
    batch, row = {"BSH": (0, 1), "SBH": (1, 0), "BNSD": (0, 2), "BSND": (0, 1)}[layout]
    return te_kernel(
        bb,
        "speed_fusion_attention.numels",
        lambda q, k: te.compute(
            (), lambda: int64(q.shape[batch]) * N1 * q.shape[row] * k.shape[row], name="numels"
        ),
        node.inputs["query"],
        node.inputs["key"],
    )


def _pairs(N1: int, ends_q: te.Tensor, ends_kv: te.Tensor) -> te.Tensor:
    c = te.reduce_axis((0, ends_q.shape[0]), name="c")

    def length(ends: te.Tensor) -> Expr:
        zero = tir.const(0, str(ends.dtype))
        return (ends[c] - tir.if_then_else(c > 0, ends[tir.max(c - 1, 0)], zero)).astype("int64")

    return te.compute(
        (), lambda: te.sum(length(ends_q) * length(ends_kv) * int64(N1), axis=c), name="numels"
    )


SPEED_FUSION_ATTENTION = Op(SCHEMA, lower, reference)
