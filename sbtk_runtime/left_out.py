"""What a walk left out, counted by reason and suffix, and said in sentences."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sbtk_runtime.errors import BadData
from sbtk_runtime.names import printable_name
from sbtk_runtime.walk import DEFAULT_RULES, Followed, Found, LeftOut, Skipped, walk
from sbtk_runtime.walk_rules import WalkRules, Why, suffix_of

_INSTALL = 'pip install "sbtk[photos]"'
# Reasons for which photos are left out that could be had.
_READER_MISSING = {Why.HEIC_READER_MISSING: "HEIC", Why.RAW_READER_MISSING: "RAW"}
_REASONS = {
    Why.HEIC_READER_MISSING: _INSTALL,
    Why.RAW_READER_MISSING: _INSTALL,
    Why.RAW_BESIDE_JPEG: "the JPEG of the same name is the photo",
    Why.OTHER_IMAGE: "image formats that sbtk does not read",
    Why.NOT_A_PHOTO: "not photos",
    Why.HIDDEN: "hidden or kept by a system (--include-hidden takes them in)",
    Why.EXCLUDED: "excluded by a pattern",
    Why.LINK: "--follow-links follows such links",
}
_OTHERS = "others"
# Names are as many as anybody makes them; the counts stay right whatever is named.
_MAX_NAMES = 50
_MAX_NAMES_SAID = 6


@dataclass(frozen=True)
class LeftOutCount:
    """How many files or folders of one kind were left out for one reason.

    Attributes:
        why: the reason, as one of `Why`'s values.
        what: a suffix in lower case, empty for files without; of folders the name, and of links
            their paths; "others" for what had no place among fifty.
        is_folder: whether folders were counted, with all that is in them.
        count: how many.
        reason: `why` in words.
        example: the path of one of them.
    """

    why: str
    what: str
    is_folder: bool
    count: int
    reason: str
    example: str


class LeftOutTally:
    """Counts what was left out, in little memory however much it is."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Why, bool, str], int] = {}
        self._examples: dict[tuple[Why, bool, str], str] = {}
        self._names: dict[tuple[Why, bool], int] = {}
        #: The patterns that have excluded something.
        self.patterns: set[str] = set()

    def add(self, item: LeftOut) -> None:
        """Counts one."""
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
        """Returns what was counted: in the order of `Why`, files first, and the most first."""
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
    """Returns what was left out, a sentence for each reason.

    Such as '3 HEIC photos skipped: pip install "sbtk[photos]"' and "14 files skipped: 8 .mov, 6
    .xmp: not photos".
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
    """Makes sure that there is a file to look at; otherwise a pattern may be too wide.

    Args:
        roots: absolute.
        rules: as for `walk`.
        known_roots: as for `walk`.
        may_be_empty: roots of which nothing is excluded may have no photo: a disk is not mounted.

    Raises:
        BadData: there is none; says what was skipped.
    """
    skipped: list[Skipped] = []
    tally = LeftOutTally()
    for item in walk(roots, rules, known_roots):
        if isinstance(item, Found):
            return
        if isinstance(item, LeftOut):
            tally.add(item)
        elif not isinstance(item, Followed):
            skipped.append(item)
    counts = tally.counts()
    if may_be_empty and all(count.why != Why.EXCLUDED for count in counts):
        return
    named = ", ".join(printable_name(root) for root in roots)
    reasons = [f"{printable_name(item.path)}: {item.reason}" for item in skipped[:3]]
    reasons += left_out_sentences(counts)
    raise BadData(
        f"no photo in {named}" + (f" ({'; '.join(reasons)})" if reasons else ""),
        "image files, such as .jpg or .png, at any depth",
        _INSTALL if is_photo_missed(counts) else "",
    )


def is_photo_missed(counts: Iterable[LeftOutCount]) -> bool:
    """Returns whether photos were left out that could be had."""
    return any(Why(count.why) in _READER_MISSING for count in counts)


def _what(item: LeftOut) -> str:
    if item.why is Why.LINK:
        return item.path
    name = os.path.basename(item.path)  # noqa: PTH119
    if item.is_folder:
        return name
    # A hidden name such as .DS_Store says more than that it has no suffix.
    return suffix_of(name) or (name if item.why is Why.HIDDEN else "")


def _sentence(why: Why, counts: list[LeftOutCount]) -> str:
    files = sum(count.count for count in counts if not count.is_folder)
    folders = sum(count.count for count in counts if count.is_folder)
    if why in _READER_MISSING:
        return f"{_counted(files, f'{_READER_MISSING[why]} photo')} skipped: {_REASONS[why]}"
    if why is Why.LINK:
        named = [count.what for count in counts[:_MAX_NAMES_SAID]]
        more = folders - len(named)
        named += [f"{more:,} more"] * (more > 0)
        links = f"{folders:,} link to a folder" if folders == 1 else f"{folders:,} links to folders"
        return f"{links} not followed: {', '.join(named)}: {_REASONS[why]}"
    totals = [_counted(files, "file")] * (files > 0) + [_counted(folders, "folder")] * (folders > 0)
    named = [f"{count.count:,} {_name(count)}" for count in counts[:_MAX_NAMES_SAID]]
    more = sum(count.count for count in counts[_MAX_NAMES_SAID:])
    named += [f"{more:,} more"] * (more > 0)
    return f"{' and '.join(totals)} skipped: {', '.join(named)}: {_REASONS[why]}"


def _name(count: LeftOutCount) -> str:
    return (count.what + "/" * count.is_folder) if count.what else "without a suffix"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
