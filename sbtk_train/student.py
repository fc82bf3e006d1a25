"""The student: one ResNet with three linear heads on its pooled feature (SBTKNet, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_train.backbone import IMAGENET_CLASSES, Classifier, build_trunk

_ATTENTION_CHANNELS = 380


class StudentOutput(NamedTuple):
    """What the student makes of `(N, 3, H, W)` images.

    Attributes:
        embedding: `(N, D) float32`, unit rows (FC_sim).
        class_logits: `(N, C) float32` over training classes (FC_id).
        soft_logits: `(N, 1000) float32` over ImageNet classes (FC_soft).
    """

    embedding: Tensor
    class_logits: Tensor
    soft_logits: Tensor


class Student(nn.Module):
    """A trunk shared by sketches and photos, pooled, with embedding, class and soft-label heads.

    Args:
        backbone: one of `sbtk_train.backbone.BACKBONES`.
        dim: length of the embedding.
        classes: number of training classes.
        attention: adds the spatial attention of doodle2search before pooling (an ablation).
    """

    def __init__(self, backbone: str, dim: int, classes: int, attention: bool = False) -> None:
        super().__init__()
        self.trunk, channels = build_trunk(backbone)
        self.attention = SpatialAttention(channels) if attention else None
        self.embedding = nn.Linear(channels, dim)
        self.identity = nn.Linear(channels, classes)
        self.soft = nn.Linear(channels, IMAGENET_CLASSES)
        nn.init.normal_(self.identity.weight, std=0.01)
        nn.init.zeros_(self.identity.bias)

    def forward(self, images: Tensor) -> StudentOutput:
        """Returns the heads' outputs for `(N, 3, H, W)` ImageNet-normalised images."""
        feature = self.feature(images).float()
        # The heads stay in float32 under autocast: an L2 norm in half precision underflows.
        with torch.autocast(feature.device.type, enabled=False):
            return StudentOutput(
                functional.normalize(self.embedding(feature), dim=1),
                self.identity(feature),
                self.soft(feature),
            )

    def embed(self, images: Tensor) -> Tensor:
        """Returns `(N, D) float32` unit rows for `(N, 3, H, W)` ImageNet-normalised images."""
        feature = self.feature(images).float()
        with torch.autocast(feature.device.type, enabled=False):
            return functional.normalize(self.embedding(feature), dim=1)

    def feature(self, images: Tensor) -> Tensor:
        """Returns the pooled feature `(N, F)`."""
        return self.pool(self.trunk(images))

    def pool(self, feature_map: Tensor) -> Tensor:
        """Returns the global average `(N, F)` of a feature map `(N, F, h, w)`."""
        if self.attention is not None:
            feature_map = self.attention(feature_map)
        return feature_map.mean(dim=(2, 3))

    def start_from(self, classifier: Classifier) -> None:
        """Initialises the heads from the ImageNet classifier.

        The soft-label head is the classifier itself. The embedding is the projection on the
        classifier's leading right singular vectors (as SAKE and DSN do), so that it starts as the
        part of the feature that tells ImageNet's classes apart.
        """
        with torch.no_grad():
            self.soft.weight.copy_(classifier.weight)
            self.soft.bias.copy_(classifier.bias)
            centred = classifier.weight - classifier.weight.mean(dim=0)
            _, values, rows = torch.linalg.svd(centred, full_matrices=False)
            rank = min(self.embedding.out_features, len(values))
            scale = values[:rank] / values[:rank].mean()
            self.embedding.weight[:rank].copy_(scale[:, None] * rows[:rank])
            self.embedding.bias.zero_()

    def freeze_until(self, stage: str) -> None:
        """Freezes the trunk before `stage`, e.g. `layer3`; batch-norm statistics there too."""
        for name, child in self.trunk.named_children():
            if name == stage:
                return
            child.requires_grad_(False)

    def train(self, mode: bool = True) -> Student:
        """Sets the mode; frozen stages stay in evaluation mode, so their statistics stay put."""
        super().train(mode)
        for child in self.trunk.children():
            parameters = list(child.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                child.eval()
        return self


class SpatialAttention(nn.Module):
    """Soft attention over positions, added to the feature map: `x + x * softmax(mask)`.

    Two 1x1 convolutions without a nonlinearity between them, as in doodle2search.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, _ATTENTION_CHANNELS, 1)
        self.mask = nn.Conv2d(_ATTENTION_CHANNELS, 1, 1)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Returns the reweighted feature map, of the shape that it is given."""
        scores = self.mask(self.reduce(feature_map))
        weights = functional.softmax(scores.flatten(2), dim=2).view_as(scores)
        return feature_map + feature_map * weights
