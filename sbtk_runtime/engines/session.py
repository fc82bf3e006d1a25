"""An inference session as an engine: runs batches in chunks, checks what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import Embeddings, EngineInfo, Notify, no_notify
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX, Kind, domains_of
from sbtk_runtime.regions import RegionGrid, input_side, row_shape

#: A model's inputs by name, each contiguous; see `feeds_of`.
Feeds = dict[str, NDArray[Any]]
#: Returns the rows `(N, D) float32` for a model's inputs; may be called from any thread.
Infer = Callable[[Feeds], NDArray[np.float32]]

#: An input or output: name, ONNX type, and shape with "?" for dynamic sizes.
Port = tuple[str, str, tuple[int | str, ...]]

# A CPU is as fast with 8 images as with 32, and 8 need less memory for activations. All lanes
# together run at most 32 images, unless there are more lanes.
_CPU_CHUNK = 8
_CPU_IMAGES = 32
_NORM_TOLERANCE = 1e-3


class SessionEngine:
    """An engine on top of a library's session, which runs batches in chunks.

    Args:
        infer: runs the model; released by `close`.
        info: describes the engine.
        chunk: the most images of a chunk.
        message_of: returns the message of the library's errors in one line.
        notify: called when memory is short and chunks become smaller.
    """

    def __init__(
        self,
        infer: Infer,
        info: EngineInfo,
        chunk: int,
        message_of: Callable[[BaseException], str],
        notify: Notify = no_notify,
    ) -> None:
        self.info = info
        self._infer: Infer | None = infer
        self._chunk = chunk
        self._message_of = message_of
        self._notify = notify

    def run(self, images: NDArray[np.uint8], kind: Kind) -> NDArray[np.float32]:
        """Return the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8` of a kind.

        With a grid of regions they are `(N, R, D)` of `(N, S, S, 3)`.

        Large batches are split into chunks, so that memory does not depend on N.

        Raises:
            EngineUnavailable: the library failed, or the engine is closed.
            BadModel: the output's shape is not the one in the manifest.
        """
        # If another thread closes the engine, this run finishes on the old session.
        infer = self._infer
        if infer is None:
            raise EngineUnavailable(f"the engine {self.info.name} is closed", "an open engine")
        shape = row_shape(self.info.regions, self.info.dim)
        embeddings = np.empty((len(images), *shape), dtype=np.float32)
        start = 0
        while start < len(images):
            part = images[start : start + self._chunk]
            try:
                rows = infer(feeds_of(part, kind, self.info.domain_input))
            # The libraries' exceptions have no common base class other than Exception.
            except Exception as problem:
                if len(part) > 1 and is_out_of_memory(problem):
                    self._take_smaller_parts(len(part) // 2)
                    continue
                raise EngineUnavailable(
                    f"{self.info.name} failed on {len(part)} images: {self._message_of(problem)}",
                    "",
                    "sbtk doctor shows which engines work here",
                ) from problem
            if rows.shape != (len(part), *shape):
                raise BadModel(
                    f"the model returns {rows.shape} for {len(part)} images",
                    f"{(len(part), *shape)}",
                    "export the model with sbtk export",
                )
            embeddings[start : start + len(part)] = rows
            start += len(part)
        return embeddings

    def close(self) -> None:
        """Release the session with its threads and memory."""
        self._infer = None

    def prove(self) -> None:
        """Run one image, which checks that the engine works and warms it up.

        Raises:
            EngineUnavailable: it does not work.
            BadModel: the output's shape is not the one in the manifest.
        """
        side = input_side(self.info.regions)
        self.run(np.full((1, side, side, 3), 255, dtype=np.uint8), "sketch")

    def _take_smaller_parts(self, chunk: int) -> None:
        # Several lanes may run out of memory at once; the smallest chunk wins.
        if chunk < self._chunk:
            self._chunk = chunk
            self._notify(
                f"{self.info.name} is short of memory: continuing with {chunk} images at once"
            )


def cpu_chunk(lanes: int, regions: RegionGrid | None = None) -> int:
    """Return the chunk size of a lane on a CPU: smaller for larger inputs, for equal memory."""
    frames = max(1, (input_side(regions) // SIZE_PX) ** 2)
    return max(1, min(_CPU_CHUNK, _CPU_IMAGES // lanes) // frames)


def feeds_of(images: NDArray[np.uint8], kind: Kind, domain_input: str | None) -> Feeds:
    """Return the inputs of a model for `images (N, 224, 224, 3) uint8` of a kind.

    Args:
        images: copied if they are not contiguous.
        kind: of all images.
        domain_input: as in the model's manifest.
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
    regions: RegionGrid | None = None,
) -> None:
    """Check that a session's inputs and outputs are those of the manifest.

    Args:
        inputs: of the session.
        outputs: of the session.
        name: the model in error messages.
        dim: length of an embedding.
        domain_input: as in the manifest.
        regions: the windows that the model embeds; `None` for whole frames.

    Raises:
        BadModel: they are not; the message lists them.
    """
    # The size of an embedding may be dynamic; then the first run checks it.
    side, shape = input_side(regions), row_shape(regions, dim)
    wanted: list[Port] = [(INPUT_NAME, "tensor(uint8)", ("?", side, side, 3))]
    if domain_input is not None:
        wanted.append((domain_input, "tensor(float)", ("?",)))
    # Libraries may reorder inputs.
    fits_in = sorted(inputs, key=_name_of) == sorted(wanted, key=_name_of)
    fits_out = list(outputs) in (
        [(OUTPUT_NAME, "tensor(float)", ("?", *shape))],
        [(OUTPUT_NAME, "tensor(float)", ("?", *shape[:-1], "?"))],
    )
    if not fits_in:
        raise BadModel(
            f"{name} takes {_ports_text(inputs)}",
            f"{_ports_text(wanted)}, as in its manifest",
            "export the model with sbtk export",
        )
    if not fits_out:
        raise BadModel(
            f"{name} returns {_ports_text(outputs)}",
            f"{OUTPUT_NAME}: tensor(float) (?, {', '.join(map(str, shape))})",
            "export the model with sbtk export",
        )


def validate_embeddings(rows: Embeddings) -> tuple[Embeddings, NDArray[np.bool_]]:
    """Return `rows (N, D) float32` and which of them are bad, `(N,) bool`.

    Rows of regions are `(N, R, D)`, and which are bad `(N, R)`.

    A row is bad unless it is finite and of length 1 within 0.001. Bad rows are returned as zeros,
    which are never mistaken for embeddings.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1))
        # A comparison with NaN is false, so this is also the test for finiteness.
        is_bad = ~(np.abs(lengths - 1.0) < _NORM_TOLERANCE)
    if is_bad.any():
        rows = np.where(is_bad[..., None], np.float32(0.0), rows)
    return rows, is_bad


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__


def _name_of(port: Port) -> str:
    return port[0]


def _ports_text(ports: Sequence[Port]) -> str:
    parts = [f"{name}: {kind} ({', '.join(map(str, shape))})" for name, kind, shape in ports]
    return " and ".join(parts) or "nothing"


def is_out_of_memory(problem: Exception) -> bool:
    """Return whether a library ran out of memory, also while it was loaded."""
    text = str(problem).lower()
    return isinstance(problem, MemoryError) or any(
        sign in text
        for sign in (
            *("out of memory", "failed to allocate memory", "bad_alloc"),
            *("failed to map segment", "cannot allocate memory"),
        )
    )
