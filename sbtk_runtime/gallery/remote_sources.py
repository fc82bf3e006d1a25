"""The sources of a collection: what there is of each, where its photos are here, its removal."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from unicodedata import normalize

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.divisions import other_shards
from sbtk_runtime.gallery.remote import (
    WHOLE,
    Notify,
    Place,
    RemoteFilter,
    RemoteState,
    RemoteStore,
    same_source,
    unescape_path,
)

#: Called with the number of photos done and their total.
Progress = Callable[[int, int], None]

_BATCH = 1000


@dataclass(frozen=True)
class Source:
    """What pushes have left of a source.

    Attributes:
        name: its name.
        photos: the number of its photos.
        shards: the shards that were pushed, such as "1/4"; none of a source that is not divided.
        absent_shards: the other ones, whose photos are not there, or of an older division.
    """

    name: str
    photos: int
    shards: tuple[str, ...] = ()
    absent_shards: tuple[str, ...] = ()


def list_sources(store: RemoteStore) -> list[Source]:
    """Return the sources of a collection, by name.

    Raises:
        RemoteError: there is no such collection, or the database refuses.
    """
    with closing(store.reader()) as reader:
        return _sources_of(reader.state())


def count_source(store: RemoteStore, name: str) -> Source:
    """Return a source with the number of its photos as they are counted now.

    Also one of which a push that was killed has left photos.

    Raises:
        BadConfig: there is none.
        RemoteError: there is no such collection, or the database refuses.
    """
    with closing(store.reader()) as reader:
        known = {one.name: one for one in _sources_of(reader.state())}
        found = _matching_source(name, known) or same_source(name)
        photos = reader.count(RemoteFilter((Place(found),)))
    if found not in known and not photos:
        names = ", ".join(map(printable_name, sorted(known)[:10])) or "none, it is empty"
        more = f" and {len(known) - 10:,} more" if len(known) > 10 else ""
        raise BadConfig(
            f"{store.address.shown} has no source {printable_name(name) or repr(name)}",
            f"one of: {names}{more}",
            "sbtk push --list-sources --at URL",
        )
    return Source(found, photos)


def remove_source(
    store: RemoteStore,
    source: Source,
    *,
    progress: Progress = lambda done, total: None,
    notify: Notify = lambda text: None,
) -> int:
    """Remove the photos of a source for good, and return how many there were.

    One that was interrupted resumes: photos that are left are still listed.

    Args:
        store: the collection.
        source: as `count_source` returns it.
        progress: called after each batch.
        notify: called with a sentence before a step that takes long.

    Raises:
        RemoteError: the database refuses, or a push of the source runs.
    """
    with closing(store.reader()) as reader:
        info = reader.state().info
    removed = 0
    with store.writing(info, source.name, WHOLE, notify) as writer:
        numbers = (number for number, _ in writer.stamps())
        while part := list(itertools.islice(numbers, _BATCH)):
            writer.delete(part)
            removed += len(part)
            progress(removed, max(removed, source.photos))
        store.forget(source.name, notify)
    return removed


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
            found = _matching_source(source, known)
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


def _sources_of(state: RemoteState) -> list[Source]:
    """Return the sources of a collection, by name."""
    found = []
    for name, parts in itertools.groupby(
        sorted(state.parts, key=lambda part: part.source), key=lambda part: part.source
    ):
        held = {part.shard: part.photos for part in parts}
        shards = tuple(map(str, sorted(held, key=lambda shard: (shard.count, shard.index))))
        found.append(
            Source(
                name,
                sum(held.values()),
                () if set(held) == {WHOLE} else shards,
                tuple(map(str, other_shards(held))),
            )
        )
    return found


def _matching_source(name: str, known: Collection[str]) -> str | None:
    """Return the known source of that name, in whatever form of Unicode it is written."""
    if name in known:
        return name
    return next((one for one in sorted(known) if same_source(one) == same_source(name)), None)
