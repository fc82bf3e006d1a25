"""The layouts of sketch and photo data sets on disk.

They are those of SAKE's dataset.zip (also DSN, ZSE-SBIR, MATHM), SEM-PCYC's download script (also
PCMSN, CLIP-AT, MA-ZS-SBIR), doodle2search's QuickDraw Extended and its repack by ZSE-SBIR, ACNet's
train and val folders, and the plain `sketch|photo/<class>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.image_set import is_system_folder, refuse_ambiguous

_TX = "tx_000000000000"


@dataclass(frozen=True)
class Layout:
    """The class folders of a data set.

    Attributes:
        name: an identifier.
        title: a description.
        root: the folder of all others; paths in list files are relative to it.
        sketch_folders: folders of class folders with sketches.
        photo_folders: folders of class folders with photos; later ones may repeat photos.
        list_folders: folders of list files; empty if there are none.
        own_parts: the folders `train` and `val`, in the layout of that name; else empty.
    """

    name: str
    title: str
    root: Path
    sketch_folders: tuple[Path, ...]
    photo_folders: tuple[Path, ...]
    list_folders: tuple[Path, ...] = ()
    own_parts: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Form:
    name: str
    title: str
    sketches: tuple[str, ...]
    photos: tuple[str, ...]


# The extended photos come first: they include the originals, so the others are duplicates.
_FORMS = (
    _Form(
        "sake-sketchy",
        "Sketchy Ext as in SAKE's dataset.zip",
        (f"256x256/sketch/{_TX}_ready",),
        ("EXTEND_image_sketchy_ready", f"256x256/photo/{_TX}_ready"),
    ),
    _Form(
        "sake-tuberlin",
        "TU-Berlin Ext as in SAKE's dataset.zip",
        ("png_ready",),
        ("ImageResized_ready",),
    ),
    _Form(
        "sem-pcyc-sketchy",
        "Sketchy Ext as SEM-PCYC's script leaves it",
        (f"sketch/{_TX}",),
        ("extended_photo", f"photo/{_TX}"),
    ),
    _Form(
        "sketchy-unpacked",
        "Sketchy Ext as it is unpacked",
        (f"256x256/sketch/{_TX}",),
        ("EXTEND_image_sketchy", f"256x256/photo/{_TX}"),
    ),
    _Form("tuberlin-unpacked", "TU-Berlin Ext as it is unpacked", ("png",), ("ImageResized",)),
    _Form(
        "quickdraw-final",
        "QuickDraw Ext as it is unpacked",
        ("QuickDraw_sketches_final",),
        ("QuickDraw_images_final",),
    ),
    _Form(
        "quickdraw",
        "QuickDraw Ext with doodle2search's folder names",
        ("QuickDraw_sketches",),
        ("EXTEND_image_quickdraw",),
    ),
    _Form(
        "sketches-images",
        "sketches/<class> and images/<class>: TU-Berlin Ext by SEM-PCYC, QuickDraw Ext by ZSE-SBIR",
        ("sketches",),
        ("images",),
    ),
    _Form(
        "train-val",
        "train and val folders, as ACNet has them",
        ("train/sketch", "val/sketch"),
        ("train/photo", "val/photo"),
    ),
    _Form("plain", "sketch/<class> and photo/<class>", ("sketch",), ("photo",)),
)


def recognise(root: Path) -> Layout:
    """Return the layout of the data set in `root`, or in its only subfolder with a data set.

    Raises:
        BadData: there is none, or several; names the known layouts.
    """
    if layout := _layout_of(root):
        return layout
    inner = [found for folder in _subfolders(root) if (found := _layout_of(folder))]
    if len(inner) == 1:
        return inner[0]
    shown = printable_name(root)
    if not root.is_dir():
        raise BadData(f"there is no folder {shown}", "a folder of sketches and photos")
    if inner:
        names = ", ".join(layout.root.name for layout in inner)
        raise BadData(
            f"{shown} has {len(inner)} data sets: {names}",
            "the folder of one data set",
            f"name {printable_name(inner[0].root)} instead",
        )
    for kind in ("sketch", "photo"):
        if not (root / kind).is_dir():
            raise BadData(
                f"{shown} has no folder {kind!r}, and no other layout that sbtk reads",
                "sketch/<class>/* and photo/<class>/*, or one of: "
                + "; ".join(form.title for form in _FORMS[:-1]),
                "name the folder with the sketches and photos",
            )
    raise BadData(f"{shown} has no class folders", "sketch/<class>/* and photo/<class>/*")


def _layout_of(root: Path) -> Layout | None:
    for form in _FORMS:
        sketches = [root / name for name in form.sketches if (root / name).is_dir()]
        photos = [root / name for name in form.photos if (root / name).is_dir()]
        if sketches and photos and any(_subfolders(folder) for folder in (*sketches, *photos)):
            parts = [root / part for part in ("train", "val") if (root / part).is_dir()]
            lists = [path for path in _subfolders(root) if path.name.startswith("zeroshot")]
            return Layout(
                form.name,
                form.title,
                root,
                tuple(sketches),
                tuple(photos),
                tuple(lists),
                tuple(parts) if form.name == "train-val" else (),
            )
    return None


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if not is_system_folder(path.name) and path.is_dir()
    )


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
    """A list file.

    Attributes:
        file: the file.
        paths: its images, in its order, whether or not they exist.
        name_of: the class name of each.
    """

    file: Path
    paths: tuple[Path, ...]
    name_of: tuple[str, ...]


@dataclass(frozen=True)
class ListFolder:
    """The list files of one split.

    Attributes:
        name: the folder's name, such as `zeroshot1`.
        seen: the seen classes, in the order of their labels.
        unseen: the unseen classes, in the order of their labels.
        lists: the existing lists, by kind of image and part.
    """

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    lists: dict[tuple[Kind, Part], ImageList]

    def is_complete(self, kind: Kind) -> bool:
        """Return whether there are lists of both seen and unseen images of a kind."""
        return (kind, "train") in self.lists and (kind, "zero") in self.lists

    def training_sketches(self) -> frozenset[Path]:
        """Return the sketches to train on; empty without a list of them."""
        listed = self.lists.get(("sketch", "train"))
        return frozenset(listed.paths) if listed else frozenset()


def read_list_folder(folder: Path, root: Path) -> ListFolder | None:
    """Return the lists in `folder`, whose paths are relative to `root`; `None` if it has none.

    Raises:
        BadData: a line has no label or a path outside of `root`, a label has no class, or a label
            and its image's folder have different class names.
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
    """Return the classes of a part's images, for parts without a file of class names."""
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
            f"{printable_name(file)} does not number its {len(numbered)} classes from 0",
            f"0 to {len(numbered) - 1}",
            "use the file that belongs to the lists",
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
        "use lists and cname_cid files from one source, since labels differ",
    )
