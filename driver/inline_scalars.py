"""The pass that makes immediates of constant scalars.

TVM hands the bounds of a Clip, the branches of a Where and the like to a kernel as tensors without
axes. It would read them for each element, since an output may lie over them for all that LLVM
knows, and a vector of such reads under a mask is a gather.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, tirx
from tvm.ir import Call, Expr, GenericConst, GlobalVar, IRModule, Op
from tvm.ir.expr import TensorLoad
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import SBlock
from tvm_ffi import structural_map

from ..relay_ops.op import KERNEL

_CALL_TIR = Op.get("relax.call_tir")
_DTYPES = frozenset({"float32", "float64", "int8", "uint8", "int32", "int64"})


@module_pass(opt_level=0, name="InlineScalars")
class InlineScalars:
    """Expects legalised functions. Kernels that a lowering named keep their parameters, and so do
    calls inside branches.
    """

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        inliner = _Inliner(module)
        for var, func in module.functions.items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                blocks = [inliner.rewritten(block) for block in func.body.blocks]
                body = relax.SeqExpr(blocks, func.body.body)
                inliner.functions[var] = relax.Function(
                    func.params, body, func.ret_ty, func.is_pure, func.attrs
                )
        module = inliner.builder.finalize()
        for var, func in inliner.functions.items():
            module[var] = func
        return module


class _Inliner:
    def __init__(self, module: IRModule):
        self.module = module
        self.builder = relax.BlockBuilder(module)
        self.functions: dict[GlobalVar, relax.Function] = {}
        self.special: dict[tuple[object, ...], GlobalVar] = {}
        """(kernel, values by parameter) -> the kernel with these values in it."""

    def rewritten(self, block: relax.BindingBlock) -> relax.BindingBlock:
        bindings = [
            relax.VarBinding(binding.var, self._call(binding.value))
            if isinstance(binding, relax.VarBinding) and isinstance(binding.value, Call)
            else binding
            for binding in block.bindings
        ]
        return type(block)(bindings)

    def _call(self, call: Call) -> Call:
        if call.op != _CALL_TIR or len(call.args) > 2:  # a third holds sizes
            return call
        var, arguments = call.args
        func = self.module[var]
        if KERNEL in func.attrs:
            return call
        values = [_immediate(argument) for argument in arguments]
        if all(value is None for value in values):
            return call
        key = (var, *(None if v is None else (str(v.ty), repr(v.value)) for v in values))
        if key not in self.special:
            known = {p: v for p, v in zip(func.params, values) if v is not None}
            self.special[key] = self.builder.add_func(_inline(func, known), var.name_hint)
        rest = [argument for argument, value in zip(arguments, values) if value is None]
        return self.builder.normalize(relax.call_tir(self.special[key], rest, out_ty=call.ty))


def _immediate(argument: Expr) -> Expr | None:
    if not isinstance(argument, GenericConst) or str(argument.ty.dtype) not in _DTYPES:
        return None
    value = argument.value.numpy()
    return tirx.const(value.item(), str(value.dtype)) if value.ndim == 0 else None


def _inline(func: tirx.PrimFunc, values: Mapping[tirx.Var, Expr]) -> tirx.PrimFunc:
    def read(load: TensorLoad) -> Expr:
        return values.get(load.source, load)

    def block_of(block: SBlock) -> SBlock:
        reads = [region for region in block.reads if region.source not in values]
        return SBlock(
            block.iter_vars,
            reads,
            block.writes,
            block.name_hint,
            block.body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            block.annotations,
        )

    body = structural_map(func.body, ((TensorLoad, read), (SBlock, block_of)))
    params = [param for param in func.params if param not in values]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)
