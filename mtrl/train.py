"""The training loop: one for every agent, every suite and every backend.

The agent learns while the environments move. Since ``update`` sees the data up to the previous step only, a run is
bit-identical wherever its environments live, and a run that was interrupted at a checkpoint and resumed ends with
the same parameters, records and evaluation as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrl import checkpoint, registry, runs, transfer
from mtrl.config import ConfigError, RunConfig, dump_config
from mtrl.evaluate import Evaluation, StoppedError, evaluate
from mtrl.log import METRICS, Logger, read
from mtrl.monitor import Monitor
from mtrl.nn.linear import cautions
from mtrl.nn.size import network_sizes
from mtrl.registry import Mix
from mtrl.sampler import Sampled, spread, task_weights
from mtrl.signals import collected
from mtrl.sinks import TensorBoard
from mtrl.spaces import make_spec
from mtrl.types import Agent, Spec, Task
from mtrl.vector import EnvironmentFailedError, MultiTaskVectorEnv, RenderError
from mtrl.vector.cost import useful_workers
from mtrl.watch import record


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``signal`` is the number of the signal that interrupted it, or None when it is complete."""

    out: Path
    steps: int
    evaluation: Evaluation | None
    signal: int | None
    seconds: float


def train(config: RunConfig, out: Path, *, resume: bool = False) -> Summary:
    """Train an agent until ``config.steps`` environment steps; write everything to the folder ``out``.

    Args:
        config: what to run.
        out: the run's folder; must not hold a run, unless ``resume``.
        resume: go on from the newest intact checkpoint in ``out``.

    Raises:
        RunError: ``out`` already holds a run, or the run to resume is complete, is trained by another process or holds
            a policy alone; or an environment failed for good (its episode is then in ``failure.json``).
        FloatingPointError: a loss or parameter is not finite; names tensor, task and step. The last good
            checkpoint stays.
    """
    runs.set_up_torch(config)
    mix, _ = registry.mix(config.suite), checkpoint.versions()  # of the code as it is now
    tasks, spec = _sound(mix.tasks), make_spec(mix.tasks)
    agent = runs.make_agent(config, spec)
    copies, sampler = _slots(config, spec, mix, agent)
    saved = _saved(out, spec) if resume else None
    origin = transfer.prepare(agent, config, out, saved)
    getattr(agent, "reserve", lambda: None)()
    if config.log.tensorboard:
        TensorBoard.writer()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        envs = stack.enter_context(contextlib.closing(_vector(config, tasks, spec, copies, sampler)))
        # Only now: a mistake in the config leaves no folder behind.
        stack.enter_context(runs.claimed(out, config, saved.step if saved else None, resume=resume))
        logger = stack.enter_context(_logger(config, out, spec, saved.step if saved else None))
        stack.enter_context(_autopsy(out))
        actor = agent.actor(envs.layout, explore=True)
        monitor = Monitor(spec, config.log.window)
        parts: dict[str, Any] = {"agent": agent, "actor": actor, "envs": envs, "monitor": monitor}
        step = 0
        if saved is None:
            envs.reset()
        else:
            step = saved.step
            for name, part in parts.items():
                part.load_state_dict(saved.state[name])
            runs.go_on(out, config)
            logger.notice(f"resumed at step {step}")
        sizes = network_sizes(agent)
        for text in (*transfer.notices(sizes, origin), *cautions(agent)):
            logger.notice(text)

        def save() -> None:
            state = {name: part.state_dict() for name, part in parts.items()}
            meta = _meta(config, spec, origin)
            checkpoint.save(out / runs.CHECKPOINTS, step, state, meta, keep=config.checkpoint.keep)
            monitor.highlights.write(out / runs.EPISODES)

        interrupted = stack.enter_context(collected(signal.SIGINT, signal.SIGTERM))
        if saved is not None and _evaluates(config, step - sum(copies), step) and not _evaluated(out, step):
            _evaluate(config, agent, tasks, spec, logger, step, interrupted)
        logged, clock, faults, slots = step, time.monotonic(), 0, sum(copies)
        while step < config.steps and not interrupted:
            decision = actor(envs.obs)
            envs.step_async(decision.action)
            try:
                _learn(agent, monitor, sampler)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}, at environment step {step}; {_last_good(out)}") from error
            transition, _ = envs.step_wait(decision)
            agent.observe(transition)
            for fault in (new := envs.faults[faults:]):
                logger.notice(f"replaced a worker: {fault.splitlines()[0]}")
            faults += len(new)
            before, step = step, step + slots
            for episode in envs.episodes:
                monitor.episode(episode, step)
                if sampler is not None:
                    sampler.update(episode)
                logger.episode(tasks[episode.task].name, episode, step, tasks[episode.task].normalise(episode.ret))
            if _due(before, step, config.log.every) or step >= config.steps:
                metrics = monitor.flush() | (sampler.metrics() if sampler is not None else {})
                metrics["time/SPS"] = (step - logged) / max(time.monotonic() - clock, 1e-9)
                logger.log(metrics, step)
                logged, clock = step, time.monotonic()
            if _evaluates(config, before, step):
                paused = time.monotonic()
                _evaluate(config, agent, tasks, spec, logger, step, interrupted)
                clock += time.monotonic() - paused  # speed is that of training alone
            if _due(before, step, config.checkpoint.every) and step < config.steps:
                save()
        save()
        evaluation = _evaluate(config, agent, tasks, spec, logger, step, interrupted) if step >= config.steps else None
        if evaluation is not None:
            summary = {"steps": step, "parameters": sizes, "versions": checkpoint.versions(), "init": origin}
            summary |= {"threads": torch.get_num_threads(), "workers": envs.workers, "evaluation": evaluation.as_dict()}
            runs.write_summary(out, {**summary, "seconds": time.monotonic() - started})
            logger.summary(evaluation.metrics())
            if sizes and not monitor.updates:
                logger.notice(f"no update was recorded: {step} steps are fewer than this agent needs to learn from")
            _film(config, evaluation, out, logger, step)
        received = interrupted[0] if interrupted and evaluation is None else None
        logger.close("finished" if received is None else "interrupted")
    return Summary(out, step, evaluation, received, time.monotonic() - started)


