"""The schema of a run: defaults <- YAML file <- ``key=value`` overrides, checked before anything starts.

A misspelt key names its path and the nearest valid key. The agent's part is checked against the agent's own
``Config``: ``agent: ppo`` is short for ``agent: {kind: ppo}``; every other key under ``agent`` is an option.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from mtrl import registry
from mtrl.sampler import SamplerConfig

DEFAULT_AGENT = "ppo"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each place and the nearest valid choice."""


class Strict(BaseModel):
    """Unknown keys are errors, values are fixed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EvalConfig(Strict):
    """When and how the agent is evaluated during training, on environments of its own."""

    every: PositiveInt | None = Field(
        default=None, description="environment steps between evaluations; null: only at the end"
    )
    episodes: PositiveInt = Field(default=20, description="seeded episodes per task")
    seed: int = Field(
        default=1_000_003, ge=0, description="decides the evaluation episodes; the same for every agent and run"
    )
    stochastic: bool = Field(default=False, description="also evaluate sampled actions, beside the greedy ones")
    video: bool = Field(default=False, description="at the end, film the best and the worst episode of each task")


class CheckpointConfig(Strict):
    """When the run is saved. An interrupt (SIGINT, SIGTERM) saves as well."""

    every: PositiveInt = Field(default=100_000, description="environment steps between checkpoints")
    keep: PositiveInt = Field(default=2, description="newest checkpoints kept")


class LogConfig(Strict):
    """What is recorded. ``metrics.jsonl`` is always written: it is the truth that the others mirror."""

    every: PositiveInt = Field(default=5_000, description="environment steps between records")
    window: PositiveInt = Field(default=50, description="latest training episodes per task that the charts average")
    terminal: bool = True
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="auto: online if logged in, offline otherwise"
    )
    project: str = "mtrl"
    tensorboard: bool = False
    group: str | None = Field(default=None, description="W&B group; null: the agent and the suite")
    tags: tuple[str, ...] = ()

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class InitConfig(Strict):
    """What the networks start with: what the tasks of another run share. All else is fresh."""

    run: str | None = Field(
        default=None,
        description="folder of the run; {runs} in it is the folder that holds this run's, {seed} this run's seed; "
        "null: fresh weights, to be frozen",
    )
    step: PositiveInt | None = Field(default=None, description="its checkpoint; null: the last one of a finished run")
    parts: tuple[Literal["perception", "trunk", "memory", "heads"], ...] = Field(
        default=("perception", "trunk", "memory"),
        min_length=1,
        description="of all networks; what belongs to single tasks (heads, task weights, embeddings) is never taken",
    )
    freeze: bool = Field(default=False, description="these parts are not trained")

    @field_validator("run")
    @classmethod
    def _placeholders(cls, value: str | None) -> str | None:
        try:
            (value or "").format(runs="", seed=0)
        except (KeyError, IndexError, ValueError):
            raise ValueError("the placeholders are {runs} and {seed}") from None
        return value

    @model_validator(mode="after")
    def _does_something(self) -> InitConfig:
        if self.run is None and not self.freeze:
            raise ValueError("give run, or freeze=true, or both")
        return self


class RunConfig(Strict):
    """Everything that decides a run."""

    suite: str = Field(
        description="'suite/group' parts joined by '+', as in 'minigrid/mt3'; 'suite/group*4': 4 copies of its tasks"
    )
    agent: dict[str, Any] = Field(default=DEFAULT_AGENT, validate_default=True)  # type: ignore[assignment]
    steps: PositiveInt = Field(
        default=600_000, description="environment steps over all tasks; a team's step counts once"
    )
    seed: int = Field(default=0, ge=0)
    copies: PositiveInt | tuple[PositiveInt, ...] = Field(
        default=1, description="environments per task, times those of the suite's parts; or one number a task"
    )
    slots: PositiveInt | None = Field(
        default=None, description="environments in all, for a sampler that shares them out; None: copies per task"
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    workers: NonNegativeInt | Literal["auto"] = Field(
        default="auto", description="processes that step environments, in evaluations, too; 0: in this process"
    )
    patience: PositiveFloat = Field(
        default=300.0, description="seconds a worker may take for a vector step before it is replaced"
    )
    threads: int = Field(
        default=1, ge=0, description="torch threads, which results depend on; 0: as many as cores that may be used"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: InitConfig | None = Field(default=None, description="start with parts of another run's networks")
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("agent", mode="before")
    @classmethod
    def _agent_options(cls, value: Any) -> dict[str, Any]:
        options = _agent_part(value)
        made = agent_schema(options["kind"]).model_validate({k: v for k, v in options.items() if k != "kind"})
        return {"kind": options["kind"], **made.model_dump(mode="json")}

    @field_validator("suite")
    @classmethod
    def _parts(cls, value: str) -> str:
        registry.parts(value)  # names are looked up later, when they are used
        return value

    @model_validator(mode="after")
    def _one_way_to_count(self) -> RunConfig:
        if self.slots is not None and self.sampler.kind == "pinned":
            raise ValueError("slots shares environments among tasks, which a sampler must do: set sampler.kind")
        if self.slots is not None and self.copies != 1:
            raise ValueError("slots and copies both say how many environments there are: leave one out")
        counted = "slots" if self.slots is not None else "copies" if isinstance(self.copies, tuple) else None
        for part in registry.parts(self.suite):
            if counted and part.copies > 1:
                stated = f"'*{part.copies}' in suite {self.suite!r}"
                raise ValueError(f"{counted} and {stated} both say how many environments there are: leave one out")
        return self

    def agent_config(self) -> BaseModel:
        """The agent's own validated ``Config``."""
        options = {key: value for key, value in self.agent.items() if key != "kind"}
        return agent_schema(self.agent["kind"]).model_validate(options)


