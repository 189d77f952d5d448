"""The pass that schedules: PrimFuncs tagged with a kernel name by ``SCHEDULES``, the rest by
generic rules.
"""

from __future__ import annotations

from tvm.ir import IRModule
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..relay_ops.op import KERNEL
from . import SCHEDULES
from .cuda import generic as cuda_generic
from .llvm import generic

SCHEDULED = "tirx.is_scheduled"

GENERIC = {"llvm": generic.schedule, "cuda": cuda_generic.schedule}
"""Target kind -> schedule of the kernels that have no row of their own."""


@module_pass(opt_level=0, name="ApplySchedules")
class ApplySchedules:
    """Replace each unscheduled kernel by its schedule for ``target``'s kind and mark it."""

    def __init__(self, target: Target):
        self.target = target

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        kind = self.target.kind.name
        for var, func in module.functions.items():
            if not isinstance(func, PrimFunc) or SCHEDULED in func.attrs:
                continue
            rows = SCHEDULES.get(str(func.attrs.get(KERNEL)), {})
            schedule = rows.get(kind) or GENERIC.get(kind)
            if schedule is not None:
                module[var] = schedule(func, self.target).with_attr(SCHEDULED, True)
        return module
