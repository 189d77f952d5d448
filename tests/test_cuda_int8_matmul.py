"""QOrderedMatMul and NPUQuantMatmul for NVIDIA GPUs: whole nodes in the interpreter of GPU
threads.
"""

import ml_dtypes
import numpy as np
import pytest
from cuda_gemm_cases import int8
from simt import graph

from opferry.driver import target as targets
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare


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
