"""all-MiniLM-L6-v2 as an ONNX model for int8: the encoder that opferry compiles.

Every linear layer is `npu::NPUQuantMatmul`: int8 weights with a scale per output channel, int8
activations with a scale per token that the graph computes. A few channels of the activations are
far larger than the rest and would leave those few steps; where a layer's input comes from a
normalisation, each channel is divided by a constant and the weights multiplied by it (SmoothQuant,
arXiv 2211.10438). Attention is
`mindspore::SpeedFusionAttention` with the padding as its mask. The rest is standard ONNX. Batch B
and length S are symbolic: one model, and one compiled module, for every number of sentences and
tokens.
"""

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import opferry

OPSET = 17
INT8_MAX = 127


def build(
    weights: dict[str, np.ndarray], config: dict, largest: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """input_ids, attention_mask, token_type_ids int64 (B, S) -> embedding float32 (B, H), of length
    1.

    `weights` are the published float32 tensors by name, `config` is the model's config.json,
    `largest` the magnitudes of `calibration.largest_inputs`.
    """
    g = _Encoder(weights, config, largest)
    size = g.add("Shape", "input_ids")  # [B, S]
    length = g.add("Gather", size, g.constant([1]))  # [S]
    x = g.embeddings(length)
    # (B, S, H) for attention, and true where a key is padding, for every head and query:
    # (B, 1, S, S)
    g.shape = g.add("Concat", size, g.constant([g.hidden]), axis=0)
    padding = g.add("Equal", "attention_mask", g.constant(0))
    padding = g.add("Unsqueeze", padding, g.constant([1, 2]))
    batch = g.add("Gather", size, g.constant([0]))
    full = g.add("Concat", batch, g.constant([1]), length, length, axis=0)
    g.mask = g.add("Expand", padding, full)
    for layer in range(config["num_hidden_layers"]):
        x = g.layer(x, f"encoder.layer.{layer}")
    g.pool(x)
    return g.model()


class _Encoder:
    """Adds nodes to a graph. Between the layers tokens are rows: x is float32 (B*S, H)."""

    def __init__(self, weights, config, largest):
        self.weights = weights
        self.largest = largest
        self.hidden = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def embeddings(self, length: str) -> str:
        """Word, position and token type, normalised."""
        words = self.add("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        table = self.weight("embeddings.position_embeddings.weight")
        positions = self.add("Slice", table, self.constant([0]), length, self.constant([0]))
        types = self.weight("embeddings.token_type_embeddings.weight")
        types = self.add("Gather", types, "token_type_ids")
        x = self.add("Add", self.add("Add", words, positions), types)
        return self.layer_norm(self.rows(x), "embeddings.LayerNorm")

    def layer(self, x: str, name: str) -> str:
        projections = [f"{name}.attention.self.{role}" for role in ("query", "key", "value")]
        divisors = self.divisors(projections)
        x8 = self.quantise(x, divisors)
        q, k, v = (  # (B, S, H) float16 each
            self.add("Reshape", self.linear(x8, projection, divisors), self.shape)
            for projection in projections
        )
        attended = f"{name}.attention"
        self.nodes.append(
            opferry.speed_fusion_attention(
                q,
                k,
                v,
                head_num=self.heads,
                input_layout="BSH",
                atten_mask=self.mask,
                scale=1 / math.sqrt(self.hidden // self.heads),
                outputs=[attended],
                name=attended,
            )
        )
        attended = self.quantise(self.float32(self.rows(attended)))
        attended = self.float32(self.linear(attended, f"{name}.attention.output.dense"))
        x = self.layer_norm(self.add("Add", x, attended), f"{name}.attention.output.LayerNorm")
        intermediate = f"{name}.intermediate.dense"
        divisors = self.divisors([intermediate])
        h = self.linear(self.quantise(x, divisors), intermediate, divisors)
        h = self.quantise(self.gelu(self.float32(h)))
        h = self.float32(self.linear(h, f"{name}.output.dense"))
        return self.layer_norm(self.add("Add", x, h), f"{name}.output.LayerNorm")

    def divisors(self, layers: list[str]) -> np.ndarray:
        """(in,) for layers of one input: half of a channel's excess goes from it to the weights."""
        largest_weight = np.max(
            [np.abs(self.weights[f"{layer}.weight"]).max(axis=0) for layer in layers], axis=0
        )
        ratio = np.sqrt(self.largest[layers[0]] / largest_weight)
        return (ratio / np.exp(np.log(ratio).mean())).astype(np.float32)

    def quantise(self, x: str, divisors: np.ndarray | None = None) -> tuple[str, str]:
        """Rows of x as int8, the largest magnitude of each at 127, and their scales (B*S,)."""
        if divisors is not None:
            x = self.add("Mul", x, self.constant(1 / divisors))
        largest = self.add("ReduceMax", self.add("Abs", x), axes=[-1], keepdims=1)  # (B*S, 1)
        scale = self.add("Div", largest, self.constant(np.float32(INT8_MAX)))
        steps = self.add("Round", self.add("Div", x, scale))
        low, high = self.constant(np.float32(-INT8_MAX)), self.constant(np.float32(INT8_MAX))
        x8 = self.add("Cast", self.add("Clip", steps, low, high), to=TensorProto.INT8)
        return x8, self.add("Reshape", scale, self.constant([-1]))

    def linear(self, x: tuple[str, str], name: str, divisors: np.ndarray | float = 1) -> str:
        """x @ weight.T + bias, of quantised rows of x / divisors; float16."""
        weight = self.weights[f"{name}.weight"] * divisors  # (out, in)
        scale = np.abs(weight).max(axis=1) / np.float32(INT8_MAX)
        weight8 = np.rint(weight / scale[:, None]).astype(np.int8)
        self.initializer(f"{name}.weight", weight8)
        self.initializer(f"{name}.scale", scale)
        self.initializer(f"{name}.bias", self.weights[f"{name}.bias"])
        x8, pertoken_scale = x
        node = opferry.linear_a8w8_quant(
            weight.shape[1],
            weight.shape[0],
            pertoken_scale=True,
            output_dtype="float16",
            name=name,
            input=x8,
            output=name,
        )
        # The builder names the scales after the layer; these come from the graph.
        node.input[list(node.input).index(f"{name}.pertoken_scale")] = pertoken_scale
        self.nodes.append(node)
        return name

    def float32(self, x: str) -> str:
        return self.add("Cast", x, to=TensorProto.FLOAT)

    def layer_norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, bias, epsilon=self.epsilon)

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", self.add("Div", x, self.constant(np.float32(math.sqrt(2)))))
        half = self.add("Mul", x, self.constant(np.float32(0.5)))
        return self.add("Mul", half, self.add("Add", erf, self.constant(np.float32(1))))

    def pool(self, x: str) -> None:
        """Mean over the tokens that are no padding, scaled to length 1."""
        tokens = self.add("Reshape", x, self.shape)
        count = self.add("Cast", "attention_mask", to=TensorProto.FLOAT)
        count = self.add("Unsqueeze", count, self.constant([2]))  # (B, S, 1)
        axis = self.constant([1])
        total = self.add("ReduceSum", self.add("Mul", tokens, count), axis, keepdims=0)
        mean = self.add("Div", total, self.add("ReduceSum", count, axis, keepdims=0))
        norm = self.add("ReduceL2", mean, axes=[1], keepdims=1)
        self.add("Div", mean, norm, output="embedding")

    def rows(self, x: str) -> str:
        """(B, S, H) -> (B*S, H)."""
        return self.add("Reshape", x, self.constant([-1, self.hidden]))

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes) -> str:
        output = output or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value) -> str:
        """Integers become int64, as ONNX wants axes and shapes."""
        name = f"constant_{len(self.initializers)}"
        return self.initializer(name, np.asarray(value))

    def weight(self, name: str) -> str:
        return self.initializer(name, self.weights[name])

    def initializer(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "all-MiniLM-L6-v2",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "S"])
                for name in ("input_ids", "attention_mask", "token_type_ids")
            ],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", self.hidden])],
            initializer=self.initializers,
        )
        domains = {"": OPSET, "npu": 1, "mindspore": 1}
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()]
        )
        onnx.checker.check_model(model, full_check=True)
        return model
