"""The base class of all students: a pooled trunk with an embedding and two heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadModel
from sbtk_runtime.preprocess import DOMAINS, Kind
from sbtk_train.models.backbone import Classifier, load_trunk


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


def domains_of(kind: Kind, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the domains of `count` sketches (0) or photos (1), `(count,) float32`."""
    return torch.full((count,), DOMAINS[kind], device=device)


def batch_domains(sketches: int, photos: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the domains of a batch, sketches first, `(sketches + photos,) float32`."""
    return torch.cat([domains_of("sketch", sketches, device), domains_of("photo", photos, device)])
