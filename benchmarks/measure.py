"""One case: build, check, measure, evaluate.

Cases run in a worker process, so that a library that crashes takes one case with it and no more.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from . import timing
from .candidate import Candidate
from .cases import CASES, Case
from .goals import judge
from .inputs import inputs
from .limits import Limit, Unavailable
from .shapes import vector_work
from .timing import Plan, Series

OURS, RUN, RELATED, LIMIT = "opferry", "opferry Module.run", "related: ", "limit "
"""Names, or how names begin, of what is measured besides peers."""


def serve(connection: Connection, plan: Plan, peers: bool) -> None:
    """Receive numbers of `CASES`, send their records, until None."""
    warnings.filterwarnings("ignore")
    gauge = None
    while (number := connection.recv()) is not None:
        case = CASES[number]
        if case.measure == "speed" and gauge is None:
            keep_freed_memory()
            gauge = timing.Gauge()
        try:
            connection.send(measure(case, plan, gauge, peers))
        except Exception as error:  # of whatever library
            connection.send(empty(case) | {"left_out": {OURS: _told(error)}})
        inputs.cache_clear()


def measure(
    case: Case, plan: Plan, gauge: Callable[[], bool] | None, peers: bool = True
) -> dict[str, Any]:
    """The record of a case: everything that was built, was right and was timed."""
    start = time.perf_counter()
    if case.measure != "speed":
        from . import fresh

        record = empty(case)
        record["measured"] = fresh.MEASURES[case.measure](case.problem)
    else:
        candidates, left_out = _candidates(case, peers and case.peers)
        limits, missing = _limits(case)
        # A limit stands next to ours, where they meet the same conditions.
        timed = {LIMIT + kind: limit for kind, limit in limits.items()}
        timed |= {name: timing.stopwatch(c.call) for name, c in candidates.items()}
        # Without ours there is nothing to compare.
        series = timing.interleave(timed, plan, gauge) if OURS in candidates else {}
        record = evaluate(case, series, {kind: limit.work for kind, limit in limits.items()})
        record["left_out"] = left_out | missing
    record["goals"] = judge(case, record)
    record["took_s"] = round(time.perf_counter() - start, 1)
    return record


def empty(case: Case) -> dict[str, Any]:
    """The record of a case of which nothing is known yet."""
    problem = case.problem
    return {
        "group": case.group,
        "case": case.name,
        "op": problem.op,
        "measure": case.measure,
        "operations": problem.operations,
        "work": problem.work,
        "vector_work": vector_work(problem),
        "candidates": {},
        "limits": {},
        "of_limit": None,
        "of_vector_limit": None,
        "speedup": {},
        "relative": {},
        "measured": None,
        "goals": [],
        "left_out": {},
        "took_s": 0.0,
    }


def _candidates(case: Case, peers: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """By name, those that run and are right; and why the others are left out."""
    from . import ours
    from . import peers as others
    from .check import PEER_SLACK

    found: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}

    def add(
        build: Callable[[], list[Candidate]], label: str, problem, slack: float, name: str = ""
    ) -> None:
        try:
            for candidate in build():
                _verify(candidate, problem, slack)
                found[name or candidate.name] = candidate
        except Exception as error:  # of whatever library
            left_out[label] = _told(error)

    add(lambda: ours.build(case.problem), OURS, case.problem, 1.0)
    if not found:
        return found, left_out
    for relative in case.relative:
        other, name = relative.problem, RELATED + relative.problem.label
        add(lambda other=other: ours.build(other)[:1], name, other, 1.0, name)
    if peers:
        builders, missing = others.candidates(case.problem)
        left_out |= missing
        for name, builder in builders.items():
            add(lambda builder=builder: [builder()], name, case.problem, PEER_SLACK)
    return found, left_out


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _verify(candidate: Candidate, problem, slack: float) -> None:
    from .check import check

    check(problem, candidate.result(), slack)


def _limits(case: Case) -> tuple[dict[str, Limit], dict[str, str]]:
    limits, missing = {}, {}
    for kind, work in (case.problem.work | vector_work(case.problem)).items():
        try:
            footprint = case.problem.copies * work if kind == "read" else 0
            limits[kind] = Limit(kind, footprint=footprint)
        except Unavailable as error:
            missing[LIMIT + kind] = str(error)
    return limits, missing


def evaluate(
    case: Case, series: Mapping[str, Series], limit_work: Mapping[str, float]
) -> dict[str, Any]:
    """What `series` says about a case, without judging it.

    series: by name of candidate, and by `LIMIT` + kind; limit_work: kind -> work of one call of
    that limit. Times are in seconds, rates in operations a second; "of_limit", "of_vector_limit"
    and "speedup" are ratios of speed, "relative" of time, ours to the other's.
    """
    problem, record = case.problem, empty(case)
    related = {RELATED + r.problem.label: r for r in case.relative}
    for name, measured in series.items():
        if name.startswith(LIMIT):
            kind = name.removeprefix(LIMIT)
            record["limits"][kind] = {
                "rate": limit_work[kind] / measured.median,
                "best_rate": limit_work[kind] / measured.fastest,
                **measured.summary(),
            }
            continue
        of = related[name].problem if name in related else problem
        rate = of.operations / measured.median
        record["candidates"][name] = {"rate": rate, **measured.summary()}
    if OURS not in series:
        return record
    mine = series[OURS]
    for told, of in (("of_limit", problem.work), ("of_vector_limit", vector_work(problem))):
        if of and of.keys() <= limit_work.keys():
            at_limit = timing.weighted_sum(
                [(series[LIMIT + kind], work / limit_work[kind]) for kind, work in of.items()]
            )
            record[told] = timing.speedup(mine, at_limit)._asdict()
    for name, theirs in series.items():
        if name in related:
            other = related[name]
            times = timing.speedup(theirs, mine)
            if other.per_operation:
                times = times.scaled(other.problem.operations / problem.operations)
            record["relative"][other.problem.label] = times._asdict()
        elif name not in (OURS, RUN) and not name.startswith(LIMIT):
            record["speedup"][name] = timing.speedup(mine, theirs)._asdict()
    return record


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed instead of returning them to the system.

    Otherwise the page faults of fresh temporaries take up to half of the time of peers that
    allocate at every call. A preloaded tcmalloc would do the same.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):  # another C library
        return
