"""SpeedFusionAttention for NVIDIA GPUs: the kernel of every mode in the interpreter of GPU threads
against the NumPy reference, the instructions it consists of, the registers it takes, the tiles it
skips.
"""

import dataclasses
import functools
import re

import cuda_code
import ml_dtypes
import numpy as np
import pytest
import simt
from tvm import tirx as tir

from opferry.driver import target as targets
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare
from opferry.relay_ops.op import KERNEL
from opferry.runtime.errors import OpferryError
from opferry.schedules.cuda import arch as architectures
from opferry.schedules.cuda import attention_block, attention_config
from opferry.schedules.cuda.override import overriding
from opferry.schedules.intrin import hopper

OP = "SpeedFusionAttention"
F32, F16, BF16 = np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")
CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
BATCH_SEQUENCE = {"BSH": (0, 1), "SBH": (1, 0), "BNSD": (0, 2), "BSND": (0, 1)}


def kernel(feeds, arch="sm_80", outputs=OUTPUTS, constant=(), symbolic=None, **attrs):
    """The PrimFunc of the node that ``feeds`` and ``attrs`` describe. A compressed mask is stored
    in the model.
    """
    if feeds.get("atten_mask") is CAUSAL:
        constant = (*constant, "atten_mask")
    model = prepare(load(node_model(OP, feeds, list(outputs), constant, symbolic, **attrs)), None)
    module = import_model(model, targets.resolve(f"cuda-{arch}")).module
    (func,) = (
        func
        for func in module.functions.values()
        if func.attrs and func.attrs.get(KERNEL) == "speed_fusion_attention.fused"
    )
    return func


def execute(func, feeds, attrs, blocks=None):
    """Outputs by name, from memory that was NaN."""
    query, N1 = feeds["query"], attrs["head_num"]
    if attrs["input_layout"] == "TND":
        softmax = (query.shape[0], N1, 8)
    else:
        softmax = tuple(query.shape[k] for k in BATCH_SEQUENCE[attrs["input_layout"]])
        softmax = (softmax[0], N1, softmax[1], 8)
    found, args = {}, []
    for param in func.params:
        name = param.name
        if name in OUTPUTS:
            like = query if name == "attention_out" else None
            shape, dtype = (like.shape, like.dtype) if like is not None else (softmax, F32)
            found[name] = np.full(shape, np.nan, dtype)
            args.append(found[name])
        else:
            value = feeds[name] if name in feeds else np.array(attrs[name], "int64")
            args.append(np.array(value, order="C"))
    simt.run(func, *args, blocks=blocks)
    return found


def check(feeds, arch="sm_80", outputs=OUTPUTS, symbolic=None, **attrs):
    """Every output against the reference, within the tolerances of the specification."""
    func = kernel(feeds, arch, outputs, symbolic=symbolic, **attrs)
    found = execute(func, feeds, attrs)
    for verdict in compare(OP, feeds, attrs, [found.get(name) for name in OUTPUTS]):
        assert verdict.ok, verdict
    return found


def inputs(B, N1, N2, S1, S2, D, dtype=F16, layout="BNSD"):
    rng = np.random.default_rng([B, N1, N2, S1, S2, D])

    def tensor(N, S):
        shape = {
            "BNSD": (B, N, S, D),
            "BSND": (B, S, N, D),
            "BSH": (B, S, N * D),
            "SBH": (S, B, N * D),
            "TND": (S, N, D),
        }[layout]
        return rng.standard_normal(shape).astype(dtype)

    return {"query": tensor(N1, S1), "key": tensor(N2, S2), "value": tensor(N2, S2)}


def packed(queries, keys, dtype=F16, N1=4, N2=2, D=32, index=np.int64):
    """TND inputs from the lengths of the sequences."""
    feeds = inputs(0, N1, N2, sum(queries), sum(keys), D, dtype, "TND")
    ends = {"actual_seq_qlen": queries, "actual_seq_kvlen": keys}
    return feeds | {name: np.cumsum(lengths).astype(index) for name, lengths in ends.items()}


def node(layout="BNSD", N1=2, **attrs):
    return {"input_layout": layout, "head_num": N1, "scale": 0.3} | attrs


