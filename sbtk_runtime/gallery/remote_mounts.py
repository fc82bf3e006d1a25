"""Where the photos of a collection are mounted on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sbtk_runtime.gallery.remote import Place, RemoteFilter, unescape_path


class Mounts:
    """Paths here of photos that a collection knows by source and relative path.

    Attributes:
        folders: the absolute folders in which the photos of sources are mounted, by source.
    """

    def __init__(self, photos: Mapping[str, Path | str]) -> None:
        self.folders = {
            source: os.fsencode(os.path.abspath(folder))  # noqa: PTH100
            for source, folder in photos.items()
        }

    def path(self, source: str, escaped: str) -> str:
        """Return the path here of a photo or folder whose path there is `escaped`."""
        relative = unescape_path(escaped)
        mount = self.folders.get(source)
        # Whoever writes to the collection must not choose files outside of the mounted folder.
        if mount is None or any(part in (b".", b"..") for part in relative.split(b"/")):
            return os.fsdecode(os.fsencode(shown_source(source)) + b"/" + relative)
        return os.fsdecode(mount.rstrip(b"/") + b"/" + relative)

    def place(self, under: Path | str, sources: Iterable[str]) -> RemoteFilter | None:
        """Return the folders that a path names here; `None` if it is in no source, nor above one.

        Sources may be mounted below it, in it, or in each other.
        """
        path = os.fsencode(os.path.abspath(under)).rstrip(b"/") + b"/"  # noqa: PTH100
        places = []
        for source, folder in self.folders.items():
            mount = folder.rstrip(b"/") + b"/"
            if path.startswith(mount):
                places.append(Place(source, path[len(mount) : -1]))
            elif mount.startswith(path):
                places.append(Place(source))
        if places:
            return RemoteFilter(tuple(places))
        text = os.fsencode(under).rstrip(b"/")
        for source in sorted(sources, key=len, reverse=True):
            for name in (os.fsencode(shown_source(source)), os.fsencode(source)):
                if text == name.rstrip(b"/"):
                    return RemoteFilter((Place(source),))
                if text.startswith(name + b"/"):
                    return RemoteFilter((Place(source, text[len(name) + 1 :]),))
        return None


def shown_source(source: str) -> str:
    """Return a source as the beginning of a path, which is not one of a file on this machine."""
    return f"source:{source}"
