"""NPUNsaCompressAttention for NVIDIA GPUs: the kernel of every mode in the interpreter of GPU
threads against the NumPy reference, the instructions it consists of, the registers it takes, the
keys it skips.
"""

import functools
import re

import cuda_code
import ml_dtypes
import numpy as np
import pytest
import simt
from nsa_cases import CASES, EXAMPLE, EXAMPLE_ATTRS, SYMBOLIC, causal, make

from opferry.driver import target as targets
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare
from opferry.relay_ops.nsa_compress_attention import KERNEL_NAME, Problem
from opferry.relay_ops.op import KERNEL
from opferry.schedules.cuda import arch as architectures
from opferry.schedules.cuda import nsa_config
from opferry.schedules.cuda.override import overriding

OP = "NPUNsaCompressAttention"
OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")
F32, F16, BF16 = np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
FLT_MAX = np.finfo(np.float32).max


def kernel(feeds, attrs, arch="sm_80", outputs=OUTPUTS, symbolic=None):
    """The PrimFunc of the node that ``feeds`` and ``attrs`` describe."""
    model = node_model(OP, feeds, list(outputs), symbolic=symbolic, **attrs)
    module = import_model(prepare(load(model), None), targets.resolve(f"cuda-{arch}")).module
    (func,) = (
        func
        for func in module.functions.values()
        if func.attrs and func.attrs.get(KERNEL) == KERNEL_NAME
    )
    return func


def execute(func, feeds, attrs, blocks=None):
    """Outputs by name, from memory that was NaN or -77."""
    query, key, value = (feeds[name] for name in ("query", "key", "value"))
    like = {
        "softmax_max": ((*query.shape[:2], 8), F32),
        "softmax_sum": ((*query.shape[:2], 8), F32),
        "attention_out": ((*query.shape[:2], value.shape[2]), query.dtype),
        "topk_indices_out": ((len(query), key.shape[1], attrs["select_block_count"]), "int32"),
    }
    found, args = {}, []
    for param in func.params:
        name = param.name
        if name in like:
            shape, dtype = like[name]
            found[name] = np.full(shape, -77 if dtype == "int32" else np.nan, dtype)
            args.append(found[name])
        else:
            args.append(np.array(feeds[name], order="C"))
    simt.run(func, *args, blocks=blocks)
    return found


def check(feeds, attrs, arch="sm_80", outputs=OUTPUTS, symbolic=None):
    """Every output against the reference, within the tolerances of the specification."""
    found = execute(kernel(feeds, attrs, arch, outputs, symbolic), feeds, attrs)
    verdicts = compare(OP, feeds, attrs, [found.get(name) for name in OUTPUTS])
    assert len(verdicts) == len(outputs)
    assert all(verdict.ok for verdict in verdicts), verdicts
    return found


# -- numerics -------------------------------------------------------------------------------------

# What the cases for the CPU have in common with these: everything but the order of the sums.
ALWAYS = ["one row, one key", "short heads", "float16", "bfloat16", "bfloat16, odd heads"]
ALWAYS += ["float32", "G 1", "G 16", "G 64", "l = d = l'", "l % d != 0", "big heads"]
ALWAYS += ["window longer than the sequence", "shift r of an odd window", "k beyond the blocks"]
ALWAYS += ["empty sequences", "no keys at all", "unused rows", "unused rows by token", "scale 0"]
ALWAYS += ["scale negative", "large scores"]


