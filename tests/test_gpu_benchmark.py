"""The benchmarks for a GPU, as far as they run without one."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

_ROOT = str(Path(__file__).parents[1])
if _ROOT not in sys.path:  # benchmarks are not part of the installed package
    sys.path.append(_ROOT)

pytest.importorskip("benchmarks", reason="a checkout is needed")

import opferry  # noqa: E402
from benchmarks.check import Mismatch, check  # noqa: E402
from benchmarks.gpu import build, run, table  # noqa: E402
from benchmarks.gpu.index import stored_digest  # noqa: E402
from benchmarks.gpu.modes import modes  # noqa: E402
from benchmarks.gpu.problems import GROUPS, QUICK, Candidate, candidates, node  # noqa: E402
from benchmarks.inputs import inputs  # noqa: E402
from benchmarks.shapes import Attention, Longformer, Matmul, Nsa  # noqa: E402
from opferry.runtime.errors import UnsupportedError  # noqa: E402
from opferry.schedules.cuda import attention, gemm, gemm_split  # noqa: E402
from opferry.schedules.cuda.override import overridden, overriding  # noqa: E402

CONFIGS = {
    "GemmConfig": gemm.GemmConfig,
    "SplitConfig": gemm_split.SplitConfig,
    "AttentionConfig": attention.AttentionConfig,
}
TINY = [
    Matmul(17, 32, 64, "int32"),
    Matmul(17, 32, 64, "bf16", per_token=True),
    Matmul(17, 32, 64, "int8"),
    Attention(2, 4, 2, 9, 9, 16, "bf16", "causal"),
    Attention(2, 4, 2, 1, 33, 16, "fp16"),
    Nsa(1200, 16, "bf16", Dv=16, N1=4, N2=2),
    Longformer(64, 3, hidden=64, heads=2, W=16),
]


def kinds(feeds):
    return {
        name: (x[0], tuple(x[1])) if isinstance(x, tuple) else (np.asarray(x).dtype, np.shape(x))
        for name, x in feeds.items()
    }


# What there is to do


def test_names_are_unique():
    for quick in (False, True):
        names = [job.name for _, job in build.chosen(build.ALL, quick)]
        assert len(set(names)) == len(names)
        assert len({build._folder_name(name) for name in names}) == len(names)


def test_every_operator_has_modes():
    assert {mode.op for mode in modes()} == {
        "QOrderedMatMul",
        "NPUQuantMatmul",
        "SpeedFusionAttention",
        "QOrderedLongformerAttention",
        "NPUNsaCompressAttention",
    }


@pytest.mark.parametrize("op", sorted({mode.op for mode in modes()}))
def test_every_mode_is_a_valid_node(op):
    for mode in modes():
        if mode.op == op:
            opferry.node_model(
                op, mode.feeds(0), mode.outputs, mode.constant, dict(mode.symbolic), **mode.attrs
            )


def test_seeds_change_what_is_not_stored():
    for mode in modes():
        first, second = mode.feeds(3), mode.feeds(4)
        assert kinds(first) == kinds(second)
        assert stored_digest(first, mode.constant) == stored_digest(second, mode.constant)
        assert any(x.tobytes() != second[name].tobytes() for name, x in first.items())


def test_candidates_know_their_configurations():
    assert GROUPS.keys() == QUICK.keys()
    for group, problems in GROUPS.items():
        found = candidates(group)
        assert [c.problem for c in found if c.config == "default"] == list(problems)
        for candidate in found:
            if candidate.fields:
                known = {field.name for field in dataclasses.fields(CONFIGS[candidate.kind])}
                assert candidate.fields.keys() <= known
            assert set(candidate.stored) <= node(candidate.problem).given.keys()
        assert len({candidate.name for candidate in found}) == len(found)


def test_kernels_of_one_architecture_beside_those_of_its_gpu():
    """For a Hopper GPU, both ways compete in one folder; elsewhere the second is refused."""
    for group, kernel in (("gemm", GROUPS["gemm"][0]), ("attention", GROUPS["attention"][0])):
        found = {c.config: c for c in candidates(group) if c.problem == kernel}
        assert {"default", "sm_90a"} <= found.keys()
        assert found["sm_90a"].arch == "sm_90a"
    assert build._same_gpu("cuda-sm_90", "sm_90a") == "cuda-sm_90a"
    for target in ("cuda-sm_80", "llvm"):
        with pytest.raises(UnsupportedError, match=f"sm_90a: found target '{target}'"):
            build._same_gpu(target, "sm_90a")


def test_a_weight_that_is_stored():
    """It is that of the first set of inputs, and no input any more."""
    problem = Matmul(5, 16, 32, "int32")
    built = build._compile(Candidate(problem, stored=("x2",)), "llvm")
    assert [spec.name for spec in built.inputs] == ["x1"]
    arrays = inputs(problem)
    (y,) = built.run({"x1": arrays.A}).values()
    np.testing.assert_array_equal(y, arrays.A.astype(np.int32) @ arrays.W.astype(np.int32).T)


def test_overriding_one_kind_of_configuration():
    config = gemm.GemmConfig(128, 128, 64, 2, 4)
    with overriding("GemmConfig", {"stages": 3}):
        assert overridden(config) == dataclasses.replace(config, stages=3)
        assert overridden(Attention(1, 1, 1, 1, 1, 1)) == Attention(1, 1, 1, 1, 1, 1)
    assert overridden(config) is config


@pytest.mark.parametrize("problem", TINY, ids=lambda p: p.label)
def test_nodes_take_the_arrays_of_their_problem(problem):
    it, arrays = node(problem), vars(inputs(problem))
    given = {name: arrays[array] for name, array in it.given.items()}
    assert kinds(given) == {name: kinds(it.feeds)[name] for name in it.given}
    opferry.node_model(problem.op, it.feeds, it.outputs, it.constant, **it.attrs)


def test_list(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["build", "--list", "--group", "decode", "--match", "B8.*2048"]
    )
    build.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "decode      SpeedFusionAttention B8 N64/8 S1x2048 D128 bf16, default"


# The other side


@pytest.mark.parametrize(
    "problem", [p for p in TINY if not isinstance(p, Nsa)], ids=lambda p: p.label
)
def test_peers_agree_with_the_reference(problem):
    pytest.importorskip("torch")
    if isinstance(problem, Longformer):
        pytest.importorskip("transformers")
    from benchmarks.gpu.device import input_sets
    from benchmarks.gpu.peers import peers

    found = peers(problem, "cpu")
    assert found
    (arrays,) = input_sets(problem, "cpu")
    for peer in found:
        check(problem, peer.finish(peer.bind(arrays)()), slack=3)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A few modules for this CPU: of one mode and of one problem."""
    folder = tmp_path_factory.mktemp("gpu")
    mode = next(m for m in modes() if m.op == "NPUQuantMatmul")
    entry = build.compile_named("modes", mode.name, "llvm", folder)
    assert not entry.error
    return folder, mode, entry


