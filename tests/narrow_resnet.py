"""A ResNet18 with a quarter of the channels and one block a stage, for tests of runs and exports.

Its layers have the names of the real one's, and a fortieth of the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

_DIVISOR = 4


class NarrowResNet(ResNet):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(512 // _DIVISOR, 1000)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes // _DIVISOR, *args, **options)
        return layer
