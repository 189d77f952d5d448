"""Builders: models and nodes of our operators from Python values.

`node_model` is the workhorse of tests and examples; the others offer the call signatures under
which the operators are known where they come from.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.defs import OpSchema

from ..runtime.errors import InvalidNodeError, message
from . import schemas
from .schemas.check import check_arity, check_domain_versions, check_types, decode_attributes

TensorType = tuple[object, Sequence[int | str | None]]
"""(dtype, shape): anything np.dtype takes (ml_dtypes.bfloat16 too), sizes or symbols or None."""

_IR_VERSION = 10  # the oldest that carries opset 21: readable by older tools


def node_model(
    op_type: str,
    feeds: Mapping[str, np.ndarray | TypeProto | TensorType | None],
    outputs: Sequence[str] | None = None,
    initializers: Iterable[str] = (),
    symbolic: Mapping[str, Mapping[int, str] | Sequence[str | int | None]] | None = None,
    *,
    name: str = "node",
    opset: int = 21,
    check: bool = True,
    **attrs,
) -> ModelProto:
    """A model whose graph is one node of ours.

    Graph inputs carry the schema's input names, graph outputs the schema's output names, with
    "_out" appended where an input has the same name (SpeedFusionAttention: "seed_out",
    "offset_out").

        model = node_model(
            "NPUQuantMatmul",
            {"x1": x1, "x2": weight, "scale": scale, "bias": bias},
            initializers=["x2", "scale", "bias"],
            symbolic={"x1": {0: "M"}},
            transpose_x2=1,
        )

    Args:
        op_type: an operator of `frontend.schemas.SCHEMAS`; its domain follows.
        feeds: schema's input name -> array (its dtype and shape become the graph input's type),
            or a type without data: (dtype, shape) or onnx.TypeProto. None is an absent input.
        outputs: schema's names of the outputs to ask for; the default is every output.
        initializers: names of feeds whose arrays are stored in the model instead of being inputs.
        symbolic: input name -> {axis: symbol}, or one entry per axis where None keeps the size.
        name: the node's name, as error messages show it.
        opset: version of the default domain.
        check: False builds the model without judging it, to show a malformed one to others.
        attrs: attributes by name: int, float, str, list of int; an int where the schema says
            FLOAT becomes a float. An onnx.AttributeProto goes in as it is (for wrong types).

    Raises:
        InvalidNodeError, InvalidTypeError: with `check`, what the schema alone can refuse. Rules
            about shapes and values are the compiler's.
    """
    schemas.register()
    schema = _schema_of(op_type)
    stored = set(initializers)
    symbolic = dict(symbolic or {})
    feeds = {key: value for key, value in feeds.items() if value is not None}
    names = [p.name for p in schema.inputs]
    for subject, given in (("feeds", feeds), ("initializers", stored), ("symbolic", symbolic)):
        known = names if subject == "feeds" else list(feeds)
        unknown = [key for key in given if key not in known]
        if unknown:
            raise InvalidNodeError(
                message(f'{op_type} node "{name}"', subject, unknown, ", ".join(known))
            )
    types = {
        key: _with_symbols(_type_proto(value), symbolic.get(key), key)
        for key, value in feeds.items()
    }
    node = helper.make_node(
        op_type,
        _ended([key if key in feeds else "" for key in names]),
        _ended(_output_values(schema, outputs)),
        name=name,
        domain=schema.domain,
    )
    node.attribute.extend(
        attribute_proto(schema, key, value) for key, value in attrs.items() if value is not None
    )
    if check:
        check_arity(node, schema)
        decode_attributes(node, schema)
        check_types(node, schema, {key: t.tensor_type.elem_type for key, t in types.items()})
    graph = helper.make_graph(
        [node],
        op_type,
        [helper.make_value_info(key, types[key]) for key in names if key in feeds.keys() - stored],
        [onnx.ValueInfoProto(name=value) for value in node.output if value],
        initializer=[_tensor(feeds[key], key) for key in names if key in stored],
    )
    imports = {"": opset, schema.domain: 1} if schema.domain else {"": opset}
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*item) for item in imports.items()],
        ir_version=_IR_VERSION,
        producer_name="opferry",
    )
    model = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]  # repeats the outputs
    if check:
        check_domain_versions(model)
        # An output that inference could not give a shape belongs to a node that the operator's
        # own check refuses, in better words than onnx.checker has.
        if all(o.type.tensor_type.HasField("shape") for o in model.graph.output):
            onnx.checker.check_model(model, full_check=True)
    return model


def output_name(schema: OpSchema, name: str) -> str:
    """Graph value that `node_model` gives the schema's output `name`."""
    return f"{name}_out" if name in {p.name for p in schema.inputs} else name


