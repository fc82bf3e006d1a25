"""Walk folders for photos, without running in circles, and report everything that is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sbtk_runtime import raw_photo
from sbtk_runtime.errors import BadData
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.gallery.walk_rules import (
    IGNORE_FILE_NAME,
    Formats,
    Pattern,
    WalkRules,
    Why,
    find_decision,
    is_hidden,
    patterns_of,
    read_ignore_file,
    suffix_of,
)

DEFAULT_RULES = WalkRules()


class Found(NamedTuple):
    """A regular file that may be a photo, with the metadata that shows whether it changed.

    `path` is absolute, with surrogates for bytes that are not UTF-8. `ctime_ns` changes with the
    permissions, too. The numbers are those of the file system: times can be beyond the year 2262,
    inodes above 2**63.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Skipped:
    """A path that was not walked, with the reason.

    `may_hide_photos` is true if its content is unknown, as for a folder that cannot be read. Photos
    that were found there before must not be treated as deleted.
    """

    path: str
    reason: str
    may_hide_photos: bool


@dataclass(frozen=True)
class LeftOut:
    """A file, or a folder with its content, that the rules leave out.

    `pattern` is the pattern that excludes it, if one does.
    """

    path: str
    why: Why
    is_folder: bool = False
    pattern: str = ""


@dataclass(frozen=True)
class Followed:
    """A link to a folder that is entered; files below `path` are found through it."""

    path: str


@dataclass(frozen=True)
class Repeated:
    """A root that is a folder which the walk has entered under another path, as a link may be."""

    path: str


Item = Found | Skipped | LeftOut | Followed | Repeated


def walk(
    roots: Sequence[str],
    rules: WalkRules = DEFAULT_RULES,
    known_roots: Iterable[str] = (),
    gallery: str = "",
) -> Iterator[Item]:
    """Yield the content of absolute `roots`, in no particular order, in constant memory.

    Each folder is entered once, even if it has several paths. Folders that are only reachable
    through links come last, and only if the rules say so. A link to a file counts as a file. If a
    RAW and a JPEG have the same name, the JPEG is the photo. Roots are walked whatever their names,
    and a root that is a file is a photo whatever its suffix, if its format can be read here.

    Args:
        roots: folders and files.
        rules: what to leave out, in addition to files that are not photos.
        known_roots: folders and files that were roots before. They are not hidden from this walk.
            Patterns are relative to the outermost root, current or earlier, that contains a photo.
        gallery: the gallery's folder, whose own files are skipped.

    Raises:
        BadConfig: a pattern of the rules is malformed.
    """
    yield from _Walk(roots, rules, known_roots, gallery).items()


class _Folder(NamedTuple):
    """A folder to enter: its path, its path relative to its root, and the patterns from above."""

    path: str
    relative: str
    ignores: tuple[tuple[int, tuple[Pattern, ...]], ...]


class _Link(NamedTuple):
    """A link to a folder, with device and inode of its target."""

    folder: _Folder
    key: tuple[int, int]


