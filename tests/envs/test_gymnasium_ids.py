"""``gym.make_vec("mtrl_envs:mtrl/...")``."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import mtrl_envs
from mtrl import registry
from mtrl.vector.views import make


def test_every_group_has_an_id() -> None:
    for name, groups in mtrl_envs.GROUPS.items():
        assert tuple(registry.suite(name).groups) == groups
        for group in groups:
            assert f"mtrl/{name}-{group}-v0" in gym.registry


@pytest.mark.parametrize(("num_envs", "copies"), [(1, 1), (3, 1), (6, 2)])
def test_rows_are_tasks_times_copies(num_envs: int, copies: int) -> None:
    """``make_vec``'s default of one environment means one copy of each task."""
    envs = gym.make_vec("mtrl_envs:mtrl/minigrid-mt3-v0", num_envs=num_envs)
    try:
        assert envs.num_envs == 3 * copies
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        observation, _ = envs.reset(seed=0)
        assert observation in envs.observation_space
        assert observation["task"].tolist() == [task for task in range(3) for _ in range(copies)]
        envs.action_space.seed(0)
        for _ in range(10):
            observation, reward, terminated, truncated, _ = envs.step(envs.action_space.sample())
            assert observation in envs.observation_space
            assert reward.shape == terminated.shape == truncated.shape == (3 * copies,)
    finally:
        envs.close()


def test_copies_in_the_suite_count() -> None:
    """Two rows of one task and one of the other; ``num_envs`` is a multiple of all."""
    for num_envs, times in ((1, 1), (3, 1), (6, 2)):
        envs = make("mtrl.testing:Probes/action*2+mtrl.testing:Probes/constant", num_envs)
        assert envs.reset(seed=0)[0]["task"].tolist() == [0] * 2 * times + [1] * times
        envs.close()
    with pytest.raises(
        ValueError, match=r"num_envs=4: .* fills 3 rows with the copies it asks for; give a multiple of 3"
    ):
        make("mtrl.testing:Probes/action*2+mtrl.testing:Probes/constant", 4)


def test_seed_decides_and_workers_do_not() -> None:
    first = []
    for workers in (0, 2):
        envs = gym.make_vec("mtrl_envs:mtrl/minigrid-mt3-v0", num_envs=3, workers=workers, flatten=False)
        observation, _ = envs.reset(seed=7)
        first.append(observation)
        envs.close()
    for leaf in first[0]:
        np.testing.assert_array_equal(first[0][leaf], first[1][leaf])
    assert "image" in first[0]


def test_wrong_number_of_rows_says_which_would_do() -> None:
    with pytest.raises(ValueError, match=r"num_envs=4: 'minigrid/mt3' fills 3 rows .* multiple of 3, such as 3"):
        gym.make_vec("mtrl_envs:mtrl/minigrid-mt3-v0", num_envs=4)


def test_single_environments_are_refused() -> None:
    with pytest.raises(gym.error.Error, match="entry_point"):
        gym.make("mtrl_envs:mtrl/minigrid-mt3-v0")


def test_registration_imports_nothing_heavy() -> None:
    code = "import sys, mtrl_envs; print({'torch', 'metaworld', 'mujoco', 'minigrid', 'wandb'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
