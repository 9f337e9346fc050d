"""The checkers must pass what is right and name what is wrong."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from mtrl import registry
from mtrl.spaces import make_spec
from mtrl.testing import VALUES, Probes, check_agent, check_suite, drive
from mtrl.testing.compare import difference, outside
from mtrl.testing.probes import ENDLESS_HORIZON, TARGET, Basic, Masked, Memory
from mtrl.testing.team import Team
from mtrl.types import Decision, Task
from mtrl_agents.random import Random, RandomActor

EVERY_PROBE = tuple(task.name.partition("/")[2] for task in Probes().tasks("everything"))


SET_UP: list[str] = []  # what this process does before an environment is made


class OneSuite:
    """A suite of the given tasks."""

    def __init__(self, *tasks: Task, name: str = "bad", groups: Sequence[str] = ("all",)) -> None:
        self.name, self.groups, self._tasks = name, groups, tasks

    def tasks(self, group: str) -> Sequence[Task]:
        found = [task for task in self._tasks if group in ("all", task.name.partition("/")[2])]
        if not found:
            raise registry.UnknownNameError("group", group, self.groups)
        return found


class Walk(gym.Env[np.ndarray, Any]):
    """A right environment that can be broken in one place: the position drifts at random for ten steps."""

    def __init__(self, fault: str = "", **render: Any) -> None:
        if fault == "build":
            raise RuntimeError("no wheels")
        if fault != "no space":
            self.observation_space = Box(-20.0, 20.0, (2,), np.float32)
        self.action_space: gym.Space[Any] = Discrete(2)
        self.fault = fault
        self.episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.fault == "reset":
            raise RuntimeError("stuck")
        super().reset(seed=None if self.fault == "seed ignored" else seed)
        self.time = 0
        self.episodes += 1
        self.position = float(self.np_random.normal())
        if self.fault == "history":
            self.position = float(self.episodes)
        if self.fault == "fixed start":
            self.position = 0.0
        if self.fault == "hash":  # of a text: another in every process
            self.position += hash("walk") % 2**20 / 2**20
        if self.fault == "set up" and not SET_UP:
            raise RuntimeError("nobody has set it up")
        return self.observe() if self.fault == "no info" else (self.observe(), {})

    def step(self, action: int) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.time += 1
        self.position += float(self.np_random.normal()) / 10
        info: dict[str, Any] = {"success": self.position > 1}
        reward: Any = 0.5
        terminated: Any = self.position > 2
        truncated: Any = self.time == 10
        match self.fault:
            case "noise":
                reward = float(np.random.default_rng().normal())
            case "numpy.random":
                reward = float(np.random.rand())  # noqa: NPY002 - the fault
            case "random":
                reward = random.random()
            case "nan reward":
                reward = float("nan")
            case "vector reward":
                reward = np.zeros(2)
            case "string reward":
                reward = "1.0"
            case "no reward":
                reward = None
            case "float32 reward":
                reward = np.float32(1)
            case "array reward":
                reward = np.array(1.0)
            case "limit":
                terminated, truncated = self.time == 10, False
            case "flag":
                terminated = int(terminated)
            case "success at times":
                info = info if self.time % 2 else {}
            case "success value":
                info["success"] = 0.7
            case "both":
                terminated = truncated
            case "raises":
                raise RuntimeError("wheel came off")
            case "early":
                terminated, truncated = False, self.time == 5
            case "four results":
                return self.observe(), reward, terminated, truncated  # type: ignore[return-value]
        return self.observe(), reward, terminated, truncated, info

    def observe(self) -> Any:
        observation = np.array([self.position, self.time], np.float32)
        match self.fault:
            case "outside":
                observation[1] += 100
            case "float64":
                return observation.astype(np.float64)
            case "shape":
                return observation[:1]
            case "list":
                return observation.tolist()
        return observation

    def close(self) -> None:
        if self.fault == "close":
            raise OSError("already closed")


def walk(fault: str = "", **changes: Any) -> OneSuite:
    fields: dict[str, Any] = {"build": partial(Walk, fault), "horizon": 10, "score_source": "made up", **changes}
    return OneSuite(Task("bad/walk", **fields))


def test_right_suites_pass() -> None:
    for fault in ("", "float32 reward", "array reward"):
        assert check_suite(walk(fault), "all").findings == ()
    report = check_suite(Probes(), "everything", full=True)
    assert report.ok, report
    assert {note.what for note in report.notes} == {"every seed starts with the same observation"}


@pytest.mark.parametrize(
    ("fault", "what", "fix"),
    [
        ("seed ignored", "does not determine the episode: two instances differ at reset(), observation", "generator"),
        ("history", "does not determine the episode", "clear all that an earlier episode left"),
        ("noise", "two instances differ at step 1, reward", "generator"),
        ("numpy.random", "step 1 changes the global random state of numpy.random", "np_random"),
        ("random", "step 1 changes the global random state of random", "np_random"),
        ("nan reward", "step 1 gives the reward nan", "finite"),
        ("vector reward", "step 1 gives the reward array", "one finite number"),
        ("string reward", "step 1 gives the reward '1.0'", "one finite number per step and agent, as in float(reward)"),
        ("no reward", "step 1 gives the reward None", "one finite number"),
        (
            "no space",
            "the environment Walk has no observation_space",
            "set self.observation_space to a gymnasium space",
        ),
        ("no info", "reset() does not return (observation, info)", "reset must return (observation, info)"),
        ("build", "build() raised RuntimeError: no wheels", "let build() make the environment without arguments"),
        ("reset", "reset() raised RuntimeError: stuck", "make reset(seed=...) work for every seed"),
        (
            "limit",
            "terminates at exactly the horizon, 10 steps: a time limit reported as termination",
            "truncated=True",
        ),
        ("flag", "gives terminated=0, not a boolean", "bool(terminated)"),
        ("success at times", "in the info of some steps and not of others", "every step"),
        ("success value", "success=0.7", "boolean"),
        ("raises", "step 1 raised RuntimeError: wheel came off", "work"),
        ("four results", "step() does not return", "gymnasium.Env.step"),
        (
            "outside",
            "reset() gives an observation outside its space: observation[1] = 100.0 is not in [-20.0, 20.0]",
            "contain",
        ),
        ("float64", "observation is float64, the space float32", "contain"),
        ("shape", "observation has shape (1,), the space (2,)", "contain"),
        ("list", "observation is a list, not a numpy array", "contain"),
        ("close", "close() raised OSError", "without raising, whether an episode has ended or not"),
    ],
)
def test_faults_are_named(fault: str, what: str, fix: str) -> None:
    report = check_suite(walk(fault), "all")
    assert not report.ok
    assert [e for e in report.errors if what in e.what and fix in e.fix and e.task == "bad/walk"], report


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("fixed start", "every seed starts with the same observation"),
        ("both", "both terminated and truncated"),
        ("early", "truncates after 5 steps, before Task.horizon = 10"),
    ],
)
def test_doubts_are_notes(fault: str, what: str) -> None:
    report = check_suite(walk(fault), "all")
    assert report.ok or fault == "both"  # under "both" the end is also a limit reported as termination
    assert [note for note in report.notes if what in note.what], report


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"score": (1.0, 1.0)}, "score (1.0, 1.0) is not a scale"),
        ({"score": (0.0, float("inf"))}, "is not a scale"),
        ({"horizon": 0}, "horizon is 0"),
        ({"agents": 2}, "agents=2, but build() makes a single-agent environment"),
        ({"spaces": (Box(-1.0, 1.0, (2,), np.float32), Discrete(2))}, "Task.spaces"),
        ({"build": lambda **render: Walk()}, "cannot be sent to a worker process"),
        ({"protocol": {"size": np.int64(3)}}, "protocol cannot be written to a result"),
    ],
)
def test_declarations_are_checked(changes: dict[str, Any], what: str) -> None:
    report = check_suite(walk(**changes), "all")
    assert [error for error in report.errors if what in error.what], report


class Seedless(Walk):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class Acting(Walk):
    """Has the action space that it is given."""

    def __init__(self, action: gym.Space[Any]) -> None:
        super().__init__()
        self.action_space = action


class Advised(Walk):
    """Says in its info which actions are legal; ``late``: from the first step on."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.late = late

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed)[0], {} if self.late else {"action_mask": np.ones(2, np.int8)}

    def step(self, action: int) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        *found, info = super().step(action)
        return *found, info | {"action_mask": np.ones(2, np.int8)}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("late", "declared", "what"),
    [
        (False, False, None),
        (False, True, "is not looked at where Task.spaces is declared"),
        (True, False, 'step 1 gives info["action_mask"] and reset() does not'),
    ],
)
def test_masks_that_nobody_looks_at_are_found(late: bool, declared: bool, what: str | None) -> None:
    spaces = (Box(-20.0, 20.0, (2,), np.float32), Discrete(2)) if declared else None
    report = check_suite(walk(build=partial(Advised, late=late), spaces=spaces), "all")
    found = [error.what for error in report.errors if "action_mask" in error.what]
    assert len(found) == (what is not None), report
    assert all(what in text for text in found if what)


