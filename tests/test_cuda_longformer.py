"""QOrderedLongformerAttention for NVIDIA GPUs: the whole node with its kernels in the interpreter
of GPU threads, against the NumPy reference; the tiles that are not computed; instructions,
registers and shared memory.
"""

import functools
import re

import cuda_code
import longformer_cases
import numpy as np
import pytest
import simt
from longformer_cases import (
    AT_RUN_TIME,
    EXAMPLE,
    EXAMPLE_ATTRS,
    EXAMPLE_OUTPUT,
    attributes,
    f32,
)
from simt import graph

from opferry.driver import device_code
from opferry.driver import target as targets
from opferry.driver.build import generate
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import prepare
from opferry.reference.compare import compare
from opferry.relay_ops.orders import Order
from opferry.relay_ops.qordered_longformer_attention import Problem
from opferry.runtime.errors import UnsupportedError
from opferry.schedules.cuda import longformer
from opferry.schedules.cuda.arch import ARCHS, THREAD_REGISTERS
from opferry.schedules.cuda.longformer_block import shared_bytes

OP = "QOrderedLongformerAttention"
ROW, COL32, COL4_4R2_8C, COL32_2R_4R4 = 1, 2, 3, 4
QUICKLY = [a if a in ("sm_75", "sm_80") else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]


def data(batch, seq, hidden, counts, padding=0.2):
    """input, mask and flags; counts[b] global tokens in batch entry b, anywhere."""
    return longformer_cases.data([batch, seq, hidden], batch, seq, hidden, counts, padding)


def weights(hidden):
    """The other operands; one global scale for each column."""
    fixed = longformer_cases.weights(hidden, hidden, scalar_shape=(1,))
    scale = longformer_cases.weights(hidden, hidden, per_column=3 * hidden)["scale_global_weight"]
    return fixed | {"scale_global_weight": scale}


def imported(N, D, W, orders, arch, shape):
    """The node for a target; B and S of ``shape``, or open."""
    fixed = weights(N * D)
    feeds = {**fixed, **data(*(shape or (1, 2 * W)), N * D, [0])}
    symbolic = {name: {0: "B", 1: "S"} for name in AT_RUN_TIME} if shape is None else None
    attrs = attributes(N, W, orders)
    model = node_model(OP, feeds, initializers=[*fixed], symbolic=symbolic, **attrs)
    return import_model(prepare(model, None), targets.resolve(f"cuda-{arch}"))


@functools.cache
def build(N, D, W, orders=(ROW, 0, 0), arch="sm_80", shape=None):
    """(function of the run-time inputs, its weights, attributes)."""
    found = imported(N, D, W, orders, arch, shape)
    names = [spec.name for spec in found.inputs]
    call = graph.executable(found.module)
    return (
        lambda feeds: call(*(feeds[name] for name in names))[0],
        weights(N * D),
        attributes(N, W, orders),
    )


def check(built, values):
    call, fixed, attrs = built
    feeds = {**fixed, **values}
    y = call(feeds)
    (verdict,) = compare(OP, feeds, attrs, [y])
    assert verdict.ok, verdict
    return y


# -- the node -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_worked_example(arch):
    stored = [name for name in EXAMPLE if name not in AT_RUN_TIME]
    model = prepare(node_model(OP, EXAMPLE, initializers=stored, **EXAMPLE_ATTRS), None)
    found = import_model(model, targets.resolve(f"cuda-{arch}"))
    call = graph.executable(found.module)
    (y,) = call(*(EXAMPLE[spec.name] for spec in found.inputs))
    assert y.tolist() == EXAMPLE_OUTPUT


