"""SpeedFusionAttention, compiled, against its specification's numbers and the NumPy reference."""

import re
import resource
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from compile_once import compile_once
from hosts import on
from numpy.testing import assert_allclose, assert_array_equal

import opferry
from opferry.driver.target import resolve
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare
from opferry.runtime.errors import InvalidInputError

OP = "SpeedFusionAttention"
F32, F16, BF16 = np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ("attention_out", "softmax_max", "softmax_sum", "softmax_out", "seed", "offset", "numels")
CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
LOWEST, LARGEST = np.float32(-3.4028235e38), np.float32(3.4028235e38)


def graph_name(output):
    return f"{output}_out" if output in ("seed", "offset") else output


def build(feeds, *, target="llvm", constant=(), symbolic=None, outputs=None, **attrs):
    """Compile one node. A compressed mask is stored in the model."""
    if "atten_mask" in feeds and feeds["atten_mask"] is CAUSAL:
        constant = (*constant, "atten_mask")
    model = node_model(OP, feeds, outputs, constant, symbolic, **attrs)
    return compile_once(model, target)


def run(module, feeds):
    """Outputs in the schema's order, None where the node has none."""
    wanted = {spec.name for spec in module.inputs}
    found = module.run({name: x for name, x in feeds.items() if name in wanted})
    return [found.get(graph_name(name)) for name in OUTPUTS]


def judge(got, feeds, attrs):
    for verdict in compare(OP, feeds, attrs, got):
        assert verdict.ok, verdict


def check(feeds, *, target="llvm", constant=(), symbolic=None, outputs=None, **attrs):
    """Compile, run, compare every output with the reference."""
    module = build(
        feeds, target=target, constant=constant, symbolic=symbolic, outputs=outputs, **attrs
    )
    got = run(module, feeds)
    judge(got, feeds, attrs)
    return got


def normal(*shape, dtype=F32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def pack(x, layout):
    """[B, N, S, D] to a layout."""
    B, N, S, D = x.shape
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return np.ascontiguousarray(x.transpose(2, 0, 1, 3)).reshape(S, B, N * D)
    x = np.ascontiguousarray(x.transpose(0, 2, 1, 3))
    return x.reshape(B, S, N * D) if layout == "BSH" else x


def qkv(B=1, N1=2, N2=2, S1=17, S2=17, D=5, *, dtype=F32, layout="BNSD"):
    shapes = {"query": (N1, S1), "key": (N2, S2), "value": (N2, S2)}
    return {
        name: pack(normal(B, n, s, D, dtype=dtype, seed=k), layout)
        for k, (name, (n, s)) in enumerate(shapes.items())
    }


def tnd(lengths_q, lengths_kv, N1=2, N2=1, D=12, *, dtype=F32):
    T1, T2 = sum(lengths_q), sum(lengths_kv)
    return {
        "query": normal(T1, N1, D, dtype=dtype, seed=1),
        "key": normal(T2, N2, D, dtype=dtype, seed=2),
        "value": normal(T2, N2, D, dtype=dtype, seed=3),
        "actual_seq_qlen": np.cumsum(lengths_q),
        "actual_seq_kvlen": np.cumsum(lengths_kv),
    }


def random_mask(*shape, dtype=bool, keep=0.6):
    dropped = np.random.default_rng([7, *shape]).random(shape) > keep
    return dropped.astype(dtype) * (np.uint8(4) if dtype is np.uint8 else True)


# -- the specification's numbers ------------------------------------------------------------------

EXAMPLE = {
    "query": np.array([[[[1, 2], [0, 1], [2, -1]], [[1, 0], [1, 1], [-1, 2]]]], F32),
    "key": np.array([[[[1, 0], [0, 2]]]], F32),
    "value": np.array([[[[10, 1], [20, 3]]]], F32),
    "pse": np.array([0.5, 0.25], F32),
    "atten_mask": CAUSAL,
}
EXAMPLE_ATTRS = {
    "head_num": 2,
    "input_layout": "BNSD",
    "scale": 0.5,
    "sparse_mode": 3,
    "pse_type": 2,
    "q_start_idx": [1],
}
EXAMPLE_MAX = [[LOWEST, -1, -0.5], [LOWEST, 0, 1.5]]
EXAMPLE_SUM = [[LARGEST, 1, 1.2231301], [LARGEST, 1, 1.0639279]]


def test_worked_example():
    out, top, total, empty, seed, offset, numels = run(build(EXAMPLE, **EXAMPLE_ATTRS), EXAMPLE)
    head0, head1 = (
        [[0, 0], [10, 1], [11.824255, 1.364851]],
        [[0, 0], [10, 1], [19.399134, 2.879827]],
    )
    assert_allclose(out[0], [head0, head1], rtol=2e-6)
    for repeat in range(8):
        assert_allclose(top[0, :, :, repeat], EXAMPLE_MAX, rtol=1e-6)
        assert_allclose(total[0, :, :, repeat], EXAMPLE_SUM, rtol=1e-6)
    assert (empty.shape, empty.dtype) == ((0,), F32)
    assert [x.dtype for x in (seed, offset, numels)] == [np.int64] * 3
    assert (seed.shape, int(seed), int(offset), int(numels)) == ((), 0, 0, 12)


def test_worked_example_with_dropout():
    attrs = {**EXAMPLE_ATTRS, "keep_prob": 0.5, "seed": 3}
    out, top, total, _, seed, _, numels = run(build(EXAMPLE, **attrs), EXAMPLE)
    assert_allclose(out[0, 0], [[0, 0], [0, 0], [16.351490, 1.635149]], rtol=2e-6)
    assert_allclose(out[0, 1], [[0, 0], [0, 0], [37.596535, 5.639480]], rtol=2e-6)
    assert_allclose(top[0, :, :, 0], EXAMPLE_MAX, rtol=1e-6)
    assert_allclose(total[0, :, :, 0], EXAMPLE_SUM, rtol=1e-6)
    assert (int(seed), int(numels)) == (3, 12)


def test_call_site_example():
    feeds = dict.fromkeys(("query", "key", "value"), np.ones((2, 4, 64), F16))
    out, top, total, *_, numels = run(build(feeds, head_num=4, input_layout="BSH"), feeds)
    assert_array_equal(out, np.ones((2, 4, 64), F16))
    assert_array_equal(top, np.full((2, 4, 4, 8), 16, F32))
    assert_array_equal(total, np.full((2, 4, 4, 8), 4, F32))
    assert int(numels) == 128


def test_record_order_of_tnd():
    """N1 = 2, lengths 2 and 1: (b, n, i) is (0,0,0) (0,0,1) (0,1,0) (0,1,1) (1,0,0) (1,1,0)."""
    feeds = {
        "query": np.arange(1, 7, dtype=F32).reshape(3, 2, 1),  # [token, head]
        "key": np.ones((3, 1, 1), F32),
        "value": np.ones((3, 1, 1), F32),
    }
    attrs = {
        "head_num": 2,
        "input_layout": "TND",
        "actual_seq_qlen": [2, 3],
        "actual_seq_kvlen": [2, 3],
    }
    top = run(build(feeds, **attrs), feeds)[1]
    assert_array_equal(top.reshape(-1, 8)[:, 0], [1, 3, 2, 4, 5, 6])
    top = run(build(feeds, **attrs, softmax_layout="TND"), feeds)[1]
    assert_array_equal(top[:, :, 7], [[1, 2], [3, 4], [5, 6]])


# -- layouts, types, sizes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("BSH", F32), ("BSH", BF16), ("SBH", F16), ("SBH", F32), ("BNSD", BF16), ("BSND", F16)],
    ids=str,
)
def test_layouts_and_types(layout, dtype):
    feeds = qkv(B=2, N1=4, N2=2, S1=65, S2=131, D=40, dtype=dtype, layout=layout)
    check(feeds, head_num=4, input_layout=layout, scale=0.2)


