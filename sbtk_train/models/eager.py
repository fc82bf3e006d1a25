"""The student in torch, eager or compiled, as a baseline for engines."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD, Pixels
from sbtk_train.models.student import DsnStudent, SbtknetStudent, Student, domains_of

Run = Callable[[Pixels], NDArray[np.float32]]

#: Most batch sizes to compile a student for; torch's limit is 8, after which it runs eager.
_MAX_COMPILED_BATCHES = 64


@dataclass(frozen=True)
class TorchSettings:
    """Settings of torch for running a student.

    Attributes:
        threads: torch's CPU threads, a setting of the whole process.
        device: `cpu`, or a GPU such as `cuda:0`.
        precision: precision of the trunk; the embedding layer and the norm are always FP32. By
            default, torch's FP32 convolutions use TF32 on a GPU.
        is_channels_last: use NHWC activations, which are faster on many devices.
    """

    threads: int
    device: str = "cpu"
    precision: Literal["fp32", "fp16"] = "fp32"
    is_channels_last: bool = False


def make_random_student(method: str, backbone: str, dim: int) -> Student:
    """Return a student with random weights, which do not affect the speed.

    Args:
        method: `sbtknet`, `dsn` or `sake`.
        backbone: `resnet50-v1`, or another of the method.
        dim: length of an embedding.

    Raises:
        BadConfig: unknown backbone.
    """
    of_method = SbtknetStudent if method == "sbtknet" else DsnStudent
    return of_method(backbone, dim, classes=2).eval()


def make_eager_run(student: Student, settings: TorchSettings) -> Run:
    """Return a function that does the same as an engine, in torch eager.

    It takes `(N, 224, 224, 3) uint8` photos in host memory and returns `(N, D) float32` unit rows
    there, including the normalisation of the input. The student itself is not changed.
    """
    return _run(_embedding(student, settings), settings)


def make_compiled_run(
    student: Student, settings: TorchSettings, notify: Callable[[str], None] = lambda _: None
) -> Run:
    """Return `make_eager_run`'s function, compiled by `torch.compile` for each batch size.

    For speed, weights are constants on a CPU ("freezing"), and a GPU uses CUDA graphs. The first
    run of a batch size compiles for up to a minute.

    Args:
        student: the student, which is not changed.
        settings: torch's settings.
        notify: called before compiling.

    Raises:
        RuntimeError: from the first run, if there is no C++ compiler or it fails.
    """
    is_gpu = torch.device(settings.device).type == "cuda"
    compiled = torch.compile(
        _embedding(student, settings),
        dynamic=False,
        fullgraph=True,  # rather fail than run eager
        options={"triton.cudagraphs": True} if is_gpu else {"freezing": True},
    )
    run = _run(compiled, settings)
    known: set[int] = set()

    def run_compiled(pixels: Pixels) -> NDArray[np.float32]:
        if len(pixels) in known:
            return run(pixels)
        notify(f"torch compiles its network for batches of {len(pixels)}: up to a minute")
        with _compiling():
            rows = run(pixels)
        known.add(len(pixels))
        return rows

    return run_compiled


def _embedding(student: Student, settings: TorchSettings) -> Callable[[Tensor], Tensor]:
    """Return a function from `(N, 224, 224, 3) uint8` to `(N, D) float32`, on the device."""
    layout = torch.channels_last if settings.is_channels_last else torch.contiguous_format
    student = copy.deepcopy(student).to(settings.device)
    student = student.to(memory_format=layout)  # type: ignore[call-overload]
    dtype = torch.float16 if settings.precision == "fp16" else torch.float32
    student.trunk.to(dtype)
    mean = torch.tensor(IMAGENET_MEAN, device=settings.device).view(1, 3, 1, 1) * 255.0
    std = torch.tensor(IMAGENET_STD, device=settings.device).view(1, 3, 1, 1) * 255.0

    def embed(pixels: Tensor) -> Tensor:
        images = (pixels.permute(0, 3, 1, 2).float() - mean) / std
        inputs = images.to(dtype).contiguous(memory_format=layout)
        return student.embed(inputs, domains_of("photo", len(inputs), inputs.device))

    return embed


def _run(embed: Callable[[Tensor], Tensor], settings: TorchSettings) -> Run:
    torch.set_num_threads(settings.threads)

    def run(pixels: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = embed(torch.from_numpy(pixels).to(settings.device))
            return np.asarray(rows.float().cpu().numpy(), dtype=np.float32)

    return run


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let torch compile for more batch sizes than by default, without its warnings."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about missing CUDA
    try:
        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED_BATCHES):
            yield
    finally:
        logger.setLevel(level)


def make_product_run(
    kind: Literal["int8", "fp32"], size: int, threads: int
) -> Callable[[], object]:
    """Return a function that multiplies two `(size, size)` matrices on the CPU.

    INT8 is `int8` times `int8` summed in `int32`.

    Args:
        kind: type of the numbers.
        size: rows and columns.
        threads: torch's CPU threads, a setting of the whole process.
    """
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(size)
    if kind == "fp32":
        factors = torch.randn(2, size, size, generator=random)
        return lambda: torch.mm(factors[0], factors[1])
    integers = torch.randint(-128, 128, (2, size, size), dtype=torch.int8, generator=random)
    return lambda: torch._int_mm(integers[0], integers[1])
