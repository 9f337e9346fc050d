"""Vectors of other projects that can hold our tasks, for ``benchmarks/vector.py``; each is left out if not installed.

Peers step the packages' own environments under the least wrapping that they can hold: MetaWorld's class with a time
limit, MiniGrid with its image only, Atari with Gymnasium's standard preprocessing on grey screens. Where a mix has
several kinds of spaces, peers need them alike: ``Padded`` gives every environment the same dictionary (the union of
what there is) and one Box action. EnvPool and ALE's own vector hold one task per pool: a mix is one pool per task,
stepped in turn. What they give up is said in ``GIVES_UP``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from mtrl.types import Task

GIVES_UP = {
    "EnvPool": "ignores reset(seed), and its MetaWorld differs from the package: no journals, no exact resume",
    "ALE AtariVectorEnv": "one game per vector; Atari only",
}


def stock(name: str) -> gym.Env[Any, Any]:
    """The package's own environment of a task named as in our suites."""
    suite, _, task = name.partition("/")
    if suite == "metaworld":
        from mtrl_envs.metaworld import make_raw

        raw = make_raw(task)
        raw._freeze_rand_vec = False  # a new goal at every reset
        return gym.wrappers.TimeLimit(raw, 500)
    if suite == "atari":
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        grey: dict[str, Any] = {"obs_type": "grayscale", "full_action_space": True}
        game = gym.make(f"ALE/{task}-v5", frameskip=1, **grey)  # the id's own sticky actions
        return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(game), 4)
    from minigrid.wrappers import ImgObsWrapper

    from mtrl_envs.minigrid import make_stock

    return ImgObsWrapper(make_stock(minigrid_id(task)))


def minigrid_id(task: str) -> str:
    """``"LavaGapS7"`` to ``"MiniGrid-LavaGapS7-v0"``."""
    return next(i for i in gym.registry if task in i and i.startswith(("MiniGrid", "BabyAI")))


class Padded(gym.Wrapper[Any, Any, Any, Any]):
    """An environment in the spaces that a whole mix shares: a dictionary of all kinds of observations, zeros where it
    has none, and a Box action; one with a Discrete action reads the last number."""

    def __init__(self, env: gym.Env[Any, Any], spaces: Mapping[str, gym.Space[Any]], width: int) -> None:
        super().__init__(env)
        self._key = key_of(env.observation_space)
        self._n = int(env.action_space.n) if isinstance(env.action_space, Discrete) else 0
        self._size = env.action_space.shape[0] if isinstance(env.action_space, Box) else 0
        self.observation_space, self.action_space = Dict(dict(spaces)), Box(-1, 1, (width,), np.float32)
        self._blank = {key: np.zeros(space.shape or (), space.dtype) for key, space in spaces.items()}

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return {**self._blank, self._key: obs}, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        own = min(int((action[-1] + 1) / 2 * self._n), self._n - 1) if self._n else action[: self._size]
        obs, reward, terminated, truncated, info = self.env.step(own)
        return {**self._blank, self._key: obs}, reward, terminated, truncated, info


def key_of(space: Any) -> str:
    """Under which name a kind of observation goes."""
    return "x".join(map(str, space.shape))


def makers(names: Sequence[str]) -> list[Callable[[], gym.Env[Any, Any]]]:
    """One factory per task; padded if their spaces differ."""
    plain: list[Callable[[], gym.Env[Any, Any]]] = [partial(stock, name) for name in names]
    seen = [make() for make in plain]
    spaces = {key_of(env.observation_space): env.observation_space for env in seen}
    kinds = {str(env.action_space) for env in seen}
    discrete = any(isinstance(env.action_space, Discrete) for env in seen)
    width = max((env.action_space.shape[0] for env in seen if isinstance(env.action_space, Box)), default=0) + discrete
    for env in seen:
        env.close()
    if len(spaces) == len(kinds) == 1:
        return plain
    return [partial(padded, name, spaces, width) for name in names]


def padded(name: str, spaces: Mapping[str, gym.Space[Any]], width: int) -> gym.Env[Any, Any]:
    """A task's environment in common spaces."""
    return Padded(stock(name), spaces, width)


class Gymnasium:
    """A vector of Gymnasium."""

    def __init__(self, envs: Any) -> None:
        self._envs = envs
        envs.reset(seed=0)
        envs.action_space.seed(0)
        self._actions = [envs.action_space.sample() for _ in range(256)]

    def steps(self, count: int) -> None:
        for step in range(count):
            self._envs.step(self._actions[step % 256])

    def close(self) -> None:
        self._envs.close()


class OneActionSpace(Gymnasium):
    """A vector of Stable-Baselines3 or tianshou: its action space is that of one row."""

    def __init__(self, envs: Any, space: gym.Space[Any], rows: int) -> None:
        self._envs = envs
        envs.reset()
        space.seed(0)
        self._actions = [np.stack([space.sample() for _ in range(rows)]) for _ in range(256)]


