"""NPUNsaCompressAttention compiled for CPUs: float64 reference, hand-worked numbers, refusals."""

import functools

import ml_dtypes
import numpy as np
import onnx
import pytest
from compile_once import compile_once
from hosts import on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import opferry
from opferry.frontend.builders import node_model
from opferry.reference.compare import compare
from opferry.runtime.errors import InvalidInputError, InvalidNodeError, OpferryError
from opferry.schedules.llvm import nsa_stream

OP = "NPUNsaCompressAttention"
OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")
LENGTHS = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
FLT_MAX = np.float32(3.4028234663852886e38)
F16, BF16, F32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def ceil_div(a, b):
    return -(-a // b)


def prefix(counts):
    return np.cumsum(counts).astype(np.int64)


def make(
    q_counts=(5, 3),
    k_counts=(9, 6),
    n1=4,
    n2=2,
    d=8,
    dv=7,
    dtype=F32,
    sizes=(32, 16, 64),
    k=3,
    atten=None,
    topk=None,
    spare=(0, 0),
    slack=(1, 2),
    seed=0,
    **attrs,
):
    """Feeds and attributes of a node.

    sizes are (l, d, l'); atten and topk are None or a mask dtype; spare counts NaN rows after the
    last sequence of query and of key; slack is what the masks have beyond what is needed.
    """
    rng = np.random.default_rng(seed)
    ratio = sizes[2] // sizes[1]
    blocks = [ceil_div(c, ratio) for c in k_counts]

    def packed(rows, unused, heads, size):
        x = np.full((rows + unused, heads, size), np.nan)
        x[:rows] = rng.standard_normal((rows, heads, size))
        return x.astype(dtype)

    def mask(width, dtype, density):
        shape = (max(1, max(q_counts) + slack[0]), max(1, width + slack[1]))
        hit = rng.random(shape) < density
        return hit if dtype == "bool" else (hit * rng.integers(1, 256, shape)).astype(np.uint8)

    feeds = {
        "query": packed(sum(q_counts), spare[0], n1, d),
        "key": packed(sum(k_counts), spare[1], n2, d),
        "value": packed(sum(k_counts), spare[1], n2, dv),
    }
    if atten:
        feeds["atten_mask"] = mask(max(k_counts), atten, 0.5)
    if topk:
        feeds["topk_mask"] = mask(max(blocks), topk, 0.2)
    feeds |= dict(zip(LENGTHS, map(prefix, (q_counts, k_counts, blocks))))
    required = {
        "head_num": n1,
        "compress_block_size": sizes[0],
        "compress_stride": sizes[1],
        "select_block_size": sizes[2],
        "select_block_count": k,
        "scale_value": float(d) ** -0.5,
    }
    return feeds, required | attrs


def causal(rows, keys, size, stride):
    """The mask of a prefill from token 0: key i is visible from its last token on."""
    t, i = np.arange(rows)[:, None], np.arange(keys)[None]
    return ~(i * stride + size - 1 <= t)


def run(feeds, attrs, target="llvm", **model):
    """The node's outputs by schema name, through a compiled model."""
    module = compile_once(node_model(OP, feeds, **model, **attrs), target)
    given = {spec.name: feeds[spec.name] for spec in module.inputs}
    return module.run(given)


def assert_matches(feeds, attrs, outputs):
    lists = {name: attrs[name] for name in LENGTHS if name in attrs}
    inputs = feeds | {name: np.asarray(values, np.int64) for name, values in lists.items()}
    rest = {name: value for name, value in attrs.items() if name not in lists}
    verdicts = compare(OP, inputs, rest, [outputs.get(name) for name in OUTPUTS])
    assert len(verdicts) == len(outputs)
    assert all(v.ok for v in verdicts), verdicts


# -- numbers of the specification ------------------------------------------------------------------

ALL, NONE = [1] * 6, [0] * 6
EXAMPLE = {
    "query": np.array([[[1, 0], [0, 1]], [[2, 0], [0, 2]], [[1, 1], [-1, 1]]], np.float32),
    "key": np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [0, 2]], np.float32)[:, None],
    "value": np.arange(1, 7, dtype=np.float32).reshape(6, 1, 1),
    "atten_mask": np.array([ALL, [0, 0, 0, 1, 1, 1], NONE], bool),
    "topk_mask": np.array([[0, 0], [0, 0], [0, 1]], bool),
    "actual_seq_qlen": np.array([3], np.int64),
    "actual_cmp_seq_kvlen": np.array([6], np.int64),
    "actual_sel_seq_kvlen": np.array([2], np.int64),
}
EXAMPLE_ATTRS = {
    "scale_value": 0.5,
    "head_num": 2,
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "select_block_count": 3,
}


