"""Judgement: what was asked of a case, what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .cases import Case, OverPeer

REACHED, MISSED, BEYOND = "reached", "missed", "beyond the machine"


@dataclass(frozen=True)
class Goal:
    """One number beside the one asked for."""

    what: str
    """"limit", "vector limit", the name of a peer, "time of <problem>", "bytes" or "seconds"."""
    reached: float
    asked: float
    at_most: bool = False
    clean: bool = True
    """Whether the ratio is of turns that nothing disturbed."""
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.reached <= self.asked if self.at_most else self.reached >= self.asked:
            return REACHED
        return BEYOND if BEYOND in self.note else MISSED


def judge(case: Case, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals that could be measured, as JSON has them.

    record: of `measure.evaluate`; its ratios are of our speed, or time, to the other's.
    """
    goals = []
    of_limit = record["of_limit"]
    judged = record["of_vector_limit"] or of_limit
    if case.of_limit is not None and judged:
        what = "vector limit" if record["of_vector_limit"] else "limit"
        goals.append(Goal(what, judged["median"], case.of_limit, clean=judged["clean"]))
    for asked in case.over_peers:
        name = fastest_peer(record, asked.part)
        if name is not None:
            goals.append(_over_peer(asked, name, record["speedup"][name], of_limit))
    for relative in case.relative:
        label = relative.problem.label
        if label in record["relative"]:
            ratio = record["relative"][label]
            what = "time per operation of " if relative.per_operation else "time of "
            goals.append(Goal(what + label, ratio["median"], relative.most, True, ratio["clean"]))
    if case.most is not None and record["measured"] is not None:
        unit = {"memory": "bytes", "compile": "seconds"}[case.measure]
        goals.append(Goal(unit, record["measured"], case.most, at_most=True))
    return [asdict(goal) | {"verdict": goal.verdict} for goal in goals]


def fastest_peer(record: Mapping[str, Any], part: str = "") -> str | None:
    """Of the peers with `part` in their names, the one that ours is least ahead of."""
    among = {name: r["median"] for name, r in record["speedup"].items() if part in name}
    return min(among, key=among.get, default=None)


def _over_peer(asked: OverPeer, name: str, speedup: Mapping[str, Any], of_limit) -> Goal:
    least, note = asked.least, ""
    if of_limit and of_limit["clean"] and speedup["clean"]:
        peer = of_limit["median"] / speedup["median"]
        if asked.near_limit is not None and peer > asked.NEAR:
            least, note = asked.near_limit, f"peer at {peer:.2f} of the limit"
        if peer * least > 1:
            note = f"peer at {peer:.2f} of the limit; {least:.2f}x is {BEYOND}"
    return Goal(name, speedup["median"], least, clean=speedup["clean"], note=note)
