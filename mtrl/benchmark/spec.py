"""What a benchmark compares: agents x suites x seeds, written in one short YAML file.

::

    name: laptop-10min
    about: Three agents on three small MiniGrid tasks.
    core_hours: 0.5               # what the whole grid takes, about
    solved: 0.9                   # the score that counts as solved
    seeds: 3                      # or a list
    run: {steps: 100000, copies: 8, eval: {every: 20000}}
    suites: [minigrid/mt3]        # or a mapping: suite -> what differs there
    agents:                       # label -> what differs for this agent
      ppo: {agent: {kind: ppo, rollout: 128}}
      random: {agent: random, steps: 2000}

``run``, the suite's and the agent's part hold fields of a run's configuration (``mtrl.config``), merged in this order.
An agent's part may also say ``alone: true`` (a run for each task of the suite, instead of one for all of them) and
``suites: [...]`` (only on these).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mtrl import registry
from mtrl.config import ConfigError, RunConfig, Strict, explain, merge, parse_config, read_yaml
from mtrl.types import Task

PROTOCOL = "1"  # version of docs/protocol.md; results of different versions do not compare
FIXED = ("suite", "seed", "threads")  # fields of a run that the grid itself decides
GRID = "{runs}/"  # where ``init.run`` finds the other runs of the grid
ARM = ("alone", "suites")  # what an agent's part says beside fields of a run


class Range(Strict):
    """What a hyperparameter may be: ``choices``, or ``low`` .. ``high`` (whole numbers if both are)."""

    choices: tuple[int | float | str | bool, ...] | None = Field(default=None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    log: bool = Field(default=False, description="spread evenly over orders of magnitude")

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        bounds = (self.low, self.high)
        if (self.choices is None) == (None in bounds) or (self.choices is not None and bounds != (None, None)):
            raise ValueError("give either choices, or low and high")
        return self


class Sweep(Strict):
    """A search for better hyperparameters of one agent of the spec (``mtrl sweep``)."""

    agent: str = Field(description="label of the agent")
    trials: PositiveInt = Field(default=20, description="settings tried, each on all suites and seeds")
    seed: int = Field(default=0, description="of the search")
    space: dict[str, Range] = Field(min_length=1, description="field of a run, as in agent.lr -> what it may be")


class Spec(Strict):
    """A benchmark. Names of suites and agents are looked up only when it is run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = Field(default="", description="what is compared and why, in a sentence")
    core_hours: PositiveFloat | None = Field(default=None, description="what the whole grid takes, about")
    solved: float = Field(default=0.9, description="mean score over the tasks of a suite that counts as solved")
    seeds: tuple[int, ...] = Field(min_length=1, description="run seeds; a number n means 0 .. n-1")
    threads: PositiveInt = Field(default=1, description="torch threads of each run, fixed: results depend on them")
    run: dict[str, Any] = Field(default_factory=dict, description="fields that all runs share; device: cpu by default")
    suites: dict[str, dict[str, Any]] = Field(min_length=1, description="suite -> fields that differ there")
    agents: dict[str, dict[str, Any]] = Field(min_length=1, description="label -> fields that differ for this agent")
    sweep: Sweep | None = Field(default=None, description="only for mtrl sweep")

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) else value

    @field_validator("suites", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        plain = {str(name): {} for name in value} if isinstance(value, list) else value
        return {name: part or {} for name, part in plain.items()} if isinstance(plain, dict) else plain

    @field_validator("run", "suites", "agents")
    @classmethod
    def _leaves_the_grid_alone(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for part in (value,) if info.field_name == "run" else value.values():
            taken = [name for name in FIXED if isinstance(part, Mapping) and name in part]
            if taken:
                raise ValueError(f"{', '.join(taken)}: decided by the grid; use suites, seeds and threads at the top")
        return value

    @field_validator("agents")
    @classmethod
    def _labels(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for label in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ -]*", label) or "--" in label:
                raise ValueError(f"agent label {label!r}: use letters, digits, spaces, '.', '_' and single '-'")
        return value

    @model_validator(mode="after")
    def _arms(self) -> Spec:
        for label, part in self.agents.items():
            if not isinstance(part.get("alone", False), bool):
                raise ValueError(f"agents.{label}.alone: true or false, got {part['alone']!r}")
            chosen = part.get("suites", [*self.suites])
            if not isinstance(chosen, list) or not chosen:
                raise ValueError(f"agents.{label}.suites: a list of suites, got {chosen!r}")
            for suite in chosen:
                if suite not in self.suites:
                    raise registry.UnknownNameError("suite of this spec", str(suite), self.suites, f"in agents.{label}")
        return self

    def arms(self) -> Iterator[tuple[str, str]]:
        """The (suite, agent) pairs that are compared, suite by suite."""
        for suite in self.suites:
            for agent, part in self.agents.items():
                if suite in part.get("suites", self.suites):
                    yield suite, agent


@dataclass(frozen=True)
class Job:
    """One run of the grid: of all tasks of ``suite``, or of ``task`` alone, one of the suite's ``tasks``."""

    agent: str
    suite: str
    seed: int
    config: RunConfig
    task: str | None = None
    tasks: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What all seeds have in common: a file name."""
        return "--".join(slug(part) for part in (self.agent, self.suite, self.task) if part)

    @property
    def name(self) -> str:
        """Unique in the grid and fit for a folder."""
        return f"{self.stem}--{self.seed}"

    @property
    def source(self) -> str | None:
        """The run of the same grid whose weights this one starts with, by name."""
        init = self.config.init
        if init is None or init.run is None or not init.run.startswith(GRID):
            return None
        return init.run.removeprefix(GRID).format(seed=self.seed)


def slug(text: str) -> str:
    """``text`` with everything that a file name should not hold replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def load_spec(path: Path) -> Spec:
    """Read a spec file.

    Raises:
        ConfigError: no such file, not YAML, or a mistake in it, with its path and the nearest valid key.
    """
    if not path.is_file():
        near = registry.nearest(path.name, [found.name for found in path.parent.glob("*.y*ml")])
        raise ConfigError(f"no benchmark spec {str(path)!r}" + (f"; did you mean {near!r}?" if near else ""))
    return parse_spec(read_yaml(path), str(path))


def parse_spec(raw: Any, place: str = "spec") -> Spec:
    """A checked ``Spec`` from plain data; raises ``ConfigError``."""
    try:
        return Spec.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{place}: " + "; ".join(explain(error, Spec))) from None


def dump_spec(spec: Spec) -> str:
    """YAML that ``load_spec`` reads back to the same spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def plan(spec: Spec) -> tuple[Job, ...]:
    """All runs, checked: every suite, agent and option exists. Seed by seed, so that early results cover everyone.

    Raises:
        ConfigError: a suite or an agent is not installed, or an option is wrong; names the part of the spec.
    """
    found: dict[str, tuple[Task, ...]] = {}
    for suite in spec.suites:
        try:
            found[suite] = registry.tasks(suite)
        except (ImportError, ValueError) as error:  # UnknownNameError is a ValueError
            raise ConfigError(f"{spec.name}: suites: {error}") from None
    jobs = tuple(
        job
        for seed in spec.seeds
        for suite, agent in spec.arms()
        for job in _jobs(spec, agent, suite, seed, found[suite])
    )
    count = Counter(job.name for job in jobs)
    twice = [name for name, number in count.items() if number > 1]
    if twice:
        raise ConfigError(f"{spec.name}: two runs would share the folder {twice[0]}: change a label, or a seed")
    for job in jobs:
        if job.source is not None and job.source not in count:
            unknown = registry.UnknownNameError("run of this grid", job.source, count)
            raise ConfigError(f"{spec.name}: agent {job.agent!r}: init.run: {unknown}")
    waves(jobs)
    return jobs


def waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in the order in which they may run: those of one wave start from earlier ones at most.

    Raises:
        ConfigError: runs start from each other.
    """
    found: list[list[Job]] = []
    done: set[str] = set()
    left = list(jobs)
    while left:
        ready = [job for job in left if job.source is None or job.source in done]
        if not ready:
            raise ConfigError(f"init.run: {', '.join(job.name for job in left[:3])} start from each other")
        found.append(ready)
        done |= {job.name for job in ready}
        left = [job for job in left if job.name not in done]
    return found


def _jobs(spec: Spec, agent: str, suite: str, seed: int, tasks: Sequence[Task]) -> Iterator[Job]:
    config = _config(spec, agent, suite, seed)
    if not spec.agents[agent].get("alone"):
        yield Job(agent, suite, seed, config)
        return
    names = tuple(task.name for task in tasks)
    for k, name in enumerate(names):
        try:
            yield Job(agent, suite, seed, alone(config, k, names), name, names)
        except ConfigError as error:
            raise ConfigError(f"{spec.name}: agent {agent!r} on {suite}: {error}") from None


def alone(config: RunConfig, k: int, tasks: Sequence[str]) -> RunConfig:
    """The run of the k-th of ``config``'s tasks alone: its share of the steps, evaluated when it has played as many
    steps of this task as the run of all tasks.

    Raises:
        ConfigError: the steps cannot be, or are not, shared out equally; or the task cannot be named as a suite.
    """
    each = registry.mix(config.suite).copies
    copies = config.copies if isinstance(config.copies, tuple) else [config.copies * number for number in each]
    if len(set(copies)) > 1:
        counts = ", ".join(map(str, copies))
        raise ConfigError(f"alone: steps are shared out equally, but the tasks have {counts} copies")
    for place, steps in {"steps": config.steps, "eval.every": config.eval.every or 0}.items():
        if steps % len(tasks):
            raise ConfigError(f"alone: {place}={steps} is no multiple of the {len(tasks)} tasks")
    if config.slots is not None:
        raise ConfigError("alone: slots shares environments among tasks; give copies instead")

    def share(steps: int) -> int:
        return max(1, steps // len(tasks))

    raw = config.model_dump(mode="json")
    raw |= {"suite": _own_suite(config.suite, tasks[k]), "steps": share(config.steps), "copies": copies[k]}
    for part in ("eval", "checkpoint", "log"):
        every = raw[part]["every"]
        raw[part] = {**raw[part], "every": every and share(every)}
    return parse_config(raw)


def _own_suite(mix: str, task: str) -> str:
    """The suite that holds ``task`` alone: its name, or its last part as a group of a suite of the mix."""
    last = task.rpartition("/")[2]
    tried = dict.fromkeys([task, *(f"{part.strip().rpartition('/')[0]}/{last}" for part in mix.split("+"))])
    for name in tried:
        try:
            if [one.name for one in registry.tasks(name)] == [task]:
                return name
        except ValueError:  # no such suite or group
            continue
    raise ConfigError(f"alone: no suite holds the task {task!r} alone (tried {', '.join(tried)})")


def _config(spec: Spec, agent: str, suite: str, seed: int) -> RunConfig:
    # Not auto: a table must not depend on whether there is a GPU, nor may all runs at once crowd onto it.
    defaults = {"device": "cpu", "workers": 0, "log": {"terminal": False, "group": spec.name, "tags": [agent, suite]}}
    fixed = {"suite": suite, "seed": seed, "threads": spec.threads}
    own = {key: value for key, value in spec.agents[agent].items() if key not in ARM}
    parts: Sequence[Mapping[str, Any]] = [defaults, spec.run, spec.suites[suite], own, fixed]
    try:
        return parse_config(merge(parts))
    except ConfigError as error:
        raise ConfigError(f"{spec.name}: agent {agent!r} on {suite}: {error}") from None
