"""Spellings of class names in data sets, and which of them mean the same class.

`hot-air balloon` has blanks in one data set, underscores in another and hyphens in a third. Names
are compared in Unicode's composed form (NFC), without case, and with blanks, underscores and
hyphens between words as equal. Nothing else is ignored: `c`, `c++` and `c#` are three classes, and
so are `1` and `-1`.

Published data sets have further spellings: TU-Berlin Ext's photo folders are run together and
partly misspelt (`hotairballoon`, `griaffe`; listed in Jiangtong-Li/ZS-SBIR:src/package/dataset and
reverted by AnjanDutta/sem-pcyc's download script), and `mouse (animal)` is `mouse` there. These
renames apply to published classes only. A name that fails to match would silently turn an unseen
class into a training class.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from importlib import resources
from pathlib import Path

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name

#: Smallest similarity, 0 to 1, of two names of which one is probably a typing error.
NEAR = 0.8
#: Smallest similarity of names to suggest for one that is not in the data.
_SUGGESTED = 0.6

_BETWEEN_WORDS = re.compile(r"(?<=[^\s_\-])[\s_\-]+(?=[^\s_\-])")
#: A key with an addition in brackets.
_WITH_ADDITION = re.compile(r"([^()]+?)_*\(([^()]+)\)")

#: Misspelt folders of TU-Berlin Ext's photos.
_MISSPELT = {
    "chandeler": "chandelier",
    "diamod": "diamond",
    "griaffe": "giraffe",
    "spacesshuttle": "spaceshuttle",
    "spidar": "spider",
    "tromobone": "trombone",
    "wristwatching": "wristwatch",
}


def read_imagenet_synsets() -> list[str]:
    """Return the WordNet ids of ImageNet's thousand classes, in a classifier's order."""
    file = resources.files("sbtk_train.data").joinpath("imagenet_synsets.txt")
    return file.read_text("ascii").split()


def class_key(name: str) -> str:
    """Return the key of a class name; names with equal keys mean the same class.

    NFC, case-folded, one underscore for blanks, hyphens and underscores between words.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return _BETWEEN_WORDS.sub("_", folded.strip())


def published_key(name: str) -> str:
    """Return the key of a published class for any of its documented spellings, else `class_key`."""
    key = joined_key(name)
    return key if key in _published_keys() else class_key(name)


def joined_key(name: str) -> str:
    """Return a name's key run together, without brackets, with known misspellings corrected."""
    key = _WITH_ADDITION.sub(r"\1\2", class_key(name))
    key = re.sub(r"(?<!^)_(?!$)", "", key)
    return _MISSPELT.get(key, key)


def plain_key(name: str) -> str:
    """Return `published_key` without an addition in brackets: `mouse (animal)` is `mouse`.

    Names of other classes keep their additions.
    """
    is_published = joined_key(name) in _published_keys()
    return joined_key(without_addition(name)) if is_published else class_key(name)


def without_addition(name: str) -> str:
    """Return the key of a name without the addition in brackets."""
    return _WITH_ADDITION.sub(r"\1", class_key(name))


class ClassNames:
    """A set of classes that finds names in other spellings.

    Args:
        names: the classes.
        renames: apply the documented renames of published data sets, too. Then names with and
            without an addition in brackets match (`mouse`, `mouse (animal)`), but not names with
            different additions.
    """

    def __init__(self, names: Iterable[str], *, renames: bool = True) -> None:
        names = tuple(names)
        self._renames = renames
        self._exact = {class_key(name): name for name in reversed(names)}
        self._by_key = {published_key(name): name for name in reversed(names)} if renames else {}
        self._by_plain = {plain_key(name): name for name in reversed(names)} if renames else {}

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> str | None:
        """Return the class that a name means, as it was given; `None` if it means none."""
        found = self._exact.get(class_key(name))
        if found is not None or not self._renames:
            return found
        key = published_key(name)
        for by_key, wanted in (
            (self._by_key, key),
            (self._by_key, plain_key(name)),
            (self._by_plain, key),
        ):
            if wanted in by_key:
                return by_key[wanted]
        return None


