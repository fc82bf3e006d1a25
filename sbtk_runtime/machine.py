"""This machine: processor, memory and what glibc does with it, CPU threads, installed libraries."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Distributions whose version can change a measurement, in the order in which they are shown.
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
    """The machine and software of a measurement.

    Attributes:
        cpu: the processor's model name.
        cores: logical cores that this process may use, by its affinity and a container's quota.
        cores_total: logical cores of the machine.
        memory_bytes: memory that this process may use: the machine's, or a container's limit.
        system: operating system and architecture.
        python: version of Python.
        versions: of the installed libraries in `DISTRIBUTIONS`.
        load_1min: the load average of the last minute before the measurement.
        date: of the measurement, UTC, in ISO 8601.
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
        """Return the fields as a JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines to print above a table of measurements."""
        of_all = "" if self.cores == self.cores_total else f" of {self.cores_total}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.cpu}, {self.cores}{of_all} cores, {self.memory_bytes / 2**30:.1f} GiB, "
            f"load {self.load_1min:.2f}",
            f"{self.system}, Python {self.python}, {self.date}",
            versions,
        ]


def this_machine() -> Machine:
    """Return the machine that this process runs on; unknown parts say so or are 0."""
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
    """Return the versions of those of `names` that are installed, without importing any."""
    from importlib import metadata

    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def extras() -> dict[str, tuple[str, ...]]:
    """Return the extras of the installed sbtk, and the distributions that each installs.

    There are none where sbtk is not installed but only on the path.
    """
    from importlib import metadata

    try:
        required = metadata.requires("sbtk") or ()
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for text in required:
        # Before the extra there may be other conditions, such as the system.
        match = re.match(r"([\w.-]+).*;.*\bextra == ['\"]([\w-]+)['\"]", text)
        # An extra that requires sbtk itself is another name of an extra.
        if match is not None and match[1] != "sbtk":
            found[match[2]] = (*found.get(match[2], ()), match[1])
    return found


def resident_bytes() -> int:
    """Return the memory that this process uses now, in bytes; 0 on systems without /proc."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the peak memory of this process, in bytes; 0 on systems without /proc."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


# Options of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_DEFAULT_MMAP_MAX = 65_536

_LARGE_BYTES = 2 << 20


@functools.cache
def trim_malloc() -> None:
    """Return large blocks to the system as soon as they are freed, where glibc manages memory.

    By default glibc raises its threshold to the largest freed block, so each thread keeps as much
    as its largest image: eight threads on images of 25 megapixels held 1.3 GB, of which 0.3 GB were
    in use.
    """
    _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTES)


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep all freed memory until the end of a `with` block, as for training on a CPU.

    Every step needs the same gigabytes again. By default glibc returns blocks of 32 MiB and more,
    and the kernel clears their pages at their next use.
    """
    _call_glibc("mallopt", _M_MMAP_MAX, 0)
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _call_glibc("mallopt", _M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            _call_glibc("mallopt", option, _LARGE_BYTES)
        _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError, TypeError):
        return


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processor's instruction sets; empty on systems without /proc/cpuinfo."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown processor"


def _memory_bytes() -> int:
    """Return the smaller of the machine's memory and the control group's limit."""
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
    """Return the number of CPUs that this process may use, at least 1.

    Its affinity and its control group's quota limit them.
    """
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # on macOS
        available = os.cpu_count() or 1
    quota = quota_cpus(_CGROUPS, _own_cgroup())
    return max(1, available if quota is None else min(available, math.ceil(quota)))


def quota_cpus(root: Path, own: str) -> float | None:
    """Return the smallest CPU quota of a control group and its parents; `None` without one.

    Args:
        root: where control groups are mounted.
        own: the path of this process's group below it, such as `/user.slice`; often `/` in a
            container.
    """
    folder = root / own.strip("/")
    quotas = []
    # A container may show the host's path of the group and yet mount only the group itself.
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
    """Return the quota in `cpu.max`: 1.5 for `"150000 100000"`, `None` for `"max 100000"`."""
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
