"""mindspore SpeedFusionAttention: checks, description of the problem, lowering.

    attention_out = dropout(softmax(mask(scale * q @ k^T with pse)), keep_prob) @ v

Layouts BSH (B, S1, N1 * D), SBH, BNSD, BSND, and TND (T1, N1, D) of packed sequences; key and value
have N2 heads, S2 (T2) keys. One fused kernel computes attention_out, softmax_max and softmax_sum,
those of them that the graph uses.

Source: the operator's specification; section numbers below are its.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm import relax, te
from tvm.ir import Expr

from .. import schedules
from ..frontend.schemas.speed_fusion_attention import SCHEMA
from ..reference.speed_fusion_attention import speed_fusion_attention as reference
from ..runtime.errors import InvalidTypeError, message
from ..runtime.speed_fusion_attention import MAX_LENGTH, MAX_PREFIXES, MAX_SEQUENCES
from .attention import LAYOUTS, PACKED_ROWS, SOFTMAX_REPEATS, Band
from .op import Dim, Node, Op, te_kernel, tir_kernel

MAX_BATCH, MAX_HEADS, MAX_HEAD_SIZE = 2048, 256, 512
COMPRESSED_MASK = 2048
"""Side of the mask of modes 2 to 4, always the strict upper triangle of ones."""

_MODES = {
    0: "defaultMask",
    1: "allMask",
    2: "leftUpCausal",
    3: "rightDownCausal",
    4: "band",
    5: "prefix",
}
_NOT_ENABLED = {6: "global", 7: "dilated", 8: "block_local"}
_SCALARS = ("seed", "offset", "q_start_idx", "kv_start_idx")
_LISTS = ("actual_seq_qlen", "actual_seq_kvlen")
_OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")
# Token values beyond this act alike under the rule of section 4.2, whose sizes end at 2**19.
_FAR = 1 << 40


@dataclass(frozen=True)
class Tensor:
    """A parameter of the kernel."""

    shape: tuple[Dim, ...]
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """B is the number of sequences, S1 and S2 are T1 and T2 in layout TND."""

    B: Dim
    N1: int
    N2: int
    S1: Dim
    S2: Dim
    D: int


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
    _check_attributes(node)
    sizes = _check_shapes(bb, node)
    masked = _check_mask(bb, node, sizes)
    _check_prefix(bb, node, sizes)
    pse = _check_pse(bb, node, sizes)
    _check_scalars(bb, node)
    rules = _check_sequences(bb, node, sizes, pse)
    found = {}
    if wanted := [name for name in _OUTPUTS if name in node.outputs]:
        problem = _describe(node, sizes, masked, pse, rules, wanted)
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
        found["numels"] = _numels(bb, node, sizes)
    return [bb.emit(found[p.name]) if p.name in found else None for p in SCHEMA.outputs]


# -- checks, section 5 ----------------------------------------------------------------------------


def _check_attributes(node: Node) -> None:
    a = node.attrs
    layout, mode, heads = a["input_layout"], a["sparse_mode"], a["head_num"]
    if layout not in LAYOUTS:
        node.fail('attribute "input_layout"', repr(layout), ", ".join(LAYOUTS))
    if mode in _NOT_ENABLED:
        allowed = "0 to 5; modes 6, 7, 8 are not enabled"
        node.fail('attribute "sparse_mode"', f"{mode} ({_NOT_ENABLED[mode]})", allowed)
    if mode not in _MODES:
        node.fail('attribute "sparse_mode"', mode, "0 to 5")
    if a["pse_type"] not in range(4):
        node.fail('attribute "pse_type"', a["pse_type"], "0, 1, 2, 3")
    if not 0 < a["keep_prob"] <= 1:
        node.fail('attribute "keep_prob"', a["keep_prob"], "0 < keep_prob <= 1")
    if not math.isfinite(a["scale"]):
        node.fail('attribute "scale"', a["scale"], "a finite number")
    if not 1 <= heads <= MAX_HEADS:
        node.fail('attribute "head_num"', heads, f"1 to {MAX_HEADS}")
    if a["softmax_layout"] not in ("", "TND"):
        node.fail('attribute "softmax_layout"', repr(a["softmax_layout"]), '"" or "TND"')
    if a["softmax_layout"] == "TND" and layout != "TND":
        node.fail('attribute "softmax_layout"', f'"TND" in {layout}', '"TND" in layout TND only')
    if "padding_mask" in node:
        node.fail('input "padding_mask"', "a tensor", "none; the input is reserved")
    for name in ("prefix", *_LISTS, "q_start_idx", "kv_start_idx"):
        if name in node and name in a:
            node.fail(f'"{name}"', "an input and an attribute of this name", "one of the two")


def _check_shapes(bb: relax.BlockBuilder, node: Node) -> Sizes:
    """Section 4.1 for query, key and value."""
    layout, heads = node.attrs["input_layout"], node.attrs["head_num"]
    for name in ("query", "key", "value"):
        if node.rank(name) != LAYOUTS[layout]:
            node.fail(
                f'input "{name}"', f"rank {node.rank(name)}", f"rank {LAYOUTS[layout]} in {layout}"
            )
        if 0 in node.shape(name):
            node.fail(f'input "{name}" shape', node.shape(name), "no dimension 0")
    q, k = node.shape("query"), node.shape("key")
    if layout in ("BSH", "SBH"):
        H1, H2 = _static(node, "query", 2), _static(node, "key", 2)
        node.require(H1 % heads == 0, 'input "query" H1', H1, f"a multiple of head_num = {heads}")
        N1, D = heads, H1 // heads
        node.require(H2 % D == 0, 'input "key" H2', H2, f"a multiple of D = {D}")
        N2 = H2 // D
    else:
        axis = {"BNSD": 1, "BSND": 2, "TND": 1}[layout]
        N1, N2 = _static(node, "query", axis), _static(node, "key", axis)
        node.require(heads == N1, 'attribute "head_num"', heads, f"query's N1 = {N1}")
        D, key_D = _static(node, "query", -1), _static(node, "key", -1)
        node.require(key_D == D, 'input "key" D', key_D, f"query's D = {D}")
    node.require(D <= MAX_HEAD_SIZE, 'input "query" D', D, f"at most {MAX_HEAD_SIZE}")
    node.require(N1 % N2 == 0, 'input "key" heads N2', N2, f"a divisor of N1 = {N1}")
    node.require_shape(bb, "value", k, f"key's shape {_show(k)}")
    batch, sequence = {"BSH": (0, 1), "SBH": (1, 0), "BNSD": (0, 2), "BSND": (0, 1)}.get(
        layout, (None, 0)
    )
    S1, S2 = q[sequence], k[sequence]
    if layout == "TND":
        lists = [node.shape(n) if n in node else (len(node.attrs.get(n, ())),) for n in _LISTS]
        B = lists[0][0] if lists[0] else 0
    else:
        B = q[batch]
        matching = [*k]
        matching[batch] = B
        node.require_shape(bb, "key", matching, f"query's B = {B}")
        node.require_shape(bb, "value", matching)
        node.require(B <= MAX_BATCH, 'input "query" B', B, f"at most {MAX_BATCH}")
        node.require(S1 <= MAX_LENGTH, 'input "query" S1', S1, f"at most {MAX_LENGTH}")
        node.require(S2 <= MAX_LENGTH, 'input "key" S2', S2, f"at most {MAX_LENGTH}")
    return Sizes(B, N1, N2, S1, S2, D)


def _check_mask(bb: relax.BlockBuilder, node: Node, sizes: Sizes) -> bool:
    """Section 4.2. Returns whether the mask's content is read."""
    a = node.attrs
    mode, tnd = a["sparse_mode"], a["input_layout"] == "TND"
    if mode == 5 and tnd:
        node.fail('attribute "sparse_mode"', "5 in TND", "2 or 3 in TND")
    if "atten_mask" not in node:
        if mode == 5:
            node.fail('input "atten_mask"', "none", "a mask; sparse_mode 5 needs one")
        if mode in (1, 2, 3, 4):
            warnings.warn(
                f"{node.label}: sparse_mode {mode} ({_MODES[mode]}) without atten_mask masks "
                "nothing: this is full attention",
                UserWarning,
                stacklevel=2,
            )
        return False
    if tnd and mode not in (2, 3):
        node.fail('input "atten_mask"', f"sparse_mode {mode} in TND", "sparse_mode 2 or 3 in TND")
    if mode in (2, 3, 4):
        side = COMPRESSED_MASK
        node.require_shape(
            bb, "atten_mask", (side, side), f"shape ({side}, {side}) in sparse_mode {mode}"
        )
        content = node.constants.get("atten_mask")
        if content is not None and not np.array_equal(content, np.triu(np.ones_like(content), 1)):
            node.fail(
                'input "atten_mask"',
                "a constant of other content",
                f"the strict upper triangle of ones, triu(ones, 1), in sparse_mode {mode}",
            )
    else:
        _check_full_mask(bb, node, sizes)
    if mode in (0, 4):
        _check_tokens(node, sizes)
    return mode in (0, 1, 5)


