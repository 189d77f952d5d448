"""A small model, for tests of what surrounds one."""

import numpy as np
from onnx import parser

HEAD = '<ir_version: 9, opset_import: ["": 17]>'
X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2
SUM_AND_NEGATIVE = """g (float[b,3] x, float[b,3] z) => (float[b,3] y, float[b,3] n) {
    y = Add(x, z) n = Neg(x) }"""


def model(text):
    return parser.parse_model(HEAD + text)
