"""`tensorrt` or `tensorrt_rtx` that computes through ONNX Runtime on the fake GPUs.

A plan is the ONNX file behind one line of JSON. `execute_async_v3` reads and writes the addresses
that were set. Whatever real TensorRT would crash on, or leave undefined, is an assertion; whatever
it answers with `None` or `False` is that here, with a line in the log.
"""

from __future__ import annotations

import enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.fakes.tensorrt_builder import BUILDER_CLASSES
from tests.fakes.tensorrt_context import Context, RuntimeConfig
from tests.fakes.tensorrt_runtime import Engine, Runtime
from tests.fakes.tensorrt_surface import Surface
from tests.fakes.tensorrt_world import TensorRtWorld

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
