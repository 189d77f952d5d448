"""A picture of a report: how much faster than the fastest peer, and how near the limit.

    python -m benchmarks.plot report.json docs/performance.png

A row for each case. Left: speed as a multiple of the fastest peer's, which is the line at 1.
Right: fraction of the machine's limit. Ticks are the goals.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .goals import fastest_peer

PANELS = {
    "int8 matmul": r"gemm .*",
    "SpeedFusionAttention, float32": r"attention .* S\d+ .*fp32.*",
    "SpeedFusionAttention, bfloat16 and float16": r"attention .* S\d+ .*[bf][fp]16.*",
    "SpeedFusionAttention, one query (decode)": r"attention .* S1x.*",
    "QOrderedLongformerAttention": r"longformer .*",
    "NPUNsaCompressAttention": r"nsa .*",
    "Sentence encoder (whole model)": r"model .*",
}
"""Title -> which cases, as group and name."""
_OURS, _BEHIND, _LIMIT, _GOAL, _TEXT = "#1f6f8b", "#c46a4a", "#7f9f5f", "#222222", "#555555"
_MOST = 6.0
"""Longest bar; what is faster ends there, too."""
_INCHES = {"width": 9.0, "row": 0.21, "panel": 0.62, "head": 0.7}
_OPERATORS = tuple(f"{op} " for op in ("NPUQuantMatmul", "SpeedFusionAttention")) + (
    "QOrderedLongformerAttention ",
    "NPUNsaCompressAttention ",
)


def rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn of each case that has a peer or a goal of the limit."""
    found = []
    for record in records:
        goals = {goal["what"]: goal["asked"] for goal in record["goals"]}
        # Of several goals over peers, the one that is hardest to reach.
        asked = [g for g in record["goals"] if g["what"] in record["speedup"]]
        hardest = min(asked, key=lambda g: g["reached"] / g["asked"], default=None)
        peer = hardest["what"] if hardest else fastest_peer(record)
        if peer is None and "limit" not in goals:
            continue
        label = record["case"]
        for operator in _OPERATORS:
            label = label.removeprefix(operator)
        found.append(
            {
                "label": label.replace("QOrderedMatMul", "QOrdered"),
                "peer": peer,
                "speedup": record["speedup"][peer]["median"] if peer else None,
                "speedup_goal": hardest["asked"] if hardest else None,
                "of_limit": record["of_limit"]["median"] if record["of_limit"] else None,
                "of_limit_goal": goals.get("limit"),
            }
        )
    return found


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw a report to an image file; the format follows from its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for title, pattern in PANELS.items():
        chosen = [c for c in report["cases"] if re.fullmatch(pattern, f"{c['group']} {c['case']}")]
        if found := rows(chosen):
            panels.append((title, found))
    heights = [_INCHES["panel"] + _INCHES["row"] * len(found) for _, found in panels]
    total = sum(heights) + _INCHES["head"]
    figure = pyplot.figure(figsize=(_INCHES["width"], total))
    about = report["machine"]
    figure.text(
        0.01,
        1 - 0.2 / total,
        f"opferry on {about['cpu']}, {about['threads']} threads, {about['date'][:10]}, commit "
        f"{about['commit']}",
        fontsize=10,
        weight="bold",
        va="center",
    )
    figure.text(
        0.01,
        1 - 0.42 / total,
        "left: speed as a multiple of the fastest peer's      right: fraction of what the machine "
        "can do at all      black ticks: goals",
        fontsize=8.5,
        color=_TEXT,
        va="center",
    )
    top = total - _INCHES["head"]
    for (title, found), height in zip(panels, heights):
        bottom, inner = top - height + 0.28, height - _INCHES["panel"]
        left = figure.add_axes((0.30, bottom / total, 0.39, inner / total))
        right = figure.add_axes((0.73, bottom / total, 0.25, inner / total), sharey=left)
        _speedups(left, found)
        _fractions(right, found)
        left.set_yticks(range(len(found)), [row["label"] for row in found], fontsize=7)
        left.set_ylim(len(found) - 0.4, -0.6)
        left.set_title(title, fontsize=9, weight="bold", loc="left", x=-0.74)
        right.tick_params(labelleft=False)
        top -= height
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _speedups(axes, found: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.75, 72)  # names stand behind the bars
    ticks = [1, 1.5, 2, 3, 4, _MOST]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=7)
    axes.set_xticks([], minor=True)
    for y, row in enumerate(found):
        if row["speedup"] is None:
            axes.text(1.05, y, "no peer", fontsize=6.5, va="center", color=_TEXT)
            continue
        end = min(row["speedup"], _MOST)
        axes.barh(y, end - 1, 0.66, left=1, color=_OURS if end >= 1 else _BEHIND)
        told = f"{row['speedup']:.2f}x  {row['peer']}"
        behind = max(end, row["speedup_goal"] or 0, 1) * 1.06
        axes.text(behind, y, told, fontsize=6.5, va="center")
        _tick(axes, row["speedup_goal"], y)
    axes.axvline(1, color=_GOAL, linewidth=0.8)
    _plain(axes)


def _fractions(axes, found: Sequence[Mapping[str, Any]]) -> None:
    for y, row in enumerate(found):
        if row["of_limit"] is None:
            continue
        axes.barh(y, row["of_limit"], 0.66, color=_LIMIT)
        told = f"{row['of_limit']:.2f}"
        axes.text(0.02, y, told, fontsize=6.5, va="center", color="white")
        _tick(axes, row["of_limit_goal"], y)
    axes.axvline(1, color=_GOAL, linewidth=0.8)
    axes.set_xlim(0, max([1.05, *(row["of_limit"] or 0 for row in found)]))
    axes.tick_params(axis="x", labelsize=7)
    _plain(axes)


def _tick(axes, at: float | None, y: int) -> None:
    if at:
        axes.plot([at, at], [y - 0.42, y + 0.42], color=_GOAL, linewidth=1.6)


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", help="JSON file of benchmarks.run")
    parser.add_argument("image", help="for example docs/performance.png")
    options = parser.parse_args(arguments)
    plot(json.loads(Path(options.report).read_text()), options.image)


if __name__ == "__main__":
    main()
