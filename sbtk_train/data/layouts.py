"""The ways in which sketch and photo data sets lie on disk, and which of them a folder has.

The layouts are those of SAKE's dataset.zip (also DSN, ZSE-SBIR, MATHM), SEM-PCYC's download script
(also PCMSN, CLIP-AT, MA-ZS-SBIR), doodle2search's QuickDraw Extended and its repack by ZSE-SBIR,
ACNet's train and val folders, and the plain `sketch|photo/<class>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.names import printable_name
from sbtk_train.data.class_folders import is_system_folder

_TX = "tx_000000000000"


@dataclass(frozen=True)
class Layout:
    """Where the class folders of a data set are.

    Attributes:
        name: one word for programs.
        title: the layout in words.
        root: the folder that all others are below, and that paths in list files are relative to.
        sketch_folders: folders of class folders with sketches.
        photo_folders: the same with photos; a later one may repeat photos of an earlier one.
        list_folders: folders of list files; empty where the layout has none.
        own_parts: for `train` and `val`, the folder of each; else empty.
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


# The extended photos stand first: they hold the originals too, so these are the duplicates.
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
    """Returns the layout of the data set in `root`, or in the one folder of it that is a data set.

    Raises:
        BadData: there is none, or several; says what was looked for.
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
            f"{shown} holds {len(inner)} data sets: {names}",
            "the folder of one",
            f"name {printable_name(inner[0].root)} instead",
        )
    for kind in ("sketch", "photo"):
        if not (root / kind).is_dir():
            raise BadData(
                f"{shown} has no folder {kind!r}, and is in no other layout that sbtk knows",
                "sketch/<class>/* and photo/<class>/*, or one of: "
                + "; ".join(form.title for form in _FORMS[:-1]),
                "give the folder that holds the sketches and the photos",
            )
    raise BadData(f"{shown} holds no class folders", "sketch/<class>/* and photo/<class>/*")


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