class _Walk:
    def __init__(
        self, roots: Sequence[str], rules: WalkRules, known_roots: Iterable[str], gallery: str
    ) -> None:
        self._roots = roots
        self._own = frozenset([*roots, gallery])
        self._known = frozenset(known_roots) - self._own
        self._rules = rules
        self._exclude = patterns_of(rules.exclude)
        self._formats = Formats()
        # JPEGs that were named one by one, as a shell does for photos/*
        self._root_jpegs = {
            _stem(root) for root in roots if self._formats.stands_for_raw(suffix_of(root))
        }
        self._visited: set[tuple[int, int]] = set()
        self._links: list[_Link] = []

    def items(self) -> Iterator[Item]:
        for root in self._roots:
            status = _status(root)
            if isinstance(status, Skipped):
                yield status
            elif not stat.S_ISDIR(status.st_mode):
                yield self._root_file(root, status)
            elif not self._is_new(_key(status)):
                yield Repeated(root)
            else:
                try:
                    folder = self._root_folder(root)
                except _BadIgnoreFile as problem:
                    yield Skipped(root, str(problem), may_hide_photos=True)
                    continue
                yield from self._below(folder)
                yield from self._hidden_roots(folder)
        while self._links:
            links, self._links = sorted(self._links), []
            for folder, key in links:
                # The target was walked under its real path: nothing is left out.
                if key in self._visited:
                    continue
                if not self._rules.follow_links:
                    yield LeftOut(folder.path, Why.LINK, is_folder=True)
                elif self._is_new(key):
                    yield Followed(folder.path)
                    yield from self._below(folder)

    def _root_folder(self, root: str) -> _Folder:
        """Return a root with the patterns from above it, starting at the outermost root.

        Whether a photo is ignored does not depend on which of the folders above it was named.
        """
        top = above = root
        while (above := os.path.dirname(above)) != "/":  # noqa: PTH120
            if above in self._own or above in self._known:
                top = above
        folder = _Folder(top, "", ())
        for part in root.removeprefix(top).split("/")[1:]:
            folder = _inner(_with_ignore_file(folder), part)
        return folder

    def _hidden_roots(self, root: _Folder) -> Iterator[Item]:
        """Yield the content of earlier roots that are hidden from the walk of `root`."""
        top = root.path.rstrip("/") + "/"
        for known in sorted(path for path in self._known if path.startswith(top)):
            folder = root
            *above, name = known.removeprefix(top).split("/")
            hidden = False
            try:
                for part in above:
                    hidden |= _is_hidden_in(folder, part, is_folder=True)
                    folder = _with_ignore_file(folder)
                    if self._excluded_by(part, folder, is_folder=True):
                        break
                    folder = _inner(folder, part)
                else:
                    if hidden or _is_hidden_in(folder, name, is_folder=True):
                        yield from self._hidden_root(_with_ignore_file(folder), name)
            except _BadIgnoreFile as problem:
                yield Skipped(folder.path, str(problem), may_hide_photos=True)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it no longer exists
            except OSError as problem:
                yield Skipped(known, f"cannot be read: {problem.strerror}", may_hide_photos=True)

    def _hidden_root(self, folder: _Folder, name: str) -> Iterator[Item]:
        path = os.path.join(folder.path, name)  # noqa: PTH118
        status = os.stat(path)  # noqa: PTH116
        is_folder = stat.S_ISDIR(status.st_mode)
        if pattern := self._excluded_by(name, folder, is_folder=is_folder):
            yield LeftOut(path, Why.EXCLUDED, is_folder, pattern)
        elif not is_folder:
            yield self._root_file(path, status)
        elif self._is_new(_key(status)):
            yield from self._below(_inner(folder, name))

    def _root_file(self, path: str, status: os.stat_result) -> Item:
        suffix = suffix_of(path)
        if suffix in raw_photo.SUFFIXES and _stem(path) in self._root_jpegs:
            return LeftOut(path, Why.RAW_BESIDE_JPEG)
        why = self._formats.why_not(suffix)
        if why in (Why.HEIC_READER_MISSING, Why.RAW_READER_MISSING):
            return LeftOut(path, why)
        return _file(path, status)

    def _below(self, top: _Folder) -> Iterator[Item]:
        folders = [top]
        while folders:
            folder = folders.pop()
            raws: list[str] = []
            try:
                with os.scandir(folder.path) as entries:
                    folder = _with_ignore_file(folder)
                    for entry in entries:
                        if entry.path in self._own or entry.name == IGNORE_FILE_NAME:
                            continue  # roots are walked separately
                        item = self._item(entry, folder, folders, raws)
                        if item is not None:
                            yield item
                if raws:
                    yield from self._raw_items(folder, raws)
            except _BadIgnoreFile as problem:
                yield Skipped(folder.path, str(problem), may_hide_photos=True)
            except OSError as problem:
                reason = f"the folder cannot be read: {problem.strerror}"
                yield Skipped(folder.path, reason, may_hide_photos=True)

    def _item(
        self, entry: os.DirEntry[str], folder: _Folder, folders: list[_Folder], raws: list[str]
    ) -> Item | None:
        """Return the item for an entry; `None` if it is in `folders`, `raws` or the links."""
        name, is_folder = entry.name, _is_folder(entry)
        if entry.path in self._known and self._is_hidden(name, folder, is_folder):
            return None  # walked later, as a root
        if is_folder:
            if left_out := self._left_out(entry.path, name, folder, is_folder=True):
                return left_out
            status = _status(entry.path)
            if isinstance(status, Skipped):
                return status
            if self._is_new(_key(status)):
                folders.append(_inner(folder, entry.name))
            return None
        if entry.is_symlink():
            status = _status(entry.path)
            if not isinstance(status, Skipped) and stat.S_ISDIR(status.st_mode):
                if left_out := self._left_out(entry.path, name, folder, is_folder=True):
                    return left_out
                self._links.append(_Link(_inner(folder, entry.name), _key(status)))
                return None
        if left_out := self._left_out(entry.path, name, folder, is_folder=False):
            return left_out
        suffix = suffix_of(name)
        if suffix in raw_photo.SUFFIXES:
            raws.append(name)
            return None
        if why := self._formats.why_not(suffix):
            return LeftOut(entry.path, why)
        return _file_or_skipped(entry.path)

    def _raw_items(self, folder: _Folder, raws: list[str]) -> Iterator[Item]:
        """Yield the RAW files of a folder, after scanning the folder again for JPEGs."""
        stems = {_stem(name) for name in raws}
        doubled = set()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if (
                    self._formats.stands_for_raw(suffix_of(entry.name))
                    and (stem := _stem(entry.name)) in stems
                    and _is_file(entry)
                    and (
                        entry.path in self._own
                        or not self._left_out(entry.path, entry.name, folder, is_folder=False)
                    )
                ):
                    doubled.add(stem)
        for name in raws:
            path = os.path.join(folder.path, name)  # noqa: PTH118
            why = self._formats.why_not(suffix_of(name))
            if _stem(name) in doubled:
                why = Why.RAW_BESIDE_JPEG
            yield _file_or_skipped(path) if why is None else LeftOut(path, why)

    def _left_out(
        self, path: str, name: str, folder: _Folder, *, is_folder: bool
    ) -> LeftOut | None:
        """Return why an entry is left out because of its name; `None` if it is not."""
        if self._is_hidden(name, folder, is_folder):
            return LeftOut(path, Why.HIDDEN, is_folder)
        pattern = self._excluded_by(name, folder, is_folder=is_folder)
        return None if pattern is None else LeftOut(path, Why.EXCLUDED, is_folder, pattern)

    def _is_hidden(self, name: str, folder: _Folder, is_folder: bool) -> bool:
        return not self._rules.include_hidden and _is_hidden_in(folder, name, is_folder=is_folder)

    def _excluded_by(self, name: str, folder: _Folder, *, is_folder: bool) -> str | None:
        """Return the pattern that excludes an entry."""
        if not self._exclude and not folder.ignores:
            return None
        relative = folder.relative + name
        decision = find_decision(self._exclude, relative, is_folder)
        for start, patterns in reversed(folder.ignores):
            if decision is not None:
                break
            decision = find_decision(patterns, relative[start:], is_folder)
        return decision.text if decision is not None and decision.excludes else None

    def _is_new(self, key: tuple[int, int]) -> bool:
        if key in self._visited:
            return False
        self._visited.add(key)
        return True


