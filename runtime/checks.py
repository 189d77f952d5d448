"""Checks that wait for the call: symbolic sizes and input values, judged before any kernel starts.

The compiler records them as plain data (they travel in the manifest), ``Module.run`` applies them.
Kept free of TVM's compiler and of ONNX, so that a deployment needs neither.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import gather, nsa_compress_attention, speed_fusion_attention
from .errors import InvalidInputError, message

Encoded = int | bool | str | list
"""A value, ``["dim", name]``, or ``[operator, operand, ...]``."""

OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Min": min,
    "Max": max,
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Not": operator.not_,
}
"""TIR's node names and what they mean."""

Rule = Callable[..., None]
"""``rule(label, *, <input>=ndarray | None, <parameter>=value | None)``: raises when what is known
is wrong.
"""

RULES: dict[str, Rule] = {
    "gather.indices": gather.indices,
    "nsa_compress_attention.lengths": nsa_compress_attention.lengths,
    "speed_fusion_attention.prefix": speed_fusion_attention.check_prefix,
    "speed_fusion_attention.sequences": speed_fusion_attention.check_sequences,
}
"""Rules on input values, by ``<op>.<what>``. ``None`` stands for what is not known yet: skip what
depends on it.
"""


@dataclass(frozen=True)
class Check:
    """A condition on dimensions (``rule`` empty) or a rule on values."""

    node: str
    subject: str = ""
    expr: Encoded = True
    found: list[Encoded] = field(default_factory=list)
    allowed: str = ""
    rule: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    known: dict[str, list | int | None] = field(default_factory=dict)
    params: dict[str, Encoded | None] = field(default_factory=dict)

    @classmethod
    def condition(
        cls, node: str, subject: str, expr: Encoded, found: list[Encoded], allowed: str
    ) -> Check:
        return cls(node, subject=subject, expr=expr, found=found, allowed=allowed)

    @classmethod
    def values(
        cls,
        node: str,
        rule: str,
        inputs: dict[str, str],
        known: dict[str, Any],
        params: dict[str, Any],
    ) -> Check:
        """``inputs``: rule argument -> graph input. ``known``: rule argument -> constant, or None
        if unknowable.
        """
        return cls(node, rule=rule, inputs=inputs, known=known, params=params)

    def apply(self, dims: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
        """Raise ``InvalidInputError`` unless it holds for this call's dimensions and inputs."""
        if self.rule:
            values = {name: arrays[source] for name, source in self.inputs.items()}
            values |= {k: None if v is None else np.asarray(v) for k, v in self.known.items()}
            params = {name: evaluate(value, dims) for name, value in self.params.items()}
            RULES[self.rule](self.node, **values, **params)
        elif not evaluate(self.expr, dims):
            found = [evaluate(item, dims) for item in self.found]
            shown = found[0] if len(found) == 1 else "(" + ", ".join(map(str, found)) + ")"
            raise InvalidInputError(message(self.node, self.subject, shown, self.allowed))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Check:
        return cls(**data)


def evaluate(expr: Encoded | None, dims: Mapping[str, int]) -> Any:
    """The value of an encoded expression under ``dims`` (dimension name -> size)."""
    if not isinstance(expr, list) or not expr or not isinstance(expr[0], str):
        return expr
    if expr[0] == "dim":
        return dims[expr[1]]
    if expr[0] in OPERATORS:
        return OPERATORS[expr[0]](*(evaluate(operand, dims) for operand in expr[1:]))
    return expr
