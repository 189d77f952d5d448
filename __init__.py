"""opferry: vendor-locked fused ONNX operators, compiled for open targets with Apache TVM."""

__version__ = "0.1.0"