def _check_full_mask(bb: relax.BlockBuilder, node: Node, sizes: Sizes) -> None:
    B, N1, S1, S2 = sizes.B, sizes.N1, sizes.S1, sizes.S2
    shape, mode = node.shape("atten_mask"), node.attrs["sparse_mode"]
    forms = ["(B, N1, S1, S2)", "(B, 1, S1, S2)"]
    forms += ["(1, 1, S1, S2)", "(S1, S2)"] if mode != 5 else []
    allowed = f"{' or '.join(forms)} = {_show((B, N1, S1, S2))} in sparse_mode {mode}"
    if len(shape) == 2 and mode != 5:
        node.require_shape(bb, "atten_mask", (S1, S2), allowed)
        return
    if len(shape) != 4:
        node.fail('input "atten_mask"', f"shape {_show(shape)}", allowed)
    one_batch, one_head = _is_one(shape[0]), _is_one(shape[1])
    expected = (1 if one_batch else B, 1 if one_head else N1, S1, S2)
    node.require_shape(bb, "atten_mask", expected, allowed)
    if one_batch and (mode == 5 or not one_head):
        node.require(_eq(B, 1), 'input "atten_mask" shape', (*shape,), allowed)


def _check_tokens(node: Node, sizes: Sizes) -> None:
    """The token rule, after the conversion of mode 4 to the upper left corner."""
    S1, S2 = sizes.S1, sizes.S2
    tokens = node.attrs["pre_tokens"], node.attrs["next_tokens"]
    pre, next_ = (min(max(t, -_FAR), _FAR) for t in tokens)
    shift = S2 - S1 if node.attrs["sparse_mode"] == 4 else 0
    p, x = pre - shift, next_ + shift
    wrong = _any(
        _all(p < 0, x < 0),
        _all(p < 0, x >= 0, _any(x < -p, -p >= S2)),
        _all(x < 0, p >= 0, _any(-x > p, -x >= S1)),
    )
    node.require(
        tir.Not(wrong) if isinstance(wrong, Expr) else not wrong,
        'attributes "pre_tokens" and "next_tokens"',
        [*tokens, S1, S2],
        "a band that meets the S1 x S2 scores (values: pre_tokens, next_tokens, S1, S2)",
    )


