"""A ResNet18 with a quarter of the channels, so that tests of whole runs take little time and disk.

It has the layers of the real one, under the same names, and a sixteenth of its weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

_DIVISOR = 4


class NarrowResNet(ResNet):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(512 // _DIVISOR, 1000)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes // _DIVISOR, *args, **options)
        return layer