@pytest.mark.parametrize("D", [1, 4, 5, 16, 17, 64, 100, 512])
def test_head_sizes(D):
    feeds = qkv(B=1, N1=2, N2=1, S1=17, S2=33, D=D)
    check(feeds, head_num=2, input_layout="BNSD", scale=D**-0.5)


@pytest.fixture(scope="module")
def any_length():
    """One module for every B, S1, S2."""
    keys = {0: "B", 1: "S2"}
    symbolic = {"query": {0: "B", 1: "S1"}, "key": keys, "value": keys}
    feeds = qkv(N1=2, N2=1, D=20, layout="BSND", dtype=F16)
    return build(feeds, symbolic=symbolic, head_num=2, input_layout="BSND", scale=0.3)


@pytest.mark.parametrize("S1", [1, 3, 17, 65, 128])
@pytest.mark.parametrize("S2", [1, 3, 65, 128, 257])
def test_lengths_with_one_module(any_length, S1, S2):
    feeds = qkv(B=S1 % 3 + 1, N1=2, N2=1, S1=S1, S2=S2, D=20, dtype=F16, layout="BSND")
    judge(run(any_length, feeds), feeds, {"head_num": 2, "input_layout": "BSND", "scale": 0.3})


@pytest.mark.parametrize(
    ("mcpu", "dtype"),
    [
        ("x86-64", F16),
        ("x86-64", BF16),
        ("x86-64", F32),
        ("haswell", F16),
        ("skylake-avx512", F16),
        ("cooperlake", F16),
    ],
    ids=str,
)
def test_targets(mcpu, dtype):
    feeds = qkv(B=1, N1=2, N2=1, S1=35, S2=50, D=21, dtype=dtype)
    feeds["atten_mask"] = random_mask(35, 50)
    check(
        feeds,
        target={"kind": "llvm", "mcpu": on(mcpu)},
        head_num=2,
        input_layout="BNSD",
        scale=0.25,
    )


@pytest.mark.parametrize(("N2", "dtype"), [(1, F32), (8, BF16)], ids=str)
def test_decode(N2, dtype):
    feeds = qkv(B=2, N1=8, N2=N2, S1=1, S2=515, D=64, dtype=dtype)
    check(feeds, head_num=8, input_layout="BNSD", scale=0.125)


@pytest.mark.parametrize("mcpu", ["x86-64", "haswell", "skylake-avx512"])
@pytest.mark.parametrize(("group", "D"), [(2, 33), (3, 40), (5, 272), (7, 96), (11, 16)])
def test_decode_of_groups(group, D, mcpu):
    """Heads of a group share their keys: sums of a step that are no power of two, strips of D that
    do not fill the registers, keys that end inside a step.
    """
    feeds = qkv(B=1, N1=2 * group, N2=2, S1=2, S2=143, D=D, dtype=F32)
    feeds["atten_mask"] = random_mask(1, 1, 2, 143)
    check(
        feeds,
        target={"kind": "llvm", "mcpu": on(mcpu)},
        head_num=2 * group,
        input_layout="BNSD",
        scale=0.25,
        sparse_mode=1,
    )


