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
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger

from mtrl.types import Array, Decision, Layout, Obs, Spec, Step
from mtrl.vector.views import Padding

Model = TypeVar("Model", PPO, SAC)
Auto = Annotated[str, StringConstraints(pattern=r"^auto(_[0-9.e-]+)?$")]
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
                torch.set_rng_state(self._torch)
                for device, state in zip(self._cuda, self._devices, strict=True):
                    torch.cuda.set_rng_state(state, device)
                np.random.set_state(self._numpy)  # noqa: NPY002
                yield
                self._torch = torch.get_rng_state()
                self._devices = [torch.cuda.get_rng_state(d) for d in self._cuda]
                self._numpy = np.random.get_state(legacy=False)  # noqa: NPY002
            finally:
                np.random.set_state(outside)  # noqa: NPY002

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
    modules: Mapping[str, torch.nn.Module]
    """Everything with parameters; ``policy`` is what acting needs."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    buffer: RolloutBuffer | ReplayBuffer | None = None  # made when the number of rows is known

    def __init__(self, spec: Spec, model: Model, seed: int) -> None:
        """``model`` was made with ``_init_setup_model=False``, as SB3 itself does when it loads one."""
        self.spec, self.model, self.seed = spec, model, seed
        self.padding = Padding(spec, illegal="first")  # SB3 knows no masks
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
        """Decide as SB3's ``collect_rollouts`` does: actions [N, ...] within bounds, extras for ``observe``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, it holds references: write it away before the agent goes on."""
        return {
            **{name: dict(module.state_dict()) for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "timesteps": self.model.num_timesteps,
            "updates": self.model._n_updates,
            "buffer": None if self.buffer is None else _buffer_state(self.buffer),
            "randomness": self.randomness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the saved agent would have; ValueError if its buffer had another size."""
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.model.num_timesteps, self.model._n_updates = state["timesteps"], state["updates"]
        self.randomness.load_state_dict(state["randomness"])
        if state["buffer"] is not None:
            self.buffer = self._make_buffer(state["buffer"]["rows"])
            _load_buffer(self.buffer, state["buffer"])

    def load_policy(self, state: Mapping[str, Any]) -> None:
        """Take ``state_dict()["policy"]``, all that acting needs."""
        self.modules["policy"].load_state_dict(state)

    def _make_buffer(self, rows: int) -> RolloutBuffer | ReplayBuffer:
        """SB3's own buffer for ``rows`` rows, also given to the model."""
        raise NotImplementedError

    def _begin(self, step: Step) -> Array:
        """Account for a step, making the buffer at the first one; returns the successors' flat observations."""
        rows = len(step.reward)
        if self.buffer is None:
            self.buffer = self._make_buffer(rows)
        if rows != self.buffer.n_envs or not step.active.all():
            raise ValueError(
                f"SB3's buffers hold the same {self.buffer.n_envs} rows at every step; this step has {rows}, "
                f"{int(step.active.sum())} of them active"
            )
        self.model.num_timesteps += rows
        return self.padding.flat(self.padding.pad(step.next))

    def _metrics(self) -> dict[str, float]:
        """What ``train()`` recorded; FloatingPointError if a loss is not finite."""
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
        options |= _network(config.net_arch, config.activation)
        model = PPO("MlpPolicy", None, **options, device=device, _init_setup_model=False)  # pyright: ignore
        super().__init__(spec, model, seed)
        self.modules, self.optimizers = {"policy": model.policy}, {"policy": model.policy.optimizer}

    def explore(self, observation: Array) -> tuple[Array, dict[str, Array]]:
        """Sample from the policy; the sample is stored, what is played is clipped to the bounds."""
        actions, values, log_probs = (x.cpu().numpy() for x in self.model.policy(self._tensor(observation)))
        space = self.padding.action_space
        played = np.clip(actions, space.low, space.high) if isinstance(space, Box) else actions
        return played, {"action": actions, "value": values, "log_prob": log_probs}

    def observe(self, step: Step) -> None:
        """Store the transition; when the rollout is complete, compute returns and advantages."""
        following = self._begin(step)
        model, buffer, extras = self.model, self.model.rollout_buffer, step.decision.extras
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

    def _make_buffer(self, rows: int) -> RolloutBuffer:
        model, spaces = self.model, (self.padding.flat_space, self.padding.action_space)
        options = {"gae_lambda": model.gae_lambda, "gamma": model.gamma, "n_envs": rows}
        model.rollout_buffer = RolloutBuffer(model.n_steps, *spaces, model.device, **options)
        return model.rollout_buffer


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
        ent_coef: Auto | float = Field("auto", description="auto, auto_<initial value>, or a fixed temperature")
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
        options = config.model_dump(exclude={"net_arch", "activation"})
        if config.target_entropy == "auto":  # SB3 would look at an environment
            options["target_entropy"] = -max(len(g.action.low) for g in spec.groups if isinstance(g.action, Box))
        options |= {"buffer_size": 1} | _network(config.net_arch, config.activation)  # the real one comes with the rows
        model = SAC("MlpPolicy", None, **options, device=device, _init_setup_model=False)  # pyright: ignore
        super().__init__(spec, model, seed)
        self.config = config
        self._collected = 0  # vector steps since the last call of train()
        self.modules = {"policy": model.actor, "critic": model.critic, "critic_target": model.critic_target}
        self.optimizers = {"policy": model.actor.optimizer, "critic": model.critic.optimizer}
        if model.ent_coef_optimizer is not None:
            self.optimizers["temperature"] = model.ent_coef_optimizer

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
        following = self._begin(step)
        assert self.model.replay_buffer is not None  # made by _begin
        self.model.replay_buffer.add(
            step.decision.extras["observation"],
            following,
            step.decision.extras["action"],
            step.reward,
            step.terminated | step.truncated,
            [{"TimeLimit.truncated": bool(truncated)} for truncated in step.truncated],
        )
        self._collected += 1

    def update(self) -> Mapping[str, float]:
        """SB3's ``train()`` after every ``train_freq`` vector steps, once ``learning_starts`` transitions are there."""
        if self._collected < self.config.train_freq:
            return {}
        wanted = self.model.gradient_steps
        steps = wanted if wanted >= 0 else self._collected * self.model.n_envs
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

    def _make_buffer(self, rows: int) -> ReplayBuffer:
        model, spaces = self.model, (self.padding.flat_space, self.padding.action_space)
        model.n_envs = rows
        model.replay_buffer = ReplayBuffer(self.config.buffer_size, *spaces, model.device, n_envs=rows)
        return model.replay_buffer


def actor_seed(seed: int) -> int:
    """The seed of an actor's own random states; other than the learner's, which starts from ``seed`` as SB3 does."""
    return int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])


def _network(net_arch: tuple[int, ...], activation: str) -> dict[str, Any]:
    return {"policy_kwargs": {"net_arch": list(net_arch), "activation_fn": _ACTIVATIONS[activation]}}


def _buffer_state(buffer: RolloutBuffer | ReplayBuffer) -> dict[str, Any]:
    """The filled part, by reference."""
    arrays = {name: array[: buffer.size()] for name, array in vars(buffer).items() if isinstance(array, np.ndarray)}
    return {"rows": buffer.n_envs, "size": buffer.buffer_size, "at": buffer.pos, "full": buffer.full, "arrays": arrays}


def _load_buffer(buffer: RolloutBuffer | ReplayBuffer, state: Mapping[str, Any]) -> None:
    if state["size"] != buffer.buffer_size:
        raise ValueError(f"the saved buffer has room for {state['size']} steps, this one for {buffer.buffer_size}")
    buffer.pos, buffer.full = state["at"], state["full"]
    for name, array in state["arrays"].items():
        getattr(buffer, name)[: len(array)] = array