@pytest.mark.parametrize(
    ("build", "fix"),
    [
        (Seedless, "let it take a seed: def reset(self, *, seed=None, options=None)"),
        (
            partial(Acting, Discrete(2, start=1)),
            "subtract the start in the suite: declare Discrete(2), and add 1 again in step()",
        ),
        (
            partial(Acting, Box(-1, 1, (2, 3))),
            "flatten it in the suite: declare shape (6,), reshape actions to (2, 3) in step()",
        ),
    ],
)
def test_fixes_fit(build: Any, fix: str) -> None:
    report = check_suite(walk(build=build), "all")
    assert [error.fix for error in report.errors] == [fix], report


def test_episodes_of_another_process_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process cannot see of itself."""
    monkeypatch.setattr(sys.modules[__name__], "SET_UP", ["here"])
    faults = ("", "hash", "flag", "set up")
    tasks = [
        Task(f"bad/{fault or 'right'}".replace(" ", "-"), partial(Walk, fault), 10, score_source="-")
        for fault in faults
    ]
    report = check_suite(OneSuite(*tasks), "all")
    found = {error.task: error for error in report.errors}
    assert len(report.errors) == 3
    assert set(found) == {"bad/hash", "bad/flag", "bad/set-up"}
    start = "another process plays another episode, with the same seed and actions: "
    assert found["bad/hash"].what.startswith(f"{start}reset(), observation['vector'][0]: "), report
    assert "use zlib.crc32" in found["bad/hash"].fix
    assert found["bad/flag"].what.startswith("step 1 gives"), report
    assert found["bad/set-up"].what.startswith(f"{start}task 'bad/set-up'"), report
    assert "reset raised RuntimeError('nobody has set it up')" in found["bad/set-up"].what


class Film(gym.Env[np.ndarray, Any]):
    """The last three of a row of random numbers, oldest first; it can be broken in one place."""

    def __init__(self, fault: str = "", **render: Any) -> None:
        self.observation_space = Box(-np.inf, np.inf, (6,), np.float32)
        self.action_space = Discrete(2)
        self.fault = fault

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.frames = [self.frame()] * 3
        if self.fault == "blank":
            self.frames[0] = np.zeros(2)
        return self.observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.frames = [*self.frames[1:], self.frame()]
        return self.observe(), 0.0, False, False, {}

    def frame(self) -> Any:
        return self.np_random.normal(size=2)

    def observe(self) -> Any:
        frames = self.frames[::-1] if self.fault == "newest first" else self.frames
        frames = np.stack(frames, 1) if self.fault == "interleaved" else frames
        return np.asarray(frames, np.float32).reshape(-1)


def film(fault: str = "", **frames: int) -> OneSuite:
    task = Task("bad/film", partial(Film, fault), 10, score_source="made up", frames=frames or {"vector": 3})
    return OneSuite(task)


def test_stacks_of_frames_are_checked() -> None:
    assert check_suite(film(), "all").findings == ()
    for fault in ("newest first", "interleaved"):
        (error,) = check_suite(film(fault), "all").errors
        assert "the leaf 'vector' after step 1 is not the one before without its oldest frame" in error.what
        assert "oldest first" in error.fix
    report = check_suite(film("blank"), "all")
    assert report.ok
    assert [note.what for note in report.notes] == [
        "the leaf 'vector' (a stack of 3 frames) starts with frames that differ"
    ]
    assert "stack of 2 frames" in check_suite(film(vector=2), "all").errors[0].what
    assert "its shape is (6,)" in check_suite(film(vector=4), "all").errors[0].what
    (error,) = check_suite(film(vectors=3), "all").errors
    assert "unknown leaf in Task.frames of 'bad/film' 'vectors'; did you mean 'vector'?" in error.what


def test_listing_is_checked() -> None:
    task = Task("bad/walk", Walk, 10, score_source="made up")
    twice = check_suite(OneSuite(task, task), "all")
    assert [e for e in twice.errors if "appears twice" in e.what]
    stranger = check_suite(OneSuite(Task("walk", Walk, 10)), "all")
    assert [e for e in stranger.errors if "does not start with 'bad/'" in e.what]

    class Accepts(OneSuite):
        def tasks(self, group: str) -> Sequence[Task]:
            return [task]

    class Raises(OneSuite):
        def tasks(self, group: str) -> Sequence[Task]:
            return {"all": [task]}[group]

    assert [e for e in check_suite(Accepts(), "all").errors if "accepts a group that does not exist" in e.what]
    with pytest.raises(registry.UnknownNameError) as caught:
        check_suite(Raises(), "nothing")
    place = f"{__file__}:{Raises.tasks.__code__.co_firstlineno + 1}"
    assert str(caught.value) == f"suite 'bad', group 'nothing': tasks() raised KeyError: 'nothing' ({place})"

    class Empty(OneSuite):
        def tasks(self, group: str) -> Sequence[Task]:
            return []

    with pytest.raises(registry.PluginError, match=r"^suite 'bad', group 'all': tasks\(\) returned no tasks$"):
        check_suite(Empty(), "all")
    assert [e for e in check_suite(Raises(), "all").errors if "does not give this single task" in e.what]
    with pytest.raises(ValueError, match="at least two"):
        check_suite(walk(), "all", seeds=(3, 3))
    with pytest.raises(registry.UnknownNameError):
        check_suite(walk(), "alle")


class BadTeam(Team):
    """The team probe, broken in one place."""

    def __init__(self, fault: str, **render: Any) -> None:
        super().__init__()
        self.fault = fault

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self.fault == "reset":
            raise RuntimeError("stuck")
        observations, infos = super().reset(seed)
        if self.fault == "no info":
            return observations
        if self.fault == "late":
            self.agents = ["right"]
        return observations, infos

    def step(self, actions: dict[str, int]) -> Any:
        acted = list(self.agents)
        observations, rewards, terminated, truncated, infos = super().step(actions)
        match self.fault:
            case "missing":
                del rewards[acted[0]]
            case "ghost":
                self.agents = list(acted)
            case "undead":
                infos["right"]["alive"] = False
            case "alone":
                terminated, truncated = dict.fromkeys(acted, False), {a: a == "left" for a in acted}
        return observations, rewards, terminated, truncated, infos

    def action_space(self, agent: str) -> Any:
        if self.fault == "no space":
            raise AttributeError("no action_spaces")
        return super().action_space(agent)

    def state(self) -> np.ndarray:
        return super().state() * (5 if self.fault == "state" else 1)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("late", "reset() starts with ['left', 'right']"),
        ("missing", "gives a reward for ['right'], but ['left', 'right'] acted"),
        ("ghost", "env.agents is ['left', 'right'], but ['right'] are neither"),
        ("undead", 'an agent has info["alive"] False but stays in env.agents'),
        ("alone", "truncates ['left'] while ['right'] go on"),
        ("state", "state()[0] = "),
        ("no space", "the spaces raised AttributeError: no action_spaces"),
        ("reset", "reset() raised RuntimeError: stuck"),
        ("no info", "reset() does not return (observation, info)"),
    ],
)
def test_team_faults_are_named(fault: str, what: str) -> None:
    suite = OneSuite(Task("bad/team", partial(BadTeam, fault), 8, score_source="made up", agents=2))
    report = check_suite(suite, "all")
    assert [error for error in report.errors if what in error.what], report


def test_the_dead_may_stay_where_the_reward_is_shared() -> None:
    task = Task("bad/team", partial(BadTeam, "undead"), 8, score_source="made up", agents=2, shared_reward=True)
    report = check_suite(OneSuite(task), "all")
    assert report.ok, report


def make_stock_reach(**render: Any) -> gym.Env[Any, Any]:
    import metaworld  # noqa: F401 - registers Meta-World/MT1

    return gym.make("Meta-World/MT1", env_name="reach-v3", disable_env_checker=True, **render)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stock_metaworld_fails() -> None:
    """The package's own environment ignores reset(seed=...), hides goals from its space, uses global randomness."""
    suite = OneSuite(Task("bad/reach", make_stock_reach, 500))
    report = check_suite(suite, "all", steps=3)
    whats = "\n".join(error.what for error in report.errors)
    assert "reset(seed=1) does not determine the episode" in whats
    assert "outside its space" in whats
    assert "global random state of numpy.random" in whats


