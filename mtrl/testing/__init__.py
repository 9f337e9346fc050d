"""For authors of suites and agents, here and elsewhere: contract checks and tasks with known values."""

from mtrl.testing.check import Finding, Report, check_suite
from mtrl.testing.probes import VALUES, Probes

__all__ = ["VALUES", "Finding", "Probes", "Report", "check_suite"]
