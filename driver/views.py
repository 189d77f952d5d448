"""The pass that makes a view of a reshaped output.

TVM's `RewriteDataflowReshape` leaves the output of a dataflow block alone. If that is all of a
model, the result of its last kernel would be copied once more.
"""

from __future__ import annotations

from math import prod

from tvm import relax, tirx
from tvm.ir import Call, Expr, IRModule, Op
from tvm.ir.transform import PassContext, module_pass
from tvm.sym import Analyzer

_CALL_TIR = Op.get("relax.call_tir")


@module_pass(opt_level=0, name="ViewOutputs")
class ViewOutputs:
    """Replace calls that only copy under another shape by ``relax.reshape``. Expects kernels that
    are not scheduled yet; calls inside branches stay.
    """

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        builder = relax.BlockBuilder(module)

        def view(binding: relax.Binding) -> relax.Binding:
            if not isinstance(binding, relax.VarBinding):
                return binding
            call = binding.value
            if not isinstance(call, Call) or call.op != _CALL_TIR or len(call.args[1]) != 1:
                return binding
            if not relax.analysis.has_reshape_pattern(module[call.args[0]]):
                return binding
            source = call.args[1][0]
            # The pattern also fits a copy of the first elements alone.
            if not _same_size(source.ty.shape, call.ty.shape):
                return binding
            reshape = relax.op.reshape(source, call.ty.shape)
            return relax.VarBinding(binding.var, builder.normalize(reshape))

        for var, func in module.functions.items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                blocks = [type(block)([*map(view, block.bindings)]) for block in func.body.blocks]
                body = relax.SeqExpr(blocks, func.body.body)
                module[var] = relax.Function(
                    func.params, body, func.ret_ty, func.is_pure, func.attrs
                )
        return module


def _same_size(a: Expr, b: Expr) -> bool:
    sizes = [prod(shape, start=tirx.const(1, "int64")) for shape in (a, b)]
    return Analyzer().can_prove_equal(*sizes)