@pytest.mark.parametrize("name", ["metaworld/mt3", "minigrid/mt3"])
def test_built_in_suites_pass(name: str) -> None:
    suite, _, group = name.partition("/")
    report = check_suite(registry.suite(suite), group, steps=30)
    assert report.ok, report


def test_report_reads_well() -> None:
    text = str(check_suite(walk("nan reward"), "all"))
    assert text.splitlines()[0] == "suite bad, group all: 1 checked"
    assert "ERROR   bad/walk\n        step 1 gives the reward nan\n        fix: return one finite number" in text
    assert text.endswith("FAILED: 1 errors, 0 notes")
    assert str(check_suite(walk(), "all")).endswith("OK: 0 errors, 0 notes")


def test_outside_names_the_place() -> None:
    space = gym.spaces.Dict({"a": Box(0, 1, (2,), np.float32), "b": Discrete(3)})
    good = {"a": np.zeros(2, np.float32), "b": 2}
    assert outside(space, good, "obs") is None
    assert outside(space, {**good, "b": 3}, "obs") == "obs['b'] = 3 is not in Discrete(3)"
    nan = np.array([0, np.nan], np.float32)
    assert outside(space, {**good, "a": nan}, "obs") == "obs['a'][1] = nan is not in [0.0, 1.0]"
    assert outside(space, {"a": nan}, "obs") == "obs has ['a'], the space has ['a', 'b']"


