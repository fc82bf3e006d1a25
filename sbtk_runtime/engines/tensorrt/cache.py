"""The cache of TensorRT plans. A plan is native code, so only the user's own files are loaded.

Each plan has a sidecar with its SHA-256, model, TensorRT and GPU. `trtexec --loadEngine` takes the
plan's file as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable
from sbtk_runtime.files import PrivateFolder, UnsafeFile, UnsafeFolder, WriterLock
from sbtk_runtime.manifest import PRECISIONS, Precision

_LOCK_NAME = "build.lock"
_MAX_SIDECAR_BYTES = 64 << 10
_MAX_TIMING_BYTES = 1 << 30
_DIGEST_BYTES = 32


class PlanCacheUnusable(EngineUnavailable):
    """The cache folder cannot be created, read or written, or is not safe."""


@dataclass(frozen=True)
class CachedPlan:
    """A plan in memory that agrees with its sidecar; `path` is its file."""

    plan: bytes
    record: PlanRecord
    path: Path


@dataclass(frozen=True)
class PlanSearch:
    """The plan found, if any, and why other plans of the model were not used."""

    found: CachedPlan | None
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class CacheEntry:
    """One plan in the cache.

    Attributes:
        path: of the plan; of the sidecar, if that cannot be read.
        record: the sidecar's content; `None` if there is no sound one.
        size_bytes: of the file at `path`.
        reason: why it is never used; empty if it is sound.
    """

    path: Path
    record: PlanRecord | None
    size_bytes: int
    reason: str


@dataclass(frozen=True)
class Cleared:
    """Number of removed plans, and the bytes that this freed."""

    plans: int
    size_bytes: int


def cache_folder() -> Path:
    """Return the folder of the plans, `$XDG_CACHE_HOME/sbtk/plans`, created with mode 0700.

    Raises:
        PlanCacheUnusable: it cannot be created; or it, or the folder above, is a symbolic link,
            belongs to another user, or is writable by others.
    """
    try:
        named = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification says to ignore relative paths.
        folder = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sbtk", "plans"):
            folder = folder / name
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            with PrivateFolder.opened(folder) as opened:
                opened.hide()
    except OSError as problem:
        raise PlanCacheUnusable(
            f"the cache of plans cannot be created: {problem.strerror}: {problem.filename}",
            "a writable folder in $XDG_CACHE_HOME or ~/.cache",
        ) from problem
    except UnsafeFolder as problem:
        raise PlanCacheUnusable(*problem.args) from problem
    # From Path.home(), without HOME and an entry in the user database.
    except RuntimeError as problem:
        raise PlanCacheUnusable(f"there is no cache of plans: {problem}") from problem
    return folder


class PlanCache:
    """The plans in one folder, which must belong to the user.

    Every method raises `PlanCacheUnusable` if the folder is not safe, or cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self) -> WriterLock:
        """Return the lock that a process holds while it builds and stores a plan."""
        return WriterLock(self.folder / _LOCK_NAME)

    def find(self, wanted: PlanWanted) -> PlanSearch:
        """Return the fitting plan with the smallest profile for the batch, or else the largest."""
        passed_over = []
        candidates = []
        with self._open() as folder:
            for sidecar in folder.names(SIDECAR):
                try:
                    record = _record(folder, sidecar)
                except UnsafeFile as problem:
                    passed_over.append(str(problem))
                    continue
                if not wanted.concerns(record):
                    continue
                misfit = wanted.misfit(record)
                if misfit:
                    passed_over.append(f"{plan_name(sidecar, record)}: {misfit}")
                else:
                    candidates.append((wanted.preference(record), sidecar, record))
            for _, sidecar, record in sorted(candidates, key=lambda candidate: candidate[:2]):
                try:
                    plan = _plan(folder, sidecar, record)
                except UnsafeFile as problem:
                    passed_over.append(str(problem))
                    continue
                found = CachedPlan(plan, record, self.folder / plan_name(sidecar, record))
                return PlanSearch(found, tuple(passed_over))
        return PlanSearch(None, tuple(passed_over))

    def store(self, record: PlanRecord, plan: bytes) -> Path:
        """Store a plan, in place of one with the same key; call it with the lock held.

        The sidecar is written last: without it a plan is never found, so a power cut does no harm.

        Returns:
            The path of the plan.

        Raises:
            DiskFull: the device ran out of space.
        """
        assert record.plan_bytes == len(plan)
        assert record.plan_sha256 == hashlib.sha256(plan).hexdigest()
        sidecar = sidecar_name(record)
        name = plan_name(sidecar, record)
        with self._open() as folder:
            folder.remove_temporaries()
            folder.write(name, plan)
            folder.write(sidecar, record.to_json())
            # Replaced plans, and those of builds killed before they wrote a sidecar.
            for orphan in _without_sidecar(folder):
                folder.remove(orphan)
        return self.folder / name

    def entries(self) -> list[CacheEntry]:
        """Return every plan, sound or not, after reading all of it."""
        entries = []
        with self._open() as folder:
            for sidecar in folder.names(SIDECAR):
                record, shown, reason = None, sidecar, ""
                try:
                    record = _record(folder, sidecar)
                    shown = plan_name(sidecar, record)
                    _plan(folder, sidecar, record)
                except UnsafeFile as problem:
                    reason = str(problem)
                size = folder.size_bytes(shown)
                entries.append(CacheEntry(self.folder / shown, record, size, reason))
            for name in _without_sidecar(folder):
                reason = f"{name} has no sidecar that names it"
                size = folder.size_bytes(name)
                entries.append(CacheEntry(self.folder / name, None, size, reason))
        return entries

    def clear(self, model: str | None = None) -> Cleared:
        """Remove the plans of a model, or everything in the cache.

        Args:
            model: a model id or the name before its `@`; `None` for everything.
        """
        plans = size_bytes = 0
        with self._open() as folder:
            folder.remove_temporaries()
            doomed = []
            for sidecar in folder.names(SIDECAR):
                with contextlib.suppress(UnsafeFile):
                    record = _record(folder, sidecar)
                    if model in (None, record.model_id, model_name(record.model_id)):
                        # The sidecar first, since a plan without one is never found.
                        doomed += [sidecar, plan_name(sidecar, record)]
            if model is None:
                for suffix in (SIDECAR, PLAN, TIMING):
                    doomed += folder.names(suffix)
            for name in dict.fromkeys(doomed):
                size = folder.size_bytes(name)
                folder.remove(name)
                size_bytes += size
                plans += name.endswith(PLAN) and size > 0
        return Cleared(plans, size_bytes)

    def discard(self, record: PlanRecord) -> None:
        """Remove the plan of this record, if it is still there."""
        sidecar = sidecar_name(record)
        with self._open() as folder:
            with contextlib.suppress(UnsafeFile):
                if _record(folder, sidecar) == record:
                    folder.remove(sidecar)
            folder.remove(plan_name(sidecar, record))

    def timing_cache(self, module: str, version: str, compute_capability: str) -> bytes:
        """Return the timing cache of earlier builds on such a GPU; empty without a sound one."""
        name = timing_name(module, version, compute_capability)
        with self._open() as folder:
            try:
                content = folder.read(name, _MAX_TIMING_BYTES)
            except UnsafeFile:
                return b""
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return data if hashlib.sha256(data).digest() == digest else b""

    def store_timing_cache(
        self, module: str, version: str, compute_capability: str, data: bytes
    ) -> None:
        """Store a build's timing cache for the next one; call it with the lock held."""
        name = timing_name(module, version, compute_capability)
        with self._open() as folder:
            folder.write(name, hashlib.sha256(data).digest() + data)

    @contextlib.contextmanager
    def _open(self) -> Iterator[PrivateFolder]:
        try:
            with PrivateFolder.opened(self.folder) as folder:
                yield folder
        except UnsafeFolder as problem:
            raise PlanCacheUnusable(*problem.args) from problem


