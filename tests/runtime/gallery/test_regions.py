"""Galleries with regions: things are found in photos, and their boxes are where the things are."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, BadModel, LargeImage
from sbtk_runtime.gallery import gallery as gallery_module
from sbtk_runtime.gallery import region_search
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.index import drop_photos
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME
from sbtk_runtime.gallery.queries import Box, Hit
from sbtk_runtime.gallery.region_search import (
    COMMONNESS,
    MOST_COMMON,
    common_part,
    first_of_each,
)
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.manifest import MatchRule, RegionsRecord, read_gallery_manifest
from sbtk_runtime.preprocess import open_image
from sbtk_runtime.regions import cut_tiles, grid_of
from sbtk_runtime.rerank import NEIGHBOURS, diffuse
from tests.image_attacks import png
from tests.tiny import tiny_bundle
from tests.tiny_regions import embed_photos, tiny_map_bundle

SIDE = 392
BACKGROUNDS = ((200, 200, 40), (40, 200, 210), (210, 50, 200))
COLOURS = {"red": (230, 20, 20), "green": (10, 200, 40), "blue": (20, 30, 240)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_map_bundle(tmp_path_factory.mktemp("map")))


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    with Embedder(bundle, engine="onnxruntime", threads=2, batch=4) as opened:
        yield opened


def scene(
    path: Path, colour: str, box: Box, seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)
) -> Path:
    """Write a photo of some other colour with a thing of one colour in it; return its path."""
    random = np.random.default_rng(seed)
    noise = random.integers(-30, 30, (*size[::-1], 3))
    image = Image.fromarray((noise + BACKGROUNDS[seed % len(BACKGROUNDS)]).astype(np.uint8))
    x, y, width, height = box
    thing = (round(width * size[0]), round(height * size[1]))
    image.paste(Image.new("RGB", thing, COLOURS[colour]), (round(x * size[0]), round(y * size[1])))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def thing(colour: str) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), COLOURS[colour])


CORNERS: tuple[Box, ...] = (
    (0.0, 0.0, 0.36, 0.36),
    (0.64, 0.0, 0.36, 0.36),
    (0.0, 0.64, 0.36, 0.36),
    (0.64, 0.64, 0.36, 0.36),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thing of each colour in each corner, of which one is a photo's fourth part."""
    folder = tmp_path_factory.mktemp("photos")
    for number, colour in enumerate(COLOURS):
        for corner, box in enumerate(CORNERS):
            scene(folder / f"{colour}-{corner}.png", colour, box, 10 * number + corner)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: Path, embedder: Embedder) -> Path:
    folder = tmp_path_factory.mktemp("galleries") / "regions.sbtk"
    report = update_gallery(folder, [photos], embedder, regions=16)
    assert (report.live, report.regions) == (12, 12 * 16)
    return folder


def names(hits: list[Hit]) -> list[str]:
    return [Path(hit.path).stem for hit in hits]


def test_small_objects_are_found_with_their_boxes(folder: Path, embedder: Embedder) -> None:
    with Gallery.open(folder) as gallery:
        for colour in COLOURS:
            hits = gallery.query(thing(colour), embedder, k=4, kind="photo")
            assert {name.partition("-")[0] for name in names(hits)} == {colour}
            for hit in hits:
                assert hit.region is not None
                corner = CORNERS[int(hit.path.rpartition("-")[2][0])]
                # The nearest window: the thing's corner of the photo.
                assert abs(hit.region[0] - corner[0]) < 0.05
                assert abs(hit.region[1] - corner[1]) < 0.05
                assert hit.to_json()["region"] == [round(part, 4) for part in hit.region]


def scores_by_loop(
    folder: Path, embedder: Embedder, photos: Path, query: NDArray[np.float32]
) -> dict[str, float]:
    """Return the score of each photo, of embeddings made one by one."""
    grid = grid_of(16)
    whole, regions = {}, {}
    for item in embed_photos(embedder, sorted(photos.iterdir()), grid):
        assert isinstance(item, Embedded)
        assert item.regions is not None
        whole[item.path.stem], regions[item.path.stem] = item.row, item.regions
    common = common_part(np.concatenate(list(regions.values())).mean(axis=0))
    scores = {}
    for name, row in whole.items():
        best = max(float(region @ query - region @ common) for region in regions[name])
        scores[name] = min(1.0, max(float(row @ query), best))
    return scores


