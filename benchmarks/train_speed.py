"""Training speed beside peers: environment steps per second while learning, everything included.

    python benchmarks/train_speed.py sac ppo
    python benchmarks/train_speed.py sac --rounds 9 --out results/train_speed.json

``sac``: metaworld/mt10, one environment per task, one update of 1280 transitions per vector step, 3x400 networks, twin
critics. ``ppo``: minigrid/mt3, 8 environments per task, 250 steps of each per iteration, 8 epochs of 8 minibatches, a
2x2 CNN of 16-32-64 channels and a layer of 128 for actor and critic each.

Peers run on their own vectors over the packages' own environments (MetaWorld with the task's one-hot behind the
observation) and have the same networks except for the output layer: one for all tasks where ours has one per task.
"plain" is a loop in the style of CleanRL's single files, written here. Contestants stay alive and take turns round by
round; figures are medians over rounds, ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from vector import stock

from mtrl import registry
from mtrl.machine import usable_cores
from mtrl.nn.linear import probe
from mtrl.spaces import make_spec
from mtrl.vector import MultiTaskVectorEnv

SUITES = {"sac": "metaworld/mt10", "ppo": "minigrid/mt3"}
OURS = "mtrl"
PER_TASK, WIDTH, WARMUP = 128, 400, 50
COPIES, ROLLOUT, EPOCHS, MINIBATCHES, CHANNELS, HEAD = 8, 250, 8, 8, (16, 32, 64), 128


class Contestant(Protocol):
    """Trains for ``steps`` vector steps per call."""

    def run(self, steps: int) -> None: ...
    def close(self) -> None: ...


class Mtrl:
    """Our agent in the order of our training loop."""

    def __init__(self, suite: str, kind: str, options: dict[str, Any], copies: int, workers: int = 0) -> None:
        tasks = registry.tasks(suite)
        spec = make_spec(tasks)
        made = registry.agent(kind)
        self._agent = made(spec, made.Config(**options), seed=0)
        self._envs = MultiTaskVectorEnv(tasks, copies, seed=0, workers=workers, spec=spec)
        self._envs.reset(seed=0)
        self._actor = self._agent.actor(self._envs.layout, explore=True)
        self.close = self._envs.close

    def run(self, steps: int) -> None:
        for _ in range(steps):
            decision = self._actor(self._envs.obs)
            self._envs.step_async(decision.action)
            self._agent.update()
            step, _ = self._envs.step_wait(decision)
            self._agent.observe(step)


class SB3:
    """Stable-Baselines3's own ``learn``."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.close = model.env.close

    def run(self, steps: int) -> None:
        self._model.learn(steps * self._model.n_envs, reset_num_timesteps=False)


class OneHot(gym.ObservationWrapper[np.ndarray, Any, Any]):
    """The task's one-hot behind the observation."""

    def __init__(self, env: gym.Env[Any, Any], task: int, tasks: int) -> None:
        super().__init__(env)
        self._code = np.eye(tasks, dtype=np.float32)[task]
        bound = np.full(env.observation_space.shape[0] + tasks, np.inf, np.float32)  # type: ignore[index]
        self.observation_space = gym.spaces.Box(-bound, bound)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation.astype(np.float32), self._code])


def arm(name: str, task: int, tasks: int) -> gym.Env[Any, Any]:
    """A stock MetaWorld environment with its task's one-hot."""
    return OneHot(stock(name), task, tasks)


