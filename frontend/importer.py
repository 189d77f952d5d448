"""The walk from ONNX to Relax: standard operators by TVM's importer, ours by the operator table.

TVM's importer has no hook for new operators and ignores domains. Some of its methods are overridden
(``OVERRIDDEN``), and before the walk every node of ours is given a name that no other operator can
have, and every node of a foreign domain is refused; a contract test fails in plain words if a TVM
release changes one of those methods.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from tvm import relax, tirx
from tvm.ir import Call, GenericConst, IRModule, PrimType
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map
from tvm.target import Target

from ..relay_ops import OPS
from ..relay_ops.op import KERNEL, Node, Op, encode
from ..runtime.checks import Check
from ..runtime.errors import OpferryError, UnsupportedError
from . import schemas
from .model import TensorSpec, all_nodes, elem_type, graph_inputs, opset, tensor_spec
from .schemas.check import check_types, decode_attributes, node_label

CONTRIB = frozenset(
    {"FastGelu", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization", "MatMulInteger16"}
)
"""Operators of com.microsoft that TVM converts with that meaning."""

OVERRIDDEN = {
    "_check_for_unsupported_ops": ("self", "graph"),
    "_construct_nodes": ("self", "graph"),
    "_convert_operator": ("self", "op_name", "inputs", "attrs", "opset"),
    "_convert_subgraph": ("self", "bb", "graph"),
    "_sanitize_name": ("self", "name"),
}
"""Methods of TVM's importer that ``_Importer`` replaces, with the parameters it relies on."""

_BUILT_IN = frozenset({"Constant", "If"})
_PREFIX = "opferry::"
_TAKES_SHAPES = frozenset(
    {
        *("Cast", "CastLike", "Concat", "ConstantOfShape", "Equal", "Expand", "Gather", "Reshape"),
        *("Resize", "Shape", "Slice", "Squeeze", "Where"),
    }
)
"""Operators whose converters take a ShapeExpr as it is; for the others it becomes a tensor."""

_SMALL_INTEGERS = frozenset(
    {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}
)

_BUILDER = threading.Lock()  # TVM's BlockBuilder keeps one stack for the whole process


@dataclass(frozen=True)
class Imported:
    """A model in Relax: ``main`` takes the graph's inputs in order and returns its outputs (a tuple
    if several).
    """

    module: IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]
    operators: tuple[str, ...]
    """``domain::Name`` of our operators, one entry a node."""
    kernels: dict[str, tuple[str, ...]]
    """``domain::Name`` -> names of the kernels that its nodes lower to."""


def import_model(model: ModelProto, target: Target) -> Imported:
    """Lower a prepared model (``model.prepare``) for ``target``.

    Raises ``UnsupportedError`` naming every operator that nobody converts, and whatever our
    operators' checks raise.
    """
    if unsupported := unsupported_operators(model.graph):
        raise UnsupportedError(f"unsupported operators: {', '.join(unsupported)}")
    inputs = tuple(tensor_spec(value) for value in graph_inputs(model.graph))
    importer = _Importer(target)
    with _BUILDER:
        module = importer.convert(model)
    return Imported(
        module,
        inputs,
        tuple(value.name for value in model.graph.output),
        tuple(importer.checks),
        tuple(op.name for _, op in importer.ours),
        {name: tuple(kernels) for name, kernels in importer.kernels.items()},
    )


def unsupported_operators(graph: GraphProto) -> list[str]:
    """``domain::Name`` (or ``Name``) of what neither TVM nor our table converts, each once, in
    graph order.
    """
    convertible = _get_convert_map().keys() | _BUILT_IN
    ours = {op.name for op in OPS}
    found = []
    for node in all_nodes(graph):
        standard = node.domain in ("", "ai.onnx")
        if (
            f"{node.domain}::{node.op_type}" in ours
            or (standard and node.op_type in convertible)
            or (node.domain == "com.microsoft" and node.op_type in CONTRIB)
        ):
            continue
        found.append(node.op_type if standard else f"{node.domain}::{node.op_type}")
    return list(dict.fromkeys(found))


