"""Module.save, opferry.load, machines that lack something."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tvm
from small_model import X, model

import opferry
from opferry.runtime import cpu, manifest
from opferry.runtime import module as runtime_module
from opferry.runtime.errors import ArtifactError


@pytest.fixture
def copy(saved, tmp_path):
    """A saved module that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_saved_module_computes_the_same(module, saved):
    loaded = opferry.load(saved)
    assert sorted(file.name for file in saved.iterdir()) == ["manifest.json", "module.so"]
    assert dataclasses.replace(loaded.manifest, files={}) == module.manifest
    feeds = {"x": X, "z": X + 1}
    for name, value in module.run(feeds).items():
        np.testing.assert_array_equal(loaded.run(feeds)[name], value)


def test_the_manifest_tells_what_a_caller_needs(saved):
    data = json.loads((saved / "manifest.json").read_text())
    assert data["inputs"] == [
        {"name": name, "dtype": "float32", "shape": ["b", 3]} for name in ("x", "z")
    ]
    assert [entry["name"] for entry in data["outputs"]] == ["y", "n"]
    assert data["target"]["kind"] == "llvm"
    assert data["versions"].keys() == {"opferry", "apache-tvm", "apache-tvm-ffi"}
    assert data["files"].keys() == {"module.so"}


def test_a_loaded_module_can_be_saved_again(saved, tmp_path):
    opferry.load(saved).save(tmp_path / "again")
    again = opferry.load(tmp_path / "again")
    np.testing.assert_array_equal(again.run({"x": X, "z": X})["y"], 2 * X)


def test_saving_and_loading_is_quiet(module, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.save(tmp_path / "quiet")
        opferry.load(tmp_path / "quiet").run({"x": X, "z": X})
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_save_replaces_an_older_module_and_fills_an_empty_folder(module, tmp_path):
    folder = tmp_path / "deep" / "module"
    module.save(folder)
    (folder / "stray").write_text("of the old one")
    module.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "module.so"]
    (tmp_path / "empty").mkdir()
    module.save(tmp_path / "empty")
    opferry.load(tmp_path / "empty")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["deep", "empty"]
    assert [file.name for file in folder.parent.iterdir()] == ["module"]


def test_save_keeps_off_what_is_no_module(module, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target in (tmp_path, tmp_path / "precious.txt", tmp_path / "dangling"):
        with pytest.raises(ArtifactError, match="found something that is no saved module"):
            module.save(target)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_save_follows_a_link_to_an_older_module(module, tmp_path):
    module.save(tmp_path / "v1")
    (tmp_path / "v1" / "stray").write_text("of the old one")
    (tmp_path / "current").symlink_to("v1")
    module.save(tmp_path / "current")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["current", "v1"]
    assert (tmp_path / "current").is_symlink()
    assert sorted(file.name for file in (tmp_path / "v1").iterdir()) == [
        "manifest.json",
        "module.so",
    ]


def test_the_folders_mode_follows_the_umask(module, tmp_path):
    old = os.umask(0o027)
    try:
        module.save(tmp_path / "module")
    finally:
        os.umask(old)
    assert (tmp_path / "module").stat().st_mode & 0o777 == 0o750


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize(
    ("step", "error", "raised"),
    [
        ("export", OSError(28, "No space left on device"), ArtifactError),
        ("manifest", OSError(28, "No space left on device"), ArtifactError),
        ("rename", OSError(13, "Permission denied"), ArtifactError),
        ("export", Interrupt(), Interrupt),
        ("manifest", Interrupt(), Interrupt),
    ],
    ids=[
        "full disk, library",
        "full disk, manifest",
        "rename",
        "killed, library",
        "killed, manifest",
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
def test_a_failing_save_leaves_everything_as_it_was(
    module, saved, tmp_path, monkeypatch, step, error, raised, before
):
    target = tmp_path / "module"
    if before:
        opferry.load(saved).save(target)
    earlier = {f.name: f.read_bytes() for f in target.iterdir()} if before else None

    def fail(path, *_, **__):
        if isinstance(path, Path) and path.name == "module.so":
            path.write_bytes(b"half")
        raise error

    real = Path.rename
    if step == "export":
        monkeypatch.setattr(module, "_export", fail)
    elif step == "manifest":
        monkeypatch.setattr(runtime_module.Manifest, "to_json", fail)
    else:
        monkeypatch.setattr(
            Path,
            "rename",
            lambda a, b: fail(a) if b == target and ".old" not in a.name else real(a, b),
        )
    with pytest.raises(raised, match="cannot be written" if raised is ArtifactError else None):
        module.save(target)
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == (["module"] if before else [])
    if before:
        assert {f.name: f.read_bytes() for f in target.iterdir()} == earlier


def test_a_library_for_another_architecture_needs_its_linker(tmp_path):
    proto = model("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"}
    if cpu.architecture() == "aarch64":
        target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}
    module = opferry.compile(proto, target=target)
    with pytest.raises(ArtifactError, match=r"module: built for .*, this machine is"):
        module.run({"x": X[0]})
    with pytest.raises(ArtifactError, match="module: the library cannot be linked for"):
        module.save(tmp_path / "module")
    assert list(tmp_path.iterdir()) == []


# What load refuses


def reseal(folder, **changes):
    path = folder / "manifest.json"
    found = manifest.Manifest.from_json(path.read_text(), path)
    path.write_text(dataclasses.replace(found, **changes).to_json())


def test_load_refuses_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match="found no saved module"):
        opferry.load(tmp_path / "nothing")


def test_load_refuses_a_missing_library(copy):
    (copy / "module.so").unlink()
    with pytest.raises(ArtifactError, match=r"module\.so: cannot be read"):
        opferry.load(copy)


def test_load_refuses_a_changed_library(copy):
    with (copy / "module.so").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match=r"module\.so: found other content than was saved"):
        opferry.load(copy)


