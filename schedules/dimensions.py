"""Dimensions of a PrimFunc under construction."""

from __future__ import annotations

from collections.abc import Sequence

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T


def own_dimensions(shape: Sequence[int | Expr], dims: dict[str, Expr]) -> tuple[Expr, ...]:
    """int64 dimensions; each symbolic one becomes the PrimFunc's own variable, bound by a buffer's
    shape and remembered in ``dims`` by its name.
    """

    def dim(size: int | Expr) -> Expr:
        if isinstance(size, int):
            return tir.const(size, "int64")
        return dims.setdefault(str(size), T.int64())

    return tuple(dim(size) for size in shape)
