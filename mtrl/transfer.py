"""Start a run with what the tasks of another one share, to be learned further or left as it is.

As in MOORE's transfer experiments (https://arxiv.org/abs/2311.11385, section 5): the experts of actor and critics come
from a run on other tasks; heads and task weights are new. Freezing fresh weights shows what heads alone can do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtrl import checkpoint, registry, runs
from mtrl.config import ConfigError, InitConfig, RunConfig
from mtrl.nn.aggregation import task_parameters
from mtrl.nn.size import networks
from mtrl.types import Agent


def prepare(
    agent: Agent, config: RunConfig, out: Path, saved: checkpoint.Checkpoint | None = None
) -> dict[str, Any] | None:
    """Do what ``config.init`` says to a fresh agent's networks; a run that is resumed loads nothing but freezes again.

    Args:
        agent: holds its networks as attributes, under the names of its ``state_dict``.
        config: of this run.
        out: this run's folder.
        saved: what it is resumed from.

    Returns:
        where the weights come from, for the summary: run, step, hash of the checkpoint's manifest, suite, seed, parts,
        counts of the numbers taken and frozen; None without ``config.init``.

    Raises:
        ConfigError: the agent has no such parts.
        RunError: the source is no finished run of such an agent, or a shape differs; names the parameter.
    """
    init = config.init
    if init is None:
        return None
    chosen = {name: shared_parameters(net, init) for name, net in networks(agent).items()}
    count = sum(p.numel() for own in chosen.values() for p in own.values())
    if not count:
        raise ConfigError(f"init: agent {config.agent['kind']!r} has no shared parameters in {', '.join(init.parts)}")
    origin: dict[str, Any] = dict(saved.meta["init"]) if saved else _load(chosen, config, init, out)
    if init.freeze:
        for own in chosen.values():
            for parameter in own.values():
                parameter.requires_grad_(False)
    return {**origin, "parts": list(init.parts), "numbers": count, "frozen": count if init.freeze else 0}


def notices(sizes: Mapping[str, int], origin: Mapping[str, Any] | None) -> Iterator[str]:
    """What a run says of its networks at the start: how many numbers it trains, and what ``prepare`` returned."""
    if sizes:
        yield "parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    if origin is not None:
        source = "fresh weights" if origin["run"] is None else f"weights of {origin['run']}, step {origin['step']}"
        state = "frozen" if origin["frozen"] else "trained further"
        yield f"{', '.join(origin['parts'])}: {origin['numbers']:,} {source}, {state}"


def shared_parameters(net: nn.Module, init: InitConfig) -> dict[str, nn.Parameter]:
    """The parameters of ``init.parts`` that all tasks share, by name."""
    shared = {id(parameter) for parameter in task_parameters(net, by_group=True)[0]}
    wanted = {*init.parts, *(("head",) if "heads" in init.parts else ())}  # a critic has one for all groups
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if id(parameter) in shared and wanted & set(name.split("."))
    }


def _load(
    chosen: Mapping[str, Mapping[str, nn.Parameter]], config: RunConfig, init: InitConfig, out: Path
) -> dict[str, Any]:
    if init.run is None:
        return {"run": None}
    place = Path(init.run.format(runs=out.parent, seed=config.seed))
    source = runs.config_of(place)
    if source.agent["kind"] != config.agent["kind"]:
        raise runs.RunError(f"init: {place} was made by {source.agent['kind']!r}, not by {config.agent['kind']!r}")
    if init.step is None and not _finished(place, source):
        raise runs.RunError(f"init: {place} is not finished: finish it (mtrl train --resume {place}) or set init.step")
    saved = checkpoint.load(place / runs.CHECKPOINTS, init.step)
    state = saved.state["agent"]
    pairs = []
    for net, own in chosen.items():
        if net not in state:
            raise runs.RunError(f"init: {place} holds no {net!r} (it holds {', '.join(state)})")
        pairs += [(p, _match(f"{net}.{name}", name, p, state[net], place)) for name, p in own.items()]
    with torch.no_grad():  # only now: nothing is changed by a source that does not fit
        for parameter, value in pairs:
            parameter.copy_(value)
    manifest = json.loads((saved.path / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    about = {"suite": source.suite, "seed": source.seed, "git": saved.meta.get("versions", {}).get("git")}
    return {"run": str(place), "step": saved.step, "sha256": manifest["sha256"], **about}


def _match(place: str, name: str, parameter: nn.Parameter, state: Mapping[str, Tensor], source: Path) -> Tensor:
    """The source's value of a parameter."""
    if name not in state:
        near = registry.nearest(name, state)
        hint = f"; did you mean {near!r}?" if near else ""
        raise runs.RunError(f"init: {source} has no parameter {place}{hint}: make both networks with the same settings")
    if state[name].shape != parameter.shape:
        ours, theirs = (list(found.shape) for found in (parameter, state[name]))
        raise runs.RunError(f"init: {place} has shape {theirs} in {source} and {ours} here")
    return state[name]


def _finished(place: Path, config: RunConfig) -> bool:
    path = place / runs.SUMMARY
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["steps"] >= config.steps
