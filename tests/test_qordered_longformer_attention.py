"""QOrderedLongformerAttention, compiled, against its specification and the NumPy reference."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from compile_once import compile_once
from hosts import on
from longformer_cases import (
    AT_RUN_TIME,
    COL4_4R2_8C,
    COL32,
    COL32_2R_4R4,
    EXAMPLE,
    EXAMPLE_ATTRS,
    EXAMPLE_OUTPUT,
    OP,
    RECORDED_ATTRS,
    ROW,
    WEIGHTS,
    attributes,
    data,
    f32,
    recorded,
    weights,
)
from tvm import relax, tirx
from tvm.s_tir import SBlock
from tvm.target import Target
from tvm_ffi import structural_walk

import opferry
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import prepare
from opferry.reference.compare import compare


@functools.cache
def build(num_heads, head_size, window, orders=(ROW, 0, 0), target="llvm", fed=(), **options):
    """(symbolic module, its weights, attributes); ``fed`` names weights that are graph inputs,
    ``options`` are those of ``weights``.
    """
    hidden = num_heads * head_size
    fixed = weights(num_heads + head_size, hidden, **options)
    attrs = attributes(num_heads, window, orders)
    model = node_model(
        OP,
        {**fixed, **data(0, 1, 2 * window, hidden, [0])},
        initializers=[name for name in fixed if name not in fed],
        symbolic={name: {0: "B", 1: "S"} for name in AT_RUN_TIME},
        **attrs,
    )
    return opferry.compile(model, target), fixed, attrs


def agree(built, values):
    """Run ``values`` (input, mask, global, and weights to replace) and compare."""
    module, fixed, attrs = built
    inputs = {**fixed, **values}
    given = {spec.name: inputs[spec.name] for spec in module.inputs}
    output = module.run(given)["output"]
    (verdict,) = compare(OP, inputs, attrs, [output])
    assert verdict.ok, verdict
    return output


@pytest.mark.parametrize("initializers", [(), WEIGHTS], ids=["fed", "stored"])
def test_worked_example(initializers):
    model = node_model(OP, EXAMPLE, initializers=initializers, **EXAMPLE_ATTRS)
    module = compile_once(model)
    output = module.run({spec.name: EXAMPLE[spec.name] for spec in module.inputs})["output"]
    assert output.dtype == np.int8
    assert output.tolist() == EXAMPLE_OUTPUT


# num_heads, head_size, window, then (B, blocks of 2W, global tokens of the batch entries).
SHAPES = {
    "tiny": (1, 1, 1, [(1, 1, [0]), (3, 2, [1, 0, 4]), (1, 40, [3])]),
    "odd": (3, 5, 3, [(2, 1, [0, 6]), (1, 7, [1]), (2, 30, [0, 20])]),
    "head 24": (2, 24, 10, [(2, 1, [0]), (1, 5, [1]), (2, 9, [11, 180])]),
    "head 40, window 33": (2, 40, 33, [(1, 1, [2]), (2, 6, [5, 0])]),
    "head 64, tiles": (2, 64, 64, [(1, 1, [0]), (1, 4, [1]), (1, 5, [70])]),
    "wide window": (1, 16, 300, [(1, 1, [1]), (1, 2, [9])]),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    """One module serves every batch size and length."""
    *problem, runs = shape
    built = build(*problem)
    for seed, (batch, blocks, counts) in enumerate(runs):
        seq = 2 * problem[2] * blocks
        agree(built, data(seed, batch, seq, problem[0] * problem[1], counts))


@pytest.mark.parametrize(
    ("num_heads", "head_size", "orders"),
    [
        (2, 16, (COL32, COL4_4R2_8C, COL4_4R2_8C)),
        (3, 32, (COL32, COL32_2R_4R4, COL4_4R2_8C)),
        (8, 12, (COL32, COL4_4R2_8C, COL32_2R_4R4)),
    ],
    ids=str,
)
def test_tiled_orders(num_heads, head_size, orders):
    built = build(num_heads, head_size, 3, orders)
    for batch, seq, counts in [(1, 6, [0]), (2, 18, [2, 0]), (2, 12, [0])]:
        agree(built, data(seq, batch, seq, num_heads * head_size, counts))


@pytest.mark.parametrize(
    ("orders", "fed", "per_column"),
    [
        ((ROW, 0, 0), (), 32),
        ((ROW, 0, 0), (), 96),
        ((ROW, 0, 0), WEIGHTS, None),
        ((ROW, 0, 0), WEIGHTS, 32),
        ((COL32, COL32_2R_4R4, COL4_4R2_8C), (), 96),
        ((COL32, COL32_2R_4R4, COL4_4R2_8C), WEIGHTS, 96),
    ],
    ids=["row-H", "row-3H", "row-fed", "row-fed-H", "tiled-3H", "tiled-fed-3H"],
)
def test_operands(orders, fed, per_column):
    built = build(2, 16, 2, orders, fed=fed, per_column=per_column, scalar_shape=(1,))
    agree(built, data(1, 2, 12, 32, [1, 3]))
    if fed:  # the values of this call, not of the model
        other = weights(77, 32, per_column, (1,))
        agree(built, {**other, **data(2, 1, 8, 32, [0])})


def test_some_operands_fed():
    fed = ("scale_weight", "global_bias", "scale_output")
    agree(build(2, 16, 2, fed=fed), data(3, 2, 12, 32, [1]))


def test_masks():
    """Additive values; only a negative one, however small, empties its own row."""
    built = build(2, 16, 4)
    values = data(5, 2, 32, 32, [5, 0], padding=0)
    mask = values["mask"]
    mask[0] = np.random.default_rng(0).choice(
        np.array([0.0, -0.0, 1.5, -6e-8, -3, -65504, -np.inf, 300], np.float16), 32
    )
    output = agree(built, values)
    assert not output[0][mask[0] < 0].any()
    assert output[0][~(mask[0] < 0)].any(axis=-1).all()


def test_padding():
    """A padded batch entry is zero, also its global rows; a global padding token is invisible."""
    built = build(2, 16, 4)
    for padding in (-10000, -65504, -np.inf):
        values = data(6, 3, 24, 32, [4], padding=0)
        values["mask"][0] = padding
        values["mask"][1, 20:] = padding
        values["global"][1, 22] = 1
        output = agree(built, values)
        assert not output[0].any()
        assert not output[1, 20:].any()
        values["global"][1, 22] = 0
        if padding != -10000:
            assert np.array_equal(agree(built, values), output)


def test_row_with_itself_only():
    """Copies v: 13 and -10 in units of 0.125, read in units of 0.03125."""
    values = dict(EXAMPLE, mask=np.array([[0, -np.inf, -np.inf, -np.inf]], np.float16))
    values["global"] = np.zeros((1, 4), np.int32)
    module = compile_once(node_model(OP, values, **EXAMPLE_ATTRS))
    assert module.run(values)["output"].tolist() == [[[52, -40], [0, 0], [0, 0], [0, 0]]]
    values["scale_output"] = f32(1e-6)  # saturates
    assert module.run(values)["output"][0, 0].tolist() == [127, -128]


@pytest.mark.parametrize("where", ["first", "last", "all", "middle", "more than W"])
def test_places_of_global_tokens(where):
    built = build(3, 5, 3)
    values = data(7, 2, 48, 15, [0])
    chosen = {
        "first": np.s_[:, :1],
        "last": np.s_[:, -1:],
        "all": np.s_[:, :],
        "middle": np.s_[1, 20:23],
        "more than W": np.s_[:, :10],
    }[where]
    values["global"][chosen] = 1
    agree(built, values)


def test_global_operands_do_not_matter_without_flags():
    built = build(2, 16, 2, (ROW, 0, 0), fed=WEIGHTS, per_column=None, scalar_shape=(1,))
    values = data(8, 1, 8, 32, [0])
    expected = agree(built, values)
    other = {name: weights(9, 32)[name] for name in ("global_weight", "global_bias")}
    assert np.array_equal(agree(built, {**values, **other}), expected)


def test_large_scores_do_not_overflow():
    """|q . k| passes the range of float16, probabilities are one-hot."""
    built = build(2, 16, 2, (ROW, 0, 0), fed=WEIGHTS, per_column=None, scalar_shape=(1,))
    scales = {"scale_qkv_gemm": f32(8), "scale_input": f32(8), "scale_output": f32(4)}
    agree(built, {**data(9, 2, 12, 32, [1]), **scales})


@pytest.mark.parametrize(
    "target", ["x86-64", "x86-avx2", "x86-avx512", "x86-avx512vnni", "x86-amx"]
)
def test_instruction_tiers(target):
    built = build(2, 24, 5, target=on(target))
    agree(built, data(10, 2, 40, 48, [2, 0]))


def test_recorded():
    inputs, expected = recorded()
    model = node_model(OP, inputs, initializers=WEIGHTS, **RECORDED_ATTRS)
    output = opferry.compile(model).run({name: inputs[name] for name in AT_RUN_TIME})["output"]
    assert np.count_nonzero(output[0] == expected) >= 4000
    (verdict,) = compare(OP, inputs, RECORDED_ATTRS, [output])
    assert verdict.ok, verdict


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    problem=st.sampled_from([(3, 5, 3), (2, 16, 4), (2, 24, 10)]),
    batch=st.integers(1, 4),
    blocks=st.integers(1, 9),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    padding=st.sampled_from([0, 0.3, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fuzz(problem, batch, blocks, counts, padding, seed):
    seq = 2 * problem[2] * blocks
    agree(build(*problem), data(seed, batch, seq, problem[0] * problem[1], counts, padding))


def memory(seq):
    """(largest, total) elements of all that is allocated: graph values and kernels' own buffers."""
    values = data(0, 1, seq, 32, [1])
    attrs = {"num_heads": 2, "window": 8, "order_input": ROW, "order_output": ROW}
    model = node_model(OP, {**weights(0, 32), **values}, initializers=WEIGHTS, **attrs)
    module = import_model(prepare(model), Target({"kind": "llvm", "mcpu": "x86-64"})).module
    sizes = []

    def add(*shapes):
        for shape in shapes:  # the rows of the global projections are symbols, at most S
            sizes.append(math.prod(int(d) if isinstance(d, tirx.IntImm) else seq for d in shape))

    def add_tensor(expr):
        if isinstance(expr, relax.Var) and isinstance(expr.ty, relax.TensorType):
            add(expr.ty.shape)

    allocations = [
        (tirx.AllocBuffer, lambda alloc: add(alloc.buffer.shape)),
        (SBlock, lambda block: add(*(buffer.shape for buffer in block.alloc_buffers))),
    ]
    for func in module.functions.values():
        if isinstance(func, tirx.PrimFunc):
            structural_walk(func.body, allocations)
        else:
            relax.analysis.post_order_visit(func, add_tensor)
    return max(sizes), sum(sizes)


def test_memory_is_linear_in_the_sequence():
    largest, total = memory(4096)
    assert largest <= 4096 * 96 * 4  # the projections, no S x S
    assert memory(8192)[1] <= 2 * total


@pytest.mark.parametrize("shape", [(1, 20), (2, 6)], ids=str)
def test_sequence_is_judged_at_the_call(shape):
    module, _, _ = build(2, 16, 4)
    values = data(0, *shape, 32, [0])
    message = (
        rf'{OP} node "node": .*sequence length S: found {shape[1]}, allowed a multiple of 2 \* '
        r"window = 8"
    )
    with pytest.raises(ValueError, match=message):
        module.run(values)


def with_scale(value, *names):
    return {name: f32(value) for name in names}
