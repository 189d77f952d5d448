"""One record per operator, and what its lowering works with: the node, and the two ways to emit a
kernel.

The folder is named after Relay, TVM's former graph level; TVM 0.27 has Relax in its place, and TE
and TIR below it.

A kernel is a PrimFunc named ``<op>.<stage>``, tagged with the attribute ``opferry.kernel`` and
marked opaque, so that operator fusion leaves it whole. Its schedule is found by that name
(``schedules.SCHEDULES``), never by its looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import onnx
from tvm import relax, te, tirx
from tvm.ir import Expr, PrimType, Range
from tvm.sym import Analyzer
from tvm.target import Target
from tvm.tirx import IterVar
from tvm_ffi import get_global_func, structural_walk

from ..runtime import checks
from ..runtime.errors import (
    InvalidInputError,
    InvalidInputTypeError,
    InvalidNodeError,
    InvalidTypeError,
    message,
)

Dim = int | Expr

KERNEL = "opferry.kernel"
_OPAQUE = 8  # relax's OpPatternKind.kOpaque


@dataclass(frozen=True)
class Op:
    """An operator: its ONNX schema, its lowering to Relax, its NumPy reference.

    ``lower(bb, node)`` judges what the schema cannot say, emits kernels into ``bb`` and returns one
    Relax expression for each output of the schema, in order; ``None`` stands for an output the
    graph does not use.
    """

    schema: onnx.defs.OpSchema
    lower: Callable[[relax.BlockBuilder, Node], Sequence[relax.Expr | None]]
    reference: Callable[..., tuple[np.ndarray | None, ...]]

    @property
    def name(self) -> str:
        """``domain::Name``, the key of the operator table."""
        return f"{self.schema.domain}::{self.schema.name}"


@dataclass
class Node:
    """A node while it is lowered. Keys of ``inputs`` and ``constants`` are the schema's input
    names.
    """

    label: str
    """How messages name the node: ``QOrderedMatMul node "fc1"``."""
    inputs: dict[str, relax.Expr]
    """Present inputs only, each a tensor of known rank."""
    constants: dict[str, np.ndarray]
    """The inputs whose value is known at compile time."""
    attrs: dict[str, Any]
    """Decoded attributes, defaults filled in; optional ones without a default are missing when
    absent.
    """
    outputs: frozenset[str]
    """The schema's names of the outputs that the graph uses."""
    target: Target
    graph_inputs: dict[str, str] = field(default_factory=dict)
    """Input name -> graph input name, for inputs that are fed by the caller as they are."""
    symbols: frozenset[tirx.Var] = frozenset()
    """The symbolic dimensions that the graph's inputs declare."""
    runtime_checks: list[checks.Check] = field(default_factory=list)
    """Shared by all nodes of a model: what ``Module.run`` checks before anything starts."""

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def shape(self, name: str) -> tuple[Dim, ...]:
        """Dimensions of an input: ``int`` where static, a TIR expression where symbolic."""
        return tuple(_as_dim(dim) for dim in self.inputs[name].ty.shape)

    def rank(self, name: str) -> int:
        return len(self.inputs[name].ty.shape)

    def dtype(self, name: str) -> str:
        return str(self.inputs[name].ty.dtype)

    def fail(self, subject: str, found: object, allowed: object) -> NoReturn:
        """Refuse the node: ``<label>: <subject>: found <found>, allowed <allowed>``."""
        raise InvalidNodeError(message(self.label, subject, found, allowed))

    def require(self, condition: bool | Expr, subject: str, found: object, allowed: object) -> None:
        """Refuse the node unless ``condition`` holds; a condition on symbolic dimensions waits for
        the call.

        ``found`` may be a dimension, or a sequence of dimensions and plain values.
        """
        if hasattr(condition, "asobject"):  # a comparison that Python wrote with ``==``
            condition = condition.asobject()
        verdict = _prove(condition)
        if verdict is False:
            self.fail(subject, _show(found), allowed)
        if verdict is None and (encoded := encode(condition, self.symbols)) is not None:
            shown = [encode(item, self.symbols) for item in _items(found)]
            self.runtime_checks.append(
                checks.Check.condition(self.label, subject, encoded, shown, str(allowed))
            )

    def require_shape(
        self, bb: relax.BlockBuilder, name: str, shape: Sequence[Dim], allowed: str | None = None
    ) -> relax.Expr:
        """Input ``name`` with exactly ``shape``: equal dimensions are proved now or checked at the
        call.

        Returns the tensor typed with ``shape`` itself, so that one symbol stands for one size in
        the kernels; where equality is not evident, Relax's own match is emitted, which also guards
        a bare module.
        """
        found = self.shape(name)
        allowed = allowed or f"shape {_show(shape)}"
        if len(found) != len(shape):
            self.fail(f'input "{name}"', f"shape {_show(found)}", allowed)
        for have, want in zip(found, shape):
            verdict = _prove(_equal(have, want))
            if verdict is False:
                self.fail(f'input "{name}"', f"shape {_show(found)}", allowed)
        for have, want in zip(found, shape):
            self.require(_equal(have, want), f'input "{name}" shape', found, allowed)
        if all(_prove(_equal(have, want)) for have, want in zip(found, shape)):
            return self.inputs[name]
        cast = bb.match_cast(self.inputs[name], relax.TensorType([*shape], self.dtype(name)))
        self.inputs[name] = cast
        return cast

    def check_values(self, rule: str, tensors: Sequence[str] = (), **params: Any) -> None:
        """Apply ``runtime.checks.RULES[rule]`` to input values (and the attributes of the same
        name).

        What is known now is judged now; when a value or a symbolic parameter is still open and
        comes straight from the caller, the same rule runs again at the call. Values computed inside
        the graph are the kernel's own to assert.
        """
        known = {name: self.constants[name] for name in tensors if name in self.constants}
        known |= {name: np.asarray(self.attrs[name]) for name in tensors if name in self.attrs}
        fixed = {k: v for k, v in params.items() if not isinstance(v, Expr)}
        fixed |= dict.fromkeys(params.keys() - fixed.keys())
        try:
            checks.RULES[rule](self.label, **{name: known.get(name) for name in tensors}, **fixed)
        except InvalidInputTypeError as error:
            raise InvalidTypeError(str(error)) from error
        except InvalidInputError as error:  # the same rule, but of a constant of the model
            raise InvalidNodeError(str(error)) from error
        late = {
            name: self.graph_inputs[name]
            for name in tensors
            if name in self.graph_inputs and name not in known
        }
        symbolic = {
            k: encoded
            for k, v in params.items()
            if isinstance(v, Expr) and (encoded := encode(v, self.symbols)) is not None
        }
        if late or symbolic:
            self.runtime_checks.append(
                checks.Check.values(
                    self.label,
                    rule,
                    late,
                    {name: None for name in tensors if name not in late}
                    | {name: value.tolist() for name, value in known.items()},
                    {**fixed, **symbolic},
                )
            )


