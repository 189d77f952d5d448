"""SpeedFusionAttention, compiled, against its specification's numbers and the NumPy reference:
layouts, types, sizes, dropout, outputs.
"""

import resource
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hosts import on
from numpy.testing import assert_allclose, assert_array_equal
from speed_fusion_cases import (
    BF16,
    CAUSAL,
    F16,
    F32,
    LARGEST,
    LOWEST,
    OUTPUTS,
    build,
    check,
    judge,
    normal,
    qkv,
    random_mask,
    run,
    tnd,
)

from opferry.driver.target import resolve
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare

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
