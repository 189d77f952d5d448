"""A model of standard and locked operators: compiled, saved, loaded again, checked node by node.

A transformer block with random weights: attention is mindspore::SpeedFusionAttention with a causal
mask and ALiBi slopes, the feed-forward layer npu::NPUQuantMatmul between standard QuantizeLinear
and Relu. `build` is what the two deployment examples run.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import opferry
from opferry.reference import evaluator

HIDDEN, HEADS, FEED_FORWARD = 64, 4, 96
STEP = 0.03  # the normalised activations keep within 127 of these


def build(seed: int = 0) -> onnx.ModelProto:
    """x float32 (B, S, 64) -> y float32 (B, S, 96)."""
    draw = np.random.default_rng(seed).standard_normal
    weight = draw((FEED_FORWARD, HIDDEN)) / 8
    weight_step = np.abs(weight).max(axis=1) / 127
    constants = {
        "ones": np.ones(HIDDEN, np.float32),
        **{f"W_{role}": (draw((HIDDEN, HIDDEN)) / 8).astype(np.float32) for role in "qkv"},
        "slopes": (2.0 ** -np.arange(1, HEADS + 1)).astype(np.float32),
        "causal": np.triu(np.ones((2048, 2048), np.uint8), 1),
        "step": np.float32(STEP),
        "zero": np.int8(0),
        "ff.weight": np.rint(weight / weight_step[:, None]).astype(np.int8),
        "ff.scale": (weight_step * STEP).astype(np.float32),
        "ff.bias": np.rint(10 * draw(FEED_FORWARD)).astype(np.int32),
    }
    make = helper.make_node
    nodes = [
        make("LayerNormalization", ["x", "ones"], ["n"]),
        *[make("MatMul", ["n", f"W_{role}"], [role]) for role in "qkv"],
        opferry.speed_fusion_attention(
            *("q", "k", "v"),
            head_num=HEADS,
            input_layout="BSH",
            pse="slopes",
            pse_type=2,
            atten_mask="causal",
            sparse_mode=2,
            scale=(HIDDEN // HEADS) ** -0.5,
            outputs=["a"],
            name="attention",
        ),
        make("Add", ["x", "a"], ["r"]),
        make("LayerNormalization", ["r", "ones"], ["m"]),
        make("QuantizeLinear", ["m", "step", "zero"], ["m8"]),
        opferry.linear_a8w8_quant(
            HIDDEN, FEED_FORWARD, output_dtype="float16", name="ff", input="m8", output="f16"
        ),
        make("Cast", ["f16"], ["f"], to=TensorProto.FLOAT),
        make("Relu", ["f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", HIDDEN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", FEED_FORWARD])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid(*i) for i in {"": 17, "npu": 1, "mindspore": 1}.items()]
    return helper.make_model(graph, opset_imports=imports)


def main() -> int:
    model = build()
    module = opferry.compile(model)
    with tempfile.TemporaryDirectory() as folder:
        module.save(Path(folder) / "block")
        module = opferry.load(Path(folder) / "block")
        print(f"saved, loaded: {module}")
        for shape in ((1, 1), (2, 37), (3, 130)):
            x = np.random.default_rng(1).standard_normal((*shape, HIDDEN)).astype(np.float32)
            y = module.run({"x": x})["y"]
            want = evaluator(model).run(None, {"x": x})[0]
            print(f"  x {x.shape}: largest difference to NumPy {np.abs(y - want).max():.1e}")
    report = opferry.validate(model, module)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
