"""Fixtures of the vector's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mtrl.vector import MultiTaskVectorEnv


@pytest.fixture
def make() -> Iterator[Callable[..., MultiTaskVectorEnv]]:
    """Makes vectors that are closed after the test."""
    made: list[MultiTaskVectorEnv] = []

    def build(*args: Any, **kwargs: Any) -> MultiTaskVectorEnv:
        made.append(MultiTaskVectorEnv(*args, **kwargs))
        return made[-1]

    yield build
    for envs in made:
        envs.close()
