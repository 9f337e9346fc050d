"""Soft actor-critic for many tasks at once.

SAC (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905) as used on MetaWorld by MOORE (Hendawy et al. 2024,
https://arxiv.org/abs/2311.11385) and Meta-World+ (https://github.com/rainx0r/metaworld-algorithms): a batch of equal
shares per task, one temperature per task, one head per task. Options from BRC (Nauman et al. 2025,
https://arxiv.org/abs/2505.23150): rewards divided by each task's largest return and a categorical critic.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from gymnasium.spaces import Box
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mtrl.nn.aggregation import Method
from mtrl.nn.averaging import Average, follow
from mtrl.nn.balancers import BalancerName
from mtrl.nn.continuous import ActionCritic, Leaves, Rows, SquashedPolicy, standard_normal
from mtrl.nn.cuda_graph import Graphed
from mtrl.nn.descent import Descent, frozen, unchecked
from mtrl.nn.diagnostics import conflict_metrics, inspect
from mtrl.nn.linear import Probe, Route, matmul, probe
from mtrl.nn.losses import project, squashed_sample
from mtrl.nn.normalizers import MaxReturnScale, MeanRewardScale
from mtrl.nn.optim import load_optimizer_state, optimizer_state
from mtrl.nn.perception import PerceptionConfig, flat_width, to_tensors
from mtrl.nn.trunk import TrunkConfig
from mtrl.replay import Replay, as_kept
from mtrl.types import Actor, Array, Decision, Layout, Obs, Spec, Step


class SAC:
    """Learns any mix of continuous groups, whose observations and actions may differ.

    Raises:
        ValueError: a group with discrete actions, or teams that share their reward; the message names it.
    """

    recurrent = False

    class Config(BaseModel):
        """Defaults: MOORE's MetaWorld protocol with Meta-World+'s clipping."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        perception: PerceptionConfig = Field(default_factory=PerceptionConfig)
        trunk: TrunkConfig = TrunkConfig(kind="multi_head", widths=(400, 400, 400), activation="relu")
        critic_trunk: TrunkConfig | None = Field(None, description="null: as the actor's")
        gamma: float = Field(0.99, ge=0, lt=1)
        tau: float = Field(0.005, gt=0, le=1, description="share of the critics that enters their targets per update")
        batch_size: int = Field(128, ge=1, description="transitions per task and update")
        capacity: int = Field(1_000_000, ge=1, description="transitions kept per task (MOORE: MT10 1e6, MT50 1e5)")
        warmup: int = Field(1_500, ge=1, description="uniformly random steps per task before learning starts")
        update_every: int = Field(1, ge=1, description="vector steps between updates")
        updates: int = Field(1, ge=1, description="gradient steps per update")
        lr: float = Field(3e-4, gt=0, description="actor and critics")
        alpha_lr: float = Field(1e-4, gt=0, description="temperatures")
        adam_eps: float = Field(1e-8, gt=0)
        grad_clip: float | None = Field(1.0, gt=0, description="gradient norm of actor and of critics; null: any")
        alpha: float = Field(1.0, gt=0, description="initial temperature of every task")
        target_entropy: float = Field(-1.0, description="per action dimension")
        average: float = Field(0.0, ge=0, lt=1, description="share of the greedy policy that stays per update; 0: none")
        log_std: tuple[float, float] = Field((-10.0, 2.0), description="bounds of the policy's log standard deviation")
        reward_scale: Literal["none", "max_return", "mean_reward"] = Field(
            "none", description="max_return: BRC, returns up to v_max; mean_reward: ARS"
        )
        critic_gradients: Method = Field("mean", description="how the tasks' gradients become one")
        actor_gradients: Method = Field("mean", description="TOPPO: pcgrad here, fairgrad for the critic")
        critic_balance: BalancerName | None = Field(None, description="how the tasks' losses become one; null: mean")
        critic: Literal["mse", "categorical"] = Field("mse", description="categorical: give it max_return")
        atoms: int = Field(101, ge=2, description="of the categorical critic, evenly spaced on [-v_max, v_max]")
        v_max: float = Field(10.0, gt=0)
        matmul: Literal["auto"] | Route = Field("auto", description="auto: the fastest with fp32 accuracy; or bf16")
        cuda_graph: Literal["auto"] | bool = Field(
            "auto", description="on a GPU, launch an update, and an action, as one; auto: if they can be recorded"
        )
        log_every: int = Field(100, ge=1, description="updates that one record of metrics averages")
        inspect_every: int = Field(10, ge=0, description="records between looks at experts, ranks, conflicts; 0: none")

        @model_validator(mode="after")
        def _recordable(self) -> Self:
            if self.cuda_graph is True and (wrong := self.unrecordable):
                raise ValueError(f"cuda_graph=true cannot record {', '.join(wrong)}: leave one of them out")
            return self

        @property
        def unrecordable(self) -> list[str]:
            """The settings that look at numbers within an update, of which no CUDA graph can be made."""
            networks = {"trunk.kind=moe_topk": self.trunk, "critic_trunk.kind=moe_topk": self.critic_trunk}
            wrong = [name for name, trunk in networks.items() if trunk is not None and not trunk.recordable]
            wrong += [f"{n}={v}" for n in ("critic_gradients", "actor_gradients") if (v := getattr(self, n)) != "mean"]
            wrong += ["critic_balance"] * (self.critic_balance is not None) + ["matmul=bf16"] * (self.matmul == "bf16")
            return wrong

    def __init__(self, spec: Spec, config: Config, *, seed: int, device: str = "cpu") -> None:
        for group in spec.groups:
            if not isinstance(group.action, Box):
                raise ValueError(f"sac needs continuous actions, group {group.name!r} has {group.action}; try ppo")
        for task in spec.tasks:
            if task.shared_reward:
                reason = "shares its reward with the dead, whose steps replay does not keep"
                raise ValueError(f"group {task.group!r}: the team of {task.name!r} {reason}; try ppo")
        self.spec, self.config, self.seed, self.device = spec, config, seed, torch.device(device)
        self.probe = probe(device) if config.matmul == "auto" else Probe(config.matmul, 0.0, 0.0, 1.0)
        self.route: Route = self.probe.route
        tasks = len(spec.tasks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = SquashedPolicy(spec, config.perception, config.trunk, config.log_std).to(self.device)
            own, out = config.critic_trunk or config.trunk, 1 if config.critic == "mse" else config.atoms
            critics = (ActionCritic(spec, config.perception, own, out) for _ in range(2))
            self.critics = nn.ModuleList(critics).to(self.device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.average = Average(self.policy, config.average)
        self.log_alpha = nn.Parameter(torch.full((tasks,), float(np.log(config.alpha)), device=self.device))
        sizes = torch.tensor([flat_width(spec.group(task.group)) for task in spec.tasks])
        self.target_entropy = (config.target_entropy * sizes).to(self.device, torch.float32)
        nets = {"actor": self.policy, "critic": self.critics, "alpha": nn.ParameterDict({"log_alpha": self.log_alpha})}
        rates = {"actor": config.lr, "critic": config.lr, "alpha": config.alpha_lr}
        self.optimizers = {
            name: torch.optim.Adam(net.parameters(), rates[name], eps=config.adam_eps, fused=True)
            for name, net in nets.items()
        }
        clip, balance = config.grad_clip, config.critic_balance
        choices: dict[str, dict[str, Any]] = {
            "actor": {"clip": clip, "gradients": config.actor_gradients},
            "critic": {"clip": clip, "gradients": config.critic_gradients, "balance": balance},
            "alpha": {},
        }
        self.names = [task.name for task in spec.tasks]
        self.descents = {
            name: Descent(name, net, self.optimizers[name], self.names, seed=seed, **choices[name])
            for name, net in nets.items()
        }
        self.generator = torch.Generator(self.device).manual_seed(seed)
        graph = self.device.type == "cuda" and bool(config.cuda_graph) and not config.unrecordable
        self._update = Graphed(on=graph, recording=functools.partial(unchecked, [*self.descents.values()], self.device))
        self._acting = {explore: Graphed(on=graph) for explore in (True, False)}
        self.replay = Replay(spec, config.capacity, seed=seed)
        self.reserve = self.replay.reserve
        self.scale = None if config.reward_scale == "none" else MeanRewardScale(tasks)
        if config.reward_scale == "max_return":
            self.scale = MaxReturnScale(tasks, config.gamma, config.v_max)
        self.support = torch.linspace(-config.v_max, config.v_max, config.atoms, device=self.device)
        self.pretrained = False  # a policy that was loaded needs no random play
        self.steps = self.updates = 0  # vector steps observed, gradient steps taken
        self._sums: dict[str, Tensor] = {}

    @property
    def warm(self) -> bool:
        """Whether there is enough data to learn from."""
        return int(self.replay.sizes.sum()) >= min(self.config.warmup, self.config.capacity) * len(self.spec.tasks)

    def actor(self, layout: Layout, *, explore: bool) -> Actor:
        if not (self.updates or self.pretrained):  # the policy may have been given other weights since it was made
            self.average.restart()
        return SACActor(self, layout, explore)

    def observe(self, step: Step) -> None:
        self.replay.add(step)
        if self.scale is not None:
            self.scale.observe(as_kept(step, self.spec))
        self.steps += 1

    def update(self) -> Mapping[str, float]:
        """Metrics every ``log_every`` gradient steps, ``{}`` in between.

        Raises:
            FloatingPointError: a loss or gradient is not finite; names it, the tasks and the update. Nothing followed
                it; before an actor's, the critics were stepped.
        """
        if self.steps % self.config.update_every or not self.warm:
            return {}
        config, before = self.config, self.updates // self.config.log_every
        rows = [self._learn(*self._batch()) for _ in range(config.updates)][-1]
        records = self.updates // config.log_every
        metrics = self._metrics() if records > before else {}
        if config.inspect_every and records // config.inspect_every > before // config.inspect_every:
            metrics |= self._look(rows)
        return metrics

    def _batch(self) -> tuple[Array, Rows]:
        """Tasks of rows, and the rows on the device: equal shares, actions and rewards in the networks' units."""
        divisors = np.ones(len(self.spec.tasks))
        if self.scale is not None:
            alpha = self.log_alpha.detach().exp().cpu().double().numpy()
            divisors = self.scale.divisors(alpha, self.target_entropy.cpu().double().numpy())

        put = functools.partial(torch.as_tensor, device=self.device)
        batches = self.replay.sample(self.config.batch_size)
        task = np.concatenate([batch.task for batch in batches.values()])
        sizes = {name: (len(batch.task), flat_width(self.spec.group(name))) for name, batch in batches.items()}
        reward = np.concatenate([batch.reward for batch in batches.values()]) / divisors[task]
        return task, Rows(
            put(task),
            {name: to_tensors(batch.obs, self.device) for name, batch in batches.items()},
            {name: self.policy.to_unit(put(batch.action), name) for name, batch in batches.items()},
            put(reward.astype(np.float32)),
            put(np.concatenate([batch.terminated for batch in batches.values()])),
            {name: to_tensors(batch.next, self.device) for name, batch in batches.items()},
            next_noise=standard_normal(sizes, self.generator),
            noise=standard_normal(sizes, self.generator),
        )

    def _learn(self, task: Array, rows: Rows) -> Rows:
        """One gradient step of critics, actor and temperatures; every task has the same share of every loss."""
        if not self.updates:  # the critics may have been given other weights since they were made
            self.targets.load_state_dict(self.critics.state_dict())
        found, recorded = self._update(self._step, task, rows)
        rows, value = rows._replace(target=found.pop("target")), found.pop("q")
        if recorded:
            self._check(found, rows)
        follow(self.targets, self.critics, self.config.tau)
        self.average.follow()
        seen = {f"losses/{name}": loss for name, loss in found.items()} | {"count": torch.ones(())}
        seen["q"] = torch.zeros_like(self.log_alpha).index_add_(0, rows.task, value / self.config.batch_size)
        self._sums = {name: self._sums.get(name, 0) + value for name, value in seen.items()}
        self.updates += 1
        return rows

    def _step(self, rows: Rows) -> dict[str, Tensor]:
        """The losses [], and per row the critics' ``target`` and, for the policy's actions, their value ``q`` [n]."""
        with matmul(self.route, self.device):
            with torch.no_grad():
                rows = rows._replace(target=self._target(rows, self.log_alpha.exp()[rows.task]))
            critic = self.descents["critic"](self._critic_loss, rows, self.updates)
        seen: list[tuple[Tensor, Tensor]] = []
        with frozen(self.critics), matmul(self.route, self.device):
            actor = self.descents["actor"](functools.partial(self._actor_loss, seen=seen), rows, self.updates)
        log_prob, value = (torch.cat(parts) for parts in zip(*seen, strict=True))
        gap = log_prob + self.target_entropy[rows.task]
        alpha = self.descents["alpha"](lambda rows: -self.log_alpha[rows.task] * gap, rows, self.updates)
        return {"critic": critic, "actor": actor, "alpha": alpha, "target": rows.target, "q": value}

    def _check(self, found: Mapping[str, Tensor], rows: Rows) -> None:
        """Raises FloatingPointError, as ``update`` does, if something in a recorded one was not finite."""
        finite = torch.isfinite(torch.stack([*found.values()])).tolist()
        losses = {"critic": self._critic_loss, "actor": functools.partial(self._actor_loss, seen=[])}
        for name in (name for name, fine in zip(found, finite, strict=True) if not fine):
            if name in losses:
                with matmul(self.route, self.device):
                    self.descents[name].backward(losses[name], rows, self.updates)
            raise FloatingPointError(f"the {name} loss or gradient is not finite at update {self.updates}")

    def _actor_loss(self, rows: Rows, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[n]; ``seen`` gets the log-densities and values [n] of its actions."""
        action, log_prob = self._act(rows.obs, rows.task, rows.noise)
        values = [self._expected(critic(rows.obs, action, rows.task)) for critic in self.critics]
        value = torch.minimum(*values) if self.config.critic == "mse" else (values[0] + values[1]) / 2
        seen.append((log_prob.detach(), value.detach()))
        return self.log_alpha.detach().exp()[rows.task] * log_prob - value

    def _critic_loss(self, rows: Rows) -> Tensor:
        """Both critics' losses [n] against ``rows.target``."""
        values = [critic(rows.obs, rows.action, rows.task).float() for critic in self.critics]
        if self.config.critic == "mse":
            losses = [(value[:, 0] - rows.target).square() for value in values]
        else:
            losses = [-(rows.target * value.log_softmax(1)).sum(1) for value in values]
        return losses[0] + losses[1]

    def _target(self, rows: Rows, alpha: Tensor) -> Tensor:
        """Soft Bellman targets: values [n], or probabilities [n, atoms] of the categorical critic."""
        action, log_prob = self._act(rows.next, rows.task, rows.next_noise)
        ahead = self.config.gamma * (~rows.terminated).float()
        values = [critic(rows.next, action, rows.task).float() for critic in self.targets]
        if self.config.critic == "mse":
            value = torch.minimum(values[0][:, 0], values[1][:, 0])
            return rows.reward + ahead * (value - alpha * log_prob)
        # BRC: the mean of both target distributions, moved by the soft reward and laid back onto the atoms.
        probs = (values[0].softmax(1) + values[1].softmax(1)) / 2
        places = (rows.reward - ahead * alpha * log_prob)[:, None] + ahead[:, None] * self.support
        return project(probs, places, self.support)

    def _expected(self, value: Tensor) -> Tensor:
        """Critic outputs to values [n]."""
        return value[:, 0].float() if self.config.critic == "mse" else (value.float().softmax(1) * self.support).sum(1)

    def _act(self, obs: Leaves, task: Tensor, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The action in [-1, 1] per group that the noise decides, and the log-densities [n] of all rows."""
        actions, log_probs = {}, []
        for name, (mean, log_std) in self.policy(obs, task).items():
            actions[name], log_prob = squashed_sample(mean, log_std, noise[name])
            log_probs.append(log_prob)
        return actions, torch.cat(log_probs)

    def decide(self, task: Array, inputs: Mapping[str, Any], *, explore: bool) -> dict[str, Array]:
        """Actions per group, in the environments' bounds, for the ``leaves`` of the rows of ``task`` [n] and standard
        normal ``noise`` [n_g, a]; noise 0 gives the mode. Of the policy itself to ``explore``, else of its average."""
        ids = torch.as_tensor(task, device=self.device)
        work = functools.partial(self._decide, self.policy if explore else self.average.slow)
        found, _ = self._acting[explore](work, task, {**inputs, "task": ids})
        return {name: action.cpu().numpy() for name, action in found.items()}

    def _decide(self, policy: SquashedPolicy, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        with matmul(self.route, self.device):
            outputs = policy(inputs["leaves"], inputs["task"])
        units = {name: mean + log_std.exp() * inputs["noise"][name] for name, (mean, log_std) in outputs.items()}
        return {name: policy.to_env(torch.tanh(unit), name) for name, unit in units.items()}

    def _look(self, rows: Rows) -> dict[str, float]:
        """Experts, ranks and dormant units of actor and first critic; how much the tasks' critic gradients disagree."""
        critic = self.critics[0]
        with matmul(self.route, self.device):
            nets = {"policy": self.policy, "critic": critic}
            found = inspect(
                nets, lambda: (self.policy(rows.obs, rows.task), critic(rows.obs, rows.action, rows.task)), self.names
            )
            return found | conflict_metrics("critic", self._critic_loss(rows), rows.task, critic)

    def _metrics(self) -> dict[str, float]:
        """Means since the last record."""
        sums, self._sums = self._sums, {}
        count = sums.pop("count").item()
        values = (sums.pop("q") / count).tolist()
        metrics = {name: value.item() / count for name, value in sums.items()}
        for info, alpha, value in zip(self.spec.tasks, self.log_alpha.exp().tolist(), values, strict=True):
            metrics |= {f"charts/{info.name}_alpha": alpha, f"charts/{info.name}_q": value}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.average.state_dict(),
            "critics": self.critics.state_dict(),
            "targets": self.targets.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "replay": self.replay.state_dict(),
            "descents": {name: descent.state_dict() for name, descent in self.descents.items()},
            "scale": self.scale.state_dict() if self.scale is not None else None,
            "route": self.route,
            "steps": self.steps,
            "updates": self.updates,
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on bit for bit, along the saved route of matrix products even if a new probe chose another."""
        self.average.load_state_dict(state["policy"])
        self.critics.load_state_dict(state["critics"])
        self.targets.load_state_dict(state["targets"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self._update.forget()
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, state["optimizers"][name])
        for name, descent in self.descents.items():
            descent.load_state_dict(state["descents"][name])
        self.generator.set_state(state["generator"])
        self.replay.load_state_dict(state["replay"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        self.route = state["route"]
        self.steps, self.updates = state["steps"], state["updates"]
        self._sums = {name: torch.as_tensor(value, device=self.device) for name, value in state["sums"].items()}

    def load_policy(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state)
        self.pretrained = True


class SACActor:
    """Acts for the rows of one vector, all of them in one batch: by the mode of the policy's average, or, to
    ``explore``, uniformly at random until the agent is warm and then by a sample of the policy itself."""

    def __init__(self, agent: SAC, layout: Layout, explore: bool) -> None:
        self.agent, self.layout, self.explore = agent, layout, explore
        self.generator = torch.Generator(agent.device).manual_seed(agent.seed + 1)

    @torch.no_grad()
    def __call__(self, obs: Obs) -> Decision:
        agent = self.agent
        rows = {group.name: self.layout.rows[group.name] for group in agent.spec.groups if group.name in obs.leaves}
        sizes = {name: (part.stop - part.start, flat_width(agent.spec.group(name))) for name, part in rows.items()}
        if self.explore and not (agent.warm or agent.pretrained):
            action: dict[str, Array] = {}
            for name, size in sizes.items():
                unit = torch.empty(size, device=agent.device).uniform_(-1, 1, generator=self.generator)
                action[name] = agent.policy.to_env(unit, name).cpu().numpy()
            return Decision(action, {})
        task = np.concatenate([obs.task[part] for part in rows.values()])
        leaves = {name: to_tensors(obs.leaves[name], agent.device) for name in rows}
        modes = {name: torch.zeros(size, device=agent.device) for name, size in sizes.items()}
        noise = standard_normal(sizes, self.generator) if self.explore else modes
        return Decision(agent.decide(task, {"leaves": leaves, "noise": noise}, explore=self.explore), {})

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
