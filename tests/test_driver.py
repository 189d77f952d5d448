"""Targets, threads of TVM's pool, noise, the time that an import takes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tvm

import opferry
from opferry.driver import target as targets
from opferry.runtime import cpu, quiet
from opferry.runtime import threads as thread_pool
from opferry.runtime.errors import OpferryError, UnsupportedError

# Targets


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_short_names_resolve(name):
    assert targets.resolve(name).kind.name == "llvm"
    assert targets.architecture(targets.resolve(name)) == "x86_64"


def test_a_target_in_tvms_own_forms():
    record = {"kind": "llvm", "mcpu": "haswell"}
    for given in (record, json.dumps(record), tvm.target.Target(record)):
        assert targets.resolve(given).attrs["mcpu"] == "haswell"


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("nope", OpferryError, "target: found 'nope', allowed 'llvm', .*x86-avx2"),
        ({"kind": "llvm", "mcpu": "zzz"}, OpferryError, "found mcpu 'zzz'"),
        ({"kind": "llvm", "mtriple": "bogus-x"}, OpferryError, "found mtriple 'bogus-x'"),
        ({"kind": "llvm", "mattr": ["+zzz"]}, OpferryError, r"found mattr '\+zzz'"),
        ({"kind": "llvm", "mattr": ["avx2"]}, OpferryError, "found mattr 'avx2'"),
        ({"kind": "llvm", "jit": "zzz"}, OpferryError, "target: found .*zzz"),
        ({"mcpu": "haswell"}, OpferryError, "target: found"),
        ("{broken", OpferryError, "target: found"),
        (7, OpferryError, "target: found 7"),
        ({"kind": "c"}, UnsupportedError, "found kind 'c', allowed llvm"),
    ],
    ids=str,
)
def test_wrong_targets_are_refused(target, kind, message):
    with pytest.raises(kind, match=message):
        targets.resolve(target)


@pytest.mark.parametrize(
    ("triple", "name"),
    [("arm64-apple-macos", "aarch64"), ("aarch64-linux-gnu", "aarch64"), ("amd64-linux", "x86_64")],
)
def test_architectures_go_by_one_name(triple, name):
    target = targets.resolve({"kind": "llvm", "mtriple": triple})
    assert targets.architecture(target) == name


def test_required_features_grow_with_the_target():
    features = [
        set(targets.required_features(targets.resolve(name)))
        for name in ("x86-64", "x86-avx2", "x86-avx512", "x86-avx512vnni", "x86-avx512bf16")
    ]
    features.append(set(targets.required_features(targets.resolve("x86-amx"))))
    for smaller, larger in itertools.pairwise(features):
        assert smaller < larger
    assert "avx512vnni" in features[3] - features[2]
    assert {"amx-tile", "amx-int8"} <= features[5] - features[4]


def test_the_host_is_what_this_cpu_can_do():
    here = cpu.features()
    if here is None:
        pytest.skip("this system does not tell its CPU's features")
    assert set(targets.required_features(targets.host())) == here


def test_what_a_hypervisor_hides_is_not_used(monkeypatch):
    full = targets.required_features(targets.host())
    if not full:
        pytest.skip("no features known of this CPU")
    monkeypatch.setattr(cpu, "features", lambda: frozenset(full) - {full[-1]})
    assert full[-1] not in targets.required_features(targets.host())


# Threads


COUNT = """
import sys, numpy as np, opferry
from tvm_ffi import get_global_func
module = opferry.load(sys.argv[1], **({"threads": int(sys.argv[2])} if len(sys.argv) > 2 else {}))
x = np.ones((2, 3), np.float32)
module.run({"x": x, "z": x})
print(get_global_func("runtime.NumThreads")())
"""


def threads_used(saved, *arguments, **environment):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("OPFERRY_NUM_THREADS", "TVM_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(saved), *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_all_cores_are_used_by_default(saved):
    assert threads_used(saved) == cpu.available_cores()


def test_threads_by_argument_and_by_environment(saved):
    assert threads_used(saved, "1") == 1
    assert threads_used(saved, OPFERRY_NUM_THREADS="1") == 1
    assert threads_used(saved, str(cpu.available_cores()), OPFERRY_NUM_THREADS="1") == (
        cpu.available_cores()
    )


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "²"])
def test_a_wrong_number_of_threads_in_the_environment(monkeypatch, value):
    monkeypatch.setenv(thread_pool.VARIABLE, value)
    with pytest.raises(
        OpferryError, match=r"OPFERRY_NUM_THREADS: found .*, allowed a whole number"
    ):
        thread_pool.default_threads()


@pytest.mark.parametrize("threads", [0, -1, 2.0, "2"])
def test_a_wrong_number_of_threads(saved, threads):
    with pytest.raises(
        OpferryError, match=r"threads: found .*, allowed a whole number of at least 1"
    ):
        opferry.load(saved, threads=threads)


def test_a_cpu_quota_counts(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *a, **k: (
            (tmp_path / "cpu.max").open().read()
            if str(path) == "/sys/fs/cgroup/cpu.max"
            else real(path, *a, **k)
        ),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert cpu.available_cores() == 2


# Noise


def test_only_known_noise_is_dropped(capfd):
    with quiet.without_noise():
        os.write(2, b"[t] x.cc:1: Warning: Scope Saving something\nTrouble: read this\n")
        with quiet.without_noise():
            os.write(2, b"And this\n")
    os.write(2, b"At once\n")
    assert capfd.readouterr().err == "Trouble: read this\nAnd this\nAt once\n"


def test_noise_can_be_asked_for(capfd, monkeypatch):
    monkeypatch.setenv(quiet.VARIABLE, "1")
    with quiet.without_noise():
        os.write(2, b"Scope Saving something\n")
    assert capfd.readouterr().err == "Scope Saving something\n"


def test_importing_opferry_is_fast():
    """Without onnx, which takes longer than everything else and is not ours."""
    code = (
        "import onnx, ml_dtypes, numpy, time; t = time.process_time(); import opferry; "
        "print(time.process_time() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.05
