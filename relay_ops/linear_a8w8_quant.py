"""npu::NPUQuantMatmul, the quantised linear layer LinearA8W8Quant.

    acc[.., i, j] = sum_l x1[.., i, l] * x2[.., l, j] + int32 bias       int32, modulo 2^32
    int32             y = acc
    int8              y = clip(clip(rint(acc * m1), -256, 255) + o9, -128, 127)
    float16, packed   y = float16(acc * m1)
    float path        y = cast(acc * scale * pertoken_scale + float bias)

m1 and o9 are what a 64-bit packed scale holds: ten mantissa bits of a float32, a nine-bit offset. A
float32 scale is packed first wherever the packed path is taken, so it loses 13 bits there.
Letters: b1, b2 batch dimensions, m k n of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NoReturn

import numpy as np
from onnx import TensorProto
from tvm import relax, te, tirx
from tvm.ir import Expr

from ..frontend.schemas.linear_a8w8_quant import OUTPUT_DTYPES, SCHEMA
from ..reference.linear_a8w8_quant import linear_a8w8_quant
from . import quant
from .dims import any_of, divmod_, equal, int64, is_one, same, view
from .int8_matmul import At, BatchMap, Epilogue, Left, int8_matmul
from .int8_weight import Weight, pack_weight
from .op import Dim, Node, Op, te_kernel
from .orders import row_major, transposed

MAX_STORED_DIM = 65535
RANKS = range(2, 7)
PACKED_DTYPES = ("int64", "uint64")
DTYPE_NAMES = {
    TensorProto.INT8: "int8",
    TensorProto.INT32: "int32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


Decode = Callable[[Expr], Expr]
DecodeArray = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Problem:
    """Shapes of a node that passed its checks."""

    b1: tuple[Dim, ...]
    b2: tuple[Dim, ...]
    batch: tuple[Dim, ...]
    """broadcast(b1, b2), the leading dimensions of y."""
    m: Dim
    n: Dim
    k: Dim
    output: str
    """dtype of y."""

    is_packed: bool
    """The scale goes through its 64-bit form."""

    @property
    def collapsed(self) -> bool:
        """One weight for every batch: batch and rows of x1 are one run of rows."""
        return all(is_one(dim) for dim in self.b2)


def check(bb: relax.BlockBuilder, node: Node) -> Problem:
    """Refuse what the schema cannot say; conditions on symbolic dimensions wait for the call."""
    code = node.attrs["output_dtype"]
    if code not in OUTPUT_DTYPES:
        _refuse(node, 'attribute "output_dtype"', code, sorted(OUTPUT_DTYPES), "E-ATTR")
    for flag in ("transpose_x1", "transpose_x2"):
        if node.attrs[flag] not in (0, 1):
            _refuse(node, f'attribute "{flag}"', node.attrs[flag], "0 or 1", "E-ATTR")
    output = DTYPE_NAMES[OUTPUT_DTYPES[code]]

    for name in ("x1", "x2"):
        if node.rank(name) not in RANKS:
            _refuse(node, f'input "{name}" rank', node.rank(name), "2 to 6", "E-RANK")
    for name in ("scale", "offset", "pertoken_scale"):
        if name in node and node.rank(name) != 1:
            _refuse(node, f'input "{name}" rank', node.rank(name), "1", "E-RANK")
    rank = max(node.rank("x1"), node.rank("x2"))
    if "bias" in node:
        if node.rank("bias") not in (1, 3):
            _refuse(node, 'input "bias" rank', node.rank("bias"), "1 or 3", "E-RANK")
        if node.rank("bias") == 3 and rank != 3:
            allowed = f"1, the output having rank {rank}"
            _refuse(node, 'input "bias" rank', 3, allowed, "E-RANK")

    for name in ("x1", "x2", "scale"):
        for dim in node.shape(name):
            _require(
                node, dim >= 1, f'input "{name}"', node.shape(name), "no empty axis", "E-EMPTY"
            )
    for name in ("x1", "x2"):
        last = node.shape(name)[-1]
        allowed = f"at most {MAX_STORED_DIM}"
        _require(
            node, last <= MAX_STORED_DIM, f'input "{name}" last axis', last, allowed, "E-LIMIT"
        )

    problem = _check_shapes(bb, node, output)
    _check_combination(node, output)
    return problem


def _check_shapes(bb: relax.BlockBuilder, node: Node, output: str) -> Problem:
    *b1, m, k = _read(node.shape("x1"), node.attrs["transpose_x1"])
    *b2, k2, n = _read(node.shape("x2"), node.attrs["transpose_x2"])
    if isinstance(k, int):
        _require(node, equal(k2, k), 'input "x2" k', k2, f"{k}, the k of x1", "E-SHAPE")
    else:
        _require(node, equal(k, k2), 'input "x1" k', k, f"{k2}, the k of x2", "E-SHAPE")
    k = k if isinstance(k, int) else k2
    batch = _broadcast(node, b1, b2)
    # One symbol for one size from here on.
    node.require_shape(bb, "x1", [*b1, *_read((m, k), node.attrs["transpose_x1"])])
    node.require_shape(bb, "x2", [*b2, *_read((k, n), node.attrs["transpose_x2"])])

    for name in ("scale", "offset"):
        if name in node:
            (length,) = node.shape(name)
            either = any_of(equal(length, 1), equal(length, n))
            _require(node, either, f'input "{name}" length', length, f"1 or n = {n}", "E-SHAPE")
    if "pertoken_scale" in node:
        node.require_shape(bb, "pertoken_scale", [m], f"shape ({m},), one per row of x1 [E-SHAPE]")
    if "bias" in node and node.rank("bias") == 1:
        node.require_shape(bb, "bias", [n], f"shape ({n},) [E-SHAPE]")
    elif "bias" in node:
        node.require_shape(bb, "bias", [*batch, 1, n], f"shape ({batch[0]}, 1, {n}) [E-SHAPE]")
    packed = output == "int8" or (output == "float16" and "pertoken_scale" not in node)
    return Problem(tuple(b1), tuple(b2), tuple(batch), m, n, k, output, packed)


def _check_combination(node: Node, output: str) -> None:
    """The legal combinations of dtypes: one line per rule, the first that is broken is named."""
    scale = node.dtype("scale")
    pertoken = "pertoken_scale" in node
    bias = node.dtype("bias") if "bias" in node else None

    def refuse(name: str, found: str, allowed: str) -> NoReturn:
        _refuse(node, f'input "{name}"', f"{found} with {output} output", allowed, "E-COMBO")

    if "offset" in node and output != "int8":
        refuse("offset", "an offset", "none; only int8 output takes one")
    if pertoken and output in ("int8", "int32"):
        refuse("pertoken_scale", "a per-token scale", "none; only float output takes one")
    if pertoken and scale in PACKED_DTYPES:
        refuse("pertoken_scale", f"a per-token scale beside {scale} scale", "a float32 scale")
    if scale == "bfloat16" and output in ("int8", "float16"):
        refuse("scale", scale, "float32, int64 or uint64")
    if scale in PACKED_DTYPES and output in ("bfloat16", "int32"):
        refuse("scale", scale, "float32 or bfloat16")
    if bias in (None, "int32"):
        return
    if output in ("int8", "int32"):
        refuse("bias", bias, "int32")
    if output == "float16" and not pertoken:
        refuse("bias", f"{bias} without pertoken_scale", "int32")
    if output == "float16" and bias == "bfloat16":
        refuse("bias", bias, "int32, float16 or float32")
    if output == "bfloat16" and bias == "float16":
        refuse("bias", bias, "int32, bfloat16 or float32")


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr]:
    p = check(bb, node)
    left, left_batch = _left(bb, node, p)
    weight, weight_batch = _weight(bb, node, p)
    operands = _operands(bb, node, p, weight)
    y = int8_matmul(
        bb,
        node.target,
        "linear_a8w8_quant.gemm",
        left,
        weight,
        _epilogue(node, p, list(operands)),
        operands=[*operands.values()],
        batch=1 if p.collapsed else prod(p.batch),
        left_batch=left_batch,
        weight_batch=weight_batch,
    )
    return [view(bb, y, [*p.batch, p.m, p.n])]


def _left(bb: relax.BlockBuilder, node: Node, p: Problem) -> tuple[Left, BatchMap | None]:
    """x1, and which of its matrices belongs to a batch entry of y."""
    x1, batch = node.inputs["x1"], prod(p.b1)
    if not node.attrs["transpose_x1"]:
        if p.collapsed:
            return Left(view(bb, x1, [1, batch * p.m, p.k]), batch * p.m), None
        x1 = view(bb, x1, [batch, p.m, p.k])
        return Left(x1, p.m, batch), _operand_batch(p.b1, p.batch)
    x1 = view(bb, x1, [batch, p.k, p.m])
    if p.collapsed:

        def entry(t: te.Tensor, _: Expr, row: Expr, k: Expr) -> Expr:
            z, i = divmod_(row, p.m)
            return t[z, k, i]

        return Left(x1, batch * p.m, 1, entry), None
    return Left(x1, p.m, batch, transposed), _operand_batch(p.b1, p.batch)


def _weight(bb: relax.BlockBuilder, node: Node, p: Problem) -> tuple[Weight, BatchMap | None]:
    """x2, packed, and which of its matrices belongs to a batch entry of y."""
    batch = prod(p.b2)
    if node.attrs["transpose_x2"]:
        shape, entry = [batch, p.n, p.k], row_major
    else:
        shape, entry = [batch, p.k, p.n], transposed
    constant = node.constants.get("x2")
    source = view(bb, node.inputs["x2"], shape) if constant is None else constant.reshape(shape)
    weight = pack_weight(bb, node.target, source, n=p.n, k=p.k, batch=batch, entry=entry)
    return weight, None if p.collapsed else _operand_batch(p.b2, p.batch)


def _operands(
    bb: relax.BlockBuilder, node: Node, p: Problem, weight: Weight
) -> dict[str, relax.Expr]:
    """What the epilogue reads, by name, decoded: ``scale`` float32, ``o9`` int32, ``bias`` int32 or
    float32 over the padded columns, ``pertoken_scale`` over the rows.
    """

    def columns(name: str, decode: Decode, decode_array: DecodeArray) -> relax.Expr:
        return _columns(bb, node, weight, name, decode, decode_array)

    operands = {}
    if "bias" in node:
        if node.dtype("bias") == "int32":
            operands["bias"] = columns("bias", _as_is, _as_is)
        else:
            operands["bias"] = columns("bias", quant.to_float32, _float32_array)
    if p.output == "int32":
        return operands
    if not p.is_packed:
        operands["scale"] = columns("scale", quant.to_float32, _float32_array)
        if "pertoken_scale" in node:
            operands["pertoken_scale"] = node.inputs["pertoken_scale"]
    elif node.dtype("scale") in PACKED_DTYPES:
        operands["scale"] = columns("scale", quant.unpack_scale, quant.unpack_scale_array)
        if p.output == "int8":
            operands["o9"] = columns("scale", quant.unpack_offset, quant.unpack_offset_array)
    else:
        operands["scale"] = columns("scale", quant.truncate_scale, quant.truncate_scale_array)
        if "offset" in node:
            operands["o9"] = columns("offset", quant.nine_bit_offset, quant.nine_bit_offset_array)
    return operands


def _columns(
    bb: relax.BlockBuilder,
    node: Node,
    weight: Weight,
    name: str,
    decode: Decode,
    decode_array: DecodeArray,
) -> relax.Expr:
    """Input ``name``, [1], [n] or [batch, 1, n], decoded and spread over the padded columns:
    [padded n] or [batch, padded n]. The last element stands in for what is missing.
    """
    length = weight.padded_n
    if name in node.constants and isinstance(length, int):
        values = decode_array(node.constants[name])
        values = values[:, 0] if values.ndim == 3 else values
        missing = length - values.shape[-1]
        return relax.const(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], "edge"))

    def columns(x: te.Tensor) -> te.Tensor:
        last = x.shape[-1] - 1
        if len(x.shape) == 1:
            return te.compute((int64(length),), lambda j: decode(x(tirx.min(j, last))))
        return te.compute(
            (x.shape[0], int64(length)), lambda z, j: decode(x(z, int64(0), tirx.min(j, last)))
        )

    return te_kernel(bb, "linear_a8w8_quant.columns", columns, node.inputs[name])


def _epilogue(node: Node, p: Problem, names: Sequence[str]) -> Epilogue:
    """The arithmetic after the product, of operands that come in the order of ``names``."""
    to_float16, to_int8 = quant.float16_cast(node.target), quant.int8_cast(node.target)
    nearest = quant.nearest_cast(node.target)
    int_bias = "bias" in node and node.dtype("bias") == "int32"

    def epilogue(acc: Expr, at: At, *tensors: te.Tensor) -> Expr:
        given = dict(zip(names, tensors))
        bias = _bias_at(p, given.get("bias"), at)
        if int_bias:
            acc = acc + bias
        if p.output == "int32":
            return acc
        t = acc.astype("float32") * given["scale"][at.col]
        if p.output == "int8":
            if "o9" not in given:
                return to_int8(t)
            # Nine bits before the offset, eight after it.
            nine_bit = quant.round_clip(t, -256, 255, nearest)
            return quant.saturate_int8(nine_bit + given["o9"][at.col])
        if "pertoken_scale" in given:
            row = divmod_(at.row, p.m)[1] if p.collapsed and p.b1 else at.row
            t = t * given["pertoken_scale"][row]
        if bias is not None and not int_bias:
            t = t + bias
        return to_float16(t) if p.output == "float16" else t.astype("bfloat16")

    return epilogue


def _bias_at(p: Problem, bias: te.Tensor | None, at: At) -> Expr | None:
    if bias is None or len(bias.shape) == 1:
        return None if bias is None else bias[at.col]
    return bias[divmod_(at.row, p.m)[0] if p.collapsed else at.z, at.col]


def _broadcast(node: Node, b1: Sequence[Dim], b2: Sequence[Dim]) -> list[Dim]:
    """NumPy broadcasting of the batch dimensions; two open sizes must agree or one must be 1."""
    rank = max(len(b1), len(b2))
    allowed = f"sizes that broadcast with ({', '.join(map(str, b2))}), those of x2"
    result = []
    for d1, d2 in zip([1] * (rank - len(b1)) + [*b1], [1] * (rank - len(b2)) + [*b2]):
        if is_one(d1) or is_one(d2):
            result.append(d2 if is_one(d1) else d1)
            continue
        fits = any_of(equal(d1, d2), equal(d1, 1), equal(d2, 1))
        _require(node, fits, 'input "x1" batch', tuple(b1), allowed, "E-SHAPE")
        known = [dim for dim in (d1, d2) if isinstance(dim, int)]
        if known or same(d1, d2):
            result.append([*known, d1][0])
        else:
            result.append(tirx.max(d1, d2))
    return result


def _operand_batch(operand: Sequence[Dim], batch: Sequence[Dim]) -> BatchMap:
    """Index of an operand's matrix for entry z of the broadcast batch, both row-major."""

    def matrix(z: Expr) -> Expr:
        index, stride = int64(0), 1
        for dim, size in zip(reversed(operand), reversed(batch)):
            z, i = divmod_(z, size)
            if not is_one(dim):  # a size only known at the call may turn out to be 1
                fixed = isinstance(dim, int) or same(dim, size)
                index = index + (i if fixed else tirx.min(i, dim - 1)) * stride
            stride = stride * dim
        return index

    return matrix


def _read(shape: Sequence[Dim], transpose: int) -> list[Dim]:
    """Shape with its last two axes as the flag says; its own inverse."""
    *batch, rows, cols = shape
    return [*batch, cols, rows] if transpose else [*batch, rows, cols]


def _refuse(node: Node, subject: str, found: object, allowed: object, code: str) -> NoReturn:
    node.fail(subject, found, f"{allowed} [{code}]")


def _require(
    node: Node, condition: bool | Expr, subject: str, found: object, allowed: object, code: str
) -> None:
    node.require(condition, subject, found, f"{allowed} [{code}]")


def _as_is(x):
    return x


def _float32_array(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


NPU_QUANT_MATMUL = Op(SCHEMA, lower, linear_a8w8_quant)
