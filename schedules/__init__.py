"""How kernels are computed: kernel name -> target kind -> schedule. One literal table, keyed by
names that we attach.

A row is either a schedule of a TE kernel, ``schedule(func, target) -> PrimFunc``, which the pass
``ApplySchedules`` calls on the PrimFunc tagged with that name, or the builder of a TIR kernel,
``build(problem, target) -> PrimFunc``, which the operator's lowering calls through ``tir_builder``
with its description of the problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.target import Target
from tvm.tirx import PrimFunc

from ..runtime.errors import UnsupportedError
from .cuda import attention as cuda_attention
from .cuda import gemm as cuda_gemm
from .cuda import gemm_split as cuda_gemm_split
from .cuda import longformer as cuda_longformer
from .cuda import nsa as cuda_nsa
from .cuda.panels import Panels
from .llvm import attention, gemm, gemm_amx, longformer, longformer_tokens, nsa
from .tile import Tile

SCHEDULES: dict[str, dict[str, Callable[[PrimFunc, Target], PrimFunc]]] = {
    "int8_matmul.pack_weight": {"llvm": gemm.schedule_pack_weight},
    "linear_a8w8_quant.gemm": {"llvm": gemm.schedule},
    "linear_a8w8_quant.gemm_plain": {"llvm": gemm.schedule_plain},
    "qordered_longformer_attention.gemm": {"llvm": gemm.schedule},
    "qordered_longformer_attention.gemm_plain": {"llvm": gemm.schedule_plain},
    "qordered_matmul.gemm": {"llvm": gemm.schedule},
    "qordered_matmul.gemm_plain": {"llvm": gemm.schedule_plain},
}

INT8_TILES: dict[str, Callable[..., Tile]] = {"llvm": gemm.tile}
"""Target kind -> how an int8 matmul packs its operands: ``tile(target, m, n, panel)``. Kinds
without a row have a builder of ``int8_matmul``.
"""

INT8_PANELS: dict[str, Callable[[Target], Panels | None]] = {"cuda": cuda_gemm.panels}
"""Target kind without a row above -> what weights are packed to that do not come as rows."""

TIR_BUILDERS: dict[str, dict[str, Callable[[Any, Target], PrimFunc]]] = {
    "int8_matmul": {"cuda": cuda_gemm_split.build, "llvm": gemm_amx.build},
    "qordered_longformer_attention.attention": {
        "cuda": cuda_longformer.attention,
        "llvm": longformer.attention,
    },
    "qordered_longformer_attention.gather_global_rows": {
        "cuda": cuda_longformer.gather_global_rows,
        "llvm": longformer_tokens.gather_global_rows,
    },
    "qordered_longformer_attention.global_tokens": {
        "cuda": cuda_longformer.global_tokens,
        "llvm": longformer_tokens.global_tokens,
    },
    "nsa_compress_attention.attend_select": {
        "cuda": cuda_nsa.attend_select,
        "llvm": nsa.attend_select,
    },
    "speed_fusion_attention.fused": {
        "cuda": cuda_attention.build_attention,
        "llvm": attention.build_attention,
    },
}


def tir_builder(name: str, target: Target) -> Callable[[Any, Target], PrimFunc]:
    """The builder of kernel ``name`` for ``target``; ``UnsupportedError`` naming the kinds that
    have one.
    """
    rows = TIR_BUILDERS[name]
    if target.kind.name not in rows:
        raise UnsupportedError(
            f"kernel {name}: found target {target.kind.name!r}, allowed {sorted(rows)}"
        )
    return rows[target.kind.name]
