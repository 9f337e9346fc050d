"""SB3's algorithms through our contract: bit-equal to SB3's own loop up to the first update, isolated, resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from stable_baselines3 import PPO, SAC

from mtrl import registry
from mtrl.spaces import make_spec
from mtrl.testing import check_agent, drive
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.sb3 import SB3VecEnv
from mtrl_agents.sb3 import SB3PPO, SB3SAC, actor_seed

PROBES = "mtrl.testing:Probes"
SEED = 5
SMALL_PPO: dict[str, Any] = {"n_steps": 24, "batch_size": 24, "n_epochs": 3}


def made(kind: Any, suite: str, **options: Any) -> tuple[Any, Any]:
    tasks = registry.tasks(f"{PROBES}/{suite}")
    return kind(make_spec(tasks), kind.Config(**options), seed=SEED), tasks


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("suite", ["discrete", "continuous"])
def test_first_ppo_update_is_sb3s(suite: str) -> None:
    """Rollout with ends and time limits, bootstrap, GAE, minibatches: the parameters after it agree in every bit."""
    agent, tasks = made(SB3PPO, suite, **SMALL_PPO)
    updates = [metrics for _, metrics, _ in drive(agent, tasks, 25, seed=SEED) if metrics]
    assert len(updates) == 1
    venv = SB3VecEnv(MultiTaskVectorEnv(tasks, seed=SEED))
    model = PPO("MlpPolicy", venv, seed=SEED, **SMALL_PPO)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(actor_seed(SEED))  # SB3 samples actions from the global generator, our actor from its own
        model.learn(24 * venv.num_envs)
    assert_equal(agent.model.policy, model.policy)
    assert updates[0]["losses/loss"] == model.logger.name_to_value["train/loss"]
    venv.close()


def test_first_sac_update_is_sb3s(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"learning_starts": 125, "train_freq": 21, "gradient_steps": 4, "batch_size": 32}
    agent, tasks = made(SB3SAC, "continuous", **options)
    played = [action for step, _, _ in drive(agent, tasks, 22, seed=SEED) for action in step.decision.extras["action"]]
    venv = SB3VecEnv(MultiTaskVectorEnv(tasks, seed=SEED))
    model = SAC("MlpPolicy", venv, seed=SEED, **options)
    uniform = iter(played)
    monkeypatch.setattr(model.action_space, "sample", lambda: next(uniform))  # SB3's warm-up plays what ours played
    model.learn(21 * venv.num_envs)
    assert model._n_updates == agent.model._n_updates == 4
    assert_equal(agent.model.policy, model.policy)
    assert model.log_ent_coef is not None
    assert torch.equal(agent.model.log_ent_coef, model.log_ent_coef)
    venv.close()


@pytest.mark.parametrize(("steps", "gradient_steps"), [(1, 1), (-1, 6)])
def test_sac_clock(steps: int, gradient_steps: int) -> None:
    """6 rows, uniform actions up to 60 transitions; ``update`` sees the steps before the present one."""
    agent, tasks = made(SB3SAC, "continuous", learning_starts=60, batch_size=8, gradient_steps=steps)
    when = [t for t, (_, metrics, _) in enumerate(drive(agent, tasks, 15, seed=SEED)) if metrics]
    assert when == [11, 12, 13, 14]
    assert agent.model._n_updates == 4 * gradient_steps


def test_ppo_clock() -> None:
    agent, tasks = made(SB3PPO, "discrete", n_steps=4, batch_size=8)
    when = [t for t, (_, metrics, _) in enumerate(drive(agent, tasks, 14, seed=SEED)) if metrics]
    assert when == [4, 8, 12]


def global_states() -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), np.random.get_state(legacy=False)["state"]  # noqa: NPY002


@pytest.mark.parametrize(
    ("kind", "suite", "options"),
    [(SB3PPO, "continuous", SMALL_PPO), (SB3SAC, "continuous", {"learning_starts": 30, "batch_size": 8})],
)
def test_global_generators_are_left_alone(kind: Any, suite: str, options: dict[str, Any]) -> None:
    before, numpy_before = global_states()
    agent, tasks = made(kind, suite, **options)
    assert sum(bool(metrics) for _, metrics, _ in drive(agent, tasks, 26, seed=SEED)) >= 1
    after, numpy_after = global_states()
    assert torch.equal(before, after)
    assert numpy_before["pos"] == numpy_after["pos"]
    np.testing.assert_array_equal(numpy_before["key"], numpy_after["key"])


@pytest.mark.parametrize("seed", [0, 1])
def test_global_generators_do_not_matter(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    agent, tasks = made(SB3SAC, "continuous", learning_starts=30, batch_size=8)
    for _ in drive(agent, tasks, 8, seed=SEED):
        pass
    reference, _ = made(SB3SAC, "continuous", learning_starts=30, batch_size=8)
    for _ in drive(reference, tasks, 8, seed=SEED):
        pass
    assert_equal(agent.model.policy, reference.model.policy)


@pytest.mark.parametrize(
    ("kind", "groups", "options"),
    [
        (SB3PPO, ("discrete", "masked", "team"), {"n_steps": 8, "batch_size": 16, "n_epochs": 2}),
        (SB3SAC, ("continuous",), {"learning_starts": 60, "batch_size": 16, "buffer_size": 200}),
        (SB3SAC, ("continuous",), {"learning_starts": 60, "batch_size": 16, "ent_coef": 0.1, "train_freq": 3}),
    ],
)
def test_contract(kind: Any, groups: tuple[str, ...], options: dict[str, Any]) -> None:
    """Includes: a state through a checkpoint goes on bit for bit; the rings of the replay wrap around."""
    report = check_agent(kind, groups=groups, options=options)
    assert not report.findings, str(report)


@pytest.mark.parametrize(
    ("kind", "suite", "options"), [(SB3PPO, "discrete", SMALL_PPO), (SB3SAC, "continuous", {"learning_starts": 30})]
)
def test_policy_alone_is_enough_to_act(kind: Any, suite: str, options: dict[str, Any]) -> None:
    trained, tasks = made(kind, suite, **options)
    for _ in drive(trained, tasks, 25, seed=SEED):
        pass
    fresh = kind(trained.spec, kind.Config(**options), seed=SEED + 1)
    fresh.load_policy(trained.state_dict()["policy"])
    played, again = (
        np.array([step.decision.action["probe"] for step, *_ in drive(agent, tasks, 5, seed=SEED, explore=False)])
        for agent in (trained, fresh)
    )
    np.testing.assert_array_equal(played, again)


def test_ppo_learns_what_to_do() -> None:
    agent, tasks = made(SB3PPO, "both", n_steps=32, batch_size=64, gamma=0.0, learning_rate=1e-2)
    for _ in drive(agent, tasks, 260, copies=4, seed=SEED):
        pass
    rewards = [step.reward for step, *_ in drive(agent, tasks, 20, explore=False)]
    assert np.mean(rewards) == 1.0


def test_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"\['probe'\] have Discrete ones: use sb3-ppo or ppo"):
        made(SB3SAC, "discrete")
    with pytest.raises(ValueError, match=r"have Discrete actions and \['probe-2'\] have Box actions"):
        made(SB3PPO, "mix")
    with pytest.raises(ValidationError, match="ent_coef"):
        SB3SAC.Config.model_validate({"ent_coef": "automatic"})


def test_rows_must_stay_the_same() -> None:
    agent, tasks = made(SB3PPO, "discrete", **SMALL_PPO)
    step, *_ = next(iter(drive(agent, tasks, 1)))
    with pytest.raises(ValueError, match="5 of them active"):
        agent.observe(step._replace(active=np.arange(6) > 0))
    with pytest.raises(ValueError, match="the same 6 rows"):
        for _ in drive(agent, tasks, 1, copies=2):
            pass


def test_buffer_sizes_must_agree() -> None:
    agent, tasks = made(SB3PPO, "discrete", **SMALL_PPO)
    for _ in drive(agent, tasks, 2):
        pass
    other, _ = made(SB3PPO, "discrete", n_steps=12, batch_size=24)
    with pytest.raises(ValueError, match="room for 24 steps, this one for 12"):
        other.load_state_dict(agent.state_dict())


def test_losses_that_are_not_finite_stop_the_run() -> None:
    agent, tasks = made(SB3PPO, "discrete", n_steps=4, batch_size=24, n_epochs=1)
    for _ in drive(agent, tasks, 4):
        pass
    agent.model.rollout_buffer.advantages[...] = np.nan
    with pytest.raises(FloatingPointError, match="policy_gradient_loss is nan in SB3's update 1"):
        agent.update()


def test_spaces_are_those_of_the_sb3_view() -> None:
    agent, tasks = made(SB3PPO, "discrete", **SMALL_PPO)
    venv = SB3VecEnv(MultiTaskVectorEnv(tasks))
    assert agent.model.observation_space == venv.observation_space
    assert agent.model.action_space == venv.action_space
    venv.close()