def te_kernel(
    bb: relax.BlockBuilder, name: str, te_fn: Callable[..., te.Tensor], *args: relax.Expr, **attrs
) -> relax.Expr:
    """Emit ``te_fn(*tensors)``, one TE tensor per argument, as the kernel ``name``.

    Unlike ``bb.emit_te``, ``te_fn`` may close over symbolic dimensions of the graph: they are the
    same variables as those in the tensors' shapes.
    """
    tensors = [
        te.placeholder([*arg.ty.shape], str(arg.ty.dtype), name=f"arg{i}")
        for i, arg in enumerate(args)
    ]
    result = te_fn(*tensors)
    func = te.create_prim_func([*tensors, result], "int64")
    bound = {dim for arg in args for dim in arg.ty.shape if isinstance(dim, tirx.Var)}
    shapes = [dim for tensor in [*tensors, result] for dim in tensor.shape]
    free = [var for var in _symbols(func, shapes) if var not in bound]
    if free:
        func = te.create_prim_func([*tensors, *free, result], "int64")
    func = get_global_func("s_tir.RenewDefs")(func).without_attr("global_symbol")
    func = func.with_attrs({KERNEL: name, "op_pattern": _OPAQUE, **attrs})
    var = bb.add_func(func, name.replace(".", "_"))
    out = relax.TensorType([*result.shape], result.dtype)
    return bb.emit(relax.call_tir(var, [*args, *free], out_ty=out))


