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

from benchmarks import check, inputs, plot, run, shapes, timing  # noqa: E402
from benchmarks.shapes import Attention, Case, Encoder, Longformer, Matmul, Nsa  # noqa: E402
from benchmarks.timing import Plan, Series, Turn  # noqa: E402

KINDS = {"int8", "int8-256", "int16-512", "int16-256", "fp32", "bf16", "read"}


def series(*turns):
    """Series from (seconds, clean) of rounds 0, 1, ..."""
    return Series([Turn(i, tuple(np.atleast_1d(s)), clean) for i, (s, clean) in enumerate(turns)])


def test_table_names_are_unique_and_goals_sensible():
    names = [case.name for case in shapes.CASES]
    assert len(set(names)) == len(names)
    for case in shapes.CASES:
        assert case.of_limit is None or 0 < case.of_limit <= 1
        assert all(0.5 < ratio < 10 for _, ratio in case.of_peers)
        assert case.problem.work.keys() <= KINDS
        assert all(work > 0 for work in case.problem.work.values())


def test_every_group_has_a_quick_case_or_is_a_sweep():
    quick = {case.group for case in shapes.select(quick=True)}
    assert set(shapes.GROUPS) - quick <= {"tiers"}


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
    assert {case.problem.op for case in shapes.select(**arguments)} == found


@pytest.mark.parametrize(
    ("problem", "cells"),
    [
        (Attention(1, 1, 1, 5, 5, 8), 25),
        (Attention(1, 1, 1, 5, 5, 8, mask="causal"), 15),
        (Attention(1, 1, 1, 1, 7, 8), 7),
        (Attention(1, 1, 1, 300, 300, 8, mask="band"), 256 * 257 // 2 + 44 * 256),
    ],
    ids=["full", "causal", "decode", "band"],
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


def test_cold_work_is_bytes():
    assert Matmul(1, 8, 16, "int8", cold=True).work == {"read": 128}


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
    ours, theirs = series(([1.0, 8.0], False), (5.0, False)), series((2.0, False), (4.0, False))
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
        {"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, plan, lambda: next(gauge)
    )
    assert order[4:8] == ["a", "b", "b", "a"]  # after two calls each to warm up
    assert [turn.clean for turn in found["a"].turns] == [False, True]
    assert found["b"].median == 2.0


def fake_record(of_limit=0.9, peers=(("", 1.1),), **rounds):
    case = Case("gemm", Matmul(10, 20, 30, "int8"), of_limit, peers)
    named = {name.replace("_", " "): seconds for name, seconds in rounds.items()}
    measured = {name: series((s, True), (s, True)) for name, s in named.items()}
    record = run.evaluate(case, measured, {"int8": 12000.0})
    record["left_out"] = {"torch": "No module named 'torch'"}
    return record


def test_evaluate():
    record = fake_record(opferry=2.0, slow_peer=6.0, fast_peer=3.0, limit_int8=1.0)
    assert record["candidates"]["opferry"]["rate"] == 6000.0
    assert record["limits"]["int8"]["rate"] == 12000.0
    assert record["of_limit"]["median"] == 0.5
    assert record["best"] == {"": "fast peer"}
    assert run.goals(record) == [("limit", 0.5, 0.9), ("fast peer", 1.5, 1.1)]


def test_evaluate_without_limit_or_peers():
    case = Case("gemm", Matmul(10, 20, 30, "int8"), 0.9, (("", 1.1),))
    record = run.evaluate(case, {"opferry": series((2.0, True))}, {})
    assert record["of_limit"] is None
    assert run.goals(record) == []


def test_evaluate_neighbour_is_compared_per_operation():
    neighbour = Matmul(20, 20, 30, "int8")
    case = Case("odd", Matmul(10, 20, 30, "int8"), None, (("", 0.77),), neighbour=neighbour)
    turns = ((1.0, True), (1.0, True))
    record = run.evaluate(
        case, {"opferry": series(*turns), "neighbour opferry": series(*turns)}, {}
    )
    assert record["speedup"]["neighbour opferry"]["median"] == 0.5  # as long for half the work


def test_report_goes_through_json_text_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    record = fake_record(opferry=2.0, peer=3.0, limit_int8=1.0)
    report = json.loads(json.dumps({"machine": run.machine(), "cases": [record]}))
    assert report["machine"].keys() >= {"cpu", "threads", "date", "commit", "versions"}
    assert set(record) == {
        *("group", "case", "op", "operations", "work", "goals", "candidates", "limits"),
        *("of_limit", "speedup", "best", "left_out"),
    }
    assert "MISSED" in run.table(record)
    assert "| 0.50 (0.90) | peer | 1.50 (1.10) |" in run.summary(report["cases"])
    plot.plot(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


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
