"""Measures cases and prints ours, every peer, the ratio and the fraction of the limit.

    python -m benchmarks.run --quick
    python -m benchmarks.run --group attention --case "S512 .* fp32" --json attention.json

Every result is checked before its time is taken. A peer that is not installed, cannot do the work
or gets it wrong is named with the reason and left out; a case that crashes is, too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import use_threads
from .cases import CASES, GROUPS, Case, select
from .machine import machine
from .measure import OURS, empty, serve
from .table import markdown, text
from .timing import Plan

PLAN = Plan(seconds=0.4, batch_seconds=0.04)
QUICK = Plan(seconds=0.25, patience_seconds=0.5)
CASE_SECONDS = 240.0
"""A case that takes longer is given up."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    cases = select(options.group or (), options.case, options.quick)
    if options.list:
        print("\n".join(f"{case.group:11s}{case.name}" for case in cases))
        return 0
    if not cases:
        print("no case matches", file=sys.stderr)
        return 2
    use_threads()
    plan = QUICK if options.quick else PLAN
    if options.seconds:
        plan = Plan(seconds=options.seconds)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "took_s": 0.0, "cases": []}
    if options.resume and Path(options.json).exists():
        report = json.loads(Path(options.json).read_text())
    known = {record["case"] for record in report["cases"]}
    start = time.monotonic() - report["took_s"]
    for record in records([c for c in cases if c.name not in known], plan, not options.no_peers):
        report["cases"].append(record)
        report["cases"].sort(key=_place)
        report["took_s"] = round(time.monotonic() - start, 1)
        print(text(record), flush=True)
        if options.json:  # after every case: a long run may be interrupted
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    return 0


def _place(record: Mapping[str, Any]) -> int:
    """Of a record's case in the table."""
    return next((at for at, case in enumerate(CASES) if case.name == record["case"]), len(CASES))


def records(
    cases: Sequence[Case], plan: Plan, peers: bool = True, seconds: float = CASE_SECONDS
) -> Iterator[dict[str, Any]]:
    """The record of each case, measured in worker processes.

    A worker serves the speed cases of a group; memory and compile time get one each. It is
    replaced when it dies or does not answer in `seconds`.
    """
    worker, serves = None, None
    for case in cases:
        wanted = case.group if case.measure == "speed" else case.name
        if worker is not None and serves != wanted:
            worker.stop()
            worker = None
        if worker is None:
            worker, serves = _Worker(plan, peers), wanted
        try:
            yield worker.measure(case, seconds)
        except _Lost as reason:
            worker.stop()
            worker = None
            yield empty(case) | {"left_out": {OURS: str(reason)}}
    if worker is not None:
        worker.stop()


class _Lost(RuntimeError):
    """A worker that died or hangs."""


class _Worker:
    """A process that measures one case after the other."""

    def __init__(self, plan: Plan, peers: bool):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, plan, peers), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed

    def measure(self, case: Case, seconds: float) -> dict[str, Any]:
        try:
            self._connection.send(CASES.index(case))
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise _Lost(f"the process ended with status {self._process.exitcode}") from None
        raise _Lost(f"no result after {seconds:.0f} s")

    def stop(self) -> None:
        """Ask it to end; a process that does not is killed."""
        try:
            self._connection.send(None)
            self._process.join(5)
        except OSError:
            pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


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
    parser.add_argument("--resume", action="store_true", help="leave out what the report has")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
