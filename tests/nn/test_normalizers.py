"""Running moments per task against the plain formulas."""

from __future__ import annotations

import numpy as np

from mtrl.nn.normalizers import TaskMoments


def test_the_first_update_is_debiased_and_later_ones_decay() -> None:
    rng = np.random.default_rng(0)
    moments = TaskMoments(3, decay=0.9)
    one, two = rng.normal(5, 2, 400), rng.normal(-1, 3, 100)
    moments.update(np.concatenate([one, two]), np.repeat([0, 2], [400, 100]))
    np.testing.assert_allclose(moments.mean, [one.mean(), 0, two.mean()])
    np.testing.assert_allclose(moments.std, [one.std(), 1, two.std()])
    more = rng.normal(0, 1, 50)
    moments.update(more, np.zeros(50, int))
    weights = np.array([0.09, 0.1]) / 0.19
    np.testing.assert_allclose(moments.mean[0], weights @ [one.mean(), more.mean()])
    second = weights @ [(one**2).mean(), (more**2).mean()]
    np.testing.assert_allclose(moments.std[0], np.sqrt(second - moments.mean[0] ** 2))
    np.testing.assert_allclose(moments.mean[2], two.mean())  # a task without data stays where it is


def test_normalize_and_denormalize_are_inverse_and_survive_the_state_dict() -> None:
    rng = np.random.default_rng(0)
    moments, other = TaskMoments(2), TaskMoments(2)
    x, task = rng.normal(7, 2, (30, 4)), rng.integers(0, 2, (30, 4))
    moments.update(x.ravel(), task.ravel())
    other.load_state_dict(moments.state_dict())
    np.testing.assert_allclose(other.denormalize(moments.normalize(x, task), task), x)


def test_the_variance_has_a_floor() -> None:
    moments = TaskMoments(1, floor=0.04)
    moments.update(np.zeros(10), np.zeros(10, int))
    assert moments.std[0] == 0.2
