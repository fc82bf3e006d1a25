"""Galleries find the right photos, and an update does only what is needed."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, ModelMismatch
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.gallery import Gallery, Hit, Search
from sbtk_runtime.gallery.search import EmbeddingSearch
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import tiny_bundle, tiny_photo, write_photos, write_sketch
from tests.tiny_gallery import contents, gallery_of, photo_gallery, photo_path, unit_rows

WAYS: tuple[Search, ...] = ("auto", "hnsw", "codes", "exact")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 300 random rows of 16 numbers, ten photos to a folder."""
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    gallery_of(folder, unit_rows(300, 16))
    return folder


def counts(report: IndexReport) -> dict[str, int]:
    names = (
        *("new", "changed", "moved", "revived", "missing", "removed"),
        *("unreadable", "unchanged", "live"),
    )
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def names_in(folder: Path) -> set[str]:
    with Gallery.open(folder) as gallery:
        query = np.ones(gallery.manifest.dim, dtype=np.float32)
        return {Path(hit.path).name for hit in gallery.search(query, gallery.count)}


@pytest.mark.parametrize("search", WAYS)
def test_hits_are_the_nearest_photos_in_order(made_up: Path, search: Search) -> None:
    rows = unit_rows(300, 16)
    query = unit_rows(1, 16, seed=5)[0]
    truth = np.argsort(-(rows @ query), kind="stable")[:10]
    with Gallery.open(made_up) as gallery:
        hits = gallery.search(3.7 * query, 10, search)
        assert gallery.count == 300
        assert gallery.notices == []
    assert [hit.rank for hit in hits] == list(range(1, 11))
    assert [hit.id for hit in hits] == [index + 1 for index in truth]
    assert [os.fsencode(hit.path) for hit in hits] == [photo_path(index) for index in truth]
    np.testing.assert_allclose([hit.score for hit in hits], rows[truth] @ query, atol=2e-3)


@pytest.mark.parametrize("way", ["codes", "hnsw"])
def test_large_galleries_are_searched_by_codes_and_very_large_ones_by_their_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 100)
    monkeypatch.setattr(hnsw, "GRAPH_FROM", 300 + (way == "codes"))
    assert (gallery_of(tmp_path / "g", unit_rows(300, 16)).graph is None) == (way == "codes")
    query = unit_rows(1, 16, seed=6)[0]
    with Gallery.open(tmp_path / "g") as gallery:
        expected = gallery.search(query, 10, "exact")
        assert isinstance(gallery._searched, EmbeddingSearch)
        assert gallery._searched._way("auto", 10, None) == way
        assert [hit.id for hit in gallery.search(query, 10)] == [hit.id for hit in expected]
        assert gallery.notices == []


@pytest.mark.parametrize("search", WAYS)
def test_asking_for_more_hits_than_photos_gives_all_with_a_notice(
    made_up: Path, search: Search
) -> None:
    with Gallery.open(made_up) as gallery:
        hits = gallery.search(unit_rows(1, 16, seed=5)[0], 10**9, search)
        assert sorted(hit.id for hit in hits) == list(range(1, 301))
        assert len(gallery.notices) == 1
        assert "300 photos" in gallery.notices[0]


def test_a_search_can_be_limited_to_a_folder(made_up: Path) -> None:
    query = unit_rows(1, 16, seed=5)[0]
    with Gallery.open(made_up) as gallery:
        hits = gallery.search(query, 5, under="/photos/0003")
        assert {Path(hit.path).parent.name for hit in hits} == {"0003"}
        assert len(hits) == 5
        assert gallery.notices == []
        assert len(gallery.search(query, 50, under="/photos/0003")) == 10
        assert gallery.search(query, 5, under="/elsewhere") == []
        assert len(gallery.notices) == 2


def test_invalid_queries_are_refused(made_up: Path) -> None:
    row = unit_rows(1, 16)[0]
    with Gallery.open(made_up) as gallery:
        for k in (0, -3):
            with pytest.raises(BadConfig):
                gallery.search(row, k)
        with pytest.raises(BadConfig, match="annoy"):
            gallery.search(row, 1, "annoy")  # type: ignore[arg-type]
        with pytest.raises(BadData, match=r"\(17,\)"):
            gallery.search(np.ones(17, dtype=np.float32), 1)
        for bad in (0.0, np.nan, np.inf):
            with pytest.raises(BadData):
                gallery.search(np.full(16, bad, dtype=np.float32), 1)