def some(shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def normal(shape, dtype=F32):
    return np.random.default_rng(7).standard_normal(shape).astype(dtype)


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


# -- warpgroups: sm_90a ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("S1", "S2"), [(65, 1), (150, 700)])
def test_products_of_warpgroups(S1, S2, D, dtype):
    """More tiles than the ring has slots, two tiles of queries, tails."""
    feeds = inputs(1, 2, 1, S1, S2, D, dtype)
    assert config(feeds, "sm_90a", **node()).wgmma
    check(feeds, "sm_90a", **node())


@pytest.mark.parametrize(
    "fields",
    [
        {"row_tiles": 1, "keys": 128},
        {"row_tiles": 1, "keys": 96, "warps": 8},
        {"warps": 8, "slots": 4},
    ],
    ids=str,
)
def test_other_tiles_of_warpgroups(fields):
    with overriding("AttentionConfig", fields):
        check(inputs(1, 1, 1, 300, 300, 128), "sm_90a", **node(N1=1))


@pytest.mark.parametrize("layout", BATCH_SEQUENCE)
def test_layouts_by_warpgroups(layout):
    check(inputs(2, 4, 2, 70, 90, 64, F16, layout), "sm_90a", **node(layout, 4))


@pytest.mark.parametrize("output", OUTPUTS)
def test_single_outputs_by_warpgroups(output):
    check(inputs(1, 2, 1, 70, 90, 128), "sm_90a", outputs=[output], **node())


@pytest.mark.parametrize(
    "band",
    [
        {"sparse_mode": 2},
        {"sparse_mode": 3},
        {"sparse_mode": 4, "pre_tokens": 40, "next_tokens": 85},
        {"sparse_mode": 4, "pre_tokens": -5, "next_tokens": 90},
    ],
    ids=str,
)
def test_bands_by_warpgroups(band):
    feeds = inputs(1, 2, 1, 150, 300, 64) | {"atten_mask": CAUSAL}
    check(feeds, "sm_90a", **node(**band))


def test_mask_bias_and_dropout_by_warpgroups():
    mask = some((2, 1, 70, 91)) < 0.4
    mask[..., 3, :] = True  # a row without keys
    feeds = inputs(2, 2, 1, 70, 91, 64, BF16) | {"atten_mask": mask}
    feeds["pse"] = normal((1, 2, 70, 91), BF16)
    check(feeds, "sm_90a", **node(sparse_mode=1, pse_type=0, keep_prob=0.7, seed=-5))
    feeds["pse"] = normal((2, 2))
    check(feeds, "sm_90a", **node(sparse_mode=1, pse_type=3, q_start_idx=[3], kv_start_idx=[9]))


def test_packed_sequences_by_warpgroups():
    feeds = packed([5, 0, 70, 130], [9, 0, 200, 131], N1=2, N2=1, D=64)
    feeds["atten_mask"] = CAUSAL
    check(feeds, "sm_90a", **node("TND", 2, sparse_mode=3))


@pytest.mark.parametrize("D", [64, 128])
def test_rows_without_keys_by_warpgroups(D):
    """No product writes their output."""
    feeds = packed([70, 5, 66], [0, 9, 40], N1=2, N2=1, D=D)
    found = check(feeds, "sm_90a", **node("TND", 2))
    assert (found["attention_out"][:70] == 0).all()


def test_symbolic_sizes_by_warpgroups():
    names = {"query": {0: "b", 2: "s"}, "key": {0: "b", 2: "t"}, "value": {0: "b", 2: "t"}}
    check(inputs(2, 2, 1, 37, 91, 128), "sm_90a", symbolic=names, **node())


@pytest.mark.parametrize(
    ("S1", "D", "dtype"),
    [(64, 64, F16), (1, 128, BF16), (70, 80, F16), (70, 256, F16), (70, 64, F32)],
)
def test_what_warpgroups_leave_to_others(S1, D, dtype):
    feeds = inputs(1, 1, 1, S1, 40, D, dtype)
    assert not config(feeds, "sm_90a", **node(N1=1)).wgmma
    check(feeds, "sm_90a", **node(N1=1))


@pytest.mark.parametrize(
    "fields", [{"depth": 128}, {"warps": 2}, {"keys": 40}, {"slots": 2}], ids=str
)
def test_tiles_that_warpgroups_refuse(fields):
    found = config(inputs(1, 1, 1, 70, 40, 64), "sm_90a", **node(N1=1))
    with pytest.raises(OpferryError, match="allowed for warpgroups depth 64"):
        dataclasses.replace(found, **fields)


STEPS = {
    "fence_shared": "with no fence.proxy.async since it was written",
    "begin_products": "since the last wgmma.fence",
    "commit_products": "while wgmma (reads|writes) it|wgmma still in flight",
    "wait_products": "while wgmma (reads|writes) it",
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_warpgroups_is_needed(step, monkeypatch):
    """The kernel without it is found out."""
    monkeypatch.setattr(hopper, step, lambda *_: None)
    with pytest.raises(simt.SimtError, match=STEPS[step]):
        check(inputs(1, 1, 1, 70, 300, 64), "sm_90a", **node(N1=1))


def test_every_barrier_of_warpgroups_is_needed(monkeypatch):
    monkeypatch.setattr(attention_block.T.cuda, "cta_sync", lambda: tir.const(0, "int32"))
    with pytest.raises(simt.SimtError, match="no cta_sync since"):
        check(inputs(1, 1, 1, 70, 300, 64), "sm_90a", **node(N1=1))


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


# -- instructions, registers, shared memory -------------------------------------------------------


def config(feeds, arch="sm_80", **attrs):
    """How the kernel of a problem is cut."""
    taken = []
    configure = attention_config.configure

    def spy(problem, record):
        taken.append(configure(problem, record))
        raise OpferryError("nothing is built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opferry.schedules.cuda.attention.configure", spy)
        with pytest.raises(OpferryError):
            kernel(feeds, arch, **attrs)
    return taken[-1]


@functools.lru_cache(maxsize=64)
def func(arch, dtype, D, kind="full"):
    """The kernel of a kind: full, causal, mask, bias, decode, short (64 keys), packed (TND and
    causal), all (mask and bias), and with dropout.
    """
    kind, *drops = kind.split("+")
    S1, S2, N2 = {"decode": (1, 4096, 2), "short": (1024, 64, 8)}.get(kind, (1024, 1024, 8))
    attrs = node(N1=8)
    if kind == "packed":
        feeds, attrs = packed([500, 524], [500, 524], np.dtype(dtype), 8, 2, D), node("TND", 8)
    else:
        feeds = inputs(1, 8, N2, S1, S2, D, np.dtype(dtype))
    if kind in ("causal", "packed"):
        feeds["atten_mask"] = CAUSAL
        attrs["sparse_mode"] = 3
    if kind in ("mask", "all"):
        feeds["atten_mask"] = np.zeros((1, 1, S1, S2), bool)
        attrs["sparse_mode"] = 1
    if kind in ("bias", "all"):
        feeds["pse"] = np.zeros((1, 8, S1, S2), np.dtype(dtype))
    if drops:
        attrs["keep_prob"] = 0.9
    return kernel(feeds, arch, **attrs)


@pytest.mark.parametrize(
    ("arch", "kind"), cuda_code.swept(architectures.ARCHS, ["packed+dropout", "full", "decode"])
)
def test_tvm_verifies(arch, kind):
    cuda_code.verify(func(arch, "float16", 128, kind), arch)


@pytest.mark.parametrize(
    ("arch", "dtype"), cuda_code.swept(architectures.ARCHS, ["float32", "bfloat16"])
)
def test_tvm_verifies_other_arithmetic(arch, dtype):
    cuda_code.verify(func(arch, dtype, 64, "causal"), arch)


@functools.lru_cache(maxsize=64)
def source(arch, dtype, D, kind="full"):
    return cuda_code.source(func(arch, dtype, D, kind), arch)


MMA = {
    ("sm_75", "float16"): "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    ("sm_80", "float16"): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ("sm_80", "bfloat16"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}


@pytest.mark.parametrize(
    ("arch", "dtype"),
    cuda_code.swept(
        [name for name, arch in architectures.ARCHS.items() if not arch.wgmma],
        ["bfloat16", "float16"],
    ),
)
def test_instructions(arch, dtype):
    text = source(arch, dtype, 64)
    old = arch == "sm_75"
    expected = MMA.get(("sm_75" if old else "sm_80", dtype))
    assert set(re.findall(r"mma\.sync[\w.]*", text)) == ({expected} if expected else set())
    assert ("ldmatrix.sync.aligned.m8n8.x4.shared.b16" in text) == bool(expected)
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in text) == bool(expected)
    assert ("cp.async.cg.shared.global" in text) != old
    assert "ex2.approx.ftz.f32" in text


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "f16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize(("D", "keys"), [(64, 64), (128, 48)])
def test_instructions_of_warpgroups(D, keys, dtype, kind):
    text = source("sm_90a", dtype, D)
    assert set(re.findall(r"wgmma\.mma_async[\w.]*", text)) == {
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}" for n in (keys, 64)
    }
    assert "mma.sync." not in text
    assert "ldmatrix" not in text
    assert "cp.async.cg.shared.global" in text
    assert "fence.proxy.async.shared::cta" in text
    assert "extern __shared__ __align__(1024)" in text
    assert "ex2.approx.ftz.f32" in text


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_75", "float16"), ("sm_80", "float32"), ("sm_90a", "float16")]
)
def test_barriers_are_the_kernels_own(arch, dtype):
    """TVM adds none: the text holds the function that wraps the instruction, once."""
    assert source(arch, dtype, 64).count("__syncthreads()") == 1


