"""Indexing from Python: folders into a gallery, and photos in and out of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import Notify, no_notify
from sbtk_runtime.errors import BadData
from sbtk_runtime.files import WriterLock, printable_name
from sbtk_runtime.gallery.changes import Progress
from sbtk_runtime.gallery.folder import (
    LOCK_NAME,
    open_rows,
    published_manifest,
    translate_os_errors,
    vacuum,
    write_failures,
)
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.publish import publish
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import PhotoShard

#: A file or folder.
PathInput = str | os.PathLike[str]


def index(
    photos: PathInput | Iterable[PathInput],
    gallery: Gallery | PathInput = "gallery.sbtk",
    embedder: Embedder | None = None,
    *,
    checksum: bool = False,
    bits: int | None = None,
    shard: str | None = None,
    regions: int | None = None,
    progress: Progress = lambda done, total, rate: None,
    notify: Notify = no_notify,
) -> IndexReport:
    """Make a gallery hold the photos below folders, and embed only new and changed ones.

    Photos of other folders stay in the gallery. Files that cannot be read are counted in the
    report, and listed with the reason in `failures.jsonl` in the gallery.

    >>> report = index("photos", "gallery.sbtk")
    >>> print(report.live, "photos,", report.unreadable, "unreadable")
    6 photos, 0 unreadable

    Args:
        photos: a folder or file, or several.
        gallery: the gallery's folder, which is created if it does not exist, or the open gallery.
        embedder: of the gallery's model; by default the included model on the fastest engine.
        checksum: compare the content of files instead of size and modification time.
        bits: create a binary gallery, with codes of this many bits.
        shard: index only this part of the photos, such as "2/8"; see `sbtk index --shard`.
        regions: also embed so many regions of each photo, 9 or 16, to find things in photos.
        progress: called after each photo with how many are done, how many there are (`None` while
            they are being found) and images a second.
        notify: called with a sentence on each step that takes long.

    Raises:
        BadData: there are no photos.
        BadConfig: there is no such shard, or no such number of regions.
        BadModel: the model makes no codes of `bits` bits or embeds no regions, or no bundle can be
            used.
        BadGallery: the folder is not a gallery, cannot be written, or no photo could be read.
        GalleryBusy: another process is writing to the gallery.
        ModelMismatch: another model made the gallery.
        DiskFull: no space is left; what was committed stays.
    """
    folder, paths = _folder(gallery), _paths(photos)
    opened = Embedder(lazy=True) if embedder is None else embedder
    try:
        return update_gallery(
            *(folder, paths, opened),
            progress=progress,
            notify=notify,
            checksum=checksum,
            bits=bits,
            shard=None if shard is None else PhotoShard.parse(shard),
            regions=regions,
        )
    finally:
        if embedder is None:
            opened.close()


def add_photos(
    gallery: Gallery | PathInput,
    photos: PathInput | Iterable[PathInput],
    embedder: Embedder | None = None,
) -> IndexReport:
    """Add photos to an existing gallery, or update those that have changed.

    >>> report = add_photos("gallery.sbtk", "new.jpg")
    >>> print(report.new, report.live)
    1 7

    Args:
        gallery: the gallery's folder, or the open gallery, which must be opened again to see them.
        photos: a file or folder, or several.
        embedder: of the gallery's model; by default the included model on the fastest engine.

    Raises:
        BadGallery: there is no gallery in the folder.
        SbtkError: otherwise as `index`.
    """
    published_manifest(_folder(gallery))
    return index(photos, gallery, embedder)


def remove_photos(
    gallery: Gallery | PathInput, photos: PathInput | Iterable[PathInput]
) -> DropReport:
    """Remove photos and their embeddings from a gallery; the files are not touched.

    Indexing their folder again adds them again.

    >>> report = remove_photos("gallery.sbtk", "new.jpg")
    >>> print(report.removed, report.live)
    1 6

    Args:
        gallery: the gallery's folder, or the open gallery, which must be opened again to see it.
        photos: a file or folder, or several; all photos below a folder are removed.

    Raises:
        BadData: the gallery has no photo of that path; nothing is removed.
        BadGallery: there is no gallery in the folder, it is damaged, or cannot be written.
        GalleryBusy: another process is writing to the gallery.
    """
    return drop_photos(_folder(gallery), _paths(photos))


@dataclass(frozen=True)
class DropReport:
    """The numbers of photos that were removed from a gallery, and of those that are left."""

    removed: int
    live: int
    missing_in_all: int


def drop_photos(
    folder: Path,
    below: Path | Sequence[Path] | None = None,
    *,
    is_missing_only: bool = False,
    notify: Notify = no_notify,
) -> DropReport:
    """Remove photos and their embeddings from a gallery, and publish the rest.

    The files are not deleted; photos that a later update finds are embedded again.

    Args:
        folder: the gallery.
        below: the folders or files whose photos are removed, also from the list of folders; by
            default all photos.
        is_missing_only: remove only missing photos.
        notify: called with a sentence before a step that takes long.

    Raises:
        BadData: the gallery has no photos below `below`.
        BadGallery: the gallery is missing, damaged or not writable.
        GalleryBusy: another process is writing to it.
    """
    with translate_os_errors(folder), WriterLock(folder / LOCK_NAME):
        published = published_manifest(folder)
        with Catalogue(folder, published.generation + 1) as catalogue:
            origin = catalogue.origin()
            assert origin is not None  # there is a manifest
            vectors = open_rows(folder, origin.dim, origin.bits)
            vacuum(folder, catalogue, vectors, published)
            several = [below] if isinstance(below, Path) else below
            # Links are not resolved.
            names = (
                None if several is None else [os.fsencode(os.path.abspath(one)) for one in several]  # noqa: PTH100
            )
            if is_missing_only or names is None:
                removed = sum(
                    catalogue.remove(catalogue.ids_below(name, missing=is_missing_only))
                    for name in ((None,) if names is None else names)
                )
            else:
                known = catalogue.roots()
                for name in names:
                    if not catalogue.ids_below(name) and name not in known:
                        raise BadData(
                            f"{printable_name(folder)} has no photo below {printable_name(name)}",
                            "a folder or file of which it has photos",
                            f"sbtk index --list-folders --gallery {shlex.quote(str(folder))}",
                        )
                removed = sum(map(catalogue.forget_below, names))
            write_failures(folder, catalogue)
            publish(folder, catalogue, vectors, origin, published, notify)
            return DropReport(removed, catalogue.live(), catalogue.missing())


def _folder(gallery: Gallery | PathInput) -> Path:
    return gallery.folder if isinstance(gallery, Gallery) else Path(gallery)


def _paths(photos: PathInput | Iterable[PathInput]) -> list[Path]:
    several = [photos] if isinstance(photos, str | os.PathLike) else photos
    return [Path(photo) for photo in several]
