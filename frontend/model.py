"""An ONNX model before import: loaded, judged, its dimensions named and bound, its constants
folded.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.external_data_helper import uses_external_data

from ..runtime.errors import InvalidModelError, UnsupportedError
from . import schemas
from .fold import fold_constants
from .schemas.canonical import canonicalize
from .schemas.check import check_domain_versions, check_nodes, subgraphs

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

    Local functions are inlined, the default domain goes by its empty name, our operators are
    canonical and judged by their schemas, every symbolic dimension of an input has a name that is
    an identifier, ``shapes`` are bound, the whole is accepted by the ONNX checker, and what only
    depends on constants is folded.
    """
    schemas.register()
    require_data(model)
    if len(model.functions):
        model = onnx.inliner.inline_local_functions(model)
    check_domain_versions(model)
    model = canonicalize(model)
    _name_default_domain(model)
    check_nodes(model)
    names = name_dimensions(model.graph)
    bind_shapes(model.graph, shapes or {}, names)
    for value in graph_inputs(model.graph):
        tensor_spec(value)
    _judge(model)
    return fold_constants(model)


def require_data(model: ModelProto) -> None:
    """Refuse a ModelProto whose external data was not loaded: it does not say where that lies."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            raise InvalidModelError(
                f'initializer "{tensor.name}": found a reference to external data, allowed the '
                "data itself; pass the path of the model, or load its external data first"
            )


def _name_default_domain(model: ModelProto) -> None:
    """Write the default domain as ``""``, as ONNX's checker expects; ``ai.onnx`` is an alias."""
    for entry in model.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    for node in all_nodes(model.graph):
        if node.domain == "ai.onnx":
            node.domain = ""


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Nodes in graph order, each followed by those of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def our_nodes(graph: GraphProto) -> Iterator[tuple[NodeProto, onnx.defs.OpSchema]]:
    """Nodes of our operators with their schemas, subgraphs included, in graph order."""
    for node in all_nodes(graph):
        if schema := schemas.schema(node.domain, node.op_type):
            yield node, schema


def graph_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """What a caller feeds: inputs without those that are initializers too (as old IR versions list
    them).
    """
    constant = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constant]


def tensor_spec(value: ValueInfoProto) -> TensorSpec:
    """Name, dtype and dimensions as declared.

    Raises ``InvalidModelError`` for what is not a tensor of known rank, ``UnsupportedError`` for
    element types that no kernel takes.
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
    dtype = _NUMPY_NAMES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise UnsupportedError(
            f'graph input "{value.name}": found element type {dtype}, allowed {", ".join(DTYPES)}'
        )
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, dims)


_NUMPY_NAMES = {"float": "float32", "double": "float64"}
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
"""Element types of graph inputs, as NumPy and ml_dtypes spell them."""


def name_dimensions(graph: GraphProto) -> dict[str, str]:
    """Give each symbolic dimension of an input a name that is an identifier, one for one ONNX name.

    Returns ONNX name -> identifier. A dimension without a name becomes ``<input>_<axis>``.
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
            dim.dim_param = taken.setdefault(given, _identifier(given, set(taken.values())))
    return taken


def _identifier(given: str, taken: set[str]) -> str:
    name = re.sub(r"\W", "_", given, flags=re.ASCII)
    name = name if name.isidentifier() else f"d_{name}"
    while name in taken:
        name += "_"
    return name


