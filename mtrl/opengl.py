"""Several MuJoCo renderers of Gymnasium in one process: each draws, and is given up, in its own OpenGL context.

Gymnasium 1.4 does neither. A renderer draws into whichever context is current, the one made last, so that pictures of
several environments are mixed up or black; and closing one deletes the textures and buffers of the current one, whose
OpenGL numbers are the same. Nothing raises.
"""

from __future__ import annotations

from typing import Any


def claim(env: Any) -> None:
    """Make the context of ``env`` current before it renders; does nothing unless it is a Gymnasium MuJoCo one.

    Raises whatever MuJoCo raises where there is no OpenGL.
    """
    renderer = _renderer(env)
    if renderer is not None:
        renderer._get_viewer(env.unwrapped.render_mode).make_context_current()


def release(env: Any) -> None:
    """Give up what ``env`` holds in OpenGL, before it is closed; does nothing unless it is a Gymnasium MuJoCo one."""
    renderer = _renderer(env)
    for viewer in renderer._viewers.values() if renderer is not None else ():
        viewer.make_context_current()
        viewer.con.free()


def _renderer(env: Any) -> Any:
    found = getattr(getattr(env, "unwrapped", None), "mujoco_renderer", None)
    return found if hasattr(found, "_viewers") else None
