from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl import registry
from mtrl.nn.cuda_graph import WARM, Graphed
from mtrl.nn.descent import unchecked
from mtrl.nn.normalizers import MaxReturnScale
from mtrl.nn.trunk import TrunkConfig
from mtrl.replay import as_kept
from mtrl.spaces import make_spec
from mtrl.testing import VALUES, check_agent
from mtrl.types import Decision, Group, Layout, Obs, Spec, Step, TaskInfo
from mtrl.vector import MultiTaskVectorEnv
from mtrl_agents.sac import SAC, SACActor
from tests.ragged import RAGGED_LAYOUT, ragged_obs, ragged_run, ragged_spec

SMALL: dict[str, Any] = {
    "trunk": TrunkConfig(widths=(32, 32)),
    "batch_size": 16,
    "capacity": 2_000,
    "warmup": 8,
    "log_every": 4,
}
LINE = Box(-1.0, 1.0, (1,), np.float32)


def make(spec: Spec, seed: int = 0, **options: Any) -> SAC:
    return SAC(spec, SAC.Config(**{**SMALL, **options}), seed=seed)


def train(agent: SAC, envs: MultiTaskVectorEnv, actor: Any, steps: int) -> list[Mapping[str, float]]:
    metrics = []
    for _ in range(steps):
        decision = actor(envs.obs)
        envs.step_async(decision.action)
        metrics.append(agent.update())
        step, _ = envs.step_wait(decision)
        agent.observe(step)
    return [found for found in metrics if found]


def same(one: Any, two: Any, place: str = "") -> None:
    """Assert that two states are equal bit for bit."""
    if isinstance(one, Mapping):
        assert set(one) == set(two), place
        for key in one:
            same(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), place
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{place}/{i}")
    elif isinstance(one, torch.Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two), err_msg=place)
    else:
        assert one == two, place


def constant_targets(agent: SAC, value: float) -> None:
    """Make both target critics say ``value`` everywhere."""
    with torch.no_grad():
        for critic in agent.targets:
            layer = critic.head.layers[-1]  # type: ignore[union-attr, index]
            layer.weight.zero_()  # type: ignore[union-attr, operator]
            layer.bias.fill_(value)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("terminated", [False, True])
def test_targets_equal_the_closed_form(terminated: bool) -> None:
    agent = make(ragged_spec(), gamma=0.9)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20, terminated=terminated)  # type: ignore[arg-type]
    constant_targets(agent, 3.0)
    rows = agent._batch()[1]
    with torch.no_grad():
        hard = agent._target(rows, torch.zeros(len(rows.task)))
        soft = agent._target(rows, torch.full((len(rows.task),), 0.5))
        log_prob = agent._act(rows.next, rows.task, rows.next_noise)[1]
    ahead = 0.0 if terminated else 0.9  # a truncation bootstraps, a termination does not
    torch.testing.assert_close(hard, torch.full_like(hard, 1.0 + ahead * 3.0))
    torch.testing.assert_close(hard - soft, ahead * 0.5 * log_prob)


