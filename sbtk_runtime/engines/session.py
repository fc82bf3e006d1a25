"""A library's session as an engine: checks what the model takes, and runs any number of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import EngineInfo, Notify, no_notify
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX, Kind, domains_of

#: A model's inputs by name, each contiguous: see `feeds_of`.
Feeds = dict[str, NDArray[Any]]
#: Gives the rows `(N, D) float32` of a model's inputs; any thread's.
Infer = Callable[[Feeds], NDArray[np.float32]]

#: An input or output: its name, its type as ONNX writes it, and its shape with "?" for any size.
Port = tuple[str, str, tuple[int | str, ...]]

# A CPU is as fast at 8 images as at 32, and the activations of 8 need little memory. No more than
# this many images are under way in all lanes together, as long as there are no more lanes.
_CPU_CHUNK = 8
_CPU_IMAGES = 32


class SessionEngine:
    """A model that some library runs in parts of one size; see `engine_protocol.Engine`.

    Args:
        infer: runs the model; dropped by `close`, with all that it holds.
        info: what the engine says about itself.
        chunk: most images of a part.
        told: what an error of the library says, in a line.
        notify: told when memory is short and the parts become smaller.
    """

    def __init__(
        self,
        infer: Infer,
        info: EngineInfo,
        chunk: int,
        told: Callable[[BaseException], str],
        notify: Notify = no_notify,
    ) -> None:
        self.info = info
        self._infer: Infer | None = infer
        self._chunk = chunk
        self._told = told
        self._notify = notify

    def run(self, images: NDArray[np.uint8], kind: Kind) -> NDArray[np.float32]:
        """Returns the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8` of a kind.

        Large batches go through in parts, so that memory does not depend on N.

        Raises:
            EngineUnavailable: the library failed, or the engine is closed.
            BadModel: the model's answer does not have the shape that the manifest tells.
        """
        # Another thread may close the engine meanwhile; this run then ends on the old session.
        infer = self._infer
        if infer is None:
            raise EngineUnavailable(f"the engine {self.info.name} is closed", "an open engine")
        embeddings = np.empty((len(images), self.info.dim), dtype=np.float32)
        start = 0
        while start < len(images):
            part = images[start : start + self._chunk]
            try:
                rows = infer(feeds_of(part, kind, self.info.domain_input))
            # The libraries' exceptions share no base class below Exception.
            except Exception as problem:
                if len(part) > 1 and is_out_of_memory(problem):
                    self._take_smaller_parts(len(part) // 2)
                    continue
                raise EngineUnavailable(
                    f"{self.info.name} failed on {len(part)} images: {self._told(problem)}",
                    "a batch that runs",
                    "sbtk doctor shows which engines work here",
                ) from problem
            if rows.shape != (len(part), self.info.dim):
                raise BadModel(
                    f"the model gives {rows.shape} for {len(part)} images",
                    f"({len(part)}, {self.info.dim})",
                    "export the model with sbtk export",
                )
            embeddings[start : start + len(part)] = rows
            start += len(part)
        return embeddings

    def close(self) -> None:
        """Frees the session, its threads and its memory."""
        self._infer = None

    def prove(self) -> None:
        """Runs one picture: the proof that the engine works, and its warm-up.

        Raises:
            EngineUnavailable: it does not.
            BadModel: the model's answer does not have the shape that the manifest tells.
        """
        self.run(np.full((1, SIZE_PX, SIZE_PX, 3), 255, dtype=np.uint8), "sketch")

    def _take_smaller_parts(self, chunk: int) -> None:
        # Several lanes may find memory short at once; the smallest part wins.
        if chunk < self._chunk:
            self._chunk = chunk
            self._notify(
                f"{self.info.name} is short of memory: going on with {chunk} images at once"
            )


def cpu_chunk(lanes: int) -> int:
    """Returns how many images each lane of a CPU's engine should take at once."""
    return max(1, min(_CPU_CHUNK, _CPU_IMAGES // lanes))


def feeds_of(images: NDArray[np.uint8], kind: Kind, domain_input: str | None) -> Feeds:
    """Returns the inputs of a model for `images (N, 224, 224, 3) uint8` of a kind.

    Args:
        images: copied if they are not contiguous.
        kind: what all of them are.
        domain_input: as the model's manifest has it.
    """
    feeds: Feeds = {INPUT_NAME: np.ascontiguousarray(images)}
    if domain_input is not None:
        feeds[domain_input] = domains_of(kind, len(images))
    return feeds


def check_signature(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    name: str,
    dim: int,
    domain_input: str | None = None,
) -> None:
    """Checks that a session takes and gives what `Engine.run` and the manifest promise.

    Args:
        inputs: of the session.
        outputs: of the session.
        name: what to call the model in a complaint.
        dim: length of an embedding.
        domain_input: as the manifest has it.

    Raises:
        BadModel: it does not; says what it takes or gives.
    """
    # A dynamic size is shown as "?"; the embedding's may be, and is then tried by a run.
    wanted: list[Port] = [(INPUT_NAME, "tensor(uint8)", ("?", SIZE_PX, SIZE_PX, 3))]
    if domain_input is not None:
        wanted.append((domain_input, "tensor(float)", ("?",)))
    # Libraries need not keep the order of the inputs.
    fits_in = sorted(inputs, key=_name_of) == sorted(wanted, key=_name_of)
    fits_out = list(outputs) in (
        [(OUTPUT_NAME, "tensor(float)", ("?", dim))],
        [(OUTPUT_NAME, "tensor(float)", ("?", "?"))],
    )
    if not fits_in:
        raise BadModel(
            f"{name} takes {_ports_text(inputs)}",
            f"{_ports_text(wanted)}, as its manifest tells",
            "export the model with sbtk export",
        )
    if not fits_out:
        raise BadModel(
            f"{name} gives {_ports_text(outputs)}",
            f"{OUTPUT_NAME}: tensor(float) (?, {dim})",
            "export the model with sbtk export",
        )


def first_line(problem: BaseException) -> str:
    """Returns the first line of an exception's text, or its type where it has none."""
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__


def _name_of(port: Port) -> str:
    return port[0]


def _ports_text(ports: Sequence[Port]) -> str:
    parts = [f"{name}: {kind} ({', '.join(map(str, shape))})" for name, kind, shape in ports]
    return " and ".join(parts) or "nothing"


def is_out_of_memory(problem: Exception) -> bool:
    """Returns whether a library got no memory, for its data or to be loaded."""
    text = str(problem).lower()
    return isinstance(problem, MemoryError) or any(
        sign in text
        for sign in (
            *("out of memory", "failed to allocate memory", "bad_alloc"),
            *("failed to map segment", "cannot allocate memory"),
        )
    )
