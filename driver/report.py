"""What a validation found: verdicts per output, as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

OK, OK_BY_NODE, FAILED, NO_REFERENCE = "ok", "ok by node", "failed", "no reference"


@dataclass(frozen=True)
class OutputReport:
    """Verdict on one graph output.

    ``verdict``: "ok"; "ok by node", when the whole differs by accumulated rounding (a quantised
    value that falls on the other side of a tie) while every node agrees with its reference on the
    same inputs; "failed"; "no reference". ``mismatches`` counts elements outside the tolerance,
    ``excused`` integers that differ next to a tie of the specification.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    verdict: str
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    mismatches: int = 0
    excused: int = 0
    judged_by: str = ""
    note: str = ""


@dataclass(frozen=True)
class Divergence:
    """The first node, in graph order, whose compiled output differs from its reference on the same
    inputs.
    """

    node: str
    output: str
    max_abs_error: float
    max_rel_error: float
    mismatches: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What ``validate`` found. ``str`` is a table, ``to_json`` is for scripts."""

    outputs: tuple[OutputReport, ...]
    without_reference: tuple[str, ...] = ()
    """Operators, ``domain::Name``, that NumPy cannot evaluate."""
    first_divergence: Divergence | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return all(output.verdict != FAILED for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        """JSON text; an infinite error is the string "inf"."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        head = ("output", "type", "verdict", "max abs", "max rel", "mismatches", "judged by")
        rows = [head, *(_row(output) for output in self.outputs)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
        lines += [f"{o.name}: {o.note}" for o in self.outputs if o.note]
        if self.without_reference:
            lines.append(f"no reference for: {', '.join(self.without_reference)}")
        if found := self.first_divergence:
            lines.append(
                f"first diverging node: {found.node}, output {found.output!r}: max abs error "
                f"{found.max_abs_error:.3g}, {found.mismatches} mismatches {found.note}".rstrip()
            )
        if self.note:
            lines.append(self.note)
        return "\n".join([*lines, "ok" if self.ok else "FAILED"])


def _row(output: OutputReport) -> tuple[str, ...]:
    kind = f"{output.dtype}[{', '.join(map(str, output.shape))}]"
    if output.verdict == NO_REFERENCE:
        return (output.name, kind, output.verdict, "", "", "", "")
    mismatches = str(output.mismatches) + (f" (+{output.excused} ties)" if output.excused else "")
    return (
        output.name,
        kind,
        output.verdict,
        f"{output.max_abs_error:.3g}",
        f"{output.max_rel_error:.3g}",
        mismatches,
        output.judged_by,
    )


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