def test_difference_is_bitwise() -> None:
    zero, minus = np.array([1.0, 0.0]), np.array([1.0, -0.0])
    assert difference(zero, zero.copy()) is None
    assert difference(zero, minus) is not None
    assert difference({"x": np.array([1, 2])}, {"x": np.array([1, 3])}) == "['x'][1]: 2 and 3"
    assert difference(float("nan"), float("nan")) is None
    assert difference(1, True) is not None


# The probes' claims, by brute force.


def returns(task: Task, gamma: float, choose: Any, seeds: int = 64) -> list[float]:
    """Discounted returns of the policy ``choose(obs, info, step, seed)``, horizon respected."""
    env, found = task.build(), []
    for seed in range(seeds):
        obs, info = env.reset(seed=seed)
        total, step, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, info = env.step(choose(obs, info, step, seed))
            total += gamma**step * float(reward)
            step += 1
            over = terminated or truncated or step == task.horizon
        found.append(total)
    return found


@pytest.mark.parametrize("name", ["constant", "delay", "action", "masked", "memory"])
def test_values_are_the_best_returns(name: str) -> None:
    """Over all sequences of actions that are legal, the best discounted return is the value."""
    (task,) = Probes().tasks(name)
    _, action_space = make_spec([task]), Basic("constant").action_space
    if name == "masked":
        best = max(returns(task, 0.9, lambda o, info, t, s: int(np.flatnonzero(info["action_mask"])[-1])))
    else:
        assert isinstance(action_space, Discrete)
        plans = list(itertools.product(range(2), repeat=5))
        per_seed = np.array([returns(task, 0.9, lambda o, i, t, s, plan=plan: plan[t], seeds=8) for plan in plans])
        best = float(per_seed.max(axis=0).mean())
    assert best == pytest.approx(VALUES[name](0.9))


