"""Run a grid on this machine: as many runs at once as fit its cores, each in a process of its own.

Interrupt it at any time, or kill it with all its runs: ``resume`` goes on where every run stopped, and the results are
the same bits. Finished runs are never done again, and one that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from mtrl import runs
from mtrl.benchmark.attempt import (
    MANIFEST,
    RUNS,
    Attempt,
    BenchmarkError,
    Outcome,
    finished,
    folder_of,
    read_json,
    write_config,
)
from mtrl.benchmark.progress import Board
from mtrl.benchmark.settings import changed, completed, leaves
from mtrl.benchmark.spec import Job, Spec, dump_spec, plan, waves
from mtrl.files import write_text
from mtrl.machine import usable_cores
from mtrl.signals import collected

SPEC, GRID_LOCK = "spec.yaml", "grid.lock"
_PAUSE = 0.1  # seconds between looks at the running processes
_LAST_WORDS = 120.0  # seconds that interrupted runs get to save their checkpoints


@dataclass(frozen=True)
class Grid:
    """How a grid ended. ``signal`` is the number of the signal that interrupted it, or None."""

    total: int
    done_before: int
    outcomes: tuple[Outcome, ...]
    signal: int | None

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The runs that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    @property
    def complete(self) -> bool:
        """Whether every run of the grid is finished."""
        return self.done_before + sum(outcome.status == "finished" for outcome in self.outcomes) == self.total


class Engine(Protocol):
    """Runs jobs and reports to the board; returns when all are done or ``interrupted`` is not empty."""

    def __call__(
        self, jobs: Sequence[Job], root: Path, benchmark: str, board: Board, interrupted: Sequence[int]
    ) -> list[Outcome]: ...


def run_grid(spec: Spec, root: Path, engine: Engine, board: Board, *, resume: bool = False) -> Grid:
    """Run every job of the spec that is not finished yet.

    Args:
        spec: what to compare.
        root: the grid's folder; must not hold a grid, unless ``resume``.
        engine: ``Local`` or ``mtrl.benchmark.cluster.Ray``.
        board: told of all that happens.
        resume: go on with the grid in ``root``. The spec may have grown (seeds, agents, suites), but the runs that
            exist must be configured as the spec says.

    Raises:
        ConfigError: the spec cannot be run here.
        BenchmarkError: ``root`` holds a grid already, another one, or one that is running.
    """
    jobs = plan(spec)
    if (root / SPEC).exists() and not resume:
        raise BenchmarkError(f"{root} already holds a grid: go on with --resume, or choose another --out")
    for job in jobs:
        _same_config(root, job)
    _same_settings(root, jobs)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root), collected(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as interrupted:
        write_text(root / SPEC, dump_spec(spec))
        for job in jobs:
            write_config(job, root)
        todo = [job for job in jobs if not finished(root, job)]
        board.begin(jobs, todo, root)
        outcomes: list[Outcome] = []
        for wave in waves(jobs):
            ready = [job for job in wave if job in todo]
            if ready and not interrupted:
                outcomes += engine(ready, root, spec.name, board, interrupted)
        board.end()
    return Grid(len(jobs), len(jobs) - len(todo), tuple(outcomes), interrupted[0] if interrupted else None)


@dataclass(frozen=True)
class Local:
    """A pool of processes on this machine.

    Args:
        slots: runs at the same time; None: as many as the cores allow with the threads and workers of each.
    """

    slots: int | None = None

    def __call__(
        self, jobs: Sequence[Job], root: Path, benchmark: str, board: Board, interrupted: Sequence[int]
    ) -> list[Outcome]:
        waiting, running, outcomes = list(jobs), list[Attempt](), list[Outcome]()
        slots = self.slots or max(1, usable_cores() // max((cores(job) for job in jobs), default=1))
        try:
            while waiting or running:
                while waiting and len(running) < slots and not interrupted:
                    job = waiting.pop(0)
                    try:
                        running.append(Attempt(job, root, benchmark, "local"))
                    except BenchmarkError as error:
                        outcomes.append(Outcome(job, folder_of(root, job), "failed", 0.0, str(error)))
                        board.ended(outcomes[-1])
                    else:
                        board.started(job)
                if interrupted:
                    break
                time.sleep(_PAUSE)
                outcomes += _collect(running, board)
                board.refresh()
        finally:
            outcomes += _stop(running, board)
        return outcomes


def cores(job: Job) -> int:
    """Cores that a run keeps busy: its torch threads and its worker processes."""
    workers = job.config.workers
    return job.config.threads + (workers if workers != "auto" else usable_cores())


def _collect(running: list[Attempt], board: Board) -> list[Outcome]:
    """Take the attempts that ended out of ``running``."""
    ended = []
    for attempt in list(running):
        outcome = attempt.poll()
        if outcome is not None:
            running.remove(attempt)
            ended.append(outcome)
            board.ended(outcome)
    return ended


def _stop(running: list[Attempt], board: Board) -> list[Outcome]:
    """Let all save their checkpoints; end those that take too long."""
    for attempt in running:
        attempt.stop()
    ended: list[Outcome] = []
    patience = time.monotonic() + _LAST_WORDS
    try:
        while running and time.monotonic() < patience:
            ended += _collect(running, board)
            time.sleep(_PAUSE / 2)
    finally:  # also when a second Ctrl-C says that it takes too long
        for attempt in running:
            attempt.stop(signal.SIGKILL)
    while running:
        ended += _collect(running, board)
        time.sleep(_PAUSE / 10)
    return ended


def _same_config(root: Path, job: Job) -> None:
    path = folder_of(root, job) / runs.CONFIG
    if not path.exists():
        return
    old, new = completed(yaml.safe_load(path.read_text(encoding="utf-8"))), job.config.model_dump(mode="json")
    places = [place for place, a, b in leaves(old, new) if a != b and not place.startswith("log.")]
    if places:
        raise BenchmarkError(
            f"{path.parent} was started with other settings ({', '.join(places)}): "
            "undo the change in the spec, give the agent a new label, or choose another --out"
        )


def _same_settings(root: Path, jobs: Sequence[Job]) -> None:
    """Runs of seeds that the spec does not name any more stand in the same tables: they are compared, too."""
    ours = {(job.agent, job.suite, job.task): job for job in jobs}
    planned = {folder_of(root, job) for job in jobs}
    for path in sorted(root.glob(f"{RUNS}/*/{MANIFEST}")):
        manifest = read_json(path)
        job = ours.get((manifest.get("agent", ""), manifest.get("suite", ""), manifest.get("task")))
        if job is None or path.parent in planned or not (path.parent / runs.CONFIG).exists():
            continue
        if places := changed(manifest["config"], job.config.model_dump(mode="json")):
            raise BenchmarkError(
                f"{path.parent}, of the same agent, was started with other settings ({', '.join(places)}): undo the "
                "change in the spec, give the agent a new label, or choose another --out"
            )


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One engine a grid; the lock goes with the process, however it ends."""
    with (root / GRID_LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchmarkError(f"another process runs the grid in {root}: wait for it or stop it") from None
        yield
