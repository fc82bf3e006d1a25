"""A merged gallery holds what its galleries hold, however often it was interrupted."""

from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import no_notify
from sbtk_runtime.errors import BadConfig, BadGallery, ModelMismatch, SbtkError
from sbtk_runtime.files import WriterLock, printable_name
from sbtk_runtime.gallery.folder import LOCK_NAME, VECTORS_NAME, open_rows
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.merge import merge_galleries
from sbtk_runtime.gallery.publish import publish
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import PhotoShard, read_gallery_manifest
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import contents, gallery_of, unit_rows

BITS = 16


class Killed(Exception):
    """Ends a merge between two pages, as a signal does."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    paths = write_photos(folder, 20)
    shutil.copyfile(paths[0], folder / "copy-of-0.jpg")
    shutil.copyfile(paths[0], folder / "copy.jpg")
    (folder / "junk.jpg").write_bytes(b"junk")
    return folder


def shards_of(
    folder: Path, photos: Path, embedder: Embedder, count: int, bits: int | None = None
) -> list[Path]:
    galleries = [folder / f"{number}-of-{count}.sbtk" for number in range(1, count + 1)]
    for number, gallery in enumerate(galleries, start=1):
        shard = PhotoShard(number, count)
        update_gallery(gallery, [photos], embedder, bits=bits, shard=shard)
    return galleries


def answers(gallery: Path) -> list[tuple[float, str, tuple[str, ...]]]:
    """Return all hits of a query: score, and the paths of the same bytes."""
    with Gallery.open(gallery) as opened:
        query = np.ones(opened.manifest.dim, dtype=np.float32)
        hits = opened.search(query, opened.count)
    found = []
    for hit in hits:
        paths = sorted([hit.path, *(copy.path for copy in hit.copies)])
        found.append((round(hit.score, 5), paths[0], tuple(paths)))
    return sorted(found)


@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merged_shards_give_the_hits_of_one_gallery(
    tmp_path: Path, photos: Path, embedder: Embedder, count: int, bits: int | None
) -> None:
    whole, merged = tmp_path / "whole.sbtk", tmp_path / "all.sbtk"
    update_gallery(whole, [photos], embedder, bits=bits)
    report = merge_galleries(shards_of(tmp_path, photos, embedder, count, bits), merged)
    assert (report.copied, report.live, report.damaged, report.absent_shards) == (22, 22, 0, ())
    assert report.unreadable == 1
    assert answers(merged) == answers(whole)
    manifest = read_gallery_manifest(merged)
    assert (manifest.shard, manifest.bits) == (None, bits)
    assert verify_gallery(merged).is_good


def test_a_merged_gallery_is_updated_like_any_other(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    merged = tmp_path / "all.sbtk"
    merge_galleries(shards_of(tmp_path, photos, embedder, 3), merged)
    tiny_photo(900).save(photos / "new.png")
    report = update_gallery(merged, [photos], embedder)
    assert (report.new, report.changed, report.unchanged, report.unreadable) == (1, 0, 22, 1)


def test_merging_again_copies_nothing(tmp_path: Path, photos: Path, embedder: Embedder) -> None:
    shards, merged = shards_of(tmp_path, photos, embedder, 3), tmp_path / "all.sbtk"
    merge_galleries(shards, merged)
    before = contents(merged)
    report = merge_galleries(list(reversed(shards)), merged)
    assert (report.copied, report.unchanged, report.removed) == (0, 22, 0)
    assert contents(merged) == before
    assert read_gallery_manifest(merged).generation == 1


def test_merging_again_follows_the_galleries(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    shards, merged = shards_of(tmp_path, photos, embedder, 3), tmp_path / "all.sbtk"
    merge_galleries(shards, merged)
    paths = sorted(photos.glob("photo-*"))
    paths[3].unlink()
    tiny_photo(901).save(paths[4])
    tiny_photo(902).save(photos / "new.png")
    for shard in shards:
        update_gallery(shard, [photos], embedder)
    report = merge_galleries(shards, merged)
    assert (report.copied, report.removed, report.missing, report.live) == (2, 1, 1, 22)
    whole = tmp_path / "whole.sbtk"
    update_gallery(whole, [photos], embedder)
    assert answers(merged) == answers(whole)


@pytest.mark.parametrize("pages", [1, 2, 4, 7])
def test_an_interrupted_merge_resumes(
    tmp_path: Path, photos: Path, embedder: Embedder, pages: int
) -> None:
    shards = shards_of(tmp_path, photos, embedder, 3)
    straight, stopped = tmp_path / "straight.sbtk", tmp_path / "stopped.sbtk"
    merge_galleries(shards, straight, commit_every=4)
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == pages:
            raise Killed

    with pytest.raises(Killed):
        merge_galleries(shards, stopped, commit_every=4, progress=stop)
    with pytest.raises(BadGallery):
        Gallery.open(stopped)
    report = merge_galleries(shards, stopped, commit_every=4)
    assert report.live == 22 and (report.copied < 22 or pages == 1)
    assert contents(stopped) == contents(straight)


def test_progress_reaches_the_total(tmp_path: Path, photos: Path, embedder: Embedder) -> None:
    shards, seen = shards_of(tmp_path, photos, embedder, 3), []
    for _ in range(2):
        merge_galleries(
            shards, tmp_path / "all.sbtk", progress=lambda done, total: seen.append((done, total))
        )
        assert seen[-1] == (22, 22)


@pytest.mark.parametrize("is_newer_first", [True, False])
def test_the_newest_of_two_contents_at_a_path_is_merged(
    tmp_path: Path, embedder: Embedder, is_newer_first: bool
) -> None:
    photos = tmp_path / "photos"
    (path,) = write_photos(photos, 1)
    os.utime(path, (1_000, 1_000))
    older, newer = tmp_path / "older.sbtk", tmp_path / "newer.sbtk"
    update_gallery(older, [photos], embedder)
    tiny_photo(5).save(path)
    update_gallery(newer, [photos], embedder)
    sources = [newer, older] if is_newer_first else [older, newer]
    report = merge_galleries(sources, tmp_path / "all.sbtk")
    assert (report.conflicts, report.live) == (1, 1)
    assert answers(tmp_path / "all.sbtk") == answers(newer)
    again = merge_galleries(sources, tmp_path / "all.sbtk")
    assert (again.live, again.removed) == (1, 0)
    assert answers(tmp_path / "all.sbtk") == answers(newer)


def test_damaged_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    gallery_of(tmp_path / "a.sbtk", unit_rows(60, 16))
    with next((tmp_path / "a.sbtk" / VECTORS_NAME).iterdir()).open("r+b") as file:
        file.seek(7 * 32)
        file.write(b"\xff" * 32)
    report = merge_galleries([tmp_path / "a.sbtk"], tmp_path / "all.sbtk")
    assert (report.damaged, report.copied, report.live) == (1, 59, 59)
    assert verify_gallery(tmp_path / "all.sbtk").is_good


def test_galleries_of_an_older_sbtk_are_merged(tmp_path: Path) -> None:
    gallery_of(tmp_path / "old.sbtk", unit_rows(60, 16), is_old=True)
    report = merge_galleries([tmp_path / "old.sbtk"], tmp_path / "all.sbtk")
    assert (report.live, report.damaged) == (60, 0)
    assert answers(tmp_path / "all.sbtk") == answers(tmp_path / "old.sbtk")


def test_dates_that_were_read_after_a_merge_are_copied(tmp_path: Path) -> None:
    source, merged = tmp_path / "a.sbtk", tmp_path / "all.sbtk"
    manifest = gallery_of(source, unit_rows(10, 16))
    merge_galleries([source], merged)
    with Catalogue(source, 2) as catalogue:
        catalogue.store_dates([(row, "2020-02-02T10:00:00") for row in range(10)])
        origin = catalogue.origin()
        assert origin is not None
        publish(source, catalogue, open_rows(source, 16, None), origin, manifest, no_notify)
    assert merge_galleries([source], merged, commit_every=3).copied == 0
    day = datetime.date(2020, 2, 2)
    with Gallery.open(merged) as gallery:
        assert len(gallery.recent(20, taken=(day, day))) == 10


def test_missing_shards_are_named(tmp_path: Path, photos: Path, embedder: Embedder) -> None:
    shards = shards_of(tmp_path, photos, embedder, 4)
    report = merge_galleries([shards[0], shards[2]], tmp_path / "all.sbtk")
    absent = (f"2/4 of {photos}", f"4/4 of {photos}")
    assert report.absent_shards == absent
    # A merged gallery stands for its shards in a further merge, whether or not these have photos.
    names = [tmp_path / name for name in ("all.sbtk", "further.sbtk")]
    assert merge_galleries([names[0]], names[1]).absent_shards == absent
    report = merge_galleries([names[0], shards[1], shards[3]], names[1])
    assert (report.absent_shards, report.live) == ((), 22)


def test_a_shard_without_photos_is_known_to_a_further_merge(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = tmp_path / "one"
    write_photos(photos, 1)
    shards = shards_of(tmp_path, photos, embedder, 2)
    live = [merge_galleries([shard], tmp_path / f"{shard.stem}-m.sbtk").live for shard in shards]
    full, empty = shards[:: 1 if live[0] else -1]
    merge_galleries([full], tmp_path / "all.sbtk")
    assert not merge_galleries([full, empty], tmp_path / "all.sbtk").absent_shards
    assert not merge_galleries([tmp_path / "all.sbtk"], tmp_path / "further.sbtk").absent_shards


def test_shards_of_other_divisions_are_refused(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    two, three = (shards_of(tmp_path, photos, embedder, count) for count in (2, 3))
    with pytest.raises(BadGallery, match=r"is shard 1/2, .* is shard 2/3"):
        merge_galleries([two[0], three[1]], tmp_path / "all.sbtk")
    assert not (tmp_path / "all.sbtk").exists()
    merge_galleries(two, tmp_path / "all.sbtk")
    with pytest.raises(BadGallery, match=r"all\.sbtk holds shard 1/2, .* is shard 2/3"):
        merge_galleries([tmp_path / "all.sbtk", three[1]], tmp_path / "further.sbtk")


def test_shards_of_other_folders_do_not_replace_missing_ones(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    other = tmp_path / "caf\udce9"
    write_photos(other, 9, seed=3)
    (tmp_path / "b").mkdir()
    ours, theirs = (
        shards_of(folder, place, embedder, 2)
        for folder, place in ((tmp_path, photos), (tmp_path / "b", other))
    )
    merged, further = tmp_path / "all.sbtk", tmp_path / "further.sbtk"
    shown = printable_name(other)
    absent = (f"1/2 of {shown}", f"2/2 of {photos}")
    assert merge_galleries([ours[0], theirs[1]], merged).absent_shards == absent
    assert merge_galleries([merged], further).absent_shards == absent
    report = merge_galleries([merged, ours[1]], further)
    assert report.absent_shards == (f"1/2 of {shown}",)
    assert merge_galleries([*ours, *theirs], further).absent_shards == ()
    # A gallery of the whole folder, or of one above it, has all of its shards.
    update_gallery(tmp_path / "whole.sbtk", [tmp_path], embedder)
    assert not merge_galleries([ours[0], tmp_path / "whole.sbtk"], merged).absent_shards


def test_a_shard_that_is_named_twice_is_refused(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    one, two = shards_of(tmp_path, photos, embedder, 2)
    copy = tmp_path / "copy.sbtk"
    shutil.copytree(one, copy)
    with pytest.raises(BadGallery, match=r"2\.sbtk and .*copy\.sbtk are both shard 1/2 of /"):
        merge_galleries([one, two, copy], tmp_path / "all.sbtk")
    assert not (tmp_path / "all.sbtk").exists()


def test_galleries_that_differ_are_refused_and_both_are_named(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    plain, binary, other = (tmp_path / f"{name}.sbtk" for name in ("plain", "binary", "other"))
    update_gallery(plain, [photos], embedder)
    update_gallery(binary, [photos], embedder, bits=16)
    with Embedder(tiny_bundle(tmp_path / "b", seed=9, name="else"), threads=1) as another:
        update_gallery(other, [photos], another)
    with pytest.raises(ModelMismatch, match=r"tiny@.*else@"):
        merge_galleries([plain, other], tmp_path / "all.sbtk")
    with pytest.raises(BadGallery, match=r"16 numbers a photo.*16-bit codes"):
        merge_galleries([plain, binary], tmp_path / "all.sbtk")
    assert not (tmp_path / "all.sbtk").exists()
    merge_galleries([plain], tmp_path / "all.sbtk")
    with pytest.raises(ModelMismatch, match="tiny@"):
        merge_galleries([other], tmp_path / "all.sbtk")
    with pytest.raises(BadGallery, match="made by 'sbtk index'"):
        merge_galleries([plain], shutil.copytree(plain, tmp_path / "copy.sbtk"))


def test_a_gallery_is_merged_once_and_not_into_itself(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    (one,) = shards_of(tmp_path, photos, embedder, 1)
    link = tmp_path / "link.sbtk"
    link.symlink_to(one)
    for sources, target, message in (
        ([one], one, "into itself"),
        ([one], link, "into itself"),
        ([one, link], tmp_path / "all.sbtk", "named twice"),
        ([], tmp_path / "all.sbtk", "no gallery was named"),
    ):
        with pytest.raises(BadConfig, match=message):
            merge_galleries(sources, target)
    assert not (tmp_path / "all.sbtk").exists()


def test_a_folder_of_other_files_and_a_busy_gallery_are_refused(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    (one,) = shards_of(tmp_path, photos, embedder, 1)
    with pytest.raises(BadGallery, match="holds other files"):
        merge_galleries([one], photos)
    with pytest.raises(BadGallery, match="there is no gallery in"):
        merge_galleries([tmp_path / "nothing.sbtk"], tmp_path / "all.sbtk")
    merge_galleries([one], tmp_path / "all.sbtk")
    with (
        WriterLock(tmp_path / "all.sbtk" / LOCK_NAME),
        pytest.raises(SbtkError, match="being written by another sbtk"),
    ):
        merge_galleries([one], tmp_path / "all.sbtk")
