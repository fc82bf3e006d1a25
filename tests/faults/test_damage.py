"""Damaged, hostile and foreign files of a gallery are reported, and never crash a reader."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery, GalleryBusy
from sbtk_runtime.files import WriterLock, sha256_of_file
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.catalogue import Embedding
from sbtk_runtime.gallery.gallery import Gallery, Search
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import read_gallery_manifest
from tests.tiny import write_photos
from tests.tiny_gallery import gallery_of, photo_gallery, unit_rows

COUNT, DIM = 400, 16
QUERY = unit_rows(1, DIM, seed=9)[0]


@pytest.fixture(autouse=True, scope="module")
def graphs() -> Iterator[None]:
    """Give the galleries of this file a graph, whatever their size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hnsw, "GRAPH_FROM", 1)
        yield


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A gallery as it was made before there were snapshots and checksums of rows."""
    folder = tmp_path / "old.sbtk"
    gallery_of(folder, unit_rows(COUNT, DIM), commit_every=COUNT, is_old=True)
    return folder


@pytest.fixture
def large_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the galleries of this file large ones, which open their graph at once."""
    monkeypatch.setattr(reading, "EXACT_BELOW", 10)


def ids(folder: Path, search: Search = "auto") -> list[int]:
    with Gallery.open(folder) as gallery:
        return [hit.id for hit in gallery.search(QUERY, 10, search)]


def expected_ids() -> list[int]:
    scores = unit_rows(COUNT, DIM) @ QUERY
    return [int(index) + 1 for index in np.argsort(-scores, kind="stable")[:10]]


