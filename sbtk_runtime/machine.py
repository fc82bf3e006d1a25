"""What machine and which library versions a figure was measured with."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Distributions whose version can change a figure, in the order in which they are shown.
DISTRIBUTIONS = (
    "sbtk",
    "numpy",
    "pillow",
    "hnswlib",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "torch",
    "torchvision",
    "faiss-cpu",
)


@dataclass(frozen=True)
class Machine:
    """The machine and software of one run.

    Attributes:
        cpu: the processor's model name.
        cores: logical cores that affinity and a container's quota leave to this process.
        cores_total: logical cores that the machine has.
        memory_bytes: memory that this process may use: the machine's, or a container's limit.
        system: operating system and architecture.
        python: version of Python.
        versions: of the installed libraries that matter.
        load_1min: the machine's load average as the run began; above 0 it was not alone.
        date: when, UTC, ISO 8601.
    """

    cpu: str
    cores: int
    cores_total: int
    memory_bytes: int
    system: str
    python: str
    load_1min: float
    date: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Returns what a person wants to read above a table of figures."""
        of_all = "" if self.cores == self.cores_total else f" of {self.cores_total}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.cpu}, {self.cores}{of_all} cores, {self.memory_bytes / 2**30:.1f} GiB, "
            f"load {self.load_1min:.2f}",
            f"{self.system}, Python {self.python}, {self.date}",
            versions,
        ]


def this_machine() -> Machine:
    """Returns the machine that this process runs on; unknown parts say so or are 0."""
    return Machine(
        cpu=_cpu_model(),
        cores=cpu_threads(),
        cores_total=os.cpu_count() or 0,
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=installed_versions(),
    )


def installed_versions(names: tuple[str, ...] = DISTRIBUTIONS) -> dict[str, str]:
    """Returns the versions of those of `names` that are installed, without importing any."""
    from importlib import metadata

    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def resident_bytes() -> int:
    """Returns the memory that this process holds now, in bytes; 0 where Linux's /proc is absent."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Returns the most memory that this process ever held, in bytes; 0 without Linux's /proc."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown processor"


def _memory_bytes() -> int:
    """Returns the smaller of the machine's memory and the control group's limit."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            sizes.append(int(text))
    return min(sizes, default=0)


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