def bind_shapes(graph: GraphProto, shapes: Shapes, names: Mapping[str, str] | None = None) -> None:
    """Replace symbolic dimensions by sizes, by dimension name or by input.

    ``names``: ONNX name of a dimension -> the identifier it goes by now; either may be used.
    Unknown names, sizes below 1 and two sizes for one dimension are refused.
    """
    if not isinstance(shapes, Mapping):
        raise InvalidModelError(
            f"shapes: found {shapes!r}, allowed a mapping of dimensions or inputs to sizes"
        )
    inputs = {value.name: value for value in graph_inputs(graph)}
    names = dict(names or {})
    sizes: dict[str, int] = {}

    def bind(name: str, size: object, where: str) -> None:
        size = _size(size, where)
        if sizes.setdefault(name, size) != size:
            raise InvalidModelError(
                f"shapes: dimension {name!r}: found {sizes[name]} and {size}, allowed one size"
            )

    for key in shapes.keys() & inputs.keys():
        tensor = inputs[key].type.tensor_type
        if not tensor.HasField("shape"):
            for axis, _ in enumerate(_dimensions(key, shapes[key], None)):
                given = f"{key}.{axis}"
                names[given] = _identifier(given, set(names.values()))
                tensor.shape.dim.add().dim_param = names[given]
    known = {d.dim_param for v in inputs.values() for d in v.type.tensor_type.shape.dim} - {""}
    for key, wanted in shapes.items():
        if key in inputs:
            dims = inputs[key].type.tensor_type.shape.dim
            for axis, (dim, size) in enumerate(zip(dims, _dimensions(key, wanted, len(dims)))):
                where = f'input "{key}" axis {axis}'
                if size is None:
                    continue
                if isinstance(size, str) and names.get(size, size) == dim.dim_param:
                    continue
                unnamed = names.get(f"{key}.{axis}") == dim.dim_param != ""
                if isinstance(size, str) and unnamed:
                    dim.dim_param = names.setdefault(size, _identifier(size, known))
                    known.add(dim.dim_param)
                elif dim.dim_param:
                    bind(dim.dim_param, size, where)
                elif dim.dim_value != _size(size, where):
                    raise InvalidModelError(
                        f"shapes: {where}: found {size}, allowed {dim.dim_value}, which the model "
                        "fixes"
                    )
        elif names.get(key, key) in known:
            bind(names.get(key, key), wanted, f"dimension {key!r}")
        else:
            raise InvalidModelError(
                f"shapes: found {key!r}, allowed inputs {sorted(inputs)} or dimensions "
                f"{sorted(known)}"
            )
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _size(size: object, where: str) -> int:
    try:
        if 1 <= operator.index(size) < 2**63:
            return operator.index(size)
    except TypeError:
        pass
    raise InvalidModelError(f"shapes: {where}: found {size!r}, allowed a size of at least 1")


def _dimensions(key: str, wanted: object, rank: int | None) -> list[int | str | None]:
    """The entry of ``shapes`` for an input as a list of ``rank`` entries (None: any number)."""
    if not isinstance(wanted, Sequence | np.ndarray) or isinstance(wanted, str):
        found = [] if rank is None else None
    else:
        found = list(wanted)
    if found is None or (rank is not None and len(found) != rank) or (rank is None and not found):
        raise InvalidModelError(
            f'shapes: input "{key}": found {wanted!r}, allowed '
            f"{'a list of' if rank is None else rank} dimensions"
        )
    return found


def _judge(model: ModelProto) -> None:
    """ONNX's own checker and strict shape inference over everything, our operators included."""
    if any(not value.type.tensor_type.HasField("shape") for value in model.graph.output):
        inferred = onnx.shape_inference.infer_shapes(model).graph.output  # the checker wants ranks
        for value, known in zip(model.graph.output, inferred):
            value.CopyFrom(known)
    outputs, inner = list(model.graph.output), list(model.graph.value_info)
    # Where inference found no rank, let the checker complain about the cause, not about that.
    open_ranks = [v for v in outputs if not v.type.tensor_type.HasField("shape")]
    _replace(model.graph.output, [v for v in outputs if v not in open_ranks])
    model.graph.value_info.extend(open_ranks)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidModelError(f"the ONNX checker refuses the model: {error}") from error
    _replace(model.graph.output, outputs)
    _replace(model.graph.value_info, inner)


def _replace(values, by: list[ValueInfoProto]) -> None:
    del values[:]
    values.extend(by)


def opset(model: ModelProto) -> int:
    """Version of the default domain."""
    return next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1
    )


def elem_type(dtype: str) -> int:
    """ONNX element type of a TVM or NumPy dtype name."""
    return helper.np_dtype_to_tensor_dtype(np_dtype(dtype))


def np_dtype(name: str) -> np.dtype:
    """NumPy dtype of a dtype name, bfloat16 through ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
