"""ONNX Gather: rule on the values of its indices."""

from __future__ import annotations

import numpy as np

from .errors import InvalidInputError, message


def indices(label: str, *, indices: np.ndarray | None, rows: int | None) -> None:
    """Every index is in [-rows, rows), as ONNX says."""
    if indices is None or rows is None:
        return
    wrong = indices[(indices < -rows) | (indices >= rows)]
    if wrong.size:
        raise InvalidInputError(
            message(label, "indices", f"index {wrong.flat[0]}", f"{-rows} to {rows - 1}")
        )
