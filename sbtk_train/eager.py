"""The student as torch runs it without export: the reference that engines are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD, Pixels
from sbtk_train.student import Student


def eager_run(
    backbone: str, dim: int, *, threads: int, is_channels_last: bool = False
) -> Callable[[Pixels], NDArray[np.float32]]:
    """Returns a function that does an engine's whole job in torch eager, FP32, on the CPU.

    It takes `(N, 224, 224, 3) uint8` and returns `(N, D) float32` unit rows, normalisation of the
    input included. The weights are random: they do not change how long it takes.

    Args:
        backbone: `resnet50-v1` or `resnet50-v1.5`.
        dim: length of an embedding.
        threads: CPU threads of torch; this is a setting of the whole process.
        is_channels_last: keep activations in NHWC order, torch's faster layout on many CPUs.
    """
    torch.set_num_threads(threads)
    student = Student(backbone, dim, classes=2).eval()
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    student = student.to(memory_format=layout)  # type: ignore[call-overload]
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255.0
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255.0

    def run(pixels: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
            images = ((images - mean) / std).contiguous(memory_format=layout)
            return np.asarray(student.embed(images).numpy(), dtype=np.float32)

    return run
