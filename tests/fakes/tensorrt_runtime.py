"""The fake's runtime and engines: a plan is loaded and an ONNX Runtime session made of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tests.fakes.tensorrt_context import RuntimeConfig
from tests.fakes.tensorrt_world import PLAN_MAGIC, Dims, Fake, initialised


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