@pytest.mark.parametrize(
    "name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_matches_the_reference(name):
    check(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90"])
def test_every_architecture_matches_the_reference(name, arch):
    check(*CASES[name], arch)


@pytest.mark.parametrize(
    ("dtype", "arch"), [(F16, "sm_75"), (BF16, "sm_75"), (F32, "sm_75"), (BF16, "sm_86")], ids=str
)
def test_every_way_to_multiply(dtype, arch):
    check(*make((9, 2), (75, 19), 8, 2, 24, 20, dtype, atten="bool", topk="bool", k=6), arch)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("d", "dv"), [(192, 128), (128, 128)])
def test_the_usual_head_sizes(d, dv, dtype):
    check(*make((9,), (70,), 16, 1, d, dv, dtype, atten="bool", topk="bool", k=16))


def test_symbolic_sizes():
    feeds, attrs = make((19, 4), (70, 33), 8, 2, 24, 20, F16, atten="bool", topk="bool")
    check(feeds, attrs, symbolic=SYMBOLIC)


@pytest.mark.parametrize("group", [2, 4, 8, 32, 64])
def test_sums_over_heads(group):
    """Heads of a group within half a fragment, a warp, several warps."""
    check(*make((5,), (40,), group, 1, 16, 16, F16, atten="bool", k=9))


def test_worked_example():
    got = check(EXAMPLE, EXAMPLE_ATTRS)
    lanes = got["softmax_max"].reshape(6, 8)[:, 0]
    np.testing.assert_allclose(lanes, [-FLT_MAX, 1, 1, -FLT_MAX, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(
        got["topk_indices_out"][:, 0], [[0, 1, -1], [0, 1, -1], [1, 0, -1]]
    )


@pytest.mark.parametrize("wanted", [[name] for name in OUTPUTS] + [list(OUTPUTS[1::2])], ids=str)
def test_outputs_that_are_not_asked_for(wanted):
    feeds, attrs = make((9, 2), (75, 0), 4, 2, 16, 16, F16, atten="bool", topk="bool", spare=(2, 0))
    check(feeds, attrs, outputs=wanted)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_rows_without_a_visible_key(masked_rows, dtype):
    feeds, attrs = make((19, 4), (70, 33), 4, 2, 16, 16, dtype, atten="uint8", topk="bool")
    feeds["atten_mask"][::3] = 1
    check(feeds, attrs | {"masked_rows": masked_rows})


@pytest.mark.parametrize("masked_rows", ["mean", "zero"])
def test_causal_prefill(masked_rows):
    """Whole tiles are masked: the first rows see nothing, late keys are seen by the last only."""
    rows, keys, every = 70, 130, 30  # one row in thirty of a long sequence
    feeds, attrs = make((rows,), (keys,), 4, 2, 16, 16, BF16, k=16, masked_rows=masked_rows)
    feeds["atten_mask"] = causal(rows * every, keys, 32, 16)[::every]
    t = np.arange(rows)[:, None] * every // 64
    j = np.arange(-(-keys // 4))[None]
    feeds["topk_mask"] = (j == 0) | ((j >= t - 1) & (j <= t))
    check(feeds, attrs)


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("sizes", [(32, 16, 64), (64, 16, 64), (16, 16, 16)], ids=str)
def test_more_blocks_than_one_turn_scores(sizes, k, monkeypatch):
    """The best blocks so far are carried from turn to turn; windows reach across their borders."""
    monkeypatch.setattr(nsa_config, "_ENOUGH_BLOCKS", (8,))
    keys = 90 if sizes[2] > 16 else 29
    check(*make((3, 2), (keys, 7), 8, 2, 16, 16, F16, sizes=sizes, topk="bool", k=k))


def test_equal_scores_of_several_turns_are_chosen_in_order(monkeypatch):
    monkeypatch.setattr(nsa_config, "_ENOUGH_BLOCKS", (4,))
    feeds, attrs = make((1,), (40,), sizes=(16, 16, 16), k=7, scale_value=0.0)
    feeds["topk_mask"] = np.zeros((1, 40), bool)
    feeds["topk_mask"][0, [5, 21, 22]] = True
    got = execute(kernel(feeds, attrs), feeds, attrs)["topk_indices_out"]
    np.testing.assert_array_equal(got[0], [[5, 21, 22, 0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("topk", ["bool", None])
@pytest.mark.parametrize("fields", [{}, {"blocks": 8, "listed": 5}], ids=["one turn", "turns"])
def test_indices_of_several_passes(fields, topk):
    """Every pass goes on behind the last index of the one before, ties and forced blocks too."""
    feeds, attrs = make((3, 2, 1), (90, 7, 0), 2, 2, 16, 16, F16, topk=topk, k=17)
    with overriding("NsaConfig", {"chosen": 5, "passes": 4, **fields}):
        check(feeds, attrs)
        found = check(feeds, attrs | {"scale_value": 0.0})
    assert (found["topk_indices_out"][:3] >= 0).all()


def test_nothing_outside_of_the_sequences_is_looked_at():
    """Spare rows, and the keys of a sequence without queries."""
    feeds, attrs = make((5, 0, 3), (9, 20, 6), spare=(5, 7), atten="bool", topk="bool")
    for name in ("key", "value"):
        feeds[name][9:29] = np.inf
    got = check(feeds, attrs)
    assert not any(np.isnan(got[name]).any() for name in OUTPUTS)


def test_a_masked_key_may_be_nan():
    feeds, attrs = make((5,), (9,), atten="bool")
    feeds["atten_mask"][:, 4] = True
    func = kernel(feeds, attrs)
    clean = execute(func, feeds, attrs)
    feeds["key"][4] = np.nan
    again = execute(func, feeds, attrs)
    assert all(again[name].tobytes() == clean[name].tobytes() for name in OUTPUTS)


@pytest.mark.parametrize(
    "ends", [[-5, 40, 60], [7, 3, 60], [7, 90, 60], [7, 1 << 40, 60], [-(1 << 40)] * 3], ids=str
)
def test_lists_that_nobody_checked_stay_inside(ends):
    """Values computed in the graph: the interpreter refuses every access out of bounds."""
    feeds, attrs = make((7, 30, 23), (7, 30, 23), dtype=F16, atten="bool", topk="bool")
    func = kernel(feeds, attrs)
    for name in ("actual_seq_qlen", "actual_cmp_seq_kvlen"):
        execute(func, feeds | {name: np.array(ends)}, attrs)


# -- what is computed and kept --------------------------------------------------------------------


def test_tiles_that_no_row_sees_are_not_computed():
    """The first tile of query rows sees some of the second tile of keys only; a product with the
    others, even with weights of 0, would show.
    """
    feeds, attrs = make((16,), (300,), 16, 1, 16, 16, F16, k=16)
    config = config_of("float16", 16, 16)
    rows, keys = config.positions, config.tiles.keys
    mask = np.zeros((16, 300), bool)
    mask[:rows] = True
    mask[:rows, keys + 6 : 2 * keys - 7] = False
    feeds["atten_mask"] = mask
    func = kernel(feeds, attrs)
    whole = execute(func, feeds, attrs)
    for name in ("key", "value"):
        feeds[name][:keys] = np.nan
        feeds[name][2 * keys :] = np.nan
    got = execute(func, feeds, attrs)
    for name in ("attention_out", "topk_indices_out"):
        np.testing.assert_array_equal(got[name][:rows], whole[name][:rows])
    assert np.isnan(got["attention_out"][rows:].astype("float32")).any()


def test_nothing_of_the_size_of_the_scores_is_in_global_memory():
    """One kernel reads the mask and leaves three numbers a row."""
    feeds, attrs = make((9,), (70,), 4, 2, 16, 16, F16, atten="bool", topk="bool")
    script = kernel(feeds, attrs, symbolic=SYMBOLIC).script()
    kept = re.findall(r"(\w+) = T\.(?:sblock_)?alloc_buffer\(\((.*?)\)(.*)", script)
    assert kept
    in_global = [shape for _, shape, rest in kept if "scope" not in rest]
    assert len(in_global) == 1
    assert in_global[0].endswith(", 3")


def test_two_launches_with_a_mask_and_one_without():
    with_mask, without = (
        kernel(*make((9,), (70,), 4, 2, 16, 16, F16, atten=mask)).script()
        for mask in ("bool", None)
    )
    assert with_mask.count('thread="blockIdx.x"') == 2
    assert without.count('thread="blockIdx.x"') == 1


# -- instructions, registers, shared memory -------------------------------------------------------


def problem(dtype, head_size, value_size, group=16, k=16, stride=4, outputs=OUTPUTS):
    return Problem(
        label="node",
        dtype=dtype,
        query_heads=4 * group,
        key_heads=4,
        head_size=head_size,
        value_size=value_size,
        scale=0.1,
        blocks_stride=stride,
        keys_stride=min(stride, 2),
        score_shift=0,
        block_count=k,
        atten_mask="bool",
        topk_mask="bool",
        zero_masked_rows=False,
        softmax_by_token=False,
        outputs=frozenset(outputs),
    )


def config_of(dtype, head_size, value_size, arch="sm_80", **rest):
    record = architectures.ARCHS[arch]
    return nsa_config.configure(problem(dtype, head_size, value_size, **rest), record)


@functools.lru_cache(maxsize=32)
def func(arch, dtype, head_size, value_size, group=16, k=16):
    """A kernel with everything."""
    feeds, attrs = make(
        *((3,), (10,), 4 * group, 4, head_size, value_size, np.dtype(dtype)),
        **{"atten": "bool", "topk": "bool", "k": k},
    )
    return kernel(feeds, attrs, arch, symbolic=SYMBOLIC)


@functools.lru_cache(maxsize=32)
def source(arch, *args):
    return cuda_code.source(func(arch, *args), arch)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_size"),
    cuda_code.swept(architectures.ARCHS, [("float16", 192), ("bfloat16", 64)]),
)
def test_tvm_verifies(arch, dtype, head_size):
    cuda_code.verify(func(arch, dtype, head_size, min(head_size, 128)), arch)


MMA = {
    ("sm_75", "float16"): "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    ("sm_80", "float16"): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ("sm_80", "bfloat16"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}


@pytest.mark.parametrize("arch", architectures.ARCHS)
def test_instructions(arch):
    old = arch == "sm_75"
    dtype = "float16" if old else "bfloat16"
    text = source(arch, dtype, 192, 128)
    assert set(re.findall(r"mma\.sync[\w.]*", text)) == {MMA["sm_75" if old else "sm_80", dtype]}
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in text
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in text
    assert ("cp.async.cg.shared.global" in text) != old
    assert "ex2.approx.ftz.f32" in text
    assert "atom" not in text.split('extern "C"', 1)[1]  # sums have one order


def test_float32_is_not_rounded_to_narrower_products():
    text = source("sm_80", "float32", 64, 64)
    assert "mma" not in text
    assert "tf32" not in text


QUICK = [("sm_75", "float16", 192, 128), ("sm_80", "bfloat16", 192, 128)]
QUICK += [("sm_90", "bfloat16", 192, 128), ("sm_75", "bfloat16", 128, 128)]
EVERY = [
    (arch, dtype, *sizes)
    for arch in architectures.ARCHS
    for dtype in ("float16", "bfloat16")
    if (arch, dtype) != ("sm_75", "bfloat16")
    for sizes in ((192, 128), (128, 128), (64, 64), (256, 256))
]
EVERY += [("sm_75", "bfloat16", 128, 128)]
EVERY += [("sm_75", "float32", 192, 128), ("sm_75", "bfloat16", 192, 128)]
EVERY += [("sm_80", "float32", 192, 128), ("sm_90", "float32", 128, 128)]
EVERY += [(arch, "float16", 192, 128, 1, 100) for arch in ("sm_75", "sm_80", "sm_90")]
KEPT = {
    ("sm_75", "float16", 64, 64): 24,
    ("sm_75", "float32", 192, 128): 16,
    ("sm_75", "bfloat16", 192, 128): 16,
    ("sm_80", "float16", 192, 128, 1, 100): 24,
    ("sm_90", "float16", 192, 128, 1, 100): 24,
}
"""Bytes that the compiler puts aside, to have another block on a multiprocessor: coordinates of the
block, needed once for each turn of the selection.
"""


@cuda_code.needs_nvcc
@pytest.mark.parametrize(
    "case",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in EVERY],
    ids=lambda case: "-".join(map(str, case)),
)
def test_registers_and_spills(case, tmp_path):
    arch, kept = case[0], KEPT.get(case, 0)
    for found in cuda_code.resources(source(*case), arch, tmp_path):
        assert found.spilled <= kept


@pytest.mark.parametrize("arch", architectures.ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32, 64])
def test_every_tile_fits(group, dtype, arch):
    record = architectures.ARCHS[arch]
    for sizes in ((192, 128), (128, 128), (64, 64), (8, 7)):
        for stride in (1, 4):
            found = config_of(dtype, *sizes, arch, group=group, stride=stride)
            assert found.shared_bytes <= record.shared_per_block
            assert found.tiles.rows == found.positions * group
            registers = found.tiles.threads * architectures.THREAD_REGISTERS
            assert registers <= record.registers_per_sm


def test_two_blocks_share_a_multiprocessor():
    for arch in ("sm_80", "sm_90"):
        found = config_of("bfloat16", 192, 128, arch)
        assert found.tiles.rows == 128
        both = 2 * (found.shared_bytes + 1024)
        assert both <= architectures.ARCHS[arch].shared_per_sm


def test_more_indices_than_shared_memory_holds_take_passes():
    for arch in architectures.ARCHS:
        found = config_of("float16", 192, 128, arch, group=1, k=5000)
        assert found.passes * found.chosen >= 3500 > found.chosen
        assert found.shared_bytes <= architectures.ARCHS[arch].shared_per_block
    assert config_of("float16", 192, 128, "sm_86", group=16, k=5000).listed == 0