@pytest.mark.parametrize("S1", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_decode_in_parts(S1, dtype):
    """One key head: tasks share out its 1027 keys; some see none that the mask keeps."""
    feeds = qkv(B=1, N1=2, N2=1, S1=S1, S2=1027, D=20, dtype=dtype)
    feeds["atten_mask"] = random_mask(1, 1, S1, 1027)
    feeds["atten_mask"][..., :700] = True
    attrs = {"head_num": 2, "input_layout": "BNSD", "sparse_mode": 1, "keep_prob": 0.7, "seed": 5}
    got = check(feeds, scale=0.25, **attrs)
    module = opferry.compile(node_model(OP, feeds, scale=0.25, **attrs), threads=1)
    for x, y in zip(got, run(module, feeds)):
        assert_array_equal(x, y)
    feeds["atten_mask"][...] = True
    check(feeds, scale=0.25, **attrs)


@pytest.mark.parametrize(("pre", "next_"), [(600, 0), (600, -100), (-1, 1)])
def test_decode_in_parts_of_a_band(pre, next_):
    feeds = qkv(B=2, N1=1, N2=1, S1=2, S2=1500, D=16) | {"atten_mask": CAUSAL}
    tokens = {"sparse_mode": 4, "pre_tokens": pre, "next_tokens": next_}
    check(feeds, head_num=1, input_layout="BNSD", scale=0.25, **tokens)


def test_decode_in_parts_of_any_batch_and_length():
    symbolic = {"query": ["B", 1, 1, 16], "key": ["B", 1, "T", 16], "value": ["B", 1, "T", 16]}
    attrs = {"head_num": 1, "input_layout": "BNSD"}
    module = build(qkv(N1=1, N2=1, S1=1, D=16), symbolic=symbolic, **attrs)
    for B, S2 in ((1, 3), (3, 900), (2, 5000)):
        feeds = qkv(B=B, N1=1, N2=1, S1=1, S2=S2, D=16)
        judge(run(module, feeds), feeds, attrs)


@pytest.mark.parametrize(
    ("dtype", "product"), [(F32, "vfmadd231ps"), (BF16, "vdpbf16ps")], ids=["float32", "bfloat16"]
)
def test_products_keep_their_sums_in_registers(dtype, product):
    """Loops of at least 16 multiply-adds of 512 bits, on the bfloat16 CPU; none touches the stack
    with a vector.
    """
    target = {"kind": "llvm", "mcpu": "znver5"}
    feeds = qkv(S1=128, S2=256, D=64, dtype=dtype)
    module = build(feeds, target=target, head_num=2, input_layout="BNSD", scale=0.125)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    blocks = re.split(r"\n(?=\.\w+:)", "\n".join(texts))
    loops = [b for b in blocks if len(re.findall(rf"\t{product}\t.*%zmm", b)) >= 16]
    assert len(loops) >= 2  # scores, values
    for loop in loops:
        jump = re.search(rf"\n\tj\w+\t{re.escape(loop.split(':')[0])}\n", loop)
        if jump:
            assert not re.search(r"%rsp.*mm|mm.*%rsp", loop[: jump.start()])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_large_scores(dtype):
    """Scores of 2e10, where half a unit in the last place is a thousand."""
    feeds = qkv(S1=40, S2=70, D=33, dtype=F32)
    for name in ("query", "key"):
        feeds[name] = np.clip(feeds[name] * F32.type(3e4), -65504, 65504)
    feeds = {name: value.astype(dtype) for name, value in feeds.items()}
    check(feeds, head_num=2, input_layout="BNSD", scale=1.0)


def test_large_values():
    """Weights above 1 would make the sum of a later tile of keys infinite."""
    feeds = qkv(N1=1, N2=1, S1=40, S2=97, D=33)
    feeds["query"][:] = 1
    feeds["key"][:], feeds["key"][:, :, 96] = 0, 0.16
    feeds["value"][:], feeds["value"][:, :, 96] = 0, 2e36
    check(feeds, head_num=1, input_layout="BNSD", scale=1.0)


def test_bfloat16_multiplies_matrix_tiles():
    """Four sums, two tiles from either side: each is loaded once for two products."""
    feeds = qkv(S1=128, S2=256, D=64, dtype=BF16)
    module = build(feeds, target="x86-amx", head_num=2, input_layout="BNSD", scale=0.125)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    blocks = re.split(r"\n(?=\.\w+:)", "\n".join(texts))
    products = [b for b in blocks if "\ttdpbf16ps\t" in b]
    assert len(products) >= 2  # scores, values
    for block in products:
        dots, loads = (block.count(f"\t{name}\t") for name in ("tdpbf16ps", "tileloadd"))
        assert dots % 4 == 0
        assert 4 * loads <= 5 * dots  # sums of the output besides, once for 128 keys
    text = "\n".join(texts)
    assert "\tldtilecfg\t" in text
    assert "\ttilerelease" in text
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize(
    ("dtype", "scores", "output"), [(F32, 24, 24), (F16, 16, 12)], ids=["float32", "float16"]
)
def test_matrix_tiles_multiply_terms(dtype, scores, output):
    """Products of terms, four tiles each: six of float32, four and three of float16."""
    feeds = qkv(S1=128, S2=256, D=32, dtype=dtype)
    attrs = {"head_num": 2, "input_layout": "BNSD"}
    blocks = re.split(r"\n(?=\.\w+:)", listing(feeds, scale=0.125, **attrs))
    dots = {b.count("\ttdpbf16ps\t") for b in blocks} - {0}
    assert dots
    assert all(n % scores == 0 or n % output == 0 for n in dots)
    assert all(any(n % step == 0 for n in dots) for step in (scores, output))
    assert "tdpbf16ps" not in listing(feeds, scale=1e20, **attrs)


def listing(feeds, **attrs):
    module = build(feeds, target="x86-amx", **attrs)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    return "\n".join(texts)


@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("layout", "S1", "S2", "D"),
    [
        ("BSH", 33, 31, 64),
        ("SBH", 17, 97, 33),
        ("BNSD", 300, 290, 80),
        ("BSND", 64, 160, 128),
        ("BNSD", 40, 70, 5),
        ("BSND", 50, 33, 48),
    ],
)
@pytest.mark.parametrize("mode", [0, 3])
def test_terms_on_matrix_tiles(layout, S1, S2, D, mode, dtype):
    """Whole and partial blocks of 32 keys, rows and elements, odd D, D below a register."""
    feeds = qkv(B=2, N1=4, N2=2, S1=S1, S2=S2, D=D, dtype=dtype, layout=layout)
    feeds["query"] *= 3  # the maximum moves
    if mode:
        feeds["atten_mask"] = CAUSAL
    check(
        feeds,
        target=on("x86-amx"),
        head_num=4,
        input_layout=layout,
        scale=D**-0.5,
        sparse_mode=mode,
    )


