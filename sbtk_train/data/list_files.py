"""SAKE's list files: which images train, which are held out, and which classes stay unseen.

A folder `zeroshot*` holds `<stem>_{train,test,zero}.txt` of lines `relative/path label`, and
`cname_cid.txt` and `cname_cid_zero.txt` of lines `class name label`. Paths and names have blanks
in them, so a line is split at its last blank. Labels count from 0 on both sides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from sbtk_runtime.errors import BadData
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.class_folders import refuse_ambiguous
from sbtk_train.data.class_names import ClassNames

Part = Literal["train", "test", "zero"]
PARTS: tuple[Part, ...] = ("train", "test", "zero")

_SIDES: tuple[Part, Part] = ("train", "zero")

# SAKE's for Sketchy, SAKE's for TU-Berlin, ZSE-SBIR's for QuickDraw.
_STEMS: dict[Kind, tuple[str, ...]] = {
    "sketch": ("sketch_tx_000000000000_ready_filelist", "png_ready_filelist", "sketch"),
    "photo": ("all_photo_filelist", "ImageResized_ready_filelist", "all_photo"),
}
_LINE = re.compile(r"(.*\S)\s+(\d{1,9})\s*")


@dataclass(frozen=True)
class ImageList:
    """One list file.

    Attributes:
        file: the list.
        paths: the images that it names, whether or not they exist, in its order.
        name_of: the class name of each.
    """

    file: Path
    paths: tuple[Path, ...]
    name_of: tuple[str, ...]


@dataclass(frozen=True)
class ListFolder:
    """The list files of one split.

    Attributes:
        name: the folder's, such as `zeroshot1`.
        seen: classes to train on, in the order of their labels.
        unseen: classes kept unseen, in the order of their labels.
        lists: what there is, by kind of image and part.
    """

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    lists: dict[tuple[Kind, Part], ImageList]

    def is_complete(self, kind: Kind) -> bool:
        """Says whether the lists name both the seen and the unseen images of a kind."""
        return (kind, "train") in self.lists and (kind, "zero") in self.lists

    def training_sketches(self) -> frozenset[Path]:
        """Returns the sketches to train on; empty where there is no list of them."""
        listed = self.lists.get(("sketch", "train"))
        return frozenset(listed.paths) if listed else frozenset()


def read_list_folder(folder: Path, root: Path) -> ListFolder | None:
    """Returns the lists in `folder`, whose paths are relative to `root`; `None` if it has none.

    Raises:
        BadData: a line has no label or leads out of `root`, a label has no class, or a label and
            the folder of its image name different classes.
    """
    names: dict[Part, tuple[str, ...]] = {
        "train": _class_names(folder / "cname_cid.txt"),
        "zero": _class_names(folder / "cname_cid_zero.txt"),
    }
    names["test"] = names["train"]
    lists: dict[tuple[Kind, Part], ImageList] = {}
    for kind, stems in _STEMS.items():
        for part in PARTS:
            files = [folder / f"{stem}_{part}.txt" for stem in stems]
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                lists[kind, part] = _image_list(file, root, names[part])
    if not lists and not any(names.values()):
        return None
    seen, unseen = (names[part] or _listed(lists, part) for part in _SIDES)
    return ListFolder(folder.name, seen, unseen, lists)


def _listed(lists: dict[tuple[Kind, Part], ImageList], part: Part) -> tuple[str, ...]:
    """Returns the classes of a side by its images, where no file names them."""
    found = [name for (_, of), listed in lists.items() if of == part for name in listed.name_of]
    return tuple(dict.fromkeys(found))


def _class_names(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    numbered = {}
    for number, line in enumerate(_lines(file), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise _bad_line(file, number, line, "a class name, a blank and its number")
        numbered[int(match[2])] = match[1]
    if sorted(numbered) != list(range(len(numbered))):
        raise BadData(
            f"{printable_name(file)} does not number its {len(numbered)} classes from 0 on",
            f"0 to {len(numbered) - 1}",
            "take the file from where the lists come from",
        )
    refuse_ambiguous(numbered.values(), printable_name(file))
    return tuple(numbered[label] for label in range(len(numbered)))


def _image_list(file: Path, root: Path, names: tuple[str, ...]) -> ImageList:
    paths: list[Path] = []
    name_of: list[str] = []
    agreed: set[tuple[str, str]] = set()
    for number, line in enumerate(_lines(file), 1):
        match = _LINE.fullmatch(line)
        relative = PurePosixPath(match[1] if match else line)
        if match is None or relative.is_absolute() or ".." in relative.parts:
            raise _bad_line(file, number, line, f"a path below {root.name}, a blank and a label")
        label, in_folder = int(match[2]), relative.parent.name
        if names and label >= len(names):
            raise _bad_line(file, number, line, f"a label of 0 to {len(names) - 1}")
        name = names[label] if names else in_folder
        if (name, in_folder) not in agreed:
            if in_folder not in ClassNames([name]):
                raise _bad_line(
                    file, number, line, f"an image of {name!r}, which has the label {label}"
                )
            agreed.add((name, in_folder))
        paths.append(root / relative)
        name_of.append(name)
    return ImageList(file, tuple(paths), tuple(name_of))


def _lines(file: Path) -> list[str]:
    text = file.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    return [line for line in text.split("\n") if line.strip()]


def _bad_line(file: Path, number: int, line: str, expected: str) -> BadData:
    return BadData(
        f"{printable_name(file)}, line {number}: {printable_name(line.strip())!r}",
        expected,
        "take lists and cname_cid files of one origin: their labels differ",
    )
