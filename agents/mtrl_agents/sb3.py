"""Stable-Baselines3's PPO and SAC as baselines: its policies, its buffers, its ``train()``, our loop and our tasks.

Nothing of the algorithms is written here. An adapter fills SB3's own buffer from ``observe`` just as SB3's
``collect_rollouts`` does and calls ``train()`` when it is due, on the padded view's observation with the task as a
one-hot (``mtrl.vector.views.Padding``), the one that ``SB3VecEnv`` shows. So a comparison with our agents shares tasks,
seeds, evaluation and logging, and a run can be resumed exactly, which SB3's own loop cannot.

One difference from SB3's ``learn()``: our loop learns while the environments move, so the first action after an update
was still chosen by the policy before it (its log-probability is stored accordingly).

Source: https://github.com/DLR-RM/stable-baselines3 (2.9), Raffin et al., JMLR 2021.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger

from mtrl.types import Array, Decision, Layout, Obs, Spec, Step
from mtrl.vector.views import Padding

Model = TypeVar("Model", PPO, SAC)
_ACTIVATIONS: dict[str, type[torch.nn.Module]] = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}


class Randomness:
    """SB3 draws from torch's and numpy's global generators; this lends it private states for a while instead.

    Args:
        seed: seeds both.
        device: the generator of a CUDA device is lent as well.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = [device] if device.type == "cuda" else []
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._devices = [torch.Generator(d).manual_seed(seed).get_state() for d in self._cuda]
        self._numpy = np.random.RandomState(seed).get_state(legacy=False)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within, global draws come from the private states; after, the global states are what they were."""
        outside = np.random.get_state(legacy=False)  # noqa: NPY002
        with torch.random.fork_rng(devices=self._cuda):
            try:
                self._set()
                yield
                self._torch = torch.get_rng_state()
                self._devices = [torch.cuda.get_rng_state(d) for d in self._cuda]
                self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002
            finally:
                np.random.set_state(outside)  # noqa: NPY002

    def _set(self) -> None:
        torch.set_rng_state(self._torch)
        for device, state in zip(self._cuda, self._devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"torch": self._torch, "devices": self._devices, "numpy": deepcopy(self._numpy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._torch, self._devices = state["torch"].cpu(), [device.cpu() for device in state["devices"]]
        self._numpy = deepcopy(dict(state["numpy"]))


class SB3Agent(Generic[Model]):
    """What both baselines share: the padded observation, isolated randomness, and state.

    Teams: SB3 knows no dead rows, so those of dead members count as transitions with reward 0.

    Raises:
        ValueError: Discrete and Box groups in one spec (from ``Padding``).
    """

    recurrent = False

    def __init__(self, spec: Spec, model: Model, seed: int) -> None:
        """``model`` was made with ``_init_setup_model=False``, as SB3 itself does when it loads one."""
        self.spec, self.model, self.seed = spec, model, seed
        self.padding = Padding(spec, illegal="first")  # SB3 knows no masks
        self.rows = 0  # of the training vector; known at its first step
        model.observation_space, model.action_space = self.padding.flat_space, self.padding.action_space
        model.n_envs = 1
        model.set_logger(Logger(folder=None, output_formats=[]))
        self.randomness = Randomness(seed, model.device)
        with self.randomness.lent():
            model._setup_model()
        model.policy.set_training_mode(False)

    def actor(self, layout: Layout, *, explore: bool) -> SB3Actor:
        """Acts as SB3 does while it collects (``explore``), or deterministically."""
        del layout  # the padding finds the rows of a group by their tasks
        return SB3Actor(self, explore)

    def explore(self, observation: Array) -> tuple[Array, dict[str, Array]]:
        """Decide as SB3's ``collect_rollouts`` does, drawing from the global generators.

        Returns:
            Actions [N, ...] within the action space, and the extras that ``observe`` needs.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, it holds references: write it away before the agent goes on."""
        buffer = self._buffer()
        filled = buffer.size()
        return {
            **{name: dict(module.state_dict()) for name, module in self._modules().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers().items()},
            "rows": self.rows,
            "timesteps": self.model.num_timesteps,
            "updates": self.model._n_updates,
            "buffer": {name: array[:filled] for name, array in _arrays(buffer).items()},
            "position": buffer.pos,
            "full": buffer.full,
            "randomness": self.randomness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the saved agent would have.

        Raises:
            ValueError: the buffer had another size.
        """
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.model.num_timesteps, self.model._n_updates = state["timesteps"], state["updates"]
        self.randomness.load_state_dict(state["randomness"])
        if state["rows"]:
            self._begin(state["rows"])
        buffer = self._buffer()
        for name, array in _arrays(buffer).items():
            saved = state["buffer"][name]
            if len(saved) > len(array) or (state["full"] and len(saved) != len(array)):
                raise ValueError(f"the saved buffer holds {len(saved)} steps, this one {len(array)}: sizes must agree")
            array[: len(saved)] = saved
        buffer.pos, buffer.full = state["position"], state["full"]

    def load_policy(self, state: Mapping[str, Any]) -> None:
        """Take ``state_dict()["policy"]``, all that acting needs."""
        self._modules()["policy"].load_state_dict(state)

    def _begin(self, rows: int) -> None:
        """Make the buffer for ``rows`` rows."""
        raise NotImplementedError

    def _modules(self) -> dict[str, torch.nn.Module]:
        """Everything with parameters; ``policy`` is what acting needs."""
        raise NotImplementedError

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        raise NotImplementedError

    def _buffer(self) -> RolloutBuffer | ReplayBuffer:
        raise NotImplementedError

    def _check(self, step: Step) -> None:
        """Begin with the first step's rows; SB3's buffers hold the same rows at every step."""
        rows = len(step.reward)
        if not self.rows:
            self._begin(rows)
        if rows != self.rows or not step.active.all():
            raise ValueError(
                f"SB3's buffers hold all of the same {self.rows} rows at every step; this step has {rows}, "
                f"{int(step.active.sum())} of them active"
            )

    def _metrics(self) -> dict[str, float]:
        """What ``train()`` recorded.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        found: dict[str, float] = {}
        for name, value in self.model.logger.name_to_value.items():
            short = name.removeprefix("train/")
            if np.isfinite(value):
                found[("charts/" if short == "learning_rate" else "losses/") + short] = float(value)
            elif short != "explained_variance":  # that one is undefined where all returns are equal
                raise FloatingPointError(f"{short} is {value} in SB3's update {self.model._n_updates}")
        self.model.logger.dump()  # clears
        return found

    def _tensor(self, observation: Array) -> torch.Tensor:
        return torch.as_tensor(observation, device=self.model.device)


class SB3Actor:
    """Decides for the rows of one vector, with random states of its own."""

    def __init__(self, agent: SB3Agent[Any], explore: bool) -> None:
        self._agent, self._explore = agent, explore
        self.randomness = Randomness(actor_seed(agent.seed), agent.model.device)

    def __call__(self, obs: Obs) -> Decision:
        padding = self._agent.padding
        padded = padding.pad(obs)
        observation = padding.flat(padded)
        extras: dict[str, Array] = {}
        if self._explore:
            with self.randomness.lent(), torch.no_grad():
                actions, extras = self._agent.explore(observation)
            extras["observation"] = observation
        else:
            actions, _ = self._agent.model.policy.predict(observation, deterministic=True)
        return Decision(padding.unpad_action(actions, padded), extras)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return self.randomness.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.randomness.load_state_dict(state)


class SB3PPO(SB3Agent[PPO]):
    """``stable_baselines3.PPO`` with ``MlpPolicy``. Takes Discrete groups or Box groups, not both in one spec."""

    class Config(BaseModel):
        """SB3's hyperparameters, names and defaults."""

        model_config = ConfigDict(extra="forbid")

        learning_rate: float = Field(3e-4, gt=0)
        n_steps: int = Field(2048, ge=1, description="steps per row between two updates")
        batch_size: int = Field(64, ge=2)
        n_epochs: int = Field(10, ge=1)
        gamma: float = Field(0.99, ge=0, le=1)
        gae_lambda: float = Field(0.95, ge=0, le=1)
        clip_range: float = Field(0.2, gt=0)
        clip_range_vf: float | None = Field(None, gt=0)
        normalize_advantage: bool = True
        ent_coef: float = Field(0.0, ge=0)
        vf_coef: float = Field(0.5, ge=0)
        max_grad_norm: float = Field(0.5, gt=0)
        target_kl: float | None = Field(None, gt=0)
        net_arch: tuple[int, ...] = Field((64, 64), description="hidden layers of the policy and of the value network")
        activation: Literal["tanh", "relu"] = "tanh"

    def __init__(self, spec: Spec, config: Config, *, seed: int, device: str = "cpu") -> None:
        options = config.model_dump(exclude={"net_arch", "activation"})
        model = PPO(
            "MlpPolicy",
            None,  # pyright: ignore[reportArgumentType]  (None is allowed without set-up)
            **options,
            policy_kwargs=_policy(config.net_arch, config.activation),
            device=device,
            _init_setup_model=False,
        )
        super().__init__(spec, model, seed)

    def explore(self, observation: Array) -> tuple[Array, dict[str, Array]]:
        """Sample from the policy; the sample is stored, what is played is clipped to the bounds."""
        actions, values, log_probs = (x.cpu().numpy() for x in self.model.policy(self._tensor(observation)))
        space = self.padding.action_space
        played = np.clip(actions, space.low, space.high) if isinstance(space, Box) else actions
        return played, {"action": actions, "value": values, "log_prob": log_probs}

    def observe(self, step: Step) -> None:
        """Store the transition; when the rollout is complete, compute returns and advantages."""
        self._check(step)
        model, buffer, extras = self.model, self.model.rollout_buffer, step.decision.extras
        following = self.padding.flat(self.padding.pad(step.next))
        reward = step.reward.astype(np.float32)
        with torch.no_grad():
            for row in np.flatnonzero(step.truncated):  # SB3's bootstrap at a time limit
                value = model.policy.predict_values(self._tensor(following[row : row + 1]))
                reward[row] += (model.gamma * value).item()
            buffer.add(
                extras["observation"],
                extras["action"],
                reward,
                step.obs.first,
                torch.from_numpy(extras["value"]),
                torch.from_numpy(extras["log_prob"]),
            )
            model.num_timesteps += self.rows
            if buffer.full:
                values = model.policy.predict_values(self._tensor(following))
                buffer.compute_returns_and_advantage(values, step.terminated | step.truncated)

    def update(self) -> Mapping[str, float]:
        """SB3's ``train()`` when ``n_steps`` steps of each row are there."""
        if not self.model.rollout_buffer.full:
            return {}
        with self.randomness.lent():
            self.model.train()
        self.model.policy.set_training_mode(False)
        self.model.rollout_buffer.reset()
        return self._metrics()

    def _begin(self, rows: int) -> None:
        model = self.model
        self.rows = model.n_envs = rows
        model.rollout_buffer = RolloutBuffer(
            model.n_steps,
            self.padding.flat_space,
            self.padding.action_space,
            model.device,
            gae_lambda=model.gae_lambda,
            gamma=model.gamma,
            n_envs=rows,
        )

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {"policy": self.model.policy}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.model.policy.optimizer}

    def _buffer(self) -> RolloutBuffer:
        return self.model.rollout_buffer