def test_terms_are_as_exact_as_float32():
    """A tenth of what the operator allows: eight significant bits would miss it by a thousand,
    sixteen by four.
    """
    feeds = qkv(N1=1, N2=1, S1=64, S2=96, D=64)
    attrs = {"head_num": 1, "input_layout": "BNSD", "scale": 0.5}
    module = build(feeds, target=on("x86-amx"), **attrs)
    q, k, v = (feeds[name][0, 0].astype(np.float64) for name in ("query", "key", "value"))
    scores = q @ k.T * 0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    assert_allclose(run(module, feeds)[0][0, 0], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (1, 1, 1e-34),
        (1, 1, 3e-38),
        (1e-36, 1e36, 1),
        (1e36, 1e-36, 1e30),
        (1e-20, 1e20, 1e-30),
        ([1e36, 1e-36], [1e-36, 1e36], [1e30, 1e-34]),
        ([1, 0], [0, 1], [1e12, 1e-36]),
        (1, 1, [0, 1e36]),
    ],
)
def test_elements_of_any_magnitude(query, key, value, mode):
    """By even and by odd elements of a head; each column of the output in its own magnitude."""
    feeds = qkv(N1=1, N2=1, S1=70, S2=97, D=34)
    for name, scale in zip(("query", "key", "value"), (query, key, value)):
        feeds[name] = (feeds[name] * np.resize(scale, 34)).astype(F32)
    if mode:
        feeds["atten_mask"] = CAUSAL
    attrs = {"head_num": 1, "input_layout": "BNSD", "scale": 0.25, "sparse_mode": mode}
    got = run(build(feeds, target=on("x86-amx"), **attrs), feeds)[0][0, 0]
    q, k, v = (feeds[name][0, 0].astype(np.float64) for name in ("query", "key", "value"))
    scores = q @ k.T * 0.25
    if mode:
        scores[np.arange(97) > np.arange(70)[:, None] + 27] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    atol = 2e-5 * np.abs(v).max(0)
    assert (np.abs(got - expected) <= atol + 2e-5 * np.abs(expected)).all()


def test_terms_of_the_largest_values_are_finite():
    """The nearest bfloat16 is infinite."""
    feeds = qkv(S1=40, S2=1, D=32)
    feeds["value"][:] = 3.4e38
    module = build(feeds, target=on("x86-amx"), head_num=2, input_layout="BNSD", scale=0.2)
    assert_allclose(run(module, feeds)[0], np.full((1, 2, 40, 32), 3.4e38), rtol=1e-6)


