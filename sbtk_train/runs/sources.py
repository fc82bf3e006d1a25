"""The student's inputs: decoded and augmented images, or feature maps of frozen stages.

If the stages before `freeze_until` are frozen, their output for an image never changes. It is
computed once and stored in float16 for some augmented copies of each image, and training samples
among the copies. A step then runs only the trained stages, so that small machines can train many
runs, but each image appears in only that many variants.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbtk_runtime.files import atomic_path
from sbtk_runtime.preprocess import PREPROCESSING, SIZE_PX, Kind, Preprocessing
from sbtk_train.batches.augment import augment_photos, augment_sketches, normalise
from sbtk_train.batches.pixels import PixelStore, fits_in_memory
from sbtk_train.batches.sampler import (
    Batch,
    BatchRng,
    BatchRngs,
    BatchShard,
    make_generator,
)
from sbtk_train.compute import Compute
from sbtk_train.config import TrainConfig
from sbtk_train.data.image_set import ImageSet, ImageSource, Rows, identify_source
from sbtk_train.models.student import Student, domains_of
from sbtk_train.objectives.objective import Objective
from sbtk_train.progress import Listener, Notify

Maps = NDArray[np.float16]

_BATCH = 32


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


class FeatureSource:
    """Samples a step's inputs among the cached copies of its images.

    Views of an image are different copies, if there are enough.
    """

    def __init__(self, data: ImageSet, maps: FeatureMaps, copies: int, views: int) -> None:
        self.begin = maps.begin
        self._sketches = maps.of(data.sketches, "sketch", copies)
        self._photos = maps.of(data.photos, "photo", copies)
        self._copies = max(1, copies)
        self._views = views
        self._device = maps.compute.device

    def load(self, batch: Batch, number: int) -> Batch:
        """Return the batch; `inputs` chooses the copies to read."""
        return batch

    def inputs(self, loaded: Batch, rng: BatchRngs) -> Tensor:
        """Return `(V * (S + P), C, h, w) float32` feature maps."""
        numbers = [kind.uniform(self._copies) for kind in (rng.sketches, rng.photos)]
        order = torch.cat(numbers).argsort(dim=1).numpy()
        views = []
        for view in range(self._views):
            chosen = order[:, view % self._copies]
            sketches = self._sketches[loaded.sketches, chosen[: len(loaded.sketches)]]
            photos = self._photos[loaded.photos, chosen[len(loaded.sketches) :]]
            views += [sketches, photos]
        maps = torch.from_numpy(np.concatenate(views)).to(self._device)
        return maps.float().contiguous(memory_format=torch.channels_last)

    def close(self) -> None:
        """Close the files."""
        del self._sketches, self._photos


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
        config, objective = self._config, self._objective
        if config.feature_folder:
            copies = config.feature_variants if config.recipe.augment else 0
            maps = self._maps_at(size_px)
            return FeatureSource(self._training, maps, copies, objective.views)
        return PixelSource(
            self._training,
            objective,
            size_px,
            config.recipe.preprocessing,
            self._compute,
            config.workers,
            processes=self._processes,
            variation=(config.seed, epoch),
            redrawn=getattr(config.recipe, "redrawn", 0.0),
        )

    def embed(self) -> Embed:
        """Return the function that embeds validation images of size `config.validation_px`."""
        if self._config.feature_folder:
            return self._maps_at(self._config.validation_px).embed
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


@dataclass(frozen=True)
class Embedded:
    """A student's outputs for N images.

    Attributes:
        rows: `(N, D) float32` unit rows.
        predicted: `(N,) int64`, the training class with the highest logit.
    """

    rows: NDArray[np.float32]
    predicted: Rows


#: Embeds image files of one kind, in their order.
Embed = Callable[[Student, Sequence[ImageSource], Kind], Embedded]


def make_pixel_embedder(preprocessing: Preprocessing, compute: Compute, workers: int) -> Embed:
    """Return a function that embeds image files at 224 px, the runtime's size."""

    def embed(student: Student, paths: Sequence[ImageSource], kind: Kind) -> Embedded:
        pixels = PixelStore(paths, kind, SIZE_PX, preprocessing, workers=workers, keep=False)
        with contextlib.closing(pixels) as store:

            def inputs(rows: range) -> Tensor:
                return normalise(store.batch(rows).to(compute.device))

            return _embedded(student, len(paths), kind, compute, inputs, "")

    return embed