def _record(folder: PrivateFolder, sidecar: str) -> PlanRecord:
    try:
        return PlanRecord.from_json(folder.read(sidecar, _MAX_SIDECAR_BYTES))
    except BadModel as problem:
        raise UnsafeFile(f"{sidecar}: {problem.found}") from problem


def _plan(folder: PrivateFolder, sidecar: str, record: PlanRecord) -> bytes:
    name = plan_name(sidecar, record)
    plan = folder.read(name, record.plan_bytes)
    if len(plan) != record.plan_bytes:
        raise UnsafeFile(f"{name} has {len(plan):,} bytes, not {record.plan_bytes:,}")
    if hashlib.sha256(plan).hexdigest() != record.plan_sha256:
        raise UnsafeFile(f"{name} is damaged or was changed: its SHA-256 differs")
    return plan


def _without_sidecar(folder: PrivateFolder) -> list[str]:
    """Return the plans that no sidecar names.

    Plans whose sidecar cannot be read are not among them, since a newer sbtk may know them.
    """
    named: set[str] = set()
    unknown: set[str] = set()
    for sidecar in folder.names(SIDECAR):
        try:
            named.add(plan_name(sidecar, _record(folder, sidecar)))
        except UnsafeFile:
            unknown.add(sidecar)
    return [
        name for name in folder.names(PLAN) if name not in named and sidecar_of(name) not in unknown
    ]


