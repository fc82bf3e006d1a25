"""The GPU that was asked for, looked for through the driver before any library needs it."""

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
    """The GPU has no such piece of memory left; a smaller batch may fit."""


@dataclass(frozen=True)
class CudaDevice:
    """One GPU.

    Attributes:
        index: as `--device cuda:N` names it.
        name: as the driver tells it, such as `NVIDIA H100 80GB HBM3`.
        compute_capability: such as `9.0`.
        memory_bytes: that it has in all.
        driver: the newest CUDA that the driver can serve, such as `13.0`.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


def cuda_runtime() -> Any:
    """Returns the module `cuda.bindings.runtime`, which imports without a GPU too.

    Raises:
        MissingExtra: cuda-bindings is not installed.
        EngineUnavailable: it is installed and does not load.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as problem:
        raise MissingExtra(
            "cuda-bindings is not installed", "the extra 'tensorrt' or 'tensorrt-rtx'", _INSTALL
        ) from problem
    except Exception as problem:
        raise EngineUnavailable(
            f"cuda-bindings is installed and does not load: {problem}", "", _INSTALL
        ) from problem
    return runtime


def require_driver() -> None:
    """Checks for NVIDIA's driver without importing anything of CUDA.

    Raises:
        EngineUnavailable: its library cannot be loaded.
    """
    try:
        ctypes.CDLL(_DRIVER)
    except OSError as problem:
        raise _driver_missing() from problem


def find_device(device: str = "cuda") -> CudaDevice:
    """Returns the GPU of that name after the driver has been asked for it.

    Nothing of TensorRT may exist before: some of its libraries end the process without a driver.

    Args:
        device: `cuda` for the first GPU, or `cuda:N`.

    Raises:
        BadConfig: that is no name of a GPU.
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
            "NVIDIA's driver shows no GPU", "a GPU that CUDA_VISIBLE_DEVICES leaves", "nvidia-smi"
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
    """Returns what a call of `cuda.bindings.runtime` gave beside its error code.

    Args:
        answer: the error code, and then nothing, one value or several.

    Returns:
        `None`, the value, or a tuple of the values.

    Raises:
        OutOfDeviceMemory: the GPU's memory is used up.
        CudaError: the call failed in another way.
    """
    error, *values = answer
    if int(error) != _SUCCESS:
        raise _explained(error)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _name(name: bytes) -> str:
    # The name of a C structure: it may be padded up to its 256 bytes.
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
    # Error 35 means both; the driver's version, which is 0 without one, tells them apart.
    error, version = runtime.cudaDriverGetVersion()
    if int(error) != _SUCCESS or version == 0:
        return _driver_missing()
    needed = checked(runtime.cudaRuntimeGetVersion())
    return EngineUnavailable(
        f"NVIDIA's driver is too old: it serves CUDA {_version(version)}",
        f"a driver for CUDA {_version(needed)} or newer",
        "update NVIDIA's driver",
    )


def _explained(error: Any) -> CudaError:
    runtime = cuda_runtime()
    name = _text(runtime.cudaGetErrorName(error), f"error {int(error)}")
    text = _text(runtime.cudaGetErrorString(error), "no explanation")
    if int(error) == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(
            f"the GPU's memory is used up ({name})", "", "use a smaller --batch"
        )
    return CudaError(f"CUDA failed: {name} ({int(error)}): {text}", "", "nvidia-smi, sbtk doctor")


def _text(answer: tuple[Any, ...], otherwise: str) -> str:
    _, value = answer
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else otherwise


def _version(number: int) -> str:
    """Returns `13.5` for CUDA's 13050."""
    return f"{number // 1000}.{number % 1000 // 10}"


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


@dataclass(frozen=True)
class PinnedArray:
    """An array in host memory that the GPU can copy from and to by itself.

    Attributes:
        address: of its first byte.
        array: the memory itself; not to be used after the resources that made it are closed.
    """

    address: int
    array: NDArray[Any]


def make_current(index: int) -> None:
    """Makes a GPU the one that the calling thread works on; every thread has its own.

    Raises:
        CudaError: the GPU cannot be used.
    """
    checked(cuda_runtime().cudaSetDevice(index))


class DeviceResources:
    """What was made on one GPU, which the calling thread must have made its own.

    Args:
        index: of the GPU.
    """

    def __init__(self, index: int) -> None:
        self.cuda = cuda_runtime()
        self.index = index
        self._stack = ExitStack()
        # Also frees what an open function that failed, or a caller who forgot, left behind. The
        # end of the process frees a GPU's memory by itself.
        self._close = weakref.finalize(self, _close, self.cuda, index, self._stack)
        self._close.atexit = False

    def memory(self, size_bytes: int) -> int:
        """Returns the address of new memory on the GPU, aligned to 256 bytes.

        Raises:
            OutOfDeviceMemory: there is none left.
        """
        address = int(checked(self.cuda.cudaMalloc(size_bytes)))
        self.on_close(self.cuda.cudaFree, address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> PinnedArray:
        """Returns a new array of zeros in pinned host memory.

        Raises:
            OutOfDeviceMemory: there is none left.
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
        """Returns a new stream, which does not wait for the default stream."""
        stream = checked(self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking))
        self.on_close(self.cuda.cudaStreamDestroy, stream)
        return stream

    def event(self) -> Any:
        """Returns a new event that also keeps the time."""
        event = checked(self.cuda.cudaEventCreateWithFlags(self.cuda.cudaEventDefault))
        self.on_close(self.cuda.cudaEventDestroy, event)
        return event

    def on_close(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function when the resources are closed, before what was made earlier is freed.

        What it returns is not looked at: no error code could be helped any more.
        """
        self._stack.callback(function, *arguments)

    def close(self) -> None:
        """Frees everything; no work may be under way. Does nothing the second time."""
        self._close()


def _close(cuda: Any, index: int, stack: ExitStack) -> None:
    # The garbage collector may call this in any thread, with any current GPU. One that has failed
    # gives error codes here, about which nothing can be done.
    _, before = cuda.cudaGetDevice()
    cuda.cudaSetDevice(index)
    stack.close()
    if before is not None:
        cuda.cudaSetDevice(before)
