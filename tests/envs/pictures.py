"""Pictures of MuJoCo environments, drawn in a process of its own: OpenGL is chosen when a process starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_IN_TURN = """
import numpy as np
{imports}
makes = {makes}
alone = []
for make, name in makes:
    env = make(name, render_mode="rgb_array")
    env.reset(seed=0)
    alone.append(env.render())
    env.close()
envs = [make(name, render_mode="rgb_array") for make, name in makes]
for env in envs: env.reset(seed=0)
for _ in range(2):
    for env, picture in zip(envs, alone):
        seen = env.render()
        assert seen.shape == (240, 240, 3) and seen.dtype == np.uint8 and seen.std() > 5
        assert np.array_equal(seen, picture)
assert all(not np.array_equal(alone[0], other) for other in alone[1:])
{more}
for env in envs: env.close()
"""


def clean(**variables: str) -> dict[str, str]:
    """This process's environment without screen and without a choice of OpenGL, but with ``variables``."""
    kept = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    return {**kept, **variables}


def draw_in_turn(imports: str, makes: str, more: str = "") -> None:
    """Assert that environments alive together draw what each draws alone, or skip without EGL.

    Args:
        imports: statements.
        makes: a list of (class, what to make), with at least two pictures.
        more: statements about ``alone``, their first pictures.
    """
    script = _IN_TURN.format(imports=imports, makes=makes, more=more) + 'print("rendered")\n'
    done = subprocess.run([sys.executable, "-c", script], env=clean(MUJOCO_GL="egl"), capture_output=True, text=True)
    if "OpenGL" in done.stderr or "EGL device" in done.stderr:
        pytest.skip("no EGL on this machine")
    assert "rendered" in done.stdout, done.stderr
