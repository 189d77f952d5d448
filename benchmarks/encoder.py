"""The sentence encoder of the examples, as ours and as what other libraries are given.

All have the same published weights. Ours is the example's int8 model. The others start from a
float32 graph of standard operators, in the shape in which PyTorch exports BERT, which is what
ONNX Runtime's optimiser for transformers recognises, and are quantised by ONNX Runtime's tools.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .inputs import inputs
from .shapes import Encoder

_EXAMPLES = str(Path(__file__).parents[1] / "examples")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CALIBRATION_BATCHES = 8


def _example(name: str):
    """The module `name` of the example."""
    if _EXAMPLES not in sys.path:
        sys.path.append(_EXAMPLES)
    return importlib.import_module(f"minilm.{name}")


@functools.cache
def _published() -> tuple[dict[str, np.ndarray], dict]:
    files = _example("files")
    return files.weights(), files.config()


@functools.lru_cache(maxsize=2)
def embeddings(p: Encoder) -> np.ndarray:
    """Of the float32 graph in NumPy, [B, H]."""
    return ReferenceEvaluator(float_model(p)).run(None, vars(inputs(p)))[0].astype(np.float64)


@functools.cache
def quantised_model() -> onnx.ModelProto:
    """Ours; B and S are symbols."""
    weights, config = _published()
    largest = _example("calibration").largest_inputs(weights, config)
    return _example("quantised").build(weights, config, largest)


def float_model(p: Encoder, int8_weights: bool = False) -> onnx.ModelProto:
    """float32 graph of B sentences of S tokens; the weights as int8 and a scale per column."""
    return _FloatGraph(p, int8_weights).model


def onnxruntime_int8(p: Encoder) -> onnx.ModelProto:
    """Fused by the transformer optimiser, then dynamically quantised (unsigned activations)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, fused, quantised = (str(Path(folder) / n) for n in ("f.onnx", "o.onnx", "q.onnx"))
        onnx.save(float_model(p), plain)
        heads = _published()[1]["num_attention_heads"]
        optimised = optimizer.optimize_model(
            plain, "bert", num_heads=heads, hidden_size=p.HIDDEN, opt_level=0
        )
        optimised.save_model_to_file(fused)
        quantize_dynamic(fused, quantised, weight_type=QuantType.QInt8, per_channel=True)
        return onnx.load(quantised)


def qdq_int8(p: Encoder) -> onnx.ModelProto:
    """Statically quantised matmuls between Quantize- and DequantizeLinear, calibrated here."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Batches(CalibrationDataReader):
        def __init__(self):
            self._left = [vars(inputs(p, seed)) for seed in range(_CALIBRATION_BATCHES)]

        def get_next(self):
            return self._left.pop() if self._left else None

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, quantised = (str(Path(folder) / name) for name in ("f.onnx", "q.onnx"))
        onnx.save(float_model(p), plain)
        quantize_static(
            plain,
            quantised,
            Batches(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(quantised)


@contextlib.contextmanager
def _quiet():
    """The tools print and log their advice."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


