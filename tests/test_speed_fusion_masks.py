"""SpeedFusionAttention with masks, bands, prefixes and bias."""

import numpy as np
import onnx
import pytest
from numpy.testing import assert_array_equal
from speed_fusion_cases import (
    BF16,
    CAUSAL,
    F16,
    F32,
    LARGEST,
    LOWEST,
    build,
    check,
    judge,
    normal,
    qkv,
    random_mask,
    run,
    tnd,
)

import opferry
from opferry.frontend.builders import node_model
from opferry.runtime.errors import InvalidInputError


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
