"""What an engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from sbtk_runtime.bundle import OnnxForm
from sbtk_runtime.manifest import Precision


@dataclass(frozen=True)
class EngineInfo:
    """An open engine: what runs, where, and what was tried before it.

    Attributes:
        name: as `--engine` takes it.
        precision: of the ONNX file that it runs.
        device: `cpu`, or the GPU it runs on, such as `cuda:0`.
        dim: length of an embedding.
        threads: CPU threads that it uses in all.
        lanes: calls of `run` that go on at once; the threads are shared out among them.
        version: of its library.
        form: of the ONNX file that it runs, which is another one for TensorRT's INT8.
        domain_input: name of the model's input for the kind of pictures; `None` if it has none.
        is_in_calling_thread: whether a lane of one thread computes in the thread that calls `run`.
        passed_over: for each faster engine that `auto` could not use, its name and why.
    """

    name: str
    precision: Precision
    device: str
    dim: int
    threads: int
    lanes: int
    version: str
    form: OnnxForm = "plain"
    domain_input: str | None = None
    is_in_calling_thread: bool = False
    passed_over: tuple[str, ...] = ()
