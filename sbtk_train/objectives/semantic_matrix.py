"""How near each training class is to each ImageNet class, by WordNet (SAKE; DSN uses the same).

The entry of a class and an ImageNet class is 1 where one is a kind of the other or they are the
same, else their path similarity 1 / (1 + steps) where that is above 0.2, else 0
(qliu24/SAKE `src/sketchy_to_wnid.py`). A class's synset is what its photos' names begin with, as
in `n02131653_10374.jpg`; several are gone through in the order of the names, a later one writing
over what an earlier one found. Where photos are named otherwise it is what the class's name means.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import atomic_path, sha256_of_file, write_atomically
from sbtk_train.data import ImageSet
from sbtk_train.objectives.wordnet import Lineage, WordNet, open_wordnet
from sbtk_train.students.teacher import cache_folder, imagenet_synsets

Matrix = NDArray[np.float32]

#: Path similarity above 0.2 means fewer steps than this from one synset to the other.
_STEPS_TOO_MANY = 4
_PHOTO_OF_SYNSET = re.compile(r"n(\d{8})_\d+")
#: Changes with the rules, so that no matrix of other rules is taken from the cache.
_RULES = "semantic-matrix-1"


def semantic_matrix(training: ImageSet, said: Callable[[str], None]) -> tuple[Matrix, str]:
    """Returns the matrix `(C, 1000) float32` of the training classes, and its SHA-256.

    It is made once and kept in the cache folder as .npy, with its hash beside it, under what it
    depends on: the classes' names and the synsets that their photos name.

    Raises:
        MissingExtra: it has to be made, and there is no NLTK or no WordNet.
        BadData: the WordNet is not version 3.0 or is damaged.
    """
    named = photo_synsets(training)
    folder = cache_folder() / "semantic-matrix"
    path = folder / f"{_key(training.classes, named)}.npy"
    cached = _read(path, len(training.classes))
    if cached is not None:
        return cached
    said(f"making the semantic matrix of {len(training.classes)} classes from WordNet")
    with open_wordnet() as wordnet:
        imagenet = _imagenet_lineages(wordnet)
        classes = [
            class_lineages(name, synsets, wordnet)
            for name, synsets in zip(training.classes, named, strict=True)
        ]
    matrix = matrix_from_lineages(classes, imagenet)
    without = [name for name, row in zip(training.classes, matrix, strict=True) if not row.any()]
    if without:
        said(f"WordNet has nothing near among ImageNet's classes for {', '.join(without)}")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, matrix)
    digest = sha256_of_file(path)
    write_atomically(_hash_file(path), f"{digest}\n".encode())
    return matrix, digest


def matrix_from_lineages(
    classes: Sequence[Sequence[Lineage]], imagenet: Sequence[Lineage]
) -> Matrix:
    """Returns `(len(classes), len(imagenet)) float32` of classes that are several synsets each."""
    matrix = np.zeros((len(classes), len(imagenet)), dtype=np.float32)
    for row, lineages in zip(matrix, classes, strict=True):
        for lineage in lineages:
            for column, other in enumerate(imagenet):
                value = nearness(lineage, other)
                if value:
                    row[column] = value
    return matrix


def nearness(one: Lineage, other: Lineage) -> float:
    """Returns 1 where one is a kind of the other, else their path similarity if above 0.2, or 0."""
    if other.offset in one.kinds or one.offset in other.kinds:
        return 1.0
    common = one.steps.keys() & other.steps.keys()
    steps = min((one.steps[above] + other.steps[above] for above in common), default=None)
    return 1.0 / (1 + steps) if steps is not None and steps < _STEPS_TOO_MANY else 0.0


def photo_synsets(data: ImageSet) -> list[tuple[int, ...]]:
    """Returns for each class the synsets that its photos' names begin with, in their order."""
    found: list[dict[int, None]] = [{} for _ in data.classes]
    for path, label in zip(data.photos, data.photo_labels, strict=True):
        match = _PHOTO_OF_SYNSET.match(path.name)
        if match:
            found[label][int(match.group(1))] = None
    return [tuple(synsets) for synsets in found]


def class_lineages(name: str, named: Sequence[int], wordnet: WordNet) -> list[Lineage]:
    """Returns the lineages of a class: of the synsets that its photos name, or that it means."""
    meant = named or [offset for offset in [wordnet.meant_by(name)] if offset is not None]
    lineages = [wordnet.lineage(offset) for offset in meant]
    return [lineage for lineage in lineages if lineage is not None]


def _imagenet_lineages(wordnet: WordNet) -> list[Lineage]:
    lineages = []
    for offset in (int(wnid[1:]) for wnid in imagenet_synsets()):
        lineage = wordnet.lineage(offset)
        if lineage is None:
            raise BadData(
                f"this WordNet has no synset n{offset:08d}, which is an ImageNet class",
                "WordNet 3.0: synsets have other numbers in other versions",
                "apt-get install wordnet-base, or --semantic none",
            )
        lineages.append(lineage)
    return lineages


def _key(classes: Sequence[str], named: Sequence[tuple[int, ...]]) -> str:
    parts = [_RULES, *(f"{name}: {synsets}" for name, synsets in zip(classes, named, strict=True))]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read(path: Path, classes: int) -> tuple[Matrix, str] | None:
    """Returns the cached matrix and its hash; `None` when there is none or it is damaged."""
    try:
        expected = _hash_file(path).read_text("ascii").strip()
        if sha256_of_file(path) != expected:
            return None
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if matrix.shape != (classes, len(imagenet_synsets())) or matrix.dtype != np.float32:
        return None
    return matrix, expected