class _Importer(ONNXGraphImporter):
    """``ours`` holds our nodes; in the walked copy a node is ``opferry::<index>`` without
    attributes.
    """

    def __init__(self, target: Target):
        super().__init__(shape_dict={}, dtype_dict={}, sanitize=True)
        self.target = target
        self.ours: list[tuple[NodeProto, Op]] = []
        self.checks: list[Check] = []
        self.kernels: dict[str, dict[str, None]] = {}
        self._label = ""  # of the node being converted

    @property
    def symbols(self) -> frozenset[tirx.Var]:
        """The symbolic dimensions of the graph's inputs."""
        fed = [var for var in self._inputs.values() if isinstance(var, relax.Var)]
        return frozenset(d for var in fed for d in var.ty.shape if isinstance(d, tirx.Var))

    def convert(self, model: ModelProto) -> IRModule:
        walked = ModelProto()
        walked.CopyFrom(model)
        self._claim(walked.graph)
        try:
            return self.from_onnx(walked.graph, opset(model))
        except _Refused as refusal:
            self.bb._end_block()  # else TVM complains about it when the builder is freed
            raise refusal.error from refusal.error.__cause__

    def _claim(self, graph: GraphProto) -> None:
        table = {op.name: op for op in OPS}
        for node in all_nodes(graph):
            if schemas.schema(node.domain, node.op_type):
                original = NodeProto()
                original.CopyFrom(node)
                node.op_type = f"{_PREFIX}{len(self.ours)}"
                node.domain = ""
                del node.attribute[:]
                self.ours.append((original, table[f"{original.domain}::{original.op_type}"]))

    def _check_for_unsupported_ops(self, graph: GraphProto) -> None:
        """Done before, for all domains and subgraphs, by ``unsupported_operators``."""

    def _sanitize_name(self, name: str) -> str:
        """An identifier that no other variable has; ours does not warn."""
        return self._name_supply.fresh_name("v_" + re.sub(r"\W", "_", name, flags=re.ASCII))

    def _construct_nodes(self, graph: GraphProto) -> None:
        for node in graph.node:
            for name in filter(None, node.input):
                self._nodes[name] = self._prepared(node, self._nodes[name])
            self._label = self._label_of(node)
            try:
                super()._construct_nodes(GraphProto(node=[node]))
            except (Exception, _Refused) as error:
                raise _Refused(_naming(self._label_of(node), error)) from error
            for name in filter(None, node.output):
                value = self._nodes[name]
                if isinstance(value, Call) and isinstance(value.ty, relax.TensorType):
                    self._nodes[name] = self.bb.emit(value)  # here, not in a branch that uses it
        for value in graph.output:
            self._nodes[value.name] = self._as_tensor(self._nodes[value.name])

    def _label_of(self, node: NodeProto) -> str:
        ours = node.op_type.startswith(_PREFIX)
        return node_label(self.ours[int(node.op_type.removeprefix(_PREFIX))][0] if ours else node)

    def _convert_subgraph(self, bb: relax.BlockBuilder, graph: GraphProto) -> relax.Expr:
        """A branch with its bindings inside it, so that only the chosen one is computed."""
        outer = dict(self._nodes)
        bb._begin_binding_block()
        try:
            for tensor in graph.initializer:
                self._nodes[tensor.name] = relax.const(self._parse_array(tensor))
            self._construct_nodes(graph)
            outputs = [bb.emit(self._nodes[value.name]) for value in graph.output]
        finally:
            block = bb._end_block()
            self._nodes = outer
        return relax.SeqExpr([block], outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))

    def _convert_operator(self, op_name, inputs, attrs, opset):
        try:
            if op_name.startswith(_PREFIX):
                return self._lower(*self.ours[int(op_name.removeprefix(_PREFIX))], inputs)
            if op_name == "Cast" and _narrows(inputs[0], attrs["to"]):
                return self._narrowed(inputs[0], attrs["to"])
            if op_name != "Gather":
                return super()._convert_operator(op_name, inputs, attrs, opset)
            if (dims := _gathered_dims(inputs[0], inputs[1])) is not None:
                return dims
            gather = super()._convert_operator(op_name, inputs, attrs, opset)
            return self._bounded(gather, inputs[1], attrs.get("axis", 0))
        except Exception as error:
            raise _Refused(error) from error

    def _narrowed(self, x: relax.Expr, to: int) -> relax.Expr:
        """Cast of floats to integers of at most 16 bits as TVM's importer defines it, modulo 2^bits
        and 0 for what is not finite, but with the conversion's own truncation for the modulus.
        """
        zero = relax.const(0, x.ty.dtype)
        finite = self.bb.emit(relax.op.where(relax.op.isfinite(x), x, zero))
        whole = self.bb.emit(relax.op.astype(finite, "int32"))
        return self.bb.emit(relax.op.astype(whole, helper.tensor_dtype_to_np_dtype(to).name))

    def _bounded(self, gather: relax.Expr, indices: relax.Expr, axis: int) -> relax.Expr:
        """A Gather that never reads outside its table; indices of the caller are judged before."""
        if not (isinstance(gather, Call) and gather.op.name == "relax.take"):
            return gather
        table, found = gather.args
        rows = table.ty.shape[axis] if isinstance(table.ty.shape, relax.ShapeExpr) else None
        fed = next((name for name, var in self._inputs.items() if var is indices), None)
        rows = encode(rows, self.symbols) if rows is not None else None
        if fed is not None and rows is not None:
            self.checks.append(
                Check.values(self._label, "gather.indices", {"indices": fed}, {}, {"rows": rows})
            )
        return self.bb.normalize(relax.op.take(table, found, axis, mode="clip"))

    def _lower(self, proto: NodeProto, op: Op, inputs) -> relax.Expr:
        before = set(self.bb.get().functions)
        outputs = list(op.lower(self.bb, self._node(proto, op.schema, inputs)))
        kernels = self.kernels.setdefault(op.name, {})
        for var, function in self.bb.get().functions.items():
            if var not in before and function.attrs and KERNEL in function.attrs:
                kernels[str(function.attrs[KERNEL])] = None
        outputs = outputs[: len(proto.output)]
        present = next(output for output in outputs if output is not None)
        outputs = [present if output is None else output for output in outputs]
        return outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)

    def _node(self, proto: NodeProto, schema: onnx.defs.OpSchema, inputs) -> Node:
        label = node_label(proto)
        named = {
            parameter.name: self._ranked(label, parameter.name, expr)
            for parameter, expr in zip(schema.inputs, inputs)
            if expr is not None
        }
        check_types(proto, schema, {name: elem_type(str(e.ty.dtype)) for name, e in named.items()})
        fed = {var: name for name, var in self._inputs.items() if isinstance(var, relax.Var)}
        return Node(
            label=label,
            inputs=named,
            constants={
                name: expr.value.numpy()
                for name, expr in named.items()
                if isinstance(expr, GenericConst)
            },
            attrs=decode_attributes(proto, schema),
            outputs=frozenset(
                parameter.name for parameter, name in zip(schema.outputs, proto.output) if name
            ),
            target=self.target,
            graph_inputs={name: fed[expr] for name, expr in named.items() if expr in fed},
            symbols=self.symbols,
            runtime_checks=self.checks,
        )

    def _ranked(self, label: str, name: str, expr: relax.Expr) -> relax.Expr:
        """``expr`` with a dimension for each axis: what TVM left open becomes a fresh symbol."""
        if expr.ty.shape is not None and isinstance(expr.ty.shape, relax.ShapeExpr):
            return expr
        if expr.ty.ndim < 0:
            raise UnsupportedError(
                f'{label}: input "{name}": found unknown rank, allowed a known one'
            )
        dims = [tirx.Var(f"{name}_{axis}", "int64") for axis in range(expr.ty.ndim)]
        return self.bb.match_cast(expr, relax.TensorType(dims, expr.ty.dtype))

    def _prepared(self, node: NodeProto, expr: relax.Expr) -> relax.Expr:
        """An input as the node's converter takes it: many know neither ShapeExpr nor scalars."""
        if node.op_type in _TAKES_SHAPES:
            to = next((a.i for a in node.attribute if a.name == "to"), TensorProto.INT64)
            return expr if to == TensorProto.INT64 else self._as_tensor(expr)
        if node.op_type.startswith(_PREFIX) or isinstance(expr.ty, relax.ShapeType):
            return self._as_tensor(expr)
        return expr

    def _as_tensor(self, expr: relax.Expr) -> relax.Expr:
        """Shapes and sizes, which TVM's importer keeps symbolic, as int64 tensors."""
        if isinstance(expr.ty, relax.ShapeType):
            return self.bb.emit(relax.op.shape_to_tensor(expr))
        if isinstance(expr.ty, PrimType):
            size = expr if str(expr.ty) == "int64" else expr.astype("int64")
            vector = self.bb.emit(relax.op.shape_to_tensor(relax.ShapeExpr([size])))
            return self.bb.emit(relax.op.reshape(vector, ()))
        return expr


