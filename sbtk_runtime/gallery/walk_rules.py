"""Rules that decide by name which files of a folder may be photos."""

from __future__ import annotations

import enum
import importlib.util
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from sbtk_runtime import raw_photo
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import without_waiting
from sbtk_runtime.images import HEIC_SUFFIXES, SUFFIXES

IGNORE_FILE_NAME = ".sbtkignore"
_MAX_IGNORE_FILE_BYTES = 1 << 20

_PLAIN_SUFFIXES = SUFFIXES - HEIC_SUFFIXES
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})
_OTHER_IMAGE_SUFFIXES = (
    frozenset({".ai", ".cdr", ".cur", ".dds", ".dicom", ".dcm", ".djvu", ".emf", ".eps", ".exr"})
    | {".fits", ".hdr", ".icns", ".ico", ".j2k", ".jng", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr"}
    | {".kra", ".mng", ".pam", ".pcx", ".psb", ".psd", ".qoi", ".svg", ".svgz", ".tga", ".wdp"}
    | {".wmf", ".xbm", ".xcf", ".xpm"}
)

# Names that cameras, phones, operating systems and photo servers use for recycle bins, snapshots
# and thumbnails, in lower case. Names that begin with a dot are hidden anyway.
_SYSTEM_NAMES = frozenset(
    {"@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
    | {"$recycle.bin", "recycler", "recycled", "system volume information", "lost+found"}
    | {"__macosx", "network trash folder", "temporary items", "desktop.ini"}
    | {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "thumbnails"}
)
_SYSTEM_SUFFIXES = (".lrdata",)
# Apple's libraries are folders; the originals are in these folders, and copies in all others.
_LIBRARY_SUFFIXES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
_LIBRARY_ORIGINALS = frozenset({"originals", "masters"})


class Why(enum.StrEnum):
    """The reason why something was left out; the values are for programs."""

    HEIC_READER_MISSING = "heic_reader_missing"
    RAW_READER_MISSING = "raw_reader_missing"
    RAW_BESIDE_JPEG = "raw_beside_jpeg"
    OTHER_IMAGE = "unknown_image_format"
    NOT_A_PHOTO = "not_a_photo"
    HIDDEN = "hidden"
    EXCLUDED = "excluded"
    LINK = "link_not_followed"


@dataclass(frozen=True)
class WalkRules:
    """What a walk leaves out, in addition to files that are not photos.

    Attributes:
        exclude: patterns in the syntax of gitignore, relative to the folders that are walked. The
            last match decides; these patterns come after those of `.sbtkignore` files.
        include_hidden: include hidden and system files and folders.
        follow_links: follow links to folders.
    """

    exclude: tuple[str, ...] = ()
    include_hidden: bool = False
    follow_links: bool = False


@dataclass(frozen=True)
class RuleChange:
    """A change of a gallery's rules; by default none.

    Attributes:
        exclude: patterns to add, in order of precedence.
        clear_excludes: remove the existing patterns.
        include_hidden: the new value, or `None` to keep the old one.
        follow_links: likewise.
    """

    exclude: tuple[str, ...] = ()
    clear_excludes: bool = False
    include_hidden: bool | None = None
    follow_links: bool | None = None

    def applied_to(self, rules: WalkRules) -> WalkRules:
        """Return the changed rules. A pattern that is added again moves to the end.

        Raises:
            BadConfig: a new pattern is malformed.
        """
        patterns_of(self.exclude)
        kept = () if self.clear_excludes else rules.exclude
        added = tuple(dict.fromkeys(self.exclude))
        return WalkRules(
            tuple(text for text in kept if text not in added) + added,
            rules.include_hidden if self.include_hidden is None else self.include_hidden,
            rules.follow_links if self.follow_links is None else self.follow_links,
        )


class Pattern(NamedTuple):
    """A pattern in the syntax of gitignore that is matched against single entries of folders."""

    text: str
    regex: re.Pattern[str]
    excludes: bool
    only_folders: bool


def pattern_of(line: str) -> Pattern | None:
    """Return the pattern on a line; `None` for comments and patterns that cannot match.

    Raises:
        ValueError: the pattern is malformed.
    """
    text = line if line.endswith("\\ ") else line.rstrip()
    only_folders = text.endswith("/")
    try:
        # Excluded folders are not entered, so only the entry itself has to match.
        found = GitIgnoreSpecPattern(text.removesuffix("/"))
    except re.error as problem:
        raise ValueError(str(problem)) from problem
    if found.regex is None or found.include is None:
        return None
    return Pattern(text, found.regex, found.include, only_folders)


def patterns_of(exclude: Iterable[str]) -> tuple[Pattern, ...]:
    """Return the patterns of `--exclude`.

    Raises:
        BadConfig: a pattern is malformed, or cannot match anything.
    """
    patterns = []
    for text in exclude:
        try:
            pattern = None if "\n" in text else pattern_of(text)
        except ValueError:
            pattern = None
        if pattern is None:
            raise BadConfig(
                f"the pattern {text!r} matches nothing",
                "a pattern as in a .gitignore file",
                "--exclude '*.png', --exclude drafts/ or --exclude '/2019/scans/*'",
            )
        patterns.append(pattern)
    return tuple(patterns)


def read_ignore_file(folder: str) -> tuple[Pattern, ...]:
    """Return the patterns of a folder's `.sbtkignore`; none if there is no such file.

    Raises:
        ValueError: the file is malformed; the message is the reason.
        OSError: it cannot be read.
    """
    path = os.path.join(folder, IGNORE_FILE_NAME)  # noqa: PTH118
    try:
        file = open(path, "rb", opener=without_waiting)  # noqa: SIM115
    except FileNotFoundError:
        return ()
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > _MAX_IGNORE_FILE_BYTES:
            raise ValueError(f"it has more than {_MAX_IGNORE_FILE_BYTES:,} bytes")
        data = file.read(_MAX_IGNORE_FILE_BYTES)
    patterns = []
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            pattern = pattern_of(line.removesuffix("\r"))
        except ValueError as problem:
            raise ValueError(f"line {number} is not a pattern") from problem
        if pattern is not None:
            patterns.append(pattern)
    return tuple(patterns)


def find_decision(patterns: tuple[Pattern, ...], path: str, is_folder: bool) -> Pattern | None:
    """Return the last of `patterns` that matches an entry of a folder that is not excluded.

    Args:
        patterns: in order.
        path: relative to the folder of the patterns.
        is_folder: whether the entry is a folder.
    """
    # In regular expressions, $ also matches before a final line break.
    text = path.replace("\n", "\0")
    for pattern in reversed(patterns):
        if pattern.only_folders and not is_folder:
            continue
        match = pattern.regex.search(text)
        if match is not None and not match.groupdict().get("ps_d"):
            return pattern
    return None


def is_hidden(name: str, parent_name: str, is_folder: bool) -> bool:
    """Return whether a name is hidden, or used by an operating system or program."""
    if name.startswith("."):
        return True
    lower = name.lower()
    if lower in _SYSTEM_NAMES or lower.endswith(_SYSTEM_SUFFIXES):
        return True
    if not is_folder or lower in _LIBRARY_ORIGINALS:
        return False
    return parent_name.lower().endswith(_LIBRARY_SUFFIXES)


class Formats:
    """File formats by suffix, and which of them can be read here."""

    def __init__(self) -> None:
        self._has_heic = importlib.util.find_spec("pillow_heif") is not None
        self._has_raw = importlib.util.find_spec("rawpy") is not None

    def why_not(self, suffix: str) -> Why | None:
        """Return why files with a suffix (in lower case) are left out; `None` if they are not."""
        if suffix in _PLAIN_SUFFIXES:
            return None
        if suffix in HEIC_SUFFIXES:
            return None if self._has_heic else Why.HEIC_READER_MISSING
        if suffix in raw_photo.SUFFIXES:
            return None if self._has_raw else Why.RAW_READER_MISSING
        return Why.OTHER_IMAGE if suffix in _OTHER_IMAGE_SUFFIXES else Why.NOT_A_PHOTO

    def stands_for_raw(self, suffix: str) -> bool:
        """Return whether such a file takes precedence over a RAW file of the same name."""
        return suffix in _JPEG_SUFFIXES or (suffix in HEIC_SUFFIXES and self._has_heic)


def suffix_of(name: str) -> str:
    """Return the suffix of a name in lower case, with its dot; empty if it has none."""
    stem, _, suffix = name.rpartition(".")
    is_hidden_or_plain = not stem.rpartition("/")[2].strip(".") or "/" in suffix
    return "" if is_hidden_or_plain else f".{suffix.lower()}"
