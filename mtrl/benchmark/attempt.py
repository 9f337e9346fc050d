"""One run of a grid in a process of its own: an ordinary ``mtrl train``, started or resumed, watched and accounted for.

::

    DIR/configs/AGENT--SUITE.yaml        what ``mtrl train`` is given
    DIR/runs/AGENT--SUITE--SEED/         the run's folder (``mtrl.runs``), and beside its files:
        manifest.json                    what ran where, for how long, at what cost, and how it ended
        stdout.log                       what it printed
        lock                             held by the process that trains it

The lock is what makes a grid safe to restart: a run whose engine was killed goes on alone, and whoever claims it next
stops it first (it saves a checkpoint) and resumes it. Nothing is ever trained twice at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from mtrl import runs
from mtrl.benchmark.spec import PROTOCOL, Job
from mtrl.checkpoint import read_versions
from mtrl.config import dump_config
from mtrl.files import write_text

RUNS, CONFIGS, MANIFEST, LOCK, OUTPUT = "runs", "configs", "manifest.json", "lock", "stdout.log"
Status = Literal["running", "finished", "failed", "interrupted"]
_ORPHAN_SECONDS = 600.0  # that an orphan gets to finish what it cannot interrupt: an evaluation, a checkpoint
_PAUSE = 0.1


class BenchmarkError(RuntimeError):
    """A grid that cannot go on as asked; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. ``reason`` is the error that a failed run printed, or its last line."""

    job: Job
    folder: Path
    status: Status
    seconds: float
    reason: str = ""


def folder_of(root: Path, job: Job) -> Path:
    """The run's folder in the grid's."""
    return root / RUNS / job.name


def finished(root: Path, job: Job) -> bool:
    """Whether the run is complete: its final evaluation covers all its steps."""
    return read_json(folder_of(root, job) / runs.SUMMARY).get("steps", 0) >= job.config.steps


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; {} if there is no such file. BenchmarkError if it holds something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is damaged ({error}): move {path.parent} away, or run it again") from None
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} is damaged (no object): move {path.parent} away, or run it again")
    return found


class Attempt:
    """A process that trains ``job``, from its newest checkpoint if there is one.

    Args:
        job: what to train.
        root: the grid's folder.
        benchmark: the grid's name.
        engine: who starts it, for the manifest.

    Raises:
        BenchmarkError: another process trains this run and does not end.
    """

    def __init__(self, job: Job, root: Path, benchmark: str, engine: str) -> None:
        self.job, self.folder = job, folder_of(root, job)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _claim(self.folder)
        try:
            self._command = _command(job, root)
            self._manifest = _manifest(job, benchmark, engine, self._command, self.folder)
            self._started = time.monotonic()
            self._write("running", started=time.time(), host=socket.gethostname())
            threads = {name: str(job.config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            with (self.folder / OUTPUT).open("ab") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **threads},
                    pass_fds=(lock,),  # the process holds the lock as long as it lives, whatever becomes of us
                    start_new_session=True,  # Ctrl-C is for the engine, which passes it on once
                )
            os.pwrite(lock, f"{socket.gethostname()} {self._process.pid}\n".encode(), 0)
        finally:
            os.close(lock)

    def poll(self) -> Outcome | None:
        """How it ended, or None while it runs."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            return None
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        asked = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
        ended: Status = "finished" if code == 0 else "interrupted" if code in asked else "failed"
        seconds = time.monotonic() - self._started
        reason = "" if ended == "finished" else _reason(self.folder / OUTPUT) or f"exit status {code}"
        if code == -signal.SIGKILL:
            reason = "killed (SIGKILL); if nobody did it, the machine ran out of memory"
        self._write(
            ended,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_memory=usage.ru_maxrss * 1024,  # the largest process of the run, bytes
            exit=code,
        )
        return Outcome(self.job, self.folder, ended, seconds, reason)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the run to save a checkpoint and end; SIGKILL ends it, and its environments, at once."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _write(self, status: Status, **attempt: Any) -> None:
        self._manifest["status"] = status
        self._manifest["attempts"][-1].update(attempt)
        write_text(self.folder / MANIFEST, json.dumps(self._manifest, indent=1) + "\n")


def hardware() -> dict[str, Any]:
    """What this machine is: processor, cores, memory in bytes, GPU."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _command(job: Job, root: Path) -> list[str]:
    folder = folder_of(root, job)
    train = [sys.executable, "-m", "mtrl.cli", "train"]
    if (folder / runs.CONFIG).exists():
        return [*train, "--resume", str(folder)]
    config = root / CONFIGS / f"{job.stem}.yaml"
    return [*train, str(config), "--seed", str(job.seed), "--out", str(folder)]


def write_config(job: Job, root: Path) -> None:
    """Write what all seeds of the job's agent and suite are started with."""
    path = root / CONFIGS / f"{job.stem}.yaml"
    write_text(path, dump_config(job.config.model_copy(update={"seed": 0})))


def _manifest(job: Job, benchmark: str, engine: str, command: list[str], folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    before = read_json(path)
    plain = job.config.model_dump(mode="json")
    return {
        "format": 1,
        "protocol": PROTOCOL,
        "benchmark": benchmark,
        "agent": job.agent,
        "suite": job.suite,
        **({"task": job.task, "tasks": job.tasks} if job.task else {}),
        "seed": job.seed,
        "steps": job.config.steps,
        "command": before.get("command", ["mtrl", *command[3:]]),
        "backend": {"engine": engine, **{key: plain[key] for key in ("device", "threads", "workers")}},
        "config": plain,
        "versions": read_versions(),  # of now, when the run's process starts
        "hardware": hardware(),
        "attempts": [*before.get("attempts", []), {}],
    }


def _claim(folder: Path) -> int:
    """A descriptor that holds the run's lock; ends an orphan of an earlier engine first, and waits for it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    asked, patience = False, time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            host, _, pid = os.pread(lock, 200, 0).decode().strip().partition(" ")
            if not asked and host == socket.gethostname() and pid.isdecimal():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)  # it holds the lock, so it is ours
                asked = True
            if time.monotonic() > patience:
                os.close(lock)
                raise BenchmarkError(
                    f"{folder} is being trained by process {pid or '?'} on {host or '?'}: wait for it or stop it"
                ) from None
            time.sleep(_PAUSE)
        else:
            os.ftruncate(lock, 0)  # nobody shall stop a process for a number that an earlier attempt left
            return lock


def _reason(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].strip()
