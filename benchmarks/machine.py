"""What the numbers of a report belong to."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from . import THREADS

_LIBRARIES = ("opferry", "apache-tvm", "numpy", "onnxruntime", "openvino", "torch", "transformers")
_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    cpu = _cpu()
    here = Path(__file__).parent
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "family": f"family {cpu.get('cpu family', '?')} model {cpu.get('model', '?')}",
        "instructions": [x for x in _INSTRUCTIONS if x in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git(here, "rev-parse", "--short", "HEAD"),
        "changed": bool(_git(here, "status", "--porcelain", "--untracked-files=no")),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _cpu() -> dict[str, str]:
    """Fields of the first processor, where the system has such a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
