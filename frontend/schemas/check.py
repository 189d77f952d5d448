"""Judgement of one node of ours by its schema alone, before onnx.checker sees it.

What a schema cannot say (shapes, values, rules across inputs) stays with the operator's own check.
Every refusal reads `<op_type> node "<name>": <subject>: found ..., allowed ...`.
"""

import warnings
from collections.abc import Iterator, Mapping

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from ...runtime.errors import InvalidNodeError, InvalidTypeError, UnsupportedError, message
from . import SCHEMAS, schema

DOMAINS = {"npu": 1, "mindspore": 1, "com.microsoft": 1}
"""Operator domains of ours and the only version of each that there is."""

_CLOSED_DOMAINS = ("npu", "mindspore")  # no operator of another project is known in these
_IGNORES_UNKNOWN_ATTRIBUTES = {"QOrderedLongformerAttention"}
_RESERVED_INPUTS = {"SpeedFusionAttention": ("padding_mask",)}
# The specification of these names an error class in every message.
_CODED = {"NPUQuantMatmul", "QuantBatchMatMul", "NPUTransQuantParam"}

_SINGLE = OpSchema.FormalParameterOption.Single
_DECODERS = {
    AttributeProto.INT: lambda a: a.i,
    AttributeProto.FLOAT: lambda a: a.f,
    AttributeProto.STRING: lambda a: a.s.decode("utf-8", errors="replace"),
    AttributeProto.INTS: lambda a: list(a.ints),
}


def node_label(node: NodeProto) -> str:
    """`<op_type> node "<name>"`; a node without a name goes by its first output."""
    name = node.name or next((o for o in node.output if o), "")
    return f'{node.op_type} node "{name}"'


