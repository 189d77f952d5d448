"""Machine code of GPU kernels, and how it gets into a saved library.

TVM writes CUDA C++ for the kernels of a module. Where TVM's CUDA runtime is loaded (a GPU and its
driver are there) it has `compile_source` make machine code of that at once; elsewhere TVM keeps the
source, which a machine that only runs modules could not compile. So the library is packed here: the
source in it is replaced by machine code, and loads wherever TVM's runtime and the driver are.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import tvm_ffi
from tvm.runtime import Module
from tvm.target import Target

from ..runtime.errors import OpferryError, UnsupportedError
from ..runtime.gpu import CUBIN

FATBIN = "fatbin"

_DEFINES = (
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
)
"""Half precision in the operators' own notation, which TVM's code uses."""

_CALLBACK = "tvm_callback_cuda_compile"
_SOURCE = "cuda"  # TVM's name for code that is still C++
_UNKNOWN_LAYOUT = "TVM packs CUDA modules in another layout than this version of opferry knows"
_callback = threading.Lock()


def require_compiler() -> None:
    """``UnsupportedError`` unless nvcc or NVRTC is there."""
    if nvcc() is None and not has_nvrtc():
        raise UnsupportedError(
            "target cuda: found neither nvcc nor NVRTC, allowed either: NVIDIA's CUDA toolkit with "
            "nvcc on PATH, or its headers and the package cuda-bindings"
        )


def nvcc() -> str | None:
    """Path of nvcc, from PATH."""
    return shutil.which("nvcc")


def has_nvrtc() -> bool:
    """Whether NVIDIA's run-time compiler and the headers it reads are there."""
    try:
        from cuda.bindings import nvrtc

        (error, *_) = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):  # no package, or no library behind it
        return False
    return error == nvrtc.nvrtcResult.NVRTC_SUCCESS and bool(_include_folders())


@functools.lru_cache(maxsize=32)
def compile_source(source: str, arch: str) -> tuple[str, bytes]:
    """Kernels in CUDA C++ -> format and machine code for ``arch`` (``sm_80``).

    nvcc's "fatbin" also carries PTX, which later GPUs translate when they load it (none for
    ``sm_90a``, whose instructions no other GPU has); NVRTC's "cubin" is for GPUs of this
    generation. Without fast-math: divisions, square roots and subnormals are IEEE's.
    """
    require_compiler()
    return form(), _by_nvcc(source, arch) if form() == FATBIN else _by_nvrtc(source, arch)


def form() -> str:
    """What `compile_source` makes here: nvcc goes before NVRTC."""
    return CUBIN if nvcc() is None else FATBIN


def _by_nvcc(source: str, arch: str, *options: str) -> bytes:
    number = arch.removeprefix("sm_")
    code = f"sm_{number}" if number.endswith("a") else f"[sm_{number},compute_{number}]"
    with tempfile.TemporaryDirectory(prefix="opferry-") as folder:
        kernels, result = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        kernels.write_text(source)
        command = [
            *(nvcc(), "--fatbin", "-O3", "-std=c++17"),
            *("-gencode", f"arch=compute_{number},code={code}"),
            *(*_DEFINES, *options, "-o", str(result), str(kernels)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise OpferryError(
                f"nvcc cannot compile the kernels for {arch}: {(done.stderr + done.stdout).strip()}"
            )
        return result.read_bytes()


def _by_nvrtc(source: str, arch: str) -> bytes:
    from cuda.bindings import nvrtc

    def checked(result: tuple, what: str):
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise OpferryError(f"NVRTC cannot {what} for {arch}: {result[0].name}")
        return result[1] if len(result) > 1 else None

    program = checked(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []), "take the kernels"
    )
    options = [
        f"--gpu-architecture={arch}",
        *("--std=c++17", "-default-device", "--device-int128", *_DEFINES),
        *(f"-I{folder}" for folder in _include_folders()),
    ]
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program), "tell its log"))
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.decode(errors="replace").rstrip("\0\n")
            raise OpferryError(f"NVRTC cannot compile the kernels for {arch}: {text}")
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program), "tell a size"))
        checked(nvrtc.nvrtcGetCUBIN(program, code), "give machine code")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _include_folders() -> list[Path]:
    """Folders with CUDA's headers: of a toolkit, or of NVIDIA's Python packages."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    with contextlib.suppress(ImportError):
        import nvidia

        roots += [root for folder in nvidia.__path__ for root in sorted(Path(folder).glob("cu*"))]
    for root in roots:
        include = root / "include"
        if (include / "cuda_fp16.h").is_file():
            return [include, *(p for p in (include / "cccl",) if p.is_dir())]
    return []


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Have TVM's CUDA runtime, where it is loaded, compile by `compile_source` as well."""
    with _callback:
        theirs = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
        arch = str(target.attrs["arch"])

        @tvm_ffi.register_global_func(_CALLBACK, override=True)
        def compile_cuda(source: str) -> bytes:
            return compile_source(source, arch)[1]

        try:
            yield
        finally:
            if theirs is not None:
                tvm_ffi.register_global_func(_CALLBACK, theirs, override=True)


