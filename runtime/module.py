"""A compiled module: called with arrays, saved as a folder, loaded where only TVM's runtime is."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import cpu, gpu
from . import threads as thread_pool
from .errors import (
    ArtifactError,
    InvalidInputError,
    InvalidInputTypeError,
    OpferryError,
)
from .manifest import NAME, Manifest, Tensor, sha256
from .quiet import without_noise

thread_pool.reserve()

import tvm  # noqa: E402  (the size of its thread pool is read from the environment)
from tvm.runtime import load_module, vm  # noqa: E402

LIBRARY = "module.so"

Array = np.ndarray | tvm.runtime.Tensor
"""An input: in host memory, or on the device."""


class Module:
    """A compiled model.

    ``run`` checks everything a kernel relies on before it starts one. Calls from several threads
    are serialised.
    """

    def __init__(
        self,
        manifest: Manifest,
        executable: Callable[[], Any],
        export: Callable[[Path], None],
        threads: int | None = None,
    ):
        """``executable`` is asked for at the first run: a module for another machine can be saved
        all the same.
        """
        self.manifest = manifest
        self.threads = thread_pool.default_threads() if threads is None else threads
        if not isinstance(self.threads, int) or self.threads < 1:
            raise OpferryError(f"threads: found {threads!r}, allowed a whole number of at least 1")
        self._executable = executable
        self._export = export
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self.manifest.outputs

    def run(
        self, inputs: Mapping[str, Any], *, device_outputs: bool = False
    ) -> dict[str, np.ndarray] | dict[str, tvm.runtime.Tensor]:
        """Compute the graph's outputs.

        ``inputs`` maps graph input names to anything with ``__dlpack__`` or ``__array__`` of the
        declared dtype (bfloat16 through ml_dtypes) and shape. A module for a GPU takes tensors that
        lie there (of torch, CuPy, ...) without a copy.

        Returns the outputs by name, in ONNX dtypes, as NumPy arrays; with ``device_outputs`` as
        they lie on the device, for any library's ``from_dlpack``, without waiting for the GPU. Work
        goes to the CUDA stream that TVM uses: the default one, or that of
        ``tvm_ffi.use_torch_stream``.

        Raises ``InvalidInputError`` (``InvalidInputTypeError`` for dtypes) before any kernel
        starts, for values computed inside the graph before the kernel that takes them;
        ``OpferryError`` when memory runs out; ``ArtifactError`` when there is no device for it.
        """
        arrays = self._arrays(inputs)
        dims = bind_dimensions(self.inputs, arrays)
        for check in self.manifest.checks:
            check.apply(dims, {name: _on_host(arrays[name]) for name in check.inputs.values()})
        with self._lock:
            thread_pool.use(self.threads)
            main = self._main
            # A result that is a view of an input must not be the caller's memory.
            share = not device_outputs
            tensors = [self._on_device(arrays[spec.name], share) for spec in self.inputs]
            try:
                result = main(*tensors)
            except (ValueError, AssertionError) as error:  # asserts of kernels and of the VM
                raise InvalidInputError(str(error)) from error
            except RuntimeError as error:  # of TVM's runtime: out of memory
                raise OpferryError(f"run: the call failed: {error}") from error
        results = [result] if len(self.outputs) == 1 else list(result)
        return {
            spec.name: value if device_outputs else value.numpy()
            for spec, value in zip(self.outputs, results)
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write library and manifest; ``folder`` appears whole or not at all, and replaces an older
        module.
        """
        target = Path(folder)
        if _occupied(target):
            raise ArtifactError(
                f"{target}: found something that is no saved module, allowed a new folder"
            )
        target = Path(os.path.realpath(target))  # a link stays and leads to the new module
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _staging(target) as stage:
                with without_noise():
                    self._export(stage / LIBRARY)
                manifest = replace(self.manifest, files={LIBRARY: sha256(stage / LIBRARY)})
                (stage / NAME).write_text(manifest.to_json(), encoding="utf-8")
                _sync(stage)
                _replace(stage, target)
        except OSError as error:
            raise ArtifactError(f"{target}: cannot be written: {error}") from error
        except (RuntimeError, ValueError) as error:  # TVM's, from the linker
            raise ArtifactError(
                f"{target}: the library cannot be linked for {self.manifest.architecture or 'it'} "
                f"on this {cpu.architecture()} machine: {error}"
            ) from error

    def __repr__(self) -> str:
        def show(tensors: tuple[Tensor, ...]) -> str:
            return ", ".join(
                f"{t.name}: {t.dtype}[{', '.join(map(str, t.shape))}]" for t in tensors
            )

        return f"<opferry.Module ({show(self.inputs)}) -> ({show(self.outputs)})>"

    @functools.cached_property
    def _main(self) -> Callable[..., Any]:
        self.manifest.require_this_machine("module")
        with without_noise():
            machine = vm.VirtualMachine(self._executable(), self._device)
        return machine["main"]

    @property
    def _device(self) -> tvm.runtime.Device:
        return tvm.cuda(gpu.INDEX) if self.manifest.on_gpu else tvm.cpu()

    def _on_device(self, array: Array, share: bool) -> tvm.runtime.Tensor:
        if not isinstance(array, np.ndarray):
            return array
        shared = _shared(array) if share and not self.manifest.on_gpu else None
        return tvm.runtime.tensor(array, self._device) if shared is None else shared

    def _arrays(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        names = [spec.name for spec in self.inputs]
        if not isinstance(inputs, Mapping):
            raise InvalidInputTypeError(
                f"inputs: found {type(inputs).__name__}, allowed a mapping of {names} to arrays"
            )
        missing = [name for name in names if name not in inputs]
        unknown = [str(name) for name in inputs if name not in names]
        if missing or unknown:
            found = f"missing {missing}" if missing else f"unknown {unknown}"
            raise InvalidInputError(f"inputs: found {found}, allowed exactly {names}")
        arrays: dict[str, Array] = {}
        for spec in self.inputs:
            there = _on_gpu(spec, inputs[spec.name]) if self.manifest.on_gpu else None
            arrays[spec.name] = as_array(spec, inputs[spec.name]) if there is None else there
        return arrays


def load(folder: str | os.PathLike[str], threads: int | None = None) -> Module:
    """A saved module, verified: complete, unchanged, built for instructions that this CPU has, or
    for its GPU.

    Raises ``ArtifactError`` otherwise. Needs TVM's runtime, not its compiler.
    """
    folder = Path(folder)
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder}: found no saved module: {error}") from error
    manifest = Manifest.from_json(text, folder / NAME)
    if manifest.files.keys() != {LIBRARY}:
        raise ArtifactError(
            f"{folder / NAME}: found files {sorted(manifest.files)}, allowed {LIBRARY}"
        )
    try:
        digest = sha256(folder / LIBRARY)
    except OSError as error:
        raise ArtifactError(f"{folder / LIBRARY}: cannot be read: {error}") from error
    if digest != manifest.files[LIBRARY]:
        raise ArtifactError(
            f"{folder / LIBRARY}: found other content than was saved (checksum differs)"
        )
    manifest.require_this_machine(folder)
    _require_same_tvm(manifest, folder)

    try:
        with without_noise():
            library = load_module(str(folder / LIBRARY))
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{folder / LIBRARY}: cannot be loaded: {error}") from error

    def export(path: Path) -> None:
        shutil.copyfile(folder / LIBRARY, path)
        if sha256(path) != manifest.files[LIBRARY]:
            raise ArtifactError(f"{folder / LIBRARY}: has changed since it was loaded")

    return Module(manifest, lambda: library, export, threads)


