"""Compiles every mode and every timed candidate into one folder: needs a CUDA compiler, no GPU.

python -m benchmarks.gpu.build build/gpu
python -m benchmarks.gpu.build build/gpu --group gemm --group decode
python -m benchmarks.gpu.build --list
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import opferry
from opferry.runtime.errors import OpferryError, UnsupportedError
from opferry.schedules.cuda.arch import ARCHS
from opferry.schedules.cuda.override import overriding

from ..inputs import inputs
from .index import INDEX, Entry, stored_digest
from .modes import Mode, modes
from .problems import GROUPS, Candidate, candidates, node

ALL = ("modes", *GROUPS)
_QUICK_MODES = 3


def chosen(groups: Sequence[str], quick: bool = False) -> Iterator[tuple[str, Mode | Candidate]]:
    """Group and job of everything that is asked for."""
    for group in groups:
        if group == "modes":
            jobs: Iterable[Mode | Candidate] = _first_of_each(modes()) if quick else modes()
        else:
            jobs = candidates(group, quick)
        for job in jobs:
            yield group, job


def _first_of_each(table: Iterable[Mode]) -> list[Mode]:
    """A few modes of every operator."""
    found: dict[str, list[Mode]] = {}
    for mode in table:
        found.setdefault(mode.op, []).append(mode)
    return [mode for same in found.values() for mode in same[:_QUICK_MODES]]


def compile_named(group: str, name: str, target: str, folder: Path) -> Entry:
    """Compile and save one; what cannot be compiled is an entry with its error."""
    job = {job.name: job for quick in (True, False) for _, job in chosen([group], quick)}[name]
    place = _folder_name(job.name)
    start = time.perf_counter()
    error = ""
    try:
        compiled = _compile_mode(job, target) if isinstance(job, Mode) else _compile(job, target)
        compiled.save(folder / place)
    except (OpferryError, TypeError) as found:  # TypeError: a field that a configuration lacks
        error = f"{type(found).__name__}: {found}"
    problem = job.name if isinstance(job, Mode) else job.problem.label
    config = "" if isinstance(job, Mode) else job.config
    digest = stored_digest(job.feeds(0), job.constant) if isinstance(job, Mode) else ""
    seconds = time.perf_counter() - start
    return Entry(group, job.name, problem, config, place, digest, error[:2000], seconds)


def _folder_name(name: str) -> str:
    """Letters, digits and dashes, short, unique."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _compile_mode(mode: Mode, target: str) -> opferry.Module:
    feeds = mode.feeds(0)
    model = opferry.node_model(
        mode.op, feeds, mode.outputs, mode.constant, dict(mode.symbolic), **mode.attrs
    )
    return opferry.compile(model, target)


def _compile(candidate: Candidate, target: str) -> opferry.Module:
    it = node(candidate.problem)
    feeds, constant = it.feeds, it.constant
    if candidate.stored:
        arrays = vars(inputs(candidate.problem))
        feeds = feeds | {name: arrays[it.given[name]] for name in candidate.stored}
        constant = [*constant, *candidate.stored]
    if candidate.arch:
        target = _same_gpu(target, candidate.arch)
    model = opferry.node_model(candidate.problem.op, feeds, it.outputs, constant, **it.attrs)
    with overriding(candidate.kind, candidate.fields):
        return opferry.compile(model, target)


def _same_gpu(target: str, name: str) -> str:
    """The target of an architecture; ``UnsupportedError`` unless ``target`` is of the same GPUs."""
    asked = ARCHS.get(target.removeprefix("cuda-"))
    if asked is None or asked.capability != ARCHS[name].capability:
        raise UnsupportedError(f"code for {name}: found target {target!r}, allowed the same GPU's")
    return f"cuda-{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="OUT")
    parser.add_argument("--arch", default="sm_90", help="default sm_90")
    parser.add_argument("--target", help="instead of an architecture, such as llvm: a rehearsal")
    parser.add_argument("--group", action="append", choices=ALL, help="repeatable; default: all")
    parser.add_argument("--match", default="", help="regular expression that a name has to contain")
    parser.add_argument("--quick", action="store_true", help="a few modes and problems of each")
    parser.add_argument("--jobs", type=int, default=2, help="processes, default 2")
    parser.add_argument("--list", action="store_true", help="names only")
    args = parser.parse_args()
    jobs = [
        (group, job)
        for group, job in chosen(args.group or ALL, args.quick)
        if re.search(args.match, job.name)
    ]
    if args.list:
        for group, job in jobs:
            print(f"{group:<11} {job.name}")
        return
    if args.folder is None:
        parser.error("the following arguments are required: OUT")
    target = args.target or f"cuda-{args.arch}"
    args.folder.mkdir(parents=True, exist_ok=True)
    entries = []
    with ProcessPoolExecutor(args.jobs) as pool:
        started = [
            pool.submit(compile_named, group, job.name, target, args.folder) for group, job in jobs
        ]
        for number, future in enumerate(started, 1):
            entry = future.result()
            entries.append(entry)
            verdict = entry.error.splitlines()[0] if entry.error else f"{entry.seconds:.1f} s"
            print(f"[{number}/{len(jobs)}] {entry.group}: {entry.name}: {verdict}", flush=True)
    record = {"target": target, "numpy": np.__version__, "entries": [vars(e) for e in entries]}
    (args.folder / INDEX).write_text(json.dumps(record, indent=1) + "\n")
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    failed = sum(bool(entry.error) for entry in entries)
    print(f"{len(entries) - failed} modules, {failed} refused, {size / 2**20:.1f} MiB, {target}")


if __name__ == "__main__":
    main()
