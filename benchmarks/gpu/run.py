"""Proves and times what `build` made, on the machine with the GPU: a table and all numbers.

python -m benchmarks.gpu.run build/gpu --out results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from . import table
from .index import read

_SILENCE = 150
"""Seconds without a result after which a process is ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--group", action="append", help="repeatable; default: all in the folder")
    parser.add_argument("--rounds", type=int, default=60, help="batches of each candidate")
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, for each problem")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    args = parser.parse_args()
    target, entries = read(args.folder)
    groups = args.group or list(dict.fromkeys(entry.group for entry in entries))
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "log.jsonl"
    log.unlink(missing_ok=True)
    options = {
        "device": "cuda" if target.startswith("cuda") else "cpu",
        "groups": groups,
        "seed": args.seed,
        "rounds": args.rounds,
        "seconds": args.seconds,
    }
    print(f"{target}, seed {args.seed}", flush=True)
    finished = supervise(args.folder, log, options, time.monotonic() + args.budget)
    records = read_log(log)
    planned = list(dict.fromkeys(e.problem for e in entries if e.group in groups))
    missing = [name for name in planned if name not in _done(records)]
    text = table.render(target, args.seed, records, missing)
    (args.out / "table.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    print(text)
    sys.exit(0 if finished and table.all_right(records) else 1)


def supervise(folder: Path, log: Path, options: dict, deadline: float) -> bool:
    """Workers one after the other until nothing is left or time is up; whether all was done. Each
    one goes on where the last one ended, without what ended it.
    """
    culprits: list[str] = []
    while True:
        records = read_log(log)
        given = {**options, "done": sorted(_done(records)), "culprits": culprits}
        command = [sys.executable, "-m", "benchmarks.gpu.worker"]
        command += [str(folder), str(log), json.dumps(given)]
        process = subprocess.Popen(command)
        status = _wait(process, log, deadline)
        if status == 0:
            return True
        records = read_log(log)
        if time.monotonic() > deadline:
            return False
        culprit = next((r["started"] for r in reversed(records) if "started" in r), None)
        if culprit is None or culprit in culprits or culprit == "ceilings":
            print(f"worker: exit status {status}, gives up at {culprit}", flush=True)
            return False
        print(f"worker: exit status {status} at {culprit}", flush=True)
        culprits.append(culprit)


def _wait(process: subprocess.Popen, log: Path, deadline: float) -> int:
    """Exit status; ended when it is silent for long, or at the deadline."""
    size, heard = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            size, heard = now, time.monotonic()
        if time.monotonic() > min(heard + _SILENCE, deadline):
            process.kill()
            process.wait()
    return process.returncode


def read_log(log: Path) -> list[dict]:
    """Records; a line that a dying process left unfinished is none."""
    if not log.exists():
        return []
    records = []
    for line in log.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _done(records: list[dict]) -> set[str]:
    return {r[key] for r in records for key in ("mode", "problem") if key in r}


if __name__ == "__main__":
    main()
