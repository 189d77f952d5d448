"""The pass that makes one kernel of what happens to a row: LayerNormalization, the additions before
it, the quantisation after it.

TVM's fusion ends at a reduction and never returns two results. Here all kernels that compute row i
of their outputs from row i of their inputs, and whatever all rows share, become one primitive
function with as many results as the rest of the graph uses; `relax.transform.FuseTIR` makes a
PrimFunc of it, the generic rule `Rows` a loop over rows. What decides is the kernels' index
arithmetic, so no operator is known here. A group without a reduction is left to TVM's fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax, tirx
from tvm.ir import Call, GenericConst, GlobalVar, IRModule, PrimType, Range
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import SBlockRealize
from tvm_ffi import structural_equal, structural_walk

from ..relay_ops.op import KERNEL

_OPAQUE = 8  # relax's OpPatternKind.kOpaque
_LONGEST_ROW = 1 << 16
"""Elements; the rows of one kernel are its parallelism, and longer ones would waste it."""


@module_pass(opt_level=0, name="FuseRows")
class FuseRows:
    """Expects legalised functions whose PrimFuncs carry ``op_pattern``."""

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        builder = relax.BlockBuilder(module)
        kernels: dict[GlobalVar, _Kernel | None] = {}
        for var, func in module.functions.items():
            if isinstance(func, tirx.PrimFunc):
                kernels[var] = _kernel(func)
        rewritten: dict[GlobalVar, relax.Function] = {}
        for var, func in module.functions.items():
            if not isinstance(func, relax.Function) or not isinstance(func.body, relax.SeqExpr):
                continue
            blocks = [
                _Block(builder, kernels, func, block).rewritten()
                if isinstance(block, relax.DataflowBlock)
                else block
                for block in func.body.blocks
            ]
            body = relax.SeqExpr(blocks, func.body.body)
            rewritten[var] = relax.Function(
                func.params, body, func.ret_ty, func.is_pure, func.attrs
            )
        module = builder.finalize()
        for var, func in rewritten.items():
            module[var] = func
        return relax.transform.Normalize()(module)


@dataclass(frozen=True)
class _Kernel:
    """A PrimFunc that works row by row."""

    leading: int
    """Axes of the output that number its rows; one more follows."""
    by_row: tuple[bool | None, ...]
    """For each input: read at the row that is computed, or shared by all rows; None for sizes."""
    reduces: bool


@dataclass
class _Group:
    """Bindings that become one kernel."""

    rows: tuple[object, ...]
    members: list[relax.VarBinding] = field(default_factory=list)
    reduces: bool = False


class _Block:
    """One dataflow block while it is rewritten."""

    def __init__(self, builder, kernels, func: relax.Function, block: relax.DataflowBlock):
        self.builder = builder
        self.kernels = kernels
        self.block = block
        self.bindings = list(block.bindings)
        self.group_of: dict[relax.Var, _Group] = {}
        self.groups_before: dict[relax.Var, frozenset[int]] = {}
        """Variable -> identities of the groups that it depends on, its own included."""
        self.used_outside: set[relax.Var] = set()
        self.result = func.body.body

    def rewritten(self) -> relax.DataflowBlock:
        for binding in self.bindings:
            self._place(binding)
        groups = {id(group): group for group in self.group_of.values()}.values()
        kept = [group for group in groups if group.reduces and len(group.members) > 1]
        if not kept:
            return self.block
        kept_of = {b.var: group for group in kept for b in group.members}
        for binding in self.bindings:
            for var in _variables(binding.value):
                if var in kept_of and kept_of.get(binding.var) is not kept_of[var]:
                    self.used_outside.add(var)
        return relax.DataflowBlock(self._ordered(kept_of))

    def _place(self, binding: relax.Binding) -> None:
        """Decide the group of a binding: that of one of its inputs, where no path leads out of that
        group and back, or a new one.
        """
        value = binding.value
        inputs = _variables(value)
        before = frozenset().union(*(self.groups_before.get(var, frozenset()) for var in inputs))
        group = None
        kernel = self._kernel_of(binding)
        if kernel is not None:
            rows = tuple(value.ty.shape)[: kernel.leading]
            by_row = {v for v, same in zip(value.args[1], kernel.by_row) if same}
            candidates = [self.group_of[var] for var in inputs if var in self.group_of]
            for candidate in reversed(candidates):
                others = [var for var in inputs if self.group_of.get(var) is not candidate]
                if (
                    _same(candidate.rows, rows)
                    and all(v in by_row for v in inputs if self.group_of.get(v) is candidate)
                    and not any(id(candidate) in self.groups_before.get(v, ()) for v in others)
                ):
                    group = candidate
            group = group or _Group(rows)
            group.members.append(binding)
            group.reduces |= kernel.reduces
            self.group_of[binding.var] = group
            before |= {id(group)}
            # What joins a group late may bring in dependencies of all that it computes.
            inherited = before
            for member in group.members:
                inherited |= self.groups_before.get(member.var, frozenset())
            for var, known in self.groups_before.items():
                if id(group) in known:
                    self.groups_before[var] = known | inherited
            before = inherited
        self.groups_before[binding.var] = before

    def _kernel_of(self, binding: relax.Binding) -> _Kernel | None:
        value = binding.value
        if (
            not isinstance(binding.var, relax.DataflowVar)
            or not isinstance(value, Call)
            or value.op != _CALL_TIR
            or not isinstance(value.ty, relax.TensorType)
        ):
            return None
        kernel = self.kernels.get(value.args[0])
        if kernel is None or len(value.args[1]) != len(kernel.by_row):
            return None
        for argument, by_row in zip(value.args[1], kernel.by_row):
            if by_row is not None and not isinstance(argument, relax.Var | GenericConst):
                return None
        last = value.ty.shape[-1]
        if isinstance(last, tirx.IntImm) and int(last) > _LONGEST_ROW:
            return None
        return kernel

    def _ordered(self, kept_of: dict[relax.Var, _Group]) -> list[relax.Binding]:
        """The block's bindings with each group in one place, before the first use of it."""
        producer = {binding.var: binding for binding in self.bindings}
        done: set[int] = set()
        ordered: list[relax.Binding] = []

        def emit(binding: relax.Binding) -> None:
            group = kept_of.get(binding.var)
            node = group if group is not None else binding
            if id(node) in done:
                return
            done.add(id(node))
            members = [binding] if group is None else group.members
            for member in members:
                for var in _variables(member.value):
                    if var in producer and kept_of.get(var) is not (group or self):
                        emit(producer[var])
            ordered.extend([binding] if group is None else self._call(group))

        for binding in self.bindings:
            if binding.var not in kept_of:
                emit(binding)
        for binding in self.bindings:
            emit(binding)
        return ordered

    def _call(self, group: _Group) -> list[relax.Binding]:
        """Bind what the rest of the graph uses of a group to results of its function."""
        members = {binding.var for binding in group.members}
        outputs = [b.var for b in group.members if b.var in self.used_outside]
        arguments: list[relax.Expr] = []
        parameters: list[relax.Var] = []
        local: dict[relax.Expr, relax.Expr] = {}
        bindings: list[relax.Binding] = []
        for binding in group.members:
            call = binding.value
            operands = []
            for argument in call.args[1]:
                if isinstance(argument.ty, PrimType):  # a size: bound by shapes, or by ``symbols``
                    operands.append(argument)
                    continue
                if argument not in members and argument not in local:
                    local[argument] = relax.Var(f"p{len(parameters)}", argument.ty)
                    parameters.append(local[argument])
                    arguments.append(argument)
                operands.append(local[argument])
            make = relax.Var if binding.var in outputs else relax.DataflowVar
            local[binding.var] = make(binding.var.name, binding.var.ty)
            value = relax.call_tir(call.args[0], operands, out_ty=call.ty)
            bindings.append(relax.VarBinding(local[binding.var], value))
        results = [local[var] for var in outputs]
        blocks = [relax.DataflowBlock(bindings)]
        if len(results) == 1:
            result = results[0]
        else:
            result = relax.Var("rows", relax.TupleType([var.ty for var in results]))
            blocks[0] = relax.DataflowBlock(
                [*bindings, relax.VarBinding(result, relax.Tuple(results))]
            )
        body = relax.SeqExpr(blocks, result)
        function = relax.Function(parameters, body, result.ty)
        if free := relax.analysis.free_symbolic_vars(function):
            shape = relax.Var("symbols", relax.ShapeType([*free]))
            function = relax.Function([*parameters, shape], body, result.ty)
            arguments.append(relax.ShapeExpr([*free]))
        function = relax.utils.copy_with_new_vars(function).with_attr("Primitive", True)
        callee = self.builder.add_func(function, "rows")
        return self._bind(Call(callee, arguments, ret_ty=result.ty), outputs)

    def _bind(self, call: Call, outputs: Sequence[relax.Var]) -> list[relax.Binding]:
        if len(outputs) == 1:
            return [relax.VarBinding(outputs[0], call)]
        types = relax.TupleType([var.ty for var in outputs])
        every = relax.DataflowVar("rows", types)
        return [
            relax.VarBinding(every, call),
            *(relax.VarBinding(var, relax.TupleGetItem(every, i)) for i, var in enumerate(outputs)),
        ]


