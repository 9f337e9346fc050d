"""A game of lbforaging or rware as a PettingZoo ``ParallelEnv`` that keeps the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from mtrl.types import Array

Infos = dict[str, dict[str, Any]]
Step = tuple[dict[str, Array], dict[str, float], dict[str, bool], dict[str, bool], Infos]


class Game(Protocol):
    """A package's environment: n players, observations [d] float32 each, Discrete actions.

    Attributes:
        players: n.
        limit: steps of an episode.
        observation, action: spaces of one player.
    """

    players: int
    limit: int
    observation: Box
    action: gym.Space[Any]

    def restart(self, seed: int | None) -> Sequence[Array]: ...
    def play(self, actions: Sequence[int]) -> tuple[Sequence[Array], Sequence[float]]: ...

    def solved(self) -> bool | None:
        """Whether the game is won, and so over; None for games without an end."""
        ...


class Foraging:
    """Level-based foraging: solved when all food is collected. Rewards are shares of the food's value: 1 in all."""

    def __init__(self, env_id: str) -> None:
        self.stock = make_stock(env_id)
        self.players = self.stock.n_agents
        self.limit = int(gym.spec(env_id).kwargs["max_episode_steps"])
        self.observation, self.action = self.stock.observation_space[0], self.stock.action_space[0]

    def restart(self, seed: int | None) -> Sequence[Array]:
        """Begin an episode."""
        for player in self.stock.players:
            player.position = None  # else those of the last episode take up cells while the new ones are drawn
        return self.stock.reset(seed=seed)[0]

    def play(self, actions: Sequence[int]) -> tuple[Sequence[Array], Sequence[float]]:
        """Observations and rewards of all players."""
        return self.stock.step(actions)[:2]

    def solved(self) -> bool:
        """Whether no food is left."""
        return not self.stock.field.any()


class Warehouse:
    """The robotic warehouse: 1 for every requested shelf that a robot brings to a goal; it never ends by itself."""

    def __init__(self, env_id: str) -> None:
        self.stock = make_stock(env_id)
        self.players = self.stock.n_agents
        self.limit = int(self.stock.max_steps)
        self.observation, self.action = self.stock.observation_space[0], self.stock.action_space[0]

    def restart(self, seed: int | None) -> Sequence[Array]:
        """Begin an episode."""
        return self.stock.reset(seed=seed)[0]

    def play(self, actions: Sequence[int]) -> tuple[Sequence[Array], Sequence[float]]:
        """Observations and rewards of all robots."""
        return self.stock.step(actions)[:2]

    def solved(self) -> None:
        """There is always a next request."""


def make_stock(env_id: str) -> Any:
    """The package's own environment, without the wrappers of ``gym.make``: its checkers know nothing of teams."""
    spec = gym.spec(env_id)
    assert isinstance(spec.entry_point, str), f"{env_id} is registered without a named entry point"
    return load_env_creator(spec.entry_point)(**spec.kwargs)


class Team(ParallelEnv[str, Array, int]):
    """The players of one game as agents ``agent_0``, ``agent_1``, ...; they start and end together.

    Observations are the package's [d] float32; ``state()`` is all of them, [n * d], for critics. ``terminated`` means
    that the game is solved; the step limit truncates. ``infos`` hold ``success`` for games that can be solved.

    Args:
        game: the package's environment.
        reward: ``"sum"``: everyone gets the team's reward; ``"own"``: each what it earned itself.
    """

    metadata = {"name": "mtrl_team_v0", "render_modes": [], "is_parallelizable": True}

    def __init__(self, game: Game, reward: Literal["sum", "own"] = "sum") -> None:
        self.game, self.reward = game, reward
        self.possible_agents = [f"agent_{i}" for i in range(game.players)]
        self.agents: list[str] = []
        box = game.observation
        low, high = (np.tile(bound, game.players) for bound in (box.low, box.high))
        self.state_space = Box(low, high, dtype=np.float32)
        self._seen: Sequence[Array] = ()
        self._time = 0

    def observation_space(self, agent: str) -> gym.Space[Any]:
        """The same object for all agents."""
        return self.game.observation

    def action_space(self, agent: str) -> gym.Space[Any]:
        """The same object for all agents."""
        return self.game.action

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Array], Infos]:
        """Start an episode; without a seed, one that follows from the last seed given."""
        self._seen = self.game.restart(seed)
        self._time = 0
        self.agents = list(self.possible_agents)
        return self._observe(), self._infos()

    def step(self, actions: Mapping[str, int]) -> Step:
        """One move of every player.

        Raises:
            ValueError: an agent without an action, or the episode is over.
        """
        if not self.agents or set(actions) != set(self.agents):
            raise ValueError(f"step needs an action for each of {self.agents} (none: reset first), got {list(actions)}")
        agents = self.agents
        self._seen, earned = self.game.play([int(actions[agent]) for agent in agents])
        self._time += 1
        terminated = bool(self.game.solved())
        truncated = not terminated and self._time >= self.game.limit
        self.agents = [] if terminated or truncated else agents
        rewards = [float(sum(earned))] * len(agents) if self.reward == "sum" else [float(one) for one in earned]
        return (
            self._observe(),
            dict(zip(agents, rewards, strict=True)),
            dict.fromkeys(agents, terminated),
            dict.fromkeys(agents, truncated),
            self._infos(),
        )

    def state(self) -> Array:
        """All observations, [n * d] float32."""
        return np.concatenate(self._seen)

    def close(self) -> None:
        """Nothing is held open."""

    def _observe(self) -> dict[str, Array]:
        return dict(zip(self.possible_agents, self._seen, strict=True))

    def _infos(self) -> Infos:
        solved = self.game.solved()
        return {agent: {} if solved is None else {"success": solved} for agent in self.possible_agents}
