"""Regions by HTTP: boxes of hits, photos like a part of a photo, and queries without regions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from tests.runtime.gallery.test_regions import CORNERS, scene, thing
from tests.serve_client import ask, png, query
from tests.serve_process import ServeProcess, serving
from tests.tiny_regions import tiny_map_bundle
from tests.web.conftest import ENGINE, Workplace

RED = png(thing("red"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Return a workplace with things in corners, and a photo that is too small for regions."""
    place = Workplace(tmp_path_factory.mktemp("regions"))
    tiny_map_bundle(place.bundle)
    for number, colour in enumerate(("red", "green", "blue")):
        for corner, box in enumerate(CORNERS):
            scene(place.photos / f"{colour}-{corner}.png", colour, box, 10 * number + corner)
    Image.new("RGB", (100, 100), (90, 90, 90)).save(place.photos / "small.png")
    with place.embedder() as embedder:
        update_gallery(place.gallery, [place.photos], embedder, regions=16)
    return place


@pytest.fixture(scope="module")
def regional(place: Workplace) -> Iterator[ServeProcess]:
    with place.serving("--read-only") as process:
        process.wait_until_ready()
        yield process


def test_hits_have_the_boxes_of_the_python_api(place: Workplace, regional: ServeProcess) -> None:
    hits = query(regional.port, RED, "?as=photo&k=4").json()["hits"]
    assert hits == [hit.to_json() for hit in place.hits(RED, "photo", 4)]
    assert all(len(hit["region"]) == 4 for hit in hits)
    schemas = ask(regional.port, "/openapi.json").json()["components"]["schemas"]
    assert "upright" in schemas["HitAnswer"]["properties"]["region"]["description"]
    assert ask(regional.port, "/v1/gallery").json()["regions"] == 16


def test_a_query_can_be_limited_to_whole_frames(place: Workplace, regional: ServeProcess) -> None:
    hits = query(regional.port, RED, "?as=photo&regions=false").json()["hits"]
    with Gallery.open(place.gallery) as gallery, place.embedder() as embedder:
        found = gallery.query(RED, embedder, 24, "photo", regions=False)
    assert hits == [hit.to_json() for hit in found]
    assert not any("region" in hit for hit in hits)
    for path in ("/v1/photos/1/similar?regions=false", "/v1/similar?like=1&regions=false"):
        assert not any("region" in hit for hit in ask(regional.port, path).json()["hits"])


def test_a_part_of_a_photo_can_be_a_query(place: Workplace, regional: ServeProcess) -> None:
    with Gallery.open(place.gallery) as gallery:
        ids = {Path(photo.photo.path).stem: photo.photo.id for photo in gallery.recent(50)}
        for colour in ("red", "green", "blue"):
            box = CORNERS[1]
            path = f"/v1/photos/{ids[f'{colour}-1']}/similar?k=3"
            hits = ask(regional.port, f"{path}&region={','.join(map(str, box))}").json()["hits"]
            assert {Path(hit["path"]).stem.partition("-")[0] for hit in hits} == {colour}
            found = gallery.similar(ids[f"{colour}-1"], 3, region=box).hits
            assert hits == [hit.to_json() for hit in found]
        small = ask(regional.port, f"/v1/photos/{ids['small']}/similar?region=0,0,1,1")
    assert (small.status, small.code) == (422, "bad_region")


@pytest.mark.parametrize(
    ("region", "code"),
    [
        ("0.5,0.5,0.6,0.2", "bad_region"),
        ("0,0,0,0.5", "bad_region"),
        ("0,0,1", "bad_parameter"),
        ("0,0,1,1,1", "bad_parameter"),
        ("0,0,1,nan", "bad_parameter"),
        ("-0.1,0,1,1", "bad_parameter"),
        ("", "bad_parameter"),
    ],
)
def test_a_box_beyond_the_photo_is_refused(regional: ServeProcess, region: str, code: str) -> None:
    answer = ask(regional.port, f"/v1/photos/1/similar?region={region}")
    assert (answer.status, answer.code) == (422, code)


def test_the_error_without_regions_names_the_command(tmp_path: Path, place: Workplace) -> None:
    folder = tmp_path / "whole.sbtk"
    with Embedder(place.bundle, engine="onnxruntime", threads=1) as embedder:
        update_gallery(folder, [place.photos], embedder)
    everything = ("--model", str(place.bundle), *ENGINE)
    with serving(folder, *everything, log=tmp_path / "log") as process:
        process.wait_until_ready()
        answer = ask(process.port, "/v1/photos/1/similar?region=0,0,0.5,0.5")
        assert (answer.status, answer.code) == (422, "bad_region")
        assert "sbtk index PHOTOS --regions" in answer.json()["error"]["next"]
        assert ask(process.port, "/v1/gallery").json()["regions"] is None