def _evaluates(config: RunConfig, before: int, step: int) -> bool:
    """Whether there is an evaluation after this step, other than the one at the end."""
    return config.eval.every is not None and _due(before, step, config.eval.every) and step < config.steps


def _evaluated(out: Path, step: int) -> bool:
    """Whether the evaluation at the step of a checkpoint was done; a signal may have stopped it."""
    return any(row["step"] == step and "eval/mean_score" in row for row in read(out / METRICS))


def _evaluate(
    config: RunConfig,
    agent: Agent,
    tasks: Sequence[Task],
    spec: Spec,
    logger: Logger,
    step: int,
    interrupted: Sequence[int],
) -> Evaluation | None:
    """None: interrupted; the run does it when it is resumed."""
    settings = {"spec": spec, "episodes": config.eval.episodes, "seed": config.eval.seed, "stop": interrupted}
    settings |= {"workers": config.workers, "patience": config.patience}
    ways = (False, True) if config.eval.stochastic else (False,)
    try:
        found = [evaluate(agent, tasks, explore=explore, **settings) for explore in ways]
    except StoppedError as error:
        logger.notice(f"{error}: it is done when the run is resumed")
        return None
    for fault in (fault for each in found for fault in each.faults):
        logger.notice(f"replaced a worker: {fault.splitlines()[0]}")
    logger.evaluation({name: value for each in found for name, value in each.metrics().items()}, step)
    return found[0]


def _film(config: RunConfig, evaluation: Evaluation, out: Path, logger: Logger, step: int) -> None:
    """Videos of the evaluation, if wanted; tasks that cannot be drawn cost them, not the run."""
    if not config.eval.video:
        return
    try:
        for path in record(evaluation, out / runs.VIDEOS, step=step):
            logger.video(path, path.stem, step)
    except RenderError as error:
        logger.notice(f"no video: {error}")


@contextlib.contextmanager
def _autopsy(out: Path) -> Iterator[None]:
    """Keeps the episode in which an environment failed for good."""
    try:
        yield
    except EnvironmentFailedError as error:
        kept = runs.write_failure(out, error)
        where = f"its episode is in {kept}; " if kept else ""
        raise runs.RunError(f"{error}\n{where}{_last_good(out)}") from error


