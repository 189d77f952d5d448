"""One process on the GPU: checks and times what is left to do, a line of JSON for each result.

A fault of a kernel leaves a process without a usable device; `run` then starts another one without
the culprit, which the last line ``{"started": ...}`` names.

python -m benchmarks.gpu.worker FOLDER LOG OPTIONS, with options in JSON as `main` reads them.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opferry.reference.compare import compare
from opferry.runtime.module import load

from ..check import PEER_SLACK, check
from ..shapes import Attention, Longformer, Matmul
from . import device as on
from .index import Entry, read, stored_digest
from .modes import Mode, modes
from .peers import Peer, peers
from .problems import GROUPS, QUICK, Problem, node, result

FAULT = 3
"""Exit status of a process that lost the device."""

_SPEED_FUSION_OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")


def prove(mode: Mode, entry: Entry, folder: Path, device: str, seed: int) -> dict[str, Any]:
    """Run a mode on fresh inputs, into memory full of NaN, against the float64 reference."""
    if stored_digest(mode.feeds(0), mode.constant) != entry.stored:
        return {"ok": False, "note": "this NumPy draws other numbers than that of the build"}
    module = load(folder / entry.folder)
    feeds = mode.feeds(seed)
    given = {spec.name: on.tensor(feeds[spec.name], device) for spec in module.inputs}
    poisoned = on.poison(module, on.bound(module, given))
    feeds = mode.feeds(seed + 1)
    given = {spec.name: feeds[spec.name] for spec in module.inputs}
    found = module.run(given, device_outputs=True)
    places = {x.data_ptr() for x in map(torch.from_dlpack, found.values()) if x.numel()}
    names = _SPEED_FUSION_OUTPUTS if mode.op == "SpeedFusionAttention" else tuple(found)
    got = [found[name].numpy() if name in found else None for name in names]
    verdicts = compare(mode.op, feeds, mode.attrs, got)
    wrong = [str(verdict) for verdict in verdicts if not verdict.ok]
    return {
        "ok": bool(verdicts) and not wrong,
        "note": "; ".join(wrong)[:1000],
        "error": max((verdict.max_abs_error for verdict in verdicts), default=0.0),
        "poisoned": places <= poisoned,
    }


class Contest:
    """All configurations and all peers of one problem: those that are right are timed, in turn."""

    def __init__(self, problem: Problem, device: str, tell: Callable[..., None]):
        self.problem, self.device, self.tell = problem, device, tell
        self.sets = on.input_sets(problem, device)
        self.works: dict[str, list[on.Work]] = {}
        self.notes: dict[str, str] = {}
        self.results: dict[str, torch.Tensor] = {}

    def enter(
        self,
        name: str,
        bind: Callable[[SimpleNamespace], on.Work],
        judge: Callable[[on.Work], torch.Tensor],
        culprits: set[str],
    ) -> None:
        """``judge`` runs the work, raises if the result is wrong, and returns it."""
        key = f"{self.problem.label}, {name}"
        if key in culprits:
            self.notes[name] = "crashed"
            return
        self.tell(started=key)
        try:
            works = [bind(arrays) for arrays in self.sets]
            self.results[name] = judge(works[0]).clone()
            self.works[name] = works
        except Exception as error:  # libraries refuse in many ways
            on.synchronize(self.device)  # raises if the device is lost
            self.notes[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]

    def ours(self, entry: Entry, folder: Path, culprits: set[str]) -> None:
        """One configuration."""
        name = f"opferry {entry.config}"
        if entry.error:
            self.notes[name] = f"not built: {entry.error}".split("\n")[0][:300]
            return
        module = load(folder / entry.folder)
        taken = {spec.name for spec in module.inputs}
        arrays_of = {n: x for n, x in node(self.problem).given.items() if n in taken}

        def bind(arrays: SimpleNamespace) -> on.Work:
            return on.bound(module, {n: getattr(arrays, array) for n, array in arrays_of.items()})

        def judge(work: on.Work) -> torch.Tensor:
            on.poison(module, work)
            found = on.outputs(module, work())
            check(self.problem, result(self.problem, {n: on.array(x) for n, x in found.items()}))
            self.moved = sum(getattr(self.sets[0], a).nbytes for a in arrays_of.values())
            self.moved += sum(x.nbytes for x in found.values())
            return next(iter(found.values()))

        self.enter(name, bind, judge, culprits)

    def peer(self, peer: Peer, culprits: set[str]) -> None:
        def judge(work: on.Work) -> torch.Tensor:
            found = work()
            check(self.problem, peer.finish(found), PEER_SLACK)
            return found

        self.enter(peer.name, peer.bind, judge, culprits)

    def run(self, rates: dict[str, float], rounds: int, seconds: float) -> dict[str, Any]:
        """Times in seconds by name, and what to read them against."""
        self.tell(started=f"{self.problem.label}, timing")
        times = on.medians(self.works, self.device, rounds, seconds)
        floor = floor_seconds(self.problem, self.moved, rates) if hasattr(self, "moved") else None
        return {"times": times, "notes": self.notes, "floor": floor, "distance": self._distances()}

    def _distances(self) -> dict[str, float]:
        """Norm of the difference from the first peer, over all elements, by that of the peer."""
        others = [name for name in self.results if not name.startswith("opferry")]
        if not others or not isinstance(self.problem, Matmul | Attention):
            return {}
        want = self.results[others[0]].float()
        norm = want.norm()
        return {n: float((x.float() - want).norm() / norm) for n, x in self.results.items()}


def floor_seconds(problem: Problem, moved: int, rates: dict[str, float]) -> float:
    """What the operations or the bytes take at the measured ceilings, whichever is longer."""
    if isinstance(problem, Matmul):
        operations = {"int8": problem.operations}
    elif isinstance(problem, Longformer):
        operations = {"int8": problem.projections, "fp16": problem.work["fp32"]}
    else:
        operations = {problem.dtype: problem.operations}
    computing = sum(count / rates[kind] for kind, count in operations.items())
    return max(computing, moved / rates["copy"])


def _prove_all(entries: Iterable[Entry], folder, device, seed, culprits, tell) -> None:
    by_name = {mode.name: mode for mode in modes()}
    for entry in entries:
        tell(started=entry.name)
        if entry.error:
            verdict = {"ok": None, "note": entry.error.split("\n")[0]}
        elif entry.name in culprits:
            verdict = {"ok": False, "note": "crashed"}
        else:
            try:
                verdict = prove(by_name[entry.name], entry, folder, device, seed)
            except Exception as error:  # whatever a kernel or its launch raises
                on.synchronize(device)  # raises if the device is lost
                verdict = {"ok": False, "note": f"{type(error).__name__}: {error}"[:1000]}
        tell(mode=entry.name, **verdict)


def main() -> None:
    """Options: device, groups, done (names), culprits (names), seed, rounds, seconds."""
    folder, log, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    device, culprits = options["device"], set(options["culprits"])
    _, entries = read(folder)
    left = [e for e in entries if e.group in options["groups"] and e.problem not in options["done"]]
    problems = {p.label: p for table in (GROUPS, QUICK) for ps in table.values() for p in ps}

    with log.open("a") as file:

        def tell(**record: Any) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        try:
            proofs = [entry for entry in left if entry.group == "modes"]
            _prove_all(proofs, folder, device, options["seed"], culprits, tell)
            timed = [entry for entry in left if entry.group != "modes"]
            if not timed:
                return
            tell(started="ceilings")
            rates = on.ceilings(device)
            tell(ceilings=rates)
            for label, same in itertools.groupby(timed, lambda entry: entry.problem):
                with torch.inference_mode():
                    contest = Contest(problems[label], device, tell)
                    for entry in same:
                        contest.ours(entry, folder, culprits)
                    for peer in peers(problems[label], device):
                        contest.peer(peer, culprits)
                    record = {"times": {}, "notes": {"timing": "crashed"}}
                    if f"{label}, timing" not in culprits:
                        record = contest.run(rates, options["rounds"], options["seconds"])
                tell(problem=label, group=entry.group, **record)
        except RuntimeError as error:
            tell(fault=f"{error}".split("\n")[0][:300])
            sys.exit(FAULT)


if __name__ == "__main__":
    main()
