"""One battle as a PettingZoo ``ParallelEnv``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

from mtrl.types import Array
from mtrl_envs.smac import kernels
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.render import draw
from mtrl_envs.smac.scenarios import Rules, Scenario

Observation = dict[str, Array]
Infos = dict[str, dict[str, Any]]

# Units pushed over the border are a little outside 0..1 (and die in the next tick).
_OUTSIDE = 1.0


class BattleEnv(ParallelEnv[str, Observation, int]):
    """The allies of one battle as agents ``ally_0``, ``ally_1``, ...; the enemies are scripted.

    Observations are ``{"observation": [D] float32, "action_mask": [A] int8}``; ``state()`` is [S] float32, for critics.
    All agents get the team's reward. A unit that dies stays in ``agents`` until the battle ends, sees zeros and can
    only stop: its team's later reward is still its own, since it may have been won by its sacrifice. ``infos`` say
    whether the agent is ``alive``, whether the battle was won (``success``) and how many ``illegal_actions`` the team
    has sent (they make a unit idle). A battle is truncated after 100 steps.

    ``reset(seed)`` decides the battle together with the actions: it equals battle b of ``Battles`` started with this
    seed, bit for bit.

    Args:
        scenario: the map.
        rules: variants of the game.
        render_mode: ``"rgb_array"`` for frames.
    """

    metadata = {"name": "mtrl_battle_v0", "render_modes": ["rgb_array"], "render_fps": 8, "is_parallelizable": True}

    def __init__(self, scenario: Scenario, rules: Rules = Rules(), *, render_mode: str | None = None) -> None:  # noqa: B008
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.battles = Battles([scenario], 1, rules)
        self.render_mode = render_mode
        self.possible_agents = [f"ally_{i}" for i in range(self.battles.n_allies)]
        self.agents: list[str] = []
        actions, features = self.battles.legal.shape[2], self.battles.obs.shape[2]
        low, high = np.full(features, -1, np.float32), np.ones(features, np.float32)
        own = features - kernels.OWN_FEATURES
        low[own:] = 0
        low[own + 1 : own + 3], high[own + 1 : own + 3] = -_OUTSIDE, 1 + _OUTSIDE
        self._observation = Dict(
            {"observation": Box(low, high, dtype=np.float32), "action_mask": Box(0, 1, (actions,), np.int8)}
        )
        self._action = Discrete(actions)
        self.state_space = Box(-_OUTSIDE, 1 + _OUTSIDE, self.battles.state[0].shape, np.float32)
        self._seeds = np.random.default_rng()  # for resets without a seed

    def observation_space(self, agent: str) -> gym.Space[Any]:
        """The same object for all agents."""
        return self._observation

    def action_space(self, agent: str) -> gym.Space[Any]:
        """The same object for all agents: 0 up, 1 right, 2 down, 3 left, 4 stop, 5 + i attack enemy i."""
        return self._action

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Infos]:
        """Start a battle; without a seed, one that follows from the last seed given."""
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        else:
            self._seeds = np.random.default_rng(seed)
        self.battles.reset(np.ones(1, bool), np.array([seed]))
        self.agents = list(self.possible_agents)
        return self._observe(), self._infos(won=False)

    def step(
        self, actions: Mapping[str, int]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], Infos]:
        """Half a second of battle.

        Raises:
            ValueError: an agent without an action, or the battle is over.
        """
        if not self.agents or set(actions) != set(self.agents):
            raise ValueError(f"step needs an action for each of {self.agents} (none: reset first), got {list(actions)}")
        outcome = self.battles.step(np.array([[int(actions[agent]) for agent in self.possible_agents]]))
        reward, won = float(outcome.reward[0]), bool(outcome.success[0])
        terminated, truncated = bool(outcome.terminated[0]), bool(outcome.truncated[0])
        agents = self.agents
        self.agents = [] if terminated or truncated else agents
        every = dict.fromkeys
        return (
            self._observe(),
            every(agents, reward),
            every(agents, terminated),
            every(agents, truncated),
            self._infos(won),
        )

    def state(self) -> Array:
        """The whole battle, [S] float32."""
        return self.battles.state[0].copy()

    def script(self) -> dict[str, int]:
        """What the enemies' policy, mirrored, would do now; call it once before each step."""
        return dict(zip(self.possible_agents, self.battles.script()[0].tolist(), strict=True))

    def render(self) -> Array | None:
        """A frame [640, 640, 3] uint8, or None without ``render_mode``."""
        return draw(self.battles, 0) if self.render_mode else None

    def close(self) -> None:
        """Nothing is held open."""

    def _observe(self) -> dict[str, Any]:
        obs, legal = self.battles.obs[0].copy(), self.battles.legal[0].astype(np.int8)
        return {agent: {"observation": obs[i], "action_mask": legal[i]} for i, agent in enumerate(self.possible_agents)}

    def _infos(self, won: bool) -> Infos:
        alive, illegal = self.battles.alive[0].tolist(), int(self.battles.clocks.illegal[0])
        return {
            agent: {"success": won, "alive": alive[i], "illegal_actions": illegal}
            for i, agent in enumerate(self.possible_agents)
        }