_CALL_TIR = tvm.ir.Op.get("relax.call_tir")


def _kernel(func: tirx.PrimFunc) -> _Kernel | None:
    """What ``func`` is row by row; None where a row needs another one, or nothing tells rows."""
    pattern = func.attrs.get("op_pattern")
    if pattern is None or int(pattern) >= _OPAQUE or KERNEL in func.attrs:
        return None
    output = func.params[-1]
    leading = 0 if isinstance(output.ty, PrimType) else len(output.ty.shape) - 1
    if leading < 1:
        return None
    blocks: list[SBlockRealize] = []
    structural_walk(func.body, (SBlockRealize, blocks.append))
    by_row: dict[tirx.Var, set[bool]] = {}
    reduces = False
    for realize in blocks:
        block = realize.block
        if not block.iter_vars and block.name_hint == "root":
            continue
        if len(block.iter_vars) < leading or not _is_true(realize.predicate):
            return None
        rows = block.iter_vars[:leading]
        if not all(
            axis.iter_type == tirx.IterVar.DataPar and _same([axis.dom.extent], [size])
            for axis, size in zip(rows, output.ty.shape)
        ):
            return None
        rest = block.iter_vars[leading:]
        if any(axis.iter_type == tirx.IterVar.CommReduce for axis in rest):
            reduces = True
            if not all(
                axis.iter_type == tirx.IterVar.CommReduce or _is_one(axis.dom.extent)
                for axis in rest
            ):
                return None  # of columns, not of rows
        for region in block.writes:
            if not _at_row(region, rows):
                return None
        for region in block.reads:
            at_row = _at_row(region, rows)
            if not at_row and not _shared(region, rows):
                return None
            by_row.setdefault(region.source, set()).add(at_row)
    if any(len(kinds) > 1 for kinds in by_row.values()):
        return None
    return _Kernel(
        leading,
        tuple(
            None if isinstance(var.ty, PrimType) else by_row.get(var, {False}) == {True}
            for var in func.params[:-1]
        ),
        reduces,
    )


