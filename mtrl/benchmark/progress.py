"""What the runs of a grid are doing, live: read from their own records, so that it costs them nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtrl.benchmark.attempt import Outcome, folder_of
from mtrl.benchmark.spec import Job
from mtrl.log import METRICS

_EVERY = 1.0  # seconds between drawings
_TAIL = 1 << 16  # bytes at the end of a record file that surely hold its last lines


class Board:
    """Shows a grid's progress: a live table on a terminal, one line per event elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._running: dict[str, tuple[Job, float]] = {}
        self._done = self._failed = self._total = 0
        self._root = Path()
        self._drawn = self._began = 0.0

    def begin(self, jobs: Sequence[Job], todo: Sequence[Job], root: Path) -> None:
        """The grid starts: ``todo`` of ``jobs`` are not finished yet."""
        self._total, self._done, self._root = len(jobs), len(jobs) - len(todo), root
        self._began = time.monotonic()
        done = f" ({self._done} finished before)" if self._done else ""
        self.console.print(f"{len(jobs)} runs in {root}{done}")
        if self._live:
            self._live.start()

    def started(self, job: Job) -> None:
        """A run's process has started."""
        self._running[job.name] = (job, time.monotonic())
        if not self._live:
            self.console.print(f"{'started':<12}{job.name}", highlight=False)

    def ended(self, outcome: Outcome) -> None:
        """A run's process has ended."""
        self._running.pop(outcome.job.name, None)
        self._done += outcome.status == "finished"
        self._failed += outcome.status == "failed"
        score = last_record(outcome.folder).get("eval/mean_score")
        note = f"  score {score:.3f}" if score is not None and outcome.status == "finished" else ""
        colour = {"finished": "green", "failed": "red"}.get(outcome.status, "yellow")
        text = Text.assemble((f"{outcome.status:<12}", colour), f"{outcome.job.name}  {outcome.seconds:.0f} s{note}")
        self.console.print(text, soft_wrap=True)
        if outcome.reason:
            self.console.print(Text(f"            {outcome.reason}"), soft_wrap=True)
        if outcome.status == "failed":
            self.console.print(Text(f"            all it said: {outcome.folder / 'stdout.log'}"), soft_wrap=True)
        elif not self._live and outcome.status == "finished":
            self.console.print(f"{self._done} of {self._total} finished", highlight=False)

    def refresh(self) -> None:
        """Draw again if it is time."""
        if self._live and time.monotonic() - self._drawn >= _EVERY:
            self._drawn = time.monotonic()
            self._live.update(self._render(), refresh=True)

    def end(self) -> None:
        """The grid is over or interrupted."""
        if self._live:
            self._live.stop()

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column, justify in (("run", "left"), ("", "left"), ("steps", "right"), ("steps/s", "right")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("score", justify="right")
        for job, _ in self._running.values():
            record = last_record(folder_of(self._root, job))
            step = int(record.get("step", 0))
            score = record.get("eval/mean_score", record.get("charts/mean_score"))
            table.add_row(
                job.name,
                ProgressBar(total=job.config.steps, completed=step, width=24),
                f"{step:,}",
                f"{record['time/SPS']:,.0f}" if "time/SPS" in record else "",
                "" if score is None else f"{score:.2f}",
            )
        failed = f", {self._failed} failed" if self._failed else ""
        minutes = (time.monotonic() - self._began) / 60
        head = Text(f"{self._done} of {self._total} runs finished{failed}; {minutes:.1f} minutes", style="bold")
        return Group(head, table)


def last_record(folder: Path) -> Mapping[str, Any]:
    """The newest values of a run's records, merged from its last lines; {} if there are none yet."""
    path = folder / METRICS
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL), os.SEEK_SET)
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    merged: dict[str, Any] = {}
    for line in lines[-4:-1]:  # the piece after the last newline is not complete
        try:
            merged.update(json.loads(line))
        except json.JSONDecodeError:  # the first line may be cut where the tail begins
            continue
    return merged
