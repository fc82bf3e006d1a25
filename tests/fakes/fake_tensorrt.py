"""`tensorrt` or `tensorrt_rtx` that computes through ONNX Runtime on the fake GPUs.

A plan is the ONNX file behind one line of JSON. `execute_async_v3` reads and writes the addresses
that were set. Whatever real TensorRT would crash on, or leave undefined, is an assertion; whatever
it answers with `None` or `False` is that here, with a line in the log.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from tests.fakes.gpu import ALIGNMENT, FakeGpus, Span, Task
from tests.fakes.tensorrt_builder import builder_classes
from tests.fakes.tensorrt_surface import Refusing, Surface

_PLAN_MAGIC = b"fake plan "
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
_RUN_US = 50.0
_IMAGE_US = 30.0


@dataclass
class TensorRtFaults:
    """What goes wrong; a text is the log line that comes with it, empty is nothing.

    Attributes:
        build: `build_serialized_network` gives None.
        deserialise: `deserialize_cuda_engine` gives None.
        context: `create_execution_context` gives None.
        execute: `execute_async_v3` gives False, outside of captures.
        execute_from_batch: `execute` is only for batches from here on.
        capture: `execute_async_v3` gives False in captures.
        output_dim: that `get_tensor_shape` tells; 0 for the right one.
    """

    build: str = ""
    deserialise: str = ""
    context: str = ""
    execute: str = ""
    execute_from_batch: int = 0
    capture: str = ""
    output_dim: int = 0


@dataclass
class TensorRtWorld:
    """What the objects of one fake module share.

    Attributes:
        gpus: where they run.
        surface: which names they have.
        faults: what goes wrong.
        scratch_per_image: bytes of context memory that an image needs.
        context_bytes: that TensorRT itself takes from the GPU for each context.
        alive: its objects that exist, by class.
        made: its objects that ever existed, by class.
        runs: of the network, by batch: those outside of captures.
        module: the module itself.
    """

    gpus: FakeGpus
    surface: Surface
    faults: TensorRtFaults = field(default_factory=TensorRtFaults)
    compute_capability: str = "9.0"
    scratch_per_image: int = 1024
    context_bytes: int = 4096
    alive: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)
    module: Any = None

    def log(self, logger: Any, text: str, severity: str = "ERROR") -> None:
        logger.log(getattr(self.module.ILogger.Severity, severity), text)

    def count(self, thing: Any, name: str, reserved: tuple[int, int] = (0, 0)) -> None:
        """Counts an object as long as it lives; `reserved` is GPU and bytes that it holds."""
        self.alive[name] += 1
        self.made[name] += 1

        def end() -> None:
            self.alive[name] -= 1
            self.gpus.unreserve(*reserved)

        # Without atexit, since nothing then needs to be counted.
        weakref.finalize(thing, end).atexit = False

    def plan(self, onnx: bytes, profile: Sequence[tuple[int, ...]]) -> bytes:
        head = {
            "module": self.surface.module,
            "version": self.surface.version,
            "compute_capability": self.compute_capability,
            "profile": profile,
            "sha256": hashlib.sha256(onnx).hexdigest(),
        }
        return _PLAN_MAGIC + json.dumps(head).encode() + b"\n" + onnx


def fake_tensorrt(world: TensorRtWorld) -> ModuleType:
    """Returns the module of that world."""
    surface = world.surface
    module = _Module(surface)
    is_rtx = surface.module == "tensorrt_rtx"
    for name in (*_ENUMERATIONS, *(_RTX_ENUMERATIONS if is_rtx else ())):
        module._add(name, surface.enumeration(name))
    for alias, name in (("float32", "FLOAT"), ("uint8", "UINT8"), ("float16", "HALF")):
        module._add(alias, module.DataType[name])
    bases: list[Any] = [_Runtime, _Engine, _RuntimeConfig, _Context, *builder_classes(world)]
    for base in bases:
        name = base._class_name
        made = type(name, (base,), {"_surface": surface, "_world": world})
        module._add(name, made)
    module._add("ILogger", _logger_class(module, surface))
    module._add("IProgressMonitor", _ProgressMonitor)
    world.module = module
    return module


class Dims:
    """Sizes of a tensor; a sequence, but no tuple."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]


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


class _Fake(Refusing):
    """An object of one world."""

    _world: TensorRtWorld


