"""NPUQuantMatmul, compiled, against specification and reference."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hosts import available, on
from linear_cases import (
    BFLOAT16,
    COMBINATIONS,
    DTYPES,
    FLOAT16,
    INT8,
    INT32,
    NAMES,
    OP,
    check,
    compiled,
    f32,
    int8,
    problem,
    run,
)

from opferry.driver.target import TARGETS
from opferry.reference.compare import compare
from opferry.runtime.errors import InvalidInputError


def test_every_legal_combination_is_listed():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 42


@pytest.mark.parametrize("index", range(42), ids=lambda i: "-".join(map(str, COMBINATIONS[i])))
def test_combinations(index):
    """Constants and run-time tensors, and the targets, take turns over the table."""
    rng = np.random.default_rng(index)
    feeds, attrs = problem(rng, 5, 17, 33, *COMBINATIONS[index])
    stored = [name for name in feeds if name != "x1"] if index % 2 else []
    targets = ["x86-64", "x86-avx2", "x86-avxvnni", "x86-avx512vnni", "x86-amx"]
    target = targets[index // 2 % len(targets)]
    check(feeds, attrs, stored, target=target if available(target) else "llvm")


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize("carrier", [np.int64, np.uint64])
def test_packed_scale_has_ignored_bits_and_the_only_offset(carrier, constant):
    """1.5 in the upper 19 bits, offset -3; all bits without a meaning are set."""
    packed = 0x3FC00000 | (-3 & 0x1FF) << 37
    packed |= 0x1FFF | 0x1F << 32 | ((1 << 17) - 1) << 47  # bit 46 is left out
    feeds = {
        "x1": np.array([[7]], np.int8),
        "x2": np.array([[3]], np.int8),
        "scale": np.array([packed], np.uint64).view(carrier),
        "offset": f32(100),
    }
    stored = ["scale", "offset"] if constant else []
    y = run(compiled(feeds, {"output_dtype": INT8}, stored), feeds)
    assert y.tolist() == [[29]]  # 31.5 to 32, less 3


# Section 8.
X1 = np.array([[10, -20, 30], [127, -128, 5]], np.int8)
WEIGHT = np.array([[1, 2, 3], [-4, 5, 6], [100, -100, 50]], np.int8)
SCALE, OFFSET = f32(0.3, 0.0101, 0.05), f32(2.5, -7, -200)
BIAS = np.array([5, -10, 1000], np.int32)
PACKED = np.array([70644672331776, 139776424763392, 113250726100992], np.int64)
PERTOKEN, FLOAT_BIAS = f32(0.5, -2), f32(0.25, -1.5, 100)
EXAMPLES = {
    "int32": (INT32, {"bias": BIAS}, [[65, 30, 5500], [-109, -1128, 26750]]),
    "int8": (INT8, {"offset": OFFSET, "bias": BIAS}, [[21, -7, 55], [-31, -18, 55]]),
    "int8-packed": (INT8, {"scale": PACKED, "bias": BIAS}, [[21, -7, 55], [-31, -18, 55]]),
    "float16": (
        FLOAT16,
        {"bias": BIAS},
        [[19.484375, 0.302734375, 275], [-32.6875, -11.3828125, 1337]],
    ),
    "float16-pertoken": (
        FLOAT16,
        {"pertoken_scale": PERTOKEN, "bias": FLOAT_BIAS},
        [[9.25, -1.2978515625, 212.5], [68.625, 21.078125, -2476]],
    ),
    "bfloat16-pertoken": (
        BFLOAT16,
        {"pertoken_scale": PERTOKEN, "bias": FLOAT_BIAS},
        [[9.25, -1.296875, 212], [68.5, 21.125, -2480]],
    ),
}


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize("case", EXAMPLES)
def test_worked_example(case, constant):
    output, given, want = EXAMPLES[case]
    feeds = {"x1": X1, "x2": WEIGHT, "scale": SCALE, **given}
    stored = [name for name in feeds if name != "x1"] if constant else []
    y = run(compiled(feeds, {"output_dtype": output, "transpose_x2": 1}, stored), feeds)
    assert y.dtype.name == NAMES[output]
    assert y.astype(np.float64).tolist() == want


def test_call_of_the_original():
    """(1, 512) x (128, 512) with one scale, an offset and a bias per channel."""
    rng = np.random.default_rng(0)
    feeds = {
        "x1": int8(rng, 1, 512),
        "x2": int8(rng, 128, 512),
        "scale": f32(0.003),
        "offset": rng.integers(-100, 100, 128).astype(np.float32),
        "bias": rng.integers(-1000, 1000, 128).astype(np.int32),
    }
    y = check(feeds, {"output_dtype": INT8, "transpose_x2": 1}, ["x2", "bias"])
    assert y.shape == (1, 128)


ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 100]


@pytest.mark.parametrize(
    ("n", "k", "target"),
    [
        (1, 1, "x86-amx"),
        (100, 130, "x86-amx"),
        (96, 64, "x86-amx"),
        (1, 1, "x86-avx512vnni"),
        (33, 17, "x86-avx512vnni"),
        (100, 130, "x86-avx512vnni"),
        (96, 64, "x86-avx512vnni"),
        (100, 100, "x86-avx512"),
        (33, 3, "x86-avx512"),
        (100, 130, "x86-avxvnni"),
        (33, 3, "x86-avxvnni"),
        (100, 17, "x86-avx2"),
        (1, 100, "x86-avx2"),
        (33, 100, "x86-64"),
        (1, 3, "x86-64"),
    ],
)
def test_sizes(n, k, target):
    """One module of symbolic M for all row counts, on each instruction tier."""
    rng = np.random.default_rng(n * k)
    feeds, attrs = problem(rng, 5, k, n, INT8, offset=True, bias="int32")
    stored = [name for name in feeds if name != "x1"]
    module = compiled(feeds, attrs, stored, {"x1": {0: "M"}}, on(target))
    for m in ROWS:
        feeds["x1"] = int8(rng, m, k)
        (verdict,) = compare(OP, feeds, attrs, [run(module, feeds)])
        assert verdict.ok, (m, verdict)


@pytest.mark.parametrize("target", ["x86-avx512vnni", "x86-avx2", "x86-64"])
@pytest.mark.parametrize("names", [{0: "B"}, {1: "M"}], ids=["batch", "rows"])
def test_multiples_of_a_symbol(names, target):
    """Batch and rows are one run of 8 * B or 2 * M rows."""
    feeds, attrs = problem(np.random.default_rng(0), 8, 36, 79, INT8)
    feeds["x1"] = int8(np.random.default_rng(1), 2, 8, 36)
    check(feeds, attrs, ["x2", "scale"], {"x1": names}, on(target))


@pytest.mark.parametrize("m", [1, 7, 13, 24])
def test_fixed_rows(m):
    feeds, attrs = problem(np.random.default_rng(m), m, 50, 70, FLOAT16, bias="int32")
    check(feeds, attrs, ["x2", "scale", "bias"])


# x1 batch, x2 batch, transpose flags, names of symbolic axes of x1 and of x2.
BATCHES = [
    ((2,), (), 0, 1, {}, {}),
    ((2,), (), 1, 0, {0: "b"}, {}),
    ((), (3,), 1, 1, {}, {0: "b"}),
    ((2, 3), (3,), 0, 0, {0: "a", 1: "b"}, {}),
    ((2, 3), (3,), 0, 1, {1: "b"}, {0: "b"}),
    ((2, 1, 3), (1, 2, 1), 0, 1, {0: "a", 1: "b", 2: "c"}, {}),
    ((2, 1, 3), (1, 2, 1), 1, 1, {0: "a", 1: "b"}, {0: "c", 1: "d", 2: "e"}),
    ((1, 2, 1, 2), (2, 1, 1, 1), 0, 0, {}, {}),
]


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize(("b1", "b2", "t1", "t2", "s1", "s2"), BATCHES)
def test_batches(b1, b2, t1, t2, s1, s2, constant):
    rng = np.random.default_rng(0)
    m, k, n = 5, 18, 19
    feeds, attrs = problem(rng, m, k, n, FLOAT16, bias="float32", pertoken=True)
    feeds["x1"] = int8(rng, *b1, *((k, m) if t1 else (m, k)))
    feeds["x2"] = int8(rng, *b2, *((n, k) if t2 else (k, n)))
    attrs |= {"transpose_x1": t1, "transpose_x2": t2}
    symbolic = {"x1": s1} if constant else {"x1": s1, "x2": s2}
    stored = ["x2", "scale"] if constant else []
    y = check(feeds, attrs, stored, symbolic)
    assert y.shape == (*np.broadcast_shapes(b1, b2), m, n)


def test_one_module_for_several_batches_rows_and_columns():
    """Every dimension symbolic, the weight a run-time tensor; a batch may also turn out to be 1."""
    rng = np.random.default_rng(0)
    feeds, attrs = problem(rng, 5, 18, 19, FLOAT16, bias="float32", pertoken=True)
    feeds["x1"], feeds["x2"] = int8(rng, 2, 5, 18), int8(rng, 2, 18, 19)
    symbolic = {
        "x1": {0: "b1", 1: "m", 2: "k"},
        "x2": {0: "b2", 1: "k", 2: "n"},
        "scale": {0: "s"},
        "pertoken_scale": {0: "m"},
        "bias": {0: "n"},
    }
    module = compiled(feeds, attrs, (), symbolic)
    for b1, b2, m, k, n in [(2, 2, 5, 18, 19), (1, 3, 1, 1, 1), (3, 1, 7, 40, 33)]:
        feeds, attrs = problem(rng, m, k, n, FLOAT16, bias="float32", pertoken=True)
        feeds["x1"], feeds["x2"] = int8(rng, b1, m, k), int8(rng, b2, k, n)
        feeds["scale"] = feeds["scale"][: n if m > 1 else 1]
        (verdict,) = compare(OP, feeds, attrs, [run(module, feeds)])
        assert verdict.ok, verdict
    feeds["x2"] = int8(rng, 2, 40, 33)
    with pytest.raises(InvalidInputError, match=r'input "x1" batch.*E-SHAPE'):
        run(module, feeds)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize("x2_batch", [(), (3,)], ids=["shared", "batched"])
@pytest.mark.parametrize("bias", ["int32", "float32"])
def test_bias_per_batch(bias, x2_batch, constant):
    rng = np.random.default_rng(1)
    feeds, attrs = problem(rng, 4, 9, 21, BFLOAT16, bias=bias)
    feeds["x1"], feeds["x2"] = int8(rng, 3, 4, 9), int8(rng, *x2_batch, 9, 21)
    feeds["bias"] = np.stack([feeds["bias"] * z for z in (1, 2, 3)])[:, None]
    check(feeds, attrs, ["x2", "bias"] if constant else [])


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "run-time"])
@pytest.mark.parametrize(("scale", "offset"), [(1, 33), (33, 1), (1, 1)])
def test_scale_and_offset_lengths(scale, offset, constant):
    rng = np.random.default_rng(0)
    feeds, attrs = problem(rng, 3, 20, 33, INT8, offset=True)
    feeds |= {"scale": feeds["scale"][:scale], "offset": feeds["offset"][:offset]}
    check(feeds, attrs, ["x2", "scale", "offset"] if constant else [])


@functools.cache
def one_column(target, output, constant):
    """x2 = [[1]]: y is a function of x1, scale and bias alone."""
    feeds = {"x1": np.zeros((1, 1), np.int8), "x2": np.ones((1, 1), np.int8), "scale": f32(1)}
    feeds |= {"offset": f32(0)} if output == INT8 else {}
    feeds["bias"] = np.zeros(1, np.int32)
    stored = ["x2"] if constant else []
    return compiled(feeds, {"output_dtype": output}, stored, None, target)


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "llvm"])
def test_ties_saturation_and_offsets(target):
    """t = bias * scale: ties to even, nine bits before the offset, eight after it."""
    module = one_column(target if target == "llvm" else on(target), INT8, True)
    cases = [
        # bias, scale, offset, y
        (1, 0.5, 0, 0),
        (3, 0.5, 0, 2),
        (-1, 0.5, 0, 0),
        (-5, 0.5, 0, -2),
        (255, 0.5, 0, 127),
        (-257, 0.5, 0, -128),
        (400, 1, -200, 55),
        (-400, 1, 200, -56),
        (0, 1, 400.7, 127),
        (-200, 1, 400.7, 55),
        (200, 1, -300.2, -56),
        (0, 1, 2.5, 2),
        (0, 1, 3.5, 4),
        (0, 1, -2.5, -2),
        (100, -1, 0, -100),
        (100, 0, 7, 7),
    ]
    for bias, scale, offset, want in cases:
        y = run(
            module,
            {
                "x1": np.zeros((1, 1), np.int8),
                "scale": f32(scale),
                "offset": f32(offset),
                "bias": np.array([bias], np.int32),
            },
        )
        assert y.tolist() == [[want]], (bias, scale, offset)


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "llvm"])
@pytest.mark.parametrize("output", [FLOAT16, BFLOAT16])
def test_casts_round_to_nearest_even(output, target):
    """Subnormals are kept, overflow is infinite; what is not truncated is bit for bit."""
    module = one_column(target if target == "llvm" else on(target), output, True)
    dtype = DTYPES[NAMES[output]]
    scales = [2.0**-25, 3 * 2.0**-25, 2.0**-24, 2.0**-14, 0.5, 1.0, 16.0, 2.0**11, 2.0**126]
    for bias, scale in itertools.product([1, -1, 3, 2047, 2049, 4095, 65519, 65520], scales):
        with np.errstate(over="ignore"):
            want = (np.float32(bias) * np.float32(scale)).astype(dtype)
        feeds = {"x1": np.zeros((1, 1), np.int8), "bias": np.array([bias], np.int32)}
        y = run(module, {**feeds, "scale": f32(scale)})
        assert y.view(np.uint16) == want.view(np.uint16), (bias, scale)


def test_float32_scale_is_truncated_on_the_packed_path_only():
    x1, x2 = np.full((1, 1), 1, np.int8), np.full((1, 1), 1, np.int8)
    scale = np.array([0x3F801FFF], np.uint32).view(np.float32)  # 1 + 8191 units of the last place
    feeds = {"x1": x1, "x2": x2, "scale": scale, "bias": np.array([0], np.int32)}
    assert float(run(one_column("llvm", FLOAT16, False), feeds)[0, 0]) == 1.0
    assert float(run(one_column("llvm", BFLOAT16, False), feeds)[0, 0]) == 1.0  # nearest
    feeds["scale"] = np.array([0x3F819FFF], np.uint32).view(np.float32)
    assert float(run(one_column("llvm", FLOAT16, False), feeds)[0, 0]) == 1.01171875
    assert float(run(one_column("llvm", BFLOAT16, False), feeds)[0, 0]) == 1.015625


@pytest.mark.parametrize("target", TARGETS)
def test_largest_products_are_exact(target):
    """k = 65535 products of -128 x -128, and of -128 x 127."""
    k = 65535
    feeds = {"x1": np.full((1, k), -128, np.int8), "x2": np.full((2, k), -128, np.int8)}
    feeds["x2"][1] = 127
    feeds["scale"] = f32(np.nan)  # ignored
    attrs = {"output_dtype": INT32, "transpose_x2": 1}
    y = run(compiled(feeds, attrs, ["x2"], None, on(target)), feeds)
    assert y.tolist() == [[1073725440, -128 * 127 * k]]


def test_overflow_wraps():
    """k is not limited where it is no stored last dimension; bias wraps too."""
    k = 1 << 17
    feeds = {"x1": np.full((k, 1), -128, np.int8), "x2": np.full((k, 2), -128, np.int8)}
    feeds |= {"scale": f32(1), "bias": np.array([-1, 5], np.int32)}
    y = run(compiled(feeds, {"output_dtype": INT32, "transpose_x1": 1}), feeds)
    assert y.tolist() == [[2**31 - 1, -(2**31) + 5]]


def test_wide_output():
    """n > 65535 is legal for a weight stored (n, k)."""
    rng = np.random.default_rng(0)
    feeds = {"x1": int8(rng, 2, 3), "x2": int8(rng, 65600, 3), "scale": f32(0.01)}
    check(feeds, {"output_dtype": INT8, "transpose_x2": 1}, ["x2"])


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    combination=st.sampled_from(COMBINATIONS),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    flags=st.tuples(st.booleans(), st.booleans()),
    batches=st.sampled_from([((), ()), ((2,), ()), ((3, 1), (2,)), ((), (2,))]),
    constant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzz(combination, sizes, flags, batches, constant, seed):
    rng = np.random.default_rng(seed)
    m, k, n = sizes
    feeds, attrs = problem(rng, m, k, n, *combination)
    feeds["x1"] = int8(rng, *batches[0], *((k, m) if flags[0] else (m, k)))
    feeds["x2"] = int8(rng, *batches[1], *((n, k) if flags[1] else (k, n)))
    attrs |= {"transpose_x1": int(flags[0]), "transpose_x2": int(flags[1])}
    check(feeds, attrs, [name for name in feeds if name != "x1"] if constant else [])
