"""npu::NPUQuantMatmul: a linear layer of the encoder in int8, at several numbers of tokens."""

import numpy as np
from minilm import files, first_layer
from quantise import quantise
from verdict import judge

import opferry

LAYER = "encoder.layer.0.intermediate.dense"  # 384 -> 1536


def main() -> None:
    weights = files.weights()
    weight, bias = weights[f"{LAYER}.weight"], weights[f"{LAYER}.bias"]
    x = first_layer.hidden(100)
    x1, pertoken_scale = quantise(x, axis=0)
    x2, scale = quantise(weight, axis=0)

    feeds = {
        "x1": x1,
        "x2": x2,
        "scale": scale,
        "pertoken_scale": pertoken_scale,
        "bias": bias,
    }
    attributes = {"transpose_x2": 1, "output_dtype": 10}  # 10 is ONNX's code of float16
    module = opferry.compile(
        opferry.node_model(
            "NPUQuantMatmul",
            feeds,
            initializers=["x2", "scale", "bias"],
            symbolic={"x1": {0: "M"}, "pertoken_scale": {0: "M"}},
            **attributes,
        )
    )
    print(module)
    for m in (1, 37, 100):
        run = {"x1": x1[:m], "pertoken_scale": pertoken_scale[:m]}
        y = module.run(run)["y"]
        print(f"{m} tokens")
        judge("NPUQuantMatmul", {**feeds, **run}, attributes, [y])
    exact = x @ weight.T + bias
    error = np.abs(y - exact).max() / np.abs(exact).max()
    print(f"int8 against the float32 layer: largest error {error:.2%} of the largest value")


if __name__ == "__main__":
    main()