@pytest.mark.parametrize("search", ["auto", "exact", "codes"])
def test_scores_equal_a_plain_loop(
    folder: Path,
    photos: Path,
    embedder: Embedder,
    search: gallery_module.Search,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery_module, "EXACT_BELOW", 1)
    query, _ = embedder.embed_one(thing("green"), "photo")
    expected = scores_by_loop(folder, embedder, photos, query)
    with Gallery.open(folder) as gallery:
        hits = gallery.search(query, 12, search)
        few = gallery.search(query, 5, search)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert hit.score == pytest.approx(expected[Path(hit.path).stem], abs=2e-3)
    assert names(few) == names(hits)[:5]


def test_without_regions_whole_frames_are_searched(folder: Path, embedder: Embedder) -> None:
    query, _ = embedder.embed_one(thing("red"), "photo")
    with Gallery.open(folder) as gallery:
        hits = gallery.answer(query, 12, regions=False).hits
        reranked = gallery.search(query, 12, rerank="expand")
        by_graph = gallery.search(query, 12, "hnsw")
    for found in (hits, reranked, by_graph):
        assert all(hit.region is None for hit in found)
        assert len(found) == 12


def test_only_regions_of_photos_that_are_searched_make_matches_weaker(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = tmp_path / "photos"
    shutil.copytree(photos, own / "all")
    (own / "one").mkdir()
    (own / "all" / "red-0.png").rename(own / "one" / "red.png")
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=16)
    query, _ = embedder.embed_one(thing("red"), "photo")
    with Gallery.open(folder) as gallery:
        for under, compared in ((own / "one", 1), (own / "all", 11), (None, 12)):
            (best, *_) = gallery.answer(query, 1, under=under).hits
            limit = best.score - float(np.log10(17 * compared))
            for rule, match in (
                (MatchRule(limit - 1e-3, 1.0), "good"),
                (MatchRule(limit + 1e-3, 1.0), "weak"),
            ):
                (hit, *_) = gallery.answer(query, 1, under=under, match_rule=rule).hits
                assert hit.match == match
            whole = gallery.answer(query, 1, under=under, regions=False, match_rule=rule).hits
            assert whole[0].match == (
                "good" if whole[0].score >= rule.lowest_close(compared) else "weak"
            )


def test_pages_of_hits_continue_in_order_also_in_a_folder(
    folder: Path, photos: Path, embedder: Embedder
) -> None:
    query, _ = embedder.embed_one(thing("blue"), "photo")
    with Gallery.open(folder) as gallery:
        whole = gallery.search(query, 12)
        pages = [hit for start in (0, 5, 10) for hit in gallery.search(query, 5, offset=start)]
        assert [(hit.rank, hit.id, hit.region) for hit in pages] == [
            (hit.rank, hit.id, hit.region) for hit in whole
        ]
        assert names(gallery.search(query, 40, under=photos)) == names(whole)
        assert gallery.search(query, 40, under=photos / "none") == []


def diffused_by_loop(
    folder: Path, embedder: Embedder, photos: Path, query: NDArray[np.float32]
) -> dict[str, float]:
    """Return the sort key of each photo by diffusion between parts and whole frames."""
    whole, regions = {}, {}
    for item in embed_photos(embedder, sorted(photos.iterdir()), grid_of(16)):
        assert isinstance(item, Embedded)
        assert item.regions is not None
        whole[item.path.stem], regions[item.path.stem] = item.row, item.regions
    common = common_part(np.concatenate(list(regions.values())).mean(axis=0))
    scores, parts = {}, {}
    for name, row in whole.items():
        theirs = regions[name] @ (query - common)
        scores[name] = min(1.0, max(float(row @ query), float(theirs.max())))
        is_whole = row @ query >= theirs.max()
        parts[name] = row if is_whole else regions[name][int(theirs.argmax())]
    order = sorted(scores, key=lambda name: -scores[name])
    alike = np.array(
        [
            [
                0.6 * (parts[a] @ parts[b]) + 0.4 * (whole[a] @ whole[b]) if a != b else -9.0
                for b in order
            ]
            for a in order
        ]
    )
    near = np.argsort(-alike, axis=1, kind="stable")[:, :NEIGHBOURS]
    keys = diffuse(
        np.array([scores[name] for name in order], dtype=np.float32),
        near,
        np.take_along_axis(alike, near, 1).astype(np.float32),
    )
    return dict(zip(order, keys.tolist(), strict=True))


