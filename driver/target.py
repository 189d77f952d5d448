"""Targets by short name, and what a target needs of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from tvm.target import Target, codegen

from ..runtime import cpu, gpu
from ..runtime.errors import OpferryError, UnsupportedError
from ..runtime.quiet import without_noise
from ..schedules.cuda import arch

TARGETS: dict[str, dict[str, Any]] = {
    "x86-64": {"kind": "llvm", "mcpu": "x86-64"},
    "x86-avx2": {"kind": "llvm", "mcpu": "haswell"},
    "x86-avxvnni": {"kind": "llvm", "mcpu": "alderlake"},
    "x86-avx512": {"kind": "llvm", "mcpu": "skylake-avx512"},
    "x86-avx512vnni": {"kind": "llvm", "mcpu": "cascadelake"},
    "x86-avx512bf16": {"kind": "llvm", "mcpu": "cooperlake"},
    "x86-amx": {"kind": "llvm", "mcpu": "sapphirerapids"},
}
"""Short name -> TVM target of a CPU; ``"llvm"`` is this host, detected."""

CUDA_TARGETS: dict[str, dict[str, Any]] = {
    f"cuda-{name}": {"kind": "cuda", "arch": name} for name in arch.ARCHS
}
"""Short name -> TVM target of an NVIDIA GPU; ``"cuda"`` is the one in this machine, detected."""

KINDS = ("llvm", "cuda")


def resolve(target: str | Mapping[str, Any] | Target) -> Target:
    """A TVM target from ``"llvm"`` (this host), ``"cuda"`` (the GPU of this machine, or
    `arch.DEFAULT` without one), a short name, or TVM's own dict, JSON or object.

    Raises ``OpferryError`` naming what is allowed.
    """
    if target == "llvm":
        return host()
    if target == "cuda":
        return _with_gpu_facts({"kind": "cuda", "arch": local_arch()})
    if isinstance(target, str) and target in CUDA_TARGETS:
        return _with_gpu_facts(CUDA_TARGETS[target])
    if isinstance(target, str) and target.startswith("cuda-"):
        _refuse_arch(target.removeprefix("cuda-"))
    if isinstance(target, str) and target in TARGETS:
        return Target(TARGETS[target])
    if isinstance(target, Mapping) and target.get("kind") == "cuda":
        return _cuda(target)
    try:
        with without_noise():
            resolved = (
                target
                if isinstance(target, Target)
                else Target(dict(target) if isinstance(target, Mapping) else target)
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise OpferryError(
            f"target: found {target!r}, allowed 'llvm', 'cuda', "
            f"{sorted(TARGETS | CUDA_TARGETS)}, "
            f"or a TVM target such as {{'kind': 'llvm', 'mcpu': 'znver4'}}: {error}"
        ) from error
    if resolved.kind.name not in KINDS:
        raise UnsupportedError(
            f"target: found kind {resolved.kind.name!r}, allowed {' or '.join(KINDS)}"
        )
    if resolved.kind.name == "cuda":
        return _cuda(resolved.export())
    _check_llvm(resolved)
    return resolved


def _cuda(record: Mapping[str, Any]) -> Target:
    """TVM's own record of a GPU target, checked and completed."""
    name = str(record.get("arch") or local_arch())
    if name not in arch.ARCHS:
        _refuse_arch(name)
    try:
        target = _with_gpu_facts({**record, "arch": name})
    except (ValueError, TypeError, RuntimeError) as error:
        raise OpferryError(f"target: found {dict(record)}, not allowed by TVM: {error}") from error
    if target.host.kind.name != "llvm":
        raise UnsupportedError(f"target: found host {target.host.kind.name!r}, allowed llvm")
    _check_llvm(target.host)
    return target


def _with_gpu_facts(record: Mapping[str, Any]) -> Target:
    """With the limits that TVM's schedule rules ask for, and the host that launches the kernels."""
    return Target(
        {
            "max_threads_per_block": arch.BLOCK_THREADS,
            "max_shared_memory_per_block": arch.STATIC_SHARED_BYTES,
            "host": _launcher(),
            **record,
        }
    )


def _launcher() -> dict[str, Any]:
    """Any CPU of this machine's architecture: it checks arguments and launches kernels."""
    return TARGETS["x86-64"] if cpu.architecture() == "x86_64" else {"kind": "llvm"}


def local_arch() -> str:
    """Architecture to compile for on this machine: the newest that its GPU runs, or the default.

    Never a specific one: kernels for those are chosen by name until they have been measured.
    """
    capability = gpu.capability()
    if capability is None:
        return arch.DEFAULT
    runs = [
        name
        for name, record in arch.ARCHS.items()
        if record.capability <= capability and not record.specific
    ]
    if not runs:
        _refuse_arch("sm_{}{}".format(*capability))
    return runs[-1]


def _refuse_arch(name: str) -> NoReturn:
    raise UnsupportedError(
        f"target: found CUDA architecture {name!r}, allowed {', '.join(arch.ARCHS)}"
    )


def _check_llvm(target: Target) -> None:
    """Refuse what LLVM would crash on, or ignore with a warning of its own."""
    triple, attrs = _triple(target), target.attrs

    def refuse(name: str, found: object) -> NoReturn:
        raise OpferryError(f"target: found {name} {found!r}, allowed what LLVM knows")

    with without_noise():
        if not codegen.llvm_is_valid_cpu("generic", triple):  # every architecture has it
            refuse("mtriple", triple)
        mcpu = attrs.get("mcpu")
        if mcpu is not None and not codegen.llvm_is_valid_cpu(mcpu, triple):
            refuse("mcpu", str(mcpu))
        names = [str(feature) for feature in attrs.get("mattr") or ()]
        probe = {**target.export(), "mattr": [f"+{name[1:]}" for name in names]}
        try:
            known = {str(feature) for feature in codegen.llvm_get_cpu_features(Target(probe))}
        except RuntimeError as error:  # an option with a value that LLVM does not have
            raise OpferryError(f"target: found {target}, not allowed by LLVM: {error}") from error
        for name in names:
            if name[:1] not in ("+", "-") or name[1:] not in known:
                refuse("mattr", name)


def host() -> Target:
    """This machine. LLVM goes by the model number of the CPU, which a hypervisor may make up: what
    the CPU lacks of that model is switched off, what it has beyond it switched on.
    """
    target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    here = cpu.features()
    if here is None:
        return target
    model = set(required_features(target))
    switches = [f"-{name}" for name in sorted(model - here)]
    switches += [f"+{name}" for name in sorted(here - model)]
    return Target({**dict(target.export()), "mattr": switches}) if switches else target


def required_features(target: Target) -> tuple[str, ...]:
    """Instruction sets that the compiler may use on the CPU, in ``runtime.cpu``'s names."""
    target = cpu_part(target)
    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return tuple(sorted(features & cpu.LINUX_FLAGS.keys()))


def architecture(target: Target) -> str:
    """Machine name that a target's library runs on."""
    return cpu.canonical_architecture(_triple(cpu_part(target)).split("-")[0])


def cpu_part(target: Target) -> Target:
    """The target itself, or the host of a GPU."""
    return target if target.kind.name == "llvm" else target.host


def _triple(target: Target) -> str:
    return str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())