def test_worked_example():
    got = run(EXAMPLE, EXAMPLE_ATTRS)
    lanes = got["softmax_max"].reshape(6, 8)
    np.testing.assert_array_equal(lanes, np.repeat(lanes[:, :1], 8, axis=1))
    np.testing.assert_allclose(lanes[:, 0], [-FLT_MAX, 1, 1, -FLT_MAX, 1, 1], rtol=1e-5)
    sums = got["softmax_sum"].reshape(6, 8)[:, 0]
    np.testing.assert_allclose(sums, [6, 1.735759, 4.580941, 6, 1.735759, 2.700755], rtol=1e-5)
    out = got["attention_out"][..., 0]
    np.testing.assert_allclose(out, [[3.5, 3.5], [2.0, 2.364175], [4.016759, 3.992190]], rtol=3e-5)
    np.testing.assert_array_equal(
        got["topk_indices_out"][:, 0], [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    )


def test_worked_example_by_token():
    got = run(EXAMPLE, EXAMPLE_ATTRS | {"softmax_out_layout": "same_as_input"})
    np.testing.assert_allclose(
        got["softmax_max"][..., 0], [[-FLT_MAX, -FLT_MAX], [1, 1], [1, 1]], rtol=1e-5
    )
    np.testing.assert_allclose(
        got["softmax_sum"][..., 0], [[6, 6], [1.735759, 1.735759], [4.580941, 2.700755]], rtol=1e-5
    )


def test_worked_example_centred_window_and_zero_rows():
    attrs = EXAMPLE_ATTRS | {"score_shift": 1, "masked_rows": "zero"}
    got = run({k: v for k, v in EXAMPLE.items() if k != "topk_mask"}, attrs)
    np.testing.assert_array_equal(got["attention_out"][0], 0)
    np.testing.assert_array_equal(got["softmax_sum"].reshape(2, 3, 8)[:, 0], 0)
    np.testing.assert_array_equal(got["softmax_max"].reshape(2, 3, 8)[:, 0], -FLT_MAX)
    # Scores (0, 0), (4, 0), (1.931554, 2.068446).
    np.testing.assert_array_equal(
        got["topk_indices_out"][:, 0], [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    )


def test_the_last_block_scores_zero_when_block_window_and_stride_agree():
    """score[j] = P[j + 1]: with uniform P all tie but the last, whose window is empty."""
    feeds, attrs = make((1,), (5,), sizes=(16, 16, 16), k=5, scale_value=0.0)
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[0, 1, 2, 3, 4]] * 2)
    feeds["topk_mask"] = np.array([[0, 0, 0, 1, 1], [0] * 5], bool)
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[3, 4, 0, 1, 2]] * 2)


def test_more_forced_blocks_than_indices():
    feeds, attrs = make((1,), (40,), k=3)
    feeds["topk_mask"] = np.array([[0, 1, 0, 1, 1, 0, 0, 1, 1, 1]], np.uint8) * 200
    np.testing.assert_array_equal(run(feeds, attrs)["topk_indices_out"][0], [[1, 3, 4]] * 2)


# -- against the reference -------------------------------------------------------------------------

