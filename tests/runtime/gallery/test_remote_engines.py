"""Galleries are pushed to real databases, and answer from there as from the disk.

On PostgreSQL and milvus-lite; `test_milvus` has those that run on Milvus itself, too.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, ModelMismatch
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.photo_filter import Period
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import RemoteUnavailable, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.manifest import PhotoShard
from tests.milvus_server import LiteServer, MilvusServer
from tests.runtime.gallery.test_dates import IN_MAY, MAY, write_dated
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import (
    code_gallery_of,
    gallery_of,
    tiny_code_bundle,
    tiny_itq,
    unit_rows,
)
from tests.tiny_remote import Server, hits_of, push, write_tree

COUNT, DIM = 60, 16


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 60 random rows below /photos, ten to a folder."""
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    gallery_of(folder, unit_rows(COUNT, DIM))
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    with Embedder(tiny_code_bundle(tmp_path_factory.mktemp("bundle"), 16), threads=1) as opened:
        yield opened


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "photos")


def test_a_collection_gives_the_hits_of_its_gallery(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    update_gallery(gallery, [photos], embedder)
    report = push(gallery, url)
    assert (report.pushed, report.live, report.sources) == (15, 15, ("nas",))
    queries = unit_rows(5, DIM, seed=3)
    with Gallery.open(gallery) as local, RemoteGallery.open(url, {"nas": photos}) as there:
        assert len(there) == len(local) == 15
        assert there.manifest.model_id == local.manifest.model_id
        assert there.folders() == local.folders()
        for query in queries:
            for options in (
                *({}, {"fold": False}, {"under": photos / "2019"}, {"offset": 3}),
                *({"search": "exact"}, {"under": photos, "search": "exact"}),
                {"under": str(photos / "nothing")},
            ):
                k = 15 if "fold" in options else 6  # which of two copies is cut off differs
                assert hits_of(there, query, k, **options) == hits_of(local, query, k, **options)
        answers = [one.answer(queries[0], 50) for one in (local, there)]
        assert answers[0].notices == answers[1].notices
        mine, theirs = (one.recent(20) for one in (local, there))
        assert [(one.photo.path, one.photo.sha256) for one in theirs] == [
            (one.photo.path, one.photo.sha256) for one in mine
        ]
        for found in theirs:
            assert there.photo(found.photo.id) == found.photo
        some = next(one for one in theirs if one.copies)
        twin = next(one for one in mine if one.photo.path == some.photo.path)
        for fold in (True, False):
            assert [hit.path for hit in there.similar(some.photo.id, 5, fold=fold).hits] == [
                hit.path for hit in local.similar(twin.photo.id, 5, fold=fold).hits
            ]
        sketch = photos / "photo-0003.png"
        assert [h.path for h in there.query(sketch, embedder, 3, "photo")] == [
            h.path for h in local.query(sketch, embedder, 3, "photo")
        ]


def test_a_binary_collection_gives_the_hits_of_its_gallery(
    server: Server, url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    if isinstance(server, LiteServer):
        pytest.skip("milvus-lite has no binary vectors")
    gallery = tmp_path / "g.sbtk"
    update_gallery(gallery, [photos], embedder, bits=16)
    assert push(gallery, url).pushed == 15
    with Gallery.open(gallery) as local, RemoteGallery.open(url, {"nas": photos}) as there:
        assert there.manifest.bits == 16
        for query in unit_rows(5, DIM, seed=3):
            # Many codes are equally near, and ties are cut by ids, which differ.
            mine, theirs = (hits_of(one, query, 15) for one in (local, there))
            assert sorted(theirs) == sorted(mine)
        code = np.array([3, 200], dtype=np.uint8)
        assert sorted(hits_of(there, code, 15)) == sorted(hits_of(local, code, 15))
        with pytest.raises(BadData, match="16 bits"):
            there.answer(np.zeros(3, dtype=np.uint8), 3)
        one = there.recent(1)[0].photo
        twin = next(each.photo for each in local.recent(20) if each.photo.path == one.path)
        own, other = (
            {
                min([hit.path, *(copy.path for copy in hit.copies)]): round(hit.score, 4)
                for hit in each.similar(number, 15).hits
            }
            for each, number in ((local, twin.id), (there, one.id))
        )
        assert other == own


PERIODS: list[Period] = [
    MAY,
    (date(2024, 5, 1), None),
    (None, date(2024, 5, 31)),
    (date(1966, 1, 1), date(2019, 12, 31)),
    (date.min, date.max),
    (date(2024, 5, 10), date(2024, 5, 10)),
    (date(2031, 1, 1), date(2032, 1, 1)),
]


def test_periods_give_the_hits_of_the_gallery(url: str, tmp_path: Path, embedder: Embedder) -> None:
    photos = write_dated(tmp_path / "photos")
    update_gallery(tmp_path / "g.sbtk", [photos], embedder)
    assert push(tmp_path / "g.sbtk", url).notices == ()
    query = unit_rows(1, DIM)[0]
    with (
        Gallery.open(tmp_path / "g.sbtk") as local,
        RemoteGallery.open(url, {"nas": photos}) as there,
    ):
        assert {Path(hit.path).name for hit in there.answer(query, 99, taken=MAY).hits} == IN_MAY
        photo, twin = (one.recent(1)[0].photo.id for one in (local, there))
        for period in PERIODS:
            for under in (None, photos, photos / "nothing"):
                one, other = (
                    each.answer(query, 20, "exact", taken=period, under=under)
                    for each in (local, there)
                )
                assert [hit.path for hit in other.hits] == [hit.path for hit in one.hits]
                assert other.notices == one.notices
            mine, theirs = (
                [hit.path for hit in each.similar(number, 20, taken=period).hits]
                for each, number in ((local, photo), (there, twin))
            )
            assert theirs == mine
            mine, theirs = (
                [one.photo.path for one in each.recent(20, taken=period)] for each in (local, there)
            )
            assert theirs == mine
        with pytest.raises(BadConfig, match="a first day that is not after"):
            there.answer(query, 3, taken=(date(2024, 2, 2), date(2024, 1, 1)))


def test_a_collection_follows_its_gallery(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    update_gallery(gallery, [photos], embedder)
    push(gallery, url)
    (photos / "photo-0002.jpg").unlink()
    tiny_photo(901).save(photos / "photo-0003.png")
    (photos / "photo-0004.jpg").rename(photos / "2019" / "moved.jpg")
    tiny_photo(902).save(photos / "new.png")
    update_gallery(gallery, [photos], embedder)
    report = push(gallery, url)
    assert (report.pushed, report.deleted, report.unchanged) == (3, 2, 12)
    with Gallery.open(gallery) as local, RemoteGallery.open(url, {"nas": photos}) as there:
        query = unit_rows(1, DIM)[0]
        assert hits_of(there, query, 20) == hits_of(local, query, 20)
        assert there.folders() == local.folders()


def test_paths_follow_the_mounts_and_unmounted_photos_name_their_source(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    elsewhere = tmp_path / "mnt"
    shutil.copytree(photos, elsewhere)
    for path in photos.rglob("*"):
        status = path.stat()
        os.utime(elsewhere / path.relative_to(photos), ns=(0, status.st_mtime_ns))
    for number, root in enumerate((photos, elsewhere)):
        update_gallery(tmp_path / f"{number}.sbtk", [root], embedder)
    push(tmp_path / "0.sbtk", url)
    report = push(tmp_path / "1.sbtk", url)
    assert (report.pushed, report.unchanged, report.deleted) == (0, 15, 0)
    query = unit_rows(1, DIM)[0]
    with RemoteGallery.open(url) as there, RemoteGallery.open(url, {"nas": elsewhere}) as here:
        assert there.unmounted() == ["nas"] and here.unmounted() == []
        paths = [hit.path for hit in there.answer(query, 20).hits]
        assert [str(elsewhere / path.removeprefix("source:nas/")) for path in paths] == [
            hit.path for hit in here.answer(query, 20).hits
        ]
        assert all(Path(hit.path).is_file() for hit in here.answer(query, 20).hits)
        below = [hit.path for hit in there.answer(query, 20, under="nas/2019").hits]
        assert len(below) == 5 and all(path.startswith("source:nas/2019/") for path in below)
    with pytest.raises(BadConfig, match=r"no source tape\b"):
        RemoteGallery.open(url, {"tape": elsewhere})


def test_a_folder_above_mounts_or_with_mounts_in_it_gives_the_hits_of_the_gallery(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    other = tmp_path / "mnt" / "other"
    write_photos(other, 5, seed=7)
    update_gallery(tmp_path / "g.sbtk", [photos, other], embedder)
    push_gallery(tmp_path / "g.sbtk", open_store(url), {str(photos): "nas", str(other): "tape"})
    query = unit_rows(1, DIM)[0]
    mounts = {"nas": photos, "tape": other}
    with Gallery.open(tmp_path / "g.sbtk") as local, RemoteGallery.open(url, mounts) as there:
        for under in (os.path.commonpath([photos, other]), "/", photos, other.parent):
            assert hits_of(there, query, 30, under=under) == hits_of(local, query, 30, under=under)
            assert len(there.recent(30, under=under)) == len(local.recent(30, under=under)) > 0
    # A mount in a mount, and one that ends as another begins.
    with RemoteGallery.open(url, {"nas": "/mnt", "tape": "/mnt/2019"}) as there:
        inner = [hit.path for hit in there.answer(query, 30, under="/mnt/2019", fold=False).hits]
        assert len(inner) == 5 + 5
        assert len(there.answer(query, 30, under="/mnt", fold=False).hits) == 15 + 5
        assert not there.answer(query, 30, under="/mn").hits


def test_shards_can_be_pushed_separately(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    shards = [tmp_path / f"{number}.sbtk" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, start=1):
        update_gallery(shard, [photos], embedder, shard=PhotoShard(number, 3))
    failed: list[BaseException] = []

    def push_one(shard: Path) -> None:
        try:
            push(shard, url, patience_s=30)
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=push_one, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    whole = tmp_path / "whole.sbtk"
    update_gallery(whole, [photos], embedder)
    with Gallery.open(whole) as local, RemoteGallery.open(url, {"nas": photos}) as there:
        query = unit_rows(1, DIM)[0]
        assert hits_of(there, query, 20) == hits_of(local, query, 20)
        assert len(there) == 15 and there.folders() == local.folders()
    # A shard deletes only its own photos, and the whole source replaces its shards.
    victim = next(iter(sorted(photos.glob("photo-*"))))
    victim.unlink()
    deleted = 0
    for shard in shards:
        update_gallery(shard, [photos], embedder)
        deleted += push(shard, url).deleted
    assert deleted == 1
    update_gallery(whole, [photos], embedder)
    report = push(whole, url)
    assert (report.pushed, report.deleted) == (0, 0)
    with RemoteGallery.open(url) as there:
        assert len(there) == 14


def test_sources_and_collections_stay_separate(url: str, made_up: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sbtk"
    gallery_of(other, unit_rows(30, DIM, seed=5))
    push(made_up, url, "one")
    assert push(other, url, "two").deleted == 0
    push(other, f"{url}?collection=second", "one")
    with RemoteGallery.open(url) as both:
        assert both.sources() == {"one": COUNT, "two": 30}
        assert len(both.answer(unit_rows(1, DIM)[0], 100, fold=False).hits) == 90
        found = both.answer(unit_rows(1, DIM)[0], 100, under="two", fold=False).hits
        assert len(found) == 30 and all(hit.path.startswith("source:two/") for hit in found)
    with RemoteGallery.open(f"{url}?collection=second") as second:
        assert second.sources() == {"one": 30}


@pytest.mark.parametrize("other", ["bits", "model", "dim"])
def test_a_collection_of_another_model_is_refused_and_both_are_named(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder, other: str
) -> None:
    first, second = tmp_path / "first.sbtk", tmp_path / "second.sbtk"
    update_gallery(first, [photos], embedder)
    push(first, url)
    if other == "bits":
        update_gallery(second, [photos], embedder, bits=16)
    else:
        bundle = tiny_bundle(tmp_path / "b", 8 if other == "dim" else 16, seed=9, name="else")
        with Embedder(bundle, threads=1) as another:
            update_gallery(second, [photos], another)
    with pytest.raises(ModelMismatch) as caught:
        push(second, url)
    text = str(caught.value)
    names = ["16 numbers", "16 bits"] if other == "bits" else ["tiny@", "else@"]
    assert all(name in text for name in names) and "?collection=NAME" in text
    with RemoteGallery.open(url) as there:
        assert len(there) == 15


def test_unusual_paths_survive_a_push(url: str, tmp_path: Path) -> None:
    """Longer than a file system allows, not UTF-8, with quotes, newlines and wildcards."""
    import hashlib

    from sbtk_runtime.gallery.catalogue import Embedding, Origin
    from sbtk_runtime.gallery.rows import Vectors
    from sbtk_runtime.gallery.writer import Catalogue
    from sbtk_runtime.manifest import GalleryManifest
    from sbtk_runtime.preprocess import PREPROCESSING

    names = [
        b"x" * 10_000 + b".jpg",
        b"y" * 5000 + b"/" + b"z" * 5000 + b".jpg",
        *(b"caf\xe9.jpg", b"\xff\xfe/%_.jpg", b"a'b\"c;--.jpg", b"new\nline\ttab.jpg"),
        *("\N{SNOWMAN}/\N{GRINNING FACE}.jpg".encode(), b"back\\slash\\xe9.jpg", b" .jpg"),
    ]
    folder = tmp_path / "g.sbtk"
    folder.mkdir()
    rows = unit_rows(len(names), DIM)
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(Origin("made-up@0123456789ab", "fp32", DIM, PREPROCESSING))
        catalogue.record_roots([b"/photos"])
        batches = Vectors(folder / "vectors", DIM).append(0, rows)
        entries = [
            Embedding(b"/photos/" + name, 1, -(2**62), hashlib.sha256(name).hexdigest(), row)
            for row, name in enumerate(names)
        ]
        catalogue.commit(entries, [], batches)
        snapshot = catalogue.write_snapshot()
    GalleryManifest(
        *(1, "made-up@0123456789ab", "fp32", DIM, PREPROCESSING, len(names)), snapshot=snapshot
    ).write(folder)
    assert push(folder, url).pushed == len(names)
    assert push(folder, url).unchanged == len(names)
    with RemoteGallery.open(url, {"nas": "/mnt"}) as there:
        for row, name in zip(rows, names, strict=True):
            (hit,) = there.answer(row, 1).hits
            assert os.fsencode(hit.path) == b"/mnt/" + name
            folder_of = os.fsdecode(b"/mnt/" + name).rpartition("/")[0]
            assert hit.path in [h.path for h in there.answer(row, 20, under=folder_of).hits]


def test_wrong_clocks_do_not_matter(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    times = [-(10**18), 0, 4 * 10**18]  # 1938, 1970, 2096
    for path, time_ns in zip(sorted(photos.glob("photo-*")), times, strict=False):
        os.utime(path, ns=(time_ns, time_ns))
    update_gallery(tmp_path / "g.sbtk", [photos], embedder)
    assert push(tmp_path / "g.sbtk", url).pushed == 15
    assert push(tmp_path / "g.sbtk", url).unchanged == 15
    with Gallery.open(tmp_path / "g.sbtk") as local, RemoteGallery.open(url, {"nas": photos}) as at:
        mine, theirs = ([one.photo.path for one in each.recent(20)] for each in (local, at))
        assert theirs == mine and theirs[0].endswith("photo-0002.jpg")


def test_photos_are_listed_by_date_page_by_page(
    server: Server,
    url: str,
    tmp_path: Path,
    photos: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [path for path in sorted(photos.rglob("*")) if path.is_file()]
    for number, path in enumerate(paths):
        time_ns = 10**18 * (number if number < 5 else 7)  # many at one moment
        os.utime(path, ns=(time_ns, time_ns))
    update_gallery(tmp_path / "g.sbtk", [photos], embedder)
    if isinstance(server, MilvusServer):
        # As in a collection that is larger than what is fetched at once.
        monkeypatch.setattr("sbtk_runtime.gallery.milvus_collections._SLACK", 1)
        monkeypatch.setattr("sbtk_runtime.gallery.milvus_connection._PAGE_ROWS", 3)
    assert push(tmp_path / "g.sbtk", url).pushed == len(paths)
    assert push(tmp_path / "g.sbtk", url).unchanged == len(paths)
    with RemoteGallery.open(url, {"nas": photos}) as there:
        different = {path.read_bytes() for path in paths}
        listed = [one.photo for offset in range(0, 20, 4) for one in there.recent(4, offset)]
        assert len(listed) == len({photo.sha256 for photo in listed}) == len(different)
        times = [photo.mtime_ns for photo in listed]
        assert times == sorted(times, reverse=True) and len(set(times)) > 4
        below = there.recent(20, under=photos / "2019")
        assert {Path(one.photo.path).parent.name for one in below} == {"2019"}
        query = unit_rows(1, DIM)[0]
        assert len(there.answer(query, 20, "exact", fold=False).hits) == len(paths)


def test_damaged_rows_are_left_out_and_counted(url: str, tmp_path: Path) -> None:
    gallery_of(tmp_path / "g.sbtk", unit_rows(COUNT, DIM))
    with next((tmp_path / "g.sbtk" / "vectors").iterdir()).open("r+b") as file:
        file.seek(7 * 2 * DIM)
        file.write(b"\xff" * 2 * DIM)
    report = push(tmp_path / "g.sbtk", url)
    assert (report.pushed, report.damaged) == (COUNT - 1, 1)


def _push_and_stop(gallery: Path, url: str, batches: int) -> None:
    def stop(done: int, total: int) -> None:
        nonlocal batches
        batches -= 1
        if not batches:
            os.kill(os.getpid(), 9)

    push_gallery(gallery, open_store(url), "nas", progress=stop, batch=7)


@pytest.mark.kill
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_a_killed_push_resumes(url: str, made_up: Path, batches: int) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_push_and_stop, args=(made_up, url, batches))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    report = push(made_up, url, patience_s=20)
    assert report.unchanged == 7 * (batches - 1)
    assert report.pushed + report.unchanged == COUNT
    with Gallery.open(made_up) as local, RemoteGallery.open(url, {"nas": "/photos"}) as there:
        query = unit_rows(1, DIM)[0]
        assert [hit.score for hit in there.answer(query, 60, fold=False).hits] == pytest.approx(
            [hit.score for hit in local.answer(query, 60, fold=False).hits], abs=1e-6
        )


@pytest.mark.kill
@pytest.mark.parametrize("content", ["embeddings", "codes"])
def test_a_push_survives_a_crash_of_the_server(
    server: Server, url: str, made_up: Path, tmp_path: Path, content: str
) -> None:
    gallery, query = made_up, unit_rows(1, DIM)[0]
    if content == "codes":
        if isinstance(server, LiteServer):
            pytest.skip("milvus-lite has no binary vectors")
        gallery, itq = tmp_path / "codes.sbtk", tiny_itq(DIM, 16)
        code_gallery_of(gallery, itq.codes(unit_rows(COUNT, DIM)), itq)
    killed: list[int] = []

    def restart() -> None:
        time.sleep(0.5)
        server.start()

    def progress(done: int, total: int) -> None:
        if done >= 20 and not killed:
            killed.append(done)
            server.kill()
            threading.Thread(target=restart).start()

    report = push_gallery(
        gallery, open_store(url, patience_s=90), "nas", progress=progress, batch=10
    )
    assert killed and report.pushed == COUNT
    with RemoteGallery.open(url) as there:
        assert len(there.answer(query, 100, fold=False).hits) == COUNT
        # An open gallery reconnects, too.
        server.kill()
        with pytest.raises(RemoteUnavailable, match="does not answer"):
            there.answer(query, 1)
        server.start()
        assert len(there.answer(query, 1).hits) == 1


def test_two_pushes_of_one_source_exclude_each_other(url: str, made_up: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    thread = threading.Thread(
        target=lambda: push_gallery(made_up, open_store(url), "nas", progress=wait)
    )
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(RemoteUnavailable, match="another push of these photos"):
            push(made_up, url, patience_s=0)
        assert push(made_up, url, "another source").pushed == COUNT
    finally:
        go_on.set()
        thread.join()
    assert push(made_up, url, patience_s=0).unchanged == COUNT


def test_one_generation_is_pushed_while_the_gallery_is_updated(
    url: str, tmp_path: Path, photos: Path, embedder: Embedder
) -> None:
    gallery = tmp_path / "g.sbtk"
    update_gallery(gallery, [photos], embedder)

    def update(done: int, total: int) -> None:
        for path in sorted(photos.glob("photo-*"))[:1]:
            path.unlink()
        update_gallery(gallery, [photos], embedder)

    report = push_gallery(gallery, open_store(url), "nas", progress=update, batch=5)
    assert (report.pushed, report.damaged) == (15, 0)
    assert push(gallery, url).deleted == 15 - Gallery.open(gallery).count


def test_invalid_queries_are_refused(url: str, made_up: Path) -> None:
    push(made_up, url)
    with RemoteGallery.open(url) as there:
        query = unit_rows(1, DIM)[0]
        for arguments, options, error in (
            ((query, 0), {}, BadConfig),
            ((query, 1), {"offset": -1}, BadConfig),
            ((query, 1, "magic"), {}, BadConfig),
            ((query, 1, "codes"), {}, BadConfig),
            ((query, 1), {"rerank": "expand"}, BadConfig),
            ((query[:5], 1), {}, BadData),
            ((query * np.nan, 1), {}, BadData),
        ):
            with pytest.raises(error):
                there.answer(*arguments, **options)
        with pytest.raises(BadData, match="no photo 5"):
            there.similar(5)
        assert [there.photo(wrong) for wrong in (0, -1, 5, 1 << 63, 10**30)] == [None] * 5


def test_an_emptied_gallery_empties_its_source(url: str, tmp_path: Path) -> None:
    from sbtk_runtime.gallery.index import drop_photos

    gallery_of(tmp_path / "g.sbtk", unit_rows(COUNT, DIM))
    push(tmp_path / "g.sbtk", url)
    drop_photos(tmp_path / "g.sbtk")
    assert push(tmp_path / "g.sbtk", url).deleted == COUNT
    with RemoteGallery.open(url) as there:
        assert (len(there), there.folders(), there.recent(5)) == (0, {}, [])
        with pytest.raises(BadGallery, match="has no photos"):
            there.answer(unit_rows(1, DIM)[0], 1)
