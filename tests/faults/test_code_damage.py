"""Damage to a binary gallery is found by hashes, since any bytes are a valid code."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import write_photos
from tests.tiny_gallery import code_gallery_of, tiny_itq, unit_rows

COUNT, DIM, BITS = 200, 32, 16
CODE_BYTES = BITS // 8
QUERY = unit_rows(1, DIM, seed=9)[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "g.sbtk"
    itq = tiny_itq(DIM, BITS)
    code_gallery_of(folder, itq.codes(unit_rows(COUNT, DIM)), itq)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A gallery as it was made before there were snapshots and checksums of rows."""
    itq = tiny_itq(DIM, BITS)
    code_gallery_of(tmp_path / "old.sbtk", itq.codes(unit_rows(COUNT, DIM)), itq, is_old=True)
    return tmp_path / "old.sbtk"


def shard_of(folder: Path) -> Path:
    return folder / "vectors" / "000000.bits"


def change_facts(folder: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(folder / CATALOGUE_NAME)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("kept", [0, 25, COUNT - 25])
def test_a_truncated_shard_is_searched_up_to_its_end(folder: Path, kept: int) -> None:
    data = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(data[: kept * CODE_BYTES + 1])
    lost = f"the embeddings of {COUNT - kept} of {COUNT} photos are damaged or missing"
    with Gallery.open(folder) as gallery:
        if kept:
            hits = gallery.search(QUERY, COUNT)
            assert sorted(hit.id for hit in hits) == list(range(1, kept + 1))
        else:
            with pytest.raises(BadGallery, match=lost):
                gallery.search(QUERY, COUNT)
        assert [text for text in gallery.notices if text.startswith(lost)]
    report = verify_gallery(folder)
    assert report.problems == (f"the embeddings of {COUNT - kept} photos are damaged or missing",)


def test_a_shard_truncated_during_a_search_is_told(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(QUERY, 3)) == 3
        os.truncate(shard_of(folder), 25 * CODE_BYTES)
        assert len(gallery.search(QUERY, 3)) == 3
        assert any(f"{COUNT - 25} of {COUNT} photos" in text for text in gallery.notices)
        os.truncate(shard_of(folder), 0)
        with pytest.raises(BadGallery, match=f"{COUNT} of {COUNT} photos"):
            gallery.search(QUERY, 3)


def test_lost_codes_are_rebuilt(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 9)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, commit_every=4, bits=BITS)
    before = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(before[: 5 * CODE_BYTES])
    report = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (report.new, report.unchanged, report.live) == (4, 5, 9)
    assert "4 photos were lost" in report.notices[0]
    assert verify_gallery(folder).problems == ()
    # The lost ones lie behind those that were committed.
    after = shard_of(folder).read_bytes()
    assert after[: 5 * CODE_BYTES] == before[: 5 * CODE_BYTES]
    assert after[9 * CODE_BYTES :] == before[5 * CODE_BYTES :]


def test_a_flipped_bit_is_found_and_repaired(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 9)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, commit_every=4, bits=BITS)
    data = bytearray(shard_of(folder).read_bytes())
    data[6 * CODE_BYTES] ^= 1
    shard_of(folder).write_bytes(data)
    assert verify_gallery(folder).problems == ("the embeddings of 1 photo are damaged or missing",)
    assert verify_gallery(folder, repair=True).repaired == 1
    again = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (again.new, again.unchanged, again.live) == (1, 8, 9)
    assert verify_gallery(folder).problems == ()


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE facts SET value = ? WHERE name = 'itq'", tiny_itq(DIM, BITS, 1).to_bytes()),
        ("UPDATE facts SET value = ? WHERE name = 'itq'", b"no zip"),
        ("UPDATE facts SET value = ? WHERE name = 'itq'", 7),
        ("UPDATE facts SET value = ? WHERE name = 'itq_sha256'", "0" * 64),
        ("DELETE FROM facts WHERE name = ?", "itq"),
    ],
)
def test_a_damaged_itq_file_makes_no_codes(old: Path, statement: str, value: object) -> None:
    code = tiny_itq(DIM, BITS).codes(QUERY[None])[0]
    with Gallery.open(old) as gallery:
        expected = gallery.search(code, 5)
    change_facts(old, statement, value)
    with Gallery.open(old) as gallery:
        with pytest.raises(BadGallery, match="damaged ITQ") as caught:
            gallery.search(QUERY, 5)
        assert gallery.search(code, 5) == expected
    assert "sbtk index PHOTOS --bits" in caught.value.next_step
    (problem,) = verify_gallery(old).problems
    assert "damaged ITQ" in problem


def test_an_update_with_a_damaged_itq_file_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 2)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, bits=BITS)
    change_facts(folder, "UPDATE facts SET value = ? WHERE name = 'itq'", b"no zip")
    write_photos(tmp_path / "photos", 3)
    with pytest.raises(BadGallery, match="damaged ITQ"):
        update_gallery(folder, [tmp_path / "photos"], embedder)


@pytest.mark.parametrize(
    "change", [{"bits": None}, {"bits": None, "format": 1}, {"bits": 8}, {"bits": 12}, {"dim": 64}]
)
def test_a_manifest_that_contradicts_the_catalogue_is_refused(
    folder: Path, change: dict[str, Any]
) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    assert values["bits"] == BITS
    (folder / "manifest.json").write_text(json.dumps(values | change))
    with pytest.raises(BadGallery, match=r"manifest\.json"):
        Gallery.open(folder)


def test_a_binary_gallery_without_its_manifest_stays_binary(
    tmp_path: Path, embedder: Embedder
) -> None:
    write_photos(tmp_path / "photos", 5)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, bits=BITS)
    with Gallery.open(folder) as gallery:
        expected = gallery.search(QUERY, 5)
    (folder / "manifest.json").unlink()
    report = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (report.new, report.unchanged) == (0, 5)
    with Gallery.open(folder) as gallery:
        assert gallery.manifest.bits == BITS
        assert gallery.search(QUERY, 5) == expected


def test_a_run_that_stored_nothing_fixes_no_options(tmp_path: Path, embedder: Embedder) -> None:
    """The first command was killed before its first commit; the next may want something else."""
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    (photos / "junk.jpg").write_bytes(b"junk")
    with pytest.raises(BadGallery, match="0 of 1 files"):
        update_gallery(folder, [photos], embedder, bits=BITS)
    shard_of(folder).parent.mkdir()
    shard_of(folder).write_bytes(b"left behind")
    write_photos(photos, 3)
    update_gallery(folder, [photos], embedder)
    assert [path.name for path in (folder / "vectors").iterdir()] == ["000000.f16"]
    with Gallery.open(folder) as gallery:
        assert gallery.manifest.bits is None
        assert len(gallery.search(QUERY, 3, "hnsw")) == 3
    assert verify_gallery(folder).problems == ()
