"""Class names as data sets write them, and when two of them mean one class.

`hot-air balloon` has blanks in one data set, underscores in the next and hyphens in a third; the
photo folders of TU-Berlin Ext are run together and partly misspelt (`hotairballoon`, `griaffe`;
listed in Jiangtong-Li/ZS-SBIR:src/package/dataset and undone by AnjanDutta/sem-pcyc's download
script). A name that fails to match would turn an unseen class into a training class in silence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher

#: How alike two names must be, 0 to 1, for one to be taken for a slip of the other.
NEAR = 0.8

#: Folders of TU-Berlin Ext's photos that no rule leads back to their class.
_MISSPELT = {
    "chandeler": "chandelier",
    "diamod": "diamond",
    "griaffe": "giraffe",
    "spacesshuttle": "spaceshuttle",
    "spidar": "spider",
    "tromobone": "trombone",
    "wristwatching": "wristwatch",
}


def class_key(name: str) -> str:
    """Returns the name in small letters, with one underscore for blanks, hyphens, underscores."""
    return re.sub(r"[\s_\-]+", "_", name.strip().lower())


def match_key(name: str) -> str:
    """Returns what names of one class have in common: letters and digits, known slips mended."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    key = "".join(character for character in folded if character.isalnum())
    # A name of signs alone is its own key, so that two of them are not one class.
    return _MISSPELT.get(key, key) or folded


def plain_key(name: str) -> str:
    """Returns the key without what is added in brackets: `mouse (animal)` has that of `mouse`."""
    without = re.sub(r"\([^)]*\)", "", name)
    return match_key(without) if without.strip(" _-") else match_key(name)


class ClassNames:
    """Some classes, to ask whether a name means one of them.

    A name with an addition in brackets and one without it match (`mouse`, `mouse (animal)`); two
    with different additions do not.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        self._by_key = {match_key(name): name for name in reversed(names)}
        self._by_plain_key = {plain_key(name): name for name in reversed(names)}

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> str | None:
        """Returns the class that the name means, as it was given; `None` if it is none of them."""
        key = match_key(name)
        return (
            self._by_key.get(key)
            or self._by_key.get(plain_key(name))
            or self._by_plain_key.get(key)
        )


def is_near(name: str, other: str) -> bool:
    """Says whether two names look like one class, written by somebody who slipped."""
    keys = match_key(name), match_key(other)
    return is_plural(name, other) or SequenceMatcher(None, *keys).ratio() >= NEAR


def is_plural(name: str, other: str) -> bool:
    """Says whether two names differ by no more than an ending -s or -es."""
    short, long = sorted((match_key(name), match_key(other)), key=len)
    return long in (short, f"{short}s", f"{short}es")
