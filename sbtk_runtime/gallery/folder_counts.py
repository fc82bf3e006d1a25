"""How many photos a gallery has below each folder that was indexed."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.gallery.folder import open_published


@dataclass(frozen=True)
class FolderCount:
    """A folder or file that was indexed, and the photos of the gallery below it.

    Attributes:
        path: absolute.
        photos: that can be found.
        missing: that are kept, but were not found on disk.
        exists: whether there is something at the path now.
    """

    path: bytes
    photos: int
    missing: int
    exists: bool


def folder_counts(folder: Path) -> list[FolderCount]:
    """Returns the indexed folders of the gallery in `folder`, by path.

    A photo counts for the innermost of them. Photos below none, as an older sbtk did not note what
    it was given, count for the folder that they lie in.

    Raises:
        BadGallery: there is no gallery, or it is damaged.
    """
    with closing(open_published(folder, lambda text: None)[1]) as view:
        roots = set(view.roots())
        photos, missing = view.paths(), view.paths(missing=True)
        counts = Counter(_root_of(path, roots) for path in photos)
        missing_counts = Counter(_root_of(path, roots) for path in missing)
    return [
        FolderCount(path, counts[path], missing_counts[path], os.path.lexists(path))
        for path in sorted(roots | set(counts) | set(missing_counts))
    ]


def _root_of(path: bytes, roots: set[bytes]) -> bytes:
    above = path
    while above not in roots:
        parent = above.rpartition(b"/")[0] or b"/"
        if parent == above:
            return path.rpartition(b"/")[0] or b"/"
        above = parent
    return above
