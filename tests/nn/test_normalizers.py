"""Running moments per task against the plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtrl.nn.heads import ValueHead
from mtrl.nn.normalizers import MeanRewardScale, TaskMoments, preserve_outputs_
from mtrl.types import Obs, Step


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


def step(reward: list[float], task: list[int], active: list[bool] | None = None) -> Step:
    obs: Any = Obs({}, np.array(task), np.zeros(len(task), bool))
    no = np.zeros(len(task), bool)
    on = np.array(active) if active else ~no
    return Step(obs, None, np.array(reward), no, no, no, obs, on)  # type: ignore[arg-type]


def test_mean_reward_scale_brings_all_tasks_to_the_most_rewarding_ones_mean() -> None:
    scale = MeanRewardScale(4, every=2)
    none = np.zeros(4)
    scale.observe(step([1, 0.2, 4], [0, 1, 2]))
    np.testing.assert_array_equal(scale.divisors(none, none), 1)  # not yet time
    scale.observe(step([1, 0, -6, 99], [0, 1, 2, 3], [True, True, True, False]))
    np.testing.assert_allclose(1 / scale.divisors(none, none), [5, 50, 1, 1])  # means 1, .1, 5 and none
    tiny = MeanRewardScale(2, every=1, largest=100)
    tiny.observe(step([1e-9, 1], [0, 1]))
    np.testing.assert_allclose(1 / tiny.divisors(none, none), [100, 1])
    other = MeanRewardScale(4, every=2)
    other.load_state_dict(scale.state_dict())
    for one in (scale, other):
        one.observe(step([1], [3]))
        one.observe(step([1], [3]))
    np.testing.assert_array_equal(scale.divisors(none, none), other.divisors(none, none))
    assert float(1 / scale.divisors(none, none)[3]) == pytest.approx(5)


def test_popart_keeps_every_tasks_values_when_the_moments_change() -> None:
    head = ValueHead(3, 5, (4,), per_task=True).double()
    last: Any = head.net.layers[-1]
    rng = np.random.default_rng(0)
    before, after = ((rng.normal(0, 9, 3), rng.uniform(0.1, 20, 3)) for _ in range(2))
    features, task = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3

    def values(moments: tuple[Any, Any]) -> Any:
        mean, std = (x[task] for x in moments)
        return head(features, task).detach().numpy() * std + mean

    expected = values(before)
    preserve_outputs_(last, before, after)
    np.testing.assert_allclose(values(after), expected)
    shared: Any = ValueHead(3, 5, per_task=False).net.layers[-1]
    with pytest.raises(ValueError, match="a head per task"):
        preserve_outputs_(shared, before, after)