@pytest.mark.parametrize("search", ["auto", "exact", "codes"])
def test_diffusion_compares_the_parts_that_photos_were_found_by(
    folder: Path,
    photos: Path,
    embedder: Embedder,
    search: gallery_module.Search,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery_module, "EXACT_BELOW", 1)
    # So that codes of so few dimensions cannot miss the best region of a photo.
    monkeypatch.setattr(region_search, "_SCORED_OF_A_PHOTO", 16)
    is_changed = False
    for colour in COLOURS:
        # Not quite a colour of the photos, so that whole frames and regions are among the hits.
        image = Image.blend(thing(colour), Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[0]), 0.5)
        query, _ = embedder.embed_one(image, "photo")
        with Gallery.open(folder) as gallery:
            plain = gallery.search(query, 12, search)
            hits = gallery.search(query, 12, search, rerank="diffusion")
            pages = [
                hit
                for start in (0, 5, 10)
                for hit in gallery.search(query, 5, search, rerank="diffusion", offset=start)
            ]
            whole = gallery.search(query, 12, search, rerank="diffusion", regions=False)
        expected = diffused_by_loop(folder, embedder, photos, query)
        keys = [expected[name] for name in names(hits)]
        # Stored rows are float16, which may swap photos with almost equal keys.
        assert keys == pytest.approx(sorted(expected.values(), reverse=True), abs=2e-3)
        is_changed |= names(hits) != names(plain)
        by_path = {hit.path: (hit.score, hit.region) for hit in plain}
        assert {hit.path: (hit.score, hit.region) for hit in hits} == by_path
        assert [(hit.rank, hit.path, hit.region) for hit in pages] == [
            (hit.rank, hit.path, hit.region) for hit in hits
        ]
        assert all(hit.region is None for hit in whole)
    assert is_changed, "diffusion must change something to be compared"


