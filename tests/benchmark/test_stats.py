"""Statistics: known answers, brute force, and (optionally) rliable."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mtrl.benchmark import stats
from mtrl.types import Array

SMALL = np.array([[0.0, 0, 1, 1], [0, 1, 1, 10]])


def test_known_answers() -> None:
    """Values of the paper's definitions, worked by hand."""
    assert stats.iqm(SMALL) == 0.75  # the middle four of 0 0 0 1 1 1 1 10
    assert stats.mean(SMALL) == 1.75
    assert stats.median(SMALL) == 0.75  # of task means 0, .5, 1, 5.5
    assert stats.optimality_gap(SMALL) == 0.375
    share, _, _ = stats.profile(SMALL, np.array([0.5, 1.0]), draws=10)
    assert share.tolist() == [0.625, 0.125]
    assert stats.improvement(np.array([[1.0], [2]]), np.array([[1.0], [1]]), draws=10).value == 0.75
    squares = np.arange(10.0).reshape(5, 2) ** 2  # k = floor(10 / 4) = 2: whole scores are cut, never fractions
    assert stats.iqm(squares) == pytest.approx(139 / 6)


def test_statistics_work_on_batches() -> None:
    batch = np.random.default_rng(0).normal(size=(7, 3, 4))
    for statistic in stats.STATISTICS.values():
        np.testing.assert_allclose(statistic(batch), [statistic(one) for one in batch])


def test_equal_runs_leave_no_uncertainty() -> None:
    same = np.tile([[0.1, 0.5, 0.9]], (4, 1))
    for statistic in stats.STATISTICS.values():
        found = stats.estimate(same, statistic, draws=50)
        assert found.low == pytest.approx(found.value)
        assert found.high == pytest.approx(found.value)
    assert stats.improvement(same, same, draws=50) == stats.Estimate(0.5, 0.5, 0.5)
    assert stats.improvement(same + 1, same, draws=50) == stats.Estimate(1.0, 1.0, 1.0)


def test_the_bootstrap_draws_from_the_exact_distribution() -> None:
    """Two runs, two tasks: sixteen equally likely resamples, enumerated."""
    scores = np.array([[0.0, 10.0], [1.0, 20.0]])
    exact = sorted(
        scores[list(a), 0].mean() + scores[list(b), 1].mean()
        for a in itertools.product(range(2), repeat=2)
        for b in itertools.product(range(2), repeat=2)
    )
    drawn = stats.bootstrap(scores, lambda sample: sample.mean(-2).sum(-1), draws=40_000)
    values, counts = np.unique(drawn.round(6), return_counts=True)
    expected, weights = np.unique(np.round(exact, 6), return_counts=True)
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(counts / 40_000, weights / 16, atol=0.01)


def test_runs_are_resampled_for_each_task_separately() -> None:
    """With one run better everywhere, resampling whole runs would spread the mean wider than tasks apart do."""
    scores = np.repeat([[0.0], [1.0]], 100, axis=1)
    spread = stats.bootstrap(scores, stats.mean, draws=4_000).std()
    assert spread == pytest.approx(math.sqrt(0.25 / 2 / 100), rel=0.1)


def test_an_interval_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(3).uniform(size=(5, 7))
    whole = stats.bootstrap(scores, stats.iqm, draws=999)
    monkeypatch.setattr(stats, "_CHUNK", 40)
    np.testing.assert_array_equal(stats.bootstrap(scores, stats.iqm, draws=999), whole)


def test_improvement_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.integers(4, size=(3, 5)).astype(float), rng.integers(4, size=(4, 5)).astype(float)
    pairs = [
        (a > b) + 0.5 * (a == b) for task in range(5) for a, b in itertools.product(ours[:, task], theirs[:, task])
    ]
    found = stats.improvement(ours, theirs)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.low < found.value < found.high
    back = stats.improvement(theirs, ours)
    assert back.value == pytest.approx(1 - found.value)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[runs, tasks\]"):
        stats.estimate(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        stats.estimate(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="same tasks"):
        stats.improvement(np.zeros((2, 3)), np.zeros((2, 4)))


def test_few_runs_have_few_resamples() -> None:
    assert [stats.distinct_resamples(n) for n in (1, 2, 3, 5)] == [1, 3, 10, 126]
    assert stats.Estimate(0.5, 0.4, 0.6).overlaps(stats.Estimate(0.7, 0.6, 0.8))
    assert not stats.Estimate(0.5, 0.4, 0.6).overlaps(stats.Estimate(0.7, 0.61, 0.8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of rliable's own dependencies
def test_rliable_agrees() -> None:
    metrics = pytest.importorskip("rliable.metrics")
    library = pytest.importorskip("rliable.library")
    rng = np.random.default_rng(5)
    ours, theirs = rng.beta(2, 2, size=(5, 10)), rng.beta(2, 3, size=(4, 10))
    theirs_by_name = {
        "IQM": metrics.aggregate_iqm,
        "median": metrics.aggregate_median,
        "mean": metrics.aggregate_mean,
        "optimality gap": metrics.aggregate_optimality_gap,
    }

    def all_four(scores: Array) -> Array:
        return np.array([theirs_by_name[name](scores) for name in stats.STATISTICS])

    points, intervals = library.get_interval_estimates({"a": ours}, all_four, reps=5_000)
    for i, statistic in enumerate(stats.STATISTICS.values()):
        found = stats.estimate(ours, statistic)
        assert found.value == pytest.approx(points["a"][i])
        assert found.low == pytest.approx(intervals["a"][0, i], abs=0.01)
        assert found.high == pytest.approx(intervals["a"][1, i], abs=0.01)

    taus = np.linspace(0, 1, 11)
    shares, bands = library.create_performance_profile({"a": ours}, taus, reps=2_000)
    share, low, high = stats.profile(ours, taus)
    np.testing.assert_allclose(share, shares["a"])
    np.testing.assert_allclose(np.stack([low, high]), bands["a"], atol=0.025)

    points, intervals = library.get_interval_estimates(
        {"p": (ours, theirs)}, lambda a, b: metrics.probability_of_improvement(a, b), reps=2_000
    )
    found = stats.improvement(ours, theirs)
    assert found.value == pytest.approx(float(np.squeeze(points["p"])))
    np.testing.assert_allclose([found.low, found.high], np.squeeze(intervals["p"]), atol=0.02)