def tir_kernel(
    bb: relax.BlockBuilder,
    name: str,
    func: tirx.PrimFunc,
    args: Sequence[relax.Expr],
    out: relax.TensorType | Sequence[relax.TensorType],
    tir_vars: Sequence[Expr] = (),
) -> relax.Expr:
    """Emit the PrimFunc ``func`` (inputs, then scalar ``tir_vars``, outputs) as the kernel
    ``name``, already scheduled.

    ``func`` may use symbolic dimensions of the graph; those that are no buffer's own dimension
    become scalar parameters. Returns the output tensor, or a tuple of them when ``out`` is a
    sequence.
    """
    types = [*(arg.ty for arg in args), *([out] if isinstance(out, relax.TensorType) else out)]
    symbols = {v for t in types for dim in t.shape for v in tirx.analysis.undefined_vars(dim)}
    shapes = [dim for param in func.params if _is_buffer(param) for dim in param.ty.shape]
    if used := [var for var in _symbols(func, shapes) if var in symbols]:
        outputs = len(types) - len(args)
        free = [var for var in used if var not in {*shapes, *tir_vars}]
        params = [*func.params[:-outputs], *free, *func.params[-outputs:]]
        func = tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
        func = get_global_func("s_tir.RenewDefs")(func)
        tir_vars = [*tir_vars, *free]
    func = func.without_attr("global_symbol")
    func = func.with_attrs({KERNEL: name, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
    var = bb.add_func(func, name.replace(".", "_"))
    out = out if isinstance(out, relax.TensorType) else list(out)
    return bb.emit(relax.call_tir(var, [*args, *tir_vars], out_ty=out))


def encode(value: object, symbols: frozenset[tirx.Var]) -> checks.Encoded | None:
    """A TIR expression over the graph's own dimensions as plain data for the manifest; ``None`` if
    it has others.
    """
    if not isinstance(value, Expr):
        return value if isinstance(value, bool | int) else str(value)
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    if isinstance(value, tirx.Var):
        return ["dim", value.name] if value in symbols else None
    if isinstance(value, tirx.Cast):
        return encode(value.value, symbols)
    name = type(value).__name__
    if name not in checks.OPERATORS:
        return None
    operands = [value.a] if name == "Not" else [value.a, value.b]
    encoded = [encode(operand, symbols) for operand in operands]
    return None if None in encoded else [name, *encoded]


def _is_buffer(param: tirx.Var) -> bool:
    return not isinstance(param.ty, PrimType)


def _symbols(func: tirx.PrimFunc, shapes: Sequence[Expr]) -> list[tirx.Var]:
    """Variables that the body or ``shapes`` use and neither loops nor blocks define."""
    defined = set()
    structural_walk(func.body, (IterVar, lambda axis: defined.add(axis.var)))
    found = [*tirx.analysis.undefined_vars(func.body, list(func.params))]
    for dim in shapes:
        found += tirx.analysis.undefined_vars(dim)
    symbols = [v for v in found if isinstance(v.ty, PrimType) and v not in defined]
    return list(dict.fromkeys(symbols))


def _as_dim(value: object) -> Dim:
    return int(value) if isinstance(value, int | tirx.IntImm) else value


def _equal(a: Dim, b: Dim) -> bool | Expr:
    return a == b if isinstance(a, int) and isinstance(b, int) else tirx.EQ(_int64(a), _int64(b))


def _int64(value: Dim) -> Expr:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _prove(condition: bool | Expr) -> bool | None:
    """True, False, or None when it depends on symbolic dimensions (all at least 1)."""
    if isinstance(condition, bool | np.bool_):
        return bool(condition)
    analyzer = Analyzer()
    for var in tirx.analysis.undefined_vars(condition):
        dtype = str(var.ty)
        analyzer.bind(var, Range(tirx.const(1, dtype), tirx.const(2**31, dtype)))
    if analyzer.can_prove(condition):
        return True
    if analyzer.can_prove(tirx.Not(condition)):
        return False
    return None


def _items(found: object) -> list[object]:
    return list(found) if isinstance(found, tuple | list) else [found]


def _show(found: object) -> str:
    if isinstance(found, tuple | list):
        return "(" + ", ".join(str(item) for item in found) + ")"
    return str(found)
