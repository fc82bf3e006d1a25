"""A split's class names against those of the data: what matches, is missing, or looks odd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sbtk_runtime.errors import BadData
from sbtk_train.data.class_names import ClassNames, close_names, is_near, is_plural
from sbtk_train.data.splits import Split

#: Data of which so many classes are on the split's lists are what the split was made for.
_OWN_SHARE = 0.9
_SUGGESTED_AT_MOST = 8


@dataclass(frozen=True)
class LookAlike:
    """A class that counts as seen, and the unseen class whose name it nearly has."""

    name: str
    unseen: str


@dataclass(frozen=True)
class ClassMatch:
    """How the class names of some data fall to a split.

    Attributes:
        split: the split's name.
        seen: the data's classes that may be trained on.
        unseen: the data's classes that are kept unseen.
        absent: the split's unseen classes that the data lack.
        unknown: classes of the data on neither of the split's lists; empty if it has no seen list.
        look_alikes: classes among `seen` that may be unseen ones, written otherwise.
        is_own: the data are those that the split's lists were made for, as far as names tell.
    """

    split: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    absent: tuple[str, ...]
    unknown: tuple[str, ...]
    look_alikes: tuple[LookAlike, ...]
    is_own: bool


def match_classes(classes: Sequence[str], split: Split) -> ClassMatch:
    """Returns how the classes fall to the split."""
    here, listed = ClassNames(classes, renames=not split.is_file), ClassNames(split.seen)
    seen = split.seen_among(classes)
    absent = [name for name in split.unseen if name not in here]
    unlisted = [name for name in seen if name not in listed]
    alike = [
        LookAlike(name, unseen)
        for name in unlisted
        for unseen in split.unseen
        if (is_near if unseen in absent else is_plural)(name, unseen)
    ]
    return ClassMatch(
        split.name,
        tuple(seen),
        tuple(name for name in classes if split.is_unseen(name)),
        tuple(absent),
        tuple(unlisted) if split.seen else (),
        tuple(alike),
        bool(split.seen) and len(unlisted) <= (1 - _OWN_SHARE) * len(classes),
    )


def refuse_look_alikes(match: ClassMatch) -> None:
    """Refuses to train on a class that is an unseen one by all appearances.

    Raises:
        BadData: the data are the split's own, and a class of theirs nearly has the name of an
            unseen class that is missing.
    """
    if match.is_own and match.look_alikes:
        first = match.look_alikes[0]
        raise BadData(
            f"the class {first.name!r} would be trained on, and looks like {first.unseen!r}, "
            f"which {match.split} keeps unseen",
            "class names as on the split's lists",
            f"rename the class's folder to {first.unseen!r}",
        )


def refuse_absent(
    listed: Sequence[str], classes: Sequence[str], name: str, *, renames: bool = False
) -> None:
    """Refuses a list of classes of which the data lack any: a slip in a name would pass unnoticed.

    Args:
        listed: class names.
        classes: the data's classes.
        name: of the list.
        renames: apply the documented renames of published data sets.

    Raises:
        BadData: names the absent classes, and the data's classes with the closest names.
    """
    here = ClassNames(classes, renames=renames)
    absent = [each for each in listed if each not in here]
    if absent:
        raise BadData(
            absent_text(absent, listed, classes, name),
            "class names as the data have them",
            "correct the file; or, if it is meant for more classes than these, --allow-missing",
        )


def absent_text(
    absent: Sequence[str], listed: Sequence[str], classes: Sequence[str], name: str
) -> str:
    """Returns a sentence on the listed classes that the data lack, with those they may mean."""
    close = [
        f"{each!r} (did you mean {' or '.join(map(repr, found))}?)"
        for each in absent[:_SUGGESTED_AT_MOST]
        if (found := close_names(each, classes))
    ]
    text = f"{len(absent)} of {len(listed)} classes in {name} are not in the data: {named(absent)}"
    return f"{text}; {', '.join(close)}" if close else text


def match_notices(match: ClassMatch) -> list[str]:
    """Returns sentences on what does not match; none where all or nothing of the split is here."""
    notices = [
        f"WARNING: {alike.name!r} is trained on; is it the unseen {alike.unseen!r}?"
        for alike in match.look_alikes
    ]
    if match.unseen and match.absent:
        notices.append(
            f"{len(match.absent)} of {len(match.absent) + len(match.unseen)} unseen classes of "
            f"{match.split} are not in the data: {named(match.absent)}"
        )
    return notices


def named(names: Sequence[str], most: int = 8) -> str:
    """Returns the names as a list for people, the rest counted."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