class _BadIgnoreFile(Exception):
    """A `.sbtkignore` that cannot be read; the message is the reason."""


def _with_ignore_file(folder: _Folder) -> _Folder:
    try:
        patterns = read_ignore_file(folder.path)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        # The files that it should exclude may be private, so nothing is included.
        raise _BadIgnoreFile(
            f"the folder was not updated, because its {IGNORE_FILE_NAME} cannot be read: {reason}"
        ) from problem
    if not patterns:
        return folder
    here = (len(folder.relative), patterns)
    return folder._replace(ignores=(*folder.ignores, here))


def _inner(folder: _Folder, name: str) -> _Folder:
    path = os.path.join(folder.path, name)  # noqa: PTH118
    return _Folder(path, f"{folder.relative}{name}/", folder.ignores)


def _is_hidden_in(folder: _Folder, name: str, *, is_folder: bool) -> bool:
    parent_name = os.path.basename(folder.path) if is_folder else ""  # noqa: PTH119
    return is_hidden(name, parent_name, is_folder)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].casefold()  # noqa: PTH122


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _status(path: str) -> os.stat_result | Skipped:
    try:
        return os.stat(path)  # noqa: PTH116 -- a Path for each of a million files costs seconds
    except OSError as problem:
        # A dangling or circular link hides nothing; a path that cannot be examined may.
        is_known = isinstance(problem, FileNotFoundError) or os.path.islink(path)  # noqa: PTH114
        return Skipped(path, f"cannot be read: {problem.strerror}", may_hide_photos=not is_known)


