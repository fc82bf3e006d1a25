"""CUDA graphs: work that is recorded once and then launched as one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sbtk_runtime.engines.cuda_device import checked


def captured_graph(cuda: Any, stream: Any, enqueue: Callable[[], None]) -> Any:
    """Returns an executable graph of what `enqueue` puts into a stream, without running it.

    A library that sets itself up at its first run must have run before: that cannot be captured.
    Other threads may allocate on the GPU meanwhile; the calling thread must not.

    Args:
        cuda: `cuda.bindings.runtime`.
        stream: where `enqueue` puts its work.
        enqueue: does the calls that are to be captured.

    Raises:
        CudaError: the work cannot be captured. The stream is as it was before.
        SbtkError: whatever `enqueue` raises, with the stream as it was before.
    """
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(cuda.cudaStreamBeginCapture(stream, mode))
    try:
        enqueue()
    except BaseException:
        # A capture that is not ended would swallow all later work of the stream.
        _, graph = cuda.cudaStreamEndCapture(stream)
        _discard(cuda, graph)
        raise
    error, graph = cuda.cudaStreamEndCapture(stream)
    try:
        checked((error,))
        return checked(cuda.cudaGraphInstantiate(graph, 0))
    finally:
        _discard(cuda, graph)


def _discard(cuda: Any, graph: Any) -> None:
    if graph is not None and int(graph) != 0:
        cuda.cudaGraphDestroy(graph)
    # A failed capture leaves an error behind that others could take for their own.
    cuda.cudaGetLastError()
