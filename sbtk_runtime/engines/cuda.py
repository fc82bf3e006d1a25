"""CUDA devices, memory, streams and graphs, through cuda-bindings."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sbtk_runtime.errors import BadConfig, EngineUnavailable, MissingExtra

# The library that the CUDA runtime loads too.
_DRIVER = "libcuda.so.1"
_SUCCESS = 0
_OUT_OF_MEMORY = 2
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100

_INSTALL = 'pip install "sbtk[tensorrt]" or pip install cuda-bindings'
_INSTALL_DRIVER = "install NVIDIA's driver for this GPU; nvidia-smi shows whether it works"


class CudaError(EngineUnavailable):
    """A call of CUDA failed."""


class OutOfDeviceMemory(CudaError):
    """The GPU has not enough memory left; a smaller batch may fit."""


@dataclass(frozen=True)
class CudaDevice:
    """One GPU.

    Attributes:
        index: the N of `--device cuda:N`.
        name: such as `NVIDIA H100 80GB HBM3`.
        compute_capability: such as `9.0`.
        memory_bytes: its total memory.
        driver: the newest version of CUDA that the driver supports, such as `13.0`.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


def cuda_runtime() -> Any:
    """Return the module `cuda.bindings.runtime`, which can be imported without a GPU.

    Raises:
        MissingExtra: cuda-bindings is not installed.
        EngineUnavailable: it is installed but cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as problem:
        raise MissingExtra(
            "cuda-bindings is not installed", "the extra 'tensorrt' or 'tensorrt-rtx'", _INSTALL
        ) from problem
    except Exception as problem:
        raise EngineUnavailable(
            f"cuda-bindings is installed but cannot be loaded: {problem}", "", _INSTALL
        ) from problem
    return runtime


def require_driver() -> None:
    """Check for NVIDIA's driver without importing CUDA modules.

    Raises:
        EngineUnavailable: its library cannot be loaded.
    """
    try:
        ctypes.CDLL(_DRIVER)
    except OSError as problem:
        raise _driver_missing() from problem


def find_device(device: str = "cuda") -> CudaDevice:
    """Return a GPU by name, from the driver.

    Call this before creating any object of TensorRT: without a driver, some of its libraries end
    the process.

    Args:
        device: `cuda` for the first GPU, or `cuda:N`.

    Raises:
        BadConfig: `device` is not the name of a GPU.
        MissingExtra: cuda-bindings is not installed.
        EngineUnavailable: there is no driver, or it is too old, or there is no such GPU.
    """
    index = _index(device)
    runtime = cuda_runtime()
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == _INSUFFICIENT_DRIVER:
        raise _driver_missing_or_old(runtime)
    if int(error) == _NO_DEVICE or (int(error) == _SUCCESS and count == 0):
        raise EngineUnavailable(
            "NVIDIA's driver shows no GPU",
            "a GPU that CUDA_VISIBLE_DEVICES does not hide",
            "nvidia-smi",
        )
    checked((error, count))
    if index >= count:
        raise EngineUnavailable(
            f"there is no {device}: this machine has {count} GPU{'s' * (count != 1)}",
            "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}",
            f"--device cuda:{count - 1}",
        )
    properties = checked(runtime.cudaGetDeviceProperties(index))
    return CudaDevice(
        index=index,
        name=_name(properties.name),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        driver=_version(checked(runtime.cudaDriverGetVersion())),
    )


def checked(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call of `cuda.bindings.runtime`, after checking its error code.

    Args:
        answer: the error code, followed by any number of values.

    Returns:
        `None`, the value, or a tuple of the values.

    Raises:
        OutOfDeviceMemory: the GPU is out of memory.
        CudaError: the call failed for another reason.
    """
    error, *values = answer
    if int(error) != _SUCCESS:
        raise _make_error(error)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _name(name: bytes) -> str:
    # The name in a C structure may be padded to 256 bytes.
    text = name.partition(b"\0")[0].decode("utf-8", "replace")
    return "".join(letter for letter in text if letter.isprintable())


def _index(device: str) -> int:
    family, colon, number = device.partition(":")
    is_number = number.isascii() and number.isdecimal() and len(number) < 6
    if family != "cuda" or (colon and not is_number):
        raise BadConfig(f"unknown GPU {device!r}", "cuda or cuda:N")
    return int(number) if colon else 0


def _driver_missing() -> EngineUnavailable:
    return EngineUnavailable(
        "there is no NVIDIA driver on this machine", "a GPU and its driver", _INSTALL_DRIVER
    )