class FeatureMaps:
    """Feature maps of images at one stage, cached in a folder.

    Args:
        folder: folder of `.npy` files, one for each set of images; created if missing.
        student: the student, with the stages before `begin` frozen.
        begin: the stage that takes the maps as input.
        size_px: side of the images.
        preprocessing: of the student.
        compute: where to run the frozen stages, and in which precision, which identifies the maps.
        workers: number of decoding threads.
        notify: called with progress messages.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        begin: str,
        size_px: int,
        preprocessing: Preprocessing,
        compute: Compute,
        workers: int,
        notify: Notify,
    ) -> None:
        self._folder = folder
        self._student = student
        self.begin = begin
        self._size_px = size_px
        self._preprocessing = preprocessing
        self.compute = compute
        self._workers = workers
        self._notify = notify
        self._frozen_sha256 = _sha256_of_frozen(student, begin)

    def of(self, paths: Sequence[ImageSource], kind: Kind, copies: int = 0) -> Maps:
        """Return `(N, max(1, copies), C, h, w) float16`, memory-mapped; computed if missing.

        Args:
            paths: the images.
            kind: sketches or photos.
            copies: number of augmented copies of each; 0 for the image itself.
        """
        path = self._folder / f"{self._key(paths, kind, copies)}.npy"
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._notify(
                f"running the frozen stages before {self.begin} on {len(paths):,} "
                f"{'sketches' if kind == 'sketch' else 'photos'} x {max(1, copies)}"
            )
            with atomic_path(path) as temporary:
                self._make(temporary, paths, kind, copies)
        maps: Maps = np.load(path, mmap_mode="r")
        return maps

    def embed(self, student: Student, paths: Sequence[ImageSource], kind: Kind) -> Embedded:
        """Embed images through their maps; an `Embed`."""
        kept = self.of(paths, kind)

        def inputs(rows: range) -> Tensor:
            values = torch.from_numpy(np.array(kept[rows.start : rows.stop, 0]))
            values = values.to(self.compute.device).float()
            return values.contiguous(memory_format=torch.channels_last)

        return _embedded(student, len(paths), kind, self.compute, inputs, self.begin)

    def _make(self, path: Path, paths: Sequence[ImageSource], kind: Kind, copies: int) -> None:
        augmented = augment_sketches if kind == "sketch" else augment_photos
        store = PixelStore(
            paths, kind, self._size_px, self._preprocessing, workers=self._workers, keep=False
        )
        was_training = self._student.training
        self._student.eval()
        maps: np.memmap[Any, np.dtype[np.float16]] | None = None
        try:
            for start in range(0, len(paths), _BATCH):
                rows = range(start, min(start + _BATCH, len(paths)))
                pixels = store.batch(rows).to(self.compute.device)
                domains = domains_of(kind, len(rows), self.compute.device)
                for copy in range(max(1, copies)):
                    if copies:
                        generator = make_generator(copy, start, int(kind == "photo"))
                        images = augmented(pixels, BatchRng(generator, len(rows)))
                    else:
                        images = normalise(pixels)
                    with torch.inference_mode(), self.compute.autocast():
                        values = self._student.feature_map(images, domains, end=self.begin)
                    if maps is None:
                        shape = (len(paths), max(1, copies), *values.shape[1:])
                        maps = np.lib.format.open_memmap(
                            path, mode="w+", dtype=np.float16, shape=shape
                        )
                    maps[start : rows.stop, copy] = values.half().cpu().numpy()
        finally:
            store.close()
            self._student.train(was_training)
        assert maps is not None
        maps.flush()

    def _key(self, paths: Sequence[ImageSource], kind: Kind, copies: int) -> str:
        digest = hashlib.sha256()
        # Photos are always prepared alike, so that runs which differ in sketches share their maps.
        preprocessing = self._preprocessing.name if kind == "sketch" else PREPROCESSING
        what = (
            *(self._frozen_sha256, self.begin, self.compute.precision),
            *(kind, self._size_px, copies, preprocessing),
        )
        digest.update(f"{what}".encode())
        for path in paths:
            folder = path.parent.name if isinstance(path, Path) else ""
            record = f"{folder}/{identify_source(path)}\n"
            digest.update(record.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


def _embedded(
    student: Student,
    count: int,
    kind: Kind,
    compute: Compute,
    inputs: Callable[[range], Tensor],
    begin: str,
) -> Embedded:
    was_training = student.training
    student.eval()
    rows, predicted = [], []
    with torch.inference_mode():
        for start in range(0, count, _BATCH):
            part = range(start, min(start + _BATCH, count))
            domains = domains_of(kind, len(part), compute.device)
            with compute.autocast():
                output = student(inputs(part), domains, begin)
            rows.append(output.embedding.cpu().numpy())
            predicted.append(output.class_logits.argmax(1).cpu().numpy())
    student.train(was_training)
    return Embedded(np.concatenate(rows), np.concatenate(predicted))


def _sha256_of_frozen(student: Student, begin: str) -> str:
    digest = hashlib.sha256(type(student).__name__.encode())
    for name, stage in student.trunk.named_children():
        if name == begin:
            break
        # Layouts of one network have equal weights, and differ in strides and padding.
        for module in stage.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                digest.update(f"{module}".encode())
        for key, value in stage.state_dict().items():
            digest.update(f"{name}.{key}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
