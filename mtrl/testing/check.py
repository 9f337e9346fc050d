"""``check_suite``: does a suite keep the contract of ``mtrl.types``, and if not, what must its author change?"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing.reduction
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete

from mtrl.registry import UnknownNameError, raised, tasks_of
from mtrl.spaces import NO_INFO, RETURN_INFO, Codec, SpaceError, check_frames, declared, team_codec
from mtrl.testing.compare import difference, outside
from mtrl.testing.elsewhere import elsewhere
from mtrl.types import Suite, Task
from mtrl.vector.workers import unsendable

_NO_SUCH_GROUP = "no such group"
_ELSEWHERE = 50  # steps that are compared with another process
_WIDTH = 8  # of the column that holds a finding's level
_STEP_FIX = "make it work for legal actions up to Task.horizon"
_FIXES = {
    "build()": "let build() make the environment without arguments, and with render_mode=... for videos",
    "reset()": "make reset(seed=...) work for every seed, as often as it is called, in the middle of an episode too",
    "the spaces": "let observation_space(agent) and action_space(agent) give the spaces of all possible_agents",
    "state()": "make state() work at any time after reset()",
    "close()": "let close() release what the environment holds without raising, whether an episode has ended or not",
}  # by what raised; else it was a step


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``error``) or worth knowing (``note``), and how to fix it."""

    level: Literal["error", "note"]
    task: str
    what: str
    fix: str


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        title: what was checked, for instance ``"suite minigrid, group mt3"``.
        checked: names of what was checked (tasks, or groups of an agent's probes).
        findings: errors and notes, in the order of ``checked``.
    """

    title: str
    checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that break the contract."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Findings that may be intended."""
        return tuple(finding for finding in self.findings if finding.level == "note")

    @property
    def ok(self) -> bool:
        """True if nothing breaks the contract; notes do not count."""
        return not self.errors

    def render(self) -> str:
        """Plain text for a terminal: one block per finding (those that agree but for the task are merged), then the
        verdict."""
        merged: dict[tuple[str, str, str], list[str]] = {}
        for finding in (*self.errors, *self.notes):
            merged.setdefault((finding.level, finding.what, finding.fix), []).append(finding.task)
        lines = [f"{self.title}: {len(self.checked)} checked"]
        for (level, what, fix), tasks in merged.items():
            shown = ", ".join(tasks[:4]) + (f" and {len(tasks) - 4} more" if len(tasks) > 4 else "")
            lines += ["", f"{level.upper():<{_WIDTH}}{shown}", f"{'':<{_WIDTH}}{what}", f"{'':<{_WIDTH}}fix: {fix}"]
        verdict = "OK" if self.ok else "FAILED"
        return "\n".join([*lines, "", f"{verdict}: {len(self.errors)} errors, {len(self.notes)} notes"])

    def __str__(self) -> str:
        return self.render()


def check_suite(
    suite: Suite, group: str, *, seeds: Sequence[int] = (1, 2), steps: int = 200, full: bool = False
) -> Report:
    """Check every task of a group against the contract by playing random legal actions.

    Each task is built twice; each instance plays one episode per seed. So a fresh environment is compared with a used
    one, bit for bit. What keeps the contract so far is then compared with itself in another process.

    Args:
        suite: the suite, for instance ``registry.suite("minigrid")``.
        group: one of ``suite.groups``, or the short name of one task.
        seeds: at least two different ones.
        steps: cut episodes here.
        full: play episodes to their end (up to ``Task.horizon``) whatever ``steps`` says.

    Raises:
        ValueError: fewer than two different seeds.
        UnknownNameError: the suite has no such group; or ``PluginError``, see ``registry.tasks_of``.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds must hold at least two different ones, got {list(seeds)}")
    tasks = tasks_of(suite, group)
    findings = _check_listing(suite, group, tasks)
    for task in tasks:
        findings += _TaskCheck(task, task.horizon if full else min(steps, task.horizon)).run(seeds)
    findings += _check_elsewhere(tasks, {finding.task for finding in findings if finding.level == "error"}, seeds[0])
    return Report(f"suite {suite.name}, group {group}", tuple(task.name for task in tasks), tuple(findings))


def _check_listing(suite: Suite, group: str, tasks: Sequence[Task]) -> list[Finding]:
    """The suite itself: names, groups, single tasks, near-miss errors."""
    findings: list[Finding] = []

    def error(what: str, fix: str, task: str = suite.name) -> None:
        findings.append(Finding("error", task, what, fix))

    names = [task.name for task in tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        error("the name appears twice in the group", "give every task a name of its own", name)
    for name in names:
        if not name.startswith(f"{suite.name}/") or name == f"{suite.name}/":
            error(f"the name does not start with '{suite.name}/'", f"name it '{suite.name}/<task>'", name)
    if names != [task.name for task in suite.tasks(group)]:
        error(f"two calls of tasks({group!r}) give different orders", "return tasks in a fixed, canonical order")
    try:
        suite.tasks(_NO_SUCH_GROUP)
        error("tasks() accepts a group that does not exist", "raise mtrl.registry.UnknownNameError for unknown names")
    except UnknownNameError:
        pass
    except Exception as other:  # noqa: BLE001 - whatever the author's code raises is the finding
        error(
            f"tasks() of an unknown group raises {type(other).__name__}, which names no valid choice",
            'raise mtrl.registry.UnknownNameError("group", group, self.groups)',
        )
    for name in names[:1]:
        short = name.partition("/")[2]
        try:
            alone = [task.name for task in suite.tasks(short)]
        except Exception:  # noqa: BLE001 - what an unknown group should raise has been checked above
            alone = []
        if alone != [name]:
            error(f"tasks({short!r}) does not give this single task", "accept a task's short name as a group", name)
    return findings


def _check_elsewhere(tasks: Sequence[Task], wrong: set[str], seed: int) -> Iterator[Finding]:
    """Tasks in another process, but those that have errors of their own."""
    if len({task.name for task in tasks}) < len(tasks):
        return
    right = [task for task in tasks if task.name not in wrong and not unsendable(task)]
    for task, what in elsewhere(right, seed, _ELSEWHERE):
        yield Finding(
            "error",
            task.name,
            f"another process plays another episode, with the same seed and actions: {what}",
            "let nothing depend on hash() (use zlib.crc32), the order of a set (sort it), time, threads, or what the "
            "main process alone has set up (do it in the module, or in build)",
        )


class _AbandonError(Exception):
    """The task cannot be examined further; the reason is among the findings."""


@dataclass
class _Trace:
    """What one episode looked like. ``steps`` holds whatever must be reproduced, the first observation first."""

    steps: list[Any]
    ended: bool = False
    terminated: bool = False


class _TaskCheck:
    """Examines one task. Every kind of finding is reported once."""

    def __init__(self, task: Task, steps: int) -> None:
        self._task = task
        self._steps = steps
        self._findings: dict[str, Finding] = {}
        self._success: set[bool] = set()  # whether the signal was there, over all steps

    def run(self, seeds: Sequence[int]) -> list[Finding]:
        try:
            self._check_declaration()
            self._check_episodes(seeds)
        except _AbandonError:
            pass
        return list(self._findings.values())

    def _report(self, level: Literal["error", "note"], key: str, what: str, fix: str) -> None:
        self._findings.setdefault(key, Finding(level, self._task.name, what, fix))

    def _error(self, key: str, what: str, fix: str) -> None:
        self._report("error", key, what, fix)

    def _abandon(self, key: str, what: str, fix: str) -> _AbandonError:
        self._error(key, what, fix)
        return _AbandonError()

    @contextmanager
    def _calling(self, where: str) -> Iterator[None]:
        """Run the author's code: what it raises is a finding, and so is a touch of the global random state."""
        before = global_state()
        try:
            yield
        except Exception as error:
            what = f"{where} raised {raised(error)}"
            fix = _FIXES.get(where, _STEP_FIX)
            if where == "reset()" and isinstance(error, TypeError) and "'seed'" in str(error):
                fix = "let it take a seed: def reset(self, *, seed=None, options=None)"
            raise self._abandon("raised", what, fix) from error
        for name in changed(before, global_state()):
            self._error(
                f"global {name}",
                f"{where} changes the global random state of {name}",
                "draw from a generator of the environment's own (gymnasium.Env.np_random), seeded in reset(seed=...)",
            )

    def _check_declaration(self) -> None:
        task = self._task
        low, high = task.score
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            self._error("score", f"score {task.score} is not a scale", "give (low, high), finite, with low < high")
        elif not task.score_source:
            self._report(
                "note",
                "score",
                f"nothing says where the score scale {task.score} comes from",
                "measure random and reference returns and name the source in Task.score_source",
            )
        try:
            json.dumps(dict(task.protocol))
        except (TypeError, ValueError) as error:
            self._error("protocol", f"protocol cannot be written to a result: {error}", "let its values be texts")
        if task.horizon < 1:
            raise self._abandon("horizon", f"horizon is {task.horizon}", "give the number of steps of an episode, >= 1")
        try:
            multiprocessing.reduction.ForkingPickler.dumps(task)  # what sending it to a worker does
        except Exception as error:  # noqa: BLE001 - pickling runs the author's code, which may raise anything
            self._error(
                "pickle",
                f"the task cannot be sent to a worker process: {error}",
                "let build be a class, a module-level function or a functools.partial of one",
            )

    def _check_episodes(self, seeds: Sequence[int]) -> None:
        with self._calling("build()"):
            used = self._task.build()
        # The used instance begins with another seed, so that its past differs from the fresh one's.
        used_traces = {seed: self._play(used, seed) for seed in seeds}
        with self._calling("build()"):
            fresh = self._task.build()
        fresh_traces = {seed: self._play(fresh, seed) for seed in reversed(seeds)}
        for env in (used, fresh):
            with self._calling("close()"):
                env.close()
        for seed in seeds:
            place = difference(used_traces[seed].steps, fresh_traces[seed].steps)
            if place is not None:
                self._error(
                    "seed",
                    f"reset(seed={seed}) does not determine the episode: two instances differ at {place}",
                    "draw everything random (layout, goal, noise) from a generator that reset(seed=...) seeds, "
                    "and let reset clear all that an earlier episode left",
                )
        firsts = [used_traces[seed].steps[0] for seed in seeds]
        if "seed" not in self._findings and all(difference(firsts[0], first) is None for first in firsts[1:]):
            self._report(
                "note",
                "fixed",
                "every seed starts with the same observation",
                "nothing to do if the task's start is fixed; else let reset(seed=...) decide it",
            )
        self._check_ends([*used_traces.values(), *fresh_traces.values()])
        if len(self._success) > 1:
            self._error(
                "success",
                "the success signal is in the info of some steps and not of others",
                'put info["success"] into the info of every step, false where the task is not solved',
            )

    def _check_ends(self, traces: Sequence[_Trace]) -> None:
        horizon = self._task.horizon
        lengths = [len(trace.steps) - 1 for trace in traces]
        if horizon > 1 and all(
            trace.ended and trace.terminated and length == horizon
            for trace, length in zip(traces, lengths, strict=True)
        ):
            self._error(
                "limit",
                f"every episode under random actions terminates at exactly the horizon, {horizon} steps: a time limit "
                "reported as termination",
                "return truncated=True at a time limit (or leave it to Task.horizon); terminated means that the "
                "task itself ended",
            )
        early = [n for trace, n in zip(traces, lengths, strict=True) if trace.ended and not trace.terminated]
        if early and max(early) < horizon:
            self._report(
                "note",
                "early",
                f"the environment truncates after {max(early)} steps, before Task.horizon = {horizon}",
                "let Task.horizon be the environment's own limit, unless that varies between episodes",
            )

    def _play(self, env: Any, seed: int) -> _Trace:
        """Play one episode of random legal actions, which are decided by the seed."""
        team = hasattr(env, "possible_agents")
        if self._task.agents > 1 and not team:
            raise self._abandon(
                "agents",
                f"agents={self._task.agents}, but build() makes a single-agent environment",
                "let build() make a PettingZoo ParallelEnv with that many possible_agents",
            )
        return self._play_team(env, seed) if team else self._play_single(env, seed)

    # One agent.

    def _play_single(self, env: Any, seed: int) -> _Trace:
        with self._calling("reset()"):
            first = env.reset(seed=seed)
        if not (isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], Mapping)):
            raise self._abandon("reset", NO_INFO, RETURN_INFO)
        obs, info = first
        codec = self._codec(
            lambda: Codec(*declared(self._task, env), task=self._task.name, mask_in_info="action_mask" in info)
        )
        self._check_declared(env.observation_space, env.action_space)
        if self._task.spaces is not None and "action_mask" in info:
            self._error(
                "mask",
                'info["action_mask"] is not looked at where Task.spaces is declared',
                "leave Task.spaces out, or observe the mask: a Dict with the key 'action_mask'",
            )
        row = _Row(codec, seed)
        trace = _Trace([copy.deepcopy(obs)])
        self._check_observation(env.observation_space, obs, "reset()")
        for number in range(1, self._steps + 1):
            action = self._action(row, obs, info, number)
            with self._calling(f"step {number}"):
                result = env.step(action)
            if not (isinstance(result, tuple) and len(result) == 5):
                raise self._abandon(
                    "step",
                    "step() does not return (observation, reward, terminated, truncated, info)",
                    "follow gymnasium.Env.step",
                )
            obs, reward, terminated, truncated, info = result
            where = f"step {number}"
            if not isinstance(info, Mapping):
                raise self._abandon(
                    "info", f"{where} gives the info {info!r}", "return a dict, empty if there is nothing"
                )
            self._check_observation(env.observation_space, obs, where)
            self._check_result(reward, terminated, truncated, info, where)
            if "action_mask" in info and "legal" not in codec.leaves:
                self._error(
                    "mask",
                    f'{where} gives info["action_mask"] and reset() does not: it is not looked at',
                    "give it from reset() on",
                )
            trace.steps.append(copy.deepcopy((obs, reward, terminated, truncated, _success(info))))
            if terminated or truncated:
                trace.ended, trace.terminated = True, bool(terminated)
                self._action(row, obs, info, number + 1, final=True)
                break
        return trace

    def _check_declared(self, observation: gym.Space[Any], action: gym.Space[Any]) -> None:
        if self._task.spaces is not None and self._task.spaces != (observation, action):
            self._error(
                "declared",
                f"Task.spaces {self._task.spaces} differs from the environment's {(observation, action)}",
                "declare the spaces that build() gives, or leave Task.spaces out",
            )

    def _codec(self, make: Any) -> Codec:
        try:
            codec = make()
            check_frames(self._task, codec.leaves)
            return codec
        except (SpaceError, UnknownNameError) as error:
            what = error.what if isinstance(error, SpaceError) else str(error)
            fix = error.fix if isinstance(error, SpaceError) else ""
            what = what.removeprefix(f"{self._task.name}: ")
            raise self._abandon("space", what, fix or "see mtrl.spaces for what becomes which leaf") from error

    def _action(self, row: _Row, obs: Any, info: Mapping[str, Any], number: int, final: bool = False) -> Any:
        """A random legal action; None if the episode is over and only the observation was to be laid into leaves."""
        where = "reset()" if number == 1 else f"step {number - 1}"
        try:
            row.write(obs, info)
        except Exception as error:
            cause = error.__cause__ or error  # the codec names task and space, which are known here
            raise self._abandon(
                "leaves",
                f"the observation of {where} does not fit its space: {type(cause).__name__}: {cause}",
                "return observations of the shape and keys that the space declares, and the mask at every step",
            ) from error
        self._check_stacks(row, where)
        if final:
            return None
        if not row.any_legal:
            raise self._abandon(
                "legal", f"no action is legal after {where}", "leave at least one action legal until the episode ends"
            )
        return row.sample()

    def _check_stacks(self, row: _Row, where: str) -> None:
        """Leaves in ``Task.frames`` must drop their oldest frame and gain a new one at every step."""
        for leaf, k in self._task.frames.items():
            before, now = row.advance(leaf, k)
            if before is None and (now[1:] != now[:-1]).any():
                self._report(
                    "note",
                    "first frames",
                    f"the leaf {leaf!r} (a stack of {k} frames) starts with frames that differ",
                    "fill the first stack with copies of the first frame: memories then store just one",
                )
            elif before is not None and (now[:-1] != before[1:]).any():
                self._error(
                    "frames",
                    f"the leaf {leaf!r} after {where} is not the one before without its oldest frame and with a new "
                    f"one, though Task.frames says that it is a stack of {k} frames",
                    "keep the last frames along the leaf's first axis, oldest first, or leave it out of Task.frames",
                )

    def _check_observation(self, space: gym.Space[Any], obs: Any, where: str) -> None:
        reason = outside(space, obs, "observation")
        if reason is not None:
            self._error(
                "observation",
                f"{where} gives an observation outside its space: {reason}",
                "let observation_space contain everything the environment returns (Task.spaces likewise)",
            )

    def _check_result(self, reward: Any, terminated: Any, truncated: Any, info: Any, where: str) -> None:
        # A string such as "1.0" is no number, though numpy would read it as one.
        if np.ndim(reward) != 0 or np.asarray(reward).dtype.kind not in "biuf" or not np.isfinite(reward):
            fix = "return one finite number per step and agent, as in float(reward)"
            self._error("reward", f"{where} gives the reward {reward!r}", fix)
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                self._error(name, f"{where} gives {name}={flag!r}, not a boolean", f"return bool({name})")
        if terminated and truncated:
            self._report(
                "note",
                "both",
                f"{where} is both terminated and truncated",
                "the vector counts it as terminated; report one of the two",
            )
        value = _success(info)
        self._success.add(value is not None)
        if value is not None and not (
            np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf" and value in (0, 1)
        ):
            self._error("success value", f"{where} gives success={value!r}", "report a boolean (or 0 and 1)")

    # Teams.

    def _play_team(self, env: Any, seed: int) -> _Trace:
        possible = list(env.possible_agents)
        with self._calling("the spaces"):
            for agent in possible:
                _ = env.observation_space(agent), env.action_space(agent)
        with self._calling("reset()"):
            env.reset(seed=seed)  # the codec does so too, but cannot say how to mend it
        codec = self._codec(lambda: team_codec(self._task, env))
        with self._calling("reset()"):
            observations, infos = env.reset(seed=seed)
        self._check_declared(env.observation_space(possible[0]), env.action_space(possible[0]))
        if set(env.agents) != set(possible) or set(observations) != set(possible):
            raise self._abandon(
                "agents",
                f"reset() starts with {sorted(observations)} of the agents {sorted(possible)}",
                "start every episode with all possible_agents; they may die later",
            )
        rows = {agent: _Row(codec, seed + i) for i, agent in enumerate(possible)}
        trace = _Trace([copy.deepcopy(observations)])
        self._check_team_observations(env, observations, "reset()")
        for number in range(1, self._steps + 1):
            acting = list(env.agents)
            actions = {
                agent: self._action(rows[agent], observations[agent], infos.get(agent, {}), number) for agent in acting
            }
            where = f"step {number}"
            with self._calling(where):
                observations, rewards, terminated, truncated, infos = env.step(actions)
            self._check_team_step(env, acting, (observations, rewards, terminated, truncated), where)
            self._check_team_observations(env, observations, where)
            if not self._task.shared_reward and any(infos.get(agent, {}).get("alive") is False for agent in env.agents):
                self._error(
                    "dead agents that stay",
                    f'{where}: an agent has info["alive"] False but stays in env.agents, while shared_reward is false',
                    "set Task.shared_reward if the dead are paid like the living; otherwise terminate who dies",
                )
            for agent in acting:
                self._check_result(rewards[agent], terminated[agent], truncated[agent], infos.get(agent, {}), where)
            successes = {agent: _success(info) for agent, info in infos.items()}
            trace.steps.append(copy.deepcopy((observations, rewards, terminated, truncated, successes)))
            if not env.agents:
                trace.ended, trace.terminated = True, any(terminated[agent] for agent in acting)
                break
        return trace

    def _check_team_step(
        self, env: Any, acting: Sequence[str], results: Sequence[Mapping[str, Any]], where: str
    ) -> None:
        """Results for exactly those who acted; the dead stay dead; a time limit ends the episode for all."""
        for name, result in zip(("observation", "reward", "terminated", "truncated"), results, strict=True):
            if set(result) != set(acting):
                raise self._abandon(
                    "team results",
                    f"{where} gives a {name} for {sorted(result)}, but {sorted(acting)} acted",
                    "return results for the agents that acted, those that died at this step included",
                )
        _, _, terminated, truncated = results
        living = {agent for agent in acting if not (terminated[agent] or truncated[agent])}
        if set(env.agents) != living:
            raise self._abandon(
                "dead agents",
                f"after {where} env.agents is {sorted(env.agents)}, but {sorted(living)} are neither terminated nor "
                "truncated",
                "drop agents from env.agents when they end, and only then",
            )
        if living and any(truncated.values()):
            self._error(
                "team limit",
                f"{where} truncates {sorted(a for a in acting if truncated[a])} while {sorted(living)} go on",
                "a time limit ends the episode for the whole team; one agent's end is terminated=True",
            )

    def _check_team_observations(self, env: Any, observations: Mapping[str, Any], where: str) -> None:
        for agent, obs in observations.items():
            self._check_observation(env.observation_space(agent), obs, f"{where}, agent {agent!r},")
        space = getattr(env, "state_space", None)
        if space is not None:
            with self._calling("state()"):
                state = env.state()
            reason = outside(space, state, "state()")
            if reason is not None:
                self._error("state", f"after {where}: {reason}", "let state_space contain everything state() returns")