def sources(module: Module) -> list[str]:
    """CUDA C++ of a built module's kernels."""
    found = [module.inspect_source("cuda")] if module.kind == "cuda" else []
    return found + [source for child in module.imports for source in sources(child)]


def compile_kernels(module: Module, target: Target) -> None:
    """Compile what `packer` will ask for, so that errors come now."""
    for source in sources(module):
        compile_source(source, str(target.attrs["arch"]))


def packer(target: Target) -> Callable[[Module, bool, str, str], str]:
    """``fpack_imports`` of TVM's ``export_library``: an object file with all imported modules, the
    kernels as machine code.
    """

    def pack(module: Module, system_lib: bool, prefix: str, folder: str) -> str:
        blob = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)
        data = embed(blob.numpy().tobytes(), sources(module), str(target.attrs["arch"]))
        write = tvm_ffi.get_global_func("codegen.codegen_blob")
        path = os.path.join(folder, f"{prefix}devc.o")
        write(data, system_lib, str(target.host), prefix).write_to_file(path)
        return path

    return pack


def embed(blob: bytes, sources: list[str], arch: str) -> bytes:
    """TVM's packed modules with machine code in place of each of ``sources``.

    The layout (all numbers 64 bits, little-endian): the length of the rest; two counted lists that
    say what imports what; then each module's kind and content, counted, or "_lib" alone. A CUDA
    module's content is its format, its functions, its code.
    """
    reader = _Reader(blob)
    if reader.number() != len(blob) - 8:
        raise OpferryError(_UNKNOWN_LAYOUT)
    for _ in range(2):
        reader.skip(8 * reader.number())
    packed = [blob[8 : reader.at]]
    while reader.at < len(blob):
        kind = reader.counted()
        packed.append(_counted(kind))
        if kind == b"_lib":
            continue
        content = reader.counted()
        if kind == b"cuda":
            content = _compiled(content, sources, arch)
        packed.append(_counted(content))
    rest = b"".join(packed)
    return struct.pack("<Q", len(rest)) + rest


def _compiled(content: bytes, sources: list[str], arch: str) -> bytes:
    """A CUDA module's content with its code compiled, if it is not yet."""
    head = _counted(_SOURCE.encode())
    if not content.startswith(head):
        return content
    for source in sources:
        tail = _counted(source.encode())
        if content.endswith(tail):
            form, code = compile_source(source, arch)
            functions = content[len(head) : len(content) - len(tail)]
            return _counted(form.encode()) + functions + _counted(code)
    raise OpferryError(_UNKNOWN_LAYOUT)


def _counted(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8
        return value

    def skip(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def counted(self) -> bytes:
        return self.skip(self.number())
