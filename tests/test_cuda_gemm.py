"""The int8 matrix product for NVIDIA GPUs: the kernel in the interpreter of GPU threads, exactly;
both operators around it; the instructions it consists of, its registers and shared memory.
"""

import functools
import re
from dataclasses import replace

import cuda_code
import ml_dtypes
import numpy as np
import pytest
import simt
from simt import graph
from tvm import relax, tirx

from opferry.driver import target as targets
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare
from opferry.relay_ops import int8_matmul as products
from opferry.relay_ops import quant
from opferry.relay_ops.orders import Order
from opferry.runtime.errors import UnsupportedError
from opferry.schedules.cuda import gemm, gemm_config, gemm_split
from opferry.schedules.cuda.arch import ARCHS, THREAD_REGISTERS
from opferry.schedules.cuda.gemm_config import GemmConfig, configure
from opferry.schedules.cuda.override import overriding
from opferry.schedules.cuda.panels import Panels
from opferry.schedules.intrin import hopper

OUTPUTS = {"int8": np.int8, "int32": np.int32, "float16": np.float16}
OUTPUTS["bfloat16"] = ml_dtypes.bfloat16
CONFIGS = dict.fromkeys((*gemm_config._TILES, *gemm_config._STREAMING))
SMALL = GemmConfig(32, 32, 64, 2, 1)
WARPGROUPS = gemm_config._WARPGROUP_TILES
SMALL_WARPGROUP = GemmConfig(64, 64, 128, 4, 1, stages=3, wgmma=True)
ENTRIES = {"row": products.row_major, "col32": products.col32, "transposed": products.transposed}


def int8(rng, *shape):
    """All of int8, with -128 often."""
    x = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.05, -128, x).astype(np.int8)


