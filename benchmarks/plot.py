"""A picture of a report: our speed as a fraction of the limit, and the fastest peer's beside it.

python -m benchmarks.plot report.json report.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OURS, _PEER, _GOAL = "#1f6f8b", "#c9c9c9", "#b5342b"
_ROW_INCHES = 0.32


def bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each case that has a limit: name, fractions of it, goal, and who the peer is."""
    rows = []
    for record in report["cases"]:
        if not record["of_limit"]:
            continue
        ours = record["of_limit"]["median"]
        speedup = {name: ratio["median"] for name, ratio in record["speedup"].items()}
        best = min(speedup, key=speedup.get, default=None)
        rows.append(
            {
                "case": record["case"],
                "ours": ours,
                "peer": ours / speedup[best] if best else None,
                "peer_name": best,
                "goal": record["goals"]["of_limit"],
            }
        )
    return rows


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw `bars(report)` to an image file; the format follows from its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = bars(report)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + _ROW_INCHES * len(rows)))
    for y, row in enumerate(reversed(rows)):
        axes.barh(y + 0.18, row["ours"], 0.36, color=_OURS, label="opferry" if y == 0 else None)
        if row["peer"]:
            label = "fastest peer" if y == 0 else None
            axes.barh(y - 0.18, row["peer"], 0.36, color=_PEER, label=label)
            axes.text(row["peer"] + 0.005, y - 0.18, row["peer_name"], fontsize=6, va="center")
        if row["goal"]:
            axes.plot([row["goal"]] * 2, [y - 0.4, y + 0.4], color=_GOAL, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["case"] for row in reversed(rows)], fontsize=7)
    axes.set_xlabel("fraction of the machine's limit in the same run (red: goal)")
    axes.set_xlim(0, max([1.0, *(row["ours"] for row in rows)]) * 1.1)
    about = report["machine"]
    axes.set_title(f"{about['cpu']}, {about['threads']} threads, {about['date'][:10]}", fontsize=9)
    if rows:
        axes.legend(loc="lower right", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("report", help="JSON file of benchmarks.run")
    parser.add_argument("image", help="for example report.png")
    options = parser.parse_args(arguments)
    plot(json.loads(Path(options.report).read_text()), options.image)


if __name__ == "__main__":
    main()
