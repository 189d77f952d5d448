"""What a user would run instead of our operators: one file per library.

Each file has `candidates(problem)`: name -> builder of a `Candidate` that does the same work, with
constants packed ahead and inputs and outputs in place as far as the library allows. Libraries that
have no signed int8 product at full speed get activations shifted to unsigned, ahead of time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from ..candidate import Candidate, in_turn
from ..shapes import Problem

LIBRARIES = ("onnxruntime", "openvino", "torch", "transformers")

Builders = dict[str, Callable[[], Candidate]]


def candidates(problem: Problem) -> tuple[Builders, dict[str, str]]:
    """Builders by name, and why a library has none."""
    builders, missing = {}, {}
    for library in LIBRARIES:
        try:
            peer = importlib.import_module(f".{library}", __package__)
        except ImportError as error:
            missing[library] = str(error)
            continue
        if problem.copies > 1:
            builders |= _in_turn(peer, problem)
        else:
            builders |= peer.candidates(problem)
    return builders, missing


def _in_turn(peer, problem: Problem) -> Builders:
    """Each candidate with several weights, or inputs, in turn."""

    def build(name: str) -> Candidate:
        return in_turn([peer.candidates(problem, seed)[name]() for seed in range(problem.copies)])

    return {name: functools.partial(build, name) for name in peer.candidates(problem)}
