"""The semantic matrix: similarity of training and ImageNet classes in WordNet (SAKE, DSN).

The entry of a class and an ImageNet class is 1 if they are equal or one is a kind of the other,
else their path similarity 1 / (1 + steps) if that is above 0.2, else 0 (qliu24/SAKE
`src/sketchy_to_wnid.py`). A class's synset is the prefix of its photos' names, as in
`n02131653_10374.jpg`. Several synsets are applied in the order of the names; later ones overwrite
earlier ones. If photos are named differently, the synset of the class's name is used.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_runtime.files import sha256_of_file, write_atomically
from sbtk_train.data.class_names import joined_key, read_imagenet_synsets
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.backbone import IMAGENET_CLASSES
from sbtk_train.models.teacher import (
    cache_folder,
    read_cached,
    write_cached,
)
from sbtk_train.progress import Notify

Matrix = NDArray[np.float32]

#: A path similarity above 0.2 means fewer steps between two synsets.
_STEPS_TOO_MANY = 4
_PHOTO_OF_SYNSET = re.compile(r"n(\d{8})_\d+")
#: Changes with the rules, so that no matrix of other rules is read from the cache.
_RULES = "semantic-matrix-1"


def build_semantic_matrix(training: ImageSet, notify: Notify) -> tuple[Matrix, str]:
    """Return the matrix `(C, 1000) float32` of the training classes, and its SHA-256.

    It is built once and cached as .npy, with its hash in another file, under a key of what it
    depends on: the classes' names and the synsets that their photos name.

    Args:
        training: the training images.
        notify: called with progress messages.

    Raises:
        MissingExtra: it must be built, and NLTK or WordNet is not installed.
        BadData: the WordNet is not version 3.0 or is damaged.
    """
    named = find_photo_synsets(training)
    path = cache_folder() / "semantic-matrix" / f"{_key(training.classes, named)}.npy"
    hash_file = path.with_name(f"{path.name}.sha256")
    if hash_file.is_file() and path.is_file():
        digest = sha256_of_file(path)
        cached = read_cached(path, (len(training.classes), IMAGENET_CLASSES))
        if cached is not None and hash_file.read_bytes().strip() == digest.encode():
            return cached, digest
    notify(f"making the semantic matrix of {len(training.classes)} classes from WordNet")
    with open_wordnet() as wordnet:
        imagenet = _imagenet_lineages(wordnet)
        classes = [
            find_class_lineages(name, synsets, wordnet)
            for name, synsets in zip(training.classes, named, strict=True)
        ]
    matrix = build_matrix(classes, imagenet)
    without = [name for name, row in zip(training.classes, matrix, strict=True) if not row.any()]
    if without:
        notify(f"WordNet has nothing near among ImageNet's classes for {', '.join(without)}")
    write_cached(path, matrix)
    digest = sha256_of_file(path)
    write_atomically(hash_file, f"{digest}\n".encode())
    return matrix, digest


def build_matrix(classes: Sequence[Sequence[Lineage]], imagenet: Sequence[Lineage]) -> Matrix:
    """Return the `(len(classes), len(imagenet)) float32` similarities of classes of synsets."""
    matrix = np.zeros((len(classes), len(imagenet)), dtype=np.float32)
    for row, lineages in zip(matrix, classes, strict=True):
        for lineage in lineages:
            for column, other in enumerate(imagenet):
                value = measure_nearness(lineage, other)
                if value:
                    row[column] = value
    return matrix


def measure_nearness(one: Lineage, other: Lineage) -> float:
    """Return 1 if one is a kind of the other, else their path similarity if above 0.2, else 0."""
    if other.offset in one.kinds or one.offset in other.kinds:
        return 1.0
    common = one.steps.keys() & other.steps.keys()
    steps = min((one.steps[above] + other.steps[above] for above in common), default=None)
    return 1.0 / (1 + steps) if steps is not None and steps < _STEPS_TOO_MANY else 0.0


def find_photo_synsets(data: ImageSet) -> list[tuple[int, ...]]:
    """Return for each class the synsets that its photos' names start with, in their order."""
    found: list[dict[int, None]] = [{} for _ in data.classes]
    for path, label in zip(data.photos, data.photo_labels, strict=True):
        match = _PHOTO_OF_SYNSET.match(path.name)
        if match:
            found[label][int(match.group(1))] = None
    return [tuple(synsets) for synsets in found]