def versions() -> dict[str, str]:
    """What a compiled library is tied to."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:  # a bare runtime that was copied, not installed
            return "unknown"

    return {name: of(name) for name in ("opferry", "apache-tvm", "apache-tvm-ffi")}


def as_array(spec: Tensor, value: Any) -> np.ndarray:
    """``value`` as a C-contiguous array of the declared dtype and rank; never converts one dtype to
    another.
    """
    try:
        array = _to_numpy(value)
    except Exception as error:  # whatever the object's own protocol raises
        raise InvalidInputTypeError(
            f'input "{spec.name}": found {type(value).__name__}, allowed an array: {error}'
        ) from error
    _require_type(spec, array.dtype.name, array.shape)
    native = array.dtype.newbyteorder("=")
    return np.ascontiguousarray(array, native).reshape(array.shape)


def _on_gpu(spec: Tensor, value: Any) -> tvm.runtime.Tensor | None:
    """``value`` as it lies on the GPU, judged like `as_array`; None for what lies elsewhere."""
    try:
        tensor = gpu.as_tensor(value)
    except InvalidInputError as error:
        raise InvalidInputError(f'input "{spec.name}": {error}') from error
    except Exception as error:  # whatever the object's own protocol raises
        raise InvalidInputTypeError(
            f'input "{spec.name}": found {type(value).__name__}, allowed an array: {error}'
        ) from error
    if tensor is not None:
        _require_type(spec, str(tensor.dtype), tuple(tensor.shape))
    return tensor


_ALIGNMENT = 64
"""Bytes: where compiled code expects its arguments to begin, as all allocations of TVM do."""


def _shared(array: np.ndarray) -> tvm.runtime.Tensor | None:
    """The memory of ``array`` itself; None where it has to be copied: NumPy gives no read-only
    memory away, and no bfloat16.
    """
    if array.ctypes.data % _ALIGNMENT:
        return None
    try:
        tensor = tvm.runtime.from_dlpack(array)
    except (BufferError, TypeError, RuntimeError):
        return None
    return tensor if str(tensor.dtype) == array.dtype.name else None


def _require_type(spec: Tensor, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype != spec.dtype:
        raise InvalidInputTypeError(
            f'input "{spec.name}": found dtype {dtype}, allowed {spec.dtype}'
        )
    if len(shape) != len(spec.shape):
        raise InvalidInputError(
            f'input "{spec.name}": found shape {shape}, allowed {len(spec.shape)} dimensions '
            f"{_show(spec.shape)}"
        )


def _on_host(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.numpy()


def _to_numpy(value: Any) -> np.ndarray:
    if not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    try:
        return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError):  # NumPy's DLPack has no bfloat16
        return tvm.runtime.from_dlpack(value).numpy()


def bind_dimensions(specs: tuple[Tensor, ...], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Size of each symbolic dimension; ``InvalidInputError`` where sizes are fixed, zero or
    disagree.
    """
    dims: dict[str, int] = {}
    source: dict[str, str] = {}
    for spec in specs:
        shape = tuple(arrays[spec.name].shape)
        for axis, (size, declared) in enumerate(zip(shape, spec.shape)):
            where = f'input "{spec.name}"'
            if isinstance(declared, int):
                if size != declared:
                    raise InvalidInputError(
                        f"{where}: found shape {shape}, allowed {_show(spec.shape)}"
                    )
            elif size < 1:
                raise InvalidInputError(
                    f"{where}: found shape {shape}, allowed {_show(spec.shape)}, no size 0"
                )
            elif dims.setdefault(declared, size) != size:
                raise InvalidInputError(
                    f"{where}: found {declared} = {size} on axis {axis}, allowed {dims[declared]}, "
                    f"as in {source[declared]}"
                )
            else:
                source.setdefault(declared, where)
    return dims


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _require_same_tvm(manifest: Manifest, folder: Path) -> None:
    here = versions()
    for name in ("apache-tvm", "apache-tvm-ffi"):
        built = manifest.versions.get(name, "unknown")
        if "unknown" not in (built, here[name]) and built != here[name]:
            raise ArtifactError(f"{folder}: built with {name} {built}, installed is {here[name]}")


def _occupied(target: Path) -> bool:
    """Whether something that is neither a saved module nor an empty folder lies there."""
    try:
        if not target.is_dir():
            return target.exists() or target.is_symlink()
        return not (target / NAME).is_file() and any(target.iterdir())
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be looked into: {error}") from error


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new hidden folder beside ``target``, gone at the end unless it was moved away."""
    stage = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the files on disk before their folder gets its name, so that a power cut cannot empty
    them.
    """
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(stage: Path, target: Path) -> None:
    """Move ``stage`` to ``target``; a previous module is moved aside first and put back if the move
    fails.
    """
    old = None
    if target.exists():
        old = stage.with_name(stage.name + ".old")
        target.rename(old)
    try:
        stage.rename(target)
    except OSError:
        if old:
            old.rename(target)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)
