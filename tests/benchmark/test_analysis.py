"""What is concluded from runs, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtrl.benchmark import stats, store
from mtrl.benchmark.analysis import analyse

Writer = Callable[..., Path]


def test_a_tie_has_no_single_winner(tmp_path: Path, grid_writer: Writer) -> None:
    found = analyse(store.load(grid_writer(tmp_path, {"one": 0.0, "other": 0.0}, ["s/x"], seeds=5)))
    assert found.suites[0].verdict.startswith("one and other have the highest IQM of the score, 0.00. Between")


def test_a_clear_winner_is_called_one(tmp_path: Path, grid_writer: Writer) -> None:
    found = analyse(store.load(grid_writer(tmp_path, {"weak": 0.2, "strong": 0.9}, ["s/x"], seeds=5)))
    (suite,) = found.suites
    assert [entry.agent for entry in suite.entries] == ["strong", "weak"]
    assert "strong has the highest IQM" in suite.verdict
    assert "it beats weak" in suite.verdict
    assert suite.cautions == ()
    assert suite.improvement["strong", "weak"].low > 0.5
    assert suite.improvement["weak", "strong"].high < 0.5


def test_equals_are_not_ranked(tmp_path: Path, grid_writer: Writer) -> None:
    (suite,) = analyse(store.load(grid_writer(tmp_path, {"one": 0.6, "two": 0.6}, ["s/x"], seeds=5))).suites
    assert "no difference that may be claimed" in suite.verdict
    assert any("intervals of the IQM overlap" in text for text in suite.cautions)


def test_agents_are_compared_by_as_many_draws_as_the_rest(tmp_path: Path, grid_writer: Writer) -> None:
    """Fewer leave the ends of an interval, and so what may be claimed, to chance."""
    found = analyse(store.load(grid_writer(tmp_path, {"one": 0.6, "two": 0.6}, ["s/x"], seeds=5)))
    (suite,) = found.suites
    ours, theirs = (entry.scores for entry in suite.entries)
    by_draws = {draws: stats.improvement(ours, theirs, draws) for draws in (stats.PROFILE_DRAWS, stats.DRAWS)}
    assert found.draws == stats.DRAWS
    assert by_draws[stats.PROFILE_DRAWS] != by_draws[stats.DRAWS]
    first, second = (entry.agent for entry in suite.entries)
    assert suite.improvement[first, second] == by_draws[stats.DRAWS]


def test_few_runs_are_hints_and_one_run_is_nothing(tmp_path: Path, grid_writer: Writer) -> None:
    few = analyse(store.load(grid_writer(tmp_path / "a", {"weak": 0.2, "strong": 0.9}, ["s/x"], seeds=3))).suites[0]
    assert "it seems to beat weak" in few.verdict
    assert any("only 10 distinct resamples" in text for text in few.cautions)
    one = analyse(store.load(grid_writer(tmp_path / "b", {"weak": 0.2, "strong": 0.9}, ["s/x"], seeds=1))).suites[0]
    assert "beat" not in one.verdict
    assert any("One run says nothing" in text for text in one.cautions)


def test_alone_nothing_is_compared(tmp_path: Path, grid_writer: Writer) -> None:
    (suite,) = analyse(store.load(grid_writer(tmp_path, {"one": 0.6}, ["s/x"], seeds=5))).suites
    assert "Nothing is compared" in suite.verdict
    assert suite.improvement == {}


def test_curves_costs_and_thresholds(tmp_path: Path, run_writer: Writer) -> None:
    for seed in range(2):
        run_writer(tmp_path, "a", "s/x", seed, skill=2.0, speed=1000.0)  # clipped to about 1 on every task
    (entry,) = analyse(store.load(tmp_path)).suites[0].entries
    assert entry.curve.steps.tolist() == [50_000 * k for k in range(1, 7)]
    np.testing.assert_allclose(entry.curve.hours, entry.curve.steps / 1000 / 3600)
    assert entry.core_hours == pytest.approx(300 / 3600)
    assert entry.steps_per_core_hour == pytest.approx(3.6e6)
    assert entry.one_core_hour_buys() == f"12 runs to {entry.iqm.value:.2f}"
    assert entry.reached.runs == 2
    assert entry.reached.steps is not None
    assert 50_000 < entry.reached.steps <= 300_000
    assert entry.reached.hours == pytest.approx(entry.reached.steps / 3.6e6)


def test_a_rival_that_wins_more_often_is_not_called_equal(tmp_path: Path) -> None:
    lines = ["step,task,seed,score"]
    for name, scores in {"a": (0.90, 0.90, 0.80), "b": (0.91, 0.91, 0.10)}.items():
        rows = [
            f"100,toy/{task},{seed},{score}" for seed in range(5) for task, score in zip("xyz", scores, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join([*lines, *rows]))
        store.import_curves(tmp_path, tmp_path / f"{name}.csv", agent=name, suite="toy")
    (suite,) = analyse(store.load(tmp_path)).suites
    assert [entry.agent for entry in suite.entries] == ["a", "b"]
    assert "Yet b did better more often" in suite.verdict
    assert "no difference" not in suite.verdict


def test_iqm_of_runs_averages_the_tasks_first(tmp_path: Path, run_writer: Writer) -> None:
    for seed in range(5):
        run_writer(tmp_path, "a", "toy", seed)
    entry = analyse(store.load(tmp_path)).suites[0].entries[0]
    means = sorted(entry.scores.mean(1))
    assert entry.iqm_of_runs == pytest.approx(sum(means[1:4]) / 3)  # of five runs one is cut at each end
    assert entry.iqm_of_runs != pytest.approx(entry.iqm.value)


def test_a_long_run_is_cut_at_one_core_hour(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0, speed=50_000 / 1800)  # an evaluation every half hour
    (entry,) = analyse(store.load(tmp_path)).suites[0].entries
    assert entry.one_core_hour_buys() == f"a score of {entry.curve.points[1].value:.2f}"


def test_unfinished_runs_do_not_count(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0)
    run_writer(tmp_path, "a", "s/x", 1, finished=False)
    (entry,) = analyse(store.load(tmp_path)).suites[0].entries
    assert entry.seeds == (0,)


def test_over_all_suites_only_agents_that_did_all(tmp_path: Path, grid_writer: Writer, run_writer: Writer) -> None:
    grid_writer(tmp_path, {"a": 0.5, "b": 0.7}, ["s/x", "s/y"], seeds=2)
    run_writer(tmp_path, "c", "s/x", 0)
    overall = analyse(store.load(tmp_path)).overall
    assert list(overall) == ["b", "a"]
    assert overall["a"][0] == 2


def test_transfer_needs_a_task_in_two_suites(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/alone", 0, tasks=("toy/a",), skill=0.5)
    run_writer(tmp_path, "a", "s/mix", 0, tasks=("toy/a", "toy/b"), skill=0.9)
    (found,) = analyse(store.load(tmp_path)).transfer
    assert (found.task, found.alone_in, found.mixed_in) == ("toy/a", "s/alone", "s/mix")


def test_forgetting_is_what_was_lost_since_the_best(tmp_path: Path, run_writer: Writer) -> None:
    source = tmp_path / "c.csv"
    run_writer(tmp_path, "a", "s/x", 0, tasks=("t/a", "t/b"))
    source.write_text("step,task,seed,score\n1,t/a,0,.2\n2,t/a,0,.9\n3,t/a,0,.5\n1,t/b,0,.1\n2,t/b,0,.2\n3,t/b,0,.3\n")
    store.import_curves(tmp_path, source, agent="z")
    (entry,) = [entry for entry in analyse(store.load(tmp_path)).suites[0].entries if entry.agent == "z"]
    np.testing.assert_allclose(entry.forgotten, [0.4, 0.0])
    assert entry.core_hours is None
    assert entry.one_core_hour_buys() == "-"


def test_a_run_without_all_tasks_is_left_out_aloud(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "a", "s/x", 0, tasks=("t/a", "t/b"))
    source = tmp_path / "c.csv"
    source.write_text("step,task,seed,score\n7,t/a,0,.2\n7,t/b,0,.9\n9,t/a,1,.4\n9,t/b,1,.5\n9,t/a,2,1\n")
    store.import_curves(tmp_path, source, agent="z")
    (suite,) = analyse(store.load(tmp_path)).suites
    (entry,) = [entry for entry in suite.entries if entry.agent == "z"]
    assert entry.seeds == (0, 1), "runs that end at different steps still have an end"
    np.testing.assert_allclose(entry.scores, [[0.2, 0.9], [0.4, 0.5]])
    assert entry.curve.steps.tolist() == [9], "but no evaluation in common"
    assert any("z (seed 2)" in text for text in suite.cautions)
