"""Zero-shot splits: which classes are seen in training and which are kept unseen."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.names import printable_name
from sbtk_train.data.class_names import (
    ClassNames,
    class_key,
    joined_key,
    published_key,
    published_splits,
    read_names,
)

__all__ = ["Split", "class_key", "open_split", "split_names"]

_RANDOM = re.compile(r"random:(\d{1,6}):(\d{1,9})")


@dataclass(frozen=True)
class Split:
    """A named list of unseen classes; every other class of a data set may be trained on.

    Attributes:
        name: as in `splits.json`, `random:N:SEED`, or the file's name.
        unseen: class names, sorted.
        seen: class names that the list's authors trained on, sorted; empty where they name none.
        is_file: the list is a user's file. Its names are compared as they are written, without
            the renames of published data sets, and all of them should be in the data.
    """

    name: str
    unseen: tuple[str, ...]
    seen: tuple[str, ...] = ()
    is_file: bool = field(default=False, compare=False)

    @property
    def sha256(self) -> str:
        """The hash of the canonical unseen class names; equal for equal splits."""
        keys = sorted(class_key(name) for name in self.unseen)
        # Names of folders may hold bytes that are not UTF-8.
        return hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()

    def is_unseen(self, class_name: str) -> bool:
        """Says whether the class is unseen, whichever way its name is written."""
        return class_name in self._unseen_names

    def seen_among(self, class_names: Iterable[str]) -> list[str]:
        """Returns the class names that are not unseen, in their order."""
        return [name for name in class_names if not self.is_unseen(name)]

    def is_of(self, unseen: Iterable[str]) -> bool:
        """Says whether these are the split's unseen classes: all of them and no others."""
        key_of = class_key if self.is_file else published_key
        return {key_of(name) for name in unseen} == {key_of(name) for name in self.unseen}

    @cached_property
    def _unseen_names(self) -> ClassNames:
        return ClassNames(self.unseen, renames=not self.is_file)


def split_names() -> list[str]:
    """Returns the names of the published splits that sbtk knows."""
    return sorted(published_splits())


def open_split(name_or_file: str, classes: Sequence[str] | None = None) -> Split:
    """Returns a published split, one drawn at random, or that of a file.

    Args:
        name_or_file: a published split's name; `random:N:SEED` for N classes drawn from the data's
            (the first N of MT19937's permutation of the sorted names); or a file with one unseen
            class a line (SAKE's `cname_cid_zero.txt`, with its numbers, too).
        classes: the class names of the data; random splits need them, and a file's numbers are
            part of its names if the data's names have them.

    Raises:
        BadConfig: none of these; a file that names no class or is not UTF-8; or too many classes
            to draw.
    """
    published = published_splits()
    by_key = {name.casefold(): name for name in published}
    if name := by_key.get(name_or_file.casefold()):
        entry = published[name]
        return Split(name, tuple(sorted(entry["unseen"])), tuple(sorted(entry["seen"])))
    if name_or_file.startswith("random:") and not Path(name_or_file).exists():
        return _random_split(name_or_file, classes)
    path = Path(name_or_file)
    if not path.exists():
        raise BadConfig(
            f"no split named {name_or_file!r}, and no file of that name",
            f"one of {', '.join(split_names())}, random:N:SEED, or a text file with one unseen "
            "class a line",
        )
    lines = _without_ids(read_names(path, "the split file"), path, classes)
    unseen = {class_key(name): name for name in reversed(lines)}
    if not unseen:
        raise BadConfig(f"{printable_name(path)} names no class", "one unseen class a line")
    return Split(path.name, tuple(sorted(unseen.values())), is_file=True)


def _random_split(name: str, classes: Sequence[str] | None) -> Split:
    match = _RANDOM.fullmatch(name)
    if match is None:
        raise BadConfig(f"--split {name}", "random:N:SEED, such as random:25:0")
    count, seed = int(match[1]), int(match[2])
    if classes is None:
        raise BadConfig(
            f"the split {name} is drawn from the classes of the data, and there are no data here",
            f"one of {', '.join(split_names())}, or a file",
        )
    if not 0 < count < len(classes):
        raise BadConfig(
            f"--split {name} of data with {len(classes)} classes",
            f"1 to {len(classes) - 1} unseen classes",
        )
    ordered = sorted(classes, key=_drawing_order)
    # This generator's stream is frozen for ever (NEP 19), so the name says which classes they are.
    drawn = np.random.RandomState(seed).permutation(len(ordered))[:count]
    unseen = {ordered[row] for row in drawn.tolist()}
    seen = tuple(sorted(set(classes) - unseen))
    return Split(name, tuple(sorted(unseen)), seen)


def _drawing_order(name: str) -> tuple[str, str]:
    """Returns what classes are sorted by before some are drawn; it must never change."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    letters = "".join(character for character in folded if character.isalnum())
    return joined_key(letters) or folded, class_key(name)


def _without_ids(lines: list[str], path: Path, classes: Sequence[str] | None) -> list[str]:
    """Returns the lines without the ids that `cname_cid` files put behind the names.

    A number belongs to the name (`shoe 0`) unless all lines have one, they count from 0 on, and
    the data, where they are known, have none of the names with a number.
    """
    matches = [re.fullmatch(r"(.+?)\s+(\d+)", line) for line in lines]
    names = [match[1] for match in matches if match is not None]
    ids = [int(match[2]) for match in matches if match is not None]
    is_counted = ids == list(range(len(lines))) and len({*map(class_key, names)}) == len(lines)
    if not is_counted:
        return lines
    if classes is not None:
        here = {class_key(name) for name in classes}
        if any(class_key(line) in here for line in lines):
            return lines
    is_list = len(lines) > 1 or path.name.startswith("cname_cid")
    return names if is_list else lines
