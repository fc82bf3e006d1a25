"""Tiny data sets in the layouts that published ones have on disk, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TX = "tx_000000000000"

SEEN = ("ant", "bell", "car_(sedan)", "door", "hot-air_balloon")
UNSEEN = ("tree", "wine_bottle")


def write_image(path: Path, seed: int) -> Path:
    """Return `path` with a small image in it that no other seed has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8), 255, np.uint8)
    pixels[2:6, 2:6] = np.random.default_rng(seed).integers(0, 128, (4, 4))
    Image.fromarray(pixels).save(path)
    return path


def write_classes(folder: Path, files: Mapping[str, Sequence[str]], seed: int = 0) -> Path:
    """Return `folder` with the named files in class folders."""
    for name, file_names in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file_name in file_names:
            seed += 1
            write_image(folder / name / file_name, seed)
    return folder


def write_sake_sketchy(
    root: Path, seen: Sequence[str] = SEEN, unseen: Sequence[str] = UNSEEN, lists: str = "zeroshot1"
) -> Path:
    """Return `root` with Sketchy as in SAKE's dataset.zip.

    Each class has six sketches, of which numbers 5 and 6 are held out, two original photos, and
    three extended ones, among them the originals: one by its name, one renamed to `c.jpg`.
    """
    for number, name in enumerate((*seen, *unseen)):
        original, copied = f"n{number:08}_1.jpg", f"n{number:08}_2.jpg"
        sketches = [f"n{number:08}_1-{drawing}.png" for drawing in range(1, 7)]
        write_classes(root / _SKETCHES, {name: sketches}, 1000 * number)
        write_classes(root / _PHOTOS, {name: [original, copied]}, 1000 * number + 100)
        extended = {name: [original, f"ext_{number}.jpg", "c.jpg"]}
        write_classes(root / _EXTENDED, extended, 1000 * number + 200)
        same_bytes = (root / _PHOTOS / name / copied).read_bytes()
        (root / _EXTENDED / name / "c.jpg").write_bytes(same_bytes)
    write_sake_lists(root, seen, unseen, lists)
    return root


def write_sake_lists(root: Path, seen: Sequence[str], unseen: Sequence[str], lists: str) -> Path:
    """Return the folder of list files for the images that `write_sake_sketchy` has written."""
    folder = root / lists
    stem = f"sketch_{TX}_ready_filelist"
    write_names(folder / "cname_cid.txt", seen)
    write_names(folder / "cname_cid_zero.txt", unseen, ending=" ")
    photos = (_EXTENDED, _PHOTOS)
    for part, names in (("train", seen), ("zero", unseen)):
        listed = _listed(root, photos, names)
        write_list(folder / f"all_photo_filelist_{part}.txt", listed)
        drawn = _listed(root, (_SKETCHES,), names)
        kept = [row for row in drawn if part == "zero" or row[0][-5] not in "56"]
        write_list(folder / f"{stem}_{part}.txt", kept)
        if part == "train":
            write_list(folder / f"{stem}_test.txt", [row for row in drawn if row not in kept])
    return folder


def write_list(file: Path, rows: Sequence[tuple[str, int]]) -> Path:
    """Return a list file of paths and labels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path} {label}\n" for path, label in rows))
    return file


def write_names(file: Path, names: Sequence[str], ending: str = "") -> Path:
    """Return a `cname_cid` file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name} {label}{ending}\n" for label, name in enumerate(names)))
    return file


_SKETCHES = f"256x256/sketch/{TX}_ready"
_PHOTOS = f"256x256/photo/{TX}_ready"
_EXTENDED = "EXTEND_image_sketchy_ready"


def _listed(root: Path, folders: Sequence[str], names: Sequence[str]) -> list[tuple[str, int]]:
    return [
        (path.relative_to(root).as_posix(), label)
        for folder in folders
        for label, name in enumerate(names)
        for path in sorted((root / folder / name).iterdir(), reverse=True)
    ]
