"""The walk from ONNX to Relax: standard operators by TVM's importer, ours by the operator table.

TVM's importer has no hook for new operators and ignores domains. Two of its methods are overridden,
and before the walk every node of ours is given a name that no other operator can have, and every
node of a foreign domain is refused; a contract test fails in plain words if a TVM release changes
either method.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto
from tvm import relax, tirx
from tvm.ir import GenericConst, IRModule
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map
from tvm.target import Target

from ..relay_ops import OPS
from ..relay_ops.op import Node, Op
from ..runtime.checks import Check
from ..runtime.errors import OpferryError, UnsupportedError
from . import schemas
from .model import TensorSpec, elem_type, graph_inputs, opset, tensor_spec
from .schemas.check import check_types, decode_attributes, node_label

CONTRIB = frozenset(
    {"FastGelu", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization", "MatMulInteger16"}
)
"""Operators of com.microsoft that TVM converts with that meaning."""

_BUILT_IN = frozenset({"Constant", "If"})
_PREFIX = "opferry::"


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


def import_model(model: ModelProto, target: Target) -> Imported:
    """Lower a prepared model (``model.prepare``) for ``target``.

    Raises ``UnsupportedError`` naming every operator that nobody converts, and whatever our
    operators' checks raise.
    """
    if unsupported := unsupported_operators(model.graph):
        raise UnsupportedError(f"unsupported operators: {', '.join(unsupported)}")
    inputs = tuple(tensor_spec(value) for value in graph_inputs(model.graph))
    importer = _Importer(inputs, target)
    module = importer.convert(model)
    return Imported(
        module,
        inputs,
        tuple(value.name for value in model.graph.output),
        tuple(importer.checks),
        tuple(op.name for _, op in importer.ours),
    )


def unsupported_operators(graph: GraphProto) -> list[str]:
    """``domain::Name`` (or ``Name``) of what neither TVM nor our table converts, each once, in
    graph order.
    """
    convertible = _get_convert_map().keys() | _BUILT_IN
    found = []
    for node in _nodes(graph):
        standard = node.domain in ("", "ai.onnx")
        if (
            schemas.schema(node.domain, node.op_type)
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

    def __init__(self, inputs: tuple[TensorSpec, ...], target: Target):
        super().__init__(shape_dict={}, dtype_dict={}, sanitize=True)
        self.target = target
        self.ours: list[tuple[NodeProto, Op]] = []
        self.checks: list[Check] = []
        self.symbols = frozenset(d for spec in inputs for d in spec.shape if isinstance(d, str))

    def convert(self, model: ModelProto) -> IRModule:
        walked = ModelProto()
        walked.CopyFrom(model)
        self._claim(walked.graph)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Renaming name")
            return self.from_onnx(walked.graph, opset(model))

    def _claim(self, graph: GraphProto) -> None:
        table = {op.name: op for op in OPS}
        for node in _nodes(graph):
            if schemas.schema(node.domain, node.op_type):
                original = NodeProto()
                original.CopyFrom(node)
                node.op_type = f"{_PREFIX}{len(self.ours)}"
                node.domain = ""
                del node.attribute[:]
                self.ours.append((original, table[f"{original.domain}::{original.op_type}"]))

    def _check_for_unsupported_ops(self, graph: GraphProto) -> None:
        """Done before, for all domains and subgraphs, by ``unsupported_operators``."""

    def _construct_nodes(self, graph: GraphProto) -> None:
        for node in graph.node:
            if node.op_type.startswith(_PREFIX):
                for name in filter(None, node.input):
                    self._nodes[name] = self._as_tensor(self._nodes[name])
            step = GraphProto(node=[node])
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # it prints before it raises
                    super()._construct_nodes(step)
            except OpferryError:
                raise
            except Exception as error:
                raise UnsupportedError(
                    f"{node_label(node)}: TVM's importer cannot convert it: {error}"
                ) from error
        for value in graph.output:
            self._nodes[value.name] = self._as_tensor(self._nodes[value.name])

    def _convert_operator(self, op_name, inputs, attrs, opset):
        if not op_name.startswith(_PREFIX):
            return super()._convert_operator(op_name, inputs, attrs, opset)
        proto, op = self.ours[int(op_name.removeprefix(_PREFIX))]
        outputs = list(op.lower(self.bb, self._node(proto, op.schema, inputs)))
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

    def _as_tensor(self, expr: relax.Expr) -> relax.Expr:
        """Shapes and sizes, which TVM's importer keeps symbolic, as int64 tensors."""
        if isinstance(expr.ty, relax.ShapeType):
            return self.bb.emit(relax.op.shape_to_tensor(expr))
        return expr


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