def _check_prefix(bb: relax.BlockBuilder, node: Node, sizes: Sizes) -> None:
    given = "prefix" in node or "prefix" in node.attrs
    mode = node.attrs["sparse_mode"]
    if mode != 5:
        if given:
            node.fail('"prefix"', f"given in sparse_mode {mode}", "sparse_mode 5 only")
        return
    if not given:
        node.fail('"prefix"', "none", "one value per batch entry; sparse_mode 5 needs it")
    allowed = f"at most {MAX_PREFIXES} in sparse_mode 5"
    node.require(sizes.B <= MAX_PREFIXES, '"prefix": B', sizes.B, allowed)
    if "prefix" in node:
        node.require_shape(bb, "prefix", (sizes.B,))
    node.check_values(
        "speed_fusion_attention.prefix", ["prefix"], B=sizes.B, S1=sizes.S1, S2=sizes.S2
    )


def _check_pse(bb: relax.BlockBuilder, node: Node, sizes: Sizes) -> str | None:
    """Section 4.3. Returns the form of the bias, as ``AttentionProblem.pse`` names it."""
    kind, tnd = node.attrs["pse_type"], node.attrs["input_layout"] == "TND"
    if "pse" not in node:
        if kind in (2, 3):
            node.fail('input "pse"', "none", f"slopes; pse_type {kind} needs them")
        return None
    dtype = "float32" if kind in (2, 3) else node.dtype("query")
    if node.dtype("pse") != dtype:
        allowed = f"{dtype} with pse_type {kind}"
        raise InvalidTypeError(message(node.label, 'input "pse"', node.dtype("pse"), allowed))
    B, N1, S1, S2 = sizes.B, sizes.N1, sizes.S1, sizes.S2
    shape = node.shape("pse")
    if kind in (2, 3):
        allowed = f"(B, N1) or (N1,) = {_show((B, N1))} with pse_type {kind}"
        node.require_shape(bb, "pse", (N1,) if len(shape) == 1 else (B, N1), allowed)
        return "slopes"
    columns, name = (shape[-1], "Smax") if tnd else (S2, "S2")
    forms = [] if tnd else [f"(B or 1, N1, S1, {name})", f"(B or 1, N1, 1, {name})"]
    forms.append(f"(B or 1, N1, {PACKED_ROWS}, {name})")
    allowed = f"{' or '.join(forms)} with B, N1, S1, S2 = {_show((B, N1, S1, S2))}"
    if len(shape) != 4:
        node.fail('input "pse"', f"shape {_show(shape)}", allowed)
    batch = 1 if _is_one(shape[0]) else B
    rows = shape[2]
    packed = tnd or (rows == PACKED_ROWS and not (isinstance(S1, int) and S1 <= PACKED_ROWS))
    if not packed:
        row = _is_one(rows)
        node.require_shape(bb, "pse", (batch, N1, 1 if row else S1, columns), allowed)
        return "row" if row else "rows"
    node.require_shape(bb, "pse", (batch, N1, PACKED_ROWS, columns), allowed)
    if not tnd:
        node.require(S1 >= PACKED_ROWS, 'input "pse" with S1', S1, allowed)
    _check_packed(node, sizes)
    return "packed"