def test_regions_are_diffused_without_stored_neighbours(
    folder: Path, tmp_path: Path, embedder: Embedder
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy.sbtk")
    query, _ = embedder.embed_one(thing("red"), "photo")
    with Gallery.open(copy) as gallery:
        expected = names(gallery.search(query, 12, rerank="diffusion"))
    (copy / NEIGHBOURS_NAME).unlink()
    with Gallery.open(copy) as gallery:
        assert names(gallery.search(query, 12, rerank="diffusion")) == expected
        with pytest.raises(BadGallery, match="no neighbours"):
            gallery.search(query, 12, rerank="diffusion", regions=False)


@given(
    owners=st.lists(st.integers(0, 12), max_size=60),
    count=st.integers(1, 4),
    most=st.integers(1, 20),
)
def test_the_first_regions_of_the_first_photos_are_scored(
    owners: list[int], count: int, most: int
) -> None:
    kept: list[bool] = []
    seen: dict[int, int] = {}
    for owner in owners:
        seen[owner] = seen.get(owner, 0) + 1
        kept.append(seen[owner] <= count and list(seen).index(owner) < most)
    found = first_of_each(np.array(owners, dtype=np.int64), count, most)
    assert found.tolist() == kept


def test_a_region_of_a_photo_can_be_a_query(folder: Path, embedder: Embedder) -> None:
    with Gallery.open(folder) as gallery:
        hit = gallery.query(thing("red"), embedder, k=1, kind="photo")[0]
        answer = gallery.similar(hit.id, 3, region=hit.region)
        assert {name.partition("-")[0] for name in names(answer.hits)} == {"red"}
        assert hit.id not in [each.id for each in answer.hits]
        # Any box counts as the region that covers it best.
        other = gallery.similar(hit.id, 3, region=(0.4, 0.4, 0.2, 0.2))
        assert names(other.hits) != names(answer.hits)
        no = float("nan")
        for wrong in (
            *((0.5, 0.5, 0.6, 0.2), (-0.1, 0.0, 0.5, 0.5), (0.0, 0.0, 0.0, 0.5)),
            *((0.5, no, 0.2, 0.2), (0.5, 0.5, 0.2, no), (no, no, no, no)),
        ):
            with pytest.raises(BadData, match="the region"):
                gallery.similar(hit.id, 3, region=wrong)


def test_only_changes_are_embedded_and_regions_stay_with_their_photos(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=9, commit_every=5)
    rows = _committed_rows(folder)
    assert rows == 12 * 10
    # Again, without naming the regions: nothing to do.
    report = update_gallery(folder, [own], embedder)
    assert (report.new, report.regions, _committed_rows(folder)) == (0, 108, rows)
    # Moved, copied, missing and found again: nothing is embedded.
    (own / "red-0.png").rename(own / "moved.png")
    shutil.copy(own / "red-1.png", own / "copy.png")
    (own / "red-2.png").rename(tmp_path / "away.png")
    report = update_gallery(folder, [own], embedder)
    assert (report.moved, report.new, report.missing, report.regions) == (1, 1, 1, 99)
    assert _committed_rows(folder) == rows
    with Gallery.open(folder) as gallery:
        found = gallery.query(thing("red"), embedder, k=4, kind="photo")
        assert {"moved", "red-3"} < set(names(found))
        assert "red-2" not in names(gallery.query(thing("red"), embedder, k=12, kind="photo"))
    (tmp_path / "away.png").rename(own / "red-2.png")
    report = update_gallery(folder, [own], embedder)
    assert (report.revived, report.regions, _committed_rows(folder)) == (1, 108, rows)
    # Another content: a new whole frame with new regions, and the old ones are forgotten.
    scene(own / "red-3.png", "blue", CORNERS[0], 99)
    report = update_gallery(folder, [own], embedder)
    assert (report.changed, report.regions) == (1, 108)
    update_gallery(folder, [own], embedder)
    assert verify_gallery(folder).problems == ()
    with Gallery.open(folder) as gallery:
        hits = gallery.query(thing("blue"), embedder, k=5, kind="photo")
        assert "red-3" in names(hits)


def _committed_rows(folder: Path) -> int:
    from sbtk_runtime.gallery.writer import Catalogue

    with Catalogue(folder, read_gallery_manifest(folder).generation + 1) as catalogue:
        return catalogue.committed_rows()


def test_an_existing_gallery_gets_regions_and_older_ones_stay_readable(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder)
    before = read_gallery_manifest(folder)
    assert (before.format, before.regions) == (3, None)
    assert "regions" not in (folder / "manifest.json").read_text()
    (own / "red-0.png").unlink()
    (own / "red-1.png").write_bytes(b"no image any more")
    report = update_gallery(folder, [own], embedder, regions=9, commit_every=4)
    assert (report.new, report.live, report.regions) == (0, 10, 90)
    assert (report.missing, report.unreadable, report.without_regions) == (1, 1, 0)
    assert not any("regions" in text for text in report.notices)
    after = read_gallery_manifest(folder)
    assert after.format == 5
    assert after.regions is not None
    assert (after.regions.count, after.regions.rows) == (9, 90)
    assert verify_gallery(folder).problems == ()


def test_photos_of_other_folders_whose_regions_cannot_be_embedded_are_counted(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder)
    (own / "red-0.png").unlink()
    (own / "red-1.png").write_bytes(b"no image any more")
    scene(own / "red-2.png", "blue", CORNERS[0], 99)
    other = scene(tmp_path / "other" / "one.png", "red", CORNERS[1], 98)
    for _ in range(2):
        report = update_gallery(folder, [other], embedder, regions=9)
        assert (report.live, report.without_regions, report.regions) == (13, 3, 90)
    report = update_gallery(folder, [own], embedder)
    assert (report.live, report.without_regions, report.regions) == (11, 0, 99)


def test_a_stopped_update_resumes(tmp_path: Path, photos: Path, embedder: Embedder) -> None:
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [photos], embedder)

    def stop(done: int, total: int | None, rate: float) -> None:
        if total is not None and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_gallery(folder, [photos], embedder, regions=9, progress=stop)
    assert read_gallery_manifest(folder).regions is None
    seen: list[int | None] = []
    report = update_gallery(
        folder, [photos], embedder, progress=lambda done, total, rate: seen.append(total)
    )
    assert (report.regions, set(seen) - {None}) == (108, {7})