class _Refused(BaseException):
    """Carries an error through TVM's importer, which prints every Exception that it sees."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _naming(label: str, error: BaseException) -> OpferryError:
    """``error``, or what it carries, as an error of ours that names the node."""
    if isinstance(error, _Refused):
        error = error.error
    if isinstance(error, OpferryError):
        return error
    refusal = UnsupportedError(f"{label}: TVM's importer cannot convert it: {error}")
    refusal.__cause__ = error
    return refusal


def _narrows(x: relax.Expr, to: int) -> bool:
    return (
        to in _SMALL_INTEGERS
        and isinstance(x.ty, relax.TensorType)
        and not isinstance(x, GenericConst)
        and str(x.ty.dtype) in ("float16", "float32", "float64")
    )


def _gathered_dims(data: relax.Expr, indices: relax.Expr) -> relax.ShapeExpr | None:
    """Gather(Shape(x), constant vector) as dimensions, which a Reshape can use; else None."""
    if not (isinstance(data, relax.ShapeExpr) and isinstance(indices, GenericConst)):
        return None
    chosen = indices.value.numpy()
    if chosen.ndim != 1 or not np.all((-len(data) <= chosen) & (chosen < len(data))):
        return None
    return relax.ShapeExpr([data[int(i) % len(data)] for i in chosen])
