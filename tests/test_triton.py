"""The model repository for Triton fits the models of the bundle that comes with sbtk.

The configurations are read by protobuf itself, against the part of Triton's `model_config.proto`
that they use; a field that is not in it is an error, as it is for Triton.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.tensorrt.build import BuildSettings

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "deploy" / "triton" / "sbtk"
CONFIGURATIONS = sorted(MODEL.rglob("*.pbtxt"))
every = pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)

#: The ONNX file behind each model file, and the backend that runs it.
SOURCES = {
    "model.fp16.onnx": ("model.fp16.onnx", "onnxruntime"),
    "model.int8.onnx": ("model.int8.onnx", "onnxruntime"),
    "model.plan": ("model.fp16.onnx", "tensorrt"),
}
_TYPES = {"UINT8": "TYPE_UINT8", "FLOAT": "TYPE_FP32"}

# Message by message: each field's name and type, `*` for a repeated one, `{}` for a map of texts.
_SCHEMA = {
    "Config": "name:text backend:text max_batch_size:int input:Port* output:Port* "
    "instance_group:Group* default_model_filename:text dynamic_batching:Batching "
    "optimization:Optimization",
    "Port": "name:text data_type:DataType dims:int*",
    "Group": "kind:Kind count:int",
    "Batching": "preferred_batch_size:int* max_queue_delay_microseconds:int",
    "Optimization": "execution_accelerators:Accelerators",
    "Accelerators": "gpu_execution_accelerator:Accelerator* cpu_execution_accelerator:Accelerator*",
    "Accelerator": "name:text parameters:{}",
}
_ENUMS = {
    "DataType": "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_INT8 TYPE_FP16 TYPE_FP32",
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}


def test_there_is_a_configuration_for_each_way_to_run() -> None:
    assert [path.relative_to(MODEL).as_posix() for path in CONFIGURATIONS] == [
        "config.pbtxt",
        "configs/cpu.pbtxt",
        "configs/plan.pbtxt",
    ]


@every
def test_names_types_and_shapes_are_those_of_the_onnx_file(path: Path) -> None:
    configuration = _read(path)
    model = onnx.load(_onnx_path(configuration), load_external_data=False)
    for ports, values in (
        (configuration.input, model.graph.input),
        (configuration.output, model.graph.output),
    ):
        assert len(ports) == len(values) == 1
        (port,), (value,) = ports, values
        kind = value.type.tensor_type
        batch, *sizes = kind.shape.dim
        assert port.name == value.name
        assert _name_of_type(port) == _TYPES[onnx.TensorProto.DataType.Name(kind.elem_type)]
        assert list(port.dims) == [size.dim_value for size in sizes]
        # What lets Triton put its own batch before the dims: the file leaves it open.
        assert batch.dim_param == "batch"


@every
def test_triton_can_batch_requests(path: Path) -> None:
    configuration = _read(path)
    assert configuration.max_batch_size > 0
    assert configuration.HasField("dynamic_batching")


@every
def test_the_name_is_the_folders_and_the_backend_accepts_the_file(path: Path) -> None:
    configuration = _read(path)
    assert configuration.name == MODEL.name
    _, backend = SOURCES[configuration.default_model_filename]
    assert configuration.backend == backend


def test_the_configuration_of_plans_fits_the_default_profile() -> None:
    assert _read(MODEL / "configs" / "plan.pbtxt").max_batch_size == BuildSettings().batch_max


def test_tensorrts_profile_covers_the_batches_of_triton() -> None:
    configuration = _read(MODEL / "config.pbtxt")
    (accelerator,) = configuration.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    (port,) = configuration.input
    built = BuildSettings()
    batches = {"min": built.batch_min, "opt": built.batch_opt, "max": configuration.max_batch_size}
    for which, batch in batches.items():
        shape = "x".join(map(str, [batch, *port.dims]))
        assert accelerator.parameters[f"trt_profile_{which}_shapes"] == f"{port.name}:{shape}"
    # Any would let TensorRT choose precisions anew, the norm's included.
    assert "precision_mode" not in accelerator.parameters


def test_batched_requests_get_the_rows_of_single_ones() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    engine = open_engine(Bundle.open(), EngineOptions(engine="onnxruntime", precision="int8"))
    try:
        joined = engine.run(images, "photo")
        alone = np.concatenate([engine.run(image[None], "photo") for image in images])
    finally:
        engine.close()
    np.testing.assert_allclose(joined, alone, atol=1e-5)


def test_a_field_that_triton_does_not_know_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text('name: "sbtk"\nmax_batchsize: 8\n')
    with pytest.raises(text_format.ParseError, match="max_batchsize"):
        _read(path)


def _read(path: Path) -> Any:
    return text_format.Parse(path.read_text(), _configuration_class()())


def _onnx_path(configuration: Any) -> Path:
    bundle = Bundle.open()
    name, _ = SOURCES[configuration.default_model_filename]
    assert name in bundle.manifest.files
    return bundle.folder / name


def _name_of_type(port: Any) -> str:
    return str(port.DESCRIPTOR.fields_by_name["data_type"].enum_type.values[port.data_type].name)


def _configuration_class() -> Any:
    """Return the message class `Config` of `_SCHEMA`."""
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(), start=1):
            _add_field(message, number, *field.split(":"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Config"))


def _add_field(message: Any, number: int, name: str, kind: str) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    plain = {"text": kinds.TYPE_STRING, "int": kinds.TYPE_INT64}
    is_many = kind.endswith("*") or kind == "{}"
    label = kinds.LABEL_REPEATED if is_many else kinds.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    kind = kind.removesuffix("*")
    if kind == "{}":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "text")
        _add_field(entry, 2, "value", "text")
        field.type, field.type_name = kinds.TYPE_MESSAGE, f".t.{message.name}.{entry.name}"
    elif kind in plain:
        field.type = plain[kind]
    else:
        field.type = kinds.TYPE_ENUM if kind in _ENUMS else kinds.TYPE_MESSAGE
        field.type_name = f".t.{kind}"
