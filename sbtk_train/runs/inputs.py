"""What a run's student is given, in training and validation: images, or kept feature maps."""

from __future__ import annotations

from pathlib import Path

from sbtk_train.config import TrainConfig
from sbtk_train.data import ImageSet
from sbtk_train.device import Compute
from sbtk_train.objectives.objective import Objective
from sbtk_train.progress import Listener
from sbtk_train.runs.evaluate import Embed, by_feature_maps, by_pixels
from sbtk_train.runs.feature_maps import FeatureMaps, FeatureSource
from sbtk_train.runs.sources import PixelSource, Source
from sbtk_train.students.student import Student


class Inputs:
    """Makes the sources of a run.

    Args:
        config: the run's; says whether the frozen stages' feature maps are kept, and where.
        student: with the stages before `config.freeze_until` frozen.
        training: the training images.
        objective: of the method.
        compute: where the student runs.
        processes: how many train together on this machine.
        listener: told what takes time.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        training: ImageSet,
        objective: Objective,
        compute: Compute,
        processes: int,
        listener: Listener,
    ) -> None:
        self._config = config
        self._student = student
        self._training = training
        self._objective = objective
        self._compute = compute
        self._processes = processes
        self._listener = listener
        self._maps: dict[int, FeatureMaps] = {}

    def source(self, size_px: int, epoch: int) -> Source:
        """Returns what feeds an epoch whose images have that side."""
        config, compute, objective = self._config, self._compute, self._objective
        if config.feature_folder:
            copies = config.feature_variants if config.recipe.augment else 0
            maps = self._maps_at(size_px)
            return FeatureSource(self._training, maps, copies, objective.views, compute)
        return PixelSource(
            self._training,
            objective,
            size_px,
            compute,
            config.workers,
            processes=self._processes,
            variation=(config.seed, epoch),
            redrawn=getattr(config.recipe, "redrawn", 0.0),
        )

    def embed(self) -> Embed:
        """Returns what embeds validation images, of the side `config.validation_px`."""
        if self._config.feature_folder:
            return by_feature_maps(self._compute, self._maps_at(self._config.validation_px))
        return by_pixels(self._compute, self._config.workers)

    def _maps_at(self, size_px: int) -> FeatureMaps:
        if size_px not in self._maps:
            config = self._config
            self._maps[size_px] = FeatureMaps(
                Path(config.feature_folder),
                self._student,
                config.freeze_until,
                size_px,
                self._compute,
                config.workers,
                self._listener,
            )
        return self._maps[size_px]
