"""The int8 matrix product for NVIDIA GPUs: what TVM's verifiers say, instructions, registers."""

import functools
import re

import cuda_code
import pytest
from cuda_gemm_cases import WEIGHTS, kernel, problem

from opferry.schedules.cuda.arch import ARCHS
from opferry.schedules.cuda.gemm_config import configure


@functools.lru_cache(maxsize=64)
def func(arch, m, n, entry="row", out="int8", panels=None):
    """The product of m x 1024 and 1024 x n."""
    return kernel(problem(m, n, 1024, out, entry, panels=panels), arch)


@pytest.mark.parametrize(("arch", "m"), cuda_code.swept(ARCHS, [2048, 16, 64, 512]))
def test_tvm_verifies(arch, m):
    cuda_code.verify(func(arch, m, 2048), arch)


@pytest.mark.parametrize(
    ("arch", "m"),
    cuda_code.swept([name for name, arch in ARCHS.items() if not arch.wgmma], [2048, 16, 64]),
)
def test_instructions(arch, m):
    text = cuda_code.source(func(arch, m, 2048), arch)
    old = arch == "sm_75"
    shape = "m8n8k16" if old else "m16n8k32"
    expected = f"mma.sync.aligned.{shape}.row.col.s32.s8.s8.s32"
    assert set(re.findall(r"mma\.sync[\w.]*", text)) == {expected}
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in text
    assert ("cp.async.cg.shared.global" in text) != old
    assert ("ld.global.v4.b32" in text) == old


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_transposed_rows_are_not_loaded_byte_by_byte(arch):
    text = cuda_code.source(func(arch, 2048, 2048, "transposed"), arch)
    assert "prmt.b32" in text
    assert "ld.global.b32" in text


@WEIGHTS
def test_instructions_of_warpgroups(panels):
    text = cuda_code.source(func("sm_90a", 2048, 2048, panels=panels), "sm_90a")
    assert set(re.findall(r"wgmma\.mma_async[\w.]*", text)) == {
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"
    }
    assert "mma.sync." not in text
    assert "ldmatrix" not in text
    assert "cp.async.cg.shared.global" in text
    for instruction in (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.init.shared::cta.b64",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "fence.mbarrier_init.release.cluster",
    ):
        assert (instruction in text) == (panels is not None)
    assert "fence.proxy.async.shared::cta" in text
    assert "extern __shared__ __align__(1024)" in text


@WEIGHTS
def test_few_rows_take_the_instructions_of_warps(panels):
    text = cuda_code.source(func("sm_90a", 64, 2048, panels=panels), "sm_90a")
    assert "wgmma" not in text
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in text


@cuda_code.needs_nvcc
@pytest.mark.parametrize(
    ("m", "n", "entry", "out"),
    [
        (4096, 4096, "row", "int8"),
        (2048, 2048, "row", "float16"),
        (512, 4096, "col32", "int8"),
        (1024, 1024, "row", "int32"),
        (128, 512, "row", "int8"),
        (64, 4096, "row", "bfloat16"),
        (16, 4096, "transposed", "int8"),
        (2048, 2048, "transposed", "int8"),
    ],
)
@pytest.mark.parametrize(
    "arch",
    [a if a in ("sm_75", "sm_80") else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS],
)
def test_registers_and_spills(arch, m, n, entry, out, tmp_path):
    if (arch, out) == ("sm_75", "bfloat16"):
        out = "float16"
    text = cuda_code.source(func(arch, m, n, entry, out), arch)
    (found,) = cuda_code.resources(text, arch, tmp_path)
    assert not found.spilled
    (config,) = configure(problem(m, n, 1024, out), ARCHS[arch]).values()
    assert found.registers * config.threads <= ARCHS[arch].registers_per_sm


@cuda_code.needs_nvcc
@pytest.mark.parametrize(
    ("m", "n", "k", "out"),
    [
        (4096, 4096, 1024, "int8"),
        (2048, 2048, 1024, "float16"),
        (1024, 2048, 1024, "int32"),
        (128, 512, 1024, "bfloat16"),
        (128, 512, 128, "int8"),  # as few steps as this are straight code
        (1024, 2048, 384, "bfloat16"),
        (2048, 2048, 256, "int32"),
    ],
)
@WEIGHTS
def test_registers_and_spills_of_warpgroups(m, n, k, out, panels, tmp_path):
    p = problem(m, n, k, out, panels=panels)
    text = cuda_code.source(kernel(p, "sm_90a"), "sm_90a")
    (found,) = cuda_code.resources(text, "sm_90a", tmp_path)
    assert not found.spilled
    (config,) = configure(p, ARCHS["sm_90a"]).values()
    assert found.registers * config.threads <= ARCHS["sm_90a"].registers_per_sm
