"""A machine with fake GPUs and a fake TensorRT in `sys.modules`.

The fake `tensorrt` or `tensorrt_rtx` computes through ONNX Runtime on the fake GPUs. A plan is the
ONNX file behind one line of JSON. `execute_async_v3` reads and writes the addresses that were set.
Whatever real TensorRT would crash on, or leave undefined, is an assertion; whatever it answers with
`None` or `False` is that here, with a line in the log.
"""

from __future__ import annotations

import enum
import gc
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import cuda.bindings
import pytest

from tests.fakes.cuda_runtime import CudaFaults, FakeCudaRuntime
from tests.fakes.gpu import FakeGpus
from tests.fakes.tensorrt_builder import BUILDER_CLASSES
from tests.fakes.tensorrt_runtime import Context, Engine, Runtime, RuntimeConfig
from tests.fakes.tensorrt_world import Surface, TensorRtFaults, TensorRtWorld

#: The modules and versions whose names are known.
SURFACES = (
    Surface("tensorrt", "10.16.1"),
    Surface("tensorrt", "11.4.0"),
    Surface("tensorrt_rtx", "1.7.1"),
)


def surface_name(surface: Surface) -> str:
    """Return the name of a surface, for the names of tests."""
    return f"{surface.module}-{surface.version}"


_ENUMERATIONS = (
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
    "TensorLocation",
)

_RTX_ENUMERATIONS = ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy")


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


def fake_tensorrt(world: TensorRtWorld) -> ModuleType:
    """Return the module of that world."""
    surface = world.surface
    module = _Module(surface)
    is_rtx = surface.module == "tensorrt_rtx"
    for name in (*_ENUMERATIONS, *(_RTX_ENUMERATIONS if is_rtx else ())):
        module._add(name, surface.enumeration(name))
    for alias, name in (("float32", "FLOAT"), ("uint8", "UINT8"), ("float16", "HALF")):
        module._add(alias, module.DataType[name])
    bases: tuple[Any, ...] = (Runtime, Engine, RuntimeConfig, Context, *BUILDER_CLASSES)
    for base in bases:
        name = base._class_name
        made = type(name, (base,), {"_surface": surface, "_world": world})
        module._add(name, made)
    module._add("ILogger", _logger_class(module, surface))
    module._add("IProgressMonitor", _ProgressMonitor)
    world.module = module
    return module


class _Module(ModuleType):
    """The module; a name that the version does not have is an `AttributeError`."""

    def __init__(self, surface: Surface) -> None:
        super().__init__(surface.module)
        self.__spec__ = ModuleSpec(surface.module, None)
        self.__version__ = surface.version
        self._surface = surface

    def _add(self, name: str, value: Any) -> None:
        assert name in self._surface.names, f"{self._surface.module} has no {name}"
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            assert name not in self._surface.names, f"the fake module has no {name}"
        raise AttributeError(f"{self.__name__} {self.__version__} has no {name!r}")


class _ProgressMonitor:
    """Asserts that the base is initialised, since the bindings crash otherwise."""

    def __init__(self) -> None:
        self._is_initialised = True


def _logger_class(module: Any, surface: Surface) -> type:
    severities = [name for name in surface.members("ILogger") if name.isupper()]
    order = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    assert sorted(severities) == sorted(order)
    severity = enum.Enum("Severity", {name: number for number, name in enumerate(order)})  # type: ignore[misc]

    class ILogger:
        """To be derived from."""

        Severity = severity

        def __init__(self) -> None:
            self._is_initialised = True

        def log(self, severity: Any, msg: str) -> None:
            raise AssertionError("a logger without a log method")

    for name in order:
        setattr(ILogger, name, severity[name])
    return ILogger
