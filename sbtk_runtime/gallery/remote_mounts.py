"""Where the photos of a collection are mounted on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sbtk_runtime.gallery.remote import RemoteFilter, unescape_path


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
        """Return the folder that a path names here; `None` if it is in no source."""
        path = os.fsencode(os.path.abspath(under))  # noqa: PTH100
        for source, mount in self.folders.items():
            if path == mount:
                return RemoteFilter(source)
            if path.startswith(mount.rstrip(b"/") + b"/"):
                return RemoteFilter(source, path[len(mount.rstrip(b"/")) + 1 :])
        text = os.fsencode(under).rstrip(b"/")
        for source in sorted(sources, key=len, reverse=True):
            for name in (os.fsencode(shown_source(source)), os.fsencode(source)):
                if text == name.rstrip(b"/"):
                    return RemoteFilter(source)
                if text.startswith(name + b"/"):
                    return RemoteFilter(source, text[len(name) + 1 :])
        return None


def shown_source(source: str) -> str:
    """Return a source as the beginning of a path, which is not one of a file on this machine."""
    return f"source:{source}"
