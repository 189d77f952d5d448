"""One way of doing a problem's work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Candidate:
    """A library, or ourselves, ready to run: model built, weights packed, inputs in place."""

    name: str
    call: Callable[[], Any]
    """Does the work once."""
    result: Callable[[], Any]
    """Does the work once and returns its result as `check` wants it."""


def in_turn(candidates: Sequence[Candidate]) -> Candidate:
    """Candidates of one name with different weights, one after the other at each call."""
    calls = itertools.cycle([c.call for c in candidates])
    return Candidate(candidates[0].name, lambda: next(calls)(), candidates[0].result)
