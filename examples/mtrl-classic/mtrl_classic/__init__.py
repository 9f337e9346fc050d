"""Two classic control tasks of Gymnasium as a suite for mtrl: ``classic/all``, ``classic/cartpole``, ..."""

from functools import partial

import gymnasium as gym

from mtrl.registry import UnknownNameError
from mtrl.types import Task

# task: (Gymnasium id, mean return of a uniformly random policy, return at which Gymnasium calls it solved)
TASKS = {"cartpole": ("CartPole-v1", 23.7, 475.0), "acrobot": ("Acrobot-v1", -497.1, -100.0)}
SOURCE = "random: mean of 100 episodes; solved: gymnasium's reward_threshold"


class Classic:
    name = "classic"
    groups = ("all", *TASKS)

    def tasks(self, group: str) -> list[Task]:
        if group not in self.groups:
            raise UnknownNameError("group", group, self.groups)
        return [self.task(name) for name in TASKS if group in ("all", name)]

    def task(self, name: str) -> Task:
        env_id, random, solved = TASKS[name]
        build = partial(gym.make, env_id, disable_env_checker=True)
        return Task(f"classic/{name}", build, horizon=500, score=(random, solved), score_source=SOURCE)
