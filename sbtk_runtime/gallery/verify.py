"""Verify a gallery: hashes, rows, and whether photos find themselves."""

from __future__ import annotations

import contextlib
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_runtime.engines.base import Notify, no_notify
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.files import WriterLock, count_text
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.folder import (
    LOCK_NAME,
    kept_text,
    open_published,
    open_rows,
)
from sbtk_runtime.gallery.hnsw import Graph, check_graph_file, has_hnswlib
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME, load_neighbours
from sbtk_runtime.gallery.row_check import RowCheck
from sbtk_runtime.gallery.rows import CodeShards, Embeddings, Rows, Vectors
from sbtk_runtime.gallery.search import exact_search, hamming_search
from sbtk_runtime.gallery.sign_codes import SignCodes, count_wrong_codes
from sbtk_runtime.gallery.soundness import STAMP_NAME
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import GalleryManifest

#: The share of sampled photos that must find themselves; HNSW may miss a few.
LEAST_FOUND = 0.99

_SAME_SCORE = 1.0 - 1e-4
_EXACT_SAMPLES = 16
_REMAKE_CODES = (
    "'sbtk index --verify --repair' removes them, and 'sbtk index' on your photos makes them again"
)


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a gallery.

    Attributes:
        generation: the verified generation.
        live: number of searchable photos.
        sampled: number of photos that were searched for by their own embeddings.
        found: how many of these were found, by the graph or by exact search.
        problems: what is wrong, in sentences.
        repaired: number of photos that were dropped, and that the next `sbtk index` embeds again.
        repaired_regions: number of photos whose regions were dropped in the same way.
        bits: length of the codes of a binary gallery.
        by_graph: whether the graph was searched; it needs hnswlib.
    """

    generation: int
    live: int
    sampled: int
    found: int
    problems: tuple[str, ...]
    repaired: int = 0
    repaired_regions: int = 0
    bits: int | None = None
    by_graph: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_gallery(
    folder: Path,
    *,
    samples: int = 256,
    repair: bool = False,
    notify: Notify = no_notify,
) -> VerifyReport:
    """Return what is wrong with the published generation of a gallery.

    Args:
        folder: the gallery's.
        samples: number of photos to search for by their own embeddings.
        repair: drop photos whose embeddings are damaged, so that the next `sbtk index` of their
            folders embeds them again, and remove damaged files that it can make again.
        notify: called with a sentence before each step.

    Raises:
        BadGallery: the manifest or the catalogue cannot be read at all.
        GalleryBusy: with `repair`, another process is writing.
    """
    with contextlib.ExitStack() as held:
        if repair:
            # No writer may intervene between the check of a row and its removal.
            held.enter_context(WriterLock(folder / LOCK_NAME))
        return _verify(folder, samples, repair, notify)


def _verify(folder: Path, samples: int, repair: bool, notify: Notify) -> VerifyReport:
    problems: list[str] = []
    manifest, view = open_published(folder, problems.append, is_hashed=True)
    with closing(view):
        _check_catalogue(folder, manifest, problems)
        held, said = kept_text(view.dim(), view.bits()), kept_text(manifest.dim, manifest.bits)
        if held != said:
            problems.append(f"the manifest says {said}, the catalogue {held}")
            return VerifyReport(manifest.generation, manifest.live, 0, 0, tuple(problems))
        rows = view.rows()
        if (count := view.count()) != manifest.live:
            problems.append(f"the manifest says {manifest.live:,} photos, the catalogue {count:,}")
        notify("checking the vectors")
        vectors = open_rows(folder, manifest.dim, manifest.bits)
        if manifest.bits is not None:
            _check_itq(view, problems)
        damaged = _find_damaged_rows(view, vectors, rows)
        lost = view.count_at(damaged)
        spans = view.region_spans()
        damaged_regions = _find_damaged_rows(view, vectors, spans.rows())
        regions_lost = len(np.unique(spans.owners(damaged_regions)))
    if lost:
        reasons = "".join(f" ({text})" for text in sorted(set(vectors.problems.values())))
        what = "cannot be used" if vectors.remedy else "are damaged or missing"
        problems.append(f"the embeddings of {count_text(lost, 'photo')} {what}{reasons}")
    if regions_lost:
        problems.append(f"regions of {count_text(regions_lost, 'photo')} are damaged or missing")
    notify("searching for sampled photos by their own embeddings")
    intact = np.setdiff1d(rows, damaged, assume_unique=True)
    chosen = np.random.default_rng(0).choice(intact, min(samples, len(intact)), replace=False)
    sample = np.sort(chosen)
    by_graph = manifest.graph is not None and has_hnswlib()
    coded = np.union1d(intact, np.setdiff1d(spans.rows(), damaged_regions))
    if isinstance(vectors, Vectors):
        if by_graph:
            found = _count_found_by_graph(
                folder, manifest, sample, vectors.read(sample)[0], problems
            )
            _check_exact(vectors, intact, sample[:_EXACT_SAMPLES], problems)
        else:
            _check_graph_file(folder, manifest, problems)
            found = _count_found_exactly(vectors, intact, sample, problems)
        _check_codes(folder, manifest, vectors, coded, problems)
        _check_neighbours(folder, vectors, problems)
    else:
        found = _count_found_by_code(vectors, intact, sample, problems)
    # Unpublished photos are included.
    repaired, repaired_regions = _forget(folder, manifest) if repair else (0, 0)
    if repair:
        _remove_damaged(folder, manifest, vectors, coded)
    return VerifyReport(
        generation=manifest.generation,
        live=manifest.live,
        sampled=len(sample),
        found=found,
        problems=tuple(problems),
        repaired=repaired,
        repaired_regions=repaired_regions,
        bits=manifest.bits,
        by_graph=by_graph,
    )


def _check_neighbours(folder: Path, vectors: Vectors, problems: list[str]) -> None:
    """Check the neighbours for re-ranking, if the gallery has any."""
    if not (folder / NEIGHBOURS_NAME).exists():
        return
    try:
        load_neighbours(folder, vectors.dim)
    except BadGallery as problem:
        problems.append(f"{problem.found}; 'sbtk index' on your photos makes it again")


def _check_codes(
    folder: Path,
    manifest: GalleryManifest,
    vectors: Vectors,
    rows: Rows,
    problems: list[str],
) -> None:
    """Compare the sign codes with the embeddings.

    No photos are searched for by them: with right codes, a photo may miss itself among a thousand
    photos that are nearly the same.
    """
    if manifest.codes is None:
        return
    try:
        codes = SignCodes.load(folder, manifest.codes, manifest.dim, is_hashed=True)
    except BadGallery as problem:
        problems.append(f"{problem.found}; {_REMAKE_CODES}")
        return
    if wrong := count_wrong_codes(codes, vectors, rows):
        problems.append(f"the sign codes of {wrong:,} photos are wrong; {_REMAKE_CODES}")


def _check_catalogue(folder: Path, manifest: GalleryManifest, problems: list[str]) -> None:
    """Check the writer's catalogue; the readers' snapshot was checked by its SHA-256."""
    try:
        with closing(CatalogueView(folder, manifest.generation)) as view:
            if damage := view.damage():
                problems.append(f"the catalogue is damaged: {damage}")
    except BadGallery as problem:
        if manifest.snapshot is None:
            raise
        problems.append(problem.found)


def _check_itq(view: CatalogueView, problems: list[str]) -> None:
    try:
        view.itq()
    except BadGallery as problem:
        problems.append(f"{problem.found}; {problem.next_step}")


def _find_damaged_rows(view: CatalogueView, vectors: Vectors | CodeShards, rows: Rows) -> Rows:
    """Return the rows whose bytes have changed, or that are not unit rows."""
    is_intact = RowCheck(view, vectors).is_intact(rows)
    start = 0
    for numbers, _, is_whole in vectors.chunks(rows):
        is_intact[start : start + len(numbers)] &= is_whole
        start += len(numbers)
    return rows[~is_intact]


def _count_found_by_graph(
    folder: Path,
    manifest: GalleryManifest,
    rows: Rows,
    embeddings: Embeddings,
    problems: list[str],
) -> int:
    """Return the number of rows that the graph finds by their own embeddings."""
    assert manifest.graph is not None
    try:
        graph = Graph.load(folder, manifest.graph, manifest.dim)
    except BadGallery as problem:
        problems.append(f"{problem.found}; 'sbtk index' on your photos builds the graph again")
        return 0
    found = sum(_finds(graph.search(embedding, 1)[1]) for embedding in embeddings)
    if found < LEAST_FOUND * len(rows):
        problems.append(f"the graph finds {found:,} of {len(rows):,} photos by their embeddings")
    return found


def _check_graph_file(folder: Path, manifest: GalleryManifest, problems: list[str]) -> None:
    """Check the file of a graph that cannot be searched here."""
    if manifest.graph is None:
        return
    try:
        check_graph_file(folder / manifest.graph.file, manifest.graph, manifest.dim)
    except BadGallery as problem:
        problems.append(f"{problem.found}; 'sbtk index' on your photos builds the graph again")


def _count_found_exactly(vectors: Vectors, rows: Rows, sample: Rows, problems: list[str]) -> int:
    """Return the number of sampled photos that find themselves by exact search."""
    embeddings = vectors.read(sample)[0]
    found = sum(_finds(exact_search(vectors, rows, embedding, 1)[1]) for embedding in embeddings)
    if found < len(sample):
        problems.append(f"{found:,} of {len(sample):,} photos find themselves by exact search")
    return found


def _check_exact(vectors: Vectors, rows: Rows, sample: Rows, problems: list[str]) -> None:
    for embedding in vectors.read(sample)[0]:
        if not _finds(exact_search(vectors, rows, embedding, 1)[1]):
            problems.append("a photo does not find itself by exact search")
            return


def _count_found_by_code(codes: CodeShards, rows: Rows, sample: Rows, problems: list[str]) -> int:
    """Return the number of sampled rows that are found, or others with the same code."""
    found = 0
    for code in codes.read(sample)[0]:
        distances = hamming_search(codes, rows, code, 1)[1]
        found += len(distances) > 0 and int(distances[0]) == 0
    if found < len(sample):
        problems.append(f"{found:,} of {len(sample):,} photos are found by their codes")
    return found


def _finds(scores: Embeddings) -> bool:
    # Compare scores, because another photo may be identical.
    return len(scores) > 0 and float(scores[0]) >= _SAME_SCORE


def _remove_damaged(
    folder: Path, manifest: GalleryManifest, vectors: Vectors | CodeShards, rows: Rows
) -> None:
    """Remove damaged files that the next update rebuilds; the writer's lock must be held.

    The update compares only size and time of modification, which may hide the damage.
    """
    snapshot = manifest.snapshot
    if snapshot is not None:
        try:
            CatalogueView(folder, manifest.generation, snapshot, is_hashed=True).close()
        except BadGallery:
            (folder / snapshot.file).unlink(missing_ok=True)
    if manifest.codes is not None and isinstance(vectors, Vectors):
        try:
            codes = SignCodes.load(folder, manifest.codes, manifest.dim, is_hashed=True)
            is_wrong = count_wrong_codes(codes, vectors, rows) > 0
        except BadGallery:
            is_wrong = True
        if is_wrong:
            shutil.rmtree(folder / manifest.codes.folder, ignore_errors=True)


def _forget(folder: Path, manifest: GalleryManifest) -> tuple[int, int]:
    """Remove photos, and regions of photos, whose rows are damaged; return how many of each.

    The writer's lock must be held.
    """
    (folder / STAMP_NAME).unlink(missing_ok=True)  # so that all of the catalogue is compared
    with Catalogue(folder, manifest.generation + 1) as catalogue:
        with closing(CatalogueView(folder, catalogue.generation)) as view:
            vectors = open_rows(folder, manifest.dim, manifest.bits)
            damaged = _find_damaged_rows(view, vectors, catalogue.kept_rows())
            if vectors.remedy:
                raise BadGallery(
                    f"nothing was repaired: {', '.join(sorted(set(vectors.problems.values())))}",
                    "embeddings that this user may read, to tell which are damaged",
                    vectors.remedy,
                )
        runs = np.split(damaged, np.flatnonzero(np.diff(damaged) > 1) + 1)
        bounds = [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        regions = sum(catalogue.forget_regions_at(low, high) for low, high in bounds)
        return sum(catalogue.remove_at_rows(low, high) for low, high in bounds), regions
