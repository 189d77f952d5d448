"""Comparing callables on a machine that is not ours alone.

A shared virtual machine disturbs a measurement in three ways, and none shows in a plain median:
the clock drifts, other processes take a core for a scheduler slice, and the host may run both
virtual cores on one physical core. So candidates take turns, a batch of calls each, in an order
that rotates; around every batch a gauge runs on all cores and the time that our threads waited for
a core is read. A batch is clean when the gauge found every core close to its best and the threads
hardly waited. Two candidates are compared turn by turn, where both met the same conditions; only
such ratios carry from one machine, or one minute, to another.

Candidates disturb each other too: the worker threads of a library look for new work for a while
after a call (TVM's and ONNX Runtime's for 35 ms, libgomp's for 6 ms). Nobody's turn begins before
the threads of the one before have gone to sleep.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .limits import Limit, Unavailable

Timed = Callable[[], float]
"""Runs the work once and returns the seconds it took."""


@dataclass(frozen=True)
class Plan:
    """How long to measure. The defaults suit cases of 0.1 ms to 1 s."""

    seconds: float = 1.0
    """Calls of one candidate, all together; never fewer than `turns` turns."""
    turns: int = 5
    extension: float = 2.0
    """Go on up to this many times `seconds` while fewer than `turns` turns were clean."""
    batch_seconds: float = 0.03
    batch_calls: int = 1000
    settle_seconds: float = 0.2
    """Wait at most so long for worker threads of the candidate before to stop spinning."""
    patience_seconds: float = 1.0
    """How long a candidate waits, in all its turns together, for a disturbance to pass."""


class Turn(NamedTuple):
    """One batch of a candidate."""

    round: int
    """Turns of the same round were next to each other."""
    seconds: tuple[float, ...]
    clean: bool


@dataclass
class Series:
    """All turns of a candidate."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether there were enough clean turns for `calls` to be of these alone."""
        return sum(t.clean for t in self.turns) >= 2

    @property
    def calls(self) -> list[float]:
        """Seconds of each call: of the clean turns, or of all where those are too few."""
        return sorted(s for t in self.turns if t.clean or not self.clean for s in t.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def fastest(self) -> float:
        return min(s for t in self.turns for s in t.seconds)

    def summary(self) -> dict[str, object]:
        """For a report, in seconds."""
        calls = self.calls
        return {
            "median_s": statistics.median(calls),
            "min_s": self.fastest,
            "p10_s": quantile(calls, 0.1),
            "p90_s": quantile(calls, 0.9),
            "calls": len(calls),
            "turns": len(self.turns),
            "clean_turns": sum(t.clean for t in self.turns),
            "clean": self.clean,
        }


class Ratio(NamedTuple):
    """How many times faster one candidate is than another."""

    median: float
    p25: float
    p75: float
    rounds: int
    clean: bool

    def scaled(self, factor: float) -> Ratio:
        return Ratio(
            self.median * factor, self.p25 * factor, self.p75 * factor, self.rounds, self.clean
        )


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the neighbours in an ascending sequence."""
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def speedup(of: Series, over: Series) -> Ratio:
    """How many times faster `of` is than `over`.

    Each round in which both were clean gives the ratio of their batches' medians. Where there are
    fewer than two such rounds, all rounds give the ratio of their batches' fastest calls, which
    disturbances spare longest.
    """
    theirs = {turn.round: turn for turn in over.turns}
    pairs = [(mine, theirs[mine.round]) for mine in of.turns if mine.round in theirs]
    clean = [(a, b) for a, b in pairs if a.clean and b.clean]
    settled = len(clean) >= 2
    typical = statistics.median if settled else min
    ratios = sorted(
        typical(b.seconds) / typical(a.seconds) for a, b in (clean if settled else pairs)
    )
    return Ratio(
        statistics.median(ratios),
        quantile(ratios, 0.25),
        quantile(ratios, 0.75),
        len(ratios),
        settled,
    )


def weighted_sum(parts: Sequence[tuple[Series, float]]) -> Series:
    """What the parts would take one after the other, each so many times.

    A turn for each round in which all parts ran: the sums of the fastest, the median and the
    slowest calls.
    """
    by_round = [({turn.round: turn for turn in series.turns}, times) for series, times in parts]

    def added(round_: int, pick: Callable[[Sequence[float]], float]) -> float:
        return sum(pick(turns[round_].seconds) * times for turns, times in by_round)

    return Series(
        [
            Turn(
                round_,
                (added(round_, min), added(round_, statistics.median), added(round_, max)),
                all(turns[round_].clean for turns, _ in by_round),
            )
            for round_ in sorted(set.intersection(*(set(turns) for turns, _ in by_round)))
        ]
    )


def stopwatch(call: Callable[[], object]) -> Timed:
    """`call` with a clock around it."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


class Gauge:
    """Tells whether all cores are ours at their usual speed.

    Runs a short arithmetic kernel on every core and compares the slowest one with the best rate
    seen. The best decays slowly, so that a boost in the first second does not condemn the rest.
    """

    THRESHOLD = 0.85
    DECAY = 0.9995
    SECONDS = 0.0008

    def __init__(self):
        self._best = 0.0
        try:
            self._limit: Limit | None = Limit("fp32", seconds=self.SECONDS)
        except Unavailable:  # nothing to judge with: every batch passes
            self._limit = None
        for _ in range(10):
            self()

    def __call__(self) -> bool:
        if self._limit is None:
            return True
        self._limit()
        rates = self._limit.thread_rates
        self._best = max(self._best * self.DECAY, *rates)
        return min(rates) >= self.THRESHOLD * self._best


def seconds_waited() -> float:
    """Time that the threads of this process were ready to run and had no core, since it began."""
    nanoseconds = 0
    for record in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(record.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or no such statistics
            continue
    return nanoseconds * 1e-9


WAITED_ALLOWED = 0.02
"""Share of a batch that our threads may have waited in a clean one."""

SLOW_SECONDS = 1.0
"""Of what takes longer, every call counts."""

PAUSE_SECONDS = 0.03
"""Between two looks whether a disturbance has passed."""


def settle(most: float) -> None:
    """Sleep until the threads of this process do nothing, `most` seconds at the longest."""
    step, idle = 0.002, 0.1
    end = time.monotonic() + most
    while time.monotonic() < end:
        used, start = time.process_time(), time.monotonic()
        time.sleep(step)
        if time.process_time() - used < idle * (time.monotonic() - start):
            return


def interleave(
    candidates: Mapping[str, Timed],
    plan: Plan = Plan(),
    gauge: Callable[[], bool] | None = None,
) -> dict[str, Series]:
    """Measure the candidates in turns; one `Series` for each."""
    if gauge is None:
        gauge = Gauge()
    series = {name: Series() for name in candidates}
    estimate = {}
    for name, timed in candidates.items():
        estimate[name] = timed()
        if estimate[name] < SLOW_SECONDS:  # the first call may still build something
            estimate[name] = timed()
    spent = dict.fromkeys(candidates, 0.0)
    patience = dict.fromkeys(candidates, plan.patience_seconds)
    unfinished = list(candidates)
    round_ = 0
    while unfinished:
        first = round_ % len(unfinished)
        for name in unfinished[first:] + unfinished[:first]:
            calls = min(max(1, int(plan.batch_seconds / estimate[name])), plan.batch_calls)
            turn, patience[name] = _batch(
                candidates[name], round_, calls, plan, gauge, patience[name]
            )
            series[name].turns.append(turn)
            spent[name] += sum(turn.seconds)
            estimate[name] = min(estimate[name], statistics.median(turn.seconds))
        round_ += 1
        unfinished = [n for n in unfinished if not _enough(series[n], spent[n], plan)]
    return series


def _enough(series: Series, spent: float, plan: Plan) -> bool:
    if len(series.turns) < plan.turns or spent < plan.seconds:
        # A slow candidate is done after few turns, as long as there are two to take a ratio of.
        return spent > plan.seconds * plan.extension and len(series.turns) >= 2
    clean = sum(turn.clean for turn in series.turns)
    return clean >= plan.turns or spent >= plan.seconds * plan.extension


def _batch(
    timed: Timed,
    round_: int,
    calls: int,
    plan: Plan,
    gauge: Callable[[], bool],
    patience: float,
) -> tuple[Turn, float]:
    """One turn, and what is left of the patience."""
    settle(plan.settle_seconds)
    quiet = gauge()
    while not quiet and patience > 0:
        time.sleep(PAUSE_SECONDS)
        patience -= PAUSE_SECONDS
        quiet = gauge()
    if calls > 1:
        timed()  # wakes the candidate's own threads, brings its data to the caches
    before = seconds_waited()
    seconds = tuple(timed() for _ in range(calls))
    waited = seconds_waited() - before
    settle(plan.settle_seconds)
    quiet = gauge() and quiet
    # A limit's time is that on its cores.
    alone = isinstance(timed, Limit) or waited <= WAITED_ALLOWED * sum(seconds)
    return Turn(round_, seconds, quiet and alone), patience
