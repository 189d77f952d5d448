"""Arrays of the command line: .npy and .npz files in, the same out, each whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from ..runtime.errors import InvalidInputError
from ..runtime.manifest import Tensor


def read_inputs(given: Iterable[str], specs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Input name -> array, from ``NAME=FILE.npy`` and ``FILE.npz``.

    NumPy's files know no bfloat16: two-byte void becomes it where the module declares it. Raises
    ``InvalidInputError`` for files that are no arrays and for a name given twice, ``OSError`` for
    files that cannot be read.
    """
    declared = {spec.name: spec.dtype for spec in specs}
    arrays: dict[str, np.ndarray] = {}
    for entry in given:
        name, equals, path = entry.rpartition("=")
        found = _read(Path(path))
        if isinstance(found, np.ndarray):
            if not equals:
                raise InvalidInputError(
                    f"--input: found {entry!r}, a single array, allowed NAME={entry}"
                )
            found = {name: found}
        elif equals:
            raise InvalidInputError(
                f"--input: found {entry!r}, several arrays for one input, allowed {path}"
            )
        if twice := found.keys() & arrays.keys():
            raise InvalidInputError(f"--input: found {sorted(twice)} more than once, allowed once")
        arrays |= found
    for name, array in arrays.items():
        if declared.get(name) == "bfloat16" and array.dtype == np.dtype("V2"):
            arrays[name] = array.view(ml_dtypes.bfloat16)
    return arrays


def _read(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return dict(found.items())
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise InvalidInputError(
            f"--input: {path}: found no .npy or .npz array file: {error}"
        ) from error


def write_outputs(output: Path, results: Mapping[str, np.ndarray]) -> dict[str, Path]:
    """Write a ``.npz`` file, or one ``.npy`` per output into a folder; name -> file.

    A file appears whole or not at all. In a folder, characters of a name that are unsafe in file
    names become ``_``. Raises ``OSError`` when writing fails.
    """
    if output.suffix == ".npz":
        output.parent.mkdir(parents=True, exist_ok=True)
        _write(output, lambda file: np.savez(file, **results))
        return dict.fromkeys(results, output)
    output.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for name, array in results.items():
        path = output / f"{re.sub(r'[^0-9A-Za-z_.-]', '_', name)}.npy"
        while path in files.values():
            path = path.with_name(f"{path.stem}_.npy")
        _write(path, lambda file, array=array: np.save(file, array))
        files[name] = path
    return files


def _write(path: Path, write) -> None:
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with stage.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)