def change_catalogue(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / "catalogue.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def graph_of(folder: Path) -> Path:
    return folder / "graph-1.hnsw"


@pytest.mark.usefixtures("large_from")
@pytest.mark.parametrize("sixteenths", range(16))
def test_a_truncated_graph_is_detected_and_codes_are_used(folder: Path, sixteenths: int) -> None:
    data = graph_of(folder).read_bytes()
    graph_of(folder).write_bytes(data[: len(data) * sixteenths // 16])
    with Gallery.open(folder) as gallery:
        (notice,) = gallery.notices
        assert "graph-1.hnsw has SHA-256" in notice
        assert "sbtk index" in notice
        assert [hit.id for hit in gallery.search(QUERY, 10)] == expected_ids()
        # Asked for by name, the graph is built from the vectors.
        assert [hit.id for hit in gallery.search(QUERY, 10, "hnsw")] == expected_ids()


@pytest.mark.usefixtures("large_from")
def test_flipped_bytes_never_reach_hnswlib(folder: Path) -> None:
    data = graph_of(folder).read_bytes()
    dice = random.Random(0)
    # The header's offsets crash hnswlib, so they are always among the flipped.
    places = [0, 8, 16, 24, 32, 40, 48, 96, *(dice.randrange(len(data) - 4) for _ in range(40))]
    for place in places:
        flipped = bytearray(data)
        flipped[place : place + 4] = bytes(byte ^ 0xFF for byte in flipped[place : place + 4])
        graph_of(folder).write_bytes(flipped)
        with Gallery.open(folder) as gallery:
            assert "SHA-256" in gallery.notices[0]
            assert [hit.id for hit in gallery.search(QUERY, 10)] == expected_ids()
    graph_of(folder).write_bytes(data)
    with Gallery.open(folder) as gallery:
        assert gallery.notices == []
        assert [hit.id for hit in gallery.search(QUERY, 10)] == expected_ids()


@pytest.mark.usefixtures("large_from")
def test_a_missing_or_linked_graph_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.hnsw"
    graph_of(folder).rename(elsewhere)
    assert ids(folder) == expected_ids()
    graph_of(folder).symlink_to(elsewhere)
    with Gallery.open(folder) as gallery:
        assert "missing" in gallery.notices[0]
        assert [hit.id for hit in gallery.search(QUERY, 10)] == expected_ids()


def test_a_small_gallery_rebuilds_a_damaged_graph_on_request(folder: Path) -> None:
    graph_of(folder).write_bytes(b"")
    assert ids(folder) == expected_ids()
    with Gallery.open(folder) as gallery:
        assert [hit.id for hit in gallery.search(QUERY, 10, "hnsw")] == expected_ids()
        assert "SHA-256" in gallery.notices[0]


def test_the_next_update_rebuilds_a_damaged_graph(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 8)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder)
    graph_of(folder).write_bytes(graph_of(folder).read_bytes()[:-1])
    assert not verify_gallery(folder).is_good
    messages: list[str] = []
    report = update_gallery(folder, [tmp_path / "photos"], embedder, notify=messages.append)
    assert report.unchanged == report.live == 8
    assert any("rebuilt" in text for text in messages)
    assert [path.name for path in folder.glob("graph-*")] == ["graph-2.hnsw"]
    assert verify_gallery(folder).is_good


def shard_of(folder: Path) -> Path:
    return folder / "vectors" / "000000.f16"


@pytest.mark.parametrize("sixteenths", range(0, 16, 3))
def test_a_truncated_shard_is_searched_up_to_its_end(folder: Path, sixteenths: int) -> None:
    data = shard_of(folder).read_bytes()
    kept = COUNT * sixteenths // 16
    shard_of(folder).write_bytes(data[: kept * 2 * DIM + 5])
    lost = f"the embeddings of {COUNT - kept} of {COUNT} photos are damaged or missing"
    with Gallery.open(folder) as gallery:
        (notice,) = gallery.notices
        assert notice.startswith(lost)
        assert "--repair" in notice
        if kept:
            hits = gallery.search(QUERY, COUNT, "exact")
            assert sorted(hit.id for hit in hits) == list(range(1, kept + 1))
            assert gallery.answer(QUERY, 3).notices == (notice,)
        else:
            with pytest.raises(BadGallery, match=lost):
                gallery.search(QUERY, COUNT)
    assert any(f"of {COUNT - kept} photos" in text for text in verify_gallery(folder).problems)


def test_lost_vectors_are_embedded_again(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 9)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, commit_every=4)
    shard_of(folder).write_bytes(shard_of(folder).read_bytes()[: 5 * 2 * DIM])
    report = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (report.new, report.unchanged, report.live) == (4, 5, 9)
    assert "4 photos were lost" in report.notices[0]
    assert verify_gallery(folder).problems == ()


def test_a_flipped_bit_in_the_vectors_is_found_and_repaired(
    tmp_path: Path, embedder: Embedder
) -> None:
    write_photos(tmp_path / "photos", 9)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, commit_every=4)
    data = bytearray(shard_of(folder).read_bytes())
    data[6 * 2 * DIM] ^= 1  # the last bit of a mantissa: the row is still of length 1
    shard_of(folder).write_bytes(data)
    report = verify_gallery(folder)
    assert report.problems == ("the embeddings of 1 photo are damaged or missing",)
    assert report.repaired == 0
    assert verify_gallery(folder, repair=True).repaired == 1
    again = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (again.new, again.unchanged, again.live) == (1, 8, 9)
    assert verify_gallery(folder).problems == ()


def test_a_row_beyond_the_vectors_is_never_a_hit(old: Path) -> None:
    change_catalogue(old, "UPDATE photos SET row = 99999 WHERE id = 5")
    with Gallery.open(old) as gallery:
        hits = gallery.search(QUERY, COUNT, "exact")
        (notice,) = [text for text in gallery.notices if "--repair" in text]
    assert f"1 of {COUNT} photos" in notice
    assert 5 not in [hit.id for hit in hits]
    assert len(hits) == COUNT - 1
    assert not verify_gallery(old).is_good


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE photos SET row = 'x' WHERE id = 5",
        "UPDATE photos SET row = 'x'",
        "UPDATE photos SET row = -7 WHERE id = 5",
        "UPDATE photos SET row = row - 7",
        "UPDATE facts SET value = 'x' WHERE name = 'dim'",
        "INSERT INTO facts VALUES ('bits', 'x')",
    ],
)
def test_impossible_values_in_the_catalogue_are_damage(old: Path, statement: str) -> None:
    change_catalogue(old, statement)
    with pytest.raises(BadGallery, match=r"catalogue\.sqlite is damaged"):
        ids(old)
    with pytest.raises(BadGallery, match=r"catalogue\.sqlite is damaged"):
        verify_gallery(old)


