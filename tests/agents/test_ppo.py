"""PPO on tasks whose values are known, and the promises of its contract."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl import registry
from mtrl.nn.actor_critic import Rows, appraise, decide, judge, to_rows
from mtrl.nn.bootstrap import judge_rollout
from mtrl.nn.heads import ActionHead
from mtrl.nn.perception import to_tensors
from mtrl.rollout import Minibatch
from mtrl.sampler import Sampled, SamplerConfig
from mtrl.spaces import make_spec
from mtrl.testing.probes import TARGET, VALUES
from mtrl.types import Group, Spec, Step, TaskInfo
from mtrl.vector import MultiTaskVectorEnv
from mtrl_agents.ppo import PPO

GAMMA = 0.9
SMALL: dict[str, Any] = {"gamma": GAMMA, "rollout": 32, "minibatches": 2, "lr": 3e-3, "head": (32,), "epochs": 4}
NET: dict[str, Any] = {
    "perception": {"width": 32, "channels": (8,)}
}  # images and vectors alike; small, to keep the tests fast


class Run:
    """The loop of ``mtrl.train`` without its clocks."""

    def __init__(self, suite: str, seed: int = 0, copies: int = 4, **config: Any) -> None:
        self.tasks = registry.tasks(suite)
        self.spec = make_spec(self.tasks)
        self.agent = PPO(self.spec, PPO.Config(**{**SMALL, **config}), seed=seed)
        self.envs = MultiTaskVectorEnv(self.tasks, copies, seed=seed, spec=self.spec)
        self.envs.reset(seed=seed)
        self.actor = self.agent.actor(self.envs.layout, explore=True)
        self.metrics: Mapping[str, float] = {}

    def step(self, change: Callable[[Step], Step] = lambda step: step) -> None:
        decision = self.actor(self.envs.obs)
        self.envs.step_async(decision.action)
        self.metrics = self.agent.update() or self.metrics
        step, _ = self.envs.step_wait(decision)
        self.agent.observe(change(step))

    def train(self, updates: int) -> Run:
        while self.agent.updates < updates:
            self.step()
        return self

    def values(self) -> dict[str, float]:
        """The critic's values of fresh first observations, by task."""
        self.envs.reset(seed=123)
        obs = self.envs.obs
        leaves = {g: to_tensors({leaf: x[None] for leaf, x in own.items()}, "cpu") for g, own in obs.leaves.items()}
        rows = Rows(leaves, torch.as_tensor(obs.task)[None], torch.as_tensor(obs.first)[None])
        memory = torch.zeros(len(obs.task), self.agent.config.memory) if self.agent.config.memory else None
        with torch.no_grad():
            found = self.agent.critic(self.agent.critic_body(rows, memory)[0], rows)[0].double().numpy()
        found = self.agent.moments.denormalize(found, obs.task)
        return {t.name.partition("/")[2]: float(found[obs.task == i].mean()) for i, t in enumerate(self.tasks)}

    def greedy(self, steps: int = 60) -> dict[str, float]:
        """Mean return of the greedy policy, by task."""
        actor = self.agent.actor(self.envs.layout, explore=False)
        self.envs.reset(seed=77)
        returns: list[list[float]] = [[] for _ in self.tasks]
        for _ in range(steps):
            decision = actor(self.envs.obs)
            self.envs.step_async(decision.action)
            self.envs.step_wait(decision)
            for episode in self.envs.episodes:
                returns[episode.task].append(episode.ret)
        return {t.name.partition("/")[2]: float(np.mean(own)) for t, own in zip(self.tasks, returns, strict=True)}


def check_values(run: Run) -> None:
    for name, value in run.values().items():
        expected = VALUES[name](GAMMA)
        if name.startswith("observation"):  # the cue itself, whose mean over a few rows is not yet 0
            rows = run.envs.obs.task == list(run.values()).index(name)
            expected = float(run.envs.obs.leaves["probe"]["vector"][rows, 0].mean())
        if name in ("action-box", "both-box"):  # a Gaussian that still explores loses its variance; uniform: -0.42
            assert -0.25 < value < 0.05, name
            continue
        assert value == pytest.approx(expected, abs=0.05 + 0.05 * abs(expected)), name


