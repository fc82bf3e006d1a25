"""The students: a pooled trunk with an embedding and two heads, for each method.

SBTKNet's heads take the pooled feature (section 3.1). Those of DSN (Wang et al. 2021,
haowang1992/DSN `src/ResnetModel.py`) and SAKE (Liu et al. 2019, qliu24/SAKE) take the embedding, a
short code without batch norm and activation, and their trunk has a domain input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.preprocess import DOMAINS, Kind
from sbtk_train.config import SbtknetRecipe, TrainConfig
from sbtk_train.models.backbone import (
    IMAGENET_CLASSES,
    Classifier,
    CseTrunk,
    build_cse_trunk,
    build_trunk,
    load_cse_trunk,
    load_trunk,
    run_stage,
)

_ATTENTION_CHANNELS = 380


class StudentOutput(NamedTuple):
    """A student's outputs for N images.

    Attributes:
        embedding: `(N, D) float32` unit rows, used for search.
        class_logits: `(N, C) float32` over training classes.
        soft_logits: `(N, 1000) float32` over ImageNet classes.
        feature: `(N, F) float32`, the pooled feature map.
    """

    embedding: Tensor
    class_logits: Tensor
    soft_logits: Tensor
    feature: Tensor


class Student(nn.Module, ABC):
    """A trunk with heads; images are `(N, 3, H, W) float32`, ImageNet-normalised.

    `domains (N,) float32` is 0 for a sketch and 1 for a photo. Students whose `has_domain_input` is
    false ignore it, and it may be omitted.

    Attributes:
        trunk: convolutional stages under torchvision's names, `conv1` to `layer4`.
        has_domain_input: whether an embedding depends on the image's domain.
    """

    has_domain_input: ClassVar[bool] = False
    trunk: nn.Module

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def project(self, feature: Tensor) -> Tensor:
        """Return `(N, D)` embeddings, not yet of length one, of pooled features `(N, F)`."""

    @abstractmethod
    def logits(self, feature: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits `(N, C)` and ImageNet logits `(N, 1000)`."""

    @abstractmethod
    def start_from(self, classifier: Classifier) -> None:
        """Initialise the heads from the ImageNet classifier of the trunk's weights."""

    def load_weights(self, tensors: dict[str, Tensor], path: Path) -> Classifier | None:
        """Load a classifier network's tensors into the trunk; return its head, if any.

        Raises:
            BadModel: names or shapes do not fit; names the first that does not.
        """
        return load_trunk(self.trunk, tensors, path)

    def load_student(self, tensors: dict[str, Tensor], path: Path, *, same_classes: bool) -> None:
        """Load another student: trunk, embedding and heads.

        Args:
            tensors: a student's tensors (`backbone.is_student`).
            path: their file, for errors.
            same_classes: whether both have the same classes in the same order; otherwise the
                classification head keeps its random initialisation.

        Raises:
            BadModel: the students have different architectures; names the option to change.
        """
        own = self.state_dict()
        kept = {key for key in own if key.startswith("identity.") and not same_classes}
        dim = tensors["embedding.weight"].shape[0]
        if dim != self.dim:
            raise BadModel(
                f"the embedding in {path} has length {dim}, but this run's has {self.dim}",
                "equal lengths",
                f"--dim {dim}",
            )
        foreign = sorted(key for key in tensors if key not in own)
        missing = sorted(key for key in own if key not in tensors and key not in kept)
        shaped = sorted(
            key for key in set(own) & set(tensors) - kept if own[key].shape != tensors[key].shape
        )
        if foreign or missing or shaped:
            names = [*foreign, *missing, *shaped]
            option = "--attention or --no-attention" if "attention" in names[0] else ""
            raise BadModel(
                f"the model in {path} is built differently from this run's; the first difference "
                f"is {names[0]!r}",
                "a model of the same method and backbone",
                option or "choose them with --method and --backbone",
            )
        self.load_state_dict(
            {key: own[key] if key in kept else tensors[key].to(own[key].dtype) for key in own}
        )

    def forward(
        self, inputs: Tensor, domains: Tensor | None = None, begin: str = ""
    ) -> StudentOutput:
        """Return all outputs for images `(N, 3, H, W)`, or for feature maps at the stage `begin`.

        `domains (N,)` are for students with a domain input.
        """
        feature = self.feature(inputs, domains, begin).float()
        # The heads stay in float32 under autocast: an L2 norm in half precision underflows.
        with torch.autocast(feature.device.type, enabled=False):
            projected = self.project(feature)
            embedding = functional.normalize(projected, dim=1)
            return StudentOutput(embedding, *self.logits(feature, projected), feature)

    def embed(self, inputs: Tensor, domains: Tensor | None = None, begin: str = "") -> Tensor:
        """Return `(N, D) float32` unit rows for N images, or for feature maps at `begin`."""
        feature = self.feature(inputs, domains, begin).float()
        with torch.autocast(feature.device.type, enabled=False):
            return functional.normalize(self.project(feature), dim=1)

    def feature(self, inputs: Tensor, domains: Tensor | None = None, begin: str = "") -> Tensor:
        """Return the pooled feature `(N, F)`."""
        return self.pool(self.feature_map(inputs, domains, begin=begin))

    def feature_map(
        self, inputs: Tensor, domains: Tensor | None = None, *, begin: str = "", end: str = ""
    ) -> Tensor:
        """Return the output of the trunk's stages from `begin` up to, but not including, `end`.

        Both are stage names such as `layer4`, or empty for all stages on that side. The inputs are
        images `(N, 3, H, W)`, or feature maps `(N, F, h, w)` at `begin`.
        """
        values, is_within = inputs, not begin
        for name, stage in self.trunk.named_children():
            is_within = is_within or name == begin
            if name == end:
                break
            if is_within:
                values = self._stage(stage, values, domains)
        return values

    def pool(self, feature_map: Tensor) -> Tensor:
        """Return the global average `(N, F)` of a feature map `(N, F, h, w)`."""
        return feature_map.mean(dim=(2, 3))

    def freeze_until(self, stage: str) -> None:
        """Freeze the trunk's stages before `stage`, such as `layer3`, and their batch norms."""
        for name, child in self.trunk.named_children():
            if name == stage:
                return
            child.requires_grad_(False)

    def train(self, mode: bool = True) -> Student:
        """Set the mode; frozen stages stay in evaluation mode, to keep their statistics."""
        super().train(mode)
        for child in self.trunk.children():
            parameters = list(child.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                child.eval()
        return self

    def _stage(self, stage: nn.Module, values: Tensor, domains: Tensor | None) -> Tensor:
        """Return the output of one stage of the trunk."""
        result: Tensor = stage(values)
        return result


class SbtknetStudent(Student):
    """SBTKNet's: a trunk shared by sketches and photos, and three linear heads on its feature.

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


class DsnStudent(Student):
    """DSN's and SAKE's: a CSE-ResNet, and linear layers from feature to code, code to logits.

    Args:
        backbone: `se-resnet50`, or a plain ResNet to add CSE modules to.
        dim: length of the code; 64 in DSN, 512 or 64 in SAKE.
        classes: number of training classes.

    Attributes:
        embedding: feature to code.
        identity: code to class logits.
        soft: code to ImageNet logits.
    """

    has_domain_input: ClassVar[bool] = True
    trunk: CseTrunk

    def __init__(self, backbone: str, dim: int, classes: int) -> None:
        super().__init__()
        self._backbone = backbone
        self.trunk, channels = build_cse_trunk(backbone)
        self.embedding = nn.Linear(channels, dim)
        self.identity = nn.Linear(dim, classes)
        self.soft = nn.Linear(dim, IMAGENET_CLASSES)

    @property
    def dim(self) -> int:
        """Length of a code."""
        return self.embedding.out_features

    def project(self, feature: Tensor) -> Tensor:
        """Return the codes `(N, D)` of pooled features."""
        codes: Tensor = self.embedding(feature)
        return codes

    def logits(self, feature: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits `(N, C)` and ImageNet logits `(N, 1000)` of the codes."""
        return self.identity(projected), self.soft(projected)

    def load_weights(self, tensors: dict[str, Tensor], path: Path) -> Classifier | None:
        """Load the trunk's ImageNet weights; return their classifier, if any.

        Raises:
            BadModel: the file does not fit the backbone.
        """
        return load_cse_trunk(self.trunk, tensors, path, self._backbone)

    def start_from(self, classifier: Classifier) -> None:
        """Initialise code and soft-label head by the classifier's best approximation of rank D.

        With `W = U S V^T`, the code's weight is `S_D V_D^T` and the head's is `U_D`. The
        classifier's bias is dropped; biases keep their random initialisation.

        Raises:
            BadConfig: the code is longer than the classifier's rank.
        """
        left, values, right = torch.linalg.svd(classifier.weight.double(), full_matrices=False)
        smallest = values[0] * max(classifier.weight.shape) * torch.finfo(torch.float32).eps
        rank = int((values > smallest).sum())
        if self.dim > rank:
            raise BadConfig(
                f"--dim {self.dim} is more than the ImageNet classifier's rank",
                f"at most {rank}",
                f"give --dim {min(rank, 512)}",
            )
        with torch.no_grad():
            self.embedding.weight.copy_(values[: self.dim, None] * right[: self.dim])
            self.soft.weight.copy_(left[:, : self.dim])

    def _stage(self, stage: nn.Module, values: Tensor, domains: Tensor | None) -> Tensor:
        assert domains is not None, "a student with a domain input needs the domains"
        return run_stage(stage, values, domains)


def build_student(config: TrainConfig, classes: int) -> Student:
    """Return the student that a run's configuration describes, with random weights.

    Args:
        config: method, backbone, dim and recipe.
        classes: number of training classes.

    Raises:
        BadConfig: unknown backbone.
    """
    if isinstance(config.recipe, SbtknetRecipe):
        return SbtknetStudent(config.backbone, config.dim, classes, config.recipe.attention)
    return DsnStudent(config.backbone, config.dim, classes)


def domains_of(kind: Kind, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the domains of `count` sketches (0) or photos (1), `(count,) float32`."""
    return torch.full((count,), DOMAINS[kind], device=device)


def batch_domains(sketches: int, photos: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the domains of a batch, sketches first, `(sketches + photos,) float32`."""
    return torch.cat([domains_of("sketch", sketches, device), domains_of("photo", photos, device)])


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
