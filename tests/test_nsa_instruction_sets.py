"""NPUNsaCompressAttention by the instructions of each CPU: products on matrix tiles, streamed
outputs, rows that share registers.
"""

import numpy as np
import pytest
from compile_once import compile_once
from hosts import on
from nsa_cases import BF16, F16, F32, OP, assert_matches, make, run

import opferry
from opferry.frontend.builders import node_model
from opferry.schedules.llvm import nsa_stream


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


HIDDEN = [("mean", BF16), ("zero", BF16), ("mean", F32), ("zero", F16)]


@pytest.mark.parametrize(("masked_rows", "dtype"), HIDDEN, ids=str)
def test_hidden_groups_on_matrix_tiles(masked_rows, dtype):
    """Groups of keys that no row sees stand before, between and behind the others; of the second
    task one row sees nothing.
    """
    feeds, attrs = make((40,), (301,), 4, 2, 16, 16, dtype, k=16, masked_rows=masked_rows)
    mask = np.ones((40, 301), bool)
    mask[:, 40:50] = mask[:, 120:121] = mask[1:, 200:231] = False
    mask[35] = True
    feeds["atten_mask"] = mask
    assert_matches(feeds, attrs, run(feeds, attrs, on("x86-amx")))


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("x86-amx", BF16),
        ("x86-amx", F16),
        ("x86-amx", F32),
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


@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("row", [0, 3, 15, 39])
def test_a_row_of_nan_is_alone(row, dtype):
    """Query rows share registers and tiles, not results."""
    feeds, attrs = make((40,), (70,), 4, 1, 32, 32, dtype, atten="bool", k=4)
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
