"""Soft labels: an ImageNet classifier's output for each training class's photos (section 3.2).

A class's soft label is the softmax of the mean logits over its training photos. Soft labels are
computed once and cached under a hash of everything they depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path, sha256_of_file
from sbtk_runtime.preprocess import CROPPED, PREPROCESSING, SIZE_PX
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.compute import Compute
from sbtk_train.data.class_names import read_imagenet_synsets
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.backbone import IMAGENET_CLASSES, Classifier, CseTrunk
from sbtk_train.progress import Notify

_BATCH = 32
#: Interval of progress messages while soft labels are computed.
PROGRESS_SECONDS = 10.0
#: Makes stand-ins about as certain as soft labels of photos.
_STAND_IN_SCALE = 10.0


def make_soft_labels(
    training: ImageSet,
    trunk: nn.Module,
    classifier: Classifier,
    weights: Path,
    backbone: str,
    compute: Compute,
    *,
    stand_ins: Mapping[str, Sequence[str]],
    workers: int,
    notify: Notify,
) -> tuple[Tensor, str]:
    """Return soft labels `(C, 1000) float32`, rows that sum to one, and their hash.

    Args:
        training: the training images, of which the photos are used.
        trunk: the teacher's trunk, with ImageNet weights.
        classifier: the teacher's head.
        weights: the file of both; part of the hash.
        backbone: the trunk's layout; part of the hash.
        compute: where and how to run.
        stand_ins: WordNet ids of ImageNet classes, by the class without photos that they represent.
        workers: number of decoding threads.
        notify: called with progress messages.
    """
    key = _key(training, weights, backbone, stand_ins)
    path = cache_folder() / "soft-labels" / f"{key}.npy"
    cached = read_cached(path, (len(training.classes), IMAGENET_CLASSES))
    if cached is not None and np.allclose(cached.sum(axis=1), 1.0, atol=1e-3):
        return torch.from_numpy(cached), key
    notify(f"making soft labels from {len(training.photos):,} training photos")
    sums = torch.zeros(len(training.classes), IMAGENET_CLASSES)
    labels = torch.from_numpy(training.photo_labels)
    photo_store = PixelStore(
        training.photos, "photo", SIZE_PX, CROPPED, workers=workers, keep=False
    )
    trunk = trunk.to(compute.device).eval()
    weight, bias = classifier.weight.to(compute.device), classifier.bias.to(compute.device)
    started = reported = time.monotonic()
    with contextlib.closing(photo_store) as store, torch.inference_mode():
        for start in range(0, len(training.photos), _BATCH):
            if start and (now := time.monotonic()) - reported >= PROGRESS_SECONDS:
                reported = now
                count = len(training.photos)
                left_s = (now - started) / start * (count - start)
                notify(f"soft labels: {start:,} of {count:,} photos, {left_s:.0f} s left")
            rows = range(start, min(start + _BATCH, len(training.photos)))
            photos = normalise(store.batch(rows).to(compute.device))
            with compute.autocast():
                feature = trunk(photos).mean((2, 3))
            logits = functional.linear(feature.float(), weight, bias)
            sums.index_add_(0, labels[start : start + len(rows)], logits.cpu())
    counts = torch.bincount(labels, minlength=len(training.classes)).unsqueeze(1)
    result = functional.softmax(sums / counts.clamp(min=1), dim=1)
    for label in torch.nonzero(counts[:, 0] == 0).flatten().tolist():
        result[label] = make_stand_in_label(classifier.weight, stand_ins[training.classes[label]])
    write_cached(path, result.numpy())
    return result, key


def make_stand_in_label(weight: Tensor, synsets: Sequence[str]) -> Tensor:
    """Return the soft label `(1000,) float32` of a class without photos.

    It is the softmax of the scaled cosines between each ImageNet class's weights and the mean of
    the named classes' weights. Like a photo's soft label, it is high for the named classes, and
    higher for similar classes than for others.

    Args:
        weight: `(1000, F)`, the classifier's weights.
        synsets: WordNet ids of ImageNet classes.
    """
    known = {wnid: row for row, wnid in enumerate(read_imagenet_synsets())}
    units = functional.normalize(weight.float() - weight.float().mean(0), dim=1).cpu()
    prototype = functional.normalize(units[[known[each] for each in synsets]].mean(0), dim=0)
    return functional.softmax(_STAND_IN_SCALE * units @ prototype, dim=0)


def cache_folder() -> Path:
    """Return sbtk's cache folder, `$XDG_CACHE_HOME/sbtk` or `~/.cache/sbtk`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sbtk"


def _key(
    training: ImageSet, weights: Path, backbone: str, stand_ins: Mapping[str, Sequence[str]]
) -> str:
    parts = [sha256_of_file(weights), backbone, PREPROCESSING, training.photos_sha256]
    if training.further_classes:
        parts += [f"{name}: {' '.join(stand_ins.get(name, ()))}" for name in training.classes]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_cached(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Return a cached array of that shape; `None` if it is missing or damaged."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == shape and values.dtype == np.float32 else None


def write_cached(path: Path, values: NDArray[np.float32]) -> None:
    """Write an array `(...)` as .npy, atomically; its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def require_classifier(
    classifier: Classifier | None, path: Path, purpose: str, option: str
) -> Classifier:
    """Return the classifier, or raise `BadModel` if the weights file has no ImageNet head.

    Args:
        classifier: the head; `None` if the file has none.
        path: the weights file.
        purpose: what needs the head.
        option: the option that does without.
    """
    if classifier is None:
        raise BadModel(
            f"{path} has no 1000-class ImageNet classifier, which {purpose}",
            "weights with fc.weight (1000, F) and fc.bias",
            f"give --teacher FILE, or {option}",
        )
    return classifier


class DsnTeacher:
    """A CSE-ResNet with ImageNet weights, whose weights for the domain are zero.

    Args:
        trunk: with ImageNet weights; it is frozen here.
        classifier: the ImageNet head of the same weights.
        compute: where and how to run.
    """

    def __init__(self, trunk: CseTrunk, classifier: Classifier, compute: Compute) -> None:
        trunk = trunk.requires_grad_(False).eval()
        self._trunk = trunk.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._weight = classifier.weight.to(compute.device)
        self._bias = classifier.bias.to(compute.device)
        self._compute = compute

    @torch.no_grad()
    def logits(self, inputs: Tensor, domains: Tensor, begin: str = "") -> Tensor:
        """Return ImageNet logits `(N, 1000) float32` of images, or of feature maps at `begin`.

        Feature maps are from a student whose stages before `begin` equal the teacher's.
        """
        if not len(inputs):
            return self._bias.new_zeros(0, len(self._bias))
        with self._compute.autocast():
            feature = self._trunk(inputs, domains, begin).mean((2, 3))
        return functional.linear(feature.float(), self._weight, self._bias)