def _file_or_skipped(path: str) -> Found | Skipped:
    status = _status(path)
    return status if isinstance(status, Skipped) else _file(path, status)


def _file(path: str, status: os.stat_result) -> Found | Skipped:
    if not stat.S_ISREG(status.st_mode):
        return Skipped(path, "not a regular file", may_hide_photos=False)
    return Found(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


_INSTALL = 'pip install "sbtk[photos]"'
# Reasons that an extra would remove.
_READER_MISSING = {Why.HEIC_READER_MISSING: "HEIC", Why.RAW_READER_MISSING: "RAW"}
_REASONS = {
    Why.HEIC_READER_MISSING: _INSTALL,
    Why.RAW_READER_MISSING: _INSTALL,
    Why.RAW_BESIDE_JPEG: "the JPEG of the same name is the photo",
    Why.OTHER_IMAGE: "image formats that sbtk does not read",
    Why.NOT_A_PHOTO: "not photos",
    Why.HIDDEN: "hidden or system files (--include-hidden includes them)",
    Why.EXCLUDED: "excluded by a pattern",
    Why.LINK: "--follow-links follows such links",
}
_OTHERS = "others"
# The number of names is unlimited; beyond these, items are counted without a name.
_MAX_NAMES = 50
_MAX_NAMES_SAID = 6


@dataclass(frozen=True)
class LeftOutCount:
    """The number of files or folders of one kind that were left out for one reason.

    Attributes:
        why: the reason, as one of `Why`'s values.
        what: for files a suffix in lower case, empty if they have none; for folders the name; for
            links the path; "others" beyond fifty different ones.
        is_folder: whether folders were counted, each with its content.
        count: their number.
        reason: a description of `why`.
        example: the path of one of them.
    """

    why: str
    what: str
    is_folder: bool
    count: int
    reason: str
    example: str


class LeftOutTally:
    """Counts what was left out, in bounded memory."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Why, bool, str], int] = {}
        self._examples: dict[tuple[Why, bool, str], str] = {}
        self._names: dict[tuple[Why, bool], int] = {}
        #: The patterns that excluded something.
        self.patterns: set[str] = set()

    def add(self, item: LeftOut) -> None:
        """Count one item."""
        key = (item.why, item.is_folder, _what(item))
        if key not in self._counts:
            names = self._names.get(key[:2], 0)
            if names >= _MAX_NAMES:
                key = (item.why, item.is_folder, _OTHERS)
            self._names[key[:2]] = names + 1
        if item.pattern:
            self.patterns.add(item.pattern)
        self._counts[key] = self._counts.get(key, 0) + 1
        self._examples.setdefault(key, item.path)

    def counts(self) -> tuple[LeftOutCount, ...]:
        """Return the counts, ordered by `Why`; files first, then by descending count."""
        order = list(Why)
        keys = sorted(
            self._counts, key=lambda key: (order.index(key[0]), key[1], -self._counts[key], key[2])
        )
        return tuple(
            LeftOutCount(
                why.value,
                printable_name(what),
                is_folder,
                self._counts[why, is_folder, what],
                _REASONS[why],
                printable_name(self._examples[why, is_folder, what]),
            )
            for why, is_folder, what in keys
        )


def left_out_sentences(counts: Iterable[LeftOutCount]) -> list[str]:
    """Return one sentence for each reason.

    Examples are '3 HEIC photos skipped: pip install "sbtk[photos]"' and "14 files skipped: 8 .mov,
    6 .xmp: not photos".
    """
    by_reason: dict[Why, list[LeftOutCount]] = {}
    for count in counts:
        by_reason.setdefault(Why(count.why), []).append(count)
    return [_sentence(why, found) for why, found in by_reason.items()]


def refuse_nothing(
    roots: Sequence[str],
    rules: WalkRules = DEFAULT_RULES,
    known_roots: Iterable[str] = (),
    *,
    may_be_empty: bool = False,
) -> None:
    """Raise an error if a walk would find no file, as with a pattern that matches too much.

    Args:
        roots: absolute.
        rules: as for `walk`.
        known_roots: as for `walk`.
        may_be_empty: accept roots without photos if nothing is excluded by a pattern: a disk may
            not be mounted.

    Raises:
        BadData: no file was found; the message lists what was skipped.
    """
    skipped: list[Skipped] = []
    tally = LeftOutTally()
    for item in walk(roots, rules, known_roots):
        if isinstance(item, Found):
            return
        if isinstance(item, LeftOut):
            tally.add(item)
        elif not isinstance(item, Followed | Repeated):
            skipped.append(item)
    counts = tally.counts()
    if may_be_empty and all(count.why != Why.EXCLUDED for count in counts):
        return
    named = ", ".join(printable_name(root) for root in roots)
    reasons = [f"{printable_name(item.path)}: {item.reason}" for item in skipped[:3]]
    reasons += left_out_sentences(counts)
    raise BadData(
        f"no photo in {named}" + (f" ({'; '.join(reasons)})" if reasons else ""),
        "image files such as .jpg or .png, at any depth",
        _INSTALL if is_photo_missed(counts) else "",
    )


def is_photo_missed(counts: Iterable[LeftOutCount]) -> bool:
    """Return whether photos were left out that the extra `photos` could read."""
    return any(Why(count.why) in _READER_MISSING for count in counts)


def _what(item: LeftOut) -> str:
    if item.why is Why.LINK:
        return item.path
    name = os.path.basename(item.path)  # noqa: PTH119
    if item.is_folder:
        return name
    # Names such as .DS_Store have no suffix.
    return suffix_of(name) or (name if item.why is Why.HIDDEN else "")


def _sentence(why: Why, counts: list[LeftOutCount]) -> str:
    files = sum(count.count for count in counts if not count.is_folder)
    folders = sum(count.count for count in counts if count.is_folder)
    if why in _READER_MISSING:
        return f"{count_text(files, f'{_READER_MISSING[why]} photo')} skipped: {_REASONS[why]}"
    if why is Why.LINK:
        named = [count.what for count in counts[:_MAX_NAMES_SAID]]
        more = folders - len(named)
        named += [f"{more:,} more"] * (more > 0)
        links = f"{folders:,} link to a folder" if folders == 1 else f"{folders:,} links to folders"
        return f"{links} not followed: {', '.join(named)}: {_REASONS[why]}"
    totals = [count_text(n, noun) for n, noun in ((files, "file"), (folders, "folder")) if n]
    named = [f"{count.count:,} {_name(count)}" for count in counts[:_MAX_NAMES_SAID]]
    more = sum(count.count for count in counts[_MAX_NAMES_SAID:])
    named += [f"{more:,} more"] * (more > 0)
    return f"{' and '.join(totals)} skipped: {', '.join(named)}: {_REASONS[why]}"


def _name(count: LeftOutCount) -> str:
    return (count.what + "/" * count.is_folder) if count.what else "without a suffix"