def agent_schema(kind: str) -> type[BaseModel]:
    """The ``Config`` of the agent called ``kind``."""
    return registry.agent(kind).Config


def load_config(path: Path | None = None, overrides: Sequence[str] = (), **flags: Any) -> RunConfig:
    """Merge a YAML file, then ``flags`` that are not None, then ``a.b=c`` overrides, and check the result.

    Raises:
        ConfigError: unreadable file, malformed override, unknown key, wrong type or unknown name.
    """
    parts: list[Any] = []
    if path is not None:
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            match = difflib.get_close_matches(path.name, near, n=1, cutoff=0.3)
            hint = f"; did you mean {match[0]!r}?" if match else ""
            if not hint and path.suffix not in (".yaml", ".yml"):
                hint = f"; tasks are named with --suite {path}"
            raise ConfigError(f"no config file {str(path)!r}{hint}")
        if path.suffix == ".py":
            raise ConfigError(f"{str(path)!r} is no YAML; tasks of a suite in it: --suite {path.stem}:CLASS/GROUP")
        parts.append(read_yaml(path))
    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"override {text!r} is not of the form key=value")
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        # One by one, and the agent first: its options belong to it, in whatever order they are written.
        words = [f"agent.kind={text[6:]}" if re.fullmatch(r"agent=[^{\[]*", text) else text for text in overrides]
        words.sort(key=lambda text: not text.startswith("agent.kind="))
        merged = merge([*parts, OmegaConf.create(given), *(OmegaConf.from_dotlist([text]) for text in words)])
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    return parse_config(merged)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file: ``1e6`` is a number, ``${a.b}`` the value of another key.

    Raises:
        ConfigError: no YAML, or a key that comes twice.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A checked ``RunConfig`` from plain data; raises ``ConfigError``."""
    agent = _agent_part(raw.get("agent", DEFAULT_AGENT))
    try:
        schema = agent_schema(agent["kind"])
    except registry.UnknownNameError as error:
        raise ConfigError(f"agent.kind: {error}") from None
    # The agent's options first, against the agent's own schema, so that their errors carry full paths.
    problems = _problems(schema, {k: v for k, v in agent.items() if k != "kind"}, "agent.")
    problems += _problems(RunConfig, {**raw, "agent": DEFAULT_AGENT}, "", schema)
    endless = [place for place, value in _numbers({**raw, "agent": agent}) if not math.isfinite(value)]
    problems += [f"{place}: must be finite; null turns off what may be turned off" for place in endless]
    if problems:
        raise ConfigError("; ".join(problems))
    return RunConfig.model_validate({**raw, "agent": agent})


def _numbers(tree: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Floats, also those that are written as texts which pydantic takes for infinite ones, and where they are."""
    if isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _numbers(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, float):
        yield place, tree
    elif isinstance(tree, str) and tree.strip().lower().lstrip("+-") in ("inf", "infinity", "nan"):
        yield place, math.nan