def find_class_lineages(name: str, named: Sequence[int], wordnet: WordNet) -> list[Lineage]:
    """Return the lineages of the synsets named by a class's photos, or of its name's synset."""
    meant = named or [offset for offset in [wordnet.meant_by(name)] if offset is not None]
    lineages = [wordnet.lineage(offset) for offset in meant]
    return [lineage for lineage in lineages if lineage is not None]


def _imagenet_lineages(wordnet: WordNet) -> list[Lineage]:
    lineages = []
    for offset in (int(wnid[1:]) for wnid in read_imagenet_synsets()):
        lineage = wordnet.lineage(offset)
        if lineage is None:
            raise BadData(
                f"this WordNet has no synset n{offset:08d}, which is an ImageNet class",
                "WordNet 3.0; other versions have other synset numbers",
                "apt-get install wordnet-base, or --semantic none",
            )
        lineages.append(lineage)
    return lineages


def _key(classes: Sequence[str], named: Sequence[tuple[int, ...]]) -> str:
    parts = [_RULES, *(f"{name}: {synsets}" for name, synsets in zip(classes, named, strict=True))]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


DEBIANS = Path("/usr/share/wordnet")
_READ = ("data.noun", "index.noun", "noun.exc")
_LEFT_EMPTY = (
    *(f"{stem}.{part}" for stem in ("data", "index") for part in ("adj", "adv", "verb")),
    *("adj.exc", "adv.exc", "verb.exc", "index.sense", "cntlist.rev"),
)
#: WordNet's 45 lexicographer files in order, by part of speech (manual page lexnames(5WN)).
_LEXNAMES: tuple[tuple[str, int, str], ...] = (
    ("adj", 3, "all pert"),
    ("adv", 4, "all"),
    (
        "noun",
        1,
        "Tops act animal artifact attribute body cognition communication event feeling food group "
        "location motive object person phenomenon plant possession process quantity relation "
        "shape state substance time",
    ),
    (
        "verb",
        2,
        "body change cognition communication competition consumption contact creation emotion "
        "motion perception possession social stative weather",
    ),
    ("adj", 3, "ppl"),
)
#: Classes whose name's first sense is not what is drawn, as corrected by SAKE's authors.
_MEANT = {
    "present": ("present", 2),
    "teddybear": ("teddy", 1),
    "flyingsaucer": ("ufo", 1),
    "pottedplant": ("pot_plant", 1),
    "personwalking": ("person", 1),
    "personsitting": ("person", 1),
    "outlet": ("wall_socket", 1),
    "flowerwithstem": ("flower", 1),
    "humanskeleton": ("skeleton", 3),
    "jackolantern": ("jack-o'-lantern", 1),
}
_MOST_GAPS = 4


@dataclass(frozen=True)
class Lineage:
    """A synset and its hypernyms.

    Attributes:
        offset: the synset's number, 2084071 for `n02084071`.
        steps: the fewest steps up to each hypernym; 0 for the synset itself.
        kinds: the synset, and hypernyms that it is a kind of. An instance, such as a certain tower,
            is not a kind.
    """

    offset: int
    steps: Mapping[int, int]
    kinds: frozenset[int]