@pytest.mark.parametrize(("group", "updates"), [("discrete", 30), ("continuous", 30), ("mix", 30), ("team", 20)])
def test_probes_reach_their_known_values(group: str, updates: int) -> None:
    if group == "team":
        pytest.importorskip("pettingzoo")
    run = Run(f"mtrl.testing:Probes/{group}", entropy=0.001, **NET).train(updates)
    check_values(run)
    best = {name: VALUES[name](1.0 - 1e-9) for name in run.greedy()}
    for name, ret in run.greedy().items():
        if not name.startswith("endless"):
            assert ret == pytest.approx(best[name], abs=0.05), name


def test_the_continuous_optimum_is_found() -> None:
    run = Run("mtrl.testing:Probes/action-box").train(40)
    actor = run.agent.actor(run.envs.layout, explore=False)
    np.testing.assert_allclose(actor(run.envs.obs).action["probe"], TARGET, atol=0.05)


@pytest.mark.parametrize("share", [False, True])
def test_memory_solves_what_nothing_else_can(share: bool) -> None:
    run = Run("mtrl.testing:Probes/memory", memory=16, chunk=16, share=share, entropy=0.001).train(30)
    assert run.agent.recurrent
    assert run.greedy()["memory"] == 1.0
    assert run.values()["memory"] == pytest.approx(VALUES["memory"](GAMMA), abs=0.1)


def test_without_memory_the_cue_is_forgotten() -> None:
    assert Run("mtrl.testing:Probes/memory").train(20).greedy(200)["memory"] < 0.7


def returns_told(run: Run) -> float:
    """The share of the returns' variance in a full rollout that the actor's features tell."""
    while not run.agent.rollout.full:
        run.step()
    items, _ = run.agent._prepare()
    (batch,) = items.minibatches(1, run.agent.generator)
    with torch.no_grad():
        _, features = decide(run.agent.policy, batch.scene)
        told = appraise(run.agent.policy, batch.scene, features, batch.action)
    target = batch.columns["target"]
    return 1 - float((told - target).square().mean() / target.var())


def test_what_a_choice_is_worth_is_learned_while_the_policy_still_guesses() -> None:
    """Under a policy that is held uniform only the choice, known with the cue, changes what is to be expected."""
    held: dict[str, Any] = {"entropy": 10.0, "lam": 0.0, "action_value_weight": 1.0}
    run = Run("mtrl.testing:Probes/memory", memory=16, chunk=16, **held).train(40)
    assert run.metrics["losses/entropy"] > 0.99 * np.log(2)
    assert returns_told(run) > 0.9
    blind = Run("mtrl.testing:Probes/memory", memory=0, **held).train(40)
    assert returns_told(blind) < 0.3


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"share": True},
        {"memory": 8, "chunk": 4, "action_value_weight": 0.25},
        {"trunk": {"kind": "shared"}, "action_value_weight": 0.25},
    ],
)
def test_a_loaded_agent_continues_bit_for_bit_from_the_middle_of_a_rollout(config: dict[str, Any]) -> None:
    suite = "mtrl.testing:Probes/both+mtrl.testing:Probes/both-box"
    config = {"rollout": 8, **NET, **config}
    whole, half = Run(suite, **config), Run(suite, **config)
    for run in (whole, half):
        for _ in range(21):
            run.step()
    resumed = Run(suite, seed=99, **config)
    resumed.agent.load_state_dict(half.agent.state_dict())
    resumed.actor.load_state_dict(half.actor.state_dict())
    resumed.envs.load_state_dict(half.envs.state_dict())
    for run in (whole, resumed):
        for _ in range(12):
            run.step()
    assert resumed.agent.updates == whole.agent.updates == 4
    assert dict(resumed.metrics) == dict(whole.metrics)
    for name, parameter in whole.agent.policy.state_dict().items():
        assert torch.equal(parameter, resumed.agent.policy.state_dict()[name]), name


