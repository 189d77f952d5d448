"""Random inputs that a model accepts: from the types of its inputs and the rules of our operators.

Sizes of symbolic dimensions are drawn until the module's checks on dimensions hold; values follow
the operator that reads them (through Cast, Reshape and the like); everything else is of order one.
The module's own checks judge the result, so that what is returned is valid or an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.defs import OpSchema

from ..frontend.model import all_nodes, bind_shapes, graph_inputs, np_dtype, our_nodes
from ..frontend.quant_param import npu_trans_quant_param
from ..frontend.schemas.check import decode_attributes, input_names
from ..runtime.checks import Check, evaluate
from ..runtime.errors import InvalidInputError
from ..runtime.manifest import Tensor

ATTEMPTS = 20
SIZE_DRAWS = 5000
SMALL_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32)
INT8_DEVIATION = 73.9  # of a uniform int8: sqrt((256 ** 2 - 1) / 12)
LEVEL = 40.0  # standard deviation wanted of a quantised result, in steps of its scale
COMPRESSED_MASK = (2048, 2048)  # SpeedFusionAttention, sparse_mode 2 to 4

_SAME_VALUES = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}

Values = dict[str, np.ndarray | float]
Rng = np.random.Generator


@dataclass(frozen=True)
class View:
    """One of our nodes as the makers of its inputs see it. Keys are the schema's input names."""

    attrs: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the present inputs, where shape inference knows them."""
    constants: Mapping[str, np.ndarray]
    """Values that are not to be made: initializers, and lists given as attributes."""
    elem_types: Mapping[str, int]
    """onnx.TensorProto codes of the present inputs, where they are known."""

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def numbers(self, name: str) -> np.ndarray | None:
        return self.constants.get(name)


def random_inputs(
    model: ModelProto, inputs: Sequence[Tensor], checks: Sequence[Check] = (), seed: int = 0
) -> dict[str, np.ndarray]:
    """Graph input name -> array of its dtype and shape, the same for the same ``seed``.

    ``model`` is prepared (``frontend.model.prepare``); ``inputs`` and ``checks`` are those of the
    module compiled from it. Raises ``InvalidInputError`` when no valid inputs were found.
    """
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, attempt])
        sizes = _sizes(inputs, checks, rng)
        arrays = _arrays(model, inputs, sizes, rng)
        try:
            for check in checks:
                check.apply(sizes, arrays)
        except InvalidInputError as error:
            failure = error
            continue
        return arrays
    raise InvalidInputError(f"no valid random inputs found, pass some: {failure}") from failure


def _sizes(inputs: Sequence[Tensor], checks: Sequence[Check], rng: Rng) -> dict[str, int]:
    """A size for each symbolic dimension under which all checks on dimensions hold."""
    symbols = list(dict.fromkeys(d for i in inputs for d in i.shape if isinstance(d, str)))
    conditions = [check for check in checks if not check.rule]
    stands_for = _equal_dimensions(conditions, symbols)
    drawn_for = list(dict.fromkeys(stands_for.values()))
    numbers = set().union(*(_numbers(check.expr) for check in conditions))
    related = sorted({factor * n for n in numbers if 1 < n < 5000 for factor in (1, 2, 3)})
    for largest in (64, 5000):  # small ones if they do
        choices = [*SMALL_SIZES, *(size for size in related if size <= largest)]
        for _ in range(SIZE_DRAWS):
            drawn = rng.integers(len(choices), size=len(drawn_for))
            free = {name: choices[index] for name, index in zip(drawn_for, drawn)}
            sizes = {name: free[stands_for[name]] for name in symbols}
            if all(evaluate(check.expr, sizes) for check in conditions):
                return sizes
    raise InvalidInputError(
        f"no sizes found for dimensions {symbols} that satisfy "
        f"{sorted({check.allowed for check in conditions})}; pass inputs"
    )


def _equal_dimensions(conditions: Sequence[Check], symbols: Sequence[str]) -> dict[str, str]:
    """Symbol -> the one that stands for all that the conditions want equal to it."""
    stands_for = {name: name for name in symbols}
    for check in conditions:
        match check.expr:
            case ["EQ", ["dim", a], ["dim", b]]:
                one, other = stands_for[a], stands_for[b]
                stands_for = {n: one if s == other else s for n, s in stands_for.items()}
    return stands_for


def _numbers(expr: object) -> set[int]:
    """The whole numbers in an encoded condition."""
    if isinstance(expr, list):
        return set().union(*(_numbers(part) for part in expr[1:]))
    return {expr} if isinstance(expr, int) else set()


def _arrays(
    model: ModelProto, inputs: Sequence[Tensor], sizes: Mapping[str, int], rng: Rng
) -> dict[str, np.ndarray]:
    sized = ModelProto()
    sized.CopyFrom(model)
    bind_shapes(sized.graph, sizes)
    sized = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    producers = {o: node for node in all_nodes(sized.graph) for o in node.output if o}
    made: dict[str, np.ndarray | float] = {}
    for node, schema in our_nodes(sized.graph):
        sources = {p: _source(name, producers) for p, name in input_names(node, schema).items()}
        values = MAKERS[node.op_type](rng, _view(sized.graph, node, schema))
        for parameter, value in values.items():
            if parameter in sources:
                made.setdefault(sources[parameter], value)
    limits = _index_limits(sized.graph, producers)
    arrays = {}
    for spec in inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
        value = made.get(spec.name)
        if value is None or np.size(value) not in (1, int(np.prod(shape))):
            value = _ordinary(rng, spec.dtype, shape, limits.get(spec.name, 2))
        value = np.asarray(value).reshape(-1)
        array = np.broadcast_to(value, (int(np.prod(shape)),)) if value.size == 1 else value
        arrays[spec.name] = array.reshape(shape).astype(np_dtype(spec.dtype))
    return arrays


def _source(name: str, producers: Mapping[str, NodeProto]) -> str:
    """The value that ``name`` repeats, cast or reshaped."""
    while name in producers and producers[name].op_type in _SAME_VALUES:
        name = producers[name].input[0]
    return name


def _index_limits(graph: GraphProto, producers: Mapping[str, NodeProto]) -> dict[str, int]:
    """Value -> number of rows of the smallest table that it indexes."""
    shapes = _shapes(graph)
    limits: dict[str, int] = {}
    for node in all_nodes(graph):
        if node.op_type != "Gather" or not shapes.get(node.input[0]):
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        source = _source(node.input[1], producers)
        rows = shapes[node.input[0]][axis]
        limits[source] = min(rows, limits.get(source, rows))
    return limits


def _ordinary(rng: Rng, dtype: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    """Floats of order one, any 8-bit integer, wider integers in [0, ``limit``)."""
    kind = np_dtype(dtype)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype in ("int8", "uint8"):
        bounds = np.iinfo(kind)
        return rng.integers(bounds.min, bounds.max, shape, endpoint=True)
    if np.issubdtype(kind, np.integer):
        return rng.integers(0, limit, shape)
    return rng.standard_normal(shape)


def _shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Value name -> static shape, where it is known."""
    found = {}
    for value in (*graph_inputs(graph), *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return found | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _view(graph: GraphProto, node: NodeProto, schema: OpSchema) -> View:
    attrs = decode_attributes(node, schema)
    shapes, stored = _shapes(graph), {tensor.name: tensor for tensor in graph.initializer}
    names = input_names(node, schema)
    lists = {key: np.asarray(value) for key, value in attrs.items() if isinstance(value, list)}
    typed = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
    return View(
        attrs,
        {p: shapes[name] for p, name in names.items() if name in shapes},
        lists | {p: numpy_helper.to_array(stored[n]) for p, n in names.items() if n in stored},
        {p: typed[name] for p, name in names.items() if name in typed},
    )


def _positive(rng: Rng, node: View, name: str, around: float) -> np.ndarray:
    return around * rng.uniform(0.5, 1.5, node.shapes.get(name, ()))


def _product_deviation(node: View, name: str) -> float:
    """Standard deviation of an int8 dot product over the last axis of input ``name``."""
    terms = node.shapes[name][-1] if node.shapes.get(name) else 1
    return INT8_DEVIATION**2 * float(np.sqrt(terms))


def _qordered_matmul(rng: Rng, node: View) -> Values:
    scale_y = 0.02 * 0.02 * _product_deviation(node, "A") / LEVEL
    return {
        "scale_A": 0.02,
        "scale_B": _positive(rng, node, "scale_B", 0.02),
        "scale_Y": scale_y,
        "scale_C": scale_y / 4,
        "bias": 10 * scale_y * rng.standard_normal(node.shapes.get("bias", ())),
    }


def _qordered_longformer_attention(rng: Rng, node: View) -> Values:
    """Projections and output of order one; some padding at the end, some global tokens."""
    gemm = 1 / LEVEL
    scale = float(np.sqrt(gemm * LEVEL / _product_deviation(node, "input")))
    values: Values = dict.fromkeys(("scale_qkv_gemm", "scale_global_gemm"), gemm)
    values |= {"scale_input": scale, "scale_output": gemm / 2, "scale_bias": 1.0}
    values |= {
        name: _positive(rng, node, name, scale) for name in ("scale_weight", "scale_global_weight")
    }
    values |= {
        name: 10 * rng.standard_normal(node.shapes.get(name, ()))
        for name in ("bias", "global_bias")
    }
    if "mask" in node:
        batch, length = node.shapes["mask"]
        ends = rng.integers(1, length, (batch, 1), endpoint=True)
        values["mask"] = np.where(np.arange(length) < ends, 0.0, -10000.0)
    if "global" in node:
        values["global"] = rng.random(node.shapes["global"]) < 0.1
    return values


def _speed_fusion_attention(rng: Rng, node: View) -> Values:
    values: Values = {"seed": int(rng.integers(1000)), "offset": int(rng.integers(1000))}
    values |= {"q_start_idx": int(rng.integers(4)), "kv_start_idx": int(rng.integers(4))}
    mode, layout = node.attrs["sparse_mode"], node.attrs["input_layout"]
    if node.attrs["pse_type"] >= 2 and "pse" in node:
        values["pse"] = _positive(rng, node, "pse", 0.25)
    if "atten_mask" in node:
        compressed = node.shapes["atten_mask"] == COMPRESSED_MASK and mode in (2, 3, 4)
        values["atten_mask"] = (
            np.triu(np.ones(COMPRESSED_MASK, bool), 1)
            if compressed
            else rng.random(node.shapes["atten_mask"]) < 0.3
        )
    if not {"query", "key"} <= node.shapes.keys():
        return values
    if layout == "TND":
        return values | _packed_sequences(rng, node)
    axis = {"BSH": 1, "SBH": 0, "BNSD": 2, "BSND": 1}[layout]
    s1, s2 = node.shapes["query"][axis], node.shapes["key"][axis]
    if "prefix" in node:
        values["prefix"] = rng.integers(max(0, s2 - s1), s2, node.shapes["prefix"], endpoint=True)
    return values


def _packed_sequences(rng: Rng, node: View) -> Values:
    """Cumulative lengths: all rows used, keys wherever there are queries, equal where a bias asks
    for it.
    """
    count = _list_length(node, "actual_seq_qlen", "actual_seq_kvlen")
    if count is None:
        return {}
    rows, keys = node.shapes["query"][0], node.shapes["key"][0]
    q, kv = (_lengths(node, name) for name in ("actual_seq_qlen", "actual_seq_kvlen"))
    equal = "pse" in node
    longest = node.shapes["pse"][-1] if equal and node.attrs["pse_type"] < 2 else None
    grows = node.attrs["sparse_mode"] == 3 and "atten_mask" in node
    if q is None:
        low, high = np.zeros(count, int), np.full(count, longest or rows)
        if longest:
            low[0] = longest
        if kv is not None:
            low, high = (kv, kv) if equal else (low, kv if grows else np.where(kv > 0, rows, 0))
        q = _spread(rng, rows, low, high)
    if kv is None:
        low = q if equal or grows else np.minimum(q, 1)
        kv = _spread(rng, keys, low, q if equal else np.full(count, keys))
    return {"actual_seq_qlen": np.cumsum(q), "actual_seq_kvlen": np.cumsum(kv)}


def _nsa_compress_attention(rng: Rng, node: View) -> Values:
    """Cumulative lengths within the masks; ceil(compressed keys / r) selection blocks."""
    values: Values = {
        name: rng.random(node.shapes[name]) < share
        for name, share in (("atten_mask", 0.3), ("topk_mask", 0.1))
        if name in node
    }
    names = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
    count = _list_length(node, *names)
    if count is None or not {"query", "key"} <= node.shapes.keys():
        return values
    r = node.attrs["select_block_size"] // node.attrs["compress_stride"]
    rows, keys, blocks = (_lengths(node, name) for name in names)
    attended = node.shapes.get("atten_mask", (1 << 31, 1 << 31))
    selected = node.shapes.get("topk_mask", (1 << 31, 1 << 31))
    none = np.zeros(count, int)
    if rows is None:
        limit = np.full(count, min(attended[0], selected[0]))
        rows = _spread(rng, node.shapes["query"][0], none, limit)
    if keys is None and blocks is None:
        limit = np.full(count, min(attended[1], selected[1] * r, 14000))
        keys = _spread(rng, node.shapes["key"][0], none, limit)
    elif keys is None:
        keys = np.maximum(
            blocks * r - rng.integers(0, r), np.where(blocks > 0, (blocks - 1) * r + 1, 0)
        )
    values |= {
        "actual_seq_qlen": np.cumsum(rows),
        "actual_cmp_seq_kvlen": np.cumsum(keys),
        "actual_sel_seq_kvlen": np.cumsum(-(-keys // r)),
    }
    return values


def _linear_a8w8_quant(rng: Rng, node: View) -> Values:
    scale = _positive(rng, node, "scale", LEVEL / _product_deviation(node, "x1"))
    if node.elem_types.get("scale") in (TensorProto.INT64, TensorProto.UINT64):
        scale = npu_trans_quant_param(np.float32(scale).reshape(-1))
    values: Values = {
        "scale": scale,
        "offset": rng.uniform(-20, 20, node.shapes.get("offset", ())),
        "pertoken_scale": _positive(rng, node, "pertoken_scale", 1.0),
    }
    if "bias" in node:
        values["bias"] = 10 * rng.standard_normal(node.shapes["bias"])
    return values


def _trans_quant_param(rng: Rng, node: View) -> Values:
    return {
        "scale": _positive(rng, node, "scale", 0.1),
        "offset": rng.uniform(-20, 20, node.shapes.get("offset", ())),
    }


def _list_length(node: View, *names: str) -> int | None:
    """Number of sequences, from whichever list is known or has a known shape."""
    for name in names:
        if (known := node.numbers(name)) is not None:
            return int(known.size)
        if name in node:
            return node.shapes[name][0]
    return None


def _lengths(node: View, name: str) -> np.ndarray | None:
    known = node.numbers(name)
    return None if known is None else np.diff(known, prepend=0)


def _spread(rng: Rng, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Counts between ``low`` and ``high`` that sum to ``total``, or come as near as they can."""
    counts = np.minimum(low, high).astype(np.int64)
    while (rest := total - int(counts.sum())) > 0 and np.any(counts < high):
        open_ = np.flatnonzero(counts < high)
        share = rng.multinomial(rest, rng.dirichlet(np.ones(open_.size)))
        counts[open_] = np.minimum(counts[open_] + share, high[open_])
    return counts


MAKERS: dict[str, Callable[[Rng, View], Values]] = {
    "QOrderedMatMul": _qordered_matmul,
    "QOrderedLongformerAttention": _qordered_longformer_attention,
    "SpeedFusionAttention": _speed_fusion_attention,
    "NPUNsaCompressAttention": _nsa_compress_attention,
    "NPUQuantMatmul": _linear_a8w8_quant,
    "NPUTransQuantParam": _trans_quant_param,
}
"""Operator -> values of its inputs that cannot be just anything; a number fills the whole input."""