def test_a_mode_is_proved_and_a_wrong_one_found(rehearsal, monkeypatch):
    pytest.importorskip("torch")
    from benchmarks.gpu import worker

    folder, mode, entry = rehearsal
    verdict = worker.prove(mode, entry, folder, "cpu", seed=5)
    assert verdict["ok"]
    assert verdict["note"] == ""
    other = dataclasses.replace(entry, stored="0")
    assert "draws other numbers" in worker.prove(mode, other, folder, "cpu", 5)["note"]
    shifted = dataclasses.replace(mode, attrs={**mode.attrs, "transpose_x2": 0})
    monkeypatch.setattr(
        worker, "compare", lambda op, feeds, attrs, got: compare_shifted(op, feeds, mode.attrs, got)
    )
    assert not worker.prove(shifted, entry, folder, "cpu", 5)["ok"]


def compare_shifted(op, feeds, attrs, got):
    from opferry.reference.compare import compare

    return compare(op, feeds, attrs, [got[0] + np.ones(1, got[0].dtype)])


def test_a_contest_times_what_is_right():
    torch = pytest.importorskip("torch")
    from benchmarks.gpu import worker
    from benchmarks.gpu.peers import Peer, peers

    problem = TINY[0]
    told = []
    contest = worker.Contest(problem, "cpu", lambda **record: told.append(record))
    (right,) = peers(problem, "cpu")
    contest.peer(right, set())
    contest.peer(Peer("wrong", lambda a: lambda: torch.zeros(17, 32, dtype=torch.int32)), set())
    contest.peer(Peer("broken", lambda a: a.nothing), set())
    contest.peer(Peer("crashed", right.bind), {f"{problem.label}, crashed"})
    record = contest.run({}, rounds=3, seconds=1)
    assert record["times"].keys() == {"_int_mm"}
    assert record["notes"]["wrong"].startswith("Mismatch: off by")
    assert record["notes"]["broken"].startswith("AttributeError")
    assert record["notes"]["crashed"] == "crashed"
    assert told[-1] == {"started": f"{problem.label}, timing"}
    assert issubclass(Mismatch, AssertionError)


