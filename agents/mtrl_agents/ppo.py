"""Proximal policy optimisation for any mix of tasks.

Schulman et al. 2017 (https://arxiv.org/abs/1707.06347) with generalised advantages (https://arxiv.org/abs/1506.02438)
and the details collected by Huang et al. 2022 (https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/).
What several tasks add follows the multi-task PPO of MOORE (https://arxiv.org/abs/2311.11385): a head per task,
advantages normalised per task, separate networks for actor and critic; value targets are normalised per task as in
MAPPO (https://arxiv.org/abs/2103.01955), whose critic also reads a team's global state. Every task has an equal share
in every loss. ``action_value_weight``: the actor's features must tell the return after the action taken (values in PPG,
arXiv 2009.04416, advantages in DAAC, 2102.10330), so that a memory learns what to keep while the policy can but guess.
Advantages are computed in float64. Box actions: a diagonal Gaussian in units where the bounds are -1 and 1; the sample
is clipped and rescaled for the environment, its log-probability is that of the unclipped sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mtrl.nn.actor_critic import Body, PolicyNet, ValueNet, appraise, decide, evaluate, judge, to_rows
from mtrl.nn.aggregation import Method
from mtrl.nn.balancers import BalancerName
from mtrl.nn.bootstrap import judge_rollout
from mtrl.nn.descent import Descent
from mtrl.nn.diagnostics import conflict_metrics, inspect
from mtrl.nn.heads import Distribution
from mtrl.nn.linear import Route, matmul, probe
from mtrl.nn.normalizers import TaskMoments, preserve_outputs_
from mtrl.nn.optim import load_optimizer_state, optimizer_state
from mtrl.nn.perception import PerceptionConfig
from mtrl.nn.recall import Recall
from mtrl.nn.trunk import TrunkConfig
from mtrl.rollout import Items, Minibatch, Rollout, chunk_length, explained_variance, gae, not_finite
from mtrl.types import Array, Decision, Layout, Obs, Spec, Step


class PPO:
    """Learns Discrete, masked Discrete and Box actions of all groups at once, with or without memory."""

    recurrent: bool

    class Config(BaseModel):
        """Defaults solve MiniGrid's MT3 with 8 copies of each task."""

        model_config = ConfigDict(extra="forbid")

        rollout: int = Field(default=250, ge=1, description="steps per row between updates (MOORE: 2000 per task)")
        epochs: int = Field(default=4, ge=1, description="passes over the rollout (MOORE: 8)")
        minibatches: int = Field(default=8, ge=1, description="parts of one pass, each with its share of every task")
        lr: float = Field(default=1e-3, gt=0, description="Adam (MOORE: 1e-3)")
        lr_decay_updates: int | None = Field(default=None, ge=1, description="where a linear decay of lr reaches 0")
        gamma: float = Field(default=0.99, ge=0, le=1)
        lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda")
        clip: float = Field(default=0.2, gt=0, description="of the probability ratio")
        value_clip: float | None = Field(default=None, gt=0, description="of the normalised value's change; None: off")
        entropy: float = Field(default=0.01, ge=0, description="weight of the entropy bonus")
        value_weight: float = Field(default=0.5, gt=0, description="weight of the value loss")
        action_value_weight: float = Field(default=0.0, ge=0, description="of the actor's loss on its actions' returns")
        max_grad_norm: float | None = Field(default=0.5, gt=0, description="of actor and critic, or of both if shared")
        actor_gradients: Method = Field(default="mean", description="how the tasks' gradients become one")
        critic_gradients: Method = Field(default="mean", description="TOPPO: fairgrad here, pcgrad for the actor")
        critic_balance: BalancerName | None = Field(default=None, description="how their losses become one; None: mean")
        target_kl: float | None = Field(default=None, gt=0, description="end the epochs beyond this mean divergence")
        normalize_advantage: bool = Field(default=True, description="by running moments of each task's advantages")
        advantage_decay: float = Field(default=0.95, ge=0, lt=1, description="of these; 0: this rollout's own (MOORE)")
        normalize_value: bool = Field(default=True, description="by running moments of each task's returns")
        popart: bool = Field(default=False, description="keep the critic's values when these moments change")
        critic_fit: Literal["minibatches", "rollout"] = Field(
            default="minibatches", description="rollout: one step on all of it, before the policy's (MOORE's code)"
        )
        share: bool = Field(default=False, description="one body for actor and critic")
        memory: int = Field(default=0, ge=0, description="width of a memory behind the trunk; 0: none")
        chunk: int | None = Field(default=None, ge=1, description="steps of memory's gradient; None: divisor <= 32")
        matmul: Literal["auto"] | Route = Field(default="auto", description="auto: fastest with fp32 accuracy; or bf16")
        head: tuple[int, ...] = Field(default=(128,), description="hidden layers of the heads")
        head_activation: str = Field(default="tanh", pattern="^(tanh|relu)$")
        inspect_every: int = Field(default=10, ge=0, description="updates between looks at experts, ranks, conflicts")
        perception: PerceptionConfig = Field(default_factory=PerceptionConfig)
        trunk: TrunkConfig = Field(default_factory=TrunkConfig)

        @model_validator(mode="after")
        def _heeded(self) -> Self:
            wrong = {
                "popart is for values that are normalised: set normalize_value=true": not self.normalize_value
                and self.popart,
                "chunk is of a memory's gradient: set memory, or leave chunk out": self.chunk and not self.memory,
                "trunk.kind=paco composes the output layer, too: set head=[]": self.trunk.kind == "paco" and self.head,
                "memory hides the features that trunk.kind=paco composes": self.trunk.kind == "paco" and self.memory,
            }
            if told := [text for text, is_so in wrong.items() if is_so]:
                raise ValueError(told[0])
            return self

    def __init__(self, spec: Spec, config: Config, *, seed: int, device: str = "cpu") -> None:
        self.spec, self.config, self.seed = spec, config, seed
        self.names = [task.name for task in spec.tasks]
        self.device = torch.device(device)
        self.recurrent = config.memory > 0
        self.chunk = chunk_length(config.rollout, config.chunk) if config.memory else 1
        hidden = [group.name for group in spec.groups if "state" in group.leaves]
        if config.share and hidden:
            raise ValueError(f"group {hidden[0]!r} has a global state, which only a critic may see: set share=false")
        alone = {"critic_fit": "minibatches", "critic_gradients": config.actor_gradients, "critic_balance": None}
        for field, common in alone.items():
            if config.share and (value := getattr(config, field)) != common:
                raise ValueError(f"{field}={value} is for a critic alone, but its body is the actor's: set share=false")
        self.route: Route = probe(device).route if config.matmul == "auto" else config.matmul
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body = Body(spec, config.perception, config.trunk, config.memory)
            other = None if config.share else Body(spec, config.perception, config.trunk, config.memory, state=True)
            head, told = (config.head, config.head_activation), config.action_value_weight > 0
            self.policy = PolicyNet(spec, body, *head, action_values=told).to(self.device)
            self.critic = ValueNet(spec, other, other or body, *head, config.popart).to(self.device)
        self.critic_body = other or body
        self.nets: dict[str, nn.Module] = {"policy": self.policy, "critic": self.critic}
        # What is stepped together: everything, if actor and critic share a body.
        bodies = {"actor and critic": nn.ModuleDict(self.nets)} if config.share else self.nets
        self.optimizers = {
            name: torch.optim.Adam(net.parameters(), config.lr, eps=1e-5, fused=True) for name, net in bodies.items()
        }
        common: dict[str, Any] = {"clip": config.max_grad_norm, "gradients": config.actor_gradients, "seed": seed}
        own = {"critic": {"gradients": config.critic_gradients, "balance": config.critic_balance}}
        self.descents = {
            name: Descent(name, net, self.optimizers[name], self.names, **(common | own.get(name, {})))
            for name, net in bodies.items()
        }
        self.generator = torch.Generator().manual_seed(seed)
        self.rollout = Rollout(spec, config.rollout)
        self.moments = TaskMoments(len(spec.tasks))
        # Running moments rather than each rollout's own: while a sparse reward is not found, a rollout's advantages
        # are the critic's errors and nothing else, and brought to deviation 1 they would drive the policy.
        self.spread = TaskMoments(len(spec.tasks), decay=config.advantage_decay, floor=1e-12)
        self.errors: Array | None = None  # sizes of the last rollout's value errors, for samplers
        self.critic_memory: Tensor | None = None  # the critic's own memory where the rollout starts, [n, H]
        self.updates = self.version = 0  # version: of the policy

    def actor(self, layout: Layout, *, explore: bool) -> PPOActor:
        """Decides with the current networks: ``explore`` samples, otherwise the distribution's mode."""
        return PPOActor(self, layout, explore)

    def observe(self, step: Step) -> None:
        self.rollout.add(step)

    def update(self) -> Mapping[str, float]:
        """Learn if the rollout is full.

        The action that the environments execute right now was chosen before this update; its stored log-probability
        is that of the policy which chose it, so its ratio in the next rollout is exact.

        Raises:
            FloatingPointError: something is not finite; names it, the tasks and the update.
        """
        if not self.rollout.full:
            return {}
        with matmul(self.route, self.device):
            return self._learn()

    def _learn(self) -> dict[str, float]:
        config = self.config
        if config.lr_decay_updates:
            for optimizer in self.optimizers.values():
                optimizer.param_groups[0]["lr"] = config.lr * max(0.0, 1 - self.updates / config.lr_decay_updates)
        items, metrics = self._prepare()
        sums: dict[str, list[float]] = {}
        fits = config.critic_fit == "minibatches"
        if not fits:
            sums["value"] = [self._step(batch, ["critic"])["value"] for batch in items.minibatches(1, self.generator)]
        look = config.inspect_every and self.updates % config.inspect_every == 0
        epochs = 0
        while epochs < config.epochs:
            epochs += 1
            divergence = []
            for batch in items.minibatches(config.minibatches, self.generator):
                terms = self._step(batch, [*self.descents] if fits else ["policy"], look=bool(look))
                look = False
                divergence.append(terms["approx_kl"])
                for name, value in terms.items():
                    sums.setdefault(name, []).append(value)
            if config.target_kl and np.mean(divergence) > config.target_kl:
                break
        self.rollout.clear()
        self.updates, self.version = self.updates + 1, self.version + 1
        metrics |= {name if "/" in name else f"losses/{name}": float(np.mean(x)) for name, x in sums.items()}
        metrics["losses/epochs"] = float(epochs)
        metrics["charts/learning_rate"] = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": {name: optimizer_state(each) for name, each in self.optimizers.items()},
            "descents": {name: descent.state_dict() for name, descent in self.descents.items()},
            "generator": self.generator.get_state(),
            "rollout": self.rollout.state_dict(),
            "moments": self.moments.state_dict(),
            "spread": self.spread.state_dict(),
            "critic_memory": self.critic_memory,
            "route": self.route,
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.load_policy(state["policy"])
        self.critic.load_state_dict(state["critic"])
        for name, descent in self.descents.items():
            load_optimizer_state(self.optimizers[name], state["optimizers"][name])
            descent.load_state_dict(state["descents"][name])
        self.generator.set_state(state["generator"])
        self.rollout.load_state_dict(state["rollout"])
        self.moments.load_state_dict(state["moments"])
        self.spread.load_state_dict(state["spread"])
        memory = state["critic_memory"]
        self.critic_memory = None if memory is None else memory.to(self.device)
        self.route = state["route"]  # the same products as before, even if a new probe chose another route
        self.updates = int(state["updates"])

    def load_policy(self, state: Mapping[str, Any]) -> None:
        self.version += 1
        self.policy.load_state_dict(state)

    def _prepare(self) -> tuple[Items, dict[str, float]]:
        """Values and advantages of the whole rollout, in one pass of the critic, then cut into items to draw from."""
        roll, config, living = self.rollout, self.config, self.rollout.living
        scale = self.moments.denormalize if config.normalize_value else lambda value, _: value
        judged = judge_rollout(self.critic, self.critic_body, roll, self._critic_start(), self.device)
        self.critic_memory = judged.memory_after
        value = scale(judged.value, roll.task)
        next_value = np.zeros_like(value)
        next_value[:-1] = value[1:]
        next_value[judged.end_t, judged.end_row] = scale(judged.end_value, roll.task[judged.end_t, judged.end_row])
        for name, array in {"reward": roll.reward, "value": value, "log_prob": roll.extras["log_prob"]}.items():
            if bad := not_finite(array, roll, self.names):
                raise FloatingPointError(f"{name} is not finite for {bad} in update {self.updates}")
        final = roll.terminated, roll.truncated
        advantage = gae(roll.reward, value, next_value, *final, gamma=config.gamma, lam=config.lam)
        returns = advantage + value
        self.errors = np.where(roll.valid, np.abs(advantage), np.nan)
        metrics = explained_variance(returns, value, roll, self.names)
        if config.normalize_value:
            before = self.moments.mean, self.moments.std
            self.moments.update(returns[roll.valid], roll.task[roll.valid])
            if config.popart:
                after = self.moments.mean, self.moments.std
                preserve_outputs_(self.critic.head.net.layers[-1], before, after)
        if config.normalize_advantage:
            self.spread.update(advantage[living > 0], roll.task[living > 0])
            advantage = self.spread.normalize(advantage, roll.task)
        columns = {
            "advantage": advantage.astype(np.float32),
            "target": self._normalized(returns).astype(np.float32),
            "old_value": (self._normalized(value) if config.popart else judged.value).astype(np.float32),
            "log_prob": roll.extras["log_prob"],
            "living": living,
        }
        action = {}
        for group, rows in roll.rows.items():
            shape = self.spec.group(group).action.shape
            action[group] = roll.extras["sample"][:, rows, : shape[0]] if shape else roll.action[group]
        memory = {} if judged.memory is None else {"critic": judged.memory}
        if config.memory:
            memory["actor"] = torch.as_tensor(roll.extras["memory"], device=self.device)
        folds = not any(net.whole for net in (self.policy.body, self.critic_body))
        cut = {"steps": self.chunk, "columns": columns, "action": action, "memory": memory, "folds": folds}
        items = Items(roll, **cut, device=self.device)
        return items, metrics

    def _normalized(self, values: Array) -> Array:
        return self.moments.normalize(values, self.rollout.task) if self.config.normalize_value else values

    def _critic_start(self) -> Tensor | None:
        """What the critic remembers where the rollout starts, [n, H]; None without memory."""
        roll, width = self.rollout, self.config.memory
        if width and self.config.share:
            return torch.as_tensor(roll.extras["memory"][0], device=self.device)
        if width and self.critic_memory is None:
            return torch.zeros(roll.task.shape[1], width, device=self.device)
        return self.critic_memory

    def policy_loss(self, batch: Minibatch, policies: Mapping[str, Distribution]) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate and entropy bonus of each row, [t, m]; of the living, since the dead choose nothing."""
        config, column = self.config, batch.columns
        pairs = [(policy, batch.action[group]) for group, policy in policies.items()]
        log_prob = torch.cat([policy.log_prob(a.flatten(0, 1)).view(a.shape[:2]) for policy, a in pairs], 1)
        entropy = torch.cat([policy.entropy().view(a.shape[:2]) for policy, a in pairs], 1)
        log_ratio = (log_prob - column["log_prob"]).masked_fill(~column["valid"], 0.0)
        ratio, advantage = log_ratio.exp(), column["advantage"]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - config.clip, 1 + config.clip) * advantage)
        clipped = ((ratio - 1).abs() > config.clip).float()
        metrics = {"policy": loss, "entropy": entropy, "approx_kl": ratio - 1 - log_ratio, "clip_fraction": clipped}
        living = column["living"]
        return (loss - config.entropy * entropy) * living, {name: x * living for name, x in metrics.items()}

    def value_loss(self, batch: Minibatch, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of each row's normalised value, [t, m]."""
        config, column = self.config, batch.columns
        error = (value - column["target"]).square()
        if config.value_clip is not None:
            change = (value - column["old_value"]).clamp(-config.value_clip, config.value_clip)
            error = torch.maximum(error, (column["old_value"] + change - column["target"]).square())
        return config.value_weight * error, {"value": error}

    def _losses(self, batch: Minibatch, name: str) -> tuple[Tensor, dict[str, float]]:
        """What the descent ``name`` goes down, [t * m], and means of what is worth logging."""
        loss, metrics = torch.zeros(()), dict[str, Tensor]()
        features = None
        if name != "critic":
            policies, features = decide(self.policy, batch.scene)
            loss, metrics = self.policy_loss(batch, policies)
            if weight := self.config.action_value_weight:
                error = appraise(self.policy, batch.scene, features, batch.action) - batch.columns["target"]
                metrics["action_value"] = error.square() * batch.columns["living"]
                loss = loss + weight * metrics["action_value"]
        if name != "policy":
            fit, more = self.value_loss(batch, judge(self.critic, batch.scene, features))
            loss, metrics = loss + fit, metrics | more
        valid = batch.columns["valid"].flatten()
        with torch.no_grad():
            means = {key: float((x.flatten() * batch.weight)[valid].sum()) for key, x in metrics.items()}
        return loss.flatten().masked_fill(~valid, 0.0), means

    def _step(self, batch: Minibatch, names: Sequence[str], *, look: bool = False) -> dict[str, float]:
        """One gradient step of each descent named on one minibatch [t, m]; ``look``: and a look inside."""
        seen: dict[str, list[float]] = {}
        found: dict[str, float] = {}
        if look:
            rows, valid = batch.scene.rows, batch.columns["valid"].flatten()
            found = inspect(self.nets, lambda: evaluate(self.policy, self.critic, rows, batch.memory), self.names)
            loss = self._losses(batch, "policy")[0]
            found |= conflict_metrics("policy", loss[valid], batch.task[valid], self.policy)

        def losses(name: str, part: Minibatch) -> Tensor:
            loss, means = self._losses(part, name)
            for key, value in means.items():
                seen.setdefault(key, []).append(value)
            return loss

        for name in names:  # nothing moves before everything is known to be finite
            self.descents[name].backward(partial(losses, name), batch, self.updates)
        for name in names:
            self.descents[name].step(lambda part, name=name: self._losses(part, name)[0], batch)
        return {key: float(np.mean(values)) for key, values in seen.items()} | found


