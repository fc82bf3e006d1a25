"""The sources of a collection: what there is of each, and how one is removed for good."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass

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


def sources_of(state: RemoteState) -> list[Source]:
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


def list_sources(store: RemoteStore) -> list[Source]:
    """Return the sources of a collection, by name.

    Raises:
        RemoteError: there is no such collection, or the database refuses.
    """
    with closing(store.reader()) as reader:
        return sources_of(reader.state())


def matching_source(name: str, known: Collection[str]) -> str | None:
    """Return the known source of that name, in whatever form of Unicode it is written."""
    if name in known:
        return name
    return next((one for one in sorted(known) if same_source(one) == same_source(name)), None)


def count_source(store: RemoteStore, name: str) -> Source:
    """Return a source with the number of its photos as they are counted now.

    Also one of which a push that was killed has left photos.

    Raises:
        BadConfig: there is none.
        RemoteError: there is no such collection, or the database refuses.
    """
    with closing(store.reader()) as reader:
        known = {one.name: one for one in sources_of(reader.state())}
        found = matching_source(name, known) or same_source(name)
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
