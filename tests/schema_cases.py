"""Models of one node whose sizes say nothing: for schemas and the checks that need nothing else."""

import ml_dtypes
import numpy as np

from opferry.frontend import schemas
from opferry.frontend.builders import node_model

BF16 = ml_dtypes.bfloat16
ONE = (np.float32, (1,))


def linear(x1=("M", 3), x2=(5, 3), **attrs):
    feeds = {"x1": (np.int8, x1), "x2": (np.int8, x2), "scale": ONE}
    return node_model("NPUQuantMatmul", feeds, **{"transpose_x2": 1, **attrs})


def qordered(a=("B", "M", 3), b=(3, 5), **attrs):
    feeds = {"A": (np.int8, a), "scale_A": ONE, "B": (np.int8, b), "scale_B": ONE, "scale_Y": ONE}
    return node_model(
        "QOrderedMatMul", feeds, **{"order_A": 1, "order_B": 0, "order_Y": 1, **attrs}
    )


def longformer(shape=("B", "S", 6), check=True, **attrs):
    hidden = 6
    feeds = {p.name: ONE for p in schemas.schema(*LONGFORMER).inputs}
    feeds |= {
        "input": (np.int8, shape),
        "weight": (np.int8, (hidden, 3 * hidden)),
        "bias": (np.float32, (3 * hidden,)),
        "mask": (np.float16, shape[:2]),
        "global_weight": (np.int8, (hidden, 3 * hidden)),
        "global_bias": (np.float32, (3 * hidden,)),
        "global": (np.int32, shape[:2]),
    }
    return node_model(LONGFORMER[1], feeds, check=check, **attrs)


def speed(query, dtype=np.float16, outputs=None, **attrs):
    feeds = dict.fromkeys(("query", "key", "value"), (dtype, query))
    return node_model("SpeedFusionAttention", feeds, outputs, **attrs)


def nsa(dtype=BF16, outputs=None, **attrs):
    feeds = {
        "query": (dtype, ("T", 4, 7)),
        "key": (dtype, ("T2", 2, 7)),
        "value": (dtype, ("T2", 2, 5)),
        **dict.fromkeys(
            ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"), (np.int64, ("B",))
        ),
    }
    sizes = {
        "head_num": 4,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 3,
    }
    return node_model("NPUNsaCompressAttention", feeds, outputs, **{**sizes, **attrs})


LONGFORMER = ("com.microsoft", "QOrderedLongformerAttention")


INFERENCE = {
    "linear_symbolic_batch": (linear(("B", "M", 3)), {"y": ("int8", ["B", "M", 5])}),
    "linear_float16": (linear(output_dtype=10), {"y": ("float16", ["M", 5])}),
    "linear_bfloat16": (linear(output_dtype=16), {"y": ("bfloat16", ["M", 5])}),
    "linear_int32": (linear(output_dtype=6), {"y": ("int32", ["M", 5])}),
    "linear_transposes": (
        linear((3, 7), (3, 5), transpose_x1=1, transpose_x2=0),
        {"y": ("int8", [7, 5])},
    ),
    "linear_symbol_against_one": (linear(("B", 2, 3), (1, 5, 3)), {"y": ("int8", ["B", 2, 5])}),
    "linear_symbol_against_constant": (
        linear(("B", 2, 3), (4, 5, 3)),
        {"y": ("int8", [4, 2, 5])},
    ),
    "linear_two_symbols": (linear(("B", 2, 3), ("C", 5, 3)), {"y": ("int8", [None, 2, 5])}),
    "linear_rank_of_the_larger": (
        linear((2, 3), (4, 1, 5, 3)),
        {"y": ("int8", [4, 1, 2, 5])},
    ),
    "linear_unknown_dimension": (linear((None, 3)), {"y": ("int8", [None, 5])}),
    "qordered_3d": (qordered(), {"Y": ("int8", ["B", "M", 5])}),
    "qordered_2d_with_batch_of_one": (qordered((4, 3), (1, 3, 5)), {"Y": ("int8", [4, 5])}),
    "longformer": (
        longformer(num_heads=2, window=4, order_input=1, order_output=1),
        {"output": ("int8", ["B", "S", 6])},
    ),
    "speed_bsh": (
        speed(("B", "S", 64), head_num=4, input_layout="BSH"),
        {
            "attention_out": ("float16", ["B", "S", 64]),
            "softmax_max": ("float32", ["B", 4, "S", 8]),
            "softmax_sum": ("float32", ["B", 4, "S", 8]),
            "softmax_out": ("float16", [0]),
            "seed_out": ("int64", []),
            "offset_out": ("int64", []),
            "numels": ("int64", []),
        },
    ),
    "speed_sbh": (
        speed((7, 2, 64), outputs=["softmax_max"], head_num=4, input_layout="SBH"),
        {"softmax_max": ("float32", [2, 4, 7, 8])},
    ),
    "speed_bnsd": (
        speed((2, 4, 7, 3), outputs=["softmax_sum"], head_num=4, input_layout="BNSD"),
        {"softmax_sum": ("float32", [2, 4, 7, 8])},
    ),
    "speed_bsnd": (
        speed((2, 7, 4, 3), BF16, ["softmax_sum", "softmax_out"], head_num=4, input_layout="BSND"),
        {"softmax_sum": ("float32", [2, 4, 7, 8]), "softmax_out": ("bfloat16", [0])},
    ),
    "speed_tnd": (
        speed(("T", 4, 3), np.float32, ["softmax_max"], head_num=4, input_layout="TND"),
        {"softmax_max": ("float32", ["T", 4, 8])},
    ),
    "nsa": (
        nsa(),
        {
            "softmax_max": ("float32", ["T", 4, 8]),
            "softmax_sum": ("float32", ["T", 4, 8]),
            "attention_out": ("bfloat16", ["T", 4, 5]),
            "topk_indices_out": ("int32", ["T", 2, 3]),
        },
    ),
    "nsa_indices_only": (
        nsa(outputs=["topk_indices_out"]),
        {"topk_indices_out": ("int32", ["T", 2, 3])},
    ),
    "trans_quant_param_vector": (
        node_model("NPUTransQuantParam", {"scale": (np.float32, ("N",))}),
        {"y": ("int64", ["N"])},
    ),
    "trans_quant_param_longer_offset": (
        node_model("NPUTransQuantParam", {"scale": ONE, "offset": (np.float32, (9,))}),
        {"y": ("int64", [9])},
    ),
    "trans_quant_param_row": (
        node_model("NPUTransQuantParam", {"scale": (np.float32, (1, 9))}),
        {"y": ("int64", [9])},
    ),
}
