"""Where the photos of a collection are mounted on this machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self
from unicodedata import normalize

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.remote import Place, RemoteFilter, unescape_path
from sbtk_runtime.gallery.sources import matching_source


class Mounts:
    """Local paths of photos that a collection stores by source and relative path.

    Attributes:
        folders: the absolute folders in which the photos of sources are mounted, by source.
    """

    def __init__(self, photos: Mapping[str, Path | str]) -> None:
        self.folders = {
            source: os.fsencode(os.path.abspath(folder))  # noqa: PTH100
            for source, folder in photos.items()
        }

    @classmethod
    def of(cls, photos: Mapping[str, Path | str], known: Collection[str], name: str) -> Self:
        """Return the mounts of sources of the collection `name`, which has the sources `known`.

        Raises:
            BadConfig: it has no such source, or one is mounted twice.
        """
        mounted: dict[str, Path | str] = {}
        for source, folder in photos.items():
            found = matching_source(source, known)
            if found is None or found in mounted:
                names = ", ".join(map(printable_name, sorted(known)[:10])) or "none"
                what = "has no source" if found is None else "has one folder here, not two, for"
                raise BadConfig(f"{name} {what} {printable_name(source)}", f"one of: {names}")
            mounted[found] = folder
        return cls(mounted)

    def path(self, source: str, escaped: str) -> str:
        """Return the path here of a photo or folder whose path there is `escaped`."""
        relative = unescape_path(escaped)
        mount = self.folders.get(source)
        # Whoever writes to the collection must not choose files outside of the mounted folder.
        if mount is None or any(part in (b".", b"..") for part in relative.split(b"/")):
            return os.fsdecode(os.fsencode(shown_source(source)) + b"/" + relative)
        return os.fsdecode(mount.rstrip(b"/") + b"/" + relative)

    def place(self, under: Path | str, sources: Iterable[str]) -> RemoteFilter | None:
        """Return the folders that a path names here; `None` if no source is there.

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
            for name in _written(source):
                if text == name.rstrip(b"/"):
                    return RemoteFilter((Place(source),))
                if text.startswith(name + b"/"):
                    return RemoteFilter((Place(source, text[len(name) + 1 :]),))
        return None


def _written(source: str) -> Iterator[bytes]:
    """Yield a source as it may be written in front of a path, in each form of Unicode."""
    for form in dict.fromkeys((source, normalize("NFC", source), normalize("NFD", source))):
        yield os.fsencode(shown_source(form))
        yield os.fsencode(form)


def shown_source(source: str) -> str:
    """Return a source as the beginning of a path, which is not one of a file on this machine."""
    return f"source:{source}"
