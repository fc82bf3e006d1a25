"""The memory of an engine, in a separate process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import EngineUnavailable
from sbtk_runtime.evaluation.bench import memory as bench_memory
from sbtk_runtime.evaluation.bench.memory import (
    Memory,
    device_bytes_in_use,
    measure_memory,
    measure_this_process,
)
from tests.tiny import tiny_bundle

OPTIONS = EngineOptions("onnxruntime", "fp32", threads=1, device="cpu")
BATCHES = (1, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "a folder with spaces")


def test_a_separate_process_reports_its_peak_by_batch(folder: Path) -> None:
    held = bytearray(b"x" * 400_000_000)  # in this process, not in the other
    memory = measure_memory(folder, OPTIONS, BATCHES)
    assert list(memory.peak_bytes) == [1, 64]
    # Python, NumPy and ONNX Runtime; then 64 images of 150 kB.
    assert 20_000_000 < memory.peak_bytes[1] < len(held)
    assert memory.peak_bytes[64] - memory.peak_bytes[1] > 64 * 224 * 224 * 3 // 2
    assert memory.device_bytes == {}
    assert memory.failed == ""


def test_an_engine_that_cannot_be_opened_says_why(folder: Path) -> None:
    memory = measure_memory(folder, replace(OPTIONS, precision="fp16"), BATCHES)
    assert memory.peak_bytes == {}
    assert "has no fp16 model" in memory.failed


def test_a_process_without_a_result_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "_START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineUnavailable, match="without a result: exit code -9"):
        measure_memory(folder, OPTIONS, BATCHES)
    monkeypatch.setattr(bench_memory, "_START", "raise SystemExit('out of luck')")
    with pytest.raises(EngineUnavailable, match="out of luck"):
        measure_memory(folder, OPTIONS, BATCHES)


def test_the_process_gets_the_folder_that_holds_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "json.dumps({'peak_bytes': {}, 'device_bytes': {}, 'failed': sys.argv[1]})"
    monkeypatch.setattr(bench_memory, "_START", f"import json, sys; print({said})")
    assert (
        Path(measure_memory(folder, OPTIONS, BATCHES).failed) / "sbtk_runtime" / "__init__.py"
    ).is_file()


def test_a_cpu_and_a_missing_gpu_have_no_device_memory() -> None:
    assert device_bytes_in_use("cpu") is None
    assert device_bytes_in_use("cuda:99999") is None


def test_device_memory_is_the_increase_since_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([900, 700, 600])
    runtime = ModuleType("cuda.bindings.runtime")
    runtime.__dict__.update(
        cudaGetDeviceCount=lambda: (0, 2),
        cudaGetDeviceProperties=lambda index: (
            0,
            SimpleNamespace(name=b"GPU", major=9, minor=0, totalGlobalMem=1000),
        ),
        cudaDriverGetVersion=lambda: (0, 13000),
        cudaSetDevice=lambda index: (0,),
        cudaMemGetInfo=lambda: (0, next(free), 1000),
    )
    bindings = ModuleType("cuda.bindings")
    bindings.__dict__["runtime"] = runtime
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    # The engine itself stays on the CPU; only the requested device matters.
    opened = open_engine
    monkeypatch.setattr(
        bench_memory,
        "open_engine",
        lambda bundle, options: opened(bundle, replace(options, device="cpu")),
    )
    memory = measure_this_process(folder, replace(OPTIONS, device="cuda:1"), BATCHES)
    assert memory.device_bytes == {1: 200, 64: 300}
    assert isinstance(memory, Memory)