def test_tiny_photos_have_no_regions_and_panoramas_fewer(
    tmp_path: Path, embedder: Embedder
) -> None:
    own = tmp_path / "photos"
    scene(own / "tiny.png", "red", CORNERS[0], size=(223, 400))
    scene(own / "wide.png", "blue", (0.72, 0.3, 0.04, 0.4), size=(2400, 240))
    scene(own / "tall.png", "green", (0.3, 0.1, 0.4, 0.04), size=(240, 2400))
    scene(own / "plain.png", "red", CORNERS[3])
    folder = tmp_path / "gallery.sbtk"
    report = update_gallery(folder, [own], embedder, regions=16)
    assert report.regions == 16 * (0 + 8 + 8 + 1)
    with Gallery.open(folder) as gallery:
        by_colour = {
            colour: gallery.query(thing(colour), embedder, k=4, kind="photo")[0]
            for colour in ("blue", "green")
        }
        assert len(gallery.search(embedder.embed_one(thing("red"), "photo")[0], 50)) == 4
        tiny = next(p.photo for p in gallery.recent() if p.photo.path.endswith("tiny.png"))
        with pytest.raises(BadData, match="whole frame only"):
            gallery.similar(tiny.id, region=(0.0, 0.0, 0.5, 0.5))
    assert names(list(by_colour.values())) == ["wide", "tall"]
    x, y, width, height = by_colour["blue"].region or (0, 0, 0, 0)
    assert x <= 0.74 <= x + width
    assert width < 0.12
    x, y, width, height = by_colour["green"].region or (0, 0, 0, 0)
    assert y <= 0.12 <= y + height
    assert height < 0.12


