"""The manifest beside a saved library: what a caller needs to know and what a machine must have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cpu, gpu
from .checks import Check
from .errors import ArtifactError

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Tensor:
    """An input or output. A dimension is a size, the name of a symbolic one, or an expression of
    such names.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """Signature, requirements and provenance of a compiled module."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    target: dict[str, Any]
    architecture: str
    cpu_features: tuple[str, ...]
    operators: tuple[str, ...]
    versions: dict[str, str]
    checks: tuple[Check, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    """File name -> SHA-256, of a saved module."""
    device_code: str = ""
    """Form of a GPU's machine code, "fatbin" or "cubin"; empty for a CPU."""

    @property
    def on_gpu(self) -> bool:
        return self.target.get("kind") == "cuda"

    def to_json(self) -> str:
        data = {"format": FORMAT, **asdict(self)}
        return json.dumps({**data, "checksum": _checksum(data)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """``ArtifactError`` naming ``where`` when the text is not an unchanged manifest of this
        format.
        """
        try:
            data = json.loads(text)
            found = data.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{where}: found no manifest: {error}") from error
        if found != FORMAT:
            raise ArtifactError(f"{where}: found format {found}, allowed {FORMAT}")
        if data.pop("checksum", None) != _checksum({"format": found, **data}):
            raise ArtifactError(f"{where}: found other content than was saved (checksum differs)")
        try:
            return cls(
                inputs=tuple(_tensor(entry) for entry in data.pop("inputs")),
                outputs=tuple(_tensor(entry) for entry in data.pop("outputs")),
                checks=tuple(Check.from_json(entry) for entry in data.pop("checks")),
                cpu_features=tuple(data.pop("cpu_features")),
                operators=tuple(data.pop("operators")),
                **data,
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{where}: found a manifest of another version of opferry: {error}"
            ) from error

    def require_this_machine(self, where: Path | str) -> None:
        """``ArtifactError`` if this CPU lacks the architecture or an instruction set the library
        uses, or there is no GPU that runs its kernels.
        """
        if self.architecture and self.architecture != cpu.architecture():
            raise ArtifactError(
                f"{where}: built for {self.architecture}, this machine is {cpu.architecture()}"
            )
        here = cpu.features()
        missing = [] if here is None else [f for f in self.cpu_features if f not in here]
        if missing:
            raise ArtifactError(
                f"{where}: built for {self.target.get('mcpu', 'another CPU')}, "
                f"this CPU lacks {', '.join(missing)}; compile for a target that it has"
            )
        if self.on_gpu:
            gpu.require(self.target, self.device_code, where)


def _checksum(data: dict[str, Any]) -> str:
    """SHA-256 of the manifest itself, whatever the order and layout of its text."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _tensor(entry: dict[str, Any]) -> Tensor:
    return Tensor(entry["name"], entry["dtype"], tuple(entry["shape"]))