def test_continuous_optimum_and_random_score() -> None:
    (task,) = Probes().tasks("both-box")
    assert max(returns(task, 1.0, lambda obs, i, t, s: obs[:1] * TARGET)) == pytest.approx(0.0, abs=1e-12)
    grid = np.linspace(-1, 1, 2001, dtype=np.float32)
    mean = np.mean([returns(task, 1.0, lambda o, i, t, s, a=a: np.array([a]), seeds=1)[0] for a in grid])
    assert task.score[0] == pytest.approx(float(mean), abs=1e-3)


def test_observation_averages_to_its_value() -> None:
    (task,) = Probes().tasks("observation")
    found = returns(task, 0.9, lambda o, i, t, s: 0, seeds=400)
    assert set(found) == {-1.0, 1.0}
    assert np.mean(found) == pytest.approx(VALUES["observation"](0.9), abs=0.15)


def test_endless_tells_truncation_from_termination() -> None:
    (task,) = Probes().tasks("endless")
    seen = returns(task, 0.9, lambda o, i, t, s: 0, seeds=1)[0]
    assert seen == pytest.approx((1 - 0.9**ENDLESS_HORIZON) / 0.1)
    assert VALUES["endless"](0.9) == pytest.approx(seen + 0.9**ENDLESS_HORIZON * VALUES["endless"](0.9))