@pytest.mark.parametrize("target", ["llvm", "x86-amx"])
@pytest.mark.parametrize(
    ("layout", "S1", "S2", "D"),
    [("BSH", 33, 31, 64), ("SBH", 17, 97, 33), ("BNSD", 300, 290, 80), ("BSND", 64, 160, 128)],
)
@pytest.mark.parametrize("mode", [0, 3])
def test_bfloat16(layout, S1, S2, D, mode, target):
    """Keys in place and copied, whole and partial blocks of 32 keys, rows and elements."""
    feeds = qkv(B=2, N1=4, N2=2, S1=S1, S2=S2, D=D, dtype=BF16, layout=layout)
    feeds["query"] = (feeds["query"].astype(F32) * 3).astype(BF16)  # the maximum moves
    if mode:
        feeds["atten_mask"] = CAUSAL
    check(
        feeds,
        target=on(target),
        head_num=4,
        input_layout=layout,
        scale=D**-0.5,
        sparse_mode=mode,
    )


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_products_follow_a_rising_maximum(dtype):
    """Scores rise by more than the reference's slack, in every tile of keys and inside of one."""
    feeds = qkv(S1=40, S2=700, D=32, dtype=dtype)
    feeds["query"][:] = 1
    feeds["key"][:] = np.linspace(-0.9, 0.9, 700).astype(dtype)[:, None]
    check(feeds, head_num=2, input_layout="BNSD", scale=1.0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("row", [0, 15, 31])
def test_a_row_of_nan_is_alone(dtype, row):
    """Rows share registers and tiles, not results."""
    feeds = qkv(N1=1, N2=1, S1=40, S2=70, D=32, dtype=dtype)
    module = build(feeds, head_num=1, input_layout="BNSD", scale=0.2)
    expected = run(module, feeds)
    feeds["query"][0, 0, row] = np.nan
    got = run(module, feeds)
    others = np.arange(40) != row
    for before, after in zip(expected[:3], got[:3]):
        assert_array_equal(after[:, :, others], before[:, :, others])


def test_matrix_tiles_beside_narrow_vectors():
    """A virtual machine may show AMX and hide AVX-512: matrix tiles are left alone."""
    mattr = ["+amx-tile", "+amx-int8", "+amx-bf16"]
    target = {"kind": "llvm", "mcpu": "haswell", "mattr": mattr}
    feeds = qkv(S1=40, S2=70, D=32, dtype=BF16)
    build(feeds, target=target, head_num=2, input_layout="BNSD", scale=0.2)


@pytest.mark.parametrize("S2", [1, 31, 32, 33, 95, 160])
def test_masks_of_any_width(S2):
    feeds = qkv(S1=40, S2=S2, D=16) | {"atten_mask": random_mask(40, S2, dtype=np.uint8)}
    check(feeds, head_num=2, input_layout="BNSD", scale=0.25, sparse_mode=1)


@pytest.mark.parametrize("target", ["x86-64", "llvm"])
@pytest.mark.parametrize("S2", [32, 62])
def test_masks_that_drop_the_largest_score_at_the_end(S2, target):
    """Register tiles of 6 keys end behind the 32 or 64 keys of the mask's words."""
    feeds = qkv(S1=40, S2=S2, D=16) | {"atten_mask": random_mask(40, S2)}
    feeds["query"][:], feeds["key"][:, :, -1], feeds["atten_mask"][:, -1] = 1, 3, True
    check(feeds, target=target, head_num=2, input_layout="BNSD", scale=0.25, sparse_mode=1)


def test_scores_beyond_float16():
    feeds = qkv(D=16, dtype=F16)
    feeds = {name: (x * 150 if name != "value" else x).astype(F16) for name, x in feeds.items()}
    got = check(feeds, head_num=2, input_layout="BNSD")
    assert np.abs(got[1]).max() > 65504


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_zero_and_negative_scale(scale):
    feeds = qkv(S1=9, S2=70) | {"atten_mask": random_mask(9, 70)}
    check(feeds, head_num=2, input_layout="BNSD", scale=scale)


@pytest.mark.parametrize(("dtype", "power"), [(F32, -61), (BF16, -50)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [3e38, -3e38])
def test_scales_at_the_end_of_float32(scale, dtype, power):
    """In units of ln 2 they are beyond it. No product of bfloat16 is subnormal."""
    feeds = qkv(S1=9, S2=70, dtype=dtype)
    for name in ("query", "key"):
        feeds[name] = (feeds[name].astype(np.float32) * 2.0**power).astype(dtype)
    check(feeds, head_num=2, input_layout="BNSD", scale=scale)


# -- masks ----------------------------------------------------------------------------------------

B, N1, S1, S2 = 2, 4, 65, 70
MASKS = {
    "B N1 S1 S2": (B, N1, S1, S2),
    "B 1 S1 S2": (B, 1, S1, S2),
    "1 1 S1 S2": (1, 1, S1, S2),
    "S1 S2": (S1, S2),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_full_masks(shape):
    mode = int(shape[0] == B)
    feeds = qkv(B, N1, 2, S1, S2, 24)
    feeds["atten_mask"] = random_mask(*shape, dtype=np.uint8)
    check(feeds, head_num=N1, input_layout="BNSD", scale=0.2, sparse_mode=mode)


BANDS = {
    "mode 0 causal": (0, 70, 0),
    "mode 0 both": (0, 5, 3),
    "mode 0 above": (0, -2, 7),
    "mode 0 below": (0, 60, -40),
    "mode 4 causal": (4, 100, 0),
    "mode 4 both": (4, 9, 2),
    "mode 4 below": (4, 40, -3),
    "mode 4 far": (4, 2**63 - 1, 2**63 - 1),
}


@pytest.mark.parametrize(("mode", "pre", "next_"), BANDS.values(), ids=BANDS)
def test_bands(mode, pre, next_):
    feeds = qkv(1, 2, 2, S1, S2, 8)
    feeds["atten_mask"] = CAUSAL if mode == 4 else random_mask(S1, S2, keep=0.9)
    check(
        feeds,
        head_num=2,
        input_layout="BNSD",
        sparse_mode=mode,
        pre_tokens=pre,
        next_tokens=next_,
    )


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize(("S1", "S2"), [(3, 65), (65, 17), (131, 131), (150, 300)])
def test_causal(mode, S1, S2):
    """S1 > S2 in mode 3 has rows without a key."""
    feeds = qkv(1, 2, 1, S1, S2, 16, layout="BSH") | {"atten_mask": CAUSAL}
    got = check(feeds, head_num=2, input_layout="BSH", sparse_mode=mode)
    if mode == 3 and S1 > S2:
        assert_array_equal(got[0][:, : S1 - S2], 0)
        assert_array_equal(got[1][:, :, : S1 - S2], LOWEST)
        assert_array_equal(got[2][:, :, : S1 - S2], LARGEST)


@pytest.mark.parametrize(("mode", "tokens"), [(2, {}), (3, {}), (4, {"pre_tokens": 70})])
def test_compressed_masks_beyond_their_size(mode, tokens):
    tokens = {**tokens, "next_tokens": 3} if mode == 4 else {}
    feeds = qkv(1, 1, 1, 2100, 2117, 4) | {"atten_mask": CAUSAL}
    check(feeds, head_num=1, input_layout="BNSD", sparse_mode=mode, **tokens)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((B, N1, S1, S2), "attribute"),
        ((B, 1, S1, S2), "input"),
        ((B, 1, S1, S2), "int32 input"),
    ],
)
def test_prefix(shape, form):
    feeds = qkv(B, N1, 2, S1, S2, 8)
    feeds["atten_mask"] = random_mask(*shape, keep=0.9)
    prefix, attrs = np.array([5, 70]), {}
    if form == "attribute":
        attrs["prefix"] = prefix.tolist()
    else:
        feeds["prefix"] = prefix.astype(np.int32 if form == "int32 input" else np.int64)
    check(feeds, head_num=N1, input_layout="BNSD", sparse_mode=5, **attrs)


def test_everything_masked_gives_zeros():
    feeds = qkv(S1=33, S2=40) | {"atten_mask": np.ones((33, 40), bool)}
    out, top, total, *_ = run(build(feeds, head_num=2, input_layout="BNSD"), feeds)
    assert_array_equal(out, 0)
    assert_array_equal(top, LOWEST)
    assert_array_equal(total, LARGEST)


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_modes_without_a_mask_warn_and_mask_nothing(mode):
    feeds = qkv(S1=3, S2=4)
    with pytest.warns(UserWarning, match=rf"sparse_mode {mode} \(.*without atten_mask"):
        check(feeds, head_num=2, input_layout="BNSD", sparse_mode=mode, pre_tokens=-9)


# -- bias -----------------------------------------------------------------------------------------

PSE = {
    "B N1 S1 S2": (B, N1, S1, S2),
    "1 N1 S1 S2": (1, N1, S1, S2),
    "B N1 1 S2": (B, N1, 1, S2),
    "1 N1 1 S2": (1, N1, 1, S2),
}


@pytest.mark.parametrize("shape", PSE.values(), ids=PSE)
def test_bias(shape):
    pse_type, dtype = (0, F32) if shape[0] == B else (1, BF16)
    feeds = qkv(B, N1, 2, S1, S2, 24, dtype=dtype)
    feeds["pse"] = normal(*shape, dtype=dtype)
    check(feeds, head_num=N1, input_layout="BNSD", scale=0.2, pse_type=pse_type)


@pytest.mark.parametrize(
    ("shape", "pse_type", "form"),
    [((B, N1), 2, "attribute"), ((N1,), 3, "attribute"), ((N1,), 2, "input")],
)
def test_slopes(shape, pse_type, form):
    feeds = qkv(B, N1, 2, S1, S2, 8, dtype=F16) | {"pse": normal(*shape) / 4}
    starts, attrs = {"q_start_idx": [30], "kv_start_idx": [11]}, {}
    if form == "attribute":
        attrs = starts
    else:
        feeds |= {name: np.array(x) for name, x in starts.items()}
    check(feeds, head_num=N1, input_layout="BNSD", scale=0.3, pse_type=pse_type, **attrs)


def test_minus_infinity_in_the_bias_masks():
    feeds = qkv(S1=9, S2=40)
    dropped = random_mask(1, 2, 9, 40)
    dropped[0, 0, 4] = True
    feeds["pse"] = np.where(dropped, -np.inf, normal(1, 2, 9, 40)).astype(F32)
    got = check(feeds, head_num=2, input_layout="BNSD", pse_type=0)
    assert_array_equal(got[0][0, 0, 4], 0)


PACKED = {"mode 2": (2, {}), "mode 3": (3, {}), "mode 0": (0, {"next_tokens": 0})}


@pytest.mark.parametrize(("mode", "tokens"), PACKED.values(), ids=PACKED)
def test_packed_bias(mode, tokens):
    """Any content: the formulas decide, also where they leave the array."""
    S = 1100
    feeds = qkv(1, 2, 1, S, S, 4) | {"pse": normal(1, 2, 1024, S)}
    feeds["atten_mask"] = CAUSAL if mode else random_mask(S, S)
    check(feeds, head_num=2, input_layout="BNSD", sparse_mode=mode, scale=0.5, **tokens)


def test_bias_of_1024_rows_is_plain_at_that_length():
    feeds = qkv(1, 1, 1, 1024, 40, 4) | {"pse": normal(1, 1, 1024, 40)}
    check(feeds, head_num=1, input_layout="BNSD", scale=0.5)


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_bias_of_packed_sequences(batch):
    feeds = tnd([1030, 7], [1030, 7], D=4)
    feeds |= {"pse": normal(batch, 2, 1024, 1030), "atten_mask": CAUSAL}
    check(feeds, head_num=2, input_layout="TND", sparse_mode=2, scale=0.5)


# -- packed sequences -----------------------------------------------------------------------------

LENGTHS = {
    "one": ([65], [70]),
    "ragged": ([1, 65, 3, 130], [70, 2, 3, 300]),
    "empty in the middle": ([2, 0, 3], [2, 0, 3]),
    "leading zero": ([0, 5], [0, 6]),
    "keys without queries": ([4, 0], [3, 20]),
    "only the last": ([0, 0, 17], [0, 0, 17]),
}


@pytest.mark.parametrize("case", ["ragged", "empty in the middle"])
def test_packed_sequences(case):
    feeds = tnd(*LENGTHS[case], dtype=F16)
    check(feeds, head_num=2, input_layout="TND", scale=0.3)


@pytest.mark.parametrize("mode", [2, 3])
def test_causal_packed_sequences(mode):
    feeds = tnd([65, 3, 10], [65, 5, 70] if mode == 3 else [20, 5, 70]) | {"atten_mask": CAUSAL}
    check(feeds, head_num=2, input_layout="TND", sparse_mode=mode)


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_packed_sequences_with_everything(softmax_layout):
    feeds = tnd([35, 0, 6], [35, 0, 6], N1=4, N2=2) | {"atten_mask": CAUSAL}
    feeds |= {"pse": normal(3, 4) / 4, "seed": np.array([5]), "offset": np.array(-3)}
    check(
        feeds,
        head_num=4,
        input_layout="TND",
        sparse_mode=3,
        pse_type=3,
        keep_prob=0.75,
        softmax_layout=softmax_layout,
    )


def test_one_module_for_all_packings():
    symbolic = {"query": {0: "T1"}, "key": {0: "T2"}, "value": {0: "T2"}}
    symbolic |= {"actual_seq_qlen": {0: "B"}, "actual_seq_kvlen": {0: "B"}}
    attrs = {"head_num": 2, "input_layout": "TND", "scale": 0.3}
    module = build(tnd([3], [3]), symbolic=symbolic, **attrs)
    for queries, keys in LENGTHS.values():
        feeds = tnd(queries, keys)
        judge(run(module, feeds), feeds, attrs)


def test_lists_as_attributes():
    feeds = tnd([2, 3], [4, 5])
    lists = {name: feeds.pop(name).tolist() for name in ("actual_seq_qlen", "actual_seq_kvlen")}
    check(feeds, head_num=2, input_layout="TND", **lists)


# -- dropout, outputs, symbols --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "form"),
    [(0, "attribute"), (2**40 + 3, "attribute"), (-1, "attribute"), (2**40 + 3, "input")],
)
def test_dropout(seed, form):
    feeds, attrs = qkv(2, 2, 1, 33, 67, 8), {"keep_prob": 0.7}
    if form == "attribute":
        attrs |= {"seed": seed, "offset": -seed}
    else:
        feeds |= {"seed": np.array(seed), "offset": np.array([-seed])}
    check(feeds, head_num=2, input_layout="BNSD", scale=0.3, **attrs)