class PPOActor:
    """Decides for one vector's rows with the agent's current policy; owns its memory and its randomness."""

    def __init__(self, agent: PPO, layout: Layout, explore: bool) -> None:
        self.agent, self.explore = agent, explore
        self.rows = dict(sorted(layout.rows.items(), key=lambda pair: pair[1].start))
        self.rows = {group: rows for group, rows in self.rows.items() if rows.stop > rows.start}
        boxes = [agent.spec.group(group).action.shape for group in self.rows]
        self.sample_width = max((shape[0] for shape in boxes if shape), default=0)
        self.generator = torch.Generator(agent.device).manual_seed(2 * agent.seed + int(explore))
        width = agent.config.memory
        self.memory = torch.zeros(layout.num_rows, width, device=agent.device) if width else None
        self.recall = Recall([agent.spec.group(group) for group in self.rows], agent.device)

    @torch.no_grad()
    def __call__(self, obs: Obs) -> Decision:
        """Actions and, for the learner, ``log_prob`` [N], ``sample`` [N, a] (unclipped, if there are Box actions) and
        ``memory`` [N, H] (before this step, if there is one)."""
        agent = self.agent
        leaves = {group: {leaf: x[None] for leaf, x in obs.leaves[group].items()} for group in self.rows}
        rows = to_rows(leaves, obs.task[None], obs.first[None], agent.device)
        before = self.memory
        with matmul(agent.route, agent.device):
            policies, (_, self.memory) = agent.policy(rows, before, self.recall.lookup(agent.version))
        action: dict[str, Array] = {}
        log_probs: list[Tensor] = []
        sample = np.zeros((len(obs.task), self.sample_width), np.float32)
        for group, policy in policies.items():
            drawn = policy.sample(self.generator) if self.explore else policy.mode()
            action[group] = agent.policy.to_env(group, drawn).cpu().numpy()
            log_probs.append(policy.log_prob(drawn))
            if drawn.is_floating_point():
                sample[self.rows[group], : drawn.shape[1]] = drawn.cpu().numpy()
        extras = {"log_prob": torch.cat(log_probs).cpu().numpy()}
        if self.sample_width:
            extras["sample"] = sample
        if before is not None:
            extras["memory"] = before.cpu().numpy()
        return Decision(action, extras)

    def state_dict(self) -> dict[str, Any]:
        seen = self.recall.state_dict(self.agent.version)
        return {"generator": self.generator.get_state(), "memory": self.memory, "recall": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        memory = state["memory"]
        self.memory = None if memory is None else memory.to(self.agent.device)
        self.recall.load_state_dict(state["recall"], self.agent.version)
