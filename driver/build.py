"""From an ONNX model to a compiled module: one flat list of passes in phases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import tvm
from tvm import relax
from tvm.ir import Expr, IRModule
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.target import Target
from tvm.tirx import PrimFunc

from ..frontend.importer import Imported, import_model
from ..frontend.model import Shapes, load, prepare
from ..runtime.errors import OpferryError, UnsupportedError
from ..runtime.manifest import Manifest, Tensor
from ..runtime.module import Module, versions
from ..runtime.quiet import without_noise
from ..schedules.apply import ApplySchedules
from . import device_code
from . import target as targets
from .fuse_rows import FuseRows
from .inline_scalars import InlineScalars
from .stack import code_generation
from .views import ViewOutputs

Progress = Callable[[str], None]
"""Told the name of each step before it starts."""


def compile(
    model: str | os.PathLike[str] | onnx.ModelProto,
    target: str | Mapping[str, Any] | Target = "llvm",
    shapes: Shapes | None = None,
    *,
    threads: int | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress = lambda step: None,
) -> Module:
    """Compile an ONNX model for ``target``.

    Args:
        model: a path (external data beside it) or a ModelProto.
        target: ``"llvm"`` (this host), ``"cuda"`` (this machine's GPU), a short name of
            ``driver.target.TARGETS`` or ``CUDA_TARGETS``, or a TVM target.
        shapes: sizes of symbolic dimensions, by dimension name or by input; the rest stay symbolic.
        threads: how many a call uses; default ``OPFERRY_NUM_THREADS`` or the cores this process
            may use.
        dump_ir: a folder that receives the module after each phase, as TVMScript.
        progress: called with the name of each step.

    Raises:
        OpferryError: the model, a node of it, the target or the shapes are not valid or not
            supported; a CUDA target has no compiler here.
    """
    resolved = targets.resolve(target)
    progress("load")
    return compile_prepared(
        prepare(load(model), shapes), resolved, threads=threads, dump_ir=dump_ir, progress=progress
    )


def compile_prepared(
    model: onnx.ModelProto,
    target: Target,
    *,
    threads: int | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress = lambda step: None,
) -> Module:
    """``compile`` for a model that went through ``frontend.model.prepare``."""
    cuda = target.kind.name == "cuda"
    if cuda:
        device_code.require_compiler()
    progress("import")
    with without_noise():
        imported = import_model(model, target)
    with device_code.compiling_for(target) if cuda else nullcontext():
        executable = generate(imported, target, dump_ir, progress)
    options = {}
    if cuda:
        progress("compile kernels")
        device_code.compile_kernels(executable.mod, target)
        options["fpack_imports"] = device_code.packer(target)

    def export(path: Path) -> None:
        executable.export_library(str(path), **options)

    return Module(_manifest(imported, target), executable.jit, export, threads)


def generate(
    imported: Imported,
    target: Target,
    dump_ir: str | os.PathLike[str] | None = None,
    progress: Progress = lambda step: None,
) -> relax.VMExecutable:
    """Optimise and generate code: machine code of a CPU, CUDA C++ of a GPU. What TVM cannot do
    leaves as ``UnsupportedError``.
    """
    try:
        with without_noise(), target:
            progress("optimise")
            module = pipeline(target, dump_ir)(imported.module)
            progress("generate code")
            lowering = code_generation(target)
            return relax.build(module, target, relax_pipeline=None, tir_pipeline=lowering)
    except (OpferryError, OSError):
        raise
    except Exception as error:  # TVM's errors have no common base
        symbols = sorted({d for i in imported.inputs for d in i.shape if isinstance(d, str)})
        hint = f"; binding dimensions {symbols} with shapes= may help" if symbols else ""
        raise UnsupportedError(
            f"TVM cannot compile the model for {target.kind.name}: {error}{hint}"
        ) from error


def pipeline(target: Target, dump_ir: str | os.PathLike[str] | None = None) -> Pass:
    """All passes between import and code generation."""
    dump = _dumper(dump_ir)
    return Sequential(
        [
            # 1. Graph: TVM operators to TE, those of a row and elementwise ones fused; ours opaque.
            relax.transform.DecomposeOpsForInference(),
            relax.transform.CanonicalizeBindings(),
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            relax.transform.EliminateCommonSubexpr(),  # TVM builds each constant that it folds
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            InlineScalars(),
            *([FuseRows()] if target.kind.name == "llvm" else []),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.RewriteDataflowReshape(),
            ViewOutputs(),
            relax.transform.DeadCodeElimination(["main"]),
            dump("graph"),
            # 2. Kernels: ours by name, the rest by generic rules.
            ApplySchedules(target),
            dump("schedule"),
            # 3. Memory and calls.
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            _plan_memory,
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            AssumeNoAlias(),
            relax.transform.AttachGlobalSymbol(),
            dump("lower"),
        ]
    )


@module_pass(opt_level=0, name="PlanMemory")
def _plan_memory(module: IRModule, _: PassContext) -> IRModule:
    """Let tensors share memory, unless there are branches: TVM's plan gives one branch the memory
    that only the other allocates, and the module crashes.
    """
    branches: list[relax.If] = []
    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(
                function, lambda e: branches.append(e) if isinstance(e, relax.If) else None
            )
    return module if branches else relax.transform.StaticPlanBlockMemory()(module)


@module_pass(opt_level=0, name="AssumeNoAlias")
class AssumeNoAlias:
    """Tell LLVM that no PrimFunc's arguments overlap, the shape function of `VMShapeLower`
    included.

    That one comes without the mark, and LLVM's code generator then gives it up for every function
    of the module: register tiles go through memory, at a third of the speed.
    """

    def transform_module(self, module: IRModule, _: PassContext) -> IRModule:
        for var, func in module.functions.items():
            if isinstance(func, PrimFunc):
                module[var] = func.with_attr("tirx.noalias", True)
        return module


def _manifest(imported: Imported, target: Target) -> Manifest:
    main = imported.module["main"]
    result = main.ret_ty
    types = [result] if isinstance(result, relax.TensorType) else list(result.fields)
    return Manifest(
        inputs=tuple(Tensor(spec.name, spec.dtype, spec.shape) for spec in imported.inputs),
        outputs=tuple(
            Tensor(name, str(type_.dtype), _dims(type_))
            for name, type_ in zip(imported.outputs, types)
        ),
        target=_plain(target.export()),
        architecture=targets.architecture(target),
        cpu_features=targets.required_features(target),
        operators=imported.operators,
        versions=versions(),
        checks=imported.checks,
        device_code=device_code.form() if target.kind.name == "cuda" else "",
    )


def _dims(type_: relax.TensorType) -> tuple[int | str, ...]:
    if not isinstance(type_.shape, relax.ShapeExpr):
        return ("?",) * max(type_.ndim, 0)
    return tuple(_dim(d) for d in type_.shape)


def _dim(dim: Expr) -> int | str:
    """A size, or an expression of the names that the inputs' dimensions have."""
    if isinstance(dim, tvm.tirx.IntImm):
        return int(dim)
    # The printer renames what is called like a prefix: by default T, I and R are.
    prefixes = {"tirx.prefix": "tirx_", "relax.prefix": "relax_"}
    return dim.script(int_dtype="int64", ir_prefix="ir_", extra_config=prefixes)


def _plain(value: Any) -> Any:
    """TVM's containers as JSON's."""
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, int | float):
        return value
    return str(value) if isinstance(value, str) else [_plain(item) for item in value]


def _dumper(folder: str | os.PathLike[str] | None) -> Callable[[str], Pass]:
    def dump(phase: str) -> Pass:
        @module_pass(opt_level=0, name=f"Dump_{phase}")
        def write(module: IRModule, _: PassContext) -> IRModule:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / f"{phase}.py").write_text(module.script())
            return module

        return write

    return dump