def _check_packed(node: Node, sizes: Sizes) -> None:
    """Conditions of the packed form; S1 = 1024 takes the same rows plainly and needs none.

    Equal and long enough packed sequences are judged with the lists.
    """
    a, S1, S2 = node.attrs, sizes.S1, sizes.S2
    tnd, mode = a["input_layout"] == "TND", a["sparse_mode"]
    plain = False if tnd else _eq(S1, PACKED_ROWS)
    conditions = [
        ("atten_mask" in node, "without atten_mask", "with atten_mask"),
        (mode in (2, 3) or (mode == 0 and not tnd), f"sparse_mode {mode}", "sparse_mode 2, 3 or 0"),
    ]
    if not tnd:
        conditions.append((_eq(S1, S2), [S1, S2], "S1 = S2"))
    if mode == 0:
        conditions.append((a["next_tokens"] == 0, a["next_tokens"], "next_tokens = 0"))
        conditions.append((a["pre_tokens"] >= S1, a["pre_tokens"], f"pre_tokens >= S1 = {S1}"))
    for condition, found, allowed in conditions:
        node.require(_any(plain, condition), 'input "pse", packed form', found, allowed)


def _check_scalars(bb: relax.BlockBuilder, node: Node) -> None:
    for name in _SCALARS:
        if name in node:
            shapes = [(), (1,)] if name in ("seed", "offset") else [(1,)]
            if node.rank(name) not in map(len, shapes):
                allowed = " or ".join(map(str, shapes))
                node.fail(f'input "{name}"', f"shape {_show(node.shape(name))}", f"shape {allowed}")
            if node.rank(name):
                node.require_shape(bb, name, (1,))
        elif name not in ("seed", "offset") and len(node.attrs.get(name, [0])) != 1:
            node.fail(f'attribute "{name}"', node.attrs[name], "one value")