def test_a_missing_gallery_is_an_error_with_the_command_to_type(tmp_path: Path) -> None:
    with pytest.raises(BadGallery) as caught:
        Gallery.open(tmp_path / "my photos.sbtk")
    assert caught.value.next_step.startswith("sbtk index PHOTOS --gallery '")


def test_a_gallery_of_one_photo_works(tmp_path: Path) -> None:
    gallery_of(tmp_path / "g", unit_rows(1, 8))
    with Gallery.open(tmp_path / "g") as gallery:
        for search in WAYS:
            (hit,) = gallery.search(unit_rows(1, 8)[0], 1, search)
            assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_hits_have_a_json_form() -> None:
    assert Hit(1, 0.83, 17, "/abs/photo.jpg").to_json() == {
        "rank": 1,
        "score": 0.83,
        "id": 17,
        "path": "/abs/photo.jpg",
    }
    odd = Hit(1, 0.5, 2, os.fsdecode(b"/abs/\xff.jpg")).to_json()
    assert base64.b64decode(odd["path_bytes"]) == b"/abs/\xff.jpg"
    assert "path" not in odd
    json.dumps(odd).encode()


def test_photos_find_themselves_and_sketches_find_something(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_photos(tmp_path / "photos", 20)
    sketch = write_sketch(tmp_path / "sketch.png")
    messages: list[tuple[int, int | None]] = []
    report = update_gallery(
        tmp_path / "g.sbtk",
        [tmp_path / "photos"],
        embedder,
        progress=lambda done, total, rate: messages.append((done, total)),
    )
    assert counts(report) == {"new": 20, "live": 20}
    assert messages == [(done, 20) for done in range(1, 21)]
    assert report.timings["files"] == 20
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        for photo in photos[:3]:
            (hit,) = gallery.query(photo, embedder, 1, "photo")
            assert hit.path == str(photo)
            assert hit.score > 0.999
        assert len(gallery.query(sketch.read_bytes(), embedder, 5)) == 5
        assert gallery.manifest.precision == embedder.engine.info.precision


def test_an_update_embeds_only_changes(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 20)
    update_gallery(folder, [photos], embedder)
    first = (folder / "manifest.json").read_bytes()

    assert counts(update_gallery(folder, [photos], embedder)) == {"unchanged": 20, "live": 20}
    assert (folder / "manifest.json").read_bytes() == first

    paths[0].unlink()
    tiny_photo(1000).save(paths[1])
    (photos / "sub").mkdir()
    paths[2].rename(photos / "sub" / "renamed.jpg")
    os.utime(paths[3], ns=(1, 1))
    tiny_photo(1001).save(photos / "new.png")
    (photos / "junk.jpg").write_bytes(b"no image")
    before = embedder.timings.files
    report = update_gallery(folder, [photos], embedder)
    assert embedder.timings.files - before == 3  # changed, new and junk
    assert counts(report) == {
        "new": 1,
        "changed": 1,
        "moved": 1,
        "missing": 1,
        "unreadable": 1,
        "unchanged": 17,
        "live": 20,
    }
    expected = {path.name for path in paths[3:]} | {paths[1].name, "renamed.jpg", "new.png"}
    assert names_in(folder) == expected
    assert verify_gallery(folder).problems == ()
    assert [path.name for path in folder.glob("codes-*")] == ["codes-1"]
    (line,) = (folder / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(photos / "junk.jpg")


def test_a_moved_photo_keeps_its_id(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 6, embedder)
    with Gallery.open(folder) as gallery:
        before = {h.id: Path(h.path).name for h in gallery.search(np.ones(16, np.float32), 6)}
        codes = gallery.manifest.codes
    # The whole folder gets another name: the photos lie outside the roots of the first run.
    photos.rename(tmp_path / "holidays")
    report = update_gallery(folder, [tmp_path / "holidays"], embedder)
    assert counts(report) == {"moved": 6, "live": 6}
    with Gallery.open(folder) as gallery:
        hits = gallery.search(np.ones(16, np.float32), 6)
        assert {hit.id: Path(hit.path).name for hit in hits} == before
        assert {Path(hit.path).parent.name for hit in hits} == {"holidays"}
        assert gallery.manifest.generation == 2
        assert gallery.manifest.codes == codes


def test_a_copy_is_a_separate_photo_and_is_not_embedded(tmp_path: Path, embedder: Embedder) -> None:
    (first, _) = write_photos(tmp_path / "photos", 2)
    update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    shutil.copy2(first, tmp_path / "photos" / "copy.jpg")
    report = update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    assert counts(report) == {"new": 1, "unchanged": 2, "live": 3}


def test_renaming_onto_another_photo_replaces_it(tmp_path: Path, embedder: Embedder) -> None:
    (first, second, _) = write_photos(tmp_path / "photos", 3)
    update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    first.rename(second)
    report = update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    assert counts(report) == {"moved": 1, "removed": 1, "unchanged": 1, "live": 2}
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        (hit,) = gallery.query(second, embedder, 1, "photo")
        assert (hit.path, hit.id) == (str(second), 1)


def test_photos_outside_the_given_roots_are_kept(tmp_path: Path, embedder: Embedder) -> None:
    folder = tmp_path / "g.sbtk"
    kept = write_photos(tmp_path / "a", 3)
    write_photos(tmp_path / "b", 3, seed=1)
    update_gallery(folder, [tmp_path / "a", tmp_path / "b"], embedder)
    for path in kept:
        path.unlink()
    (tmp_path / "b" / "photo-0000.jpg").unlink()
    report = update_gallery(folder, [tmp_path / "b"], embedder)
    assert counts(report) == {"missing": 1, "unchanged": 2, "live": 5}


def test_failures_are_tried_again_only_when_the_file_changes(
    tmp_path: Path, embedder: Embedder
) -> None:
    write_photos(tmp_path / "photos", 2)
    bad = tmp_path / "photos" / "bad.jpg"
    bad.write_bytes(b"junk")
    args = (tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    assert counts(update_gallery(*args)) == {"new": 2, "unreadable": 1, "live": 2}
    before = embedder.timings.files
    assert counts(update_gallery(*args)) == {"unchanged": 2, "unreadable": 1, "live": 2}
    assert embedder.timings.files == before
    tiny_photo(77).save(bad)
    assert counts(update_gallery(*args)) == {"new": 1, "unchanged": 2, "live": 3}
    assert not (tmp_path / "g.sbtk" / "failures.jsonl").exists()
    bad.write_bytes(b"junk again")
    assert counts(update_gallery(*args)) == {"unchanged": 2, "unreadable": 1, "live": 2}
    assert "bad.jpg" not in names_in(tmp_path / "g.sbtk")
    bad.unlink()
    assert counts(update_gallery(*args)) == {"unchanged": 2, "live": 2}
    assert not (tmp_path / "g.sbtk" / "failures.jsonl").exists()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_edit_that_keeps_size_and_date_is_noticed(
    tmp_path: Path, embedder: Embedder, is_replaced: bool
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        tiny_photo(index).resize((40, 30)).save(photos / f"{index}.bmp")
    args = (tmp_path / "g.sbtk", [photos], embedder)
    update_gallery(*args)
    edited = photos / "1.bmp"
    status = edited.stat()
    other = tmp_path / "other.bmp" if is_replaced else edited
    tiny_photo(50).resize((40, 30)).save(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(edited)
    assert edited.stat().st_size == status.st_size
    assert edited.stat().st_mtime_ns == status.st_mtime_ns
    assert counts(update_gallery(*args)) == {"changed": 1, "unchanged": 2, "live": 3}
    # A file whose inode or ctime alone is another is read, and found to be the same.
    edited.chmod(0o600)
    copy = Path(shutil.copy2(photos / "2.bmp", tmp_path))
    copy.rename(photos / "2.bmp")
    before = embedder.timings.files
    assert counts(update_gallery(*args)) == {"unchanged": 3, "live": 3}
    assert embedder.timings.files == before


def test_new_times_of_an_unchanged_photo_are_published_once(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    path = photos / "photo-0001.png"
    os.utime(path, ns=(0, 12345))
    for generation, checksum in ((2, False), (2, False), (2, True)):
        report = update_gallery(folder, [photos], embedder, checksum=checksum)
        assert counts(report) == {"unchanged": 3, "live": 3}
        with Gallery.open(folder) as gallery:
            (photo,) = [p.photo for p in gallery.recent() if p.photo.path == str(path)]
            assert (photo.mtime_ns, photo.ctime_ns) == (12345, path.stat().st_ctime_ns)
            assert gallery.manifest.generation == generation


def test_the_option_checksum_finds_edits_that_timestamps_hide(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        tiny_photo(index).resize((40, 30)).save(photos / f"{index}.bmp")
    args = (tmp_path / "g.sbtk", [photos], embedder)
    update_gallery(*args)
    tiny_photo(50).resize((40, 30)).save(photos / "1.bmp")
    status = (photos / "1.bmp").stat()
    with (
        closing(sqlite3.connect(tmp_path / "g.sbtk" / "catalogue.sqlite")) as connection,
        connection,
    ):
        connection.execute(
            "UPDATE photos SET mtime_ns = ?, ctime_ns = ?, inode = ? WHERE path = ?",
            (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, bytes(photos / "1.bmp")),
        )
    assert counts(update_gallery(*args)) == {"unchanged": 3, "live": 3}
    report = update_gallery(*args, checksum=True)
    assert counts(report) == {"changed": 1, "unchanged": 2, "live": 3}


def test_another_model_is_refused_and_both_are_named(tmp_path: Path, embedder: Embedder) -> None:
    photos = tmp_path / "my photos"
    write_photos(photos, 2)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [photos], embedder)
    before = contents(folder)
    bundle = tiny_bundle(tmp_path / "other", seed=1, name="other")
    with Embedder(bundle, engine="onnxruntime", threads=1) as other:
        with pytest.raises(ModelMismatch) as caught:
            update_gallery(folder, [photos], other)
        expected = f"sbtk index '{photos}' --gallery {tmp_path}/g-other.sbtk --model {bundle}"
        assert caught.value.next_step == expected
        with Gallery.open(folder) as gallery, pytest.raises(ModelMismatch) as caught_in_query:
            gallery.query(photos / "photo-0000.jpg", other, 1, "photo")
    for problem in (caught.value, caught_in_query.value):
        assert problem.found == f"the model {other.model_id} did not make {folder}"
        assert problem.expected.startswith(f"{embedder.model_id}, which made it")
    assert contents(folder) == before


def test_a_folder_with_other_files_is_never_written(tmp_path: Path, embedder: Embedder) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 2)
    with pytest.raises(BadGallery, match="other files"):
        update_gallery(photos, [photos], embedder)
    assert len(list(photos.iterdir())) == 2


def test_a_gallery_inside_the_photos_is_not_indexed(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path, 2)
    update_gallery(tmp_path / "g.sbtk", [tmp_path], embedder)
    report = update_gallery(tmp_path / "g.sbtk", [tmp_path], embedder)
    assert counts(report) == {"unchanged": 2, "live": 2}


def test_an_interrupted_run_keeps_its_work(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 12)

    def interrupt(done: int, total: int | None, rate: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    args = (tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    with pytest.raises(KeyboardInterrupt):
        update_gallery(*args, progress=interrupt)
    assert counts(update_gallery(*args)) == {"new": 5, "unchanged": 7, "live": 12}


@pytest.mark.parametrize("has_graph", [False, True])
def test_repeatedly_removing_half_of_the_photos_keeps_hits_right(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, has_graph: bool
) -> None:
    if has_graph:
        monkeypatch.setattr(hnsw, "GRAPH_FROM", 1)
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    for turn in range(3):
        write_photos(photos, 20, seed=turn)
        update_gallery(folder, [photos], embedder)
        for path in sorted(photos.iterdir())[::2]:
            path.unlink()
        update_gallery(folder, [photos], embedder)
        expected = {path.name for path in photos.iterdir()}
        with Gallery.open(folder) as gallery:
            for search in WAYS:
                hits = gallery.search(np.ones(16, np.float32), 10, search)
                assert {Path(hit.path).name for hit in hits} == expected
        assert verify_gallery(folder).problems == ()
        assert len(list(folder.glob("codes-*"))) == 1


def test_verify_passes_an_intact_gallery(made_up: Path) -> None:
    report = verify_gallery(made_up, samples=100)
    assert report.is_good
    assert (report.live, report.sampled, report.found) == (300, 100, 100)


def test_export_writes_the_gallery_in_plain_formats(tmp_path: Path) -> None:
    gallery_of(tmp_path / "g", unit_rows(30, 16))
    report = export_gallery(tmp_path / "g", tmp_path / "out")
    assert (report.count, report.left_out) == (30, 0)
    embeddings = np.load(tmp_path / "out" / "embeddings.npy")
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, unit_rows(30, 16), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-6)
    with (tmp_path / "out" / "photos.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["path"].encode() for row in table] == [photo_path(i) for i in range(30)]
    assert [int(row["id"]) for row in table] == list(range(1, 31))


def test_a_small_gallery_is_opened_without_codes_or_graph(made_up: Path) -> None:
    with Gallery.open(made_up) as gallery:
        gallery.search(unit_rows(1, 16)[0], 3)
        assert isinstance(gallery._searched, EmbeddingSearch)
        assert gallery._searched._graph is None
        assert gallery._searched._codes is None
