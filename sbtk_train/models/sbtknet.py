"""SBTKNet's student: three linear heads on the pooled feature of one trunk (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_train.models.backbone import IMAGENET_CLASSES, Classifier, build_trunk
from sbtk_train.models.student import Student

_ATTENTION_CHANNELS = 380


class SbtknetStudent(Student):
    """A trunk shared by sketches and photos, pooled, with embedding, class and soft-label heads.

    Args:
        backbone: one of `sbtk_train.models.backbone.BACKBONES`.
        dim: length of the embedding.
        classes: number of training classes.
        attention: add the spatial attention of doodle2search before pooling (an ablation).

    Attributes:
        embedding: FC_sim.
        identity: FC_id.
        soft: FC_soft.
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

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.embedding.out_features

    def project(self, feature: Tensor) -> Tensor:
        """Return `(N, D)`, FC_sim of pooled features `(N, F)`."""
        rows: Tensor = self.embedding(feature)
        return rows

    def logits(self, feature: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return FC_id `(N, C)` and FC_soft `(N, 1000)` of pooled features `(N, F)`."""
        return self.identity(feature), self.soft(feature)

    def pool(self, feature_map: Tensor) -> Tensor:
        """Return the global average `(N, F)` of a feature map, after the attention, if any."""
        if self.attention is not None:
            feature_map = self.attention(feature_map)
        return super().pool(feature_map)

    def start_from(self, classifier: Classifier) -> None:
        """Initialise the heads from the ImageNet classifier.

        The soft-label head is the classifier itself. The embedding is the projection on the
        classifier's leading right singular vectors (as in SAKE and DSN): the part of the feature
        that separates ImageNet's classes.
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


class SpatialAttention(nn.Module):
    """Soft attention over positions, added to the feature map: `x + x * softmax(mask)`.

    Two 1x1 convolutions without a nonlinearity between them, as in doodle2search.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, _ATTENTION_CHANNELS, 1)
        self.mask = nn.Conv2d(_ATTENTION_CHANNELS, 1, 1)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return the reweighted feature map `(N, F, h, w)`."""
        scores = self.mask(self.reduce(feature_map))
        weights = functional.softmax(scores.flatten(2), dim=2).view_as(scores)
        return feature_map + feature_map * weights
