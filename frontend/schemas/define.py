"""Shorthands for writing an onnx.defs.OpSchema, so that an operator's file reads like its table."""

from collections.abc import Callable, Sequence

from onnx import AttributeProto, helper
from onnx.defs import OpSchema

_OPTIONAL = OpSchema.FormalParameterOption.Optional
_KINDS = {
    AttributeProto.INT: OpSchema.AttrType.INT,
    AttributeProto.INTS: OpSchema.AttrType.INTS,
    AttributeProto.FLOAT: OpSchema.AttrType.FLOAT,
    AttributeProto.STRING: OpSchema.AttrType.STRING,
}


def tensors(*dtypes: str) -> list[str]:
    """ONNX type strings of tensors: tensors("int8") is ["tensor(int8)"]."""
    return [f"tensor({dtype})" for dtype in dtypes]


def parameter(name: str, type_str: str, doc: str) -> OpSchema.FormalParameter:
    """An input or output that must be there; `type_str` is a letter of the type constraints."""
    return OpSchema.FormalParameter(name, type_str, doc)


def optional(name: str, type_str: str, doc: str) -> OpSchema.FormalParameter:
    """An input or output that may be left out, by an empty name or by ending the list."""
    return OpSchema.FormalParameter(name, type_str, doc, param_option=_OPTIONAL)


def attribute(name: str, default: int | float | str, doc: str) -> OpSchema.Attribute:
    """An attribute with a default; INT, FLOAT or STRING by the default's Python type."""
    return OpSchema.Attribute(name, helper.make_attribute(name, default), doc)


def required_attribute(
    name: str, doc: str, kind: AttributeProto.AttributeType = AttributeProto.INT
) -> OpSchema.Attribute:
    """An attribute without a default that every node must carry."""
    return OpSchema.Attribute(name, _KINDS[kind], doc, required=True)


def list_attribute(name: str, doc: str) -> OpSchema.Attribute:
    """An INTS attribute without a default that may be absent."""
    return OpSchema.Attribute(name, OpSchema.AttrType.INTS, doc, required=False)


def define(
    domain: str,
    name: str,
    doc: str,
    *,
    inputs: Sequence[OpSchema.FormalParameter],
    outputs: Sequence[OpSchema.FormalParameter],
    types: dict[str, list[str]],
    attributes: Sequence[OpSchema.Attribute],
    infer: Callable,
    since_version: int = 1,
) -> OpSchema:
    """The schema of `domain::name` with its type and shape inference function.

    `infer` must not raise, whatever the node looks like: an exception would leave
    onnx.shape_inference in every mode. What cannot be inferred stays unknown.
    """
    schema = OpSchema(
        name,
        domain,
        since_version,
        doc,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(letter, allowed, "") for letter, allowed in types.items()],
        attributes=attributes,
    )
    if hasattr(schema, "set_type_and_shape_inference_function"):  # from onnx 1.23 on
        schema.set_type_and_shape_inference_function(infer)
    return schema