class _Row:
    """One row's leaves and a source of random legal actions."""

    def __init__(self, codec: Codec, seed: int) -> None:
        self._codec = codec
        self._space = copy.deepcopy(codec.action)
        self._space.seed(seed)
        self._leaves = {name: np.zeros((1, *box.shape), box.dtype) for name, box in codec.leaves.items()}
        self._stacks: dict[str, np.ndarray] = {}

    def write(self, obs: Any, info: Mapping[str, Any]) -> None:
        self._codec.write(obs, info, self._leaves, 0)

    def advance(self, leaf: str, k: int) -> tuple[np.ndarray | None, np.ndarray]:
        """The bytes of a leaf's k frames [k, b] at the last call (None: this is the first) and now."""
        before = self._stacks.get(leaf)
        self._stacks[leaf] = self._leaves[leaf].copy().reshape(-1).view(np.uint8).reshape(k, -1)
        return before, self._stacks[leaf]

    @property
    def any_legal(self) -> bool:
        return "legal" not in self._leaves or bool(self._leaves["legal"].any())

    def sample(self) -> Any:
        """An action as the vector sends it: int, or a float array."""
        if isinstance(self._space, Discrete):
            mask = self._leaves["legal"][0].astype(np.int8) if "legal" in self._leaves else None
            return int(self._space.sample(mask))
        return self._space.sample()


def _success(info: Mapping[str, Any]) -> Any:
    """The success signal as the vector reads it, or None."""
    value = info.get("success")
    return info.get("is_success") if value is None else value


def global_state() -> dict[str, Any]:
    """The global random states of Python and numpy."""
    return {"random": random.getstate(), "numpy.random": np.random.get_state(legacy=False)}  # noqa: NPY002 - watched


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the global random states that differ."""
    return [name for name in before if difference(before[name], after[name]) is not None]
