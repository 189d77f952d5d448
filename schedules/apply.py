"""The pass that schedules: PrimFuncs tagged with a kernel name by ``SCHEDULES``, the rest by
generic rules.
"""

from __future__ import annotations

from tvm.ir import IRModule
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir.dlight import ApplyDefaultSchedule
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..relay_ops.op import KERNEL
from . import SCHEDULES
from .llvm import generic

SCHEDULED = "tirx.is_scheduled"

GENERIC = {"llvm": generic.RULES}
"""Target kind -> rules for kernels that are not ours."""


@module_pass(opt_level=0, name="ApplySchedules")
class ApplySchedules:
    """Replace each tagged, unscheduled kernel by its schedule for ``target``'s kind and mark it."""

    def __init__(self, target: Target):
        self.target = target

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        kind = self.target.kind.name
        for var, func in module.functions.items():
            if (
                not isinstance(func, PrimFunc)
                or KERNEL not in func.attrs
                or SCHEDULED in func.attrs
            ):
                continue
            schedule = SCHEDULES.get(str(func.attrs[KERNEL]), {}).get(kind)
            if schedule is not None:
                module[var] = schedule(func, self.target).with_attr(SCHEDULED, True)
        if kind in GENERIC:
            with self.target:
                module = ApplyDefaultSchedule(*GENERIC[kind])(module)
        return module
