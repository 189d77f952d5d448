"""npu::NPUTransQuantParam: float32 scales and offsets packed into 64-bit integers (`quant`)."""

from __future__ import annotations

from tvm import relax, te, tirx
from tvm.ir import Expr

from ..frontend.schemas.linear_a8w8_quant import TRANS_QUANT_PARAM
from ..reference.linear_a8w8_quant import npu_trans_quant_param
from . import quant
from .dims import any_of, equal, int64, is_one
from .op import Node, Op, te_kernel


def lower(bb: relax.BlockBuilder, node: Node) -> list[relax.Expr]:
    """scale (t,) or (1, n), offset absent, (1,), (t,) or, beside one scale, any length."""
    round_mode = node.attrs["round_mode"]
    if round_mode not in (0, 1):
        node.fail('attribute "round_mode"', round_mode, "0 or 1 [E-ATTR]")
    *rows, length = node.shape("scale")
    if len(rows) > 1 or any(not is_one(row) for row in rows):
        node.fail('input "scale" shape', node.shape("scale"), "(t,) or (1, n) [E-RANK]")
    node.require(length >= 1, 'input "scale"', length, "at least one element [E-EMPTY]")
    count = length
    if "offset" in node:
        if node.rank("offset") != 1:
            node.fail('input "offset" rank', node.rank("offset"), "1 [E-RANK]")
        (other,) = node.shape("offset")
        node.require(other >= 1, 'input "offset"', other, "at least one element [E-EMPTY]")
        if is_one(length):
            count = other
        elif not is_one(other):
            fits = any_of(equal(length, other), equal(length, 1), equal(other, 1))
            allowed = f"1 or {length}, the length of scale [E-SHAPE]"
            node.require(fits, 'input "offset" length', other, allowed)
            count = tirx.max(int64(length), int64(other))

    def pack(scale: te.Tensor, *offset: te.Tensor) -> te.Tensor:
        def entry(j: Expr) -> Expr:
            index = [*[int64(0) for _ in rows], tirx.min(j, int64(length) - 1)]
            nine = offset[0](tirx.min(j, offset[0].shape[0] - 1)) if offset else None
            return quant.pack_scale(scale(*index), nine, round_mode)

        return te.compute((int64(count),), entry, name="quant_param")

    tensors = [node.inputs[name] for name in ("scale", "offset") if name in node]
    return [te_kernel(bb, "npu_trans_quant_param.pack", pack, *tensors)]


NPU_TRANS_QUANT_PARAM = Op(TRANS_QUANT_PARAM, lower, npu_trans_quant_param)
