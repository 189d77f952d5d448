"""SpeedFusionAttention for NVIDIA GPUs: the kernel of every mode in the interpreter of GPU threads
against the NumPy reference, the tiles it skips.
"""

import numpy as np
import pytest
from cuda_attention_cases import (
    BATCH_SEQUENCE,
    BF16,
    CAUSAL,
    F16,
    F32,
    OUTPUTS,
    check,
    config,
    execute,
    inputs,
    kernel,
    node,
    normal,
    packed,
    some,
)

from opferry.schedules.cuda import arch as architectures

# -- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_every_way_to_multiply(dtype, arch):
    feeds = inputs(1, 2, 1, 70, 150, 32, dtype) | {"atten_mask": CAUSAL}
    check(feeds, arch, **node(sparse_mode=3))


# Whole and partial chunks of 16 bytes, copies of 16, 8, 4, 2 bytes, parts of D and of the output.
@pytest.mark.parametrize("D", [1, 4, 6, 24, 33, 128, 144, 320])
def test_head_sizes(D):
    check(inputs(1, 2, 2, 19, 70, D), **node(scale=D**-0.5))


@pytest.mark.parametrize(
    ("D", "dtype", "arch"),
    [
        (33, F16, "sm_75"),
        (40, BF16, "sm_75"),
        (6, F32, "sm_80"),
        (5, F32, "sm_75"),
        (144, F32, "sm_86"),
        (512, F16, "sm_86"),
    ],
    ids=str,
)
def test_head_sizes_of_other_copies(D, dtype, arch):
    check(inputs(1, 1, 1, 19, 40, D, dtype), arch, **node(N1=1, scale=D**-0.5))


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
def test_layouts(layout):
    check(inputs(2, 4, 2, 37, 90, 24, F16, layout), **node(layout, 4))


@pytest.mark.parametrize("output", OUTPUTS)
def test_single_outputs(output):
    check(inputs(1, 2, 1, 37, 90, 32), outputs=[output], **node())


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_scales(scale):
    check(inputs(1, 1, 1, 19, 70, 16), **node(N1=1, scale=scale))


def test_scores_beyond_float16():
    feeds = inputs(1, 1, 1, 19, 70, 16)
    feeds |= {name: feeds[name] * F16.type(100) for name in ("query", "key")}
    check(feeds, **node(N1=1, scale=1e-3))


@pytest.mark.parametrize(("S1", "S2"), [(70, 150), (150, 70)])
@pytest.mark.parametrize(
    "band",
    [
        {"sparse_mode": 2},
        {"sparse_mode": 3},
        {"sparse_mode": 4, "pre_tokens": 40, "next_tokens": 85},
        {"sparse_mode": 4, "pre_tokens": -5, "next_tokens": 90},
        {"sparse_mode": 4, "pre_tokens": 90, "next_tokens": -5},
    ],
    ids=str,
)
def test_bands(band, S1, S2):
    if band["sparse_mode"] == 4 and S1 > S2:  # tokens count from the lower right corner
        band = band | {
            "pre_tokens": band["pre_tokens"] - 80,
            "next_tokens": band["next_tokens"] + 80,
        }
    feeds = inputs(1, 2, 1, S1, S2, 16) | {"atten_mask": CAUSAL}
    found = check(feeds, **node(**band))
    assert not np.isnan(found["attention_out"]).any()


@pytest.mark.parametrize(
    "shape", [(2, 2, 37, 91), (2, 1, 37, 91), (1, 1, 37, 91), (37, 91)], ids=str
)
@pytest.mark.parametrize(
    "mode", [{"sparse_mode": 1}, {"sparse_mode": 0, "pre_tokens": 30, "next_tokens": 20}], ids=str
)
def test_dense_masks(mode, shape):
    mask = some(shape) < 0.4
    mask[..., 3, :] = True  # a row without keys
    found = check(inputs(2, 2, 1, 37, 91, 16) | {"atten_mask": mask}, **node(**mode))
    assert (found["attention_out"][:, :, 3] == 0).all()