def test_categorical_target_moves_the_mass_to_the_target_value() -> None:
    agent = make(ragged_spec(), gamma=0.9, critic="categorical")
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    constant_targets(agent, 0.0)
    with torch.no_grad():
        for critic in agent.targets:
            critic.head.layers[-1].bias[:, 70] = 100.0  # type: ignore[union-attr, index, operator] # all mass on atom 4.0
        target = agent._target(agent._batch()[1], torch.zeros(3 * 16))
    torch.testing.assert_close(target @ agent.support, torch.full((48,), 1 + 0.9 * 4.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(target[:, 73], torch.ones(48), rtol=0, atol=1e-3)


def test_every_task_weighs_the_same() -> None:
    agent = make(ragged_spec())
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    assert torch.bincount(agent._batch()[1].task).tolist() == [16, 16, 16]


def test_actions_stay_in_their_groups_bounds_and_fill_them() -> None:
    agent = make(ragged_spec(), warmup=100)
    explored = ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 150)  # type: ignore[arg-type]
    arm = np.concatenate([decision.action["arm"] for decision in explored])
    eye = np.concatenate([decision.action["eye"] for decision in explored])
    assert arm.dtype == np.float32
    assert eye.shape == (150, 1)
    assert (arm >= [0, -4]).all()
    assert (arm <= [5, 2]).all()
    np.testing.assert_allclose(arm[:200].mean(0), [2.5, -1.0], atol=0.5)  # uniform while warming up
    assert np.ptp(arm[:200], 0).min() > 4.5
    unit = agent.policy.to_unit(torch.as_tensor(arm), "arm")
    np.testing.assert_allclose(agent.policy.to_env(unit, "arm").numpy(), arm, atol=1e-5)


def test_bounds_that_leave_no_choice_do_no_harm() -> None:
    spec = ragged_spec()
    low, high = np.array([0.0, -4.0], np.float32), np.array([0.0, 2.0], np.float32)
    spec = dataclasses.replace(
        spec, groups=(dataclasses.replace(spec.groups[0], action=Box(low, high)), spec.groups[1])
    )
    agent = make(spec)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    assert agent.updates > 3
    assert agent.policy.to_unit(torch.tensor([[0.0, -1.0]]), "arm").tolist() == [[-1, 0]]


def test_greedy_actors_repeat_themselves_and_leave_training_alone() -> None:
    agent = make(ragged_spec())
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    state = copy.deepcopy(agent.state_dict())
    obs = ragged_obs(np.random.default_rng(5))
    greedy = agent.actor(RAGGED_LAYOUT, explore=False)
    same(greedy(obs).action, greedy(obs).action)
    same(state, agent.state_dict())


def test_rows_of_a_task_do_not_depend_on_their_neighbours() -> None:
    agent = make(ragged_spec())
    obs = ragged_obs(np.random.default_rng(5))
    both = agent.actor(RAGGED_LAYOUT, explore=False)(obs).action
    alone = Obs({"eye": obs.leaves["eye"]}, obs.task[2:], obs.first[2:])
    action = agent.actor(Layout({"eye": slice(0, 1)}, 1), explore=False)(alone).action
    np.testing.assert_allclose(action["eye"], both["eye"], rtol=1e-5)


def test_discrete_groups_are_refused_by_name() -> None:
    spec = ragged_spec()
    groups = (*spec.groups, Group("maze", {"vector": LINE}, Discrete(3), (3,)))
    with pytest.raises(ValueError, match="group 'maze' has Discrete"):
        make(Spec((*spec.tasks, TaskInfo("probe/3", "maze", 5)), groups))


@pytest.mark.parametrize("options", [{}, {"critic": "categorical", "reward_scale": "max_return", "updates": 2}])
def test_resume_is_exact_at_any_step(options: dict[str, Any]) -> None:
    tasks = registry.tasks("mtrl.testing:Probes/continuous")
    spec = make_spec(tasks)
    for moment in (3, 14):  # while warming up; between two records of metrics
        envs = MultiTaskVectorEnv(tasks, 1, seed=0, spec=spec)
        envs.reset(seed=0)
        agent = make(spec, **options)
        actor = agent.actor(envs.layout, explore=True)
        train(agent, envs, actor, moment)
        state = copy.deepcopy({"agent": agent.state_dict(), "actor": actor.state_dict(), "envs": envs.state_dict()})
        metrics = train(agent, envs, actor, 20)

        other = make(spec, seed=7, **options)
        resumed = MultiTaskVectorEnv(tasks, 1, seed=0, spec=spec)
        resumed.reset(seed=0)
        other_actor = other.actor(resumed.layout, explore=True)
        for name, part in (("agent", other), ("actor", other_actor), ("envs", resumed)):
            part.load_state_dict(state[name])
        assert train(other, resumed, other_actor, 20) == metrics
        assert metrics
        same(agent.state_dict(), other.state_dict())
        envs.close()
        resumed.close()


def test_saved_route_of_products_survives_another_probe() -> None:
    agent = make(ragged_spec(), matmul="default")
    other = make(ragged_spec(), matmul="onednn")
    other.load_state_dict(agent.state_dict())
    assert other.route == "default"


def test_a_loaded_policy_acts_as_the_saved_one_without_random_play() -> None:
    agent = make(ragged_spec())
    other = make(ragged_spec(), seed=3)
    other.load_policy(agent.state_dict()["policy"])
    obs = ragged_obs(np.random.default_rng(5))
    same(
        agent.actor(RAGGED_LAYOUT, explore=False)(obs).action,
        other.actor(RAGGED_LAYOUT, explore=False)(obs).action,
    )
    random = agent.actor(RAGGED_LAYOUT, explore=True)(obs).action["arm"]
    assert not np.allclose(other.actor(RAGGED_LAYOUT, explore=True)(obs).action["arm"], random)


def test_a_seed_decides_the_networks_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = make(ragged_spec()), make(ragged_spec()), make(ragged_spec(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    same(one.state_dict()["policy"], two.state_dict()["policy"])
    first = next(iter(one.state_dict()["policy"]))
    assert not torch.equal(one.state_dict()["policy"][first], other.state_dict()["policy"][first])
    critics = one.state_dict()["critics"]
    assert not torch.equal(critics["0.trunk.layers.0.weight"], critics["1.trunk.layers.0.weight"])


def test_a_reward_that_is_not_finite_stops_before_the_parameters_change() -> None:
    agent = make(ragged_spec())
    actor = agent.actor(RAGGED_LAYOUT, explore=True)
    ragged_run(agent, actor, 20)  # type: ignore[arg-type]
    agent.replay._rings["eye"]._data["reward"][:20] = np.nan
    critics = copy.deepcopy(agent.critics.state_dict())
    with pytest.raises(FloatingPointError, match=r"the critic loss of probe/1 is not finite at update \d+"):
        agent.update()
    same(critics, agent.critics.state_dict())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    agent = make(ragged_spec())
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    weight = agent.policy.get_parameter("trunk.layers.0.weight")
    weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError, match=r"actor gradient of trunk\.layers\.0\.weight is not finite"):
        agent.update()


def test_products_in_bf16_stay_close_to_fp32() -> None:
    found = []
    for route in ("default", "bf16"):
        agent = make(ragged_spec(), matmul=route)
        ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 40)  # type: ignore[arg-type]
        found.append(agent.policy.get_parameter("trunk.layers.0.weight").detach())
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


def test_clock_counts_vector_steps_and_waits_for_the_warmup() -> None:
    agent = make(ragged_spec(), warmup=10, update_every=3, updates=2)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    assert agent.updates == 2 * len([step for step in range(20) if step >= 10 and step % 3 == 0])


def critic_losses(agent: SAC) -> list[float]:
    """A list that gets the critics' loss of each update from now on."""
    seen: list[float] = []
    step = agent._step

    def look(rows: Any) -> dict[str, torch.Tensor]:
        found = step(rows)
        seen.append(found["critic"].item())
        return found

    agent._step = look  # type: ignore[method-assign]
    return seen


def test_metrics_average_the_updates_since_the_last_record() -> None:
    agent = make(ragged_spec(), warmup=10, log_every=5, alpha=0.3, alpha_lr=1e-9)
    actor = agent.actor(RAGGED_LAYOUT, explore=True)
    ragged_run(agent, actor, 14)  # type: ignore[arg-type]  # updates 1 to 4
    seen = critic_losses(agent)
    before = agent._sums["losses/critic"].item()
    metrics = agent.update()
    assert metrics["losses/critic"] == pytest.approx((before + seen[0]) / 5)
    assert metrics["charts/probe/1_alpha"] == pytest.approx(0.3)
    assert set(metrics) == {f"losses/{name}" for name in ("critic", "actor", "alpha")} | {
        f"charts/probe/{t}_{name}" for t in range(3) for name in ("alpha", "q")
    }
    assert agent._sums == {}


@pytest.mark.parametrize(("updates", "records"), [(6, 4), (3, 4)])
def test_a_record_averages_all_updates_since_the_last(updates: int, records: int) -> None:
    """Also where a vector step makes more of them than a record takes."""
    agent = make(ragged_spec(), warmup=10, log_every=2, updates=updates)
    seen = critic_losses(agent)
    actor = SACActor(agent, RAGGED_LAYOUT, True)
    ragged_run(agent, actor, 12)
    means, start = [], len(seen)
    for _ in range(records):
        means.append(agent.update()["losses/critic"])
        assert means[-1] == pytest.approx(np.mean(seen[start : start + updates])), (seen, means)
        start = len(seen)


def test_reward_scales_see_what_the_replay_keeps() -> None:
    """Death ends a unit's return, and the dead earn nothing, where rewards are not shared."""
    leaves = {"vector": LINE, "alive": Box(0, 1, (), np.bool_)}  # type: ignore[call-overload]
    spec = Spec((TaskInfo("probe/a", "arm", 5, agents=2),), (Group("arm", leaves, LINE, (0,)),))
    alive = [np.array(x) for x in ([True, True], [False, True], [False, True])]
    no = np.zeros(2, bool)

    def step(now: int, reward: list[float], truncated: bool) -> Step:
        before, after = (
            Obs({"arm": {"vector": np.zeros((2, 1), np.float32), "alive": x}}, np.zeros(2, int), no)
            for x in (alive[now], alive[now + 1])
        )
        action = Decision({"arm": np.zeros((2, 1), np.float32)}, {})
        return Step(before, action, np.array(reward), no, np.full(2, truncated), no, after, ~no)

    first, second = as_kept(step(0, [1.0, 0.0], False), spec), as_kept(step(1, [7.0, 0.0], True), spec)
    assert first.terminated.tolist() == [True, False]
    assert second.active.tolist() == [False, True]
    scale = MaxReturnScale(1, gamma=0.9)
    scale.observe(first)
    scale.observe(second)
    assert scale.largest.tolist() == [1.0]


def scale_step(reward: float, *, end: str = "", task: int = 0) -> Step:
    obs = Obs({}, np.array([task]), np.zeros(1, bool))
    ends = (np.array([end == "terminated"]), np.array([end == "truncated"]))
    return Step(obs, Decision({}, {}), np.array([reward]), *ends, np.zeros(1, bool), obs, np.ones(1, bool))


@pytest.mark.parametrize(
    ("end", "largest"),
    [("truncated", 2.0), ("terminated", 1.5)],  # 1 + .5 (1 + .5 x 2) with the bootstrap 1 / (1 - .5), or 1 + .5
)
def test_max_return_scale_known_answers(end: str, largest: float) -> None:
    scale = MaxReturnScale(2, gamma=0.5)
    none, entropy = np.zeros(2), np.full(2, -2.0)
    scale.observe(scale_step(1.0))
    assert scale.divisors(none, entropy).tolist() == [1, 1]  # no episode has ended
    scale.observe(scale_step(1.0, end=end))
    np.testing.assert_allclose(scale.divisors(none, entropy), [largest / 10, 1])
    # Room for the entropy bonus: alpha |H| / (2 (1 - gamma)) = .1 x 2 / (2 x .5).
    np.testing.assert_allclose(scale.divisors(np.full(2, 0.1), entropy), [(largest + 0.2) / 10, 1])
    copied = MaxReturnScale(2, gamma=0.5)
    copied.load_state_dict(scale.state_dict())
    for one in (scale, copied):
        one.observe(scale_step(-9.0, end="terminated", task=1))
    np.testing.assert_allclose(copied.divisors(none, entropy), [largest / 10, 0.9])


def test_probes_reach_their_known_values() -> None:
    """All continuous probes at once: the values and actions that only a right agent finds."""
    gamma = 0.8
    tasks = registry.tasks("mtrl.testing:Probes/continuous")
    spec = make_spec(tasks)
    options = {"trunk": TrunkConfig(widths=(64, 64)), "batch_size": 64, "lr": 3e-3, "tau": 0.05, "warmup": 100}
    agent = make(spec, gamma=gamma, alpha=1e-3, alpha_lr=1e-6, **options)
    envs = MultiTaskVectorEnv(tasks, 4, seed=0, spec=spec)
    envs.reset(seed=0)
    train(agent, envs, agent.actor(envs.layout, explore=True), 450)
    envs.reset(seed=1)
    greedy = agent.actor(envs.layout, explore=False)(envs.obs)
    leaves = {name: {k: torch.as_tensor(v) for k, v in found.items()} for name, found in envs.obs.leaves.items()}
    unit = {name: agent.policy.to_unit(torch.as_tensor(action), name) for name, action in greedy.action.items()}
    with torch.no_grad():
        values = torch.minimum(*(critic(leaves, unit, torch.as_tensor(envs.obs.task)) for critic in agent.critics))
    cue = next(iter(envs.obs.leaves.values()))["vector"][:, 0]
    for t, task in enumerate(tasks):
        short = task.name.partition("/")[2]
        own = envs.obs.task == t
        expected = cue[own] if short == "observation-box" else VALUES[short](gamma)
        np.testing.assert_allclose(values[own, 0].numpy(), expected, atol=0.15, err_msg=short)
    action = next(iter(greedy.action.values()))[:, 0]
    names = np.array([task.name for task in tasks])[envs.obs.task]
    np.testing.assert_allclose(action[names == "probe/action-box"], 0.3, atol=0.1)
    both = names == "probe/both-box"
    np.testing.assert_allclose(action[both], 0.3 * cue[both], atol=0.1)
    envs.close()


def test_temperature_moves_towards_its_target_entropy_per_task() -> None:
    agent = make(ragged_spec(), alpha_lr=0.01, alpha=1.0)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 60)  # type: ignore[arg-type]
    # Far above the target of -2 and -1, entropies of a fresh policy push every temperature down.
    assert (agent.log_alpha.detach() < math.log(1.0)).all()
    assert agent.target_entropy.tolist() == [-2.0, -1.0, -2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"critic_gradients": "upgrad", "actor_gradients": "pcgrad"},
        {"critic_balance": "famo"},
        {"critic_balance": "uncertainty", "reward_scale": "mean_reward"},
        {"critic_balance": "igb", "critic": "categorical", "reward_scale": "max_return"},
        {"average": 0.9},
    ],
    ids=["gradients", "famo", "uncertainty", "igb", "average"],
)
def test_options_keep_the_contract(options: dict[str, Any]) -> None:
    pytest.importorskip("torchjd")
    small = {"warmup": 4, "batch_size": 4, "capacity": 200, "log_every": 1, "trunk": {"kind": "moore", "widths": (8,)}}
    report = check_agent(SAC, options={**small, **options}, groups=("continuous",), steps=16)
    assert report.ok, str(report)


