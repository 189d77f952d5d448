"""NPUNsaCompressAttention and its lists of lengths: every form, one module for many lengths, lists
computed in the graph, lists that are refused.
"""

import functools

import numpy as np
import onnx
import pytest
from compile_once import compile_once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsa_cases import BF16, F16, F32, LENGTHS, OP, SYMBOLIC, assert_matches, changed, make, run
from onnx import TensorProto, helper

import opferry
from opferry.frontend.builders import node_model
from opferry.runtime.errors import InvalidInputError, OpferryError


@pytest.mark.parametrize("form", ["attribute", "initializer", "input", "mixed"])
def test_forms_of_the_length_lists(form):
    feeds, attrs = make((5, 0, 3), (9, 2, 6), atten="bool")
    as_attribute = {"attribute": LENGTHS, "mixed": LENGTHS[1:2]}.get(form, ())
    stored = {"initializer": LENGTHS, "mixed": LENGTHS[2:]}.get(form, ())
    attrs |= {name: feeds.pop(name).tolist() for name in as_attribute}
    got = run(feeds, attrs, initializers=stored)
    assert_matches(feeds, attrs, got)


VARIANTS = {
    "float32": {"n1": 4, "n2": 2, "sizes": (32, 16, 64), "dtype": F32},
    "bfloat16": {
        "n1": 16,
        "n2": 1,
        "sizes": (48, 32, 96),
        "dtype": BF16,
        "masked_rows": "zero",
        "score_shift": 1,
        "softmax_out_layout": "same_as_input",
    },
    "float16": {"n1": 3, "n2": 3, "sizes": (16, 16, 16), "dtype": F16, "score_shift": 1},
    "G 64": {
        "n1": 64,
        "n2": 1,
        "sizes": (32, 16, 128),
        "dtype": F32,
        "masked_rows": "zero",
        "score_shift": 8,
    },
}


def masked(variant, *counts, **rest):
    """Feeds and attributes of a node of ``VARIANTS``, with both masks."""
    return make(*counts, **VARIANTS[variant], **rest, atten="bool", topk="uint8")


@functools.cache
def symbolic_module(variant):
    feeds, attrs = masked(variant)
    return opferry.compile(node_model(OP, feeds, symbolic=SYMBOLIC, **attrs))


COUNTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 80)), min_size=1, max_size=6).filter(
    lambda pairs: sum(q for q, _ in pairs) and sum(k for _, k in pairs)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    variant=st.sampled_from([*VARIANTS]),
    counts=COUNTS,
    spare=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    slack=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 999),
)
def test_any_lengths_through_one_module(variant, counts, spare, slack, seed):
    feeds, attrs = masked(variant, *zip(*counts), spare=spare, slack=slack, seed=seed)
    assert_matches(feeds, attrs, symbolic_module(variant).run(feeds))


