"""SpeedFusionAttention: every refusal by its message, before anything runs."""

import ml_dtypes
import numpy as np
import onnx
import pytest

import opferry
from opferry.frontend.builders import node_model

OP = "SpeedFusionAttention"
F32, F16 = np.dtype("float32"), np.dtype("float16")
BF16 = np.dtype(ml_dtypes.bfloat16)
CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
MAX = 2**31 - 1


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def bnsd(B=2, N1=4, N2=2, S1=3, S2=5, D=8, dtype=F32):
    kv = zeros(B, N2, S2, D, dtype=dtype)
    return {"query": zeros(B, N1, S1, D, dtype=dtype), "key": kv, "value": kv}


def tnd(T1=5, T2=5):
    return {"query": zeros(T1, 4, 8), "key": zeros(T2, 2, 8), "value": zeros(T2, 2, 8)}


def lists(q, kv):
    return {"actual_seq_qlen": q, "actual_seq_kvlen": kv}


def refuse(error, match, feeds, *, constant=(), **attrs):
    attrs = {"head_num": 4, "input_layout": "BNSD"} | attrs
    constant = [name for name in feeds if feeds[name] is CAUSAL or name in constant]
    with pytest.raises(error, match=match) as caught:  # noqa: PT012
        model = node_model(OP, feeds, None, constant, name="n", check=False, **attrs)
        opferry.compile(model)
    assert isinstance(caught.value, opferry.OpferryError)
    assert OP in str(caught.value) or "graph input" in str(caught.value)


# -- attributes -----------------------------------------------------------------------------------

ATTRIBUTES = {
    "layout": ("input_layout.*'bnsd'", {"input_layout": "bnsd"}),
    "mode -1": ("sparse_mode.*-1, allowed 0 to 5", {"sparse_mode": -1}),
    "mode 6": ("sparse_mode.*6.*not enabled", {"sparse_mode": 6}),
    "mode 7": ("sparse_mode.*7.*not enabled", {"sparse_mode": 7}),
    "mode 8": ("sparse_mode.*8.*not enabled", {"sparse_mode": 8}),
    "mode 9": ("sparse_mode.*9, allowed 0 to 5", {"sparse_mode": 9}),
    "pse_type": ("pse_type.*4, allowed 0, 1, 2, 3", {"pse_type": 4}),
    "keep 0": ("keep_prob.*0.0", {"keep_prob": 0.0}),
    "keep 2": ("keep_prob.*2.0", {"keep_prob": 2.0}),
    "keep nan": ("keep_prob.*nan", {"keep_prob": float("nan")}),
    "scale inf": ("scale.*inf", {"scale": float("inf")}),
    "scale nan": ("scale.*nan", {"scale": float("nan")}),
    "heads 0": ("head_num.*0, allowed 1 to 256", {"head_num": 0}),
    "heads 257": ("head_num.*257, allowed 1 to 256", {"head_num": 257}),
    "heads other": ("head_num.*2, allowed query's N1 = 4", {"head_num": 2}),
    "softmax_layout": ("softmax_layout.*'BSH'", {"softmax_layout": "BSH"}),
    "softmax_layout TND": ("softmax_layout.*BNSD", {"softmax_layout": "TND"}),
    "unknown": ("skale.*unknown", {"skale": 1.0}),
    "q_start": ("q_start_idx.*one value", {"q_start_idx": [1, 2]}),
    "kv_start": ("kv_start_idx.*one value", {"kv_start_idx": []}),
    "lists": ("actual_seq_qlen.*given in BNSD.*TND", {"actual_seq_qlen": [3]}),
    "no slopes 2": ("pse.*none.*pse_type 2", {"pse_type": 2}),
    "no slopes 3": ("pse.*none.*pse_type 3", {"pse_type": 3}),
    "prefix": ("prefix.*sparse_mode 0.*5", {"prefix": [1, 1]}),
    "mode 5": ("atten_mask.*none.*5 needs", {"sparse_mode": 5, "prefix": [2, 2]}),
}


