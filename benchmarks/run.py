"""Measures cases of `shapes` and prints ours, every peer, the ratio and the fraction of the limit.

    python -m benchmarks.run --quick
    python -m benchmarks.run --group attention --case "S512 .* fp32" --json attention.json

Every result is checked before its time is taken. A peer that is not installed, cannot do the work
or gets it wrong is named with the reason and left out.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import THREADS, timing, use_threads
from .candidate import Candidate
from .limits import Limit, Unavailable
from .shapes import GROUPS, Case, select
from .timing import Plan, Series

OURS, RUN, NEIGHBOUR, LIMIT = "opferry", "opferry Module.run", "neighbour ", "limit "
"""Names, or how names begin, of what is measured besides peers."""
_LIBRARIES = ("opferry", "apache-tvm", "numpy", "onnxruntime", "openvino", "torch", "transformers")
_QUICK = Plan(seconds=0.3, patience_seconds=0.5)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = select(options.group or (), options.case, options.quick)
    if options.list:
        print("\n".join(f"{case.group:11s}{case.name}" for case in cases))
        return 0
    if not cases:
        print("no case matches", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    use_threads()
    keep_freed_memory()
    plan = _QUICK if options.quick else Plan()
    if options.seconds:
        plan = Plan(seconds=options.seconds)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "cases": []}
    gauge = timing.Gauge()
    for case in cases:
        record = measure(case, plan, gauge, peers=not options.no_peers)
        report["cases"].append(record)
        print(table(record), flush=True)
        if options.json:  # after every case: a long run may be interrupted
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report["cases"]))
    return 0


def measure(
    case: Case, plan: Plan, gauge: Callable[[], bool], peers: bool = True
) -> dict[str, Any]:
    """Build, check and time everything of one case."""
    start = time.perf_counter()
    candidates, left_out = _candidates(case, peers)
    limits, missing = _limits(case)
    timed = {name: timing.stopwatch(c.call) for name, c in candidates.items()}
    timed |= {LIMIT + kind: limit for kind, limit in limits.items()}
    # Without ours there is nothing to compare.
    series = timing.interleave(timed, plan, gauge) if OURS in candidates else {}
    record = evaluate(case, series, {kind: limit.work for kind, limit in limits.items()})
    record["left_out"] = left_out | missing
    record["took_s"] = round(time.perf_counter() - start, 1)
    return record


def _candidates(case: Case, peers: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """By name, those that run and are right; and why the others are left out."""
    from . import ours
    from . import peers as others
    from .check import PEER_SLACK

    found: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}

    def add(
        build: Callable[[], list[Candidate]], label: str, problem, slack: float, prefix=""
    ) -> None:
        try:
            for candidate in build():
                _verify(candidate, problem, slack)
                found[prefix + candidate.name] = candidate
        except Exception as error:  # of whatever library
            text = " ".join(str(error).split()) or type(error).__name__
            left_out[label] = f"{type(error).__name__}: {text[:200]}"

    add(lambda: ours.build(case.problem), OURS, case.problem, 1.0)
    if not found:
        return found, left_out
    if case.neighbour is not None:
        add(lambda: ours.build(case.neighbour)[:1], NEIGHBOUR, case.neighbour, 1.0, NEIGHBOUR)
    elif peers:
        builders, missing = others.candidates(case.problem)
        left_out |= missing
        for name, builder in builders.items():
            add(lambda builder=builder: [builder()], name, case.problem, PEER_SLACK)
    return found, left_out


def _verify(candidate: Candidate, problem, slack: float) -> None:
    from .check import check

    check(problem, candidate.result(), slack)


def _limits(case: Case) -> tuple[dict[str, Limit], dict[str, str]]:
    limits, missing = {}, {}
    for kind in case.problem.work:
        try:
            footprint = case.problem.footprint if kind == "read" else 0
            limits[kind] = Limit(kind, footprint=footprint)
        except Unavailable as error:
            missing[LIMIT + kind] = str(error)
    return limits, missing


def evaluate(
    case: Case, series: Mapping[str, Series], limit_work: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a case, for printing and JSON.

    series: by name of candidate, and by `LIMIT` + kind; limit_work: kind -> work of one call of
    that limit. Times are in seconds, rates in operations a second, ratios how many times faster
    ours is.
    """
    problem = case.problem
    record: dict[str, Any] = {
        "group": case.group,
        "case": case.name,
        "op": problem.op,
        "operations": problem.operations,
        "work": problem.work,
        "goals": {"of_limit": case.of_limit, "of_peers": dict(case.of_peers)},
        "candidates": {},
        "limits": {},
        "of_limit": None,
        "speedup": {},
        "best": {},
    }
    for name, measured in series.items():
        if name.startswith(LIMIT):
            kind = name.removeprefix(LIMIT)
            rate = limit_work[kind] / measured.median
            record["limits"][kind] = {"rate": rate, **measured.summary()}
            continue
        of = case.neighbour if name.startswith(NEIGHBOUR) else problem
        record["candidates"][name] = {
            "rate": of.operations / measured.median,
            **measured.summary(),
        }
    if OURS not in series:
        return record
    mine = series[OURS]
    if problem.work.keys() <= limit_work.keys():
        at_limit = timing.weighted_sum(
            [(series[LIMIT + kind], work / limit_work[kind]) for kind, work in problem.work.items()]
        )
        record["of_limit"] = timing.speedup(mine, at_limit)._asdict()
    for name, theirs in series.items():
        if name in (OURS, RUN) or name.startswith(LIMIT):
            continue
        ratio = timing.speedup(mine, theirs)
        if name.startswith(NEIGHBOUR):  # per operation
            ratio = ratio.scaled(problem.operations / case.neighbour.operations)
        record["speedup"][name] = ratio._asdict()
    for part, _ in case.of_peers:
        among = {n: r["median"] for n, r in record["speedup"].items() if part in n}
        if among:
            record["best"][part] = min(among, key=among.get)
    return record


