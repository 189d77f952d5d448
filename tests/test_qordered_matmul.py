"""QOrderedMatMul, compiled, against its specification and the reference."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from compile_once import compile_once
from hosts import on
from order_cases import OFFSETS

import opferry
from opferry.driver.target import TARGETS
from opferry.frontend.builders import node_model
from opferry.reference.compare import compare
from opferry.relay_ops.orders import Order, offset
from opferry.runtime.errors import InvalidInputError

OP = "QOrderedMatMul"
ROW = {"order_A": 1, "order_B": 0, "order_Y": 1}
TILED_4R2_8C = {"order_A": 2, "order_B": 3, "order_Y": 2}
TILED_2R_4R4 = {"order_A": 2, "order_B": 4, "order_Y": 2}


def f32(*values):
    return np.array(values, np.float32)


def int8(rng, *shape):
    """All of int8, with -128 often."""
    x = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.05, -128, x).astype(np.int8)


def compiled(feeds, attrs, initializers=(), symbolic=None, target="llvm"):
    model = node_model(OP, feeds, initializers=initializers, symbolic=symbolic, **attrs)
    return compile_once(model, target)


def run(module, feeds):
    wanted = {spec.name for spec in module.inputs}
    return module.run({name: x for name, x in feeds.items() if name in wanted})["Y"]


def judge(module, feeds, attrs):
    y = run(module, feeds)
    (verdict,) = compare(OP, feeds, attrs, [y])
    assert verdict.ok, verdict
    return y


def problem(rng, a, b, n, *, per_column=False, bias=False, c=None):
    """Feeds for A of shape ``a``, B (*b, K, n), C (*c, M, n); results spread over int8."""
    m, k = a[-2:]
    scale_B = f32(100 / (5400 * np.sqrt(k)))
    if per_column:
        scale_B = (scale_B * rng.standard_normal(n)).astype(np.float32)
    feeds = {
        "A": int8(rng, *a),
        "scale_A": np.float32(0.5),
        "B": int8(rng, *b, k, n),
        "scale_B": scale_B,
        "scale_Y": f32(0.5),
    }
    if bias:
        feeds["bias"] = (rng.standard_normal(n) * 10).astype(np.float32)
    if c is not None:
        feeds |= {"C": int8(rng, *c, m, n), "scale_C": np.float32(0.25)}
    return feeds


@pytest.mark.parametrize(
    "stored",
    [
        ["scale_A", "B", "scale_B", "scale_Y", "bias", "scale_C"],
        ["scale_A", "scale_B", "scale_Y", "bias", "C", "scale_C"],
        [],
    ],
    ids=["weight", "residual", "none"],
)
def test_worked_example(stored):
    feeds = {
        "A": np.array([[1, -2, 3], [100, 50, -128]], np.int8),
        "scale_A": np.float32(0.5),
        "B": np.array([[4, 6], [-8, -5], [7, 9]], np.int8),  # bytes 4 6 -8 | -5 7 9: column-major
        "scale_B": np.float32(0.25),
        "scale_Y": np.float32(0.5),
        "bias": f32(1, -0.25),
        "C": np.array([[10, -10], [3, 4]], np.int8),
        "scale_C": np.float32(0.125),
    }
    assert run(compiled(feeds, ROW, stored), feeds).tolist() == [[-4, -1], [127, -128]]


@pytest.mark.parametrize(("order", "shape", "entries"), OFFSETS.values(), ids=OFFSETS)
def test_offsets(order, shape, entries):
    order, (rows, cols) = Order(order), shape
    assert {(r, c): offset(order, r, c, rows, cols) for r, c in entries} == entries
    every = [offset(order, r, c, rows, cols) for r in range(rows) for c in range(cols)]
    assert sorted(every) == list(range(rows * cols))


# A's batch, B's, C's (None: 2-D; C "": absent), per-column scale, bias.
LAYOUTS = [
    (None, None, "", False, False),
    (None, None, None, True, True),
    (None, 1, 1, True, True),
    (3, None, None, False, True),
    (3, 1, 3, True, False),
    (3, 3, 1, True, True),
    (3, 3, 3, False, False),
    (1, 1, 1, False, True),
]


def lead(batch):
    return () if batch is None else (batch,)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize(("a", "b", "c", "per_column", "bias"), LAYOUTS)
def test_row_combination(a, b, c, per_column, bias, constant):
    """One module, symbolic in M and in the batch, for two sizes."""
    rng = np.random.default_rng(0)
    stored = ["scale_A", "B", "scale_B", "scale_Y", "bias"] if constant else []
    module = None
    for m, batch in ((5, a), (13, a and max(a - 1, 1))):
        if m == 13 and constant and b == 3:
            continue  # the weight's batch is fixed
        sizes = [batch if x == a and x else x for x in (a, b, c)]
        more = None if c == "" else lead(sizes[2])
        feeds = problem(
            np.random.default_rng(0 if constant else m),
            (*lead(sizes[0]), m, 17),
            lead(sizes[1]),
            33,
            per_column=per_column,
            bias=bias,
            c=more,
        )
        feeds["A"] = int8(rng, *feeds["A"].shape)
        if module is None:
            first = len(lead(a))
            symbolic = {"A": {first: "M"} | ({0: "b"} if a == 3 else {})}
            if c != "":
                symbolic["C"] = {len(lead(c)): "M"} | ({0: "b"} if c == 3 else {})
            if b == 3 and not constant:
                symbolic["B"] = {0: "b"}
            held = [name for name in stored if name in feeds]
            module = compiled(feeds, ROW, held, symbolic)
            kept = {name: feeds[name] for name in held}
        y = judge(module, feeds | kept, ROW)
        assert y.shape == (*feeds["A"].shape[:-1], 33)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize("attrs", [TILED_4R2_8C, TILED_2R_4R4], ids=["4R2_8C", "2R_4R4"])
@pytest.mark.parametrize(
    ("a", "b", "c", "per_column"),
    [(None, None, "", True), (2, None, 1, False), (2, 2, 2, True), (None, 1, None, False)],
)
def test_tiled_combinations(a, b, c, per_column, attrs, constant):
    rng = np.random.default_rng(0)
    more = None if c == "" else lead(c)
    feeds = problem(rng, (*lead(a), 7, 64), lead(b), 96, per_column=per_column, c=more)
    symbolic = {"A": {len(lead(a)): "M"}}
    if c != "":
        symbolic["C"] = {len(lead(c)): "M"}
    stored = ["B", "scale_B", "scale_Y"] if constant else []
    judge(compiled(feeds, attrs, stored, symbolic), feeds, attrs)


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "x86-avxvnni", "x86-avx512", "x86-amx"])
def test_tiled_on_every_tier(target):
    feeds = problem(np.random.default_rng(0), (2, 9, 32), (), 64, c=(2,))
    judge(compiled(feeds, TILED_2R_4R4, ["B"], None, on(target)), feeds, TILED_2R_4R4)


@pytest.mark.parametrize(
    ("n", "k", "target"),
    [
        (33, 17, "x86-amx"),
        (100, 128, "x86-amx"),
        (1, 1, "x86-avx512vnni"),
        (33, 3, "x86-avx512vnni"),
        (100, 130, "x86-avx512vnni"),
        (33, 17, "x86-avx512"),
        (100, 100, "x86-avxvnni"),
        (100, 17, "x86-avx2"),
        (33, 100, "x86-64"),
    ],
)
def test_sizes(n, k, target):
    """One module of symbolic M for all row counts, on each instruction tier, with bias and C."""
    rng = np.random.default_rng(n * k)
    feeds = problem(rng, (5, k), (), n, per_column=True, bias=True, c=())
    stored = [name for name in feeds if name not in ("A", "C")]
    module = compiled(feeds, ROW, stored, {"A": {0: "M"}, "C": {0: "M"}}, on(target))
    for m in (*range(1, 18), 100):
        feeds |= {"A": int8(rng, m, k), "C": int8(rng, m, n)}
        judge(module, feeds, ROW)


def test_symbolic_weight():
    """N and K of a run-time weight may be symbolic."""
    rng = np.random.default_rng(0)
    feeds = problem(rng, (2, 3, 5), (), 7, per_column=True, bias=True, c=(2,))
    axes = {
        "A": {0: "b", 1: "M", 2: "K"},
        "B": {0: "K", 1: "N"},
        "C": {0: "b", 1: "M", 2: "N"},
        "scale_B": {0: "N"},
        "bias": {0: "N"},
    }
    module = compiled(feeds, ROW, (), axes)
    for b, m, n, k in [(2, 3, 7, 5), (1, 8, 40, 33)]:
        judge(module, problem(rng, (b, m, k), (), n, per_column=True, bias=True, c=(b,)), ROW)


def test_symbolic_tiled_weight_is_checked_at_the_call():
    rng = np.random.default_rng(0)
    feeds = problem(rng, (3, 32), (), 64)
    axes = {"A": {0: "M", 1: "K"}, "B": {0: "K", 1: "N"}}
    module = compiled(feeds, TILED_4R2_8C, (), axes)
    judge(module, problem(rng, (5, 64), (), 32), TILED_4R2_8C)
    with pytest.raises(InvalidInputError, match="K, columns of A: found 33, allowed a multiple"):
        run(module, problem(rng, (5, 33), (), 32))


def test_declared_shape_is_not_row_major():
    """b[k, n] lies at n*K + k of the declared (K, N) tensor: unit rows of A pick b's rows."""
    feeds = {
        "A": np.eye(3, dtype=np.int8)[[0]],
        "scale_A": f32(1),
        "B": np.arange(1, 7, dtype=np.int8).reshape(3, 2),
        "scale_B": f32(1),
        "scale_Y": f32(1),
    }
    assert run(compiled(feeds, ROW, ["B"]), feeds).tolist() == [[1, 4]]


