"""The int8 matrix product of warpgroups (sm_90a), in the interpreter of GPU threads, exactly; its
tiles.
"""

from dataclasses import replace

import pytest
import simt
from cuda_gemm_cases import ENTRIES, OUTPUTS, SMALL_WARPGROUP, WEIGHTS, check, kernel, problem

from opferry.relay_ops.orders import Order
from opferry.runtime.errors import UnsupportedError
from opferry.schedules.cuda import gemm, gemm_config
from opferry.schedules.cuda.arch import ARCHS
from opferry.schedules.cuda.gemm_config import configure
from opferry.schedules.cuda.panels import Panels
from opferry.schedules.intrin import hopper

WARPGROUPS = gemm_config._WARPGROUP_TILES


@WEIGHTS
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (65, 33, 100), (64, 129, 400), (130, 17, 1)])
def test_odd_sizes_by_warpgroups(m, n, k, panels):
    check(m, n, k, arch="sm_90a", config=SMALL_WARPGROUP, panels=panels)


@pytest.mark.parametrize("config", WARPGROUPS, ids=lambda c: f"{c.block_m}x{c.block_n}")
def test_tiles_of_warpgroups(config):
    """More steps than stages, tails in all three dimensions, a tile beyond the last panel."""
    m, n, k = config.block_m + 3, config.block_n + 16, config.block_k * (config.stages + 1) + 48
    check(m, n, k, "int32", "sm_90a", config, panels=Panels())


@WEIGHTS
@pytest.mark.parametrize("stages", [3, 5])
def test_stages_of_warpgroups(stages, panels):
    config = replace(SMALL_WARPGROUP, stages=stages)
    check(40, 48, 1100, arch="sm_90a", config=config, panels=panels)


@pytest.mark.parametrize("n", [64, 33])
@pytest.mark.parametrize("out", OUTPUTS)
def test_outputs_of_warpgroups(out, n):
    check(67, n, 70, out, "sm_90a", SMALL_WARPGROUP, panels=Panels())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("order", [Order.ROW, Order.COL32], ids=str)
def test_memory_orders_of_warpgroups(order, entry):
    check(70, 64, 160, "int8", "sm_90a", SMALL_WARPGROUP, entry, 2, order, Panels())


@pytest.mark.parametrize(("m", "k"), [(1, 300), (17, 260), (50, 600)])
def test_few_rows_read_panels(m, k):
    (config,) = configure(problem(m, 100, k), ARCHS["sm_90a"]).values()
    assert not config.wgmma
    check(m, 100, k, arch="sm_90a", panels=Panels())


STEPS = {
    "publish_barriers": "cp.async.bulk on an mbarrier with no fence since",
    "arrive_expecting": "never comes: 1 arrivals",
    "wait_barrier": "written by a copy in flight",
    "fence_shared": "with no fence.proxy.async since it was written",
    "begin_products": "since the last wgmma.fence",
    "commit_products": "while wgmma reads it|wgmma still in flight|written while wgmma",
    "wait_products": "while wgmma reads it",
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_the_pipeline_is_needed(step, monkeypatch):
    """The kernel without it is found out."""
    monkeypatch.setattr(hopper, step, lambda *_: None)
    with pytest.raises(simt.SimtError, match=STEPS[step]):
        check(64, 64, 1100, arch="sm_90a", config=SMALL_WARPGROUP, panels=Panels())


def test_every_barrier_of_the_pipeline_is_needed(monkeypatch):
    monkeypatch.setattr(gemm._Kernel, "_sync", lambda _: None)
    with pytest.raises(simt.SimtError, match=r"no (cta|warp)_sync since"):
        check(64, 64, 1100, arch="sm_90a", config=SMALL_WARPGROUP, panels=Panels())


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (4096, 4096, (128, 256)),
        (2048, 2048, (128, 256)),
        (512, 4096, (128, 128)),
        (1024, 1024, (64, 128)),
        (65, 768, (64, 64)),
    ],
)
def test_tiles_of_warpgroups_by_shape(m, n, tile):
    (config,) = configure(problem(m, n, 4096), ARCHS["sm_90a"]).values()
    assert config.wgmma
    assert (config.block_m, config.block_n) == tile


@pytest.mark.parametrize(
    "fields", [{"warps_n": 2}, {"warps_m": 4}, {"block_k": 64}, {"stages": 2}], ids=str
)
def test_tiles_that_warpgroups_refuse(fields):
    with pytest.raises(UnsupportedError, match="allowed for warpgroups 16 rows and all columns"):
        replace(WARPGROUPS[0], **fields)


@pytest.mark.parametrize("block_n", [8, 40, 136, 192, 320])
def test_columns_that_warpgroups_refuse(block_n):
    with pytest.raises(ValueError, match=f"found block_n {block_n}, allowed .* multiples of 16 up"):
        replace(SMALL_WARPGROUP, block_n=block_n)


@pytest.mark.parametrize("block_n", [16, 48, 96, 112, 128, 256])
def test_columns_of_warpgroups(block_n):
    config = replace(SMALL_WARPGROUP, block_n=block_n)
    check(66, block_n + 17, 200, arch="sm_90a", config=config)


@pytest.mark.parametrize("block_n", [32, 96])
def test_tiles_that_panels_refuse(block_n):
    config = replace(SMALL_WARPGROUP, block_n=block_n)
    message = f"weights in panels: found block_n {block_n}, block_k 128, allowed multiples of 64"
    with pytest.raises(ValueError, match=message):
        kernel(problem(64, 64, 128, panels=Panels()), "sm_90a", config)
    narrow = problem(64, 64, 128, panels=Panels(row_bytes=64))
    with pytest.raises(ValueError, match=r"found block_n 64, block_k 128, .* of 64 and 64"):
        kernel(narrow, "sm_90a", SMALL_WARPGROUP)


def test_architectures_that_have_no_warpgroups():
    with pytest.raises(ValueError, match="wgmma: found sm_90, allowed sm_90a"):
        kernel(problem(64, 64, 128), "sm_90", SMALL_WARPGROUP)