CASES = {
    "one row, one key": make((1,), (1,)),
    "short heads": make((7,), (11,), d=5, dv=3, atten="bool", topk="uint8"),
    "float16": make((19, 4), (70, 33), 8, 2, 24, 20, F16, atten="bool", topk="bool", k=7),
    "bfloat16": make((19, 4), (70, 33), 8, 2, 24, 20, BF16, atten="uint8", topk="uint8", k=7),
    "bfloat16, odd heads": make(
        (19, 4), (70, 33), 8, 2, 23, 19, BF16, spare=(2, 1), atten="bool", k=7
    ),
    "bfloat16, several key chunks": make((9, 3), (700, 300), 2, 1, 8, 8, BF16, atten="bool", k=16),
    "float32": make((19, 4), (70, 33), 8, 2, 24, 20, F32, atten="uint8", topk="bool", k=7),
    "G 1": make((67, 1), (35, 18), 3, 3, atten="bool"),
    "G 2": make((37, 2), (35, 18), 6, 3, 16, 16, atten="bool"),
    "G 16": make((9, 2), (35, 18), 16, 1, 17, 16, atten="bool", topk="bool"),
    "G 32": make((5, 2), (35, 18), 64, 2, atten="bool", topk="bool"),
    "G 64": make((3, 2), (35, 18), 64, 1, 33, 32, atten="bool", topk="bool"),
    "Dv of one": make((5,), (20,), d=48, dv=1),
    "several channel panels": make((5, 6), (20, 40), d=96, dv=80, atten="bool"),
    "l = d = l'": make((11,), (37,), sizes=(16, 16, 16), k=9, topk="bool"),
    "l % d != 0": make((11,), (37,), sizes=(48, 32, 96), k=5),
    "l = d": make((11,), (37,), sizes=(32, 32, 64), k=5),
    "l = l'": make((11,), (37,), sizes=(64, 16, 64), k=5),
    "big heads": make((9,), (40,), 2, 1, 600, 520, atten="bool"),
    "window longer than the sequence": make((11,), (37,), sizes=(256, 16, 1024), k=2),
    "wide blocks": make((4,), (90,), sizes=(128, 16, 512), k=2, score_shift=7),
    "shift 1": make((11,), (37,), score_shift=1, atten="bool"),
    "shift r": make((11,), (37,), score_shift=4, atten="bool"),
    "shift r of an odd window": make((11,), (37,), sizes=(48, 16, 48), score_shift=3),
    "k beyond the blocks": make((6, 5), (21, 3), k=40, topk="bool"),
    "k of many rounds": make((6, 5), (121, 33), k=20, topk="bool"),
    "empty sequences": make((0, 3, 0, 4, 2, 0), (5, 7, 0, 0, 19, 3), atten="bool", topk="bool"),
    "many sequences": make([1, 2, 0, 3] * 9, [4, 0, 17, 33] * 9, atten="bool", topk="bool"),
    "no keys at all": make((3, 2), (0, 0), spare=(0, 1)),
    "unused rows": make((6, 5), (21, 3), spare=(4, 3), atten="bool"),
    "unused rows by token": make(
        (6, 5), (21, 3), spare=(70, 3), softmax_out_layout="same_as_input"
    ),
    "by token": make((6, 5), (21, 3), atten="bool", softmax_out_layout="same_as_input"),
    "large masks": make((6, 5), (21, 3), slack=(9, 50), atten="uint8", topk="uint8"),
    "scale 0": make((6,), (37,), scale_value=0.0, atten="bool"),
    "scale negative": make((6,), (37,), scale_value=-1.5, atten="bool"),
    "large scores": make((9,), (137,), d=64, dv=64, scale_value=1.2, k=8),
    "sparse mode": make((6,), (37,), sparse_mode=1),
    "several key chunks": make((70, 3), (700, 300), 2, 1, 8, 8, atten="bool", k=16),
}