@functools.cache
def scalar(target):
    """1 x 1 problem with bias and C, all at run time but the weight 1."""
    feeds = problem(np.random.default_rng(0), (1, 1), (), 1, bias=True, c=())
    feeds["B"] = np.ones((1, 1), np.int8)
    return compiled(feeds, ROW, ["B"], None, target)


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "llvm"])
def test_ties_and_saturation(target):
    """v = 0.5*a + 2*bias + 0.25*c with scale_A 0.25, scale_Y 0.5, scale_C 0.125."""
    module = scalar(target if target == "llvm" else on(target))
    for a, bias, c, want in [
        (1, 0, 0, 0),
        (3, 0, 0, 2),
        (5, 0, 0, 2),
        (-1, 0, 0, 0),
        (-3, 0, 0, -2),
        (-5, 0, 0, -2),
        (1, 63.5, 0, 127),
        (-1, -64, 0, -128),
        (-1, -63.5, 0, -128),
        (-128, 0, -128, -96),
        (127, 1e6, 127, 127),
        (127, -1e6, 127, -128),
        (0, 0.25, 0, 0),
        (0, 0.75, 0, 2),
        (0, 0, 6, 2),
        (0, 0, 127, 32),
    ]:
        feeds = {
            "A": np.array([[a]], np.int8),
            "scale_A": np.float32(0.25),
            "scale_B": f32(1),
            "scale_Y": f32(0.5),
            "bias": f32(bias),
            "C": np.array([[c]], np.int8),
            "scale_C": np.float32(0.125),
        }
        assert run(module, feeds).tolist() == [[want]], (a, bias, c)


