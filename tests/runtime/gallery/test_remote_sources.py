"""Sources of collections are listed, found by either form of Unicode, and removed for good."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from pathlib import Path
from unicodedata import normalize

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.gallery.merge import merge_galleries
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import WHOLE, Part, RemoteUnavailable, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.remote_sources import Source, count_source, list_sources, remove_source
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.manifest import PhotoShard
from tests.tiny import write_photos
from tests.tiny_gallery import gallery_of, unit_rows
from tests.tiny_remote import push

COUNT, DIM = 60, 16
NFC, NFD = normalize("NFC", "café été"), normalize("NFD", "café été")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    gallery_of(folder, unit_rows(COUNT, DIM))
    return folder


def _generation(url: str) -> int:
    with closing(open_store(url).reader()) as reader:
        return reader.state().generation


def test_a_source_is_removed_for_good_and_others_stay(url: str, made_up: Path) -> None:
    store = open_store(url)
    for name in ("one", "two"):
        push(made_up, url, name)
    assert list_sources(store) == [Source("one", COUNT), Source("two", COUNT)]
    found, before = count_source(store, "one"), _generation(url)
    assert found == Source("one", COUNT)
    assert len(list_sources(store)) == 2  # counting changes nothing
    seen: list[tuple[int, int]] = []
    assert (
        remove_source(store, found, progress=lambda done, total: seen.append((done, total)))
        == COUNT
    )
    assert seen == [(COUNT, COUNT)]
    assert _generation(url) > before
    assert list_sources(store) == [Source("two", COUNT)]
    with pytest.raises(BadConfig, match=r"has no source one\n.*one of: two\n"):
        count_source(store, "one")
    with pytest.raises(BadConfig, match="has no source"):
        count_source(store, "")
    with RemoteGallery.open(url) as there:
        hits = there.answer(unit_rows(1, DIM)[0], 200, fold=False).hits
        assert len(hits) == COUNT and all(hit.path.startswith("source:two/") for hit in hits)
    # It can be pushed again, and a generation is never that of other photos.
    known = {before, _generation(url)}
    assert push(made_up, url, "one").pushed == COUNT
    known.add(_generation(url))
    remove_source(store, count_source(store, "one"))
    assert len({*known, _generation(url)}) == len(known) + 1 == 4


def test_what_an_interrupted_push_has_left_is_removed(url: str, made_up: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 20:
            raise Stopped

    store = open_store(url)
    with pytest.raises(Stopped):
        push_gallery(made_up, store, "one", progress=stop, batch=10)
    found = count_source(store, "one")
    assert (found.photos, list_sources(store)) == (20, [])
    assert remove_source(store, found) == 20
    assert push(made_up, url, "one").pushed == COUNT


def test_a_source_is_not_removed_while_it_is_pushed(url: str, made_up: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    store = open_store(url, patience_s=0)
    thread = threading.Thread(target=lambda: push_gallery(made_up, store, "one", progress=wait))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(RemoteUnavailable, match="another push of these photos"):
            remove_source(store, Source("one", COUNT))
    finally:
        go_on.set()
        thread.join()
    assert list_sources(store) == [Source("one", COUNT)]


def test_the_forms_of_unicode_of_a_name_are_one_source(url: str, made_up: Path) -> None:
    assert NFC != NFD
    assert push(made_up, url, NFD).sources == (NFC,)
    assert push(made_up, url, NFC).unchanged == COUNT
    query = unit_rows(1, DIM)[0]
    for name in (NFC, NFD):
        with RemoteGallery.open(url, {name: "/mnt"}) as there:
            assert there.unmounted() == []
            assert len(there.answer(query, 100, under=f"source:{name}/", fold=False).hits) == COUNT
            assert len(there.answer(query, 100, under="/mnt", fold=False).hits) == COUNT
        assert count_source(open_store(url), name) == Source(NFC, COUNT)
    with pytest.raises(BadConfig, match="one folder here, not two"):
        RemoteGallery.open(url, {NFC: "/mnt", NFD: "/other"})
    # An older version made two sources of them.
    open_store(url).publish(Part(NFD, WHOLE, 3, {}), lambda text: None)
    (stays, advice) = push(made_up, url, NFC).notices[-2:]
    assert stays == f"photos of other sources stay there: 3 of {NFD}"
    assert f"--remove-source '{NFD}' --at URL removes it" in advice
    assert count_source(open_store(url), NFD).name == NFD
    remove_source(open_store(url), count_source(open_store(url), NFD))
    assert list_sources(open_store(url)) == [Source(NFC, COUNT)]


def test_shards_that_were_not_pushed_are_told(url: str, tmp_path: Path, embedder: Embedder) -> None:
    photos, shard = tmp_path / "photos", tmp_path / "2.sbtk"
    write_photos(photos, 8)
    live = update_gallery(shard, [photos], embedder, shard=PhotoShard(2, 3)).live
    report = push(shard, url)
    assert report.notices == ("of nas, shards that were not pushed yet: 1/3, 3/3",)
    assert list_sources(open_store(url)) == [Source("nas", live, ("2/3",), ("1/3", "3/3"))]


def test_a_gallery_that_was_merged_without_a_shard_does_not_delete_its_photos(
    url: str, tmp_path: Path, embedder: Embedder
) -> None:
    photos, merged = tmp_path / "photos", tmp_path / "all.sbtk"
    paths = write_photos(photos, 12)
    shards = [tmp_path / f"{number}.sbtk" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, start=1):
        update_gallery(shard, [photos], embedder, shard=PhotoShard(number, 3))
        push(shard, url)
    merge_galleries(shards[1:], merged)
    report = push(merged, url)
    assert (report.pushed, report.deleted, report.notices) == (0, 0, ())
    gone = next(path for path in paths if PhotoShard(3, 3).has(path.name.encode()))
    gone.unlink()
    update_gallery(shards[2], [photos], embedder)
    merge_galleries(shards[1:], merged)
    assert push(merged, url).deleted == 1
    assert list_sources(open_store(url)) == [Source("nas", 11, ("1/3", "2/3", "3/3"))]
    # What was indexed since is not taken for a shard, and the whole folder is.
    write_photos(photos / "sub", 9, seed=5)
    added = update_gallery(merged, [photos / "sub"], embedder).new
    report = push(merged, url)
    assert (added, report.deleted) == (9, 0)
    assert report.pushed + report.other_shards == 9 and report.other_shards > 0
    assert report.notices[-1].startswith("photos of shards that the gallery was merged without")
    update_gallery(merged, [photos], embedder)
    report = push(merged, url)
    assert (report.pushed + report.unchanged, report.other_shards, report.deleted) == (20, 0, 0)
    shutil.rmtree(photos / "sub")
    for shard in shards:
        update_gallery(shard, [photos], embedder)
    merged = tmp_path / "again.sbtk"
    merge_galleries(shards, merged)
    report = push(merged, url)
    assert (report.pushed, report.deleted, report.unchanged) == (0, 9, 11)
    assert list_sources(open_store(url)) == [Source("nas", 11)]
