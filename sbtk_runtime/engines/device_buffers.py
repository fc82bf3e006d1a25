"""Memory, streams and events on one GPU, freed in reverse order and exactly once."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sbtk_runtime.engines.cuda_device import checked, cuda_runtime


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
