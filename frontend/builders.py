"""Builders: models and nodes of our operators from Python values.

`node_model` is the workhorse of tests and examples; the others offer the call signatures under
which the operators are known where they come from.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.defs import OpSchema

from ..runtime.errors import InvalidNodeError, InvalidTypeError, message
from . import schemas
from .schemas.check import check_arity, check_domain_versions, check_types, decode_attributes

TensorType = tuple[object, Sequence[int | str | None]]
"""(dtype, shape): anything np.dtype takes (ml_dtypes.bfloat16 too), sizes or symbols or None."""

_IR_VERSION = 10  # the oldest that carries opset 21: readable by older tools
_LAST_STORED_DIM_MAX = 65535
_LINEAR_OUTPUT_DTYPES = {
    "int8": TensorProto.INT8,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


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
    _declare_the_rest(model.graph, schema)
    if check:
        check_domain_versions(model)
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


def _declare_the_rest(graph: onnx.GraphProto, schema: OpSchema) -> None:
    """Give the outputs that inference left open some type, which onnx.checker asks for.

    Such a node breaks a rule that its operator's own check refuses, in better words.
    """
    for value in graph.output:
        tensor = value.type.tensor_type
        if not tensor.elem_type:
            parameter = next(p for p in schema.outputs if output_name(schema, p.name) == value.name)
            tensor.elem_type = _elem_type(min(parameter.types))
        if not tensor.HasField("shape"):
            tensor.shape.dim.add()


def _elem_type(type_str: str) -> int:
    """ "tensor(int8)" -> TensorProto.INT8."""
    name = type_str.removeprefix("tensor(").removesuffix(")")
    return TensorProto.DataType.Value(name.upper())


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


def linear_a8w8_quant(
    in_features: int,
    out_features: int,
    bias: bool = True,
    offset: bool = False,
    pertoken_scale: bool = False,
    output_dtype: object = None,
    *,
    name: str = "linear",
    input: str = "x",
    output: str = "y",
) -> NodeProto:
    """The node of torch_npu's `LinearA8W8Quant` module: `npu::NPUQuantMatmul`, transpose_x2 = 1.

    Reads `input` (.., m, in_features) int8 and the tensors `<name>.weight` (out_features,
    in_features) int8, `<name>.scale` (1,) or (out_features,) and, as asked for, `<name>.bias`
    (out_features,), `<name>.offset` (1,) or (out_features,) float32, `<name>.pertoken_scale` (m,)
    float32; writes `output` (.., m, out_features).

    Args:
        output_dtype: None or int8, float16, bfloat16, as anything np.dtype takes. int32, which the
            function behind the module has, is refused as the module refuses it.

    Raises:
        InvalidTypeError: a size is not an int, a flag not a bool, a name not a str, output_dtype
            no dtype.
        InvalidNodeError: a size is out of range, or the combination has no meaning.
    """
    label = f'LinearA8W8Quant node "{name}"'
    for argument, value in (("in_features", in_features), ("out_features", out_features)):
        _expect(label, argument, value, int, "an int")
        if value < 1:
            raise InvalidNodeError(message(label, argument, value, "at least 1", "E-EMPTY"))
    if in_features > _LAST_STORED_DIM_MAX:
        raise InvalidNodeError(
            message(label, "in_features", in_features, f"at most {_LAST_STORED_DIM_MAX}", "E-LIMIT")
        )
    flags = {"bias": bias, "offset": offset, "pertoken_scale": pertoken_scale}
    for argument, value in flags.items():
        _expect(label, argument, value, bool, "a bool")
    for argument, value in (("name", name), ("input", input), ("output", output)):
        _expect(label, argument, value, str, "a str")
    dtype = _linear_output_dtype(label, output_dtype)
    if offset and dtype != "int8":
        raise InvalidNodeError(
            message(label, "offset", f"with {dtype} output", "int8 output only", "E-COMBO")
        )
    if pertoken_scale and dtype == "int8":
        raise InvalidNodeError(
            message(
                label,
                "pertoken_scale",
                "with int8 output",
                "float16 or bfloat16 output only",
                "E-COMBO",
            )
        )
    schema = schemas.linear_a8w8_quant.SCHEMA
    present = {"x1", "x2", "scale"} | {argument for argument, value in flags.items() if value}
    values = {"x1": input, "x2": f"{name}.weight"}
    return helper.make_node(
        schema.name,
        _ended(
            [
                values.get(p.name, f"{name}.{p.name}") if p.name in present else ""
                for p in schema.inputs
            ]
        ),
        [output],
        name=name,
        domain=schema.domain,
        doc_string=f"LinearA8W8Quant(in_features={in_features}, out_features={out_features})",
        output_dtype=_LINEAR_OUTPUT_DTYPES[dtype],
        transpose_x2=1,
    )


def speed_fusion_attention(
    query: str,
    key: str,
    value: str,
    head_num: int,
    input_layout: str,
    *,
    pse: str | None = None,
    padding_mask: str | None = None,
    atten_mask: str | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    inner_precise: int = 0,
    prefix: str | Sequence[int] | None = None,
    actual_seq_qlen: str | Sequence[int] | None = None,
    actual_seq_kvlen: str | Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: str | Sequence[int] | None = None,
    kv_start_idx: str | Sequence[int] | None = None,
    seed: str | int | None = None,
    offset: str | int | None = None,
    softmax_layout: str = "",
    outputs: Sequence[str] = ("attention_out",),
    name: str = "",
) -> NodeProto:
    """The node of `mindspore.ops.speed_fusion_attention(...)`, argument by argument.

    Tensors are given by the names of their values. Arguments that exist in a constant and a
    runtime form (prefix to offset) are an int or a list of int, or such a name. MindSpore takes
    seed and offset from its generator; here the caller passes them, and absent means 0.

    Args:
        outputs: names of the values to write, in the operator's order (attention_out,
            softmax_max, softmax_sum, softmax_out, seed, offset, numels); "" for one not wanted.
        name: the node's name.

    Raises:
        InvalidTypeError: an argument of another type.
        InvalidNodeError: a required tensor is missing or padding_mask is given. Values, shapes and
            modes are judged when the model is compiled.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "pse": pse,
        "padding_mask": padding_mask,
        "atten_mask": atten_mask,
    }
    attributes = {
        "head_num": head_num,
        "input_layout": input_layout,
        "scale": scale,
        "keep_prob": keep_prob,
        "pre_tokens": pre_tokens,
        "next_tokens": next_tokens,
        "inner_precise": inner_precise,
        "sparse_mode": sparse_mode,
        "gen_mask_parallel": gen_mask_parallel,
        "sync": sync,
        "pse_type": pse_type,
        "softmax_layout": softmax_layout,
    }
    schema = schemas.speed_fusion_attention.SCHEMA
    label = f'{schema.name} node "{name or next(iter(outputs), "")}"'
    for argument, found in tensors.items():
        if found is not None:
            _expect(label, f'input "{argument}"', found, str, "the name of a tensor")
    either_form = {
        "prefix": prefix,
        "actual_seq_qlen": actual_seq_qlen,
        "actual_seq_kvlen": actual_seq_kvlen,
        "q_start_idx": q_start_idx,
        "kv_start_idx": kv_start_idx,
        "seed": seed,
        "offset": offset,
    }
    for argument, found in either_form.items():
        (tensors if isinstance(found, str) else attributes)[argument] = found
    node = helper.make_node(
        schema.name,
        _ended([tensors.get(p.name) or "" for p in schema.inputs]),
        list(outputs),
        name=name,
        domain=schema.domain,
    )
    node.attribute.extend(
        attribute_proto(schema, argument, found)
        for argument, found in attributes.items()
        if found is not None
    )
    check_arity(node, schema)
    decode_attributes(node, schema)
    return node


def _linear_output_dtype(label: str, output_dtype: object) -> str:
    """Name of the output type of the linear module; None is int8."""
    try:
        dtype = "int8" if output_dtype is None else np.dtype(output_dtype).name
    except TypeError as error:
        raise InvalidTypeError(
            message(label, "output_dtype", repr(output_dtype), "None or a dtype", "E-ATTR")
        ) from error
    if dtype not in _LINEAR_OUTPUT_DTYPES:
        allowed = f"None or {', '.join(_LINEAR_OUTPUT_DTYPES)}"
        raise InvalidNodeError(message(label, "output_dtype", dtype, allowed, "E-ATTR"))
    return dtype


def _expect(label: str, subject: str, value: object, kind: type, allowed: str) -> None:
    """Refuse a Python argument of another type; a bool is no int here."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidTypeError(
            message(label, subject, f"{value!r} of type {type(value).__name__}", allowed)
        )
