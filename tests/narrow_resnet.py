"""A ResNet with a quarter of the channels and few blocks, for tests of runs and exports.

Its layers have the same names as in the real ResNets. Run as a program, this file is `sbtk` with a
narrow ResNet18.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

_DIVISOR = 4


class NarrowResNet(ResNet):  # type: ignore[misc]
    def __init__(
        self, block: type[BasicBlock | Bottleneck] = BasicBlock, blocks_per_stage: int = 1
    ) -> None:
        super().__init__(block, [blocks_per_stage] * 4)
        self.fc = nn.Linear(512 * block.expansion // _DIVISOR, 1000)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes // _DIVISOR, *args, **options)
        return layer


if __name__ == "__main__":
    from sbtk_cli.main import main

    with mock.patch("torchvision.models.resnet18", NarrowResNet):
        sys.exit(main())
