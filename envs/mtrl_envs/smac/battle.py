"""B battles between teams of the same sizes, stepped together: the engine behind both faces of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mtrl.types import Array, Outcome
from mtrl_envs.smac import kernels
from mtrl_envs.smac.kernels import Clocks
from mtrl_envs.smac.scenarios import HORIZON, Rules, Scenario, stats


class Battles:
    """Arrays of ``size`` battles of ``n_allies`` against ``n_enemies`` units (U together).

    A battle is a function of (map, seed, actions): its random numbers are hashes of the seed, so nothing else in the
    batch matters, there is no generator state to save, and replaying the actions restores a battle bit for bit.
    Battles do not restart by themselves: after ``step`` the observations are the true successors; copy what you need,
    then ``reset`` those that ended. A battle that is over (or was never started) stands still and is paid 0.

    Args:
        scenarios: maps with teams of the same sizes; ``reset`` chooses among them.
        size: B, the number of battles.
        rules: variants of the game.

    Attributes:
        obs: [B, n_allies, D] float32, D = 13 * (U - 1) + 10; rewritten by ``reset`` and ``step``, as are the next two.
        state: [B, S] float32, S = 11 * U; for critics.
        legal: [B, n_allies, A] bool, A = 5 + n_enemies.
        floats, ints: [B, 13, U] float32 and [B, 5, U] int16, the units; rows are named in ``kernels``.
        clocks: step counters and what else belongs to a whole battle; see ``kernels.Clocks``.

    Raises:
        ValueError: no scenario, teams of different sizes, or a size below 1.
    """

    def __init__(self, scenarios: Sequence[Scenario], size: int, rules: Rules = Rules()) -> None:  # noqa: B008 - frozen
        teams = {(len(one.allies), len(one.enemies)) for one in scenarios}
        if len(teams) != 1:
            sizes = ", ".join(f"{one.name} {len(one.allies)} vs {len(one.enemies)}" for one in scenarios)
            raise ValueError(f"battles of one batch need teams of the same sizes, got: {sizes or 'no maps'}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.scenarios, self.size, self.rules = tuple(scenarios), size, rules
        ((self.n_allies, self.n_enemies),) = teams
        n = self.n_allies + self.n_enemies
        self._stats = stats()
        self._kinds = np.array([one.allies + one.enemies for one in scenarios], np.int16)
        self._drawn = np.array([one.random for one in scenarios])
        # What callers pass is copied into these: to a kernel, a strided or read-only array would be another type, and
        # compile it anew.
        self._chosen, self._actions = np.zeros(size, bool), np.zeros((size, self.n_allies), np.int64)
        self.floats = np.zeros((size, kernels.F_ROWS, n), np.float32)
        self.ints = np.zeros((size, kernels.K_ROWS, n), np.int16)
        self.clocks = Clocks(
            np.zeros(size, np.uint64), np.zeros(size, np.int64), np.ones(size, bool), np.zeros(size, np.int64)
        )
        self._outcome = Outcome(np.zeros(size), np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, bool))
        self.obs = np.zeros((size, self.n_allies, kernels.UNIT_FEATURES * (n - 1) + kernels.OWN_FEATURES), np.float32)
        self.state = np.zeros((size, kernels.STATE_FEATURES * n), np.float32)
        self.legal = np.zeros((size, self.n_allies, kernels.ATTACK + self.n_enemies), bool)
        self.legal[:, :, kernels.STOP] = True

    @property
    def alive(self) -> Array:
        """[B, n_allies] bool: which allies live."""
        return self.floats[:, kernels.LIFE, : self.n_allies] > 0

    def reset(self, mask: Array, seeds: Array, scenario: Array | None = None) -> None:
        """Start new battles and observe them.

        Args:
            mask: [B] bool, which ones; the others are left alone.
            seeds: [B], integers from 0 up; read where ``mask`` is true.
            scenario: [B], indices into ``scenarios``; None: the first one everywhere.

        Raises:
            ValueError: a shape, a negative seed, or an index without a scenario.
        """
        mask, seeds = self._mask(mask), np.asarray(seeds)
        chosen = np.zeros(self.size, np.int64) if scenario is None else np.where(mask, scenario, 0)
        if seeds.shape != (self.size,) or seeds.dtype.kind not in "iu" or (seeds[mask] < 0).any():
            raise ValueError(f"seeds must be [{self.size}] integers >= 0, got {seeds.dtype} {seeds.shape}: {seeds}")
        if chosen.shape != (self.size,) or chosen.min() < 0 or chosen.max() >= len(self.scenarios):
            raise ValueError(f"scenario must hold [{self.size}] indices below {len(self.scenarios)}, got {scenario}")
        kinds, drawn = self._kinds[chosen], self._drawn[chosen]
        seeds = seeds.astype(np.uint64)
        kernels.reset(self.floats, self.ints, self.clocks, self._stats, self.n_allies, kinds, drawn, mask, seeds)
        self._observe(mask)

    def step(self, actions: Array, mask: Array | None = None) -> Outcome:
        """One step of every battle that is not over.

        Args:
            actions: [B, n_allies] integers: 0 up, 1 right, 2 down, 3 left, 4 stop, 5 + i attack enemy i. An illegal
                one makes its unit idle and is counted in ``clocks.illegal``.
            mask: [B] bool, battles to step (to replay a journal, say); None: all.

        Returns:
            The outcome; its arrays [B] are overwritten by the next step.

        Raises:
            ValueError: the shape or dtype of ``actions`` or ``mask``.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.size, self.n_allies) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be [{self.size}, {self.n_allies}] integers, got {actions.dtype} {actions.shape}"
            )
        mask = self._mask(True if mask is None else mask)
        moved = mask & ~self.clocks.over
        self._actions[:] = actions
        kernels.step(
            self.floats,
            self.ints,
            self.clocks,
            self._outcome,
            self.rules,
            self.n_allies,
            HORIZON,
            self._actions,
            mask,
        )
        self._observe(moved)
        return self._outcome

    def leaves(self) -> dict[str, Array]:
        """Observations as mtrl wants them of a team, [B, n_allies, ...]; views of what the next call overwrites."""
        shape = (self.size, self.n_allies, self.state.shape[1])
        state = np.broadcast_to(self.state[:, None], shape)
        return {"vector": self.obs, "legal": self.legal, "state": state, "alive": self.alive}

    def close(self) -> None:
        """Nothing is held open."""

    def script(self) -> Array:
        """Actions [B, n_allies] int64 of the enemies' own policy, mirrored; call it once before each step."""
        actions = np.zeros((self.size, self.n_allies), np.int64)
        kernels.script_allies(self.floats, self.ints, self.clocks, self.n_allies, actions)
        return actions

    def _mask(self, mask: Array | Literal[True]) -> Array:
        if mask is not True and (np.shape(mask) != (self.size,) or np.asarray(mask).dtype != np.bool_):
            raise ValueError(f"mask must be [{self.size}] bool, got {np.asarray(mask).dtype} {np.shape(mask)}")
        self._chosen[:] = mask
        return self._chosen

    def _observe(self, mask: Array) -> None:
        see = self.rules.see_enemy_actions
        kernels.observe(self.floats, self.ints, self.n_allies, see, mask, self.obs, self.state, self.legal)
