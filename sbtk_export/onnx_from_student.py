"""The student as an ONNX file: uint8 pixels in, unit rows out, everything in between inside.

Students that are told sketch from photo get a second input for that, `domain (N,) float32`.

Scaling, mean and standard deviation, and the L2 norm are part of the graph, so that nobody can
get them wrong and four times fewer bytes move than with float input.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from sbtk_export.strides import move_strides_up
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path
from sbtk_runtime.onnx_file import DOMAIN_NAME, INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD, SIZE_PX
from sbtk_train.students.student import Student

MAX_BATCH = 1024

# A shorter row than this is divided by it, as torch's `normalize` does.
_SHORTEST = 1e-12
# torch specialises a batch of 1.
_TRACED_BATCH = 2


class Deployed(nn.Module):
    """A student with the input and output that every engine sees.

    Args:
        student: in evaluation mode; it is shared, not copied.
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
        """Returns `(N, D) float32` unit rows for `(N, 224, 224, 3) uint8` RGB and `(N,)` domains.

        Domains are for students that have a domain input, and left out for others.
        """
        # Cast comes first: TensorRT lets nothing else consume a uint8 input.
        planes = images.float().permute(0, 3, 1, 2) * self.scale + self.shift
        rows = self.student.project(self.student.feature(planes, domains).float())
        # Not `functional.normalize`: it expands the norms to the batch size, for which the
        # exporter asks the input's shape, and that is a second consumer.
        lengths: Tensor = rows.norm(dim=1, keepdim=True)
        return rows / lengths.clamp_min(_SHORTEST)


def write_onnx(student: Student, path: Path, opset: int | None = None) -> None:
    """Writes the student to `path` as one self-contained, checked ONNX file, atomically.

    Batch norms are folded into the convolutions by the exporter, and strides moved up to where
    they spare work.

    Args:
        student: in evaluation mode.
        path: the file to make.
        opset: version of ONNX's operators, one of `OPSETS`; `None` for the exporter's own choice.

    Raises:
        BadModel: the graph that came out is not what engines are promised.
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
        without_traces(model)
        check_model(model, student.dim, has_domain_input=student.has_domain_input)
        # The exporter keeps another version, with no error, where it cannot convert.
        found = max(entry.version for entry in model.opset_import if entry.domain == "")
        if opset not in (None, found):
            raise BadModel(
                f"the exporter wrote opset {found}", f"opset {opset}", "leave --opset out"
            )
        onnx.save(model, temporary)


def without_traces(model: onnx.ModelProto) -> None:
    """Removes from `model` what the exporter noted about its own work.

    Stack traces name folders of the machine, and the notes make equal models unequal.
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
    """Checks that a model is valid ONNX and keeps the promises made to engines.

    Args:
        model: what was exported.
        dim: length of an embedding.
        has_domain_input: whether it takes the kind of each picture beside the pixels.

    Raises:
        BadModel: names the first promise that is broken.
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
        (
            [node.op_type for node in graph.node if INPUT_NAME in node.input],
            ["Cast"],
        ),
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
    """Keeps the exporter's remarks about its own internals off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