def test_masked_refuses_illegal_actions() -> None:
    env = Masked()
    for seed in range(20):
        _, info = env.reset(seed=seed)
        illegal = np.flatnonzero(info["action_mask"] == 0)
        if len(illegal):
            with pytest.raises(ValueError, match="illegal"):
                env.step(int(illegal[0]))
            return
    pytest.fail("no mask forbade anything")


def test_memory_shows_the_cue_only_once() -> None:
    """What is seen after the first step does not depend on the cue, so a policy without memory earns one half."""
    seen = {}
    for seed in range(8):
        env = Memory()
        first, _ = env.reset(seed=seed)
        later = [env.step(0)[0].tolist() for _ in range(5)]
        seen.setdefault(float(first[0]), []).append(later)
    assert set(seen) == {-1.0, 1.0}
    assert all(later == seen[1.0][0] for episodes in seen.values() for later in episodes)


def test_random_scores_of_masks_and_teams() -> None:
    (masked,) = Probes().tasks("masked")
    rng = np.random.default_rng(0)
    played = returns(masked, 1.0, lambda o, i, t, s: int(rng.choice(np.flatnonzero(i["action_mask"]))), seeds=2000)
    assert masked.score[0] == pytest.approx(np.mean(played), abs=0.1)
    (task,) = Probes().tasks("team")
    returned = [e.ret for *_, done in drive_random([task], 3000) for e in done]
    assert task.score[0] == pytest.approx(np.mean(returned), abs=0.1)


def drive_random(tasks: Sequence[Task], steps: int) -> Any:
    agent = Random(make_spec(tasks), Random.Config(), seed=0)
    return drive(agent, tasks, steps)


def test_drive_plays_every_probe() -> None:
    tasks = Probes().tasks("everything")
    played = {episode.task for *_, done in drive_random(tasks, 12) for episode in done}
    assert played == set(range(len(EVERY_PROBE)))
    assert set(VALUES) == set(EVERY_PROBE)


def test_unknown_probe_names_the_nearest() -> None:
    with pytest.raises(registry.UnknownNameError, match="did you mean 'discrete'"):
        registry.tasks("mtrl.testing:Probes/discreet")


# Agents.


def test_right_agent_passes() -> None:
    report = check_agent(Random, steps=10)
    assert report.ok, report
    assert {note.what for note in report.notes} == {"update() did not learn in the last 5 of 10 steps"}