@pytest.mark.parametrize(("match", "attrs"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_attributes(match, attrs):
    refuse(ValueError, match, bnsd(), **attrs)


@pytest.mark.parametrize("name", ["head_num", "input_layout"])
def test_missing_attributes(name):
    refuse(ValueError, f"{name}.*none", bnsd(), **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", "1"),
        ("keep_prob", onnx.helper.make_attribute("keep_prob", 1)),
        ("input_layout", 3),
        ("head_num", 4.0),
        ("sparse_mode", 1.0),
        ("pse_type", "1"),
        ("prefix", 3),
        ("seed", [1]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_attribute_types(name, value):
    refuse(TypeError, name, bnsd(), **{name: value})


# -- query, key, value ----------------------------------------------------------------------------

kv = zeros(2, 2, 5, 8)
SHAPES = {
    "rank": ("query.*rank 3.*rank 4", {"query": zeros(2, 3, 32)}, {}),
    "value": ("value.*shape", {"value": zeros(2, 2, 6, 8)}, {}),
    "B": ("key.*query's B = 3", {"query": zeros(3, 4, 3, 8)}, {}),
    "D": ("key.*D.*8.*query's D = 4", {"query": zeros(2, 4, 3, 4)}, {}),
    "heads": ("N2.*3.*divisor", {"key": zeros(2, 3, 5, 8), "value": zeros(2, 3, 5, 8)}, {}),
    "empty": ("key.*size 0", {"key": zeros(2, 2, 0, 8), "value": zeros(2, 2, 0, 8)}, {}),
    "D 513": ("D.*513.*512", dict.fromkeys(("query", "key", "value"), zeros(1, 4, 1, 513)), {}),
    "B 2049": ("B.*2049.*2048", dict.fromkeys(("query", "key", "value"), zeros(2049, 4, 1, 1)), {}),
    "S": (
        "S1.*524289.*524288",
        {"query": zeros(1, 1, 524289, 1), "key": zeros(1, 1, 1, 1), "value": zeros(1, 1, 1, 1)},
        {"head_num": 1},
    ),
    "H1": (
        "H1.*30.*multiple",
        dict.fromkeys(("query", "key", "value"), zeros(2, 3, 30)),
        {"input_layout": "BSH"},
    ),
    "H2": (
        "H2.*20.*multiple of D = 8",
        {"query": zeros(2, 3, 32), "key": zeros(2, 3, 20), "value": zeros(2, 3, 20)},
        {"input_layout": "SBH"},
    ),
    "padding_mask": ("padding_mask.*reserved", {"padding_mask": zeros(1)}, {}),
    "seed": ("seed.*shape", {"seed": np.zeros((2,), np.int64)}, {}),
    "q_start_idx": ("q_start_idx.*shape", {"q_start_idx": np.zeros((), np.int64)}, {}),
    "double": ("seed.*one of the two", {"seed": np.array(1)}, {"seed": 1}),
    "double list": (
        "q_start_idx.*one of the two",
        {"q_start_idx": np.array([1])},
        {"q_start_idx": [1]},
    ),
}


@pytest.mark.parametrize(("match", "feeds", "attrs"), SHAPES.values(), ids=SHAPES)
def test_shapes(match, feeds, attrs):
    refuse(ValueError, match, bnsd() | feeds, **attrs)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_missing_inputs(name):
    refuse(ValueError, f"{name}.*(none|required)", bnsd() | {name: None})


TYPES = {
    "query": {"query": zeros(2, 4, 3, 8, dtype=F16)},
    "float64": dict.fromkeys(("query", "key", "value"), np.zeros((2, 4, 3, 8))),
    "atten_mask": {"atten_mask": np.zeros((3, 5), np.int32)},
    "pse": {"pse": zeros(2, 4, 3, 5, dtype=F16)},
    "prefix": {"prefix": zeros(2)},
    "seed": {"seed": np.zeros((), np.int16)},
}


@pytest.mark.parametrize(("name", "feeds"), TYPES.items(), ids=TYPES)
def test_element_types(name, feeds):
    match = "key|value" if name == "query" else "query" if name == "float64" else name
    refuse(TypeError, match, bnsd() | feeds)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_slopes_are_float32(dtype):
    feeds = bnsd(dtype=dtype) | {"pse": zeros(4, dtype=dtype)}
    refuse(TypeError, "pse.*float32", feeds, pse_type=2)


# -- masks ----------------------------------------------------------------------------------------

MASKS = {
    "1 N1 S1 S2": ((1, 4, 3, 5), 0),
    "B 1 1 S2": ((2, 1, 1, 5), 1),
    "S2": ((5,), 0),
    "compressed": ((2048, 2048), 0),
    "full in mode 2": ((2, 1, 3, 5), 2),
    "full in mode 4": ((3, 5), 4),
    "S1 S2 in mode 5": ((3, 5), 5),
    "1 1 S1 S2 in mode 5": ((1, 1, 3, 5), 5),
}


@pytest.mark.parametrize(("shape", "mode"), MASKS.values(), ids=MASKS)
def test_mask_shapes(shape, mode):
    attrs = {"prefix": [3, 3]} if mode == 5 else {}
    mask = np.zeros(shape, bool)
    match = rf"atten_mask.*sparse_mode {mode}"
    refuse(ValueError, match, bnsd() | {"atten_mask": mask}, sparse_mode=mode, **attrs)


def test_content_of_a_constant_compressed_mask():
    mask = CAUSAL.copy()
    mask[5, 5] = 1
    feeds = bnsd() | {"atten_mask": mask}
    match = r"atten_mask.*triu\(ones, 1\)"
    refuse(ValueError, match, feeds, constant=["atten_mask"], sparse_mode=2)


TOKENS = {
    "both negative": (0, -1, -1),
    "pre beyond next": (0, -3, 2),
    "pre beyond S2": (0, -5, 9),
    "next beyond pre": (0, 1, -2),
    "next beyond S1": (0, 9, -3),
    "mode 4 right": (4, -3, 90),
    "mode 4 left": (4, 90, -5),
}


@pytest.mark.parametrize(("mode", "pre", "next_"), TOKENS.values(), ids=TOKENS)
def test_tokens(mode, pre, next_):
    """S1 = 3, S2 = 5: mode 4 moves the tokens by 2."""
    feeds = bnsd() | {"atten_mask": CAUSAL if mode == 4 else np.zeros((3, 5), bool)}
    attrs = {"sparse_mode": mode, "pre_tokens": pre, "next_tokens": next_}
    refuse(ValueError, "pre_tokens.*next_tokens", feeds, **attrs)


PREFIXES = {
    "missing": ("none", None),
    "short": ("1 values.*that is 2", [3]),
    "small": (r"\[1, 3\].*2.*5", [1, 3]),
    "large": (r"\[3, 6\].*2.*5", [3, 6]),
}


@pytest.mark.parametrize(("match", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_prefix(match, prefix):
    feeds = bnsd() | {"atten_mask": np.zeros((2, 1, 3, 5), bool)}
    refuse(ValueError, f"prefix.*{match}", feeds, sparse_mode=5, prefix=prefix)


def test_more_than_32_prefixes():
    feeds = bnsd(B=33) | {"atten_mask": np.zeros((33, 1, 3, 5), bool)}
    refuse(ValueError, "prefix.*33.*32", feeds, sparse_mode=5, prefix=[3] * 33)


# -- bias -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "pse_type"),
    [((3, 4, 3, 5), 1), ((2, 1, 3, 5), 0), ((3, 5), 1), ((2, 4, 2, 5), 1), ((2, 3), 2), ((2,), 3)],
)
def test_bias_shapes(shape, pse_type):
    refuse(ValueError, "pse.*shape", bnsd() | {"pse": zeros(*shape)}, pse_type=pse_type)


PACKED = {
    "no mask": ("atten_mask", 1100, 1100, {}),
    "S1 != S2": ("S1 = S2", 1100, 1101, {"sparse_mode": 2}),
    "mode 4": ("sparse_mode 4", 1100, 1100, {"sparse_mode": 4}),
    "mode 1": ("sparse_mode 1", 1100, 1100, {"sparse_mode": 1}),
    "next": ("next_tokens = 0", 1100, 1100, {"sparse_mode": 0}),
    "pre": ("pre_tokens >= S1", 1100, 1100, {"pre_tokens": 1099, "next_tokens": 0}),
    "short": ("pse", 1000, 1000, {"sparse_mode": 2}),
}


@pytest.mark.parametrize(("match", "S1", "S2", "attrs"), PACKED.values(), ids=PACKED)
def test_packed_bias(match, S1, S2, attrs):
    feeds = bnsd(1, 1, 1, S1, S2, 1) | {"pse": zeros(1, 1, 1024, S2)}
    if match != "atten_mask":
        full = attrs.get("sparse_mode", 0) in (0, 1)
        feeds["atten_mask"] = np.zeros((S1, S2), bool) if full else CAUSAL
    refuse(ValueError, match, feeds, head_num=1, **attrs)


# -- packed sequences -----------------------------------------------------------------------------

LISTS = {
    "missing": ("actual_seq_kvlen.*none", {"actual_seq_qlen": [5]}),
    "empty": ("actual_seq_qlen.*0", lists([], [])),
    "lengths": ("actual_seq_kvlen.*1", lists([2, 5], [5])),
    "decreasing": (r"actual_seq_qlen.*\[3, 2, 5\].*non-decreasing", lists([3, 2, 5], [3, 4, 5])),
    "negative": ("actual_seq_qlen.*non-decreasing", lists([-1, 5], [1, 5])),
    "last query": ("actual_seq_qlen.*last value 4.*5", lists([4], [5])),
    "last key": ("actual_seq_kvlen.*last value 6.*5", lists([5], [6])),
    "trailing zeros": ("actual_seq_qlen.*non-decreasing", lists([2, 5, 0], [2, 5, 0])),
    "no keys": ("S1 = 2, S2 = 0 in sequence 1", lists([3, 5], [5, 5])),
    "1025": ("1025.*1024", lists([5] * 1025, [5] * 1025)),
}


@pytest.mark.parametrize(("match", "attrs"), LISTS.values(), ids=LISTS)
def test_constant_lists(match, attrs):
    refuse(ValueError, match, tnd(), input_layout="TND", **attrs)


MODES_OF_TND = {
    "mode 0": ("sparse_mode 0 in TND", 0, CAUSAL),
    "mode 1": ("sparse_mode 1 in TND", 1, CAUSAL),
    "mode 4": ("sparse_mode 4 in TND", 4, CAUSAL),
    "mode 5": ("sparse_mode.*5 in TND", 5, None),
    "full": ("atten_mask.*2048", 2, np.zeros((5, 5), bool)),
}


@pytest.mark.parametrize(("match", "mode", "mask"), MODES_OF_TND.values(), ids=MODES_OF_TND)
def test_modes_of_packed_sequences(match, mode, mask):
    attrs = {"input_layout": "TND", "sparse_mode": mode} | lists([5], [5])
    refuse(ValueError, match, tnd() | {"atten_mask": mask}, **attrs)


def test_more_queries_than_keys_in_mode_3():
    feeds = tnd(5, 6) | {"atten_mask": CAUSAL}
    attrs = lists([3, 5], [2, 6])
    refuse(ValueError, "S1 = 3, S2 = 2 in seq", feeds, input_layout="TND", sparse_mode=3, **attrs)


def test_bias_of_unequal_sequences():
    attrs = {"input_layout": "TND", "pse_type": 2} | lists([2, 5], [3, 5])
    refuse(ValueError, "S1 = 2, S2 = 3.*pse", tnd() | {"pse": zeros(4)}, **attrs)


def test_packed_bias_of_short_sequences():
    attrs = {"input_layout": "TND", "sparse_mode": 2} | lists([5], [5])
    feeds = tnd() | {"pse": zeros(1, 4, 1024, 5), "atten_mask": CAUSAL}
    refuse(ValueError, "largest length 5.*1024", feeds, **attrs)


def test_packed_bias_of_another_width():
    query = zeros(1030, 4, 1)
    feeds = {"query": query, "key": query, "value": query, "atten_mask": CAUSAL}
    feeds["pse"] = zeros(1, 4, 1024, 1031)
    attrs = {"input_layout": "TND", "sparse_mode": 2} | lists([1030], [1030])
    refuse(ValueError, "pse.*1031.*1030", feeds, **attrs)


# -- at the call ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed():
    feeds = tnd() | {name: np.array([2, 5]) for name in lists(0, 0)} | {"atten_mask": CAUSAL}
    symbolic = {"query": {0: "T1"}, "key": {0: "T2"}, "value": {0: "T2"}}
    attrs = {"head_num": 4, "input_layout": "TND", "sparse_mode": 3, "name": "n"}
    return opferry.compile(node_model(OP, feeds, None, ["atten_mask"], symbolic, **attrs))


@pytest.mark.parametrize(
    ("match", "q", "kv"),
    [
        ("actual_seq_qlen.*non-decreasing", [6, 5], [2, 5]),
        ("actual_seq_kvlen.*last value 9.*5", [2, 5], [2, 9]),
        ("S1 = 3, S2 = 0 in sequence 0", [3, 5], [0, 5]),
        ("S1 = 3, S2 = 2.*sparse_mode 3", [3, 5], [2, 5]),
    ],
)
def test_lists_at_the_call(packed, match, q, kv):
    feeds = tnd() | {k: np.array(x) for k, x in lists(q, kv).items()}
    with pytest.raises(opferry.OpferryError, match=rf'{OP} node "n".*{match}'):
        packed.run(feeds)


@pytest.fixture(scope="module")
def prefixed():
    feeds = bnsd() | {"atten_mask": np.zeros((2, 1, 3, 5), bool), "prefix": np.array([3, 3])}
    symbolic = {
        "query": {0: "B", 2: "S1"},
        "key": {0: "B", 2: "S2"},
        "value": {0: "B", 2: "S2"},
        "atten_mask": ["B", None, "S1", "S2"],
        "prefix": {0: "B"},
    }
    attrs = {"head_num": 4, "input_layout": "BNSD", "sparse_mode": 5}
    return opferry.compile(node_model(OP, feeds, None, (), symbolic, **attrs))


def test_prefix_at_the_call(prefixed):
    mask = {"atten_mask": np.zeros((2, 1, 3, 5), bool)}
    prefixed.run(bnsd() | mask | {"prefix": np.array([2, 5])})
    with pytest.raises(ValueError, match=r"prefix.*\[1, 5\].*= 2"):
        prefixed.run(bnsd() | mask | {"prefix": np.array([1, 5])})


def test_too_many_prefixes_at_the_call(prefixed):
    feeds = bnsd(B=33) | {"atten_mask": np.zeros((33, 1, 3, 5), bool)}
    with pytest.raises(ValueError, match=r"prefix.*33.*32"):
        prefixed.run(feeds | {"prefix": np.full(33, 3)})


def test_tokens_at_the_call():
    symbolic = {"query": {2: "S1"}, "key": {2: "S2"}, "value": {2: "S2"}}
    attrs = {"head_num": 4, "input_layout": "BNSD", "sparse_mode": 4, "next_tokens": -3}
    feeds = bnsd() | {"atten_mask": CAUSAL}
    model = node_model(OP, feeds, ["attention_out"], ["atten_mask"], symbolic, **attrs)
    module = opferry.compile(model)
    module.run(bnsd())
    with pytest.raises(ValueError, match=r"pre_tokens.*next_tokens.*\(2147483647, -3, 3, 1\)"):
        module.run(bnsd(S2=1))


def test_lists_computed_in_the_graph_are_asserted():
    """The kernel itself refuses them: nothing is read out of bounds."""
    feeds = tnd() | {name: np.array([2, 5]) for name in lists(0, 0)}
    attrs = {"head_num": 4, "input_layout": "TND"}
    model = node_model(OP, feeds, ["attention_out"], **attrs)
    doubled = onnx.helper.make_node("Add", ["actual_seq_qlen", "shift"], ["ends"])
    node = model.graph.node[0]
    node.input[list(node.input).index("actual_seq_qlen")] = "ends"
    model.graph.node.insert(0, doubled)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("shift", onnx.TensorProto.INT64, [2])
    )
    module = opferry.compile(model)
    inputs = feeds | {"shift": np.array([0, 0])}
    assert module.run(inputs)["attention_out"].shape == (5, 4, 8)
    for shift in ([0, 90], [-3, 0], [5, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"actual_seq_qlen.*found"):
            module.run(feeds | {"shift": np.array(shift)})