# N, D, W, then (B, blocks of 2W, global tokens of the batch entries).
SHAPES = {
    "tiny": (1, 1, 1, [(3, 2, [1, 0, 4])]),
    "odd head": (3, 5, 3, [(2, 1, [0, 6]), (1, 9, [20])]),
    "head 12": (2, 12, 10, [(1, 5, [1])]),
    "head 40": (2, 40, 33, [(2, 3, [5, 0])]),
    "head 64, several tiles": (1, 64, 32, [(1, 5, [1]), (1, 6, [140])]),
    "head 96": (1, 96, 8, [(1, 9, [2])]),
    "head 160": (1, 160, 16, [(1, 3, [2])]),
    "wide window": (1, 16, 150, [(1, 1, [9])]),
    "divided keys": (1, 8, 64, [(2, 11, [1, 500])]),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    """One module serves every batch size and length."""
    N, D, W, runs = shape
    built = build(N, D, W)
    for batch, blocks, counts in runs:
        check(built, data(batch, 2 * W * blocks, N * D, counts))


@pytest.mark.parametrize("arch", ["sm_75", "sm_86"])
def test_architectures(arch):
    check(build(2, 24, 10, arch=arch, shape=(2, 60)), data(2, 60, 48, [3, 0]))


@pytest.mark.parametrize(
    ("N", "D", "orders"),
    [
        pytest.param(2, 16, (COL32, COL4_4R2_8C, COL4_4R2_8C), marks=pytest.mark.slow),
        (3, 32, (COL32, COL32_2R_4R4, COL4_4R2_8C)),
        (8, 12, (COL32, COL4_4R2_8C, COL32_2R_4R4)),
    ],
    ids=str,
)
def test_tiled_orders(N, D, orders):
    built = build(N, D, 3, orders)
    for batch, seq, counts in [(2, 18, [2, 0]), (1, 6, [0])]:
        check(built, data(batch, seq, N * D, counts))


def test_masks():
    """Padded rows are zeros; zero of either sign is a token; other values shift the scores."""
    built = build(1, 16, 8)
    values = data(2, 160, 16, [3, 0])
    values["mask"][0] = np.random.default_rng(0).choice(
        np.array([0, -0.0, 2.5, -np.inf, -65504, -1e-7], np.float16), 160
    )
    values["mask"][1] = -10000
    y = check(built, values)
    assert not y[values["mask"] < 0].any()


def test_padding_at_the_end():
    """Tiles without a token are not computed, and zeros all the same."""
    values = data(1, 320, 16, [2], padding=0)
    values["mask"][:, 100:] = -65504
    check(build(1, 16, 8), values)


def test_large_scores():
    """Projections at the ends of int8 with a large scale: weights of one key."""
    call, fixed, attrs = build(1, 16, 8)
    values = data(1, 48, 16, [1])
    values["input"] = np.where(values["input"] < 0, -128, 127).astype(np.int8)
    check((call, fixed, attrs), values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_sweep(seed):
    rng = np.random.default_rng(seed)
    N, D, W = (int(rng.integers(1, top)) for top in (4, 100, 40))
    batch, blocks = (int(rng.integers(1, top)) for top in (3, 6))
    seq = 2 * W * blocks
    counts = [int(rng.integers(0, min(seq, 40))) for _ in range(batch)]
    arch = str(rng.choice(list(ARCHS)))
    check(build(N, D, W, arch=arch), data(batch, seq, N * D, counts))


@pytest.mark.parametrize("orders", [(ROW, 0, 0), (COL32, COL4_4R2_8C, COL4_4R2_8C)], ids=str)
@pytest.mark.parametrize("shape", [None, (2, 32)], ids=["symbolic", "static"])
def test_the_whole_node_becomes_cuda(orders, shape):
    """Every kernel runs on the GPU, and the host does not wait for the number of global tokens."""
    target = targets.resolve("cuda-sm_80")
    module = generate(imported(2, 32, 8, orders, "sm_80", shape), target)
    (source,) = device_code.sources(module.mod)
    kernels = set(re.findall(r"__global__ void .*?(\w+)_kernel", source))
    names = ("attention", "gather_global_rows", "gemm", "global_tokens")
    assert {f"qordered_longformer_attention_{name}" for name in names} <= kernels
    assert "to_vdevice" not in module.as_text()
    assert not graph.waits(module)
    declared = set(re.findall(r"extern __shared__ .* (\w+)\[\];", source))
    assert len(declared) == len(set(re.findall(r"extern __shared__ .*", source)))
    assert {"shared_float16_ptr", "shared_int8_ptr"} <= declared


@cuda_code.needs_nvcc
def test_the_whole_node_becomes_machine_code():
    """Its kernels stand in one text: what they declare does not clash."""
    target = targets.resolve("cuda-sm_80")
    module = generate(imported(12, 64, 256, (ROW, 0, 0), "sm_80", (1, 2048)), target)
    (source,) = device_code.sources(module.mod)
    device_code.compile_source(source, "sm_80")


# -- the kernels ----------------------------------------------------------------------------------


def problem(N, D, W, batch=1, seq=64, order=Order.ROW):
    return Problem(batch, seq, N, D, W, order)


def tokens(flags):
    """What the kernel ``global_tokens`` finds, from memory that held something else."""
    B, S = flags.shape
    func = longformer.global_tokens(problem(1, 16, 1, B, S), targets.resolve("cuda-sm_80"))
    found = [np.full(shape, -9, np.int32) for shape in ((B, S), (B, S + 1), B)]
    found.append(np.full(2, -9, np.int64))
    simt.run(func, flags, *found)
    return found


@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 33), (40, 7), (2, 2100)])
@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_global_tokens(share, B, S):
    flags = (np.random.default_rng(S).random((B, S)) < share).astype(np.int32) * -3
    positions, rank, offsets, sizes = tokens(flags)
    for b in range(B):
        (expected,) = flags[b].nonzero()
        assert positions[b, : len(expected)].tolist() == expected.tolist()
        assert (positions[b, len(expected) :] == -9).all()
    counts = (flags != 0).sum(1)
    assert (rank[:, 1:] == (flags != 0).cumsum(1)).all()
    assert (rank[:, 0] == 0).all()
    assert offsets.tolist() == (counts.cumsum() - counts).tolist()
    assert sizes.tolist() == [counts.sum(), B * S if counts.sum() else 0]


