"""Photos that are not found are kept, hidden, and found again without the engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadData
from sbtk_runtime.gallery.folder import folder_counts
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.index import drop_photos
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import write_photos

BITS = 16


def answers(folder: Path) -> dict[str, tuple[int, float]]:
    with Gallery.open(folder) as gallery:
        if not gallery.count:
            return {}
        hits = gallery.search(np.ones(16, np.float32), gallery.count)
        assert len(hits) == gallery.count
        return {hit.path: (hit.id, round(hit.score, 4)) for hit in hits}


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_root_that_is_empty_for_one_run_loses_nothing(
    tmp_path: Path, embedder: Embedder, bits: int | None, is_there: bool
) -> None:
    folder, usb, home = tmp_path / "g.sbtk", tmp_path / "usb", tmp_path / "home"
    write_photos(usb, 8)
    write_photos(home, 3, seed=1)
    update_gallery(folder, [home, usb], embedder, bits=bits)
    before = answers(folder)
    usb.rename(tmp_path / "away")
    if is_there:
        usb.mkdir()
    files = embedder.timings.files
    for turn in range(2):
        report = update_gallery(folder, [home, usb], embedder)
        assert (report.missing, report.missing_in_all, report.live) == (8 * (turn == 0), 8, 3)
        assert [str(usb) in warning for warning in report.warnings] == [True]
        assert answers(folder) == {p: hit for p, hit in before.items() if p.startswith(f"{home}/")}
        assert verify_gallery(folder).problems == ()
    if is_there:
        usb.rmdir()
    (tmp_path / "away").rename(usb)
    report = update_gallery(folder, [home, usb], embedder)
    assert (report.revived, report.unchanged, report.new, report.live) == (8, 3, 0, 11)
    assert report.warnings == ()
    assert embedder.timings.files == files
    assert answers(folder) == before
    assert verify_gallery(folder).problems == ()


def test_a_disk_that_is_missing_is_told_beside_a_file_that_cannot_be_read(
    tmp_path: Path, embedder: Embedder
) -> None:
    folder, usb = tmp_path / "g.sbtk", tmp_path / "usb"
    write_photos(usb, 5)
    (file,) = write_photos(tmp_path / "home", 1, seed=1)
    update_gallery(folder, [file, usb], embedder)
    before = answers(folder)
    content = file.read_bytes()
    file.write_bytes(b"junk")
    usb.rename(tmp_path / "away")
    for _ in range(2):
        report = update_gallery(folder, [file, usb], embedder)
        assert (report.live, report.missing_in_all, report.unreadable) == (0, 6, 2)
        assert any(f"no photos were found in {usb} (5 of 5" in text for text in report.warnings)
    file.write_bytes(content)
    (tmp_path / "away").rename(usb)
    assert update_gallery(folder, [file, usb], embedder).revived == 6
    assert answers(folder) == before


@pytest.mark.parametrize("depth", [0, 2])
def test_an_emptied_folder_gives_a_warning_and_a_deleted_photo_none(
    tmp_path: Path, embedder: Embedder, depth: int
) -> None:
    folder, photos = tmp_path / "g.sbtk", tmp_path / "photos"
    disk = photos / "disk"
    write_photos(photos, 9)
    write_photos(disk.joinpath(*["deep"] * depth), 2, seed=1)
    update_gallery(folder, [photos], embedder)
    (photos / "photo-0000.jpg").unlink()
    assert update_gallery(folder, [photos], embedder).warnings == ()
    shutil.rmtree(disk)
    disk.mkdir()
    (warning,) = update_gallery(folder, [photos], embedder).warnings
    assert f"no photos were found in {disk} (2 of 2" in warning
    assert update_gallery(folder, [photos], embedder).warnings == ()
    for path in sorted(photos.glob("*.*"))[:5]:
        path.unlink()
    (warning,) = update_gallery(folder, [photos], embedder).warnings
    assert f"most photos were not found in {photos} (8 of 11" in warning
    # Until they are back, or dropped for good.
    assert update_gallery(folder, [photos], embedder).warnings == (warning,)


@pytest.mark.parametrize("named", [["real", "link"], ["link", "real"], ["real", "link/sub"]])
def test_a_folder_that_is_named_twice_is_not_a_missing_disk(
    tmp_path: Path, embedder: Embedder, named: list[str]
) -> None:
    folder, real, link = tmp_path / "g.sbtk", tmp_path / "real", tmp_path / "link"
    write_photos(real, 3)
    write_photos(real / "sub", 2, seed=1)
    link.symlink_to(real)
    roots = [tmp_path / name for name in named]
    for new in (5, 0):
        report = update_gallery(folder, roots, embedder)
        assert (report.new, report.live, report.missing, report.warnings) == (new, 5, 0, ())
        assert [str(roots[1]) in text for text in report.notices] == [True]
    # Photos that the gallery has by both paths stay.
    live = update_gallery(folder, roots[1:], embedder).live
    report = update_gallery(folder, roots, embedder)
    assert (report.missing, report.warnings, report.live) == (0, (), live)
    assert verify_gallery(folder).is_good


def test_a_missing_photo_is_found_elsewhere_by_its_bytes(
    tmp_path: Path, embedder: Embedder
) -> None:
    folder, photos = tmp_path / "g.sbtk", tmp_path / "photos"
    paths = write_photos(photos, 6)
    update_gallery(folder, [photos], embedder)
    before = answers(folder)
    paths[2].rename(tmp_path / "kept")
    assert update_gallery(folder, [photos], embedder).missing == 1
    (photos / "sub").mkdir()
    (tmp_path / "kept").rename(photos / "sub" / "new name.jpg")
    report = update_gallery(folder, [photos], embedder)
    assert (report.moved, report.new, report.live) == (1, 0, 6)
    assert answers(folder)[str(photos / "sub" / "new name.jpg")] == before[str(paths[2])]


def test_a_photo_that_is_unreadable_for_one_run_is_kept(tmp_path: Path, embedder: Embedder) -> None:
    folder, photos = tmp_path / "g.sbtk", tmp_path / "photos"
    paths = write_photos(photos, 4)
    update_gallery(folder, [photos], embedder)
    before = answers(folder)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:20])
    report = update_gallery(folder, [photos], embedder)
    assert (report.unreadable, report.missing_in_all, report.live) == (1, 1, 3)
    paths[1].write_bytes(content)
    report = update_gallery(folder, [photos], embedder)
    assert (report.revived, report.new, report.changed, report.live) == (1, 0, 0, 4)
    assert answers(folder) == before


def test_prune_and_forget_remove_photos_for_good(tmp_path: Path, embedder: Embedder) -> None:
    folder, a, b = tmp_path / "g.sbtk", tmp_path / "a", tmp_path / "b"
    paths = write_photos(a, 5)
    write_photos(b, 4, seed=1)
    update_gallery(folder, [a, b], embedder)
    paths[0].unlink()
    (b / "photo-0001.png").unlink()
    update_gallery(folder, [a, b], embedder)
    assert [(c.path, c.photos, c.missing) for c in folder_counts(folder)] == [
        (bytes(a), 4, 1),
        (bytes(b), 3, 1),
    ]
    report = drop_photos(folder, a, is_missing_only=True)
    assert (report.removed, report.live, report.missing_in_all) == (1, 7, 1)
    report = drop_photos(folder, is_missing_only=True)
    assert (report.removed, report.live, report.missing_in_all) == (1, 7, 0)
    with pytest.raises(BadData, match="has no photo below"):
        drop_photos(folder, tmp_path / "elsewhere")
    shutil.rmtree(b)
    assert drop_photos(folder, b).removed == 3
    assert {Path(path).parent for path in answers(folder)} == {a}
    assert [count.path for count in folder_counts(folder)] == [bytes(a)]
    assert verify_gallery(folder).problems == ()
    with pytest.raises(BadData, match="cannot be read"):
        update_gallery(folder, [a, b], embedder)
    assert update_gallery(folder, [a], embedder).unchanged == 4


def test_any_sequence_of_absences_embeds_each_photo_once(
    tmp_path: Path, embedder: Embedder
) -> None:
    folder, photos, away = tmp_path / "g.sbtk", tmp_path / "photos", tmp_path / "away"
    names = [path.name for path in write_photos(photos, 6)]
    away.mkdir()
    update_gallery(folder, [photos], embedder)
    before, files = answers(folder), embedder.timings.files

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(there=st.sets(st.sampled_from(names), min_size=1))
    def is_kept(there: set[str]) -> None:
        for name in names:
            source, target = (away, photos) if name in there else (photos, away)
            if (source / name).exists():
                (source / name).rename(target / name)
        report = update_gallery(folder, [photos], embedder)
        assert (report.live, report.missing_in_all) == (len(there), len(names) - len(there))
        assert answers(folder) == {
            path: hit for path, hit in before.items() if Path(path).name in there
        }
        assert verify_gallery(folder).problems == ()

    is_kept()
    assert embedder.timings.files == files
