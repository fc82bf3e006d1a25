"""One generation of a gallery, open for reading all of it: to copy or to push its photos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import GalleryBusy
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.folder import open_published, open_rows
from sbtk_runtime.gallery.row_check import RowCheck
from sbtk_runtime.gallery.rows import CodeShards, Vectors
from sbtk_runtime.manifest import GalleryManifest, read_gallery_manifest

_ATTEMPTS = 5


@dataclass(frozen=True)
class Generation:
    """An open generation.

    Attributes:
        manifest: of the generation.
        view: its photos.
        rows: their embeddings or codes.
        check: of their checksums.
    """

    manifest: GalleryManifest
    view: CatalogueView
    rows: Vectors | CodeShards
    check: RowCheck


@contextlib.contextmanager
def open_generation(folder: Path, note: Callable[[str], None]) -> Iterator[Generation]:
    """Yield the newest published generation, which later writes do not change.

    `note` is called with sentences about damaged files of the gallery.

    Raises:
        BadGallery: there is no gallery, or it is damaged beyond reading.
        GalleryBusy: it changes faster than it can be opened.
    """
    for _ in range(_ATTEMPTS):
        manifest, view = open_published(folder, note)
        with closing(view), closing(open_rows(folder, manifest.dim, manifest.bits)) as rows:
            rows.hold()
            # A writer that published in between may have removed shards before they were held.
            if read_gallery_manifest(folder) == manifest:
                yield Generation(manifest, view, rows, RowCheck(view, rows))
                return
    raise GalleryBusy(
        f"{printable_name(folder)} changes faster than it can be read", "", "try again"
    )
