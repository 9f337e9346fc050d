"""A run's folder, and a trained policy in two lines.

::

    runs/x/config.yaml            the whole configuration
    runs/x/metrics.jsonl          every record (the truth)
    runs/x/checkpoints/step-N/    tensors (safetensors), plain state (JSON), manifest with hashes
    runs/x/episodes.json          best, worst and last training episode of each task: seed, actions, return, ...
    runs/x/summary.json           final evaluation with every episode, versions, time
    runs/x/failure.json           the episode in which an environment failed for good: task, seed, actions, traceback
    runs/x/videos/
    runs/x/training.lock          held by the process that trains it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete

from mtrl import checkpoint, registry
from mtrl.config import ConfigError, RunConfig, dump_config, load_config
from mtrl.files import write_text
from mtrl.machine import usable_cores
from mtrl.spaces import Codec, codec, make_spec
from mtrl.types import Agent, Layout, Obs, Spec, Task
from mtrl.vector import EnvironmentFailedError
from mtrl.vector.slots import bounded

CONFIG, SUMMARY, CHECKPOINTS, VIDEOS = "config.yaml", "summary.json", "checkpoints", "videos"
FAILURE, EPISODES, LOCK = "failure.json", "episodes.json", "training.lock"


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


def start(out: Path, config: RunConfig) -> None:
    """Make a new run folder; refuses one that already holds a run."""
    if (out / CONFIG).exists():
        raise RunError(f"{out} already holds a run: resume it (mtrl train --resume {out}) or choose another --out")
    try:
        write_text(out / CONFIG, dump_config(config))
    except OSError as error:
        raise RunError(f"cannot make the run folder {out}: {error.strerror}") from error


@contextlib.contextmanager
def claimed(out: Path, config: RunConfig, step: int | None, *, resume: bool) -> Iterator[None]:
    """The run's folder while one process trains it, which the lock ends with, however it ends.

    Args:
        out: the folder; made, unless ``resume``.
        config: of the run.
        step: of the checkpoint to go on from, if there is one.
        resume: the run was begun before.

    Raises:
        RunError: it holds a run already, or is complete, or another process trains it.
    """
    if not resume:
        start(out, config)
    with (out / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process trains {out}: wait for it or stop it") from None
        if resume and step is not None and step >= config.steps and (out / SUMMARY).exists():
            raise RunError(f"{out} is complete at step {step}; to go on, ask for more with --steps")
        if resume and step is None:  # it begins anew
            go_on(out, config)
        yield


def go_on(out: Path, config: RunConfig) -> None:
    """A run that goes on, perhaps for more steps, has these in its ``config.yaml``, and no summary of fewer.

    For when its state is loaded: until then the run is what it was.
    """
    write_text(out / CONFIG, dump_config(config))
    (out / SUMMARY).unlink(missing_ok=True)


def config_of(out: Path) -> RunConfig:
    """The configuration that a run was started with."""
    if not (out / CONFIG).is_file():
        near = registry.nearest(out.name, [p.parent.name for p in out.parent.glob(f"*/{CONFIG}")])
        raise RunError(f"{out} holds no run (no {CONFIG})" + (f"; did you mean {out.parent / near}?" if near else ""))
    return load_config(out / CONFIG)


def outline(spec: Spec) -> list[list[str]]:
    """What networks are made for, as plain data for a checkpoint: name, leaves and action of each task, in order."""
    found = []
    for task in spec.tasks:
        group = spec.group(task.group)
        leaves = [f"{name} {'x'.join(map(str, box.shape))} {box.dtype}" for name, box in sorted(group.leaves.items())]
        action = group.action
        kind = f"{action.n} actions" if isinstance(action, Discrete) else f"actions of {action.shape[0]} numbers"
        found.append([task.name, f"{', '.join(leaves)}; {kind}"])
    return found


def check_tasks(saved: checkpoint.Checkpoint, spec: Spec, out: Path) -> None:
    """Refuse a checkpoint that was made for other tasks than the run's suite gives today.

    Raises:
        RunError: names the first task that differs, and what it was.
    """
    now = outline(spec)
    then = saved.meta.get("tasks", now)  # checkpoints of before have none
    if then == now:
        return
    fix = "bring the environments of that time back (its packages are in the checkpoint's manifest), or train anew"
    names, old = ([name for name, _ in one] for one in (now, then))
    if names != old:
        raise RunError(f"{out} was trained on {', '.join(old)}, which now are {', '.join(names)}: {fix}")
    name, was, now_is = next((a[0], b[1], a[1]) for a, b in zip(now, then, strict=True) if a != b)
    raise RunError(f"{out} was trained when {name} had {was}; now it has {now_is}: {fix}")


def write_failure(out: Path, error: EnvironmentFailedError) -> Path | None:
    """Keep the episode in which an environment failed, so that it can be played again; None if it is not known."""
    if error.journal is None:
        return None
    journal = error.journal
    found = {"task": journal.task, "seed": journal.seed, "actions": journal.actions.tolist(), "error": str(error)}
    if error.trace or error.__cause__ is not None:
        found["traceback"] = error.trace or "".join(traceback.format_exception(error.__cause__))
    write_text(out / FAILURE, json.dumps(found, indent=1) + "\n")
    return out / FAILURE


def device_of(config: RunConfig) -> str:
    """``auto`` is CUDA when there is one; asking for a missing one is an error."""
    import torch

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch finds no CUDA device; use auto or cpu")
    return config.device


def set_up_torch(config: RunConfig) -> None:
    """Let torch compute as in the run: as many threads, and the same bits every time."""
    import torch

    torch.set_num_threads(config.threads or usable_cores())
    reproducible(device_of(config))


def reproducible(device: str) -> None:
    """Make torch compute the same bits in every run on ``device``; call it before anything is computed there.

    A CPU's kernels do so by themselves (for one number of threads). On CUDA, sums by atomics are replaced by ordered
    ones and cuBLAS gets a workspace of fixed size (https://docs.pytorch.org/docs/stable/notes/randomness.html); an
    operation that has no ordered form warns and names itself.
    """
    if device == "cuda":
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # made at run time


def make_agent(config: RunConfig, spec: Spec) -> Agent:
    """A fresh agent for the tasks of ``spec``.

    Raises:
        ConfigError: the agent refuses the tasks or the settings; says why.
    """
    made, options, device = registry.agent(config.agent["kind"]), config.agent_config(), device_of(config)
    try:
        return made(spec, options, seed=config.seed, device=device)
    except ValueError as error:
        raise ConfigError(f"agent: {error}") from error


@dataclass
class Policy:
    """A trained agent that acts on raw observations of single environments, for use outside the suite."""

    agent: Agent
    spec: Spec
    codecs: tuple[Codec, ...]
    tasks: tuple[Task, ...]
    step: int

    def act(self, observation: Any, task: str | None = None, info: Mapping[str, Any] | None = None) -> Any:
        """The greedy action for one raw observation of ``task``, in the task's own action space.

        Args:
            observation: what the task's environment returned.
            task: its name; may be left out if the policy knows only one task.
            info: the environment's info, needed where legal actions arrive there.

        Raises:
            UnknownNameError: no such task.
            TypeError: the agent has memory, which one observation cannot carry; use ``agent.actor`` instead.
        """
        names = [one.name for one in self.spec.tasks]
        if task is None and len(names) == 1:
            task = names[0]
        if task not in names:
            raise registry.UnknownNameError("task", str(task), names)
        index = names.index(task)
        if self.agent.recurrent:
            raise TypeError("this agent has memory: step agent.actor(layout, explore=False) through the episode")
        group = self.spec.group(self.spec.tasks[index].group)
        leaves = {name: np.zeros((1, *box.shape), box.dtype) for name, box in group.leaves.items()}
        self.codecs[index].write(observation, info or {}, leaves, 0)
        layout = Layout({group.name: slice(0, 1)}, 1)
        actor = self.agent.actor(layout, explore=False)
        action = actor(Obs({group.name: leaves}, np.array([index]), np.array([True]))).action[group.name][0]
        return bounded(action, self.codecs[index].action) if np.ndim(action) else action


def load(out: str | Path, step: int | None = None) -> Policy:
    """The policy of a run folder or of an exported one, at its newest checkpoint or at ``step``.

    ::

        policy = mtrl.load("runs/x")
        action = policy.act(observation, "minigrid/LavaGapS7")

    Raises:
        RunError: the folder holds no run, or its tasks are no longer what they were.
        CheckpointError: no checkpoint is intact, or there is none of that step.
    """
    out = Path(out)
    policy = untrained(here(config_of(out)))
    saved = checkpoint.load(out / CHECKPOINTS, step)
    check_tasks(saved, policy.spec, out)
    policy.agent.load_policy(saved.state["agent"]["policy"])
    policy.step = saved.step
    return policy


def here(config: RunConfig) -> RunConfig:
    """The configuration, for a machine that may lack the GPU that it was trained on."""
    try:
        device_of(config)
    except ConfigError:
        return config.model_copy(update={"device": "cpu"})
    return config


def untrained(config: RunConfig) -> Policy:
    """The policy that a run of ``config`` begins with."""
    tasks = registry.tasks(config.suite)
    codecs = tuple(codec(task) for task in tasks)
    spec = make_spec(tasks, codecs)
    return Policy(make_agent(config, spec), spec, codecs, tasks, 0)


def export(out: str | Path, target: str | Path, step: int | None = None) -> Path:
    """Write only what acting needs (no optimiser, no replay) to ``target``, a folder that ``load`` reads."""
    out, target = Path(out), Path(target)
    config = config_of(out)
    if (target / CONFIG).exists():
        raise RunError(f"{target} already holds a run or a policy; choose another folder")
    saved = checkpoint.load(out / CHECKPOINTS, step)
    write_text(target / CONFIG, dump_config(config))
    policy = {"agent": {"policy": saved.state["agent"]["policy"]}}
    checkpoint.save(target / CHECKPOINTS, saved.step, policy, {**saved.meta, "exported": True})
    return target


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json``, atomically."""
    write_text(out / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