def test_zero_scales():
    rng = np.random.default_rng(0)
    feeds = problem(rng, (4, 9), (), 6, per_column=True, bias=True, c=())
    feeds["scale_B"][::2] = 0
    feeds["scale_C"] = np.float32(0)
    judge(compiled(feeds, ROW, ["B", "scale_B", "scale_C"]), feeds, ROW)


def test_scale_C_without_C_is_ignored():
    feeds = problem(np.random.default_rng(0), (4, 9), (), 6)
    feeds["scale_C"] = f32(np.nan, 1)
    y = run(compiled(feeds, ROW, ["B", "scale_C"]), feeds)
    del feeds["scale_C"]
    (verdict,) = compare(OP, feeds, ROW, [y])
    assert verdict.ok, verdict


@pytest.mark.parametrize("target", TARGETS)
def test_longest_sum(target):
    """K = 131071 products of -128 x -128 = 2147467264, the largest that fits."""
    k = 131071
    feeds = {
        "A": np.full((1, k), -128, np.int8),
        "scale_A": f32(1),
        "B": np.full((k, 1), -128, np.int8),
        "scale_B": f32(2.0**-25),
        "scale_Y": f32(1),
    }
    assert run(compiled(feeds, ROW, ["B"], None, on(target)), feeds).tolist() == [[64]]


def case(attrs=ROW, **changes):
    """A valid row problem (types, or arrays for initializers) with some inputs changed."""
    feeds = {
        "A": (np.int8, (2, 3, 32)),
        "scale_A": (np.float32, ()),
        "B": (np.int8, (32, 64)),
        "scale_B": (np.float32, (1,)),
        "scale_Y": (np.float32, ()),
    }
    return feeds | changes, attrs


