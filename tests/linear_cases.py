"""NPUQuantMatmul and NPUTransQuantParam: problems, and what a compiled node makes of them."""

import itertools

import ml_dtypes
import numpy as np
from compile_once import compile_once

from opferry.frontend.builders import node_model
from opferry.reference.compare import compare
from opferry.reference.linear_a8w8_quant import trans_quant_param

OP = "NPUQuantMatmul"
INT8, INT32, FLOAT16, BFLOAT16 = 3, 6, 10, 16
NAMES = {INT8: "int8", INT32: "int32", FLOAT16: "float16", BFLOAT16: "bfloat16"}
DTYPES = {
    "int32": np.int32,
    "int64": np.int64,
    "uint64": np.uint64,
    "float16": np.float16,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
}


def f32(*values):
    return np.array(values, np.float32)


def int8(rng, *shape):
    """All of int8, with -128 often."""
    x = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.05, -128, x).astype(np.int8)


def compiled(feeds, attrs, initializers=(), symbolic=None, target="llvm", op=OP):
    model = node_model(op, feeds, initializers=initializers, symbolic=symbolic, **attrs)
    return compile_once(model, target)


def run(module, feeds):
    wanted = {spec.name for spec in module.inputs}
    (y,) = module.run({name: x for name, x in feeds.items() if name in wanted}).values()
    return y


def check(feeds, attrs, initializers=(), symbolic=None, target="llvm", op=OP):
    y = run(compiled(feeds, attrs, initializers, symbolic, target, op), feeds)
    (verdict,) = compare(op, feeds, attrs, [y])
    assert verdict.ok, verdict
    return y


def problem(rng, m, k, n, output, scale="float32", offset=False, bias=None, pertoken=False):
    """Feeds for x1 (m, k) and x2 (k, n) whose results spread over the output's range."""
    values = (rng.standard_normal(n) * 100 / (5400 * np.sqrt(k))).astype(np.float32)
    offsets = (rng.standard_normal(n) * 60).astype(np.float32)
    feeds = {"x1": int8(rng, m, k), "x2": int8(rng, k, n)}
    if scale in ("int64", "uint64"):
        feeds["scale"] = trans_quant_param(values, offsets).view(DTYPES[scale])
    else:
        feeds["scale"] = values.astype(DTYPES[scale])
    if offset:
        feeds["offset"] = offsets
    if pertoken:
        feeds["pertoken_scale"] = rng.standard_normal(m).astype(np.float32)
    if bias == "int32":
        feeds["bias"] = rng.integers(-30000, 30000, n).astype(np.int32)
    elif bias:
        feeds["bias"] = (rng.standard_normal(n) * 20).astype(DTYPES[bias])
    return feeds, {"output_dtype": output}


# The table of section 4: output, scale, offset, bias, per-token scale.
COMBINATIONS = [
    *itertools.product(
        [FLOAT16], ["int64", "uint64", "float32"], [False], [None, "int32"], [False]
    ),
    *itertools.product(
        [INT8], ["int64", "uint64", "float32"], [False, True], [None, "int32"], [False]
    ),
    *itertools.product(
        [BFLOAT16],
        ["float32", "bfloat16"],
        [False],
        [None, "int32", "bfloat16", "float32"],
        [False, True],
    ),
    *itertools.product(
        [FLOAT16], ["float32"], [False], [None, "int32", "float16", "float32"], [True]
    ),
    *itertools.product([INT32], ["float32", "bfloat16"], [False], [None, "int32"], [False]),
]