def _driver_missing_or_old(runtime: Any) -> EngineUnavailable:
    # Error 35 means either; the driver's version is 0 if there is none.
    error, version = runtime.cudaDriverGetVersion()
    if int(error) != _SUCCESS or version == 0:
        return _driver_missing()
    needed = checked(runtime.cudaRuntimeGetVersion())
    return EngineUnavailable(
        f"NVIDIA's driver is too old: it supports CUDA {_version(version)}",
        f"a driver for CUDA {_version(needed)} or newer",
        "update NVIDIA's driver",
    )


def _make_error(error: Any) -> CudaError:
    runtime = cuda_runtime()
    name = _text(runtime.cudaGetErrorName(error), f"error {int(error)}")
    text = _text(runtime.cudaGetErrorString(error), "no explanation")
    if int(error) == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(f"the GPU is out of memory ({name})", "", "use a smaller --batch")
    return CudaError(f"CUDA failed: {name} ({int(error)}): {text}", "", "nvidia-smi, sbtk doctor")


def _text(answer: tuple[Any, ...], otherwise: str) -> str:
    _, value = answer
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else otherwise


def _version(number: int) -> str:
    """Return `13.5` for 13050."""
    return f"{number // 1000}.{number % 1000 // 10}"


def capture_graph(cuda: Any, stream: Any, enqueue: Callable[[], None]) -> Any:
    """Return an executable graph of the work that `enqueue` puts into a stream; does not run it.

    The first run of a library cannot be captured, because it allocates; run it once before. Other
    threads may allocate on the GPU during the capture.

    Args:
        cuda: `cuda.bindings.runtime`.
        stream: where `enqueue` puts its work.
        enqueue: makes the calls to capture.

    Raises:
        CudaError: the work cannot be captured; the stream is unchanged.
        SbtkError: what `enqueue` raises; the stream is unchanged.
    """
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(cuda.cudaStreamBeginCapture(stream, mode))
    try:
        enqueue()
    except BaseException:
        # An unfinished capture would capture all later work of the stream.
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
    # A failed capture sets an error that later calls would report.
    cuda.cudaGetLastError()


@dataclass(frozen=True)
class PinnedArray:
    """An array in pinned host memory, which the GPU can copy directly.

    Attributes:
        address: of its first byte.
        array: the memory; it must not be used after its resources are closed.
    """

    address: int
    array: NDArray[Any]


def make_current(index: int) -> None:
    """Make a GPU the current one of the calling thread.

    Raises:
        CudaError: the GPU cannot be used.
    """
    checked(cuda_runtime().cudaSetDevice(index))


class DeviceResources:
    """Memory, streams and events on one GPU, which must be the calling thread's current one.

    Args:
        index: of the GPU.
    """

    def __init__(self, index: int) -> None:
        self.cuda = cuda_runtime()
        self.index = index
        self._stack = ExitStack()
        # Also frees the resources of failed open functions and of callers that do not close them.
        # When the process ends, the driver frees its GPU memory.
        self._close = weakref.finalize(self, _close, self.cuda, index, self._stack)
        self._close.atexit = False

    def memory(self, size_bytes: int) -> int:
        """Return the address of new memory on the GPU, aligned to 256 bytes.

        Raises:
            OutOfDeviceMemory: there is not enough left.
        """
        address = int(checked(self.cuda.cudaMalloc(size_bytes)))
        self.on_close(self.cuda.cudaFree, address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> PinnedArray:
        """Return a new array of zeros in pinned host memory.

        Raises:
            OutOfDeviceMemory: there is not enough left.
        """
        kind = np.dtype(dtype)
        size_bytes = int(np.prod(shape)) * kind.itemsize
        address = int(checked(self.cuda.cudaHostAlloc(size_bytes, self.cuda.cudaHostAllocDefault)))
        self.on_close(self.cuda.cudaFreeHost, address)
        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        array = np.ctypeslib.as_array(memory).view(kind).reshape(shape)
        array.fill(0)
        return PinnedArray(address, array)

    def stream(self) -> Any:
        """Return a new stream, which does not wait for the default stream."""
        stream = checked(self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking))
        self.on_close(self.cuda.cudaStreamDestroy, stream)
        return stream

    def event(self) -> Any:
        """Return a new event with timing."""
        event = checked(self.cuda.cudaEventCreateWithFlags(self.cuda.cudaEventDefault))
        self.on_close(self.cuda.cudaEventDestroy, event)
        return event

    def on_close(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function when the resources are closed, before older resources are freed.

        Its return value is ignored.
        """
        self._stack.callback(function, *arguments)

    def close(self) -> None:
        """Free everything. No work may be running. Further calls do nothing."""
        self._close()


def _close(cuda: Any, index: int, stack: ExitStack) -> None:
    # The garbage collector may call this in any thread, with any current GPU. Errors are ignored.
    _, before = cuda.cudaGetDevice()
    cuda.cudaSetDevice(index)
    stack.close()
    if before is not None:
        cuda.cudaSetDevice(before)
