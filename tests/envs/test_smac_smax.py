"""Our rules against SMAX of jaxmarl 0.2.0, step by step from the same situation (``pip install "mtrl-suite[smax]"``).

Before each step, positions, health, cooldowns and last actions are copied from the reference, which decides for its
enemies; the allies act by the scripted policy or at random. Then both make the step, with the reference's own noise.
What lies within rounding of a range or of a cooldown's end is skipped, since float32 orders of summation differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jaxmarl")
pytest.importorskip("numba")

from mtrl_envs.smac import kernels
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.kernels import ATTACK, KIND, LIFE, MEMORY, MOVE, RANGE, SIGHT, STOP, TARGET, TICKS, WAIT, X, Y
from mtrl_envs.smac.scenarios import parse

jax: Any = pytest.importorskip("jax")
smax: Any = pytest.importorskip("jaxmarl.environments.smax")

MAPS = ("3m", "2s3z", "5m_vs_6m", "3s_vs_5z", "3s5z", "6h_vs_8z", "3s5z_vs_3s6z")
BATTLES = 6
WAYS = np.array([[0, 1], [1, 0], [0, -1], [-1, 0], [0, 0]])


def noise_of(key: Any, n: int) -> Any:
    """The cooldown noise [8, U] that the reference draws in a step with this key."""
    draw = jax.vmap(lambda one: jax.random.uniform(one, minval=-1 / 16, maxval=2 / 16))
    found = []
    for _ in range(TICKS):
        key, tick = jax.random.split(key)
        found.append(draw(jax.random.split(tick, n)))
    return jax.numpy.stack(found)


def codes(moves: np.ndarray, attacks: np.ndarray, n_allies: int) -> np.ndarray:
    """The reference's decoded actions [U, 2] and [U] as ours: 0-4, or 5 + unit."""
    walk = np.argmax(np.rint(moves) @ WAYS.T + 0.5 * (WAYS == 0).all(1), 1)
    index = np.arange(len(attacks))
    target = np.where(index < n_allies, attacks - ATTACK + n_allies, n_allies - 1 - (attacks - ATTACK))
    return np.where(attacks >= ATTACK, ATTACK + target, walk)


def copy_state(battles: Battles, state: Any) -> None:
    """Bring our only battle to where the reference is."""
    f, k = battles.floats[0], battles.ints[0]
    f[X], f[Y] = np.asarray(state.unit_positions).T
    f[LIFE] = np.where(state.unit_alive, state.unit_health, 0)
    f[WAIT] = state.unit_weapon_cooldowns
    code = codes(np.asarray(state.prev_movement_actions), np.asarray(state.prev_attack_actions), battles.n_allies)
    k[MOVE], k[TARGET] = np.minimum(code, STOP), np.where(code >= ATTACK, code - ATTACK, -1)
    battles._observe(np.ones(1, bool))


def gaps(f: np.ndarray) -> np.ndarray:
    """Distances between all units, [U, U]."""
    return np.hypot(f[X][:, None] - f[X], f[Y][:, None] - f[Y])


def close(f: np.ndarray) -> np.ndarray:
    """Units [U] with somebody so near to the edge of their sight or range that rounding decides."""
    far = gaps(f)
    edge = np.minimum(abs(far - f[RANGE][:, None]), abs(far - f[SIGHT][:, None]))
    return edge.min(1) < 1e-4


def our_state(state: np.ndarray, n: int, f: np.ndarray) -> np.ndarray:
    """The reference's global state in our units: places over 32, cooldowns over the type's, no type ids."""
    units = state[: 10 * n].reshape(n, 10).copy()
    units[:, 1:3] /= 32
    units[:, 3] = np.clip(units[:, 3] / f[kernels.COOLDOWN], 0, 1)
    return np.concatenate([units.ravel(), state[10 * n : 11 * n]])


