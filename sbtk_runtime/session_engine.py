"""A library's session as an engine: checks what the model takes, and runs any number of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engine_info import EngineInfo
from sbtk_runtime.engine_request import Said, said_nothing
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX

#: Gives the rows `(N, D) float32` of contiguous `images (N, 224, 224, 3) uint8`; any thread's.
Infer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

#: An input or output: its name, its type as ONNX writes it, and its shape with "?" for any size.
Port = tuple[str, str, tuple[int | str, ...]]

# A CPU is as fast at 8 images as at 32, and the activations of 8 need little memory. No more than
# this many images are under way in all lanes together, as long as there are no more lanes.
_CPU_CHUNK = 8
_CPU_IMAGES = 32


class SessionEngine:
    """A model that some library runs in parts of one size; see `sbtk_runtime.engine.Engine`.

    Args:
        infer: runs the model; dropped by `close`, with all that it holds.
        info: what the engine says about itself.
        chunk: most images of a part.
        told: what an error of the library says, in a line.
        said: told when memory is short and the parts become smaller.
    """

    def __init__(
        self,
        infer: Infer,
        info: EngineInfo,
        chunk: int,
        told: Callable[[BaseException], str],
        said: Said = said_nothing,
    ) -> None:
        self.info = info
        self._infer: Infer | None = infer
        self._chunk = chunk
        self._told = told
        self._said = said

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8`.

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
            part = np.ascontiguousarray(images[start : start + self._chunk])
            try:
                rows = infer(part)
            # The libraries' exceptions share no base class below Exception.
            except Exception as problem:
                if len(part) > 1 and _is_out_of_memory(problem):
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
        self.run(np.full((1, SIZE_PX, SIZE_PX, 3), 255, dtype=np.uint8))

    def _take_smaller_parts(self, chunk: int) -> None:
        # Several lanes may find memory short at once; the smallest part wins.
        if chunk < self._chunk:
            self._chunk = chunk
            self._said(f"{self.info.name} is short of memory: going on with {chunk} images at once")


def cpu_chunk(lanes: int) -> int:
    """Returns how many images each lane of a CPU's engine should take at once."""
    return max(1, min(_CPU_CHUNK, _CPU_IMAGES // lanes))


def check_signature(inputs: Sequence[Port], outputs: Sequence[Port], name: str, dim: int) -> None:
    """Checks that a session takes and gives what `Engine.run` promises.

    Args:
        inputs: of the session.
        outputs: of the session.
        name: what to call the model in a complaint.
        dim: length of an embedding.

    Raises:
        BadModel: it does not; says what it takes or gives.
    """
    # A dynamic size is shown as "?"; the embedding's may be, and is then tried by a run.
    fits_in = list(inputs) == [(INPUT_NAME, "tensor(uint8)", ("?", SIZE_PX, SIZE_PX, 3))]
    fits_out = list(outputs) in (
        [(OUTPUT_NAME, "tensor(float)", ("?", dim))],
        [(OUTPUT_NAME, "tensor(float)", ("?", "?"))],
    )
    if not fits_in:
        raise BadModel(
            f"{name} takes {_ports_text(inputs)}",
            f"{INPUT_NAME}: tensor(uint8) (?, {SIZE_PX}, {SIZE_PX}, 3)",
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


def _ports_text(ports: Sequence[Port]) -> str:
    parts = [f"{name}: {kind} ({', '.join(map(str, shape))})" for name, kind, shape in ports]
    return " and ".join(parts) or "nothing"


def _is_out_of_memory(problem: Exception) -> bool:
    text = str(problem).lower()
    return isinstance(problem, MemoryError) or any(
        sign in text for sign in ("out of memory", "failed to allocate memory", "bad_alloc")
    )
