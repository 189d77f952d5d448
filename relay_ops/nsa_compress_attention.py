"""npu::NPUNsaCompressAttention: attention over compressed keys, and the blocks it would select.

For every query row t of a sequence and every head h, with h2 = h // G its key/value head:

    S[i]     = scale * q . k[i], replaced by -FLT_MAX where atten_mask[t, i]
    P        = softmax(S) over the sequence's compressed keys
    out      = P . v
    score[j] = sum over the G heads of sum_c w(c) * P[r*(j+1) - c - score_shift],  FLT_MAX if forced
    indices  = the k best j, descending score, ascending index among equals, -1 where there are none

Layouts: query [T, N1, Dqk], key [T2, N2, Dqk], value [T2, N2, Dv], sequences packed one after the
other and described by prefix sums; r = l' / d, n = l // d. Products, softmax and scores are
float32 whatever the storage type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tvm.tirx as tir
from tvm import relax
from tvm.ir import Expr

from ..frontend.schemas.nsa_compress_attention import SCHEMA
from ..reference.nsa_compress_attention import nsa_compress_attention
from ..runtime.nsa_compress_attention import CMP_SKV_LIMIT, LENGTHS
from ..schedules import tir_builder
from .op import Dim, Node, Op, tir_kernel

KERNEL_NAME = "nsa_compress_attention.attend_select"
FLT_MAX = 3.4028234663852886e38
"""Score of a forced block; its negative replaces the score of a masked key."""
SOFTMAX_COPIES = 8
"""How often softmax_max and softmax_sum repeat a row's value on their last axis."""

_OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")


