"""Constant folding on the ONNX graph, so that a weight behind a Transpose or a Cast is still a
weight.

Nodes of the standard domain whose inputs are all known are evaluated with ONNX's own reference and
become initializers. Ours are never folded: their answers come from compiled kernels.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from .schemas.check import subgraphs

_NOT_A_FUNCTION = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}
_GROWTH = 1 << 16
"""A result may exceed its inputs by this many bytes: an Expand stays a node, a small table does
not.
"""


def fold_constants(model: ModelProto) -> ModelProto:
    """``model`` with its constant nodes and constant expressions replaced by initializers."""
    graph = model.graph
    fed = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    known = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
    opsets = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    kept: list[NodeProto] = []
    folded: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        results = _evaluate(node, known, opsets) if _foldable(node, known) else None
        if results is None:
            kept.append(node)
        else:
            folded |= results
            known |= results
    if not folded:
        return model
    wanted = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    wanted |= {name for node in kept for name in _captured(node)}
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in folded.items() if name in wanted)
    return model


def _foldable(node: NodeProto, known: dict[str, onnx.TensorProto]) -> bool:
    return (
        node.domain in ("", "ai.onnx")
        and node.op_type not in _NOT_A_FUNCTION
        and all(name in known for name in node.input if name)
        and not any(subgraphs(node))
    )


def _evaluate(node, known, opsets) -> dict[str, onnx.TensorProto] | None:
    """Output name -> tensor, or None when the reference cannot evaluate the node or the result is
    too large.
    """
    feeds = {name: known[name] for name in node.input if name}
    names = [name for name in node.output if name]
    graph = onnx.helper.make_graph(
        [node],
        "fold",
        [],
        [onnx.helper.make_empty_tensor_value_info(name) for name in names],
        list(feeds.values()),
    )
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(
                None, {}
            )
    except Exception:  # the reference raises anything for what it lacks; the node then stays a node
        return None
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        return None
    size = sum(result.nbytes for result in results)
    budget = sum(numpy_helper.to_array(tensor).nbytes for tensor in feeds.values()) * 4 + _GROWTH
    if feeds and size > budget:
        return None
    return {
        name: numpy_helper.from_array(np.asarray(result), name)
        for name, result in zip(names, results)
    }


def _captured(node: NodeProto) -> set[str]:
    """Names that a node's subgraphs read, from wherever."""
    names: set[str] = set()
    for graph in subgraphs(node):
        names |= {value.name for value in graph.output}
        for inner in graph.node:
            names |= set(inner.input) | _captured(inner)
    return names
