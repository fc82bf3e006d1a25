"""Shards divide the photos among machines that know nothing of each other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.gallery.folder import relative_path, roots_above
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.index import index as index_photos
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.manifest import PhotoShard, read_gallery_manifest
from tests.tiny import tiny_photo, write_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_photos(folder, 6)
    write_photos(folder / "2019" / "summer", 6, seed=1)
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
    tiny_photo(77).save(odd)
    return folder


def paths_in(gallery: Path) -> set[str]:
    with Gallery.open(gallery) as opened:
        return {listed.photo.path for listed in opened.recent(1000)}


def index(gallery: Path, roots: list[Path], embedder: Embedder, shard: str = "") -> IndexReport:
    asked = PhotoShard.parse(shard) if shard else None
    return update_gallery(gallery, roots, embedder, shard=asked)


@given(
    st.integers(1, 40),
    st.lists(st.binary(min_size=1, max_size=40), unique=True, max_size=30),
)
def test_each_photo_is_in_exactly_one_shard(count: int, paths: list[bytes]) -> None:
    shards = [PhotoShard(number, count) for number in range(1, count + 1)]
    assert all(sum(shard.has(path) for shard in shards) == 1 for path in paths)


def test_shards_have_similar_sizes() -> None:
    paths = [f"{number // 100:04d}/{number:06d}.jpg".encode() for number in range(20_000)]
    for number in range(1, 9):
        held = sum(map(PhotoShard(number, 8).has, paths))
        assert abs(held - 2500) < 250  # five standard deviations


def test_membership_never_changes() -> None:
    # Galleries on disk depend on it: SHA-256 as a fraction of 1, times 7.
    assert [
        next(number for number in range(1, 8) if PhotoShard(number, 7).has(b"a/%d.jpg" % name))
        for name in range(6)
    ] == [5, 2, 2, 7, 6, 7]


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "/", "0/4", "5/4", "1/0", "-1/4", "1/-4", "1/4/2", " 1/4", "1.0/4"),
        *("a/b", "1/2000000", "\N{ARABIC-INDIC DIGIT ONE}/4", "1/4\n"),
    ],
)
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="such as 1/4"):
        PhotoShard.parse(text)


def test_a_path_is_relative_to_the_outermost_root() -> None:
    roots = {b"/data", b"/data/photos/2019", b"/data/photos/one.jpg", b"/other.jpg"}
    above = roots_above(b"/data/photos/2019/a.jpg", roots)
    assert above == [b"/data/photos/2019", b"/data"]
    assert relative_path(b"/data/photos/2019/a.jpg", above[-1]) == b"photos/2019/a.jpg"
    assert relative_path(b"/other.jpg", b"/other.jpg") == b"other.jpg"
    assert relative_path(b"/a.jpg", b"/") == b"a.jpg"
    assert roots_above(b"/database/a.jpg", roots) == []


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_shards_hold_every_photo_once_at_any_mount_point(
    tmp_path: Path, photos: Path, embedder: Embedder, count: int
) -> None:
    elsewhere = tmp_path / "mnt" / "archive"
    shutil.copytree(photos, elsewhere)
    names: list[str] = []
    for number in range(1, count + 1):
        root = photos if number % 2 else elsewhere
        gallery = tmp_path / f"{number}.sbtk"
        report = index(gallery, [root], embedder, f"{number}/{count}")
        assert report.live + report.other_shards == 13
        assert not report.warnings
        manifest = read_gallery_manifest(gallery)
        assert (manifest.shard, manifest.format) == (PhotoShard(number, count), 4)
        names += [os.path.relpath(path, root) for path in paths_in(gallery)]
    every = [path.relative_to(photos) for path in photos.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(map(str, every))


def test_a_gallery_cannot_change_its_shard(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    first = index(gallery, [photos], embedder, "1/2")
    again = index(gallery, [photos], embedder)
    assert (again.unchanged, again.other_shards) == (first.live, first.other_shards)
    for other in ("2/2", "1/3"):
        with pytest.raises(BadGallery, match=f"holds shard 1/2, not shard {other}") as caught:
            index(gallery, [photos], embedder, other)
        assert f"--shard {other} --gallery" in caught.value.next_step
    assert paths_in(gallery) and read_gallery_manifest(gallery).shard == PhotoShard(1, 2)


def test_a_gallery_of_all_photos_does_not_become_a_shard(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    index(gallery, [photos], embedder)
    with pytest.raises(BadGallery, match="holds all photos, not shard 1/2"):
        index(gallery, [photos], embedder, "1/2")
    assert read_gallery_manifest(gallery).live == 13


def test_an_empty_shard_is_a_gallery(tmp_path: Path, photos: Path, embedder: Embedder) -> None:
    shards = [PhotoShard(number, 40) for number in range(1, 41)]
    held = [path.relative_to(photos) for path in photos.rglob("*") if path.is_file()]
    empty = next(
        shard for shard in shards if not any(shard.has(os.fsencode(path)) for path in held)
    )
    gallery = tmp_path / "g.sbtk"
    report = index(gallery, [photos], embedder, str(empty))
    assert (report.live, report.other_shards, report.warnings) == (0, 13, ())
    assert index(gallery, [photos], embedder).other_shards == 13
    with pytest.raises(BadGallery, match="not shard 1/2"):
        index(gallery, [photos], embedder, "1/2")


def test_indexing_a_subfolder_does_not_move_photos_between_shards(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    index(gallery, [photos], embedder, "1/2")
    before = paths_in(gallery)
    report = index(gallery, [photos / "2019"], embedder)
    assert (report.missing, report.new) == (0, 0)
    assert paths_in(gallery) == before


def test_lost_photos_of_a_shard_are_reported(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    index(gallery, [photos], embedder, "1/2")
    for path in paths_in(gallery):
        Path(path).unlink()
    report = index(gallery, [photos], embedder)
    assert report.warnings and report.live == 0 and report.missing > 0


def test_a_photo_that_moves_to_another_shard_is_searchable_there(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    galleries = [tmp_path / "1.sbtk", tmp_path / "2.sbtk"]
    for number, gallery in enumerate(galleries, start=1):
        index(gallery, [photos], embedder, f"{number}/2")
    moved = Path(min(paths_in(galleries[0])))
    other = next(
        name
        for name in (f"{number}.jpg" for number in range(50))
        if PhotoShard(2, 2).has(name.encode())
    )
    moved.rename(photos / other)
    assert [index(gallery, [photos], embedder).new for gallery in galleries] == [0, 1]
    assert str(photos / other) in paths_in(galleries[1])
    assert not paths_in(galleries[0]) & paths_in(galleries[1])


def test_the_python_api_accepts_a_shard_as_text(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    report = index_photos(photos, tmp_path / "g.sbtk", embedder, shard="2/3")
    assert report.live + report.other_shards == 13
    with pytest.raises(BadConfig, match="no shard '4/3'"):
        index_photos(photos, tmp_path / "h.sbtk", embedder, shard="4/3")
    assert not (tmp_path / "h.sbtk").exists()
