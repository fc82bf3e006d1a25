"""`cuda.bindings.runtime` on the GPUs of `tests.fakes.gpu`.

Every name must be one of the real module, and every call must have the real function's arguments;
constants, enumerations and handles are the real ones. A function that the fake does not have is an
`AssertionError`; a name that the real module does not have is an `AttributeError`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cuda.bindings import runtime as real

from tests.fakes.gpu import FakeGpus, Span, Task

_Error = real.cudaError_t
_Answer = tuple[Any, ...]

_COPY_BYTES_PER_US = 25_000.0
_CALL_US = 5.0


@dataclass
class CudaFaults:
    """What goes wrong, by CUDA's own names of errors; empty is nothing.

    Attributes:
        count: of `cudaGetDeviceCount`.
        driver: the version that the driver serves; 0 is no driver.
        begin_capture: of `cudaStreamBeginCapture`.
        end_capture: of `cudaStreamEndCapture`.
        instantiate: of `cudaGraphInstantiate`.
        wait: of waiting for an event or a stream, and of every call after that.
        allocations_left: calls of `cudaMalloc` that succeed; then there is no memory.
        pinned_left: the same for `cudaHostAlloc`.
    """

    count: str = ""
    driver: int = 13050
    begin_capture: str = ""
    end_capture: str = ""
    instantiate: str = ""
    wait: str = ""
    allocations_left: int | None = None
    pinned_left: int | None = None


class FakeCudaRuntime(ModuleType):
    """The module; `gpus` and `faults` are for tests."""

    def __init__(self, gpus: FakeGpus, compute_capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__("cuda.bindings.runtime")
        self.__spec__ = ModuleSpec("cuda.bindings.runtime", None)
        self._gpus = gpus
        self._compute_capability = compute_capability
        self._faults = CudaFaults()
        self._calls: Counter[str] = Counter()
        self._is_broken = ""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        if name in vars(FakeCudaRuntime):
            return self._as_the_real_one(name, super().__getattribute__(name))
        value = getattr(real, name)
        is_function = callable(value) and not isinstance(value, type)
        assert not is_function, f"the fake has no {name}"
        return value

    def _as_the_real_one(self, name: str, function: Any) -> Any:
        signature = inspect.signature(getattr(real, name))

        def call(*arguments: Any) -> _Answer:
            signature.bind(*arguments)
            self._calls[name] += 1
            works_when_broken = name.startswith(("cudaGetError", "cudaSetDevice", "cudaGetLast"))
            if self._is_broken and not works_when_broken:
                return (getattr(_Error, self._is_broken), *[None] * _values_of(name))
            return function(*arguments)  # type: ignore[no-any-return]

        return call

    # --- devices -------------------------------------------------------------------------------

    def cudaGetDeviceCount(self) -> _Answer:
        if self._faults.count:
            return getattr(_Error, self._faults.count), 0
        self._gpus.was_counted = True
        return _Error.cudaSuccess, self._gpus.count

    def cudaDriverGetVersion(self) -> _Answer:
        return _Error.cudaSuccess, self._faults.driver

    def cudaRuntimeGetVersion(self) -> _Answer:
        return _Error.cudaSuccess, 13050

    def cudaGetDeviceProperties(self, device: int) -> _Answer:
        assert self._gpus.was_counted, "properties before cudaGetDeviceCount"
        properties = real.cudaDeviceProp()
        properties.name = b"Fake GPU".ljust(256, b"\0")
        properties.major, properties.minor = self._compute_capability
        properties.totalGlobalMem = self._gpus.memory_bytes
        return _Error.cudaSuccess, properties

    def cudaSetDevice(self, device: int) -> _Answer:
        self._gpus.set_device(device)
        return (_Error.cudaSuccess,)

    def cudaGetDevice(self) -> _Answer:
        return _Error.cudaSuccess, self._gpus.device_or_first()

    def cudaMemGetInfo(self) -> _Answer:
        device = self._gpus.device()
        return _Error.cudaSuccess, self._gpus.free_bytes(device), self._gpus.memory_bytes

    # --- errors --------------------------------------------------------------------------------

    def cudaGetErrorName(self, error: Any) -> _Answer:
        return _Error.cudaSuccess, _Error(error).name.encode()

    def cudaGetErrorString(self, error: Any) -> _Answer:
        return _Error.cudaSuccess, f"what {_Error(error).name} means".encode()

    def cudaGetLastError(self) -> _Answer:
        return (_Error.cudaSuccess,)

    # --- memory --------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> _Answer:
        if self._faults.allocations_left is not None:
            self._faults.allocations_left -= 1
            if self._faults.allocations_left < 0:
                return _Error.cudaErrorMemoryAllocation, None
        return _allocated(self._gpus.allocate(size, "device memory"))

    def cudaFree(self, address: Any) -> _Answer:
        self._gpus.free(int(address), "device memory")
        return (_Error.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> _Answer:
        assert flags == real.cudaHostAllocDefault, "write-combined memory is slow to read"
        if self._faults.pinned_left is not None:
            self._faults.pinned_left -= 1
            if self._faults.pinned_left < 0:
                return _Error.cudaErrorMemoryAllocation, None
        return _allocated(self._gpus.allocate(size, "pinned memory"))

    def cudaFreeHost(self, address: Any) -> _Answer:
        self._gpus.free(int(address), "pinned memory")
        return (_Error.cudaSuccess,)

    def cudaMemcpyAsync(self, to: Any, source: Any, size: int, kind: Any, stream: Any) -> _Answer:
        assert isinstance(kind, real.cudaMemcpyKind), f"{kind!r} is no cudaMemcpyKind"
        is_to_device = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        is_to_host = kind == real.cudaMemcpyKind.cudaMemcpyDeviceToHost
        assert is_to_device or is_to_host, f"the fake has no copies of {kind}"
        written, read = Span(int(to), size), Span(int(source), size)
        self._gpus.require(written, "device memory" if is_to_device else "pinned memory")
        self._gpus.require(read, "pinned memory" if is_to_device else "device memory")

        def copy() -> None:
            written.bytes()[:] = read.bytes()

        label = "to device" if is_to_device else "to host"
        duration = _CALL_US + size / _COPY_BYTES_PER_US
        task = Task(label, 0, size, duration, copy, (read,), (written,))
        self._gpus.queue(self._gpus.stream(int(stream)), task)
        return (_Error.cudaSuccess,)

    def cudaMemsetAsync(self, address: Any, value: int, size: int, stream: Any) -> _Answer:
        span = Span(int(address), size)
        self._gpus.require(span, "device memory")

        def fill() -> None:
            span.bytes()[:] = value

        self._gpus.queue(
            self._gpus.stream(int(stream)), Task("set", 0, size, _CALL_US, fill, (), (span,))
        )
        return (_Error.cudaSuccess,)

    # --- streams and events --------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> _Answer:
        assert flags == real.cudaStreamNonBlocking, "a stream that the default stream waits for"
        return _Error.cudaSuccess, real.cudaStream_t(self._gpus.new_stream().handle)

    def cudaStreamDestroy(self, stream: Any) -> _Answer:
        self._gpus.destroy(int(stream))
        return (_Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Any) -> _Answer:
        if self._faults.wait:
            return self._break(self._faults.wait)
        self._gpus.wait_for_stream(self._gpus.stream(int(stream)))
        return (_Error.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> _Answer:
        assert flags == 0
        self._gpus.wait_for_event(self._gpus.stream(int(stream)), self._gpus.event(int(event)))
        return (_Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> _Answer:
        event = self._gpus.new_event(is_timed=not flags & real.cudaEventDisableTiming)
        return _Error.cudaSuccess, real.cudaEvent_t(event.handle)

    def cudaEventDestroy(self, event: Any) -> _Answer:
        self._gpus.destroy(int(event))
        return (_Error.cudaSuccess,)

    def cudaEventRecord(self, event: Any, stream: Any) -> _Answer:
        self._gpus.record(self._gpus.event(int(event)), self._gpus.stream(int(stream)))
        return (_Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: Any) -> _Answer:
        if self._faults.wait:
            return self._break(self._faults.wait)
        record = self._gpus.event(int(event)).record
        assert record is not None, "the host waits for an event that was never recorded"
        self._gpus.wait(record)
        return (_Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> _Answer:
        marks = [self._gpus.event(int(event)) for event in (start, end)]
        if not all(mark.is_timed and mark.record is not None for mark in marks):
            return _Error.cudaErrorInvalidResourceHandle, None
        first, last = (mark.record for mark in marks)
        assert first is not None and last is not None
        if not (first.is_done and last.is_done):
            return _Error.cudaErrorNotReady, None
        return _Error.cudaSuccess, (last.end_us - first.end_us) / 1e3

    # --- graphs --------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> _Answer:
        thread_local = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert mode == thread_local, "other threads may allocate meanwhile"
        if self._faults.begin_capture:
            return (getattr(_Error, self._faults.begin_capture),)
        self._gpus.begin_capture(self._gpus.stream(int(stream)))
        return (_Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> _Answer:
        found = self._gpus.stream(int(stream))
        assert found.capture is not None, "the stream does not capture"
        if self._faults.end_capture:
            found.capture.is_invalid = True
        graph = self._gpus.end_capture(found)
        if graph is None:
            name = self._faults.end_capture or "cudaErrorStreamCaptureInvalidated"
            return getattr(_Error, name), None
        return _Error.cudaSuccess, real.cudaGraph_t(graph.handle)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> _Answer:
        assert flags == 0
        found = self._gpus.graph(int(graph), is_executable=False)
        if self._faults.instantiate:
            return getattr(_Error, self._faults.instantiate), None
        return _Error.cudaSuccess, real.cudaGraphExec_t(self._gpus.instantiate(found).handle)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> _Answer:
        found = self._gpus.graph(int(graph), is_executable=True)
        self._gpus.launch(found, self._gpus.stream(int(stream)))
        return (_Error.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> _Answer:
        self._gpus.graph(int(graph), is_executable=False)
        self._gpus.destroy(int(graph))
        return (_Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> _Answer:
        self._gpus.graph(int(graph), is_executable=True)
        self._gpus.destroy(int(graph))
        return (_Error.cudaSuccess,)

    def _break(self, name: str) -> _Answer:
        """Fail as a kernel that wrote where it must not: this and every later call."""
        self._is_broken = name
        return (getattr(_Error, name),)


def _allocated(address: int | None) -> _Answer:
    if address is None:
        return _Error.cudaErrorMemoryAllocation, None
    return _Error.cudaSuccess, address


def _values_of(name: str) -> int:
    gives_two = name == "cudaMemGetInfo"
    gives_one = "Create" in name or "Alloc" in name or "Malloc" in name or "Elapsed" in name
    gives_one = gives_one or name in ("cudaGetDeviceCount", "cudaGetDevice", "cudaGraphInstantiate")
    return 2 if gives_two else int(gives_one or name == "cudaStreamEndCapture")
