"""Photos of some days: by the date in the file, else by the time of the file, in every search."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.gallery import gallery as gallery_module
from sbtk_runtime.gallery.gallery import Gallery, Search
from sbtk_runtime.gallery.merge import merge_galleries
from sbtk_runtime.gallery.photo_filter import Period
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.update import update_gallery
from tests.tiny import tiny_photo
from tests.tiny_gallery import make_old
from tests.tiny_regions import tiny_map_bundle

#: What each file says, and when it was last changed, in local time; the first wins.
PHOTOS: dict[str, tuple[str | None, str]] = {
    "a.jpg": ("2019:07:21 18:05:33", "2024-01-01 12:00:00"),
    "first.jpg": ("2024:05:01 00:00:00", "2020-01-01 12:00:00"),
    "last.jpg": ("2024:05:31 23:59:59", "2020-01-01 12:00:00"),
    "after.jpg": ("2024:06:01 00:00:00", "2024-05-15 12:00:00"),
    "plain.jpg": (None, "2024-05-01 00:00:00"),
    "late.jpg": (None, "2024-05-31 23:59:59"),
    "next.jpg": (None, "2024-06-01 00:00:00"),
    "zero.jpg": ("0000:00:00 00:00:00", "2024-05-10 12:00:00"),
    "future.jpg": ("2999:01:01 00:00:00", "2021-03-04 12:00:00"),
    "old.jpg": ("1830:01:02 03:04:05", "2021-03-04 12:00:00"),
    "before.jpg": (None, "1965-03-04 12:00:00"),
}
MAY = (date(2024, 5, 1), date(2024, 5, 31))
IN_MAY = {"first.jpg", "last.jpg", "plain.jpg", "late.jpg", "zero.jpg"}


def write_dated(folder: Path, names: dict[str, tuple[str | None, str]] = PHOTOS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (taken, modified)) in enumerate(names.items()):
        exif = Image.Exif()
        if taken is not None:
            exif.get_ifd(0x8769)[0x9003] = taken
        # Large enough to have regions.
        tiny_photo(seed).resize((256, 240)).save(folder / name, exif=exif)
        time = datetime.datetime.fromisoformat(modified).timestamp()
        os.utime(folder / name, (time, time))
    return folder


def day_of(name: str) -> date:
    """Return the day that counts, by a plain loop over what the files say."""
    taken, modified = PHOTOS[name]
    if taken is not None and "1826" <= taken < "2900":
        return date.fromisoformat(taken[:10].replace(":", "-"))
    return date.fromisoformat(modified[:10])


def names(gallery: Gallery, taken: Period | None, search: Search = "auto") -> set[str]:
    query = np.ones(gallery.manifest.dim, np.float32)
    return {Path(hit.path).name for hit in gallery.search(query, 99, search, taken=taken)}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    bundle = tiny_map_bundle(tmp_path_factory.mktemp("bundle"))
    with Embedder(bundle, engine="onnxruntime", threads=1, batch=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    place = tmp_path_factory.mktemp("dates")
    update_gallery(place / "g.sbtk", [write_dated(place / "photos")], embedder)
    return place / "g.sbtk"


@given(st.tuples(*[st.none() | st.sampled_from(sorted({*map(day_of, PHOTOS), *MAY}))] * 2))
def test_a_filter_by_days_considers_all_photos(folder: Path, taken: Period) -> None:
    first, last = taken[0] or date.min, taken[1] or date.max
    with Gallery.open(folder) as gallery:
        if first > last:
            with pytest.raises(BadConfig, match="a first day that is not after"):
                gallery.recent(taken=taken)
            return
        expected = {name for name in PHOTOS if first <= day_of(name) <= last}
        assert {Path(one.photo.path).name for one in gallery.recent(99, taken=taken)} == expected
        assert names(gallery, taken) == expected


def test_invalid_ends_of_a_period_are_refused(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        for taken in itertools.product((None, date.min, date(1600, 2, 3)), (None, date.max)):
            assert names(gallery, taken) == set(PHOTOS)


@pytest.mark.parametrize(
    "period, expected",
    [
        ((date(2026, 1, 1), None), {"2230.png", "2300.png"}),
        ((date(2220, 1, 1), date(2240, 12, 31)), {"2230.png"}),
        ((date(2299, 1, 1), date(2301, 1, 1)), {"2300.png"}),
        ((None, date(2229, 12, 31)), {"1600.png"}),
        ((None, date(1650, 1, 1)), {"1600.png"}),
        ((date(1700, 1, 1), date(2200, 1, 1)), set()),
    ],
)
def test_times_of_files_that_need_more_than_64_bits_are_of_a_period(
    far: Path, period: Period, expected: set[str]
) -> None:
    with Gallery.open(far) as gallery:
        assert names(gallery, period) == expected


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Iterator[Path]:
    """Return a gallery of photos whose file times most file systems cannot store."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        for seed, year in enumerate((1600, 2230, 2300)):
            path = Path(shared, f"{year}.png")
            tiny_photo(seed).resize((256, 240)).save(path)
            time = datetime.datetime(year, 7, 1, tzinfo=datetime.UTC).timestamp()
            os.utime(path, (time, time))
            if path.stat().st_mtime != time:
                pytest.skip(f"no file here is of the year {year}")
        folder = tmp_path_factory.mktemp("far") / "g.sbtk"
        update_gallery(folder, [Path(shared)], embedder)
        yield folder


