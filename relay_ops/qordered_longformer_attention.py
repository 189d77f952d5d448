"""com.microsoft QOrderedLongformerAttention: a quantised Longformer self-attention layer.

    p[b, s, n] = f16(scale * sat8(alpha[n] * (x . w)[b, s, n] + bias[n]))      Q, K, V; GQ, GK, GV
    local i:   keys |i - j| <= W and all global j, from Q, K, V
    global i:  all keys, from GQ, GK, GV
    o[i] = sum_j softmax_j(q_i . k_j / sqrt(D) + mask[j]) v_j;  0 where mask[i] < 0
    y = sat8(f16(o) / scale_output)

B batch, S sequence, H = N*D hidden, N heads, D head size, W one-sided window. Projections stay int8
in memory, the attention reads them as float16 numbers; nothing is S x S. GK and GV are computed at
all positions, GQ at the global tokens only, and none of them where no flag is set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from ..frontend.schemas.qordered_longformer_attention import SCHEMA
from ..reference.qordered_longformer_attention import qordered_longformer_attention as reference
from ..runtime.errors import UnsupportedError, message
from ..schedules import tir_builder
from .dims import int64, view
from .int8_matmul import Left, int8_matmul
from .int8_weight import pack_weight
from .op import Dim, Node, Op, te_kernel, tir_kernel
from .orders import COLS, Order, col32, offset, tile
from .quant import int8_cast

NAME = "qordered_longformer_attention"

# order_input -> orders of the weights that go with it.
ORDERS = {
    Order.ROW: (Order.COL,),
    Order.COL32: (Order.COL4_4R2_8C, Order.COL32_2R_4R4),
}

_ONE_ELEMENT = ("scale_input", "scale_bias", "scale_qkv_gemm", "scale_global_gemm", "scale_output")
_PER_COLUMN = ("scale_weight", "scale_global_weight")
_OF_ATTENTION = ("scale_qkv_gemm", "scale_global_gemm", "scale_output")


@dataclass(frozen=True)
class Problem:
    """What the kernels are built for; batch and sequence stay open."""

    batch: Dim
    seq: Dim
    num_heads: int
    head_size: int
    window: int
    order: Order
    """Of input and output."""

    @property
    def hidden(self) -> int:
        return self.num_heads * self.head_size

    @property
    def col32(self) -> bool:
        return self.order == Order.COL32

    @property
    def stored_shape(self) -> tuple[Dim, ...]:
        """[B, S, H], or the axes of COL32: [B, H/32, S, 32]."""
        if self.col32:
            return (self.batch, self.hidden // COLS, self.seq, COLS)
        return (self.batch, self.seq, self.hidden)


def check(bb: relax.BlockBuilder, node: Node) -> Problem:
    """Judge attributes, shapes and constant scales; section 5 of the specification."""
    order = _check_orders(node)
    num_heads, window = (_positive(node, name) for name in ("num_heads", "window"))
    node.require(window < 2**30, 'attribute "window"', window, "less than 2**30")
    if node.rank("input") != 3:
        node.fail('input "input"', f"shape {_shown(node, 'input')}", "shape (B, S, H)")
    batch, seq, _ = node.shape("input")
    hidden = _hidden(node)
    for name in ("input", "weight", "global_weight"):
        if 0 in [dim for dim in node.shape(name) if isinstance(dim, int)]:
            node.fail(f'input "{name}"', f"shape {_shown(node, name)}", "no dimension of 0")
    if hidden % num_heads:
        node.fail('attribute "num_heads"', num_heads, f"a divisor of H = {hidden}")
    if hidden % tile(order)[1]:
        node.fail(f"order_input {int(order)} (COL32)", f"H = {hidden}", "a multiple of 32")
    _check_swapped(node, hidden)
    shapes = {
        "input": (batch, seq, hidden),
        "weight": (hidden, 3 * hidden),
        "bias": (3 * hidden,),
        "mask": (batch, seq),
        "global_weight": (hidden, 3 * hidden),
        "global_bias": (3 * hidden,),
        "global": (batch, seq),
    }
    for name, shape in shapes.items():
        node.require_shape(bb, name, shape)
    for name in _ONE_ELEMENT:
        _check_scale(bb, node, name, (1,))
    for name in _PER_COLUMN:
        _check_scale(bb, node, name, (1, hidden, 3 * hidden))
    node.require(
        seq % (2 * window) == 0,
        'input "input" axis 1, the sequence length S',
        seq,
        f"a multiple of 2 * window = {2 * window}; pad the sequence",
    )
    return Problem(batch, seq, num_heads, hidden // num_heads, window, order)


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr]:
    """Projections as int8 matmuls, then one attention kernel.

    How many rows the global projections have is known only when the flags are. On a CPU the sizes
    become dimensions that a tensor defines; elsewhere there is room for all that there may be, and
    the kernels read the sizes where they lie.
    """
    problem = check(bb, node)
    batch, seq, hidden = problem.batch, problem.seq, problem.hidden

    def kernel(name: str, args: list[relax.Expr], *types: tuple[tuple[Dim, ...], str]):
        build = tir_builder(f"{NAME}.{name}", node.target)
        out = [relax.TensorType(shape, dtype) for shape, dtype in types]
        out = out[0] if len(out) == 1 else out
        return tir_kernel(bb, f"{NAME}.{name}", build(problem, node.target), args, out)

    found = kernel(
        "global_tokens",
        [node.inputs["global"]],
        ((batch, seq), "int32"),
        ((batch, seq + 1), "int32"),
        ((batch,), "int32"),
        ((2,), "int64"),
    )
    positions, rank, offsets, sizes = (bb.emit(relax.TupleGetItem(found, i)) for i in range(4))
    rows = batch * seq
    if not isinstance(rows, int):
        # A symbol of its own: schedules prove nothing about products.
        rows = tirx.Var("rows", "int64")
        bb.match_cast(bb.emit(relax.ShapeExpr([batch * seq])), relax.ShapeType([rows]))
    matrix = seq if problem.col32 else rows
    if node.target.kind.name == "llvm":
        tokens, length = (tirx.Var(name, "int64") for name in ("global_tokens", "global_length"))
        bb.match_cast(bb.emit(relax.op.tensor_to_shape(sizes)), relax.ShapeType([tokens, length]))
        of_tokens = of_length = None
    else:  # the host does not wait for what only the device knows
        tokens, length = rows, matrix
        of_tokens, of_length = (sizes, 0), (sizes, 1)

    x = view(bb, node.inputs["input"], problem.stored_shape)
    gathered = kernel(
        "gather_global_rows", [x, positions, rank, offsets], ((1, tokens, hidden), "int8")
    )
    if problem.col32:
        whole, part = Left(x, seq, batch, col32), Left(x, length, batch, col32)
    else:  # one matrix of B*S rows
        flat = view(bb, x, (1, batch * seq, hidden))
        flat = bb.match_cast(flat, relax.TensorType((1, rows, hidden), "int8"))
        whole, part = Left(flat, rows), Left(flat, length)
    qkv = _project(bb, node, LOCAL, whole, hidden, 0, 3 * hidden)
    gkv = _project(bb, node, GLOBAL, part, hidden, hidden, 3 * hidden, of_length)
    gq = _project(bb, node, GLOBAL, Left(gathered, tokens), hidden, 0, hidden, of_tokens)
    if problem.col32:
        qkv = view(bb, qkv, (1, batch * seq, 3 * hidden))
        gkv = view(bb, gkv, (1, batch * length, 2 * hidden))
    y = kernel(
        "attention",
        [
            qkv,
            gq,
            gkv,
            node.inputs["mask"],
            positions,
            rank,
            offsets,
            *(view(bb, node.inputs[name], (1,)) for name in _OF_ATTENTION),
        ],
        (problem.stored_shape, "int8"),
    )
    return [view(bb, y, (batch, seq, hidden))]


@dataclass(frozen=True)
class Projection:
    """What the inputs and the order attribute of one of the two projections are called."""

    weight: str
    scale_weight: str
    bias: str
    scale: str
    order: str


LOCAL = Projection("weight", "scale_weight", "bias", "scale_qkv_gemm", "order_weight")
GLOBAL = Projection(
    "global_weight",
    "scale_global_weight",
    "global_bias",
    "scale_global_gemm",
    "order_global_weight",
)


def _project(
    bb: relax.BlockBuilder,
    node: Node,
    names: Projection,
    left: Left,
    hidden: int,
    first: int,
    stop: int,
    live_rows: tuple[relax.Expr, int] | None = None,
) -> relax.Expr:
    """Stage 1 for columns first..stop-1: int8 [batch, M, stop - first]."""
    columns = stop - first
    order = Order(node.attrs[names.order])
    # COL bytes are a row-major (3H, H) matrix; the tiled orders hold that matrix in tiles.
    stored = (3 * hidden, hidden) if order is Order.COL else (3 * hidden * hidden,)

    def entry(w, z, n, k):
        if order is Order.COL:
            return w[n + first, k]
        return w[offset(order, n + first, k, 3 * hidden, hidden)]

    def alpha(n, scale_input, scale_weight, scale):
        length = int(scale_weight.shape[0])
        return scale_input[0] * scale_weight[(n + first) % length] / scale[0]

    def bias(n, values):
        return values[n + first]

    to_int8 = int8_cast(node.target)

    def requantise(acc, at, alpha, bias):
        return to_int8(alpha[at.col] * acc.astype("float32") + bias[at.col])

    constant = node.constants.get(names.weight)
    source = view(bb, node.inputs[names.weight], stored) if constant is None else constant
    source = source if constant is None else constant.reshape(stored)
    weight = pack_weight(bb, node.target, source, n=columns, k=hidden, entry=entry)
    scales = ("scale_input", names.scale_weight, names.scale)
    operands = [
        weight.columns(bb, _per_column(bb, node, alpha, scales, columns)),
        weight.columns(bb, _per_column(bb, node, bias, (names.bias,), columns)),
    ]
    return int8_matmul(
        bb,
        node.target,
        f"{NAME}.gemm",
        left,
        weight,
        requantise,
        operands=operands,
        live_rows=live_rows,
    )


def _per_column(
    bb: relax.BlockBuilder,
    node: Node,
    formula: Callable[..., Any],
    names: tuple[str, ...],
    columns: int,
) -> np.ndarray | relax.Expr:
    """float32 ``formula(n, *inputs)`` of every column n: an array if the inputs are known, else by
    a kernel. Either way operations are float32 and in the order written.
    """
    if all(name in node.constants for name in names):
        values = [node.constants[name].reshape(-1) for name in names]
        return formula(np.arange(columns), *values)
    tensors = [view(bb, node.inputs[name], (_elements(node, name),)) for name in names]

    def compute(*tensors: te.Tensor) -> te.Tensor:
        return te.compute((int64(columns),), lambda n: formula(n, *tensors), name="per_column")

    return te_kernel(bb, f"{NAME}.per_column", compute, *tensors)


def _elements(node: Node, name: str) -> int:
    return int(np.prod(node.shape(name), dtype=np.int64))


def _shown(node: Node, name: str) -> str:
    return "(" + ", ".join(map(str, node.shape(name))) + ")"


def _positive(node: Node, name: str) -> int:
    value = node.attrs[name]
    if value < 1:
        node.fail(f'attribute "{name}"', value, "at least 1; a missing attribute counts as 0")
    return value


def _check_orders(node: Node) -> Order:
    def choose(name: str, allowed: tuple[Order, ...], because: str = "") -> Order:
        value = node.attrs[name]
        if value not in allowed:
            listed = " or ".join(f"{int(order)} ({order.name})" for order in allowed)
            node.fail(
                f'attribute "{name}"', value, f"{listed}{because}; a missing attribute counts as 0"
            )
        return Order(value)

    order = choose("order_input", tuple(ORDERS))
    because = f" with order_input {int(order)}"
    choose("order_weight", ORDERS[order], because)
    choose("order_global_weight", ORDERS[order], because)
    choose("order_output", (order,), because)
    return order


def _hidden(node: Node) -> int:
    """H, from whichever tensor has it static: the tiles must know it."""
    for name in ("weight", "global_weight"):
        if node.rank(name) != 2:
            node.fail(f'input "{name}"', f"shape {_shown(node, name)}", "shape (H, 3H)")
    for name, axis in (("input", 2), ("weight", 0), ("global_weight", 0)):
        if isinstance(hidden := node.shape(name)[axis], int):
            return hidden
    raise UnsupportedError(
        message(node.label, 'input "weight"', f"shape {_shown(node, 'weight')}", "a static H")
    )


def _check_swapped(node: Node, hidden: int) -> None:
    """A published table of the inputs is shifted by one here, so that some swap the two."""
    bias, scale = node.shape("global_bias"), node.shape("scale_global_gemm")
    if bias in ((), (1,)) and scale == (3 * hidden,):
        node.fail(
            'inputs "global_bias" and "scale_global_gemm"',
            f"shapes {_shown(node, 'global_bias')} and {_shown(node, 'scale_global_gemm')}, "
            "which look swapped",
            f"shapes ({3 * hidden},) and () or (1,)",
        )


def _check_scale(bb: relax.BlockBuilder, node: Node, name: str, lengths: tuple[int, ...]) -> None:
    """A scalar or a vector of one of ``lengths``; positive and finite where it is known."""
    allowed = "shape () or " + " or ".join(f"({length},)" for length in lengths)
    shape = node.shape(name)
    if len(shape) > 1 or (shape and isinstance(shape[0], int) and shape[0] not in lengths):
        node.fail(f'input "{name}"', f"shape {_shown(node, name)}", allowed)
    if shape and not isinstance(shape[0], int):
        if len(lengths) > 1:
            node.fail(f'input "{name}"', f"shape {_shown(node, name)}", f"a static {allowed}")
        node.require_shape(bb, name, lengths, allowed)
    values = node.constants.get(name)
    if values is not None and name != "scale_bias":
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            node.fail(f'input "{name}"', wrong.flat[0], "finite values above 0")


QORDERED_LONGFORMER_ATTENTION = Op(SCHEMA, lower, reference)