SLOW = {"G 2", "G 32", "Dv of one", "l = d", "wide blocks", "shift 1", "shift r of an odd window"}
SLOW |= {"by token", "scale negative", "sparse mode", "large masks", "no keys at all"}
SLOW |= {"G 1", "G 16", "l = d = l'", "l % d != 0"}  # among VARIANTS, with more besides
SLOW |= {"l = l'", "unused rows"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_matches_the_reference(name):
    feeds, attrs = CASES[name]
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("case", ["short heads", "float16", "bfloat16", "G 64", "many sequences"])
@pytest.mark.parametrize("rows", [{}, {"masked_rows": "zero"}], ids=["mean", "zero"])
def test_rows_without_a_visible_key(case, rows):
    feeds, attrs = CASES[case]
    mask = feeds["atten_mask"].copy()
    mask[::3] = 1
    feeds, attrs = feeds | {"atten_mask": mask}, attrs | rows
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize(("dtype", "masked_rows"), [(F16, "zero"), (BF16, "mean"), (F32, "mean")])
def test_causal_prefill(dtype, masked_rows):
    """Whole tiles are masked: rows 0..30 see nothing, late keys are seen by the last rows only."""
    rows = 1500
    keys = (rows - 32) // 16 + 1
    feeds, attrs = make((rows,), (keys,), 4, 2, 16, 16, dtype, k=16, masked_rows=masked_rows)
    feeds["atten_mask"] = causal(rows, keys, 32, 16)
    t = np.arange(rows)[:, None] // 64
    j = np.arange(ceil_div(keys, 4))[None]
    feeds["topk_mask"] = (j == 0) | ((j >= t - 1) & (j <= t))
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_keys_hidden_from_all_rows(dtype):
    """Before the first, between and behind the visible keys, of whole tiles and of parts."""
    feeds, attrs = make((9, 4), (301, 301), 4, 2, 16, 16, dtype, k=16)
    mask = np.ones((9, 301), bool)
    mask[:, 30:50] = mask[:, 120:121] = mask[1:, 200:231] = False
    assert_matches(feeds | {"atten_mask": mask}, attrs, run(feeds | {"atten_mask": mask}, attrs))


@pytest.mark.parametrize(
    ("mcpu", "dtype"),
    [("cooperlake", BF16), ("skylake-avx512", F32), ("haswell", BF16), ("haswell", F16)]
    + [("x86-64", dtype) for dtype in (F16, BF16, F32)],
)
@pytest.mark.parametrize(("D", "Dv"), [(19, 17), (64, 64)])
def test_instruction_sets(mcpu, dtype, D, Dv):
    feeds, attrs = make((21, 2), (75, 19), 8, 2, D, Dv, dtype, atten="bool", topk="bool", k=6)
    assert_matches(feeds, attrs, run(feeds, attrs, {"kind": "llvm", "mcpu": on(mcpu)}))


TILED = {
    "odd sizes": make((19, 4), (70, 33), 8, 2, 23, 19, BF16, spare=(2, 1), atten="bool", k=7),
    "whole tiles": make((40,), (128,), 16, 1, 64, 32, BF16, atten="bool", topk="bool", k=16),
    "one row, one key": make((1,), (1,), dtype=BF16),
    "no mask": make((21, 2), (75, 0), 4, 2, 33, 33, BF16, topk="uint8", spare=(2, 3)),
    "fewer keys than a group": make((67, 1), (31, 18), 3, 3, 96, 80, BF16, atten="bool"),
    "G 64": make((3, 2), (65, 18), 128, 2, 33, 32, BF16, atten="bool", topk="bool"),
    "scale negative": make((6,), (37,), dtype=BF16, scale_value=-1.5, atten="bool"),
    "scale 0": make((6,), (37,), dtype=BF16, scale_value=0.0, atten="bool"),
    "window longer than the sequence": make((11,), (37,), dtype=BF16, sizes=(256, 16, 1024), k=2),
    "shift r": make((11,), (37,), dtype=BF16, score_shift=4, atten="bool"),
    "empty sequences": make(
        (0, 3, 0, 4, 2, 0), (5, 7, 0, 0, 19, 3), dtype=BF16, atten="bool", topk="bool"
    ),
    "many sequences": make([1, 2, 0, 3] * 9, [4, 0, 17, 33] * 9, dtype=BF16, atten="bool"),
}


@pytest.mark.parametrize("name", TILED)
def test_bfloat16_on_matrix_tiles(name):
    feeds, attrs = TILED[name]
    assert_matches(feeds, attrs, run(feeds, attrs, on("x86-amx")))


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_hidden_groups_on_matrix_tiles(masked_rows):
    """Groups of keys that no row sees stand before, between and behind the others; of the second
    task one row sees nothing.
    """
    feeds, attrs = make((40,), (301,), 4, 2, 16, 16, BF16, k=16, masked_rows=masked_rows)
    mask = np.ones((40, 301), bool)
    mask[:, 40:50] = mask[:, 120:121] = mask[1:, 200:231] = False
    mask[35] = True
    feeds["atten_mask"] = mask
    assert_matches(feeds, attrs, run(feeds, attrs, on("x86-amx")))


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("x86-amx", BF16),
        ("cooperlake", BF16),
        ("x86-avx512vnni", F16),
        ("x86-avx512vnni", F32),
    ],
)
def test_large_outputs_are_streamed(target, dtype, monkeypatch):
    monkeypatch.setattr(nsa_stream, "STREAM_BYTES", 0)
    feeds, attrs = make((19, 4), (70, 33), 16, 1, 64, 64, dtype, spare=(2, 1), atten="bool", k=7)
    if on(target) == "cooperlake":
        target = {"kind": "llvm", "mcpu": target}
    module = opferry.compile(node_model(OP, feeds, **attrs), target)
    text = assembly(module)
    assert "\tvmovnt" in text
    assert "\tsfence" in text
    given = {spec.name: feeds[spec.name] for spec in module.inputs}
    assert_matches(feeds, attrs, module.run(given))


