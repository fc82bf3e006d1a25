"""A gallery that changes while it is served: each response is of one generation."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.errors import ModelMismatch
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.manifest import MANIFEST_NAME, MatchRule, read_bundle_manifest
from sbtk_runtime.web.service import FollowedGallery, GalleryDeleted
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import serving
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import index
from tests.web.conftest import ENGINE, Workplace


def comes_true(is_so: Callable[[], bool]) -> bool:
    """Wait until it is so, or not for ever."""
    end = time.monotonic() + 30
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


@pytest.fixture
def followed(workplace: Workplace) -> Iterator[FollowedGallery]:
    with Gallery.open(workplace.gallery) as gallery:
        made_by = gallery.manifest.model_id

    def check(gallery: Gallery) -> None:
        if gallery.manifest.model_id != made_by:
            raise ModelMismatch("another model")

    opened = FollowedGallery(workplace.gallery, check)
    yield opened
    opened.close()


def generation(followed: FollowedGallery) -> int:
    with followed.reading() as gallery:
        return gallery.manifest.generation


def test_a_reader_keeps_its_generation_and_the_next_gets_the_new_one(
    workplace: Workplace, followed: FollowedGallery
) -> None:
    with followed.reading() as old:
        write_photos(workplace.photos / "more", 3, seed=1)
        workplace.index()
        assert comes_true(lambda: generation(followed) == 2)
        assert (old.manifest.generation, old.count) == (1, 8)
        assert len(old.folders()) == 1
    with followed.reading() as new:
        assert (new.count, len(new.folders())) == (11, 2)
    with pytest.raises(sqlite3.ProgrammingError):
        old.folders()  # the last reader has closed it


def test_a_removed_gallery_is_reported_and_served_when_it_returns(
    workplace: Workplace, followed: FollowedGallery
) -> None:
    shutil.rmtree(workplace.gallery)
    assert comes_true(lambda: followed.problem is not None)
    with pytest.raises(GalleryDeleted, match="was deleted"), followed.reading():
        pass
    workplace.index()
    assert comes_true(lambda: followed.problem is None)
    assert generation(followed) == 1


def test_repeated_errors_about_a_removed_gallery_take_no_memory(
    workplace: Workplace, followed: FollowedGallery
) -> None:
    shutil.rmtree(workplace.gallery)
    assert comes_true(lambda: followed.problem is not None)
    lengths = set()
    for _ in range(3):
        with pytest.raises(GalleryDeleted) as caught, followed.reading():
            pass
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1
    assert followed.problem is not None
    assert followed.problem.__traceback__ is None


def test_a_gallery_of_another_model_is_not_served(
    workplace: Workplace, followed: FollowedGallery, tmp_path: Path
) -> None:
    other = tiny_bundle(tmp_path / "other", seed=9, name="other")
    index(tmp_path / "other.sbtk", workplace.photos, other)
    shutil.rmtree(workplace.gallery)
    (tmp_path / "other.sbtk").rename(workplace.gallery)
    assert comes_true(lambda: isinstance(followed.problem, ModelMismatch))
    with pytest.raises(ModelMismatch), followed.reading():
        pass


def test_a_damaged_new_generation_leaves_the_last_intact_one_until_repaired(
    workplace: Workplace, followed: FollowedGallery
) -> None:
    manifest = workplace.gallery / MANIFEST_NAME
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-20])
    assert comes_true(lambda: followed.problem is not None)
    assert "cannot be opened" in str(followed.problem)
    assert generation(followed) == 1
    manifest.write_bytes(whole)
    assert comes_true(lambda: followed.problem is None)
    assert generation(followed) == 1
    kept = manifest.rename(workplace.gallery / "kept")
    manifest.write_bytes(whole[:-20])
    assert comes_true(lambda: followed.problem is not None)
    kept.rename(manifest)
    assert comes_true(lambda: followed.problem is None)


def test_indexing_a_served_gallery_gives_no_wrong_answers(workplace: Workplace) -> None:
    sketch = sketch_png(1)
    states = {1: {str(path) for path in workplace.photos.iterdir()}}
    answers: list[tuple[int, set[str], int]] = []
    ended = threading.Event()
    with workplace.serving() as process:
        process.wait_until_ready()

        def keep_asking() -> None:
            while not ended.is_set():
                content = query(process.port, sketch, "?k=100").json()
                paths = {hit["path"] for hit in content["hits"]}
                answers.append((content["generation"], paths, len(content["hits"])))

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            assert comes_true(lambda: len(answers) > 3)
            for number in (2, 3):
                write_photos(workplace.photos, 4, seed=10 * number)  # others by the same names
                write_photos(workplace.photos / f"more{number}", 2, seed=number)
                (workplace.photos / f"photo-000{number + 2}.jpg").unlink(missing_ok=True)
                there = workplace.photos.rglob("*.*g")
                states[number] = {str(path) for path in there if path.is_file()}
                workplace.index()
                assert comes_true(lambda: process.health()[1]["generation"] == number)  # noqa: B023
            seen = len(answers)
            assert comes_true(lambda: len(answers) > seen + 2)
        finally:
            ended.set()
            asking.join()
        described = ask(process.port, "/v1/gallery").json()
    assert {generation for generation, _, _ in answers} == {1, 2, 3}
    for generation, paths, count in answers:
        assert paths == states[generation]
        assert count == len(paths)
    order = [generation for generation, _, _ in answers]
    assert order == sorted(order)
    assert (described["generation"], described["count"]) == (3, len(states[3]))


def test_a_server_whose_gallery_is_removed_says_so_and_recovers(workplace: Workplace) -> None:
    with workplace.serving() as process:
        process.wait_until_ready()
        photo_id = query(process.port, sketch_png(), "?k=1").json()["hits"][0]["id"]
        shutil.rmtree(workplace.gallery)
        assert comes_true(lambda: process.health()[0] == 503)
        status, health = process.health()
        assert (status, health["status"], health["photos"]) == (503, "failed", None)
        problem = health["problem"]
        assert isinstance(problem, dict)
        assert problem["code"] == "gallery_gone"
        assert f"sbtk index PHOTOS --gallery {workplace.gallery}" in problem["next"]
        assert health["engine"] is not None
        asked = [query(process.port, sketch_png())]
        for path in ("/v1/gallery", f"/v1/photos/{photo_id}", f"/v1/photos/{photo_id}/thumbnail"):
            asked.append(ask(process.port, path))
        assert [(answer.status, answer.code) for answer in asked] == [(503, "gallery_gone")] * 4
        assert ask(process.port, "/").status == 200
        workplace.gallery.mkdir()
        (workplace.gallery / MANIFEST_NAME).write_text("no manifest")
        assert comes_true(lambda: ask(process.port, "/v1/gallery").code == "bad_gallery")
        damaged = query(process.port, sketch_png())
        assert (damaged.status, damaged.code) == (503, "bad_gallery")
        shutil.rmtree(workplace.gallery)
        workplace.gallery.write_text("a file")
        assert comes_true(lambda: ask(process.port, "/v1/gallery").code == "gallery_gone")
        workplace.gallery.unlink()
        workplace.index()
        assert comes_true(lambda: process.health()[0] == 200)
        assert len(query(process.port, sketch_png()).json()["hits"]) == 8


def test_a_server_whose_gallery_another_model_remade_says_so_and_recovers(
    workplace: Workplace, tmp_path: Path
) -> None:
    other = tiny_bundle(tmp_path / "other", seed=9, name="other")
    index(tmp_path / "other.sbtk", workplace.photos, other)
    with workplace.serving() as process:
        process.wait_until_ready()
        workplace.gallery.rename(tmp_path / "before")
        (tmp_path / "other.sbtk").rename(workplace.gallery)
        assert comes_true(lambda: process.health()[0] == 503)
        for answer in (query(process.port, sketch_png()), ask(process.port, "/v1/photos/1")):
            assert (answer.status, answer.code) == (503, "model_mismatch")
        workplace.gallery.rename(tmp_path / "other.sbtk")
        (tmp_path / "before").rename(workplace.gallery)
        assert comes_true(lambda: process.health()[0] == 200)
        assert len(query(process.port, sketch_png()).json()["hits"]) == 8


def test_servers_of_one_gallery_work_independently(workplace: Workplace, tmp_path: Path) -> None:
    sketch = sketch_png(2)
    options = ("--model", str(workplace.bundle), *ENGINE)
    with (
        workplace.serving() as first,
        serving(workplace.gallery, *options, log=tmp_path / "log2") as second,
    ):
        for process in (first, second):
            process.wait_until_ready()
        for number in (1, 2):
            for process in (first, second):
                assert comes_true(lambda: process.health()[1]["generation"] == number)  # noqa: B023
            found = [query(process.port, sketch).json()["hits"] for process in (first, second)]
            assert found[0] == found[1] == [hit.to_json() for hit in workplace.hits(sketch)]
            assert len(found[0]) == 5 + 3 * number
            write_photos(workplace.photos / "more", 3, seed=1)
            workplace.index()


def test_hits_of_sketches_are_marked_as_close(workplace: Workplace) -> None:
    bundle = read_bundle_manifest(workplace.bundle)
    replace(bundle, match_rule=MatchRule(1.1, 0.0)).write(workplace.bundle)
    with workplace.serving() as server:
        content = query(server.port, sketch_png(), "?k=3").json()
        assert [hit["match"] for hit in content["hits"]] == ["weak"] * 3
        assert content["no_close_match"] is True
        later = query(server.port, sketch_png(), "?k=3&offset=3").json()
        assert "no_close_match" not in later
        photo = next(workplace.photos.iterdir()).read_bytes()
        assert "no_close_match" not in query(server.port, photo, "?as=photo").json()