class Comparison:
    """One map, battle after battle; keeps the largest differences."""

    def __init__(self, name: str) -> None:
        self.env: Any = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(name))
        inner = self.env._env
        self.reset = jax.jit(self.env.reset)
        self.decide = jax.jit(self.env.get_enemy_actions)
        self.decode = jax.jit(inner._decode_discrete_actions)
        self.step = jax.jit(lambda key, state, actions: inner.step_env_no_decode(key, state, actions))
        self.unit_obs = jax.jit(inner.get_obs_unit_list)
        self.legal = jax.jit(inner.get_avail_actions)
        self.noise = jax.jit(noise_of, static_argnums=1)
        self.battles = Battles([parse(name)], 1)
        self.worst: dict[str, float] = dict.fromkeys(("place", "wait", "life", "reward", "obs", "state"), 0.0)
        self.steps = self.decisions = self.walks = 0

    def worse(self, name: str, ours: Any, theirs: Any) -> None:
        self.worst[name] = max(self.worst[name], float(np.abs(np.asarray(ours) - np.asarray(theirs)).max()))

    def play(self, seed: int) -> None:
        battles, n_allies = self.battles, self.battles.n_allies
        f, k = battles.floats[0], battles.ints[0]
        n, rng, key = f.shape[1], np.random.default_rng(seed), jax.random.PRNGKey(seed)
        key, start = jax.random.split(key)
        _, joint = self.reset(start)
        state, memory = joint.state, joint.enemy_policy_state
        battles.reset(np.ones(1, bool), np.array([seed]))
        f[kernels.HOME_X], f[kernels.HOME_Y] = np.asarray(state.unit_positions).T
        while not bool(state.done):
            copy_state(battles, state)
            self.compare_views(state)
            key, think, fight = jax.random.split(key, 3)
            obs = self.unit_obs(state)
            enemy_obs = np.array([obs[agent] for agent in self.env.enemy_agents])
            chosen, memory = self.decide(think, memory, enemy_obs)
            scripted = battles.script()[0]
            random = np.array([rng.choice(np.flatnonzero(row)) for row in battles.legal[0]])
            allies = scripted if seed % 2 else random
            actions = np.concatenate([allies, [chosen[agent] for agent in self.env.enemy_agents]]).astype(np.int32)
            moves, attacks = self.decode(actions)
            theirs = codes(np.asarray(moves), np.asarray(attacks), n_allies)
            self.compare_decisions(theirs)
            before = f[LIFE].copy()
            k[MOVE], k[TARGET] = np.minimum(theirs, STOP), np.where(theirs >= ATTACK, theirs - ATTACK, -1)
            doubtful = close(f) | (abs(f[WAIT]) < 1e-5)
            noise, scratch = np.asarray(self.noise(fight, n)), np.empty((2, n), np.float32)
            kernels.fight(f, k, noise, True, np.empty(n, np.float32), scratch)
            _, state, reward, _, _ = self.step(fight, state, (moves, attacks))
            self.steps += 1
            if not doubtful.any():
                self.compare_states(state, before, float(reward["ally_0"]))

    def compare_views(self, state: Any) -> None:
        """Legal actions, observations and the global state of the same situation."""
        battles, f = self.battles, self.battles.floats[0]
        legal, obs, doubtful = self.legal(state), self.unit_obs(state), close(f)
        for i in range(battles.n_allies):
            if not doubtful[i]:
                np.testing.assert_array_equal(battles.legal[0, i], np.asarray(legal[f"ally_{i}"]) > 0)
                self.worse("obs", battles.obs[0, i], obs[f"ally_{i}"])
        whole = np.asarray(self.env.get_world_state(type("Joint", (), {"state": state})), np.float32)
        self.worse("state", battles.state[0], our_state(whole, f.shape[1], f))

    def compare_decisions(self, theirs: np.ndarray) -> None:
        """The enemies' choices; a walk only where at most one ally is visible, else it is drawn."""
        battles, f = self.battles, self.battles.floats[0]
        far, doubtful = gaps(f), close(f)
        for i in range(battles.n_allies, f.shape[1]):
            if f[LIFE, i] <= 0 or doubtful[i]:
                self.battles.ints[0, MEMORY, i] = theirs[i] - ATTACK if theirs[i] >= ATTACK else -1
                continue
            ours = kernels.script(
                f, battles.ints[0], i, battles.clocks.key[0], self.steps, battles.n_allies, True, False
            )
            self.decisions += 1
            if max(ours, theirs[i]) >= ATTACK:
                assert ours == theirs[i]
            elif ((far[i, : battles.n_allies] < f[SIGHT, i]) & (f[LIFE, : battles.n_allies] > 0)).sum() <= 1:
                self.walks += 1
                assert ours == theirs[i]

    def compare_states(self, state: Any, before: np.ndarray, reward: float) -> None:
        f, n_allies = self.battles.floats[0], self.battles.n_allies
        alive = np.asarray(state.unit_alive)
        np.testing.assert_array_equal(f[LIFE] > 0, alive)
        self.worse("place", f[[X, Y]].T[alive], np.asarray(state.unit_positions)[alive])
        self.worse("wait", f[WAIT][alive], np.asarray(state.unit_weapon_cooldowns)[alive])
        self.worse("life", f[LIFE], np.where(alive, state.unit_health, 0))
        lost = ((before - f[LIFE]) / f[kernels.HEALTH])[n_allies:]
        won = not alive[n_allies:].any() and alive[:n_allies].any()
        self.worse("reward", lost.mean() + won, reward)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_teacher_forced(name: str) -> None:
    comparison = Comparison(name)
    reference = comparison.env._env
    kinds = np.asarray(reference.scenario)
    comparison.battles.reset(np.ones(1, bool), np.array([0]))
    np.testing.assert_array_equal(comparison.battles.ints[0, KIND], kinds)
    for seed in range(BATTLES):
        comparison.play(seed)
    print(name, comparison.steps, comparison.decisions, comparison.walks, comparison.worst)
    limits = {"place": 1e-4, "wait": 1e-5, "life": 0.0, "reward": 1e-6, "obs": 1e-6, "state": 1e-6}
    assert {key: value for key, value in comparison.worst.items() if value > limits[key]} == {}
    assert comparison.steps > 50
    assert comparison.decisions > 200
