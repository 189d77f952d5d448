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
    borrowed: Any = None
    """Arrays whose memory the library uses without holding them."""


def in_turn(candidates: Sequence[Candidate]) -> Candidate:
    """Candidates of one name with different weights, one after the other at each call."""
    calls = itertools.cycle([c.call for c in candidates])
    first = candidates[0]
    return Candidate(
        first.name, lambda: next(calls)(), first.result, [c.borrowed for c in candidates]
    )
