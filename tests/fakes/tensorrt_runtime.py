"""The fake's runtime, engines and execution contexts.

A plan is loaded into an ONNX Runtime session, which runs on the addresses that were set.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from typing import Any

import numpy as np

from tests.fakes.gpu import ALIGNMENT, Span, Task
from tests.fakes.tensorrt_world import PLAN_MAGIC, Dims, Fake, initialised

_RUN_US = 50.0
_IMAGE_US = 30.0


class Runtime(Fake):
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
        if not data.startswith(PLAN_MAGIC):
            world.log(self._logger, "Serialization assertion header.magicTag failed.")
            return None
        head, _, onnx = data[len(PLAN_MAGIC) :].partition(b"\n")
        sidecar = json.loads(head)
        assert hashlib.sha256(onnx).hexdigest() == sidecar["sha256"], (
            "a damaged plan is native code"
        )
        mine = (world.surface.module, world.surface.version, world.compute_capability)
        if (sidecar["module"], sidecar["version"], sidecar["compute_capability"]) != mine:
            world.log(self._logger, "Version tag does not match.")
            return None
        if not world.gpus.reserve(self._device, len(onnx)):
            world.log(self._logger, f"OutOfMemory (Requested size was {len(onnx)} bytes.)")
            return None
        return world.module.ICudaEngine(self._logger, self._device, onnx, sidecar["profile"])


class Engine(Fake):
    _class_name = "ICudaEngine"

    def __init__(self, logger: Any, device: int, onnx: bytes, profile: Any) -> None:
        import onnxruntime

        self._logger, self._device = logger, device
        self._profile = {
            name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()
        }
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
        return self._scratch(self._largest())

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        assert profile_index == 0
        return self._scratch(self._largest())

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
        assert profile_index == 0
        return [Dims(shape) for shape in self._profile[name]]

    def create_runtime_config(self) -> Any:
        return self._world.module.IRuntimeConfig()

    def create_execution_context(self, how: Any = None) -> Any:
        world, strategies = self._world, self._world.module.ExecutionContextAllocationStrategy
        assert world.gpus.device() == self._device, "a context is made on another GPU"
        is_config = isinstance(how, RuntimeConfig)
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

    def _largest(self) -> int:
        return max(int(shapes[2][0]) for shapes in self._profile.values())

    def _scratch(self, batch: int) -> int:
        return batch * self._world.scratch_per_image


class RuntimeConfig(Fake):
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


class Context(Fake):
    _class_name = "IExecutionContext"

    def __init__(self, engine: Any, strategy: Any, own: int) -> None:
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
        assert name in self._engine._profile, f"there is no input {name!r}"
        sizes = tuple(shape)
        smallest, _, largest = self._engine._profile[name]
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
        batch = self._batch()
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
        batch = self._batch()
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
        sources = [value.name for value in engine._session.get_inputs()]
        target = engine._session.get_outputs()[0].name
        shapes = {name: engine._shape(name, batch) for name in (*sources, target)}
        item = {"tensor(uint8)": np.dtype(np.uint8)}
        kinds = {n: item.get(engine._values()[n].type, np.dtype(np.float32)) for n in sources}
        read = {
            name: Span(self._addresses[name], math.prod(shapes[name]) * kinds[name].itemsize)
            for name in sources
        }
        written = Span(self._addresses[target], math.prod(shapes[target]) * 4)
        scratch = () if self._is_mine else (self._checked_memory(),)
        session = engine._session

        def run() -> None:
            feeds = {
                name: span.bytes().view(kinds[name]).reshape(shapes[name])
                for name, span in read.items()
            }
            rows = session.run([target], feeds)[0]
            written.bytes()[:] = np.ascontiguousarray(rows, np.float32).view(np.uint8).ravel()
            for span in scratch:
                span.bytes()[:] = 0

        def unchanged() -> None:
            context = me()
            assert context is not None, "a graph is launched after the end of its context"
            assert context._version == version, "a graph is launched after its context changed"

        duration = _RUN_US + _IMAGE_US * batch
        reads = tuple(read.values())
        return Task("run", batch, 0, duration, run, reads, (written, *scratch), unchanged)

    def _batch(self) -> int:
        batches = {sizes[0] for sizes in self._shapes.values()}
        assert len(batches) == 1, f"inputs of different batches: {batches}"
        return int(batches.pop())

    def _checked_memory(self) -> Span:
        assert self._memory is not None, "a context without memory runs"
        needed = self._memory_needed
        if needed is None:
            needed = self._engine.device_memory_size_v2
        assert self._memory.size >= needed, f"{needed} bytes of context memory are needed"
        return self._memory

    def _held(self) -> list[Span]:
        """Return memory that must not be freed before this context."""
        memory = [] if self._memory is None else [self._memory]
        return [*memory, *(Span(address, 1) for address in self._addresses.values())]

    def _is_output(self, name: str) -> bool:
        return name in [value.name for value in self._engine._session.get_outputs()]
