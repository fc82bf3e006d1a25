"""What a TensorRT plan is built from, and whether TensorRT made of it what sbtk promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sbtk_runtime.engines.tensorrt_library import TensorRt
from sbtk_runtime.errors import BadModel
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME, opset_of_onnx
from sbtk_runtime.preprocess import SIZE_PX

_EXPORT_AGAIN = "export the model with sbtk export"

# TensorRT parses a newer opset without a word and reads its operators by the rules of an older one.
# These are the newest that its documentation names for every 10.x, and for 11.x.
_NEWEST_OPSET = 20
_NEWEST_OPSET_FROM_11 = 25


@dataclass(frozen=True)
class PlanModel:
    """A model that a plan is to be built from.

    Attributes:
        onnx: `images (N, 224, 224, 3) uint8`, and the domain input, to `embeddings (N, D) float32`.
        name: what to call it in a complaint.
        domain_input: name of its input `(N,) float32` for the kind of pictures, as the manifest
            has it; `None` if it has none.
    """

    onnx: bytes
    name: str
    domain_input: str | None

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """By input, its shape without the batch."""
        domain = {} if self.domain_input is None else {self.domain_input: ()}
        return {INPUT_NAME: (SIZE_PX, SIZE_PX, 3), **domain}


def check_opset(trt: TensorRt, model: PlanModel) -> None:
    """Checks that a TensorRT knows the operators of a model.

    Raises:
        BadModel: they are newer than it is.
    """
    is_from_11 = trt.name == "tensorrt" and trt.major >= 11
    newest = _NEWEST_OPSET_FROM_11 if is_from_11 else _NEWEST_OPSET
    opset = opset_of_onnx(model.onnx)
    if opset > newest:
        raise BadModel(
            f"{model.name} uses ONNX opset {opset}",
            f"at most {newest} for {trt.title}",
            _EXPORT_AGAIN,
        )


def check_network(module: Any, network: Any, model: PlanModel) -> None:
    """Checks that the network takes and gives what `Engine.run` and the manifest promise.

    Args:
        module: the TensorRT that parsed it.
        network: what became of the model.
        model: what was parsed.

    Raises:
        BadModel: it does not; says what it takes or gives.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in inputs}
    types = {INPUT_NAME: module.DataType.UINT8}
    wanted = {
        name: (types.get(name, module.DataType.FLOAT), (-1, *sizes))
        for name, sizes in model.sizes.items()
    }
    if found != wanted:
        domain = "" if model.domain_input is None else f" and {model.domain_input}: FLOAT (any)"
        raise BadModel(
            f"{model.name} takes {_told(inputs)}",
            f"{INPUT_NAME}: UINT8 (any batch, {SIZE_PX}, {SIZE_PX}, 3){domain}, and nothing else, "
            "as its manifest tells",
            _EXPORT_AGAIN,
        )
    if len(outputs) != 1 or not (
        outputs[0].name == OUTPUT_NAME
        and outputs[0].dtype == module.DataType.FLOAT
        and len(outputs[0].shape) == 2
        and outputs[0].shape[0] == -1
        and outputs[0].shape[1] > 0
    ):
        raise BadModel(
            f"{model.name} gives {_told(outputs)}",
            f"{OUTPUT_NAME}: FLOAT (any batch, D), and nothing else",
            _EXPORT_AGAIN,
        )


def _told(tensors: list[Any]) -> str:
    """Returns names, types and shapes of tensors for people; -1 is a size that may vary."""
    parts = []
    for tensor in tensors:
        sizes = ", ".join("any" if size == -1 else str(size) for size in tensor.shape)
        parts.append(f"{tensor.name}: {tensor.dtype.name} ({sizes})")
    return " and ".join(parts) or "nothing"
