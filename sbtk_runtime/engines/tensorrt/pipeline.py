"""Run batches on a TensorRT network, with copies that overlap computation."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import astuple, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import Notify
from sbtk_runtime.engines.cuda import (
    DeviceResources,
    OutOfDeviceMemory,
    PinnedArray,
    capture_graph,
    checked,
)
from sbtk_runtime.engines.tensorrt.library import LogLines, TensorRt, join_lines, recording_logger
from sbtk_runtime.errors import BadModel, EngineUnavailable, SbtkError
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import Kind, domains_of
from sbtk_runtime.regions import RegionGrid, input_side, row_shape

_SLOTS = 2


class Pipeline:
    """Buffers, streams, contexts and graphs for batches up to a size; for one thread at a time.

    Chunks are copied in on one stream, and computed and copied out on another. There are two slots
    of buffers: while one is computed, the host fills and copies the other. Batches have sizes of 1,
    2, 4 ... `largest` images; other chunks are padded to the next size.

    Args:
        network: the loaded plan.
        device_index: index of its GPU, which must be the calling thread's.
        largest: maximum size of a chunk, within the plan's profile.
        notify: called if CUDA graphs do not work.

    Raises:
        OutOfDeviceMemory: it does not fit; nothing is left allocated.
        EngineUnavailable: TensorRT or CUDA failed; nothing is left allocated.
        BadModel: the plan's output has another shape than it should.
    """

    def __init__(self, network: Network, device_index: int, largest: int, notify: Notify) -> None:
        self.largest = largest
        self._network = network
        self._notify = notify
        self._buckets = _buckets(network.smallest, largest)
        self._captures = not network.has_own_graphs
        # In the order in which the garbage collector frees them if nobody closes the pipeline.
        self._graphs = DeviceResources(device_index)
        self._steps: dict[tuple[int, int], _Step] = {}
        # The domains on the GPU, by slot; they are copied only when the kind changes.
        self._kinds: dict[int, Kind] = {}
        self._resources = DeviceResources(device_index)
        self._cuda = self._resources.cuda
        self._streams: list[Any] = []
        try:
            self._copy_stream = self._new_stream()
            self._run_stream = self._new_stream()
            has_domains = network.domain_input is not None
            self._slots = [
                Slot.of(self._resources, number, largest, network, has_domains=has_domains)
                for number in range(_SLOTS)
            ]
            # Never empty, since TensorRT needs an address in any case.
            self._scratch_bytes = max(network.memory_needed(self._buckets), 256)
            self._scratch = self._resources.memory(self._scratch_bytes)
            self._prove()
        except BaseException:
            self.close()
            raise

    def run(
        self, images: NDArray[np.uint8], kind: Kind, *, timed: bool = False
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        """Return the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8`, and times.

        All of the images are of one kind.

        Raises:
            OutOfDeviceMemory: TensorRT found no memory for a context that it had not made before.
            EngineUnavailable: TensorRT or CUDA failed.
        """
        rows = np.empty((len(images), *self._network.row), dtype=np.float32)
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
            # The buffers must not be reused or freed while the GPU works on them.
            self._drain()
            raise
        return rows, times

    def close(self) -> None:
        """Free everything, from any thread; a second call does nothing."""
        self._cuda.cudaSetDevice(self._resources.index)
        self._drain()
        self._streams.clear()
        # Graphs before the contexts that they were captured from, and both before the memory.
        self._graphs.close()
        for step in self._steps.values():
            # The frames of an error may still refer to the step.
            step.context = None
        self._steps.clear()
        self._resources.close()

    def _prove(self) -> None:
        """Run the largest batch in every slot, to find out now whether it fits.

        The images are black, so that the buffers on the GPU hold no arbitrary bytes afterwards.
        """
        for slot in self._slots:
            chunk = _Chunk(slot, 0, self.largest, "sketch")
            self._start(chunk, timed=False)
            checked(self._cuda.cudaEventSynchronize(slot.done))

    def _start(self, chunk: _Chunk, timed: bool) -> None:
        """Queue a chunk whose images are in its slot's pinned memory."""
        cuda, slot = self._cuda, chunk.slot
        # First of all, since a capture must not run at the same time as this chunk's copy.
        step = self._ready_step(slot, chunk.count)
        to_device = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if timed:
            self._record(slot.copy_begins, self._copy_stream)
        checked(
            cuda.cudaMemcpyAsync(
                slot.device_images,
                slot.images.address,
                chunk.count * self._network.image_bytes,
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
        # On the same stream: an embedding has about a hundredth of the size of its image.
        checked(
            cuda.cudaMemcpyAsync(
                slot.rows.address,
                slot.device_rows,
                chunk.count * self._network.row_bytes,
                to_host,
                self._run_stream,
            )
        )
        self._record(slot.done, self._run_stream)

    def _copy_domains(self, slot: Slot, domains: PinnedArray, kind: Kind) -> None:
        """Queue the copy of a whole slot's domains, unless they are on the GPU already."""
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
        """Wait for a chunk and copy its embeddings to their place in `rows`."""
        slot = chunk.slot
        checked(self._cuda.cudaEventSynchronize(slot.done))
        rows[chunk.start : chunk.start + chunk.count] = slot.rows.array[: chunk.count]
        if not timed:
            return DeviceTimes()
        return slot.times(self._cuda)

    def _ready_step(self, slot: Slot, count: int) -> _Step:
        """Return the step for a chunk of that size in that slot; its second run is captured."""
        bucket = next(size for size in self._buckets if size >= count)
        step = self._steps.get((bucket, slot.number))
        if step is None:
            step = self._steps[bucket, slot.number] = _Step(self._new_context(slot, bucket))
        elif self._captures and step.graph is None and step.has_run:
            try:
                step.graph = capture_graph(
                    self._cuda, self._run_stream, lambda: self._execute(step)
                )
                self._graphs.on_close(self._cuda.cudaGraphExecDestroy, step.graph)
            except SbtkError as problem:
                self._captures = False
                self._notify(
                    f"running without CUDA graphs, since capturing failed: {problem.found}"
                )
        return step

    def _new_context(self, slot: Slot, bucket: int) -> Any:
        """Return a new context for a bucket in a slot.

        A captured graph holds the state of its context, which must not change afterwards, so each
        has its own. They share memory, since all of them run on one stream.
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
            raise self._network.failed("could not run")

    def _new_stream(self) -> Any:
        stream = self._resources.stream()
        self._streams.append(stream)
        return stream

    def _record(self, event: Any, stream: Any) -> None:
        checked(self._cuda.cudaEventRecord(event, stream))

    def _drain(self) -> None:
        # Error codes are ignored: there already is an error, or the results are not needed.
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
    """Return the powers of two from `smallest` on, and `largest`."""
    sizes = {smallest, largest}
    size = 1
    while size < largest:
        if size > smallest:
            sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|memory ?allocation|bad_alloc", re.IGNORECASE)
#: Next step for users whose GPU has too little memory.
FREE_MEMORY = "end other programs on the GPU (nvidia-smi), or use another: --device cuda:N"
_BUILD_AGAIN = "sbtk engine clear, then sbtk engine build"

# Name, mode, type and shape.
_Tensor = tuple[str, Any, Any, tuple[int, ...]]


class Network:
    """A plan loaded onto the calling thread's GPU.

    Ask the driver for its GPUs first: without a driver, some of TensorRT's libraries end the
    process as soon as a `Runtime` exists.

    Args:
        trt: the TensorRT that built the plan.
        plan: the plan. Loading it runs native code, so it must come from our own cache or build.
        dim: length of an embedding, from the model's manifest.
        domain_input: name of the input `(N,) float32` for the kind of images, from the manifest;
            `None` if it has none.
        regions: the windows that the model embeds; `None` for whole frames.

    Attributes:
        image: shape of an image.
        row: shape of what the plan returns for an image: `(D,)`, or `(R, D)` with regions.
        domain_input: as above.
        smallest: smallest batch that the plan takes.
        largest: largest batch that the plan takes.
        has_own_graphs: whether TensorRT itself captures CUDA graphs, as TensorRT-RTX does.

    Raises:
        EngineUnavailable: TensorRT refuses the plan, or the GPU has no memory for its weights;
            the message has the library's log lines.
        BadModel: the plan's inputs or outputs are not those of an engine of sbtk.
    """

    def __init__(
        self,
        trt: TensorRt,
        plan: bytes,
        dim: int,
        domain_input: str | None = None,
        regions: RegionGrid | None = None,
    ) -> None:
        side = input_side(regions)
        self.image = (side, side, 3)
        self.row = row_shape(regions, dim)
        self.domain_input = domain_input
        self._trt = trt
        self._logger = recording_logger(trt)
        self._lines_reported = 0
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        try:
            self._engine = self._load(plan)
            self._check_tensors()
            shapes = self._engine.get_tensor_profile_shape(INPUT_NAME, 0)
            self.smallest, self.largest = int(shapes[0][0]), int(shapes[2][0])
            self.has_own_graphs = self._configure()
        except BaseException:
            self.close()
            raise

    @property
    def image_bytes(self) -> int:
        """The size of an image."""
        return math.prod(self.image)

    @property
    def row_bytes(self) -> int:
        """The size of what the plan gives for an image."""
        return 4 * math.prod(self.row)

    def context(self, batch: int) -> Any:
        """Return a new context for batches of that size; the caller sets its memory.

        Raises:
            OutOfDeviceMemory: the GPU has too little memory.
            EngineUnavailable: TensorRT creates no context, or refuses the size.
            BadModel: its output has another shape than `(batch, *row)`.
        """
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self.failed("created no execution context")
        self._set_batch(context, batch)
        return context

    def memory_needed(self, batches: tuple[int, ...]) -> int:
        """Return the bytes of context memory that the largest of these batches needs."""
        context = self.context(batches[0])
        needed = []
        for batch in batches:
            self._set_batch(context, batch)
            needed.append(int(context.update_device_memory_size_for_shapes()))
        return max(needed)

    def failed(self, what: str, next_step: str = "sbtk doctor") -> SbtkError:
        """Return the error for a call that returned `None` or `False`, with the new log lines."""
        lines = self._logger.lines()
        fresh = LogLines()
        for severity, text in lines[self._lines_reported :]:
            fresh.add(severity, text)
        self._lines_reported = len(lines)
        problems = fresh.problems()
        found = f"{self._trt.title} {what}:{join_lines(problems)}"
        if any(_OUT_OF_MEMORY.search(line) for line in problems):
            return OutOfDeviceMemory(found, "", "use a smaller --batch")
        return EngineUnavailable(found, "", next_step)

    def close(self) -> None:
        """Free the plan; contexts must have been freed before."""
        self._config = self._engine = self._runtime = None

    def _load(self, plan: bytes) -> Any:
        try:
            self._runtime = self._trt.module.Runtime(self._logger)
        # The bindings have no exception class for objects that cannot be created.
        except Exception as reason:
            raise self.failed(f"could not start ({reason})") from reason
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            problem = self.failed("refuses the plan", _BUILD_AGAIN)
            if not isinstance(problem, OutOfDeviceMemory):
                raise problem
            # A smaller batch would not help.
            raise EngineUnavailable(problem.found, "memory for the weights", FREE_MEMORY)
        return engine

    def _configure(self) -> bool:
        """Configure the contexts to create; return whether TensorRT captures graphs itself."""
        config, module = self._engine.create_runtime_config(), self._trt.module
        if config is None:
            raise self.failed("created no runtime configuration")
        self._config = config
        # All contexts share memory that we allocate, so that its size is known and no run can fail
        # halfway.
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        has_own_graphs = hasattr(config, "cuda_graph_strategy")
        if has_own_graphs:
            # TensorRT-RTX compiles better kernels for a shape while it runs, and only it knows when
            # a capture pays off.
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return has_own_graphs

    def _check_tensors(self) -> None:
        module, engine = self._trt.module, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = [
            (
                name,
                engine.get_tensor_mode(name),
                engine.get_tensor_dtype(name),
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        ]
        modes, types = module.TensorIOMode, module.DataType
        wanted: list[_Tensor] = [(INPUT_NAME, modes.INPUT, types.UINT8, (-1, *self.image))]
        if self.domain_input is not None:
            wanted.append((self.domain_input, modes.INPUT, types.FLOAT, (-1,)))
        wanted.append((OUTPUT_NAME, modes.OUTPUT, types.FLOAT, (-1, *self.row)))
        # TensorRT guarantees no order.
        if sorted(found, key=itemgetter(0)) != sorted(wanted, key=itemgetter(0)):
            raise BadModel(
                f"the plan has {_text_of(found)}",
                _text_of(wanted),
                "export the model with sbtk export, then " + _BUILD_AGAIN,
            )

    def _set_batch(self, context: Any, batch: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {INPUT_NAME: (batch, *self.image)}
        if self.domain_input is not None:
            shapes[self.domain_input] = (batch,)
        for name, sizes in shapes.items():
            if not context.set_input_shape(name, sizes):
                raise self.failed(f"refuses {batch} images at once")
        shape = tuple(context.get_tensor_shape(OUTPUT_NAME))
        if shape != (batch, *self.row):
            raise BadModel(
                f"the plan returns {shape} for {batch} images",
                f"{(batch, *self.row)}",
                "export the model with sbtk export, then " + _BUILD_AGAIN,
            )


def _text_of(tensors: list[_Tensor]) -> str:
    """Return names, types and shapes of tensors as text; -1 is a size that may vary."""
    parts = [f"{mode.name} {name}: {dtype.name} {shape}" for name, mode, dtype, shape in tensors]
    return " and ".join(parts) or "nothing"


DOMAIN_BYTES = 4


@dataclass(frozen=True)
class DeviceTimes:
    """Times of a run in ms, by the GPU's clock.

    Attributes:
        h2d_ms: copying images to the GPU.
        compute_ms: computation.
        d2h_ms: copying embeddings back.
    """

    h2d_ms: float = 0.0
    compute_ms: float = 0.0
    d2h_ms: float = 0.0

    def __add__(self, other: DeviceTimes) -> DeviceTimes:
        return DeviceTimes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Slot:
    """Buffers and events of one chunk.

    Attributes:
        number: index from 0.
        images: `(largest, 224, 224, 3) uint8` on the host.
        domains: `(largest,) float32` on the host; `None` for a model without a domain input.
        rows: `(largest, D) float32` on the host.
        device_images: address of the images on the GPU.
        device_domains: address of the domains on the GPU; 0 without them.
        device_rows: address of the rows on the GPU.
        copy_begins: event before the images are copied to the GPU.
        copied: event after that.
        run_begins: event before the computation.
        ran: event after that.
        done: event after the embeddings have been copied to the host.
    """

    number: int
    images: PinnedArray
    domains: PinnedArray | None
    rows: PinnedArray
    device_images: int
    device_domains: int
    device_rows: int
    copy_begins: Any
    copied: Any
    run_begins: Any
    ran: Any
    done: Any

    @classmethod
    def of(
        cls,
        resources: DeviceResources,
        number: int,
        largest: int,
        network: Network,
        *,
        has_domains: bool,
    ) -> Slot:
        """Return a slot with new buffers and events.

        Raises:
            OutOfDeviceMemory: there is no memory for them.
        """
        return cls(
            number,
            resources.pinned((largest, *network.image), np.uint8),
            resources.pinned((largest,), np.float32) if has_domains else None,
            resources.pinned((largest, *network.row), np.float32),
            resources.memory(largest * network.image_bytes),
            resources.memory(largest * DOMAIN_BYTES) if has_domains else 0,
            resources.memory(largest * network.row_bytes),
            *(resources.event() for _ in range(5)),
        )

    def times(self, cuda: Any) -> DeviceTimes:
        """Return the times between the events, all of which must have occurred."""
        pairs = (
            (self.copy_begins, self.copied),
            (self.run_begins, self.ran),
            (self.ran, self.done),
        )
        return DeviceTimes(*(float(checked(cuda.cudaEventElapsedTime(*pair))) for pair in pairs))
