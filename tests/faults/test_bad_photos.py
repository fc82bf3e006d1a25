"""Odd files and folders among the photos are reported and skipped, and nothing else is."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import (
    Embedded,
    EmbeddingStream,
    Failed,
    IsKnown,
    Known,
)
from sbtk_runtime.errors import BadData, BadGallery, InternalError
from sbtk_runtime.gallery.changes import Changes
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.folder import write_failures
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.walk import Found
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.regions import RegionGrid
from tests.tiny import tiny_photo, write_photos

NOBODY = 65534


def failures(folder: Path) -> dict[str, str]:
    lines = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}


def all_paths(folder: Path) -> set[str]:
    with Gallery.open(folder) as gallery:
        query = np.ones(gallery.manifest.dim, dtype=np.float32)
        return {hit.path for hit in gallery.search(query, gallery.count)}


@contextlib.contextmanager
def as_nobody(owned: Path) -> Iterator[None]:
    """Give the block the rights of a user who may write only below `owned`."""
    if os.geteuid() != 0:
        yield
        return
    for path in (owned, *owned.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_bad_files_are_named_and_the_others_are_indexed(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    good = write_photos(photos, 5)
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("not an image")
    (photos / "cut.jpg").write_bytes(good[0].read_bytes()[:300])
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "circle.png").symlink_to("circle.png")
    (photos / "dangling.jpg").symlink_to("nowhere.jpg")
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.live, report.unreadable) == (5, 5, 6)
    reasons = failures(folder)
    assert set(reasons) == {
        "empty.jpg",
        "text.png",
        "cut.jpg",
        "pipe.jpg",
        "circle.png",
        "dangling.jpg",
    }
    assert reasons["pipe.jpg"] == "not a regular file"
    assert "empty" in reasons["empty.jpg"]
    assert update_gallery(folder, [photos], embedder).unreadable == 6


def test_every_file_is_accounted_for_whatever_the_order(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    good = write_photos(tmp_path / "good", 20)
    rounds = np.random.default_rng(11)
    for round_ in range(4):
        is_good = np.repeat(rounds.random(6) < 0.5, rounds.integers(1, 90, 6))
        photos.mkdir()
        for place, good_here in enumerate(is_good.tolist()):
            content = good[place % 20].read_bytes() + b"%d" % place if good_here else b"\0\5\x16\7"
            (photos / f"{place:04d}.jpg").write_bytes(content)
        (photos / "zzzz.jpg").write_bytes(good[0].read_bytes())
        report = update_gallery(folder, [photos], embedder, commit_every=7)
        assert report.live == is_good.sum() + 1
        assert report.unreadable == (~is_good).sum()
        there = report.new + report.changed + report.moved + report.revived + report.unchanged
        assert there == report.live
        again = update_gallery(folder, [photos], embedder)
        assert (again.unchanged, again.unreadable) == (report.live, report.unreadable)
        photos.rename(tmp_path / f"done-{round_}")


def test_an_update_that_loses_files_is_an_internal_error(
    tmp_path: Path, embedder: Embedder
) -> None:
    class LosingStream(EmbeddingStream):
        def embed(
            self, paths: Iterable[Path], kind: Kind, is_known: IsKnown | None = None
        ) -> Generator[Embedded | Failed | Known, None, None]:
            yield from itertools.islice(super().embed(paths, kind, is_known), 4)

    class Losing(Embedder):
        @contextlib.contextmanager
        def open_stream(self, grid: RegionGrid | None = None) -> Iterator[EmbeddingStream]:
            with super().open_stream(grid) as stream:
                yield LosingStream(**vars(stream))

    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 6)
    with (
        Losing(embedder.bundle, engine="onnxruntime", threads=1) as losing,
        pytest.raises(InternalError, match=r"6 files were found, but .*4 embedded.*; 2 are"),
    ):
        update_gallery(folder, [photos], losing)
    with pytest.raises(BadGallery, match="no gallery"):
        Gallery.open(folder)
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.unchanged) == (2, 4)


@pytest.mark.parametrize(
    "seconds", [-(1 << 40), -1, 0, 10_413_792_000, 1 << 34, (1 << 35) - 1, 1 << 62, -(1 << 62)]
)
def test_odd_dates_do_not_end_an_update(tmp_path: Path, embedder: Embedder, seconds: int) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 3)
    (photos / "bad.jpg").write_bytes(b"junk")
    for path in (paths[1], photos / "bad.jpg"):
        with contextlib.suppress(OSError, OverflowError):  # a file system may cut it, or refuse
            os.utime(path, (seconds, seconds))
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.unreadable) == (3, 1)
    report = update_gallery(folder, [photos], embedder)
    assert (report.unchanged, report.unreadable) == (3, 1)
    tiny_photo(99).save(paths[1])
    with contextlib.suppress(OSError, OverflowError):
        os.utime(paths[1], (seconds, seconds))
    assert update_gallery(folder, [photos], embedder).changed == 1
    export_gallery(folder, tmp_path / "out")


@pytest.mark.parametrize("value", [-(1 << 80), -(1 << 63), -1, 0, 1 << 63, 1 << 64, 1 << 80])
def test_odd_timestamps_do_not_end_an_update(tmp_path: Path, value: int) -> None:
    found = [Found(f"/p/{n}.jpg", n, value, value, (value + n) % (1 << 64)) for n in range(3)]
    with Catalogue(tmp_path, 1) as catalogue:
        changes = Changes(catalogue, ["/p"], iter(found))
        assert changes.walked == 3
        stamps = [changes.stamps(b"/p/%d.jpg" % n) for n in range(3)]
        assert len({inode for _, _, inode in stamps}) == 3
        for path in changes.paths_to_embed():
            failure = changes.failure(path, "odd \udcff \0 reason", was_read=True)
            catalogue.commit([], [failure], [])
        assert changes.unaccounted == 0
        write_failures(tmp_path, catalogue)


def test_odd_names_are_indexed_found_and_exported(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    names = [b"line\nend.png", b"\xff\xfe.png", "\U0001f600.png".encode(), b"n" * 251 + b".png"]
    for seed, name in enumerate(names):
        tiny_photo(seed).save(photos / "x.png")
        (photos / "x.png").rename(photos / os.fsdecode(name))
    (photos / os.fsdecode(b"bad\xff.png")).write_bytes(b"junk")
    assert update_gallery(folder, [photos], embedder).new == 4
    assert {os.fsencode(Path(path).name) for path in all_paths(folder)} == set(names)
    (entry,) = map(json.loads, (folder / "failures.jsonl").read_text().splitlines())
    assert base64.b64decode(entry["path_bytes"]).endswith(b"/bad\xff.png")
    export_gallery(folder, tmp_path / "out")
    assert len(np.load(tmp_path / "out" / "embeddings.npy")) == 4
    assert update_gallery(folder, [photos], embedder).unchanged == 4
    (photos / os.fsdecode(names[1])).rename(photos / os.fsdecode(b"\xfe.png"))
    assert update_gallery(folder, [photos], embedder).moved == 1


def test_a_gallery_without_readable_photos_is_not_published(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    for index_ in range(7):
        (photos / f"{index_}.jpg").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(BadGallery, match="0 of 7 files could be read") as caught:
            update_gallery(folder, [photos], embedder)
        assert "failures.jsonl" in caught.value.next_step
        assert len(failures(folder)) == 7
        with pytest.raises(BadGallery, match="no gallery"):
            Gallery.open(folder)
    tiny_photo(1).save(photos / "3.jpg")
    assert update_gallery(folder, [photos], embedder).live == 1


def test_if_all_photos_become_unreadable_the_last_gallery_stays(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 3)
    update_gallery(folder, [photos], embedder)
    for path in paths:
        path.write_bytes(b"junk")
    with pytest.raises(BadGallery, match="0 of 3 files"):
        update_gallery(folder, [photos], embedder)
    assert len(all_paths(folder)) == 3


def test_an_empty_folder_makes_no_gallery(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    with pytest.raises(BadData, match="no photo in"):
        update_gallery(folder, [photos], embedder)
    assert not folder.exists()
    with pytest.raises(BadData, match="nowhere"):
        update_gallery(folder, [tmp_path / "nowhere"], embedder)


def test_a_folder_that_became_unreadable_keeps_its_photos(embedder: Embedder) -> None:
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as place:
        photos, folder = Path(place) / "photos", Path(place) / "galleries" / "g.sbtk"
        Path(place).chmod(0o755)
        write_photos(photos, 3)
        write_photos(photos / "private", 3, seed=1)
        update_gallery(folder, [photos], embedder)
        (photos / "photo-0001.png").unlink()
        (photos / "private").chmod(0)
        with as_nobody(folder.parent):
            report = update_gallery(folder, [photos], embedder)
        assert (report.live, report.missing, report.unreadable) == (5, 1, 1)
        assert failures(folder) == {"private": "the folder cannot be read: Permission denied"}
        (photos / "private").chmod(0o755)
        with as_nobody(folder.parent):
            report = update_gallery(folder, [photos], embedder)
        assert (report.live, report.unchanged, report.unreadable) == (5, 5, 0)
        # The folder that was indexed may be in one that is closed.
        photos.rename(photos.parent / "closed")
        photos.mkdir()
        closed = (photos.parent / "closed").rename(photos / "closed")
        with as_nobody(folder.parent):
            update_gallery(folder, [closed], embedder)
        photos.chmod(0)
        with as_nobody(folder.parent):
            report = update_gallery(folder, [closed], embedder)
        assert (report.live, report.missing, report.unreadable) == (5, 0, 1)
        assert failures(folder) == {"closed": "cannot be read: Permission denied"}


def test_a_file_that_became_readable_is_embedded(embedder: Embedder) -> None:
    with tempfile.TemporaryDirectory() as place:
        photos, folder = Path(place) / "photos", Path(place) / "galleries" / "g.sbtk"
        Path(place).chmod(0o755)
        paths = write_photos(photos, 3)
        folder.parent.mkdir()
        paths[1].chmod(0)
        with as_nobody(folder.parent):
            report = update_gallery(folder, [photos], embedder)
        assert (report.new, report.unreadable) == (2, 1)
        paths[1].chmod(0o644)
        report = update_gallery(folder, [photos], embedder)
        assert (report.new, report.unreadable, report.live) == (1, 0, 3)