class WordNet:
    """WordNet's nouns while `open_wordnet` holds them open."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def lineage(self, offset: int) -> Lineage | None:
        """Return the synset's lineage; `None` if WordNet has no noun of that number."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            synset = self._reader.synset_from_pos_and_offset("n", offset)
        if synset is None:
            return None
        kinds = {synset.offset()}
        kinds.update(above.offset() for above in synset.closure(lambda one: one.hypernyms()))
        steps: dict[int, int] = {}
        for above, count in synset.hypernym_distances():
            steps[above.offset()] = min(count, steps.get(above.offset(), count))
        return Lineage(synset.offset(), steps, frozenset(kinds))

    def meant_by(self, class_name: str) -> int | None:
        """Return the synset of a class name: its first sense, or the sense in `_MEANT`, if any.

        Blanks, underscores and hyphens match each other, or nothing; text in brackets is ignored.
        """
        fixed = _MEANT.get(joined_key(class_name))
        if fixed is not None:
            senses = self._reader.synsets(fixed[0], pos="n")
            return int(senses[fixed[1] - 1].offset()) if len(senses) >= fixed[1] else None
        plain = re.sub(r"\([^)]*\)", " ", class_name).lower()
        words = [word for word in re.split(r"[\s_\-]+", plain) if word]
        gaps = len(words) - 1
        if not words or gaps > _MOST_GAPS:
            return None
        for signs in itertools.product("_-", repeat=gaps):
            senses = self._reader.synsets(_join_words(words, signs), pos="n")
            if senses:
                return int(senses[0].offset())
        senses = self._reader.synsets("".join(words), pos="n")
        return int(senses[0].offset()) if senses else None


@contextmanager
def open_wordnet() -> Iterator[WordNet]:
    """Yield the WordNet of this machine.

    Raises:
        MissingExtra: NLTK or WordNet is not installed; says what to install.
        BadData: the files cannot be read.
    """
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError
    except ImportError as problem:
        raise MissingExtra(
            f"the semantic matrix is built from WordNet by NLTK: {problem}",
            "NLTK",
            "pip install 'sbtk[train]', or --semantic none",
        ) from problem
    place = _find([Path(str(folder)) for folder in nltk.data.path])
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wordnet-", dir=cache_folder()) as temporary:
        root = Path(temporary).resolve()
        folder = root / "corpora" / "wordnet"
        _copy_nouns(place, folder)
        nltk.data.path.insert(0, str(root))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
            yield WordNet(reader)
        except (OSError, LookupError, ValueError, WordNetError) as problem:
            raise BadData(
                f"the WordNet in {place} cannot be read: {problem}",
                "the database files of WordNet 3.0",
                "install it again: apt-get install --reinstall wordnet-base",
            ) from problem
        finally:
            nltk.data.path.remove(str(root))


def _find(nltk_folders: list[Path]) -> Path:
    named = [Path(part) for part in os.environ.get("NLTK_DATA", "").split(os.pathsep) if part]
    for folder in (*named, *nltk_folders):
        corpora = folder / "corpora"
        if (corpora / "wordnet" / "data.noun").is_file():
            return corpora / "wordnet"
        if (corpora / "wordnet.zip").is_file():
            return corpora / "wordnet.zip"
    if (DEBIANS / "data.noun").is_file():
        return DEBIANS
    raise MissingExtra(
        "WordNet, which the semantic matrix is built from, is not installed",
        f"{DEBIANS}, or corpora/wordnet in a folder that NLTK_DATA names",
        "apt-get install wordnet-base, or --semantic none to train without it",
    )


def _copy_nouns(place: Path, folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    try:
        contents = {name: _content(place, name) for name in _READ}
    except (OSError, KeyError, zipfile.BadZipFile) as problem:
        raise BadData(
            f"{place} is not a complete WordNet: {problem}",
            ", ".join(_READ),
            "install it again: apt-get install --reinstall wordnet-base",
        ) from problem
    contents["lexnames"] = _lexnames().encode()
    contents |= dict.fromkeys(_LEFT_EMPTY, b"")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)


def _content(place: Path, name: str) -> bytes:
    if place.suffix != ".zip":
        return (place / name).read_bytes()
    with zipfile.ZipFile(place) as archive:
        return archive.read(f"wordnet/{name}")


def _lexnames() -> str:
    names = [(f"{pos}.{word}", code) for pos, code, words in _LEXNAMES for word in words.split()]
    return "".join(f"{number:02d}\t{name}\t{code}\n" for number, (name, code) in enumerate(names))


def _join_words(words: list[str], signs: tuple[str, ...]) -> str:
    return words[0] + "".join(sign + word for sign, word in zip(signs, words[1:], strict=True))