def dump_config(config: RunConfig) -> str:
    """YAML of the whole configuration, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def merge(parts: Sequence[Any]) -> dict[str, Any]:
    """One raw configuration from several mappings or OmegaConf nodes; later ones win, key by key.

    ``agent: ppo`` and ``agent.lr=1`` merge. Naming another agent than an earlier part does drops that part's options:
    they belong to the other agent.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        plain = OmegaConf.to_container(OmegaConf.create(part), resolve=True)
        if not isinstance(plain, dict):
            raise ConfigError("a config is a mapping of keys to values")
        items: dict[str, Any] = {str(key): value for key, value in plain.items()}
        if isinstance(items.get("agent"), str):
            items["agent"] = {"kind": items["agent"]}
        old, new = merged.get("agent"), items.get("agent")
        if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) != old.get("kind"):
            merged.pop("agent")
        merged = OmegaConf.to_container(OmegaConf.merge(merged, items))  # type: ignore[assignment]
    return merged


def _agent_part(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"kind": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"agent: the name of an agent or a mapping with 'kind', got {value!r}")
    return {"kind": DEFAULT_AGENT, **value}


def _problems(
    schema: type[BaseModel], raw: Mapping[str, Any], prefix: str, agent: type[BaseModel] | None = None
) -> list[str]:
    """One line per place with a mistake in ``raw``."""
    try:
        schema.model_validate(raw)
    except ValidationError as error:
        return explain(error, schema, prefix, agent)
    return []


def explain(
    error: ValidationError, schema: type[BaseModel], prefix: str = "", agent: type[BaseModel] | None = None
) -> list[str]:
    """One line per place with a mistake: its path, what is wrong, the nearest valid key or choice.

    ``agent``: the schema of the agent chosen, whose keys may have been meant.
    """
    found: dict[str, list[str]] = {}  # a value that may be of several kinds has a complaint of each
    given: dict[str, str] = {}
    for item in error.errors():
        place = prefix + ".".join(str(part) for part in item["loc"] if not _KIND.fullmatch(str(part)))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            fields, key = _fields_at(schema, item["loc"][:-1]), str(item["loc"][-1])
            near = registry.nearest(key, fields) or next(_deeper(schema, key, prefix, agent), None)
            hint = f"; did you mean {near!r}?" if near else ""
            message = f"unknown key{hint} (valid: {', '.join(sorted(fields))})"
        elif item["type"] == "missing" and place == "suite":
            message = "name the tasks, as in --suite minigrid/mt3; see mtrl list suites"
        elif item["type"] == "literal_error":
            near = registry.nearest(str(item["input"]), re.findall(r"'([^']*)'", message))
            given[place] = f", got {item['input']!r}" + (f"; did you mean {near!r}?" if near else "")
        elif item["type"] not in ("missing", "value_error") and item["loc"]:  # else fields do not fit together
            given.setdefault(place, f", got {item['input']!r}")
        found.setdefault(place, []).append(message)
    lines = []
    for place, messages in found.items():
        text = " or ".join([messages[0], *(text[:1].lower() + text[1:] for text in messages[1:])])
        lines.append((f"{place}: " if place else "") + text + given.get(place, ""))
    return lines


_KIND = re.compile(r"constrained-\w+|(tuple|list|dict|literal)\[.*\]|int|float|str|bool|none")
"""A part of pydantic's path that names a kind which a value may be of, not a key."""


def _deeper(schema: type[BaseModel], key: str, prefix: str, agent: type[BaseModel] | None = None) -> Iterator[str]:
    """Settings in parts of ``schema`` that are called ``key``, the agent's first."""
    if agent is not None:
        yield from (f"agent.{key}" for name in agent.model_fields if name == key)
        yield from _deeper(agent, key, "agent.")
    for name, field in schema.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from (f"{prefix}{name}.{key}" for own in part.model_fields if own == key)
                yield from _deeper(part, key, f"{prefix}{name}.")


def _fields_at(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    parts = iter(loc)
    for part in parts:
        field = schema.model_fields.get(str(part))
        inner = field.annotation if field else None
        if get_origin(inner) is dict:  # the next part is a key of the user's
            next(parts, None)
        inner = next((one for one in get_args(inner) if isinstance(one, type) and issubclass(one, BaseModel)), inner)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    return list(schema.model_fields)
