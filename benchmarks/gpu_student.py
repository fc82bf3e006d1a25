"""The student of the GPU benchmark: random weights, with activations like a trained one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.gpu_findings import Task
from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD, SIZE_PX
from sbtk_train.models.student import SbtknetStudent, Student

BACKBONE = "resnet50-v1"
DIM = 512

_SETTLED_ON = 8
_DRY_STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1")


def make_random_student(task: Task) -> SbtknetStudent:
    """Return the student in evaluation mode on the CPU, equal in every stage.

    Weights do not affect the time of a run, unless activations overflow. In a dry run, the student
    is the first stage of a ResNet18.
    """
    torch.manual_seed(0)
    if not task.is_dry_run:
        student = SbtknetStudent(BACKBONE, DIM, classes=2)
    else:
        student = SbtknetStudent("resnet18", DIM, classes=2)
        trunk = nn.Sequential()
        for name in _DRY_STAGES:
            trunk.add_module(name, student.trunk.get_submodule(name))
        student.trunk = trunk
        student.embedding = nn.Linear(64, DIM)
        student.identity, student.soft = nn.Linear(64, 2), nn.Linear(64, 1000)
    _settle(student, 64 if task.is_dry_run else SIZE_PX)
    return student.eval()


def random_images(count: int, size_px: int = SIZE_PX, seed: int = 0) -> NDArray[np.uint8]:
    """Return `(count, size_px, size_px, 3) uint8` coarse patterns with noise."""
    random = np.random.default_rng(seed)
    cells = random.integers(0, 224, (count, 8, 8, 3), dtype=np.uint8)
    repeats = -(-size_px // 8)
    coarse = cells.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size_px, :size_px]
    return coarse + random.integers(0, 32, coarse.shape, dtype=np.uint8)


class FromPixels(nn.Module):
    """A student with the input of engines, `(N, H, W, 3) uint8` RGB, and unit rows as output.

    Args:
        student: a student in evaluation mode.
        layout: memory format of the trunk's input.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, student: Student, layout: torch.memory_format) -> None:
        super().__init__()
        self.student = student
        self.layout = layout
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, D) float32` unit rows."""
        planes = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return self.student.embed(planes.contiguous(memory_format=self.layout))


def _settle(student: SbtknetStudent, size_px: int) -> None:
    """Set the statistics of batch norms to those of a few images.

    With initial statistics, activations would grow from block to block, up to FP16's limit.
    """
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean over batches, of which there is one
    images = torch.from_numpy(random_images(_SETTLED_ON, size_px))
    student.train()
    with torch.no_grad():
        FromPixels(student, torch.contiguous_format)(images)
