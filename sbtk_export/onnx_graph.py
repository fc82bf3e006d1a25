"""The student as an ONNX file, from uint8 pixels to unit rows.

Students with a domain input get a second ONNX input, `domain (N,) float32`.

Scaling, mean, standard deviation and the L2 norm are part of the graph, so that no caller can get
them wrong; uint8 input is four times smaller than float input.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path
from sbtk_runtime.onnx_file import DOMAIN_NAME, INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import (
    DOMAINS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZE_PX,
    Kind,
    Pixels,
    domains_of,
)
from sbtk_train.models.student import Student

MAX_BATCH = 1024

# Shorter rows are divided by this length, as torch's `normalize` does.
_SHORTEST = 1e-12
# torch would specialise the graph for a batch of 1.
_TRACED_BATCH = 2


class Deployed(nn.Module):
    """A student with the inputs and the output of an engine.

    Args:
        student: in evaluation mode; shared, not copied.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor, domains: Tensor | None = None) -> Tensor:
        """Return `(N, D) float32` unit rows of `(N, 224, 224, 3) uint8` RGB.

        `domains (N,)` are for students with a domain input only.
        """
        # Cast comes first: TensorRT allows no other consumer of a uint8 input.
        planes = images.float().permute(0, 3, 1, 2) * self.scale + self.shift
        rows = self.student.project(self.student.feature(planes, domains).float())
        # Not `functional.normalize`: it expands the norms to the batch size, for which the
        # exporter asks the input's shape, and that is a second consumer.
        lengths: Tensor = rows.norm(dim=1, keepdim=True)
        return rows / lengths.clamp_min(_SHORTEST)


def write_onnx(student: Student, path: Path, opset: int | None = None) -> None:
    """Write the student to `path` as one self-contained, checked ONNX file, atomically.

    The exporter folds batch norms into convolutions. Strides are moved up where that saves work.

    Args:
        student: in evaluation mode.
        path: the file to write.
        opset: version of ONNX's operators, one of `OPSETS`; `None` for the exporter's default.

    Raises:
        BadModel: the exported graph breaks the contract with the engines.
    """
    deployed = Deployed(student).eval()
    names = [INPUT_NAME]
    inputs = [torch.zeros((_TRACED_BATCH, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)]
    if student.has_domain_input:
        names.append(DOMAIN_NAME)
        inputs.append(torch.zeros(_TRACED_BATCH))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        program = torch.onnx.export(
            deployed,
            tuple(inputs),
            dynamo=True,
            input_names=names,
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: batch},) * len(inputs),
            verbose=False,
            opset_version=opset,
        )
    if program is None:
        raise BadModel("torch.onnx.export returned nothing", "an ONNX program")
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
        model = onnx.load(temporary)
        move_strides_up(model)
        strip_traces(model)
        check_model(model, student.dim, has_domain_input=student.has_domain_input)
        # If the exporter cannot convert, it keeps another version without an error.
        found = max(entry.version for entry in model.opset_import if entry.domain == "")
        if opset not in (None, found):
            raise BadModel(
                f"the exporter wrote opset {found}", f"opset {opset}", "leave --opset out"
            )
        onnx.save(model, temporary)


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata from `model`.

    Its stack traces contain paths of this machine, and make equal models differ.
    """
    model.doc_string = ""
    graph = model.graph
    del model.metadata_props[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def check_model(model: onnx.ModelProto, dim: int, *, has_domain_input: bool) -> None:
    """Check that a model is valid ONNX and has the inputs and the output that engines expect.

    Args:
        model: the exported model.
        dim: length of an embedding.
        has_domain_input: whether it takes the kind of each image in addition to the pixels.

    Raises:
        BadModel: names the first difference.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        raise BadModel(f"the exported graph is not valid ONNX: {problem}") from problem
    graph = model.graph
    inputs: list[_Signature] = [(INPUT_NAME, "UINT8", ("batch", SIZE_PX, SIZE_PX, 3))]
    if has_domain_input:
        inputs.append((DOMAIN_NAME, "FLOAT", ("batch",)))
    promises = (
        ([_signature(value) for value in graph.input], inputs),
        ([_signature(value) for value in graph.output], [(OUTPUT_NAME, "FLOAT", ("batch", dim))]),
        ([node.op_type for node in graph.node[:2]], ["Cast", "Transpose"]),
        ([node.op_type for node in graph.node if INPUT_NAME in node.input], ["Cast"]),
    )
    for found, expected in promises:
        if found != expected:
            raise BadModel(f"the exported graph has {found}", f"{expected}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer):
        raise BadModel("the exported graph keeps weights in another file", "a single file")


_Signature = tuple[str, str, tuple[str | int, ...]]


def _signature(value: onnx.ValueInfoProto) -> _Signature:
    kind = value.type.tensor_type
    sizes = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
    return value.name, onnx.TensorProto.DataType.Name(kind.elem_type), sizes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's log messages and warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


_ELEMENTWISE = frozenset({"Add", "Cast", "Relu"})


def move_strides_up(model: onnx.ModelProto) -> int:
    """Move strides up in `model`, in place; return the number of tensors that became smaller.

    A 1x1 convolution of stride 2 uses a quarter of its input, so the layers above it need only
    compute that quarter. The model's output stays the same; intermediate shapes are inferred again.

    Raises:
        onnx.shape_inference.InferenceError: the model was not valid before.
    """
    graph = _Graph(model.graph)
    moved = 0
    # Moving a stride can allow another move further up.
    while (name := next(graph.subsampled_tensors(), None)) is not None:
        for node in graph.consumers(name):
            _set_strides(node, 1)
        graph.subsample(name)
        moved += 1
    if moved:
        graph.sort()
        del model.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        model.CopyFrom(inferred)
    return moved


class _Graph:
    """A graph with the producer of each tensor."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._outputs = {value.name for value in graph.output}
        self._shapes = {
            value.name: tuple(
                size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim
            )
            for value in (*graph.value_info, *graph.input, *graph.output)
        }

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if name in node.input]

    def producer(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self._graph.node if name in node.output), None)

    def subsampled_tensors(self) -> Iterator[str]:
        """Yield the tensors whose readers all use only every second row and column."""
        for node in self._graph.node:
            if _is_pointwise(node, stride=2):
                name = node.input[0]
                readers = self.consumers(name)
                is_halved = all(_is_pointwise(reader, stride=2) for reader in readers)
                if self._can_subsample(name) and is_halved and name not in self._outputs:
                    yield name

    def subsample(self, name: str) -> None:
        """Make the producer of `name` compute only every second row and column.

        No reader of `name` may need more.
        """
        producer = self.producer(name)
        assert producer is not None
        if producer.op_type == "Conv":
            # If it is pointwise, it now uses less of its own input; the next round handles that.
            _set_strides(producer, 2 * _strides(producer)[0])
            return
        for position, source in enumerate(producer.input):
            if self._shapes[source] != self._shapes[name]:
                continue  # a factor per channel, for all positions
            is_read_once = len(self.consumers(source)) == 1 and source not in self._outputs
            if is_read_once and self._can_subsample(source):
                self.subsample(source)
            else:
                producer.input[position] = self._insert_pool(source)

    def _can_subsample(self, name: str) -> bool:
        producer, shape = self.producer(name), self._shapes.get(name)
        if producer is None or producer.op_type not in (*_ELEMENTWISE, "Mul", "Conv"):
            return False
        if producer.op_type == "Conv":
            return True
        shapes = [self._shapes.get(source) for source in producer.input]
        if producer.op_type == "Mul" and shape is not None:
            # A product with one factor per channel.
            return shape in shapes and {*shapes} <= {shape, (*shape[:2], 1, 1)}
        # Sums that broadcast a term are left alone.
        return shape is not None and all(each == shape for each in shapes)

    def _insert_pool(self, source: str) -> str:
        """Add a node for every second row and column of `source`, and return its output's name."""
        name = f"{source}_every_second"
        self._graph.node.append(
            # A 1x1 pool, since INT8 kernels do not support strided slices.
            helper.make_node("MaxPool", [source], [name], name, kernel_shape=[1, 1], strides=[2, 2])
        )
        return name

    def sort(self) -> None:
        """Sort the nodes topologically; otherwise keep their order."""
        made = {value.name for value in self._graph.input}
        made |= {tensor.name for tensor in self._graph.initializer} | {""}
        waiting = list(self._graph.node)
        ordered: list[onnx.NodeProto] = []
        while waiting:
            node = next(node for node in waiting if made.issuperset(node.input))
            waiting.remove(node)
            ordered.append(node)
            made.update(node.output)
        del self._graph.node[:]
        self._graph.node.extend(ordered)


def _is_pointwise(node: onnx.NodeProto, stride: int) -> bool:
    if node.op_type != "Conv":
        return False
    values = {value.name: value for value in node.attribute}
    kernel = list(values["kernel_shape"].ints) if "kernel_shape" in values else []
    pads = list(values["pads"].ints) if "pads" in values else []
    return kernel == [1, 1] and not any(pads) and _strides(node) == [stride, stride]


def _strides(node: onnx.NodeProto) -> list[int]:
    for value in node.attribute:
        if value.name == "strides":
            return list(value.ints)
    return [1, 1]


def _set_strides(node: onnx.NodeProto, stride: int) -> None:
    kept = [value for value in node.attribute if value.name != "strides"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("strides", [stride, stride])])


