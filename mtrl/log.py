"""What a run records. ``metrics.jsonl`` is the truth; terminal, Weights & Biases and TensorBoard only mirror it.

Names of metrics: ``charts/*`` (training episodes), ``losses/*`` (the agent), ``eval/<suite>/<task>/*`` (evaluation)
and ``time/*``. All that depends on the clock on the wall is under ``time/`` or is called ``wall``: everything else is
the same in every repetition of a run, and in a resumed one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mtrl.files import write_text
from mtrl.registry import UnknownNameError
from mtrl.sinks import Sink, TensorBoard, Wandb
from mtrl.types import Episode

_log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
SINKS = ("jsonl", "terminal", "wandb", "tensorboard")


class Jsonl(Sink):
    """One flushed line per record: ``{"step": ..., "wall": seconds since 1970, metric: value, ...}``.

    Non-finite values are the strings "nan", "inf" and "-inf", so that each line is valid JSON.

    Args:
        path: the file.
        resume_at: None starts a new file. A step keeps the records up to it and drops the later ones, which the
            resumed run will write again; so does a line cut short by a kill.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None and path.exists():
            _cut(path, resume_at)
        self._file: TextIO = path.open("w" if resume_at is None else "a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line."""
        values = {name: _jsonable(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "wall": time.time(), **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, status: str) -> None:
        """Flush to the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` with "nan" and "inf" turned back into floats; a half line is left out."""
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in record.items()}
        for record, _ in _records(path)
    ]


class Logger:
    """Passes records to the sinks. The JSONL comes first and must work; a mirror that fails is dropped with a notice.

    Use it as a context manager: leaving it closes the sinks, gives the terminal back, and marks the run as failed if
    an exception is the reason.

    Args:
        out: the run's folder.
        config: plain data that describes the run, for W&B and TensorBoard.
        total_steps: environment steps of the whole run, for the progress bar.
        sinks: any of ``SINKS``.
        wandb_mode: ``online``, ``offline``, or ``auto``: online if an API key is configured, else offline.
        project: W&B project.
        group: W&B group (agent and suite).
        job_type: W&B job type.
        tags: W&B tags.
        tasks: names of all tasks, in order, for the terminal's table; tasks of episodes are added as they come.
        resume_at: the step that the run resumes at, or None for a fresh start.

    Raises:
        UnknownNameError: a sink that does not exist.
        ImportError: TensorBoard was asked for and is not installed.
    """

    def __init__(
        self,
        out: Path,
        *,
        config: Mapping[str, Any],
        total_steps: int,
        sinks: Sequence[str] = ("terminal", "jsonl"),
        wandb_mode: str = "auto",
        project: str = "mtrl",
        group: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
        tasks: Sequence[str] = (),
        resume_at: int | None = None,
    ) -> None:
        for name in sinks:
            if name not in SINKS:
                raise UnknownNameError("sink", name, SINKS)
        self._truth = Jsonl(out / METRICS, resume_at) if "jsonl" in sinks else None
        self._mirrors: list[Sink] = []
        self._closed = False
        self._shown = "terminal" in sinks
        if "terminal" in sinks:
            from mtrl.terminal import terminal

            self._mirrors.append(terminal(total_steps, tasks, resume_at or 0, f"{group or 'mtrl'}  {out}"))
        if "tensorboard" in sinks:
            self._mirrors.append(TensorBoard(out / "tensorboard", config, resume_at))
        if "wandb" in sinks:
            about = {"project": project, "group": group, "job_type": job_type, "tags": tags}
            with self._forgiving("W&B"):
                self._mirrors.append(Wandb(out, config, mode=wandb_mode, **about))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of training at an environment step."""
        if self._truth:
            self._truth.log(metrics, step)
        self._tell("log", metrics, step)

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of an evaluation (names from ``eval/`` on) at an environment step."""
        if self._truth:
            self._truth.log(metrics, step)
        self._tell("evaluation", metrics, step)

    def episode(self, task: str, episode: Episode, step: int, score: float) -> None:
        """Show a finished training episode of ``task``; ``score`` is its normalised return. Not recorded."""
        self._tell("episode", task, episode, step, score)

    def notice(self, text: str) -> None:
        """Tell the user a sentence; on stderr, which a grid keeps, if there is no terminal display."""
        self._tell("notice", text)
        if not self._shown:
            print(text, file=sys.stderr, flush=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Hand the run's final results to the mirrors."""
        self._tell("summary", values)

    def video(self, path: Path, name: str, step: int) -> None:
        """Hand a video file to the mirrors that show videos."""
        self._tell("video", path, name, step)

    def close(self, status: str = "finished") -> None:
        """Close all sinks, once. ``status``: ``finished``, ``interrupted`` or ``failed``."""
        if self._closed:
            return
        self._closed = True
        if self._truth:
            self._truth.close(status)
        self._tell("close", status)

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _tell(self, method: str, *args: Any) -> None:
        for sink in list(self._mirrors):
            with self._forgiving(type(sink).__name__):
                getattr(sink, method)(*args)
                continue
            self._mirrors.remove(sink)
            with contextlib.suppress(Exception):  # already reported
                sink.close("failed")

    @contextlib.contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - days of training must not end because of a display or a server
            _log.warning("%s is off from now on: %s: %s", name, type(error).__name__, error)


def _jsonable(value: Any) -> int | float | str:
    if type(value) is int:
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _records(path: Path) -> list[tuple[dict[str, Any], str]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # only the last line of a killed run lacks its end
            found.append((json.loads(line), line))
    return found


def _cut(path: Path, step: int) -> None:
    write_text(path, "".join(line for record, line in _records(path) if record["step"] <= step))
