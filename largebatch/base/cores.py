"""Count the processor cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def affinity() -> list[int]:
    """Return the numbers of the cores that the system schedules this process on: ``taskset`` and cpusets limit them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def allowed_cores(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Return how many cores this process may use: the least of its affinity, its cgroups' quotas and SLURM's share.

    Args:
        root: The directory that holds ``proc`` and ``sys``.
        environment: In a job, SLURM names the job's processors on this node in it.
    """
    limits = [float(len(affinity())), *_quotas(root)]
    if "SLURM_JOB_ID" in environment:
        limits.append(float(environment.get("SLURM_CPUS_ON_NODE", "inf")))
    return max(1, int(min(limits)))


def _quotas(root: Path) -> list[float]:
    """Return processor seconds a second that this process's control groups allow, versions 1 and 2."""
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / (controllers and "cpu")
        group = tree / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(tree):
                break
            if controllers:
                quota, period = _read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(place / "cpu.max").partition(" ")
            if quota.strip().isdecimal() and period.strip().isdecimal():  # max or -1: no limit
                quotas.append(int(quota) / int(period))
    return quotas


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # this system has no such group
        return ""