def test_integers_of_both_widths():
    """Each integer input is int64 or int32, whatever the others are."""
    feeds = tnd([2, 0, 5], [3, 0, 4])
    feeds["actual_seq_kvlen"] = feeds["actual_seq_kvlen"].astype(np.int32)
    feeds |= {"seed": np.array([-5], np.int32), "offset": np.array(2**40)}
    check(feeds, head_num=2, input_layout="TND", keep_prob=0.5)


@pytest.mark.parametrize("keys", [1, 5, 131])
def test_dropout_of_bfloat16_with_an_odd_number_of_keys(keys):
    """Keys go in pairs there: the one behind the last must not leave a decision, nor a NaN."""
    feeds = qkv(S1=33, S2=keys, D=20, dtype=BF16)
    check(feeds, head_num=2, input_layout="BNSD", keep_prob=0.7, seed=5)


@pytest.mark.parametrize("keep_prob", [1e-11, 1e-40])
def test_dropout_of_everything(keep_prob):
    feeds = qkv()
    got = check(feeds, head_num=2, input_layout="BNSD", keep_prob=keep_prob)
    assert_array_equal(got[0], 0)


@pytest.mark.parametrize(
    "outputs",
    [[name] for name in OUTPUTS] + [["softmax_max", "numels"], ["attention_out", "softmax_sum"]],
    ids=" ".join,
)
def test_outputs_left_out(outputs):
    feeds = qkv(dtype=F16) | {"seed": np.array([3], np.int32)}
    got = check(feeds, outputs=outputs, head_num=2, input_layout="BNSD", keep_prob=0.5)
    assert {n for n, x in zip(OUTPUTS, got) if x is not None} == set(outputs)


