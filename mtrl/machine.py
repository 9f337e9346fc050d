"""How many cores this process may use, which on shared machines is not how many there are."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores of this process: its affinity (``taskset``, SLURM's cpusets) and its container's quota (``docker --cpus``).

    As many threads as the host has cores, on two of them, do nothing but wait for each other. Quotas are read as in
    joblib's loky (https://github.com/joblib/loky), rounded up.

    Args:
        cgroup: where the quota's files are (version 2: ``cpu.max``, version 1: ``cpu/cpu.cfs_*``).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:  # "max" or -1: none
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
