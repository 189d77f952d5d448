"""SpeedFusionAttention for NVIDIA GPUs: problems, their kernels, and these in the interpreter of
GPU threads.
"""

import ml_dtypes
import numpy as np
import pytest
import simt

from opferry.driver import target as targets
from opferry.frontend.builders import node_model
from opferry.frontend.importer import import_model
from opferry.frontend.model import load, prepare
from opferry.reference.compare import compare
from opferry.relay_ops.op import KERNEL
from opferry.runtime.errors import OpferryError
from opferry.schedules.cuda import attention_config

OP = "SpeedFusionAttention"
F32, F16, BF16 = np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")
CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
BATCH_SEQUENCE = {"BSH": (0, 1), "SBH": (1, 0), "BNSD": (0, 2), "BSND": (0, 1)}


def kernel(feeds, arch="sm_80", outputs=OUTPUTS, constant=(), symbolic=None, **attrs):
    """The PrimFunc of the node that ``feeds`` and ``attrs`` describe. A compressed mask is stored
    in the model.
    """
    if feeds.get("atten_mask") is CAUSAL:
        constant = (*constant, "atten_mask")
    model = prepare(load(node_model(OP, feeds, list(outputs), constant, symbolic, **attrs)), None)
    module = import_model(model, targets.resolve(f"cuda-{arch}")).module
    (func,) = (
        func
        for func in module.functions.values()
        if func.attrs and func.attrs.get(KERNEL) == "speed_fusion_attention.fused"
    )
    return func


def execute(func, feeds, attrs, blocks=None):
    """Outputs by name, from memory that was NaN."""
    query, N1 = feeds["query"], attrs["head_num"]
    if attrs["input_layout"] == "TND":
        softmax = (query.shape[0], N1, 8)
    else:
        softmax = tuple(query.shape[k] for k in BATCH_SEQUENCE[attrs["input_layout"]])
        softmax = (softmax[0], N1, softmax[1], 8)
    found, args = {}, []
    for param in func.params:
        name = param.name
        if name in OUTPUTS:
            like = query if name == "attention_out" else None
            shape, dtype = (like.shape, like.dtype) if like is not None else (softmax, F32)
            found[name] = np.full(shape, np.nan, dtype)
            args.append(found[name])
        else:
            value = feeds[name] if name in feeds else np.array(attrs[name], "int64")
            args.append(np.array(value, order="C"))
    simt.run(func, *args, blocks=blocks)
    return found


def check(feeds, arch="sm_80", outputs=OUTPUTS, symbolic=None, **attrs):
    """Every output against the reference, within the tolerances of the specification."""
    func = kernel(feeds, arch, outputs, symbolic=symbolic, **attrs)
    found = execute(func, feeds, attrs)
    for verdict in compare(OP, feeds, attrs, [found.get(name) for name in OUTPUTS]):
        assert verdict.ok, verdict
    return found


def inputs(B, N1, N2, S1, S2, D, dtype=F16, layout="BNSD"):
    rng = np.random.default_rng([B, N1, N2, S1, S2, D])

    def tensor(N, S):
        shape = {
            "BNSD": (B, N, S, D),
            "BSND": (B, S, N, D),
            "BSH": (B, S, N * D),
            "SBH": (S, B, N * D),
            "TND": (S, N, D),
        }[layout]
        return rng.standard_normal(shape).astype(dtype)

    return {"query": tensor(N1, S1), "key": tensor(N2, S2), "value": tensor(N2, S2)}


def packed(queries, keys, dtype=F16, N1=4, N2=2, D=32, index=np.int64):
    """TND inputs from the lengths of the sequences."""
    feeds = inputs(0, N1, N2, sum(queries), sum(keys), D, dtype, "TND")
    ends = {"actual_seq_qlen": queries, "actual_seq_kvlen": keys}
    return feeds | {name: np.cumsum(lengths).astype(index) for name, lengths in ends.items()}


def node(layout="BNSD", N1=2, **attrs):
    return {"input_layout": layout, "head_num": N1, "scale": 0.3} | attrs


def some(shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def normal(shape, dtype=F32):
    return np.random.default_rng(7).standard_normal(shape).astype(dtype)


def config(feeds, arch="sm_80", **attrs):
    """How the kernel of a problem is cut."""
    taken = []
    configure = attention_config.configure

    def spy(problem, record):
        taken.append(configure(problem, record))
        raise OpferryError("nothing is built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opferry.schedules.cuda.attention.configure", spy)
        with pytest.raises(OpferryError):
            kernel(feeds, arch, **attrs)
    return taken[-1]
