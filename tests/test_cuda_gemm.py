"""The int8 matrix product of warps, in the interpreter of GPU threads, exactly; its tiles."""

from dataclasses import replace

import numpy as np
import pytest
import simt
from cuda_gemm_cases import ENTRIES, OUTPUTS, SMALL, check, int8, kernel, problem
from tvm import relax, tirx

from opferry.relay_ops.orders import Order
from opferry.runtime.errors import UnsupportedError
from opferry.schedules.cuda import gemm_config
from opferry.schedules.cuda.arch import ARCHS, THREAD_REGISTERS
from opferry.schedules.cuda.gemm_config import configure

CONFIGS = dict.fromkeys((*gemm_config._TILES, *gemm_config._STREAMING))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 17, 33), (17, 33, 100), (33, 100, 129), (100, 129, 17), (129, 17, 64)],
)
def test_odd_sizes(m, n, k, arch):
    check(m, n, k, arch=arch)


@pytest.mark.parametrize("k", [32, 40, 36, 34, 31])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_rows_of_every_alignment(k, arch):
    """Copies of 16, 8 and 4 bytes, and single bytes."""
    check(40, 24, k, arch=arch, config=replace(SMALL, stages=2 if arch == "sm_75" else 3))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("n", [64, 33])  # rows of y aligned to 16 bytes, or not
@pytest.mark.parametrize("out", OUTPUTS)
def test_outputs(out, n, arch):
    config = replace(SMALL, stages=2 if arch == "sm_75" else 4)
    check(37, n, 70, out, arch, config)


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize(("m", "k"), [(1, 300), (16, 520), (17, 260), (50, 600)])
def test_few_rows(m, k, out):
    check(m, 40, k, out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_tiles(config):
    """More steps than stages, and tails in all three dimensions."""
    check(config.block_m + 3, config.block_n + 16, config.block_k * config.stages + 48)
    check(config.block_m + 3, config.block_n + 16, config.block_k + 48, config=config)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("order", [Order.ROW, Order.COL32], ids=str)
@pytest.mark.parametrize("m", [5, 70])
def test_memory_orders(m, order, entry):
    config = None if m == 5 else SMALL
    check(m, 64, 96, entry=entry, order=order, batch=2, config=config)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize(("m", "k"), [(4, 3), (68, 130), (70, 130), (200, 100)])
def test_columns_of_consecutive_bytes(m, k, arch):
    """Four rows at a time where m allows it."""
    config = replace(SMALL, stages=2 if arch == "sm_75" else 3)
    check(m, 40, k, arch=arch, entry="transposed", config=config)
    check(m, 40, k, arch=arch, entry="transposed")


def test_columns_of_tiles_that_are_no_whole_sectors():
    check(100, 32, 64, entry="transposed", config=replace(SMALL, block_m=48, warps_m=1))


def test_order_of_tiles():
    """Bands of row tiles, the last one narrower, of several matrices."""
    check(32 * 11 + 5, 70, 16, config=SMALL, batch=2)


@pytest.mark.parametrize("live", [0, 1, 40, 130])
def test_rows_that_nobody_reads(live):
    """Blocks beyond a number of rows that only the device knows leave their memory alone."""
    m, n, k = 130, 48, 64
    p = problem(m, n, k, "int32")
    p = replace(
        p,
        operands=(relax.TensorType((2,), "int64"),),
        epilogue=lambda acc, at, counts: acc,
        live_rows=lambda counts: counts[1],
    )
    rng = np.random.default_rng(live)
    a, b = int8(rng, 1, m, k), int8(rng, 1, n, k)
    y = np.full((1, m, n), 77, np.int32)
    simt.run(kernel(p, config=SMALL), a, b, np.array([-1, live]), y)
    computed = min(-(-live // SMALL.block_m) * SMALL.block_m, m)
    np.testing.assert_array_equal(y[0, :live], (a[0].astype(np.int32) @ b[0].T)[:live])
    assert (y[0, computed:] == 77).all()


def test_no_rows():
    """A part of a graph may have none: nothing is launched."""
    m = tirx.Var("m", "int64")
    p = replace(problem(1, 16, 32), m=m)
    shape = {"a": (1, m, 32), "y": (1, m, 16)}
    p = replace(p, **{name: relax.TensorType(dims, "int8") for name, dims in shape.items()})
    token = relax.TensorType((m,), "float32")
    p = replace(p, operands=(*p.operands[:2], token))
    zeros = np.zeros(16, np.float32)
    none, b = np.zeros((1, 0, 32), np.int8), np.zeros((1, 16, 32), np.int8)
    simt.run(kernel(p), none, b, zeros, zeros, zeros[:0], np.zeros((1, 0, 16), np.int8))


# -- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (4096, 4096, (128, 256)),
        (8192, 4096, (128, 256)),
        (2048, 2048, (128, 128)),
        (512, 4096, (64, 128)),
        (1024, 1024, (64, 64)),
        (128, 768, (32, 32)),
        (64, 4096, (64, 32)),
        (32, 4096, (32, 32)),
        (16, 4096, (16, 32)),
        (1, 768, (16, 16)),
    ],
)
def test_tiles_by_shape(m, n, tile):
    (config,) = configure(problem(m, n, 4096), ARCHS["sm_80"]).values()
    assert (config.block_m, config.block_n) == tile


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("out", OUTPUTS)
def test_every_tile_fits(out, arch):
    for m in (1, 20, 40, 128, 512, 1024, 2048, 8192):
        for n in (64, 1024, 4096):
            (config,) = configure(problem(m, n, 4096, out), arch).values()
            assert not config.wgmma or arch.wgmma
            assert config.shared_bytes(np.dtype(OUTPUTS[out]).itemsize) <= arch.shared_per_block
            assert config.threads * THREAD_REGISTERS <= arch.registers_per_sm


@pytest.mark.parametrize("field", ["block_m", "block_k", "warps_n", "stages"])
def test_tiles_of_nothing(field):
    with pytest.raises(UnsupportedError, match=f"{field}: found 0, allowed 1 or more"):
        replace(SMALL, **{field: 0})


@pytest.mark.parametrize(
    "fields",
    [{"block_m": 24}, {"block_n": 40}, {"warps_n": 4}, {"block_k": 96, "warps_k": 2}, {"stages": 1}]
    + [{"block_k": 80}],
    ids=str,
)
def test_tiles_that_warps_refuse(fields):
    with pytest.raises(ValueError, match="allowed 16 rows and 16 columns a warp or multiples"):
        replace(SMALL, **fields)
