"""The student of each method."""

from __future__ import annotations

from sbtk_train.config import TrainConfig
from sbtk_train.recipes import SbtknetRecipe
from sbtk_train.students.sbtknet import SbtknetStudent
from sbtk_train.students.student import Student


def build_student(config: TrainConfig, classes: int) -> Student:
    """Returns the student that a run's configuration describes, with random weights.

    Args:
        config: method, backbone, dim and recipe.
        classes: number of training classes.

    Raises:
        BadConfig: the method does not have such a student.
    """
    if isinstance(config.recipe, SbtknetRecipe):
        return SbtknetStudent(config.backbone, config.dim, classes, config.recipe.attention)
    from sbtk_train.students.dsn_student import DsnStudent

    return DsnStudent(config.backbone, config.dim, classes)
