"""com.microsoft::QOrderedMatMul: int8 matrix product in cublasLt memory orders.

    v = alpha[n] * sum_k a[z, m, k] * b[z, k, n] + beta * c[z, m, n] + bias'[n]
    Y = clip(rint(v), -128, 127)                                        ties to even
    alpha = scale_A * scale_B / scale_Y, beta = scale_C / scale_Y, bias' = bias * (1 / scale_Y)

B is declared (K, N) and never stored so: ROW/COL nodes hold it column-major, which is a row-major
N x K matrix; tiled nodes hold the transposed N x K matrix in order_B. Letters: b batch, M K N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr

from ..frontend.schemas.qordered_matmul import SCHEMA
from ..reference.qordered_matmul import qordered_matmul
from . import quant
from .dims import any_of, divmod_, equal, int64, is_one, view
from .int8_matmul import At, Epilogue, Left, int8_matmul
from .int8_weight import Weight, pack_weight
from .op import Dim, Node, Op, te_kernel
from .orders import COLS, Order, col32, offset, row_major

COMBINATIONS = {
    (Order.ROW, Order.COL, Order.ROW): "row",
    (Order.COL32, Order.COL4_4R2_8C, Order.COL32): "tiled",
    (Order.COL32, Order.COL32_2R_4R4, Order.COL32): "tiled",
}
"""(order_A, order_B, order_Y) that exist."""

MAX_K = 131071
"""The largest K whose sum of products of -128 fits in int32."""


@dataclass(frozen=True)
class Problem:
    """Shapes of a node that passed its checks; leading axes of 2-D operands count as batch 1."""

    tiled: bool
    order_B: Order
    b: Dim
    b_B: Dim
    b_C: Dim
    m: Dim
    n: Dim
    k: Dim

    @property
    def collapsed(self) -> bool:
        """Row-major and one B for every batch: batch and rows are one run of rows."""
        return not self.tiled and is_one(self.b_B)


def check(bb: relax.BlockBuilder, node: Node) -> Problem:
    """Refuse what the schema cannot say; conditions on symbolic dimensions wait for the call."""
    orders = []
    for name in ("order_A", "order_B", "order_Y"):
        value = node.attrs[name]
        if value not in [order.value for order in Order]:
            node.fail(f'attribute "{name}"', value, ", ".join(f"{o.value} {o.name}" for o in Order))
        orders.append(Order(value))
    combination = COMBINATIONS.get(tuple(orders))
    if combination is None:
        allowed = " or ".join(str(tuple(int(o) for o in combo)) for combo in COMBINATIONS)
        found = tuple(int(order) for order in orders)
        node.fail('attributes "order_A", "order_B", "order_Y"', found, allowed)
    tiled = combination == "tiled"

    for name in ("A", "B", "C"):
        if name in node:
            if node.rank(name) not in (2, 3):
                node.fail(f'input "{name}" rank', node.rank(name), "2 or 3")
            for dim in node.shape(name):
                node.require(dim >= 1, f'input "{name}"', dim, "no empty axis")
    b, m, k = _matrices(node, "A")
    b_B, k_B, n = _matrices(node, "B")
    node.require(equal(k_B, k), 'input "B" K', k_B, f"{k}, the columns of A")
    k = k if isinstance(k, int) else k_B
    node.require(k <= MAX_K, "K", k, f"at most {MAX_K}: int32 could overflow")
    for name, dim, what in (("K", k, "columns of A"), ("N", n, "columns of Y")):
        if tiled:
            node.require(
                equal(dim % COLS, 0), f"{name}, {what}", dim, f"a multiple of {COLS} in COL32"
            )
    _check_batch(node, "B", b_B, b)
    node.require_shape(bb, "A", [*_lead(node, "A"), m, k])
    node.require_shape(bb, "B", [*_lead(node, "B"), k, n])

    b_C: Dim = 1
    if "C" in node:
        b_C = _matrices(node, "C")[0]
        _check_batch(node, "C", b_C, b)
        node.require_shape(bb, "C", [*_lead(node, "C"), m, n], f"(M, N) = ({m}, {n}) matrices")
        if "scale_C" not in node:
            node.fail('input "scale_C"', "none", "one element; it is required with C")
    if "bias" in node:
        if tiled:
            node.fail('input "bias"', "a tensor", "none: bias is not supported in the tiled orders")
        if node.rank("bias") != 1:
            node.fail('input "bias" rank', node.rank("bias"), "1")
        node.require_shape(bb, "bias", [n], f"shape ({n},)")
    for name in ("scale_A", "scale_B", "scale_Y", "scale_C"):
        if name in node and (name != "scale_C" or "C" in node):
            _check_scale(node, name, n if name == "scale_B" else None)
    return Problem(tiled, orders[1], b, b_B, b_C, m, n, k)


def _check_batch(node: Node, name: str, found: Dim, b: Dim) -> None:
    if not is_one(found):
        fits = any_of(equal(found, 1), equal(found, b))
        node.require(fits, f'input "{name}" batch', found, f"1 or {b}, the batch of A")


def _check_scale(node: Node, name: str, n: Dim | None) -> None:
    """One element, or one per column where ``n`` is given; what is known of the values."""
    shape = node.shape(name)
    vector = False
    if len(shape) > 1 or not all(is_one(dim) for dim in shape):
        allowed = "() or (1,)" + (f" or ({n},)" if n is not None else "")
        if len(shape) != 1 or n is None:
            node.fail(f'input "{name}" shape', shape, allowed)
        fits = any_of(equal(shape[0], 1), equal(shape[0], n))
        node.require(fits, f'input "{name}" shape', shape, allowed)
        vector = True
    values = node.constants.get(name)
    if values is None:
        return
    bad = ~np.isfinite(values)
    if not vector and name != "scale_C":
        bad |= values <= 0
    if bad.any():
        allowed = "finite values" if vector or name == "scale_C" else "a positive finite number"
        node.fail(f'input "{name}"', values[bad].flat[0], allowed)


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr]:
    p = check(bb, node)
    bias = node.constants.get("bias")
    if bias is not None and not np.isfinite(bias).all():
        node.fail('input "bias"', bias[~np.isfinite(bias)][0], "finite values")

    weight = _weight(bb, node, p)
    operands = _operands(bb, node, p, weight)
    y = int8_matmul(
        bb,
        node.target,
        "qordered_matmul.gemm",
        _left(bb, node, p),
        weight,
        _epilogue(node, p, list(operands)),
        operands=[*operands.values()],
        order=Order.COL32 if p.tiled else Order.ROW,
        weight_batch=_batch_of(p.b_B),
    )
    return [view(bb, y, [*_lead(node, "A"), p.m, p.n])]


def _left(bb: relax.BlockBuilder, node: Node, p: Problem) -> Left:
    if p.tiled:
        a = view(bb, node.inputs["A"], [p.b, p.k // COLS, p.m, COLS])
        return Left(a, p.m, p.b, col32)
    if p.collapsed:
        return Left(view(bb, node.inputs["A"], [1, p.b * p.m, p.k]), p.b * p.m)
    return Left(view(bb, node.inputs["A"], [p.b, p.m, p.k]), p.m, p.b)


def _weight(bb: relax.BlockBuilder, node: Node, p: Problem) -> Weight:
    if p.tiled:  # flat bytes of the N x K matrix
        shape = [p.b_B, p.n * p.k]

        def entry(t, z, n, k):
            return t[z, offset(p.order_B, n, k, p.n, p.k)]

    else:
        shape, entry = [p.b_B, p.n, p.k], row_major
    constant = node.constants.get("B")
    source = view(bb, node.inputs["B"], shape) if constant is None else constant.reshape(shape)
    return pack_weight(
        bb,
        node.target,
        source,
        n=p.n,
        k=p.k,
        batch=p.b_B,
        entry=entry,
        panel=COLS if p.tiled else None,
    )


def _operands(
    bb: relax.BlockBuilder, node: Node, p: Problem, weight: Weight
) -> dict[str, relax.Expr]:
    """What the epilogue reads, by name: ``alpha``, ``bias`` float32 over the padded columns,
    ``beta`` float32 (1,), ``C`` int8 in the output's order.
    """
    length = weight.padded_n

    def derived(formula: Callable, size: Dim, *names: str) -> relax.Expr:
        """``formula`` of inputs spread over ``size``; its last elements stand for the padding."""
        known = [node.constants.get(name) for name in names]
        if isinstance(size, int) and all(value is not None for value in known):
            values = [np.atleast_1d(value).astype(np.float32) for value in known]
            result = np.atleast_1d(formula(*values))
            return relax.const(np.pad(result, (0, size - len(result)), "edge"))

        def compute(*tensors: te.Tensor) -> te.Tensor:
            return te.compute((int64(size),), lambda j: formula(*(_element(t, j) for t in tensors)))

        return te_kernel(bb, "qordered_matmul.scales", compute, *(node.inputs[n] for n in names))

    if all(is_one(dim) for dim in node.shape("scale_B")):
        alpha = derived(lambda a, b, y: a * b / y, length, "scale_A", "scale_B", "scale_Y")
    else:
        alpha = derived(lambda a, b, y: b * (a / y), length, "scale_A", "scale_B", "scale_Y")
    operands = {"alpha": alpha}
    if "bias" in node:
        operands["bias"] = derived(lambda x, y: x * (_one_over(y)), length, "bias", "scale_Y")
    if "C" in node:
        operands["beta"] = derived(lambda c, y: c / y, 1, "scale_C", "scale_Y")
        shape = [p.b_C, p.n // COLS, p.m, COLS] if p.tiled else [p.b_C, p.m, p.n]
        operands["C"] = view(bb, node.inputs["C"], shape)
    return operands


def _epilogue(node: Node, p: Problem, names: Sequence[str]) -> Epilogue:
    """float32 arithmetic on operands that come in the order of ``names``."""
    read = col32 if p.tiled else row_major
    batch_of, to_int8 = _batch_of(p.b_C), quant.int8_cast(node.target)

    def epilogue(acc: Expr, at: At, *tensors: te.Tensor) -> Expr:
        given = dict(zip(names, tensors))
        v = given["alpha"][at.col] * acc.astype("float32")
        if "bias" in given:
            v = v + given["bias"][at.col]
        if "C" in given:
            z, row = divmod_(at.row, p.m) if p.collapsed else (at.z, at.row)
            c = read(given["C"], batch_of(z), row, at.n)
            v = v + given["beta"][int64(0)] * c.astype("float32")
        return to_int8(v)

    return epilogue


def _batch_of(batch: Dim) -> Callable[[Expr], Expr]:
    """Matrix of an operand that has ``batch`` matrices, 1 or as many as A, for entry z."""
    if is_one(batch):
        return lambda z: int64(0)
    return lambda z: z if isinstance(batch, int) else tirx.min(z, batch - 1)


def _matrices(node: Node, name: str) -> tuple[Dim, Dim, Dim]:
    """(batch, rows, columns) of an operand as declared."""
    shape = node.shape(name)
    return shape if len(shape) == 3 else (1, *shape)


def _lead(node: Node, name: str) -> tuple[Dim, ...]:
    return node.shape(name)[:-2]


def _element(t: te.Tensor, j: Expr) -> Expr:
    return t(tirx.min(j, t.shape[0] - 1)) if len(t.shape) else t()


def _one_over(y):
    return np.float32(1) / y if isinstance(y, np.ndarray) else tirx.const(1.0, "float32") / y


QORDERED_MATMUL = Op(SCHEMA, lower, qordered_matmul)