def dtype_name(elem_type: int | None) -> str:
    """TensorProto code as NumPy spells it: "float32", "bfloat16"; "not a tensor" for none."""
    if not elem_type:
        return "not a tensor"
    name = TensorProto.DataType.Name(elem_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def input_names(node: NodeProto, schema: OpSchema) -> dict[str, str]:
    """Schema's input name -> the node's value name, for the inputs that are present."""
    return {p.name: value for p, value in zip(schema.inputs, node.input) if value}


def output_names(node: NodeProto, schema: OpSchema) -> dict[str, str]:
    """Schema's output name -> the node's value name, for the outputs that are asked for."""
    return {p.name: value for p, value in zip(schema.outputs, node.output) if value}


def decode_attributes(
    node: NodeProto, schema: OpSchema
) -> dict[str, int | float | str | list[int]]:
    """The node's attributes as Python values, the schema's defaults filled in.

    An attribute that is absent and has no default is not in the result. Unknown attributes are
    refused, except on QOrderedLongformerAttention, where they give a UserWarning.

    Raises:
        InvalidNodeError: an attribute is unknown, missing, given twice or a reference to an
            attribute of an enclosing function.
        InvalidTypeError: an attribute's ONNX type is not the schema's.
    """
    label = node_label(node)
    code = _code(node, "E-ATTR")
    declared = schema.attributes
    decoded = {}
    for found in node.attribute:
        subject = f'attribute "{found.name}"'
        if found.name not in declared:
            text = message(
                label, subject, "an unknown attribute", ", ".join(sorted(declared)), code
            )
            if node.op_type in _IGNORES_UNKNOWN_ATTRIBUTES:
                warnings.warn(f"{text}; ignored", UserWarning, stacklevel=2)
                continue
            raise InvalidNodeError(text)
        if found.name in decoded:
            raise InvalidNodeError(message(label, subject, "more than one", "one", code))
        if found.ref_attr_name:
            raise InvalidNodeError(
                message(label, subject, f'a reference to "{found.ref_attr_name}"', "a value", code)
            )
        kind = _kind(declared[found.name])
        if found.type != kind:
            raise InvalidTypeError(
                message(
                    label,
                    subject,
                    f"type {AttributeProto.AttributeType.Name(found.type)}",
                    f"type {AttributeProto.AttributeType.Name(kind)}",
                    code,
                )
            )
        decoded[found.name] = _DECODERS[kind](found)
    for name, attribute in declared.items():
        if name in decoded:
            continue
        if attribute.required:
            kind = AttributeProto.AttributeType.Name(_kind(attribute))
            raise InvalidNodeError(
                message(label, f'attribute "{name}"', "none", f"one of type {kind}", code)
            )
        default = attribute.default_value
        if default.type != AttributeProto.UNDEFINED:
            decoded[name] = _DECODERS[default.type](default)
    return decoded


def check_arity(node: NodeProto, schema: OpSchema) -> None:
    """Refuse missing required inputs, superfluous inputs or outputs, and a node without output.

    Also refused: a reserved input that is given, and a value that is given both as an attribute
    and as the input of the same name.

    Raises:
        InvalidNodeError: naming the input, output or attribute.
    """
    label = node_label(node)
    code = _code(node, "E-ARITY")

    def refuse(subject: str, found: object, allowed: object) -> None:
        raise InvalidNodeError(message(label, subject, found, allowed, code))

    if len(node.input) > len(schema.inputs):
        refuse("inputs", len(node.input), f"at most {len(schema.inputs)}")
    if len(node.output) > len(schema.outputs):
        refuse("outputs", len(node.output), f"at most {len(schema.outputs)}")
    present = input_names(node, schema)
    attributes = {a.name for a in node.attribute}
    for parameter in schema.inputs:
        subject = f'input "{parameter.name}"'
        if parameter.option == _SINGLE and parameter.name not in present:
            refuse(subject, "none", "a tensor; the input is required")
        if parameter.name not in present:
            continue
        if parameter.name in _RESERVED_INPUTS.get(node.op_type, ()):
            refuse(subject, f'"{present[parameter.name]}"', "none; the input is reserved")
        if parameter.name in attributes:
            refuse(subject, "an input and an attribute of this name", "one of the two")
    asked = output_names(node, schema)
    if not asked:
        refuse("outputs", "none", "at least one")
    for parameter in schema.outputs:
        if parameter.option == _SINGLE and parameter.name not in asked:
            refuse(f'output "{parameter.name}"', "none", "a name; the output is required")


def check_types(node: NodeProto, schema: OpSchema, dtypes: Mapping[str, int | None]) -> None:
    """Judge element types against the schema's type constraints.

    Args:
        dtypes: schema's input name (`input_names` gives the values behind them) -> TensorProto
            code, None or UNDEFINED for something that is not a tensor. Inputs that are not in it
            are not judged.

    Raises:
        InvalidTypeError: a type is not allowed for its input, or inputs that share a type letter
            differ.
    """
    label = node_label(node)
    code = _code(node, "E-DTYPE")
    first = {}  # type letter -> (input that settled it, its element type)
    for parameter in schema.inputs:
        if parameter.name not in dtypes:
            continue
        found = dtypes[parameter.name]
        allowed = sorted(_onnx_dtype_name(t) for t in parameter.types)
        if dtype_name(found) not in allowed:
            raise InvalidTypeError(
                message(
                    label,
                    f'input "{parameter.name}"',
                    dtype_name(found),
                    " or ".join(allowed),
                    code,
                )
            )
        other, settled = first.setdefault(parameter.type_str, (parameter.name, found))
        if found != settled:
            raise InvalidTypeError(
                message(
                    label,
                    f'input "{parameter.name}"',
                    dtype_name(found),
                    f'{dtype_name(settled)}, the type of input "{other}"',
                    code,
                )
            )


def check_nodes(model: ModelProto) -> None:
    """`check_arity`, `decode_attributes` and `check_types` of every node of ours, in graph order.

    Subgraphs are looked into, local functions are not: inline them first. Element types come from
    what the model declares and what lenient shape inference adds, so that a wrong type is refused
    here and not by the ONNX checker; an input whose type stays unknown is not judged.

    Raises:
        InvalidNodeError, InvalidTypeError: as the three functions do.
    """
    _check_graph(onnx.shape_inference.infer_shapes(model).graph, {})


def _check_graph(graph: GraphProto, outer: Mapping[str, int | None]) -> None:
    """Judge the nodes of `graph`; `outer` holds the types of values of the enclosing graphs."""
    values = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            values[value.name] = value.type.tensor_type.elem_type
        elif value.type.WhichOneof("value"):
            values[value.name] = None  # a sequence, an optional, a sparse tensor
    values |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        ours = schema(node.domain, node.op_type)
        if ours is not None:
            check_arity(node, ours)
            decode_attributes(node, ours)
            given = input_names(node, ours).items()
            types = {name: values[value] for name, value in given if value in values}
            check_types(node, ours, {name: t for name, t in types.items() if t != 0})
        for inner in subgraphs(node):
            _check_graph(inner, values)


def check_domain_versions(model: ModelProto) -> None:
    """Refuse versions other than 1 of our domains, and operators in them that do not exist.

    Subgraphs and model-local functions are looked into. Operators of com.microsoft that are not
    ours pass.

    Raises:
        InvalidNodeError: a domain of `DOMAINS` is imported in another version, or used by a node
            without being imported.
        UnsupportedError: a node of domain npu or mindspore has an unknown op_type.
    """
    scopes = [(list(model.graph.node), model.opset_import)]
    scopes += [(list(f.node), f.opset_import) for f in model.functions]
    for nodes, imports in scopes:
        versions = {entry.domain: entry.version for entry in imports}
        users: dict[str, NodeProto] = {}
        for node in _walk(nodes):
            if node.domain in DOMAINS:
                users.setdefault(node.domain, node)
            if node.domain in _CLOSED_DOMAINS and schema(node.domain, node.op_type) is None:
                known = ", ".join(s.name for s in SCHEMAS if s.domain == node.domain)
                raise UnsupportedError(
                    message(
                        node_label(node),
                        f'domain "{node.domain}"',
                        f"operator {node.op_type}",
                        known,
                    )
                )
        for domain, version in DOMAINS.items():
            found = versions.get(domain)
            if found == version or (found is None and domain not in users):
                continue
            raise InvalidNodeError(
                message(
                    node_label(users[domain]) if domain in users else "model",
                    f'opset_import of domain "{domain}"',
                    "none" if found is None else f"version {found}",
                    f"version {version}",
                )
            )


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes (bodies of If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _walk(nodes) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _walk(graph.node)


def _code(node: NodeProto, code: str) -> str:
    return code if node.op_type in _CODED else ""


def _kind(attribute: OpSchema.Attribute) -> int:
    return AttributeProto.AttributeType.Value(attribute.type.name)


def _onnx_dtype_name(type_str: str) -> str:
    """ "tensor(float)" -> "float32"."""
    name = type_str.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)