def _learn(agent: Agent, monitor: Monitor, sampler: Sampled | None) -> None:
    """Let the agent learn if it is time, and tell who wants to know."""
    metrics = agent.update()
    monitor.update(metrics)
    if sampler is not None and metrics:
        sampler.learned(agent)


def _slots(config: RunConfig, spec: Spec, mix: Mix, agent: Agent) -> tuple[list[int], Sampled | None]:
    """Copies of each task, and who decides what a slot plays next; None if every slot keeps its task."""
    if isinstance(config.copies, tuple) and len(config.copies) != len(spec.tasks):
        number = len(config.copies)
        raise ConfigError(f"copies has {number} entries for {len(spec.tasks)} tasks: give one number, or one each")
    if config.slots:
        try:
            copies = spread(config.slots, spec, task_weights(config.sampler.weights, spec, mix.parts))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif isinstance(config.copies, tuple):
        copies = list(config.copies)
    else:
        copies = [config.copies * each for each in mix.copies]
    if config.sampler.kind == "pinned":
        return copies, None
    if config.sampler.kind == "plr" and not hasattr(agent, "errors"):
        raise ConfigError(f"sampler plr scores by value errors, which {config.agent['kind']!r} does not tell; ppo does")
    home = [task for group in spec.groups for task in group.tasks for _ in range(copies[task])]
    return copies, Sampled(config.sampler, spec, home, config.seed, mix.parts)


def _sound(tasks: Sequence[Task]) -> Sequence[Task]:
    """The tasks, if what they say of themselves can be used: else it would be missed when the first episode ends, or
    when the results are written."""
    for task in tasks:
        low, high = task.score
        if not (math.isfinite(low) and math.isfinite(high) and low != high):
            raise ConfigError(f"{task.name}: its score {task.score} is no scale: give two finite numbers that differ")
        if not isinstance(task.horizon, int) or task.horizon < 1:
            raise ConfigError(f"{task.name}: its horizon is {task.horizon!r}: give a whole number from 1 on")
        try:
            json.dumps(dict(task.protocol))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{task.name}: its protocol cannot be written down ({error}): give texts") from None
    return tasks


def _vector(
    config: RunConfig, tasks: Sequence[Task], spec: Spec, copies: Sequence[int], sampler: Sampled | None
) -> MultiTaskVectorEnv:
    workers = useful_workers(tasks, spec, sum(copies)) if config.workers == "auto" else config.workers
    options = {"workers": workers, "schedule": sampler, "spec": spec, "patience": config.patience}
    try:
        return MultiTaskVectorEnv(tasks, copies, seed=config.seed, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]: a clock without state has none to lose."""
    return now // every > before // every


def _meta(config: RunConfig, spec: Spec, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint says of its making."""
    return {
        "config": config.model_dump(mode="json"),
        "tasks": runs.outline(spec),
        "versions": checkpoint.versions(),
        "init": origin,
    }


def _saved(out: Path, spec: Spec) -> checkpoint.Checkpoint | None:
    """What a run goes on from; None if it has no checkpoint yet, as when it was killed while it saved its first one."""
    folder = out / runs.CHECKPOINTS
    saved = checkpoint.load(folder) if checkpoint.saved_in(folder) else None
    if saved is not None:
        if saved.meta.get("exported"):
            raise runs.RunError(f"{out} holds a policy alone: it can be evaluated, not trained further")
        runs.check_tasks(saved, spec, out)
    return saved


def _last_good(out: Path) -> str:
    found = checkpoint.saved_in(out / runs.CHECKPOINTS)
    return f"last good checkpoint: {found[max(found)]}" if found else "there is no checkpoint yet"


def _logger(config: RunConfig, out: Path, spec: Spec, resume_at: int | None) -> Logger:
    log = config.log
    wanted = {"jsonl": True, "terminal": log.terminal, "wandb": log.wandb != "off", "tensorboard": log.tensorboard}
    plain: Mapping[str, Any] = {**config.model_dump(mode="json"), "config": dump_config(config)}
    return Logger(
        out,
        config=plain,
        total_steps=config.steps,
        sinks=[name for name, on in wanted.items() if on],
        wandb_mode=log.wandb,
        project=log.project,
        group=log.group or f"{config.agent['kind']} {config.suite}",
        tags=log.tags,
        tasks=[task.name for task in spec.tasks],
        resume_at=resume_at,
    )
