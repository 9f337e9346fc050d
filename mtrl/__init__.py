"""mtrl: multi-task reinforcement learning. Any mix of tasks as one vectorized environment, agents, evaluation.

Public names load on first use, so that ``import mtrl`` costs nothing and worker processes stay small. Training and
evaluation live in modules of their own: ``from mtrl.train import train``, ``from mtrl.evaluate import evaluate``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtrl.registry import mix, tasks
    from mtrl.runs import Policy, export, load
    from mtrl.spaces import make_spec
    from mtrl.types import Suite, Task
    from mtrl.vector import MultiTaskVectorEnv

__version__ = version("mtrl-suite")

_HOMES = {
    "MultiTaskVectorEnv": "mtrl.vector",
    "Policy": "mtrl.runs",
    "Suite": "mtrl.types",
    "Task": "mtrl.types",
    "export": "mtrl.runs",
    "load": "mtrl.runs",
    "make_spec": "mtrl.spaces",
    "mix": "mtrl.registry",
    "tasks": "mtrl.registry",
}

__all__ = [
    "MultiTaskVectorEnv",
    "Policy",
    "Suite",
    "Task",
    "export",
    "load",
    "make_spec",
    "mix",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