def mixed_model():
    """counts -> CumSum -> lengths; Relu -> two nodes with other attributes; Neg of one output."""
    _, attrs = make((5, 3), (9, 6))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 4, 8]),
        helper.make_tensor_value_info("key", TensorProto.FLOAT, ["T2", 2, 8]),
        helper.make_tensor_value_info("value", TensorProto.FLOAT, ["T2", 2, 7]),
        *(helper.make_tensor_value_info(f"n{i}", TensorProto.INT64, ["B"]) for i in range(3)),
    ]
    axis = onnx.numpy_helper.from_array(np.int64(0), "axis")
    nodes = [helper.make_node("CumSum", [f"n{i}", "axis"], [LENGTHS[i]]) for i in range(3)]
    nodes.append(helper.make_node("Relu", ["x"], ["query"]))
    packed = ["query", "key", "value", "", "", *LENGTHS]
    for name, shift in (("first", 0), ("second", 4)):
        nodes.append(
            helper.make_node(
                OP,
                packed,
                ["", "", f"{name}_out", f"{name}_top"],
                name=name,
                domain="npu",
                **(attrs | {"score_shift": shift}),
            )
        )
    nodes.append(helper.make_node("Neg", ["first_out"], ["negated"]))
    outputs = [
        helper.make_tensor_value_info("negated", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("first_top", TensorProto.INT32, None),
        helper.make_tensor_value_info("second_top", TensorProto.INT32, None),
    ]
    graph = helper.make_graph(nodes, "mixed", inputs, outputs, [axis])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("npu", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@functools.cache
def mixed_module():
    return opferry.compile(mixed_model())


def test_lengths_computed_in_the_graph():
    feeds, attrs = make((7, 0, 2), (12, 3, 30), seed=3)
    counts = {f"n{i}": np.diff(feeds[name], prepend=0) for i, name in enumerate(LENGTHS)}
    got = mixed_module().run(
        {"x": feeds["query"], "key": feeds["key"], "value": feeds["value"], **counts}
    )
    seen = feeds | {"query": np.maximum(feeds["query"], 0)}
    for shift, top in ((0, "first_top"), (4, "second_top")):
        outputs = {"attention_out": -got["negated"], "topk_indices_out": got[top]}
        assert_matches(seen, attrs | {"score_shift": shift}, outputs)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (((7, -1), (5, 5), (2, 2)), '"actual_seq_qlen".*non-decreasing prefix sums'),
        (((4, 3), (-5, 5), (2, 2)), '"actual_cmp_seq_kvlen".*non-decreasing prefix sums'),
        (((4, 9), (5, 5), (2, 2)), '"actual_seq_qlen".*at most the rows of query'),
        (((4, 3), (5, 50), (2, 13)), '"actual_cmp_seq_kvlen".*at most the rows of key'),
        (((4, 3), (5, 5), (2, 3)), '"actual_sel_seq_kvlen".*ceil'),
    ],
)
def test_lengths_computed_in_the_graph_are_asserted_by_the_kernel(counts, text):
    feeds, _ = make((4, 3), (5, 5))
    lists = {f"n{i}": np.array(values, np.int64) for i, values in enumerate(counts)}
    with pytest.raises(InvalidInputError, match=f'node "(first|second)".*{text}'):
        mixed_module().run(
            {"x": feeds["query"], "key": feeds["key"], "value": feeds["value"], **lists}
        )


