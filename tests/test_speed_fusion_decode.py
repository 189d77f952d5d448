"""SpeedFusionAttention with few queries: heads of a group together, keys in parts."""

import numpy as np
import pytest
from hosts import on
from numpy.testing import assert_array_equal
from speed_fusion_cases import (
    BF16,
    CAUSAL,
    F32,
    OP,
    build,
    check,
    judge,
    normal,
    qkv,
    random_mask,
    run,
)

import opferry
from opferry.frontend.builders import node_model


@pytest.mark.parametrize(("N2", "dtype"), [(1, F32), (8, BF16)], ids=str)
def test_decode(N2, dtype):
    feeds = qkv(B=2, N1=8, N2=N2, S1=1, S2=515, D=64, dtype=dtype)
    check(feeds, head_num=8, input_layout="BNSD", scale=0.125)


@pytest.mark.parametrize("mcpu", ["x86-64", "haswell", "skylake-avx512"])
@pytest.mark.parametrize("S2", [1, 23, 32, 96, 1059])
def test_decode_in_stripes(S2, mcpu):
    """Keys that do not fill a tile, that fill some, and what is left of them; in parts as well."""
    feeds = qkv(B=2, N1=3, N2=1, S1=2, S2=S2, D=24, dtype=F32, layout="SBH")
    target = {"kind": "llvm", "mcpu": on(mcpu)}
    check(feeds, target=target, head_num=3, input_layout="SBH", scale=0.25)


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


@pytest.mark.parametrize("S2", [1, 31, 32, 77, 128, 1059])
@pytest.mark.parametrize(
    ("group", "D", "S1", "layout"), [(8, 128, 1, "BNSD"), (5, 96, 3, "SBH"), (16, 32, 2, "BSND")]
)
def test_decode_of_groups_on_matrix_tiles(S2, group, D, S1, layout):
    """Keys that are no block, that end inside one, that fill a tile, in stripes and in parts; heads
    that fill no power of two, and all rows of a tile.
    """
    feeds = qkv(B=2, N1=2 * group, N2=2, S1=S1, S2=S2, D=D, dtype=BF16, layout=layout)
    check(feeds, target=on("x86-amx"), head_num=2 * group, input_layout=layout, scale=0.125)


@pytest.mark.parametrize("S2", [20, 143])
@pytest.mark.parametrize("extra", ["mask", "pse", "dropout"])
def test_decode_of_groups_on_matrix_tiles_by_pairs(S2, extra):
    """What pairs have of their own leaves keys in their order."""
    feeds = qkv(B=1, N1=12, N2=2, S1=2, S2=S2, D=32, dtype=BF16)
    attrs = {"head_num": 12, "input_layout": "BNSD", "scale": 0.25}
    if extra == "mask":
        feeds["atten_mask"] = random_mask(1, 1, 2, S2)
        attrs["sparse_mode"] = 1
    elif extra == "pse":
        feeds["pse"] = normal(1, 12, 2, S2, dtype=BF16)
    else:
        attrs |= {"keep_prob": 0.7, "seed": 5}
    check(feeds, target=on("x86-amx"), **attrs)


def test_decode_of_groups_on_matrix_tiles_at_the_ends_of_bfloat16():
    """Scores of 1e9, of which one wins, and one of minus infinity."""
    feeds = qkv(B=1, N1=8, N2=1, S1=1, S2=300, D=64, dtype=BF16)
    feeds["key"] = (feeds["key"].astype(F32) * 1e9).astype(BF16)
    attrs = {"head_num": 8, "input_layout": "BNSD", "scale": 1.0, "target": on("x86-amx")}
    check(feeds, **attrs)
    feeds["key"][0, 0, 3] = -np.inf
    feeds["query"] = np.abs(feeds["query"]) + BF16.type(1)
    check(feeds, **attrs)
    check(feeds, outputs=("softmax_max", "softmax_sum"), **attrs)


@pytest.mark.parametrize(("group", "tiles"), [(4, False), (5, True)])
def test_matrix_tiles_multiply_groups_of_heads(group, tiles):
    feeds = qkv(B=1, N1=group, N2=1, S1=1, S2=256, D=64, dtype=BF16)
    module = build(feeds, target="x86-amx", head_num=group, input_layout="BNSD", scale=0.125)
    texts = [m.inspect_source("asm") for m in module._executable().imports if m.kind == "llvm"]
    assert ("tdpbf16ps" in "".join(texts)) is tiles


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
