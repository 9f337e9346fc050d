"""The uniformly random agent: the floor of every comparison and the smallest example of the agent contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from pydantic import BaseModel, ConfigDict

from mtrl.types import Actor, Array, Decision, Layout, Obs, Spec, Step


class Random:
    """Draws every action uniformly: among the legal ones (Discrete), within the bounds (Box). Never learns."""

    recurrent = False

    class Config(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, spec: Spec, config: Config, *, seed: int, device: str = "cpu") -> None:
        self.spec, self.config, self.seed = spec, config, seed

    def actor(self, layout: Layout, *, explore: bool) -> Actor:
        return RandomActor(self.spec, layout, np.random.default_rng([self.seed, int(explore)]))

    def observe(self, step: Step) -> None:
        """Takes no notice."""

    def update(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"policy": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has no state."""

    def load_policy(self, state: Mapping[str, Any]) -> None:
        """Has no parameters."""


class RandomActor:
    """Decides for the rows of one vector, with a generator of its own."""

    def __init__(self, spec: Spec, layout: Layout, rng: np.random.Generator) -> None:
        self.spec, self.layout, self.rng = spec, layout, rng

    def __call__(self, obs: Obs) -> Decision:
        action: dict[str, Array] = {}
        for group in self.spec.groups:
            rows = self.layout.rows.get(group.name, slice(0, 0))
            n = rows.stop - rows.start
            if not n:
                continue
            if isinstance(group.action, Discrete):
                weight = self.rng.random((n, int(group.action.n)))
                legal = obs.leaves[group.name].get("legal")
                # The largest of equal uniforms is uniform; illegal ones are put below all of them.
                action[group.name] = (weight if legal is None else np.where(legal, weight, weight - 1.0)).argmax(1)
            else:
                low, high = group.action.low, group.action.high
                action[group.name] = self.rng.uniform(low, high, (n, *low.shape)).astype(np.float32).clip(low, high)
        return Decision(action, {})

    def state_dict(self) -> dict[str, Any]:
        # The state of PCG64 holds 128-bit integers; as text they survive any checkpoint format.
        state = self.rng.bit_generator.state
        return {**state, "state": {key: str(value) for key, value in state["state"].items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        inner = {key: int(value) for key, value in state["state"].items()}
        self.rng.bit_generator.state = {**state, "state": inner}