def test_symbolic_masks_bias_and_prefix():
    symbolic = {
        "query": [None, None, "S1", None],
        "key": [None, None, "S2", None],
        "value": [None, None, "S2", None],
        "pse": [None, None, "S1", "S2"],
        "atten_mask": [None, None, "S1", "S2"],
    }
    attrs = {"head_num": 2, "input_layout": "BNSD", "sparse_mode": 5}

    def feeds(S1, S2, prefix):
        mask, bias = random_mask(1, 1, S1, S2, keep=0.9), normal(1, 2, S1, S2)
        extra = {"pse": bias, "atten_mask": mask, "prefix": np.array([prefix])}
        return qkv(1, 2, 2, S1, S2, 8) | extra

    module = build(feeds(3, 4, 2), symbolic=symbolic, **attrs)
    for sizes in ((3, 4, 2), (65, 17, 0), (40, 131, 131)):
        judge(run(module, feeds(*sizes)), feeds(*sizes), attrs)


# -- structure ------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import numpy as np, opferry
from opferry.frontend.builders import node_model
S = int(sys.argv[1])
x = np.ones((1, 1, S, 8), np.float32)
attrs = dict(head_num=1, input_layout="BNSD", outputs=["attention_out"])
symbolic = dict.fromkeys(("query", "key", "value"), {2: "S"})
feeds = dict.fromkeys(("query", "key", "value"), x)
module = opferry.compile(node_model("SpeedFusionAttention", feeds, symbolic=symbolic, **attrs))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
module.run(feeds)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_the_length():
    """8192 x 8192 float32 scores of a head would be 256 MiB; inputs and output are 1 MiB."""
    assert resource.RUSAGE_SELF == 0
    found = subprocess.run(
        [sys.executable, "-c", PEAK, "8192"], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 32 * 1024  # KiB


# -- fuzz -----------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    B, N2, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    S1, S2 = draw(st.integers(1, 90)), draw(st.integers(1, 160))
    N1, D = N2 * G, draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([F32, F16, BF16]))
    layout = draw(st.sampled_from(["BSH", "SBH", "BNSD", "BSND"]))
    mode = draw(st.sampled_from([0, 1, 2, 3, 5]))
    feeds = qkv(B, N1, N2, S1, S2, D, dtype=dtype, layout=layout)
    attrs = {"head_num": N1, "input_layout": layout, "sparse_mode": mode, "scale": D**-0.5}
    if mode in (2, 3):
        feeds["atten_mask"] = CAUSAL
    elif mode == 5:
        feeds["atten_mask"] = random_mask(B, draw(st.sampled_from([1, N1])), S1, S2)
        low = max(0, S2 - S1)
        attrs["prefix"] = draw(st.lists(st.integers(low, S2), min_size=B, max_size=B))
    elif mode == 1 or draw(st.booleans()):
        feeds["atten_mask"] = random_mask(S1, S2, keep=draw(st.sampled_from([0.1, 0.9])))
        attrs |= {"pre_tokens": draw(st.integers(0, 99)), "next_tokens": draw(st.integers(0, 99))}
    attrs["pse_type"] = draw(st.integers(0, 3))
    if attrs["pse_type"] in (2, 3):
        feeds["pse"] = np.abs(normal(B, N1)) / 8
    elif draw(st.booleans()):
        rows = draw(st.sampled_from([1, S1]))
        feeds["pse"] = normal(draw(st.sampled_from([1, B])), N1, rows, S2, dtype=dtype)
    attrs["keep_prob"] = draw(st.sampled_from([1.0, 0.8]))
    return feeds, attrs