@dataclass(frozen=True)
class Problem:
    """What a kernel is built for; token, sequence and mask extents are the kernel's own symbols.

    Kernel inputs, in this order: query, key, value, atten_mask and topk_mask where present, the
    three length lists int64 [B]. Outputs: those of ``outputs``, in the schema's order.
    """

    label: str
    """The node's name for messages."""
    dtype: str
    """Storage type of query, key, value and attention_out."""
    query_heads: int
    key_heads: int
    head_size: int
    value_size: int
    scale: float
    blocks_stride: int
    """r: compressed keys per selection block."""
    keys_stride: int
    """n: strides per compression window, rounded down; n <= r."""
    score_shift: int
    block_count: int
    """k: indices per row."""
    atten_mask: str | None
    """Element type of the mask, bool or uint8; None when absent."""
    topk_mask: str | None
    zero_masked_rows: bool
    """A row without a visible key has P = 0 and L = 0, in place of uniform P."""
    softmax_by_token: bool
    """Softmax records lie at [t, h], in place of [h, t] within each sequence."""
    outputs: frozenset[str]

    @property
    def group(self) -> int:
        """G: query heads that share a key/value head."""
        return self.query_heads // self.key_heads

    @property
    def taps(self) -> int:
        """Length of the importance window."""
        return self.blocks_stride + self.keys_stride - 1

    @property
    def cmp_skv_limit(self) -> int:
        """Most compressed keys of one sequence."""
        return CMP_SKV_LIMIT

    def blocks(self, keys: Expr) -> Expr:
        """SelSkv: selection blocks of a sequence of ``keys`` compressed keys."""
        return tir.ceildiv(keys, self.blocks_stride)

    def newest_key(self, block: Expr) -> Expr:
        """Key that tap 0 of ``block``'s window weighs; tap c weighs the c-th key before it.

        ``block`` counts from 0 and the window ends where the next block starts: the vendor's
        origin, one key later than the tokens that the block stands for.
        """
        return self.blocks_stride * (block + 1) - self.score_shift

    def blocks_from(self, keys: Expr) -> Expr:
        """How many blocks have a window that begins before key ``keys``."""
        return (keys + self.taps - 2 + self.score_shift) // self.blocks_stride

    def weight(self, tap: Expr) -> Expr:
        """w(c): in how many ways c is m + n' with m < r and n' < n."""
        return tir.min(tir.min(tap + 1, self.keys_stride), self.taps - tap)

    def softmax_record(self, first: Expr, rows: Expr, row: Expr, head: Expr) -> tuple[Expr, Expr]:
        """Leading two indices, in [T, N1, 8], of the record of (row, head) of the sequence that
        owns the packed rows ``first`` to ``first + rows``.
        """
        if self.softmax_by_token:
            return first + row, head
        flat = self.query_heads * first + head * rows + row
        return flat // self.query_heads, flat % self.query_heads


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr | None]:
    """One kernel computes the outputs that the graph uses.

    Raises InvalidNodeError for shapes, attributes and constant length lists that break the
    operator's rules; length lists fed by the caller are judged at the call.
    """
    _check_attributes(node)
    tokens, query_heads, head_size = _check_tensors(bb, node)
    key_tokens, key_heads, value_size = node.shape("value")
    lengths = _length_lists(bb, node, tokens, key_tokens)

    attrs = node.attrs
    problem = Problem(
        label=node.label,
        dtype=node.dtype("query"),
        query_heads=query_heads,
        key_heads=key_heads,
        head_size=head_size,
        value_size=value_size,
        scale=float(np.float32(attrs["scale_value"])),
        blocks_stride=attrs["select_block_size"] // attrs["compress_stride"],
        keys_stride=attrs["compress_block_size"] // attrs["compress_stride"],
        score_shift=attrs["score_shift"],
        block_count=attrs["select_block_count"],
        atten_mask=node.dtype("atten_mask") if "atten_mask" in node else None,
        topk_mask=node.dtype("topk_mask") if "topk_mask" in node else None,
        zero_masked_rows=attrs["masked_rows"] == "zero",
        softmax_by_token=attrs["softmax_out_layout"] == "same_as_input",
        outputs=node.outputs,
    )
    types = {
        "softmax_max": relax.TensorType((tokens, query_heads, SOFTMAX_COPIES), "float32"),
        "softmax_sum": relax.TensorType((tokens, query_heads, SOFTMAX_COPIES), "float32"),
        "attention_out": relax.TensorType((tokens, query_heads, value_size), problem.dtype),
        "topk_indices_out": relax.TensorType((tokens, key_heads, problem.block_count), "int32"),
    }
    masks = [node.inputs[name] for name in ("atten_mask", "topk_mask") if name in node]
    used = [name for name in _OUTPUTS if name in node.outputs]
    result = tir_kernel(
        bb,
        KERNEL_NAME,
        tir_builder(KERNEL_NAME, node.target)(problem, node.target),
        [*(node.inputs[name] for name in ("query", "key", "value")), *masks, *lengths],
        [types[name] for name in used],
    )
    if len(used) == 1:  # a call with one result is a tensor, not a tuple
        return [result if name in node.outputs else None for name in _OUTPUTS]
    produced = {name: bb.emit(relax.TupleGetItem(result, i)) for i, name in enumerate(used)}
    return [produced.get(name) for name in _OUTPUTS]


def _check_attributes(node: Node) -> None:
    def attribute(name: str, ok: bool, allowed: str) -> None:
        node.require(ok, f'attribute "{name}"', repr(attrs[name]), allowed)

    attrs = node.attrs
    attribute("scale_value", math.isfinite(attrs["scale_value"]), "a finite number")
    attribute("input_layout", attrs["input_layout"] == "TND", "'TND'")
    attribute("sparse_mode", attrs["sparse_mode"] in (0, 1), "0 or 1")
    size, stride, block = (
        attrs[name] for name in ("compress_block_size", "compress_stride", "select_block_size")
    )
    for name in ("compress_block_size", "compress_stride", "select_block_size"):
        attribute(name, attrs[name] >= 16 and attrs[name] % 16 == 0, "a positive multiple of 16")
    attribute("compress_stride", stride <= size, f"at most compress_block_size ({size})")
    attribute("select_block_size", block >= size, f"at least compress_block_size ({size})")
    attribute("select_block_size", block % stride == 0, f"a multiple of compress_stride ({stride})")
    attribute("select_block_count", 1 <= attrs["select_block_count"] < 2**31, "1 to 2**31 - 1")
    layouts, rows, ratio = ("", "same_as_input"), ("mean", "zero"), block // stride
    attribute(
        "softmax_out_layout",
        attrs["softmax_out_layout"] in layouts,
        " or ".join(map(repr, layouts)),
    )
    attribute("masked_rows", attrs["masked_rows"] in rows, " or ".join(map(repr, rows)))
    attribute(
        "score_shift",
        0 <= attrs["score_shift"] <= ratio,
        f"0 to {ratio} (select_block_size / compress_stride)",
    )


