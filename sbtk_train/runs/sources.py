"""The inputs of a step: decoded and augmented images, or cached feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sbtk_runtime.preprocess import Preprocessing
from sbtk_train.batches.pixels import PixelStore, fits_in_memory
from sbtk_train.batches.sampler import Batch, BatchRngs, BatchShard
from sbtk_train.compute import Compute
from sbtk_train.config import TrainConfig
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.student import Student
from sbtk_train.objectives.objective import Objective
from sbtk_train.progress import Listener
from sbtk_train.runs.evaluate import Embed, make_feature_map_embedder, make_pixel_embedder
from sbtk_train.runs.feature_maps import FeatureMaps, FeatureSource


class Source(Protocol):
    """Makes a student's inputs from batches of rows.

    Attributes:
        begin: the trunk's stage that takes the inputs; empty for images.
    """

    begin: str

    def load(self, batch: Batch, number: int) -> Any:
        """Load what a step of the epoch needs; called ahead, in another thread."""
        ...

    def inputs(self, loaded: Any, rng: BatchRngs) -> Tensor:
        """Return `(V * (S + P), ...)` inputs on the device, view after view, sketches first."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...


class PixelSource:
    """Decodes images, which the objective then augments."""

    begin = ""

    def __init__(
        self,
        data: ImageSet,
        objective: Objective,
        size_px: int,
        preprocessing: Preprocessing,
        compute: Compute,
        workers: int,
        *,
        processes: int = 1,
        variation: Sequence[int] = (),
        redrawn: float = 0.0,
    ) -> None:
        keep = fits_in_memory(data, size_px, processes)
        self._sketches = PixelStore(
            *(data.sketches, "sketch", size_px, preprocessing),
            workers=workers,
            keep=keep,
            redrawn=redrawn,
        )
        self._variation = tuple(variation)
        self._photos = PixelStore(
            data.photos, "photo", size_px, preprocessing, workers=workers, keep=keep
        )
        self._objective = objective
        self._device = compute.device

    def load(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Return `(S, 1, H, W)` and `(P, 3, H, W) uint8` pixels."""
        sketches = self._sketches.batch(batch.sketches, (*self._variation, number))
        return sketches, self._photos.batch(batch.photos)

    def inputs(self, loaded: tuple[Tensor, Tensor], rng: BatchRngs) -> Tensor:
        """Return the objective's views `(N, 3, h, w) float32` of the pixels."""
        sketches, photos = (pixels.to(self._device) for pixels in loaded)
        return self._objective.views_of(sketches, photos, rng)

    def close(self) -> None:
        """End the decoding threads."""
        self._sketches.close()
        self._photos.close()


def prefetch(
    shards: Iterator[BatchShard], skip: int, source: Source
) -> Iterator[tuple[int, BatchShard, Any]]:
    """Yield each shard's number, the shard and its loaded data, from batch `skip` on.

    The next shard is loaded in another thread.
    """
    wanted = [(number, shard) for number, shard in enumerate(shards) if number >= skip]
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(source.load, wanted[0][1].local, wanted[0][0]) if wanted else None
        for place, (number, shard) in enumerate(wanted):
            assert following is not None
            loaded = following.result()
            if place + 1 < len(wanted):
                coming, its_shard = wanted[place + 1]
                following = ahead.submit(source.load, its_shard.local, coming)
            yield number, shard, loaded


class SourceFactory:
    """Makes the input sources of a run.

    Args:
        config: the run's configuration, which may name a cache of feature maps.
        student: the student, with the stages before `config.freeze_until` frozen.
        training: the training images.
        objective: the method's objective.
        compute: where the student runs.
        processes: number of the run's processes on this machine.
        listener: called with progress messages.
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
        """Return the source of an epoch, with images of the given size."""
        config, compute, objective = self._config, self._compute, self._objective
        if config.feature_folder:
            copies = config.feature_variants if config.recipe.augment else 0
            maps = self._maps_at(size_px)
            return FeatureSource(self._training, maps, copies, objective.views, compute)
        return PixelSource(
            self._training,
            objective,
            size_px,
            config.recipe.preprocessing,
            compute,
            config.workers,
            processes=self._processes,
            variation=(config.seed, epoch),
            redrawn=getattr(config.recipe, "redrawn", 0.0),
        )

    def embed(self) -> Embed:
        """Return the function that embeds validation images of size `config.validation_px`."""
        if self._config.feature_folder:
            return make_feature_map_embedder(
                self._compute, self._maps_at(self._config.validation_px)
            )
        return make_pixel_embedder(
            self._config.recipe.preprocessing, self._compute, self._config.workers
        )

    def _maps_at(self, size_px: int) -> FeatureMaps:
        if size_px not in self._maps:
            config = self._config
            self._maps[size_px] = FeatureMaps(
                Path(config.feature_folder),
                self._student,
                config.freeze_until,
                size_px,
                config.recipe.preprocessing,
                self._compute,
                config.workers,
                self._listener,
            )
        return self._maps[size_px]
