"""``check_vector_env``: does a vector keep what Gymnasium promises? (Gymnasium itself checks single ones only.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from mtrl.testing.check import Finding, Report
from mtrl.testing.compare import difference, outside
from mtrl.types import Array

Make = Callable[[], VectorEnv]


class _Seen(NamedTuple):
    """A played trajectory: observations [steps + 1], then one entry per step each."""

    obs: list[Any]
    reward: list[Array]
    terminated: list[Array]
    truncated: list[Array]
    info: list[dict[str, Any]]


def check_vector_env(make: Make, *others: Make, steps: int = 300, seed: int = 7) -> Report:
    """Play random actions and compare what comes back with the conventions of ``gymnasium.vector``.

    Checked: declared autoreset mode, spaces and shapes, that ``reset(seed=...)`` decides everything, that rows do not
    mirror one another, autoreset (true last observation under SAME_STEP, an idle step under NEXT_STEP), that arrays
    handed out stay as they are, legal actions, and that other backends give the same bits. Actions are legal ones where
    an ``action_mask`` [n, A] in the observation or in ``info`` says which are.

    Args:
        make: builds the vector; called several times, each one is closed.
        others: builders of the same vector on other backends (workers, asynchronous, ...).
        steps: of each run; enough for some episodes to end.
        seed: of the run.
    """
    check = _Check(make, steps, seed)
    check.run(others)
    return Report(f"vector {check.name}", (check.name, *(f"backend {i + 1}" for i in range(len(others)))), check.found)


class _Check:
    def __init__(self, make: Make, steps: int, seed: int) -> None:
        self._make, self._steps, self._seed = make, steps, seed
        self._found: list[Finding] = []
        self.name = "?"

    @property
    def found(self) -> tuple[Finding, ...]:
        return tuple(self._found)

    def run(self, others: tuple[Make, ...]) -> None:
        envs = self._make()
        self.name = type(envs).__name__
        try:
            if not self._spaces(envs):
                return
            mode = envs.metadata.get("autoreset_mode")
            if not isinstance(mode, AutoresetMode):
                self._error(f"metadata['autoreset_mode'] is {mode!r}", "declare a gymnasium.vector.AutoresetMode")
                return
            first = self._play(envs, self._seed)
            self._values(envs, first)
            self._ends(envs, first, mode)
            again = self._play(envs, self._seed)
            self._same(
                first, again, "two runs with the same seed in one vector", "reset(seed=...) must decide everything"
            )
            if not difference(first.obs[0], self._play(envs, self._seed + 1).obs[0]):
                self._note(
                    "reset() gives the same first observations for two seeds", "use the seed, if anything is random"
                )
            self._rows(envs, first)
        finally:
            envs.close()
        for number, make in enumerate((self._make, *others)):
            other = make()
            try:
                what = f"backend {number}" if number else "a second vector"
                fix = "same seed and actions must give the same bits, wherever environments run"
                self._same(first, self._play(other, self._seed), f"the vector and {what}", fix)
            finally:
                other.close()

    def _error(self, what: str, fix: str) -> None:
        self._found.append(Finding("error", self.name, what, fix))

    def _note(self, what: str, fix: str) -> None:
        self._found.append(Finding("note", self.name, what, fix))

    def _spaces(self, envs: VectorEnv) -> bool:
        for kind in ("observation", "action"):
            single, whole = getattr(envs, f"single_{kind}_space"), getattr(envs, f"{kind}_space")
            if batch_space(single, envs.num_envs) != whole:
                fix = f"make it batch_space(single_{kind}_space, num_envs)"
                self._error(f"{kind}_space is not {envs.num_envs} times single_{kind}_space", fix)
        return not self._found

    def _play(self, envs: VectorEnv, seed: int) -> _Seen:
        rng = np.random.default_rng(seed)
        obs, info = envs.reset(seed=seed)
        seen = _Seen([_copy(obs)], [], [], [], [])
        for step in range(self._steps):
            before = obs
            obs, reward, terminated, truncated, info = envs.step(self._actions(envs, obs, info, rng))
            if step < 5 and (where := difference({"observation": before}, {"observation": seen.obs[-1]})):
                self._error(
                    f"step() wrote over the observation handed out before{where}", "hand out fresh arrays, or copies"
                )
            seen.obs.append(_copy(obs))
            for entries, value in zip(seen[1:4], (reward, terminated, truncated), strict=True):
                entries.append(np.array(value))
            seen.info.append(dict(info))
        return seen

    def _actions(self, envs: VectorEnv, obs: Any, info: Mapping[str, Any], rng: np.random.Generator) -> Any:
        mask = (obs if isinstance(obs, Mapping) and "action_mask" in obs else info).get("action_mask")
        single = envs.single_action_space
        if mask is not None and isinstance(single, gym.spaces.Discrete):
            mask = np.asarray(mask, bool)
            if mask.shape != (envs.num_envs, single.n) or not mask.any(axis=1).all():
                self._error(
                    f"the action_mask has shape {mask.shape} or a row without a legal action",
                    f"give [{envs.num_envs}, {single.n}] with at least one legal action per row",
                )
                return rng.integers(0, single.n, envs.num_envs)
            return np.array([single.start + rng.choice(np.flatnonzero(row)) for row in mask])
        envs.action_space.seed(int(rng.integers(2**31)))
        return envs.action_space.sample()

    def _values(self, envs: VectorEnv, seen: _Seen) -> None:
        n = envs.num_envs
        for step, obs in enumerate(seen.obs):
            if why := outside(envs.observation_space, obs, "the observation"):
                self._error(f"after {step} steps {why}", "return observations of observation_space")
                break
        for name, arrays, kinds in (
            ("reward", seen.reward, "f"),
            ("terminated", seen.terminated, "b"),
            ("truncated", seen.truncated, "b"),
        ):
            bad = [array for array in arrays if array.shape != (n,) or array.dtype.kind not in kinds]
            if bad:
                what = "float" if kinds == "f" else "bool"
                self._error(f"{name} is {bad[0].dtype} {list(bad[0].shape)}", f"return a {what} array [{n}]")
            elif name == "reward" and not all(np.isfinite(array).all() for array in arrays):
                self._error("a reward is not finite", "return finite rewards")

    def _ends(self, envs: VectorEnv, seen: _Seen, mode: AutoresetMode) -> None:
        ended = [np.logical_or(a, b) for a, b in zip(seen.terminated, seen.truncated, strict=True)]
        if not any(array.any() for array in ended):
            self._note(f"no episode ended within {self._steps} steps", "check with more steps, to see autoreset")
        if mode is AutoresetMode.SAME_STEP:
            for step, (array, info) in enumerate(zip(ended, seen.info, strict=True)):
                given = np.asarray(info.get("_final_obs", np.zeros(envs.num_envs, bool)))
                if (given != array).any():
                    row = int(np.flatnonzero(given != array)[0])
                    what = "has no" if array[row] else "has an uncalled-for"
                    fix = "put the true last observation there, with its mask in info['_final_obs']"
                    self._error(f"step {step}: row {row} {what} info['final_obs']", fix)
                    return
                for row in np.flatnonzero(array):
                    last = _row(info["final_obs"], int(row))
                    if why := outside(envs.single_observation_space, last, f"final_obs of row {row}"):
                        self._error(f"step {step}: {why}", "put an observation of single_observation_space there")
                        return
        elif mode is AutoresetMode.NEXT_STEP:
            for step in range(1, len(ended)):
                late = ended[step - 1] & ((seen.reward[step] != 0) | ended[step])
                if late.any():
                    what = f"step {step}: row {int(late.argmax())} ended the step before, and is paid or ends again"
                    self._error(what, "under NEXT_STEP this step only resets: reward 0, not terminated or truncated")
                    return

    def _rows(self, envs: VectorEnv, seen: _Seen) -> None:
        rows = list(iterate(envs.observation_space, seen.obs[0]))
        if len(rows) > 1 and all(difference({"x": rows[0]}, {"x": row}) is None for row in rows[1:]):
            self._note(
                "all rows begin with the same observation", "give every row a seed of its own, if anything is random"
            )

    def _same(self, one: _Seen, other: _Seen, who: str, fix: str) -> None:
        for step in range(len(one.obs)):
            at = step - 1
            left, right = ((x.obs[step], *((p[at] for p in x[1:4]) if step else ())) for x in (one, other))
            if where := difference(left, right, f"after {step} steps"):
                self._error(f"{who} differ: {where}", fix)
                return


def _row(final: Any, row: int) -> Any:
    """One row of ``final_obs``: an array of objects, or nested arrays."""
    if isinstance(final, Mapping):
        return {key: _row(value, row) for key, value in final.items()}
    return final[row]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_copy(inner) for inner in value)
    return np.array(value)