class Tianshou(OneActionSpace):
    """Does not start anew by itself: whoever steps it resets what ended."""

    def steps(self, count: int) -> None:
        for step in range(count):
            _, _, terminated, truncated, _ = self._envs.step(self._actions[step % 256])
            ended = np.flatnonzero(terminated | truncated)
            if len(ended):
                self._envs.reset(ended)


class TorchRL:
    """torchrl's vectors step and reset tensordicts."""

    def __init__(self, envs: Any, rows: int) -> None:
        self._envs, self._now = envs, envs.reset()
        envs.set_seed(0)
        self._actions = [envs.rand_action() for _ in range(256)]

    def steps(self, count: int) -> None:
        for step in range(count):
            self._now["action"] = self._actions[step % 256]["action"]
            _, self._now = self._envs.step_and_maybe_reset(self._now)

    def close(self) -> None:
        self._envs.close()


class Pools:
    """One pool of one environment per task (EnvPool, ALE), stepped in turn: all are sent actions, then all are read."""

    def __init__(self, pools: Sequence[Any]) -> None:
        self._pools = pools
        rng, self._actions = np.random.default_rng(0), []
        for pool in pools:
            pool.reset()
            space = pool.action_space
            n = int(np.ravel(getattr(space, "n", getattr(space, "nvec", 0)))[0])
            size = () if n else (np.shape(space.low)[-1],)
            drawn = rng.integers(n, size=(256, 1)) if n else rng.uniform(-1, 1, (256, 1, *size))
            self._actions.append(drawn)

    def steps(self, count: int) -> None:
        for step in range(count):
            for pool, actions in zip(self._pools, self._actions, strict=True):
                pool.send(actions[step % 256])
            for pool in self._pools:
                pool.recv()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


def envpool(names: Sequence[str]) -> Pools:
    """EnvPool's versions of the tasks.

    Raises:
        ImportError: EnvPool is not installed.
        ValueError: it does not have a task.
    """
    package = import_module("envpool")
    known, pools = set(package.list_all_envs()), []
    for name in names:
        suite, _, task = name.partition("/")
        options: dict[str, Any] = {}
        if suite == "metaworld":
            found = f"MetaWorld/{''.join(word.capitalize() for word in task.removesuffix('-v3').split('-'))}-v3"
            options["partially_observable"] = False
        elif suite == "atari":
            found, options = f"{task}-v5", {"repeat_action_probability": 0.25, "full_action_space": True}
        else:
            found = minigrid_id(task)
        if found not in known:
            raise ValueError(f"EnvPool has no {found}")
        pools.append(package.make_gymnasium(found, num_envs=1, num_threads=1, **options))
    return Pools(pools)


def ale(names: Sequence[str]) -> Pools:
    """One of ALE's vectors per game.

    Raises:
        ValueError: not all tasks are games.
    """
    if not all(name.startswith("atari/") for name in names):
        raise ValueError("Atari only")
    from ale_py.vector_env import AtariVectorEnv

    from mtrl_envs.atari import rom_name

    options: dict[str, Any] = {"repeat_action_probability": 0.25, "full_action_space": True, "reward_clipping": False}
    return Pools([AtariVectorEnv(rom_name(name.partition("/")[2]), num_envs=1, **options) for name in names])


def peers(tasks: Sequence[Task]) -> dict[str, Callable[[], Any]]:
    """Factories by name; calling one may raise ImportError (not installed) or ValueError (cannot hold the tasks)."""
    names = [task.name for task in tasks]
    made, rows = makers(names), len(names)
    sample = made[0]()
    space = sample.action_space
    sample.close()

    def sb3(kind: str) -> Any:
        from stable_baselines3.common import vec_env

        return OneActionSpace(getattr(vec_env, kind)(list(made)), space, rows)

    def tianshou(kind: str) -> Any:
        return Tianshou(getattr(import_module("tianshou.env"), kind)(list(made)), space, rows)

    def torchrl(kind: str) -> Any:
        wrapped = [partial(_torchrl_env, make) for make in made]
        return TorchRL(getattr(import_module("torchrl.envs"), kind)(rows, wrapped), rows)

    return {
        "Gymnasium SyncVectorEnv": lambda: Gymnasium(gym.vector.SyncVectorEnv(made)),
        "Gymnasium AsyncVectorEnv": lambda: Gymnasium(gym.vector.AsyncVectorEnv(made)),
        "SB3 DummyVecEnv": lambda: sb3("DummyVecEnv"),
        "SB3 SubprocVecEnv": lambda: sb3("SubprocVecEnv"),
        "tianshou DummyVectorEnv": lambda: tianshou("DummyVectorEnv"),
        "tianshou ShmemVectorEnv": lambda: tianshou("ShmemVectorEnv"),
        "torchrl SerialEnv": lambda: torchrl("SerialEnv"),
        "torchrl ParallelEnv": lambda: torchrl("ParallelEnv"),
        "EnvPool": lambda: envpool(names),
        "ALE AtariVectorEnv": lambda: ale(names),
    }


def _torchrl_env(make: Callable[[], gym.Env[Any, Any]]) -> Any:
    return import_module("torchrl.envs").GymWrapper(make())
