"""Collections in Milvus: one of photos, searched by HNSW, or exactly by what is fetched of it.

A collection NAME is NAME (photos), NAME_info (model, and what each push has left) and, of galleries
with regions, NAME_regions. Embeddings are float32 of length 1, codes binary vectors. Milvus has
neither transactions nor locks: the row of a photo is written last, so that a push that was killed
writes it again, and a claim keeps other pushes of the same photos out.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

# Before gRPC is loaded, which would write errors of connections to standard error, too.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.milvus_collections import (
    BOX,
    PHOTO,
    Document,
    Documents,
    NewestFirst,
    box_of,
    make_rows,
    parts_of,
    photo_of,
    photo_row,
    region_rows,
    rows_of_ids,
    search,
    search_all,
    upsert,
)
from sbtk_runtime.gallery.milvus_connection import (
    ANSWER_S,
    MOST_ROWS,
    MilvusConnection,
    condition,
    quoted,
)
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.region_search import CANDIDATES_PER_HIT, LEAST_CANDIDATES
from sbtk_runtime.gallery.remote import (
    EVERY_PHOTO,
    MOST_COUNTED,
    WHOLE,
    CollectionInfo,
    Notify,
    Part,
    RemoteError,
    RemoteFilter,
    RemotePhoto,
    RemoteQuery,
    RemoteRegions,
    RemoteState,
    RemoteUnavailable,
    require_same,
)
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import PhotoShard

FORMAT = 1
#: For how long a claim of another push must stay the same until it is taken over.
LEASE_S = 20.0
_BEAT_S = 2.0

Kept = TypeVar("Kept")


class MilvusStore:
    """A collection in Milvus.

    Args:
        address: where it is.
        patience_s: for how long requests to a server that does not answer are repeated.
    """

    def __init__(self, address: Address, patience_s: float) -> None:
        self._address = address
        self._patience_s = patience_s

    @property
    def address(self) -> Address:
        """Where the collection is."""
        return self._address

    def reader(self) -> _Reader:
        """Return what answers queries; see `RemoteStore`."""
        connection = self._connect()
        try:
            return _Reader(connection)
        except BaseException:
            connection.close()
            raise

    @contextlib.contextmanager
    def writing(
        self, info: CollectionInfo, source: str, shard: PhotoShard, notify: Notify
    ) -> Iterator[_Writer]:
        """Yield what changes the photos of a source, or of a shard; see `RemoteStore`."""
        with contextlib.closing(self._connect(notify)) as connection:
            documents = Documents(connection)
            make_rows(connection, info)
            documents.make()
            if "" not in documents.read("model", consistency="Strong"):
                _exclusively(
                    *(documents, self._address, notify),
                    lambda: _describe(documents, info),
                )
            require_same(_state(documents, consistency="Strong").info, info, self._address)
            claim = _Claim(documents, self._address, source, shard)
            claim.acquire(self._patience_s, notify)
            try:
                yield _Writer(connection, source, shard, claim)
            finally:
                claim.release()

    def publish(self, part: Part, notify: Notify) -> None:
        """Record what a push has left."""
        with contextlib.closing(self._connect(notify)) as connection:
            documents = Documents(connection)
            pushes = 1
            for name, document in documents.read("part", consistency="Strong").items():
                if document["source"] != part.source:
                    continue
                there = PhotoShard.parse(document["shard"])
                # Other divisions of the source are outdated.
                if there == part.shard or there.count != part.shard.count:
                    pushes += document["pushes"]
                if there.count != part.shard.count:
                    documents.delete("part", name)
            name = f"{part.shard}/{part.source}"
            documents.write("part", name, _document_of(part, pushes))
            self._show_all(connection)

    def forget(self, source: str, notify: Notify) -> None:
        """Record that nothing is left of a source."""
        with contextlib.closing(self._connect(notify)) as connection:
            documents = Documents(connection)
            parts = {
                name: document
                for name, document in documents.read("part", consistency="Strong").items()
                if document["source"] == source
            }
            # The generation must grow, also if this is killed in between.
            before = documents.read("forgotten", consistency="Strong").get(source, {"pushes": 0})
            pushes = before["pushes"] + sum(part["pushes"] for part in parts.values()) + 1
            documents.write("forgotten", source, {"pushes": pushes})
            for name in parts:
                documents.delete("part", name)
            self._show_all(connection)

    def _show_all(self, connection: MilvusConnection) -> None:
        """Make what was written visible to readers that do not wait."""
        photos = self._address.collection
        for collection in (Documents(connection).collection, photos):
            connection.count(collection, "", consistency="Strong")

    def _connect(self, notify: Notify | None = None) -> MilvusConnection:
        return MilvusConnection(self._address, self._patience_s, notify)


class _Reader:
    """What answers queries; see `RemoteReader`."""

    def __init__(self, connection: MilvusConnection) -> None:
        self._connection = connection
        self._photos = connection.address.collection
        self._regions = f"{self._photos}_regions"
        self._documents = Documents(connection)
        self._bits = self.state().info.bits

    def state(self) -> RemoteState:
        return _state(self._documents)

    def search(
        self, query: RemoteQuery, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float]]:
        if self._bits is not None:
            code = self._code(query)
            rows = search(self._connection, self._photos, code, count, among, PHOTO)
            found = [
                (photo_of(row), 1 - 2 * distance / self._bits) for row, distance in rows
            ]  # codes are always searched exactly
        else:
            vector = self._embedding(query)
            if exact:
                rows = search_all(self._connection, self._photos, vector, count, among, "id")
                scores = {row["id"]: score for row, score in rows}
                photos = self.photos(ids=list(scores)) if scores else []
                found = [(photo, scores[photo.id]) for photo in photos]
            else:
                rows = search(self._connection, self._photos, vector, count, among, PHOTO)
                found = [(photo_of(row), score) for row, score in rows]
        return sorted(found, key=lambda one: (-one[1], one[0].id))

    def search_regions(
        self, query: Embeddings, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float, Box]]:
        fields = ["photo", *BOX]
        if exact:
            rows = search_all(*(self._connection, self._regions, query, count, among, "photo", BOX))
        else:
            limit = max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * count)
            rows = search(self._connection, self._regions, query, limit, among, fields)
        best: dict[int, tuple[float, Box]] = {}
        for row, score in rows:
            best.setdefault(row["photo"], (score, box_of(row)))
        ids = list(best)[:count]
        photos = self.photos(ids=ids) if ids else []
        found = [(photo, *best[photo.id]) for photo in photos]
        return sorted(found, key=lambda one: (-one[1], one[0].id))

    def regions(self, photo_id: int) -> RemoteRegions:
        fields = ["number", *BOX, "embedding"]
        rows = self._connection.query(self._regions, f"photo == {photo_id}", fields)
        rows.sort(key=lambda row: int(row["number"]))
        return RemoteRegions(
            np.array([box_of(row) for row in rows], dtype=np.float32).reshape(-1, 4),
            np.array([row["embedding"] for row in rows], dtype=np.float32),
        )

    def photos(
        self,
        *,
        ids: Sequence[int] = (),
        sha256s: Sequence[str] = (),
        among: RemoteFilter = EVERY_PHOTO,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RemotePhoto]:
        where = condition(among)
        if not ids and not sha256s:
            listed = NewestFirst(self._connection, self._photos, where)
            return [photo_of(row) for row in listed.page(offset, limit or MOST_ROWS)]
        if ids:
            rows = rows_of_ids(self._connection, self._photos, ids, PHOTO)
        else:
            wanted = ", ".join(map(quoted, sha256s))
            pages = self._connection.rows(self._photos, f"{where} and sha256 in [{wanted}]", PHOTO)
            rows = [row for page in pages for row in page]
        return sorted(map(photo_of, rows), key=lambda photo: photo.id)[:limit]

    def count(self, among: RemoteFilter, *, undated: bool = False) -> int:
        where = condition(among) + ' and taken == ""' * undated
        return min(self._connection.count(self._photos, where), MOST_COUNTED)

    def embeddings(self, ids: Sequence[int]) -> dict[int, Embeddings]:
        rows = rows_of_ids(self._connection, self._photos, ids, ["id", "embedding"])
        return {row["id"]: np.array(row["embedding"], dtype=np.float32) for row in rows}

    def close(self) -> None:
        self._connection.close()

    def _embedding(self, query: RemoteQuery) -> Embeddings:
        if not isinstance(query, int):
            return query.astype(np.float32, copy=False)
        return self._known(query, self.embeddings([query]).get(query))

    def _code(self, query: RemoteQuery) -> bytes:
        if not isinstance(query, int):
            return query.tobytes()
        rows = rows_of_ids(self._connection, self._photos, [query], ["embedding"])
        return bytes(self._known(query, rows[0]["embedding"][0] if rows else None))

    def _known(self, photo_id: int, kept: Kept | None) -> Kept:
        if kept is None:
            raise RemoteError(f"the collection has no photo {photo_id}", "the id of a hit")
        return kept


class _Writer:
    """What a push changes; see `RemoteWriter`."""

    def __init__(
        self, connection: MilvusConnection, source: str, shard: PhotoShard, claim: _Claim
    ) -> None:
        self._connection = connection
        self._photos = connection.address.collection
        self._regions = f"{self._photos}_regions"
        self._source = source
        self._shard = shard
        self._claim = claim
        self._has_regions = bool(
            connection.run(lambda client: client.has_collection(self._regions, timeout=ANSWER_S))
        )

    def stamps(self) -> Iterator[tuple[int, int]]:
        hashes = self._shard.hashes()
        pages = self._connection.rows(
            self._photos,
            f"source == {quoted(self._source)}",
            ["id", "stamp"],
            consistency="Strong",
            low=hashes.start,
            high=hashes.stop - 1,
        )
        for page in pages:
            for row in page:
                yield row["id"], row["stamp"]

    def put(
        self,
        photos: Sequence[RemotePhoto],
        rows: NDArray[np.generic],
        regions: Sequence[RemoteRegions] = (),
    ) -> int:
        self._claim.check()
        ids = [photo.id for photo in photos]
        others = {photo.id: (photo.source, photo.path) for photo in photos}
        there = rows_of_ids(
            *(self._connection, self._photos, ids, ["id", "source", "path"]), consistency="Strong"
        )
        taken = {row["id"] for row in there if others[row["id"]] != (row["source"], row["path"])}
        new = [photo_row(photo, row) for photo, row in zip(photos, rows, strict=True)]
        if regions:
            parts = [
                one
                for photo, kept in zip(new, regions, strict=True)
                if photo["id"] not in taken
                for one in region_rows(photo, kept)
            ]
            self._delete_regions([number for number in ids if number not in taken])
            upsert(self._connection, self._regions, parts)
        new = [photo for photo in new if photo["id"] not in taken]
        upsert(self._connection, self._photos, new)
        return len(new)

    def delete(self, ids: Sequence[int]) -> None:
        self._claim.check()
        if self._has_regions:
            self._delete_regions(ids)
        for part in parts_of(ids):
            self._connection.delete(self._photos, f"id in {part}")

    def _delete_regions(self, ids: Sequence[int]) -> None:
        # Panoramas have hundreds of regions, of which so many may be deleted at once.
        for part in parts_of(ids, 100):
            self._connection.delete(self._regions, f"photo in {part}")


class _Claim:
    """The right to change the photos of a source, or of a shard of it.

    A push writes a claim, and continues if it then sees no other one. It renews the claim every few
    seconds; one that stays the same for `LEASE_S` belongs to a push that was killed, and is taken
    over. Clocks of other machines do not matter: each push measures how long it has seen no change.

    Args:
        documents: of the collection.
        address: for messages.
        source: the source.
        shard: `WHOLE` excludes all shards of the source; they do not exclude each other.
    """

    def __init__(
        self, documents: Documents, address: Address, source: str, shard: PhotoShard
    ) -> None:
        self._documents = documents
        self._address = address
        self._source = source
        self._shard = shard
        self._name = f"{shard}/{secrets.token_hex(16)}"
        self._beats = 0
        self._beaten_s = 0.0
        self._is_lost = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience_s: float, notify: Notify) -> None:
        """Wait until no other push holds a claim, at most `patience_s` for one that goes on.

        Raises:
            RemoteUnavailable: another push of these photos runs.
        """
        ends = time.monotonic() + patience_s
        seen: dict[str, tuple[object, float]] = {}
        is_told = False
        while True:
            others = self._others()
            if not others:
                self._write(is_held=False)
                others = self._others()
                if not others:
                    self._write(is_held=True)
                    break
                # Both have seen each other: both give way, and not for the same time.
                self._documents.delete("claim", self._name)
            now, is_alive = time.monotonic(), False
            for name, other in others.items():
                last, since = seen.setdefault(name, (other["beats"], now))
                if last != other["beats"]:
                    is_alive = True
                    seen[name] = (other["beats"], now)
                elif now - since > LEASE_S:
                    self._documents.delete("claim", name)
            if is_alive and now > ends:
                raise RemoteUnavailable(
                    f"another push of these photos to {self._address.shown} is running",
                    "one push at a time of a source, or of a shard of it",
                    "wait until it ends, then run the same command again",
                )
            if not is_told:
                notify("waiting for another push of these photos, or for what a killed one left")
                is_told = True
            time.sleep(_BEAT_S * random.uniform(0.3, 0.6))  # noqa: S311
        self._thread = threading.Thread(target=self._renew, name="sbtk-claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the claim still holds.

        Raises:
            RemoteError: this process was suspended for so long that another push took over.
        """
        if time.monotonic() - self._beaten_s > LEASE_S and not self._is_lost:
            self._confirm()
        if self._is_lost:
            raise RemoteError(
                f"{self._address.shown} did not hear of this push for more than {LEASE_S:.0f} s, "
                "and another one took over",
                "",
                "run the same command again: it resumes",
            )

    def release(self) -> None:
        """End the claim; other pushes may go on at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * _BEAT_S)
        with contextlib.suppress(SbtkError):
            self._documents.delete("claim", self._name)

    def _write(self, *, is_held: bool) -> None:
        self._beats += 1
        now = time.monotonic()
        document = {
            "source": self._source,
            "shard": str(self._shard),
            "beats": self._beats,
            "is_held": is_held,
        }
        self._documents.write("claim", self._name, document)
        self._beaten_s = now

    def _others(self) -> dict[str, Document]:
        """Return the claims that exclude this one."""
        return self._excluding(self._documents.read("claim", consistency="Strong"))

    def _excluding(self, found: dict[str, Document]) -> dict[str, Document]:
        own = str(self._shard)
        return {
            name: claim
            for name, claim in found.items()
            if name != self._name
            and claim["source"] == self._source
            and (claim["shard"] == own or str(WHOLE) in (claim["shard"], own))
        }

    def _confirm(self) -> None:
        """Renew the claim, unless another push took it for one of a killed push."""
        found = self._documents.read("claim", consistency="Strong")
        taken = any(other["is_held"] for other in self._excluding(found).values())
        if taken or self._name not in found:
            self._is_lost = True
        else:
            self._write(is_held=True)

    def _renew(self) -> None:
        while not self._is_lost and not self._ended.wait(_BEAT_S):
            with contextlib.suppress(RemoteError):  # `check` asks again, and raises
                self._confirm()


def _exclusively(
    documents: Documents, address: Address, notify: Notify, work: Callable[[], None]
) -> None:
    """Run what only one push may do at a time, such as making the collection."""
    # No source has an empty name.
    claim = _Claim(documents, address, "", WHOLE)
    claim.acquire(LEASE_S, notify)
    try:
        work()
    finally:
        claim.release()


def _describe(documents: Documents, info: CollectionInfo) -> None:
    """Write what the collection holds, unless another push has."""
    if "" in documents.read("model", consistency="Strong"):
        return
    codes = None if info.itq is None else base64.b64encode(info.itq.to_bytes()).decode()
    document: Document = {
        "format": FORMAT,
        "model_id": info.model_id,
        "preprocessing": info.preprocessing,
        "precision": info.precision,
        "dim": info.dim,
        "bits": info.bits,
        "itq": codes,
        "regions": info.regions,
    }
    documents.write("model", "", document)


def _state(documents: Documents, *, consistency: str = "Bounded") -> RemoteState:
    found = documents.read("model", consistency=consistency).get("")
    shown = documents.address.shown
    if found is None or found["format"] > FORMAT:
        what = "is incomplete" if found is None else f"has format {found['format']}"
        raise RemoteError(
            f"the collection {shown} {what}",
            f"one of format {FORMAT}, as this version of sbtk makes them",
            "push to it, update sbtk, or push to another collection: --at '...?collection=NAME'",
        )
    codes = found["itq"]
    info = CollectionInfo(
        *(found["model_id"], found["preprocessing"], found["precision"], found["dim"]),
        bits=found["bits"],
        itq=None if codes is None else Itq.from_bytes(base64.b64decode(codes)),
        regions=found["regions"],
    )
    parts = documents.read("part", consistency=consistency)
    forgotten = documents.read("forgotten", consistency=consistency)
    return RemoteState(
        info,
        sum(one["pushes"] for one in (*parts.values(), *forgotten.values())),
        tuple(_part_of(parts[name]) for name in sorted(parts)),
    )


def _document_of(part: Part, pushes: int) -> Document:
    mean = part.region_mean
    return {
        "source": part.source,
        "shard": str(part.shard),
        "photos": part.photos,
        "folders": part.folders,
        "regions": part.regions,
        "region_mean": None if mean is None else mean.tolist(),
        "has_dates": part.has_dates,
        "pushes": pushes,
    }


def _part_of(document: Document) -> Part:
    mean = document["region_mean"]
    return Part(
        *(document["source"], PhotoShard.parse(document["shard"])),
        *(document["photos"], document["folders"], document["regions"]),
        None if mean is None else np.array(mean, dtype=np.float32),
        document["has_dates"],
    )
