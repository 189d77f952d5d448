"""OpenVINO on the CPU: models of its own operators."""

from __future__ import annotations

from functools import partial

import numpy as np
import openvino
from openvino import opset13 as ops

from .. import THREADS
from ..candidate import Candidate
from ..inputs import inputs, kept, output_bias
from ..shapes import Attention, Encoder, Matmul, Problem


def candidates(problem: Problem, seed: int = 0) -> dict:
    if isinstance(problem, Matmul):
        takes = problem.out == "int8" and not problem.residual
        builders = {"FakeQuantize-MatMul": partial(_matmul, problem, seed)} if takes else {}
    elif isinstance(problem, Attention):
        # It multiplies half floats as bf16 or not at all, and knows one number of heads.
        takes = problem.dtype in ("fp32", "bf16") and problem.N1 == problem.N2
        builders = (
            {"ScaledDotProductAttention": partial(_attention, problem, seed)} if takes else {}
        )
    elif isinstance(problem, Encoder):
        builders = {
            "int8, static": partial(_encoder, problem, False),
            "int8, dynamic": partial(_encoder, problem, True),
        }
    else:
        builders = {}
    return {f"openvino {name}": partial(_named, name, b) for name, b in builders.items()}


def _named(name: str, builder) -> Candidate:
    candidate = builder()
    candidate.name = f"openvino {name}"
    return candidate


def _matmul(p: Matmul, seed: int) -> Candidate:
    """Signed activations, int8 result: the graph that its quantiser makes of a layer with bias."""
    a = inputs(p, seed)
    x = ops.parameter([p.M, p.K], np.int8)
    weight = ops.multiply(
        ops.convert(ops.constant(a.W), "f32"), ops.constant(a.scale.reshape(p.N, 1))
    )
    y = ops.matmul(ops.convert(x, "f32"), weight, False, True)
    y = ops.add(y, ops.constant(output_bias(p, seed).reshape(1, p.N)))
    low, high = np.float32(-128), np.float32(127)
    y = ops.fake_quantize(y, low, high, low, high, 256)
    return _compiled(ops.convert(y, "i8"), [x], [a.A])


def _attention(p: Attention, seed: int) -> Candidate:
    """bf16 is a hint how to compute; tensors stay float32."""
    a = inputs(p, seed)
    arrays = [np.ascontiguousarray(x, np.float32) for x in (a.q, a.k, a.v)]
    parameters = [ops.parameter(list(x.shape), np.float32) for x in arrays]
    mask = {}
    if p.mask in ("pse", "bool", "band", "prefix"):
        bias = a.pse
        if bias is None:
            keep = kept(p, np.arange(p.S1))[None, None]
            bias = np.where(keep, np.float32(0), np.float32(-1e30))
        arrays.append(np.ascontiguousarray(bias, np.float32))
        parameters.append(ops.parameter(list(bias.shape), np.float32))
        mask = {"attention_mask": parameters[-1]}
    y = ops.scaled_dot_product_attention(*parameters[:3], causal=p.mask == "causal", **mask)
    precision = {"fp32": "f32", "bf16": "bf16"}[p.dtype]
    return _compiled(y, parameters, arrays, precision)


def _encoder(p: Encoder, dynamic: bool) -> Candidate:
    """Activations quantised with calibrated scales, or by itself, row by row, as they come."""
    from ..encoder import float_model, qdq_int8

    model = float_model(p, int8_weights=True) if dynamic else qdq_int8(p)
    model = openvino.Core().read_model(model.SerializeToString())
    feeds = vars(inputs(p))
    arrays = [feeds[port.any_name] for port in model.inputs]
    group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(p.INNER)} if dynamic else {}
    return _requested(model, arrays, **group)


def _compiled(y, parameters, arrays, precision: str = "f32") -> Candidate:
    return _requested(openvino.Model([y], parameters), arrays, precision)


def _requested(model: openvino.Model, arrays, precision: str = "f32", **options) -> Candidate:
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": THREADS,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            **options,
        },
    )
    request = compiled.create_infer_request()
    for index, x in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(x, shared_memory=True))

    def result() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data.copy()

    return Candidate("", request.infer, result, borrowed=arrays)
