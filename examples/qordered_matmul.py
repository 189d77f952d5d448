"""com.microsoft::QOrderedMatMul: one product in row order and in tensor cores' tiled orders."""

import numpy as np
from minilm import files, first_layer
from quantise import quantise
from verdict import judge

import opferry
from opferry.reference.numerics import pack, unpack

COL, ROW, COL32, COL4_4R2_8C = 0, 1, 2, 3
M, K, N = 64, 384, 384


def main() -> None:
    x = first_layer.hidden(M)
    weight = files.weights()[f"{first_layer.ATTENTION}.key.weight"]  # (N, K)
    a, scale_A = quantise(x)
    b, scale_B = quantise(weight.T, axis=1)
    _, scale_Y = quantise(x @ weight.T)
    scales = {"scale_A": scale_A, "scale_B": scale_B, "scale_Y": scale_Y}

    # The same bytes of B mean another matrix in another order: B is declared (K, N) in all of them,
    # and the tiled ones store its transpose.
    rows = {"A": a, "B": pack(b, COL)}
    tiled = {"A": pack(a, COL32), "B": pack(b.T, COL4_4R2_8C, (K, N))}
    results = []
    for name, matrices, orders in (
        ("row", rows, {"order_A": ROW, "order_B": COL, "order_Y": ROW}),
        ("tiled", tiled, {"order_A": COL32, "order_B": COL4_4R2_8C, "order_Y": COL32}),
    ):
        feeds = {**matrices, **scales}
        module = opferry.compile(
            opferry.node_model(
                "QOrderedMatMul", feeds, initializers=[n for n in feeds if n != "A"], **orders
            )
        )
        y = module.run({"A": matrices["A"]})["Y"]
        print(name)
        judge("QOrderedMatMul", feeds, orders, [y])
        results.append(unpack(y, orders["order_Y"]))
    assert np.array_equal(*results)
    print("both orders hold the same matrix")


if __name__ == "__main__":
    main()
