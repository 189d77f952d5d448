"""Arrays on the device, and the time that work on it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch
import tvm

from opferry.runtime.module import Module

from ..shapes import Problem

_SHARED = ("hidden", "forced", "flags")
"""Masks, the same in all sets."""
CACHE_BYTES = 256 << 20
"""Inputs of several sets together: several times any second-level cache."""
MOST_SETS = 64

_WAIT = 1.5
"""The device sleeps so much longer than the host needs to start a batch: gaps between launches are
no part of the time.
"""
_CYCLES_PER_SECOND = 2e9

_TURNS = 6
"""Calls after which all memory that outputs get has been seen."""

Work = Callable[[], object]


def tensor(x: np.ndarray, device: str) -> torch.Tensor:
    """A copy on the device."""
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).to(device, copy=True).view(torch.bfloat16)
    return torch.from_numpy(x).to(device, copy=True)


def array(x: torch.Tensor) -> np.ndarray:
    """A copy in host memory."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def input_sets(problem: Problem, device: str) -> list[SimpleNamespace]:
    """Arrays of a problem on the device; further sets, in other memory, hold the same numbers in
    other places, so that no set is left in a cache by the time its turn comes again. Masks are
    shared.
    """
    from ..inputs import inputs

    first = {n: tensor(x, device) for n, x in vars(inputs(problem)).items() if _is_array(x)}
    moving = {
        n for n, x in first.items() if x.numel() > 1 and n not in ("hidden", "forced", "flags")
    }
    moved = sum(first[n].nbytes for n in moving)
    count = 1 if device == "cpu" else min(max(2, -(-CACHE_BYTES // moved)), MOST_SETS)
    sets = [SimpleNamespace(**first)]
    for number in range(1, count):
        rolled = {n: first[n].flatten().roll(977 * number).view(first[n].shape) for n in moving}
        sets.append(SimpleNamespace(**(first | rolled)))
    return sets


def _is_array(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.ndim > 0


def bound(module: Module, feeds: Mapping[str, torch.Tensor]) -> Work:
    """The compiled function with tensors in place: what `Module.run` calls after its checks."""
    main = module._main
    tensors = [tvm.runtime.from_dlpack(feeds[spec.name].contiguous()) for spec in module.inputs]
    return lambda: main(*tensors)


def outputs(module: Module, result: object) -> dict[str, torch.Tensor]:
    """What `bound` returns, by name, as torch's tensors of the same memory."""
    found = [result] if len(module.outputs) == 1 else list(result)
    return {spec.name: torch.from_dlpack(x) for spec, x in zip(module.outputs, found)}


def poison(module: Module, work: Work) -> set[int]:
    """Fill the memory that the next call's outputs will get: NaN, or a pattern in integers. Returns
    where it lies. The machine keeps a few buffers, which take turns.
    """
    places = set()
    for _ in range(_TURNS):
        for x in outputs(module, work()).values():
            places.add(x.data_ptr())
            x.fill_(float("nan") if x.is_floating_point() else 0x55)
    return places


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(
    candidates: Mapping[str, Sequence[Work]], device: str, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Seconds of one call: median, smallest and 90th percentile of the rounds, candidates in turn.

    A candidate is a sequence of calls that do the same work on other memory. Every batch is at
    least about 2 ms long; ``seconds`` bounds the whole.
    """
    plan = {name: _batch(works, device) for name, works in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    at = dict.fromkeys(candidates, 0)
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        for name, works in candidates.items():
            count, pause = plan[name]
            calls = [works[(at[name] + i) % len(works)] for i in range(count)]
            at[name] += count
            samples[name].append(_elapsed(calls, device, pause) / count)
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "p90": sorted(values)[int(0.9 * (len(values) - 1))],
            "rounds": len(values),
        }
        for name, values in samples.items()
    }


def _batch(works: Sequence[Work], device: str) -> tuple[int, float]:
    """Calls of a batch and how long the device waits for the host to start them."""
    for work in (*works[:2], works[0]):
        work()
    synchronize(device)
    start = time.perf_counter()
    for i in range(3):
        works[i % len(works)]()
    host = (time.perf_counter() - start) / 3
    synchronize(device)
    one = _elapsed([works[0]], device, host * _WAIT)
    count = max(1, min(50, round(2e-3 / max(one, 1e-6))))
    return count, min(host * count * _WAIT, 0.05)


def _elapsed(calls: Sequence[Work], device: str, pause: float) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
    first.record()
    for call in calls:
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3


def ceilings(device: str) -> dict[str, float]:
    """Rates of this machine: bytes a second of a large copy, read and written, and operations a
    second of large matrix products on random data.
    """
    size, edge, rounds = (1 << 30, 8192, 15) if device == "cuda" else (1 << 24, 256, 3)
    source = torch.randint(0, 127, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (
        torch.randint(-127, 127, (edge, edge), dtype=torch.int8, device=device) for _ in range(2)
    )
    works: dict[str, list[Work]] = {
        "copy": [lambda: target.copy_(source)],
        "int8": [lambda: torch._int_mm(a, b.t())],
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        x, y = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        works[name] = [lambda x=x, y=y: x @ y.t()]
    times = medians(works, device, rounds, 5)
    amount = dict.fromkeys(works, 2.0 * edge**3) | {"copy": 2.0 * size}
    return {name: amount[name] / times[name]["median"] for name in works}