def test_a_mask_of_unknown_size_is_not_taken_for_the_graph_input_of_its_name():
    """A mask that a branch chooses, and a graph input "atten_mask" whose dimensions have no
    names.
    """
    feeds, attrs = make((4, 3), (5, 5), atten="bool")
    declared = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim
        )
        if name == "atten_mask"
        else helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape)
        )
        for name, x in feeds.items()
    ]
    declared.append(helper.make_tensor_value_info("other", TensorProto.BOOL, ["P", "Q"]))
    declared.append(helper.make_tensor_value_info("first", TensorProto.BOOL, []))
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", [source], [f"{source}_chosen"])],
            source,
            [],
            [helper.make_tensor_value_info(f"{source}_chosen", TensorProto.BOOL, None)],
        )
        for source in ("atten_mask", "other")
    ]
    nodes = [
        helper.make_node(
            "If", ["first"], ["mask"], then_branch=branches[0], else_branch=branches[1]
        ),
        helper.make_node(
            OP,
            ["query", "key", "value", "mask", "", *LENGTHS],
            ["", "", "attention_out"],
            domain="npu",
            **attrs,
        ),
    ]
    out = helper.make_tensor_value_info("attention_out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "chosen", declared, [out])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("npu", 1)]
    module = opferry.compile(helper.make_model(graph, opset_imports=imports, ir_version=10))
    small = feeds["atten_mask"][:2]
    given = feeds | {"atten_mask": small, "other": feeds["atten_mask"]}
    got = module.run(given | {"first": np.array(False)})
    assert_matches(feeds, attrs, got)
    with pytest.raises(InvalidInputError, match='"atten_mask" rows'):
        module.run(given | {"first": np.array(True)})


# Lists of the default node: (5, 8), (9, 15), (3, 5); masks [6, 11] and [6, 5].
BAD_LENGTHS = {
    "counts in place of prefix sums": (
        {"actual_seq_qlen": [5, 3]},
        r'"actual_seq_qlen": found \[5, 3\], allowed non-decreasing',
    ),
    "negative": ({"actual_cmp_seq_kvlen": [-1, 15]}, r'"actual_cmp_seq_kvlen": found \[-1, 15\]'),
    "too many query rows": (
        {"actual_seq_qlen": [5, 9]},
        '"actual_seq_qlen": found last element 9, allowed at most 8, rows of query',
    ),
    "too many keys": (
        {"actual_cmp_seq_kvlen": [9, 16], "actual_sel_seq_kvlen": [3, 5]},
        '"actual_cmp_seq_kvlen": found last element 16, allowed at most 15, rows of key',
    ),
    "blocks": (
        {"actual_sel_seq_kvlen": [3, 6]},
        r'"actual_sel_seq_kvlen": found 3 blocks in sequence 1, allowed 2, ceil\(6 compressed',
    ),
    "overflow": (
        {"actual_seq_qlen": [2**63 - 1, -(2**63)]},
        '"actual_seq_qlen": found .*-9223372036854775808\\], allowed non-decreasing prefix sums',
    ),
    "mask rows": ({"actual_seq_qlen": [0, 8]}, '"atten_mask": found 6 rows, allowed at least 8'),
    "mask columns": (
        {"actual_cmp_seq_kvlen": [0, 15], "actual_sel_seq_kvlen": [0, 4]},
        '"atten_mask": found 11 columns, allowed at least 15',
    ),
}


@pytest.mark.parametrize("form", ["attribute", "initializer", "input", "mixed"])
@pytest.mark.parametrize(("lists", "text"), BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths(lists, text, form):
    good, attrs = changed()
    bad = good | {name: np.array(values, np.int64) for name, values in lists.items()}
    if form == "input":
        module = shared_module()
        with pytest.raises(InvalidInputError, match=text):
            module.run(bad)
        return
    stored = LENGTHS if form == "initializer" else ()
    moved = {"attribute": LENGTHS, "mixed": LENGTHS[1:]}.get(form, ())
    given = {name: bad[name] for name in good if name not in moved}
    attrs |= {name: bad[name].tolist() for name in moved}
    with pytest.raises(OpferryError, match=text):
        compile_once(node_model(OP, given, initializers=stored, **attrs)).run(given)


def shared_module():
    feeds, attrs = changed()
    return compile_once(node_model(OP, feeds, **attrs))


def test_limit_of_compressed_keys():
    feeds, attrs = make((1,), (14000,), 1, 1, 2, 1, k=2)
    assert_matches(feeds, attrs, run(feeds, attrs))
    feeds, attrs = make((1,), (14001,), 1, 1, 2, 1, k=2)
    with pytest.raises(OpferryError, match="found 14001 keys in sequence 0, allowed at most 14000"):
        run(feeds, attrs)


def test_symbolic_dimensions_are_checked_at_the_call():
    module = symbolic_module("float32")
    feeds, _ = make(atten="bool", topk="uint8", n1=4, n2=2)
    with pytest.raises(InvalidInputError, match="T2"):
        module.run(feeds | {"value": feeds["value"][1:]})
    with pytest.raises(InvalidInputError, match="at most 7, rows of query"):
        module.run(feeds | {"query": feeds["query"][1:]})
    with pytest.raises(InvalidInputError, match="0"):
        module.run(feeds | {name: np.zeros(0, np.int64) for name in LENGTHS})


def test_checks_travel_with_a_saved_module(tmp_path):
    shared_module().save(tmp_path / "nsa")
    module = opferry.load(tmp_path / "nsa")
    feeds, attrs = changed()
    assert_matches(feeds, attrs, module.run(feeds))
    with pytest.raises(InvalidInputError, match="last element 9, allowed at most 8"):
        module.run(feeds | {"actual_seq_qlen": np.array([5, 9])})
