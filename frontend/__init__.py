"""ONNX in, Relax out."""