class SB3SAC(SB3Agent[SAC]):
    """``stable_baselines3.SAC`` with ``MlpPolicy``. Takes Box groups only."""

    class Config(BaseModel):
        """SB3's hyperparameters, names and defaults."""

        model_config = ConfigDict(extra="forbid")

        learning_rate: float = Field(3e-4, gt=0)
        buffer_size: int = Field(1_000_000, ge=1, description="transitions, over all rows")
        learning_starts: int = Field(100, ge=0, description="transitions with uniform actions before learning starts")
        batch_size: int = Field(256, ge=1)
        tau: float = Field(0.005, ge=0, le=1)
        gamma: float = Field(0.99, ge=0, le=1)
        train_freq: int = Field(1, ge=1, description="vector steps between two calls of train()")
        gradient_steps: int = Field(1, ge=-1, description="per call of train(); -1: as many as new transitions")
        ent_coef: str | float = Field("auto", description="auto, auto_<initial value>, or a fixed temperature")
        target_update_interval: int = Field(1, ge=1)
        target_entropy: Literal["auto"] | float = Field("auto", description="auto: -dim of the padded action")
        net_arch: tuple[int, ...] = Field((256, 256), description="hidden layers of the actor and of the critics")
        activation: Literal["tanh", "relu"] = "relu"

    def __init__(self, spec: Spec, config: Config, *, seed: int, device: str = "cpu") -> None:
        discrete = [group.name for group in spec.groups if isinstance(group.action, Discrete)]
        if discrete:
            raise ValueError(
                f"sb3-sac takes Box actions only; groups {discrete} have Discrete ones: use sb3-ppo or ppo"
            )
        options = config.model_dump(exclude={"net_arch", "activation", "buffer_size", "target_entropy"})
        dimensions = max(len(group.action.low) for group in spec.groups if isinstance(group.action, Box))
        model = SAC(
            "MlpPolicy",
            None,  # pyright: ignore[reportArgumentType]  (None is allowed without set-up)
            **options,
            buffer_size=1,  # the real one is made when the rows are known
            target_entropy=-float(dimensions) if config.target_entropy == "auto" else config.target_entropy,
            policy_kwargs=_policy(config.net_arch, config.activation),
            device=device,
            _init_setup_model=False,
        )
        self.config = config
        self._collected = 0  # vector steps since the last call of train()
        super().__init__(spec, model, seed)

    def explore(self, observation: Array) -> tuple[Array, dict[str, Array]]:
        """Uniform actions until ``learning_starts`` transitions, then samples from the policy; stores them scaled."""
        model, space = self.model, self.padding.action_space
        if model.num_timesteps < model.learning_starts:
            played = np.random.uniform(-1, 1, (len(observation), *(space.shape or ()))).astype(np.float32)  # noqa: NPY002
        else:
            played, _ = model.policy.predict(observation, deterministic=False)
        scaled = model.policy.scale_action(played)
        return model.policy.unscale_action(scaled), {"action": scaled}

    def observe(self, step: Step) -> None:
        """Store the transition."""
        self._check(step)
        done = step.terminated | step.truncated
        self._buffer().add(
            step.decision.extras["observation"],
            self.padding.flat(self.padding.pad(step.next)),
            step.decision.extras["action"],
            step.reward,
            done,
            [{"TimeLimit.truncated": bool(truncated)} for truncated in step.truncated],
        )
        self.model.num_timesteps += self.rows
        self._collected += 1

    def update(self) -> Mapping[str, float]:
        """SB3's ``train()`` after every ``train_freq`` vector steps, once ``learning_starts`` transitions are there."""
        if self._collected < self.config.train_freq:
            return {}
        wanted = self.model.gradient_steps
        steps = wanted if wanted >= 0 else self._collected * self.rows
        self._collected = 0
        if not steps or self.model.num_timesteps <= self.model.learning_starts:
            return {}
        with self.randomness.lent():
            self.model.train(steps, self.model.batch_size)
        self.model.policy.set_training_mode(False)
        return self._metrics()

    def state_dict(self) -> dict[str, Any]:
        """As ``SB3Agent.state_dict``, with the temperature and the clock."""
        temperature = None if self.model.log_ent_coef is None else self.model.log_ent_coef.detach()
        return {**super().state_dict(), "log_ent_coef": temperature, "collected": self._collected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ``SB3Agent.load_state_dict``."""
        super().load_state_dict(state)
        self._collected = state["collected"]
        if self.model.log_ent_coef is not None:
            self.model.log_ent_coef.data.copy_(state["log_ent_coef"])

    def _begin(self, rows: int) -> None:
        self.rows = self.model.n_envs = rows
        self.model.replay_buffer = ReplayBuffer(
            self.config.buffer_size,
            self.padding.flat_space,
            self.padding.action_space,
            self.model.device,
            n_envs=rows,
        )

    def _modules(self) -> dict[str, torch.nn.Module]:
        model = self.model
        return {"policy": model.actor, "critic": model.critic, "critic_target": model.critic_target}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found = {"policy": self.model.actor.optimizer, "critic": self.model.critic.optimizer}
        temperature = self.model.ent_coef_optimizer
        return found if temperature is None else {**found, "temperature": temperature}

    def _buffer(self) -> ReplayBuffer:
        assert self.model.replay_buffer is not None
        return self.model.replay_buffer


def actor_seed(seed: int) -> int:
    """The seed of an actor's own random states; other than the learner's, which starts from ``seed`` as SB3 does."""
    return int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])


def _policy(net_arch: tuple[int, ...], activation: str) -> dict[str, Any]:
    return {"net_arch": list(net_arch), "activation_fn": _ACTIVATIONS[activation]}


def _arrays(buffer: RolloutBuffer | ReplayBuffer) -> dict[str, Array]:
    return {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
