"""For authors of suites and agents, here and elsewhere: contract checks and tasks with known values."""

from mtrl.testing.probes import VALUES, Probes

__all__ = ["VALUES", "Probes"]