def _check_sequences(
    bb: relax.BlockBuilder, node: Node, sizes: Sizes, pse: str | None
) -> frozenset[str]:
    """Lists of TND. Returns ``AttentionProblem.sequence_rules_of``."""
    tnd = node.attrs["input_layout"] == "TND"
    for name in _LISTS:
        given = name in node or name in node.attrs
        if tnd and not given:
            node.fail(f'"{name}"', "none", "cumulative lengths; layout TND needs them")
        if given and not tnd:
            node.fail(f'"{name}"', f"given in {node.attrs['input_layout']}", "layout TND only")
        if not tnd:
            continue
        if name in node:
            if node.rank(name) != 1:
                node.fail(f'input "{name}"', f"rank {node.rank(name)}", "rank 1")
            node.require_shape(bb, name, (sizes.B,), f"as many values as {_LISTS[0]}")
        length = sizes.B if name in node else len(node.attrs[name])
        allowed = f"1 to {MAX_SEQUENCES}"
        node.require(
            _all(length >= 1, length <= MAX_SEQUENCES), f'"{name}" length', length, allowed
        )
        node.require(_eq(length, sizes.B), f'"{name}" length', length, f"{_LISTS[0]}'s, {sizes.B}")
    if not tnd:
        return frozenset()
    grows = node.attrs["sparse_mode"] == 3 and "atten_mask" in node
    node.check_values(
        "speed_fusion_attention.sequences",
        _LISTS,
        T1=sizes.S1,
        T2=sizes.S2,
        W=node.shape("pse")[3] if pse == "packed" else None,
        equal="pse" in node,
        packed=pse == "packed",
        grows=grows,
    )
    return frozenset(["equal"] * ("pse" in node) + ["grows"] * grows)


# -- kernels --------------------------------------------------------------------------------------


def _describe(
    node: Node,
    sizes: Sizes,
    masked: bool,
    pse: str | None,
    rules: frozenset[str],
    wanted: list[str],
) -> AttentionProblem:
    a, layout = node.attrs, node.attrs["input_layout"]
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
        tensors |= {name: Tensor((B,), _integer_dtype(node, name)) for name in _LISTS}
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
        lists = [node.constants.get(name, node.attrs.get(name)) for name in _LISTS]
        if all(x is not None for x in lists):
            spans = [np.diff(np.asarray(x, "int64"), prepend=0) for x in lists]
            return relax.const(N1 * np.sum(spans[0] * spans[1]), "int64")
        args = [_tensor(node, name) for name in _LISTS]
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
            (), lambda: _int64(q.shape[batch]) * N1 * q.shape[row] * k.shape[row], name="numels"
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
        (), lambda: te.sum(length(ends_q) * length(ends_kv) * _int64(N1), axis=c), name="numels"
    )


# -- conditions on dimensions that may be symbolic ------------------------------------------------


def _static(node: Node, name: str, axis: int) -> int:
    size = node.shape(name)[axis]
    if not isinstance(size, int):
        node.fail(f'input "{name}" shape', _show(node.shape(name)), "static head number and size")
    return size


def _is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def _eq(a: Dim, b: Dim) -> bool | Expr:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return tir.EQ(_int64(a), _int64(b))


def _all(*conditions: bool | Expr) -> bool | Expr:
    open_ = [c for c in conditions if isinstance(c, Expr)]
    if not all(c for c in conditions if not isinstance(c, Expr)):
        return False
    return tir.all(*open_) if open_ else True


def _any(*conditions: bool | Expr) -> bool | Expr:
    open_ = [c for c in conditions if isinstance(c, Expr)]
    if any(c for c in conditions if not isinstance(c, Expr)):
        return True
    return tir.any(*open_) if open_ else False


def _int64(x: Dim) -> Expr:
    return tir.const(x, "int64") if isinstance(x, int) else x.astype("int64")


def _show(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


SPEED_FUSION_ATTENTION = Op(SCHEMA, lower, reference)
