"""A model lowered for CUDA, run on the CPU: its own kernels interpreted, the rest compiled; and
what its host part does.
"""

import itertools
import re

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .launch import run

_numbers = itertools.count()

_SHAPES_AND_MEMORY = {
    f"vm.builtin.{name}"
    for name in (
        "alloc_shape_heap",
        "alloc_storage",
        "alloc_tensor",
        "check_tensor_info",
        "make_prim_value",
        "make_shape",
        "make_tuple",
        "match_shape",
        "null_value",
        "reshape",
    )
}
"""What the virtual machine does without looking at a tensor's elements."""


def waits(executable):
    """Functions of TVM that the host part of a generated module calls and that may wait for the
    GPU: every one but kernels and those that handle shapes and memory only.
    """
    called = set(re.findall(r"call +(vm\.builtin\.\S+)", executable.as_text()))
    return called - _SHAPES_AND_MEMORY


def executable(module):
    """``main`` of an imported module as a function of NumPy arrays, in the order of its parameters.

    Scheduled PrimFuncs become packed functions that interpret them; TVM compiles everything else
    for the CPU.
    """
    kernels = {
        var: f"simt.graph.{next(_numbers)}"
        for var, func in module.functions_items()
        if func.attrs and func.attrs.get("tirx.is_scheduled")
    }
    for var, name in kernels.items():
        tvm_ffi.register_global_func(name, _interpreted(module[var]))
    main = _Interpreted(module, kernels).visit_expr(module["main"])
    rest = {var: func for var, func in module.functions_items() if var not in kernels}
    rest[module.get_global_var("main")] = main
    rest = tvm.IRModule(rest)
    with tvm.target.Target("llvm"):
        vm = relax.VirtualMachine(relax.build(rest, "llvm"), tvm.cpu())

    def call(*inputs):
        found = vm["main"](*(tvm.runtime.tensor(x) for x in inputs))
        return [found.numpy()] if hasattr(found, "numpy") else [part.numpy() for part in found]

    return call


@mutator
class _Interpreted(PyExprMutator):
    """Calls of kernels become calls of the packed functions that interpret them."""

    def __init__(self, module, kernels):
        super().__init__(module)
        self.kernels = kernels

    def visit_call_(self, call):
        if call.op == tvm.ir.Op.get("relax.call_tir") and call.args[0] in self.kernels:
            (out,) = call.ty_args
            out = [*out.fields] if isinstance(out, relax.TupleType) else out
            return relax.call_dps_packed(self.kernels[call.args[0]], call.args[1], out_ty=out)
        return super().visit_call_(call)


def _interpreted(func):
    def call(*args):
        values = [np.array(x.numpy(), order="C") if hasattr(x, "numpy") else x for x in args]
        run(func, *values)
        for tensor, value in zip(args, values):
            if isinstance(value, np.ndarray):
                tensor.copyfrom(value)

    return call
