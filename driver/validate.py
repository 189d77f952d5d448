"""A compiled module beside its model in NumPy: per output, and on failure per node.

What one of our operators puts out directly is judged by its specification
(``reference.compare``); other integers must be equal, other floats agree within ``TOLERANCES``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper
from tvm.target import Target

from ..frontend import schemas
from ..frontend.model import all_nodes, graph_inputs, load, prepare
from ..frontend.schemas.check import (
    decode_attributes,
    input_names,
    node_label,
    output_names,
    subgraphs,
)
from ..reference.compare import Comparison, Tolerance, compare
from ..reference.whole_model import evaluator, missing_references
from ..runtime.errors import OpferryError
from ..runtime.module import Module, as_array
from .build import compile_prepared
from .inputs import random_inputs
from .report import FAILED, NO_REFERENCE, OK, OK_BY_NODE, Divergence, OutputReport, Report

TOLERANCES = {
    "float64": Tolerance(atol=1e-6, rtol=1e-6),
    "float32": Tolerance(atol=1e-4, rtol=1e-4),
    "float16": Tolerance(atol=4e-3, rtol=4e-3),
    "bfloat16": Tolerance(atol=3e-2, rtol=3e-2),
}
"""|got - want| <= atol * max|want| + rtol * |want| for outputs of standard operators.

float32: sums of a few thousand products in another order (sqrt(4096) * 2**-24 = 4e-6 of the
largest) and polynomial transcendentals (1e-6), through about ten layers. float64: TVM's exp, tanh
and erf are a little better than float32, not as good as float64. float16, bfloat16: four units in
the last place, 2**-10 and 2**-7, since the reference rounds after each operator and a fused kernel
does not. Whatever falls outside is looked at node by node before it is called a failure.
"""


def validate(
    model: str | os.PathLike[str] | ModelProto,
    module: Module,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Run ``module`` and, in NumPy, the model it was compiled from, and compare every output.

    ``inputs`` as for ``Module.run``; None makes valid random ones from ``seed``. ``progress`` is
    told the name of each step. Raises ``OpferryError`` when the model is not the module's or the
    inputs are not valid; a wrong result raises nothing, it is in the report.
    """
    proto = _prepared_like(model, module)
    if inputs is None:
        inputs = random_inputs(proto, module.inputs, module.manifest.checks, seed)
    progress("run")
    got = module.run(inputs)
    feeds = {spec.name: as_array(spec, inputs[spec.name]) for spec in module.inputs}
    progress("evaluate in NumPy")
    reference = _Reference(proto)
    want = {**reference.constants, **feeds}
    for _, run in reference.steps():
        want |= run(want)
    progress("compare")
    reports = tuple(_judge_output(proto, name, got, want) for name in got)
    report = Report(reports, tuple(reference.missing))
    return report if report.ok else _look_closer(proto, module, feeds, got, report, progress)


def _prepared_like(model: str | os.PathLike[str] | ModelProto, module: Module) -> ModelProto:
    """The model prepared with the shapes that the module was compiled for."""
    model = load(model)
    found = [value.name for value in graph_inputs(model.graph)]
    wanted = [spec.name for spec in module.inputs]
    results = [value.name for value in model.graph.output]
    if found != wanted or results != [spec.name for spec in module.outputs]:
        raise OpferryError(
            f"validate: found a model with inputs {found} and outputs {results}, allowed the one "
            f"that the module was compiled from: {module!r}"
        )
    sizes = {
        spec.name: [d if isinstance(d, int) else None for d in spec.shape] for spec in module.inputs
    }
    return prepare(model, {name: dims for name, dims in sizes.items() if dims})


