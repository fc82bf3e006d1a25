"""A machine with fake GPUs and a fake TensorRT in `sys.modules`."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import cuda.bindings
import pytest

from tests.fakes.cuda_runtime import CudaFaults, FakeCudaRuntime
from tests.fakes.fake_tensorrt import fake_tensorrt
from tests.fakes.gpu import FakeGpus
from tests.fakes.tensorrt_surface import Surface
from tests.fakes.tensorrt_world import TensorRtFaults, TensorRtWorld

#: The modules and versions whose names are known.
SURFACES = (
    Surface("tensorrt", "10.16.1"),
    Surface("tensorrt", "11.4.0"),
    Surface("tensorrt_rtx", "1.7.1"),
)


@dataclass(frozen=True)
class FakeMachine:
    """GPUs, what can go wrong with them, and the TensorRT that is installed."""

    gpus: FakeGpus
    cuda: FakeCudaRuntime
    world: TensorRtWorld

    @property
    def cuda_faults(self) -> CudaFaults:
        return self.cuda._faults

    @property
    def faults(self) -> TensorRtFaults:
        return self.world.faults

    @property
    def calls(self) -> Counter[str]:
        """Return how often each function of CUDA was called."""
        return self.cuda._calls

    def alive(self) -> Counter[str]:
        """Return what was made and not freed, on the GPUs and of TensorRT."""
        gc.collect()
        return self.gpus.alive() + +self.world.alive


def fake_machine(
    monkeypatch: pytest.MonkeyPatch,
    surface: Surface,
    *,
    gpus: int = 1,
    memory_bytes: int = 1 << 30,
) -> FakeMachine:
    """Return a machine, which is this process's until the test ends."""
    machine_gpus = FakeGpus(gpus, memory_bytes)
    cuda_runtime = FakeCudaRuntime(machine_gpus)
    world = TensorRtWorld(machine_gpus, surface)
    install_cuda(monkeypatch, cuda_runtime)
    # Any library that loads: what it would do, the module above does.
    monkeypatch.setattr("sbtk_runtime.engines.cuda._DRIVER", None)
    for module in ("tensorrt", "tensorrt_rtx"):
        # The fake needs the real TensorRT-RTX for its names, so that is not removed but hidden.
        there = fake_tensorrt(world) if module == surface.module else None
        monkeypatch.setitem(sys.modules, module, there)
    return FakeMachine(machine_gpus, cuda_runtime, world)


def install_cuda(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Make `module` what `from cuda.bindings import runtime` gives; `None`: not installed."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    if module is None:
        monkeypatch.delattr(cuda.bindings, "runtime", raising=False)
    else:
        monkeypatch.setattr(cuda.bindings, "runtime", module, raising=False)
