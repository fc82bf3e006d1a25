"""Remove photos from a gallery."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import WriterLock, printable_name
from sbtk_runtime.gallery.folder import (
    LOCK_NAME,
    open_rows,
    published_manifest,
    translate_os_errors,
    vacuum,
    write_failures,
)
from sbtk_runtime.gallery.publish import publish
from sbtk_runtime.gallery.writer import Catalogue

Notify = Callable[[str], None]


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
    notify: Notify = lambda text: None,
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
        BadGallery: there is no gallery, it is damaged, or cannot be written.
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
