"""The GPU that a module runs on: what there is, and whether it will do."""

from __future__ import annotations

from typing import Any

from .errors import ArtifactError

INDEX = 0
"""The device that modules run on; ``CUDA_VISIBLE_DEVICES`` says which one that is."""


def capability() -> tuple[int, int] | None:
    """Compute capability of the first NVIDIA GPU; None without one, or without its driver."""
    import tvm

    device = tvm.cuda(INDEX)
    if not device.exist:
        return None
    major, minor = device.compute_version.split(".")[:2]
    return int(major), int(minor)


def require(target: dict[str, Any], where: object) -> None:
    """``ArtifactError`` naming ``where`` unless this machine can run kernels built for ``target``,
    the record of a CUDA target.
    """
    import tvm_ffi

    name = str(target["arch"])
    built = int(name.removeprefix("sm_"))
    needed = f"one of compute capability {built // 10}.{built % 10} or higher"
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        raise ArtifactError(
            f"{where}: found no CUDA device (neither NVIDIA's driver nor TVM's CUDA runtime is "
            f"there), allowed {needed}"
        )
    here = capability()
    if here is None:
        raise ArtifactError(f"{where}: found no CUDA device, allowed {needed}")
    if here[0] * 10 + here[1] < built:
        raise ArtifactError(
            f"{where}: built for {name}, found a CUDA device of compute capability "
            f"{here[0]}.{here[1]}, allowed {needed}"
        )
