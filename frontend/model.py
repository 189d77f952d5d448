"""An ONNX model before import: loaded, judged, its dimensions named and bound, its constants
folded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..runtime.errors import InvalidModelError
from . import schemas
from .fold import fold_constants
from .schemas.canonical import canonicalize
from .schemas.check import check_domain_versions, check_nodes

Shapes = Mapping[str, int | Sequence[int | str | None]]
"""Dimension name -> size, or graph input -> its dimensions (``None`` leaves one as it is)."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: dimensions are sizes or the names of symbolic ones."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def load(model: str | os.PathLike[str] | ModelProto) -> ModelProto:
    """The model itself, or read from a file with its external data; ``InvalidModelError`` if that
    fails.
    """
    if isinstance(model, ModelProto):
        return model
    try:
        return onnx.load(os.fspath(model))
    except Exception as error:  # protobuf and the file system raise without a common base
        raise InvalidModelError(
            f"{os.fspath(model)}: cannot be read as an ONNX model: {error}"
        ) from error


def prepare(model: ModelProto, shapes: Shapes | None = None) -> ModelProto:
    """A copy ready for import.

    Local functions are inlined, our operators canonical and judged by their schemas, every symbolic
    dimension of an input has a name that is an identifier, ``shapes`` are bound, the whole is
    accepted by the ONNX checker, and what only depends on constants is folded.
    """
    schemas.register()
    if len(model.functions):
        model = onnx.inliner.inline_local_functions(model)
    check_domain_versions(model)
    model = canonicalize(model)
    check_nodes(model)
    name_dimensions(model.graph)
    bind_shapes(model.graph, shapes or {})
    _judge(model)
    return fold_constants(model)


def our_nodes(graph: GraphProto) -> Iterator[tuple[NodeProto, onnx.defs.OpSchema]]:
    """Nodes of our operators with their schemas, subgraphs included, in graph order."""
    for node in graph.node:
        if schema := schemas.schema(node.domain, node.op_type):
            yield node, schema
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from our_nodes(attribute.g)


def graph_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """What a caller feeds: inputs without those that are initializers too (as old IR versions list
    them).
    """
    constant = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constant]


def tensor_spec(value: ValueInfoProto) -> TensorSpec:
    """Name, dtype and dimensions as declared; ``InvalidModelError`` for what is not a tensor of
    known rank.
    """
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise InvalidModelError(f'graph input "{value.name}": found {kind}, allowed a tensor')
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise InvalidModelError(
            f'graph input "{value.name}": found no rank, allowed a tensor of known rank; '
            "give its dimensions with shapes="
        )
    dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return TensorSpec(value.name, _NUMPY_NAMES.get(dtype, dtype), dims)


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def name_dimensions(graph: GraphProto) -> None:
    """Give each symbolic dimension of an input a name that is an identifier, one name for one ONNX
    name.
    """
    taken: dict[str, str] = {}
    for value in graph_inputs(graph):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                if dim.dim_value < 1:
                    raise InvalidModelError(
                        f'graph input "{value.name}" axis {axis}: found size {dim.dim_value}, '
                        "allowed at least 1"
                    )
                continue
            given = dim.dim_param or f"{value.name}.{axis}"
            if given not in taken:
                name = re.sub(r"\W", "_", given)
                name = name if name.isidentifier() else f"d_{name}"
                while name in taken.values():
                    name += "_"
                taken[given] = name
            dim.dim_param = taken[given]


def bind_shapes(graph: GraphProto, shapes: Shapes) -> None:
    """Replace symbolic dimensions by sizes, by dimension name or by input; unknown names are
    refused.
    """
    inputs = {value.name: value for value in graph_inputs(graph)}
    sizes: dict[str, int] = {}

    def bind(name: str, size: int, where: str) -> None:
        if not isinstance(size, int) or size < 1:
            raise InvalidModelError(
                f"shapes: {where}: found {size!r}, allowed a size of at least 1"
            )
        if sizes.setdefault(name, size) != size:
            raise InvalidModelError(
                f"shapes: dimension {name!r}: found {sizes[name]} and {size}, allowed one size"
            )

    for value in inputs.values():
        if value.name in shapes and not value.type.tensor_type.HasField("shape"):
            for axis, size in enumerate(shapes[value.name]):
                dim = value.type.tensor_type.shape.dim.add()
                dim.dim_param = f"{re.sub(r'[^0-9A-Za-z_]', '_', value.name)}_{axis}"
                if isinstance(size, str):
                    dim.dim_param = size
    names = {d.dim_param for v in inputs.values() for d in v.type.tensor_type.shape.dim} - {""}
    for key, wanted in shapes.items():
        if key in inputs:
            dims = inputs[key].type.tensor_type.shape.dim
            if isinstance(wanted, int | str) or len(wanted) != len(dims):
                raise InvalidModelError(
                    f'shapes: input "{key}": found {wanted!r}, allowed {len(dims)} dimensions'
                )
            for axis, (dim, size) in enumerate(zip(dims, wanted)):
                if size is None or (isinstance(size, str) and size == dim.dim_param):
                    continue
                if dim.dim_param:
                    bind(dim.dim_param, size, f'input "{key}" axis {axis}')
                elif dim.dim_value != size:
                    raise InvalidModelError(
                        f'shapes: input "{key}" axis {axis}: found {size}, allowed {dim.dim_value}, '
                        "which the model fixes"
                    )
        elif key in names:
            bind(key, wanted, f"dimension {key!r}")
        else:
            raise InvalidModelError(
                f"shapes: found {key!r}, allowed inputs {sorted(inputs)} or dimensions {sorted(names)}"
            )
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _judge(model: ModelProto) -> None:
    """ONNX's own checker and strict shape inference over everything, our operators included."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidModelError(f"the ONNX checker refuses the model: {error}") from error


def opset(model: ModelProto) -> int:
    """Version of the default domain."""
    return next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1
    )


def elem_type(dtype: str) -> int:
    """ONNX element type of a TVM or NumPy dtype name."""
    return helper.np_dtype_to_tensor_dtype(_np_dtype(dtype))


def _np_dtype(name: str):
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
