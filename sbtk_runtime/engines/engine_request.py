"""What an engine is opened with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sbtk_runtime.bundle import Bundle, OnnxForm
from sbtk_runtime.manifest import Precision

#: Told, in a sentence, what the user may want to know while an engine opens or runs.
Said = Callable[[str], None]


def said_nothing(_: str) -> None:
    """Takes a sentence and keeps it to itself."""


@dataclass(frozen=True)
class EngineRequest:
    """A model and how it is to be run; what every engine's `open` function takes.

    Attributes:
        bundle: the model.
        precision: of the ONNX file to run.
        threads: CPU threads to use in all.
        lanes: calls of `run` that will go on at once; a GPU has one lane whatever is asked for.
        device: `cpu`, `cuda` (the first GPU) or `cuda:N`.
        batch: most images that a run will usually get; more work too, in parts.
        may_build: whether an engine that has to be built first, for a minute or so, may be.
        said: told what is under way and what was changed to make it work.
        form: of the ONNX file, for engines that run either; TensorRT's take their own form only.
    """

    bundle: Bundle
    precision: Precision
    threads: int
    lanes: int
    device: str
    batch: int = 32
    may_build: bool = True
    said: Said = said_nothing
    form: OnnxForm = "plain"
