"""A text game, whoever runs it, as a Gymnasium environment."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete

from mtrl_envs.text.encoding import Scene, encode, observation_space


class Player(Protocol):
    """Runs games. ``start`` must draw everything random about an episode from the generator that it is given."""

    def start(self, random: np.random.Generator) -> Scene: ...
    def enter(self, command: str) -> Scene: ...
    def close(self) -> None: ...


class TextGame(gym.Env[Any, Any]):
    """One text game after another. Observation and actions: see ``mtrl_envs.text.encoding``.

    Reward: change of the game's score, raw. The episode terminates when the game is won or lost; nothing is truncated:
    that is left to ``Task.horizon``. ``info`` holds ``success`` (the game is won) and ``cut_words``.

    Args:
        player: runs the games.
        actions: most commands that can be offered.
    """

    metadata = {"render_modes": []}

    def __init__(self, player: Player, actions: int) -> None:
        self.player = player
        self.observation_space = observation_space(actions)
        self.action_space = Discrete(actions)
        self.scene = Scene(("", "", "", ""), (), 0.0, False, False)
        self.table: list[str] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        return self._show(self.player.start(self.np_random))

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Enter the command that ``action`` stands for.

        Raises:
            ValueError: it stands for none; or more commands are possible than there are actions.
        """
        command = self.table[action]
        if not command:
            legal = {action: command for action, command in enumerate(self.table) if command}
            raise ValueError(f"action {action} stands for no command now; legal: {legal}")
        before = self.scene.score
        obs, info = self._show(self.player.enter(command))
        return obs, float(self.scene.score - before), self.scene.won or self.scene.lost, False, info

    def close(self) -> None:
        self.player.close()

    def _show(self, scene: Scene) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        shown = encode(scene, int(self.action_space.n))  # type: ignore[attr-defined]
        self.scene, self.table = scene, shown.table
        return (
            {"tokens": shown.tokens, "legal": shown.legal},
            {"success": scene.won, "cut_words": shown.cut},
        )
