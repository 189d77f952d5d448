"""The repository root is the package: what keeps that working, and what a user receives."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import opferry
from opferry.runtime.ffi_version import COMPATIBLE

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = {"tests", "examples", "benchmarks", "docs"}

checkout = pytest.mark.skipif(
    not (ROOT / "__init__.py").is_file(), reason="tests of a checkout, run beside a wheel"
)


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def listed_packages() -> list[str]:
    """`packages` of pyproject.toml (Python 3.10 has no TOML reader)."""
    block = re.search(r"^packages = (\[.*?\n\])", pyproject(), re.MULTILINE | re.DOTALL)
    return ast.literal_eval(block.group(1))


def tracked_files() -> list[Path]:
    found = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def modules() -> set[str]:
    """Paths of the package's files, as the wheel shows them."""
    return {
        str(Path("opferry") / path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in NOT_PACKAGED
    }


def run_python(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@checkout
def test_packages_are_the_folders_that_hold_an_init_file():
    folders = [Path(m).parent for m in modules() if Path(m).name == "__init__.py"]
    assert sorted(listed_packages()) == sorted(".".join(folder.parts) for folder in folders)


@checkout
def test_every_module_lies_in_a_package():
    folders = {Path(*name.split(".")) for name in listed_packages()}
    assert [m for m in sorted(modules()) if Path(m).parent not in folders] == []


@checkout
def test_root_file_may_be_executed_twice():
    """pytest executes the root __init__.py a second time, under the name of the checkout."""
    code = f"""
import pkgutil, runpy, sys
import opferry
before = dict(sys.modules)
runpy.run_path({str(ROOT / "__init__.py")!r}, run_name="checkout")
assert dict(sys.modules) == before, sorted(sys.modules.keys() - before.keys())
opferry.OPS
runpy.run_path({str(ROOT / "__init__.py")!r}, run_name="checkout")
"""
    run_python(code)


@checkout
def test_no_module_of_ours_is_loaded_twice():
    """Nor did importing all of it under pytest load one twice in this process."""
    for name in listed_packages():
        importlib.import_module(name)
    names: dict[str, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not Path(file).is_relative_to(ROOT) or Path(file).is_relative_to(sys.prefix):
            continue
        parts = Path(file).relative_to(ROOT).parts
        # The root file is the one that pytest runs again; the console script is __main__.
        if parts != ("__init__.py",) and parts[0] not in NOT_PACKAGED:
            names.setdefault(file, []).append(name)
    assert {file: found for file, found in names.items() if len(found) > 1} == {}


def test_import_loads_no_tvm():
    assert run_python("import sys, opferry; print('tvm' in sys.modules)").strip() == "False"


def test_every_public_name_exists():
    assert [name for name in opferry.__all__ if not hasattr(opferry, name)] == []


@checkout
def test_versions_agree():
    version = re.search(r'^version = "(.*)"$', pyproject(), re.MULTILINE).group(1)
    assert opferry.__version__ == version
    assert importlib.metadata.version("opferry") == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) in (
        version,
        "Unreleased",
    )


@checkout
def test_formatter_has_one_version():
    pinned = re.findall(r"ruff==([\d.]+)", pyproject())
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 1
    assert set(hooks) == set(pinned)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Source distribution and the wheel made from it, of a copy of the checkout."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    for path in tracked_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    # `build` makes the sdist, and the wheel from the sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@checkout
def test_wheel_holds_the_modules_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"opferry-{opferry.__version__}.dist-info"
    assert {n for n in names if not n.startswith(info)} == modules()
    assert f"{info}/licenses/LICENSE" in names
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "opferry = opferry.driver.cli:main" in entry_points


@checkout
def test_source_distribution_holds_what_the_wheel_is_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {str(Path(*Path(m.name).parts[1:])) for m in archive.getmembers() if m.isfile()}
    meta = {n for n in names if n.startswith("opferry.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - meta == {str(Path(m).relative_to("opferry")) for m in modules()} | {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
    }


# Split, so that this file does not hold what it looks for.
FOREIGN = {
    "a home or root folder": r"/(?:home|root|Users)" + r"/\w",
    "a folder of one machine": r"(?<![\w.])/(?:work|mnt|opt)" + r"/\w",
    "a file outside of the repository": r"\.\./" + "shared",
    "a host of packages": r"https?://\S*(?:pypi|mirror|registry|/simple)",
}


@checkout
@pytest.mark.parametrize("what", FOREIGN)
def test_files_name_nothing_of_one_machine(what):
    found = []
    for path in tracked_files():
        if path.name in {"LICENSE", Path(__file__).name}:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(FOREIGN[what], line)
        ]
    assert found == []


def test_a_wrong_tvm_ffi_is_reported_in_one_sentence(tmp_path):
    """A newer apache-tvm-ffi installs without complaint and then crashes; the import says so."""
    fake = tmp_path / "apache_tvm_ffi-0.1.15.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: apache-tvm-ffi\nVersion: 0.1.15\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import opferry
except ImportError as error:
    print(str(error))
"""
    said = run_python(code)
    assert len(said.strip().splitlines()) == 1
    assert "apache-tvm-ffi 0.1.15" in said


@checkout
def test_the_pinned_tvm_ffi_is_one_that_passes():
    (pinned,) = re.findall(r'"apache-tvm-ffi==(.*)"', pyproject())
    assert pinned == COMPATIBLE[0]
