"""Soft labels: an ImageNet classifier's output for each training class's photos (section 3.2).

One row for each class: the softmax of the mean logits over its training photos. They are made
once, from training photos only, and cached under a hash of everything they depend on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.files import atomic_path, sha256_of_file
from sbtk_runtime.preprocess import PREPROCESSING, SIZE_PX
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.config import Compute
from sbtk_train.data import ImageSet
from sbtk_train.models.backbone import IMAGENET_CLASSES, Classifier
from sbtk_train.models.cse_resnet import CseTrunk

_BATCH = 32
#: How often the making of soft labels is reported.
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
    notify: Callable[[str], None],
) -> tuple[Tensor, str]:
    """Return soft labels `(C, 1000) float32`, rows that sum to one, and their hash.

    Args:
        training: the training images; only their photos are looked at.
        trunk: the teacher's trunk, with ImageNet weights.
        classifier: the teacher's head.
        weights: the file that both came from; part of the hash.
        backbone: the trunk's layout; part of the hash.
        compute: where and how to run.
        stand_ins: WordNet ids of the ImageNet classes that a class without photos shows.
        workers: decoding threads.
        notify: called with progress messages.
    """
    key = _key(training, weights, backbone, stand_ins)
    path = cache_folder() / "soft-labels" / f"{key}.npy"
    cached = _read(path, len(training.classes))
    if cached is not None:
        return cached, key
    notify(f"making soft labels from {len(training.photos):,} training photos")
    sums = torch.zeros(len(training.classes), IMAGENET_CLASSES)
    labels = torch.from_numpy(training.photo_labels)
    store = PixelStore(training.photos, "photo", SIZE_PX, workers=workers, keep=False)
    trunk = trunk.to(compute.device).eval()
    weight, bias = classifier.weight.to(compute.device), classifier.bias.to(compute.device)
    started = reported = time.monotonic()
    with torch.inference_mode():
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
    store.close()
    counts = torch.bincount(labels, minlength=len(training.classes)).unsqueeze(1)
    result = functional.softmax(sums / counts.clamp(min=1), dim=1)
    for label in torch.nonzero(counts[:, 0] == 0).flatten().tolist():
        name = training.classes[label]
        result[label] = make_stand_in_label(classifier.weight, stand_ins[name], name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, result.numpy())
    return result, key


def make_stand_in_label(weight: Tensor, synsets: Sequence[str], name: str) -> Tensor:
    """Return the soft label `(1000,) float32` of a class that no photo shows.

    The softmax of the scaled cosines between each ImageNet class's weights and the mean of the
    named ones: high for these, and higher for their like than for the rest, as a photo's is.

    Args:
        weight: `(1000, F)`, the classifier's.
        synsets: WordNet ids of ImageNet classes.
        name: of the class, for messages.

    Raises:
        BadConfig: an id is not among ImageNet's thousand.
    """
    known = {wnid: row for row, wnid in enumerate(read_imagenet_synsets())}
    strange = [each for each in synsets if each not in known]
    if strange:
        raise BadConfig(
            f"the class map gives {name!r} the ImageNet class {strange[0]!r}",
            "a WordNet id of ImageNet-1k, such as n02701002",
        )
    units = functional.normalize(weight.float() - weight.float().mean(0), dim=1).cpu()
    prototype = functional.normalize(units[[known[each] for each in synsets]].mean(0), dim=0)
    return functional.softmax(_STAND_IN_SCALE * units @ prototype, dim=0)


def read_imagenet_synsets() -> list[str]:
    """Return the WordNet ids of ImageNet's thousand classes, in a classifier's order."""
    file = resources.files("sbtk_train.models").joinpath("imagenet_synsets.txt")
    return file.read_text("ascii").split()


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


def _read(path: Path, classes: int) -> Tensor | None:
    """Return the cached soft labels; `None` when there are none or they are damaged."""
    if not path.is_file():
        return None
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if values.shape != (classes, IMAGENET_CLASSES) or values.dtype != np.float32:
        return None
    if not np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
        return None
    return torch.from_numpy(values)


def require_classifier(classifier: Classifier | None, path: Path) -> Classifier:
    """Return the classifier, or raise `BadModel` if the weights file has no ImageNet head."""
    if classifier is None:
        raise BadModel(
            f"{path} has no 1000-class ImageNet classifier, which the knowledge loss needs",
            "weights with fc.weight (1000, F) and fc.bias",
            "give --teacher FILE, or --no-knowledge",
        )
    return classifier


class DsnTeacher:
    """A CSE-ResNet with ImageNet weights; its weights for the domain are zero.

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
        """Return ImageNet logits `(N, 1000) float32` of images, or of maps that enter `begin`.

        Maps are those of a student whose stages before `begin` are the teacher's own.
        """
        if not len(inputs):
            return self._bias.new_zeros(0, len(self._bias))
        with self._compute.autocast():
            feature = self._trunk(inputs, domains, begin).mean((2, 3))
        return functional.linear(feature.float(), self._weight, self._bias)
