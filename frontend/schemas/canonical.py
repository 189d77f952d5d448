"""One spelling per operator: what two spellings or stray attributes mean, said before the checker.

- Default-domain QuantBatchMatMul becomes npu::NPUQuantMatmul: inputs [0, 1, 2, 3, 5, 4] (bias and
  pertoken_scale trade places) and `output_dtype` in TensorProto codes.
- QOrderedLongformerAttention loses its unknown attributes, which onnx.checker would refuse.
"""

import warnings

from onnx import ModelProto, NodeProto, helper

from ...runtime.errors import InvalidNodeError, message
from . import linear_a8w8_quant, qordered_longformer_attention, register
from .check import check_arity, decode_attributes, node_label, subgraphs

_SOURCE = linear_a8w8_quant.QUANT_BATCH_MATMUL
_TARGET = linear_a8w8_quant.SCHEMA
_LONGFORMER = qordered_longformer_attention.SCHEMA
_DEFAULT = ("", "ai.onnx")  # two names of one domain
_INPUT_ORDER = [0, 1, 2, 3, 5, 4]


def canonicalize(model: ModelProto) -> ModelProto:
    """A copy of `model` in canonical spelling; subgraphs and model-local functions included.

    `opset_import` gains npu version 1 where a node was rewritten. Registers the schemas, so that
    onnx.checker can judge the result.

    Raises:
        InvalidNodeError, InvalidTypeError: a QuantBatchMatMul node has a bad arity or attribute,
            or is used in a default-domain version below 8.
    """
    register()
    canonical = ModelProto()
    canonical.CopyFrom(model)
    for scope, nodes in [
        (canonical, canonical.graph.node),
        *((function, function.node) for function in canonical.functions),
    ]:
        version = max((i.version for i in scope.opset_import if i.domain in _DEFAULT), default=0)
        rewritten = _rewrite(nodes, version)
        if rewritten and all(i.domain != _TARGET.domain for i in scope.opset_import):
            scope.opset_import.append(helper.make_opsetid(_TARGET.domain, _TARGET.since_version))
    return canonical


def _rewrite(nodes, version: int) -> bool:
    """Rewrite `nodes` and the graphs inside them in place; whether npu nodes were made."""
    rewritten = False
    for node in nodes:
        for graph in subgraphs(node):
            rewritten |= _rewrite(graph.node, version)
        if node.op_type == _SOURCE.name and node.domain in _DEFAULT:
            _to_npu_quant_matmul(node, version)
            rewritten = True
        elif node.op_type == _LONGFORMER.name and node.domain == _LONGFORMER.domain:
            _drop_unknown_attributes(node)
    return rewritten


def _to_npu_quant_matmul(node: NodeProto, version: int) -> None:
    label = node_label(node)
    if version < _SOURCE.since_version:
        raise InvalidNodeError(
            message(
                label,
                "opset_import of the default domain",
                f"version {version}" if version else "none",
                f"version {_SOURCE.since_version} or later",
            )
        )
    check_arity(node, _SOURCE)
    attributes = decode_attributes(node, _SOURCE)
    codes = linear_a8w8_quant.GRAPH_ENGINE_DTYPES
    if attributes["dtype"] not in codes:
        raise InvalidNodeError(
            message(
                label,
                'attribute "dtype"',
                attributes["dtype"],
                "1 (float16), 2 (int8), 3 (int32), 27 (bfloat16)",
                "E-ATTR",
            )
        )
    flags = {name: attributes[name] for name in ("transpose_x1", "transpose_x2")}
    for name, value in flags.items():
        if value not in (0, 1):
            raise InvalidNodeError(message(label, f'attribute "{name}"', value, "0 or 1", "E-ATTR"))
    given = list(node.input) + [""] * (len(_INPUT_ORDER) - len(node.input))
    inputs = [given[i] for i in _INPUT_ORDER]
    while not inputs[-1]:
        inputs.pop()
    node.op_type, node.domain = _TARGET.name, _TARGET.domain
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    for name, value in {"output_dtype": int(codes[attributes["dtype"]]), **flags}.items():
        node.attribute.append(helper.make_attribute(name, value))


def _drop_unknown_attributes(node: NodeProto) -> None:
    known = [a for a in node.attribute if a.name in _LONGFORMER.attributes]
    if len(known) < len(node.attribute):
        unknown = sorted({a.name for a in node.attribute} - _LONGFORMER.attributes.keys())
        warnings.warn(
            message(
                node_label(node),
                "attributes",
                f"unknown {', '.join(unknown)}, ignored",
                ", ".join(sorted(_LONGFORMER.attributes)),
            ),
            UserWarning,
            stacklevel=4,
        )
        del node.attribute[:]
        node.attribute.extend(known)
