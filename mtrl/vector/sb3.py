"""Stable-Baselines3 on our tasks, and our agents in Stable-Baselines3's tools.

``SB3VecEnv`` is a vector that SB3's algorithms train on unchanged; ``SB3Policy`` lets ``evaluate_policy`` and other
callers of ``predict`` use any mtrl agent. Imported on demand only: SB3 brings torch, which worker processes and people
who want environments alone do without.

https://stable-baselines3.readthedocs.io/en/master/guide/vec_envs.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from mtrl.types import Actor, Agent, Array, Layout
from mtrl.vector.env import MultiTaskVectorEnv
from mtrl.vector.views import PaddedVectorEnv

Observation = Array | dict[str, Array]


class SB3VecEnv(VecEnv):
    """The padded view as an SB3 vector.

    Observations are one flat Box, the padded observation and the task as a one-hot, for ``MlpPolicy``; or with
    ``flat=False`` the view's dictionary, for ``MultiInputPolicy``. Rewards are float32, as in SB3's own vectors. Infos
    hold ``task`` (its name) and ``TimeLimit.truncated``; where an episode ended also ``terminal_observation``,
    ``episode`` (``r``, a team's mean, and ``l``) and ``is_success`` (at any step; left out if the task reports none).

    ``env_method("action_masks")`` gives what sb3-contrib's MaskablePPO asks for. Plain SB3 knows no masks: a vector
    given as it is gets a view in which an illegal action becomes the first legal one (``illegal="first"``).

    Args:
        envs: a vector, or a view with settings of your own.
        flat: see above.
    """

    def __init__(self, envs: MultiTaskVectorEnv | PaddedVectorEnv, *, flat: bool = True) -> None:
        self.view = envs if isinstance(envs, PaddedVectorEnv) else PaddedVectorEnv(envs, illegal="first")
        self.flat = flat
        padding, spec = self.view.padding, self.view.envs.spec
        self._names = [task.name for task in spec.tasks]
        slot_tasks = self.view.envs.slot_tasks
        self._slot = np.repeat(np.arange(len(slot_tasks)), [spec.tasks[task].agents for task in slot_tasks])
        super().__init__(
            self.view.num_envs, padding.flat_space if flat else padding.observation_space, padding.action_space
        )

    def reset(self) -> Observation:
        """Begin every row's first episode, under the run seed that ``seed`` was given, if any."""
        observation, info = self.view.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{"task": self._names[task]} for task in info["task"]]
        return self._convert(observation)

    def step_async(self, actions: Array) -> None:
        """Keep the actions; ``step_wait`` plays them (SB3 does nothing in between)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Play the actions: (observation, reward [N] float32, done [N] bool, infos), all fresh."""
        observation, reward, terminated, truncated, info = self.view.step(self._actions)
        infos: list[dict[str, Any]] = [
            {"task": self._names[task], "TimeLimit.truncated": bool(cut)}
            for task, cut in zip(info["task"], truncated & ~terminated, strict=True)
        ]
        done = terminated | truncated
        episodes = {episode.slot: episode for episode in self.view.envs.episodes}
        for row in np.flatnonzero(done):
            episode = episodes[int(self._slot[row])]
            infos[row]["terminal_observation"] = self._convert(info["final_obs"][row])
            infos[row]["episode"] = {"r": episode.ret, "l": episode.length}
            if episode.success is not None:
                infos[row]["is_success"] = episode.success
            self.reset_infos[row] = {"task": self._names[self.view.envs.obs.task[row]]}
        return self._convert(observation), reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Close the vector and its environments."""
        self.view.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The view's attribute, once per row: rows have no environment objects of their own here."""
        return [getattr(self.view, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Not possible: environments may live in other processes.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"cannot set {attr_name!r}: rows share one vector; configure the tasks instead")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call the view's method, which must return one item per row, such as ``action_masks``.

        Raises:
            AttributeError: the view has no such method.
        """
        result = getattr(self.view, method_name)(*args, **kwargs)
        return [result[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for ``Monitor`` only, since infos carry the ``episode`` that a Monitor would add."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _convert(self, padded: dict[str, Array]) -> Observation:
        return self.view.padding.flat(padded) if self.flat else padded


class SB3Policy:
    """Any mtrl agent behind SB3's ``predict``, for ``evaluate_policy``::

        venv = SB3VecEnv(MultiTaskVectorEnv(tasks))
        mean, std = evaluate_policy(SB3Policy(agent, venv), venv, n_eval_episodes=20)

    Recurrent agents keep their memory themselves, cleared where ``episode_start`` says so; ``state`` is not used.

    Args:
        agent: trained for the spec of ``view``.
        view: the vector whose observations will come; also tells the rows. Observations with legal actions or
            team members that die do not fit in a flat one: use ``SB3VecEnv(..., flat=False)`` for them.

    Raises:
        ValueError: a flat view of such groups.
    """

    def __init__(self, agent: Agent, view: SB3VecEnv | PaddedVectorEnv) -> None:
        inner = view if isinstance(view, PaddedVectorEnv) else view.view
        self._agent, self._padding = agent, inner.padding
        self._layout: Layout = inner.envs.layout
        self._actors: dict[bool, Actor] = {}
        hidden = sorted({leaf for group in inner.envs.spec.groups for leaf in group.leaves} & {"legal", "alive"})
        if hidden and isinstance(view, SB3VecEnv) and view.flat:
            raise ValueError(f"a flat observation carries no {' or '.join(hidden)}: use SB3VecEnv(..., flat=False)")

    def predict(
        self,
        observation: Observation | Mapping[str, Array],
        state: tuple[Array, ...] | None = None,
        episode_start: Array | Sequence[bool] | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Actions for all rows of the view.

        Args:
            observation: of all N rows.
            state: ignored, returned as it is.
            episode_start: [N] bool: rows in which an episode begins; None means all rows at the first call, then none.
            deterministic: the greedy action; otherwise sampled, by an actor of its own.

        Returns:
            Actions in the view's action space, [N] int64 or [N, a] float32; and ``state``.
        """
        padded = observation if isinstance(observation, Mapping) else self._padding.unflat(np.asarray(observation))
        new = deterministic not in self._actors
        if new:
            self._actors[deterministic] = self._agent.actor(self._layout, explore=not deterministic)
        first = np.full(len(padded["task"]), new) if episode_start is None else np.asarray(episode_start, bool)
        obs = self._padding.unpad(padded, first)
        return self._padding.pad_action(self._actors[deterministic](obs).action, obs.task), state