def test_photos_dated_by_their_files_are_counted_in_a_notice(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        answer = gallery.answer(np.ones(gallery.manifest.dim, np.float32), 3, taken=MAY)
        assert answer.notices == (
            "3 photos from 2024-05-01 to 2024-05-31 without a date: the times of their files count",
        )
        few = gallery.answer(np.ones(gallery.manifest.dim, np.float32), 9, taken=MAY)
        assert few.notices[0].startswith("only 5 photos are searchable from 2024-05-01 to 2024-05")
        assert gallery.answer(np.ones(gallery.manifest.dim, np.float32), 3).notices == ()


@pytest.mark.parametrize("regions", [None, 9])
@pytest.mark.parametrize("search", ["exact", "codes", "hnsw"])
def test_every_search_is_exact_within_a_period(
    tmp_path: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    regions: int | None,
    search: Search,
) -> None:
    photos = write_dated(tmp_path / "photos")
    update_gallery(tmp_path / "g.sbtk", [photos], embedder, regions=regions)
    monkeypatch.setattr(gallery_module, "EXACT_BELOW", 1)
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        query, _ = embedder.embed_one(photos / "plain.jpg", "photo")
        # The graph knows whole frames only.
        every = gallery.answer(query, 99, "exact", regions=search != "hnsw").hits
        expected = [hit.id for hit in every if Path(hit.path).name in IN_MAY]
        found = gallery.answer(query, 99, search, taken=MAY).hits
        assert [hit.id for hit in found] == expected
        assert [hit.id for hit in gallery.answer(query, 2, search, taken=MAY).hits] == expected[:2]
        best = gallery.similar(expected[0], 99, search, taken=MAY).hits
        assert sorted([expected[0], *(hit.id for hit in best)]) == sorted(expected)


def test_folder_and_period_combine_and_copies_have_their_own_dates(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_dated(tmp_path / "photos")
    shutil.copy2(photos / "first.jpg", photos / "taken-then.jpg")
    shutil.copy(photos / "plain.jpg", photos / "copied-today.jpg")
    write_dated(photos / "in", {"x.jpg": ("2024:05:02 00:00:00", "2020-01-01 12:00:00")})
    update_gallery(tmp_path / "g.sbtk", [photos], embedder)
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        query = np.ones(gallery.manifest.dim, np.float32)
        (within,) = gallery.search(query, 9, under=photos / "in", taken=MAY)
        assert within.path.endswith("in/x.jpg")
        hits = gallery.search(query, 99, taken=MAY, fold=False)
        assert {Path(hit.path).name for hit in hits} == IN_MAY | {"x.jpg", "taken-then.jpg"}
        folded = gallery.search(query, 99, taken=MAY)
        assert sum(len(hit.copies) for hit in folded) == 1


@pytest.mark.parametrize("is_old", [False, True])
def test_older_galleries_get_dates_without_embedding_anything(
    tmp_path: Path, embedder: Embedder, is_old: bool
) -> None:
    photos, folder = write_dated(tmp_path / "photos"), tmp_path / "g.sbtk"
    update_gallery(folder, [photos], embedder)
    with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection:
        connection.execute("DROP TABLE dates")
        connection.commit()
    if is_old:
        make_old(folder)
    else:
        # Published as an older version does: without dates.
        (photos / "a.jpg").rename(photos / "b.jpg")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sbtk_runtime.gallery.update.add_dates", lambda *_: None)
            update_gallery(folder, [photos], embedder)
        (photos / "b.jpg").rename(photos / "a.jpg")
    with Gallery.open(folder) as gallery:
        by_files = {name for name, (_, modified) in PHOTOS.items() if "2024-05" in modified}
        assert names(gallery, MAY) == by_files
        assert any("were not read yet: run 'sbtk index" in text for text in gallery.notices)
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.changed) == (0, 0)
    with Gallery.open(folder) as gallery:
        assert names(gallery, MAY) == IN_MAY
        generation = gallery.manifest.generation
    update_gallery(folder, [photos], embedder)
    with Gallery.open(folder) as gallery:
        assert gallery.manifest.generation == generation


def test_dates_read_before_a_kill_are_published(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = write_dated(tmp_path / "photos"), tmp_path / "g.sbtk"
    update_gallery(folder, [photos], embedder)
    with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection:
        connection.execute("DELETE FROM dates")
        connection.execute("DELETE FROM facts WHERE name = 'dates_added_in'")
        connection.commit()

    def stop(done: int, total: int | None, rate: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbtk_runtime.gallery.update._DATES_PAGE", 4)
        with pytest.raises(KeyboardInterrupt):
            update_gallery(folder, [photos], embedder, progress=stop)
    with Gallery.open(folder) as gallery:
        assert gallery.manifest.generation == 1
    update_gallery(folder, [photos], embedder)
    with Gallery.open(folder) as gallery:
        assert names(gallery, MAY) == IN_MAY
        assert gallery.manifest.generation == 2


def test_merged_galleries_keep_the_dates_of_photos_on_other_machines(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_dated(tmp_path / "photos")
    for number, part in enumerate((list(PHOTOS)[:5], list(PHOTOS)[3:])):
        roots = [photos / name for name in part]
        update_gallery(tmp_path / f"{number}.sbtk", roots, embedder)
    shutil.rmtree(photos)
    merge_galleries([tmp_path / "0.sbtk", tmp_path / "1.sbtk"], tmp_path / "all.sbtk")
    with Gallery.open(tmp_path / "all.sbtk") as gallery:
        assert names(gallery, MAY) == IN_MAY