def test_two_agents_of_one_seed_are_equal_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (Run("mtrl.testing:Probes/both", seed=seed).train(2) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(one.agent.policy.parameters(), two.agent.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert dict(one.metrics) != dict(other.metrics)


def test_the_first_minibatch_meets_the_very_policy_that_acted() -> None:
    run = Run("mtrl.testing:Probes/mix", epochs=1, minibatches=1, **NET).train(1)
    assert run.metrics["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert run.metrics["losses/clip_fraction"] == 0.0


def test_a_minibatch_may_hold_no_row_of_a_group() -> None:
    run = Run("mtrl.testing:Probes/mix", copies=1, rollout=8, minibatches=4, memory=8, chunk=4, **NET).train(2)
    assert np.isfinite(list(run.metrics.values())).all()


def test_the_learning_rate_decays_to_zero() -> None:
    run = Run("mtrl.testing:Probes/both", lr_decay_updates=2).train(1)
    assert run.metrics["charts/learning_rate"] == 3e-3
    run.train(2)
    assert run.metrics["charts/learning_rate"] == 1.5e-3
    kept = [parameter.clone() for parameter in run.agent.policy.parameters()]
    run.train(3)
    assert all(torch.equal(a, b) for a, b in zip(kept, run.agent.policy.parameters(), strict=True))


def test_the_epochs_end_when_the_policy_has_moved_far_enough() -> None:
    suite = "mtrl.testing:Probes/both"
    assert Run(suite, target_kl=1e-9).train(1).metrics["losses/epochs"] == 1
    assert Run(suite, target_kl=1e9).train(1).metrics["losses/epochs"] == SMALL["epochs"]


def test_value_clipping_holds_back_only_large_changes() -> None:
    suite = "mtrl.testing:Probes/both"
    off, wide, narrow = (dict(Run(suite, value_clip=clip).train(2).metrics) for clip in (None, 1e9, 1e-3))
    assert wide == pytest.approx(off, rel=1e-4, abs=1e-5)
    assert narrow["losses/value"] > off["losses/value"]


@pytest.mark.parametrize("options", [{}, {"popart": True}, {"normalize_value": False}])
def test_before_any_step_no_value_has_changed(options: dict[str, Any]) -> None:
    """Also where the moments by which values are normalised have moved since."""
    run = Run("mtrl.testing:Probes/both+mtrl.testing:Probes/endless", value_clip=0.2, **options).train(2)
    while not run.agent.rollout.full:
        run.step()
    items, _ = run.agent._prepare()
    for batch in items.minibatches(1, torch.Generator().manual_seed(0)):
        value = judge(run.agent.critic, batch.scene)
        torch.testing.assert_close(value, batch.columns["old_value"], atol=1e-4, rtol=1e-4)


def test_a_loss_over_the_batch_sees_every_row_of_it() -> None:
    """Repeated observations are computed once, but not in front of a trunk that counts them."""
    suite = "minigrid/Empty-5x5"
    for kind, folds in (("multi_head", True), ("moe_topk", False)):
        run = Run(suite, copies=8, rollout=64, trunk={"kind": kind})
        while not run.agent.rollout.full:
            run.step()
        (batch,) = run.agent._prepare()[0].minibatches(1, torch.Generator().manual_seed(0))
        assert (batch.scene.folded is not None) == folds, kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"popart": True, "normalize_value": False}, "set normalize_value=true"),
        ({"chunk": 8}, "set memory, or leave chunk out"),
        ({"trunk": {"kind": "paco", "widths": [8]}}, r"set head=\[\]"),
        ({"trunk": {"kind": "paco", "widths": [8]}, "head": [], "memory": 4}, "memory hides the features"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO.Config(**options)


def test_a_task_that_is_not_played_keeps_its_heads() -> None:
    spec = make_spec(registry.tasks("mtrl.testing:Probes/action+mtrl.testing:Probes/both"))
    agent = PPO(spec, PPO.Config(**SMALL), seed=0)
    envs = MultiTaskVectorEnv(registry.tasks("mtrl.testing:Probes/action"), 4, seed=0)
    envs.reset(seed=0)
    actor = agent.actor(envs.layout, explore=True)
    before = {name: x.clone() for name, x in agent.policy.heads.state_dict().items()}
    while agent.updates < 3:
        decision = actor(envs.obs)
        envs.step_async(decision.action)
        agent.update()
        agent.observe(envs.step_wait(decision)[0])
    for name, x in agent.policy.heads.state_dict().items():
        assert torch.equal(x[1], before[name][1]), name
        assert not torch.equal(x[0], before[name][0]), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_stops_with_its_task(bad: float) -> None:
    run = Run("mtrl.testing:Probes/action+mtrl.testing:Probes/both", copies=2)

    def poison(step: Step) -> Step:
        return step._replace(reward=np.where(step.obs.task == 1, bad, step.reward))

    for _ in range(32):
        run.step(poison)
    with pytest.raises(FloatingPointError, match=r"^reward is not finite for probe/both in update 0$"):
        run.agent.update()


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_parameters() -> None:
    run = Run("mtrl.testing:Probes/action", copies=2)
    for _ in range(32):
        run.step()
    with torch.no_grad():
        for parameter in run.agent.critic.head.parameters():
            parameter.mul_(1e38)
    kept = [parameter.clone() for parameter in run.agent.policy.parameters()]
    with pytest.raises(FloatingPointError, match=r"loss of .*probe/action.* is not finite"):
        run.agent.update()
    assert all(torch.equal(a, b) for a, b in zip(kept, run.agent.policy.parameters(), strict=True))


def test_what_it_cannot_take_is_named() -> None:
    leaves = {"vector": Box(-1, 1, (2,)), "state": Box(-1, 1, (2,))}
    spec = Spec((TaskInfo("a/x", "a", 5),), (Group("a", leaves, Discrete(2), (0,)),))
    with pytest.raises(ValueError, match="group 'a' has a global state"):
        PPO(spec, PPO.Config(share=True), seed=0)
    with pytest.raises(ValueError, match="chunk=7 must divide rollout=250"):
        PPO(spec, PPO.Config(memory=8, chunk=7), seed=0)


def steps_taken(agent: PPO, net: str) -> int:
    return int(agent.optimizers[net].state[next(agent.nets[net].parameters())]["step"])


def test_the_published_critic_takes_one_step_per_update() -> None:
    run = Run("mtrl.testing:Probes/discrete", critic_fit="rollout", advantage_decay=0.0, max_grad_norm=None).train(3)
    assert (steps_taken(run.agent, "policy"), steps_taken(run.agent, "critic")) == (3 * 4 * 2, 3)
    assert run.metrics["losses/value"] > 0
    with pytest.raises(ValueError, match="set share=false"):
        Run("mtrl.testing:Probes/discrete", critic_fit="rollout", share=True)


def test_without_decay_each_rollout_is_normalised_by_itself() -> None:
    run = Run("mtrl.testing:Probes/discrete", advantage_decay=0.0).train(3)
    spread = run.agent.spread
    spread.update(np.array([1.0, 3.0]), np.array([0, 0]))
    np.testing.assert_allclose((spread.mean[0], spread.std[0]), (2, 1))


def judged(agent: PPO) -> np.ndarray:
    """The critic's values of the whole rollout, [t, n], in units of returns."""
    value = judge_rollout(agent.critic, agent.critic_body, agent.rollout, None, "cpu").value
    return agent.moments.denormalize(value, agent.rollout.task)


@pytest.mark.parametrize("share", [False, True])
def test_the_critics_memory_is_what_it_remembers_step_by_step(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrl.nn.bootstrap.BLOCK", 20)  # 2 rows: blocks of ten steps
    options = {"rollout": 24, "memory": 8, "chunk": 4, "share": share, "trunk": {"widths": (32,)}}
    run = Run("mtrl.testing:Probes/memory", copies=2, **options)
    while not run.agent.rollout.full:
        run.step()
    agent, roll = run.agent, run.agent.rollout
    body, state = agent.critic_body, torch.rand(2, 8)
    assert body.memory is not None
    assert body.memory.loudness == 2.0, "features and memory are not of one width: they are brought to one scale"
    judged = judge_rollout(agent.critic, body, roll, state, "cpu")
    assert judged.memory is not None
    assert judged.memory_after is not None
    with torch.no_grad():
        for t in range(24):
            torch.testing.assert_close(judged.memory[t], state)
            leaves = {group: {leaf: x[t : t + 1] for leaf, x in own.items()} for group, own in roll.leaves.items()}
            rows = to_rows(leaves, roll.task[t : t + 1], roll.first[t : t + 1], "cpu")
            features, after = body(rows, state)
            assert after is not None
            torch.testing.assert_close(torch.tensor(judged.value[t]), agent.critic(features, rows)[0].double())
            state = after
        torch.testing.assert_close(judged.memory_after, state)
        (ends,) = roll.successors().leaves.values()
        last = {leaf: torch.as_tensor(x[-2:])[None] for leaf, x in ends.items()}  # behind the last step of both rows
        rows = Rows(
            {next(iter(roll.leaves)): last}, torch.as_tensor(roll.task[-1:]), torch.zeros(1, 2, dtype=torch.bool)
        )
        want = agent.critic(body(rows, state)[0], rows)[0].double()
    assert judged.end_t[-2:].tolist() == [23, 23]
    torch.testing.assert_close(torch.tensor(judged.end_value[-2:]), want)


def test_popart_without_heads_per_task_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="popart=true needs a trunk with a head per task"):
        Run("mtrl.testing:Probes/discrete", popart=True, trunk={"kind": "shared"})


def test_popart_keeps_the_values_when_the_moments_change() -> None:
    plain, popart = (Run("mtrl.testing:Probes/discrete", popart=on).train(2) for on in (False, True))
    for run in (plain, popart):
        while not run.agent.rollout.full:
            run.step()
    before, after = {}, {}
    for name, run in {"plain": plain, "popart": popart}.items():
        agent = run.agent
        before[name] = judged(agent)
        agent._prepare()
        after[name] = judged(agent)
    np.testing.assert_allclose(after["popart"], before["popart"], atol=1e-5)
    assert np.abs(after["plain"] - before["plain"]).max() > 1e-3


def test_looks_inside_are_logged_now_and_then() -> None:
    run = Run(
        "mtrl.testing:Probes/discrete", inspect_every=2, trunk={"kind": "moore", "widths": (8,), "experts": 2}
    ).train(1)
    found = {name for name in run.metrics if name.startswith("diagnostics/")}
    names = {"dormant", "effective_rank", "expert_cosine", "expert_residual", "gradient_cosine", "gradient_negative"}
    assert {f"diagnostics/policy/{name}" for name in names} <= found
    assert {"diagnostics/critic/effective_rank", "diagnostics/critic/probe/constant_expert1"} <= found
    assert not [name for name in run.train(2).metrics if name.startswith("diagnostics/")]
    assert all(np.isfinite(value) for value in run.metrics.values())


@pytest.mark.parametrize("options", [{}, {"memory": 8, "chunk": 4}, {"action_value_weight": 0.25}])
def test_a_minibatch_is_the_sum_of_its_tasks(options: dict[str, Any]) -> None:
    """Rows taken apart by task give the same losses, and in the mean the same gradients."""
    run = Run("mtrl.testing:Probes/everything", copies=2, **{**NET, **options})
    while not run.agent.rollout.full:
        run.step()
    items, _ = run.agent._prepare()
    batch = next(items.minibatches(2, run.agent.generator))
    assert list(batch.parts()) == batch.columns["task"][0].unique_consecutive().tolist()
    for task, part in batch.parts().items():
        assert part.columns["task"].unique().tolist() == [task]
    check_parts(run.agent, batch)


def test_chunks_of_several_tasks_are_part_of_each() -> None:
    """Where a sampler gives a slot another task within a chunk, every row still counts for its own task alone."""
    run = Run("mtrl.testing:Probes/everything", **NET, memory=8, chunk=8)
    schedule = Sampled(SamplerConfig(kind="uniform"), run.spec, run.envs.slot_tasks, 0)
    run.envs = MultiTaskVectorEnv(run.tasks, 4, seed=0, spec=run.spec, schedule=schedule)
    run.envs.reset()
    run.actor = run.agent.actor(run.envs.layout, explore=True)
    while not run.agent.rollout.full:
        run.step()
    batch = next(run.agent._prepare()[0].minibatches(2, run.agent.generator))
    valid = batch.columns["valid"].flatten()
    mixed = 0
    for task, part in batch.parts().items():
        assert float(part.weight[part.task == task].sum()) == pytest.approx(1)
        assert int((part.weight > 0).sum()) == int((batch.task[valid] == task).sum())
        mixed += len(part.columns["task"].unique()) > 1
    assert mixed > 2
    assert list(batch.parts()) != batch.task[valid].unique_consecutive().tolist()
    check_parts(run.agent, batch)


def check_parts(agent: PPO, batch: Minibatch) -> None:
    for name, net in agent.nets.items():
        loss, _ = agent._losses(batch, name)
        whole = torch.autograd.grad(loss @ batch.weight, [*net.parameters()], allow_unused=True)
        means = [agent._losses(part, name)[0] @ part.weight for part in batch.parts().values()]
        split = torch.autograd.grad(torch.stack(means).mean(), [*net.parameters()], allow_unused=True)
        for a, b in zip(whole, split, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"actor_gradients": "pcgrad", "critic_gradients": "fairgrad"},
        {"share": True, "actor_gradients": "upgrad", "critic_gradients": "upgrad"},
        {"critic_balance": "famo"},
    ],
)
def test_other_directions_learn_too_and_resume(options: dict[str, Any]) -> None:
    if "actor_gradients" in options:
        pytest.importorskip("torchjd")
    run = Run("mtrl.testing:Probes/discrete", copies=4, **options).train(8)
    assert np.isfinite(list(run.metrics.values())).all()
    twin = Run("mtrl.testing:Probes/discrete", copies=4, **options)
    for part in ("agent", "actor", "envs"):
        getattr(twin, part).load_state_dict(copy.deepcopy(getattr(run, part).state_dict()))
    run.train(10)
    twin.train(10)
    for name, net in run.agent.nets.items():
        for a, b in zip(net.parameters(), twin.agent.nets[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_is_for_a_critic_alone_is_refused_where_the_body_is_shared() -> None:
    spec = make_spec(registry.tasks("mtrl.testing:Probes/discrete"))
    for field, value in {"critic_fit": "rollout", "critic_gradients": "pcgrad", "critic_balance": "famo"}.items():
        with pytest.raises(ValueError, match=f"{field}={value} is for a critic alone"):
            PPO(spec, PPO.Config.model_validate({"share": True, field: value}), seed=0)


def test_bf16_learns_with_the_weights_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps its copies of the weights until the context ends: what the policy moved by would not be seen."""
    moved = {}
    for route in ("default", "bf16"):
        run = Run("mtrl.testing:Probes/discrete", matmul=route, lr=1e-2, epochs=3, minibatches=4).train(1)
        moved[route] = run.metrics["losses/approx_kl"]
    assert moved["bf16"] == pytest.approx(moved["default"], rel=0.3)


def test_actions_stay_within_bounds_that_rounding_would_overstep() -> None:
    box = Box(np.float32(-0.6), np.float32(0.35), (1,), np.float32)
    group = Group("g", {"vector": Box(-1, 1, (2,), np.float32)}, box, (0,))
    head = ActionHead(group, 2, per_task=False)
    assert box.contains(head.to_env(torch.tensor([[1.0]]))[0].numpy())
    assert box.contains(head.to_env(torch.tensor([[-3.0]]))[0].numpy())
