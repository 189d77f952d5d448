"""The int8 matrix product for NVIDIA GPUs: problems, and their kernels in the interpreter of GPU
threads.
"""

import ml_dtypes
import numpy as np
import pytest
import simt
from tvm import relax, tirx

from opferry.driver import target as targets
from opferry.relay_ops import orders, quant
from opferry.relay_ops.int8_matmul import Problem
from opferry.relay_ops.orders import Order
from opferry.schedules.cuda import gemm, gemm_split
from opferry.schedules.cuda.arch import ARCHS
from opferry.schedules.cuda.gemm_config import GemmConfig, configure
from opferry.schedules.cuda.panels import Panels

OUTPUTS = {"int8": np.int8, "int32": np.int32, "float16": np.float16}
OUTPUTS["bfloat16"] = ml_dtypes.bfloat16
SMALL = GemmConfig(32, 32, 64, 2, 1)
SMALL_WARPGROUP = GemmConfig(64, 64, 128, 4, 1, stages=3, wgmma=True)
ENTRIES = {"row": orders.row_major, "col32": orders.col32, "transposed": orders.transposed}


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
    return Problem(
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


WEIGHTS = pytest.mark.parametrize("panels", [Panels(), None], ids=["panels", "rows"])
