"""NPUQuantMatmul: every refusal by its message."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from linear_cases import BFLOAT16, COMBINATIONS, FLOAT16, INT8, INT32, OP, problem

import opferry
from opferry.frontend.builders import node_model
from opferry.runtime.errors import InvalidNodeError


def test_every_other_combination_is_refused():
    outputs, scales = [FLOAT16, INT8, BFLOAT16, INT32], ["int64", "uint64", "float32", "bfloat16"]
    biases = [None, "int32", "float16", "bfloat16", "float32"]
    flags = [False, True]
    for index in set(itertools.product(outputs, scales, flags, biases, flags)) - {*COMBINATIONS}:
        feeds, attrs = problem(np.random.default_rng(0), 2, 3, 4, *index)
        with pytest.raises(InvalidNodeError, match="E-COMBO"):
            opferry.compile(node_model(OP, feeds, **attrs))


def case(**changes):
    """A valid int8 problem with some feeds (arrays, types or None) or attributes changed."""
    given = {
        "x1": (np.int8, (2, 3, 4)),
        "x2": (np.int8, (4, 5)),
        "scale": (np.float32, (5,)),
        "output_dtype": INT8,
    }
    given |= changes
    feeds = {name: value for name, value in given.items() if not isinstance(value, int)}
    return feeds, {name: value for name, value in given.items() if isinstance(value, int)}


REFUSALS = [
    ("E-ATTR", 'attribute "output_dtype": found 1', case(output_dtype=1)),
    ("E-ATTR", 'attribute "output_dtype": found 27', case(output_dtype=27)),
    ("E-ATTR", 'attribute "transpose_x1": found 2', case(transpose_x1=2)),
    ("E-ATTR", 'attribute "transpose_x2": found -1', case(transpose_x2=-1)),
    ("E-ATTR", 'attribute "group_sizes"', case(group_sizes=1)),
    ("E-ARITY", 'input "scale": found none', case(scale=None)),
    ("E-DTYPE", 'input "x1": found uint8', case(x1=(np.uint8, (2, 3, 4)))),
    ("E-DTYPE", 'input "x2": found int32', case(x2=(np.int32, (4, 5)))),
    ("E-DTYPE", 'input "scale": found float16', case(scale=(np.float16, (5,)))),
    ("E-DTYPE", 'input "offset": found int32', case(offset=(np.int32, (5,)))),
    ("E-DTYPE", 'input "bias": found int64', case(bias=(np.int64, (5,)))),
    ("E-RANK", 'input "x1" rank: found 1', case(x1=(np.int8, (4,)))),
    ("E-RANK", 'input "x2" rank: found 7', case(x2=(np.int8, (1, 1, 1, 1, 1, 4, 5)))),
    ("E-RANK", 'input "scale" rank: found 0', case(scale=(np.float32, ()))),
    ("E-RANK", 'input "scale" rank: found 2', case(scale=(np.float32, (1, 5)))),
    ("E-RANK", 'input "offset" rank: found 2', case(offset=(np.float32, (1, 5)))),
    (
        "E-RANK",
        'input "pertoken_scale" rank: found 2',
        case(pertoken_scale=(np.float32, (3, 1)), output_dtype=FLOAT16),
    ),
    ("E-RANK", 'input "bias" rank: found 2', case(bias=(np.int32, (1, 5)))),
    (
        "E-RANK",
        'input "bias" rank: found 3',
        case(x1=(np.int8, (3, 4)), bias=(np.int32, (1, 1, 5))),
    ),
    (
        "E-LIMIT",
        'input "x1" last axis: found 65536',
        case(x1=(np.int8, (1, 65536)), x2=(np.int8, (65536, 5))),
    ),
    (
        "E-LIMIT",
        'input "x2" last axis: found 65536',
        case(x2=(np.int8, (4, 65536)), scale=(np.float32, (1,))),
    ),
    ("E-SHAPE", 'input "x2" k: found 6, allowed 4', case(x2=(np.int8, (6, 5)))),
    ("E-SHAPE", 'input "x1" batch: found (2)', case(x2=(np.int8, (3, 4, 5)))),
    ("E-SHAPE", 'input "scale" length: found 3', case(scale=(np.float32, (3,)))),
    ("E-SHAPE", 'input "offset" length: found 2', case(offset=(np.float32, (2,)))),
    (
        "E-SHAPE",
        'input "pertoken_scale": found shape (1)',
        case(pertoken_scale=(np.float32, (1,)), output_dtype=FLOAT16),
    ),
    ("E-SHAPE", 'input "bias": found shape (1)', case(bias=(np.int32, (1,)))),
    ("E-SHAPE", 'input "bias": found shape (3, 1, 5)', case(bias=(np.int32, (3, 1, 5)))),
    (
        "E-COMBO",
        'input "offset": found an offset with float16',
        case(offset=(np.float32, (5,)), output_dtype=FLOAT16),
    ),
    (
        "E-COMBO",
        'input "pertoken_scale": found a per-token scale with int8',
        case(pertoken_scale=(np.float32, (3,))),
    ),
    (
        "E-COMBO",
        'input "pertoken_scale": found a per-token scale with int32',
        case(pertoken_scale=(np.float32, (3,)), output_dtype=INT32),
    ),
    (
        "E-COMBO",
        "found a per-token scale beside int64 scale",
        case(pertoken_scale=(np.float32, (3,)), scale=(np.int64, (5,)), output_dtype=FLOAT16),
    ),
    (
        "E-COMBO",
        'input "scale": found bfloat16 with int8',
        case(scale=(ml_dtypes.bfloat16, (5,))),
    ),
    (
        "E-COMBO",
        'input "scale": found uint64 with bfloat16',
        case(scale=(np.uint64, (5,)), output_dtype=BFLOAT16),
    ),
    (
        "E-COMBO",
        'input "scale": found int64 with int32',
        case(scale=(np.int64, (5,)), output_dtype=INT32),
    ),
    ("E-COMBO", 'input "bias": found float32 with int8', case(bias=(np.float32, (5,)))),
    (
        "E-COMBO",
        'input "bias": found float32 without pertoken_scale with float16',
        case(bias=(np.float32, (5,)), output_dtype=FLOAT16),
    ),
    (
        "E-COMBO",
        'input "bias": found bfloat16 with float16',
        case(
            bias=(ml_dtypes.bfloat16, (5,)),
            output_dtype=FLOAT16,
            pertoken_scale=(np.float32, (3,)),
        ),
    ),
    (
        "E-COMBO",
        'input "bias": found float16 with bfloat16',
        case(bias=(np.float16, (5,)), output_dtype=BFLOAT16),
    ),
]


@pytest.mark.parametrize(
    ("code", "message", "given"), REFUSALS, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(REFUSALS)]
)
def test_refusals(code, message, given):
    feeds, attrs = given
    model = node_model(OP, feeds, check=False, name="fc1", **attrs)
    with pytest.raises(ValueError) as caught:
        opferry.compile(model)
    assert 'NPUQuantMatmul node "fc1"' in str(caught.value)
    assert message in str(caught.value)
    assert f"[{code}]" in str(caught.value)


@pytest.mark.parametrize(("name", "shape"), [("x1", (0, 3, 4)), ("x2", (4, 0)), ("scale", (0,))])
def test_empty_initializers_are_refused(name, shape):
    """An empty graph input is refused earlier, by the model's check."""
    feeds, attrs = case()
    dtype, _ = feeds[name]
    feeds[name] = np.zeros(shape, dtype)
    model = node_model(OP, feeds, initializers=[name], check=False, **attrs)
    with pytest.raises(InvalidNodeError, match=rf'input "{name}": found .*\[E-EMPTY\]'):
        opferry.compile(model)
