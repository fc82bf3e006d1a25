"""The student of DSN and SAKE: a CSE-ResNet, a short code, and two heads on the code.

Wang et al. 2021 (haowang1992/DSN `src/ResnetModel.py`), Liu et al. 2019 (qliu24/SAKE). The code
has no batch norm and no activation; it is normalised to length 1 for search.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from sbtk_runtime.errors import BadConfig
from sbtk_train.config import SbtknetRecipe, TrainConfig
from sbtk_train.models.backbone import IMAGENET_CLASSES, Classifier
from sbtk_train.models.cse_resnet import CseTrunk, build_cse_trunk, load_cse_trunk, run_stage
from sbtk_train.models.sbtknet import SbtknetStudent
from sbtk_train.models.student import Student


class DsnStudent(Student):
    """A trunk with a domain input, and linear layers: feature to code, code to logits.

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