@pytest.mark.parametrize(("S1", "S2"), [(37, 91), (91, 37)])
def test_prefix(S1, S2):
    mask = (some((2, 1, S1, S2)) < 0.2).astype(np.uint8) * 7
    prefix = np.array([max(0, S2 - S1), S2], np.int32)
    feeds = inputs(2, 2, 1, S1, S2, 16) | {"atten_mask": mask, "prefix": prefix}
    check(feeds, **node(sparse_mode=5))


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("S2", [90, 91])  # two elements of a row at once, or one by one
@pytest.mark.parametrize("rows", [(2, 2, 37), (1, 2, 37), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("pse_type", [0, 1])
def test_dense_bias(pse_type, rows, S2, dtype):
    feeds = inputs(2, 2, 1, 37, S2, 16, dtype) | {"pse": normal((*rows, S2), dtype)}
    check(feeds, **node(pse_type=pse_type))


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
def test_masks_of_even_rows(dtype):
    mask = (some((2, 1, 37, 90)) < 0.4).astype(dtype)
    check(inputs(2, 2, 1, 37, 90, 16, BF16) | {"atten_mask": mask}, **node(sparse_mode=1))


@pytest.mark.parametrize("shape", [(2, 2), (2,)], ids=str)
@pytest.mark.parametrize("pse_type", [2, 3])
def test_generated_bias(pse_type, shape):
    feeds = inputs(2, 2, 1, 37, 91, 16) | {"pse": normal(shape)}
    check(feeds, **node(pse_type=pse_type, q_start_idx=[3], kv_start_idx=[9]))
    starts = {"q_start_idx": np.array([7]), "kv_start_idx": np.array([2])}
    check(feeds | starts, **node(pse_type=pse_type))


def test_packed_bias():
    feeds = inputs(1, 1, 1, 1060, 1060, 16)
    feeds |= {"pse": normal((1, 1, 1024, 1060), F16), "atten_mask": CAUSAL}
    check(feeds, **node(N1=1, sparse_mode=3))


def test_packed_bias_of_packed_sequences():
    feeds = packed([5, 1040], [5, 1040], N1=1, N2=1, D=16)
    feeds |= {"pse": normal((2, 1, 1024, 1040), F16), "atten_mask": CAUSAL}
    check(feeds, **node("TND", 1, sparse_mode=2, pse_type=0))


@pytest.mark.parametrize("S2", [90, 91])  # pairs of a draw, or one by one
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_dropout(dtype, S2):
    feeds = inputs(2, 2, 1, 21, S2, 16, dtype)
    check(feeds, **node(keep_prob=0.7, seed=-5, offset=12))


def test_dropout_of_tensors_and_of_everything():
    feeds = inputs(1, 2, 1, 21, 40, 16) | {"seed": np.array(3), "offset": np.array([1 << 40])}
    check(feeds, **node(keep_prob=0.3))
    found = check(feeds | {"atten_mask": CAUSAL}, **node(keep_prob=1e-12, sparse_mode=3))
    assert (found["attention_out"] == 0).all()


@pytest.mark.parametrize(
    ("queries", "keys", "attrs"),
    [
        ([5, 0, 70, 130], [9, 3, 200, 31], {}),
        ([5, 0, 70, 130, 0], [9, 0, 200, 131, 0], {"sparse_mode": 3}),
        ([5, 0, 70, 30], [9, 0, 20, 31], {"sparse_mode": 2, "softmax_layout": "TND"}),
        ([1] * 40, [3] * 40, {"keep_prob": 0.6}),
        ([5, 40], [5, 40], {"pse_type": 3}),
    ],
    ids=["plain", "right-down", "left-up", "short", "slopes"],
)
def test_packed_sequences(queries, keys, attrs):
    index = np.int32 if len(queries) == 5 else np.int64
    feeds = packed(queries, keys, N1=2, N2=1, D=16, index=index)
    if "sparse_mode" in attrs:
        feeds["atten_mask"] = CAUSAL
    if "pse_type" in attrs:
        feeds["pse"] = normal((len(queries), 2))
    check(feeds, **node("TND", 2, **attrs))


@pytest.mark.parametrize(
    "ends",
    [[-5, 40, 60], [7, 3, 60], [7, 90, 60], [7, 1 << 40, 60], [-(1 << 40)] * 3],
    ids=str,
)
def test_lists_that_nobody_checked_stay_inside(ends):
    """Values computed in the graph: the interpreter refuses every access out of bounds."""
    feeds = packed([7, 30, 23], [7, 30, 23], N1=2, N2=1, D=16)
    attrs = node("TND", 2, keep_prob=0.5)
    func = kernel(feeds, **attrs)
    for name in ("actual_seq_qlen", "actual_seq_kvlen"):
        execute(func, feeds | {name: np.array(ends)}, attrs)


# -- few rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("S1", "D", "layout", "attrs"),
    [
        (1, 64, "BNSD", {}),
        (3, 33, "SBH", {}),
        (3, 16, "BSND", {"sparse_mode": 3, "keep_prob": 0.8}),
        (2, 16, "BNSD", {"sparse_mode": 4, "pre_tokens": 100, "next_tokens": 0}),
    ],
    ids=str,
)
def test_keys_divided_among_blocks(S1, D, layout, attrs):
    """Heads of a group share a tile; some parts see no key at all."""
    feeds = inputs(1, 8, 2, S1, 600, D, F16, layout)
    if "sparse_mode" in attrs:
        feeds["atten_mask"] = CAUSAL
    func = kernel(feeds, **node(layout, 8, **attrs))
    assert len(launches(func)) == 2
    check(feeds, **node(layout, 8, **attrs))


def test_divided_keys_with_mask_and_bias_by_head():
    mask = some((1, 8, 2, 520)) < 0.5
    feeds = inputs(1, 8, 2, 2, 520, 16, F32) | {"atten_mask": mask, "pse": normal((1, 8))}
    check(feeds, **node(N1=8, sparse_mode=1, pse_type=2))


def test_more_heads_than_a_tile_has_rows():
    feeds = inputs(1, 24, 1, 1, 300, 16)
    assert config(feeds, **node(N1=24)).heads == 12
    check(feeds, **node(N1=24))


def test_few_keys_are_not_divided():
    feeds = inputs(2, 8, 2, 2, 3, 16)
    assert len(launches(kernel(feeds, **node(N1=8)))) == 1
    check(feeds, **node(N1=8))


def test_symbolic_sizes():
    names = {"query": {0: "b", 2: "s"}, "key": {0: "b", 2: "t"}, "value": {0: "b", 2: "t"}}
    feeds = inputs(2, 2, 1, 37, 91, 16) | {"atten_mask": CAUSAL}
    check(feeds, symbolic=names, **node(sparse_mode=3, keep_prob=0.5))


@pytest.mark.parametrize("S1", [1, 19])
def test_no_batch(S1):
    """A part of a graph may have none: nothing is launched, and nothing divided by it."""
    names = {"query": {0: "b"}, "key": {0: "b"}, "value": {0: "b"}}
    func = kernel(inputs(1, 2, 1, S1, 600, 16), symbolic=names, **node())
    none = inputs(0, 2, 1, S1, 600, 16)
    assert execute(func, none, node())["attention_out"].size == 0


@pytest.mark.parametrize("S2", [3, 600])
def test_symbolic_keys_are_divided_when_there_are_many(S2):
    names = {"query": {0: "b"}, "key": {0: "b", 2: "t"}, "value": {0: "b", 2: "t"}}
    check(inputs(1, 2, 1, 1, S2, 16), symbolic=names, **node())


def launches(func):
    """The kernels of a PrimFunc: its outermost loops."""
    body = func.body.block.body
    return [s for s in (body.seq if hasattr(body, "seq") else [body]) if hasattr(s, "loop_var")]


# -- everything at once -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_90a"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_sweep(seed, dtype, arch):
    """Random sizes, layouts, masks, biases and dropout together."""
    wgmma = architectures.ARCHS[arch].wgmma
    rng = np.random.default_rng([seed, dtype.itemsize, int(arch[3:5])])
    N2, group, B = (int(rng.integers(1, top)) for top in (3, 4, 3))
    N1, layout = N2 * group, str(rng.choice(list(BATCH_SEQUENCE)))
    S1, S2 = (int(x) for x in rng.integers(65 if wgmma else 1, 150, 2))
    D = int(rng.choice([64, 128] if wgmma else [1, 8, 20, 33, 64, 72, 130, 200]))
    feeds = inputs(B, N1, N2, S1, S2, D, dtype, layout)
    attrs = node(layout, N1, scale=float(D**-0.5))
    if mode := int(rng.integers(0, 5)):
        attrs["sparse_mode"] = mode
        feeds["atten_mask"] = rng.random((B, 1, S1, S2)) < 0.5 if mode == 1 else CAUSAL
        if mode == 4:
            reach = S1 + S2
            attrs |= {"pre_tokens": int(rng.integers(0, reach)), "next_tokens": reach}
    if pse_type := int(rng.integers(0, 4)):
        attrs["pse_type"] = pse_type
        feeds["pse"] = normal((B, N1)) if pse_type > 1 else normal((B, N1, 1, S2), dtype)
    if rng.random() < 0.3:
        attrs |= {"keep_prob": 0.75, "seed": seed}
    check(feeds, arch, **attrs)


# -- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attrs",
    [
        {"sparse_mode": 2},
        {"sparse_mode": 3},
        {"sparse_mode": 4, "pre_tokens": 70, "next_tokens": -10},
        {"sparse_mode": 4, "pre_tokens": -150, "next_tokens": 170},
    ],
    ids=str,
)
def test_tiles_without_allowed_pairs_are_not_computed(attrs):
    """Values that a query tile may not see are NaN: a product with them, even with weights of 0,
    would show.
    """
    S1, S2 = 300, 520
    feeds = inputs(1, 1, 1, S1, S2, 16) | {"atten_mask": CAUSAL}
    attrs = node(N1=1, **attrs)
    func = kernel(feeds, **attrs)
    whole = execute(func, feeds, attrs)["attention_out"]
    cut = config(feeds, **attrs)
    rows, keys = cut.rows, cut.keys
    skipped = 0
    for block in range(-(-S1 // rows)):
        tile = -(-S1 // rows) - 1 - block  # the last tiles start first
        allowed = allowed_pairs(S1, S2, attrs)[tile * rows : (tile + 1) * rows].any(0)
        empty = [j0 for j0 in range(0, S2, keys) if not allowed[j0 : j0 + keys].any()]
        skipped += len(empty)
        value = feeds["value"].copy()
        for j0 in empty:
            value[:, :, j0 : j0 + keys] = np.nan
        got = execute(func, feeds | {"value": value}, attrs, [(block, 0, 0)])["attention_out"]
        mine = np.s_[:, :, tile * rows : (tile + 1) * rows]
        np.testing.assert_array_equal(got[mine], whole[mine])
    assert skipped


def allowed_pairs(S1, S2, attrs):
    """Section 4.2 of the specification, modes 2 to 4, pair by pair."""
    i, j = np.arange(S1)[:, None], np.arange(S2)
    s = S2 - S1
    return {
        2: j <= i,
        3: j <= i + s,
        4: (i + s - attrs.get("pre_tokens", 0) <= j) & (j <= i + s + attrs.get("next_tokens", 0)),
    }[attrs["sparse_mode"]]
