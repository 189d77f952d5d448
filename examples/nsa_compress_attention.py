"""npu::NPUNsaCompressAttention on text: which passages a token would read more closely.

Keys and values of 32 tokens, every 16, are averaged to one; attention over these also scores
blocks of 64 tokens, of which the best three are returned for every token.
"""

import math

import numpy as np
from minilm import first_layer
from verdict import judge

import opferry

LENGTH, COMPRESS, STRIDE, SELECT, COUNT = 480, 32, 16, 64, 3
N, D = first_layer.HEADS, first_layer.HEAD_SIZE
OUTPUTS = ["softmax_max", "softmax_sum", "attention_out", "topk_indices_out"]


def main() -> None:
    query, key, value = (x.reshape(-1, N, D) for x in first_layer.query_key_value(LENGTH))
    starts = np.arange(0, LENGTH - COMPRESS + 1, STRIDE)  # of the compressed keys
    key, value = (
        np.stack([x[s : s + COMPRESS].mean(axis=0) for s in starts]) for x in (key, value)
    )
    blocks = -(-len(starts) * STRIDE // SELECT)

    # A token sees a compressed key once all of its tokens have passed.
    token = np.arange(LENGTH)[:, None]
    feeds = {
        "query": query,
        "key": key,
        "value": value,
        "atten_mask": starts + COMPRESS - 1 > token,
        "topk_mask": np.arange(blocks) == token // SELECT,  # its own block is always chosen
    }
    attributes = {
        "head_num": N,
        "scale_value": 1 / math.sqrt(D),
        "compress_block_size": COMPRESS,
        "compress_stride": STRIDE,
        "select_block_size": SELECT,
        "select_block_count": COUNT,
        "actual_seq_qlen": [LENGTH],
        "actual_cmp_seq_kvlen": [len(starts)],
        "actual_sel_seq_kvlen": [blocks],
        "score_shift": 1,
        "masked_rows": "zero",
    }
    module = opferry.compile(opferry.node_model("NPUNsaCompressAttention", feeds, **attributes))
    print(module)
    got = module.run(feeds)
    judge("NPUNsaCompressAttention", feeds, attributes, [got[name] for name in OUTPUTS])

    ids = first_layer.token_ids(LENGTH)
    print(f'\nfrom the last of {LENGTH} tokens ("... {first_layer.words(ids[-8:])}"), head 0 reads')
    for block in got["topk_indices_out"][-1, 0]:
        print(f"  block {block}: {first_layer.words(ids[block * SELECT :][:12])} ...")


if __name__ == "__main__":
    main()