class _Runtime(_Fake):
    _class_name = "Runtime"

    def __init__(self, logger: Any) -> None:
        self._device = self._world.gpus.device()
        self._logger = initialised(logger)
        self._world.count(self, "Runtime")

    @property
    def engine_host_code_allowed(self) -> bool:
        return False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        world, data = self._world, bytes(serialized_engine)
        assert world.gpus.device() == self._device, "a runtime is used on another GPU"
        if world.faults.deserialise:
            world.log(self._logger, world.faults.deserialise)
            return None
        if not data.startswith(_PLAN_MAGIC):
            world.log(self._logger, "Serialization assertion header.magicTag failed.")
            return None
        head, _, onnx = data[len(_PLAN_MAGIC) :].partition(b"\n")
        told = json.loads(head)
        assert hashlib.sha256(onnx).hexdigest() == told["sha256"], "a damaged plan is native code"
        mine = (world.surface.module, world.surface.version, world.compute_capability)
        if (told["module"], told["version"], told["compute_capability"]) != mine:
            world.log(self._logger, "Version tag does not match.")
            return None
        if not world.gpus.reserve(self._device, len(onnx)):
            world.log(self._logger, f"OutOfMemory (Requested size was {len(onnx)} bytes.)")
            return None
        return world.module.ICudaEngine(self._logger, self._device, onnx, told["profile"])


