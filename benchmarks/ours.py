"""Our side: the problem as a model of one operator, compiled, with its inputs in place.

Two candidates of each: the compiled function with tensors that are already there, which is what
the peers are given, and `Module.run` with NumPy arrays, which checks and copies.
"""

from __future__ import annotations

import time

import numpy as np
from onnx import TensorProto

import opferry
from opferry.runtime import threads

from . import THREADS
from .candidate import Candidate, in_turn
from .inputs import inputs
from .shapes import Attention, Encoder, Longformer, Matmul, Nsa, Problem

NAME = "opferry"
RUN = "opferry Module.run"

_OUT = {
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
_COMPRESSED_MASK = np.triu(np.ones((2048, 2048), np.bool_), 1)


def build(problem: Problem) -> list[Candidate]:
    """`NAME` and `RUN`, in this order."""
    if problem.copies == 1:
        return _ready(*_compile(problem))
    if isinstance(problem, Matmul):  # constant weights: a module of each
        sets = [_ready(*_compile(problem, seed)) for seed in range(problem.copies)]
    else:
        module, feeds, finish = _compile(problem)
        sets = [_ready(module, feeds, finish)]
        for seed in range(1, problem.copies):
            sets.append(_ready(module, _MODELS[type(problem)](problem, seed)[1], finish))
    return [in_turn(same) for same in zip(*sets)]


def _compile(problem: Problem, seed: int = 0):
    """The module, its inputs by name, and what makes of its outputs what `check` takes."""
    model, feeds, finish = _MODELS[type(problem)](problem, seed)
    target = problem.target if isinstance(problem, Matmul) else "llvm"
    sizes = {"B": problem.B, "S": problem.S} if isinstance(problem, Encoder) else None
    return opferry.compile(model, target, sizes, threads=THREADS), feeds, finish


def _ready(module: opferry.Module, feeds, finish) -> list[Candidate]:
    import tvm

    feeds = {spec.name: np.ascontiguousarray(feeds[spec.name]) for spec in module.inputs}
    names = [spec.name for spec in module.outputs]
    threads.use(THREADS)
    main = module._main  # what `Module.run` calls after its checks
    tensors = [tvm.runtime.tensor(feeds[spec.name]) for spec in module.inputs]

    def function() -> dict[str, np.ndarray]:
        found = main(*tensors)
        found = [found] if len(names) == 1 else list(found)
        return {name: value.numpy() for name, value in zip(names, found)}

    return [
        Candidate(NAME, lambda: main(*tensors), lambda: finish(function())),
        Candidate(RUN, lambda: module.run(feeds), lambda: finish(module.run(feeds))),
    ]


def compile_seconds(problem: Problem) -> float:
    """Of `opferry.compile` alone, sizes symbolic where the model has them so."""
    model, _, _ = _MODELS[type(problem)](problem, 0)
    start = time.perf_counter()
    opferry.compile(model, threads=THREADS)
    return time.perf_counter() - start


def _matmul(p: Matmul, seed: int):
    a = inputs(p, seed)
    if p.op == "QOrderedMatMul":
        return _qordered_matmul(p, a)
    feeds = {
        "x1": a.A,
        "x2": a.W,
        "scale": a.scale,
        "pertoken_scale": a.token,
        "bias": a.int_bias if a.int_bias is not None else a.float_bias,
    }
    rows = {"x1": (np.int8, ("M", p.K))} if p.symbolic else {}
    model = opferry.node_model(
        p.op,
        feeds | rows,
        initializers=[name for name in ("x2", "scale", "bias") if feeds[name] is not None],
        output_dtype=_OUT[p.out],
        transpose_x2=1,
    )
    return model, feeds, lambda out: out["y"]


def _qordered_matmul(p: Matmul, a):
    from opferry.reference.numerics import Order, pack, unpack

    col32, weight_tile = Order(2), Order(4)
    orders = dict(zip(("order_A", "order_B", "order_Y"), (2, 4, 2) if p.tiled else (1, 0, 1)))
    feeds = {
        "A": pack(a.A[None], col32)[0] if p.tiled else a.A,
        "scale_A": np.float32(1),
        "B": (pack(a.W[None], weight_tile)[0] if p.tiled else a.W).reshape(p.K, p.N),
        "scale_B": a.scale,
        "scale_Y": np.float32(1),
        "bias": a.float_bias,
        "C": a.C,
        "scale_C": a.beta if p.residual else None,
    }
    constant = ["scale_A", "B", "scale_B", "scale_Y", "bias", "scale_C"]
    constant = [name for name in constant if feeds[name] is not None]
    model = opferry.node_model(p.op, feeds, initializers=constant, **orders)

    def finish(out):
        Y = out["Y"]
        return unpack(Y.reshape(1, p.M, p.N), col32)[0] if p.tiled else Y

    return model, feeds, finish


def _attention(p: Attention, seed: int):
    a = inputs(p, seed)
    mask = _COMPRESSED_MASK if p.mask in ("causal", "band") else a.dropped
    mode = {
        "causal": {"sparse_mode": 2},
        "band": {"sparse_mode": 4, "pre_tokens": p.BAND - 1, "next_tokens": 0},
        "prefix": {"sparse_mode": 5, "prefix": [p.prefix] * p.B},
        "bool": {"sparse_mode": 1},
        "pse": {"pse_type": 0},
    }.get(p.mask, {})
    q, k, v = a.q, a.k, a.v
    if p.lengths:  # [T, N, D]
        q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v))
        ends = np.cumsum(p.lengths).tolist()
        mode |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    feeds = {"query": q, "key": k, "value": v, "pse": a.pse, "atten_mask": mask}
    model = opferry.node_model(
        p.op,
        feeds,
        outputs=["attention_out"],
        initializers=["atten_mask"] if mask is _COMPRESSED_MASK else (),
        head_num=p.N1,
        input_layout="TND" if p.lengths else "BNSD",
        scale=p.D**-0.5,
        **mode,
    )

    def finish(out):
        y = out["attention_out"]
        return y.swapaxes(0, 1)[None] if p.lengths else y

    return model, feeds, finish


