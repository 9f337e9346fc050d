"""Tiny tasks whose optimal values are known in closed form: the suite ``"mtrl.testing:Probes/GROUP"``.

An agent that is right reaches them in seconds, and each one that fails points at one thing that is wrong (the value
loss, discounting, the use of observations, credit for actions, bootstrapping at a time limit, masks, memory, teams,
images). The first five follow the probe environments of "Debugging RL, Without the Agonizing Pain" by Andy L. Jones
(https://andyljones.com/posts/rl-debugging.html).

``VALUES[name](gamma)`` is the optimal value of the first observation, averaged over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from mtrl.registry import UnknownNameError
from mtrl.types import Array, Task

Info = dict[str, Any]
Kind = Literal["constant", "observation", "delay", "action", "both", "endless"]

TARGET = 0.3  # the best action of the continuous "action" probe; of "both" it is TARGET * cue
ENDLESS_HORIZON = 10  # where the vector truncates "endless"
MEMORY_DELAY = 4  # steps between the cue of "memory" and the question
IMAGE_SHAPE = (8, 8, 3)  # height, width, channels; uint8
MASKED_ACTIONS = 4

_VECTOR = Box(-1.0, 1.0, (2,), np.float32)
_TWO = Discrete(2)
_LINE = Box(-1.0, 1.0, (1,), np.float32)
_IMAGE = Box(0, 255, IMAGE_SHAPE, np.uint8)
_FOUR = Discrete(MASKED_ACTIONS)


class Basic(gym.Env[Array, Any]):
    """The probes that need no mask, memory or image. Observations are ``[cue, clock]``, float32.

    Args:
        kind: which probe:

            * ``constant``: one step, reward 1.
            * ``observation``: one step, reward = the cue, -1 or 1 with equal odds.
            * ``delay``: two steps, reward 1 at the second; the clock shows which step it is.
            * ``action``: one step; Discrete(2): reward 1 for action 1, -1 for action 0; Box: ``-(a - 0.3)^2``.
            * ``both``: one step; Discrete(2): reward 1 if action 1 meets cue 1 or action 0 meets cue -1, else -1;
              Box: ``-(a - 0.3 cue)^2``.
            * ``endless``: reward 1 at every step, never terminates.
        continuous: actions are Box(-1, 1, [1]) instead of Discrete(2).
    """

    def __init__(self, kind: Kind, continuous: bool = False) -> None:
        self.observation_space = _VECTOR
        self.action_space = _LINE if continuous else _TWO
        self._kind: Kind = kind
        self._continuous = continuous
        self._cue = 1.0
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, Info]:
        super().reset(seed=seed)
        random_cue = self._kind in ("observation", "both")
        self._cue = float(self.np_random.choice((-1.0, 1.0))) if random_cue else 1.0
        self._time = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, Info]:
        self._time += 1
        if self._kind in ("constant", "endless"):
            return self._observe(), 1.0, self._kind == "constant", False, {}
        if self._kind == "observation":
            return self._observe(), self._cue, True, False, {}
        if self._kind == "delay":
            done = self._time == 2
            return self._observe(), float(done), done, False, {}
        if self._continuous:
            error = float(np.asarray(action).item()) - TARGET * self._cue
            return self._observe(), -(error**2), True, False, {"success": abs(error) < 0.1}
        hit = int(action) == (self._cue > 0)
        return self._observe(), 1.0 if hit else -1.0, True, False, {"success": hit}

    def _observe(self) -> Array:
        return np.array([self._cue, float(self._kind == "delay" and self._time > 0)], np.float32)


class Masked(gym.Env[Array, Any]):
    """Four steps; at each a random non-empty set of actions is legal (``info["action_mask"]``), reward 1 for the
    legal action of highest index, 0 for other legal ones. The observation does not show the mask.

    Raises:
        ValueError: an illegal action.
    """

    LENGTH = 4

    def __init__(self) -> None:
        self.observation_space = _VECTOR
        self.action_space = _FOUR
        self._mask = np.ones(MASKED_ACTIONS, np.int8)
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, Info]:
        super().reset(seed=seed)
        self._time = 0
        return self._observe(), {"action_mask": self._draw()}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, Info]:
        if not self._mask[int(action)]:
            raise ValueError(f"action {int(action)} is illegal, the mask is {self._mask.tolist()}")
        best = int(action) == int(np.flatnonzero(self._mask)[-1])
        self._time += 1
        info: Info = {"action_mask": self._draw(), "success": best}
        return self._observe(), float(best), self._time == self.LENGTH, False, info

    def _draw(self) -> Array:
        chosen = 1 + self.np_random.integers(2**MASKED_ACTIONS - 1)
        self._mask = np.array([chosen >> i & 1 for i in range(MASKED_ACTIONS)], np.int8)
        return self._mask

    def _observe(self) -> Array:
        return np.array([1.0, self._time / self.LENGTH], np.float32)


class Memory(gym.Env[Array, Any]):
    """A cue of -1 or 1 is shown at the first step only; ``MEMORY_DELAY`` steps later, when the clock shows 1, action 1
    answers cue 1 and action 0 cue -1: reward 1 if right, else 0. Without memory the best expected return is 0.5."""

    def __init__(self) -> None:
        self.observation_space = _VECTOR
        self.action_space = _TWO
        self._cue = 1.0
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, Info]:
        super().reset(seed=seed)
        self._cue = float(self.np_random.choice((-1.0, 1.0)))
        self._time = 0
        return np.array([self._cue, 0.0], np.float32), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, Info]:
        asked = self._time == MEMORY_DELAY
        hit = asked and int(action) == (self._cue > 0)
        self._time += 1
        observation = np.array([0.0, float(self._time == MEMORY_DELAY)], np.float32)
        return observation, float(hit), asked, False, {"success": hit}


class Image(gym.Env[Array, Any]):
    """One step: the left or the right half of an 8x8x3 uint8 picture is lit; reward 1 for action 0 on left or action 1
    on right, else 0."""

    def __init__(self) -> None:
        self.observation_space = _IMAGE
        self.action_space = _TWO
        self._right = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, Info]:
        super().reset(seed=seed)
        self._right = bool(self.np_random.integers(2))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, Info]:
        hit = bool(action) == self._right
        return self._observe(), float(hit), True, False, {"success": hit}

    def _observe(self) -> Array:
        picture = np.zeros(IMAGE_SHAPE, np.uint8)
        half = IMAGE_SHAPE[1] // 2
        picture[:, half if self._right else 0 :][:, :half] = 255
        return picture


def make_team(**render: Any) -> Any:
    """The team probe, a ``pettingzoo.ParallelEnv``. PettingZoo is an extra, so it is imported when first built."""
    from mtrl.testing.team import Team

    return Team()


# Random returns: what a uniform policy gets on average, in closed form. (a - t)^2 for a ~ U(-1, 1): 1/3 + t^2.
_SQUARE = -(1 / 3 + TARGET**2)
_RANDOM_MASKED = Masked.LENGTH * 103 / 180  # 103/180 is the mean of 1/size over the 15 masks


def _task(name: str, build: Callable[..., Any], spaces: Any, horizon: int, score: tuple[float, float]) -> Task:
    return Task(f"probe/{name}", build, horizon, score, "closed form: uniform policy, best policy", spaces=spaces)


def _basic(name: str, kind: Kind, continuous: bool, horizon: int, score: tuple[float, float]) -> Task:
    spaces = (_VECTOR, _LINE if continuous else _TWO)
    return _task(name, partial(Basic, kind, continuous), spaces, horizon, score)


def _tasks() -> dict[str, Task]:
    """All probes by short name. Where every policy earns the same, the score runs from 0 to that return."""
    made = [
        _basic("constant", "constant", False, 8, (0.0, 1.0)),
        _basic("observation", "observation", False, 8, (-1.0, 1.0)),
        _basic("delay", "delay", False, 8, (0.0, 1.0)),
        _basic("action", "action", False, 8, (0.0, 1.0)),
        _basic("both", "both", False, 8, (0.0, 1.0)),
        _basic("endless", "endless", False, ENDLESS_HORIZON, (0.0, ENDLESS_HORIZON)),
        _basic("constant-box", "constant", True, 8, (0.0, 1.0)),
        _basic("observation-box", "observation", True, 8, (-1.0, 1.0)),
        _basic("delay-box", "delay", True, 8, (0.0, 1.0)),
        _basic("action-box", "action", True, 8, (_SQUARE, 0.0)),
        _basic("both-box", "both", True, 8, (_SQUARE, 0.0)),
        _basic("endless-box", "endless", True, ENDLESS_HORIZON, (0.0, ENDLESS_HORIZON)),
        # The mask arrives in the info, which spaces cannot declare: the codec must see a reset.
        _task("masked", Masked, None, 8, (_RANDOM_MASKED, float(Masked.LENGTH))),
        _task("memory", Memory, (_VECTOR, _TWO), 8, (0.5, 1.0)),
        _task("image", Image, (_IMAGE, _TWO), 8, (0.5, 1.0)),
    ]
    # Uniform play earns the left agent 1/2 and the right one 3 * 1/2; a team's return is the mean over its rows.
    team = Task("probe/team", make_team, 8, (1.0, 2.0), "closed form: uniform policy, best policy", agents=2)
    return {task.name.partition("/")[2]: task for task in [*made, team]}


VALUES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda gamma: 1.0,
    "observation": lambda gamma: 0.0,
    "delay": lambda gamma: gamma,
    "action": lambda gamma: 1.0,
    "both": lambda gamma: 1.0,
    "endless": lambda gamma: 1.0 / (1.0 - gamma),
    "constant-box": lambda gamma: 1.0,
    "observation-box": lambda gamma: 0.0,
    "delay-box": lambda gamma: gamma,
    "action-box": lambda gamma: 0.0,
    "both-box": lambda gamma: 0.0,
    "endless-box": lambda gamma: 1.0 / (1.0 - gamma),
    "masked": lambda gamma: sum(gamma**t for t in range(Masked.LENGTH)),
    "memory": lambda gamma: gamma**MEMORY_DELAY,
    "image": lambda gamma: 1.0,
    "team": lambda gamma: (1 + (1 + gamma + gamma**2)) / 2,
}
"""Optimal value of the first observation by probe, as a function of the discount, averaged over seeds (and a team's
rows). "endless" holds if the bootstrap at the time limit is right; an agent that takes truncation for termination
learns ``(1 - gamma**ENDLESS_HORIZON) / (1 - gamma)`` at the first step."""

_DISCRETE = ("constant", "observation", "delay", "action", "both", "endless")
_GROUPS: dict[str, tuple[str, ...]] = {
    "discrete": _DISCRETE,
    "continuous": tuple(f"{name}-box" for name in _DISCRETE),
    "mix": ("action", "both", "action-box", "both-box", "image", "masked"),
    "everything": (*_DISCRETE, *(f"{name}-box" for name in _DISCRETE), "masked", "memory", "image", "team"),
}


class Probes:
    """The suite ``"mtrl.testing:Probes"``: groups ``discrete`` (one group of rows), ``continuous`` (one group),
    ``mix`` (four groups: discrete, continuous, image, masked), ``everything``, and each probe by its own name."""

    name = "probe"

    @property
    def groups(self) -> Sequence[str]:
        """What can be asked for."""
        return (*_GROUPS, *_tasks())

    def tasks(self, group: str) -> tuple[Task, ...]:
        """Tasks of a group or of a single probe, in canonical order.

        Raises:
            UnknownNameError: there is no such group or probe.
        """
        made = _tasks()
        names = _GROUPS.get(group, (group,) if group in made else ())
        if not names:
            raise UnknownNameError("probe", group, self.groups)
        return tuple(made[name] for name in names)