class _FloatGraph:
    """Adds nodes under generated names; `model` is the result. Tokens are [B, S, H]."""

    def __init__(self, p: Encoder, int8_weights: bool):
        self.p = p
        self.weights, config = _published()
        self.heads, self.epsilon = config["num_attention_heads"], config["layer_norm_eps"]
        self.int8_weights = int8_weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._build()
        self.model = self._finished()

    def _build(self) -> None:
        words = self._add("Gather", self._weight("embeddings.word_embeddings.weight"), "input_ids")
        types = self._weight("embeddings.token_type_embeddings.weight")
        types = self._add("Gather", types, "token_type_ids")
        x = self._add("Add", words, types)
        places = self.weights["embeddings.position_embeddings.weight"][None, : self.p.S]
        x = self._add("Add", x, self._constant(places))
        x = self._layer_norm(x, "embeddings.LayerNorm")
        # 0 where a token is, a very negative number where padding is: [B, 1, 1, S]
        mask = self._add("Unsqueeze", "attention_mask", self._constant(np.array([1])))
        mask = self._add("Unsqueeze", mask, self._constant(np.array([2])))
        mask = self._add("Cast", mask, to=TensorProto.FLOAT)
        mask = self._add("Sub", self._constant(np.float32(1)), mask)
        mask = self._add("Mul", mask, self._constant(np.float32(-10000)))
        for layer in range(self.p.LAYERS):
            x = self._layer(x, mask, f"encoder.layer.{layer}")
        self._pool(x)

    def _layer(self, x: str, mask: str, name: str) -> str:
        D = self.p.HIDDEN // self.heads
        split = self._constant(np.array([0, 0, self.heads, D]))

        def heads(role: str, *axes: int) -> str:
            y = self._linear(x, f"{name}.attention.self.{role}")
            return self._add("Transpose", self._add("Reshape", y, split), perm=axes)

        q, k, v = heads("query", 0, 2, 1, 3), heads("key", 0, 2, 3, 1), heads("value", 0, 2, 1, 3)
        scores = self._add("MatMul", q, k)
        scores = self._add("Div", scores, self._constant(np.float32(math.sqrt(D))))
        scores = self._add("Softmax", self._add("Add", scores, mask), axis=-1)
        y = self._add("Transpose", self._add("MatMul", scores, v), perm=(0, 2, 1, 3))
        y = self._add("Reshape", y, self._constant(np.array([0, 0, self.p.HIDDEN])))
        y = self._linear(y, f"{name}.attention.output.dense")
        x = self._layer_norm(self._add("Add", y, x), f"{name}.attention.output.LayerNorm")
        y = self._linear(x, f"{name}.intermediate.dense")
        erf = self._add("Erf", self._add("Div", y, self._constant(np.float32(math.sqrt(2)))))
        y = self._add("Mul", y, self._add("Add", erf, self._constant(np.float32(1))))
        y = self._add("Mul", y, self._constant(np.float32(0.5)))
        y = self._linear(y, f"{name}.output.dense")
        return self._layer_norm(self._add("Add", y, x), f"{name}.output.LayerNorm")

    def _pool(self, x: str) -> None:
        """Mean over tokens, scaled to length 1."""
        weight = self._add("Cast", "attention_mask", to=TensorProto.FLOAT)
        weight = self._add("Unsqueeze", weight, self._constant(np.array([2])))
        axis = self._constant(np.array([1]))
        total = self._add("ReduceSum", self._add("Mul", x, weight), axis, keepdims=0)
        mean = self._add("Div", total, self._add("ReduceSum", weight, axis, keepdims=0))
        length = self._add("ReduceL2", mean, axes=[1], keepdims=1)
        self.nodes.append(helper.make_node("Div", [mean, length], ["embedding"]))

    def _linear(self, x: str, name: str) -> str:
        weight = np.ascontiguousarray(self.weights[f"{name}.weight"].T)  # [in, out]
        if self.int8_weights:
            scale = np.abs(weight).max(axis=0) / np.float32(127)
            rounded = self._constant(np.rint(weight / scale).astype(np.int8))
            matrix = self._add("DequantizeLinear", rounded, self._constant(scale), axis=1)
        else:
            matrix = self._constant(weight)
        return self._add("Add", self._weight(f"{name}.bias"), self._add("MatMul", x, matrix))

    def _layer_norm(self, x: str, name: str) -> str:
        scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._add("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.epsilon)

    def _weight(self, name: str) -> str:
        return self._constant(self.weights[name])

    def _constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _add(self, op_type: str, *names: str, **attributes) -> str:
        output = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], output, **attributes))
        return output

    def _finished(self) -> onnx.ModelProto:
        shape = [self.p.B, self.p.S]
        graph = helper.make_graph(
            self.nodes,
            "encoder",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in _INPUTS],
            [
                helper.make_tensor_value_info(
                    "embedding", TensorProto.FLOAT, [self.p.B, self.p.HIDDEN]
                )
            ],
            [numpy_helper.from_array(np.asarray(x), name) for name, x in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)