C = (np.int8, (2, 3, 64))
ONE = (np.float32, (1,))
REFUSALS = [
    ('attribute "order_A": found none', case({"order_B": 0, "order_Y": 1})),
    ('attribute "order_B": found 5', case(ROW | {"order_B": 5})),
    ("found (1, 0, 2)", case(ROW | {"order_Y": 2})),
    ("found (1, 1, 1)", case(ROW | {"order_B": 1})),
    ("found (2, 2, 2)", case(TILED_4R2_8C | {"order_B": 2})),
    ("found (1, 3, 1)", case(ROW | {"order_B": 3})),
    ('input "A" rank: found 1', case(A=(np.int8, (32,)))),
    ('input "B" rank: found 4', case(B=(np.int8, (1, 1, 32, 64)))),
    ('input "C" rank: found 1', case(C=(np.int8, (64,)), scale_C=ONE)),
    ('input "B" K: found 33, allowed 32', case(B=(np.int8, (33, 64)))),
    ('input "B" batch: found 3, allowed 1 or 2', case(B=(np.int8, (3, 32, 64)))),
    ('input "C" batch: found 3, allowed 1 or 2', case(C=(np.int8, (3, 3, 64)), scale_C=ONE)),
    ('input "C": found shape (3, 63)', case(C=(np.int8, (3, 63)), scale_C=ONE)),
    ("K, columns of A: found 33", case(TILED_4R2_8C, A=(np.int8, (3, 33)), B=(np.int8, (33, 64)))),
    ("N, columns of Y: found 40", case(TILED_2R_4R4, B=(np.int8, (32, 40)))),
    ('input "bias" rank: found 2', case(bias=(np.float32, (1, 64)))),
    ('input "bias": found shape (63)', case(bias=(np.float32, (63,)))),
    ('input "scale_B" shape: found (63)', case(scale_B=(np.float32, (63,)))),
    ('input "scale_B" shape: found (1, 64)', case(scale_B=(np.float32, (1, 64)))),
    ('input "scale_A" shape: found (64,)', case(scale_A=(np.float32, (64,)))),
    ('input "scale_Y" shape: found (2,)', case(scale_Y=(np.float32, (2,)))),
    ('input "scale_C" shape: found (64,)', case(C=C, scale_C=(np.float32, (64,)))),
    ('input "scale_C": found none', case(C=C)),
    ('input "bias": found a tensor', case(TILED_4R2_8C, bias=(np.float32, (64,)))),
    ('input "A": found uint8', case(A=(np.uint8, (2, 3, 32)))),
    ('input "scale_A": found float16', case(scale_A=(np.float16, ()))),
    ('input "scale_A": found 0.0', case(scale_A=f32(0))),
    ('input "scale_A": found -1.0', case(scale_A=f32(-1))),
    ('input "scale_B": found inf', case(scale_B=f32(np.inf))),
    ('input "scale_Y": found nan', case(scale_Y=f32(np.nan))),
    ('input "scale_B": found nan', case(scale_B=f32(*[np.nan] * 64))),
    ('input "scale_C": found inf', case(C=C, scale_C=f32(np.inf))),
    ('input "bias": found nan', case(bias=f32(*[np.nan] * 64))),
    ("K: found 131072", case(A=(np.int8, (1, 131072)), B=(np.int8, (131072, 64)))),
]


@pytest.mark.parametrize(("message", "given"), REFUSALS, ids=[m for m, _ in REFUSALS])
def test_refusals(message, given):
    feeds, attrs = given
    stored = [name for name, value in feeds.items() if isinstance(value, np.ndarray)]
    model = node_model(OP, feeds, initializers=stored, check=False, name="fc1", **attrs)
    with pytest.raises(ValueError) as caught:
        opferry.compile(model)
    assert 'QOrderedMatMul node "fc1"' in str(caught.value)
    assert message in str(caught.value)


def test_symbolic_rows_must_agree():
    feeds = problem(np.random.default_rng(0), (4, 9), (), 6, c=())
    module = compiled(feeds, ROW, ["B"], {"A": {0: "M"}, "C": {0: "L"}})
    with pytest.raises(InvalidInputError, match='input "C" shape'):
        run(module, feeds | {"C": np.zeros((5, 6), np.int8)})


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    attrs=st.sampled_from([ROW, ROW, TILED_4R2_8C, TILED_2R_4R4]),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    batches=st.sampled_from(list(itertools.product([None, 2], [None, 1], ["", None, 1]))),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_fuzz(attrs, sizes, batches, options, seed):
    (m, n, k), (a, b, c), (per_column, bias, constant) = sizes, batches, options
    if attrs is not ROW:
        n, k, bias = 32 * (1 + n % 3), 32 * (1 + k % 3), False
    rng = np.random.default_rng(seed)
    more = None if c == "" else lead(c)
    shape = (*lead(a), m, k)
    feeds = problem(rng, shape, lead(b), n, per_column=per_column, bias=bias, c=more)
    stored = ["B", "scale_B"] if constant else []
    judge(compiled(feeds, attrs, stored), feeds, attrs)
