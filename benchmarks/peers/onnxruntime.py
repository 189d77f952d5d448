"""ONNX Runtime's CPU provider: its own operators for each problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnxruntime
from onnx import helper, numpy_helper

from .. import THREADS
from ..candidate import Candidate
from ..inputs import DTYPES, inputs, kept, output_bias
from ..shapes import Attention, Encoder, Matmul, Problem

MICROSOFT = "com.microsoft"


def candidates(problem: Problem, seed: int = 0) -> dict:
    if isinstance(problem, Matmul):
        # Adding an int8 matrix takes a second operator, which would round twice.
        builders = {} if problem.residual else _matmul(problem, seed)
    elif isinstance(problem, Attention):
        builders = _attention(problem, seed)
    elif isinstance(problem, Encoder):
        builders = {"int8, dynamic": partial(_encoder, problem)}
    else:  # its CPU provider has no such operator
        builders = {}
    return {f"onnxruntime {name}": partial(_named, name, b) for name, b in builders.items()}


def _named(name: str, builder) -> Candidate:
    candidate = builder()
    candidate.name = f"onnxruntime {name}"
    return candidate


# Signed activations have no fast kernel here; x + 128 with zero point 128 is the same product.
_ZERO = 128


def _matmul(p: Matmul, seed: int) -> dict:
    a = inputs(p, seed)
    constants = {"w": np.ascontiguousarray(a.W.T), "zero": np.uint8(_ZERO)}
    feeds = {"x": (a.A.astype(np.int16) + _ZERO).astype(np.uint8)}
    output = ("y", DTYPES["int32"], (p.M, p.N))
    if p.out == "int32":
        nodes = [_node("MatMulInteger", "x w zero")]
        return {"MatMulInteger": partial(_bound, nodes, feeds, constants, output)}
    constants |= {"one": np.float32(1), "scale": a.scale}
    if p.out == "int8":
        constants |= {"zero_w": np.zeros(p.N, np.int8)}
        output = ("y", np.dtype(np.uint8), (p.M, p.N))
        constants["int_bias"] = np.rint(output_bias(p, seed) / a.scale).astype(np.int32)
        gemm = "x one zero w scale zero_w int_bias one zero"
        nodes = [_node("QGemm", gemm, domain=MICROSOFT)]
        return {"QGemm": partial(_bound, nodes, feeds, constants, output, _shifted_back)}
    constants["bias"] = a.float_bias
    if not p.per_token:
        return {}
    feeds["token"] = a.token[:, None]
    # There is no bfloat16 on this provider; float16 costs as much to write.
    output = ("y", DTYPES["fp16"], (p.M, p.N))
    nodes = [
        _node("MatMulIntegerToFloat", "x w one scale zero", "scaled", domain=MICROSOFT),
        _node("Mul", "scaled token", "rows"),
        _node("Add", "rows bias", "sum"),
        _node("Cast", "sum", to=helper.np_dtype_to_tensor_dtype(DTYPES["fp16"])),
    ]
    name = "MatMulIntegerToFloat + Mul + Add + Cast fp16"
    return {name: partial(_bound, nodes, feeds, constants, output)}


def _shifted_back(y: np.ndarray) -> np.ndarray:
    return y.astype(np.int16) - _ZERO


def _attention(p: Attention, seed: int) -> dict:
    """fp32, and fp16 where it has a kernel; bf16 has none."""
    if p.dtype == "bf16":
        return {}
    found = {}
    if p.dtype == "fp32" and p.mask not in ("band", "prefix"):
        found["Attention-23"] = partial(_attention_23, p, seed)
    if p.dtype == "fp32" and p.N1 == p.N2:
        found["MultiHeadAttention"] = partial(_multi_head, p, seed)
    if p.mask == "causal" or p.S1 == 1:
        found["GroupQueryAttention"] = partial(_group_query, p, seed)
    return found


def _additive(p: Attention) -> np.ndarray | None:
    """The mask as a bias that broadcasts to [B, N1, S1, S2]."""
    a = inputs(p)
    if p.mask == "pse":
        return a.pse
    if p.mask in ("bool", "band", "prefix"):
        keep = kept(p, np.arange(p.S1))[None, None]
        return np.where(keep, 0, -1e30).astype(DTYPES[p.dtype])
    return None


def _attention_23(p: Attention, seed: int) -> Candidate:
    a = inputs(p, seed)
    feeds = {"q": a.q, "k": a.k, "v": a.v}
    if p.mask == "bool":
        feeds["mask"] = ~a.dropped
    elif p.mask == "pse":
        feeds["mask"] = a.pse
    node = _node("Attention", " ".join(feeds), is_causal=int(p.mask == "causal"))
    return _bound([node], feeds, {}, ("y", a.q.dtype, a.q.shape), opset=23)


def _merged(x: np.ndarray) -> np.ndarray:
    """[B, N, S, D] -> [B, S, N * D]."""
    B, N, S, D = x.shape
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(B, S, N * D))


def _split(p: Attention, y: np.ndarray) -> np.ndarray:
    return y.reshape(p.B, p.S1, p.N1, p.D).transpose(0, 2, 1, 3)


def _multi_head(p: Attention, seed: int) -> Candidate:
    a = inputs(p, seed)
    feeds = {"q": _merged(a.q), "k": _merged(a.k), "v": _merged(a.v)}
    names = ["q", "k", "v"]
    bias = _additive(p)
    if bias is not None:
        feeds["bias"] = bias
        names += ["", "", "bias"]
    node = _node(
        "MultiHeadAttention",
        names,
        domain=MICROSOFT,
        num_heads=p.N1,
        unidirectional=int(p.mask == "causal"),
    )
    output = ("y", a.q.dtype, (p.B, p.S1, p.N1 * p.D))
    return _bound([node], feeds, {}, output, partial(_split, p))


def _group_query(p: Attention, seed: int) -> Candidate:
    """Always causal. With one query the cache holds all keys but the last, which it appends."""
    a = inputs(p, seed)
    past = p.S2 - p.S1
    feeds = {
        "q": _merged(a.q),
        "k": _merged(a.k[:, :, past:]),
        "v": _merged(a.v[:, :, past:]),
        "last": np.full(p.B, p.S2 - 1, np.int32),
        "total": np.array([p.S2], np.int32),
    }
    names = ["q", "k", "v", "", "", "last", "total"]
    cache = (p.B, p.N2, p.S2, p.D)
    if past:
        feeds |= {"past_k": a.k.copy(), "past_v": a.v.copy()}
        names[3:5] = ["past_k", "past_v"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_k", "present_v"],
        domain=MICROSOFT,
        num_heads=p.N1,
        kv_num_heads=p.N2,
    )
    outputs = [
        ("y", a.q.dtype, (p.B, p.S1, p.N1 * p.D)),
        ("present_k", a.q.dtype, cache),
        ("present_v", a.q.dtype, cache),
    ]
    in_place = {"present_k": "past_k", "present_v": "past_v"} if past else {}
    return _bound([node], feeds, {}, outputs, partial(_split, p), in_place=in_place)


def _encoder(p: Encoder) -> Candidate:
    from ..encoder import onnxruntime_int8

    return _session_candidate(
        onnxruntime_int8(p).SerializeToString(),
        vars(inputs(p)),
        [("embedding", DTYPES["fp32"], (p.B, p.HIDDEN))],
    )


def _node(op_type: str, names: str | Sequence[str], output: str = "y", **attributes):
    names = names.split() if isinstance(names, str) else names
    return helper.make_node(op_type, names, [output], **attributes)


def _bound(
    nodes,
    feeds: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    outputs,
    finish=lambda y: y,
    *,
    opset: int = 21,
    in_place: Mapping[str, str] | None = None,
) -> Candidate:
    outputs = [outputs] if isinstance(outputs, tuple) else outputs

    def declare(name, dtype, shape):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    graph = helper.make_graph(
        nodes,
        "peer",
        [declare(name, x.dtype, x.shape) for name, x in feeds.items()],
        [declare(*output) for output in outputs],
        [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=11,
    )
    return _session_candidate(
        model.SerializeToString(), feeds, outputs, finish, in_place=in_place or {}
    )


def _session_candidate(
    model: bytes, feeds, outputs, finish=lambda y: y, *, in_place: Mapping[str, str] = {}
) -> Candidate:
    """A session with inputs and outputs bound; in_place: output -> input whose memory it takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, dtype, shape in outputs:
        values[name] = (
            values[in_place[name]]
            if name in in_place
            else onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        )
        binding.bind_ortvalue_output(name, values[name])

    def call() -> None:
        session.run_with_iobinding(binding)

    def result() -> np.ndarray:
        call()
        return finish(values[outputs[0][0]].numpy())

    return Candidate("", call, result)
