"""Feature maps of frozen stages, computed once, so that small machines can train many runs.

If the stages before `freeze_until` are frozen, their output for an image never changes. It is
stored in float16 for some augmented copies of each image, and training samples among the copies. A
step then runs only the trained stages, but each image appears in only that many variants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbtk_runtime.files import atomic_path
from sbtk_runtime.preprocess import PREPROCESSING, Kind, Preprocessing
from sbtk_train.batches.augment import augment_photos, augment_sketches, normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.batches.sampler import Batch, BatchRng, BatchRngs, make_generator
from sbtk_train.compute import Compute
from sbtk_train.data.image_set import ImageSet, ImageSource, identify_source
from sbtk_train.models.student import Student, domains_of
from sbtk_train.progress import Notify

Maps = NDArray[np.float16]

_BATCH = 32


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
        self._compute = compute
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
                pixels = store.batch(rows).to(self._compute.device)
                domains = domains_of(kind, len(rows), self._compute.device)
                for copy in range(max(1, copies)):
                    if copies:
                        generator = make_generator(copy, start, int(kind == "photo"))
                        images = augmented(pixels, BatchRng(generator, len(rows)))
                    else:
                        images = normalise(pixels)
                    with torch.inference_mode(), self._compute.autocast():
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
            *(self._frozen_sha256, self.begin, self._compute.precision),
            *(kind, self._size_px, copies, preprocessing),
        )
        digest.update(f"{what}".encode())
        for path in paths:
            folder = path.parent.name if isinstance(path, Path) else ""
            record = f"{folder}/{identify_source(path)}\n"
            digest.update(record.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


class FeatureSource:
    """Samples a step's inputs among the cached copies of its images.

    Views of an image are different copies, if there are enough.
    """

    def __init__(
        self, data: ImageSet, maps: FeatureMaps, copies: int, views: int, compute: Compute
    ) -> None:
        self.begin = maps.begin
        self._sketches = maps.of(data.sketches, "sketch", copies)
        self._photos = maps.of(data.photos, "photo", copies)
        self._copies = max(1, copies)
        self._views = views
        self._device = compute.device

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
