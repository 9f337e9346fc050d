"""For authors of suites and agents, here and elsewhere: contract checks and tasks with known values.

``check_agent`` and ``drive`` load on first use: workers that build probe tasks import this package, and must not import
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtrl.testing.check import Finding, Report, check_suite
from mtrl.testing.probes import VALUES, Probes
from mtrl.testing.vector_check import check_vector_env

if TYPE_CHECKING:
    from mtrl.testing.agent_check import check_agent
    from mtrl.testing.loop import drive

__all__ = ["VALUES", "Finding", "Probes", "Report", "check_agent", "check_suite", "check_vector_env", "drive"]

_HOMES = {"check_agent": "mtrl.testing.agent_check", "drive": "mtrl.testing.loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtrl.testing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
