"""Hits of a gallery, re-ranked by expansion and diffusion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME, update_neighbours
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.manifest import MatchRule
from sbtk_runtime.preprocess import KINDS
from sbtk_runtime.rerank import AUTO_FROM, CANDIDATES, RERANKS, Rerank, Reranker
from tests.tiny_gallery import code_gallery_of, gallery_of, tiny_itq, unit_rows

DIM = 16
WAYS: list[Rerank] = ["expand", "diffusion"]


def made(folder: Path, rows: NDArray[np.float32]) -> Path:
    gallery_of(folder, rows)
    vectors = Vectors(folder / "vectors", rows.shape[1])
    update_neighbours(folder, vectors, np.arange(len(rows)), lambda text: None)
    return folder


@pytest.mark.parametrize("rerank", WAYS)
def test_a_gallery_reranks_hits_as_an_array_in_memory(tmp_path: Path, rerank: Rerank) -> None:
    rows = unit_rows(300, DIM)
    with Gallery.open(made(tmp_path / "g.sbtk", rows)) as gallery:
        stored, _ = Vectors(gallery.folder / "vectors", DIM).read(np.arange(300))
        reranker = Reranker(stored, rerank)
        for query in unit_rows(5, DIM, seed=1):
            hits = gallery.search(query, 300, rerank=rerank)
            scores = reranker.scores(query[None])[0][[hit.id - 1 for hit in hits]]
            # The gallery keeps cosines of neighbours in half precision.
            assert (np.diff(scores) < 5e-3).all()
            assert scores[0] == scores.max()
            assert [hit.rank for hit in hits] == list(range(1, 301))
            for hit in hits[:20]:
                assert hit.score == pytest.approx(float(stored[hit.id - 1] @ query), abs=1e-5)
            few = gallery.search(query, 7, rerank=rerank)
            assert [hit.id for hit in few] == [hit.id for hit in hits[:7]]


def test_more_hits_than_candidates_are_each_returned_once(tmp_path: Path) -> None:
    count = CANDIDATES + 250
    with Gallery.open(made(tmp_path / "g.sbtk", unit_rows(count, DIM))) as gallery:
        query = unit_rows(1, DIM, seed=2)[0]
        hits = gallery.search(query, count, rerank="diffusion")
        assert sorted(hit.id for hit in hits) == list(range(1, count + 1))
        plain = gallery.search(query, count)
        assert [hit.id for hit in hits[CANDIDATES:]] == [hit.id for hit in plain[CANDIDATES:]]


@pytest.mark.parametrize("rerank", WAYS)
def test_photo_queries_and_similar_photos_are_reranked_too(tmp_path: Path, rerank: Rerank) -> None:
    with Gallery.open(made(tmp_path / "g.sbtk", unit_rows(60, DIM))) as gallery:
        query = unit_rows(1, DIM, seed=3)[0]
        below = gallery.search(query, 60, under="/photos/0002", rerank=rerank)
        assert sorted(hit.id for hit in below) == list(range(21, 31))
        similar = gallery.similar(5, 12, rerank=rerank)
        assert len(similar.hits) == 12
        assert 5 not in [hit.id for hit in similar.hits]


def test_the_error_for_missing_neighbours_says_how_to_make_them(tmp_path: Path) -> None:
    folder = tmp_path / "g.sbtk"
    gallery_of(folder, unit_rows(30, DIM))
    with Gallery.open(folder) as gallery:
        query = unit_rows(1, DIM, seed=4)[0]
        with pytest.raises(BadGallery, match="has no neighbours") as caught:
            gallery.search(query, rerank="diffusion")
        assert "sbtk index" in str(caught.value.next_step)
        assert len(gallery.search(query, rerank="expand")) == 10
        with pytest.raises(BadConfig, match="'magic'"):
            gallery.search(query, rerank="magic")  # type: ignore[arg-type]


def test_damaged_neighbours_are_reported_and_found_by_verify(tmp_path: Path) -> None:
    folder = made(tmp_path / "g.sbtk", unit_rows(30, DIM))
    assert verify_gallery(folder).is_good
    path = folder / NEIGHBOURS_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with (
        Gallery.open(folder) as gallery,
        pytest.raises(BadGallery, match=r"neighbours\.npz is damaged"),
    ):
        gallery.search(unit_rows(1, DIM, seed=5)[0], rerank="diffusion")
    assert any("neighbours.npz" in problem for problem in verify_gallery(folder).problems)


def test_a_binary_gallery_is_not_reranked(tmp_path: Path) -> None:
    itq = tiny_itq(DIM, 8)
    rows = unit_rows(30, DIM)
    code_gallery_of(tmp_path / "g.sbtk", itq.codes(rows), itq)
    with (
        Gallery.open(tmp_path / "g.sbtk") as gallery,
        pytest.raises(BadConfig, match="diffusion of a binary gallery"),
    ):
        gallery.search(rows[0], rerank="diffusion")


@pytest.mark.parametrize(
    ("count", "chosen"), [(AUTO_FROM - 1, "none"), (AUTO_FROM, "diffusion"), (700, "diffusion")]
)
def test_auto_diffuses_the_hits_of_sketches_in_large_galleries(
    tmp_path: Path, count: int, chosen: Rerank
) -> None:
    with Gallery.open(made(tmp_path / "g.sbtk", unit_rows(count, DIM))) as gallery:
        assert gallery.choose_rerank("auto", "sketch") == chosen
        assert gallery.choose_rerank("auto", "photo") == "none"
        for choice in (*WAYS, "none"):
            for kind in KINDS:
                assert gallery.choose_rerank(choice, kind) == choice
        assert not gallery.notices


def test_auto_orders_by_score_if_there_are_no_neighbours(tmp_path: Path) -> None:
    rows = unit_rows(AUTO_FROM, DIM)
    folder = made(tmp_path / "g.sbtk", rows)
    path = folder / NEIGHBOURS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with Gallery.open(folder) as gallery:
        assert gallery.choose_rerank("auto", "sketch") == "none"
        assert "neighbours.npz is damaged" in gallery.notices[0]
        assert "not reranked" in gallery.notices[0]
    path.unlink()
    with Gallery.open(folder) as gallery:
        assert gallery.choose_rerank("auto", "sketch") == "none"
        assert not gallery.notices
    itq = tiny_itq(DIM, 8)
    code_gallery_of(tmp_path / "codes.sbtk", itq.codes(rows), itq)
    with Gallery.open(tmp_path / "codes.sbtk") as gallery:
        assert gallery.choose_rerank("auto", "sketch") == "none"


def test_whether_any_photo_is_close_depends_on_no_order(tmp_path: Path) -> None:
    rule, found = MatchRule(0.75, 0.0), 0
    with Gallery.open(made(tmp_path / "g.sbtk", unit_rows(300, DIM))) as gallery:
        for query in unit_rows(60, DIM, seed=4):
            is_doubtful = gallery.search(query, 1)[0].score < rule.lowest_close(300)
            for rerank in RERANKS:
                for k, offset in ((1, 0), (3, 0), (3, 2), (300, 0)):
                    answer = gallery.answer(query, k, rerank=rerank, offset=offset, match_rule=rule)
                    assert answer.no_close_match is is_doubtful
                    marks = {hit.match for hit in answer.hits}
                    found += not is_doubtful and marks == {"weak"}
    assert found  # a close photo that is not among the first hits
