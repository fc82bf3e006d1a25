"""Publish a generation: sign codes, the graph and, last of all, the manifest."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.folder import has_snapshot, vacuum
from sbtk_runtime.gallery.graph import update_graph
from sbtk_runtime.gallery.neighbours import update_neighbours
from sbtk_runtime.gallery.rows import CodeShards, Vectors
from sbtk_runtime.gallery.sign_codes import update_codes
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import GalleryManifest, RegionsRecord

Notify = Callable[[str], None]


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
