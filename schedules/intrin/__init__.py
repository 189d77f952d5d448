"""Tensor intrinsics: scalar meaning, implementation, name, registration."""
