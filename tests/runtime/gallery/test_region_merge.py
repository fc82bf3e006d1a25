"""Merged galleries with regions: they answer as one gallery of the same photos does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.merge import merge_galleries
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.runtime.gallery.test_regions import CORNERS, scene, thing
from tests.tiny_regions import tiny_map_bundle

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    bundle = tiny_map_bundle(tmp_path_factory.mktemp("map"))
    with Embedder(bundle, engine="onnxruntime", threads=2, batch=4) as opened:
        yield opened


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Return two folders with a photo in common, a panorama, and a photo that is too small."""
    roots = [tmp_path / "a", tmp_path / "b"]
    for number, colour in enumerate(COLOURS):
        for corner, box in enumerate(CORNERS):
            path = roots[corner % 2] / f"{colour}-{corner}.png"
            scene(path, colour, box, 10 * number + corner)
    scene(roots[0] / "red-wide.png", "red", (0.4, 0.2, 0.1, 0.5), 5, (1800, 300))
    Image.new("RGB", (90, 90), (90, 90, 90)).save(roots[1] / "small.png")
    shutil.copy(roots[0] / "red-0.png", roots[1] / "copy.png")
    return roots


def index(roots: Sequence[Path], embedder: Embedder, regions: int | None = 16) -> list[Path]:
    folders = [root.with_suffix(".sbtk") for root in roots]
    for root, folder in zip(roots, folders, strict=True):
        update_gallery(folder, [root], embedder, regions=regions)
    return folders


def answers(folder: Path, embedder: Embedder) -> list[object]:
    """Return paths, scores and regions of the hits of several queries."""
    with Gallery.open(folder) as gallery:
        return [
            [
                (hit.path, round(hit.score, 3), hit.region)
                for hit in gallery.query(thing(colour), embedder, 20, "photo", fold=False)
            ]
            for colour in COLOURS
        ]


@pytest.mark.parametrize("commit_every", [17, 4096])
def test_a_merged_gallery_with_regions_gives_the_hits_of_an_indexed_one(
    tmp_path: Path, roots: list[Path], embedder: Embedder, commit_every: int
) -> None:
    one = tmp_path / "one.sbtk"
    update_gallery(one, roots, embedder, regions=16)
    merged = tmp_path / "merged.sbtk"
    report = merge_galleries(index(roots, embedder), merged, commit_every=commit_every)
    assert (report.live, report.damaged_regions) == (15, 0)
    for mine, theirs in zip(answers(merged, embedder), answers(one, embedder), strict=True):
        assert sorted(mine) == sorted(theirs)  # type: ignore[call-overload]
    with Gallery.open(merged) as gallery, Gallery.open(one) as other:
        assert gallery.manifest.regions == other.manifest.regions
        assert gallery.manifest.format == 5
    assert not verify_gallery(merged).problems
    again = merge_galleries([root.with_suffix(".sbtk") for root in roots], merged)
    assert (again.copied, again.unchanged) == (0, 15)
    # Nothing is left to embed.
    (tmp_path / "a" / "blue-0.png").unlink()
    merge_again = index(roots, embedder)
    report = merge_galleries(merge_again, merged)
    assert (report.removed, report.live) == (1, 14)
    assert not verify_gallery(merged).problems


def test_galleries_with_different_regions_are_not_merged(
    tmp_path: Path, roots: list[Path], embedder: Embedder
) -> None:
    with_16, plain = tmp_path / "16.sbtk", tmp_path / "plain.sbtk"
    with_9, merged = tmp_path / "9.sbtk", tmp_path / "all.sbtk"
    for folder, count in ((with_16, 16), (with_9, 9), (plain, None)):
        update_gallery(folder, [roots[0]], embedder, regions=count)
    for sources, said in (
        (
            [with_16, plain],
            "16.sbtk keeps 16 regions of each photo, .*plain.sbtk whole frames only",
        ),
        ([plain, with_16], "plain.sbtk keeps whole frames only, .*16.sbtk 16 regions"),
        ([with_9, with_16], "9.sbtk keeps 9 regions of each photo, .*16.sbtk 16 regions"),
    ):
        with pytest.raises(BadGallery, match=said) as caught:
            merge_galleries(sources, merged)
        assert "sbtk index PHOTOS --regions" in caught.value.next_step
        assert not merged.exists()
    merge_galleries([with_16], merged)
    for other in (with_9, plain):
        with pytest.raises(BadGallery, match="kept 16 regions of each photo"):
            merge_galleries([other], merged)


def test_photos_with_damaged_regions_are_merged_without_them_and_counted(
    tmp_path: Path, roots: list[Path], embedder: Embedder
) -> None:
    folders = index(roots, embedder)
    with Gallery.open(folders[0]) as gallery:
        first = int(gallery._view.region_spans().first_rows[2]) + 3
        width = 2 * gallery.manifest.dim
    shard = next((folders[0] / "vectors").iterdir())
    content = np.fromfile(shard, dtype=np.uint8)
    content[first * width : (first + 1) * width] ^= 0x55
    content.tofile(shard)
    report = merge_galleries(folders, tmp_path / "merged.sbtk")
    assert (report.live, report.damaged, report.damaged_regions) == (15, 0, 1)
    again = merge_galleries(folders, tmp_path / "merged.sbtk")
    assert (again.copied, again.damaged_regions) == (0, 1)
    with Gallery.open(tmp_path / "merged.sbtk") as gallery:
        assert gallery.manifest.regions is not None
        spans = gallery._view.region_spans()
        assert len(spans.counts) == 12
    assert verify_gallery(folders[0], repair=True).problems
    index(roots, embedder)
    report = merge_galleries(folders, tmp_path / "merged.sbtk", commit_every=4)
    assert (report.copied, report.damaged_regions) == (0, 0)
    assert not verify_gallery(tmp_path / "merged.sbtk").problems
    one = tmp_path / "one.sbtk"
    update_gallery(one, roots, embedder, regions=16)
    for mine, theirs in zip(
        answers(tmp_path / "merged.sbtk", embedder), answers(one, embedder), strict=True
    ):
        assert sorted(mine) == sorted(theirs)  # type: ignore[call-overload]


def test_regions_that_were_embedded_since_are_merged(
    tmp_path: Path, roots: list[Path], embedder: Embedder
) -> None:
    """An update with regions was stopped, and what it had embedded was merged."""
    folders = index(roots, embedder, None)
    hidden = roots[1].rename(tmp_path / "elsewhere")
    for folder in folders:
        update_gallery(folder, [roots[0]], embedder, regions=16)
    merged = tmp_path / "merged.sbtk"
    assert merge_galleries(folders, merged).damaged_regions == 0
    hidden.rename(roots[1])
    index(roots, embedder)
    merge_galleries(folders, merged)
    with Gallery.open(merged) as gallery:
        assert len(gallery._view.region_spans().counts) == 13  # one photo is small
    assert not verify_gallery(merged).problems
