"""The command line: verbs only. Exit codes: 0 fine, 1 validation failed, 2 the user's error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

MODEL = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path)


class _Verbs(click.Group):
    """Turns what a user can cause into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        from ..runtime.errors import OpferryError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except (OpferryError, ImportError) as error:
                raise _UserError(str(error)) from error
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                raise _UserError(
                    f"{error.filename or 'system'}: {error.strerror or error}"
                ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _UserError(click.ClickException):
    exit_code = 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"warning: {message}", err=True)


def _shape(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, list]:
    """``name=1,128,?`` as {"name": [1, 128, None]}."""
    shapes = {}
    for value in values:
        name, equals, dims = value.rpartition("=")
        sizes = [None if size.strip() == "?" else size.strip() for size in dims.split(",")]
        if not equals or not all(size is None or size.isdecimal() for size in sizes):
            raise click.BadParameter(
                f"found {value!r}, allowed NAME=SIZE or INPUT=SIZE,SIZE,... with ? for open ones"
            )
        shapes[name] = [None if size is None else int(size) for size in sizes]
    return shapes


def _target(_: click.Context, __: click.Parameter, value: str) -> str | dict:
    """A name, or TVM's own JSON."""
    if not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"found {value!r}, allowed a name or JSON: {error}") from error


def _options(*decorators: Callable) -> Callable:
    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_threads = click.option("--threads", type=click.IntRange(min=1), help="Threads of a call.")
_inputs = click.option(
    "--input",
    "given",
    multiple=True,
    metavar="NAME=FILE.npy | FILE.npz",
    help="An array of one input, or several by name. Repeatable.",
)
_compilation = _options(
    click.option(
        "--target",
        default="llvm",
        show_default=True,
        callback=_target,
        help='"llvm" is this machine, "cuda" its GPU; see `opferry list` for others, or give '
        "TVM's JSON.",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=_shape,
        metavar="NAME=SIZES",
        help="Bind a symbolic dimension (batch=4) or an input (x=1,128,768). Repeatable.",
    ),
)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: opferry compile encoder.onnx -o build/encoder",
)
@click.version_option(package_name="opferry")
def main() -> None:
    """Carry vendor-locked fused operators from ONNX to compiled modules for open targets.

    Exit codes: 0 fine, 1 validation failed, 2 an error that the message explains.
    """


@main.command("list", epilog="Example: opferry list --json")
@_as_json
def list_(as_json: bool) -> None:
    """Operators and targets that are supported."""
    from ..relay_ops import OPS
    from .target import CUDA_TARGETS, KINDS, TARGETS

    operators = [
        {
            "operator": op.schema.name,
            "domain": op.schema.domain,
            "version": op.schema.since_version,
            "inputs": [parameter.name for parameter in op.schema.inputs],
            "outputs": [parameter.name for parameter in op.schema.outputs],
            "targets": list(KINDS),
        }
        for op in OPS
    ]
    names = TARGETS | CUDA_TARGETS
    if as_json:
        return _print_json(
            {"operators": operators, "targets": {"llvm": None, "cuda": None, **names}}
        )
    _table(
        ("operator", "domain", "version", "targets"),
        [
            (o["operator"], o["domain"], str(o["version"]), ", ".join(o["targets"]))
            for o in operators
        ],
    )
    rows = [(name, json.dumps(record)) for name, record in names.items()]
    detected = [("llvm", "this machine, detected"), ("cuda", "the GPU of this machine, detected")]
    _table(("target", "TVM target"), [*detected, *rows])


@main.command(epilog="Example: opferry inspect encoder.onnx --shape batch=1 --shape length=128")
@click.argument("model", type=MODEL)
@_compilation
@_as_json
def inspect(model: Path, target: str | dict, shapes: dict, as_json: bool) -> None:
    """Show what MODEL consists of and what each operator lowers to, without compiling it."""
    from .inspect import UNSUPPORTED
    from .inspect import inspect as inspect_model

    with _progress() as step:
        step("inspect")
        proto = _load(model)
        found = inspect_model(proto, target, _bound(proto, shapes))
    if as_json:
        return _print_json(found.to_dict())
    for spec in found.inputs:
        click.echo(f"input   {spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]")
    click.echo(f"outputs {', '.join(found.outputs)}")
    click.echo(f"weights {found.weights:,} elements, {found.weight_bytes:,} bytes")
    click.echo(
        f"work    {_amount(found.operations)} operations, {_amount(found.bytes_moved)} bytes"
    )
    _table(
        ("operator", "nodes", "by", "operations", "kernels"),
        [
            (
                row.name,
                str(row.nodes),
                row.converted_by,
                _amount(row.operations),
                ", ".join(row.kernels),
            )
            for row in found.operators
        ],
    )
    if found.unsupported:
        click.echo(f"{UNSUPPORTED}: {', '.join(found.unsupported)}")


