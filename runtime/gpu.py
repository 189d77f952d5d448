"""The GPU that a module runs on: what there is, and whether it will do."""

from __future__ import annotations

from typing import Any

from .errors import ArtifactError, InvalidInputError

INDEX = 0
"""The device that modules run on; ``CUDA_VISIBLE_DEVICES`` says which one that is."""
CUDA = 2  # DLPack's kDLCUDA
CUBIN = "cubin"
"""Machine code for one generation of GPUs; a "fatbin" also has PTX for later ones."""
ALIGNMENT = 16
"""Bytes; kernels read vectors of so many."""


def capability() -> tuple[int, int] | None:
    """Compute capability of the first NVIDIA GPU; None without one, or without its driver."""
    import tvm

    device = tvm.cuda(INDEX)
    if not device.exist:
        return None
    major, minor = device.compute_version.split(".")[:2]
    return int(major), int(minor)


def require(target: dict[str, Any], code: str, where: object) -> None:
    """``ArtifactError`` naming ``where`` unless this machine can run kernels of ``target``, the
    record of a CUDA target, whose machine code is a "fatbin" or a "cubin".
    """
    import tvm_ffi

    name = str(target["arch"])
    specific = name.endswith("a")
    major, minor = divmod(int(name.removeprefix("sm_").removesuffix("a")), 10)
    needed = f"one of compute capability {major}.{minor} or higher"
    if specific:
        needed = f"one of compute capability {major}.{minor}"
    elif code == CUBIN:
        needed = f"one of compute capability {major}.{minor} to {major}.9"
    here = None
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        found = "no CUDA device (NVIDIA's driver or TVM's CUDA runtime is missing)"
    elif (here := capability()) is None:
        found = "no CUDA device"
    else:
        found = "a CUDA device of compute capability {}.{}".format(*here)
    if specific:
        runs = here == (major, minor)
    else:
        runs = here is not None and here >= (major, minor)
        runs = runs and (code != CUBIN or here[0] == major)
    if not runs:
        raise ArtifactError(f"{where}: built for {name}, found {found}, allowed {needed}")


def as_tensor(value: Any) -> Any | None:
    """A tensor in the memory of a GPU as TVM's, without a copy, or None if ``value`` is none.

    Raises ``InvalidInputError`` for one of another GPU than `INDEX`, or with gaps between elements.
    """
    import tvm

    if not hasattr(value, "__dlpack_device__"):
        return None
    kind, index = value.__dlpack_device__()
    if int(kind) != CUDA:
        return None
    if int(index) != INDEX:
        raise InvalidInputError(f"found it on CUDA device {index}, allowed device {INDEX}")
    tensor = tvm.runtime.from_dlpack(value)
    if not tensor.is_contiguous():
        raise InvalidInputError("found gaps between its elements, allowed a contiguous tensor")
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else _moved(tensor)


def _moved(tensor: Any) -> Any:
    """A copy that starts where a vector access may: a view into a larger tensor need not."""
    import tvm

    copy = tvm.runtime.empty(tensor.shape, tensor.dtype, tensor.device)
    tensor.copyto(copy)
    return copy