def _check_tensors(bb: relax.BlockBuilder, node: Node) -> tuple[Dim, int, int]:
    """Shapes of query, key, value and masks. Returns T, N1, Dqk."""
    for name, rank in {"query": 3, "key": 3, "value": 3, "atten_mask": 2, "topk_mask": 2}.items():
        if name in node:
            _check_rank(node, name, rank)
            for dim in node.shape(name):
                _check_extent(node, name, dim)
    for name in ("query", "key", "value"):
        for axis, dim in enumerate(node.shape(name)[1:], 1):
            if not isinstance(dim, int):
                node.fail(f'input "{name}" axis {axis}', f"symbolic {dim}", "a static size")
    tokens, query_heads, head_size = node.shape("query")
    _, key_heads, key_size = node.shape("key")
    value_size = node.shape("value")[2]
    node.require(
        key_size == head_size, 'input "key" head size', key_size, f"{head_size}, that of query"
    )
    node.require_shape(bb, "value", (node.shape("key")[0], key_heads, value_size))
    node.require(
        value_size <= head_size,
        'input "value" head size',
        value_size,
        f"at most {head_size}, that of query",
    )
    head_num = node.attrs["head_num"]
    node.require(
        head_num == query_heads, 'attribute "head_num"', head_num, f"{query_heads}, query's axis 1"
    )
    node.require(
        query_heads % key_heads == 0 and query_heads // key_heads in (1, 2, 4, 8, 16, 32, 64),
        "query heads and key heads",
        (query_heads, key_heads),
        "a ratio of 1, 2, 4, 8, 16, 32 or 64",
    )
    return tokens, query_heads, head_size


def _check_rank(node: Node, name: str, rank: int) -> None:
    node.require(node.rank(name) == rank, f'input "{name}" rank', node.rank(name), str(rank))


def _check_extent(node: Node, name: str, dim: Dim) -> None:
    if isinstance(dim, int):
        node.require(dim >= 1, f'input "{name}" shape', node.shape(name), "no zero-sized dimension")


def _length_lists(
    bb: relax.BlockBuilder, node: Node, tokens: Dim, key_tokens: Dim
) -> list[relax.Expr]:
    """The three lists as int64 [B] tensors, their values checked now or at the call."""
    for name in LENGTHS:
        if name not in node and name not in node.attrs:
            node.fail(f'"{name}"', "neither an input nor an attribute", "one of the two")
        if name in node:
            _check_rank(node, name, 1)
            _check_extent(node, name, node.shape(name)[0])
    masks = {
        f"{mask}_{axis}": node.shape(mask)[i] if mask in node else None
        for mask in ("atten_mask", "topk_mask")
        for i, axis in enumerate(("rows", "columns"))
    }
    node.check_values(
        "nsa_compress_attention.lengths",
        LENGTHS,
        tokens=tokens,
        key_tokens=key_tokens,
        blocks_stride=node.attrs["select_block_size"] // node.attrs["compress_stride"],
        **masks,
    )
    # Statically known B first: the others are then matched against it.
    sizes = [node.shape(name)[0] if name in node else len(node.attrs[name]) for name in LENGTHS]
    sequences = next((size for size in sizes if isinstance(size, int)), sizes[0])
    return [
        node.require_shape(bb, name, (sequences,))
        if name in node
        else relax.const(np.asarray(node.attrs[name], np.int64), "int64")
        for name in LENGTHS
    ]


NSA_COMPRESS_ATTENTION = Op(SCHEMA, lower, nsa_compress_attention)