@main.command("compile", epilog="Example: opferry compile encoder.onnx -o build/encoder")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the saved module.")
@_compilation
@click.option("--dump-ir", type=FOLDER, help="Folder for the module after each phase.")
@_as_json
def compile_(
    model: Path,
    output: Path,
    target: str | dict,
    shapes: dict,
    dump_ir: Path | None,
    as_json: bool,
) -> None:
    """Compile MODEL and save the module: a library and its manifest."""
    started = time.perf_counter()
    with _progress() as step:
        module = _compile(model, target, shapes, step, dump_ir=dump_ir)
        step("save")
        module.save(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    summary = {
        "folder": str(output),
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 3),
        "target": module.manifest.target,
        "operators": list(module.manifest.operators),
        "inputs": [_signature(spec) for spec in module.inputs],
        "outputs": [_signature(spec) for spec in module.outputs],
    }
    if as_json:
        return _print_json(summary)
    for kind in ("inputs", "outputs"):
        for spec in summary[kind]:
            click.echo(f"{kind[:-1]:7} {spec['name']}: {spec['dtype']}{spec['shape']}")
    click.echo(f"saved   {output}: {size:,} bytes, {summary['seconds']:.1f} s")


@main.command(epilog="Example: opferry run build/encoder --input x=x.npy -o out/")
@click.argument("folder", type=FOLDER)
@_inputs
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder for one .npy per output, or a .npz file for all.",
)
@_threads
@_as_json
def run(
    folder: Path, given: tuple[str, ...], output: Path, threads: int | None, as_json: bool
) -> None:
    """Run the saved module in FOLDER. A bfloat16 array is stored as NumPy's 2-byte void."""
    from ..runtime.module import load
    from .arrays import read_inputs, write_outputs

    with _progress() as step:
        step("load")
        module = load(folder, threads)
        arrays = read_inputs(given, module.inputs)
        step("run")
        started = time.perf_counter()
        results = module.run(arrays)
        seconds = time.perf_counter() - started
        step("write")
        files = write_outputs(output, results)
    summary = [
        {"name": name, "dtype": x.dtype.name, "shape": list(x.shape), "file": str(files[name])}
        for name, x in results.items()
    ]
    if as_json:
        return _print_json({"seconds": seconds, "outputs": summary})
    for entry in summary:
        click.echo(f"{entry['name']}: {entry['dtype']}{entry['shape']} -> {entry['file']}")


@main.command(epilog="Example: opferry validate encoder.onnx --shape batch=2 --seed 7")
@click.argument("model", type=MODEL)
@click.argument("folder", type=FOLDER, required=False)
@_compilation
@_inputs
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random inputs.")
@_threads
@_as_json
def validate(
    model: Path,
    folder: Path | None,
    target: str | dict,
    shapes: dict,
    given: tuple[str, ...],
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare MODEL, compiled here or saved in FOLDER, with its evaluation in NumPy.

    Inputs are valid random ones unless given. Exit code 1 when an output differs.
    """
    from ..runtime.module import load
    from .arrays import read_inputs
    from .validate import validate as validate_module

    if folder and (shapes or target != "llvm"):
        raise click.UsageError("--shape and --target do not go with FOLDER: it is compiled already")
    with _progress() as step:
        if folder:
            step("load")
            module = load(folder, threads)
        else:
            module = _compile(model, target, shapes, step, threads=threads)
        arrays = read_inputs(given, module.inputs) if given else None
        report = validate_module(model, module, arrays, seed, progress=step)
    click.echo(report.to_json() if as_json else str(report))
    sys.exit(0 if report.ok else 1)


def _load(model: Path) -> Any:
    from ..frontend.model import load

    return load(model)


def _compile(model: Path, target: Any, shapes: dict, step: Callable, **options: Any) -> Any:
    from .build import compile as compile_model

    step("load")
    proto = _load(model)
    return compile_model(proto, target, _bound(proto, shapes), progress=step, **options)


def _bound(model: Any, shapes: dict[str, list]) -> dict[str, Any]:
    """``--shape`` values: a list for an input, a size for a dimension."""
    names = {value.name for value in model.graph.input}
    return {
        name: sizes if name in names or len(sizes) != 1 else sizes[0]
        for name, sizes in shapes.items()
    }


def _signature(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _amount(count: int | None) -> str:
    return "unknown (bind --shape)" if count is None else f"{count:,}"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width).print(table)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current step on a terminal's stderr, nothing elsewhere.

    It has its own file descriptor, since TVM's noise is filtered from number 2.
    """
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with (
        os.fdopen(os.dup(2), "w") as terminal,
        Progress(*columns, console=Console(file=terminal), transient=True) as progress,
    ):
        task = progress.add_task("start")
        yield lambda step: progress.update(task, description=step)


if __name__ == "__main__":
    main()
