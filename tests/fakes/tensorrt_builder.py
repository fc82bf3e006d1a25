"""The build half of the fake TensorRT: an ONNX file is parsed, and becomes a plan."""

from __future__ import annotations

from typing import Any

import onnx

from tests.fakes.tensorrt_world import Fake, initialised

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
}


class HostMemory(bytes):
    """A plan or a timing cache in memory."""

    @property
    def nbytes(self) -> int:
        return len(self)


class _Builder(Fake):
    _class_name = "Builder"

    def __init__(self, logger: Any) -> None:
        if self._world.surface.module == "tensorrt":
            self._world.gpus.device()
        self._logger = initialised(logger)

    def create_network(self, flags: int = 0) -> Any:
        typed = 1 << int(self._world.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags == typed, "a network that is not strongly typed"
        return self._world.module.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._world.module.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._world.module.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        world = self._world
        assert network._onnx, "a network that nothing was parsed into"
        assert len(config._profiles) <= 1
        monitor = config.progress_monitor
        if monitor is not None:
            initialised(monitor).phase_start("Building", None, 2)
            goes_on = all(monitor.step_complete("Building", step) for step in range(2))
            monitor.phase_finish("Building")
            if not goes_on:
                world.log(self._logger, "The build was cancelled.")
                return None
        if world.faults.build:
            world.log(self._logger, world.faults.build)
            return None
        named = config._profiles[0]._shapes if config._profiles else {}
        shapes = {}
        for tensor in network._inputs:
            fixed = tuple(tensor.shape)
            if tensor.name not in named:
                assert -1 not in fixed, f"a size of {tensor.name} varies, and has no profile"
            shapes[tensor.name] = named.get(tensor.name, [fixed] * 3)
        assert named.keys() <= shapes.keys(), "a profile names an input that there is not"
        if config._timing_cache is not None:
            config._timing_cache._content = b"timings"
        return HostMemory(world.plan(network._onnx, shapes))


class _Network(Fake):
    _class_name = "INetworkDefinition"

    def __init__(self) -> None:
        self._onnx = b""
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class _Tensor(Fake):
    _class_name = "ITensor"

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self._name = value.name
        self._dtype = self._world.module.DataType[_TYPES[kind.elem_type]]
        self._shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape


class _Parser(Fake):
    _class_name = "OnnxParser"

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._world.module.ParserError(self._errors[index])

    def parse(self, model: bytes, path: str | None = None) -> bool:
        try:
            parsed = onnx.load_from_string(model)
            onnx.checker.check_model(parsed)
        except Exception as problem:
            self._errors.append(f"Failed to parse the ONNX model: {problem}")
            self._world.log(self._logger, self._errors[-1])
            return False
        tensor = self._world.module.ITensor
        self._network._onnx = bytes(model)
        self._network._inputs = [tensor(value) for value in parsed.graph.input]
        self._network._outputs = [tensor(value) for value in parsed.graph.output]
        return True


class _ParserError(Fake):
    _class_name = "ParserError"

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class _Config(Fake):
    _class_name = "IBuilderConfig"
    builder_optimization_level: Any = 3
    progress_monitor: Any = None

    def __init__(self) -> None:
        self._profiles: list[Any] = []
        self._timing_cache: Any = None
        self._flags = {self._world.module.BuilderFlag.TF32}

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool in self._world.module.MemoryPoolType and pool_size >= 0

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_flag(self, flag: Any) -> None:
        assert flag in self._world.module.BuilderFlag
        self._flags.add(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._world.module.ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._timing_cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._timing_cache


class _TimingCache(Fake):
    _class_name = "ITimingCache"

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> HostMemory:
        return HostMemory(self._content)


class _Profile(Fake):
    _class_name = "IOptimizationProfile"

    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]


BUILDER_CLASSES: tuple[Any, ...] = (
    _Builder,
    _Network,
    _Tensor,
    _Parser,
    _ParserError,
    _Config,
    _TimingCache,
    _Profile,
)
