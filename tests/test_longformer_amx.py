"""QOrderedLongformerAttention on matrix tiles of bfloat16: what its kernel has code of its own for,
as blocks of positions and of global tokens, ends of a head, rows and blocks that do not attend.
"""

import numpy as np
import pytest
from hosts import on
from test_qordered_longformer_attention import (
    COL4_4R2_8C,
    COL32,
    COL32_2R_4R4,
    ROW,
    agree,
    attributes,
    build,
    data,
)
from tvm.target import Target

import opferry
from opferry.driver.target import resolve
from opferry.frontend.builders import node_model
from opferry.relay_ops.orders import Order
from opferry.relay_ops.qordered_longformer_attention import Problem
from opferry.schedules.llvm import longformer, matrix_tiles

OP = "QOrderedLongformerAttention"
TILED = (COL32, COL4_4R2_8C, COL32_2R_4R4)


def tiles(*problem, **options):
    """The module of ``problem`` (num_heads, head_size, window) for matrix tiles."""
    return build(*problem, target=on("x86-amx"), **options)


@pytest.mark.parametrize("target", ["x86-avx512vnni", "x86-amx"])
def test_products(target):
    problem = Problem(1, 64, 1, 32, 16, Order.ROW)
    text = longformer.attention(problem, resolve(target)).script()
    assert ("tdpbf16ps" in text) == (target == "x86-amx")


def test_no_tiles_without_wide_vectors():
    target = Target({"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+amx-tile", "+amx-bf16"]})
    assert not matrix_tiles.available(target)


@pytest.mark.parametrize("head_size", [17, 33, 48, 64])
def test_ends_of_blocks(head_size):
    """W = 100 is no multiple of a group; blocks of 512 positions end inside of the band."""
    built = tiles(2, head_size, 100)
    for seq in (400, 600, 1000):
        agree(built, data(seq, 2, seq, 2 * head_size, [1, 9]))


def test_large_heads():
    agree(tiles(1, 288, 20), data(2, 1, 320, 288, [3]))


@pytest.mark.parametrize("orders", [(ROW, 0, 0), TILED], ids=["row", "tiled"])
def test_few_global_tokens(orders):
    """They go row by row: also padding, and where another entry has many."""
    built = tiles(4, 40, 16, orders=orders)
    values = data(7, 4, 320, 160, [1, 2, 3, 0])
    values["mask"][1][values["global"][1] != 0] = [-10000, 0]
    values["mask"][:, 300:] = -np.inf
    agree(built, values)


def test_more_global_tokens_than_a_block():
    values = data(3, 2, 1280, 16, [700, 513])
    agree(tiles(1, 16, 64), values)


@pytest.mark.parametrize("head_size", [8, 24, 64])
def test_tiled_orders(head_size):
    built = tiles(4, head_size, 32, orders=TILED)
    agree(built, data(4, 2, 640, 4 * head_size, [0, 5]))


def test_padded_blocks():
    """Groups and blocks without a row that attends, and a global token among them."""
    built = tiles(2, 32, 64)
    values = data(5, 2, 1280, 64, [2, 1], padding=0)
    values["mask"][0, 530:] = -np.inf
    values["mask"][1, :700] = -10000
    values["global"][:, 1000] = 1
    values["global"][:, 600] = 1
    output = agree(built, values)
    assert not output[0, 530:].any()
    assert not output[1, :700].any()


@pytest.mark.parametrize("seq", [64, 1024], ids=str)
def test_bound_sizes(seq):
    """Known sizes choose the size of a block."""
    _, fixed, _ = tiles(2, 32, 32)
    attrs = attributes(2, 32, (ROW, 0, 0))
    values = data(6, 1, seq, 64, [1])
    model = node_model(OP, {**fixed, **values}, initializers=list(fixed), **attrs)
    agree((opferry.compile(model, "x86-amx"), fixed, attrs), values)
