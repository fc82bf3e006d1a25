"""The way of pictures through a TensorRT network: copied in while others are computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.cuda_device import checked
from sbtk_runtime.engines.cuda_graphs import captured_graph
from sbtk_runtime.engines.device_buffers import DeviceResources, PinnedArray
from sbtk_runtime.engines.engine_request import Said
from sbtk_runtime.engines.tensorrt_network import Network
from sbtk_runtime.engines.tensorrt_slot import DOMAIN_BYTES, PICTURE_BYTES, DeviceTimes, Slot
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import Kind, domains_of

_SLOTS = 2


class Pipeline:
    """Buffers, streams, contexts and graphs for batches up to a size; for one thread at a time.

    A chunk is copied in on one stream, computed and copied out on another. There are two slots of
    buffers: while one is computed, the host fills the other, and its copy runs meanwhile. Batches
    come in buckets of 1, 2, 4 ... `largest` images; a chunk between two takes the larger, and what
    stands in the rest of it is computed along and thrown away.

    Args:
        network: the loaded plan.
        device_index: the GPU it is on, which is the calling thread's.
        largest: images that a chunk may have, within the plan's profile.
        said: told when CUDA graphs do not work.

    Raises:
        OutOfDeviceMemory: it does not fit; nothing is left allocated.
        EngineUnavailable: TensorRT or CUDA failed; nothing is left allocated.
        BadModel: the plan's output has another shape than it should.
    """

    def __init__(self, network: Network, device_index: int, largest: int, said: Said) -> None:
        self.largest = largest
        self._network = network
        self._said = said
        self._buckets = _buckets(network.smallest, largest)
        self._captures = not network.has_own_graphs
        # In the order in which they go if nobody closes the pipeline.
        self._graphs = DeviceResources(device_index)
        self._steps: dict[tuple[int, int], _Step] = {}
        # What the domains on the GPU say, by slot: they are copied only when the kind changes.
        self._kinds: dict[int, Kind] = {}
        self._resources = DeviceResources(device_index)
        self._cuda = self._resources.cuda
        self._streams: list[Any] = []
        try:
            self._copy_stream = self._new_stream()
            self._run_stream = self._new_stream()
            has_domains = network.domain_input is not None
            self._slots = [
                Slot.of(self._resources, number, largest, network.dim, has_domains=has_domains)
                for number in range(_SLOTS)
            ]
            # Never empty, since TensorRT wants an address in any case.
            self._scratch_bytes = max(network.memory_needed(self._buckets), 256)
            self._scratch = self._resources.memory(self._scratch_bytes)
            self._prove()
        except BaseException:
            self.close()
            raise

    def run(
        self, images: NDArray[np.uint8], kind: Kind, *, timed: bool = False
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        """Returns the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8`, and times.

        All of the images are of one kind.

        Raises:
            OutOfDeviceMemory: TensorRT found no memory for a context that it had not made before.
            EngineUnavailable: TensorRT or CUDA failed.
        """
        rows = np.empty((len(images), self._network.dim), dtype=np.float32)
        times = DeviceTimes()
        under_way: deque[_Chunk] = deque()
        try:
            for number, start in enumerate(range(0, len(images), self.largest)):
                if len(under_way) == _SLOTS:
                    times += self._collect(under_way.popleft(), rows, timed)
                part = images[start : start + self.largest]
                chunk = _Chunk(self._slots[number % _SLOTS], start, len(part), kind)
                np.copyto(chunk.slot.images.array[: len(part)], part, casting="no")
                self._start(chunk, timed)
                under_way.append(chunk)
            while under_way:
                times += self._collect(under_way.popleft(), rows, timed)
        except BaseException:
            # The buffers are used again, or freed, only when nothing touches them any more.
            self._drain()
            raise
        return rows, times

    def close(self) -> None:
        """Frees everything, in any thread; does nothing the second time."""
        self._cuda.cudaSetDevice(self._resources.index)
        self._drain()
        self._streams.clear()
        # Graphs go before the contexts that they were captured from, and both before the memory.
        self._graphs.close()
        for step in self._steps.values():
            # The frames of an error may still have the step.
            step.context = None
        self._steps.clear()
        self._resources.close()

    def _prove(self) -> None:
        """Runs the largest batch in every slot: what does not fit is found out here.

        The pictures are black, so the buffers on the GPU hold no chance bytes from now on either.
        """
        for slot in self._slots:
            chunk = _Chunk(slot, 0, self.largest, "sketch")
            self._start(chunk, timed=False)
            checked(self._cuda.cudaEventSynchronize(slot.done))

    def _start(self, chunk: _Chunk, timed: bool) -> None:
        """Queues a chunk whose pictures are in its slot's pinned memory."""
        cuda, slot = self._cuda, chunk.slot
        # First of all, since a capture must not meet the copy that this chunk waits for.
        step = self._ready_step(slot, chunk.count)
        to_device = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if timed:
            self._record(slot.copy_begins, self._copy_stream)
        checked(
            cuda.cudaMemcpyAsync(
                slot.device_images,
                slot.images.address,
                chunk.count * PICTURE_BYTES,
                to_device,
                self._copy_stream,
            )
        )
        if slot.domains is not None:
            self._copy_domains(slot, slot.domains, chunk.kind)
        self._record(slot.copied, self._copy_stream)
        checked(cuda.cudaStreamWaitEvent(self._run_stream, slot.copied, 0))
        if timed:
            self._record(slot.run_begins, self._run_stream)
        if step.graph is not None:
            checked(cuda.cudaGraphLaunch(step.graph, self._run_stream))
        else:
            self._execute(step)
            step.has_run = True
        if timed:
            self._record(slot.ran, self._run_stream)
        # On the same stream: an embedding is some hundredth of the picture it came from.
        checked(
            cuda.cudaMemcpyAsync(
                slot.rows.address,
                slot.device_rows,
                chunk.count * self._network.dim * 4,
                to_host,
                self._run_stream,
            )
        )
        self._record(slot.done, self._run_stream)

    def _copy_domains(self, slot: Slot, domains: PinnedArray, kind: Kind) -> None:
        """Queues the copy of a whole slot's domains, unless they are on the GPU already."""
        if self._kinds.get(slot.number) == kind:
            return
        self._kinds.pop(slot.number, None)
        domains.array[:] = domains_of(kind, self.largest)
        checked(
            self._cuda.cudaMemcpyAsync(
                slot.device_domains,
                domains.address,
                self.largest * DOMAIN_BYTES,
                self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
                self._copy_stream,
            )
        )
        self._kinds[slot.number] = kind

    def _collect(self, chunk: _Chunk, rows: NDArray[np.float32], timed: bool) -> DeviceTimes:
        """Waits for a chunk and copies its embeddings to their place in `rows`."""
        slot = chunk.slot
        checked(self._cuda.cudaEventSynchronize(slot.done))
        rows[chunk.start : chunk.start + chunk.count] = slot.rows.array[: chunk.count]
        if not timed:
            return DeviceTimes()
        return slot.times(self._cuda)

    def _ready_step(self, slot: Slot, count: int) -> _Step:
        """Returns how a chunk of that size runs in that slot: at first plainly, then as a graph."""
        bucket = next(size for size in self._buckets if size >= count)
        step = self._steps.get((bucket, slot.number))
        if step is None:
            step = self._steps[bucket, slot.number] = _Step(self._new_context(slot, bucket))
        elif self._captures and step.graph is None and step.has_run:
            try:
                step.graph = captured_graph(
                    self._cuda, self._run_stream, lambda: self._execute(step)
                )
                self._graphs.on_close(self._cuda.cudaGraphExecDestroy, step.graph)
            except SbtkError as problem:
                self._captures = False
                self._said(f"running without CUDA graphs, since capturing failed: {problem.found}")
        return step

    def _new_context(self, slot: Slot, bucket: int) -> Any:
        """Returns a context of its own for a bucket in a slot.

        A captured graph holds the state of its context, which must not change afterwards: hence
        one for each. They share one memory, since all of them run on one stream.
        """
        context = self._network.context(bucket)
        context.update_device_memory_size_for_shapes()
        context.set_device_memory(self._scratch, self._scratch_bytes)
        addresses = {INPUT_NAME: slot.device_images, OUTPUT_NAME: slot.device_rows}
        if self._network.domain_input is not None:
            addresses[self._network.domain_input] = slot.device_domains
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._network.failed(f"refuses memory for {name}")
        return context

    def _execute(self, step: _Step) -> None:
        if not step.context.execute_async_v3(int(self._run_stream)):
            raise self._network.failed("did not run")

    def _new_stream(self) -> Any:
        stream = self._resources.stream()
        self._streams.append(stream)
        return stream

    def _record(self, event: Any, stream: Any) -> None:
        checked(self._cuda.cudaEventRecord(event, stream))

    def _drain(self) -> None:
        # Error codes are not looked at: there already is an error, or nothing is needed any more.
        for stream in self._streams:
            self._cuda.cudaStreamSynchronize(stream)


@dataclass(frozen=True)
class _Chunk:
    """Some images of a run, all of one kind, in a slot."""

    slot: Slot
    start: int
    count: int
    kind: Kind


@dataclass
class _Step:
    """How one bucket runs in one slot."""

    context: Any
    graph: Any = None
    has_run: bool = False


def _buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Returns the powers of two from `smallest` on, and `largest`."""
    sizes = {smallest, largest}
    size = 1
    while size < largest:
        if size > smallest:
            sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))