class BadActor(RandomActor):
    fault = ""
    weight = torch.zeros(2)

    def __call__(self, obs: Any) -> Decision:
        decision = super().__call__(obs)
        action = dict(decision.action)
        extras: dict[str, np.ndarray] = {}
        match self.fault:
            case "dtype":
                action = {group: values.astype(np.float64) for group, values in action.items()}
            case "shape":
                action = {group: values[:1] for group, values in action.items()}
            case "extras":
                extras = {"value": np.zeros(1)}
            case "policy":
                extras = {"weight": np.full(len(obs.task), float(self.weight[0]))}
            case "bounds":
                action = {group: values + 10 for group, values in action.items()}
            case "illegal":
                action = {group: np.argmin(obs.leaves[group]["legal"], axis=1) for group in action}
            case "global numpy":
                np.random.rand()  # noqa: NPY002 - the fault
            case "global torch":
                torch.rand(1)
        return Decision(action, extras)


class BadAgent(Random):
    fault = ""

    def __init__(self, spec: Any, config: Any, *, seed: int, device: str = "cpu") -> None:
        if self.fault == "refuses all":
            raise ValueError("not today")
        super().__init__(spec, config, seed=seed, device=device)
        self.weight = torch.ones(2)
        self.hidden = 0.0
        if self.fault == "no flag":
            self.recurrent = None
        if self.fault == "unseeded":
            self.weight = torch.tensor(np.random.default_rng().normal(size=2))

    def actor(self, layout: Any, *, explore: bool) -> Any:
        actor = BadActor(self.spec, layout, np.random.default_rng([self.seed, int(explore)]))
        actor.fault, actor.weight = self.fault, self.weight
        if self.fault == "evaluation" and not explore:
            self.weight += 1
        return actor

    def update(self) -> Any:
        self.hidden += 1.0
        match self.fault:
            case "tensor metric":
                return {"loss": torch.zeros(())}
            case "nan metric":
                return {"loss": float("nan")}
            case "hidden state":
                return {"loss": self.hidden}
        return {"loss": 0.0}

    def state_dict(self) -> dict[str, Any]:
        if self.fault == "object":
            return {"spec": self.spec}
        state = {"policy": {"weight": self.weight}}
        return {"net": state} if self.fault == "no policy" else state

    def load_state_dict(self, state: Any) -> None:
        if self.fault != "not loaded":
            self.weight = state["policy"]["weight"]
        else:
            self.weight = self.weight - 1

    def load_policy(self, state: Any) -> None:
        self.weight = state["weight"] * (2 if self.fault == "policy" else 1)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("dtype", "actions are float64"),
        ("shape", "not int64 (4,)"),
        ("extras", "extras['value'] has shape (1,)"),
        ("bounds", "is outside Discrete(4)"),
        ("illegal", "an action is illegal"),
        ("global numpy", "global random state of numpy.random"),
        ("global torch", "global random state of torch"),
        ("tensor metric", "update() gives loss = tensor"),
        ("nan metric", "update() gives loss = nan"),
        ("unseeded", "two agents of one seed differ in their state: ['policy']['weight']"),
        ("hidden state", "the same steps lead to other metrics"),
        ("object", "saving or loading the state raised TypeError"),
        ("not loaded", "the state that was loaded differs"),
        ("no policy", "state_dict() has no key 'policy'"),
        ("policy", "load_policy(state_dict()['policy']) does not restore what acting needs"),
        ("no flag", "does not say whether it is recurrent"),
        ("evaluation", "acting with explore=False changes the agent's state"),
        ("refuses all", "refuses every one of masked"),
    ],
)
def test_agent_faults_are_named(fault: str, what: str) -> None:
    agent = type("Faulty", (BadAgent,), {"fault": fault})
    report = check_agent(agent, groups=("masked",), steps=20, copies=4)
    assert [error for error in report.errors if what in error.what], report


def test_right_variant_of_the_faulty_agent_passes() -> None:
    report = check_agent(BadAgent, groups=("masked",), steps=20, copies=4)
    assert report.findings == (), report


def test_probes_import_no_torch() -> None:
    code = "import sys, mtrl.testing.probes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