class _Reference:
    """A prepared model in NumPy, node by node. What nobody can evaluate is left out."""

    def __init__(self, model: ModelProto):
        self.missing = missing_references(model)
        evaluable = ModelProto()
        evaluable.CopyFrom(model)
        nodes = [n for n in model.graph.node if not self._operators(n) & set(self.missing)]
        del evaluable.graph.node[:]
        evaluable.graph.node.extend(nodes)
        self._nodes = nodes
        self._evaluator = evaluator(evaluable)
        self.constants: dict[str, Any] = {"": None, **self._evaluator.rt_inits_}
        """Initializers by name, and the absent input."""

    @staticmethod
    def _operators(node: NodeProto) -> set[str]:
        nodes = [node, *(inner for graph in subgraphs(node) for inner in all_nodes(graph))]
        return {f"{n.domain or 'ai.onnx'}::{n.op_type}" for n in nodes}

    def steps(self) -> Iterator[tuple[NodeProto, Callable[[Mapping[str, Any]], dict[str, Any]]]]:
        """Each node with a function from known values to its outputs by name.

        The function returns nothing when an input is not known, or when ONNX's reference lacks the
        node's particular form.
        """
        for proto, node in zip(self._nodes, self._evaluator.rt_nodes_):
            yield proto, lambda known, proto=proto, node=node: self._run(proto, node, known)

    def _run(self, proto: NodeProto, node: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        if any(name not in known for name in {*proto.input, *_captured(proto)}):
            return {}
        context = {"context": dict(known)} if node.need_context() else {}
        try:
            with np.errstate(all="ignore"):
                results = node.run(*(known[name] for name in proto.input), **context)
        except OpferryError:
            raise
        except Exception as error:  # ONNX's reference raises anything for what it lacks
            self.missing.append(f"{node_label(proto)} ({error})")
            return {}
        return {
            name: value for name, value in zip(proto.output, results) if name and value is not None
        }


def _captured(node: NodeProto) -> set[str]:
    """Values of the graph around that a node's subgraphs read."""
    names: set[str] = set()
    for graph in subgraphs(node):
        inside = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
        inside |= {value.name for value in graph.input} | {""}
        read = {value.name for value in graph.output}
        for inner in graph.node:
            read |= {*inner.input, *_captured(inner)}
        names |= read - inside
    return names


def _judge_output(
    model: ModelProto, name: str, got: Mapping[str, np.ndarray], want: Mapping[str, Any]
) -> OutputReport:
    value = got[name]
    described = {"name": name, "dtype": value.dtype.name, "shape": value.shape}
    if want.get(name) is None:
        return OutputReport(**described, verdict=NO_REFERENCE)
    producer = next((n for n in model.graph.node if name in n.output), None)
    comparison, judge = _compare(producer, name, got, want)
    return OutputReport(
        **described,
        verdict=OK if comparison.ok else FAILED,
        max_abs_error=comparison.max_abs_error,
        max_rel_error=comparison.max_rel_error,
        mismatches=comparison.mismatches,
        excused=comparison.allowed_mismatches,
        judged_by=judge,
        note=comparison.note,
    )


def _compare(
    producer: NodeProto | None, name: str, got: Mapping[str, np.ndarray], want: Mapping[str, Any]
) -> tuple[Comparison, str]:
    """``got[name]`` against the reference, and by which rule; ``want`` holds the node's inputs."""
    schema = producer and schemas.schema(producer.domain, producer.op_type)
    if not schema:
        return _close(name, got[name], np.asarray(want[name])), _rule(got[name].dtype)
    inputs = {p: want[value] for p, value in input_names(producer, schema).items()}
    given = {attribute.name for attribute in producer.attribute}
    attrs = {k: v for k, v in decode_attributes(producer, schema).items() if k in given}
    parameter = next(p for p, value in output_names(producer, schema).items() if value == name)
    position = [p.name for p in schema.outputs].index(parameter)
    asked = [got[name] if i == position else None for i in range(len(schema.outputs))]
    return compare(producer.op_type, inputs, attrs, asked)[0], f"{producer.op_type}'s specification"


def _rule(dtype: np.dtype) -> str:
    if dtype.name not in TOLERANCES:
        return "equality"
    atol, rtol = TOLERANCES[dtype.name]
    return f"{dtype.name}: atol {atol:g} of the largest, rtol {rtol:g}"


def _close(name: str, got: np.ndarray, want: np.ndarray) -> Comparison:
    """By ``TOLERANCES``; integers and booleans by equality; infinities and NaN in equal places."""
    if got.shape != want.shape or got.dtype != want.dtype:
        note = f"found {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
        return Comparison(name, False, math.inf, math.inf, want.size, note=note)
    if got.dtype.name not in TOLERANCES:
        bad = got != want
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        relative = error / np.maximum(np.abs(want.astype(np.float64)), 1)
    else:
        tolerance = TOLERANCES[got.dtype.name]
        a, b = got.astype(np.float64), want.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        error = np.where(np.isnan(error), np.inf, error)
        size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        bad = error > tolerance.atol * size + tolerance.rtol * np.where(np.isfinite(b), abs(b), 0)
        relative = error / max(size, np.finfo(np.float64).tiny)
    return Comparison(
        name,
        ok=not bad.any(),
        max_abs_error=float(error.max(initial=0.0)),
        max_rel_error=float(relative.max(initial=0.0)),
        mismatches=int(np.count_nonzero(bad)),
    )


def _look_closer(
    model: ModelProto,
    module: Module,
    feeds: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    report: Report,
    progress: Callable[[str], None],
) -> Report:
    """The report with the first node that differs from its reference on the same inputs.

    The model is compiled again with every intermediate tensor as an output. When no node differs
    and that module agrees with the given one, the outputs differ by rounding alone.
    """
    progress("compile with all intermediate tensors")
    exposed = _exposed(model)
    try:
        values = compile_prepared(exposed, Target(module.manifest.target)).run(feeds)
    except OpferryError as error:
        return replace(report, note=f"the nodes could not be looked at one by one: {error}")
    progress("compare node by node")
    reference = _Reference(model)
    known = {**reference.constants, **feeds, **values}
    for node, run in reference.steps():
        want = run(known)
        for name in want.keys() & values.keys():
            comparison, _ = _compare(node, name, values, {**known, **want})
            if not comparison.ok:
                found = Divergence(
                    node_label(node),
                    name,
                    comparison.max_abs_error,
                    comparison.max_rel_error,
                    comparison.mismatches,
                    comparison.note,
                )
                return replace(report, first_divergence=found)
    same = {name: _close(name, got[name], values[name]).ok for name in got}
    outputs = tuple(
        replace(o, verdict=OK_BY_NODE) if o.verdict == FAILED and same[o.name] else o
        for o in report.outputs
    )
    note = (
        "every node agrees with its reference on the same inputs; the difference is accumulated "
        "rounding"
        if all(same.values())
        else "every node agrees with its reference when compiled anew: the module is not the one "
        "that this model compiles to"
    )
    return replace(report, outputs=outputs, note=note)


def _exposed(model: ModelProto) -> ModelProto:
    """A copy whose outputs are all tensors that its nodes compute, after its own outputs."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    no_tensor = {
        v.name for v in inferred if v.type.WhichOneof("value") not in (None, "tensor_type")
    }
    present = {value.name for value in exposed.graph.output} | no_tensor | {""}
    for node in model.graph.node:
        for name in node.output:
            if name not in present:
                present.add(name)
                exposed.graph.output.append(helper.make_empty_tensor_value_info(name))
    return exposed
