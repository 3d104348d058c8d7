"""Which cores this process may use, and how much of them."""

import math
import os
from pathlib import Path

ROOT = Path("/")


def own_cores() -> frozenset[int]:
    """Numbers of the cores that the scheduler may run this thread on, or of all cores on systems that do not tell."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def quota(root: Path = ROOT) -> float:
    """CPU time that the cgroups of this process (v1 or v2) grant it, in cores; inf without a limit.

    Args:
        root: the directory that holds `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    least = math.inf
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, files = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the path is often the host's, of which only the mount itself is visible.
        names = path.strip("/").split("/")
        for depth in range(len(names) + 1):
            least = min(least, _quota_of([mount.joinpath(*names[:depth], file) for file in files]))
    return least


def _quota_of(files: list[Path]) -> float:
    """Of one cgroup, whose files together hold a quota and a period."""
    try:
        granted, period = (int(value) for file in files for value in file.read_text().split())
    except (OSError, ValueError):  # no such file, or the quota is "max"
        return math.inf
    return granted / period if granted > 0 and period > 0 else math.inf
