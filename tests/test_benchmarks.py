"""The benchmarks' table and arithmetic; nothing here depends on how fast anything is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

_ROOT = str(Path(__file__).parents[1])
if _ROOT not in sys.path:  # benchmarks are not part of the installed package
    sys.path.append(_ROOT)

benchmarks = pytest.importorskip("benchmarks", reason="a checkout is needed")

from benchmarks import (  # noqa: E402
    cases,
    check,
    goals,
    inputs,
    limits,
    machine,
    measure,
    plot,
    run,
    shapes,
    table,
    timing,
)
from benchmarks.cases import Case, OverPeer, Relative  # noqa: E402
from benchmarks.shapes import Attention, Encoder, Longformer, Matmul, Nsa  # noqa: E402
from benchmarks.timing import Plan, Series, Turn  # noqa: E402

KINDS = {"int8", "int8-256", "int8-amx", "int16-512", "int16-256"}
KINDS |= {"fp32", "bf16", "bf16-amx", "read"}


@pytest.fixture(autouse=True)
def host_without_tiles(monkeypatch):
    """Whatever this machine is, work done on it is judged by vector instructions."""
    monkeypatch.setattr(shapes, "_instruction", lambda t: shapes.INSTRUCTION.get(t, "int8"))
    monkeypatch.setattr(shapes, "bf16_instruction", lambda: "bf16")


def series(*turns):
    """Series from (seconds, clean) of rounds 0, 1, ..."""
    return Series([Turn(i, tuple(np.atleast_1d(s)), clean) for i, (s, clean) in enumerate(turns)])


def test_table_names_are_unique_and_goals_sensible():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for case in cases.CASES:
        assert case.of_limit is None or 0 < case.of_limit <= 1
        assert all(1 < asked.least < 10 for asked in case.over_peers)
        assert all(0.5 < relative.most < 3 for relative in case.relative)
        assert (case.measure == "speed") == (case.most is None)
        assert case.problem.work.keys() <= KINDS
        assert all(work > 0 for work in case.problem.work.values())


def test_every_group_has_a_quick_case_or_is_a_sweep():
    quick = {case.group for case in cases.select(quick=True)}
    assert set(cases.GROUPS) - quick <= {"tiers"}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"groups": ["model"]}, {"MiniLM"}),
        ({"pattern": "longformer.*s1024 g1$"}, {"QOrderedLongformerAttention"}),
        ({"groups": ["gemm"], "pattern": "S512"}, set()),
    ],
    ids=["group", "pattern ignores case", "nothing"],
)
def test_select(arguments, found):
    assert {case.problem.op for case in cases.select(**arguments)} == found


@pytest.mark.parametrize(
    ("problem", "cells"),
    [
        (Attention(1, 1, 1, 5, 5, 8), 25),
        (Attention(1, 1, 1, 5, 5, 8, mask="causal"), 15),
        (Attention(1, 1, 1, 1, 7, 8), 7),
        (Attention(1, 1, 1, 300, 300, 8, mask="band"), 256 * 257 // 2 + 44 * 256),
        # rows of 2 2 3 4 5 6 7 8 keys: two are seen by all
        (Attention(1, 1, 1, 8, 8, 8, mask="prefix"), 37),
        (Attention(1, 1, 1, 5, 5, 8, mask="causal", lengths=(2, 3)), 3 + 6),
    ],
    ids=["full", "causal", "decode", "band", "prefix", "packed"],
)
def test_attention_cells(problem, cells):
    assert problem.cells == cells
    assert inputs.kept(problem, np.arange(problem.S1)).sum() == cells


def test_longformer_cells_count_a_global_key_in_the_window_once():
    p = Longformer(S=12, G=2, hidden=4, heads=1, W=2)
    i, j = np.arange(12)[:, None], np.arange(12)[None]
    assert p.cells == ((abs(i - j) <= 2) | (j < 2) | (i < 2)).sum()


def test_nsa_operations_are_those_of_visible_keys():
    p = Nsa(S=256, D=64, N1=4, N2=1)
    assert p.operations == 2 * 4 * (~inputs.inputs(p).hidden).sum() * (64 + 128)


def test_tiles_are_judged_by_tiles(monkeypatch):
    monkeypatch.setattr(shapes, "_instruction", lambda t: "int8-amx")
    monkeypatch.setattr(shapes, "bf16_instruction", lambda: "bf16-amx")
    assert Matmul(2, 3, 5, "int8").work == {"int8-amx": 60}
    work = Attention(1, 2, 1, 3, 4, 8, "bf16").work
    assert work == {"bf16-amx": 4 * 2 * 3 * 4 * 8, "fp32": 22 * 2 * 3 * 4}
    p = Nsa(S=256, D=64, dtype="bf16", N1=4, N2=1)
    assert p.work == {"bf16-amx": p.operations, "fp32": 22 * p.operations / (2 * (64 + 128))}
    assert shapes.vector_work(p) == {"bf16": p.operations}


def test_work_by_hand():
    assert Matmul(2, 3, 5, "int8").work == {"int8": 60}
    assert Matmul(2, 3, 5, "int32", target="x86-avx2").work == {"int16-256": 60}
    assert Attention(1, 2, 1, 3, 4, 8).work == {"fp32": 4 * 2 * 3 * 4 * 8}
    # five projections of 2 tokens and one of a global token; 4 pairs of each head
    p = Longformer(S=2, G=1, hidden=4, heads=2, W=2)
    assert p.work == {"int8": 2 * 16 * 11, "fp32": 4 * 4 * 4}


def test_cold_work_is_bytes_of_copies_that_no_cache_holds():
    p = Matmul(1, 4096, 4096, "int8", cold=True)
    assert (p.work, p.copies) == ({"read": 2**24}, 8)
    p = Attention(1, 32, 8, 1, 4096, 128, "bf16")
    assert (p.work, p.copies) == ({"read": 2 * 8 * 4096 * 128 * 2}, 32)
    assert Matmul(1, 4096, 4096, "int8").copies == 1


def test_clean_turns_count_alone_when_there_are_two():
    assert series((1.0, True), (9.0, False), (3.0, True)).median == 2.0
    assert series((1.0, True), (9.0, False), (3.0, False)).median == 3.0


def test_speedup_is_paired_by_round():
    # The machine is twice as slow in round 1; ours is always 2x.
    ours, theirs = series((1.0, True), (2.0, True)), series((2.0, True), (4.0, True))
    ratio = timing.speedup(ours, theirs)
    assert (ratio.median, ratio.rounds, ratio.clean) == (2.0, 2, True)


def test_speedup_skips_rounds_that_were_disturbed():
    ours = series((1.0, True), (50.0, False), (1.0, True))
    theirs = series((3.0, True), (3.0, True), (3.0, True))
    assert timing.speedup(ours, theirs).median == 3.0


def test_speedup_compares_the_fastest_where_nothing_was_clean():
    ours, theirs = series(([1.0, 8.0], False), (4.0, False)), series((2.0, False), (8.0, False))
    ratio = timing.speedup(ours, theirs)
    assert ratio.median == 2.0
    assert not ratio.clean


def test_weighted_sum():
    total = timing.weighted_sum(
        [(series((1.0, True), (2.0, True)), 10), (series((0.5, True), (0.5, False)), 2)]
    )
    assert [np.median(turn.seconds) for turn in total.turns] == [11.0, 21.0]
    assert [turn.clean for turn in total.turns] == [True, False]


def test_quantile():
    assert timing.quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert timing.quantile([1.0, 2.0, 4.0], 0.75) == 3.0


def test_interleave_takes_turns_and_marks_disturbed_ones():
    order = []

    def candidate(name, seconds):
        def timed():
            order.append(name)
            return seconds

        return timed

    gauge = iter([True, False, *[True] * 100])  # disturbed after the first turn of a
    plan = Plan(seconds=0, turns=2, batch_calls=1, settle_seconds=0, patience_seconds=0)
    found = timing.interleave(
        {"a": candidate("a", 0.1), "b": candidate("b", 0.2)}, plan, lambda: next(gauge)
    )
    assert order[4:8] == ["a", "b", "b", "a"]  # after two calls each to warm up
    assert [turn.clean for turn in found["a"].turns] == [False, True]
    assert found["b"].median == 0.2


def test_settle_returns_when_threads_sleep_and_when_patience_ends(monkeypatch):
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    used = iter([0.0, 0.9, 1.0, 1.01])  # busy, then not
    clock = iter([0.0, 0.1, 0.2, 1.2, 1.3, 1.4, 2.4])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(used))
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    timing.settle(10.0)
    assert not list(used)
    monkeypatch.setattr(timing.time, "monotonic", iter([0.0, 0.0]).__next__)
    timing.settle(0.0)


def test_limits_are_of_the_instructions_that_are_here():
    limit = limits.Limit("read", threads=1, seconds=1e-4, footprint=1 << 20)
    assert limit() > 0
    assert limit.work % (1 << 20) == 0
    assert len(limit.thread_rates) == 1
    with pytest.raises(limits.Unavailable, match="no limit 'int3'"):
        limits.Limit("int3")


INT8 = Matmul(10, 20, 30, "int8")


FUSED = Case("gemm", INT8, 0.9, (OverPeer(1.1),))


def fake_record(case=FUSED, **rounds):
    named = {name.replace("_", " "): seconds for name, seconds in rounds.items()}
    measured = {name: series((s, True), (s, True)) for name, s in named.items()}
    work = {"int8": 12000.0} if "limit int8" in measured else {}
    record = measure.evaluate(case, measured, work)
    record["goals"] = goals.judge(case, record)
    return record


def judged(record):
    return [(g["what"], round(g["reached"], 3), g["asked"], g["verdict"]) for g in record["goals"]]


def test_evaluate():
    record = fake_record(opferry=2.0, slow_peer=6.0, fast_peer=3.0, limit_int8=1.0)
    assert record["candidates"]["opferry"]["rate"] == 6000.0
    assert record["limits"]["int8"]["rate"] == 12000.0
    assert record["of_limit"]["median"] == 0.5
    assert goals.fastest_peer(record) == "fast peer"
    assert judged(record) == [("limit", 0.5, 0.9, "missed"), ("fast peer", 1.5, 1.1, "reached")]


def test_matrix_tiles_are_judged_by_vectors(monkeypatch):
    monkeypatch.setattr(shapes, "_instruction", lambda target: "int8-amx")
    measured = {"opferry": 2.0, "limit int8-amx": 0.5, "limit int8": 1.6}
    found = {name: series((s, True), (s, True)) for name, s in measured.items()}
    record = measure.evaluate(FUSED, found, {"int8-amx": 12000.0, "int8": 6000.0})
    record["goals"] = goals.judge(FUSED, record)
    assert record["of_limit"]["median"] == 0.25
    assert judged(record) == [("vector limit", 1.6, 0.9, "reached")]
    found = {"machine": machine.machine(), "took_s": 61.0, "cases": [record]}
    assert "| 0.25; 1.60 (0.90) of vectors' |" in table.markdown(found)


def test_evaluate_without_limit_or_peers():
    record = fake_record(opferry=2.0)
    assert record["of_limit"] is None
    assert record["goals"] == []


def test_goal_that_the_limit_leaves_no_room_for():
    record = fake_record(opferry=1.0, peer=1.0, limit_int8=0.97)
    assert judged(record)[1] == ("peer", 1.0, 1.1, "beyond the machine")
    assert record["goals"][1]["note"] == ("peer at 0.97 of the limit; 1.10x is beyond the machine")


def test_disturbed_ratios_do_not_excuse():
    record = fake_record(opferry=1.0, peer=1.0, limit_int8=0.97)
    record["of_limit"]["clean"] = False
    (_, goal) = goals.judge(FUSED, record)
    assert (goal["verdict"], goal["note"]) == ("missed", "")


@pytest.mark.parametrize(("limit", "asked"), [(0.96, 1.0), (0.94, 1.1)], ids=["near", "below"])
def test_peer_near_the_limit_need_only_be_met(limit, asked):
    case = Case("gemm", INT8, None, (OverPeer(1.1, near_limit=1.0),))
    (goal,) = fake_record(case, opferry=1.0, peer=1.0, limit_int8=limit)["goals"]
    assert goal["asked"] == asked


def test_goal_against_some_peers_only():
    case = Case("model", INT8, None, (OverPeer(2.0, "bf16"),))
    record = fake_record(case, opferry=1.0, peer_fp32=1.5, peer_bf16=3.0)
    assert judged(record) == [("peer bf16", 3.0, 2.0, "reached")]


@pytest.mark.parametrize(
    ("per_operation", "reached", "verdict"),
    [(False, 1.0, "reached"), (True, 2.0, "missed")],
    ids=["time", "time per operation"],
)
def test_evaluate_relative(per_operation, reached, verdict):
    other = Matmul(20, 20, 30, "int8")  # twice the work
    case = Case("odd", INT8, None, (), (Relative(other, 1.3, per_operation),))
    name = measure.RELATED + other.label
    record = fake_record(case, **{"opferry": 1.0, name: 1.0})
    what = "time per operation of " if per_operation else "time of "
    assert judged(record) == [(what + other.label, reached, 1.3, verdict)]


def test_memory_goal():
    case = Case("memory", INT8, measure="memory", most=float(1 << 20))
    record = measure.empty(case) | {"measured": float(3 << 20)}
    record["goals"] = goals.judge(case, record)
    assert judged(record) == [("bytes", 3 << 20, 1 << 20, "missed")]
    assert "3.0 MiB, at most 1.0 MiB: MISSED" in table.text(record)


@pytest.fixture
def report():
    """As JSON brings it back: a speed case, a crash, a memory case."""
    memory = Case("memory", INT8, measure="memory", most=float(4 << 20))
    grown = measure.empty(memory) | {"measured": float(3 << 20)}
    grown["goals"] = goals.judge(memory, grown)
    lost = measure.empty(Case("gemm", Matmul(1, 2, 3, "int8"), 0.5))
    lost["left_out"] = {"opferry": "the process ended with status -11"}
    speed = fake_record(opferry=2.0, peer=3.0, limit_int8=1.0)
    found = {"machine": machine.machine(), "took_s": 61.0, "cases": [speed, lost, grown]}
    return json.loads(json.dumps(found))


def test_table(report):
    assert report["machine"].keys() >= {"cpu", "threads", "date", "commit", "versions"}
    found = table.markdown(report)
    assert "Goals: 2 reached, 1 missed, 0 beyond the machine" in found
    assert "| **0.50 (0.90)** | 1.50 (1.10) peer |  |" in found
    assert "not measured: the process ended with status -11" in found
    assert "| 3.0 MiB (at most 4.0 MiB) |" in found


def test_table_goes_between_the_markers_of_a_document():
    document = f"before\n{table.BEGIN}old\n{table.END}after\n"
    found = table.put_into(document, "new")
    assert found == f"before\n{table.BEGIN}\nnew\n\n{table.END}after\n"
    assert table.put_into(found, "new") == found
    with pytest.raises(ValueError, match="the document needs the lines"):
        table.put_into("no markers", "new")


def test_readme_has_the_markers():
    text = (Path(_ROOT) / "benchmarks" / "README.md").read_text()
    assert table.BEGIN in text
    assert table.END in text


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    plot.plot(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_workers(monkeypatch):
    """Cases are "measured" here, all but the first tier, whose worker is lost."""

    class Worker:
        def __init__(self, plan, peers):
            pass

        def measure(self, case, seconds):
            if case == cases.select(["tiers"])[0]:
                raise run._Lost("no result after 1 s")
            return measure.empty(case)

        def stop(self):
            pass

    monkeypatch.setattr(run, "_Worker", Worker)


def test_lost_worker_costs_one_case(no_workers):
    chosen = cases.select(["tiers"])[:3]
    found = list(run.records(chosen, Plan()))
    assert [record["case"] for record in found] == [case.name for case in chosen]
    assert [bool(record["left_out"]) for record in found] == [True, False, False]


def test_report_is_resumed_in_the_order_of_the_table(no_workers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "use_threads", lambda: None)
    path = tmp_path / "build" / "report.json"
    tiers = [case.name for case in cases.select(["tiers"])]
    for pattern in ("avx512", ""):
        options = ["--group", "tiers", "--case", pattern, "--json", str(path), "--resume"]
        assert run.main(options) == 0
    assert [record["case"] for record in json.loads(path.read_text())["cases"]] == tiers
    with pytest.raises(SystemExit):
        run.main(["--resume"])
    assert "--resume needs --json" in capsys.readouterr().err


def matmul_result(p):
    a = inputs.inputs(p)
    total = a.A.astype(np.int64) @ a.W.T.astype(np.int64) + a.int_bias
    return np.clip(np.rint(total * a.scale.astype(np.float64)), -128, 127).astype(np.int8)


def test_check_tells_right_from_wrong():
    p = Matmul(7, 5, 33, "int8")
    right = matmul_result(p)
    check.check(p, right)
    wrong = right.copy()
    wrong[-1, 2] += 2
    with pytest.raises(check.Mismatch, match="off by"):
        check.check(p, wrong, check.PEER_SLACK)
    with pytest.raises(check.Mismatch, match="found shape"):
        check.check(p, right[:, :-1])


def test_inputs_are_the_same_for_all_and_differ_by_seed():
    p = Encoder(1, 16)
    assert inputs.inputs(p) is inputs.inputs(p)
    assert not np.array_equal(inputs.inputs(p).input_ids, inputs.inputs(p, 1).input_ids)


def test_list_option(capsys):
    assert run.main(["--list", "--group", "model"]) == 0
    assert "MiniLM B8 S256" in capsys.readouterr().out
    assert run.main(["--case", "nothing is called so"]) == 2
