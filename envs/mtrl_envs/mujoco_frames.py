"""Pictures of MuJoCo environments, for the suites that have such: each of its own environment, and OpenGL asked for in
words when there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mtrl.opengl import claim

FRAME_SIZE = 240
"""Height and width of rendered frames, in pixels."""


def frame(env: Any) -> np.ndarray:
    """What the camera of a Gymnasium MuJoCo environment sees, [height, width, 3] uint8.

    Raises:
        RuntimeError: no OpenGL to draw with.
    """
    with opengl():
        claim(env)
    return env.mujoco_renderer.render("rgb_array")


@contextmanager
def opengl() -> Iterator[None]:
    """Around the first use of a renderer: what it raises without OpenGL becomes a message that says how to get it.

    Raises:
        RuntimeError: no OpenGL to draw with.
    """
    import mujoco

    try:
        yield
    except (vars(mujoco)["FatalError"], ImportError, AttributeError, RuntimeError) as error:
        raise RuntimeError(
            f"MuJoCo found no OpenGL to render with (MUJOCO_GL={os.environ.get('MUJOCO_GL')!r}): set MUJOCO_GL=egl "
            "(needs libegl1) or MUJOCO_GL=osmesa (needs libosmesa6) before Python starts"
        ) from error


def check_mode(render_mode: str | None) -> None:
    """Raises RuntimeError if an environment was built without ``render_mode="rgb_array"``."""
    if render_mode is None:
        raise RuntimeError('this environment does not render: build it with render_mode="rgb_array"')
