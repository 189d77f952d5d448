"""SpeedFusionAttention for NVIDIA GPUs: what TVM's verifiers say, instructions, registers, shared
memory.
"""

import functools
import re

import cuda_code
import numpy as np
import pytest
from cuda_attention_cases import BF16, CAUSAL, F16, F32, config, inputs, kernel, node, packed

from opferry.schedules.cuda import arch as architectures
from opferry.schedules.cuda.override import overriding


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