def visible_text(name: str) -> str:
    """Return a name without invisible characters, and with one form of each letter and dash.

    Wide letters become plain ones. Different classes may become equal: `x²` is `x2`.
    """
    composed = unicodedata.normalize("NFKC", name)
    kinds = ((char, unicodedata.category(char)) for char in composed)
    return "".join("-" if kind == "Pd" else char for char, kind in kinds if kind != "Cf")


def is_near(name: str, other: str) -> bool:
    """Return whether one of two names is probably the other with a typing error."""
    keys = joined_key(name), joined_key(other)
    return is_plural(name, other) or SequenceMatcher(None, *keys).ratio() >= NEAR


def is_plural(name: str, other: str) -> bool:
    """Return whether two names differ only by an ending: -s, -es, -ies for -y, -ves for -f(e).

    They may also differ by what `visible_text` removes.
    """
    keys = (joined_key(visible_text(each)) for each in (name, other))
    short, long = sorted(keys, key=len)
    irregular = (re.sub(r"y$", "ies", short), re.sub(r"fe?$", "ves", short))
    return long in (short, f"{short}s", f"{short}es", *irregular)


def suggest_names(name: str, classes: Iterable[str], most: int = 3) -> list[str]:
    """Return the classes with the names most similar to an unknown one, best first."""
    by_key: dict[str, str] = {}
    for each in classes:
        by_key.setdefault(joined_key(each), each)
    plain = {joined_key(without_addition(each)): key for key, each in by_key.items()}
    wanted, without = joined_key(name), joined_key(without_addition(name))
    keys = [plain[wanted]] if wanted in plain else []
    keys += [without] if without in by_key else []
    keys += get_close_matches(wanted, by_key, n=most, cutoff=_SUGGESTED)
    return [by_key[key] for key in dict.fromkeys(keys)][:most]


def read_names(file: Path, what: str) -> list[str]:
    """Return the lines of a text file of class names, stripped, without empty lines.

    Args:
        file: a text file in UTF-8, with or without a byte order mark; lines end in LF, CR or both.
        what: describes the file in errors.

    Raises:
        BadConfig: the file cannot be read, or is in another encoding; names it, and the command to
            convert the file.
    """
    try:
        data = file.read_bytes()
    except OSError as problem:
        reason = problem.strerror or problem
        raise BadConfig(
            f"{what} {printable_name(file)} cannot be read: {reason}",
            "a text file with one name a line",
        ) from problem
    encoding = _other_encoding(data)
    if encoding:
        shown = printable_name(file)
        raise BadConfig(
            f"{what} {shown} is not UTF-8 text; it looks like {encoding}",
            "UTF-8, one name a line",
            f"iconv -f {encoding} -t UTF-8 {shown} > utf8.txt, and name utf8.txt",
        )
    # Not splitlines(), which also splits at characters that a name may contain.
    lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    return [line.strip() for line in lines if line.strip()]


def _other_encoding(data: bytes) -> str:
    """Return the name of the probable encoding of the bytes; empty for UTF-8."""
    for mark, encoding in (
        (b"\xff\xfe\x00\x00", "UTF-32"),
        (b"\x00\x00\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if data.startswith(mark):
            return encoding
    if b"\x00" in data:
        return "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return ""


@functools.cache
def read_published_splits() -> dict[str, dict[str, Sequence[str]]]:
    """Return the published splits: by name, the lists `seen` and `unseen`."""
    text = resources.files("sbtk_train.data").joinpath("splits.json").read_text("utf-8")
    published: dict[str, dict[str, Sequence[str]]] = json.loads(text)
    return published


@functools.cache
def _published_keys() -> frozenset[str]:
    """Return the published classes run together, with and without additions in brackets."""
    names = [
        name
        for split in read_published_splits().values()
        for name in (*split["seen"], *split["unseen"])
    ]
    return frozenset(
        joined_key(spelling) for name in names for spelling in (name, without_addition(name))
    )