@pytest.mark.slow
def test_photos_too_large_for_this_process_are_cut_like_others(
    tmp_path: Path, embedder: Embedder
) -> None:
    own = tmp_path / "photos"
    own.mkdir()
    wide = b"".join(bytes([step % 256, 0, step // 256, 0, 128, 0]) for step in range(17_000))
    # As wide as a phone's panorama, turned by its Exif data; and a strip that is too low.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (own / "pan.png").write_bytes(png(17_000, 1_700, 16, 2, turned, line=wide))
    (own / "strip.png").write_bytes(png(170_000, 170, 16, 2, line=wide * 10))
    items = embed_photos(embedder, sorted(own.iterdir()), grid_of(9))
    for item, tiles in zip(items, (8, 0), strict=True):
        with pytest.raises(LargeImage):
            open_image(item.path.read_bytes(), "photo", 448)
        assert isinstance(item, Embedded)
        assert item.regions is not None and item.boxes is not None
        assert item.regions.shape == (9 * tiles, 16)
        whole = open_image(item.path.read_bytes(), "photo", 448, max_bytes=1 << 30).decode().image
        cut = cut_tiles(whole, 448)
        assert len(cut) == tiles
        for tile, boxes in zip(cut, np.split(item.boxes, tiles or 1), strict=False):
            np.testing.assert_array_equal(boxes, tile.boxes(grid_of(9)))
        if tiles:
            expected = embedder.open_regions(grid_of(9)).run(
                np.stack([tile.pixels for tile in cut]), "photo"
            )
            np.testing.assert_allclose(item.regions, expected.reshape(-1, 16), atol=1e-5)


def test_boxes_are_of_the_upright_photo(tmp_path: Path, embedder: Embedder) -> None:
    own = tmp_path / "photos"
    own.mkdir()
    upright = Image.open(scene(tmp_path / "up.png", "red", CORNERS[1]))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(own / "turned.jpg", exif=exif, quality=95)
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=16)
    with Gallery.open(folder) as gallery:
        hit = gallery.query(thing("red"), embedder, k=1, kind="photo")[0]
    assert hit.region is not None
    assert hit.region[0] > 0.5
    assert hit.region[1] < 0.1


def test_damaged_regions_are_never_hits_and_are_embedded_again(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=9)
    query, _ = embedder.embed_one(thing("red"), "photo")
    with Gallery.open(folder) as gallery:
        best = gallery.search(query, 1)[0]
        photo = gallery.photo(best.id)
        assert photo is not None
        assert gallery._regions is not None
        row = gallery._regions.row_of(photo.row, best.region or (0, 0, 1, 1))
        # Another row's bytes: a unit row, but not what was committed.
        shard = folder / "vectors" / "000000.f16"
        content = bytearray(shard.read_bytes())
        content[row * 32 : row * 32 + 32] = content[(row + 4) * 32 : (row + 5) * 32]
        shard.write_bytes(content)
        hits = gallery.search(query, 12)
        assert len(hits) == 12
        again = next(hit for hit in hits if hit.id == best.id)
        assert again.region != best.region
    report = verify_gallery(folder)
    assert any("regions of 1 photo" in problem for problem in report.problems)
    repaired = verify_gallery(folder, repair=True)
    assert (repaired.repaired, repaired.repaired_regions) == (0, 1)
    report_after = update_gallery(folder, [own], embedder)
    assert (report_after.regions, report_after.live) == (108, 12)
    assert verify_gallery(folder).problems == ()
    with Gallery.open(folder) as gallery:
        assert gallery.search(query, 1)[0].region == best.region


def test_a_photo_with_a_damaged_whole_frame_takes_no_place_from_others(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [photos], embedder, regions=9)
    query, _ = embedder.embed_one(thing("red"), "photo")
    with Gallery.open(folder) as gallery:
        best, *others = gallery.search(query, 12)
        photo = gallery.photo(best.id)
        assert photo is not None
    shard = folder / "vectors" / "000000.f16"
    content = bytearray(shard.read_bytes())
    content[photo.row * 32 : photo.row * 32 + 8] = bytes(8)
    shard.write_bytes(content)
    with Gallery.open(folder) as gallery:
        for under in (None, None, photos):
            answer = gallery.answer(query, 12, under=under)
            assert names(answer.hits) == names(others)
            assert any("of 1 of 12 photos are damaged" in text for text in answer.notices)


@pytest.mark.parametrize("exact_below", [1, 20_000])
def test_lost_shards_are_embedded_again(
    tmp_path: Path,
    photos: Path,
    embedder: Embedder,
    exact_below: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [photos], embedder, regions=9)
    shard = folder / "vectors" / "000000.f16"
    # The whole frames come first in a commit, so this loses regions only.
    shard.write_bytes(shard.read_bytes()[: 60 * 32])
    monkeypatch.setattr(gallery_module, "EXACT_BELOW", exact_below)
    with Gallery.open(folder) as gallery:
        query, _ = embedder.embed_one(thing("red"), "photo")
        answer = gallery.answer(query, 12)
        assert len(answer.hits) == 12
        assert any("regions of 7 of 12 photos are" in text for text in answer.notices)
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.live, report.regions) == (0, 12, 108)
    assert verify_gallery(folder).problems == ()


def test_removed_photos_lose_their_regions(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=9)
    drop_photos(folder, own / "red-0.png")
    manifest = read_gallery_manifest(folder)
    assert manifest.regions is not None
    assert (manifest.live, manifest.regions.rows) == (11, 99)
    drop_photos(folder)
    manifest = read_gallery_manifest(folder)
    assert (manifest.live, manifest.regions) == (0, RegionsRecord(9, 0))
    report = update_gallery(folder, [own], embedder)
    assert report.live == 12


def test_impossible_regions_are_refused(
    tmp_path: Path, photos: Path, folder: Path, embedder: Embedder
) -> None:
    with pytest.raises(BadConfig, match="10 regions a photo"):
        update_gallery(tmp_path / "new.sbtk", [photos], embedder, regions=10)
    with pytest.raises(BadConfig, match="8-bit codes"):
        update_gallery(tmp_path / "new.sbtk", [photos], embedder, regions=9, bits=8)
    with pytest.raises(BadGallery, match="keeps 16 regions of each photo, not 9"):
        update_gallery(folder, [photos], embedder, regions=9)
    flat = Bundle.open(tiny_bundle(tmp_path / "flat"))
    with (
        Embedder(flat, engine="onnxruntime", threads=1) as other,
        pytest.raises(BadModel, match="cannot embed regions"),
    ):
        update_gallery(tmp_path / "new.sbtk", [photos], other, regions=9)
    assert not (tmp_path / "new.sbtk").exists()
    with Gallery.open(folder) as gallery, pytest.raises(BadConfig):
        gallery.search(np.ones(16, dtype=np.float32), 0)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_regions_are_exported_with_their_photos(
    tmp_path: Path, photos: Path, embedder: Embedder, *, is_damaged: bool
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copy(own / "red-0.png", own / "copy.png")
    Image.new("RGB", (90, 90), (90, 90, 90)).save(own / "small.png")
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=9)
    with Gallery.open(folder) as gallery:
        lost = gallery._view.region_spans().photo_rows[1] if is_damaged else -1
        first = int(gallery._view.region_spans().first_rows[1])
        kept = [one.photo for one in gallery.recent(50, 0)] + [
            gallery.photo(copy.id) for one in gallery.recent(50, 0) for copy in one.copies
        ]
        wanted = {photo.id: photo for photo in kept if photo is not None and photo.row != lost}
    if is_damaged:
        shard = next((folder / "vectors").iterdir())
        content = np.fromfile(shard, dtype=np.uint8)
        content[first * 32 : first * 32 + 8] ^= 0x55
        content.tofile(shard)
    report = export_gallery(folder, tmp_path / "out")
    rows = np.load(tmp_path / "out" / "regions.npy")
    with (tmp_path / "out" / "regions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert rows.shape == (len(lines), 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    by_id: dict[int, list[int]] = {}
    for number, line in enumerate(lines):
        by_id.setdefault(int(line["id"]), []).append(number)
    paths = {number: Path(wanted[number].path) for number in wanted}
    assert set(by_id) == {number for number, path in paths.items() if path.name != "small.png"}
    for number, places in by_id.items():
        (found,) = embed_photos(embedder, [paths[number]], grid_of(9))
        assert isinstance(found, Embedded)
        assert found.regions is not None
        np.testing.assert_allclose(rows[places], found.regions, atol=2e-3)
        names = ("x", "y", "width", "height")
        boxes = np.array([[float(lines[place][name]) for name in names] for place in places])
        assert found.boxes is not None
        np.testing.assert_allclose(boxes, found.boxes, atol=1e-5)
    assert report.left_out_regions == len(kept) - 1 - len(by_id)
    assert (report.left_out_regions > 0) == is_damaged


def test_a_reader_keeps_its_generation_while_regions_change(
    tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    folder = tmp_path / "gallery.sbtk"
    update_gallery(folder, [own], embedder, regions=9)
    query, _ = embedder.embed_one(thing("green"), "photo")
    with Gallery.open(folder) as gallery:
        before = gallery.search(query, 12)
        for path in own.glob("green-*.png"):
            path.unlink()
        update_gallery(folder, [own], embedder)
        drop_photos(folder, is_missing_only=True)
        assert gallery.search(query, 12) == before
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(query, 12)) == 8


def test_the_removed_mean_component_is_limited() -> None:
    mean = np.array([0.1, -0.2, 0.2], dtype=np.float32)
    np.testing.assert_allclose(common_part(mean), COMMONNESS * mean)
    assert np.linalg.norm(common_part(3 * mean)) == pytest.approx(MOST_COMMON)
    assert common_part(np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]


def test_reports_count_regions(folder: Path, photos: Path, embedder: Embedder) -> None:
    report: IndexReport = update_gallery(folder, [photos], embedder)
    assert (report.unchanged, report.regions) == (12, 192)