PLAN, SIDECAR, TIMING = ".plan", ".json", ".timing"

_HASH_DIGITS = 12


def sidecar_name(record: PlanRecord) -> str:
    """Return the sidecar's name, which depends on everything that determines the plan."""
    key = [record.onnx_sha256, record.device, asdict(record.settings)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    parts = (
        model_name(record.model_id),
        record.precision,
        f"{record.module}-{record.version}",
        f"sm{record.compute_capability}" if record.compute_capability else "any",
        f"b{record.batch_max}",
        digest[:_HASH_DIGITS],
    )
    return "-".join(_as_file_name(part) for part in parts) + SIDECAR


def plan_name(sidecar: str, record: PlanRecord) -> str:
    """Return the name of a sidecar's plan.

    It contains the plan's hash, so that a new plan never replaces one that is being read.
    """
    return f"{sidecar.removesuffix(SIDECAR)}.{record.plan_sha256[:_HASH_DIGITS]}{PLAN}"


def sidecar_of(plan: str) -> str:
    """Return the name of a plan's sidecar."""
    return plan[: -len(PLAN) - _HASH_DIGITS - 1] + SIDECAR


def timing_name(module: str, version: str, compute_capability: str) -> str:
    """Return the name of the timing cache of such a GPU."""
    return _as_file_name(f"{module}-{version}-sm{compute_capability}") + TIMING


def model_name(model_id: str) -> str:
    """Return the part of a model id before its `@`."""
    return model_id.partition("@")[0]


def _as_file_name(text: str) -> str:
    # No leading dot, which would hide the file.
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:60].lstrip(".") or "_"


PLAN_FORMAT = 1

#: The device of a plan that was built without a GPU and runs on any that its module supports.
NO_DEVICE = "none"

_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 200