def test_floors():
    pytest.importorskip("torch")
    from benchmarks.gpu.worker import floor_seconds

    rates = {"copy": 10.0, "int8": 1000.0, "bf16": 500.0, "fp16": 250.0}
    p = Matmul(10, 10, 10, "int32")
    assert floor_seconds(p, 1, rates) == 2.0
    assert floor_seconds(p, 100, rates) == 10.0


# A process that dies


def test_a_crash_costs_one_case(monkeypatch, tmp_path):
    """Each process reports until it meets the bad case; the next one leaves that out."""
    log = tmp_path / "log.jsonl"
    commands = []

    class Process:
        def __init__(self, command):
            options = json.loads(command[-1])
            commands.append(options)
            self.returncode = 0
            with log.open("a") as file:
                for name in ("a", "b", "c"):
                    if name in options["done"]:
                        continue
                    file.write(json.dumps({"started": name}) + "\n")
                    if name == "b" and "b" not in options["culprits"]:
                        file.write('{"mode": "b", "o')  # cut off
                        self.returncode = -6
                        break
                    file.write(json.dumps({"mode": name, "ok": name != "b", "note": ""}) + "\n")

        def poll(self):
            return self.returncode

    monkeypatch.setattr(run.subprocess, "Popen", Process)
    assert run.supervise(tmp_path, log, {"groups": ["modes"]}, deadline=float("inf"))
    assert [options["culprits"] for options in commands] == [[], ["b"]]
    assert [options["done"] for options in commands] == [[], ["a"]]


def test_table():
    label = "NPUNsaCompressAttention S4096 N64/4 D128/128 bf16"
    times = {"opferry default": {"median": 1e-3}, "opferry keys=32": {"median": 0.5e-3}}
    records = [
        {"mode": "x", "ok": True, "note": "", "poisoned": True},
        {"mode": "y", "ok": None, "note": "no kernel"},
        {"ceilings": {"copy": 4e12, "int8": 1e15, "fp16": 8e14, "bf16": 7e14}},
        {"problem": label, "group": "nsa", "times": times, "notes": {}, "floor": 0.25e-3},
    ]
    text = table.render("cuda-sm_90", 3, records, ["left"])
    assert "1 of 2 modes are right, 0 in memory without poison." in text
    assert "- not built (1): no kernel" in text
    assert "copy 4.00 TB/s, int8 1000 T/s, fp16 800 T/s, bf16 700 T/s" in text
    assert f"| {label} | 0.5 | keys=32 | 1 | 0.71 | published, H100 | 1.42 | 0.50 |" in text
    assert "Not done: left" in text
    assert table.all_right(records)
    assert not table.all_right([*records, {"mode": "z", "ok": False, "note": "wrong"}])
    wrong = {"problem": "p", "group": "gemm", "times": {}, "notes": {"opferry default": "Mismatch"}}
    assert not table.all_right([*records, wrong])
