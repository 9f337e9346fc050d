"""Run a grid on a Ray cluster: the same spec, the same folders, more machines. Needs the extra ``ray``.

The grid's folder must lie on a file system that all nodes share: runs, checkpoints and records live there, so that
a run whose node dies goes on from its last checkpoint on another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl.benchmark.attempt import MANIFEST, Attempt, BenchmarkError, Outcome, finished, folder_of, read_json
from mtrl.benchmark.engine import cores
from mtrl.benchmark.progress import Board
from mtrl.benchmark.spec import Job

_PAUSE = 0.2
_RETRIES = 5  # of a run whose node or worker died; a run that fails by itself is not tried again


@dataclass(frozen=True)
class Ray:
    """An engine that hands every run to Ray, which finds a node with enough free cores.

    Args:
        address: of the cluster; None: the one that ``RAY_ADDRESS`` names, or a new one on this machine.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        try:  # before there is a folder
            import ray  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise BenchmarkError("Ray is not installed: pip install 'mtrl-suite[ray]'") from None

    def __call__(
        self, jobs: Sequence[Job], root: Path, benchmark: str, board: Board, interrupted: Sequence[int]
    ) -> list[Outcome]:
        import ray  # pyright: ignore[reportMissingImports]

        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address=self.address, include_dashboard=None if self.address else False, log_to_driver=False)
        remote: Any = ray.remote(_train)
        root = root.resolve()  # workers run in other folders
        before = {job.name: _attempts(root, job) for job in jobs}
        pending = {
            remote.options(num_cpus=cores(job), max_retries=_RETRIES, name=job.name).remote(job, root, benchmark): job
            for job in jobs
        }
        queued, outcomes, cancelled = dict(pending), list[Outcome](), False
        while pending:
            if interrupted and not cancelled:
                cancelled = True
                for ref in pending:
                    ray.cancel(ref)
            for ref, job in list(queued.items()):
                if _attempts(root, job) > before[job.name]:
                    del queued[ref]
                    board.started(job)
            done, _ = ray.wait(list(pending), timeout=_PAUSE)
            for ref in done:
                outcome = _outcome(ray, ref, pending.pop(ref), root)
                queued.pop(ref, None)
                if outcome is not None:
                    outcomes.append(outcome)
                    board.ended(outcome)
            board.refresh()
        return outcomes


def _train(job: Job, root: Path, benchmark: str) -> Outcome:
    """Runs in a Ray worker: trains one run to its end; cancelled, it lets the run save its checkpoint."""
    if finished(root, job):  # its node died after it had finished
        return Outcome(job, folder_of(root, job), "finished", 0.0)
    attempt = Attempt(job, root, benchmark, "ray")
    outcome = None
    try:
        while outcome is None:
            time.sleep(_PAUSE)
            outcome = attempt.poll()
    except KeyboardInterrupt:
        attempt.stop()
        while outcome is None:
            time.sleep(_PAUSE)
            outcome = attempt.poll()
    return outcome


def _outcome(ray: Any, ref: Any, job: Job, root: Path) -> Outcome | None:
    """What became of a task; None if it was cancelled before it began."""
    try:
        return ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return None
    except (ray.exceptions.RayError, BenchmarkError) as error:
        return Outcome(job, folder_of(root, job), "failed", 0.0, str(error).strip().splitlines()[-1])


def _attempts(root: Path, job: Job) -> int:
    path = folder_of(root, job) / MANIFEST
    return len(read_json(path).get("attempts", ()))
