"""The references as operators of ONNX's own reference evaluator: whole models run in NumPy."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator

import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun, RuntimeContextError, RuntimeImplementationError
from onnx.reference.ops import load_op
from onnx.reference.ops.aionnxml import load_op as load_ml_op

from ..runtime.errors import InvalidNodeError, UnsupportedError
from .linear_a8w8_quant import linear_a8w8_quant, npu_trans_quant_param, quant_batch_mat_mul
from .nsa_compress_attention import nsa_compress_attention
from .qordered_longformer_attention import qordered_longformer_attention
from .qordered_matmul import qordered_matmul
from .speed_fusion_attention import speed_fusion_attention

# (domain, op_type) to reference.
REFERENCES: dict[tuple[str, str], Callable] = {
    ("com.microsoft", "QOrderedMatMul"): qordered_matmul,
    ("com.microsoft", "QOrderedLongformerAttention"): qordered_longformer_attention,
    ("mindspore", "SpeedFusionAttention"): speed_fusion_attention,
    ("npu", "NPUNsaCompressAttention"): nsa_compress_attention,
    ("npu", "NPUQuantMatmul"): linear_a8w8_quant,
    ("npu", "NPUTransQuantParam"): npu_trans_quant_param,
    ("", "QuantBatchMatMul"): quant_batch_mat_mul,
}
# Exporters add training-only settings to this node; its definition says to ignore them.
_IGNORE_UNKNOWN_ATTRIBUTES = {("com.microsoft", "QOrderedLongformerAttention")}
# Parameters of the references that are no attributes of the node.
_NOT_ATTRIBUTES = {"unrounded", "stage1"}


def _operator(domain: str, op_type: str, reference: Callable) -> type[OpRun]:
    """An OpRun that hands inputs by position and attributes by name to `reference`."""
    parameters = inspect.signature(reference).parameters
    names = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]

    def run(self, *inputs, **attributes):
        where = self.onnx_node.name or f"{domain}::{op_type}"
        if len(inputs) > len(names):
            raise InvalidNodeError(
                f"{where}: inputs: found {len(inputs)}, allowed at most {len(names)}"
            )
        given = {name: x for name, x in zip(names, inputs) if x is not None}
        if twice := sorted(given.keys() & attributes.keys()):
            raise InvalidNodeError(
                f"{where}: {', '.join(twice)}: found as input and as attribute, allowed one"
            )
        unknown = sorted(k for k in attributes if k not in parameters or k in _NOT_ATTRIBUTES)
        if unknown and (domain, op_type) in _IGNORE_UNKNOWN_ATTRIBUTES:
            warnings.warn(f"{where}: ignored attributes {', '.join(unknown)}", stacklevel=2)
            attributes = {k: v for k, v in attributes.items() if k not in unknown}
        elif unknown:
            raise InvalidNodeError(f"{where}: unknown attributes {', '.join(unknown)}")
        return reference(**given, **attributes)[: len(self.onnx_node.output)]

    # op_schema None: defaults come from the reference, whether or not schemas are registered.
    members = {"op_domain": domain, "op_schema": None, "_run": run}
    return type(op_type, (OpRun,), members)


OPERATORS = tuple(_operator(*key, reference) for key, reference in REFERENCES.items())


class _Evaluator(ReferenceEvaluator):
    """A ReferenceEvaluator whose functions and subgraphs know the operators too."""

    def __init__(self, proto, **options):
        super().__init__(proto, **{**options, "new_ops": OPERATORS})


def _nodes(nodes) -> Iterator[onnx.NodeProto]:
    """Nodes with those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _has_reference(node, version, functions) -> bool:
    key = (node.domain, node.op_type)
    if key in REFERENCES or key in functions:
        return True
    loaders = {"": load_op, "ai.onnx.ml": load_ml_op}
    if node.domain not in loaders:
        return False
    options = {"evaluator_cls": ReferenceEvaluator} if node.domain == "" else {}
    try:
        loaders[node.domain](node.domain, node.op_type, version, **options)
    except RuntimeContextError:  # a function whose body depends on the input types
        return True
    except (NotImplementedError, RuntimeImplementationError, ValueError):
        return False
    return True


def missing_references(model: onnx.ModelProto) -> list[str]:
    """Operators, as domain::Name, that neither ONNX nor this package can evaluate in NumPy."""
    functions = {(f.domain, f.name) for f in model.functions}
    missing = set()
    for body, imports in [(model.graph, model.opset_import)] + [
        (f, f.opset_import) for f in model.functions
    ]:
        versions = {i.domain: i.version for i in imports}
        for node in _nodes(body.node):
            if not _has_reference(node, versions.get(node.domain), functions):
                missing.add(f"{node.domain or 'ai.onnx'}::{node.op_type}")
    return sorted(missing)


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """An ``onnx.reference.ReferenceEvaluator`` that knows the operators of `REFERENCES`.

    bfloat16 arrays are ml_dtypes.bfloat16. Raises UnsupportedError naming every operator without a
    reference.
    """
    if missing := missing_references(model):
        raise UnsupportedError(f"no reference for {', '.join(missing)}")
    return _Evaluator(model)
