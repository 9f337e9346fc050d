"""The team probe. PettingZoo is an extra (``pip install "mtrl-suite[marl]"``), so only its build imports this."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

Observations = dict[str, dict[str, np.ndarray]]

_ACTIONS = 3


class Team(ParallelEnv[str, Any, int]):
    """Two agents see a cue of -1 or 1. "left" plays one step and dies; "right" plays three. At each step actions 0 and
    one of {1, 2} are legal: 1 if the cue is 1, else 2; each agent earns 1 for the legal action that is not 0.

    Best returns: 1 for left, 3 for right (mean 2); a uniform legal policy gets half of each.

    Observations are ``{"observation": [2] float32, "action_mask": [3] int8}``, the global state is [3] float32.

    Raises:
        ValueError: an illegal action, or an action for an agent that is dead.
    """

    metadata = {"name": "probe_team_v0"}
    LENGTH = 3

    def __init__(self) -> None:
        self.possible_agents = ["left", "right"]
        self.agents: list[str] = []
        self.state_space = Box(-1.0, 1.0, (3,), np.float32)
        self._observation = Dict(
            {"observation": Box(-1.0, 1.0, (2,), np.float32), "action_mask": Box(0, 1, (_ACTIONS,), np.int8)}
        )
        self._action = Discrete(_ACTIONS)
        self._random = np.random.default_rng(0)
        self._cue = 1.0
        self._time = 0

    def observation_space(self, agent: str) -> gym.Space[Any]:
        """The same for both agents."""
        return self._observation

    def action_space(self, agent: str) -> gym.Space[Any]:
        """The same for both agents."""
        return self._action

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode; the seed decides the cue."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._cue = float(self._random.choice((-1.0, 1.0)))
        self._time = 0
        self.agents = list(self.possible_agents)
        return self._observe(self.agents), {agent: {} for agent in self.agents}

    def step(
        self, actions: dict[str, int]
    ) -> tuple[Observations, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Step the living agents; "left" dies at the first step, the episode ends at the third."""
        if set(actions) != set(self.agents):
            raise ValueError(f"actions for {sorted(actions)}, but the living agents are {self.agents}")
        mask = self._mask()
        for agent, action in actions.items():
            if not mask[int(action)]:
                raise ValueError(f"{agent}: action {int(action)} is illegal, the mask is {mask.tolist()}")
        acted = self.agents
        self._time += 1
        over = self._time == self.LENGTH
        hits = {agent: int(actions[agent]) != 0 for agent in acted}
        terminated = {agent: over or agent == "left" for agent in acted}
        self.agents = [agent for agent in acted if not terminated[agent]]
        return (
            self._observe(acted),
            {agent: float(hits[agent]) for agent in acted},
            terminated,
            dict.fromkeys(acted, False),
            {agent: {"success": hits[agent]} for agent in acted},
        )

    def state(self) -> np.ndarray:
        """Global state [3]: cue, time, living share."""
        return np.array([self._cue, self._time / self.LENGTH, len(self.agents) / 2], np.float32)

    def _mask(self) -> np.ndarray:
        return np.array([1, self._cue > 0, self._cue < 0], np.int8)

    def _observe(self, agents: list[str]) -> Observations:
        return {
            agent: {
                "observation": np.array([self._cue, float(agent == "right")], np.float32),
                "action_mask": self._mask(),
            }
            for agent in agents
        }
