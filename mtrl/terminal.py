"""What a run shows: one line per record."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from mtrl.log import Sink


class Terminal(Sink):
    """Plain lines.

    Args:
        total_steps: environment steps of the whole run.
        tasks: names of the tasks, in order.
        start: the step that the run starts at.
    """

    def __init__(self, total_steps: int, tasks: Sequence[str] = (), start: int = 0) -> None:
        self.total, self.tasks, self.start = total_steps, list(tasks), start
        self._began = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One line: progress, speed, time left, means over tasks."""
        rate = (step - self.start) / max(time.monotonic() - self._began, 1e-9)
        left = timedelta(seconds=round((self.total - step) / rate)) if rate else "?"
        words = [f"{step:,}/{self.total:,} steps", f"{metrics.get('time/SPS', rate):,.0f}/s", f"{left} left"]
        words += [f"{name} {metrics[key]:.3g}" for name, key in _MEANS.items() if key in metrics]
        self._print("  ".join(words))

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """One line: means over tasks."""
        words = [f"{name[5:]} {value:.3g}" for name, value in metrics.items() if name.startswith("eval/mean_")]
        self._print(f"evaluation at {step:,}:  " + "  ".join(words))

    def notice(self, text: str) -> None:
        """The sentence."""
        self._print(text)

    def _print(self, *args: Any) -> None:
        print(*args, file=sys.stdout, flush=True)


_MEANS = {"return": "charts/mean_return", "score": "charts/mean_score", "success": "charts/mean_success_rate"}
