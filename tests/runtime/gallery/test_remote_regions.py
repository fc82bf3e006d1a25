"""Galleries with regions are pushed to real databases, and photos are found by their parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadRegion, ModelMismatch
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.index import drop_photos
from sbtk_runtime.gallery.push import PushReport, push_gallery
from sbtk_runtime.gallery.queries import Hit, Search
from sbtk_runtime.gallery.remote import RemoteError, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.postgres_server import PLAIN_PASSWORD, PostgresServer
from tests.tiny_gallery import unit_rows
from tests.tiny_regions import tiny_map_bundle
from tests.tiny_remote import Server

PHOTOS, DIM = 14, 16


@pytest.fixture(scope="module")
def region_embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    bundle = tiny_map_bundle(tmp_path_factory.mktemp("map"))
    with Embedder(bundle, engine="onnxruntime", threads=2, batch=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def region_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of patches of colour, a copy, and one that is too small to have regions."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "album").mkdir()
    for number in range(PHOTOS):
        random = np.random.default_rng(number)
        patches = random.integers(0, 256, (5, 4 + number % 3, 3), dtype=np.uint8)
        image = Image.fromarray(patches).resize((336 + 56 * (number % 2), 392), 0)
        image.save(folder / ("album" if number % 4 == 0 else "") / f"{number:02d}.png")
    (folder / "copy.png").write_bytes((folder / "01.png").read_bytes())
    Image.new("RGB", (100, 90), (200, 10, 30)).save(folder / "small.png")
    return folder


@pytest.fixture(scope="module")
def region_gallery(
    region_photos: Path, region_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("gallery") / "g.sbtk"
    update_gallery(folder, [region_photos], region_embedder, regions=9)
    return folder


def push(gallery: Path, url: str) -> PushReport:
    return push_gallery(gallery, open_store(url), "nas", batch=5)


def are_same(ours: list[Hit], theirs: list[Hit]) -> bool:
    scores = [hit.score for hit in theirs]
    return shown(ours) == shown(theirs) and [hit.score for hit in ours] == pytest.approx(
        scores,
        abs=1e-3,  # rows are float16
    )


def shown(hits: list[Hit]) -> list[tuple[str, object]]:
    """Return what is the same on disk and in a database; which of two copies comes first is not."""
    return [
        (
            min([hit.path, *(copy.path for copy in hit.copies)]),
            hit.region and tuple(round(part, 4) for part in hit.region),
        )
        for hit in hits
    ]


def test_regions_give_the_hits_of_the_gallery(
    url: str, region_gallery: Path, region_photos: Path
) -> None:
    report = push(region_gallery, url)
    assert (report.pushed, report.notices) == (PHOTOS + 2, ())
    found_regions = 0
    with (
        Gallery.open(region_gallery) as local,
        RemoteGallery.open(url, {"nas": region_photos}) as there,
    ):
        assert there.manifest.regions is not None and local.manifest.regions is not None
        assert there.manifest.regions.count == local.manifest.regions.count == 9
        ways: tuple[Search, ...] = ("auto", "exact")
        for query in unit_rows(12, DIM, seed=4):
            for under in (None, region_photos / "album"):
                for regions in (True, False):
                    for search in ways:
                        mine, theirs = (
                            one.answer(query, 6, search, under=under, regions=regions).hits
                            for one in (local, there)
                        )
                        assert are_same(theirs, mine)
                        found_regions += sum(hit.region is not None for hit in theirs)
                        assert regions or not any(hit.region for hit in theirs)
        assert found_regions > 20
        ids = {one.photo.path: one.photo.id for one in there.recent(50)}
        photo = next(one.photo for one in local.recent(50) if one.photo.path.endswith("05.png"))
        for box in (None, (0.0, 0.0, 0.5, 0.5), (0.6, 0.5, 0.4, 0.5)):
            mine, theirs = (
                one.similar(number, 6, region=box).hits
                for one, number in ((local, photo.id), (there, ids[photo.path]))
            )
            assert are_same(theirs, mine)
        small = ids[str(region_photos / "small.png")]
        for number, wrong in ((small, (0.0, 0.0, 0.5, 0.5)), (ids[photo.path], (0.6, 0, 0.5, 1))):
            with pytest.raises(BadRegion):
                there.similar(number, 3, region=wrong)


def test_regions_are_updated_and_deleted_with_their_photos(
    server: Server, url: str, region_photos: Path, region_embedder: Embedder, tmp_path: Path
) -> None:
    database = url.split("/")[-1]
    update_gallery(tmp_path / "g.sbtk", [region_photos], region_embedder, regions=9)
    push(tmp_path / "g.sbtk", url)
    before = server.count_regions(database, "sbtk")
    assert before[1] == PHOTOS + 1  # the small one has none
    push(tmp_path / "g.sbtk", url)
    assert server.count_regions(database, "sbtk") == before
    drop_photos(tmp_path / "g.sbtk", region_photos / "album")
    assert push(tmp_path / "g.sbtk", url).deleted == 4
    assert server.count_regions(database, "sbtk") == (before[0] - 4 * 9, before[1] - 4)
    with RemoteGallery.open(url) as there:
        assert there.manifest.regions is not None
        assert there.manifest.regions.rows == before[0] - 4 * 9


def test_damaged_regions_are_counted_and_pushed_once_they_are_intact(
    server: Server, url: str, region_photos: Path, region_embedder: Embedder, tmp_path: Path
) -> None:
    folder, database = tmp_path / "g.sbtk", url.split("/")[-1]
    update_gallery(folder, [region_photos], region_embedder, regions=9)
    with Gallery.open(folder) as gallery:
        first = int(gallery._view.region_spans().first_rows[2])
    shard = next((folder / "vectors").iterdir())
    content = np.fromfile(shard, dtype=np.uint8).reshape(-1, 2 * DIM)
    content[first : first + 2] ^= 0x55
    content.tofile(shard)
    every = (PHOTOS + 1) * 9
    for pushed in (PHOTOS + 2, 1):
        report = push(folder, url)
        assert (report.pushed, report.damaged, report.damaged_regions) == (pushed, 0, 1)
        assert server.count_regions(database, "sbtk")[0] == every - 2
        with RemoteGallery.open(url) as there:
            assert there.manifest.regions is not None
            assert there.manifest.regions.rows == every - 2
    assert verify_gallery(folder, repair=True).repaired_regions == 1
    update_gallery(folder, [region_photos], region_embedder)
    for pushed in (1, 0):
        report = push(folder, url)
        assert (report.pushed, report.damaged_regions) == (pushed, 0)
        assert server.count_regions(database, "sbtk")[0] == every


def test_collections_with_and_without_regions_do_not_mix(
    server: Server,
    url: str,
    region_gallery: Path,
    region_photos: Path,
    region_embedder: Embedder,
    tmp_path: Path,
) -> None:
    plain, nine = (f"{url}?collection={name}" for name in ("plain", "nine"))
    update_gallery(tmp_path / "plain.sbtk", [region_photos], region_embedder)
    push(tmp_path / "plain.sbtk", plain)
    push(region_gallery, nine)
    for pushed, other in ((region_gallery, plain), (tmp_path / "plain.sbtk", nine)):
        with pytest.raises(ModelMismatch) as caught:
            push(pushed, other)
        assert "no regions" in str(caught.value) and "9 regions" in str(caught.value)
    with RemoteGallery.open(plain) as there, pytest.raises(BadRegion, match="whole frames only"):
        there.similar(there.recent(1)[0].photo.id, 3, region=(0, 0, 0.5, 0.5))
    if isinstance(server, PostgresServer):
        _check_that_a_reader_needs_the_regions(server, url.split("/")[-1])


def _check_that_a_reader_needs_the_regions(server: PostgresServer, database: str) -> None:
    server.execute("DROP ROLE IF EXISTS reader")
    server.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PLAIN_PASSWORD}'")
    server.execute("GRANT SELECT ON nine, nine_info, nine_parts TO reader", database)
    with RemoteGallery.open(server.url(database, user="reader", collection="nine")) as there:
        assert there.answer(unit_rows(1, DIM)[0], 3, regions=False).hits
        with pytest.raises(RemoteError) as refused:
            there.answer(unit_rows(1, DIM)[0], 3)
        assert "nine_parts, nine_regions TO USER" in refused.value.next_step