#: A model's inputs, by name.
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ModelInputs:
    """Images as inputs of a model.

    Attributes:
        pixels: `(N, 224, 224, 3) uint8` RGB.
        domains: `(N,) float32`, 0 for a sketch and 1 for a photo.
    """

    pixels: Pixels
    domains: NDArray[np.float32]

    @classmethod
    def of_kind(cls, pixels: Pixels, kind: Kind) -> ModelInputs:
        """Return images of one kind."""
        return cls(pixels, domains_of(kind, len(pixels)))

    @classmethod
    def of_kinds(cls, pixels: Pixels, is_sketch: NDArray[np.bool_]) -> ModelInputs:
        """Return images with the mask `is_sketch (N,) bool`."""
        domains = np.where(is_sketch, DOMAINS["sketch"], DOMAINS["photo"])
        return cls(pixels, domains.astype(np.float32))

    def __len__(self) -> int:
        return len(self.domains)

    def mixed(self) -> ModelInputs:
        """Return the images in a shuffled order, so that any part mixes sketches and photos."""
        order = np.random.default_rng(0).permutation(len(self))
        return ModelInputs(self.pixels[order], self.domains[order])

    def first(self, count: int) -> ModelInputs:
        """Return the first images, or all if there are fewer."""
        return ModelInputs(self.pixels[:count], self.domains[:count])

    def batches(self, model: onnx.ModelProto, size: int) -> Iterator[Feeds]:
        """Yield the model's inputs for `size` images at a time."""
        has_domain_input = takes_domains(model)
        for start in range(0, len(self), size):
            feeds: Feeds = {INPUT_NAME: self.pixels[start : start + size]}
            if has_domain_input:
                feeds[DOMAIN_NAME] = self.domains[start : start + size]
            yield feeds


def takes_domains(model: onnx.ModelProto) -> bool:
    """Return whether a model has the domain input."""
    return any(value.name == DOMAIN_NAME for value in model.graph.input)