@pytest.mark.parametrize(
    "change",
    ["first_row = -1", "count = -1", "count = 0", "count = 1 << 40", "first_row = 1 << 60"],
)
def test_impossible_batches_in_the_catalogue_verify_no_rows(old: Path, change: str) -> None:
    change_catalogue(old, f"UPDATE batches SET {change}")
    assert f"the embeddings of {COUNT} photos are damaged or missing" in (
        verify_gallery(old).problems
    )
    with pytest.raises(BadGallery, match=f"{COUNT} of {COUNT} photos are damaged") as caught:
        ids(old)
    assert "--repair" in caught.value.next_step


def test_an_error_about_bytes_that_are_not_text_is_printable(old: Path) -> None:
    """SQLite quotes the damaged statement, and Python cannot decode it."""
    path = old / "catalogue.sqlite"
    data = path.read_bytes()
    assert data.count(b"CREATE TABLE facts") == 1
    path.write_bytes(data.replace(b"CREATE TABLE facts", b"CREATE \xccABLE facts"))
    with pytest.raises(BadGallery, match=r"catalogue\.sqlite is damaged") as caught:
        ids(old)
    assert "sbtk index PHOTOS" in caught.value.next_step


HOSTILE: dict[str, Any] = {
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": b'{"generation": ',
    "empty": b"",
    "not an object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "large": b" " * (1 << 20) + b"{}",
    "no generation": {"generation": None},
    "text for a number": {"live": "many"},
    "true for a number": {"live": True},
    "negative": {"live": -1},
    "huge": {"dim": 10**9},
    "another dim": {"dim": DIM * 2},
    "a file elsewhere": {"graph": {"file": "../../etc/passwd"}},
    "an absolute file": {"graph": {"file": "/etc/passwd"}},
    "no hash": {"graph": {"sha256": "abc"}},
    "huge m": {"graph": {"m": 10**6}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    content = HOSTILE[name]
    if isinstance(content, dict):
        manifest = json.loads(path.read_text())
        graph = manifest["graph"] | content.pop("graph", {})
        manifest.pop("checksum"), manifest.pop("snapshot")
        content = json.dumps({**manifest, "graph": graph, **content}).encode()
    path.write_bytes(content)
    with pytest.raises(BadGallery, match=r"manifest\.json"):
        Gallery.open(folder)
    if name == "another dim":
        assert not verify_gallery(folder).is_good
        return
    with pytest.raises(BadGallery, match=r"manifest\.json"):
        verify_gallery(folder)


def test_a_linked_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BadGallery, match="symbolic link"):
        Gallery.open(folder)


def test_a_newer_manifest_says_so(folder: Path, tmp_path: Path, embedder: Embedder) -> None:
    path = folder / "manifest.json"
    content = json.dumps({**json.loads(path.read_text()), "format": 99})
    path.write_text(content)
    write_photos(tmp_path / "photos", 1)
    with pytest.raises(BadGallery, match="newer version of sbtk") as caught:
        Gallery.open(folder)
    assert caught.value.next_step == "pip install --upgrade sbtk"
    with pytest.raises(BadGallery, match="newer version of sbtk"):
        update_gallery(folder, [tmp_path / "photos"], embedder)
    assert path.read_text() == content


@pytest.mark.usefixtures("large_from")
@pytest.mark.parametrize("change", [{"count": COUNT + 1}, {"m": 8}])
def test_a_manifest_that_lies_about_the_graph_does_not_reach_hnswlib(
    folder: Path, change: dict[str, int]
) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum"), manifest.pop("snapshot")
    path.write_text(json.dumps({**manifest, "graph": {**manifest["graph"], **change}}))
    with Gallery.open(folder) as gallery:
        assert "is not a graph of" in gallery.notices[0]
        assert [hit.id for hit in gallery.search(QUERY, 10)] == expected_ids()


def test_a_lost_manifest_is_rebuilt_without_embedding(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 6, embedder)
    (photos / "photo-0000.jpg").unlink()
    update_gallery(folder, [photos], embedder)
    (folder / "manifest.json").write_bytes(b"")
    with pytest.raises(BadGallery) as caught:
        update_gallery(folder, [photos], embedder)
    assert caught.value.next_step.startswith(f"rm {folder}/manifest.json")
    (folder / "manifest.json").unlink()
    before = embedder.timings.files
    report = update_gallery(folder, [photos], embedder)
    assert embedder.timings.files == before
    assert (report.unchanged, report.live) == (5, 5)
    assert verify_gallery(folder).problems == ()


@pytest.mark.parametrize("name", ["catalogue.sqlite", "manifest.json"])
def test_a_gallery_without_one_of_its_files_is_reported(
    folder: Path, tmp_path: Path, embedder: Embedder, name: str
) -> None:
    (folder / name).unlink()
    if name == "manifest.json":
        with pytest.raises(BadGallery) as caught:
            Gallery.open(folder)
        assert "sbtk index" in caught.value.next_step
    else:
        assert ids(folder) == expected_ids()
        assert "catalogue.sqlite is missing" in verify_gallery(folder).problems[0]
        write_photos(tmp_path / "photos", 1)
        with pytest.raises(BadGallery, match="lost its catalogue"):
            update_gallery(folder, [tmp_path / "photos"], embedder)


def test_an_emptied_catalogue_is_not_mistaken_for_a_new_one(
    folder: Path, tmp_path: Path, embedder: Embedder
) -> None:
    (folder / "catalogue.sqlite").write_bytes(b"x")
    write_photos(tmp_path / "photos", 1)
    with pytest.raises(BadGallery, match="lost its catalogue"):
        update_gallery(folder, [tmp_path / "photos"], embedder)
    assert verify_gallery(folder).problems
    assert ids(folder) == expected_ids()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nothing"])
@pytest.mark.parametrize(
    "name", ["codes-1", "codes-7", "codes-1/sub", "graph-7.hnsw", "catalogue-7.sqlite"]
)
def test_whatever_has_the_name_of_a_file_of_the_gallery_is_cleared_but_not_what_it_links_to(
    tmp_path: Path, embedder: Embedder, name: str, kind: str
) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    others = tmp_path / "others"
    others.mkdir()
    (others / "letter.txt").write_text("Dear reader")
    path = folder / name
    if path.exists():
        path.rename(tmp_path / "away")
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "folder":
        shutil.copytree(others, path)
    else:
        path.symlink_to(others if kind == "link" else tmp_path / "nothing")
    for _ in range(2):
        assert update_gallery(folder, [photos], embedder).unchanged == 3
        assert verify_gallery(folder).problems == ()
    assert not path.exists() or name == "codes-1"
    assert not path.is_symlink()
    assert (others / "letter.txt").exists()


def test_stale_temporaries_and_orphans_are_cleared(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    for name in (
        ".manifest.json.tmp-999999",
        ".graph-2.hnsw.tmp-999999",
        "graph-7.hnsw",
        "catalogue-7.sqlite",
        "codes-1/000009.bits",
        "codes-7/rotation.npz",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"left behind")
    (folder / "vectors" / "000009.f16").write_bytes(b"left behind")
    update_gallery(folder, [photos], embedder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        ".sound",
        "catalogue-1.sqlite",
        "catalogue.sqlite",
        "codes-1",
        "graph-1.hnsw",
        "manifest.json",
        "neighbours.npz",
        "vectors",
    ]
    assert [path.name for path in (folder / "vectors").iterdir()] == ["000000.f16"]
    codes = [path.name for path in (folder / "codes-1").iterdir()]
    assert sorted(codes) == ["000000.bits", "rotation.npz"]


def share_row(folder: Path, path: Path, row: int) -> None:
    """Add a photo to the next generation that has the row of another."""
    status = path.stat()
    stamps = (status.st_size, status.st_mtime_ns)
    photo = Embedding(
        os.fsencode(path), *stamps, sha256_of_file(path), row, status.st_ctime_ns, status.st_ino
    )
    with Catalogue(folder, read_gallery_manifest(folder).generation + 1) as catalogue:
        catalogue.commit([photo], [], [])


def test_repair_forgets_all_photos_of_a_damaged_row_and_no_others(
    tmp_path: Path, embedder: Embedder
) -> None:
    """Photos of the same bytes share a row, and one of them is missing for now."""
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 6)
    update_gallery(folder, [photos], embedder)
    for number in range(2):
        twin = Path(shutil.copy(paths[0], photos / f"twin-{number}.jpg"))
        share_row(folder, twin, 0)
    update_gallery(folder, [photos], embedder)
    twin.unlink()
    assert update_gallery(folder, [photos], embedder).live == 7
    data = bytearray(shard_of(folder).read_bytes())
    data[1] ^= 0x80  # the sign of a number: the row is still of length 1
    shard_of(folder).write_bytes(data)
    with Gallery.open(folder) as gallery:
        names = {Path(hit.path).name for hit in gallery.search(QUERY, 20)}
        assert gallery.unusable == 2
        assert names == {path.name for path in paths[1:]}
        assert "2 of 7 photos" in gallery.answer(QUERY, 3).notices[0]
        with pytest.raises(BadGallery, match="damaged"):
            gallery.similar(1, 3)
    report = verify_gallery(folder, repair=True)
    assert report.problems == ("the embeddings of 2 photos are damaged or missing",)
    assert report.repaired == 3
    again = update_gallery(folder, [photos], embedder)
    assert (again.unchanged, again.live) == (5, 7)
    assert verify_gallery(folder).problems == ()


def test_a_folder_filter_names_the_copy_inside_the_folder(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos / "a", 3)
    update_gallery(folder, [photos], embedder)
    (photos / "b").mkdir()
    twin = Path(shutil.copy(paths[0], photos / "b" / "twin.jpg"))
    share_row(folder, twin, 0)
    update_gallery(folder, [photos], embedder)
    with Gallery.open(folder) as gallery:
        (hit,) = gallery.search(QUERY, 5, under=photos / "b")
    assert Path(hit.path) == twin


def test_a_writer_and_repair_exclude_each_other(folder: Path) -> None:
    with WriterLock(folder / ".lock"):
        assert verify_gallery(folder).is_good
        with pytest.raises(GalleryBusy):
            verify_gallery(folder, repair=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.usefixtures("large_from")
@pytest.mark.parametrize(
    "name", ["manifest.json", "graph-1.hnsw", "catalogue-1.sqlite", "vectors/000000.f16"]
)
def test_an_inaccessible_file_is_reported_without_advice_to_remove_it(
    good: Path, name: str
) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(shutil.copytree(good, Path(place) / "g.sbtk"))
        folder.chmod(0o755)
        (folder / name).chmod(0)
        os.seteuid(65534)
        try:
            with Gallery.open(folder) as gallery:
                answer = gallery.answer(QUERY, 10)
            told = " ".join(answer.notices)
            assert [hit.id for hit in answer.hits] == expected_ids()
            assert name in ("graph-1.hnsw", "catalogue-1.sqlite")
        except BadGallery as problem:
            told = str(problem)
            assert name in ("manifest.json", "vectors/000000.f16")
        finally:
            os.seteuid(0)
    assert f"{name} cannot be read: Permission denied" in told
    assert "rm " not in told


@pytest.mark.parametrize("kept", [1, 7, COUNT - 1])
def test_intact_rows_of_a_truncated_batch_are_kept(folder: Path, kept: int) -> None:
    shard_of(folder).write_bytes(shard_of(folder).read_bytes()[: kept * 2 * DIM + 1])
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(QUERY, COUNT)) == kept
        assert gallery.unusable == COUNT - kept


@pytest.mark.parametrize("name", ["000000.f16", "vectors"])
def test_inaccessible_embeddings_are_not_repaired_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "g.sbtk"
    gallery_of(folder, unit_rows(30, 16))
    query = unit_rows(1, 16, seed=5)[0]
    with Gallery.open(folder) as gallery:
        right = gallery.search(query, 5)
    # Root, as whom tests may run, is refused nothing by the system itself.
    with monkeypatch.context() as system:
        for place, call in ((os, "open"), (os, "stat"), (Path, "iterdir")):
            system.setattr(place, call, _refusing(getattr(place, call), name))
        with Gallery.open(folder) as gallery, pytest.raises(BadGallery) as told:
            gallery.search(query, 5)
        assert "Permission denied" in told.value.found
        assert "damaged" not in told.value.found
        assert told.value.next_step.startswith("chmod -R u+rX")
        with pytest.raises(BadGallery, match="nothing was repaired"):
            verify_gallery(folder, repair=True)
    with Gallery.open(folder) as gallery:
        assert gallery.search(query, 5) == right


def _refusing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a call of the system that is refused for what has that name, or lies in it."""

    def called(path: Any, *others: Any, **named: Any) -> Any:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if name in Path(text).parts[-2:]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
        return call(path, *others, **named)

    return called