def listing(feeds, attrs, target):
    return assembly(opferry.compile(node_model(OP, feeds, **attrs), target))


def assembly(module):
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    return "\n".join(texts)


def test_bfloat16_multiplies_matrix_tiles():
    """Four sums, two tiles from either side, in both products; LLVM may peel a load off a loop."""
    feeds, attrs = make((40,), (128,), 16, 1, 64, 64, BF16, atten="bool")
    text = listing(feeds, attrs, "x86-amx")
    products, loads = (text.count(f"\t{name}\t") for name in ("tdpbf16ps", "tileloadd"))
    assert products >= 8
    assert products <= loads <= products * 1.05
    assert "\tldtilecfg\t" in text
    assert "\ttilerelease" in text
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize(
    ("target", "change"),
    [
        ("x86-avx512vnni", {}),
        ("x86-amx", {"scale_value": 0.0}),
        ({"kind": "llvm", "mcpu": "haswell", "mattr": ["+amx-tile", "+amx-int8", "+amx-bf16"]}, {}),
    ],
    ids=["no tiles", "scale 0", "narrow vectors"],
)
def test_matrix_tiles_are_left_alone(target, change):
    feeds, attrs = make((5,), (9,), dtype=BF16)
    assert "tdpbf16ps" not in listing(feeds, attrs | change, target)


@pytest.mark.parametrize("row", [0, 3, 15, 39])
def test_a_row_of_nan_is_alone(row):
    """Query rows share registers and tiles, not results."""
    feeds, attrs = make((40,), (70,), 4, 1, 32, 32, BF16, atten="bool", k=4)
    module = compile_once(node_model(OP, feeds, **attrs), on("x86-amx"))
    expected = module.run(feeds)
    query = feeds["query"].copy()
    query[row, 1] = np.nan
    got = module.run(feeds | {"query": query})
    others = np.arange(40) != row
    for name in ("attention_out", "topk_indices_out"):
        np.testing.assert_array_equal(got[name][others], expected[name][others])
    for name in ("softmax_max", "softmax_sum"):  # [N1, T, 8] in memory
        after, before = (x[name].reshape(4, 40, 8)[:, others] for x in (got, expected))
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("scale", [3e38, -3e38])
def test_scales_at_the_end_of_float32(scale, dtype):
    """In units of ln 2 they are beyond it."""
    feeds, attrs = make((6,), (37,), dtype=dtype, scale_value=scale)
    feeds["query"] = (feeds["query"].astype(np.float32) * 2.0**-60).astype(feeds["query"].dtype)
    feeds["key"] = (feeds["key"].astype(np.float32) * 2.0**-60).astype(feeds["key"].dtype)
    assert_matches(feeds, attrs, run(feeds, attrs))


@pytest.mark.parametrize("target", ["x86-amx", "x86-avx512vnni"])
def test_a_row_of_nan_is_alone_beside_a_row_without_keys(target):
    feeds, attrs = make((16,), (64,), 4, 1, 32, 32, BF16, atten="bool", k=4)
    feeds["atten_mask"] = np.arange(16)[:, None] == np.full((1, 64), 3)
    module = compile_once(node_model(OP, feeds, **attrs), on(target))
    expected = module.run(feeds)
    query = feeds["query"].copy()
    query[5] = np.nan
    got = module.run(feeds | {"query": query})
    others = np.arange(16) != 5
    np.testing.assert_array_equal(got["attention_out"][others], expected["attention_out"][others])


