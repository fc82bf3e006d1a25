"""From a configuration to DSN's or SAKE's objective: the teacher and the semantic matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_train.config import TrainConfig
from sbtk_train.data import ImageSet
from sbtk_train.device import Compute
from sbtk_train.objectives.dsn_objective import Distillation, DsnObjective
from sbtk_train.objectives.semantic_matrix import semantic_matrix
from sbtk_train.recipes import DsnRecipe
from sbtk_train.students.backbone import IMAGENET_CLASSES, read_weights
from sbtk_train.students.cse_resnet import (
    SE_RESNET50,
    build_cse_trunk,
    has_cadenes_names,
    load_cse_trunk,
)
from sbtk_train.students.dsn_student import DsnStudent
from sbtk_train.students.dsn_teacher import DsnTeacher
from sbtk_train.students.student import Student

Said = Callable[[str], None]


def dsn_objective(
    config: TrainConfig, training: ImageSet, student: Student, compute: Compute, said: Said
) -> tuple[DsnObjective, str]:
    """Returns the objective, and the SHA-256 of its semantic matrix (empty without one).

    Raises:
        BadConfig: there is nothing to distil from, or it does not go with kept feature maps.
        BadModel: the teacher's weights do not fit or have no ImageNet head.
        MissingExtra: the semantic matrix has to be made, and there is no WordNet.
    """
    recipe = config.recipe
    assert isinstance(recipe, DsnRecipe)
    assert isinstance(student, DsnStudent)
    distillation, digest = None, ""
    if recipe.kd_weight:
        teacher = _teacher(config, compute)
        semantic, digest = _semantic(recipe, training, said)
        distillation = Distillation(teacher, semantic.to(compute.device))
    if config.feature_folder and recipe.augment:
        said(
            "kept feature maps are of copies that are changed as SBTKNet's images are: "
            f"not {config.method}'s moves and views"
        )
    features = student.embedding.in_features
    objective = DsnObjective(recipe, training, config.seed, features, compute.device, distillation)
    return objective, digest


def _teacher(config: TrainConfig, compute: Compute) -> DsnTeacher:
    if not (config.weights or config.teacher):
        raise BadConfig(
            f"{config.method} distils from an ImageNet classifier, and there are no weights",
            "--weights FILE or --teacher FILE",
            "or --kd-weight 0",
        )
    if config.feature_folder and config.teacher not in ("", config.weights):
        raise BadConfig(
            f"feature maps of {config.weights or 'a student without weights'} are kept, "
            f"and the teacher is {config.teacher}",
            "one file for both: the teacher goes on from the student's frozen stages",
            "leave out --teacher, or do not keep feature maps",
        )
    path = Path(config.teacher or config.weights)
    tensors, layout = read_weights(path)
    backbone = SE_RESNET50 if has_cadenes_names(tensors) else layout or config.backbone
    trunk, _ = build_cse_trunk(backbone)
    classifier = load_cse_trunk(trunk, tensors, path, backbone)
    if classifier is None:
        raise BadModel(
            f"{path} has no 1000-class ImageNet classifier, which {config.method} distils from",
            "weights with fc.weight (1000, F) and fc.bias",
            "give --teacher FILE, or --kd-weight 0",
        )
    return DsnTeacher(trunk, classifier, compute)


def _semantic(recipe: DsnRecipe, training: ImageSet, said: Said) -> tuple[Tensor, str]:
    if recipe.semantic == "none":
        return torch.zeros(len(training.classes), IMAGENET_CLASSES), ""
    matrix, digest = semantic_matrix(training, said)
    return torch.from_numpy(matrix), digest
