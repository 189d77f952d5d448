"""Small models as text, for tests of what surrounds one."""

import numpy as np
from onnx import parser

import opferry

HEAD = '<ir_version: 9, opset_import: ["": 17]>'
X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2
SUM_AND_NEGATIVE = """g (float[b,3] x, float[b,3] z) => (float[b,3] y, float[b,3] n) {
    y = Add(x, z) n = Neg(x) }"""


def model(text, head=HEAD):
    return parser.parse_model(head + text)


def run(text, feeds=None, head=HEAD, **options):
    """Outputs of the model by name; its input is ``X`` unless ``feeds`` are given."""
    return opferry.compile(model(text, head), **options).run({"x": X} if feeds is None else feeds)
