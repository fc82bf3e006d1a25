"""DSN's and SAKE's teacher: the frozen ImageNet classifier, on the pixels the student sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_train.device import Compute
from sbtk_train.students.backbone import Classifier
from sbtk_train.students.cse_resnet import CseTrunk


class DsnTeacher:
    """A CSE-ResNet with ImageNet weights; its weights for the domain are zero, so it has no say.

    Args:
        trunk: with ImageNet weights; it is frozen here.
        classifier: the ImageNet head of the same weights.
        compute: where and how to run.
    """

    def __init__(self, trunk: CseTrunk, classifier: Classifier, compute: Compute) -> None:
        trunk = trunk.requires_grad_(False).eval()
        self._trunk = trunk.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._weight = classifier.weight.to(compute.device)
        self._bias = classifier.bias.to(compute.device)
        self._compute = compute

    @torch.no_grad()
    def logits(self, inputs: Tensor, domains: Tensor, begin: str = "") -> Tensor:
        """Returns ImageNet logits `(N, 1000) float32` of images, or of maps that enter `begin`.

        Maps are those of a student whose stages before `begin` are the teacher's own.
        """
        if not len(inputs):
            return self._bias.new_zeros(0, len(self._bias))
        with self._compute.autocast():
            feature = self._trunk(inputs, domains, begin).mean((2, 3))
        return functional.linear(feature.float(), self._weight, self._bias)
