"""Prioritised level replay: probabilities, and how value errors become scores, against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from mtrl.levels import Levels
from mtrl.types import Episode, Journal

BOTH = np.array([True, True])


def episode(slot: int, task: int, seed: int, length: int) -> Episode:
    return Episode(task, slot, 0, seed, 0.0, length, None, None, True, Journal("x", seed, np.zeros(length)))


def levels(capacity: int = 3) -> Levels:
    """Two tasks, the second one's scores ten times as wide; a slot of one row and one of a team of two."""
    return Levels(np.array([1.0, 10.0]), [slice(0, 1), slice(1, 3)], capacity)


def test_probabilities_follow_ranks_and_staleness() -> None:
    found = levels()
    assert not found.probs(BOTH).any()
    found.score[0], found.clock[0] = [3.0, 1.0, 2.0], 10
    found.drawn[0] = [10, 8, 4]
    ranks = np.array([0.99901, 1.69e-5, 9.76e-4])  # 1 / rank^10, normalised
    expected = 0.9 * ranks + 0.1 * np.array([0, 2, 6]) / 8
    np.testing.assert_allclose(found.probs(BOTH)[0], expected, atol=1e-5)
    found.score[1, 1], found.drawn[1, 1] = 2.5, 10  # tasks compete by rank
    assert found.probs(BOTH).argmax() == 0
    assert found.probs(BOTH)[1, 1] == pytest.approx(0.9 * 2**-10 / sum(k**-10.0 for k in range(1, 5)))
    np.testing.assert_allclose(found.probs(np.array([False, True])), [[0, 0, 0], [0, 1, 0]])


def test_scores_are_mean_errors_of_whole_episodes() -> None:
    """Slot 0 ends after 2 of 3 steps, and again after 3 of the next 4 and of one before; the team's dead rows are left
    out."""
    found = levels()
    nan = np.nan
    found.finished(episode(0, 0, seed=7, length=2))
    found.learned(np.array([[1.0, 1, 1], [2.0, nan, 3], [6.0, nan, 5]]))
    assert (found.seed[0, 0], found.score[0].tolist()) == (7, [1.5, -1, -1])
    found.finished(episode(1, 1, seed=8, length=4))
    found.finished(episode(0, 0, seed=9, length=4))
    found.learned(np.array([[0.0, nan, 10], [0.0, 50, 50], [2.0, 50, 50], [9.0, 50, 50]]))
    assert (found.seed[0, 1], found.score[0].tolist()) == (9, [1.5, 2, -1])
    assert (found.seed[1, 0], found.score[1].tolist()) == (8, [(1 + 1 + 3 + 5 + 10) / 5 / 10, -1, -1])
    assert found.before.tolist() == [1, 3]
    found.finished(episode(0, 0, seed=7, length=1))
    found.learned(np.zeros((0, 3)))
    assert found.score[0].tolist() == [9, 2, -1], "a level that is played again has its last score"


def test_a_full_task_keeps_the_highest_scores() -> None:
    found = levels(capacity=2)
    for seed, error in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.2)):
        found.clock += 1
        found.finished(episode(0, 0, seed, length=1))
        found.learned(np.full((1, 3), error))
    assert (found.seed[0].tolist(), found.score[0].tolist()) == ([1, 3], [0.5, 0.4])
    assert found.drawn[0].tolist() == [1, 3]


def test_errors_that_do_not_cover_the_steps_are_refused() -> None:
    found = levels()
    found.finished(episode(0, 0, seed=7, length=4))
    with pytest.raises(ValueError, match="slot 0 played 4 steps since the last update, which learned from 3"):
        found.learned(np.zeros((3, 3)))