def goals(record: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(what, reached, asked for) of every goal that could be measured."""
    found = []
    if record["goals"]["of_limit"] and record["of_limit"]:
        found.append(("limit", record["of_limit"]["median"], record["goals"]["of_limit"]))
    for part, asked in record["goals"]["of_peers"].items():
        if part in record["best"]:
            best = record["best"][part]
            found.append((best, record["speedup"][best]["median"], asked))
    return found


def table(record: Mapping[str, Any]) -> str:
    """A case as text: a line for each candidate, the limits, and the goals."""
    lines = [f"{record['case']}  ({record['operations'] * 1e-9:.3g} G operations)"]
    for name, c in sorted(record["candidates"].items(), key=lambda item: item[1]["median_s"]):
        ratio = record["speedup"].get(name)
        told = ""
        if name == OURS and record["of_limit"]:
            told = f"{record['of_limit']['median']:6.2f} of the limit"
        elif ratio:
            told = f"{ratio['median']:6.2f}x [{ratio['p25']:.2f} .. {ratio['p75']:.2f}]"
        lines.append(
            f"  {name:48s} {c['median_s'] * 1e3:9.3f} ms [{c['min_s'] * 1e3:.3f} .. "
            f"{c['p90_s'] * 1e3:.3f}]{' ' if c['clean'] else '!'} {c['rate'] * 1e-9:7.0f} G/s  "
            f"{told}".rstrip()
        )
    for kind, limit in record["limits"].items():
        lines.append(f"  {LIMIT + kind:48s} {limit['rate'] * 1e-9:51.0f} G/s")
    for name, reason in record["left_out"].items():
        lines.append(f"  {name:48s} left out: {reason}")
    for what, reached, asked in goals(record):
        verdict = "reached" if reached >= asked else "MISSED"
        lines.append(f"  goal: {what}: {reached:.2f}, asked for {asked:.2f}: {verdict}")
    return "\n".join(lines) + "\n"


def summary(records: list[Mapping[str, Any]]) -> str:
    """All cases as a Markdown table."""
    lines = [
        "| case | ours, ms | G/s | of the limit (goal) | fastest peer | ratio (goal) |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        mine = record["candidates"].get(OURS)
        if mine is None:
            lines.append(f"| {record['case']} | {record['left_out'].get(OURS, '')} | | | | |")
            continue
        limit = ""
        if record["of_limit"]:
            asked = record["goals"]["of_limit"]
            limit = f"{record['of_limit']['median']:.2f}" + (f" ({asked:.2f})" if asked else "")
        asked_of = record["goals"]["of_peers"] or {"": None}
        best, ratios = [], []
        for part, asked in asked_of.items():
            among = {n: r["median"] for n, r in record["speedup"].items() if part in n}
            if among:
                name = min(among, key=among.get)
                best.append(name)
                ratios.append(f"{among[name]:.2f}" + (f" ({asked:.2f})" if asked else ""))
        flag = "" if mine["clean"] else "!"
        lines.append(
            f"| {record['case']} | {mine['median_s'] * 1e3:.3g}{flag} | {mine['rate'] * 1e-9:.0f} "
            f"| {limit} | {'; '.join(best)} | {'; '.join(ratios)} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "versions": {name: version(name) for name in _LIBRARIES},
    }


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be given repeatedly")
    parser.add_argument("--case", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--quick", action="store_true", help="the short set, measured briefly")
    parser.add_argument("--seconds", type=float, help="for each candidate of a case")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the limits")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