class Again:
    """Stands in for a CUDA graph on the CPU: a replay does the work again."""

    def __init__(self, agent: SAC, record: Any) -> None:
        self.agent, self.record = agent, record

    def replay(self) -> None:
        with unchecked(list(self.agent.descents.values()), self.agent.device):
            self.record.outputs = self.agent._step(self.record.inputs)


def recorded(monkeypatch: pytest.MonkeyPatch, agent: SAC) -> SAC:
    """The agent, with updates from stand-ins for recordings."""
    monkeypatch.setattr(Graphed, "_record", lambda self, work, record: setattr(record, "graph", Again(agent, record)))
    agent._update.on = True
    return agent


def weights(agent: SAC) -> dict[str, torch.Tensor]:
    nets = {"policy": agent.policy, "critics": agent.critics, "targets": agent.targets}
    found = {f"{name}/{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    return {key: value.clone() for key, value in {**found, "alpha": agent.log_alpha.detach()}.items()}


def test_recorded_updates_are_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = [make(ragged_spec()), recorded(monkeypatch, make(ragged_spec()))]
    for agent in agents:
        ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    assert agents[1]._update.replays == agents[1].updates - WARM == 10
    for key, value in weights(agents[0]).items():
        assert torch.equal(value, weights(agents[1])[key]), key


@pytest.mark.parametrize("part", ["critic", "actor"])
@pytest.mark.parametrize("graph", [False, True])
def test_an_update_that_is_not_finite_names_the_task_and_leaves_what_comes_after_it(
    part: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make(ragged_spec())
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    agent = recorded(monkeypatch, agent) if graph else agent
    task, rows = agent._batch()
    for _ in range(WARM + 1):
        agent._learn(task, rows)
    assert agent._update.replays == graph
    before = weights(agent)
    broken = rows._replace(reward=rows.reward.masked_fill(rows.task == 1, torch.inf))
    if part == "actor":
        broken = rows._replace(noise={**rows.noise, "eye": torch.full_like(rows.noise["eye"], torch.nan)})
    with pytest.raises(FloatingPointError, match=f"the {part} loss of {agent.names[1]} is not finite at update"):
        agent._learn(task, broken)
    moved = {key.partition("/")[0] for key, value in weights(agent).items() if not torch.equal(value, before[key])}
    assert moved == (set() if part == "critic" else {"critics"})
    agent._learn(task, rows)  # nothing is left frozen
    assert all(bool(value.isfinite().all()) for value in weights(agent).values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"matmul": "bf16"}, "matmul=bf16"),
        ({"critic_gradients": "pcgrad"}, "critic_gradients=pcgrad"),
        ({"critic_balance": "famo"}, "critic_balance"),
        ({"critic_trunk": {"kind": "moe_topk", "widths": [8]}}, "critic_trunk.kind=moe_topk"),
    ],
)
def test_what_a_cuda_graph_cannot_hold_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graph=true cannot record {named}"):
        SAC.Config(cuda_graph=True, **options)
    assert SAC.Config(**options).unrecordable == [named], "auto computes it kernel by kernel"
    assert not make(ragged_spec()).config.unrecordable


