"""QOrderedLongformerAttention: every refusal by its message, dimensions that are symbols."""

import itertools

import numpy as np
import pytest
from longformer_cases import (
    AT_RUN_TIME,
    EXAMPLE,
    EXAMPLE_ATTRS,
    EXAMPLE_OUTPUT,
    OP,
    SCALES,
    WEIGHTS,
    f32,
)

import opferry
from opferry.frontend.builders import node_model

# Changes to the worked example, and what the refusal says.
REFUSALS = {
    "num_heads missing": ({}, {"num_heads": None}, r'"num_heads": found 0, allowed at least 1'),
    "num_heads": ({}, {"num_heads": -2}, r'"num_heads": found -2, allowed at least 1'),
    "heads do not divide": ({}, {"num_heads": 4}, r'"num_heads": found 4, allowed a divisor of'),
    "window missing": ({}, {"window": None}, r'"window": found 0, allowed at least 1'),
    "window": ({}, {"window": 3}, r"sequence length S: found 4, allowed a multiple of .* = 6"),
    "window size": ({}, {"window": 2**63 - 1}, r'"window": found 9223.*, allowed less than 2'),
    "order_input missing": ({}, {"order_input": None}, r'"order_input": found 0, allowed 1 \(ROW'),
    "order_input": ({}, {"order_input": 3}, r'"order_input": found 3, allowed 1 .* or 2 '),
    "order_output missing": ({}, {"order_output": None}, r'"order_output": found 0, allowed 1 '),
    "order_output": ({}, {"order_output": 2}, r'"order_output": found 2, allowed 1 '),
    "order_weight": ({}, {"order_weight": 3}, r'"order_weight": found 3, allowed 0 \(COL\)'),
    "order_global_weight": (
        {},
        {"order_global_weight": 1},
        r'"order_global_weight": found 1, allowed 0 \(COL\) with order_input 1',
    ),
    "order_weight of COL32": (
        {},
        {"order_input": 2, "order_output": 2},
        r'"order_weight": found 0, allowed 3 \(COL4_4R2_8C\) or 4 \(COL32_2R_4R4\)',
    ),
    "tile rule": (
        {},
        {"order_input": 2, "order_output": 2, "order_weight": 3, "order_global_weight": 4},
        r"order_input.*found H = 2, allowed a multiple of 32",
    ),
    "input rank": (
        {"input": np.zeros((4, 2), np.int8)},
        {},
        r'"input": found shape \(4, 2\), allowed shape \(B, S, H\)',
    ),
    "weight rank": ({"weight": np.zeros(12, np.int8)}, {}, r'"weight": .*allowed shape \(H, 3H\)'),
    "weight": (
        {"weight": np.zeros((6, 2), np.int8)},
        {},
        r'"weight": found shape \(6, 2\), allowed shape \(2, 6\)',
    ),
    "global_weight": (
        {"global_weight": np.zeros((2, 2), np.int8)},
        {},
        r'"global_weight": found shape \(2, 2\), allowed shape \(2, 6\)',
    ),
    "bias": ({"bias": f32(1)}, {}, r'"bias": found shape \(1\), allowed shape \(6\)'),
    "global_bias": ({"global_bias": f32(1, 2)}, {}, r'"global_bias": found shape \(2\), allowed'),
    "mask": ({"mask": np.zeros((4, 1), np.float16)}, {}, r'"mask": found shape \(4, 1\), allowed'),
    "global": ({"global": np.zeros((1, 3), np.int32)}, {}, r'"global": found shape \(1, 3\)'),
    "swapped": (
        {"global_bias": f32(0.125), "scale_global_gemm": np.zeros(6, np.float32)},
        {},
        r'"global_bias" and "scale_global_gemm".*look swapped',
    ),
    "scale_input": ({"scale_input": f32(1, 2)}, {}, r'"scale_input": found shape \(2\), allowed'),
    "scale_bias": ({"scale_bias": f32(1, 2)}, {}, r'"scale_bias": found shape \(2\), allowed'),
    "scale_weight": (
        {"scale_weight": f32(1, 2, 3)},
        {},
        r'"scale_weight": found shape \(3\), allowed shape \(\) or \(1,\) or \(2,\) or \(6,\)',
    ),
    "scale_global_weight": (
        {"scale_global_weight": np.ones((1, 6), np.float32)},
        {},
        r'"scale_global_weight": found shape \(1, 6\), allowed',
    ),
    **{
        f"{name} {value}": ({name: f32(value)}, {}, rf'"{name}": found {value}, allowed finite')
        for name, value in zip(SCALES, itertools.cycle([0.0, -1.0, np.nan, np.inf]))
    },
    "vector scale": (
        {"scale_weight": f32(1, 0)},
        {},
        r'"scale_weight": found 0.0, allowed finite values above 0',
    ),
}


