"""Zero-shot splits: which classes are seen in training and which are kept unseen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sbtk_runtime.errors import BadConfig


@dataclass(frozen=True)
class Split:
    """A named list of unseen classes; every other class of a data set may be trained on.

    Attributes:
        name: as in `splits.json`, or the file's name.
        unseen: class names, sorted.
    """

    name: str
    unseen: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash of the canonical unseen class names; equal for equal splits."""
        keys = sorted(class_key(name) for name in self.unseen)
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()

    def is_unseen(self, class_name: str) -> bool:
        """Says whether the class is unseen, whichever way its blanks and hyphens are written."""
        return class_key(class_name) in {class_key(name) for name in self.unseen}

    def seen_among(self, class_names: Iterable[str]) -> list[str]:
        """Returns the class names that are not unseen, in their order."""
        unseen = {class_key(name) for name in self.unseen}
        return [name for name in class_names if class_key(name) not in unseen]


def class_key(name: str) -> str:
    """Returns the name as it is compared: data sets write `hot-air balloon` in four ways."""
    return re.sub(r"[\s_\-]+", "_", name.strip().lower())


def split_names() -> list[str]:
    """Returns the names of the published splits that sbtk knows."""
    return sorted(_published())


def open_split(name_or_file: str) -> Split:
    """Returns a published split by name, or the split of a file with one unseen class a line.

    Raises:
        BadConfig: neither a known name nor a readable file with at least one class.
    """
    published = _published()
    if name_or_file in published:
        return Split(name_or_file, tuple(sorted(published[name_or_file])))
    path = Path(name_or_file)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise BadConfig(
            f"no split named {name_or_file!r}, and no readable file of that name",
            f"one of {', '.join(split_names())}, or a text file with one unseen class a line",
        ) from problem
    unseen = tuple(sorted({line.strip() for line in lines if line.strip()}))
    if not unseen:
        raise BadConfig(f"{path} names no class", "one unseen class a line")
    return Split(path.name, unseen)


def _published() -> dict[str, list[str]]:
    text = resources.files("sbtk_train").joinpath("splits.json").read_text("utf-8")
    return {name: entry["unseen"] for name, entry in json.loads(text).items()}
