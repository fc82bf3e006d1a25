"""Memory of an engine, measured in a process of its own that does nothing else.

    python -m sbtk_runtime.evaluation.bench.memory '{"bundle": "...", "engine": "onnxruntime", ...}'

opens the engine, runs each batch and prints what that took as one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.cuda import checked, cuda_runtime, find_device
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import EngineUnavailable, MissingExtra, SbtkError
from sbtk_runtime.machine import peak_resident_bytes
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import SIZE_PX

_TIMEOUT_S = 900
# `-P` leaves the working folder alone; the folder of this checkout or installation comes last, so
# that it can hide nothing.
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from sbtk_runtime.evaluation.bench.memory import main; main()"
)


@dataclass(frozen=True)
class MemoryRequest:
    """An engine and the batches to run, the smallest first.

    Attributes:
        bundle: folder of the model.
        engine, precision, threads: as for `open_engine`.
        device: `cpu`, or the GPU.
        batches: numbers of images.
    """

    bundle: str
    engine: str
    precision: Precision
    threads: int
    device: str
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """What a process held after it had opened an engine and run batches up to a size.

    Attributes:
        peak_bytes: by batch, the most resident memory that the process ever had; without Linux's
            /proc empty.
        device_bytes: by batch, how much more of the GPU was in use than before the engine was
            opened, CUDA's own share not counted; empty on a CPU.
        failed: why the next batch did not run; empty when all did.
    """

    peak_bytes: dict[int, int] = field(default_factory=dict)
    device_bytes: dict[int, int] = field(default_factory=dict)
    failed: str = ""


def measure_memory(request: MemoryRequest) -> Memory:
    """Return the memory of an engine, measured in a new process.

    Raises:
        EngineUnavailable: the process ended without an answer.
    """
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-P", "-c", _START, root, json.dumps(asdict(request))]
    try:
        done = subprocess.run(  # noqa: S603 - this very file
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as problem:
        raise EngineUnavailable(f"its process took more than {_TIMEOUT_S} s") from problem
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        peaks, device = _by_batch(found, "peak_bytes"), _by_batch(found, "device_bytes")
        return Memory(peaks, device, str(found["failed"]))
    # Killed for the memory it took, it leaves nothing to read.
    except (IndexError, ValueError, KeyError) as problem:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EngineUnavailable(f"its process ended without an answer: {last[0]}") from problem


def main() -> None:
    """Measure this process as the first argument asks, and prints the `Memory` as JSON."""
    asked = json.loads(sys.argv[1])
    request = MemoryRequest(**(asked | {"batches": tuple(asked["batches"])}))
    print(json.dumps(asdict(own_memory(request))))


def own_memory(request: MemoryRequest) -> Memory:
    """Return what this very process takes to open the engine and run the batches."""
    before = device_bytes_in_use(request.device)
    peaks: dict[int, int] = {}
    device: dict[int, int] = {}
    try:
        engine = open_engine(
            Bundle.open(Path(request.bundle)),
            engine=request.engine,
            precision=request.precision,
            threads=request.threads,
            device=request.device,
            batch=max(request.batches),
        )
        for batch in sorted(request.batches):
            # Zeros would be pages that no memory stands behind.
            engine.run(np.full((batch, SIZE_PX, SIZE_PX, 3), 127, dtype=np.uint8), "photo")
            now = device_bytes_in_use(request.device)
            if peak := peak_resident_bytes():
                peaks[batch] = peak
            if before is not None and now is not None:
                device[batch] = now - before
        engine.close()
    except SbtkError as problem:
        return Memory(peaks, device, problem.found)
    return Memory(peaks, device)


def device_bytes_in_use(device: str) -> int | None:
    """Return how much of a GPU's memory is in use, by whomever; `None` on a CPU or if unknown."""
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