@pytest.mark.parametrize(("inputs", "attrs", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(inputs, attrs, message):
    model = node_model(
        OP, {**EXAMPLE, **inputs}, initializers=WEIGHTS, **{**EXAMPLE_ATTRS, **attrs}
    )
    with pytest.raises(ValueError, match=rf'{OP} node "node": .*{message}'):
        opferry.compile(model)


def test_empty_tensors_are_refused():
    values = {name: EXAMPLE[name][:0] for name in AT_RUN_TIME}
    with pytest.raises(ValueError, match=r'input "input".*found .*0, allowed'):
        opferry.compile(node_model(OP, {**EXAMPLE, **values}, **EXAMPLE_ATTRS))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mask", np.float32), ("global", np.int64), ("input", np.uint8), ("bias", np.float16)],
)
def test_wrong_types(name, dtype):
    with pytest.raises(TypeError, match=rf'{OP} node "node": input "{name}": found'):
        opferry.compile(node_model(OP, {**EXAMPLE, name: EXAMPLE[name].astype(dtype)}))


def test_unknown_attributes_are_ignored():
    model = node_model(OP, EXAMPLE, **EXAMPLE_ATTRS, lda_coeff=3, check=False)
    with pytest.warns(UserWarning, match="lda_coeff"):
        module = opferry.compile(model)
    assert module.run(EXAMPLE)["output"].tolist() == EXAMPLE_OUTPUT


def test_batch_may_be_symbolic_alone():
    model = node_model(
        OP,
        EXAMPLE,
        initializers=WEIGHTS,
        symbolic={name: {0: "B"} for name in AT_RUN_TIME},
        **EXAMPLE_ATTRS,
    )
    module = opferry.compile(model)
    values = {name: np.repeat(EXAMPLE[name], 3, axis=0) for name in AT_RUN_TIME}
    assert module.run(values)["output"].tolist() == EXAMPLE_OUTPUT * 3


def test_symbolic_dimensions_may_be_bound():
    model = node_model(
        OP,
        EXAMPLE,
        initializers=WEIGHTS,
        symbolic={name: {0: "B", 1: "S"} for name in AT_RUN_TIME},
        **EXAMPLE_ATTRS,
    )
    module = opferry.compile(model, shapes={"B": 1, "S": 4})
    values = {name: EXAMPLE[name] for name in AT_RUN_TIME}
    assert module.run(values)["output"].tolist() == EXAMPLE_OUTPUT
    with pytest.raises(ValueError, match="sequence length S: found 5, allowed a multiple of"):
        opferry.compile(model, shapes={"B": 1, "S": 5})


def test_dimensions_by_other_names():
    """Equal sizes under different symbols; H is known from the weight."""
    model = node_model(
        OP,
        EXAMPLE,
        initializers=WEIGHTS,
        symbolic={"input": ["B", "S", "H"], "mask": ["B2", "S2"], "global": ["B", "S3"]},
        **EXAMPLE_ATTRS,
    )
    module = opferry.compile(model)
    values = {name: EXAMPLE[name] for name in AT_RUN_TIME}
    assert module.run(values)["output"].tolist() == EXAMPLE_OUTPUT
    with pytest.raises(ValueError, match=r'"mask" shape: found \(1, 6\), allowed shape'):
        module.run({**values, "mask": np.zeros((1, 6), np.float16)})
    with pytest.raises(ValueError, match=r'"input" shape: found \(1, 4, 3\), allowed shape'):
        module.run({**values, "input": np.zeros((1, 4, 3), np.int8)})
