"""A report as text: each case in full, or all of them as Markdown.

python -m benchmarks.table report.json                            # prints the table
python -m benchmarks.table report.json --into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .goals import BEYOND, MISSED, REACHED, fastest_peer
from .measure import LIMIT, OURS

BEGIN, END = "<!-- results: python -m benchmarks.table -->\n", "<!-- end of results -->\n"


def text(record: Mapping[str, Any]) -> str:
    """One case: a line for each candidate, the limits, and the goals."""
    lines = [f"{record['case']}  ({record['operations'] * 1e-9:.3g} G operations)"]
    for name, c in sorted(record["candidates"].items(), key=lambda item: item[1]["median_s"]):
        told = ""
        ratio = record["speedup"].get(name)
        if name == OURS and record["of_limit"]:
            told = f"{record['of_limit']['median']:6.2f} of the limit"
            if record["of_vector_limit"]:
                told += f", {record['of_vector_limit']['median']:.2f} of vectors'"
        elif ratio:
            told = f"{ratio['median']:6.2f}x [{ratio['p25']:.2f} .. {ratio['p75']:.2f}]"
        lines.append(
            f"  {name:48s} {c['median_s'] * 1e3:9.3f} ms [{c['min_s'] * 1e3:.3f} .. "
            f"{c['p90_s'] * 1e3:.3f}]{' ' if c['clean'] else '!'} {c['rate'] * 1e-9:7.0f} G/s  "
            f"{told}".rstrip()
        )
    for kind, limit in record["limits"].items():
        best = f"best {limit['best_rate'] * 1e-9:.0f}"
        lines.append(f"  {LIMIT + kind:48s} {limit['rate'] * 1e-9:51.0f} G/s  {best}")
    if record["measured"] is not None:
        lines.append(f"  measured: {_amount(record['measured'], record['measure'])}")
    for name, reason in record["left_out"].items():
        lines.append(f"  {name:48s} left out: {reason}")
    for goal in record["goals"]:
        bound = "at most" if goal["at_most"] else "at least"
        if record["measure"] == "speed":
            numbers = f"{goal['reached']:.2f}, asked for {bound} {goal['asked']:.2f}"
        else:
            unit = record["measure"]
            numbers = f"{_amount(goal['reached'], unit)}, {bound} {_amount(goal['asked'], unit)}"
        note = f" ({goal['note']})" if goal["note"] else ""
        verdict = goal["verdict"] if goal["verdict"] == REACHED else goal["verdict"].upper()
        lines.append(f"  goal: {goal['what']}: {numbers}: {verdict}{note}")
    return "\n".join(lines) + f"\n  took {record['took_s']:.0f} s\n"


def markdown(report: Mapping[str, Any]) -> str:
    """All cases, a table for each group, under what they belong to."""
    parts = [head(report), legend(report["cases"])]
    for group, records in groupby(report["cases"], key=lambda record: record["group"]):
        rows = [_row(record) for record in records]
        parts.append("\n".join([f"**{group}**\n", *_HEADER, *rows]))
    return "\n\n".join(parts)


_HEADER = (
    "| case | ms | G/s | of the limit | ratio to the fastest peer | also asked |",
    "|---|---|---|---|---|---|",
)


def head(report: Mapping[str, Any]) -> str:
    """Machine, versions, date and commit, one paragraph."""
    about = report["machine"]
    versions = [f"{name} {version}" for name, version in about["versions"].items() if version]
    commit = f"commit {about['commit']}" + (", changed since" if about.get("changed") else "")
    return (
        f"{about['date'][:16].replace('T', ' ')} UTC, {commit}: {about['cpu']} "
        f"({about['family']}; {', '.join(about['instructions'])}), {about['cores']} cores, "
        f"{about['threads']} threads, {about['system']}, Python {about['python']}, "
        f"{', '.join(versions)}. {len(report['cases'])} cases in "
        f"{report['took_s'] / 60:.0f} minutes."
    )


def legend(records: Sequence[Mapping[str, Any]]) -> str:
    """How many goals were reached, and how to read a cell."""
    verdicts = [goal["verdict"] for record in records for goal in record["goals"]]
    return (
        f"Goals: {verdicts.count(REACHED)} reached, {verdicts.count(MISSED)} missed, "
        f"{verdicts.count(BEYOND)} beyond the machine (the peer is so near the limit that no "
        "program can be so much faster). A cell is `reached (asked for)`, bold when missed, `†` "
        "when beyond the machine, `~` when no turn was undisturbed: then the fastest calls are "
        "compared, take it as a hint."
    )


def _row(record: Mapping[str, Any]) -> str:
    mine = record["candidates"].get(OURS)
    if mine is None and record["measured"] is None:
        reason = record["left_out"].get(OURS, "")[:120]
        return f"| {record['case']} | not measured: {reason} | | | | |"
    by_kind: dict[str, list[str]] = {"limit": [], "peer": [], "other": []}
    for goal in record["goals"]:
        if goal["what"] == "limit":
            by_kind["limit"].append(_cell(goal))
        elif goal["what"] == "vector limit":
            by_kind["limit"].append(f"{_cell(goal)} of vectors'")
        elif goal["what"] in record["speedup"]:
            by_kind["peer"].append(f"{_cell(goal)} {goal['what']}")
        elif record["measure"] == "speed":
            by_kind["other"].append(f"{_cell(goal)} {goal['what']}")
        else:
            amounts = (_amount(goal[key], record["measure"]) for key in ("reached", "asked"))
            by_kind["other"].append(_marked("{} (at most {})".format(*amounts), goal))
    if record["of_limit"] and (record["of_vector_limit"] or not by_kind["limit"]):
        by_kind["limit"].insert(0, f"{record['of_limit']['median']:.2f}")
    peer = fastest_peer(record)
    if peer and not by_kind["peer"]:
        by_kind["peer"] = [f"{record['speedup'][peer]['median']:.2f} {peer}"]
    ms = rate = ""
    if mine:
        ms = f"{mine['median_s'] * 1e3:.3g}" + ("" if mine["clean"] else " ~")
        rate = f"{mine['rate'] * 1e-9:.0f}"
    cells = [record["case"], ms, rate, *("; ".join(found) for found in by_kind.values())]
    return "| " + " | ".join(cells) + " |"


def _cell(goal: Mapping[str, Any]) -> str:
    bound = "at most " if goal["at_most"] else ""
    told = _marked(f"{goal['reached']:.2f} ({bound}{goal['asked']:.2f})", goal)
    return told if goal["clean"] else told + " ~"


def _marked(told: str, goal: Mapping[str, Any]) -> str:
    return {REACHED: told, MISSED: f"**{told}**", BEYOND: f"{told} †"}[goal["verdict"]]


def _amount(value: float, measure: str) -> str:
    return f"{value / 2**20:.1f} MiB" if measure == "memory" else f"{value:.1f} s"


def put_into(document: str, table: str) -> str:
    """The document with what stands between its two markers replaced."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + "\n" + table + "\n\n" + end + after


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", help="JSON file of benchmarks.run")
    parser.add_argument("--into", metavar="FILE", help="replace the table of this document")
    options = parser.parse_args(arguments)
    table = markdown(json.loads(Path(options.report).read_text()))
    if options.into:
        document = Path(options.into)
        document.write_text(put_into(document.read_text(), table))
    else:
        print(table)


if __name__ == "__main__":
    main()