def test_an_agent_that_nobody_needs_is_freed_at_once() -> None:
    agent = make(ragged_spec())
    actor = agent.actor(RAGGED_LAYOUT, explore=True)
    ragged_run(agent, actor, 12)  # type: ignore[arg-type]
    gone = weakref.ref(agent)
    gc.collect()
    gc.disable()
    try:
        del agent, actor
        assert gone() is None
    finally:
        gc.enable()


def test_targets_follow_the_critics_without_remembering_how() -> None:
    agent = make(ragged_spec(), tau=0.25)
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 12)
    before = [p.clone() for p in agent.targets.parameters()]
    agent.update()
    for old, new, critic in zip(before, agent.targets.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25 * (critic - old))
        assert new.is_leaf
        assert not new.requires_grad


def test_greedy_actions_are_those_of_the_policys_average() -> None:
    obs = ragged_obs(np.random.default_rng(5))
    agent, plain = make(ragged_spec(), average=0.75, lr=0.01), make(ragged_spec(), lr=0.01)
    with torch.no_grad():  # as a transfer does
        for one in (agent, plain):
            for parameter in one.policy.parameters():
                parameter.mul_(0.5)
    look = {one: one.actor(RAGGED_LAYOUT, explore=False) for one in (agent, plain)}
    same(look[agent](obs).action, look[plain](obs).action)
    for one in (agent, plain):
        ragged_run(one, one.actor(RAGGED_LAYOUT, explore=True), 12)
    for _ in range(3):
        before = [p.clone() for p in agent.average.slow.parameters()]
        agent.update()
        for old, new, now in zip(before, agent.average.slow.parameters(), agent.policy.parameters(), strict=True):
            torch.testing.assert_close(new, old + 0.25 * (now - old))
        plain.update()
    same(agent.policy.state_dict(), plain.policy.state_dict())  # which learns as if there were no average
    greedy = look[agent](obs).action
    assert not np.allclose(greedy["arm"], look[plain](obs).action["arm"])
    explored = [one.actor(RAGGED_LAYOUT, explore=True)(obs).action for one in (agent, plain)]
    same(explored[0], explored[1])
    loaded = make(ragged_spec(), seed=3, average=0.75)
    loaded.load_policy(agent.state_dict()["policy"])
    same(loaded.actor(RAGGED_LAYOUT, explore=False)(obs).action, greedy)
    plain.policy.load_state_dict(agent.average.slow.state_dict())
    same(look[plain](obs).action, greedy)


