"""Publish a generation: sign codes, the search graph and, last of all, the manifest."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np

from sbtk_runtime.engines.base import Notify
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.files import count_text
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.folder import has_snapshot, vacuum
from sbtk_runtime.gallery.hnsw import (
    INSTALL_HNSWLIB,
    Graph,
    add_rows,
    build_graph,
    check_graph_file,
    has_hnswlib,
)
from sbtk_runtime.gallery.neighbours import update_neighbours
from sbtk_runtime.gallery.rows import CodeShards, Vectors
from sbtk_runtime.gallery.sign_codes import update_codes
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import GalleryManifest, GraphRecord, RegionsRecord

#: A graph with more than this share of deleted rows is rebuilt.
MOST_DEAD = 0.2

_PROBES = 32


def publish(
    folder: Path,
    catalogue: Catalogue,
    vectors: Vectors | CodeShards,
    origin: Origin,
    published: GalleryManifest | None,
    notify: Notify,
) -> GalleryManifest:
    """Publish the catalogue's generation, if it differs from the published one.

    Readers see either the published generation or all of the new one.

    Args:
        folder: the gallery's.
        catalogue: the writer's; its generation is the one to publish.
        vectors: the rows that the catalogue names, on disk.
        origin: what made them.
        published: the generation that readers have now.
        notify: called with a sentence before a step that takes long.

    Returns:
        the manifest that is published now.
    """
    is_next = published is not None and catalogue.generation == published.generation + 1
    graph = codes = None
    if isinstance(vectors, Vectors) and catalogue.live():
        previous = published if is_next else None
        old_codes, old_graph = (previous.codes, previous.graph) if previous else (None, None)
        codes = update_codes(folder, catalogue, vectors, old_codes, notify)
        # Regions are found by codes, and whole frames then are too.
        if catalogue.region_count() is None:
            graph = update_graph(folder, catalogue, vectors, old_graph, notify)
        update_neighbours(folder, vectors, catalogue.live_rows(), notify)
    count = catalogue.region_count()
    regions = None if count is None else RegionsRecord(count, catalogue.live_region_rows())
    is_same = published is not None and (
        (graph, codes, regions) == (published.graph, published.codes, published.regions)
    )
    if is_same and not catalogue.is_changed() and has_snapshot(folder, published):
        assert published is not None
        return published
    manifest = GalleryManifest(
        generation=catalogue.generation,
        model_id=origin.model_id,
        precision=origin.precision,
        dim=origin.dim,
        preprocessing=origin.preprocessing,
        live=catalogue.live(),
        graph=graph,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bits=origin.bits,
        snapshot=catalogue.write_snapshot(),
        codes=codes,
        shard=origin.shard,
        regions=regions,
    )
    manifest.write(folder)
    vacuum(folder, catalogue, vectors, manifest)
    return manifest


def update_graph(
    folder: Path,
    catalogue: Catalogue,
    vectors: Vectors,
    previous: GraphRecord | None,
    notify: Notify,
) -> GraphRecord | None:
    """Return the record of a graph file of the photos in the catalogue's generation.

    Below `hnsw.GRAPH_FROM` photos there is none. Without hnswlib it is the previous one if nothing
    has changed, and otherwise `None`.

    The previous file stays as it is; its content is reused if it is intact and few of its rows are
    deleted. There is only one graph in memory.

    Raises:
        DiskFull: there is no space for the file.
        BadGallery: the file system does not keep what is written.
    """
    live = catalogue.count_live_rows()
    if live < hnsw.GRAPH_FROM:
        return None
    if previous is not None and not _is_intact(folder, previous, vectors.dim, notify):
        previous = None
    additions = catalogue.count_to_add()
    if previous is not None and not additions and not any(True for _ in catalogue.rows_to_drop()):
        return previous
    if not has_hnswlib():
        notify(f"no search graph: hnswlib is not installed ({INSTALL_HNSWLIB})")
        return None
    graph = None
    if previous is not None:
        total = previous.count + additions
        if total - live <= MOST_DEAD * total:
            notify(f"adding {count_text(additions, 'photo')} to the graph")
            graph = _extend(folder, catalogue, vectors, previous, additions)
    if graph is None:
        notify(f"building the graph of {live:,} photos")
        graph = build_graph(vectors, catalogue.live_rows())
    rows = np.array(catalogue.sample_rows(_PROBES), dtype=np.int64)
    embeddings, is_whole = vectors.read(rows)
    path = folder / f"graph-{catalogue.generation}.hnsw"
    return graph.save(path, (rows[is_whole], embeddings[is_whole]))


def _is_intact(folder: Path, record: GraphRecord, dim: int, notify: Notify) -> bool:
    try:
        check_graph_file(folder / record.file, record, dim)
    except BadGallery as problem:
        notify(f"{problem.found}: the graph is rebuilt")
        return False
    return True


def _extend(
    folder: Path, catalogue: Catalogue, vectors: Vectors, previous: GraphRecord, additions: int
) -> Graph | None:
    """Return the previous graph without deleted rows and with new ones; `None` if it is damaged."""
    try:
        graph = Graph.load(folder, previous, vectors.dim, room_for=additions)
    except BadGallery:
        return None
    graph.drop(catalogue.rows_to_drop())
    add_rows(graph, vectors, catalogue.rows_to_add())
    return graph
