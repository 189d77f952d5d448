"""Targets by short name, and what a target needs of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from tvm.target import Target, codegen

from ..runtime import cpu
from ..runtime.errors import OpferryError, UnsupportedError
from ..runtime.quiet import without_noise

TARGETS: dict[str, dict[str, Any]] = {
    "x86-64": {"kind": "llvm", "mcpu": "x86-64"},
    "x86-avx2": {"kind": "llvm", "mcpu": "haswell"},
    "x86-avxvnni": {"kind": "llvm", "mcpu": "alderlake"},
    "x86-avx512": {"kind": "llvm", "mcpu": "skylake-avx512"},
    "x86-avx512vnni": {"kind": "llvm", "mcpu": "cascadelake"},
    "x86-avx512bf16": {"kind": "llvm", "mcpu": "cooperlake"},
}
"""Short name -> TVM target; ``"llvm"`` is this host, detected."""


KINDS = ("llvm",)


def resolve(target: str | Mapping[str, Any] | Target) -> Target:
    """A TVM target from ``"llvm"`` (this host), a short name, or TVM's own dict, JSON or object.

    Raises ``OpferryError`` naming what is allowed.
    """
    if target == "llvm":
        return host()
    if isinstance(target, str) and target in TARGETS:
        return Target(TARGETS[target])
    try:
        with without_noise():
            resolved = (
                target
                if isinstance(target, Target)
                else Target(dict(target) if isinstance(target, Mapping) else target)
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise OpferryError(
            f"target: found {target!r}, allowed 'llvm', {sorted(TARGETS)}, "
            f"or a TVM target such as {{'kind': 'llvm', 'mcpu': 'znver4'}}: {error}"
        ) from error
    if resolved.kind.name not in KINDS:
        raise UnsupportedError(
            f"target: found kind {resolved.kind.name!r}, allowed {' or '.join(KINDS)}"
        )
    _check_llvm(resolved)
    return resolved


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
    """This machine. LLVM goes by the model of the CPU; what a hypervisor hides of it is switched
    off.
    """
    target = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    here = cpu.features()
    hidden = [] if here is None else [f for f in required_features(target) if f not in here]
    if not hidden:
        return target
    return Target({**dict(target.export()), "mattr": [f"-{feature}" for feature in hidden]})


def required_features(target: Target) -> tuple[str, ...]:
    """Instruction sets that the compiler may use for an LLVM target, in ``runtime.cpu``'s names."""
    if target.kind.name != "llvm":
        return ()
    features = {str(feature) for feature in codegen.llvm_get_cpu_features(target)}
    return tuple(sorted(features & cpu.LINUX_FLAGS.keys()))


def architecture(target: Target) -> str:
    """Machine name that a CPU target's library runs on."""
    if target.kind.name != "llvm":
        return cpu.architecture()
    return cpu.canonical_architecture(_triple(target).split("-")[0])


def _triple(target: Target) -> str:
    return str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())
