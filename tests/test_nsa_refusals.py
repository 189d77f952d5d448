"""NPUNsaCompressAttention: every refusal by its message."""

import numpy as np
import pytest
from nsa_cases import OP, changed, make, run

import opferry
from opferry.frontend.builders import node_model
from opferry.runtime.errors import InvalidNodeError, OpferryError


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


def test_topk_mask_must_cover_the_blocks():
    feeds, attrs = changed({"topk_mask": zeros(6, 2, dtype=bool)})
    with pytest.raises(OpferryError, match='"topk_mask": found 2 columns, allowed at least 3'):
        opferry.compile(node_model(OP, feeds, **attrs)).run(feeds)


def test_memory_that_runs_out_is_an_error_of_ours():
    feeds, attrs = make((1 << 16,), (1,), 1, 1, 1, 1, k=2**31 - 1)
    with pytest.raises(OpferryError, match="the call failed"):
        run(feeds, attrs)


def test_symbolic_head_size_is_refused():
    feeds, attrs = changed()
    with pytest.raises(InvalidNodeError, match='input "query" axis 2: found symbolic'):
        opferry.compile(node_model(OP, feeds, symbolic={"query": {2: "D"}}, **attrs))