def attribute_proto(schema: OpSchema, name: str, value) -> AttributeProto:
    """`value` as an attribute of the type that the schema declares, as far as it can be.

    An int for a FLOAT becomes a float and an empty list an INTS; everything else keeps the ONNX
    type of its Python type, right or wrong.
    """
    if isinstance(value, AttributeProto):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    declared = schema.attributes.get(name)
    if declared is not None and declared.type == OpSchema.AttrType.FLOAT and isinstance(value, int):
        value = float(value)
    if value == []:
        return AttributeProto(name=name, type=AttributeProto.INTS)
    return helper.make_attribute(name, value)


def _schema_of(op_type: str) -> OpSchema:
    for schema in schemas.SCHEMAS:
        if schema.name == op_type:
            return schema
    raise InvalidNodeError(
        message("node_model", "op_type", op_type, ", ".join(s.name for s in schemas.SCHEMAS))
    )


def _output_values(schema: OpSchema, outputs: Sequence[str] | None) -> list[str]:
    names = [p.name for p in schema.outputs]
    unknown = set(outputs or ()) - set(names)
    if unknown:
        raise InvalidNodeError(
            message(f"{schema.name} node", "outputs", sorted(unknown), ", ".join(names))
        )
    return [output_name(schema, n) if outputs is None or n in outputs else "" for n in names]


def _ended(values: list[str]) -> list[str]:
    """Without the empty names at the end."""
    while values and not values[-1]:
        values = values[:-1]
    return values


def _type_proto(value: np.ndarray | TypeProto | TensorType) -> TypeProto:
    if isinstance(value, TypeProto):
        return value
    if isinstance(value, tuple):
        dtype, shape = value
    else:
        array = np.asarray(value)
        dtype, shape = array.dtype, array.shape
    return helper.make_tensor_type_proto(
        helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape)
    )


def _with_symbols(
    found: TypeProto, symbols: Mapping[int, str] | Sequence[str | int | None] | None, name: str
) -> TypeProto:
    """`found` with the symbols put in place of its sizes."""
    if symbols is None:
        return found
    rank = len(found.tensor_type.shape.dim)
    by_axis = symbols if isinstance(symbols, Mapping) else dict(enumerate(symbols))
    wrong = [axis for axis in by_axis if not -rank <= axis < rank]
    if wrong:
        raise InvalidNodeError(
            message("node_model", f'symbolic "{name}"', f"axes {wrong}", f"axes of rank {rank}")
        )
    typed = TypeProto()
    typed.CopyFrom(found)
    for axis, symbol in by_axis.items():
        if isinstance(symbol, str):
            typed.tensor_type.shape.dim[axis].dim_param = symbol
        elif symbol is not None:
            typed.tensor_type.shape.dim[axis].dim_value = symbol
    return typed


def _tensor(value, name: str) -> TensorProto:
    if isinstance(value, (tuple, TypeProto)):
        raise InvalidNodeError(
            message("node_model", f'initializer "{name}"', "a type without data", "an array")
        )
    return numpy_helper.from_array(np.asarray(value), name)