def problem(m, n, k, out="int8", entry="row", batch=1, order=Order.ROW, panels=None):
    """y = acc * scale[col] + bias[col] + token[row] in ``out``; acc itself for int32."""

    def tensor(dtype, *shape):
        return relax.TensorType(shape, dtype)

    def epilogue(acc, at, scale, bias, token):
        if out == "int32":
            return acc
        value = acc.astype("float32") * scale[at.col] + bias[at.col] + token[at.row]
        return quant.to_int8(value) if out == "int8" else value.astype(out)

    a = {"row": (m, k), "col32": (k // 32, m, 32), "transposed": (k, m)}[entry]
    y = (n // 32, m, 32) if order is Order.COL32 else (m, n)
    b = (-(-n // 64), -(-k // 128), 64, 128) if panels else (n, -(-k // 16) * 16)
    return products.Problem(
        batch=batch,
        m=m,
        n=n,
        k=k,
        a=tensor("int8", batch, *a),
        a_entry=ENTRIES[entry],
        a_batch=lambda z: z,
        a_run={"row": k, "col32": 32}.get(entry, 1),
        a_row_run=m if entry == "transposed" else 1,
        b=tensor("int8", 1, *b),
        b_batch=lambda z: tirx.const(0, "int64"),
        operands=(tensor("float32", n), tensor("float32", n), tensor("float32", m)),
        y=tensor(out, batch, *y),
        order=order,
        epilogue=epilogue,
        b_panels=panels,
    )


def kernel(p, arch="sm_80", config=None):
    configs = {None: config} if config else configure(p, ARCHS[arch])
    return gemm.emit(p, configs, ARCHS[arch])


def kernel_of(p, arch="sm_80"):
    """What the schedule chooses."""
    return gemm_split.build(p, targets.resolve(f"cuda-{arch}"))


def in_panels(b):
    """[1, N/64, K/128, 64, 128] of [N, K]: chunks of 16 bytes in every row by its number."""
    n, k = b.shape
    panels = np.zeros((-(-n // 64), -(-k // 128), 64, 8, 16), np.int8)
    for row in range(n):
        for at in range(0, k, 16):
            chunk = at // 16 % 8 ^ row % 8
            part = b[row, at : at + 16]
            panels[row // 64, at // 128, row % 64, chunk, : len(part)] = part
    return panels.reshape(1, *panels.shape[:3], 128)


def check(
    m,
    n,
    k,
    out="int8",
    arch="sm_80",
    config=None,
    entry="row",
    batch=1,
    order=Order.ROW,
    panels=None,
):
    """Every bit of every entry, from memory that held something else."""
    p = problem(m, n, k, out, entry, batch, order, panels)
    rng = np.random.default_rng([m, n, k])
    a, b = int8(rng, batch, m, k), int8(rng, n, k)
    scale, bias, token = (rng.standard_normal(size).astype(np.float32) for size in (n, n, m))
    scale *= np.float32(100 / (5400 * np.sqrt(k)))
    stored = {
        "row": lambda: a,
        "col32": lambda: a.reshape(batch, m, k // 32, 32).transpose(0, 2, 1, 3),
        "transposed": lambda: a.transpose(0, 2, 1),
    }[entry]()
    rows = in_panels(b) if panels else np.pad(b, ((0, 0), (0, -k % 16)))[None]
    y = np.full([int(d) for d in p.y.shape], 77, OUTPUTS[out])
    operands = (scale, bias, token)
    simt.run(kernel(p, arch, config), np.ascontiguousarray(stored), rows, *operands, y)
    expected = a.astype(np.int32) @ b.T.astype(np.int32)
    if out != "int32":
        expected = expected.astype(np.float32) * scale + bias + token[:, None]
        if out == "int8":
            expected = np.clip(np.rint(expected), -128, 127)
    if order is Order.COL32:
        y = y.transpose(0, 2, 1, 3).reshape(batch, m, n)
    np.testing.assert_array_equal(y, expected.astype(OUTPUTS[out]))


# -- the kernel -----------------------------------------------------------------------------------


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


# -- warpgroups: sm_90a ---------------------------------------------------------------------------

WEIGHTS = pytest.mark.parametrize("panels", [Panels(), None], ids=["panels", "rows"])


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


# -- the operators --------------------------------------------------------------------------------


def operator(op, feeds, attrs, stored=(), symbolic=None, arch="sm_80"):
    """Lowered for a GPU and run here; judged by the reference."""
    model = node_model(op, feeds, initializers=stored, symbolic=symbolic, **attrs)
    imported = import_model(prepare(load(model), None), targets.resolve(f"cuda-{arch}"))
    (y,) = graph.executable(imported.module)(*(feeds[spec.name] for spec in imported.inputs))
    (verdict,) = compare(op, feeds, attrs, [y])
    assert verdict.ok, verdict


ROW = {"order_A": 1, "order_B": 0, "order_Y": 1}
TILED_4R2_8C = {"order_A": 2, "order_B": 3, "order_Y": 2}
TILED_2R_4R4 = {"order_A": 2, "order_B": 4, "order_Y": 2}
CONSTANTS = ("scale_A", "B", "scale_B", "scale_Y", "bias", "scale_C")


@pytest.mark.parametrize("stored", [CONSTANTS, ()], ids=["constant", "run-time"])
@pytest.mark.parametrize(
    ("a", "b", "n", "c", "attrs"),
    [
        ((1, 33), (), 17, None, ROW),
        ((6, 17, 40), (), 33, None, ROW),
        ((3, 19, 36), (3,), 48, (3,), ROW),
        ((2, 19, 64), (1,), 32, (1,), ROW),
        ((35, 64), (), 64, None, TILED_4R2_8C),
        ((2, 35, 64), (2,), 64, (2,), TILED_2R_4R4),
    ],
    ids=str,
)
def test_qordered_matmul(a, b, n, c, attrs, stored):
    qordered(a, b, n, c, attrs, stored)


def qordered(a, b, n, c, attrs, stored, arch="sm_80"):
    rng = np.random.default_rng(n)
    m, k = a[-2:]
    scale = 100 / (5400 * np.sqrt(k)) * rng.standard_normal(n)
    feeds = {
        "A": int8(rng, *a),
        "scale_A": np.float32(0.5),
        "B": int8(rng, *b, k, n),
        "scale_B": scale.astype(np.float32),
        "scale_Y": np.float32([0.5]),
    }
    if attrs is ROW:
        feeds["bias"] = (rng.standard_normal(n) * 10).astype(np.float32)
    if c is not None:
        feeds |= {"C": int8(rng, *c, m, n), "scale_C": np.float32(0.25)}
    stored = [name for name in stored if name in feeds]
    operator("QOrderedMatMul", feeds, attrs, stored, arch=arch)


def linear(m, k, n, output, **given):
    rng = np.random.default_rng([m, k, n])
    scale = (rng.standard_normal(n) * 100 / (5400 * np.sqrt(k))).astype(np.float32)
    feeds = {"x1": int8(rng, m, k), "x2": int8(rng, k, n), "scale": scale}
    return feeds | given, {"output_dtype": output}


INT8, INT32, FLOAT16, BFLOAT16 = 3, 6, 10, 16
BIASES = {
    "int32": np.arange(-9, 40, 3, np.int32) * 1000,
    "float16": np.linspace(-20, 20, 17).astype(np.float16),
    "bfloat16": np.linspace(-20, 20, 17).astype(ml_dtypes.bfloat16),
    "float32": np.linspace(-20, 20, 17).astype(np.float32),
}
TOKENS = np.linspace(-2, 2, 37).astype(np.float32)


@pytest.mark.parametrize(
    ("output", "given"),
    [
        (INT8, {"bias": "int32", "offset": np.linspace(-60, 60, 17).astype(np.float32)}),
        (INT32, {"bias": "int32"}),
        (INT32, {}),
        (FLOAT16, {"bias": "int32"}),
        (FLOAT16, {"bias": "float16", "pertoken_scale": TOKENS}),
        (FLOAT16, {"bias": "float32", "pertoken_scale": TOKENS}),
        (BFLOAT16, {"bias": "bfloat16"}),
        (BFLOAT16, {"bias": "float32", "pertoken_scale": TOKENS}),
        (BFLOAT16, {"scale": np.linspace(-0.1, 0.1, 17).astype(ml_dtypes.bfloat16)}),
    ],
    ids=lambda given: str(given) if isinstance(given, int) else "-".join(given) or "none",
)
def test_npu_quant_matmul(output, given):
    """All that an epilogue may read."""
    given = given | ({"bias": BIASES[given["bias"]]} if "bias" in given else {})
    feeds, attrs = linear(37, 40, 17, output, **given)
    operator("NPUQuantMatmul", feeds, attrs, ["x2", "scale"])


@pytest.mark.parametrize("stored", [["x2"], []], ids=["constant", "run-time"])
@pytest.mark.parametrize("transposed", [{"transpose_x1": 1}, {"transpose_x2": 1}], ids=str)
def test_transposed_operands(transposed, stored):
    feeds, attrs = linear(33, 20, 34, FLOAT16)
    for name in transposed:
        operand = name.removeprefix("transpose_")
        feeds[operand] = np.ascontiguousarray(feeds[operand].T)
    operator("NPUQuantMatmul", feeds, attrs | transposed, stored)


@pytest.mark.parametrize(
    ("left", "right"), [((2, 1), (3,)), ((3,), (2, 1)), ((1,), (4,)), ((2, 3), (2, 3))], ids=str
)
def test_broadcast_batches(left, right):
    rng = np.random.default_rng(0)
    feeds, attrs = linear(17, 20, 33, INT8)
    feeds |= {"x1": int8(rng, *left, 17, 20), "x2": int8(rng, *right, 20, 33)}
    operator("NPUQuantMatmul", feeds, attrs)


@pytest.mark.parametrize("rows", [1, 37, 130])
@pytest.mark.parametrize("given", [{}, {"pertoken_scale": TOKENS}], ids=["plain", "tokens"])
def test_rows_known_at_the_call(rows, given):
    if "pertoken_scale" in given:
        given = {"pertoken_scale": np.resize(TOKENS, rows)}
    feeds, attrs = linear(rows, 48, 17, FLOAT16, **given)
    names = {"x1": {0: "m"}} | {name: {0: "m"} for name in given}
    operator("NPUQuantMatmul", feeds, attrs, ["x2", "scale"], names)


@pytest.mark.parametrize("stored", [CONSTANTS, ()], ids=["constant", "run-time"])
@pytest.mark.parametrize(
    ("a", "b", "n", "c", "attrs"),
    [
        ((66, 33), (), 17, None, ROW),
        ((2, 70, 160), (2,), 64, (1,), ROW),
        ((2, 70, 160), (2,), 64, (2,), TILED_2R_4R4),
    ],
    ids=str,
)
def test_qordered_matmul_by_warpgroups(a, b, n, c, attrs, stored):
    qordered(a, b, n, c, attrs, stored, "sm_90a")


@pytest.mark.parametrize("stored", [["x2"], []], ids=["constant", "run-time"])
@pytest.mark.parametrize("transposed", [{"transpose_x2": 1}, {}], ids=["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_rows_known_at_the_call_by_warpgroups(rows, transposed, stored):
    """Few rows and many from the same weights, whatever their form."""
    feeds, attrs = linear(rows, 144, 66, BFLOAT16, pertoken_scale=np.resize(TOKENS, rows))
    if transposed:
        feeds["x2"] = np.ascontiguousarray(feeds["x2"].T)
    names = {"x1": {0: "m"}, "pertoken_scale": {0: "m"}}
    operator("NPUQuantMatmul", feeds, attrs | transposed, stored, names, "sm_90a")


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


# -- tiles, instructions, registers, shared memory ------------------------------------------------


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


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("out", OUTPUTS)
def test_every_tile_fits(out, arch):
    for m in (1, 20, 40, 128, 512, 1024, 2048, 8192):
        for n in (64, 1024, 4096):
            (config,) = configure(problem(m, n, 4096, out), arch).values()
            assert not config.wgmma or arch.wgmma
            assert config.shared_bytes(np.dtype(OUTPUTS[out]).itemsize) <= arch.shared_per_block
            assert config.threads * THREAD_REGISTERS <= arch.registers_per_sm


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


@pytest.mark.parametrize("field", ["block_m", "block_k", "warps_n", "stages"])
def test_tiles_of_nothing(field):
    with pytest.raises(UnsupportedError, match=f"{field}: found 0, allowed 1 or more"):
        replace(SMALL, **{field: 0})


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


@pytest.mark.parametrize(
    "fields",
    [{"block_m": 24}, {"block_n": 40}, {"warps_n": 4}, {"block_k": 96, "warps_k": 2}, {"stages": 1}]
    + [{"block_k": 80}],
    ids=str,
)
def test_tiles_that_warps_refuse(fields):
    with pytest.raises(ValueError, match="allowed 16 rows and 16 columns a warp or multiples"):
        replace(SMALL, **fields)


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


@cuda_code.needs_nvcc
@pytest.mark.parametrize(("m", "n", "k"), [(16, 768, 3072), (128, 256, 2048)])
@WEIGHTS
def test_parts_of_k_on_hopper_fit(m, n, k, panels, tmp_path):
    func = kernel_of(problem(m, n, k, panels=panels), "sm_90a")
    cuda_code.verify(func, "sm_90a")
    product, total = cuda_code.resources(cuda_code.source(func, "sm_90a"), "sm_90a", tmp_path)
    assert not product.spilled
    assert not total.spilled
