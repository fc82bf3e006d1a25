"""Memory of an engine, measured in a separate process.

    python -m sbtk_runtime.evaluation.bench.memory '{"bundle": "...", "options": {...}, ...}'

opens the engine, runs each batch and prints the memory as one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.cuda import checked, cuda_runtime, find_device
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import EngineUnavailable, MissingExtra, SbtkError
from sbtk_runtime.machine import peak_resident_bytes
from sbtk_runtime.preprocess import SIZE_PX

_TIMEOUT_S = 900
# `-P` excludes the working folder; the folder of this checkout or installation comes last, so that
# it hides nothing.
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from sbtk_runtime.evaluation.bench.memory import main; main()"
)


@dataclass(frozen=True)
class Memory:
    """Memory of a process that opens an engine and runs batches up to each size.

    Attributes:
        peak_bytes: peak resident memory by batch; empty without Linux's /proc.
        device_bytes: by batch, the GPU memory in use minus that before the engine was opened, which
            includes CUDA's own share; empty on a CPU.
        failed: why the next batch did not run; empty if all ran.
    """

    peak_bytes: dict[int, int] = field(default_factory=dict)
    device_bytes: dict[int, int] = field(default_factory=dict)
    failed: str = ""


def measure_memory(folder: Path, options: EngineOptions, batches: Sequence[int]) -> Memory:
    """Measure the memory of an engine in a new process.

    Args:
        folder: of the model.
        options: the engine to open.
        batches: batch sizes to run, the smallest first.

    Raises:
        EngineUnavailable: the process ended without a result.
    """
    root = str(Path(__file__).resolve().parents[3])
    request = {
        "bundle": str(folder.absolute()),
        "options": asdict(options),
        "batches": list(batches),
    }
    command = [sys.executable, "-P", "-c", _START, root, json.dumps(request)]
    try:
        done = subprocess.run(  # noqa: S603 -- this file
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as problem:
        raise EngineUnavailable(f"its process took more than {_TIMEOUT_S} s") from problem
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        peaks, device = _by_batch(found, "peak_bytes"), _by_batch(found, "device_bytes")
        return Memory(peaks, device, str(found["failed"]))
    # A process killed for lack of memory writes no result.
    except (IndexError, ValueError, KeyError) as problem:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EngineUnavailable(f"its process ended without a result: {last[0]}") from problem


def main() -> None:
    """Measure the memory of this process and print it as JSON."""
    request = json.loads(sys.argv[1])
    options = EngineOptions(**request["options"])
    memory = measure_this_process(Path(request["bundle"]), options, request["batches"])
    print(json.dumps(asdict(memory)))


def measure_this_process(folder: Path, options: EngineOptions, batches: Sequence[int]) -> Memory:
    """Return the memory that this process needs to open the engine and run the batches."""
    device_name = options.device or "cpu"
    before = device_bytes_in_use(device_name)
    peaks: dict[int, int] = {}
    device: dict[int, int] = {}
    try:
        engine = open_engine(Bundle.open(folder), replace(options, batch=max(batches)))
        for batch in sorted(batches):
            # Pages of zeros would take no memory.
            engine.run(np.full((batch, SIZE_PX, SIZE_PX, 3), 127, dtype=np.uint8), "photo")
            now = device_bytes_in_use(device_name)
            if peak := peak_resident_bytes():
                peaks[batch] = peak
            if before is not None and now is not None:
                device[batch] = now - before
        engine.close()
    except SbtkError as problem:
        return Memory(peaks, device, problem.found)
    return Memory(peaks, device)


def device_bytes_in_use(device: str) -> int | None:
    """Return the memory of a GPU that all processes use; `None` on a CPU or if unknown."""
    if device.partition(":")[0] != "cuda":
        return None
    try:
        index = find_device(device).index
        runtime = cuda_runtime()
        checked(runtime.cudaSetDevice(index))
        free, total = checked(runtime.cudaMemGetInfo())
    except (EngineUnavailable, MissingExtra):
        return None
    return int(total) - int(free)


def _by_batch(found: dict[str, Any], key: str) -> dict[int, int]:
    return {int(batch): int(value) for batch, value in found[key].items()}


if __name__ == "__main__":
    main()