def _longformer(p: Longformer, seed: int):
    a = inputs(p, seed)
    H = p.hidden
    feeds = {
        "input": a.x,
        "scale_input": a.scale_x,
        "weight": a.weight.reshape(H, 3 * H),  # column order: the bytes of (3H, H) by rows
        "scale_weight": a.scale_w,
        "bias": a.bias,
        "scale_bias": np.float32(1),
        "scale_qkv_gemm": a.scale_projection,
        "mask": a.mask,
        "global_weight": a.global_weight.reshape(H, 3 * H),
        "scale_global_weight": a.scale_w,
        "global_bias": a.global_bias,
        "scale_global_gemm": a.scale_projection,
        "global": a.flags,
        "scale_output": a.scale_output,
    }
    model = opferry.node_model(
        p.op,
        feeds,
        initializers=[name for name in feeds if name not in ("input", "mask", "global")],
        num_heads=p.heads,
        window=p.W,
        order_input=1,
        order_weight=0,
        order_global_weight=0,
        order_output=1,
    )
    return model, feeds, lambda out: out["output"]


def _nsa(p: Nsa, seed: int):
    a = inputs(p, seed)
    feeds = {
        "query": a.q,
        "key": a.k,
        "value": a.v,
        "atten_mask": a.hidden,
        "topk_mask": a.forced,
    }
    model = opferry.node_model(
        p.op,
        feeds,
        outputs=["attention_out", "topk_indices_out"] if p.select else ["attention_out"],
        head_num=p.N1,
        scale_value=p.D**-0.5,
        compress_block_size=p.l,
        compress_stride=p.d,
        select_block_size=p.block,
        select_block_count=p.k,
        actual_seq_qlen=[p.S],
        actual_cmp_seq_kvlen=[p.compressed],
        actual_sel_seq_kvlen=[p.blocks],
    )
    return model, feeds, lambda out: (out["attention_out"], out.get("topk_indices_out"))


def _encoder(p: Encoder, seed: int):
    from .encoder import quantised_model

    return quantised_model(), vars(inputs(p, seed)), lambda out: out["embedding"]


_MODELS = {
    Matmul: _matmul,
    Attention: _attention,
    Longformer: _longformer,
    Nsa: _nsa,
    Encoder: _encoder,
}
