"""com.microsoft::QOrderedLongformerAttention on text: windows, and one token that sees all."""

import numpy as np
from minilm import files, first_layer
from quantise import quantise
from verdict import judge

import opferry

WINDOW = 32
COL, ROW = 0, 1
LENGTHS = (64, 256, 512)


def main() -> None:
    x = first_layer.hidden(max(LENGTHS))
    weights = files.weights()
    names = [f"{first_layer.ATTENTION}.{role}" for role in first_layer.ROLES]
    weight = np.concatenate([weights[f"{n}.weight"] for n in names])  # (3H, H): out, in
    bias = np.concatenate([weights[f"{n}.bias"] for n in names])
    projected = x @ weight.T + bias

    x8, scale_input = quantise(x)
    weight8, scale_weight = quantise(weight)
    _, scale_qkv = quantise(projected)
    column_order = weight8.reshape(weight8.shape[::-1])  # declared (H, 3H), stored by columns
    projection = {
        "weight": column_order,
        "scale_weight": scale_weight,
        "bias": bias / scale_qkv,  # this operator wants it divided already
        "scale_qkv_gemm": scale_qkv,
        # The encoder knows one projection; global tokens use the same here.
        "global_weight": column_order,
        "scale_global_weight": scale_weight,
        "global_bias": bias / scale_qkv,
        "scale_global_gemm": scale_qkv,
    }
    values = projected[:, -x.shape[1] :]
    constants = {
        **projection,
        "scale_input": scale_input,
        "scale_bias": np.float32(1),
        "scale_output": np.float32(np.abs(values).max() / 127),
    }
    attributes = {
        "num_heads": first_layer.HEADS,
        "window": WINDOW,
        "order_input": ROW,
        "order_weight": COL,
        "order_global_weight": COL,
        "order_output": ROW,
    }

    def feeds(length: int) -> dict[str, np.ndarray]:
        is_global = np.zeros((1, length), np.int32)
        is_global[0, 0] = 1  # [CLS]
        mask = np.zeros((1, length), np.float16)
        return {"input": x8[None, :length], "mask": mask, "global": is_global}

    symbols = {name: {0: "B", 1: "S"} for name in ("input", "mask", "global")}
    module = opferry.compile(
        opferry.node_model(
            "QOrderedLongformerAttention",
            {**feeds(LENGTHS[0]), **constants},
            initializers=list(constants),
            symbolic=symbols,
            **attributes,
        )
    )
    print(module)
    for length in LENGTHS:
        run = feeds(length)
        output = module.run(run)["output"]
        pairs = (2 * WINDOW + 1) / length
        print(f"{length} tokens; a local token sees at most {min(pairs, 1):.0%} of them, and [CLS]")
        judge("QOrderedLongformerAttention", {**run, **constants}, attributes, [output])


if __name__ == "__main__":
    main()