@pytest.mark.parametrize("arch", architectures.ARCHS)
def test_float32_is_not_rounded_to_narrower_products(arch):
    text = source(arch, "float32", 64)
    assert "mma" not in text
    assert "tf32" not in text


WARPGROUP_TILES = [
    {"slots": 6},
    {"row_tiles": 1, "keys": 96},
    {"row_tiles": 1, "keys": 96, "warps": 8},
]
"""What the benchmarks for GPUs measure beside the schedule's own choice."""
USUAL = [
    ("float16", 128, "causal"),
    ("float16", 64, "full"),
    ("bfloat16", 64, "causal"),
    ("bfloat16", 128, "full"),
    ("float16", 128, "decode"),
]
UNUSUAL = [
    ("float16", 64, "packed+dropout"),
    ("float16", 128, "packed"),
    ("float16", 128, "packed+dropout"),
    ("bfloat16", 128, "mask+dropout"),
    ("float16", 128, "bias"),
    ("float16", 192, "causal"),
    ("float16", 256, "packed+dropout"),
    ("float16", 320, "full"),
    ("float16", 320, "packed+dropout"),
    ("float16", 512, "full"),
    ("float32", 64, "causal"),
    ("float32", 128, "full"),
    ("float32", 256, "full"),
]


@cuda_code.needs_nvcc
@pytest.mark.parametrize(
    ("arch", "dtype", "D", "kind"), cuda_code.swept(architectures.ARCHS, USUAL)
)
def test_registers_and_spills(arch, dtype, D, kind, tmp_path):
    assert_fits(arch, dtype, D, kind, tmp_path)