@dataclass(frozen=True)
class PlanRecord:
    """A plan's sidecar: the model, software and machine that it was built for.

    Attributes:
        model_id: of the bundle.
        onnx_sha256: of the ONNX file that the plan was built from.
        precision: of that file.
        module: `tensorrt` or `tensorrt_rtx`.
        version: of that module; no other version may load the plan.
        device: name of the GPU that the plan was built on, or `none`.
        compute_capability: of that GPU, such as `9.0`; empty without one.
        settings: batches, memory and effort of the build.
        plan_sha256: of the plan.
        plan_bytes: size of the plan.
        created: time of the build, UTC, ISO 8601.
        build_s: duration of the build in seconds.
        sbtk_version: of the sbtk that built the plan.
        format: of this record.
    """

    model_id: str
    onnx_sha256: str
    precision: Precision
    module: str
    version: str
    device: str
    compute_capability: str
    settings: BuildSettings
    plan_sha256: str
    plan_bytes: int
    created: str
    build_s: float
    sbtk_version: str
    format: int = PLAN_FORMAT

    @property
    def batch_max(self) -> int:
        """The largest batch that the plan takes."""
        return self.settings.batch_max

    def to_json(self) -> bytes:
        """Return the sidecar's content."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Return the record in a sidecar.

        Raises:
            BadModel: it is not JSON, has a newer format, or a field is missing, invalid or unknown.
        """
        try:
            value = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as problem:
            raise BadModel("its sidecar is not JSON") from problem
        if not isinstance(value, dict):
            raise BadModel("its sidecar is not a JSON object")
        found = value.get("format")
        if type(found) is not int or found < 1:
            raise BadModel("its sidecar has no format number")
        if found > PLAN_FORMAT:
            raise BadModel(f"its sidecar has format {found}, made by a newer sbtk")
        _check_fields(cls, value)
        settings = value["settings"]
        _check_fields(BuildSettings, settings)
        try:
            record = cls(**{**value, "settings": BuildSettings(**settings)})
        except BadConfig as problem:
            raise BadModel(f"its sidecar names {problem.found}") from problem
        is_sound = (
            _HEX64.fullmatch(record.onnx_sha256)
            and _HEX64.fullmatch(record.plan_sha256)
            and record.precision in PRECISIONS
            and record.plan_bytes > 0
        )
        if not is_sound:
            raise BadModel("its sidecar has an impossible hash, precision or size")
        return record

    def misfit(self, module: str, version: str, device: str, compute_capability: str) -> str:
        """Return why that TensorRT on that GPU may not load the plan; empty if it may.

        Args:
            module: `tensorrt` or `tensorrt_rtx`.
            version: of that module.
            device: name of the GPU, or `none`.
            compute_capability: of the GPU; empty without one.
        """
        if (self.module, self.version) != (module, version):
            return f"it was built by {self.module} {self.version}; this is {module} {version}"
        if self.device == NO_DEVICE:
            return ""
        if (self.device, self.compute_capability) != (device, compute_capability):
            here = (
                f"this is {device} ({compute_capability})" if compute_capability else "none is here"
            )
            return f"it was built on {self.device} ({self.compute_capability}); {here}"
        return ""


@dataclass(frozen=True)
class PlanWanted:
    """A search for a plan.

    Attributes:
        onnx_sha256: of the ONNX file.
        precision: of that file.
        module: `tensorrt` or `tensorrt_rtx`.
        version: of that module.
        device: name of the GPU that is to run it, or `none`.
        compute_capability: of that GPU; empty without one.
        batch: plans that take so many images at once are preferred.
        settings: of the build; `None` for any.
    """

    onnx_sha256: str
    precision: Precision
    module: str
    version: str
    device: str
    compute_capability: str
    batch: int = 1
    settings: BuildSettings | None = None

    def concerns(self, record: PlanRecord) -> bool:
        """Return whether a plan is of this model and module, with these settings."""
        return (
            record.onnx_sha256 == self.onnx_sha256
            and record.precision == self.precision
            and record.module == self.module
            and self.settings in (None, record.settings)
        )

    def misfit(self, record: PlanRecord) -> str:
        """Return why this TensorRT on this GPU may not load a plan; empty if it may."""
        return record.misfit(self.module, self.version, self.device, self.compute_capability)

    def preference(self, record: PlanRecord) -> tuple[bool, int]:
        """Return a sort key: plans that take the batch, smallest first; others, largest first."""
        is_too_small = record.batch_max < self.batch
        return is_too_small, -record.batch_max if is_too_small else record.batch_max


def _check_fields(kind: type[Any], value: Any) -> None:
    """Check that a JSON value has exactly the fields of a dataclass, each of its type."""
    types = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise BadModel(f"its sidecar does not have the fields of a {kind.__name__}")
    for name, type_name in types.items():
        found = value[name]
        if type_name in ("str", "Precision"):
            fits = isinstance(found, str) and len(found) <= _MAX_TEXT and found.isprintable()
        elif type_name == "int":
            fits = type(found) is int and 0 <= found < 1 << 63
        elif type_name == "float":
            fits = type(found) in (int, float) and 0 <= found < 1e9
        else:
            fits = isinstance(found, dict)
        if not fits:
            raise BadModel(f"its sidecar has an invalid {name}")
