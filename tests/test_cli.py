"""The command line: verbs, files, exit codes, no tracebacks for what a user can cause."""

import json
import os
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from opferry.driver import cli, target
from opferry.driver import inspect as inspection
from opferry.driver import validate as validation
from opferry.driver.arrays import write_outputs
from opferry.driver.report import OutputReport, Report
from opferry.relay_ops import OPS
from opferry.runtime.errors import OpferryError

HEAD = '<ir_version: 9, opset_import: ["": 17, "npu": 1]>'
MIXED = """g (int8[M,3] x) => (float16[M,2] y, int8[M,3] "n/a") <float[2] s = {0.5, 2},
    int8[3,2] w = {1, 2, 3, 4, 5, 6}, float[1] unused = {0}> {
    z = npu.NPUQuantMatmul<output_dtype = 10>(x, w, s) y = Neg(z) t = Abs(x) }"""
X = np.int8([[1, 2, 3], [4, 5, 6]])
Y = np.float16([[-11, -56], [-24.5, -128]])  # -(x @ w) * [0.5, 2]


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def refused(*arguments):
    """Standard error of a command that the user got wrong."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    proto = parser.parse_model(HEAD + MIXED.replace('"n/a"', "n"))
    proto.graph.node[2].output[0] = "n/a"
    proto.graph.output[1].name = "n/a"
    path = tmp_path_factory.mktemp("models") / "mixed.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def module(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules") / "mixed"
    result = invoke("compile", path, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def x(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return tmp_path / "x.npy"


# Help


@pytest.mark.parametrize("verb", ["", "list", "inspect", "compile", "run", "validate"])
def test_help_shows_an_example(verb):
    for flag in ("--help", "-h"):
        result = invoke(*filter(None, [verb, flag]))
        assert result.exit_code == 0
        assert "Usage:" in result.output
        assert "Example: opferry" in " ".join(result.output.split())


def test_help_lists_the_verbs_in_their_order():
    output = invoke("--help").output
    places = [
        output.index(f"\n  {verb} ") for verb in ("list", "inspect", "compile", "run", "validate")
    ]
    assert places == sorted(places)


def test_an_unknown_verb_is_the_users_error():
    assert "No such command" in refused("transmogrify")


# list


def test_list_shows_all_operators_and_targets():
    output = invoke("list").output
    for op in OPS:
        assert op.schema.name in output
    for name in target.TARGETS | target.CUDA_TARGETS:
        assert name in output


def test_list_as_json():
    data = json.loads(invoke("list", "--json").output)
    assert [o["operator"] for o in data["operators"]] == [op.schema.name for op in OPS]
    assert data["targets"]["x86-avx2"] == {"kind": "llvm", "mcpu": "haswell"}
    assert "llvm" in data["operators"][0]["targets"]


# inspect


def test_inspect_shows_operators_kernels_and_sizes(path):
    result = invoke("inspect", path, "--shape", "M=10")
    assert result.exit_code == 0
    output = " ".join(result.output.split())
    assert "input x: int8[10, 3]" in output
    assert "weights 9 elements, 18 bytes" in output  # 6 int8, 2 + 1 float32
    # 2 * 10 * 3 * 2 of the product, 20 of Neg, 30 of Abs
    # x twice 60, w 6, s 8, z twice 80, y 40, n 30
    assert "work 170 operations, 224 bytes" in output
    assert "npu::NPUQuantMatmul 1 opferry 120" in output
    assert "gemm" in output or "matmul" in output


def test_inspect_as_json_with_open_dimensions(path):
    data = json.loads(invoke("inspect", path, "--json").output)
    assert data["operations"] is None
    assert data["inputs"][0]["shape"] == ["M", 3]
    assert {row["name"]: row["converted_by"] for row in data["operators"]} == {
        "npu::NPUQuantMatmul": "opferry",
        "Neg": "TVM",
        "Abs": "TVM",
    }
    ours = next(row for row in data["operators"] if row["converted_by"] == "opferry")
    assert ours["kernels"]


def test_inspect_names_what_is_not_supported(tmp_path):
    head = '<ir_version: 9, opset_import: ["": 17, "other": 1]>'
    text = "g (float[2] x) => (float[2] y) { a = other.Magic(x) y = Relu(a) }"
    onnx.save(parser.parse_model(head + text), tmp_path / "m.onnx")
    result = invoke("inspect", tmp_path / "m.onnx")
    assert result.exit_code == 0
    assert "unsupported: other::Magic" in result.output
    assert "other::Magic" in refused("compile", tmp_path / "m.onnx", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# compile


def test_compile_saves_a_module(path, tmp_path):
    result = invoke(
        "compile", path, "-o", tmp_path / "out", "--shape", "x=2,?", "--target", "x86-64"
    )
    assert result.exit_code == 0, result.output
    assert "input   x: int8[2, 3]" in result.output
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["manifest.json", "module.so"]


def test_compile_as_json_with_a_target_as_json(path, tmp_path):
    record = '{"kind": "llvm", "mcpu": "haswell"}'
    result = invoke("compile", path, "-o", tmp_path / "out", "--json", "--target", record)
    data = json.loads(result.output)
    assert data["target"]["mcpu"] == "haswell"
    assert data["operators"] == ["npu::NPUQuantMatmul"]
    assert data["inputs"] == [{"name": "x", "dtype": "int8", "shape": ["M", 3]}]


def test_compile_dumps_the_ir(path, tmp_path):
    result = invoke("compile", path, "-o", tmp_path / "out", "--dump-ir", tmp_path / "ir")
    assert result.exit_code == 0
    assert sorted(f.name for f in (tmp_path / "ir").iterdir()) == [
        "graph.py",
        "lower.py",
        "schedule.py",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nope"], "target: found 'nope', allowed 'llvm'"),
        (["--target", "{nope"], "found '{nope', allowed a name or JSON"),
        (["--shape", "M"], "found 'M', allowed NAME=SIZE"),
        (["--shape", "M=two"], "found 'M=two', allowed NAME=SIZE"),
        (["--shape", "M=²"], "found 'M=²', allowed NAME=SIZE"),
        (["--shape", "M=0"], "dimension 'M': found 0, allowed a size of at least 1"),
        (["--shape", "x=1,4"], 'input "x" axis 1: found 4, allowed 3'),
        (["--shape", "Q=1"], "found 'Q', allowed inputs ['x'] or dimensions ['M']"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compile_refuses(path, tmp_path, arguments, message):
    assert message in refused("compile", path, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_compile_needs_files_that_can_be_read_and_written(path, tmp_path):
    assert "nothing.onnx: cannot be read" in refused(
        "compile", tmp_path / "nothing.onnx", "-o", tmp_path / "out"
    )
    assert "cannot be read as an ONNX model" in refused("compile", tmp_path, "-o", tmp_path / "out")
    (tmp_path / "text.onnx").write_text("hello")
    assert "text.onnx" in refused("compile", tmp_path / "text.onnx", "-o", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "cannot be" in refused("compile", path, "-o", tmp_path / "file" / "out")
    assert "no saved module" in refused("compile", path, "-o", tmp_path)
    assert "Missing option '-o'" in refused("compile", path)


# run


def test_run_writes_a_file_per_output(module, x, tmp_path):
    result = invoke("run", module, "--input", f"x={x}", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy"), Y)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "n_a.npy"), X)
    assert "y: float16[2, 2] -> " in result.output
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["n_a.npy", "y.npy"]


def test_run_with_npz_in_and_out(module, tmp_path):
    np.savez(tmp_path / "in.npz", x=X)
    result = invoke(
        "run", module, "--input", tmp_path / "in.npz", "-o", tmp_path / "o.npz", "--json"
    )
    data = json.loads(result.output)
    assert [entry["name"] for entry in data["outputs"]] == ["y", "n/a"]
    with np.load(tmp_path / "o.npz") as out:
        np.testing.assert_array_equal(out["y"], Y)
        np.testing.assert_array_equal(out["n/a"], X)


def test_run_overwrites_and_leaves_other_files(module, x, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "y.npy").write_text("old")
    (out / "mine.txt").write_text("keep")
    assert invoke("run", module, "--input", f"x={x}", "-o", out).exit_code == 0
    np.testing.assert_array_equal(np.load(out / "y.npy"), Y)
    assert (out / "mine.txt").read_text() == "keep"


def test_run_refuses(module, x, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY broken")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "float.npy", X.astype(np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((2, 4), np.int8))
    np.savez(tmp_path / "in.npz", x=X)
    for given, message in {
        f"x={tmp_path / 'none.npy'}": "none.npy: No such file",
        f"x={tmp_path}": "Is a directory",
        f"x={tmp_path / 'broken.npy'}": "broken.npy: found no .npy or .npz array file",
        f"x={tmp_path / 'broken.npz'}": "broken.npz: found no .npy or .npz array file",
        f"x={tmp_path / 'object.npy'}": "object.npy: found no .npy or .npz array file",
        f"x={tmp_path / 'float.npy'}": 'input "x": found dtype float32, allowed int8',
        f"x={tmp_path / 'wide.npy'}": 'input "x": found shape (2, 4), allowed (M, 3)',
        f"q={x}": "missing ['x'], allowed exactly ['x']",
        f"{x}": "a single array, allowed NAME=",
        f"x={tmp_path / 'in.npz'}": "several arrays for one input",
    }.items():
        assert message in refused("run", module, "--input", given, "-o", out), given
    assert "missing ['x']" in refused("run", module, "-o", out)
    twice = ["--input", f"x={x}", "--input", f"x={x}"]
    assert "['x'] more than once" in refused("run", module, *twice, "-o", out)
    assert not out.exists()


def test_run_refuses_what_is_no_module(tmp_path, x):
    assert "found no saved module" in refused("run", tmp_path, "--input", f"x={x}", "-o", "out")
    (tmp_path / "manifest.json").write_text("{}")
    assert "found no manifest" in refused("run", tmp_path, "--input", f"x={x}", "-o", "out")


def test_run_refuses_an_output_that_cannot_be_written(module, x, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("run", module, "--input", f"x={x}", "-o", tmp_path / "file")
    assert "file" in refused("run", module, "--input", f"x={x}", "-o", tmp_path / "file" / "o.npz")


def test_a_failing_write_leaves_no_half_file(tmp_path, monkeypatch):
    def full(file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "y.npy").write_text("old")
    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(np, "savez", full)
    for output in (tmp_path, tmp_path / "o.npz"):
        with pytest.raises(OSError, match="No space left"):
            write_outputs(output, {"y": X})
    assert [f.name for f in tmp_path.iterdir()] == ["y.npy"]
    assert (tmp_path / "y.npy").read_text() == "old"


def test_outputs_with_the_same_safe_name_get_two_files(tmp_path):
    files = write_outputs(tmp_path, {"a/b": X, "a:b": 2 * X})
    assert len(set(files.values())) == 2
    np.testing.assert_array_equal(np.load(files["a:b"]), 2 * X)


def test_bfloat16_goes_through_files(tmp_path):
    text = "g (bfloat16[n] x) => (bfloat16[n] y) { y = Neg(x) }"
    onnx.save(parser.parse_model(HEAD + text), tmp_path / "m.onnx")
    assert invoke("compile", tmp_path / "m.onnx", "-o", tmp_path / "m").exit_code == 0
    values = np.array([1, -2.5], ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", values)
    out = tmp_path / "out"
    result = invoke("run", tmp_path / "m", "--input", f"x={tmp_path / 'x.npy'}", "-o", out)
    assert result.exit_code == 0, result.output
    got = np.load(out / "y.npy").view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, -values)


# validate


def test_validate_a_model_and_a_saved_module(path, module, x):
    result = invoke("validate", path, "--shape", "M=4", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "ok"
    result = invoke("validate", path, module, "--input", f"x={x}", "--json")
    assert result.exit_code == 0
    data = json.loads(result.output)
    assert data["ok"] is True
    assert [o["shape"] for o in data["outputs"]] == [[2, 2], [2, 3]]


def test_validate_exits_with_1_when_outputs_differ(path, module, monkeypatch):
    report = Report((OutputReport("y", "float32", (1,), "failed", 1.0, 1.0, 1),))
    monkeypatch.setattr(validation, "validate", lambda *_, **__: report)
    for arguments in ([], ["--json"]):
        result = invoke("validate", path, module, *arguments)
        assert result.exit_code == 1
    assert json.loads(result.output)["ok"] is False


def test_validate_refuses(path, module, tmp_path):
    assert "do not go with FOLDER" in refused("validate", path, module, "--shape", "M=2")
    assert "cannot be read" in refused("validate", tmp_path / "none.onnx")
    text = "g (float[2] q) => (float[2] y) { y = Neg(q) }"
    onnx.save(parser.parse_model(HEAD + text), tmp_path / "other.onnx")
    assert "found a model with inputs ['q']" in refused("validate", tmp_path / "other.onnx", module)
    assert "--seed" in refused("validate", path, "--seed", "-1")


# The process


def process(*arguments, **environment):
    return subprocess.run(
        [*arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_python_m_opferry_is_quiet_on_stderr(path, tmp_path):
    done = process(sys.executable, "-m", "opferry", "validate", str(path), "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["ok"] is True


def test_an_unknown_gpu_is_one_line(path, tmp_path):
    done = process(
        *(sys.executable, "-m", "opferry", "compile", str(path), "-o", str(tmp_path / "out")),
        *("--target", '{"kind": "cuda", "arch": "sm_60"}'),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: target: found CUDA architecture 'sm_60', allowed sm_75")
    assert done.stderr.count("\n") == 1


def test_the_number_of_threads_in_the_environment_is_the_users(module, x, tmp_path):
    done = process(
        *(sys.executable, "-m", "opferry", "run", str(module), "--input", f"x={x}"),
        *("-o", str(tmp_path / "out")),
        OPFERRY_NUM_THREADS="many",
    )
    assert done.returncode == 2
    assert done.stderr == (
        "Error: OPFERRY_NUM_THREADS: found 'many', allowed a whole number of at least 1\n"
    )


def test_help_needs_no_tvm():
    code = (
        "import sys; from opferry.driver.cli import main; main(['--help'], standalone_mode=False); "
        "assert 'tvm' not in sys.modules and 'rich' not in sys.modules"
    )
    done = process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_warning_is_one_line(path, monkeypatch):
    """Causal attention asked for without its mask warns, for example."""

    def inspect(*_):
        warnings.warn("mode 2 without a mask is full attention", UserWarning, stacklevel=1)
        warnings.warn("of no interest here", DeprecationWarning, stacklevel=1)
        raise OpferryError("stop")

    monkeypatch.setattr(inspection, "inspect", inspect)
    result = invoke("inspect", path)
    assert result.stderr == ("warning: mode 2 without a mask is full attention\nError: stop\n")
