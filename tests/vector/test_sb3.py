"""The SB3 vector: known infos on probes, SB3's own tools and algorithms on it, our agents in ``evaluate_policy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecMonitor

from mtrl import registry
from mtrl.types import Decision, Layout, Obs
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.sb3 import SB3Policy, SB3VecEnv
from mtrl.vector.views import PaddedVectorEnv
from mtrl_agents.random import Random

PROBES = "mtrl.testing:Probes"
TEAMS = "+".join(f"{PROBES}/{name}" for name in ("discrete", "masked", "team"))


def vector(suite: str, copies: int = 1) -> MultiTaskVectorEnv:
    return MultiTaskVectorEnv(registry.tasks(suite), copies, seed=7)


def play(venv: VecEnv, steps: int, *actions: int) -> list[Any]:
    """What ``steps`` steps with the same actions return."""
    venv.reset()
    return [venv.step(np.array(actions)) for _ in range(steps)]


def test_infos_of_a_time_limit_and_of_an_end() -> None:
    venv = SB3VecEnv(vector(f"{PROBES}/endless+{PROBES}/action"))
    first = venv.reset()
    assert venv.reset_infos == [{"task": "probe/endless"}, {"task": "probe/action"}]
    np.testing.assert_array_equal(first, np.array([[1, 0, 1, 0], [1, 0, 0, 1]], np.float32))
    for step, (observation, reward, done, infos) in enumerate(play(venv, 10, 0, 1), 1):
        assert (observation.dtype, reward.dtype, done.dtype) == (np.float32, np.float32, np.bool_)
        np.testing.assert_array_equal(reward, [1, 1])
        assert done.tolist() == [step == 10, True]
        assert [info["TimeLimit.truncated"] for info in infos] == [step == 10, False]
        assert infos[1]["is_success"] is True
        assert infos[1]["episode"] == {"r": 1.0, "l": 1}
    infos = play(venv, 10, 0, 1)[-1][3]
    assert infos[0]["episode"] == {"r": 10.0, "l": 10}
    assert infos[0]["task"] == "probe/endless"
    assert "is_success" not in infos[0]  # the task reports none
    np.testing.assert_array_equal(infos[0]["terminal_observation"], [1, 0, 1, 0])
    venv.close()


def test_team_rows_share_their_episode() -> None:
    venv = SB3VecEnv(vector(f"{PROBES}/team"))
    *_, done, infos = play(venv, 3, 2, 2)[-1]  # where 2 is not legal, the first legal one: 0
    assert done.all()
    assert infos[0]["episode"] == infos[1]["episode"]
    assert infos[0]["episode"]["l"] == 3
    venv.close()


def test_arrays_are_the_callers_own() -> None:
    mine, other = (SB3VecEnv(vector(f"{PROBES}/discrete")) for _ in range(2))
    np.asarray(mine.reset())[...] = 9
    for right in play(other, 5, *[1] * 6):
        left: Any = mine.step(np.ones(6, int))
        for one, two in zip(left[:3], right[:3], strict=True):
            np.testing.assert_array_equal(one, two)
            one[...] = 0
        left[3][0].clear()
    mine.close()
    other.close()


def test_seed_is_the_run_seed() -> None:
    venv, envs = SB3VecEnv(vector(TEAMS)), vector(TEAMS)
    padding = venv.view.padding
    for seed in (7, 3):
        venv.seed(seed)
        observation = venv.reset()
        envs.reset(seed=seed)
        np.testing.assert_array_equal(observation, padding.flat(padding.pad(envs.obs)))
    venv.close()
    envs.close()


def test_attributes_and_methods_of_rows() -> None:
    venv = SB3VecEnv(PaddedVectorEnv(vector(f"{PROBES}/masked", 3)))
    venv.reset()
    assert venv.get_attr("render_mode") == [None] * 3
    assert venv.has_attr("action_masks")
    assert not venv.has_attr("nonsense")
    masks = venv.env_method("action_masks", indices=[2, 0])
    np.testing.assert_array_equal(masks, venv.view.action_masks()[[2, 0]])
    assert venv.env_is_wrapped(Monitor, indices=1) == [True]
    with pytest.raises(NotImplementedError, match="share one vector"):
        venv.set_attr("reward", 1)
    with pytest.raises(ValueError, match="illegal='first'"):  # a view of one's own keeps its settings
        venv.step(np.argmin(venv.view.action_masks(), axis=1))
    venv.close()


def test_monitor_counts_what_the_vector_counts() -> None:
    inner = SB3VecEnv(vector(f"{PROBES}/discrete", 2))
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        venv = VecMonitor(VecCheckNan(inner, raise_exception=True))
    venv.reset()
    rng, seen = np.random.default_rng(0), 0
    for _ in range(25):
        *_, infos = venv.step(rng.integers(0, 2, 12))
        for episode in inner.view.envs.episodes:
            counted = infos[episode.slot]["episode"]
            assert (counted["r"], counted["l"]) == (episode.ret, episode.length)
            seen += 1
    assert seen > 100
    venv.close()


@pytest.mark.parametrize("flat", [True, False])
def test_ppo_learns(flat: bool) -> None:
    venv = VecCheckNan(SB3VecEnv(vector(f"{PROBES}/both+{PROBES}/action", 8), flat=flat), raise_exception=True)
    policy = "MlpPolicy" if flat else "MultiInputPolicy"
    model = PPO(policy, venv, n_steps=16, batch_size=64, n_epochs=4, learning_rate=1e-2, gamma=0.0, seed=0)
    model.learn(1600)
    mean, _ = evaluate_policy(model, venv, n_eval_episodes=64)
    assert mean == 1.0
    assert model.ep_success_buffer is not None
    assert np.mean(model.ep_success_buffer) > 0.9
    venv.close()


@pytest.mark.parametrize("flat", [True, False])
def test_ppo_on_masks_and_teams(flat: bool) -> None:
    venv = VecCheckNan(SB3VecEnv(vector(TEAMS), flat=flat), raise_exception=True)
    policy = "MlpPolicy" if flat else "MultiInputPolicy"
    PPO(policy, venv, n_steps=20, batch_size=60, n_epochs=1, seed=0).learn(180)
    venv.close()


def test_sac_learns() -> None:
    venv = VecCheckNan(SB3VecEnv(vector(f"{PROBES}/action-box+{PROBES}/both-box", 8)), raise_exception=True)
    options: dict[str, Any] = {"learning_rate": 1e-2, "gamma": 0.0, "policy_kwargs": {"net_arch": [32, 32]}}
    model = SAC("MlpPolicy", venv, learning_starts=160, batch_size=64, seed=0, ent_coef=0.005, **options)
    model.learn(2400)
    returns, _ = evaluate_policy(model, venv, n_eval_episodes=64)
    assert np.mean(returns) > -0.02  # uniform actions get -0.42
    venv.close()


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["minigrid/mt3", "metaworld/reach-v3"])
def test_sb3_trains_on_the_suites(suite: str) -> None:
    venv = VecCheckNan(SB3VecEnv(vector(suite)), raise_exception=True)
    if suite.startswith("minigrid"):
        PPO("MlpPolicy", venv, n_steps=128, batch_size=64, n_epochs=2, seed=0).learn(384)
    else:
        SAC("MlpPolicy", venv, learning_starts=100, batch_size=64, seed=0).learn(300)
    venv.close()


def own_count(suite: str, agent: Random, per_row: int) -> list[tuple[float, int]]:
    """(return, length) of the first ``per_row`` episodes of every row, in order of time, then of rows."""
    envs = vector(suite, 2)
    envs.reset()
    actor = agent.actor(envs.layout, explore=False)
    rows = np.repeat(np.arange(len(envs.slot_tasks)), [envs.spec.tasks[t].agents for t in envs.slot_tasks])
    counts, found = np.zeros(envs.num_envs, int), []
    while (counts < per_row).any():
        decision = actor(envs.obs)
        envs.step_async(decision.action)
        envs.step_wait(decision)
        for episode in envs.episodes:
            for row in np.flatnonzero((rows == episode.slot) & (counts < per_row)):
                counts[row] += 1
                found.append((episode.ret, episode.length))
    envs.close()
    return found


@pytest.mark.parametrize("suite", [TEAMS, f"{PROBES}/continuous", f"{PROBES}/image"])
def test_evaluate_policy_counts_what_we_count(suite: str) -> None:
    venv = SB3VecEnv(vector(suite, 2), flat="image" in suite)
    agent = Random(venv.view.envs.spec, Random.Config(), seed=11)
    episodes = 3 * venv.num_envs
    returns, lengths = evaluate_policy(
        SB3Policy(agent, venv), venv, n_eval_episodes=episodes, return_episode_rewards=True
    )
    assert isinstance(returns, list)
    assert isinstance(lengths, list)
    assert list(zip(returns, lengths, strict=True)) == own_count(suite, agent, 3)
    venv.close()


class Recorder:
    """An agent that plays action 0 and remembers what its actors were shown."""

    recurrent = True

    def __init__(self) -> None:
        self.firsts: dict[bool, list[list[bool]]] = {True: [], False: []}

    def actor(self, layout: Layout, *, explore: bool) -> Any:
        def act(obs: Obs) -> Decision:
            self.firsts[explore].append(obs.first.tolist())
            return Decision({name: np.zeros(len(leaves["vector"]), int) for name, leaves in obs.leaves.items()}, {})

        return act

    def observe(self, step: Any) -> None: ...
    def update(self) -> Mapping[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def load_policy(self, state: Mapping[str, Any]) -> None: ...


def test_policy_passes_episode_starts_to_the_agents_memory() -> None:
    venv = SB3VecEnv(vector(f"{PROBES}/memory+{PROBES}/delay"))
    agent = Recorder()
    policy = SB3Policy(agent, venv)
    observation: Any = venv.reset()
    starts = np.ones(2, bool)
    for _ in range(4):
        actions, state = policy.predict(observation, None, starts, True)
        assert state is None
        observation, _, starts, _ = venv.step(actions)
    assert agent.firsts[False] == [[True, True], [False, False], [False, True], [False, False]]
    for _ in range(2):
        policy.predict(observation)  # the sampling actor has seen nothing yet
    assert agent.firsts[True] == [[True, True], [False, False]]
    venv.close()


def test_policy_refuses_a_flat_view_that_hides_masks() -> None:
    venv = SB3VecEnv(vector(TEAMS))
    agent = Random(venv.view.envs.spec, Random.Config(), seed=0)
    with pytest.raises(ValueError, match=r"no alive or legal: use SB3VecEnv\(..., flat=False\)"):
        SB3Policy(agent, venv)
    venv.close()