def test_parts_of_a_batch_are_its_tasks_in_order() -> None:
    agent = make(ragged_spec())
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 20)  # type: ignore[arg-type]
    rows = agent._batch()[1]
    rows = rows._replace(target=torch.arange(len(rows.task)))
    assert list(rows.parts()) == rows.task.unique_consecutive().tolist()
    assert [part.task.unique().tolist() for part in rows.parts().values()] == [[task] for task in rows.parts()]
    parts = [*rows.parts().values()]
    torch.testing.assert_close(torch.cat([part.target for part in parts]), rows.target)
    torch.testing.assert_close(torch.cat([part.reward for part in parts]), rows.reward)
    torch.manual_seed(0)
    rows = rows._replace(target=torch.randn(len(rows.task)))
    whole, split = agent._critic_loss(rows), torch.cat([agent._critic_loss(one) for one in rows.parts().values()])
    torch.testing.assert_close(split, whole)


def test_looks_inside_are_logged_every_few_records() -> None:
    agent = make(ragged_spec(), warmup=10, log_every=2, inspect_every=2, trunk={"kind": "moore", "widths": (8,)})
    found: list[Any] = []
    update = agent.update
    agent.update = lambda: (found.append(update()), found[-1])[1]  # type: ignore[method-assign]
    ragged_run(agent, agent.actor(RAGGED_LAYOUT, explore=True), 18)  # type: ignore[arg-type]  # 8 updates
    records = [{name for name in metrics if "diagnostics" in name} for metrics in found if metrics]
    assert [bool(names) for names in records] == [False, True, False, True]
    names = {"policy/effective_rank", "critic/expert_cosine", "critic/probe/1_expert3", "critic/gradient_negative"}
    assert {f"diagnostics/{name}" for name in names} <= records[1]


