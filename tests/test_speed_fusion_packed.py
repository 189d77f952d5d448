"""SpeedFusionAttention of packed sequences, layout TND."""

import numpy as np
import pytest
from speed_fusion_cases import CAUSAL, F16, build, check, judge, normal, run, tnd

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
