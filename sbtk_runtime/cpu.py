"""How many CPU threads this process may keep busy, containers included."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def cpu_threads() -> int:
    """Returns the number of CPUs that affinity and the cgroup's quota leave us, at least 1."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS, not on Windows
        available = os.cpu_count() or 1
    quota = quota_cpus(_CGROUPS, _own_cgroup())
    return max(1, available if quota is None else min(available, math.ceil(quota)))


def quota_cpus(root: Path, own: str) -> float | None:
    """Returns the smallest CPU quota from our cgroup up to `root`; `None` if there is none.

    Args:
        root: where cgroups are mounted.
        own: our group's path below it, such as `/user.slice`; in a container often `/`.
    """
    folder = root / own.strip("/")
    quotas = []
    # A container may show the host's path for our group, but mount only our own group as root.
    for group in (folder, *folder.parents):
        quotas += [quota for quota in (_quota_v2(group),) if quota is not None]
        if group == root:
            break
    quotas += [quota for quota in (_quota_v1(root / "cpu"),) if quota is not None]
    return min(quotas, default=None)


def _own_cgroup() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "/"
    unified = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    return unified[0] if unified else "/"


def _quota_v2(group: Path) -> float | None:
    """Returns what `cpu.max` says: `"150000 100000"` are 1.5 CPUs, `"max 100000"` is no quota."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
