"""What a run shows: a live display on a terminal, one line per record elsewhere (files, pipes, CI)."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtrl.sinks import Sink
from mtrl.types import Episode, success_rate

_MEANS = {"return": "charts/mean_return", "score": "charts/mean_score", "success": "charts/mean_success_rate"}
_WINDOW = 50  # latest episodes that the table averages
_MIN_REFRESH = 0.5  # seconds between two drawings
_SHARE = 0.02  # of the run's time that drawing may take


def terminal(total_steps: int, tasks: Sequence[str] = (), start: int = 0, title: str = "") -> Sink:
    """The sink that suits stdout.

    Args:
        total_steps: environment steps of the whole run.
        tasks: names of the tasks, in order.
        start: the step that the run starts at.
        title: what runs, for the head of the live display.
    """
    console = Console()
    if console.is_terminal and console.is_interactive and not console.is_dumb_terminal:
        return Display(total_steps, tasks, start, title, console)
    return Plain(total_steps, start)


class Plain(Sink):
    """One line per record: progress, speed, time left and the means over tasks."""

    def __init__(self, total_steps: int, start: int = 0) -> None:
        self._clock = _Clock(total_steps, start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One line."""
        self._clock.step = step
        words = [self._clock.progress(), self._clock.speed(metrics), self._clock.left()]
        words += [f"{name} {_number(metrics[key])}" for name, key in _MEANS.items() if key in metrics]
        self.notice("  ".join(words))

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """One line."""
        self.notice(_evaluation(metrics, step))

    def notice(self, text: str) -> None:
        """The sentence on a line of its own."""
        print(text, file=sys.stdout, flush=True)


class Display(Sink):
    """Progress bar, a table of the latest training episodes per task, the agent's latest metrics.

    It is drawn from the training loop, without a thread, at most every half second and for at most 2 % of the time.
    """

    def __init__(self, total_steps: int, tasks: Sequence[str], start: int, title: str, console: Console) -> None:
        self._clock = _Clock(total_steps, start)
        self._title, self._console = title, console
        self._recent: dict[str, deque[tuple[float, float, bool | None]]] = {t: deque(maxlen=_WINDOW) for t in tasks}
        self._episodes = dict.fromkeys(tasks, 0)
        self._metrics: dict[str, float] = {}
        self._eval: dict[str, float] = {}
        self._next = 0.0
        # Without auto_refresh rich starts no thread that would compete with the learner.
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        self._draw()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show new metrics."""
        self._metrics = dict(metrics)
        self._clock.step = step
        self._draw()

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """Show the means as a line above the display and the tasks' scores in the table."""
        self._eval.update(metrics)
        self._console.print(Text(_evaluation(metrics, step), style="cyan"))
        self._draw()

    def episode(self, task: str, episode: Episode, step: int, score: float) -> None:
        """Count an episode."""
        self._recent.setdefault(task, deque(maxlen=_WINDOW)).append((episode.ret, score, episode.success))
        self._episodes[task] = self._episodes.get(task, 0) + 1
        self._clock.step = step
        if time.monotonic() >= self._next:
            self._draw()

    def notice(self, text: str) -> None:
        """The sentence above the display."""
        self._console.print(Text(text, style="yellow"))

    def close(self, status: str) -> None:
        """Leave the last state on the screen and give the cursor back."""
        try:
            self._draw()
        finally:
            self._live.stop()

    def _draw(self) -> None:
        began = time.monotonic()
        self._live.update(self._render(), refresh=True)
        now = time.monotonic()
        self._next = now + max(_MIN_REFRESH, (now - began) / _SHARE)

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=self._clock.total, completed=self._clock.step, width=max(10, self._console.width // 4)),
            Text(self._clock.progress(), style="bold"),
            Text(self._clock.speed(self._metrics), style="green"),
            Text(self._clock.left(), style="cyan"),
        )
        losses = [f"{key[7:]} {_number(value)}" for key, value in self._metrics.items() if key.startswith("losses/")]
        tail = Text("  ".join(losses), style="dim", no_wrap=True, overflow="ellipsis")
        title = Text(self._title, style="bold magenta", no_wrap=True, overflow="ellipsis")
        return Group(*([title] if self._title else []), head, self._table(), *([tail] if losses else []))

    def _table(self) -> Table:
        wide = self._console.width >= 90
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("task", no_wrap=True, overflow="ellipsis")
        for name in ("episodes", "return", "score", "success", "eval"):
            table.add_column(name, justify="right", no_wrap=True)
            if wide and name in ("score", "success"):
                table.add_column("", width=10)
        rows = [(name, *self._means(name)) for name in self._recent]
        room = max(1, self._console.height - 6)
        hidden = 0
        if len(rows) > room:  # those that still need to learn are the ones to watch
            hidden = len(rows) - max(1, room - 1)
            rows = sorted(rows, key=lambda row: -1e9 if row[2] is None else row[2])[: len(rows) - hidden]
        for name, ret, score, success in rows:
            cells: list[Any] = [name, f"{self._episodes[name]:,}", _number(ret)]
            cells += [_number(score), _bar(score)] if wide else [_number(score)]
            share = "-" if success is None else f"{success:.0%}"
            cells += [share, _bar(success)] if wide else [share]
            evaluated = self._eval.get(f"eval/{name}/success", self._eval.get(f"eval/{name}/score"))
            table.add_row(*cells, _number(evaluated))
        if hidden:
            table.add_row(Text(f"... and {hidden} more with better scores", style="dim"))
        return table

    def _means(self, task: str) -> tuple[float | None, float | None, float | None]:
        """Return, score and success of the latest episodes, None where there are none."""
        recent = self._recent[task]
        if not recent:
            return None, None, None
        count = len(recent)
        share = success_rate([success for _, _, success in recent])
        return sum(ret for ret, _, _ in recent) / count, sum(score for _, score, _ in recent) / count, share


class _Clock:
    """Where the run is and how long it will take."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.start, self.step = total, start, start
        self._began = time.monotonic()

    def _rate(self) -> float:
        return (self.step - self.start) / max(time.monotonic() - self._began, 1e-9)

    def progress(self) -> str:
        share = min(1.0, self.step / max(self.total, 1))
        return f"{share:4.0%}  {self.step:,}/{self.total:,} steps"

    def speed(self, metrics: Mapping[str, float]) -> str:
        return f"{metrics.get('time/SPS', self._rate()):,.0f} steps/s"

    def left(self) -> str:
        # From the overall rate, so that evaluations and checkpoints count too.
        rate = self._rate()
        return f"{timedelta(seconds=round(max(0, self.total - self.step) / rate))} left" if rate else "-:--:-- left"


def _evaluation(metrics: Mapping[str, float], step: int) -> str:
    means = {key.partition("/mean_")[2]: value for key, value in metrics.items() if "/mean_" in key}
    return f"evaluation at step {step:,}:  " + "  ".join(f"{name} {_number(value)}" for name, value in means.items())


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bar(value: float | None) -> ProgressBar | str:
    if value is None or value != value:
        return ""
    style = "red" if value < 1 / 3 else "yellow" if value < 2 / 3 else "green"
    return ProgressBar(total=1, completed=min(1.0, max(0.0, value)), complete_style=style, finished_style="green")
