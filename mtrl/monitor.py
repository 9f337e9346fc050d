"""What happened since the last record: training episodes per task and the agent's metrics.

Part of the checkpoint, so that a resumed run writes the very records that the uninterrupted one writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtrl.highlights import Highlights
from mtrl.types import Episode, Spec, success_rate


class Monitor:
    """Averages the latest ``window`` episodes of each task and the agent's metrics between two records."""

    def __init__(self, spec: Spec, window: int) -> None:
        self.spec = spec
        self.recent: list[deque[tuple[float, int, bool | None]]] = [deque(maxlen=window) for _ in spec.tasks]
        self.episodes = [0] * len(spec.tasks)
        self.updates = 0
        self.highlights = Highlights(spec)
        self._sums: dict[str, list[float]] = {}

    def episode(self, episode: Episode, step: int) -> None:
        """Count a training episode that finished at the environment step ``step``."""
        self.highlights.add(episode, step)
        self.recent[episode.task].append((episode.ret, episode.length, episode.success))
        self.episodes[episode.task] += 1

    def update(self, metrics: Mapping[str, float]) -> None:
        """Count an update of the agent; ``{}`` means that it was not time for one."""
        if not metrics:
            return
        self.updates += 1
        for name, value in metrics.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += float(value)
            total[1] += 1

    def flush(self) -> dict[str, float]:
        """Metrics for one record: ``charts/*`` over recent episodes, the agent's metrics averaged since the last."""
        flat: dict[str, float] = {"charts/episodes": sum(self.episodes), "charts/updates": self.updates}
        means: dict[str, list[float]] = {}
        for info, recent in zip(self.spec.tasks, self.recent, strict=True):
            if not recent:
                continue
            ret = float(np.mean([r for r, _, _ in recent]))
            low, high = info.score
            values = {
                "return": ret,
                "score": (ret - low) / (high - low),
                "length": float(np.mean([n for _, n, _ in recent])),
            }
            rate = success_rate([s for _, _, s in recent])
            if rate is not None:
                values["success_rate"] = rate
            for name, value in values.items():
                flat[f"charts/{info.name}_{name}"] = value
                means.setdefault(name, []).append(value)
        for name in ("return", "score", "success_rate"):
            if name in means:
                flat[f"charts/mean_{name}"] = float(np.mean(means[name]))
        flat.update({name: total / count for name, (total, count) in self._sums.items()})
        self._sums.clear()
        return flat

    def state_dict(self) -> dict[str, Any]:
        """Plain data and arrays."""
        return {
            "highlights": self.highlights.state_dict(),
            "recent": [[list(item) for item in recent] for recent in self.recent],
            "episodes": list(self.episodes),
            "updates": self.updates,
            "sums": {name: list(total) for name, total in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.highlights.load_state_dict(state.get("highlights", {}))  # older checkpoints have none
        saved: Sequence[Sequence[Sequence[Any]]] = state["recent"]
        for recent, items in zip(self.recent, saved, strict=True):
            recent.clear()
            recent.extend((float(r), int(n), s) for r, n, s in items)
        self.episodes = list(state["episodes"])
        self.updates = int(state["updates"])
        self._sums = {name: list(total) for name, total in state["sums"].items()}
