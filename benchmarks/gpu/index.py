"""What `build` leaves for `run`: one entry for each module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX = "index.json"


@dataclass(frozen=True)
class Entry:
    """A module, or why there is none."""

    group: str
    name: str
    problem: str
    """Label of the problem, for several configurations the same; of a mode its name."""
    config: str
    folder: str
    stored: str
    """`stored_digest` of a mode's inputs."""
    error: str
    seconds: float


def read(folder: Path) -> tuple[str, list[Entry]]:
    """Target and entries of a folder."""
    record = json.loads((folder / INDEX).read_text())
    return record["target"], [Entry(**entry) for entry in record["entries"]]


def stored_digest(feeds: Mapping[str, np.ndarray], constant: Iterable[str]) -> str:
    """SHA-256 of the inputs that are stored in the model: another NumPy may draw other numbers."""
    digest = hashlib.sha256()
    for name in constant:
        digest.update(np.ascontiguousarray(feeds[name]).tobytes())
    return digest.hexdigest()
