"""The table of `sbtk engine list`: which plans there are, and which can be used here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sbtk_cli import output
from sbtk_runtime.errors import SbtkError

if TYPE_CHECKING:
    from sbtk_runtime.engines.cuda_device import CudaDevice
    from sbtk_runtime.engines.plan_cache import CacheEntry
    from sbtk_runtime.engines.plan_record import PlanRecord


def print_plans(as_json: bool) -> int:
    """Prints every plan in the cache; one JSON line each if `as_json`."""
    from sbtk_runtime.engines.plan_cache import PlanCache, cache_folder

    entries = PlanCache(cache_folder()).entries()
    state = _StateHere()
    if as_json:
        for entry in entries:
            reason = state.of(entry)
            described: dict[str, Any] = {
                "plan": str(entry.path),
                "is_usable": not reason,
                "reason": reason,
                "size_bytes": entry.size_bytes,
            }
            if entry.record is not None:
                described |= asdict(entry.record)
            output.answer_json(described)
        return 0
    if not entries:
        output.notice("There is no plan yet; 'sbtk engine build' makes one.")
        return 0
    rows = [("MODEL", "PRECISION", "TENSORRT", "GPU", "BATCHES", "SIZE", "BUILT", "STATE")]
    for entry in entries:
        size = output.size_text(entry.size_bytes)
        told = f"not used: {reason}" if (reason := state.of(entry)) else "usable here"
        if entry.record is None:
            rows.append((entry.path.name, "?", "?", "?", "?", size, "?", told))
            continue
        record = entry.record
        library = f"{record.module} {record.version}"
        rows.append(
            (
                record.model_id,
                record.precision,
                library,
                where_text(record),
                batches_text(record),
                size,
                record.created[:10],
                told,
            )
        )
    output.answer(output.plain_table(rows))
    return 0


def where_text(record: PlanRecord) -> str:
    """Returns the GPU that a plan is for."""
    return "any GPU" if record.device == "none" else record.device


def batches_text(record: PlanRecord) -> str:
    """Returns smallest, usual and largest batch."""
    settings = record.settings
    return f"{settings.batch_min},{settings.batch_opt},{settings.batch_max}"


class _StateHere:
    """Says why plans cannot be used on this machine, and asks each library once."""

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}
        self._device: CudaDevice | None = None
        self._is_asked = False

    def of(self, entry: CacheEntry) -> str:
        """Returns why a plan is not used here; empty when it is."""
        record = entry.record
        if entry.reason or record is None:
            return entry.reason
        version = self._version(record.module)
        if not version:
            return f"{record.module} does not load here"
        gpu = self._gpu()
        name, capability = ("none", "") if gpu is None else (gpu.name, gpu.compute_capability)
        misfit = record.misfit(record.module, version, name, capability)
        return misfit or ("there is no GPU here" if gpu is None else "")

    def _version(self, module: str) -> str:
        if module not in self._versions:
            from sbtk_runtime.engines.tensorrt_library import find_tensorrt

            try:
                self._versions[module] = find_tensorrt(module).version
            except SbtkError:
                self._versions[module] = ""
        return self._versions[module]

    def _gpu(self) -> CudaDevice | None:
        if not self._is_asked:
            from sbtk_runtime.engines.cuda_device import find_device

            self._is_asked = True
            try:
                self._device = find_device("cuda")
            except SbtkError:
                self._device = None
        return self._device
