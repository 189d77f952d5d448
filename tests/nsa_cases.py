"""NPUNsaCompressAttention: problems, and what a compiled node makes of them."""

import ml_dtypes
import numpy as np
from compile_once import compile_once

from opferry.frontend.builders import node_model
from opferry.reference.compare import compare

OP = "NPUNsaCompressAttention"
OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")
LENGTHS = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
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


SYMBOLIC = {
    "query": {0: "T"},
    "key": {0: "T2"},
    "value": {0: "T2"},
    "atten_mask": ["R", "C"],
    "topk_mask": ["Rt", "Ct"],
    **{name: {0: "B"} for name in LENGTHS},
}


def changed(feeds_change=(), **change):
    """The default node with other feeds (name -> array, None removes) and attributes."""
    feeds, attrs = make(atten="bool", topk="bool")
    return feeds | dict(feeds_change), attrs | change