@pytest.mark.parametrize("wanted", [[name] for name in OUTPUTS] + [list(OUTPUTS[1::2])], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_outputs_that_are_not_asked_for(wanted, dtype):
    feeds, attrs = make((21, 2), (75, 0), dtype=dtype, atten="bool", topk="bool", spare=(2, 0))
    got = run(feeds, attrs, outputs=wanted)
    assert sorted(got) == sorted(wanted)
    assert_matches(feeds, attrs, got)


@pytest.mark.parametrize("form", ["attribute", "initializer", "input", "mixed"])
def test_forms_of_the_length_lists(form):
    feeds, attrs = make((5, 0, 3), (9, 2, 6), atten="bool")
    as_attribute = {"attribute": LENGTHS, "mixed": LENGTHS[1:2]}.get(form, ())
    stored = {"initializer": LENGTHS, "mixed": LENGTHS[2:]}.get(form, ())
    attrs |= {name: feeds.pop(name).tolist() for name in as_attribute}
    got = run(feeds, attrs, initializers=stored)
    assert_matches(feeds, attrs, got)


def test_non_finite_rows_outside_of_the_sequences_do_not_leak():
    """Spare rows, and the keys of a sequence without queries."""
    feeds, attrs = make((5, 0, 3), (9, 20, 6), spare=(5, 7), atten="bool", topk="bool")
    for name in ("key", "value"):
        feeds[name][9:29] = np.inf
    got = run(feeds, attrs)
    assert_matches(feeds, attrs, got)
    assert not any(np.isnan(got[name]).any() for name in OUTPUTS)


def test_a_masked_key_may_be_nan():
    feeds, attrs = make((5,), (9,), atten="bool")
    feeds["atten_mask"][:, 4] = True
    clean = run(feeds, attrs)
    feeds["key"][4] = np.nan
    assert {k: v.tobytes() for k, v in run(feeds, attrs).items()} == {
        k: v.tobytes() for k, v in clean.items()
    }


def test_results_are_reproducible():
    feeds, attrs = make((200, 33), (90, 41), 8, 2, 16, 16, atten="bool")
    module = opferry.compile(node_model(OP, feeds, **attrs))
    first = module.run(feeds)
    for _ in range(5):
        again = module.run(feeds)
        assert all(again[name].tobytes() == first[name].tobytes() for name in first)


# -- one module, many lengths ----------------------------------------------------------------------

SYMBOLIC = {
    "query": {0: "T"},
    "key": {0: "T2"},
    "value": {0: "T2"},
    "atten_mask": ["R", "C"],
    "topk_mask": ["Rt", "Ct"],
    **{name: {0: "B"} for name in LENGTHS},
}


@functools.cache
def symbolic_module(n1, n2, sizes, dtype, masked_rows, shift, layout):
    feeds, attrs = make(
        n1=n1,
        n2=n2,
        sizes=sizes,
        dtype=dtype,
        atten="bool",
        topk="uint8",
        masked_rows=masked_rows,
        score_shift=shift,
        softmax_out_layout=layout,
    )
    return opferry.compile(node_model(OP, feeds, symbolic=SYMBOLIC, **attrs))


VARIANTS = [
    (4, 2, (32, 16, 64), F32, "mean", 0, ""),
    (16, 1, (48, 32, 96), BF16, "zero", 1, "same_as_input"),
    (3, 3, (16, 16, 16), F16, "mean", 1, ""),
    (64, 1, (32, 16, 128), F32, "zero", 8, ""),
]
COUNTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 80)), min_size=1, max_size=6).filter(
    lambda pairs: sum(q for q, _ in pairs) and sum(k for _, k in pairs)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    variant=st.sampled_from(VARIANTS),
    counts=COUNTS,
    spare=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    slack=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 999),
)
def test_any_lengths_through_one_module(variant, counts, spare, slack, seed):
    n1, n2, sizes, dtype, masked_rows, shift, layout = variant
    feeds, attrs = make(
        *zip(*counts),
        n1=n1,
        n2=n2,
        sizes=sizes,
        dtype=dtype,
        atten="bool",
        topk="uint8",
        spare=spare,
        slack=slack,
        seed=seed,
        masked_rows=masked_rows,
        score_shift=shift,
        softmax_out_layout=layout,
    )
    assert_matches(feeds, attrs, symbolic_module(*variant).run(feeds))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_attributes(data):
    check_any_attributes(data)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_attributes_at_length(data):
    check_any_attributes(data)