def test_bounds_in_float64_learn_in_float32() -> None:
    wide = Box(np.array([0.0]), np.array([5.0]), dtype=np.float64)  # type: ignore[arg-type]
    spec = Spec((TaskInfo("probe/a", "arm", 5),), (Group("arm", {"vector": LINE}, wide, (0,)),))
    agent = make(spec)
    assert {
        agent.policy.to_unit(torch.ones(2, 1), "arm").dtype,
        agent.policy.to_env(torch.ones(2, 1), "arm").dtype,
    } == {torch.float32}


@pytest.mark.parametrize("ignore", [(), ("vector",)])
def test_values_depend_on_the_action_whatever_is_ignored(ignore: tuple[str, ...]) -> None:
    leaves = {"vector": Box(-1.0, 1.0, (3,), np.float32), "image": Box(0, 255, (3, 8, 8), np.uint8)}
    spec = Spec((TaskInfo("probe/a", "eye", 5),), (Group("eye", leaves, LINE, (0,)),))
    critic = make(spec, perception={"ignore": ignore}).critics[0]
    action = torch.zeros(2, 1, requires_grad=True)
    obs = {"vector": torch.rand(2, 3, requires_grad=True), "image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}
    value = critic({"eye": obs}, {"eye": action}, torch.zeros(2, dtype=torch.int64))
    on_action, on_vector = torch.autograd.grad(value.sum(), (action, obs["vector"]), allow_unused=True)
    assert on_action is not None
    assert bool(on_action.any())
    assert (on_vector is None) == bool(ignore)


def test_a_memory_smaller_than_the_warm_up_learns_when_it_is_full() -> None:
    agent = make(ragged_spec(), capacity=5, warmup=50)
    ragged_run(agent, SACActor(agent, RAGGED_LAYOUT, True), 20)
    assert agent.warm


def test_teams_that_share_their_reward_are_refused() -> None:
    spec = Spec(
        (TaskInfo("probe/a", "arm", 5, agents=2, shared_reward=True),),
        (Group("arm", {"vector": LINE, "alive": Box(0, 1, (), np.bool_)}, LINE, (0,)),),  # type: ignore[call-overload]
    )
    with pytest.raises(ValueError, match="group 'arm': the team of 'probe/a' shares its reward with the dead"):
        make(spec)
