"""Proof and speed on an NVIDIA GPU: everything is compiled on one machine (`build`, needs a CUDA
compiler and no GPU) and runs on another (`run`, needs TVM's runtime, NumPy and torch).
"""
