"""Collections in Milvus: one of photos, searched by HNSW, or exactly by what is fetched of it.

A collection NAME is NAME (photos), NAME_info (model, and what each push has left) and, of galleries
with regions, NAME_regions. Embeddings are float32 of length 1, codes binary vectors. Milvus has
neither transactions nor locks: the row of a photo is written last, so that a push that was killed
writes it again, and `milvus_claim` keeps pushes apart.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

# Before gRPC is loaded, which would write errors of connections to standard error, too.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.gallery.hits import Box
from sbtk_runtime.gallery.milvus_claim import Claim, exclusively
from sbtk_runtime.gallery.milvus_connection import (
    ANSWER_S,
    MOST_ROWS,
    MilvusConnection,
    condition,
    quoted,
)
from sbtk_runtime.gallery.milvus_documents import Document, Documents
from sbtk_runtime.gallery.milvus_rows import (
    BOX,
    PHOTO,
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
from sbtk_runtime.gallery.region_search import CANDIDATES_PER_HIT, LEAST_CANDIDATES
from sbtk_runtime.gallery.remote import (
    EVERY_PHOTO,
    MOST_COUNTED,
    CollectionInfo,
    Notify,
    Part,
    RemoteError,
    RemoteFilter,
    RemotePhoto,
    RemoteQuery,
    RemoteRegions,
    RemoteState,
    require_same,
)
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import PhotoShard

FORMAT = 1

Kept = TypeVar("Kept")


class MilvusStore:
    """A collection in Milvus.

    Args:
        address: where it is.
        patience_s: for how long a server that does not answer is asked again.
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
        connection = MilvusConnection(self._address, self._patience_s)
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
        with contextlib.closing(MilvusConnection(self._address, self._patience_s)) as connection:
            documents = Documents(connection)
            make_rows(connection, info)
            documents.make()
            if "" not in documents.read("model", consistency="Strong"):
                exclusively(
                    *(documents, self._address, notify),
                    lambda: _describe(documents, info),
                )
            require_same(_state(documents, consistency="Strong").info, info, self._address)
            claim = Claim(documents, self._address, source, shard)
            claim.acquire(self._patience_s, notify)
            try:
                yield _Writer(connection, source, shard, claim)
            finally:
                claim.release()

    def publish(self, part: Part, notify: Notify) -> None:
        """Record what a push has left."""
        with contextlib.closing(MilvusConnection(self._address, self._patience_s)) as connection:
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
            # Who reads without waiting sees from now on what was written.
            for collection in (documents.collection, self._address.collection):
                connection.count(collection, "", consistency="Strong")


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
            ]  # of codes there is no other search than an exact one
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
        self, connection: MilvusConnection, source: str, shard: PhotoShard, claim: Claim
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
    return RemoteState(
        info,
        sum(part["pushes"] for part in parts.values()),
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