def check_any_attributes(data):
    draw = data.draw
    stride = 16 * draw(st.integers(1, 3))
    size = 16 * draw(st.integers(stride // 16, 8))
    block = stride * draw(st.integers(ceil_div(size, stride), ceil_div(size, stride) + 3))
    n2, group, d = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 4, 8])),
        draw(st.integers(1, 40)),
    )
    feeds, attrs = make(
        (draw(st.integers(1, 30)), draw(st.integers(0, 9))),
        (draw(st.integers(1, 90)), draw(st.integers(0, 9))),
        n2 * group,
        n2,
        d,
        draw(st.integers(1, d)),
        draw(st.sampled_from([F16, BF16, F32])),
        (size, stride, block),
        draw(st.integers(1, 20)),
        draw(st.sampled_from([None, "bool", "uint8"])),
        draw(st.sampled_from([None, "bool", "uint8"])),
        score_shift=draw(st.integers(0, block // stride)),
        masked_rows=draw(st.sampled_from(["mean", "zero"])),
        softmax_out_layout=draw(st.sampled_from(["", "same_as_input"])),
    )
    assert_matches(feeds, attrs, run(feeds, attrs))


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


# -- refusals --------------------------------------------------------------------------------------


def changed(feeds_change=(), **change):
    """The default node with other feeds (name -> array, None removes) and attributes."""
    feeds, attrs = make(atten="bool", topk="bool")
    return feeds | dict(feeds_change), attrs | change


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


REFUSALS = {
    "query rank": (changed({"query": zeros(8, 4)}), 'input "query" rank: found 2, allowed 3'),
    "key size": (changed({"key": zeros(15, 2, 9)}), 'input "key" head size: found 9, allowed 8'),
    "value rows": (changed({"value": zeros(14, 2, 7)}), 'input "value"'),
    "value heads": (changed({"value": zeros(15, 1, 7)}), 'input "value"'),
    "value size": (changed({"value": zeros(15, 2, 9)}), 'input "value" head size.*at most 8'),
    "head_num": (changed(head_num=2), 'attribute "head_num": found 2, allowed 4'),
    "group of 3": (
        changed({"query": zeros(8, 6, 8)}, head_num=6),
        r"query heads and key heads: found \(6, 2\), allowed a ratio",
    ),
    "group of 128": (
        changed({"query": zeros(8, 256, 8)}, head_num=256),
        r"query heads and key heads: found \(256, 2\), allowed a ratio",
    ),
    "heads not divisible": (
        changed({"query": zeros(8, 5, 8)}, head_num=5),
        r"query heads and key heads: found \(5, 2\)",
    ),
    "l": (changed(compress_block_size=40), 'attribute "compress_block_size": found 40.*multiple'),
    "l of 0": (changed(compress_block_size=0), 'attribute "compress_block_size": found 0'),
    "d": (changed(compress_stride=8), 'attribute "compress_stride": found 8.*multiple of 16'),
    "d > l": (changed(compress_stride=48), 'attribute "compress_stride": found 48.*at most'),
    "l' < l": (changed(select_block_size=16), 'attribute "select_block_size": found 16.*at least'),
    "l' % d": (
        changed(compress_stride=32, select_block_size=80),
        'attribute "select_block_size": found 80.*multiple of compress_stride',
    ),
    "k": (changed(select_block_count=0), 'attribute "select_block_count": found 0'),
    "scale": (changed(scale_value=float("inf")), 'attribute "scale_value": found inf.*finite'),
    "scale nan": (changed(scale_value=float("nan")), 'attribute "scale_value": found nan.*finite'),
    "layout": (changed(input_layout="tnd"), "attribute \"input_layout\": found 'tnd'"),
    "sparse_mode": (changed(sparse_mode=2), 'attribute "sparse_mode": found 2, allowed 0 or 1'),
    "softmax layout": (changed(softmax_out_layout="TND"), "found 'TND', allowed '' or 'same_as_"),
    "masked_rows": (changed(masked_rows="nan"), "found 'nan', allowed 'mean' or 'zero'"),
    "score_shift": (changed(score_shift=5), 'attribute "score_shift": found 5, allowed 0 to 4'),
    "score_shift < 0": (changed(score_shift=-1), 'attribute "score_shift": found -1'),
    "no list": (changed({"actual_sel_seq_kvlen": None}), '"actual_sel_seq_kvlen".*neither'),
    "list twice": (changed(actual_seq_qlen=[5, 8]), 'input "actual_seq_qlen".*one of the two'),
    "list rank": (
        changed({"actual_seq_qlen": zeros(2, 1, dtype=np.int64)}),
        'input "actual_seq_qlen" rank: found 2, allowed 1',
    ),
    "list sizes": (
        changed({"actual_seq_qlen": np.array([4, 5, 8])}),
        'input "actual_cmp_seq_kvlen"',
    ),
    "mask rank": (changed({"atten_mask": zeros(9, dtype=bool)}), 'input "atten_mask" rank'),
    "mask type": (changed({"atten_mask": zeros(9, 9)}), 'input "atten_mask": found float32'),
    "list type": (
        changed({"actual_seq_qlen": np.array([5, 8], np.int32)}),
        'input "actual_seq_qlen": found int32, allowed int64',
    ),
    "query type": (changed({"query": zeros(8, 4, 8, dtype=np.float64)}), 'input "query": found'),
    "types differ": (
        changed({"key": zeros(15, 2, 8, dtype=np.float16)}),
        'input "key": found float16, allowed float32',
    ),
    "unknown attribute": (changed(inner_precise=1), '"inner_precise".*unknown'),
    "missing attribute": (changed(head_num=None), 'attribute "head_num": found none'),
}


@pytest.mark.parametrize(("case", "text"), REFUSALS.values(), ids=REFUSALS)
def test_refused_when_compiled(case, text):
    feeds, attrs = case
    with pytest.raises(OpferryError, match=text) as refusal:
        opferry.compile(node_model(OP, feeds, name="cmp", **attrs))
    assert str(refusal.value).startswith(f'{OP} node "cmp": ')


@pytest.mark.parametrize("shape", [(0, 4, 8), (8, 0, 8), (8, 4, 0)], ids=str)
def test_zero_sized_dimensions_are_refused(shape):
    feeds, attrs = changed({"query": zeros(*shape)})
    with pytest.raises(OpferryError, match=f'"query" axis {shape.index(0)}: found size 0'):
        opferry.compile(node_model(OP, feeds, **attrs))


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
        opferry.compile(node_model(OP, given, initializers=stored, **attrs)).run(given)


@functools.cache
def shared_module():
    feeds, attrs = changed()
    return opferry.compile(node_model(OP, feeds, **attrs))


def test_topk_mask_must_cover_the_blocks():
    feeds, attrs = changed({"topk_mask": zeros(6, 2, dtype=bool)})
    with pytest.raises(OpferryError, match='"topk_mask": found 2 columns, allowed at least 3'):
        opferry.compile(node_model(OP, feeds, **attrs)).run(feeds)


def test_limit_of_compressed_keys():
    feeds, attrs = make((1,), (14000,), 1, 1, 2, 1, k=2)
    assert_matches(feeds, attrs, run(feeds, attrs))
    feeds, attrs = make((1,), (14001,), 1, 1, 2, 1, k=2)
    with pytest.raises(OpferryError, match="found 14001 keys in sequence 0, allowed at most 14000"):
        run(feeds, attrs)


def test_memory_that_runs_out_is_an_error_of_ours():
    feeds, attrs = make((1 << 16,), (1,), 1, 1, 1, 1, k=2**31 - 1)
    with pytest.raises(OpferryError, match="the call failed"):
        run(feeds, attrs)


def test_symbolic_dimensions_are_checked_at_the_call():
    module = symbolic_module(*VARIANTS[0])
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


def test_symbolic_head_size_is_refused():
    feeds, attrs = changed()
    with pytest.raises(InvalidNodeError, match='input "query" axis 2: found symbolic'):
        opferry.compile(node_model(OP, feeds, symbolic={"query": {2: "D"}}, **attrs))
