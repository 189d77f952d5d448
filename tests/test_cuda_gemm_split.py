"""The int8 matrix product divided along K among blocks."""

from dataclasses import replace

import cuda_code
import pytest
from cuda_gemm_cases import SMALL_WARPGROUP, WEIGHTS, check, kernel_of, problem
from tvm import relax, tirx

from opferry.relay_ops.orders import Order
from opferry.schedules.cuda import gemm, gemm_config, gemm_split
from opferry.schedules.cuda.arch import ARCHS
from opferry.schedules.cuda.gemm_config import GemmConfig, configure
from opferry.schedules.cuda.override import overriding
from opferry.schedules.cuda.panels import Panels


def check_parts(parts, config, m, n, k, out, arch, entry, batch, order, panels=None):
    """Among blocks: as one block computes it, to the bit."""

    def divided(p, configs, record):
        return gemm_split.emit(p, config, gemm_split.SplitConfig(parts), record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "emit", divided)
        check(m, n, k, out, arch, config, entry, batch, order, panels)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize(
    ("m", "n", "entry", "order", "batch"),
    [
        (1, 17, "row", Order.ROW, 1),
        (5, 64, "col32", Order.COL32, 2),
        (37, 40, "transposed", Order.ROW, 1),
    ],
)
@pytest.mark.parametrize("out", ["int8", "float16"])
def test_parts_of_k(out, m, n, entry, order, batch, arch):
    k, stages = 2048, 2 if arch == "sm_75" else 4
    config = replace(gemm_config._STREAMING[0], stages=stages)
    check_parts(4, config, m, n, k, out, arch, entry, batch, order)
    p = problem(m, n, k, out, entry, batch, order)
    assert kernel_of(p, arch).attrs["global_symbol"] == "int8_gemm_split"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("m", "n", "parts"), [(1, 66, 4), (17, 40, 2), (70, 130, 4)])
@pytest.mark.parametrize("panels", [Panels(), None], ids=["panels", "rows"])
def test_parts_of_k_on_hopper(panels, m, n, parts, batch):
    """By the instructions of warps and of warpgroups, one panel after another or by rows."""
    config = SMALL_WARPGROUP if m > 64 else gemm_config._STREAMING[0]
    check_parts(parts, config, m, n, 2048, "int8", "sm_90a", "row", batch, Order.ROW, panels)


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [(1, 768, 4096, 4), (16, 768, 3072, 4), (16, 4096, 4096, 1), (1, 768, 4096 + 128, 1)]
    + [(128, 256, 4096, 4), (128, 256, 1152, 1), (512, 4096, 4096, 1)],
)
@pytest.mark.parametrize("panels", [Panels(), None], ids=["panels", "rows"])
def test_parts_by_shape_on_hopper(panels, m, n, k, parts):
    p = problem(m, n, k, panels=panels)
    (config,) = configure(p, ARCHS["sm_90a"]).values()
    assert gemm_split.choose(p, config, ARCHS["sm_90a"]).parts == parts
    name = "int8_gemm_split" if parts > 1 else "int8_gemm"
    assert kernel_of(p, "sm_90a").attrs["global_symbol"] == name


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [(1, 768, 4096, 4), (16, 768, 3072, 4), (16, 4096, 4096, 1), (64, 768, 3072, 4)]
    + [(128, 256, 4096, 4), (1, 768, 700, 1), (2048, 2048, 8192, 1), (64, 64, 512, 1)],
)
def test_parts_by_shape(m, n, k, parts):
    p = problem(m, n, k)
    (config,) = configure(p, ARCHS["sm_80"]).values()
    assert gemm_split.choose(p, config, ARCHS["sm_80"]).parts == parts


def test_rows_known_at_the_call_are_not_divided():
    p = replace(problem(1, 768, 4096), m=tirx.Var("m", "int64"))
    (config, *_) = configure(p, ARCHS["sm_80"]).values()
    assert gemm_split.choose(p, config, ARCHS["sm_80"]).parts == 1
    with pytest.raises(ValueError, match="found rows m of batch 1, allowed sizes known"):
        gemm_split.SplitConfig(4).require_fit(p, config)


def test_parts_follow_the_tile_to_be_measured(monkeypatch):
    taken = []
    monkeypatch.setattr(gemm_split, "emit", lambda _, *chosen: taken.append(chosen))
    p = problem(16, 768, 4096)
    kernel_of(p)
    with overriding("GemmConfig", {"block_n": 64}):
        kernel_of(p)
    assert [(config.block_n, split.parts) for config, split, _ in taken] == [(16, 4), (64, 8)]


@pytest.mark.parametrize(
    ("changes", "parts", "message"),
    [
        ({"k": 3072 + 256}, 4, r"found K = 3328, allowed multiples of 1024: parts of whole steps"),
        ({"k": 3072}, 5, "found K = 3072, allowed multiples of 1280"),
        ({"live_rows": lambda *_: 1}, 4, "found rows that only the device counts"),
        ({"b": relax.TensorType((2, 64, 3072), "int8")}, 4, "found 2 matrices b, allowed one"),
    ],
)
def test_parts_that_are_refused(changes, parts, message):
    p = replace(problem(16, 64, 3072), **changes)
    with pytest.raises(ValueError, match=message):
        gemm_split.emit(p, gemm_config._STREAMING[0], gemm_split.SplitConfig(parts), ARCHS["sm_80"])


def test_parts_of_panels_that_are_refused():
    p = problem(16, 64, 1024 + 512, panels=Panels())
    narrow = GemmConfig(16, 16, 64, 1, 1)
    with pytest.raises(ValueError, match=r"allowed multiples of 1024: .*, in whole panels"):
        gemm_split.SplitConfig(8).require_fit(p, narrow)
    gemm_split.SplitConfig(4).require_fit(p, narrow)


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="found parts 0, allowed 1 or more"):
        gemm_split.SplitConfig(0)


@cuda_code.needs_nvcc
@pytest.mark.parametrize(("m", "n", "k"), [(16, 768, 3072), (128, 256, 2048)])
@WEIGHTS
def test_parts_of_k_on_hopper_fit(m, n, k, panels, tmp_path):
    func = kernel_of(problem(m, n, k, panels=panels), "sm_90a")
    cuda_code.verify(func, "sm_90a")
    product, total = cuda_code.resources(cuda_code.source(func, "sm_90a"), "sm_90a", tmp_path)
    assert not product.spilled
    assert not total.spilled
