"""Generations that are published while photos are embedded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.manifest import MANIFEST_NAME, read_gallery_manifest
from tests.tiny import tiny_sketch, write_photos

_PHOTOS = 40


def followed(
    folder: Path, photos: Path, embedder: Embedder, every_s: float | None
) -> tuple[list[tuple[int, int]], IndexReport]:
    """Update a gallery; return each generation seen on the way with its photos, and the report."""
    seen: dict[int, int] = {}

    def look(*_: object) -> None:
        if not (folder / MANIFEST_NAME).exists():
            return
        with Gallery.open(folder) as gallery:
            hits = gallery.query(tiny_sketch(0), embedder, _PHOTOS) if gallery.count else []
            assert len(hits) == gallery.count
            assert seen.setdefault(gallery.manifest.generation, gallery.count) == gallery.count

    report = update_gallery(
        folder, [photos], embedder, progress=look, on_engine=look, publish_every_s=every_s
    )
    look()
    return sorted(seen.items()), report


def test_photos_are_searchable_before_the_update_ends(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "gallery.sbtk"
    write_photos(photos, _PHOTOS)
    seen, report = followed(folder, photos, embedder, every_s=0)
    counts = [count for _, count in seen]
    assert seen[0] == (1, 0)
    assert any(0 < count < _PHOTOS for count in counts)
    assert counts == sorted(counts)
    assert counts[-1] == report.live == report.new == _PHOTOS
    assert verify_gallery(folder).is_good


def test_one_generation_is_published_by_default(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "gallery.sbtk"
    write_photos(photos, _PHOTOS)
    seen, _ = followed(folder, photos, embedder, every_s=None)
    assert seen == [(1, _PHOTOS)]


def test_publishing_during_an_update_keeps_changes_moves_and_losses(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "gallery.sbtk"
    first = write_photos(photos, 12)
    update_gallery(folder, [photos], embedder)
    first[0].unlink()
    first[1].rename(photos / "moved.png")
    first[2].write_bytes(b"damaged")
    write_photos(photos / "more", 12, seed=50)
    seen, report = followed(folder, photos, embedder, every_s=0)
    assert (report.new, report.moved, report.missing, report.unreadable) == (12, 1, 1, 1)
    assert seen[0] == (1, 12)
    assert seen[-1][1] == report.live == 12 + 12 - 2
    # Nothing is left to publish.
    again = update_gallery(folder, [photos], embedder, publish_every_s=0)
    assert (again.new, again.changed, again.live) == (0, 0, report.live)
    assert read_gallery_manifest(folder).generation == seen[-1][0]
    assert verify_gallery(folder).is_good


def test_a_stopped_update_keeps_what_it_published(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "gallery.sbtk"
    write_photos(photos, _PHOTOS)

    def stop(done: int, total: int | None, _rate: float) -> None:
        if total is not None and done == _PHOTOS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_gallery(folder, [photos], embedder, progress=stop, publish_every_s=0)
    with Gallery.open(folder) as gallery:
        assert 0 < gallery.count <= _PHOTOS // 2
    report = update_gallery(folder, [photos], embedder, publish_every_s=0)
    assert report.live == _PHOTOS
    assert report.new <= _PHOTOS // 2
