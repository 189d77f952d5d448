"""SpeedFusionAttention: problems, and what a compiled node makes of them."""

import ml_dtypes
import numpy as np
from compile_once import compile_once

from opferry.frontend.builders import node_model
from opferry.reference.compare import compare

OP = "SpeedFusionAttention"
F32, F16, BF16 = np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ("attention_out", "softmax_max", "softmax_sum", "softmax_out", "seed", "offset", "numels")
CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
LOWEST, LARGEST = np.float32(-3.4028235e38), np.float32(3.4028235e38)


def graph_name(output):
    return f"{output}_out" if output in ("seed", "offset") else output


def build(feeds, *, target="llvm", constant=(), symbolic=None, outputs=None, **attrs):
    """Compile one node. A compressed mask is stored in the model."""
    if "atten_mask" in feeds and feeds["atten_mask"] is CAUSAL:
        constant = (*constant, "atten_mask")
    model = node_model(OP, feeds, outputs, constant, symbolic, **attrs)
    return compile_once(model, target)


def run(module, feeds):
    """Outputs in the schema's order, None where the node has none."""
    wanted = {spec.name for spec in module.inputs}
    found = module.run({name: x for name, x in feeds.items() if name in wanted})
    return [found.get(graph_name(name)) for name in OUTPUTS]


def judge(got, feeds, attrs):
    for verdict in compare(OP, feeds, attrs, got):
        assert verdict.ok, verdict


def check(feeds, *, target="llvm", constant=(), symbolic=None, outputs=None, **attrs):
    """Compile, run, compare every output with the reference."""
    module = build(
        feeds, target=target, constant=constant, symbolic=symbolic, outputs=outputs, **attrs
    )
    got = run(module, feeds)
    judge(got, feeds, attrs)
    return got


def normal(*shape, dtype=F32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def pack(x, layout):
    """[B, N, S, D] to a layout."""
    B, N, S, D = x.shape
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return np.ascontiguousarray(x.transpose(2, 0, 1, 3)).reshape(S, B, N * D)
    x = np.ascontiguousarray(x.transpose(0, 2, 1, 3))
    return x.reshape(B, S, N * D) if layout == "BSH" else x


def qkv(B=1, N1=2, N2=2, S1=17, S2=17, D=5, *, dtype=F32, layout="BNSD"):
    shapes = {"query": (N1, S1), "key": (N2, S2), "value": (N2, S2)}
    return {
        name: pack(normal(B, n, s, D, dtype=dtype, seed=k), layout)
        for k, (name, (n, s)) in enumerate(shapes.items())
    }


def tnd(lengths_q, lengths_kv, N1=2, N2=1, D=12, *, dtype=F32):
    T1, T2 = sum(lengths_q), sum(lengths_kv)
    return {
        "query": normal(T1, N1, D, dtype=dtype, seed=1),
        "key": normal(T2, N2, D, dtype=dtype, seed=2),
        "value": normal(T2, N2, D, dtype=dtype, seed=3),
        "actual_seq_qlen": np.cumsum(lengths_q),
        "actual_seq_kvlen": np.cumsum(lengths_kv),
    }


def random_mask(*shape, dtype=bool, keep=0.6):
    dropped = np.random.default_rng([7, *shape]).random(shape) > keep
    return dropped.astype(dtype) * (np.uint8(4) if dtype is np.uint8 else True)