def test_load_refuses_a_library_that_is_none(copy):
    (copy / "module.so").write_bytes(b"no library")
    reseal(copy, files={"module.so": manifest.sha256(copy / "module.so")})
    with pytest.raises(ArtifactError, match=r"module\.so: cannot be loaded"):
        opferry.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"b"', '"c"'),
            "manifest.json: found other content than was saved",
        ),
        (lambda text: text.replace('"float32"', '"float64"', 1), "found other content"),
        (lambda text: text[: len(text) // 2], "found no manifest"),
        (lambda text: "[]", "found no manifest"),
        (lambda text: "[" * 100_000, "found no manifest"),
        (lambda text: "", "found no manifest"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "found format 99, allowed 1"),
        (lambda text: json.dumps({"format": 1}), "found other content"),
    ],
    ids=["name", "dtype", "cut", "list", "deep", "empty", "format", "gutted"],
)
def test_load_refuses_a_changed_manifest(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ArtifactError, match=message):
        opferry.load(copy)


def test_a_manifest_may_be_formatted_anew(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(dict(sorted(json.loads(path.read_text()).items()))))
    opferry.load(copy)


def test_load_reads_no_file_but_its_own(copy):
    reseal(copy, files={"module.so": "", "../../etc/passwd": ""})
    with pytest.raises(ArtifactError, match=r"found files \[.*passwd.*\], allowed module\.so"):
        opferry.load(copy)


def test_load_refuses_a_module_of_another_tvm(copy):
    reseal(copy, versions={"apache-tvm": "0.26.0", "apache-tvm-ffi": "unknown", "opferry": "1"})
    with pytest.raises(ArtifactError, match=r"built with apache-tvm 0\.26\.0, installed is 0"):
        opferry.load(copy)


def test_load_refuses_another_architecture(copy, monkeypatch):
    monkeypatch.setattr(cpu, "architecture", lambda: "riscv64")
    with pytest.raises(ArtifactError, match=r"built for .*, this machine is riscv64"):
        opferry.load(copy)


def test_load_refuses_instructions_that_this_cpu_lacks(copy, monkeypatch):
    reseal(copy, cpu_features=("avx2", "avx512vnni"), target={"kind": "llvm", "mcpu": "big"})
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(
        ArtifactError, match="built for big, this CPU lacks avx512vnni; compile for"
    ):
        opferry.load(copy)


def test_an_unsaved_module_for_a_bigger_cpu_does_not_run(monkeypatch):
    module = opferry.compile(
        model("g (float[n] x) => (float[n] y) { y = Neg(x) }"), target="x86-avx512bf16"
    )
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match=r"this CPU lacks .*avx512bf16"):
        module.run({"x": X[0]})


# A machine with the runtime only


DEPLOYED = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition(".")[0] == "onnx" else find(name, path, target)
)
import numpy as np, opferry
module = opferry.load(sys.argv[1])
x = np.arange(6, dtype=np.float32).reshape(2, 3)
np.testing.assert_array_equal(module.run({"x": x, "z": x})["y"], 2 * x)
try:
    module.run({"x": x, "z": x[:1]})
except opferry.OpferryError as error:
    print(error)
assert not any(name.partition(".")[0] == "onnx" for name in sys.modules)
"""


def deployed(saved, **environment):
    return subprocess.run(
        [sys.executable, "-c", DEPLOYED, str(saved)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_module_runs_with_tvms_runtime_library(saved):
    done = deployed(saved, TVM_USE_RUNTIME_LIB="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert 'input "z": found b = 1' in done.stdout


def test_a_module_runs_where_there_is_no_compiler_library(saved, tmp_path):
    """TVM's package without libtvm_compiler.so, and no onnx."""
    source = Path(tvm.__file__).parent
    package = tmp_path / "tvm"
    (package / "lib").mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name not in ("lib", "lib64"):
            (package / entry.name).symlink_to(entry)
    runtime = [lib for lib in (source / "lib").iterdir() if "compiler" not in lib.name]
    assert len(runtime) < len(list((source / "lib").iterdir()))
    for library in runtime:
        (package / "lib" / library.name).symlink_to(library)
    done = deployed(saved, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'input "z": found b = 1' in done.stdout