@cuda_code.needs_nvcc
@pytest.mark.parametrize("kind", ["all+dropout", "short", "short+dropout"])
@pytest.mark.parametrize("D", [64, 128])
def test_registers_and_spills_of_other_warpgroups(D, kind, tmp_path):
    assert_fits("sm_90a", "float16", D, kind, tmp_path)


@cuda_code.needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("fields", WARPGROUP_TILES, ids=str)
def test_products_of_measured_tiles_overlap(fields, D, kind, tmp_path):
    with overriding("AttentionConfig", fields):
        measured = func.__wrapped__("sm_90a", "bfloat16", D, kind)
    for found in cuda_code.resources(cuda_code.source(measured, "sm_90a"), "sm_90a", tmp_path):
        assert not found.spilled


def assert_fits(arch, dtype, D, kind, tmp_path):
    two_blocks = architectures.ARCHS[arch].registers_per_sm // 2
    for found in cuda_code.resources(source(arch, dtype, D, kind), arch, tmp_path):
        assert not found.spilled
        assert -(-found.registers // 8) * 8 * 128 <= two_blocks


@cuda_code.needs_nvcc
@pytest.mark.parametrize(("dtype", "D", "kind"), UNUSUAL)
@pytest.mark.parametrize(
    "arch",
    [
        a if a in ("sm_75", "sm_80") else pytest.param(a, marks=pytest.mark.slow)
        for a in architectures.ARCHS
    ],
)
def test_nothing_spills_in_other_modes(arch, dtype, D, kind, tmp_path):
    for found in cuda_code.resources(source(arch, dtype, D, kind), arch, tmp_path):
        assert not found.spilled


@pytest.mark.parametrize("arch", architectures.ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 512])
@pytest.mark.parametrize("S1", [1, 256])
def test_every_tile_fits(S1, D, dtype, arch):
    found = config(inputs(1, 2, 1, S1, 32, D, dtype), arch.name, **node())
    assert found.shared_bytes <= arch.shared_per_block
    registers = found.threads * architectures.THREAD_REGISTERS
    assert registers <= arch.registers_per_sm