class _Engine(_Fake):
    _class_name = "ICudaEngine"

    def __init__(self, logger: Any, device: int, onnx: bytes, profile: Any) -> None:
        import onnxruntime

        self._logger, self._device = logger, device
        self._profile = [tuple(shape) for shape in profile]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            onnx, options, providers=["CPUExecutionProvider"]
        )
        self._world.count(self, "ICudaEngine", (device, len(onnx)))

    @property
    def num_io_tensors(self) -> int:
        return len(self._values())

    @property
    def num_optimization_profiles(self) -> int:
        return 1

    @property
    def device_memory_size_v2(self) -> int:
        return self._scratch(self._profile[2][0])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        assert profile_index == 0
        return self._scratch(self._profile[2][0])

    def get_tensor_name(self, index: int) -> str:
        return list(self._values())[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in [value.name for value in self._session.get_inputs()]
        modes = self._world.module.TensorIOMode
        return modes.INPUT if is_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        types = {"tensor(uint8)": "UINT8", "tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
        return self._world.module.DataType[types[self._values()[name].type]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._shape(name, -1))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert profile_index == 0 and name == self._session.get_inputs()[0].name
        return [Dims(shape) for shape in self._profile]

    def create_runtime_config(self) -> Any:
        return self._world.module.IRuntimeConfig()

    def create_execution_context(self, how: Any = None) -> Any:
        world, strategies = self._world, self._world.module.ExecutionContextAllocationStrategy
        assert world.gpus.device() == self._device, "a context is made on another GPU"
        is_config = isinstance(how, _RuntimeConfig)
        strategy = how._strategy if is_config else how or strategies.STATIC
        if world.faults.context:
            world.log(self._logger, world.faults.context)
            return None
        own = world.context_bytes
        if strategy == strategies.STATIC:
            own += self.device_memory_size_v2
        if not world.gpus.reserve(self._device, own):
            world.log(self._logger, f"OutOfMemory (Requested size was {own} bytes.)")
            return None
        return world.module.IExecutionContext(self, strategy, own)

    def _values(self) -> dict[str, Any]:
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        return {value.name: value for value in values}

    def _shape(self, name: str, batch: int) -> tuple[int, ...]:
        sizes = self._values()[name].shape
        return tuple(size if isinstance(size, int) else batch for size in sizes)

    def _scratch(self, batch: int) -> int:
        return batch * self._world.scratch_per_image


class _RuntimeConfig(_Fake):
    _class_name = "IRuntimeConfig"
    # Of TensorRT-RTX alone; the surface refuses them elsewhere.
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self._strategy = self._world.module.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy in self._world.module.ExecutionContextAllocationStrategy
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy


class _Context(_Fake):
    _class_name = "IExecutionContext"

    def __init__(self, engine: _Engine, strategy: Any, own: int) -> None:
        self._engine = engine
        self._is_mine = strategy == self._world.module.ExecutionContextAllocationStrategy.STATIC
        # Those inputs whose shape is known; a fixed one is from the beginning.
        self._shapes: dict[str, tuple[int, ...]] = {
            value.name: tuple(value.shape)
            for value in engine._session.get_inputs()
            if all(isinstance(size, int) for size in value.shape)
        }
        self._addresses: dict[str, int] = {}
        self._memory: Span | None = None
        self._memory_needed: int | None = None
        self._has_run = False
        # Grows with every change, since a captured graph holds the state of its capture.
        self._version = 0
        self._world.count(self, "IExecutionContext", (engine._device, own))
        self._world.gpus.contexts.add(self)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert name == self._engine._session.get_inputs()[0].name, f"there is no input {name!r}"
        sizes = tuple(shape)
        smallest, _, largest = self._engine._profile
        inside = len(sizes) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, sizes, largest, strict=True)
        )
        assert inside, f"the shape {sizes} is outside of the profile {smallest} to {largest}"
        if self._shapes.get(name) != sizes:
            self._shapes[name] = sizes
            self._has_run, self._memory_needed = False, None
            self._version += 1
        return True

    def infer_shapes(self) -> list[str]:
        names = [value.name for value in self._engine._session.get_inputs()]
        return [name for name in names if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        batch = next(iter(self._shapes.values()))[0] if self._shapes else -1
        shape = self._engine._shape(name, batch)
        if self._world.faults.output_dim and self._is_output(name):
            shape = (shape[0], self._world.faults.output_dim)
        return Dims(shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine._values(), f"there is no tensor {name!r}"
        assert int(memory) % ALIGNMENT == 0, "memory of a tensor is not aligned"
        if self._addresses.get(name) != int(memory):
            self._addresses[name] = int(memory)
            self._version += 1
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes(), "the memory of unknown shapes"
        batch = next(iter(self._shapes.values()))[0]
        self._memory_needed = self._engine._scratch(batch)
        return self._memory_needed

    def set_device_memory(self, memory: int, size: int) -> None:
        assert not self._is_mine, "this context has its own memory"
        assert int(memory) % ALIGNMENT == 0, "memory of a context is not aligned"
        self._memory = Span(int(memory), int(size))
        self._version += 1

    # Of TensorRT-RTX alone.
    def is_stream_capturable(self, stream: Any) -> bool:
        self._world.gpus.stream(int(stream))
        return False

    def execute_async_v3(self, stream_handle: Any) -> bool:
        world, engine = self._world, self._engine
        assert world.gpus.device() == engine._device, "a context is used on another GPU"
        assert int(stream_handle) != 0, "the default stream waits for all others"
        stream = world.gpus.stream(int(stream_handle))
        assert not self.infer_shapes(), "an input has no shape"
        missing = [name for name in engine._values() if name not in self._addresses]
        assert not missing, f"tensors without an address: {missing}"
        batch = next(iter(self._shapes.values()))[0]
        faults = world.faults
        if stream.capture is not None:
            if faults.capture or not self._has_run:
                stream.capture.is_invalid = True
                text = faults.capture or "operation not permitted when stream is capturing"
                world.log(engine._logger, text)
                return False
        elif faults.execute and batch >= faults.execute_from_batch:
            world.log(engine._logger, faults.execute)
            return False
        else:
            self._has_run = True
            world.runs[batch] += 1
        world.gpus.queue(stream, self._task(batch))
        return True

    def _task(self, batch: int) -> Task:
        engine, me, version = self._engine, weakref.ref(self), self._version
        source = engine._session.get_inputs()[0].name
        target = engine._session.get_outputs()[0].name
        shapes = {name: engine._shape(name, batch) for name in (source, target)}
        item = {"tensor(uint8)": np.dtype(np.uint8)}
        kind = item.get(engine._values()[source].type, np.dtype(np.float32))
        read = Span(self._addresses[source], _product(shapes[source]) * kind.itemsize)
        written = Span(self._addresses[target], _product(shapes[target]) * 4)
        scratch = () if self._is_mine else (self._checked_memory(),)
        session = engine._session

        def run() -> None:
            images = read.bytes().view(kind).reshape(shapes[source])
            rows = session.run([target], {source: images})[0]
            written.bytes()[:] = np.ascontiguousarray(rows, np.float32).view(np.uint8).ravel()
            for span in scratch:
                span.bytes()[:] = 0

        def unchanged() -> None:
            context = me()
            assert context is not None, "a graph is launched after the end of its context"
            assert context._version == version, "a graph is launched after its context changed"

        duration = _RUN_US + _IMAGE_US * batch
        return Task("run", batch, 0, duration, run, (read,), (written, *scratch), unchanged)

    def _checked_memory(self) -> Span:
        assert self._memory is not None, "a context without memory runs"
        needed = self._memory_needed
        if needed is None:
            needed = self._engine.device_memory_size_v2
        assert self._memory.size >= needed, f"{needed} bytes of context memory are needed"
        return self._memory

    def _held(self) -> list[Span]:
        """Returns memory that must not be freed before this context."""
        memory = [] if self._memory is None else [self._memory]
        return [*memory, *(Span(address, 1) for address in self._addresses.values())]

    def _is_output(self, name: str) -> bool:
        return name in [value.name for value in self._engine._session.get_outputs()]


class _ProgressMonitor:
    """Asserts that the base is initialised, since the bindings crash otherwise."""

    def __init__(self) -> None:
        self._is_initialised = True


def initialised(thing: Any) -> Any:
    """Returns a logger or monitor after a look at whether its base's `__init__` was called."""
    assert getattr(thing, "_is_initialised", False), "the base's __init__ was not called"
    return thing


def _logger_class(module: Any, surface: Surface) -> type:
    severities = [name for name in surface.members("ILogger") if name.isupper()]
    order = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    assert sorted(severities) == sorted(order)
    import enum

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


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
