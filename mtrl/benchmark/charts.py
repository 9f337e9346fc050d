"""The lines of a suite's charts, for the report and for papers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mtrl.benchmark.analysis import TAUS, SuiteResult
from mtrl.benchmark.svg import Series


def curves(suite: SuiteResult, index: Mapping[str, int], hours: bool = False) -> list[Series]:
    """IQM over training with its interval, against environment steps or core-hours (of agents that have them)."""
    series = []
    for entry in suite.entries:
        x = entry.curve.hours if hours else entry.curve.steps
        if np.isfinite(x).all():
            points = np.array([(point.value, point.low, point.high) for point in entry.curve.points]).T
            series.append(Series(index[entry.agent], entry.agent, x, points[0], points[1], points[2]))
    return series


def task_curves(suite: SuiteResult, task: str, index: Mapping[str, int]) -> list[Series]:
    """Mean score on one task over training."""
    return [
        Series(index[entry.agent], entry.agent, entry.curve.steps, entry.curve.tasks[:, entry.tasks.index(task)])
        for entry in suite.entries
        if task in entry.tasks
    ]


def profiles(suite: SuiteResult, index: Mapping[str, int]) -> list[Series]:
    """Performance profiles with their bands."""
    return [Series(index[entry.agent], entry.agent, TAUS, *entry.profile, steps=True) for entry in suite.entries]
