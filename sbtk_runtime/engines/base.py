"""The interface of engines, and the options to open one with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle, OnnxForm
from sbtk_runtime.errors import EngineUnavailable
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import RegionGrid

Images = NDArray[np.uint8]
Embeddings = NDArray[np.float32]

#: The first engine that works, as `--engine` takes it.
AUTO = "auto"

_FASTEST_ON_CPU: tuple[Precision, ...] = ("int8", "fp32", "fp16")
_FASTEST_ON_GPU: tuple[Precision, ...] = ("fp16", "fp32", "int8")


class Engine(Protocol):
    """Runs the model of one bundle in one precision.

    Threads may call `run` at once; calls beyond `info.lanes` wait.

    Attributes:
        info: name, device and version.
    """

    info: EngineInfo

    def run(self, images: Images, kind: Kind) -> Embeddings:
        """Return the embeddings of a batch.

        Args:
            images: `(N, 224, 224, 3) uint8` RGB, any N from 1; with a grid of regions
                `(N, S, S, 3)`.
            kind: of all images; only models with a domain input use it.

        Returns:
            `(N, D) float32`, of length 1 except where the model failed; see `validate_embeddings`.
            With a grid of R regions `(N, R, D)`.

        Raises:
            EngineUnavailable: the engine failed as a whole.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot run afterwards."""
        ...


@dataclass(frozen=True)
class EngineInfo:
    """An open engine: what it runs, on which device, and which engines were tried before.

    Attributes:
        name: as `--engine` takes it.
        precision: of its ONNX file.
        device: `cpu`, or a GPU such as `cuda:0`.
        dim: length of an embedding.
        threads: CPU threads of all lanes together.
        lanes: calls of `run` that run at once; the threads are divided among them.
        version: of its library.
        form: of its ONNX file; TensorRT has its own for INT8.
        domain_input: name of the model's input for the kind of image; `None` if it has none.
        is_in_calling_thread: whether a lane of one thread computes in the thread calling `run`.
        passed_over: for each faster engine that `auto` could not use, its name and the reason.
        regions: the windows that are embedded instead of the whole frame.
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
    regions: RegionGrid | None = None


#: Called with notices for the user, each a sentence, while an engine opens or runs.
Notify = Callable[[str], None]


def no_notify(_: str) -> None:
    """Ignore the notice."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs a model, and how; the options of the same names in every command.

    Attributes:
        engine: the name of an engine, or `auto` for the first one that works.
        precision: of the ONNX file to run; `None` for the engine's fastest that the bundle has.
        threads: CPU threads to use; `None` for all that this process may use.
        device: `cpu`, `cuda` (the first GPU) or `cuda:N`; `None` for what the engine runs on.
        batch: the most images that a run usually gets; larger runs are split.
    """

    engine: str = AUTO
    precision: Precision | None = None
    threads: int | None = None
    device: str | None = None
    batch: int = 32


DEFAULT_OPTIONS = EngineOptions()


@dataclass(frozen=True)
class EngineRequest:
    """A model to open and the options to open it with; what every engine's `open` takes.

    Attributes:
        bundle: the model.
        options: which of the bundle's files to run, and on what; the engine itself is given.
        lanes: calls of `run` that run at once; a GPU always has one.
        form: of the ONNX file, for engines that run both; TensorRT runs only its own.
        may_build: whether an engine may build a plan first, which takes a minute or so.
        notify: called with sentences on what takes long and on what was changed to make it work.
        regions: embed these windows instead of the whole frame.
    """

    bundle: Bundle
    options: EngineOptions
    lanes: int = 1
    form: OnnxForm = "plain"
    may_build: bool = True
    notify: Notify = no_notify
    regions: RegionGrid | None = None

    def model(self) -> str | bytes:
        """Return the ONNX file to run, after checking it: its path, or the graph of the regions.

        Raises:
            BadModel: the file is damaged, or has no map whose windows could be pooled.
        """
        if self.regions is None:
            return str(self.bundle.verify_onnx(self.precision, self.form))
        content = self.bundle.read_onnx(self.precision, self.form)
        dim = self.bundle.manifest.dim
        return region_graph(content, self.regions, dim, self.name)

    @property
    def name(self) -> str:
        """The path of the ONNX file, for messages."""
        return str(self.bundle.onnx_path(self.precision, self.form))

    @property
    def device(self) -> str:
        """The device of the options; a CPU by default."""
        return self.options.device or "cpu"

    @property
    def threads(self) -> int:
        """The CPU threads to use in all."""
        return cpu_threads() if self.options.threads is None else self.options.threads

    @property
    def precision(self) -> Precision:
        """The precision of the options; by default the device's fastest that the bundle has."""
        if self.options.precision is not None:
            return self.options.precision
        fastest = _FASTEST_ON_CPU if self.device == "cpu" else _FASTEST_ON_GPU
        held = self.bundle.precisions_of(self.form)
        return next((precision for precision in fastest if precision in held), fastest[0])


#: The graph y = -x of one float32 as an ONNX file, stored so that no ONNX library is needed.
PROBE_GRAPH = bytes.fromhex(
    "08083a320a0b0a017812017922034e65671201705a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)
PROBE_INPUT, PROBE_OUTPUT = "x", "y"


def probe_question() -> NDArray[np.float32]:
    """Return the probe graph's input `x (1,) float32`."""
    return np.array([2.0], dtype=np.float32)


def check_probe_answer(answer: NDArray[np.float32], library: str) -> None:
    """Check the probe graph's output `y (1,) float32`.

    Raises:
        EngineUnavailable: `library` computed something else.
    """
    if answer.tolist() != [-2.0]:
        raise EngineUnavailable(f"{library} computes -2 as {answer.tolist()}", "[-2.0]")
