"""mindspore::SpeedFusionAttention on text: causal attention, and sentences packed end to end."""

import math

import numpy as np
from minilm import first_layer
from verdict import judge

import opferry

N, D = first_layer.HEADS, first_layer.HEAD_SIZE
LEFT_UP_CAUSAL = 2
COMPRESSED_MASK = np.triu(np.ones((2048, 2048), np.uint8), 1)  # what the causal modes ask for
ENDS = [48, 49, 200]  # three pieces of the text: 48 tokens, 1 and 151


def main() -> None:
    query, key, value = (x.reshape(-1, N, D) for x in first_layer.query_key_value(ENDS[-1]))
    common = {"head_num": N, "scale": 1 / math.sqrt(D), "sparse_mode": LEFT_UP_CAUSAL}
    outputs = ["attention_out", "softmax_max", "softmax_sum"]

    print("TND: all tokens in one tensor, the pieces' ends as an input")
    packed = {
        "query": query,
        "key": key,
        "value": value,
        "atten_mask": COMPRESSED_MASK,
        "actual_seq_qlen": np.array(ENDS),
        "actual_seq_kvlen": np.array(ENDS),
    }
    attributes = {**common, "input_layout": "TND"}
    module = opferry.compile(
        opferry.node_model(
            "SpeedFusionAttention",
            packed,
            outputs,
            initializers=["atten_mask"],
            symbolic={name: {0: "T"} for name in ("query", "key", "value")},
            **attributes,
        )
    )
    result = run(module, packed, outputs)
    judge("SpeedFusionAttention", packed, attributes, result)

    print("BSND: the same pieces one by one, through one module for every length")
    attributes = {**common, "input_layout": "BSND"}
    module = opferry.compile(
        opferry.node_model(
            "SpeedFusionAttention",
            {
                "query": query[None],
                "key": key[None],
                "value": value[None],
                "atten_mask": COMPRESSED_MASK,
            },
            outputs,
            initializers=["atten_mask"],
            symbolic={name: {1: "S"} for name in ("query", "key", "value")},
            **attributes,
        )
    )
    pieces = []
    for start, end in zip([0, *ENDS], ENDS):
        piece = {
            "query": query[None, start:end],
            "key": key[None, start:end],
            "value": value[None, start:end],
            "atten_mask": COMPRESSED_MASK,
        }
        alone = run(module, piece, outputs)
        judge("SpeedFusionAttention", piece, attributes, alone)
        pieces.append(alone[0][0])
    difference = np.abs(np.concatenate(pieces) - result[0]).max()
    print(f"packed and one by one differ by {difference:.1e} at most")


def run(module, feeds, outputs):
    got = module.run({name: x for name, x in feeds.items() if name != "atten_mask"})
    return [got[name] for name in outputs]


if __name__ == "__main__":
    main()
