"""What a model consists of and what it becomes: operators, kernels, work, bytes, weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, helper
from tvm.target import Target

from ..frontend.importer import import_model, unsupported_operators
from ..frontend.model import Shapes, TensorSpec, all_nodes, graph_inputs, load, prepare, tensor_spec
from ..frontend.schemas.check import subgraphs
from ..relay_ops import OPS
from ..runtime.quiet import without_noise
from . import target as targets

OURS, TVM, UNSUPPORTED = "opferry", "TVM", "unsupported"


@dataclass(frozen=True)
class OperatorRow:
    """All nodes of one operator."""

    name: str
    """``domain::Name``, or ``Name`` in the default domain."""
    nodes: int
    converted_by: str
    """"opferry", "TVM" or "unsupported"."""
    kernels: tuple[str, ...]
    operations: int | None
    """Arithmetic operations of one call (a multiply-add is two), None where a size is not known."""


@dataclass(frozen=True)
class Inspection:
    """A model as ``opferry inspect`` shows it, after folding of constants."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    operators: tuple[OperatorRow, ...]
    unsupported: tuple[str, ...]
    weights: int
    """Number of constant elements."""
    weight_bytes: int
    bytes_moved: int | None
    """Tensors that nodes read and write, constants included; None where a size is not known."""

    @property
    def operations(self) -> int | None:
        """Of one call; None where a size is not known."""
        counts = [row.operations for row in self.operators]
        return None if None in counts else sum(counts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "operations": self.operations}


def inspect(
    model: str | os.PathLike[str] | ModelProto,
    target: str | Mapping[str, Any] | Target = "llvm",
    shapes: Shapes | None = None,
) -> Inspection:
    """Look at a model without compiling it: our nodes are judged and lowered for ``target``.

    Operators that nobody converts are listed, not refused. Raises ``OpferryError`` for everything
    else that ``compile`` would refuse on import.
    """
    proto = prepare(load(model), shapes)
    unsupported = tuple(unsupported_operators(proto.graph))
    kernels: Mapping[str, tuple[str, ...]] = {}
    if not unsupported:
        with without_noise():
            kernels = import_model(proto, targets.resolve(target)).kernels
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    sizes = _sizes(inferred)
    ours = {op.name for op in OPS}
    nodes = list(all_nodes(inferred.graph))
    counts = Counter(_name(node) for node in nodes)
    work = {name: [_operations(n, sizes) for n in nodes if _name(n) == name] for name in counts}
    rows = tuple(
        OperatorRow(
            name,
            count,
            UNSUPPORTED if name in unsupported else OURS if name in ours else TVM,
            kernels.get(name, ()),
            None if None in work[name] else sum(work[name]),
        )
        for name, count in counts.items()
    )
    moved = [_bytes(sizes, name) for n in nodes for name in (*n.input, *n.output) if name]
    constants = [_constant(tensor) for tensor in proto.graph.initializer]
    return Inspection(
        tuple(tensor_spec(value) for value in graph_inputs(proto.graph)),
        tuple(value.name for value in proto.graph.output),
        rows,
        unsupported,
        weights=sum(prod(shape) for shape, _ in constants),
        weight_bytes=sum(prod(shape) * width for shape, width in constants),
        bytes_moved=None if None in moved else sum(moved),
    )


Sized = tuple[tuple[int, ...], int]
"""Shape and bytes per element."""


def _name(node: NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _constant(tensor: onnx.TensorProto) -> Sized:
    return tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _sizes(model: ModelProto) -> dict[str, Sized]:
    """Value -> shape and element size, where both are known."""
    found = {tensor.name: _constant(tensor) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[value.name] = tuple(d.dim_value for d in dims), width
    return found


def _bytes(sizes: Mapping[str, Sized], name: str) -> int | None:
    if name not in sizes:
        return None
    shape, width = sizes[name]
    return prod(shape) * width


NodeShapes = Mapping[int, tuple[int, ...]]
"""Shapes of a node's inputs by position, and of its first output under ``OUT``."""
OUT = -1


def _operations(node: NodeProto, sizes: Mapping[str, Sized]) -> int | None:
    """By ``OPERATIONS``; of any other operator one per output element, none for moving data."""
    if node.op_type in MOVES_DATA or any(subgraphs(node)):
        return 0
    shapes = {i: sizes[name][0] for i, name in enumerate(node.input) if name in sizes}
    if node.output[0] in sizes:
        shapes[OUT] = sizes[node.output[0]][0]
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    try:
        return OPERATIONS.get(node.op_type, lambda shapes, _: prod(shapes[OUT]))(shapes, attrs)
    except (KeyError, IndexError):  # a size that is not known
        return None


def _matmul(shapes: NodeShapes, attrs: Mapping[str, Any]) -> int:
    """2 K for each element of the result."""
    transposed = attrs.get("transpose_x1") or attrs.get("transA")
    return 2 * shapes[0][-2 if transposed else -1] * prod(shapes[OUT])


def _conv(shapes: NodeShapes, attrs: Mapping[str, Any]) -> int:
    """2 (C / group) kh kw for each element of the result; the weight is (M, C / group, kh, kw)."""
    return 2 * prod(shapes[1][1:]) * prod(shapes[OUT])


def _speed_fusion_attention(shapes: NodeShapes, attrs: Mapping[str, Any]) -> int:
    """Both products over all pairs; packed sequences count as one, masked pairs as computed."""
    layout, heads = attrs["input_layout"].decode(), attrs["head_num"]
    query, key = shapes[0], shapes[1]
    axis = {"BSH": 1, "SBH": 0, "BNSD": 2, "BSND": 1, "TND": 0}[layout]
    batch = {"BSH": 0, "SBH": 1, "BNSD": 0, "BSND": 0}.get(layout)
    size = query[-1] // heads if layout in ("BSH", "SBH") else query[-1]
    return 4 * (1 if batch is None else query[batch]) * heads * query[axis] * key[axis] * size


def _nsa_compress_attention(shapes: NodeShapes, attrs: Mapping[str, Any]) -> int:
    """Both products over all pairs; packed sequences count as one."""
    (rows, heads, size), (keys, _, _), (_, _, value_size) = shapes[0], shapes[1], shapes[2]
    return 2 * rows * heads * keys * (size + value_size)


def _longformer(shapes: NodeShapes, attrs: Mapping[str, Any]) -> int:
    """Both projections, and the band of 2 W + 1 keys; global tokens are not known here."""
    batch, length, hidden = shapes[0]
    band = min(2 * attrs.get("window", 0) + 1, length)
    return 2 * (2 * batch * length * hidden * 3 * hidden) + 4 * batch * length * band * hidden


OPERATIONS: dict[str, Callable[[NodeShapes, Mapping[str, Any]], int]] = {
    "MatMul": _matmul,
    "Gemm": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Conv": _conv,
    "QOrderedMatMul": _matmul,
    "QOrderedLongformerAttention": _longformer,
    "SpeedFusionAttention": _speed_fusion_attention,
    "NPUNsaCompressAttention": _nsa_compress_attention,
    "NPUQuantMatmul": _matmul,
}
"""Operator -> operations of one node from the shapes of its inputs, by position."""

MOVES_DATA = {
    *("Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape"),
    *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
