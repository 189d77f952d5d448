"""SpeedFusionAttention by products of warpgroups (sm_90a), in the interpreter of GPU threads."""

import dataclasses

import pytest
import simt
from cuda_attention_cases import (
    BATCH_SEQUENCE,
    BF16,
    CAUSAL,
    F16,
    F32,
    OUTPUTS,
    check,
    config,
    inputs,
    node,
    normal,
    packed,
    some,
)
from tvm import tirx as tir

from opferry.runtime.errors import OpferryError
from opferry.schedules.cuda import attention_block
from opferry.schedules.cuda.override import overriding
from opferry.schedules.intrin import hopper


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