def attend(func, feeds, blocks=None):
    y = np.full((1, feeds["rank"].shape[1] - 1, feeds["gq"].shape[2]), 99, np.int8)
    simt.run(func, *feeds.values(), y, blocks=blocks)
    return y


def test_keys_out_of_reach_are_not_computed():
    """The mask is NaN there: a score of such a key, even with a weight of 0, would show."""
    S, D, W, rows = 640, 16, 32, 128
    rng = np.random.default_rng(1)
    flags = np.zeros((1, S), np.int32)
    flags[0, 300] = 1
    positions, rank, offsets, _ = tokens(flags)
    positions[positions < 0] = 0
    feeds = {
        "qkv": rng.integers(-128, 128, (1, S, 3 * D), np.int8),
        "gq": rng.integers(-128, 128, (1, S, D), np.int8),
        "gkv": rng.integers(-128, 128, (1, S, 2 * D), np.int8),
        "mask": np.zeros((1, S), np.float16),
        "positions": positions,
        "rank": rank,
        "offsets": offsets,
        "scale_qkv_gemm": f32(0.03),
        "scale_global_gemm": f32(0.03),
        "scale_output": f32(0.02),
    }
    p = problem(1, D, W, 1, S)
    func = longformer.attention(p, targets.resolve("cuda-sm_80"))
    whole = attend(func, feeds)
    assert longformer.configure(p, ARCHS["sm_80"]).rows == rows
    for tile in range(S // rows):
        first, last = tile * rows, (tile + 1) * rows
        far = np.ones(S, bool)
        far[max(first - W, 0) : last + W] = False
        far[300] = False
        mask = np.where(far, np.float16(np.nan), np.float16(0))[None]
        got = attend(func, feeds | {"mask": mask}, [(S // rows + tile, 0, 0)])
        np.testing.assert_array_equal(
            got[:, first:last],
            np.where(np.arange(first, last)[:, None] == 300, 99, whole[:, first:last]),
        )


def test_heads_that_are_too_wide():
    with pytest.raises(UnsupportedError, match="found head size 257, allowed at most 256"):
        longformer.attention(problem(1, 257, 4), targets.resolve("cuda-sm_80"))


# -- instructions, registers, shared memory -------------------------------------------------------


def func(arch, kernel, D=64, order=Order.ROW):
    """A kernel of 12 heads of D channels, window 256, 4,096 tokens."""
    return _func(arch, kernel, D, order)


@functools.lru_cache(maxsize=64)
def _func(arch, kernel, D, order):
    build = getattr(longformer, kernel)
    return build(problem(12, D, 256, 2, 4096, order), targets.resolve(f"cuda-{arch}"))


KERNELS = ("attention", "global_tokens", "gather_global_rows")


@pytest.mark.parametrize(("arch", "kernel"), cuda_code.swept(ARCHS, KERNELS))
def test_tvm_verifies(arch, kernel):
    cuda_code.verify(func(arch, kernel), arch)


@pytest.mark.parametrize("arch", QUICKLY)
def test_instructions(arch):
    text = cuda_code.source(func(arch, "attention"), arch)
    depth = 8 if arch == "sm_75" else 16
    expected = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.f16.f16.f32"
    assert set(re.findall(r"mma\.sync[\w.]*", text)) == {expected}
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in text
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in text
    assert "ld.global.v2.b32" in text
    assert "ex2.approx.ftz.f32" in text


@pytest.mark.parametrize(("D", "width"), [(64, ".v2.b32"), (96, ".v2.b32"), (40, ".b16")])
def test_bytes_of_a_store(D, width):
    """Eight where heads are whole 32 channels, otherwise two."""
    text = cuda_code.source(func("sm_80", "attention", D), "sm_80")
    assert set(re.findall(r"st\.global(\S*\.b\d+)", text)) == {width}


@cuda_code.needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "D", "order"),
    [
        ("attention", 64, Order.ROW),
        ("attention", 128, Order.COL32),
        ("attention", 192, Order.ROW),
        ("attention", 256, Order.ROW),
        ("global_tokens", 64, Order.ROW),
        ("gather_global_rows", 64, Order.COL32),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", QUICKLY)
def test_registers_and_spills(arch, kernel, D, order, tmp_path):
    text = cuda_code.source(func(arch, kernel, D, order), arch)
    # Head size 256 on sm_75: coordinates of the block, needed again after the loop over the keys.
    kept = 32 if (arch, kernel, D) == ("sm_75", "attention", 256) else 0
    for found in cuda_code.resources(text, arch, tmp_path):
        assert found.spilled <= kept


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("D", [1, 64, 128, 256])
def test_every_tile_fits(D, arch):
    config = longformer.configure(problem(2, D, 32), arch)
    assert shared_bytes(config) <= arch.shared_per_block
    assert config.threads * THREAD_REGISTERS <= arch.registers_per_sm
