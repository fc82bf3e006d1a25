"""The GPU that was asked for, looked for through the driver before any library needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sbtk_runtime.errors import BadConfig, EngineUnavailable, MissingExtra

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


def _driver_missing_or_old(runtime: Any) -> EngineUnavailable:
    # Error 35 means both; the driver's version, which is 0 without one, tells them apart.
    error, version = runtime.cudaDriverGetVersion()
    if int(error) != _SUCCESS or version == 0:
        return EngineUnavailable(
            "there is no NVIDIA driver on this machine", "a GPU and its driver", _INSTALL_DRIVER
        )
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