def mlp(inner: int, out: int) -> nn.Sequential:
    """Three layers of ``WIDTH`` and one of ``out``."""
    layers = [nn.Linear(inner, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(WIDTH, out))


class PlainSAC:
    """SAC in the style of CleanRL's ``sac_continuous_action.py``, with SB3's buffer as there."""

    def __init__(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        self._envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.close = self._envs.close
        obs, act = self._envs.single_observation_space, self._envs.single_action_space
        assert isinstance(act, gym.spaces.Box)
        assert obs.shape is not None
        self._n, self._a = len(makers), act.shape[0]
        self._batch = PER_TASK * self._n
        self._actor = mlp(obs.shape[0], 2 * self._a)
        self._critics = [mlp(obs.shape[0] + self._a, 1) for _ in range(2)]
        self._targets = [mlp(obs.shape[0] + self._a, 1) for _ in range(2)]
        for critic, target in zip(self._critics, self._targets, strict=True):
            target.load_state_dict(critic.state_dict())
        self._log_alpha = torch.zeros(1, requires_grad=True)
        self._q_optimizer = torch.optim.Adam([p for critic in self._critics for p in critic.parameters()], lr=3e-4)
        self._actor_optimizer = torch.optim.Adam(self._actor.parameters(), lr=3e-4)
        self._a_optimizer = torch.optim.Adam([self._log_alpha], lr=1e-4)
        self._buffer = ReplayBuffer(100_000, obs, act, n_envs=self._n, handle_timeout_termination=False)
        self._obs, _ = self._envs.reset(seed=0)
        self._steps = 0

    def _act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self._actor(obs).chunk(2, 1)
        normal = Normal(mean, log_std.clamp(-10, 2).exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        return action, (normal.log_prob(raw) - torch.log(1 - action.square() + 1e-6)).sum(1, keepdim=True)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                actions = self._act(torch.as_tensor(self._obs))[0].numpy()
            following, reward, terminated, truncated, infos = self._envs.step(actions)
            real = following.copy()
            for i in np.flatnonzero(terminated | truncated):
                real[i] = infos["final_obs"][i]
            self._buffer.add(self._obs, real, actions, reward, terminated, [{}] * self._n)
            self._obs = following
            self._steps += 1
            if self._steps > WARMUP:
                self._learn()

    def _learn(self) -> None:
        data = self._buffer.sample(self._batch)
        alpha = self._log_alpha.exp().item()
        with torch.no_grad():
            action, log_prob = self._act(data.next_observations)
            joined = torch.cat([data.next_observations, action], 1)
            ahead = torch.min(*(target(joined) for target in self._targets)) - alpha * log_prob
            goal = data.rewards + (1 - data.dones) * 0.99 * ahead
        joined = torch.cat([data.observations, data.actions], 1)
        loss = sum((F.mse_loss(critic(joined), goal) for critic in self._critics), torch.zeros(()))
        self._q_optimizer.zero_grad()
        loss.backward()
        self._q_optimizer.step()
        action, log_prob = self._act(data.observations)
        joined = torch.cat([data.observations, action], 1)
        actor_loss = (alpha * log_prob - torch.min(*(critic(joined) for critic in self._critics))).mean()
        self._actor_optimizer.zero_grad()
        actor_loss.backward()
        self._actor_optimizer.step()
        alpha_loss = (-self._log_alpha.exp() * (log_prob.detach() - self._a)).mean()
        self._a_optimizer.zero_grad()
        alpha_loss.backward()
        self._a_optimizer.step()
        for critic, target in zip(self._critics, self._targets, strict=True):
            for p, q in zip(critic.parameters(), target.parameters(), strict=True):
                q.data.copy_(0.005 * p.data + 0.995 * q.data)


def cnn() -> nn.Sequential:
    """MOORE's MiniGrid CNN, [n, 3, 7, 7] -> [n, 1024]."""
    one, two, three = CHANNELS
    convs = (nn.Conv2d(3, one, 2), nn.ReLU(), nn.Conv2d(one, two, 2), nn.ReLU(), nn.Conv2d(two, three, 2), nn.Tanh())
    return nn.Sequential(*convs, nn.Flatten())


class Products:
    """Not an agent: the matrix products that one SAC update of this size cannot do without, and nothing else.

    Forward: the policy twice, the critics twice, their targets once; backward: policy and critics to weights and
    inputs, the critics to their inputs once more for the policy's loss. No environments, activations, optimisers: no
    implementation with these products can be faster.
    """

    close = staticmethod(lambda: None)

    def __init__(self, rows: int, obs: int, act: int, dtype: torch.dtype) -> None:
        batch = PER_TASK * rows

        def layers(inner: int, out: int) -> list[tuple[Tensor, Tensor, Tensor]]:
            sizes = zip((inner, WIDTH, WIDTH, WIDTH), (WIDTH, WIDTH, WIDTH, out), strict=True)
            return [(torch.randn(batch, a), torch.randn(a, b), torch.randn(batch, b)) for a, b in sizes]

        nets = {"policy": layers(obs, 2 * act), "critic": layers(obs + act, 1)}
        self._nets = {name: [tuple(x.to(dtype) for x in layer) for layer in net] for name, net in nets.items()}

    def run(self, steps: int) -> None:
        passes = {"policy": (2, 1, 1), "critic": (6, 2, 4)}  # forward, to weights, to inputs
        for _ in range(steps):
            for name, (forward, weights, inputs) in passes.items():
                for i, (x, weight, grad) in enumerate(self._nets[name]):
                    for _ in range(forward):
                        torch.mm(x, weight)
                    for _ in range(weights):
                        torch.mm(x.t(), grad)
                    for _ in range(inputs if i else 0):  # nobody asks for the gradient of an observation
                        torch.mm(grad, weight.t())


class Extractor(BaseFeaturesExtractor):
    """``cnn`` for SB3, which hands it float images."""

    def __init__(self, space: gym.spaces.Box) -> None:
        super().__init__(space, 16 * CHANNELS[-1])
        self.net = cnn()

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


class PlainPPO:
    """PPO in the style of CleanRL's ``ppo.py``."""

    def __init__(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        self._envs = SyncVectorEnv(makers)
        self.close = self._envs.close
        self._actor = nn.Sequential(cnn(), nn.Linear(1024, HEAD), nn.Tanh(), nn.Linear(HEAD, 7))
        self._critic = nn.Sequential(cnn(), nn.Linear(1024, HEAD), nn.Tanh(), nn.Linear(HEAD, 1))
        self._parameters = [*self._actor.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr=1e-3)
        self._next = self._image(self._envs.reset(seed=0)[0])
        self._done = torch.zeros(len(makers))

    def _image(self, obs: np.ndarray) -> Tensor:
        return torch.as_tensor(obs).permute(0, 3, 1, 2).float()

    def run(self, steps: int) -> None:
        for _ in range(steps // ROLLOUT):
            self._iterate()

    def _iterate(self) -> None:
        n = len(self._done)
        obs = torch.zeros(ROLLOUT, n, 3, 7, 7)
        actions, log_probs, rewards, dones, values = (torch.zeros(ROLLOUT, n) for _ in range(5))
        for t in range(ROLLOUT):
            obs[t], dones[t] = self._next, self._done
            with torch.no_grad():
                policy = Categorical(logits=self._actor(self._next))
                action = policy.sample()
                values[t] = self._critic(self._next)[:, 0]
            actions[t], log_probs[t] = action, policy.log_prob(action)
            following, reward, terminated, truncated, _ = self._envs.step(action.numpy())
            rewards[t] = torch.as_tensor(reward)
            self._next, self._done = self._image(following), torch.as_tensor(terminated | truncated).float()
        with torch.no_grad():
            ahead = self._critic(self._next)[:, 0]
        advantages, last = torch.zeros_like(rewards), torch.zeros(n)
        for t in reversed(range(ROLLOUT)):
            going = 1 - (self._done if t == ROLLOUT - 1 else dones[t + 1])
            delta = rewards[t] + 0.99 * (ahead if t == ROLLOUT - 1 else values[t + 1]) * going - values[t]
            advantages[t] = last = delta + 0.99 * 0.95 * going * last
        returns = (advantages + values).flatten()
        parts = (obs.flatten(0, 1), actions.flatten(), log_probs.flatten(), advantages.flatten(), returns)
        for _ in range(EPOCHS):
            for index in torch.randperm(ROLLOUT * n).chunk(MINIBATCHES):
                self._learn(*[part[index] for part in parts])

    def _learn(self, obs: Tensor, action: Tensor, old: Tensor, advantage: Tensor, goal: Tensor) -> None:
        policy = Categorical(logits=self._actor(obs))
        ratio = (policy.log_prob(action) - old).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        surrogate = torch.min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).mean()
        value_loss = 0.5 * F.mse_loss(self._critic(obs)[:, 0], goal)
        loss = 0.5 * value_loss - surrogate - 0.01 * policy.entropy().mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 0.5)
        self._optimizer.step()


def sac_contestants() -> dict[str, Callable[[], Contestant]]:
    """Who trains SAC; each is made when called."""
    suite = SUITES["sac"]
    names = [task.name for task in registry.tasks(suite)]
    makers: list[Callable[[], gym.Env[Any, Any]]] = [partial(arm, name, i, len(names)) for i, name in enumerate(names)]
    options = {"batch_size": PER_TASK, "capacity": 10_000, "warmup": WARMUP}

    def sb3(vector: Callable[[list[Any]], VecEnv]) -> SB3:
        model = stable_baselines3.SAC(
            "MlpPolicy",
            vector(makers),
            buffer_size=100_000,
            learning_starts=WARMUP * len(makers),
            batch_size=PER_TASK * len(makers),
            train_freq=1,
            gradient_steps=1,
            policy_kwargs={"net_arch": [WIDTH] * 3},
            device="cpu",
        )
        return SB3(model)

    return {
        OURS: lambda: Mtrl(suite, "sac", options, 1),
        "mtrl, 2 workers": lambda: Mtrl(suite, "sac", options, 1, workers=2),
        "mtrl, torch's products": lambda: Mtrl(suite, "sac", {**options, "matmul": "default"}, 1),
        "mtrl, bf16": lambda: Mtrl(suite, "sac", {**options, "matmul": "bf16"}, 1),
        "SB3, DummyVecEnv": lambda: sb3(DummyVecEnv),
        "SB3, SubprocVecEnv": lambda: sb3(SubprocVecEnv),
        "plain": lambda: PlainSAC(makers),
        "bound: products alone": lambda: Products(len(makers), 39, 4, torch.float32),
        "bound: products, bf16": lambda: Products(len(makers), 39, 4, torch.bfloat16),
    }


def ppo_contestants() -> dict[str, Callable[[], Contestant]]:
    """Who trains PPO; each is made when called."""
    suite = SUITES["ppo"]
    makers: list[Callable[[], gym.Env[Any, Any]]] = [
        partial(stock, task.name) for task in registry.tasks(suite) for _ in range(COPIES)
    ]
    options = {
        "rollout": ROLLOUT,
        "epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "head": (HEAD,),
        "perception": {"grid": "cast", "channels": CHANNELS},
    }

    def sb3(vector: Callable[[list[Any]], VecEnv]) -> SB3:
        model = stable_baselines3.PPO(
            "CnnPolicy",
            vector(makers),
            learning_rate=1e-3,
            n_steps=ROLLOUT,
            batch_size=ROLLOUT * len(makers) // MINIBATCHES,
            n_epochs=EPOCHS,
            policy_kwargs={
                "features_extractor_class": Extractor,
                "share_features_extractor": False,
                "normalize_images": False,
                "net_arch": [HEAD],
            },
            device="cpu",
        )
        return SB3(model)

    return {
        OURS: lambda: Mtrl(suite, "ppo", options, COPIES),
        "mtrl, 2 workers": lambda: Mtrl(suite, "ppo", options, COPIES, workers=2),
        "SB3, DummyVecEnv": lambda: sb3(DummyVecEnv),
        "SB3, SubprocVecEnv": lambda: sb3(SubprocVecEnv),
        "plain": lambda: PlainPPO(makers),
    }


def compare(which: str, rounds: int, steps: int) -> dict[str, Any]:
    """All contestants in turn; speeds in environment steps per second, by round."""
    makers, rows = (sac_contestants(), 10) if which == "sac" else (ppo_contestants(), 3 * COPIES)
    speeds: dict[str, list[float]] = {name: [] for name in makers}
    with contextlib.ExitStack() as stack:
        alive: dict[str, Contestant] = {}
        for name, make in makers.items():
            alive[name] = make()
            stack.callback(alive[name].close)
            alive[name].run(WARMUP + 5 if which == "sac" else ROLLOUT)  # to the first updates
        for round_ in range(rounds):
            order = list(alive) if round_ % 2 == 0 else list(alive)[::-1]
            for name in order:
                start = time.perf_counter()
                alive[name].run(steps)
                speeds[name].append(steps * rows / (time.perf_counter() - start))
    return {"agent": which, "suite": SUITES[which], "rounds": rounds, "steps": steps, "speeds": speeds}


def report(result: dict[str, Any]) -> None:
    """Print one table and add the ratios to the result."""
    speeds = result["speeds"]
    best = max((n for n in speeds if n.startswith("SB3")), key=lambda name: statistics.median(speeds[name]))

    def ratio(one: str, two: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[one], speeds[two], strict=True))

    result["best_sb3"] = best
    result["ratios"] = {name: {"best SB3": ratio(name, best), "plain": ratio(name, "plain")} for name in speeds}
    print(f"\n{result['agent']} on {result['suite']}: environment steps per second while learning")
    print(f"{'':26s}{'median':>9s}{'min':>9s}{'max':>9s}{'/ best SB3':>12s}{'/ plain':>9s}")
    for name, values in speeds.items():
        ratios = result["ratios"][name]
        spread = f"{statistics.median(values):9.1f}{min(values):9.1f}{max(values):9.1f}"
        print(f"{name:26s}{spread}{ratios['best SB3']:12.2f}{ratios['plain']:9.2f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="*", choices=[*SUITES, []], help="default: both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="vector steps of SAC per round; PPO takes one iteration")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads, for all contestants")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = probe()
    print(f"products: {found.route}, oneDNN {found.speedup:.2f} times as fast as torch's default")
    results = []
    for which in args.agents or SUITES:
        results.append(compare(which, args.rounds, args.steps if which == "sac" else ROLLOUT))
        report(results[-1])
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {args.threads} torch threads")
    if args.out:
        packages = ("torch", "stable-baselines3", "gymnasium", "metaworld", "minigrid", "numpy")
        machine = {"cores": os.cpu_count(), "threads": args.threads, "load": os.getloadavg(), "probe": found._asdict()}
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        args.out.write_text(json.dumps({"machine": machine, "versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
