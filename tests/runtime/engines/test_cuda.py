"""GPUs are found through the driver; errors name what is missing."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sbtk_runtime.engines.cuda import (
    CudaDevice,
    CudaError,
    OutOfDeviceMemory,
    checked,
    cuda_runtime,
    find_device,
)
from sbtk_runtime.errors import BadConfig, EngineUnavailable
from tests.processes import run_python


class _Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


@dataclass
class _Properties:
    name: bytes
    major: int
    minor: int
    totalGlobalMem: int


@dataclass
class _Machine:
    """What the driver of a pretended machine answers."""

    gpus: list[_Properties] = field(default_factory=list)
    count_error: _Error = _Error.cudaSuccess
    driver: int = 13020
    calls: list[str] = field(default_factory=list)

    def cudaGetDeviceCount(self) -> tuple[_Error, int | None]:
        self.calls.append("cudaGetDeviceCount")
        return self.count_error, None if self.count_error else len(self.gpus)

    def cudaGetDeviceProperties(self, index: int) -> tuple[_Error, _Properties]:
        self.calls.append("cudaGetDeviceProperties")
        return _Error.cudaSuccess, self.gpus[index]

    def cudaDriverGetVersion(self) -> tuple[_Error, int]:
        return _Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[_Error, int]:
        return _Error.cudaSuccess, 13050

    def cudaGetErrorName(self, error: _Error) -> tuple[_Error, bytes]:
        return _Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: _Error) -> tuple[_Error, bytes]:
        return _Error.cudaSuccess, b"what it means"


H100 = _Properties(b"NVIDIA H100 80GB HBM3", 9, 0, 80 << 30)
RTX = _Properties(b"NVIDIA GeForce RTX 4090".ljust(256, b"\0"), 8, 9, 24 << 30)


def _install(monkeypatch: pytest.MonkeyPatch, machine: _Machine) -> None:
    """Put the machine where `from cuda.bindings import runtime` looks."""
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = machine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def test_without_a_driver_the_real_bindings_name_it() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    with pytest.raises(EngineUnavailable, match="no NVIDIA driver on this machine"):
        find_device()


def test_the_real_bindings_explain_their_errors() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is missing")
    assert cuda_runtime() is runtime
    with pytest.raises(CudaError, match="cudaErrorInvalidValue") as caught:
        checked((runtime.cudaError_t.cudaErrorInvalidValue, None))
    assert "invalid argument" in caught.value.found
    with pytest.raises(OutOfDeviceMemory, match="is out of memory"):
        checked((runtime.cudaError_t.cudaErrorMemoryAllocation,))
    assert checked((runtime.cudaError_t.cudaSuccess, 7)) == 7


def test_devices_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine([H100, RTX])
    _install(monkeypatch, machine)
    first = CudaDevice(0, "NVIDIA H100 80GB HBM3", "9.0", 80 << 30, "13.2")
    assert find_device("cuda") == find_device("cuda:0") == find_device() == first
    assert find_device("cuda:1") == CudaDevice(
        1, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30, "13.2"
    )
    # The driver is asked whether it is there before anything else.
    assert machine.calls[0] == "cudaGetDeviceCount"


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Machine([H100, RTX]))
    with pytest.raises(EngineUnavailable, match="no cuda:3: this machine has 2 GPUs") as caught:
        find_device("cuda:3")
    assert caught.value.expected == "cuda:0 to cuda:1"
    _install(monkeypatch, _Machine([H100]))
    with pytest.raises(EngineUnavailable, match=r"this machine has 1 GPU\b") as caught:
        find_device("cuda:1")
    assert caught.value.expected == "cuda:0"


@pytest.mark.parametrize("device", ["", "cpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "gpu:0"])
def test_odd_names_of_gpus_are_refused(device: str) -> None:
    with pytest.raises(BadConfig, match="unknown GPU"):
        find_device(device)


def test_an_old_driver_is_distinguished_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    old = _Machine(count_error=_Error.cudaErrorInsufficientDriver, driver=12040)
    _install(monkeypatch, old)
    with pytest.raises(EngineUnavailable, match=r"too old: it supports CUDA 12\.4") as caught:
        find_device()
    assert "CUDA 13.5" in caught.value.expected
    _install(monkeypatch, _Machine(count_error=_Error.cudaErrorInsufficientDriver, driver=0))
    with pytest.raises(EngineUnavailable, match="no NVIDIA driver"):
        find_device()


@pytest.mark.parametrize("error", [_Error.cudaErrorNoDevice, _Error.cudaSuccess])
def test_a_driver_without_gpus_is_named(monkeypatch: pytest.MonkeyPatch, error: _Error) -> None:
    _install(monkeypatch, _Machine(count_error=error))
    with pytest.raises(EngineUnavailable, match="driver shows no GPU") as caught:
        find_device()
    assert "CUDA_VISIBLE_DEVICES" in caught.value.expected


def test_other_errors_have_cudas_name_and_message(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Machine(count_error=_Error.cudaErrorIllegalAddress))
    with pytest.raises(CudaError, match=r"cudaErrorIllegalAddress \(700\): what it means"):
        find_device()


def test_results_of_cuda_calls_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Machine())
    assert checked((_Error.cudaSuccess,)) is None
    assert checked((_Error.cudaSuccess, 5)) == 5
    assert checked((_Error.cudaSuccess, 5, 6)) == (5, 6)
    with pytest.raises(OutOfDeviceMemory, match="cudaErrorMemoryAllocation"):
        checked((_Error.cudaErrorMemoryAllocation, None))


def test_missing_bindings_name_the_extra() -> None:
    code = """
import sys
sys.modules["cuda"] = None
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.errors import MissingExtra
try:
    find_device()
except MissingExtra as problem:
    print(problem.found, problem.next_step)
"""
    shown = run_python(code)
    assert "cuda-bindings is not installed" in shown
    assert 'pip install "sbtk[tensorrt]"' in shown
