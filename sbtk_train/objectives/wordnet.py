"""WordNet's nouns, read through NLTK from wherever a copy of WordNet 3.0 lies on this machine.

A copy is Debian's `wordnet-base` (/usr/share/wordnet), or `corpora/wordnet`, as a folder or a zip,
in a folder of NLTK_DATA. NLTK opens files below its own data path only, none that others may
write to, and asks for a table `lexnames` that Debian leaves out. So the three files about nouns
are copied into a private folder for as long as they are read, with that table and with empty
files for the rest.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_train.data.class_names import joined_key
from sbtk_train.students.teacher import cache_folder

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
#: Names whose first sense is not what is drawn, as SAKE's authors fixed them: name and sense.
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
    """A synset and what it is a kind of.

    Attributes:
        offset: the synset's number, of which `n02084071` is the written form.
        steps: for the synset (0) and all above it, the fewest steps up to them.
        kinds: those of them that it is a kind of, itself included; an instance, such as one
            certain tower, is near to a kind and not one.
    """

    offset: int
    steps: Mapping[int, int]
    kinds: frozenset[int]


class WordNet:
    """WordNet's nouns while `open_wordnet` holds them open."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def lineage(self, offset: int) -> Lineage | None:
        """Returns the synset's lineage; `None` if WordNet has no noun of that number."""
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
        """Returns the synset that a class name means: its first sense, or the one known as meant.

        Blanks, underscores and hyphens may each be any of them in WordNet, or nothing; what stands
        in brackets is left out.
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
            senses = self._reader.synsets(_joined(words, signs), pos="n")
            if senses:
                return int(senses[0].offset())
        senses = self._reader.synsets("".join(words), pos="n")
        return int(senses[0].offset()) if senses else None


@contextmanager
def open_wordnet() -> Iterator[WordNet]:
    """Yields the WordNet of this machine.

    Raises:
        MissingExtra: there is no NLTK or no WordNet; says what to install.
        BadData: the files cannot be read.
    """
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError
    except ImportError as problem:
        raise MissingExtra(
            f"the semantic matrix is read from WordNet through NLTK: {problem}",
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
        "there is no WordNet on this machine, which the semantic matrix is made from",
        f"{DEBIANS}, or corpora/wordnet in a folder that NLTK_DATA names",
        "apt-get install wordnet-base, or --semantic none to train without it",
    )


def _copy_nouns(place: Path, folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    try:
        contents = {name: _content(place, name) for name in _READ}
    except (OSError, KeyError, zipfile.BadZipFile) as problem:
        raise BadData(
            f"{place} is not a whole WordNet: {problem}",
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


def _joined(words: list[str], signs: tuple[str, ...]) -> str:
    return words[0] + "".join(sign + word for sign, word in zip(signs, words[1:], strict=True))
