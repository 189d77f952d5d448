"""SpeedFusionAttention: what a node must obey (sections 4 and 5 of the operator's specification).

The schema has judged arity, attribute types and most element types; rules on values that arrive
with the call are in ``runtime.speed_fusion_attention``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tvm.tirx as tir
from tvm import relax
from tvm.ir import Expr

from ..runtime.errors import InvalidTypeError, message
from ..runtime.speed_fusion_attention import MAX_LENGTH, MAX_PREFIXES, MAX_SEQUENCES
from .attention import LAYOUTS, PACKED_ROWS
from .dims import any_of, equal, is_one
from .op import Dim, Node

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
LISTS = ("actual_seq_qlen", "actual_seq_kvlen")
# Token values beyond this act alike under the rule of section 4.2, whose sizes end at 2**19.
_FAR = 1 << 40


@dataclass(frozen=True)
class Sizes:
    """B is the number of sequences, S1 and S2 are T1 and T2 in layout TND."""

    B: Dim
    N1: int
    N2: int
    S1: Dim
    S2: Dim
    D: int


class Checked(NamedTuple):
    """What the checks found out about a valid node."""

    sizes: Sizes
    masked: bool
    """atten_mask is read (modes 0, 1, 5)."""
    pse: str | None
    """The form of the bias, as ``AttentionProblem.pse`` names it."""
    sequence_rules: frozenset[str]
    """``AttentionProblem.sequence_rules_of``."""


def check(bb: relax.BlockBuilder, node: Node) -> Checked:
    """Refuse an invalid node; record what only the call can tell.

    Raises:
        InvalidNodeError, InvalidInputError, InvalidTypeError: naming the parameter, what was found
            and what is allowed.
    """
    _check_attributes(node)
    sizes = _check_shapes(bb, node)
    masked = _check_mask(bb, node, sizes)
    _check_prefix(bb, node, sizes)
    pse = _check_pse(bb, node, sizes)
    _check_scalars(bb, node)
    return Checked(sizes, masked, pse, _check_sequences(bb, node, sizes, pse))


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
    for name in ("prefix", *LISTS, "q_start_idx", "kv_start_idx"):
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
        lists = [node.shape(n) if n in node else (len(node.attrs.get(n, ())),) for n in LISTS]
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
    one_batch, one_head = is_one(shape[0]), is_one(shape[1])
    expected = (1 if one_batch else B, 1 if one_head else N1, S1, S2)
    node.require_shape(bb, "atten_mask", expected, allowed)
    if one_batch and (mode == 5 or not one_head):
        node.require(equal(B, 1), 'input "atten_mask" shape', (*shape,), allowed)


def _check_tokens(node: Node, sizes: Sizes) -> None:
    """The token rule of modes 0 and 4: the band is not empty and meets the S1 x S2 scores.

    Of p = pre_tokens - h and x = next_tokens + h, with h = S2 - S1 in mode 4, the rule asks
    p + x >= 0, -p < S2 and -x < S1 (its cases by sign say no more than that).
    """
    S1, S2 = sizes.S1, sizes.S2
    tokens = node.attrs["pre_tokens"], node.attrs["next_tokens"]
    pre, next_ = (min(max(t, -_FAR), _FAR) for t in tokens)
    below, above = (S1, S2) if node.attrs["sparse_mode"] == 4 else (S2, S1)
    for condition in (pre + next_ >= 0, below + pre > 0, above + next_ > 0):
        node.require(
            condition,
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
    batch = 1 if is_one(shape[0]) else B
    rows = shape[2]
    packed = tnd or (rows == PACKED_ROWS and not (isinstance(S1, int) and S1 <= PACKED_ROWS))
    if not packed:
        row = is_one(rows)
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
    plain = False if tnd else equal(S1, PACKED_ROWS)
    conditions = [
        ("atten_mask" in node, "without atten_mask", "with atten_mask"),
        (mode in (2, 3) or (mode == 0 and not tnd), f"sparse_mode {mode}", "sparse_mode 2, 3 or 0"),
    ]
    if not tnd:
        conditions.append((equal(S1, S2), [S1, S2], "S1 = S2"))
    if mode == 0:
        conditions.append((a["next_tokens"] == 0, a["next_tokens"], "next_tokens = 0"))
        conditions.append((a["pre_tokens"] >= S1, a["pre_tokens"], f"pre_tokens >= S1 = {S1}"))
    for condition, found, allowed in conditions:
        node.require(any_of(plain, condition), 'input "pse", packed form', found, allowed)


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
    for name in LISTS:
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
            node.require_shape(bb, name, (sizes.B,), f"as many values as {LISTS[0]}")
        length = sizes.B if name in node else len(node.attrs[name])
        allowed = f"1 to {MAX_SEQUENCES}"
        node.require(
            _all(length >= 1, length <= MAX_SEQUENCES), f'"{name}" length', length, allowed
        )
        node.require(equal(length, sizes.B), f'"{name}" length', length, f"{LISTS[0]}'s, {sizes.B}")
    if not tnd:
        return frozenset()
    grows = node.attrs["sparse_mode"] == 3 and "atten_mask" in node
    node.check_values(
        "speed_fusion_attention.sequences",
        LISTS,
        T1=sizes.S1,
        T2=sizes.S2,
        W=node.shape("pse")[3] if pse == "packed" else None,
        equal="pse" in node,
        packed=pse == "packed",
        grows=grows,
    )
    return frozenset(["equal"] * ("pse" in node) + ["grows"] * grows)


def _static(node: Node, name: str, axis: int) -> int:
    size = node.shape(name)[axis]
    if not isinstance(size, int):
        node.fail(f'input "{name}" shape', _show(node.shape(name)), "static head number and size")
    return size


def _all(*conditions: bool | Expr) -> bool | Expr:
    open_ = [c for c in conditions if isinstance(c, Expr)]
    if not all(c for c in conditions if not isinstance(c, Expr)):
        return False
    return tir.all(*open_) if open_ else True


def _show(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