@hypothesis.given(problems())
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
def test_fuzz(problem):
    feeds, attrs = problem
    check(feeds, **attrs)


@pytest.mark.slow
@hypothesis.given(problems())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_fuzz_longer(problem):
    feeds, attrs = problem
    check(feeds, **attrs)


def test_layers_share_a_kernel():
    """Messages of a kernel name the operator: the node's name would make each another kernel."""
    model = node_model(
        "SpeedFusionAttention",
        qkv(S1=40, S2=40, D=32),
        outputs=("attention_out",),
        head_num=2,
        input_layout="BNSD",
        name="first",
    )
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.input[0], second.output[0] = "second", "attention_out", "deeper"
    model.graph.node.append(second)
    model.graph.output[0].name = "deeper"
    for target in ("x86-amx", "x86-avx2"):
        functions = import_model(prepare(load(model), None), resolve(target)).module.functions
        assert sum("attention" in var.name_hint for var in functions) == 1


def test_prefix_computed_in_the_graph_is_asserted_by_the_kernel():
    feeds = qkv(B=2, S1=7, S2=9) | {
        "atten_mask": np.zeros((2, 1, 7, 9), bool),
        "prefix": np.array([2, 9]),
    }
    model = node_model(
        "SpeedFusionAttention",
        feeds,
        outputs=("attention_out",),
        head_num=2,
        input_layout="BNSD",
        sparse_mode=5,
    )
    node = model.graph.node[0]
    node.input[list(node.input).index("prefix")] = "doubled"
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["prefix", "prefix"], ["doubled"]))
    module = opferry.compile(model)
    module.run(feeds | {"prefix": np.array([1, 4])})
    for bad in ([0, 4], [1, 5], [1, 2**40]):
        with pytest.raises(InvalidInputError, match=r'"prefix".*allowed max\(0, S2 - S1\) to S2'):
            module.run(feeds | {"prefix": np.array(bad)})