def _at_row(region: tirx.BufferRegion, rows: Sequence[tirx.IterVar]) -> bool:
    """The region lies in the row that the block computes."""
    leading, rest = region.region[: len(rows)], region.region[len(rows) :]
    return (
        len(leading) == len(rows)
        and all(
            _is_one(r.extent) and (r.min.same_as(axis.var) or _is_zero(r.min, axis))
            for r, axis in zip(leading, rows)
        )
        and not any(_uses(r, rows) for r in rest)
    )


def _is_zero(index: tirx.Expr, axis: tirx.IterVar) -> bool:
    return isinstance(index, tirx.IntImm) and int(index) == 0 and _is_one(axis.dom.extent)


def _shared(region: tirx.BufferRegion, rows: Sequence[tirx.IterVar]) -> bool:
    return not any(_uses(r, rows) for r in region.region)


def _uses(dim: Range, rows: Sequence[tirx.IterVar]) -> bool:
    own = {axis.var for axis in rows}
    return any(
        var in own for expr in (dim.min, dim.extent) for var in tirx.analysis.undefined_vars(expr)
    )


def _is_true(predicate: tirx.Expr) -> bool:
    return isinstance(predicate, tirx.IntImm) and bool(int(predicate))


def _is_one(size: tirx.Expr) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def _same(a: Sequence[tirx.Expr], b: Sequence[tirx.Expr]) -> bool:
    return len(a) == len(b) and all(structural_equal(x, y) for x, y in zip(a, b))


def _variables(value: relax.Expr) -> list[relax.Var]:
    """Tensors that ``value`` uses."""
    return [var for var in relax.analysis.all_vars(value) if not isinstance(var.ty, PrimType)]
